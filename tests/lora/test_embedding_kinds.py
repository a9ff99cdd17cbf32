"""Modules that derive from nn.Embedding: some are their table, scaled or not; others are more, and no adapter of the
table can act on their output."""

from __future__ import annotations

import copy

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
