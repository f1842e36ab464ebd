"""The stateless ABBA linear layer: one autograd node built from the three operators of :mod:`abba_ext.ops`."""
import contextlib
import math
import platform
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import ops
from .config import PLANS, check_choice

__all__ = ["KernelPlan", "abba_linear", "abba_update", "delta_weight", "kernel_plan"]

Plan = Literal["auto", "khatri_rao", "mixed", "dense"]


class KernelPlan(NamedTuple):
    """The path that one call of the layer takes, and why.

    Attributes:
        plan: "khatri_rao" (three operators on r1·r2 columns), "dense" (W0 + ΔW formed strip by strip, in backward beside dW),
            or "mixed" (y and dx as in dense, the factors' gradients as in khatri_rao).
        kernel: "cpu" (compiled), "cuda" (handwritten kernels) or "composite" (torch matmuls, for what they do not cover).
        reason: One sentence.
    """

    plan: str
    kernel: str
    reason: str


def kernel_plan(num_tokens: int, in_features: int, out_features: int, r1: int, r2: int,
                dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", plan: Plan = "auto", *,
                factor_dtype: torch.dtype | None = None, training: bool = True) -> KernelPlan:
    """Which path :func:`abba_linear` takes for T tokens, W0 [m, n] and ranks (r1, r2).

    Cost beside the base layer, in floating-point operations, of a training step (of a forward alone), with R = r1·r2:

        khatri_rao   6·T·R·(m+n) (2·T·R·(m+n)), counted as if T were larger by 16 and R by 64: so do products take that do
                     not fill the processor
        mixed        4·T·R·(m+n), counted likewise, and 2·(r1+r2)·m·n to form ΔW twice
        dense        2·T·m·n for dW, and 3.5·(r1+r2)·m·n to form ΔW twice and to contract dW onto the factors
                     ((r1+r2)·m·n to form ΔW)

    Forming and contracting count about half of their operations: they seldom leave the L1 cache. Dense and mixed pay where R
    is large against m·n/(m+n) and T against the ranks; they run in fp32 and fp64 on the CPU, as in half precision a ΔW below
    2⁻⁹·|W0| would be rounded away. Their products are their own, written for x86; on other processors these plans are used
    only where asked for. They sum in another order than torch's, so that with ΔW = 0 the output is the base layer's up to
    rounding. They keep about 2 Mi elements of scratch for each thread.

    The CUDA kernels take bfloat16 and float16 activations and factors in that dtype or float32 (rounded to the activations'
    dtype while they are loaded), r2 up to 64 and r1 up to 65535, on GPUs from compute capability 8.0. Whatever else comes on a GPU
    runs the composite of torch matmuls; so do x and outputs whose innermost stride is not 1. Those for Hopper (9.0) take r2
    of 8, 16, 32 and 64, r1·r2 up to 1024, more than 64 tokens and rows of whole 16 bytes, where ABBA_SM90=1 is set.

    Args:
        num_tokens: T, rows of the flattened input.
        in_features: n.
        out_features: m.
        r1: Rank of the first pair.
        r2: Rank of the second pair.
        dtype: Activation dtype.
        device: Device of the call.
        plan: "auto" chooses by the cost above; a name forces it.
        factor_dtype: Dtype of the four factors; None: float32 beside half-precision activations, else the activations'.
        training: Whether gradients are recorded; False: as under torch.no_grad().

    Raises:
        ValueError: For a size, dtype or plan that cannot be, or the dense or mixed plan in half precision.
        RuntimeError: If the CUDA runtime fails when it is asked about the device.
    """
    device = torch.device(device)
    sizes = (num_tokens, in_features, out_features, r1, r2)
    for name, size in zip(("num_tokens", "in_features", "out_features", "r1", "r2"), sizes, strict=True):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive int, got {size!r}")
    check_choice("dtype", dtype, _DTYPES)
    chosen = _choose_plan(*sizes, dtype, device.type, plan, training)
    if device.type == "cpu":
        if plan != "auto":
            reason = "asked for"
        elif dtype not in _DENSE_DTYPES:
            reason = "half-precision activations"
        elif not _IS_X86:
            reason = "not an x86 processor"
        else:
            costs = (f"{name} {cost / 1e9:.2f}" for name, cost in _costs(*sizes, training).items())
            reason = f"GFLOP beside the base layer: {', '.join(costs)}"
        return KernelPlan(chosen, "cpu", reason)
    uncovered = ops.uncovered_by_cuda(dtype, factor_dtype or torch.promote_types(dtype, torch.float32), r1, r2, device)
    if uncovered:
        return KernelPlan(chosen, "composite", uncovered)
    hopper = all(ops.takes_sm90(num_tokens, features, r1, r2, device) for features in (in_features, out_features))
    return KernelPlan(chosen, "cuda", "the kernels for Hopper take it" if hopper else "the CUDA kernels cover it")


