"""Which adapters were active, saved and restored with them."""

import json

import peft
import pytest
import torch
from oracle import inputs, llama

import peftfast
from peftfast.files.activation import ACTIVATION_NAME

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def three(library=peftfast):
    torch.manual_seed(0)
    model = library.get_peft_model(llama(), library.LoraConfig(**LORA))
    for name in ("a", "b"):
        model.add_adapter(name, library.LoraConfig(**LORA))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(**inputs(model)).logits


@pytest.mark.parametrize("active", [["default"], ["b"], ["b", "a"]], ids="+".join)
@pytest.mark.parametrize("enabled", [True, False])
def test_a_folder_comes_back_as_it_was(active, enabled, tmp_path):
    model = three()
    model.base_model.set_adapter(active)
    if not enabled:
        model.base_model.disable_adapter_layers()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / ACTIVATION_NAME).exists() == ((active, enabled) != (["default"], True))
    loaded = peftfast.PeftModel.from_folder(llama(), tmp_path)
    assert list(loaded.peft_config) == ["default", "a", "b"] and loaded.active_adapters == active
    assert loaded.get_model_status().enabled is loaded.has_active_enabled_adapter is enabled
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)
    loaded.base_model.enable_adapter_layers()
    assert loaded.active_adapters == active
    # PEFT and `from_pretrained` read the same folder, without it
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert list(theirs.peft_config) == ["default"]
    assert list(peftfast.PeftModel.from_pretrained(llama(), tmp_path).peft_config) == ["default"]


@pytest.mark.parametrize("active", [["a", "b"], ["b", "default"], ["default", "b"]], ids="+".join)
@pytest.mark.parametrize("before", [None, "b"])
def test_the_one_of_several_that_is_called_the_active_one(before, active):
    """The one that `set_adapter` was called with, or the first: the name under which trainers save and restore. PEFT
    says so also where it is not among the active ones."""
    models = [three(library) for library in (peftfast, peft)]
    for model in models:
        if before is not None:
            model.set_adapter(before)
        model.base_model.set_adapter(active)
    ours, theirs = models
    assert ours.active_adapters == theirs.active_adapters == active
    assert ours.active_adapter == (theirs.active_adapter if theirs.active_adapter in active else active[0])
    ours.delete_adapter("b")
    assert ours.active_adapter == ours.active_adapters[0]


def test_active_ones_go_on_training(tmp_path):
    model = three()
    model.base_model.set_adapter(["a", "b"])
    model.save_pretrained(tmp_path)
    loaded = peftfast.PeftModel.from_folder(llama(), tmp_path, is_trainable=True)
    trained = {n.split(".")[-2] for n, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {"a", "b"}


def test_folders_that_do_not_say(tmp_path):
    """PEFT's: "default" is active, or the first; and what was said before does not outlive what it was said of."""
    three(peft).save_pretrained(tmp_path / "peft")
    loaded = peftfast.PeftModel.from_folder(llama(), tmp_path / "peft")
    assert list(loaded.peft_config) == ["default", "a", "b"] and loaded.active_adapters == ["default"]
    model = three()
    model.set_adapter("b")
    model.save_pretrained(tmp_path / "two", selected_adapters=["a", "b"])
    loaded = peftfast.PeftModel.from_folder(llama(), tmp_path / "two")
    assert list(loaded.peft_config) == ["a", "b"] and loaded.active_adapters == ["b"]
    model.set_adapter("default")
    model.save_pretrained(tmp_path / "two", selected_adapters=["a", "b"])
    assert not (tmp_path / "two" / ACTIVATION_NAME).exists()
    assert peftfast.PeftModel.from_folder(llama(), tmp_path / "two").active_adapters == ["a"]


def test_what_a_killed_writer_has_left_is_no_adapter(tmp_path):
    """`config.save_pretrained(folder)` writes to a hidden folder in it first."""
    model = three()
    model.save_pretrained(tmp_path)
    (tmp_path / ".adapter_config.json.x1.tmp").mkdir()
    model.peft_config["a"].save_pretrained(tmp_path / ".adapter_config.json.x1.tmp")
    assert list(peftfast.PeftModel.from_folder(llama(), tmp_path).peft_config) == ["default", "a", "b"]


def test_a_sub_folder_with_the_name_of_the_folders_own_adapter(tmp_path):
    config = peftfast.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peftfast.get_peft_model(llama(), config)
    model.save_pretrained(tmp_path)
    peftfast.get_peft_model(llama(), config).save_pretrained(tmp_path / "default")
    with pytest.warns(peftfast.PeftWarning, match="sub-folder of that name with another one, which is passed over"):
        loaded = peftfast.PeftModel.from_folder(llama(), tmp_path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert list(loaded.peft_config) == ["default"]
    assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))


def test_prompts(tmp_path):
    torch.manual_seed(0)
    config = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    model = peftfast.get_peft_model(llama(), peftfast.PromptTuningConfig(**config))
    model.add_adapter("other", peftfast.PromptTuningConfig(**config))
    model.set_adapter("other")
    model.eval().save_pretrained(tmp_path)
    loaded = peftfast.PeftModel.from_folder(llama(), tmp_path)
    assert type(loaded) is type(model) and loaded.active_adapters == ["other"]
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "is damaged"),
        ('{"active": ["c"], "enabled": true}', "only .'default', 'a', 'b'"),
        ('{"active": "a", "enabled": true}', "list names"),
        ('{"active": ["a"], "enabled": 1}', "true or false"),
        ('{"active": ["a"]}', "is damaged"),
        ("[1]", "is damaged"),
    ],
)
def test_refused_before_anything_changes(content, said, tmp_path):
    three().save_pretrained(tmp_path)
    (tmp_path / ACTIVATION_NAME).write_text(content)
    base = llama()
    before = list(base.state_dict())
    with pytest.raises(peftfast.AdapterLoadError, match=said):
        peftfast.PeftModel.from_folder(base, tmp_path)
    assert list(base.state_dict()) == before
    with pytest.raises(ValueError, match="no adapter in"):
        peftfast.PeftModel.from_folder(base, tmp_path / "elsewhere")


def test_one_refused_adapter_leaves_the_model_as_it_was(tmp_path):
    three().save_pretrained(tmp_path)
    path = tmp_path / "b" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 3}))
    base = llama()
    before, expected = list(base.state_dict()), logits(base)
    with pytest.raises(peftfast.AdapterLoadError):
        peftfast.PeftModel.from_folder(base, tmp_path)
    assert list(base.state_dict()) == before
    torch.testing.assert_close(logits(base), expected, rtol=0, atol=0)
