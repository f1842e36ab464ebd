"""The kernels for Hopper, emulated with every access checked: all forms, all schedules, and bugs put in on purpose.

What test_cuda_kernels.py asks of the others. A call that these do not cover falls back to the others, so each test makes sure
that it met wgmma.
"""
import emulator
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close_to_truth, dense_kr
from test_cuda_kernels import BF16, case, changed_copy, check, run_all
from test_ops import check_all

pytestmark = pytest.mark.skipif(bool(emulator.unavailable()), reason=emulator.unavailable() or "available")

HALF = (BF16, torch.float16)


def backend(mode="checked", schedule=emulator.Schedule(), num_sms=4, module=None):
    return emulator.Backend(module or emulator.build(mode=mode), schedule, num_sms, sm90=True)


def wgmmas(backend, call):
    """The call's results, and how many wgmma instructions each warp's share of the kernels issued."""
    backend.module.reset_counters()
    return call(backend), backend.module.counters()["wgmma"]


# r1 for few and for many columns (a, b), by r2: one tile of 64 or several, and more than a block takes at once.
RANKS = {8: (8, 35), 16: (4, 17), 32: (2, 9), 64: (1, 5)}
# 140 tokens fill 3 multiprocessors, where project takes its wide form, and not 1000.
FORMS = [(r1, r2, num_sms) for r2, (few, many) in RANKS.items() for r1, num_sms in ((few, 3), (many, 3), (many, 1000))]


@pytest.mark.parametrize("layout", ["rD", "Dr"])
@pytest.mark.parametrize("index, form", list(enumerate(FORMS)), ids=str)
def test_every_form(index, form, layout):
    r1, r2, num_sms = form
    arguments = case(140, 200, r1, r2, HALF[r1 % 2], layout)
    results, count = wgmmas(backend(num_sms=num_sms), lambda b: run_all(b, *arguments))
    assert count > 100
    check(results, *arguments)
    schedule = emulator.SCHEDULES[1:][(2 * index + (layout == "Dr")) % 4]  # each of the others in six forms; bit for bit
    again = run_all(backend(schedule=schedule, num_sms=num_sms), *arguments)
    assert all(torch.equal(a, b) for a, b in zip(again, results, strict=True))


@pytest.mark.parametrize("tokens, features, r1, r2, num_sms", [
    (700, 264, 16, 16, 9),  # factor_grad splits the tokens, expand_ changes its u between two tiles
    (700, 72, 40, 8, 3),
    (130, 264, 33, 32, 2),  # more columns than expand_ keeps: the other kernel
    (130, 72, 70, 8, 3),  # more values of a
    (65, 8, 1, 8, 132),
    (400, 8, 2, 16, 1),  # one tile of features: each group of expand_ has every other u
], ids=str)
def test_long_pipelines(tokens, features, r1, r2, num_sms):
    arguments = case(tokens, features, r1, r2, layout="Dr")
    results, count = wgmmas(backend(num_sms=num_sms), lambda b: run_all(b, *arguments))
    assert count > 0
    check(results, *arguments)
    for order, seed in (("descending", 0), ("random", 1)):
        schedule = emulator.Schedule("random", "early", order, seed)
        again = run_all(backend(schedule=schedule, num_sms=num_sms), *arguments)
        assert all(torch.equal(a, b) for a, b in zip(again, results, strict=True))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tokens=st.integers(65, 300), features=st.integers(1, 40).map(lambda k: 8 * k), r1=st.integers(1, 40),
       r2=st.sampled_from(sorted(RANKS)), num_sms=st.integers(1, 9), dtype=st.sampled_from(HALF), layout=st.sampled_from(["rD", "Dr"]),
       masters=st.booleans(), schedule=st.sampled_from(emulator.SCHEDULES))
def test_any_shape_is_no_worse_than_torch(tokens, features, r1, r2, num_sms, dtype, layout, masters, schedule):
    x, v, f1, f2 = case(tokens, features, r1, r2, dtype, layout, torch.float32 if masters else dtype)
    _, count = wgmmas(backend("fast", schedule, num_sms), lambda b: check_all(x, f1, f2, v, backend=b))
    assert count > 0


