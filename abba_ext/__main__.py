"""Command line: `python -m abba_ext info` says what is installed, how it was built and which path a shape takes."""
import argparse
import importlib.metadata
import platform
import sys

import torch

from . import __version__, ops
from .functional import kernel_plan

_SHAPES = ((1024, 768, 768), (1024, 768, 3072), (1024, 2048, 2048))


def info(args: argparse.Namespace) -> None:
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="abba-ext", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="versions, build flags, devices, and the path a shape takes")
    command.add_argument("--shape", type=int, nargs=3, metavar=("T", "n", "m"), help="tokens, in_features, out_features")
    command.add_argument("--ranks", type=int, nargs=2, default=(16, 16), metavar=("r1", "r2"))
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"))
    command.add_argument("--device", default="cpu")
    command.set_defaults(run=info)
    args = parser.parse_args(argv)
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
