"""The command line, run as a user runs it."""
import builtins
import json
import math
import subprocess
import sys

import architectures
import pytest
import torch
from safetensors.torch import load_file, save_file

import abba_ext
from abba_ext import AbbaConfig, formats, inspection
from abba_ext.__main__ import main


@pytest.fixture
def saved(tmp_path):
    """Folders of a tiny BERT and of an adapter on it, with a trained head."""
    model = architectures.build("bert")
    model.save_pretrained(tmp_path / "base")
    model.config._name_or_path = "org/base"
    abba_ext.patch_model(model, AbbaConfig(r1=3, r2=5, init="random", rank_pattern={"key": (2, 4)}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    abba_ext.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def error_line(capsys):
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[transformers]")]
    return line


# --- info ---


def test_info_prints_versions_build_and_paths(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in (abba_ext.__version__, "built with torch", "flags", "-O3", "CUDA architectures", "threads", "khatri_rao",
                 "dense"):
        assert word in out


def test_info_for_one_shape_as_a_command(tmp_path):
    command = [sys.executable, "-m", "abba_ext", "info", "--shape", "64", "768", "3072", "--ranks", "8", "24", "--dtype",
               "bfloat16"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert "T=64 n=768 m=3072 r1=8 r2=24 bfloat16 cpu: khatri_rao, cpu (half-precision activations)" in out


# --- merge ---


def test_merge_prints_the_folder_and_warns_of_another_name(saved, tmp_path, capsys):
    base, adapter = saved
    assert main(["merge", str(base), str(adapter), str(tmp_path / "org" / "merged"), "--safe"]) == 0
    output = capsys.readouterr()
    assert output.out == f"{tmp_path / 'org' / 'merged'}\n"
    assert "warning" not in output.err and not output.err.strip()  # no bar where there is no terminal
    assert load_file(tmp_path / "org" / "merged" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    base.rename(tmp_path / "other")
    assert main(["merge", str(tmp_path / "other"), str(adapter), str(tmp_path / "out"), "--quiet"]) == 0
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == f"abba-ext: warning: the adapter was trained on 'org/base' and is merged into '{tmp_path / 'other'}'\n"


def test_merge_says_what_it_needs(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["merge", *map(str, saved), str(tmp_path / "merged")]) == 2
    assert error_line(capsys) == "abba-ext: error: merging on disk needs tqdm: pip install 'abba_ext[cli]'"


# --- inspect ---

_KEYS = {"name": str, "r1": int, "r2": int, "scale": float, "parameters": int, "norm_A1": float, "norm_B1": float,
         "norm_A2": float, "norm_B2": float, "norm_update": float}


@pytest.mark.parametrize("with_base", [False, True])
def test_inspect_json_against_dense_norms_in_fp64(with_base, saved, capsys):
    base, adapter = saved
    assert main(["inspect", str(adapter), "--json", *(["--base", str(base)] if with_base else [])]) == 0
    report = json.loads(capsys.readouterr().out)
    keys = _KEYS | ({"norm_base": float, "ratio": float} if with_base else {})
    assert report.keys() == {"source", "base_model", "layers", "trained", "total"}
    assert (report["source"], report["base_model"]) == ("abba", "org/base")
    factors, weights = formats.read(adapter).layers, load_file(base / "model.safetensors")
    assert [layer["name"] for layer in report["layers"]] == list(factors) and len(factors) == 12
    updates, bases = 0.0, 0.0
    for layer in report["layers"]:
        assert {key: type(value) for key, value in layer.items()} == keys
        f = factors[layer["name"]]
        assert (layer["r1"], layer["r2"]) == ((2, 4) if layer["name"].endswith("key") else (3, 5)) and layer["scale"] == f.scale
        assert layer["parameters"] == sum(part.numel() for part in (f.a1, f.b1, f.a2, f.b2))
        for key, part in (("A1", f.a1), ("B1", f.b1), ("A2", f.a2), ("B2", f.b2)):
            assert math.isclose(layer[f"norm_{key}"], torch.linalg.norm(part.double()).item(), rel_tol=1e-12)
        delta = f.scale * (f.b1.double() @ f.a1.double()) * (f.b2.double() @ f.a2.double())
        assert math.isclose(layer["norm_update"], torch.linalg.norm(delta).item(), rel_tol=1e-12)
        updates += layer["norm_update"] ** 2
        if with_base:
            weight = weights[f"{layer['name']}.weight"].double()
            assert math.isclose(layer["norm_base"], torch.linalg.norm(weight).item(), rel_tol=1e-12)
            assert math.isclose(layer["ratio"], (torch.linalg.norm(delta) / torch.linalg.norm(weight)).item(), rel_tol=1e-12)
            bases += layer["norm_base"] ** 2
    assert report["trained"] == [{"name": "classifier.weight", "parameters": 64, "finite": True},
                                 {"name": "classifier.bias", "parameters": 2, "finite": True}]
    assert report["total"]["layers"] == 12
    assert report["total"]["parameters"] == 66 + sum(layer["parameters"] for layer in report["layers"])
    assert math.isclose(report["total"]["norm_update"], math.sqrt(updates), rel_tol=1e-12)
    if with_base:
        assert math.isclose(report["total"]["ratio"], math.sqrt(updates / bases), rel_tol=1e-12)


def test_norms_do_not_depend_on_the_blocks(saved, monkeypatch):
    whole = inspection.inspect_adapter(saved[1])
    monkeypatch.setattr("abba_ext.merging.BLOCK_BYTES", 1)
    monkeypatch.setattr("abba_ext.merging.MIN_ROWS", 5)
    for a, b in zip(whole["layers"], inspection.inspect_adapter(saved[1])["layers"], strict=True):
        assert math.isclose(a["norm_update"], b["norm_update"], rel_tol=1e-13)


def test_norm_of_conv1d_weights(tmp_path):
    model = architectures.build("gpt2")
    model.save_pretrained(tmp_path / "base")
    abba_ext.save_adapter(abba_ext.patch_model(model, AbbaConfig(r=4, init="random")), tmp_path / "adapter")
    report = inspection.inspect_adapter(tmp_path / "adapter", tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    for layer in report["layers"]:
        assert layer["norm_update"] == 0 == layer["ratio"]  # B2 = 0 at the start
        weight = weights[f"{layer['name']}.weight"].double()
        assert math.isclose(layer["norm_base"], torch.linalg.norm(weight).item(), rel_tol=1e-12)


@pytest.mark.parametrize("rich", [True, False])
def test_inspect_prints_a_table(rich, saved, capsys, monkeypatch):
    base, adapter = saved
    if not rich:
        load = builtins.__import__

        def without_rich(name, *args, **kwargs):
            if name.startswith("rich"):
                raise ImportError(name)
            return load(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without_rich)
    assert main(["inspect", str(adapter), "--base", str(base)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["layer", "r1", "r2", "s", "parameters", "‖A1‖", "‖B1‖", "‖A2‖", "‖B2‖", "‖ΔW‖", "‖W0‖", "‖ΔW‖/‖W0‖"]
    report = inspection.inspect_adapter(adapter, base)
    assert [line[0] for line in lines[1:]] == [layer["name"] for layer in report["layers"]] + [
        "classifier.weight", "classifier.bias", "total"]
    for line, layer in zip(lines[1:], report["layers"], strict=False):
        assert len(line) == 12 and [int(line[1]), int(line[2])] == [layer["r1"], layer["r2"]]
        assert math.isclose(float(line[-1]), layer["ratio"], rel_tol=1e-3)


def test_inspect_draws_a_picture(saved, tmp_path, capsys, monkeypatch):
    from matplotlib.axes import Axes
    from matplotlib.image import imread

    base, adapter = saved
    drawn = []
    show, bars = Axes.imshow, Axes.barh
    monkeypatch.setattr(Axes, "imshow", lambda self, grid, **kwargs: drawn.append(grid) or show(self, grid, **kwargs))
    monkeypatch.setattr(Axes, "barh", lambda self, names, values: drawn.append(values) or bars(self, names, values))
    assert main(["inspect", str(adapter), "--base", str(base), "--plot", str(tmp_path / "map.png")]) == 0
    pixels = imread(tmp_path / "map.png")
    assert pixels.shape[0] > 100 and pixels.std() > 0.05
    report = inspection.inspect_adapter(adapter, base)
    ratios = [layer["ratio"] for layer in report["layers"]]  # six layers of block 0, then those of block 1
    assert torch.allclose(torch.from_numpy(drawn[0]).t().flatten(), torch.tensor(ratios)) and drawn[0].shape == (6, 2)
    for layer, name in zip(report["layers"], "abcdefghijkl", strict=True):
        layer["name"] = name
    inspection.plot_adapter(report, tmp_path / "bars.png")
    assert drawn[1] == ratios and imread(tmp_path / "bars.png").std() > 0.05
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["bars.png", "map.png"]
    capsys.readouterr()
    assert main(["inspect", str(adapter), "--plot", str(tmp_path / "map.xyz")]) == 2
    assert error_line(capsys).startswith("abba-ext: error: Format 'xyz' is not supported")
    assert not (tmp_path / "map.xyz").exists()


def break_adapter(folder, key, value):
    """Rewrites one tensor of an adapter of PEFT's format, which carries no checksum."""
    state = load_file(folder / "adapter_model.safetensors")
    state[key].view(-1)[3] = value
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_inspect_reports_what_is_not_finite(value, saved, tmp_path, capsys):
    assert main(["convert", str(saved[1]), str(tmp_path / "peft"), "--to", "peft"]) == 0
    broken = tmp_path / "broken"
    (tmp_path / "peft").rename(broken)
    break_adapter(broken, "base_model.model.classifier.weight", value)
    capsys.readouterr()
    assert main(["inspect", str(broken)]) == 1
    assert error_line(capsys) == "abba-ext: error: classifier.weight holds NaN or infinity"
    break_adapter(broken, "base_model.model.bert.encoder.layer.0.attention.self.query.abba_A1.weight", value)
    assert main(["inspect", str(broken)]) == 2
    line = error_line(capsys)
    assert "query" in line and "a1 must be finite" in line


# --- convert ---


def test_convert_to_lora_and_back_to_a_report(saved, tmp_path, capsys):
    _, adapter = saved
    assert main(["convert", str(adapter), str(tmp_path / "lora"), "--to", "lora"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'lora'}: lora of rank 16, 12 layers, from abba\n"
    assert main(["convert", str(adapter), str(tmp_path / "small"), "--to", "lora", "--rank", "4", "--dtype", "bfloat16",
                 "--task-type", "SEQ_CLS"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path / 'small'}: lora of rank 8, 12 layers") and len(lines) == 12
    f = formats.read(adapter).layers[lines[0].split(":")[0]]
    sigma = torch.linalg.svdvals((f.b1.double() @ f.a1.double()) * (f.b2.double() @ f.a2.double()))
    assert math.isclose(float(lines[0].rsplit(" ", 1)[1]), (sigma[4:].norm() / sigma.norm()).item(), rel_tol=1e-2)
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    assert main(["convert", str(adapter), str(tmp_path / "own"), "--to", "abba", "--from", "abba", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"] == "abba"


def test_convert_passes_the_scaling_on(saved, tmp_path, capsys):
    layer = formats.read(saved[1]).layers["bert.encoder.layer.0.attention.self.query"]
    parts = {"lora_A1": layer.a1, "lora_B1": layer.b1, "lora_A2": layer.a2, "lora_B2": layer.b2}
    (tmp_path / "theirs").mkdir()
    torch.save({f"query.{key}.default": value for key, value in parts.items()}, tmp_path / "theirs" / "adapter_model.bin")
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps({"r1": 3, "r2": 5}))
    command = ["convert", str(tmp_path / "theirs"), str(tmp_path / "own"), "--to", "abba"]
    assert main(command) == 2
    assert "scaling" in error_line(capsys)
    assert main([*command, "--scaling", "2.5"]) == 0
    assert formats.read(tmp_path / "own").layers["query"].scale == 2.5


def test_a_base_tells_flattened_names_and_kinds(tmp_path, capsys):
    base = architectures.build("llama")
    base.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    state = {}
    for index in range(2):
        for key, shape in (("w1_a", (32, 4)), ("w1_b", (4, 32)), ("w2_a", (32, 4)), ("w2_b", (4, 32))):
            state[f"lycoris_model_layers_{index}_self_attn_q_proj.hada_{key}"] = torch.randn(shape, generator=generator)
        state[f"lycoris_model_layers_{index}_self_attn_q_proj.alpha"] = torch.tensor(2.0)
    save_file(state, tmp_path / "lycoris.safetensors")
    capsys.readouterr()
    source, known = str(tmp_path / "lycoris.safetensors"), ["--base", str(tmp_path / "base")]
    assert main(["convert", source, str(tmp_path / "own"), "--to", "abba"]) == 2
    assert "is a flattened name, of which only the model knows the dots; give model= (--base)" in error_line(capsys)
    assert main(["convert", source, str(tmp_path / "own"), "--to", "abba", *known]) == 0
    layers = formats.read(tmp_path / "own").layers
    assert list(layers) == [f"model.layers.{index}.self_attn.q_proj" for index in range(2)]
    capsys.readouterr()
    assert main(["inspect", source, "--json", *known]) == 0
    assert [layer["name"] for layer in json.loads(capsys.readouterr().out)["layers"]] == list(layers)
    assert main(["merge", str(tmp_path / "base"), source, str(tmp_path / "out"), "--quiet"]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, f in layers.items():
        delta = f.scale * (f.b1.double() @ f.a1.double()) * (f.b2.double() @ f.a2.double())
        weight = base.get_submodule(name).weight.double()
        torch.testing.assert_close(merged[f"{name}.weight"].double(), weight + delta, rtol=1e-6, atol=1e-6)


# --- errors ---


def test_bad_input_is_one_line_and_status_2(saved, tmp_path, capsys):
    base, adapter = saved
    for command, message in (
        (["inspect", str(tmp_path / "nowhere")], "no adapter in"),
        (["inspect", str(adapter), "--base", str(tmp_path)], "config.json is missing"),
        (["merge", str(base), str(tmp_path / "nowhere"), str(tmp_path / "out")], "no adapter in"),
        (["merge", str(base), str(adapter), str(base)], "must not be, lie in or contain"),
        (["convert", str(adapter), str(base), "--to", "abba"], "directory must be new or an empty folder"),
        (["convert", str(adapter), str(tmp_path / "out"), "--to", "loha", "--rank", "3"], "rank, pad and fan_in_fan_out"),
    ):
        assert main(command) == 2
        line = error_line(capsys)
        assert line.startswith("abba-ext: error: ") and message in line, line
    with pytest.raises(FileNotFoundError, match="no adapter in"):
        main(["--debug", "inspect", str(tmp_path / "nowhere")])


def test_errors_of_the_real_command(tmp_path):
    command = [sys.executable, "-m", "abba_ext", "inspect", "nowhere"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == "" and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("abba-ext: error: no adapter in 'nowhere'")


@pytest.mark.parametrize("argument, values, message", [
    ("--device", ["foo"], "must be a device of torch, such as cpu or cuda:0, got 'foo'"),
    ("--ranks", ["0", "4"], "must be a positive integer, got '0'"),
    ("--shape", ["4", "-1", "4"], "must be a positive integer, got '-1'"),
    ("--shape", ["4", "4", "x"], "must be a positive integer, got 'x'")], ids=str)
def test_impossible_input_of_info_is_named(argument, values, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["info", argument, *values])
    assert stopped.value.code == 2 and f"error: argument {argument}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["fly"], [], ["merge", "base"], ["convert", "a", "b", "--to", "gguf"], ["inspect"],
                                     ["convert", "a", "b", "--to", "abba", "--from", "kohya"],
                                     ["convert", "a", "b", "--to", "lora", "--rank", "0"]], ids=str)
def test_bad_usage(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2 and "usage: abba-ext" in capsys.readouterr().err
