"""What the README guarantees, tried at full length by one command; the figures go into a file and from there into the README.

    python tests/robustness.py            # about a quarter of an hour
    python tests/robustness.py --redraw   # only the README's section, from the file

Writes benchmarks/results/robustness.json and the README's section. If anything fails it writes nothing and exits with 1.
The operators are also called under AddressSanitizer, from a build in a temporary folder; that needs gcc.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import faults
import fuzz_ops
import torch
from threads import num_threads
from tqdm import tqdm

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from harness import metadata, write_json  # noqa: E402
from plot import replace_section  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "robustness.json"
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "abba_ext", "build_support")
HOSTILE = ["test_merge_command.py::test_refused_bases", "test_formats.py::test_no_code_of_a_pickle_is_run",
           "test_formats.py::test_pickles_that_are_no_state_dict", "test_formats.py::test_damaged_adapters_are_refused",
           "test_formats.py::test_damaged_loha_is_refused", "test_formats.py::test_damaged_configs_are_refused"]
# Reads the first element after a tensor: what the sanitizer must report if it watches over torch's memory at all.
READ_BEYOND = """
import ctypes, sys, torch
import abba_ext
beyond = ctypes.CDLL(sys.argv[1]).beyond
beyond.argtypes = [ctypes.c_void_p, ctypes.c_long]
beyond(torch.zeros(1000).data_ptr(), 1000)
"""


def hostile_files() -> dict[str, int]:
    """The tests of files made to harm, each of one kind."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}",
                               *(str(TESTS / test) for test in HOSTILE)], capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        suite = ElementTree.parse(report).getroot().find("testsuite")
        assert suite.get("skipped") == "0", done.stdout[-3000:]
        return {"refused": int(suite.get("tests"))}


