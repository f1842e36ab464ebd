"""Fair timing and truthful peak memory of training steps, with what is needed to read the numbers later.

Methods are timed in turn, one run each per round in a new random order, so that a noisy machine disturbs all of them
alike. On the CPU each run also notes how long its threads waited for a core, and the calmer half of a method's runs
counts. On a GPU every run starts with a cold L2 cache and is timed by CUDA events.
"""
import collections
import contextlib
import csv
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines per run to stderr

MODES = ("full", "forward", "backward")

# Largest relative Frobenius error against a definition in fp64.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ (Frobenius), computed in want's dtype."""
    return ((got.to(want.dtype) - want).norm() / want.norm()).item()


@contextlib.contextmanager
def noted(failures: list[str] | None, what: str) -> Iterator[None]:
    """An exception within is printed and kept in failures, so that the rest is measured all the same; raised if that is None."""
    try:
        yield
    except Exception as error:
        if failures is None:
            raise
        failures.append(f"{what}: {type(error).__name__}: {str(error).split(chr(10))[0]}")
        traceback.print_exc()
        print(failures[-1], file=sys.stderr, flush=True)


def notes(failures: list[str] | None, case: object) -> Callable[[str], contextlib.AbstractContextManager]:
    """A method's name → noted for what that method does in a case."""
    return lambda method: noted(failures, f"{method}, {case}")


def report(failures: list[str]) -> int:
    """Prints them; the exit status."""
    for failure in failures:
        print("FAILED", failure)
    return 1 if failures else 0


class Step:
    """One training step of a layer: y = forward(x), then the gradients of x and the parameters for a given dy.

    Mode "forward" is the training forward (it builds the graph), "backward" leaves the forward untimed.
    Inputs are rotated: run i uses inputs[i % len(inputs)].
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], parameters: list[Tensor],
                 inputs: list[tuple[Tensor, Tensor]], mode: str = "full"):
        """Args: forward x [T, n] → y [T, m]; parameters; inputs (x, dy) with dy [T, m]; mode out of MODES."""
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.forward, self.parameters, self.inputs, self.mode = forward, parameters, inputs, mode
        self.runs = 0

    def prepare(self) -> None:
        """The part of the next run that is not timed."""
        self.x, self.dy = self.inputs[self.runs % len(self.inputs)]
        self.runs += 1
        self.y = self.forward(self.x) if self.mode == "backward" else None

    def run(self) -> Any:
        """The timed part. Its results are returned so that freeing them is not timed."""
        y = self.forward(self.x) if self.y is None else self.y
        self.y = None
        if self.mode == "forward":
            return y
        return y, torch.autograd.grad(y, [self.x, *self.parameters], self.dy)


# --- time ---


class Run(NamedTuple):
    """One timed run.

    Attributes:
        elapsed_ms: Wall-clock time.
        waited_ms: Time that this process's threads, together, were ready to run but had no core. 0 if not known.
    """

    elapsed_ms: float
    waited_ms: float


class Timing(NamedTuple):
    """Milliseconds per run over the runs that count.

    Attributes:
        median_ms: The median.
        p20_ms: 20th percentile.
        p80_ms: 80th percentile.
        min_ms: The minimum.
        wait_share: Time waited for a core over elapsed time (median), the disturbance by other processes that is left.
        runs: Runs that count.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    min_ms: float
    wait_share: float
    runs: int


def summarise(runs: list[Run]) -> Timing:
    """Statistics of the calmer half of the runs; of all runs where waiting is not known."""
    calm = runs
    if any(run.waited_ms for run in runs):
        calm = sorted(runs, key=lambda run: run.waited_ms / run.elapsed_ms)[:math.ceil(len(runs) / 2)]
    ordered = sorted(run.elapsed_ms for run in calm)

    def at(quantile: float) -> float:
        return ordered[round(quantile * (len(ordered) - 1))]

    return Timing(statistics.median(ordered), at(0.2), at(0.8), ordered[0],
                  statistics.median(run.waited_ms / run.elapsed_ms for run in calm), len(ordered))


def _waited_ns() -> int:
    """Nanoseconds that the threads of this process have waited for a core so far; 0 outside of Linux."""
    waited = 0
    for schedstat in Path("/proc/self/task").glob("*/schedstat"):
        try:
            waited += int(schedstat.read_text().split()[1])
        except OSError:  # the thread has just ended
            continue
    return waited


class _CpuClock:
    def time(self, step: Step) -> Run:
        step.prepare()
        waited = _waited_ns()
        start = time.perf_counter_ns()
        kept = step.run()
        elapsed = time.perf_counter_ns() - start
        waited = _waited_ns() - waited
        del kept
        return Run(elapsed / 1e6, max(waited, 0) / 1e6)


class _CudaClock:
    """With launch_ahead the run is launched while the cache is still being flushed: launches are not in its time."""

    def __init__(self, device: torch.device, launch_ahead: bool):
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.launch_ahead = launch_ahead
        self.flush = torch.empty((16 if launch_ahead else 2) * l2_bytes, dtype=torch.uint8, device=device)
        self.begin, self.end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def time(self, step: Step) -> Run:
        step.prepare()
        torch.cuda.synchronize()
        self.flush.zero_()  # evicts the L2 cache
        if not self.launch_ahead:
            torch.cuda.synchronize()
        self.begin.record()
        kept = step.run()
        self.end.record()
        torch.cuda.synchronize()
        del kept
        return Run(self.begin.elapsed_time(self.end), 0.0)


