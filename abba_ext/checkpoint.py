"""Saving and loading adapters: one safetensors file that holds the factors and says how to use them.

`adapter_model.safetensors` is the adapter; its metadata carries the same JSON that is written beside it as
`abba_config.json` for people and tools. Loading reads the safetensors file alone, so replacing that one file
atomically is enough for an adapter on disk to be the old one or the new one, never a mixture.
"""
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .bases import features, is_linear, refusal, stack_shape, weight_device
from .config import AbbaConfig
from .layers import FACTORS, AbbaLayer
from .patching import _STATE, abba_layers, apply_patch, check_patchable, find_layer, is_patched, named_parameters, patch_of
from .sharding import copy_full, full_shape, full_tensor, is_sharded, reshard

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "abba_config.json"  # not PEFT's name: transformers takes a folder that holds that for an adapter of PEFT
FORMAT = "abba_ext"
FORMAT_VERSION = 1
CHECKSUM = "sha256"


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors of a patched model by parameter name: factors, and biases and heads that are trained too.

    Sharded parameters are gathered whole, one after the other; every rank must call this then.

    Raises:
        ValueError: The model is not patched; FullyShardedDataParallel (FSDP1) has its parameters and does not show them whole.
    """
    patch = patch_of(model)
    _check_whole(model)
    reshard(model)
    state = {f"{name}.{key}": getattr(layer, key) for name, layer in abba_layers(model).items() for key in FACTORS}
    state |= {name: model.get_parameter(name) for name in patch.originals}
    return {name: full_tensor(tensor) for name, tensor in state.items()}


def _check_whole(model: nn.Module) -> None:
    for name, layer in abba_layers(model).items():
        if len(full_shape(layer.abba_A1)) < 2:
            raise ValueError(f"the factors of {name!r} are flattened parts that FullyShardedDataParallel left on this rank; call "
                             "this inside FullyShardedDataParallel.summon_full_params(model)")


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Writes the adapter of a patched model into a folder (created if need be), atomically.

    Keys are parameter names ("model.layers.0.self_attn.q_proj.abba_A1"). The JSON holds format and version, the base model's
    name, the config with its scaling convention, and (r1, r2, s) of every layer. Of a sharded model every rank must call this;
    rank 0 writes.

    Raises:
        ValueError: The model is not patched.
        NotADirectoryError: The path is a file.
    """
    state = {name: tensor.to("cpu", copy=True).contiguous()  # FSDP1 resizes its storages; those lent to numpy cannot be
             for name, tensor in adapter_state_dict(model).items()}
    patch = patch_of(model)
    _warn_of_losses(model, state)
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": _base_model_name(model),
        "config": patch.config.to_dict(),
        "layers": {name: _describe(layer) for name, layer in abba_layers(model).items()},
        "trained_base_parameters": list(patch.originals),
        "tied": {name: others for name, others in tied_parameters(model).items() if name in patch.originals},
    }
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        write_adapter(directory, state, description)
        return
    if torch.distributed.get_rank() == 0:
        write_adapter(directory, state, description)
    torch.distributed.barrier()


def _warn_of_losses(model: nn.Module, state: dict[str, Tensor]) -> None:
    unsaved = [name for name, parameter in named_parameters(model) if parameter.requires_grad and name not in state]
    if unsaved:
        warnings.warn(f"{len(unsaved)} trainable parameters are no part of the adapter and are not saved with it: {unsaved[0]!r}, "
                      "...; name their modules in modules_to_save", stacklevel=3)
    layers = abba_layers(model)
    gone = [name for name in patch_of(model).layers if name not in layers]
    if gone:
        warnings.warn(f"{len(gone)} layers are not saved, as they are no ABBA layers any more: {gone[0]!r}, ...; something "
                      "has replaced them since patch_model, as resize_token_embeddings does with an adapted head",
                      stacklevel=3)
    resting = [name for name in layers if not state[f"{name}.abba_B2"].any()]
    if 0 < len(resting) < len(layers):
        warnings.warn(f"ΔW of {len(resting)} layers is still 0: {resting[0]!r}, ... took no part in training; a module that reads "
                      "the weight of a layer without calling it bypasses the adapter", stacklevel=3)


def _describe(layer: AbbaLayer) -> dict[str, Any]:
    r1, r2 = layer.abba_ranks
    description = {"r1": r1, "r2": r2, "scale": layer.abba_scale}
    return description if is_linear(layer) else {**description, "kind": layer.abba_base_class.__name__}


