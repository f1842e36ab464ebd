"""Trains a tiny model in several processes, once for every scenario, and writes losses and adapter of each.

    torchrun --nproc-per-node 2 tests/distributed_worker.py OUT SCENARIO ...

A scenario is a strategy and options, as in fsdp2+checkpointing. OUT/base holds the base model.
"""
import functools
import json
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import abba_ext
from abba_ext.sharding import copy_full, full_shape

STEPS, BATCH = 4, 4


def build(device: str = "cpu") -> nn.Module:
    """Weights large enough that all factors move by far more than rounding in a few steps."""
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, initializer_range=0.3,
                         attention_bias=True, mlp_bias=True)
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).train()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def patch(model: nn.Module) -> nn.Module:
    return abba_ext.patch_model(model, abba_ext.AbbaConfig(r1=3, r2=4, alpha=5.0, bias="abba_only"))


def shard(model: nn.Module, mesh) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def parallelize(model: nn.Module, mesh) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    column, row = ColwiseParallel(), RowwiseParallel()
    plan = {"self_attn.q_proj": column, "self_attn.k_proj": column, "self_attn.v_proj": column, "self_attn.o_proj": row,
            "mlp.gate_proj": column, "mlp.up_proj": column, "mlp.down_proj": row}
    for block in model.model.layers:
        parallelize_module(block, mesh, plan)
    return model


def mesh_of(*sizes: int):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=("data", "tensor")[-len(sizes):])


class Run:
    """One scenario: `model` is called, `patched` is what patch_model returned; `rank` of `world` shares of the batch."""

    def __init__(self, strategy: str, options: list[str], base: Path):
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.options, self.base = options, base
        self.accelerator = None
        self.model = getattr(self, strategy)()
        if "checkpointing" in options:
            self.patched.gradient_checkpointing_enable({"use_reentrant": False})
        if "compile" in options:
            self.model = torch.compile(self.model, backend="aot_eager")
        if self.accelerator is None:
            self.optimizer = self.make_optimizer()

    def make_optimizer(self):
        return torch.optim.SGD([p for p in self.patched.parameters() if p.requires_grad], lr=0.2, momentum=0.9)

    def single(self):
        self.patched = patch(build())
        return self.patched

    def ddp(self):
        self.patched = patch(build())
        return nn.parallel.DistributedDataParallel(self.patched)

    def fsdp1(self):
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

        self.patched = patch(build())
        policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={type(self.patched.model.layers[0])})
        return FullyShardedDataParallel(self.patched, auto_wrap_policy=policy, use_orig_params=True,
                                        device_id=torch.device("cpu"))

    def fsdp2(self):
        self.patched = patch(build())
        return shard(self.patched, mesh_of(self.world))

    def fsdp2_meta(self):
        """Patched and sharded before there are any values."""
        self.patched = shard(patch(build("meta")), mesh_of(self.world))
        self.patched.to_empty(device="cpu")
        weights = build()
        parameters = dict(self.patched.named_parameters())
        for name, value in weights.named_parameters():
            copy_full(parameters[name], value)
        for name, buffer in weights.named_buffers():
            self.patched.get_buffer(name).copy_(buffer)
        abba_ext.initialize_adapter(self.patched)
        return self.patched

    def tensor(self):
        self.patched = parallelize(patch(build()), mesh_of(self.world))
        self.world = 1
        return self.patched

    def tensor_first(self):
        """Split before it is patched."""
        self.patched = patch(parallelize(build(), mesh_of(self.world)))
        self.world = 1
        return self.patched

    def transformers_plan(self):
        warnings.simplefilter("ignore", FutureWarning)
        self.patched = patch(LlamaForCausalLM.from_pretrained(self.base, tp_plan="auto").train())
        self.world = 1
        return self.patched

    def fsdp2_tensor(self):
        mesh = mesh_of(2, self.world // 2)
        self.patched = shard(parallelize(patch(build()), mesh["tensor"]), mesh["data"])
        self.rank, self.world = mesh["data"].get_local_rank(), 2
        return self.patched

    def accelerate(self, **options):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(**options)
        if "fsdp_plugin" in options:  # which accelerate keeps for accelerators; its code runs on a CPU too
            self.accelerator.state.distributed_type = "FSDP"
            self.accelerator.state.fsdp_plugin = options["fsdp_plugin"]
        self.patched = patch(LlamaForCausalLM.from_pretrained(self.base).train())
        model, self.optimizer = self.accelerator.prepare(self.patched, self.make_optimizer())
        return model

    def accelerate_ddp(self):
        return self.accelerate(cpu=True)

    def accelerate_fsdp2(self):
        from accelerate import FullyShardedDataParallelPlugin

        return self.accelerate(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            activation_checkpointing=True))

    def zero(self, stage: int):
        import deepspeed
        from accelerate import DeepSpeedPlugin

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled now; gloo does without
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        config = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}, "gradient_clipping": 0.0,
                  "train_micro_batch_size_per_gpu": BATCH // self.world, "gradient_accumulation_steps": 1,
                  "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        engine = self.accelerate(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
        with pytest.raises(ValueError, match="must be patched before it is given to DeepSpeed"):
            patch(engine)
        return engine

    def zero2(self):
        return self.zero(2)

    def zero3(self):
        return self.zero(3)

    def losses(self) -> list[float]:
        generator = torch.Generator().manual_seed(1)
        losses = []
        for _ in range(STEPS):
            ids = torch.randint(3, 60, (BATCH, 12), generator=generator)
            share = ids.view(self.world, BATCH // self.world, -1)[self.rank % self.world]
            loss = self.model(input_ids=share, labels=share, use_cache=False).loss
            loss.backward() if self.accelerator is None else self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            total = loss.detach().clone()
            if dist.is_initialized():
                dist.all_reduce(total)
                total /= dist.get_world_size()
            losses.append(total.item())
        if "compile" not in self.options:
            with torch.no_grad():
                self.model(input_ids=share)  # after which fully_shard keeps the last parameters gathered
        return losses


def save(patched: nn.Module, folder: Path) -> None:
    """Saves the adapter, and loads it again over zeros; every process calls it."""
    abba_ext.save_adapter(patched, folder)
    if dist.is_initialized():
        dist.barrier()
    before = {name: value.clone() for name, value in abba_ext.adapter_state_dict(patched).items()}
    for parameter in patched.parameters():
        if parameter.requires_grad:
            copy_full(parameter, torch.zeros(full_shape(parameter)))
    assert not any(value.any() for value in abba_ext.adapter_state_dict(patched).values())
    abba_ext.load_adapter(patched, folder)
    after = abba_ext.adapter_state_dict(patched)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def train(scenario: str, out: Path) -> None:
    strategy, *options = scenario.split("+")
    run = Run(strategy, options, out / "base")
    losses = run.losses()
    folder = out / scenario
    folder.mkdir(exist_ok=True)
    if strategy == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        with pytest.raises(ValueError, match="inside FullyShardedDataParallel.summon_full_params"):
            abba_ext.save_adapter(run.patched, folder / "adapter")
        with FullyShardedDataParallel.summon_full_params(run.model):
            save(run.patched, folder / "adapter")
    else:
        save(run.patched, folder / "adapter")
    if not dist.is_initialized() or dist.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps(losses))


