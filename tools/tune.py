"""Measures every path of every op on the chip present and writes the dispatch table that a user's calls follow.

    python tools/tune.py [--seconds 240] [--out proposed.json]     on a GPU; --install puts it beside the shipped ones
    python tools/tune.py --compile 8 [--seconds 60]                measures nothing: 8 processes compile what would be
    python tools/tune.py --dry-run --out table.json                tiny shapes on the CPU, to test the tool itself

A path whose error is worse than plain torch's is never chosen, whatever its time; nor is a path chosen that is faster
by less than the noise: torch keeps the point. The table is written as it grows, so that a run that is killed leaves
what it measured. Compiling takes more of the budget than measuring where Triton's cache is empty.

An error after which CUDA answers nothing (an illegal address), or a kernel that does not end, costs the op in the
format and dtype in which it happens: the point becomes torch's, and the run starts anew behind it, in a process of its
own, into the same file.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for path in (ROOT, ROOT / "kernels"):
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from bench.contestants import wrap  # noqa: E402
from bench.measure import Clock, Deadline, device_name, is_lost, no_worse, relative_error, versions, watched  # noqa: E402
from bench.operands import MODELS, TINY, Size, arguments  # noqa: E402
from peftfast.ops.host_bound import host_bound_up_to  # noqa: E402
from peftfast_kernels import OPS, Op, device_masks, dispatch, use_backend  # noqa: E402
from peftfast_kernels.configs import chip_of  # noqa: E402
from peftfast_kernels.dispatch import point_of  # noqa: E402
from peftfast_kernels.row_norm import MAX_RANK  # noqa: E402

#: Seconds after which a point hangs.
PATIENCE = 60.0

#: op -> whether it reads a stored weight (and so is measured per format), and whether dropout changes it
TUNED = {
    "lora_gemm": (True, False),
    "lora_gemm_t": (True, True),
    "lora_down": (False, True),
    "lora_dt": (False, False),
    "lora_factor_grads": (False, True),
    "siblings_gemm": (True, False),
    "siblings_gemm_t": (True, True),
    "siblings_down": (False, True),
    "siblings_dt": (False, False),
    "siblings_factor_grads": (False, True),
    "lora_add": (False, False),
    "lora_dx": (False, True),
    "dora_add": (False, False),
    "feature_scale": (False, False),
    "feature_scale_grad": (False, False),
    "gated": (False, False),
    "gated_grad": (False, False),
    "row_norm": (True, False),
    "dequantize": (True, False),
}
_WITH_FACTORS = ("lora_", "siblings_", "dora_")
MARGIN = 0.97  # a path must take less than this share of torch's time to be chosen


def decide(times: Mapping[str, float], errors: Mapping[str, float]) -> str:
    """The fastest path whose error is no worse than torch's; torch where nothing is clearly faster."""
    green = {name: time for name, time in times.items() if is_right(name, errors)}
    best = min(green, key=green.__getitem__)
    return best if green[best] < MARGIN * green["torch"] else "torch"


def is_right(path: str, errors: Mapping[str, float]) -> bool:
    """Whether a path's error is no worse than torch's."""
    return path == "torch" or no_worse(errors[path], errors["torch"], torch.bfloat16)


@contextmanager
def _never_fused() -> Iterator[None]:
    kept = dispatch.fuses, dispatch.fuses_together
    dispatch.fuses = dispatch.fuses_together = lambda *args: False
    try:
        yield
    finally:
        dispatch.fuses, dispatch.fuses_together = kept


def paths(op: Op, kwargs: Mapping, on_gpu: bool) -> dict:
    """Path name -> a call without arguments. On a CPU only torch's, which stands in for the others in a dry run."""
    calls = {"torch": lambda: op.eager(**kwargs)}
    if not on_gpu:
        return calls

    def triton():
        with use_backend("triton"):
            return op.launch(**kwargs)

    def split():
        with _never_fused():
            return op.launch(**kwargs)

    calls["triton"] = triton
    masked, wide = kwargs.get("seed") is not None, point_of(tuple(kwargs.values())).dtype.endswith("+wide")
    if op.name.startswith("siblings_gemm") or op.name in ("lora_gemm", "lora_gemm_t") and (masked or wide):
        calls["split"] = split
    return calls


