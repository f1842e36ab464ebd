"""Merges an adapter into a model on disk, shard by shard, in the memory of one block of rows."""
import contextlib
import functools
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import filelock
import torch
from torch import Tensor

from . import reference
from .base_checkpoint import CONFIG_NAME, BaseCheckpoint, StoredTensor
from .bases import features, to_layout
from .checkpoint import replace_file, tie_problem
from .formats import Adapter, LayerFactors, read
from .formats.reading import fitting_layer
from .patching import find_layer

BLOCK_BYTES = 2**20  # of a stored weight in memory at a time
MIN_ROWS = 64  # of a block: BLAS may round another way where a matrix is only a few rows high
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".ot")


@dataclass(frozen=True)
class LayerUpdate:
    """The update of a stored weight.

    Attributes:
        factors: A1, B1, A2, B2 and s.
        transposed: Whether the weight is stored as W0ᵀ [n, m], as transformers' Conv1D does.
    """

    factors: LayerFactors
    transposed: bool

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start to stop of ΔW as it is stored, computed in a dtype."""
        a1, b1, a2, b2 = (getattr(self.factors, name).to(dtype) for name in ("a1", "b1", "a2", "b2"))
        if self.transposed:
            return reference.delta_weight(a1[:, start:stop], b1, a2[:, start:stop], b2, self.factors.scale).t()
        return reference.delta_weight(a1, b1[start:stop], a2, b2[start:stop], self.factors.scale)


def merge_checkpoint(base: str | os.PathLike, adapter: str | os.PathLike, out: str | os.PathLike, *, safe: bool = False,
                     force: bool = False, progress: Callable[[int, int], None] | None = None) -> Path:
    """Writes the model W0 + s·(B1 A1) ⊙ (B2 A2) as a folder that `from_pretrained` loads, without loading the model.

    The weights are those of :func:`abba_ext.merge_and_unload`: sums in fp32 (fp64 for fp64 weights or factors), rounded once to
    the stored dtype. Shards keep their names, keys and order. Other files are copied byte for byte, except hidden ones and
    other weights, which would stay unmerged: those in other formats (.bin, .gguf, .onnx, ...), and .safetensors that are no
    shards of the model, of which a warning tells. In memory are the adapter and one block of one weight: 1 MiB of it or 64 rows,
    whichever is more, as stored, and a few times that in the dtype of the sum.

    OUT appears whole, by one rename, or not at all. Until then the work is in `.OUT.partial` beside it; where that is left by a
    run that was cut short, a run with the same inputs goes on at the first missing shard, and one with other inputs starts over.
    (A kill just after the rename leaves there two small files that nobody needs.)

    Args:
        base: Folder or cached hub name of the base model; see :class:`abba_ext.base_checkpoint.BaseCheckpoint`.
        adapter: Folder or file in any format that :func:`abba_ext.formats.read` knows.
        out: The new folder. It must not exist, or be empty.
        safe: Refuse a result that holds NaN or infinity.
        force: Replace a model folder that is there, with all files in it, once the new one is complete.
        progress: Called with the bytes of weights written so far and their total.

    Returns:
        The path of the folder.

    Raises:
        FileNotFoundError: See :class:`~abba_ext.base_checkpoint.BaseCheckpoint` and :func:`abba_ext.formats.read`.
        FileExistsError: out is there and not empty, or, with force, is no model folder or holds a folder that the base does not,
            such as a Trainer's checkpoint.
        ValueError: The adapter does not fit the base; a weight is tied to another module, or a copy of a tied one was trained; the
            base cannot take an update; safe and a result is not finite; out overlaps base or adapter. Nothing is left behind.
        BlockingIOError: Another run is writing the same folder.
        OSError: The disk is full, or the folder cannot be written. What was merged is kept for the next run.
    """
    out = Path(os.path.abspath(out))
    checkpoint = BaseCheckpoint(base)
    sources = (checkpoint.folder, Path(adapter))
    _check_out(out, force, sources)
    factors = read(adapter, model=checkpoint.model)
    _compare_names(factors.base_model, os.fspath(base))
    changes = plan_changes(checkpoint, factors)
    others = _other_files(checkpoint)
    total = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
    written = 0

    def advance(count: int) -> None:
        nonlocal written
        written += count
        if progress is not None:
            progress(written, total)

    with _work_folder(out, _describe_inputs(checkpoint, others, factors, safe)) as folder:
        _check_out(out, force, sources)  # another run may have finished meanwhile
        for name in others:
            if not (folder / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                replace_file(os.fspath(folder / name), functools.partial(shutil.copyfile, checkpoint.folder / name))
        for shard in checkpoint.shards:
            stored = {key: tensor for key, tensor in checkpoint.tensors.items() if tensor.shard == shard}
            if (folder / shard).exists():
                advance(sum(tensor.num_bytes for tensor in stored.values()))
            else:
                replace_file(os.fspath(folder / shard),
                             functools.partial(_write_shard, checkpoint.folder / shard, stored, changes, safe, advance))
        _replace_folder(folder, out)
    return out


def partial_folder(out: str | os.PathLike) -> Path:
    """Where the merge into a folder keeps its work until it is complete."""
    out = Path(os.path.abspath(out))
    return out.parent / f".{out.name}.partial"


def plan_changes(checkpoint: BaseCheckpoint, adapter: Adapter) -> dict[str, LayerUpdate | Tensor]:
    """What changes in a base checkpoint, by key: weights that take an update, and parameters that are replaced.

    Raises:
        ValueError: The adapter does not fit the model, or the stored weights cannot take it; the first reasons are listed.
    """
    changes: dict[str, LayerUpdate | Tensor] = {}
    problems = []
    for name, factors in adapter.layers.items():
        try:
            keys = weight_keys(checkpoint, name, factors)
        except ValueError as error:
            problems.append(str(error))
            continue
        module = find_layer(checkpoint.model, name)
        tied = checkpoint.tied_to(checkpoint.parameter_name(name, module))
        if tied:
            problems.append(f"the weight of {name!r} is tied to {', '.join(tied)}, which merging would change too; untie it "
                            "first")
        n, m = features(module)
        transposed = to_layout(module, torch.empty(m, n, device="meta")).stride(-1) != 1
        changes |= dict.fromkeys(keys, LayerUpdate(factors, transposed))
    for name, value in adapter.trained.items():
        keys = checkpoint.keys(name)
        tied = checkpoint.aliases(name)
        equal = all(alias in adapter.trained and torch.equal(adapter.trained[alias], value) for alias in tied)
        problem = None if tied and equal else tie_problem(name, adapter.tied.get(name), tied)  # equal copies can become one
        if problem:
            problems.append(problem)
            continue
        if not keys:
            problems.append(f"{name!r}, which was trained in full, is not stored in the base")
        for key in keys:
            stored = checkpoint.tensors[key]
            if stored.shape != tuple(value.shape) or stored.dtype is None:
                problems.append(f"{name!r} must be {list(stored.shape)} {stored.stored_dtype} as in the base, got "
                                f"{list(value.shape)} {value.dtype}")
            elif isinstance(changes.get(key), LayerUpdate):
                problems.append(f"{name!r} is both adapted and trained in full")
            elif key in changes and not torch.equal(changes[key], value):
                problems.append(f"{name!r} was trained in full twice, by two of its names, with two results")
            changes[key] = value
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ValueError(f"the adapter does not fit the base {checkpoint.folder}: " + "; ".join(problems[:5]) + more)
    return changes


def weight_keys(checkpoint: BaseCheckpoint, name: str, factors: LayerFactors) -> list[str]:
    """The keys under which the weight of an adapted layer is stored: one, unless the weight is tied.

    Raises:
        ValueError: The model has no such layer or it cannot be adapted, has another size, or is not stored as a plain weight.
    """
    module = fitting_layer(checkpoint.model, name, factors)
    parameter = checkpoint.parameter_name(name, module)
    keys = checkpoint.keys(parameter)
    if not keys:
        raise ValueError(f"no file holds {parameter!r}: they name it otherwise than the model does; load the model and use "
                         "abba_ext.load_adapter, merge_and_unload and save_pretrained")
    for key in keys:
        stored = checkpoint.tensors[key]
        if stored.dtype is None:
            raise ValueError(f"{key!r} is stored as {stored.stored_dtype}: only plain floating-point weights can take an update")
        if stored.shape != tuple(module.weight.shape):
            raise ValueError(f"{key!r} is stored as {list(stored.shape)}, but the model of {CONFIG_NAME} has "
                             f"{list(module.weight.shape)}")
    return keys


def row_blocks(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Splits rows into blocks of about BLOCK_BYTES bytes and at least MIN_ROWS rows; the last may have up to MIN_ROWS more."""
    step = max(MIN_ROWS, BLOCK_BYTES // max(row_bytes, 1))
    starts = range(0, max(rows - MIN_ROWS + 1, 1), step)
    return zip(starts, [*starts[1:], rows], strict=True)


# --- checks before the first byte ---


def _check_out(out: Path, force: bool, sources: tuple[Path, ...]) -> None:
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()) or out.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"out: {out} must not be, lie in or contain {source}")
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise FileExistsError(f"out: {out} exists and is no folder")
    if any(out.iterdir()):
        if not force:
            raise FileExistsError(f"out: {out} exists and is not empty; choose another folder, or replace it with force "
                                  "(--force)")
        if not (out / CONFIG_NAME).is_file():
            raise FileExistsError(f"out: {out} holds no {CONFIG_NAME}, so it is no model that force could replace")
        kept = sorted(path.name for path in out.iterdir()
                      if path.is_dir() and (path.name.startswith(".") or not (sources[0] / path.name).is_dir()))
        if kept:
            raise FileExistsError(f"out: {out} holds the folder {kept[0]!r}, which force would delete; move it, or choose another "
                                  "folder")


