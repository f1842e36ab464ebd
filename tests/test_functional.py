"""The layer as a function: forward and every gradient against dense ΔW in fp64, for all bases, plans and dtypes."""
import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, assert_close_to_truth, assert_no_worse_than, dense_linear, random_layer
from threads import num_threads

from abba_ext import abba_linear, abba_update, functional, kernel_plan, ops, reference
from abba_ext.config import PLANS
from abba_ext.functional import delta_weight

NAMES = ("x", "weight", "bias", "a1", "b1", "a2", "b2")
SCALE = 0.7


def with_gradients(function, args, dy):
    """Output and gradients of fresh leaves of args."""
    leaves = [None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in args]
    y = function(*leaves)
    y.backward(dy.to(y.dtype))
    return y.detach(), [None if t is None else t.grad for t in leaves]


def check_layer(args, **options):
    y_truth_shape = (*args[0].shape[:-1], args[1].size(0))
    dy = torch.randn(y_truth_shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(args[0].dtype)
    truth, truth_grads = with_gradients(lambda *a: dense_linear(*a, SCALE), args, dy)
    eager, eager_grads = with_gradients(lambda *a: reference.abba_linear(*a, SCALE), args, dy)
    ours, grads = with_gradients(lambda *a: abba_linear(*a, SCALE, **options), args, dy)
    assert ours.dtype == args[0].dtype
    assert_no_worse_than(ours, eager, truth, "y")
    for name, arg, grad, eager_grad, truth_grad in zip(NAMES, args, grads, eager_grads, truth_grads):
        if arg is not None and arg.requires_grad:
            assert grad.dtype == arg.dtype
            assert_no_worse_than(grad, eager_grad, truth_grad, f"d{name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [(1, 1), (1, 6), (3, 5), (8, 8), (16, 16), (9, 12)], ids=str)
@pytest.mark.parametrize("sizes", [(64, 48, 40), (33, 17, 65)], ids=str)
def test_against_dense(dtype, ranks, sizes):
    check_layer(random_layer(*sizes, *ranks, dtype), plan="khatri_rao")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(64, 48, 40), (33, 700, 801)], ids=str)