def parallel_layer() -> None:
    """Outputs and gradients of single layers against the dense update in fp64; inputs and outputs whole or split in time."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = mesh_of(dist.get_world_size())
    for style, m, n in ((ColwiseParallel, 10, 6), (RowwiseParallel, 6, 10)):
        for layout in (Replicate(), Shard(1)):
            torch.manual_seed(0)
            layer = abba_ext.AbbaLinear(n, m, config=abba_ext.AbbaConfig(r1=3, r2=2, bias="abba_only", adapter_dtype="float64"),
                                        dtype=torch.float64)
            nn.init.normal_(layer.abba_B2)
            x = torch.randn(2, 4, n, dtype=torch.float64, requires_grad=True)
            parameters = {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}
            factors = (parameters[f"abba_{key}"] for key in ("A1", "B1", "A2", "B2"))
            dense = parameters["weight"] + abba_ext.reference.delta_weight(*factors, layer.abba_scale)
            expected = nn.functional.linear(x, dense, parameters["bias"])
            dy = torch.randn_like(expected)
            expected_grads = torch.autograd.grad(expected, (x, *parameters.values()), dy)

            parallelize_module(layer, mesh, style(input_layouts=layout, output_layouts=layout))
            part = slice(None) if layout.is_replicate() else slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
            own = x.detach()[:, part].clone().requires_grad_()
            y = layer(own)
            y.backward(dy[:, part])
            torch.testing.assert_close(y, expected[:, part])
            torch.testing.assert_close(own.grad, expected_grads[0][:, part])
            for (name, parameter), grad in zip(layer.named_parameters(), expected_grads[1:], strict=True):
                if parameter.requires_grad:
                    assert parameter.grad.placements == parameter.placements
                    torch.testing.assert_close(parameter.grad.full_tensor(), grad, msg=lambda text, name=name: f"{name}: {text}")
            torch.testing.assert_close(layer.delta_weight(), (dense - parameters["weight"]).detach())


def refusals(out: Path) -> None:
    """What cannot be right is refused by every process."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = mesh_of(dist.get_world_size())
    with pytest.raises(ValueError, match="must be patched before it is given to DistributedDataParallel"):
        patch(nn.parallel.DistributedDataParallel(build()))
    sharded = shard(build(), mesh)
    for change in (patch, lambda model: abba_ext.load_adapter(model, out / "single" / "adapter")):
        with pytest.raises(ValueError, match="must be patched before it is given to fully_shard"):
            change(sharded)
    model = parallelize(abba_ext.patch_model(build(), abba_ext.AbbaConfig(r=4, dropout=0.1)), mesh)
    ids = torch.arange(4)[None]
    with pytest.raises(ValueError, match="dropout must be 0 under tensor parallelism, got 0.1"):
        model(input_ids=ids)
    assert model.eval()(input_ids=ids).logits.isfinite().all()
    with pytest.raises(TypeError, match="cannot merge into a weight that is sharded"):
        abba_ext.merge(model)
    embedding = parallelize_module(nn.Sequential(nn.Embedding(8, 4)), mesh, {"0": ColwiseParallel()})
    with pytest.raises(ValueError, match="is a sharded Embedding"):
        abba_ext.patch_model(embedding, abba_ext.AbbaConfig(r=2, target_modules=["0"]))


def main(out: Path, scenarios: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for scenario in scenarios:
        if scenario == "parallel_layer":
            parallel_layer()
        elif scenario == "refusals":
            refusals(out)
        else:
            train(scenario, out)
    dist.destroy_process_group()
    os._exit(0)  # torch's own threads may hang or abort a process that ends by itself


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
