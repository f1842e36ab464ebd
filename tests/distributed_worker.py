"""One process of a distributed run: trains a tiny model with one strategy and writes losses and the adapter.

    torchrun --nproc-per-node 2 tests/distributed_worker.py STRATEGY OUT [option ...]
"""
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import abba_ext

STEPS, BATCH = 4, 4


def build(device: str = "cpu") -> nn.Module:
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).train()


def patch(model: nn.Module) -> nn.Module:
    return abba_ext.patch_model(model, abba_ext.AbbaConfig(r1=3, r2=4, alpha=2.0))


def shard(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def prepare(strategy: str) -> tuple[nn.Module, nn.Module]:
    """(what is called, what was patched)"""
    if strategy in ("ddp", "single"):
        model = patch(build())
        return (nn.parallel.DistributedDataParallel(model) if strategy == "ddp" else model), model
    if strategy == "fsdp2":
        model = shard(patch(build()))
        return model, model
    if strategy == "fsdp2_meta":  # patched and sharded before there are any values
        weights = build().state_dict()
        model = shard(patch(build("meta")))
        model.to_empty(device="cpu")
        parameters = dict(model.named_parameters())
        for name, value in weights.items():
            if name in parameters:
                abba_ext.patching.copy_full(parameters[name], value)
        for name, buffer in build().named_buffers():
            model.get_buffer(name).copy_(buffer)
        abba_ext.initialize_adapter(model)
        return model, model
    if strategy == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = patch(build())
        return FullyShardedDataParallel(model, use_orig_params=True), model
    raise ValueError(f"strategy {strategy!r}")


def main(strategy: str, out: Path, options: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model, patched = prepare(strategy)
    if "checkpointing" in options:
        patched.gradient_checkpointing_enable({"use_reentrant": False})
    if "compile" in options:
        model = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        ids = torch.randint(3, 60, (BATCH, 12), generator=generator)
        share = ids.view(world, BATCH // world, -1)[rank]
        loss = model(input_ids=share, labels=share, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / world)
    if strategy == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            if rank == 0:
                abba_ext.save_adapter(patched, out / "adapter")
    elif strategy.startswith("fsdp2") or rank == 0:
        abba_ext.save_adapter(patched, out / "adapter")
    if strategy.startswith("fsdp2"):  # what was saved whole loads into shards
        before = {name: value.clone() for name, value in abba_ext.adapter_state_dict(patched).items()}
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
        abba_ext.load_adapter(patched, out / "adapter")
        after = abba_ext.adapter_state_dict(patched)
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    if rank == 0:
        (out / "losses.json").write_text(json.dumps(losses))
    dist.destroy_process_group()
    os._exit(0)  # torch's own threads may hang or abort a process that ends by itself


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
