"""The same parameters give the same logits, gradients and generated tokens as in PEFT."""

from __future__ import annotations

import inspect

import pytest
import torch
from prompts.tiny import CAUSAL, METHODS, assert_same, base, batch, gradients, loss, ours, pair, result

import peftfast

pytestmark = pytest.mark.filterwarnings("ignore")


def compare(family: str, method: str, padding: str = "left", **changes) -> None:
    mine, other = pair(family, method, **changes)
    inputs = batch(family, padding)
    a, b = mine(**inputs), other(**inputs)
    assert_same(result(a), result(b))
    assert_same(loss(a), loss(b))
    got, expected = gradients(mine, inputs), gradients(other, inputs)
    assert got.keys() == expected.keys() and got
    assert expected["prompt_encoder.default.embedding.weight"].abs().max() > 0
    for name in got:
        assert_same(got[name], expected[name])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CAUSAL)
def test_causal(family: str, method: str):
    compare(family, method)


@pytest.mark.parametrize("padding", ["right", "none"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_padding(family: str, method: str, padding: str):
    compare(family, method, padding)


@pytest.mark.parametrize("method", METHODS)
def test_encoder_decoder(method: str):
    compare("t5", method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert-seq", "bert-qa", "bert", "llama-seq"])
def test_heads(family: str, method: str):
    if family == "llama-seq" and method in ("prompt", "mlp", "lstm"):
        compare(family, method, "left")  # the pooled token is the last one, padded or not, as in PEFT
    else:
        compare(family, method, "right")


@pytest.mark.parametrize("method", ["prefix", "projected"])
def test_token_classification(method: str):
    compare("bert-token", method, "right")


def test_token_classification_prompt_labels():
    """PEFT fails here, with logits for the virtual tokens and no labels: they are ignored, as in causal modelling."""
    mine, _ = pair("bert-token", "prompt")
    inputs = batch("bert-token", "right")
    output = mine(**inputs)
    expected = torch.nn.functional.cross_entropy(output.logits[:, 3:].reshape(-1, 3), inputs["labels"].reshape(-1))
    assert_same(output.loss, expected)


@pytest.mark.parametrize("settings", [
    {"do_sample": False}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 20},
], ids=["greedy", "beam", "sample"])  # fmt: skip
@pytest.mark.parametrize("method", ["prompt", "projected"])
@pytest.mark.parametrize("family", [*CAUSAL, "t5"])
def test_generation(family: str, method: str, settings: dict):
    mine, other = pair(family, method)
    base = mine.get_base_model()
    if family == "t5" and method == "projected" and "cache_position" in inspect.signature(base.forward).parameters:
        pytest.skip("here PEFT does not count the prefix in the places that transformers below 5.4 hands over")
    inputs = {k: v for k, v in batch(family).items() if k != "labels"}
    out = []
    for model in (mine, other):
        model.eval()
        torch.manual_seed(5)
        out.append(model.generate(**inputs, max_new_tokens=8, eos_token_id=None, **settings))
    assert torch.equal(*out)
    assert len(set(out[0][:, -8:].flatten().tolist())) > 1


@pytest.mark.parametrize("family", ["llama", "bert-seq"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_positions_and_token_types(family: str, method: str):
    mine, other = pair(family, method)
    inputs = batch(family, "right")
    ids = inputs["input_ids"]
    inputs["token_type_ids"] = torch.zeros_like(ids)
    if family == "bert-seq":
        inputs["token_type_ids"][:, 4:] = 1
    else:
        inputs["position_ids"] = torch.arange(ids.shape[1]).expand_as(ids)
    assert_same(result(mine(**inputs)), result(other(**inputs)))
    embedded = {k: v for k, v in inputs.items() if k != "input_ids"}
    embedded["inputs_embeds"] = mine.word_embeddings(ids).detach()
    assert_same(result(mine(**embedded)), result(other(**embedded)))


def test_question_answering_is_given_token_types_and_positions():
    """PEFT drops both, with adapters of weights too."""
    plain, prompted = base("bert-qa"), ours("bert-qa", "prefix").eval()
    config = peftfast.LoraConfig(task_type="QUESTION_ANS", target_modules=["query"])
    adapted = peftfast.get_peft_model(base("bert-qa"), config).eval()
    inputs = {"input_ids": batch("bert-qa")["input_ids"]}
    seen = [result(prompted(**inputs))]
    for name, value in (("token_type_ids", 1), ("position_ids", 2)):
        inputs[name] = torch.full_like(inputs["input_ids"], value)
        assert_same(result(adapted(**inputs)), result(plain(**inputs)))
        seen.append(result(prompted(**inputs)))
        assert (seen[-1] - seen[-2]).abs().max() > 1e-2


def test_a_table_of_more_rows_than_the_vocabulary():
    """Moshi's has one more. PEFT finds no word embeddings there, and its prompt tuning fails at the first call."""
    import peft
    import transformers

    sizes = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 24}
    ids = torch.arange(8).view(2, 4)
    outputs = {}
    for library in (peft, peftfast):
        for kind in (library.PrefixTuningConfig, library.PromptTuningConfig):
            if (library, kind) == (peft, peft.PromptTuningConfig):
                continue
            torch.manual_seed(0)
            base = transformers.MoshiForCausalLM(transformers.MoshiConfig(**sizes, pad_token_id=0))
            model = library.get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
            with torch.no_grad():
                for p in model.prompt_encoder.parameters():
                    p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
                outputs[library, kind.__name__] = model(input_ids=ids).logits
    prefix = "PrefixTuningConfig"
    torch.testing.assert_close(outputs[peftfast, prefix], outputs[peft, prefix])
    assert outputs[peftfast, "PromptTuningConfig"].isfinite().all()
