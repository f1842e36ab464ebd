"""Other formats: what is read and written computes the dense ΔW, in PEFT and transformers too; hostile files are refused."""
import json
import pickle
import re
import sys
import warnings

import architectures
import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_close_to_truth, relative_error
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

import abba_ext
from abba_ext import AbbaConfig, formats, reference
from abba_ext.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from abba_ext.formats.adapter import PEFT_CONFIG_NAME
from abba_ext.formats import Adapter, LayerFactors, convert_adapter, lora_factors, read, write
from abba_ext.layers import FACTORS

RANKS = AbbaConfig(r1=2, r2=3, scaling=0.7, rank_pattern={r".*\.(q_proj|c_fc)": [4, 1]})


def randomize(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


def saved(name, folder, config=RANKS):
    """A patched model of random factors, saved."""
    model = randomize(abba_ext.patch_model(architectures.build(name).eval(), config))
    abba_ext.save_adapter(model, folder)
    return model


def logits(model, name):
    inputs = {key: value for key, value in architectures.inputs(name).items() if key != "labels"}
    with torch.no_grad():
        return model(**inputs).logits


def dense_logits(name, layers, trained=()):
    """The truth: the base model in fp64 with every dense ΔW in its weight."""
    model = architectures.build(name).double().eval()
    with torch.no_grad():
        for layer_name, layer in layers.items():
            module = model.get_submodule(layer_name)
            delta = delta_of(layer)
            module.weight.add_(delta.t() if isinstance(module, Conv1D) else delta)
        for key, value in dict(trained).items():
            model.get_parameter(key).copy_(value)
    return logits(model, name)


def delta_of(layer):
    return reference.delta_weight(*(factor.double() for factor in (layer.a1, layer.b1, layer.a2, layer.b2)), layer.scale)


def layer(m=6, n=5, r1=2, r2=3, scale=0.5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((r1, n), (m, r1), (r2, n), (m, r2))
    return LayerFactors(*(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes), scale)


def factors_of(layer):
    return layer.a1, layer.b1, layer.a2, layer.b2


def assert_same(one, other):
    assert one.layers.keys() == other.layers.keys()
    for name in one.layers:
        assert one.layers[name].scale == other.layers[name].scale
        assert all(torch.equal(a, b) for a, b in zip(factors_of(one.layers[name]), factors_of(other.layers[name]), strict=True))


def config_of(folder):
    return json.loads((folder / PEFT_CONFIG_NAME).read_text())


# --- exact LoRA ---


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_lora_is_exact_in_peft_and_transformers(name, tmp_path):
    patched = saved(name, tmp_path / "abba")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns where fan_in_fan_out or keys are wrong
        report = convert_adapter(tmp_path / "abba", tmp_path / "lora", "lora", fan_in_fan_out=name == "gpt2")
        in_peft = peft.PeftModel.from_pretrained(architectures.build(name).eval(), tmp_path / "lora").eval()
    in_transformers = architectures.build(name).eval()
    in_transformers.load_adapter(str(tmp_path / "lora"))
    truth = dense_logits(name, read(tmp_path / "abba").layers)
    assert relative_error(logits(architectures.build(name).eval(), name), truth) > 0.01  # the adapter matters
    assert_close_to_truth(logits(patched, name), truth, 1e-6)
    assert_close_to_truth(logits(in_peft, name), truth, 1e-6, "PEFT")
    assert_close_to_truth(logits(in_transformers.eval(), name), truth, 1e-6, "transformers")
    adapted = {key for key, module in in_peft.base_model.model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert adapted == set(report["layers"]) == set(abba_ext.abba_layers(patched))
    assert (report["source"], report["format"], report["rank"]) == ("abba", "lora", 8)
    assert {entry["rank"] for entry in report["layers"].values()} == {6, 4}


@pytest.mark.parametrize("pad, rank", [(True, 8), (False, 6)])
def test_lora_has_one_rank(pad, rank, tmp_path):
    layers = {"a.q": layer(r1=2, r2=3), "a.k": layer(7, 4, 1, 4, seed=1)}
    write(Adapter(layers, "org/model"), tmp_path / "lora", "lora", pad=pad, task_type="CAUSAL_LM")
    config, state = config_of(tmp_path / "lora"), load_file(tmp_path / "lora" / WEIGHTS_NAME)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (rank, rank, {}, {})
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM" and not config["use_rslora"]
    assert sorted(config["target_modules"]) == ["a.k", "a.q"] and config["base_model_name_or_path"] == "org/model"
    assert len(state) == 4
    for name, factors in layers.items():
        a, b = (state[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert a.shape[0] == b.shape[1] == rank
        assert_close_to_truth(b.double() @ a.double(), delta_of(factors), 1e-6)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


@pytest.mark.parametrize("r1, r2, rank", [(2, 4, 8), (3, 3, 16), (16, 32, 512)])
def test_lora_is_padded_to_the_next_rank_of_servers(r1, r2, rank, tmp_path):
    assert write(Adapter({"q": layer(r1=r1, r2=r2)}), tmp_path / "lora", "lora")["rank"] == rank


@pytest.mark.parametrize("m, n, r1, r2, rank", [(20, 30, 3, 4, 5), (40, 9, 4, 4, 3), (5, 6, 4, 4, 4), (8, 8, 2, 2, 1)])
def test_truncation_is_the_best_and_its_error_is_told(m, n, r1, r2, rank, tmp_path):
    factors = layer(m, n, r1, r2, dtype=torch.float64)
    report = write(Adapter({"q": factors}), tmp_path / "lora", "lora", rank=rank, dtype="float64")
    delta = delta_of(factors)
    best = torch.linalg.svdvals(delta)[rank:].norm() / delta.norm()
    assert report["layers"]["q"]["rank"] == rank
    assert report["layers"]["q"]["relative_error"] == pytest.approx(best.item(), rel=1e-9)
    state = load_file(tmp_path / "lora" / WEIGHTS_NAME)
    written = state["base_model.model.q.lora_B.weight"] @ state["base_model.model.q.lora_A.weight"]
    assert relative_error(written, delta) == pytest.approx(best.item(), rel=1e-9)


def test_truncation_of_a_lower_rank_is_exact():
    low = layer(30, 4, 3, 3, dtype=torch.float64)  # R = 9, but ΔW [30, 4] has rank 4
    a, b, error = lora_factors(low, 4)
    assert error < 1e-15
    assert_close_to_truth(b @ a, delta_of(low), 1e-14)
    zero = LayerFactors(low.a1, low.b1, low.a2, torch.zeros_like(low.b2), 1.0)
    for rank in (None, 2):
        a, b, error = lora_factors(zero, rank)
        assert error == 0 and torch.isfinite(a).all() and not (b @ a).any()


class LargestOutput(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))])
        return result


@pytest.mark.parametrize("rank", [None, 8])
def test_no_dense_update_is_formed(rank, tmp_path):
    large = layer(4096, 4096, 4, 4)
    with LargestOutput() as largest:
        write(Adapter({"q": large}), tmp_path / "lora", "lora", rank=rank)
    assert 0 < largest.numel <= 4096 * 16


def test_ranks_beyond_servers(tmp_path):
    adapter = Adapter({"a.q": layer(), "a.v": layer(40, 30, 27, 19)})
    with pytest.raises(ValueError, match=r"'a.v' needs a LoRA of rank 513 .*at most 512.*rank=512.*pad=False.*abba-ext merge"):
        write(adapter, tmp_path / "lora", "lora")
    with pytest.raises(ValueError, match="rank 513 "):
        write(adapter, tmp_path / "lora", "lora", rank=600)
    assert not (tmp_path / "lora").exists()
    assert write(adapter, tmp_path / "lora", "lora", rank=30)["layers"]["a.v"]["relative_error"] < 1e-14  # ΔW has 30 columns
    assert write(adapter, tmp_path / "whole", "lora", pad=False)["rank"] == 513


def test_half_precision(tmp_path):
    skewed = layer(12, 10)
    skewed = LayerFactors(skewed.a1 * 1e3, skewed.b1 * 1e-4, skewed.a2 * 1e3, skewed.b2 * 1e-2, 1.0)
    for dtype, tolerance in ((torch.float16, 2**-10), (torch.bfloat16, 2**-7)):
        folder = tmp_path / str(dtype)
        write(Adapter({"q": skewed}), folder, "lora", dtype=dtype)
        a, b = (load_file(folder / WEIGHTS_NAME)[f"base_model.model.q.lora_{part}.weight"] for part in "AB")
        assert a.dtype == b.dtype == dtype
        assert_close_to_truth(b.double() @ a.double(), delta_of(skewed), tolerance)  # A* alone would have been beyond fp16
    huge = Adapter({"q": LayerFactors(*(factor * 1e4 for factor in factors_of(skewed)), 1.0)})
    with pytest.raises(ValueError, match="layer 'q' has values up to .*torch.float16 cannot hold"):
        write(huge, tmp_path / "huge", "lora", dtype="float16")
    with pytest.raises(ValueError, match="layer 'q' has values up to .*torch.float16 cannot hold"):
        write(huge, tmp_path / "huge", "abba", dtype="float16")
    assert not (tmp_path / "huge").exists()


def test_heads_are_saved_whole(tmp_path):
    model = saved("bert", tmp_path / "abba", AbbaConfig(r1=2, r2=3, scaling=0.7))
    adapter = read(tmp_path / "abba")
    assert set(adapter.trained) == {"classifier.weight", "classifier.bias"}
    truth = dense_logits("bert", adapter.layers, adapter.trained)
    assert_close_to_truth(logits(model, "bert"), truth, 1e-6)
    write(adapter, tmp_path / "lora", "lora")
    assert config_of(tmp_path / "lora")["modules_to_save"] == ["classifier"]
    in_peft = peft.PeftModel.from_pretrained(architectures.build("bert").eval(), tmp_path / "lora")
    assert_close_to_truth(logits(in_peft.eval(), "bert"), truth, 1e-6)
    write(adapter, tmp_path / "loha", "loha")
    again = read(tmp_path / "loha")
    assert again.trained.keys() == adapter.trained.keys()
    assert all(torch.equal(again.trained[key], value) for key, value in adapter.trained.items())
    in_peft = peft.PeftModel.from_pretrained(architectures.build("bert").eval(), tmp_path / "loha")
    assert_close_to_truth(logits(in_peft.eval(), "bert"), truth, 1e-6)


def tied_in_peft(folder, *modules):
    """GPT-2, whose head is tied to the embeddings, with copies of modules trained by PEFT."""
    from abba_ext.peft import AbbaPeftConfig

    config = AbbaPeftConfig(r=4, target_modules=["c_attn"], init_weights=False, modules_to_save=list(modules))
    randomize(peft.get_peft_model(architectures.build("gpt2"), config)).save_pretrained(folder)


@pytest.mark.parametrize("modules", [["lm_head"], ["wte"], ["wte", "lm_head"]], ids=str)
def test_a_copy_that_peft_trained_is_not_loaded_into_a_tied_weight(modules, tmp_path):
    tied_in_peft(tmp_path / "peft", *modules)
    convert_adapter(tmp_path / "peft", tmp_path / "abba", "abba")
    model = architectures.build("gpt2").eval()
    before = logits(model, "gpt2")
    for folder in ("abba", "again"):
        with pytest.raises(ValueError, match="weight' was trained as a tensor of its own, but the model ties it to .*untie"):
            abba_ext.load_adapter(model, tmp_path / folder)
        assert torch.equal(logits(model, "gpt2"), before)
        if folder == "abba":
            convert_adapter(tmp_path / "abba", tmp_path / "again", "abba")
    convert_adapter(tmp_path / "abba", tmp_path / "lora", "lora")
    in_peft, in_lora = (peft.PeftModel.from_pretrained(architectures.build("gpt2").eval(), tmp_path / folder)
                        for folder in ("peft", "lora"))
    assert_close_to_truth(logits(in_lora.eval(), "gpt2"), logits(in_peft.eval(), "gpt2").double(), 1e-5)


@pytest.mark.parametrize("to", ["lora", "loha", "peft"])
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_tied_weight_that_was_trained_becomes_a_copy_for_each(to, module, tmp_path):
    import abba_ext.peft  # noqa: F401

    config = AbbaConfig(r1=2, r2=3, init="random", target_modules=["q_proj"], modules_to_save=[module])
    model = saved("gemma", tmp_path / "abba", config)
    convert_adapter(tmp_path / "abba", tmp_path / "new", to)
    assert sorted(config_of(tmp_path / "new")["modules_to_save"]) == ["lm_head", "model.embed_tokens"]
    in_peft = peft.PeftModel.from_pretrained(architectures.build("gemma").eval(), tmp_path / "new").eval()
    assert_close_to_truth(logits(in_peft, "gemma"), logits(model, "gemma").double(), 1e-5)
    again = abba_ext.load_adapter(architectures.build("gemma").eval(), tmp_path / "abba")
    assert torch.equal(logits(again, "gemma"), logits(model, "gemma"))


def test_a_tied_weight_that_was_trained_is_not_loaded_where_it_is_not_tied(tmp_path):
    saved("gpt2", tmp_path, AbbaConfig(r=4, init="random", modules_to_save=["lm_head"]))
    untied = architectures.build("gpt2")
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match="'transformer.wte.weight' was trained for lm_head.weight too, which the model does not"):
        abba_ext.load_adapter(untied, tmp_path)


@pytest.mark.parametrize("to", ["lora", "loha", "peft"])
def test_biases_alone_are_refused(to, tmp_path):
    saved("opt", tmp_path / "abba", AbbaConfig(r=4, bias="abba_only"))
    with pytest.raises(ValueError, match="'model.decoder.layers.0.*bias' is trained in full without its whole module"):
        convert_adapter(tmp_path / "abba", tmp_path / "new", to)
    convert_adapter(tmp_path / "abba", tmp_path / "again", "abba")
    model, again = (abba_ext.load_adapter(architectures.build("opt").eval(), tmp_path / folder) for folder in ("abba", "again"))
    assert torch.equal(logits(again, "opt"), logits(model, "opt"))


# --- LoHa ---


def test_loha_is_exact_in_peft(tmp_path):
    saved("llama", tmp_path / "abba")
    convert_adapter(tmp_path / "abba", tmp_path / "loha", "loha")
    config = config_of(tmp_path / "loha")
    assert (config["peft_type"], config["r"]) == ("LOHA", 3) and set(config["rank_pattern"].values()) == {4}
    in_peft = peft.PeftModel.from_pretrained(architectures.build("llama").eval(), tmp_path / "loha")
    assert_close_to_truth(logits(in_peft.eval(), "llama"), dense_logits("llama", read(tmp_path / "abba").layers), 1e-6)


def test_peft_loha_is_read(tmp_path):
    config = peft.LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "up_proj", "o_proj"], init_weights=False,
                             rank_pattern={"q_proj": 2, r"layers\.1\.mlp.*": 4},
                             alpha_pattern={"model.layers.0.self_attn.q_proj": 7})
    model = randomize(peft.get_peft_model(architectures.build("llama"), config)).eval()
    model.save_pretrained(tmp_path / "loha")
    adapter = read(tmp_path / "loha")
    assert adapter.source == "loha" and len(adapter.layers) == 6
    assert adapter.layers["model.layers.0.self_attn.q_proj"].scale == 7 / 2
    assert adapter.layers["model.layers.1.self_attn.q_proj"].scale == 5 / 2
    assert adapter.layers["model.layers.1.mlp.up_proj"].ranks == (4, 4)
    assert_close_to_truth(logits(model, "llama"), dense_logits("llama", adapter.layers), 1e-6)
    convert_adapter(tmp_path / "loha", tmp_path / "abba", "abba")
    ours = abba_ext.load_adapter(architectures.build("llama").eval(), tmp_path / "abba")
    assert_close_to_truth(logits(ours, "llama"), logits(model, "llama").double(), 1e-6)
    convert_adapter(tmp_path / "loha", tmp_path / "again", "loha")
    back = peft.PeftModel.from_pretrained(architectures.build("llama").eval(), tmp_path / "again").eval()
    assert_close_to_truth(logits(back, "llama"), logits(model, "llama").double(), 1e-6)


