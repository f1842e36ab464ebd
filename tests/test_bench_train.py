"""The whole-model benchmark: every method trains what it says, from the base's output on, and the script runs."""
import csv
import json
import math
import sys
from pathlib import Path

import architectures
import pytest
import torch

pytest.importorskip("peft", minversion="0.21")
pytest.importorskip("tqdm")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import bench_train  # noqa: E402
import model_methods  # noqa: E402
from model_methods import METHODS, TARGETS, attach, trainable  # noqa: E402

CPU = torch.device("cpu")
RANK = 8
ADAPTERS = [name for name in METHODS if name not in ("base", "full")]
TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=64, tie_word_embeddings=True)
CASE = bench_train.Case("135m", 2, 2, 12, RANK, "fp32", "fp32", False)


def llama(dtype=torch.float32):
    return architectures.build("llama", dtype)


def loss_of(model):
    return model(**architectures.inputs("llama")).loss


def projections(model):
    return {name: module for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name.endswith(TARGETS)}


def own_parameters(module):
    """A layer's trained parameters by the last part of their name that tells them apart."""
    return {name.removesuffix(".weight").removesuffix(".default"): parameter for name, parameter in module.named_parameters()
            if parameter.requires_grad}


# --- the methods ---


@pytest.mark.parametrize("name", ADAPTERS)
def test_budget_start_and_gradients(name):
    """r(m + n) parameters in every projection (DoRA: m more), the base's loss at first, and gradients everywhere."""
    base = llama()
    budget = sum((RANK + (name == "dora")) * module.out_features + RANK * module.in_features
                 for module in projections(base).values())
    want = loss_of(base).item()
    random_state = torch.get_rng_state()
    model = attach(llama(), name, rank=RANK)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert sum(parameter.numel() for parameter in trainable(model)) == budget
    assert loss_of(model).item() == pytest.approx(want, abs=2e-6)
    optimizer = torch.optim.Adam(trainable(model), 1e-2)
    for _ in range(2):  # where one factor is zero at first, the others get gradients from the second step on
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), key
        if parameter.requires_grad:
            assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, key
    assert loss_of(model).item() < want


def lora_weight(weight, p, s):
    return weight + s * p["lora_B"] @ p["lora_A"]


def dora_weight(weight, p, s):
    adapted = lora_weight(weight, p, s)
    return adapted * (p["lora_magnitude_vector"] / adapted.pow(2).sum(1).sqrt())[:, None]


def loha_weight(weight, p, s):
    return weight + s * (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])


def abba_weight(weight, p, s):
    return weight + s * (p["abba_B1"] @ p["abba_A1"]) * (p["abba_B2"] @ p["abba_A2"])


# method: (α, the dense effective weight, s by the method's convention)
DEFINITIONS = {
    "lora": (12, lora_weight, 12 / RANK), "lora_inplace": (12, lora_weight, 12 / RANK),
    "rslora": (12, lora_weight, 12 / math.sqrt(RANK)), "dora": (12, dora_weight, 12 / RANK),
    "hira": (None, lambda weight, p, s: weight * (1 + p["hira_B"] @ p["hira_A"]), 1), "loha": (12, loha_weight, 12 / (RANK / 2)),
    "abba": (2, abba_weight, 2**2 / (RANK / 2)), "abba_eager": (2, abba_weight, 2**2 / (RANK / 2)),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_equals_a_model_with_dense_weights(name):
    """Away from the start, in fp64: the logits of a plain model whose weights are the method's definition."""
    alpha, effective_weight, scale = DEFINITIONS[name]
    plain, model = llama(torch.float64), llama(torch.float64)
    attach(model, name, rank=RANK, alpha=alpha, adapter_dtype=None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(model):
            assert parameter.dtype == torch.float64
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.2)
        for key, module in projections(plain).items():
            weight = effective_weight(module.weight, own_parameters(model.get_submodule(key)), scale)
            assert (weight - module.weight).norm() > 0.01 * module.weight.norm()
            module.weight.copy_(weight)
        inputs = architectures.inputs("llama")
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=0, atol=1e-11)


def test_pissa_leaves_the_residual_as_its_base():
    plain, model = llama(), attach(llama(), "pissa", rank=RANK)
    for key, module in projections(plain).items():
        adapted = model.get_submodule(key)
        p = own_parameters(adapted)
        torch.testing.assert_close(lora_weight(adapted.base_layer.weight, p, 1), module.weight, rtol=0, atol=1e-6)
        singular_values = torch.linalg.svdvals(module.weight)
        assert adapted.base_layer.weight.norm() < 1.02 * singular_values[RANK:].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["lora_inplace", "abba_eager", "abba"])
