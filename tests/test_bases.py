"""Bases beyond nn.Linear: embeddings, convolutions and stacked experts, against the same layer with a dense W0 + ΔW in fp64."""
import copy
import io

import pytest
import torch
import transformers as tf
from oracle import assert_close_to_truth
from torch import nn
from torch.func import functional_call
from torch.nn.functional import linear

import abba_ext
from abba_ext import AbbaConfig, bases
from abba_ext.layers import FACTORS, AbbaLayer, AbbaParameter

EMBEDDINGS = {
    "plain": lambda: nn.Embedding(50, 24),
    "padding": lambda: nn.Embedding(50, 24, padding_idx=3),
    "sparse": lambda: nn.Embedding(50, 24, sparse=True),
}
CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(6, 10, 3, padding=1), (2, 6, 9)),
    "2d-1x1": (lambda: nn.Conv2d(6, 10, 1), (2, 6, 5, 4)),
    "2d": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), (2, 6, 9, 8)),
    "2d-groups": (lambda: nn.Conv2d(6, 10, (3, 2), groups=2, bias=False), (2, 6, 9, 8)),
    "2d-reflect": (lambda: nn.Conv2d(6, 10, 3, padding=1, padding_mode="reflect", dilation=2), (2, 6, 9, 8)),
    "2d-channels-last": (lambda: nn.Conv2d(6, 10, 3).to(memory_format=torch.channels_last), (2, 6, 9, 8)),
    "3d": (lambda: nn.Conv3d(3, 4, 2), (2, 3, 4, 4, 4)),
}


def adapt(base: nn.Module, **config) -> AbbaLayer:
    """The layer, adapted, with a ΔW that is not zero."""
    model = abba_ext.patch_model(nn.Sequential(base), AbbaConfig(r1=3, r2=5, alpha=2.0, target_modules=["0"], **config))
    torch.manual_seed(1)
    nn.init.normal_(model[0].abba_B2, std=0.1)
    return model[0]


def fp64_factors(layer: AbbaLayer) -> list[torch.Tensor]:
    return [getattr(layer, name).detach().double().requires_grad_() for name in FACTORS]


def dense_weight(layer: AbbaLayer, factors) -> torch.Tensor:
    """W0 + ΔW in the weight's shape, in fp64."""
    a1, b1, a2, b2 = factors
    delta = layer.abba_scale * (b1 @ a1) * (b2 @ a2)
    return layer.weight.detach().double() + delta.reshape(layer.weight.shape)


def check_against_dense(layer, x, pristine):
    """Output and all gradients against the unadapted layer run in fp64 with a dense weight."""
    y = layer(x)
    y.square().sum().backward()
    factors = fp64_factors(layer)
    weights = {"weight": dense_weight(layer, factors)}
    if getattr(pristine, "bias", None) is not None:
        weights["bias"] = pristine.bias.detach().double()
    x64 = x.detach().double().requires_grad_() if x.is_floating_point() else x
    truth = functional_call(pristine.double(), weights, (x64,))
    truth.square().sum().backward()
    assert_close_to_truth(y, truth, 1e-6, "output")
    for name, factor in zip(FACTORS, factors, strict=True):
        grad = getattr(layer, name).grad
        assert_close_to_truth(grad.to_dense() if grad.is_sparse else grad, factor.grad, 1e-5, name)
    if x.requires_grad:
        assert_close_to_truth(x.grad, x64.grad, 1e-5, "dx")
    assert layer.weight.grad is None


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_embedding(kind):
    torch.manual_seed(0)
    base = EMBEDDINGS[kind]()
    pristine = copy.deepcopy(base)
    pristine.sparse = False  # of the truth, which differentiates through a computed weight
    layer = adapt(base)
    assert layer.abba_A1.shape == (3, 24) and layer.abba_B1.shape == (50, 3)
    check_against_dense(layer, torch.randint(0, 50, (4, 7)), pristine)


def test_dropout_leaves_ids_alone():
    layer, ids = adapt(EMBEDDINGS["plain"](), dropout=0.5), torch.randint(0, 50, (4, 7))
    assert torch.equal(layer.train()(ids), layer.eval()(ids))


def test_scaled_embedding():
    config = tf.Gemma3TextConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                                 num_key_value_heads=2, head_dim=8)
    base = tf.Gemma3ForCausalLM(config).model.embed_tokens
    pristine = copy.deepcopy(base)
    check_against_dense(adapt(base), torch.randint(1, 50, (4, 7)), pristine)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolution(kind):
    build, shape = CONVOLUTIONS[kind]
    torch.manual_seed(0)
    base = build()
    pristine = copy.deepcopy(base)
    layer = adapt(base)
    assert layer.abba_A1.shape == (3, base.weight[0].numel()) and layer.abba_B1.shape == (base.out_channels, 3)
    check_against_dense(layer, torch.randn(shape, requires_grad=True), pristine)


