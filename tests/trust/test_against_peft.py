"""Random operations on a model here and on one in PEFT."""

from __future__ import annotations

import os

from trust.against_peft import run_against_peft


def test_random_operations_as_in_peft():
    done, failures = run_against_peft(int(os.environ.get("PEFTFAST_OPERATIONS", "200")), seed=0)
    assert done >= 200
    assert not failures, "\n".join(failures[:5])
