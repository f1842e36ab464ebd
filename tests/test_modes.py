"""PyTorch's ways of running a layer: compiled, mixed precision, deterministic, offloaded, transformed, exported, forked."""
import copy
import functools
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import assert_close_to_truth, dense_linear
from threads import num_threads
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.data import DataLoader

import abba_ext
from abba_ext import AbbaConfig
from abba_ext.config import PLANS
from abba_ext.layers import FACTORS


def make(dtype=torch.float32, **config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 16)).to(dtype)
    abba_ext.patch_model(model, AbbaConfig(r1=3, r2=4, alpha=1.0, **config))
    for layer in abba_ext.abba_layers(model).values():
        nn.init.normal_(layer.abba_B2, std=0.1)
    return model


def gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(actual, expected, **tolerance):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda text: f"{name}: {text}", **tolerance)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def counting_backend(graphs):
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.mark.parametrize("plan, most", [("khatri_rao", 1), ("auto", 3)])  # auto: each of two layers has a plan for many tokens
def test_compiled_with_dynamic_shapes(plan, most):
    model, graphs = make(plan=plan), []
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counting_backend(graphs))
    for tokens in (2, 5, 9, 64, 33):
        x = torch.randn(tokens, 24)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(graphs) <= most


def test_switching_adapters_recompiles_at_most_once(tmp_path):
    model, graphs = make(), []
    x, outputs = torch.randn(4, 24), {}
    for turn in range(4):
        for layer in abba_ext.abba_layers(model).values():
            nn.init.normal_(layer.abba_B2, std=0.1 + turn)
        abba_ext.save_adapter(model, tmp_path / str(turn))
        outputs[turn] = model(x).detach()
    compiled = torch.compile(model, fullgraph=True, backend=counting_backend(graphs))
    for turn in (0, 1, 2, 3, 1, 0):
        abba_ext.load_adapter(model, tmp_path / str(turn))
        torch.testing.assert_close(compiled(x).detach(), outputs[turn])
    assert len(graphs) <= 2


