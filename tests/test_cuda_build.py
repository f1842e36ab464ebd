"""The CUDA kernels in the installed module, for each architecture that it was built for: registers and machine code. No GPU is needed.

Skipped where the module was built without them, and nowhere else: a missing cuobjdump or nvdisasm is a failure.
"""
import functools
import importlib.metadata
import itertools
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from filelock import FileLock

from abba_ext import _C, ops

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Family:
    max_registers: int  # per thread
    on_blackwell: int | None = None  # the same there, if it is another
    tensor_cores: bool = True
    copies: bool = True  # global memory reaches shared memory by asynchronous copies
    products: bool = True  # the tensor cores read products of two factors, made in registers
    hopper: bool = False  # wgmma and TMA do it


# A multiprocessor has 65536 registers: two blocks of 128 threads fit at 255 and three at 168, one of 256 at 250, one of 512 at 128.
FAMILIES = {
    "project_kernel": Family(max_registers=255),
    "expand_kernel": Family(max_registers=184, on_blackwell=255),
    "factor_grad_kernel": Family(max_registers=250, products=False),
    "small_project_kernel": Family(max_registers=128, copies=False),
    # 384 threads; setmaxnreg moves registers of factor_grad from one warpgroup to the others.
    "project_sm90_kernel": Family(max_registers=168, hopper=True),
    "expand_sm90_kernel": Family(max_registers=168, hopper=True),
    "factor_grad_sm90_kernel": Family(max_registers=168, products=False, hopper=True),
    "magnitudes_kernel": Family(max_registers=40, tensor_cores=False, copies=False, products=False),
}


# --- what is in the module ---


@dataclass
class Kernel:
    architecture: str
    family: str
    name: str  # from the family on, mangled
    registers: int
    stack: int  # bytes per thread; those of spilled registers included
    code: str = field(repr=False)  # its instructions, as nvdisasm prints them

    @functools.cached_property
    def loops(self):
        return main_loops(self.code)


def tool(name):
    """Its path: from the package of that name, or on PATH."""
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}")
        found = str(next(file for file in files if file.name == name).locate())
    except importlib.metadata.PackageNotFoundError:
        found = shutil.which(name)
    assert found, f"the module has CUDA kernels, but {name} is not here: `pip install nvidia-cuda-{name}`"
    return found


def output(*command, **options):
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, **options).stdout


@pytest.fixture(scope="session")
def kernels(shared_tmp):
    """Those that do something: for other architectures than sm_90a the kernels for Hopper are empty."""
    if not ops.build_info()["cuda"]:
        pytest.skip("built without CUDA kernels")
    folder, cuobjdump = shared_tmp / "cubins", tool("cuobjdump")
    with FileLock(f"{folder}.lock"):
        if not folder.exists():  # once for all workers of pytest-xdist
            folder.mkdir()
            output(cuobjdump, "-xelf", "all", _C.__file__, cwd=folder)
            for cubin in list(folder.iterdir()):
                cubin.with_suffix(".sass").write_text(output(tool("nvdisasm"), "-c", cubin))
    code = {}
    for listing in folder.glob("*.sass"):
        sections = re.findall(r"^\.text\.(\w+):\n(.*?)(?=^//-----|\Z)", listing.read_text(), re.M | re.S)
        code |= {(listing.suffixes[-2][1:], symbol): text for symbol, text in sections}
    kernels = []
    for part in output(cuobjdump, "-res-usage", _C.__file__).split("\narch = ")[1:]:
        architecture = part.split()[0]
        for symbol, registers, stack in re.findall(r" Function (\w+):\s+REG:(\d+) STACK:(\d+)", part):
            if name := re.search(r"\d((?:[a-z]+_)+(?:sm\d+_)?kernel)\w*", symbol):
                kernels.append(Kernel(architecture, name[1], name[0][1:], int(registers), int(stack), code[architecture, symbol]))
    return [kernel for kernel in kernels if kernel.architecture == "sm_90a" or not FAMILIES[kernel.family].hopper]


def test_every_kernel_is_there_for_every_architecture(kernels):
    built = {number[0] + number[1] for number in re.findall(r"(\d+)\.(\d)", ops.build_info()["cuda"])}
    expected = {(f"sm_{number}" + "a" * (number == "90"), name) for number in built for name, family in FAMILIES.items()
                if number == "90" or not family.hopper}
    assert {(kernel.architecture, kernel.family) for kernel in kernels} == expected, "FAMILIES says what is expected of each kernel"


def test_no_register_is_spilled(kernels):
    for kernel in kernels:
        assert kernel.stack == 0, kernel
        assert not re.search(r"\b(LDL|STL)\b", kernel.code), kernel.name


