"""Base layers: what can be adapted, the weight as a matrix W0 [m, n], and how ΔW acts on the layer's output."""
import copy
import math
import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import sharding, tensor_parallel
from .functional import abba_update, delta_weight

_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ParameterBase(nn.Module):
    """A parameter [m, n] or [E, m, n] of another module, seen as a base layer: the stacked experts of a mixture of experts.

    The owner keeps the parameter. While the owner runs, it sees the parameter plus ΔW (one ΔW per expert), formed for that
    run alone, so whatever the owner computes from its parameter is adapted.

    Args:
        owner: The module that holds the parameter.
        parameter: The parameter's name in the owner.
    """

    def __init__(self, owner: nn.Module, parameter: str):
        super().__init__()
        object.__setattr__(self, "owner", owner)  # not a submodule: the owner contains this module
        self.parameter = parameter

    @property
    def weight(self) -> nn.Parameter:
        """The parameter itself, as the owner holds it."""
        return self.owner._parameters[self.parameter]

    @property
    def bias(self) -> None:
        """A parameter has none."""
        return None

    @property
    def transposed(self) -> bool:
        """Whether the experts lie as [E, n, m], as transformers' experts modules tell."""
        return self.weight.dim() == 3 and bool(getattr(self.owner, "is_transposed", False))


# --- kinds of base layers ---


class _Linear:
    """W0 [m, n]; y += s·x ((B1 A1) ⊙ (B2 A2))ᵀ. Quantised linear layers too."""

    def features(self, module):
        return module.in_features, module.out_features

    def matrix(self, module, weight):
        return weight

    def add_update(self, module, base_output, x, factors, scale, recompute_u):
        output = abba_update(base_output, x, *factors, scale, recompute_u=recompute_u)
        if x.requires_grad and output.requires_grad and not base_output.requires_grad:
            output.register_hook(lambda gradient: _refuse_backward(module))
        return output


class _TransformersConv1D(_Linear):
    """A linear layer whose weight is W0ᵀ, [n, m]."""

    def features(self, module):
        return module.nx, module.nf

    def matrix(self, module, weight):
        return weight.t()


class _Embedding:
    """W0 [num_embeddings, embedding_dim]; the rows of ΔW that the ids pick are added: s·(B1[ids] A1) ⊙ (B2[ids] A2)."""

    def features(self, module):
        return module.embedding_dim, module.num_embeddings

    def matrix(self, module, weight):
        return weight

    def add_update(self, module, base_output, ids, factors, scale, recompute_u):
        a1, b1, a2, b2 = factors
        rows1, rows2 = (embedding(ids, b, padding_idx=module.padding_idx, sparse=module.sparse) for b in (b1, b2))
        update = scale * (rows1 @ a1) * (rows2 @ a2)
        update = update * getattr(module, "embed_scale", 1.0)  # transformers' scaled embeddings, as Gemma's
        return (base_output + update).to(base_output.dtype)


class _Convolution:
    """W0 [out, in / groups · kernel]; y += conv(x, ΔW). ΔW has the size of the weight, which is small beside the activations
    of a convolution; it is formed for the call and not saved for backward."""

    def features(self, module):
        return math.prod(sharding.full_shape(module.weight)[1:]), module.out_channels

    def matrix(self, module, weight):
        return weight.flatten(1)

    def add_update(self, module, base_output, x, factors, scale, recompute_u):
        kernel = delta_weight(*factors, scale).view(module.weight.shape).to(base_output.dtype)
        return base_output + module._conv_forward(x.to(base_output.dtype), kernel, None)


class _Stack:
    """Parameters of other modules, which may be stacked: W0 [..., m, n]."""

    def features(self, module):
        m, n = self.matrix(module, module.weight).shape[-2:]
        return n, m

    def matrix(self, module, weight):
        return weight.mT if module.transposed else weight


