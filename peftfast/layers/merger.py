"""Adapters inside the weight of one layer: summed wider than the weight, rounded once, taken out bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftfast.base.offload import stored_weight
from peftfast.base.rounding import Rounded, check_rounding, store
from peftfast.base.weight import kept_copy
from peftfast.devices import widest
from peftfast.errors import check_present, warn
from peftfast.layers.calls import CalledLayer
from peftfast.layers.mergeable import check_decodable, check_mergeable
from peftfast.layers.sharded import beside
from peftfast.modes import in_mode
from peftfast.ops.finite import is_finite
from peftfast.owner import Owner
from peftfast.sharding import is_distributed, part, put_together, rejoin, taken_apart
from peftfast.sites import Dense, bias_of

if TYPE_CHECKING:
    from peftfast.adapter import Adapter
    from peftfast.layers.layer import BaseTunerLayer


_UNSURE = (
    "Whether its weight holds the adapters is not known, and no copy was kept (keep=False): load the base model again"
)


#: Elements of a weight that is merged into in less time than it takes to see without values whether it can be.
_SMALL = 1 << 20


def _with_changes(kept: Tensor, stored: Tensor, now: Tensor) -> Tensor:
    """A bias as before merging, with what was added since it was `stored`: with `bias="all"` it trains also while
    adapters are merged. What nothing changed has the bits that it had."""
    same = (now == stored) | (now.isnan() & stored.isnan())
    return torch.where(same, kept, torch.where(stored == kept, now, kept + (now - stored)))


class Merger:
    """Merges into one layer's base weight and restores it. Which adapters are inside is `layer.merged_adapters`.

    Attributes:
        layer: which has this merger.
        kept: bytes of the base while adapters are merged; None while nothing is, or where it was merged for good.
        rounded: what became of the weight, where storing it rounds.
        unsure: a write to the weight has begun and is not recorded yet.
        sources: adapter -> the layer whose factors it shares, and which merges a weight that both have.
    """

    def __init__(self, layer: BaseTunerLayer) -> None:
        self._here = Owner(layer)
        self.kept: dict[str, Any] | None = None
        self.rounded: Rounded | None = None
        self.unsure = False
        self.sources: dict[str, BaseTunerLayer] = {}

    @property
    def layer(self) -> BaseTunerLayer:
        return self._here()

    @property
    def _parameter(self) -> nn.Parameter:
        return getattr(self.layer.get_base_layer(), self.layer.site.parameter)

    @property
    def _bias(self) -> Tensor | None:
        """The tensor that holds the bias's values, wherever it is kept."""
        base = self.layer.base_layer
        return None if bias_of(base) is None else stored_weight(base, "bias")

    @property
    def is_apart(self) -> bool:
        """Whether the weight is the layer's own while adapters are inside, and otherwise that of other modules too."""
        return self.kept is not None and self.kept["parameter"] is not None

    def follows(self, name: str) -> bool:
        """Whether the weight is also that of the adapter's source, which merges it for both: the change is the same."""
        source, layer = self.sources.get(name), self.layer
        shared = source is not None and source.base_layer.weight is layer.base_layer.weight
        return shared and not layer.own_slots(layer.adapters[name])

    def merge(
        self,
        names: Sequence[str],
        *,
        safe_merge: bool = False,
        keep: bool | str = True,
        untie: bool = False,
        rounding: str = "auto",
    ) -> None:
        """See `BaseTunerLayer.merge`; `names` are adapters that are here and not merged."""
        layer = self.layer
        check_rounding(rounding, layer.site.weight)
        if keep not in (True, False, "host"):
            raise ValueError(f"keep must be True, False or 'host', got {keep!r}")
        check_decodable(layer)
        if self.unsure:
            raise RuntimeError(f"{layer.site.weight.name}: merging for good was interrupted here. {_UNSURE}")
        self._check_together(names)
        apart = untie or self.is_apart
        inside, own = ([n for n in some if apart or not self.follows(n)] for some in (layer.merged_adapters, names))
        if own:
            if self.kept is None and inside:
                raise RuntimeError(f"Adapters {inside} were merged for good; nothing can be merged on top of them")
            first = self.kept is None
            if first:
                self._check_output(own)
            kept = self._snapshot(keep, untie) if first else self.kept
            before = layer.merged_adapters
            try:
                if not first:
                    self._restore(kept)
                check = safe_merge and not self._surely_finite([*inside, *own])
                self._put([*inside, *own], kept, rounding, apart, check)
                self.kept = kept if keep or not first else None
                layer.merged_adapters = [*before, *names]
                self.unsure = False
            except BaseException:  # of memory, of values, or Ctrl-C
                if keep or not first:
                    self._restore(kept)
                    layer.merged_adapters = before
                elif layer.merged_adapters != before:
                    self.unsure = False
                elif self.unsure:
                    warn(f"{layer.site.weight.name}: merging {own} for good was interrupted. {_UNSURE}")
                if first:
                    self.kept = None
                else:
                    self._put(inside, kept, rounding, apart)
                raise
        elif names:
            layer.merged_adapters = [*layer.merged_adapters, *names]

    def _put(self, names: Sequence[str], kept: dict[str, Any], rounding: str, apart: bool, check: bool = False) -> None:
        """Write the base with these adapters in its place."""
        self._store(self.merged(names, check, in_place=not apart), rounding, apart)
        if kept["bias"] is not None:
            kept["stored_bias"] = kept_copy(self._bias, kept["bias"].device.type == "cpu")

    def _snapshot(self, keep: bool | str, untie: bool) -> dict[str, Any]:
        """What `_restore` needs; of a tied weight the Parameter itself, which nobody writes to."""
        layer = self.layer
        host = keep == "host"
        bias = self._bias
        return {
            "parameter": self._parameter if untie else None,
            "weight": layer.site.weight.snapshot(host) if keep and not untie else None,
            "bias": kept_copy(bias, host) if keep and bias is not None else None,
            "format": type(layer.site.weight),
        }

    @torch.no_grad()
    def check(self, names: Sequence[str], passed: set[tuple], dense: bool = False) -> None:
        """Raise what merging these adapters would raise for their kind, without writing anything.

        Args:
            passed: the kinds of other layers that may be merged, to which this one's is added.
            dense: the weight will be dense by then, however it is stored now.
        """
        layer = self.layer
        if not dense:
            check_decodable(layer)
        if not dense and not layer.site.weight.known:
            layer.site.weight.dense()  # says what it is and why nobody can
        self._check_together(names)
        self._check_output(names)
        bias = bias_of(layer.base_layer)
        own = getattr(layer.get_base_layer(), layer.site.parameter, None)
        kind = self._kind(bias, names)
        if kind in passed and not is_distributed(own):
            return
        adapters = self._adapters(names)
        if self._is_soon_merged(adapters, own):
            self.merged(names, check=False)
        else:
            self._merge_without_values(adapters, own, bias)
        passed.add(kind)

    def _is_soon_merged(self, adapters: Sequence[Adapter], own: Tensor | None) -> bool:
        """Whether forming the merged weight takes no longer than finding out without values that nothing speaks against
        it, which is milliseconds, and at first the import of half of torch."""
        if self.layer.site.weight.quantization or type(own) is not nn.Parameter or own.is_meta:
            return False
        return own.numel() <= _SMALL and not any(hasattr(type(one.method), "before_merging") for one in adapters)

    def _merge_without_values(self, adapters: Sequence[Adapter], own: Tensor | None, bias: Tensor | None) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        shape, device = self.layer.site.weight.shape, self.layer.site.weight.device
        with FakeTensorMode(allow_non_fake_inputs=True):
            weight = taken_apart(torch.empty(shape, device=device), own)
            bias = None if bias is None else taken_apart(torch.empty(bias.shape, device=device), bias)
            base = Dense(weight, bias)
            for adapter in adapters:
                try:
                    list(self._steps(base, [adapter]))
                except RuntimeError as e:
                    if type(e) in (RuntimeError, NotImplementedError):  # others say that values would be needed
                        raise

    def _kind(self, bias: Tensor | None, names: Sequence[str]) -> tuple:
        """What decides whether adapters can be merged, where their values do not."""
        layer = self.layer
        site, adapters = layer.site, [layer.adapters[name] for name in names]
        shapes = [
            (id(one.method), id(one.cfg), *((slot, tensor.shape) for slot, tensor in one.parameters().items()))
            for one in adapters
        ]
        biased = None if bias is None else bias.shape
        return type(site), type(layer.get_base_layer()), site.weight.shape, site.groups, biased, *shapes

    @torch.no_grad()
    def _check_output(self, names: Sequence[str]) -> None:
        """RuntimeError if the module, one of a user's or another library's, makes something else of its weight than
        its kind does: with the adapters inside, its output would not be the one that they were trained for."""
        layer, x = self.layer, self.layer.site.probe()
        if x is None or type(layer).forward is not CalledLayer.forward:  # another library's call, and so its merging
            return
        try:
            with in_mode(layer, training=False):
                before = y = layer.site.base(x)
                for name in names:
                    y = layer.adapters[name].method.forward(layer.site, x, y, [layer.adapters[name]])
                kept = self._snapshot(True, False)
                try:
                    self._store(self.merged(names, check=False), "nearest")
                    after = layer.site.base(x)
                finally:
                    self._restore(kept)
                    self.rounded = None
        except (TypeError, ValueError, IndexError):  # called with more than this input: nobody can tell
            return
        change, off = (y - before).float().norm(), (after - y).float().norm()
        if off > 0.1 * change + 0.02 * before.float().norm() * (x.dtype.itemsize < 4) + 1e-4 * before.float().norm():
            kind = type(layer.get_base_layer()).__name__
            raise RuntimeError(
                f"{layer.site.weight.name or kind}: a {kind} computes something else than the product with its weight, "
                f"so that with {', '.join(names)} merged its output would not be the adapted one. Leave the adapter "
                "beside it, or name other modules in target_modules."
            )

    def _steps(self, base: Dense, adapters: Sequence[Adapter]) -> Iterator[tuple[list[str], Dense]]:
        """The names of adapters, each, or all together, with the weight that it and those before it are in."""
        layer = self.layer
        if base.spare and len(adapters) > 1:
            yield [one.name for one in adapters], adapters[0].method.merged_together(layer.site, base, adapters)
            return
        dense = base
        for method in dict.fromkeys(adapter.method for adapter in adapters):
            if hasattr(type(method), "before_merging"):
                dense = method.before_merging(layer.site, dense, [one for one in adapters if one.method is method])
        for adapter in adapters:
            dense = adapter.method.merged(layer.site, dense, adapter, base)
            yield [adapter.name], dense

    def _adapters(self, names: Sequence[str]) -> list[Adapter]:
        """These adapters, to be put into the weight."""
        return [beside(self.layer, name, self.parameters()[0]) for name in names]

    def _check_together(self, names: Sequence[str]) -> None:
        """ValueError if these cannot be in one weight beside what is in it."""
        adapters = [self.layer.adapters[n] for n in (*self.layer.merged_adapters, *names)]
        for method in dict.fromkeys(adapter.method for adapter in adapters):
            if hasattr(type(method), "check_together"):
                method.check_together([adapter for adapter in adapters if adapter.method is method])

    @torch.no_grad()
    def merged(self, names: Sequence[str], check: bool, in_place: bool = False) -> Dense:
        """The base with these adapters, wide, with `in_place` in the place of the base where that is as wide;
        ValueError, if `check`, for one that makes a value not finite."""
        weight, adapters = self.layer.site.weight, self._adapters(names)
        dtype, once = weight.merge_dtype, self._in_one_step(adapters)
        if once:  # which rounds once
            dtype = torch.promote_types(weight.compute_dtype, torch.float32)
        stored = self._stored(dtype) if in_place and once and not check else None
        self.unsure |= stored is not None
        base = dense = self._dense(dtype, stored)
        if once and not is_distributed(dense.weight):
            base = dense._replace(spare=True)
        for inside, dense in self._steps(base, adapters):
            if check:
                self._check_finite(dense, inside)
        return dense

    def _stored(self, dtype: torch.dtype) -> Tensor | None:
        """The weight [N, K] itself, to be written to; None where it is not kept as numbers of this dtype."""
        weight = self.layer.site.weight
        if weight.quantization or weight.compute_dtype is not dtype or type(self._parameter) is not nn.Parameter:
            return None
        seen = weight.seen()
        return seen if seen.data_ptr() == self._parameter.data_ptr() else None

    def _in_one_step(self, adapters: Sequence[Adapter]) -> bool:
        """Whether these add products of factors that are one product together, or all scale the weight, or are one that
        rounds few times."""
        methods = {adapter.method for adapter in adapters}
        if len(methods) != 1:
            return False
        (method,) = methods
        if len(adapters) > 1:
            together = hasattr(method, "merged_together") and not hasattr(method, "before_merging")
            if not together or is_distributed(self._parameter):
                return False
        if hasattr(method, "scales") or len(adapters) == 1 and hasattr(method, "few_roundings"):
            return True
        as_product = getattr(method, "as_product", None)
        return as_product is not None and all(as_product(adapter) is not None for adapter in adapters)

    def _dense(self, dtype: torch.dtype, weight: Tensor | None = None) -> Dense:
        """The base layer as it is; of the weight a copy, if it is not given."""
        bias = self._bias
        weight = self.layer.site.weight.dense(dtype) if weight is None else weight
        return Dense(weight, None if bias is None else bias.detach().to(dtype))

    def check_values(self, names: Sequence[str]) -> None:
        """ValueError where merging these beside what is merged gives values that are not finite."""
        names = [*self.layer.merged_adapters, *names]
        if not self._surely_finite(names):
            self.merged(names, check=True)

    @torch.no_grad()
    def _surely_finite(self, names: Sequence[str]) -> bool:
        """Whether the largest weight and the longest rows of factors are too small for a value that is not finite: no
        number of a product is larger than its row and its column are long."""
        layer, weight = self.layer, self.layer.site.weight
        bias, bound = self._bias, 0.0
        if weight.quantization or is_distributed(self._parameter) or bias is not None and not is_finite(bias):
            return False
        for adapter in self._adapters(names):
            as_product = getattr(adapter.method, "as_product", None)
            pair = None if as_product is None else as_product(adapter)
            if pair is None or bias is not None and adapter.parameters().keys() != set(adapter.pair):
                return False  # what is more than a pair may change the bias
            left, right = (factor.float() for factor in layer.site.factors(*pair))
            lengths = torch.linalg.vector_norm(left, dim=-1), torch.linalg.vector_norm(right, dim=-2)
            bound += math.prod(float(some.max()) for some in lengths)
        stored = weight.seen()
        bound += max(abs(float(value)) for value in torch.aminmax(stored)) if stored.numel() else 0.0
        return bound < 0.9 * torch.finfo(weight.compute_dtype).max

    def _check_finite(self, dense: Dense, names: Sequence[str]) -> None:
        """ValueError for values that are not finite, or that storing would make infinite."""
        layer = self.layer
        dtypes = {"weights": layer.site.weight.compute_dtype}
        if dense.bias is not None:
            dtypes["bias"] = layer.base_layer.bias.dtype
        for (what, dtype), tensor in zip(dtypes.items(), dense, strict=False):
            if is_finite(put_together(tensor), dtype):  # a process may have none of it, which has no extremes
                continue
            factors = {n: layer.adapters[n].parameters().values() for n in names}
            broken = [n for n in names if not all(torch.isfinite(t).all() for t in factors[n])]
            if tensor.isnan().any() or broken and tensor.isinf().any():
                named = ", ".join(broken or names)
                raise ValueError(f"NaNs detected in the merged weights. The adapter {named} seems to be broken")
            raise ValueError(
                f"NaNs detected in the merged {what}: with the adapter {', '.join(names)} they exceed what {dtype} can "
                "hold"
            )

    @torch.no_grad()
    def _store(self, dense: Dense, rounding: str, apart: bool = False) -> None:
        """Write what is merged into the weight; with `apart` into one that no other module uses."""
        layer = self.layer
        if apart:
            part(layer.get_base_layer(), layer.site.parameter)
            if not is_distributed(self._parameter):
                dense = dense._replace(weight=put_together(dense.weight))
        self.unsure = True
        self.rounded = store(layer.site.weight, dense.weight, rounding)
        if dense.bias is not None:
            self._bias.copy_(dense.bias)

    @torch.no_grad()
    def _restore_weight(self, kept: dict[str, Any]) -> None:
        if kept["parameter"] is not None:
            rejoin(self.layer.get_base_layer(), self.layer.site.parameter, kept["parameter"])
            return
        weight = self.layer.site.weight
        if type(weight) is not kept["format"]:
            raise RuntimeError(
                f"{weight.name}: the weight was quantised with adapters {self.layer.merged_adapters} inside, which "
                "cannot be taken out of it again"
            )
        weight.restore(kept["weight"])

    @torch.no_grad()
    def _restore(self, kept: dict[str, Any]) -> None:
        self._restore_weight(kept)
        if kept["bias"] is not None:
            kept["bias"] = self._bias_before(kept)
            kept.pop("stored_bias", None)
            self._bias.copy_(kept["bias"])
        self.unsure = False

    @torch.no_grad()
    def _bias_before(self, kept: dict[str, Any]) -> Tensor:
        bias = self._bias
        before = kept["bias"].to(bias)
        return _with_changes(before, kept["stored_bias"].to(bias), bias) if "stored_bias" in kept else before

    def parameters(self) -> list[Tensor | None]:
        """Those of the base that merging writes to, None where there is none."""
        layer = self.layer
        return [getattr(layer.get_base_layer(), layer.site.parameter, None), bias_of(layer.base_layer)]

    def originals(self) -> dict[nn.Parameter, Tensor]:
        """The Parameters that have adapters inside -> what they are without, of those that are numbers as they stand
        and were kept."""
        kept, found = self.kept, {}
        if kept is None:
            return found
        before = kept["weight"] if kept["parameter"] is None else kept["parameter"]
        if isinstance(before, Tensor):
            found[self._parameter] = before
        if kept["bias"] is not None:
            found[self.layer.base_layer.bias] = self._bias_before(kept)
        return found

    def unmerge(self) -> None:
        """Take all merged adapters out again; every bit of the base is as before."""
        layer = self.layer
        if not layer.merged:
            warn("Already unmerged. Nothing to do.")
            return
        check_mergeable(layer)
        if self.kept is None and all(map(self.follows, layer.merged_adapters)):
            layer.merged_adapters = []
            return
        if self.kept is None:
            raise RuntimeError(
                f"Adapters {layer.merged_adapters} were merged without keeping the original weight, so they cannot be "
                "taken out again. Merge with keep=True to be able to unmerge."
            )
        self._restore(self.kept)
        layer.merged_adapters = []

    def forget(self) -> None:
        """Nothing is inside the weight any more, whatever it holds now."""
        self.kept = self.rounded = None
        self.unsure = False

    def change(self, adapter: str) -> Tensor:
        """See `BaseTunerLayer.get_delta_weight`."""
        layer = self.layer
        check_present(adapter, layer.adapters)
        check_mergeable(layer)
        view = layer.adapters[adapter]
        as_product = getattr(view.method, "as_product", None)
        pair = None if as_product is None else as_product(view)
        if layer.merged_adapters and pair is None:
            raise RuntimeError(
                f"What {adapter} changes depends on the base weight, which contains {', '.join(layer.merged_adapters)} "
                "now. Please unmerge first."
            )
        wide = torch.promote_types(layer.site.weight.compute_dtype, torch.float32)
        with torch.no_grad():
            if pair is not None:
                change = layer.site.delta(*(factor.to(wide) for factor in pair))
            else:  # a small change of a large weight is lost in the difference of two fp32 sums
                base = self._dense(widest(layer.site.weight.device))
                ((_, dense),) = self._steps(base, self._adapters([adapter]))
                change = (dense.weight - base.weight).to(wide)
        stored = getattr(layer.get_base_layer(), layer.site.parameter, change)  # some formats have no such Parameter
        if layer.site.weight.transposed:
            return change.t()
        return layer.site.weight.as_stored(change, stored.shape) if stored.numel() == change.numel() else change
