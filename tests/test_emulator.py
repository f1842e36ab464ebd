"""The emulator itself: every known bug is caught under one schedule at least, and nothing is said of right kernels."""
import mmap
import re
from pathlib import Path

import pytest
import torch

import emulator

if emulator.unavailable():
    pytest.skip(emulator.unavailable(), allow_module_level=True)

FOLDER = Path("tests/emulator_kernels")
NAN = float("nan")


@pytest.fixture(scope="module", params=emulator.MODES)
def any_build(request):
    return _build(request.param)


@pytest.fixture(scope="module")
def checked():
    return _build("checked")


@pytest.fixture(params=emulator.SCHEDULES, ids=str)
def schedule(request):
    return request.param


def _build(mode):
    return emulator.build_module(emulator.ROOT, [FOLDER / "bindings.cpp", FOLDER / "kernels.cu"], mode)


def run(module, schedule, kernel, buffers, blocks=1, threads=64, shared=0, sizes=()):
    """Runs a kernel of kernels.cu. Each buffer is a tensor to read, or ("out" or "inout", tensor)."""
    with emulator.Launch(module, schedule) as launch:
        pointers = []
        for i, buffer in enumerate(buffers):
            access, tensor = buffer if isinstance(buffer, tuple) else ("in", buffer)
            launch.register(tensor, f"buffer{i}", writable=access != "in", initialised=access != "out")
            pointers.append(tensor.data_ptr())
        with emulator.located(module):
            module.run(kernel, pointers, [blocks, threads, shared, *sizes])


def out(*shape, dtype=torch.int32):
    return "out", torch.full(shape, -1 if dtype == torch.int32 else NAN, dtype=dtype)


def case(kernel, bugs, expected):
    """What a kernel is run with, what its bugs are called in messages, and what the right one computes."""
    def mark(function):
        CASES[kernel] = (function, expected)
        BUGS.extend((f"{kernel}/{number}", message) for number, message in bugs.items())
        return function
    return mark


CASES, BUGS = {}, []


@case("reverse", {1: "race|uninitialised"}, lambda data: data.flip(0))
def reverse():
    data = torch.arange(64, dtype=torch.int32)
    return dict(buffers=[data, out(64)], shared=256), data


@case("reverse_warp", {1: "race|uninitialised", 2: "race|uninitialised"},
      lambda data: data.view(2, 32).flip(1).flatten())
def reverse_warp():
    return reverse()


@case("refill", {1: "race: store"}, lambda data: data.view(3, 64).flip(1).sum(0))
def refill():
    data = torch.arange(192, dtype=torch.int32) ** 2
    return dict(buffers=[data, out(64)], shared=256), data


@case("barrier", {1: "bounds: store of 4 bytes", 2: "barrier|deadlock", 3: "barrier: threads of a block meet"},
      lambda data: torch.arange(64))
def barrier():
    return dict(buffers=[out(64)], shared=256), None


@case("double_buffer", {1: "cp.async", 2: "race|uninitialised|cp.async", 3: "race"},
      lambda data: data.view(5, 64, 4)[:, :, 0].flip(1).sum(0))
def double_buffer():
    data = torch.arange(5 * 64 * 4, dtype=torch.int32) * 3
    return dict(buffers=[data, out(64)], shared=2048, sizes=[5]), data


@case("chunk", {1: "bounds: cp.async of 16 bytes at buffer0", 2: "uninitialised: ldmatrix", 3: "not 16-byte aligned",
                4: "exits while its copies are in flight", 5: "cp.async: ldmatrix"}, None)
def chunk():
    return dict(buffers=[torch.arange(3, dtype=torch.int32), out(32)], threads=32, shared=128, sizes=[12]), None


@case("ldmatrix_x4", {1: "outside of the 512 bytes", 2: "not 16-byte aligned", 3: "deadlock.*exited"}, None)
def ldmatrix_x4():
    return dict(buffers=[torch.arange(128, dtype=torch.int32), out(128)], threads=32, shared=512), None


@case("mma_bfloat16", {1: "divergent|deadlock|wait in", 2: "divergent warp"}, None)
def mma_bfloat16():
    registers = [torch.zeros(size, dtype=torch.int32) for size in (128, 64)]
    return dict(buffers=[*registers, ("inout", torch.zeros(128))], threads=32), None


@case("shuffles", {1: "deadlock", 2: "only the full mask is emulated"}, None)
def shuffles():
    return dict(buffers=[out(96, dtype=torch.float32)], threads=32), None


