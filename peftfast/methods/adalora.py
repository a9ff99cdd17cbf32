"""AdaLoRA: y = W x + s / r₀ · B diag(E) A x, whose singular values E are pruned by importance during training so that
ranks end up where they matter (Zhang et al., arXiv 2303.10512). The schedule is in `rank_allocator.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.config import PeftConfig, PeftType, checked, register_config, setting
from peftfast.errors import PeftWarning, warn
from peftfast.keys import in_base
from peftfast.method import register_method
from peftfast.methods.lora.config import LoraConfig
from peftfast.methods.lora.init import drawn_through
from peftfast.methods.lora.lora import describe_change, factors, pair_of
from peftfast.ops.function import as_dtype
from peftfast.ops.orthogonality import orthogonality
from peftfast.ops.plan import Part, Plan
from peftfast.rules import integer, number, one_of, optional, table
from peftfast.sites import Dense, Site, Slot
from peftfast.sites.bound import BoundLora
from peftfast.wrapping import default_targets

VALUES = "lora_E"
_EPS = 1e-5  # PEFT's, beside r₀


@register_config(PeftType.ADALORA)
@checked
class AdaLoraConfig(LoraConfig):
    """Adaptive budget allocation (Zhang et al., arXiv 2303.10512). LoRA's fields, of which `r` is not used, and:

    Args:
        target_r: average rank at the end. init_r: rank of every module at the start.
        tinit: steps before anything is pruned. tfinal: steps at the end in which ranks do not change any more.
        deltaT: steps between two allocations.
        beta1, beta2: smoothing of sensitivity and uncertainty.
        orth_reg_weight: factor of the orthogonality regulariser.
        total_step: length of the training in optimizer steps; required.
        rank_pattern: module -> which of its init_r ranks are kept; filled in by training.
        bias: as in LoRA; "adalora_only" is another name of "lora_only".
    """

    target_r: int = setting(integer(1), default=8)
    init_r: int = setting(integer(1), default=12)
    tinit: int = setting(integer(0), default=0)
    tfinal: int = setting(integer(0), default=0)
    deltaT: int = setting(integer(1), default=1)
    beta1: float = setting(number(0.0, 1.0), default=0.85)
    beta2: float = setting(number(0.0, 1.0), default=0.85)
    orth_reg_weight: float = setting(number(0.0), default=0.5)
    total_step: int | None = setting(optional(integer()), default=None)
    rank_pattern: dict | None = setting(optional(table()), default=None)
    bias: Literal["none", "all", "lora_only", "adalora_only"] = setting(
        one_of("none", "all", "lora_only", "adalora_only"), default="none"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r != 8:
            warn(
                "Note that `r` is not used in AdaLora and will be ignored. "
                "If you intended to set the initial rank, use `init_r` instead."
            )
        ignored = [n for n in ("use_rslora", "lora_bias", "alpha_pattern") if getattr(self, n)]
        if ignored:
            warn(f"{', '.join(ignored)}: not used in AdaLoRA and ignored, as in PEFT.", PeftWarning)

    def _no_pattern(self) -> dict | None:
        return None

    def validate(self) -> None:
        super().validate()
        if self.use_dora:
            raise ValueError(f"{self.peft_type} does not support DoRA.")
        if self.variant is not None:
            raise ValueError(f"{self.peft_type} does not support {self.variant}.")
        if self.loftq_config:
            raise ValueError(f"{self.peft_type} does not support LOFTQ.")
        if self.total_step is None or self.total_step <= 0:
            raise ValueError(
                f"AdaLoRA does not work when `total_step` is None, supply a value > 0. Got {self.total_step!r}"
            )
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                "The supplied schedule values don't allow for a budgeting phase. Decrease `tfinal`/`tinit` or increase "
                f"`total_step`. Got tinit={self.tinit}, tfinal={self.tfinal}, total_step={self.total_step}"
            )
        if self.target_r > self.init_r:
            warn(
                f"target_r={self.target_r} is larger than init_r={self.init_r}: ranks only shrink, so none will change",
                PeftWarning,
            )

    def rank_of(self, key: str) -> int:
        """The rank a module of this name starts with here: init_r, or what an earlier training left of it."""
        kept = (self.rank_pattern or {}).get(f"{key}.{VALUES}")
        return self.init_r if kept is None else sum(map(bool, kept))


@register_method
class AdaLora:
    peft_type: ClassVar[str] = PeftType.ADALORA
    prefix: ClassVar[str] = "lora_"
    family: ClassVar[str] = "adalora"
    layer_name: ClassVar[str] = "adalora.SVDLinear"
    peft_layer: ClassVar[str] = "tuners.adalora.layer.AdaLoraLayer"
    default_targets: ClassVar[Mapping[str, Any]] = default_targets.ADALORA
    pads: ClassVar[bool] = False

    def claims(self, cfg: PeftConfig) -> bool:
        return isinstance(cfg, AdaLoraConfig)

    def settings(self, site: Site, cfg: AdaLoraConfig, key: str) -> Mapping[str, Any]:
        return {
            "r": cfg.rank_of(key),
            "lora_alpha": cfg.lora_alpha,
            "scaling": _scaling(cfg),
            "lora_dropout": nn.Dropout(cfg.lora_dropout) if cfg.lora_dropout > 0.0 else nn.Identity(),
        }

    def slots(self, site: Site, cfg: AdaLoraConfig, settings: Mapping[str, Any]) -> Mapping[str, Slot]:
        if site.groups > 1:
            raise ValueError(
                f"AdaLoRA on a {type(site.module).__name__} with groups={site.groups} is not defined: its "
                "factors' product is no weight of a grouped convolution"
            )
        r = settings["r"]
        (down, up) = site.low_rank_slots(r).items()
        return {
            down[0]: Slot((r, math.prod(down[1].shape[1:]))),
            up[0]: Slot((up[1].shape[0], r)),
            VALUES: Slot((r, 1)),
            # the rank that the scaling is divided by: constant, so that pruning does not change it
            "ranknum": Slot((1,), trainable=False, saved=False, fill=float(cfg.init_r)),
        }

    def init(self, site: Site, adapter: Adapter) -> None:
        """A seed gives what it gives in PEFT, which draws all tensors in fp32 on the CPU, then the factors anew."""
        a, b = factors(adapter)
        values = adapter[VALUES]
        down, middle, up, _ranknum = (torch.randn(shape) for shape in (a.shape, values.shape, b.shape, (1,)))
        if adapter.cfg.init_lora_weights:
            down.normal_(std=0.02)
            up.normal_(std=0.02)
            middle.zero_()
        for tensor, drawn in ((a, down), (values, middle), (b, up)):
            tensor.copy_(drawn.to(drawn_through(site, drawn)))

    def forward(self, site: Site, x: Tensor, y: Tensor | None, active: Sequence[Adapter]) -> Tensor:
        for adapter in active:
            a, b = factors(adapter)
            if len(a):  # nothing is left of some modules
                y = site.adapt(x, y, _weighted(adapter, a), b, adapter.scale, adapter.dropout)
        return site.base(x) if y is None else y

    def bind(self, site: Site, active: Sequence[Adapter]) -> BoundLora | None:
        """See `Bindable`: for the one adapter of a layer that most models have."""
        if len(active) != 1 or not len(factors(active[0])[0]):
            return None
        (adapter,) = active
        return site.bind(adapter, _Weighted(adapter))

    def merged(self, site: Site, dense: Dense, adapter: Adapter, base: Dense) -> Dense:
        a, b = (f.to(dense.weight.dtype) for f in factors(adapter))
        a = _weighted(adapter, a)
        return dense._replace(weight=site.with_delta(dense.weight, a, b, float(adapter.scale), dense.spare))

    def describe(self, cfg: AdaLoraConfig, key: str, tensors: Mapping[str, Tensor]) -> str:
        a, b = pair_of(tensors)
        values = tensors[VALUES].to(a.dtype)
        said = describe_change(a * values, b, _scaling(cfg) / cfg.init_r)
        return f"{said}, {int((values != 0).sum())} of {cfg.init_r} ranks in use"

    def as_product(self, adapter: Adapter) -> tuple[Tensor, Tensor] | None:
        """See `Additive`."""
        a, b = factors(adapter)
        return _weighted(adapter, a), b * adapter.scale

    def loss_term(self, adapters: Sequence[Adapter]) -> Tensor | None:
        """The regulariser that keeps A's rows and B's columns orthonormal, so that E is like singular values."""
        weight = adapters[0].cfg.orth_reg_weight if adapters else 0.0
        pairs = [factors(adapter) for adapter in adapters]
        if weight == 0.0 or not any(f.requires_grad for pair in pairs for f in pair):
            return None
        return weight * orthogonality([a for a, _ in pairs], [b for _, b in pairs])

    def to_file(self, cfg: AdaLoraConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of factors that have been masked but not yet cut, the part that is kept."""
        result = dict(tensors)
        for name, kept in (cfg.rank_pattern or {}).items():
            key = name.removesuffix(f".{VALUES}")
            for file, tensor in tensors.items():
                owner, _, slot = file.rpartition(".")
                if in_base(owner) != key or not slot.startswith(self.prefix):
                    continue
                dim = 1 if slot.endswith("_B") else 0
                if tensor.shape[dim] == len(kept) != sum(map(bool, kept)):
                    where = torch.tensor(
                        [i for i, keep in enumerate(kept) if keep], device=tensor.device, dtype=torch.int64
                    )
                    result[file] = tensor.index_select(dim, where)
        return result


