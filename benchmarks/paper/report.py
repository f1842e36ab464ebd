"""Redraws the pictures and rewrites the README's sections of all experiments that have been measured, from their JSON.

    python benchmarks/paper/report.py
"""
import argparse
import importlib
import sys
from pathlib import Path

from common import HERE, README, RESULTS, Experiment, redraw


def experiments() -> list[Experiment]:
    """The EXPERIMENT or EXPERIMENTS of every module in this folder."""
    found = []
    for path in sorted(HERE.glob("*.py")):
        module = importlib.import_module(path.stem)
        found += getattr(module, "EXPERIMENTS", [])
        if hasattr(module, "EXPERIMENT"):
            found.append(module.EXPERIMENT)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the JSON files")
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(arguments)
    for experiment in experiments():
        if (options.results / f"{experiment.name}.json").exists():
            print(f"\n--- {experiment.name} ---\n")
            redraw(experiment, options.results, options.readme)
        else:
            print(f"\n--- {experiment.name}: not measured ---", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
