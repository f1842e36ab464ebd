"""The configuration of an ABBA adapter: what to adapt, at which ranks, with which scale and start."""
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DEFAULT_TOTAL_RANK = 32
SCALINGS = ("paper", "official", "peft")
INITS = ("svd", "random")
BIASES = ("none", "all", "abba_only")
DTYPES = ("float32", "bfloat16", "float16", "float64")
PLANS = ("auto", "khatri_rao", "mixed", "dense")


def has_suffix(name: str, suffix: str) -> bool:
    """Whether a module name is the suffix or ends in it after a dot."""
    return name == suffix or name.endswith("." + suffix)


def matches(pattern: str, name: str) -> bool:
    """Whether a module name has the pattern as a suffix or is a full regular-expression match of it."""
    if has_suffix(name, pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def peft_pattern(pattern: str) -> str:
    """The regular expression of all names that a pattern of PEFT's rank_pattern and alpha_pattern fits: those that end in it,
    after a dot or as a whole."""
    return rf"(.*\.)?({pattern})"


@dataclass(frozen=True)
class AbbaConfig:
    """ABBA: ΔW = s·(B1 A1) ⊙ (B2 A2), with B1 A1 of rank r1 and B2 A2 of rank r2 (arXiv 2505.14238).

    Attributes:
        r: Total rank r1 + r2, the parameter budget of a LoRA of rank r; split in halves. 32 if no rank is given.
        r1: Rank of the first pair; give it together with r2, instead of r.
        r2: Rank of the second pair.
        alpha: α, the strength of the update. The paper's best values are 16 to 32 (Tables 4 and 8).
        scaling: How s follows from α: "paper" s = α²/√(r1·r2), rank-stable by Theorem 2; "official" s = √α1·√α2 = α, as the
            authors' code has it; "peft" s = α/r with r = r1 = r2, as PEFT's LoHa; or a number, s itself.
        init: "svd", the paper's (Table 3, "ours"): B1 A1 is the best rank-r1 approximation of W0, A2 is Kaiming-uniform,
            B2 = 0. "random": as that, with B1 and A1 Kaiming-uniform, for weights too large or too coarse for an SVD.
            ΔW = 0 at the start in both.
        dropout: Probability with which elements of the adapter's input are zeroed in training; the base sees all.
        target_modules: None adapts every linear layer of the model's repeated blocks (attention and MLP projections; all
            linear layers if there are no blocks). A list holds exact names or dotted suffixes ("q_proj",
            "layers.3.mlp.up_proj"). A string is a regular expression for the full name, or "all-linear": every linear
            layer but the output head. Embeddings and convolutions are adapted only where they are named.
        target_parameters: Parameters [m, n] or [experts, m, n] that a module holds directly, as exact names or dotted
            suffixes ("experts.gate_up_proj"): the stacked experts of a mixture of experts, one update per expert. Beside
            target_modules; with target_modules=[] nothing else is adapted.
        exclude_modules: List or regular expression of modules to leave out.
        layers_to_transform: Indices of the repeated blocks to adapt; None for all.
        rank_pattern: Name, suffix or regular expression → total rank, or (r1, r2), of the layers it fits.
        alpha_pattern: Name, suffix or regular expression → α of the layers it fits.
        bias: Biases that are trained too: "none", "all", or "abba_only" (those of adapted layers).
        modules_to_save: Modules trained in full and saved with the adapter, as names or suffixes. None trains the freshly
            initialised head of a classification or question-answering model and nothing else; [] trains nothing.
        adapter_dtype: dtype of the factors: "float32" masters by default, whatever the base's dtype.
        seed: Makes the start reproducible; each layer draws from (seed, its name), so order does not matter.
        recompute_u: Recompute u = x A*ᵀ ([tokens, r1·r2] per layer) in backward instead of saving it.
        plan: "auto", "khatri_rao", "mixed" or "dense"; see :func:`abba_ext.kernel_plan`.

    Raises:
        ValueError, TypeError: For a value out of range; the message names the field, what was expected and what came.
    """

    r: int | None = None
    r1: int | None = None
    r2: int | None = None
    alpha: float = 16.0
    scaling: str | float = "paper"
    init: str = "svd"
    dropout: float = 0.0
    target_modules: str | Sequence[str] | None = None
    target_parameters: Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    rank_pattern: Mapping[str, int | Sequence[int]] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    adapter_dtype: str = "float32"
    seed: int = 0
    recompute_u: bool = False
    plan: str = "auto"

    def __post_init__(self):
        if not isinstance(self.adapter_dtype, str):  # a torch.dtype
            object.__setattr__(self, "adapter_dtype", str(self.adapter_dtype).removeprefix("torch."))
        if isinstance(self.layers_to_transform, int) and not isinstance(self.layers_to_transform, bool):
            object.__setattr__(self, "layers_to_transform", [self.layers_to_transform])
        for name in ("r", "r1", "r2"):
            value = getattr(self, name)
            if value is not None:
                _check_int(name, value, 2 if name == "r" else 1)
        if (self.r1 is None) != (self.r2 is None):
            raise ValueError(f"r1 and r2 must be given together, got r1={self.r1}, r2={self.r2}")
        if self.r is not None and self.r1 is not None and self.r != self.r1 + self.r2:
            raise ValueError(f"r must equal r1 + r2 = {self.r1 + self.r2} or be left out, got {self.r}")
        check_choice("init", self.init, INITS)
        check_choice("bias", self.bias, BIASES)
        check_choice("adapter_dtype", self.adapter_dtype, DTYPES)
        check_choice("plan", self.plan, PLANS)
        _check_number("alpha", self.alpha)
        if not isinstance(self.recompute_u, bool):
            raise TypeError(f"recompute_u must be a bool, got {type(self.recompute_u).__name__} {self.recompute_u!r}")
        if isinstance(self.scaling, str):
            check_choice("scaling", self.scaling, SCALINGS, "or a number")
        else:
            _check_number("scaling", self.scaling)
        _check_number("dropout", self.dropout)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {type(self.seed).__name__}")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), str):
                if name == "exclude_modules" or self.target_modules != "all-linear":
                    _check_regex(name, getattr(self, name))
            else:
                _check_strings(name, getattr(self, name))
        _check_strings("target_parameters", self.target_parameters)
        _check_strings("modules_to_save", self.modules_to_save)
        if self.layers_to_transform is not None:
            if not isinstance(self.layers_to_transform, Iterable):
                raise TypeError(f"layers_to_transform must be an index or a list of them, got {self.layers_to_transform!r}")
            for index in self.layers_to_transform:
                _check_int("layers_to_transform", index, 0)
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                raise TypeError(f"{name} must map names to values, got {getattr(self, name)!r}")
        for pattern, rank in self.rank_pattern.items():
            _check_regex("rank_pattern", pattern)
            _split_rank(f"rank_pattern[{pattern!r}]", rank)
        for pattern, alpha in self.alpha_pattern.items():
            _check_regex("alpha_pattern", pattern)
            _check_number(f"alpha_pattern[{pattern!r}]", alpha)
        if self.scaling == "peft" and not self.rank_pattern and self.ranks()[0] != self.ranks()[1]:
            raise ValueError(f"scaling 'peft' is s = α/r with r = r1 = r2, got r1={self.r1}, r2={self.r2}")

    def ranks(self, name: str = "") -> tuple[int, int]:
        """(r1, r2) of the layer of that name."""
        for pattern, rank in self.rank_pattern.items():
            if matches(pattern, name):
                return _split_rank("rank_pattern", rank)
        if self.r1 is not None:
            return self.r1, self.r2
        return _split_rank("r", DEFAULT_TOTAL_RANK if self.r is None else self.r)

    def scale(self, name: str = "") -> float:
        """s of the layer of that name."""
        if not isinstance(self.scaling, str):
            return float(self.scaling)
        alpha = next((value for pattern, value in self.alpha_pattern.items() if matches(pattern, name)), self.alpha)
        r1, r2 = self.ranks(name)
        if self.scaling == "official":
            return float(alpha)
        if self.scaling == "peft":
            if r1 != r2:
                raise ValueError(f"scaling 'peft' is s = α/r with r = r1 = r2, got r1={r1}, r2={r2} for layer {name!r}")
            return alpha / r1
        return alpha**2 / math.sqrt(r1 * r2)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-compatible values; :meth:`from_dict` is the inverse."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AbbaConfig":
        """Builds a config from :meth:`to_dict`'s output.

        Raises:
            ValueError: For a key that is no field.
        """
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown AbbaConfig fields {unknown}")
        return cls(**values)


def config_or_default(config: AbbaConfig | None) -> AbbaConfig:
    """The config, or the default one for None.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(config, AbbaConfig | None):
        raise TypeError(f"config must be an AbbaConfig, got {type(config).__name__}")
    return config or AbbaConfig()


def _plain(value):
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _split_rank(name: str, rank) -> tuple[int, int]:
    if isinstance(rank, Sequence) and not isinstance(rank, str):
        if len(rank) != 2:
            raise ValueError(f"{name} must be a total rank or (r1, r2), got {rank!r}")
        for value in rank:
            _check_int(name, value, 1)
        return rank[0], rank[1]
    _check_int(name, rank, 2)
    return (rank + 1) // 2, rank // 2


def _check_int(name: str, value, least: int):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_number(name: str, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def check_choice(name: str, value, choices: tuple, otherwise: str = ""):
    """Raises ValueError if the value is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))} {otherwise}".rstrip() + f", got {value!r}")


def _check_strings(name: str, value):
    if value is None:
        return
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{name} must be a list of strings, got {value!r}")


def _check_regex(name: str, value):
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise ValueError(f"{name}: {value!r} is not a regular expression ({error})") from None
