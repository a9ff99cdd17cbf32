"""What other code does to a model between two calls."""

from __future__ import annotations

import os

import pytest
from trust.mutations import run_mutations


@pytest.mark.filterwarnings("ignore")
def test_random_mutations_between_calls():
    done, failures = run_mutations(int(os.environ.get("PEFTFAST_OPERATIONS", "200")), seed=0)
    assert done >= 200
    assert not failures, "\n".join(failures[:5])
