"""Host time of the path that a GPU takes: peftfast's launches, PEFT's torch operations, and the frozen base.

    python bench/host_gpu_path.py                         all tables
    python bench/host_gpu_path.py --only ops linear       some of them; --seconds 0.1 is quicker and less sure
    python bench/host_gpu_path.py --profile "linear, dropout 0.1"     where peftfast's time goes in one row
    python tools/fake_gpu bench/host_gpu_path.py          without a GPU, all contestants through PyTorch's CUDA build
    python tools/fake_gpu bench/host_gpu_path.py --instructions       counted instead of timed (`bench/instructions.py`)

Everything is tiny, so that nothing but Python and dispatch takes time. Without a GPU peftfast's launches go through a
stub driver (`bench/stub_gpu.py`): all of Triton's and our Python and Triton's launcher in C run, and the driver's
library that it calls is a stub. PEFT and the frozen base run on CPU tensors, and so do the products that peftfast
leaves to cuBLAS; what they take there stands for their dispatch on a GPU, and is less. Where there is a GPU the same
calls run on it, with Triton's own driver, and nothing is pretended. Under `tools/fake_gpu` everybody's operations are
dispatched to CUDA, and only CUDA and cuBLAS themselves take no time. There and on a GPU inputs as small as these are
left to torch's products (`peftfast/ops/host_bound.py`); over the stub driver they take the kernels, as larger ones do.

Times are of the process, not of the wall: the minimum of many rounds, contestants taking turns.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import importlib
import importlib.util
import pstats
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
for _path in (ROOT, ROOT / "kernels"):
    if str(_path) not in sys.path:
        sys.path.insert(0, str(_path))

from bench import stub_gpu  # noqa: E402
from bench.contestants import TARGETS, attach, llama, wrap  # noqa: E402
from bench.instructions import Counter, run_in_valgrind  # noqa: E402
from bench.measure import print_row, print_table_head, print_versions  # noqa: E402
from bench.operands import Model, Size  # noqa: E402
from peftfast_kernels import OPS, dense, use_backend  # noqa: E402

WIDTH, ROWS, RANK = 32, 4, 8  # sizes at which a product on the CPU takes about what a call of cuBLAS takes the host
LAYERS = 4  # in a row, as in a model: what is done once for all of them is shared
LINEARS = 7 * LAYERS
LLAMA = Model("tiny", WIDTH, 2 * WIDTH, 2, 1, 16)
HALF = torch.bfloat16
TABLES = ("ops", "linear", "layer", "methods")
Calls = Mapping[str, Callable[[], object]]


def on_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> str:
    return "cuda" if on_gpu() else "cpu"


@contextmanager
def ours() -> Iterator[None]:
    """A context in which peftfast takes the path of a GPU; of a stub, that of its kernels."""
    if on_gpu():
        yield
        return
    from peftfast import autocast
    from peftfast.ops.host_bound import host_bound_up_to

    kind_of = autocast._kind
    with stub_gpu.pretended(), host_bound_up_to(0):
        autocast._kind = lambda x: "cpu"  # where autocast is
        try:
            yield
        finally:
            autocast._kind = kind_of


#: What a call of each takes.
Measure = Callable[[Calls], dict[str, float]]


def host_instructions(calls: Calls, count: Counter) -> dict[str, float]:
    """Thousands of instructions a call."""
    found = {}
    for name, call in calls.items():
        with ours() if name.startswith("peftfast") else nullcontext():
            found[name] = count(call) / 1000
    return found


def host_time(calls: Calls, seconds: float, rounds: int = 3) -> dict[str, float]:
    """Microseconds a call, the least that was seen."""
    best = dict.fromkeys(calls, float("inf"))
    for name, call in [*calls.items()] * rounds:
        with ours() if name.startswith("peftfast") else nullcontext():
            best[name] = min(best[name], _least(call, seconds))
    return {name: 1e6 * one for name, one in best.items()}


def _least(call: Callable[[], object], seconds: float) -> float:
    start = time.perf_counter()
    for _ in range(50):  # compilation, caches, the interpreter's adaption to classes that pretending changed
        start = time.perf_counter()
        call()
    # few at a time, which a neighbour may leave in peace, and enough for the clock
    repeats = max(1, round(2e-4 / (time.perf_counter() - start)))
    gc.collect()
    gc.disable()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        if on_gpu():
            torch.cuda.synchronize()
        start = time.process_time()
        for _ in range(repeats):
            call()
        best = min(best, (time.process_time() - start) / repeats)
    gc.enable()
    return best


# ---- ops -------------------------------------------------------------------------------------------------------------
def op_calls() -> Calls:
    def made(*shape: int) -> Tensor:
        return torch.randn(shape, device=device()).to(HALF)

    x, dy, a, b, t = made(ROWS, WIDTH), made(ROWS, WIDTH), made(RANK, WIDTH), made(WIDTH, RANK), made(ROWS, RANK)
    seed, w = torch.tensor(5, device=device()), dense(made(WIDTH, WIDTH))
    grads = (torch.float32, torch.float32)
    three = {"x": [x] * 3, "dy": [dy] * 3, "a": [a] * 3, "b": [b] * 3, "t": [t] * 3, "w": [w] * 3}
    none, zeros, twos = [None] * 3, [0.0] * 3, [2.0] * 3
    seeds, probs = [seed] * 3, [0.1] * 3
    found = {
        "lora_down": (x, a, None, 0.0),
        "lora_down, dropout": (x, a, seed, 0.1),
        "lora_gemm": (x, w, None, t, b, 2.0),
        "lora_dt": (dy, b, 2.0),
        "lora_gemm_t": (dy, w, t, a, None, 0.0),
        "lora_gemm_t, dropout": (dy, w, t, a, seed, 0.1),
        "lora_factor_grads": (dy, t, x, t, None, 0.0, 2.0, *grads),
        "lora_factor_grads, dropout": (dy, t, x, t, seed, 0.1, 2.0, *grads),
        "siblings_down": (x, three["a"], none, zeros),
        "siblings_down, dropout": (x, three["a"], seeds, probs),
        "siblings_gemm": (x, three["w"], none, three["t"], three["b"], twos),
        "siblings_dt": (three["dy"], three["b"], twos),
        "siblings_gemm_t": (three["dy"], three["w"], three["t"], three["a"], none, zeros),
        "siblings_gemm_t, dropout": (three["dy"], three["w"], three["t"], three["a"], seeds, probs),
        "siblings_factor_grads": (three["dy"], three["t"], x, three["t"], none, zeros, twos, *grads),
        "siblings_factor_grads, dropout": (three["dy"], three["t"], x, three["t"], seeds, probs, twos, *grads),
        "gated": (dy, dy, "silu"),
        "gated_grad": (dy, dy, dy, "silu"),
    }
    calls: dict[str, Callable[[], object]] = {
        f"peftfast {name}": partial(OPS[name.partition(",")[0]], *args) for name, args in found.items()
    }
    calls["torch.mm"] = lambda: torch.mm(x, w.tensors[0])
    calls["torch.addmm_"] = lambda: dy.addmm_(t, a)
    return calls


# ---- one linear, one decoder layer -----------------------------------------------------------------------------------
def row() -> nn.Sequential:
    """Linears, each called with the output of the one before: what a backward pass costs as a whole is shared."""
    options: dict[str, Any] = {"bias": False, "device": device(), "dtype": HALF}
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, **options) for _ in range(LINEARS)]).requires_grad_(False)


def autocast() -> Any:
    return torch.autocast(device(), HALF)


def calls_of(run: Callable[[], Tensor], x: Tensor, model: nn.Module) -> Calls:
    """Forward, forward with backward, and inference without autocast, of what gives one tensor."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def be(training: bool) -> None:
        if model.training is not training:
            model.train(training)

    with autocast():
        dy = torch.ones_like(run())

    def forward() -> None:
        be(True)
        with autocast():
            run()

    def both() -> None:
        be(True)
        with autocast():
            y = run()
        y.backward(dy)
        x.grad = None
        for p in trained:
            p.grad = None

    def inference() -> None:
        be(False)
        with torch.no_grad():
            run()

    return {"forward": forward, "forward and backward": both, "inference": inference}


