"""Liger's kernels switched on in a model, and off."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import nn

from peftfast.errors import close_matches
from peftfast.layers.walk import base_of
from peftfast.training.liger.fused_head import FusedHead
from peftfast.training.liger.head import head_trouble
from peftfast.training.liger.losses import CrossEntropy
from peftfast.training.liger.norms import RmsNorm
from peftfast.training.liger.part import Part
from peftfast.training.liger.rotary import Rotary


class Liger:
    """What `use_liger` put into a model.

    Attributes:
        parts: each with `kind`, `name` and `state`: "on", "new" (checked at its first use), or why it is off.
    """

    def __init__(self, base: nn.Module, parts: Sequence[Part]) -> None:
        self.base, self.parts = base, list(parts)
        base.__dict__["_liger"] = self
        for part in self.parts:
            part.attach()

    def remove(self) -> None:
        """Every module as it was."""
        for part in reversed(self.parts):
            part.detach()
        self.parts = []
        self.base.__dict__.pop("_liger", None)

    def report(self) -> str:
        """One line for every kind and state: what it is, whether it is used, and where."""
        lines: dict[tuple[str, str], list[str]] = {}
        for part in self.parts:
            lines.setdefault((part.kind, part.condition()), []).append(part.name)
        return "\n".join(
            f"{kind:<27}{state:<5} {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
            for (kind, state), names in lines.items()
        ) or "nothing of Liger's"  # fmt: skip


def use_liger(
    model: nn.Module,
    *,
    rms_norm: bool = True,
    rope: bool = True,
    cross_entropy: bool = True,
    fused_linear_cross_entropy: bool | str = "auto",
    **unknown: Any,
) -> Liger:
    """Let parts of one model run on Liger's kernels. Switched off again by `Liger.remove`.

    Args:
        model: of transformers, with or without adapters, on the device it is to run on.
        rms_norm: every RMSNorm.
        rope: the rotary embedding of every attention that calls transformers' `apply_rotary_pos_emb`. Liger rotates in
            place: whoever keeps the outputs of q_proj and k_proj, with a hook for instance, finds them rotated.
        cross_entropy: the loss of a causal language model, where it is computed from logits.
        fused_linear_cross_entropy: head and loss in one, in training steps; their output has no `logits`. "auto": where
            the head is an untouched `torch.nn.Linear`. True: refuse any other head.

    Raises:
        ImportError: liger-kernel is not installed.
        TypeError, ValueError: an unknown option or value; Liger is in the model already;
            `fused_linear_cross_entropy=True` on a head that is adapted, trained beside the adapter, packed or hooked.
    """
    options = {
        "rms_norm": rms_norm,
        "rope": rope,
        "cross_entropy": cross_entropy,
        "fused_linear_cross_entropy": fused_linear_cross_entropy,
    }
    for name in unknown:
        raise TypeError(
            f"use_liger has no option {name}.{close_matches(name, options)} It has {', '.join(options)}; gated MLPs "
            "with adapters are computed together by peftfast.fuse_blocks"
        )
    for name, value in options.items():
        automatic = name == "fused_linear_cross_entropy"
        if not isinstance(value, bool) and not (automatic and value == "auto"):
            raise ValueError(f"{name} is True or False{' or auto' if automatic else ''}, got {value!r}")
    base = base_of(model)
    if "_liger" in base.__dict__:
        raise ValueError("The model has Liger's kernels already; remove() those first")
    operations = _operations()
    trouble = head_trouble(base) if fused_linear_cross_entropy is True else None
    if trouble is not None:
        raise ValueError(f"fused_linear_cross_entropy=True: {trouble}")
    modules = list(base.named_modules())
    parts: list[Part] = []
    if rms_norm:
        parts += [RmsNorm(name, m, operations) for name, m in modules if RmsNorm.fits(m)]
    if rope:
        parts += [Rotary(name, m, operations) for name, m in modules if Rotary.fits(m)]
    if cross_entropy:
        parts.append(CrossEntropy("loss_function", base, operations))
    if fused_linear_cross_entropy:
        parts.append(FusedHead(base, operations, fused_linear_cross_entropy is True))
    return Liger(base, parts)


def _operations() -> ModuleType:
    try:
        from liger_kernel.transformers import functional
    except ImportError as e:
        raise ImportError(
            f"use_liger needs the package liger-kernel (pip install liger-kernel), which cannot be imported: {e}"
        ) from e
    return functional
