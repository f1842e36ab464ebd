"""ABBA's own settings on a language model, one varied at a time: start, split of the ranks, α, total rank, projections.

    python benchmarks/paper/sweeps.py init_strategies     # or rank_split, alpha, total_rank, placement
    python benchmarks/paper/sweeps.py alpha --full        # the whole data at rank 32, for a GPU

An experiment that was interrupted goes on when it is started again, in several processes at once if there are cores. A run
takes about two minutes of one core (AVX2): 25 to 40 minutes for each sweep, less what another has done already.
"""
import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
from common import Experiment, verdict
from finetune import Run, Runs, parser, settings
from matplotlib.figure import Figure
from model_methods import TARGETS
from outcomes import (HEADINGS, Rows, average, below, cells, conditions, draw_points, held_out, loss, mean, order,
                      place_legend)
from starts import STARTS

from abba_ext import AbbaConfig

RANKS = {"small": (8, 16, 32, 64), "full": (16, 32, 64, 128)}
ALPHAS = (4, 8, 16, 24, 32, 48, 64)
GROUPS = {"least": ("q_proj", "k_proj"), "middle": ("v_proj", "up_proj"), "most": ("gate_proj", "o_proj", "down_proj")}


@dataclass(frozen=True)
class Sweep:
    """One setting that is varied.

    Attributes:
        title: The setting's name.
        cases: The rank, and whether it is the full experiment → fields of Run by case.
        paper: The paper's result, a sentence.
        numbers: The paper's numbers by case, where there are any.
        claims: The rows → what must be true, by sentence.
    """

    title: str
    cases: Callable[[int, bool], dict[str, dict[str, Any]]]
    paper: str
    numbers: dict[str, str]
    claims: Callable[[Rows], dict[str, bool]]


# --- start ---


def start_cases(rank: int, full: bool) -> dict[str, dict[str, Any]]:
    return {start.label: {"start": name} for name, start in STARTS.items()}


def start_claims(rows: Rows) -> dict[str, bool]:
    own, second = STARTS["ours"].label, STARTS["second_pair"].label
    claims = {f"ABBA's start is significantly below {start.label!r}": below(rows, own, start.label)
              for name, start in STARTS.items() if name not in ("ours", "second_pair", "narrow")}
    return claims | {f"ABBA's start is not above {second!r}, by the mean": average(rows, own) <= average(rows, second)}


# --- ranks ---


def split_label(r1: int, r2: int) -> str:
    return f"{r1}/{r2}"


