"""Reads adapters; a file is not trusted: no code of it is run, and what does not fit is refused by name."""
import contextlib
import dataclasses
import json
import math
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import features, is_linear, refusal
from ..checkpoint import FORMAT, WEIGHTS_NAME, read_adapter
from ..config import AbbaConfig, peft_pattern
from ..layers import FACTORS, AbbaLayer
from ..patching import find_layer
from .adapter import LOHA_FACTORS, PEFT_CONFIG_NAME, PEFT_PREFIX, Adapter, LayerFactors

READ_FORMATS = ("abba", "peft", "loha", "authors", "lycoris")
PICKLE_NAME = "adapter_model.bin"
MAX_PICKLE_BYTES = 8 * 2**30
MAX_CONFIG_BYTES = 10 * 2**20
_LEAVES = {  # the names of A1, B1, A2, B2
    "peft": FACTORS,
    "loha": LOHA_FACTORS,
    "authors": ("lora_A1", "lora_B1", "lora_A2", "lora_B2"),
    "lycoris": ("lora_down1", "lora_up1", "lora_down2", "lora_up2"),
}
_PLAIN_LORA = re.compile(r"\.lora_(A|B|up|down)(\.|$)")
_FromPeft = tuple[dict[str, LayerFactors], dict[str, Tensor], dict[str, list[str]]]  # layers, trained, tied
_EMBEDDINGS = r"embed_(tokens|in|positions)|tok_embeddings|wte|wpe|(word_|position_|token_type_)?embeddings?|shared"
_EMBEDDING = re.compile(rf"(^|\.)({_EMBEDDINGS})$")  # as models of transformers name them
_VOCABULARY = re.compile(rf"(^|\.)({_EMBEDDINGS}|lm_head|embed_out)\.weight$")
_KOHYA_PREFIX = re.compile(r"^(lycoris|lora_(unet|te\d*|transformer))_")


def read(source: str | os.PathLike, *, format: str = "auto", scaling: str | float | None = None, model: nn.Module | None = None,
         max_bytes: int = MAX_PICKLE_BYTES) -> Adapter:
    """Reads an adapter from a folder or a weights file.

    In a folder `adapter_model.safetensors` or `adapter_model.bin` is read, and `adapter_config.json` beside it; no other file
    is opened. Pickles are loaded with weights_only=True, which runs no code of theirs.

    Args:
        source: Folder, or a .safetensors or .bin file.
        format: One of READ_FORMATS; "auto" tells them apart by their keys and config.
        scaling: How s follows from α for formats that do not say: "paper", "official" or "peft" (see :class:`AbbaConfig`) for
            "lycoris"; or a number, s itself, for "lycoris" and "authors".
        model: The base model, if it is at hand: every layer is looked up in it, so that sizes and kinds are sure; else layers
            named as embeddings usually are ("embed_tokens", "wte", ...) are taken for such. It turns flattened names of "lycoris"
            files ("lora_unet_mid_block_to_q") into module names.
        max_bytes: Largest .bin file to load.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: model is of another type.
        ValueError: The format is not known, ambiguous or a plain LoRA; the file is damaged or too large; keys are missing or
            unknown; factors do not fit each other, or the model; s is not said. The message names the file.
    """
    if format not in ("auto", *READ_FORMATS):
        raise ValueError(f"format must be 'auto' or one of {', '.join(map(repr, READ_FORMATS))}, got {format!r}")
    if not isinstance(model, nn.Module | None):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    weights = _weights_file(os.fspath(source))
    if format == "auto" and weights.endswith(".safetensors") and FORMAT in _safetensors_metadata(weights):
        format = "abba"
    if format == "abba":
        description, state = _read_own(weights)
    else:
        state = _load_pickle(weights, max_bytes) if weights.endswith(".bin") else _load_safetensors(weights)
        config = _load_config(os.path.join(os.path.dirname(weights), PEFT_CONFIG_NAME))
    try:
        if format != "abba" and any(_PLAIN_LORA.search(key) for key in state):
            raise ValueError("a plain LoRA is no ABBA adapter; PEFT loads it")
        if format == "auto":
            format = _detect(state, config)
        if scaling is not None and format not in ("authors", "lycoris"):
            raise ValueError(f"scaling must be left out for format {format!r}, whose files say what s is, got {scaling!r}")
        if format == "abba":
            adapter = _from_own(description, state)
            return adapter if model is None else dataclasses.replace(adapter, layers=_looked_up(adapter.layers, model))
        trained, tied = {}, {}
        if format == "peft":
            layers, trained, tied = _from_peft(state, config)
        elif format == "loha":
            layers, trained, tied = _from_loha(state, config)
        elif format == "authors":
            layers = _from_authors(state, config, scaling)
        else:
            layers = _from_lycoris(state, scaling, model)
        if model is not None:
            layers = _looked_up(layers, model)
        else:
            layers |= {name: dataclasses.replace(layer, kind="Embedding") for name, layer in layers.items()
                       if _EMBEDDING.search(name)}
        return Adapter(layers, config.get("base_model_name_or_path"), trained=trained, tied=tied, source=format,
                       task_type=config.get("task_type"))
    except (TypeError, ValueError, re.error) as error:
        raise ValueError(f"{weights}: {error}") from None


