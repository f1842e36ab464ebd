"""Time, bandwidth and arithmetic rate of the three operators, beside torch's matmuls and the least time that a GPU needs.

    python benchmarks/bench_ops.py --device cpu --quick
    python benchmarks/bench_ops.py --shapes 4096x4096 --tokens 512 8192 --ranks 32

Writes ops.csv (a row per case and method) and ops.json (what was run, where, the measured peaks, what failed) to --out after
each case, and prints a summary. What fails has no row, and the exit status is then 1. The methods:

    abba_ext    the operator
    composite   torch matmuls with a Khatri–Rao operand that each call forms: what runs where no kernel covers a call
    gemm        one matmul (cuBLAS) with an operand that lies in memory ready-made, whose making is not counted; for
                factor_grad the product vᵀx [R, D] alone, which the operator contracts further
"""
import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from harness import (TOLERANCE, by_case, device_name, metadata, noted, notes, relative_error, report, slug, table,
                     time_interleaved, write_results)
from shapes import DTYPES, Grid, default_grid, parse_shape
from torch import Tensor
from tqdm import tqdm

from abba_ext import ops, reference

OPS = ("project", "expand_", "factor_grad")
METHODS = ("abba_ext", "composite", "gemm")
SCALE = 0.5
ROW_METADATA = ("device", "device_type", "threads", "torch", "abba_ext", "commit", "sm90")
PEAK_GEMM = 8192  # rows and columns of the product that the arithmetic peak is measured with
PEAK_COPY = 2**31  # bytes of the copy that the bandwidth is measured with


