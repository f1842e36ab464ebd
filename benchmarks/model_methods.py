"""The methods that are compared on a whole model, each attached by one call with one meaning of rank and targets.

A rank is a parameter budget: LoRA, rsLoRA, DoRA, PiSSA and HiRA of rank r, LoHa and ABBA of r/2 + r/2 all train r·(m + n)
parameters in an adapted layer of W0 [m, n] (DoRA: m more).
"""
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from baselines import InPlaceLora
from peft import LoHaConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from torch import Tensor, nn

from abba_ext import AbbaConfig, patch_model, reference
from abba_ext.layers import init_factors
from abba_ext.patching import find_targets

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Settings:
    """What :func:`attach` was asked for; dtype is that of the adapters' parameters."""

    rank: int
    alpha: float | None
    dropout: float
    seed: int
    targets: list[str]
    dtype: torch.dtype


def attach(model: nn.Module, method: str, *, rank: int = 32, alpha: float | None = None, dropout: float = 0.0, seed: int = 0,
           targets: Sequence[str] = TARGETS, adapter_dtype: torch.dtype | None = torch.float32, **options) -> nn.Module:
    """Freezes a model and attaches a method's adapters, in place; what is to be trained has requires_grad.

    Args:
        model: A model with linear layers of these names, such as a Llama.
        method: A name out of METHODS. "base" trains nothing and "full" everything; they ignore the settings.
        rank: r, the parameter budget of a layer.
        alpha: The method's α. LoRA, DoRA, PiSSA: s = α/r, by default α = r; rsLoRA: s = α/√r, likewise; LoHa: s = α/(r/2), by
            default α = r/2; ABBA: AbbaConfig's. HiRA has none.
        dropout: Probability with which elements of the adapter's input are zeroed in training.
        seed: Of the start; the global random state is left as it was.
        targets: Names or dotted suffixes of the layers.
        adapter_dtype: Of the adapters' parameters; None for the base's. float32 is PEFT's default and abba_ext's; beside a
            base in half precision it wants a step under autocast, without which PEFT computes in float32.
        options: Further fields of the method's configuration: AbbaConfig's (r1, r2, init, scaling, ...) or PEFT's.

    Returns:
        The same model.

    Raises:
        ValueError: An unknown method, or a setting that it does not have.
        TypeError: An option that it does not have.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    dtype = next(model.parameters()).dtype if adapter_dtype is None else adapter_dtype
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        METHODS[method].attach(model, Settings(rank, alpha, dropout, seed, list(targets), dtype), **options)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _refuse(method: str, **settings) -> None:
    for name, value in settings.items():
        if value:
            raise ValueError(f"{method} has no {name}, got {value!r}")


# --- no adapter ---


def _attach_base(model: nn.Module, settings: Settings) -> None:
    model.requires_grad_(False)


def _attach_full(model: nn.Module, settings: Settings) -> None:
    model.requires_grad_(True)


# --- PEFT ---


def _inject(model: nn.Module, config: PeftConfig, settings: Settings) -> None:
    inject_adapter_in_model(config, model)
    for parameter in trainable(model):
        parameter.data = parameter.data.to(settings.dtype)


def _attach_lora(model: nn.Module, settings: Settings, **options) -> None:
    alpha = settings.rank if settings.alpha is None else settings.alpha
    _inject(model, LoraConfig(r=settings.rank, lora_alpha=alpha, lora_dropout=settings.dropout,
                              target_modules=settings.targets, **options), settings)


def _attach_hira(model: nn.Module, settings: Settings, **options) -> None:
    from peft import HiraConfig  # since PEFT 0.21: an older one costs this method alone

    _refuse("hira", alpha=settings.alpha)
    _inject(model, HiraConfig(r=settings.rank, hira_dropout=settings.dropout, target_modules=settings.targets, **options),
            settings)


def _attach_loha(model: nn.Module, settings: Settings, **options) -> None:
    _refuse("loha", dropout=settings.dropout)
    if settings.rank % 2:
        raise ValueError(f"rank must be even for loha (r/2 + r/2), got {settings.rank}")
    half = settings.rank // 2
    alpha = half if settings.alpha is None else settings.alpha
    _inject(model, LoHaConfig(r=half, alpha=alpha, target_modules=settings.targets, **options), settings)


# --- plain modules ---


class InPlaceLoraLinear(nn.Module):
    """A frozen linear layer with :class:`baselines.InPlaceLora`: y = x W0ᵀ + bias + s·(x Aᵀ) Bᵀ, B = 0 at the start."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dtype: torch.dtype):
        super().__init__()
        self.base_layer, self.scale = base, scale
        a = nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=math.sqrt(5))
        self.lora_A = nn.Parameter(a.to(base.weight.device, dtype))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = InPlaceLora.apply(x.reshape(-1, x.size(-1)), self.base_layer.weight, self.base_layer.bias, self.lora_A,
                              self.lora_B, self.scale)
        return y.view(*x.shape[:-1], y.size(-1))


