"""Low-rank products as calls of the modules that hold the factors, for whoever has made calling them mean more: hooks
(also those of pruning, weight norm and FSDP), a `forward` of their own, another module in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftfast.ops.gate import gated
from peftfast.sites.site import Site, composed_magnify
from peftfast.watch import Place, Watch

_PLAIN = {cls.forward for cls in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Dropout, nn.Identity)}

M = TypeVar("M", bound=type[nn.Module])


def register_plain(cls: M) -> M:
    """Class decorator: calling such a module is no more than what its method makes of its weight."""
    _PLAIN.add(cls.forward)
    return cls


class Holders:
    """The modules of one adapter at one site: down, up and dropout, and whether calling them means more than reading.

    Args:
        kept: for each of the three, the dict in which the layer keeps it by the adapter's name.
        biased: those of the dicts whose module has a bias.
    """

    __slots__ = ("places", "entries", "modules", "watch", "foreign", "biased")

    def __init__(
        self, kept: Sequence[Mapping[str, nn.Module]], name: str, biased: Sequence[Mapping[str, nn.Module]] = ()
    ) -> None:
        modules = [one[name] for one in kept]
        added = [one[name] for one in biased]
        self.places = tuple([(one, name, module) for one, module in zip(kept, modules, strict=True)])
        self.entries: list[Place] = [*self.places]
        self.entries += [(module._parameters, "bias", None) for module in modules if module not in added]
        self.modules = modules
        self.watch = Watch(self.entries, modules)
        self.biased = bool(added)
        # parametrised modules, and those that FSDP2 shards, have the forward of their class
        self.foreign = any(type(m).forward not in _PLAIN and not hasattr(type(m), "is_view") for m in modules)

    @property
    def replaced(self) -> bool:
        """Whether the layer keeps other modules by now."""
        return any(kept.get(name) is not module for kept, name, module in self.places)

    def are_plain(self) -> bool:
        """Whether these are the layer's modules still, and calling them is no more than products, and sums with a
        bias."""
        return not self.foreign and self.watch.holds()

    def are_products(self) -> bool:
        """The same, without a bias."""
        return not (self.biased or self.foreign) and self.watch.holds()


class CalledSite:
    """A site at which one adapter's products are calls of its modules; all else is the site's.

    Args:
        casts: give the modules their input in the dtype of the weight that they have before the call.
    """

    def __init__(self, site: Site, holders: Holders, casts: bool = True) -> None:
        self.site, self._casts = site, casts
        self._down, self._up, self._dropout = (module for _, _, module in holders.places)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.site, name)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return self._down(x)

    def up(self, t: Tensor, b: Tensor) -> Tensor:
        return self._up(t)

    def drop(self, x: Tensor, dropout: float) -> Tensor:
        return self._dropout(x)

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """B A of a linear layer, which the modules make of the columns of an identity."""
        return self.up(self.down(torch.eye(a.shape[1], dtype=a.dtype, device=a.device), a), b).t()

    def adapt(
        self,
        x: Tensor,
        y: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        dropout: float,
        gate: Tensor | None = None,
        between: Tensor | None = None,
    ) -> Tensor:
        """See `Site.adapt`; `between` [r] is what each rank is multiplied by between the two."""
        y = self.site.base(x) if y is None else y
        t = self.down(self.drop(x.to(a.dtype) if self._casts else x, dropout), a)
        t = t if between is None else t * between
        if gate is None or gate.shape[-1] == 1:  # what the up factor's module adds besides is behind the gate as well
            branch = gated(self.up(t, b), gate)
        else:
            branch = self.up(gated(t, gate), b)
        return (y + branch * scale).to(y.dtype)

    def magnify(
        self, x: Tensor, y: Tensor | None, a: Tensor, b: Tensor, g: Tensor, scale: float, dropout: float
    ) -> Tensor:
        dropping = self._dropout.training and not isinstance(self._dropout, nn.Identity)  # `drop` knows how
        return composed_magnify(self, x, y, a, b, g, scale, 1.0 if dropping else 0.0)
