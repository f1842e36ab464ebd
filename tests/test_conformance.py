"""Every wrapper of an instruction, alone, against what PTX's documentation says: emulated, and on a GPU where there is one.

An emulator and kernels that share a misreading of a fragment's layout agree with each other. So the same kernels of
conformance/wrappers.cu are compiled by nvcc too, and the device must give the same bits; sums of mma, which a tensor core
does not round as a CPU does, must lie within their bound.
"""
import ctypes
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import emulator
import pytest
import torch
from torch import Tensor

sys.path.append(str(emulator.ROOT / "build_support"))
import cuda_toolkit  # noqa: E402

FOLDER = Path("tests/conformance")
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LANE = torch.arange(32)
G, T = LANE // 4, LANE % 4
NAN, INFINITY = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """A kernel of wrappers.cu, its operands, and the truth.

    Attributes:
        kernel: its name.
        a, b: what it reads.
        expected: what it writes; floats in float64 where a tolerance is given.
        tolerance: allowed for each element, where it need not be the expected one bit for bit.
        blocks, threads: of the grid.
    """

    kernel: str
    a: Tensor | None
    b: Tensor | None
    expected: Tensor
    tolerance: Tensor | None = None
    blocks: int = 1
    threads: int = 32

    def output(self) -> Tensor:
        dtype = torch.float32 if self.expected.dtype == torch.float64 else self.expected.dtype
        return torch.full(self.expected.shape, NAN if dtype.is_floating_point else -1, dtype=dtype)

    def check(self, got: Tensor) -> None:
        if self.tolerance is None:
            assert_same_bits(got, self.expected)
        else:
            assert ((got.double() - self.expected).abs() <= self.tolerance).all()


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Bit for bit, but for a NaN's payload."""
    if want.dtype.is_floating_point:
        assert torch.equal(got.isnan(), want.isnan())
        integers = {2: torch.int16, 4: torch.int32}[want.element_size()]
        got, want = got.nan_to_num(0, INFINITY, -INFINITY).view(integers), want.nan_to_num(0, INFINITY, -INFINITY).view(integers)
    different = (got != want).nonzero()
    assert not len(different), f"{len(different)} differ, the first at {different[0].tolist()}"


# --- what the kernels are given and what is true ---


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def words(halves: Tensor) -> Tensor:
    """Pairs of 16-bit elements [..., 2] as int32 [...], the first in the low half."""
    return halves.contiguous().view(torch.int16).view(torch.int32).squeeze(-1)


def all_bits(count: int, seed: int) -> Tensor:
    """Words of any bits."""
    return torch.randint(-2**31, 2**31, (count,), generator=generator(seed), dtype=torch.int32)


def patterns(count: int, seed: int, special: list[int]) -> Tensor:
    """16-bit patterns [count, 2], any of them, and each pair of the special ones."""
    random = torch.randint(-2**15, 2**15, (count, 2), generator=generator(seed), dtype=torch.int16)
    pairs = torch.cartesian_prod(*2 * [torch.tensor(special, dtype=torch.int32).to(torch.int16)])
    random[:len(pairs)] = pairs
    return random


def addresses() -> Case:
    offsets = torch.randperm(4097, generator=generator(0))[:64].int()
    return Case("smem_address", offsets, None, torch.cat([offsets, torch.zeros(1, dtype=torch.int32)]), threads=64)


def matrices(count: int, trans: bool) -> Case:
    """ldmatrix: lane l of a group of eight gives a row of its matrix; register j holds two of its elements."""
    memory = torch.arange(64 * 8, dtype=torch.int16).view(64, 8)
    rows = torch.randperm(64, generator=generator(count + trans))[:32]
    matrix = memory[rows].view(4, 8, 8)[:count]
    if trans:
        matrix = matrix.transpose(1, 2)
    registers = torch.stack([words(torch.stack([m[G, 2 * T], m[G, 2 * T + 1]], -1)) for m in matrix], -1)
    return Case(f"ldmatrix_x{count}" + "_trans" * trans, memory, rows.int(), registers)