@pytest.mark.parametrize("plan", ["mixed", "dense"])
def test_dense_plans_against_dense(dtype, sizes, plan):
    check_layer(random_layer(*sizes, 5, 3, dtype), plan=plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("recompute_u", [False, True])
def test_fp32_masters(dtype, recompute_u):
    check_layer(random_layer(100, 60, 72, 8, 8, dtype, factor_dtype=torch.float32), recompute_u=recompute_u)


@given(tokens=st.integers(1, 30), n=st.integers(1, 70), m=st.integers(1, 70), r1=st.integers(1, 9), r2=st.integers(1, 9),
       dtype=st.sampled_from(DTYPES), bias=st.booleans(), options=st.sampled_from(
           [{"plan": "auto"}, {"plan": "khatri_rao"}, {"plan": "khatri_rao", "recompute_u": True}]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape(tokens, n, m, r1, r2, dtype, bias, options):
    check_layer(random_layer(tokens, n, m, r1, r2, dtype, bias=bias), **options)


@pytest.mark.parametrize("plan, recompute_u", [("khatri_rao", False), ("khatri_rao", True), ("mixed", False), ("dense", False)])
def test_first_and_second_derivatives(plan, recompute_u):
    args = random_layer(4, 5, 6, 2, 3)

    def function(*a):
        return abba_linear(*a, SCALE, plan=plan, recompute_u=recompute_u)

    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args)


def test_update_first_and_second_derivatives():
    x, _, _, *factors = random_layer(4, 5, 6, 2, 3)
    base = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: abba_update(*a, SCALE), (base, x, *factors))
    assert torch.autograd.gradgradcheck(lambda *a: abba_update(*a, SCALE), (base, x, *factors))


def test_update_leaves_its_inputs_alone():
    x, weight, bias, *factors = random_layer(10, 8, 6, 2, 3, torch.float32, requires_grad=False)
    base = torch.nn.functional.linear(x, weight, bias)
    copies = [t.clone() for t in (base, x)]
    y = abba_update(base, x, *factors, SCALE)
    assert torch.equal(base, copies[0]) and torch.equal(x, copies[1])
    assert_close_to_truth(y, dense_linear(x, weight, bias, *factors, SCALE), 1e-6)


@pytest.mark.parametrize("needed", [subset for size in (1, 2) for subset in itertools.combinations(NAMES, size)],
                         ids="-".join)
@pytest.mark.parametrize("plan", PLANS[1:])
def test_only_needed_gradients(needed, plan):
    args = [t.detach().requires_grad_(name in needed) for name, t in zip(NAMES, random_layer(6, 5, 7, 2, 3))]
    truth = dense_linear(*args, SCALE)
    expected = torch.autograd.grad(truth.sum(), [t for t in args if t.requires_grad])
    actual = torch.autograd.grad(abba_linear(*args, SCALE, plan=plan).sum(), [t for t in args if t.requires_grad])
    for ours, theirs in zip(actual, expected):
        assert_close_to_truth(ours, theirs, 1e-12)


def test_incoming_gradient_and_input_are_not_written():
    args = random_layer(6, 5, 7, 2, 3, torch.float32)
    y = abba_linear(*args, SCALE)
    dy = torch.randn_like(y)
    copies = [t.detach().clone() for t in (dy, *args)]
    y.backward(dy)
    assert all(torch.equal(copy, t) for copy, t in zip(copies, (dy, *args)))


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5), (0, 5), (2, 0, 5)], ids=str)
def test_leading_dimensions(shape):
    _, weight, bias, *factors = random_layer(1, 5, 7, 2, 3)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for plan in PLANS[1:]:
        y = abba_linear(x, weight, bias, *factors, SCALE, plan=plan)
        assert y.shape == (*shape[:-1], 7)
        torch.testing.assert_close(y, dense_linear(x, weight, bias, *factors, SCALE))
        grads = torch.autograd.grad(y.sum(), (x, *factors))
        expected = torch.autograd.grad(dense_linear(x, weight, bias, *factors, SCALE).sum(), (x, *factors))
        for ours, theirs in zip(grads, expected):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("plan", PLANS[1:])
def test_strided_input_and_weight(plan):
    _, weight, bias, *factors = random_layer(24, 10, 8, 2, 3)
    strided = torch.randn(4, 10, 6, dtype=torch.float64).transpose(1, 2).requires_grad_()  # [4, 6, 10]
    transposed = weight.detach().t().contiguous().t()
    y = abba_linear(strided, transposed, bias, *factors, SCALE, plan=plan)
    truth = dense_linear(strided, weight, bias, *factors, SCALE)
    torch.testing.assert_close(y, truth)
    dy = torch.randn(4, 8, 6, dtype=torch.float64).transpose(1, 2)
    for ours, theirs in zip(torch.autograd.grad(y, (strided, *factors), dy), torch.autograd.grad(truth, (strided, *factors), dy)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("sizes", [(3, 0, 5), (3, 5, 0), (0, 4, 5)], ids=str)
def test_empty_sizes(plan, sizes):
    tokens, n, m = sizes
    shapes = ((tokens, n), (m, n), (m,), (2, n), (m, 2), (3, n), (m, 3))
    args = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    y = abba_linear(*args, SCALE, plan=plan)
    torch.testing.assert_close(y, dense_linear(*args, SCALE))
    for ours, arg in zip(torch.autograd.grad(y.sum(), args), args):
        assert ours.shape == arg.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(40, 1100, 1000), (9, 33, 7), (5, 64, 3)], ids=str)
def test_dense_plan_over_blocks_and_ragged_tiles(sizes, dtype):
    check_layer(random_layer(*sizes, 7, 3, dtype), plan="dense")
    check_layer(random_layer(*sizes, 16, 17, dtype), plan="dense")


@pytest.mark.parametrize("threads, sizes", [(1, (2500, 70, 90)), (8, (1100, 130, 150)), (5, (2100, 200, 40)),
                                            (7, (300, 700, 450))], ids=str)
