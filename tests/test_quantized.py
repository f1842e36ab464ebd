"""Quantised bases: the layer equals the dequantised layer with ABBA, in values, gradients and start; QABBA on a real model."""
import copy

import pytest
import torch
from oracle import assert_close_to_truth, relative_error
from torch import nn

import abba_ext
from abba_ext import AbbaConfig, bases
from abba_ext.layers import FACTORS

bnb = pytest.importorskip("bitsandbytes")
torchao_quantization = pytest.importorskip("torchao.quantization")
PerGroup = torchao_quantization.PerGroup


def four_bit(linear, quant_type):
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.float32, quant_type=quant_type)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def eight_bit(linear):
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def torchao(linear, config):
    model = nn.Sequential(copy.deepcopy(linear))
    torchao_quantization.quantize_(model, config)
    return model[0]


def hqq(linear):
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=32)
    return quantize.HQQLinear(copy.deepcopy(linear), config, compute_dtype=torch.float32, device="cpu")


QUANTIZE = {
    "bnb nf4": lambda linear: four_bit(linear, "nf4"),
    "bnb fp4": lambda linear: four_bit(linear, "fp4"),
    "bnb int8": eight_bit,
    "torchao int8": lambda linear: torchao(linear, torchao_quantization.Int8WeightOnlyConfig()),
    "torchao int4": lambda linear: torchao(linear, torchao_quantization.IntxWeightOnlyConfig(torch.int4, PerGroup(32))),
    "hqq 4 bit": hqq,
}


@pytest.fixture(params=QUANTIZE)
def quantized(request):
    torch.manual_seed(0)
    return QUANTIZE[request.param](nn.Linear(64, 128).requires_grad_(False))


def adapt(layer, **config):
    model = abba_ext.patch_model(nn.Sequential(layer), AbbaConfig(r1=3, r2=4, alpha=1.0, **config))
    nn.init.normal_(model[0].abba_B2, std=0.05)
    return model


def test_equals_the_dequantised_layer(quantized):
    weight = bases.weight_matrix(quantized).detach().double()
    assert weight.shape == (128, 64)
    x = torch.randn(5, 64, requires_grad=True)
    with torch.no_grad():
        base = quantized(x)
    plain_error = relative_error(base, x.detach().double() @ weight.t() + quantized.bias.double())
    layer = adapt(quantized)[0]
    y = layer(x)
    y.square().sum().backward()

    factors = [getattr(layer, name).detach().double().requires_grad_() for name in FACTORS]
    a1, b1, a2, b2 = factors
    x64 = x.detach().double().requires_grad_()
    truth = x64 @ (weight + layer.abba_scale * (b1 @ a1) * (b2 @ a2)).t() + layer.bias.detach().double()
    (truth - truth.detach() + y.detach().double()).square().sum().backward()  # the same dy: int8 layers round their output
    tolerance = 1e-5 + plain_error  # what the base's own kernel rounds
    assert_close_to_truth(y, truth, 2 * tolerance, "output")
    for name, factor in zip(FACTORS, factors, strict=True):
        assert_close_to_truth(getattr(layer, name).grad, factor.grad, 1e-5, name)
    assert_close_to_truth(x.grad, x64.grad, 2 * tolerance, "dx")


def test_starts_from_the_svd_of_the_dequantised_weight(quantized):
    weight = bases.weight_matrix(quantized).detach().double()
    layer = abba_ext.patch_model(nn.Sequential(quantized), AbbaConfig(r1=5, r2=3))[0]
    u, sigma, v = torch.linalg.svd(weight)
    best = (sigma[5:].square().sum() / sigma.square().sum()).sqrt().item()
    start = layer.abba_B1.detach().double() @ layer.abba_A1.detach().double()
    assert relative_error(start, weight) <= 1.02 * best
    assert not layer.delta_weight().any()


def test_life_of_a_quantised_layer(quantized, tmp_path):
    x = torch.randn(5, 64)
    fresh, before = nn.Sequential(copy.deepcopy(quantized)), quantized(x)
    model = adapt(quantized)
    abba_ext.save_adapter(model, tmp_path)
    after = model(x)
    assert torch.equal(abba_ext.load_adapter(fresh, tmp_path)(x), after) and not torch.allclose(after, before, atol=1e-3)
    with pytest.raises(TypeError, match="only plain floating-point weights can take ΔW"):
        abba_ext.merge_and_unload(model)
    assert torch.equal(model(x), after)
    assert torch.equal(abba_ext.unpatch_model(model)(x), before)