def copies(size: int) -> Case:
    """cp.async of 0 to all bytes: what is past them becomes zero."""
    source = torch.randint(-128, 128, (64, size), generator=generator(5), dtype=torch.int8)
    sizes = torch.arange(64, dtype=torch.int32) % (size + 1)
    return Case(f"cp_async_{size}", source, sizes, source.where(torch.arange(size) < sizes[:, None], 0), threads=64)


def copy_groups() -> Case:
    source = torch.randint(-2**31, 2**31, (3, 64, 4), generator=generator(6), dtype=torch.int32)
    return Case("cp_async_groups", source, None, source, threads=64)


def fragments(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The registers of m16n8k16: words [32, 6] of a [16, 16] and b [16, 8], floats [32, 4] of c [16, 8]."""
    a_words = [words(torch.stack([a[G + row, 2 * T + k], a[G + row, 2 * T + k + 1]], -1)) for k in (0, 8) for row in (0, 8)]
    b_words = [words(torch.stack([b[2 * T + k, G], b[2 * T + k + 1, G]], -1)) for k in (0, 8)]
    return torch.stack([*a_words, *b_words], -1), accumulators(c)


def accumulators(c: Tensor) -> Tensor:
    return torch.stack([c[G + row, 2 * T + column] for row in (0, 8) for column in (0, 1)], -1)


def product(name: str, a: Tensor, b: Tensor, c: Tensor, exact: bool) -> Case:
    """mma: exact where all partial sums are floats, else within 2^-18 of the sum of magnitudes.

    A tensor core aligns 8 or 16 products and the accumulator to the largest of them and cuts off what is below 23 bits or
    more: at most 18 times 2^-23 of the largest.
    """
    truth, dtype = c.double() + a.double() @ b.double(), HALF[name]
    magnitude = c.double().abs() + a.double().abs() @ b.double().abs()
    operands = fragments(a.to(dtype), b.to(dtype), c)
    if exact:
        return Case(f"mma_{name}", *operands, accumulators(truth.float()))
    return Case(f"mma_{name}", *operands, accumulators(truth), 2**-18 * accumulators(magnitude))


def random_product(name: str) -> Case:
    a, b, c = (torch.randn(*shape, generator=generator(7)) for shape in ((16, 16), (16, 8), (16, 8)))
    return product(name, a.to(HALF[name]), b.to(HALF[name]), c, exact=False)


def integer_product(name: str) -> Case:
    a, b, c = (torch.randint(-16, 17, shape, generator=generator(8)).float() for shape in ((16, 16), (16, 8), (16, 8)))
    return product(name, a, b, c, exact=True)


def one_at_a_time(name: str, k: int) -> Case:
    """a is one in column k alone, b counts: every element's place shows."""
    a, b = torch.zeros(16, 16), torch.arange(128.0).view(16, 8)
    a[:, k] = torch.arange(1.0, 17)
    return product(name, a, b, torch.zeros(16, 8), exact=True)


def special_product(name: str) -> Case:
    """A denormal comes through; infinity and NaN spread over their rows, and no farther."""
    a, b = torch.zeros(16, 16), torch.ones(16, 8)
    a[3, 5] = torch.finfo(HALF[name]).smallest_normal / 4
    a[7, 0], a[8, 0], a[9, 0], a[9, 1] = INFINITY, NAN, INFINITY, -INFINITY
    return product(name, a, b, torch.zeros(16, 8), exact=True)


def shuffled() -> Case:
    values = torch.randint(-2**31, 2**31, (32,), generator=generator(9), dtype=torch.int32)
    sources = torch.randint(0, 32, (32,), generator=generator(10), dtype=torch.int32)
    down = torch.where(LANE + 3 < 32, LANE + 3, LANE)
    return Case("shuffles", values, sources, torch.stack([values[sources], values[LANE ^ 5], values[down]], -1))


def scales(f1: float, f2: float) -> Case:
    """The powers of two that bring the largest element of each factor into [2^6, 2^7), and what undoes both."""
    maxima = torch.rand(2, 32, generator=generator(11)) * torch.tensor([[f1], [f2]])
    maxima[0, 17], maxima[1, 30] = f1, f2
    exponents = torch.tensor([0 if value in (0, INFINITY) else max(-60, min(60, 7 - torch.tensor(value).frexp()[1].item()))
                              for value in (f1, f2)])
    powers = 2.0 ** torch.stack([*exponents, -exponents.sum()])
    return Case("scales", maxima, None, powers.expand(32, 3).contiguous())


SPECIAL = {"bfloat16": [0, 0x8000, 1, 0x8001, 0x7F, 0x80, 0x3F80, 0x3F81, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0x2000],
           "float16": [0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x3C00, 0x3C01, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x1000]}
GRID = {"blocks": 32, "threads": 128}  # 4096 words


def multiplied(name: str) -> Case:
    """Each product rounded once: denormals, infinities and NaN too."""
    x, y = patterns(4096, 12, SPECIAL[name]), patterns(4096, 13, SPECIAL[name])
    y[:len(SPECIAL[name])**2] = x[:len(SPECIAL[name])**2].flip(1)
    truth = (x.view(HALF[name]).float() * y.view(HALF[name]).float()).to(HALF[name])
    return Case(f"multiply_{name}", words(x), words(y), truth, **GRID)


def halves(name: str) -> Case:
    x = patterns(4096, 14, SPECIAL[name])
    truth = torch.stack([words(x[:, [i, j]]) for i, j in ((0, 0), (1, 1), (1, 0))], -1)
    return Case(f"halves_{name}", words(x), None, truth, **GRID)


def widened(name: str) -> Case:
    """Exact, and back; NaN apart, which may change its payload."""
    x = patterns(4096, 15, SPECIAL[name])
    x[:, 1] = 0
    x = torch.where(x.view(HALF[name]).isnan(), 0, x)
    values = x.view(HALF[name])[:, 0].float().view(torch.int32)
    return Case(f"widen_{name}", words(x), None, torch.stack([values, words(x)], -1), **GRID)


def narrowed(name: str) -> Case:
    """Rounded to nearest, ties to even; also where the result is a denormal or overflows."""
    bits = torch.randint(-2**31, 2**31, (4096,), generator=generator(16), dtype=torch.int32)
    bits[:512] = bits[:512] & -2**16 | 2**15  # halfway between two bfloat16
    values = bits.view(torch.float32)
    values[512:2048] = values[512:2048].frexp()[0] * 2.0 ** torch.randint(-26, 18, (1536,), generator=generator(17))
    return Case(f"narrow_{name}", values, None, torch.stack([values.to(HALF[name]), torch.zeros(4096, dtype=HALF[name])], -1),
                **GRID)


def powers() -> Case:
    exponents = torch.arange(-126, 130, dtype=torch.int32).clamp(max=127)
    return Case("powers_of_two", exponents, None, 2.0**exponents, blocks=2, threads=128)


CASES: dict[str, Callable[[], Case]] = {
    "smem_address": addresses,
    **{f"ldmatrix_x{count}" + "_trans" * trans: lambda count=count, trans=trans: matrices(count, trans)
       for count in (4, 2) for trans in (False, True)},
    **{f"cp_async_{size}": lambda size=size: copies(size) for size in (16, 4)},
    "cp_async_groups": copy_groups,
    "shuffles": shuffled,
    "scales": lambda: scales(3.0, 2.0**-14),
    "scales_of_extremes": lambda: scales(0.0, INFINITY),
    "scales_of_float32_extremes": lambda: scales(2.0**-100, 2.0**100),
    "powers_of_two": powers,
}
for name in HALF:
    CASES |= {f"{kind}_{name}": lambda make=make, name=name: make(name) for kind, make in {
        "mma_random": random_product, "mma_integers": integer_product, "mma_special": special_product, "multiply": multiplied,
        "halves": halves, "widen": widened, "narrow": narrowed}.items()}
    CASES |= {f"mma_column{k}_{name}": lambda k=k, name=name: one_at_a_time(name, k) for k in range(16)}
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


# --- the two builds ---


@pytest.fixture(scope="module", params=emulator.MODES)
def emulated(request):
    if reason := emulator.unavailable():
        pytest.skip(reason)
    return emulator.build_module(emulator.ROOT, [FOLDER / "bindings.cpp", FOLDER / "wrappers.cu"], request.param)


def run_emulated(module, schedule: emulator.Schedule, case: Case) -> Tensor:
    out = case.output()
    with emulator.Launch(module, schedule) as launch:
        pointers = []
        for name, tensor in (("a", case.a), ("b", case.b), ("out", out)):
            if tensor is not None:
                launch.register(tensor, name, writable=name == "out", initialised=name != "out")
            pointers.append(0 if tensor is None else tensor.data_ptr())
        with emulator.located(module):
            assert module.run(case.kernel, *pointers, case.blocks, case.threads) == 0
    return out


def compile_for_device(source: Path, target: Path, architecture: str):
    """run_wrapper of one of the files of kernels, as nvcc compiles it."""
    try:
        nvcc = cuda_toolkit.find_nvcc()
    except cuda_toolkit.Unusable as reason:
        pytest.skip(f"the wrappers cannot be compiled for a GPU: {reason}")
    command = [nvcc, "-shared", "-Xcompiler", "-fPIC", "-std=c++20", f"-ccbin={emulator.CXX}",
               f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
               "-I", emulator.ROOT / "csrc", "-o", target, emulator.ROOT / source]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    run = ctypes.CDLL(str(target)).run_wrapper
    run.argtypes = [ctypes.c_char_p, *3 * [ctypes.c_void_p], *2 * [ctypes.c_int]]
    return run


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """wrappers.cu for the visible GPU, else for the first architecture of the kernels."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else cuda_toolkit.MIN_ARCHITECTURE
    return compile_for_device(FOLDER / "wrappers.cu", tmp_path_factory.mktemp("conformance") / "wrappers.so", f"{major}{minor}")


def run_on_device(library, case: Case) -> Tensor:
    moved = [None if t is None else t.cuda() for t in (case.a, case.b, case.output())]
    torch.cuda.synchronize()
    pointers = [None if t is None else t.data_ptr() for t in moved]
    error = library(case.kernel.encode(), *pointers, case.blocks, case.threads)
    assert error == 0, f"CUDA error {error}"
    return moved[-1].cpu()


# --- tests ---


@all_cases
def test_emulated(emulated, case):
    case = case()
    for schedule in emulator.SCHEDULES:
        case.check(run_emulated(emulated, schedule, case))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@all_cases
def test_on_device(library, case):
    case = case()
    case.check(run_on_device(library, case))


def test_every_kernel_compiles_for_a_device(library):
    kernels = {make().kernel for make in CASES.values()}
    assert kernels == set(re.findall(r'^    \{"(\w+)", ', (emulator.ROOT / FOLDER / "wrappers.cu").read_text(), re.M))
    assert library(b"no such kernel", None, None, None, 1, 32) == -1
    if not torch.cuda.is_available():
        assert library(b"shuffles", None, None, None, 1, 32) > 0  # no device, says the runtime


def test_every_wrapper_has_a_kernel():
    wrappers = re.findall(r"^ABBA_DEVICE \w+ (\w+)\(", (emulator.ROOT / "csrc/cuda/ptx.cuh").read_text(), re.M)
    kernels = (emulator.ROOT / FOLDER / "wrappers.cu").read_text()
    assert len(wrappers) >= 7
    assert [wrapper for wrapper in wrappers if not re.search(rf"\b{wrapper}\b[<(]", kernels)] == []
