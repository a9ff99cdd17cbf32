"""Launches, dispatched operations, bytes moved and bytes kept, of peftfast and of PEFT, counted without a GPU.

    python bench/counts.py [--out counts.csv] [--json]
    python bench/counts.py --scopes linear --linear 2048 4096 4096     one linear at M, K, N instead of marker sizes

Everything runs on CPU tensors of marker sizes. Columns `launches` and `moved` are what a GPU would be asked for: torch
operations that are no views, and Triton launches, whose launchers run while the kernels themselves are left out (so the
numbers are garbage and only the counts mean something). `ops` counts every dispatched operation, views included, which
is what the host pays for. `moved` sums the operands of each operation, once each, results included; `kept` sums the
storages that autograd holds, without the input, the parameters and the copies that last as long as the model.

Contestants: frozen (the base alone, the limit), peft, peftfast (`torch`: the plain path; `gpu`: skinny products in
Triton, big ones in cuBLAS; `fused`: big ones in Triton too), and with `+blocks` after `fuse_blocks`.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "1"  # launchers run on CPU tensors; must be set before Triton is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
for _path in (ROOT, ROOT / "kernels"):
    if str(_path) not in sys.path:
        sys.path.insert(0, str(_path))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_flatten  # noqa: E402

from bench.contestants import TARGETS, llama  # noqa: E402
from bench.operands import Model  # noqa: E402
from peftfast_kernels import dispatch, use_backend  # noqa: E402

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, RANK, BATCH, LENGTH = 128, 384, 4, 2, 4, 2, 160
LINEAR = (BATCH * LENGTH, HIDDEN, INTERMEDIATE)  # M, K, N of the scope "linear"
SHAPE = Model("marker", HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HIDDEN // HEADS)
SCOPES = ("linear", "layer", "step")
#: base dtype, whether under bf16 autocast, storage
MODES = {
    "bf16 autocast": (torch.bfloat16, True, "dense"),
    "bf16": (torch.bfloat16, False, "dense"),
    "fp32": (torch.float32, False, "dense"),
    "nf4 autocast": (torch.bfloat16, True, "nf4"),
}
CONTESTANTS = ("frozen", "peft", "torch", "gpu", "fused", "gpu+blocks", "fused+blocks")

_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "set_", "_local_scalar_dense"}
_NO_KERNEL = {"lift_fresh", "detach", "is_pinned", "_reshape_alias", "_unsafe_view", "unsafe_split"}


class Count(NamedTuple):
    """What one pass does."""

    launches: int
    ops: int
    moved: float


class Trace(TorchDispatchMode):
    """Counts torch operations, and Triton launches through `launched`."""

    current: Trace | None = None
    products = True  # False: matrix products are only allocated, for sizes at which a CPU takes too long

    def __init__(self) -> None:
        super().__init__()
        self.ops = 0
        self.calls: list[tuple[str, float]] = []  # launches: name and bytes

    def __enter__(self) -> Trace:
        Trace.current = self
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        Trace.current = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if self.products or name not in ("mm", "addmm", "addmm_"):
            out = func(*args, **(kwargs or {}))
        else:
            out = _product_of(name, args, kwargs or {})
        self.ops += 1
        results = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        view = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.returns)
        if name.startswith("_foreach") or not (view or name in _FREE or name in _NO_KERNEL or not results):
            inputs = [t for t in tree_flatten((args, kwargs or {}))[0] if isinstance(t, Tensor)]
            self.calls.append((name, sum(map(_bytes, (*inputs, *results)))))
        return out

    def launched(self, name: str, tensors: dict[str, Tensor]) -> None:
        """One Triton launch; placeholders repeat another operand and count once, an output in place counts twice."""
        out = tensors.get("out_ptr")
        storages = {t.data_ptr(): _bytes(t) for t in tensors.values()}
        twice = _bytes(out) if out is not None and any(
            t.data_ptr() == out.data_ptr() for n, t in tensors.items() if n == "y_ptr"
        ) else 0.0  # fmt: skip
        self.calls.append((name, sum(storages.values()) + twice))

    def count(self) -> Count:
        # what nn.Dropout is on a GPU is one kernel: a mask and a product
        names = [name for name, _ in self.calls]
        calls = [
            call for i, call in enumerate(self.calls)
            if not (call[0] in ("bernoulli_", "div_") and "bernoulli_" in names[max(i - 1, 0) : i + 1])
        ]  # fmt: skip
        return Count(len(calls), self.ops, sum(moved for _, moved in calls))


def _product_of(name: str, args: tuple, kwargs: dict) -> Tensor:
    """The result of a matrix product, with whatever its memory holds."""
    if name == "addmm_" or "out" in kwargs:
        return args[0] if name == "addmm_" else kwargs["out"]
    left, right = args[-2:]
    return left.new_empty(left.shape[0], right.shape[1], dtype=kwargs.get("out_dtype"))


def _bytes(t: Tensor) -> float:
    """Bytes behind a tensor; broadcast dimensions are read once."""
    elements = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        elements *= size if stride else 1
    return float(elements * t.element_size()) if t.numel() else 0.0


def leave_out_kernels() -> None:
    """Triton launches are counted instead of interpreted."""
    from triton.runtime.interpreter import InterpretedFunction

    def getitem(self, grid):
        def launch(*args, **kwargs):
            named = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
            if Trace.current is not None:
                tensors = {}
                for name, value in named.items():  # those of siblings come in tuples
                    members = {f"{name}{i}": v for i, v in enumerate(value)} if type(value) is tuple else {name: value}
                    tensors |= {n: v for n, v in members.items() if isinstance(v, Tensor)}
                Trace.current.launched(self.fn.__name__, tensors)

        return launch

    InterpretedFunction.__getitem__ = getitem


@contextmanager
def running_as(contestant: str) -> Iterator[None]:
    """The backend of a contestant: `gpu` follows the rules for a GPU without measurements, `fused` fuses always."""
    kind = contestant.partition("+")[0]
    with use_backend("triton" if kind in ("gpu", "fused") else "torch"):
        kept = dispatch.fuses
        if kind == "gpu":
            dispatch.fuses = lambda op, *args: False
        try:
            yield
        finally:
            dispatch.fuses = kept


# ---- what is counted -------------------------------------------------------------------------------------------------
class OneLinear(nn.Module):
    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(k, n, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)


@lru_cache(maxsize=1)  # one after the other, contestants have the same
def base(scope: str, mode: str, k: int, n: int) -> nn.Module:
    dtype, _, storage = MODES[mode]
    layers = 1 if scope == "layer" else 2
    model = OneLinear(k, n).to(dtype) if scope == "linear" else llama(SHAPE, layers, dtype, "cpu", vocabulary=96)
    if storage == "nf4":
        import peftfast

        skip = None if scope == "linear" else ["lm_head"]
        peftfast.quantize_model(model, "nf4", compute_dtype=dtype, skip=skip)
    return model


def built(scope: str, contestant: str, mode: str, dropout: float) -> nn.Module:
    model = copy.deepcopy(base(scope, mode, *LINEAR[1:]))
    if contestant == "frozen":
        return model.requires_grad_(False)
    import importlib

    library = importlib.import_module("peft" if contestant == "peft" else "peftfast")
    targets = TARGETS[:1] if scope == "linear" else TARGETS
    config = library.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules=targets)
    return library.get_peft_model(model, config).train()


def passes(
    scope: str, model: nn.Module, mode: str
) -> tuple[Callable[[], Tensor], Callable[[Tensor], None], list[Tensor]]:
    """Forward, backward (of a step: with the optimizer), and the inputs."""
    dtype, autocast, _ = MODES[mode]
    context = (lambda: torch.autocast("cpu", torch.bfloat16)) if autocast else nullcontext
    if scope == "step":
        ids = torch.randint(0, 96, (BATCH, LENGTH))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, foreach=True) if trained else None
        model.get_input_embeddings().register_forward_hook(lambda m, a, y: y if y.requires_grad else y.requires_grad_())

        def forward() -> Tensor:
            with context():
                return model(input_ids=ids, labels=ids).loss

        def backward(loss: Tensor) -> None:
            loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        return forward, backward, [ids]
    shape = (BATCH, LENGTH, HIDDEN) if scope == "layer" else (BATCH, LINEAR[0] // BATCH, LINEAR[1])
    x = torch.randn(shape).to(torch.bfloat16 if autocast else dtype).requires_grad_()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # a call of the whole model casts the factors of all its layers at once: nothing that one layer would pay for
    casts = getattr(getattr(model, "base_model", None), "compute_copies", nullcontext)
    inner, options = base, {}
    if scope == "layer":
        positions = torch.arange(LENGTH)[None]
        options = {"position_embeddings": base.model.rotary_emb(x, positions), "attention_mask": None}
        inner = base.model.layers[0]

    from peftfast.ops.casts import compute_copy

    def forward() -> Tensor:
        with context(), ExitStack() as stack:
            with _uncounted():
                stack.enter_context(casts())
                for p in filter(lambda p: p.requires_grad, model.parameters()):
                    compute_copy(p, torch.bfloat16)  # the first to ask has all copies made
            y = inner(x, **options)
            return y[0] if isinstance(y, tuple) else y

    def backward(y: Tensor) -> None:
        with _uncounted():
            model.zero_grad()
            x.grad = None
            dy = torch.ones_like(y)
        y.backward(dy)

    return forward, backward, [x]


@contextmanager
def _uncounted() -> Iterator[None]:
    trace = Trace.current
    before = None if trace is None else (trace.ops, len(trace.calls))
    yield
    if trace is not None:
        trace.ops = before[0]
        del trace.calls[before[1] :]


def kept_bytes(forward: Callable[[], Tensor], lasting: list[Tensor]) -> float:
    """Bytes that autograd holds between the passes."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return t

    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or pack(t), lambda t: t):
        out = forward()
    known = {t.untyped_storage().data_ptr() for t in (*lasting, out)}
    return float(sum(size for pointer, size in seen.items() if pointer not in known))


