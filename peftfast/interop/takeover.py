"""`peftfast.patch(model)` for a model that PEFT has wrapped: PEFT's layers stay, with parameters, names and files; only
what their `forward` computes goes through our kernels, and `unpatch` takes that back."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.config import PeftConfig, plain_name
from peftfast.method import method_for
from peftfast.sites import Site, has_site, make_site

_log = logging.getLogger(__name__)
_MARK = "_peftfast_takeover"

#: The layers of PEFT that are taken, by module and class name; every other kind is left and named in the report.
_LAYERS = {
    "peft.tuners.lora.layer.Linear",
    "peft.tuners.lora.bnb.Linear4bit",
    "peft.tuners.lora.bnb.Linear8bitLt",
}


@dataclass
class Takeover:
    """What `patch(model)` did to a model of PEFT's.

    Attributes:
        taken: names of the layers that compute with our kernels now.
        left: name -> why this layer computes as before.
    """

    taken: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{len(self.taken)} of {len(self.taken) + len(self.left)} adapter layers compute with peftfast's kernels"
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"left as they were, {reason}: {shown}")
        return "; ".join(lines)


def is_wrapped_by_peft(model: nn.Module) -> bool:
    """Whether `model` has adapter layers made by the real `peft`."""
    return any(_is_peft_layer(module) for module in model.modules())


def take_over(model: nn.Module) -> Takeover:
    """Let PEFT's linear LoRA layers in `model` compute with our kernels. Calling it again takes what is new.

    Nothing is replaced: the model, its modules, parameters, buffers, `state_dict` keys and saved files are the same
    objects and bytes. Adapters that are added, loaded or deleted later are followed.

    Raises:
        ValueError: no layer could be taken; says why for each.
    """
    configs = getattr(model, "peft_config", None)
    report = Takeover()
    planned: dict[str, tuple[nn.Module, _Fast]] = {}
    for name, layer in model.named_modules():
        if not _is_peft_layer(layer):
            continue
        if _MARK in layer.__dict__:
            report.taken.append(name)
            continue
        reason = _reason_to_leave(layer)
        if reason is None:
            planned[name] = (layer, _Fast(layer, name, configs))
            report.taken.append(name)
        else:
            report.left[name] = reason
    if not report.taken:
        raise ValueError(f"patch(model) found no layer of PEFT's that it can serve: {report}")
    for layer, fast in planned.values():
        layer.__dict__[_MARK] = fast
        layer.__dict__["forward"] = MethodType(forward, layer)
    _log.log(logging.WARNING if report.left else logging.INFO, "peftfast.patch: %s", report)
    model.__dict__[_MARK] = report
    return report


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch(model)`: every layer computes as PEFT made it. Returns the model.

    Raises:
        ValueError: nothing in the model was taken over.
    """
    taken = [m for m in model.modules() if isinstance(m.__dict__.get(_MARK), _Fast)]
    if not taken:
        raise ValueError("unpatch(model): no layer of this model was taken over by patch(model)")
    for layer in taken:
        del layer.__dict__[_MARK], layer.__dict__["forward"]
    model.__dict__.pop(_MARK, None)
    return model


def patch_report(model: nn.Module) -> Takeover:
    """What the last `patch(model)` did.

    Raises:
        ValueError: it was never called on this model.
    """
    report = model.__dict__.get(_MARK)
    if not isinstance(report, Takeover):
        raise ValueError("patch(model) was not called on this model")
    return report


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_peft_layer(module: nn.Module) -> bool:
    mro = type(module).__mro__
    return any(_qualified(c) == "peft.tuners.tuners_utils.BaseTunerLayer" for c in mro)


def _reason_to_leave(layer: nn.Module) -> str | None:
    kind = _qualified(type(layer))
    if kind not in _LAYERS:
        return f"no kernel for {kind}"
    if "forward" in layer.__dict__:
        return "their forward was replaced by somebody else"
    try:
        make_site(layer.base_layer)
    except (TypeError, ValueError) as e:
        return str(e)
    return None


