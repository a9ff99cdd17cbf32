"""Which adapter every sample of a batch gets: decided once per forward of the model, read by every layer.

A `Routing` comes from names (a list of strings, one a sample) or from a tensor of adapter numbers. Names are known to
the host, so the products of a layer can be arranged around them; a tensor never is, so that one compiled graph and one
CUDA graph serve every mix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftfast.autocast import without_autocast
from peftfast.rows.mix import Verdicts
from peftfast.sharding import is_distributed, reaching

#: In place of an adapter's name: this sample gets the base model.
BASE = "__base__"


class Rows:
    """The samples of one layer's input; one object for all layers of a forward where they are the same.

    Attributes:
        index: [B] int64, position in the layer's list of adapters; -1 for the base model; the length of the list for
            a number that no adapter has (its samples come out as NaN, because looking at the number would stall a GPU).
        host: the same as a tuple where the host knows it, else None.
        verdicts: whether what methods keep of the adapters still holds; None: nothing is kept.
    """

    __slots__ = ("index", "host", "verdicts", "_memo")

    def __init__(self, index: Tensor, host: tuple[int, ...] | None, verdicts: Verdicts | None = None) -> None:
        self.index, self.host, self.verdicts = index, host, verdicts
        self._memo: dict[Any, Any] = {}

    def derived(self, name: Any, make: Callable[[], Any]) -> Any:
        """`make()`, once for these samples."""
        if name not in self._memo:
            self._memo[name] = make()
        return self._memo[name]

    def latest(self, name: Any, of: Any, make: Callable[[], Any]) -> Any:
        """`make()` for these samples and the object `of`, until another one is asked for."""
        known = self._memo.get(name)
        if known is None or known[0] is not of:
            known = self._memo[name] = (of, make())
        return known[1]

    def of(self, position: int) -> Tensor:
        """Indices [n] of the samples of one adapter; needs `host`."""
        return self.derived(
            f"of {position}", lambda: self._indices(i for i, g in enumerate(self.host) if g == position)
        )

    def mask(self, position: int, y: Tensor) -> Tensor:
        """Which samples of y [B, ...] are one adapter's, [B, 1, ...]."""
        return (self.index == position).view(-1, *(1,) * (y.dim() - 1))

    def without_unknown(self, y: Tensor, count: int) -> Tensor:
        """y [B, ...] with NaN in samples whose number none of `count` adapters has; as it is where it has no NaN."""
        if not y.is_floating_point():
            return y
        return y.masked_fill((self.index >= count).view(-1, *(1,) * (y.dim() - 1)), float("nan"))

    def turns(self, count: int) -> list[int]:
        """Positions of the adapters of these samples, -1 for the base model; where the host does not know them, all of
        `count`."""
        return [p for p in range(-1, count) if self.host is None or p in self.host]

    def own(self, position: int, x: Tensor) -> Tensor:
        """The samples of x [B, ...] whose turn it is; all of them where the host does not know which."""
        return x if self.host is None else x.index_select(0, self.of(position))

    def joined(self, parts: Sequence[tuple[int, Tensor]], count: int) -> Tensor:
        """What was computed of `own` samples in `turns`, as one batch [B, ...]."""
        out = parts[0][1]
        if self.host is None:
            for position, part in parts[1:]:
                out = torch.where(self.mask(position, out), part, out)
            return self.without_unknown(out, count)
        out = out.new_empty(self.index.shape[0], *out.shape[1:])
        with without_autocast(out):  # which refuses tensors of another half precision
            for position, part in parts:
                out = out.index_copy(0, self.of(position), part.to(out.dtype))
        return out

    def only(self, positions: Sequence[int], count: int) -> Rows:
        """The same for a method that has the adapters at `positions`, out of `count`; the rest is not its business."""
        new = {p: i for i, p in enumerate(positions)}
        if self.host is not None:
            host = tuple(new.get(g, -1) for g in self.host)
            return self.derived(("only", *positions), lambda: Rows(self._indices(host), host, self.verdicts))
        table = [-1, *(new.get(p, -1) for p in range(count)), len(positions)]
        return Rows(self._indices(table)[self.index + 1], None, self.verdicts)

    @property
    def taken(self) -> slice | Tensor | None:
        """Where samples with an adapter are, those of one adapter after those of another where that makes a `run`;
        None: everywhere, in order. A slice where they are neighbours in order. Needs `host`."""

        def make() -> slice | Tensor | None:
            where = [i for i, g in enumerate(self.host) if g >= 0]
            if self.run:
                ordered = sorted(where, key=self.host.__getitem__)
                if ordered != where:
                    return self._indices(ordered)
            if len(where) == len(self.host):
                return None
            if where and where[-1] - where[0] + 1 == len(where):
                return slice(where[0], where[-1] + 1)
            return self._indices(where)

        return self.derived("taken", make)

    @property
    def used(self) -> int:
        """How many samples have an adapter. Needs `host`."""
        return self.derived("used", lambda: sum(g >= 0 for g in self.host))

    @property
    def run(self) -> int:
        """n if there are n samples of adapter 0, n of adapter 1 and so on, which makes a batched product over the
        stacked factors a mere view, samples being smaller to move than factors; 0 otherwise. Needs `host`."""

        def make() -> int:
            used = sorted(g for g in self.host if g >= 0)
            count = max(used) + 1
            n = len(used) // count
            return n if used == [g for g in range(count) for _ in range(n)] else 0

        return self.derived("run", make)

    @property
    def positions(self) -> Tensor:
        """`index` without the samples of the base model. Needs `host`."""
        taken = self.taken
        return self.derived("positions", lambda: self.index if taken is None else self.index[taken])

    def _indices(self, values: Any) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self.index.device)


