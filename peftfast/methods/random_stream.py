"""Moving torch's CPU generator on, past numbers that nobody needs, without drawing them into a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

_WORDS = 624
# torch keeps: seed u64, left i32, seeded i32, next u64, 624 words as u64, and what is left over of normal draws
_LEFT, _NEXT, _STATE = slice(8, 12), slice(16, 24), slice(24, 24 + 8 * _WORDS)


def skip(count: int) -> None:
    """As if `count` fp32 numbers had been drawn with `uniform_` on the CPU."""
    if count <= 0:
        return
    state = torch.get_rng_state()
    raw = state.numpy()
    left, position = raw[_LEFT].view(np.int32), raw[_NEXT].view(np.uint64)
    words = raw[_STATE].view(np.uint64)
    twister = np.random.MT19937()
    twister.state = {
        "bit_generator": "MT19937",
        # left == 1: the words are used up and the next draw makes new ones
        "state": {"key": words.astype(np.uint32), "pos": _WORDS if left[0] == 1 else int(position[0])},
    }
    twister.random_raw(count, output=False)
    after = twister.state["state"]
    words[:] = after["key"]
    position[0], left[0] = after["pos"], _WORDS + 1 - after["pos"]
    torch.set_rng_state(state)


class NormalSlices:
    """The slices of `torch.randn(count, *shape, dtype=dtype)` on the CPU one after the other; torch's generator moves
    on as if all had been drawn at once. Large ones are made when they are taken."""

    SMALL = 1 << 20

    def __init__(self, count: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape, self.dtype = tuple(shape), dtype
        size = math.prod(shape)
        self.all: torch.Tensor | None = None
        self.state: torch.Tensor | None = None
        self.taken = 0
        if count * size <= self.SMALL or size % 16:  # numbers are drawn sixteen at a time
            self.all = torch.randn(count, *shape, dtype=dtype)
        else:
            self.state = torch.get_rng_state()
            skip(count * size * (2 if dtype == torch.float64 else 1))

    def take(self) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        """The next slice, and what makes it again."""
        if self.all is not None:
            i, self.taken = self.taken, self.taken + 1
            return self.all[i], partial(self.all.__getitem__, i)
        again = partial(self._made, self.state)
        made, generator = self._made(self.state), self._generator
        self.state = generator.get_state()
        return made, again

    def _made(self, state: torch.Tensor) -> torch.Tensor:
        self._generator = torch.Generator()
        self._generator.set_state(state)
        return torch.randn(self.shape, dtype=self.dtype, generator=self._generator)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_generator"}


def draws_of_uniform(count: int) -> int:
    """How many numbers `uniform_` draws for `count` elements of the default dtype."""
    return count * (2 if torch.get_default_dtype() == torch.float64 else 1)


def draws_of_normal(count: int) -> int:
    """How many numbers `normal_` draws for `count` fp32 elements, 16 or more: an incomplete last 16 is drawn again."""
    return count + (16 if count % 16 else 0)
