"""What the experiments of this folder share: the command line, the JSON, the picture, the README's section, the verdict."""
import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
README = HERE / "README.md"
QUICK = ROOT / "build" / "paper"

for folder in (HERE.parent, ROOT / "examples"):  # harness and plot; the commonsense data and model
    sys.path.insert(0, str(folder))

import harness  # noqa: E402
from plot import replace_section  # noqa: E402

# Student's t, two-sided at 5 %, for a mean of 2, 3, … 10 values; of more the last will do.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
HOLDS, PARTLY, FAILS = "**holds**", "**partly**", "**does not hold here**"


@dataclass(frozen=True)
class Experiment:
    """One experiment of the paper.

    Attributes:
        name: Stem of results/<name>.json and results/<name>.png, and name of the README's section.
        measure: Parsed options → the numbers, as JSON-compatible values. Shows its progress with tqdm. A key "seconds" is the
            time they took where this run has found some of them measured before.
        draw: The numbers and a path → writes the picture there.
        summary: The numbers → markdown that begins with a :func:`verdict` and has the measured number beside the paper's.
        repeated: Whether it is measured for each of --seeds; once where nothing varies.
    """

    name: str
    measure: Callable[[argparse.Namespace], dict[str, Any]]
    draw: Callable[[dict[str, Any], Path], None]
    summary: Callable[[dict[str, Any]], str]
    repeated: bool = True


# --- verdicts ---


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean over seeds and its standard error.

    Raises:
        ValueError: Fewer than two values, from which no error can be estimated, or one that is not finite.
    """
    if len(values) < 2:
        raise ValueError(f"values must be of at least two seeds, got {len(values)}")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"values must be finite, got {list(values)}")
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def mean_and_margin(values: Sequence[float]) -> tuple[float, float]:
    """The mean over seeds and half the width of its 95 % confidence interval."""
    mean, error = mean_and_error(values)
    return mean, T95[min(len(values) - 2, len(T95) - 1)] * error


def significant(differences: Sequence[float]) -> int:
    """1 if the 95 % confidence interval of the mean over seeds is above zero, −1 if below, else 0."""
    mean, margin = mean_and_margin(differences)
    return (mean > margin) - (mean < -margin)


def verdict(claims: Iterable[bool]) -> str:
    """"**holds**" if all claims are true, "**does not hold here**" if none is, else "**partly**".

    Raises:
        ValueError: There is no claim.
    """
    claims = list(claims)
    if not claims:
        raise ValueError("claims must hold at least one claim, got none")
    return HOLDS if all(claims) else PARTLY if any(claims) else FAILS


# --- from the command line to the README ---


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a dictionary, whole or not at all.

    Raises:
        ValueError: It holds NaN or infinity.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary in a file of :func:`write_json`."""
    return json.loads(path.read_text(encoding="utf-8"))


def section(experiment: Experiment, document: dict[str, Any], picture: str) -> str:
    """The README's section of an experiment: its summary, its picture, and what the numbers belong to."""
    where, options, results = document["environment"], document["options"], document["results"]
    commit = f", commit {where['commit']}" if where["commit"] else ""
    seeds = f"{options['seeds']} seeds, " if experiment.repeated else ""
    return "\n".join([experiment.summary(results), "", f"![{experiment.name}]({picture})", "",
                      f"{where['device']}, {where['threads']} thread{'s' * (where['threads'] != 1)}, torch {where['torch']}, "
                      f"peft {where['peft']}{commit}; {seeds}"
                      f"{results.get('seconds', document['seconds']) / 60:.0f} min."])


def redraw(experiment: Experiment, results: Path, readme: Path | None) -> None:
    """Draws the picture and, given a README, rewrites its section, from results/<name>.json.

    Raises:
        FileNotFoundError: The experiment has not been measured.
        ValueError: The README has no section of that name.
    """
    document = read_json(results / f"{experiment.name}.json")
    picture = results / f"{experiment.name}.png"
    experiment.draw(document["results"], picture)
    text = section(experiment, document, os.path.relpath(picture, readme.parent) if readme else picture.name)
    print(text)
    if readme and not replace_section(readme, experiment.name, text):
        raise ValueError(f"{readme} has no section <!-- {experiment.name}:begin --> … <!-- {experiment.name}:end -->")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every experiment."""
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs; its numbers mean nothing")
    parser.add_argument("--redraw", action="store_true", help="only the picture and the README, from the JSON")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions, at least two (default 3)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, metavar="DIR",
                        help=f"folder of the JSON and the picture (default {RESULTS.relative_to(ROOT)}, with --quick "
                             f"{QUICK.relative_to(ROOT)})")
    parser.add_argument("--readme", type=Path, metavar="FILE",
                        help=f"file whose section is rewritten (default {README.relative_to(ROOT)}, with --quick none)")


def main(experiment: Experiment, parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> int:
    """Measures an experiment, writes its JSON and picture, rewrites its section of the README, and returns the exit status.

    Args:
        experiment: What to run.
        parser: With the options of its own; gains those of :func:`add_arguments`.
        arguments: The command line.
    """
    add_arguments(parser)
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error(f"--seeds must be at least 2, got {options.seeds}")
    results = options.output or (QUICK if options.quick else RESULTS)
    path = results / f"{experiment.name}.json"
    if options.redraw and not path.exists():
        parser.error(f"no {path}; run without --redraw first")
    if not options.redraw:
        plain = {key: value for key, value in vars(options).items() if key not in ("output", "readme", "redraw")}
        environment = harness.metadata(torch.device(options.device))
        start = time.perf_counter()
        measured = experiment.measure(options)
        write_json(path, {"environment": environment, "options": plain, "seconds": round(time.perf_counter() - start, 1),
                          "results": measured})
    redraw(experiment, results, options.readme or (None if options.quick else README))
    return 0
