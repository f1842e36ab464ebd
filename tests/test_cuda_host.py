"""What the host code around the CUDA kernels makes of the answers of the runtime and the driver. No GPU is needed."""
import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "build_support"))
import cuda_toolkit  # noqa: E402

REPLACED = ("cudaFuncGetAttributes", "cudaGetDevice", "cudaDeviceGetAttribute", "cudaSetDevice", "cudaGetDriverEntryPoint",
            "cudaGetDriverEntryPointByVersion")
SUCCESS, INVALID_VALUE, MEMORY, INVALID_FUNCTION, NO_DEVICE, NO_CONTEXT, NO_IMAGE, PTX = 0, 1, 2, 98, 100, 201, 209, 222
MARK = 4096  # bytes of the probe's shared memory in code for sm_90a


@pytest.fixture(scope="module")
def nvcc():
    try:
        return cuda_toolkit.find_nvcc()
    except cuda_toolkit.Unusable as reason:
        pytest.skip(f"no CUDA code is compiled: {reason}")


@pytest.fixture(scope="module")
def library(nvcc, tmp_path_factory):
    target = tmp_path_factory.mktemp("host") / "host.so"
    command = [nvcc, "-shared", "-Xcompiler=-fPIC", "-std=c++20", "-arch=sm_80", f"-I{ROOT / 'csrc'}", "-o", str(target),
               *(f"-Xlinker=--wrap={name}" for name in REPLACED), str(ROOT / "tests" / "cuda_host.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return ctypes.CDLL(str(target))


@pytest.fixture
def host(library):
    """(variables of cuda_host.cu by name, all zero; its functions)"""
    names = ("probe_error", "device_error", "shared_bytes", "encode_error", "has_context", "binds")
    variables = {name: ctypes.c_int.in_dll(library, name) for name in names}
    for variable in variables.values():
        variable.value = 0
    return variables, library


def ask_device(host, **answers):
    """(error, multiprocessors, whether the kernels for Hopper are there)"""
    variables, library = host
    for name, answer in answers.items():
        variables[name].value = answer
    num_sms, sm90 = ctypes.c_int(), ctypes.c_int()
    error = library.ask_device(ctypes.byref(num_sms), ctypes.byref(sm90))
    return error, num_sms.value, bool(sm90.value)


@pytest.mark.parametrize("error", [INVALID_FUNCTION, NO_IMAGE, PTX])
def test_no_code_for_a_device_is_an_answer(host, error):
    assert ask_device(host, probe_error=error, shared_bytes=MARK) == (SUCCESS, 0, False)


@pytest.mark.parametrize("answers", [{"probe_error": MEMORY}, {"probe_error": NO_DEVICE}, {"device_error": NO_DEVICE}], ids=str)
def test_any_other_failure_is_an_error(host, answers):
    assert ask_device(host, **answers)[0] == next(iter(answers.values()))


@pytest.mark.parametrize("shared_bytes, sm90", [(0, False), (1024, False), (MARK, True), (MARK + 1024, True)])  # 1 KB is CUDA's own
def test_the_probe_s_shared_memory_tells_code_for_hopper(host, shared_bytes, sm90):
    assert ask_device(host, shared_bytes=shared_bytes) == (SUCCESS, 132, sm90)


@pytest.mark.parametrize("architecture, expected", [("sm_80", 0), ("sm_90", 0), ("sm_90a", MARK), ("sm_100", 0)])
def test_only_code_for_sm_90a_has_the_probe_s_shared_memory(nvcc, architecture, expected, tmp_path):
    command = [nvcc, "-cubin", f"-arch={architecture}", "-Xptxas=-v", *cuda_toolkit.FLAGS, "-O3", "-o", str(tmp_path / "cubin"),
               str(ROOT / "csrc" / "cuda" / "device.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    if "Unsupported gpu architecture" in done.stderr:
        pytest.skip(f"this nvcc does not know {architecture}")
    assert done.returncode == 0, done.stderr
    assert "probe" in done.stderr
    reported = re.search(r"(\d+) bytes smem", done.stderr)
    assert (int(reported[1]) if reported else 0) // MARK * MARK == expected


# --- tensor maps ---


def test_a_thread_without_a_context_gets_that_of_its_device(host):
    variables, library = host
    assert [library.describe_matrix() for _ in range(2)] == [SUCCESS, SUCCESS]
    assert variables["binds"].value == 1


def test_a_context_that_a_thread_has_is_left_to_it(host):
    variables, library = host
    variables["has_context"].value = 1
    assert library.describe_matrix() == SUCCESS and variables["binds"].value == 0


def test_a_device_that_cannot_be_had_is_an_error(host):
    variables, library = host
    variables["device_error"].value = NO_DEVICE
    assert library.describe_matrix() == NO_DEVICE


@pytest.mark.parametrize("error", [INVALID_VALUE, NO_CONTEXT])
def test_the_driver_s_refusal_is_returned(host, error):
    variables, library = host
    variables["encode_error"].value = error
    assert library.describe_matrix() == error
