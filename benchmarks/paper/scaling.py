"""Theorem 2 and Figure 5: with s ∝ (r1 r2)^−p outputs and gradients keep their size as the ranks grow if p = 1/2.

    python benchmarks/paper/scaling.py

Sources of numbers. "factors": ΔW of standard Gaussian factors. "large" and "usual": ΔW after one gradient step on one example
from B2 = 0, the other factors standard Gaussian, with r1 r2 above the layer's width (the theorem is about r → ∞) and below it
(as in practice). "training": an MLP with ABBA on its middle layer, from the paper's start, with Adam. In the first three the
second moments of x ΔWᵀ and dy ΔW are measured for Gaussian x and dy, the example of the step.
"""
import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from common import Experiment, main, mean_and_error, significant, verdict
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from toy import STEPS, batches, digits
from tqdm.auto import tqdm

import abba_ext
from abba_ext.reference import delta_weight

EXPONENTS = {"0": 0.0, "1/6": 1 / 6, "1/4": 1 / 4, "1/2": 1 / 2}
BEST = "1/2"
WIDTH = 256  # of the MLP
RANKS = {"factors": (2, 4, 8, 16, 32, 64), "large": (8, 16, 32, 64, 128, 256), "usual": (2, 4, 8, 16),
         "training": (2, 4, 8, 16, 32, 64)}  # r1 = r2
WIDTHS = {"factors": 256, "large": 32, "usual": 512}
REFERENCE_RANK, REFERENCE_SCALE = 16, 16.0  # all exponents agree with the paper's α = 16 there: s = α²/√(r1 r2)
LEARNING_RATE = 1e-3
STEADY = 0.1  # largest exponent of r1 r2 that counts as no growth
COLOURS = {"0": "#08519c", "1/6": "#4292c6", "1/4": "#9ecae1", "1/2": "#d7301f"}
QUANTITIES = {
    ("factors", "output"): "random factors: outputs",
    ("factors", "input_gradient"): "random factors: input gradients",
    ("large", "output"): "one step, r1·r2 above the width: outputs",
    ("large", "input_gradient"): "one step, r1·r2 above the width: input gradients",
    ("usual", "output"): "one step, r1·r2 below the width: outputs",
    ("usual", "input_gradient"): "one step, r1·r2 below the width: input gradients",
    ("training", "gradient_norm"): "training: gradient norm over all steps",
    ("training", "output"): "training: outputs at the end",
}


def scale(rank: int, exponent: str) -> float:
    """s ∝ (r1 r2)^−p with r1 = r2, and the paper's at the default ranks."""
    return REFERENCE_SCALE * (rank / REFERENCE_RANK) ** (-2 * EXPONENTS[exponent])


