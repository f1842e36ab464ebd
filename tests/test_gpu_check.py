"""The command that checks everything on a GPU, with steps of its own and without a GPU."""
import argparse
import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gpu_check  # noqa: E402


def python(code: str, name: str = "step", limit: float = 30) -> gpu_check.Step:
    return gpu_check.Step(name, [sys.executable, "-c", code], limit)


def run(tmp_path, *steps, seconds=60) -> list[gpu_check.Step]:
    gpu_check.run_all([[step] for step in steps], tmp_path, {}, seconds, lambda: None)
    return list(steps)


def test_a_failing_step_does_not_stop_the_next(tmp_path):
    steps = run(tmp_path, python("import sys; print('bad'); sys.exit(3)", "one"), python("print('good')", "two"),
                gpu_check.Step("three", ["/no/such/program"], 30))
    assert [(step.status, step.exit_status) for step in steps] == [("failed", 3), ("passed", 0), ("failed", None)]
    assert steps[0].reason == "bad" and "good" in (tmp_path / "two.log").read_text()


def test_a_step_past_its_limit_ends_with_all_that_it_started(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    (step,) = run(tmp_path, python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])", limit=1))
    assert step.status == "timed out" and step.seconds < 3
    time.sleep(3)
    assert not mark.exists()


def test_no_step_starts_when_the_time_is_up(tmp_path):
    first, second = run(tmp_path, python("import time; time.sleep(60)"), python("", "next"), seconds=2)
    assert first.status == "timed out" and (second.status, second.reason) == ("timed out", "no time was left to start it")


def test_steps_of_a_group_run_at_the_same_time(tmp_path):
    steps = [python("import time; time.sleep(2)", name) for name in "abc"]
    start = time.monotonic()
    gpu_check.run_all([steps], tmp_path, {}, 60, lambda: None)
    assert time.monotonic() - start < 5.5


@pytest.mark.parametrize("log, line", [
    ("$ pytest\n.s\nSKIPPED [1] a\n12 passed, 1 skipped in 3.21s\n", "12 passed, 1 skipped in 3.21s"),
    ("$ pytest\n======= 1 failed, 2 passed in 0.10s =======\n", "1 failed, 2 passed in 0.10s"),
    ("$ x\n========= ERROR SUMMARY: 0 errors\n", "ERROR SUMMARY: 0 errors"),
    ("$ x\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
     "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")])
def test_the_line_that_tells(log, line):
    assert gpu_check._telling_line(log, "passed") == line


def test_missing_packages_come_from_the_wheels(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "PACKAGES", {"torch": "2.11", "no-such-package": "1", "pytest": "999"})
    assert gpu_check.missing_packages() == ["no-such-package", "pytest"]
    assert gpu_check.packages_step(None).reason.startswith("not installed: no-such-package, pytest;")
    assert "--no-index" in gpu_check.packages_step(tmp_path).command[-1]
    monkeypatch.setattr(gpu_check, "PACKAGES", {"torch": "2.11"})
    assert gpu_check.packages_step(tmp_path).reason == "nothing is missing"


def test_the_readme_names_the_packages():
    line = next(line for line in (gpu_check.ROOT / "benchmarks/README.md").read_text().splitlines() if "pip download" in line)
    assert [name for name in gpu_check.PACKAGES if name not in line] == []


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(gpu_check, "describe_machine", lambda: {
        "torch": "2.13.0", "gpus": [], "capabilities": [], "nvcc": "", "commit": "abc"})


@pytest.mark.parametrize("rehearse, status", [([], 1), (["--rehearse"], 0)], ids=["", "rehearse"])
def test_without_a_gpu(no_gpu, tmp_path, capfd, rehearse, status):
    assert gpu_check.main(["--out", str(tmp_path), "--only", "memcheck", "racecheck", *rehearse]) == status
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {step["name"]: (step["status"], step["reason"]) for step in summary["steps"]} == {
        "memcheck": ("skipped", "needs a GPU"), "racecheck": ("skipped", "needs a GPU")}
    assert summary["passed"] == (status == 0)
    assert capfd.readouterr().out.splitlines()[-1].startswith("FAILED" if status else "PASSED")


@pytest.mark.parametrize("has_gpu, rehearse", [(True, False), (False, False), (False, True)])
def test_what_runs_where(monkeypatch, tmp_path, has_gpu, rehearse):
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: "/opt/compute-sanitizer")
    options = argparse.Namespace(out=tmp_path, rehearse=rehearse, workers=True)
    steps = {step.name: step for group in gpu_check.groups_of_steps(options, has_gpu) for step in group}
    runs = {name for name, step in steps.items() if step.command}
    everywhere = {"build", "info", "gpu_tests", "suite", "machine_code"}
    with_a_device = {"every_kernel", "bench_ops", "bench_ops_sm90", "bench_layer", "bench_train"}
    checkers = {"memcheck", "racecheck", "synccheck", "initcheck"}
    assert runs == everywhere | (with_a_device if has_gpu or rehearse else set()) | (checkers if has_gpu else set())
    for name in with_a_device & runs:
        assert ("cuda" in steps[name].command) == has_gpu
    for file in (gpu_check.ROOT / argument.split("=")[-1] for step in steps.values() for argument in step.command):
        assert file.suffix != ".py" or file.exists()


def test_a_step_that_is_not_there(no_gpu, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path), "--only", "nothing"])
    assert "no step is named nothing" in capsys.readouterr().err
