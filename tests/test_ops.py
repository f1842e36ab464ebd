"""The three operators against dense fp64 in every dtype, layout and shape class: on the CPU, on a GPU, and emulated."""
import backends
import emulator
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, assert_close_to_truth, assert_no_worse_than, assert_right_on_gpu, dense_kr

from abba_ext import ops, reference

# Rank pairs: 1, unequal, not multiples of 8, the usual ones. Sizes: one block, ragged blocks, more than one chunk.
RANKS = [(1, 1), (1, 7), (3, 5), (8, 8), (16, 16), (9, 33)]
SIZES = [(1, 1), (5, 63), (33, 65), (130, 200)]
CPU, GPU = backends.get("cpu"), backends.Device("cuda")


def draw(*shape, dtype, seed, layout="rD"):
    value = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return value.t().contiguous().t() if layout == "Dr" else value


def case(tokens, features, r1, r2, dtype, layout="rD", factor_dtype=None):
    factor_dtype = factor_dtype or dtype
    x = draw(tokens, features, dtype=dtype, seed=1)
    f1 = draw(r1, features, dtype=factor_dtype, seed=2, layout=layout)
    f2 = draw(r2, features, dtype=factor_dtype, seed=3, layout=layout)
    v = draw(tokens, r1 * r2, dtype=dtype, seed=4)
    return x, f1, f2, v


def check_all(x, f1, f2, v, s=0.37, backend=CPU):
    def assert_right(*results):
        assert_right_on_gpu(*results, x.dtype) if backend == GPU else assert_no_worse_than(*results)

    # Eager torch in the same dtype. The CUDA kernels round float32 masters to x's dtype first; so does eager beside them.
    factor_dtype = f1.dtype if backend == CPU else x.dtype
    kr = dense_kr(f1, f2)
    u = backend.project(x, f1, f2)
    assert u.dtype == x.dtype
    e1, e2 = f1.to(factor_dtype), f2.to(factor_dtype)
    assert_right(u, reference.project(x, e1, e2), x.double() @ kr.t(), "project")

    y = x.clone()
    backend.expand_(y, v, f1, f2, s)
    eager = x + reference.expand(v, e1, e2, s)
    assert_right(y, eager, x.double() + s * v.double() @ kr, "expand_")

    df1, df2 = backend.factor_grad(x, v, f1, f2, s)
    p = (v.double().t() @ x.double()).view(f1.size(0), f2.size(0), -1)
    truths = (s * torch.einsum("abd,bd->ad", p, f2.double()), s * torch.einsum("abd,ad->bd", p, f1.double()))
    leaves = [f.detach().clone().requires_grad_() for f in (f1, f2)]
    (reference.project(x, *(leaf.to(factor_dtype) for leaf in leaves)) * v).sum().mul(s).backward()  # eager's own gradient in this dtype
    for name, grad, factor, leaf, truth in zip(("df1", "df2"), (df1, df2), (f1, f2), leaves, truths):
        assert grad.dtype == factor.dtype and grad.shape == factor.shape
        assert_right(grad, leaf.grad, truth, name)


@pytest.mark.parametrize("name, dtype", backends.cases(DTYPES))
@pytest.mark.parametrize("layout", ["rD", "Dr"])
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_against_dense(name, dtype, layout, ranks):
    for tokens, features in SIZES:
        check_all(*case(tokens, features, *ranks, dtype, layout), backend=backends.get(name))


@pytest.mark.parametrize("name, dtype", backends.cases(backends.HALF))
def test_fp32_master_factors(name, dtype):
    x, f1, f2, v = case(70, 130, 16, 16, dtype, "Dr", factor_dtype=torch.float32)
    check_all(x, f1, f2, v, backend=backends.get(name))


def test_blocks_larger_than_cache():
    # 2 MiB blocks: project splits the 1024 rows of 4000 features, the others split the features.
    check_all(*case(40, 4000, 32, 32, torch.float32))
    check_all(*case(40, 4000, 32, 32, torch.bfloat16, "Dr"))


