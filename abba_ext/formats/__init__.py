"""Adapters in other formats: reads ABBA adapters of every origin, and writes them, also as an exact plain LoRA.

    abba     abba_ext's own, see :mod:`abba_ext.checkpoint`
    peft     PEFT folder of type ABBA: base_model.model.{module}.abba_A1, ...; s by :meth:`AbbaConfig.scale`
    loha     PEFT folder of type LOHA: base_model.model.{module}.hada_w1_a, ...; r1 = r2 = r and s = α/r
    authors  the paper's code: {module}.lora_A1.default, ... in adapter_model.bin; s = √alpha1·√alpha2
    lycoris  LyCORIS: {module}.hada_w1_a, ... and {module}.alpha, s = α/r; or its forks with ABBA: {module}.lora_up1.weight, ...
             and {module}.alpha, where s has to be told
    lora     PEFT folder of type LORA and rank r1·r2, by Theorem 1 of the paper; written only
"""
import os
from typing import Any

import torch
from torch import nn

from ..config import check_choice
from .adapter import Adapter, LayerFactors
from .reading import READ_FORMATS, read
from .writing import LORA_RANKS, WRITE_FORMATS, lora_factors, write

__all__ = ["LORA_RANKS", "READ_FORMATS", "WRITE_FORMATS", "Adapter", "LayerFactors", "convert_adapter", "lora_factors", "read",
           "write"]


def convert_adapter(source: str | os.PathLike, destination: str | os.PathLike, to: str, *, format: str = "auto",
                    scaling: str | float | None = None, rank: int | None = None, dtype: str | torch.dtype | None = None,
                    model: nn.Module | None = None, **options) -> dict[str, Any]:
    """Reads an adapter in one format and writes it in another: y = x W0ᵀ + s·x ((B1 A1) ⊙ (B2 A2))ᵀ stays the same.

    Args:
        source: See :func:`read`, as for format, scaling and model.
        destination: See :func:`write`, as for rank, dtype and other options.
        to: "abba", "peft", "loha" or "lora".

    Returns:
        The report of :func:`write`, and "source", the format that was read.

    Raises:
        FileNotFoundError, FileExistsError, TypeError, ValueError, ImportError: See :func:`read` and :func:`write`.
    """
    check_choice("to", to, WRITE_FORMATS)
    adapter = read(source, format=format, scaling=scaling, model=model)
    return {"source": adapter.source, **write(adapter, destination, to, rank=rank, dtype=dtype, **options)}
