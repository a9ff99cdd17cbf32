"""Ranks for a plain LoRA from calibration data: the budget holds, the right modules get them, files keep them."""

from typing import NamedTuple

import oracle
import peft
import pytest
import torch
from torch import nn

import peftfast


class Chain(nn.Module):
    """Three layers; the input of `narrow` varies in two directions only, and `dead` does not reach the loss."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.dead = nn.Linear(32, 2), nn.Linear(2 + 30, 16), nn.Linear(32, 16)

    def forward(self, x):
        low = self.wide(x)
        y = self.narrow(torch.cat([low, low.new_zeros(len(x), 30)], 1))
        return {"loss": (y.square().mean() + 0.0 * self.dead(x).sum()), "y": y}


def rows(count=4):
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(64, 32, generator=generator)} for _ in range(count)]


def config(**changes):
    return peftfast.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["wide", "narrow", "dead"], **changes})


def test_variance_goes_where_the_inputs_vary():
    torch.manual_seed(0)
    cfg, model = config(), Chain()
    ranks = peftfast.discover_ranks(model, cfg, rows(), maximum=8)
    assert sum(ranks.values()) == 12 and ranks["narrow"] <= ranks["dead"]
    assert ranks["wide"] <= 2  # a weight [2, 32] has two directions
    assert all(m.training for m in model.modules())


class WithConstant(nn.Module):
    """What `constant` is given never varies, and `real` varies in one direction far more than in the other."""

    def __init__(self):
        super().__init__()
        self.constant, self.real, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.constant(torch.zeros_like(x)) + self.real(x) + self.other(x.flip(-1).cos())


def test_inputs_that_never_vary_get_what_the_others_leave():
    scales = torch.tensor([4.0, 3.0, 2.0, 1.0])
    data = [{"x": batch["x"][:, :4] * scales} for batch in rows()]
    cfg = config(r=2, target_modules=["constant", "real", "other"])
    ranks = peftfast.discover_ranks(WithConstant(), cfg, data, budget=9)
    assert ranks["constant"] == 1 and sum(ranks.values()) == 9


def test_gradients_go_where_the_loss_is():
    torch.manual_seed(0)
    cfg = config()
    ranks = peftfast.discover_ranks(Chain(), cfg, rows(), budget=5, by="gradient")
    assert ranks == {"wide": 2, "narrow": 2, "dead": 1}
    assert cfg.rank_pattern == {"wide": 2, "narrow": 2, "dead": 1}
    assert cfg.alpha_pattern == {"wide": 4, "narrow": 4, "dead": 2}


def test_the_sketch_has_the_gradients_singular_values():
    from peftfast.calibration.rank_discovery import _gradients

    torch.manual_seed(0)
    model = Chain()
    data = rows(2)
    modules = {"narrow": model.narrow, "wide": model.wide}
    limits = {"narrow": 4, "wide": 2}
    sketches = [
        _gradients(model, modules, data, limits, lambda m, b: m(**b), lambda o: o["loss"], seed) for seed in range(256)
    ]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for batch in data:
        model(**batch)["loss"].backward()
    for name, module in modules.items():
        exact = torch.linalg.svdvals(module.weight.grad / 2).square()
        sums = torch.stack([found[name].sum() for found in sketches])
        error = sums.std() / len(sums) ** 0.5  # of the mean
        assert abs(sums.mean() - exact.sum()) <= 4 * error < 0.3 * exact.sum()
        # of rank two, and seen as such
        assert all((found[name][2:] <= 1e-6 * found[name][0]).all() for found in sketches)


def test_the_model_may_write_to_the_outputs_of_its_layers():
    ranks = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(inplace), nn.Linear(16, 8)).requires_grad_(False)
        cfg = peftfast.LoraConfig(r=4, target_modules=["0", "2"])
        run = {"forward_fn": lambda m, b: m(b["x"]), "loss_fn": lambda y: y.square().mean()}
        ranks.append(peftfast.discover_ranks(model, cfg, rows(), by="gradient", **run))
    assert ranks[0] == ranks[1]


@pytest.mark.parametrize("by", ["variance", "gradient"])
@pytest.mark.parametrize("rslora", [True, False])
def test_one_call_and_the_adapter_has_these_ranks(by, rslora, tmp_path):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, oracle.VOCABULARY, (4, 16), generator=generator)
    batches = [{"input_ids": ids, "labels": ids}]
    cfg = peftfast.LoraConfig(r=4, target_modules="all-linear", use_rslora=rslora)
    base = oracle.llama()
    ranks = peftfast.discover_ranks(base, cfg, batches, budget=40, by=by)
    assert sum(ranks.values()) == 40 and len(ranks) == 14 and len(set(ranks.values())) > 1
    model = peftfast.get_peft_model(base, cfg)
    layers = model.base_model.inventory.layers
    assert {k: layer.r["default"] for k, layer in layers.items()} == ranks
    scalings = [layer.scaling["default"] for layer in layers.values()]
    assert max(scalings) - min(scalings) < 1e-9
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(oracle.llama(), tmp_path)
    shapes = {n: p.shape for n, p in loaded.named_parameters() if "lora_" in n}
    assert shapes == {n: p.shape for n, p in model.named_parameters() if "lora_" in n}


def test_names_that_end_like_others_keep_their_own_rank(tmp_path):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(16, 16)
            self.z = nn.ModuleDict({"lin": nn.Linear(16, 16)})

        def forward(self, x):
            return self.z["lin"](self.lin(x))

    from peftfast.wrapping.patterns import pattern_of, pattern_value

    for values in ({"lin": 3, "z.lin": 5}, {"lin": 4, "z.lin": 5}, {"lin": 5, "z.lin": 4}):
        pattern = dict(sorted(pattern_of(values, 4).items()))  # as files sort it
        assert {n: pattern_value(pattern, n, 4) for n in values} == values
        cfg = peft.LoraConfig(r=4, target_modules=["lin"], rank_pattern=pattern)
        model = peft.get_peft_model(Nested(), cfg).base_model.model
        assert (model.lin.r["default"], model.z["lin"].r["default"]) == tuple(values.values())


class Batch(NamedTuple):
    x: torch.Tensor
    name: str


class OnDevice(dict):
    """A batch that knows where it is."""

    device = None

    def to(self, device):
        moved = OnDevice(self)
        moved.device = device
        return moved


@pytest.mark.parametrize("by", ["variance", "gradient"])
def test_batches_of_any_kind_come_on_the_models_device(by):
    seen = []

    def forward(model, batch):
        seen.append(batch)
        return model(batch.x if isinstance(batch, Batch) else batch["x"])

    for data in ([Batch(batch["x"], "a") for batch in rows()], [OnDevice(batch) for batch in rows()]):
        assert sum(peftfast.discover_ranks(Chain(), config(), data, by=by, forward_fn=forward).values()) == 12
    assert {type(batch) for batch in seen} == {Batch, OnDevice}
    assert {batch.device for batch in seen if isinstance(batch, OnDevice)} == {torch.device("cpu")}


class Experts(nn.Module):
    """Each batch reaches another one."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 16) for _ in range(2))

    def forward(self, x, expert):
        return {"loss": self.experts[expert](x).square().mean()}


