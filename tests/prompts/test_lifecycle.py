"""Creating, saving, loading, switching, deleting, resizing; what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import peft
import pytest
import torch
from prompts.tiny import METHODS, MODELS, VOCAB, assert_same, base, batch, config, ours, pair, result, theirs
from safetensors.torch import load_file

import peftfast

pytestmark = pytest.mark.filterwarnings("ignore:.*(jit|Position ids|inputs_embeds|encoder's network).*")


# ---- creation --------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", MODELS)
def test_names_sizes_and_first_values_are_pefts(family: str, method: str):
    mine, other = ours(family, method), theirs(family, method)
    expected = {n: p for n, p in other.named_parameters() if not n.startswith("word_embeddings")}
    assert [n for n, _ in mine.named_parameters()] == list(expected)
    for name, parameter in mine.named_parameters():
        assert torch.equal(parameter, expected[name]), name
        assert parameter.requires_grad == expected[name].requires_grad, name
    assert mine.get_nb_trainable_parameters() == other.get_nb_trainable_parameters()
    a, b = mine.peft_config["default"].to_dict(), other.peft_config["default"].to_dict()
    b["modules_to_save"] = b["modules_to_save"] and list(dict.fromkeys(b["modules_to_save"]))  # PEFT lists them twice
    assert a == b
    assert type(mine).__name__ == type(other).__name__
    assert mine.transformer_backbone_name == getattr(other, "transformer_backbone_name", None)
    assert mine.word_embeddings.weight.shape == other.word_embeddings.weight.shape
    assert torch.equal(mine.prompt_tokens["default"], other.prompt_tokens["default"])
    assert mine.get_base_model() is mine.base_model


@pytest.mark.parametrize("method", METHODS)
def test_get_prompt(method: str):
    mine, other = pair("llama", method)
    a, b = mine.get_prompt(2), other.get_prompt(2)
    if method in ("prefix", "projected"):
        assert type(a) is type(b)
        a, b = (torch.stack([torch.stack(layer[:2]) for layer in c]) for c in (a, b))
    assert_same(a, b)
    assert_same(mine.get_prompt_embedding_to_save("default"), other.get_prompt_embedding_to_save("default"))


@pytest.mark.parametrize("init", ["SAMPLE_VOCAB", "RANDOM"])
def test_prompt_init(init: str):
    torch.manual_seed(0)
    mine = ours("llama", prompt_tuning_init=init)
    rows, vocabulary = mine.prompt_encoder["default"].embedding.weight, mine.word_embeddings.weight
    found = (rows[:, None] == vocabulary[None]).all(-1).any(-1)
    assert found.all().item() is (init == "SAMPLE_VOCAB")
    assert torch.equal(rows, theirs("llama", prompt_tuning_init=init).prompt_encoder["default"].embedding.weight)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("count", [2, 5])
def test_text_init(tokenizer_folder: str, count: int):
    settings = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "w5 w9 w7",
        "tokenizer_name_or_path": tokenizer_folder,
        "tokenizer_kwargs": {"trust_remote_code": True},
        "num_virtual_tokens": count,
    }
    mine = ours("gemma3", **settings)
    expected = mine.word_embeddings(torch.tensor([5, 9, 7, 5, 9][:count]))
    assert torch.equal(mine.prompt_encoder["default"].embedding.weight, expected)
    assert mine.peft_config["default"].tokenizer_kwargs == {"trust_remote_code": True}


def test_nearest_tokens(tokenizer_folder: str):
    from transformers import AutoTokenizer

    model = ours("llama", num_virtual_tokens=2)
    model.prompt_encoder["default"].embedding.weight.data.copy_(3 * model.word_embeddings.weight[[8, 40]])
    shown = peftfast.nearest_tokens(model, AutoTokenizer.from_pretrained(tokenizer_folder), k=2)
    assert [row[0][0] for row in shown] == ["w8", "w40"] and all(len(row) == 2 for row in shown)
    assert all(row[0][1] == pytest.approx(1, abs=1e-5) and row[1][1] < 1 for row in shown)
    assert peftfast.nearest_tokens(model, k=1)[0][0][0] == 8
    for error, k in ((ValueError, 0), (TypeError, 2.5)):
        with pytest.raises(error, match=f"k must be an integer of at least 1, got {k}"):
            peftfast.nearest_tokens(model, k=k)
    with pytest.raises(ValueError, match=r"\(PREFIX_TUNING\) is not made of input embeddings"):
        peftfast.nearest_tokens(ours("llama", "prefix"))


# ---- files -----------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma4", "t5", "bert-seq", "bert-qa"])
def test_files_both_ways(tmp_path, family: str, method: str):
    mine, other = pair(family, method)
    mine.save_pretrained(tmp_path / "mine")
    other.save_pretrained(tmp_path / "other")
    a, b = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("mine", "other"))
    assert a.keys() == b.keys() and "prompt_embeddings" in a
    for key in a:
        assert_same(a[key], b[key])
    x, y = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("mine", "other"))
    y["modules_to_save"] = y["modules_to_save"] and list(dict.fromkeys(y["modules_to_save"]))
    assert x == y
    inputs = batch(family, "right")
    with torch.no_grad():
        expected = result(mine.eval()(**inputs))
        for folder in ("mine", "other"):
            for library in (peftfast, peft):
                loaded = library.PeftModel.from_pretrained(base(family).double(), tmp_path / folder).double()
                # the file is exact only if the adapter was loaded in fp64 too
                assert_same(result(loaded(**inputs)), expected, 1e-5)
    assert not any(
        p.requires_grad for p in peftfast.PeftModel.from_pretrained(base(family), tmp_path / "mine").parameters()
    )


@pytest.mark.parametrize("method", METHODS)
def test_load_beside_others(tmp_path, method: str):
    model = ours("llama", method)
    model.save_pretrained(tmp_path)
    inputs = batch("llama")
    expected = result(model.eval()(**inputs))
    torch.manual_seed(99)
    second = ours("llama", method, num_virtual_tokens=5).eval()
    before = result(second(**inputs))
    assert second.load_adapter(tmp_path, "loaded") == ([], [])
    assert torch.equal(result(second(**inputs)), before)
    second.set_adapter("loaded")
    assert_same(result(second(**inputs)), expected, 1e-5)


@pytest.mark.parametrize("method", ["mlp", "projected"])
def test_weights_loaded_into_a_network(tmp_path, method: str):
    """What Trainer does with the best checkpoint; PEFT sends the saved rows through the network once more, or fails."""
    model = ours("llama", method)
    model.save_pretrained(tmp_path)
    inputs = batch("llama")
    expected = result(model.eval()(**inputs))
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.add_(0.5)
    assert not torch.allclose(result(model(**inputs)), expected)
    with pytest.warns(peftfast.PeftWarning, match="not the network itself"):
        model.load_adapter(tmp_path, "default")
    assert_same(result(model(**inputs)), expected, 1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family, method", [("llama", "prompt"), ("llama", "prefix"), ("t5", "prompt")])
def test_state_dicts_of_whole_models_are_pefts_but_for_the_second_word_embeddings(family, method):
    mine, other = pair(family, method)
    tensors = other.state_dict()
    assert mine.state_dict().keys() == tensors.keys() - {"word_embeddings.weight"}
    fresh = ours(family, method).double()
    around = torch.nn.ModuleDict({"a": fresh})
    for model, state in ((fresh, tensors), (around, {f"a.{k}": v for k, v in tensors.items()})):
        with torch.no_grad():
            fresh.prompt_encoder["default"].embedding.weight.zero_()
        model.load_state_dict(state)
        assert_same(result(fresh.eval()(**batch(family))), result(other.eval()(**batch(family))))
    with pytest.raises(RuntimeError, match="other.weight"):
        fresh.load_state_dict({**tensors, "other.weight": tensors["word_embeddings.weight"]})


@pytest.mark.filterwarnings("ignore")
def test_state_dict_functions():
    mine, other = pair("bert-seq", "prefix")
    tensors = peft.get_peft_model_state_dict(other)
    assert peftfast.get_peft_model_state_dict(mine).keys() == tensors.keys()
    fresh = ours("bert-seq", "prefix").double()
    with torch.no_grad():
        fresh.prompt_encoder["default"].embedding.weight.zero_()
    assert peftfast.set_peft_model_state_dict(fresh, tensors) == ([], [])
    inputs = batch("bert-seq", "right")
    assert_same(result(fresh.eval()(**inputs)), result(other.eval()(**inputs)))
    bad = {**tensors, "prompt_embeddings": tensors["prompt_embeddings"][:2]}
    with pytest.raises(peftfast.AdapterLoadError, match=r"prompt_embeddings.*\(2, .*\(3, "):
        peftfast.set_peft_model_state_dict(fresh, bad)


@pytest.mark.parametrize("count", [2, 7])
@pytest.mark.parametrize("family, method", [("llama", "prompt"), ("llama", "projected"), ("t5", "mlp")])
def test_length_at_load(tmp_path, family: str, method: str, count: int):
    model = ours(family, method)
    model.save_pretrained(tmp_path)
    rows = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    loaded = peftfast.PeftModel.from_pretrained(base(family), tmp_path, num_virtual_tokens=count)
    new = loaded.get_prompt_embedding_to_save("default")
    for old_part, new_part in zip(rows.split(3), new.split(count), strict=True):
        assert torch.equal(new_part, old_part[[0, 1, 2, 0, 1, 2, 0][:count]])
    model.load_adapter(tmp_path, "other", num_virtual_tokens=count)
    assert torch.equal(model.get_prompt_embedding_to_save("other"), new)
    with pytest.warns() if method != "prompt" else warnings.catch_warnings():
        peftfast.resize_prompt(model, count)
    assert torch.equal(model.get_prompt_embedding_to_save("default"), new)
    model.eval()
    inputs = batch(family)
    first = result(model(**inputs))
    model.set_adapter("other")
    assert torch.equal(result(model(**inputs)), first)
    loaded.save_pretrained(tmp_path / "again")
    assert peft.PeftConfig.from_pretrained(tmp_path / "again").num_virtual_tokens == count


def test_no_other_adapter_has_a_length(tmp_path):
    lora = peftfast.LoraConfig(target_modules=["q_proj"])
    peftfast.get_peft_model(base("llama"), lora).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_virtual_tokens is the length of a prompt; the adapter is LORA"):
        peftfast.PeftModel.from_pretrained(base("llama"), tmp_path, num_virtual_tokens=2)


# ---- several adapters ------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:Adapter default was active")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "bert-seq"])
def test_switching_and_deleting(family: str, method: str):
    model = ours(family, method).eval()
    inputs = batch(family, "right")
    first = result(model(**inputs))
    torch.manual_seed(42)
    model.add_adapter("second", config(peftfast, method, family, num_virtual_tokens=5))
    assert torch.equal(result(model(**inputs)), first)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".default." in n for n in trainable)
    model.set_adapter("second")
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".second." in n for n in trainable)
    second = result(model(**inputs))
    assert not torch.allclose(second[..., -1:, :], first[..., -1:, :])
    model.set_adapter("default")
    assert torch.equal(result(model(**inputs)), first)
    model.delete_adapter("default")
    assert model.active_adapter == "second" and not any(".default." in n for n in model.state_dict())
    assert torch.equal(result(model(**inputs)), second)
    model.delete_adapter("second")
    assert not model.peft_config and not len(model.prompt_encoder)
    assert torch.equal(result(model(**inputs)), result(base(family)(**inputs)))


@pytest.mark.filterwarnings("ignore:Adapter .* was active")
def test_who_follows_a_deleted_prompt():
    for library, model in zip((peftfast, peft), pair("llama", "prompt"), strict=True):
        for name in ("c", "b", "a"):
            model.add_adapter(name, config(library, "prompt", "llama"))
        model.delete_adapter("default")
        assert model.active_adapter == "c"
        model.set_adapter("a")
        model.delete_adapter("a")
        assert model.active_adapter == "c"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "t5", "bert-seq"])
def test_disabled_is_the_base_model(family: str, method: str):
    model = ours(family, method).eval()
    for parameter in model.base_model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1)
    inputs, plain_model = batch(family, "right"), base(family).requires_grad_(False)
    first = result(model(**inputs))
    with model.disable_adapter(), model.disable_adapter():
        assert torch.equal(result(model(**inputs)), result(plain_model(**inputs)))
        if family != "bert-seq":
            ids = {"input_ids": inputs["input_ids"], "max_new_tokens": 3, "do_sample": False}
            assert torch.equal(model.generate(**ids), plain_model.generate(**ids))
    assert torch.equal(result(model(**inputs)), first)


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copies_are_whole(how: str):
    model = ours("llama", "projected").eval()
    inputs = batch("llama")
    expected = result(model(**inputs))
    other = copy.deepcopy(model) if how == "copy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(result(other(**inputs)), expected)
    with torch.no_grad():
        other.prompt_encoder["default"].transform[-1].bias.add_(1)
    assert torch.equal(result(model(**inputs)), expected)
    assert not torch.allclose(result(other(**inputs)), expected)


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_adapters_of_a_copy_are_switched_and_deleted(how: str):
    model = ours("llama", "prompt")
    other = copy.deepcopy(model) if how == "copy" else pickle.loads(pickle.dumps(model))
    other.add_adapter("second", config(peftfast, "prompt", "llama"))
    other.set_adapter("second")
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {"prompt_encoder.second.embedding.weight"}
    with pytest.raises(ValueError, match="Only one prompt can be active"):
        other._tuner.set_adapter(["default", "second"])
    other.delete_adapter("default")
    assert list(other.prompt_encoder) == ["second"] and list(model.prompt_encoder) == ["default"]


# ---- training loops --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss(method: str, checkpointing: bool):
    model = ours("llama", method).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    frozen = {n: p.clone() for n, p in model.base_model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    inputs, losses = batch("llama"), []
    for _ in range(12):
        optimizer.zero_grad()
        value = model(**inputs).loss
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(p, frozen[n]) for n, p in model.base_model.named_parameters())


# ---- refusals --------------------------------------------------------------------------------------------------------
def refused(model, cfg, error, message: str) -> None:
    before, fields = {k: v.clone() for k, v in model.state_dict().items()}, dict(cfg.__dict__)
    modules = [n for n, _ in model.named_modules()]
    grads = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        peftfast.get_peft_model(model, cfg)
    assert modules == [n for n, _ in model.named_modules()] and dict(cfg.__dict__) == fields
    assert grads == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_is_refused_at_creation():
    for error in (KeyError, ValueError):
        refused(
            base("llama"), config(peftfast, "prompt", "llama", task_type=None), error, "needs a task_type.*CAUSAL_LM"
        )
    refused(
        base("llama"), config(peftfast, "prompt", "llama", num_virtual_tokens=None), ValueError, "num_virtual_tokens"
    )
    model = torch.nn.Linear(2, 2)
    model.config = {"hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 5}
    refused(model, config(peftfast, "prefix", "llama"), ValueError, "past key values")
    refused(model, config(peftfast, "prompt", "llama"), ValueError, "No word embeddings found in Linear")
    model.config = {}
    refused(model, config(peftfast, "prompt", "llama"), ValueError, "Please specify `num_layers`")


@pytest.mark.parametrize("method, field, value, error, message", [
    ("prompt", "num_virtual_tokens", 0, ValueError, "at least 1, got 0"),
    ("prompt", "num_virtual_tokens", 2.5, TypeError, "got 2.5"),
    ("prompt", "prompt_tuning_init", "TEXTS", ValueError, "Did you mean 'TEXT'"),
    ("prompt", "prompt_tuning_init", "TEXT", ValueError, "tokenizer_name_or_path can't be None"),
    ("prompt", "tokenizer_kwargs", {"a": 1}, ValueError, "only valid when using prompt_tuning_init='TEXT'"),
    ("prompt", "num_virtual_token", 1, TypeError, "Did you mean 'num_virtual_tokens'"),
    ("mlp", "encoder_reparameterization_type", "GRU", ValueError, "one of MLP, LSTM, got 'GRU'"),
    ("mlp", "encoder_dropout", 2, ValueError, r"\[0, 1\], got 2"),
    ("prefix", "init_weights", "one", ValueError, "got 'one'"),
    ("prefix", "prefix_projection", "yes", TypeError, "True or False"),
])  # fmt: skip
def test_config_fields(method: str, field: str, value, error, message: str):
    with pytest.raises(error, match=message):
        config(peftfast, method, "llama", **{field: value})


def test_what_prompts_do_not_have(tmp_path):
    model = ours("llama", "prefix")
    with pytest.raises(TypeError, match="not supported for prompt learning methods like PREFIX_TUNING"):
        model.set_requires_grad("default", False)
    with pytest.raises(TypeError, match="invalid PeftModel instance: prompt learning methods, such as PREFIX_TUNING"):
        model.get_layer_status()
    for name in ("merge_and_unload", "merge_adapter", "unload", "add_weighted_adapter"):
        assert not hasattr(model, name)
        with pytest.raises(AttributeError, match=f"{name}: PREFIX_TUNING adapters are virtual tokens"):
            getattr(model, name)
    with pytest.raises(ValueError, match="does not support prompt learning"):
        peftfast.inject_adapter_in_model(config(peftfast, "prompt", "llama"), base("llama"))
    with pytest.raises(ValueError, match=r"Invalid `prompt_embeddings` shape. Expected \((\d+, \d+)\), got \(\1, 1\)"):
        encoder = model.prompt_encoder["default"]
        encoder.load_prompt_embeddings(encoder.prompt_embeddings[..., None])
    with pytest.raises(ValueError, match="No prompt is active"), model.disable_adapter():
        model.get_prompt(1)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peftfast.PeftModel.from_pretrained(base("llama"), tmp_path, is_trainable=True)
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("lora", peftfast.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="by name"):
        model._tuner(batch("llama")["input_ids"])
    with pytest.raises(ValueError, match="needs an attention_mask of shape"):
        ours("llama")(input_ids=batch("llama")["input_ids"], attention_mask=torch.ones(3, 1, 7, 7))
    with pytest.raises(ValueError, match="input_ids must be provided"):
        ours("t5").generate(max_new_tokens=2)
    lora = peftfast.get_peft_model(base("llama"), peftfast.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="no prompt-learning adapters"):
        peftfast.nearest_tokens(lora)


def test_prefix_that_fits_no_layer():
    model = ours("gemma4", "prefix", token_dim=4, num_attention_heads=1)
    with pytest.raises(ValueError, match="skipped every layer"):
        model(**batch("gemma4"))


def test_explicit_prefix_width_is_kept():
    """PEFT overwrites it; layers with more heads than the global ones can only be reached so."""
    model = ours("gemma4", "prefix", token_dim=64, num_attention_heads=4)
    assert (model.peft_config["default"].token_dim, model.peft_config["default"].num_attention_heads) == (64, 4)
    model(**batch("gemma4")).loss.backward()
    grad = model.prompt_encoder["default"].embedding.weight.grad.view(3, 8, 4, 16)
    assert (grad[:, :, :2, :8].abs().amax((0, 2, 3)) > 0).all() and grad[:, :, 2:].abs().max() == 0
