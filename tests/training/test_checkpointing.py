"""Gradient checkpointing in every order and mode: the gradients of the run without it."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from oracle import gradients
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from training.tiny import batch, checkpoint, fill, largest_difference, llama, lora, wrapped

import peftfast
from peftfast.ops import composed
from peftfast.training.checkpointing import require_input_gradients


def step(model: torch.nn.Module, dtype: torch.dtype | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    model.train()
    torch.manual_seed(11)  # dropout seeds come from torch's generator
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(**batch()).loss
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    return loss.item(), found


ORDERS = ["before", "after", "after, on the base model", "after the first step"]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["plain", "dropout", "autocast", "bf16 base", "dora", "saved modules"])
def test_gradients_equal_those_without(order, reentrant, kind):
    options = {
        "dropout": {"lora_dropout": 0.4},
        "dora": {"use_dora": True},
        "saved modules": {"modules_to_save": ["lm_head"]},
    }.get(kind, {})
    dtype = torch.bfloat16 if kind == "bf16 base" else torch.float32
    cast = torch.bfloat16 if kind == "autocast" else None
    loss, expected = step(wrapped(peftfast, llama(dtype=dtype), **options), cast)

    base = llama(dtype=dtype)
    if order == "before":
        checkpoint(base, reentrant)
    model = wrapped(peftfast, base, **options)
    if order == "after the first step":
        step(model, cast)
    if order.startswith("after"):
        checkpoint(model.get_base_model() if "base" in order else model, reentrant)
    checkpointed, found = step(model, cast)
    assert checkpointed == loss
    assert set(found) == set(expected)
    # recomputing under autocast may reuse other casts of the frozen weights; the values are the same
    assert largest_difference(found, expected) == 0.0
    assert not any(
        p.requires_grad for n, p in model.named_parameters() if "lora_" not in n and "modules_to_save" not in n
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_nf4_base(reentrant):
    pytest.importorskip("bitsandbytes")
    from training.nf4 import quantise

    loss, expected = step(wrapped(peftfast, quantise(llama(hidden_size=64, intermediate_size=128)), lora_dropout=0.3))
    model = wrapped(peftfast, quantise(llama(hidden_size=64, intermediate_size=128)), lora_dropout=0.3)
    checkpoint(model, reentrant)
    checkpointed, found = step(model)
    assert checkpointed == loss
    assert largest_difference(found, expected) == 0.0


@pytest.mark.parametrize("order", ["before", "after"])
def test_injected_adapters(order):
    def injected(checkpointing: str | None) -> torch.nn.Module:
        model = llama()
        if checkpointing == "before":
            checkpoint(model, True)
        peftfast.inject_adapter_in_model(lora(peftfast), model)
        fill(model)
        if checkpointing == "after":
            checkpoint(model, True)
            require_input_gradients(model)  # no PeftModel whose forward would notice
        return model

    _, expected = step(injected(None))
    _, found = step(injected(order))
    assert largest_difference(found, expected) == 0.0


def test_again_after_an_adapter_of_the_embedding_was_unloaded():
    """What makes inputs require gradients hung on the layer around it, and is needed again."""
    model = wrapped(peftfast, base := llama(), target_modules=["embed_tokens"])
    checkpoint(model, True)
    base.disable_input_require_grads()  # transformers' own, of newer releases
    step(model)
    model.unload()
    assert not base.get_input_embeddings()._forward_hooks  # a pickle of it would need this library
    model = wrapped(peftfast, base)
    fill(model)
    assert all(found.abs().sum() for found in step(model)[1].values())


def test_masks_differ_between_steps_and_agree_between_passes():
    model = wrapped(peftfast, lora_dropout=0.5)
    checkpoint(model, False)
    model.train()
    torch.manual_seed(0)
    losses = [model(**batch()).loss.item() for _ in range(2)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_layers_are_not_run_again_with_other_adapters(reentrant):
    """Their gradients would be those of adapters that the forward pass did not use."""
    model = wrapped(peftfast)
    model.add_adapter("other", lora(peftfast))
    fill(model)
    checkpoint(model, reentrant)
    _, expected = step(model)

    loss = model(**batch()).loss
    model.set_adapter("other")
    with pytest.raises(RuntimeError, match="switched"):
        loss.backward()
    model.set_adapter("default")
    with model.disable_adapter():
        reference = model(**batch()).logits
    with pytest.raises(RuntimeError, match=r"torch.no_grad\(\)"):
        (model(**batch()).logits - reference).pow(2).sum().backward()

    loss = model(**batch()).loss
    model.set_adapter("other")
    model.set_adapter("default")  # as it was
    with model.disable_adapter(), torch.no_grad():
        model(**batch())
    model.zero_grad()
    loss.backward()
    assert largest_difference(gradients(model), expected) == 0.0


def test_rows_of_a_batch_keep_their_adapters_whichever_are_active_later():
    def grown() -> torch.nn.Module:
        model = wrapped(peftfast)
        model.add_adapter("other", lora(peftfast))
        fill(model)
        model.set_requires_grad(["default", "other"])
        return model.train()

    names = ["default", "other"] * 2
    plain, model = grown(), grown()
    plain(**batch(), adapter_names=names).loss.backward()
    checkpoint(model)
    loss = model(**batch(), adapter_names=names).loss
    model.set_adapter("other")
    loss.backward()
    assert set(gradients(plain)) > set(gradients(model))  # "default" was frozen before its gradient arrived
    assert largest_difference(gradients(model), {n: gradients(plain)[n] for n in gradients(model)}) == 0.0


def test_copies_with_checkpointing_on():
    model = wrapped(peftfast)
    checkpoint(model, True)
    _, expected = step(model)
    assert largest_difference(step(copy.deepcopy(model))[1], expected) == 0.0


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_models_that_write_into_their_embeddings(reentrant):
    """As BLIP's text model, which adds the positions in place."""

    def write(module, inputs):
        inputs[0].mul_(1.5)

    def made() -> torch.nn.Module:
        base = llama()
        base.main_input_name = "pixel_values"  # of what reads ids first, transformers makes embeddings such leaves
        base.model.rotary_emb.register_forward_pre_hook(write)  # between the embedding and the first block
        return wrapped(peftfast, base)

    loss, expected = step(made())
    checkpoint(model := made(), reentrant)
    checkpointed, found = step(model)
    assert checkpointed == loss
    assert largest_difference(found, expected) == 0.0


