"""Mixed adapters in one batch against each row served alone."""

import pytest
import torch

from peftfast_kernels import make_route, routed_add, routed_down, routed_down_grad, routed_up_grad, use_backend

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def test_route_partitions_the_rows(device):
    rows = torch.tensor([2, -1, 0, 2, 2, -1, 0], device=device)
    route = make_route(rows, 4)
    assert route.starts.tolist() == [2, 4, 4, 7, 7]
    assert route.order.tolist() == [1, 5, 2, 6, 0, 3, 4]  # stable: rows of one adapter keep their order
    assert {tensor.dtype for tensor in route} == {torch.int32}


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_mixed_batch_equals_rows_alone(backend, device):
    g = torch.Generator().manual_seed(0)
    m, k, n, r, adapters = 41, 30, 26, 4, 3
    rows = torch.randint(-1, adapters, (m,), generator=g).to(device)
    x, y, dy = (torch.randn(m, size, generator=g).to(device) for size in (k, n, n))
    a, b = torch.randn(adapters, r, k, generator=g).to(device), torch.randn(adapters, n, r, generator=g).to(device)
    scales = torch.tensor([0.5, -2.0, 1.5], device=device)
    route = make_route(rows, adapters)
    with use_backend(backend):
        t = routed_down(x, *route, a)
        out = routed_add(y, t, *route, b, scales)
        p, db = routed_up_grad(dy, t, *route, b, scales, torch.float32)
        da = routed_down_grad(x, p, *route, torch.float32)
        # The input's gradient is the expansion with aᵀ as its factor.
        dx = routed_add(torch.zeros_like(x), p, *route, a.transpose(1, 2), torch.ones_like(scales))
    leaves = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
    alone = y.clone()
    for i in range(m):
        adapter = int(rows[i])
        if adapter >= 0:
            delta = scales[adapter] * (leaves[2][adapter] @ (leaves[1][adapter] @ leaves[0][i]))
            alone = alone + torch.nn.functional.one_hot(torch.tensor(i, device=device), m)[:, None] * delta
    alone.backward(dy)
    torch.testing.assert_close(out, alone.detach())
    for ours, leaf in zip((dx, da, db), leaves, strict=True):
        torch.testing.assert_close(ours, leaf.grad, rtol=1e-4, atol=1e-4)
    assert torch.equal(out[rows < 0], y[rows < 0])  # the base's rows are untouched, bit for bit


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_adapter_without_rows_gets_zero_gradients(backend, device):
    route = make_route(torch.tensor([0, 0, 2], device=device), 3)
    x, t = torch.ones(3, 20, device=device), torch.ones(3, 2, device=device)
    with use_backend(backend):
        da = routed_down_grad(x, t, *route, torch.float32)
    assert da[1].eq(0).all() and da[0].eq(2).all() and da[2].eq(1).all()
