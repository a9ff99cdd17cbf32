"""The average of what is trained: its numbers, its place in the model for a while, and going on with it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from training.tiny import batch, factors, largest_difference, llama, wrapped

import peftfast
from peftfast import AdapterAverage


def train(model: nn.Module, optimizer: torch.optim.Optimizer, average: AdapterAverage, steps: range) -> list[dict]:
    """The parameters after every step of two batches."""
    found = []
    for step in steps:
        for half in range(2):
            model(**batch(2, 10 * step + half)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        found.append(factors(model))
    return found


def expected(history: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    average = {name: p.double() for name, p in history[0].items()}
    for n, now in enumerate(history[1:], 1):
        keep = min(decay, (1 + n) / (10 + n))
        average = {name: keep * average[name] + (1 - keep) * p.double() for name, p in now.items()}
    return average


def of(average: AdapterAverage) -> dict[str, Tensor]:
    return {name: t for name, t in average.state_dict().items() if name != "updates"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_that_of_fp64_in_fp32_whatever_is_trained(dtype):
    model = wrapped(peftfast, llama(dtype=dtype), modules_to_save=["lm_head"])
    average = AdapterAverage(model, decay=0.4)
    history = train(model, torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.5), average, range(6))
    assert {p.dtype for p in history[0].values()} == {torch.float32, dtype}
    assert all(t.dtype is torch.float32 for t in of(average).values())
    assert largest_difference(of(average), expected(history, 0.4)) < 1e-6


def test_it_stands_in_the_place_of_the_parameters_for_a_while(tmp_path):
    model = wrapped(peftfast, llama(dtype=torch.bfloat16), modules_to_save=["lm_head"])
    average = AdapterAverage(model)
    history = train(model, torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.5), average, range(3))
    model.eval()
    before = model(**batch()).logits
    with pytest.raises(KeyError, match="on the way"), average.applied():
        inside = model(**batch()).logits
        model.save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="outside of applied"):
            average.update()
        with pytest.raises(RuntimeError, match="applied already"), average.applied():
            pass
        raise KeyError("on the way")
    assert not torch.equal(inside, before) and torch.equal(model(**batch()).logits, before)
    assert all(torch.equal(p, history[-1][n]) for n, p in factors(model).items())
    saved = peftfast.PeftModel.from_pretrained(llama(dtype=torch.bfloat16), tmp_path).eval()
    assert torch.equal(saved(**batch()).logits, inside)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into.*q_proj.*unmerge first"), average.applied():
        pass


def test_ranks_that_are_pruned_now_are_pruned_in_the_average_too(tmp_path):
    options = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 6}
    config = peftfast.AdaLoraConfig(**options, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peftfast.get_peft_model(llama(), config)
    average = AdapterAverage(model)
    train(model, torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-2), average, range(6))
    model.eval()
    with average.applied():
        inside = model(**batch()).logits
        model.save_pretrained(tmp_path)
    saved = peftfast.PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(saved(**batch()).logits, inside)


def test_a_training_that_goes_on_from_a_state_has_the_same_average():
    model = wrapped(peftfast)
    optimizer, average = torch.optim.AdamW(model.parameters(), 1e-2), AdapterAverage(model, 0.9)
    assert not of(average)
    AdapterAverage(model).load_state_dict(average.state_dict())
    train(model, optimizer, average, range(2))
    model2, optimizer2, state = copy.deepcopy((model, optimizer, average.state_dict()))
    train(model, optimizer, average, range(2, 4))
    again = AdapterAverage(model2, 0.9)
    again.load_state_dict(state)
    train(model2, optimizer2, again, range(2, 4))
    assert again.updates == 4 and largest_difference(of(again), of(average)) == 0.0


def test_refusals():
    model = wrapped(peftfast)
    average = AdapterAverage(model)
    with pytest.raises(ValueError, match=r"decay must be a finite number in \[0, 1\], got 1.5"):
        AdapterAverage(model, 1.5)
    with pytest.raises(RuntimeError, match="none before the first update"), average.applied():
        pass
    average.update()
    state = average.state_dict()
    name = next(n for n in state if "lora_A" in n)
    for wrong in ({**state, name: torch.zeros(1)}, {n: t for n, t in state.items() if n != name}):
        with pytest.raises(ValueError, match=name):
            average.load_state_dict(wrong)
    with pytest.raises(ValueError, match="another.weight"):
        average.load_state_dict({**state, "another.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="updates"):
        average.load_state_dict({n: t for n, t in state.items() if n != "updates"})
    p = model.get_parameter(name)
    p.data = p.data[:2].clone()
    with pytest.raises(RuntimeError, match=rf"{name} has shape \[2, 32\] now and had \[4, 32\]"):
        average.update()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        AdapterAverage(model).update()
