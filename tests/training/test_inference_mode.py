"""Validation in inference mode, as Lightning does it, between steps of training: nothing that a model keeps from one
forward to the next may be a tensor of that mode, which no other mode may write to or save."""

from contextlib import nullcontext

import oracle
import pytest
import torch

import peftfast
from peftfast.helpers import DoraCaching
from peftfast.ops import composed
from peftfast.ops import lora as lora_ops
from peftfast.training import blocks

IDS = torch.arange(28).view(4, 7)


def lora(**fields):
    return peftfast.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **fields)


METHODS = {
    "LoRA": lora,
    "LoRA with dropout": lambda: lora(lora_dropout=0.2),
    "DoRA": lambda: lora(use_dora=True),
    "KaSA": lambda: lora(kasa_config=peftfast.KasaConfig()),
    "MonteCLoRA": lambda: lora(monteclora_config=peftfast.MontecloraConfig(num_samples=2, buffer_size=2)),
    "VeLoRA": lambda: lora(velora_config=peftfast.VeloraConfig(num_groups=4)),
    "embedding": lambda: peftfast.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False),
    "trainable tokens": lambda: peftfast.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    "IA3": lambda: peftfast.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "AdaLoRA": lambda: peftfast.AdaLoraConfig(target_modules=["q_proj"], total_step=20, init_r=4, target_r=2),
    "prompt tuning": lambda: peftfast.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P-tuning": lambda: peftfast.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8
    ),
    "prefix tuning": lambda: peftfast.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def losses(model, autocast, validation, **inputs):
    """Of two steps of training, each after a validation."""
    found = []
    for _ in range(2):
        for mode in (validation, torch.enable_grad):
            with mode(), torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                torch.manual_seed(1)
                loss = model(input_ids=IDS, labels=IDS, **inputs).loss
            found.append(loss.item())
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
                    p.grad = None
    return found


def cases():
    for method in METHODS:
        yield method, "alone", "small"
        yield method, "alone", "large"
        if method not in ("AdaLoRA", "prompt tuning", "P-tuning", "prefix tuning"):
            yield method, "mixed", "large"
    yield "LoRA", "alone", "host-bound"
    yield "LoRA with dropout", "alone", "host-bound"
    yield "LoRA", "in blocks", "large"
    yield "LoRA", "in blocks", "host-bound"


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("method, how, size", list(cases()))
def test_training_goes_on(method, how, size, autocast, monkeypatch):
    if size != "small":
        monkeypatch.setattr(composed, "SMALL", {})
    if size == "host-bound":
        for module in (lora_ops, blocks):
            monkeypatch.setattr(module, "is_host_bound", lambda x, plan: plan.format == "dense")
    found = []
    for validation in (torch.inference_mode, torch.no_grad):
        torch.manual_seed(0)
        model = peftfast.get_peft_model(oracle.llama(), METHODS[method]()).train()
        inputs = {}
        if how == "in blocks":
            peftfast.fuse_blocks(model)
        if how == "mixed":
            model.add_adapter("other", METHODS[method]())
            inputs = {"adapter_names": ["default", "other", "__base__", "other"]}
        found.append(losses(model, autocast, validation, **inputs))
    # blocks are formed by a pass that is not in inference mode, until when the layers round by themselves
    assert found[0] == pytest.approx(found[1], rel=1e-2 if how == "in blocks" else 1e-5)


def test_norms_that_were_kept_in_inference_mode():
    model = peftfast.get_peft_model(oracle.llama(), METHODS["DoRA"]()).eval()
    with DoraCaching():
        with torch.inference_mode():
            expected = model(input_ids=IDS, labels=IDS).loss
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
    assert torch.equal(loss, expected) and all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_blocks_of_adapters_that_inference_mode_made(monkeypatch):
    """Inference tensors do not tell whether somebody wrote to them."""
    monkeypatch.setattr(composed, "SMALL", {})
    with torch.inference_mode():
        model = peftfast.get_peft_model(oracle.llama(), METHODS["LoRA"]()).eval()
        ids = oracle.inputs(model)["input_ids"]
    blocks = peftfast.fuse_blocks(model)
    with torch.no_grad():
        found = [model(input_ids=ids).logits for _ in range(3)]
    assert "on" in blocks.report()
    torch.testing.assert_close(found[0], found[2])
