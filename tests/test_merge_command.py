"""Merging on disk: the weights of merge_and_unload, whole folders or none; kills, full disks, and what is refused."""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import architectures
import peft
import pytest
import torch
import transformers
from oracle import assert_close_to_truth
from safetensors.torch import load_file, save_file

import abba_ext
from abba_ext import AbbaConfig, formats, merging
from abba_ext.__main__ import main
from abba_ext.merging import merge_checkpoint, partial_folder, row_blocks
from abba_ext.peft import AbbaPeftConfig

INDEX, CONFIG = "model.safetensors.index.json", "config.json"
NOT_COPIED = (".hidden", ".git", "pytorch_model.bin")


def save_base(model, folder, shard_size="20KB"):
    model.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "merges.txt").write_text("a b\n")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / ".git").mkdir()
    for name in (".hidden", ".git/config", "pytorch_model.bin"):
        (folder / name).write_text("not copied")
    return folder


def save_adapter(base, folder, dtype=torch.float32, config=None, seed=1):
    """An adapter of random factors, and the patched model it was saved from."""
    name = json.loads((base / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(base, dtype=dtype)
    abba_ext.patch_model(model, config or AbbaConfig(r1=3, r2=5, init="random"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3, generator=generator)
    abba_ext.save_adapter(model, folder)
    return model.eval()


def build(tmp_path, name="llama", dtype=torch.float32, config=None):
    base = save_base(architectures.build(name, dtype), tmp_path / "base")
    return base, tmp_path / "adapter", save_adapter(base, tmp_path / "adapter", dtype, config)


def stored(folder):
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def header(path):
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def assert_same_weights(folder, model):
    """What from_pretrained reads from the folder are the model's parameters, bit for bit."""
    read = type(model).from_pretrained(folder, dtype=next(model.parameters()).dtype)
    expected, actual = dict(model.named_parameters()), dict(read.named_parameters())
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        assert torch.isfinite(value).all() and torch.equal(actual[key], value), key
    return read.eval()


@pytest.fixture
def tiny(tmp_path):
    return build(tmp_path)


# --- what is written ---


@pytest.mark.parametrize("name, dtype", [
    *((name, dtype) for name in ("llama", "gpt2", "bert", "opt", "gpt_neox", "t5") for dtype in (torch.float32, torch.bfloat16)),
    ("gpt2", torch.float16), ("gpt2", torch.float64)], ids=str)
def test_equals_merge_and_unload_bit_for_bit(name, dtype, tmp_path):
    base, adapter, model = build(tmp_path, name, dtype, AbbaConfig(r1=3, r2=5, init="random", bias="all"))
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    inputs = architectures.inputs(name)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert merge_checkpoint(base, adapter, tmp_path / "out", safe=True) == tmp_path / "out"
    merged = assert_same_weights(tmp_path / "out", abba_ext.merge_and_unload(model))
    if dtype in (torch.float32, torch.float64):
        with torch.no_grad():
            assert_close_to_truth(merged(**inputs).logits, logits, 1e-4, "logits")
    files = {path.relative_to(base): data for path, data in before.items()}
    assert {path: path.read_bytes() for path in before} == before
    assert {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()} == {
        path for path in files if path.parts[0] not in NOT_COPIED}
    for path, data in files.items():
        if path.suffix == ".safetensors":
            assert header(tmp_path / "out" / path) == header(base / path)
        elif path.parts[0] not in NOT_COPIED:
            assert (tmp_path / "out" / path).read_bytes() == data
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "out"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_against_the_dense_update_in_fp64(name, tmp_path):
    base, adapter, _ = build(tmp_path, name)
    merge_checkpoint(base, adapter, tmp_path / "out")
    before, after = stored(base), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    layers = formats.read(adapter).layers
    for layer, f in layers.items():
        delta = f.scale * (f.b1.double() @ f.a1.double()) * (f.b2.double() @ f.a2.double())
        delta = delta.t() if name == "gpt2" else delta  # Conv1D, also where it is square (attn.c_proj)
        change = after.pop(f"{layer}.weight").double() - before[f"{layer}.weight"].double()
        assert delta.norm() > 1 and change.shape == delta.shape
        assert_close_to_truth(change, delta, 1e-6, layer)
    assert len(layers) == (14 if name == "llama" else 8)
    assert all(torch.equal(value, before[key]) for key, value in after.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_blocks_change_no_bit(name, dtype, tmp_path, monkeypatch):
    if name == "GPT2LMHeadModel":
        config = transformers.GPT2Config(vocab_size=64, n_embd=204, n_layer=1, n_head=4, n_positions=64)
    else:
        config = transformers.LlamaConfig(vocab_size=64, hidden_size=204, intermediate_size=515, num_hidden_layers=1,
                                          num_attention_heads=2, pad_token_id=0)
    base = save_base(getattr(transformers, name)(config).to(dtype), tmp_path / "base", "300KB")
    model = save_adapter(base, tmp_path / "adapter", dtype, AbbaConfig(r1=16, r2=24, init="random"))
    monkeypatch.setattr(merging, "BLOCK_BYTES", 1)
    assert len(list(row_blocks(515, 204 * 2))) == 8
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert_same_weights(tmp_path / "out", abba_ext.merge_and_unload(model))


@pytest.mark.parametrize("row_bytes", [0, 1, 1000, 2**16, 2**30])
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 127, 128, 129, 5000])
def test_row_blocks_cover_every_row_once(rows, row_bytes):
    blocks = list(row_blocks(rows, row_bytes))
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(rows))
    for start, stop in blocks:
        assert stop - start >= min(rows, merging.MIN_ROWS)
        assert stop - start < 2 * merging.MIN_ROWS or (stop - start - merging.MIN_ROWS) * row_bytes <= merging.BLOCK_BYTES


def test_trained_head_and_biases_take_the_adapters_values(tmp_path):
    base, adapter, _ = build(tmp_path, "bert", config=AbbaConfig(r1=2, r2=2, init="random", bias="abba_only"))
    trained = formats.read(adapter).trained
    assert {"classifier.weight", "classifier.bias", "bert.encoder.layer.0.attention.self.query.bias"} <= trained.keys()
    merge_checkpoint(base, adapter, tmp_path / "out")
    before, after = stored(base), stored(tmp_path / "out")
    for key, value in trained.items():
        assert torch.equal(after[key], value) and not torch.equal(before[key], value)


@pytest.mark.parametrize("name", ["transformer.wte.weight", "lm_head.weight"])
def test_a_tied_head_that_was_trained_changes_its_one_stored_copy(name, tmp_path):
    base, adapter, _ = build(tmp_path, "gpt2")
    value = torch.randn(64, 32)
    formats.write(formats.Adapter(formats.read(adapter).layers, trained={name: value}), tmp_path / "with_head")
    merge_checkpoint(base, tmp_path / "with_head", tmp_path / "out")
    assert stored(base).keys() == stored(tmp_path / "out").keys() and "lm_head.weight" not in stored(base)
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert torch.equal(model.transformer.wte.weight, value) and torch.equal(model.lm_head.weight, value)


def test_checkpoints_with_the_prefix_of_a_larger_model(tmp_path):
    base = save_base(architectures.build("gpt2"), tmp_path / "base")
    edit_json(base / CONFIG, architectures=["GPT2Model"])
    model = save_adapter(base, tmp_path / "adapter")
    assert not any(key.startswith("transformer.") for key in formats.read(tmp_path / "adapter").layers)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert all(key.startswith("transformer.") for key in stored(tmp_path / "out"))
    assert_same_weights(tmp_path / "out", abba_ext.merge_and_unload(model))


@pytest.mark.parametrize("name, prefix", [("gpt2", "transformer."), ("bert", "bert.")])
def test_checkpoints_without_the_models_prefix(name, prefix, tmp_path):
    config = AbbaConfig(r1=2, r2=2, init="random", modules_to_save=[])
    base, adapter, model = build(tmp_path, name, config=config)
    state = {key.removeprefix(prefix): value for key, value in stored(base).items()}
    assert len(state.keys() - stored(base).keys()) > 20
    for path in base.glob("model*"):
        path.unlink()
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    merge_checkpoint(base, adapter, tmp_path / "out")
    if name == "gpt2":
        assert_same_weights(tmp_path / "out", abba_ext.merge_and_unload(model))
    assert stored(tmp_path / "out").keys() == state.keys()
    changed = [key for key, value in stored(tmp_path / "out").items() if not torch.equal(value, state[key])]
    assert sorted(changed) == sorted(f"{layer.removeprefix(prefix)}.weight" for layer in formats.read(adapter).layers)


def test_a_parameter_that_is_stored_with_and_without_the_prefix_is_refused(tmp_path):
    base, adapter, _ = build(tmp_path, "gpt2")
    state, key = stored(base), "h.0.attn.c_attn.weight"
    for path in base.glob("model*"):
        path.unlink()
    save_file(state | {key: state[f"transformer.{key}"].clone()}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"stores the parameter 'transformer.{key}' twice"):
        merge_checkpoint(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("kind", ["peft", "loha"])
def test_adapters_of_other_formats(kind, tiny, tmp_path):
    base, adapter, model = tiny
    formats.convert_adapter(adapter, tmp_path / "other", kind)
    merge_checkpoint(base, tmp_path / "other", tmp_path / "out")
    for key, value in abba_ext.merge_and_unload(model).state_dict().items():
        assert_close_to_truth(stored(tmp_path / "out")[key], value, 1e-6, key)


def test_embeddings_are_merged_where_they_are_not_tied(tmp_path):
    config = AbbaConfig(r1=2, r2=2, init="random", target_modules=["embed_tokens", "q_proj"])
    base, adapter, model = build(tmp_path, config=config)
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert_same_weights(tmp_path / "out", abba_ext.merge_and_unload(model))


def test_other_safetensors_are_left_out_with_a_warning(tiny, tmp_path):
    base, adapter, _ = tiny
    (base / "original").mkdir()
    others = ("consolidated.safetensors", "model.fp16.safetensors", "original/part.safetensors")
    for name in others:
        save_file({"x": torch.ones(4)}, base / name)
    with pytest.warns(UserWarning, match="would stay unmerged: " + ", ".join(others)):
        merge_checkpoint(base, adapter, tmp_path / "out")
    shards = set(json.loads((base / INDEX).read_text())["weight_map"].values())
    assert {path.name for path in (tmp_path / "out").rglob("*.safetensors")} == shards


def test_a_hub_name_in_the_local_cache(tiny, tmp_path, monkeypatch):
    base, adapter, model = tiny
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for path in base.iterdir():
        if path.is_file():  # files of a snapshot are links, as in the cache
            shutil.copy2(path, repository / "blobs" / path.name)
            (snapshot / path.name).symlink_to(repository / "blobs" / path.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.warns(UserWarning, match=f"trained on '{base}' and is merged into 'org/tiny'"):
        merge_checkpoint("org/tiny", adapter, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert_same_weights(tmp_path / "out", abba_ext.merge_and_unload(model))


# --- whole or not at all ---


def work(*arguments):
    """Runs merge_worker.py."""
    return subprocess.run([sys.executable, Path(__file__).parent / "merge_worker.py", *arguments], capture_output=True, text=True,
                          timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


def interrupt_after(shards, monkeypatch, error=KeyboardInterrupt):
    """Makes writing shards fail after some of them."""
    write, count = merging._write_shard, iter(range(shards))

    def failing(*args):
        if next(count, None) is None:
            raise error
        write(*args)

    monkeypatch.setattr(merging, "_write_shard", failing)
    return lambda: monkeypatch.setattr(merging, "_write_shard", write)


def file_versions(folder):
    return {(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("change", ["nothing", "adapter", "scale", "head", "base", "safe"])
def test_only_the_same_inputs_resume(change, tmp_path, monkeypatch):
    base, adapter, model = build(tmp_path, config=AbbaConfig(r1=3, r2=5, init="random", modules_to_save=["lm_head"]))
    out, work = tmp_path / "out", partial_folder(tmp_path / "out") / "model"
    restore = interrupt_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(base, adapter, out)
    assert not out.exists() and len(list(work.glob("*.safetensors"))) == 2
    restore()
    if change == "adapter":
        model = save_adapter(base, adapter, seed=2)
    elif change == "scale":
        model.model.layers[0].self_attn.q_proj.abba_scale *= 2
        abba_ext.save_adapter(model, adapter)
    elif change == "head":
        model.lm_head.weight.data += 1
        abba_ext.save_adapter(model, adapter)
    elif change == "base":
        os.utime(base / "model.safetensors.index.json")
    kept = file_versions(work)
    calls = []
    merge_checkpoint(base, adapter, out, safe=change == "safe", progress=lambda *sizes: calls.append(sizes))
    resumed = kept & file_versions(out)
    assert len(resumed) == (2 if change == "nothing" else 0)
    total = sum(value.nbytes for value in stored(base).values())
    assert calls == sorted(calls) and calls[-1] == (total, total)
    assert_same_weights(out, abba_ext.merge_and_unload(model))
    assert not partial_folder(out).exists()


def test_a_refused_result_leaves_nothing(tmp_path):
    base = save_base(architectures.build("llama", torch.float16), tmp_path / "base")
    save_adapter(base, tmp_path / "adapter", torch.float16)
    layers = formats.read(tmp_path / "adapter").layers
    big = {name: formats.LayerFactors(f.a1 * 300, f.b1 * 300, f.a2, f.b2, f.scale) for name, f in layers.items()}
    formats.write(formats.Adapter(big), tmp_path / "big")
    with pytest.raises(ValueError, match=r"the merged '.*' holds NaN or infinity; nothing was written"):
        merge_checkpoint(base, tmp_path / "big", tmp_path / "out", safe=True)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "big"]
    merge_checkpoint(base, tmp_path / "big", tmp_path / "out")
    assert any(torch.isinf(value).any() for value in stored(tmp_path / "out").values())


def test_two_runs_at_once(tiny, tmp_path):
    base, adapter, model = tiny
    refused = []

    def second(*_):
        with pytest.raises(BlockingIOError, match="another run is merging into"):
            merge_checkpoint(base, adapter, tmp_path / "out")
        refused.append(1)

    merge_checkpoint(base, adapter, tmp_path / "out", progress=second)
    assert refused
    assert_same_weights(tmp_path / "out", abba_ext.merge_and_unload(model))


def test_a_full_disk(tiny, tmp_path):
    base, adapter, model = tiny
    result = work("full", base, adapter, tmp_path / "out")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("abba-ext: error: ")]
    assert "File too large" in line and "goes on from there" in line and not (tmp_path / "out").exists()
    assert not list(partial_folder(tmp_path / "out").rglob(".tmp-*"))
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert_same_weights(tmp_path / "out", abba_ext.merge_and_unload(model))


def test_memory_stays_below_the_largest_weight(tmp_path):
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=2048, intermediate_size=8192, num_hidden_layers=1,
                                      num_attention_heads=8, pad_token_id=0)
    base = save_base(transformers.LlamaForCausalLM(config), tmp_path / "base", "70MB")
    save_adapter(base, tmp_path / "adapter", config=AbbaConfig(r1=8, r2=8, init="random"))
    sizes = {key: value.nbytes for key, value in stored(base).items()}
    assert len(list(base.glob("*.safetensors"))) >= 3 and sum(sizes.values()) > 240 * 2**20
    result = work("memory", base, tmp_path / "adapter", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    growth = int(result.stdout.splitlines()[-1])
    assert merging.BLOCK_BYTES < growth < 48 * 2**20 < max(sizes.values()), growth


@pytest.fixture
def sigint():
    """Raises KeyboardInterrupt here too where the tests run in a shell's background, which ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupted_command(tiny, tmp_path, monkeypatch, capsys, sigint):
    base, adapter, model = tiny
    write, calls = merging._write_shard, []

    def ctrl_c(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        write(*args)

    monkeypatch.setattr(merging, "_write_shard", ctrl_c)
    command = ["merge", str(base), str(adapter), str(tmp_path / "out")]
    assert main(command) == 130
    assert f"abba-ext: interrupted; {partial_folder(tmp_path / 'out')} keeps what was merged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(command) == 0
    assert len(calls) == 1 + len(list(base.glob("*.safetensors")))  # the two that were there were not written again
    assert_same_weights(tmp_path / "out", abba_ext.merge_and_unload(model))


# --- the destination ---


def test_destinations(tiny, tmp_path):
    base, adapter, model = tiny
    out = tmp_path / "new" / "out"
    out.mkdir(parents=True)
    merge_checkpoint(base, adapter, out)  # an empty folder may be there
    with pytest.raises(FileExistsError, match="exists and is not empty; .*--force"):
        merge_checkpoint(base, adapter, out)
    (out / "old").write_text("")
    merge_checkpoint(base, adapter, out, force=True)
    assert not (out / "old").exists() and os.listdir(out.parent) == ["out"]
    assert_same_weights(out, abba_ext.merge_and_unload(model))


@pytest.mark.parametrize("name", ["checkpoint-1", ".git"])
def test_force_deletes_no_folder_of_others(name, tiny, tmp_path):
    base, adapter, model = tiny
    merge_checkpoint(base, adapter, tmp_path / "out")
    (tmp_path / "out" / name).mkdir()
    (tmp_path / "out" / name / "optimizer.pt").write_text("")
    with pytest.raises(FileExistsError, match=f"holds the folder '{name}', which force would delete"):
        merge_checkpoint(base, adapter, tmp_path / "out", force=True)
    assert (tmp_path / "out" / name / "optimizer.pt").exists()


def test_a_folder_that_came_meanwhile_is_left_alone(tiny, tmp_path, monkeypatch):
    base, adapter, _ = tiny
    describe = merging._describe_inputs

    def meanwhile(*args):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("")
        return describe(*args)

    monkeypatch.setattr(merging, "_describe_inputs", meanwhile)
    with pytest.raises(FileExistsError, match="is not empty"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "out"]


def test_force_replaces_only_after_success(tiny, tmp_path, monkeypatch):
    base, adapter, _ = tiny
    merge_checkpoint(base, adapter, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    save_adapter(base, adapter, seed=2)
    interrupt_after(1, monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left on device; what was merged so far is in"):
        merge_checkpoint(base, adapter, tmp_path / "out", force=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before


def test_force_interrupted_between_its_two_renames_is_completed_by_the_next_run(tiny, tmp_path, monkeypatch):
    base, adapter, _ = tiny
    merge_checkpoint(base, adapter, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    model = save_adapter(base, adapter, seed=2)
    rename = Path.rename

    def interrupted(path, target):
        if target == tmp_path / "out":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", interrupted)
        merge_checkpoint(base, adapter, tmp_path / "out", force=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / ".out.old").iterdir() if path.is_file()} == before
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "out"]
    assert_same_weights(tmp_path / "out", abba_ext.merge_and_unload(model))


def test_force_replaces_beside_what_an_interrupted_run_left(tiny, tmp_path):
    """A run that was killed while it deleted what it had replaced."""
    base, adapter, model = tiny
    for _ in range(2):
        merge_checkpoint(base, adapter, tmp_path / "out", force=True)
        (tmp_path / ".out.old").mkdir()
        (tmp_path / ".out.old" / CONFIG).write_text("{}")
    merge_checkpoint(base, adapter, tmp_path / "out", force=True)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "out"]
    assert_same_weights(tmp_path / "out", abba_ext.merge_and_unload(model))


def test_refused_destinations(tiny, tmp_path):
    base, adapter, _ = tiny
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "empty")
    for out, force, error, message in (
        (base, True, ValueError, "must not be, lie in or contain"),
        (base / "out", False, ValueError, "must not be, lie in or contain"),
        (adapter, True, ValueError, "must not be, lie in or contain"),
        (tmp_path, True, ValueError, "must not be, lie in or contain"),
        (tmp_path / "link", True, ValueError, "must not be, lie in or contain"),
        (tmp_path / "dangling", True, FileExistsError, "is no folder"),
        (tmp_path / "file", True, FileExistsError, "is no folder"),
        (tmp_path / "full", False, FileExistsError, "is not empty"),
        (tmp_path / "full", True, FileExistsError, "is no model that force could replace"),
        (tmp_path / "file" / "out", False, OSError, "Not a directory"),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(error, match=message):
            merge_checkpoint(base, adapter, out, force=force)
        assert sorted(tmp_path.rglob("*")) == before


# --- the base ---


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def map_to(folder, shard):
    """Gives one key of the index another shard."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map=weight_map | {min(weight_map): shard})


def swap_shards(folder):
    first, *_, last = sorted(folder.glob("*.safetensors"))
    first.rename(folder / "first")
    last.rename(first)
    (folder / "first").rename(last)


def first_shard(folder):
    return min(folder.glob("*.safetensors"))


def rewrite_shard(folder, change):
    state = load_file(first_shard(folder))
    change(state)
    save_file(state, first_shard(folder), metadata={"format": "pt"})


def only_bin(folder):
    for path in folder.glob("model*"):
        path.unlink()


def as_integers(folder):
    for path in folder.glob("*.safetensors"):
        save_file({key: value.to(torch.int8) for key, value in load_file(path).items()}, path)


def long_header(folder):
    path = first_shard(folder)
    path.write_bytes((200 * 2**20).to_bytes(8, "little") + path.read_bytes()[8:])


HOSTILE = {
    "parent folder": (lambda f: map_to(f, "../evil.safetensors"), "must name .safetensors files of the folder itself"),
    "absolute": (lambda f: map_to(f, "/etc/evil.safetensors"), "must name .safetensors files of the folder itself"),
    "subfolder": (lambda f: map_to(f, "a/evil.safetensors"), "must name .safetensors files of the folder itself"),
    "backslash": (lambda f: map_to(f, "..\\evil.safetensors"), "must name .safetensors files of the folder itself"),
    "NUL": (lambda f: map_to(f, "e\0vil.safetensors"), "must name .safetensors files of the folder itself"),
    "another kind of file": (lambda f: map_to(f, "config.json"), "must name .safetensors files of the folder itself"),
    "no string": (lambda f: map_to(f, 3), "must map keys to file names"),
    "no map": (lambda f: edit_json(f / INDEX, weight_map=[]), "must map keys to file names"),
    "swapped shards": (swap_shards, "in model-0000.*, but it is in model-0000"),
    "unknown key": (lambda f: edit_json(f / INDEX, weight_map=json.loads((f / INDEX).read_text())["weight_map"]
                                        | {"x": first_shard(f).name}), "has 'x' in model-0000.*, but it is in no file"),
    "key that no index has": (lambda f: rewrite_shard(f, lambda s: s.update(x=torch.ones(1))), "has 'x' in no file"),
    "key stored twice": (lambda f: save_file(load_file(first_shard(f)), max(f.glob("*.safetensors"))), "holds .* holds too"),
    "garbage index": (lambda f: (f / INDEX).write_text("{"), "is no JSON"),
    "deep index": (lambda f: (f / INDEX).write_text("[" * 100000), "is no JSON"),
    "list": (lambda f: (f / INDEX).write_text("[]"), "must hold a JSON object, got list"),
    "missing shard": (lambda f: first_shard(f).unlink(), "is missing; model.safetensors.index.json names it"),
    "truncated shard": (lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes()[:-1]), "damaged or is no"),
    "oversized header": (long_header, "damaged or is no safetensors file.*header too large"),
    "both kinds": (lambda f: shutil.copy(first_shard(f), f / "model.safetensors"), "holds both model.safetensors and"),
    "only .bin": (only_bin, "has neither .*; pytorch_model.bin is in another format: .* save_pretrained"),
    "no config": (lambda f: (f / CONFIG).unlink(), "config.json is missing"),
    "huge config": (lambda f: os.truncate(f / CONFIG, 101 * 2**20), "at most 104,857,600 are read"),
    "quantised": (lambda f: edit_json(f / CONFIG, quantization_config={"quant_method": "gptq"}), r"is quantised \(gptq\)"),
    "integers": (as_integers, "is stored as I8: only plain floating-point weights"),
    "adapter inside": (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter_config.json"),
    "unknown class": (lambda f: edit_json(f / CONFIG, architectures=["MyModel"]), "must start with a model .*'MyModel'"),
    "no model class": (lambda f: edit_json(f / CONFIG, architectures=["pipeline"]), "must start with a model of transformers"),
    "no class": (lambda f: edit_json(f / CONFIG, architectures=None), "must start with a model of transformers .* got None"),
    "another size": (lambda f: edit_json(f / CONFIG, intermediate_size=40), r"has a weight \[40, 32\], but .* \[48, 32\]"),
    "fewer layers": (lambda f: edit_json(f / CONFIG, num_hidden_layers=1), r"has no layer 'model.layers.1.*\(and 2 more\)"),
    "shape": (lambda f: rewrite_shard(f, lambda s: s.update({key: v[:-1].clone() for key, v in s.items() if "proj" in key})),
              r"is stored as \[31, 32\], but the model of config.json has \[32, 32\]"),
}


@pytest.mark.parametrize("damage, message", HOSTILE.values(), ids=HOSTILE)
def test_refused_bases(damage, message, tiny, tmp_path, capsys):
    base, adapter, _ = tiny
    damage(base)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]
    assert main(["merge", str(base), str(adapter), str(tmp_path / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[transformers]")]
    assert line.startswith("abba-ext: error: ")


def test_keys_that_name_parameters_otherwise_are_refused(tmp_path):
    base, adapter, _ = build(tmp_path, "vit")
    missing = {f"{layer}.weight" for layer in formats.read(adapter).layers} - stored(base).keys()
    if not missing:
        renamed = {key.replace("query", "wq").replace("q_proj", "wq"): value for key, value in stored(base).items()}
        only_bin(base)
        save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no file holds 'vit.*weight': they name it otherwise than the model does"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_tied_weights_are_refused(tmp_path):
    base, adapter, _ = build(tmp_path, "gpt2", config=AbbaConfig(r1=2, r2=2, init="random", target_modules=["wte"]))
    with pytest.raises(ValueError, match="the weight of 'transformer.wte' is tied to lm_head.weight"):
        merge_checkpoint(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("modules", [["lm_head"], ["wte"], ["wte", "lm_head"]], ids=str)
def test_copies_of_tied_weights_that_peft_trained_are_refused(modules, tmp_path):
    base = save_base(architectures.build("gpt2"), tmp_path / "base")
    model = peft.get_peft_model(architectures.build("gpt2"), AbbaPeftConfig(r=4, target_modules=["c_attn"],
                                                                           modules_to_save=modules))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="weight' was trained as a tensor of its own, but the model ties it to .*PEFT"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_equal_copies_of_a_tied_weight_are_merged_as_one(tmp_path):
    config = AbbaConfig(r1=3, r2=5, init="random", modules_to_save=["lm_head"])
    base, adapter, model = build(tmp_path, "gpt2", config=config)
    formats.convert_adapter(adapter, tmp_path / "peft", "peft")
    assert formats.read(tmp_path / "peft").trained.keys() == {"transformer.wte.weight", "lm_head.weight"}
    merge_checkpoint(base, tmp_path / "peft", tmp_path / "out")
    assert_same_weights(tmp_path / "out", abba_ext.merge_and_unload(model))


def test_two_values_of_one_stored_tensor_are_refused(tmp_path):
    base, adapter, _ = build(tmp_path, "gpt2")
    trained = {name: torch.randn(64, 32) for name in ("transformer.wte.weight", "lm_head.weight")}
    formats.write(formats.Adapter(formats.read(adapter).layers, trained=trained), tmp_path / "twice")
    with pytest.raises(ValueError, match="'lm_head.weight' was trained in full twice"):
        merge_checkpoint(base, tmp_path / "twice", tmp_path / "out")


@pytest.mark.parametrize("name, value, message", [
    ("classifier.weight", torch.ones(3, 32), r"'classifier.weight' must be \[2, 32\] F32 as in the base, got \[3, 32\]"),
    ("bert.encoder.layer.0.attention.self.query.weight", torch.ones(32, 32), "query.weight' is both adapted and trained in full")],
    ids=["shape", "adapted too"])
def test_trained_parameters_that_do_not_fit_are_refused(name, value, message, tmp_path):
    base, adapter, _ = build(tmp_path, "bert")
    formats.write(formats.Adapter(formats.read(adapter).layers, trained={name: value}), tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        merge_checkpoint(base, tmp_path / "other", tmp_path / "out")


def test_trained_parameters_that_the_base_lacks(tmp_path):
    base, adapter, _ = build(tmp_path, "bert")
    rewritten = {key: value for key, value in stored(base).items() if not key.startswith("classifier")}
    only_bin(base)
    save_file(rewritten, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="'classifier.weight', which was trained in full, is not stored in the base"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_no_such_base_or_adapter(tiny, tmp_path):
    base, adapter, _ = tiny
    for name in (tmp_path / "nowhere", "org/nowhere", "a b/c/d"):
        with pytest.raises(FileNotFoundError, match="is neither a folder nor a model in the local hub cache"):
            merge_checkpoint(name, adapter, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no adapter in"):
        merge_checkpoint(base, tmp_path / "nowhere", tmp_path / "out")