def test_tucker_loha_is_refused(tmp_path):
    config = peft.LoHaConfig(target_modules=["0"], use_effective_conv2d=True)
    peft.get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'base_model.model.0.hada_t1': Tucker"):
        read(tmp_path)


# --- the other formats ---


def authors_folder(folder, layers, suffix=".default", prefix="", **config):
    folder.mkdir()
    state = {f"{prefix}{name}.lora_{key}{suffix}": factor for name, value in layers.items()
             for key, factor in zip(("A1", "B1", "A2", "B2"), factors_of(value))}
    torch.save(state, folder / "adapter_model.bin")
    (folder / PEFT_CONFIG_NAME).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("suffix", [".default", "", ".weight", ".default.weight"])
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_authors_format(suffix, prefix, tmp_path):
    layers = {"model.layers.0.self_attn.q_proj": layer(scale=6.0), "model.layers.1.mlp.up_proj": layer(8, 5, 4, 4, 6.0)}
    folder = authors_folder(tmp_path / "authors", layers, suffix, prefix, r1=2, r2=3, alpha1=4, alpha2=9.0)
    adapter = read(folder)
    assert adapter.source == "authors"
    assert_same(adapter, Adapter(layers))  # s = √4·√9
    assert_same(read(folder / "adapter_model.bin", format="authors"), adapter)
    assert read(folder, scaling=0.25).layers["model.layers.1.mlp.up_proj"].scale == 0.25
    torch.save(torch.load(folder / "adapter_model.bin") | {"head.weight": torch.ones(2)}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="unknown keys 'head.weight'"):
        read(folder)


