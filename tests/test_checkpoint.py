"""Adapter files: bit-equal reload, strictness, atomic replacement."""
import json
import os
import shutil
import warnings

import architectures
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import abba_ext
from abba_ext import AbbaConfig
from abba_ext.checkpoint import CONFIG_NAME, WEIGHTS_NAME, write_adapter


def tiny(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.ModuleDict({"q": nn.Linear(6, 8), "k": nn.Linear(8, 4)}).to(dtype)


def run(model, x):
    return model["k"](model["q"](x))


@pytest.fixture
def saved(tmp_path):
    model = abba_ext.patch_model(tiny(), AbbaConfig(r1=2, r2=3, rank_pattern={"k": 8}, bias="abba_only", scaling="official", alpha=0.3))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    abba_ext.save_adapter(model, tmp_path / "a")
    return model, tmp_path / "a"


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}, [
        type(module) for module in model.modules()], [p.requires_grad for p in model.parameters()]


def assert_unchanged(model, before):
    now = snapshot(model)
    assert now[1:] == before[1:] and now[0].keys() == before[0].keys()
    assert all(torch.equal(value, before[0][key]) for key, value in now[0].items())


def test_reload_is_bit_equal(saved):
    model, folder = saved
    x = torch.randn(5, 6)
    expected = run(model, x)
    fresh = abba_ext.load_adapter(tiny(), folder)
    assert torch.equal(run(fresh, x), expected)
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {n for n, p in model.named_parameters() if p.requires_grad}
    again = abba_ext.patch_model(tiny(), AbbaConfig(r1=2, r2=3, rank_pattern={"k": 8}, bias="abba_only", alpha=9.0))
    assert torch.equal(run(abba_ext.load_adapter(again, folder), x), expected)  # the file's scale, not the config's
    abba_ext.unpatch_model(fresh)
    assert torch.equal(run(fresh, x), run(tiny(), x))


def test_file_says_what_it_holds(saved):
    model, folder = saved
    with open(folder / CONFIG_NAME, encoding="utf-8") as file:
        description = json.load(file)
    assert (description["format"], description["format_version"]) == ("abba_ext", 1)
    assert description["layers"] == {"q": {"r1": 2, "r2": 3, "scale": 0.3}, "k": {"r1": 4, "r2": 4, "scale": 0.3}}
    assert description["config"]["scaling"] == "official" and description["trained_base_parameters"] == ["q.bias", "k.bias"]
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        assert json.loads(file.metadata()["abba_ext"]) == description
        assert set(file.keys()) == {f"{m}.{p}" for m in "qk" for p in ("abba_A1", "abba_B1", "abba_A2", "abba_B2", "bias")}
    assert sorted(os.listdir(folder)) == [CONFIG_NAME, WEIGHTS_NAME]  # nothing temporary is left


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_files_have_the_permissions_that_others_have(umask, tmp_path):
    before = os.umask(umask)
    try:
        abba_ext.save_adapter(abba_ext.patch_model(tiny(), AbbaConfig(r=4)), tmp_path)
        assert os.umask(umask) == umask  # as it was
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_base_model_name(tmp_path):
    model = architectures.build("llama")
    model.config._name_or_path = "org/tiny-llama"
    abba_ext.save_adapter(abba_ext.patch_model(model), tmp_path)
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["base_model_name_or_path"] == "org/tiny-llama"
    other = architectures.build("llama")
    other.config._name_or_path = "org/other"
    with pytest.warns(UserWarning, match="trained on 'org/tiny-llama' and is loaded into 'org/other'"):
        abba_ext.load_adapter(other, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype, tmp_path):
    model = abba_ext.patch_model(tiny(dtype), AbbaConfig(r=4, adapter_dtype=dtype))
    model["q"].abba_B2.data.normal_()
    abba_ext.save_adapter(model, tmp_path)
    x = torch.randn(3, 6, dtype=dtype)
    fresh = abba_ext.load_adapter(tiny(dtype), tmp_path)
    assert fresh["q"].abba_A1.dtype == dtype and torch.equal(run(fresh, x), run(model, x))


def rewrite(folder, change_state=None, change_description=None):
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        description = json.loads(file.metadata()["abba_ext"])
    state = load_file(folder / WEIGHTS_NAME)
    if change_state:
        change_state(state)
    if change_description:
        change_description(description)
    write_adapter(folder, state, description)


DAMAGES = {
    "missing key": (lambda s: s.pop("q.abba_B2"), None, "missing key 'q.abba_B2'"),
    "unknown key": (lambda s: s.update({"q.abba_A3": torch.ones(2)}), None, "unknown key 'q.abba_A3'"),
    "shape": (lambda s: s.update({"q.abba_A1": torch.ones(2, 7)}), None, r"'q.abba_A1' must be \[2, 6\], got \[2, 7\]"),
    "integers": (lambda s: s.update({"q.bias": torch.ones(8, dtype=torch.int32)}), None, "'q.bias' must be floating point"),
    "no such layer": (None, lambda d: d["layers"].update({"v": {"r1": 1, "r2": 1, "scale": 1.0}}), "the model has no layer 'v'"),
    "no such parameter": (None, lambda d: d["trained_base_parameters"].append("norm"), "the model has no parameter 'norm'"),
    "version": (None, lambda d: d.update(format_version=99), "format version 99; this abba_ext reads up to 1: update abba_ext"),
    "config": (None, lambda d: d["config"].update(rank=3), r"unknown AbbaConfig fields \['rank'\]"),
    "rank": (None, lambda d: d["layers"]["q"].update(r1="two"), "no adapter of abba_ext"),
    "format": (None, lambda d: d.update(format="lora"), "no adapter of abba_ext"),
    "no layers": (None, lambda d: d.pop("layers"), "no adapter of abba_ext.*'layers'"),
}


