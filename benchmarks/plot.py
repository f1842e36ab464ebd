"""Redraws the pictures of a benchmark run and rewrites the README's tables from the files of the results.

    python benchmarks/plot.py [benchmarks/results/<device-name>]

Without a folder it takes the results measured last. Writes layer.png beside layer.csv and train.png beside train.csv, and
replaces what stands between <!-- bench:begin --> and <!-- bench:end --> in the README, likewise "train" and "demo", if it has
these markers; "bench-gpu" and "train-gpu" for results of a GPU. The demo's results are what examples/finetune_commonsense.py wrote with --output <folder>/demo/<method>.
"""
import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import harness
import matplotlib
import model_methods
from baselines import METHODS
from harness import read_csv
from shapes import Case

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = {"lora_peft": "#9ecae1", "lora_inplace": "#4292c6", "loha_peft": "#fdae6b", "abba_eager": "#bdbdbd",
           "abba_ext": "#d7301f"}
OTHER_COLOURS = ("#c7e9c0", "#74c476", "#dadaeb", "#9e9ac8", "#e7cb94", "#636363")
TRAIN_COLOURS = {"base": "#525252", "lora": "#9ecae1", "lora_inplace": "#4292c6", "loha": "#fdae6b", "abba_eager": "#bdbdbd",
                 "abba": "#d7301f"}
MODE_NAMES = {"full": "training step", "forward": "forward", "backward": "backward"}
MIB = 2**20
GIB = 2**30
ERROR_BARS = {"ecolor": "black", "elinewidth": 0.7}
DISTURBED = 0.05  # share of a run that threads waited for a core, from which on it is told

ByCase = dict[Case, dict[str, dict[str, str]]]


def by_case(rows: list[dict[str, str]], rank: int) -> ByCase:
    """The rows of one rank as {case: {method: row}}, in the order of the file."""
    return {Case(*map(int, key[:4]), key[4]): methods for key, methods in harness.by_case(rows, Case._fields).items()
            if int(key[Case._fields.index("rank")]) == rank}


def names_of(cases: Iterable[dict[str, dict[str, str]]]) -> list[str]:
    """The methods, of which some may have failed in some cases."""
    return list(dict.fromkeys(name for methods in cases for name in methods))


def relative_time(methods: dict[str, dict[str, str]], name: str) -> float:
    """A method's median time over the frozen base's."""
    return float(methods[name]["median_ms"]) / float(methods["base"]["median_ms"])


def spread(row: dict[str, str], unit_ms: float) -> tuple[float, float]:
    """How far the 20th and the 80th percentile of a row's times lie below and above the median."""
    low, median, high = (float(row[f"{name}_ms"]) / unit_ms for name in ("p20", "median", "p80"))
    return median - low, high - median