OTHERS = {"embedding": (EMBEDDINGS["plain"], torch.arange(20)),
          "convolution": (CONVOLUTIONS["2d-groups"][0], torch.randn(2, 6, 9, 8))}


@pytest.mark.parametrize("kind", OTHERS)
def test_life_of_other_bases(kind, tmp_path):
    build, x = OTHERS[kind]
    base = build()
    fresh, weight, before = nn.Sequential(copy.deepcopy(base)), base.weight.detach().clone(), base(x)
    model = abba_ext.patch_model(nn.Sequential(base), AbbaConfig(r=4, target_modules=["0"]))
    torch.testing.assert_close(model(x), before)  # ΔW = 0
    nn.init.normal_(model[0].abba_B2, std=0.1)
    after = model(x)
    assert not torch.allclose(after, before, atol=1e-3)

    abba_ext.save_adapter(model, tmp_path)
    assert torch.equal(abba_ext.load_adapter(fresh, tmp_path)(x), after)
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    for twin in (copy.deepcopy(model), torch.load(pickled, weights_only=False)):
        assert torch.equal(twin(x), after)
    abba_ext.merge(model)
    torch.testing.assert_close(model(x), after)
    abba_ext.unmerge(model)
    assert torch.equal(model[0].weight, weight)
    torch.testing.assert_close(abba_ext.merge_and_unload(fresh, safe=True)(x), after)
    assert type(fresh[0]) is type(build())
    abba_ext.unpatch_model(model)
    assert torch.equal(model(x), before) and type(model[0]) is type(build())


def test_only_named_layers_other_than_linear_are_adapted():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Unflatten(-1, (4, 1)), nn.Conv1d(4, 4, 1))
    for wanted in (None, "all-linear"):
        patched = abba_ext.patch_model(copy.deepcopy(model), AbbaConfig(r=2, target_modules=wanted))
        assert list(abba_ext.abba_layers(patched)) == ["1"]
    patched = abba_ext.patch_model(model, AbbaConfig(r=2, target_modules=["0", "3"]))
    assert list(abba_ext.abba_layers(patched)) == ["0", "3"]


@pytest.mark.parametrize("module, reason", [
    (nn.Embedding(5, 4, max_norm=1.0), "max_norm"), (nn.Embedding(5, 4, scale_grad_by_freq=True), "scale_grad_by_freq"),
    (nn.ConvTranspose1d(2, 2, 1), "is a ConvTranspose1d"), (nn.LayerNorm(4), "is a LayerNorm")])
def test_refusals(module, reason):
    with pytest.raises(ValueError, match=reason):
        abba_ext.patch_model(nn.Sequential(module), AbbaConfig(target_modules=["0"]))


# --- stacked experts ---

_MOE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64)
EXPERTS = {
    "qwen3": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**_MOE, head_dim=8, moe_intermediate_size=16, num_experts=4,
                                                              num_experts_per_tok=2)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_MOE, num_local_experts=4)),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**_MOE, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
                                                            pad_token_id=0)),
}
CONFIG = AbbaConfig(r1=2, r2=3, alpha=2.0, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])


def build_experts(name):
    torch.manual_seed(0)
    model = EXPERTS[name]().eval()
    for parameter in model.parameters():  # gpt_oss leaves its experts uninitialised
        nn.init.normal_(parameter, std=0.2)
    return model


def perturb(model):
    torch.manual_seed(1)
    for layer in abba_ext.abba_layers(model).values():
        nn.init.normal_(layer.abba_B2, std=0.2)


IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_against_dense(name):
    model = build_experts(name)
    dense = copy.deepcopy(model).double()
    dense.set_experts_implementation("eager")  # the others have no fp64
    before = model(IDS).logits
    abba_ext.patch_model(model, CONFIG)
    torch.testing.assert_close(model(IDS).logits, before)  # ΔW = 0
    perturb(model)
    layers = abba_ext.abba_layers(model)
    assert len(layers) == 4 and all(isinstance(layer, AbbaParameter) and layer.abba_A1.dim() == 3 for layer in layers.values())
    model(IDS, labels=IDS).loss.backward()

    factors = {layer: fp64_factors(module) for layer, module in layers.items()}
    weights = {}
    for layer, (a1, b1, a2, b2) in factors.items():
        owner, _, leaf = layer.rpartition(".abba_")
        delta = layers[layer].abba_scale * (b1 @ a1) * (b2 @ a2)
        weight = dense.get_parameter(f"{owner}.{leaf}")
        weights[f"{owner}.{leaf}"] = weight.detach() + (delta.mT if name == "gpt_oss" else delta)
    truth = functional_call(dense, weights, (IDS,), {"labels": IDS})
    truth.loss.backward()
    assert_close_to_truth(model(IDS).logits, truth.logits, 1e-5, "logits")
    for layer, doubles in factors.items():
        for key, double in zip(FACTORS, doubles, strict=True):
            assert_close_to_truth(getattr(layers[layer], key).grad, double.grad, 1e-4, f"{layer}.{key}")
    assert all(p.grad is None for n, p in model.named_parameters() if "abba_" not in n)


def test_every_implementation_of_the_experts_sees_the_update():
    model = abba_ext.patch_model(build_experts("qwen3"), CONFIG)
    perturb(model)
    outputs = {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        outputs[implementation] = model(IDS).logits
    for output in outputs.values():
        torch.testing.assert_close(output, outputs["eager"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_experts_with_gradient_checkpointing(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = abba_ext.patch_model(build_experts("qwen3"), CONFIG).train()
        perturb(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.any()
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("name", EXPERTS)
def test_life_of_experts(name, tmp_path):
    model, fresh = build_experts(name), build_experts(name)
    state, before = copy.deepcopy(model.state_dict()), model(IDS).logits
    config = AbbaConfig(r1=2, r2=3, alpha=2.0, target_parameters=CONFIG.target_parameters,
                        rank_pattern={"gate_up_proj": (4, 1)}, alpha_pattern={"gate_up_proj": 6.0})
    abba_ext.patch_model(model, config)
    layers = abba_ext.abba_layers(model)
    gates = [layer for name, layer in layers.items() if name.endswith("abba_gate_up_proj")]
    assert gates and {(layer.abba_ranks, layer.abba_scale) for layer in gates} == {((4, 1), 18.0)}
    assert any(name.endswith("q_proj") for name in layers)  # beside the default layers
    perturb(model)
    after = model(IDS).logits
    assert not torch.allclose(after, before, atol=1e-3)
    abba_ext.save_adapter(model, tmp_path)
    assert torch.equal(abba_ext.load_adapter(fresh, tmp_path)(IDS).logits, after)
    assert torch.equal(copy.deepcopy(model)(IDS).logits, after)
    with abba_ext.disable_adapter(model):
        torch.testing.assert_close(model(IDS).logits, before)
    abba_ext.merge(model)
    torch.testing.assert_close(model(IDS).logits, after, rtol=1e-4, atol=1e-4)
    abba_ext.unmerge(model)
    merged = abba_ext.merge_and_unload(fresh)
    assert set(merged.state_dict()) == set(state)
    torch.testing.assert_close(merged(IDS).logits, after, rtol=1e-4, atol=1e-4)
    abba_ext.unpatch_model(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()) and len(model.state_dict()) == len(state)
    assert torch.equal(model(IDS).logits, before)


def test_an_owner_that_fails_shows_its_own_parameter_again():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            return linear(x, self.table)

    model = abba_ext.patch_model(nn.Sequential(Owner()), AbbaConfig(r=2, target_modules=[], target_parameters=["table"]))
    perturb(model)
    x = torch.randn(3, 6)
    after = model(x)
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 5))
    assert model[0].table is model[0]._parameters["table"] and torch.equal(model(x), after)


@pytest.mark.parametrize("wanted, message", [
    (["gate_proj_up"], "no parameter is named 'gate_proj_up'"), (["q_proj.weight"], "belongs to a Linear; adapt that layer"),
    (["input_layernorm.weight"], r"is a parameter of shape \[32\]")])
def test_bad_target_parameters(wanted, message):
    with pytest.raises(ValueError, match=message):
        abba_ext.patch_model(build_experts("qwen3"), AbbaConfig(r=4, target_modules=[], target_parameters=wanted))


def test_stacked_weight_layout():
    owner = nn.Module()
    owner.w = nn.Parameter(torch.randn(3, 5, 7))
    base = bases.ParameterBase(owner, "w")
    assert bases.features(base) == (7, 5) and bases.stack_shape(base) == (3,)
    owner.is_transposed = True
    assert bases.features(base) == (5, 7) and torch.equal(bases.to_layout(base, bases.weight_matrix(base)), owner.w)
