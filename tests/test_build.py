"""The build, run as front ends run it: the sentence of every failure, and which torch the backend finds.

Nothing is compiled and nothing is fetched: torch is a stub wherever only its version or its place matters.
"""
import json
import os
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
    done = setup(tree, f"sdist --dist-dir {tmp_path}", PYTHONPATH=stub(tmp_path / "stubs", "torch", MISSING))
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("abba_ext-*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path for folder in ("abba_ext", "build_support", "csrc") for path in (tree / folder).rglob("*.*")}
    assert names >= {str(path.relative_to(tree)) for path in sources if path.suffix in (".py", ".cpp", ".h")}
    assert names >= {"setup.py", "pyproject.toml", "README.md", "LICENSE"}


def test_import_from_the_unbuilt_source_tree(tree):
    command = [sys.executable, "-S", "-c", "import abba_ext"]  # -S: an editable install would lend its compiled module
    environment = {**os.environ, "PYTHONPATH": str(Path(torch.__file__).parents[1])}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: abba_ext: the compiled module is missing because abba_ext was imported from its source tree "
        f"({tree / 'abba_ext'}); run `pip install -e .` there")


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