@pytest.mark.parametrize("dtype", backends.HALF, ids=str)
def test_more_tokens_than_are_widened_at_once(dtype):
    check_all(*case(1100, 40, 3, 5, dtype))


@pytest.mark.parametrize("tokens", [30, 70])
@pytest.mark.parametrize("name", backends.NAMES)
def test_fp16_products_of_small_factors_do_not_underflow(name, tokens):
    x, f1, f2, v = case(tokens, 64, 4, 4, torch.float16)
    f1, f2 = f1 * 2**-13, f2 * 2**-13  # every product is below the smallest fp16 number
    kr = dense_kr(f1, f2)
    assert kr.abs().max() < 2**-22
    backend = backends.get(name)
    u = backend.project(x * 2**10, f1, f2)
    assert_close_to_truth(u, (x * 2**10).double() @ kr.t(), 2**-10, "project")
    y = torch.zeros_like(x)
    backend.expand_(y, v, f1, f2, 2.0**20)
    assert_close_to_truth(y, 2.0**20 * v.double() @ kr, 2**-10, "expand_")


@pytest.mark.parametrize("name", backends.NAMES)
def test_fp16_products_of_large_factors_do_not_overflow(name):
    x, f1, f2, v = case(70, 64, 4, 4, torch.float16)
    f1, f2 = f1 * 2**9, f2 * 2**9  # products up to 2^21, beyond the largest fp16 number
    backend = backends.get(name)
    assert_close_to_truth(backend.project(x * 2**-12, f1, f2), (x * 2**-12).double() @ dense_kr(f1, f2).t(), 2**-9, "project")


@pytest.mark.parametrize("index", [0, 1], ids=["f1", "f2"])
@pytest.mark.parametrize("name", backends.NAMES)
def test_fp16_scales_follow_the_largest_element(name, index):
    """Whichever factor holds it: here in the last place, beside elements that alone would be scaled up beyond it."""
    x, f1, f2, _ = case(70, 72, 4, 5, torch.float16)
    factor = (f1, f2)[index]
    factor *= 2**-10
    factor[-1, -1] = 2**7
    u = backends.get(name).project(x, f1, f2)
    assert_close_to_truth(u, x.double() @ dense_kr(f1, f2).t(), 2**-9, "project")


@pytest.mark.parametrize("name, dtype", backends.cases(DTYPES))
def test_strided_inputs(name, dtype):
    backend = backends.get(name)
    x, f1, f2, v = case(20, 48, 4, 6, dtype)
    wide = torch.zeros(40, 3 * 48, dtype=dtype)
    views = {
        "row stride": wide[::2, 48:96].copy_(x),
        "transposed": x.t().contiguous().t(),
        "column stride": torch.zeros(20, 96, dtype=dtype)[:, ::2].copy_(x),
    }
    v_view = torch.zeros(24, 40, dtype=dtype).t()[:20, :].t().t()[:, :24].copy_(v)
    if name not in ("cpu", "cuda"):  # the composite runs for them
        del views["transposed"], views["column stride"]
        v_view = torch.zeros(20, 40, dtype=dtype)[:, 16:].copy_(v)
    for view in views.values():
        check_all(view, f1[:, :], f2, v_view, backend=backend)
    check_all(x, torch.zeros(8, 48, dtype=dtype)[::2].copy_(f1), f2, v, backend=backend)
    check_all(x, torch.zeros(4, 96, dtype=dtype)[:, ::2].copy_(f1), torch.zeros(6, 96, dtype=dtype)[:, 1::2].copy_(f2), v,
              backend=backend)
    check_all(x, f1.t().contiguous().t(), f2, v, backend=backend)  # the pair's layouts differ
    expanded = x[:1].expand(20, 48)  # every row the same memory: fine for what is only read
    assert torch.equal(backend.project(expanded, f1, f2), backend.project(expanded.contiguous(), f1, f2))


