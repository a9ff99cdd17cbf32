"""Products that the host waits for: when they are taken so, of how few operations, and that nothing else changes.

Their numbers beside PEFT's are in `test_numerics.py`.
"""

from types import SimpleNamespace

import oracle
import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftfast
from peftfast.ops import composed, host_bound, scale
from peftfast.ops import lora as lora_ops
from peftfast.ops.plan import Part, Plan
from peftfast_kernels import use_backend
from peftfast_kernels.decode import dense, dense_t

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
WIDTH, LAYERS = 32, 3
without_one = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, without_one])]


@pytest.fixture
def taken(monkeypatch):
    """Linear layers on a CPU are taken as host-bound ones on a GPU."""
    monkeypatch.setattr(composed, "SMALL", {})
    monkeypatch.setattr(lora_ops, "is_host_bound", lambda x, plan: plan.format in ("dense", "dense_t"))


def plan(n=64, format="dense", branch=BF16, dropout=0.0):
    return Plan(format, (n, 16), BF16, branch, 0.75, dropout)


def on_gpu(elements):
    return SimpleNamespace(is_cuda=True, numel=lambda: elements, get_device=lambda: 0)


def test_when(monkeypatch):
    monkeypatch.setattr(host_bound, "host_bound_products", lambda index: 64 * 1000)
    bound = host_bound.is_host_bound
    assert bound(on_gpu(1000), plan()) and not bound(on_gpu(1001), plan())
    assert bound(on_gpu(500), plan(128)) and not bound(on_gpu(501), plan(128))
    assert bound(on_gpu(1000), plan(format="dense_t")) and bound(on_gpu(1000), plan(branch=FP32))
    assert not any(bound(on_gpu(1000), plan(format=format)) for format in ("nf4", "fp4", "int8"))
    assert not bound(torch.empty(10), plan())
    for backend in ("torch", "triton"):
        with use_backend(backend):
            assert not bound(on_gpu(1000), plan())
    with host_bound.host_bound_up_to(0):
        assert not bound(on_gpu(1), plan())
        with host_bound.host_bound_up_to(1 << 62):
            assert bound(on_gpu(1 << 40), plan())
            # a mask as large as this is worth more than the host's time
            assert bound(on_gpu(host_bound.ELEMENTS), plan(dropout=0.1))
            assert not bound(on_gpu(host_bound.ELEMENTS + 1), plan(dropout=0.1))
    assert bound(on_gpu(1000), plan())


def model_of(library, dropout=0.0, dtype=BF16, layers=LAYERS):
    torch.manual_seed(0)
    base = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)]).to(dtype)
    config = library.LoraConfig(
        r=4, lora_alpha=12, target_modules=[str(i) for i in range(layers)], init_lora_weights=False,
        lora_dropout=dropout,
    )  # fmt: skip
    return library.get_peft_model(base, config).train()


def operations(library, dropout):
    """Of a forward and a backward pass, in the second step."""
    model = model_of(library, dropout)
    x = torch.randn(2, 5, WIDTH, dtype=BF16, requires_grad=True)
    for _ in range(2):
        model.zero_grad()
        x.grad = None
        with oracle.Operations() as forward, torch.autocast("cpu", BF16):
            y = model(x)
        dy = torch.ones_like(y)
        with oracle.Operations() as backward:
            y.backward(dy)
    return forward.launched, backward.launched


def test_how_few_operations(taken):
    forward, backward = operations(peftfast, 0.0)
    assert forward.count("_foreach_copy_") == 1  # the factors of all layers
    assert sorted(forward) == sorted(["_foreach_copy_", *["mm", "mm", "addmm_"] * LAYERS])
    # on a GPU the two casts are part of their products
    assert sorted(n for n in backward if n != "_to_copy") == sorted(["addmm", "mm", "addmm_", "addmm", "mm"] * LAYERS)
    dropping_forward, dropping_backward = operations(peftfast, 0.1)
    assert len(dropping_forward) == len(forward) + LAYERS * (1 if "native_dropout" in dropping_forward else 3)
    assert len(dropping_backward) == len(backward) + 3 * LAYERS
    for dropout, (ours, theirs) in {
        0.0: ((forward, backward), operations(peft, 0.0)),
        0.1: ((dropping_forward, dropping_backward), operations(peft, 0.1)),
    }.items():
        print(dropout, [(len(mine) / LAYERS, len(their) / LAYERS) for mine, their in zip(ours, theirs, strict=True)])
        assert sum(map(len, ours)) < 0.62 * sum(map(len, theirs))


def python_of(library, dropout, layers):
    """Calls of functions written in Python that a forward pass makes, in the fourth of them."""
    model = model_of(library, dropout, layers=layers)
    x = torch.randn(2, 5, WIDTH, dtype=BF16, requires_grad=True)
    with torch.autocast("cpu", BF16):
        for _ in range(3):
            model(x)
        return oracle.python_calls(lambda: model(x))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_how_little_python(dropout, taken):
    ours, theirs = (
        (python_of(library, dropout, 8) - python_of(library, dropout, 2)) / 6 for library in (peftfast, peft)
    )
    print(dropout, ours, theirs)
    assert ours < 0.67 * theirs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4, 1.0])
