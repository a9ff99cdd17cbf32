"""The benches of times on a CPU, at sizes at which times mean nothing: they come to the end of their tables."""

import importlib
import sys

import oracle
import pytest
from processes import ROOT

from peftfast.ops import composed

SMALL = {
    "train_step": "--hidden 64 --layers 1 --tokens 16 --dtype fp32 autocast --rounds 1",
    "decode_step": "--hidden 64 --layers 1 --batch 1 --context 4 --tokens 2 --rounds 1",
    "methods": "--hidden 64 --layers 1 --tokens 16 --rounds 1",
    "adapters": "--adapters 3 --layers 1 --runs 1 --mix-hidden 32 --mix-tokens 1 --merge-layers 1 --merge-hidden 32",
    "small_products": "--widths 32 --tokens 4 --dropout 0",
    "experts": "--experts 4 --hidden 64 --inner 32 --layers 1 --tokens 16 --rounds 1 --implementation grouped_mm",
    "experts --rows": "--experts 4 --hidden 64 --inner 32 --layers 1 --rows 4 --row-tokens 2 --adapters 2 --rounds 1",
}


@pytest.fixture
def load(monkeypatch):
    """A script by its name, whose folder is on the path as if it were run."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.setattr(composed, "SMALL", composed.SMALL)  # which one of them replaces
    return lambda name: importlib.import_module(f"bench.{name}")


@pytest.mark.parametrize("name", SMALL)
def test_tables_are_filled(name, load, monkeypatch, capsys):
    if name == "methods":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(sys, "argv", [name, *SMALL[name].split()])
    load(name.partition(" ")[0]).main()
    head, rule, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows and {line.count("|") for line in (head, rule, *rows)} == {head.count("|")}
    assert not any("nan" in row for row in rows)


def test_small_products_are_computed_in_both_ways(load):
    calls = load("small_products").contestants("fp32", 0.0, 32, 4)
    function, ours = (oracle.python_calls(calls[way]) for way in ("function", "composed"))
    assert ours < 0.8 * function, (ours, function)
