"""A Hugging Face model on disk: where its tensors lie in its safetensors files, and which parameter each of them is."""
import contextlib
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .bases import ParameterBase
from .checkpoint import tied_parameters
from .formats.adapter import PEFT_CONFIG_NAME
from .patching import base_name

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_JSON_BYTES = 100 * 2**20  # as safetensors limits its headers
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        shard: Name of the file.
        stored_dtype: As safetensors calls it, such as "BF16".
        shape: Its shape; elements lie in row-major order.
        start: Offset of its first byte in the file.
        stop: Offset after its last byte.
    """

    shard: str
    stored_dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return self.stop - self.start

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of a plain floating-point tensor; None for integers and 8-bit floats, which quantised models store."""
        return _DTYPES.get(self.stored_dtype)


class BaseCheckpoint:
    """A model folder as `save_pretrained` writes it and the hub's cache holds it. Opening it reads JSON and headers only.

    Args:
        base: Folder with config.json and model.safetensors, or its shards and their index; or the name of a model on the hub
            that is in the local cache.

    Attributes:
        folder: Where the files are.
        shards: Names of the safetensors files.
        tensors: Where every tensor lies, by its key; within a shard in the order of the bytes.

    Raises:
        FileNotFoundError: There is no such folder, or no config.json, no safetensors weights or not all shards in it.
        ValueError: The model is quantised or has an adapter in its folder; the index names a file that does not lie in the
            folder, or does not agree with the files; a file is damaged. The message names it.
    """

    def __init__(self, base: str | os.PathLike):
        self.folder = _find_folder(base)
        self._description = _read_json(self.folder / CONFIG_NAME)
        if (self.folder / PEFT_CONFIG_NAME).exists():
            raise ValueError(f"{self.folder} holds an {PEFT_CONFIG_NAME}, so from_pretrained would load an adapter with it")
        quantization = self._description.get("quantization_config")
        if quantization is not None:
            method = quantization.get("quant_method", "of an unknown kind") if isinstance(quantization, dict) else quantization
            raise ValueError(f"{self.folder} is quantised ({method}): its weights cannot take an update; use the model it was "
                             "made from")
        self.shards, weight_map = _find_shards(self.folder)
        self.tensors: dict[str, StoredTensor] = {}
        for shard in self.shards:
            stored = _read_header(self.folder / shard)
            twice = sorted(self.tensors.keys() & stored.keys())
            if twice:
                raise ValueError(f"{self.folder / shard} holds {twice[0]!r}, which {self.tensors[twice[0]].shard} holds too")
            self.tensors |= stored
        if weight_map is not None:
            stored_in = {key: tensor.shard for key, tensor in self.tensors.items()}
            for key in sorted(key for key in stored_in.keys() | weight_map.keys() if stored_in.get(key) != weight_map.get(key)):
                raise ValueError(f"{self.folder / INDEX_NAME} has {key!r} in {weight_map.get(key, 'no file')}, but it is in "
                                 f"{stored_in.get(key, 'no file')}")

    @functools.cached_property
    def model(self) -> nn.Module:
        """The model of config.json on the meta device: modules, shapes and tied parameters, and no values.

        Raises:
            ValueError: transformers has no such model, or cannot build it without its weights.
            ImportError: transformers is not installed.
        """
        try:
            import transformers
        except ImportError:
            raise ImportError("reading a base model needs transformers: pip install 'abba_ext[hf]'") from None
        name = next(iter(self._description.get("architectures") or ()), None)
        model_class = getattr(transformers, str(name), None)
        if getattr(model_class, "config_class", None) is None or not issubclass(model_class, transformers.PreTrainedModel):
            raise ValueError(f"{self.folder / CONFIG_NAME}: architectures must start with a model of transformers "
                             f"{transformers.__version__}, got {name!r}")
        config = model_class.config_class.from_pretrained(self.folder)
        try:
            with torch.device("meta"):
                return model_class(config)
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(f"{name} cannot be built without its weights: {error}") from error

    def parameter_name(self, name: str, module: nn.Module) -> str:
        """Name of the parameter that the adapted layer of that name in :attr:`model` changes."""
        return base_name(name, module) + ("" if isinstance(module, ParameterBase) else ".weight")

    @functools.cached_property
    def _aliases(self) -> dict[str, list[str]]:
        names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        tied = tied_parameters(self.model)
        return {name: [name, *tied.get(name, ())] for name in names}

    def aliases(self, parameter: str) -> list[str]:
        """The other names of a parameter of :attr:`model`; none if it is no parameter."""
        return self._aliases.get(parameter, [])[1:]

    def tied_to(self, parameter: str) -> list[str]:
        """The parameters of other modules of :attr:`model` that are the same tensor."""
        owner = self.model.get_submodule(parameter.rpartition(".")[0])
        return [alias for alias in self.aliases(parameter)
                if self.model.get_submodule(alias.rpartition(".")[0]) is not owner]

    def keys(self, parameter: str) -> list[str]:
        """The keys under which a parameter of :attr:`model` is stored: its name or, if it is tied, any of its names, with or
        without the base model's prefix, as `from_pretrained` takes them. Empty if it is not stored, or no parameter.

        Raises:
            ValueError: One name is stored both with and without the prefix.
        """
        prefix = self.model.base_model_prefix + "."
        found = []
        for alias in self._aliases.get(parameter, ()):
            stored = [key for key in dict.fromkeys((alias, alias.removeprefix(prefix), prefix + alias)) if key in self.tensors]
            if len(stored) > 1:
                raise ValueError(f"{self.folder} stores the parameter {alias!r} twice: as {' and '.join(map(repr, stored))}")
            found += stored
        return found


def _find_folder(base: str | os.PathLike) -> Path:
    if os.path.isdir(base):
        return Path(base)
    with contextlib.suppress(ImportError, OSError, ValueError):  # no hub library, not in its cache, or no name of a model
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(os.fspath(base), local_files_only=True))
    raise FileNotFoundError(f"base: {os.fspath(base)!r} is neither a folder nor a model in the local hub cache; download it "
                            "first")


def _find_shards(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The safetensors files of a model, and the index's map from keys to files if there is one."""
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.is_file() and index.is_file():
        raise ValueError(f"{folder} holds both {SINGLE_NAME} and {INDEX_NAME}: remove the one that is not meant")
    if single.is_file():
        return [SINGLE_NAME], None
    if not index.is_file():
        other = sorted(path.name for path in folder.glob("*.bin"))
        advice = (f"; {other[0]} is in another format: load the model and save it with save_pretrained, which writes safetensors"
                  if other else "")
        raise FileNotFoundError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}{advice}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index}: weight_map must map keys to file names")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index}: weight_map must name .safetensors files of the folder itself, got {shard!r}")
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder / shard} is missing; {INDEX_NAME} names it")
    return shards, weight_map


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file in the order of their bytes, which they fill without gaps."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):  # checks the header: its size, dtypes, shapes, offsets against the file
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or is no safetensors file: {error}") from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        tensors[key] = StoredTensor(path.name, entry["dtype"], tuple(entry["shape"]), 8 + length + start, 8 + length + stop)
    return tensors


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; at most {MAX_JSON_BYTES:,} are read")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
