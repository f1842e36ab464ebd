"""Writes adapters, each into a new folder that appears whole or not at all."""
import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as zero_pad

from ..checkpoint import FORMAT, FORMAT_VERSION, WEIGHTS_NAME, replace_file, write_adapter
from ..config import DTYPES, check_choice
from ..layers import FACTORS
from ..reference import khatri_rao, truncated_product
from .adapter import LOHA_FACTORS, PEFT_CONFIG_NAME, PEFT_PREFIX, Adapter, LayerFactors, as_pattern, config_of

WRITE_FORMATS = ("abba", "peft", "loha", "lora")
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as max_lora_rank


def write(adapter: Adapter, directory: str | os.PathLike, format: str = "abba", *, rank: int | None = None,
          dtype: str | torch.dtype | None = None, pad: bool = True, task_type: str | None = None,
          fan_in_fan_out: bool = False) -> dict[str, Any]:
    """Writes an adapter into a new folder, which appears whole or not at all.

    A LoRA is exact by Theorem 1: lora_A = A* [R, n] and lora_B = s·B* [m, R] with R = r1·r2 and lora_alpha = R, each row of
    A* and column of B* brought to equal norm. LoHa pads the smaller of r1 and r2 with zeros.

    Args:
        adapter: What to write.
        directory: A folder that does not exist or is empty; nothing is overwritten.
        format: One of WRITE_FORMATS.
        rank: For "lora": the best approximation of ΔW of that rank, for layers with a higher R.
        dtype: Of the factors. Default: float32 for "lora", else what they are.
        pad: For "lora": zero-pad the rank, one for all layers, to the next that vLLM takes; False: to the largest R.
        task_type: PEFT's, such as "CAUSAL_LM". Default: the adapter's.
        fan_in_fan_out: For "lora": PEFT's flag for transformers' Conv1D layers, as in GPT-2; PEFT sets it itself if need be.

    Returns:
        {"format": ..., "layers": {name: ...}}; for "lora" "rank", and for every layer "rank", before padding, and
        "relative_error" ‖ΔW − ΔW_k‖_F/‖ΔW‖_F of truncating it, from the singular values.

    Raises:
        FileExistsError: The directory is a file or is not empty.
        TypeError: adapter is of another type.
        ValueError: An option does not apply; R is above 512 and has to be padded; a dtype cannot hold the values; the format
            cannot hold what was trained besides the factors.
        ImportError: "lora" and "loha" need PEFT.
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter must be an Adapter, got {type(adapter).__name__}")
    check_choice("format", format, WRITE_FORMATS)
    if format != "lora" and (rank is not None or not pad or fan_in_fan_out):
        raise ValueError(f"rank, pad and fan_in_fan_out are options of format 'lora', got format {format!r}")
    if format == "abba" and task_type is not None:
        raise ValueError("task_type is an option of PEFT's formats, got format 'abba'")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a positive int, got {rank!r}")
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        dtype = getattr(torch, name)
    task_type = task_type or adapter.task_type
    with _new_folder(os.fspath(directory)) as folder:
        if format == "abba":
            report = _write_own(adapter, folder, dtype)
        elif format == "peft":
            report = _write_peft(adapter, folder, dtype, task_type)
        elif format == "loha":
            report = _write_loha(adapter, folder, dtype, task_type)
        else:
            report = _write_lora(adapter, folder, rank, dtype or torch.float32, pad, task_type, fan_in_fan_out)
    return {"format": format, **report}


@contextlib.contextmanager
def _new_folder(directory: str) -> Iterator[str]:
    """A temporary sibling that takes the directory's place when all is written, and vanishes on an error."""
    directory = os.path.abspath(directory)
    if os.path.lexists(directory) and (os.path.islink(directory) or not os.path.isdir(directory) or os.listdir(directory)):
        raise FileExistsError(f"directory must be new or an empty folder, but {directory!r} is there; choose another")
    os.makedirs(os.path.dirname(directory), exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=os.path.dirname(directory)) as temporary:
        folder = os.path.join(temporary, "adapter")
        os.mkdir(folder)
        yield folder
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(directory)
        os.rename(folder, directory)


