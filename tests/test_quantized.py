"""Quantised bases: the layer equals the dequantised layer with ABBA, in values, gradients and start; QABBA on a real model."""
import copy

import pytest
import torch
from oracle import assert_close_to_truth, relative_error
from torch import nn

import abba_ext
from abba_ext import AbbaConfig, AbbaLinear, bases
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


GROUP = 32


def quantisation_grid(weight):
    """Scales and zeros [m, n / GROUP] of the weight in four bits, and the weight [m, n] rounded to their grid, in fp64."""
    groups = weight.detach().double().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scales = ((high - low) / 15).half().double()  # as the packed layers keep them
    zeros = (-low / scales).round()
    rounded = ((groups / scales + zeros).round().clamp(0, 15) - zeros) * scales
    return scales.squeeze(-1).float(), zeros.squeeze(-1).float(), rounded.flatten(1)


def packed(kernel, linear):
    return kernel(bits=4, group_size=GROUP, sym=False, desc_act=False, in_features=linear.in_features,
                  out_features=linear.out_features, bias=linear.bias is not None, register_buffers=True)


def gptq(linear, kernel="torch.TorchLinear"):
    module, _, name = kernel.partition(".")
    layer = packed(getattr(pytest.importorskip(f"gptqmodel.nn_modules.qlinear.{module}"), name), linear)
    scales, zeros, _ = quantisation_grid(linear.weight)
    layer.pack_original(linear, scales, zeros)
    layer.optimized = True  # no torch.compile
    layer.post_init()
    return layer


def awq(linear):
    layer = packed(pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq").AwqTorchLinear, linear)
    scales, zeros, rounded = quantisation_grid(linear.weight)
    linear = copy.deepcopy(linear)
    linear.weight.data = rounded.float()  # its packing does not clamp
    layer.pack(linear, scales, zeros)
    layer.post_init()
    return layer


QUANTIZE = {
    "bnb nf4": lambda linear: four_bit(linear, "nf4"),
    "bnb fp4": lambda linear: four_bit(linear, "fp4"),
    "bnb int8": eight_bit,
    "torchao int8": lambda linear: torchao(linear, torchao_quantization.Int8WeightOnlyConfig()),
    "torchao int4": lambda linear: torchao(linear, torchao_quantization.IntxWeightOnlyConfig(torch.int4, PerGroup(32))),
    "hqq 4 bit": hqq,
    "gptq 4 bit": gptq,
    "awq 4 bit": awq,
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
    assert plain_error < 0.02
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


def test_one_layer_is_adapted_in_place(quantized):
    layer = AbbaLinear.from_linear(quantized, AbbaConfig(r1=3, r2=4))
    assert layer is quantized
    assert {name for name, parameter in layer.named_parameters() if parameter.requires_grad} == set(FACTORS)


@pytest.mark.parametrize("quantize", [gptq, awq])
def test_reads_the_packed_weight_beside_a_large_bias(quantize):
    torch.manual_seed(0)
    linear = nn.Linear(64, 128).requires_grad_(False)
    linear.bias.fill_(100)  # as Qwen2's
    _, _, rounded = quantisation_grid(linear.weight)
    layer = quantize(linear)
    assert relative_error(bases.weight_matrix(layer), rounded) < 2**-11
    adapt(layer)
    assert relative_error(bases.weight_matrix(layer), rounded) < 2**-11
    assert (layer.bias == 100).all()


def test_weight_that_the_kernel_does_not_give():
    class Closed(nn.Module):
        in_features, out_features, bias = 8, 4, None

        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(1, 4, dtype=torch.int32))
            self.register_buffer("scales", torch.ones(1, 4))

        def forward(self, x):
            raise RuntimeError("bfloat16 only")

    model = nn.Sequential(Closed())
    with pytest.raises(ValueError, match=r"init 'svd' of '0': .* Closed, .*\(bfloat16 only\); or use init='random'"):
        abba_ext.patch_model(model)
    assert not abba_ext.is_patched(model)
    abba_ext.patch_model(model, AbbaConfig(init="random"))


def test_base_without_a_gradient_of_its_input():
    x = torch.randn(5, 64, dtype=torch.float16, requires_grad=True)
    torch.manual_seed(0)
    linear = nn.Linear(64, 128).requires_grad_(False)
    layer = gptq(linear, "torch_aten_kernel.TorchAtenLinear").eval()
    model = adapt(layer).train()  # the start by SVD leaves the kernel as it was
    model(x).sum().backward()
    assert torch.isfinite(x.grad).all()

    layer = gptq(linear, "torch_aten_kernel.TorchAtenLinear").eval()
    layer(x.detach())  # from now on it computes without gradients
    model = adapt(layer).train()
    assert torch.isfinite(model(x)).all()
    with pytest.raises(RuntimeError, match="this TorchAtenLinear computes no gradient of its input"):
        model(x).sum().backward()
    model(x.detach()).sum().backward()
    assert layer.abba_B2.grad.any()


@pytest.mark.parametrize("quantize", [gptq, awq])
def test_llama_of_packed_layers_learns_as_the_dequantised_one(quantize):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    dequantised = transformers.LlamaForCausalLM(config)
    model = copy.deepcopy(dequantised)
    for name, linear in list(dequantised.model.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            model.model.layers.set_submodule(name, quantize(linear.requires_grad_(False)))
            linear.weight.copy_(quantisation_grid(linear.weight)[2])
    ids = torch.randint(3, 60, (2, 12))

    def losses(model):
        model = abba_ext.patch_model(model, AbbaConfig(r1=3, r2=4, alpha=2.0)).train()
        assert len(abba_ext.abba_layers(model)) == 14
        optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=2e-2)
        for _ in range(12):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()

    base = {name: buffer.clone() for name, buffer in model.named_buffers()}
    packed_losses = list(losses(model))
    assert packed_losses == sorted(packed_losses, reverse=True) and packed_losses[-1] < packed_losses[0] - 0.1
    assert packed_losses == pytest.approx(list(losses(dequantised)), rel=1e-3)
    assert all(torch.equal(buffer, base[name]) for name, buffer in model.named_buffers())
