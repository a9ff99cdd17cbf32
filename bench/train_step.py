"""A training step of a small Llama on CPU: peftfast beside PEFT and the frozen base, interleaved in one process.

    python bench/train_step.py [--hidden 256] [--tokens 256] [--dtype fp32 bf16 autocast] [--dropout 0.0]

Prints, for every row, the median times in milliseconds and the medians of the pairwise ratios. Losses are compared
first: a ratio is never reported for a step that computes something else. bf16: a bf16 base with fp32 factors, without
autocast; autocast: an fp32 base under bf16 autocast.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import warnings
from collections.abc import Callable

import torch
from measure import median_ratio, print_row, print_table_head, print_versions, turns
from torch import nn

from bench.contestants import llama
from bench.operands import Model


def small_llama(hidden: int, layers: int, dtype: torch.dtype) -> nn.Module:
    heads = max(hidden // 64, 1)
    shape = Model("small", hidden, 3 * hidden, heads, max(hidden // 128, 1), hidden // heads)
    return llama(shape, layers, dtype, "cpu", vocabulary=1024)


def twins(base: nn.Module, r: int, dropout: float) -> dict[str, nn.Module]:
    """The same model with the same adapter, once in each library."""
    import peft

    import peftfast

    options = {
        "r": r, "lora_alpha": 2 * r, "lora_dropout": dropout, "target_modules": "all-linear", "task_type": "CAUSAL_LM"
    }  # fmt: skip
    models = {
        "peft": peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)),
        "peftfast": peftfast.get_peft_model(copy.deepcopy(base), peftfast.LoraConfig(**options)),
    }
    theirs = dict(models["peft"].named_parameters())
    with torch.no_grad():
        for name, parameter in models["peftfast"].named_parameters():
            if "lora_" in name:
                theirs[name].normal_(std=0.02)
                parameter.copy_(theirs[name])
    return models


def random_ids(tokens: int) -> torch.Tensor:
    """Rows of at most 128 tokens."""
    return torch.randint(0, 1024, (max(tokens // 128, 1), min(tokens, 128)))


def make_step(model: nn.Module, ids: torch.Tensor, autocast: bool = False) -> Callable[[], float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def compare(steps: dict[str, Callable[[], float]], tolerance: float) -> None:
    """Ends the program where the losses of three steps differ."""
    for i in range(3):
        losses = {name: step() for name, step in steps.items()}
        if not abs(losses["peft"] - losses["peftfast"]) <= tolerance * abs(losses["peft"]):  # nor NaN
            sys.exit(f"losses differ at step {i}: {losses}; no timing is reported")


def frozen_step(base: nn.Module, ids: torch.Tensor, autocast: bool) -> Callable[[], float]:
    """The limit: the base alone with gradients for its activations, which any adapter needs."""

    def step() -> float:
        embeds = base.get_input_embeddings()(ids).detach().requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = base(inputs_embeds=embeds, labels=ids).loss
        loss.backward()
        return loss.item()

    return step


def measure(dtype: str, hidden: int, tokens: int, dropout: float, args: argparse.Namespace) -> list[float]:
    base = small_llama(hidden, args.layers, torch.bfloat16 if dtype == "bf16" else torch.float32)
    ids, autocast = random_ids(tokens), dtype == "autocast"
    models = twins(base, args.r, dropout)
    if dropout == 0.0:
        steps = {name: make_step(copy.deepcopy(model), ids, autocast) for name, model in models.items()}
        compare(steps, 1e-5 if dtype == "fp32" else 2e-2)
    steps = {name: make_step(model, ids, autocast) for name, model in models.items()}
    steps["frozen"] = frozen_step(base, ids, autocast)
    times = turns(steps, args.rounds, warmup=3)
    medians = [1e3 * statistics.median(times[n]) for n in ("peft", "peftfast", "frozen")]
    return [*medians, *(median_ratio(times["peftfast"], times[n]) for n in ("peft", "frozen"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="*", default=[128, 256, 512])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="*", default=[64, 512])
    parser.add_argument("--dtype", nargs="*", choices=["fp32", "bf16", "autocast"], default=["fp32"])
    parser.add_argument("--dropout", type=float, nargs="*", default=[0.0])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    print_versions(
        f"{args.threads} thread(s)", f"{args.rounds} rounds", f"r={args.r}", "all-linear", f"{args.layers} layers"
    )
    print_table_head(
        "precision", "hidden", "tokens", "dropout", "PEFT", "peftfast", "frozen base", "peftfast / PEFT",
        "peftfast / frozen",
    )  # fmt: skip
    for row in itertools.product(args.dtype, args.hidden, args.tokens, args.dropout):
        print_row(*map(str, row), *measure(*row, args))


if __name__ == "__main__":
    main()