def time_interleaved(steps: dict[str, Step], seconds: float, device: torch.device, *, warmup: int = 2,
                     min_rounds: int = 6, max_rounds: int = 1000, seed: int = 0, launch_ahead: bool = False,
                     note: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext
                     ) -> dict[str, Timing]:
    """Times every step once per round until the time is spent; a step that fails is not run again and has no timing.

    Args:
        steps: The methods by name.
        seconds: Time for all rounds together; exceeded if min_rounds need more.
        device: Where the steps run.
        warmup: Untimed runs of each step first.
        min_rounds: Rounds at least.
        max_rounds: Rounds at most.
        seed: Of the order within the rounds.
        launch_ahead: On a GPU leave out the time that launches take: for single operators, which inside a network run
            behind other work. More than about 200 µs of launches still show.
        note: Context of each run, by its name; what it swallows is a failure.
    """
    clock = _CudaClock(device, launch_ahead) if device.type == "cuda" else _CpuClock()
    runs: dict[str, list[Run]] = {name: [] for name in steps}

    def run(name: str, kept: list[Run]) -> None:
        if name in runs:
            with note(name):
                kept.append(clock.time(steps[name]))
                return
            del runs[name]

    for name in steps:
        for _ in range(warmup):
            run(name, [])
    order, shuffle = list(steps), random.Random(seed).shuffle
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < deadline):
        shuffle(order)
        for name in order:
            run(name, runs.get(name, []))
        rounds += 1
    return {name: summarise(values) for name, values in runs.items()}


# --- memory ---


def peak_memory(step: Step, device: torch.device) -> int:
    """Bytes that one run has allocated at its peak beyond what was live before it.

    On a GPU the caching allocator's peak statistic. On the CPU the allocations and frees of torch's allocator as the
    profiler records them, replayed: this includes scratch that C++ operators allocate as tensors, and excludes what the
    matmul libraries allocate for themselves.
    """
    step.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept = step.run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated(device) - before
        del kept
        return peak
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = step.run()
    del kept
    return _replayed_peak(_memory_events(profile))


def _memory_events(profile: torch.profiler.profile) -> list[int]:
    """Bytes allocated (> 0) and freed (< 0) on the CPU, in order of time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    events = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"
              and event["args"]["Device Type"] == 0]
    return [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["args"]["Ev Idx"])]


def _replayed_peak(events: list[int]) -> int:
    live = peak = 0
    for size in events:
        live += size
        peak = max(peak, live)
    return peak


# --- what the numbers belong to ---


def device_name(device: torch.device) -> str:
    """The GPU's or processor's model name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if names:
            return names[0].strip()
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A folder name: "NVIDIA H200" → "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", " ", name.lower())).strip("-")


WRITTEN = (":(top,exclude)benchmarks/results", ":(top,exclude)benchmarks/paper/results",
           ":(top,exclude)benchmarks/paper/README.md")  # by measurements


def commit() -> str:
    """The short commit of this checkout, with "+" if tracked files other than WRITTEN differ; "" outside of one.

    ABBA_COMMIT says it where there is only a copy of a checkout.
    """
    if given := os.environ.get("ABBA_COMMIT"):
        return given
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno", "--", ":/", *WRITTEN) else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def metadata(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit, threads and time; sm90 is whether the kernels for Hopper were asked for."""
    import abba_ext

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return ""

    return {"device": device_name(device), "device_type": device.type, "threads": torch.get_num_threads(),
            "cores": os.cpu_count(), "load_average": os.getloadavg()[0], "sm90": os.environ.get("ABBA_SM90") == "1",
            "commit": commit(), "abba_ext": abba_ext.__version__, "torch": torch.__version__, "peft": version("peft"),
            "transformers": version("transformers"), "python": platform.python_version(),
            "cuda": torch.version.cuda if device.type == "cuda" else "",
            "platform": platform.system() + " " + platform.machine(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows that share their keys; numbers with six significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file of :func:`write_csv`, as text."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a dictionary, indented."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_results(path: Path, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """path.csv, if there are rows, and path.json."""
    if rows:
        write_csv(path.with_suffix(".csv"), rows)
    write_json(path.with_suffix(".json"), about)


class Rows(dict):
    """{method: row}; of a method that is not there every value is NaN."""

    def __missing__(self, method: str) -> dict[str, float]:
        return collections.defaultdict(lambda: math.nan)


def by_case(rows: list[dict[str, Any]], fields: tuple[str, ...]) -> dict[tuple, Rows]:
    """The rows as {case: {method: row}}."""
    cases: dict[tuple, Rows] = {}
    for row in rows:
        cases.setdefault(tuple(row[field] for field in fields), Rows())[row["method"]] = row
    return cases


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns of right-aligned text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
                     for row in [header, *rows])
