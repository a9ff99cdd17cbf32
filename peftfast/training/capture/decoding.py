"""Generating with one replay a token: prompts are read without a graph, all that follows is one recording."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peftfast.many.router import Choice
from peftfast.training.capture.mix import chosen_adapters
from peftfast.training.capture.next_token import CapturedToken
from peftfast.training.capture.sampling import check_sampling

#: How many tokens are made before the host looks whether all sequences have ended.
LOOK_EVERY = 16


class CapturedDecoding(CapturedToken):
    """See `capture_decoding`."""

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        adapter_names: Choice | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
    ) -> Tensor:
        """Prompts continued, as `model.generate` would continue them without logits processors.

        Args:
            input_ids: [B, T] prompts, padded on the left.
            max_new_tokens: T and this must fit `max_length`.
            attention_mask: [B, T] 0 for padding; None: no padding.
            adapter_names: with `mixed=True`, an adapter for every sample: its name or "__base__", or its number or -1
                in a tensor; None: the router's choice, or the active adapter.
            do_sample: draw instead of taking the likeliest token; `temperature`, `top_k` (0: all), `top_p` apply then.
            eos_token_id, pad_token_id: None: what the model's generation config says. Without an end all
                `max_new_tokens` are made.

        Returns:
            [B, T + n] int64, prompts included; what has ended is continued by `pad_token_id`.

        Raises:
            ValueError: another batch size, too long, an adapter that is not there, names without `mixed=True`.
            RuntimeError: the model is not what was captured, and `on_change` is "error".
        """
        self._check_prompts(input_ids, attention_mask, max_new_tokens)
        if do_sample:
            check_sampling(temperature, top_k, top_p)
        self._follow()
        if self.mixed:
            self.index.copy_(chosen_adapters(self.tuner, input_ids, attention_mask, adapter_names, self.device))
        elif adapter_names is not None or getattr(self.tuner, "router", None) is not None:
            what = "A router" if adapter_names is None else "adapter_names="
            raise ValueError(f"{what} needs decoding that was captured with mixed=True")
        with torch.inference_mode(False), torch.no_grad():
            ids, length = input_ids.to(self.device), input_ids.shape[1]
            self._reset(attention_mask, eos_token_id, pad_token_id)
            self.temperature.fill_(temperature)
            self.top_k.fill_(top_k)
            self.top_p.fill_(top_p)
            mode = (do_sample, do_sample and (top_k > 0 or top_p < 1.0))
            positions = (self.mask[:, :length].cumsum(-1) - 1).clamp(min=0)
            with self._settings():
                self._forward(ids, self.mask[:, :length], positions, torch.arange(length, device=self.device))
            self.positions.copy_(positions[:, -1:] + 1)
            self.place.fill_(length)
            self._choose(*mode)
            step = self._recording(*mode)
            with self._settings():
                for made in range(1, max_new_tokens):
                    if made % LOOK_EVERY == 0 and self.ends.numel() and bool(self.finished.all()):
                        break
                    step()
            return torch.cat([ids, self._made(int(self.column))], dim=1)

    def _check_prompts(self, ids: Tensor, mask: Tensor | None, new: int) -> None:
        if ids.dim() != 2 or ids.shape[0] != self.batch_size:
            raise ValueError(f"input_ids is {list(ids.shape)}, but decoding was captured for [{self.batch_size}, T]")
        if new < 1 or ids.shape[1] + new > self.max_length:
            raise ValueError(
                f"{ids.shape[1]} tokens and {new} new ones, but decoding was captured for at least one new and at most "
                f"{self.max_length} altogether"
            )
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(f"attention_mask is {list(mask.shape)}, input_ids {list(ids.shape)}")

    def _reset(self, mask: Tensor | None, end: int | Sequence[int] | None, pad: int | None) -> None:
        settings = getattr(self.base, "generation_config", None) or self.base.config
        end = getattr(settings, "eos_token_id", None) if end is None else end
        pad = getattr(settings, "pad_token_id", None) if pad is None else pad
        ends = [] if end is None else [end] if isinstance(end, int) else list(end)
        if self.ends is None or self.ends.shape[0] != len(ends):
            self.ends = torch.empty((len(ends),), dtype=torch.int64, device=self.device)
            self._recordings = {}
        self.ends.copy_(torch.tensor(ends, dtype=torch.int64))
        self.pad.fill_(pad if pad is not None else ends[0] if ends else 0)
        self.cache.reset()
        self.mask.fill_(1)
        if mask is not None:
            self.mask[:, : mask.shape[1]].copy_(mask)
        self.finished.zero_()
        self.column.zero_()

    def _made(self, count: int) -> Tensor:
        """The new tokens up to where the last sequence ended."""
        tokens = self.tokens[:, :count]
        ended = torch.isin(tokens, self.ends)
        if self.ends.numel() and bool(ended.any(-1).all()):
            count = int(ended.int().argmax(-1).max()) + 1
        return tokens[:, :count].clone()


def capture_decoding(
    model: nn.Module,
    batch_size: int,
    max_length: int,
    *,
    mixed: bool = False,
    autocast: torch.dtype | str | None = None,
    warmup: int = 3,
    on_change: str = "recapture",
) -> CapturedDecoding:
    """Decoding with one CUDA graph a token: `tokens = decode.generate(input_ids, max_new_tokens)`. Prompts are read
    without a graph; the first `warmup` tokens are ordinary steps, the next one is recorded.

    Args:
        model: a causal language model of transformers, with or without adapters; put it into eval mode.
        batch_size: of every call.
        max_length: largest number of tokens of a sequence, prompt included; decides the size of the cache.
        mixed: choose adapters for every sample (`adapter_names=`). One recording then serves every mix and every
            active adapter, as long as no adapter is added, deleted, merged or trained. False: the active adapters,
            faster by the choosing; switching them is a new capture.
        autocast: dtype of autocast; None: none, whatever the surroundings say.
        warmup: tokens that are made before recording.
        on_change: what to do when the model is no longer what was captured: "recapture", with a warm-up, or "error".

    Raises:
        TypeError, ValueError: an argument that is not what it says here, several devices, a sliding-window cache,
            `mixed` for a model without adapters in its layers.
    """
    return CapturedDecoding(model, batch_size, max_length, mixed, autocast, warmup, on_change)
