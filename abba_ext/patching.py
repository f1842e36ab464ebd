"""Puts ABBA layers into a model and takes them out again: patch_model, unpatch_model, merge, disable_adapter."""
import contextlib
import difflib
import math
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .bases import ParameterBase, features, is_linear, refusal, weight_device
from .config import AbbaConfig, config_or_default, has_suffix, matches
from .layers import ADAPTED_PARAMETER, FACTORS, AbbaLayer, AbbaParameter, attach, detach, init_factors
from .sharding import check_unwrapped, copy_full, full_shape, full_tensor, is_sharded, reshard

_STATE = "_abba_patch"
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}  # of torch.compile, checkpoint_wrapper and FSDP
_HEAD_MODELS = re.compile(r"For(\w*Classification|QuestionAnswering|MultipleChoice)$")
# Children whose weight a module of transformers reads without calling them, at least on a GPU: an adapter there would not run.
_SELECTIVE_SCAN = ("conv1d", "out_proj")
_BYPASSED = {
    **dict.fromkeys(["MambaMixer", "FalconMambaMixer"], ("x_proj", "dt_proj", *_SELECTIVE_SCAN)),
    **dict.fromkeys(["Mamba2Mixer", "BambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer", "NemotronHMamba2Mixer",
                     "Zamba2MambaMixer"], _SELECTIVE_SCAN),
    "JambaMambaMixer": ("conv1d", "dt_proj"),
    "ZambaMambaMixer": ("conv1d",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    **dict.fromkeys(["DetrMHAttentionMap", "ConditionalDetrMHAttentionMap", "MaskFormerDetrMHAttentionMap"], ("k_proj",)),
    "DabDetrMHAttentionMap": ("k_linear",),
    "LongcatFlashTopkRouter": ("classifier",),
}


@dataclass
class _Patch:
    """What patch_model changed, kept on the model so that it can be undone."""

    config: AbbaConfig
    requires_grad: dict[str, bool]
    layers: list[str]
    originals: dict[str, Tensor] = field(default_factory=dict)  # base parameters that are trained, before training
    hooks: list = field(default_factory=list)
    padded: list[nn.Module] = field(default_factory=list)  # encoders that took padded batches apart; see _call_every_layer
    disabled: bool = False


def patch_model(model: nn.Module, config: AbbaConfig | None = None, *, verbose: bool = False) -> nn.Module:
    """Freezes a model and gives its linear layers trainable ABBA updates, in place.

    y = x W0ᵀ + bias + s·x ((B1 A1) ⊙ (B2 A2))ᵀ in every adapted layer; the model computes what it did before until the
    first training step, because ΔW starts at 0. Names of the base's parameters do not change.

    A tied weight that is trained (``modules_to_save``) is trained for all that share it. A checkpoint of transformers' Trainer
    holds the factors beside the base; load_state_dict finds them there also under the names of the hub.

    Args:
        model: Any torch model: Hugging Face transformers (Llama, Mistral, Qwen, Gemma, Phi, GPT-2, GPT-NeoX, OPT, BERT,
            RoBERTa, T5, ViT, ...) or plain modules.
        config: See :class:`AbbaConfig`. The default adapts every linear layer of the repeated blocks at r1 = r2 = 16.
        verbose: Print the trainable-parameter line.

    Returns:
        The same model.

    Raises:
        TypeError: model or config is of another type.
        ValueError: The model is patched already, or holds adapters of PEFT; DDP, FSDP or DeepSpeed has its parameters already;
            nothing matches target_modules (the message lists near misses); a target cannot be adapted. The model is left
            unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    config = config_or_default(config)
    check_patchable(model)
    if is_patched(model):
        raise ValueError("model already has ABBA layers; call abba_ext.unpatch_model(model) first")
    targets = find_targets(model, config)
    trained = _trained_base_parameters(model, config, targets)
    starts = {name: init_factors(module, config, base_name(name, module)) for name, module in targets.items()}
    scales = {name: config.scale(base_name(name, module)) for name, module in targets.items()}
    apply_patch(model, config, targets, starts, scales, trained)
    if verbose:
        print_trainable_parameters(model)
    return model


def check_patchable(model: nn.Module) -> None:
    """Raises ValueError if the model is wrapped for several processes already, or holds adapters of PEFT."""
    check_unwrapped(model)
    tuners_utils = sys.modules.get("peft.tuners.tuners_utils")
    for name, module in named_modules(model):
        if tuners_utils is not None and isinstance(module, tuners_utils.BaseTunerLayer):
            raise ValueError(f"model holds an adapter of PEFT ({name!r} is a {type(module).__name__}); give it ABBA with "
                             "peft.get_peft_model and abba_ext.peft.AbbaPeftConfig, or merge and unload that adapter first")


def apply_patch(model: nn.Module, config: AbbaConfig, targets: dict[str, nn.Module], factors: dict[str, dict[str, Tensor]],
                scales: dict[str, float], trained: Sequence[str]) -> None:
    """Attaches given factors to the target layers, freezes the base except the named parameters, and records how to undo it."""
    parameters = dict(named_parameters(model))
    patch = _Patch(config, {name: parameter.requires_grad for name, parameter in parameters.items()}, list(targets),
                   {name: full_tensor(parameters[name]).clone() for name in trained})
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in patch.originals)
    for name, module in targets.items():
        attach(module, config, name, factors[name], scales[name])
    patch.hooks = [*_checkpointing_hooks(model), model.register_load_state_dict_pre_hook(_find_trained)]
    _call_every_layer(model, patch)
    setattr(model, _STATE, patch)


def initialize_adapter(model: nn.Module) -> None:
    """Gives every factor its start anew, from the weights as they are: after patching a model on the meta device and loading
    its weights, or to start training over.

    Weights and factors may be sharded: the weights are gathered one at a time, every rank computes the same start and keeps
    its part. Every rank must call this.

    Raises:
        ValueError: The model is not patched; a layer is merged; a weight has no values yet.
    """
    patch = patch_of(model)
    layers = abba_layers(model)
    for name, layer in layers.items():
        if layer.abba_merged:
            raise ValueError(f"{name!r} is merged; unmerge it first")
        if weight_device(layer).type == "meta":
            raise ValueError(f"the weight of {name!r} has no values: it is on the meta device; load the weights first")
    reshard(model)
    for name, layer in layers.items():
        for key, value in init_factors(layer, patch.config, base_name(name, layer)).items():
            copy_full(getattr(layer, key), value)
        layer.abba_initialized = True


def unpatch_model(model: nn.Module) -> nn.Module:
    """Takes every ABBA layer out and restores the base: weights bit for bit, trained biases and heads, requires_grad.

    Raises:
        ValueError: The model is not patched.
        RuntimeError: A layer was merged without a copy of its base weight, see :meth:`AbbaLayer.unmerge`; a trained parameter
            has another shape than before. The model is left unchanged.
    """
    patch = patch_of(model)
    layers = abba_layers(model)
    _check_originals(model, patch)
    for name, layer in layers.items():
        if layer.abba_merged and layer.abba_base_copy is None:
            raise RuntimeError(f"cannot unpatch: {name!r} was merged with keep_base=False, so its base weight is gone")
    for layer in layers.values():
        layer.unmerge()
    reshard(model)
    for name, value in patch.originals.items():
        copy_full(model.get_parameter(name), value)
    _release(model, patch)
    return model


def merge_and_unload(model: nn.Module, *, safe: bool = False) -> nn.Module:
    """Adds every ΔW into its weight and takes the ABBA layers out: a plain model with no overhead, in place.

    Sums run in fp32 (fp64 for fp64 weights) and are rounded once. Trained biases and heads stay as trained.

    Args:
        model: A patched model.
        safe: Check every merged weight for NaN and infinity before any weight is written.

    Returns:
        The same model, its parameters' requires_grad as before patching.

    Raises:
        ValueError: The model is not patched; a weight is tied to another module, which merging would change too; or safe
            and a merged weight is not finite. The model is left unchanged.
        TypeError: A weight that is quantised, or computed from other parameters, cannot be merged into.
    """
    patch = patch_of(model)
    merge(model, safe=safe, keep_base=False)
    _release(model, patch)
    return model


def merge(model: nn.Module, *, safe: bool = False, keep_base: bool = True) -> None:
    """Adds every ΔW into its weight, keeping the layers, so that :func:`unmerge` can go back. See merge_and_unload."""
    patch_of(model)
    layers = {name: layer for name, layer in abba_layers(model).items() if not layer.abba_merged}
    owners: dict[int, list[str]] = {}
    for name, module in named_modules(model):
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{key}")
    for name, layer in layers.items():
        layer.check_mergeable()
        own = base_name(name, layer) + ("" if isinstance(layer, AbbaParameter) else ".weight")
        shared = [owner for owner in owners[id(layer.weight)] if owner != own]
        if shared:
            raise ValueError(f"cannot merge into {own}: it is tied to {', '.join(shared)}, which merging would change "
                             "too; untie it first (give the layer its own copy of the weight)")
    for name, layer in layers.items():  # refuse before the first weight is written
        if safe and not torch.isfinite(layer.merged_weight()).all():
            raise ValueError(f"the merged weight of {name!r} holds NaN or infinity; no weight was changed")
    for layer in layers.values():
        layer.merge(keep_base=keep_base)


def unmerge(model: nn.Module) -> None:
    """Restores every merged weight bit for bit from its kept copy. See :meth:`AbbaLayer.unmerge`."""
    patch_of(model)
    for layer in abba_layers(model).values():
        layer.unmerge()


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model computes as its base: no updates, trained biases and heads as before training.

    Raises:
        ValueError: The model is not patched.
        RuntimeError: A layer was merged without a copy of its base weight; a trained parameter has another shape than before.
    """
    patch = patch_of(model)
    if patch.disabled:
        yield model
        return
    _check_originals(model, patch)
    layers = abba_layers(model)
    merged = [layer for layer in layers.values() if layer.abba_merged]
    if any(layer.abba_base_copy is None for layer in merged):
        raise RuntimeError("cannot disable the adapter: it was merged with keep_base=False, so the base weights are gone")
    enabled = {layer: layer.abba_enabled for layer in layers.values()}

    def swap():  # a trained parameter's value and its original
        reshard(model)
        for name, original in patch.originals.items():
            parameter = model.get_parameter(name)
            if is_sharded(parameter):
                patch.originals[name] = full_tensor(parameter).clone()
                copy_full(parameter, original)
            else:
                patch.originals[name] = parameter.data
                parameter.data = original.to(parameter.device, parameter.dtype)

    for layer in merged:
        layer.unmerge()
    for layer in layers.values():
        layer.abba_enabled = False
    swap()
    patch.disabled = True
    try:
        yield model
    finally:
        patch.disabled = False
        swap()
        for layer, state in enabled.items():
            layer.abba_enabled = state
        for layer in merged:
            layer.merge()


def get_nb_trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of a model; tied ones counted once, bitsandbytes' 4-bit ones by what they stand for."""
    parameters = list(model.parameters())
    packed = [getattr(getattr(parameter, "quant_state", None), "shape", None) for parameter in parameters]
    sizes = [math.prod(shape or full_shape(parameter)) for shape, parameter in zip(packed, parameters, strict=True)]
    return sum(size for size, parameter in zip(sizes, parameters, strict=True) if parameter.requires_grad), sum(sizes)


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints PEFT's line: trainable params: ... || all params: ... || trainable%: ..."""
    trainable, total = get_nb_trainable_parameters(model)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / max(total, 1):.4f}")


