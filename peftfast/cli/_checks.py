"""What is shown of the result: a sample without and with the adapter, and the logits and limits of the comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

SAMPLE_TOKENS = 80


@torch.no_grad()
def sample(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], seed: int, device: str
) -> str:
    """A continuation of `prompt`; the same seed for every call, so that samples differ by the model alone."""
    model.eval()
    ids = torch.tensor([list(prompt)], device=device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=True,
            temperature=0.7,
            top_k=20,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[tokens that are not padding, vocabulary], fp32, on the CPU."""
    model.eval()
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    # Virtual tokens of a prompt method come first and have no counterpart in the batch.
    out = out[:, -batch["input_ids"].shape[1] :]
    return out[batch["attention_mask"].bool()].float().cpu()


def tolerance(reference: torch.Tensor, dtype: torch.dtype, sites: int) -> float:
    """How far merged logits may be from unmerged ones: merging rounds the weight of every site once, errors that do not
    know of each other and add up like a random walk, in units of the largest logit."""
    return 4 * math.sqrt(max(1, sites)) * torch.finfo(dtype).eps * float(reference.abs().max())


def ascii_safe(text: str) -> str:
    """Text that any terminal can show: line ends and tabs stay, the rest of what is not plain ASCII is escaped."""
    plain = "".join(c if c in "\n\t" or c.isprintable() else repr(c)[1:-1] for c in text)
    return plain.encode("ascii", "backslashreplace").decode("ascii")


def quoted(text: str) -> str:
    return "\n".join(f"    | {line}" for line in ascii_safe(text).expandtabs(4).split("\n"))
