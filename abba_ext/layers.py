"""ABBA layers: a layer that keeps its own weight, bias and names, and gains four trainable factors.

An adapted layer is the *same module object* with its class changed to a subclass (as FSDP2 and parametrizations do), so
parameter names, shared modules and hooks stay as they were, and detaching restores the original class.
"""
import contextlib
import functools
import hashlib
import math
import threading
import types

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from . import bases, reference, sharding, tensor_parallel
from .config import AbbaConfig, config_or_default
from .functional import abba_linear, delta_weight

FACTORS = ("abba_A1", "abba_B1", "abba_A2", "abba_B2")
ADAPTED_PARAMETER = "abba_"  # + the parameter's name: the child that holds the factors of a parameter
_RUNS = "abba_runs_"  # + the parameter's name: how many runs of its owner see another value
_LOCK = threading.Lock()


class AbbaLayer:
    """Mixin that adds ΔW = s·(B1 A1) ⊙ (B2 A2) to the weight of a layer; see :class:`AbbaLinear`.

    Parameters it adds: abba_A1 [r1, n], abba_B1 [m, r1], abba_A2 [r2, n], abba_B2 [m, r2], for the weight as a matrix
    W0 [m, n] (see :func:`abba_ext.bases.features`); stacked experts have an E in front.

    Attributes:
        abba_ranks: (r1, r2).
        abba_scale: s.
        abba_dropout: Dropout probability on the adapter's input.
        abba_enabled: False computes the base layer alone.
        abba_merged: True while ΔW is added into the weight.
        abba_initialized: False after patching a model on the meta device, until its factors have values.
    """

    abba_A1: nn.Parameter
    abba_B1: nn.Parameter
    abba_A2: nn.Parameter
    abba_B2: nn.Parameter
    abba_ranks: tuple[int, int]
    abba_scale: float
    abba_dropout: float
    abba_enabled: bool
    abba_merged: bool
    abba_initialized: bool

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output with W0 + ΔW for W0; for a linear layer x [..., n] → y [..., m]."""
        if self.abba_merged or not self.abba_enabled:
            return super().forward(x)
        self.check_initialized()
        if sharding.is_dtensor(getattr(self, "weight", None)):
            return tensor_parallel.forward(self, x)
        factors = (self.abba_A1, self.abba_B1, self.abba_A2, self.abba_B2)
        if self.training and self.abba_dropout > 0 and x.is_floating_point():  # ids of an embedding stay
            dropped = dropout(x, self.abba_dropout)
        elif self.abba_fused:
            return abba_linear(x, bases.weight_view(self), self.bias, *factors, self.abba_scale,
                               recompute_u=self.abba_recompute_u, plan=self.abba_plan)
        else:
            dropped = x
        return bases.add_update(self, super().forward(x), dropped, factors, self.abba_scale, recompute_u=self.abba_recompute_u)

    def check_initialized(self) -> None:
        """Raises RuntimeError if the factors have no values yet; see :func:`abba_ext.initialize_adapter`."""
        if not self.abba_initialized:
            raise RuntimeError("the ABBA factors have no values: the model was patched on the meta device; load its weights and "
                               "call abba_ext.initialize_adapter(model), or load an adapter")

    def delta_weight(self) -> Tensor:
        """The dense ΔW = s·(B1 A1) ⊙ (B2 A2), [m, n], in fp32 (fp64 for fp64 factors or weights)."""
        wide = torch.float64 if torch.float64 in (self.abba_A1.dtype, bases.weight_dtype(self)) else torch.float32
        with torch.no_grad():
            factors = (sharding.full_tensor(getattr(self, name)).to(wide) for name in FACTORS)
            return reference.delta_weight(*factors, self.abba_scale)

    def check_mergeable(self) -> None:
        """Raises TypeError if the weight cannot take ΔW; see :meth:`merged_weight`."""
        if sharding.is_sharded(getattr(self, "weight", None)):
            raise TypeError("cannot merge into a weight that is sharded: save the adapter and merge it in one process")
        if not isinstance(getattr(self, "weight", None), nn.Parameter) and bases.has_plain_weight(self):
            raise TypeError("cannot merge into a weight that is computed from other parameters, as by weight_norm; remove the "
                            "parametrization before adapting the layer")
        if not bases.has_plain_weight(self):
            raise TypeError(f"cannot merge into a weight that is {bases.described_weight(self)}: only plain floating-point "
                            "weights can take ΔW")

    def merged_weight(self) -> Tensor:
        """W0 + ΔW in the weight's dtype and layout, summed in fp32 (fp64 for fp64 weights) and rounded once.

        Raises:
            TypeError: The weight is not a plain floating-point tensor (quantised), so there is nothing exact to add to.
        """
        self.check_mergeable()
        weight = self.weight
        delta = bases.to_layout(self, self.delta_weight())
        return (weight.detach().to(delta.dtype) + delta).to(weight.dtype)

    def merge(self, *, safe: bool = False, keep_base: bool = True) -> None:
        """Adds ΔW into the weight, so that the layer costs what its base costs. Does nothing if already merged.

        Args:
            safe: Refuse, leaving the weight as it was, if the sum holds NaN or infinity.
            keep_base: Keep a copy of W0, from which :meth:`unmerge` restores it bit for bit.

        Raises:
            ValueError: safe and the merged weight is not finite.
            TypeError: See :meth:`merged_weight`.
        """
        if self.abba_merged:
            return
        merged = self.merged_weight()
        if safe and not torch.isfinite(merged).all():
            raise ValueError("the merged weight holds NaN or infinity; the weight is left as it was")
        self.abba_base_copy = self.weight.detach().clone() if keep_base else None
        self.weight.data.copy_(merged)
        self.abba_merged = True

    def unmerge(self) -> None:
        """Restores W0 bit for bit. Does nothing if not merged.

        Raises:
            RuntimeError: Merged with keep_base=False, so W0 is gone: subtracting ΔW would not give it back exactly.
        """
        if not self.abba_merged:
            return
        if self.abba_base_copy is None:
            raise RuntimeError("cannot unmerge: the layer was merged with keep_base=False and subtracting ΔW would not restore "
                               "the base weight exactly; load the base model again")
        self.weight.data.copy_(self.abba_base_copy)
        self.abba_base_copy = None
        self.abba_merged = False

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        if all(prefix + key in state_dict for key in FACTORS):
            self.abba_initialized = not self.abba_A1.is_meta

    def extra_repr(self) -> str:
        """The base layer's line, with ranks and scale."""
        r1, r2 = self.abba_ranks
        return f"{super().extra_repr()}, r1={r1}, r2={r2}, scale={self.abba_scale:g}".lstrip(", ")

    def __reduce_ex__(self, protocol):
        return _rebuild, (self.abba_base_class,), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__


