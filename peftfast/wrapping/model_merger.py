"""Adapters inside the weights of a whole model: in every layer or in none, and what becomes of weights that modules
share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.base.offload import at_hand
from peftfast.base.rounding import ENOUGH, check_rounding
from peftfast.embeddings import input_embeddings, output_embeddings
from peftfast.errors import PeftWarning, enumerate_some, warn
from peftfast.layers.layer import BaseTunerLayer
from peftfast.layers.mergeable import check_mergeable
from peftfast.layers.own import LoraLayer
from peftfast.layers.walk import base_modules
from peftfast.sharding import part, put_together, to_shards
from peftfast.wrapping.inventory import Inventory

#: A layer, and the adapters that are to go into its weight.
Work = tuple[BaseTunerLayer | LoraLayer, list[str]]


class ModelMerger:
    """Merges in all layers of an inventory together; each layer's `Merger` does the arithmetic."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory

    def merge(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        *,
        keep: bool | str = True,
        rounding: str = "auto",
    ) -> None:
        """Merge in every layer, or, if one refuses, in none. Arguments as in `BaseTunerLayer.merge`.

        A layer whose weight other modules use as well gets a weight of its own while it is merged.
        """
        names = self.names(adapter_names, "not found, so nothing was merged")
        self._make_ready(rounding)
        self._merge(names, safe_merge, keep, rounding)

    def names(self, adapter_names: Iterable[str] | None, said: str = "not found") -> list[str] | None:
        """The adapters that are to be merged as a list, None: the active ones.

        Raises:
            TypeError: a name by itself. ValueError: an adapter that is not there.
        """
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        if adapter_names is None:
            return None
        names = self.inventory.check_known(adapter_names, said)
        if not names:
            warn(
                f"adapter_names={names} names no adapter, so nothing is merged; None stands for the active ones, "
                f"{self.inventory.active}.",
                PeftWarning,
            )
        return names

    def _make_ready(self, rounding: str) -> None:
        """Refuse what nobody can merge, and see to it that weights are read where they are kept."""
        for layer in self.inventory.layers.values():
            check_rounding(rounding, layer.site.weight)
        check_mergeable(self.inventory.model)
        to_shards(self.inventory.model)

    def _merge(self, adapter_names: list[str] | None, safe_merge: bool, keep: bool | str, rounding: str,
               progress: Callable[[Iterable], Iterable] = iter) -> None:  # fmt: skip
        """`merge`, where all is ready."""
        present = self.active() if adapter_names is None else adapter_names
        work, own_work = self._unmerged(adapter_names)
        merged = self._merged()
        new = list(dict.fromkeys(n for _, wanted in (*work, *own_work) for n in wanted))
        if merged and new:
            warn(
                f"Already following adapters were merged {','.join(sorted(merged))}. "
                f"You are now additionally merging {','.join(new)}."
            )
        elif merged and present:
            warn("All adapters are already merged, nothing to do.")
            return
        if not keep:  # there is no way back, so nothing may fail half-way
            self._check(work)
            if safe_merge:
                self._check_values(work)
        shared = self._weights_of_others(work)
        before: list[tuple[BaseTunerLayer, list[str], bool]] = []
        own: list[LoraLayer] = []
        try:
            for layer, wanted in own_work:
                layer.merge(safe_merge=safe_merge, adapter_names=wanted)
                own.append(layer)
            for layer, wanted in progress(work):
                before.append((layer, layer.merged_adapters, layer in shared or layer.merger.is_apart))
                layer.merger.merge(
                    wanted, safe_merge=safe_merge and bool(keep), keep=keep, untie=layer in shared, rounding=rounding
                )
        except BaseException:
            for layer, names_before, apart in reversed(before):
                if keep and layer.merged_adapters != names_before:
                    layer.unmerge()
                    if names_before:
                        layer.merger.merge(names_before, keep=keep, untie=apart, rounding=rounding)
            for layer in reversed(own):
                layer.unmerge()
            raise
        self._say_what_was_rounded()

    def merge_for_good(self, adapter_names: list[str] | None, safe_merge: bool, rounding: str,
                       progress: Callable[[Iterable], Iterable]) -> None:  # fmt: skip
        """Merge before the adapters are taken away; nothing is kept for unmerging that is not needed on the way."""
        self._make_ready(rounding)
        names = self.active() if adapter_names is None else adapter_names
        merged = self._merged()
        if not merged:
            self._untie_one_sided(names)
        if not merged or any(self._unmerged(adapter_names)):
            self._merge(adapter_names, safe_merge, bool(merged), rounding, progress)

    def check(self, adapter_names: list[str] | None = None, rounding: str = "auto", *, dense: bool = False) -> None:
        """Raise what merging the adapters (None: the active ones) would raise for their kind, without merging any.

        Args:
            dense: the weights will be dense by then, however they are stored now.
        """
        check_rounding(rounding)
        check_mergeable(self.inventory.model)
        self._check(self._unmerged(adapter_names)[0], dense)

    def check_values(self, adapter_names: list[str] | None = None) -> None:
        """ValueError if merging the adapters (None: the active ones) gave values that are not finite."""
        self._check_values(self._unmerged(adapter_names)[0])

    def _check_values(self, work: list[Work]) -> None:
        for layer, wanted in work:
            layer.merger.check_values(wanted)

    def _check(self, work: list[Work], dense: bool = False) -> None:
        passed: set[tuple] = set()
        for layer, wanted in work:
            layer.merger.check(wanted, passed, dense)

    def _merged(self) -> set[str]:
        """Names of the adapters that are inside some weight."""
        return {n for layer in self.inventory.mergeable().values() for n in layer.merged_adapters}

    def _unmerged(self, adapter_names: list[str] | None) -> tuple[list[Work], list[Work]]:
        """The layers that have adapters to merge, and those of them whose `merge` is not this library's, but of a layer
        that a user has written, or of a class that another library has made of one here (NVIDIA's ModelOpt): a layer
        that was merged by itself says nothing of the others."""
        found: tuple[list[Work], list[Work]] = [], []
        for layer in (*self.inventory.mergeable().values(), *self.inventory.own_layers()):
            asked = layer.active_adapters if adapter_names is None else adapter_names
            present = layer._get_available_adapters()
            wanted = [n for n in asked if n in present and n not in layer.merged_adapters]
            if wanted:
                found[type(layer).merge is not BaseTunerLayer.merge].append((layer, wanted))
        return found

    def active(self) -> list[str]:
        """Names of the adapters that are active in some layer; layers may have been told so one by one."""
        layers = self.inventory.mergeable().values()
        return list(dict.fromkeys(n for layer in layers for n in layer.active_adapters if n in layer.adapters))

    def _weights_of_others(self, work: list[Work]) -> set[BaseTunerLayer]:
        """Which of these layers have a weight that another module uses as its own and is to keep."""
        owners = _owners(self.inventory.model)
        for layer in self.inventory.mergeable().values():
            if layer.merger.is_apart:  # for now: it goes back to a weight that it shares
                owners.setdefault(id(layer.merger.kept["parameter"]), []).append((layer.get_base_layer(), ""))
        inside = {layer: {*layer.merged_adapters, *wanted} for layer, wanted in work}
        tied = _tied(inside)
        found: set[BaseTunerLayer] = set()
        for layer in inside.keys() - tied.keys():
            own = layer.get_base_layer()._parameters.get(layer.site.parameter)
            others = {module for module, _ in owners.get(id(own), ())} - {layer.get_base_layer()}
            others -= {other.base_layer for other, source in tied.items() if source is layer}
            if others and layer.site.weight.quantization is None:
                found.add(layer)
        found |= {layer for layer, source in tied.items() if source in found}
        if found:
            named = enumerate_some([key for key, layer in self.inventory.mergeable().items() if layer in found])
            if any(layer.merged for layer in found):
                raise ValueError(
                    f"Nothing was merged: {named} share a weight that has adapters inside, and are to "
                    "change in different ways now. Unmerge first, and merge all adapters together."
                )
            warn(
                f"The weights of {named} are tied to other modules, which the adapters do not change, or "
                "not so; while merged, they are weights of their own.",
                PeftWarning,
            )
        return found

    def errors(self) -> dict[str, float]:
        """Relative error |stored - exact| / |exact| of every merged weight whose storage is quantised."""
        errors = {k: layer.merge_error for k, layer in self.inventory.layers.items() if layer.merge_error is not None}
        return {key: float(error) for key, error in errors.items()}

    def _say_what_was_rounded(self) -> None:
        errors = self.errors()
        if not errors:
            return
        worst = max(errors, key=errors.__getitem__)
        said = [
            f"{len(errors)} weights with adapters inside were rounded to their quantised storage: relative error "
            f"{_mean(errors.values()):.2%} on average, {errors[worst]:.2%} in {worst}."
        ]
        rounded = [layer.merger.rounded for layer in self.inventory.layers.values() if layer.merge_error is not None]
        drawn = [r for r in rounded if r.nearest is not None]
        if drawn:
            said.append(
                f"{len(drawn)} of them were rounded stochastically, which keeps {_mean(r.kept for r in drawn):.0%} of "
                f"what the adapters change; to the nearest value, {_mean(r.nearest for r in drawn):.0%} would have "
                "been left."
            )
        lost = [r for r in rounded if r.nearest is None and r.kept < ENOUGH]
        if lost:
            said.append(
                f"In {len(lost)} of them only {_mean(r.kept for r in lost):.0%} of what the adapters change is left."
            )
        said.append("merge_and_unload(dequantize=True) merges without that rounding, into dense weights.")
        warn(" ".join(said), PeftWarning)

    def _untie_one_sided(self, names: Iterable[str]) -> None:
        """Where an adapter is about to change one of two modules that share a weight, the other gets its own copy;
        merging would otherwise change what nobody adapted."""
        owners = _owners(self.inventory.model)
        inside_extras = {id(m) for wrapper in self.inventory.extras.values() for m in wrapper.modules()}
        inside = {layer: set(names) & layer.adapters.keys() for layer in self.inventory.layers.values()}
        followers = {id(layer.base_layer) for layer in _tied(inside)}
        for layer in self.inventory.layers.values():
            own = layer.get_base_layer()
            weight = own._parameters.get(layer.site.parameter)
            if weight is None or id(own) in followers or not inside[layer]:
                continue
            for other, name in owners.get(id(weight), ()):
                if other is not own and id(other) not in inside_extras | followers:
                    part(other, name, weight.requires_grad)


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """By the id of a Parameter of the base, the modules that have it, and its names there."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for _, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, name))
    return found


def _mean(values: Iterable[Any]) -> float:
    found = [float(value) for value in values]
    return sum(found) / len(found)


def _tied(inside: Mapping[BaseTunerLayer, set[str]]) -> dict[BaseTunerLayer, BaseTunerLayer]:
    """Layers whose weight is another layer's too, on purpose, so that one change is for both -> that layer.

    Args:
        inside: the adapters that each layer has, or is to have, in its weight.
    """
    found = {}
    for layer, names in inside.items():
        sources = {layer.merger.sources[name] for name in names if layer.merger.follows(name)}
        if len(sources) == 1 and names == inside.get(source := sources.pop()) and all(map(layer.merger.follows, names)):
            found[layer] = source
    return found


def say_if_untied(model: nn.Module) -> None:
    """Where embeddings that were one weight are two now, the config says so from now on, with a warning."""
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    inputs, outputs = input_embeddings(model), output_embeddings(model)
    if outputs is not None and inputs is not None and outputs.weight is not inputs.weight:
        if not _are_equal(at_hand(outputs), at_hand(inputs)):
            config.tie_word_embeddings = False
            _part(outputs, model)
            warn(
                "Input and output embeddings are no longer tied after merging. Setting "
                "`config.tie_word_embeddings = False`, so that the saved model keeps both.",
                PeftWarning,
            )


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two weights are the same numbers, whether or not FSDP2 has taken one of them apart."""
    return one.shape == other.shape and torch.equal(put_together(one), put_together(other))


def _part(head: nn.Module, model: nn.Module) -> None:
    """Give a head its own copy of what it shares besides the weight: BERT's has its bias under two names, of which a
    file keeps one, and who reads the file ties them only along with the embeddings."""
    others = {p for module in model.modules() if module is not head for p in module._parameters.values()}
    for name, p in head._parameters.items():
        if p is not None and p in others:
            head._parameters[name] = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
