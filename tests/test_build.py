"""The build, run as front ends run it: the sentence of every failure, and which torch the backend finds.

Nothing is fetched, and hardly anything compiled: torch is a stub wherever only its version or its place matters.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
import setuptools
import torch

from abba_ext import ops

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "build_support"))
import cuda_toolkit  # noqa: E402

MISSING = "raise ModuleNotFoundError(\"No module named 'torch'\")"
needs_proc = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="front ends are found through /proc")


def stub(folder, package, source):
    """Writes a package of one line; returns the folder to put on PYTHONPATH."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(source + "\n")
    return str(folder)


def script(path, *lines):
    path.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
    path.chmod(0o755)
    return str(path)


# --- setup.py: one sentence for each failure ---


@pytest.fixture
def tree(tmp_path):
    """The source tree as a user downloads it: nothing built."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("abba_ext", "build_support", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tree


def setup(tree, command="build_ext", **environment):
    command = [sys.executable, "setup.py", *command.split()]
    return subprocess.run(command, cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True)


def failure(tree, **environment):
    done = setup(tree, **environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return done.stderr


def test_no_compiler(tree, tmp_path):
    stubs = stub(tmp_path / "stubs", "torch", "__version__ = '2.13.0'")
    assert failure(tree, PYTHONPATH=stubs, CXX="no-such-c++").startswith(
        "abba_ext: no C++ compiler: cannot run 'no-such-c++'; install g++ 11 or newer")


def test_no_compiler_on_path(tree, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    stubs = stub(tmp_path / "stubs", "torch", "__version__ = '2.13.0'")
    error = failure(tree, PYTHONPATH=stubs, PATH=str(tmp_path))
    assert error.startswith("abba_ext: no C++ compiler: cannot run 'c++'; ")


def test_compiler_too_old_is_quoted_after_the_sentence(tree, tmp_path):
    stubs = stub(tmp_path / "stubs", "torch", "__version__ = '2.13.0'")
    old = script(tmp_path / "old-c++", "echo \"error: unrecognized option '-std=c++20'\" >&2", "exit 1")
    sentence, quote = failure(tree, PYTHONPATH=stubs, CXX=old).splitlines()
    assert sentence.startswith(f"abba_ext: '{old}' cannot compile C++20; install g++ 11 or newer")
    assert quote == "error: unrecognized option '-std=c++20'"


def test_torch_too_old(tree, tmp_path):
    stubs = stub(tmp_path / "stubs", "torch", "__version__ = '2.4.0+cu121'")
    assert failure(tree, PYTHONPATH=stubs) == (
        "abba_ext: torch 2.4.0+cu121 is too old: abba_ext needs torch 2.11 or newer; run `pip install -U torch`.\n")


@pytest.mark.parametrize("source, error", [
    (MISSING, "No module named 'torch'"),
    ("raise OSError('libcudart.so.13: cannot open')", "libcudart.so.13: cannot open"),
], ids=["no torch", "library of torch missing"])
def test_torch_cannot_be_imported(tree, tmp_path, source, error):
    stubs = stub(tmp_path / "stubs", "torch", source)
    assert failure(tree, PYTHONPATH=stubs) == (f"abba_ext: torch cannot be imported to build against ({error}); "
                                               "install it anew with `pip install --force-reinstall 'torch>=2.11'`.\n")


def test_pybind11_missing(tree, tmp_path):
    stubs = stub(tmp_path / "stubs", "torch", "__version__ = '2.13.0'")
    stub(tmp_path / "stubs", "pybind11", MISSING)
    assert failure(tree, PYTHONPATH=stubs) == ("abba_ext: pybind11 is missing; run `pip install pybind11 ninja` or build without "
                                               "`--no-build-isolation`.\n")


def test_setuptools_too_old(tree, tmp_path):
    old = stub(tmp_path / "stubs", "setuptools", "__version__ = '65.5.0'")
    assert failure(tree, PYTHONPATH=old) == (
        "abba_ext: setuptools 65.5.0 is too old to build abba_ext; run `pip install -U 'setuptools>=77'`.\n")


def test_sdist_needs_no_torch_and_holds_all_sources(tree, tmp_path):
    for name in ("tests", "examples", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tree)
    done = setup(tree, f"sdist --dist-dir {tmp_path}", PYTHONPATH=stub(tmp_path / "stubs", "torch", MISSING))
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("abba_ext-*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    suffixes = {".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".txt", ".jsonl", ".png"}
    assert names >= {str(path.relative_to(tree)) for path in tree.rglob("*.*") if path.suffix in suffixes}
    assert names >= {"Makefile", "pyproject.toml", "LICENSE"}


def test_a_wheel_beside_an_sdist_holds_the_module(build):
    """`setup.py sdist bdist_wheel` built a wheel of Python files alone, which no import survived."""
    asked, _ = build.asked(ABBA_CUDA="0", command="sdist build_ext")
    assert asked["name"] == "abba_ext._C"


def test_what_the_commands_use_is_declared():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert "numpy" in project["dependencies"]  # of torch's, Tensor.numpy() alone needs it, which checksums use
    cli = {re.split(r"\W", name)[0] for name in [*extras["cli"], *extras["hf"], *extras["peft"]]}
    assert "abba_ext[hf,peft]" in extras["cli"] and cli >= {"transformers", "peft", "tqdm", "matplotlib"}


def test_import_from_the_unbuilt_source_tree(tree):
    command = [sys.executable, "-S", "-c", "import abba_ext"]  # -S: an editable install would lend its compiled module
    environment = {**os.environ, "PYTHONPATH": str(Path(torch.__file__).parents[1])}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: abba_ext: the compiled module is missing because abba_ext was imported from its source tree "
        f"({tree / 'abba_ext'}); run `pip install -e .` there")


# --- setup.py: the CUDA kernels ---

TORCH_STUB = """
__version__ = '2.13.0'
class version: cuda = {cuda!r}
class cuda:
    device_count = lambda: len({devices})
    get_device_capability = lambda i: {devices}[i]
