"""The dropout mask: a good random bit per element, and the same one wherever and however it is computed."""

import math

import pytest
import torch

from peftfast_kernels import device_masks, drop, keep_mask, keep_scale, lora_down
from peftfast_kernels.keep_mask import threshold

pytestmark = pytest.mark.usefixtures("poisoned_empty")

P = 0.3
CPU = torch.device("cpu")


def mask(seed, rows, cols, prob=P):
    return keep_mask(torch.tensor(seed), prob, rows, cols, CPU)


def correlation(one, two):
    """Pearson correlation of two equally shaped 0/1 tensors, in units of its standard deviation under independence."""
    one, two = one.double().flatten() - (1 - P), two.double().flatten() - (1 - P)
    return (one * two).mean().item() / (P * (1 - P)) * math.sqrt(one.numel())


@pytest.mark.parametrize("seed", [0, 1, 2**33, -5])
def test_mean_and_variance(seed):
    m = mask(seed, 1024, 1024).double()
    sigma = math.sqrt(P * (1 - P) / m.numel())
    assert abs(m.mean().item() - (1 - P)) < 5 * sigma
    # Row and column sums of independent bits are binomial: their variance is n p (1 - p).
    for sums in (m.sum(0), m.sum(1)):
        expected = 1024 * P * (1 - P)
        assert abs(sums.var().item() / expected - 1) < 5 * math.sqrt(2 / 1023)


@pytest.fixture(autouse=True, params=["hashed", "generated"])
def source(request):
    """Both sources of CPU masks: the kernels' hash, used beside the interpreter, and the generator, used otherwise."""
    with device_masks(request.param == "hashed"):
        yield request.param


def test_chi_square_of_bit_patterns():
    """All 256 patterns of 8 neighbouring bits, along rows and along columns, as often as independence says."""
    m = mask(17, 1024, 1024, prob=0.5).long()
    weights = 2 ** torch.arange(8)
    for bits in (m, m.t()):
        counts = torch.bincount((bits.reshape(-1, 8) * weights).sum(1), minlength=256).double()
        expected = counts.sum() / 256
        chi2 = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize(
    ("rows", "cols"), [(0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (0, 32), (32, 0), (0, 256), (256, 0)]
)
def test_neighbours_are_uncorrelated(rows, cols):
    m = mask(3, 1024, 1024)
    assert abs(correlation(m[: 1024 - rows, : 1024 - cols], m[rows:, cols:])) < 5


@pytest.mark.parametrize("other", [1, 2, 3, 1 << 31, 1 << 32, 1 << 33, -1])
def test_seeds_are_uncorrelated(other):
    one, two = mask(0, 1024, 1024), mask(other, 1024, 1024)
    assert abs(correlation(one, two)) < 5
    # nor is one seed's mask another's, moved by a row
    assert abs(correlation(one[1:], two[:-1])) < 5


def test_row_counter_has_64_bits():
    """Rows 2**32 apart must not repeat each other's mask."""
    x, seed = torch.ones(64, 256), torch.tensor(9)
    near, far = drop(x, seed, P), drop(x, seed, P, row_offset=1 << 32)
    assert abs(correlation(near != 0, far != 0)) < 5
    assert not torch.equal(near, far)


def test_row_offset_selects_rows_of_the_whole():
    x, seed = torch.randn(50, 33, generator=torch.Generator().manual_seed(0)), torch.tensor(9)
    whole = drop(x, seed, P)
    assert torch.equal(drop(x[20:], seed, P, row_offset=20), whole[20:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_drop_is_mask_times_scale(dtype):
    x = torch.randn(300, 700, generator=torch.Generator().manual_seed(0)).to(dtype)  # more than one chunk
    seed = torch.tensor(1 << 40)
    expected = torch.where(keep_mask(seed, P, 300, 700, CPU), x * keep_scale(P), 0)
    assert torch.equal(drop(x, seed, P), expected)
    assert drop(x, None, 0.0) is x


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (-1, (1 << 32) - 20), (1 << 62, 1 << 40)])
@pytest.mark.parametrize(("prob", "cols"), [(2e-5, 70), (0.3, 71), (0.9999, 1), (1.0, 71)])
def test_torch_and_numpy_agree(seed, offset, prob, cols, source):
    """CPU tensors are masked by numpy; every other device without Triton, and the compiler, by int32 torch."""
    from peftfast_kernels.keep_mask import _pair_keys, dropped_rows, masked_rows

    if source != "hashed":
        pytest.skip("the generator has no torch twin")

    tensor = torch.tensor(seed)
    by_torch = dropped_rows(tensor, prob, offset, offset + 40, cols, _pair_keys(cols, CPU))
    ((_, by_numpy),) = masked_rows(40, cols, tensor, prob, offset)
    assert torch.equal(by_torch, by_numpy)


def test_drop_holds_no_integers_of_full_size(source):
    """The peak of a masked pass is its output and one chunk of integers; the generator's masks are kept as bytes."""
    import tracemalloc

    x = torch.ones(2048, 1024)
    tracemalloc.start()  # sees numpy's buffers; torch's output is not counted
    drop(x, torch.tensor(1), 0.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert x.numel() // 16 < peak < (1 if source == "hashed" else 2) * x.numel()


def test_scale_uses_the_quantised_probability():
    assert threshold(0.5) == 1 << 15 and keep_scale(0.5) == 2.0
    assert keep_scale(1.0) == 0.0 and keep_scale(0.0) == 1.0 and threshold(1.0) < 1 << 16
    assert keep_scale(0.1) == 2**16 / (2**16 - round(0.1 * 2**16))
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="outside"):
            threshold(bad)


def test_everything_dropped_is_zero_not_nan():
    x, a = torch.full((5, 16), 3.0), torch.ones(2, 16)
    assert drop(x, torch.tensor(1), 1.0).eq(0).all()
    assert lora_down(x, a, torch.tensor(1), 1.0).eq(0).all()


def test_the_second_of_two_calls_reuses_the_masks_of_the_first(source):
    """A backward pass asks twice in a row; nobody may have changed what it is given."""
    x, seed = torch.ones(300, 700), torch.tensor(5)
    first = drop(x, seed, P)
    assert torch.equal(drop(x, seed, P), first)
    assert not torch.equal(drop(x, torch.tensor(6), P), first)
    assert torch.equal(drop(x, seed, P), first)