def address_sanitizer(calls: int, seed: int) -> dict[str, int]:
    """Random calls of the operators, compiled with AddressSanitizer; a planted read beyond a tensor must be reported."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for source in SOURCES:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, folder / source, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
            else:
                shutil.copy(ROOT / source, folder)
        flags = "-fsanitize=address -D_GLIBCXX_ASSERTIONS -fno-omit-frame-pointer -g1"
        build = os.environ | {"ABBA_CUDA": "0", "CFLAGS": flags, "CXXFLAGS": flags, "LDFLAGS": "-fsanitize=address"}
        _run([sys.executable, "setup.py", "build_ext", "--inplace"], folder, build)
        (folder / "beyond.c").write_text("float beyond(const float* p, long n) { return p[n]; }\n")
        _run(["gcc", *flags.split(), "-shared", "-fPIC", "beyond.c", "-o", "beyond.so"], folder, os.environ)
        (folder / "beyond.py").write_text(READ_BEYOND)
        libraries = [_run(["gcc", f"-print-file-name={library}"], folder, os.environ).strip()
                     for library in ("libasan.so", "libstdc++.so")]
        watched = os.environ | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1",
                                "PYTHONPATH": os.pathsep.join([str(folder), str(TESTS)])}
        planted = subprocess.run([sys.executable, "beyond.py", folder / "beyond.so"], cwd=folder, env=watched,
                                 capture_output=True, text=True)
        assert planted.returncode and "heap-buffer-overflow" in planted.stderr, \
            f"a read beyond a tensor was not reported: {planted.stderr[-3000:]}"
        script = ("import json, abba_ext, fuzz_ops\n"
                  f"assert abba_ext.__file__.startswith({str(folder)!r}), abba_ext.__file__\n"
                  f"print(json.dumps(fuzz_ops.fuzz({calls}, {seed}, guard=0)))")
        return json.loads(_run([sys.executable, "-c", script], folder, watched).splitlines()[-1])


def _run(command: list, folder: Path, environment: dict) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def in_new_folder(function: Callable, *arguments) -> dict[str, int]:
    """Calls a function of faults.py with an empty folder as its last argument."""
    with tempfile.TemporaryDirectory() as folder:
        return dict(function(*arguments, Path(folder)))


def measure(seed: int, share: float = 1.0) -> dict[str, dict[str, int]]:
    """All of it, or about a share of every count: {what: {outcome: count}}."""
    def count(full: int) -> int:
        return max(10, round(full * share))

    parts = {
        "save_kills": lambda: in_new_folder(faults.kills_of_save, count(300), seed),
        "convert_kills": lambda: in_new_folder(faults.kills_of_conversion, count(300), seed),
        "merge_kills": lambda: in_new_folder(faults.kills_of_merge, count(200), seed),
        "mutations": lambda: in_new_folder(faults.mutations, count(5000), seed),
        "hostile": hostile_files,
        "fuzz": lambda: fuzz_ops.fuzz(count(50_000), seed),
        "fuzz_sanitized": lambda: address_sanitizer(count(10_000), seed + 1),
        "steps": lambda: faults.steps(count(10_000)),
        "merges": lambda: faults.merges(count(1000)),
        "swaps": lambda: in_new_folder(faults.swaps, count(1000)),
    }
    results, progress = {}, tqdm(parts.items(), unit="part", file=sys.stderr)
    with num_threads(1):  # a forked process has no worker threads
        for name, part in progress:
            progress.set_postfix_str(name)
            begin = time.perf_counter()
            results[name] = {**part(), "seconds": round(time.perf_counter() - begin, 1)}
    return results


def section(document: dict) -> str:
    """Markdown: what is guaranteed, how it is tried, and the figures of a file that this script wrote."""
    part = document["parts"]
    kills = [sum(part["save_kills"].values()) - part["save_kills"]["seconds"],
             sum(part["convert_kills"].values()) - part["convert_kills"]["seconds"], part["merge_kills"]["kills"]]
    fuzz, sanitized = part["fuzz"], part["fuzz_sanitized"]
    rows = [
        ("A save, conversion or merge that is interrupted leaves the old files or the new ones, never a mixture; a merge goes on "
         "where it was", "processes killed at random moments",
         f"{kills[0]:,.0f} + {kills[1]:,.0f} + {kills[2]:,} kills, none left anything broken"),
        ("A damaged adapter is refused, and the model stays as it was", "bits flipped, bytes cut, added, swapped and overwritten",
         f"{part['mutations']['refused']:,} refused, {part['mutations'].get('same contents', 0):,} harmless, 0 loaded wrong"),
        ("Files made to harm are refused: pickles with code, paths out of the folder, oversized headers",
         "one test for each kind", f"{part['hostile']['refused']:,} kinds"),
        ("An operator's result is right, or there is an exception", "random calls against dense fp64: shapes, strides, dtypes, "
         "devices, aliases, NaN", f"{fuzz['right']:,} right, {fuzz['refused']:,} refused"),
        ("No operator reads or writes beyond a tensor", "the same under AddressSanitizer, which must report a planted read",
         f"{sanitized['right'] + sanitized['refused']:,} calls"),
        ("Training needs no more memory as it goes on", "steps of a small model",
         f"{part['steps']['steps']:,} steps, {part['steps']['bytes grown'] / 1024:,.0f} KiB"),
        ("Unmerging gives the base back bit for bit", "merge and unmerge in bf16", f"{part['merges']['merges']:,} cycles"),
        ("An adapter can be exchanged while another thread infers: an output meanwhile lies between the two",
         "two adapters of a layer loaded in turn",
         f"{part['swaps']['swaps']:,} exchanges, {part['swaps']['inferences']:,} inferences"),
    ]
    lines = ["| what | how it is tried | figures |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    setting = f"torch {document['torch']}, commit {document['commit'] or 'unknown'}, seed {document['seed']}."
    return "\n".join([*lines, "", setting])


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: benchmarks/results/robustness.json")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--redraw", action="store_true", help="only rewrite the README's section from --out")
    options = parser.parse_args(arguments)
    if not options.redraw:
        try:
            parts = measure(options.seed)
        except AssertionError as error:
            print(f"a guarantee is broken, nothing was written: {error}", file=sys.stderr)
            return 1
        write_json(options.out, {**metadata(torch.device("cpu")), "seed": options.seed, "parts": parts})
    text = section(json.loads(options.out.read_text(encoding="utf-8")))
    print(text)
    replace_section(options.readme, "robustness", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
