"""ABBA in PEFT: registration, layers against dense ΔW in fp64, and PEFT's, transformers' and TRL's ways to use an adapter."""
import contextlib
import copy
import json
import math
import os
import pickle
import re
import subprocess
import sys

import architectures
import pytest
import torch
from oracle import assert_close_to_truth
from torch import nn

peft = pytest.importorskip("peft")
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, PeftType, get_peft_model, inject_adapter_in_model  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

import abba_ext  # noqa: E402
from abba_ext import bases, reference  # noqa: E402
from abba_ext.layers import FACTORS  # noqa: E402
from abba_ext.peft import AbbaPeftConfig, AbbaTunerLayer, AbbaTunerLinear, ParamWrapper, registration  # noqa: E402


class Net(nn.Module):
    """One layer of every kind in a row."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.up = nn.Linear(8, 10)
        self.down = Conv1D(7, 10)
        self.to(dtype)

    def forward(self, ids):
        hidden = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.down(self.up(hidden).tanh())


IDS = torch.arange(22).view(2, 11) % 11
KINDS = ("embed", "conv", "up", "down")


def config(**kwargs):
    return AbbaPeftConfig(**{"target_modules": list(KINDS), "r1": 2, "r2": 3, "scaling": "official", "alpha": 0.7,
                             "init_weights": False, **kwargs})


def dense_truth(model, *adapters):
    """The base in fp64 with Σ ΔW of the adapters added to its weights, from the formula."""
    base = Net(torch.float64)
    for name in KINDS:
        layer = model.get_submodule(f"base_model.model.{name}")
        weight = layer.get_base_layer().weight.detach().double()
        for adapter in adapters:
            if adapter in layer.abba_A1:
                a1, b1, a2, b2 = (getattr(layer, key)[adapter].detach().double() for key in FACTORS)
                delta = layer.scaling[adapter] * (b1 @ a1) * (b2 @ a2)
                weight = weight + (delta.t() if name == "down" else delta.view(weight.shape))
        base.get_submodule(name).weight.data.copy_(weight)
        if getattr(layer.get_base_layer(), "bias", None) is not None:
            base.get_submodule(name).bias.data.copy_(layer.get_base_layer().bias.detach())
    return base


def two_adapters(**kwargs):
    model = get_peft_model(Net(), config(**kwargs))
    model.add_adapter("other", config(r1=3, r2=1, target_modules=["embed", "down"]))
    return model.eval()


# --- registration ---


def test_registration_in_a_fresh_interpreter(tmp_path):
    program = """
import copy, importlib, json, pickle
import peft
before = list(peft.PeftType)
import abba_ext.peft
from abba_ext.peft import registration
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
abba = PeftType.ABBA
assert list(PeftType) == [*before, abba] and abba.name == abba.value == "ABBA" and isinstance(abba, str)
assert PeftType("ABBA") is abba and PeftType["ABBA"] is abba and abba in PeftType and PeftType.__members__["ABBA"] is abba
assert pickle.loads(pickle.dumps(abba)) is abba and copy.deepcopy(abba) is abba and json.dumps(abba) == '"ABBA"'
assert registration.add_peft_type("ABBA") is abba and registration.add_peft_type("LORA") is PeftType.LORA
registration.register(abba_ext.peft.AbbaPeftConfig, abba_ext.peft.AbbaModel)
importlib.reload(abba_ext.peft)
assert len(PeftType) == len(before) + 1
assert PEFT_TYPE_TO_CONFIG_MAPPING[abba] is abba_ext.peft.AbbaPeftConfig
assert PEFT_TYPE_TO_TUNER_MAPPING[abba] is abba_ext.peft.AbbaModel and PEFT_TYPE_TO_PREFIX_MAPPING[abba] == "abba_"
try:
    registration.register(peft.LoraConfig, peft.LoraModel)
except ImportError as error:
    assert "has a method ABBA already" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, cwd=tmp_path)


@pytest.mark.parametrize("stub, message", [
    ("sys.modules['peft'] = None", r"needs PEFT: pip install 'abba_ext\[peft\]'"),
    ("import types; sys.modules['peft'] = types.SimpleNamespace(__version__='0.20.1')", "needs PEFT 0.21 or newer, found 0.20.1"),
])
def test_peft_missing_or_too_old(stub, message, tmp_path):
    done = subprocess.run([sys.executable, "-c", f"import sys; {stub}; import abba_ext.peft"], capture_output=True, text=True,
                          timeout=120, cwd=tmp_path)
    assert done.returncode != 0 and "ImportError" in done.stderr
    assert re.search(message, done.stderr), done.stderr


# --- configuration ---


