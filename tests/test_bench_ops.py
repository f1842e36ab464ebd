"""The benchmark of the operators: what it counts, that it refuses wrong results, and that it runs from end to end."""
import csv
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import bench_ops  # noqa: E402
from shapes import GRIDS, Grid, default_grid  # noqa: E402

CPU = torch.device("cpu")


def case_of(op, layout="rD", dtype="fp32"):
    return bench_ops.OpCase(op, 40, layout, 24, 8, dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp64"])
@pytest.mark.parametrize("layout", ["rD", "Dr"])
@pytest.mark.parametrize("op", bench_ops.OPS)
def test_every_method_computes_the_operator(op, layout, dtype):
    case = case_of(op, layout, dtype)
    factor_dtype = torch.float64 if dtype == "fp64" else torch.float32
    problem = bench_ops.Problem(case, factor_dtype, CPU)
    assert problem.f1.stride() == problem.f2.stride() == ((40, 1) if layout == "rD" else (1, 4))
    truth = problem.truth()
    for method in bench_ops.METHODS:
        problem.error(method, truth)


def test_a_wrong_result_is_refused():
    problem = bench_ops.Problem(case_of("project"), torch.float32, CPU)
    (truth,) = problem.truth()
    with pytest.raises(AssertionError, match="abba_ext differs from the definition of project"):
        problem.error("abba_ext", (1.01 * truth,))


def test_expand_is_timed_on_the_same_y_each_time():
    problem = bench_ops.Problem(case_of("expand_"), torch.float32, CPU)
    call = problem.call("abba_ext", copies=2)
    results = []
    for _ in range(4):
        call.prepare()
        results.append(call.run().clone())
    assert all(torch.equal(result, results[0]) for result in results) and not torch.equal(results[0], problem.x)


def test_operations_and_bytes():
    # T = 24, D = 40, r1 = r2 = 4, R = 16
    assert case_of("project").flops() == 2 * 24 * 16 * 40
    assert case_of("project", dtype="bf16").min_bytes(4) == 2 * (24 * 40 + 24 * 16) + 4 * 8 * 40
    assert case_of("expand_", dtype="bf16").min_bytes(4) == 2 * (2 * 24 * 40 + 24 * 16) + 4 * 8 * 40
    assert case_of("factor_grad").min_bytes(4) == 4 * (24 * 40 + 24 * 16) + 2 * 4 * 8 * 40


def test_the_roofline_is_the_slower_of_both():
    case = case_of("project")
    assert bench_ops.Peaks({"fp32": case.flops()}, 1e30).least_ms(case, 4) == 1000
    assert bench_ops.Peaks({"fp32": 1e30}, case.min_bytes(4) / 2).least_ms(case, 4) == 2000


def test_peaks_are_measured():
    peaks = bench_ops.measure_peaks(("fp32", "bf16"), CPU, size=64, copied=4096)
    assert set(peaks.flops_per_s) == {"fp32", "bf16"} and min(peaks.flops_per_s.values()) > 0 and peaks.bytes_per_s > 0


def test_both_sides_of_every_layer_once():
    grid = Grid(((64, 64), (64, 96), (96, 64)), (8,), (4,), ("fp32",))
    sides = {(case.features, case.layout) for case in bench_ops.op_cases(grid)}
    assert sides == {(64, "rD"), (64, "Dr"), (96, "rD"), (96, "Dr")}
    assert len(bench_ops.op_cases(grid)) == 3 * 4


def test_default_grids():
    assert default_grid("cpu", False) == GRIDS["cpu"] and default_grid("cpu", True) == GRIDS["quick"]
    assert default_grid("cuda", True) == GRIDS["cuda_quick"]
    assert set(GRIDS["cuda_quick"].cases()) <= set(GRIDS["cuda"].cases())


def test_end_to_end(tmp_path, capsys):
    status = bench_ops.main(["--device", "cpu", "--quick", "--shapes", "32x48", "--tokens", "8", "16", "--ranks", "4",
                             "--dtypes", "fp32", "bf16", "--budget", "0", "--out", str(tmp_path)])
    assert status == 0
    assert "/composite" in capsys.readouterr().out
    with (tmp_path / "ops.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "op", "features", "layout", "tokens", "rank", "dtype", "factor_dtype", "method", "error", "median_us", "p20_us",
        "p80_us", "min_us", "wait_share", "runs", "gb_per_s", "tflop_per_s", "roofline_us", "roofline_share", "device",
        "device_type", "threads", "torch", "abba_ext", "commit", "sm90"]
    assert len(rows) == 2 * 2 * 2 * 3 * 3  # dtypes, sides, tokens, operators, methods
    assert all(float(row["median_us"]) > 0 and row["roofline_us"] == "" for row in rows)
    result = json.loads((tmp_path / "ops.json").read_text(encoding="utf-8"))
    assert result["peaks"] is None and result["factors"] == "fp32" and result["torch"] == torch.__version__


def test_a_method_that_fails_costs_its_row_alone(tmp_path, monkeypatch, capsys):
    right = bench_ops.Problem.error

    def error(self, method, truth):
        if (method, self.case.op) == ("composite", "project"):
            raise RuntimeError("planted")
        return right(self, method, truth)

    monkeypatch.setattr(bench_ops.Problem, "error", error)
    monkeypatch.setenv("ABBA_SM90", "1")
    monkeypatch.setenv("ABBA_COMMIT", "1234567")
    assert bench_ops.main(["--device", "cpu", "--quick", "--shapes", "32x32", "--tokens", "8", "--ranks", "4", "--dtypes", "fp32",
                           "--budget", "0", "--out", str(tmp_path)]) == 1
    assert "\nFAILED composite, OpCase(op='project'" in capsys.readouterr().out
    with (tmp_path / "ops.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (3 * 3 - 1) and {(row["sm90"], row["commit"]) for row in rows} == {("True", "1234567")}
    result = json.loads((tmp_path / "ops.json").read_text(encoding="utf-8"))
    assert len(result["failures"]) == 2 and result["failures"][0].endswith("RuntimeError: planted") and result["sm90"] is True


def test_the_cases_before_an_interruption_are_kept(tmp_path, monkeypatch):
    right = bench_ops.run_case

    def run_case(case, *arguments):
        if case.op == "factor_grad":
            raise KeyboardInterrupt
        return right(case, *arguments)

    monkeypatch.setattr(bench_ops, "run_case", run_case)
    with pytest.raises(KeyboardInterrupt):
        bench_ops.main(["--device", "cpu", "--quick", "--shapes", "32x32", "--tokens", "8", "--ranks", "4", "--dtypes", "fp32",
                        "--budget", "0", "--out", str(tmp_path)])
    assert len((tmp_path / "ops.csv").read_text().splitlines()) == 1 + 2 * 3 and (tmp_path / "ops.json").exists()


def test_odd_ranks_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench_ops.parse_arguments(["--device", "cpu", "--ranks", "7"])
    assert "ranks must be even and at least 2" in capsys.readouterr().err
