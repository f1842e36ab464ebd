"""PEFT's ABBA model: puts the layers into a model, and what PEFT asks of a method beyond that."""
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, get_quantization_kwargs
from torch import Tensor, nn

from .. import bases
from ..config import AbbaConfig, check_choice
from ..layers import FACTORS
from ..patching import find_targets, is_patched
from ..reference import khatri_rao, truncated_product
from .config import AbbaPeftConfig
from .layer import AbbaTunerLayer, AbbaTunerLinear, ParamWrapper

COMBINATIONS = ("cat", "svd")


class AbbaModel(BaseTuner):
    """A model with ABBA adapters in PEFT; made by :func:`peft.get_peft_model` from an :class:`AbbaPeftConfig`.

    y = x W0ᵀ + bias + s·x ((B1 A1) ⊙ (B2 A2))ᵀ in every adapted layer, of every active adapter (arXiv 2505.14238).
    """

    prefix = "abba_"
    tuner_layer_cls = AbbaTunerLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: AbbaPeftConfig, model_config: dict) -> AbbaPeftConfig:
        if is_patched(self.model):
            raise ValueError("model has ABBA layers of patch_model, which PEFT would not save; call "
                             "abba_ext.unpatch_model(model) first, or train it without PEFT")
        if peft_config.target_modules is None and not peft_config.target_parameters:
            peft_config.target_modules = _default_targets(self.model, peft_config)
        return peft_config

    def _check_new_adapter_config(self, config: AbbaPeftConfig) -> None:
        super()._check_new_adapter_config(config)
        wanted = {tuple(sorted(other.target_parameters)) for other in self.peft_config.values() if other.target_parameters}
        if len(wanted) > 1:  # the wrappers of a module's parameters are nested, and the nesting is in the keys of checkpoints
            raise ValueError(f"target_parameters must be the same in all adapters of a model, got {sorted(wanted)}")

    def _create_and_replace(self, peft_config: AbbaPeftConfig, adapter_name: str, target: nn.Module, target_name: str,
                            parent: nn.Module, current_key: str, parameter_name: str | None = None) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if parameter_name is not None:
            layer_cls, kwargs = ParamWrapper, {"parameter_name": parameter_name}
        else:
            layer_cls, kwargs = AbbaTunerLinear if bases.is_linear(base) else AbbaTunerLayer, {}
        if type(target) is layer_cls and getattr(target, "parameter_name", None) == parameter_name:
            target.update_layer(adapter_name, peft_config, current_key)
            return
        layer = layer_cls(target, adapter_name, peft_config, current_key, **kwargs, **get_quantization_kwargs(self.model))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # the factors have been made where the weight is

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for layer in self._layers(adapter_name).values():
            dtype = bases.weight_dtype(layer.adapted)
            for factors in (getattr(layer, key) for key in FACTORS):
                factors[adapter_name] = factors[adapter_name].to(dtype or factors[adapter_name].dtype)

    def _layers(self, *adapters: str) -> dict[str, AbbaTunerLayer]:
        """The layers by name that have one of the adapters; all layers if none is named."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, AbbaTunerLayer)
                and (not adapters or any(adapter in module.abba_A1 for adapter in adapters))}

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names: list[str] | None = None, num_beams: int | None = None,
                                   **kwargs) -> Iterator[None]:
        """Hands the adapter of each sample to the layers during one call of the model."""
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = set(adapter_names) - {"__base__"}.union(*(layer.abba_A1.keys() for layer in self._layers().values()))
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        per_beam = [name for name in adapter_names for _ in range(num_beams or 1)]
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        encoding = set() if encoder in (None, self.model) else set(encoder.modules())  # which sees no beams
        with ExitStack() as hooks:
            for module in self.modules():
                if isinstance(module, (AbbaTunerLayer, AuxiliaryTrainingWrapper)):
                    names = list(adapter_names) if module in encoding else per_beam
                    hooks.enter_context(module.register_forward_pre_hook(_pass_adapter_names(names), with_kwargs=True))
            yield

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        owners: dict[int, list[str]] = {}
        for name, module in self.model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                owners.setdefault(id(parameter), []).append(f"{name}.{key}")
        for name, layer in self._layers().items():
            tied = owners.get(id(getattr(layer.adapted, "weight", None)), [])
            if len(tied) > 1:
                raise ValueError(f"cannot merge into {name!r}: its weight is tied ({', '.join(tied)}), and merging would change "
                                 "the others too; untie it first (give the layer its own copy of the weight)")

    def _check_finite(self, adapter_names: list[str] | None) -> None:
        """Refuses before the first weight is written, where PEFT would stop in the middle of the model."""
        for layer in self._layers().values():
            merged = [name for name in adapter_names or layer.active_adapters if name in layer.abba_A1]
            layer.merged_weight(list(dict.fromkeys(layer.merged_adapters + merged)), safe=True)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Adds the adapters (the active ones if None) into the weights; with safe_merge all or nothing.

        Raises:
            ValueError: safe_merge and a merged weight is not finite; or a weight is tied. No weight was changed.
            TypeError: A quantised weight cannot be merged into.
        """
        if safe_merge:
            self._check_finite(adapter_names)
        super().merge_adapter(adapter_names)

    def _unload_and_optionally_merge(self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False,
                                     adapter_names: list[str] | None = None) -> nn.Module:
        if merge and safe_merge:
            self._check_finite(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, adapter_names=adapter_names)

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str,
                             combination_type: str = "cat", svd_rank: int | None = None) -> None:
        """Adds an adapter whose update is the weighted sum Σ wᵢ ΔWᵢ of others.

        A sum of Hadamard products is no Hadamard product of the given ranks, and averages of factors are not averages of
        updates; so "linear" is not offered. By Theorem 1 each ΔWᵢ = sᵢ·Bᵢ*·Aᵢ*, and ΔW = (B1 A1) ⊙ (1 1ᵀ) with
        B1 = [wᵢ sᵢ Bᵢ*], A1 = [Aᵢ*] is the sum itself, an ABBA adapter with r1 = Σ r1ᵢ·r2ᵢ and r2 = 1.

        Args:
            adapters: Names of the adapters.
            weights: wᵢ, of any sign.
            adapter_name: Name of the new adapter.
            combination_type: "cat": that sum. "svd": its best approximation with r1 = svd_rank.
            svd_rank: For "svd"; the largest r1·r2 of the adapters if None.

        Raises:
            ValueError: An adapter is unknown or the new name is taken; weights do not fit; an adapter trains more than
                factors of layers (parameters, biases, modules_to_save, tokens).
        """
        self._check_add_weighted_adapter(adapters, weights, adapter_name, combination_type)
        products = {name: _combined(layer, adapters, weights) for name, layer in self._layers(*adapters).items()}
        if combination_type == "svd":
            rank = svd_rank or max(layer.abba_A1[adapter].size(0) * layer.abba_A2[adapter].size(0)
                                   for layer in self._layers(*adapters).values() for adapter in adapters
                                   if adapter in layer.abba_A1)
            products = {name: truncated_product(*product, rank)[:2] for name, product in products.items()}
        self.peft_config[adapter_name] = replace(
            self.peft_config[adapters[0]], r=None, r1=1, r2=1, scaling=1.0, alpha_pattern={}, init_weights="random",
            rank_pattern={"^" + re.escape(name): (a1.size(0), 1) for name, (_, a1) in products.items()},
            target_modules=list(products), exclude_modules=None, layers_to_transform=None, layers_pattern=None)
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for name, (b1, a1) in products.items():
                new_a1, new_b1, new_a2, new_b2 = self.model.get_submodule(name).factors(adapter_name)
                new_a1.copy_(a1), new_b1.copy_(b1), new_a2.fill_(1), new_b2.fill_(1)

    def _check_add_weighted_adapter(self, adapters, weights, adapter_name, combination_type) -> None:
        for adapter in adapters:
            if adapter not in self.peft_config:
                raise ValueError(f"Adapter {adapter} does not exist")
            config = self.peft_config[adapter]
            for name in ("target_parameters", "modules_to_save", "trainable_token_indices"):
                if getattr(config, name):
                    raise ValueError(f"add_weighted_adapter cannot combine {name}, which adapter {adapter!r} has")
            if config.bias != "none":
                raise ValueError(f"add_weighted_adapter cannot combine biases, which adapter {adapter!r} trains")
        if not adapters or len(adapters) != len(weights):
            raise ValueError(f"weights must be one number for each of the {len(adapters)} adapters, got {len(weights)}")
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name must be new, but there is an adapter {adapter_name!r}")
        check_choice("combination_type", combination_type, COMBINATIONS)