def test_authors_scale_is_never_guessed(tmp_path):
    for index, config in enumerate(({}, {"alpha1": 4}, {"alpha1": "4", "alpha2": 4}, {"alpha1": -1, "alpha2": 4})):
        folder = authors_folder(tmp_path / str(index), {"q": layer()}, **config)
        with pytest.raises(ValueError, match="s = √alpha1·√alpha2 needs two numbers.*scaling="):
            read(folder)
        assert read(folder, scaling=2).layers["q"].scale == 2.0
    with pytest.raises(ValueError, match="scaling must be a number, s itself, for format 'authors', got 'paper'"):
        read(folder, scaling="paper")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_code_of_a_pickle_is_run(tmp_path):
    trap = tmp_path / "trap"
    state = {f"q.lora_{key}.default": factor for key, factor in zip(("A1", "B1", "A2", "B2"), factors_of(layer()))}
    torch.save(state | {"evil": Malicious(str(trap))}, tmp_path / "adapter_model.bin")
    (tmp_path / PEFT_CONFIG_NAME).write_text('{"alpha1": 1, "alpha2": 1}')
    with pytest.raises(ValueError, match="adapter_model.bin is damaged.*or holds more than tensors; none of it was run"):
        read(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Malicious(str(trap))))
    with pytest.raises(ValueError, match="none of it was run"):
        read(tmp_path)
    assert not trap.exists()


