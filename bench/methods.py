"""Step time of every weight method, and of LoRA on an NF4 base, next to PEFT's and to LoRA's: a small Llama,
runs in a drawn order, medians.

python bench/methods.py [--hidden 256] [--layers 4] [--tokens 512] [--rounds 15] [--device cuda] [--dtype bf16]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from statistics import median

import peft
import torch
from measure import print_row, print_table_head, print_versions, turns

import peftfast
from bench.contestants import TARGETS, llama
from bench.operands import Model


def config(library, method: str):
    common = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    if method == "ia3":
        return library.IA3Config(**common, feedforward_modules=["down_proj"])
    if method == "adalora":
        return library.AdaLoraConfig(**common, init_r=16, target_r=8, total_step=10**6, tinit=10**5)
    return library.LoraConfig(**common, r=16, use_dora=method == "dora")


def make(library, method: str, options: argparse.Namespace):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    shape = Model("small", options.hidden, options.hidden * 11 // 4, 8, 4, options.hidden // 8)
    storage = "nf4" if method == "qlora" else "dense"  # quantised by one library for both
    base = llama(shape, options.layers, dtype, options.device, storage, use_cache=True)
    return library.get_peft_model(base, config(library, method)).train()


def make_step(method: str, library, options: argparse.Namespace, ids: torch.Tensor) -> Callable[[], None]:
    model, done = make(library, method, options), 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        nonlocal done
        done += 1
        with torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bf16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        if method == "adalora" and library is not peftfast:  # here it runs by itself
            model.base_model.update_and_allocate(done)
        optimizer.zero_grad()
        if options.device == "cuda":
            torch.cuda.synchronize()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("layers", 4), ("tokens", 512), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ids = torch.randint(0, 512, (4, options.tokens // 4), device=options.device)
    steps = {
        (method, name): make_step(method, library, options, ids)
        for method in ("lora", "qlora", "dora", "adalora", "ia3")
        for name, library in (("peftfast", peftfast), ("peft", peft))
    }
    seconds = {key: median(times) for key, times in turns(steps, options.rounds, warmup=2).items()}
    print_versions(*(f"{name}={value}" for name, value in vars(options).items()))
    print_table_head("method", "library", "ms a step", "of PEFT", "of LoRA", text=2)
    for (method, name), value in seconds.items():
        print_row(method, name, value * 1e3, value / seconds[method, "peft"], value / seconds["lora", name], digits=2)


if __name__ == "__main__":
    main()
