"""LoRA on the fused experts of a small Qwen3-MoE on CPU: peftfast beside PEFT and the frozen base, interleaved.

    python bench/experts.py [--experts 64] [--hidden 256] [--inner 128] [--implementation grouped_mm eager]
    python bench/experts.py --rows 16      # of one batch, over 1, 4 and 16 adapters

Decoding of one token after a prefill that is not timed, and forward and backward of 512 tokens. Logits, and gradients
of all factors, are compared first: a ratio is never reported for something else. Beside the times: bytes that
operations write and bytes that are kept for the backward pass, which do not depend on the machine.

With --rows the rows of a batch take turns among the adapters. PEFT refuses such a batch for Parameters, so it gets the
rows of one adapter after those of another, `set_adapter` included.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping

import peft
import torch
from decode_step import figures, make_steps
from measure import median_ratio, print_row, print_table_head, print_versions, turns
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftfast

LIBRARIES = {"peft": peft, "peftfast": peftfast}


def small_qwen3_moe(args: argparse.Namespace, implementation: str) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=args.hidden, moe_intermediate_size=args.inner, num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64, num_key_value_heads=1, head_dim=64, num_experts=args.experts,
        num_experts_per_tok=args.active, initializer_range=0.05,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).to(getattr(torch, args.dtype)).requires_grad_(False).eval()
    model.set_experts_implementation(implementation)
    return model


def with_adapters(library: object, args: argparse.Namespace, implementation: str, count: int = 1) -> nn.Module:
    """A model with adapters "0", "1", ..., the same in both libraries."""
    options = {
        "r": args.r, "lora_alpha": 2 * args.r, "target_modules": [],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }  # fmt: skip
    model = library.get_peft_model(small_qwen3_moe(args, implementation), library.LoraConfig(**options), "0")
    for i in range(1, count):
        model.add_adapter(str(i), library.LoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def contestants(args: argparse.Namespace, implementation: str) -> dict[str, nn.Module]:
    models = {name: with_adapters(library, args, implementation) for name, library in LIBRARIES.items()}
    return models | {"frozen": small_qwen3_moe(args, implementation)}


class BytesWritten(TorchDispatchMode):
    """Sums what the operations under it write to new memory."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in read:
                self.total += t.nbytes
        return out


def bytes_written(call: Callable[[], object]) -> float:
    with BytesWritten() as mode:
        call()
    return mode.total / 2**20