def test_dense_plan_divided_among_threads(threads, sizes):
    """Columns of W0 first, then tokens, in pieces: sums are the same for the same number of threads."""
    args = random_layer(*sizes, 5, 3, torch.float32)
    with num_threads(threads):
        check_layer(args, plan="dense")
        y = abba_linear(*args, SCALE, plan="dense")
        first, second = (torch.autograd.grad(y.square().sum(), args, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_dense_plan_forms_the_update_in_registers():
    """It once took twenty times as long, where vectors were wider than the processor's registers."""
    x, weight, bias, a1, b1, a2, b2 = random_layer(1, 512, 512, 16, 16, torch.float32, requires_grad=False)

    def seconds(function):
        def once():
            start = time.thread_time()
            function()
            return time.thread_time() - start
        return min(once() for _ in range(20))

    with num_threads(1):
        ours = seconds(lambda: ops.dense_forward(x, weight, bias, a1, b1, a2, b2, SCALE))
        matmuls = seconds(lambda: torch.addmm(bias, x, (weight + SCALE * (b1 @ a1) * (b2 @ a2)).t()))
    assert ours < 5 * matmuls


def test_dense_operators():
    x, weight, bias, *factors = random_layer(6, 5, 7, 2, 3, requires_grad=False)
    torch.library.opcheck(torch.ops.abba.dense_forward.default, (x, weight, bias, *factors, SCALE))
    dy = torch.randn(6, 7, dtype=torch.float64)
    for need_x, need_factors in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.abba.dense_backward.default, (x, dy, weight, *factors, SCALE, need_x, need_factors))
    with pytest.raises(RuntimeError, match=r"dense_forward: a1 must be \[r, n\] with n = 5, got \[2, 4\]"):
        torch.ops.abba.dense_forward(x, weight, bias, factors[0][:, :4].contiguous(), *factors[1:], SCALE)
    with pytest.raises(RuntimeError, match="dense_forward: x must be float32 or float64, got bfloat16"):
        torch.ops.abba.dense_forward(*(t.bfloat16() for t in (x, weight, bias, *factors)), SCALE)
    a1, b1, a2, b2 = factors
    with pytest.raises(RuntimeError, match=r"dense_forward: b1 must be \[m, r\] = \[7, 2\] as in weight and a1, got \[6, 2\]"):
        torch.ops.abba.dense_forward(x, weight, bias, a1, b1[:6].contiguous(), a2, b2, SCALE)
    with pytest.raises(RuntimeError, match="dense_forward: b2 must be contiguous"):
        torch.ops.abba.dense_forward(x, weight, bias, a1, b1, a2, b2.t().contiguous().t(), SCALE)
    with pytest.raises(RuntimeError, match="dense_forward: a1 must be contiguous"):
        torch.ops.abba.dense_forward(x, weight, bias, a1.t().contiguous().t(), b1, a2, b2, SCALE)
    for wrong in (bias[:6], bias.float(), bias[None]):
        with pytest.raises(RuntimeError, match=r"dense_forward: bias must be \[7\] in x's dtype, got"):
            torch.ops.abba.dense_forward(x, weight, wrong, *factors, SCALE)


def saved_bytes(function):
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return saved


def test_saves_only_x_u_and_parameters():
    args = random_layer(64, 100, 120, 4, 8, torch.float32)
    own = {t.untyped_storage().data_ptr() for t in args}
    extra = {k: v for k, v in saved_bytes(lambda: abba_linear(*args, SCALE, plan="khatri_rao")).items() if k not in own}
    assert list(extra.values()) == [64 * 32 * 4]  # u [T, r1*r2]
    assert set(saved_bytes(lambda: abba_linear(*args, SCALE, plan="khatri_rao", recompute_u=True))) <= own
    for plan in ("mixed", "dense"):
        assert set(saved_bytes(lambda: abba_linear(*args, SCALE, plan=plan))) <= own


def test_autocast_saves_no_copy_of_the_weight():
    args = random_layer(64, 100, 120, 4, 8, torch.float32)
    own = {t.untyped_storage().data_ptr() for t in args}

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return abba_linear(*args, SCALE)

    extra = {k: v for k, v in saved_bytes(run).items() if k not in own}
    assert sorted(extra.values()) == [64 * 32 * 2, 64 * 100 * 2]  # u and x in bf16


@pytest.mark.parametrize("plan", PLANS[1:])
def test_the_output_may_be_written_into(plan):
    args = random_layer(10, 16, 24, 4, 4, torch.float32)

    def gradients(relu):
        return torch.autograd.grad(relu(abba_linear(args[0].view(2, 5, 16), *args[1:], SCALE, plan=plan)).sum(), args)

    assert all(map(torch.equal, gradients(torch.relu_), gradients(torch.relu)))


def test_autocast_as_in_linear():
    args = random_layer(20, 16, 24, 4, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = abba_linear(*args, SCALE)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in args)
    cast = [t.detach().bfloat16() if name in ("x", "weight", "bias") else t.detach() for name, t in zip(NAMES, args)]
    assert torch.equal(y, abba_linear(*cast, SCALE))
    wide = random_layer(20, 16, 24, 4, 4, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert abba_linear(*wide, SCALE).dtype == torch.nn.functional.linear(*wide[:3]).dtype == torch.float64


@pytest.mark.parametrize("plan", PLANS[1:])
def test_backward_under_autocast_has_the_dtype_of_forward(plan):
    args = random_layer(20, 16, 24, 4, 4, torch.float32)
    expected = torch.autograd.grad(abba_linear(*args, SCALE, plan=plan).sum(), args)
    y = abba_linear(*args, SCALE, plan=plan).sum()
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(y, args)
    for name, ours, theirs in zip(NAMES, actual, expected):
        assert ours.dtype == torch.float32
        assert_close_to_truth(ours, theirs, 1e-2, f"d{name}")  # torch's own products are in half precision then


@pytest.mark.parametrize("name, dtype", [("x", torch.int64), ("x", torch.complex64), ("weight", torch.int8),
                                         ("bias", torch.float64)])
def test_autocast_leaves_what_it_would_not_cast(name, dtype):
    args = dict(zip(NAMES, random_layer(20, 16, 24, 4, 4, torch.float32, requires_grad=False)))
    args[name] = args[name].to(dtype)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="must have x's dtype"):
        abba_linear(**args, scale=SCALE)


def test_meta_tensors():
    args = [t.detach().to("meta").requires_grad_() for t in random_layer(6, 5, 7, 2, 3)]
    y = abba_linear(*args, SCALE)
    assert y.is_meta and y.shape == (6, 7)
    grads = torch.autograd.grad(y.sum(), args)
    assert [grad.shape for grad in grads] == [arg.shape for arg in args]
    assert delta_weight(*args[3:], SCALE).shape == (7, 5)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("plan", PLANS[1:])
def test_compile_without_graph_breaks(dynamic, plan):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: abba_linear(*a, SCALE, plan=plan), fullgraph=True, dynamic=dynamic)
    for tokens in (12, 20):
        args = random_layer(tokens, 16, 24, 2, 4, torch.float32)
        y = compiled(*args)
        y.square().sum().backward()
        truth = dense_linear(*[t.detach().double().requires_grad_() for t in args], SCALE)
        assert_close_to_truth(y, truth, 1e-6, "y")
        doubles = [t.detach().double().requires_grad_() for t in args]
        dense_linear(*doubles, SCALE).square().sum().backward()
        for name, ours, theirs in zip(NAMES, args, doubles):
            assert_close_to_truth(ours.grad, theirs.grad, 1e-5, f"d{name}")


