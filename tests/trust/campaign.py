"""All attacks in full, as a table: `python tests/trust/campaign.py [cases per kind] [seed] [minutes]`.

They run in rounds, each kind with a seed of its own per round, so that a campaign cut short by its minutes has tried
every kind; the table on stdout counts what was run. Failures go to stderr as they come, with the round's seed and size,
which repeat them: `ATTACKS[name](size, seed)`.
"""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
ROUND = 500
#: Cases in all and per round, of the kinds that cost more than a load.
LIMITS = {"kill -9 while saving": (500, 20), "state machine": (10_000, 400), "saves and loads at once": (2_000, 80)}


def main(count: int, seed: int, minutes: float) -> int:
    import numpy
    import safetensors
    import torch
    from trust.attacks import ATTACKS
    from trust.operations import run

    import peftfast

    torch.set_num_threads(1)
    jobs = {**ATTACKS, "state machine": run}
    done, failed, seconds = dict.fromkeys(jobs, 0), dict.fromkeys(jobs, 0), dict.fromkeys(jobs, 0.0)
    end = time.monotonic() + 60 * minutes
    number = 0
    while True:
        before = sum(done.values())
        for name, job in jobs.items():
            limit, size = LIMITS.get(name, (count, ROUND))
            size = min(size, min(count, limit) - done[name])
            if size <= 0 or time.monotonic() > end:
                continue
            start = time.perf_counter()
            cases, failures = job(size, seed + number)
            seconds[name] += time.perf_counter() - start
            done[name] += cases
            failed[name] += len(failures)
            for failure in failures:
                print(f"{name}({size}, {seed + number}): {failure[:300]}", file=sys.stderr, flush=True)
        number += 1
        total = f"{sum(done.values()):,} cases, {sum(failed.values())} failures"
        print(f"round {number}: {total}", file=sys.stderr, flush=True)
        if sum(done.values()) == before:
            break
    print(f"peftfast {peftfast.__version__}, torch {torch.__version__}, safetensors {safetensors.__version__}, numpy "
          f"{numpy.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}; seeds "
          f"{seed} to {seed + number - 1}\n")  # fmt: skip
    print("| attack | cases | failures | seconds |\n|---|---:|---:|---:|")
    for name in jobs:
        print(f"| {name} | {done[name]:,} | {failed[name]} | {seconds[name]:.0f} |")
    total = [sum(x.values()) for x in (done, failed, seconds)]
    print(f"| all | {total[0]:,} | {total[1]} | {total[2]:.0f} |")
    return bool(total[1])


if __name__ == "__main__":
    given = [float(x) for x in sys.argv[1:]]
    cases, first, limit = (*given, *(13_000, 0, float("inf"))[len(given) :])
    sys.exit(main(int(cases), int(first), limit))
