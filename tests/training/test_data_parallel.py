"""torch.nn.DataParallel: replicas as torch makes them for several GPUs, all of them on the CPU here."""

import gc
import importlib
import weakref

import oracle
import pytest
import torch

import peftfast

TOKENS = {"trainable_token_indices": [1, 5]}
KINDS = {
    "lora": ("LoraConfig", {"target_modules": "all-linear", "bias": "all"}),
    "dora": ("LoraConfig", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "saved": ("LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], **TOKENS}),
    "parameters": ("LoraConfig", {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "adalora": ("AdaLoraConfig", {"target_modules": ["q_proj"], "total_step": 10}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
}


def adapted(kind):
    name, options = KINDS[kind]
    config = getattr(peftfast, name)(task_type="CAUSAL_LM", **options)
    return oracle.moved(oracle.quietly(peftfast.get_peft_model, oracle.llama(), config)).train()


@pytest.fixture
def replicate(monkeypatch):
    module = importlib.import_module("torch.nn.parallel.replicate")

    def copies(tensors, devices, detach=False):
        return [[t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(module, "_get_device_index", lambda device, optional=False: device)
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    return lambda model, count=2: module.replicate(model, range(count))


def check(model, replicas):
    """Each computes what the model does, from its own tensors alone, and gives the model the gradients."""
    batch = oracle.inputs(model)
    batch["labels"] = batch["input_ids"]
    expected = model(**batch).logits.detach()
    gradients = oracle.step_gradients(model)
    model.zero_grad()
    kept = {p: p.detach().clone() for p in model.parameters()}
    for p in kept:
        p.data = torch.full_like(p, torch.nan)
    outputs = [replica(**batch) for replica in replicas]
    for p, values in kept.items():
        p.data = values
    for output in outputs:
        torch.testing.assert_close(output.logits, expected)
    (sum(output.loss for output in outputs) / len(outputs)).backward()
    found = oracle.gradients(model)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_compute_what_the_model_does(kind, replicate):
    model = adapted(kind)
    check(model, replicate(model))


def test_replicas_of_adapters_in_a_bare_model(replicate):
    """Where nothing stands around the layers; two of them share a module here."""
    model = oracle.llama(tied=True)
    config = peftfast.LoraConfig(target_modules=["q_proj"], **TOKENS)
    oracle.quietly(peftfast.inject_adapter_in_model, config, model)
    oracle.moved(model).train()
    check(model, replicate(model))


def test_replicas_are_gone_with_their_last_reference(replicate):
    """They have a copy of all weights, and there are others in every step."""
    model = adapted("lora")
    gc.collect()
    gc.disable()
    try:
        replica = replicate(model)[0]
        replica(**oracle.inputs(model))
        parts = [weakref.ref(module) for module in replica._whole.modules()]
        del replica
        assert not [part for part in parts if part() is not None]
    finally:
        gc.enable()
