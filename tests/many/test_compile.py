"""One graph for every active adapter, scale and mix (torch.compile, counters of graphs)."""

from __future__ import annotations

import oracle
import pytest
import torch
from many.adapters import BASE, adapter, expected, ids_of
from torch._dynamo.testing import CompileCounterWithBackend

import peftfast
from peftfast import AdapterPool, LoraConfig


def compiled(function, backend: str):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True), counter


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_pool_serves_every_mix_with_one_graph(backend):
    pool = AdapterPool(oracle.llama(), slots=4, target_modules=["q_proj", "v_proj", "down_proj"], max_rank=8)
    for i in range(12):
        pool.register(f"a{i}", adapter(i))
    call, counter = compiled(pool.forward, backend)
    ids = ids_of(3)
    mixes = [["a0", "a1", BASE], ["a2", "a2", "a3"], ["a9", BASE, "a1"], [BASE] * 3, ["a11", "a4", "a5"]]
    with torch.no_grad():
        for mix in mixes:  # ranks, scalings and modules of the adapters differ
            with pool.use(mix) as slots:
                got = call(slots, input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(got, expected(mix, ids), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def three() -> torch.nn.Module:
    model = peftfast.get_peft_model(
        oracle.llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False), "one"
    )
    model.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.add_adapter("three", LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=False))
    return model.eval()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_adapter_numbers_make_one_graph_for_every_mix_active_adapter_and_scale(backend):
    model = three()
    peftfast.prepare_model_for_compiled_hotswap(model)  # scalings become tensors
    call, counter = compiled(model, backend)
    batch = {**oracle.inputs(model, batch=3), "use_cache": False}
    mixes = [["one", "two", BASE], ["three"] * 3, ["two", BASE, "two"], ["one", "three", "two"]]
    with torch.no_grad():
        for i, mix in enumerate(mixes):
            numbers = model.base_model.adapter_numbers(mix)
            torch.testing.assert_close(
                call(**batch, adapter_names=numbers).logits, model(**batch, adapter_names=mix).logits
            )
            for layer in model.base_model.inventory.layers.values():
                layer.set_scale("two", 0.5 + i)
            torch.testing.assert_close(
                call(**batch, adapter_names=numbers).logits, model(**batch, adapter_names=mix).logits
            )
    assert counter.frame_count == 1


def test_going_back_to_an_adapter_compiles_nothing():
    """Without numbers or a pool, every adapter that is made active has a graph, made once."""
    model = three()
    call, counter = compiled(model, "eager")
    batch = {**oracle.inputs(model, batch=3), "use_cache": False}
    with torch.no_grad():
        for _ in range(2):
            for name in ("one", "two", "three"):
                model.base_model.set_adapter(name, inference_mode=True)
                torch.testing.assert_close(call(**batch).logits, model(**batch).logits)
    assert counter.frame_count <= 3


def test_layers_that_are_compiled_after_an_eager_call_of_the_batch():
    """As transformers compiles the steps of `generate` with a static cache: what is kept of factors is in no graph."""
    model, batch, mix = three(), oracle.inputs(oracle.llama(), batch=3), ["one", "two", BASE]
    with torch.no_grad(), model.base_model.routed(mix, (), batch):
        expected = model.model(**batch).logits
        call, _ = compiled(model.model, "eager")
        torch.testing.assert_close(call(**batch).logits, expected)


def test_compiled_layers_of_an_eager_model_do_not_depend_on_the_numbers():
    """The host reads numbers that lie on the CPU; what is compiled inside must not."""
    model = three()
    counter = CompileCounterWithBackend("eager")
    batch = {**oracle.inputs(model, batch=3), "use_cache": False}
    mixes = [["one", "two", BASE], ["three"] * 3, ["two", BASE, "two"], [BASE] * 3]
    with torch.no_grad():
        expected = [model(**batch, adapter_names=mix).logits for mix in mixes]
        for layer in model.base_model.model.model.layers:
            layer.compile(backend=counter, fullgraph=True)
        for mix, logits in zip(mixes, expected, strict=True):
            numbers = model.base_model.adapter_numbers(mix)
            torch.testing.assert_close(model(**batch, adapter_names=numbers).logits, logits)
    assert counter.frame_count == 1