class AbbaLinear(AbbaLayer, nn.Linear):
    """nn.Linear with an ABBA update: y = x W0ᵀ + bias + s·x ((B1 A1) ⊙ (B2 A2))ᵀ, W0 frozen.

    Shapes: x [..., n] → y [..., m]; weight [m, n]; abba_A1 [r1, n], abba_B1 [m, r1], abba_A2 [r2, n], abba_B2 [m, r2].

    Args:
        in_features: n.
        out_features: m.
        bias: Whether the base has a bias.
        config: Ranks, scale, start, dropout; AbbaConfig() if None.
        device: Device of all parameters.
        dtype: dtype of weight and bias; the factors have config.adapter_dtype.
        name: Name used to pick patterns and the random stream from the config.

    Use ``AbbaLinear.from_linear(linear)`` to adapt an existing layer.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, config: AbbaConfig | None = None,
                 device=None, dtype=None, name: str = ""):
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        _adapt(self, config_or_default(config), name)

    @classmethod
    def from_linear(cls, linear: nn.Module, config: AbbaConfig | None = None, name: str = "") -> nn.Module:
        """Adapts a layer in place (its class changes, its weight stays) and returns it, base frozen.

        Raises:
            TypeError: Not a layer that can be adapted, or config is of another type.
        """
        reason = bases.refusal(linear)
        if reason:
            raise TypeError(f"linear: {reason}")
        _adapt(linear, config_or_default(config), name)
        return linear


def _adapt(linear: nn.Module, config: AbbaConfig, name: str) -> None:
    factors = init_factors(linear, config, name)
    linear.requires_grad_(False)
    if isinstance(getattr(linear, "bias", None), nn.Parameter):  # GPTQ and AWQ keep theirs as a buffer
        linear.bias.requires_grad_(config.bias != "none")
    attach(linear, config, name, factors)


class AbbaParameter(AbbaLayer, bases.ParameterBase):
    """An adapted parameter of another module: W0 [..., m, n] + s·(B1 A1) ⊙ (B2 A2), one update per expert of a stack.

    While the owner runs, reading the parameter from it gives the sum.
    """

    def begin(self, owner: nn.Module, inputs) -> None:
        """Lets the owner see the sum; a forward pre-hook."""
        if self.abba_merged or not self.abba_enabled:
            return
        self.check_initialized()
        if sharding.is_zero3(self.abba_A1):
            raise RuntimeError("ZeRO-3 does not gather the factors of a parameter that its owner computes with; use ZeRO-2, or "
                               "leave out target_parameters")
        weight = self.weight
        delta = bases.to_layout(self, delta_weight(*(getattr(self, name) for name in FACTORS), self.abba_scale))
        show_parameter(owner, self.parameter, (weight + delta).to(weight.dtype))

    def end(self, owner: nn.Module, inputs, output) -> None:
        """Lets the owner see the parameter again; a forward hook that always runs."""
        hide_parameter(owner, self.parameter)


def show_parameter(owner: nn.Module, name: str, value: Tensor) -> None:
    """Lets a module see a value in place of its parameter, until the last of the threads that run it has called
    hide_parameter."""
    with _alone():
        vars(owner)[name] = value  # found before the registered parameter
        vars(owner)[_RUNS + name] = vars(owner).get(_RUNS + name, 0) + 1


def hide_parameter(owner: nn.Module, name: str) -> None:
    """Takes :func:`show_parameter` back, once for each call of it."""
    with _alone():
        runs = vars(owner).pop(_RUNS + name, 1) - 1
        if runs:
            vars(owner)[_RUNS + name] = runs
        else:
            vars(owner).pop(name, None)


def _alone():
    """For one thread at a time; a trace knows no locks."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _LOCK


