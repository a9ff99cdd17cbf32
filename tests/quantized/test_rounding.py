"""What is left of a small change when a weight goes back into 4, 8 or 16 bits."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from oracle import One, rms_error
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

from quantized import support, test_foreign_formats  # noqa: E402
from quantized.support import assert_same_bytes, quantised_linear, stored_bytes  # noqa: E402

import peftfast  # noqa: E402
from peftfast.base.parameter import ParameterWeight  # noqa: E402
from peftfast.base.rounding import drawn, drawn_float, store  # noqa: E402
from peftfast.base.weight import BaseWeight, base_weight  # noqa: E402
from peftfast.errors import PeftWarning  # noqa: E402

NEAREST = [name for name in test_foreign_formats.WRITABLE if name.startswith(("hqq", "quanto"))]
FOREIGN = [name for name in test_foreign_formats.WRITABLE if name not in NEAREST]
DENSE = ["bf16", "fp16", "bf16-transposed", "bf16-stack"]
FORMATS = [*support.BASES, *FOREIGN, *DENSE]


def weight_of(base: str) -> BaseWeight:
    if base in support.BASES:
        weight = base_weight(quantised_linear(base, 48, 72))
    elif base in FOREIGN:
        weight = base_weight(test_foreign_formats.made(base))
    else:
        torch.manual_seed(0)
        module = Conv1D(48, 72) if base == "bf16-transposed" else nn.Linear(72, 48)
        if base == "bf16-stack":
            module.weight = nn.Parameter(torch.randn(3, 16, 72) / 8)
        module.to(torch.float16 if base == "fp16" else torch.bfloat16)
        weight = ParameterWeight(module, "weight") if base == "bf16-stack" else base_weight(module)
    weight.name = "layer"
    return weight


def small_change(weight: BaseWeight, size: float = 0.005) -> Tensor:
    """[N, K] of rank 2, so large beside the weight."""
    g = torch.Generator().manual_seed(3)
    n, k = weight.shape
    change = torch.randn(n, 2, generator=g) @ torch.randn(2, k, generator=g)
    return change * (size * weight.dense(torch.float32).norm() / change.norm())


# ---- the draws -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("values", [[0.0, 1.0], [-1.0, -0.5, 0.1, 0.2, 1.0]], ids=str)
def test_the_expected_value_is_exact(values):
    levels = torch.tensor(values)
    x = torch.linspace(values[0], values[-1], 41)
    draws = 4000
    found = levels[drawn(x.repeat(draws, 1), levels, torch.Generator().manual_seed(0)).int()]
    assert found.shape == (draws, 41)
    widest = float(levels.diff().max())
    assert (found.double().mean(0) - x).abs().max() < 5 * widest / 2 / math.sqrt(draws)  # five standard errors
    for column, value in zip(found.unbind(1), x, strict=True):
        below, above = levels[levels <= value + 1e-6].max(), levels[levels >= value - 1e-6].min()
        assert set(column.tolist()) <= {float(below), float(above)}


def test_what_lies_outside_becomes_the_last_level():
    levels = torch.tensor([-1.0, 0.0, 2.0])
    indices = drawn(torch.tensor([[-math.inf, -1.5, -1.0, 2.0], [2.5, math.inf, 0.0, 0.0]]), levels, torch.Generator())
    assert indices.tolist() == [[0, 0, 0, 2], [2, 2, 1, 1]] and indices.dtype == torch.uint8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_floats_around_a_value(dtype):
    """Also below the smallest one, beyond the largest, and next to powers of two, where steps change."""
    tiny, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.9999, -1.0001, tiny / 7, -tiny / 3, 0.3, largest, -1.001 * largest])
    found = drawn_float(x.repeat(2000, 1), dtype, torch.Generator().manual_seed(0)).float()
    every = torch.arange(256 if dtype.itemsize == 1 else 65536, dtype=torch.int32)
    every = every.to(torch.uint8 if dtype.itemsize == 1 else torch.int16).view(dtype).float()
    every = every[every.isfinite()]
    for column, value in zip(found.unbind(1), x.tolist(), strict=True):
        value = min(max(value, -largest), largest)
        below, above = every[every <= value].max(), every[every >= value].min()
        assert set(column.tolist()) <= {float(below), float(above)}
        limit = 5 * float(above - below) / 2 / 2000**0.5
        assert abs(float(column.double().mean()) - value) <= limit + 1e-12 * abs(value)
    assert found[:, 1].signbit().all()
    nan, infinite = drawn_float(torch.tensor([math.nan, -math.inf]), dtype, torch.Generator())
    assert torch.isnan(nan) and not (infinite.float() > -largest)


# ---- a weight --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("base", FORMATS)
def test_the_mean_of_many_draws_is_the_weight(base):
    """Scales stay, so the weight itself comes back exactly, and what is between two values comes back on average."""
    weight = weight_of(base)
    assert weight.draws
    own, before = weight.dense(torch.float32), weight.snapshot()
    generator = torch.Generator().manual_seed(0)
    weight.assign_stochastic(own, generator)
    torch.testing.assert_close(weight.dense(torch.float32), own, rtol=0, atol=0)
    change = small_change(weight)
    shares = []
    for _ in range(100):
        weight.restore(before)
        weight.assign_stochastic(own + change, generator)
        moved = weight.dense(torch.float32) - own
        assert (moved[change > 0] >= 0).all() and (moved[change < 0] <= 0).all()
        shares.append(float((moved * change).sum() / change.square().sum()))
    mean, deviation = torch.tensor(shares).mean(), torch.tensor(shares).std()
    # the largest of a block can become no larger: of 64 elements one loses half of its change
    assert abs(mean - 1) < 0.03 + 5 * deviation / len(shares) ** 0.5, (mean, deviation)


@pytest.mark.parametrize("base", FORMATS)
def test_a_small_change_is_kept(base):
    """Rounding to the nearest loses it where the format is coarse; the draws follow from the name alone."""
    weight, stored = weight_of(base), []
    before, change = (
        weight.snapshot(),
        small_change(weight, 0.00005 if base == "fp16" else 0.0005 if base in DENSE else 0.003),
    )
    exact = weight.dense(torch.float32) + change
    nearest = store(weight, exact, "nearest")
    weight.restore(before)
    for name in ("layer", "layer", "other"):
        weight.restore(before)
        weight.name = name
        found = store(weight, exact, "auto")
        stored.append(weight.dense(torch.float32))
    assert abs(nearest.kept - 1) > 0.1, "too large a change to tell"
    assert found.nearest == nearest.kept and abs(found.kept - 1) < min(0.35, abs(nearest.kept - 1))
    assert torch.equal(stored[0], stored[1]) and not torch.equal(stored[0], stored[2])
    assert found.error == pytest.approx(rms_error(stored[2], exact.double()), rel=1e-4)


@pytest.mark.parametrize("base", FORMATS)
def test_a_large_change_goes_to_the_nearest(base):
    weight = weight_of(base)
    before, exact = weight.snapshot(), weight.dense(torch.float32) + small_change(weight, 1.0)
    found = store(weight, exact)
    own = weight.dense(torch.float32)
    assert found.nearest is None and 0.9 <= found.kept <= 1.1
    weight.restore(before)
    weight.assign(exact)
    assert torch.equal(weight.dense(torch.float32), own)


@pytest.mark.parametrize("size", [0.0002, 0.002, 1.0])
def test_what_a_part_of_a_large_weight_shows_is_true_of_all(size):
    """Of 16 bits a fifth is looked at, in three places here: as many elements, apart from each other."""
    torch.manual_seed(0)
    weight = base_weight(nn.Linear(1024, 1024, dtype=torch.bfloat16))
    own = weight.dense(torch.float64)
    change = small_change(weight, size).double()
    found = store(weight, (own + change).float(), "nearest")
    lost = change * (weight.dense(torch.float64) - own - change)
    kept = 1 + lost.sum() / change.square().sum()
    seen = change.numel() / 5
    deviation = lost.std() * seen**0.5 / (seen * change.square().mean())
    assert 0 < abs(found.kept - kept) < 5 * deviation


class Scattered(TorchDispatchMode):
    """The operations that copy numbers, of weights or parts of them, that do not lie together."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        copied = args[:2] if func is torch.ops.aten.copy_.default else args[:1] * ("clone" in str(func))
        if any(t.numel() >= 1 << 14 and not (t.is_contiguous() or t.mT.is_contiguous()) for t in copied):
            self.found.append((func, args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_weight_kept_the_other_way_round_is_read_as_it_lies(use_dora):
    """Numbers of which each is in another line of memory take many times as long."""
    config = peftfast.LoraConfig(target_modules=["m"], use_dora=use_dora)
    model = peftfast.get_peft_model(One(Conv1D(256, 1024).bfloat16()), config)
    with Scattered() as scattered:
        model.base_model.model.m.merge()
    assert not scattered.found


def test_no_change_changes_nothing():
    weight = weight_of("nf4")
    own = weight.dense(torch.float32)
    found = store(weight, own)
    assert found.kept == 1 and found.nearest is None and torch.equal(weight.dense(torch.float32), own)


# ---- a model ---------------------------------------------------------------------------------------------------------
class Deep(One):
    """Residual layers, through which what the adapters do adds up and what rounding does averages out."""

    def __init__(self, base: str, layers: int, width: int) -> None:
        super().__init__(quantised_linear(base))
        self.layers = nn.ModuleList(quantised_linear(base, width, width, seed=i) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.1 * layer(x)
        return x


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("base", ["nf4", "nf4-nested", "fp4", "int8"])
def test_a_merged_model_still_does_what_it_learned(base):
    """Every layer adds a little of one direction to inputs that look along another: PEFT's merge loses all of it."""
    width, layers = 256, 12
    g = torch.Generator().manual_seed(0)
    seen, said = torch.randn(width, generator=g), torch.randn(width, generator=g)
    seen, said = seen / seen.norm(), said / said.norm()
    x = 3 * seen + torch.randn(64, width, generator=g) / width**0.5
    outs = {}
    for library in (peft, peftfast):
        config = library.LoraConfig(r=1, lora_alpha=1, target_modules=r"layers\.\d+")
        model = library.get_peft_model(Deep(base, layers, width), config).eval()
        with torch.no_grad():
            for layer in model.base_model.model.layers:
                layer.lora_A["default"].weight.copy_(seen[None])
                layer.lora_B["default"].weight.copy_(0.05 * said[:, None])
            with model.disable_adapter():
                frozen = model(x)
            adapted = model(x)
            model.merge_adapter()
            outs[library.__name__] = model(x)
    learned = ((adapted - frozen) @ said).mean()
    shares = {name: float(((y - frozen) @ said).mean() / learned) for name, y in outs.items()}
    assert shares["peft"] < 0.7 and 0.85 < shares["peftfast"] < 1.15, shares


def adapted(base: str) -> nn.Module:
    model = peftfast.get_peft_model(One(quantised_linear(base)), peftfast.LoraConfig(r=2, target_modules=["m"]))
    with torch.no_grad():
        model.m.lora_B["default"].weight.normal_(std=0.002)
    return model


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_what_is_said(how):
    with pytest.warns(
        PeftWarning, match=r"1 of them were rounded stochastically, which keeps \d+% of .*; to the neare"
    ):
        getattr(adapted("nf4"), how)()
    with pytest.warns(PeftWarning, match=r"In 1 of them only \d% of what the adapters change is left"):
        getattr(adapted("nf4"), how)(rounding="nearest")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = adapted("nf4")
        with torch.no_grad():
            model.m.lora_B["default"].weight.normal_()
        getattr(model, how)()
    said = [str(w.message) for w in caught if issubclass(w.category, PeftWarning)]
    assert len(said) == 1 and "stochastically" not in said[0] and "left" not in said[0]


def test_stochastic_by_hand_and_back_bit_for_bit():
    model = adapted("nf4")
    before = stored_bytes(model.m.base_layer)
    with pytest.warns(PeftWarning):
        errors = model.merge_adapter(rounding="stochastic")
    first = stored_bytes(model.m.base_layer)
    assert list(errors) == ["m"]
    model.unmerge_adapter()
    assert_same_bytes(before, stored_bytes(model.m.base_layer))
    with pytest.warns(PeftWarning):
        model.merge_adapter(rounding="stochastic")
    assert_same_bytes(first, stored_bytes(model.m.base_layer))


def test_refusals():
    model = adapted("nf4")
    before = stored_bytes(model.m.base_layer)
    for merge in (model.merge_adapter, model.merge_and_unload, model.m.merge):
        with pytest.raises(ValueError, match="'auto', 'nearest', 'stochastic', got 'up'"):
            merge(rounding="up")
    assert_same_bytes(before, stored_bytes(model.m.base_layer))


@pytest.mark.parametrize("base", NEAREST)
def test_formats_that_round_to_the_nearest_alone(base):
    model = test_foreign_formats.patched(base)
    with pytest.raises(ValueError, match="m: rounding='stochastic' is not known for weights stored by (hqq|quanto)"):
        model.merge_adapter(rounding="stochastic")
    assert not model.base_model.model.m.merged