def test_config_round_trip(tmp_path):
    given = config(rank_pattern={"up": 8, "embed": [1, 2]}, exclude_modules=["x"], layers_to_transform=[0], layers_pattern="h")
    given.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is AbbaPeftConfig and loaded.to_dict() == given.to_dict() and loaded.peft_type is PeftType.ABBA
    assert pickle.loads(pickle.dumps(given)) == copy.deepcopy(given) == given
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**saved, "of_the_future": 1}))
    with pytest.warns(UserWarning, match="of_the_future"):
        assert PeftConfig.from_pretrained(tmp_path).to_dict() == given.to_dict()


@pytest.mark.parametrize("kwargs, message", [
    ({"r1": 2, "r2": None}, "r1 and r2 must be given together"),
    ({"scaling": "lora"}, "scaling must be one of"),
    ({"init_weights": "pissa"}, "init_weights must be True, False, 'svd' or 'random', got 'pissa'"),
    ({"abba_dropout": 1.0}, "dropout must be in"),
    ({"bias": "lora_only"}, "bias must be one of"),
    ({"rank_pattern": {"up": 1}}, "must be at least 2"),
    ({"layers_pattern": "h"}, "layers_pattern needs layers_to_transform"),
])
def test_config_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        config(**kwargs)


def test_patterns_follow_pefts_rule():
    given = config(scaling="paper", rank_pattern={r"layers\.[01]\.up": (4, 1)}, alpha_pattern={"^model.layers.1.up": 3.0})
    abba = given.abba_config()
    assert [abba.ranks(name) for name in ("model.layers.1.up", "layers.0.up", "layers.2.up", "players.1.up")] == [
        (4, 1), (4, 1), (2, 3), (2, 3)]
    assert abba.scale("model.layers.1.up") == 9 / 2 and abba.scale("layers.1.up") == 0.7**2 / 2


# --- layers against dense ΔW in fp64 ---


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("active", [["default"], ["other"], ["default", "other"]], ids="+".join)
def test_forward_and_gradients(active, dtype, tolerance):
    model = two_adapters().to(dtype)
    model.base_model.set_adapter(active)
    output = model(IDS)
    truth = dense_truth(model, *active)
    assert_close_to_truth(output, truth(IDS), tolerance)

    output.square().sum().backward()
    truth(IDS).square().sum().backward()
    for name in KINDS:  # dW is the same for both; the chain rule takes it to the factors
        layer = model.get_submodule(f"base_model.model.{name}")
        weight_grad = truth.get_submodule(name).weight.grad
        weight_grad = weight_grad.t() if name == "down" else weight_grad.flatten(1)
        for adapter in active:
            if adapter in layer.abba_A1:
                factors = [getattr(layer, key)[adapter].detach().double().requires_grad_() for key in FACTORS]
                reference.delta_weight(*factors, layer.scaling[adapter]).backward(weight_grad)
                for key, factor in zip(FACTORS, factors, strict=True):
                    assert_close_to_truth(getattr(layer, key)[adapter].grad, factor.grad, 10 * tolerance, f"{name}.{key}")


def test_delta_weight_and_lora_conversion():
    model = two_adapters()
    truth = dense_truth(model, "default")
    for name in KINDS:
        layer = model.get_submodule(f"base_model.model.{name}")
        delta = layer.get_delta_weight("default")
        base = layer.get_base_layer().weight
        assert delta.shape == base.shape
        assert_close_to_truth(base + delta, truth.get_submodule(name).weight, 1e-6, name)
    assert not model.supports_lora_conversion()  # PEFT converts linear layers alone
    model = get_peft_model(Net(), config(target_modules=["up", "down"]))
    assert model.supports_lora_conversion()
    lora_config, state = peft.convert_to_lora(model, rank=6)  # r1·r2: exact
    lora = get_peft_model(Net(), lora_config).eval()
    peft.set_peft_model_state_dict(lora, state)
    assert_close_to_truth(lora(IDS), dense_truth_of(model, "up", "down")(IDS), 1e-4)


