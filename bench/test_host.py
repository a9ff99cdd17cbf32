"""Host time on the CPU at sizes where nothing else counts: peftfast, PEFT and the frozen base.

    pip install '.[bench]' && python -m pytest bench/test_host.py --benchmark-group-by=group --benchmark-columns=min,iqr

Not part of the test suite (times are no assertion on a shared machine). Times are of the process, not of the wall, so
that neighbours disturb them less; compare the `min` column within a group. What must hold on any machine is counted:
tests/speed/test_counts.py.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.contestants import TARGETS, attach, llama, wrap
from bench.operands import TINY, Size

pytestmark = pytest.mark.benchmark(timer=time.process_time, min_rounds=20, max_time=1.0, disable_gc=True, warmup=True)
LIBRARIES = ("frozen", "peft", "peftfast", "peftfast + blocks")
WIDTH = 64


class _Bare(torch.autograd.Function):
    """Nothing but the products: what any autograd Function of a LoRA linear costs the host at least."""

    @staticmethod
    def forward(ctx, x, a, b, w, scale):
        t, y = F.linear(x, a), F.linear(x, w)
        y.addmm_(t, b.t(), alpha=scale)
        ctx.save_for_backward(x, t, a, b, w)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, dy):
        x, t, a, b, w = ctx.saved_tensors
        p = torch.addmm(_ZERO, dy, b, beta=0, alpha=ctx.scale)
        db = torch.addmm(_ZERO, dy.t(), t, beta=0, alpha=ctx.scale)
        return torch.mm(dy, w).addmm_(p, a), torch.mm(p.t(), x), db, None, None


_ZERO = torch.zeros(())


class Bare(nn.Module):
    """The floor: not a product of any library."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"a": (8, WIDTH), "b": (WIDTH, 8), "w": (WIDTH, WIDTH)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape), requires_grad=name != "w"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Bare.apply(x, self.a, self.b, self.w, 2.0)


def wrapped(library: str, base: nn.Module) -> nn.Module:
    """`base` with LoRA; blocks attached where the name says so."""
    torch.set_num_threads(1)
    if library == "frozen":
        return base.requires_grad_(False)
    model = wrap(library.partition(" ")[0], base, Size(0, 0, 0, r=8), TARGETS)
    if library.endswith("blocks"):
        import peftfast

        attach(peftfast.fuse_blocks(model), model)
    return model


def many(call: Callable[[], object], times: int = 20) -> Callable[[], None]:
    """Long enough for the process clock to resolve."""

    def run() -> None:
        for _ in range(times):
            call()

    return run


@pytest.mark.parametrize("library", ["bare", *LIBRARIES[:3]])
@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("what", ["inference", "forward", "forward and backward"])
def test_linear(benchmark, library, amp, what):
    """Twenty calls of one layer with four rows."""
    if library == "bare":
        if amp:
            pytest.skip("the floor is measured without casts")
        layer = Bare()
    else:
        model = wrapped(library, nn.ModuleDict({"q_proj": nn.Linear(WIDTH, WIDTH, bias=False)}))
        layer = (model.get_base_model() if library != "frozen" else model).q_proj
    x, dy = torch.randn(4, WIDTH, requires_grad=True), torch.randn(4, WIDTH)

    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp), torch.set_grad_enabled(what != "inference"):
            y = layer(x)
        if what.endswith("backward"):
            y.backward(dy.to(y.dtype))

    benchmark.group = f"linear, {what}, {'autocast' if amp else 'fp32'}"
    benchmark(many(call))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("what", ["inference", "training step"])
def test_model(benchmark, library, what):
    """Two decoder layers, eight tokens, autocast as a Trainer runs it."""
    model = wrapped(library, llama(TINY, 2, torch.float32, "cpu"))
    ids = torch.randint(0, 512, (1, 8))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0) if trained else None

    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(what != "inference"):
            embeds = model.get_input_embeddings()(ids).detach().requires_grad_(what != "inference")
            loss = model(inputs_embeds=embeds, labels=ids).loss
        if what != "inference":
            loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

    benchmark.group = f"model, {what}"
    benchmark(many(call, 3))


@pytest.mark.parametrize("library", ["peft", "peftfast"])
def test_set_adapter(benchmark, library):
    """Switching between eight adapters on fourteen layers."""
    model = wrapped(library, llama(TINY, 2, torch.float32, "cpu"))
    module = importlib.import_module(library)
    for i in range(1, 8):
        model.add_adapter(f"task{i}", module.LoraConfig(r=8, target_modules=TARGETS))
    names = ["default", *(f"task{i}" for i in range(1, 8))]

    def call() -> None:
        for name in names:
            model.set_adapter(name)

    benchmark.group = "set_adapter, eight times"
    benchmark(call)
