"""Parameters that are spread over several ranks: DTensors (fully_shard, tensor parallelism) and those of DeepSpeed's ZeRO-3."""
import sys

import torch
from torch import Tensor, nn


def is_dtensor(tensor: Tensor | None) -> bool:
    """Whether the tensor is a DTensor."""
    distributed = sys.modules.get("torch.distributed.tensor")  # without it there is none
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def is_zero3(tensor: Tensor | None) -> bool:
    """Whether the tensor is a parameter that DeepSpeed's ZeRO-3 partitions."""
    return hasattr(tensor, "ds_id")


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether the tensor is spread over ranks, so that reading or writing it whole takes all of them."""
    return is_dtensor(tensor) or is_zero3(tensor)


def check_unwrapped(model: nn.Module) -> None:
    """Refuses a model whose parameters DDP, FSDP or DeepSpeed manages: new ones would stay unseen, and the ranks drift apart.

    Raises:
        ValueError: There is such a wrapper in the model.
    """
    fsdp, deepspeed = sys.modules.get("torch.distributed.fsdp"), sys.modules.get("deepspeed")
    wrappers = {"DistributedDataParallel": nn.parallel.DistributedDataParallel}
    if fsdp is not None:
        wrappers |= {"fully_shard": fsdp.FSDPModule, "FullyShardedDataParallel": fsdp.FullyShardedDataParallel}
    if deepspeed is not None:
        wrappers["DeepSpeed"] = deepspeed.DeepSpeedEngine
    for module in model.modules():
        for name, wrapper in wrappers.items():
            if isinstance(module, wrapper):
                raise ValueError(f"model must be patched before it is given to {name}, which does not see parameters that come "
                                 "later")


def reshard(model: nn.Module) -> None:
    """Lets fully_shard put its parameters back: after a forward without a backward some are gathered copies."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def full_shape(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor."""
    return tensor.ds_shape if is_zero3(tensor) else tensor.shape


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, detached. Of a sharded one every rank must call this."""
    if is_dtensor(tensor):
        return tensor.detach().full_tensor()
    if is_zero3(tensor):
        with sys.modules["deepspeed"].zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()


@torch.no_grad()
def copy_full(parameter: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into a parameter, of which a sharded one keeps this rank's part of the first rank's value."""
    if is_dtensor(parameter):
        from torch.distributed.tensor import Replicate, distribute_tensor

        mesh = parameter.device_mesh
        whole = distribute_tensor(value.to(parameter.device, parameter.dtype), mesh, [Replicate()] * mesh.ndim)
        parameter.copy_(whole.redistribute(placements=parameter.placements))
    elif is_zero3(parameter):
        with sys.modules["deepspeed"].zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
    else:
        parameter.copy_(value)
