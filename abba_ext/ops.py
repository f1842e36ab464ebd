"""The three operators that are the whole layer, as torch custom ops (namespace ``abba``).

With factors f1 [r1, D], f2 [r2, D], R = r1·r2 and KR(f1, f2)[(a,b), d] = f1[a,d]·f2[b,d] (index a·r2 + b):

    project(x, f1, f2)           u = x · KRᵀ                     x [T, D] → u [T, R]
    expand_(y, u, f1, f2, s)     y += s · u · KR                 u [T, R], y [T, D], in place
    factor_grad(x, v, f1, f2, s) P = vᵀ x (never stored whole)   x [T, D], v [T, R] → df1 [r1, D], df2 [r2, D]
                                 df1[a,d] = s Σ_b P[(a,b),d] f2[b,d];  df2[b,d] = s Σ_a P[(a,b),d] f1[a,d]

Shapes and dtypes: x, y, u, v share one dtype out of float32, bfloat16, float16, float64 and may have any strides; f1
and f2 share a dtype of their own (float32 masters beside bfloat16 activations are usual). Factors may lie in memory as
[r, D] or as the transposed view of [D, r]; neither is copied, and gradients come back in the factor's layout and dtype.
Products accumulate in fp32 (fp64 for fp64). On a GPU handwritten kernels take bfloat16 and float16; they round float32
factors to that dtype first. The rest runs as a composite of torch matmuls (see :func:`abba_ext.kernel_plan`). Results are
bitwise deterministic for a given number of threads.
Errors: RuntimeError naming the argument, what was expected and what came.
Source: arXiv 2505.14238, Theorem 1 (ΔW = s·B*·A* with Khatri–Rao factors).
"""
import os

import torch

from . import reference

try:
    from . import _C
except ImportError as error:
    here = os.path.dirname(os.path.abspath(__file__))
    if os.path.exists(os.path.join(os.path.dirname(here), "csrc", "ops.cpp")):
        hint = (f"the compiled module is missing because abba_ext was imported from its source tree ({here}); run "
                "`pip install -e .` there, or leave the folder and `pip install` it")
    else:
        hint = ("the compiled module cannot be loaded; rebuild it with `pip install --force-reinstall --no-deps .` in its source "
                "folder")
    if "_C" not in str(error) or "undefined symbol" in str(error):
        hint = "the compiled module does not match this torch; reinstall abba_ext against it"
    raise ImportError(f"abba_ext: {hint} ({error}; torch {torch.__version__}).") from error

project = torch.ops.abba.project.default
factor_grad = torch.ops.abba.factor_grad.default
dense_forward = torch.ops.abba.dense_forward.default
dense_backward = torch.ops.abba.dense_backward.default
_expand_ = torch.ops.abba.expand_.default


def expand_(y: torch.Tensor, u: torch.Tensor, f1: torch.Tensor, f2: torch.Tensor, s: float) -> None:
    """y += s · u · KR(f1, f2), in place; outside of autograd (use :func:`expand` inside it).

    Raises:
        RuntimeError: Gradients are recorded and an argument requires one; or a shape, dtype or device does not fit.
    """
    if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in (y, u, f1, f2)):
        raise RuntimeError("expand_ writes in place and is not differentiable; use abba_ext.ops.expand or run it under "
                           "torch.no_grad()")
    _expand_(y, u, f1, f2, s)
    torch.autograd.graph.increment_version(y)  # so that autograd notices where it has kept y


@torch.library.custom_op("abba::add_expanded", mutates_args=())
def add_expanded(y: torch.Tensor, u: torch.Tensor, f1: torch.Tensor, f2: torch.Tensor, s: float) -> torch.Tensor:
    """y + s · u · KR(f1, f2) as a tensor of its own, one operator; outside of autograd."""
    y = y.clone()
    _expand_(y, u, f1, f2, s)
    return y


def uncovered_by_cuda(dtype: torch.dtype, factor_dtype: torch.dtype, r1: int, r2: int, device: torch.device) -> str:
    """Why no handwritten kernel covers such a call on a GPU (it runs the composite of torch matmuls); "" if one does."""
    if device.type != "cuda":
        return f"there are no kernels for {device.type}"
    if not torch.cuda.is_available():
        return "no GPU is visible"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _C.uncovered_by_cuda(*(str(t).removeprefix("torch.") for t in (dtype, factor_dtype)), r1, r2, index)