def test_registers_per_thread(kernels):
    for kernel in kernels:
        family, is_blackwell = FAMILIES[kernel.family], int(re.search(r"\d+", kernel.architecture)[0]) >= 100
        assert kernel.registers <= (is_blackwell and family.on_blackwell or family.max_registers), kernel


def test_warpgroups_share_the_registers_of_the_launch(kernels):
    """One warpgroup gives and two take; to take more than is there would be to wait for ever."""
    launched = 65536 // 384 // 8 * 8
    for kernel in kernels:
        given, taken = (re.findall(rf"\bUSETMAXREG\.{kind}\S* .*?(0x\w+)", kernel.code) for kind in ("DEALLOC", "TRY_ALLOC"))
        assert (len(given), len(taken)) == ((1, 1) if kernel.family == "factor_grad_sm90_kernel" else (0, 0)), kernel.name
        if given:
            assert kernel.registers == launched, kernel.name
            assert int(given[0], 16) + 2 * int(taken[0], 16) <= 3 * launched, kernel.name


# --- machine code ---


@dataclass(frozen=True)
class Instruction:
    operation: str  # with its modifiers: LDGSTS.E.BYPASS.128
    operands: list[str]

    @property
    def mnemonic(self):
        return self.operation.partition(".")[0]

    @property
    def width(self):
        """Registers of its result, or of what it stores."""
        modifiers = self.operation.split(".")[1:]
        if self.mnemonic == "HMMA" or "128" in modifiers or self.mnemonic == "LDSM" and "4" in modifiers:
            return 4
        return 2 if {"64", "WIDE"} & set(modifiers) or self.mnemonic == "LDSM" and "2" in modifiers else 1

    def halves(self, operand, count=1):
        """The 16-bit halves of the registers that an operand names; none where it is an address or a predicate."""
        first = re.match(r"[-~|]*R(\d+)\b", self.operands[operand]) if len(self.operands) > operand else None
        return [(int(first[1]) + i, half) for i in range(count) for half in (0, 1)] if first else []

    @property
    def read(self):
        """The halves of all operands but the first."""
        return [half for operand in range(1, len(self.operands)) for half in self.halves(operand)]

    @property
    def stored(self):
        return self.halves(1, self.width)[:1 if "U16" in self.operation else None]

    @property
    def is_product(self):
        """A packed product of two registers. HFMA2 of constants is another way to load one."""
        return self.mnemonic in ("HMUL2", "HFMA2") and len(self.read) >= 4

    @property
    def sources(self):
        """half written -> the halves that it is moved from."""
        if not re.match(r"(MOV|PRMT|SEL|FSEL|LOP3|SHF|IMAD\.(MOV|U32|SHL))\b", self.operation):
            return {}
        written = self.halves(0)
        if self.mnemonic == "PRMT" and self.operands[2].startswith("0x"):
            # A nibble for each byte written: 0 to 3 are the bytes of operand 1, 4 to 7 those of operand 3.
            halves = [*(self.halves(1) or [None, None]), *(self.halves(3) or [None, None])]
            selected = [halves[(int(self.operands[2], 16) >> 4 * byte & 7) // 2] for byte in range(4)]
            return {written[0]: selected[:2], written[1]: selected[2:]}
        return dict.fromkeys(written, self.read)


TENSOR_CORES = {"HMMA": (2, 2), "HGMMA": (1, 4)}  # the operand that may be a product of factors, and its registers

INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


def main_loops(code):
    """The innermost loops with tensor core instructions, each as a list of instructions."""
    lines = code.splitlines()
    labels = {line.partition(":")[0]: at for at, line in enumerate(lines) if line.startswith(".L_x_")}
    jumps = [(labels[target[1]], at) for at, line in enumerate(lines) if (target := re.search(r"`\((\.L_x_\d+)\)", line))]
    products = [at for at, line in enumerate(lines) if re.search(rf"\b({'|'.join(TENSOR_CORES)})\b", line)]
    loops = {(first, last) for first, last in jumps if any(first <= at <= last for at in products)}
    innermost = [(first, last) for first, last in loops
                 if not any((a, b) != (first, last) and first <= a and b <= last for a, b in loops)]
    return [[Instruction(match[1], re.split(r",\s*", match[2])) for line in lines[first:last + 1] if (match := INSTRUCTION.match(line))]
            for first, last in sorted(innermost)]


def follow_products(loop):
    """(Tensor core instructions that read no product, instructions that store one in shared memory)."""
    products = set()  # halves of registers
    for _ in range(2):  # the second time with what the first one carries around the loop
        without, stores = [], []
        for instruction in loop:
            if instruction.mnemonic in TENSOR_CORES:
                if not products.intersection(instruction.halves(*TENSOR_CORES[instruction.mnemonic])):
                    without.append(instruction)
            if instruction.mnemonic == "STS" and products.intersection(instruction.stored):
                stores.append(instruction)
            written = set() if instruction.mnemonic == "HGMMA" else set(instruction.halves(0, instruction.width))
            moved = {half for half, sources in instruction.sources.items() if products.intersection(sources)}
            products -= written  # under a predicate too: what is computed under one is stored under it
            products |= written if instruction.is_product else moved
    return without, stores


def test_tensor_cores_and_asynchronous_copies(kernels):
    for kernel in kernels:
        family = FAMILIES[kernel.family]
        assert bool(kernel.loops) == family.tensor_cores, kernel.name
        copy = "UTMALDG" if family.hopper else "LDGSTS"
        assert bool(re.search(rf"\b{copy}\b", kernel.code)) == family.copies, kernel.name
        mnemonics = {instruction.mnemonic for loop in kernel.loops for instruction in loop}
        assert mnemonics.intersection(TENSOR_CORES) == ({"HGMMA"} if family.hopper else {"HMMA"} if family.tensor_cores else set())


def test_tensor_core_instructions_overlap(kernels):
    """Only the wait after the loop is for all; where ptxas cannot let them overlap (C7508 to C7515) it waits after each wgmma."""
    for kernel in kernels:
        if FAMILIES[kernel.family].hopper:
            waits = re.findall(r"\bWARPGROUP\.DEPBAR\.LE gsb0, (0x\d)", kernel.code)
            assert waits.count("0x0") == 1 and waits.count("0x1") == len(waits) - 1 >= 2, kernel.name


def test_products_of_factors_go_from_register_to_tensor_core(kernels):
    """The Khatri-Rao operand is made where it is used: it passes through no memory."""
    for kernel in kernels:
        for loop in kernel.loops:
            without, stores = follow_products(loop)
            assert not stores, kernel.name
            if FAMILIES[kernel.family].products:
                assert not without, kernel.name


def longest_run(code, operation, others):
    """The most instructions of one kind without one of the others between them, by patterns of their whole names."""
    names = [match[1] for match in map(INSTRUCTION.match, code.splitlines()) if match]
    kinds = [bool(re.fullmatch(operation, name)) for name in names if re.fullmatch(f"{operation}|{others}", name)]
    return max((sum(run) for kind, run in itertools.groupby(kinds) if kind), default=0)


def test_project_writes_pairs_of_elements(kernels):
    for kernel in kernels:
        if kernel.family == "project_kernel":
            pairs, elements = (len(re.findall(rf"\bSTG\.E{width} ", kernel.code)) for width in ("", r"\.U16"))
            assert 2 * pairs == elements > 0, kernel.name


def test_factor_grad_waits_for_many_loads_at_once(kernels):
    """Behind its loop factors are staged and blocks' shares added up, once, so that nothing else hides a wait."""
    for kernel in kernels:
        if kernel.family.startswith("factor_grad"):
            assert longest_run(kernel.code, r"LDG\.E\.STRONG\.GPU", "FADD|FFMA") >= 8, kernel.name
        if kernel.family == "factor_grad_kernel":
            assert longest_run(kernel.code, r"LDG\.E", "STS") >= 4, kernel.name


@pytest.mark.parametrize("line, passes_through_memory", [
    ("STS.U16 [R9], R4", True),
    ("STS.64 [R9+0x10], R3", True),  # R3 and R4
    ("PRMT R8, RZ, 0x7610, R4 ;\n/*0001*/ STS.U16 [R9], R8", False),  # the other half of R8
    ("PRMT R8, R4, 0x7610, R8 ;\n/*0001*/ STS.U16 [R9], R8", True),
    ("MOV R4, R5 ;\n/*0001*/ STS [R9], R4", False),
], ids=["one half", "one of two registers", "not the half stored", "moved", "overwritten"])
def test_a_product_that_is_stored_is_seen(line, passes_through_memory):
    """So that the test above means something."""
    code = f""".L_x_1:
        /*0000*/ @P0 LDS R7, [R9] ;
        /*0010*/ HMMA.16816.F32.BF16 R12, R16, R4, R12 ;
        /*0020*/ HFMA2.BF16_V2 R4, R6.reuse, R7, -RZ.H0_H0 ;
        /*0030*/ {line} ;
        /*0040*/ @P1 BRA `(.L_x_1) ;"""
    [loop] = main_loops(code)
    without, stores = follow_products(loop)
    assert bool(stores) == passes_through_memory
    assert bool(without) == ("MOV" in line)


# --- the sources ---


def test_inline_assembly_is_in_one_place():
    sources = [path for path in (ROOT / "csrc").rglob("*.*") if path.parent.name != "emulation"]
    assert len(sources) > 10
    found = {str(path.relative_to(ROOT)) for path in sources if re.search(r"\basm\b", path.read_text())}
    assert all(re.fullmatch(r"csrc/cuda/ptx\w*\.cuh", path) for path in found), found
