"""Tokens per second and peak memory of a training step of a whole Llama-type model, for all methods in turn.

    python benchmarks/bench_train.py --device cpu --quick
    python benchmarks/bench_train.py --size 8b --layers 16 --batch 2 --length 1024 4096 --checkpointing off on

A step is forward, loss, backward and fused AdamW on what a method trains, on random tokens and random weights. The base in
bf16 runs under autocast, with adapters in float32, as a trainer would have it. The method "base" trains nothing: forward,
and the gradient of the embeddings' output, so that backward passes every layer. Writes train.csv (a row per case and method)
and train.json (what was run, where, what failed) to --out after each case, and prints a summary. What fails has no row, and the
exit status is then 1.
"""
import argparse
import contextlib
import copy
import math
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from harness import (TOLERANCE, by_case, device_name, metadata, noted, notes, peak_memory, report, slug, table,
                     time_interleaved, write_results)
from model_methods import METHODS, attach, trainable
from shapes import DTYPES
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

# Geometries of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B.
SIZES = {
    "135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                 vocab_size=49152, tie_word_embeddings=True),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
               vocab_size=128256, tie_word_embeddings=True),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
               vocab_size=128256, tie_word_embeddings=False),
}
DEFAULT_METHODS = ("base", "lora", "lora_inplace", "dora", "hira", "loha", "abba_eager", "abba")
QUICK_METHODS = ("base", "lora", "loha", "abba_eager", "abba")
REFERENCES = ("abba_eager", "loha", "lora")  # the printed ratios of abba
CHANGE_THE_BASE = ("full", "pissa")  # methods that cannot share the others' base weights
START = {name: {"init": "random"} for name in ("abba_eager", "abba")}  # an SVD of every weight would take longer than the steps
ROW_METADATA = ("device", "device_type", "threads", "torch", "transformers", "peft", "abba_ext", "commit", "sm90")
LARGE_DEVICE = 120 * 2**30  # bytes of memory for which 8b is the default
LEARNING_RATE = 1e-4
WARMUP = 1
MIB = 2**20


class Case(NamedTuple):
    """A model and its batch; the rank is a parameter budget."""

    size: str
    layers: int
    batch: int
    length: int
    rank: int
    dtype: str
    adapter_dtype: str
    checkpointing: bool


class Preset(NamedTuple):
    """What is measured where the command line does not say."""

    size: str
    layers: int
    batch: int
    lengths: tuple[int, ...]
    dtypes: tuple[str, ...]


def default_preset(device: torch.device, quick: bool) -> Preset:
    """A size that fits the device: beside the base and one method's activations, HiRA keeps two matrices of every weight's
    size for backward, and each method its adapters and optimizer state."""
    if device.type == "cpu":
        return Preset("135m", 4 if quick else 30, 1, (256,), ("fp32", "bf16"))
    large = torch.cuda.get_device_properties(device).total_memory >= LARGE_DEVICE
    if quick or not large:
        return Preset("1b", 16, 4 if large else 1, (1024,), ("bf16",))
    return Preset("8b", 32, 2, (1024, 2048), ("bf16",))


# --- one case ---


def build_model(case: Case, device: torch.device) -> nn.Module:
    """A Llama with random weights, in training mode."""
    config = LlamaConfig(**{**SIZES[case.size], "num_hidden_layers": case.layers}, use_cache=False)
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[case.dtype]).train()


