"""act(gate) * up and its backward: the middle of a gated MLP (SwiGLU, GEGLU, ReGLU; Shazeer, arXiv 2002.05202).

Shapes: gate, up, dh [M, I] with any strides. The backward pass gives the product itself again, which the last linear
layer's factors need, with both gradients from one read of the three inputs: nothing of the intermediate size is kept
between the passes beyond gate and up.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfast_kernels.lora_down import make_inputs
from peftfast_kernels.op import Case, Cost, accumulate_dtype, op


class Activation(NamedTuple):
    """An element-wise function and its derivative times what arrives."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]  # (gradient of the result, input)


_aten = torch.ops.aten

ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, _aten.silu_backward),
    "gelu": Activation(F.gelu, _aten.gelu_backward),
    "gelu_tanh": Activation(
        lambda g: F.gelu(g, approximate="tanh"), lambda dy, g: _aten.gelu_backward(dy, g, approximate="tanh")
    ),
    "relu": Activation(F.relu, lambda dy, g: _aten.threshold_backward(dy, g, 0)),
}


def _cases(gradient: bool):
    for m, n, dtype, act, strided in (
        (7, 33, torch.float32, "silu", False),
        (1, 70, torch.float32, "gelu", True),
        (0, 16, torch.float32, "silu", False),
        (40, 48, torch.float32, "gelu_tanh", False),
        (33, 20, torch.float32, "relu", False),
        (65, 130, torch.bfloat16, "silu", True),
        (33, 48, torch.float16, "gelu", False),
        (20, 64, torch.bfloat16, "gelu_tanh", False),
    ):
        mark = "-strided" * strided
        yield Case(
            f"M{m}-N{n}-{act}-{str(dtype)[6:]}{mark}",
            lambda device, c=(m, n, dtype, act, strided): _build(device, gradient, *c),
        )


def _build(device, gradient, m, n, dtype, act, strided):
    gate, up, dh = make_inputs(device, [(m, n)] * 3, dtype, strided=strided, std=2.0)
    return {"dh": dh, "gate": gate, "up": up, "act": act} if gradient else {"gate": gate, "up": up, "act": act}


def _reference(gate: Tensor, up: Tensor, act: str) -> Tensor:
    dtype = accumulate_dtype(gate, up)
    return ACTIVATIONS[act].forward(gate.to(dtype)) * up.to(dtype)


@op(
    reference=_reference,
    module="gated_kernels",
    cases=lambda: _cases(False),
    # read gate and up once, write once; an exponential counts as ten operations
    cost=lambda gate, up, act: Cost(12.0 * gate.numel(), 3.0 * gate.numel() * gate.element_size()),
    fake=lambda gate, up, act: gate.new_empty(gate.shape),
)
def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """Returns h [M, I] = act(gate) * up, in gate's dtype; ``act`` is a key of ``ACTIVATIONS``."""
    return ACTIVATIONS[act].forward(gate).mul_(up)


def _grad_reference(dh: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(dh, gate, up)
    dh, gate, up = dh.to(dtype), gate.to(dtype), up.to(dtype)
    acted = ACTIVATIONS[act].forward(gate)
    return acted * up, ACTIVATIONS[act].backward(dh * up, gate), dh * acted


@op(
    reference=_grad_reference,
    module="gated_kernels",
    cases=lambda: _cases(True),
    # read dh, gate and up once, write h and both gradients once
    cost=lambda dh, gate, up, act: Cost(20.0 * gate.numel(), 6.0 * gate.numel() * gate.element_size()),
    fake=lambda dh, gate, up, act: tuple(gate.new_empty(gate.shape) for _ in range(3)),
)
def gated_grad(dh: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns h = act(gate) * up again, then the gradients of gate and of up, for the gradient dh of h."""
    activation = ACTIVATIONS[act]
    acted = activation.forward(gate)
    hidden = acted * up
    d_gate = activation.backward(dh * up, gate)
    return hidden, d_gate, acted.mul_(dh)
