"""What layers keep of the adapters of a mixed batch: how little a call does with it, and how long it lasts."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import oracle
import pytest
import torch

import peftfast
from peftfast import LoraConfig
from peftfast.many.hotswap import hotswap_adapter
from peftfast.methods.lora import stack as lora_stack
from peftfast.rows.control import LOOKS_EVERY, MIXES
from peftfast.rows.routing import BASE
from peftfast.watch import ContentWatch

NAMES = [f"n{i}" for i in range(6)]


def several(dropout: float = 0.0):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout)
    model = peftfast.get_peft_model(oracle.llama(), config, NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    return model.eval()


def layers(model) -> list:
    return list(model.base_model.inventory.layers.values())


@pytest.mark.parametrize("names, moves", [(NAMES, 0), (NAMES[::-1], 2), ([n for n in NAMES for _ in range(2)], 0)])
def test_two_products_a_layer(names, moves):
    """Beside the base's own product; samples in another order than their adapters are put in order and back."""
    model = several()
    batch = oracle.inputs(model, batch=len(names))
    with torch.no_grad():
        model(**batch, adapter_names=names)
        with oracle.Operations() as base, model.disable_adapter():
            model(**batch)
        with oracle.Operations() as mixed:
            model(**batch, adapter_names=names)
    count = len(layers(model))
    extra = Counter(mixed.launched) - Counter(base.launched)
    assert extra.pop("bmm") == extra.pop("baddbmm_") == count
    assert extra.pop("index_select", 0) == moves * count
    assert sum(extra.values()) <= 4, extra  # the routing itself


def test_an_order_that_comes_again_costs_no_more_than_that_of_the_adapters(monkeypatch):
    """As in decoding: the factors are put in that order once. Not where they are large."""
    model = several()
    batch = oracle.inputs(model, batch=len(NAMES))
    one, other = NAMES[::-1], NAMES[2:] + NAMES[:2]
    moves, count = [], len(layers(model))
    with torch.no_grad():
        model(**batch, adapter_names=NAMES)
        for small in (True, False):
            monkeypatch.setattr(lora_stack, "SMALL", small << 20)
            for names in (one, other, other, other, one, other):
                with oracle.Operations() as mixed:
                    found = model(**batch, adapter_names=names).logits
                moves.append(mixed.launched.count("index_select"))
                for i, name in enumerate(names):
                    model.set_adapter(name)
                    alone = model(**{k: v[i : i + 1] for k, v in batch.items()}).logits
                    torch.testing.assert_close(found[i : i + 1], alone)
    once = 3  # factors and scales
    assert [(n - min(moves)) / count for n in moves] == [2, 2, once, 0, 2, 2, *[2] * 6]


def test_every_layer_is_checked_once_a_forward_and_before_all_products(monkeypatch):
    model = several()
    batch = oracle.inputs(model, batch=len(NAMES))
    events = []
    check, product = ContentWatch.holds, torch.bmm
    with torch.no_grad():
        model(**batch, adapter_names=NAMES)
        monkeypatch.setattr(ContentWatch, "holds", lambda self: (events.append("check"), check(self))[1])
        monkeypatch.setattr(torch, "bmm", lambda *a, **k: (events.append("product"), product(*a, **k))[1])
        for _ in range(2):
            events.clear()
            model(**batch, adapter_names=NAMES)
            count = len(layers(model))
            assert events == ["check"] * count + ["product"] * count


def test_a_layer_called_again_in_the_same_context_sees_what_changed_between():
    model = several()
    layer = layers(model)[0]
    x = torch.randn(len(NAMES), 2, layer.in_features)
    with torch.no_grad(), model.base_model.routed(NAMES):
        first = [layer(x), layer(x), layer(x)]
        layer.lora_B[NAMES[2]].weight.mul_(3)
        second = layer(x)
    assert torch.equal(first[1], first[2])
    changed = [not torch.equal(a, b) for a, b in zip(first[2], second, strict=True)]
    assert changed == [name == NAMES[2] for name in NAMES]
    base = layer.base_layer(x[2])
    torch.testing.assert_close(second[2] - base, 3 * (first[2][2] - base))


def test_a_hook_on_the_base_layer_acts_in_every_call():
    model = several()
    layer = layers(model)[0]
    x = torch.randn(len(NAMES), 2, layer.in_features)
    with torch.no_grad(), model.base_model.routed(NAMES):
        first = [layer(x), layer(x)]
        layer.base_layer.register_forward_hook(lambda module, args, out: out + 1)
        torch.testing.assert_close(layer(x), first[1] + 1)


