"""The best approximation of a matrix by a Hadamard product of low-rank matrices that a strong optimiser finds.

M ≈ C ⊙ (B1 A1) ⊙ … ⊙ (Bk Ak), M and the fixed C [m, n], Ai [ri, n], Bi [m, ri]: ABBA's update for k = 2 and HiRA's for k = 1
with C = W0. For fixed other factors each row of a Bi and each column of an Ai is the solution of a least-squares problem
with ri unknowns, so alternating least squares needs no step size; L-BFGS over all factors follows it. The error has local
minima (a random product of two pairs of rank 4 is not found again), so what comes out is an upper bound.
"""
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # A [r, n], B [m, r]

RIDGE = 1e-10  # of the mean diagonal of a row's normal equations
FLOOR = 1e-30  # of that of all rows: a row of H that underflows gets a zero row of B
NOISE = 0.3  # of the starts that would otherwise hold a matrix of lower rank than the pair


def product(pairs: Sequence[Pair], constant: Tensor) -> Tensor:
    """C ⊙ (B1 A1) ⊙ … ⊙ (Bk Ak), [m, n]."""
    result = constant
    for a, b in pairs:
        result = result * (b @ a)
    return result


def relative_error(matrix: Tensor, approximation: Tensor) -> float:
    """‖M − M̂‖²_F/‖M‖²_F."""
    return ((matrix - approximation).square().sum() / matrix.square().sum()).item()


def svd_error(matrix: Tensor, rank: int) -> float:
    """The least ‖M − M̂‖²_F/‖M‖²_F of any M̂ of that rank (Eckart–Young): what LoRA can reach."""
    sigma = torch.linalg.svdvals(matrix).square()
    return (sigma[rank:].sum() / sigma.sum()).item()


def truncated_svd(matrix: Tensor, rank: int) -> Pair:
    """The best A [r, n], B [m, r] for B A ≈ M."""
    u, sigma, v = torch.linalg.svd(matrix, full_matrices=False)
    root = sigma[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def starts(matrix: Tensor, ranks: Sequence[int], constant: Tensor, generator: torch.Generator,
           random: int = 1) -> Iterator[list[Pair]]:
    """M's SVD beside its support, the k-th root of |M| in each pair, and so many starts of random factors."""
    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)

    signed = matrix * constant.sign()
    support = signed.sign().abs()
    yield [truncated_svd(signed if i == 0 else support + NOISE * noise(support), r) for i, r in enumerate(ranks)]
    root = signed.abs() ** (1 / len(ranks)) * support
    yield [truncated_svd(root * signed.sign() if i == 0 else root, r) for i, r in enumerate(ranks)]
    for _ in range(random):
        yield [(noise(matrix[:1].expand(r, -1)), noise(matrix[:, :1].expand(-1, r)) / math.sqrt(r)) for r in ranks]


def solve_rows(matrix: Tensor, others: Tensor, a: Tensor) -> Tensor:
    """The B [m, r] that minimises ‖M − H ⊙ (B A)‖_F for M, H [m, n] and A [r, n], by normal equations for each row."""
    rank = a.size(0)
    row, column = torch.tril_indices(rank, rank, device=a.device)
    gram = a.new_empty(matrix.size(0), rank, rank)
    gram[:, row, column] = gram[:, column, row] = others.square() @ (a[row] * a[column]).t()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal.mean(1, keepdim=True) + (FLOOR * diagonal.mean()).clamp(min=torch.finfo(a.dtype).tiny)
    right = (others * matrix) @ a.t()
    return torch.cholesky_solve(right[..., None], torch.linalg.cholesky(gram))[..., 0]


def alternate(matrix: Tensor, pairs: list[Pair], constant: Tensor, sweeps: int) -> list[Pair]:
    """Sweeps of alternating least squares over B1, A1, …, Bk, Ak; the factor that is held is orthonormalised first."""
    pairs = list(pairs)
    for _ in range(sweeps):
        for i, (a, _b) in enumerate(pairs):
            others = product(pairs[:i] + pairs[i + 1:], constant)
            b = solve_rows(matrix, others, torch.linalg.qr(a.t())[0].t())
            b = torch.linalg.qr(b)[0]
            pairs[i] = solve_rows(matrix.t(), others.t(), b.t()).t(), b
    return pairs


def polish(matrix: Tensor, pairs: list[Pair], constant: Tensor, iterations: int) -> list[Pair]:
    """L-BFGS over all factors, started with factors of equal size."""
    size = math.exp(sum(math.log((b @ a).norm().item() + 1e-300) for a, b in pairs) / len(pairs))
    factors = []
    for a, b in pairs:
        scale = size / ((b @ a).norm() + 1e-300)
        ratio = (scale * b.norm(dim=0) / a.norm(dim=1).clamp(min=1e-300)).sqrt()
        factors += [(ratio[:, None] * a).contiguous(), (scale * b / ratio.clamp(min=1e-300)).contiguous()]
    parameters = [factor.requires_grad_() for factor in factors]
    optimizer = torch.optim.LBFGS(parameters, max_iter=iterations, history_size=30, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-12, tolerance_change=1e-15)
    weight = matrix.numel() / matrix.square().sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        pairs = list(zip(parameters[::2], parameters[1::2], strict=True))
        loss = weight * (matrix - product(pairs, constant)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    factors = [parameter.detach() for parameter in parameters]
    return list(zip(factors[::2], factors[1::2], strict=True))


def approximate(matrix: Tensor, ranks: Sequence[int], generator: torch.Generator, *, constant: Tensor | None = None,
                random: int = 1, sweeps: int = 60, iterations: int = 200) -> tuple[float, list[Pair]]:
    """The best of the starts: each gets a third of the sweeps, the best of them all and then L-BFGS.

    Args:
        matrix: M [m, n], fp64.
        ranks: r1, …, rk.
        generator: Of the random parts of the starts.
        constant: C [m, n]; ones if None.
        random: Random starts beside the two of :func:`starts` that are made from M.
        sweeps: Of alternating least squares.
        iterations: Of L-BFGS.

    Returns:
        ‖M − M̂‖²_F/‖M‖²_F and the pairs (Ai, Bi).
    """
    constant = torch.ones_like(matrix) if constant is None else constant

    def error(pairs: list[Pair]) -> float:
        return relative_error(matrix, product(pairs, constant))

    tried = starts(matrix, ranks, constant, generator, random)
    best = min((alternate(matrix, pairs, constant, sweeps // 3) for pairs in tried), key=error)
    best = alternate(matrix, best, constant, sweeps)
    best = min(best, polish(matrix, best, constant, iterations), key=error)
    return error(best), best
