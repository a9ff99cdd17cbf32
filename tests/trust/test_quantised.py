"""Random operations on adapters of quantised layers."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("bitsandbytes")

from trust.quantised import run_quantised


def test_random_operations_on_quantised_layers():
    done, failures = run_quantised(int(os.environ.get("PEFTFAST_OPERATIONS", "150")), seed=0)
    assert done >= 150
    assert not failures, "\n".join(failures[:5])
