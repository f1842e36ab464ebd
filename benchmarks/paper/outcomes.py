"""What the rows of fine-tuning runs say: means over sources and seeds, and which case is significantly below another."""
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from common import mean_and_margin, significant

Rows = list[dict[str, Any]]


def held_out(row: dict[str, Any], metric: str, part: str = "held_out") -> float | None:
    """A run's mean over the sources of "loss", "acc" or "acc_norm"; None if it diverged."""
    return None if row["diverged"] else statistics.fmean(source[metric] for source in row[part].values())


def over_seeds(rows: Rows, case: str, value: Callable[[dict[str, Any]], float | None]) -> list[float | None]:
    """A case's value for each seed, in order."""
    return [value(row) for row in sorted((row for row in rows if row["case"] == case), key=lambda row: row["seed"])]


def loss(row: dict[str, Any]) -> float | None:
    """The held-out loss."""
    return held_out(row, "loss")


def order(own: Sequence[float | None], other: Sequence[float | None]) -> int:
    """−1 if values over seeds are significantly below others, seed by seed, 1 if above, else 0; None is above every number."""
    if None in own or None in other:
        return (None in own) - (None in other)
    return significant([a - b for a, b in zip(own, other, strict=True)])


def below(rows: Rows, case: str, other: str, value: Callable[[dict[str, Any]], float | None] = loss) -> bool:
    """Whether a case's value, by default its held-out loss, is significantly below another's."""
    return order(over_seeds(rows, case, value), over_seeds(rows, other, value)) < 0


def mean(rows: Rows, cases: Iterable[str]) -> list[float | None]:
    """For each seed the mean held-out loss of several cases; None if one diverged."""
    values = zip(*(over_seeds(rows, case, loss) for case in cases), strict=True)
    return [None if None in seed else statistics.fmean(seed) for seed in values]


def average(rows: Rows, case: str) -> float:
    """A case's mean held-out loss over seeds; infinity if a run diverged."""
    values = over_seeds(rows, case, loss)
    return math.inf if None in values else statistics.fmean(values)


def cell(values: list[float | None], digits: int = 3, scale: float = 1.0) -> str:
    """Mean ± standard deviation over seeds."""
    if None in values:
        return "diverged"
    return f"{scale * statistics.fmean(values):.{digits}f} ± {scale * statistics.stdev(values):.{digits}f}"


def cells(rows: Rows, case: str) -> str:
    """Markdown cells of a case, as in HEADINGS."""
    training = over_seeds(rows, case, lambda row: row.get("training_loss"))
    accuracies = [cell(over_seeds(rows, case, partial(held_out, metric=metric)), 1, 100) for metric in ("acc", "acc_norm")]
    return " | ".join([cell(training), cell(over_seeds(rows, case, loss)), *accuracies])


HEADINGS = "training loss | held-out loss | acc, % | acc_norm, %"


def conditions(results: dict[str, Any]) -> str:
    """Sentences on model, data, steps, what was evaluated, and the cost."""
    run, rows = results["settings"], results["rows"]
    model = run["model"] or "SmolLM2-135M-Instruct"
    steps = max(row.get("steps", 0) for row in rows)
    evaluated = "all" if run["eval_items"] is None else f"{run['eval_items'] * len(run['data'])}"
    return (f"{model} in {run['dtype']}, {steps} steps of {run['batch'] * run['accumulation']} training questions of "
            f"{len(run['data'])} tasks, at most {run['max_length']} tokens; {evaluated} held-out questions, the same for all "
            f"runs. {results['runs']} runs, some of them shared with other experiments here, "
            f"{results['processor_seconds'] / 3600:.1f} hours of processor time on {', '.join(results['devices'])}")


def draw_points(axes: Any, rows: Rows, cases: list[str], value: Callable[[dict[str, Any]], float | None], color: str,
                label: str | None = None, shift: float = 0.0) -> None:
    """A point per seed and case, and the cases' means with 95 % confidence intervals; diverged runs are left out."""
    for x, case in enumerate(cases):
        values = [found for found in over_seeds(rows, case, value) if found is not None]
        axes.plot([x + shift] * len(values), values, ".", color=color, alpha=0.4, markersize=4)
        if len(values) > 1:
            centre, margin = mean_and_margin(values)
            axes.errorbar(x + shift, centre, margin, fmt="o", color=color, capsize=3, label=label)
            label = None
    long = max(map(len, cases)) > 5
    axes.set_xticks(range(len(cases)), cases, fontsize=8, rotation=30 if long else 0, ha="right" if long else "center")
    axes.grid(axis="y", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def place_legend(axes: Any) -> None:
    """Above the points."""
    axes.margins(y=0.15)
    axes.legend(frameon=False, fontsize=8, loc="upper center", ncols=2)