def abba_layers(model: nn.Module) -> dict[str, AbbaLayer]:
    """The ABBA layers of a model by name; a shared layer once."""
    return {name: module for name, module in named_modules(model) if isinstance(module, AbbaLayer)}


def is_patched(model: nn.Module) -> bool:
    """Whether the model holds ABBA layers."""
    return bool(abba_layers(model))


def named_modules(model: nn.Module, **options) -> Iterator[tuple[str, nn.Module]]:
    """model.named_modules(**options) by the names that the modules have without wrappers around them."""
    return ((_plain_name(name), module) for name, module in model.named_modules(**options))


def named_parameters(model: nn.Module, **options) -> Iterator[tuple[str, nn.Parameter]]:
    """model.named_parameters(**options) by the names that the parameters have without wrappers around their modules."""
    return ((_plain_name(name), parameter) for name, parameter in model.named_parameters(**options))


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def patch_of(model: nn.Module) -> _Patch:
    """The record patch_model left on the model.

    Raises:
        ValueError: There is none.
    """
    patch = getattr(model, _STATE, None)
    if patch is None:
        raise ValueError("model is not patched (or is a part or a wrapper of the patched model); call "
                         "abba_ext.patch_model(model) first, and pass the same object here")
    return patch


def base_name(name: str, module: nn.Module) -> str:
    """The name of what a layer adapts: its own, or that of the parameter it stands for."""
    if not isinstance(module, ParameterBase):
        return name
    owner, _, leaf = name.rpartition(".")
    return f"{owner}.{leaf.removeprefix(ADAPTED_PARAMETER)}".lstrip(".")


