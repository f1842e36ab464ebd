"""PEFT's ABBA layers: wrappers that hold the factors of every adapter of one base layer."""
import copy
import warnings

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from .. import bases
from ..functional import abba_linear, delta_weight
from ..layers import FACTORS, hide_parameter, init_factors, show_parameter
from .config import AbbaPeftConfig


class FactorDict(nn.ModuleDict):
    """One of the four factors by adapter name. A module holds each, so that a factor is named "abba_A1.default.weight" as LoRA's are:
    TRL, for one, finds what belongs to an adapter by ".default." in its name."""

    def __getitem__(self, adapter: str) -> nn.Parameter:
        return super().__getitem__(adapter).weight

    def __setitem__(self, adapter: str, factor: Tensor) -> None:
        """A factor in place of another is trainable if that was."""
        holder = nn.Module()
        holder.weight = nn.Parameter(factor.detach(), (self[adapter] if adapter in self else factor).requires_grad)
        super().__setitem__(adapter, holder)


class AbbaTunerLayer(nn.Module, BaseTunerLayer):
    """Adds ΔW = s·(B1 A1) ⊙ (B2 A2) of every active adapter to the weight W0 [m, n] of the wrapped layer.

    Factors by adapter name: abba_A1 [r1, n], abba_B1 [m, r1], abba_A2 [r2, n], abba_B2 [m, r2]; see :class:`FactorDict`.

    Args:
        base_layer: The layer to adapt; see :func:`abba_ext.bases.refusal`.
        adapter_name: Name of its first adapter.
        config: That adapter's configuration.
        name: The layer's name in the model, which picks patterns and the random stream from the config.
        get_apply_tensor_subclass: How torchao quantised the weight, which merging needs to quantise the sum.

    Raises:
        ValueError: The layer cannot be adapted.
    """

    adapter_layer_names = FACTORS
    other_param_names = ("scaling", "initial_scaling", "abba_dropout", "recompute_u")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: AbbaPeftConfig, name: str, *,
                 get_apply_tensor_subclass=None):
        super().__init__()
        self.base_layer = base_layer
        reason = bases.refusal(self.adapted)
        if reason:
            raise ValueError(f"target {name!r} {reason}")
        self.in_features, self.out_features = bases.features(self.adapted)
        for key in FACTORS:
            setattr(self, key, FactorDict())
        self.abba_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.initial_scaling: dict[str, float] = {}
        self.recompute_u: dict[str, bool] = {}
        self.merged_adapters = []
        self.kept_base = []  # W0 while merged: its tensor, or the whole layer if quantised; in a list, not a submodule
        self.cast_input_dtype_enabled = True  # PEFT switches it; the operators take an input of any dtype as it is
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=get_apply_tensor_subclass or (lambda: None))
        if self.quantization_backend is not None and not get_apply_tensor_subclass:
            self.quantization_backend.supports_merge &= self.quantization_backend.backend_name != "torchao"
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, name)

    @property
    def adapted(self) -> nn.Module:
        """What :mod:`abba_ext.bases` understands: the innermost base layer."""
        return self.get_base_layer()

    def update_layer(self, adapter_name: str, config: AbbaPeftConfig, name: str) -> None:
        """Adds an adapter. With inference_mode the start needs no SVD: values are about to be loaded."""
        dtype = torch.promote_types(bases.weight_dtype(self.adapted) or torch.float32, torch.float32)
        changes = {"init": "random"} if config.inference_mode else {}
        abba_config = config.abba_config(adapter_dtype=dtype, **changes)
        with gather_params_ctx(self.get_base_layer().parameters()):
            factors = init_factors(self.adapted, abba_config, name)
        for key, factor in factors.items():
            if config.init_weights is False:
                nn.init.kaiming_uniform_(factor, a=5**0.5)
            getattr(self, key)[adapter_name] = nn.Parameter(factor)
        self.scaling[adapter_name] = self.initial_scaling[adapter_name] = abba_config.scale(name)
        self.abba_dropout[adapter_name] = nn.Dropout(config.abba_dropout)
        self.recompute_u[adapter_name] = config.recompute_u
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(A1, B1, A2, B2) of an adapter."""
        return tuple(getattr(self, key)[adapter] for key in FACTORS)

    def forward(self, x: Tensor, *args, adapter_names: list[str] | None = None, **kwargs) -> Tensor:
        """The base layer's output with W0 + Σ ΔW for W0.

        Args:
            x: The layer's input.
            adapter_names: In inference, the adapter of each sample of the batch; "__base__" for none.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._forward_per_sample(x, adapter_names, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        adapters = [name for name in self.active_adapters if name in self.abba_A1]
        if len(adapters) == 1 and self._is_fused(adapters[0]):
            return abba_linear(x, bases.weight_view(self.base_layer), self.base_layer.bias, *self.factors(adapters[0]),
                               self.scaling[adapters[0]], recompute_u=self.recompute_u[adapters[0]])
        result = self.base_layer(x, *args, **kwargs)
        for adapter in adapters:
            result = self._add_update(adapter, result, x)
        return result

    def _is_fused(self, adapter: str) -> bool:
        """Whether one autograd node may compute the base together with the update: nothing else hangs on the base's call."""
        base, dropout = self.base_layer, self.abba_dropout[adapter]
        called_as_is = not (base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base))
        return called_as_is and bases.is_fusable(base) and not (dropout.training and dropout.p)

    def _add_update(self, adapter: str, result: Tensor, x: Tensor) -> Tensor:
        if x.is_floating_point():  # ids of an embedding stay
            x = self.abba_dropout[adapter](x)
        return bases.add_update(self.adapted, result, x, self.factors(adapter), self.scaling[adapter],
                                recompute_u=self.recompute_u[adapter])

    def _forward_per_sample(self, x: Tensor, adapter_names: list[str], *args, **kwargs) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError("Length of `adapter_names` should be the same as the number of inputs, but got "
                             f"{len(adapter_names)} and {len(x)} respectively.")
        if self.merged:
            raise ValueError("Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first.")
        result = self.base_layer(x, *args, **kwargs)
        for adapter in sorted(set(adapter_names) & set(self.abba_A1.keys())):
            rows = torch.tensor([row for row, name in enumerate(adapter_names) if name == adapter], device=result.device)
            result = result.index_copy(0, rows, self._add_update(adapter, result[rows], x[rows]))
        return result

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of an adapter in the shape and order of the base's weight, in fp32 (fp64 for fp64 factors)."""
        return bases.to_layout(self.adapted, delta_weight(*self.factors(adapter), self.scaling[adapter]))

    @torch.no_grad()
    def merged_weight(self, adapters: list[str], safe: bool = False) -> Tensor:
        """W0 + Σ ΔW of the adapters, summed in fp32 (fp64 for fp64 weights) and rounded once to the dtype of the weight.

        Raises:
            ValueError: safe and the sum holds NaN or infinity.
            TypeError: The weight is quantised in a way that a sum cannot be written back to.
        """
        backend = self.quantization_backend
        if not (bases.has_plain_weight(self.adapted) if backend is None else backend.supports_merge):
            raise TypeError(f"cannot merge into a weight that is {bases.described_weight(self.adapted)}")
        if backend is not None:
            weight = backend.get_base_weight(self.kept_base[0] if self.merged else self.get_base_layer())
        else:
            weight = self.kept_base[0] if self.merged else self.adapted.weight
        total = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for adapter in adapters:
            total = total + self.get_delta_weight(adapter)
        if safe and not torch.isfinite(total.to(weight.dtype)).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(adapters)} seems to be broken; "
                             "no weight was changed")
        return total.to(weight.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds ΔW of the adapters (of the active ones if None) into the weight, keeping a copy of W0 for :meth:`unmerge`.

        Raises:
            ValueError, TypeError: See :meth:`merged_weight`; the weight is left as it was.
        """
        adapters = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.abba_A1]
        if not adapters:
            return
        merged = self.merged_weight(self.merged_adapters + adapters, safe_merge)
        quantized = self.quantization_backend is not None
        if not self.merged:
            self.kept_base.append(copy.deepcopy(self.get_base_layer()) if quantized else self.adapted.weight.detach().clone())
        if quantized:
            self.quantization_backend.set_base_weight(self, merged)
        else:
            self.adapted.weight.data.copy_(merged)
        self.merged_adapters += adapters

    def unmerge(self) -> None:
        """Restores W0 bit for bit from its copy."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        kept = self.kept_base.pop()
        if self.quantization_backend is not None:
            self.base_layer = kept
        else:
            self.adapted.weight.data.copy_(kept)
        self.merged_adapters.clear()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets an adapter's strength to a multiple of the s that its config gives."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.initial_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiplies the strength of the active adapters."""
        for adapter in set(self.active_adapters) & set(self.scaling):
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the strength of the active adapters; None gives them back the s of their config."""
        for adapter in set(self.active_adapters) & set(self.scaling):
            self.scaling[adapter] = self.initial_scaling[adapter] if scale is None else self.scaling[adapter] / scale

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT calls this after loading. Only the device follows the base: factors stay fp32 beside half-precision weights
        unless autocast_adapter_dtype=False."""
        for factors in (getattr(self, key) for key in FACTORS):
            if adapter_name in factors and factors[adapter_name].device.type != "meta":
                factors[adapter_name] = factors[adapter_name].to(device or bases.weight_device(self.adapted))


class AbbaTunerLinear(AbbaTunerLayer):
    """The wrapper of linear layers; PEFT's "all-linear" finds those that are wrapped already by the name of the class."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT asks; ΔW = s·B* A* is one of a LoRA of rank r1·r2 (Theorem 1)."""
        return True


class ParamWrapper(AbbaTunerLayer):
    """The wrapper of a module one of whose parameters W0 [m, n] or [experts, m, n] is adapted; PEFT expects this name.

    While the module runs it sees W0 + Σ ΔW. Several parameters of a module are wrapped one around the other.

    Args:
        parameter_name: The parameter's name in the module. The others as for :class:`AbbaTunerLayer`.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: AbbaPeftConfig, name: str, *, parameter_name: str,
                 **kwargs):
        self.parameter_name = parameter_name
        super().__init__(base_layer, adapter_name, config, name, **kwargs)

    @property
    def adapted(self) -> nn.Module:
        """The parameter as a base layer."""
        return bases.ParameterBase(self.get_base_layer(), self.parameter_name)

    def update_layer(self, adapter_name: str, config: AbbaPeftConfig, name: str) -> None:
        """Adds an adapter; raises ValueError if it has dropout."""
        if config.abba_dropout:
            raise ValueError(f"abba_dropout must be 0 with target_parameters, got {config.abba_dropout}: {name!r} does not see "
                             "its module's input")
        super().update_layer(adapter_name, config, name)

    def forward(self, *args, adapter_names: list[str] | None = None, **kwargs):
        """The base layer's output, which sees the parameter plus the ΔW of every active adapter while it runs."""
        if adapter_names is not None and not self.disable_adapters:
            raise ValueError("Cannot pass `adapter_names` to a model with target_parameters: its samples share a weight")
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = [name for name in self.active_adapters if name in self.abba_A1]
        if self.disable_adapters or self.merged or not adapters:
            return self.base_layer(*args, **kwargs)
        owner, weight = self.get_base_layer(), self.adapted.weight
        delta = sum(self.get_delta_weight(name) for name in adapters)
        show_parameter(owner, self.parameter_name, (weight + delta).to(weight.dtype))
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            hide_parameter(owner, self.parameter_name)

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        """The module without this wrapper and those inside it; PEFT calls this on the outermost."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if isinstance(self.base_layer, ParamWrapper):
            return self.base_layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return self.get_base_layer()

    def extra_repr(self) -> str:
        """The parameter's name."""
        return f"parameter_name={self.parameter_name!r}"
