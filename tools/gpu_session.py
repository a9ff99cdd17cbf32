"""Everything that only a GPU can answer, in one command and a given time: for a machine that is there for minutes.

    python tools/gpu_session.py --out FOLDER [--seconds 480]
    python tools/gpu_session.py --out FOLDER --dry-run           tiny sizes on the CPU: tests the tool itself

In this order: what the machine is (where Triton does not run at all, that is the end), the tests marked cuda (while
others compile what will be measured), the dispatch table of this chip, the benchmark with it, the host's time, peak
memory. Each is a process with a time limit, and the next ones get the time that it leaves; one that fails or does not
end takes nothing from the others. Everything is written as it is found, why a test failed too, so that a session which
is cut off leaves what it has:

    session.log, tests.log                 what was printed
    <chip>.json                            the table; PEFTFAST_TABLES=FOLDER uses it
    bench.csv, bench.html                  rows and page of bench/gpu.py
    host_gpu_path.md, peak_memory.md

Packages that are not installed there and lie in a folder: PYTHONPATH=FOLDER. Without bitsandbytes (5 MB, of its
libraries the one of PyTorch's CUDA alone) no row over 4-bit or int8 weights is measured.

Last, also in session.log, stand a few lines that say how it went. Exit status 1: a test failed, a row is red, or a step
did not come to its end.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

START = 20.0  # seconds in which a process has imported everything and, at its end, drawn its page
NO_KERNELS = 77  # exit status of a machine that costs no more minutes
HOW = "(PASSED|FAILED|ERROR|SKIPPED)"
#: of a test's end, as pytest prints it by itself and as it does for several processes
LINE = re.compile(rf"^(?:(tests/\S+::.*?) {HOW}\b|\[gw\d+\].*? {HOW} (tests/\S+::.*\S))", re.MULTILINE)
#: of a file of tests that cannot be imported, by itself and at pytest's end
FILE = re.compile(r"^(?:ERROR )?(tests/\S+\.py)(?: - .*)?$", re.MULTILINE)
#: of tests that fail, so many are written out as they do, and so much of each
FAILURES, TRACEBACK = 60, 4000
#: suites of the benchmark; what the table has measured already comes last
TARGETED = ("linear", "layer", "mixed", "step", "decode", "questions", "compiled", "ops")


class Step(NamedTuple):
    """A process: its arguments for Python, its weight among the steps to come, and where its output goes.

    `seconds` is an option that takes the time it has; `beside` starts with it and ends with it at the latest.
    """

    name: str
    arguments: tuple[str, ...]
    weight: float
    log: str = "session.log"
    seconds: bool = False
    beside: Step | None = None


def steps(out: Path, dry: bool) -> list[Step]:
    """In the order of what must not be missing."""
    dryness = ("--dry-run",) * dry
    workers = min(8, os.cpu_count() or 1)
    spread = ("-n", str(workers)) if importlib.util.find_spec("xdist") and not dry else ()
    marked = ["tests/lora/test_host_bound.py"] if dry else marked_files()
    # a file that cannot be imported there has nothing to do with the others; what hangs is to say where
    options = ("-v", "-p", "no:cacheprovider", "--color=no", "--continue-on-collection-errors", "--tb=short")
    options += ("-p", "tools.gpu_session", "-o", "faulthandler_timeout=60")
    tests = ("-m", "pytest", "-m", "cuda", *options, *spread, *marked)
    tune = ("tools/tune.py", *dryness)
    suites = ("questions",) if dry else TARGETED
    bench = ("bench/gpu.py", "--csv", str(out / "bench.csv"), "--only", *suites, *dryness)
    host = ("bench/host_gpu_path.py", "--only", *(("linear",) if dry else ("linear", "layer")), "--seconds", "0.2")
    found = [
        Step("machine", ("tools/gpu_session.py", "--machine", "--out", str(out)), 8),
        Step("tests", tests, 24, "tests.log",
             beside=Step("compiling", (*tune, "--compile", str(1 if dry else workers)), 0, seconds=True)),
        Step("table", (*tune, "--out", str(out)), 22, seconds=True),
        Step("benchmark", bench, 36, seconds=True),
        Step("host", host, 10, "host_gpu_path.md"),
        Step("memory", ("bench/peak_memory.py",), 5, "peak_memory.md"),
    ]  # fmt: skip
    return found[:-1] if dry else found  # the last has no dry form


def marked_files() -> list[str]:
    """What has tests marked cuda: every process that runs tests would collect all the others as well, for longer than
    some of the marked ones run."""
    found = {path for path in (ROOT / "tests").rglob("*.py") if "mark.cuda" in path.read_text()}
    files = [path.parent if path.name == "conftest.py" else path for path in sorted(found)]
    return [str(path.relative_to(ROOT)) for path in files if not {*path.parents} & {*files}]


def pytest_sessionstart(session: Any) -> None:
    """pytest's, for which this file is a plugin. In a process that runs tests for another one there is no terminal."""
    global _terminal
    _terminal = session.config.pluginmanager.get_plugin("terminalreporter")


