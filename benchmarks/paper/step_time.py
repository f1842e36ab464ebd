"""Table 10: time of a training step of the methods relative to LoRA, by the functions of bench_train.py.

    python benchmarks/paper/step_time.py
    python benchmarks/paper/step_time.py --full    # of Llama-3.2-1B's geometry, for a GPU

A model of SmolLM2-135M's geometry with random weights, in bfloat16 where the processor has it; adapters in float32. It wants
idle cores, for minutes; finished repetitions are kept, so that it goes on where it was interrupted.
"""
import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import common  # first: it puts the folder of bench_train on the path
import torch
from bench_train import run_case, steps_of
from common import QUICK, mean_and_error, mean_and_margin
from matplotlib.figure import Figure
from model_methods import METHODS
from step_memory import COLOURS, WITHIN, model_case, parser, setting
from tqdm.auto import tqdm

COMPARED = ("lora", "dora", "hira", "abba_eager", "abba")
ABBA = ("abba", "abba_eager")
LENGTH = 256  # the paper's
BATCH = {"small": 2, "full": 6}  # the paper's is 6
ROUNDS = 3  # timed steps of each method in a repetition
PAPER = {"Llama-3.2-1B": 1.025, "3B": 1.016, "Mistral-7B": 1.032, "Gemma-2 9B": 1.040}  # ABBA's time over LoRA's


def measure(options: argparse.Namespace) -> dict[str, Any]:
    batch, rounds = (1, 2) if options.quick else (BATCH["full" if options.full else "small"], ROUNDS)
    case = model_case(options, batch, LENGTH)
    device = torch.device(options.device)
    asked = [case, COMPARED, rounds, common.harness.commit(), common.harness.device_name(device),
             torch.get_num_threads()]
    part = QUICK / f"time.{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}.json"
    kept = common.read_json(part) if part.exists() else {"rows": [], "seconds": 0.0}
    rows, start = kept["rows"][:options.seeds * len(COMPARED)], time.perf_counter() - kept["seconds"]
    steps = len(COMPARED) * steps_of(rounds)
    first = len(rows) // len(COMPARED)
    with tqdm(total=options.seeds * steps, initial=first * steps, desc="time", unit="step") as bar:
        for repetition in range(first, options.seeds):
            rows += [{"repetition": repetition, **row}
                     for row in run_case(case, COMPARED, rounds, device, bar.update)]
            common.write_json(part, {"rows": rows, "seconds": time.perf_counter() - start})
    part.unlink(missing_ok=True)
    return {"rounds": rounds, "rows": rows, "seconds": round(time.perf_counter() - start, 1)}


# --- what it shows ---


def values(results: dict[str, Any], method: str, field: str) -> list[float]:
    """A method's field for each repetition."""
    return [row[field] for row in results["rows"] if row["method"] == method]


def ratios(results: dict[str, Any], method: str) -> list[float]:
    """A method's median time over LoRA's, for each repetition."""
    return [own / lora for own, lora in zip(*(values(results, name, "median_ms") for name in (method, "lora")), strict=True)]


def methods_of(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in results["rows"]))


def draw(results: dict[str, Any], path: Path) -> None:
    """Time relative to LoRA: a point per repetition, means with 95 % confidence intervals, and the paper's range."""
    methods = methods_of(results)
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for x, method in enumerate(methods):
        found = ratios(results, method)
        mean, margin = mean_and_margin(found)
        bars = axes.bar(x, mean, yerr=margin, capsize=3, color=COLOURS[method])
        axes.bar_label(bars, fmt="{:.2f}", label_type="center", fontsize=8)
        axes.plot([x] * len(found), found, ".", color="black", markersize=4)
    axes.axhspan(min(PAPER.values()), max(PAPER.values()), color="tab:red", alpha=0.3, label="the paper's ABBA")
    axes.set_xticks(range(len(methods)), [METHODS[method].label for method in methods], fontsize=8)
    axes.set_ylabel("time of a step / LoRA's")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def summary(results: dict[str, Any]) -> str:
    """Holds if ABBA, by abba_ext and in plain torch, takes at most 1.05 of LoRA's time, by the mean."""
    claims = {method: fmean(ratios(results, method)) <= WITHIN for method in ABBA}
    paper = ", ".join(f"{name} {ratio - 1:.1%}" for name, ratio in PAPER.items())
    lines = [f"{common.verdict(claims.values())}. The paper: ABBA, in plain torch, trains for longer than LoRA by: {paper}. Here "
             f"a training step takes at most {WITHIN - 1:.0%} longer than with PEFT's LoRA with", ""]
    lines += [f"- {METHODS[method].label}: {'yes' if true else 'no'}" for method, true in claims.items()]
    lines += ["", "| method | step, ms | time / LoRA's | waited |", "|---" * 4 + "|"]
    for method in methods_of(results):
        mean, error = mean_and_error(ratios(results, method))
        step, waited = (fmean(values(results, method, field)) for field in ("median_ms", "wait_share"))
        lines.append(f"| {METHODS[method].label} | {step:,.0f} | {mean:.3f} ± {error:.3f} | {waited:.0%} |")
    row = results["rows"][0]
    return "\n".join([*lines, "", f"{setting(row)}, {row['length']} tokens; {results['rounds']} steps of every method, in turn, "
                      "in each repetition. Mean ± standard error over repetitions; \"waited\" is the share of a step that "
                      "threads waited for a core, which other processes had."])


EXPERIMENT = common.Experiment("time", measure, draw, summary)

if __name__ == "__main__":
    sys.exit(common.main(EXPERIMENT, parser()))
