"""The CUDA kernels as nvcc compiles them: registers, spills and machine code. No GPU is needed.

Skipped where there is no nvcc, and nowhere else: with nvcc, a missing nvdisasm is a failure.
"""
import importlib.metadata
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "build_support"))
import cuda_toolkit  # noqa: E402

UNITS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90a")


def is_for_hopper(unit):
    return unit.stem.endswith("_sm90")


# For other architectures the units for Hopper hold empty kernels.
BUILDS = [(unit, architecture) for unit in UNITS for architecture in ARCHITECTURES
          if architecture == "sm_90a" or not is_for_hopper(unit)]


@dataclass(frozen=True)
class Family:
    max_registers: int  # per thread
    tensor_cores: bool = True
    copies: bool = True  # global memory reaches shared memory by asynchronous copies
    products: bool = True  # the tensor cores read products of two factors, made in registers
    hopper: bool = False  # wgmma and TMA do it


# A multiprocessor has 65536 registers: two blocks of 128 threads fit at 255 and three at 168, one of 256 at 250, one of 512 at 128.
FAMILIES = {
    "project_kernel": Family(max_registers=255),
    "expand_kernel": Family(max_registers=184),
    "factor_grad_kernel": Family(max_registers=250, products=False),
    "small_project_kernel": Family(max_registers=128, copies=False),
    # 384 threads; setmaxnreg moves registers of factor_grad from one warpgroup to the others.
    "project_sm90_kernel": Family(max_registers=168, hopper=True),
    "expand_sm90_kernel": Family(max_registers=168, hopper=True),
    "factor_grad_sm90_kernel": Family(max_registers=168, products=False, hopper=True),
    "magnitudes_kernel": Family(max_registers=40, tensor_cores=False, copies=False, products=False),
}


# --- the compiler's report ---


@dataclass(frozen=True)
class Kernel:
    family: str
    name: str  # from the family on, mangled
    registers: int
    stack_frame: int  # bytes; those of spilled registers included
    spill_stores: int
    spill_loads: int
    code: str  # its instructions, as nvdisasm prints them
    remarks: str  # of the compiler, on what it could not do well


REPORT = re.compile(r"""Compiling\ entry\ function\ '(?P<symbol>\w+)'.*?
    (?P<stack>\d+)\ bytes\ stack\ frame,\ (?P<stores>\d+)\ bytes\ spill\ stores,\ (?P<loads>\d+)\ bytes\ spill\ loads.*?
    Used\ (?P<registers>\d+)\ registers""", re.X | re.S)


def find_nvdisasm():
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm")
        return str(next(file for file in files if file.name == "nvdisasm").locate())
    except importlib.metadata.PackageNotFoundError:
        return shutil.which("nvdisasm")