def find_layer(model: nn.Module, name: str) -> nn.Module | None:
    """The layer of that name, adapted or not; a parameter as the ParameterBase that stands for it. None if there is none."""
    with contextlib.suppress(AttributeError):
        return model.get_submodule(name)
    owner, _, leaf = name.rpartition(".")
    parameter = leaf.removeprefix(ADAPTED_PARAMETER)
    with contextlib.suppress(AttributeError):
        module = model.get_submodule(owner)
        if parameter != leaf and isinstance(module._parameters.get(parameter), nn.Parameter):
            return ParameterBase(module, parameter)
    return None


def find_targets(model: nn.Module, config: AbbaConfig) -> dict[str, nn.Module]:
    """The layers that patch_model would adapt, by name, in the model's order; a shared layer once. Parameters come last, as
    ParameterBase modules.

    Raises:
        ValueError: Nothing matches (the message lists near misses), or a target cannot be adapted.
    """
    aliases: dict[int, list[str]] = {}
    for name, module in named_modules(model, remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
    modules = {name: module for name, module in named_modules(model) if name}
    reasons = {name: _bypassed(name, modules) or refusal(module) for name, module in modules.items()}
    candidates = {name: modules[name] for name, reason in reasons.items() if reason is None}
    wanted = config.target_modules

    def one_by_one(patterns):
        return {patterns: patterns} if isinstance(patterns, str) else {suffix: [suffix] for suffix in patterns}

    def fits(patterns, name):
        names = aliases[id(modules[name])]
        if isinstance(patterns, str):
            return any(re.fullmatch(patterns, alias) for alias in names)
        return any(has_suffix(alias, pattern) for pattern in patterns for alias in names)

    if wanted is None or wanted == "all-linear":
        heads = _head_modules(model, config) + _output_embeddings(model)
        free = [name for name in candidates if is_linear(candidates[name]) and not _is_inside(name, heads)]
        blocks = [name + "." for name, module in named_modules(model) if isinstance(module, nn.ModuleList)]
        inside = [name for name in free if any(name.startswith(block) for block in blocks) and min(features(modules[name])) > 1]
        selected = inside if wanted is None and inside else free
    else:
        for text, pattern in one_by_one(wanted).items():
            if not any(fits(pattern, name) for name in candidates):
                misfits = {name: reasons[name] for name in modules if fits(pattern, name)}
                raise ValueError(_nothing_matched(text, candidates, misfits))
        selected = [name for name in candidates if fits(wanted, name)]
    parameters = _target_parameters(modules, config)
    selected += parameters
    if config.layers_to_transform is not None:
        indices = {name: int(index.group(1)) for name in selected if (index := re.search(r"(?:^|\.)(\d+)\.", name))}
        missing = sorted(set(config.layers_to_transform) - set(indices.values()))
        if missing:
            raise ValueError(f"layers_to_transform {missing}: the targets lie in blocks {sorted(set(indices.values()))}")
        selected = [name for name in selected if indices.get(name) in config.layers_to_transform]
    if config.exclude_modules is not None:
        for text, pattern in one_by_one(config.exclude_modules).items():
            if not any(fits(pattern, name) for name in modules):
                raise ValueError(f"exclude_modules: {text!r} matches no module")
        selected = [name for name in selected if name in parameters or not fits(config.exclude_modules, name)]
    if not selected:
        refused = [f"{name!r} {reason}" for name, reason in reasons.items() if reason and is_linear(modules[name])]
        if is_linear(model):
            refused = ["it is one itself; AbbaLinear.from_linear adapts a single layer"]
        raise ValueError(f"no layer is left to adapt: target_modules={wanted!r}, exclude_modules={config.exclude_modules!r}; the "
                         f"model has {len(candidates)} layers that can be adapted ({_leaf_names(candidates)})" +
                         (f"; {refused[0]}" if refused else ""))
    targets = {name: parameters.get(name) or candidates[name] for name in selected}
    for kind in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, kind):
            if not any(matches(pattern, base_name(*target)) for target in targets.items()):
                raise ValueError(f"{kind}: {pattern!r} fits no adapted layer; adapted are {_leaf_names(selected)}")
    return targets