def _choose_plan(num_tokens, in_features, out_features, r1, r2, dtype, device_type, plan, training) -> str:
    check_choice("plan", plan, PLANS)
    possible = dtype in _DENSE_DTYPES and device_type == "cpu"
    if plan in ("dense", "mixed") and not possible:
        raise ValueError(f"plan {plan!r} needs float32 or float64 activations on the CPU, got {dtype} on {device_type}: in "
                         "half precision it would round small updates away")
    if plan != "auto":
        return plan
    # A choice by the number of tokens would confine an exported program.
    if not possible or not _IS_X86 or torch.compiler.is_exporting():
        return "khatri_rao"
    chosen = "khatri_rao"
    costs = _costs(num_tokens, in_features, out_features, r1, r2, training)
    for name, cost in costs.items():  # not min(), which cannot be compiled for a symbolic number of tokens
        if cost < costs[chosen]:
            chosen = name
    return chosen


def _costs(num_tokens, in_features, out_features, r1, r2, training) -> dict[str, float]:
    """Plan → its cost beside the base layer's, as kernel_plan counts it."""
    weights, features = out_features * in_features, out_features + in_features
    product = 2 * (num_tokens + _UNFILLED_TOKENS) * (r1 * r2 + _UNFILLED_RANKS) * features  # u and y, v and dx, or gradients
    form = (r1 + r2) * weights
    if not training:
        return {"khatri_rao": product, "dense": form}
    return {"khatri_rao": 3 * product, "mixed": 2 * product + 2 * form, "dense": 2 * num_tokens * weights + 3.5 * form}


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DENSE_DTYPES = (torch.float32, torch.float64)
_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
# By how much T and R seem larger than they are: forming and staging operands, passes over x and y. These and the shares in
# _costs were fitted to two cores with AVX2 and with AVX-512, 576x576 to 4096x4096, T from 1 to 1024, r1 = r2 from 4 to 32
# (benchmarks/NOTES.md).
_UNFILLED_TOKENS, _UNFILLED_RANKS = 16, 64


