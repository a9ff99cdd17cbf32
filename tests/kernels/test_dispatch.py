"""Who runs: environment variable, device, compiler; and that nothing needs Triton until a kernel is launched."""

import importlib
import sys
import textwrap
import threading
from types import SimpleNamespace

import pytest
import torch
from oracle import Operations
from processes import ROOT, start

from peftfast_kernels import OPS, get_backend, lora_down, lora_gemm_t, op, set_backend, use_backend
from peftfast_kernels.decode import dense


def run_python(code, **variables):
    """Where there are the kernels, and nothing else of this repository."""
    alone = {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_INTERPRET": None}
    return start(["-c", textwrap.dedent(code)], **{**alone, **variables})


def test_import_loads_no_triton():
    done = run_python("import sys, peftfast_kernels; assert 'triton' not in sys.modules")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("reason", ["Failed to find C compiler", "triton.knobs"])
def test_where_triton_does_not_work_torch_computes(reason, monkeypatch):
    class Driver:
        @property
        def active(self):
            raise RuntimeError(reason)

    triton = pytest.importorskip("triton")
    if reason == "triton.knobs":  # another release has none
        monkeypatch.delitem(sys.modules, "peftfast_kernels.launch", raising=False)
        monkeypatch.setitem(sys.modules, "triton.knobs", None)
        monkeypatch.delattr(triton, "knobs")
    else:
        monkeypatch.setattr(importlib.import_module("peftfast_kernels.launch"), "driver", Driver())
    monkeypatch.setattr(op, "_usable", {})
    monkeypatch.setattr(op, "_has_driver", op._has_driver.__wrapped__)
    monkeypatch.setattr(op, "is_interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda")
    with pytest.warns(UserWarning, match=f"plain torch.*{reason}"):
        assert not op.has_triton_gpu(gpu)
    assert not op.has_triton_gpu(gpu)  # it is not tried, or said, again


@pytest.mark.parametrize("capability, usable", [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_gpus_without_matrix_units_that_triton_uses_are_left_to_torch(monkeypatch, capability, usable):
    """Each by itself: there may be several kinds in a machine."""
    monkeypatch.setattr(op, "_usable", {0: True})
    monkeypatch.setattr(op, "has_triton", lambda: True)
    monkeypatch.setattr(op, "_has_driver", lambda: True)
    monkeypatch.setattr(op, "is_interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert op.has_triton_gpu(torch.device("cuda", 0)) and op.has_triton_gpu(torch.device("cuda", 1)) == usable


def test_what_is_kept_on_a_gpu_is_written_where_its_memory_is_asked_for():
    """In another thread, on its stream: on the caller's, the memory might still be read by what had it before."""
    made = SimpleNamespace(to=lambda device: (device, threading.get_ident()))
    gpu = SimpleNamespace(type="cuda")
    device, thread = op.lasting(made, gpu)
    assert device is gpu and thread != threading.get_ident()


def test_compilers_do_not_follow_the_search_for_triton(monkeypatch):
    """torch 2.11's cannot: every compiled model on a GPU was in pieces, and `fullgraph=True` an error."""
    monkeypatch.setattr(op, "has_triton", lambda: torch._dynamo.graph_break() is None)
    monkeypatch.setattr(op, "is_interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda", 0)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + op.has_triton_gpu(gpu), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)) == 1


def test_everything_runs_with_triton_blocked():
    done = run_python(
        """
        import sys
        sys.modules["triton"] = None
        import torch
        from peftfast_kernels import OPS, set_backend
        count = 0
        for name, op in OPS.items():
            for case in op.cases():
                kwargs = case.make("cpu")
                out = op(**kwargs)
                ref = op.reference(**kwargs)
                out, ref = (value if isinstance(value, (tuple, list)) else (value,) for value in (out, ref))
                for one, two in zip(out, ref, strict=True):
                    torch.testing.assert_close(one.double(), two.double(), rtol=0.05, atol=0.05)
                    count += 1
        try:
            OPS["lora_down"].launch
        except RuntimeError as error:
            assert "not installed" in str(error)
        else:
            raise AssertionError("a launcher without triton")
        print(count)
        """,
        TRITON_INTERPRET="1",  # the kernels' dropout masks, which the reference has
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 200


def test_unknown_backend_names_the_alternatives():
    with pytest.raises(ValueError, match="'cuda'.*'auto', 'torch', 'triton'"):
        set_backend("cuda")
    done = run_python("import peftfast_kernels as k; k.get_backend()", PEFTFAST_BACKEND="cudnn")
    assert done.returncode != 0 and "PEFTFAST_BACKEND: unknown backend 'cudnn'" in done.stderr


def test_forced_triton_on_the_cpu_needs_the_interpreter():
    done = run_python(
        "import torch, peftfast_kernels as k; k.lora_down(torch.ones(2, 4), torch.ones(1, 4), None, 0.0)",
        PEFTFAST_BACKEND="triton",
    )
    assert done.returncode != 0 and "TRITON_INTERPRET=1" in done.stderr


def test_environment_variable_and_context():
    assert run_python("import peftfast_kernels as k; print(k.get_backend())").stdout.strip() == "auto"
    done = run_python("import peftfast_kernels as k; print(k.get_backend())", PEFTFAST_BACKEND="torch")
    assert done.stdout.strip() == "torch"
    set_backend("torch")
    with use_backend("triton"):
        assert get_backend() == "triton"
    assert get_backend() == "torch"


def test_backend_decides_which_face_runs(monkeypatch, device):
    x, a = torch.ones(4, 8, device=device), torch.ones(2, 8, device=device)
    called = []
    monkeypatch.setitem(lora_down._cache, "launch", lambda *args: called.append("triton"))
    with use_backend("triton"):
        lora_down(x, a, None, 0.0)
    with use_backend("torch"):
        lora_down(x, a, None, 0.0)
    assert called == ["triton"]
    with use_backend("auto"):
        lora_down(x, a, None, 0.0)
    assert len(called) == (2 if device == "cuda" else 1)


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.fake is not None])
def test_opcheck(name, device):
    """Schema, aliasing, fake tensors, autograd registration, dynamic shapes under AOT of the opaque operators.

    No argument requires a gradient: operators have none of their own, they run inside autograd Functions.
    """
    from torch.library import opcheck

    from peftfast_kernels.op import _flatten

    op = OPS[name]
    for case in list(op.cases())[1:4]:
        args = _flatten(op.parameters, tuple(case.make(device).values()))
        opcheck(getattr(torch.ops.peftfast, name).default, tuple(args))


@pytest.mark.parametrize("name", ["lora_down", "lora_gemm", "dora_add"])
def test_the_opaque_operator_takes_arguments_by_name(name, device):
    op = OPS[name]
    case = list(op.cases())[1].make(device)
    first = len(case) // 2
    found = op.opaque(*list(case.values())[:first], **dict(list(case.items())[first:]))
    torch.testing.assert_close(found, op(**case))


def test_where_there_is_no_gpu_for_triton_torch_computes():
    """On the meta device, for one."""
    x, a = torch.ones(4, 8, device="meta"), torch.ones(2, 8, device="meta")
    assert not lora_down.runs_triton(x, a, None, 0.0)
    assert lora_down(x, a, None, 0.0).shape == (4, 2)


def test_eager_paths_are_traced_through(device):
    """Under torch.compile on the CPU the graph holds plain aten operations and no break."""
    if device != "cpu":
        pytest.skip("the GPU path is opaque")
    x, a = torch.randn(12, 16), torch.randn(3, 16)
    w, p = dense(torch.randn(10, 16)), torch.randn(12, 3)
    dy, seed = torch.randn(12, 10), torch.tensor(5)

    def step(x, a, dy, weight, p, seed):
        return lora_down(x, a, seed, 0.25), lora_gemm_t(dy, dense(weight), p, a, seed, 0.25)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    args = (x, a, dy, w.tensors[0], p, seed)
    for out, expected in zip(compiled(*args), step(*args), strict=True):
        torch.testing.assert_close(out, expected)


def test_triton_paths_are_opaque_to_the_compiler(device):
    graphs = []

    def collect(graph, inputs):
        graphs.append(graph)
        return graph.forward

    x, a = torch.randn(12, 16, device=device), torch.randn(3, 16, device=device)
    with use_backend("triton"):
        out = torch.compile(lambda x, a: lora_down(x, a, None, 0.0), fullgraph=True, backend=collect)(x, a)
    torch.testing.assert_close(out, x @ a.t())
    assert any("peftfast.lora_down" in str(node.target) for node in graphs[0].graph.nodes)


def test_eager_dispatches_few_operations():
    """The host cost of the plain path is its number of dispatched operations; views count as well."""
    x, a, b = torch.randn(12, 16), torch.randn(3, 16), torch.randn(10, 3)
    w, dy, t = dense(torch.randn(10, 16)), torch.randn(12, 10), torch.randn(12, 3)
    for call, most in (
        (lambda: lora_down(x, a, None, 0.0), 2),
        (lambda: OPS["lora_gemm"](x, w, None, t, b, 0.5), 4),
        (lambda: OPS["lora_dt"](dy, b, 0.5), 1),
        (lambda: OPS["lora_factor_grads"](dy, t, x, t, None, 0.0, 0.5, torch.float32, torch.float32), 4),
        (lambda: lora_gemm_t(dy, w, t, a, None, 0.0), 2),
    ):
        call()  # the cached zero is made once
        with Operations() as seen:
            call()
        assert len(seen.names) <= most, seen.names
