"""One thread and a fixed seed for every test, so that figures repeat."""

import os
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # before anything imports triton: tests/kernels runs kernels in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure():
    """Triton 3.6 turns arrays of one element into numbers, which NumPy ended: hundreds of tests would say no more."""
    if torch.cuda.is_available() or find_spec("triton") is None:
        return
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        raise pytest.UsageError("the interpreter of Triton 3.6 needs NumPy below 2.4: pip install 'numpy<2.4'")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid, location):
    """After an illegal address CUDA answers nothing but errors in a process: of what follows nothing would be known."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except Exception as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(3)  # its next test runs in a new process
        pytest.exit(f"the GPU is lost after {nodeid}: {error}", 3)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def users_masks(request):
    """Outside tests/kernels, dropout masks come from where a user's would, although the interpreter is switched on."""
    from peftfast_kernels import device_masks

    with nullcontext() if request.path.parent.name == "kernels" else device_masks(False):
        yield


@pytest.fixture
def large_products():
    """Linear layers take every input as they take large ones, also on a CPU."""
    from peftfast.ops import composed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composed, "SMALL", {})
        yield


@pytest.fixture(autouse=True, scope="session")
def exact_bitsandbytes():
    """`test_storage.py` covers the packing of AVX512-BF16 CPUs by itself."""
    try:
        from portable_bitsandbytes import evaluate_exactly
    except ImportError:
        return
    evaluate_exactly()