"""
CPP_EXTENSION_STUB = """
import json, setuptools
from setuptools.command.build_ext import build_ext
class BuildExtension(build_ext):
    def run(self):
        [module] = self.distribution.ext_modules
        print("ASKED", json.dumps({**vars(module), "CUDA_HOME": globals().get("CUDA_HOME")}, default=str))
CppExtension = setuptools.Extension
"""


class Build:
    """setup.py in a tree whose torch, C++ compiler and nvcc are stubs; no other nvcc is to be found."""

    def __init__(self, tree, tmp_path):
        self.tree, self.stubs, self.bin = tree, tmp_path / "stubs", tmp_path / "bin"
        module = tree / "build_support" / "cuda_toolkit.py"
        module.write_text(module.read_text().replace("/usr/local/cuda", str(tmp_path / "default")))
        self.bin.mkdir()
        script(self.bin / "c++", "echo 'c++ 12'")
        self.torch()

    def torch(self, cuda=None, devices=()):
        shutil.rmtree(self.stubs, ignore_errors=True)
        stub(self.stubs, "torch", TORCH_STUB.format(cuda=cuda, devices=list(devices)))
        stub(self.stubs / "torch", "utils", "")
        (self.stubs / "torch" / "utils" / "cpp_extension.py").write_text(CPP_EXTENSION_STUB)

    def nvcc(self, folder, *, release="13.0", trial=(': > "$out"',)):
        """An nvcc that knows 7.5, 8.0 and 9.0; its toolkit is said to be in /toolkit, wherever the script itself is."""
        folder.mkdir(parents=True, exist_ok=True)
        return script(
            folder / "nvcc", 'case "$*" in', f"--version) echo 'Cuda compilation tools, release {release}';;",
            "--list-gpu-code) echo sm_75; echo sm_80; echo sm_90;;",
            "*--dryrun) echo '#$ TOP=/toolkit/bin/..'; echo '#$ INCLUDES=\"-I/toolkit/bin/../include\"'",
            "echo '#$ LIBRARIES= \"-L/toolkit/bin/../lib/stubs\" \"-L/toolkit/bin/../lib\"';;",
            '*) while [ "$1" != -o ]; do shift; done; out=$2', *trial, ";;", "esac")

    def environment(self, **variables):
        unset = dict.fromkeys(("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "ABBA_BUILD"), "")
        stubs = {"PYTHONPATH": str(self.stubs), "PATH": str(self.bin), "CXX": "c++"}
        return {**unset, "ABBA_CUDA": "auto", **stubs, **variables}

    def asked(self, *, command="build_ext", **variables):
        """(what torch is asked to build, what is printed before)"""
        done = setup(self.tree, command, **self.environment(**variables))
        assert done.returncode == 0, done.stderr
        printed, _, asked = done.stdout.partition("ASKED")
        return json.loads(asked), printed

    def failure(self, **variables):
        return failure(self.tree, **self.environment(**variables))


@pytest.fixture
def build(tree, tmp_path):
    return Build(tree, tmp_path)


def macros(asked):
    return {name: value and value.strip('"') for name, value in asked["define_macros"]}


NO_NVCC = "there is no nvcc; install a CUDA toolkit, or name the folder of the one that is there in CUDA_HOME.\n"


def assert_without_cuda(asked):
    assert not [path for path in asked["sources"] if path.endswith(".cu")] and "nvcc" not in asked["extra_compile_args"]
    assert "ABBA_WITH_CUDA" not in macros(asked) and asked["libraries"] == []
    assert macros(asked)["ABBA_BUILD_CUDA"] == macros(asked)["ABBA_BUILD_NVCC"] == ""


@pytest.mark.parametrize("wanted", ["auto", "1"])
@pytest.mark.parametrize("place", ["CUDA_HOME", "CUDA_PATH", "PATH", "default"])
def test_nvcc_is_found_and_compiles_the_kernels(build, wanted, place, tmp_path):
    folders = {"PATH": build.bin, "default": tmp_path / "default" / "bin"}
    build.nvcc(folders.get(place, tmp_path / "cuda" / "bin"))
    variables = {place: str(tmp_path / "cuda")} if place not in folders else {}
    asked, printed = build.asked(ABBA_CUDA=wanted, **variables)
    kernels = {str(path.relative_to(build.tree)) for path in (build.tree / "csrc" / "cuda").glob("*.cu")}
    assert kernels and {path for path in asked["sources"] if path.endswith(".cu")} == kernels
    assert not [path for path in asked["sources"] if "emulation" in path]
    expected = {"ABBA_WITH_CUDA": None, "ABBA_BUILD_CUDA": "8.0;9.0+PTX", "ABBA_BUILD_NVCC": "13.0"}
    assert macros(asked).items() >= expected.items()
    assert asked["CUDA_HOME"] == "/toolkit" and "/toolkit/include" in asked["include_dirs"]
    assert asked["libraries"] == ["cudart_static", "dl", "rt", "pthread"] and "/toolkit/lib" in asked["library_dirs"]
    assert set(asked["extra_compile_args"]["nvcc"]) >= {
        "-std=c++20", "-O3", "-Xcompiler=-fvisibility=hidden", "-ccbin=c++", "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_90,code=compute_90"}
    assert "WITHOUT" not in printed and "and nvcc 13.0 for 8.0 9.0+PTX" in printed


def test_without_nvcc_the_build_is_for_the_cpu_and_says_so(build):
    asked, printed = build.asked()
    assert_without_cuda(asked)
    assert f"abba_ext: building WITHOUT CUDA kernels: {NO_NVCC}" in printed


def test_cuda_left_out_on_request(build):
    build.nvcc(build.bin)
    asked, printed = build.asked(ABBA_CUDA="0", TORCH_CUDA_ARCH_LIST="7.0")
    assert_without_cuda(asked)
    assert "WITHOUT" not in printed


def test_cuda_demanded_without_nvcc(build):
    assert build.failure(ABBA_CUDA="1") == f"abba_ext: ABBA_CUDA=1, but {NO_NVCC}"


def test_unknown_value_of_abba_cuda(build):
    assert build.failure(ABBA_CUDA="yes") == "abba_ext: ABBA_CUDA is 'yes'; give auto, 0 or 1.\n"


@pytest.mark.parametrize("nvcc, torch_cuda, sentence", [
    ({"release": "11.8"}, None,
     "nvcc 11.8 (NVCC) cannot compile C++20; install CUDA 12 or newer, or name the folder of such a toolkit in "
     "CUDA_HOME.\n"),
    ({"release": "of nothing"}, None,
     "'NVCC' is no working nvcc; install a CUDA toolkit, or name the folder of another one in CUDA_HOME.\n"),
    ({"trial": ["echo 'unsupported GNU version' >&2", "exit 1"]}, None,
     "nvcc 13.0 (NVCC) cannot compile and link with the C++ compiler 'c++'; name one that it supports in the variable "
     "CXX, or the folder of another toolkit in CUDA_HOME. It said:\nunsupported GNU version\n"),
    ({}, "12.8",
     "nvcc 13.0 and torch 2.13.0, which is for CUDA 12.8, differ in their major version; name the folder of a toolkit "
     "with torch's in CUDA_HOME, or install a torch for CUDA 13.\n"),
], ids=["too old", "not an nvcc", "C++ compiler not supported", "not torch's major version"])
def test_unusable_toolkit_is_an_error_only_if_demanded(build, nvcc, torch_cuda, sentence):
    sentence = sentence.replace("NVCC", build.nvcc(build.bin, **nvcc))
    build.torch(cuda=torch_cuda)
    assert build.failure(ABBA_CUDA="1") == f"abba_ext: ABBA_CUDA=1, but {sentence}"
    asked, printed = build.asked()
    assert_without_cuda(asked)
    assert f"abba_ext: building WITHOUT CUDA kernels: {sentence}" in printed


def test_another_minor_version_than_torch_s_will_do(build):
    build.nvcc(build.bin)
    build.torch(cuda="13.2")
    assert macros(build.asked(ABBA_CUDA="1")[0])["ABBA_BUILD_NVCC"] == "13.0"


@pytest.mark.parametrize("names, sentence", [
    ("7.5 8.0", "TORCH_CUDA_ARCH_LIST names 7.5, but the kernels need 8.0 (Ampere) or newer; leave it out, or build "
                "without the kernels (ABBA_CUDA=0)."),
    ("8.0;10.0+PTX", "TORCH_CUDA_ARCH_LIST names 10.0+PTX, but nvcc knows only 7.5 8.0 9.0; leave it out, or name the "
                     "folder of another toolkit in CUDA_HOME."),
    ("Ampere", "TORCH_CUDA_ARCH_LIST names 'Ampere'; give numbers, such as '8.0;9.0+PTX'."),
    ("sm_80", "TORCH_CUDA_ARCH_LIST names 'sm_80'; give numbers, such as '8.0;9.0+PTX'."),
], ids=["too old", "unknown to nvcc", "name", "another notation"])
@pytest.mark.parametrize("wanted", ["auto", "1"])
def test_architecture_that_cannot_be_had(build, wanted, names, sentence):
    build.nvcc(build.bin)
    assert build.failure(ABBA_CUDA=wanted, TORCH_CUDA_ARCH_LIST=names) == f"abba_ext: {sentence}\n"


@pytest.mark.parametrize("names, devices, expected", [
    ("8.0;9.0", [], "8.0;9.0"),
    (" 9.0a+PTX, 8.0 8.0; ", [(9, 0)], "9.0a+PTX;8.0"),
    ("", [(9, 0), (8, 0)], "8.0;9.0+PTX"),
    ("native", [(8, 0), (7, 5)], "8.0+PTX"),
    ("", [(8, 6)], "8.0+PTX"),
    ("", [(12, 0)], "9.0+PTX"),
], ids=["list", "separators and twice", "GPUs", "GPU too old beside another", "GPU between", "GPU newer than nvcc"])
def test_architectures(build, names, devices, expected):
    build.nvcc(build.bin)
    build.torch(devices=devices)
    assert macros(build.asked(TORCH_CUDA_ARCH_LIST=names)[0])["ABBA_BUILD_CUDA"] == expected


def test_no_kernels_for_old_gpus_alone(build):
    build.nvcc(build.bin)
    build.torch(devices=[(7, 5)])
    assert build.failure(ABBA_CUDA="1") == (
        "abba_ext: ABBA_CUDA=1, but the kernels need a GPU of architecture 8.0 (Ampere) or newer, and none here is; "
        "name the architectures of other machines in TORCH_CUDA_ARCH_LIST.\n")
    assert_without_cuda(build.asked()[0])


def test_default_architectures_are_those_that_nvcc_knows():
    known = [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)]
    assert cuda_toolkit.default_architectures([], known) == ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]
    assert cuda_toolkit.default_architectures([], known[:6]) == ["8.0", "8.6", "8.9", "9.0+PTX"]
    with pytest.raises(cuda_toolkit.Unusable, match="knows no architecture"):
        cuda_toolkit.default_architectures([], known[:1])


def test_gencode_flags():
    assert cuda_toolkit.gencode_flags(["9.0+PTX"]) == [  # the instructions of Hopper's own, and PTX that later GPUs take
        "-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_90,code=compute_90"]
    assert cuda_toolkit.gencode_flags(["8.0", "9.0a+PTX", "12.0"]) == [
        "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a", "-gencode=arch=compute_120,code=sm_120"]


@pytest.mark.parametrize("max_jobs, expected", [("1", 1), ("6", 2), ("64", 4)])
def test_threads_of_nvcc_follow_max_jobs(monkeypatch, max_jobs, expected):
    monkeypatch.setenv("MAX_JOBS", max_jobs)
    assert cuda_toolkit.threads(3) == expected


# --- the backend: the torch of the target, or a requirement ---

HOOK = """
import importlib.util, json, backend
places = {name: spec and spec.origin for name in ("torch", "ninja") for spec in [importlib.util.find_spec(name)]}
print(json.dumps([backend.get_requires_for_build_wheel(), backend.get_requires_for_build_editable(), places]))
"""
REQUIRED = (["torch>=2.11"], None)


class Environment:
    """A virtual environment without pip; `torch` is where its torch is or would be."""

    def __init__(self, folder):
        venv.create(folder, symlinks=True)
        self.python = str(folder / "bin" / "python")
        self.site_packages = next(folder.glob("lib/python*/site-packages"))
        self.torch = str(self.site_packages / "torch" / "__init__.py")


@pytest.fixture
def target(tmp_path):
    target = Environment(tmp_path / "target")
    stub(target.site_packages, "torch", "__version__ = '2.13.0'")
    stub(target.site_packages, "ninja", "")
    return target


@pytest.fixture
def empty(tmp_path):
    return Environment(tmp_path / "empty")


@pytest.fixture
def isolated(tmp_path):
    """The variables of a build that pip isolates: tools on PYTHONPATH, a sitecustomize that hides site-packages."""
    tools = tmp_path / "tools"
    stub(tools, "ninja", "")
    for package in ("setuptools", "_distutils_hack"):
        (tools / package).symlink_to(Path(setuptools.__file__).parents[1] / package)
    (tools / "sitecustomize.py").write_text(
        "import sys\nsys.path = [path for path in sys.path if not path.endswith('site-packages')]\n")
    path = os.pathsep.join([str(ROOT / "build_support"), str(tools)])
    inherited = {name: value for name, value in os.environ.items() if name != "UV_PYTHON"}
    return {**inherited, "PYTHONPATH": path, "PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def requirements(command, environment, **options):
    """What the hook, run by `command`, requires, and the torch it sees."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, **options)
    wheel, editable, places = json.loads(done.stdout)
    assert wheel == editable
    assert Path(places["ninja"]).parents[1].name == "tools", "a tool of the target hides that of the isolated build"
    return wheel, places["torch"]


