"""The command that checks everything on a GPU, with steps of its own and without a GPU."""
import json
import sys
import tarfile
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
    assert steps[0].reason == "bad" and "good" in (tmp_path / "logs/two.log").read_text()


def test_a_step_past_its_limit_ends_with_all_that_it_started(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    (step,) = run(tmp_path, python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])", limit=1))
    assert step.status == "timed out" and step.seconds < 3
    time.sleep(3)
    assert not mark.exists()


def test_a_step_past_its_limit_can_sum_up(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 2)
    code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('==== 3 passed in 1.00s ====', flush=True)\n"
    obeys, stays = run(tmp_path, python(code, "obeys", limit=1), python(code + "    time.sleep(60)", "stays", limit=1))
    assert [(step.status, step.reason) for step in (obeys, stays)] == [("timed out", "3 passed in 1.00s")] * 2
    assert obeys.seconds < 3 <= stays.seconds < 6


def test_no_step_starts_when_the_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LEAST", 2)
    first, second = run(tmp_path, python("import time; time.sleep(60)"), python("", "next"), seconds=3)
    assert first.status == "timed out" and (second.status, second.reason) == ("not run", "no time was left to start it")


def test_a_step_is_handed_over_as_soon_as_it_ends(tmp_path):
    """Also while a slower one of its group goes on."""
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir(), out.mkdir()
    held = []

    def write():
        gpu_check.hand_over(work, out)
        with tarfile.open(out / "results.tar.gz") as archive:
            held.append({name for name in archive.getnames() if name.endswith((".log", ".csv"))})

    (work / "sm90").mkdir()
    slow = python("import time; time.sleep(3)", "slow")
    fast = python("for name in ('train.csv', 'sm90/ops.csv', 'sm90/other.csv'): open(%r + '/' + name, 'w')" % str(work), "fast")
    gpu_check.run_all([[slow, fast], [python("", "last")]], work, {}, 60, write)
    first = {"./logs/slow.log", "./logs/fast.log", "./train.csv", "./sm90/ops.csv", "./sm90/other.csv"}
    assert held == [first, first, first | {"./logs/last.log"}]
    assert {path.name for path in out.iterdir()} == {"results.tar.gz", "train.csv", "ops_sm90.csv"}


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
    assert gpu_check.packages_step(None).reason.startswith("not installed or too old: no-such-package, pytest;")
    assert "--no-index" in gpu_check.packages_step(tmp_path).command[-1]
    monkeypatch.setattr(gpu_check, "PACKAGES", {"torch": "2.11"})
    assert gpu_check.packages_step(tmp_path).reason == "nothing is missing"


def test_the_readme_names_the_packages():
    line = next(line for line in (gpu_check.ROOT / "benchmarks/README.md").read_text().splitlines() if "pip download" in line)
    assert [name for name in gpu_check.PACKAGES if name not in line] == []


@pytest.fixture
def no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu_check, "describe_machine", lambda environment: ({
        "torch": "2.13.0", "gpus": [], "capabilities": [], "nvcc": "", "commit": "abc"}, "no driver"))


def test_without_a_gpu_nothing_is_run(no_gpu, tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 1
    assert "no driver" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_without_a_gpu_a_rehearsal(no_gpu, tmp_path, capfd):
    out = tmp_path / "out"
    assert gpu_check.main(["--out", str(out), "--only", "memcheck", "racecheck", "--rehearse"]) == 0
    skipped = {name: ("skipped", "needs a GPU") for name in ("memcheck", "racecheck", "synccheck")}

    def statuses():
        summary = json.loads((out / "summary.json").read_text())
        assert summary["passed"]
        return {step["name"]: (step["status"], step["reason"]) for step in summary["steps"]}

    assert statuses() == {name: skipped[name] for name in ("memcheck", "racecheck")}
    assert capfd.readouterr().out.splitlines()[-1].startswith("PASSED")
    gpu_check.main(["--out", str(out), "--only", "synccheck", "--rehearse"])
    assert statuses() == skipped, "a second call adds to the first one's results"


def test_the_probe_says_why_there_is_no_gpu(monkeypatch):
    monkeypatch.setenv("ABBA_COMMIT", "1234567")
    environment = gpu_check.environment_of_steps() | {"CUDA_VISIBLE_DEVICES": ""}
    machine, complaint = gpu_check.describe_machine(environment)
    assert machine["gpus"] == [] and machine["torch"] and machine["commit"] == "1234567" and "CUDA" in complaint
    monkeypatch.setattr(gpu_check, "PROBE", 0.01)
    assert "took more than" in gpu_check.describe_machine(environment)[1]


@pytest.mark.parametrize("capabilities", [["9.0"], ["8.0"], []])
def test_what_runs_where(monkeypatch, capabilities):
    monkeypatch.setattr(gpu_check, "find_tool", lambda name: f"/opt/{name}")
    groups = gpu_check.groups_of_steps(capabilities)
    steps = {step.name: step for group in groups for step in group}
    runs = {name for name, step in steps.items() if step.command}
    checkers = {"memcheck", "racecheck", "synccheck", "initcheck"}
    hopper = {"every_kernel_sm90", "conformance_sm90", "gpu_tests_sm90", *(f"{name}_sm90" for name in checkers)}
    left_out = {(): hopper | checkers | {"ncu"}, ("8.0",): hopper | {"bench_ops_sm90"}, ("9.0",): set()}[tuple(capabilities)]
    assert runs == set(steps) - left_out
    for name in {"every_kernel", *(name for name in steps if name.startswith("bench_"))} & runs:
        assert ("cuda" in steps[name].command) == bool(capabilities)
    for name, step in steps.items():
        if name.endswith("_sm90") and step.command and "pytest" not in step.command:
            assert step.environment.get("ABBA_SM90") == "1" or step.command[-2:] == ["--family", "1"]
    for file in (gpu_check.ROOT / argument for step in steps.values() for argument in step.command):
        assert file.suffix != ".py" or file.exists()


def test_what_matters_most_fits_the_slot():
    groups = gpu_check.groups_of_steps(["9.0"])
    last = next(i for i, group in enumerate(groups) if group[0].name == "bench_ops_sm90")
    packages = 20
    assert packages + sum(max(step.limit for step in group) for group in groups[:last + 1]) <= gpu_check.SLOT - gpu_check.GRACE
    assert [len(group) for group in groups if group[0].name.startswith("bench_")] == 8 * [1], "benchmarks run alone"


def test_a_step_that_is_not_there(no_gpu, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path), "--only", "nothing", "--rehearse"])
    assert "no step is named nothing" in capsys.readouterr().err