def test_fp16_products_of_small_factors_do_not_underflow():
    x, v, f1, f2 = case(70, 64, 4, 16, torch.float16)
    f1, f2 = f1 * 2**-13, f2 * 2**-13  # every product is below the smallest fp16 number
    own = backend()
    kr = dense_kr(f1, f2)
    assert_close_to_truth(own.project(x * 2**10, f1, f2), (x * 2**10).double() @ kr.t(), 2**-10, "project")
    y = own.expand_(torch.zeros_like(x), v, f1, f2, 2.0**20)
    assert_close_to_truth(y, 2.0**20 * v.double() @ kr, 2**-10, "expand_")


@pytest.mark.parametrize("change", ["features", "stride", "address", "r2", "tokens"])
def test_what_tma_or_the_tiles_cannot_do_is_left_to_the_other_kernels(change):
    tokens, features, r2 = 64 if change == "tokens" else 100, 132 if change == "features" else 136, 12 if change == "r2" else 16
    x, v, f1, f2 = case(tokens, features, 4, r2)
    before = x.clone()
    if change == "stride":
        x = torch.cat([x, x[:, :4]], 1)[:, :features]
    elif change == "address":
        x = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)

    def run(b):  # expand_ last, into x itself
        u, (df1, df2) = b.project(x, f1, f2), b.factor_grad(x, v, f1, f2, 0.5)
        return u, b.expand_(x, v, f1, f2, 0.5), df1, df2

    results, count = wgmmas(backend("fast"), run)
    assert count == 0
    check(results, before, v, f1, f2)


def test_rows_beyond_2_to_the_31_elements():
    rows, features, gap = 70, 136, 2**27 + 8  # elements from row to row; only the rows' pages are ever touched
    far = torch.empty(((rows - 1) * gap + features,), dtype=BF16).as_strided((rows, features), (gap, 1))
    x, v, f1, f2 = case(rows, features, 4, 16)
    far.copy_(x)
    own = backend()
    results, count = wgmmas(own, lambda b: (b.project(far, f1, f2), *b.factor_grad(far, v, f1, f2, 0.5)))
    own.expand_(far, v, f1, f2, 0.5)
    assert count > 0
    check((results[0], far.clone(), *results[1:]), x, v, f1, f2)