def _kind(module: nn.Module):
    if isinstance(module, nn.Linear):
        return _Linear()
    if _is_transformers_conv1d(module):
        return _TransformersConv1D()
    if isinstance(module, nn.Embedding):
        return _Embedding()
    if isinstance(module, _CONVOLUTIONS):
        return _Convolution()
    if isinstance(module, ParameterBase):
        return _Stack()
    if hasattr(module, "in_features") and hasattr(module, "out_features") and _packed_weight(module) is not None:
        return _Linear()
    return None


def _is_transformers_conv1d(module: nn.Module) -> bool:
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")  # without it there is none in the model
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


def _base_class(module: nn.Module) -> type:
    return getattr(module, "abba_base_class", type(module))


def _refuse_backward(module: nn.Module) -> None:
    raise RuntimeError(f"the kernel of this {_base_class(module).__name__} computes no gradient of its input, so all gradients "
                       "before it would be wrong; load the base with a kernel that trains, such as gptqmodel's gptq_torch or "
                       "torch_awq")


def _packed_weight(module: nn.Module) -> Tensor | None:
    """The quantised weight of the layers that have no `weight`: GPTQ and AWQ, HQQ."""
    return getattr(module, "qweight", getattr(module, "W_q", None))


# --- what the other modules use ---


def refusal(module: nn.Module) -> str | None:
    """Why the module cannot be adapted, or None if it can."""
    if hasattr(module, "abba_base_class"):
        return "is adapted already"
    if _kind(module) is None:
        return (f"is a {type(module).__name__}; linear layers (torch.nn.Linear, transformers' Conv1D, quantised ones), "
                "torch.nn.Embedding and torch.nn.Conv1d, Conv2d and Conv3d can be adapted")
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "is the output projection of torch.nn.MultiheadAttention, which reads its weight without calling it"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        return "is an Embedding with max_norm or scale_grad_by_freq, which have no meaning for a frozen weight"
    if isinstance(module, ParameterBase) and module.weight.dim() not in (2, 3):
        return f"is a parameter of shape {list(module.weight.shape)}; [m, n] and [experts, m, n] can be adapted"
    hook = getattr(getattr(module, "owner", module), "_hf_hook", None)
    if any(getattr(part, "offload", False) for part in (hook, *getattr(hook, "hooks", ()))):
        return "is offloaded by accelerate, which would not bring its factors along; keep its weight on a device"
    split = sharding.is_dtensor(getattr(module, "weight", None))
    if split and (reason := tensor_parallel.refusal(module)):
        return reason
    if "forward" in vars(module) and not hasattr(module, "_hf_hook") and not (split and tensor_parallel.installed_style(module)):
        return "has its forward replaced on the instance, which would bypass the adapter"
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer, of any storage: what adapters take when no names are given."""
    return isinstance(_kind(module), _Linear)


def features(module: nn.Module) -> tuple[int, int]:
    """(n, m): columns and rows of W0. For linear layers in_features and out_features; for an embedding embedding_dim and
    num_embeddings; for a convolution in_channels / groups · kernel size and out_channels."""
    return _kind(module).features(module)


def stack_shape(module: nn.Module) -> tuple[int, ...]:
    """(E,) if the module is a stack of E weights with factors of their own, else ()."""
    return tuple(module.weight.shape[:-2]) if isinstance(module, ParameterBase) else ()


def has_plain_weight(module: nn.Module) -> bool:
    """Whether the weight is an ordinary floating-point tensor: not quantised, not a tensor subclass."""
    weight = getattr(module, "weight", None)
    return (isinstance(weight, Tensor) and weight.dtype in _PLAIN_DTYPES and not is_traceable_wrapper_subclass(weight)
            and not hasattr(weight, "quant_state"))  # bitsandbytes can pack 4-bit values into a floating-point dtype


def weight_dtype(module: nn.Module) -> torch.dtype | None:
    """dtype of a plain weight, None if it is quantised."""
    return module.weight.dtype if has_plain_weight(module) else None


def described_weight(module: nn.Module) -> str:
    """Type and dtype of the weight, for messages."""
    weight = getattr(module, "weight", None)
    return f"{type(weight).__name__} {weight.dtype}" if isinstance(weight, Tensor) else f"that of a {type(module).__name__}"


def weight_device(module: nn.Module) -> torch.device:
    """Where the weight lies, quantised or not."""
    packed = _packed_weight(module)
    return module.weight.device if packed is None else packed.device


def weight_matrix(module: nn.Module) -> Tensor:
    """W0 [m, n] (a stack's [E, m, n]): a view of a plain weight, the values of a quantised one, or a sharded one gathered from
    all ranks (which must all call this).

    Raises:
        ValueError: The weight is quantised in a way that cannot be read back, or reading it needs PEFT.
    """
    weight = getattr(module, "weight", None)
    if sharding.is_sharded(weight):
        weight = sharding.full_tensor(weight)
    elif not has_plain_weight(module):
        weight = _dequantized(module)
    return _kind(module).matrix(module, weight)


def weight_view(module: nn.Module) -> Tensor:
    """W0 [m, n] as a view of a plain weight; nothing is checked."""
    return _kind(module).matrix(module, module.weight)


def to_layout(module: nn.Module, matrix: Tensor) -> Tensor:
    """A matrix [m, n] in the shape and order of the module's weight; the inverse of :func:`weight_matrix`."""
    if isinstance(_kind(module), _Convolution):
        return matrix.view(module.weight.shape)
    return _kind(module).matrix(module, matrix)  # the identity or a transposition, its own inverse


def is_fusable(module: nn.Module, base_class: type | None = None) -> bool:
    """Whether the layer (base_class if given, else its own class) computes x W0ᵀ + bias and nothing else, so that one
    autograd node can compute it together with the update."""
    forward = (base_class or type(module)).forward
    return has_plain_weight(module) and (forward is nn.Linear.forward or _is_transformers_conv1d(module))


def add_update(module: nn.Module, base_output: Tensor, x: Tensor, factors: tuple[Tensor, Tensor, Tensor, Tensor], scale: float,
               *, recompute_u: bool = False) -> Tensor:
    """The output of a layer whose weight is W0 + ΔW, from the output of the layer itself.

    Args:
        module: The base layer.
        base_output: Its output for x; not modified.
        x: The adapter's input: the layer's, after dropout if there is any. Ids for an embedding.
        factors: (A1 [r1, n], B1 [m, r1], A2 [r2, n], B2 [m, r2]).
        scale: s.
        recompute_u: See :func:`abba_ext.abba_linear`.
    """
    return _kind(module).add_update(module, base_output, x, factors, scale, recompute_u)


def _dequantized(module: nn.Module) -> Tensor:
    if hasattr(module, "qweight") and hasattr(module, "scales"):
        return _weight_by_identity(module)
    try:
        from peft.utils.quantization_utils import resolve_quantization_backend
    except ImportError:
        raise ValueError(f"the weight is {described_weight(module)}; reading a quantised weight needs PEFT 0.21: "
                         "pip install 'abba_ext[peft]'") from None
    try:
        backend = resolve_quantization_backend(module, get_apply_tensor_subclass=lambda: None)  # which only writing needs
        if backend is not None:
            return backend.get_base_weight(module)
        reason = ""
    except (TypeError, NotImplementedError) as error:
        reason = f" ({error})"
    raise ValueError(f"the weight is {described_weight(module)}, which cannot be read as floating-point values{reason}")


@torch.no_grad()
def _weight_by_identity(module: nn.Module) -> Tensor:
    """W0 [m, n] of a GPTQ or AWQ layer, whose packing its own kernel alone can read: its outputs for the identity. Without the
    bias, beside which a half-precision output would round the weight away."""
    layer = copy.deepcopy(module)  # kernels may repack their weight for good when they first run
    layer.bias = None
    identity = torch.eye(layer.in_features, dtype=layer.scales.dtype, device=weight_device(layer))
    try:
        return _base_class(layer).forward(layer, identity).t()
    except RuntimeError as error:
        raise ValueError(f"the weight is {described_weight(module)}, which cannot be read: its kernel failed ({error})") from None
