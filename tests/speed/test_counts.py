"""Launches, dispatched operations, bytes moved and kept, counted side by side with PEFT: bench/counts.py as a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("torch", "gpu", "fused", "gpu+blocks", "fused+blocks")


@pytest.fixture(scope="module")
def rows():
    """Rows by (scope, mode, dropout, contestant). In a process of its own: it leaves the kernels out."""
    found = {}
    for scope, modes, dropouts in (
        ("linear", ["bf16 autocast", "bf16", "fp32", "nf4 autocast"], ["0.0", "0.1"]),
        ("layer", ["bf16 autocast"], ["0.0"]),
        ("step", ["bf16 autocast"], ["0.0"]),
    ):
        command = [sys.executable, str(ROOT / "bench/counts.py"), "--json", "--scopes", scope, "--modes", *modes]
        done = subprocess.run(
            [*command, "--dropout", *dropouts],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        for row in json.loads(done.stdout):
            found[row["scope"], row["mode"], row["dropout"], row["contestant"]] = row
    return found


def total(row, what):
    return row[f"{what}_forward"] + row[f"{what}_backward"]


LINEARS = [(mode, p) for mode in ("bf16 autocast", "bf16", "fp32", "nf4 autocast") for p in (0.0, 0.1)]


@pytest.mark.parametrize("mode, p", LINEARS)
def test_one_linear_on_a_gpu(rows, mode, p):
    """Three passes over large operands forward, four backward. The rest is small: sums of rank-sized parts, a seed."""
    peft = rows["linear", mode, p, "peft"]
    for contestant in ("gpu", "fused"):
        row = rows["linear", mode, p, contestant]
        # decoding 4 bits is a launch of its own; an fp32 update of bf16 outputs is a product and a sum
        more = contestant == "gpu" and (("nf4" in mode) + (mode == "bf16"))
        names = [name for name in row["kernels"] if name not in ("sum_parts_kernel", "_to_copy", "randint")]
        bar = names.index("|")
        assert bar <= 3 + more and len(names) - bar - 1 <= 4 + more, names
        # PEFT's decoding of 4 bits counts as one launch here; on a GPU it is three
        assert total(row, "ops") <= 0.8 * total(peft, "ops")
        assert total(row, "moved") < total(peft, "moved")
        # in fp32 without dropout there is nothing but t to keep, for either
        assert row["kept"] <= (1.0 if (mode, p) == ("fp32", 0.0) else 0.2) * peft["kept"]


def test_half_of_peft_where_trainer_runs_it(rows):
    """bf16 base, fp32 factors, autocast: what a Trainer does."""
    peft, ours = (rows["linear", "bf16 autocast", 0.0, name] for name in ("peft", "gpu"))
    assert (peft["launches_forward"], peft["launches_backward"]) == (9, 11)  # so that the counter is known to see
    assert total(ours, "launches") <= 0.5 * total(peft, "launches")
    assert total(ours, "ops") <= 0.5 * total(peft, "ops")
    assert total(ours, "moved") <= 0.5 * total(peft, "moved")
    plain = rows["linear", "bf16 autocast", 0.0, "torch"]
    assert total(plain, "ops") <= 0.5 * total(peft, "ops") and plain["kept"] == ours["kept"]


def test_layer(rows):
    """Beyond what the frozen layer does itself."""
    key = ("layer", "bf16 autocast", 0.0)
    frozen, peft = rows[(*key, "frozen")], rows[(*key, "peft")]

    def beyond(contestant, what):
        row = rows[(*key, contestant)]
        return row["kept"] - frozen["kept"] if what == "kept" else total(row, what) - total(frozen, what)

    for contestant in OURS:
        assert beyond(contestant, "moved") <= 0.5 * beyond("peft", "moved"), contestant
        assert beyond(contestant, "launches") <= 0.5 * beyond("peft", "launches"), contestant
        assert beyond(contestant, "ops") <= 0.65 * beyond("peft", "ops"), contestant
        assert beyond(contestant, "kept") <= 0.6 * beyond("peft", "kept"), contestant
    for path in ("gpu", "fused"):
        blocks, alone = rows[(*key, f"{path}+blocks")], rows[(*key, path)]
        assert total(blocks, "launches") <= total(alone, "launches")
        assert total(blocks, "ops") < total(alone, "ops")
        assert blocks["kept"] < frozen["kept"]  # less than the base alone keeps: the MLP computes its middle again
    assert peft["kept"] > 1.5 * rows[(*key, "gpu+blocks")]["kept"]


def test_casts_are_one_operation_a_step(rows):
    for contestant in ("gpu", "gpu+blocks"):
        kernels = rows["step", "bf16 autocast", 0.0, contestant]["kernels"]
        forward = kernels[: kernels.index("|")]
        assert forward.count("_foreach_copy_") == 1
    ours, peft = (rows["step", "bf16 autocast", 0.0, name] for name in ("gpu", "peft"))
    assert total(ours, "launches") <= 0.8 * total(peft, "launches")
    assert total(ours, "moved") <= 0.8 * total(peft, "moved") and ours["kept"] < peft["kept"]
