"""The CUDA kernels' own sources, emulated with every access checked: all forms, all schedules, and bugs put in on purpose.

Correct results in every dtype, layout and shape class are test_ops.py's business; here it is synchronisation, memory and
whether the detector would have seen a mistake in these very kernels.
"""
import itertools
import shutil

import emulator
import pytest
import torch
from oracle import assert_close_to_truth, dense_kr

pytestmark = pytest.mark.skipif(bool(emulator.unavailable()), reason=emulator.unavailable() or "available")

BF16 = torch.bfloat16
MANY, FEW = 1000, 1  # multiprocessors: few let project take its wide form and factor_grad not split the tokens


def draw(*shape, dtype=BF16, layout="rD", seed=0):
    value = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return value.t().contiguous().t() if layout == "Dr" else value


def case(tokens, features, r1, r2, dtype=BF16, layout="rD", factor_dtype=torch.float32):
    return (draw(tokens, features, dtype=dtype), draw(tokens, r1 * r2, dtype=dtype, seed=1),
            draw(r1, features, dtype=factor_dtype, layout=layout, seed=2), draw(r2, features, dtype=factor_dtype, layout=layout, seed=3))


def run_all(backend, x, v, f1, f2):
    """u, y, df1, df2"""
    y = x.clone()
    backend.expand_(y, v, f1, f2, 0.5)
    return backend.project(x, f1, f2), y, *backend.factor_grad(x, v, f1, f2, 0.5)


def check(results, x, v, f1, f2):
    kr = dense_kr(f1, f2)
    p = (v.double().t() @ x.double()).view(f1.size(0), f2.size(0), -1)
    truths = (x.double() @ kr.t(), x.double() + 0.5 * v.double() @ kr,
              0.5 * torch.einsum("abd,bd->ad", p, f2.double()), 0.5 * torch.einsum("abd,ad->bd", p, f1.double()))
    for name, result, truth in zip(("u", "y", "df1", "df2"), results, truths):
        assert_close_to_truth(result, truth, 3 * torch.finfo(result.dtype).eps if result.dtype != torch.float32 else 1e-6, name)


# A form of the kernels: r2's padding, narrow or wide (more than 64 padded columns), a few tokens or many, split or not.
FORMS = [(r1, r2, tokens, num_sms)
         for r2, narrow, wide in ((8, 8, 33), (16, 4, 17), (32, 2, 9), (64, 1, 5))
         for r1, tokens, num_sms in ((narrow, 70, MANY), (wide, 70, FEW), (wide, 70, MANY), (wide, 10, MANY))]


@pytest.mark.parametrize("layout", ["rD", "Dr"])
@pytest.mark.parametrize("r1, r2, tokens, num_sms", FORMS, ids=str)
def test_every_form_in_every_schedule(r1, r2, tokens, num_sms, layout):
    module = emulator.build(mode="checked")
    arguments = case(tokens, 136, r1, r2, (BF16, torch.float16)[r1 % 2], layout)
    results = [run_all(emulator.Backend(module, schedule, num_sms), *arguments) for schedule in emulator.SCHEDULES]
    check(results[0], *arguments)
    for result in results[1:]:  # bit for bit
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@pytest.mark.parametrize("tokens, features, r1, r2", [(1100, 264, 16, 16), (1100, 130, 40, 8), (1030, 100, 3, 40)], ids=str)
def test_blocks_that_share_a_sum(tokens, features, r1, r2):
    # factor_grad splits tokens and rows: the last of the blocks to arrive adds up, whichever it is
    module = emulator.build(mode="checked")
    arguments = case(tokens, features, r1, r2, layout="Dr")
    results = [run_all(emulator.Backend(module, emulator.Schedule(block_order=order, seed=seed), 12), *arguments)
               for order, seed in (("ascending", 0), ("descending", 0), ("random", 1), ("random", 2))]
    check(results[0], *arguments)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0]))


