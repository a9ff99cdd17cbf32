"""Modules that derive from torch's and compute something else than their weight and their kind say: embeddings that are
more than a table are no targets, linear layers and convolutions are not merged into. Recurrent layers' Parameters."""

from __future__ import annotations

import copy
import functools

import oracle
import pytest
import torch
from torch import Tensor, nn

import peftfast
from peftfast import LoraConfig


class Positions(nn.Embedding):
    """As OPT and BART have them: rows by place, whatever the input is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.arange(x.shape[-1]).expand_as(x) + 2)


class Normed(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(x), dim=-1)


class Other(nn.Embedding):
    def forward(self, x: Tensor, past: int) -> Tensor:
        return super().forward(x + past)


class Scaled(nn.Embedding):
    embed_scale = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale


class Model(nn.Module):
    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table, self.head = table, nn.Linear(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


@pytest.mark.parametrize(("kind", "why"), [(Positions, "gives something else"), (Normed, "gives"), (Other, "raises")])
@pytest.mark.parametrize("config", [{"target_modules": ["table", "head"]}, {"target_modules": ["head", "table"]}])
def test_more_than_a_table_is_refused_before_anything_changes(kind, why, config):
    model = Model(kind(20, 16).train())
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(TypeError, match=f"table: {kind.__name__} derives from torch.nn.Embedding.* {why}"):
        peftfast.get_peft_model(model, LoraConfig(**config))
    assert [name for name, _ in model.named_modules()] == before and model.table.training


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
def test_a_table_merges_into_what_it_computes(kind):
    torch.manual_seed(0)
    model = peftfast.get_peft_model(Model(kind(20, 16)), LoraConfig(target_modules=["table"], init_lora_weights=False))
    ids = torch.arange(20).view(2, 10)
    y = model(ids)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.allclose(merged(ids), y, atol=1e-5)


@pytest.mark.parametrize("rows", [None, ["default", "__base__"]], ids=["alone", "mixed"])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["table"], init_lora_weights=False),
        peftfast.TrainableTokensConfig(target_modules=["table"], token_indices=[3, 5]),
    ],
    ids=["lora", "tokens"],
)
def test_a_table_with_sparse_gradients_trains_as_any(config, rows):
    gradients = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = peftfast.get_peft_model(Model(nn.Embedding(20, 16, sparse=sparse)), copy.deepcopy(config))
        model(torch.arange(20).view(2, 10), **({"adapter_names": rows} if rows else {})).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *gradients))


def test_a_module_saved_in_full_may_be_anything():
    model = peftfast.get_peft_model(
        Model(Positions(20, 16)), LoraConfig(target_modules=["head"], modules_to_save=["table"])
    )
    model(torch.zeros(2, 5, dtype=torch.int64)).sum().backward()
    assert model.base_model.model.table.modules_to_save["default"].weight.grad[2:7].any()


def test_what_a_tuned_model_changed_of_one_is_kept_whole():
    torch.manual_seed(0)
    base = Model(Positions(20, 16))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.table.weight.add_(1.0)
        tuned.head.weight.add_(torch.randn(8, 1) @ torch.randn(1, 16))
    config, tensors = peftfast.extract_lora(base, tuned, rank=2)
    assert config.modules_to_save == ["table"]
    model = peftfast.get_peft_model(copy.deepcopy(base), config)
    peftfast.set_peft_model_state_dict(model, tensors)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    assert torch.allclose(model(ids), tuned(ids), atol=1e-4)


class Ternary(nn.Linear):
    """As 1.58-bit models train: the weight is rounded in every forward."""

    def forward(self, x: Tensor) -> Tensor:
        step = self.weight.abs().mean()
        return nn.functional.linear(x, (self.weight / step).round().clamp(-1, 1) * step, self.bias)


class Standardised(nn.Conv2d):
    """As BiT has them."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.flatten(1)
        w = (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)
        return self._conv_forward(x, w.view_as(self.weight), self.bias)


class Same(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias


class Two(nn.Module):
    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x)


def two(first: nn.Module, **changes) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["first", "second"], **changes)
    return oracle.randomised(peftfast.get_peft_model(Two(first), config), 1.0, only="lora_B")


MADE = {
    "linear": (lambda: Ternary(16, 8), (3, 16)),
    "convolution": (lambda: Standardised(4, 8, 3, padding=1), (2, 4, 6, 6)),
}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload", "layer"])
def test_what_merging_would_change_is_not_merged_into(made, changes, call):
    make, shape = MADE[made]
    model = two(make(), **changes).train()
    x, weight = torch.randn(shape), model.base_model.model.second.weight.clone()
    y = model(x)
    with pytest.raises(RuntimeError, match="computes something else than the product with its weight.*default merged"):
        (model.base_model.model.second.merge if call == "layer" else getattr(model, call))()
    assert torch.equal(model(x), y) and torch.equal(model.base_model.model.second.weight, weight)
    assert not any(layer.merged for layer in model.base_model.inventory.layers.values())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_class_that_another_library_makes_of_a_layer_merges_in_its_own_way(call):
    model, x = two(Ternary(16, 8)), torch.randn(3, 16)
    layer = model.base_model.model.second
    base = layer.weight.clone()

    class Rounded(type(layer)):
        """As NVIDIA's ModelOpt makes them: what is rounded is the weight with the adapter inside."""

        def forward(self, x: Tensor) -> Tensor:
            step = self.step
            weight = self.weight if self.merged else self.weight + self.get_delta_weight("default")
            return nn.functional.linear(x, (weight / step).round() * step, self.base_layer.bias)

        def merge(self, *args, **kwargs) -> None:
            super().merge(*args, **kwargs)
            self.get_base_layer().forward = functools.partial(Rounded.forward, self)

    layer.__class__, layer.step = Rounded, 0.25
    y = model(x)
    merged = getattr(model, call)() or model
    assert torch.allclose(merged(x), y)
    if call == "merge_adapter":
        model.unmerge_adapter()
        assert torch.equal(model(x), y) and torch.equal(layer.weight, base)


def test_a_forward_of_one_s_own_that_is_the_product_is_merged_into():
    model, x = two(Same(16, 8), lora_dropout=0.5), torch.randn(3, 16)
    y = model.eval()(x)
    model.train().merge_adapter()
    assert torch.allclose(model.eval()(x), y, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(x), y)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 6, 2)

    def forward(self, x):
        return self.lstm(x)[0]


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_weights_of_an_lstm_are_merged_into(bias):
    """Its `bias` says whether it has any."""
    base, x = Recurrent().eval(), torch.randn(4, 2, 8)
    names = ["lstm.weight_ih_l0", "lstm.weight_hh_l1"]
    config = peftfast.LoraConfig(r=2, target_parameters=names, init_lora_weights=False, bias=bias)
    model = peftfast.get_peft_model(copy.deepcopy(base), config).eval()
    adapted = model(x)
    assert (adapted - base(x)).abs().max() > 1e-3
    model.merge_adapter()
    torch.testing.assert_close(model(x), adapted)
    model.unmerge_adapter()
    assert torch.equal(model(x), adapted)
    torch.testing.assert_close(model.merge_and_unload()(x), adapted)