def window(model: nn.Module) -> Any:
    """peftfast casts the factors of all layers at once, in the first layer of a model's forward that asks for one."""
    return getattr(getattr(model, "base_model", None), "compute_copies", nullcontext)()


def linear_calls(library: str, dropout: float) -> Calls:
    size = Size(ROWS, WIDTH, WIDTH, RANK, HALF, dropout=dropout)
    names = [str(i) for i in range(LINEARS)]
    model = row() if library == "frozen" else wrap(library, row(), size, names)
    base = model if library == "frozen" else model.get_base_model()
    x = torch.randn(1, ROWS, WIDTH, device=device()).to(HALF).requires_grad_()

    def run() -> Tensor:
        with window(model):
            return base(x)

    return calls_of(run, x, model)


def lora(library: str, model: nn.Module, dropout: float) -> nn.Module:
    return wrap(library, model, Size(ROWS, WIDTH, WIDTH, RANK, HALF, dropout=dropout), TARGETS)


#: name -> (library, model) -> the model with adapters of another method, or stored otherwise
METHODS: dict[str, Callable[[str, nn.Module], nn.Module]] = {
    "DoRA": lambda library, model: wrap(library, model, Size(ROWS, WIDTH, WIDTH, RANK, HALF), TARGETS, dora=True),
    "IA3": lambda library, model: adapted(
        library, model, "IA3Config", target_modules=TARGETS, feedforward_modules=["down_proj"]
    ),
    "AdaLoRA": lambda library, model: adapted(
        library, model, "AdaLoraConfig", target_modules=TARGETS, init_r=RANK, target_r=RANK // 2, total_step=10**6
    ),
    "LoRA, bf16 factors": lambda library, model: lora(library, model, 0.0).to(HALF),
    "LoRA on NF4": lambda library, model: lora(library, model, 0.0),
}


