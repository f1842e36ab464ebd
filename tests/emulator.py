"""Builds the CUDA kernels' own sources with g++ and runs them on CPU tensors, through csrc/emulation.

Two builds of a source tree: "fast" checks what the PTX wrappers see (ranges, alignment, divergent warps, deadlocks),
"checked" every access of the kernels too (races, memory never written, bounds). Nothing but g++, pybind11 and CUDA's
headers is needed. Objects and modules are kept under build/emulation by a hash of what they are made of.

    emulated = emulator.Backend(emulator.build(mode="checked"), emulator.Schedule(order="random", seed=3))
    u = emulated.project(x, f1, f2)
"""
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
MODES = ("fast", "checked")
KERNELS = tuple(Path("csrc/cuda", f"{name}.cu") for name in ("magnitudes", *(
    name + family for name in ("project", "expand", "factor_grad") for family in ("", "_sm90"))))
CXX = os.environ.get("CXX", "g++")
_FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-strict-aliasing",
          "-fno-threadsafe-statics", "-Wall", "-Wno-unknown-pragmas", "-DABBA_EMULATE",
          "-DEMULATED_MODULE=abba_emulated"]
# What the check build must see as a load or store may not become a call of memset or of a function of the CUDA headers.
_CHECKED_KERNEL_FLAGS = ["-O2", "-g1", "-fsanitize=thread", "-fno-tree-loop-distribute-patterns", "-fno-tree-vectorize",
                         "-fno-tree-slp-vectorize", "-finline-functions", "--param=max-inline-insns-auto=1000",
                         "--param=early-inlining-insns=1000", "--param=inline-unit-growth=1000",
                         "--param=large-function-growth=1000", "--param=large-stack-frame-growth=10000"]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which thread runs next, when a cp.async copies, which block comes next."""

    order: str = "fifo"  # random, lowest, highest
    copy: str = "late"  # early
    block_order: str = "ascending"  # descending, random
    seed: int = 0
    threads: int = 1  # OS threads; the checked build uses one

    def __str__(self):
        return "-".join([self.order, self.copy, self.block_order] + ([f"seed{self.seed}"] if self.seed else []))


# First in, first out alone hides most missing barriers.
SCHEDULES = (
    Schedule(),
    Schedule("random", "early", "random", seed=1),
    Schedule("random", "late", "descending", seed=2),
    Schedule("lowest", "late", "descending"),
    Schedule("highest", "early", "ascending"),
)


class Unavailable(RuntimeError):
    """The kernels cannot be compiled on this machine; the message says why."""


@functools.cache
def cuda_includes() -> list[Path]:
    """The folders with cuda_bf16.h and what it includes."""
    candidates = [Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    if nvcc := shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc"):
        dryrun = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True)  # nvcc may be a script
        if top := re.search(r"TOP=(.*)", dryrun.stderr + dryrun.stdout):
            candidates.append(Path(top[1].strip()) / "include")
    for packages in {sysconfig.get_paths()["purelib"], *sys.path}:
        candidates += sorted(Path(packages).glob("nvidia/*/include"), reverse=True)
        candidates += [Path(packages) / "triton/backends/nvidia/include"]
    for folder in candidates:
        folders = [folder, folder / "cccl"]  # CUDA 13 has nv/target in the latter
        needed = ("cuda_bf16.h", "crt/host_defines.h", "nv/target")
        if all(any((f / name).is_file() for f in folders) for name in needed):
            return [f.resolve() for f in folders if f.is_dir()]
    raise Unavailable("no CUDA headers to emulate kernels with: there is neither nvcc nor are the packages "
                      "nvidia-cuda-runtime, nvidia-cuda-crt and nvidia-cuda-cccl")


def unavailable() -> str:
    """Why nothing can be emulated here, or an empty string."""
    try:
        cuda_includes()
    except Unavailable as reason:
        return str(reason)
    return "" if shutil.which(CXX) else f"no C++ compiler '{CXX}' to emulate kernels with"


def build(source_root: Path = ROOT, mode: str = "fast"):
    """The module of the launchers in source_root/csrc; compiled if it is not at hand.

    Args:
        source_root: a folder with the csrc of this project, or of a changed copy of it.
        mode: "fast" or "checked".

    Returns:
        a module with configure, register_buffer, clear_buffers, counters, reset_counters, project, expand_, factor_grad
        and factor_grad_workspace.

    Raises:
        Unavailable: unavailable() says why.
        RuntimeError: a source does not compile.
    """
    return build_module(source_root, [Path("csrc/emulation/bindings.cpp"), *KERNELS], mode)


def build_module(root: Path, sources: list[Path], mode: str):
    """A module of the given sources, relative to root, and the emulator's runtime."""
    if reason := unavailable():
        raise Unavailable(reason)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    import pybind11

    root, folder = Path(root).resolve(), _build_folder()
    includes = ["-Icsrc", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}",
                *(f"-isystem{folder}" for folder in cuda_includes())]
    runtime = sorted(path.relative_to(root) for path in root.glob("csrc/emulation/*.cpp") if path.stem != "bindings")
    runtime_flags = ["-O3"] + (["-DABBA_EMULATION_CHECKED"] if mode == "checked" else [])
    flags = {".cpp": ["-O1"], ".cu": _CHECKED_KERNEL_FLAGS if mode == "checked" else ["-O2"]}

    def compile_unit(source):
        unit_flags = _FLAGS + (runtime_flags if source in runtime else flags[source.suffix])

        def key():
            contents = [path.read_bytes() for path in _with_headers(root / source, root / "csrc")]
            return folder / f"{_hash(compiler, *includes, *unit_flags, source, *contents)}.o"

        while not (target := key()).exists():
            # All names are relative to root, so that a copy of the tree finds its objects.
            _make(target, [*unit_flags, *includes, "-x", "c++", "-c", source, "-o"], root)
            if key() != target:  # edited meanwhile
                target.unlink()
        return target

    compiler = _compiler()
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_unit, [*runtime, *sources]))
    target = folder / f"{_hash(*(path.name for path in objects))}.so"
    _make(target, ["-shared", "-pthread", *objects, "-o"], root)  # the runtime comes first: checks.cpp says why
    return _load(target)


