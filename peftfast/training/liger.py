"""Liger's Triton kernels (the optional package `liger-kernel`) on one model: RMSNorm, rotary embedding, cross-entropy.

    liger = peftfast.use_liger(model)
    print(liger.report())
    liger.remove()                      # every module as before

Liger's own `apply_liger_kernel_to_*` replaces names in transformers' modules (`apply_rotary_pos_emb`, even
`torch.nn.functional.cross_entropy`), for every model of the process, also when it is given a model. Here only instances
change: a norm's `forward`; an attention's `forward`, which is the class's own code with another rotary function among
its globals; the model's loss function. Each is compared with what it replaces, value and gradient, and left alone where
they differ (a norm with `1 + weight`, as Gemma's, is recognised by that comparison).

The fused linear cross-entropy multiplies by the head's weight itself and never calls the head. It is used only while
the head is an untouched `torch.nn.Linear`: on an adapted head it would train without the adapter. A training step then
has no `logits` in its output. Liger's losses count labels on the host, so `capture_training_step` cannot record them.
Remove Liger before pickling a model as a whole; copies and state dicts are as always.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from types import CellType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfast.errors import close_matches
from peftfast.layer import BaseTunerLayer
from peftfast.sites.site import is_untouched
from peftfast.training.blocks import _agree, _comparing, _without_dropout
from peftfast.wrapping.saved_modules import AuxiliaryTrainingWrapper

logger = logging.getLogger("peftfast")

ROTARY = "apply_rotary_pos_emb"  # what transformers' attentions call
_thread = threading.local()  # whose head stands aside in this thread


def _operations() -> ModuleType:
    try:
        from liger_kernel.transformers import functional
    except ImportError as e:
        raise ImportError(
            f"use_liger needs the package liger-kernel (pip install liger-kernel), which cannot be imported: {e}"
        ) from e
    return functional


def _same(ours: Callable[..., Any], theirs: Callable[..., Any], *inputs: Tensor) -> bool:
    """Whether two functions of tensors have equal values and gradients, but for rounding."""
    results = []
    for function in (ours, theirs):
        with torch.enable_grad():
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            out = function(*leaves)
            out = list(out) if isinstance(out, (tuple, list)) else [out]
            # of no special direction: along its output, for one, the gradient of a norm vanishes
            along = [torch.arange(y.numel(), device=y.device).cos().view(y.shape).to(y.dtype) for y in out]
            grads = torch.autograd.grad(out, leaves, along)
        results.append([y.detach() for y in (*out, *grads)])
    return all(map(_agree, *results))


def _probe(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers that do not come from, and do not advance, the random generator."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values.to(device=like.device, dtype=dtype or like.dtype)


class _Part:
    """Something of Liger's in one place of a model.

    Attributes:
        state: "new", "on", or why it is off.
    """

    kind = ""

    def __init__(self, name: str) -> None:
        self.name, self.state = name, "new"

    def attach(self) -> None:
        raise NotImplementedError

    def detach(self) -> None:
        raise NotImplementedError

    def off(self, why: str) -> None:
        self.state = f"off: {why}"
        logger.info("peftfast: Liger's %s at %s is %s", self.kind, self.name, self.state)
        self.detach()


class RmsNorm(_Part):
    """A norm's `forward`. One that would compute in another way for a dtype is left to itself for that dtype."""

    kind = "RMSNorm"
    CANDIDATES = ((0.0, "llama"), (1.0, "gemma"), (0.0, "gemma"), (1.0, "llama"))  # offset of the weight, casting

    def __init__(self, name: str, module: nn.Module, operations: ModuleType) -> None:
        super().__init__(name)
        self.module, self.operation = module, operations.liger_rms_norm
        self.eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        self.modes: dict[torch.dtype, tuple[float, str] | None] = {}

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Named like one, with one vector of weights, one epsilon and nothing else."""
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = module._parameters.get("weight")
        return (
            "RMSNorm" in type(module).__name__
            and isinstance(eps, float)
            and weight is not None
            and weight.dim() == 1
            and len(module._parameters) == 1
            and not module._modules
        )

    def attach(self) -> None:
        if not is_untouched(self.module):
            return self.off("it has hooks or another forward")
        try:
            mode = self._mode(self.module.weight.dtype)
        except Exception as e:
            return self.off(f"Liger cannot compute it here ({type(e).__name__}: {e})")
        if mode is None:
            return self.off("it computes something else")
        self.module.__dict__["forward"] = self.forward
        self.state = "on"
        return None

    def detach(self) -> None:
        if getattr(self.module.__dict__.get("forward"), "__self__", None) is self:
            del self.module.__dict__["forward"]

    def forward(self, x: Tensor) -> Tensor:
        mode = None if torch.compiler.is_compiling() or not x.numel() else self._mode(x.dtype)
        return self._plain(x) if mode is None else self._liger(mode, x, self.module.weight)

    def _plain(self, x: Tensor) -> Tensor:
        return type(self.module).forward(self.module, x)

    def _liger(self, mode: tuple[float, str], x: Tensor, weight: Tensor) -> Tensor:
        # not in place: the gradient may belong to a residual as well
        return self.operation(x, weight, self.eps, *mode, False)

    def _mode(self, dtype: torch.dtype) -> tuple[float, str] | None:
        if dtype not in self.modes:
            if torch.is_inference_mode_enabled():  # no gradients to compare; next time
                return None
            weight = self.module.weight
            x = _probe(4, weight.shape[0], like=weight, dtype=dtype)
            fitting = [m for m in self.CANDIDATES if _same(lambda x, m=m: self._liger(m, x, weight), self._plain, x)]
            with torch.no_grad():  # several where only their rounding differs
                error = {m: (self._liger(m, x, weight) - self._plain(x)).abs().max().item() for m in fitting}
            self.modes[dtype] = min(fitting, key=error.__getitem__, default=None)
        return self.modes[dtype]


def _with_global(function: FunctionType, name: str, value: Any) -> FunctionType | None:
    """The same code with another value for one of its globals, through decorators that keep what they wrap in their
    closure; None where one does not. The function itself is as before."""
    inner = getattr(function, "__wrapped__", None)
    names, closure = function.__globals__, function.__closure__
    if inner is None:
        names = {**names, name: value}
    else:
        new = _with_global(inner, name, value)
        if new is None or not any(cell.cell_contents is inner for cell in closure or ()):
            return None
        closure = tuple(CellType(new) if cell.cell_contents is inner else cell for cell in closure)
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__dict__.update(function.__dict__)
    if inner is not None:
        copied.__wrapped__ = new
    return copied


class Rotary(_Part):
    """An attention's `forward` with Liger's rotary function in place of its module's, checked at its first call."""

    kind = "rotary"

    def __init__(self, name: str, module: nn.Module, operations: ModuleType) -> None:
        super().__init__(name)
        self.module, self.operation = module, operations.liger_rope
        self.original = inspect.unwrap(type(module).forward).__globals__[ROTARY]
        self.function = _with_global(type(module).forward, ROTARY, self.rotate)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Its code calls the function by its global name."""
        own = inspect.unwrap(type(module).forward)
        return isinstance(own, FunctionType) and ROTARY in own.__code__.co_names and ROTARY in own.__globals__

    def attach(self) -> None:
        if not is_untouched(self.module):
            return self.off("it has hooks or another forward")
        if self.function is None:
            return self.off("its forward is wrapped in something unknown")
        self.module.__dict__["forward"] = MethodType(self.function, self.module)
        return None

    def detach(self) -> None:
        mine = self.module.__dict__.get("forward")
        if mine is not None and getattr(mine, "__func__", None) is self.function:
            del self.module.__dict__["forward"]

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple:
        usable = not (args or kwargs or torch.compiler.is_compiling())
        if usable and self.state == "new" and not torch.is_inference_mode_enabled():
            self._check(q, k, cos, sin)
        if not usable or self.state != "on":
            return self.original(q, k, cos, sin, *args, **kwargs)
        return self.operation(q, k, cos, sin)

    def _check(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        try:
            fits = _same(lambda q, k: self.operation(q, k, cos, sin), lambda q, k: self.original(q, k, cos, sin), q, k)
        except Exception as e:
            return self.off(f"Liger cannot compute it here ({type(e).__name__}: {e})")
        if not fits:
            return self.off("it computes something else")
        self.state = "on"
        return None


class CrossEntropy(_Part):
    """The model's `loss_function`, from logits."""

    kind = "cross-entropy"

    def __init__(self, name: str, base: nn.Module, operations: ModuleType) -> None:
        super().__init__(name)
        self.base, self.operation = base, operations.liger_cross_entropy

    def attach(self) -> None:
        why = _other_loss(self.base)
        if why is not None:
            return self.off(why)
        self.before = self.base.loss_function
        weight = next(p for p in self.base.parameters() if p.is_floating_point())
        labels = torch.tensor([[1, 0, 2, -100, 3]], device=weight.device)
        logits = _probe(1, 5, 7, like=weight)
        try:
            fits = all(
                _same(lambda x, c=c: self.loss(x, labels, 7, c), lambda x, c=c: self.before(x, labels, 7, c), logits)
                for c in (None, 9)
            )
        except Exception as e:
            return self.off(f"Liger cannot compute it here ({type(e).__name__}: {e})")
        if not fits:
            return self.off("it computes something else")
        self.base._loss_function = self.loss
        self.state = "on"
        return None

    def detach(self) -> None:
        _put_back(self.base, "_loss_function", self)

    def loss(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As transformers' ForCausalLMLoss."""
        targets = _targets(labels, shift_labels, ignore_index).to(logits.device)
        rows = logits.float().view(-1, vocab_size)
        if rows.requires_grad and logits.dtype == torch.float32:
            rows = rows.clone()  # Liger writes the gradient over its input, which is the model's output as well
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = self.operation(rows, targets, ignore_index=ignore_index, reduction=reduction)
        return loss if num_items_in_batch is None else _divided(loss, num_items_in_batch)


class FusedHead(_Part):
    """Head and loss in one, never holding all logits: in a training step the head hands on its input, and the loss
    function, which knows that, multiplies by the head's weight. Stands in for the model's `forward`, to decide which
    calls are such steps; called with anything else, or after somebody has adapted the head, it changes nothing.

    The first step is computed both ways and compared.
    """

    kind = "fused linear cross-entropy"

    def __init__(self, name: str, base: nn.Module, operations: ModuleType, explicit: bool) -> None:
        super().__init__(name)
        self.base, self.head, self.explicit = base, base.get_output_embeddings(), explicit
        self.operation = operations.liger_fused_linear_cross_entropy
        self.__signature__ = inspect.signature(base.forward)  # trainers read which columns it takes

    def attach(self) -> None:
        why = _other_loss(self.base)
        if why is not None:
            return self.off(why)
        self.loss_before, self.forward_before = self.base.loss_function, self.base.__dict__.get("forward")
        self.base._loss_function = self.loss
        self.base.__dict__["forward"] = self
        self.head.__dict__["forward"] = self.project
        return None

    def detach(self) -> None:
        _put_back(self.base, "_loss_function", self, self.__dict__.get("loss_before"))
        _put_back(self.head, "forward", self)
        if self.base.__dict__.get("forward") is self:
            del self.base.__dict__["forward"]
            if self.forward_before is not None:
                self.base.__dict__["forward"] = self.forward_before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.state not in ("new", "on") or not self._is_step(kwargs):
            return self._plain(*args, **kwargs)
        if self.state == "new":
            self._check(args, kwargs)
        return self._fused(*args, **kwargs) if self.state == "on" else self._plain(*args, **kwargs)

    def _is_step(self, kwargs: Mapping[str, Any]) -> bool:
        returns = kwargs.get("return_dict", getattr(self.base.config, "return_dict", True))
        return (
            self.base.training
            and torch.is_grad_enabled()
            and kwargs.get("labels") is not None
            and isinstance(kwargs.get("logits_to_keep", 0), int)
            and not kwargs.get("logits_to_keep", 0)
            and returns is not False
            and not torch.compiler.is_compiling()
            and head_trouble(self.base, self) is None
        )

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        if self.forward_before is not None:
            return self.forward_before(*args, **kwargs)
        return type(self.base).forward(self.base, *args, **kwargs)

    def _fused(self, *args: Any, **kwargs: Any) -> Any:
        _thread.aside = self
        try:
            output = self._plain(*args, **kwargs)
        finally:
            _thread.aside = None
        return type(output)(**{k: v for k, v in output.items() if k != "logits"})  # those were hidden states

    def project(self, x: Tensor) -> Tensor:
        """In place of the head's `forward`."""
        return x if getattr(_thread, "aside", None) is self else type(self.head).forward(self.head, x)

    def loss(self, logits: Tensor, labels: Tensor | None, vocab_size: int, *args: Any, **kwargs: Any) -> Tensor:
        """In place of the model's loss function."""
        _thread.asked = True
        if getattr(_thread, "aside", None) is self:
            return self._from_hidden(logits, labels, *args, **kwargs)
        return self.loss_before(logits, labels, vocab_size, *args, **kwargs)

    def _from_hidden(
        self,
        hidden: Tensor,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        weight = self.head.weight
        targets = _targets(labels, shift_labels, ignore_index).to(hidden.device)
        rows = hidden.reshape(-1, weight.shape[1])
        if rows.dtype != weight.dtype and not torch.is_autocast_enabled(rows.device.type):
            rows = rows.to(weight.dtype)
        loss = self.operation(
            rows, weight, targets, bias=self.head.bias, ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
        )  # fmt: skip
        return loss if num_items_in_batch is None else _divided(loss, num_items_in_batch)

    def _check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        why = None
        with torch.no_grad(), _without_dropout(self.base), _comparing():
            _thread.asked = False
            theirs = self._plain(*args, **kwargs).loss
            if not _thread.asked:
                why = "the model computes its loss without its loss_function"
            else:
                try:
                    ours = self._fused(*args, **kwargs).loss
                    # logits are rounded to the head's dtype in both, in another order
                    eps = torch.finfo(self.head.weight.dtype if not _autocasting(theirs) else torch.bfloat16).eps
                    limit = (4 if eps > 1e-5 else 64) * eps
                    if not torch.allclose(ours.float(), theirs.float(), rtol=limit, atol=limit, equal_nan=True):
                        why = f"its loss is another one, {ours.item():.6g} instead of {theirs.item():.6g}"
                except Exception as e:
                    why = f"Liger cannot compute it here ({type(e).__name__}: {e})"
        if why is None:
            self.state = "on"
            return
        self.off(why)
        if self.explicit:
            raise RuntimeError(f"fused_linear_cross_entropy=True: {self.name} is {self.state}")


class NoFusedHead(_Part):
    """In the report, why there is none."""

    kind = FusedHead.kind

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name)
        self.state = f"off: {why}"

    def detach(self) -> None: ...


def _autocasting(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _targets(labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    """[B · T] the token after every position."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return shift_labels.reshape(-1)


def _divided(loss: Tensor, count: Tensor | int) -> Tensor:
    return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)


def _put_back(module: nn.Module, attribute: str, part: _Part, before: Any = None) -> None:
    """Take a method of `part` away from where it stands in for something."""
    if getattr(module.__dict__.get(attribute), "__self__", None) is part:
        del module.__dict__[attribute]
        if isinstance(getattr(before, "__self__", None), _Part):
            module.__dict__[attribute] = before


def _other_loss(base: nn.Module) -> str | None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    function = getattr(base, "loss_function", None)
    if function is ForCausalLMLoss or isinstance(getattr(function, "__self__", None), CrossEntropy):
        return None
    return f"the model's loss is {getattr(function, '__name__', function)}, not ForCausalLMLoss"


def head_trouble(base: nn.Module, installed: FusedHead | None = None) -> str | None:
    """Why a product with the head's weight is not what the head computes; None if it is.

    Args:
        installed: whose stand-in for the head's `forward` is known not to matter.
    """
    find = getattr(base, "get_output_embeddings", None)
    head = None if find is None else find()
    if head is None:
        return f"{type(base).__name__} has no head over a vocabulary"
    trouble = _trouble_of(head, installed)
    return None if trouble is None else f"{_name_of(base, head)} {trouble}"


def _trouble_of(head: nn.Module, installed: FusedHead | None) -> str | None:
    if isinstance(head, BaseTunerLayer):
        return f"is adapted ({', '.join(head.adapters)}), which a product with its weight would leave out"
    if isinstance(head, AuxiliaryTrainingWrapper):
        return f"is trained beside the adapter ({type(head).__name__}), which its own weight does not show"
    if type(head) is not nn.Linear:
        return f"is a {type(head).__name__}, not a torch.nn.Linear"
    state = dict(head.__dict__)
    if installed is not None and getattr(state.get("forward"), "__self__", None) is installed:
        del state["forward"]
    if not is_untouched(SimpleNamespace(**state)):
        return "has hooks or another forward"
    if type(head.weight) is not nn.Parameter or head.weight.is_meta or not head.weight.is_floating_point():
        return "has a weight that is not an ordinary tensor"
    return None


def _name_of(base: nn.Module, module: nn.Module) -> str:
    return next((name for name, m in base.named_modules() if m is module), type(module).__name__)


class Liger:
    """What `use_liger` put into a model.

    Attributes:
        parts: each with `kind`, `name` and `state`: "on", "new" (checked at its first use), or why it is off.
    """

    def __init__(self, base: nn.Module, parts: Sequence[_Part]) -> None:
        self.base, self.parts = base, list(parts)
        base.__dict__["_liger"] = self
        for part in self.parts:
            if part.state == "new":
                part.attach()

    def remove(self) -> None:
        """Every module as it was."""
        for part in reversed(self.parts):
            part.detach()
        self.parts = []
        self.base.__dict__.pop("_liger", None)

    def report(self) -> str:
        """One line for every kind and state: what it is, whether it is used, and where."""
        lines: dict[tuple[str, str], list[str]] = {}
        for part in self.parts:
            state = part.state
            if isinstance(part, FusedHead) and state in ("new", "on"):
                trouble = head_trouble(self.base, part)
                state = state if trouble is None else f"off: {trouble}"
            lines.setdefault((part.kind, state), []).append(part.name)
        return "\n".join(
            f"{kind:<27}{state:<6}{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
            for (kind, state), names in lines.items()
        ) or "nothing of Liger's"  # fmt: skip


def use_liger(
    model: nn.Module,
    *,
    rms_norm: bool = True,
    rope: bool = True,
    cross_entropy: bool = True,
    fused_linear_cross_entropy: bool | str = "auto",
    **unknown: Any,
) -> Liger:
    """Let parts of one model run on Liger's kernels. Switched off again by `Liger.remove`.

    Args:
        model: of transformers, with or without adapters, on the device it is to run on.
        rms_norm: every RMSNorm.
        rope: the rotary embedding of every attention that calls transformers' `apply_rotary_pos_emb`. Liger rotates in
            place: whoever keeps the outputs of q_proj and k_proj, with a hook for instance, finds them rotated.
        cross_entropy: the loss of a causal language model, where it is computed from logits.
        fused_linear_cross_entropy: head and loss in one, in training steps; their output has no `logits`. "auto": where
            the head is an untouched `torch.nn.Linear`. True: refuse any other head.

    Raises:
        ImportError: liger-kernel is not installed.
        TypeError, ValueError: an unknown option or value; Liger is in the model already;
            `fused_linear_cross_entropy=True` on a head that is adapted, trained beside the adapter, packed or hooked.
    """
    options = {"rms_norm": rms_norm, "rope": rope, "cross_entropy": cross_entropy}
    known = [*options, "fused_linear_cross_entropy"]
    for name in unknown:
        raise TypeError(
            f"use_liger has no option {name}.{close_matches(name, known)} It has {', '.join(known)}; gated MLPs with "
            "adapters are computed together by peftfast.fuse_blocks"
        )
    for name, value in (*options.items(), ("fused_linear_cross_entropy", fused_linear_cross_entropy)):
        if not isinstance(value, bool) and not (name == known[-1] and value == "auto"):
            raise ValueError(f"{name} is True or False{' or auto' * (name == known[-1])}, got {value!r}")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "_liger" in base.__dict__:
        raise ValueError("The model has Liger's kernels already; remove() those first")
    operations = _operations()
    trouble = head_trouble(base)
    if fused_linear_cross_entropy is True and trouble is not None:
        raise ValueError(f"fused_linear_cross_entropy=True: {trouble}")
    modules = list(base.named_modules())
    parts: list[_Part] = []
    if rms_norm:
        parts += [RmsNorm(name, m, operations) for name, m in modules if RmsNorm.fits(m)]
    if rope:
        parts += [Rotary(name, m, operations) for name, m in modules if Rotary.fits(m)]
    if cross_entropy:
        parts.append(CrossEntropy("loss_function", base, operations))
    if fused_linear_cross_entropy and trouble is not None:
        parts.append(NoFusedHead("the model", trouble))
    elif fused_linear_cross_entropy:
        name = _name_of(base, base.get_output_embeddings())
        parts.append(FusedHead(name, base, operations, fused_linear_cross_entropy is True))
    return Liger(base, parts)