class EagerAbbaLinear(nn.Module):
    """A frozen linear layer with :func:`abba_ext.reference.abba_linear`, from the same start as abba_ext's layer."""

    def __init__(self, base: nn.Linear, factors: dict[str, Tensor], scale: float):
        super().__init__()
        self.base_layer, self.scale = base, scale
        for name, factor in factors.items():
            self.register_parameter(name, nn.Parameter(factor))

    def forward(self, x: Tensor) -> Tensor:
        return reference.abba_linear(x, self.base_layer.weight, self.base_layer.bias, self.abba_A1, self.abba_B1,
                                     self.abba_A2, self.abba_B2, self.scale)


def _attach_lora_inplace(model: nn.Module, settings: Settings) -> None:
    _refuse("lora_inplace", dropout=settings.dropout)
    scale = 1.0 if settings.alpha is None else settings.alpha / settings.rank
    model.requires_grad_(False)
    for name, module in find_targets(model, AbbaConfig(target_modules=settings.targets)).items():
        model.set_submodule(name, InPlaceLoraLinear(module, settings.rank, scale, settings.dtype))


# --- ABBA ---


def _abba_config(settings: Settings, **options) -> AbbaConfig:
    if settings.alpha is not None:
        options["alpha"] = settings.alpha
    return AbbaConfig(r=settings.rank, dropout=settings.dropout, seed=settings.seed, target_modules=settings.targets,
                      adapter_dtype=settings.dtype, **options)


def _attach_abba_eager(model: nn.Module, settings: Settings, **options) -> None:
    _refuse("abba_eager", dropout=settings.dropout)
    config = _abba_config(settings, **options)
    model.requires_grad_(False)
    for name, module in find_targets(model, config).items():
        model.set_submodule(name, EagerAbbaLinear(module, init_factors(module, config, name), config.scale(name)))


def _attach_abba(model: nn.Module, settings: Settings, **options) -> None:
    patch_model(model, _abba_config(settings, **options))


@dataclass(frozen=True)
class ModelMethod:
    """The name that a method has in tables and pictures, and what attaches it."""

    label: str
    attach: Callable[..., None]


METHODS = {
    "base": ModelMethod("frozen base", _attach_base),
    "full": ModelMethod("full fine-tuning", _attach_full),
    "lora": ModelMethod("LoRA (PEFT)", _attach_lora),
    "rslora": ModelMethod("rsLoRA (PEFT)", functools.partial(_attach_lora, use_rslora=True)),
    "dora": ModelMethod("DoRA (PEFT)", functools.partial(_attach_lora, use_dora=True)),
    "pissa": ModelMethod("PiSSA (PEFT)", functools.partial(_attach_lora, init_lora_weights="pissa_niter_16")),
    "hira": ModelMethod("HiRA (PEFT)", _attach_hira),
    "loha": ModelMethod("LoHa (PEFT)", _attach_loha),
    "lora_inplace": ModelMethod("LoRA (in-place addmm)", _attach_lora_inplace),
    "abba_eager": ModelMethod("ABBA (eager)", _attach_abba_eager),
    "abba": ModelMethod("ABBA (abba_ext)", _attach_abba),
}
