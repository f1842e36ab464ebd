"""What only a GPU can show: its kernels at sizes that fill it, streams, graphs, torch.compile, and addresses past 2^31.

Everything is computed on the device, the fp64 truth too. test_ops.py has the small shapes, test_conformance.py the wrappers.
"""
import math
import random
import threading

import pytest
import torch
from oracle import (DTYPES, assert_close_to_truth, assert_no_worse_than, assert_right_on_gpu, dense_kr, dense_linear,
                    random_layer)
from torch.utils.checkpoint import checkpoint

from abba_ext import AbbaConfig, abba_linear, ops, patch_model, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

HALF = (torch.bfloat16, torch.float16)
# Rank pairs: 1, unequal, no multiples of 8, each padded r2, several tiles of a, and r2 > 64, which the composite takes.
RANKS = [(1, 1), (1, 7), (7, 1), (3, 5), (8, 8), (16, 16), (9, 33), (32, 32), (64, 64), (70, 3), (5, 65)]
# (T, D): one block; ragged; beside the limits 16, 32 and 64 of the small kernels; more than one split of the tokens.
SIZES = [(1, 1), (5, 63), (16, 64), (17, 72), (33, 65), (64, 257), (65, 256), (130, 200), (1100, 136)]
SCALE = 0.37


# On a Hopper GPU everything runs twice, the second time with the kernels of its own where they cover a call.
FAMILIES = ["sm80", "sm90"] if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) else ["sm80"]


@pytest.fixture(autouse=True, params=FAMILIES)
def family(request, monkeypatch):
    monkeypatch.setenv("ABBA_SM90", "1" if request.param == "sm90" else "0")
    return request.param


@pytest.fixture(autouse=True)
def full_precision():
    """Eager torch, which results are compared with, at its best."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction", "allow_tf32")
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    yield
    for name, value in zip(names, before):
        setattr(matmul, name, value)


def draw(*shape, dtype, seed, layout="rD", device="cuda"):
    value = torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)
    return value.t().contiguous().t() if layout == "Dr" else value


def case(tokens, features, r1, r2, dtype, layout="rD", factor_dtype=None, device="cuda", seed=1):
    factor_dtype = factor_dtype or dtype
    x = draw(tokens, features, dtype=dtype, seed=seed, device=device)
    f1 = draw(r1, features, dtype=factor_dtype, seed=seed + 1, layout=layout, device=device)
    f2 = draw(r2, features, dtype=factor_dtype, seed=seed + 2, layout=layout, device=device)
    v = draw(tokens, r1 * r2, dtype=dtype, seed=seed + 3, device=device)
    return x, f1, f2, v


def check_all(x, f1, f2, v, s=SCALE):
    """All three operators against fp64, beside eager torch with factors in x's dtype."""
    u, grads = ops.project(x, f1, f2), ops.factor_grad(x, v, f1, f2, s)
    base = x if x._base is None else x._base
    memory = base.clone()
    in_place = memory.as_strided(x.shape, x.stride(), x.storage_offset())
    ops.expand_(in_place, v, f1, f2, s)
    y = in_place.clone()
    in_place.copy_(x)
    assert torch.equal(memory.nan_to_num(1), base.nan_to_num(1)), "expand_ wrote beside y"

    x, v = x.contiguous(), v.contiguous()
    kr, e1, e2 = dense_kr(f1, f2), f1.to(x.dtype), f2.to(x.dtype)
    assert u.dtype == x.dtype
    assert_right_on_gpu(u, reference.project(x, e1, e2), x.double() @ kr.t(), "project", x.dtype)
    assert_right_on_gpu(y, x + reference.expand(v, e1, e2, s), x.double() + s * v.double() @ kr, "expand_", x.dtype)
    p = (v.double().t() @ x.double()).view(f1.size(0), f2.size(0), -1)
    truths = (s * torch.einsum("abd,bd->ad", p, f2.double()), s * torch.einsum("abd,ad->bd", p, f1.double()))
    leaves = [f.detach().clone().requires_grad_() for f in (f1, f2)]
    eager = torch.autograd.grad(reference.project(x, *(leaf.to(x.dtype) for leaf in leaves)), leaves, s * v)
    for name, grad, factor, eager_grad, truth in zip(("df1", "df2"), grads, (f1, f2), eager, truths):
        assert grad.dtype == factor.dtype and grad.shape == factor.shape
        assert_right_on_gpu(grad, eager_grad, truth, name, x.dtype)