class _View(Adapter):
    """An adapter of a layer of PEFT's, which does not say what is put in the place of its dicts."""

    __slots__ = ()

    @property
    def scale(self) -> float:
        return self._layer().scaling[self.name]


class _Fast:
    """Our view of one layer of PEFT's."""

    def __init__(self, layer: nn.Module, key: str, configs: Mapping[str, Any] | None) -> None:
        self.key, self.configs = key, configs
        self._look_at(layer.base_layer)

    def _look_at(self, base: nn.Module) -> None:
        """Compute with this base module; a kind that we have no site for is left to PEFT's own forward."""
        self.base = base
        self.site: Site | None = make_site(base) if has_site(base) else None
        self._views: dict[str, tuple[Any, Adapter | None]] = {}

    def active(self, layer: nn.Module) -> list[Adapter] | None:
        """The active adapters as ours; None if one of them, or the base module that others have put into the place of
        the one before, is of a kind that only PEFT's own forward knows."""
        base = layer._modules["base_layer"]
        if base is not self.base:
            self._look_at(base)
        if self.site is None:
            return None
        found = []
        for name in layer.active_adapters:
            holder = layer.lora_A._modules.get(name)
            if holder is None:
                continue
            known, adapter = self._views.get(name, (None, None))
            if known is not holder:  # new, or deleted and added again
                adapter = self._view(layer, name)
                self._views[name] = (holder, adapter)
            if adapter is None:
                return None
            found.append(adapter)
        return found

    def _view(self, layer: nn.Module, name: str) -> Adapter | None:
        theirs = (self.configs or {}).get(name)
        if theirs is None:
            return None
        data = {k: v for k, v in theirs.to_dict().items() if v is not None}
        try:
            cfg = PeftConfig.from_dict({**data, "peft_type": plain_name(theirs.peft_type)})
            method = method_for(cfg)
            settings = method.settings(self.site, cfg, self.key)
            slots = method.slots(self.site, cfg, {**settings, "r": layer.r[name]})
            adapter = _View(name, cfg, self.key, method, slots, layer)
            adapter.locate()
        except (AttributeError, KeyError, TypeError, ValueError):
            return None  # a variant that we do not have
        # what the layer has and our method does not account for would be left out of the sum
        if name in layer.lora_variant and _qualified(type(layer.lora_variant[name])) not in _VARIANTS:
            return None
        return adapter

    def __deepcopy__(self, memo: dict) -> _Fast:
        new = _Fast.__new__(_Fast)
        new.key, new.configs, new._views = self.key, copy.deepcopy(self.configs, memo), {}
        new.base, new.site = copy.deepcopy((self.base, self.site), memo)
        return new

    def __reduce__(self) -> tuple:
        return type(None), ()  # a pickled layer computes as PEFT made it, wherever it is read


#: Variants of PEFT's that our methods compute as well.
_VARIANTS = {"peft.tuners.lora.variants.DoraLinearVariant"}


# Its name matters: a bound method is pickled by name, and what is read back is the class's own `forward`.
def forward(layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`forward` of a layer that was taken over; what it does not serve goes to PEFT's own."""
    fast: _Fast | None = layer.__dict__.get(_MARK)
    if fast is None or args or kwargs or layer.disable_adapters or layer.merged:
        return type(layer).forward(layer, x, *args, **kwargs)
    adapters = fast.active(layer)
    if adapters is None:
        return type(layer).forward(layer, x)
    if not adapters:
        return layer.base_layer(x)
    y: Tensor | None = None
    method = adapters[0].method
    if all(adapter.method is method for adapter in adapters):
        return method.forward(fast.site, x, None, adapters)
    for adapter in adapters:
        y = adapter.method.forward(fast.site, x, y, [adapter])
    assert y is not None
    return y