def test_pickles_that_are_no_state_dict(tmp_path):
    path = tmp_path / "adapter_model.bin"
    good = {f"q.lora_{key}": factor for key, factor in zip(("A1", "B1", "A2", "B2"), factors_of(layer()))}
    for content, message in (([torch.ones(2)], "must hold a dict of tensors by name, got list"),
                             ({"q": 3}, "must hold a dict of tensors by name"),
                             (good | {"q.lora_A1": torch.ones(1).expand(4000, 10**9)}, "'q.lora_A1' must be an ordinary tensor"),
                             (good | {"q.lora_A1": torch.eye(5).to_sparse()}, "'q.lora_A1' must be an ordinary tensor"),
                             (good | {"q.lora_A1": torch.ones(2, 5, device="meta")}, "'q.lora_A1' must be an ordinary tensor")):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            read(tmp_path, scaling=1.0)
    torch.save(good, path)
    with pytest.raises(ValueError, match="max_bytes is 100"):
        read(tmp_path, scaling=1.0, max_bytes=100)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="adapter_model.bin is damaged"):
        read(tmp_path, scaling=1.0)


def lycoris_file(path, layers, names=("lora_down1.weight", "lora_up1.weight", "lora_down2.weight", "lora_up2.weight"), alpha=4.0):
    state = {f"{name}.{key}": factor for name, value in layers.items() for key, factor in zip(names, factors_of(value))}
    save_file(state | {f"{name}.alpha": torch.tensor(alpha) for name in layers if alpha is not None}, path)
    return path


@pytest.mark.parametrize("scaling, expected", [("paper", 4.0**2 / 6**0.5), ("official", 4.0), (0.3, 0.3)])
def test_lycoris_fork(scaling, expected, tmp_path):
    path = lycoris_file(tmp_path / "fork.safetensors", {"unet.mid.to_q": layer()})
    adapter = read(path, scaling=scaling)
    assert adapter.source == "lycoris"
    assert_same(adapter, Adapter({"unet.mid.to_q": LayerFactors(*factors_of(layer()), expected)}))
    with pytest.raises(ValueError, match="does not say how s follows from alpha.*'paper'.*'official'.*'peft'.*number"):
        read(path)


class Flat(nn.Module):
    def __init__(self, *names):
        super().__init__()
        for name in names:
            parent, _, leaf = name.rpartition(".")
            if parent and not hasattr(self, parent):
                self.add_module(parent, nn.Module())
            self.get_submodule(parent).add_module(leaf, nn.Linear(5, 6))


def test_lycoris_flattened_names(tmp_path):
    path = lycoris_file(tmp_path / "flat.safetensors", {"lora_unet_mid_to_q": layer(), "lora_unet_mid_to_k": layer(seed=1)})
    with pytest.raises(ValueError, match="'lora_unet_mid_to_k' is a flattened name.*give model="):
        read(path, scaling=1.0)
    adapter = read(path, scaling=1.0, model=Flat("mid.to_q", "mid.to_k"))
    assert_same(adapter, Adapter({"mid.to_q": layer(scale=1.0), "mid.to_k": layer(scale=1.0, seed=1)}))
    with pytest.raises(ValueError, match="must stand for one layer of the model, it fits 'mid.to_q', 'mid_to.q'"):
        read(path, scaling=1.0, model=Flat("mid.to_q", "mid_to.q", "mid.to_k"))
    with pytest.raises(ValueError, match="'lora_unet_mid_to_k' must stand for one layer of the model, it fits nothing"):
        read(path, scaling=1.0, model=Flat("mid.to_q"))


def test_lycoris_loha(tmp_path):
    square = layer(r1=2, r2=2)
    keys = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a")
    adapter = read(lycoris_file(tmp_path / "loha.safetensors", {"unet.q": square}, keys))
    assert adapter.source == "lycoris"
    assert_same(adapter, Adapter({"unet.q": LayerFactors(*factors_of(square), 2.0)}))  # α/r
    path = lycoris_file(tmp_path / "none.safetensors", {"unet.q": square}, keys, alpha=None)
    with pytest.raises(ValueError, match="layer 'unet.q' must have an alpha of one number, got None"):
        read(path)
    assert read(path, scaling=0.5).layers["unet.q"].scale == 0.5
    path = lycoris_file(tmp_path / "two.safetensors", {"unet.q": square}, keys, alpha=[1.0, 2.0])
    with pytest.raises(ValueError, match="layer 'unet.q' must have an alpha of one number"):
        read(path)