def dense_truth_of(model, *names):
    base = Net(torch.float64)
    for name in names:
        layer = model.get_submodule(f"base_model.model.{name}")
        base.get_submodule(name).weight.data.add_(layer.get_delta_weight("default").detach().double())
    return base


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_keeps_fp32_factors(dtype):
    model = get_peft_model(Net(dtype), config(init_weights=True))
    layer = model.get_submodule("base_model.model.up")
    native = abba_ext.layers.init_factors(layer.get_base_layer(), config(init_weights=True).abba_config(), "up")
    for key in FACTORS:
        assert getattr(layer, key)["default"].dtype == torch.float32
        assert torch.equal(getattr(layer, key)["default"], native[key])  # not rounded to the base's dtype on the way
    assert model(IDS).dtype == dtype
    wide = get_peft_model(Net(torch.float64), config())
    assert {p.dtype for n, p in wide.named_parameters() if "abba_" in n} == {torch.float64}
    as_base = get_peft_model(Net(dtype), config(), autocast_adapter_dtype=False)
    assert {p.dtype for n, p in as_base.named_parameters() if "abba_" in n} == {dtype}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_equals_patch_model(dropout):
    """The same seed and names: the same factors and, without dropout, the same bits."""
    settings = dict(r1=3, r2=4, alpha=2.0, rank_pattern={"up_proj": 4}, seed=7, bias="none")
    native = abba_ext.patch_model(architectures.build("llama"), abba_ext.AbbaConfig(dropout=dropout, **settings))
    model = get_peft_model(architectures.build("llama"), AbbaPeftConfig(abba_dropout=dropout, **settings))
    wrapped = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()
               if isinstance(module, AbbaTunerLayer)}
    assert wrapped.keys() == abba_ext.abba_layers(native).keys()
    for name, layer in abba_ext.abba_layers(native).items():
        assert wrapped[name].scaling["default"] == layer.abba_scale
        for key in FACTORS:
            assert torch.equal(getattr(wrapped[name], key)["default"], getattr(layer, key))
            with torch.no_grad():
                getattr(layer, key).add_(0.1), getattr(wrapped[name], key)["default"].add_(0.1)
    batch = architectures.inputs("llama")
    results = []
    for each in (model, native):
        torch.manual_seed(1)
        output = each(**batch)
        output.loss.backward()
        results.append(output.logits)
    assert torch.equal(*results)
    for name, layer in abba_ext.abba_layers(native).items():
        for key in FACTORS:
            tolerance = {"rtol": 1e-4, "atol": 1e-9} if dropout else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(getattr(wrapped[name], key)["default"].grad, getattr(layer, key).grad, **tolerance)


def test_only_plain_calls_are_fused(monkeypatch):
    from abba_ext.peft import layer as module

    calls = []
    monkeypatch.setattr(module, "abba_linear", lambda *args, **kwargs: calls.append(1) or abba_ext.abba_linear(*args, **kwargs))
    model = get_peft_model(nn.Sequential(nn.Linear(4, 5)), config(target_modules=["0"], abba_dropout=0.5))
    layer, x = model.base_model.model[0], torch.randn(3, 4)
    model.eval()
    model(x)
    assert calls.pop() and not calls
    model.train()
    model(x)
    assert not calls
    model.eval()
    seen = []
    handle = layer.base_layer.register_forward_hook(lambda *args: seen.append(1))
    model(x)
    assert not calls and seen
    handle.remove()
    layer.base_layer.forward = layer.base_layer.forward  # as accelerate does for offloaded layers
    model(x)
    assert not calls


def test_dropout_leaves_the_base_alone():
    model = get_peft_model(nn.Sequential(nn.Linear(16, 400)), config(target_modules=["0"], abba_dropout=0.5)).train()
    layer, x = model.base_model.model[0], torch.randn(1, 16)
    torch.manual_seed(3)
    output = model(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    weight, delta = layer.weight.double(), layer.get_delta_weight("default").double()
    assert_close_to_truth(output, x.double() @ weight.t() + layer.bias.double() + dropped.double() @ delta.t(), 1e-5)


def test_dropout_leaves_ids_alone():
    model = get_peft_model(Net(), config(target_modules=["embed"], abba_dropout=0.5)).train()
    assert torch.equal(model(IDS), model.eval()(IDS))


def test_per_sample_adapters():
    model = two_adapters()
    names = ["__base__", "default", "other", "other"]
    ids = torch.stack([IDS[0], IDS[1], IDS[0], IDS[1]])
    output = model(ids, adapter_names=names)
    for row, name in enumerate(names):
        truth = dense_truth(model, *[] if name == "__base__" else [name])
        assert_close_to_truth(output[row:row + 1], truth(ids[row:row + 1]), 1e-5)
    for wrong, message in (({"adapter_names": ["default"]}, "Length of `adapter_names`"),
                           ({"adapter_names": ["nobody"] * 4}, "non-existing adapter")):
        with pytest.raises(ValueError, match=message):
            model(ids, **wrong)
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(ids, adapter_names=names)
    model.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        model.eval()(ids, adapter_names=names)


def test_disabled_switched_and_deleted_adapters():
    model = two_adapters()
    base = Net().requires_grad_(False)(IDS)  # as frozen as in the model: torch may take another convolution where gradients are wanted
    with model.disable_adapter():
        assert torch.equal(model(IDS), base)
    model.set_adapter("other")
    assert [n for n, p in model.named_parameters() if p.requires_grad and ".other" not in n] == []
    assert_close_to_truth(model(IDS), dense_truth(model, "other")(IDS), 1e-5)
    model.delete_adapter("other")
    assert not any("other" in name for name in model.state_dict())
    assert_close_to_truth(model(IDS), dense_truth(model, "default")(IDS), 1e-5)
    assert torch.equal(model.unload()(IDS), base)


def test_scales():
    model = get_peft_model(Net(), config())
    layer = model.get_submodule("base_model.model.up")
    delta = layer.get_delta_weight("default")
    layer.scale_layer(2.0)
    torch.testing.assert_close(layer.get_delta_weight("default"), 2 * delta)
    layer.unscale_layer(4.0)
    torch.testing.assert_close(layer.get_delta_weight("default"), delta / 2)
    layer.unscale_layer()
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)
    layer.set_scale("default", 3.0)
    torch.testing.assert_close(layer.get_delta_weight("default"), 3 * delta)