# --- files ---


def _weights_file(source: str) -> str:
    """The weights file of a folder, or the file itself."""
    if os.path.isfile(source):
        if not source.endswith((".safetensors", ".bin")):
            raise ValueError(f"{source}: a weights file must end in .safetensors or .bin")
        return source
    found = [path for name in (WEIGHTS_NAME, PICKLE_NAME) if os.path.isfile(path := os.path.join(source, name))]
    if not found:
        raise FileNotFoundError(f"no adapter in {source!r}: neither {WEIGHTS_NAME} nor {PICKLE_NAME} is there")
    if len(found) > 1:
        raise ValueError(f"{source} holds both {WEIGHTS_NAME} and {PICKLE_NAME}; pass the file that is meant")
    return found[0]


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or is no safetensors file: {error}") from None


def _safetensors_metadata(path: str) -> dict[str, str]:
    with _opened(path) as file:
        return file.metadata() or {}


def _load_safetensors(path: str) -> dict[str, Tensor]:
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def _load_pickle(path: str, max_bytes: int) -> dict[str, Tensor]:
    """The tensors of a torch.save file, through the unpickler that runs no code."""
    size = os.path.getsize(path)
    if size > max_bytes:
        raise ValueError(f"{path} has {size:,} bytes; max_bytes is {max_bytes:,}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} is damaged, no file of torch.save, or holds more than tensors; none of it was run") from error
    if not isinstance(state, dict) or not all(isinstance(key, str) and isinstance(state[key], Tensor) for key in state):
        raise ValueError(f"{path} must hold a dict of tensors by name, got {type(state).__name__}")
    for key, tensor in state.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or (
                tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()):
            raise ValueError(f"{path}: {key!r} must be an ordinary tensor with a value for each element")
    return {key: tensor.detach().clone() for key, tensor in state.items()}  # the file can go


def _load_config(path: str) -> dict[str, Any]:
    """The JSON object beside the weights; {} if there is none."""
    if not os.path.isfile(path):
        return {}
    if os.path.getsize(path) > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {os.path.getsize(path):,} bytes; a config has at most {MAX_CONFIG_BYTES:,}")
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


# --- formats ---


