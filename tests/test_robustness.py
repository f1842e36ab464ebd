"""The command behind the README's guarantees, in small numbers; what starts processes of its own is tested where it belongs."""
import json

import pytest
import robustness


@pytest.fixture
def small(monkeypatch):
    measure = robustness.measure
    monkeypatch.setattr(robustness, "address_sanitizer", lambda calls, seed: robustness.fuzz_ops.fuzz(calls, seed, guard=0))
    monkeypatch.setattr(robustness, "measure", lambda seed: measure(seed, share=0.002))
    monkeypatch.setattr(robustness, "hostile_files", lambda: {"refused": 70})
    monkeypatch.setattr(robustness.faults, "kills_of_merge", lambda kills, seed, folder: {"kills": kills, "resumed": 1})


def test_writes_figures_and_table(small, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- robustness:begin -->\n<!-- robustness:end -->\nafter\n")
    assert robustness.main(["--out", str(tmp_path / "figures.json"), "--readme", str(readme)]) == 0
    document = json.loads((tmp_path / "figures.json").read_text())
    parts = document["parts"]
    assert parts["merge_kills"]["kills"] == 10 and parts["merges"]["merges"] == 10 and document["torch"]
    assert "| 10 + 10 + 10 kills, none left anything broken |" in readme.read_text()
    assert readme.read_text().startswith("before\n") and readme.read_text().endswith("\nafter\n")


def test_a_broken_guarantee_writes_nothing(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(robustness.faults, "kills_of_save", broken)
    assert robustness.main(["--out", str(tmp_path / "figures.json"), "--readme", str(tmp_path / "README.md")]) == 1
    assert "a guarantee is broken, nothing was written: a mixture" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_hostile_files_are_tests():
    for test in robustness.HOSTILE:
        name, _, function = test.partition("::")
        assert f"def {function}(" in (robustness.TESTS / name).read_text()


def broken(kills, seed, folder):
    raise AssertionError("a mixture")