def measure(scope: str, contestant: str, mode: str, dropout: float) -> dict[str, object]:
    """One row of the table."""
    model = built(scope, contestant, mode, dropout)
    with running_as("torch" if contestant in ("frozen", "peft") else contestant):
        if contestant.endswith("+blocks"):
            _attach_blocks(model)
        forward, backward, inputs = passes(scope, model, mode)
        for _ in range(2):  # caches, optimizer state
            with Trace():
                backward(forward())
        with Trace() as first:
            y = forward()
        with Trace() as second:
            backward(y)
        tensors = [*inputs, *model.parameters(), *model.buffers()]
        for parameter in model.parameters():  # what quantised weights keep beside the Parameter
            state = getattr(parameter, "quant_state", None)
            tensors += [t for t in vars(state).values() if isinstance(t, Tensor)] if state is not None else []
            inner = getattr(state, "state2", None)
            tensors += [t for t in vars(inner).values() if isinstance(t, Tensor)] if inner is not None else []
        casts = getattr(getattr(model, "base_model", None), "_casts", None)
        tensors += casts.copies if casts is not None else []
        with Trace():
            kept = kept_bytes(forward, tensors)
    one, two = first.count(), second.count()
    return {
        "scope": scope, "mode": mode, "dropout": dropout, "contestant": contestant,
        "launches_forward": one.launches, "launches_backward": two.launches,
        "ops_forward": one.ops, "ops_backward": two.ops,
        "moved_forward": int(one.moved), "moved_backward": int(two.moved), "kept": int(kept),
        "kernels": [name for name, _ in first.calls] + ["|"] + [name for name, _ in second.calls],
        "bytes": [moved for _, moved in first.calls] + [0.0] + [moved for _, moved in second.calls],
    }  # fmt: skip


