"""The benchmarks: every baseline equals its definition, the meters measure, and the script runs from end to end."""
import csv
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

pytest.importorskip("peft", minversion="0.21")
pytest.importorskip("tqdm")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import baselines  # noqa: E402
import bench_layer  # noqa: E402
import harness  # noqa: E402
from shapes import DTYPES, GRIDS, Case  # noqa: E402

CPU = torch.device("cpu")
N, M, T, RANK = 48, 40, 21, 8
EAGER_METHODS = [name for name in baselines.METHODS if not name.endswith("_compile")]
FP64_METHODS = [name for name in EAGER_METHODS if name != "pissa_peft"]  # PEFT starts PiSSA in fp32 at most


def problem_of(dtype: torch.dtype) -> baselines.Problem:
    return baselines.make_problem(N, M, T, RANK, dtype)


# --- the definitions, written a second time and without an effective weight ---


def lora(x, weight, p):
    return linear(x, weight) + 0.5 * linear(linear(x, p["a"]), p["b"])


def dora(x, weight, p):
    adapted = weight + 0.5 * p["b"] @ p["a"]
    norm = adapted.detach().pow(2).sum(1).sqrt()
    return linear(x, adapted) * p["magnitude"] / norm


def hira(x, weight, p):
    return linear(x, weight) + linear(x, weight * (p["b"] @ p["a"]))


def abba(x, weight, p):
    return linear(x, weight) + 0.5 * linear(x, (p["b1"] @ p["a1"]) * (p["b2"] @ p["a2"]))


DEFINITIONS = {"base": lambda x, weight, p: linear(x, weight), "lora_peft": lora, "lora_inplace": lora,
               "rslora_peft": lora, "dora_peft": dora, "hira_peft": hira, "loha_peft": abba, "abba_eager": abba, "abba_ext": abba,
               "abba_ext_khatri_rao": abba}


@pytest.mark.parametrize("name", FP64_METHODS)
def test_equals_definition(name):
    problem = problem_of(torch.float64)
    layer = baselines.METHODS[name].build(problem)
    leaves = [problem.x, *layer.parameters.values()]
    got = layer.forward(problem.x)
    want = DEFINITIONS[name](problem.x, problem.weight, layer.parameters)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    got_grads = torch.autograd.grad(got, leaves, problem.dy)
    want_grads = torch.autograd.grad(want, leaves, problem.dy)
    for leaf, got_grad, want_grad in zip(["x", *layer.parameters], got_grads, want_grads, strict=True):
        torch.testing.assert_close(got_grad, want_grad, rtol=0, atol=1e-11,
                                   msg=lambda text, leaf=leaf: f"{leaf}: {text}")


def test_pissa_trains_the_principal_part():
    """The frozen base is what is left of W0 beyond its best rank-r approximation; with that approximation it is W0."""
    problem = problem_of(torch.float32)
    weight = problem.weight.double()
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    residual = (u[:, RANK:] * sigma[RANK:]) @ vh[RANK:]
    layer = baselines.METHODS["pissa_peft"].build(problem)
    torch.testing.assert_close(layer.forward.base_layer.weight.double(), residual, rtol=0, atol=1e-6)
    zero = {key: torch.zeros_like(p).double() for key, p in layer.parameters.items()}
    torch.testing.assert_close(layer.effective_weight(weight, zero), residual, rtol=0, atol=1e-6)
    torch.testing.assert_close(problem.weight.double(), weight, rtol=0, atol=0)


