"""y * s per feature and its backward: IA3 (Liu et al., arXiv 2205.05638) and the magnitude of DoRA.

Shapes: y, dy [M, N] with any strides, s [N] (fp32 beside half-precision activations, or y's dtype). ds is summed over
the rows in fp32, in a fixed order.
"""

import torch
from torch import Tensor

from peftfast_kernels.lora_down import WIDE_CHUNK, make_inputs
from peftfast_kernels.op import Case, Cost, accumulate_dtype, op, row_chunks


def _reference(y: Tensor, s: Tensor) -> Tensor:
    dtype = accumulate_dtype(y, s)
    return y.to(dtype) * s.to(dtype)


def _cases(gradient: bool):
    for m, n, dtype, single, strided in (
        (7, 33, torch.float32, True, False),
        (1, 70, torch.float32, True, True),
        (0, 16, torch.float32, True, False),
        (600, 40, torch.float16, True, False),
        (65, 130, torch.bfloat16, True, True),
        (33, 48, torch.float16, False, False),
    ):
        mark = f"{'-fp32s' * single}{'-strided' * strided}"
        yield Case(
            f"M{m}-N{n}-{str(dtype)[6:]}{mark}",
            lambda device, c=(m, n, dtype, single, strided): _build(device, gradient, *c),
        )


def _build(device, gradient, m, n, dtype, single, strided):
    y, dy = make_inputs(device, [(m, n), (m, n)], dtype, strided=strided)
    (s,) = make_inputs(device, [(1, n)], torch.float32 if single else dtype, seed=1)
    return {"dy": dy, "y": y, "s": s[0], "grad_dtype": torch.float32} if gradient else {"y": y, "s": s[0]}


@op(
    reference=_reference,
    module="feature_scale_kernels",
    cases=lambda: _cases(False),
    # read y and s once, write once
    cost=lambda y, s: Cost(float(y.numel()), float(2 * y.numel() * y.element_size() + s.numel() * s.element_size())),
    fake=lambda y, s: y.new_empty(y.shape),
)
def feature_scale(y: Tensor, s: Tensor) -> Tensor:
    """Returns y * s in y's dtype, for y [M, N] and s [N]."""
    # computed in the wider of the two dtypes, rounded once, without a wide temporary
    return torch.mul(y, s, out=torch.empty(y.shape, dtype=y.dtype, device=y.device))


def _grad_reference(dy: Tensor, y: Tensor, s: Tensor, grad_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(dy, y, s)
    return dy.to(dtype) * s.to(dtype), (dy.to(dtype) * y.to(dtype)).sum(0)


def _grad_cost(dy: Tensor, y: Tensor, s: Tensor, grad_dtype: torch.dtype) -> Cost:
    # read dy and y once, write dy * s once
    return Cost(3.0 * y.numel(), float(3 * y.numel() * y.element_size() + 2 * s.numel() * s.element_size()))


@op(
    reference=_grad_reference,
    module="feature_scale_kernels",
    cases=lambda: _cases(True),
    cost=_grad_cost,
    fake=lambda dy, y, s, grad_dtype: (dy.new_empty(dy.shape), s.new_empty(s.shape, dtype=grad_dtype)),
)
def feature_scale_grad(dy: Tensor, y: Tensor, s: Tensor, grad_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns dy * s [M, N] in dy's dtype and ds [N], the column sums of dy * y, in ``grad_dtype``."""
    dtype = accumulate_dtype(dy, y)
    ds = torch.zeros(s.shape, dtype=dtype, device=s.device)
    for rows in row_chunks(y.shape[0], y.shape[1], WIDE_CHUNK, y.device):
        ds += (dy[rows].to(dtype) * y[rows].to(dtype)).sum(0)
    return feature_scale.eager(dy, s), ds.to(grad_dtype)
