"""Kernel tests run on the GPU where there is one, and in Triton's interpreter, on the CPU, everywhere else."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "triton was imported before tests/kernels/conftest.py could choose the interpreter; set TRITON_INTERPRET=1"
        )
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What runs on a GPU here is among the tests that `-m cuda` chooses, which runs after this."""
    if torch.cuda.is_available():
        for item in items:
            if item.path.parent == HERE and "device" in item.fixturenames:
                item.add_marker(pytest.mark.cuda)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """There is no Triton on Windows and macOS: tests that fail for want of it are skipped there."""
    try:
        return (yield)
    except (ModuleNotFoundError, RuntimeError) as error:
        if find_spec("triton") is not None or "triton" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fills every torch.empty with NaN (or a large integer): a kernel that leaves an element unwritten is caught."""
    genuine = torch.empty

    def poisoned(*args, **kwargs):
        tensor = genuine(*args, **kwargs)
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor if tensor.dtype == torch.bool else tensor.fill_(111)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def few_rows_are_many(monkeypatch):
    """On a GPU the cases have too few rows for what many take."""
    if torch.cuda.is_available():
        from peftfast_kernels import lora_routed_kernels

        monkeypatch.setattr(lora_routed_kernels, "ROW_BY_ROW", lora_routed_kernels.ROW_BY_ROW_INTERPRETED)


@pytest.fixture(autouse=True)
def backend_restored():
    from peftfast_kernels import op

    yield
    op.set_backend(None)