def test_plan_follows_cost_processor_and_dtype(monkeypatch):
    monkeypatch.setattr(functional, "_IS_X86", True)
    assert kernel_plan(1024, 2048, 2048, 16, 16).plan == "mixed"
    assert kernel_plan(4, 768, 768, 16, 16).plan == "khatri_rao"
    assert kernel_plan(512, 768, 768, 16, 16).plan == "dense"
    assert kernel_plan(1024, 2048, 2048, 16, 16, training=False).plan == "dense"
    assert kernel_plan(1, 512, 512, 16, 16).plan == "dense"
    assert kernel_plan(4, 768, 768, 16, 16, training=False).plan == "dense"
    assert kernel_plan(1, 768, 768, 16, 16, training=False).plan == "khatri_rao"
    monkeypatch.setattr(functional, "_IS_X86", False)
    assert kernel_plan(512, 768, 768, 16, 16)[::2] == ("khatri_rao", "not an x86 processor")
    assert kernel_plan(512, 768, 768, 16, 16, plan="dense").plan == "dense"
    assert kernel_plan(512, 768, 768, 16, 16, torch.bfloat16).plan == "khatri_rao"
    assert kernel_plan(512, 768, 768, 16, 16, torch.float32, "cuda")[:2] == ("khatri_rao", "composite")


