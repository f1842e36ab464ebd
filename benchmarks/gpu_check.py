"""Everything that needs a GPU, in one command of at most ten minutes: build, tests, compute-sanitizer, benchmarks.

    python benchmarks/gpu_check.py --out DIR [--wheels FOLDER]
    python benchmarks/gpu_check.py --out DIR --rehearse          # without a GPU: what can be run of it

Uses the Python, torch and nvcc at hand and no network. Packages that are missing come from the folder of wheels, into
build/gpu_check. Every step has a time limit, and none stops the others. Writes to DIR a log for each step, the files of
the benchmarks, and summary.json; prints a table last. The exit status is 0 if no step failed and a GPU was there.
"""
import argparse
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "gpu_check"  # packages from the wheels
SLOT = 570  # seconds for everything, unless --limit gives another number
# Beside torch, transformers and pytest: what the build, the tests and the benchmarks use, and the oldest version that will do.
PACKAGES = {"setuptools": "77", "pybind11": "2.13", "ninja": "1", "safetensors": "0.4.5", "accelerate": "1.1", "psutil": "0",
            "peft": "0.21", "tqdm": "4", "hypothesis": "6", "sortedcontainers": "2", "pytest-xdist": "3", "execnet": "2",
            "nvidia-cuda-nvdisasm": "12"}


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