def takes_sm90(num_tokens: int, num_features: int, r1: int, r2: int, device: torch.device) -> bool:
    """Whether the kernels for Hopper GPUs take such a call of contiguous tensors, which one covers."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _C.takes_sm90(num_tokens, num_features, r1, r2, index)


def build_info() -> dict[str, str]:
    """How the compiled module was built: torch, compilers, flags and CUDA architectures ("" if none)."""
    return _C.build_info()


# --- shapes alone: what torch.compile, meta tensors and FakeTensorMode see ---


def _like_factor(f: torch.Tensor) -> torch.Tensor:
    if f.stride(0) != 1 or f.size(1) == 1:
        return f.new_empty(f.shape)
    return f.new_empty((f.size(1), f.size(0))).t()


def _check_devices(op, first, *others):
    for tensor in others:
        torch._check(tensor is None or tensor.device == first.device,
                     lambda: f"{op}: every argument must be on the device of the first, {first.device}, got {tensor.device}")


@torch.library.register_fake("abba::project")
def _(x, f1, f2):
    _check_devices("project", x, f1, f2)
    torch._check(x.dim() == 2 and f1.dim() == 2 and f2.dim() == 2, lambda: "project: x, f1 and f2 must be 2-D")
    torch._check(x.size(1) == f1.size(1), lambda: f"project: f1 must be [r1, {x.size(1)}], got {list(f1.shape)}")
    torch._check(x.size(1) == f2.size(1), lambda: f"project: f2 must be [r2, {x.size(1)}], got {list(f2.shape)}")
    return x.new_empty((x.size(0), f1.size(0) * f2.size(0)))


@torch.library.register_fake("abba::expand_")
def _(y, u, f1, f2, s):
    _check_devices("expand_", y, u, f1, f2)
    rank = f1.size(0) * f2.size(0)
    torch._check(u.size(0) == y.size(0) and u.size(1) == rank,
                 lambda: f"expand_: u must be [{y.size(0)}, {rank}], got {list(u.shape)}")


@add_expanded.register_fake
def _(y, u, f1, f2, s):
    return torch.empty_like(y)


@torch.library.register_fake("abba::factor_grad")
def _(x, v, f1, f2, s):
    _check_devices("factor_grad", x, v, f1, f2)
    rank = f1.size(0) * f2.size(0)
    torch._check(v.size(0) == x.size(0) and v.size(1) == rank,
                 lambda: f"factor_grad: v must be [{x.size(0)}, {rank}], got {list(v.shape)}")
    return _like_factor(f1), _like_factor(f2)


@torch.library.register_fake("abba::dense_forward")
def _(x, weight, bias, a1, b1, a2, b2, s):
    _check_devices("dense_forward", x, weight, bias, a1, b1, a2, b2)
    return x.new_empty((x.size(0), weight.size(0)))


@torch.library.register_fake("abba::dense_backward")
def _(x, dy, weight, a1, b1, a2, b2, s, need_x, need_factors):
    _check_devices("dense_backward", x, dy, weight, a1, b1, a2, b2)
    dx = x.new_empty((x.size(0) if need_x else 0, x.size(1)))
    return dx, *(f.new_empty((f.size(0) if need_factors else 0, f.size(1))) for f in (a1, b1, a2, b2))


# --- the composite of torch matmuls, for what no CUDA kernel covers; csrc/cuda_backend.cpp decides and allocates ---


@torch.library.impl("abba::project_composite", "CompositeExplicitAutograd")
def _(u, x, f1, f2):
    u.copy_(reference.project(x, f1, f2))


@torch.library.impl("abba::expand_composite", "CompositeExplicitAutograd")
def _(y, u, f1, f2, s):
    y.addmm_(u, reference.khatri_rao(f1, f2).to(y.dtype), alpha=s)


@torch.library.impl("abba::factor_grad_composite", "CompositeExplicitAutograd")
def _(df1, df2, x, v, f1, f2, s):
    for out, grad in zip((df1, df2), reference.factor_grad(x, v, f1, f2, s)):
        out.copy_(grad)


# --- the same for devices that have no kernels ---


@torch.library.impl("abba::project", ("mps", "xpu"))
def _(x, f1, f2):
    return reference.project(x, f1, f2)


@torch.library.impl("abba::expand_", ("mps", "xpu"))
def _(y, u, f1, f2, s):
    torch.ops.abba.expand_composite(y, u, f1, f2, s)


@torch.library.impl("abba::factor_grad", ("mps", "xpu"))
def _(x, v, f1, f2, s):
    df1, df2 = _like_factor(f1), _like_factor(f2)
    torch.ops.abba.factor_grad_composite(df1, df2, x, v, f1, f2, s)
    return df1, df2


# --- derivatives: the set is closed under differentiation ---


def _save_inputs(ctx, inputs, output):
    *tensors, ctx.s = inputs if len(inputs) == 5 else (*inputs, 1.0)
    ctx.save_for_backward(*tensors)


def _project_backward(ctx, du):
    x, f1, f2 = ctx.saved_tensors
    dx = df1 = df2 = None
    if ctx.needs_input_grad[0]:
        dx = expand(du, f1, f2)
    if any(ctx.needs_input_grad[1:]):
        df1, df2 = factor_grad(x, du, f1, f2, 1.0)
    return dx, df1, df2


def _factor_grad_backward(ctx, g1, g2):
    # L = Σ g1·df1 + g2·df2 is linear in x and v, with KR replaced by K' = s·(KR(g1, f2) + KR(f1, g2)):
    # L = Σ_td x[t,d] Σ_i v[t,i] K'[i,d]. P = vᵀx gives the second-order terms of f1 and f2.
    x, v, f1, f2 = ctx.saved_tensors
    s = ctx.s
    dx = s * (expand(v, g1, f2) + expand(v, f1, g2))
    dv = s * (project(x, g1, f2) + project(x, f1, g2))
    df2 = factor_grad(x, v, g1, f2, s)[1]
    df1 = factor_grad(x, v, f1, g2, s)[0]
    return dx, dv, df1, df2, None


def expand(u: torch.Tensor, f1: torch.Tensor, f2: torch.Tensor) -> torch.Tensor:
    """u · KR(f1, f2), the differentiable form of :func:`expand_` on zeros: u [T, R] → [T, D]."""
    return _Expand.apply(u, f1, f2)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, f1, f2):
        ctx.save_for_backward(u, f1, f2)
        y = u.new_zeros((u.size(0), f1.size(1)))
        expand_(y, u, f1, f2, 1.0)
        return y

    @staticmethod
    def backward(ctx, dy):
        u, f1, f2 = ctx.saved_tensors
        return project(dy, f1, f2), *factor_grad(dy, u, f1, f2, 1.0)


torch.library.register_autograd("abba::project", _project_backward, setup_context=_save_inputs)
torch.library.register_autograd("abba::factor_grad", _factor_grad_backward, setup_context=_save_inputs)
