"""Every wrapper of a Hopper instruction, alone, emulated and on a Hopper GPU where there is one: see test_conformance.py."""
import re
from collections.abc import Callable

import emulator
import pytest
import torch
from test_conformance import (FOLDER, HALF, G, T, Case, all_bits, compile_for_device, generator, run_emulated,
                              run_on_device, words)
from torch import Tensor

SOURCE = FOLDER / "wrappers_sm90.cu"
COLUMNS, ROWS, STRIDE, BOX_ROWS = 150, 100, 160, 48  # as wrappers_sm90.cu has them
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


# --- what the kernels are given and what is true ---


def swizzled(tile: Tensor) -> Tensor:
    """A tile [rows, 64] of 16-bit elements as it lies in shared memory: chunk c of row r at c ^ (r % 8)."""
    rows = torch.arange(tile.size(0))[:, None]
    return tile.reshape(-1, 8, 8)[rows, torch.arange(8) ^ rows % 8].reshape(-1, 64)


def phases() -> Case:
    values = all_bits(5 * 96, 20).view(5, 96)
    return Case("mbarrier", values, None, values.roll(-1, 1), threads=96)


def box(column: int, row: int) -> tuple[slice, slice, slice, slice]:
    """Rows and columns of the matrix that are in the box, and of the box that are in the matrix."""
    rows, columns = (range(max(first, 0), max(first, 0, min(first + size, most)))
                     for first, size, most in ((row, BOX_ROWS, ROWS), (column, 64, COLUMNS)))
    return (slice(rows.start, rows.stop), slice(columns.start, columns.stop), slice(rows.start - row, rows.stop - row),
            slice(columns.start - column, columns.stop - column))


