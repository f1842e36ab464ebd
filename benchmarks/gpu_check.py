"""Everything that needs a GPU, in one command of at most ten minutes: build, tests, benchmarks, compute-sanitizer.

    python benchmarks/gpu_check.py --out DIR [--wheels FOLDER]
    python benchmarks/gpu_check.py --out DIR --only memcheck racecheck    # once more, for steps that no time was left for
    python benchmarks/gpu_check.py --out DIR --rehearse                   # without a GPU: what can be run of it

Uses the Python, torch and nvcc at hand and no network. Packages that are missing come from the folder of wheels, into
build/. Every step has a time limit, none stops the others, and one that no time is left for is "not run". After each step DIR
has results.tar.gz (a log of each step, the files of the benchmarks), summary.json, and the CSV of the main benchmarks; last comes
a table. What is built and measured stays in build/ for a later call with --only. The exit status is 0 if no step failed.
"""
import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "gpu_check_site"  # packages from the wheels
WORK = ROOT / "build" / "gpu_check"  # logs and results
# Files of WORK that DIR has beside the archive: a machine that is there for ten minutes may hand back only a few.
BESIDE = {"summary.json": "summary.json", "ops.csv": "ops.csv", "sm90/ops.csv": "ops_sm90.csv", "layer.csv": "layer.csv",
          "train.csv": "train.csv"}
SLOT = 570  # seconds for everything, unless --limit gives another number
PROBE = 180  # seconds that it may take to find the GPU: the first import of torch on a machine is slow
GRACE = 10  # seconds that an interrupted step has to sum up
LEAST = 10  # seconds without which no step is started
# Beside torch, transformers and pytest: what the build, the tests and the benchmarks use, and the oldest version that will do.
PACKAGES = {"setuptools": "77", "pybind11": "2.13", "ninja": "1", "safetensors": "0.4.5", "accelerate": "1.1", "psutil": "0",
            "peft": "0.21", "tqdm": "4", "hypothesis": "6", "sortedcontainers": "2"}


@dataclass
class Step:
    """A command, how long it may take, and what became of it.

    Attributes:
        name: Also that of its log.
        command: Empty where it cannot be run; reason says why.
        limit: Seconds.
        environment: Variables beside those of all steps.
        status: "passed", "failed", "timed out", "skipped" or, until then, "not run".
        reason: Of a skip; else the line of the log that says most.
        log: Its path in the folder of results.
    """

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    status: str = "not run"
    exit_status: int | None = None
    seconds: float = 0.0
    reason: str = ""
    log: str = ""


# --- running steps ---


