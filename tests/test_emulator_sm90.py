"""The emulator's Hopper instructions: what they compute, and that every known bug around them is caught."""
import re
from pathlib import Path

import emulator
import pytest
import torch

if emulator.unavailable():
    pytest.skip(emulator.unavailable(), allow_module_level=True)

from test_emulator import out, pack, run

FOLDER = Path("tests/emulator_kernels")
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
TILE = 64 * 128  # bytes
NAN = float("nan")
LANE = torch.arange(32)
G, T = LANE // 4, LANE % 4


def _build(mode):
    return emulator.build_module(emulator.ROOT, [FOLDER / "bindings.cpp", FOLDER / "kernels_sm90.cu"], mode)


@pytest.fixture(scope="module", params=emulator.MODES)
def any_build(request):
    return _build(request.param)


@pytest.fixture(scope="module")
def checked():
    return _build("checked")


@pytest.fixture(params=emulator.SCHEDULES, ids=str)
def schedule(request):
    return request.param


def matrix(t, box_rows=64):
    return [t.size(1), t.size(0), t.stride(0), box_rows]


def integers(*shape, seed=0):
    return torch.randint(-2**15, 2**15, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int16)


# --- TMA ---


def box(rows=100, columns=150, box_rows=64, column=0, row=0):
    """The arguments of a copy of one box, and the copy."""
    x, y = integers(rows, 160)[:, :columns], integers(rows, 168, seed=1)[:, :columns]
    sizes = [*matrix(x, box_rows), *matrix(y, box_rows), column, row]
    return dict(buffers=[x, ("inout", y), out(1)], threads=64, shared=TILE + 256, sizes=sizes), y


BOXES = [(100, 150, 64, 0, 0), (100, 150, 64, 64, 30), (100, 150, 64, 128, 64), (100, 150, 40, -10, -7),
         (100, 150, 64, 200, 0), (100, 150, 64, 0, -64), (10, 13, 64, 0, 0), (1, 1, 1, 0, 0)]


@pytest.mark.parametrize("rows, columns, box_rows, column, row", BOXES, ids=str)
def test_boxes_are_clipped(any_build, schedule, rows, columns, box_rows, column, row):
    arguments, y = box(rows, columns, box_rows, column, row)
    want = y.clone()
    inside = slice(max(row, 0), max(row + box_rows, 0)), slice(max(column, 0), max(column + 64, 0))
    want[inside] = arguments["buffers"][0][inside]
    any_build.reset_counters()
    run(any_build, schedule, "box", **arguments)
    assert torch.equal(y, want)
    counters = any_build.counters()
    assert (counters["tma_loads"], counters["tma_bytes"]) == (1, 128 * box_rows)


@pytest.mark.parametrize("kernel", ["publish", "publish_late"])
def test_stored_tiles_are_swizzled(any_build, schedule, kernel):
    arguments, y = publish()
    run(any_build, schedule, kernel, **arguments)
    assert torch.equal(y, (100 * torch.arange(64)[:, None] + torch.arange(64)).to(torch.int16))


def publish():
    y = integers(64, 64)
    return dict(buffers=[integers(64, 64), ("out", y)], threads=64, shared=TILE, sizes=2 * matrix(y)), y


def pipeline():
    x = integers(5 * 64, 64).abs()
    y = out(64)
    return dict(buffers=[x, y], threads=96, shared=2 * TILE + 32, sizes=2 * matrix(x)), y[1]


def test_pipeline(any_build, schedule):
    arguments, sums = pipeline()
    run(any_build, schedule, "pipeline", **arguments)
    assert torch.equal(sums, arguments["buffers"][0].view(5, 64, 64).sum((0, 2)).int())


@pytest.mark.parametrize("change, message", [
    (dict(offset=4), "not 16-byte aligned"), (dict(stride=68), "not a multiple of 16"), (dict(box_rows=0), "boxes of 0 rows"),
    (dict(box_rows=257), "boxes of 257 rows"), (dict(rows=0), "0 rows of"), (dict(columns=200), "rows of 400 bytes"),
], ids=str)
def test_maps_that_a_driver_would_refuse_are_refused(any_build, change, message):
    x = integers(64, 160)
    columns, rows, stride, box_rows = (change.get(name, value) for name, value in zip(
        ("columns", "rows", "stride", "box_rows"), matrix(x)))
    pointer = x.data_ptr() + change.get("offset", 0)
    with pytest.raises(RuntimeError, match=message):
        any_build.run("box", [pointer, pointer], [1, 64, TILE + 256, *2 * [columns, rows, stride, box_rows], 0, 0])