def abba_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor,
                scale: float, *, recompute_u: bool = False, plan: Plan = "auto") -> Tensor:
    """A linear layer with an ABBA update: y = x W0ᵀ + bias + s·x ((B1 A1) ⊙ (B2 A2))ᵀ.

    Computed as y = x W0ᵀ + bias + s·(x A*ᵀ) B*ᵀ with Khatri–Rao factors A* [R, n] and B* [m, R], R = r1·r2, which are
    formed block by block inside the kernels (Theorem 1). One autograd node; it saves x, u = x A*ᵀ and the parameters.

    Args:
        x: [..., n], float32, bfloat16, float16 or float64.
        weight: W0 [m, n] in x's dtype, any strides.
        bias: [m] or None.
        a1: A1 [r1, n]. The four factors share a dtype, which may differ from x's (float32 masters are usual).
        b1: B1 [m, r1].
        a2: A2 [r2, n].
        b2: B2 [m, r2].
        scale: s, applied in fp32.
        recompute_u: Recompute u [T, R] in backward instead of saving it.
        plan: See :func:`kernel_plan`.

    Returns:
        y [..., m] in x's dtype. Under autocast x, weight and bias are cast to the autocast dtype first (a float64 x is not),
        as in torch.nn.functional.linear.

    Raises:
        TypeError: scale is not a number, or a tensor argument is none.
        ValueError: scale is not finite, or a shape, dtype or device does not fit; the message names the argument.

    Source: arXiv 2505.14238, section 3 and Theorem 1.
    """
    _check_tensors(x=x, weight=weight, a1=a1, b1=b1, a2=a2, b2=b2)
    if bias is not None:
        _check_tensors(bias=bias)
    if _is_autocast(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    _check_factors(x, a1, b1, a2, b2, scale)
    _check_base(x, weight, bias, b1)
    sizes = (math.prod(x.shape[:-1]), x.size(-1), b1.size(0), a1.size(0), a2.size(0))
    chosen = _choose_plan(*sizes, x.dtype, x.device.type, plan, torch.is_grad_enabled())
    return _AbbaLinear.apply(x, None, weight, bias, a1, b1, a2, b2, float(scale), recompute_u, chosen)


def abba_update(base_output: Tensor, x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float, *,
                recompute_u: bool = False) -> Tensor:
    """Adds an ABBA update to the output of any base layer: y = base_output + s·(x A*ᵀ) B*ᵀ.

    For bases that are not a plain weight matrix (quantised layers), or where the adapter sees another input than the base
    (dropout).

    Args:
        base_output: [..., m], the base layer's output; not modified.
        x: [..., n], the adapter's input. Cast to base_output's dtype if it differs.
        a1: A1 [r1, n].
        b1: B1 [m, r1].
        a2: A2 [r2, n].
        b2: B2 [m, r2].
        scale: s.
        recompute_u: Recompute u [T, R] in backward instead of saving it.

    Returns:
        y [..., m] in base_output's dtype.

    Raises:
        TypeError: scale is not a number, or a tensor argument is none.
        ValueError: scale is not finite, or a shape, dtype or device does not fit; the message names the argument.
    """
    _check_tensors(base_output=base_output, x=x, a1=a1, b1=b1, a2=a2, b2=b2)
    x = x.to(base_output.dtype)
    _check_factors(x, a1, b1, a2, b2, scale)
    if base_output.shape != (*x.shape[:-1], b1.size(0)):
        raise ValueError(f"base_output must be {[*x.shape[:-1], b1.size(0)]} for x {list(x.shape)} and b1 "
                         f"{list(b1.shape)}, got {list(base_output.shape)}")
    return _AbbaLinear.apply(x, base_output, None, None, a1, b1, a2, b2, float(scale), recompute_u, "khatri_rao")


def delta_weight(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float) -> Tensor:
    """The dense ΔW = s·(B1 A1) ⊙ (B2 A2), differentiable, for bases that need a weight: convolutions and stacked experts.

    Args:
        a1: A1 [..., r1, n].
        b1: B1 [..., m, r1].
        a2: A2 [..., r2, n].
        b2: B2 [..., m, r2].
        scale: s.

    Returns:
        [..., m, n] in fp32 (fp64 for fp64 factors). Only the factors are saved for backward.
    """
    return _DeltaWeight.apply(a1, b1, a2, b2, float(scale))


class _DeltaWeight(torch.autograd.Function):
    """With P_i = B_i A_i and G = s·dΔW: dB1 = (G ⊙ P2) A1ᵀ, dA1 = B1ᵀ (G ⊙ P2), and likewise for the other pair."""

    @staticmethod
    def forward(ctx, a1, b1, a2, b2, scale):
        ctx.save_for_backward(a1, b1, a2, b2)
        ctx.scale = scale
        with _without_autocast(a1.device):
            a1, b1, a2, b2 = _wide(a1, b1, a2, b2)
            if _is_watched():
                return b1 @ a1 * (b2 @ a2) * scale
            return (b1 @ a1).mul_(b2 @ a2).mul_(scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        with _without_autocast(grad.device):
            a1, b1, a2, b2 = _wide(*saved)
            grad = grad * ctx.scale
            grad1, grad2 = grad * (b2 @ a2), grad * (b1 @ a1)
            grads = (b1.mT @ grad1, grad1 @ a1.mT, b2.mT @ grad2, grad2 @ a2.mT)
        return (*(grad.to(factor.dtype) for grad, factor in zip(grads, saved, strict=True)), None)


class _AbbaLinear(torch.autograd.Function):
    """u = project(x; A), y = base + expand(u; Bᵀ); backward: v = project(dy; Bᵀ), dx = base + expand(v; A),
    dA = factor_grad(x, v; A), dBᵀ = factor_grad(dy, u; Bᵀ). The base is x W0ᵀ + bias, or a given output. The other plans have
    y and dx from products with W0 + ΔW, and "dense" the factors' gradients from dW."""

    @staticmethod
    def forward(ctx, x, base_output, weight, bias, a1, b1, a2, b2, scale, recompute_u, plan):
        with _below_autograd():
            x2 = _flat(x)
            ctx.plan = plan
            if plan != "khatri_rao":
                factors = _dense_factors(x.dtype, a1, b1, a2, b2)
                y, u = ops.dense_forward(x2, _to(weight, x.dtype), _to(bias, x.dtype), *factors, scale), None
            else:
                u = ops.project(x2, a1, a2)
                if weight is not None:
                    y = linear(x2, _to(weight, x.dtype), _to(bias, x.dtype))
                else:
                    y = _flat(base_output).clone()
                y = _expand_onto(y, u, b1.t(), b2.t(), scale)
            ctx.scale = scale
            ctx.bias_dtype = bias.dtype if bias is not None else None
            # Under autocast the weight is saved as it is and cast again in backward: no half-precision copy per layer is kept.
            ctx.save_for_backward(x, weight, a1, b1, a2, b2, None if recompute_u else u)
            if x.dim() != 2:  # what comes after may write into the output, which torch forbids for a view made in here
                y = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], b1.size(0)])
            return y

    @staticmethod
    def backward(ctx, dy):
        saved = ctx.saved_tensors  # out here: a checkpoint computes them again now, with autograd
        with _below_autograd():
            return _AbbaLinear._gradients(ctx, dy, *saved)

    @staticmethod
    def _gradients(ctx, dy, x, weight, a1, b1, a2, b2, u):
        need_x, need_base, need_weight, need_bias, need_a1, need_b1, need_a2, need_b2 = ctx.needs_input_grad[:8]
        left_x, left_a, left_b = need_x, need_a1 or need_a2, need_b1 or need_b2  # what is not computed yet
        scale = ctx.scale
        x2, dy2 = _flat(x), _flat(dy)
        dx = dweight = dbias = da1 = da2 = db1 = db2 = v = None
        if ctx.plan != "khatri_rao" and not torch.is_grad_enabled():
            through_dw = ctx.plan == "dense" and (left_a or left_b)
            if left_x or through_dw:
                factors = _dense_factors(x.dtype, a1, b1, a2, b2)
                dx, *grads = ops.dense_backward(x2, dy2, _to(weight, x.dtype), *factors, scale, left_x, through_dw)
            if through_dw:
                da1, db1, da2, db2 = (_to(grad, a1.dtype) for grad in grads)
                left_a = left_b = False
            left_x = False
        if left_x or left_a or left_b:
            b1_t, b2_t = b1.t(), b2.t()
        if left_x or left_a:
            v = ops.project(dy2, b1_t, b2_t)
        if left_x:
            # Under autocast, which the forward may have been outside of, a product has another dtype.
            base = _to(dy2 @ _to(weight, x.dtype), x.dtype) if weight is not None else dy2.new_zeros(x2.shape)
            dx = _add_expanded(base, v, a1, a2, scale)
        if left_a:
            da1, da2 = ops.factor_grad(x2, v, a1, a2, scale)
        if left_b:
            v = None  # freed before u is made
            if u is None or torch.is_grad_enabled():  # a saved u has no graph to differentiate twice
                u = ops.project(x2, a1, a2)
            db1, db2 = (grad.t() for grad in ops.factor_grad(dy2, u, b1_t, b2_t, scale))
        if need_weight:
            dweight = _to(dy2.t() @ x2, weight.dtype)
        if need_bias:
            dbias = _to(dy2.sum(0), ctx.bias_dtype)
        if need_x and x.dim() != 2:
            dx = dx.view(x.shape)
        return (dx if need_x else None, dy if need_base else None, dweight, dbias, da1 if need_a1 else None,
                db1 if need_b1 else None, da2 if need_a2 else None, db2 if need_b2 else None, None, None, None)