# --- merging ---


def test_merge_and_unload():
    model = two_adapters()
    truth = dense_truth(model, "default", "other")
    merged = model.merge_and_unload(safe_merge=True, adapter_names=["default", "other"])
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    assert type(merged) is Net
    for name in KINDS:
        assert_close_to_truth(merged.get_submodule(name).weight, truth.get_submodule(name).weight, 1e-6, name)
    assert_close_to_truth(merged(IDS), truth(IDS), 1e-5)


def test_merged_bf16_weights_are_rounded_once_and_come_back():
    model = get_peft_model(Net(torch.bfloat16), config())
    model.add_adapter("other", config())
    before = {name: model.get_submodule(f"base_model.model.{name}").weight.clone() for name in KINDS}
    truth = dense_truth(model, "default", "other")
    for _ in range(50):
        model.merge_adapter(["default"])
        with pytest.warns(UserWarning, match="additionally merging"):
            model.merge_adapter(["other"])
        for name in KINDS:
            exact = truth.get_submodule(name).weight
            merged = model.get_submodule(f"base_model.model.{name}").weight
            assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-30).all()  # half a unit of bf16
        model.unmerge_adapter()
    for name in KINDS:
        assert torch.equal(model.get_submodule(f"base_model.model.{name}").weight, before[name])


@pytest.mark.parametrize("call", [
    lambda model: model.merge_and_unload(safe_merge=True),
    lambda model: model.merge_adapter(safe_merge=True),
])
def test_safe_merge_changes_nothing_when_it_refuses(call):
    model = get_peft_model(Net(), config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "base_layer" in name}
    with torch.no_grad():
        model.get_submodule("base_model.model.down").abba_A1["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        call(model)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert not any(module.merged for module in model.modules() if isinstance(module, AbbaTunerLayer))


def test_tied_weights_are_not_merged():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    model = get_peft_model(Tied(), config(target_modules=["head"]))
    before = model.get_submodule("base_model.model.embed").weight.clone()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"cannot merge into 'head': its weight is tied \(embed.weight, head.base_layer.weight\)"):
            merge()
    assert torch.equal(model.get_submodule("base_model.model.embed").weight, before)


# --- combinations ---


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_weighted_sum_of_adapters(kind, tmp_path):
    model = two_adapters()
    weights = {"default": 0.6, "other": -1.5}
    rank = 100 if kind == "svd" else None  # beyond the sum's: exact too
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type=kind, svd_rank=rank)
    for name in KINDS:
        layer = model.get_submodule(f"base_model.model.{name}")
        truth = sum(weight * layer.get_delta_weight(adapter).double() for adapter, weight in weights.items()
                    if adapter in layer.abba_A1)
        assert_close_to_truth(layer.get_delta_weight("sum"), truth, 1e-5, name)
        assert layer.abba_A2["sum"].size(0) == 1
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "sum")
    assert torch.equal(loaded(IDS), model(IDS))


def test_weighted_sum_where_one_name_ends_another():
    net = nn.ModuleDict({"fc": nn.Linear(6, 6), "sub": nn.ModuleDict({"fc": nn.Linear(6, 6)})})
    model = get_peft_model(net, AbbaPeftConfig(r=4, target_modules=["fc"], rank_pattern={"^fc": 8}, init_weights=False))
    model.add_weighted_adapter(["default"], [2.0], "sum")
    for name in ("fc", "sub.fc"):
        layer = model.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(layer.get_delta_weight("sum"), 2.0 * layer.get_delta_weight("default"))