def test_peft_abba_folder(tmp_path):
    config = AbbaConfig(r=5, alpha=3.0, rank_pattern={"up_proj": [1, 4]}, alpha_pattern={r".*\.1\..*": 2.0})
    names = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj")
    layers = {name: layer(6, 5, *config.ranks(name), config.scale(name)) for name in names}
    save_file({f"base_model.model.{name}.{key}": factor for name, value in layers.items()
               for key, factor in zip(FACTORS, factors_of(value))}, tmp_path / WEIGHTS_NAME)
    fields = {key: config.to_dict()[key] for key in ("r", "r1", "r2", "alpha", "scaling", "rank_pattern", "alpha_pattern")}
    (tmp_path / PEFT_CONFIG_NAME).write_text(json.dumps({"peft_type": "ABBA", "base_model_name_or_path": "org/m"} | fields))
    adapter = read(tmp_path)
    assert (adapter.source, adapter.base_model) == ("peft", "org/m")
    assert_same(adapter, Adapter(layers))
    write(adapter, tmp_path / "again", "peft")
    assert_same(read(tmp_path / "again"), adapter)
    fields["rank_pattern"] = {}
    (tmp_path / PEFT_CONFIG_NAME).write_text(json.dumps({"peft_type": "ABBA"} | fields))
    with pytest.raises(ValueError, match=r"mlp.up_proj' has factors of ranks \(1, 4\), and \(3, 2\) by its config"):
        read(tmp_path)


@pytest.mark.parametrize("target, saved", [("embed_tokens", "auto"), ("lm_head", "auto"), ("q_proj", True)])
def test_embedding_layers_that_peft_saved_are_explained(target, saved, tmp_path):
    from abba_ext.peft import AbbaPeftConfig

    model = peft.get_peft_model(architectures.build("llama"), AbbaPeftConfig(r=4, target_modules=["k_proj", target]))
    model.save_pretrained(tmp_path / "whole", save_embedding_layers=saved)
    with pytest.raises(ValueError, match=r"weight'.*: PEFT saved embedding layers .*=False.*\(merge_and_unload\)"):
        read(tmp_path / "whole")
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert any(name.endswith(target) for name in read(tmp_path / "adapter").layers)


@pytest.mark.parametrize("to", ["peft", "loha", "lora"])
def test_the_task_type_is_kept(to, tmp_path):
    write(Adapter({"q": layer()}), tmp_path / "peft", "peft", task_type="CAUSAL_LM")
    assert read(tmp_path / "peft").task_type == "CAUSAL_LM"
    convert_adapter(tmp_path / "peft", tmp_path / "new", to)
    assert config_of(tmp_path / "new")["task_type"] == "CAUSAL_LM"
    convert_adapter(tmp_path / "peft", tmp_path / "other", to, task_type="SEQ_CLS")
    assert config_of(tmp_path / "other")["task_type"] == "SEQ_CLS"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), to=st.sampled_from(formats.WRITE_FORMATS))
def test_round_trips(data, to, tmp_path_factory):
    sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4),
                      st.floats(-8, 8, width=32), st.sampled_from([torch.float32, torch.float64]))
    names = data.draw(st.lists(st.sampled_from(["q", "a.q", "b.a.q", "a.0.k-x", "a.10.k-x", "aXq"]), min_size=1, unique=True))
    adapter = Adapter({name: layer(*data.draw(sizes), seed=index) for index, name in enumerate(names)}, "org/base")
    folder = tmp_path_factory.mktemp("round") / "trip"
    write(adapter, folder, to, **({"dtype": "float64"} if to == "lora" else {}))
    if to == "lora":
        state = load_file(folder / WEIGHTS_NAME)
        deltas = {name: state[f"base_model.model.{name}.lora_B.weight"] @ state[f"base_model.model.{name}.lora_A.weight"]
                  for name in names}
    else:
        again = read(folder)
        assert (again.base_model, again.source) == ("org/base", to)
        if to != "loha":
            assert_same(again, adapter)
        assert {name: again.config.ranks(name) for name in names} == {name: again.layers[name].ranks for name in names}
        assert {name: again.config.scale(name) for name in names} == {name: again.layers[name].scale for name in names}
        deltas = {name: delta_of(value) for name, value in again.layers.items()}
    for name, value in adapter.layers.items():
        torch.testing.assert_close(deltas[name], delta_of(value), rtol=1e-12, atol=1e-12)


def test_peft_abba_of_peft_itself(tmp_path):
    from abba_ext.peft import AbbaPeftConfig

    config = AbbaPeftConfig(r=6, alpha=2.0, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 3}, init_weights=False)
    model = randomize(peft.get_peft_model(architectures.build("llama"), config)).eval()
    model.save_pretrained(tmp_path / "peft")
    adapter = read(tmp_path / "peft")
    assert {value.ranks for value in adapter.layers.values()} == {(3, 3), (2, 1)}
    truth = dense_logits("llama", adapter.layers)
    assert_close_to_truth(logits(model, "llama"), truth, 1e-6)
    convert_adapter(tmp_path / "peft", tmp_path / "again", "peft")
    again = peft.PeftModel.from_pretrained(architectures.build("llama").eval(), tmp_path / "again")
    assert_close_to_truth(logits(again.eval(), "llama"), truth, 1e-6)


def test_biases_that_peft_trained_are_read(tmp_path):
    from abba_ext.peft import AbbaPeftConfig

    config = AbbaPeftConfig(r=4, target_modules=["q_proj", "fc1"], bias="abba_only", init_weights=False)
    model = randomize(peft.get_peft_model(architectures.build("opt"), config)).eval()
    model.save_pretrained(tmp_path / "peft")
    adapter = read(tmp_path / "peft")
    assert adapter.trained.keys() == {f"{name}.bias" for name in adapter.layers} and adapter.tied == {}
    assert_close_to_truth(logits(model, "opt"), dense_logits("opt", adapter.layers, adapter.trained), 1e-6)


