"""Faults on purpose: processes killed while they write, and damaged adapter files. Counts what was survived or refused.

    python tests/faults.py --kills 200 --mutations 1000 --seed 0
"""
import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import abba_ext
from abba_ext.checkpoint import WEIGHTS_NAME, read_adapter
from abba_ext.formats import convert_adapter

SIZE = 128


def tiny_model(value: float = 0.0) -> nn.Module:
    """A patched model, all of whose factors hold one value."""
    model = nn.ModuleDict({name: nn.Linear(SIZE, SIZE) for name in "abcd"})
    abba_ext.patch_model(model, abba_ext.AbbaConfig(r1=8, r2=4, init="random"))
    with torch.no_grad():
        for tensor in abba_ext.adapter_state_dict(model).values():
            tensor.fill_(value)
    return model


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
        values = {value.item() for tensor in read_adapter(folder / "adapter")[1].values() for value in (tensor.min(), tensor.max())}
        assert len(values) == 1, f"a mixture of {values}"
        for left in (folder / "adapter").glob(".tmp-*"):
            left.unlink()
        return "old" if values == {1.0} else "new"

    return kill_while(work, check, kills, random.Random(seed), 0.03)


def kills_of_conversion(kills: int, seed: int, folder: Path) -> Counter:
    """Converts into new folders: each is whole or not there."""
    abba_ext.save_adapter(tiny_model(0.5), folder / "source")
    convert_adapter(folder / "source", folder / "whole", to="peft")
    whole = {path.name: path.read_bytes() for path in (folder / "whole").iterdir()}
    numbers = iter(range(1 << 30))

    def work():
        convert_adapter(folder / "source", folder / f"out{next(numbers)}", to="peft")

    def check():
        made = sorted(folder.glob("out*"))
        for path in made:
            assert {file.name: file.read_bytes() for file in path.iterdir()} == whole, f"{path} is not whole"
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        return "some" if made else "none"

    return kill_while(work, check, kills, random.Random(seed), 0.05)


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
    """Loads damaged adapters: each must be refused with ValueError, leaving the model as it was, unless it equals the original."""
    rng = random.Random(seed)
    model = abba_ext.patch_model(nn.ModuleDict({name: nn.Linear(24, 16) for name in "abcd"}), abba_ext.AbbaConfig(r1=3, r2=2))
    nn.init.normal_(model["a"].abba_B2)
    abba_ext.save_adapter(model, folder)
    path = folder / WEIGHTS_NAME
    original, state = path.read_bytes(), {name: value.clone() for name, value in model.state_dict().items()}
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
            assert data == original or all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), \
                f"mutation {number} ({kind}) was loaded"
            outcomes["same contents"] += 1
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), f"mutation {number}: {kind}"
    return outcomes


def run(kills: int, count: int, seed: int) -> dict[str, dict[str, int]]:
    """Every kind of fault; the counts by kind and outcome."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has no worker threads
    try:
        results = {}
        for name, faults, number in (("kills of save_adapter", kills_of_save, kills),
                                     ("kills of convert_adapter", kills_of_conversion, kills),
                                     ("damaged adapters", mutations, count)):
            with tempfile.TemporaryDirectory() as folder:
                results[name] = dict(faults(number, seed, Path(folder)))
        return results
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps(run(options.kills, options.mutations, options.seed)))