@functools.cache
def _adapted_class(base: type) -> type:
    if base is nn.Linear:
        return AbbaLinear
    if base is bases.ParameterBase:
        return AbbaParameter
    return type(f"Abba{base.__name__}", (AbbaLayer, base), {"__module__": __name__})


def _rebuild(base: type) -> nn.Module:
    cls = _adapted_class(base)
    return cls.__new__(cls)


def attach(module: nn.Module, config: AbbaConfig, name: str, factors: dict[str, Tensor], scale: float | None = None):
    """Turns a layer into an ABBA layer in place.

    Args:
        module: A layer for which :func:`abba_ext.bases.refusal` is None.
        config: Gives dropout, plan, recompute_u, and s unless scale is given.
        name: The layer's name in the model.
        factors: abba_A1 [r1, n], abba_B1 [m, r1], abba_A2 [r2, n], abba_B2 [m, r2].
        scale: s; by the config if None.
    """
    if not isinstance(module, AbbaLayer):
        base = type(module)
        module.abba_base_class = base
        module.__class__ = _adapted_class(base)
        if hasattr(module, "_hf_hook"):  # accelerate calls the forward it found; point it at the adapted one
            module._old_forward = types.MethodType(type(module).forward, module)
        tensor_parallel.reinstall_style(module)
    else:
        module.abba_base_class = nn.Linear
    if sharding.is_dtensor(getattr(module, "weight", None)):
        factors = tensor_parallel.distribute(module.weight, factors)
    module.abba_ranks = (factors["abba_A1"].size(-2), factors["abba_A2"].size(-2))
    for key in FACTORS:
        module.register_parameter(key, nn.Parameter(factors[key]))
    module.abba_scale = config.scale(name) if scale is None else scale
    module.abba_dropout = float(config.dropout)
    module.abba_recompute_u = config.recompute_u
    module.abba_plan = config.plan
    module.abba_enabled = True
    module.abba_merged = False
    module.abba_initialized = not factors["abba_A1"].is_meta
    module.abba_base_copy = None
    module.abba_fused = bases.is_fusable(module, module.abba_base_class)
    if isinstance(module, AbbaParameter):
        module.owner.add_module(ADAPTED_PARAMETER + module.parameter, module)
        module.abba_hooks = (module.owner.register_forward_pre_hook(module.begin),
                             module.owner.register_forward_hook(module.end, always_call=True))