def test_dropout_acts_while_training_without_gradients():
    model = several(dropout=0.5)
    layer = layers(model)[0]
    x = torch.randn(len(NAMES), 2, layer.in_features)
    with torch.no_grad(), model.base_model.routed(NAMES):
        calm = [layer(x) for _ in range(3)]
        model.train()
        noisy = [layer(x) for _ in range(2)]
        model.eval()
        after = layer(x)
    assert torch.equal(calm[1], calm[2]) and torch.equal(after, calm[2])
    assert not torch.equal(noisy[0], noisy[1])


def test_adapters_of_different_scales_and_tensor_scales():
    model = several()
    layer = layers(model)[0]
    x = torch.randn(len(NAMES), 2, layer.in_features)
    layer.scaling[NAMES[1]] = 0.25
    layer.scaling[NAMES[4]] = torch.tensor(1.5)
    with torch.no_grad(), model.base_model.routed(NAMES):
        before = [layer(x) for _ in range(2)][1]
        layer.scaling[NAMES[4]].fill_(3.0)
        after = layer(x)
        base = layer.base_layer(x)
    for i, name in enumerate(NAMES):
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        delta = x[i] @ a.T @ b.T
        scale = {1: 0.25, 4: 1.5}.get(i, 2.0)
        torch.testing.assert_close(before[i], base[i] + scale * delta)
        torch.testing.assert_close(after[i], base[i] + (3.0 if i == 4 else scale) * delta)


def kept(model) -> list:
    return [k for layer in layers(model) for k in layer.control.kept(layer) if k is not None]


def test_what_is_kept_goes_with_its_adapters():
    model = several()
    batch = oracle.inputs(model, batch=len(NAMES))
    with torch.no_grad():
        model(**batch, adapter_names=NAMES)
        stacks = [weakref.ref(k) for k in kept(model)]
        factor = weakref.ref(layers(model)[0].lora_A[NAMES[3]].weight)
        assert len(stacks) == len(layers(model))
        model.delete_adapter(NAMES[3])
        gc.collect()
        assert factor() is None and not any(stack() for stack in stacks)
        left = [n for n in NAMES if n != NAMES[3]]
        small = oracle.inputs(model, batch=len(left))
        expected = model(**small, adapter_names=left).logits
        config = model.peft_config[NAMES[0]]
        model.add_adapter(NAMES[3], config)  # another one of that name
        assert len(kept(model)) == len(layers(model))  # of the others nothing is lost
        assert torch.equal(model(**small, adapter_names=left).logits, expected)
        model.base_model.forget_stacks()
        assert not kept(model)


@pytest.mark.parametrize("how", ["alone", "mixed", "said"])
def test_what_optimizers_write_without_a_trace_is_seen(how):
    """bitsandbytes' and others with kernels of their own count no write."""
    model = several()
    model.set_requires_grad(NAMES)
    before = mixed(model)
    batch = oracle.inputs(model, batch=len(NAMES))
    if how == "alone":
        model.train()(**batch)
    elif how == "mixed":  # dropout is off, and nobody has switched to training
        model(**batch, adapter_names=NAMES)
    versions = [p._version for p in model.parameters()]
    for p in model.parameters():
        if p.requires_grad:
            p.detach().numpy()[...] *= 2
    assert [p._version for p in model.parameters()] == versions
    if how == "alone":
        model.eval()
    elif how == "said":
        model.base_model.forget_stacks()
    after = mixed(model)
    fresh = several()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(after, mixed(fresh)) and differing(before, after) == NAMES


def test_a_mixed_batch_for_each_of_several_sets_of_factors():
    """`vmap` over all Parameters, whose memory nobody can ask for."""
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = peftfast.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()), config, "a").eval()
    model.add_adapter("b", config)
    x, names = torch.randn(2, 8), {"adapter_names": ["a", "b"]}
    many = {n: torch.stack([p.detach(), 2 * p.detach()]) for n, p in model.named_parameters()}
    found = torch.vmap(lambda own: torch.func.functional_call(model, own, (x,), names))(many)
    for i, one in enumerate(found):
        own = {n: p[i] for n, p in many.items()}
        torch.testing.assert_close(one, torch.func.functional_call(model, own, (x,), names))