def simulate(source: str, rank: int, exponent: str, seed: int, numbers: int = 4096) -> dict[str, float]:
    """Second moments of x ΔWᵀ and dy ΔW, Gaussian x and dy, over as many draws of the factors as give so many outputs."""
    generator = torch.Generator().manual_seed(seed)
    width = WIDTHS[source]

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    s, outputs, input_gradients = scale(rank, exponent), [], []
    for _ in range(numbers // width):
        x, dy = gaussian(1, width), gaussian(1, width)
        a1, b1, a2, b2 = gaussian(rank, width), gaussian(width, rank), gaussian(rank, width), gaussian(width, rank)
        if source != "factors":
            b2 = torch.zeros_like(b2, requires_grad=True)
            (x @ delta_weight(a1, b1, a2, b2, s).t()).backward(dy)
            b2 = -b2.grad
        update = delta_weight(a1, b1, a2, b2, s)
        outputs.append(x @ update.t())
        input_gradients.append(dy @ update)
    return {"output": torch.cat(outputs).square().mean().item(),
            "input_gradient": torch.cat(input_gradients).square().mean().item()}


def base_model(seed: int) -> nn.Sequential:
    """An MLP of three layers that has learnt the digits 0 to 7."""
    images, labels, *_ = digits()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for batch in batches(int((labels < 8).sum()), 300, seed):
        cross_entropy(model(images[labels < 8][batch]), labels[labels < 8][batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def train(base: nn.Sequential, rank: int, exponent: str, seed: int, steps: int) -> dict[str, float]:
    """Teaches the base 8 and 9 through its middle layer; the base is as it was afterwards."""
    images, labels, *_ = digits()
    images, labels = images[labels >= 8], labels[labels >= 8]
    config = abba_ext.AbbaConfig(r1=rank, r2=rank, scaling=scale(rank, exponent), target_modules=["2"], seed=seed)
    abba_ext.patch_model(base, config)
    factors = [parameter for parameter in base.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(factors, lr=LEARNING_RATE)
    norms = []
    for batch in batches(len(images), steps, seed):
        cross_entropy(base(images[batch]), labels[batch]).backward()
        norms.append(math.sqrt(sum(factor.grad.square().sum().item() for factor in factors)))
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        output = base[:2](images) @ base[2].delta_weight().t()
    abba_ext.unpatch_model(base)
    return {"gradient_norm": statistics.fmean(norms), "output": output.square().mean().item()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    cases = [(source, rank, exponent, seed) for seed in range(options.seeds) for source, ranks in RANKS.items()
             for rank in (ranks[:2] if options.quick else ranks) for exponent in EXPONENTS]
    steps, numbers = (5, 512) if options.quick else (STEPS["digits"], 4096)
    bases = {seed: base_model(seed) for seed in range(options.seeds)}
    rows = []
    for source, rank, exponent, seed in tqdm(cases, desc="scaling", unit="case"):
        found = (train(bases[seed], rank, exponent, seed, steps) if source == "training"
                 else simulate(source, rank, exponent, seed, numbers))
        rows += [{"source": source, "quantity": quantity, "seed": seed, "rank": rank, "exponent": exponent, "value": value}
                 for quantity, value in found.items()]
    return {"steps": steps, "rows": rows}


# --- what it shows ---


def ranks_of(results: dict[str, Any], source: str) -> list[int]:
    return list(dict.fromkeys(row["rank"] for row in results["rows"] if row["source"] == source))


def over_seeds(results: dict[str, Any], key: tuple[str, str], exponent: str, rank: int) -> list[float]:
    return [row["value"] for row in results["rows"]
            if ((row["source"], row["quantity"]), row["exponent"], row["rank"]) == (key, exponent, rank)]


def growth(results: dict[str, Any], key: tuple[str, str], exponent: str) -> list[float]:
    """For each seed the q of the least-squares fit value ∝ (r1 r2)^q."""
    ranks = ranks_of(results, key[0])
    x = torch.tensor([2 * math.log(rank) for rank in ranks], dtype=torch.float64)
    values = torch.tensor([over_seeds(results, key, exponent, rank) for rank in ranks], dtype=torch.float64)
    centred = x - x.mean()
    return ((centred @ values.log()) / centred.square().sum()).tolist()


def steadiest(results: dict[str, Any], key: tuple[str, str]) -> bool:
    """Whether the growth at p = 1/2 is significantly nearer to zero than at every other p."""
    best = growth(results, key, BEST)
    return all(significant([abs(other) - abs(own) for other, own in zip(growth(results, key, exponent), best, strict=True)]) > 0
               for exponent in EXPONENTS if exponent != BEST)


def stable(results: dict[str, Any], key: tuple[str, str]) -> bool:
    """Whether p = 1/2 is the steadiest and its mean growth is below STEADY."""
    return steadiest(results, key) and abs(mean_and_error(growth(results, key, BEST))[0]) < STEADY


def claims(results: dict[str, Any]) -> dict[tuple[str, str], bool]:
    """Theorem 2 for the simulated moments; Figure 5, a comparison of exponents only, for training."""
    return {key: (steadiest if key[0] == "training" else stable)(results, key) for key in QUANTITIES}


def draw(results: dict[str, Any], path: Path) -> None:
    """A panel per quantity: its mean over seeds against r1 r2, a line per exponent, the band from the least to the most."""
    figure = Figure(figsize=(14, 5.6), layout="constrained")
    panels = figure.subplots(2, 4).T.flatten()
    for (key, label), axes in zip(QUANTITIES.items(), panels, strict=True):
        for exponent, colour in COLOURS.items():
            ranks = ranks_of(results, key[0])
            products = [rank * rank for rank in ranks]
            values = [over_seeds(results, key, exponent, rank) for rank in ranks]
            axes.plot(products, [statistics.fmean(value) for value in values], "o-", markersize=3, color=colour,
                      label=f"p = {exponent}")
            axes.fill_between(products, [min(value) for value in values], [max(value) for value in values], color=colour,
                              alpha=0.15, linewidth=0)
        axes.set(xscale="log", yscale="log", xlabel="r1·r2")
        axes.set_title(label, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(linewidth=0.3)
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle("s ∝ (r1·r2)^−p, equal at 16 + 16", fontsize=10)
    figure.savefig(path, dpi=130)


def summary(results: dict[str, Any]) -> str:
    """Holds if the simulated moments do not grow at p = 1/2 and grow at the others, and training is steadiest at p = 1/2."""
    held = claims(results)
    lines = [f"{verdict(held.values())}. The paper: outputs and input gradients keep their size as ranks grow if and only if "
             "s ∈ Θ((r1 r2)^−1/2), and gradient norms are steadiest there among the exponents 0, 1/6, 1/4, 1/2. Measured: the q "
             "in (r1 r2)^q by which each quantity grows (of outputs and input gradients the second moment), mean ± standard "
             "error over seeds; p = 1/2 is said to keep its size if it is the steadiest and, where simulated, "
             f"|q| < {STEADY}.", "",
             "| | " + " | ".join(f"p = {exponent}" for exponent in EXPONENTS) + " | p = 1/2 keeps its size |",
             "|---" * (len(EXPONENTS) + 2) + "|"]
    for key, label in QUANTITIES.items():
        cells = ["{:+.2f} ± {:.2f}".format(*mean_and_error(growth(results, key, exponent))) for exponent in EXPONENTS]
        lines.append(f"| {label} | {' | '.join(cells)} | {'yes' if held[key] else 'no'} |")
    ranges = "; ".join(f"{source} {WIDTHS.get(source, WIDTH)}, {ranks_of(results, source)[0]} to {ranks_of(results, source)[-1]}"
                       for source in RANKS)
    return "\n".join([*lines, "", "The theory: random factors grow by q = 1 − 2p, the outputs after one step by 2 − 4p as r → ∞. "
                      f"Training: the middle layer of an MLP, {results['steps']} steps of Adam at lr {LEARNING_RATE:g} on the "
                      "digits 8 and 9, from the SVD start, whose B1 A1 is bounded by W0 at every r1, unlike the product of the "
                      f"theorem's factors. Widths and ranks r1 = r2 ({ranges})."])


def parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


EXPERIMENT = Experiment("scaling", measure, draw, summary)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, parser()))
