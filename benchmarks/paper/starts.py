"""The starts of ABBA's factors that Table 3 compares: the package's own, and others, for experiments only.

    ΔW = s·P1 ⊙ P2,  P1 = B1 A1,  P2 = B2 A2;  SVD(M, i:j) is the part of M in its singular triplets i to j

A start other than ΔW = 0 is taken off the frozen weight, as PiSSA does, so that the model computes W0 at first.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from abba_ext import AbbaLayer, reference
from abba_ext.patching import abba_layers

ITERATIONS = 10  # of the randomised SVD, as in the authors' code
OVERSAMPLING = 16

Pair = tuple[Tensor, Tensor]


def svd_pair(matrix: Tensor, first: int, count: int) -> Pair:
    """A = √Σ Vᵀ and B = U√Σ of the singular triplets first … first + count − 1."""
    u, sigma, v = torch.svd_lowrank(matrix, q=min(first + count + OVERSAMPLING, *matrix.shape), niter=ITERATIONS)
    chosen = slice(first, first + count)
    root = sigma[chosen].sqrt()
    return (v[:, chosen] * root).t().contiguous(), u[:, chosen] * root


def ones(weight: Tensor, layer: AbbaLayer) -> tuple[Pair, Pair]:
    """P1 = SVD(W0, :r1), P2 = 1/s everywhere: ΔW = P1."""
    (m, n), (r1, r2) = weight.shape, layer.abba_ranks
    value = (r2 * layer.abba_scale) ** -0.5
    return svd_pair(weight, 0, r1), (weight.new_full((r2, n), value), weight.new_full((m, r2), value))


def roots(weight: Tensor, layer: AbbaLayer) -> tuple[Pair, Pair]:
    """P1 = SVD(√|W0|, :r1)/√s, P2 = SVD(sign(W0)·√|W0|, :r2)/√s: ΔW approximates W0."""
    r1, r2 = layer.abba_ranks
    root, share = weight.abs().sqrt(), layer.abba_scale**-0.25
    (a1, b1), (a2, b2) = svd_pair(root, 0, r1), svd_pair(weight.sign() * root, 0, r2)
    return (a1 * share, b1 * share), (a2 * share, b2 * share)


def top_and_next(weight: Tensor, layer: AbbaLayer) -> tuple[Pair, Pair]:
    """P1 = SVD(W0, :r1), P2 = SVD(W0, r1:r1+r2)."""
    r1, r2 = layer.abba_ranks
    return svd_pair(weight, 0, r1), svd_pair(weight, r1, r2)


def next_and_top(weight: Tensor, layer: AbbaLayer) -> tuple[Pair, Pair]:
    """P1 = SVD(W0, r2:r1+r2), P2 = SVD(W0, :r2)."""
    r1, r2 = layer.abba_ranks
    return svd_pair(weight, r2, r1), svd_pair(weight, 0, r2)


def second_pair(weight: Tensor, layer: AbbaLayer) -> tuple[Pair, Pair]:
    """P2 = SVD(W0, :r2), A1 Kaiming-uniform, B1 = 0."""
    (m, n), (r1, r2) = weight.shape, layer.abba_ranks
    return (nn.init.kaiming_uniform_(weight.new_empty(r1, n), a=5**0.5), weight.new_zeros(m, r1)), svd_pair(weight, 0, r2)


def narrow(weight: Tensor, layer: AbbaLayer) -> tuple[Pair, Pair]:
    """P1 = SVD(W0, :r1), B2 = 0 and A2 in ±1/√n, as LoRA's A, instead of the authors' ±√(6/n)."""
    return (layer.abba_A1, layer.abba_B1), (layer.abba_A2 * 6**-0.5, layer.abba_B2)


@dataclass(frozen=True)
class Start:
    """A start's name in tables, the paper's accuracies with it (Mistral-7B, GSM8K and MATH), and its factors.

    Attributes:
        label: Its name.
        paper: The paper's two numbers, if it has any.
        factors: W0 [m, n] in fp32 and the layer → (A1, B1), (A2, B2). None leaves what patch_model made.
    """

    label: str
    paper: str
    factors: Callable[[Tensor, AbbaLayer], tuple[Pair, Pair]] | None


STARTS = {
    "ones": Start("SVD and ones", "57.39 / 10.88", ones),
    "roots": Start("SVD of √W0, both", "64.53 / 16.57", roots),
    "top_and_next": Start("top and next part", "64.86 / 17.05", top_and_next),
    "next_and_top": Start("next and top part", "64.79 / 17.16", next_and_top),
    "second_pair": Start("0 and SVD", "66.19 / 18.06", second_pair),
    "narrow": Start("SVD and 0, A2 narrow", "", narrow),
    "ours": Start("SVD and 0 (ABBA's)", "66.26 / 18.08", None),
}


@torch.no_grad()
def apply_start(model: nn.Module, name: str, seed: int) -> None:
    """Gives the factors of a freshly patched model another start, in place; the weights become W0 − ΔW.

    Raises:
        ValueError: An unknown start.
    """
    if name not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, got {name!r}")
    if STARTS[name].factors is None:
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in abba_layers(model).values():
            weight = layer.weight.float()
            (a1, b1), (a2, b2) = STARTS[name].factors(weight, layer)
            for factor, value in ((layer.abba_A1, a1), (layer.abba_B1, b1), (layer.abba_A2, a2), (layer.abba_B2, b2)):
                factor.copy_(value)
            layer.weight.copy_(weight - reference.delta_weight(a1, b1, a2, b2, layer.abba_scale))
