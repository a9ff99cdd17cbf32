"""Choosing adapters from the inputs, and turning a choice of any kind into a `Routing`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftfast.errors import close_matches
from peftfast.rows.routing import BASE, Routing, batch_of, tokens_of
from peftfast.sharding import is_fsdp2_in_use

if TYPE_CHECKING:
    from peftfast.wrapping.inventory import Inventory

#: What may be passed as `adapter_names`: a name for every sample, or a number for every sample.
Choice = Sequence[str] | Tensor


class Router:
    """Chooses the adapters of a batch from its inputs.

    Subclass it and write `choose`, or give it a function; then `model.set_router(router)`. It is asked once for every
    `forward` and every `generate` that was not given `adapter_names`, on the thread that called it, so a router without
    state of its own is safe under threads.

    Args:
        function: what `choose` answers with.
    """

    def __init__(self, function: Callable[[Mapping[str, Any]], Choice | None] | None = None) -> None:
        self.function = function

    def choose(self, inputs: Mapping[str, Any]) -> Choice | None:
        """The adapters of a batch.

        Args:
            inputs: the model's arguments by name.

        Returns:
            A name for every sample ("__base__" for none), or a tensor of adapter numbers, or None: the active adapters.
        """
        if self.function is None:
            raise NotImplementedError(f"{type(self).__name__} needs a `choose` method, or a function when it is made")
        return self.function(inputs)


def as_router(router: Router | Callable[[Mapping[str, Any]], Choice | None] | None) -> Router | None:
    """The router itself, one around a function, or None."""
    if router is None or isinstance(router, Router):
        return router
    if not callable(router):
        raise TypeError(f"A router is a peftfast.Router or a function of the inputs, got {router!r}")
    return Router(router)


def named_inputs(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A model's arguments by the names of its `forward`."""
    parameters = inspect.signature(model.forward).parameters if args else ()
    return {**dict(zip(parameters, args, strict=False)), **kwargs}


def resolve(
    inventory: Inventory, choice: Choice, args: Sequence[Any], kwargs: Mapping[str, Any], copies: tuple[int, ...] = (1,)
) -> Routing:
    """The routing that `adapter_names=choice` means for this batch.

    Args:
        copies: how many neighbouring rows may belong to one sample: 1, and the number of beams.

    Raises:
        ValueError: an adapter that is not there, as many names as there are no samples, merged adapters, a number out
            of range (looked at on the CPU only: elsewhere such samples come out as NaN).
        TypeError: neither names nor a tensor of whole numbers.
    """
    check_unmerged(inventory)
    batch = batch_of(args, kwargs)
    tokens = tokens_of(batch)
    if isinstance(choice, Tensor):
        return _by_number(inventory, choice, batch, copies=copies, tokens=tokens)
    check_names(choice, inventory.configs, batch, ", or a tensor of adapter numbers")
    device = "cpu" if batch is None else batch.device
    return Routing.by_name(choice, inventory.numbers, device, copies=copies, tokens=tokens)


def together(inventory: Inventory, routing: Routing) -> Routing:
    """A routing by names for a call that trains, in which every process gives a gradient to what one of them gives one
    to, where engines reduce gradients that would not be the same ones otherwise."""
    known = routing.seen or routing
    if inventory.is_stepped_by_deepspeed():  # some of which reduces gradients as they come
        routing = known.blind(tuple(inventory.numbers))
    known.together = known.together or is_fsdp2_in_use()
    return routing


def check_unmerged(inventory: Inventory) -> None:
    """ValueError if adapters are inside the weights, where they would act on all samples."""
    if any(layer.merged for layer in inventory.layers.values()):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )


def check_names(names: Any, present: Iterable[str], batch: Tensor | None, otherwise: str = "") -> None:
    """TypeError if it is no list of names, ValueError if they are not one for each sample, or of no adapter.

    Args:
        otherwise: what else may be given, for the message.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
        raise TypeError(
            f"`adapter_names` must be a list with one adapter name for each sample{otherwise}; got {names!r}"
        )
    check_length(len(names), batch)
    present = list(present)
    unknown = sorted({n for n in names if n != BASE and n not in present})
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}."
            f"{close_matches(unknown[0], present)} Present: {', '.join(present)}"
        )


def check_length(length: int, batch: Tensor | None) -> None:
    """ValueError if adapters are not one for each sample."""
    if batch is not None and length != batch.shape[0]:
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{length} and {batch.shape[0]} respectively."
        )


def _by_number(inventory: Inventory, numbers: Tensor, batch: Tensor | None, **shape: Any) -> Routing:
    if numbers.dim() != 1 or numbers.is_floating_point() or numbers.dtype == torch.bool:
        raise TypeError(
            "`adapter_names` as a tensor holds one adapter number for each sample (int32 or int64 [B], -1 for the base "
            f"model; see `adapter_numbers`), got {numbers.dtype} {list(numbers.shape)}"
        )
    check_length(numbers.shape[0], batch)
    names, table = inventory.number_table(numbers.device)
    if numbers.device.type == "cpu" and not torch.compiler.is_compiling():
        known = {-1: BASE, **{number: name for name, number in inventory.numbers.items()}}
        given = numbers.tolist()
        wrong = sorted(set(given) - known.keys())
        if wrong:
            raise ValueError(
                f"No adapter has the number {', '.join(map(str, wrong))}. Numbers are never used twice; present: "
                f"{inventory.numbers}, -1 is the base model"
            )
        device = "cpu" if batch is None else batch.device
        shape["seen"] = Routing.by_name([known[n] for n in given], inventory.numbers, device, **shape)
    place = torch.searchsorted(table, numbers.long().contiguous())
    return Routing(names, torch.where(table[place] == numbers, place - 1, len(names)), None, **shape)


def copies_of_a_sample(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """Into how many rows `generate` may expand a prompt: itself, its beams, its returned sequences. An encoder sees
    the prompts before they are expanded."""
    given = kwargs.get("generation_config") or next((a for a in args if hasattr(a, "num_beams")), None)
    counts = {1}
    for name in ("num_beams", "num_return_sequences"):
        value = kwargs.get(name)
        for config in (given, getattr(model, "generation_config", None)):
            value = getattr(config, name, None) if value is None else value
        counts.add(int(value or 1))
    return tuple(sorted(counts))