def _scaling(cfg: AdaLoraConfig) -> float:
    return cfg.lora_alpha if cfg.lora_alpha > 0 else float(cfg.init_r)


def _weighted(adapter: Adapter, a: Tensor) -> Tensor:
    """A with the singular values over r₀ inside: with B the factors of a plain LoRA of the same scaling."""
    return as_dtype(a * (adapter[VALUES] / (adapter["ranknum"] + _EPS)), a.dtype)


class _Weighted:
    """`_weighted` for a layer's usual call, with r₀ as a number in the scaling: one operation instead of three. The
    number is read once, because a GPU is waited for then."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._read: tuple[Tensor, int, float] | None = None  # r₀, how often it had been written to, and as a number
        self._made: tuple[Plan, float, Plan] | None = None  # a plan, the number, and the plan with it

    def __call__(self, part: Part) -> Part:
        ranks, read, made = self.adapter["ranknum"], self._read, self._made
        if ranks.is_meta or ranks.is_inference():  # no number is there, or writes to it are not counted
            return part._replace(a=_weighted(self.adapter, part.a))
        if read is None or read[0] is not ranks or read[1] != ranks._version:
            self._read = read = ranks, ranks._version, ranks.item() + _EPS
        if made is None or made[0] is not part.plan or made[1] != read[2]:
            self._made = made = part.plan, read[2], part.plan._replace(scale=part.plan.scale / read[2])
        return part._replace(a=as_dtype(part.a * self.adapter[VALUES], part.a.dtype), plan=made[2])