def run(step: Step, out: Path, environment: dict[str, str], deadline: float) -> Step:
    """Runs a step to its end or its limit; whatever it started ends with it."""
    start = time.monotonic()
    limit = min(step.limit, deadline - start)
    if not step.command:
        step.status = "skipped"
    elif limit < 1:
        step.status, step.reason = "timed out", "no time was left to start it"
    else:
        step.log = f"{step.name}.log"
        with (out / step.log).open("w", encoding="utf-8") as log:
            print("$", *step.command, file=log, flush=True)
            try:
                process = subprocess.Popen(step.command, cwd=ROOT, env={**environment, **step.environment}, stdout=log,
                                           stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
                try:
                    step.exit_status = process.wait(limit)
                    step.status = "failed" if step.exit_status else "passed"
                except subprocess.TimeoutExpired:
                    step.status = "timed out"
                finally:
                    _end_group(process)
            except OSError as error:
                print(error, file=log)
                step.status = "failed"
        step.reason = _telling_line((out / step.log).read_text(encoding="utf-8", errors="replace"), step.status)
    step.seconds = round(time.monotonic() - start, 1)
    print(f"{step.status:9s} {step.seconds:6.1f} s  {step.name}  {step.reason}", flush=True)
    return step


def _end_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _telling_line(log: str, status: str) -> str:
    """The closing line of pytest or of compute-sanitizer; where something failed and there is none, the last line."""
    closing = re.findall(r"^=+ (.*(?:passed|failed|skipped|error).*) =+$|^((?:\d+ (?:passed|failed|skipped|errors?)\b.*))$"
                         r"|^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", log, re.M)
    if closing:
        return "".join(closing[-1])
    lines = [line.strip() for line in log.splitlines()[1:] if line.strip()]
    return lines[-1][:150] if lines and status != "passed" else ""


def run_all(groups: list[list[Step]], out: Path, environment: dict[str, str], limit: float, write) -> None:
    """One group after the other, the steps of a group at the same time; write() after each."""
    deadline = time.monotonic() + limit
    for group in groups:
        with ThreadPoolExecutor(len(group)) as pool:
            for _ in pool.map(lambda step: run(step, out, environment, deadline), group):
                write()


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
        return Step("packages", [], 0, reason=f"not installed: {', '.join(missing)}; --wheels can name a folder with them")
    install = (f"{sys.executable} -m pip install --no-index --no-deps --no-compile --upgrade --target '{SITE}' "
               f"--find-links '{wheels.resolve()}'")
    script = "status=0; for name in " + " ".join(missing) + f"; do {install} \"$name\" || status=1; done; exit $status"
    return Step("packages", ["bash", "-c", script], 60)


# --- the steps ---


def find_sanitizer() -> str | None:
    """compute-sanitizer, which often is not on PATH."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [f"{home}/{folder}" for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def sanitizer_steps(has_gpu: bool) -> list[Step]:
    """Each tool on the same small shapes; without the caching allocator they see where tensors end."""
    sanitizer = find_sanitizer()
    steps = []
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        options = ["--report-api-errors", "no"] if tool == "memcheck" else []
        command, reason = [], ""
        if not has_gpu:
            reason = "needs a GPU"
        elif not sanitizer:
            reason = "compute-sanitizer is not installed"
        else:
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *options, sys.executable, "tests/every_kernel.py"]
        steps.append(Step(tool, command, 220, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, reason=reason))
    return steps


def groups_of_steps(options: argparse.Namespace, has_gpu: bool) -> list[list[Step]]:
    """What is run, in its order. Tests and checkers share the device; the benchmarks have it to themselves."""
    python, rehearse = sys.executable, not has_gpu and options.rehearse
    device = ["--device", "cuda" if has_gpu else "cpu"]
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10"]
    gpu_tests = ["tests/test_conformance.py", "tests/test_conformance_sm90.py", "tests/test_gpu.py"]
    workers = min(8, (os.cpu_count() or 2) // 2)
    # test_build.py is about front ends that install, the same on every machine.
    machine_code = "tests/test_cuda_build.py"  # its fixture compiles for minutes: not once for each worker
    left_out = ["tests/test_build.py", machine_code, *gpu_tests]
    suite = [*pytest, "--continue-on-collection-errors", *(f"--ignore={file}" for file in left_out)]
    small = ["--shapes", "64x96", "--tokens", "16", "--ranks", "8", "--dtypes", "bf16", "--budget", "1"] if rehearse else []
    layer = small or ["--shapes", "4096x4096", "4096x14336", "--tokens", "64", "2048", "8192", "--ranks", "32", "--budget", "25",
                      "--methods", "base", "lora_peft", "lora_inplace", "abba_eager", "abba_ext"]
    train = ["--methods", "base", "lora", "lora_inplace", "abba_eager", "abba"]
    if rehearse:
        train += ["--layers", "1", "--batch", "1", "--length", "8", "--rank", "8", "--dtypes", "bf16", "--rounds", "1"]

    def benchmark(name: str, script: str, arguments: list[str], limit: float, out: Path = options.out, **environment: str) -> Step:
        if not has_gpu and not rehearse:
            return Step(name, [], 0, reason="needs a GPU")
        return Step(name, [python, f"benchmarks/{script}", *device, "--quick", *arguments, "--out", str(out)], limit, environment)

    driver = Step("every_kernel", [python, "tests/every_kernel.py", *device], 100)
    if not has_gpu and not rehearse:
        driver = Step("every_kernel", [], 0, reason="needs a GPU")
    return [
        [Step("build", [python, "setup.py", "build_ext", "--inplace"], 240 if has_gpu else 600)],
        [Step("info", [python, "-m", "abba_ext", "info"], 40), driver],
        [Step("gpu_tests", [*pytest, *gpu_tests], 220),
         Step("suite", [*suite, *(["-n", str(workers)] if options.workers else [])], 220 if has_gpu else 1200,
              {"OMP_NUM_THREADS": "2"}),
         Step("machine_code", [*pytest, machine_code], 220 if has_gpu else 600),
         *sanitizer_steps(has_gpu)],
        [benchmark("bench_ops", "bench_ops.py", small, 90)],
        [benchmark("bench_ops_sm90", "bench_ops.py", small, 90, options.out / "sm90", ABBA_SM90="1")],
        [benchmark("bench_layer", "bench_layer.py", layer, 90)],
        [benchmark("bench_train", "bench_train.py", train, 60)],
    ]


# --- the machine ---


def describe_machine() -> dict[str, object]:
    """The GPU, versions and commit. torch is imported elsewhere: this process keeps no memory on the GPU."""
    def said(*command: str) -> str:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    code = ("import json, torch; n = torch.cuda.device_count(); print(json.dumps({'torch': torch.__version__, 'cuda': "
            "torch.version.cuda, 'gpus': [torch.cuda.get_device_name(i) for i in range(n)], 'capabilities': "
            "['{}.{}'.format(*torch.cuda.get_device_capability(i)) for i in range(n)]}))")
    torch_says = said(sys.executable, "-c", code)
    release = re.search(r"release (\S+),", said("nvcc", "--version"))
    return {"torch": "", "cuda": None, "gpus": [], "capabilities": [], **json.loads(torch_says or "{}"),
            "python": sys.version.split()[0], "cores": os.cpu_count(), "nvcc": release[1] if release else "",
            "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
            "commit": said("git", "rev-parse", "--short", "HEAD") + "+" * bool(said("git", "status", "--porcelain", "-uno")),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def environment_of_steps(machine: dict[str, object]) -> dict[str, str]:
    environment = dict(os.environ)
    environment.pop("PIP_CONSTRAINT", None)  # a wheel of another version than the pinned one will do
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), str(SITE), os.environ.get("PYTHONPATH")]))
    environment["PATH"] = os.pathsep.join([str(SITE / "bin"), str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment |= {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if machine["gpus"]:
        environment.setdefault("ABBA_CUDA", "1")
        environment.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(sorted(set(machine["capabilities"]))))
    return environment


# --- the command line ---


def report(steps: list[Step], out: Path) -> str:
    """What the benchmarks printed, the tests that failed, and a line for each step."""
    parts = []
    for step in steps:
        if not step.log:
            continue
        log = (out / step.log).read_text(encoding="utf-8", errors="replace")
        if step.name.startswith("bench_") and step.status == "passed":
            parts.append("\n".join(log.splitlines()[1:]))
        elif step.status != "passed":
            failures = re.findall(r"^(?:FAILED|ERROR) .*|^=+ (?:Error|Warning|Invalid|Uninit|Barrier|Program hit).*", log,
                                  re.M)[:12]
            parts.append("\n".join([f"{step.name}, from {out / step.log}:", *(line[:200] for line in failures or
                                                                              log.splitlines()[-8:])]))
    width = max(len(step.name) for step in steps)
    parts += ["\n".join(f"{step.name.ljust(width)}  {step.status:9s} {step.seconds:6.1f} s  {step.reason}" for step in steps)]
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels of packages that may be missing")
    parser.add_argument("--limit", type=float, default=SLOT, metavar="SECONDS", help=f"for everything (default: {SLOT})")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="only these steps")
    parser.add_argument("--rehearse", action="store_true", help="succeed without a GPU, running the rest on the CPU")
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    machine = describe_machine()
    environment = environment_of_steps(machine)
    has_gpu = bool(machine["gpus"])
    print(f"{', '.join(machine['gpus']) or 'no GPU'}; torch {machine['torch']}, nvcc {machine['nvcc'] or 'none'}, commit "
          f"{machine['commit']}", flush=True)

    sys.path.insert(0, str(SITE))
    packages = packages_step(options.wheels)
    done: list[Step] = []

    def passed() -> bool:
        good = ("passed", "skipped")
        return all(step.status in good for step in done) and (has_gpu or options.rehearse)

    def write() -> None:
        summary = {"passed": passed(), **machine, "seconds": round(time.monotonic() - start, 1),
                   "steps": [asdict(step) for step in done]}
        (options.out / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def chosen(groups: list[list[Step]]) -> list[list[Step]]:
        kept = [[step for step in group if not options.only or step.name in options.only] for group in groups]
        done.extend(step for group in kept for step in group)
        return [group for group in kept if group]

    limit = options.limit if has_gpu else max(options.limit, 3600)
    run_all(chosen([[packages]]), options.out, environment, limit, write)
    importlib.invalidate_caches()
    options.workers = "pytest-xdist" not in missing_packages()
    run_all(chosen(groups_of_steps(options, has_gpu)), options.out, environment, limit - (time.monotonic() - start), write)
    if not done:
        parser.error(f"no step is named {' or '.join(options.only)}")
    write()
    print("\n" + report(done, options.out))
    if not has_gpu and not options.rehearse:
        print("no GPU: nothing was checked that needs one")
    print(f"{'PASSED' if passed() else 'FAILED'} in {time.monotonic() - start:.0f} s; {options.out / 'summary.json'}")
    return 0 if passed() else 1


if __name__ == "__main__":
    sys.exit(main())
