"""Peak memory of a training step of a whole model, as CUDA's caching allocator counts it: frozen base, PEFT, peftfast.

    python bench/peak_memory.py [--models qwen3-0.6b llama-3-8b] [--tokens 2048] [--r 16]
    python tools/fake_gpu bench/peak_memory.py       without a GPU: the allocator is real, what it hands out is not

Forward and backward under bf16 autocast on a bf16 base, fp32 factors on all linear layers, one sequence, the loss of
transformers. Each row is what the step needs beyond what lies in memory before it: gradients of the factors, saved
activations, logits, temporaries. The frozen base, whose embeddings' output asks for a gradient, is the limit. Launches
(kernels, and products by cuBLAS) are counted by the GPU that is not there; on a real one the column is empty. Blocks
(`--libraries "peftfast + blocks"`) need a real one, because they are compared with what they replace.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
for _path in (ROOT, ROOT / "kernels"):
    if str(_path) not in sys.path:
        sys.path.insert(0, str(_path))

from bench.contestants import TARGETS, llama, wrap  # noqa: E402
from bench.measure import print_row, print_table_head, print_versions  # noqa: E402
from bench.operands import MODELS, Size  # noqa: E402

#: Layers and vocabulary of the published models.
WHOLE = {"qwen3-0.6b": (28, 151936), "llama-3-8b": (32, 128256), "qwen3-8b": (36, 151936)}
HALF = torch.bfloat16
COUNTERS = ("fake_gpu_launches", "fake_gpu_products", "fake_gpu_driver_launches")


def launches() -> int | None:
    """Kernels and products launched so far; None where nobody counts."""
    process = ctypes.CDLL(None)
    if not hasattr(process, COUNTERS[0]):
        return None
    found = 0
    for name in COUNTERS:
        library = process if hasattr(process, name) else ctypes.CDLL("libcuda.so.1")
        count = getattr(library, name)
        count.restype = ctypes.c_ulong
        found += count()
    return found


def build(library: str, name: str, args: argparse.Namespace, checkpointing: bool) -> nn.Module:
    shape = next(one for one in MODELS if one.name == name)
    layers, vocabulary = WHOLE[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(HALF)  # a model that is made in fp32 first does not fit
    try:
        base = llama(shape, layers, HALF, "cuda", vocabulary=vocabulary)
    finally:
        torch.set_default_dtype(before)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    if library == "frozen":
        base.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
        return base.train()
    model = wrap(library.partition(" ")[0], base, Size(0, 0, 0, args.r, HALF, dropout=args.dropout), TARGETS, args.dora)
    if checkpointing:
        model.enable_input_require_grads()
    if library.endswith("blocks"):
        import peftfast

        peftfast.fuse_blocks(model)
    return model


def step_of(model: nn.Module, tokens: int) -> Callable[[], None]:
    ids = torch.randint(0, 512, (1, tokens)).cuda()
    mask = torch.ones_like(ids)

    def step() -> None:
        with torch.autocast("cuda", HALF):
            loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()

    return step


def measured(library: str, name: str, args: argparse.Namespace, checkpointing: bool) -> tuple[float, int | None]:
    """MiB that a step needs at its peak, and its launches; the second step, when gradients and caches are there."""
    model = build(library, name, args, checkpointing)
    step = step_of(model, args.tokens)
    step()
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start, counted = torch.cuda.memory_allocated(), launches()
    step()
    torch.cuda.synchronize()
    needed = torch.cuda.max_memory_allocated() - start
    counted = None if counted is None else launches() - counted
    return needed / 2**20, counted


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["qwen3-0.6b", "llama-3-8b"], choices=WHOLE)
    parser.add_argument("--libraries", nargs="*", default=["frozen", "peft", "peftfast"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dora", action="store_true")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a GPU, or tools/fake_gpu")
    warnings.simplefilter("ignore")
    print_versions(
        torch.cuda.get_device_name(), "DoRA" if args.dora else "LoRA", f"{args.tokens} tokens", f"r={args.r}",
        f"dropout {args.dropout}",
    )  # fmt: skip
    print_table_head("model", "checkpointing", "library", "MiB", "of PEFT's", "beyond frozen, MiB", "launches", text=3)
    for name in args.models:
        for checkpointing in (False, True):
            how, rows = "yes" if checkpointing else "no", {}
            for library in args.libraries:
                try:
                    rows[library] = measured(library, name, args, checkpointing)
                except torch.OutOfMemoryError:
                    print_row(name, how, library, "does not fit", "", "", "")
                gc.collect()
                torch.cuda.empty_cache()
            for library, (needed, counted) in rows.items():
                of_peft = f"{needed / rows['peft'][0]:.2f}" if "peft" in rows else ""
                beyond = f"{needed - rows['frozen'][0]:.0f}" if "frozen" in rows else ""
                print_row(name, how, library, f"{needed:.0f}", of_peft, beyond, counted or "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
