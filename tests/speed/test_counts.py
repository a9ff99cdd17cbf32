"""Launches, dispatched operations, bytes moved and kept, counted side by side with PEFT: bench/counts.py as a test."""

import json

import pytest
from processes import run

OURS = ("torch", "gpu", "fused", "gpu+blocks", "fused+blocks")


SCRIPT = """
from bench import counts
for arguments in {}:
    counts.main(["--json", *arguments.split(", ")])
"""
RUNS = (
    "--scopes, linear",
    "--scopes, layer, step, --modes, bf16 autocast, --dropout, 0.0",
    "--scopes, linear, --contestants, gpu, fused, --linear, 2048, 4096, 14336",
)


@pytest.fixture(scope="module")
def counted():
    """Rows by (scope, mode, dropout, contestant) of every run. In a process of its own: it leaves the kernels out."""
    tables = map(json.loads, run(["-c", SCRIPT.format(RUNS)], timeout=600).splitlines())
    return [{(row["scope"], row["mode"], row["dropout"], row["contestant"]): row for row in table} for table in tables]


@pytest.fixture
def rows(counted):
    return counted[0] | counted[1]


@pytest.fixture
def real_rows(counted):
    """One linear with M = 2048, K = 4096, N = 14336: shapes at which sums over rows and columns were once split."""
    return counted[2]


def total(row, what):
    return row[f"{what}_forward"] + row[f"{what}_backward"]


LINEARS = [(mode, p) for mode in ("bf16 autocast", "bf16", "fp32", "nf4 autocast") for p in (0.0, 0.1)]


def launches(row, factor_bytes):
    """Forward and backward: every launch but the draw of the seed and casts of what is no larger than a factor."""
    counts, names = [0, 0], []
    for name, moved in zip(row["kernels"], row["bytes"], strict=True):
        backward = "|" in names
        names.append(name)
        # a cast moves its operand and its result, at most 6 bytes an element
        counts[backward] += name not in ("|", "randint") and not (name == "_to_copy" and moved <= 1.5 * factor_bytes)
    return counts, names


def assert_few_launches(row, factor_bytes):
    """Forward: down, the base product, the update in place. Backward: p, the base product, the update, both gradients.

    A decode of 4 bits that is not fused is a launch of its own.
    """
    more = "dequantize_kernel" in row["kernels"]
    assert not more or "nf4" in row["mode"]
    (forward, backward), names = launches(row, factor_bytes)
    assert forward <= 3 + more and backward <= 4 + more, names


@pytest.mark.parametrize("mode, p", LINEARS)
def test_launches_of_a_real_linear(real_rows, mode, p):
    for contestant in ("gpu", "fused"):
        assert_few_launches(real_rows["linear", mode, p, contestant], 4 * 4 * 14336)


@pytest.mark.parametrize("mode, p", LINEARS)
def test_one_linear_on_a_gpu(rows, mode, p):
    peft = rows["linear", mode, p, "peft"]
    for contestant in ("gpu", "fused"):
        row = rows["linear", mode, p, contestant]
        assert_few_launches(row, 4 * 4 * 384)
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


OURS_ON_A_GPU = {"mm", "addmm", "addmm_"}


def test_nine_and_thirteen_launches_a_layer(rows):
    """All of a layer's linears with their adapters and the middle of the MLP, base products included: forward twice two
    for siblings and for single ones, and the gate; the whole layer launches no more than the frozen one."""
    key = ("layer", "bf16 autocast", 0.0)
    frozen, row = rows[(*key, "frozen")], rows[(*key, "fused+blocks")]
    halves = row["kernels"].index("|")
    for names, most in ((row["kernels"][:halves], 9), (row["kernels"][halves + 1 :], 13)):
        own = [name for name in names if name.endswith("_kernel") or name in OURS_ON_A_GPU]
        assert 8 <= len(own) <= most, own
    assert row["launches_forward"] <= frozen["launches_forward"]
    assert row["launches_backward"] <= frozen["launches_backward"]
    # with the big products in cuBLAS: one more pass for the updates of each of the four reads
    assert total(rows[(*key, "gpu+blocks")], "launches") <= total(frozen, "launches") + 14


def test_casts_are_one_operation_a_step(rows):
    for contestant in ("gpu", "gpu+blocks"):
        kernels = rows["step", "bf16 autocast", 0.0, contestant]["kernels"]
        forward = kernels[: kernels.index("|")]
        assert forward.count("_foreach_copy_") == 1
    ours, peft = (rows["step", "bf16 autocast", 0.0, name] for name in ("gpu", "peft"))
    assert total(ours, "launches") <= 0.8 * total(peft, "launches")
    assert total(ours, "moved") <= 0.8 * total(peft, "moved") and ours["kept"] < peft["kept"]