def test_under_autocast(name, dtype):
    model = attach(llama(dtype), name, rank=RANK)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    assert loss.item() == pytest.approx(loss_of(llama()).item(), rel=1e-2)
    assert all(p.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in trainable(model))


def test_base_and_full():
    assert trainable(attach(llama(), "base")) == []
    model = attach(llama(), "full")
    assert len(trainable(model)) == len(list(model.parameters()))


def test_the_start_depends_on_the_seed_alone():
    first, again, other = (attach(llama(), "lora", rank=RANK, seed=seed) for seed in (1, 1, 2))
    starts = [torch.cat([parameter.flatten() for parameter in trainable(model)]) for model in (first, again, other)]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_options_reach_the_configuration():
    layer = attach(llama(), "abba", rank=RANK, r1=2, r2=6, init="random", targets=["q_proj"]).model.layers[0].self_attn
    assert (layer.q_proj.abba_A1.size(0), layer.q_proj.abba_A2.size(0)) == (2, 6) and type(layer.k_proj) is torch.nn.Linear


@pytest.mark.parametrize("name, settings, error, message", [
    ("lorra", {}, ValueError, "method must be one of base, full, lora"),
    ("hira", {"alpha": 3}, ValueError, "hira has no alpha, got 3"),
    ("loha", {"dropout": 0.1}, ValueError, "loha has no dropout, got 0.1"),
    ("abba_eager", {"dropout": 0.1}, ValueError, "abba_eager has no dropout"),
    ("lora_inplace", {"dropout": 0.1}, ValueError, "lora_inplace has no dropout"),
    ("loha", {"rank": 7}, ValueError, "rank must be even for loha"),
    ("full", {"init": "svd"}, TypeError, "init"), ("abba", {"ranks": 3}, TypeError, "ranks"),
    ("lora_inplace", {"targets": ["no_proj"]}, ValueError, "'no_proj' matches no layer")])
def test_what_a_method_lacks_is_refused(name, settings, error, message):
    with pytest.raises(error, match=message):
        attach(llama(), name, **{"rank": RANK, **settings})


# --- the benchmark ---


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(bench_train.SIZES, "135m", TINY)


def test_frozen_methods_share_the_base_weights(tiny):
    model = bench_train.build_model(CASE, CPU)
    weight = model.model.layers[0].mlp.up_proj.weight
    for name in METHODS:
        before = weight.clone()
        layer = bench_train.with_method(model, name, CASE).model.layers[0].mlp.up_proj
        own = getattr(layer, "base_layer", layer).weight
        assert (own.data_ptr() == weight.data_ptr()) == (name not in bench_train.CHANGE_THE_BASE), name
        assert torch.equal(weight, before)


@pytest.mark.parametrize("name", ["base", "lora", "abba"])
def test_backward_passes_every_layer(tiny, name):
    model = bench_train.with_method(bench_train.build_model(CASE, CPU), name, CASE)
    reached = []
    for layer in model.model.layers:
        layer.register_full_backward_hook(lambda module, *_: reached.append(module))
    bench_train.TrainStep(model, torch.ones(1, 4, dtype=torch.long), None).run()
    assert reached == list(model.model.layers)[::-1]


def test_memory_counts_weights_optimizer_state_and_activations(tiny):
    rows = {row["method"]: row for row in bench_train.run_case(CASE, ("base", "full", "abba"), 0, CPU)}
    weights = 4 * sum(parameter.numel() for parameter in bench_train.build_model(CASE, CPU).parameters())
    assert weights <= rows["base"]["resident_bytes"] < weights + 1024
    states = rows["full"]["resident_bytes"] - rows["base"]["resident_bytes"]
    assert 2 * weights <= states < 2 * weights + 1024
    adapter = rows["abba"]["resident_bytes"] - rows["base"]["resident_bytes"]
    assert 3 * 4 * rows["abba"]["trainable"] <= adapter < 3 * 4 * rows["abba"]["trainable"] + 2048
    assert rows["full"]["step_bytes"] > rows["base"]["step_bytes"] + weights / 2  # gradients, as activations go
    for row in rows.values():
        assert row["peak_bytes"] == row["resident_bytes"] + row["step_bytes"] and row["step_bytes"] > 0