FROM_SHELL = ["sh", "-c", '"$@"; exit', "sh"]  # a parent that is no front end
FROM_PYTHON = ["-c", "import os, subprocess, sys; os.environ.pop('PATH')\n"
                     "subprocess.run(sys.argv[1:], cwd='/', check=True)"]


def test_without_torch_it_is_required(empty, isolated):
    assert requirements([*FROM_SHELL, empty.python, "-c", HOOK], isolated) == REQUIRED


def test_pip_builds_against_the_torch_it_hides(target, isolated):
    assert requirements([*FROM_SHELL, target.python, "-c", HOOK], isolated) == ([], target.torch)


def test_torch_in_the_isolated_environment_comes_first(target, isolated, tmp_path):
    required = stub(tmp_path / "required", "torch", "__version__ = '2.13.0'")
    isolated["PYTHONPATH"] += os.pathsep + required
    expected = [], str(tmp_path / "required" / "torch" / "__init__.py")
    assert requirements([*FROM_SHELL, target.python, "-c", HOOK], isolated) == expected


@needs_proc
@pytest.mark.parametrize("program", ["absolute", "relative", "on PATH"])
def test_build_in_a_temporary_venv_finds_the_torch_of_its_caller(program, target, empty, isolated, tmp_path):
    isolated["PATH"] = f"{Path(target.python).parent}{os.pathsep}{isolated['PATH']}"
    python = {"absolute": target.python, "relative": "target/bin/python", "on PATH": "python"}[program]
    assert requirements([python, *FROM_PYTHON, empty.python, "-c", HOOK], isolated, cwd=tmp_path) == ([], target.torch)


