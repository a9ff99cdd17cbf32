"""The whole benchmark on the GPU present, in one command and at most ten minutes; one minute with --quick.

    python bench/gpu.py [--quick] [--seconds 560] [--only linear layer] [--out bench/results]
    python bench/gpu.py --dry-run                      everything at tiny sizes on the CPU: tests the suite itself

In order, or in that of `--only`: one LoRA linear, one decoder layer, mixed adapters, a training step, decoding, what
the design rests on (`questions`), every op, PEFT under torch.compile, and a proposed dispatch table. A comparison
starts with a gate: the error against an fp64 or fp32 oracle must be no worse than the peer's, otherwise the row is red
and carries no ratio; a peer of a linear that computes something else is red as well, and none to compare with. All
contestants of a row take turns in one process. Times of one linear, of ops and questions are the GPU's own; those of
models (layer, mixed, step, decode) are what a program sees that waits for its host. One tidy CSV (a line per
contestant) with device and versions, written row by row; bench/report.py draws it. What needs a package that is not
there is left out.

An error after which CUDA answers nothing (an illegal address), or a kernel that does not end, costs the case in which
it happens: the run starts anew behind it, in a process of its own, into the same files.
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import gc
import importlib.util
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for _path in (ROOT, ROOT / "kernels", ROOT / "tools"):
    if str(_path) not in sys.path:
        sys.path.insert(0, str(_path))

import torch  # noqa: E402
import tune  # noqa: E402

from bench import contestants as sides  # noqa: E402
from bench import questions  # noqa: E402
from bench.contestants import LIMIT, OURS, PEER, Contestant  # noqa: E402
from bench.measure import (  # noqa: E402
    Clock,
    Deadline,
    Sample,
    device_name,
    is_lost,
    no_worse,
    relative_error,
    versions,
    watched,
)
from bench.operands import BUILDERS, MODELS, TINY, Model, Size, arguments  # noqa: E402
from bench.report import red_file, write_page  # noqa: E402
from peftfast_kernels import OPS  # noqa: E402
from peftfast_kernels.configs import chip_of  # noqa: E402
from peftfast_kernels.row_norm import MAX_RANK  # noqa: E402

FIELDS = (
    "suite", "case", "contestant", "role", "model", "op", "format", "dtype", "m", "n", "k", "r", "dropout", "adapters",
    "us", "q1", "q3", "rounds", "ratio_to_limit", "speedup", "peak_mib", "error", "gate", "flops", "bytes",
    "device", "chip", "versions",
)  # fmt: skip

#: share of the budget that a suite may take, beside what those before it have left over
SHARES = {
    "linear": 0.24, "layer": 0.10, "mixed": 0.05, "step": 0.08, "decode": 0.07, "questions": 0.10, "ops": 0.16,
    "compiled": 0.10, "tune": 0.10,
}  # fmt: skip
LONG = ("compiled", "tune")  # not for a quick look
#: seconds after which a case hangs: a model of full size is made in fewer, and compiled by several compilers
PATIENCE, COMPILING = 90.0, 240.0
BF16, FP16 = torch.bfloat16, torch.float16


class Lost(Exception):
    """CUDA answers nothing any more in this process: (suite, position of the case)."""


class Bench:
    """One run: its clock, its budget, its rows, which go into a file as they come.

    Args:
        after: (suite, position): the cases of that suite up to there are done.
        start_anew: ends the process, behind this case of this suite, when it hangs.
    """

    def __init__(
        self, device: str, seconds: float, quick: bool, dry: bool, path: Path | None = None,
        suites: list[str] | None = None, after: tuple[str, int] = ("", -1),
        start_anew: Callable[[str, int], None] = lambda suite, position: None,
    ) -> None:  # fmt: skip
        self.device, self.quick, self.dry, self.path, self.after = device, quick, dry, path, after
        self.start_anew = start_anew
        self.deadline, self.due = Deadline(seconds), _due(suites or list(SHARES))
        row = 0.02 if dry else 0.08 if quick else 0.25
        self.clock = Clock(device, row, least=2 if dry else 4, most=3 if dry else 25)
        self.rows: list[dict[str, Any]] = []
        self.red: list[str] = []
        self.skipped: dict[str, int] = {}
        self.left_out: dict[str, int] = {}
        self._about = {
            "device": device_name(device), "chip": chip_of(torch.device(device)), "versions": json.dumps(versions())
        }  # fmt: skip

    # ---- one comparison ----------------------------------------------------------------------------------------------
    def compare(self, suite: str, case: str, entrants: list[Contestant], gate: dict[str, tuple[float, bool]],
                size: Size, ahead: bool = True, **more: Any) -> None:  # fmt: skip
        """Time what is there, green or red, and add a row each; nothing that gives NaN or infinities. Ratios are of
        medians, green rows only."""
        broken = [e for e in entrants if gate.get(e.name, (0.0, True))[0] == float("inf")]
        for entrant in broken:
            self._reject(f"{suite} {case} {_shape(size)} {entrant.name}: not finite")
        entrants = [e for e in entrants if e not in broken]
        if not entrants:
            return
        times = self.clock.interleaved({e.name: e.call for e in entrants}, ahead)
        limit = next((times[e.name].median for e in entrants if e.role == LIMIT), None)
        judged = {e.name: gate.get(e.name, (float("nan"), True)) for e in entrants}
        peers = [times[e.name].median for e in entrants if e.role == PEER and judged[e.name][1]]
        for entrant in entrants:
            error, green = judged[entrant.name]
            self._row(suite, case, entrant, times[entrant.name], limit, peers, error, green, size, more)

    def _row(self, suite: str, case: str, entrant: Contestant, sample: Sample, limit: float | None, peers: list[float],
             error: float, green: bool, size: Size, more: dict[str, Any]) -> None:  # fmt: skip
        is_ours = entrant.role == OURS
        if not green:
            self._reject(f"{suite} {case} {_shape(size)} {entrant.name}: error {error:.2e}")
        row = {
            "suite": suite, "case": case, "contestant": entrant.name, "role": entrant.role,
            "format": size.format, "dtype": str(size.dtype)[6:], "m": size.m, "n": size.n, "k": size.k, "r": size.r,
            "dropout": size.dropout, "adapters": size.adapters, "us": round(sample.median, 2),
            "q1": round(sample.q1, 2), "q3": round(sample.q3, 2), "rounds": sample.rounds, "error": error,
            "gate": "green" if green else "red",
            "ratio_to_limit": round(sample.median / limit, 4) if limit and green else None,
            "speedup": round(min(peers) / sample.median, 4) if peers and is_ours and green else None,
            "peak_mib": round(self.clock.peak_bytes(entrant.call) / 2**20, 1),
            **more, **self._about,
        }  # fmt: skip
        self.rows.append({name: row.get(name) for name in FIELDS})
        if self.path is not None:
            is_new = not self.path.exists()
            with self.path.open("a", newline="") as f:
                writer = csv.DictWriter(f, FIELDS)
                if is_new:
                    writer.writeheader()
                writer.writerow(self.rows[-1])

    def _reject(self, text: str) -> None:
        self.red.append(text)
        print(f"  RED  {text}", flush=True)
        if self.path is not None:
            with red_file(self.path).open("a") as f:
                f.write(f"{text}\n")

    def each(self, suite: str, cases: list, work: Callable[[Any], None], size_of: Callable[[Any], Size]) -> None:
        """Every case that the suite's share of the budget has room for, and the first also where the suites before took
        more than theirs. One that fails is reported and counted red."""
        begun = False
        can_quantise = importlib.util.find_spec("bitsandbytes") is not None
        for position, case in enumerate(cases):
            if suite == self.after[0] and position <= self.after[1]:
                continue
            if suite not in OWN_OPERANDS and size_of(case).format != "dense" and not can_quantise:
                self.left_out[suite] = self.left_out.get(suite, 0) + 1
                continue
            if self.deadline.over(self.due[suite] if begun else 1.0):
                self.skipped[suite] = len(cases) - position
                break
            begun = True

            def give_up(position: int = position, case: Any = case) -> None:
                self._reject(f"{suite} {case}: does not end")
                self.start_anew(suite, position)

            try:
                with watched(COMPILING if suite == "compiled" else PATIENCE, give_up):
                    work(case)
            except Exception as error:
                self._reject(f"{suite} {case}: {type(error).__name__}: {error}")
                traceback.print_exc(limit=3)
                if is_lost(self.device):
                    raise Lost(suite, position) from None
            gc.collect()
            gc.freeze()  # modules that the case was the first to import take as long to look through as its comparison
            if self.clock.on_gpu:
                torch.cuda.empty_cache()
        done = sum(row["suite"] == suite for row in self.rows)
        print(f"{self.deadline.used:6.1f} s  {suite}: {done} rows", flush=True)

    # ---- the suites --------------------------------------------------------------------------------------------------
    def questions(self) -> None:
        def ask(question: questions.Question) -> None:
            size, calls = question.size, question.make(self.device)
            entrants = [Contestant(n, PEER, call) for n, call in calls.items()]
            self.compare("questions", question.text, entrants, {}, size, flops=question.flops, bytes=question.bytes)

        self.each("questions", questions.all_questions(self.dry), ask, lambda question: question.size)

    def ops(self) -> None:
        """Every op: its plain path as the peer, Triton as ours."""

        def measure(case: tuple[str, Size]) -> None:
            name, size = case
            op = OPS[name]
            kwargs = arguments(name, size, self.device)

            def say(path: str, error: Exception) -> None:
                self._reject(f"ops {name} {_shape(size)} {path}: {type(error).__name__}: {error}")

            calls, gate = tune.checked(op, kwargs, self.device, say)
            passed = {n: (e, n == "torch" or no_worse(e, gate["torch"], size.dtype)) for n, e in gate.items()}
            entrants = [Contestant(n, PEER if n == "torch" else OURS, c) for n, c in calls.items()]
            cost = op.cost(**kwargs)
            self.compare("ops", name, entrants, passed, size, op=name, flops=cost.flops, bytes=cost.bytes)

        self.each("ops", list(op_cases(self.quick, self.dry)), measure, lambda case: case[1])

    def linear(self) -> None:
        """Forward and backward of one LoRA linear, and of one DoRA linear."""
        self.each("linear", list(linear_cases(self.quick, self.dry)), self._linear_of("linear"), lambda case: case[2])

    def _linear_of(self, suite: str, compiler: str | None = None) -> Callable[[tuple[str, str, Size, bool]], None]:
        def measure(case: tuple[str, str, Size, bool]) -> None:
            model, place, size, dora = case
            entrants = sides.linear(size, self.device, compiler, dora)
            gate = self._gate_between(entrants, size) if dora else self._gate_linear(size, entrants)
            self.compare(suite, f"{'DoRA ' * dora}{place} {size.k}->{size.n}", entrants, gate, size, model=model)

        return measure

    def _gate_linear(self, size: Size, entrants: list[Contestant]) -> dict[str, tuple[float, bool]]:
        """Against fp64, without dropout (every library has masks of its own; the op gate checks ours)."""
        truth = next(e.truth for e in entrants if e.name == "peft")()
        errors = {}
        for entrant in entrants:
            # Unsloth's may write into its input; evaluating would be compiled as well as training
            if entrant.role == LIMIT or entrant.name in ("unsloth", "peft + compile"):
                continue
            found = entrant.results()
            errors[entrant.name] = {n: relative_error(found[n], t) for n, t in truth.items()}
        peer = errors["peft"]
        most = 8 * torch.finfo(size.dtype).eps  # a peer, PEFT itself too, only has to compute the same thing
        return {
            name: (
                max(e.values()),
                all(e[n] < most and (name != "peftfast" or no_worse(e[n], peer[n], size.dtype)) for n in e),
            )
            for name, e in errors.items()
        }

    def _gate_between(self, entrants: list[Contestant], size: Size) -> dict[str, tuple[float, bool]]:
        """Where there is no oracle at hand: ours and PEFT's results agree as far as half precision does."""
        ours, theirs = (next(e for e in entrants if e.name == name).results() for name in ("peftfast", "peft"))
        error = max(relative_error(ours[n], t.float()) for n, t in theirs.items())
        return {"peftfast": (error, error < 8 * torch.finfo(size.dtype).eps)}

    def layer(self) -> None:
        cases = list(layer_cases(self.quick, self.dry))
        self.each("layer", cases, self._model_of("layer", layers=1, step=False), lambda case: case[1])

    def step(self) -> None:
        cases = list(layer_cases(self.quick, self.dry))
        self.each("step", cases, self._model_of("step", layers=2, step=True), lambda case: case[1])

    def _model_of(
        self, suite: str, layers: int, step: bool, compiler: str | None = None
    ) -> Callable[[tuple[Model, Size]], None]:
        def measure(case: tuple[Model, Size]) -> None:
            shape, size = case
            base = sides.llama(shape, layers, size.dtype, self.device, size.format)
            built = sides.models(base, size, compiler)
            length = min(size.m, 2048)
            ids = torch.randint(0, 512, (max(size.m // length, 1), length), device=self.device)
            calls = {n: sides.training_pass(m, ids, size.dtype, step) for n, (_, m) in built.items()}
            for _, (role, model) in built.items():
                model.train(role != LIMIT)
            gate = self._gate_losses(built, ids, size)
            entrants = [Contestant(n, role, calls[n]) for n, (role, _) in built.items()]
            self.compare(suite, f"{layers} layer(s)", entrants, gate, size, ahead=False, model=shape.name)

        return measure

    def compiled(self) -> None:
        """The linears and the layer that most is claimed of, with PEFT under torch.compile beside it: the first time
        takes seconds."""
        compiler = "eager" if self.dry else "inductor"
        one_linear, one_layer = self._linear_of("compiled", compiler), self._model_of("compiled", 1, False, compiler)

        def measure(case: tuple) -> None:
            torch.compiler.reset()  # there is a limit to how often one code is compiled before it is left as it is
            gc.unfreeze()  # what was compiled before is garbage now
            (one_layer if len(case) == 2 else one_linear)(case)

        linears = [case for case in linear_cases(True, self.dry) if case[2].format != "int8"]
        layers = list(layer_cases(True, self.dry))
        cases = [*linears[:2], *layers, *linears[2:]]
        self.each("compiled", cases, measure, lambda case: case[1 if len(case) == 2 else 2])

    def _gate_losses(
        self, built: dict, ids: torch.Tensor, size: Size, gradients: bool = True
    ) -> dict[str, tuple[float, bool]]:
        """Logits and gradients, of as many tokens as are timed, against an fp32 oracle, PEFT's model with everything
        widened, without dropout."""

        def run(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
            return sides.pass_without_dropout(model, ids, dtype, gradients)

        compared = {n: model for n, (role, model) in built.items() if role != LIMIT and "compile" not in n}
        found = {name: run(model, size.dtype) for name, model in compared.items()}
        truth = found["peft"]
        if size.format == "dense":
            truth = run(copy.deepcopy(compared["peft"]).float(), torch.float32)
        errors = {name: {n: relative_error(one[n], t) for n, t in truth.items()} for name, one in found.items()}
        floor = {n: error or 8 * torch.finfo(size.dtype).eps for n, error in errors["peft"].items()}
        return {name: (max(e.values()), all(e[n] <= 1.25 * floor[n] for n in e)) for name, e in errors.items()}

    def decode(self) -> None:
        """Greedy decoding with a cache, per 16 tokens."""

        def measure(case: tuple[Any, Size]) -> None:
            shape, size = case
            base = sides.llama(shape, 2, size.dtype, self.device, size.format)
            built = sides.models(base, size)
            ids = torch.randint(1, 512, (size.m, 16), device=self.device)
            entrants = []
            for name, (role, model) in built.items():
                model.eval()
                entrants.append(Contestant(name, role, sides.decoding(model, ids, 4 if self.dry else 16)))
            gate = self._gate_losses(built, ids, size, gradients=False)
            for _, model in built.values():
                model.eval()
            self.compare("decode", f"batch {size.m}", entrants, gate, size, ahead=False, model=shape.name)

        shape = TINY if self.dry else MODELS[0]
        formats = ("dense",) if self.dry else ("dense", "nf4")
        sizes = [Size(m, 0, 0, 4 if self.dry else 16, format=f) for f in formats for m in (1, 16)]
        self.each("decode", [(shape, s) for s in sizes], measure, lambda case: case[1])

    def mixed(self) -> None:
        """One batch, many adapters: a forward pass."""

        def measure(size: Size) -> None:
            shape = TINY if self.dry else MODELS[0]
            base = sides.llama(shape, 1, size.dtype, self.device)
            ids = torch.randint(0, 512, (size.m, 16), device=self.device)
            entrants, logits = [], {}
            for library, role in (("peftfast", OURS), ("peft", PEER)):
                model, names = sides.mixed(library, copy.deepcopy(base), size, size.adapters)
                chosen = [names[i % len(names)] for i in range(size.m)]

                def call(model=model, chosen=chosen) -> torch.Tensor:
                    with torch.no_grad():
                        return model(input_ids=ids, adapter_names=chosen).logits

                logits[library] = call()
                entrants.append(Contestant(library, role, call))
            error = relative_error(logits["peftfast"], logits["peft"].float())
            gate = {"peftfast": (error, error < 8 * torch.finfo(size.dtype).eps)}
            self.compare("mixed", f"{size.adapters} adapters", entrants, gate, size, ahead=False, model=shape.name)

        counts = ((3, 6),) if self.dry else ((4, 16), (16, 64), (64, 64))
        sizes = [Size(m, 0, 0, 4 if self.dry else 16, adapters=g) for g, m in counts]
        self.each("mixed", sizes, measure, lambda size: size)

    def tune(self) -> None:
        """The rest of the budget goes into a proposed dispatch table."""
        left = max(self.deadline.seconds - self.deadline.used, 3.0)
        path = self.path.with_name(f"dispatch-{self._about['chip']}.json")
        try:
            entries, _ = tune.run(path, self.device, left, self.dry)
        except tune.Lost:
            return  # which is said; the table is there
        print(f"{self.deadline.used:6.1f} s  proposed table: {len(entries)} points -> {path}\n{tune.summary(entries)}")


#: suites whose weights are made here, so that no other package has to quantise them
OWN_OPERANDS = ("questions", "ops")


def _due(suites: list[str]) -> dict[str, float]:
    """suite -> share of the whole budget that is gone when it has to stop."""
    whole, used, due = sum(SHARES[suite] for suite in suites), 0.0, {}
    for suite in suites:
        used += SHARES[suite]
        due[suite] = used / whole
    return due


def _shape(size: Size) -> str:
    dropout = f" p={size.dropout}" if size.dropout else ""
    return f"M={size.m} N={size.n} K={size.k} r={size.r} {str(size.dtype)[6:]} {size.format}{dropout}"


# ---- what is measured, the most telling first ------------------------------------------------------------------------
def op_cases(quick: bool, dry: bool) -> Iterator[tuple[str, Size]]:
    if dry:
        for name in BUILDERS:
            for format in ("dense", "nf4", "int8") if name.endswith(("_gemm", "_gemm_t", "dequantize")) else ("dense",):
                yield name, Size(24, 48, 64, 4, format=format, dropout=0.1 * (format == "dense"), adapters=3)
        return
    points = [(2048, 4096, 4096, 16), (16, 4096, 4096, 16), (8192, 14336, 4096, 16), (2048, 1024, 4096, 16)]
    points += [(2048, 4096, 4096, 8), (2048, 4096, 4096, 64), (2048, 4096, 4096, 256), (16384, 4096, 4096, 16)]
    for m, n, k, r in points[:2] if quick else points:
        for name in BUILDERS:
            if name == "row_norm" and r > MAX_RANK:
                continue
            stored = name.endswith(("_gemm", "_gemm_t", "dequantize", "row_norm"))
            drops = name.endswith(("_down", "_gemm_t", "_factor_grads")) and not name.startswith("routed") and not quick
            for format in ("dense", "nf4", "int8") if stored else ("dense",):
                for p in (0.0, 0.1) if drops else (0.0,):
                    yield name, Size(m, n, k, r, format=format, dropout=p, adapters=8)


def linear_cases(quick: bool, dry: bool) -> Iterator[tuple[str, str, Size, bool]]:
    if dry:
        for format in ("dense", "nf4"):
            for p in (0.0, 0.1):
                yield TINY.name, "q", Size(24, 64, 64, 4, format=format, dropout=p), False
        yield TINY.name, "q", Size(24, 64, 64, 4), True
        return
    llama = MODELS[0].linears()
    seen = set()

    def one(model, place, m, r=16, format="dense", dtype=BF16, p=0.0, dora=False):
        n, k = dict(model.linears())[place]
        size = Size(m, n, k, r, dtype, format, p)
        if (size, dora) not in seen:
            seen.add((size, dora))
            yield model.name, place, size, dora

    first = MODELS[0]
    for m in (2048,) if quick else (2048, 8192):
        for place in ("q", "k/v") if quick else llama:
            yield from one(first, place, m)
    for m in (16, 128):
        yield from one(first, "q", m, format="nf4")
    yield from one(first, "q", 2048, dora=True)
    if quick:
        return
    for p, format in ((0.1, "dense"), (0.0, "nf4"), (0.1, "nf4"), (0.0, "int8")):
        for m in (2048, 16):
            yield from one(first, "q", m, p=p, format=format)
    for m in (1, 128, 512, 1024, 4096, 16384):
        for place in ("q", "k/v"):
            yield from one(first, place, m)
    for r in (8, 64, 256):
        yield from one(first, "q", 2048, r=r)
    yield from one(first, "q", 2048, dtype=FP16)
    for model in MODELS[1:]:
        for place in ("q", "gate/up", "down"):
            yield from one(model, place, 2048)


def layer_cases(quick: bool, dry: bool) -> Iterator[tuple[Any, Size]]:
    if dry:
        yield TINY, Size(32, 0, 0, 4)
        return
    yield MODELS[0], Size(2048, 0, 0)
    if quick:
        return
    for size in (Size(8192, 0, 0), Size(2048, 0, 0, dropout=0.1), Size(2048, 0, 0, format="nf4")):
        yield MODELS[0], size
    yield MODELS[0], Size(256, 0, 0, format="nf4")
    yield MODELS[1], Size(2048, 0, 0)


# ---- the run ---------------------------------------------------------------------------------------------------------
def summary(bench: Bench) -> str:
    """What a person reads first."""
    lines = []
    for row in bench.rows:
        if row["suite"] in ("linear", "layer", "step", "decode", "mixed") and row["role"] == OURS:
            shape = f"M={row['m']} r={row['r']} {row['dtype']} {row['format']} p={row['dropout']}"
            against = f"{row['speedup']:.2f}x the fastest peer" if row["speedup"] else f"gate {row['gate']}"
            over = f", {row['ratio_to_limit']:.3f} of frozen" if row["ratio_to_limit"] else ""
            where = f"{row['suite']:<7}{row['case']:<22}{row['contestant']:<19}{shape:<36}"
            lines.append(f"  {where}{row['us']:>10.1f} us  {against}{over}")
    lines += [f"  RED  {text}" for text in bench.red]
    lines += [f"  skipped for time: {count} cases of {suite}" for suite, count in bench.skipped.items()]
    lines += [f"  left out, without bitsandbytes: {count} cases of {suite}" for suite, count in bench.left_out.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one minute: the few rows that tell most")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, no claims")
    parser.add_argument("--seconds", type=float, help="budget (default 560, with --quick 55)")
    parser.add_argument("--only", nargs="*", choices=SHARES, help="suites to run, in this order")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of CSV, page and table")
    parser.add_argument("--csv", type=Path, help="file of the rows; what is in it stays (default: a new one)")
    parser.add_argument("--after", nargs=2, default=("", "-1"), help=argparse.SUPPRESS)  # of a run that starts anew
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no GPU here; --dry-run runs everything at tiny sizes on the CPU")
    warnings.simplefilter("ignore")
    torch.backends.cuda.matmul.allow_tf32 = False
    device = "cpu" if args.dry_run else "cuda"
    seconds = args.seconds or (55 if args.quick else 560)
    suites = args.only or [suite for suite in SHARES if not (args.quick and suite in LONG)]
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = args.csv or args.out / f"{chip_of(torch.device(device))}-{stamp}{'-dry' * args.dry_run}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    after = (args.after[0], int(args.after[1]))

    def start_anew(suite: str, position: int) -> None:
        _start_anew(args, path, bench.deadline, suites[suites.index(suite) :], suite, position)

    bench = Bench(device, seconds, args.quick, args.dry_run, path, suites, after, start_anew)
    print(f"{bench._about['device']}, {bench._about['versions']}", flush=True)
    bench.clock.warm_up(1.0 if args.quick else 3.0)
    for suite in suites:
        try:
            getattr(bench, suite)()
        except Lost as lost:
            start_anew(*lost.args)
    print(summary(bench))
    print(f"{len(bench.rows)} rows in {bench.deadline.used:.0f} s -> {path}")
    if args.dry_run:
        print("dry run: the times mean nothing")
    if path.exists():
        print(f"page -> {write_page(path)}")
    return 1 if bench.red or after[0] else 0  # a run that starts anew has lost a case


def _start_anew(
    args: argparse.Namespace, path: Path, deadline: Deadline, rest: list[str], suite: str, position: int
) -> None:
    """This program in place of this process, for the cases after the one in which the GPU was lost."""
    print(f"{deadline.used:6.1f} s  the GPU answers nothing any more: starting anew", flush=True)
    left = max(deadline.seconds - deadline.used, 1.0)
    command = [__file__, "--csv", str(path), "--seconds", f"{left:.0f}", "--after", suite, str(position)]
    os.execv(sys.executable, [sys.executable, *command, *["--quick"] * args.quick, "--only", *rest])


if __name__ == "__main__":
    sys.exit(main())
