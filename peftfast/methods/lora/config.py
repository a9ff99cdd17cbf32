"""LoraConfig: PEFT's fields, names and defaults, each checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from peftfast.config import PeftConfig, PeftType, TaskType, checked, register_config, setting
from peftfast.errors import PeftWarning, warn
from peftfast.methods.lora.settings import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peftfast.rules import (
    boolean,
    either,
    instance,
    integer,
    none_as,
    number,
    one_of,
    only,
    optional,
    pair,
    sequence,
    table,
    text,
)

_NAMES = optional(either(text(), sequence(text())))
_ROWS = sequence(integer(0), distinct=True)
_UNSUPPORTED = "peftfast does not implement this variant; train or run such adapters with PEFT itself"

#: fields that hold a sub-config, which files have as dicts
_PARTS: Mapping[str, type] = {
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "use_bdlora": BdLoraConfig,
    "arrow_config": ArrowConfig,
    "kasa_config": KasaConfig,
    "velora_config": VeloraConfig,
    "monteclora_config": MontecloraConfig,
    "runtime_config": LoraRuntimeConfig,
}

#: Fields that make more of an adapter than a product of two factors that is added: each a method of its own, and at
#: most one of them set.
VARIANTS = (
    "use_dora",
    "alora_invocation_tokens",
    "velora_config",
    "use_qalora",
    "monteclora_config",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)

#: Beginnings of `init_lora_weights` that write to the base weight -> what the method is called.
_CHANGES_BASE = {"pissa": "PiSSA", "corda": "CorDA", "olora": "OLoRA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}


def _is_named(value: Any) -> bool:
    """Whether this is a sub-config as files hold it."""
    return isinstance(value, Mapping) and all(isinstance(k, str) for k in value)


@register_config(PeftType.LORA)
@checked
class LoraConfig(PeftConfig):
    """Low-rank adaptation: y = W x + (alpha / r) B A drop(x) (Hu et al., arXiv 2106.09685).

    Args:
        r: rank. lora_alpha: numerator of the scaling, alpha / r.
        target_modules: module names (suffixes), one regex for full names, "all-linear", or None: chosen for the
            model's architecture. exclude_modules: same forms; wins over targets.
        lora_dropout: probability on the adapter's input, in training.
        fan_in_fan_out: base weights stored as (in, out); set by itself for transformers' Conv1D.
        bias: which base biases train and are saved: "none", "all", or "lora_only" (of adapted modules).
        use_rslora: scaling alpha / sqrt(r) (arXiv 2312.03732).
        modules_to_save: names of modules trained in full and saved with the adapter.
        init_lora_weights: True (A Kaiming-uniform, B zero), False (both random), "gaussian", "orthogonal",
            "pissa" or "pissa_niter_[n]" (arXiv 2404.02948), "olora" (arXiv 2406.01775), "mica" (arXiv 2604.01694:
            B is frozen), "eva", "corda", "loftq", "lora_ga" (arXiv 2407.05000); in any case of letters.
        eva_config, corda_config, loftq_config, lora_ga_config: settings of these initialisations.
        layers_to_transform: indices of the layers to adapt. layers_pattern: name(s) of the list they are in.
        layer_replication: ranges [first, last) of the model's layers to stack, weights shared, into a deeper model.
        rank_pattern, alpha_pattern: module name or regex -> its own r or alpha; the first match wins.
        trainable_token_indices: rows of the input embedding to train, or {module: rows}.
        use_dora: weight-decomposed adaptation (arXiv 2402.09353).
        alora_invocation_tokens: the tokens from whose last occurrence on the adapter acts (aLoRA, arXiv 2504.12397);
            linear layers and embeddings of causal language models.
        velora_config: keep compressed inputs for the backward pass (VeLoRA, arXiv 2405.17991).
        monteclora_config: train with samples around the down factor (MonteCLoRA, arXiv 2411.04358).
        lora_bias: a bias on the up factor.
        arrow_config: the adapter is a router among the model's others; see `create_arrow_model`.
        target_parameters: names of Parameters (suffixes) to adapt by themselves: matrices, and the stacks of matrices
            in which mixture-of-experts models keep their experts. Without dropout, DoRA and biases.
        use_qalora, qalora_group_size: A reads groups of input features pooled (arXiv 2309.14717).
        use_bdlora: block-diagonal A or B.
        kasa_config: the base without its r smallest singular components, and trained singular values between the
            factors (KaSA, arXiv 2412.06071).
        ensure_weight_tying: share adapters between tied embeddings.
        megatron_config: refused; Megatron's layers are PEFT's alone. megatron_core: without effect.
        runtime_config: a `LoraRuntimeConfig`, of this process only; never saved.
    """

    r: int = setting(integer(1), default=8)
    target_modules: list[str] | str | None = setting(_NAMES, default=None)
    exclude_modules: list[str] | str | None = setting(_NAMES, default=None)
    lora_alpha: int = setting(number(0.0), default=8)
    lora_dropout: float = setting(number(0.0, 1.0), default=0.0)
    fan_in_fan_out: bool = setting(boolean(), default=False)
    bias: Literal["none", "all", "lora_only"] = setting(one_of("none", "all", "lora_only"), default="none")
    use_rslora: bool = setting(boolean(), default=False)
    modules_to_save: list[str] | None = setting(optional(sequence(text())), default=None)
    init_lora_weights: bool | str = setting(
        none_as(False, one_of(True, False, "gaussian", "orthogonal", "pissa", "olora", "mica", "eva", "corda", "loftq",
                              "lora_ga", patterns=[r"pissa_niter_\d+"])), default=True,
    )  # fmt: skip
    layers_to_transform: list[int] | int | None = setting(
        optional(either(integer(0), sequence(integer(0)))), default=None
    )
    layers_pattern: list[str] | str | None = setting(_NAMES, default=None)
    rank_pattern: dict | None = setting(optional(table(integer(1))), default={})
    alpha_pattern: dict | None = setting(optional(table(number(0.0))), default={})
    megatron_config: dict | None = setting(only(None, _UNSUPPORTED), default=None)
    megatron_core: str | None = setting(optional(text()), default="megatron.core")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = setting(
        optional(either(_ROWS, table(_ROWS))), default=None
    )
    loftq_config: LoftQConfig | dict = setting(optional(either(instance(LoftQConfig), table())), default={})
    eva_config: EvaConfig | None = setting(optional(instance(EvaConfig)), default=None)
    corda_config: CordaConfig | None = setting(optional(instance(CordaConfig)), default=None)
    lora_ga_config: LoraGAConfig | None = setting(optional(instance(LoraGAConfig)), default=None)
    use_dora: bool = setting(boolean(), default=False)
    velora_config: VeloraConfig | None = setting(optional(instance(VeloraConfig)), default=None)
    alora_invocation_tokens: list[int] | None = setting(optional(sequence(integer(0))), default=None)
    use_qalora: bool = setting(boolean(), default=False)
    qalora_group_size: int = setting(optional(integer(1)), default=16)
    monteclora_config: MontecloraConfig | None = setting(optional(instance(MontecloraConfig)), default=None)
    layer_replication: list[tuple[int, int]] | None = setting(optional(sequence(pair(integer(0)))), default=None)
    runtime_config: LoraRuntimeConfig = setting(optional(instance(LoraRuntimeConfig)), default=None)
    lora_bias: bool = setting(boolean(), default=False)
    target_parameters: list[str] | None = setting(optional(sequence(text())), default=None)
    use_bdlora: BdLoraConfig | None = setting(optional(instance(BdLoraConfig)), default=None)
    arrow_config: ArrowConfig | None = setting(optional(instance(ArrowConfig)), default=None)
    kasa_config: KasaConfig | None = setting(optional(instance(KasaConfig)), default=None)
    ensure_weight_tying: bool = setting(boolean(), default=False)

    _custom_modules = None  # no field: a file cannot hold classes
    #: Other libraries' names of fields whose own are too short to be near them.
    _called_elsewhere = {"rank": "r", "lora_r": "r", "lora_rank": "r"}

    def __post_init__(self) -> None:
        for name, cls in _PARTS.items():
            if _is_named(getattr(self, name)):
                setattr(self, name, cls(**getattr(self, name)))
        if self.loftq_config and _is_named(self.loftq_config):
            self.loftq_config = LoftQConfig(**self.loftq_config)
        if self.runtime_config is None:
            self.runtime_config = LoraRuntimeConfig()
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        self.rank_pattern = self.rank_pattern if self.rank_pattern is not None else self._no_pattern()
        self.alpha_pattern = {} if self.alpha_pattern is None else self.alpha_pattern

    @property
    def variant(self) -> str | None:
        """Which of `VARIANTS` is set; None for a plain LoRA."""
        return next(iter(self._variants()), None)

    @property
    def base_changed_by(self) -> str | None:
        """What the initialisation is called if it writes to the base weight; None if it leaves that as it is."""
        init = self.init_lora_weights
        if not isinstance(init, str):
            return None
        return next((name for beginning, name in _CHANGES_BASE.items() if init.startswith(beginning)), None)

    def _variants(self) -> list[str]:
        return [name for name in VARIANTS if getattr(self, name)]

    def _register_custom_module(self, mapping: dict[type, type]) -> None:
        """Adapt modules of these kinds by layers of one's own, as PEFT's experimental interface does. Not saved.

        Args:
            mapping: kind of module -> class of layer: from `nn.Module` and `peft.tuners.lora.LoraLayer`, or from one of
                the library's layers, as `peft.tuners.lora.Linear`.
        """
        if not all(isinstance(cls, type) for pair in mapping.items() for cls in pair):
            raise TypeError(f"_register_custom_module maps classes of modules to classes of layers, got {mapping!r}")
        self._custom_modules = {**(self._custom_modules or {}), **mapping}

    def _no_pattern(self) -> dict | None:
        return {}

    def validate(self) -> None:
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = self.init_lora_weights.lower()
        super().validate()
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        variants = self._variants()
        if len(variants) > 1:
            raise ValueError(
                f"Invalid or unsupported variant combination: {', '.join(variants)}; set one of them at most"
            )
        if self.use_qalora and self.qalora_group_size is None:
            raise ValueError("use_qalora needs a qalora_group_size, got None")
        if self.lora_bias:
            if self.init_lora_weights not in (True, False):
                raise ValueError(
                    "The argument lora_bias=True is only supported with init_lora_weights=True or False, got "
                    f"init_lora_weights={self.init_lora_weights!r}"
                )
            if self.use_dora:
                raise ValueError("The argument lora_bias=True is not supported together with use_dora=True")
        self._validate_invocation()
        if self.arrow_config is not None:
            for name in ("lora_dropout", "lora_bias"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name}={getattr(self, name)!r}: a router (arrow_config) has no factors of its own"
                    )
        self._validate_initialisation()

    def _validate_invocation(self) -> None:
        tokens = self.alora_invocation_tokens
        if tokens is None:
            return
        if not tokens or not isinstance(tokens, (list, tuple)):
            raise ValueError(f"alora_invocation_tokens is a list of at least one token in their order, got {tokens!r}")
        if self.task_type != TaskType.CAUSAL_LM:
            warn("aLoRA is currently only supported for CAUSAL_LM task.")
        if self.base_changed_by is not None:
            warn(
                f"init_lora_weights={self.init_lora_weights!r} changes the base weights, so that what comes before the "
                "invocation of an aLoRA is not the base model's output any more.",
                PeftWarning,
            )

    def _validate_initialisation(self) -> None:
        init = self.init_lora_weights
        if init == "mica" and self.variant is not None:
            raise ValueError(
                "init_lora_weights='mica' is not supported together with "
                f"{self.variant}={getattr(self, self.variant)!r}"
            )
        if init == "loftq" and not self.loftq_config:
            raise ValueError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
        for name, title, settings in (("eva", "EVA", EvaConfig), ("corda", "CorDA", CordaConfig)):
            if init == name and getattr(self, f"{name}_config") is None:
                warn(
                    f"`init_lora_weights` is '{name}' but `{name}_config` is not specified. Using default {title} "
                    "config."
                )
                setattr(self, f"{name}_config", settings())
        for name in ("loftq", "eva", "corda", "lora_ga"):
            if getattr(self, f"{name}_config") and init != name:
                warn(f"`{name}_config` specified but will be ignored when `init_lora_weights` is not '{name}'.")
                if name == "loftq":
                    self.loftq_config = {}  # PEFT keeps the others
        if self.base_changed_by is not None and 0 in (self.lora_alpha, *self.alpha_pattern.values()):
            raise ValueError(
                f"init_lora_weights={init!r} divides by the scaling of what it takes out of the base weights: "
                f"lora_alpha={self.lora_alpha} and alpha_pattern={self.alpha_pattern} have to be above 0"
            )
        patterns = self.rank_pattern or self.alpha_pattern
        if self.use_rslora and patterns and self.base_changed_by not in (None, "LoftQ"):
            warn(
                "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion to a plain "
                "LoRA does not go together: save_pretrained(path_initial_model_for_weight_conversion=...) will refuse "
                "this adapter."
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields except those of this process only."""
        data = super().to_dict()
        data.pop("runtime_config")
        return data
