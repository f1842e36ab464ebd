"""PEFT's own tests, from the source distribution of the installed version, run on ABBA.

A part of them in the normal suite; with ABBA_PEFT_CONFORMANCE=full all of them, on every kind of layer and every model, and
compiled. ABBA_PEFT_SDIST names the archive or its unpacked folder where there is no package index to fetch it from.
"""
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("peft")
HERE = Path(__file__).parent / "peft_conformance"
FULL = os.environ.get("ABBA_PEFT_CONFORMANCE") == "full"
MODULES = ("test_custom_models", "test_decoder_models", "test_encoder_decoder_models", "test_config", "test_lora_conversion")


def load(name):
    spec = importlib.util.spec_from_file_location(f"peft_conformance_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def peft_tests(tmp_path_factory):
    """PEFT's folder of tests."""
    folder = tmp_path_factory.mktemp("peft")
    source = os.environ.get("ABBA_PEFT_SDIST")
    if not source:
        version = importlib.metadata.version("peft")
        fetched = subprocess.run([sys.executable, "-m", "pip", "download", f"peft=={version}", "--quiet", "--no-deps", "--no-binary",
                                  "peft", "--no-build-isolation", "--dest", str(folder)], capture_output=True, text=True)
        archives = list(folder.glob("peft-*.tar.gz"))
        if not archives:
            pytest.skip(f"PEFT's source distribution cannot be fetched; ABBA_PEFT_SDIST can name it: {fetched.stderr[-300:]}")
        source = archives[0]
    if Path(source).is_dir():
        shutil.copytree(Path(source) / "tests", folder / "sdist" / "tests")
    else:
        with tarfile.open(source) as archive:
            archive.extractall(folder, filter="data")
        next(folder.glob("peft-*/")).rename(folder / "sdist")
    (folder / "sdist" / "tests" / "__init__.py").touch()  # they import each other relatively
    return folder / "sdist" / "tests"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """The folder in which the tests find the models they load by name."""
    folder = tmp_path_factory.mktemp("models")
    load("models").build(folder)
    return folder


def run(peft_tests, workplace, modules, **environment):
    """{test: (outcome, reason)}"""
    report = workplace / "report.json"
    report.unlink(missing_ok=True)
    paths = [str(HERE), *filter(None, sys.path)]
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "ABBA_PEFT_REPORT": str(report),
                **environment}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "plugin", "-p", "no:cacheprovider", "-o", "addopts=", "-W",
               "ignore::FutureWarning", *(str(peft_tests / f"{module}.py") for module in modules)]
    done = subprocess.run(command, cwd=workplace, env=settings, capture_output=True, text=True, timeout=3000)
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    return {test: tuple(result) for test, result in json.loads(report.read_text()).items()}


def check(results, listed_only):
    exceptions = load("exceptions")
    names = {test: test.partition("[")[0] for test in results}
    wrong = {test: reason for test, (outcome, reason) in results.items()
             if outcome == "failed" and names[test] not in exceptions.FAILING}
    assert not wrong, f"{len(wrong)} of PEFT's tests fail with ABBA: {dict(list(wrong.items())[:10])}"
    for name in exceptions.FAILING:
        outcomes = {outcome for test, (outcome, _) in results.items() if names[test] == name}
        assert outcomes == {"failed"} or listed_only and not outcomes, f"{name} is listed as failing: {outcomes}"
    unexplained = {test: reason for test, (outcome, reason) in results.items()
                   if outcome == "skipped" and names[test].rpartition("::")[2] not in exceptions.SKIPPED}
    assert not unexplained, f"skipped for no listed reason: {dict(list(unexplained.items())[:10])}"
    counts = Counter(outcome for outcome, _ in results.values())
    print(f"PEFT's own tests: {dict(counts)}")
    return counts


def test_peft_tests_pass(peft_tests, workplace):
    counts = check(run(peft_tests, workplace, MODULES), listed_only=False)
    assert counts["passed"] >= (2600 if FULL else 280)


@pytest.mark.skipif(not FULL, reason="ABBA_PEFT_CONFORMANCE=full also runs PEFT's tests of torch.compile")
def test_peft_tests_of_compilation_pass(peft_tests, workplace):
    counts = check(run(peft_tests, workplace, ["test_torch_compile"], PEFT_DEBUG_WITH_TORCH_COMPILE="1"), listed_only=True)
    assert counts["passed"] >= 4