# --- wgmma ---


def fragments(a):
    """a [64, 64] as registers of wgmma [4 steps, 128 threads, 4], in m16k16 fragments as PTX's documentation draws them."""
    registers = torch.empty(4, 128, 4, dtype=torch.int32)
    for step in range(4):
        for warp in range(4):
            part = a[16 * warp:16 * warp + 16, 16 * step:16 * step + 16]
            for i, (row, k) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
                words = torch.stack([part[G + row, 2 * T + k], part[G + row, 2 * T + k + 1]], -1)
                registers[step, 32 * warp:32 * warp + 32, i] = pack(words).squeeze(-1)
    return registers


def accumulators(registers):
    """d [64, n] of the threads' registers [128, n / 2]."""
    n = 2 * registers.size(1)
    d = torch.empty(64, n)
    for warp in range(4):
        for i in range(n // 2):
            d[16 * warp + G + i // 2 % 2 * 8, i // 4 * 8 + 2 * T + i % 2] = registers[32 * warp:32 * warp + 32, i]
    return d


def product(source, dtype, n, k=64, rows=None):
    """Arguments, registers of d, a [64, 64] and b [64, n] with zeros from k (and in b from row `rows`) on."""
    a, b = (torch.randn(64, size, generator=torch.Generator().manual_seed(i)).to(dtype) for i, size in enumerate((64, n)))
    a[:, k:], b[k:] = 0, 0
    if rows is not None:
        b[:, rows:] = 0
    d = torch.full((128, n // 2), NAN)
    if source == "registers":
        b_stored = torch.full((rows or n, k + 8), NAN, dtype=dtype)[:, :k]
        b_stored.copy_(b.t()[:rows, :k])
        buffers = [b_stored, b_stored, fragments(a), ("out", d)]
    else:
        a_stored, b_stored = a.t()[:k].contiguous(), torch.full((k, n + 8), NAN, dtype=dtype)[:, :rows or n]
        b_stored.copy_(b[:k, :rows])
        buffers = [a_stored, b_stored, torch.zeros(1), ("out", d)]
    sizes = [*matrix(buffers[0]), *matrix(b_stored)]
    return dict(buffers=buffers, threads=128, shared=3 * TILE + 8, sizes=sizes), d, a, b


@pytest.mark.parametrize("k, rows", [(64, None), (40, 56)], ids=["whole", "ragged"])
@pytest.mark.parametrize("n", [64, 128])
@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("source", ["registers", "tiles"])
def test_products(any_build, schedule, source, name, n, k, rows):
    arguments, d, a, b = product(source, HALF[name], n, k, rows)
    any_build.reset_counters()
    run(any_build, schedule, f"{source}_{name}_{n}", **arguments)
    truth, magnitude = a.double() @ b.double() + 0.5, a.double().abs() @ b.double().abs() + 0.5
    assert ((accumulators(d) - truth).abs() <= 2**-19 * magnitude).all()
    assert any_build.counters()["wgmma"] == 4


def replaced():
    d = torch.full((128, 64), NAN)
    return dict(buffers=[torch.zeros(1), ("out", d)], threads=128, shared=TILE), d


def test_groups_end_one_by_one(any_build, schedule):
    arguments, d = replaced()
    run(any_build, schedule, "replaced", **arguments)
    columns = 1.0 + torch.arange(64) % 2
    assert torch.equal(accumulators(d[:, :32].contiguous()), (32 * columns).expand(64, 64))
    assert torch.equal(accumulators(d[:, 32:].contiguous()), (96 * columns).expand(64, 64))


# --- stmatrix, setmaxnreg ---


def stmatrix():
    words = torch.arange(128, dtype=torch.int32) * 65539
    return dict(buffers=[words, out(128), out(128)], threads=32, shared=512), words


@pytest.mark.parametrize("kernel", ["stmatrix", "stmatrix_trans"])
def test_stmatrix_is_the_inverse_of_ldmatrix(any_build, schedule, kernel):
    arguments, words = stmatrix()
    any_build.reset_counters()
    run(any_build, schedule, kernel, **arguments)
    assert torch.equal(arguments["buffers"][1][1], words)
    assert any_build.counters()["stmatrix_phases"] == 4 and any_build.counters()["stmatrix_extra_wavefronts"] == 0


def test_registers_may_be_passed_on(any_build, schedule):
    run(any_build, schedule, "set_registers", [], threads=384)


# --- bugs ---

CASES = {
    "box": box, "publish": publish, "pipeline": pipeline, "stmatrix": stmatrix, "replaced": replaced,
    "registers": lambda: product("registers", torch.bfloat16, 64), "tiles": lambda: product("tiles", torch.float16, 128),
    "set_registers": lambda: (dict(buffers=[], threads=384), None),
}
BUGS = {
    "box": {1: "TMA: TMA store.*in flight", 2: "TMA: TMA store.*in flight", 3: "proxy: TMA load for an mbarrier",
            4: "128 bytes more landed", 5: "deadlock.*lacks 0 arrivals and 128 bytes", 6: "TMA load: the tile.*not 1024-byte",
            7: "exits while its stores", 8: "race: store.*read by a TMA store", 9: "where none was initialised",
            10: "which holds an mbarrier", 11: "load of shared memory.*holds an mbarrier", 12: "TMA: TMA load.*in flight",
            13: "arrival 2 of 1", 14: "deadlock.*lacks 1 arrivals", 15: "exits while loads are in flight",
            16: "race: mbarrier|none was initialised", 17: "not 8-byte aligned", 18: "outside of the"},
    "publish": {1: "proxy: TMA store", 2: "race|uninitialised", 3: "proxy: TMA store", 4: "race|uninitialised",
                5: "barrier 1 of 64 threads, here of 96|barrier 1 of 96 threads, here of 64", 6: "deadlock.*named barrier",
                7: "exits while its stores"},
    "pipeline": {1: "TMA: load.*in flight", 2: "TMA: load.*in flight|deadlock", 3: "TMA load.*in flight|race: TMA load",
                 4: "race: TMA load.*read by thread", 5: "race: TMA load.*read by thread", 6: "race: TMA load.*read by thread",
                 7: "deadlock.*lacks 1 arrivals"},
    "registers": {1: "wgmma: load of an accumulator", 2: "wgmma: store to a register of A", 3: "no wgmma.fence",
                  4: "deadlock.*wgmma", 5: "proxy: wgmma", 6: "race: TMA load.*read by wgmma of warp", 7: "not 1024-byte aligned",
                  8: "did not commit or wait for", 9: "did not commit or wait for", 10: "fewer wgmma instructions",
                  11: "TMA: wgmma.*in flight|wgmma.*uninitialised", 12: "only 1, 128 bytes", 13: "wgmma: store to an accumulator",
                  14: "different descriptors", 15: "wgmma: load of an accumulator"},
    "tiles": {1: "wgmma: load of an accumulator", 3: "no wgmma.fence", 6: "race: TMA load.*read by wgmma of warp",
              8: "did not commit or wait for", 11: "TMA: wgmma.*in flight"},
    "replaced": {1: "wgmma: load of an accumulator"},
    "stmatrix": {1: "not 16-byte aligned", 2: "outside of the 512 bytes", 3: "race|uninitialised"},
    "set_registers": {1: "hold 66560 registers, there are 64512", 2: "have set 232 and 0 registers",
                      3: "hold 65536 registers, there are 64512", 4: "hold 80896 registers"},
}
ALL_BUGS = [(f"{kernel}/{number}", message) for kernel, bugs in BUGS.items() for number, message in bugs.items()]


@pytest.mark.parametrize("kernel, message", ALL_BUGS, ids=[name for name, _ in ALL_BUGS])
def test_bugs_are_caught(checked, kernel, message):
    found = []
    for schedule in emulator.SCHEDULES:
        try:
            run(checked, schedule, kernel, **CASES[kernel.split("/")[0]]()[0])
        except RuntimeError as error:
            found.append(str(error))
    assert found, "no schedule found anything"
    assert any(re.search(message, text) for text in found), found[0]
    place = r" at (tests/emulator_kernels/kernels_sm90\.cu:\d|the end of the kernel)"
    assert all(re.search(place, text) for text in found), found[0]


@pytest.mark.parametrize("kernel", ["registers/1", "registers/13", "tiles/1"])
def test_what_is_read_too_early_is_no_number(kernel):
    arguments, d, *_ = CASES[kernel.split("/")[0]]()
    run(_build("fast"), emulator.Schedule(copy="late"), kernel, **arguments)
    if kernel.endswith("/1"):
        assert torch.isfinite(d).all()  # what is read after the wait is right
