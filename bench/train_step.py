"""A training step of a small Llama on CPU: peftfast beside PEFT and the frozen base, interleaved in one process.

    python bench/train_step.py [--hidden 256] [--layers 4] [--tokens 256] [--dtype fp32|bf16|autocast] [--dropout 0.0]

Prints, for every row, the median time and the median of the pairwise ratios. Losses are compared first: a ratio is
never reported for a step that computes something else.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import gc
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn


def small_llama(hidden: int, layers: int, dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 1),
        num_key_value_heads=max(hidden // 128, 1),
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def twins(base: nn.Module, r: int, dropout: float, target: str | list[str]) -> dict[str, nn.Module]:
    """The same model with the same adapter, once in each library."""
    import peft

    import peftfast

    options = {"r": r, "lora_alpha": 2 * r, "lora_dropout": dropout, "target_modules": target, "task_type": "CAUSAL_LM"}
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


def make_step(model: nn.Module, ids: torch.Tensor, autocast: bool, lr: float) -> Callable[[], float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr) if trained else None

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        if optimizer is not None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return step


def frozen_step(base: nn.Module, ids: torch.Tensor, autocast: bool) -> Callable[[], float]:
    """The limit: the base alone with gradients for its activations, which any adapter needs."""
    base = copy.deepcopy(base).requires_grad_(False)

    def step() -> float:
        embeds = base.get_input_embeddings()(ids).detach().requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = base(inputs_embeds=embeds, labels=ids).loss
        loss.backward()
        return loss.item()

    return step


def interleaved(steps: dict[str, Callable[[], float]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of every round, the contestants taking turns, so that a slow moment of the machine hits all."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + warmup):
        names = list(steps) if i % 2 else list(reversed(steps))
        for name in names:
            start = time.perf_counter()
            steps[name]()
            if i >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def median_ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="*", default=[128, 256, 512])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="*", default=[64, 512])
    parser.add_argument("--dtype", nargs="*", choices=["fp32", "bf16", "autocast"], default=["fp32"])
    parser.add_argument("--dropout", type=float, nargs="*", default=[0.0])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path, help="append one line a row, with versions")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    import peft

    versions = f"torch {torch.__version__}, peft {peft.__version__}, python {platform.python_version()}"
    print(
        f"{versions}, {args.threads} thread(s), {args.rounds} interleaved rounds, r={args.r}, all-linear, "
        f"{args.layers} layers"
    )
    header = [
        "hidden",
        "tokens",
        "dtype",
        "dropout",
        "peft_ms",
        "peftfast_ms",
        "frozen_ms",
        "peftfast/peft",
        "peftfast/frozen",
    ]
    print("".join(f"{h:>16}" for h in header))
    rows = []
    for hidden in args.hidden:
        for tokens in args.tokens:
            for dtype in args.dtype:
                for dropout in args.dropout:
                    rows.append(measure(hidden, tokens, dtype, dropout, args))
                    print("".join(f"{v:>16.3f}" if isinstance(v, float) else f"{v:>16}" for v in rows[-1]), flush=True)
    if args.csv:
        new = not args.csv.exists()
        with args.csv.open("a", newline="") as f:
            writer = csv.writer(f)
            if new:
                writer.writerow([*header, "versions", "threads"])
            writer.writerows([*row, versions, args.threads] for row in rows)
    return 0


def measure(hidden: int, tokens: int, dtype: str, dropout: float, args: argparse.Namespace) -> list:
    torch.manual_seed(0)
    base = small_llama(hidden, args.layers, torch.bfloat16 if dtype == "bf16" else torch.float32)
    ids = torch.randint(0, 1024, (max(tokens // 128, 1), min(tokens, 128)))
    autocast = dtype == "autocast"
    models = twins(base, args.r, dropout, "all-linear")
    if dropout == 0.0:
        steps = {name: make_step(copy.deepcopy(model), ids, autocast, 1e-3) for name, model in models.items()}
        tolerance = 1e-5 if dtype == "fp32" else 2e-2
        for i in range(3):
            losses = {name: step() for name, step in steps.items()}
            if not abs(losses["peft"] - losses["peftfast"]) <= tolerance * abs(losses["peft"]):  # nor NaN
                sys.exit(f"losses differ at step {i}: {losses}; no timing is reported")
    steps = {name: make_step(model, ids, autocast, 1e-3) for name, model in models.items()}
    steps["frozen"] = frozen_step(base, ids, autocast)
    gc.collect()
    gc.disable()
    times = interleaved(steps, args.rounds)
    gc.enable()
    medians = [1e3 * statistics.median(times[n]) for n in ("peft", "peftfast", "frozen")]
    return [
        hidden, tokens, dtype, dropout, *medians,
        median_ratio(times["peftfast"], times["peft"]), median_ratio(times["peftfast"], times["frozen"]),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