def loaded(column: int, row: int) -> Case:
    matrix, tile = all_bits(ROWS * STRIDE // 2, 21).view(torch.int16).view(ROWS, STRIDE), torch.zeros(BOX_ROWS, 64, dtype=torch.int16)
    rows, columns, tile_rows, tile_columns = box(column, row)
    tile[tile_rows, tile_columns] = matrix[rows, columns]
    return Case("load_box", matrix, torch.tensor([column, row], dtype=torch.int32), swizzled(tile), threads=64)


def stored(column: int, row: int) -> Case:
    tile = all_bits(BOX_ROWS * 32, 22).view(torch.int16).view(BOX_ROWS, 64)
    matrix = torch.full((ROWS, STRIDE), -1, dtype=torch.int16)
    rows, columns, tile_rows, tile_columns = box(column, row)
    matrix[rows, columns] = tile[tile_rows, tile_columns]
    return Case("store_box", swizzled(tile), torch.tensor([column, row], dtype=torch.int32), matrix, threads=64)


def a_registers(a: Tensor) -> Tensor:
    """a [64, 64] as words [4 steps, 4 warps, 32 lanes, 4]."""
    parts = a.view(4, 16, 4, 16).permute(2, 0, 1, 3)
    return torch.stack([words(torch.stack([parts[:, :, G + row, 2 * T + k], parts[:, :, G + row, 2 * T + k + 1]], -1))
                        for k in (0, 8) for row in (0, 8)], -1)


def d_registers(d: Tensor) -> Tensor:
    """d [64, n] as floats [4 warps, 32 lanes, n / 2]."""
    parts = d.view(4, 16, -1, 8)  # warp, row, tile of eight columns
    return torch.stack([parts[:, G + row, :, 2 * T + column] for row in (0, 8) for column in (0, 1)], -1).transpose(0, 1).flatten(2)


def product(source: str, name: str, n: int, a: Tensor, b: Tensor, exact: bool) -> Case:
    """d [64, n] = a [64, 64] b [64, n]: exact where all partial sums are floats, else within 2^-16 of the magnitudes' sum,
    four times what one instruction may be off, as test_conformance says."""
    dtype = HALF[name]
    truth, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    a, b = a.to(dtype), b.to(dtype)
    if source == "registers":
        operands = a_registers(a), swizzled(b.t().contiguous())
    else:
        operands = swizzled(a.t().contiguous()), torch.stack([swizzled(b[:, i:i + 64].contiguous()) for i in range(0, n, 64)])
    kernel = f"wgmma_{source}_{name}_{n}"
    if exact:
        return Case(kernel, *operands, d_registers(truth.float()), threads=128)
    return Case(kernel, *operands, d_registers(truth), 2**-16 * d_registers(magnitude), threads=128)


def integer_product(source: str, name: str, n: int) -> Case:
    a, b = (torch.randint(-16, 17, (64, size), generator=generator(23 + n)).float() for size in (64, n))
    return product(source, name, n, a, b, exact=True)


def random_product(source: str, name: str, n: int) -> Case:
    a, b = (torch.randn(64, size, generator=generator(24 + n)).to(HALF[name]) for size in (64, n))
    return product(source, name, n, a, b, exact=False)


def matrices(trans: bool) -> Case:
    values = torch.arange(4 * 64, dtype=torch.int16).view(4, 8, 8)
    rows = torch.randperm(64, generator=generator(25 + trans))[:32]
    memory = torch.full((64, 8), -1, dtype=torch.int16)
    memory[rows] = values.view(32, 8)
    matrix = values.transpose(1, 2) if trans else values
    registers = torch.stack([words(torch.stack([m[G, 2 * T], m[G, 2 * T + 1]], -1)) for m in matrix], -1)
    return Case("stmatrix" + "_trans" * trans, registers, rows.int(), memory)


def halves() -> Case:
    values = all_bits(128, 26)
    return Case("halves", values, None, values.view(2, 64).flip(1).flatten(), threads=128)


def registers() -> Case:
    values = all_bits(384, 27)
    return Case("registers", values, None, values, threads=384)


BOXES = ((0, 0), (64, 50), (128, 64), (-10, -7), (200, 0), (3, 5))
CASES: dict[str, Callable[[], Case]] = {
    "mbarrier": phases, "halves": halves, "registers": registers,
    **{"stmatrix" + "_trans" * trans: lambda trans=trans: matrices(trans) for trans in (False, True)},
    **{f"{kind}_at_{column}_{row}": lambda make=make, place=(column, row): make(*place)
       for kind, make in (("load", loaded), ("store", stored)) for column, row in BOXES},
    **{f"wgmma_{kind}_{source}_{name}_{n}": lambda make=make, arguments=(source, name, n): make(*arguments)
       for kind, make in (("integers", integer_product), ("random", random_product))
       for source in ("registers", "tiles") for name in HALF for n in (64, 128)},
}
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


# --- the two builds ---


@pytest.fixture(scope="module", params=emulator.MODES)
def emulated(request):
    if reason := emulator.unavailable():
        pytest.skip(reason)
    return emulator.build_module(emulator.ROOT, [FOLDER / "bindings.cpp", SOURCE], request.param)


@pytest.fixture(scope="module", params=["90a", "80"])
def any_library(request, tmp_path_factory):
    return compile_for_device(SOURCE, tmp_path_factory.mktemp("conformance") / "wrappers.so", request.param)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_for_device(SOURCE, tmp_path_factory.mktemp("conformance") / "wrappers.so", "90a")


# --- tests ---


@all_cases
def test_emulated(emulated, case):
    case = case()
    for schedule in emulator.SCHEDULES:
        case.check(run_emulated(emulated, schedule, case))


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@all_cases
def test_on_device(library, case):
    case = case()
    case.check(run_on_device(library, case))


def test_every_kernel_compiles_for_a_device(any_library):
    kernels = {make().kernel for make in CASES.values()}
    assert kernels == set(re.findall(r'^    \{"(\w+)", ', (emulator.ROOT / SOURCE).read_text(), re.M))
    assert any_library(b"no such kernel", None, None, None, 1, 32) == -1


def test_every_wrapper_has_a_kernel():
    wrappers = re.findall(r"^ABBA_DEVICE \w+ (\w+)\(", (emulator.ROOT / "csrc/cuda/ptx_sm90.cuh").read_text(), re.M)
    kernels = (emulator.ROOT / SOURCE).read_text()
    assert len(wrappers) >= 20
    assert [wrapper for wrapper in wrappers if not re.search(rf"\b{wrapper}\b[<(]", kernels)] == []
