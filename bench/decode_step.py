"""A decoding step of a small Llama on CPU: peftfast beside PEFT and the frozen base, interleaved in one process.

    python bench/decode_step.py [--hidden 128 256 512] [--batch 1 16] [--context 64] [--tokens 8]

A call decodes --tokens tokens after a prefill that is not timed. The logits of the three are compared first: a ratio is
never reported for a step that computes something else.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable

import torch
from measure import median_ratio, print_row, print_table_head, print_versions, turns
from torch import nn
from train_step import small_llama, twins


def make_steps(model: nn.Module, ids: torch.Tensor, tokens: int) -> Callable[[], torch.Tensor]:
    """Greedy decoding of `tokens` tokens on a cache that is cut back to the prompt afterwards; the last logits."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        first = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def steps() -> torch.Tensor:
        token = first
        for _ in range(tokens):
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
        cache.crop(-tokens)  # the tokens decoded, not the prompt
        return logits

    return steps


def measure(hidden: int, batch: int, args: argparse.Namespace) -> list[float]:
    """What `figures` gives, of a token."""
    base = small_llama(hidden, args.layers, torch.float32).eval()
    ids = torch.randint(0, 1024, (batch, args.context))
    models = {name: model.eval() for name, model in twins(base, args.r, 0.0).items()} | {"frozen": base}
    steps = {name: make_steps(model, ids, args.tokens) for name, model in models.items()}
    logits = {name: step() for name, step in steps.items()}
    if not torch.allclose(logits["peft"], logits["peftfast"], rtol=1e-4, atol=1e-4):
        sys.exit(f"logits differ at hidden size {hidden}, batch {batch}; no timing is reported")
    return figures(turns(steps, args.rounds, warmup=3), args.tokens)


def figures(times: dict[str, list[float]], each: int = 1) -> list[float]:
    """Medians in ms of PEFT, peftfast and the base, of one part in `each`, and the medians of the pairwise ratios."""
    medians = [1e3 * statistics.median(times[n]) / each for n in ("peft", "peftfast", "frozen")]
    pairs = (("peftfast", "peft"), ("peftfast", "frozen"), ("peft", "frozen"))
    return [*medians, *(median_ratio(times[a], times[b]) for a, b in pairs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="*", default=[128, 256, 512])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print_versions(
        f"one thread, fp32; {args.rounds} turns of {args.tokens} tokens after {args.context}", f"r={args.r}",
        "all-linear", f"{args.layers} layers; ms per token",
    )  # fmt: skip
    print_table_head(
        "hidden", "batch", "PEFT", "peftfast", "frozen base", "peftfast / PEFT", "peftfast / frozen", "PEFT / frozen",
        text=0,
    )  # fmt: skip
    for hidden in args.hidden:
        for batch in args.batch:
            print_row(hidden, batch, *measure(hidden, batch, args))


if __name__ == "__main__":
    main()
