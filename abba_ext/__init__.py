"""ABBA adapters for PyTorch: ΔW = s·(B1 A1) ⊙ (B2 A2), trained at LoRA's cost (arXiv 2505.14238)."""
from .functional import abba_linear, abba_update, kernel_plan

__version__ = "0.1.0"
