"""The examples on tiny data, with the real libraries; QABBA on the real SmolLM2 where its package is installed. The README's code."""
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

import abba_ext
from abba_ext.__main__ import _parser

ROOT = Path(__file__).parents[1]
TEXTS = str(ROOT / "tests" / "data" / "texts.jsonl")


def run(monkeypatch, name, *arguments):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module(name).main([str(argument) for argument in arguments])


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.fixture
def base(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model)


IDS = torch.randint(0, 50, (1, 8), generator=torch.Generator().manual_seed(0))


def test_hf_trainer(monkeypatch, tiny_model, base, tmp_path):
    pytest.importorskip("datasets")
    options = ("--model", tiny_model, "--data", TEXTS, "--output", tmp_path, "--batch", 4)
    first = run(monkeypatch, "hf_trainer", *options, "--steps", 4)
    assert first > 0 and sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    before = logits(base, IDS)
    adapted = logits(abba_ext.load_adapter(base, tmp_path), IDS)
    assert not torch.equal(adapted, before)
    run(monkeypatch, "hf_trainer", *options, "--steps", 8, "--resume")
    assert (tmp_path / "checkpoints" / "checkpoint-8").is_dir()
    assert not torch.equal(logits(abba_ext.load_adapter(base, tmp_path), IDS), adapted)


def test_trl_sft(monkeypatch, tiny_model, base, tmp_path):
    pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM

    assert run(monkeypatch, "trl_sft", "--model", tiny_model, "--data", TEXTS, "--output", tmp_path, "--steps", 4, "--batch", 4) > 0
    assert (tmp_path / "adapter_model.safetensors").is_file()
    adapted = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(logits(adapted, IDS), logits(base, IDS))


def test_accelerate_loop(monkeypatch, tiny_model, base, tmp_path):
    pytest.importorskip("datasets")
    losses = run(monkeypatch, "accelerate_loop", "--model", tiny_model, "--data", TEXTS, "--output", tmp_path, "--epochs", 4,
                 "--batch", 4)
    assert len(losses) == 12 and losses[-1] < losses[0]
    before = logits(base, IDS)
    assert not torch.equal(logits(abba_ext.load_adapter(base, tmp_path), IDS), before)


def test_mlp_digits(monkeypatch):
    pytest.importorskip("sklearn")
    before, after = run(monkeypatch, "mlp_digits")
    assert before < 0.1 and after > 0.9


def test_qabba(monkeypatch, smollm2, tmp_path):
    """A 4-bit SmolLM2 learns from a few steps, and its adapter loads into a 4-bit base again."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("datasets")
    losses = run(monkeypatch, "qabba", "--model", smollm2, "--data", TEXTS, "--output", tmp_path, "--steps", 8, "--batch", 2,
                 "--max-length", 48, "--dtype", "float32")
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(smollm2, quantization_config=four_bit, dtype=torch.float32)
    before = logits(model, IDS)
    assert not torch.equal(logits(abba_ext.load_adapter(model, tmp_path), IDS), before)
    assert len(abba_ext.abba_layers(model)) == 30 * 7


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_of_the_readme_runs(monkeypatch, tiny_model, tmp_path):
    """Block by block, each with a model of its own; what an earlier block imports is known."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    load = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: load(tiny_model))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall("```python\n(.*?)```", README, re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, {"abba_ext": abba_ext, "model": load(tiny_model)})
    assert abba_ext.load_adapter(load(tiny_model), "my-adapter")


def test_commands_of_the_readme_are_understood():
    commands = [shlex.split(line, comments=True)[1:] for line in re.findall("^    (abba-ext .*)", README, re.M)]
    folders = [_parser().parse_args(command).out for command in commands if command[0] != "inspect"]
    assert len(folders) == 4 and len({*folders, "my-adapter"}) == 5, "a folder that is there is not overwritten"