PATTERNS = [("alpha_pattern", r"self_attn\..*", 3.0), ("alpha_pattern", "(q|up)_proj", 3.0), ("alpha_pattern", "j", 3.0),
            ("rank_pattern", "(q|k)_proj", 8), ("rank_pattern", r"mlp\..*", [1, 4]), ("rank_pattern", r"^model\..*q_proj", 8)]


@pytest.mark.parametrize("key, pattern, value", PATTERNS, ids=str)
def test_patterns_fit_as_they_do_in_peft(key, pattern, value, tmp_path):
    from abba_ext.peft import AbbaPeftConfig

    config = AbbaPeftConfig(r=4, alpha=2.0, target_modules=["q_proj", "k_proj", "up_proj"], init_weights=False,
                            **{key: {pattern: value}})
    model = randomize(peft.get_peft_model(architectures.build("llama"), config)).eval()
    model.save_pretrained(tmp_path / "peft")
    adapter = read(tmp_path / "peft")
    assert len({(value.ranks, value.scale) for value in adapter.layers.values()}) == (1 if pattern == "j" else 2)
    assert_close_to_truth(logits(model, "llama"), dense_logits("llama", adapter.layers), 1e-6)


def test_a_model_tells_the_kinds(tmp_path):
    saved("llama", tmp_path / "abba", AbbaConfig(r=4, init="random", target_modules=["embed_tokens", "q_proj"]))
    base = architectures.build("llama")
    kinds = {name: value.kind for name, value in read(tmp_path / "abba", model=base).layers.items()}
    assert kinds.pop("model.embed_tokens") == "Embedding" and set(kinds.values()) == {"linear"} and len(kinds) == 2
    with pytest.raises(ValueError, match="'model.embed_tokens' is of kind 'Embedding'; 'lora' is written of linear layers alone"):
        convert_adapter(tmp_path / "abba", tmp_path / "lora", "lora", model=base)
    with pytest.raises(ValueError, match="the model has no layer 'model.embed_tokens'; "):
        read(tmp_path / "abba", model=architectures.build("gpt2"))
    base.model.embed_tokens = nn.Embedding(60, 32)
    with pytest.raises(ValueError, match=r"'model.embed_tokens' has a weight \[60, 32\], but factors of a weight \[64, 32\]"):
        read(tmp_path / "abba", model=base)


@pytest.mark.parametrize("name", ["model.embed_tokens", "h.wte", "bert.word_embeddings", "shared"])
def test_names_of_embeddings_are_no_linear_layers(name, tmp_path):
    write(Adapter({name: layer(), "model.embed_out": layer()}), tmp_path / "peft", "peft")
    kinds = {key: value.kind for key, value in read(tmp_path / "peft").layers.items()}
    assert kinds == {name: "Embedding", "model.embed_out": "linear"}
    for to in ("lora", "loha"):
        with pytest.raises(ValueError, match=f"layer '{name}' is of kind 'Embedding'; '{to}' is .* linear layers alone.*--base"):
            convert_adapter(tmp_path / "peft", tmp_path / "new", to)
    convert_adapter(tmp_path / "peft", tmp_path / "lora", "lora", model=Flat(name, "model.embed_out"))


def test_convolutions_are_no_linear_layers_where_the_model_is_known(tmp_path):
    write(Adapter({"conv": layer(), "linear": layer()}), tmp_path / "peft", "peft")
    model = Flat("linear")
    model.conv = nn.Conv2d(5, 6, 1)
    with pytest.raises(ValueError, match="layer 'conv' is of kind 'Conv2d'; 'lora' is written of linear layers alone"):
        convert_adapter(tmp_path / "peft", tmp_path / "lora", "lora", model=model)


def test_own_config_is_kept(tmp_path):
    saved("llama", tmp_path / "abba")
    convert_adapter(tmp_path / "abba", tmp_path / "again", "abba")
    assert read(tmp_path / "again").config == read(tmp_path / "abba").config
    assert (tmp_path / "again" / CONFIG_NAME).read_text() == (tmp_path / "abba" / CONFIG_NAME).read_text()


# --- refusals ---


def test_stacked_experts_are_refused_by_that_name(tmp_path):
    model = patch_experts()
    abba_ext.save_adapter(model, tmp_path / "own")
    state = {f"base_model.model.mlp.experts.{key}": torch.ones(4, 2, 5) for key in FACTORS}
    (tmp_path / "peft").mkdir()
    save_file(state, tmp_path / "peft" / WEIGHTS_NAME)
    (tmp_path / "peft" / PEFT_CONFIG_NAME).write_text(json.dumps(good_peft()[1]))
    for folder in ("own", "peft"):
        with pytest.raises(ValueError, match="layer '.*experts.*' adapts stacked experts, a parameter of several matrices"):
            read(tmp_path / folder)


def patch_experts():
    """A module of stacked experts, patched."""
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.gate_up_proj = nn.Parameter(torch.randn(4, 6, 5))
    return abba_ext.patch_model(model, AbbaConfig(r=4, target_modules=[], target_parameters=["experts.gate_up_proj"]))


def good_peft():
    state = {f"base_model.model.a.q.{key}": factor for key, factor in zip(FACTORS, factors_of(layer()))}
    return state, {"peft_type": "ABBA", "r1": 2, "r2": 3, "alpha": 1.0, "scaling": "official"}


