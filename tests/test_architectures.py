"""Every supported architecture through the whole life of an adapter, with no config."""
import copy

import architectures
import pytest
import torch
from oracle import assert_close_to_truth

import abba_ext


def evaluate(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**batch)


def logits(model, batch):
    return evaluate(model, batch).logits


def train(model, batch, steps=4, lr=1e-2):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        model(**batch).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", architectures.NAMES)
def test_patch_train_save_load_merge(name, tmp_path):
    model, batch = architectures.build(name), architectures.inputs(name)
    base_state = copy.deepcopy(model.state_dict())
    before = logits(model, batch)

    assert abba_ext.patch_model(model) is model
    adapted = abba_ext.abba_layers(model)
    expected = architectures.block_layers(name)
    if expected is not None:
        assert {layer.rsplit(".", 1)[-1] for layer in adapted} == expected
    assert not any("lm_head" in layer or "classifier" in layer for layer in adapted)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    heads = {n for n in trainable if "abba_" not in n}
    assert all(n.startswith("classifier.") for n in heads) and bool(heads) == hasattr(model, "classifier")
    assert set(base_state) <= set(model.state_dict())  # the base's names do not change
    assert torch.equal(logits(model, batch), before) or torch.allclose(logits(model, batch), before, atol=1e-6)  # ΔW = 0

    loss = evaluate(model, batch).loss
    train(model, batch)
    assert evaluate(model, batch).loss < loss
    after = logits(model, batch)
    assert not torch.allclose(after, before, atol=1e-4)
    with abba_ext.disable_adapter(model):
        torch.testing.assert_close(logits(model, batch), before, atol=1e-6, rtol=1e-5)
    assert torch.equal(logits(model, batch), after)

    abba_ext.save_adapter(model, tmp_path / "adapter")
    fresh = architectures.build(name)
    fresh.load_state_dict(base_state)
    abba_ext.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh, batch), after)

    untouched = set(base_state) - heads
    assert all(torch.equal(model.state_dict()[key], base_state[key]) for key in untouched)
    merged = abba_ext.merge_and_unload(fresh, safe=True)
    assert type(merged) is type(model) and not abba_ext.abba_layers(merged)
    assert set(merged.state_dict()) == set(base_state)
    assert_close_to_truth(logits(merged, batch), after, 1e-4, "merged logits")

    abba_ext.unpatch_model(model)
    assert set(model.state_dict()) == set(base_state)
    assert all(torch.equal(value, base_state[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "vit"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant):
    batch = architectures.inputs(name)
    grads = []
    for checkpointing in (False, True):
        model = abba_ext.patch_model(architectures.build(name), abba_ext.AbbaConfig(seed=1))
        perturb(model)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if name == "gpt2":
            model.config.use_cache = False
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(**batch).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(g is not None and g.abs().sum() > 0 for n, g in grads[0].items() if "abba_" in n)
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, atol=1e-7, rtol=1e-4, msg=key)


def perturb(model, scale=0.05):
    """Moves every B2 off zero, so that all four factors have gradients."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in abba_ext.abba_layers(model).values():
            layer.abba_B2 += scale * torch.randn(layer.abba_B2.shape, generator=generator)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_bf16_autocast_and_bf16_base(name):
    batch = architectures.inputs(name)
    model = abba_ext.patch_model(architectures.build(name))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)

    model = abba_ext.patch_model(architectures.build(name, torch.bfloat16))
    model(**batch).loss.backward()
    factors = [p for n, p in model.named_parameters() if "abba_" in n]
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in factors)


def test_generation_with_and_without_adapter():
    model = abba_ext.patch_model(architectures.build("llama")).eval()
    prompt = architectures.inputs("llama")["input_ids"]
    base = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    perturb(model, 3.0)
    adapted = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    assert not torch.equal(base, adapted)
    with abba_ext.disable_adapter(model):
        again = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    assert torch.equal(base, again)
    abba_ext.merge_and_unload(model)
    merged = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    assert torch.equal(merged, adapted)