def test_no_graph_is_recorded_in_evaluation():
    model = wrapped(peftfast)
    checkpoint(model, True)
    step(model)
    model.eval()
    with torch.no_grad():
        logits = model(**batch()).logits
    assert not logits.requires_grad


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", ["plain", "dropout", "tied tokens", "blocks", "nf4"])
def test_products_that_are_kept_are_not_written_to(kind, large, monkeypatch):
    """Selective checkpointing gives what it kept of an operation in its place, as the operation gave it."""
    if large:
        monkeypatch.setattr(composed, "SMALL", {})
    base = llama(tied=kind == "tied tokens", hidden_size=64, attention_bias=True)
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
        from training.nf4 import quantise

        base = quantise(base)
    options = {"dropout": {"lora_dropout": 0.4}, "tied tokens": {"trainable_token_indices": [5, 7]}}
    model = wrapped(peftfast, base, **options.get(kind, {}))
    if kind == "blocks":
        peftfast.fuse_blocks(model)
    run, found = model.forward, []
    for kept in ([], [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]):
        context = partial(create_selective_checkpoint_contexts, kept)
        model.forward = partial(torch_checkpoint, run, use_reentrant=False, context_fn=context)
        found.append(step(model))
    assert found[0][0] == found[1][0]
    assert largest_difference(found[1][1], found[0][1]) == 0.0