def sizes(dry: bool) -> Iterator[list[Size]]:
    """The sizes of one model after another, the most telling first, so that a budget that ends early leaves a usable
    table."""
    if dry:
        yield [Size(m, n, k, 4) for m in (1, 24) for n, k in TINY.linears().values()]
        return
    seen = set()
    for rows in ((16, 128, 2048), (1, 64, 512, 8192), (4, 32, 256, 1024, 4096, 16384)):
        for rank in (16, 64, 8, 256):
            for model in MODELS[:1] if rank != 16 else (MODELS[0], MODELS[1], MODELS[3]):
                found = [Size(m, n, k, rank) for n, k in model.linears().values() for m in rows]
                yield [size for size in found if size not in seen]
                seen.update(found)


def points(dry: bool) -> Iterator[tuple[str, Size]]:
    """Every op at every size, in every format and with dropout where that matters to it, and at the usual rank, after
    what is usual of a model, with fp32 factors beside half-precision activations."""
    for some in sizes(dry):
        for wide, size in [(wide, size) for wide in (False, True) for size in some if not wide or dry or size.r == 16]:
            for name, (stored, drops) in TUNED.items():
                if wide and not name.startswith(_WITH_FACTORS) or name == "row_norm" and size.r > MAX_RANK:
                    continue
                for format in ("dense", "nf4") if stored and not wide else ("dense",):
                    for dropout in (0.0, 0.1) if drops else (0.0,):
                        yield name, size._replace(format=format, dropout=dropout, wide=wide)


class Lost(Exception):
    """CUDA answers nothing any more in this process."""


def tune(
    device: str, deadline: Deadline, dry: bool, entries: Sequence[dict] = (),
    hangs: Callable[[dict], None] = lambda entry: None,
) -> Iterator[dict]:  # fmt: skip
    """Entries of a table beside those that there are, until the budget is spent. A point that fails is reported and
    left out; the one in which the GPU was lost is torch's, and the last. `hangs` is told of one that does not end."""
    known = {(e["op"], dispatch.Point(e["format"], e["dtype"], e["drop"], tuple(e["sizes"]))) for e in entries}
    lost = {(e["op"], e["format"], e["dtype"], e["drop"]) for e in entries if not e["times_us"]}
    clock = Clock(device, seconds=0.02 if dry else 0.06, least=2 if dry else 5, most=3 if dry else 9)
    clock.warm_up()
    for name, size in points(dry):
        if deadline.over():
            return
        point = None
        try:
            kwargs = arguments(name, size, device)
            point = point_of(tuple(kwargs.values()))
            # skinny ops do not see every size; what has lost the GPU once would lose it again
            if (name, point) not in known and (name, *point[:3]) not in lost:
                known.add((name, point))

                def give_up(name: str = name, point: dispatch.Point = point) -> None:
                    print(f"  RED  table: {name} {point}: does not end", flush=True)
                    hangs(_entry(name, point, "torch", {}, {}))

                with watched(PATIENCE, give_up):
                    entry = _measure(OPS[name], kwargs, point, clock)
                yield entry
        except Exception as error:
            print(f"  {name} {size}: {_first_line(error)}", flush=True)
            if is_lost(device):
                print(f"  RED  table: {name} {point}: the GPU answers nothing any more", flush=True)
                if point is not None:
                    yield _entry(name, point, "torch", {}, {})
                raise Lost from None