def test_derivatives(dropout, transposed, device):
    def made(*shape):
        return torch.randn(shape, dtype=FP64, device=device)

    n, k, r = 5, 4, 3
    x, a, b, bias = (made(*s).requires_grad_() for s in ((2, 6, k), (r, k), (n, r), (n,)))
    w = dense_t(made(k, n)) if transposed else dense(made(n, k))
    made_plan = Plan(w.format, (n, k), FP64, FP64, 0.75, dropout)

    def run(x, a, b, bias):
        torch.manual_seed(3)  # the same mask every time
        return host_bound.host_bound_lora(x, Part(w, bias, a, b, made_plan))

    assert torch.autograd.gradcheck(run, (x, a, b, bias))
    assert torch.autograd.gradgradcheck(run, (x, a, b, bias))
    for i in range(4):  # each by itself
        wanted = [t.detach().requires_grad_(i == j) for j, t in enumerate((x, a, b, bias))]
        (alone,) = torch.autograd.grad(run(*wanted).square().sum(), wanted[i])
        every = torch.autograd.grad(run(x, a, b, bias).square().sum(), (x, a, b, bias))
        torch.testing.assert_close(alone, every[i])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, branch", [(BF16, BF16), (BF16, FP32), (torch.float16, torch.float16), (FP32, FP32)])
def test_no_further_from_fp64_than_torch(dtype, branch, device):
    """Values and gradients, beside the same formula in torch's own operations."""
    torch.manual_seed(0)
    n, k, r = 48, 64, 8
    x, w, bias, dy = (torch.randn(s).to(device, dtype) for s in ((3, 7, k), (n, k), (n,), (3, 7, n)))
    a, b = torch.randn(r, k, device=device) * k**-0.5, torch.randn(n, r, device=device) * r**-0.5
    p = Plan("dense", (n, k), dtype, branch, 1.5, 0.0)

    def formula(x, a, b, kind, branch):
        update = x.to(branch) @ a.to(branch).t() @ b.to(branch).t()
        return (x @ w.to(kind).t() + bias.to(kind) + 1.5 * update).to(kind)

    def grads(run, *inputs):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        y = run(*leaves)
        dx, da, db = torch.autograd.grad(y, leaves, dy.to(y.dtype))
        return {"y": y.detach(), "dx": dx, "da": da, "db": db}

    ours = grads(lambda x, a, b: host_bound.host_bound_lora(x, Part(dense(w), bias, a, b, p)), x, a, b)
    theirs = grads(lambda x, a, b: formula(x, a, b, dtype, branch), x, a, b)
    truth = grads(lambda x, a, b: formula(x, a, b, FP64, FP64), x.to(FP64), a.to(FP64), b.to(FP64))
    assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in theirs.items()}
    oracle.assert_no_further(ours, theirs, truth)


@pytest.mark.parametrize("device", DEVICES)
def test_fp32_factors_on_an_fp64_base(device):
    """Only sums of half-precision products leave a GPU's accumulators in fp32."""
    torch.manual_seed(0)
    x, w = torch.randn(5, 16, dtype=FP64, device=device), torch.randn(12, 16, dtype=FP64, device=device)
    a, b = torch.randn(4, 16, device=device).requires_grad_(), torch.randn(12, 4, device=device).requires_grad_()
    y = host_bound.host_bound_lora(x, Part(dense(w), None, a, b, Plan("dense", (12, 16), FP64, FP64, 1.5, 0.0)))
    expected = x @ w.t() + 1.5 * (x @ a.double().t() @ b.double().t())
    torch.testing.assert_close(y, expected)
    ours, theirs = (torch.autograd.grad(out.sum(), (a, b)) for out in (y, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_mask_again(reentrant, taken):
    """The reentrant kind runs the layers first without gradients, then with them."""
    model, grads = model_of(peftfast, 0.4, FP32), []
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    for through in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        torch.manual_seed(7)
        y = through(x)
        y.square().sum().backward()
        grads.append({"y": y.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, rtol=0, atol=0)


def test_writing_to_a_factor_before_the_backward_pass_raises(taken):
    model = model_of(peftfast, 0.0, FP32)
    y = model(torch.randn(3, WIDTH))
    with torch.no_grad():
        model.get_base_model()[1].lora_B["default"].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_small_inputs_are_scaled_by_torch(monkeypatch):
    """IA3's vectors: on a GPU with few elements, torch's product, which saves what the kernel's Function saves."""
    small = host_bound.is_small
    assert small(on_gpu(host_bound.ELEMENTS)) and not small(on_gpu(host_bound.ELEMENTS + 1))
    assert not small(torch.empty(3))
    with host_bound.host_bound_up_to(0):
        assert not small(on_gpu(1))
    with use_backend("triton"):
        assert not small(on_gpu(1))
    monkeypatch.setattr(composed, "SMALL", {})
    y, s = torch.randn(3, 8, dtype=BF16, requires_grad=True), torch.randn(8, requires_grad=True)
    assert type(scale.scale_features(y, s).grad_fn).__name__ == "_ScaleFeaturesBackward"
    monkeypatch.setattr(scale, "is_small", lambda y: True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = scale.scale_features(y, s)
    assert torch.equal(out, (y.float() * s).to(BF16)) and out.grad_fn.name().startswith("ToCopy")
    assert sorted(t.numel() * t.element_size() for t in kept) == [8 * 4, 3 * 8 * 2]
