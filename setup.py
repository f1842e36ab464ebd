"""Builds abba_ext._C with torch.utils.cpp_extension. Everything else about the package is in pyproject.toml.

Environment: CXX is the C++ compiler (default: c++), MAX_JOBS limits parallel compilation (needs ninja), and
ABBA_BUILD=debug compiles with -O1 -g. ABBA_CUDA=1 demands the CUDA kernels, 0 leaves them out, and auto, the default,
compiles them where there is an nvcc (in CUDA_HOME, in CUDA_PATH, on PATH or in /usr/local/cuda); a GPU is not needed.
TORCH_CUDA_ARCH_LIST names the architectures, such as "8.0;9.0+PTX".
"""
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import setuptools

sys.path.append(str(Path(__file__).parent / "build_support"))
import cuda_toolkit  # noqa: E402

MIN_SETUPTOOLS = (77,)  # the first to read `license = "Apache-2.0"` in pyproject.toml
MIN_TORCH = (2, 11)
NEEDS_NO_TORCH = {"sdist", "egg_info"}  # unless something is built in the same call
BUILDS = {"bdist_wheel", "build", "build_ext", "install"}
CXX = os.environ.setdefault("CXX", "c++")  # torch compiles with CXX, setuptools links with it
CXX_STANDARD = "-std=c++20"


def fail(sentence):
    sys.exit(f"abba_ext: {sentence}")


def numbers(version):
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def checked_torch():
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    try:
        import torch
    except (ImportError, OSError) as error:
        fail(f"torch cannot be imported to build against ({error}); install it anew with "
             "`pip install --force-reinstall 'torch>=2.11'`.")
    if numbers(torch.__version__) < MIN_TORCH:
        fail(f"torch {torch.__version__} is too old: abba_ext needs torch 2.11 or newer; run `pip install -U torch`.")
    return torch


def sources(*patterns):
    return sorted(str(path) for pattern in patterns for path in Path().glob(pattern))


def compiler_version():
    command = [CXX, CXX_STANDARD, "-fsyntax-only", "-x", "c++", "-"]
    try:
        trial = subprocess.run(command, input="#include <concepts>\n", capture_output=True, text=True)
    except OSError:
        fail(f"no C++ compiler: cannot run '{CXX}'; install g++ 11 or newer (Debian, Ubuntu: `apt-get install g++`) "
             "or name a compiler that is there in the variable CXX.")
    if trial.returncode:
        fail(f"'{CXX}' cannot compile C++20; install g++ 11 or newer, or name such a compiler in the variable CXX. "
             f"It said:\n{trial.stderr.strip()}")
    return subprocess.run([CXX, "--version"], capture_output=True, text=True).stdout.split("\n")[0]


def cuda_toolkit_and_architectures(torch):
    """(None, []) where the CUDA kernels are left out."""
    wanted = os.environ.get("ABBA_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        fail(f"ABBA_CUDA is '{wanted}'; give auto, 0 or 1.")
    if wanted == "0":
        return None, []
    try:
        toolkit = cuda_toolkit.Toolkit(cuda_toolkit.find_nvcc(), CXX)
        cuda_toolkit.check_torch(toolkit, torch)
        return toolkit, cuda_toolkit.choose_architectures(toolkit, torch)
    except cuda_toolkit.Unusable as reason:
        if wanted == "1":
            fail(f"ABBA_CUDA=1, but {reason}")
        print(f"abba_ext: building WITHOUT CUDA kernels: {reason}", flush=True)
        return None, []
    except ValueError as error:
        fail(error)


def extension():
    torch, compiler = checked_torch(), compiler_version()
    try:
        import pybind11
    except ImportError:
        fail("pybind11 is missing; run `pip install pybind11 ninja` or build without `--no-build-isolation`.")
    toolkit, architectures = cuda_toolkit_and_architectures(torch)
    from torch.utils import cpp_extension

    compilers = f"{compiler} and nvcc {toolkit.version} for {' '.join(architectures)}" if toolkit else compiler
    print(f"abba_ext: building against torch {torch.__version__} with {compilers}. If a compiler error follows, try "
          "g++ 11 or newer (variable CXX); if the compiler was killed, set MAX_JOBS=1 to save memory.", flush=True)
    debug = os.environ.get("ABBA_BUILD") == "debug"
    optimise = ["-O1", "-g"] if debug else ["-O3", "-g0", "-fno-math-errno"]
    flags = [CXX_STANDARD, *optimise, "-Wall", "-fvisibility=hidden"]
    build_info = {
        "ABBA_BUILD_TORCH": torch.__version__,
        "ABBA_BUILD_COMPILER": compiler,
        "ABBA_BUILD_FLAGS": " ".join(flags),
        "ABBA_BUILD_CUDA": ";".join(architectures),
        "ABBA_BUILD_NVCC": toolkit.version if toolkit else "",
    }
    options = {
        "sources": sources("csrc/*.cpp", "csrc/cpu/*.cpp"),
        "include_dirs": [pybind11.get_include()],
        "define_macros": [(name, f'"{value}"') for name, value in build_info.items()],
        "extra_compile_args": {"cxx": flags},
    }
    if toolkit:
        cpp_extension.CUDA_HOME = toolkit.root  # a torch for the CPU has none; another errs where nvcc is a script
        kernels = sources("csrc/cuda/*.cu")
        options["sources"] += kernels
        options["include_dirs"] += toolkit.include_dirs
        options["define_macros"] += [("ABBA_WITH_CUDA", None)]
        options["extra_compile_args"]["nvcc"] = [
            *cuda_toolkit.FLAGS, *(["-O1", "-lineinfo"] if debug else ["-O3"]), f"-ccbin={CXX}",
            f"--threads={cuda_toolkit.threads(len(kernels))}", *cuda_toolkit.gencode_flags(architectures)]
        options["library_dirs"] = toolkit.library_dirs
        options["libraries"] = ["cudart_static", "dl", "rt", "pthread"]
    return {
        "ext_modules": [cpp_extension.CppExtension("abba_ext._C", **options)],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
        "options": {"build_ext": {"force": True}},  # build/ may hold a module for another torch
    }


if numbers(setuptools.__version__) < MIN_SETUPTOOLS:
    fail(f"setuptools {setuptools.__version__} is too old to build abba_ext; run `pip install -U 'setuptools>=77'`.")
needs_torch = NEEDS_NO_TORCH.isdisjoint(sys.argv) or not BUILDS.isdisjoint(sys.argv)
setuptools.setup(**(extension() if needs_torch else {}))
