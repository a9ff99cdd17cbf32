"""Time of holding many adapters on one base: switching, loading, mixing; PEFT beside it.

    python bench/adapters.py [--adapters 100] [--layers 32] [--hidden 32]

Prints one line per figure: what, peftfast, PEFT. Each library runs in a process of its own. Figures are medians of CPU
time, so that other processes on the machine do not count; the mixed batch runs at a hidden size of --mix-hidden, where
a base product is worth something.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch


def median(call: Callable[[], Any], runs: int) -> float:
    """Milliseconds of CPU time."""
    call()
    times = []
    for _ in range(runs):
        start = time.process_time_ns()
        call()
        times.append((time.process_time_ns() - start) / 1e6)
    return statistics.median(times)


def alternating(calls: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Medians of several calls that take turns, so that a slow phase of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(runs + 1):
        for name, call in calls.items():
            start = time.process_time_ns()
            call()
            if i:
                times[name].append((time.process_time_ns() - start) / 1e6)
    return {name: statistics.median(t) for name, t in times.items()}


def llama(layers: int, hidden: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def measure(library: str, args: argparse.Namespace) -> dict[str, float]:
    lib = importlib.import_module(library)
    config = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False}
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = lib.get_peft_model(llama(args.layers, args.hidden), lib.LoraConfig(**config), "first")
        model.save_pretrained(folder)
        figures["adapted layers"] = sum(hasattr(m, "lora_A") for m in model.modules())
        loading = []

        def load(name: str) -> None:
            start = time.process_time_ns()
            model.load_adapter(f"{folder}/first", adapter_name=name)
            loading.append((time.process_time_ns() - start) / 1e6)

        load("warm-up")
        model.delete_adapter("warm-up")
        loading.clear()
        load("n0")

        def switch() -> None:
            model.set_adapter("first")
            model.set_adapter("n0")

        figures["set_adapter, 2 present"] = median(switch, args.runs) / 2
        for i in range(1, args.adapters - 1):
            load(f"n{i}")
        figures["set_adapter, all present"] = median(switch, args.runs) / 2
        figures["load_adapter, first three"] = statistics.median(loading[:3])
        figures["load_adapter, last three"] = statistics.median(loading[-3:])
    base = llama(2, args.mix_hidden)
    model = lib.get_peft_model(llama(2, args.mix_hidden), lib.LoraConfig(**config), "n0")
    for i in range(1, 16):
        model.add_adapter(f"n{i}", lib.LoraConfig(**config))
    model.eval()
    names = [f"n{i}" for i in range(16)]
    with torch.no_grad():
        for tokens in args.mix_tokens:
            ids = torch.randint(0, 256, (16, tokens))
            calls = {"base": lambda ids=ids: base(ids), "mixed": lambda ids=ids: model(ids, adapter_names=names)}
            if library == "peftfast":
                numbers = model.base_model.adapter_numbers(names)
                calls["numbers"] = lambda ids=ids, numbers=numbers: model(ids, adapter_names=numbers)
            times = alternating(calls, args.runs)
            for kind in [k for k in times if k != "base"]:
                what = f"{kind} batch, 16 adapters, 16 x {tokens} tokens, times the base alone"
                figures[what] = times[kind] / times["base"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--mix-hidden", type=int, default=512)
    parser.add_argument("--mix-tokens", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--library", choices=("peftfast", "peft"), help="measure this one alone and print JSON")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.library:
        print(json.dumps(measure(args.library, args)))
        return
    results = {}
    for library in ("peftfast", "peft"):
        output = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--library", library], check=True, stdout=-1)
        results[library] = json.loads(output.stdout.decode().splitlines()[-1])
    print(f"{'':70} {'peftfast':>10} {'PEFT':>10}")
    for what, ours in results["peftfast"].items():
        theirs = results["peft"].get(what)
        print(f"{what:70} {ours:10.3f} {'' if theirs is None else f'{theirs:10.3f}'}")


if __name__ == "__main__":
    main()
