"""Builds abba_ext._C with torch.utils.cpp_extension. Everything else about the package is in pyproject.toml.

Environment: CXX is the C++ compiler (default: c++), MAX_JOBS limits parallel compilation (needs ninja), and
ABBA_BUILD=debug compiles with -O1 -g.
"""
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import setuptools

MIN_SETUPTOOLS = (77,)  # the first to read `license = "Apache-2.0"` in pyproject.toml
MIN_TORCH = (2, 11)
NEEDS_NO_TORCH = {"sdist", "egg_info"}
CXX = os.environ.setdefault("CXX", "c++")  # torch compiles with CXX, setuptools links with it
CXX_STANDARD = "-std=c++20"


def fail(sentence):
    sys.exit(f"abba_ext: {sentence}")


def numbers(version):
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def torch_version():
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    try:
        import torch
    except (ImportError, OSError) as error:
        fail(f"torch cannot be imported to build against ({error}); install it anew with "
             "`pip install --force-reinstall 'torch>=2.11'`.")
    if numbers(torch.__version__) < MIN_TORCH:
        fail(f"torch {torch.__version__} is too old: abba_ext needs torch 2.11 or newer; run `pip install -U torch`.")
    return torch.__version__


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


def extension():
    torch, compiler = torch_version(), compiler_version()
    try:
        import pybind11
    except ImportError:
        fail("pybind11 is missing; run `pip install pybind11 ninja` or build without `--no-build-isolation`.")
    from torch.utils import cpp_extension

    print(f"abba_ext: building against torch {torch} with {compiler}. If a compiler error follows, try g++ 11 or newer "
          "(variable CXX); if the compiler was killed, set MAX_JOBS=1 to save memory.", flush=True)
    optimise = ["-O1", "-g"] if os.environ.get("ABBA_BUILD") == "debug" else ["-O3", "-g0", "-fno-math-errno"]
    flags = [CXX_STANDARD, *optimise, "-Wall", "-fvisibility=hidden"]
    build_info = {
        "ABBA_BUILD_TORCH": torch,
        "ABBA_BUILD_COMPILER": compiler,
        "ABBA_BUILD_FLAGS": " ".join(flags),
        "ABBA_BUILD_CUDA": "",
    }
    module = cpp_extension.CppExtension(
        "abba_ext._C",
        sorted(map(str, Path("csrc").rglob("*.cpp"))),
        include_dirs=[pybind11.get_include()],
        define_macros=[(name, f'"{value}"') for name, value in build_info.items()],
        extra_compile_args={"cxx": flags},
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
        "options": {"build_ext": {"force": True}},  # build/ may hold a module for another torch
    }


if numbers(setuptools.__version__) < MIN_SETUPTOOLS:
    fail(f"setuptools {setuptools.__version__} is too old to build abba_ext; run `pip install -U 'setuptools>=77'`.")
setuptools.setup(**(extension() if NEEDS_NO_TORCH.isdisjoint(sys.argv) else {}))
