"""aLoRA: a LoRA that acts on the tokens from the start of the last occurrence of its invocation sequence on, so that
what comes before is the base model's, its keys and values included (Greenewald et al., arXiv 2504.12397).

The product with the down factor, [tokens, r], is what is set to zero before the invocation. Where the host knows that
all tokens of a call come after it, as in the steps of generating, a layer does what it does for a LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.config import PeftConfig
from peftfast.errors import PeftWarning, warn
from peftfast.method import Call, register_method
from peftfast.methods.combination import Combination
from peftfast.methods.lora.config import LoraConfig
from peftfast.methods.lora.lora import Lora, factors
from peftfast.ops.function import transformed
from peftfast.rows.invoked import Invoked, gate_of, last_occurrences
from peftfast.rows.routing import BASE, Rows, batch_of
from peftfast.sites import Dense, Site
from peftfast.sites.bound import BoundLora
from peftfast.sites.site import is_plain

_UNKNOWN_IN_FORWARD = (
    "Cannot calculate aLoRA offsets when only inputs_embeds are provided. Disabling aLoRA for this forward pass."
)
_UNKNOWN_IN_GENERATE = "Cannot calculate aLoRA offsets during generate as input_ids are not available. Disabling aLoRA."


@register_method
class Alora(Lora):
    """Where the invocation does not occur, and where it cannot be known, an adapter does nothing, and its gradients are
    zeros."""

    variant: ClassVar[str | None] = "alora_invocation_tokens"
    as_product = None  # type: ignore[assignment]  # what it adds depends on the token

    def settings(self, site: Site, cfg: LoraConfig, key: str) -> Mapping[str, Any]:
        if not site.gates:
            raise ValueError(
                f"alora_invocation_tokens: {key} is a {type(site.module).__name__}, whose input has no known dimension "
                "of tokens; aLoRA adapts linear layers and embeddings. Leave it out of target_modules"
            )
        return super().settings(site, cfg, key)

    def note(self, name: str, cfg: LoraConfig, call: Call) -> Invoked | None:
        """See `Noting`: which tokens the adapter acts on; None: none.

        Raises:
            ValueError, TypeError: `alora_offsets` that are not one number for every sample, or called otherwise, which
                most models would take and not use; beam search.
        """
        inputs = call.inputs
        for other in inputs:
            if other.startswith("alora_") and other != "alora_offsets":
                raise TypeError(f"A call of the model takes no {other}, got {inputs[other]!r}; it takes alora_offsets")
        given, ids = inputs.get("alora_offsets"), inputs.get("input_ids")
        if ids is None and call.generates:
            ids = inputs.get("inputs")
        if given is None:
            if getattr(getattr(call.model, "config", None), "is_encoder_decoder", False):
                return None
            if not isinstance(ids, Tensor) or ids.is_floating_point():
                if inputs.get("inputs_embeds") is not None:
                    warn(_UNKNOWN_IN_GENERATE if call.generates else _UNKNOWN_IN_FORWARD)
                return None
            ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
        _check_beams(call)
        batch = ids if isinstance(ids, Tensor) else batch_of((), inputs)
        if given is None:
            counts, fewest = last_occurrences(ids, cfg.alora_invocation_tokens), None
        else:
            counts, fewest = _counts(given, batch)
        if fewest is None and is_plain(counts) and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            # a GPU is waited for once per `generate`, never for a single call
            if (counts.is_cpu or call.generates) and counts.numel() and not transformed():
                fewest = int(counts.min())
        tokens = batch.shape[1] if batch is not None and batch.dim() > 1 else 1
        mask = inputs.get("attention_mask")
        total = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else tokens
        return Invoked(counts, total, tokens, fewest, call.copies)

    def forward(self, site: Site, x: Tensor, y: Tensor | None, active: Sequence[Adapter]) -> Tensor:
        gates = [_gate(adapter, site, x) for adapter in active]
        if all(gate is None for gate in gates):
            return super().forward(site, x, y, active)
        if not torch.is_grad_enabled() and all(adapter.noted is None for adapter in active):
            return site.base(x) if y is None else y
        sites = [adapter.through(site) for adapter in active]
        if len(active) == 1:
            (adapter,) = active
            y = sites[0].adapt(x, y, *factors(adapter), adapter.scale, adapter.dropout, gates[0])
        else:
            y = self.one_by_one(site, sites, x, y, active, gates)
        return y

    def bind(self, site: Site, active: Sequence[Adapter]) -> BoundLora | None:
        """See `Bindable`: for calls all of whose tokens come after the invocation."""
        if len(active) != 1 or active[0].cfg.lora_bias or len(active[0].slots) != 2:
            return None
        return site.bind(active[0], when=partial(_acts_everywhere, active[0]))

    def routed(self, site: Site, x: Tensor, y: Tensor | None, adapters: Sequence[Adapter], rows: Rows) -> Tensor:
        shape = _shape(site, x)
        notes = [adapter.noted for adapter in adapters]
        known = [note for note in notes if note is not None]
        if not known:
            return site.base(x) if y is None else y
        tokens, _ = known[0].tokens_of(shape, adapters[0].key)
        if len(known) == len(notes) and all(note.everywhere(tokens) for note in notes):
            return super().routed(site, x, y, adapters, rows)

        def make() -> Tensor:
            return _mixed_gate(notes, rows, tokens, shape, x.device)

        gate = known[0].kept(("mixed", tuple(a.name for a in adapters), rows, shape, x.device), make)
        return super().routed(site, x, y, adapters, rows, gate)

    def describe(self, cfg: LoraConfig, key: str, tensors: Mapping[str, Tensor]) -> str:
        return f"{super().describe(cfg, key, tensors)}, from the tokens {list(cfg.alora_invocation_tokens)} on"

    def for_slot(
        self, site: Site, cfg: LoraConfig, key: str, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, float]:
        raise ValueError(f"a slot holds a LoRA that acts on all tokens, this is an aLoRA ({key})")

    def combined_fields(self, adapters: Sequence[Sequence[Adapter]], how: Combination) -> Mapping[str, Any]:
        sequences = {layers[0].name: list(layers[0].cfg.alora_invocation_tokens) for layers in adapters if layers}
        if len(set(map(tuple, sequences.values()))) > 1:
            raise ValueError(
                f"aLoRAs with different alora_invocation_tokens have no weighted combination: {sequences}. Activate "
                "them at once, model.base_model.set_adapter([...]): each acts from its own sequence on"
            )
        return super().combined_fields(adapters, how)

    def merged(self, site: Site, dense: Dense, adapter: Adapter, base: Dense) -> Dense:
        raise NotImplementedError(
            f"aLoRA does not support merging: {adapter.name} acts on tokens from its invocation on, the weight on all"
        )


def _shape(site: Site, x: Tensor) -> tuple[int, ...]:
    """The input's dimensions without that of the features."""
    return tuple(x.shape if site.looks_up else x.shape[:-1])