class OpCase(NamedTuple):
    """x or y [tokens, features]; r1 = r2 = rank/2; factors [r, D] ("rD", as A lies) or [D, r] ("Dr", as B lies)."""

    op: str
    features: int
    layout: str
    tokens: int
    rank: int
    dtype: str

    @property
    def columns(self) -> int:
        """R = r1·r2."""
        return (self.rank // 2) ** 2

    def flops(self) -> int:
        """2·T·R·D, of each of the operators."""
        return 2 * self.tokens * self.columns * self.features

    def min_bytes(self, factor_bytes: int) -> int:
        """What must pass the memory once: x or y [T, D] (y twice), u or v [T, R], the factors (and their gradients)."""
        element = DTYPES[self.dtype].itemsize
        rows = self.tokens * self.features * (2 if self.op == "expand_" else 1) + self.tokens * self.columns
        factors = self.rank * self.features * (2 if self.op == "factor_grad" else 1)
        return rows * element + factors * factor_bytes


class Peaks(NamedTuple):
    """What the device reached in this run: a large product of random matrices, and a large copy, read and written."""

    flops_per_s: dict[str, float]
    bytes_per_s: float

    def least_ms(self, case: OpCase, factor_bytes: int) -> float:
        """The roofline's time."""
        return 1e3 * max(case.flops() / self.flops_per_s[case.dtype], case.min_bytes(factor_bytes) / self.bytes_per_s)


def op_cases(grid: Grid) -> list[OpCase]:
    """Every operator on both sides of every layer, without repetitions."""
    sides = [(features, layout) for n, m in grid.shapes for features, layout in ((n, "rD"), (m, "Dr"))]
    return [OpCase(op, features, layout, tokens, rank, dtype) for dtype in grid.dtypes for rank in grid.ranks
            for features, layout in dict.fromkeys(sides) for tokens in grid.tokens for op in OPS]


# --- one case ---


class Call:
    """A step of the harness: function(x, out) for rotating x, v and y; y is restored before each run, untimed."""

    def __init__(self, function: Callable[..., object], inputs: list[tuple[Tensor, ...]], restored: Tensor | None):
        self.function, self.inputs, self.restored = function, inputs, restored
        self.runs = 0

    def prepare(self) -> None:
        self.arguments = self.inputs[self.runs % len(self.inputs)]
        self.runs += 1
        if self.restored is not None:
            self.arguments[0].copy_(self.restored)

    def run(self) -> object:
        return self.function(*self.arguments)


class Problem:
    """The tensors of a case: x (or y) [T, D], v (or u) [T, R], f1, f2 and the Khatri–Rao operand [R, D] in x's dtype."""

    def __init__(self, case: OpCase, factor_dtype: torch.dtype, device: torch.device, seed: int = 0):
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

        dtype, half = DTYPES[case.dtype], case.rank // 2
        self.case = case
        self.x = normal(case.tokens, case.features, dtype=dtype)
        self.v = normal(case.tokens, case.columns, dtype=dtype, scale=case.columns**-0.5)
        self.f1, self.f2 = (normal(half, case.features, dtype=factor_dtype) for _ in range(2))
        if case.layout == "Dr":
            self.f1, self.f2 = (f.t().contiguous().t() for f in (self.f1, self.f2))
        self.kr = reference.khatri_rao(self.f1, self.f2).to(dtype)

    def function(self, method: str) -> Callable[[Tensor, Tensor], object]:
        """(x or y, v or u) → the result; expand_ writes into y and returns it."""
        f1, f2, kr = self.f1, self.f2, self.kr

        def expand(y: Tensor, u: Tensor) -> Tensor:
            ops.expand_(y, u, f1, f2, SCALE)
            return y

        def expand_composite(y: Tensor, u: Tensor) -> Tensor:
            return y.addmm_(u, reference.khatri_rao(f1, f2).to(y.dtype), alpha=SCALE)

        return {
            ("project", "abba_ext"): lambda x, v: ops.project(x, f1, f2),
            ("project", "composite"): lambda x, v: reference.project(x, f1, f2),
            ("project", "gemm"): lambda x, v: x @ kr.t(),
            ("expand_", "abba_ext"): expand,
            ("expand_", "composite"): expand_composite,
            ("expand_", "gemm"): lambda y, u: y.addmm_(u, kr, alpha=SCALE),
            ("factor_grad", "abba_ext"): lambda x, v: ops.factor_grad(x, v, f1, f2, SCALE),
            ("factor_grad", "composite"): lambda x, v: reference.factor_grad(x, v, f1, f2, SCALE),
            ("factor_grad", "gemm"): lambda x, v: v.t() @ x,
        }[self.case.op, method]

    def truth(self) -> tuple[Tensor, ...]:
        """The operator's results in fp64; of factor_grad also P = vᵀx, for "gemm"."""
        x, v, f1, f2 = (t.double() for t in (self.x, self.v, self.f1, self.f2))
        kr = reference.khatri_rao(f1, f2)
        if self.case.op == "project":
            return (x @ kr.t(),)
        if self.case.op == "expand_":
            return (x + SCALE * (v @ kr),)
        return *reference.factor_grad(x, v, f1, f2, SCALE), v.t() @ x

    def error(self, method: str, truth: tuple[Tensor, ...]) -> float:
        """The largest relative error of the results, or an AssertionError if it exceeds the dtype's tolerance."""
        got = self.function(method)(self.x.clone(), self.v)
        got = got if isinstance(got, tuple) else (got,)
        wanted = truth
        if self.case.op == "factor_grad":
            wanted = truth[2:] if method == "gemm" else truth[:2]
        largest = max(relative_error(g, w) for g, w in zip(got, wanted, strict=True))
        tolerance = TOLERANCE[self.x.dtype]
        if not largest <= tolerance:
            raise AssertionError(f"{method} differs from the definition of {self.case.op} at {tuple(self.case)}: relative "
                                 f"error {largest:.1e}, tolerance {tolerance:.0e}")
        return largest

    def call(self, method: str, copies: int) -> Call:
        """The timed call on rotating copies of what it is given."""
        inputs = [(self.x.clone(), self.v.clone()) for _ in range(copies)]
        return Call(self.function(method), inputs, self.x if self.case.op == "expand_" else None)


@torch.no_grad()
def run_case(case: OpCase, methods: tuple[str, ...], factor_dtype: torch.dtype, seconds: float, device: torch.device,
             peaks: Peaks | None, failures: list[str] | None = None) -> list[dict]:
    """Verifies and times every method on one case: a CSV row for each.

    Args:
        case: The operator and its shapes.
        methods: Names out of METHODS.
        factor_dtype: The factors' dtype.
        seconds: Time for the timed rounds.
        device: Where it runs.
        peaks: The roofline, if there is one.
        failures: Where methods that fail are noted; None to raise what they raise.
    """
    problem = Problem(case, factor_dtype, device)
    truth = problem.truth()
    errors, note = {}, notes(failures, case)
    for method in methods:
        with note(method):
            errors[method] = problem.error(method, truth)
    del truth
    copies = 4 if device.type == "cuda" else 1
    calls = {method: problem.call(method, copies) for method in errors}
    timings = time_interleaved(calls, seconds, device, max_rounds=100, launch_ahead=True, note=note)
    least_ms = peaks.least_ms(case, factor_dtype.itemsize) if peaks else None
    rows = []
    for method, timing in timings.items():
        seconds = timing.median_ms / 1e3
        rows.append({
            **case._asdict(), "factor_dtype": str(factor_dtype).removeprefix("torch."), "method": method,
            "error": errors[method],
            **{f"{name}_us": 1e3 * getattr(timing, f"{name}_ms") for name in ("median", "p20", "p80", "min")},
            "wait_share": timing.wait_share, "runs": timing.runs,
            "gb_per_s": case.min_bytes(factor_dtype.itemsize) / seconds / 1e9, "tflop_per_s": case.flops() / seconds / 1e12,
            "roofline_us": 1e3 * least_ms if peaks else "",
            "roofline_share": least_ms / timing.median_ms if peaks else ""})
    return rows


# --- what the device can do ---


@torch.no_grad()
def measure_peaks(dtypes: tuple[str, ...], device: torch.device, size: int = PEAK_GEMM, copied: int = PEAK_COPY) -> Peaks:
    """The rates of a square product of random matrices in each dtype, and of a copy in memory (medians)."""
    def median_s(function: Callable[[], object]) -> float:
        timing = time_interleaved({"": Call(function, [()], None)}, 0.0, device, warmup=3, min_rounds=15, launch_ahead=True)
        return timing[""].median_ms / 1e3

    flops_per_s = {}
    for name in dtypes:
        a, b = (torch.randn(size, size, device=device).to(DTYPES[name]) for _ in range(2))
        out = torch.empty_like(a)
        flops_per_s[name] = 2 * size**3 / median_s(functools.partial(torch.mm, a, b, out=out))
    source = torch.randint(0, 256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Peaks(flops_per_s, 2 * copied / median_s(lambda: target.copy_(source)))


# --- the command line ---


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; None reads sys.argv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a small grid, about a minute on 2 CPU cores or a GPU")
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="INxOUT", help="layers; both sides are measured")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="T")
    parser.add_argument("--ranks", nargs="+", type=int, metavar="R", help="r1 + r2, even")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES))
    parser.add_argument("--factors", choices=("fp32", "same"), default="fp32",
                        help="dtype of the factors: float32 masters, as in training, or that of x")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--budget", type=float, metavar="SECONDS",
                        help="timing of all cases together (default: 20 with --quick, else 0.2 per case)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device-name>")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    grid = default_grid(device.type, options.quick)
    options.grid = Grid(*(tuple(given) if given else value for given, value in
                          zip((options.shapes, options.tokens, options.ranks, options.dtypes), grid, strict=True)))
    if odd := [rank for rank in options.grid.ranks if rank < 2 or rank % 2]:
        parser.error(f"ranks must be even and at least 2 (r1 = r2 = rank/2), got {odd[0]}")
    options.cases = op_cases(options.grid)
    options.budget = options.budget if options.budget is not None else 20 if options.quick else 0.2 * len(options.cases)
    options.out = options.out or Path(__file__).parent / "results" / slug(device_name(device))
    return options


