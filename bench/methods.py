"""Step time of every weight method, and of LoRA on an NF4 base, next to PEFT's and to LoRA's: a small Llama,
runs in a drawn order, medians.

python bench/methods.py [--hidden 256] [--layers 4] [--tokens 512] [--rounds 15] [--device cuda] [--dtype bf16]
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

import torch  # noqa: E402

import peftfast  # noqa: E402

warnings.simplefilter("ignore")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(library, method: str):
    common = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    if method == "ia3":
        return library.IA3Config(**common, feedforward_modules=["down_proj"])
    if method == "adalora":
        return library.AdaLoraConfig(**common, init_r=16, target_r=8, total_step=10**6, tinit=10**5)
    return library.LoraConfig(**common, r=16, use_dora=method == "dora")


def make(library, method: str, options: argparse.Namespace):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=options.hidden, intermediate_size=options.hidden * 11 // 4,
            num_hidden_layers=options.layers, num_attention_heads=8, num_key_value_heads=4,
        )
    )  # fmt: skip
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    base = base.to(options.device, dtype)
    if method == "qlora":  # quantised by one library for both
        peftfast.quantize_model(base, "nf4", compute_dtype=dtype, double_quant=True, skip=["lm_head"])
    return library.get_peft_model(base, config(library, method)).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("layers", 4), ("tokens", 512), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    options = parser.parse_args()
    libraries = {"peftfast": peftfast}
    try:
        import peft

        libraries["peft"] = peft
    except ImportError:
        pass
    runs = {}
    for method in ("lora", "qlora", "dora", "adalora", "ia3"):
        for name, library in libraries.items():
            model = make(library, method, options)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
            runs[method, name] = (model, optimizer, [])
    ids = torch.randint(0, 512, (4, options.tokens // 4), device=options.device)
    turns, order = list(runs.items()), random.Random(0)
    for number in range(options.rounds + 2):
        order.shuffle(turns)  # or one always finds the caches as a certain other one left them
        for (method, name), (model, optimizer, times) in turns:
            if options.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bf16"):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            if method == "adalora" and name == "peft":  # here it runs by itself
                model.base_model.update_and_allocate(number + 1)
            optimizer.zero_grad()
            if options.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    seconds = {key: median(times[2:]) for key, (_, _, times) in runs.items()}
    print(f"{'method':10}{'library':10}{'ms/step':>10}{'of PEFT':>10}{'of LoRA':>10}")
    for (method, name), value in seconds.items():
        peer = seconds.get((method, "peft"), float("nan"))
        print(f"{method:10}{name:10}{value * 1e3:10.2f}{value / peer:10.2f}{value / seconds['lora', name]:10.2f}")


if __name__ == "__main__":
    main()
