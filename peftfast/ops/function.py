"""What all autograd Functions here share: how they are called, and what happens to derivatives of derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function, once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from peftfast.autocast import is_autocasting, without_autocast

#: An output, which nobody else has, as a `Function.forward` gives it. A view that was made there, of rows as [..., N],
#: could not be written to afterwards (`clamp_`, `nn.ReLU(inplace=True)`): autograd would raise an error.
fresh = Tensor.detach


def fresh_if_compiled(y: Tensor) -> Tensor:
    """An output that is no view, but may have been written to in `Function.forward`: torch 2.11, compiling, gives such
    a tensor out twice, and the gradient of the first is zero."""
    return fresh(y) if torch.compiler.is_compiling() else y


def set_anew(parameter: Tensor, value: Tensor) -> None:
    """`parameter.data = value`, after which autograd awaits gradients anew, as if no graph that still is had used it:
    data of another dtype in between makes it forget where it did."""
    other = torch.float16 if value.dtype is torch.float32 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=value.device)
    parameter.data = value


class Apart:
    """The context of a Function whose gradients are to be differentiated: what is saved is there as often as it is
    asked for, and every tensor by itself, although one may be made of another, as where a layer is called twice."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        saved = ctx.saved_tensors
        self.saved_tensors = tuple([t.view_as(t) if t is not None and t.requires_grad else t for t in saved])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a `Function.backward`: differentiating it a second time raises instead of giving zeros.

    torch's `once_differentiable`, which asks what arrives only, asks what is saved as well: gradients are made of both.
    At no cost in the usual backward pass, which records nothing that could be differentiated.
    """

    @once_differentiable
    def refused(ctx: Any, count: int, *grads_and_saved: Any) -> Any:
        return backward(ctx, *grads_and_saved[:count])

    return second_order(lambda ctx, *grads: refused(ctx, len(grads), *grads, *ctx.saved_tensors))(backward)


def _is_batched(grad: Tensor | None) -> bool:
    """Whether it is many at once (`is_grads_batched`), which torch's own operations follow."""
    return grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)


def second_order(again: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a `Function.backward`: where the gradients are to be differentiated in turn (`create_graph=True`),
    or many of them are wanted at once, `again` computes them, in operations that torch can differentiate."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @left_alone
        def wrapper(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():
                return again(Apart(ctx), *grads)
            try:
                return backward(ctx, *grads)
            except RuntimeError:
                if not any(map(_is_batched, grads)):
                    raise
            with torch.enable_grad():
                return again(Apart(ctx), *grads)

        return wrapper

    return decorate


def left_alone(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a `Function.backward`: autocast, which may have begun since the forward pass, has no part in it. Of
    no gradient at all, none is made."""

    def wrapper(ctx: Any, *grads: Any) -> Any:
        given = grads[0]
        if given is None:
            given = next((dy for dy in grads if dy is not None), None)
        if given is None:
            return (None,) * len(ctx.needs_input_grad)
        if not is_autocasting(given):
            return backward(ctx, *grads)
        with without_autocast(given):
            return backward(ctx, *grads)

    return wrapper


# `torch.reshape` of a tuple takes the host a third of what `view` of one does, and two thirds of `reshape`.
def as_rows(x: Tensor) -> Tensor:
    """x [..., K] as [M, K]."""
    return x if x.dim() == 2 else torch.reshape(x, (-1, x.shape[-1]))


def shaped_as(rows: Tensor, x: Tensor) -> Tensor:
    """Rows [M, N] as [..., N], with the leading dimensions of x [..., K]."""
    if x.dim() == 2:
        return rows
    *shape, _ = x.shape
    return torch.reshape(rows, (*shape, rows.shape[1]))


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in this dtype: even a cast to the same one takes the host a while, and `to` longer than `type`."""
    return x if x.dtype is dtype else x.type(dtype)


def gradients_of(y: Tensor, inputs: Sequence[Tensor], needed: Sequence[bool], dy: Tensor) -> list[Tensor | None]:
    """The gradients of those `inputs` that are needed, with a graph of their own where one can be made."""
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=not _is_batched(dy)) if wanted else ())
    return [next(found) if need else None for need in needed]


# by names of their own, because every call of every layer asks
_transforms, _modes = torch._C._are_functorch_transforms_active, torch._C._len_torch_dispatch_stack
_SELECTING = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)


def transformed() -> bool:
    """Whether a transform of functorch's or forward-mode differentiation is under way: Functions do not follow them."""
    return _transforms() or forward_ad._current_level >= 0


def followed() -> bool:
    """Whether operations are to be torch's own and to write into nothing: where `transformed()`, and in checkpointing
    that selects operations, whose results the backward pass is given in their place. Outside compilers."""
    return _transforms() or forward_ad._current_level >= 0 or _modes() > 0 and _selecting()


def _selecting() -> bool:
    return any(isinstance(mode, _SELECTING) for mode in _get_current_dispatch_mode_stack())


def _flagged_as_exporting() -> bool:
    return torch.compiler._is_exporting_flag


#: Whether torch.export is tracing. Inside whatever torch 2.11 compiles, its own function says yes.
exporting = torch.compiler.is_exporting if torch.__version__ >= "2.12" else _flagged_as_exporting


def composing() -> bool:
    """Whether formulas have to be of torch's own operations: where `transformed()`, under `torch.export`, which would
    keep what a Function's `forward` does and derive that, without what it computes outside the graph, and under
    `torch.jit.trace`, which can save no Function and does not see kernels."""
    return transformed() or exporting() or torch.jit.is_tracing()


def writable() -> bool:
    """Whether what an operation has just given, which nobody else has, may be written to."""
    return not (torch.compiler.is_compiling() or followed())


def apply(function: type[Function], *args: Any) -> Any:
    """`function.apply(*args)`, without its search for functorch's wrappers among the arguments where no transform of
    functorch's is active: that takes the host as long as a small product."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(Function, function).apply(*args)