def compile_part(part: int, of: int, seconds: float, device: str, dry: bool) -> None:
    """Run every path of every so many-th point once, which leaves its kernels in Triton's cache."""
    deadline = Deadline(seconds)
    for index, (name, size) in enumerate(points(dry)):
        if index % of != part:
            continue
        if deadline.over():
            return
        try:
            for call in paths(OPS[name], arguments(name, size, device), device == "cuda").values():
                call()
        except Exception as error:  # which the measurement will say as well
            if is_lost(device):
                print(f"  {name} {size}: {_first_line(error)}; process {part} ends", flush=True)
                return


def host_bound(device: str, dry: bool) -> int:
    """Multiply-adds of a product up to which `peftfast/ops/host_bound.py` is the faster way for layers in a row, in the
    time that a program sees; 0 where it never is."""
    width, layers = (32, 2) if dry else (2048, 16)
    linears = [nn.Linear(width, width, bias=False, device=device, dtype=torch.bfloat16) for _ in range(layers)]
    base = nn.Sequential(*linears).requires_grad_(False)
    model = wrap("peftfast", base, Size(1, width, width, 16), [str(i) for i in range(layers)])
    clock = Clock(device, seconds=1.0, least=2 if dry else 9, most=3 if dry else 31)
    clock.warm_up()
    found = 0
    for rows in (16, 32) if dry else [1 << i for i in range(6, 15)]:
        x = torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)

        def step(limit: int, x: torch.Tensor = x) -> None:
            with host_bound_up_to(limit), torch.autocast(device, torch.bfloat16):
                y = model(x)
            y.backward(torch.ones_like(y))

        calls = {"host bound": partial(step, 1 << 62), "kernels": partial(step, 0)}
        times = {name: sample.median / layers for name, sample in clock.interleaved(calls, ahead=False).items()}
        shown = ", ".join(f"{name} {time:.1f}" for name, time in times.items())
        print(f"  {rows} rows of {width}, us a linear: {shown}", flush=True)
        if times["host bound"] > times["kernels"]:
            break
        found = rows * width * width
    return found


def checked(op: Op, kwargs: Mapping, device: str, say: Callable[[str, Exception], None]) -> tuple[dict, dict]:
    """Path name -> its call, and -> its error against the reference. `say` is told of a path that this chip refuses,
    which is no reason to lose the others."""
    truth = _tuple(op.reference(**kwargs))
    working, errors = {}, {}
    for name, call in paths(op, kwargs, device.startswith("cuda")).items():
        try:
            with device_masks():  # the reference's masks, in a dry run too
                out = _tuple(call())
        except Exception as error:
            if name == "torch" or is_lost(device):  # nothing to compare with
                raise
            say(name, error)
            continue
        working[name], errors[name] = call, max(relative_error(o, t) for o, t in zip(out, truth, strict=True))
    return working, errors


def _measure(op: Op, kwargs: dict, point: dispatch.Point, clock: Clock) -> dict:
    def red(path: str, why: str) -> None:
        print(f"  RED  table: {op.name} {point} {path}: {why}", flush=True)

    working, errors = checked(op, kwargs, clock.device, lambda path, error: red(path, _first_line(error)))
    for name in errors:
        if not is_right(name, errors):  # nobody else might look at so large a size
            red(name, f"error {errors[name]:.2e}")
    times = {name: sample.median for name, sample in clock.interleaved(working).items()}
    return _entry(op.name, point, decide(times, errors), {n: round(t, 2) for n, t in times.items()}, errors)