def _write_own(adapter: Adapter, folder: str, dtype: torch.dtype | None) -> dict[str, Any]:
    state, entries = {}, {}
    for name, layer in adapter.layers.items():
        for key, factor in zip(FACTORS, (layer.a1, layer.b1, layer.a2, layer.b2), strict=True):
            state[f"{name}.{key}"] = _cast(factor, dtype, name)
        entries[name] = {"r1": layer.ranks[0], "r2": layer.ranks[1], "scale": layer.scale}
        if layer.kind != "linear":
            entries[name]["kind"] = layer.kind
    state |= {name: tensor.contiguous() for name, tensor in adapter.trained.items()}
    write_adapter(folder, state, {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": adapter.base_model,
        "config": adapter.config.to_dict(),
        "layers": entries,
        "trained_base_parameters": list(adapter.trained),
        "tied": adapter.tied,
    })
    return {"layers": entries}


def _write_peft(adapter: Adapter, folder: str, dtype: torch.dtype | None, task_type: str | None) -> dict[str, Any]:
    rules = config_of(adapter.layers).to_dict()
    state = {f"{PEFT_PREFIX}{name}.{key}.weight": _cast(factor, dtype, name) for name, layer in adapter.layers.items()
             for key, factor in zip(FACTORS, (layer.a1, layer.b1, layer.a2, layer.b2), strict=True)}
    config = {"peft_type": "ABBA", "task_type": task_type, "base_model_name_or_path": adapter.base_model, "inference_mode": True,
              "modules_to_save": _save_heads(adapter, state)}
    config |= {key: rules[key] for key in ("r1", "r2", "alpha", "scaling", "rank_pattern", "alpha_pattern", "target_modules")}

    def write_config(path):
        with open(path, "w", encoding="utf-8") as file:
            json.dump(config, file, indent=2)

    replace_file(os.path.join(folder, PEFT_CONFIG_NAME), write_config)
    _save(state, folder)
    return {"layers": {name: {"r1": layer.ranks[0], "r2": layer.ranks[1], "scale": layer.scale}
                       for name, layer in adapter.layers.items()}}


def _write_loha(adapter: Adapter, folder: str, dtype: torch.dtype | None, task_type: str | None) -> dict[str, Any]:
    peft = _import_peft("loha")
    _check_linear(adapter, "loha")
    state, ranks, alphas = {}, {}, {}
    for name, layer in adapter.layers.items():
        rank = max(layer.ranks)
        factors = (*_padded(layer.a1, layer.b1, rank), *_padded(layer.a2, layer.b2, rank))
        state |= {f"{PEFT_PREFIX}{name}.{key}": _cast(factor, dtype, name)
                  for key, factor in zip(LOHA_FACTORS, factors, strict=True)}
        ranks[name], alphas[name] = rank, layer.scale * rank
    (r, rank_pattern), (alpha, alpha_pattern) = as_pattern(ranks), as_pattern(alphas)
    peft.LoHaConfig(r=r, alpha=alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern, target_modules=list(adapter.layers),
                    modules_to_save=_save_heads(adapter, state), task_type=task_type, inference_mode=True,
                    base_model_name_or_path=adapter.base_model).save_pretrained(folder)
    _save(state, folder)
    return {"layers": {name: {"rank": ranks[name], "alpha": alphas[name]} for name in adapter.layers}}


def _write_lora(adapter: Adapter, folder: str, rank: int | None, dtype: torch.dtype, pad: bool, task_type: str | None,
                fan_in_fan_out: bool) -> dict[str, Any]:
    peft = _import_peft("lora")
    _check_linear(adapter, "lora")
    full = {name: math.prod(layer.ranks) for name, layer in adapter.layers.items()}
    kept = {name: min(value, rank or value) for name, value in full.items()}
    largest = max(kept, key=kept.get)
    if pad and kept[largest] > LORA_RANKS[-1]:
        raise ValueError(f"layer {largest!r} needs a LoRA of rank {kept[largest]} (R = r1·r2 = {full[largest]}); servers take at "
                         f"most {LORA_RANKS[-1]}. Truncate with rank={LORA_RANKS[-1]} or less (the report tells the error), keep "
                         "the rank for PEFT alone with pad=False, or merge the adapter into the weights: abba-ext merge")
    width = next(allowed for allowed in LORA_RANKS if allowed >= kept[largest]) if pad else kept[largest]
    state, report = {}, {}
    for name, layer in adapter.layers.items():
        a, b, error = lora_factors(layer, kept[name])
        report[name] = {"rank": a.size(0), "relative_error": error}
        for key, factor in zip(("lora_A", "lora_B"), _padded(a, b, width), strict=True):
            state[f"{PEFT_PREFIX}{name}.{key}.weight"] = _cast(factor, dtype, name)
    peft.LoraConfig(r=width, lora_alpha=width, target_modules=list(adapter.layers), modules_to_save=_save_heads(adapter, state),
                    fan_in_fan_out=fan_in_fan_out, task_type=task_type, inference_mode=True,
                    base_model_name_or_path=adapter.base_model).save_pretrained(folder)
    _save(state, folder)
    return {"rank": width, "layers": report}