@pytest.mark.parametrize("arguments, message", [
    ((512, 768, 768, 16, 16, "float32"), "dtype must be one of .*torch.float32, .*got 'float32'"),
    ((512, 768, 768, 16, 16, torch.int8), "dtype must be one of .*got torch.int8"),
    ((512, 768, 768, 0, 16), "r1 must be a positive int, got 0"),
    ((512, 768, 768.0, 16, 16), "out_features must be a positive int, got 768.0"),
], ids=str)
def test_a_plan_of_nothing_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        kernel_plan(*arguments)


@pytest.mark.parametrize("key", ["MPS", "XPU"])
def test_devices_without_kernels_run_the_composite(key):
    """Its operators, called as such a device would call them, on CPU tensors."""
    assert kernel_plan(512, 768, 768, 16, 16, torch.float32, key.lower())[:2] == ("khatri_rao", "composite")
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    generator = torch.Generator().manual_seed(0)
    x, v, f1, f2 = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((9, 20), (9, 6), (2, 20), (3, 20)))
    y = x.clone()
    torch.testing.assert_close(ops.project.redispatch(keys, x, f1, f2), reference.project(x, f1, f2))
    ops._expand_.redispatch(keys, y, v, f1, f2, SCALE)
    torch.testing.assert_close(y, x + reference.expand(v, f1, f2, SCALE))
    torch.testing.assert_close(ops.factor_grad.redispatch(keys, x, v, f1, f2, SCALE), reference.factor_grad(x, v, f1, f2, SCALE))


@pytest.mark.skipif(not ops.build_info()["cuda"], reason="built without CUDA")
def test_what_the_cuda_kernels_do_not_cover_has_a_reason():
    uncovered = ops._C.uncovered_by_cuda  # device -1: none, asked last
    assert "bfloat16 and float16 activations" in uncovered("float32", "float32", 16, 16, -1)
    assert "float32" in uncovered("bfloat16", "float16", 16, 16, -1)
    assert "r1 up to 65535" in uncovered("bfloat16", "float32", 65536, 64, -1)  # a block of the grid for each
    assert "r2 up to 64" in uncovered("bfloat16", "float32", 16, 65, -1)
    assert "architecture" in uncovered("bfloat16", "float32", 65535, 64, -1)
    if not torch.cuda.is_available():
        assert kernel_plan(512, 768, 768, 16, 16, torch.bfloat16, "cuda")[1:] == ("composite", "no GPU is visible")


def test_plan_follows_whether_gradients_are_recorded(monkeypatch):
    monkeypatch.setattr(functional, "_IS_X86", True)
    args = random_layer(4, 768, 768, 16, 16, torch.float32)
    khatri_rao, dense = (abba_linear(*args, SCALE, plan=plan) for plan in ("khatri_rao", "dense"))
    assert not torch.equal(khatri_rao, dense)  # they round differently
    assert torch.equal(abba_linear(*args, SCALE), khatri_rao)
    with torch.no_grad():
        assert torch.equal(abba_linear(*args, SCALE), dense)


OPERATORS = {  # by plan, and by whether x needs a gradient beside the factors
    ("khatri_rao", True): ["project", "expand_", "project", "expand_", "factor_grad", "project", "factor_grad"],
    ("khatri_rao", False): ["project", "expand_", "project", "factor_grad", "project", "factor_grad"],
    ("mixed", True): ["dense_forward", "dense_backward", "project", "factor_grad", "project", "factor_grad"],
    ("mixed", False): ["dense_forward", "project", "factor_grad", "project", "factor_grad"],
    ("dense", True): ["dense_forward", "dense_backward"],
    ("dense", False): ["dense_forward", "dense_backward"],
}


