"""Starts the processes of tests that need their own, and reads what each of them found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def start(arguments: list, folder: Path | None = None, timeout: int = 280, **variables: str | None) -> Any:
    """`python *arguments` when it has ended: its `returncode`, `stdout` and `stderr`.

    Args:
        folder: it is started in; None: in that of the tests.
        variables: of the environment; None: without it.
    """
    command = [sys.executable, *map(str, arguments)]
    own = environment(**variables)
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=timeout)


def environment(**variables: str | None) -> dict[str, str]:
    """In which everything of this repository can be imported. One thread: tests run side by side, and threads that wait
    for a core spin."""
    settings = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests"))),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        **variables,
    }
    return {name: value for name, value in settings.items() if value is not None}


def run(arguments: list, folder: Path | None = None, timeout: int = 280, **variables: str | None) -> str:
    """What `start` of the same prints, which must succeed."""
    done = start(arguments, folder, timeout, **variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def launch(script: str, processes: int, folder: Path, *runs: str, timeout: int = 280, **variables: str) -> list[dict]:
    """What every process of `torchrun script folder *runs` leaves in `folder/rank<i>.json`.

    Args:
        variables: of the environment.
    """
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, script, folder, *runs]
    run(command, folder, timeout, **variables)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


def answer(runs: Mapping[str, Callable[[str, Path], dict]]) -> None:
    """Leaves what the runs that are named on the command line find, for `launch` to read.

    Args:
        runs: name -> a run of a kind that writes into a folder; the command line names them `name:kind`.
    """
    import torch.distributed as dist

    folder, *names = sys.argv[1:]
    results = {}
    for name in names:
        what, _, kind = name.partition(":")
        results[name] = runs[what](kind, Path(folder) / name.replace(":", "-"))
    Path(folder, f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
