"""Tiny random models of every architecture that patch_model supports without a config, and inputs for them."""
import torch
import transformers as tf

_TEXT = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64)
_GROUPED = dict(_TEXT, num_key_value_heads=2)

# name: (model class, config, the linear layers of one block that must be adapted)
_LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
_CASES = {
    "llama": ("LlamaForCausalLM", lambda: tf.LlamaConfig(**_GROUPED, pad_token_id=0), _LLAMA),
    "mistral": ("MistralForCausalLM", lambda: tf.MistralConfig(**_GROUPED), _LLAMA),
    "qwen2": ("Qwen2ForCausalLM", lambda: tf.Qwen2Config(**_GROUPED), _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", lambda: tf.Qwen3Config(**_GROUPED, head_dim=8), _LLAMA),
    "gemma": ("GemmaForCausalLM", lambda: tf.GemmaConfig(**_GROUPED, head_dim=8), _LLAMA),
    "gemma2": ("Gemma2ForCausalLM", lambda: tf.Gemma2Config(**_GROUPED, head_dim=8), _LLAMA),
    "gemma3": ("Gemma3ForCausalLM", lambda: tf.Gemma3TextConfig(**_GROUPED, head_dim=8), _LLAMA),
    "phi": ("PhiForCausalLM", lambda: tf.PhiConfig(**_TEXT), {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
    "phi3": ("Phi3ForCausalLM", lambda: tf.Phi3Config(**_GROUPED, pad_token_id=0),
             {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "gpt2": ("GPT2LMHeadModel", lambda: tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
             {"c_attn", "c_proj", "c_fc"}),
    "gpt_neox": ("GPTNeoXForCausalLM", lambda: tf.GPTNeoXConfig(**_TEXT),
                 {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    "opt": ("OPTForCausalLM", lambda: tf.OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                                                   num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32),
            {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    "bert": ("BertForSequenceClassification", lambda: tf.BertConfig(**_TEXT), {"query", "key", "value", "dense"}),
    "roberta": ("RobertaForMaskedLM", lambda: tf.RobertaConfig(**_TEXT), {"query", "key", "value", "dense"}),
    "t5": ("T5ForConditionalGeneration",
           lambda: tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                               decoder_start_token_id=0), {"q", "k", "v", "o", "wi", "wo"}),
    "vit": ("ViTForImageClassification",
            lambda: tf.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16,
                                 patch_size=8), None),  # projection names differ between transformers versions
}
NAMES = list(_CASES)


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    """A tiny model with random weights in training mode."""
    class_name, config, _ = _CASES[name]
    torch.manual_seed(seed)
    return getattr(tf, class_name)(config()).to(dtype).train()


def block_layers(name: str) -> set[str] | None:
    """Leaf names of the layers that must be adapted by default."""
    return _CASES[name][2]


def inputs(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two sequences (or images) with labels."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator), "labels": torch.tensor([0, 1])}
    ids = torch.randint(3, 60, (2, 12), generator=generator)
    labels = torch.tensor([0, 1]) if name == "bert" else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