def _acts_everywhere(adapter: Adapter, x: Tensor) -> bool:
    noted = adapter.noted
    return noted is not None and bool(noted.fewest) and noted.everywhere(noted.tokens_of(x.shape[:-1], adapter.key)[0])


def _gate(adapter: Adapter, site: Site, x: Tensor) -> Tensor | None:
    """[..., 1] bool: on which tokens of the input the adapter acts; None: on all of them."""
    shape, noted = _shape(site, x), adapter.noted
    if noted is None:
        return torch.zeros((), dtype=torch.bool, device=x.device).expand(*shape, 1)
    tokens, _ = noted.tokens_of(shape, adapter.key)
    return None if noted.everywhere(tokens) else noted.gate(shape, x.device, adapter.key)


def _mixed_gate(
    notes: Sequence[Invoked | None], rows: Rows, tokens: int, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """[*shape, 1] bool, where every sample has the adapter that `rows` says."""
    samples = rows.index if len(shape) > 1 else rows.index[::tokens]
    known = next(note for note in notes if note is not None)
    ends = torch.stack([torch.zeros_like(known.counts) if note is None else note.ends() for note in notes])
    ends = ends.to(device).repeat_interleave(samples.shape[0] // ends.shape[1], 1)
    own = ends.gather(0, samples.clamp(0, len(notes) - 1).unsqueeze(0)).squeeze(0)
    own = torch.where(samples < len(notes), own, tokens)  # what no adapter has as its number is to show everywhere
    return gate_of(own, tokens, 1, shape, device)


def _check_beams(call: Call) -> None:
    beams = call.inputs.get("num_beams")
    if beams is None and call.generates:
        configs = [v for v in call.inputs.values() if hasattr(v, "num_beams")]
        configs += [getattr(call.model, "generation_config", None)]
        beams = next((c.num_beams for c in configs if getattr(c, "num_beams", None) is not None), None)
    if isinstance(beams, int) and beams > 1:
        raise ValueError(f"Beam search not yet supported for aLoRA. Got num_beams={beams}")


def _counts(given: Any, batch: Tensor | None) -> tuple[Tensor, int | None]:
    """`alora_offsets` as a tensor, and the smallest of them where the host knows it."""
    if isinstance(given, Tensor):
        if given.dim() != 1 or given.is_floating_point() or given.dtype == torch.bool:
            raise TypeError(
                f"alora_offsets as a tensor are whole numbers [B], one for each sample; got {given.dtype} "
                f"{list(given.shape)}"
            )
        counts, fewest = given.clamp(min=0).long(), None
    else:
        wrong = isinstance(given, str) or not isinstance(given, Sequence)
        if wrong or not all(n is None or (isinstance(n, int) and not isinstance(n, bool)) for n in given):
            raise TypeError(
                "alora_offsets are a list of one number of tokens for each sample, None for those without an "
                f"invocation; got {given!r}"
            )
        values = [max(n or 0, 0) for n in given]
        device = "cpu" if batch is None else batch.device
        counts, fewest = torch.tensor(values, dtype=torch.int64, device=device), min(values, default=0)
    if batch is not None and counts.shape[0] != batch.shape[0]:
        raise ValueError(
            f"Length of `alora_offsets` should be the same as the number of inputs, but got {counts.shape[0]} and "
            f"{batch.shape[0]} respectively."
        )
    return counts, fewest


# -- PEFT's functions, by its names -----------------------------------------------------------------------------------


def calculate_alora_offsets(
    peft_config: Mapping[str, PeftConfig],
    active_adapter: str,
    input_ids: Tensor | None,
    adapter_names: Sequence[str] | None = None,
) -> list[int | None]:
    """How many tokens of every sample there are from the start of the last occurrence of its adapter's invocation
    sequence on, in whole numbers: the host waits for a GPU. A model's own forward does without.

    Args:
        peft_config: the configs by adapter.
        input_ids: [B, T].
        adapter_names: one for every sample; None: `active_adapter` for all.

    Returns:
        One entry a sample; None where there is no such sequence, or an adapter without one.
    """
    if input_ids is None:
        return []
    names = [active_adapter] * input_ids.shape[0] if not adapter_names else list(adapter_names)
    offsets: list[int | None] = [None] * input_ids.shape[0]
    for name in dict.fromkeys(names):
        if name != BASE and name not in peft_config:
            warn(f"Adapter '{name}' not found in peft_config. Using base model for its rows.", PeftWarning)
        sequence = getattr(peft_config.get(name), "alora_invocation_tokens", None)
        if sequence:
            found = last_occurrences(input_ids, sequence).tolist()
            offsets = [n or None if own == name else o for own, n, o in zip(names, found, offsets, strict=False)]
    return offsets


def is_alora_relevant_in_batch(model: nn.Module, adapter_names: Sequence[str] | None = None) -> bool:
    """Whether the active adapter of a PeftModel, or one of `adapter_names`, is an aLoRA."""
    configs = [model.active_peft_config, *(model.peft_config.get(name) for name in adapter_names or ())]
    return any(getattr(cfg, "alora_invocation_tokens", None) for cfg in configs)


def get_alora_offsets_for_forward(
    model: nn.Module, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
) -> dict[str, Any]:
    """`kwargs` with `alora_offsets` for these inputs of a PeftModel, if one of its aLoRAs is concerned. Models do this
    themselves when they are called without."""
    only_embeds = input_ids is None and inputs_embeds is not None
    return _with_offsets(model, input_ids, kwargs, _UNKNOWN_IN_FORWARD if only_embeds else None)


def get_alora_offsets_for_generate(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The same for arguments of `generate`."""
    ids = kwargs.get("input_ids")
    if ids is None and args and isinstance(args[0], Tensor):
        ids = args[0]
    if ids is not None and ids.dim() == 1:
        ids = ids.unsqueeze(0)
    return _with_offsets(model, ids, kwargs, _UNKNOWN_IN_GENERATE)


def _with_offsets(model: nn.Module, ids: Tensor | None, kwargs: dict[str, Any], unknown: str | None) -> dict[str, Any]:
    names = kwargs.get("adapter_names")
    if not is_alora_relevant_in_batch(model, names) or kwargs.get("alora_offsets") is not None:
        return kwargs
    if ids is None and unknown is not None:
        warn(unknown)
    offsets = None if ids is None else calculate_alora_offsets(model.peft_config, model.active_adapter, ids, names)
    return {**kwargs, "alora_offsets": offsets}