def _compare_names(expected: str | None, base: str) -> None:
    if expected and os.path.basename(expected.rstrip("/")) != os.path.basename(base.rstrip("/")):
        warnings.warn(f"the adapter was trained on {expected!r} and is merged into {base!r}", stacklevel=3)


def _other_files(checkpoint: BaseCheckpoint) -> list[str]:
    """The files to copy, as paths within the folder."""
    found = []
    for folder, subfolders, names in os.walk(checkpoint.folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        here = Path(folder).relative_to(checkpoint.folder)
        found += [str(here / name) for name in sorted(names) if not name.startswith(".") and not name.endswith(_OTHER_WEIGHTS)]
    unmerged = [name for name in found if name.endswith(".safetensors") and name not in checkpoint.shards]
    if unmerged:
        warnings.warn(f"left out, as they are no shards of the model and would stay unmerged: {', '.join(unmerged)}", stacklevel=3)
    return [name for name in found if name not in (*checkpoint.shards, *unmerged)]


# --- the folder in which the work is done ---


def _describe_inputs(checkpoint: BaseCheckpoint, others: list[str], adapter: Adapter, safe: bool) -> dict:
    """What has to be the same for a run to go on where another stopped."""
    stats = {name: (checkpoint.folder / name).stat() for name in [*checkpoint.shards, *others]}
    digest = hashlib.sha256()
    for name, layer in adapter.layers.items():
        digest.update(repr((name, layer.scale, layer.a1.dtype, layer.ranks)).encode())
        for factor in (layer.a1, layer.b1, layer.a2, layer.b2):
            digest.update(_bytes(factor))
    for name, value in adapter.trained.items():
        digest.update(repr((name, value.dtype, value.shape)).encode())
        digest.update(_bytes(value))
    return {"base": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}, "adapter": digest.hexdigest(),
            "safe": safe}


