"""Chains of k pairs, ΔW = s·(B1 A1) ⊙ … ⊙ (Bk Ak), at equal parameters: an experiment only, no part of the package.

    python benchmarks/paper/chains.py                       # scikit-learn's digits
    python benchmarks/paper/chains.py --data digits mnist   # and MNIST

Four pairs against ABBA's two: as an adapter by the protocol of toy.py, and by the reconstruction error of reconstruction.py.
"""
import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from common import Experiment, main, significant, verdict
from hadamard import approximate
from matplotlib.figure import Figure
from reconstruction import QUICK_SIZE, SIZE, TARGETS, generator
from torch import Tensor, nn
from toy import DATA, METHODS, RANK, Method, below, compare, draw_curves, table
from tqdm.auto import tqdm

import abba_ext
from abba_ext.layers import init_factors

PAIRS = (2, 4)
MATRIX_RANKS = (16, 32)
MATRICES = tuple(name for name in TARGETS if not name.startswith("language_model"))
COLOURS = {"abba": "#d7301f", "chain": "#6a51a3"}
PAPER = {"abba": (66.26, 18.08), "chain": (64.84, 17.74)}  # GSM8K and MATH, Mistral-7B


class ChainLinear(nn.Module):
    """A frozen linear layer with y = x (W0 + s·(B1 A1) ⊙ … ⊙ (Bk Ak))ᵀ + bias, ΔW formed densely.

    The first pair and the last start as ABBA's two (SVD of W0; A Kaiming-uniform and B = 0), those between them as Gaussian
    products whose entries have a second moment of 1.
    """

    def __init__(self, linear: nn.Linear, ranks: tuple[int, ...], scale: float, seed: int):
        """Args: the layer, r1 … rk (k ≥ 2), s, and the seed of the start."""
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), scale
        m, n = linear.weight.shape
        config = abba_ext.AbbaConfig(r1=ranks[0], r2=ranks[-1], seed=seed)
        outer = init_factors(linear, config)
        draws = generator(seed)
        middle = [(torch.randn(r, n, generator=draws), torch.randn(m, r, generator=draws) / math.sqrt(r)) for r in ranks[1:-1]]
        pairs = [(outer["abba_A1"], outer["abba_B1"]), *middle, (outer["abba_A2"], outer["abba_B2"])]
        self.factors = nn.ParameterList(factor.to(linear.weight) for pair in pairs for factor in pair)

    def delta_weight(self) -> Tensor:
        """ΔW [m, n]."""
        product = self.scale
        for a, b in zip(self.factors[::2], self.factors[1::2], strict=True):
            product = product * (b @ a)
        return product

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] → y [..., m]."""
        return self.linear(x) + x @ self.delta_weight().t()


def attach_chain(model: nn.Module, scale: float, seed: int) -> None:
    for index, layer in enumerate(model):
        if isinstance(layer, nn.Linear):
            model[index] = ChainLinear(layer, (RANK // PAIRS[1],) * PAIRS[1], scale, seed)


CHAINS = {"abba": METHODS["abba"],
          "chain": Method(f"chain, r={'+'.join([str(RANK // PAIRS[1])] * PAIRS[1])}", attach_chain)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    training = {name: compare(name, CHAINS, options) for name in options.data}
    names, ranks, size = (("sparse",), (8,), QUICK_SIZE) if options.quick else (MATRICES, MATRIX_RANKS, SIZE)
    cases = [(name, seed, rank, pairs) for name in names for seed in range(options.seeds) for rank in ranks for pairs in PAIRS]
    found = []
    for name, seed, rank, pairs in tqdm(cases, desc="matrices", unit="matrix"):
        made = TARGETS[name].make(size, seed)
        matrix = (made[0] if isinstance(made, tuple) else made).to(options.device)
        error, _ = approximate(matrix, (rank // pairs,) * pairs, generator(seed))
        found.append({"target": name, "seed": seed, "rank": rank, "pairs": pairs, "error": error})
    return {"training": training, "size": size, "matrices": found}


# --- what it shows ---


def errors(results: dict[str, Any], target: str, rank: int, pairs: int) -> list[float]:
    return [row["error"] for row in results["matrices"]
            if (row["target"], row["rank"], row["pairs"]) == (target, rank, pairs)]


def comparison(results: dict[str, Any], target: str, rank: int) -> int:
    """1 if two pairs have a significantly lower error than four, −1 if a higher one, else 0; errors below 1e-4 are equal."""
    two, four = (errors(results, target, rank, pairs) for pairs in PAIRS)
    return significant([math.log(max(b, 1e-4) / max(a, 1e-4)) for a, b in zip(two, four, strict=True)])


def tolerance(method: dict[str, Any]) -> float:
    """The share of the learning rates and scales whose loss is at most twice the best."""
    best = method["tuning"][0]["loss"]
    return statistics.fmean(trial["loss"] is not None and trial["loss"] <= 2 * best for trial in method["tuning"])


def draw(results: dict[str, Any], path: Path) -> None:
    """Learning curves for each data set, and the error of four pairs against that of two for each matrix."""
    figure = Figure(figsize=(4 * (len(results["training"]) + 1), 3.6), layout="constrained")
    *left, right = figure.subplots(1, len(results["training"]) + 1)
    for axes, (name, methods) in zip(left, results["training"].items(), strict=True):
        draw_curves(axes, methods, COLOURS)
        axes.set_title(f"{name}: digits 8 and 9, each at its best", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    targets = dict.fromkeys(row["target"] for row in results["matrices"])
    for rank, marker in zip(dict.fromkeys(row["rank"] for row in results["matrices"]), "os", strict=False):
        two, four = ([max(statistics.fmean(errors(results, target, rank, pairs)), 1e-4) for target in targets] for pairs in PAIRS)
        right.scatter(two, four, marker=marker, s=18, color=COLOURS["chain"], alpha=0.7, label=f"r = {rank}")
    right.plot([1e-4, 1], [1e-4, 1], color="black", linewidth=0.8)
    right.set(xscale="log", yscale="log", xlabel="error of two pairs", ylabel="error of four pairs")
    right.set_title(f"matrices of reconstruction.py, n = {results['size']}", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    for axes in (*left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(linewidth=0.3)
    figure.savefig(path, dpi=130)


def summary(results: dict[str, Any]) -> str:
    """Holds if on every data set four pairs end at a significantly higher loss and tolerate fewer learning rates and scales."""
    training = results["training"]
    worse = {name: below(methods, "abba", "chain") for name, methods in training.items()}
    touchier = {name: tolerance(methods["chain"]) < tolerance(methods["abba"]) for name, methods in training.items()}
    outcomes = [comparison(results, row["target"], row["rank"]) for row in results["matrices"]
                if row["seed"] == 0 and row["pairs"] == PAIRS[0]]
    lines = [f"{verdict([*worse.values(), *touchier.values()])}. The paper: chains of four pairs are worse than ABBA's two "
             f"(GSM8K/MATH {PAPER['chain'][0]}/{PAPER['chain'][1]} against {PAPER['abba'][0]}/{PAPER['abba'][1]}) and less "
             "stable. Here, at equal parameters:", ""]
    for name, methods in training.items():
        lines.append(f"- {name}: four pairs end {'' if worse[name] else 'not '}significantly above two; "
                     f"{tolerance(methods['chain']):.0%} of the learning rates and scales end within twice the best loss, "
                     f"{tolerance(methods['abba']):.0%} for two pairs")
    lines += [f"- as approximations of matrices, two pairs have the lower error in {outcomes.count(1)} of {len(outcomes)} cases "
              f"and four in {outcomes.count(-1)}", "", table(training)]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=["digits"])
    return parser


EXPERIMENT = Experiment("chains", measure, draw, summary)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, parser()))
