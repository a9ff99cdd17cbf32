"""Adapters from before transformers gave modules of the base model other names."""

import json

import oracle
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import peftfast
from peftfast import AdaLoraConfig, IA3Config, LoraConfig
from peftfast.files.metadata import describe
from peftfast.files.renamed import _rename_in
from peftfast.wrapping.patterns import pattern_value

transformers = pytest.importorskip("transformers", minversion="5")

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
IDS = {"input_ids": torch.arange(12).reshape(2, 6)}


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ViTConfig(image_size=16, patch_size=8, **sizes)
    model = transformers.ViTForImageClassification(config).eval()
    if not hasattr(model.vit, "layers"):
        pytest.skip("this transformers has the old names still")
    return model


def qwen2_vl():
    torch.manual_seed(0)
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
    text = {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    config = transformers.Qwen2VLConfig(vision_config=vision, text_config=text)
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def renamed_back(name, make):
    """A module's name as it was."""
    if make is qwen2_vl:
        return name.replace("model.language_model.", "model.")
    name = name.replace("vit.layers.", "vit.encoder.layer.")
    name = name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
    return name.replace("attention.q_proj", "attention.attention.query").replace(
        "attention.v_proj", "attention.attention.value"
    )


def save_under_old_names(model, make, folder, **fields):
    """Save the adapter as the same training would have done before; `fields` of its config are given as they were."""
    model.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    with safe_open(weights, "pt") as f:
        metadata = f.metadata()
        tensors = {renamed_back(key, make): f.get_tensor(key) for key in f.keys()}
    record = json.loads(metadata["peftfast.base"])
    record["weights"] = {renamed_back(name, make): value for name, value in record["weights"].items()}
    config = json.dumps({**json.loads((folder / "adapter_config.json").read_text()), **fields})
    (folder / "adapter_config.json").write_text(config)
    save_file(tensors, weights, {"format": "pt", **describe(tensors, config, json.dumps(record))})


LAYER = "vit.encoder.layer.0.attention.attention"
CASES = {
    "list": (vit, LoraConfig, {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["query", "value"]}),
    "regex": (
        vit, LoraConfig, {"target_modules": ["q_proj"]},
        {"target_modules": r"vit\.encoder\.layer\.\d+\.attention\.attention\.query"},
    ),
    "patterns": (
        vit, LoraConfig,
        {
            "target_modules": ["q_proj", "fc2"], "rank_pattern": {"layers.0.attention.q_proj": 3},
            "alpha_pattern": {"fc2": 5}, "modules_to_save": ["classifier"],
        },
        {
            "target_modules": ["query", "output.dense"], "exclude_modules": ["attention.output.dense"],
            "rank_pattern": {f"{LAYER}.query": 3}, "alpha_pattern": {r"\d\.output\.dense": 5},
        },
    ),
    "some layers": (
        vit, LoraConfig, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"},
    ),
    "ia3": (
        vit, IA3Config, {"target_modules": ["q_proj", "fc2"], "feedforward_modules": ["fc2"]},
        {"target_modules": ["query", "output.dense"], "feedforward_modules": ["output.dense"]},
    ),
    "names that still hold": (
        qwen2_vl, LoraConfig, {"target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 3}},
        {"rank_pattern": {"^model.layers.1.self_attn.q_proj": 3}},
    ),
    "copies and rows": (
        qwen2_vl, LoraConfig,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "trainable_token_indices": [1, 2]}, {},
    ),
}  # fmt: skip


def trained(make, config):
    return oracle.moved(peftfast.get_peft_model(make(), config)).eval()


def output(model):
    inputs = {"pixel_values": torch.linspace(-1, 1, 1536).reshape(2, 3, 16, 16)}
    with torch.no_grad():
        return model(**(inputs if model.config.model_type == "vit" else IDS)).logits


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_under_old_names(case, tmp_path):
    make, kind, now, then = CASES[case]
    model = trained(make, kind(**now))
    save_under_old_names(model, make, tmp_path / "old", **then)
    loaded = peftfast.PeftModel.from_pretrained(make(), tmp_path / "old", strict=True)
    assert torch.equal(output(loaded), output(model))
    loaded.save_pretrained(tmp_path / "new")
    assert torch.equal(output(peftfast.PeftModel.from_pretrained(make(), tmp_path / "new", strict=True)), output(model))


def test_a_base_whose_class_has_the_renamings(tmp_path, monkeypatch):
    """As in transformers 5.0, and in code that comes with a model."""
    own = {"^visual": "model.visual", r"^model(?!\.(language_model|visual))": "model.language_model"}
    kind = transformers.Qwen2VLForConditionalGeneration
    monkeypatch.setattr(kind, "_checkpoint_conversion_mapping", own, raising=False)
    test_an_adapter_under_old_names("names that still hold", tmp_path)


def test_a_rank_stays_with_its_module_where_another_ends_alike():
    config = LoraConfig(r=8, target_modules=["old"], rank_pattern={"^old": 4})
    _rename_in(config, {"old": "new", "z.old": "z.new"}, ["old", "z.old"])
    assert [pattern_value(config.rank_pattern, name, config.r) for name in ("new", "z.new")] == [4, 8]


def test_beside_another_adapter_and_into_one_that_is_there(tmp_path):
    model = trained(vit, LoraConfig(target_modules=["q_proj", "v_proj"]))
    save_under_old_names(model, vit, tmp_path, target_modules=["query", "value"])
    other = peftfast.get_peft_model(vit(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    for name in ("second", "default"):
        assert other.load_adapter(tmp_path, name).missing_keys == []
        other.set_adapter(name)
        assert torch.equal(output(other), output(model))
    assert other.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    given = peftfast.get_peft_model(vit(), LoraConfig(target_modules=["q_proj", "v_proj"])).eval()
    result = peftfast.set_peft_model_state_dict(given, peftfast.load_peft_weights(tmp_path))
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert torch.equal(output(given), output(model))


def test_names_that_nobody_has_changed_are_refused(tmp_path):
    model = trained(vit, LoraConfig(target_modules=["q_proj"]))
    save_under_old_names(model, vit, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    with safe_open(weights, "pt") as f:
        tensors = {key.replace("query", "quarry"): f.get_tensor(key) for key in f.keys()}
    save_file(tensors, weights)
    with pytest.raises(peftfast.AdapterLoadError, match="no such modules.*quarry"):
        peftfast.PeftModel.from_pretrained(vit(), tmp_path)


@pytest.mark.parametrize("case", ["list", "regex", "some layers"])
def test_targets_of_a_new_adapter_under_old_names(case):
    """As in the tutorials that were written for them."""
    make, kind, now, then = CASES[case]
    said = "transformers has renamed what target_modules=.* now .*'q_proj'"
    with pytest.warns(peftfast.PeftWarning, match=said) as caught:
        model = peftfast.get_peft_model(make(), kind(**then))
    assert not [w for w in caught if issubclass(w.category, peftfast.AdapterMismatchWarning)]
    expected = peftfast.get_peft_model(make(), kind(**now))
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in expected.named_parameters()]
    with pytest.raises(ValueError, match="not found in the base model"):
        peftfast.get_peft_model(make(), kind(**then), strict=True)


def test_adalora_under_old_names(tmp_path):
    config = AdaLoraConfig(target_modules=["q_proj", "v_proj"], init_r=4, target_r=2, total_step=4)
    model = trained(vit, config)
    kept = {
        f"vit.layers.{i}.attention.{name}.lora_E": [j <= i + (name == "q_proj") for j in range(4)]
        for i in range(2) for name in ("q_proj", "v_proj")
    }  # fmt: skip
    config.rank_pattern = kept
    model.save_pretrained(tmp_path / "now")
    then = {"target_modules": ["query", "value"], "rank_pattern": {renamed_back(k, vit): v for k, v in kept.items()}}
    save_under_old_names(model, vit, tmp_path / "old", **then)
    now, old = (peftfast.PeftModel.from_pretrained(vit(), tmp_path / name, strict=True) for name in ("now", "old"))
    assert old.peft_config["default"].rank_pattern == now.peft_config["default"].rank_pattern
    assert torch.equal(output(old), output(now))