@pytest.mark.parametrize("name", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tokens_and_no_features(name, dtype):
    backend = backends.get(name)
    x, f1, f2, v = case(0, 10, 2, 3, dtype)
    assert backend.project(x, f1, f2).shape == (0, 6)
    backend.expand_(x, v, f1, f2, 1.0)
    df1, df2 = backend.factor_grad(x, v, f1, f2, 1.0)
    assert df1.shape == (2, 10) and df2.shape == (3, 10) and not df1.any() and not df2.any()
    x, f1, f2, v = case(5, 0, 2, 3, dtype)
    assert backend.project(x, f1, f2).tolist() == [[0.0] * 6] * 5


@pytest.mark.parametrize("name", backends.NAMES)
def test_nan_and_infinity_pass_through(name):
    backend = backends.get(name)
    x, f1, f2, v = case(4, 8, 2, 2, torch.float32 if name == "cpu" else torch.bfloat16)
    x[1, 3] = float("nan")
    assert backend.project(x, f1, f2)[1].isnan().all()
    assert backend.project(x, f1, f2)[[0, 2, 3]].isfinite().all()
    df1, _ = backend.factor_grad(x, v, f1, f2, 1.0)
    assert df1[:, 3].isnan().all() and df1[:, :3].isfinite().all()
    f1[0, 2] = float("inf")
    assert not backend.project(x, f1, f2)[0, :2].isfinite().any()


@pytest.mark.parametrize("name, dtype", backends.cases(DTYPES))
def test_deterministic(name, dtype):
    backend = backends.get(name)
    x, f1, f2, v = case(300, 500, 8, 12, dtype)
    first = backend.project(x, f1, f2), *backend.factor_grad(x, v, f1, f2, 0.5)
    for _ in range(5):  # of the emulated ones, in other schedules
        again = backend.project(x, f1, f2), *backend.factor_grad(x, v, f1, f2, 0.5)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@given(name=st.sampled_from(["cpu", "emulated"] if not emulator.unavailable() else ["cpu"]), tokens=st.integers(0, 40),
       features=st.integers(1, 150), r1=st.integers(1, 12), r2=st.integers(1, 12), layout=st.sampled_from(["rD", "Dr"]),
       dtype=st.sampled_from(DTYPES))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_shape(name, tokens, features, r1, r2, layout, dtype):
    x, f1, f2, v = case(tokens, features, r1, r2, dtype, layout)
    if tokens:
        check_all(x, f1, f2, v, backend=backends.get(name if dtype in backends.HALF else "cpu"))
    else:
        assert ops.project(x, f1, f2).shape == (0, r1 * r2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_layout_follows_factor(dtype):
    x, f1, _, v = case(10, 20, 3, 5, dtype, "Dr")
    _, _, f2, _ = case(10, 20, 3, 5, dtype, "rD")
    df1, df2 = ops.factor_grad(x, v, f1, f2, 1.0)
    assert df1.stride() == f1.stride() and df2.stride() == f2.stride()


def test_autocast_does_not_reach_inside():
    x, f1, f2, _ = case(10, 20, 3, 5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ops.project(x, f1, f2)
    assert torch.equal(inside, ops.project(x, f1, f2))


@pytest.mark.parametrize("layout", ["rD", "Dr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(layout, dtype):
    x, f1, f2, v = case(6, 10, 2, 3, dtype, layout)
    for needs_grad in (False, True):
        args = [t.clone().requires_grad_(needs_grad) for t in (x, f1, f2)]
        torch.library.opcheck(ops.project, args)
        args = [t.clone().requires_grad_(needs_grad) for t in (x, v, f1, f2)]
        torch.library.opcheck(ops.factor_grad, (*args, 0.5))
    torch.library.opcheck(torch.ops.abba.expand_.default, (x.clone(), v, f1, f2, 0.5))


def test_first_and_second_derivatives():
    x, f1, f2, v = (t.requires_grad_() for t in case(4, 5, 2, 3, torch.float64))
    for function, args in ((ops.project, (x, f1, f2)), (ops.expand, (v, f1, f2)),
                           (lambda *a: ops.factor_grad(*a, 0.7), (x, v, f1, f2))):
        assert torch.autograd.gradcheck(function, args)
        assert torch.autograd.gradgradcheck(function, args)


def test_expand_in_place_refuses_autograd():
    x, f1, f2, v = case(4, 5, 2, 3, torch.float32)
    with pytest.raises(RuntimeError, match="expand_.*not differentiable"):
        ops.expand_(x.clone(), v.requires_grad_(), f1, f2, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autograd_notices_that_y_was_written(dtype):
    x, f1, f2, v = case(4, 5, 2, 3, dtype)
    y = x.requires_grad_().sigmoid()  # whose derivative reads y
    with torch.no_grad():
        ops.expand_(y, v, f1, f2, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


ones = torch.ones
ERRORS = {
    "x 2-D": (lambda: ops.project(ones(2, 3, 4), ones(2, 4), ones(2, 4)), r"project: x must be 2-D, got shape \[2, 3, 4\]"),
    "f1 features": (lambda: ops.project(ones(3, 4), ones(2, 5), ones(2, 4)),
                    r"project: f1 must be \[r1, D\] with D = 4 as in x \[3, 4\], got \[2, 5\]"),
    "f2 features": (lambda: ops.project(ones(3, 4), ones(2, 4), ones(2, 5)), r"project: f2 must be \[r2, D\]"),
    "rank 0": (lambda: ops.project(ones(3, 4), ones(0, 4), ones(2, 4)), r"project: f1 must have rank r1 >= 1"),
    "x integer": (lambda: ops.project(ones(3, 4).int(), ones(2, 4), ones(2, 4)), r"project: x must be float32, bfloat16"),
    "factor dtypes": (lambda: ops.project(ones(3, 4), ones(2, 4), ones(2, 4).double()),
                      r"project: f1 and f2 must have one dtype, got float32 and float64"),
    "u shape": (lambda: ops.expand_(ones(3, 4), ones(3, 5), ones(2, 4), ones(2, 4), 1.0),
                r"expand_: u must be \[T, r1\*r2\] = \[3, 4\], got \[3, 5\]"),
    "u dtype": (lambda: ops.expand_(ones(3, 4), ones(3, 4).double(), ones(2, 4), ones(2, 4), 1.0),
                r"expand_: u must have the dtype of y, float32, got float64"),
    "v tokens": (lambda: ops.factor_grad(ones(3, 4), ones(2, 4), ones(2, 4), ones(2, 4), 1.0),
                 r"factor_grad: v must be \[T, r1\*r2\] = \[3, 4\], got \[2, 4\]"),
    "y overlaps itself": (lambda: ops.expand_(ones(1, 4).expand(3, 4), ones(3, 4), ones(2, 4), ones(2, 4), 1.0),
                          r"expand_: y is written in place, so none of its elements may overlap"),
    "s": (lambda: ops.expand_(ones(3, 4), ones(3, 4), ones(2, 4), ones(2, 4), "1"), r"expected.*float"),
}


@pytest.mark.parametrize("call, message", ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(call, message):
    with pytest.raises((RuntimeError, TypeError), match="(?i)" + message):
        call()


def test_output_must_not_alias_an_input():
    memory = torch.randn(4, 4)
    with pytest.raises(RuntimeError, match="y is written in place, so it must not share memory"):
        ops.expand_(memory, memory, ones(2, 4), ones(2, 4), 1.0)


def test_mixed_devices_are_refused():
    with pytest.raises((RuntimeError, NotImplementedError)):
        ops.project(torch.ones(3, 4, device="meta"), ones(2, 4), ones(2, 4)).tolist()
