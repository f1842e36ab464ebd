"""Command line of abba_ext: what is installed, what an adapter holds, conversion between formats, merging on disk."""
import argparse
import importlib.metadata
import json
import platform
import sys
import warnings
from typing import Any

import torch

from . import __version__, ops
from .config import DTYPES
from .formats import READ_FORMATS, WRITE_FORMATS
from .functional import kernel_plan

_SHAPES = ((1024, 768, 768), (1024, 768, 3072), (1024, 2048, 2048))
_INTERRUPTED = 130  # as shells have it for SIGINT


def info(args: argparse.Namespace) -> int:
    """Prints versions, build flags, devices, and the plan of some shapes or of the one given."""
    build = ops.build_info()
    rows = [("abba_ext", __version__), ("python", platform.python_version()), ("torch", torch.__version__)]
    for package in ("transformers", "peft", "accelerate", "safetensors"):
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    rows += [("built with torch", build["torch"]), ("compiler", build["compiler"]), ("flags", build["flags"]),
             ("nvcc", build["nvcc"] or "none"),
             ("CUDA architectures", build["cuda"] or "none (CUDA tensors run the composite of torch matmuls)"),
             ("CPU", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")]
    rows += [(f"cuda:{i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    for key, value in rows:
        print(f"{key:20s} {value}")
    r1, r2 = args.ranks
    shapes = [tuple(args.shape)] if args.shape else _SHAPES
    dtypes = [args.dtype] if args.dtype else ["float32", "bfloat16"]
    for tokens, n, m in shapes:
        for dtype in dtypes:
            plan = kernel_plan(tokens, n, m, r1, r2, getattr(torch, dtype), args.device)
            print(f"T={tokens} n={n} m={m} r1={r1} r2={r2} {dtype} {args.device}: {plan.plan}, {plan.kernel} ({plan.reason})")
    return 0


def merge(args: argparse.Namespace) -> int:
    """Merges on disk, with a progress bar; an interrupted merge can go on later."""
    from .merging import merge_checkpoint, partial_folder

    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError("merging on disk needs tqdm: pip install 'abba_ext[cli]'") from None
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, disable=True if args.quiet else None) as bar:

        def progress(written: int, total: int) -> None:
            bar.total = total
            bar.update(written - bar.n)

        try:
            out = merge_checkpoint(args.base, args.adapter, args.out, safe=args.safe, force=args.force, progress=progress)
        except KeyboardInterrupt:
            bar.close()
            if not partial_folder(args.out).exists():
                raise
            print(f"abba-ext: interrupted; {partial_folder(args.out)} keeps what was merged: the same command goes on from "
                  "there, or delete it", file=sys.stderr)
            return _INTERRUPTED
    if not args.quiet:
        print(out)
    return 0


def inspect(args: argparse.Namespace) -> int:
    """Prints ranks, scales and norms of every layer; the status is 1 if a parameter trained in full is not finite. Factors that
    are not finite are bad input."""
    from .inspection import inspect_adapter, plot_adapter

    report = inspect_adapter(args.adapter, args.base)
    if args.plot:
        plot_adapter(report, args.plot)
    if args.json:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        _print_report(report)
    broken = [entry["name"] for entry in report["trained"] if not entry["finite"]]
    for name in broken:
        print(f"abba-ext: error: {name} holds NaN or infinity", file=sys.stderr)
    return 1 if broken else 0


def convert(args: argparse.Namespace) -> int:
    """Writes an adapter in another format, and prints what truncation costs."""
    from .base_checkpoint import BaseCheckpoint
    from .formats import convert_adapter

    model = BaseCheckpoint(args.base).model if args.base else None
    report = convert_adapter(args.adapter, args.out, args.to, format=args.source, scaling=args.scaling, rank=args.rank,
                             dtype=args.dtype, model=model, task_type=args.task_type)
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    rank = f" of rank {report['rank']}" if "rank" in report else ""
    print(f"{args.out}: {report['format']}{rank}, {len(report['layers'])} layers, from {report['source']}")
    for name, layer in report["layers"].items():
        if layer.get("relative_error"):
            print(f"{name}: rank {layer['rank']}, relative error {layer['relative_error']:.3g}")
    return 0


def _print_report(report: dict[str, Any]) -> None:
    names = {"name": "layer", "r1": "r1", "r2": "r2", "scale": "s", "parameters": "parameters", "norm_A1": "‖A1‖",
             "norm_B1": "‖B1‖", "norm_A2": "‖A2‖", "norm_B2": "‖B2‖", "norm_update": "‖ΔW‖", "norm_base": "‖W0‖",
             "ratio": "‖ΔW‖/‖W0‖"}
    entries = [*report["layers"], *report["trained"], {"name": "total"} | report["total"]]
    columns = [key for key in names if any(key in entry for entry in entries)]
    header, rows = [names[key] for key in columns], [[_cell(entry.get(key)) for key in columns] for entry in entries]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table(header[0], box=None)
    for name in header[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 1000, highlight=False, markup=False).print(table)


def _cell(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,d}" if isinstance(value, int) else f"{value:.4g}"


def _scaling(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _device(text: str) -> str:
    try:
        torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"must be a device of torch, such as cpu or cuda:0, got {text!r}") from None
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="abba-ext", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("info", help="versions, build flags, devices, and the path a shape takes")
    command.add_argument("--shape", type=_positive, nargs=3, metavar=("T", "n", "m"), help="tokens, in_features, out_features")
    command.add_argument("--ranks", type=_positive, nargs=2, default=(16, 16), metavar=("r1", "r2"))
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"))
    command.add_argument("--device", type=_device, default="cpu")
    command.set_defaults(run=info)

    command = commands.add_parser("merge", help="write base + update as a new model folder, without loading the model")
    command.add_argument("base", help="folder of the base model, or its hub name if it is in the local cache")
    command.add_argument("adapter", help="folder or file of the adapter, in any format")
    command.add_argument("out", help="the new folder; it appears when all is written, and an interrupted merge can go on")
    command.add_argument("--safe", action="store_true", help="refuse a result that holds NaN or infinity")
    command.add_argument("--force", action="store_true", help="replace a model folder once the new one is complete: all files in "
                         "it are deleted; folders in it that the base does not have are refused")
    command.add_argument("--quiet", action="store_true", help="no progress bar and no output")
    command.set_defaults(run=merge)

    command = commands.add_parser("inspect", help="ranks, scales and norms of every layer of an adapter",
                                  description="The status is 1 if a parameter trained in full is not finite, 2 if a factor is "
                                              "not.")
    command.add_argument("adapter", help="folder or file of the adapter, in any format")
    command.add_argument("--base", help="base model, to compare ‖ΔW‖ with ‖W0‖")
    command.add_argument("--plot", metavar="FILE", help="draw ‖ΔW‖/‖W0‖, or ‖ΔW‖ without --base, into a picture")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=inspect)

    command = commands.add_parser("convert", help="write an adapter in another format; LoRA is exact",
                                  description="abba: abba_ext's own format; peft, loha, lora: PEFT's ABBA, LoHa and LoRA; "
                                              "authors: the paper's code; lycoris: LyCORIS and its forks.")
    command.add_argument("adapter", help="folder or file of the adapter")
    command.add_argument("out", help="the new folder")
    command.add_argument("--to", required=True, choices=WRITE_FORMATS)
    command.add_argument("--from", dest="source", default="auto", choices=("auto", *READ_FORMATS),
                         help="format of the adapter, where the files do not tell")
    command.add_argument("--base", help="base model, to look the layers up in: their kinds, and flattened names of LyCORIS files")
    command.add_argument("--rank", type=_positive, help="truncate a LoRA to this rank; by default it is r1·r2, which is exact")
    command.add_argument("--scaling", type=_scaling, help="what s is, where the files do not say: paper (α²/√(r1·r2)), "
                         "official (α), peft (α/r) or a number, s itself")
    command.add_argument("--dtype", choices=DTYPES, help="of the factors (default: float32 for lora, else as they are)")
    command.add_argument("--task-type", help="PEFT's, such as CAUSAL_LM; by default the adapter's")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=convert)
    return parser


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"abba-ext: warning: {message}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 1 (inspect: a parameter trained in full is not finite), 2 (bad usage
    or input) or 130 (interrupted)."""
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return args.run(args)
        except KeyboardInterrupt:
            print("abba-ext: interrupted", file=sys.stderr)
            return _INTERRUPTED
        except (OSError, ValueError, TypeError, ImportError) as error:
            if args.debug:
                raise
            print(f"abba-ext: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