def adapted(library: str, model: nn.Module, config: str, **fields: Any) -> nn.Module:
    module = importlib.import_module(library)
    return module.get_peft_model(model, getattr(module, config)(**fields)).train()


def in_nf4(model: nn.Module) -> nn.Module:
    """Quantised on the CPU, where bitsandbytes' library computes."""
    import peftfast

    peftfast.quantize_model(model.to("cpu"), "nf4", compute_dtype=HALF)
    return model.to(device())


def layer_calls(library: str, dropout: float, method: Callable[[str, nn.Module], nn.Module] | None = None) -> Calls:
    model = llama(LLAMA, LAYERS, HALF, device())
    if method is METHODS["LoRA on NF4"]:
        model = in_nf4(model)
    if library != "frozen":
        name = library.partition(" ")[0]
        model = lora(name, model, dropout) if method is None else method(name, model)
    if library.endswith("blocks"):
        import peftfast

        blocks = peftfast.fuse_blocks(model)
        with use_backend("auto" if on_gpu() else "torch"):  # where blocks are compared with what they replace
            attach(blocks, model)
    base = model if library == "frozen" else model.get_base_model()
    x = torch.randn(1, ROWS, WIDTH, device=device()).to(HALF).requires_grad_()
    options = {
        "position_embeddings": base.model.rotary_emb(x, torch.arange(ROWS, device=device())[None]),
        "attention_mask": None,
    }

    def run() -> Tensor:
        with window(model):
            y = x
            for layer in base.model.layers:
                y = layer(y, **options)
            return y

    return calls_of(run, x, model)


