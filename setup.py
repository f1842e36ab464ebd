"""Builds abba_ext._C with torch.utils.cpp_extension. Everything else about the package is in pyproject.toml.

ABBA_BUILD=debug adds assertions-friendly -O1 -g; MAX_JOBS limits parallel compilation, as in every torch extension.
"""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
MIN_TORCH = (2, 11)
BUILDS = not {"egg_info", "dist_info", "sdist", "--version", "--name", "clean"} & set(sys.argv)


def fail(sentence):
    sys.exit(f"abba_ext: {sentence}")


def extension():
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        fail(f"torch cannot be imported ({error}); install it first (pip install 'torch>=2.11') "
             "and build with `pip install --no-build-isolation .`")
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < MIN_TORCH:
        fail(f"torch {torch.__version__} is too old: abba_ext needs torch 2.11 or newer; run `pip install -U torch`.")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        fail(f"no C++ compiler: '{compiler}' is not on PATH; install g++ 11 or newer (Debian: `apt-get install g++`) "
             "or name one in CXX.")
    try:
        import pybind11
    except ImportError:
        fail("pybind11 is missing; with --no-build-isolation install the build tools first: "
             "`pip install setuptools ninja pybind11`.")
    try:
        has_ninja = subprocess.run(["ninja", "--version"], capture_output=True).returncode == 0
    except OSError:
        has_ninja = False
    debug = os.environ.get("ABBA_BUILD") == "debug"
    flags = ["-std=c++20", *(["-O1", "-g"] if debug else ["-O3", "-fno-math-errno"]), "-Wall", "-fvisibility=hidden"]
    compiler_version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.split("\n")[0]
    define = {
        "ABBA_BUILD_TORCH": torch.__version__,
        "ABBA_BUILD_COMPILER": compiler_version,
        "ABBA_BUILD_FLAGS": " ".join(flags),
        "ABBA_BUILD_CUDA": "",
    }
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    module = cpp_extension.CppExtension(
        "abba_ext._C",
        sources,
        include_dirs=[pybind11.get_include()],
        depends=[str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")],
        define_macros=[(key, f'"{value}"') for key, value in define.items()],
        extra_compile_args={"cxx": flags},
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=has_ninja)},
    }


setup(**(extension() if BUILDS else {}))
