"""What a prompt does must not depend on how the model is run: at once or step by step, with any cache, with gradient
checkpointing, in a mixed batch."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import transformers
from oracle import python_calls
from prompts.tiny import CAUSAL, METHODS, RECURRENT, assert_same, base, batch, config, gradients, ours, result
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import peftfast

pytestmark = pytest.mark.filterwarnings("ignore")


def double(family: str, method: str, **changes):
    return ours(family, method, **changes).double()


# ---- what it costs ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method, most", [("prompt", 100), ("prefix", 200)])
def test_a_forward_takes_few_steps_beside_the_base(method: str, most: int):
    """What is read off a model is read once: the arguments of its forward alone took as many steps as a layer does."""
    model, inputs = ours("llama", method).eval(), batch("llama", "none")
    with torch.no_grad():
        for call in (model, model.get_base_model()):
            call(**inputs)
        own, base_alone = (python_calls(lambda m=m: m(**inputs)) for m in (model, model.get_base_model()))
    assert own - base_alone < most, (own, base_alone)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_compiled(method: str):
    """One graph, whatever other models there are."""
    model, inputs = ours("llama", method).eval(), batch("llama", "none")
    counter = CompileCounter()
    compiled = torch.compile(copy.deepcopy(model), backend=counter, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            found = result(compiled(**inputs))
            assert torch.equal(found, result(model(**inputs)))
            model = copy.deepcopy(model)
    assert counter.frame_count == 1


@pytest.mark.parametrize("method", [*METHODS])
def test_a_base_that_is_offloaded(method: str):
    """Prompts went where the word embeddings are while these rest, which is nowhere."""
    accelerate = pytest.importorskip("accelerate")
    away = accelerate.cpu_offload(base("llama"), execution_device=torch.device("cpu"))
    outputs = [result(ours("llama", method, model)(**batch("llama"))) for model in (away, None)]
    assert torch.equal(*outputs)


# ---- step by step ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("family", CAUSAL)
def test_step_by_step_is_teacher_forced(family: str, method: str):
    model = double(family, method).eval()
    # Gemma 2's own attention takes its softmax in fp32, where fp64's mask of padding is minus infinity
    inputs = batch(family, "none" if family == "gemma2" else "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        whole = result(model(input_ids=ids, attention_mask=mask))[:, -ids.shape[1] :]
        first = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
        cache, parts = first.past_key_values, [first.logits[:, -4:]]
        for step in range(4, ids.shape[1]):
            out = model(input_ids=ids[:, step : step + 1], attention_mask=mask[:, : step + 1], past_key_values=cache)
            parts.append(out.logits)
    visible = mask.bool()
    assert_same(torch.cat(parts, 1)[visible], whole[visible], 1e-6 if family == "gemma2" else 1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [*CAUSAL, "t5"])
def test_generated_tokens_are_the_likeliest(family: str, method: str):
    """Greedy tokens are what a teacher-forced forward over prompt, input and continuation prefers."""
    model = double(family, method).eval()
    inputs = {k: v for k, v in batch(family, "none").items() if k != "labels"}
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
        if family == "t5":
            logits = result(model(**inputs, decoder_input_ids=out))
            chosen, preferred = out[:, 1:], logits[:, :-1].argmax(-1)
        else:
            logits = result(model(input_ids=out, attention_mask=torch.ones_like(out)))[:, -out.shape[1] :]
            chosen, preferred = out[:, -6:], logits[:, -7:-1].argmax(-1)
    # a tie, or a token that generate never gives, would show as a difference
    assert torch.equal(chosen, preferred)


@pytest.mark.parametrize("generation", [{}, {"use_cache": False}, {"num_beams": 2}])
@pytest.mark.parametrize("method", ["prompt", "mlp"])
@pytest.mark.parametrize("family", RECURRENT)
def test_state_space_models_keep_the_prompt_in_their_state(family: str, method: str, generation: dict):
    """Their cache holds states and no tokens, so nothing in it can be counted."""
    sizes = {"num_attention_heads": 4, "num_layers": 2, "token_dim": 32}  # configs of state-space models lack some
    model = double(family, method, **sizes).eval()
    inputs = {k: v for k, v in batch(family, "left", length=3).items() if k != "labels"}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    every = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    with torch.no_grad():
        out = model.generate(**inputs, **every, output_logits=True, **generation)
        if "num_beams" in generation:
            assert out.sequences.shape == (3, 9)
            return
        for step in range(6):
            logits = result(model(input_ids=ids, attention_mask=mask))[:, -1]
            assert_same(out.logits[step].double(), logits.double(), 1e-4)  # Mamba computes its states in fp32
            ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
            mask = torch.cat((mask, mask.new_ones(3, 1)), 1)
        without = model.get_base_model()(input_ids=ids[:, :8], attention_mask=mask[:, :8]).logits[:, -1]
    assert torch.equal(out.sequences, ids)
    assert (out.logits[-1] - without).abs().max() > 1e-2  # the prompt is still in the state


@pytest.mark.parametrize("cache", [
    {"use_cache": False}, {"cache_implementation": "static"}, {"cache_implementation": "offloaded"},
    {"prefill_chunk_size": 3}, {"prompt_lookup_num_tokens": 2},
], ids=lambda c: "-".join(str(v) for v in next(iter(c.items()))))  # fmt: skip
@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "bloom", "t5"])
def test_cache_classes(family: str, method: str, cache: dict):
    if family == "t5" and "prefill_chunk_size" in cache:
        pytest.skip("transformers' own T5 gives other tokens so")
    if "offloaded" in cache.values() and not torch.cuda.is_available():
        pytest.skip("transformers offloads from an accelerator only")
    model = double(family, method).eval()
    inputs = {k: v for k, v in batch(family).items() if k != "labels"}
    if "prompt_lookup_num_tokens" in cache:
        inputs = {k: v[2:] for k, v in inputs.items()}
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    if "prompt_lookup_num_tokens" in cache:
        settings["eos_token_id"] = 2  # without one it fails in transformers 5.0 to 5.8
    try:
        base(family).generate(**inputs, **settings, **cache)
    except ValueError as error:
        pytest.skip(f"transformers {transformers.__version__} refuses it for the bare model: {error}")
    assert torch.equal(model.generate(**inputs, **settings, **cache), model.generate(**inputs, **settings))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_an_encoders_embeddings_generate_what_its_ids_do(method: str):
    model, ids = double("t5", method).eval(), batch("t5")["input_ids"]
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(input_ids=ids, **how)
    assert torch.equal(model.generate(inputs_embeds=model.word_embeddings(ids), **how), expected)


def test_own_cache_is_filled_in_place():
    from transformers import DynamicCache

    model = double("llama", "prefix").eval()
    inputs = batch("llama", "none")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        out = model(input_ids=inputs["input_ids"], past_key_values=cache)
    assert out.past_key_values is cache and cache.get_seq_length() == 3 + 7


@pytest.mark.parametrize("how", ["dynamic", "chunks", "static"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_the_next_turn_of_a_conversation_goes_on_with_the_cache(method: str, how: str):
    """The whole conversation is given again, with the cache of the turn before: `generate` leaves out as many tokens
    as that holds, and virtual ones are none of them."""
    from transformers import StaticCache

    every = {"max_new_tokens": 3, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}

    def next_turn(model):
        ids = batch("llama", "none")["input_ids"]
        first = {"past_key_values": StaticCache(model.config, max_cache_len=20)} if how == "static" else {}
        turn = model.generate(ids, attention_mask=torch.ones_like(ids), **every, **first)
        cache, ids = turn.past_key_values, torch.cat((turn.sequences, ids[:, :4]), 1)
        before = int(cache.get_seq_length())  # of a static one a tensor, which counts on
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **every}
        chunks = {"prefill_chunk_size": 2} if how == "chunks" else {}
        got = model.generate(**inputs, past_key_values=cache, **chunks)
        return torch.stack(got.logits), torch.stack(model.generate(**inputs).logits), cache, before

    if how == "chunks" and next_turn(base("llama").eval())[2].get_seq_length() != 14 + 2:
        pytest.skip(f"transformers {transformers.__version__} counts chunks from the beginning")
    got, wanted, cache, before = next_turn(double("llama", method).eval())
    assert_same(got, wanted)
    assert (before, cache.get_seq_length()) == (3 + 7 + 2, 3 + 14 + 2) and "get_seq_length" not in cache.__dict__


def test_generate_leaves_nothing_behind():
    model = ours("llama", "prompt").eval()
    inputs = batch("llama")
    before = dict(model.get_base_model().__dict__)

    def stop(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        model.generate(input_ids=inputs["input_ids"], max_new_tokens=2, logits_processor=[stop])
    assert model.get_base_model().__dict__.keys() == before.keys()


def test_model_is_freed():
    model = ours("llama", "prefix").eval()
    model.generate(input_ids=batch("llama")["input_ids"], max_new_tokens=2)
    gone = weakref.ref(model.get_base_model())
    del model
    gc.collect()
    assert gone() is None


# ---- computed once ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["mlp", "lstm", "projected"])
def test_network_runs_once_at_inference(method: str):
    model = double("llama", method).eval()
    inputs = {k: v for k, v in batch("llama").items() if k != "labels"}
    encoder = model.prompt_encoder["default"]
    calls, compute = [0], encoder._compute
    encoder._compute = lambda: (calls.__setitem__(0, calls[0] + 1), compute())[1]
    with torch.no_grad():
        first = result(model(**inputs))
        for _ in range(3):
            assert torch.equal(result(model(**inputs)), first)
        model.generate(**inputs, max_new_tokens=4)
    assert calls[0] == 1
    # a step of training, a load, a move: the kept prompt goes
    with torch.no_grad():
        encoder.embedding.weight.mul_(2)
        assert not torch.equal(result(model(**inputs)), first)
    assert calls[0] == 2
    gradients(model, batch("llama"))
    assert calls[0] == 3
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1.0)
    optimizer.step()
    with torch.no_grad():
        changed = result(model(**inputs))
        encoder._kept = None
        assert torch.equal(changed, result(model(**inputs)))


@pytest.mark.parametrize("method", ["mlp", "lstm", "projected"])
def test_kept_prompt_sees_other_parameters_modules_and_hooks(method: str):
    """As PEFT does, which keeps nothing."""
    model = double("llama", method).eval()
    inputs = {k: v for k, v in batch("llama").items() if k != "labels"}
    encoder = model.prompt_encoder["default"]
    network = getattr(encoder, encoder.networks[-1])

    @torch.no_grad()
    def output(kept: bool) -> Tensor:
        if not kept:
            encoder._kept = None
        return result(model(**inputs))

    with torch.no_grad():
        first, doubled = output(True), {n: 2 * p for n, p in model.named_parameters() if n.startswith("prompt_encoder")}
        called = torch.func.functional_call(model, doubled, (), inputs)
        assert torch.equal(output(True), first)
        hook = network.register_forward_hook(lambda _module, _args, out: 2 * out)
        assert not torch.equal(output(True), first)
        hook.remove()
        assert torch.equal(output(True), first)
        assert copy.deepcopy(encoder)._kept is None
        network[0] = copy.deepcopy(network[0])
        network[0].weight.mul_(2)
        assert torch.equal(output(True), output(False))
        for name, tensor in doubled.items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
        assert torch.equal(output(True), output(False))
    assert torch.equal(result(called), output(False))


@pytest.mark.parametrize("method", ["mlp", "lstm", "projected"])
def test_kept_prompt_is_of_this_precision(method: str):
    """As in PEFT: a forward under autocast computes the network in half precision, one without it does not."""
    encoder = double("llama", method).float().eval().prompt_encoder["default"]
    with torch.no_grad():
        for half in (False, True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                assert torch.equal(encoder.virtual_tokens(), copy.deepcopy(encoder).virtual_tokens())


@pytest.mark.parametrize("method", ["mlp", "lstm", "projected"])
def test_a_network_of_which_a_part_is_frozen_trains_in_evaluation(method: str):
    """After it was kept, too; and what is moved holds on to nothing where it was."""
    model, inputs = double("llama", method).eval(), batch("llama")
    encoder = model.prompt_encoder["default"]
    encoder.embedding.requires_grad_(False)
    with torch.no_grad():
        model(**inputs)
    kept = weakref.ref(encoder._kept[2])
    model.float()
    assert kept() is None
    with torch.no_grad():
        model(**inputs)
    found = gradients(model, inputs)
    assert found and all(gradient.any() for gradient in found.values())


def test_several_networks_at_once():
    """`vmap` over a network's Parameters, whose memory nobody can ask for."""
    model, inputs = double("llama", "mlp").eval(), {"input_ids": batch("llama")["input_ids"]}
    model.get_base_model().set_attn_implementation("eager")
    many = {n: torch.stack([p.detach(), 2 * p.detach()]) for n, p in model.named_parameters() if p.requires_grad}
    found = torch.vmap(lambda own: result(torch.func.functional_call(model, own, (), inputs)))(many)
    model.load_state_dict({n: p[1] for n, p in many.items()}, strict=False)
    assert_same(found[1], result(model(**inputs)), 1e-12)