def test_weighted_sum_of_a_layer_that_the_first_adapter_excludes():
    model = get_peft_model(Net(), config(exclude_modules=["embed"]))
    model.add_adapter("other", config(r1=3, r2=1, target_modules=["embed", "down"]))
    model.add_weighted_adapter(["default", "other"], [1.0, 2.0], "sum", combination_type="svd")
    embed, down = (model.get_submodule(f"base_model.model.{name}") for name in ("embed", "down"))
    torch.testing.assert_close(embed.get_delta_weight("sum"), 2 * embed.get_delta_weight("other"), rtol=1e-4, atol=1e-5)
    assert down.abba_A1["sum"].size(0) == 6  # the largest r1·r2


def test_truncated_sum_is_the_best_of_its_rank():
    model = two_adapters()
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="svd", svd_rank=2)
    for name in ("embed", "up"):
        layer = model.get_submodule(f"base_model.model.{name}")
        exact = sum(layer.get_delta_weight(adapter).double() for adapter in ("default", "other") if adapter in layer.abba_A1)
        best = torch.linalg.svdvals(exact)[2:].norm()
        error = (exact - layer.get_delta_weight("sum").double()).norm()
        assert best - 1e-6 <= error <= best * 1.0001 + 1e-6


@pytest.mark.parametrize("kwargs, message", [
    ({"combination_type": "linear"}, "combination_type must be one of 'cat', 'svd', got 'linear'"),
    ({"adapters": ["nobody"], "weights": [1.0]}, "nobody does not exist"),
    ({"weights": [1.0]}, "one number for each of the 2 adapters"),
    ({"adapter_name": "other"}, "must be new"),
    ({"adapters": ["default", "heads"]}, "cannot combine modules_to_save"),
])
def test_weighted_sum_errors(kwargs, message):
    net = Net()
    net.norm = nn.LayerNorm(7)
    model = get_peft_model(net, config())
    model.add_adapter("other", config(r1=3, r2=1, target_modules=["embed", "down"]))
    model.add_adapter("heads", config(target_modules=["up"], modules_to_save=["norm"]))
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**{"adapters": ["default", "other"], "weights": [1.0, 2.0], "adapter_name": "sum", **kwargs})
    assert set(model.state_dict()) == before and "sum" not in model.peft_config


# --- targets ---


@pytest.mark.parametrize("name", architectures.NAMES)
def test_default_targets_are_those_of_patch_model(name):
    model = get_peft_model(architectures.build(name), AbbaPeftConfig(r=4, task_type="SEQ_CLS" if name == "bert" else None))
    wrapped = {key.removeprefix("base_model.model.") for key, module in model.named_modules() if isinstance(module, AbbaTunerLayer)}
    assert wrapped == set(abba_ext.abba_layers(abba_ext.patch_model(architectures.build(name))))
    model.add_adapter("other", AbbaPeftConfig(r=4))
    assert all("other" in module.abba_A1 for module in model.modules() if isinstance(module, AbbaTunerLayer))
    model(**architectures.inputs(name)).loss.backward()


@pytest.mark.parametrize("blocks, pattern", [([1], None), (1, "layers"), ([1], ["h", "layers"]), ([0, 1], None), ([], None)])
def test_default_targets_of_some_blocks(blocks, pattern):
    model = get_peft_model(architectures.build("llama"), AbbaPeftConfig(r=4, layers_to_transform=blocks, layers_pattern=pattern))
    found = {int(name.split("layers.")[1][0]) for name, module in model.named_modules() if isinstance(module, AbbaTunerLayer)}
    assert found == ({1} if blocks in (1, [1]) else {0, 1})


def test_all_linear_for_a_second_adapter():
    model = get_peft_model(Net(), config())
    model.add_adapter("other", config(target_modules="all-linear"))
    assert model.targeted_module_names == list(KINDS)
    assert {name for name in KINDS if "other" in model.get_submodule(f"base_model.model.{name}").abba_A1} == {"up", "down"}
    assert type(model.get_submodule("base_model.model.up")) is AbbaTunerLinear


def test_what_cannot_be_adapted_is_refused():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="target '0' is a LayerNorm; linear layers"):
        get_peft_model(model, config(target_modules=["0"]))
    patched = abba_ext.patch_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
                                   abba_ext.AbbaConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="model has ABBA layers of patch_model, which PEFT would not save"):
        get_peft_model(patched, config(target_modules=["1"]))