def composites(function) -> set[str]:
    """The composites of torch matmuls that a call runs, where kernels could have."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages() if "_composite" in event.key}


# --- the operators ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rD", "Dr"])
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_against_dense(dtype, layout, ranks):
    for tokens, features in SIZES:
        check_all(*case(tokens, features, *ranks, dtype, layout))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("layout", ["rD", "Dr"])
@pytest.mark.parametrize("ranks", [(16, 16), (3, 5), (32, 32), (64, 64)], ids=str)
def test_fp32_master_factors(dtype, layout, ranks):
    for tokens, features in SIZES:
        check_all(*case(tokens, features, *ranks, dtype, layout, torch.float32))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("layout", ["rD", "Dr"])
@pytest.mark.parametrize("tokens, features, ranks", [(8192, 520, (16, 16)), (16384, 264, (8, 8)), (6401, 1000, (9, 33)),
                                                     (6401, 264, (17, 8)), (20000, 128, (16, 16)), (4096, 4096, (16, 16)),
                                                     (2048, 2056, (64, 64)), (64, 14336, (16, 16)), (1, 14336, (32, 32))])
def test_sizes_that_fill_the_device(dtype, layout, tokens, features, ranks):
    check_all(*case(tokens, features, *ranks, dtype, layout, torch.float32))


@pytest.mark.parametrize("seed", range(40))
def test_any_shape(seed):
    pick = random.Random(seed)
    tokens = pick.choice([pick.randint(1, 80), pick.randint(1, 3000)])
    dtype, layout = pick.choice(HALF), pick.choice(["rD", "Dr"])
    ranks = pick.randint(1, 40), pick.randint(1, 64)
    check_all(*case(tokens, pick.randint(1, 600), *ranks, dtype, layout, pick.choice([None, torch.float32]), seed=seed))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("tokens", [20, 200])
def test_strided_and_unaligned_inputs(dtype, tokens, family):
    x, f1, f2, v = case(tokens, 144, 4, 16, dtype)

    def inside(t, columns, before, step=1):
        """A copy of t within wider rows."""
        wide = torch.full((step * tokens, columns), math.nan, dtype=dtype, device="cuda")
        return wide[::step, before:before + t.size(1)].copy_(t)

    views = {
        "rows 16-byte aligned": inside(x, 3 * 144, 144),
        "every other row": inside(x, 160, 8, step=2),
        "start not aligned": inside(x, 160, 1),
        "rows not aligned": inside(x, 147, 0),
        "rows of odd elements": inside(x, 151, 3),
        "transposed": x.t().contiguous().t(),
        "column stride": inside(x.repeat_interleave(2, 1), 288, 0)[:, ::2],
    }
    for name, view in views.items():
        assert torch.equal(view, x), name
        check_all(view, f1, f2, v)
        check_all(view, f1, f2, inside(v, 67, 2))
    check_all(x, f1, f2, v.t().contiguous().t())
    check_all(x, f1.repeat_interleave(2, 0)[::2], f2.repeat_interleave(2, 1)[:, ::2], v)
    expanded = x[:1].expand(tokens, 144)
    actual, copied = (ops.project(t, f1, f2) for t in (expanded, expanded.contiguous()))
    if family == "sm90":  # those for Hopper take the copy alone
        assert_close_to_truth(actual, copied, 2**-8, "project")
    else:
        assert torch.equal(actual, copied)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tokens_and_no_features(dtype):
    x, f1, f2, v = case(0, 10, 2, 3, dtype)
    assert ops.project(x, f1, f2).shape == (0, 6)
    ops.expand_(x, v, f1, f2, 1.0)
    assert [grad.any().item() for grad in ops.factor_grad(x, v, f1, f2, 1.0)] == [False, False]
    x, f1, f2, v = case(5, 0, 2, 3, dtype)
    assert not ops.project(x, f1, f2).any()


@pytest.mark.skipif(len(FAMILIES) == 1, reason="needs a Hopper GPU")
@pytest.mark.parametrize("r2, tokens, features, taken", [(16, 70, 96, True), (12, 70, 96, False), (16, 64, 96, False), (16, 70, 92, False)])
def test_the_kernels_for_hopper_run_where_they_are_wanted_and_cover_a_call(r2, tokens, features, taken, request):
    x, f1, f2, v = case(tokens, features, 4, r2, torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.project(x, f1, f2), ops.expand_(x.clone(), v, f1, f2, 1.0), ops.factor_grad(x, v, f1, f2, 1.0)
        torch.cuda.synchronize()
    launched = [event.key for event in profile.key_averages() if "_sm90_kernel" in event.key]
    assert len(launched) == (3 if taken and "sm90" in request.node.callspec.id else 0)


def test_what_the_kernels_cover_does_not_run_the_composite():
    def run(dtype, r2, factor_dtype=None):
        x, f1, f2, v = case(70, 96, 4, r2, dtype, factor_dtype=factor_dtype)
        return composites(lambda: (ops.project(x, f1, f2), ops.expand_(x.clone(), v, f1, f2, 1.0),
                                   ops.factor_grad(x, v, f1, f2, 1.0)))

    for dtype in HALF:
        assert run(dtype, 16) == run(dtype, 64) == run(dtype, 16, torch.float32) == set()
    everything = {f"abba::{name}_composite" for name in ("project", "expand", "factor_grad")}
    assert run(torch.float32, 16) == run(torch.bfloat16, 65) == everything


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_deterministic(dtype):
    """Splits of the tokens meet in the order in which blocks happen to end; the sums must not show it."""
    x, f1, f2, v = case(8000, 1000, 16, 16, dtype, factor_dtype=torch.float32)

    def run():
        y = x.clone()
        ops.expand_(y, v, f1, f2, SCALE)
        return ops.project(x, f1, f2), y, *ops.factor_grad(x, v, f1, f2, SCALE)

    first = run()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


def test_nan_stays_in_its_row_and_its_column():
    for tokens in (4, 200):
        x, f1, f2, v = case(tokens, 80, 2, 8, torch.bfloat16)
        x[1, 3] = math.nan
        u = ops.project(x, f1, f2)
        assert u[1].isnan().all() and u[[0, *range(2, tokens)]].isfinite().all()
        df1, df2 = ops.factor_grad(x, v, f1, f2, 1.0)
        for grad in (df1, df2):
            assert grad[:, 3].isnan().all() and grad[:, [0, 1, 2, *range(4, 80)]].isfinite().all()


@pytest.mark.parametrize("layout", ["rD", "Dr"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_opcheck(layout, dtype):
    x, f1, f2, v = case(6, 10, 2, 3, dtype, layout)
    for needs_grad in (False, True):
        args = [t.clone().requires_grad_(needs_grad) for t in (x, f1, f2)]
        torch.library.opcheck(ops.project, args)
        args = [t.clone().requires_grad_(needs_grad) for t in (x, v, f1, f2)]
        torch.library.opcheck(ops.factor_grad, (*args, 0.5))
    torch.library.opcheck(torch.ops.abba.expand_.default, (x.clone(), v, f1, f2, 0.5))


def test_factors_on_another_device_are_refused():
    x, f1, f2, _ = case(4, 10, 2, 3, torch.bfloat16)
    with pytest.raises((RuntimeError, NotImplementedError)):
        ops.project(x, f1.cpu(), f2)


# --- the layer ---


def layer(tokens=300, n=192, m=256, dtype=torch.bfloat16, device="cuda", seed=0):
    """The tensors of abba_linear on the device, with fp32 masters, and dy; x and the factors require gradients."""
    tensors = random_layer(tokens, n, m, 16, 16, dtype, torch.float32, seed=seed, requires_grad=False)
    tensors = [t.to(device) for t in tensors]
    for i in (0, 3, 4, 5, 6):
        tensors[i].requires_grad_()
    return tensors, draw(tokens, m, dtype=dtype, seed=seed, device=device)


def step(tensors, dy, function=abba_linear):
    """y and the gradients of x, a1, b1, a2, b2."""
    y = function(*tensors, SCALE)
    return y, *torch.autograd.grad(y, [t for t in tensors if t.requires_grad], dy)


def eager_step(tensors, dy):
    def function(x, weight, bias, *factors_and_scale):
        *factors, scale = factors_and_scale
        return reference.abba_linear(x, weight, bias, *(f.to(x.dtype) for f in factors), scale)
    return step(tensors, dy, function)


def true_step(tensors, dy):
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    return step(wide, dy.double(), dense_linear)


def check_step(got, tensors, dy):
    names = ("y", "dx", "da1", "db1", "da2", "db2")
    for name, result, eager, truth in zip(names, got, eager_step(tensors, dy), true_step(tensors, dy), strict=True):
        assert_no_worse_than(result, eager, truth, name)


def assert_equal(results, others):
    assert [torch.equal(a, b) for a, b in zip(results, others, strict=True)] == [True] * len(results)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("tokens", [1, 40, 300, 5000])
def test_layer(dtype, tokens):
    tensors, dy = layer(tokens, dtype=dtype)
    check_step(step(tensors, dy), tensors, dy)


def test_graph_capture_and_replay():
    """Forward and backward in one graph: no wait for the device and no memory that the graph does not know."""
    (x, *rest), dy = layer()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step([x, *rest], dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step([x, *rest], dy)
    for seed in (5, 6):
        (new_x, *_), new_dy = layer(seed=seed)
        with torch.no_grad():
            x.copy_(new_x)
            dy.copy_(new_dy)
        for result in captured:
            result.detach().fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(captured, step([x, *rest], dy))


def test_the_current_stream_is_used():
    """Behind a stream's other work: an operator in another stream would meet the old x."""
    x, f1, f2, v = case(500, 512, 16, 16, torch.bfloat16)
    new = draw(500, 512, dtype=torch.bfloat16, seed=9)

    def run(x):
        y = x.clone()
        ops.expand_(y, v, f1, f2, SCALE)
        return ops.project(x, f1, f2), y, *ops.factor_grad(x, v, f1, f2, SCALE)

    want = run(new)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: about 30 ms
        x.copy_(new)
        got = run(x)
    stream.synchronize()
    assert_equal(got, want)


