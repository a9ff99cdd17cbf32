"""A few cases of every attack; `python tests/trust/campaign.py` runs them by the thousand."""

from __future__ import annotations

import os
import sys

import pytest
from trust.attacks import ATTACKS

COUNT = int(os.environ.get("PEFTFAST_ATTACKS", "60"))


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name):
    if name in ("kill -9 while saving", "saves and loads at once") and sys.platform == "win32":
        pytest.skip("needs fork")
    count, failures = ATTACKS[name](min(COUNT, 25) if "kill" in name else COUNT, 0)
    assert count
    assert not failures, "\n".join(failures[:10])