def detach(module: nn.Module) -> None:
    """Turns an ABBA layer back into its base layer in place; a merged weight stays merged."""
    base = module.abba_base_class
    if isinstance(module, AbbaParameter):
        for hook in module.abba_hooks:
            hook.remove()
        delattr(module.owner, ADAPTED_PARAMETER + module.parameter)
    for key in FACTORS:
        delattr(module, key)
    for key in [key for key in vars(module) if key.startswith("abba_")]:
        delattr(module, key)
    module.__class__ = base
    if hasattr(module, "_hf_hook"):
        module._old_forward = types.MethodType(base.forward, module)
    tensor_parallel.reinstall_style(module)


def init_factors(module: nn.Module, config: AbbaConfig, name: str = "") -> dict[str, Tensor]:
    """The start of training for one layer (paper, section 3 and Table 3): ΔW = 0 with a gradient that is not.

    "svd": (B1, A1) = (U√Σ, √Σ Vᵀ) of the rank-r1 truncated SVD of W0, the best rank-r1 approximation (Eckart–Young), by
    randomised SVD; A2 uniform in ±√(6/n), B2 = 0, as in the authors' code. Ranks beyond W0's get B1 = 0 and A1 as below.
    "random": as that, but A1 uniform in ±1/√n and B1 in ±1/√r1, as LoRA's A and nn.Linear's weight are.
    Draws depend on (config.seed, name) alone. On the meta device the factors have shapes and no values.

    Raises:
        ValueError: init "svd" and the weight is quantised in a way that cannot be read.
    """
    n, m = bases.features(module)
    stack = bases.stack_shape(module)
    r1, r2 = config.ranks(name)
    device, dtype = bases.weight_device(module), getattr(torch, config.adapter_dtype)
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}:{name}".encode()).digest()[:8], "little") >> 1
    generator = torch.Generator("cpu").manual_seed(seed)
    fp32 = {"device": "cpu", "dtype": torch.float32}  # whatever the default device and dtype are

    def kaiming(rows, columns, slope):
        return nn.init.kaiming_uniform_(torch.empty(math.prod(stack) * rows, columns, **fp32), a=slope,
                                        generator=generator).view(*stack, rows, columns)

    a2, a1, b1 = kaiming(r2, n, 0), kaiming(r1, n, 5**0.5), kaiming(m, r1, 5**0.5)
    if config.init == "svd" and device.type != "meta":
        try:
            matrix = bases.weight_matrix(module).detach()
        except ValueError as error:
            raise ValueError(f"init 'svd' of {name!r}: {error}; or use init='random'") from None
        u, sigma, v = _truncated_svd(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), min(r1, m, n), seed)
        root = sigma.sqrt()[..., None, :]
        b1 = torch.zeros(*stack, m, r1, **fp32)
        b1[..., : root.size(-1)] = u * root
        a1[..., : root.size(-1), :] = (v * root).mT
    factors = {"abba_A1": a1, "abba_B1": b1, "abba_A2": a2, "abba_B2": torch.zeros(*stack, m, r2, **fp32)}
    return {key: factor.to(device=device, dtype=dtype) for key, factor in factors.items()}


def _truncated_svd(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top singular triplets U [..., m, rank], Σ [..., rank], V [..., n, rank] on the CPU, reproducible from the seed."""
    if not torch.isfinite(matrix).all():
        raise ValueError("init 'svd' needs a finite weight, got NaN or infinity in it")
    width = min(rank + 16, *matrix.shape[-2:])  # oversampling makes the randomised range finder near-optimal
    # The generator of one device: torch.manual_seed would seed all, and fork_rng restores those alone that it is given.
    if matrix.is_cuda:
        forked, generator = [matrix.device], torch.cuda.default_generators[matrix.device.index]
    else:
        matrix, forked, generator = matrix.cpu(), [], torch.default_generator
    with torch.random.fork_rng(devices=forked), torch.device(matrix.device):
        generator.manual_seed(seed)
        u, sigma, v = torch.svd_lowrank(matrix, q=width, niter=2)
    return u[..., :rank].cpu(), sigma[..., :rank].cpu(), v[..., :rank].cpu()