def test_two_streams_at_once():
    """Neither's workspace is the other's."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    layers = [layer(2000, seed=seed) for seed in (1, 2)]
    want = [step(*one) for one in layers]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(20):
        for stream, one, kept in zip(streams, layers, results):
            with torch.cuda.stream(stream):
                kept.append(step(*one))
    torch.cuda.synchronize()
    for expected, kept in zip(want, results):
        for got in kept:
            assert_equal(got, expected)


@pytest.mark.parametrize("name", ["project", "expand_", "factor_grad"])
def test_a_thread_that_has_not_used_the_gpu(name):
    """As one of autograd's may be: it has no context yet."""
    x, f1, f2, v = case(500, 512, 16, 16, torch.bfloat16)
    results = []

    def call(y):
        outputs = {"project": lambda: (ops.project(x, f1, f2),),
                   "expand_": lambda: (y, ops.expand_(y, v, f1, f2, SCALE))[:1],
                   "factor_grad": lambda: ops.factor_grad(x, v, f1, f2, SCALE)}[name]()
        results.append([t.cpu() for t in outputs])  # what they were in is in the allocator's cache, which needs no context

    first, second = x.clone(), x.clone()
    call(first)
    thread = threading.Thread(target=call, args=(second,))
    thread.start()
    thread.join()
    assert_equal(*results)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_without_graph_breaks(dynamic):
    torch.compiler.reset()
    compiled = torch.compile(lambda *args: abba_linear(*args), fullgraph=True, dynamic=dynamic)
    for tokens in (300, 70) if dynamic else (300,):
        tensors, dy = layer(tokens)
        check_step(step(tensors, dy, compiled), tensors, dy)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved-hooks", "reentrant"])
