"""Targets by condition numbers: the same as PEFT's."""

import importlib
import math

import oracle
import pytest
import torch
from experts.moe import qwen3_moe

import peftfast
from peftfast.calibration.kappa import condition_number

helpers = importlib.import_module("peft.helpers")


@pytest.mark.parametrize("make", [oracle.llama, oracle.bert, qwen3_moe])
def test_the_same_targets_as_peft(make):
    model = make()
    mine = peftfast.KappaTuneSelector(model, show_progress=False)
    theirs = helpers.KappaTuneSelector(model, show_progress=False)
    for choice in ({}, {"top_p": 0.3}, {"num_modules": 3}, {"threshold": 40.0}, {"top_p": 0.3, "num_modules": 2}):
        assert mine.get_best_targets(**choice) == theirs.get_best_targets(**choice)
        assert mine.get_best_target_parameters(**choice) == theirs.get_best_target_parameters(**choice)
    for options in ({}, {"top_p": 0.5}, {"max_dim_size_to_analyze": 40}):
        found = peftfast.find_kappa_target_modules(model, **options, show_progress=False)
        assert found == helpers.find_kappa_target_modules(model, **options, show_progress=False)
    peftfast.get_peft_model(model, peftfast.LoraConfig(**peftfast.find_kappa_target_modules(model, 0.5)))


@pytest.mark.parametrize(
    "make, options",
    [
        (oracle.llama, {"target_modules": ["q_proj"]}),
        (qwen3_moe, {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ],
)
def test_an_adapted_model_has_the_targets_of_its_base(make, options):
    """PEFT names the adapter's own matrices here."""
    expected = peftfast.find_kappa_target_modules(make(), 0.5, show_progress=False)
    model = peftfast.get_peft_model(make(), peftfast.LoraConfig(r=2, init_lora_weights=False, **options))
    assert peftfast.find_kappa_target_modules(model, 0.5, show_progress=False) == expected


def test_a_lost_rank_comes_last():
    lost = torch.ones(4, 4)
    assert condition_number(torch.eye(4)) == 1.0
    assert condition_number(lost) > 1e6 and condition_number(torch.zeros(4, 4)) == math.inf
    assert condition_number(torch.stack([torch.eye(4), 3 * torch.eye(4)])) == 1.0


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_shares_that_cannot_be(share):
    with pytest.raises(ValueError, match=f"top_p .* got {share}"):
        peftfast.find_kappa_target_modules(oracle.llama(), share)


def test_arguments_of_a_selector():
    selector = peftfast.KappaTuneSelector(qwen3_moe(), moe_param_suffixes=".down_proj", show_progress=False)
    found = selector.get_best_target_parameters()
    assert found and all(name.endswith(".down_proj") for name in found)
    for options, error in (
        ({"num_modules": -2}, ValueError),
        ({"num_modules": 2.0}, TypeError),
        ({"top_p": 2}, ValueError),
    ):
        with pytest.raises(error, match=f"{[*options][0]} must be .* got "):
            selector.get_best_targets(**options)
