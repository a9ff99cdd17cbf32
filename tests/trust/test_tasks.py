"""An adapter for another task than the base model serves is reported, and refused under strict=True."""

from __future__ import annotations

import json
import warnings

import oracle
import pytest
import torch
from torch import nn
from trust.attacks import CONFIG, base, state, trained

import peftfast


class TakesIds(base.Tiny):
    def forward(self, input_ids):
        return super().forward(input_ids)


class TakesAnything(base.Tiny):
    def forward(self, *args, **kwargs):
        return super().forward(kwargs.get("input_ids", *args))


class TinyForSequenceClassification(TakesIds):
    pass


class Images(base.Tiny):
    main_input_name = "ids"


def folder_for(task, path):
    trained().save_pretrained(path)
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, "task_type": task}))
    return path


@pytest.mark.parametrize(
    ("model", "task", "words"),
    [
        (base.Tiny, "CAUSAL_LM", r"for task CAUSAL_LM \(it was None when.*Tiny is for none.*takes \(ids\)"),
        (base.Tiny, "FEATURE_EXTRACTION", "for task FEATURE_EXTRACTION"),
        (TinyForSequenceClassification, "CAUSAL_LM", "for task CAUSAL_LM, .* is for SEQ_CLS"),
        (TinyForSequenceClassification, "SEQ_2_SEQ_LM", "for task SEQ_2_SEQ_LM, .* is for SEQ_CLS"),
    ],
)
def test_another_task(tmp_path, model, task, words):
    folder = folder_for(task, tmp_path)
    fresh = model()
    before = state(fresh)
    with pytest.raises(peftfast.AdapterLoadError, match=words):
        peftfast.PeftModel.from_pretrained(fresh, folder, strict=True)
    assert state(fresh) == before
    with pytest.warns(peftfast.AdapterMismatchWarning, match=words):
        peftfast.PeftModel.from_pretrained(fresh, folder)


@pytest.mark.parametrize(
    ("model", "task"),
    [(base.Tiny, None), (TakesIds, "CAUSAL_LM"), (TakesAnything, "CAUSAL_LM"), (Images, "FEATURE_EXTRACTION")],
)
def test_a_task_that_fits_loads_without_a_word(tmp_path, model, task):
    folder = folder_for(task, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", peftfast.PeftWarning)
        loaded = peftfast.PeftModel.from_pretrained(model(), folder)
    ids = base.inputs()
    with torch.no_grad():
        found = loaded(ids=ids) if model is Images else loaded(ids)
        assert torch.equal(found, trained()(ids))


class TakesPixels(base.Tiny):
    def forward(self, pixel_values, scale=1.0):
        return super().forward(pixel_values) * scale


class TakesNames(nn.Module):
    """A wrapper around a model, which does not say what that takes."""

    def __init__(self):
        super().__init__()
        self.inner = oracle.llama()

    def forward(self, **kwargs):
        return self.inner(**kwargs)


@pytest.mark.parametrize("model", [oracle.llama, TakesNames])
def test_arguments_by_position_are_in_the_tasks_order(model):
    """Not in that of Llama's own forward, whose third argument are positions."""
    config = peftfast.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped, ids = peftfast.get_peft_model(model(), config), torch.arange(8).view(2, 4)
    mask = (ids > 0).long()
    found = wrapped(ids, mask, None, ids)
    assert torch.equal(found.loss, wrapped(input_ids=ids, attention_mask=mask, labels=ids).loss)
    with pytest.raises(TypeError, match="'input_ids' by position and by name"):
        wrapped(ids, input_ids=ids)
    with pytest.raises(TypeError, match="at most 7 arguments by position .input_ids, attention_mask, "):
        wrapped(*[None] * 8)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"])
def test_arguments_by_position_are_the_base_models_where_it_takes_no_text(task):
    config = peftfast.LoraConfig(target_modules=trained().peft_config["default"].target_modules, task_type=task)
    model, ids = peftfast.get_peft_model(TakesPixels(), config).eval(), base.inputs()
    with torch.no_grad():
        assert torch.equal(model(ids, 2.0), 2 * model(pixel_values=ids))
        text = peftfast.get_peft_model(TakesIds(), config).eval()
        assert torch.equal(text(ids), text(input_ids=ids))