@case("convert", {1: "bounds: store of 2 bytes", 2: "bounds: load of 4 bytes", 3: "read-only", 4: "race: store",
                  5: "alignment: store of 4 bytes"},
      lambda x: x.bfloat16())
def convert():
    x = torch.randn(6, 25)[:, :20]
    y = torch.full((6, 25), NAN, dtype=torch.bfloat16)[:, :20]
    return dict(buffers=[x, ("out", y)], blocks=6, threads=32, sizes=[20, 25]), x


@case("accumulate", {1: "uninitialised: load"}, lambda x: x)
def accumulate():
    x = torch.randn(64)
    return dict(buffers=[x, out(64, dtype=torch.float32)]), x


@case("scratch", {1: "race|uninitialised"}, lambda _: torch.arange(63, -1, -1).repeat(3))
def scratch():
    return dict(buffers=[out(192), out(192)], blocks=3), None


@case("last_arriver", {1: "race: load", 2: "race: load", 3: "race: load", 4: "race|uninitialised", 5: "race: load"},
      lambda _: 5 * torch.arange(64) + 10)
def last_arriver():
    return dict(buffers=[out(5 * 64), out(1), out(64)], blocks=5, shared=16), None


@pytest.mark.parametrize("kernel", [name for name, (_, expected) in CASES.items() if expected])
def test_right_kernels_pass(any_build, schedule, kernel):
    make, expected = CASES[kernel]
    arguments, data = make()
    run(any_build, schedule, kernel, **arguments)
    written = [buffer[1] for buffer in arguments["buffers"] if isinstance(buffer, tuple)][-1]
    assert torch.equal(written, expected(data).to(written.dtype))


@pytest.mark.parametrize("kernel", [name for name, (_, expected) in CASES.items() if not expected])
def test_wrappers_run_without_a_finding(checked, schedule, kernel):
    run(checked, schedule, kernel, **CASES[kernel][0]()[0])


@pytest.mark.parametrize("kernel, message", BUGS, ids=[name for name, _ in BUGS])
def test_bugs_are_caught(checked, kernel, message):
    found = []
    for schedule in emulator.SCHEDULES:
        try:
            run(checked, schedule, kernel, **CASES[kernel.split("/")[0]][0]()[0])
        except RuntimeError as error:
            found.append(str(error))
    assert found, "no schedule found anything"
    assert any(re.search(message, text) for text in found), found[0]
    place = r" at (tests/emulator_kernels/kernels\.cu:\d|csrc/emulation/emulation\.h:\d|the end of the kernel)"
    assert all(re.search(place, text) for text in found), found[0]


def pack(matrix):
    """Pairs of neighbouring 16-bit elements as one int32, the left one in the lower half."""
    return matrix.contiguous().view(torch.int16).view(torch.int32)


@pytest.mark.parametrize("trans", [False, True], ids=["plain", "trans"])
@pytest.mark.parametrize("count", [4, 2])
def test_ldmatrix(any_build, schedule, count, trans):
    matrices = torch.arange(4 * 64, dtype=torch.int16).view(4, 8, 8)
    registers = out(32, count)
    kernel = f"ldmatrix_x{count}" + ("_trans" if trans else "")
    run(any_build, schedule, kernel, [matrices.flatten(), registers], threads=32, shared=512)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for j in range(count):
            source = matrices[j].t() if trans else matrices[j]
            assert registers[1][lane, j] == pack(source[g, 2 * t:2 * t + 2]), (lane, j)