def with_method(model: nn.Module, name: str, case: Case) -> nn.Module:
    """A copy of a model with a method's adapters, around the same base weights, unless the method changes those."""
    memo = {} if name in CHANGE_THE_BASE else {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    adapted = attach(copy.deepcopy(model, memo), name, rank=case.rank, adapter_dtype=DTYPES[case.adapter_dtype],
                     **START.get(name, {}))
    if name == "base":
        adapted.enable_input_require_grads()
    if case.checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
    return adapted


class TrainStep:
    """A step of the harness: forward, loss, backward, AdamW."""

    def __init__(self, model: nn.Module, tokens: Tensor, autocast: torch.dtype | None,
                 progress: Callable[[], object] = lambda: None):
        """Args: tokens [batch, length]; autocast: the dtype of the products, None for the parameters' own; progress: called
        before each run, untimed."""
        self.model, self.tokens, self.autocast, self.progress = model, tokens, autocast, progress
        trained = trainable(model)
        self.optimizer = torch.optim.AdamW(trained, LEARNING_RATE, fused=True) if trained else None

    def prepare(self) -> None:
        self.loss = None
        self.progress()

    def forward(self) -> Tensor:
        """The loss."""
        device = self.tokens.device.type
        with torch.autocast(device, self.autocast) if self.autocast else contextlib.nullcontext():
            return self.model(input_ids=self.tokens, labels=self.tokens).loss

    def run(self) -> Tensor:
        """Leaves no gradients behind."""
        loss = self.forward()
        self.loss = loss.detach()
        loss.backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss

    def resident_bytes(self) -> int:
        """What lies in memory between the steps: weights, adapters, optimizer state."""
        state = self.optimizer.state.values() if self.optimizer else ()
        tensors = [*self.model.parameters(), *self.model.buffers(), *(tensor for entry in state for tensor in entry.values())]
        return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def run_case(case: Case, methods: tuple[str, ...], rounds: int, device: torch.device,
             progress: Callable[[], object] = lambda: None, failures: list[str] | None = None) -> list[dict]:
    """Checks, measures the memory of and times every method on one case: a CSV row for each.

    The models share their frozen weights, so that all of them are at hand and can be timed in turn.

    Args:
        case: The model and its batch.
        methods: Names out of METHODS.
        rounds: Timed steps of each method; 0 leaves the times out.
        device: Where it runs.
        progress: Called before each of steps_of(rounds) steps of each method.
        failures: Where methods that fail are noted; None to raise what they raise.

    Raises:
        AssertionError: A method starts from another loss than the base's, or its loss is not finite after training.
    """
    model = build_model(case, device)
    tokens = torch.randint(model.config.vocab_size, (case.batch, case.length), device=device)
    autocast = DTYPES[case.dtype] if DTYPES[case.dtype].itemsize < 4 else None
    with torch.no_grad():
        base_loss = TrainStep(model.requires_grad_(False), tokens, autocast).forward().item()
    steps, rows, note = {}, [], notes(failures, case)
    for name in methods:
        with note(name):
            step = TrainStep(with_method(model, name, case), tokens, autocast, progress)
            step.prepare()
            step.run()  # makes the optimizer's state
            loss = step.loss.item()
            if not abs(loss - base_loss) <= TOLERANCE[DTYPES[case.dtype]] * base_loss:
                raise AssertionError(f"{name} starts from the loss {loss}, the base from {base_loss}")
            step_bytes, resident_bytes = peak_memory(step, device), step.resident_bytes()
            rows.append({**case._asdict(), "method": name, "trainable": sum(p.numel() for p in trainable(step.model)),
                         "resident_bytes": resident_bytes, "step_bytes": step_bytes, "peak_bytes": resident_bytes + step_bytes})
            steps[name] = step
    if not rounds:
        return rows
    timings = time_interleaved(steps, 0.0, device, warmup=WARMUP, min_rounds=rounds, note=note)
    timed = []
    for row in (row for row in rows if row["method"] in timings):
        step, timing = steps[row["method"]], timings[row["method"]]
        with note(row["method"]):
            if not math.isfinite(step.loss.item()):
                raise AssertionError(f"{row['method']} has the loss {step.loss.item()} after {rounds} rounds")
            timed.append({**row, "tokens_per_s": tokens.numel() / timing.median_ms * 1e3, **timing._asdict()})
    return timed


def steps_of(rounds: int) -> int:
    """Steps that run_case makes with each method: one to begin with, one for the memory, and the timed ones."""
    return 2 + (WARMUP + rounds if rounds else 0)


# --- the command line ---


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; None reads sys.argv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="few layers and methods: about a minute on 2 CPU cores or a GPU")
    parser.add_argument("--size", choices=list(SIZES), help="default: 135m on a CPU, 1b or 8b on a GPU, by its memory")
    parser.add_argument("--layers", type=int, help="fewer blocks than the size has")
    parser.add_argument("--batch", type=int, metavar="B", help="sequences in a step")
    parser.add_argument("--length", nargs="+", type=int, metavar="L", help="tokens of a sequence")
    parser.add_argument("--rank", type=int, default=32, metavar="R", help="LoRA's r; ABBA and LoHa have r/2 + r/2")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), help="of the base and its activations")
    parser.add_argument("--adapter-dtype", choices=("fp32", "bf16"), default="fp32", help="of the adapters' parameters")
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off"], help="of activations, per block")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--rounds", type=int, metavar="N", help="timed steps of each method (default: 6 with --quick, else 10)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device-name>")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    preset = default_preset(device, options.quick)
    layers = options.layers or (SIZES[options.size]["num_hidden_layers"] if options.size else preset.layers)
    options.cases = [
        Case(options.size or preset.size, layers, options.batch or preset.batch, length, options.rank, dtype,
             options.adapter_dtype, checkpointing == "on")
        for dtype, checkpointing, length in product(options.dtypes or preset.dtypes, options.checkpointing,
                                                    options.length or preset.lengths)]
    if options.rank < 2 or options.rank % 2:
        parser.error(f"--rank must be even and at least 2 (r1 = r2 = rank/2), got {options.rank}")
    for case in options.cases:
        if min(case.layers, case.batch) < 1 or case.length < 2:
            parser.error("--layers and --batch must be at least 1 and --length at least 2, got "
                         f"{case.layers}, {case.batch}, {case.length}")
    options.methods = options.methods or (QUICK_METHODS if options.quick else DEFAULT_METHODS)
    options.rounds = options.rounds if options.rounds is not None else 6 if options.quick else 10
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    options.out = options.out or Path(__file__).parent / "results" / slug(device_name(device))
    return options