A1, B1 = "base_model.model.a.q.abba_A1", "base_model.model.a.q.abba_B1"
DAMAGES = {
    "missing factor": (lambda s, c: s.pop(A1), "layer 'a.q' lacks abba_A1"),
    "unknown keys": (lambda s, c: s.update({f"x{i}": torch.ones(1) for i in range(7)}), "keys 'x0'.*'x4' and 2 more"),
    "integers": (lambda s, c: s.update({A1: torch.ones(2, 5, dtype=torch.int32)}), r"must be a matrix of float32.*torch.int32"),
    "float8": (lambda s, c: s.update({A1: torch.ones(2, 5).to(torch.float8_e4m3fn)}), "a1 must be a matrix of float32.*float8"),
    "no matrix": (lambda s, c: s.update({A1: torch.ones(2, 5, 1)}), r"layer 'a.q': a1 must be a matrix.*got \[2, 5, 1\]"),
    "ranks differ": (lambda s, c: s.update({A1: torch.ones(3, 5)}), r"layer 'a.q': b1 must be \[6, 3\]"),
    "features differ": (lambda s, c: s.update({A1: torch.ones(2, 4)}), r"layer 'a.q': a2 must be \[3, 4\]"),
    "no rank": (lambda s, c: s.update({A1: torch.ones(0, 5), B1: torch.ones(6, 0)}), "ranks must be in 1 to 4096"),
    "rank too high": (lambda s, c: s.update({A1: torch.ones(4097, 5), B1: torch.ones(6, 4097)}), "got r1=4097, r2=3"),
    "NaN": (lambda s, c: s[A1].fill_(float("nan")), "layer 'a.q': a1 must be finite"),
    "infinity": (lambda s, c: s[A1].view(-1)[3:4].fill_(float("inf")), "layer 'a.q': a1 must be finite"),
    "two of one": (lambda s, c: s.update({"a.q.abba_A1": torch.ones(2, 5)}), "layer 'a.q' has two abba_A1"),
    "path": (lambda s, c: s.update({k.replace("a.q", "a/q"): s.pop(k) for k in list(s)}), "'a/q' is no module"),
    "parent": (lambda s, c: s.update({k.replace("a.q", "a..q"): s.pop(k) for k in list(s)}), r"'a\.\.q' is no module"),
    "NUL": (lambda s, c: s.update({k.replace("a.q", "a\0q"): s.pop(k) for k in list(s)}), r"'a\\x00q' is no module"),
    "no scaling": (lambda s, c: c.pop("scaling"), "adapter_config.json lacks scaling"),
    "scaling": (lambda s, c: c.update(scaling="other"), "scaling must be one of 'paper'"),
    "infinite alpha": (lambda s, c: c.update(alpha=float("inf")), "alpha must be finite"),
    "alpha of words": (lambda s, c: c.update(alpha="one"), "alpha must be a number"),
    "pattern": (lambda s, c: c.update(rank_pattern={"(": 3}), "is not a regular expression"),
    "pattern is no object": (lambda s, c: c.update(alpha_pattern=[1]), "alpha_pattern must be a JSON object"),
    "base model": (lambda s, c: c.update(base_model_name_or_path=[1]), "base_model_name_or_path must be a string"),
    "task type": (lambda s, c: c.update(task_type=[1]), "task_type must be a string"),
    "modules_to_save": (lambda s, c: c.update(modules_to_save="x"), "modules_to_save must be a list"),
    "another type": (lambda s, c: c.update(peft_type="LOHA"), "cannot tell the format.*'peft', and peft_type is 'LOHA'"),
    "type is a list": (lambda s, c: c.update(peft_type=[]), "unhashable"),
    "two formats": (lambda s, c: s.update({"q.lora_A1": torch.ones(1)}), "cannot tell the format.*'authors', 'peft'"),
    "no format": (lambda s, c: (s.clear(), s.update(x=torch.ones(1))), "cannot tell the format.*'x', of format nothing"),
    "plain LoRA": (lambda s, c: (s.clear(), s.update({"q.lora_A.weight": torch.ones(1)})), "a plain LoRA is no ABBA adapter"),
}


@pytest.mark.parametrize("change, message", DAMAGES.values(), ids=DAMAGES)
def test_damaged_adapters_are_refused(change, message, tmp_path):
    state, config = good_peft()
    change(state, config)
    save_file(state, tmp_path / WEIGHTS_NAME)
    (tmp_path / PEFT_CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="adapter_model.safetensors: .*" + message):
        read(tmp_path)


def test_the_undamaged_adapter_is_read(tmp_path):
    state, config = good_peft()
    save_file(state, tmp_path / WEIGHTS_NAME)
    (tmp_path / PEFT_CONFIG_NAME).write_text(json.dumps(config))
    assert_same(read(tmp_path), Adapter({"a.q": layer(scale=1.0)}))
    with pytest.raises(ValueError, match="scaling must be left out for format 'peft'"):
        read(tmp_path, scaling=2.0)
    (tmp_path / PEFT_CONFIG_NAME).write_text('{"r": 2, "alpha": 1}')
    with pytest.raises(ValueError, match="there is no layer with keys hada_w1_b.*, but 'base_model.model.a.q.abba_A1'"):
        read(tmp_path, format="loha")


LOHA_DAMAGES = {
    "no alpha": (lambda c: c.pop("alpha"), "adapter_config.json lacks alpha"),
    "rank": (lambda c: c.update(r=3), r"has factors of ranks \(2, 2\), and \(3, 3\) by its config"),
    "rank of words": (lambda c: c.update(r="two"), "r1 must be an int"),
    "pattern is no object": (lambda c: c.update(rank_pattern=[1]), "rank_pattern must be a JSON object"),
    "pattern": (lambda c: c.update(alpha_pattern={"(": 3}), "adapter_model.safetensors: .*unterminated"),
}


@pytest.mark.parametrize("change, message", LOHA_DAMAGES.values(), ids=LOHA_DAMAGES)
def test_damaged_loha_is_refused(change, message, tmp_path):
    write(Adapter({"a.q": layer(r1=2, r2=2)}), tmp_path / "loha", "loha")
    config = config_of(tmp_path / "loha")
    change(config)
    (tmp_path / "loha" / PEFT_CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "loha")