def run(step: Step, work: Path, environment: dict[str, str], deadline: float) -> Step:
    """Runs a step to its end or its limit; whatever it started ends with it."""
    start = time.monotonic()
    limit = min(step.limit, deadline - start)
    if not step.command:
        step.status = "skipped"
    elif limit < min(step.limit, LEAST):
        step.reason = "no time was left to start it"
    else:
        step.log = f"logs/{step.name}.log"
        path = work / step.log
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8") as log:
            print("$", *step.command, file=log, flush=True)
            try:
                process = subprocess.Popen(step.command, cwd=ROOT, env={**environment, **step.environment}, stdout=log,
                                           stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
                try:
                    step.exit_status = process.wait(limit)
                    step.status = "failed" if step.exit_status else "passed"
                except subprocess.TimeoutExpired:
                    step.status = "timed out"
                    _signal_group(process, signal.SIGINT)  # pytest then prints its summary
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(GRACE)
                finally:
                    _signal_group(process, signal.SIGKILL)
                    process.wait()
            except OSError as error:
                print(error, file=log)
                step.status = "failed"
        step.reason = _telling_line(path.read_text(encoding="utf-8", errors="replace"), step.status)
    step.seconds = round(time.monotonic() - start, 1)
    print(f"{step.status:9s} {step.seconds:6.1f} s  {step.name}  {step.reason}\n", end="", flush=True)  # one write: threads
    return step


def _signal_group(process: subprocess.Popen, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _telling_line(log: str, status: str) -> str:
    """The closing line of pytest or of compute-sanitizer; where something failed and there is none, the last line."""
    closing = re.findall(r"^=+ (.*(?:passed|failed|skipped|error).*) =+$|^((?:\d+ (?:passed|failed|skipped|errors?)\b.*))$"
                         r"|^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", log, re.M)
    if closing:
        return "".join(closing[-1])
    lines = [line.strip() for line in log.splitlines()[1:] if line.strip()]
    return lines[-1][:150] if lines and status != "passed" else ""


def run_all(groups: list[list[Step]], work: Path, environment: dict[str, str], limit: float,
            write: Callable[[], None]) -> None:
    """One group after the other, the steps of a group at the same time; write() as soon as one ends."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what is ignored here, as behind a shell's &, steps ignore too
    deadline = time.monotonic() + limit
    for group in groups:
        with ThreadPoolExecutor(len(group)) as pool:
            for ended in as_completed([pool.submit(run, step, work, environment, deadline) for step in group]):
                ended.result()
                write()


def hand_over(work: Path, out: Path) -> None:
    """Everything in work as one archive, and some of its files beside it; each file is exchanged at once."""
    with tarfile.open(out / "unfinished", "w:gz") as archive:
        archive.add(work, ".")
    os.replace(out / "unfinished", out / "results.tar.gz")
    for source, target in BESIDE.items():
        if (work / source).exists():
            shutil.copyfile(work / source, out / "unfinished")
            os.replace(out / "unfinished", out / target)


# --- the packages ---


def numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def missing_packages() -> list[str]:
    """Those of PACKAGES that are not installed, or too old."""
    missing = []
    for name, oldest in PACKAGES.items():
        try:
            if numbers(importlib.metadata.version(name)) < numbers(oldest):
                missing.append(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return missing


def packages_step(wheels: Path | None) -> Step:
    """Installs what is missing, one by one, so that a wheel that is not there costs that package alone."""
    missing = missing_packages()
    if not missing:
        return Step("packages", [], 0, reason="nothing is missing")
    if not wheels:
        return Step("packages", [], 0, reason=f"not installed or too old: {', '.join(missing)}; --wheels can name a folder with them")
    install = (f"{sys.executable} -m pip install --no-index --no-deps --no-compile --upgrade --target '{SITE}' "
               f"--find-links '{wheels.resolve()}'")
    script = "status=0; for name in " + " ".join(missing) + f"; do {install} \"$name\" || status=1; done; exit $status"
    return Step("packages", ["bash", "-c", script], 20)


# --- the steps ---


def find_tool(name: str) -> str | None:
    """A tool of CUDA, which often is not on PATH."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [f"{home}/{folder}" for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


# Rehearsed sizes, behind a benchmark's own arguments: the last one counts.
_ONE_LAYER = ("--shapes", "64x96", "--tokens", "16", "--ranks", "8", "--dtypes", "bf16", "--budget", "1")
REHEARSED = {"bench_ops": _ONE_LAYER, "bench_layer": _ONE_LAYER,
             "bench_train": ("--size", "135m", "--layers", "1", "--batch", "1", "--length", "8", "--rank", "8",
                             "--dtypes", "bf16", "--rounds", "1")}


def groups_of_steps(capabilities: list[str]) -> list[list[Step]]:
    """What is run, in its order, the most important first; without GPUs' capabilities what can be rehearsed.

    Tests and checkers share the device, benchmarks have it to themselves. With the packages' step the first groups' limits add up
    to at most SLOT, up to bench_ops_sm90; what follows has the time that these leave.
    """
    python, device = sys.executable, "cuda" if capabilities else "cpu"
    no_gpu = "" if capabilities else "needs a GPU"
    no_hopper = "" if "9.0" in capabilities else "needs a Hopper GPU"

    def step(name: str, limit: float, *command: object, lacks: str = "", **environment: str) -> Step:
        limit *= 1 if capabilities else 10
        return Step(name, [] if lacks else list(map(str, command)), limit, environment, reason=lacks)

    def tests(name: str, limit: float, *arguments: str, lacks: str = "", each: int = 60) -> Step:
        timeout = [f"--timeout={each}"] if importlib.util.find_spec("pytest_timeout") else []
        return step(name, limit, python, "-m", "pytest", "-v", "--tb=short", "-rfE", "--continue-on-collection-errors",
                    "--durations=10", "-p", "no:cacheprovider", *timeout, *arguments, lacks=lacks)

    def kernels(family: int) -> list[object]:
        return [python, "tests/every_kernel.py", "--device", device, "--family", family]

    def checker(tool: str, limit: float, family: int) -> Step:
        """A tool of compute-sanitizer; without the caching allocator it sees where tensors end."""
        sanitizer = find_tool("compute-sanitizer")
        options = ["--report-api-errors", "no"] if tool == "memcheck" else []
        return step(tool + "_sm90" * family, limit, sanitizer, "--tool", tool, "--error-exitcode", "9", *options,
                    *kernels(family), PYTORCH_NO_CUDA_MEMORY_CACHING="1",
                    lacks=no_gpu or family * no_hopper or (not sanitizer) * "compute-sanitizer is not installed")

    def benchmark(name: str, limit: float, script: str, *arguments: object, folder: str = "", prefix: tuple[object, ...] = (),
                  lacks: str = "", **environment: str) -> Step:
        return step(name, limit, *prefix, python, f"benchmarks/{script}.py", "--device", device, "--quick", *arguments,
                    *(() if capabilities else REHEARSED[script]), "--out", WORK / folder, lacks=lacks, **environment)

    ncu = find_tool("ncu")
    counters = [ncu, "--clock-control", "none", "--section", "SpeedOfLight", "--kernel-name", "regex:project|expand|factor_grad",
                "--csv", "--log-file", WORK / "ncu.csv"]
    every_method = ("--methods", "base", "lora", "lora_inplace", "dora", "hira", "loha", "abba_eager", "abba", "--rounds", 4)
    return [
        [step("build", 130, python, "setup.py", "build_ext", "--inplace")],
        [step("info", 45, python, "-m", "abba_ext", "info"),
         step("every_kernel", 45, *kernels(0)),
         tests("conformance", 45, "tests/test_conformance.py", "-k", "on_device")],
        [tests("gpu_tests", 90, "tests/test_gpu.py", "-k", "sm80 and not compile"),
         tests("ops_tests", 90, "tests/test_ops.py", "-k", "cuda")],
        [benchmark("bench_ops", 60, "bench_ops")],
        [benchmark("bench_layer", 70, "bench_layer", "--shapes", "4096x4096", "4096x14336", "--tokens", 64, 2048, 8192,
                   "--methods", "base", "lora_peft", "lora_inplace", "abba_eager", "abba_ext", "--budget", 25)],
        [benchmark("bench_train", 60, "bench_train", "--methods", "base", "lora", "lora_inplace", "abba_eager", "abba")],
        [step("every_kernel_sm90", 40, *kernels(1), lacks=no_hopper),
         tests("conformance_sm90", 40, "tests/test_conformance_sm90.py", "-k", "on_device", lacks=no_hopper)],
        [benchmark("bench_ops_sm90", 45, "bench_ops", "--budget", 15, folder="sm90", lacks=no_hopper * bool(capabilities),
                   ABBA_SM90="1")],
        # From here on with what time is left.
        [checker("memcheck", 120, 0), checker("racecheck", 120, 0)],
        [checker("initcheck", 120, 0), checker("synccheck", 120, 0), checker("memcheck", 120, 1),
         checker("racecheck", 120, 1)],
        [checker("initcheck", 120, 1), checker("synccheck", 120, 1),
         tests("gpu_tests_sm90", 90, "tests/test_gpu.py", "-k", "sm90 and not compile", lacks=no_hopper),
         tests("compile_tests", 120, "tests/test_gpu.py", "-k", "compile", each=100)],
        [benchmark("ncu", 60, "bench_ops", "--shapes", "4096x4096", "--tokens", 8192, "--methods", "abba_ext", "--budget", 0,
                   folder="ncu", prefix=counters, lacks=no_gpu or (not ncu) * "ncu is not installed")],
        [benchmark("bench_train_8b", 100, "bench_train", "--size", "8b", "--batch", 2, "--length", 1024,
                   "--methods", "base", "lora", "abba_eager", "abba", "--rounds", 4, folder="8b")],
        [benchmark("bench_train_methods", 70, "bench_train", *every_method, folder="methods")],
        [benchmark("bench_train_checkpointing", 80, "bench_train", *every_method, "--checkpointing", "on",
                   folder="checkpointing")],
        [benchmark("bench_layer_shapes", 110, "bench_layer", "--shapes", "4096x4096", "4096x14336", "14336x4096", "2048x2048",
                   "2048x8192", "--tokens", 64, 2048, 8192, "--methods", "base", "lora_peft", "lora_inplace", "dora_peft",
                   "hira_peft", "loha_peft", "abba_eager", "abba_ext", "--budget", 50, folder="shapes")],
    ]


# --- the machine ---


def describe_machine(environment: dict[str, str]) -> tuple[dict[str, object], str]:
    """The GPUs, versions and commit, and why there is no GPU. torch is imported elsewhere: this process keeps no memory on it."""
    def said(*command: str) -> str:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    code = ("import json, torch; n = torch.cuda.device_count(); print(json.dumps({'torch': torch.__version__, 'cuda': "
            "torch.version.cuda, 'gpus': [torch.cuda.get_device_name(i) for i in range(n)], 'capabilities': "
            "['{}.{}'.format(*torch.cuda.get_device_capability(i)) for i in range(n)]}), flush=True); "
            "torch.zeros(1, device='cuda').item()")
    none = {"torch": "", "cuda": None, "gpus": [], "capabilities": []}
    try:
        probe = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True,
                               timeout=PROBE)
        found = none | json.loads(probe.stdout or "{}")
        complaint = (probe.stderr.strip() or f"exit status {probe.returncode}") if probe.returncode else ""
    except subprocess.TimeoutExpired:
        found, complaint = none, f"looking for one took more than {PROBE} seconds"
    if complaint:
        found |= {"gpus": [], "capabilities": []}
    release = re.search(r"release (\S+),", said("nvcc", "--version"))
    commit = os.environ.get("ABBA_COMMIT") or (
        said("git", "rev-parse", "--short", "HEAD") + "+" * bool(said("git", "status", "--porcelain", "-uno")))
    return {**found, "python": sys.version.split()[0], "cores": os.cpu_count(), "nvcc": release[1] if release else "",
            "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
            "commit": commit, "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}, complaint


def environment_of_steps() -> dict[str, str]:
    """Few threads for each step, as several run at once, and byte code that all of them share."""
    environment = dict(os.environ)
    for name in ("PIP_CONSTRAINT",  # a wheel of another version than the pinned one will do
                 "PYTHONDONTWRITEBYTECODE", "ABBA_SM90"):
        environment.pop(name, None)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), str(SITE), os.environ.get("PYTHONPATH")]))
    environment["PATH"] = os.pathsep.join([str(SITE / "bin"), str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return environment | {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1", "PYTHONPYCACHEPREFIX": str(ROOT / "build" / "pycache"),
                          "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "4"}


# --- the command line ---


def report(steps: list[Step], work: Path) -> str:
    """What the benchmarks printed, the tests that failed, and a line for each step."""
    printed, failed = [], []
    for step in steps:
        if not step.log:
            continue
        log = (work / step.log).read_text(encoding="utf-8", errors="replace")
        if step.name.startswith("bench_") and step.status == "passed":
            printed.append("\n".join(log.splitlines()[1:]))
        elif step.status != "passed":
            failures = re.findall(r"^(?:FAILED|ERROR) .*|^=+ (?:Error|Warning|Invalid|Uninit|Barrier|Program hit).*", log,
                                  re.M)[:12]
            lines = [line[:200] for line in failures or log.splitlines()[-8:]]
            failed.append("\n".join([f"{step.name}, from {step.log}:", *lines]))
    width = max(len(step.name) for step in steps)
    table = "\n".join(f"{step.name.ljust(width)}  {step.status:9s} {step.seconds:6.1f} s  {step.reason}" for step in steps)
    return "\n\n".join([*printed, *failed, table])


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels of packages that may be missing")
    parser.add_argument("--limit", type=float, default=SLOT, metavar="SECONDS", help=f"for everything (default: {SLOT})")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone, beside the results that are there")
    parser.add_argument("--rehearse", action="store_true", help="succeed without a GPU, running the rest on the CPU")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    environment = environment_of_steps()
    machine, complaint = describe_machine(environment)
    if complaint and not options.rehearse:
        print(f"no GPU: {complaint}", file=sys.stderr)
        return 1
    print(f"{', '.join(machine['gpus']) or 'no GPU'}; torch {machine['torch']}, nvcc {machine['nvcc'] or 'none'}, commit "
          f"{machine['commit']}", flush=True)
    if machine["gpus"]:
        environment |= {"ABBA_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ";".join(sorted(set(machine["capabilities"])))}

    sys.path.insert(0, str(SITE))
    groups = [[packages_step(options.wheels)], *groups_of_steps(machine["capabilities"])]
    groups = [kept for group in groups if (kept := [step for step in group if step.name in (options.only or [step.name])])]
    if not groups:
        parser.error(f"no step is named {' or '.join(options.only)}")
    chosen = [step for group in groups for step in group]
    steps = chosen
    if not options.only:
        shutil.rmtree(WORK, ignore_errors=True)
    elif (WORK / "summary.json").exists():
        before = [Step(**step) for step in json.loads((WORK / "summary.json").read_text(encoding="utf-8"))["steps"]]
        steps = [step for step in before if step.name not in options.only] + chosen
    WORK.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)

    def passed() -> bool:
        return not any(step.status in ("failed", "timed out") for step in chosen)

    def write() -> None:
        summary = {"passed": passed(), **machine, "seconds": round(time.monotonic() - start, 1), "steps": [*map(asdict, steps)]}
        (WORK / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        hand_over(WORK, options.out)

    limit = options.limit if machine["gpus"] else max(options.limit, 3600)
    run_all(groups, WORK, environment, limit - (time.monotonic() - start), write)
    print("\n" + report(chosen, WORK))
    if rest := [step.name for step in steps if step.status == "not run"]:
        print(f"not run; a second call can: --only {' '.join(rest)}")
    print(f"{'PASSED' if passed() else 'FAILED'} in {time.monotonic() - start:.0f} s; {options.out / 'summary.json'}")
    return 0 if passed() else 1


if __name__ == "__main__":
    sys.exit(main())