class Routing:
    """One batch's mix.

    Attributes:
        names: the adapters in question.
        index: [B] int64, position in `names`; -1 for the base model.
        host: the same as a tuple where the host knows it.
        copies: how many neighbouring rows of an input may belong to one sample (beams).
        slots: the pool whose slots are counted, instead of adapters of the model.
        seen: the same for eager calls, where the host knows numbers that no graph may depend on.
        tokens: tokens per sample, for layers that see the batch flattened to [B · tokens, K].
        uniform: all samples have the same adapter.
        even: there are as many samples of each of the first adapters or slots, and none of any other or the base model.
        verdicts: whether what methods keep of the adapters still holds.
        together: every process has to give a gradient to what one of them gives one to, see `reaching`.
        named: of one that nobody is to know, the one that it was made of: for layers with one weight for all samples.
        keeps: methods may keep things for the next forward; False where a recording would not see them made anew.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        index: Tensor,
        host: tuple[int, ...] | None,
        copies: tuple[int, ...] = (1,),
        tokens: int | None = None,
        slots: Any = None,
        seen: Routing | None = None,
        keeps: bool = True,
    ) -> None:
        self.slots, self.seen, self.keeps = slots, seen, keeps
        self.names, self.index, self.host, self.copies, self.tokens = names, index, host, copies, tokens
        self.uniform = host is not None and len(set(host)) == 1
        used = len(set(host)) if host else 0
        self.even = used > 0 and sorted(host) == [g for g in range(used) for _ in range(len(host) // used)]
        self.verdicts: Verdicts | None = None
        self.together, self.named = False, None
        self._memo: dict[Any, Any] = {}

    def reaching(self, output: Any, *layers: Any) -> Any:
        """What these layers have computed, whose backward pass gives a gradient of zero to what trains of their
        adapters that no sample here has. Processes whose samples have different adapters would not reduce the same
        gradients otherwise."""
        if not self.together:
            return output
        left = [
            p
            for layer in layers
            for name in layer._get_available_adapters().difference(self.names)
            for p in layer.adapter_parameters(name).values()
            if p.requires_grad and not is_distributed(p)
        ]
        if not left:
            return output
        return (reaching(output[0], left), *output[1:]) if isinstance(output, tuple) else reaching(output, left)

    def blind(self, names: tuple[str, ...]) -> Routing:
        """The same among all these adapters, in tensors alone: what is computed, and in which order gradients come, is
        then the same in every process, whatever samples it has."""
        index = [-1 if i < 0 else names.index(self.names[i]) for i in self.host]
        index = torch.tensor(index, dtype=torch.int64, device=self.index.device)
        made = Routing(names, index, None, self.copies, self.tokens)
        made.named, self.together = self, True
        return made

    def arranges(self, x: Tensor) -> bool:
        """Whether `arranged` can bring this input into runs of samples with one adapter."""
        return self.even and self.index.shape[0] == x.shape[0] and self.index.device == x.device

    def arranged(self, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """`call` of the samples in the order of their adapters, in the order they have. Moves less than factors are."""
        order = self.order
        return call(x) if order is None else call(x.index_select(0, order[0])).index_select(0, order[1])

    @property
    def order(self) -> tuple[Tensor, Tensor] | None:
        """[B], [B]: the samples by adapter, and where each of them is then; None: that is the order they have."""
        if "order" not in self._memo:
            order = None
            if self.host != tuple(sorted(self.host)):
                samples = torch.argsort(self.index, stable=True)
                order = samples, torch.argsort(samples)
            self._memo["order"] = order
        return self._memo["order"]

    @classmethod
    def by_name(
        cls, names: Sequence[str], order: Mapping[str, int], device: torch.device | str, **shape: Any
    ) -> Routing:
        """From one name a sample; `BASE` for none. Sorted by `order`, so that layers make and keep one stack of
        factors for all mixes of the same adapters."""
        used = tuple(sorted({n for n in names if n != BASE}, key=order.__getitem__))
        position = {name: i for i, name in enumerate(used)} | {BASE: -1}
        host = tuple(position[n] for n in names)
        return cls(used, torch.tensor(host, dtype=torch.int64, device=device), host, **shape)

    def rows(self, x: Tensor, present: tuple[bool, ...], store: MutableMapping[Any, Any], where: str) -> Rows:
        """The samples of a layer's input.

        Args:
            x: the input, samples first.
            present: for each of `names`, whether the layer has it; the others contribute nothing there.
            store: a dict of the layer that outlives the forward.
            where: the layer's name, for the message.

        Raises:
            ValueError: `x` holds another number of samples than this routing.
        """
        numbers = self.index
        if self.host is None and (torch.compiler.is_compiling() or numbers.is_inference()):
            return self._numbered(x, present, store, where)  # nothing would tell that the numbers were written to
        key = (x.shape[0], present, x.device, 0 if self.host is not None else numbers._version)
        known = self._memo.get(key)
        if known is None:
            known = self._numbered(x, present, store, where) if self.host is None else self._named(x, present, where)
            self._memo[key] = known
        return known

    def _named(self, x: Tensor, present: tuple[bool, ...], where: str) -> Rows:
        repeats = self._repeats(x, where)
        host = self.host
        if not all(present):
            places = _places(present)
            host = tuple(places[g + 1] for g in host)
        host = tuple(g for g in host for _ in range(repeats))
        return Rows(torch.tensor(host, dtype=torch.int64, device=x.device), host, self._kept())

    def _numbered(self, x: Tensor, present: tuple[bool, ...], store: MutableMapping[Any, Any], where: str) -> Rows:
        index = self.index
        if x.shape[0] != index.shape[0]:
            index = index.repeat_interleave(self._repeats(x, where))
        if not all(present):
            index = self._position_here(present, store)[index + 1]
        return Rows(index.to(x.device), None, self._kept())

    def _kept(self) -> Verdicts | None:
        return self.verdicts if self.keeps else None

    def _position_here(self, present: tuple[bool, ...], store: MutableMapping[Any, Any]) -> Tensor:
        """`_places` as a tensor, of which the layer keeps the latest: names are those of all adapters."""
        known = store.get("position here")
        if known is None or known[0] != present or known[1].device != self.index.device:
            table = torch.tensor(_places(present), dtype=torch.int64, device=self.index.device)
            known = (present, table)
            if not torch.compiler.is_compiling():
                store["position here"] = known
        return known[1]

    def _repeats(self, x: Tensor, where: str) -> int:
        size, batch = x.shape[0], self.index.shape[0]
        repeats = size // batch if batch else 0
        flat = x.dim() == 2 and self.tokens is not None
        if repeats * batch == size and (
            repeats in self.copies or (flat and any(repeats == n * self.tokens for n in self.copies))
        ):
            return repeats
        message = (
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{batch} and {size} respectively{f' at {where}' if where else ''}."
        )
        if flat:
            message += f" A flattened batch has {batch} times {self.tokens} rows here, those of a sample together."
        raise ValueError(message)


def _places(present: tuple[bool, ...]) -> list[int]:
    """[1 + len(names) + 1]: position in a layer's shorter list for -1, every position, and the unknown."""
    return [-1, *(sum(present[:i]) if here else -1 for i, here in enumerate(present)), sum(present)]


def batch_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor among a model's inputs, whose first dimension counts the samples."""
    names = ("input_ids", "inputs_embeds", "inputs", "input_features", "input_values", "pixel_values")
    for value in (*args, *(kwargs.get(n) for n in names), *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value
    return None


def tokens_of(batch: Tensor | None) -> int | None:
    """How many tokens a sample of it has, for layers that see the batch flattened; None: that is not known."""
    return batch.shape[1] if batch is not None and batch.dim() > 1 else None