def draw(cases: ByCase, path: Path) -> None:
    """Time relative to the frozen base as grouped bars: a row of panels per dtype, a panel per layer, a group per T.

    Lines span the 20th to the 80th percentile of a method's runs.
    """
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    layers = list(dict.fromkeys(case.layer for case in cases))
    names = [name for name in names_of(cases.values()) if name != "base"]
    spare = iter(OTHER_COLOURS)
    colours = {name: COLOURS.get(name) or next(spare, "#000000") for name in names}
    groups = max(Counter((case.dtype, case.layer) for case in cases).values())
    width, height = max(7, len(layers) * (0.6 + 0.17 * groups * len(names))), 2.6 * len(dtypes) + 0.9  # inches
    figure, axes = plt.subplots(len(dtypes), len(layers), sharey="row", squeeze=False, layout="constrained",
                                figsize=(width, height))
    bar = 0.84 / len(names)
    for dtype, row in zip(dtypes, axes, strict=True):
        for layer, ax in zip(layers, row, strict=True):
            chosen = [(case, methods) for case, methods in cases.items() if (case.dtype, case.layer) == (dtype, layer)]
            for i, name in enumerate(names):
                ax.bar([group + (i + 0.5) * bar - 0.42 for group in range(len(chosen))],
                       [relative_time(methods, name) for _, methods in chosen], bar, color=colours[name],
                       yerr=list(zip(*(spread(methods[name], float(methods["base"]["median_ms"]))
                                       for _, methods in chosen), strict=True)),
                       error_kw=ERROR_BARS, label=METHODS[name].label, zorder=2)
            ax.axhline(1, color="black", linewidth=1, zorder=3)
            ax.set_title(f"{layer}, {dtype}", fontsize=10)
            ax.set_xticks(range(len(chosen)), [f"T={case.tokens}" for case, _ in chosen], fontsize=9)
            ax.grid(axis="y", linewidth=0.4, zorder=0)
            ax.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("time / frozen base")
    first = next(iter(next(iter(cases.values())).values()))
    figure.suptitle(f"{MODE_NAMES[first['mode']].capitalize()} of one layer relative to the frozen base, equal "
                    f"parameters (r = {first['rank']}); {first['device']}\n(medians; lines: 20th to 80th percentile)",
                    fontsize=10)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(names), 6),
                  frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(cases: ByCase) -> str:
    """Markdown: the frozen base in ms, every method relative to it, and peak memory beyond the frozen base's in MiB."""
    names = [name for name in names_of(cases.values()) if name != "base"]
    first = next(iter(next(iter(cases.values())).values()))
    lines = ["| dtype | layer | T | frozen base, ms | " + " | ".join(METHODS[name].label for name in names) + " |",
             "|---" * (4 + len(names)) + "|"]
    for case, methods in cases.items():
        base_bytes = int(methods["base"]["peak_bytes"])
        cells = [f"{relative_time(methods, name):.2f}×, {(int(methods[name]['peak_bytes']) - base_bytes) / MIB:+.1f} MiB"
                 if name in methods else "–" for name in names]
        lines.append(f"| {case.dtype} | {case.layer} | {case.tokens} | {float(methods['base']['median_ms']):.2f} | "
                     + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{MODE_NAMES[first['mode']].capitalize()} of one layer (T tokens, equal parameter "
                      f"budget r = {first['rank']}): time relative to the frozen layer, and peak memory beyond it. "
                      + medians(row for methods in cases.values() for row in methods.values()) + setting(first)])


# --- the whole model ---


def train_cases(rows: list[dict[str, str]]) -> dict[tuple[str, ...], dict[str, dict[str, str]]]:
    """The rows as {case: {method: row}}, in the order of the file."""
    return harness.by_case(rows, ("size", "layers", "batch", "length", "rank", "dtype", "adapter_dtype", "checkpointing"))


def train_title(row: dict[str, str]) -> str:
    """What distinguishes a case from the others of its file."""
    return f"{row['dtype']}, {row['batch']}×{row['length']}" + (", checkpointing" if row["checkpointing"] == "True" else "")


def train_model(row: dict[str, str]) -> str:
    """The model of a row, in words."""
    return f"Llama of {row['size']} geometry, {row['layers']} layers"


