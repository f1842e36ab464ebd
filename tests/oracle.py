"""The truth that every test is judged by: dense ΔW in fp64, independent of the Khatri–Rao formulas under test."""
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dense_kr(f1: Tensor, f2: Tensor) -> Tensor:
    """KR [r1*r2, D] in fp64, row by row from its definition."""
    f1, f2 = f1.double(), f2.double()
    return torch.stack([f1[a] * f2[b] for a in range(f1.size(0)) for b in range(f2.size(0))])


def dense_linear(x, weight, bias, a1, b1, a2, b2, scale) -> Tensor:
    """y = x (W0 + s (B1 A1) ⊙ (B2 A2))ᵀ + bias with the dense ΔW, in fp64; differentiable."""
    delta = scale * (b1.double() @ a1.double()) * (b2.double() @ a2.double())
    y = x.double() @ (weight.double() + delta).t()
    return y if bias is None else y + bias.double()


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """‖actual − truth‖ / ‖truth‖ in fp64; NaN stays NaN."""
    difference = (actual.double() - truth.double()).norm()
    return (difference / truth.double().norm().clamp_min(torch.finfo(torch.float64).tiny)).item()


def assert_close_to_truth(actual: Tensor, truth: Tensor, tolerance: float, name: str = "result") -> None:
    """actual's relative error is at most the tolerance; NaN fails."""
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    error = relative_error(actual, truth) if actual.numel() else 0.0
    assert error <= tolerance, f"{name}: relative error {error:.3e} > {tolerance:.3e}; {_worst(actual, truth)}"


def assert_no_worse_than(actual: Tensor, eager: Tensor, truth: Tensor, name: str = "result", factor: float = 1.2) -> None:
    """actual is at most factor times as far from the truth as eager torch in the same dtype; NaN fails.

    Floors: two units in the last place of the accumulator (fp32, or fp64 for fp64) for sums in another order; below 256
    elements, where eager's few roundings may all be lucky, four units in the last place of the result besides.
    """
    accumulator = torch.float64 if actual.dtype == torch.float64 else torch.float32
    allowed = factor * relative_error(eager, truth) + 2 * torch.finfo(accumulator).eps
    if actual.numel() < 256:
        allowed += 4 * torch.finfo(actual.dtype).eps
    assert_close_to_truth(actual, truth, allowed, name)


def assert_right_on_gpu(actual: Tensor, eager: Tensor, truth: Tensor, name: str, dtype: torch.dtype) -> None:
    """What an operator on x of this dtype gives on a GPU, by assert_no_worse_than.

    In fp64, where eager torch and the truth may be the same product, within 1e-13 instead. In fp32 up to four times eager's error:
    cuBLAS splits each product's sums as it sees fit, and another split can err two or three times as much.
    """
    if dtype == torch.float64:
        assert_close_to_truth(actual, truth, 1e-13, name)
    else:
        assert_no_worse_than(actual, eager, truth, name, 4 if dtype == torch.float32 else 1.2)


def _worst(actual: Tensor, truth: Tensor) -> str:
    difference = (actual.double() - truth.double()).abs().nan_to_num(float("inf"), float("inf"))
    index = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    return f"worst at {index}: got {actual[index].item():.6g}, expected {truth[index].item():.6g}"


def random_layer(tokens, n, m, r1, r2, dtype=torch.float64, factor_dtype=None, bias=True, seed=0, requires_grad=True):
    """(x, weight, bias, a1, b1, a2, b2) of sizes at which y and ΔW are both of order one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale, dtype=dtype):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_(requires_grad)

    factor_dtype = factor_dtype or dtype
    x = draw(tokens, n, scale=1.0)
    weight = draw(m, n, scale=n**-0.5)
    b = draw(m, scale=1.0) if bias else None
    a1, a2 = (draw(r, n, scale=n**-0.25, dtype=factor_dtype) for r in (r1, r2))
    b1, b2 = (draw(m, r, scale=r**-0.5, dtype=factor_dtype) for r in (r1, r2))
    return x, weight, b, a1, b1, a2, b2