def test_gradient_checkpointing(use_reentrant):
    tensors, dy = layer()

    def backward(function):
        for tensor in tensors:
            tensor.grad = None
        y = function(*tensors, SCALE)
        y.backward(dy)
        return y, *(tensor.grad for tensor in tensors if tensor.requires_grad)

    plain = backward(abba_linear)
    assert_equal(backward(lambda *args: checkpoint(abba_linear, *args, use_reentrant=use_reentrant)), plain)


def test_autocast_with_float32_masters():
    (x, weight, bias, *factors), dy = layer()
    tensors = [x.detach().float().requires_grad_(), weight.float(), bias.float(), *factors]
    with torch.autocast("cuda", torch.bfloat16):
        y, *grads = step(tensors, dy)
    assert y.dtype == torch.bfloat16 and [grad.dtype for grad in grads] == [torch.float32] * 5
    check_step((y, grads[0].bfloat16(), *grads[1:]), [x, weight, bias, *factors], dy)


def test_a_patched_model_learns():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 32)).to("cuda", torch.bfloat16)
    patch_model(model, AbbaConfig(r=16, target_modules=["0", "2"]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    x, target = draw(512, 64, dtype=torch.bfloat16, seed=1), draw(512, 32, dtype=torch.bfloat16, seed=2)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.mse_loss(model(x).float(), target.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    assert torch.cuda.current_device() == 0
    (x, *rest), dy = layer()
    want = step([x, *rest], dy)
    tensors = [t.detach().to("cuda:1").requires_grad_(t.requires_grad) for t in (x, *rest)]
    got = step(tensors, dy.to("cuda:1"))
    assert {t.device.index for t in got} == {1} and torch.cuda.current_device() == 0
    assert_equal([t.to("cuda:0") for t in got], want)
    check_all(*case(100, 200, 16, 16, torch.bfloat16, device="cuda:1"))


# --- past 2^31 elements ---


def need_memory(gib):
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, there are {free:.0f}")


@pytest.mark.parametrize("tokens, features, ranks", [(2**19 + 70, 4096, (4, 8)), (2**21 + 70, 64, (16, 64)),
                                                     (70, 2**25, (2, 8))], ids=["long x", "long u", "wide x"])
def test_more_than_2_to_31_elements(tokens, features, ranks):
    """All is zero but the first and the last rows, or columns, of which the last lie where 32 bits do not reach.

    The same operators on these alone are what test_against_dense covers.
    """
    need_memory(40)
    rank, wide = ranks[0] * ranks[1], features > tokens
    assert tokens * max(features, rank) > 2**31
    length = features if wide else tokens
    ends = torch.cat([torch.arange(64), torch.arange(length - 64, length)]).cuda()
    f1, f2 = (draw(r, features, dtype=torch.bfloat16, seed=r) for r in ranks)
    x = torch.zeros(tokens, features, dtype=torch.bfloat16, device="cuda")
    v = torch.zeros(tokens, rank, dtype=torch.bfloat16, device="cuda")
    if wide:
        few_x = draw(tokens, 128, dtype=torch.bfloat16, seed=3)
        few_v = v.copy_(draw(tokens, rank, dtype=torch.bfloat16, seed=4))
        few_f1, few_f2 = f1[:, ends], f2[:, ends]
        x[:, ends] = few_x
    else:
        few_x, few_v = (draw(128, t.size(1), dtype=torch.bfloat16, seed=seed) for t, seed in ((x, 3), (v, 4)))
        few_f1, few_f2 = f1, f2
        x[ends], v[ends] = few_x, few_v

    u, few_u = ops.project(x, f1, f2), ops.project(few_x, few_f1, few_f2)
    assert_close_to_truth(u if wide else u[ends], few_u, 2**-8, "project")
    assert wide or not u[64:-64].any()
    del u
    few_grads = ops.factor_grad(few_x, few_v, few_f1, few_f2, SCALE)
    for name, grad, few in zip(("df1", "df2"), ops.factor_grad(x, v, f1, f2, SCALE), few_grads):
        assert_close_to_truth(grad[:, ends] if wide else grad, few, 2**-8, name)
        assert not wide or not grad[:, 64:-64].any()
    del grad
    ops.expand_(x, v, f1, f2, SCALE)
    ops.expand_(few_x, few_v, few_f1, few_f2, SCALE)
    assert_close_to_truth(x[:, ends] if wide else x[ends], few_x, 2**-8, "expand_")
    assert wide or not x[64:-64].any()