def test_checkpointing_saves_memory(tiny):
    case = CASE._replace(length=64, layers=4)
    off, on = (bench_train.run_case(case._replace(checkpointing=value), ("abba",), 0, CPU)[0] for value in (False, True))
    assert on["step_bytes"] < 0.8 * off["step_bytes"] and on["resident_bytes"] == off["resident_bytes"]


def test_another_start_is_refused(tiny, monkeypatch):
    def broken(model, *_):
        model.requires_grad_(True)
        with torch.no_grad():
            model.model.norm.weight.mul_(1.5)

    monkeypatch.setitem(METHODS, "lora", model_methods.ModelMethod("broken", broken))
    monkeypatch.setattr(bench_train, "CHANGE_THE_BASE", ("lora",))
    with pytest.raises(AssertionError, match="lora starts from the loss"):
        bench_train.run_case(CASE, ("lora",), 0, CPU)


def test_end_to_end(tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    status = bench_train.main(["--device", "cpu", "--quick", "--layers", "1", "--length", "8", "--batch", "2", "--rank", "4",
                               "--checkpointing", "off", "on", "--methods", "base", "abba", "--rounds", "2",
                               "--dtypes", "fp32", "bf16", "--out", str(tmp_path)])
    assert status == 0 and "Tokens per second" in capsys.readouterr().out
    with (tmp_path / "train.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "size", "layers", "batch", "length", "rank", "dtype", "adapter_dtype", "checkpointing", "method", "trainable",
        "resident_bytes", "step_bytes", "peak_bytes", "tokens_per_s", "median_ms", "p20_ms", "p80_ms", "min_ms", "wait_share",
        "runs", "device", "device_type", "threads", "torch", "transformers", "peft", "abba_ext", "commit", "sm90"]
    assert [row["method"] for row in rows] == ["base", "abba"] * 4
    for row in rows:
        assert float(row["tokens_per_s"]) == pytest.approx(2 * int(row["length"]) / float(row["median_ms"]) * 1e3, rel=1e-4)
    result = json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))
    assert result["rounds"] == 2 and len(result["cases"]) == 4 and result["torch"] == torch.__version__

    import plot
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- train:begin -->\nold\n<!-- train:end -->\nafter\n", encoding="utf-8")
    assert plot.main([str(tmp_path), "--readme", str(readme)]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "| ABBA (abba_ext) | " in text
    assert "bf16, 2×8, checkpointing" in text and (tmp_path / "train.png").stat().st_size > 0


def test_a_method_that_fails_costs_its_row_alone(tiny, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    import plot

    def no_hira(model, settings):
        raise ImportError("cannot import name 'HiraConfig'")

    def diverge(steps, *arguments, **options):
        timings = right(steps, *arguments, **options)
        if steps["lora"].model.is_gradient_checkpointing:
            steps["lora"].loss.fill_(math.nan)
        return timings

    right = bench_train.time_interleaved
    monkeypatch.setattr(bench_train, "time_interleaved", diverge)
    monkeypatch.setitem(METHODS, "hira", model_methods.ModelMethod("HiRA", no_hira))
    assert bench_train.main(["--device", "cpu", "--quick", "--layers", "1", "--length", "8", "--batch", "2", "--rank", "4",
                             "--checkpointing", "off", "on", "--methods", "base", "hira", "lora", "--rounds", "1",
                             "--dtypes", "fp32", "--out", str(tmp_path)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert [line.split()[1] for line in failed] == ["hira,", "hira,", "lora,"]
    assert failed[0].endswith("cannot import name 'HiraConfig'") and "has the loss nan" in failed[2]
    with (tmp_path / "train.csv").open(encoding="utf-8") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["base", "lora", "base"]
    assert plot.main([str(tmp_path), "--readme", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out.splitlines()[5].endswith(" GiB | – |")


@pytest.mark.parametrize("arguments, message", [
    (["--rank", "7"], "--rank must be even"), (["--length", "1"], "--length at least 2"),
    (["--rounds", "0"], "--rounds must be")])
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench_train.parse_arguments(["--device", "cpu", *arguments])
    assert message in capsys.readouterr().err


def test_sizes_are_the_models():
    """Parameters of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B."""
    counts = {}
    for size, geometry in bench_train.SIZES.items():
        case = CASE._replace(size=size, layers=geometry["num_hidden_layers"])
        counts[size] = sum(p.numel() for p in bench_train.build_model(case, torch.device("meta")).parameters())
    assert counts == {"135m": 134_515_008, "1b": 1_235_814_400, "8b": 8_030_261_248}