def pytest_runtest_logreport(report: Any) -> None:
    """pytest shows failures when all is over, which may be too late. What is merely printed here would be captured."""
    global _failures
    if report.failed and _failures < FAILURES and _terminal is not None:
        _failures += 1
        _terminal.write_line(f"\n{report.nodeid}\n{str(report.longrepr)[-TRACEBACK:]}")
        _terminal.flush()


pytest_collectreport = pytest_runtest_logreport  # of a file that cannot be imported

_failures, _terminal = 0, None


class Running:
    """A step that was started."""

    def __init__(self, step: Step, out: Path, limit: float) -> None:
        self.step, self.start = step, time.perf_counter()
        seconds = ("--seconds", f"{max(limit - START, limit / 4):.0f}") if step.seconds else ()
        paths = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": paths, "PEFTFAST_TABLES": str(out), "PYTHONUNBUFFERED": "1"}
        with (out / step.log).open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *step.arguments, *seconds], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp,  # whoever ends our session ends it too
            )  # fmt: skip

    def result(self, limit: float) -> str:
        """How it ended: "ok", "exit status 1", "stopped after 30 s"."""
        try:
            code = self.process.wait(max(limit, 0))
            return "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            return f"stopped after {time.perf_counter() - self.start:.0f} s"

    def end(self) -> None:
        """Nothing of it goes on, not what it started either. Interrupted, tests say what has failed until then."""
        for how in (signal.SIGINT, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, how)
                self.process.wait(4)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue


def run(todo: list[Step], out: Path, seconds: float) -> dict[str, str]:
    """Step -> how it ended."""
    out.mkdir(parents=True, exist_ok=True)
    end, results = time.perf_counter() + seconds, {}
    for position, step in enumerate(todo):
        left = end - time.perf_counter()
        limit = left * step.weight / sum(one.weight for one in todo[position:])
        beside = Running(step.beside, out, limit) if step.beside else None
        running = Running(step, out, limit)
        try:
            results[step.name] = running.result(limit)
        finally:
            running.end()
            if beside is not None:
                beside.end()
            for path in out.glob("*.new"):  # of a table that was being written
                path.unlink()
        say(out, f"{time.perf_counter() - running.start:6.1f} s  {step.name}: {results[step.name]}")
        if results[step.name] == f"exit status {NO_KERNELS}":
            break
    return results


def say(out: Path, text: str) -> None:
    print(text, flush=True)
    with (out / "session.log").open("a") as log:
        log.write(text + "\n")


