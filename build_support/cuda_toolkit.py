"""The CUDA toolkit that setup.py compiles csrc/cuda with, and the GPU architectures it compiles them for.

`Unusable` says in one sentence why the kernels cannot be compiled here and what helps; setup.py decides what follows.
"""
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

DEFAULT_ROOT = "/usr/local/cuda"
MIN_NVCC = (12, 0)  # the first with C++20
MIN_ARCHITECTURE = (8, 0)  # the first with asynchronous copies and tensor cores for bfloat16
DEFAULT_ARCHITECTURES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
# torch takes the conversions and operators of the half types away, for its own headers' sake; the kernels use them.
FLAGS = ["-std=c++20", "-Xcompiler=-fvisibility=hidden", "-U__CUDA_NO_HALF_OPERATORS__",
         "-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__", "-U__CUDA_NO_HALF2_OPERATORS__"]
TRIAL = "#include <concepts>\n#include <cuda_bf16.h>\n__global__ void trial() {}\n"


class Unusable(Exception):
    """No kernels can be compiled; the message is one sentence."""


def _output(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def find_nvcc():
    for root in filter(None, [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]):
        if nvcc := shutil.which(os.path.join(root, "bin", "nvcc")):
            return nvcc
    nvcc = shutil.which("nvcc") or shutil.which(os.path.join(DEFAULT_ROOT, "bin", "nvcc"))
    if not nvcc:
        raise Unusable("there is no nvcc; install a CUDA toolkit, or name the folder of the one that is there in "
                       "CUDA_HOME.")
    return nvcc


class Toolkit:
    """A toolkit that has compiled and linked a kernel with the C++ compiler `cxx`.

    Attributes: root, version ("13.0"), include_dirs, library_dirs, and architectures [(8, 0), ...] that it knows.
    """

    def __init__(self, nvcc, cxx):
        release = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
        if not release:
            raise Unusable(f"'{nvcc}' is no working nvcc; install a CUDA toolkit, or name the folder of another one in "
                           "CUDA_HOME.")
        self.version = release[1]
        if tuple(map(int, self.version.split("."))) < MIN_NVCC:
            raise Unusable(f"nvcc {self.version} ({nvcc}) cannot compile C++20; install CUDA 12 or newer, or name the "
                           "folder of such a toolkit in CUDA_HOME.")
        with tempfile.TemporaryDirectory() as folder:
            source, module = Path(folder, "trial.cu"), Path(folder, "trial.so")
            source.write_text(TRIAL)
            command = [nvcc, "-std=c++20", f"-ccbin={cxx}", "-shared", "-Xcompiler=-fPIC",
                       "-o", str(module), str(source)]
            plan, said = _output(*command, "--dryrun"), _output(*command)
            if not module.exists():
                raise Unusable(f"nvcc {self.version} ({nvcc}) cannot compile and link with the C++ compiler '{cxx}'; "
                               "name one that it supports in the variable CXX, or the folder of another toolkit in "
                               f"CUDA_HOME. It said:\n{said.strip()}")

        def folders(variable, option):
            line = re.search(rf"^#\$ {variable}=(.*)$", plan, re.M)
            return [os.path.normpath(path) for path in re.findall(rf'"{option}([^"]+)"', line[1] if line else "")]

        # nvcc may be a script that calls another, so where it was found is not where the toolkit is.
        self.root = os.path.normpath(re.search(r"^#\$ TOP=(.+)$", plan, re.M)[1])
        self.include_dirs, self.library_dirs = folders("INCLUDES", "-I"), folders("LIBRARIES", "-L")
        codes = re.findall(r"\bsm_(\d+)(\d)\b", _output(nvcc, "--list-gpu-code"))
        self.architectures = sorted({(int(major), int(minor)) for major, minor in codes})


def check_torch(toolkit, torch):
    if torch.version.cuda and torch.version.cuda.split(".")[0] != toolkit.version.split(".")[0]:
        raise Unusable(f"nvcc {toolkit.version} and torch {torch.__version__}, which is for CUDA {torch.version.cuda}, "
                       "differ in their major version; name the folder of a toolkit with torch's in CUDA_HOME, or "
                       f"install a torch for CUDA {toolkit.version.split('.')[0]}.")
    if getattr(torch.version, "hip", None):
        raise Unusable(f"torch {torch.__version__} is for ROCm; install a torch for CUDA or for the CPU.")


def requested_architectures(names, supported):
    """The names in TORCH_CUDA_ARCH_LIST, such as 8.0 or 9.0a+PTX; ValueError, in one sentence, if one cannot be had."""
    for name in names:
        number = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
        if not number:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST names '{name}'; give numbers, such as '8.0;9.0+PTX'.")
        architecture = int(number[1]), int(number[2])
        if architecture < MIN_ARCHITECTURE:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST names {name}, but the kernels need 8.0 (Ampere) or newer; leave it "
                             "out, or build without the kernels (ABBA_CUDA=0).")
        if architecture not in supported:
            known = " ".join(f"{major}.{minor}" for major, minor in supported)
            raise ValueError(f"TORCH_CUDA_ARCH_LIST names {name}, but nvcc knows only {known}; leave it out, or name "
                             "the folder of another toolkit in CUDA_HOME.")
    return list(dict.fromkeys(names))


def default_architectures(devices, supported):
    """Those of the GPUs that are here, or the usual ones where there are none; the last also as PTX, for later GPUs."""
    supported = [architecture for architecture in supported if architecture >= MIN_ARCHITECTURE]
    usable = [device for device in devices if device >= MIN_ARCHITECTURE]
    if devices and not usable:
        raise Unusable("the kernels need a GPU of architecture 8.0 (Ampere) or newer, and none here is; name the "
                       "architectures of other machines in TORCH_CUDA_ARCH_LIST.")
    # A GPU that is newer than the toolkit gets the last one that the toolkit knows.
    wanted = {max((a for a in supported if a <= device), default=None) for device in usable}
    chosen = [architecture for architecture in supported if architecture in (wanted or DEFAULT_ARCHITECTURES)]
    if not chosen:
        raise Unusable("nvcc knows no architecture that the kernels are for; name the folder of a newer toolkit in "
                       "CUDA_HOME.")
    return [f"{major}.{minor}" for major, minor in chosen[:-1]] + ["{}.{}+PTX".format(*chosen[-1])]


def choose_architectures(toolkit, torch):
    names = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(";, "))
    if names not in ([""], ["native"]):
        return requested_architectures(names, toolkit.architectures)
    devices = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return default_architectures(devices, toolkit.architectures)


def gencode_flags(architectures):
    flags = []
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        # All GPUs of 9.0 have the instructions of sm_90a, which the kernels for Hopper need; PTX for later GPUs may not.
        code = "90a" if number == "90" else number
        flags.append(f"-gencode=arch=compute_{code},code=sm_{code}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def threads(num_units):
    """For nvcc --threads: ninja starts all units at once; what is left of the processors or of MAX_JOBS is theirs."""
    jobs = os.environ.get("MAX_JOBS", "")
    return max(1, min(4, (int(jobs) if jobs.isdigit() else os.cpu_count() or 1) // num_units))