@pytest.mark.parametrize("r2", sorted(RANKS))
@pytest.mark.parametrize("layout", ["rD", "Dr"])
def test_no_bank_is_met_twice(r2, layout):
    own = backend("fast")
    run = wgmmas(own, lambda b: run_all(b, *case(256, 256, 256 // r2, r2, layout=layout)))
    assert run[1] > 300
    counters = own.module.counters()
    assert counters["stmatrix_phases"] > 1000 and counters["tma_loads"] > 50
    assert counters["ldmatrix_extra_wavefronts"] == counters["stmatrix_extra_wavefronts"] == 0


# --- bugs that must be found: (file, what is there, what the bug makes of it, the op, what the message must say) ---

_PIPELINE, _PROJECT, _EXPAND, _GRAD = (f"csrc/cuda/{name}" for name in (
    "pipeline_sm90.cuh", "project_sm90.cu", "expand_sm90.cu", "factor_grad_sm90.cu"))
_WAIT_FULL = "mbarrier_wait(full(ring.stage), ring.phase);"
_WAIT_EMPTY = "mbarrier_wait(empty(ring.stage), ring.phase ^ 1);"
MUTATIONS = {
    "project does not wait for a stage": (_PIPELINE, _WAIT_FULL, "", "project", "flight|race|uninit"),
    "expand_ does not wait for a slot": (_PIPELINE, _WAIT_FULL, "", "expand_", "flight|race|uninit"),
    "factor_grad does not wait for a stage": (_PIPELINE, _WAIT_FULL, "", "factor_grad", "flight|race|uninit"),
    "waits for the wrong phase": (_PIPELINE, _WAIT_FULL, "mbarrier_wait(full(ring.stage), ring.phase ^ 1);", "project", "flight|race|uninit"),
    "project refills before the release": (_PIPELINE, _WAIT_EMPTY, "", "project", "race|flight|arriv"),
    "factor_grad refills before the release": (_PIPELINE, _WAIT_EMPTY, "", "factor_grad", "race|flight|arriv"),
    "barriers are not made visible to TMA": (_PROJECT, "    mbarrier_init_fence();\n", "", "project", "fence"),
    "a stage is released while it is multiplied": (
        _PROJECT, "if (!kFirst && k == 0) arrive_warp(barriers.empty(previous));", "if (k == 0) arrive_warp(barriers.empty(ring.stage));",
        "project", "race"),
    "the accumulators are read too early": (_PROJECT, "  wgmma_wait<0>();\n", "", "project", None),
    "the operand's registers are overwritten": (_PROJECT, "r_kr[(k + 1) % 2], tile0", "r_kr[k % 2], tile0", "project", None),
    "registers without a fence": (_PROJECT, "      wgmma_fence();\n", "", "project", "fence"),
    "u leaves without a proxy fence": (_PROJECT, "  fence_proxy_async();\n", "", "project", "proxy"),
    "u leaves before all warps have stored": (
        _PROJECT, "  group == 0 ? sync_some<1, kGroupThreads>() : sync_some<2, kGroupThreads>();\n", "", "project", "race|proxy|uninit"),
    "one warp's arrival is not expected": (_PROJECT, "barriers.init(1 + kGroupThreads / 32,", "barriers.init(kGroupThreads / 32,", "project",
                                           "arriv|flight|race|uninit"),
    "bytes that never come": (_PROJECT, "C::kTileBytes);\n      tma_load", "C::kTileBytes + 16);\n      tma_load", "project", "deadlock"),
    "y leaves without a proxy fence": (_EXPAND, "    fence_proxy_async();\n", "", "expand_", "proxy"),
    "a slot is refilled while y leaves it": (_EXPAND, "      tma_wait_read<0>();\n      mbarrier_arrive", "      mbarrier_arrive", "expand_", "race"),
    "a u that a group has no tile of is never released": (_EXPAND, "  pass_to_u_of(tiles.last - 1);\n", "", "expand_ of few features", "deadlock"),
    "u is replaced while it is read": (_EXPAND, "      u_barriers.wait_empty(u_ring);\n", "", "expand_", "race|arriv|flight"),
    "expand_'s accumulators are read too early": (_EXPAND, "    wgmma_wait<0>();\n", "", "expand_", None),
    "the block ends while y leaves": (
        _EXPAND, "  if (leads) tma_wait_read<0>();  // shared memory lives as long as the block\n", "", "expand_", "bulk|store|exit"),
    "P takes the place of tiles that are still read": (_GRAD, "  sync();  // the pipeline's memory is free\n", "", "factor_grad", "race"),
    "P is contracted before it is there": (_GRAD, "kFactorsAt, 0);\n  sync();\n", "kFactorsAt, 0);\n", "factor_grad", "race|uninit"),
    "factors are read before they are there": (
        _GRAD, "  mbarrier_wait(smem_address(smem) + C::kFactorsAt, 0);\n", "", "factor_grad", "race|uninit"),
    "a stage released with the step in flight": (_GRAD, "wgmma_wait<1>();", "wgmma_wait<2>();", "factor_grad", "race"),
    "the wrong half of v": (_GRAD, "s_v + i * C::kTileBytes, v_map", "s_v + (i ^ 1) * C::kTileBytes, v_map", "factor_grad", None),
}


@pytest.mark.parametrize("path, old, new, op, message", MUTATIONS.values(), ids=MUTATIONS)
def test_the_detector_finds(path, old, new, op, message, tmp_path):
    """A message of None: the result is wrong, which the tests above see."""
    module = emulator.build(changed_copy(tmp_path / "source", path, old, new), "checked")
    tokens, features = {"project": (130, 520), "expand_": (300, 520), "factor_grad": (600, 136),
                        "expand_ of few features": (400, 8)}[op]
    x, v, f1, f2 = case(tokens, features, 16, 16)
    found = []
    for schedule in emulator.SCHEDULES:
        own, y = backend(module=module, schedule=schedule, num_sms=2), x.clone()
        try:
            if op == "project":
                assert torch.allclose(own.project(x, f1, f2).double(), x.double() @ dense_kr(f1, f2).t(), rtol=0.05, atol=2)
            elif op.startswith("expand_"):
                own.expand_(y, v, f1, f2, 0.5)
                assert torch.allclose(y.double(), x.double() + 0.5 * v.double() @ dense_kr(f1, f2), rtol=0.05, atol=1)
            else:
                df1, _ = own.factor_grad(x, v, f1, f2, 0.5)
                p = (v.double().t() @ x.double()).view(16, 16, features)
                assert torch.allclose(df1.double(), 0.5 * torch.einsum("abd,bd->ad", p, f2.double()), rtol=0.05, atol=5)
        except AssertionError:
            found.append("wrong result")
        except RuntimeError as error:
            found.append(str(error))
        if any(not message or word in text.lower() for text in found for word in (message or "").split("|")):
            return
    pytest.fail(f"found, but not as {message!r}: {found}" if found else "found in no schedule")