@needs_proc
@pytest.mark.parametrize("arguments, variable, request_", [
    ("", None, ""),
    ("--python X", None, "X"),
    ("--python=X", "ignored", "X"),
    ("-p X", None, "X"),
    ("", "X", "X"),
    ("--system .", None, "--system"),
], ids=["active venv", "--python X", "--python=X", "-p X", "UV_PYTHON", "--system"])
def test_uv_is_asked_for_the_python_it_installs_into(arguments, variable, request_, target, empty, isolated, tmp_path):
    # A shell called uv: `uv -c ...` calls the hook as uv does, and `uv python find` runs the script named python.
    script(tmp_path / "python", 'echo "$@" > asked', f"echo {target.python}")
    command = ["uv", "-c", '"$0" -c "$HOOK"; exit', empty.python, *arguments.split()]
    isolated |= {"HOOK": HOOK} | ({"UV_PYTHON": variable} if variable else {})
    assert requirements(command, isolated, executable="/bin/sh", cwd=tmp_path) == ([], target.torch)
    assert (tmp_path / "asked").read_text().split() == ["find", *request_.split()]


# --- the build that is installed ---


def test_build_info_names_a_supported_torch():
    info = ops.build_info()
    assert tuple(int(part) for part in info["torch"].split(".")[:2]) >= (2, 11)
    assert info["compiler"] and "-std=c++20" in info["flags"]