def test_what_is_not_saved_is_named(tmp_path):
    model = abba_ext.patch_model(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)), AbbaConfig(r=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        abba_ext.save_adapter(model, tmp_path)
    model[1].weight.requires_grad_(True)
    with pytest.warns(UserWarning, match="1 trainable parameters are no part of the adapter and are not saved with it: '1.weight'"):
        abba_ext.save_adapter(model, tmp_path)
    model[1].weight.requires_grad_(False)
    model[0].abba_B2.data.fill_(1.0)
    with pytest.warns(UserWarning, match="ΔW of 1 layers is still 0: '2', ... took no part in training"):
        abba_ext.save_adapter(model, tmp_path)
    model[2] = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match="1 layers are not saved, as they are no ABBA layers any more: '2'"):
        abba_ext.save_adapter(model, tmp_path)


def test_the_config_is_that_of_the_values(saved, tmp_path):
    _, folder = saved
    model = abba_ext.patch_model(tiny(), AbbaConfig(r1=2, r2=3, rank_pattern={"k": 8}, bias="abba_only", alpha=9.0, dropout=0.5))
    abba_ext.save_adapter(abba_ext.load_adapter(model, folder), tmp_path / "again")
    (own, _), (file, _) = (abba_ext.checkpoint.read_adapter(path) for path in (tmp_path / "again", folder))
    assert own["layers"] == file["layers"] and own["config"] == {**file["config"], "dropout": 0.5}


def test_the_folder_is_none_of_peft(tmp_path):
    """transformers would take a folder that holds an adapter_config.json for an adapter of PEFT, and fail."""
    model = abba_ext.patch_model(architectures.build("llama"), AbbaConfig(r=4))
    model.save_pretrained(tmp_path)
    abba_ext.save_adapter(model, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = architectures.inputs("llama")
    assert torch.equal(abba_ext.load_adapter(plain, tmp_path).eval()(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("change_state, change_description, message", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("patched", [False, True])
def test_what_does_not_fit_is_refused(saved, change_state, change_description, message, patched):
    model, folder = saved
    rewrite(folder, change_state, change_description)
    target = model if patched else tiny()
    before = snapshot(target)
    with pytest.raises(ValueError, match=message):
        abba_ext.load_adapter(target, folder)
    assert_unchanged(target, before)


def test_other_models_are_refused(saved):
    _, folder = saved
    for target, message in (
        (nn.ModuleDict({"q": nn.Linear(6, 8)}), "the model has no layer 'k'"),
        (nn.ModuleDict({"q": nn.Linear(6, 9), "k": nn.Linear(9, 4)}), r"'q.abba_B1' must be \[9, 2\], got \[8, 2\]"),
        (nn.ModuleDict({"q": nn.LayerNorm(6), "k": nn.Linear(8, 4)}), "'q' is a LayerNorm"),
        (abba_ext.patch_model(tiny(), AbbaConfig(r=4, bias="abba_only")), r"'q' has ranks \(2, 2\) in the model, \(2, 3\) in the file"),
        (abba_ext.patch_model(tiny(), AbbaConfig(target_modules=["q"])), "the file adapts 'k', the model does not"),
        (abba_ext.patch_model(tiny(), AbbaConfig(r1=2, r2=3, rank_pattern={"k": 8})),
         r"the file trains the base parameters \['k.bias', 'q.bias'\], the model \[\]"),
    ):
        before = snapshot(target)
        with pytest.raises(ValueError, match=message):
            abba_ext.load_adapter(target, folder)
        assert_unchanged(target, before)


def test_merged_model_refuses_to_load(saved):
    model, folder = saved
    abba_ext.merge(model)
    with pytest.raises(ValueError, match="'k' is merged; unmerge it first"):
        abba_ext.load_adapter(model, folder)


def test_broken_and_foreign_files(saved, tmp_path):
    _, folder = saved
    with pytest.raises(FileNotFoundError, match="no adapter in .*adapter_model.safetensors is missing"):
        abba_ext.load_adapter(tiny(), tmp_path / "nowhere")
    path = folder / WEIGHTS_NAME
    with pytest.raises(NotADirectoryError, match="directory must be a folder, but .*adapter_model.safetensors' is a file"):
        abba_ext.load_adapter(tiny(), path)
    whole = path.read_bytes()
    for broken in (b"", whole[:5], whole[: len(whole) // 2], whole[:-1], b"\xff" * 100):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="damaged or is no safetensors file"):
            abba_ext.load_adapter(tiny(), folder)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"no adapter of abba_ext; .*\(abba-ext convert\) reads other formats"):
        abba_ext.load_adapter(tiny(), folder)


def test_save_into_a_file_or_unpatched(saved, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="directory must be a folder"):
        abba_ext.save_adapter(saved[0], tmp_path / "file")
    with pytest.raises(ValueError, match="model is not patched"):
        abba_ext.save_adapter(tiny(), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_failed_save_keeps_the_old_file(saved, tmp_path, monkeypatch):
    model, folder = saved
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with torch.no_grad():
        model["q"].abba_A1.add_(1)
    with pytest.raises(OSError, match="No space left"):
        abba_ext.save_adapter(model, folder)
    assert sorted(os.listdir(folder)) == [CONFIG_NAME, WEIGHTS_NAME]
    assert all((folder / name).read_bytes() == (tmp_path / "copy" / name).read_bytes() for name in os.listdir(folder))
