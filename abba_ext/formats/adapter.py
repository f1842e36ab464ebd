"""An adapter in memory, whatever format it came from."""
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import DTYPES, AbbaConfig

PEFT_PREFIX = "base_model.model."
PEFT_CONFIG_NAME = "adapter_config.json"
LOHA_FACTORS = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a")  # LoHa's names of A1, B1, A2, B2
MAX_RANK = 4096  # of a pair; more is no low-rank adapter


@dataclass(frozen=True)
class LayerFactors:
    """The update of one layer, ΔW = s·(B1 A1) ⊙ (B2 A2), on the CPU.

    Attributes:
        a1: A1 [r1, n], floating point.
        b1: B1 [m, r1].
        a2: A2 [r2, n].
        b2: B2 [m, r2].
        scale: s.
        kind: "linear", or the base layer's class where the format or the model tells another, which only "abba" and "peft"
            can hold.

    Raises:
        ValueError: A factor is no finite floating-point matrix, shapes do not fit, or a rank is not in 1 to 4096.
    """

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor
    scale: float
    kind: str = "linear"

    def __post_init__(self):
        for name in ("a1", "b1", "a2", "b2"):
            factor = getattr(self, name)
            if factor.dim() != 2 or str(factor.dtype).removeprefix("torch.") not in DTYPES:
                raise ValueError(f"{name} must be a matrix of {', '.join(DTYPES)}, got {list(factor.shape)} of {factor.dtype}")
        (r1, n), (r2, _), (m, _) = self.a1.shape, self.a2.shape, self.b1.shape
        for name, shape in (("b1", (m, r1)), ("a2", (r2, n)), ("b2", (m, r2))):
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} must be {list(shape)} beside a1 [{r1}, {n}], b1 {list(self.b1.shape)} and a2 "
                                 f"{list(self.a2.shape)}, got {list(getattr(self, name).shape)}")
        if not all(1 <= rank <= MAX_RANK for rank in (r1, r2)):
            raise ValueError(f"ranks must be in 1 to {MAX_RANK}, got r1={r1}, r2={r2}")
        for name in ("a1", "b1", "a2", "b2"):
            if not torch.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} must be finite, it holds NaN or infinity")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite, got {self.scale}")

    @property
    def ranks(self) -> tuple[int, int]:
        """(r1, r2)."""
        return self.a1.size(0), self.a2.size(0)


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory, whatever format it came from.

    Attributes:
        layers: Factors and s by module name in the base model.
        base_model: Name of the base model, where the format tells.
        config: Targets, ranks and scales of the layers as a config; by default one that says them layer by layer.
        trained: Biases and heads that were trained in full, by parameter name.
        tied: Other names of trained parameters in the model that they were trained in, as tied weights have them; [] for a tensor
            of its own, such as the copies that PEFT trains. A parameter is left out where the format does not tell.
        source: Name of the format it was read from.
        task_type: PEFT's, such as "CAUSAL_LM", where the format tells.
    """

    layers: dict[str, LayerFactors]
    base_model: str | None = None
    config: AbbaConfig | None = None
    trained: dict[str, Tensor] = field(default_factory=dict)
    tied: dict[str, list[str]] = field(default_factory=dict)
    source: str = "abba"
    task_type: str | None = None

    def __post_init__(self):
        if not self.layers:
            raise ValueError("layers must hold at least one layer")
        for name in [*self.layers, *self.trained, *(alias for aliases in self.tied.values() for alias in aliases)]:
            if not name or ".." in name or "/" in name or "\0" in name:
                raise ValueError(f"{name!r} is no module or parameter name: it is empty or holds '..', '/' or NUL")
        if not isinstance(self.base_model, str | None):
            raise ValueError(f"base_model_name_or_path must be a string, got {self.base_model!r}")
        if not isinstance(self.task_type, str | None):
            raise ValueError(f"task_type must be a string, got {self.task_type!r}")
        if self.config is None:
            object.__setattr__(self, "config", config_of(self.layers))


def as_pattern(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and a pattern for the layers that have another: "^" and the whole name fit no other layer."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {"^" + re.escape(name): value for name, value in values.items() if value != common}


def config_of(layers: dict[str, LayerFactors]) -> AbbaConfig:
    """A config by which every layer has its ranks and its s."""
    (r1, r2), rank_pattern = as_pattern({name: layer.ranks for name, layer in layers.items()})
    scale, alpha_pattern = as_pattern({name: layer.scale for name, layer in layers.items()})
    how = {"scaling": "official", "alpha": scale, "alpha_pattern": alpha_pattern} if alpha_pattern else {"scaling": scale}
    return AbbaConfig(r1=r1, r2=r2, rank_pattern=rank_pattern, target_modules=list(layers), **how)