def summary(rows: list[dict], methods: tuple[str, ...]) -> str:
    """One line per case: times, rates of the operator, and how it compares."""
    others = [method for method in methods if method != "abba_ext"] if "abba_ext" in methods else []
    header = ["op", "dtype", "D", "factors", "T", "r", *(f"{method}, µs" for method in methods), "TFLOP/s", "GB/s", "roofline",
              *(f"/{method}" for method in others)]
    lines = []
    for key, by_method in by_case(rows, OpCase._fields).items():
        case, own = OpCase(*key), by_method[methods[0]]
        share = own["roofline_share"]
        lines.append([case.op, case.dtype, str(case.features), case.layout, str(case.tokens), str(case.rank),
                      *(f"{by_method[method]['median_us']:.1f}" for method in methods), f"{own['tflop_per_s']:.3g}",
                      f"{own['gb_per_s']:.4g}", f"{share:.0%}" if share else "–",
                      *(f"{own['median_us'] / by_method[method]['median_us']:.2f}" for method in others)])
    return table(header, lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    meta = metadata(device)
    peaks = measure_peaks(options.grid.dtypes, device) if device.type == "cuda" else None
    about = {**meta, "methods": list(options.methods), "factors": options.factors, "grid": options.grid._asdict(),
             "budget_seconds": options.budget, "peaks": peaks._asdict() if peaks else None}
    rows, failures = [], []
    progress = tqdm(options.cases, unit="case", file=sys.stderr)
    for case in progress:
        progress.set_postfix_str(f"{case.op} {case.dtype} D={case.features} T={case.tokens} r={case.rank}")
        factor_dtype = DTYPES[case.dtype] if options.factors == "same" or case.dtype == "fp64" else torch.float32
        with noted(failures, str(case)):
            rows += [{**row, **{key: meta[key] for key in ROW_METADATA}}
                     for row in run_case(case, options.methods, factor_dtype, options.budget / len(options.cases), device, peaks,
                                         failures)]
        write_results(options.out / "ops", rows, {**about, "failures": failures})
    print(summary(rows, options.methods))
    if peaks:
        rates = ", ".join(f"{rate / 1e12:.0f} TFLOP/s in {dtype}" for dtype, rate in peaks.flops_per_s.items())
        print(f"\nroofline: {rates}, {peaks.bytes_per_s / 1e12:.2f} TB/s, both measured in this run")
    print(f"\n{meta['device']}, {meta['threads']} threads, torch {meta['torch']}, commit {meta['commit'] or 'unknown'}; "
          f"{options.out / 'ops.csv'}")
    return report(failures)


if __name__ == "__main__":
    sys.exit(main())