def _below_autograd():
    """For code that is the inside of one autograd node: operators are not taken through their own derivatives' code, which in
    Python takes longer than a small kernel. Where gradients of it are wanted all the same (second derivatives), they are."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or _is_watched():  # a trace goes below it by itself
        return contextlib.nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


def _autocasts(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)  # which raises for meta


def _without_autocast(device: torch.device):
    return torch.autocast(device.type, enabled=False) if _autocasts(device) else contextlib.nullcontext()


def _is_watched() -> bool:
    """Whether a dispatch mode sees the operators. That of selective checkpointing keeps the output of some to give it again
    when others are recomputed, so nothing may be written into an output; and its policy knows the operators that autograd
    leaves."""
    return not torch.compiler.is_compiling() and is_in_torch_dispatch_mode(include_infra_modes=False)


def _add_expanded(base, u, f1, f2, scale):
    """base + s·u·KR(f1, f2): in place into base, which this module allocated, unless the sum must be differentiable."""
    return base + scale * ops.expand(u, f1, f2) if torch.is_grad_enabled() else _expand_onto(base, u, f1, f2, scale)


def _expand_onto(y, u, f1, f2, scale):
    """y + s·u·KR(f1, f2), in place unless the operators are watched."""
    if _is_watched():
        return ops.add_expanded(y, u, f1, f2, scale)
    ops.expand_(y, u, f1, f2, scale)
    return y


def _dense_factors(dtype: torch.dtype, *factors: Tensor) -> list[Tensor]:
    return [_to(factor, dtype).contiguous() for factor in factors]


def _wide(*factors: Tensor) -> list[Tensor]:
    return [factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in factors]


def _flat(x: Tensor) -> Tensor:
    """[..., D] as [T, D]; reshape(-1, D) cannot tell T where D = 0."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.size(-1))


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