class Experts(nn.Module):
    def __init__(self, transposed):
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn(3, *(4, 6) if transposed else (6, 4)))
        self.down = nn.Parameter(torch.randn(3, *(6, 4) if transposed else (4, 6)))

    def forward(self, x):
        up, down = (weight.mT if self.is_transposed else weight for weight in (self.up, self.down))
        return torch.stack([(x @ u.t()).tanh() @ d.t() for u, d in zip(up, down)]).sum(0)


@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_experts(transposed, tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(Experts(transposed), nn.Linear(4, 4))

    def adapter():
        return AbbaPeftConfig(r1=2, r2=3, alpha=1.0, init_weights=False, target_modules=["1"], target_parameters=["0.up", "0.down"])

    model = get_peft_model(build(), adapter())
    model.add_adapter("other", adapter())
    outer = model.base_model.model[0]
    assert isinstance(outer, ParamWrapper) and isinstance(outer.base_layer, ParamWrapper)
    x = torch.randn(5, 4)

    def truth(*adapters):
        base = build().double()
        for layer in (outer, outer.base_layer):
            for name in adapters:
                for expert in range(3):
                    a1, b1, a2, b2 = (getattr(layer, key)[name][expert].detach().double() for key in FACTORS)
                    delta = layer.scaling[name] * (b1 @ a1) * (b2 @ a2)
                    base[0].get_parameter(layer.parameter_name).data[expert] += delta.t() if transposed else delta
        linear = model.base_model.model[1]
        for name in adapters:
            base[1].weight.data += linear.get_delta_weight(name).detach().double()
        return base

    for active in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(active)
        assert_close_to_truth(model(x), truth(*active)(x.double()), 1e-5)
    model.set_adapter("default")
    model(x).square().sum().backward()
    expected = truth("default")
    expected(x.double()).square().sum().backward()
    for layer in (outer, outer.base_layer):
        grad = expected[0].get_parameter(layer.parameter_name).grad
        factors = [getattr(layer, key)["default"].detach().double().requires_grad_() for key in FACTORS]
        a1, b1, a2, b2 = factors
        (layer.scaling["default"] * (b1 @ a1) * (b2 @ a2)).backward(grad.mT if transposed else grad)
        for key, factor in zip(FACTORS, factors, strict=True):
            assert_close_to_truth(getattr(layer, key)["default"].grad, factor.grad, 1e-4, key)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(build(), tmp_path)(x), model(x))
    merged = truth("default")(x.double())
    assert_close_to_truth(model.merge_and_unload()(x), merged, 1e-5)


def test_a_module_that_fails_shows_its_own_parameter_again():
    model = get_peft_model(nn.Sequential(Experts(False)), config(target_modules=[], target_parameters=["0.up"]))
    x = torch.randn(5, 4)
    before = model(x)
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 3))
    owner = model.base_model.model[0].get_base_layer()
    assert owner.up is owner._parameters["up"] and torch.equal(model(x), before)


def test_a_disabled_parameter_is_the_bases_also_after_merging():
    model = get_peft_model(nn.Sequential(Experts(False)), config(target_modules=[], target_parameters=["0.up"]))
    x = torch.randn(5, 4)
    with model.disable_adapter():
        base = model(x)
    model.merge_adapter()
    assert not torch.allclose(model(x), base)
    with model.disable_adapter():
        assert torch.equal(model(x), base)


def test_parameter_errors():
    with pytest.raises(ValueError, match="abba_dropout must be 0 with target_parameters"):
        get_peft_model(nn.Sequential(Experts(False)), config(target_modules=[], target_parameters=["0.up"], abba_dropout=0.1))
    model = get_peft_model(nn.Sequential(Experts(False)), config(target_modules=[], target_parameters=["0.up"])).eval()
    with pytest.raises(ValueError, match="target_parameters must be the same in all adapters"):
        model.add_adapter("other", config(target_modules=[], target_parameters=["0.down"]))
    with pytest.raises(ValueError, match="its samples share a weight"):
        model(torch.randn(1, 4), adapter_names=["default"])


# --- saving, loading and the libraries around PEFT ---


@contextlib.contextmanager
def saved_llama(tmp_path, **kwargs):
    """A folder of a tiny Llama, and a PEFT model on it with an adapter that is not the start."""
    architectures.build("llama").save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, AbbaPeftConfig(r=6, task_type="CAUSAL_LM", init_weights=False, alpha=2.0, **kwargs)).eval()
    model.save_pretrained(tmp_path / "adapter")
    yield model, architectures.inputs("llama")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_from_pretrained(tmp_path, low_cpu_mem_usage, monkeypatch):
    with saved_llama(tmp_path, bias="all", trainable_token_indices=[1, 5]) as (model, batch):
        from transformers import AutoModelForCausalLM

        monkeypatch.setattr(abba_ext.layers, "_truncated_svd", None)  # loading decomposes nothing
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        assert torch.equal(auto(**batch).logits, model(**batch).logits)
        keys = {key.split("_proj.")[1] for key in peft.get_peft_model_state_dict(model) if "self_attn" in key}
        assert keys == {f"{key}.weight" for key in FACTORS}
        card = (tmp_path / "adapter" / "README.md").read_text()
        assert "library_name: peft" in card and "base_model:" in card


