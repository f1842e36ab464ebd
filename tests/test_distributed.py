"""Training in several real processes (gloo) gives the losses and the adapter of one process."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "distributed_worker.py"


def run(folder, strategy, *options, processes=2):
    """(losses, adapter tensors) of a run under torchrun."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(WORKER),
               strategy, str(folder), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        output, _ = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.terminate()  # not kill: it ends its workers
        process.wait(60)
        raise
    assert process.returncode == 0, output[-4000:]
    return json.loads((folder / "losses.json").read_text()), load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return run(tmp_path_factory.mktemp("distributed") / "single", "single", processes=1)


@pytest.mark.parametrize("strategy, options", [
    ("ddp", ()), ("ddp", ("checkpointing",)), ("ddp", ("compile",)), ("fsdp2", ()), ("fsdp2", ("checkpointing",)),
    ("fsdp2", ("compile",)), ("fsdp2_meta", ()), ("fsdp1", ()), ("fsdp1", ("checkpointing",))],
    ids=lambda value: value if isinstance(value, str) else "+".join(value))
def test_equals_one_process(single, tmp_path, strategy, options):
    if strategy == "fsdp1" and not torch.accelerator.is_available():
        pytest.skip("FSDP1 needs a GPU")
    losses, adapter = run(tmp_path / "run", strategy, *options)
    expected_losses, expected = single
    assert expected_losses[-1] < expected_losses[0]
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
    assert set(adapter) == set(expected)
    for name, value in expected.items():  # the mean over ranks is summed in another order
        torch.testing.assert_close(adapter[name], value, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")
