"""Time, peak memory and error of one adapted linear layer per training step, for all methods in turn.

    python benchmarks/bench_layer.py --device cpu --quick
    python benchmarks/bench_layer.py --shapes 4096x4096 --tokens 2048 8192 --methods base lora_peft abba_ext

Writes layer.csv (a row per case and method) and layer.json (what was run, where, what failed) to --out after each case, and prints
a summary. What fails has no row, and the exit status is then 1.
"""
import argparse
import sys
from pathlib import Path

import torch
from baselines import METHODS, Problem, make_problem, verify
from harness import (MODES, Step, by_case, device_name, metadata, noted, notes, peak_memory, report, slug, table,
                     time_interleaved, write_results)
from shapes import DTYPES, Case, Grid, default_grid, parse_shape
from tqdm import tqdm

DEFAULT_METHODS = ("base", "lora_peft", "lora_inplace", "dora_peft", "hira_peft", "loha_peft", "abba_eager", "abba_ext")
QUICK_METHODS = ("base", "lora_peft", "loha_peft", "abba_eager", "abba_ext")
REFERENCES = ("abba_eager", "loha_peft", "lora_peft")  # the printed ratios of abba_ext
ROW_METADATA = ("device", "device_type", "threads", "torch", "peft", "abba_ext", "commit", "sm90")
MIB = 2**20

# Share of the time budget beside the frozen layer's FLOPs: half precision runs faster, small cases have an overhead.
_DTYPE_COST = {"fp64": 2.0, "fp32": 1.0, "bf16": 0.4, "fp16": 0.4}
_CASE_FLOPS = 2e8


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; None reads sys.argv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a small grid, about two minutes on 2 CPU cores or a GPU")
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="INxOUT")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="T")
    parser.add_argument("--ranks", nargs="+", type=int, metavar="R", help="LoRA's r; ABBA and LoHa have r/2 + r/2")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES))
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "all"])
    parser.add_argument("--mode", choices=MODES, default="full")
    parser.add_argument("--budget", type=float, metavar="SECONDS",
                        help="timing of all cases together, shared out by their FLOPs (default: 75 with --quick, else "
                             "1 per case and method)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device-name>")
    options = parser.parse_args(arguments)
    default = default_grid(torch.device(options.device).type, options.quick)
    options.grid = Grid(*(tuple(given) if given else value for given, value in
                          zip((options.shapes, options.tokens, options.ranks, options.dtypes), default, strict=True)))
    options.methods = options.methods or (QUICK_METHODS if options.quick else DEFAULT_METHODS)
    if "all" in options.methods:
        options.methods = tuple(METHODS)
    options.budget = options.budget or (75 if options.quick else len(options.grid.cases()) * len(options.methods))
    options.out = options.out or Path(__file__).parent / "results" / slug(device_name(torch.device(options.device)))
    return options


def run_case(case: Case, methods: tuple[str, ...], mode: str, seconds: float, device: torch.device,
             failures: list[str]) -> list[dict]:
    """Verifies, measures the memory of and times every method on one case: a CSV row for each.

    Args:
        case: The layer and its input.
        methods: Names out of METHODS.
        mode: What is timed, out of MODES; peak memory is always a full step's.
        seconds: Time for the timed rounds.
        device: Where it runs.
        failures: Where methods that fail are noted.
    """
    torch.compiler.reset()  # otherwise the compiled methods turn to dynamic shapes from the second case on
    problem = make_problem(*case[:4], DTYPES[case.dtype], device)
    inputs = _rotation(problem, device)
    steps, rows, note = {}, [], notes(failures, case)
    for name in methods:
        with note(name):
            layer = METHODS[name].build(problem)
            output_error, grad_error = verify(name, layer, problem)
            parameters = list(layer.parameters.values())
            full = Step(layer.forward, parameters, inputs)
            full.prepare()
            full.run()  # a first run may allocate what stays, such as a compiled graph
            rows.append({**case._asdict(), "method": name, "mode": mode, "note": layer.note,
                         "peak_bytes": peak_memory(full, device), "output_error": output_error, "grad_error": grad_error})
            steps[name] = Step(layer.forward, parameters, inputs, mode)
    timings = time_interleaved(steps, seconds, device, note=note)
    return [{**row, **timings[row["method"]]._asdict()} for row in rows if row["method"] in timings]


def _rotation(problem: Problem, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs (x, dy) of successive runs: on a GPU four copies, so that none is still in the cache."""
    copies = 4 if device.type == "cuda" else 1
    return [(problem.x, problem.dy)] + [(problem.x.detach().clone().requires_grad_(), problem.dy.clone())
                                        for _ in range(copies - 1)]


# --- the printed summary ---


def summary(rows: list[dict], methods: tuple[str, ...], mode: str) -> str:
    """Three tables: times and ratios, peak memory beyond parameters and inputs, and errors against fp64."""
    references = [name for name in REFERENCES if name in methods and "abba_ext" in methods]
    times, memory, accuracy = [], [], []
    for key, by_method in by_case(rows, Case._fields).items():
        case = Case(*key)
        head = [case.dtype, case.layer, str(case.tokens), str(case.rank)]
        ratios = {name: [by_method["abba_ext"][field] / by_method[name][field] for field in ("median_ms", "min_ms")]
                  for name in references}
        times.append(head + [f"{by_method[name]['median_ms']:.2f}" for name in methods]
                     + ["{:.2f} ({:.2f})".format(*ratios[name]) for name in references]
                     + [str(by_method[name]["note"]) for name in methods if name == "abba_ext"])
        memory.append(head + [f"{by_method[name]['peak_bytes'] / MIB:.1f}" for name in methods])
        accuracy.append(head + [f"{by_method[name]['output_error']:.0e}/{by_method[name]['grad_error']:.0e}"
                                for name in methods])
    head = ["dtype", "in→out", "T", "r"]
    mode = {"full": "training step", "forward": "forward", "backward": "backward"}[mode]
    plan = ["plan"] if "abba_ext" in methods else []
    return "\n\n".join([
        f"Time of a {mode}, ms (median); ratios of abba_ext: of the medians (of the minima)\n"
        + table(head + list(methods) + [f"/{name}" for name in references] + plan, times),
        "Peak memory of a training step beyond parameters and inputs, MiB\n" + table(head + list(methods), memory),
        "Relative error against the dense definition in fp64: output/largest of the gradients\n"
        + table(head + list(methods), accuracy)])


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    meta = metadata(device)
    cases = options.grid.cases()
    costs = [case.base_flops() * _DTYPE_COST[case.dtype] + _CASE_FLOPS for case in cases]
    about = {**meta, "mode": options.mode, "methods": list(options.methods), "grid": options.grid._asdict(),
             "budget_seconds": options.budget}
    rows, failures = [], []
    progress = tqdm(list(zip(cases, costs, strict=True)), unit="case", file=sys.stderr)
    for case, cost in progress:
        progress.set_postfix_str(f"{case.dtype} {case.layer} T={case.tokens} r={case.rank}")
        with noted(failures, str(case)):
            rows += [{**row, **{key: meta[key] for key in ROW_METADATA}}
                     for row in run_case(case, options.methods, options.mode, options.budget * cost / sum(costs), device, failures)]
        write_results(options.out / "layer", rows, {**about, "failures": failures})
    print(summary(rows, options.methods, options.mode))
    print(f"\n{meta['device']}, {meta['threads']} threads, torch {meta['torch']}, peft {meta['peft']}, commit "
          f"{meta['commit'] or 'unknown'}; {options.out / 'layer.csv'}")
    return report(failures)


if __name__ == "__main__":
    sys.exit(main())
