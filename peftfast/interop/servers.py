"""What other programs do with a saved adapter: their rules as data, each read from the file named beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peftfast.config import PeftConfig, plain_name
from peftfast.method import changes_base

REFUSES, WRONG, UNKNOWN = "refuses", "loads, wrong output", "not known"
CONVERT, LOADS = "needs conversion", "loads"
#: From the worst to the best: what a server does is the worst of what its rules say.
ORDER = (REFUSES, WRONG, UNKNOWN, CONVERT, LOADS)


@dataclass(frozen=True)
class Facts:
    """What the rules look at.

    Attributes:
        cfg: the config. ranks, alphas: of every adapted layer. max_rank: vLLM's max_lora_rank.
        saved: modules saved whole. tokens: whether single rows of an embedding are trained.
        parameters: names of Parameters that are adapted by themselves, as fused experts are, or of what has
            such (a MultiheadAttention).
    """

    cfg: PeftConfig
    ranks: Sequence[int]
    alphas: Sequence[float]
    max_rank: int
    saved: Sequence[str] = ()
    tokens: bool = False
    parameters: Sequence[str] = ()

    def field(self, name: str) -> Any:
        return getattr(self.cfg, name, None)

    @property
    def kind(self) -> str:
        return plain_name(self.cfg.peft_type)

    @property
    def uneven_rank(self) -> bool:
        return any(r != self.field("r") for r in self.ranks)

    @property
    def uneven_scale(self) -> bool:
        return self.uneven_rank or any(a != self.field("lora_alpha") for a in self.alphas)

    @property
    def biased(self) -> bool:
        return self.field("bias") not in (None, "none") or bool(self.field("lora_bias"))

    @property
    def beside_factors(self) -> str | None:
        """The variant of LoRA whose files have tensors beside the factors, if it is one."""
        return next((name for name in _MORE_TENSORS if self.field(name)), None)

    @property
    def changes_base(self) -> bool:
        """Whether the factors are for a base that their initialisation has changed."""
        return changes_base(self.cfg)

    @property
    def saved_not_norms(self) -> list[str]:
        return [name for name in self.saved if "_layernorm" not in name and ".norm" not in f".{name}"]


@dataclass(frozen=True)
class Rule:
    """`verdict` where `applies`; `reason` is a format string over the facts, as `f`."""

    verdict: str
    applies: Callable[[Facts], Any]
    reason: str


#: Fields of variants of LoRA that save more than a pair of factors a module, beside `use_dora`.
_MORE_TENSORS = ("kasa_config", "velora_config", "monteclora_config")

_NO_LORA = Rule(REFUSES, lambda f: f.kind != "LORA", "knows LORA only, this is {f.kind}")

_FUSED = Rule(UNKNOWN, lambda f: f.parameters, "adapters of Parameters: not in that file, and releases differ in them")

# the files named below read fields of the config by name; of these two, llama.cpp's reads the second
_STACKED = Rule(WRONG, lambda f: f.field("layer_replication"), "leaves the base's layers as they are; serve it merged")

# none of the files named below reads `init_lora_weights`
_CHANGED = Rule(
    WRONG,
    lambda f: f.changes_base,
    "adds it to the base as it was before init_lora_weights={f.cfg.init_lora_weights!r}; convert it when saving "
    "(path_initial_model_for_weight_conversion), or serve it merged",
)

_INVOKED = Rule(
    WRONG, lambda f: f.field("alora_invocation_tokens"), "applies it to all tokens, not from its invocation sequence on"
)

_ROUTER = Rule(
    WRONG,
    lambda f: f.field("arrow_config"),
    "routes among other adapters, which are not in the file: it would do nothing",
)

# of these the files named below say something about DoRA only
_VARIANT = Rule(
    UNKNOWN,
    lambda f: f.field("variant") not in (None, "use_dora", "alora_invocation_tokens", "arrow_config"),
    "{f.cfg.variant}: not known from that file",
)

_EVERYWHERE = (_NO_LORA, _FUSED, _STACKED, _CHANGED, _ROUTER, _VARIANT)

SERVERS: dict[str, tuple[Rule, ...]] = {
    # vllm-project/vllm, vllm/lora/peft_helper.py, e745bafffc44744aa601169f8c6f325e47ca7cd5: validate_legal and
    # __post_init__; fields that the class does not declare (the patterns) are dropped in from_dict
    "vLLM": (
        *_EVERYWHERE,
        _INVOKED,
        Rule(REFUSES, lambda f: f.saved, "supports no modules_to_save, this has {f.saved}"),
        Rule(REFUSES, lambda f: f.field("use_dora"), "supports no DoRA"),
        # vllm/lora/utils.py: parse_fine_tuned_lora_name raises at every tensor that is no factor
        Rule(REFUSES, lambda f: f.beside_factors, "takes factors only, {f.beside_factors} saves more"),
        Rule(REFUSES, lambda f: f.field("bias") not in (None, "none"), "supports no bias={f.cfg.bias!r} by default"),
        Rule(REFUSES, lambda f: (f.field("r") or 0) > f.max_rank, "r={f.cfg.r} is above max_lora_rank={f.max_rank}"),
        Rule(
            UNKNOWN, lambda f: f.tokens or f.field("lora_bias"), "single tokens and biases of factors: not in that file"
        ),
        Rule(WRONG, lambda f: f.uneven_scale, "scales every layer by the config's r and lora_alpha, not by patterns"),
    ),
    # sgl-project/sglang, python/sglang/srt/lora/lora_config.py, 0ceb81fe4868b3364267a661da67b5d88aa45fc3: __init__
    # reads target_modules, r, lora_alpha and the patterns, which its tests say are rejected where they change a value;
    # python/sglang/srt/lora/lora.py, 002c60aa61549a08b2d4662d0f876f1fc6aa6863: asserts peft_type, scales by alpha / r
    "SGLang": (
        *_EVERYWHERE,
        _INVOKED,
        Rule(REFUSES, lambda f: f.uneven_scale, "takes no rank_pattern or alpha_pattern that changes a value"),
        Rule(WRONG, lambda f: f.field("use_rslora"), "scales by lora_alpha / r, rsLoRA by its root"),
        Rule(
            UNKNOWN,
            lambda f: f.saved or f.tokens or f.biased or f.field("use_dora") or f.beside_factors,
            "what it does with more than two factors a layer is not in these files",
        ),
    ),
    # ggml-org/llama.cpp, convert_lora_to_gguf.py, 0b03adaa632b76c7651dd1f6fa3b7a0b5eda479c: get_tensors exits at every
    # tensor that is no factor (or norm); one lora_alpha is written, and divided by the rank that the tensor has; so are
    # alora_invocation_tokens (set_gguf_parameters)
    "llama.cpp": (
        *_EVERYWHERE,
        Rule(REFUSES, lambda f: f.saved_not_norms, "its converter takes factors only, this saves {f.saved}"),
        Rule(REFUSES, lambda f: f.tokens, "its converter takes factors only, this trains single tokens"),
        Rule(REFUSES, lambda f: f.field("use_dora"), "its converter takes factors only, DoRA has magnitudes"),
        Rule(REFUSES, lambda f: f.beside_factors, "its converter takes factors only, {f.beside_factors} saves more"),
        Rule(REFUSES, lambda f: f.field("lora_bias"), "its converter takes factors only, this has lora_bias"),
        Rule(REFUSES, lambda f: f.field("bias") not in (None, "none"), "its converter takes no bias={f.cfg.bias!r}"),
        Rule(WRONG, lambda f: f.field("use_rslora"), "scales by lora_alpha / rank, rsLoRA by its root"),
        Rule(
            WRONG,
            lambda f: any(a != f.field("lora_alpha") for a in f.alphas),
            "knows one lora_alpha, not alpha_pattern",
        ),
        Rule(CONVERT, lambda f: True, "a GGUF file has to be made with convert_lora_to_gguf.py"),
    ),
    # ml-explore/mlx-lm, mlx_lm/tuner/utils.py, 036728670ef951c1d583689ad2255020702dcfa3: load_adapters reads
    # num_layers and lora_parameters (one rank and scale) from the config and the weights from adapters.safetensors
    "MLX": (
        *_EVERYWHERE,
        _INVOKED,
        Rule(REFUSES, lambda f: f.uneven_scale, "knows one rank and one scale, whatever the file is converted to"),
        Rule(CONVERT, lambda f: True, "reads its own adapters.safetensors and config, not a PEFT folder"),
    ),
}


@dataclass(frozen=True)
class Verdict:
    """What a server does with the adapter; every reason that applies, the worst first."""

    server: str
    verdict: str
    reasons: tuple[str, ...]


def judge_servers(facts: Facts) -> list[Verdict]:
    """One verdict per server."""
    found = []
    for server, rules in SERVERS.items():
        hits = sorted((r for r in rules if r.applies(facts)), key=lambda r: ORDER.index(r.verdict))
        worst = hits[0].verdict if hits else LOADS
        found.append(Verdict(server, worst, tuple(r.reason.format(f=facts) for r in hits)))
    return found