def _entry(op: str, point: dispatch.Point, choice: str, times: Mapping, errors: Mapping) -> dict:
    return {
        "op": op, "format": point.format, "dtype": point.dtype, "drop": point.drop, "sizes": list(point.sizes),
        "choice": choice, "times_us": times, "error": errors,
    }  # fmt: skip


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _tuple(value) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def run(
    path: Path, device: str, seconds: float, dry: bool, resume: bool = False, start_anew: Callable[[], None] = int
) -> tuple[list[dict], int | None]:
    """A table at `path`, written anew every few seconds: its entries, and what `host_bound` found. With `resume` it
    goes on with what stands there. Raises `Lost` once everything is written; calls `start_anew` then where a point does
    not end."""
    deadline, entries, products = Deadline(seconds), [], None
    head = {  # asked for beforehand: a GPU that is lost might not even say its name
        "chip": chip_of(torch.device(device)), "device": device_name(device), "dry_run": dry,
        "measured": datetime.date.today().isoformat(), "versions": versions(),
    }  # fmt: skip
    if resume:
        found = json.loads(path.read_text())
        entries, products = found["entries"], found["host_bound"]

    def hangs(entry: dict) -> None:
        write([*entries, entry], products, path, head)
        start_anew()

    try:
        if not resume:
            try:
                products = host_bound(device, dry)
            except Exception as error:
                print(f"  host bound: {_first_line(error)}", flush=True)  # what is predicted stays
                if is_lost(device):
                    raise Lost from None
        written = deadline.used
        for entry in tune(device, deadline, dry, tuple(entries), hangs):
            entries.append(entry)
            if deadline.used > written + 5:
                write(entries, products, path, head)
                written = deadline.used
    finally:
        write(entries, products, path, head)
    return entries, products


def write(entries: list[dict], products: int | None, path: Path, about: dict) -> None:
    """The file that `dispatch.Table.read` reads, one entry a line."""
    head = {**about, "host_bound": products}
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(head, indent=1)[:-2] + f',\n "entries": [\n{lines}\n]}}\n')
    dispatch.Table.read(new)
    new.replace(path)


def summary(entries: list[dict]) -> str:
    """How often each path won, per op and format."""
    counts: dict[tuple, dict[str, int]] = {}
    for entry in entries:
        row = counts.setdefault((entry["op"], entry["format"], "dropout" if entry["drop"] else ""), {})
        row[entry["choice"]] = row.get(entry["choice"], 0) + 1
    lines = (f"  {' '.join(filter(None, key)):<32} {wins}" for key, wins in sorted(counts.items()))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--out", type=Path, help="file, or folder for <chip>.json; default: bench/results")
    parser.add_argument("--compile", type=int, metavar="N", help="compile only, in N processes")
    parser.add_argument("--install", action="store_true", help="write to the folder that peftfast reads")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny shapes, never installed")
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)  # of a run that starts anew
    args = parser.parse_args(argv)
    if args.install and args.dry_run:
        parser.error("--install: a dry run has nothing to install")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no GPU here; --dry-run tests the tool on the CPU")
    device = "cpu" if args.dry_run else "cuda"
    if args.compile:
        spawn = multiprocessing.get_context("spawn")
        work = [(part, args.compile, args.seconds, device, args.dry_run) for part in range(args.compile)]
        processes = [spawn.Process(target=compile_part, args=one, daemon=True) for one in work]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return max(abs(process.exitcode) for process in processes)
    out = args.out or (dispatch.TABLES if args.install else ROOT / "bench" / "results")
    out = out if out.suffix else out / f"{chip_of(torch.device(device))}.json"
    deadline = Deadline(args.seconds)

    def start_anew() -> None:
        left = max(deadline.seconds - deadline.used, 1.0)
        command = [__file__, "--out", str(out), "--seconds", f"{left:.0f}", "--resume", *["--dry-run"] * args.dry_run]
        os.execv(sys.executable, [sys.executable, *command])

    try:
        entries, products = run(out, device, args.seconds, args.dry_run, args.resume, start_anew)
    except Lost:
        start_anew()
    print(f"{len(entries)} points on {device_name(device)} -> {out}\n{summary(entries)}")
    if products is not None:
        print(f"  linears are bound by the host up to {products:.3g} multiply-adds")
    return 0 if entries and not args.resume else 1  # a run that starts anew has lost a point


if __name__ == "__main__":
    sys.exit(main())