def _attach_blocks(model: nn.Module) -> None:
    """With the kernels left out nothing can be compared, so blocks are believed here; tests/speed/test_blocks.py
    compares them."""
    import peftfast
    import peftfast.training.blocks as module

    kept, module.agree = module.agree, lambda ours, theirs: True
    blocks = peftfast.fuse_blocks(model)
    with torch.no_grad(), use_backend("torch"):
        for _ in range(3):
            model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    module.agree = kept
    states = {group.state for group in blocks.groups}
    if states != {"on"}:
        raise RuntimeError(f"blocks are not attached:\n{blocks.report()}")


def sweep(
    modes: list[str], dropouts: list[float], scopes: list[str], contestants: list[str]
) -> Iterator[dict[str, object]]:
    for scope in scopes:
        for mode in modes:
            for dropout in dropouts:
                for contestant in contestants:
                    if contestant == "frozen" and dropout or contestant.endswith("+blocks") and scope == "linear":
                        continue
                    if scope == "step" and contestant in ("torch", "fused"):
                        continue
                    yield measure(scope, contestant, mode, dropout)


def table(rows: list[dict[str, object]]) -> str:
    """Text; bytes in millions, launches and ops as they are."""
    lines = [
        f"{'':<34}{'launches f/b':>14}{'of PEFT':>9}{'ops f/b':>13}{'of PEFT':>9}{'moved MB':>10}{'of PEFT':>9}"
        f"{'kept MB':>9}{'of PEFT':>9}"
    ]
    peft = {(r["scope"], r["mode"], r["dropout"]): r for r in rows if r["contestant"] == "peft"}
    heading = None
    for row in rows:
        key = (row["scope"], row["mode"], row["dropout"])
        if key != heading:
            heading = key
            lines.append(f"{key[0]}, {key[1]}, dropout {key[2]}")
        other = peft.get(key)

        def share(*names: str, row=row, other=other) -> str:
            total = sum(other[n] for n in names) if other else 0
            return f"{sum(row[n] for n in names) / total:.2f}" if total else "-"

        launches, ops, moved = (
            (f"{name}_forward", f"{name}_backward") for name in ("launches", "ops", "moved")
        )  # fmt: skip
        lines.append(
            f"    {row['contestant']:<30}{row[launches[0]]:>8}/{row[launches[1]]:<5}{share(*launches):>9}"
            f"{row[ops[0]]:>7}/{row[ops[1]]:<5}{share(*ops):>9}"
            f"{sum(row[n] for n in moved) / 1e6:>10.2f}{share(*moved):>9}{row['kept'] / 1e6:>9.3f}{share('kept'):>9}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    parser.add_argument("--dropout", nargs="*", type=float, default=[0.0, 0.1])
    parser.add_argument("--scopes", nargs="*", default=list(SCOPES), choices=SCOPES)
    parser.add_argument("--linear", nargs=3, type=int, metavar=("M", "K", "N"), help="sizes of the scope `linear`")
    parser.add_argument("--contestants", nargs="*", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--out", type=Path, help="write the rows as CSV")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON instead of a table")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    leave_out_kernels()
    if args.linear:
        global LINEAR
        LINEAR, Trace.products = tuple(args.linear), False
    rows = list(sweep(args.modes, args.dropout, args.scopes, args.contestants))
    if args.out:
        names = [n for n in rows[0] if n not in ("kernels", "bytes")]
        with args.out.open("w", newline="") as f:
            writer = csv.DictWriter(f, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    print(json.dumps(rows) if args.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