@pytest.mark.parametrize("content, message", [
    pytest.param(b"{", "is no JSON", id="cut"),
    pytest.param(b"\xff\xfe", "is no JSON", id="bytes"),
    pytest.param(b"[" * 200_000, "is no JSON", id="deep"),
    pytest.param(b"[1]", "must hold a JSON object, got list", id="list"),
    pytest.param(b" " * (10 * 2**20 + 1), "a config has at most 10,485,760", id="large"),
])
def test_damaged_configs_are_refused(content, message, tmp_path):
    save_file(good_peft()[0], tmp_path / WEIGHTS_NAME)
    (tmp_path / PEFT_CONFIG_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / PEFT_CONFIG_NAME)) + ".*" + message):
        read(tmp_path)


def test_own_adapters_are_checked_too(tmp_path):
    saved("llama", tmp_path)
    path = tmp_path / WEIGHTS_NAME
    key = "model.layers.0.self_attn.q_proj.abba_A1"
    description, whole = abba_ext.checkpoint.read_adapter(tmp_path)
    for change, message in ((lambda s, d: s.pop(key), f"missing keys '{key}'"),
                            (lambda s, d: s.update(x=torch.ones(1)), "unknown keys 'x'"),
                            (lambda s, d: s[key].fill_(float("nan")), "q_proj': a1 must be finite"),
                            (lambda s, d: d["layers"][key[:-8]].update(r1=3), r"ranks \(4, 1\), and \(3, 1\) by its config"),
                            (lambda s, d: d["config"].update(rank=3), "unknown AbbaConfig fields")):
        state, changed = {name: tensor.clone() for name, tensor in whole.items()}, json.loads(json.dumps(description))
        change(state, changed)
        abba_ext.checkpoint.write_adapter(tmp_path, state, changed)
        with pytest.raises(ValueError, match="adapter_model.safetensors: .*" + message):
            read(tmp_path)
    path.rename(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors: .*must be named adapter_model.safetensors"):
        read(tmp_path / "other.safetensors")


def test_files_that_are_not_there_or_not_meant(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter in .*neither adapter_model.safetensors nor adapter_model.bin"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="no adapter in"):
        read(tmp_path / "nowhere")
    (tmp_path / "weights.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="weights.gguf: a weights file must end in .safetensors or .bin"):
        read(tmp_path / "weights.gguf")
    (tmp_path / WEIGHTS_NAME).write_bytes(b"\xff" * 50)
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged or is no safetensors file"):
        read(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="holds both adapter_model.safetensors and adapter_model.bin"):
        read(tmp_path)
    with pytest.raises(ValueError, match="format must be 'auto' or one of 'abba'.*got 'lora'"):
        read(tmp_path, format="lora")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        read(tmp_path, model="org/base")
    with pytest.raises(ValueError, match="to must be one of 'abba', 'peft', 'loha', 'lora', got 'gguf'"):
        convert_adapter(tmp_path, tmp_path / "new", "gguf")


def test_wrong_arguments_of_write(tmp_path):
    adapter = Adapter({"q": layer()})
    for arguments, message in ((dict(format="gguf"), "format must be one of 'abba'"),
                               (dict(format="abba", rank=3), "are options of format 'lora', got format 'abba'"),
                               (dict(format="loha", pad=False), "options of format 'lora'"),
                               (dict(format="abba", task_type="CAUSAL_LM"), "option of PEFT's formats, got format 'abba'"),
                               (dict(format="lora", rank=0), "rank must be a positive int, got 0"),
                               (dict(format="lora", rank=True), "rank must be a positive int, got True"),
                               (dict(format="lora", dtype=torch.int8), "dtype must be one of float32.*torch.int8"),
                               (dict(format="lora", task_type="NONE"), "task type")):
        with pytest.raises(ValueError, match=message):
            write(adapter, tmp_path / "new", **arguments)
    with pytest.raises(TypeError, match="adapter must be an Adapter, got dict"):
        write({}, tmp_path / "new")
    with pytest.raises(ValueError, match="layers must hold at least one layer"):
        Adapter({})
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        layer(scale=float("nan"))
    with pytest.raises(ValueError, match="'head.gain' is trained in full without its whole module"):
        trained = {"head.weight": torch.ones(2, 2), "head.gain": torch.ones(2)}
        write(Adapter({"q": layer()}, trained=trained), tmp_path / "new", "peft")
    embedding = LayerFactors(*factors_of(layer()), 1.0, "embedding")
    for to in ("lora", "loha"):
        with pytest.raises(ValueError, match=f"layer 'wte' is of kind 'embedding'; '{to}' is written of linear layers alone"):
            write(Adapter({"wte": embedding}), tmp_path / "new", to)
    assert list(tmp_path.iterdir()) == []


def test_kinds_are_kept(tmp_path):
    write(Adapter({"wte": LayerFactors(*factors_of(layer()), 1.0, "embedding"), "q": layer()}), tmp_path / "own")
    assert {name: value.kind for name, value in read(tmp_path / "own").layers.items()} == {"wte": "embedding", "q": "linear"}


@pytest.mark.parametrize("to", formats.WRITE_FORMATS)
def test_nothing_is_overwritten_or_half_written(to, tmp_path, monkeypatch):
    adapter = Adapter({"q": layer()})
    (tmp_path / "empty").mkdir()
    write(adapter, tmp_path / "empty", to)
    config_name = CONFIG_NAME if to == "abba" else PEFT_CONFIG_NAME
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == [config_name, WEIGHTS_NAME]
    assert (tmp_path / "empty" / WEIGHTS_NAME).stat().st_mode & 0o777 == (tmp_path / "empty" / config_name).stat().st_mode & 0o777
    before = (tmp_path / "empty" / WEIGHTS_NAME).read_bytes()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for taken in ("empty", "file", "link"):
        with pytest.raises(FileExistsError, match="directory must be new or an empty folder"):
            write(adapter, tmp_path / taken, to)
    assert (tmp_path / "empty" / WEIGHTS_NAME).read_bytes() == before
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write(adapter, tmp_path / "full", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "link"]


def test_peft_is_needed_for_its_configs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"writing 'lora' needs PEFT: pip install 'abba_ext\[peft\]'"):
        write(Adapter({"q": layer()}), tmp_path / "lora", "lora")
    assert list(tmp_path.iterdir()) == []
