"""Faults on purpose and long runs: processes killed while they write, damaged files, thousands of steps, merges and swaps.

Each function raises AssertionError where a guarantee is broken, and returns the counts of what it did: few of everything in
test_faults.py, many in robustness.py.
"""
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import abba_ext
from abba_ext.checkpoint import WEIGHTS_NAME, read_adapter
from abba_ext.formats import WRITE_FORMATS, convert_adapter

SIZE = 128


def tiny_model(value: float = 0.0) -> nn.Module:
    """A patched model, all of whose factors hold one value."""
    model = nn.ModuleDict({name: nn.Linear(SIZE, SIZE) for name in "abcd"})
    abba_ext.patch_model(model, abba_ext.AbbaConfig(r1=8, r2=4, init="random"))
    with torch.no_grad():
        for tensor in abba_ext.adapter_state_dict(model).values():
            tensor.fill_(value)
    return model


# --- kills ---


def kill_while(work: Callable[[], None], check: Callable[[], str], kills: int, rng: random.Random, longest: float) -> Counter:
    """Forks a process that works until it is killed at a random moment, and checks what it left; again and again."""
    outcomes: Counter = Counter()
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    work()
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the process ended before it was killed: its work failed"
        outcomes[check()] += 1
    return outcomes


def kills_of_save(kills: int, seed: int, folder: Path) -> Counter:
    """Overwrites one adapter with others, each of which holds one value throughout; a mixture would show."""
    model = tiny_model(1.0)
    abba_ext.save_adapter(model, folder / "adapter")
    numbers = iter(range(2, 1 << 30))

    def work():
        value = float(next(numbers))
        with torch.no_grad():
            for tensor in abba_ext.adapter_state_dict(model).values():
                tensor.fill_(value)
        abba_ext.save_adapter(model, folder / "adapter")

    def check():
        tensors = read_adapter(folder / "adapter")[1].values()
        values = {value.item() for tensor in tensors for value in (tensor.min(), tensor.max())}
        assert len(values) == 1, f"a mixture of {values}"
        for left in (folder / "adapter").glob(".tmp-*"):
            left.unlink()
        return "old" if values == {1.0} else "new"

    return kill_while(work, check, kills, random.Random(seed), 0.03)


def contents(folder: Path) -> dict[str, object]:
    """What the files of a folder hold; of safetensors files, whose headers have no fixed order, the tensors."""
    return {path.name: {name: value.numpy().tobytes() for name, value in load_file(path).items()} if path.suffix == ".safetensors"
            else path.read_bytes() for path in folder.iterdir()}


def kills_of_conversion(kills: int, seed: int, folder: Path) -> Counter:
    """Converts into new folders, to each format in turn: each is whole or not there."""
    abba_ext.save_adapter(tiny_model(0.5), folder / "source")
    whole = {}
    for to in WRITE_FORMATS:
        convert_adapter(folder / "source", folder / to, to=to)
        whole[to] = contents(folder / to)
    numbers = iter(range(1 << 30))

    def work():
        number = next(numbers)
        to = WRITE_FORMATS[number % len(WRITE_FORMATS)]
        convert_adapter(folder / "source", folder / f"out-{to}-{number}", to=to)

    def check():
        made = sorted(folder.glob("out-*"))
        for path in made:
            assert contents(path) == whole[path.name.split("-")[1]], f"{path} is not whole"
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        return "some" if made else "none"

    return kill_while(work, check, kills, random.Random(seed), 0.05)