def test_a_new_adapter_of_an_old_name_acts_where_the_old_one_did_not():
    model = several()
    fewer = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    batch = oracle.inputs(model, batch=2)
    for config in (fewer, model.peft_config[NAMES[0]]):
        model.delete_adapter(NAMES[1])
        model.add_adapter(NAMES[1], config)
        with torch.no_grad():
            both = model(**batch, adapter_names=NAMES[:2]).logits
            model.set_adapter(NAMES[1])
            torch.testing.assert_close(both[1:], model(**batch).logits[1:])


def test_as_many_sets_of_adapters_are_kept_as_were_said_to_be():
    model = several()
    with torch.no_grad():
        for i in range(MIXES + 2):
            names = [NAMES[i], NAMES[i + 1], BASE]
            model(**oracle.inputs(model, batch=3), adapter_names=names)
            assert len(kept(model)) == min(i + 1, MIXES) * len(layers(model))


def mixed(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**oracle.inputs(model, batch=len(NAMES)), adapter_names=NAMES).logits


def differing(before: torch.Tensor, after: torch.Tensor) -> list[str]:
    return [name for name, a, b in zip(NAMES, before, after, strict=True) if not torch.equal(a, b)]


def test_where_adapters_are_promised_not_to_change_nobody_looks(monkeypatch):
    model = several()
    mixed(model)
    expected = mixed(model)
    looks = []
    check = ContentWatch.holds
    with model.base_model.unchanging_adapters():
        monkeypatch.setattr(ContentWatch, "holds", lambda self: (looks.append(self), check(self))[1])
        for _ in range(5):
            assert torch.equal(mixed(model), expected)
        assert not looks
    assert len(looks) == len(layers(model))
    mixed(model)
    assert len(looks) == 2 * len(layers(model))


def test_what_the_library_changes_is_no_broken_promise(tmp_path):
    model = several()
    model.save_pretrained(tmp_path, selected_adapters=[NAMES[5]])
    mixed(model)
    tuner = model.base_model
    with tuner.unchanging_adapters():
        before = mixed(model)
        for layer in layers(model):
            layer.set_scale(NAMES[0], 3.0)
        scaled = mixed(model)
        assert differing(before, scaled) == NAMES[:1]
        hotswap_adapter(model, str(tmp_path / NAMES[5]), NAMES[1])
        swapped = mixed(model)
        assert differing(scaled, swapped) == [NAMES[1]]
        state = peftfast.get_peft_model_state_dict(model, adapter_name=NAMES[5])
        peftfast.set_peft_model_state_dict(model, {k: 2 * v for k, v in state.items()}, NAMES[2])
        assert differing(swapped, mixed(model)) == [NAMES[2]]
        model.delete_adapter(NAMES[3])
        model.load_adapter(tmp_path / NAMES[5], NAMES[3])
        after = mixed(model)
        assert differing(swapped, after) == NAMES[2:4]
    tuner.forget_stacks()
    assert torch.equal(mixed(model), after)


@pytest.mark.parametrize("change", [lambda f: f.mul_(2), lambda f: setattr(f, "data", 2 * f.data)])
def test_a_broken_promise_is_an_error(change):
    model = several()
    before = mixed(model)
    factor = layers(model)[3].lora_B[NAMES[2]].weight
    with pytest.raises(RuntimeError, match=rf"{layers(model)[3].adapters[NAMES[2]].key}.* n2"):
        with model.base_model.unchanging_adapters(), torch.no_grad():
            change(factor)
            assert not differing(before, mixed(model))
    assert differing(before, mixed(model)) == [NAMES[2]]
    with model.base_model.unchanging_adapters(), torch.no_grad():
        change(factor)
        with pytest.raises(RuntimeError, match="promised"):
            for _ in range(LOOKS_EVERY + 1):
                mixed(model)
    before = mixed(model)
    with torch.no_grad():
        change(factor)
    with model.base_model.unchanging_adapters():
        assert differing(before, mixed(model)) == [NAMES[2]]  # changed before the promise
        with model.base_model.unchanging_adapters():
            mixed(model)


def test_a_promise_does_not_hide_another_error():
    model = several()
    mixed(model)
    with pytest.raises(KeyError), model.base_model.unchanging_adapters(), torch.no_grad():
        layers(model)[0].lora_A[NAMES[0]].weight.zero_()
        raise KeyError
