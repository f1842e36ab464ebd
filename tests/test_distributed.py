"""Training in several real processes (gloo) gives the losses and the adapter of one process."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

import abba_ext

WORKER = Path(__file__).parent / "distributed_worker.py"
SCENARIOS = {  # by number of processes; one start of torchrun runs them all
    2: ["ddp", "ddp+checkpointing", "ddp+compile", "fsdp1", "fsdp1+checkpointing", "fsdp2", "fsdp2+checkpointing",
        "fsdp2+compile", "fsdp2_meta", "tensor", "tensor+checkpointing", "tensor_first", "transformers_plan", "accelerate_ddp",
        "accelerate_fsdp2"],
    4: ["fsdp2_tensor"],
}
CHECKS = {2: ["parallel_layer", "refusals"], 4: []}  # they raise in the worker if something is wrong
DEEPSPEED = ["zero2", "zero3"]


def launch(folder, processes, scenarios, **variables):
    """Runs the scenarios under torchrun, once for all workers of pytest-xdist."""
    done = folder / f"{scenarios[0]}.done"
    with FileLock(f"{done}.lock"):
        if not done.exists():
            torchrun(folder, processes, scenarios, variables)
            done.touch()


def torchrun(folder, processes, scenarios, variables):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(WORKER),
               str(folder), *scenarios]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1",
                   "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        output, _ = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        process.terminate()  # not kill: it ends its workers
        process.wait(60)
        raise
    assert process.returncode == 0, output[-40_000:]  # what one rank died of stands before all that the others say of it


def read(folder, scenario):
    """(losses, adapter tensors) of a scenario."""
    return (json.loads((folder / scenario / "losses.json").read_text()),
            load_file(folder / scenario / "adapter" / "adapter_model.safetensors"))


@pytest.fixture(scope="module")
def folder(shared_tmp):
    """The base model, and a run in one process; one folder for all workers of pytest-xdist."""
    folder = shared_tmp / "distributed"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            distributed_worker.build().save_pretrained(folder / "base")
            distributed_worker.train("single", folder)
    return folder


@pytest.fixture(scope="module")
def launched(folder):
    for processes, scenarios in SCENARIOS.items():
        launch(folder, processes, scenarios + CHECKS[processes])


def assert_equals_one_process(folder, scenario):
    (losses, adapter), (expected_losses, expected) = read(folder, scenario), read(folder, "single")
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
    assert set(adapter) == set(expected)
    for name, value in expected.items():  # sums over ranks are taken in another order
        torch.testing.assert_close(adapter[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_training_moves_every_tensor_by_far_more_than_the_tolerance(folder):
    _, trained = read(folder, "single")
    start = abba_ext.adapter_state_dict(distributed_worker.patch(distributed_worker.build()))
    still = [name for name, value in trained.items() if (value - start[name]).abs().max() < 1e-3]
    assert trained.keys() == start.keys() and not still
    losses, _ = read(folder, "single")
    assert min(losses) < losses[0] - 0.1


@pytest.mark.parametrize("scenario", SCENARIOS[2] + SCENARIOS[4])
def test_equals_one_process(folder, launched, scenario):
    assert_equals_one_process(folder, scenario)


@pytest.fixture(scope="module")
def deepspeed_runs(folder):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    launch(folder, 2, DEEPSPEED, DS_ACCELERATOR="cpu")


@pytest.mark.parametrize("scenario", DEEPSPEED)
def test_deepspeed_equals_one_process(folder, deepspeed_runs, scenario):
    assert_equals_one_process(folder, scenario)


@pytest.mark.parametrize("scenario", ["fsdp2_tensor", "accelerate_fsdp2"])
def test_adapter_of_a_split_model_loads_into_a_whole_one(folder, launched, scenario):
    model = abba_ext.load_adapter(distributed_worker.build(), folder / scenario / "adapter")
    _, saved = read(folder, scenario)
    assert all(torch.equal(value, saved[name]) for name, value in abba_ext.adapter_state_dict(model).items())
