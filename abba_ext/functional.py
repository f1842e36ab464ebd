"""The stateless ABBA linear layer: one autograd node built from the three operators of :mod:`abba_ext.ops`."""
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import ops

__all__ = ["KernelPlan", "abba_linear", "abba_update", "kernel_plan"]

Plan = Literal["auto", "khatri_rao", "dense"]

# Rows of W0 whose dense ΔW is formed at once by the dense plan: a few [rows, n] fp32 blocks stay in cache.
_DENSE_BLOCK_ELEMENTS = 1 << 18


class KernelPlan(NamedTuple):
    """The path that one call of the layer takes, and why.

    Attributes:
        plan: "khatri_rao" (three operators on r1·r2 columns) or "dense" (ΔW formed block by block).
        kernel: "cpu" (compiled kernels) or "composite" (torch matmuls).
        reason: One sentence.
    """

    plan: str
    kernel: str
    reason: str


def kernel_plan(num_tokens: int, in_features: int, out_features: int, r1: int, r2: int,
                dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", plan: Plan = "auto") -> KernelPlan:
    """Which path :func:`abba_linear` takes for T tokens, W0 [m, n] and ranks (r1, r2).

    The Khatri–Rao plan spends 6·T·R·(m+n) floating-point operations per training step beside the base layer's, R = r1·r2.
    The dense plan forms W0 + ΔW and contracts dW onto the factors: 12·(r1+r2)·m·n for the factors beside 2·T·m·n for dW,
    fewer once R is large against m·n/(m+n) and T against the ranks. It is considered in fp32 and fp64 only: in half
    precision a ΔW below 2⁻⁹·|W0| would be rounded away.

    Args:
        num_tokens: T, rows of the flattened input.
        in_features: n.
        out_features: m.
        r1: Rank of the first pair.
        r2: Rank of the second pair.
        dtype: Activation dtype.
        device: Device of the call.
        plan: "auto" chooses by the cost above; a name forces it.

    Raises:
        ValueError: For an unknown plan, or the dense plan in half precision.
    """
    if plan not in ("auto", "khatri_rao", "dense"):
        raise ValueError(f"plan must be 'auto', 'khatri_rao' or 'dense', got {plan!r}")
    kernel = "cpu" if torch.device(device).type == "cpu" else "composite"
    wide = dtype in (torch.float32, torch.float64)
    if plan == "dense":
        if not wide:
            raise ValueError(f"plan 'dense' needs float32 or float64 activations, got {dtype}: in half precision it "
                             "rounds small updates away")
        return KernelPlan("dense", "composite", "asked for")
    if plan == "khatri_rao":
        return KernelPlan("khatri_rao", kernel, "asked for")
    if not wide:
        return KernelPlan("khatri_rao", kernel, "half-precision activations")
    m, n, rank = out_features, in_features, r1 * r2
    khatri_rao_flops = 6 * num_tokens * rank * (m + n)
    dense_flops = 2 * num_tokens * m * n + 12 * (r1 + r2) * m * n
    if kernel == "cpu" and _DENSE_MARGIN * dense_flops < khatri_rao_flops:
        return KernelPlan("dense", "composite", f"{dense_flops / 1e9:.2f} GFLOP beside the base layer against "
                          f"{khatri_rao_flops / 1e9:.2f} of the Khatri–Rao plan")
    return KernelPlan("khatri_rao", kernel, f"{khatri_rao_flops / 1e9:.2f} GFLOP beside the base layer against "
                      f"{dense_flops / 1e9:.2f} of the dense plan")


# The dense plan's low-rank products and element-wise passes run below matmul speed. Measured by
# benchmarks/bench_layer.py on 2 CPU cores: it wins at 768x768 (T >= 512) and loses at 768x3072 and 2048x2048.
_DENSE_MARGIN = 1.2


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
        y [..., m] in x's dtype. Under autocast x, weight and bias are cast to the autocast dtype first, as in
        torch.nn.functional.linear.

    Raises:
        TypeError: scale is not a number.
        ValueError: A shape, dtype or device does not fit; the message names the argument.

    Source: arXiv 2505.14238, section 3 and Theorem 1.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    _check_factors(x, a1, b1, a2, b2, scale)
    _check_base(x, weight, bias, b1)
    return _AbbaLinear.apply(x, None, weight, bias, a1, b1, a2, b2, float(scale), recompute_u, plan)


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
        TypeError: scale is not a number.
        ValueError: A shape, dtype or device does not fit; the message names the argument.
    """
    x = x.to(base_output.dtype)
    _check_factors(x, a1, b1, a2, b2, scale)
    if base_output.shape != (*x.shape[:-1], b1.size(0)):
        raise ValueError(f"base_output must be {[*x.shape[:-1], b1.size(0)]} for x {list(x.shape)} and b1 "
                         f"{list(b1.shape)}, got {list(base_output.shape)}")
    return _AbbaLinear.apply(x, base_output, None, None, a1, b1, a2, b2, float(scale), recompute_u, "khatri_rao")


class _AbbaLinear(torch.autograd.Function):
    """MATH: u = project(x; A), y = base + expand(u; Bᵀ); backward: v = project(dy; Bᵀ), dx = base + expand(v; A),
    dA = factor_grad(x, v; A), dBᵀ = factor_grad(dy, u; Bᵀ). The base is x W0ᵀ + bias, or a given output."""

    @staticmethod
    def forward(ctx, x, base_output, weight, bias, a1, b1, a2, b2, scale, recompute_u, plan):
        x2 = x.reshape(-1, x.size(-1))
        if weight is not None:
            chosen = kernel_plan(x2.size(0), x2.size(1), b1.size(0), a1.size(0), a2.size(0), x.dtype, x.device, plan)
            ctx.dense = chosen.plan == "dense"
        else:
            ctx.dense = False
        if ctx.dense:
            y, u = _dense_forward(x2, weight.to(x.dtype), _cast(bias, x.dtype), a1, b1, a2, b2, scale), None
        else:
            u = ops.project(x2, a1, a2)
            if weight is not None:
                y = linear(x2, weight.to(x.dtype), _cast(bias, x.dtype))
            else:
                y = base_output.reshape(-1, b1.size(0)).clone()
            ops.expand_(y, u, b1.t(), b2.t(), scale)
        ctx.scale = scale
        ctx.bias_dtype = bias.dtype if bias is not None else None
        # Under autocast the weight is saved as it is and cast again in backward: no half-precision copy per layer is kept.
        ctx.save_for_backward(x, weight, a1, b1, a2, b2, None if recompute_u else u)
        return y.view(*x.shape[:-1], b1.size(0))

    @staticmethod
    def backward(ctx, dy):
        x, weight, a1, b1, a2, b2, u = ctx.saved_tensors
        need_x, need_base, need_weight, need_bias, need_a1, need_b1, need_a2, need_b2 = ctx.needs_input_grad[:8]
        need_a, need_b = need_a1 or need_a2, need_b1 or need_b2
        scale = ctx.scale
        x2, dy2 = x.reshape(-1, x.size(-1)), dy.reshape(-1, dy.size(-1))
        dx = dweight = dbias = da1 = da2 = db1 = db2 = None
        if ctx.dense and not torch.is_grad_enabled():
            dx, da1, db1, da2, db2 = _dense_backward(x2, dy2, weight.to(x.dtype), a1, b1, a2, b2, scale, need_x, need_a or need_b)
        else:
            v = ops.project(dy2, b1.t(), b2.t()) if need_x or need_a else None
            if need_x:
                base = dy2 @ weight.to(x.dtype) if weight is not None else dy2.new_zeros(x2.shape)
                dx = _add_expanded(base, v, a1, a2, scale)
            if need_a:
                da1, da2 = ops.factor_grad(x2, v, a1, a2, scale)
            if need_b:
                if u is None or torch.is_grad_enabled():  # a saved u has no graph to differentiate twice
                    u = ops.project(x2, a1, a2)
                db1, db2 = (grad.t() for grad in ops.factor_grad(dy2, u, b1.t(), b2.t(), scale))
        if need_weight:
            dweight = (dy2.t() @ x2).to(weight.dtype)
        if need_bias:
            dbias = dy2.sum(0).to(ctx.bias_dtype)
        return (dx.view(x.shape) if need_x else None, dy if need_base else None, dweight, dbias,
                da1 if need_a1 else None, db1 if need_b1 else None, da2 if need_a2 else None, db2 if need_b2 else None,
                None, None, None)


def _add_expanded(base, u, f1, f2, scale):
    """base + s·u·KR(f1, f2): in place into base, which this module allocated, unless the sum must be differentiable."""
    if torch.is_grad_enabled():
        return base + scale * ops.expand(u, f1, f2)
    ops.expand_(base, u, f1, f2, scale)
    return base


# --- the dense plan: ΔW formed for a block of output rows, used, and contracted while it is in cache ---


def _row_blocks(weight: Tensor):
    m, n = weight.shape
    rows = max(1, min(m, _DENSE_BLOCK_ELEMENTS // n))
    blocks = math.ceil(m / rows)
    rows = math.ceil(m / blocks)
    return [(start, min(start + rows, m)) for start in range(0, m, rows)]


def _dense_forward(x, weight, bias, a1, b1, a2, b2, scale):
    a1, b1, a2, b2 = (factor.to(x.dtype) for factor in (a1, b1, a2, b2))
    y = x.new_empty((x.size(0), weight.size(0)))
    for lo, hi in _row_blocks(weight):
        effective = torch.addcmul(weight[lo:hi], b1[lo:hi] @ a1, b2[lo:hi] @ a2, value=scale)
        if bias is None:
            torch.mm(x, effective.t(), out=y[:, lo:hi])
        else:
            torch.addmm(bias[lo:hi], x, effective.t(), out=y[:, lo:hi])
    return y


def _dense_backward(x, dy, weight, a1, b1, a2, b2, scale, need_x, need_factors):
    dtype = a1.dtype
    a1, b1, a2, b2 = (factor.to(x.dtype) for factor in (a1, b1, a2, b2))
    dx = x.new_zeros(x.shape) if need_x else None
    da1, da2 = torch.zeros_like(a1), torch.zeros_like(a2)
    db1, db2 = torch.empty_like(b1), torch.empty_like(b2)
    for lo, hi in _row_blocks(weight):
        m1, m2 = b1[lo:hi] @ a1, b2[lo:hi] @ a2
        if need_x:
            dx.addmm_(dy[:, lo:hi], torch.addcmul(weight[lo:hi], m1, m2, value=scale))
        if need_factors:
            dw = dy[:, lo:hi].t() @ x
            m2.mul_(dw)  # gradient of B1 A1, up to s
            m1.mul_(dw)  # gradient of B2 A2, up to s
            torch.mm(m2, a1.t(), out=db1[lo:hi])
            torch.mm(m1, a2.t(), out=db2[lo:hi])
            da1.addmm_(b1[lo:hi].t(), m2)
            da2.addmm_(b2[lo:hi].t(), m1)
    return dx, *((grad * scale).to(dtype) for grad in (da1, db1, da2, db2))


# --- argument checks ---


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _check_base(x, weight, bias, b1):
    n, m = x.size(-1), b1.size(0)
    if weight.shape != (m, n):
        raise ValueError(f"weight must be [m, n] = [{m}, {n}] for x {list(x.shape)} and b1 {list(b1.shape)}, "
                         f"got {list(weight.shape)}")
    if bias is not None and bias.shape != (m,):
        raise ValueError(f"bias must be [m] = [{m}], got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        fits = tensor is None or tensor.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
        if not fits or tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must have x's dtype and device ({x.dtype}, {x.device}), "
                             f"got {tensor.dtype}, {tensor.device}")


def _check_factors(x, a1, b1, a2, b2, scale):
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    if x.dim() == 0:
        raise ValueError("x must be [..., n], got a scalar")
    n, m = x.size(-1), b1.size(0) if b1.dim() == 2 else None
    for name, factor, rank_dim, features in (("a1", a1, 0, n), ("b1", b1, 1, m), ("a2", a2, 0, n), ("b2", b2, 1, m)):
        if factor.dim() != 2 or factor.size(1 - rank_dim) != features or factor.size(rank_dim) < 1:
            want = f"[r{name[1]}, n]" if rank_dim == 0 else f"[m, r{name[1]}]"
            where = f" with n = {n} as in x {list(x.shape)}" if rank_dim == 0 else f" with m = {m}" if m else ""
            raise ValueError(f"{name} must be {want}{where}, got {list(factor.shape)}")
        if factor.dtype != a1.dtype or factor.device != x.device:
            raise ValueError(f"{name} must have a1's dtype and x's device ({a1.dtype}, {x.device}), "
                             f"got {factor.dtype}, {factor.device}")
    for pair, a, b in (("1", a1, b1), ("2", a2, b2)):
        if a.size(0) != b.size(1):
            raise ValueError(f"b{pair} must be [m, r{pair}] with r{pair} = {a.size(0)} as in a{pair}, got {list(b.shape)}")