def bytes_saved(model: nn.Module, ids: torch.Tensor) -> float:
    """MiB that autograd keeps, Parameters left out, every storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = forward(model, ids)
    found = sum(s.nbytes() for s in kept.values()) / 2**20
    del loss
    return found


def forward(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    embeds = base.get_input_embeddings()(ids).detach().requires_grad_(True)
    return model(inputs_embeds=embeds, labels=ids).loss


def training(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        forward(model, ids).backward()

    return step


def compare(logits: Mapping[str, torch.Tensor], models: Mapping[str, nn.Module], tolerance: float) -> None:
    if not torch.allclose(logits["peft"], logits["peftfast"], rtol=tolerance, atol=tolerance):
        sys.exit("logits differ; no timing is reported")
    theirs = {n: p.grad for n, p in models["peft"].named_parameters() if p.grad is not None}
    ours = {n: p.grad for n, p in models["peftfast"].named_parameters() if p.grad is not None}
    if not theirs or set(ours) != set(theirs):
        sys.exit("other gradients; no timing is reported")
    for name, grad in theirs.items():
        if not (ours[name] - grad).abs().max() <= 20 * tolerance * grad.abs().max():  # nor NaN
            sys.exit(f"gradients of {name} differ; no timing is reported")


def mixed(args: argparse.Namespace) -> None:
    """One adapter a row: the base alone, all rows at once, and one adapter after another."""
    most = max(args.adapters)
    frozen = small_qwen3_moe(args, "grouped_mm")
    ours, theirs = (with_adapters(library, args, "grouped_mm", most) for library in (peftfast, peft))
    for model in (ours, theirs):
        model.base_model.set_adapter([str(i) for i in range(most)])  # all of them train

    def steps_of(ids: torch.Tensor, count: int, train: bool) -> dict[str, Callable[[], torch.Tensor]]:
        names = [str(i % count) for i in range(args.rows)]

        def run(model: nn.Module, ids: torch.Tensor, **more: object) -> torch.Tensor:
            embeds = frozen.get_input_embeddings()(ids).detach().requires_grad_(train)
            logits = model(inputs_embeds=embeds, use_cache=False, **more).logits
            if train:
                logits.pow(2).mean().backward()
            return logits.detach()

        def in_turns() -> torch.Tensor:
            out = None
            for name in dict.fromkeys(names):
                own = torch.tensor([i for i, n in enumerate(names) if n == name])
                theirs.base_model.set_adapter(name)
                logits = run(theirs, ids[own])
                out = logits.new_empty(args.rows, *logits.shape[1:]) if out is None else out
                out[own] = logits
            return out

        def graded(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
            def step() -> torch.Tensor:
                for model in (ours, theirs):
                    for parameter in model.parameters():
                        parameter.grad = None
                with torch.set_grad_enabled(train):
                    return call()

            return step

        calls = {
            "frozen": lambda: run(frozen, ids),
            "peftfast": lambda: run(ours, ids, adapter_names=names),
            "peft": in_turns,
        }
        return {name: graded(call) for name, call in calls.items()}

    print_table_head(
        "what", "tokens a row", "adapters", "frozen ms", "peftfast / frozen", "PEFT / frozen",
        "MiB written: peftfast, PEFT, frozen",
    )  # fmt: skip
    for train in (False, True):
        for tokens in args.row_tokens:
            for count in args.adapters:
                steps = steps_of(torch.randint(0, 1024, (args.rows, tokens)), count, train)
                logits = {name: step() for name, step in steps.items()}
                tolerance = 1e-3 if args.dtype == "float32" else 5e-2
                if not torch.allclose(logits["peft"], logits["peftfast"], rtol=tolerance, atol=tolerance):
                    sys.exit("logits differ; no timing is reported")
                written = ", ".join(f"{bytes_written(steps[n]):.1f}" for n in ("peftfast", "peft", "frozen"))
                times = turns(steps, args.rounds, warmup=3)
                ratios = [median_ratio(times[n], times["frozen"]) for n in ("peftfast", "peft")]
                what, milliseconds = (
                    "forward, backward" if train else "forward",
                    1e3 * statistics.median(times["frozen"]),
                )
                print_row(what, tokens, count, milliseconds, *ratios, written, digits=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--active", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--inner", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--implementation", nargs="*", default=["grouped_mm", "eager"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--row-tokens", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--adapters", type=int, nargs="*", default=[1, 4, 16])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print_versions(
        f"1 thread; {args.experts} experts", f"{args.active} a token", f"hidden {args.hidden}",
        f"{args.inner} an expert", f"{args.layers} layers", f"r={args.r}", args.dtype,
        *([f"{args.rows} rows"] if args.rows else []),
    )  # fmt: skip
    if args.rows:
        return mixed(args)
    print_table_head(
        "experts_implementation", "what", "PEFT ms", "peftfast ms", "frozen ms", "peftfast / PEFT",
        "peftfast / frozen", "PEFT / frozen", "MiB written: PEFT, peftfast, frozen",
        "MiB kept: PEFT, peftfast, frozen", text=2,
    )  # fmt: skip
    for implementation in args.implementation:
        models = contestants(args, implementation)
        ids = torch.randint(0, 1024, (1, args.tokens))
        decoding = {name: make_steps(model, ids[:, :16], 4) for name, model in models.items()}
        logits = {name: step() for name, step in decoding.items()}
        learning = {name: training(model, ids) for name, model in models.items()}
        for step in learning.values():
            step()
        compare(logits, models, 1e-4 if args.dtype == "float32" else 5e-2)
        kept = ", ".join(f"{bytes_saved(model, ids):.1f}" for model in models.values())
        for what, steps, each in (("decode 1 token", decoding, 4), (f"{args.tokens} tokens, step", learning, 1)):
            written = ", ".join(f"{bytes_written(step) / each:.1f}" for step in steps.values())
            row = figures(turns(steps, args.rounds, warmup=3), each)
            print_row(implementation, what, *row, written, kept if each == 1 else "-", digits=2)


if __name__ == "__main__":
    main()