def summary(rows: list[dict], methods: tuple[str, ...]) -> str:
    """Tokens per second with the ratios of times, and peak memory, a line per case."""
    references = [name for name in REFERENCES if name in methods and "abba" in methods]
    speed, memory = [], []
    for key, by_method in by_case(rows, Case._fields).items():
        case = Case(*key)
        head = [case.size, str(case.layers), case.dtype, f"{case.batch}×{case.length}", "on" if case.checkpointing else "off"]
        ratios = [by_method["abba"]["median_ms"] / by_method[name]["median_ms"] for name in references]
        speed.append(head + [f"{by_method[name]['tokens_per_s']:.0f}" for name in methods] + [f"{ratio:.2f}" for ratio in ratios])
        memory.append(head + [f"{by_method[name]['peak_bytes'] / MIB:.0f}" for name in methods])
    head = ["size", "layers", "dtype", "batch", "checkpointing", *methods]
    return "\n\n".join([
        "Tokens per second of a training step; ratios of abba's median time\n"
        + table(head + [f"/{name}" for name in references], speed),
        "Peak memory with weights, gradients and optimizer state, MiB\n" + table(head, memory)])


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    meta = metadata(device)
    about = {**meta, "methods": list(options.methods), "rounds": options.rounds,
             "cases": [case._asdict() for case in options.cases]}
    rows, failures = [], []
    with tqdm(total=len(options.cases) * len(options.methods) * steps_of(options.rounds), unit="step", file=sys.stderr) as bar:
        for case in options.cases:
            bar.set_postfix_str(f"{case.size} {case.dtype} {case.batch}×{case.length}")
            with noted(failures, str(case)):
                rows += [{**row, **{key: meta[key] for key in ROW_METADATA}}
                         for row in run_case(case, options.methods, options.rounds, device, bar.update, failures)]
            write_results(options.out / "train", rows, {**about, "failures": failures})
    print(summary(rows, options.methods))
    print(f"\n{meta['device']}, {meta['threads']} threads, torch {meta['torch']}, peft {meta['peft']}, commit "
          f"{meta['commit'] or 'unknown'}; {options.out / 'train.csv'}")
    return report(failures)


if __name__ == "__main__":
    sys.exit(main())
