"""A call of a model with adapters: which of them act on which sample, and what they are told of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.config import PeftConfig
from peftfast.errors import PeftWarning, enumerate_some, warn
from peftfast.many.router import (
    Choice,
    Router,
    as_router,
    check_names,
    copies_of_a_sample,
    named_inputs,
    resolve,
    together,
)
from peftfast.method import Call
from peftfast.ops.casts import CastStore
from peftfast.rows.routing import BASE
from peftfast.training.checkpointing import is_checkpointing, require_input_gradients
from peftfast.watch import Place
from peftfast.wrapping.inventory import Inventory

#: What may be passed as `alora_offsets`: a number of tokens for every sample.
Offsets = Sequence[int | None] | Tensor


class CalledModel:
    """Mixin of the module around a base model.

    Attributes:
        router: chooses the adapters of batches that come without `adapter_names`.
    """

    model: nn.Module
    inventory: Inventory
    peft_config: dict[str, PeftConfig]
    router: Router | None
    _checkpointing: Any
    _casts: CastStore
    _said_frozen: set[int]  # numbers of adapters of which was said that they are not trained

    def forward(
        self, *args: Any, adapter_names: Choice | None = None, alora_offsets: Offsets | None = None, **kwargs: Any
    ) -> Any:
        """The base model's output with the active adapters.

        Args:
            adapter_names: instead of the active ones, an adapter for every sample: its name or "__base__", or its
                number or -1 in a tensor. Allowed in training as well: each adapter gets the gradient of its samples,
                if it is trainable, which those that are not active become by `set_requires_grad(names)`.
            alora_offsets: for every sample, how many tokens at its end aLoRAs act on, None or 0 for none; without it,
                those from the last occurrence of an adapter's `alora_invocation_tokens` in `input_ids` on.
        """
        checkpoints = self.training and is_checkpointing(self._checkpointing)
        if checkpoints:
            require_input_gradients(self.model)
        with (
            self.routed(adapter_names, args, kwargs),
            self.noting(args, kwargs, alora_offsets),
            self.compute_copies(),
        ):
            output = self.model(*args, **kwargs)
            self.inventory.control.follow(output, self.inventory.in_force if checkpoints else None)
            return self._with_loss_terms(output)

    def generate(
        self, *args: Any, adapter_names: Choice | None = None, alora_offsets: Offsets | None = None, **kwargs: Any
    ) -> Any:
        """The base model's `generate`, with the active adapters or, by `adapter_names`, with one for each prompt;
        `alora_offsets` as in `forward`, of the prompts."""
        copies = copies_of_a_sample(self.model, args, kwargs)
        with (
            self.routed(adapter_names, args, kwargs, copies),
            self.noting(args, kwargs, alora_offsets, copies, generates=True),
        ):
            return self.model.generate(*args, **kwargs)

    def noting(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        alora_offsets: Offsets | None,
        copies: tuple[int, ...] = (1,),
        generates: bool = False,
    ) -> AbstractContextManager[None]:
        """A context in which the adapters in force find what their methods note of these inputs (see `Noting`)."""
        inventory = self.inventory
        routing = inventory.control.routing
        if not inventory.enabled or routing is not None and routing.slots is not None:
            return nullcontext()
        notes: dict[str, Any] = {}
        call = None
        for name in inventory.active if routing is None else routing.names:
            method = inventory.method_of(name)
            if hasattr(method, "note"):
                if call is None:
                    inputs = {**named_inputs(self.model, args, kwargs), "alora_offsets": alora_offsets}
                    call = Call(self.model, inputs, generates, copies)
                notes[name] = method.note(name, self.peft_config[name], call)
        if not notes:
            return nullcontext()
        return self._following_steps(notes) if generates else inventory.control.noting(notes)

    @contextmanager
    def _following_steps(self, notes: Mapping[str, Any]) -> Iterator[None]:
        """`Control.noting`, with notes that are told of every call of the model."""
        control = self.inventory.control

        # another thread may be generating with the same model: torch calls this for its steps as well, and without the
        # keywords if it is taken away in the middle of one
        def step(module: nn.Module, args: tuple, kwargs: Mapping[str, Any] = MappingProxyType({})) -> None:
            if control.is_noting(notes):
                for note in notes.values():
                    if note is not None:
                        note.step(named_inputs(module, args, kwargs))

        with control.noting(notes), self.model.register_forward_pre_hook(step, with_kwargs=True):
            yield

    @contextmanager
    def routed(
        self,
        adapter_names: Choice | None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] = MappingProxyType({}),
        copies: tuple[int, ...] = (1,),
    ) -> Iterator[None]:
        """A context in which calls from this thread follow `adapter_names`, or what the router chooses for these
        inputs. With neither, nothing changes."""
        if adapter_names is None and self.router is not None and self.inventory.control.routing is None:
            adapter_names = self.router.choose(named_inputs(self.model, args, kwargs))
        if adapter_names is None:
            yield
            return
        routing = resolve(self.inventory, adapter_names, args, kwargs, copies)
        for layer in self.inventory.own_layers():
            if routing.slots is not None or not layer._adapters.isdisjoint(routing.names):
                raise TypeError(f"{type(layer).__name__}, a layer of one's own, does not support mixed adapter batches")
        known = routing.seen or routing
        named = known.slots is None and known.host is not None
        if named and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if routing is known:  # numbers may be any of all adapters
                self._say_if_frozen(routing.names)
            routing = together(self.inventory, routing)
        with self.inventory.control.use(routing):
            yield

    def _say_if_frozen(self, names: Sequence[str]) -> None:
        """Warn, once of each, of adapters that a batch names beside others that it trains, and that get no gradient."""
        frozen = [name for name in names if self.inventory.is_frozen(name)]
        numbers = self.inventory.numbers
        if len(frozen) < len(names) and not self._said_frozen.issuperset(map(numbers.get, frozen)):
            self._said_frozen = {*self._said_frozen.intersection(numbers.values()), *map(numbers.get, frozen)}
            warn(
                f"adapter_names names {enumerate_some(frozen)} in training, whose parameters are frozen: they act, but "
                f"learn nothing. model.set_requires_grad({frozen!r}) makes them trainable.",
                PeftWarning,
            )

    def set_router(self, router: Router | Callable[[Mapping[str, Any]], Choice | None] | None) -> None:
        """Let `router` choose the adapters of every batch that comes without `adapter_names`; None: none any more."""
        self.router = as_router(router)

    def adapter_numbers(self, names: Sequence[str], device: torch.device | str | None = None) -> Tensor:
        """[len(names)] int64: the numbers of these adapters, for `adapter_names=` as a tensor; -1 for "__base__"."""
        check_names(names, self.peft_config, None)
        numbers = [-1 if n == BASE else self.inventory.numbers[n] for n in names]
        made = torch.tensor(numbers, dtype=torch.int64, device=device or self._device())
        self.inventory.number_table(made.device)  # now, not in a graph that would guard on its absence
        return made

    def unchanging_adapters(self) -> AbstractContextManager[None]:
        """A context that promises: in it, nobody writes to adapters' tensors or scalings or replaces them, other than
        by adding, loading, swapping, scaling and deleting adapters with this library. Mixed batches need not look for
        changes before every forward then, which for sixteen adapters takes as long as a third of a small model.

        Every 128th mixed forward and the end of the context look all the same.

        Raises:
            RuntimeError: there, if the promise was broken.
        """
        return self.inventory.control.unchanging()

    def forget_stacks(self) -> None:
        """Make anew what is made of factors and kept, as the stacks of mixed batches and of experts: needed after
        factors were written through `.data`."""
        self.inventory.control.outdate()
        for layer in self.inventory.layers.values():
            layer.changed()

    def compute_copies(self) -> Any:
        """A context in which the active factors are cast to autocast's dtype once for all layers."""
        if torch.compiler.is_compiling() or self.inventory.control.routing is not None:
            return nullcontext()
        device = self._device().type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return nullcontext()
        return self._casts.window(self.inventory.active, self._active_factors, torch.get_autocast_dtype(device))

    def _active_factors(self) -> tuple[list[Tensor], list[Place]]:
        """The factors, and what has to stay for them to be these."""
        names = self.inventory.active
        adapters = [
            (layer.adapters, name, layer.adapters[name])
            for layer in self.inventory.layers.values()
            for name in set(names) & layer.adapters.keys()
        ]
        factors = [p for *_, adapter in adapters for p in adapter.parameters().values() if p.dim() == 2]
        return factors, [*adapters, *[place for *_, adapter in adapters for place in adapter.places()]]

    def _device(self) -> torch.device:
        layer = next(iter(self.inventory.layers.values()), None)
        return torch.device("cpu") if layer is None else layer.site.weight.device

    def _with_loss_terms(self, output: Any) -> Any:
        """Methods may add to the loss (AdaLoRA's orthogonality)."""
        if not isinstance(getattr(output, "loss", None), Tensor):
            return output
        routing = self.inventory.control.routing
        for name in self.inventory.active if routing is None else routing.names:
            method = self.inventory.method_of(name)
            if hasattr(method, "loss_term"):  # asking the protocol takes as long as a small product
                term = method.loss_term(self.inventory.adapters(name))
                if term is not None:
                    output.loss = output.loss + term.to(output.loss.dtype)
        return output

    def read_from_outside(self) -> Iterator[nn.Parameter]:
        """What terms of the loss are made of."""
        regularised = [name for name in self.peft_config if hasattr(self.inventory.method_of(name), "loss_term")]
        for layer in self.inventory.layers.values():
            for name in regularised:
                if name in layer.adapters:
                    yield from layer.trainable(layer.adapters[name])
