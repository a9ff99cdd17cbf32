"""One token of decoding as one recording: the model called with the last token, and the next one chosen."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import transformers
from packaging import version
from torch import Tensor, nn

from peftfast.layers.walk import base_of
from peftfast.method import method_for
from peftfast.prompts.prefix_cache import cache_name
from peftfast.training.capture.captured import Captured, check_count
from peftfast.training.capture.mix import check_routable, following
from peftfast.training.capture.recording import Recording
from peftfast.training.capture.sampling import draw

#: The first transformers whose StaticCache may keep keys and values in different dtypes.
_SPLIT = version.parse("5.24")


class CapturedToken(Captured):
    """All that a token reads and writes, in buffers.

    Attributes:
        cache: transformers' StaticCache, [batch_size, heads, max_length, head_dim] a layer.
        token: [B, 1] the last token. positions: [B, 1] its position. place: [1] where the cache keeps it.
        mask: [B, max_length] 0 for padding.
        index: [B] place of every sample's adapter among `names`; -1 for the base model.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_size: int,
        max_length: int,
        mixed: bool,
        autocast: torch.dtype | str | None,
        warmup: int,
        on_change: str,
    ) -> None:
        super().__init__(model, autocast, warmup, on_change, mixed)
        check_count("batch_size", batch_size)
        check_count("max_length", max_length)
        self.batch_size, self.max_length = batch_size, max_length
        if getattr(model, "_is_prompt_learning", False):
            raise ValueError("Prompts in front of the input are not captured: use model.generate")
        if mixed:
            check_routable(model, self.tuner, "mixed=True")
        self.base = base_of(model)
        autocast = self.autocast
        if autocast is not None and autocast != self.base.dtype and version.parse(transformers.__version__) < _SPLIT:
            # under autocast the rotary embedding widens keys, and values stay narrow
            raise ValueError(
                f"autocast={autocast} on a model in {self.base.dtype} needs transformers {_SPLIT}, whose StaticCache "
                f"keeps keys and values in their own dtypes; this is {transformers.__version__}. Load the model in "
                f"{autocast}, or decode without autocast"
            )
        self._cache_argument = cache_name(self.base)
        parameters = inspect.signature(self.base.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        # transformers below 5.4, whose static cache otherwise takes keys of zeros, as padding may have, for free places
        self._takes_places = "cache_position" in parameters
        self._start()
        if any(getattr(layer, "is_sliding", False) for layer in self.cache.layers):
            raise ValueError("Sliding-window caches count on the host, which a captured step does not do")
        with torch.inference_mode(False), self.device:
            self.token = torch.zeros((batch_size, 1), dtype=torch.int64)
            self.positions = torch.zeros_like(self.token)
            self.place = torch.zeros((1,), dtype=torch.int64)
            self.mask = torch.ones((batch_size, max_length), dtype=torch.int64)
            self.index = torch.full((batch_size,), -1, dtype=torch.int64)
            self.tokens = torch.zeros((batch_size, max_length), dtype=torch.int64)
            self.column = torch.zeros((1,), dtype=torch.int64)
            self.finished = torch.zeros((batch_size,), dtype=torch.bool)
            self.pad = torch.zeros((), dtype=torch.int64)
            self.temperature = torch.ones(())
            self.top_k = torch.zeros((), dtype=torch.int64)
            self.top_p = torch.ones(())
        self.ends: Tensor | None = None  # [E] tokens that end a sequence
        self.logits: Tensor | None = None  # [B, vocabulary] fp32, of the last position

    def _start(self) -> None:
        for name, cfg in (getattr(self.tuner, "peft_config", None) or {}).items():
            method = method_for(cfg)
            if hasattr(method, "note"):
                raise ValueError(
                    f"Adapter {name} ({type(method).__name__}) acts by what the whole prompt is, which a captured step "
                    "does not see: use model.generate, or delete it first"
                )
        self._recordings: dict[Any, Recording] = {}
        # anew as well, because the model's dtype may be another one
        self.cache = transformers.StaticCache(config=self.base.config, max_cache_len=self.max_length)
        self._pool = torch.cuda.graph_pool_handle() if self._graphs else None
        super()._start()

    @contextmanager
    def _settings(self) -> Iterator[None]:
        # not inference mode: what the library keeps is to serve later calls of any kind
        with torch.inference_mode(False), torch.no_grad(), self._autocast():
            yield

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, places: Tensor) -> None:
        arguments = {self._cache_argument: self.cache, "use_cache": True, **self._last_only}
        if self._takes_places:
            arguments["cache_position"] = places
        with following(self.tuner, self.index, ids.shape[1]) if self.mixed else nullcontext():
            output = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, **arguments)
        logits = output.logits[:, -1]
        if self.logits is None:
            self.logits = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        self.logits.copy_(logits)

    def _choose(self, sampled: bool, filtered: bool) -> None:
        """The next token from `logits`, into `token` and the next column of `tokens`."""
        limits = (self.top_k, self.top_p) if filtered else ()
        chosen = draw(self.logits, self.temperature, *limits) if sampled else self.logits.argmax(-1)
        chosen = torch.where(self.finished, self.pad, chosen)
        self.finished.logical_or_((chosen[:, None] == self.ends).any(-1))
        self.token.copy_(chosen[:, None])
        self.tokens.index_copy_(1, self.column, chosen[:, None])
        self.column.add_(1)

    def _advance(self, sampled: bool, filtered: bool) -> None:
        self._forward(self.token, self.mask, self.positions, self.place)
        self.positions.add_(1)
        if self._takes_places:
            self.place.add_(1)
        self._choose(sampled, filtered)

    def _recording(self, *mode: bool) -> Recording:
        recording = self._recordings.get(mode)
        if recording is None:
            recording = Recording(lambda: self._advance(*mode), self.model, self.device, self.warmup, self._pool)
            self._recordings[mode] = recording
        return recording