def lora_factors(layer: LayerFactors, rank: int | None = None) -> tuple[Tensor, Tensor, float]:
    """The layer as a LoRA, ΔW = B A: by Theorem 1 A = A* and B = s·B*, or the best approximation of a lower rank.

    No m×n matrix is formed.

    Args:
        layer: Factors of ranks r1 and r2; R = r1·r2.
        rank: k; None or at least R: no truncation.

    Returns:
        A [k, n] and B [m, k] in fp64, each row of A and column of B of equal norm; and ‖ΔW − B A‖_F/‖ΔW‖_F.
    """
    a = khatri_rao(layer.a1.double(), layer.a2.double())
    b = layer.scale * khatri_rao(layer.b1.double().t(), layer.b2.double().t()).t()
    if rank is None or rank >= a.size(0):
        norm_a, norm_b = a.norm(dim=1), b.norm(dim=0)
        ratio = torch.where((norm_a > 0) & (norm_b > 0), (norm_b / norm_a).sqrt(), 1.0)
        return a * ratio[:, None], b / ratio, 0.0
    b, a, error = truncated_product(b, a, rank)
    return a, b, error


def _save_heads(adapter: Adapter, state: dict[str, Tensor]) -> list[str] | None:
    """Adds modules trained in full to a PEFT state dict and returns their names. PEFT copies them, so each of those that are tied
    gets the tensor."""
    trained = {alias: tensor for name, tensor in adapter.trained.items() for alias in [name, *adapter.tied.get(name, ())]}
    modules: dict[str, set[str]] = {}
    for parameter in trained:
        module, _, key = parameter.rpartition(".")
        modules.setdefault(module, set()).add(key)
    for module, keys in modules.items():
        if not module or "weight" not in keys or keys - {"weight", "bias"}:
            raise ValueError(f"{module + '.' + min(keys)!r} is trained in full without its whole module, which this format "
                             "cannot hold; merge the adapter into the weights: abba-ext merge")
    state.update({PEFT_PREFIX + name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in trained.items()})
    return list(modules) or None


def _padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, n] and B [m, r] with zeros up to the rank."""
    missing = rank - a.size(0)
    return zero_pad(a, (0, 0, 0, missing)), zero_pad(b, (0, missing))


def _cast(tensor: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    result = tensor.to(dtype or tensor.dtype, copy=True, memory_format=torch.contiguous_format)
    if not torch.isfinite(result).all():
        raise ValueError(f"layer {name!r} has values up to {tensor.abs().max().item():.3g}, which {result.dtype} cannot hold; "
                         "choose another dtype")
    return result


def _check_linear(adapter: Adapter, format: str) -> None:
    for name, layer in adapter.layers.items():
        if layer.kind != "linear":
            raise ValueError(f"layer {name!r} is of kind {layer.kind!r}; {format!r} is written of linear layers alone "
                             "(where its name alone says what it is, model= or --base looks it up)")


def _save(state: dict[str, Tensor], folder: str) -> None:
    from safetensors.torch import save_file

    replace_file(os.path.join(folder, WEIGHTS_NAME), lambda path: save_file(state, path, metadata={"format": "pt"}))


def _import_peft(format: str):
    try:
        import peft
    except ImportError:
        raise ImportError(f"writing {format!r} needs PEFT: pip install 'abba_ext[peft]'") from None
    return peft
