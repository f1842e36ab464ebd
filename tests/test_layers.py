"""One layer: start of training, forward, dropout, merging, copying."""
import copy
import io
import re

import pytest
import torch
from oracle import assert_close_to_truth, dense_linear
from torch import nn
from transformers.pytorch_utils import Conv1D

import abba_ext
from abba_ext import AbbaConfig, AbbaLayer, AbbaLinear
from abba_ext.layers import FACTORS, init_factors


def make(kind="linear", n=24, m=40, dtype=torch.float32, config=None, perturb=True, **kwargs):
    torch.manual_seed(0)
    base = nn.Linear(n, m) if kind == "linear" else Conv1D(m, n)
    layer = AbbaLinear.from_linear(base.to(dtype), config or AbbaConfig(r1=3, r2=5, alpha=2.0, **kwargs), "layer")
    if perturb:
        with torch.no_grad():
            layer.abba_B2.normal_(std=0.1)
    return layer


def matrix(layer):
    return layer.weight.t() if isinstance(layer, Conv1D) else layer.weight


def truth(layer, x):
    factors = [getattr(layer, name).detach() for name in FACTORS]
    return dense_linear(x.detach(), matrix(layer).detach(), layer.bias.detach(), *factors, layer.abba_scale)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_forward_and_gradients(kind):
    layer = make(kind)
    x = torch.randn(2, 7, 24, requires_grad=True)
    y = layer(x)
    assert_close_to_truth(y, truth(layer, x), 1e-6)
    y.square().sum().backward()
    doubles = [getattr(layer, name).detach().double().requires_grad_() for name in FACTORS]
    xd = x.detach().double().requires_grad_()
    dense_linear(xd, matrix(layer).detach(), layer.bias.detach(), *doubles, layer.abba_scale).square().sum().backward()
    assert_close_to_truth(x.grad, xd.grad, 1e-5, "dx")
    for name, double in zip(FACTORS, doubles):
        assert_close_to_truth(getattr(layer, name).grad, double.grad, 1e-5, name)
    assert layer.weight.grad is None and not layer.weight.requires_grad


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("init", ["svd", "random"])
def test_update_starts_at_zero_with_a_gradient(kind, init):
    layer = make(kind, perturb=False, init=init)
    assert not layer.delta_weight().any()
    layer(torch.randn(5, 24)).sum().backward()
    assert layer.abba_B2.grad.abs().sum() > 0
    assert layer.abba_A1.shape == (3, 24) and layer.abba_B1.shape == (40, 3)
    assert layer.abba_A2.shape == (5, 24) and layer.abba_B2.shape == (40, 5)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("n, m, r1", [(60, 80, 8), (300, 200, 16), (8, 30, 8)])
def test_svd_start_is_the_best_low_rank_approximation(kind, n, m, r1):
    layer = make(kind, n, m, config=AbbaConfig(r1=r1, r2=4), perturb=False)
    weight = matrix(layer).detach().double()
    best = torch.linalg.svdvals(weight)[r1:].norm()
    error = (weight - layer.abba_B1.double() @ layer.abba_A1.double()).norm()
    assert error <= 1.01 * best + 1e-5 * weight.norm()  # randomised SVD within 1 % of Eckart–Young
    torch.testing.assert_close(layer.abba_B1.norm(dim=0), layer.abba_A1.norm(dim=1))  # √Σ on both sides


def test_ranks_beyond_the_weight_stay_trainable():
    layer = make(n=6, m=5, config=AbbaConfig(r1=9, r2=2), perturb=False)
    torch.testing.assert_close(layer.abba_B1 @ layer.abba_A1, layer.weight, atol=1e-5, rtol=1e-4)
    assert (layer.abba_A1[5:].norm(dim=1) > 0).all()


