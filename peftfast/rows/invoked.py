"""Which tokens of a batch an adapter acts on, where those are the last of every sample: worked out once per call of a
model, read by every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: What transformers calls a cache among the inputs of models and layers; the second name since 5.24.
CACHE_NAMES = ("past_key_values", "cache")


def cache_in(inputs: Mapping[str, Any]) -> Any:
    """The cache among the inputs of a model, None if there is none."""
    return next((inputs[name] for name in CACHE_NAMES if name in inputs), None)


def last_occurrences(ids: Tensor, sequence: Sequence[int]) -> Tensor:
    """[B] int64: how many tokens of ids [B, T] there are from the start of the last occurrence of `sequence` on, 0
    where there is none. Nothing is copied to the device and nothing waits for it."""
    length = ids.shape[1]
    starts = length - len(sequence) + 1
    if starts < 1:
        return ids.new_zeros(ids.shape[0], dtype=torch.int64)
    found = ids[:, :starts] == sequence[0]
    for place, token in enumerate(sequence[1:], 1):
        found = found & (ids[:, place : place + starts] == token)
    # the tokens from each place on, of which the last place has the fewest
    counts = torch.arange(length, length - starts, -1, device=ids.device)
    fewest = torch.where(found, counts, length + 1).amin(1)
    return torch.where(fewest > length, 0, fewest)


class Invoked:
    """The tokens at the end of every sample that one adapter acts on, in one call of a model or in all calls of one
    `generate`.

    Attributes:
        counts: [B] int64, how many they are when a sample has `total` tokens, padding included; 0: none, and none of
            those that follow.
        total: tokens of a sample that `counts` is about, those in a cache included.
        fewest: the smallest of `counts`, None where the host does not know it.
        copies: how many neighbouring rows of an input may belong to one sample.
    """

    __slots__ = ("counts", "total", "fewest", "copies", "tokens", "_passed", "_gates")

    def __init__(
        self, counts: Tensor, total: int, tokens: int, fewest: int | None, copies: tuple[int, ...] = (1,)
    ) -> None:
        self.counts, self.total, self.fewest, self.copies = counts, total, fewest, copies
        self.tokens = tokens
        self._passed: int | Tensor = 0  # tokens since `total`
        self._gates: dict[Any, Tensor] = {}

    def step(self, inputs: Mapping[str, Any]) -> None:
        """A call of the model begins, with these arguments by name: a step of generating, or a part of the prompt."""
        given = next((v for v in (inputs.get("input_ids"), inputs.get("inputs_embeds")) if v is not None), None)
        if given is None:
            return
        self.tokens = given.shape[1]
        self._passed = _tokens_so_far(inputs, self.tokens) - self.total
        self._gates = {}

    def everywhere(self, tokens: int) -> bool:
        """Whether the host knows that it acts on all of the last `tokens` of every sample."""
        passed = self._passed
        return bool(self.fewest) and isinstance(passed, int) and self.fewest + passed >= tokens

    def tokens_of(self, shape: Sequence[int], where: str) -> tuple[int, int]:
        """The tokens of a sample, and the rows of one in the batch, for an input whose dimensions, without that of the
        features, are `shape`.

        Raises:
            ValueError: they are not those of this batch.
        """
        batch = self.counts.shape[0]
        rows, left = (shape[0] // batch, shape[0] % batch) if shape and batch else (0, 1)
        if not left and rows in self.copies:
            return (shape[1] if len(shape) > 1 else 1), rows
        if not left and len(shape) == 1:  # a batch that was flattened, the tokens of a sample together
            for copies in self.copies:
                if rows == copies * self.tokens:
                    return self.tokens, copies
        raise ValueError(
            f"alora_offsets are of {batch} samples, but the input of {where} has the dimensions {list(shape)} without "
            f"its features; they have to be [{batch}], [{batch}, tokens, ...] or [{batch} · {self.tokens}]"
        )

    def ends(self) -> Tensor:
        """[B]: how many tokens at the end of every sample it acts on in this call."""
        if isinstance(self._passed, int) and self._passed == 0:
            return self.counts
        return torch.where(self.counts > 0, self.counts + self._passed, 0)

    def gate(self, shape: Sequence[int], device: torch.device, where: str) -> Tensor:
        """[*shape, 1] bool: whether it acts on a token; see `tokens_of`."""

        def make() -> Tensor:
            tokens, rows = self.tokens_of(shape, where)
            return gate_of(self.ends(), tokens, rows, shape, device)

        return self.kept((tuple(shape), device), make)

    def kept(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """`make()`, once in this call."""
        if torch.compiler.is_compiling():  # which cannot look sizes up that it does not know
            return make()
        gate = self._gates.get(key)
        if gate is None:
            gate = self._gates[key] = make()
        return gate


def gate_of(ends: Tensor, tokens: int, rows: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """[*shape, 1] bool: the last `ends` [B] of the tokens of every sample, each of which is `rows` rows of an input."""
    acts = torch.arange(tokens, device=ends.device) >= tokens - ends.unsqueeze(1)
    if rows > 1:
        acts = acts.repeat_interleave(rows, 0)
    acts = acts.to(device)
    if len(shape) < 3:
        return acts.reshape(*shape, 1)
    return acts.reshape(*acts.shape, *(1,) * (len(shape) - 1)).expand(*shape, 1)


def _tokens_so_far(inputs: Mapping[str, Any], tokens: int) -> int | Tensor:
    """Tokens of a sample up to the end of this call, those in a cache included."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.shape[1]
    cache = cache_in(inputs)
    if cache is not None and hasattr(cache, "get_seq_length"):
        return cache.get_seq_length() + tokens  # of caches for compiled models a tensor, which nobody waits for
    return tokens
