"""The layer shapes, token counts, ranks and dtypes that are measured.

A rank is a parameter budget: LoRA of rank r and ABBA with r1 = r2 = r/2 both train r·(m + n) parameters.
"""
import argparse
from itertools import product
from typing import NamedTuple

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class Case(NamedTuple):
    """One layer: W0 [out_features, in_features], x [tokens, in_features]."""

    in_features: int
    out_features: int
    tokens: int
    rank: int
    dtype: str

    @property
    def layer(self) -> str:
        """The layer as "in→out"."""
        return f"{self.in_features}→{self.out_features}"

    def base_flops(self) -> int:
        """Floating-point operations of a frozen linear layer's forward and backward (dx only): 4·T·m·n."""
        return 4 * self.tokens * self.in_features * self.out_features


class Grid(NamedTuple):
    """A product of layers (in_features, out_features), tokens, ranks and dtypes."""

    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    dtypes: tuple[str, ...]

    def cases(self) -> list[Case]:
        """Every combination, dtype by dtype and layer by layer."""
        return [Case(n, m, tokens, rank, dtype) for dtype, rank, (n, m), tokens
                in product(self.dtypes, self.ranks, self.shapes, self.tokens)]


GRIDS = {
    "quick": Grid(((768, 768), (768, 3072), (2048, 2048)), (128, 512, 1024), (32,), ("fp32", "bf16")),
    "cpu": Grid(((768, 768), (768, 3072), (3072, 768), (2048, 2048)), (1, 16, 128, 512, 1024, 2048), (16, 32, 64),
                ("fp32", "bf16")),
    "cuda": Grid(((4096, 4096), (4096, 14336), (14336, 4096), (2048, 2048), (2048, 8192)),
                 (1, 16, 64, 512, 2048, 4096, 8192, 16384), (16, 32, 64), ("bf16",)),
    "cuda_quick": Grid(((4096, 4096), (4096, 14336), (2048, 8192)), (16, 512, 8192), (32,), ("bf16",)),
}


def default_grid(device_type: str, quick: bool) -> Grid:
    """The grid where the command line gives none."""
    return GRIDS[{"cpu": "quick", "cuda": "cuda_quick"}[device_type] if quick else device_type]


def parse_shape(text: str) -> tuple[int, int]:
    """"768x3072" → (in_features, out_features)."""
    try:
        n, m = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a shape is INxOUT, e.g. 768x3072, got {text!r}") from None
    return n, m