def split_cases(rank: int, full: bool) -> dict[str, dict[str, Any]]:
    firsts = (rank // 8, rank // 4, 3 * rank // 8, rank // 2)
    return {split_label(r1, rank - r1): {"ranks": (r1, rank - r1)} if 2 * r1 != rank else {} for r1 in firsts}


def split_claims(rows: Rows) -> dict[str, bool]:
    *others, equal = dict.fromkeys(row["case"] for row in rows)
    return {f"{equal} is significantly below {other}": below(rows, equal, other) for other in others}


def rank_cases(rank: int, full: bool) -> dict[str, dict[str, Any]]:
    return {str(total): {"rank": total} for total in RANKS["full" if full else "small"]}


def rank_claims(rows: Rows) -> dict[str, bool]:
    higher = [case for case in dict.fromkeys(row["case"] for row in rows) if int(case) > 32]
    return {"32 is significantly below 16": below(rows, "32", "16")} | {
        f"{case} is not below 32, by the mean": average(rows, case) >= average(rows, "32") for case in higher}


# --- α ---


def alpha_cases(rank: int, full: bool) -> dict[str, dict[str, Any]]:
    return {str(alpha): {"alpha": float(alpha)} if alpha != AbbaConfig().alpha else {} for alpha in ALPHAS}


def alpha_claims(rows: Rows) -> dict[str, bool]:
    best = min(dict.fromkeys(row["case"] for row in rows), key=lambda case: average(rows, case))
    return {f"the lowest loss is at an α from 16 to 32 (at {best})": 16 <= int(best) <= 32,
            "16 is significantly below 4": below(rows, "16", "4"),
            "16 is significantly below 64": below(rows, "16", "64")}


# --- projections ---


def placement_cases(rank: int, full: bool) -> dict[str, dict[str, Any]]:
    return {target.removesuffix("_proj"): {"targets": (target,)} for target in TARGETS}


def placement_claims(rows: Rows) -> dict[str, bool]:
    least, middle, most = (mean(rows, [target.removesuffix("_proj") for target in group]) for group in GROUPS.values())
    return {"value and up are significantly below query and key": order(middle, least) < 0,
            "gate, output and down are significantly below value and up": order(most, middle) < 0}


SWEEPS = {
    "init_strategies": Sweep(
        "start", start_cases, "ABBA's own start is the best of six (Mistral-7B, GSM8K / MATH, in the table), closely followed by "
        "the one with the pairs exchanged. As the other four are read here (starts.py), their ΔW is not 0 at first, and the "
        "frozen weight takes it up, as in PiSSA",
        {start.label: start.paper for start in STARTS.values()}, start_claims),
    "rank_split": Sweep(
        "r1/r2", split_cases, "equal ranks are the best split of r = 32 (GSM8K / MATH): 4/28 64.43 / 17.01, 8/24 63.91 / 17.20, "
        "12/20 64.29 / 18.22, 16/16 66.26 / 18.08", {}, split_claims),
    "alpha": Sweep(
        "α", alpha_cases, "α from 16 to 32 is best (Llama-3.2-3B, average of the eight tasks, in the table)",
        {"4": "82.43", "8": "82.97", "16": "84.04", "24": "84.01", "32": "84.08", "48": "81.88", "64": "76.36"}, alpha_claims),
    "total_rank": Sweep(
        "r1 + r2", rank_cases, "a total rank of 32 is better than 16, and more does not help (GSM8K / MATH, in the table)",
        {"16": "64.97 / 18.06", "32": "66.26 / 18.08", "64": "65.05 / 17.98", "128": "65.73 / 17.96"}, rank_claims),
    "placement": Sweep(
        "adapted projection", placement_cases, "one kind of projection adapted alone: query and key matter least, then value and "
        "up; gate, output and down most", {target: group for group, targets in (
            (group, [target.removesuffix("_proj") for target in targets]) for group, targets in GROUPS.items())
            for target in targets}, placement_claims),
}


# --- experiments ---


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    runs, fields = Runs(options), settings(options)
    first = Run("abba", 0, **fields)
    cases = SWEEPS[name].cases(first.rank, options.full)
    rows = runs.all(((case, Run("abba", seed, **{**fields, **changes})) for seed in range(options.seeds)
                     for case, changes in cases.items()), name)
    return {"settings": asdict(first), "rows": rows, **runs.cost()}


def draw(name: str, results: dict[str, Any], path: Path) -> None:
    """Held-out loss, training loss and accuracy by case."""
    rows = results["rows"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    draw_points(left, rows, cases, loss, "tab:red")
    left.set_title("held-out loss of the right answers", fontsize=10)
    draw_points(middle, rows, cases, lambda row: row.get("training_loss"), "tab:blue")
    middle.set_title("training loss, last tenth", fontsize=10)
    for metric, color, shift in (("acc", "tab:gray", -0.1), ("acc_norm", "tab:green", 0.1)):
        draw_points(right, rows, cases, partial(held_out, metric=metric), color, metric, shift)
    right.set_title("accuracy, mean of the tasks", fontsize=10)
    place_legend(right)
    for axes in (left, middle, right):
        axes.set_xlabel(SWEEPS[name].title)
    figure.savefig(path, dpi=130)


def summary(name: str, results: dict[str, Any]) -> str:
    """Holds if all of the sweep's claims about the held-out loss are true."""
    sweep, rows = SWEEPS[name], results["rows"]
    claims = sweep.claims(rows)
    lines = [f"{verdict(claims.values())}. The paper: {sweep.paper}. Here, by the held-out loss "
             "(a \"no\" to a significant difference may be a tie):", ""]
    lines += [f"- {claim}: {'yes' if true else 'no'}" for claim, true in claims.items()]
    head = f"| {sweep.title} | trained | {HEADINGS} |" + (" paper |" if sweep.numbers else "")
    lines += ["", head, "|---" * (head.count("|") - 1) + "|"]
    for case in dict.fromkeys(row["case"] for row in rows):
        trained = next(row["trainable"] for row in rows if row["case"] == case)
        number = f" {sweep.numbers.get(case, '')} |" if sweep.numbers else ""
        lines.append(f"| {case} | {trained:,} | {cells(rows, case)} |{number}")
    return "\n".join([*lines, "", f"{conditions(results)}. Mean ± standard deviation over seeds."])


EXPERIMENTS = [Experiment(name, partial(measure, name), partial(draw, name), partial(summary, name)) for name in SWEEPS]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    chooser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chooser.add_argument("experiment", choices=SWEEPS, help="followed by its options; --help after it lists them")
    name = chooser.parse_args(arguments[:1]).experiment
    experiment = next(experiment for experiment in EXPERIMENTS if experiment.name == name)
    options = parser(__doc__)
    options.prog = f"sweeps.py {name}"
    return common.main(experiment, options, arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