def _target_parameters(modules: dict[str, nn.Module], config: AbbaConfig) -> dict[str, ParameterBase]:
    """The parameters that target_parameters names, as layers to adapt."""
    found = {}
    for wanted in config.target_parameters or ():
        fitting = [(name, parameter) for name, module in modules.items() for parameter in module._parameters
                   if has_suffix(f"{name}.{parameter}", wanted)]
        if not fitting:
            raise ValueError(f"target_parameters: no parameter is named {wanted!r}")
        for name, parameter in fitting:
            if refusal(modules[name]) is None:
                raise ValueError(f"target_parameters: {name}.{parameter} belongs to a {type(modules[name]).__name__}; adapt "
                                 "that layer through target_modules")
            base = ParameterBase(modules[name], parameter)
            if reason := refusal(base):
                raise ValueError(f"target_parameters: {name}.{parameter} {reason}")
            found[f"{name}.{ADAPTED_PARAMETER}{parameter}"] = base
    return found


def _bypassed(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Why an adapter on this layer would not run, or None."""
    owner, _, leaf = name.rpartition(".")
    for kind in type(modules.get(owner)).__mro__:
        if leaf in _BYPASSED.get(kind.__name__, ()):
            return f"is computed by {kind.__name__} itself, which reads its weight without calling it"
    return None


def _is_inside(name: str, owners: list[str]) -> bool:
    return any(name == owner or name.startswith(owner + ".") for owner in owners)


def _leaf_names(names) -> str:
    leaves = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    return ", ".join(leaves[:20]) + (", ..." if len(leaves) > 20 else "")


def _nothing_matched(pattern: str, candidates: dict[str, nn.Module], misfits: dict[str, str]) -> str:
    message = f"target_modules: {pattern!r} matches no layer that can be adapted"
    if misfits:
        name, reason = next(iter(misfits.items()))
        message += f" ({name!r} {reason})"
    if any(pattern == name.rpartition(".")[2] for name in candidates):
        message += f"; a string is a regular expression for the full name: give a list, [{pattern!r}]"
    near = [match for pool in ({name.rsplit(".", 1)[-1] for name in candidates}, candidates)
            for match in difflib.get_close_matches(pattern, list(pool), n=3)]
    if near:
        message += f"; near misses: {', '.join(dict.fromkeys(near))}"
    return f"{message}; those are named {_leaf_names(candidates) or '(none)'}"


def _output_embeddings(model: nn.Module) -> list[str]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [name for name, module in named_modules(model) if module is head]


def _head_modules(model: nn.Module, config: AbbaConfig) -> list[str]:
    """Names of the modules that are trained in full."""
    if config.modules_to_save is None:
        prefix = getattr(model, "base_model_prefix", "")
        if not (_HEAD_MODELS.search(type(model).__name__) and hasattr(model, prefix)):
            return []
        return [name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())]
    found = []
    for wanted in config.modules_to_save:
        names = [name for name, _ in named_modules(model) if has_suffix(name, wanted)]
        if not names:
            near = difflib.get_close_matches(wanted, {name.rsplit(".", 1)[-1] for name, _ in named_modules(model)}, n=3)
            raise ValueError(f"modules_to_save: no module is named {wanted!r}" +
                             (f"; near misses: {', '.join(near)}" if near else ""))
        found += names
    return found


def _trained_base_parameters(model: nn.Module, config: AbbaConfig, targets: dict[str, nn.Module]) -> list[str]:
    """Names of the parameters beside the factors that are trained; a tied one by its first name."""
    heads = _head_modules(model, config)
    inside = [name for name in targets if _is_inside(name, heads)]
    if inside:
        raise ValueError(f"modules_to_save: {inside[0]!r} cannot be both adapted and trained in full")
    first = {id(parameter): name for name, parameter in named_parameters(model)}
    trained, filled = {}, set()
    for name, parameter in named_parameters(model, remove_duplicate=False):
        owner, _, key = name.rpartition(".")
        around = [head for head in heads if _is_inside(owner, [head])]
        is_bias = key == "bias" and (config.bias == "all" or config.bias == "abba_only" and owner in targets)
        if (around or is_bias) and parameter.is_floating_point():
            trained[first[id(parameter)]] = True
            filled.update(around)
    for wanted in config.modules_to_save or ():
        if not any(has_suffix(head, wanted) for head in filled):
            raise ValueError(f"modules_to_save: {wanted!r} holds no floating-point parameter to train")
    return list(trained)


def _check_originals(model: nn.Module, patch: _Patch) -> None:
    for name, original in patch.originals.items():
        shape = full_shape(model.get_parameter(name))
        if len(shape) == original.dim() and tuple(shape) != tuple(original.shape):
            raise RuntimeError(f"{name!r} was {list(original.shape)} when the model was patched and is {list(shape)} now, so its "
                               "base cannot be brought back; resize embeddings before patch_model")


class _RequireGrad:
    """Hooks for reentrant gradient checkpointing, which drops the gradients of a block none of whose inputs requires one;
    with a frozen base that is every block. While a model checkpoints, the outputs of its embeddings and the inputs of what
    holds its blocks are made to require gradients.

    Args:
        checkpointing: The modules that tell by an attribute whether they checkpoint.
    """

    def __init__(self, checkpointing: list[nn.Module]):
        self.checkpointing = checkpointing

    def __call__(self, module: nn.Module, inputs, output) -> None:
        """A forward hook of embeddings."""
        if self._is_checkpointing() and _lacks_grad(output):
            output.requires_grad_(True)

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """A forward pre-hook of what holds blocks: some models embed otherwise (images, sound) or are given embeddings."""
        if not self._is_checkpointing():
            return None
        named = {name: _with_grad(kwargs[name]) for name in ("hidden_states", "inputs_embeds") if name in kwargs}
        return (*map(_with_grad, args[:1]), *args[1:]), {**kwargs, **named}

    def _is_checkpointing(self) -> bool:
        return torch.is_grad_enabled() and any(part.gradient_checkpointing for part in self.checkpointing)


def _lacks_grad(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad


def _with_grad(value):
    """A tensor that requires gradients; the caller's stays as it is."""
    return value.detach().requires_grad_(True) if _lacks_grad(value) else value


def _checkpointing_hooks(model: nn.Module) -> list:
    hook = _RequireGrad(_checkpointing_parts(model))
    embeddings = {}
    for module in model.modules():
        if hasattr(module, "get_input_embeddings"):
            with contextlib.suppress(NotImplementedError, AttributeError):
                embedding = module.get_input_embeddings()
                if isinstance(embedding, nn.Module):
                    embeddings[id(embedding)] = embedding
    holders = [module for module in model.modules() if any(map(_are_blocks, module.children()))]
    return [*(embedding.register_forward_hook(hook) for embedding in embeddings.values()),
            *(holder.register_forward_pre_hook(hook.before, with_kwargs=True) for holder in holders)]


def _checkpointing_parts(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if hasattr(part, "gradient_checkpointing")]


def _are_blocks(module: nn.Module) -> bool:
    """Whether the module is a list of blocks that are adapted and may checkpoint."""
    return isinstance(module, nn.ModuleList) and is_patched(module) and bool(_checkpointing_parts(module))


def _find_trained(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """A load_state_dict pre-hook that gives trained tensors their own names again. Checkpoints that transformers writes hold some
    models' tensors by the names of the hub, some of them joined; from_pretrained takes that back, resuming a Trainer does not."""
    missing = {name: parameter for name, parameter in model.named_parameters()
               if (_is_factor(name) or parameter.requires_grad) and prefix + name not in state_dict}
    core_model_loading = sys.modules.get("transformers.core_model_loading")  # from transformers 5 on
    if not missing or core_model_loading is None or not hasattr(model, "config") or not any(map(_is_factor, state_dict)):
        return
    # Numbers in their place show where the conversion leaves every element of a factor; of a whole head, whether it moves it as it is.
    numbers, count = {}, 0
    for name, parameter in missing.items():
        if _is_factor(name):
            numbers[name] = torch.arange(count, count + parameter.numel()).view(parameter.shape)
            count += parameter.numel()
        else:
            numbers[name] = torch.tensor(count).expand(parameter.shape)  # strides of 0, until something is done to it
            count += 1
    try:
        converted = core_model_loading.revert_weight_conversion(model, numbers)
    except Exception as error:  # whatever a conversion for weights does to factors; torch then tells what is missing
        warnings.warn(f"the names of the checkpoint could not be taken back: {error}", stacklevel=2)
        return
    elements, known, heads = torch.empty(count, dtype=torch.float64), torch.zeros(count, dtype=torch.bool), {}
    for name, number in converted.items():
        value = state_dict.get(prefix + name)
        if value is None or value.shape != number.shape:
            continue
        if any(number.stride()):
            elements[number], known[number] = value.to(elements), True
        else:
            heads[int(number.flatten()[0])] = value
        del state_dict[prefix + name]
    for name, number in numbers.items():
        if known[number].all():
            state_dict[prefix + name] = elements[number].to(missing[name].dtype)
        elif int(number.flatten()[0]) in heads:
            state_dict[prefix + name] = heads[int(number.flatten()[0])]


def _is_factor(name: str) -> bool:
    return name.rpartition(".")[2] in FACTORS


def _call_every_layer(model: nn.Module, patch: _Patch) -> None:
    """In eval mode torch's TransformerEncoderLayer reads the weights of its layers without calling them, unless hooks are
    attached; and TransformerEncoder hands it nested tensors, which it can compute in no other way."""
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)) and is_patched(module):
            if isinstance(module, nn.TransformerEncoderLayer):
                patch.hooks.append(module.register_forward_pre_hook(_do_nothing))
            elif module.use_nested_tensor:
                module.use_nested_tensor = False
                patch.padded.append(module)


def _do_nothing(module: nn.Module, inputs) -> None:
    """A forward pre-hook."""


def _release(model: nn.Module, patch: _Patch) -> None:
    for hook in patch.hooks:
        hook.remove()
    for encoder in patch.padded:
        encoder.use_nested_tensor = True
    for layer in abba_layers(model).values():
        detach(layer)
    for name, parameter in named_parameters(model):
        parameter.requires_grad_(patch.requires_grad.get(name, parameter.requires_grad))  # one may have come since
    delattr(model, _STATE)