@contextlib.contextmanager
def located(module):
    """Names source lines where a finding of the checked build names an address in the module."""
    try:
        yield
    except RuntimeError as error:
        def lines(match):
            command = ["addr2line", "-i", "-e", module.__file__, match[1]]
            frames = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
            return " in ".join(os.path.normpath(frame.split(" (")[0]) for frame in frames[:3]) or match[0]

        message = str(error)
        if shutil.which("addr2line"):
            message = re.sub(r"module\+(0x[0-9a-f]+)", lines, message)
        raise RuntimeError(message) from None


class Launch:
    """Registers the buffers of one launch, exactly, and forgets them after it."""

    _GUARD = 256  # bytes before and after what it allocates

    def __init__(self, module, schedule: Schedule):
        self.module = module
        self.guarded = []
        module.clear_buffers()
        module.configure(**dataclasses.asdict(schedule))

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.module.clear_buffers()
        if kind is None:
            for name, storage, inside in self.guarded:
                if (storage[~inside] != 0xFF).any():
                    raise RuntimeError(f"a kernel wrote beside {name}: before it, after it or between its rows")

    def register(self, t: Tensor, name: str, writable: bool = False, initialised: bool = True) -> Tensor:
        """A 2-D tensor, with the gaps between its rows (or columns, if these are the ones of unit stride) left out."""
        extent = (sum((n - 1) * abs(stride) for n, stride in zip(t.shape, t.stride())) + 1) * t.element_size()
        rows = {}
        if t.dim() == 2:
            (inner_stride, inner), (outer_stride, outer) = sorted(zip(t.stride(), t.shape))
            if inner_stride == 1 and outer > 1 and outer_stride > inner:
                rows = {"row_bytes": inner * t.element_size(), "row_stride": outer_stride * t.element_size()}
        self.module.register_buffer(t.data_ptr(), extent, name, writable, initialised, **rows)
        return t

    def output(self, shape, stride, dtype, name: str) -> Tensor:
        """A registered tensor that nothing was written to yet, NaN throughout; what lies around it may not change."""
        size = torch.empty((), dtype=dtype).element_size()
        extent = (sum((n - 1) * step for n, step in zip(shape, stride)) + 1) * size
        storage = torch.full((extent + 2 * self._GUARD,), 0xFF, dtype=torch.uint8)
        typed = storage[self._GUARD:self._GUARD + extent].view(dtype)
        inside = torch.zeros_like(storage, dtype=torch.bool)
        elements = torch.zeros(extent // size, dtype=torch.bool)
        elements.as_strided(shape, stride).fill_(True)
        inside[self._GUARD:self._GUARD + extent] = elements.repeat_interleave(size)
        self.guarded.append((name, storage, inside))
        return self.register(typed.as_strided(shape, stride), name, writable=True, initialised=False)


@dataclasses.dataclass(frozen=True)
class Backend:
    """The three ops on CPU tensors, by emulated kernels. x, y, u and v have unit inner stride; factors any strides."""

    module: object
    schedule: Schedule = Schedule()
    num_sms: int = 4  # of the device that the launchers believe to have
    sm90: bool = False  # whether that is a Hopper GPU, whose kernels are wanted

    def project(self, x: Tensor, f1: Tensor, f2: Tensor) -> Tensor:
        """u [T, r1*r2] in x's dtype, of x [T, D], f1 [r1, D], f2 [r2, D]."""
        with self._launch() as launch:
            width = f1.size(0) * f2.size(0)
            u = launch.output((x.size(0), width), (width, 1), x.dtype, "u")
            self._call("project", x=launch.register(x, "x"), u=u, workspace=self._magnitudes(launch, x.dtype),
                       **self._factors(launch, f1, f2))
        return u

    def expand_(self, y: Tensor, u: Tensor, f1: Tensor, f2: Tensor, s: float) -> Tensor:
        """Adds to y [T, D] the product of u [T, r1*r2] with the factors, times s; returns y."""
        with self._launch() as launch:
            launch.register(y, "y", writable=True)
            self._call("expand_", y=y, u=launch.register(u, "u"), s=s, workspace=self._magnitudes(launch, y.dtype),
                       **self._factors(launch, f1, f2))
        return y

    def factor_grad(self, x: Tensor, v: Tensor, f1: Tensor, f2: Tensor, s: float) -> tuple[Tensor, Tensor]:
        """df1 [r1, D] and df2 [r2, D] in the factors' dtype and layout, of x [T, D] and v [T, r1*r2]."""
        with self._launch() as launch:
            df1, df2 = (launch.output(f.shape, torch.empty_like(f).stride(), f.dtype, name)
                        for f, name in ((f1, "df1"), (f2, "df2")))
            with located(self.module):
                size = self.module.factor_grad_workspace(
                    r1=f1.size(0), r2=f2.size(0), num_tokens=x.size(0), num_features=x.size(1), dtype=_name(x.dtype),
                    num_sms=self.num_sms, sm90=self.sm90)
            self._call("factor_grad", x=launch.register(x, "x"), v=launch.register(v, "v"), df1=df1, df2=df2, s=s,
                       workspace=self._workspace(launch, size), **self._factors(launch, f1, f2))
        return df1, df2

    def _launch(self):
        return Launch(self.module, self.schedule)

    @staticmethod
    def _workspace(launch, size):
        return launch.output((size,), (1,), torch.uint8, "workspace") if size else None

    def _magnitudes(self, launch, dtype):
        return self._workspace(launch, self.module.magnitudes_workspace(dtype=_name(dtype)))

    @staticmethod
    def _factors(launch, f1, f2):
        return {"f1": launch.register(f1, "f1"), "f2": launch.register(f2, "f2")}

    def _call(self, name, **arguments):
        tokens = arguments["y" if name == "expand_" else "x"]
        f1, f2 = arguments["f1"], arguments["f2"]

        def plain(key, value):
            if key == "workspace":
                return value.data_ptr() if value is not None else 0
            if not isinstance(value, Tensor):
                return value
            return (value.data_ptr(), value.stride(0)) if key in "xyuv" else (value.data_ptr(), *value.stride())

        with located(self.module):
            getattr(self.module, name)(
                **{key: plain(key, value) for key, value in arguments.items()}, r1=f1.size(0), r2=f2.size(0),
                num_tokens=tokens.size(0), num_features=tokens.size(1), dtype=_name(tokens.dtype),
                factor_dtype=_name(f1.dtype), num_sms=self.num_sms, sm90=self.sm90)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _compiler() -> str:
    return subprocess.run([CXX, "--version"], capture_output=True, text=True).stdout


@functools.cache
def _build_folder() -> Path:
    folder = ROOT / "build/emulation"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        folder = Path(tempfile.gettempdir(), f"abba_emulation_{os.getuid()}")
        folder.mkdir(exist_ok=True)
    return folder


def _with_headers(source: Path, include: Path) -> list[Path]:
    """A source and the project's headers that it includes, directly or not."""
    found, queue = [], [source.resolve()]
    for path in queue:
        if path not in found:
            found.append(path)
            names = re.findall(r'^#include "(.+)"', path.read_text(encoding="utf-8"), re.M)
            queue += [full for name in names for folder in (path.parent, include)
                      if (full := (folder / name).resolve()).is_file()]
    return found


def _make(target, command, root):
    """Runs the command unless its target is there. Of the workers of a parallel run one does, and the others wait for that target."""
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _run(command, target, root)


def _hash(*parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else str(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:24]


def _run(command, target, root):
    unfinished = target.with_suffix(f".{os.getpid()}")
    command = [CXX, f"-ffile-prefix-map={root}=.", *map(str, command)]  # lines in messages are relative to root too
    result = subprocess.run([*command, str(unfinished)], cwd=root, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    os.replace(unfinished, target)


@functools.cache
def _load(path: Path):
    name = f"emulated_{path.stem}.abba_emulated"  # pybind11 keeps one module of a name
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