@pytest.mark.parametrize("name", EAGER_METHODS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_verify_accepts(name, dtype):
    problem = problem_of(DTYPES[dtype])
    baselines.verify(name, baselines.METHODS[name].build(problem), problem)


def test_verify_rejects_another_update():
    problem = problem_of(torch.float32)
    layer = baselines.METHODS["abba_ext"].build(problem)
    layer.effective_weight = lambda weight, p: weight + 0.51 * ((p["b1"] @ p["a1"]) * (p["b2"] @ p["a2"]))
    with pytest.raises(AssertionError, match="abba_ext differs from its definition"):
        baselines.verify("abba_ext", layer, problem)


@pytest.mark.parametrize("name", [name for name in FP64_METHODS if name != "base"])
def test_budget_and_size_are_equal(name):
    """r(m + n) parameters, DoRA's magnitudes apart, and an update that matters."""
    problem = problem_of(torch.float64)
    layer = baselines.METHODS[name].build(problem)
    count = sum(p.numel() for key, p in layer.parameters.items() if key != "magnitude")
    assert count == RANK * (N + M)
    change = layer.effective_weight(problem.weight, layer.parameters) - problem.weight
    assert 0.3 < (change.norm() / problem.weight.norm()).item() < 0.8


def test_base_weight_is_shared_and_frozen():
    problem = problem_of(torch.float32)
    module = baselines.METHODS["loha_peft"].build(problem).forward
    assert module.base_layer.weight.data_ptr() == problem.weight.data_ptr()
    assert not module.base_layer.weight.requires_grad


# --- the meters ---


def step_of(forward) -> harness.Step:
    x = torch.ones(1, requires_grad=True)
    return harness.Step(forward, [], [(x, torch.ones(1))])


def test_memory_meter_sees_the_peak_not_the_sum():
    def forward(x):
        first = torch.empty(3 << 20, dtype=torch.uint8)
        del first
        second = torch.empty(2 << 20, dtype=torch.uint8)
        return x + second.numel()

    assert 3 << 20 <= harness.peak_memory(step_of(forward), CPU) < (3 << 20) + 4096


def test_memory_meter_sees_scratch_of_compiled_operators():
    tokens, features = 64, 512
    x, f1, f2 = torch.randn(tokens, features), torch.randn(8, features), torch.randn(8, features)
    returned = tokens * 64 * 4

    def forward(leaf):
        torch.ops.abba.project(x, f1, f2)
        return leaf + 1

    assert harness.peak_memory(step_of(forward), CPU) > returned + 16 * features * 4


def test_peak_is_below_eager_by_the_khatri_rao_factors_and_their_gradients():
    problem = baselines.make_problem(2048, 2048, 1024, 32, torch.float32)
    peaks = {}
    for name in ("abba_eager", "abba_ext"):
        layer = baselines.METHODS[name].build(problem)
        step = harness.Step(layer.forward, list(layer.parameters.values()), [(problem.x, problem.dy)])
        peaks[name] = harness.peak_memory(step, CPU)
    factor_bytes = 16 * 16 * (2048 + 2048) * 4
    assert peaks["abba_ext"] <= peaks["abba_eager"] - 2 * factor_bytes


@pytest.mark.parametrize("mode", harness.MODES)
def test_timing_runs_every_mode(mode):
    problem = problem_of(torch.float32)
    steps = {}
    for name in ("base", "abba_ext"):
        layer = baselines.METHODS[name].build(problem)
        steps[name] = harness.Step(layer.forward, list(layer.parameters.values()), [(problem.x, problem.dy)], mode)
    timings = harness.time_interleaved(steps, 0.0, CPU, warmup=1, min_rounds=4)
    assert list(timings) == ["base", "abba_ext"]
    for timing in timings.values():
        assert 0 < timing.min_ms <= timing.p20_ms <= timing.median_ms <= timing.p80_ms
        assert timing.runs in (2, 4)


def test_summary_keeps_the_calmer_half():
    runs = [harness.Run(1.0, 0.0), harness.Run(9.0, 8.0), harness.Run(1.2, 0.01), harness.Run(7.0, 6.0)]
    timing = harness.summarise(runs)
    assert (timing.min_ms, timing.median_ms, timing.runs) == (1.0, 1.1, 2)


# --- the scripts ---


def test_grids_hold_the_protocol():
    assert Case(768, 768, 512, 32, "fp32") in GRIDS["quick"].cases()
    assert {(4096, 14336), (2048, 8192)} <= set(GRIDS["cuda"].shapes)
    assert max(GRIDS["cuda"].tokens) == 16384


def test_all_methods_can_be_asked_for():
    assert bench_layer.parse_arguments(["--device", "cpu", "--methods", "all"]).methods == tuple(baselines.METHODS)


def test_bench_layer_end_to_end(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    methods = ["base", "lora_peft", "loha_peft", "abba_eager", "abba_ext"]
    status = bench_layer.main(["--device", "cpu", "--quick", "--shapes", "32x48", "--tokens", "8", "16", "--ranks", "4",
                               "--dtypes", "fp32", "--methods", *methods, "--budget", "0.05", "--out", str(tmp_path)])
    assert status == 0
    assert "/abba_eager" in capsys.readouterr().out
    with (tmp_path / "layer.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "in_features", "out_features", "tokens", "rank", "dtype", "method", "mode", "note", "peak_bytes",
        "output_error", "grad_error", "median_ms", "p20_ms", "p80_ms", "min_ms", "wait_share", "runs", "device",
        "device_type", "threads", "torch", "peft", "abba_ext", "commit", "sm90"]
    assert [(row["tokens"], row["method"]) for row in rows] == [(t, name) for t in ("8", "16") for name in methods]

    import plot
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n", encoding="utf-8")
    assert plot.main([str(tmp_path), "--rank", "4", "--readme", str(readme)]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "| 32→48 | 16 |" in text
    assert "begin -->\n![time of a training step relative to the frozen layer](layer.png)\n" in text
    assert "Medians of " in text
    assert (tmp_path / "layer.png").stat().st_size > 0


def test_an_older_peft_costs_hira_alone(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    import peft
    import plot

    monkeypatch.delattr(peft, "HiraConfig")
    assert bench_layer.main(["--device", "cpu", "--quick", "--shapes", "32x48", "--tokens", "8", "--ranks", "4", "--dtypes", "fp32",
                             "--methods", "base", "hira_peft", "abba_ext", "--budget", "0.01", "--out", str(tmp_path)]) == 1
    assert "FAILED hira_peft, Case(" in (printed := capsys.readouterr().out) and "'HiraConfig' from 'peft'" in printed
    with (tmp_path / "layer.csv").open(encoding="utf-8") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["base", "abba_ext"]
    assert plot.main([str(tmp_path), "--rank", "4", "--readme", str(tmp_path / "none")]) == 0


def test_a_method_that_fails_while_it_is_timed_costs_its_row_alone(tmp_path, monkeypatch, capsys):
    """As one that has too little memory beside the others; in one of two cases, so that the tables have a gap."""
    pytest.importorskip("matplotlib")
    import plot

    def build(problem):
        layer, runs = baselines.build_lora_peft(problem), []

        def forward(x):
            runs.append(x)
            if problem.x.size(0) == 16 and len(runs) == 6:
                raise torch.OutOfMemoryError("planted")
            return right(x)

        right, layer.forward = layer.forward, forward
        return layer

    monkeypatch.setitem(baselines.METHODS, "lora_peft", baselines.Method(build, "LoRA"))
    assert bench_layer.main(["--device", "cpu", "--quick", "--shapes", "32x48", "--tokens", "8", "16", "--ranks", "4",
                             "--dtypes", "fp32", "--methods", "base", "lora_peft", "--budget", "0.01",
                             "--out", str(tmp_path)]) == 1
    assert "\nFAILED lora_peft, Case(" in capsys.readouterr().out
    with (tmp_path / "layer.csv").open(encoding="utf-8") as file:
        rows = [(row["tokens"], row["method"]) for row in csv.DictReader(file)]
    assert rows == [("8", "base"), ("8", "lora_peft"), ("16", "base")]
    assert plot.main([str(tmp_path), "--rank", "4", "--readme", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out.splitlines()[5].endswith(" | – |")


def test_the_newest_results_are_those_measured_last(tmp_path, monkeypatch):
    """Not those written last: a checkout writes all at once."""
    pytest.importorskip("matplotlib")
    import plot

    for folder, date in (("b", "2026-11-27T09:45:19Z"), ("c", "2026-01-01T00:00:00Z"), ("a", "2026-11-26T10:00:00Z")):
        harness.write_json(tmp_path / "results" / folder / "train.json", {"date": date})
    monkeypatch.setattr(plot, "__file__", str(tmp_path / "plot.py"))
    assert plot.newest_results() == tmp_path / "results" / "b"


def test_the_readme_has_what_the_committed_results_say(tmp_path):
    pytest.importorskip("matplotlib")
    import plot

    root, readme = Path(plot.__file__).parents[1], tmp_path / "README.md"
    shutil.copy(root / "README.md", readme)
    text = readme.read_text(encoding="utf-8")
    results = re.search(r"\((benchmarks/results/.*)/layer\.png\)", text)[1]
    shutil.copytree(root / results, tmp_path / results)
    assert plot.main([str(tmp_path / results), "--readme", str(readme)]) == 0
    assert readme.read_text(encoding="utf-8") == text


def test_a_gpus_results_leave_a_cpus_sections_alone():
    pytest.importorskip("matplotlib")
    import plot
    assert [plot.section("bench", {"device_type": kind}) for kind in ("cpu", "cuda")] == ["bench", "bench-gpu"]


def test_readme_without_markers_is_left_alone(tmp_path):
    pytest.importorskip("matplotlib")
    import plot
    readme = tmp_path / "README.md"
    readme.write_text("no markers\n", encoding="utf-8")
    assert not plot.replace_section(readme, "bench", "table")
    assert readme.read_text(encoding="utf-8") == "no markers\n"
