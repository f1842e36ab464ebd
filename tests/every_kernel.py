"""Launches every CUDA kernel on small shapes and compares with eager torch: what compute-sanitizer is run on.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python tests/every_kernel.py

Without the caching allocator every tensor ends where its memory ends. Nothing else is computed on the GPU. What is wrong is printed,
the other shapes go on, and the exit status is 1.
"""
import argparse
import itertools
import os
import sys

import torch

from abba_ext import ops, reference

RANKS = ((3, 5), (17, 8), (4, 8), (2, 16), (16, 16), (5, 32), (32, 32), (3, 64))  # each padded r2; R to 64, beyond, and 1024
TOKENS = (10, 20, 40, 130, 1100)  # each form of project and expand_ for few tokens; a tile and more; splits of factor_grad
SCALE = 0.5


def move(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device with the strides it has, gaps left out at both ends."""
    extent = sum((n - 1) * step for n, step in zip(t.shape, t.stride())) + 1
    return t.as_strided((extent,), (1,)).to(device, copy=True).as_strided(t.shape, t.stride())


def check(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    error = ((got.cpu().double() - want.double()).norm() / want.double().norm()).item()
    if not error < 0.02:
        raise AssertionError(f"{name}: relative error {error:.3g} against eager torch")


def run(tokens: int, features: int, r1: int, r2: int, dtype: torch.dtype, layout: str, factor_dtype: torch.dtype,
        row_gap: int, device: torch.device) -> None:
    """The three operators once, with rows of x that lie row_gap elements apart from each other."""
    x = torch.randn(tokens, features + row_gap).to(dtype)[:, :features]
    v = torch.randn(tokens, r1 * r2).to(dtype)
    f1, f2 = (torch.randn(r, features).to(factor_dtype) for r in (r1, r2))
    if layout == "Dr":
        f1, f2 = f1.t().contiguous().t(), f2.t().contiguous().t()
    on_device = [move(t, device) for t in (x, f1, f2, v)]
    name = f"T={tokens} D={features} r1={r1} r2={r2} {dtype} {layout} {factor_dtype} gap={row_gap}"
    plain_x, e1, e2 = x.contiguous(), f1.to(dtype), f2.to(dtype)

    check(f"project {name}", ops.project(*on_device[:3]), reference.project(plain_x, e1, e2))
    grads = ops.factor_grad(on_device[0], on_device[3], *on_device[1:3], SCALE)
    for got, want in zip(grads, reference.factor_grad(plain_x, v, f1, f2, SCALE)):
        check(f"factor_grad {name}", got, want)
    ops.expand_(on_device[0], on_device[3], *on_device[1:3], SCALE)
    moved_back = on_device[0].as_strided((x.stride(0) * (tokens - 1) + features,), (1,)).cpu().as_strided(x.shape, x.stride())
    check(f"expand_ {name}", moved_back, plain_x + reference.expand(v, e1, e2, SCALE))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--family", choices="01", help="1: with the kernels for Hopper (default: both, on such a GPU)")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.manual_seed(0)
    # From 48 tokens for each multiprocessor on, project makes 256 columns in a block.
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    sizes = (*TOKENS, 48 * sms + 5)
    launched = failed = 0
    for family, dtype, layout, (r1, r2) in itertools.product(options.family or ("01" if hopper else "0"),
                                                             (torch.bfloat16, torch.float16), ("rD", "Dr"), RANKS):
        os.environ["ABBA_SM90"] = family
        before = failed
        for tokens in sizes:  # each T meets each of the three
            factor_dtype, row_gap = ((torch.float32, 0), (dtype, 3), (torch.float32, 8))[(launched + launched // len(sizes)) % 3]
            launched += 1
            try:
                run(tokens, 136 if tokens < 1000 else 72, r1, r2, dtype, layout, factor_dtype, row_gap, device)
            except Exception as error:
                failed += 1
                print(f"{type(error).__name__}: {error}", flush=True)
        print(f"family {family}, {dtype}, {layout}, r1={r1} r2={r2}: {len(sizes) - failed + before} of {len(sizes)}", flush=True)
    print(f"{launched} shapes through the three operators on {device}, {failed} of them wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