def test_start_depends_on_seed_and_name_alone():
    linear = nn.Linear(20, 30)
    first = init_factors(linear, AbbaConfig(seed=1), "a")
    torch.randn(10)
    state = torch.get_rng_state()
    again = init_factors(linear, AbbaConfig(seed=1), "a")
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random stream is not consumed
    assert all(torch.equal(first[key], again[key]) for key in FACTORS)
    assert not torch.equal(first["abba_A2"], init_factors(linear, AbbaConfig(seed=2), "a")["abba_A2"])
    assert not torch.equal(first["abba_A2"], init_factors(linear, AbbaConfig(seed=1), "b")["abba_A2"])


def test_random_factors_are_kaiming_uniform():
    """A2 as torch's default and the authors' code have it, the others as LoRA's A."""
    factors = init_factors(nn.Linear(400, 300), AbbaConfig(r1=8, r2=6, init="random"))
    for key, bound in (("abba_A1", 400**-0.5), ("abba_B1", 8**-0.5), ("abba_A2", (6 / 400)**0.5)):
        assert 0.99 * bound < factors[key].abs().max() <= bound


def test_svd_needs_the_weight():
    broken = nn.Linear(4, 4)
    broken.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        init_factors(broken, AbbaConfig(), "x")


def test_dropout_acts_on_the_adapter_alone_and_in_training_alone():
    layer = make(dropout=0.5)
    x = torch.randn(64, 24)
    clean = layer.eval()(x)
    assert torch.equal(clean, layer(x))
    layer.train()
    torch.manual_seed(3)
    noisy = layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    update = dropped.double() @ layer.delta_weight().double().t()
    assert_close_to_truth(noisy, base.double() + update, 1e-6)
    assert not torch.allclose(noisy, clean)
    layer.abba_enabled = False
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_merge_and_unmerge(kind, dtype):
    layer = make(kind, dtype=dtype).eval()
    base = layer.weight.detach().clone()
    x = torch.randn(9, 24, dtype=dtype)
    y = layer(x)
    exact = matrix(layer).detach().double() + layer.delta_weight().double()
    layer.merge(safe=True)
    layer.merge()  # again: nothing
    assert torch.equal(matrix(layer), exact.to(dtype)) or (matrix(layer).double() - exact).norm() < exact.norm() * torch.finfo(dtype).eps
    assert_close_to_truth(layer(x), y.double(), 4 * torch.finfo(dtype).eps)
    layer.unmerge()
    assert torch.equal(layer.weight, base)
    assert torch.equal(layer(x), y)


def test_merge_refusals():
    layer = make()
    layer.merge(keep_base=False)
    with pytest.raises(RuntimeError, match="merged with keep_base=False"):
        layer.unmerge()
    layer = make()
    base = layer.weight.detach().clone()
    layer.abba_A1.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinity; the weight is left as it was"):
        layer.merge(safe=True)
    assert torch.equal(layer.weight, base) and not layer.abba_merged


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_copy_and_pickle(kind):
    layer = make(kind)
    x = torch.randn(3, 24)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert type(other) is type(layer) and torch.equal(other(x), layer(x))
        assert other.weight.data_ptr() != layer.weight.data_ptr()
        other.abba_B2.data.zero_()
        assert not torch.equal(other(x), layer(x))


def test_type_checkers_know_what_is_documented():
    documented = re.findall(r"^        (abba_\w+): ", AbbaLayer.__doc__, re.M)
    assert len(documented) == 6 and set(documented) <= set(AbbaLayer.__annotations__)


def test_stand_alone_layer():
    layer = AbbaLinear(8, 6, config=AbbaConfig(r=4), dtype=torch.bfloat16)
    assert layer(torch.randn(3, 8, dtype=torch.bfloat16)).shape == (3, 6)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == set(FACTORS)
    assert "r1=2, r2=2" in repr(layer) and "in_features=8" in repr(layer)
    with pytest.raises(TypeError, match="linear: is a ConvTranspose2d; linear layers"):
        AbbaLinear.from_linear(nn.ConvTranspose2d(1, 1, 1))
    with pytest.raises(TypeError, match="is adapted already"):
        AbbaLinear.from_linear(layer)
    for wrong in ({"r": 4}, {}):
        with pytest.raises(TypeError, match="config must be an AbbaConfig, got dict"):
            AbbaLinear.from_linear(nn.Linear(4, 4), wrong)
        with pytest.raises(TypeError, match="config must be an AbbaConfig, got dict"):
            AbbaLinear(4, 4, config=wrong)