def test_compiled_training_step_equals_eager():
    model, x = make(), torch.randn(7, 24)
    expected = gradients(model, x)
    assert_same(gradients(torch.compile(model, fullgraph=True), x), {f"_orig_mod.{name}": g for name, g in expected.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_gradient_scaler(dtype):
    model, x = make(), torch.randn(64, 24)
    expected = gradients(model, x)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        loss = model(x).square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32
            error = (parameter.grad - expected[name]).norm() / expected[name].norm()
            assert error < (0.05 if dtype == torch.bfloat16 else 0.01), f"{name}: {error}"
    before = model[0].abba_B2.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(model[0].abba_B2, before)


def test_a_step_with_infinite_gradients_is_skipped_and_nothing_is_corrupted(tmp_path):
    model = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 24)
    x[1, 2] = float("inf")
    scaler.scale(model(x).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1.0 and all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    abba_ext.save_adapter(model, tmp_path)
    assert all(torch.isfinite(value).all() for value in abba_ext.checkpoint.read_adapter(tmp_path)[1].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_algorithms(dtype):
    model, x = make(dtype), torch.randn(65, 24, dtype=dtype)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [gradients(model, x) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(run[name], grad) for name, grad in runs[0].items())


def test_saved_tensors_can_be_packed_and_offloaded():
    model, x = make(), torch.randn(9, 24)
    expected = gradients(model, x)
    packed = []

    def pack(tensor):
        packed.append(tensor.numel())
        return tensor.numpy(force=True).copy()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        assert_same(gradients(model, x), expected)
    assert packed
    with torch.autograd.graph.save_on_cpu():
        assert_same(gradients(model, x), expected)


@pytest.mark.parametrize("saved", ["linear", "addmm", "bmm", "all but clone", "all but add_expanded"])
@pytest.mark.parametrize("layer", ["khatri_rao", "mixed", "dense", "dropout", "parameter"])
def test_selective_checkpointing(layer, saved):
    """Whatever a policy keeps and whatever is computed again."""
    config = {"dropout": {"dropout": 0.5}, **{plan: {"plan": plan} for plan in PLANS}}
    model, x = make(**config.get(layer, {})), torch.randn(9, 24)
    if layer == "parameter":
        model = abba_ext.patch_model(nn.Sequential(nn.Bilinear(24, 24, 16)),
                                     AbbaConfig(r=4, target_modules=[], target_parameters=["0.weight"]))
        for factor in abba_ext.adapter_state_dict(model).values():
            nn.init.normal_(factor)

    def run(x):
        torch.manual_seed(1)
        return (model[0](x, x) if layer == "parameter" else model(x)).sin()

    def policy(context, op, *args, **kwargs):
        seen.add(op.name())
        names = {"linear", "addmm", "bmm", "mm", "mul", "add_expanded", "sin", "gelu"} - {saved[8:]} if "all" in saved else {saved}
        kept = op.name().partition("::")[2].partition(".")[0] in names
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def gradients_of(function):
        model.zero_grad()
        function(x).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected, seen = gradients_of(run), set()
    context_fn = functools.partial(create_selective_checkpoint_contexts, policy)
    assert_same(gradients_of(lambda x: checkpoint(run, x, use_reentrant=False, context_fn=context_fn)), expected)
    if layer == "khatri_rao":
        assert "aten::addmm" in seen  # which policies name


def test_functional_gradients_and_vmap():
    model, x = make(), torch.randn(5, 24)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    for transform in (lambda: torch.func.grad(loss)(parameters, x),
                      lambda: torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[:, None])):
        with pytest.raises(RuntimeError, match="(?i)functorch|vmap|setup_context"):
            transform()


def test_merged_model_is_exported():
    model, x = make(), torch.randn(5, 24)
    merged = abba_ext.merge_and_unload(copy.deepcopy(model)).eval()
    tokens = {0: torch.export.Dim("tokens", min=2, max=512)}
    for source in (merged, model.eval()):
        program = torch.export.export(source, (x,), dynamic_shapes=(tokens,))
        other = torch.randn(17, 24)
        torch.testing.assert_close(program.module()(other), model(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_counts(threads):
    model, x = make(), torch.randn(300, 24)
    with num_threads(threads):
        y = model[0](x)
    layer = model[0]
    truth = dense_linear(x, layer.weight.detach(), layer.bias.detach(), *(getattr(layer, name).detach() for name in FACTORS),
                         layer.abba_scale)
    assert_close_to_truth(y, truth, 1e-6)


class Adapted(torch.utils.data.Dataset):
    """A data set whose items come out of an adapted model, as with features computed in the workers."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 8

    def __getitem__(self, index):
        with torch.no_grad():
            return self.model(torch.full((3, 24), float(index)))


def test_forked_workers():
    model = make()
    with torch.no_grad():
        expected = [model(torch.full((3, 24), float(index))) for index in range(8)]
    loader = DataLoader(Adapted(model), batch_size=None, num_workers=2, multiprocessing_context=multiprocessing.get_context("fork"),
                        timeout=60)
    for actual, value in zip(loader, expected, strict=True):
        torch.testing.assert_close(actual, value)


class Patient(nn.Module):
    """Reads its parameter when it is told to."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x, started, read):
        started.set()
        assert read.wait(60)
        return x @ self.weight.t()


@pytest.mark.parametrize("through_peft", [False, True])
def test_threads_share_an_adapted_parameter(through_peft):
    """One that has ended takes nothing from one that still runs."""
    x, model = torch.randn(3, 4), nn.Sequential(Patient())
    if through_peft:
        peft, abba_peft = pytest.importorskip("peft"), pytest.importorskip("abba_ext.peft")
        config = abba_peft.AbbaPeftConfig(r=4, init_weights=False, target_parameters=["0.weight"])
        layer = peft.get_peft_model(model, config).base_model.model[0]
    else:
        layer = abba_ext.patch_model(model, AbbaConfig(r=4, target_modules=[], target_parameters=["0.weight"]))[0]
        nn.init.normal_(layer.abba_weight.abba_B2)
    base = x @ layer.get_parameter("base_layer.weight" if through_peft else "weight").t()
    started, read, done = threading.Event(), threading.Event(), threading.Event()
    done.set()
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        slow = pool.submit(torch.no_grad()(layer), x, started, read)
        assert started.wait(60)
        expected = layer(x, threading.Event(), done)
        read.set()
        assert torch.equal(slow.result(60), expected) and not torch.allclose(expected, base)
