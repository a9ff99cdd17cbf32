"""Optimizers that know the factors apart: steps, and copies of a training."""

import copy

import pytest
import torch
from training.tiny import batch, wrapped

import peftfast
from peftfast.optimizers import LoraFAOptimizer, create_lorafa_optimizer, create_riemannian_optimizer

CREATE = {
    "lorafa": lambda model: create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2),
    "riemannian": lambda model: create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-1),
}


def train(model, optimizer):
    losses = []
    for step in range(3):
        loss = model(**batch(4, seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_lorafa_steps_along_the_projected_gradient():
    """The first step of Adam is as long as its rate, in the direction of the sign."""
    model = wrapped(peftfast)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    optimizer = CREATE["lorafa"](model)
    layer.set_scale("default", 3.0)
    model(**batch()).loss.backward()
    a, b = (layer.adapters["default"][name] for name in ("lora_A", "lora_B"))
    before, wide = b.detach().clone(), a.double()
    expected = b.grad.double() @ torch.linalg.inv(wide @ wide.T) / (3.0 * 8 / 4) ** 2
    optimizer.step()
    torch.testing.assert_close((before - b).double(), 1e-2 * expected / (expected.abs() + 1e-6 * 0.001**-0.5))


def test_lorafa_freezes_nothing_where_it_is_refused():
    model = wrapped(peftfast)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="learning rate: -1.0"):
        create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=-1.0)
    for options in ({"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.9)}, {"eps": -1e-6}):
        with pytest.raises(ValueError, match="Invalid (beta parameter: (1.0|-0.1)|epsilon value: -1e-06) - should be"):
            LoraFAOptimizer(model.parameters(), [], **options)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before


@pytest.mark.parametrize("kind", CREATE)
def test_copies_of_a_training_are_trainings_of_their_own(kind):
    model = wrapped(peftfast)
    optimizer = CREATE[kind](model)
    train(model, optimizer)
    copied = copy.deepcopy((model, optimizer))
    factors = [p.detach().clone() for p in model.parameters()]
    again = train(*copied)
    for p, kept in zip(model.parameters(), factors, strict=True):
        assert torch.equal(p, kept)
    assert train(model, optimizer) == again