def draw_train(rows: list[dict[str, str]], path: Path) -> None:
    """Tokens per second and peak memory as bars per method: a row of two panels per case.

    Lines span what the 20th and the 80th percentile of a method's times make of the tokens per second.
    """
    cases = list(train_cases(rows).values())
    names = names_of(cases)
    spare = iter(OTHER_COLOURS)
    colours = [TRAIN_COLOURS.get(name) or next(spare, "#000000") for name in names]
    labels = [model_methods.METHODS[name].label for name in names]
    figure, axes = plt.subplots(len(cases), 2, squeeze=False, layout="constrained", sharey=True,
                                figsize=(9, len(cases) * (0.26 * len(names) + 0.6) + 0.5))
    panels = (("tokens_per_s", 1, "tokens/s", "{:.0f}"), ("peak_bytes", GIB, "peak memory, GiB", "{:.2f}"))
    axes[0][0].invert_yaxis()
    for methods, pair in zip(cases, axes, strict=True):
        title = train_title(next(iter(methods.values())))
        for ax, (field, unit, label, number) in zip(pair, panels, strict=True):
            values = [float(methods[name][field]) / unit for name in names]
            lines = [[abs(1 - float(methods[name]["median_ms"]) / float(methods[name][end])) * value
                      for value, name in zip(values, names, strict=True)] for end in ("p80_ms", "p20_ms")]
            bars = ax.barh(labels, values, 0.78, color=colours, xerr=lines if field == "tokens_per_s" else None,
                           error_kw=ERROR_BARS, zorder=2)
            ax.bar_label(bars, fmt=number, padding=2, fontsize=8)
            ax.set_xlabel(label, fontsize=9)
            ax.margins(x=0.12)
            ax.grid(axis="x", linewidth=0.4, zorder=0)
            ax.spines[["top", "right"]].set_visible(False)
        pair[0].set_title(title, fontsize=10, loc="left")
    first = rows[0]
    figure.suptitle(f"Training step of a {train_model(first)}, r = {first['rank']}; {first['device']}\n"
                    "(medians; lines: 20th to 80th percentile of the times)", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def train_table(rows: list[dict[str, str]]) -> str:
    """Markdown: tokens per second and peak memory in GiB, a line per method and a column per case."""
    cases = list(train_cases(rows).values())
    titles = [train_title(next(iter(methods.values()))) for methods in cases]
    lines = ["| method | trained parameters | " + " | ".join(titles) + " |", "|---" * (2 + len(cases)) + "|"]
    for name in names_of(cases):
        cells = [f"{float(methods[name]['tokens_per_s']):.0f}/s, {int(methods[name]['peak_bytes']) / GIB:.2f} GiB"
                 if name in methods else "–" for methods in cases]
        trainable = next(int(methods[name]["trainable"]) for methods in cases if name in methods)
        lines.append(f"| {model_methods.METHODS[name].label} | {trainable:,} | " + " | ".join(cells) + " |")
    first = rows[0]
    waited = max(float(row["wait_share"]) for row in rows)
    disturbed = f" Other processes disturbed it: for {waited:.0%} of the time a thread waited for a core."
    return "\n".join([*lines, "", f"Training step (forward, backward, AdamW) of a {train_model(first)}, equal parameter budget "
                      f"r = {first['rank']}: tokens per second, and peak memory with weights, gradients and optimizer state. "
                      + medians(rows) + setting(first) + disturbed * (waited > DISTURBED)])


def section(name: str, row: dict[str, str]) -> str:
    """Results of a GPU have sections of their own, so that they do not take the place of a CPU's."""
    return f"{name}-gpu" if row["device_type"] == "cuda" else name


def medians(rows: Iterable[dict[str, str]]) -> str:
    """What the times are, in a sentence: of how many runs, and how far at most their 80th percentile is above the 20th."""
    rows = list(rows)
    runs = sorted({int(row["runs"]) for row in rows})
    wide = max(float(row["p80_ms"]) / float(row["p20_ms"]) for row in rows) - 1
    return (f"Medians of {runs[0]}{f' to {runs[-1]}' * (len(runs) > 1)} runs, whose 80th percentile is up to {wide:.0%} "
            "above the 20th. ")


def setting(row: dict[str, str]) -> str:
    """Device, versions and commit of a row."""
    commit = f", commit {row['commit']}" if row["commit"] else ""
    threads = f", {row['threads']} threads" if row["device_type"] != "cuda" else ""
    return f"{row['device']}{threads}, torch {row['torch']}, peft {row['peft']}{commit}."


# --- files ---


def newest_results() -> Path | None:
    """The folder in benchmarks/results whose layer.csv or train.csv was measured last, as the files beside them say."""
    files = [file for name in ("layer", "train") for file in Path(__file__).parent.glob(f"results/*/{name}.json")]
    return max(files, key=lambda file: json.loads(file.read_text(encoding="utf-8"))["date"]).parent if files else None


def picture(text: str, path: Path, readme: Path) -> str:
    """Markdown: a picture with its alternative text, by its path from the README."""
    return f"![{text}]({Path(os.path.relpath(path, readme.parent)).as_posix()})"


def demo_table(folder: Path, readme: Path) -> str:
    """Markdown: the demo's picture, and a row for each method that was run."""
    summaries = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/summary.json"))]
    lines = ["| method | trainable parameters | loss | accuracy | length-normalised |", "|---" * 5 + "|"]
    for run in summaries:
        accuracy, normalised = (f"{run[f'{key}_before']:.1%} → {run[f'{key}_after']:.1%}" for key in ("acc", "acc_norm"))
        method = {"abba": "ABBA", "lora": "LoRA (PEFT)"}[run["method"]]
        lines.append(f"| {method}, r={run['r']} | {run['trainable_parameters']:,} | {run['loss_start']:.2f} → "
                     f"{run['loss_end']:.2f} | {accuracy} | {normalised} |")
    run = summaries[0]
    curve = picture("loss curve and accuracy of the demo", folder / run["method"] / "loss.png", readme)
    return "\n".join([curve, "", *lines, "",
                      f"{run['model']} on {run['data']}: {run['steps']} steps of {run['batch']} questions, lr {run['lr']:g}, "
                      f"{'bf16 autocast' if run['bf16'] else 'fp32'}, accuracy on {run['eval_items']} held-out questions (chance "
                      f"{run['chance']:.1%}), seed {run['seed']}, on a CPU. One run of each: it shows that training works, not "
                      "which method is better."])


def replace_section(readme: Path, name: str, text: str) -> bool:
    """Puts text between the markers of a README's section; False if the file or the markers are missing."""
    begin_mark, end_mark = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    content = readme.read_text(encoding="utf-8") if readme.exists() else ""
    begin, end = content.find(begin_mark), content.find(end_mark)
    if begin < 0 or end < begin:
        return False
    readme.write_text(f"{content[:begin + len(begin_mark)]}\n{text}\n{content[end:]}", encoding="utf-8")
    return True


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", metavar="DIR",
                        help="the folder of layer.csv or train.csv (default: the newest in benchmarks/results)")
    parser.add_argument("--rank", type=int, default=32, help="of layer.csv, the parameter budget that is shown (default 32)")
    parser.add_argument("--readme", type=Path, default=Path(__file__).parent.parent / "README.md")
    options = parser.parse_args(arguments)
    results = options.results or newest_results()
    sections = {}
    if results and (results / "layer.csv").exists():
        cases = by_case(read_csv(results / "layer.csv"), options.rank)
        if not cases or any("base" not in methods for methods in cases.values()):
            parser.error(f"{results / 'layer.csv'} lacks the method 'base' or has no rows of rank {options.rank}")
        draw(cases, results / "layer.png")
        bars = picture("time of a training step relative to the frozen layer", results / "layer.png", options.readme)
        sections[section("bench", next(iter(cases.values()))["base"])] = f"{bars}\n\n{table(cases)}"
    if results and (results / "train.csv").exists():
        rows = read_csv(results / "train.csv")
        draw_train(rows, results / "train.png")
        bars = picture("tokens per second and peak memory of a training step", results / "train.png", options.readme)
        sections[section("train", rows[0])] = f"{bars}\n\n{train_table(rows)}"
    if not sections:
        parser.error(f"no layer.csv or train.csv in {results or 'benchmarks/results'}; run bench_layer.py or bench_train.py "
                     "first")
    if (results / "demo").is_dir():
        sections["demo"] = demo_table(results / "demo", options.readme)
    for name, text in sections.items():
        updated = replace_section(options.readme, name, text)
        print(f"{text}\n\n{options.readme}, section {name}: {'updated' if updated else 'left alone (no markers)'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
