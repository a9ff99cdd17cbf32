"""Intruder dimensions: found and weakened as in PEFT, where PEFT's factors have the right shape, and by the formula."""

from __future__ import annotations

import importlib

import oracle
import pytest
import torch

import peftfast
from peftfast import LoraConfig

TARGETS = {
    "linear": (oracle.llama, ["q_proj", "down_proj"]),
    "conv1d": (oracle.gpt2, ["c_attn"]),
    "embedding": (oracle.llama, ["embed_tokens"]),
}


def changes(model, name):
    """W [out, in] and the change that an adapter makes of it, by layer."""
    result = {}
    for key, layer in model.base_model.inventory.layers.items():
        site, lookup = layer.site, layer.site.looks_up
        a, b = (t.detach().double() for t in layer.adapters[name].parameters().values())
        weight = site.weight.dense(torch.float64)
        result[key] = (weight.t() if lookup else weight), layer.scaling[name] * (b.flatten(1) @ a.flatten(1))
    return result


def weakened(weight, change, rank, top_k, threshold, kept):
    known = torch.linalg.svd(weight)[0]
    u, s, vh = torch.linalg.svd(weight + change, full_matrices=False)
    for i in range(min(top_k, len(s))):
        if (u[:, i] @ known).abs().max() < threshold:
            change = change + (kept - 1) * s[i] * torch.outer(u[:, i], vh[i])
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def trained(make, targets, **options) -> oracle.Twins:
    return oracle.Twins(make, {"r": 4, "lora_alpha": 6, "target_modules": targets, **options})


@pytest.mark.parametrize("kind", TARGETS)
def test_by_the_formula(kind):
    make, targets = TARGETS[kind]
    model, lines = trained(make, targets).ours, []
    options = {"top_k": 6, "threshold_epsilon": 0.8, "mitigation_lambda": 0.3}
    before = changes(model, "default")
    peftfast.reduce_intruder_dimension(model, **options, logging_sink=lines.append)
    assert model.active_adapters == ["intruder_reduced"] and len(lines) == len(before) + 1
    after = changes(model, "intruder_reduced")
    for key, (weight, change) in before.items():
        expected = weakened(weight, change, 4, 6, 0.8, 0.3)
        assert not torch.allclose(expected, change, rtol=0.1, atol=1e-2), "nothing to find here"
        torch.testing.assert_close(after[key][1], expected, rtol=1e-3, atol=1e-4)
    for key, (_, change) in changes(model, "default").items():
        assert torch.equal(change, before[key][1])
    model.merge_and_unload()  # the factors fit


def test_as_in_peft():
    twins = trained(*TARGETS["linear"])
    theirs = importlib.import_module("peft.tuners.lora.intruders").reduce_intruder_dimension
    said = {"ours": [], "theirs": []}
    peftfast.reduce_intruder_dimension(twins.ours, threshold_epsilon=0.7, logging_sink=said["ours"].append)
    theirs(twins.theirs, threshold_epsilon=0.7, logging_sink=said["theirs"].append)
    counts = [[line.rpartition(": ")[2] for line in lines] for lines in said.values()]
    assert counts[0] == counts[1] and len(set(counts[0])) > 2
    with torch.no_grad():
        torch.testing.assert_close(oracle.logits(twins.ours), oracle.logits(twins.theirs), rtol=1e-3, atol=1e-3)


def test_without_intruders_the_copy_is_the_adapter():
    model = trained(*TARGETS["linear"], lora_bias=False, use_rslora=True).ours
    with torch.no_grad():
        before = oracle.logits(model)
        peftfast.reduce_intruder_dimension(model, "default", "same", threshold_epsilon=0.0, logging_sink=None)
        assert model.active_adapters == ["same"]
        torch.testing.assert_close(oracle.logits(model), before, rtol=1e-5, atol=1e-5)


def test_ranks_below_the_largest_and_above_the_weights(tmp_path):
    """A combination has one rank for all layers, and its file says that one."""
    model = trained(oracle.llama, ["q_proj", "down_proj"], r=50, rank_pattern={"q_proj": 3}).ours
    peftfast.reduce_intruder_dimension(model, "default", "fewer", threshold_epsilon=0.8, logging_sink=None)
    with torch.no_grad():
        expected = oracle.logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["fewer"])
    loaded = peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path / "fewer")
    with torch.no_grad():
        torch.testing.assert_close(oracle.logits(loaded), expected)


def test_the_copy_has_the_adapters_dtype():
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    base = oracle.llama().to(torch.bfloat16)
    model = peftfast.get_peft_model(base, config, autocast_adapter_dtype=False)
    peftfast.reduce_intruder_dimension(model, threshold_epsilon=2.0, logging_sink=None)
    factors = [p for name, p in model.named_parameters() if ".intruder_reduced." in name]
    assert factors and {p.dtype for p in factors} == {torch.bfloat16} and all(p.requires_grad for p in factors)


def test_refused_before_anything_changes():
    model = trained(*TARGETS["linear"]).ours
    model.add_adapter("dora", LoraConfig(target_modules=["q_proj"], use_dora=True))
    ia3 = peftfast.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    with pytest.raises(ValueError, match="not using LoRA.*IA3"):
        peftfast.reduce_intruder_dimension(peftfast.get_peft_model(oracle.llama(), ia3))
    convolution = torch.nn.Sequential(torch.nn.Conv1d(4, 4, 1, groups=2))
    grouped = peftfast.get_peft_model(convolution, LoraConfig(target_modules=["0"], r=2))
    for error, message, options in (
        (ValueError, "not using LoRA.*LORA with use_dora", {"old_adapter_name": "dora"}),
        (ValueError, "nobody not found.*default", {"old_adapter_name": "nobody"}),
        (ValueError, "'dora' already exists", {"new_adapter_name": "dora"}),
        (ValueError, "top_k must be an integer of at least 1, got -3", {"top_k": -3}),
        (TypeError, "top_k must be an integer", {"top_k": 2.0}),
        (ValueError, "threshold_epsilon must be a finite number", {"threshold_epsilon": float("nan")}),
        (TypeError, "mitigation_lambda must be a finite number", {"mitigation_lambda": "0.75"}),
    ):
        with pytest.raises(error, match=message):
            peftfast.reduce_intruder_dimension(model, **options)
        assert list(model.peft_config) == ["default", "dora"]
    with pytest.raises(NotImplementedError, match="groups > 1"):
        peftfast.reduce_intruder_dimension(grouped)
    assert list(grouped.peft_config) == ["default"]
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="contain default now.*unmerge"):
        peftfast.reduce_intruder_dimension(model)