def write_adapter(directory: str | os.PathLike, state: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Writes the two files of an adapter; see :func:`save_adapter`. :func:`read_adapter` is the inverse.

    Args:
        directory: The folder, created if need be.
        state: Contiguous CPU tensors by parameter name.
        description: The JSON-compatible description.

    Raises:
        NotADirectoryError: The path is a file.
    """
    from safetensors.torch import save_file

    directory = os.fspath(directory)
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise NotADirectoryError(f"directory must be a folder, but {directory!r} is a file")
    text = json.dumps(description, indent=2)
    metadata = {FORMAT: text, CHECKSUM: _checksum(text, state)}
    os.makedirs(directory, exist_ok=True)
    replace_file(os.path.join(directory, WEIGHTS_NAME), lambda path: save_file(state, path, metadata=metadata))
    replace_file(os.path.join(directory, CONFIG_NAME), lambda path: _write_text(path, text + "\n"))


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> nn.Module:
    """Loads an adapter that :func:`save_adapter` wrote, in place, and returns the model.

    An unpatched model is patched with the layers, ranks and scales of the file; a patched one must have the same layers and
    ranks, and takes the file's values, scales and config, but keeps its own dropout, plan, recompute_u and adapter_dtype.
    Outputs are bit-equal to those of the model that was saved, if the factors have the file's dtype. The factors are left
    trainable. Of a sharded model every rank must call this, and keeps its part.

    Raises:
        FileNotFoundError: There is no adapter in the folder.
        NotADirectoryError: The path is a file.
        ValueError: The file is not one of this format or is damaged; keys are missing, unknown or of another shape; the
            model lacks a layer or has it in another size, or ties a trained parameter to others than the model that was trained.
            The model is left unchanged.
    """
    description, state = read_adapter(directory)
    config = AbbaConfig.from_dict(description["config"])
    layers, trained = description["layers"], description["trained_base_parameters"]
    patched = is_patched(model)
    if not patched:
        check_patchable(model)
    _check_state(model, layers, trained, state, description.get("tied", {}))
    name, base_name = _base_model_name(model), description["base_model_name_or_path"]
    if name and base_name and os.path.basename(name.rstrip("/")) != os.path.basename(base_name.rstrip("/")):
        warnings.warn(f"the adapter was trained on {base_name!r} and is loaded into {name!r}", stacklevel=2)
    if not patched:
        targets = {layer: find_layer(model, layer) for layer in layers}
        factors = {layer: {key: state[f"{layer}.{key}"].to(weight_device(target)) for key in FACTORS}
                   for layer, target in targets.items()}
        apply_patch(model, config, targets, factors, {layer: entry["scale"] for layer, entry in layers.items()}, trained)
    else:
        patch = patch_of(model)
        kept = {name: getattr(patch.config, name) for name in ("dropout", "plan", "recompute_u", "adapter_dtype")}
        patch.config = replace(config, **kept)
    reshard(model)
    parameters = dict(named_parameters(model))
    for key, tensor in state.items():
        copy_full(parameters[key], tensor)
    for name, layer in abba_layers(model).items():
        layer.abba_scale = layers[name]["scale"]
        layer.abba_initialized = True
    return model


def read_adapter(directory: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a saved adapter, checked for format and version but against no model.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: See :func:`load_adapter`.
    """
    from safetensors import SafetensorError, safe_open

    path = os.path.join(os.fspath(directory), WEIGHTS_NAME)
    if os.path.isfile(directory):
        raise NotADirectoryError(f"directory must be a folder, but {os.fspath(directory)!r} is a file")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no adapter in {os.fspath(directory)!r}: {WEIGHTS_NAME} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or is no safetensors file: {error}") from None
    if FORMAT not in metadata:
        raise ValueError(f"{path} is no adapter of abba_ext; abba_ext.convert_adapter (abba-ext convert) reads other formats")
    try:
        description = json.loads(metadata[FORMAT])
        version = description["format_version"]
        layers = {name: (int(entry["r1"]), int(entry["r2"]), float(entry["scale"]))
                  for name, entry in description["layers"].items()}
        complete = (description["format"] == FORMAT and isinstance(version, int) and layers
                    and isinstance(description["config"], dict)
                    and all(isinstance(name, str) for name in description["trained_base_parameters"])
                    and isinstance(description["base_model_name_or_path"], str | None)
                    and all(isinstance(other, str) for others in description.get("tied", {}).values() for other in others))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no adapter of abba_ext: its metadata lacks or garbles {error}") from None
    if not complete:
        raise ValueError(f"{path} is no adapter of abba_ext: its metadata is incomplete")
    if version > FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}; this abba_ext reads up to {FORMAT_VERSION}: update abba_ext")
    if metadata.get(CHECKSUM) != _checksum(metadata[FORMAT], state):
        raise ValueError(f"{path} is damaged: its contents do not have the checksum that was saved with them")
    return description, state


