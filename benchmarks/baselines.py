"""The methods that are compared: one frozen linear layer with one adapter, built from the same random factors.

Every method states its own definition as a dense effective weight W(W0, parameters) [m, n], y = x Wᵀ, and
:func:`verify` compares its output and all its gradients with autograd through that definition in fp64.
All adapters are non-zero and of one size, ‖ΔW‖ ≈ ‖W0‖/2, and all have r·(m + n) parameters (DoRA: m more).

Parameter dtypes beside half-precision activations: ABBA (eager and abba_ext) and the in-place LoRA hold float32 masters
and cast inside, as in training; PEFT's layers hold their parameters in the base weight's dtype, which is what
`inject_adapter_in_model` gives and is faster than PEFT's float32 default (that runs the adapter's products in float32).
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from harness import TOLERANCE, relative_error
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.functional import linear

from abba_ext import abba_linear, kernel_plan, reference

SCALE = 0.5


@dataclass
class Layer:
    """A method bound to one frozen weight.

    Attributes:
        forward: x [T, n] → y [T, m].
        parameters: The trainable tensors by name.
        effective_weight: (W0, parameters) → dense [m, n], the method's definition in plain torch.
        note: What the method chose for this case, e.g. its plan.
    """

    forward: Callable[[Tensor], Tensor]
    parameters: dict[str, Tensor]
    effective_weight: Callable[[Tensor, dict[str, Tensor]], Tensor]
    note: str = ""


@dataclass
class Problem:
    """A frozen weight, an input, an output gradient and the factors that all methods start from.

    Attributes:
        weight: W0 [m, n], frozen.
        x: [T, n]; requires a gradient, as inside a network.
        dy: [T, m].
        rank: r, the parameter budget; r1 = r2 = r/2.
        lora: A [r, n] and B [m, r], float32 (float64 in fp64).
        abba: A1 [r1, n], B1 [m, r1], A2 [r2, n], B2 [m, r2], likewise.
    """

    weight: Tensor
    x: Tensor
    dy: Tensor
    rank: int
    lora: dict[str, Tensor] = field(default_factory=dict)
    abba: dict[str, Tensor] = field(default_factory=dict)


def make_problem(in_features: int, out_features: int, tokens: int, rank: int, dtype: torch.dtype,
                 device: str | torch.device = "cpu", seed: int = 0) -> Problem:
    """Random W0, x, dy and factors; W0 has entries of variance 1/n, ΔW a quarter of that in every method."""
    if rank < 2 or rank % 2:
        raise ValueError(f"rank must be even and at least 2 (r1 = r2 = rank/2), got {rank}")
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = wide) -> Tensor:
        return (std * torch.randn(shape, generator=generator, device=device, dtype=wide)).to(dtype)

    n, m, half = in_features, out_features, rank // 2
    update = 0.5 / (SCALE * math.sqrt(n))  # standard deviation of ΔW / s
    pair = math.sqrt(update) / math.sqrt(half)
    return Problem(
        normal(m, n, std=1 / math.sqrt(n), dtype=dtype), normal(tokens, n, dtype=dtype).requires_grad_(),
        normal(tokens, m, dtype=dtype), rank,
        {"a": normal(rank, n), "b": normal(m, rank, std=update / math.sqrt(rank))},
        {"a1": normal(half, n, std=math.sqrt(pair)), "b1": normal(m, half, std=math.sqrt(pair)),
         "a2": normal(half, n, std=math.sqrt(pair)), "b2": normal(m, half, std=math.sqrt(pair))})


def _parameters(factors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: factor.clone().requires_grad_() for name, factor in factors.items()}


# --- no adapter ---


def build_base(problem: Problem) -> Layer:
    """The frozen layer alone."""
    return Layer(lambda x: linear(x, problem.weight), {}, lambda weight, _: weight)


# --- LoRA ---


def _lora_weight(weight: Tensor, p: dict[str, Tensor]) -> Tensor:
    return weight + SCALE * p["b"] @ p["a"]


class InPlaceLora(torch.autograd.Function):
    """y = x W0ᵀ + bias + s·(x Aᵀ) Bᵀ, the update added into the base product's fresh output; likewise dx. x [T, n]."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):
        a_cast, b_cast = a.to(x.dtype), b.to(x.dtype)
        u = x @ a_cast.t()
        y = linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        y.addmm_(u, b_cast.t(), alpha=scale)
        ctx.save_for_backward(x, weight, a, b, u)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, a, b, u = ctx.saved_tensors
        du = dy @ b.to(x.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight.to(x.dtype)
            dx.addmm_(du, a.to(x.dtype), alpha=ctx.scale)
        da = (ctx.scale * (du.t() @ x)).to(a.dtype)
        db = (ctx.scale * (dy.t() @ u)).to(b.dtype)
        return dx, None, None, da, db, None


def build_lora_inplace(problem: Problem) -> Layer:
    """LoRA as one autograd node with addmm into the base output: the technique of Unsloth and Axolotl."""
    p = _parameters(problem.lora)
    return Layer(lambda x: InPlaceLora.apply(x, problem.weight, None, p["a"], p["b"], SCALE), p, _lora_weight)


# --- PEFT ---


def _inject(config, problem: Problem) -> nn.Module:
    """PEFT's layer around a bias-free linear layer that shares the problem's weight."""
    m, n = problem.weight.shape
    base = nn.Linear(n, m, bias=False, device="meta")
    base.weight = nn.Parameter(problem.weight, requires_grad=False)
    return inject_adapter_in_model(config, nn.ModuleDict({"layer": base}))["layer"]


def _peft_layer(module: nn.Module, values: dict[str, tuple[Tensor, Tensor]], effective_weight) -> Layer:
    """Sets each named parameter (parameter, value) and wraps the module."""
    with torch.no_grad():
        for parameter, value in values.values():
            parameter.copy_(value)
    return Layer(module, {name: parameter for name, (parameter, _) in values.items()}, effective_weight)


def _lora_layer(config: LoraConfig, problem: Problem) -> Layer:
    module = _inject(config, problem)
    return _peft_layer(module, {"a": (module.lora_A["default"].weight, problem.lora["a"]),
                                "b": (module.lora_B["default"].weight, problem.lora["b"])}, _lora_weight)


def build_lora_peft(problem: Problem) -> Layer:
    """PEFT LoRA."""
    return _lora_layer(LoraConfig(r=problem.rank, lora_alpha=SCALE * problem.rank, target_modules=["layer"]), problem)


def build_rslora_peft(problem: Problem) -> Layer:
    """PEFT rsLoRA: LoRA with s = α/√r."""
    return _lora_layer(LoraConfig(r=problem.rank, lora_alpha=SCALE * math.sqrt(problem.rank), use_rslora=True,
                                  target_modules=["layer"]), problem)


def build_pissa_peft(problem: Problem) -> Layer:
    """PEFT PiSSA: W = W0 − s·B₀A₀ + s·BA, with s·B₀A₀ the best rank-r approximation of W0; not in float64, by PEFT."""
    module = _inject(LoraConfig(r=problem.rank, lora_alpha=SCALE * problem.rank, init_lora_weights="pissa",
                                target_modules=["layer"]), problem)
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    principal = SCALE * b.detach().double() @ a.detach().double()
    return _peft_layer(module, {"a": (a, problem.lora["a"]), "b": (b, problem.lora["b"])},
                       lambda weight, p: _lora_weight(weight - principal, p))


def build_dora_peft(problem: Problem) -> Layer:
    """PEFT DoRA: W = diag(g / ‖W0 + s·BA‖_row) (W0 + s·BA), the norm held constant in backward."""
    module = _inject(LoraConfig(r=problem.rank, lora_alpha=SCALE * problem.rank, use_dora=True,
                                target_modules=["layer"]), problem)
    magnitude = module.lora_magnitude_vector["default"].weight

    def effective_weight(weight: Tensor, p: dict[str, Tensor]) -> Tensor:
        adapted = _lora_weight(weight, p)
        return (p["magnitude"] / adapted.detach().norm(dim=1))[:, None] * adapted

    return _peft_layer(module, {"a": (module.lora_A["default"].weight, problem.lora["a"]),
                                "b": (module.lora_B["default"].weight, problem.lora["b"]),
                                "magnitude": (magnitude, 1.25 * magnitude)}, effective_weight)


def build_loha_peft(problem: Problem) -> Layer:
    """PEFT LoHa: the same ΔW as ABBA, formed dense in every forward."""
    half = problem.rank // 2
    module = _inject(LoHaConfig(r=half, alpha=SCALE * half, target_modules=["layer"]), problem)
    names = {"a1": module.hada_w1_b, "b1": module.hada_w1_a, "a2": module.hada_w2_b, "b2": module.hada_w2_a}
    return _peft_layer(module, {name: (parameters["default"], problem.abba[name])
                                for name, parameters in names.items()}, _abba_weight)


def build_hira_peft(problem: Problem) -> Layer:
    """PEFT HiRA: W = W0 ⊙ (1 + BA), formed dense in every forward."""
    from peft import HiraConfig  # since PEFT 0.21: an older one costs this method alone

    module = _inject(HiraConfig(r=problem.rank, target_modules=["layer"]), problem)
    n = problem.weight.size(1)
    return _peft_layer(module, {"a": (module.hira_A["default"], problem.lora["a"]),
                                "b": (module.hira_B["default"], problem.lora["b"] * SCALE * math.sqrt(n))},
                       lambda weight, p: weight + weight * (p["b"] @ p["a"]))


# --- ABBA ---


def _abba_weight(weight: Tensor, p: dict[str, Tensor]) -> Tensor:
    return weight + SCALE * ((p["b1"] @ p["a1"]) * (p["b2"] @ p["a2"]))


def build_abba_eager(problem: Problem) -> Layer:
    """ABBA with materialised Khatri–Rao factors through autograd: the authors' formula in eager torch."""
    p = _parameters(problem.abba)
    return Layer(lambda x: reference.abba_linear(x, problem.weight, None, p["a1"], p["b1"], p["a2"], p["b2"], SCALE),
                 p, _abba_weight)


def build_abba_ext(problem: Problem, plan: str = "auto") -> Layer:
    """This package's layer."""
    p = _parameters(problem.abba)
    (tokens, n), m, half = problem.x.shape, problem.weight.size(0), problem.rank // 2
    chosen = kernel_plan(tokens, n, m, half, half, problem.x.dtype, problem.x.device, plan)
    return Layer(lambda x: abba_linear(x, problem.weight, None, p["a1"], p["b1"], p["a2"], p["b2"], SCALE, plan=plan),
                 p, _abba_weight, chosen.plan)


def build_abba_ext_khatri_rao(problem: Problem) -> Layer:
    """This package's layer, never through W0 + ΔW."""
    return build_abba_ext(problem, "khatri_rao")


# --- torch.compile ---


def _compiled(layer: Layer) -> Layer:
    layer.forward = torch.compile(layer.forward)
    return layer


def build_lora_peft_compile(problem: Problem) -> Layer:
    """PEFT LoRA under torch.compile."""
    return _compiled(build_lora_peft(problem))


def build_abba_eager_compile(problem: Problem) -> Layer:
    """Eager ABBA under torch.compile."""
    return _compiled(build_abba_eager(problem))


@dataclass(frozen=True)
class Method:
    """A builder and the name it has in tables and plots."""

    build: Callable[[Problem], Layer]
    label: str


METHODS = {
    "base": Method(build_base, "frozen base"),
    "lora_peft": Method(build_lora_peft, "LoRA (PEFT)"),
    "lora_peft_compile": Method(build_lora_peft_compile, "LoRA (PEFT, torch.compile)"),
    "lora_inplace": Method(build_lora_inplace, "LoRA (in-place addmm)"),
    "rslora_peft": Method(build_rslora_peft, "rsLoRA (PEFT)"),
    "pissa_peft": Method(build_pissa_peft, "PiSSA (PEFT)"),
    "dora_peft": Method(build_dora_peft, "DoRA (PEFT)"),
    "hira_peft": Method(build_hira_peft, "HiRA (PEFT)"),
    "loha_peft": Method(build_loha_peft, "LoHa (PEFT)"),
    "abba_eager": Method(build_abba_eager, "ABBA (eager)"),
    "abba_eager_compile": Method(build_abba_eager_compile, "ABBA (eager, torch.compile)"),
    "abba_ext": Method(build_abba_ext, "ABBA (abba_ext)"),
    "abba_ext_khatri_rao": Method(build_abba_ext_khatri_rao, "ABBA (abba_ext, Khatri–Rao plan)"),
}


# --- equality of a method and its definition ---


def errors(layer: Layer, problem: Problem) -> tuple[float, float]:
    """The layer's relative errors against its fp64 definition: of the output, and the largest of all gradients'."""
    leaves = [problem.x, *layer.parameters.values()]
    y = layer.forward(problem.x)
    grads = torch.autograd.grad(y, leaves, problem.dy)

    x, *values = [leaf.detach().double().requires_grad_() for leaf in leaves]
    weight = layer.effective_weight(problem.weight.double(), dict(zip(layer.parameters, values, strict=True)))
    want = linear(x, weight)
    want_grads = torch.autograd.grad(want, [x, *values], problem.dy.double())
    return relative_error(y.detach(), want.detach()), max(map(relative_error, grads, want_grads))


def verify(name: str, layer: Layer, problem: Problem) -> tuple[float, float]:
    """:func:`errors`, or an AssertionError if one exceeds the dtype's tolerance."""
    output, gradient = errors(layer, problem)
    tolerance = TOLERANCE[problem.x.dtype]
    if not max(output, gradient) <= tolerance:
        raise AssertionError(f"{name} differs from its definition: relative error of the output {output:.1e}, of the "
                             f"gradients {gradient:.1e}, tolerance {tolerance:.0e}")
    return output, gradient