def scopes(only: list[str]) -> dict[str, tuple[Callable[[str, float], Calls], tuple[str, ...]]]:
    libraries = ("frozen", "peft", "peftfast")
    found = {"linear": (linear_calls, libraries), "layer": (layer_calls, (*libraries, "peftfast + blocks"))}
    return {name: one for name, one in found.items() if name in only}


# ---- tables ----------------------------------------------------------------------------------------------------------
def print_ops(measure: Measure, unit: str) -> None:
    print_table_head("op", unit)
    for name, us in measure(op_calls()).items():
        print_row(name.removeprefix("peftfast "), us, digits=1)
    print()


def print_scope(build: Callable[[str, float], Calls], libraries: tuple[str, ...], name: str, measure: Measure) -> None:
    print_table_head(name, *libraries, "peftfast / PEFT", "beyond frozen")
    for dropout in (0.0, 0.1):
        built = {library: build(library, dropout) for library in libraries}
        for what in ("forward", "forward and backward", *(() if dropout else ("inference",))):
            us = measure({library: calls[what] for library, calls in built.items()})
            us = {library: time / (LAYERS if name == "layer" else LINEARS) for library, time in us.items()}
            best, frozen = min(us[one] for one in libraries[2:]), us["frozen"]
            shares = best / us["peft"], (best - frozen) / (us["peft"] - frozen)
            print_row(f"{what}, dropout {dropout}", *(f"{us[one]:.0f}" for one in libraries), *shares, digits=2)
    print()


def print_methods(measure: Measure) -> None:
    """A decoder layer with adapters of other methods."""
    libraries = ("frozen", "peft", "peftfast")
    print_table_head("layer", *libraries, "peftfast / PEFT")
    for name, method in METHODS.items():
        if name.endswith("NF4") and not (on_gpu() and importlib.util.find_spec("bitsandbytes")):
            continue  # PEFT's products would be bitsandbytes' on the CPU
        built = {library: layer_calls(library, 0.0, method) for library in libraries}
        for what in ("forward", "forward and backward", "inference"):
            us = measure({library: calls[what] for library, calls in built.items()})
            times = (f"{us[library] / LAYERS:.0f}" for library in libraries)
            print_row(f"{name}, {what}", *times, us["peftfast"] / us["peft"], digits=2)


def profile(row: str) -> None:
    """cProfile of peftfast's calls of one row: an op's name, or e.g. "layer, dropout 0.1"."""
    scope, _, rest = row.partition(", ")
    if scope in TABLES[1:]:
        build, libraries = scopes([scope])[scope]
        call = build(libraries[-1], float(rest.removeprefix("dropout ") or 0))["forward and backward"]
    else:
        call = op_calls()[f"peftfast {row}"]
    with ours():
        for _ in range(20):
            call()
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(1000):
            call()
        profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(TABLES), choices=TABLES)
    parser.add_argument("--profile", metavar="ROW", help="print where the time of one row goes, instead of tables")
    parser.add_argument("--instructions", action="store_true", help="count thousands of them in place of microseconds")
    parser.add_argument("--seconds", type=float, default=0.3, help="that a call is repeated for, each of three times")
    args = parser.parse_args(argv)
    measure: Measure = partial(host_time, seconds=args.seconds)
    unit = "us"
    if args.instructions:
        run_in_valgrind()
        measure, unit = partial(host_instructions, count=Counter()), "thousand instructions"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print_versions(torch.cuda.get_device_name() if on_gpu() else "no GPU: Triton's driver is a stub")
    with nullcontext() if on_gpu() else stub_gpu.active():
        if args.profile:
            profile(args.profile)
            return 0
        if "ops" in args.only:
            print_ops(measure, unit)
        for name, (build, libraries) in scopes(args.only).items():
            print_scope(build, libraries, name, measure)
        if "methods" in args.only:
            print_methods(measure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
