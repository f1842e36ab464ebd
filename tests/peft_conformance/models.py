"""Tiny random models under the names that PEFT's tests load, as folders relative to the directory that the tests run in."""
import json
from pathlib import Path

import torch
import transformers as tf

_SIZES = dict(vocab_size=1024, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
              max_position_embeddings=512)
_GROUPED = dict(_SIZES, num_key_value_heads=2)
_SPECIAL = dict(bos_token_id=2, eos_token_id=1, pad_token_id=0)
_OPT = dict(vocab_size=1024, hidden_size=16, ffn_dim=32, num_hidden_layers=5, num_attention_heads=4, word_embed_proj_dim=16,
            max_position_embeddings=512)
_GPT2 = dict(vocab_size=1024, n_embd=32, n_layer=5, n_head=4, n_positions=512)

CAUSAL = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": lambda: tf.OPTConfig(**_OPT, **_SPECIAL),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": lambda: tf.GPT2Config(**_GPT2, **_SPECIAL),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": lambda: tf.GPTJConfig(**_GPT2, rotary_dim=4, **_SPECIAL),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": lambda: tf.LlamaConfig(**_GROUPED, **_SPECIAL),
    "peft-internal-testing/tiny-dummy-qwen2": lambda: tf.Qwen2Config(**_GROUPED, **_SPECIAL),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": lambda: tf.Gemma3TextConfig(**_GROUPED, head_dim=8, **_SPECIAL),
}
SEQ2SEQ = {
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": lambda: tf.T5Config(
        vocab_size=1024, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4, decoder_start_token_id=0, **_SPECIAL),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": lambda: tf.BartConfig(
        vocab_size=1024, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=4, decoder_ffn_dim=4, max_position_embeddings=512, decoder_start_token_id=2, **_SPECIAL),
}
QUOTES = "ybelkada/english_quotes_copy"
LORA = "peft-internal-testing/tiny-opt-lora-revision"


def build(root: Path) -> None:
    """Writes every model with a tokenizer, a data set of quotes and a LoRA config into root."""
    from peft import LoraConfig

    tokenizer = _tokenizer()
    for auto, configs in ((tf.AutoModelForCausalLM, CAUSAL), (tf.AutoModelForSeq2SeqLM, SEQ2SEQ)):
        for name, config in configs.items():
            torch.manual_seed(0)
            auto.from_config(config()).save_pretrained(root / name)
            tokenizer.save_pretrained(root / name)
    LoraConfig().save_pretrained(root / LORA)
    quotes = [{"quote": f"word{i} word{2 * i} word{3 * i} word7", "author": "a", "tags": ["t"]} for i in range(60)]
    (root / QUOTES).mkdir(parents=True)
    (root / QUOTES / "train.jsonl").write_text("\n".join(map(json.dumps, quotes)), encoding="utf-8")


def _tokenizer() -> tf.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "</s>", "<s>", "<unk>", *(f"word{i}" for i in range(1020))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>",
                                      unk_token="<unk>", model_max_length=512)
