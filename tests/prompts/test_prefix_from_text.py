"""A prefix that starts as the first tokens of a text: the model with it says what the base model says after them."""

import jinja2
import peft
import pytest
import torch
from prompts.tiny import CAUSAL, TASKS, base

import peftfast

TEXT = torch.tensor([[7, 11, 3, 29, 5, 17, 23, 41, 13, 2]])  # longer than the sliding windows, which are 6
IDS = torch.tensor([[9, 4, 31], [6, 8, 10]])


def tokenizer(text, **kwargs):
    return {"input_ids": TEXT[:, : kwargs["max_length"]]}


class Chatting:
    """With a chat template that takes a system message, or none."""

    def __init__(self, takes_system):
        self.takes_system = takes_system

    def apply_chat_template(self, messages, **kwargs):
        assert messages == [{"role": "system", "content": "text"}] and kwargs["tokenize"]
        if not self.takes_system:
            raise ValueError("no template")
        return TEXT.flip(1)

    __call__ = staticmethod(tokenizer)


def prefixed(family="llama", library=peftfast, **options):
    config = library.PrefixTuningConfig(task_type=TASKS.get(family, "CAUSAL_LM"), num_virtual_tokens=4, **options)
    return library.get_peft_model(base(family), config).eval()


@pytest.mark.parametrize("family", CAUSAL)
def test_the_model_goes_on_from_the_text(family):
    model, alone = prefixed(family), base(family).eval()
    peftfast.initialize_kv_prefix_from_text(model, tokenizer, text="text")
    with torch.no_grad():
        expected = alone(torch.cat((TEXT[:, :4].expand(2, -1), IDS), dim=1)).logits[:, 4:]
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_as_in_peft(family):
    """Of every way to give the text; PEFT keeps the model's dropout on, so both are in evaluation."""
    ways = [(tokenizer, {}), (tokenizer, {"max_length": 6}), (Chatting(True), {}), (Chatting(True), {"max_length": 6}),
            (Chatting(True), {"use_chat_template": False}), (Chatting(False), {})]  # fmt: skip
    ours, theirs = prefixed(family), prefixed(family, peft)
    for reader, options in ways:
        found, expected = (
            library.initialize_kv_prefix_from_text(model, reader, text="text", **options)
            for library, model in ((peftfast, ours), (peft, theirs))
        )
        torch.testing.assert_close(found, expected)
        with torch.no_grad():
            torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    cache = base(family)(TEXT, use_cache=True).past_key_values
    for given in (cache, [(layer.keys, layer.values) for layer in cache.layers]):
        rows = peftfast.initialize_kv_prefix_from_past_key_values(ours, past_key_values=given)
        torch.testing.assert_close(rows, ours.get_prompt_embedding_to_save("default"))
        for library in (peftfast, peft):
            packed = library.prompt_embeddings_from_past_key_values(given, num_virtual_tokens=4)
            torch.testing.assert_close(rows, packed)


def test_a_template_that_refuses_system_messages_is_left_out():
    """Gemma 2's, by an error that transformers raises for templates; PEFT fails."""

    class Refusing(Chatting):
        def apply_chat_template(self, messages, **kwargs):
            raise jinja2.TemplateError("System role not supported")

    rows = peftfast.initialize_kv_prefix_from_text(prefixed(), Refusing(False), text="text")
    torch.testing.assert_close(rows, peftfast.initialize_kv_prefix_from_text(prefixed(), tokenizer, text="text"))


def test_dropout_of_the_base_has_no_part_in_it():
    models = [prefixed(), prefixed()]
    models[1].train()
    for module in models[1].modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    rows = [peftfast.initialize_kv_prefix_from_text(m, tokenizer, text="text") for m in models]
    torch.testing.assert_close(*rows)
    assert all(module.training for module in models[1].modules())


def test_refused():
    def fill(model, **options):
        peftfast.initialize_kv_prefix_from_text(model, tokenizer, text="text", **options)

    def cached(family, ids):
        return base(family)(ids, use_cache=True).past_key_values

    lora = peftfast.get_peft_model(base("llama"), peftfast.LoraConfig(task_type="CAUSAL_LM"))
    model = prefixed()
    before = model.get_prompt_embedding_to_save("default").clone()
    from_cache = peftfast.initialize_kv_prefix_from_past_key_values
    for call, message in (
        (lambda: fill(lora), "'default' must be a PREFIX_TUNING adapter.*LORA"),
        (lambda: fill(model, adapter_name="other"), "'other' must be.*default"),
        (lambda: fill(prefixed(prefix_projection=True, encoder_hidden_size=8)), "prefix_projection=True"),
        (lambda: fill(prefixed("t5")), "encoder-decoder"),
        (lambda: fill(model, num_virtual_tokens=3), "4 virtual tokens, got num_virtual_tokens=3.*resize_prompt"),
        (lambda: fill(model, max_length=3), "at least 4 cached tokens, got 3"),
        (lambda: from_cache(model, past_key_values=cached("llama", TEXT[:, :3])), "at least 4 cached tokens, got 3"),
        (lambda: from_cache(model, past_key_values=cached("llama", IDS.repeat(1, 2))), "one sequence.*2, 2, 6, 8"),
        (lambda: from_cache(model, past_key_values=cached("gemma4", TEXT[:, :4])), "4 layers, the prefix 2"),
        (
            lambda: from_cache(prefixed("mistral"), past_key_values=cached("mistral", TEXT)),
            "last 5 of 10.*not the first",
        ),
        (lambda: from_cache(model, past_key_values=[]), "Empty"),
        (
            lambda: peftfast.prompt_embeddings_from_past_key_values(cached("llama", TEXT), num_virtual_tokens=-1),
            "num_virtual_tokens must be an integer of at least 1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    torch.testing.assert_close(model.get_prompt_embedding_to_save("default"), before, rtol=0, atol=0)
