"""Killed processes, damaged files, full disks, and long runs."""
import gc
import resource
import threading

import faults
import psutil
import pytest
import torch
from torch import nn

import abba_ext


def test_kills_and_damaged_files():
    results = faults.run(kills=200, count=1000, seed=0)
    assert sum(results["kills of save_adapter"].values()) == sum(results["kills of convert_adapter"].values()) == 200
    assert results["damaged adapters"]["refused"] > 950


def test_a_full_disk_leaves_the_old_adapter(tmp_path):
    model = faults.tiny_model(1.0)
    abba_ext.save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        model["a"].abba_B2.fill_(7.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # no file may grow beyond 4 KiB
    try:
        with pytest.raises(Exception, match="(?i)file too large|os error 27"):
            abba_ext.save_adapter(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_ten_thousand_steps_need_no_more_memory():
    torch.manual_seed(0)
    model = abba_ext.patch_model(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), abba_ext.AbbaConfig(r=8))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x = torch.randn(16, 32)
    process, sizes = psutil.Process(), []
    for step in range(10_000):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 1000 == 999:
            gc.collect()
            sizes.append(process.memory_info().rss)
    assert sizes[-1] - sizes[0] < 2 << 20, f"resident bytes after each thousand steps: {sizes}"


def test_a_thousand_merges_leave_the_base_bit_equal():
    model = abba_ext.patch_model(nn.Sequential(nn.Linear(48, 40), nn.Linear(40, 8)).bfloat16(), abba_ext.AbbaConfig(r=8))
    nn.init.normal_(model[0].abba_B2)
    weights, adapted = [layer.weight.detach().clone() for layer in model], model[0].merged_weight()
    for _ in range(1000):
        abba_ext.merge(model)
        assert torch.equal(model[0].weight, adapted)
        abba_ext.unmerge(model)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, weights, strict=True))


def test_adapters_are_swapped_while_another_thread_infers(tmp_path):
    """Every output is that of one of the adapters, for one layer: values are copied in place, layer by layer."""
    model = abba_ext.patch_model(nn.Sequential(nn.Linear(24, 16)), abba_ext.AbbaConfig(r1=1, r2=1, init="random"))
    x, outputs = torch.randn(4, 24), {}
    for value in (1.0, 2.0):
        nn.init.constant_(model[0].abba_B2, value)
        abba_ext.save_adapter(model, tmp_path / str(value))
        with torch.no_grad():
            outputs[value] = model(x)
    failures, stop = [], threading.Event()

    def infer():
        low, high = torch.minimum(*outputs.values()) - 1e-5, torch.maximum(*outputs.values()) + 1e-5
        while not stop.is_set():
            with torch.no_grad():
                y = model(x)
            if not ((low <= y) & (y <= high)).all():
                failures.append(y)

    thread = threading.Thread(target=infer)
    thread.start()
    try:
        for turn in range(200):
            abba_ext.load_adapter(model, tmp_path / str((1.0, 2.0)[turn % 2]))
    finally:
        stop.set()
        thread.join()
    assert not failures
    with torch.no_grad():
        assert torch.equal(model(x), outputs[2.0])