@pytest.mark.parametrize("layout, r2, num_sms", itertools.product(["rD", "Dr"], [8, 16, 32, 64], [FEW, MANY]))
def test_no_bank_is_met_twice_by_ldmatrix(layout, r2, num_sms):
    module = emulator.build(mode="fast")
    module.reset_counters()
    run_all(emulator.Backend(module, num_sms=num_sms), *case(130, 256, 256 // r2, r2, layout=layout))
    counters = module.counters()
    assert counters["ldmatrix_phases"] > 10_000 and counters["mma"] > 10_000 and counters["cp_async"] > 10_000
    assert counters["ldmatrix_extra_wavefronts"] == 0


@pytest.mark.parametrize("r2, features", [(4, 128), (12, 128), (24, 128), (16, 122)])
def test_rows_of_even_elements_are_copied_asynchronously(r2, features):
    """r2 = 4 is the half of the rank 8 that many train. Element by element each would be waited for."""
    module = emulator.build(mode="fast")
    arguments = x, v, f1, f2 = case(130, features, 2, r2)
    module.reset_counters()
    check(run_all(emulator.Backend(module, num_sms=MANY), *arguments), *arguments)
    assert module.counters()["cp_async_bytes"] == 2 * (3 * x.numel() + 2 * v.numel())  # each operator reads each once


def test_rows_beyond_2_to_the_31_elements():
    rows, features, gap = 3, 136, 2**31 + 8  # elements from row to row; only the rows' pages are ever touched
    far = torch.empty(((rows - 1) * gap + features,), dtype=BF16).as_strided((rows, features), (gap, 1))
    x, v, f1, f2 = case(rows, features, 4, 16)
    backend = emulator.Backend(emulator.build(mode="checked"))
    far.copy_(x)
    results = backend.project(far, f1, f2), *backend.factor_grad(far, v, f1, f2, 0.5)
    backend.expand_(far, v, f1, f2, 0.5)
    check((results[0], far.clone(), *results[1:]), x, v, f1, f2)


# --- bugs that must be found: (file, what is there, what the bug makes of it, the op, what the message must say) ---

_PROJECT, _EXPAND, _GRAD, _SHARES, _TILE = (f"csrc/cuda/{name}" for name in (
    "project.cu", "expand.cu", "factor_grad.cu", "factor_grad.cuh", "tile.cuh"))
MUTATIONS = {
    "no barrier before a stage is read": (
        _PROJECT, "    cp_async_wait<C::kStages - 2>();\n    __syncthreads();\n", "    cp_async_wait<C::kStages - 2>();\n", "project", "race"),
    "the wait lets one group too many fly": (
        _PROJECT, "cp_async_wait<C::kStages - 2>();", "cp_async_wait<C::kStages - 1>();", "project", "flight|uninit"),
    "factors stored into the tile being read": (
        _PROJECT, "if (step + 1 < num_steps) store_factors(step + 1);", "if (step + 1 < num_steps) store_factors(step);", "project",
        "race|uninit"),
    "token mask off by one": (
        _PROJECT, "if (row < p.launch.num_tokens && a <", "if (row <= p.launch.num_tokens && a <", "project", "bounds|outside|beside"),
    "no barrier before the warps' sums are added": (
        _PROJECT, "acc[m][i];\n  __syncthreads();\n", "acc[m][i];\n", "small project", "race|uninit"),
    "words of rows that begin between two": (
        _PROJECT, "reinterpret_cast<uintptr_t>(x) % 4 == 0 && p.x.stride % 2 == 0;", "true;", "small project of odd rows",
        "alignment"),
    "y read before it has landed": (
        _EXPAND, "    cp_async_wait<0>();\n    __syncthreads();  // y is there\n", "", "expand_", "flight|race"),
    "u overwritten while others read it": (
        _EXPAND, "      __syncthreads();  // whatever was read or written in shared memory before is done with\n", "", "expand_ in chunks", "race"),
    "a stage refilled too early": (
        _GRAD, "load_step(step + C::kStages - 1);", "load_step(step + C::kStages);", "factor_grad", "race|flight|uninit"),
    "the pipeline's memory reused without a barrier": (
        _GRAD, "  __syncthreads();  // the pipeline's memory is free\n", "", "factor_grad", "race"),
    "arrival without a fence": (
        _SHARES, "      __threadfence();  // this block's sums, before its arrival\n", "", "factor_grad", "race"),
    "arrival before all threads have written": (
        _SHARES, "  sync();\n  if (thread == 0) {\n    unsigned before", "  if (thread == 0) {\n    unsigned before",
        "factor_grad", "race"),
    "last block waits for one arrival too few": (
        _SHARES, "before + 1 == slots", "before + 2 == slots", "factor_grad", "race|uninit"),
    "a divergent collective": (
        _GRAD, "        over_b.x += __shfl_xor_sync(", "        if (lane != 5) over_b.x += __shfl_xor_sync(", "factor_grad",
        "diverge|deadlock"),
    "rows past the end are not masked": (
        _TILE, "const int count = r < rows ? span.count : 0;", "const int count = span.count;", "project", "bounds|outside"),
    "the tail of a row is not zeroed": (
        _TILE, "      cp_async_16(s_address", "      if (count) cp_async_16(s_address", "project", "uninit"),
}


def changed_copy(folder, path, old, new):
    """A copy of csrc with one place changed, and the kernels' forms cut down to one: it compiles in a second or two."""
    cuts = {
        "csrc/dispatch.h": ("switch (padded_rank2(factors.r2)) {", "switch (16) {\n    default: return fn(std::integral_constant<int, 16>{}, "
                            "std::false_type{});\n  }\n  switch (0) {"),
        "csrc/cuda/khatri_rao.cuh": ("return dtype == Dtype::kFloat16 ? fn(__half{}) : fn(__nv_bfloat16{});", "return fn(__nv_bfloat16{});"),
    }
    shutil.copytree(emulator.ROOT / "csrc", folder / "csrc")
    for name, (whole, cut) in [(path, (old, new)), *cuts.items()]:
        source = (folder / name).read_text()
        assert source.count(whole) == 1, f"{name} has changed: {whole!r} is not there once"
        (folder / name).write_text(source.replace(whole, cut))
    return folder


@pytest.mark.parametrize("path, old, new, op, message", MUTATIONS.values(), ids=MUTATIONS)
def test_the_detector_finds(path, old, new, op, message, tmp_path):
    root = changed_copy(tmp_path / "source", path, old, new)
    module = emulator.build(root, "checked")
    tokens, features, r1 = {"small project": (12, 264, 16), "small project of odd rows": (12, 263, 16),
                            "expand_ in chunks": (100, 264, 40)}.get(op, (600, 264, 16))
    x, v, f1, f2 = case(tokens, features, r1, 16)
    calls = {"project": lambda backend: backend.project(x, f1, f2),
             "expand_": lambda backend: backend.expand_(x.clone(), v, f1, f2, 0.5),
             "factor_grad": lambda backend: backend.factor_grad(x, v, f1, f2, 0.5)}
    call = next(call for name, call in calls.items() if name in op)
    found = []
    for schedule in emulator.SCHEDULES:
        try:
            call(emulator.Backend(module, schedule, num_sms=6))
        except RuntimeError as error:
            found.append(str(error))
            if any(word in found[-1].lower() for word in message.split("|")):
                return
    pytest.fail(f"found, but not as {message!r}: {found}" if found else "found in no schedule")


def test_swizzle_forgotten_is_counted(tmp_path):
    root = changed_copy(tmp_path / "source", _TILE, "((chunk ^ (row / kRowsPerLine & kMask)) << 4)", "(chunk << 4)")
    module = emulator.build(root, "fast")
    module.reset_counters()
    run_all(emulator.Backend(module), *case(130, 256, 16, 16))
    assert module.counters()["ldmatrix_extra_wavefronts"] > 10_000
