"""The configuration of ABBA adapters in PEFT."""
from dataclasses import dataclass, field

from peft import PeftConfig, PeftType

from ..config import INITS, AbbaConfig, peft_pattern


@dataclass
class AbbaPeftConfig(PeftConfig):
    """ABBA for PEFT: ΔW = s·(B1 A1) ⊙ (B2 A2), with the fields of :class:`abba_ext.AbbaConfig` under PEFT's names.

    Attributes:
        r: Total rank r1 + r2, the parameter budget of a LoRA of rank r; split in halves. 32 if no rank is given.
        r1: Rank of the first pair; give it together with r2, instead of r.
        r2: Rank of the second pair.
        alpha: α, the strength of the update.
        scaling: "paper" s = α²/√(r1·r2), "official" s = α, "peft" s = α/r, or a number, s itself.
        init_weights: True or "svd": B1 A1 is the best rank-r1 approximation of W0. "random": without an SVD, for weights too
            large or too coarse for one. ΔW = 0 at the start in both. False: all four factors random and ΔW ≠ 0, for tests.
        abba_dropout: Probability with which elements of the adapter's input are zeroed in training; the base sees all.
        target_modules: Names or dotted suffixes, a regular expression, or "all-linear". None adapts every linear layer of
            the model's repeated blocks (attention and MLP projections), as :func:`abba_ext.patch_model` does.
        target_parameters: Parameters [m, n] or [experts, m, n] to adapt, as names or dotted suffixes: the stacked experts of
            a mixture of experts.
        exclude_modules: Names or regular expression of modules to leave out.
        layers_to_transform: Index or indices of the blocks to adapt.
        layers_pattern: Name of the list of blocks that layers_to_transform counts in.
        rank_pattern: Name or regular expression → total rank, or (r1, r2), of the layers it fits.
        alpha_pattern: Name or regular expression → α of the layers it fits.
        bias: Biases that are trained too: "none", "all", or "abba_only" (those of adapted layers).
        modules_to_save: Modules trained in full and saved with the adapter.
        trainable_token_indices: Tokens whose embeddings are trained too; see :class:`peft.LoraConfig`.
        seed: Makes the start reproducible; each layer draws from (seed, its name). init_weights=False does not use it.
        recompute_u: Recompute u = x A*ᵀ in backward instead of saving it.

    Raises:
        ValueError, TypeError: For a value out of range; see :class:`abba_ext.AbbaConfig`.
    """

    r: int | None = None
    r1: int | None = None
    r2: int | None = None
    alpha: float = 16.0
    scaling: str | float = "paper"
    init_weights: bool | str = True
    abba_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    seed: int = 0
    recompute_u: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.ABBA
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.init_weights not in (True, False, *INITS):
            raise ValueError(f"init_weights must be True, False, {' or '.join(map(repr, INITS))}, got {self.init_weights!r}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform, the indices of the layers to adapt")
        self.abba_config()

    def abba_config(self, **changes) -> AbbaConfig:
        """The same settings for :func:`abba_ext.patch_model`, which gives every layer its ranks and scale.

        Args:
            **changes: Fields of AbbaConfig to set otherwise.
        """
        init = {True: "svd", False: "random"}.get(self.init_weights, self.init_weights)
        fields = {name: getattr(self, name) for name in (
            "r", "r1", "r2", "alpha", "scaling", "target_modules", "target_parameters", "exclude_modules",
            "layers_to_transform", "bias", "modules_to_save", "seed", "recompute_u")}
        patterns = {name: {peft_pattern(pattern): value for pattern, value in getattr(self, name).items()}
                    for name in ("rank_pattern", "alpha_pattern")}
        return AbbaConfig(**{"init": init, "dropout": self.abba_dropout, **fields, **patterns, **changes})
