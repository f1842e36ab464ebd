"""ABBA in plain torch, written for reading: the dense update and the Khatri–Rao formulas, differentiable by autograd.

    ΔW = s · (B1 A1) ⊙ (B2 A2) = s · B* A*      A1 [r1, n], B1 [m, r1], A2 [r2, n], B2 [m, r2]   (Theorem 1)
    y  = x W0ᵀ + bias + s · (x A*ᵀ) B*ᵀ         x [..., n], W0 [m, n], y [..., m]

Source: arXiv 2505.14238, section 3 and Theorem 1.
"""
import torch
from torch import Tensor


def delta_weight(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float) -> Tensor:
    """The dense update ΔW = s·(B1 A1) ⊙ (B2 A2), [m, n] in the factors' dtype."""
    return scale * ((b1 @ a1) * (b2 @ a2))


def khatri_rao(f1: Tensor, f2: Tensor) -> Tensor:
    """KR(f1, f2)[(a,b), d] = f1[a,d]·f2[b,d], index a·r2 + b: f1 [r1, D], f2 [r2, D] → [r1·r2, D]."""
    return (f1[:, None, :] * f2[None, :, :]).reshape(-1, f1.size(1))


def project(x: Tensor, f1: Tensor, f2: Tensor) -> Tensor:
    """u = x · KR(f1, f2)ᵀ: x [..., D] → u [..., R] in x's dtype."""
    return x @ khatri_rao(f1, f2).to(x.dtype).t()


def expand(u: Tensor, f1: Tensor, f2: Tensor, scale: float = 1.0) -> Tensor:
    """s · u · KR(f1, f2): u [..., R] → [..., D] in u's dtype."""
    return scale * (u @ khatri_rao(f1, f2).to(u.dtype))


def factor_grad(x: Tensor, v: Tensor, f1: Tensor, f2: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Gradients of the factors from P = vᵀ x: x [T, D], v [T, R] → df1 [r1, D], df2 [r2, D] in the factors' dtype."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    p = (v.t() @ x).to(wide).view(f1.size(0), f2.size(0), -1)
    df1 = scale * (p * f2.to(wide)[None]).sum(1)
    df2 = scale * (p * f1.to(wide)[:, None]).sum(0)
    return df1.to(f1.dtype), df2.to(f2.dtype)


def abba_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor,
                scale: float) -> Tensor:
    """y = x W0ᵀ + bias + s·(x A*ᵀ) B*ᵀ through materialised Khatri–Rao factors: what eager torch would run."""
    y = torch.nn.functional.linear(x, weight, bias)
    return y + expand(project(x, a1, a2), b1.t(), b2.t(), scale)


def truncated_product(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of B A of a given rank (Eckart–Young), without forming B A.

    With B = Q_B R_B and Aᵀ = Q_A R_A the singular values of B A are those of the small matrix R_B R_Aᵀ.

    Args:
        b: B [m, R].
        a: A [R, n].
        rank: k.

    Returns:
        B' [m, k] and A' [k, n], each column of B' and row of A' of equal norm; and ‖B A − B' A'‖_F/‖B A‖_F.
    """
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b), torch.linalg.qr(a.t())
    u, sigma, v = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    root, norm = sigma[:rank].sqrt(), sigma.norm().item()
    error = sigma[rank:].norm().item() / norm if norm > 0 else 0.0
    return q_b @ (u[:, :rank] * root), root[:, None] * (v[:rank] @ q_a.t()), error