# --- argument checks ---


def _check_tensors(**arguments):
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _is_autocast(tensor: Tensor) -> bool:
    """Whether autocast would cast it for torch.nn.functional.linear."""
    return _autocasts(tensor.device) and tensor.is_floating_point() and tensor.dtype != torch.float64


def _check_base(x, weight, bias, b1):
    n, m = x.size(-1), b1.size(0)
    if weight.shape != (m, n):
        raise ValueError(f"weight must be [m, n] = [{m}, {n}] for x {list(x.shape)} and b1 {list(b1.shape)}, "
                         f"got {list(weight.shape)}")
    if bias is not None and bias.shape != (m,):
        raise ValueError(f"bias must be [m] = [{m}], got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        fits = tensor is None or tensor.dtype == x.dtype or _is_autocast(x) and _is_autocast(tensor)
        if not fits or tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must have x's dtype and device ({x.dtype}, {x.device}), "
                             f"got {tensor.dtype}, {tensor.device}")


def _check_factors(x, a1, b1, a2, b2, scale):
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    if not -math.inf < scale < math.inf:  # NaN neither; math.isfinite cannot be compiled for a symbolic scale
        raise ValueError(f"scale must be finite, got {scale}")
    if x.dim() == 0:
        raise ValueError("x must be [..., n], got a scalar")
    check_choice("a1", a1.dtype, _DTYPES)
    dtype, device, n = a1.dtype, x.device, x.size(-1)
    r1, r2 = (a.size(0) or None if a.dim() == 2 else None for a in (a1, a2))  # which no size is equal to
    m = b1.size(0) if b1.dim() == 2 else None
    for name, factor, shape in (("a1", a1, (r1, n)), ("b1", b1, (m, r1)), ("a2", a2, (r2, n)), ("b2", b2, (m, r2))):
        if factor.shape != shape:
            rank = f"r{name[1]}"
            if name[0] == "a":
                want = f"[{rank}, n] with n = {n} as in x {list(x.shape)}"
            else:
                want = f"[m, {rank}] with {f'm = {m} as in b1, ' if name == 'b2' else ''}{rank} = {shape[1]} as in a{name[1]}"
            raise ValueError(f"{name} must be {want}, got {list(factor.shape)}")
        if factor.dtype != dtype or factor.device != device:
            raise ValueError(f"{name} must have a1's dtype and x's device ({dtype}, {device}), "
                             f"got {factor.dtype}, {factor.device}")