def _checksum(text: str, state: dict[str, Tensor]) -> str:
    """SHA-256 of the description and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tied_parameters(model: nn.Module) -> dict[str, list[str]]:
    """The other names of every parameter that has several, by each of its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in named_parameters(model, remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: [other for other in found if other != name] for found in names.values() for name in found if len(found) > 1}


def tie_problem(name: str, trained_as: list[str] | None, tied: list[str]) -> str | None:
    """Why a parameter that was trained in full cannot be put where another set of names is one tensor with it, or None.

    Args:
        name: The parameter.
        trained_as: The other names of the tensor that was trained; None if the file does not tell.
        tied: Its other names where it is put.
    """
    if trained_as is None or set(trained_as) == set(tied):
        return None
    if set(tied) - set(trained_as):
        return (f"{name!r} was trained as a tensor of its own, but the model ties it to {', '.join(tied)}, which it would change "
                "too; untie them first, or merge the adapter in PEFT (merge_and_unload)")
    return (f"{name!r} was trained for {', '.join(trained_as)} too, which the model does not tie to it; use the model that it was "
            "trained on")


def _check_state(model: nn.Module, layers: dict[str, dict], trained: list[str], state: dict[str, Tensor],
                 ties: dict[str, list[str]]) -> None:
    """Everything that could fail, before anything changes."""
    modules = {name: find_layer(model, name) for name in layers}
    patched = set(abba_layers(model))
    _check_whole(model)
    problems = []
    if patched and not hasattr(model, _STATE):
        raise ValueError("model holds ABBA layers that patch_model did not put there; pass the model that was patched")
    if patched:
        problems += [f"the model adapts {name!r}, the file does not" for name in sorted(patched - set(layers))]
        problems += [f"the file adapts {name!r}, the model does not" for name in sorted(set(layers) - patched)]
        own = sorted(patch_of(model).originals)
        if sorted(trained) != own:
            problems.append(f"the file trains the base parameters {sorted(trained)}, the model {own}")
        merged = [name for name in sorted(patched & set(layers)) if modules[name].abba_merged]
        problems += [f"{name!r} is merged; unmerge it first" for name in merged]
    shapes: dict[str, tuple] = {}
    for name, entry in layers.items():
        module = modules[name]
        if module is None:
            problems.append(f"the model has no layer {name!r}")
            continue
        reason = refusal(module) if name not in patched else None
        if reason:
            problems.append(f"{name!r} {reason}")
            continue
        if weight_device(module).type == "meta":
            problems.append(f"the weight of {name!r} has no values: it is on the meta device; load the weights first")
            continue
        (n, m), r1, r2 = features(module), entry["r1"], entry["r2"]
        ranks = module.abba_ranks if name in patched else (r1, r2)
        if ranks != (r1, r2):
            problems.append(f"{name!r} has ranks {ranks} in the model, ({r1}, {r2}) in the file")
        shapes |= {f"{name}.{key}": (*stack_shape(module), *shape)
                   for key, shape in zip(FACTORS, ((r1, n), (m, r1), (r2, n), (m, r2)), strict=True)}
    parameters, tied = dict(named_parameters(model)), tied_parameters(model)
    for name in trained:
        if problem := tie_problem(name, ties.get(name), tied.get(name, [])):
            problems.append(problem)
        elif name in parameters:
            shapes[name] = tuple(full_shape(parameters[name]))
        else:
            problems.append(f"the model has no parameter {name!r}")
    if not problems:
        problems += [f"missing key {key!r}" for key in sorted(set(shapes) - set(state))]
        problems += [f"unknown key {key!r}" for key in sorted(set(state) - set(shapes))]
        problems += [f"{key!r} must be {list(shape)}, got {list(state[key].shape)}"
                     for key, shape in shapes.items() if key in state and tuple(state[key].shape) != shape]
        problems += [f"{key!r} must be floating point, got {tensor.dtype}"
                     for key, tensor in state.items() if not tensor.is_floating_point()]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ValueError("the adapter does not fit the model: " + "; ".join(problems[:5]) + more)


def _base_model_name(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _write_text(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def replace_file(path: str, write: Callable[[str], None]) -> None:
    """Writes through a temporary file in the same folder, flushed to disk before it takes the path's place."""
    handle, temporary = tempfile.mkstemp(prefix=".tmp-", suffix=os.path.basename(path), dir=os.path.dirname(path))
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
