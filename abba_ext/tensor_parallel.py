"""Tensor parallelism: linear layers whose weight torch.distributed.tensor.parallel, or transformers' tp_plan, has split.

ΔW of a part of W0 needs the factors' parts alone, so a rank computes its part as a layer of its own:

    ColwiseParallel   W0, B1, B2 and bias split by rows; A1, A2 and x whole           → the rank's columns of y
    RowwiseParallel   W0, A1, A2 split by columns and x with them; B1, B2, bias whole → y is the sum over ranks
"""
import inspect
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .functional import abba_linear


class _Split(NamedTuple):
    """The dimension along which each tensor is split. None: every rank has it whole; of y, a summand."""

    weight: int
    a: int | None
    b: int | None
    bias: int | None
    x: int | None
    y: int | None


_COLUMNWISE = _Split(weight=0, a=None, b=0, bias=0, x=None, y=-1)
_ROWWISE = _Split(weight=1, a=1, b=None, bias=None, x=-1, y=None)


def refusal(module: nn.Module) -> str | None:
    """Why a layer with a sharded weight cannot be adapted, or None if it can."""
    base = getattr(module, "abba_base_class", type(module))
    if base.forward is not nn.Linear.forward:
        return f"is a sharded {base.__name__}; of sharded layers torch.nn.Linear alone can be adapted"
    placements = module.weight.placements
    if len(placements) != 1 or not (placements[0].is_shard(0) or placements[0].is_shard(1)):
        return f"has a weight placed as {placements}; Shard(0) (ColwiseParallel) and Shard(1) (RowwiseParallel) are supported"
    return None


def distribute(weight: Tensor, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Splits whole factors as their sharded weight needs them; the values are those of the mesh's first rank.

    Args:
        weight: W0 [m, n] of a layer for which :func:`refusal` is None.
        factors: abba_A1 [r1, n], abba_B1 [m, r1], abba_A2 [r2, n], abba_B2 [m, r2].
    """
    from torch.distributed.tensor import distribute_tensor

    split = _split_of(weight)
    return {key: distribute_tensor(factor, weight.device_mesh, [_placement(split.a if "A" in key else split.b)])
            for key, factor in factors.items()}


def forward(layer: nn.Module, x: Tensor) -> Tensor:
    """y = x W0ᵀ + bias + s·x ((B1 A1) ⊙ (B2 A2))ᵀ of an ABBA layer whose weight is sharded.

    Args:
        layer: The layer, its factors DTensors of any placement on the weight's mesh.
        x: DTensor [..., n], as the layer's parallel style hands it over.

    Returns:
        DTensor [..., m], split along its last dimension or still to be summed over ranks, as the style expects it.

    Raises:
        TypeError: The layer is one that cannot be adapted where it is sharded; x or a factor is no DTensor.
        ValueError: The layer has dropout and is in training mode.
    """
    from torch.distributed.tensor import DTensor

    if reason := refusal(layer):
        raise TypeError(f"the layer {reason}")
    tensors = {"x": x, **{key: getattr(layer, key) for key in ("abba_A1", "abba_B1", "abba_A2", "abba_B2")}}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            raise TypeError(f"{name} must be a DTensor, as the layer's weight is, got {type(tensor).__name__}")
    if layer.training and layer.abba_dropout > 0:
        raise ValueError(f"dropout must be 0 under tensor parallelism, got {layer.abba_dropout}: the ranks would drop different "
                         "elements of one input")
    split, mesh, bias = _split_of(layer.weight), layer.weight.device_mesh, layer.bias
    if bias is not None:
        bias = _local(bias, split.bias)
        if split.bias is None:
            bias = bias * (mesh.get_local_rank() == 0)  # in one of the summands
    x_part, a1, b1, a2, b2 = (_local(tensor, dim) for tensor, dim in
                              zip(tensors.values(), (split.x, split.a, split.b, split.a, split.b), strict=True))
    y = abba_linear(x_part, _local(layer.weight, split.weight), bias, a1, b1, a2, b2, layer.abba_scale,
                    recompute_u=layer.abba_recompute_u, plan=layer.abba_plan)
    shape = (*x.shape[:-1], layer.out_features)
    return DTensor.from_local(y, mesh, [_placement(split.y, summands=True)], run_check=False, shape=torch.Size(shape),
                              stride=torch.empty(shape, device="meta").stride())


def installed_style(module: nn.Module) -> tuple | None:
    """(style, mesh) where transformers' tp_plan has replaced the forward of the instance, else None."""
    function = vars(module).get("forward")
    captured = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
    style, mesh = captured.get("self"), captured.get("mesh")
    return (style, mesh) if hasattr(style, "install_forward") and mesh is not None else None


def reinstall_style(module: nn.Module) -> None:
    """Puts transformers' replacement around the forward that the class has now; does nothing where there is none."""
    if installed := installed_style(module):
        style, mesh = installed
        del module.forward
        style.install_forward(module, mesh)


def _split_of(weight: Tensor) -> _Split:
    return _COLUMNWISE if weight.placements[0].is_shard(0) else _ROWWISE


def _placement(dim: int | None, summands: bool = False):
    from torch.distributed.tensor import Partial, Replicate, Shard

    if dim is None:
        return Partial() if summands else Replicate()
    return Shard(dim)


def _local(tensor: Tensor, dim: int | None) -> Tensor:
    """This rank's part of a DTensor; of one that is whole, the rank's gradient is a summand."""
    dim = tensor.dim() - 1 if dim == -1 else dim
    return tensor.redistribute(placements=[_placement(dim)]).to_local(grad_placements=[_placement(dim, summands=True)])
