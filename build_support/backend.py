"""PEP 517 backend: setuptools, with the torch of the target environment made visible to an isolated build.

pip builds in an isolated environment that hides the installed torch; building against another torch would download
gigabytes for nothing. The backend looks for the torch that is already there and adds its site-packages at the *end*
of sys.path (so that the isolated build tools keep precedence). Only where there is none does it ask for torch.
"""
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F401,F403  (the PEP 517 hooks not overridden below)

TORCH_REQUIREMENT = "torch>=2.11"


def _front_end_purelib():
    """site-packages of the Python that called this build (`python -m build` builds inside a temporary venv)."""
    try:
        parent = os.readlink(f"/proc/{os.getppid()}/exe")
        argv0 = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")[0].decode()
    except OSError:
        return []
    if "python" not in Path(parent).name:
        return []
    python = argv0 if os.path.isabs(argv0) else parent
    query = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    result = subprocess.run([python, "-c", query], capture_output=True, text=True)
    return [result.stdout.strip()] if result.returncode == 0 else []


def _candidates():
    yield sysconfig.get_paths()["purelib"]
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if prefix := os.environ.get(variable):
            yield os.path.join(prefix, "Lib" if os.name == "nt" else os.path.join("lib", python), "site-packages")
    yield from _front_end_purelib()


def _torch_visible():
    if importlib.util.find_spec("torch"):
        return True
    for path in _candidates():
        if os.path.isfile(os.path.join(path, "torch", "version.py")):
            sys.path.append(path)
            importlib.invalidate_caches()
            return True
    return False


def _requirements(base):
    return base if _torch_visible() else [*base, TORCH_REQUIREMENT]


def get_requires_for_build_wheel(config_settings=None):
    return _requirements(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _requirements(build_meta.get_requires_for_build_editable(config_settings))


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _torch_visible()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _torch_visible()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