def test_build_info_names_nvcc_and_architectures_or_neither():
    info = ops.build_info()
    assert bool(info["cuda"]) == bool(info["nvcc"])
    for architecture in filter(None, info["cuda"].split(";")):
        major, minor = architecture.removesuffix("+PTX").rstrip("af").split(".")
        assert (int(major), int(minor)) >= (8, 0)


@pytest.mark.skipif(not ops.build_info()["cuda"], reason="built without CUDA")
def test_the_module_calls_nothing_of_torch_that_may_be_missing():
    """A weak function of a library that is not linked to is null, and is found out when it is called."""
    symbols = subprocess.run(["nm", "-D", "--undefined-only", ops._C.__file__], capture_output=True, text=True, check=True).stdout
    assert re.search(r" U aoti_torch_\w+", symbols)
    assert not re.findall(r" [wv] (?:aoti_|torch_|c10|cu)\w+", symbols)


# A stub of torch's library, loaded by another one that alone sees its symbols, as Python loads torch.
STUBS = {
    "libtorch_cuda.so": ('extern "C" int aoti_torch_get_current_cuda_stream() { return 7; }', ["-Wl,-soname,libtorch_cuda.so"]),
    "libtorch_python.so": ("", ["-Wl,--no-as-needed", "-L.", "-ltorch_cuda", "-Wl,-rpath,$ORIGIN"]),
    "module.so": ('''#include "loaded_library.h"
        extern "C" int stream(const char* library, const char* function) {
          const auto found = reinterpret_cast<int (*)()>(abba::find_loaded(library, function));
          return found ? found() : 0;
        }''', ["-ldl"]),
}
LOOKUP = """
import ctypes
module = ctypes.CDLL("./module.so")
names = b"libtorch_cuda.so", b"aoti_torch_get_current_cuda_stream"
found = [module.stream(*names)]
ctypes.CDLL("./libtorch_python.so", ctypes.RTLD_LOCAL)
print(*found, module.stream(*names), module.stream(names[0], b"aoti_torch_of_a_later_torch"))
"""


def test_functions_of_torch_are_found_where_it_is_loaded_for_itself(tmp_path):
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler 'g++'")
    for name, (source, options) in STUBS.items():
        command = ["g++", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", "-o", name, "-x", "c++", "-", "-x", "none", *options]
        subprocess.run(command, input=source, text=True, cwd=tmp_path, check=True)
    done = subprocess.run([sys.executable, "-c", LOOKUP], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "7", "0"]
