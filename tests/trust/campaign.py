"""All attacks in full, as a table: `python tests/trust/campaign.py [cases per kind] [seed]`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]


def main(count: int, seed: int) -> int:
    import torch
    from trust.attacks import ATTACKS
    from trust.operations import run_operations

    torch.set_num_threads(1)
    jobs = {**ATTACKS, "state machine": run_operations}
    limits = {"kill -9 while saving": 500, "state machine": 10_000, "saves and loads at once": 2_000}
    bad = 0
    print("| attack | cases | failures | seconds |\n|---|---:|---:|---:|", flush=True)
    for name, job in jobs.items():
        start = time.perf_counter()
        cases, failures = job(min(count, limits.get(name, count)), seed)
        print(f"| {name} | {cases:,} | {len(failures)} | {time.perf_counter() - start:.0f} |", flush=True)
        for failure in failures[:5]:
            print(f"  {failure[:300]}", file=sys.stderr, flush=True)
        bad += len(failures)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 13_000, int(sys.argv[2]) if len(sys.argv) > 2 else 0))