def test_transformers_loads_and_adds_adapters(tmp_path):
    with saved_llama(tmp_path) as (model, batch):
        from transformers import AutoModelForCausalLM

        expected = model(**batch).logits
        native = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        assert torch.equal(native(**batch).logits, expected)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        before = base(**batch).logits
        base.load_adapter(tmp_path / "adapter", adapter_name="loaded")
        assert torch.equal(base(**batch).logits, expected)
        base.disable_adapters()
        assert torch.equal(base(**batch).logits, before)
        base.enable_adapters()
        base.add_adapter(AbbaPeftConfig(r=4, init_weights=False), adapter_name="fresh")
        base.set_adapter("fresh")
        fresh = base(**batch).logits
        base.save_pretrained(tmp_path / "fresh")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "fresh").eval()
        assert torch.equal(again(**batch).logits, fresh) and not torch.equal(fresh, expected)


def data(rows=8):
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (rows, 12), generator=generator).tolist()
    return Dataset.from_list([{"input_ids": row, "attention_mask": [1] * 12, "labels": row} for row in ids])


def arguments(folder, **kwargs):
    return dict(output_dir=str(folder), per_device_train_batch_size=4, learning_rate=5e-3, report_to=[], use_cpu=True,
                lr_scheduler_type="constant", logging_steps=1, save_steps=2, seed=0, disable_tqdm=True, **kwargs)


@pytest.mark.parametrize("native", [False, True], ids=["PeftModel", "add_adapter"])
def test_trainer(tmp_path, native):
    from transformers import Trainer, TrainingArguments

    def build():
        model = architectures.build("llama")
        if native:
            model.add_adapter(AbbaPeftConfig(r=6, alpha=2.0))
            return model
        return get_peft_model(model, AbbaPeftConfig(r=6, alpha=2.0, task_type="CAUSAL_LM"))

    def train(folder, steps, resume=None):
        trainer = Trainer(build(), TrainingArguments(**arguments(folder, max_steps=steps)), train_dataset=data())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train(tmp_path / "whole", 4)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    train(tmp_path / "parts", 2)
    assert "adapter_model.safetensors" in os.listdir(tmp_path / "parts" / "checkpoint-2")
    assert "model.safetensors" not in os.listdir(tmp_path / "parts" / "checkpoint-2")
    if native:  # whose checkpoints the Trainer cannot resume from, whatever the method
        return
    resumed = train(tmp_path / "parts", 4, resume=True)
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_trl_sft_trainer(tmp_path, tiny_model):
    trl = pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM

    args = trl.SFTConfig(**arguments(tmp_path, max_steps=3), max_length=32, gradient_checkpointing=True, bf16=False)
    from datasets import Dataset

    trainer = trl.SFTTrainer(str(tiny_model), args, peft_config=AbbaPeftConfig(r=4, alpha=2.0, task_type="CAUSAL_LM"),
                             train_dataset=Dataset.from_dict({"text": ["one two three four five six"] * 8}))
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and all("abba_" in name for name in changed)
    trainer.save_model(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "saved")
    ids = torch.arange(6)[None]
    torch.testing.assert_close(loaded.eval()(ids).logits.float(), trainer.model.eval()(ids).logits.float())


