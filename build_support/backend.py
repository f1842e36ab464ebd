"""PEP 517 backend: setuptools, with the torch of the environment that is installed into.

Front ends build in an isolated environment, which hides that torch; a second one would be a download of gigabytes for
nothing. So the backend asks the Python of the target where its torch is, and appends those folders to sys.path: at the
end, so that the isolated build tools keep precedence. Only where there is none does torch become a build requirement.
"""
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools.build_meta import *  # noqa: F403  (the hooks that are not overridden below)

TORCH_REQUIREMENT = "torch>=2.11"
PRINT_TORCH_PATHS = """
import importlib.util, os, sys
torch = importlib.util.find_spec("torch")
if torch:
    print(os.path.dirname(os.path.dirname(torch.origin)), *sys.path[1:], sep="\\n")
"""


def _target_pythons():
    """The Python that pip builds with, then that of the front end: uv and `python -m build` build in a temporary venv.

    The front end is the parent process; only Linux tells about it.
    """
    yield sys.executable
    process = Path("/proc", str(os.getppid()))
    try:
        command = os.fsdecode((process / "cmdline").read_bytes())
        environment = os.fsdecode((process / "environ").read_bytes())
        folder = os.readlink(process / "cwd")
    except OSError:
        return
    variables = dict(re.findall(r"([^=\0]+)=([^\0]*)", environment))
    program = command.split("\0")[0]
    if Path(program).name == "uv":
        request = re.findall(r"\0(?:--python[\0=]|-p\0?|UV_PYTHON=)([^\0]+)", f"{command}\0{environment}")[:1]
        system = re.findall(r"\0(--system)\0", command)
        find = [process / "exe", "python", "find", *system, *request]
        yield from subprocess.run(find, env=variables, cwd=folder, capture_output=True, text=True).stdout.splitlines()
    elif Path(program).name.startswith("python"):
        yield shutil.which(os.path.join(folder, program) if "/" in program else program, path=variables.get("PATH"))


def _torch_is_visible():
    if importlib.util.find_spec("torch"):
        return True
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    for python in filter(None, _target_pythons()):
        paths = subprocess.run([python, "-c", PRINT_TORCH_PATHS], env=environment, capture_output=True, text=True)
        if paths.stdout:
            sys.path += [path for path in paths.stdout.splitlines() if path not in sys.path]
            return True
    return False


_REQUIRES = [] if _torch_is_visible() else [TORCH_REQUIREMENT]


def get_requires_for_build_wheel(config_settings=None):
    return _REQUIRES


get_requires_for_build_editable = get_requires_for_build_wheel
