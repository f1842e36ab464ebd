"""Figure 4: peak memory of a training step of the methods, by the functions of bench_train.py.

    python benchmarks/paper/step_memory.py
    python benchmarks/paper/step_memory.py --full    # of Llama-3.2-1B's geometry, for a GPU

A model of SmolLM2-135M's geometry with random weights, in bfloat16 where the processor has it; adapters in float32. It needs
several GiB and minutes; other processes may run beside it, for nothing is timed.
"""
import argparse
import sys
from pathlib import Path
from typing import Any

import common  # first: it puts the folder of bench_train on the path
import torch
from bench_train import SIZES, Case, run_case, steps_of
from finetune_commonsense import has_bf16
from matplotlib.figure import Figure
from model_methods import METHODS
from tqdm.auto import tqdm

RANK = 32
LENGTHS = (256, 2048)
COMPARED = ("lora", "dora", "hira", "abba_eager", "abba", "full")
COLOURS = {"lora": "#9ecae1", "dora": "#74c476", "hira": "#8c6d31", "abba_eager": "#bdbdbd", "abba": "#d7301f", "full": "#525252"}
PAPER = {"lora": "3.55", "dora": "3.97", "hira": "5.17", "abba": "3.67", "full": "12.95"}  # GB, Llama-3.2-1B
WITHIN = 1.05  # of LoRA's, which counts as alike
MIB = 2**20


def model_case(options: argparse.Namespace, batch: int, length: int, checkpointing: bool = False) -> Case:
    """A case of bench_train; --quick has two blocks and short sequences."""
    size = "1b" if options.full else "135m"
    layers = 2 if options.quick else SIZES[size]["num_hidden_layers"]
    return Case(size, layers, batch, length // 16 if options.quick else length, RANK, "bf16" if has_bf16() else "fp32", "fp32",
                checkpointing)


def setting(row: dict[str, Any]) -> str:
    """The model and the methods' settings."""
    return (f"{'Llama-3.2-1B' if row['size'] == '1b' else 'SmolLM2-135M'}'s geometry, {row['layers']} blocks, batch "
            f"{row['batch']}, r = {row['rank']}, base in {row['dtype']}, adapters in {row['adapter_dtype']}")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    cases = [model_case(options, 1, length, checkpointing) for length in LENGTHS for checkpointing in (False, True)]
    rows = []
    with tqdm(total=len(cases) * len(COMPARED) * steps_of(0), desc="memory", unit="step") as bar:
        for case in cases:
            rows += run_case(case, COMPARED, 0, torch.device(options.device), bar.update)
    return {"rows": rows}


# --- what it shows ---


def peaks(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """MiB by case and method."""
    found: dict[str, dict[str, float]] = {}
    for row in results["rows"]:
        name = f"{row['length']} tokens" + (", checkpointing" if row["checkpointing"] else "")
        found.setdefault(name, {})[row["method"]] = row["peak_bytes"] / MIB
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    """Bars: a panel for each length, without and with checkpointing."""
    cases = peaks(results)
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(1, len(cases)), cases.items(), strict=True):
        bars = axes.bar(range(len(found)), list(found.values()), color=[COLOURS[method] for method in found])
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=7)
        axes.set_xticks(range(len(found)), [METHODS[method].label for method in found], rotation=60, fontsize=8)
        axes.set_title(name, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("peak memory, MiB")
    figure.savefig(path, dpi=130)


def summary(results: dict[str, Any]) -> str:
    """Holds if at the shorter length, without checkpointing, ABBA's peak is like LoRA's, below DoRA's and HiRA's, and at most
    half of full fine-tuning's."""
    cases = peaks(results)
    first, found = next(iter(cases.items()))
    change = {method: found["abba"] / peak - 1 for method, peak in found.items()}
    claims = {f"at most {WITHIN - 1:.0%} above LoRA's ({change['lora']:+.1%})": found["abba"] <= WITHIN * found["lora"],
              f"below DoRA's ({change['dora']:+.1%})": change["dora"] < 0,
              f"below HiRA's ({change['hira']:+.1%})": change["hira"] < 0,
              f"at most half of full fine-tuning's ({change['full']:+.1%})": change["full"] <= -0.5}
    lines = [f"{common.verdict(claims.values())}. The paper: at batch 1 and 256 tokens ABBA takes 2 to 3 % more than LoRA, 8 to "
             "18 % less than DoRA, 29 to 41 % less than HiRA, and 67 to 72 % less than full fine-tuning. Here ABBA's peak, at "
             f"{first}, is", ""]
    lines += [f"- {claim}: {'yes' if true else 'no'}" for claim, true in claims.items()]
    lines += ["", "| peak, MiB | " + " | ".join(cases) + " | paper, GB (1B) |", "|---" * (len(cases) + 2) + "|"]
    lines += [f"| {METHODS[method].label} | " + " | ".join(f"{peak[method]:,.0f}" for peak in cases.values())
              + f" | {PAPER.get(method, '')} |" for method in found]
    return "\n".join([*lines, "", f"{setting(results['rows'][0])}. Weights, adapters, gradients, optimizer state and "
                      "activations, by the allocator's own account, which does not vary: measured once."])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the geometry of Llama-3.2-1B")
    return parser


EXPERIMENT = common.Experiment("memory", measure, draw, summary, repeated=False)

if __name__ == "__main__":
    sys.exit(common.main(EXPERIMENT, parser()))
