"""Run by test_liger.py in a process of its own: the real package in Triton's interpreter, which must be switched on
before anything imports Triton. Prints one JSON object."""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from oracle import gradients
from training.tiny import batch, fill, largest_difference, llama, lora

import peftfast

torch.set_num_threads(1)


@triton.jit
def rsqrt(x):
    return 1.0 / tl.sqrt(x)


def fill_gaps() -> None:
    """What Liger's RMSNorm uses and the interpreter of Triton 3.9 lacks: floats as tensors, and libdevice."""
    import liger_kernel.ops.rms_norm  # noqa: F401  (the name in the package is another thing)

    convert = interpreter._implicit_cvt

    def converted(argument):
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = converted
    sys.modules["liger_kernel.ops.rms_norm"].rsqrt = rsqrt


def step(model) -> tuple[float, dict]:
    model.zero_grad()
    loss = model(**batch(2)).loss
    loss.backward()
    return loss.item(), gradients(model)


def main() -> None:
    fill_gaps()
    results = {}
    for kind in ("all", "from logits"):
        model = peftfast.get_peft_model(llama(), lora(peftfast, modules_to_save=["norm"])).train()
        fill(model)
        expected, gradient = step(model)
        liger = peftfast.use_liger(model, fused_linear_cross_entropy="auto" if kind == "all" else False)
        found, mine = step(model)
        results[kind] = {
            "loss": abs(found - expected) / expected,
            "gradients": largest_difference(mine, gradient),
            "states": sorted({f"{part.kind}: {part.state}" for part in liger.parts}),
            "parts": len(liger.parts),
        }
    print(json.dumps(results))


main()