@pytest.mark.parametrize("plan, need_x", OPERATORS)
def test_operators_of_a_plan(plan, need_x, monkeypatch):
    called = []

    def watch(name):
        operator = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a: called.append(name) or operator(*a))

    for name in ("project", "expand_", "factor_grad", "dense_forward", "dense_backward"):
        watch(name)
    args = [t.detach().requires_grad_(need_x or name[0] in "ab") for name, t in zip(NAMES, random_layer(6, 5, 7, 2, 3))]
    abba_linear(*args, SCALE, plan=plan, recompute_u=True).sum().backward()
    assert called == OPERATORS[plan, need_x]


def test_plans_agree():
    args = random_layer(50, 40, 30, 8, 8, torch.float32, requires_grad=False)
    truth = dense_linear(*args, SCALE)
    for plan in PLANS:
        assert_close_to_truth(abba_linear(*args, SCALE, plan=plan), truth, 1e-6, plan)


def bad(**changes):
    args = dict(zip((*NAMES, "scale"), (*random_layer(3, 4, 5, 2, 3, torch.float32, requires_grad=False), 1.0)))
    return {**args, **changes}


f32 = torch.float32
ERRORS = {
    "a1 rows": (bad(a1=torch.ones(2, 9)), ValueError, r"a1 must be \[r1, n\] with n = 4 as in x \[3, 4\], got \[2, 9\]"),
    "a2 dimensions": (bad(a2=torch.ones(4)), ValueError, r"a2 must be \[r2, n\]"),
    "b2 rows": (bad(b2=torch.ones(6, 3)), ValueError, r"b2 must be \[m, r2\] with m = 5 as in b1, r2 = 3 as in a2, got \[6, 3\]"),
    "b1 rank": (bad(b1=torch.ones(5, 4)), ValueError, r"b1 must be \[m, r1\] with r1 = 2 as in a1, got \[5, 4\]"),
    "rank 0": (bad(a1=torch.ones(0, 4), b1=torch.ones(5, 0)), ValueError, r"a1 must be \[r1, n\]"),
    "complex factors": (bad(**{name: bad()[name].to(torch.complex64) for name in NAMES[3:]}), ValueError,
                        "a1 must be one of .*torch.float32, .*got torch.complex64"),
    "factor dtype": (bad(b1=torch.ones(5, 2, dtype=torch.bfloat16)), ValueError, "b1 must have a1's dtype .*got torch.bfloat16"),
    "weight": (bad(weight=torch.ones(4, 5)), ValueError, r"weight must be \[m, n\] = \[5, 4\] .*got \[4, 5\]"),
    "weight dtype": (bad(weight=torch.ones(5, 4).half()), ValueError, "weight must have x's dtype and device"),
    "bias": (bad(bias=torch.ones(4)), ValueError, r"bias must be \[m\] = \[5\], got \[4\]"),
    "scale": (bad(scale="1"), TypeError, "scale must be a number, got str"),
    "scale nan": (bad(scale=float("nan")), ValueError, "scale must be finite, got nan"),
    "scalar x": (bad(x=torch.tensor(1.0)), ValueError, r"x must be \[..., n\], got a scalar"),
    "device": (bad(a1=torch.ones(2, 4, device="meta")), ValueError, "a1 must have a1's dtype and x's device"),
    "plan": (bad(plan="fast"), ValueError, "plan must be one of 'auto', 'khatri_rao', 'mixed', 'dense', got 'fast'"),
    **{f"{plan} half": (bad(plan=plan, x=torch.ones(3, 4).half(), weight=torch.ones(5, 4).half(), bias=None), ValueError,
                        f"plan '{plan}' needs float32 or float64 activations on the CPU") for plan in ("mixed", "dense")},
}


@pytest.mark.parametrize("arguments, error, message", ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        abba_linear(**arguments)


def test_update_checks_base_output():
    x, _, _, *factors = random_layer(3, 4, 5, 2, 3, torch.float32, requires_grad=False)
    with pytest.raises(ValueError, match=r"base_output must be \[3, 5\] .*got \[3, 4\]"):
        abba_update(torch.ones(3, 4), x, *factors, 1.0)