def mma(module, schedule, dtype, a, b, d):
    """d [16, 8] + a [16, 16] b [16, 8], by fragments as PTX's documentation draws them."""
    lanes = [divmod(lane, 4) for lane in range(32)]
    a_registers = torch.stack([torch.cat([pack(a[g + row, 2 * t + column:2 * t + column + 2])
                                          for column in (0, 8) for row in (0, 8)]) for g, t in lanes])
    b_registers = torch.stack([torch.cat([pack(b[2 * t + row:2 * t + row + 2, g]) for row in (0, 8)])
                               for g, t in lanes])
    d_registers = torch.stack([torch.cat([d[g + row, 2 * t:2 * t + 2] for row in (0, 8)]) for g, t in lanes])
    kernel = "mma_" + str(dtype).removeprefix("torch.")
    run(module, schedule, kernel, [a_registers, b_registers, ("inout", d_registers)], threads=32)
    result = torch.empty(16, 8)
    for (g, t), registers in zip(lanes, d_registers):
        result[g, 2 * t:2 * t + 2], result[g + 8, 2 * t:2 * t + 2] = registers[:2], registers[2:]
    return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mma(any_build, schedule, dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    d = torch.randn(16, 8)
    truth = d.double() + a.double() @ b.double()
    magnitude = d.double().abs() + a.double().abs() @ b.double().abs()
    assert ((mma(any_build, schedule, dtype, a, b, d) - truth).abs() <= 2**-20 * magnitude).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mma_is_exact_where_floats_are(checked, dtype):
    tiny = torch.finfo(dtype).smallest_normal / 4  # a denormal
    a, b = torch.randint(-8, 8, (16, 16)).to(dtype), torch.randint(-8, 8, (16, 8)).to(dtype)
    a[3, 5], b[:, 2] = tiny, 1
    a[:, :][3, :5], a[3, 6:] = 0, 0
    a[7, 0], a[8, 0] = float("inf"), NAN
    got = mma(checked, emulator.Schedule(), dtype, a, b, torch.zeros(16, 8))
    assert torch.equal(got.nan_to_num(12345), (a.double() @ b.double()).float().nan_to_num(12345))
    assert got[3, 2] == tiny


def test_shuffles(any_build, schedule):
    result = out(32, 3, dtype=torch.float32)
    run(any_build, schedule, "shuffles", [result], threads=32)
    lane = torch.arange(32)
    sources = torch.stack([lane // 4, lane ^ 5, torch.where(lane + 3 < 32, lane + 3, lane)], dim=1)
    assert torch.equal(result[1], sources * 0.5)


@pytest.mark.parametrize("kernel, extra", [("wavefronts", 0), ("wavefronts/1", 4 * 7)], ids=["swizzled", "plain"])
def test_bank_conflicts_of_ldmatrix_are_counted(any_build, kernel, extra):
    any_build.reset_counters()
    run(any_build, emulator.Schedule(), kernel, [], threads=32, shared=1024)
    counted = {name: count for name, count in any_build.counters().items() if count}
    assert counted == {"ldmatrix_phases": 4} | ({"ldmatrix_extra_wavefronts": extra} if extra else {})


def test_addresses_beyond_2_to_31_elements(any_build):
    elements = (1 << 31) + 16  # what is not touched costs no memory
    with mmap.mmap(-1, 2 * elements) as x_memory, mmap.mmap(-1, 4 * elements) as y_memory:
        x = torch.frombuffer(x_memory, dtype=torch.bfloat16)
        y = torch.frombuffer(y_memory, dtype=torch.bfloat16, count=elements)  # x may lie behind it
        x[1 << 31] = 7
        arguments = dict(buffers=[x, ("out", y)], threads=32, sizes=[1 << 11], shared=16)
        run(any_build, emulator.Schedule(), "far", **arguments)
        assert y[1 << 31] == 7
        y[1 << 31] = 0
        with pytest.raises(RuntimeError, match="bounds: cp.async"):
            run(any_build, emulator.Schedule(), "far/1", **arguments)
        del x, y, arguments


def test_os_threads_share_out_the_blocks():
    data = torch.randn(500, 20)
    result = "out", torch.full((500, 20), NAN, dtype=torch.bfloat16)
    for block_order in ("ascending", "random"):
        result[1].fill_(NAN)
        schedule = emulator.Schedule(threads=3, block_order=block_order)
        run(_build("fast"), schedule, "convert", [data, result], blocks=500, threads=32, sizes=[20, 20])
        assert torch.equal(result[1], data.bfloat16())


@pytest.mark.parametrize("threads, shared", [(48, 0), (2048, 0), (64, 1 << 20)])
def test_grids_that_a_device_would_refuse_are_refused(any_build, threads, shared):
    with pytest.raises(RuntimeError, match="cannot launch 1 blocks of"):
        run(any_build, emulator.Schedule(), "reverse", [torch.zeros(64), out(64)], threads=threads, shared=shared)


def test_a_store_beside_an_output_is_noticed_without_checks_too():
    module = _build("fast")
    with pytest.raises(RuntimeError, match="wrote beside y"), emulator.Launch(module, emulator.Schedule()) as launch:
        x = launch.register(torch.randn(6, 25), "x")
        y = launch.output((6, 20), (25, 1), torch.bfloat16, "y")
        module.run("convert/1", [x.data_ptr(), y.data_ptr()], [6, 32, 0, 20, 25])


def test_no_finding_outlives_its_launch(checked):
    arguments, data = reverse()
    with pytest.raises(RuntimeError, match="race"):
        run(checked, emulator.Schedule(), "reverse/1", **arguments)
    run(checked, emulator.Schedule(), "reverse", **arguments)