def _default_targets(model: nn.Module, config: AbbaPeftConfig) -> set[str]:
    """What patch_model adapts by default, in the blocks that the config names; in a model with adapters, the layers that they wrap."""
    blocks, patterns = ([value] if isinstance(value, (int, str)) else list(value or ())
                        for value in (config.layers_to_transform, config.layers_pattern))
    block_of = [re.compile(rf"(?:^|.*?\.){pattern}\.(\d+)\.") for pattern in patterns or ["[^.]*"]]  # PEFT's rule
    wrappers = tuple(name + "." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    names = set()
    for name in find_targets(model, AbbaConfig()):
        block = next(filter(None, (pattern.match(name) for pattern in block_of)), None)
        if blocks and not (block and int(block[1]) in blocks):
            continue  # here: PEFT asks no more about a name that target_modules holds in full
        inside = re.sub(r"\.base_layer\b", "", name)
        if inside != name or not name.startswith(wrappers):
            names.add(inside)
    return names


def _pass_adapter_names(names: list[str]):
    def pre_hook(module, args, kwargs):
        return args, {**kwargs, "adapter_names": names}
    return pre_hook


def _combined(layer: AbbaTunerLayer, adapters: list[str], weights: list[float]) -> tuple[Tensor, Tensor]:
    """B [m, R] and A [R, n] with B A = Σ wᵢ ΔWᵢ, R = Σ r1ᵢ·r2ᵢ."""
    columns, rows = [], []
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter in layer.abba_A1:
            a1, b1, a2, b2 = (factor.detach() for factor in layer.factors(adapter))
            columns.append(weight * layer.scaling[adapter] * khatri_rao(b1.t(), b2.t()).t())
            rows.append(khatri_rao(a1, a2))
    return torch.cat(columns, dim=1), torch.cat(rows)
