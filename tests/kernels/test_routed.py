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


@pytest.mark.parametrize("rows", [20, 100])  # a program a row, and tiles of rows
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_is_not_finite_stays_with_its_adapter(backend, rows, device):
    """Other rows and other adapters' gradients get the same bits as without it, and its own are not finite."""
    g = torch.Generator().manual_seed(0)
    number = torch.randint(-1, 4, (rows,), generator=g)
    route = make_route(number.to(device), 4)
    x, y, dy = (torch.randn(rows, size, generator=g).to(device) for size in (30, 26, 26))
    a, b = torch.randn(4, 8, 30, generator=g).to(device), torch.randn(4, 26, 8, generator=g).to(device)
    scales = torch.tensor([0.5, -2.0, 1.5, 1.0], device=device)

    def compute(a, b, dy):
        with use_backend(backend):
            t = routed_down(x, *route, a)
            out = routed_add(y, t, *route, b, scales)
            p, db = routed_up_grad(dy, t, *route, b, scales, torch.float32)
            return (t, out, p), (routed_down_grad(dy, p, *route, torch.float32), db)

    clean_rows, clean = compute(a, b, dy)
    a2, b2, dy2 = a.clone(), b.clone(), dy.clone()
    a2[1, 3, 7], b2[2, 5, 1] = torch.inf, torch.nan
    dy2[number == 1, 2] = torch.nan
    broken_rows, broken = compute(a2, b2, dy2)
    others = (number != 1) & (number != 2)
    for one, other in zip(clean_rows, broken_rows, strict=True):
        assert torch.equal(one[others], other[others])
    assert not any(torch.isfinite(one[number == 1]).all() for one in broken_rows[:2])
    assert not torch.isfinite(broken_rows[1][number == 2]).all()
    for one, other in zip(clean, broken, strict=True):
        assert torch.equal(one[[0, 3]], other[[0, 3]]) and not torch.isfinite(other[1]).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_adapter_without_rows_gets_zero_gradients(backend, device):
    route = make_route(torch.tensor([0, 0, 2], device=device), 3)
    x, t = torch.ones(3, 20, device=device), torch.ones(3, 2, device=device)
    with use_backend(backend):
        da = routed_down_grad(x, t, *route, torch.float32)
    assert da[1].eq(0).all() and da[0].eq(2).all() and da[2].eq(1).all()
