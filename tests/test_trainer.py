"""Hugging Face Trainer: training, checkpoints, resuming, accumulation, checkpointed activations, plain from_pretrained."""
import architectures
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import abba_ext


class Tokens(torch.utils.data.Dataset):
    def __init__(self, count=32):
        self.ids = torch.randint(3, 60, (count, 10), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def trainer(model, folder, **kwargs):
    arguments = dict(output_dir=str(folder), per_device_train_batch_size=4, max_steps=6, learning_rate=1e-2, logging_steps=1,
                     save_strategy="steps", save_steps=3, report_to=[], disable_tqdm=True, use_cpu=True, seed=0)
    return Trainer(model=model, args=TrainingArguments(**{**arguments, **kwargs}), train_dataset=Tokens(), eval_dataset=Tokens(8))


def factors(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "abba_" in name}


def build():
    return abba_ext.patch_model(architectures.build("llama"), abba_ext.AbbaConfig(r=8))


def test_train_checkpoint_and_resume(tmp_path):
    whole = trainer(build(), tmp_path / "whole")
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0]

    resumed = trainer(build(), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for key, value in factors(whole.model).items():
        assert torch.equal(factors(resumed.model)[key], value), key


def test_trainer_checkpoint_keeps_the_base_loadable(tmp_path):
    model = build()
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "abba_" not in name}
    run = trainer(model, tmp_path)
    run.train()
    run.save_model(str(tmp_path / "final"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert all(torch.equal(parameter, base[name]) for name, parameter in plain.named_parameters())
    abba_ext.save_adapter(model, tmp_path / "adapter")
    batch = architectures.inputs("llama")
    abba_ext.load_adapter(plain, tmp_path / "adapter")
    assert torch.equal(plain.eval()(**batch).logits, model.eval()(**batch).logits)


def build_llava():
    text = tf.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    vision = tf.CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=1))
    return abba_ext.patch_model(model, abba_ext.AbbaConfig(r=8, target_modules=r".*language_model.*_proj",
                                                            modules_to_save=["lm_head"]))


def build_mixtral():
    torch.manual_seed(0)
    model = tf.MixtralForCausalLM(tf.MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=1,
                                                   num_attention_heads=4, num_key_value_heads=2, num_local_experts=4))
    return abba_ext.patch_model(model, abba_ext.AbbaConfig(r=8, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]))


@pytest.mark.parametrize("build", [build_llava, build_mixtral])
def test_resuming_finds_factors_that_were_stored_by_other_names(build, tmp_path):
    """transformers stores the tensors of these models, factors included, by the names that the hub has them under."""
    whole = trainer(build(), tmp_path / "whole", save_steps=2, max_steps=4)
    whole.train()
    stored = load_file(tmp_path / "whole" / "checkpoint-2" / "model.safetensors")
    assert any(name not in stored for name in factors(whole.model))
    resumed = trainer(build(), tmp_path / "resumed", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (key, value), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(value, other) or not value.requires_grad, key


def test_every_trained_tensor_of_another_name_is_found(monkeypatch):
    """Also the bias of a head with one output."""
    from transformers import core_model_loading

    def build():
        torch.manual_seed(0)
        return abba_ext.patch_model(tf.BertForSequenceClassification(tf.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
                                                                                   num_hidden_layers=1, num_attention_heads=4, num_labels=1)))

    model, again = build(), build()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    monkeypatch.setattr(core_model_loading, "revert_weight_conversion",
                        lambda model, tensors: {f"hub.{name}": tensor for name, tensor in tensors.items()})
    again.load_state_dict({f"hub.{name}": value for name, value in model.state_dict().items()}, strict=False)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert "classifier.bias" in trained and "classifier.weight" in trained
    assert all(torch.equal(again.get_parameter(name), model.get_parameter(name)) for name in trained)


def test_factors_that_were_stored_joined_are_found(tmp_path):
    """The hub has q, k and v of Nomic's BERT as one weight, and so transformers stores their factors too."""
    model = abba_ext.patch_model(tf.NomicBertModel(tf.NomicBertConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
                                                                      num_hidden_layers=1, num_attention_heads=4)), abba_ext.AbbaConfig(r=8))
    again = abba_ext.patch_model(tf.NomicBertModel(model.config), abba_ext.AbbaConfig(r=8))
    for number, value in enumerate(factors(model)):
        torch.nn.init.normal_(model.get_parameter(value), generator=torch.Generator().manual_seed(number))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not any("q_proj" in name for name in stored)
    again.load_state_dict(stored, strict=False)
    assert all(torch.equal(value, factors(model)[name]) for name, value in factors(again).items())


@pytest.mark.parametrize("kwargs", [
    {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
], ids=["accumulation", "reentrant", "non-reentrant"])
def test_same_result_by_other_means(kwargs, tmp_path):
    plain = trainer(build(), tmp_path / "plain", save_strategy="no", max_steps=2)
    plain.train()
    other = trainer(build(), tmp_path / "other", save_strategy="no", max_steps=2, **kwargs)
    other.train()
    for key, value in factors(plain.model).items():
        torch.testing.assert_close(factors(other.model)[key], value, atol=2e-4, rtol=2e-3, msg=key)


def test_bf16_autocast(tmp_path):
    run = trainer(build(), tmp_path, save_strategy="no", bf16=True)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(value.dtype == torch.float32 for value in factors(run.model).values())


def test_best_model_is_reloaded(tmp_path):
    run = trainer(build(), tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True)
    run.train()
    best = load_file(f"{run.state.best_model_checkpoint}/model.safetensors")
    assert all(torch.equal(value, best[key]) for key, value in factors(run.model).items())