def test_trl_finds_the_factors_of_an_adapter(tmp_path, tiny_model):
    """DPO of a trained adapter: TRL copies it for the reference, whose log-probabilities are then the policy's."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), AbbaPeftConfig(r=4, task_type="CAUSAL_LM"))
    for layer in (module for module in model.modules() if isinstance(module, AbbaTunerLayer)):
        nn.init.normal_(layer.abba_B2["default"], std=0.1)
    data = Dataset.from_list([{"prompt": "one two", "chosen": "three four", "rejected": "five six"}] * 4)
    args = trl.DPOConfig(**arguments(tmp_path, max_steps=1), bf16=False, gradient_checkpointing=False)
    trainer = trl.DPOTrainer(model, args=args, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(tiny_model))
    factors = {name: value for name, value in trainer.model.named_parameters() if "abba_" in name and ".default." in name}
    assert factors and all(torch.equal(value, trainer.model.get_parameter(name.replace(".default.", ".ref.")))
                           for name, value in factors.items())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"autocast_adapter_dtype": False}], ids=str)
def test_only_the_active_adapter_is_trainable(options, tmp_path):
    def trainable(model, adapter):
        return {parameter.requires_grad for name, parameter in model.named_parameters() if name.endswith(f".{adapter}.weight")}

    model = get_peft_model(Net(torch.bfloat16), config(), **options)
    model.save_pretrained(tmp_path)
    model.add_adapter("other", config(), **options)
    assert trainable(model, "default") == {True} and trainable(model, "other") == {False}
    loaded = PeftModel.from_pretrained(Net(torch.bfloat16), tmp_path, **options)
    assert trainable(loaded, "default") == {False}
    loaded.load_adapter(tmp_path, "another", **options)
    assert trainable(loaded, "another") == {False}


def test_modules_to_save_and_bias(tmp_path):
    model = get_peft_model(Net(), config(target_modules=["up", "embed"], modules_to_save=["down"], bias="abba_only"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "abba_" not in name}
    assert trained == {"base_model.model.up.base_layer.bias", "base_model.model.down.modules_to_save.default.weight",
                       "base_model.model.down.modules_to_save.default.bias"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS).square().sum().backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    assert torch.equal(loaded(IDS), model(IDS)) and not torch.equal(loaded(IDS), Net()(IDS))
    with model.disable_adapter():
        assert not torch.equal(model(IDS), Net()(IDS))  # the trained bias stays, as PEFT warns


def test_gradient_checkpointing_gives_the_same_gradients():
    def gradients(**kwargs):
        model = get_peft_model(architectures.build("llama"), AbbaPeftConfig(r=6, init_weights=False, seed=1))
        torch.manual_seed(0)
        for name, parameter in sorted(model.named_parameters()):
            if "abba_" in name:
                nn.init.normal_(parameter, std=0.1)
        if kwargs:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(kwargs)
        model(**architectures.inputs("llama")).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if "abba_" in name}

    expected = gradients()
    assert all(grad.abs().sum() > 0 for grad in expected.values())
    for use_reentrant in (False, True):
        for name, grad in gradients(use_reentrant=use_reentrant).items():
            torch.testing.assert_close(grad, expected[name], msg=name)


def test_injection_without_a_peft_model():
    model = inject_adapter_in_model(config(), Net())
    state = peft.get_peft_model_state_dict(model)
    assert {key.split(".", 1)[1] for key in state} == {f"{key}.weight" for key in FACTORS}
    other = inject_adapter_in_model(config(), Net())
    assert not peft.set_peft_model_state_dict(other, state).unexpected_keys
    assert torch.equal(other(IDS), model(IDS))


# --- quantised bases ---


def quantized_layers():
    bnb = pytest.importorskip("bitsandbytes")
    linear = nn.Linear(64, 128)
    for layer in (bnb.nn.Linear4bit(64, 128, compute_dtype=torch.float32, quant_type="nf4"),
                  bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=False)):
        layer.load_state_dict(linear.state_dict())
        yield layer.to("cpu")


@pytest.mark.parametrize("index", [0, 1], ids=["nf4", "int8"])
def test_quantised_base(index):
    torch.manual_seed(0)
    base = list(quantized_layers())[index]
    x = torch.randn(5, 64)
    plain = base(x)
    weight = bases.weight_matrix(base).detach().double()
    model = get_peft_model(nn.Sequential(copy.deepcopy(base)), config(target_modules=["0"], alpha=20.0))
    layer = model.base_model.model[0]
    delta = layer.get_delta_weight("default").detach().double()
    output = model(x)
    assert_close_to_truth(output - plain, x.double() @ delta.t(), 1e-4)
    model.merge_adapter()
    merged = bases.weight_matrix(layer.get_base_layer()).detach().double()
    step = (bases.weight_matrix(base).detach().double() - (weight + delta)).norm()
    assert (merged - (weight + delta)).norm() < step / 2  # nearer to the sum than the base is: quantised again, not lost
    assert torch.equal(model(x), layer.get_base_layer()(x))
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer()(x), plain) and torch.equal(model(x), output)


def test_unmergeable_torchao_base():
    quantization = pytest.importorskip("torchao.quantization")
    base = nn.Sequential(nn.Linear(64, 128))
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    model = get_peft_model(base, config(target_modules=["0"]))
    x = torch.randn(5, 64)
    before = model(x)
    with pytest.raises(TypeError, match="cannot merge into a weight that is"):
        model.merge_and_unload()
    assert torch.equal(model(x), before)