def test_kept_prompt_from_inference_mode_can_be_trained_through():
    model = double("llama", "projected").eval()
    model.set_adapter("default", inference_mode=True)
    inputs = batch("llama")
    with torch.inference_mode():
        model(**inputs)
    embeds = model.word_embeddings(inputs["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], labels=inputs["labels"]).loss.backward()
    assert embeds.grad.abs().max() > 0


def test_a_prompt_of_inference_tensors_is_not_kept():
    with torch.inference_mode():
        model = double("llama", "projected").eval()
        inputs = batch("llama")
        first = result(model(**inputs))
        next(model.prompt_encoder["default"].parameters()).mul_(2)
        assert not torch.equal(result(model(**inputs)), first)


# ---- half precision --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_bf16_base_keeps_fp32_prompts(method: str):
    exact = double("llama", method).eval()
    model = ours("llama", method, model=base("llama").to(torch.bfloat16)).eval()
    assert {p.dtype for p in model.prompt_encoder.parameters()} == {torch.float32}
    inputs = batch("llama")
    assert result(model(**inputs)).dtype == torch.bfloat16
    assert_same(result(model(**inputs)).double(), result(exact(**inputs)), 0.05)
    grads = gradients(model, inputs)
    assert {g.dtype for g in grads.values()} == {torch.float32}


# ---- several adapters ------------------------------------------------------------------------------------------------
def with_three(family: str, method: str):
    model = ours(family, method)
    for name, seed in (("second", 11), ("third", 12)):
        torch.manual_seed(seed)
        model.add_adapter(name, config(peftfast, method, family))
    return model.double().eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma4", "t5", "bert"])
def test_rows_have_their_own_prompts(family: str, method: str):
    model = with_three(family, method)
    inputs = {k: v for k, v in batch(family, "right").items() if k != "labels"}
    if family == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    names = ["second", "default", "third"]
    with torch.no_grad():
        mixed = result(model(**inputs, adapter_names=names))
        for row, name in enumerate(names):
            model.set_adapter(name)
            assert_same(mixed[row], result(model(**inputs))[row])
    assert not torch.allclose(mixed[1], result(model(**inputs))[1])


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("method", ["prompt", "projected"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_rows_generate_with_their_own_prompts(family: str, method: str, beams: int):
    model = with_three(family, method)
    inputs = {k: v for k, v in batch(family, "none").items() if k != "labels"}
    settings = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "eos_token_id": None}
    names = ["third", "default", "second"]
    mixed = model.generate(**inputs, **settings, adapter_names=names)
    for row, name in enumerate(names):
        model.set_adapter(name)
        assert torch.equal(model.generate(**inputs, **settings)[row], mixed[row])


HEADS = {"llama": "lm_head", "t5": "lm_head", "bert": "classifier"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", HEADS)
@torch.no_grad()
def test_rows_have_their_own_copies_of_modules(family: str, method: str):
    """One of the three has none. Rows of one adapter have its copy whichever is active, those of the base none."""
    model = ours(family, method, modules_to_save=[HEADS[family]])
    model.add_adapter("second", config(peftfast, method, family, modules_to_save=[HEADS[family]]))
    model.add_adapter("third", config(peftfast, method, family))
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name or name.startswith("prompt_encoder"):
            parameter.normal_()
    model = model.double().eval()
    inputs = {k: v for k, v in batch(family, "none").items() if k != "labels"}
    calls = [lambda **names: result(model(**inputs, **names))]
    if family == "t5":
        calls[0] = lambda **names: result(model(**inputs, decoder_input_ids=inputs["input_ids"], **names))
    if family != "bert":
        how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 2}
        calls.append(lambda **names: model.generate(**inputs, **how, **names))
    for call in calls:
        alone = {}
        for name in ("third", "second", "default"):
            model.set_adapter(name)
            alone[name] = call()
        with model.disable_adapter():
            alone["__base__"] = call()
        for names in (["second", "default", "third"], *([name] * 3 for name in alone)):
            for row, (got, name) in enumerate(zip(call(adapter_names=names), names, strict=True)):
                assert_same(got.double(), alone[name][row].double())


def test_each_adapters_own_copy_of_the_embeddings_reads_the_tokens():
    """Also of one that is added beside another with a copy."""
    model = ours("llama", "prompt", modules_to_save=["embed_tokens"])
    model.add_adapter("second", config(peftfast, "prompt", "llama", modules_to_save=["embed_tokens"]))
    for name in ("default", "second"):
        model.set_adapter(name)
        assert gradients(model, batch("llama"))[f"base_model.model.embed_tokens.modules_to_save.{name}.weight"].any()


def test_rows_train_their_own_prompts():
    model = with_three("llama", "prefix")
    for encoder in model.prompt_encoder.values():
        encoder.requires_grad_(True)
    inputs = batch("llama")
    model(**inputs, adapter_names=["second", "second", "default"]).loss.backward()
    grads = {n: e.embedding.weight.grad for n, e in model.prompt_encoder.items()}
    assert grads["third"] is None and grads["second"].abs().max() > 0 and grads["default"].abs().max() > 0


def test_what_rows_cannot_have():
    model = with_three("llama", "prompt")
    model.add_adapter("long", config(peftfast, "prompt", "llama", num_virtual_tokens=5))
    ids = batch("llama")["input_ids"]
    with pytest.raises(ValueError, match="prompts of one length.*'long': 5"):
        model(input_ids=ids, adapter_names=["default", "long", "default"])
    with pytest.raises(ValueError, match="__base__"):
        model(input_ids=ids, adapter_names=["default", "__base__", "default"])
    with pytest.raises(ValueError, match="non-existing adapter.*secnd.*Did you mean 'second'"):
        model(input_ids=ids, adapter_names=["default", "secnd", "default"])
    for names in (["default", "second"], ["__base__"], []):
        with pytest.raises(ValueError, match=f"got {len(names)} and 3"):
            model(input_ids=ids, adapter_names=names)
        with pytest.raises(ValueError, match=f"got {len(names)} and 3"):
            model.generate(ids, adapter_names=names)
    for names in ("default", [1, 2, 3], torch.tensor([0, 1, 1])):
        with pytest.raises(TypeError, match="a list with one adapter name for each sample; got"):
            model(input_ids=ids, adapter_names=names)
    plain = result(base("llama").double()(input_ids=ids))
    assert torch.equal(result(model(input_ids=ids, adapter_names=["__base__"] * 3)), plain)
    assert torch.equal(
        result(model(input_ids=ids, adapter_names=["long"] * 3)),
        [model.set_adapter("long"), result(model(input_ids=ids))][1],
    )


# ---- models that have an embedding of every token for every layer ----------------------------------------------------
def _with_tables_per_layer(family: str) -> torch.nn.Module:
    if not hasattr(transformers, f"{family}ForCausalLM"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    sizes = {
        "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16, "pad_token_id": 0, "eos_token_id": 2,
        "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 4, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": 24,
    }  # fmt: skip
    if family == "Gemma3n":
        sizes |= {"laurel_rank": 2, "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [24] * 4}
    else:
        sizes |= {"global_head_dim": 8}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}TextConfig")(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "per_layer" in name or "embed_tokens" in name or "scale" in name:  # some are nothing at first
                parameter.normal_()
    return model.double().eval()


@pytest.mark.parametrize("family", ["Gemma3n", "Gemma4"])
def test_tokens_behind_a_prompt_keep_their_embeddings_for_every_layer(family: str):
    """Virtual tokens with the embedding of padding are padding that is not masked."""
    model = _with_tables_per_layer(family)
    ids = torch.tensor([[5, 9, 4, 11], [7, 3, 8, 6]])
    padded = torch.cat((ids.new_zeros(2, 3), ids), 1)
    table = model.get_input_embeddings()
    with torch.no_grad():
        wanted = model(input_ids=padded, attention_mask=torch.ones_like(padded)).logits
        generated = model.generate(padded, attention_mask=torch.ones_like(padded), max_new_tokens=5, eos_token_id=None)
        prompt, embeds = table(padded[0, :3]), table(ids)
    tuned = peftfast.get_peft_model(
        model, peftfast.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).double()
    tuned.prompt_encoder["default"].embedding.weight.data.copy_(prompt)
    with torch.no_grad():
        assert_same(tuned(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, wanted, 1e-9)
        out = tuned.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=None
        )
        assert torch.equal(out[:, 4:], generated[:, 7:])
        rows = model.model.get_per_layer_inputs(ids)
        assert_same(tuned(inputs_embeds=embeds, per_layer_inputs=rows).logits, wanted, 1e-9)
        if family == "Gemma4":  # which finds the ids of embeddings by itself
            assert_same(tuned(inputs_embeds=embeds).logits, wanted, 1e-9)
    loss = tuned(input_ids=ids, labels=ids).loss
    loss.backward()
    assert tuned.prompt_encoder["default"].embedding.weight.grad.abs().sum() > 0