@pytest.mark.parametrize("by", ["variance", "gradient"])
def test_modules_that_the_first_batch_does_not_reach(by):
    data = [{**batch, "expert": i % 2} for i, batch in enumerate(rows())]
    cfg = config(target_modules=["0", "1"])
    assert sum(peftfast.discover_ranks(Experts(), cfg, data, by=by).values()) == 8
    if by == "variance":
        with pytest.raises(ValueError, match="did not reach these modules: 'experts.1'"):
            peftfast.discover_ranks(Experts(), cfg, data[::2], by=by)


def test_what_cannot_be_is_refused_and_the_config_is_untouched():
    cfg = config()
    for changes, message in (
        ({"budget": 2}, "at least 1 each"),
        ({"by": "magic"}, "'variance' or 'gradient'"),
        ({"maximum": 1, "minimum": 2}, "below minimum"),
    ):
        with pytest.raises(ValueError, match=message):
            peftfast.discover_ranks(Chain(), cfg, rows(), **changes)
    with pytest.raises(TypeError, match="budget must be an integer, got 6.0"):
        peftfast.discover_ranks(Chain(), cfg, rows(), 12 * 0.5)
    with pytest.raises(ValueError, match="match no linear layer"):
        peftfast.discover_ranks(Chain(), config(target_modules=["nowhere"]), rows())
    with pytest.raises(ValueError, match="empty"):
        peftfast.discover_ranks(Chain(), cfg, [], by="gradient")
    for by, what in (("gradient", "gradients of these weights"), ("variance", "inputs")):
        with pytest.raises(ValueError, match=f"{what} hold NaN or infinite values"):
            peftfast.discover_ranks(Chain(), cfg, [{"x": torch.full((64, 32), torch.nan)}], by=by)
    with pytest.raises(ValueError, match="ranks of a LoraConfig, got IA3Config"):
        peftfast.discover_ranks(Chain(), peftfast.IA3Config(target_modules=["0"], feedforward_modules=[]), rows())
    with pytest.raises(ValueError, match="needs a loss"):
        peftfast.discover_ranks(Chain(), cfg, rows(), by="gradient", forward_fn=lambda m, b: m(**b)["y"])
    with pytest.raises(ValueError, match="before adding adapters"):
        peftfast.discover_ranks(peftfast.get_peft_model(Chain(), config()), cfg, rows())
    assert cfg.rank_pattern == {} and cfg.alpha_pattern == {}
    names = config(target_modules="all-linear")
    for changes in ({"budget": 1}, {"maximum": 1, "minimum": 2}, {"by": "gradient", "loss_fn": lambda out: 1 / 0}):
        with pytest.raises((ValueError, ZeroDivisionError)):
            peftfast.discover_ranks(Chain(), names, rows(), **changes)
        assert names.target_modules == "all-linear"