# ---- what was found --------------------------------------------------------------------------------------------------
def summary(out: Path) -> tuple[str, bool]:
    """The last lines, and whether all is well."""
    from bench.report import read, slow_rows, verdicts, write_page

    lines, well = [], True
    names: dict[str, list[str]] = {"PASSED": [], "FAILED": [], "ERROR": [], "SKIPPED": []}
    log = _text(out / "tests.log")
    for alone, how, spread, name in LINE.findall(log):
        names[how or spread].append(alone or name)
    names["ERROR"] += dict.fromkeys(FILE.findall(log))
    lines.append("tests: " + ", ".join(f"{len(found)} {how.lower()}" for how, found in names.items()))
    broken = names["FAILED"] + names["ERROR"]
    lines += [f"  FAILED  {name}" for name in broken[:20]]
    well &= not broken and (bool(names["PASSED"]) or not (out / "tests.log").exists())
    for path in sorted(out.glob("*.json")):
        table = json.loads(path.read_text())
        choices = [entry["choice"] for entry in table["entries"]]
        counts = ", ".join(f"{choices.count(one)} {one}" for one in ("triton", "torch", "split"))
        bound = "not measured" if table["host_bound"] is None else f"{table['host_bound']:.3g} multiply-adds"
        lines.append(f"table {path.name}: {len(choices)} points, {counts}; bound by the host: up to {bound}")
    rows = read(out / "bench.csv") if (out / "bench.csv").exists() else []
    said = _text(out / "session.log").splitlines()
    red = list(dict.fromkeys(line for line in said if line.startswith("  RED  ")))  # each stands there twice
    lines.append(f"benchmark: {len(rows)} rows; red there and in the table: {len(red)}")
    lines += red[:20]
    lines += [line for line in said if line.startswith(("  skipped for time: ", "  left out, without "))]
    well &= bool(rows) and not red
    if rows:
        lines += [f"  {state:<13} {text}: {figure}" for text, figure, state in verdicts(rows)]
        lines += [f"  slower: {text}" for text in slow_rows(rows)[:10]]
        try:
            write_page(out / "bench.csv")  # the benchmark's own is missing where it was stopped
        except Exception as error:
            lines.append(f"no page: {type(error).__name__}: {error}")
    return "\n".join(lines), well


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def machine() -> int:
    """Versions, the device, and whether the first kernel of ours does what it should."""
    sys.path.insert(0, str(ROOT / "kernels"))
    import torch

    from bench.measure import device_name, relative_error, versions
    from peftfast_kernels import lora_down, use_backend
    from peftfast_kernels.op import has_triton_gpu

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    include = Path(sysconfig.get_paths()["include"]) / "Python.h"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(
        f"{device_name(device)}, {os.cpu_count()} cores; C compiler: {compiler}; {include} is there: {include.exists()}"
    )
    if on_gpu and not has_triton_gpu(torch.device("cuda", 0)):  # which says why
        print("Triton does not run here: nothing of ours would be measured, and the session ends")
        return NO_KERNELS
    if on_gpu:
        about = torch.cuda.get_device_properties(0)
        print(f"sm_{about.major}{about.minor}, {about.total_memory / 2**30:.0f} GiB, {about.multi_processor_count} SMs")
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv"]
        if shutil.which(query[0]):
            print(subprocess.run(query, capture_output=True, text=True).stdout.strip())
    x, a = torch.randn(128, 256, device=device).bfloat16(), torch.randn(16, 256, device=device).bfloat16()
    with use_backend("triton" if on_gpu else "torch"):
        error = relative_error(lora_down(x, a, None, 0.0), x.double() @ a.double().t())
    print(f"first kernel: error {error:.1e}")
    return 0 if error < 0.01 else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that is written")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny sizes, no claims")
    parser.add_argument("--machine", action="store_true", help="the first step only")
    args = parser.parse_args(argv)
    if args.machine:
        return machine()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended before
    out = args.out.resolve()
    if (out / "session.log").exists():  # its failures would be counted again, and its table be what tests run with
        parser.error(f"{out} holds a session already; name a new folder")
    try:
        results = run(steps(out, args.dry_run), out, args.seconds)
    finally:  # of a session that is ended from outside too
        text, well = summary(out)
        say(out, "\n" + text)
    return 0 if well and all(how == "ok" for how in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