def compile_unit(nvcc, nvdisasm, unit, architecture, folder):
    """The kernels of one unit, compiled with the flags of the build, unless that was done in this folder before."""
    cubin, remarked, listing = (folder / f"{unit.stem}.{architecture}.{kind}" for kind in ("cubin", "txt", "sass"))
    if not listing.exists():
        command = [nvcc, "-cubin", f"-arch={architecture}", "-Xptxas=-v", *cpp_extension.COMMON_NVCC_FLAGS,
                   *cuda_toolkit.FLAGS, "-O3", "-o", str(cubin), str(unit)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        remarked.write_text(done.stderr)
        listing.write_text(subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout)
    printed = remarked.read_text()
    code = dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^//-----|\Z)", listing.read_text(), re.M | re.S))
    kernels = []
    for report in REPORT.finditer(printed):
        if name := re.search(r"\d((?:[a-z]+_)+(?:sm\d+_)?kernel)\w*", report["symbol"]):
            numbers = [int(report[key]) for key in ("registers", "stack", "stores", "loads")]
            remarks = "\n".join(line for line in printed.splitlines() if report["symbol"] in line and "Loss" in line)
            kernels.append(Kernel(name[1], name[0][1:], *numbers, code[report["symbol"]], remarks))
    return kernels


@pytest.fixture(scope="session")
def kernels(shared_tmp):
    """(unit, architecture) -> its kernels, compiled two at a time; once for all workers of pytest-xdist."""
    try:
        nvcc = cuda_toolkit.find_nvcc()
    except cuda_toolkit.Unusable as reason:
        pytest.skip(f"no CUDA kernels are compiled: {reason}")
    nvdisasm = find_nvdisasm()
    assert nvdisasm, "nvcc is here but nvdisasm is not: `pip install nvidia-cuda-nvdisasm`"
    folder = shared_tmp / "cubins"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"), ThreadPoolExecutor(2) as pool:
        return dict(zip(BUILDS, pool.map(lambda pair: compile_unit(nvcc, nvdisasm, *pair, folder), BUILDS), strict=True))


each_build = pytest.mark.parametrize("unit, architecture", BUILDS, ids=lambda value: getattr(value, "stem", value))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_belongs_to_a_family(architecture, kernels):
    families = {kernel.family for build in BUILDS if build[1] == architecture for kernel in kernels[build]}
    expected = {name for name, family in FAMILIES.items() if architecture == "sm_90a" or not family.hopper}
    assert families == expected, "FAMILIES in this file says what is expected of each kernel"


@each_build
def test_no_register_is_spilled(unit, architecture, kernels):
    for kernel in kernels[unit, architecture]:
        assert (kernel.stack_frame, kernel.spill_stores, kernel.spill_loads) == (0, 0, 0), kernel.name
        assert not re.search(r"\b(LDL|STL)\b", kernel.code), kernel.name


@each_build
def test_registers_per_thread(unit, architecture, kernels):
    over = [(kernel.name, kernel.registers) for kernel in kernels[unit, architecture]
            if kernel.registers > FAMILIES[kernel.family].max_registers]
    assert not over


def test_warpgroups_share_the_registers_of_the_launch(kernels):
    """One warpgroup gives and two take; to take more than is there would be to wait for ever."""
    launched = 65536 // 384 // 8 * 8
    for unit, architecture in BUILDS:
        for kernel in kernels[unit, architecture]:
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
    instructions, labels, jumps = [], {}, []
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif match := INSTRUCTION.match(line):
            if target := re.search(r"`\((\.L_x_\d+)\)", match[2]):
                jumps.append((target[1], len(instructions)))
            instructions.append(Instruction(match[1], re.split(r",\s*", match[2])))
    loops = [(labels[target], at) for target, at in jumps if labels[target] <= at
             and any(instruction.mnemonic in TENSOR_CORES for instruction in instructions[labels[target]:at + 1])]
    innermost = [(first, last) for first, last in loops
                 if not any((a, b) != (first, last) and first <= a and b <= last for a, b in loops)]
    return [instructions[first:last + 1] for first, last in sorted(set(innermost))]


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


@each_build
def test_tensor_cores_and_asynchronous_copies(unit, architecture, kernels):
    for kernel in kernels[unit, architecture]:
        family = FAMILIES[kernel.family]
        assert bool(main_loops(kernel.code)) == family.tensor_cores, kernel.name
        copy = "UTMALDG" if family.hopper else "LDGSTS"
        assert bool(re.search(rf"\b{copy}\b", kernel.code)) == family.copies, kernel.name
        mnemonics = {instruction.mnemonic for loop in main_loops(kernel.code) for instruction in loop}
        assert mnemonics.intersection(TENSOR_CORES) == ({"HGMMA"} if family.hopper else {"HMMA"} if family.tensor_cores else set())


@each_build
def test_tensor_core_instructions_overlap(unit, architecture, kernels):
    """ptxas says where it had to wait for each wgmma before the next (C7508 to C7515). Only the wait after the loop is for all."""
    for kernel in kernels[unit, architecture]:
        assert not kernel.remarks
        if FAMILIES[kernel.family].hopper:
            waits = re.findall(r"\bWARPGROUP\.DEPBAR\.LE gsb0, (0x\d)", kernel.code)
            assert waits.count("0x0") == 1 and waits.count("0x1") == len(waits) - 1 >= 2, kernel.name


@each_build
def test_products_of_factors_go_from_register_to_tensor_core(unit, architecture, kernels):
    """The Khatri-Rao operand is made where it is used: it passes through no memory."""
    for kernel in kernels[unit, architecture]:
        for loop in main_loops(kernel.code):
            without, stores = follow_products(loop)
            assert not stores, kernel.name
            if FAMILIES[kernel.family].products:
                assert not without, kernel.name


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