@contextlib.contextmanager
def _work_folder(out: Path, inputs: dict) -> Iterator[Path]:
    """A folder for the new model, with what an earlier run with the same inputs left in it.

    It stays if the work is cut short, and goes if the inputs are refused.
    """
    partial = partial_folder(out)
    manifest, folder = partial / "inputs.json", partial / "model"
    partial.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(partial / "lock").acquire(blocking=False):
            if not manifest.is_file() or manifest.read_bytes() != json.dumps(inputs).encode():
                if folder.exists():
                    shutil.rmtree(folder)
                replace_file(os.fspath(manifest), lambda path: Path(path).write_bytes(json.dumps(inputs).encode()))
            folder.mkdir(exist_ok=True)
            for remains in folder.rglob(".tmp-*"):
                remains.unlink()
            try:
                yield folder
            except (ValueError, FileExistsError):
                shutil.rmtree(partial)
                raise
            shutil.rmtree(partial)
    except filelock.Timeout:
        raise BlockingIOError(f"another run is merging into {out}: it holds {partial / 'lock'}") from None
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; what was merged so far is in {partial}: the same call goes on from there, "
                      "or delete it") from error


def _replace_folder(folder: Path, out: Path) -> None:
    old = out.parent / f".{out.name}.old"
    if out.exists():
        if old.exists():
            shutil.rmtree(old)
        out.rename(old)
    folder.rename(out)
    if old.exists():
        shutil.rmtree(old)


# --- writing a shard ---


def _write_shard(source: Path, tensors: dict[str, StoredTensor], changes: dict[str, LayerUpdate | Tensor], safe: bool,
                 advance: Callable[[int], None], target: str) -> None:
    """Copies a shard from its first byte to its last, changing tensors on the way."""
    with open(source, "rb") as reader, open(target, "wb") as writer:
        writer.write(_take(reader, source.stat().st_size - sum(tensor.num_bytes for tensor in tensors.values())))  # the header
        for key, tensor in tensors.items():
            change = changes.get(key)
            rows = tensor.num_bytes if change is None else (*tensor.shape, 1)[0]
            row_bytes = tensor.num_bytes // max(rows, 1)
            for start, stop in row_blocks(rows, row_bytes):
                data = _take(reader, (stop - start) * row_bytes)
                if change is not None and data:
                    block = torch.frombuffer(data, dtype=tensor.dtype).view(stop - start, -1)
                    _change(block, change, start, stop)
                    if safe and not torch.isfinite(block).all():
                        raise ValueError(f"the merged {key!r} holds NaN or infinity; nothing was written")
                writer.write(data)
                advance(len(data))


def _change(block: Tensor, change: LayerUpdate | Tensor, start: int, stop: int) -> None:
    """Changes rows start to stop of a stored tensor in place."""
    if isinstance(change, Tensor):
        block.copy_(change.reshape(-1, block.size(1))[start:stop])
        return
    wide = torch.float64 if torch.float64 in (change.factors.a1.dtype, block.dtype) else torch.float32
    block.copy_(block.to(wide) + change.rows(start, stop, wide))


def _take(reader: BinaryIO, count: int) -> bytearray:
    data = bytearray(count)
    if reader.readinto(data) != count:
        raise ValueError(f"{reader.name} became shorter while it was read")
    return data


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
