"""What the host code around the CUDA kernels makes of the answers of the runtime and the driver. No GPU is needed."""
import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "build_support"))
import cuda_toolkit  # noqa: E402

REPLACED = ("cudaGetDevice", "cudaSetDevice", "cudaGetDriverEntryPoint", "cudaGetDriverEntryPointByVersion")
SUCCESS, INVALID_VALUE, NO_DEVICE, NO_CONTEXT = 0, 1, 100, 201


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
    names = ("device_error", "encode_error", "has_context", "binds")
    variables = {name: ctypes.c_int.in_dll(library, name) for name in names}
    for variable in variables.values():
        variable.value = 0
    return variables, library


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