def kills_of_merge(kills: int, seed: int, folder: Path) -> dict[str, int]:
    """Kills merges of a checkpoint of many shards at random moments; the last may finish, and has to be right in every bit."""
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
                         pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder / "base", max_shard_size="20KB")
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    abba_ext.patch_model(model, abba_ext.AbbaConfig(r1=3, r2=5, init="random"))
    for layer in abba_ext.abba_layers(model).values():
        nn.init.normal_(layer.abba_B2, std=0.3)
    abba_ext.save_adapter(model, folder / "adapter")
    command = [sys.executable, Path(__file__).parent / "merge_worker.py", "kill", folder / "base", folder / "adapter",
               folder / "out", str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    merged = dict(LlamaForCausalLM.from_pretrained(folder / "out").named_parameters())
    for name, value in abba_ext.merge_and_unload(model).named_parameters():
        assert torch.equal(merged[name], value), f"{name} was merged wrong"
    return report


# --- damaged files ---


def mutate(original: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A damaged copy of a safetensors file, and how it was damaged."""
    data, header = bytearray(original), 8 + int.from_bytes(original[:8], "little")
    kind = rng.choice(("bit", "bit in the header", "truncated", "lengthened", "zeros", "noise", "length field", "swapped"))
    if kind == "bit":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "bit in the header":
        data[rng.randrange(header)] ^= 1 << rng.randrange(8)
    elif kind == "truncated":
        del data[rng.randrange(len(data)):]
    elif kind == "lengthened":
        data += rng.randbytes(rng.randint(1, 100))
    elif kind in ("zeros", "noise"):
        start = rng.randrange(len(data))
        count = min(rng.randint(1, 512), len(data) - start)
        data[start: start + count] = bytes(count) if kind == "zeros" else rng.randbytes(count)
    elif kind == "length field":
        data[:8] = rng.choice((0, header, len(data), 1 << 40, (1 << 64) - 1, rng.getrandbits(64))).to_bytes(8, "little")
    else:
        a, b = (rng.randrange(header, len(data) - 64) for _ in range(2))
        data[a: a + 64], data[b: b + 64] = data[b: b + 64], data[a: a + 64]
    return kind, bytes(data)


def mutations(count: int, seed: int, folder: Path) -> Counter:
    """Loads damaged adapters: each must be refused with ValueError, leaving the model as it was, unless nothing changed."""
    rng = random.Random(seed)
    model = abba_ext.patch_model(nn.ModuleDict({name: nn.Linear(24, 16) for name in "abcd"}), abba_ext.AbbaConfig(r1=3, r2=2))
    nn.init.normal_(model["a"].abba_B2)
    abba_ext.save_adapter(model, folder)
    path = folder / WEIGHTS_NAME

    def values():
        scales = [layer.abba_scale for layer in abba_ext.abba_layers(model).values()]
        return *(value.clone() for value in model.state_dict().values()), torch.tensor(scales, dtype=torch.float64)

    original, before = path.read_bytes(), values()
    outcomes: Counter = Counter()
    for number in range(count):
        kind, data = mutate(original, rng)
        path.write_bytes(data)
        try:
            abba_ext.load_adapter(model, folder)
        except ValueError as error:
            assert WEIGHTS_NAME in str(error) or "adapter" in str(error), f"mutation {number} ({kind}): {error}"
            outcomes["refused"] += 1
        else:
            outcomes["same contents"] += 1
        assert all(map(torch.equal, values(), before)), f"mutation {number} ({kind}) was loaded"
    return outcomes


# --- long runs ---


def steps(count: int) -> dict[str, int]:
    """Training steps of a small model: the growth of resident memory after the first tenth of them."""
    torch.manual_seed(0)
    model = abba_ext.patch_model(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), abba_ext.AbbaConfig(r=8))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x = torch.randn(16, 32)
    process, sizes = psutil.Process(), []
    for step in range(count):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % (count // 10) == 0:
            gc.collect()
            sizes.append(process.memory_info().rss)
    growth = sizes[-1] - sizes[0]
    assert growth < 2 << 20, f"resident bytes after each tenth of the steps: {sizes}"
    return {"steps": count, "bytes grown": growth}


def merges(count: int) -> dict[str, int]:
    """Merges and unmerges of bfloat16 weights, which must come back bit for bit each time."""
    model = abba_ext.patch_model(nn.Sequential(nn.Linear(48, 40), nn.Linear(40, 8)).bfloat16(), abba_ext.AbbaConfig(r=8))
    nn.init.normal_(model[0].abba_B2)
    weights, adapted = [layer.weight.detach().clone() for layer in model], model[0].merged_weight()
    for _ in range(count):
        abba_ext.merge(model)
        assert torch.equal(model[0].weight, adapted)
        abba_ext.unmerge(model)
        assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, weights, strict=True))
    return {"merges": count}


def swaps(count: int, folder: Path) -> dict[str, int]:
    """Loads two adapters in turn while another thread infers: each of its outputs must lie between the two adapters'."""
    model = abba_ext.patch_model(nn.Sequential(nn.Linear(24, 16)), abba_ext.AbbaConfig(r1=1, r2=1, init="random"))
    x, outputs = torch.randn(4, 24), {}
    for value in (1.0, 2.0):
        nn.init.constant_(model[0].abba_B2, value)
        abba_ext.save_adapter(model, folder / str(value))
        with torch.no_grad():
            outputs[value] = model(x)
    low, high = torch.minimum(*outputs.values()) - 1e-5, torch.maximum(*outputs.values()) + 1e-5
    seen, wrong, stop = Counter(), [], threading.Event()

    def infer():
        while not stop.is_set():
            with torch.no_grad():
                y = model(x)
            seen["inferences"] += 1
            if not ((low <= y) & (y <= high)).all():
                wrong.append(y)

    thread = threading.Thread(target=infer)
    thread.start()
    try:
        for turn in range(count):
            abba_ext.load_adapter(model, folder / str((1.0, 2.0)[turn % 2]))
    finally:
        stop.set()
        thread.join()
    assert not wrong, f"{len(wrong)} outputs are of neither adapter: {wrong[0]}"
    with torch.no_grad():
        assert torch.equal(model(x), outputs[(1.0, 2.0)[(count - 1) % 2]])
    return {"swaps": count, **seen}
