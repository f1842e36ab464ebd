"""ABBA adapters for PyTorch: ΔW = s·(B1 A1) ⊙ (B2 A2) on frozen linear layers (arXiv 2505.14238)."""
from .checkpoint import adapter_state_dict, load_adapter, save_adapter
from .config import AbbaConfig
from .formats import convert_adapter
from .functional import KernelPlan, abba_linear, abba_update, kernel_plan
from .layers import AbbaLayer, AbbaLinear
from .merging import merge_checkpoint
from .patching import (
    abba_layers,
    disable_adapter,
    get_nb_trainable_parameters,
    initialize_adapter,
    is_patched,
    merge,
    merge_and_unload,
    patch_model,
    print_trainable_parameters,
    unmerge,
    unpatch_model,
)

__version__ = "0.1.0"

__all__ = [
    "AbbaConfig",
    "AbbaLayer",
    "AbbaLinear",
    "KernelPlan",
    "abba_layers",
    "abba_linear",
    "abba_update",
    "adapter_state_dict",
    "convert_adapter",
    "disable_adapter",
    "get_nb_trainable_parameters",
    "initialize_adapter",
    "is_patched",
    "kernel_plan",
    "load_adapter",
    "merge",
    "merge_and_unload",
    "merge_checkpoint",
    "patch_model",
    "print_trainable_parameters",
    "save_adapter",
    "unmerge",
    "unpatch_model",
]