class HalvedLinear(nn.Linear):
    """A linear layer with a forward of its own, as quantised ones have."""

    def forward(self, x):
        return super().forward(x) / 2


def test_subclass_keeps_its_own_forward():
    base = HalvedLinear(6, 5)
    layer = AbbaLinear.from_linear(base, AbbaConfig(r=4))
    layer.abba_B2.data.normal_()
    x = torch.randn(3, 6, requires_grad=True)
    expected = nn.functional.linear(x, layer.weight, layer.bias) / 2 + x @ layer.delta_weight().t()
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(torch.autograd.grad(layer(x).sum(), x), torch.autograd.grad(expected.sum(), x))


def test_accelerate_hook_calls_the_adapted_forward():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    linear = nn.Linear(6, 5)
    add_hook_to_module(linear, ModelHook())
    layer = AbbaLinear.from_linear(linear, AbbaConfig(r=4))
    layer.abba_B2.data.normal_()
    x = torch.randn(3, 6)
    expected = nn.functional.linear(x, layer.weight, layer.bias) + x @ layer.delta_weight().t()
    torch.testing.assert_close(layer(x), expected)
    remove_hook_from_module(layer)
    torch.testing.assert_close(layer(x), expected)


def test_accelerate_hook_calls_the_base_again_after_unpatching():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = nn.Sequential(nn.Linear(6, 5))
    add_hook_to_module(model[0], ModelHook())
    x, base = torch.randn(3, 6), nn.Linear.forward
    abba_ext.unpatch_model(abba_ext.patch_model(model, AbbaConfig(r=4)))
    assert torch.equal(model(x), base(model[0], x))
    remove_hook_from_module(model[0])
    assert torch.equal(model(x), base(model[0], x))


def test_start_does_not_depend_on_defaults():
    expected = AbbaLinear.from_linear(linear := nn.Linear(24, 16), AbbaConfig(r=8))
    again = nn.Linear(24, 16)
    again.load_state_dict(linear.state_dict(), strict=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            AbbaLinear.from_linear(again, AbbaConfig(r=8))
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(getattr(again, key), getattr(expected, key)) for key in FACTORS)


def test_start_leaves_every_random_stream_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    linear = nn.Linear(24, 16)
    state = torch.get_rng_state()
    AbbaLinear.from_linear(linear, AbbaConfig(r=8, seed=3))
    assert torch.equal(torch.get_rng_state(), state) and not seeded


@pytest.mark.parametrize("weight_norm", [nn.utils.parametrizations.weight_norm, torch.nn.utils.weight_norm])
def test_computed_weight_is_not_merged(weight_norm):
    model = abba_ext.patch_model(nn.Sequential(weight_norm(nn.Linear(8, 8))), AbbaConfig(r=4, init="random"))
    model[0].abba_B2.data.normal_()
    model(torch.randn(2, 8)).sum().backward()
    with pytest.raises(TypeError, match="cannot merge into a weight that is computed from other parameters, as by weight_norm"):
        abba_ext.merge_and_unload(model)
    assert abba_ext.is_patched(model)


def test_replaced_forward_is_refused():
    linear = nn.Linear(6, 5)
    linear.forward = lambda x: x
    with pytest.raises(TypeError, match="forward replaced on the instance"):
        AbbaLinear.from_linear(linear)


def test_compiled_layer_without_graph_breaks():
    torch._dynamo.reset()
    layer = make(dropout=0.0)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(7, 24, requires_grad=True)
    y = compiled(x)
    assert_close_to_truth(y, truth(layer, x), 1e-6)
    y.sum().backward()
    expected = torch.autograd.grad(layer(x).sum(), (x, layer.abba_A1, layer.abba_B2))
    for ours, theirs in zip((x.grad, layer.abba_A1.grad, layer.abba_B2.grad), expected):
        torch.testing.assert_close(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16
