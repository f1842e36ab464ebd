"""What an adapter holds, layer by layer: ranks, scales and norms, and how far each update moves its weight."""
import math
import os
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base_checkpoint import BaseCheckpoint
from .checkpoint import replace_file
from .formats import read
from .merging import LayerUpdate, row_blocks, weight_keys

_BLOCK_INDEX = re.compile(r"(?P<before>(?:^|.*?\.))(?P<index>\d+)\.(?P<after>.+)")


def inspect_adapter(adapter: str | os.PathLike, base: str | os.PathLike | None = None) -> dict[str, Any]:
    """Sizes and Frobenius norms of an adapter, in fp64; ΔW = s·(B1 A1) ⊙ (B2 A2) is formed a block of rows at a time.

    Args:
        adapter: Folder or file in any format that :func:`abba_ext.formats.read` knows.
        base: Folder or cached hub name of the base model, whose weights are read one at a time.

    Returns:
        A JSON-compatible dict: "source", the format; "base_model"; "layers", a list of {"name", "r1", "r2", "scale",
        "parameters", "norm_A1", "norm_B1", "norm_A2", "norm_B2", "norm_update" ‖ΔW‖} and with base "norm_base" ‖W0‖ and "ratio"
        ‖ΔW‖/‖W0‖ (None where W0 = 0); "trained", a list of {"name", "parameters", "finite"} of the parameters trained in full;
        and "total" {"layers", "parameters", "norm_update"}, and with base "norm_base" and "ratio", over all adapted layers.

    Raises:
        FileNotFoundError, ValueError: See :func:`abba_ext.formats.read` and :func:`abba_ext.merging.weight_keys`; or a weight of
            the base is not finite.
    """
    checkpoint = None if base is None else BaseCheckpoint(base)
    content = read(adapter, model=checkpoint and checkpoint.model)
    layers = []
    for name, factors in content.layers.items():
        parts = {"A1": factors.a1, "B1": factors.b1, "A2": factors.a2, "B2": factors.b2}
        update = LayerUpdate(factors, transposed=False)
        blocks = row_blocks(factors.b1.size(0), 8 * factors.a1.size(1))
        layers.append({"name": name, "r1": factors.ranks[0], "r2": factors.ranks[1], "scale": factors.scale,
                       "parameters": sum(part.numel() for part in parts.values()),
                       **{f"norm_{key}": _norm([part]) for key, part in parts.items()},
                       "norm_update": _norm(update.rows(start, stop, torch.float64) for start, stop in blocks)})
    trained = [{"name": name, "parameters": value.numel(), "finite": bool(torch.isfinite(value).all())}
               for name, value in content.trained.items()]
    total = {"layers": len(layers), "parameters": sum(entry["parameters"] for entry in layers + trained),
             "norm_update": math.hypot(*(layer["norm_update"] for layer in layers))}
    if checkpoint is not None:
        for layer in layers:
            key = weight_keys(checkpoint, layer["name"], content.layers[layer["name"]])[0]
            layer["norm_base"] = _stored_norm(checkpoint, key)
            layer["ratio"] = _ratio(layer)
        total["norm_base"] = math.hypot(*(layer["norm_base"] for layer in layers))
        total["ratio"] = _ratio(total)
    return {"source": content.source, "base_model": content.base_model, "layers": layers, "trained": trained, "total": total}


def plot_adapter(report: dict[str, Any], path: str | os.PathLike) -> None:
    """Draws ‖ΔW‖/‖W0‖ of every layer (‖ΔW‖ if the report has no base): blocks against kinds of layers, or bars if the names have
    no block index.

    Args:
        report: What :func:`inspect_adapter` returned.
        path: The picture, in a format that its ending tells, such as .png.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib knows no such format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("drawing needs matplotlib: pip install 'abba_ext[cli]'") from None
    key, label = ("ratio", "‖ΔW‖ / ‖W0‖") if "ratio" in report["total"] else ("norm_update", "‖ΔW‖")
    values = {layer["name"]: math.nan if layer[key] is None else layer[key] for layer in report["layers"]}
    found = {name: _BLOCK_INDEX.fullmatch(name) for name in values}
    if all(found.values()):
        cells = {name: (int(match["index"]), f"{match['before']}*.{match['after']}") for name, match in found.items()}
        indices, kinds = sorted({index for index, _ in cells.values()}), list(dict.fromkeys(kind for _, kind in cells.values()))
        grid = torch.full((len(kinds), len(indices)), math.nan)
        for name, (index, kind) in cells.items():
            grid[kinds.index(kind), indices.index(index)] = values[name]
        figure = Figure(figsize=(3 + 0.3 * len(indices), 1.5 + 0.3 * len(kinds)), layout="constrained")
        axes = figure.subplots()
        figure.colorbar(axes.imshow(grid.numpy(), aspect="auto"), label=label)
        axes.set_xticks(range(len(indices)), indices)
        axes.set_yticks(range(len(kinds)), kinds)
        axes.set_xlabel("block")
    else:
        figure = Figure(figsize=(6, 1.5 + 0.25 * len(values)), layout="constrained")
        axes = figure.subplots()
        axes.barh(list(values), list(values.values()))
        axes.invert_yaxis()
        axes.set_xlabel(label)
    replace_file(os.path.abspath(path), figure.savefig)


def _stored_norm(checkpoint: BaseCheckpoint, key: str) -> float:
    from safetensors import safe_open

    with safe_open(checkpoint.folder / checkpoint.tensors[key].shard, framework="pt") as file:
        weight = file.get_tensor(key).flatten(1)
    norm = _norm(weight[start:stop] for start, stop in row_blocks(weight.size(0), 8 * weight.size(1)))
    if not math.isfinite(norm):
        raise ValueError(f"{checkpoint.folder}: {key!r} holds NaN or infinity")
    return norm


def _norm(parts: Iterable[Tensor]) -> float:
    return math.hypot(*(part.double().norm().item() for part in parts))


def _ratio(entry: dict[str, float]) -> float | None:
    return entry["norm_update"] / entry["norm_base"] if entry["norm_base"] else None