def _detect(state: dict[str, Tensor], config: dict[str, Any]) -> str:
    """The format by its keys and its config's peft_type."""
    owners = {leaf: name for name, leaves in _LEAVES.items() for leaf in leaves}
    seen = {owners[part] for key in state for part in key.split(".") if part in owners}
    declared = {"ABBA": "peft", "LOHA": "loha"}.get(config.get("peft_type"))
    if "loha" in seen and declared is None and not any(key.startswith(PEFT_PREFIX) for key in state):
        seen = seen - {"loha"} | {"lycoris"}
    if len(seen) != 1 or declared not in (None, *seen):
        raise ValueError(f"cannot tell the format; give format= as one of {', '.join(map(repr, READ_FORMATS))}: the keys are "
                         f"{_listed(state)}, of format {_listed(seen)}, and peft_type is {config.get('peft_type')!r}")
    return seen.pop()


def _read_own(weights: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if os.path.basename(weights) != WEIGHTS_NAME:
        raise ValueError(f"{weights}: the weights of an abba_ext adapter must be named {WEIGHTS_NAME}")
    return read_adapter(os.path.dirname(weights))


def _from_own(description: dict[str, Any], state: dict[str, Tensor]) -> Adapter:
    entries, trained = description["layers"], description["trained_base_parameters"]
    expected = {*trained, *(f"{name}.{key}" for name in entries for key in FACTORS)}
    if expected - set(state):
        raise ValueError(f"missing keys {_listed(expected - set(state))}")
    _refuse_unknown(set(state) - expected)
    layers = {}
    for name, entry in entries.items():
        factors = [state[f"{name}.{key}"] for key in FACTORS]
        layers[name] = _layer(name, factors, (entry["r1"], entry["r2"]), float(entry["scale"]), entry.get("kind", "linear"))
    return Adapter(layers, description["base_model_name_or_path"], AbbaConfig.from_dict(description["config"]),
                   {name: state[name] for name in trained}, description.get("tied", {}))


def _from_peft(state: dict[str, Tensor], config: dict[str, Any]) -> _FromPeft:
    _require(config, "alpha", "scaling")
    fields = {key: config[key] for key in ("r", "r1", "r2", "alpha", "scaling") if config.get(key) is not None}
    for key in ("rank_pattern", "alpha_pattern"):
        fields[key] = {peft_pattern(pattern): value for pattern, value in _patterns(config, key).items()}
    rules = AbbaConfig(**fields)
    found, rest = _sorted_keys(state, FACTORS)
    layers = {name: _layer(name, factors, rules.ranks(name), rules.scale(name)) for name, factors in found.items()}
    return layers, *_trained_in_full(rest, config)


def _from_loha(state: dict[str, Tensor], config: dict[str, Any]) -> _FromPeft:
    _require(config, "r", "alpha")
    found, rest = _sorted_keys(state, LOHA_FACTORS)
    layers = {}
    for name, factors in found.items():
        rank = _by_pattern(config, "rank_pattern", name, config["r"])
        alpha = _by_pattern(config, "alpha_pattern", name, config["alpha"])
        rules = AbbaConfig(r1=rank, r2=rank, alpha=alpha, scaling="peft")
        layers[name] = _layer(name, factors, rules.ranks(), rules.scale())
    return layers, *_trained_in_full(rest, config)


def _from_authors(state: dict[str, Tensor], config: dict[str, Any], scaling: str | float | None) -> dict[str, LayerFactors]:
    if isinstance(scaling, str):
        raise ValueError(f"scaling must be a number, s itself, for format 'authors', got {scaling!r}")
    if scaling is None:
        alphas = [config.get("alpha1"), config.get("alpha2")]
        if not all(isinstance(alpha, (int, float)) and alpha >= 0 for alpha in alphas):
            raise ValueError(f"s = √alpha1·√alpha2 needs two numbers in {PEFT_CONFIG_NAME}, got alpha1={alphas[0]!r}, "
                             f"alpha2={alphas[1]!r}; give s itself as scaling=")
        scaling = math.sqrt(alphas[0]) * math.sqrt(alphas[1])
    found, rest = _sorted_keys(state, _LEAVES["authors"])
    _refuse_unknown(rest)
    return {name: _layer(name, factors, None, float(scaling)) for name, factors in found.items()}


def _from_lycoris(state: dict[str, Tensor], scaling: str | float | None, model: nn.Module | None) -> dict[str, LayerFactors]:
    is_loha = any(key.endswith(LOHA_FACTORS) for key in state)
    if scaling is None and not is_loha:
        raise ValueError("the format does not say how s follows from alpha; give scaling= as 'paper' (α²/√(r1·r2)), 'official' "
                         "(α), 'peft' (α/r, r = r1 = r2) or a number, s itself")
    alphas = {key.removesuffix(".alpha"): tensor for key, tensor in state.items() if key.endswith(".alpha")}
    found, rest = _sorted_keys({key: tensor for key, tensor in state.items() if not key.endswith(".alpha")},
                               LOHA_FACTORS if is_loha else _LEAVES["lycoris"])
    _refuse_unknown([*rest, *(f"{key}.alpha" for key in alphas if key not in found)])
    names = _module_names(found, model)
    layers = {}
    for key, factors in found.items():
        layer = _layer(key, factors, None, 1.0)
        alpha = alphas.get(key)
        if alpha is None and isinstance(scaling, (int, float)):
            alpha = torch.ones(())  # s does not follow from it
        if alpha is None or alpha.numel() != 1:
            raise ValueError(f"layer {key!r} must have an alpha of one number, got {alpha}")
        r1, r2 = layer.ranks
        rules = AbbaConfig(r1=r1, r2=r2, alpha=alpha.item(), scaling="peft" if scaling is None else scaling)
        layers[names[key]] = dataclasses.replace(layer, scale=rules.scale())
    return layers


def _sorted_keys(state: dict[str, Tensor], leaves: tuple[str, ...]) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """(A1, B1, A2, B2) by module, and the tensors that are none of them."""
    pattern = re.compile(rf"(?:{re.escape(PEFT_PREFIX)})?(.+)\.({'|'.join(leaves)})(?:\.(?!weight$)[^.]+)?(?:\.weight)?")
    found: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, tensor in state.items():
        match = pattern.fullmatch(key)
        if match is None:
            rest[key] = tensor
        elif match[2] in found.setdefault(match[1], {}):
            raise ValueError(f"layer {match[1]!r} has two {match[2]}, the second as {key!r}")
        else:
            found[match[1]][match[2]] = tensor
    tucker = [key for key in rest if key.endswith((".hada_t1", ".hada_t2"))]
    if tucker:
        raise ValueError(f"{tucker[0]!r}: Tucker-decomposed LoHa of convolutions is no product of two matrices")
    if not found:
        raise ValueError(f"there is no layer with keys {', '.join(leaves)}, but {_listed(state)}")
    for module, factors in found.items():
        missing = [leaf for leaf in leaves if leaf not in factors]
        if missing:
            raise ValueError(f"layer {module!r} lacks {', '.join(missing)}")
    return {module: [factors[leaf] for leaf in leaves] for module, factors in found.items()}, rest


def _layer(name: str, factors: list[Tensor], ranks: tuple[int, int] | None, scale: float, kind: str = "linear") -> LayerFactors:
    if all(factor.dim() == 3 for factor in factors):
        raise ValueError(f"layer {name!r} adapts stacked experts, a parameter of several matrices, which cannot be converted, "
                         "inspected or merged on disk; load the adapter into the model, merge it there (merge_and_unload) and "
                         "save the model")
    try:
        layer = LayerFactors(*factors, scale, kind)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from None
    if ranks not in (None, layer.ranks):
        raise ValueError(f"layer {name!r} has factors of ranks {layer.ranks}, and {ranks} by its config")
    return layer


def _trained_in_full(rest: dict[str, Tensor], config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """The tensors beside the factors in a PEFT folder, by parameter name: biases and modules_to_save; and that the latter were
    trained as copies, tied to nothing."""
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list):
        raise ValueError(f"modules_to_save must be a list, got {saved!r}")
    trained, tied, unknown = {}, {}, []
    for key, tensor in rest.items():
        name = key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        is_bias = name.endswith(".bias") and config.get("bias", "none") != "none"
        is_copy = any(f".{module}." in f".{name}" for module in saved)
        if not tensor.is_floating_point() or not (is_bias or is_copy):
            unknown.append(key)
            continue
        trained[name] = tensor
        if is_copy:
            tied[name] = []
    embeddings = [key for key in unknown if ".base_layer." in key or _VOCABULARY.search(key)]
    if embeddings:
        raise ValueError(f"{_listed(embeddings)}: PEFT saved embedding layers of the base too, as they are adapted or were "
                         "resized; if they are those of the base, save the adapter with save_embedding_layers=False, else merge "
                         "it in PEFT (merge_and_unload)")
    _refuse_unknown(unknown)
    return trained, tied


def _module_names(keys: Iterable[str], model: nn.Module | None) -> dict[str, str]:
    """Module names of LyCORIS's layers: dotted names are the model's, flattened ones are looked up in it."""
    flattened: dict[str, list[str]] = {}
    for name, module in model.named_modules() if model is not None else ():
        if any(True for _ in module.parameters(recurse=False)):
            flattened.setdefault(name.replace(".", "_"), []).append(name)
    names: dict[str, str] = {}
    for key in keys:
        if "." in key or "_" not in key:
            names[key] = key
            continue
        if model is None:
            raise ValueError(f"{key!r} is a flattened name, of which only the model knows the dots; give model= (--base)")
        fitting = flattened.get(_KOHYA_PREFIX.sub("", key), [])
        if len(fitting) != 1 or fitting[0] in names.values():
            raise ValueError(f"{key!r} must stand for one layer of the model, it fits {_listed(fitting)}")
        names[key] = fitting[0]
    return names


def _looked_up(layers: dict[str, LayerFactors], model: nn.Module) -> dict[str, LayerFactors]:
    """The layers with the kinds that they have in the model."""
    found, problems = {}, []
    for name, layer in layers.items():
        try:
            module = fitting_layer(model, name, layer)
        except ValueError as error:
            problems.append(str(error))
        else:
            found[name] = dataclasses.replace(layer, kind="linear" if is_linear(module) else type(module).__name__)
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ValueError("the adapter does not fit the model: " + "; ".join(problems[:5]) + more)
    return found


def fitting_layer(model: nn.Module, name: str, factors: LayerFactors) -> nn.Module:
    """The layer of a model that an update is for.

    Raises:
        ValueError: The model has no such layer or it cannot be adapted, or has another size.
    """
    module = find_layer(model, name)
    if module is None:
        raise ValueError(f"the model has no layer {name!r}")
    reason = None if isinstance(module, AbbaLayer) else refusal(module)
    if reason:
        raise ValueError(f"{name!r} {reason}")
    n, m = features(module)
    if (factors.b1.size(0), factors.a1.size(1)) != (m, n):
        raise ValueError(f"{name!r} has a weight [{m}, {n}], but factors of a weight [{factors.b1.size(0)}, "
                         f"{factors.a1.size(1)}]")
    return module


def _patterns(config: dict[str, Any], key: str) -> dict[str, Any]:
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{key} must be a JSON object, got {patterns!r}")
    return patterns


def _by_pattern(config: dict[str, Any], key: str, name: str, default):
    """The value of the first pattern that fits the name."""
    fitting = (value for pattern, value in _patterns(config, key).items() if re.fullmatch(peft_pattern(pattern), name))
    return next(fitting, default)


def _require(config: dict[str, Any], *keys: str) -> None:
    missing = [key for key in keys if config.get(key) is None]
    if missing:
        raise ValueError(f"{PEFT_CONFIG_NAME} lacks {', '.join(missing)}")


def _refuse_unknown(keys: Iterable[str]) -> None:
    keys = list(keys)
    if keys:
        raise ValueError(f"unknown keys {_listed(keys)}")


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(map(repr, names[:5])) or "nothing") + more
