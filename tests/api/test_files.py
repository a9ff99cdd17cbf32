"""Folders, state dicts and the calls around them, both ways with PEFT."""

import dataclasses
import importlib
import json
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import oracle
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import peftfast
from peftfast import LoraConfig

peft = importlib.import_module("peft")

OPTIONS = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def logits(model):
    with torch.no_grad():
        return oracle.logits(model.eval())


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def base_folder(tmp_path):
    oracle.llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def from_folder(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_names_that_are_one_folder_are_refused(tmp_path):
    """As "A" and "a" are on macOS and Windows; here a link makes them one."""
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(**OPTIONS), adapter_name="a")
    model.add_adapter("A", LoraConfig(**OPTIONS))
    (tmp_path / "a").mkdir()
    if not (tmp_path / "A").exists():
        (tmp_path / "A").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match="'a' and 'A' have one folder here, .*A.: .*selected_adapters"):
        model.save_pretrained(tmp_path)
    assert not files(tmp_path)
    model.save_pretrained(tmp_path, selected_adapters=["A"])
    assert "a/adapter_model.safetensors" in files(tmp_path)


def test_sub_folders_of_several_adapters(tmp_path):
    twins = oracle.Twins(oracle.llama, OPTIONS)
    for model, library in ((twins.ours, peftfast), (twins.theirs, peft)):
        model.add_adapter("other", library.LoraConfig(**{**OPTIONS, "r": 2}))
    oracle.copy_parameters(twins.theirs, twins.ours)
    for model, name in ((twins.ours, "ours"), (twins.theirs, "theirs")):
        model.save_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / f"{name}-one", selected_adapters=["other"])
        model.save_pretrained(tmp_path / f"{name}-none", is_main_process=False)
        model.save_pretrained(tmp_path / f"{name}-bin", safe_serialization=False)
    for suffix in ("", "-one", "-bin"):
        oracle.same_files(tmp_path / f"ours{suffix}", tmp_path / f"theirs{suffix}")
    assert not (tmp_path / "ours-none").exists() or not files(tmp_path / "ours-none")
    assert files(tmp_path / "ours-one") == ["README.md", "other/adapter_config.json", "other/adapter_model.safetensors"]
    with safe_open(tmp_path / "ours/adapter_model.safetensors", "pt") as f:
        assert f.metadata()["format"] == "pt"
    for library in (peftfast, peft):
        for suffix in ("", "-bin"):
            model = library.PeftModel.from_pretrained(oracle.llama(), tmp_path / f"ours{suffix}")
            result = model.load_adapter(tmp_path / f"ours{suffix}/other", "second")
            assert not result.unexpected_keys
            for name, theirs in (("default", "default"), ("second", "other")):
                model.set_adapter(name)
                twins.theirs.set_adapter(theirs)
                torch.testing.assert_close(logits(model), logits(twins.theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["proj", "self", "lora", "q_proj", "q", "default2", "layers", "0", "model", "weight"])
def test_adapters_named_like_parts_of_the_model(name, tmp_path):
    """Names are matched by structure, never by text."""
    torch.manual_seed(0)
    model = oracle.quietly(peftfast.get_peft_model, oracle.llama(), LoraConfig(**OPTIONS), name)
    oracle.quietly(model.add_adapter, "default", LoraConfig(**{**OPTIONS, "r": 3}))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    oracle.quietly(model.add_adapter, f"x{name}y", LoraConfig(**OPTIONS))
    state = peftfast.get_peft_model_state_dict(model, adapter_name=name)
    assert len(state) == 8 and all(v.shape[0] != 3 for v in state.values())
    loaded = oracle.quietly(peftfast.PeftModel.from_pretrained, oracle.llama(), tmp_path / name, adapter_name=name)
    torch.testing.assert_close(logits(loaded), expected)
    model.delete_adapter(f"x{name}y")
    torch.testing.assert_close(logits(model), expected)


def test_modules_named_like_adapters(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.xdefaulty = torch.nn.Linear(4, 4)
            self.default = torch.nn.ModuleDict({"default": torch.nn.Linear(4, 4)})

        def forward(self, x):
            return self.default["default"](self.xdefaulty(x))

    options = {"target_modules": ["xdefaulty", "default.default"], "init_lora_weights": False}
    x = torch.randn(2, 4)
    torch.manual_seed(0)
    ours = peftfast.get_peft_model(Net(), LoraConfig(**options))
    ours.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = Net()
    for library in (peftfast, peft):
        torch.manual_seed(0)
        loaded = library.PeftModel.from_pretrained(Net(), tmp_path)
        torch.testing.assert_close(loaded(x), ours(x))
    assert not torch.allclose(base(x), ours(x))


@pytest.mark.parametrize(
    "name", ["base_layer", "original_module", "modules_to_save", "token_adapter", "lora_A", "lora_x", "ia3_l"]
)
def test_modules_named_like_what_adapters_consist_of(name, tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            inner = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4), "k": torch.nn.Linear(4, 4)})
            self.deep = torch.nn.ModuleDict({name: inner, "head": torch.nn.Linear(4, 4)})

        def forward(self, x):
            return self.deep["head"](self.deep[name]["k"](self.deep[name]["q"](x)))

    x = torch.randn(2, 4)
    for i, options in enumerate(({"bias": "all"}, {"bias": "lora_only"}, {"bias": "all", "modules_to_save": ["head"]})):
        options = {"target_modules": ["q"], "init_lora_weights": False, **options}
        model = peftfast.get_peft_model(Net(), LoraConfig(**options))
        theirs = peft.get_peft_model(Net(), peft.LoraConfig(**options))
        trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, theirs)]
        assert trained[0] == trained[1]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0 if parameter.requires_grad else 0.0)
        keys = set(peftfast.get_peft_model_state_dict(model)) ^ set(peft.get_peft_model_state_dict(theirs))
        theirs_twice = {f"base_model.model.deep.head.{place}.bias" for place in ("original_module", "modules_to_save")}
        assert keys == (theirs_twice if "modules_to_save" in options else set())
        assert peftfast.get_base_model_state_dict(model).keys() == Net().state_dict().keys()
        model.save_pretrained(tmp_path / str(i))
        for library in (peftfast, peft):
            loaded = library.PeftModel.from_pretrained(Net(), tmp_path / str(i))
            torch.testing.assert_close(loaded(x), model(x))


def test_what_a_given_state_dict_lacks(tmp_path):
    """Under ZeRO-3 a trainer gathers what trains only, and gives it to one process."""
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(**OPTIONS))
    model.add_adapter("frozen", LoraConfig(**OPTIONS))
    gathered = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    with pytest.warns(peftfast.PeftWarning, match="frozen"):
        model.save_pretrained(tmp_path / "one", state_dict=gathered)
    assert (tmp_path / "one" / "adapter_model.safetensors").is_file() and not (tmp_path / "one" / "frozen").exists()
    with pytest.raises(peftfast.AdapterLoadError, match="frozen"):
        model.save_pretrained(tmp_path / "two", state_dict=gathered, selected_adapters=["frozen"])
    config = peftfast.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM")
    prompted = peftfast.get_peft_model(oracle.llama(), config)
    gathered = {n: 2 * p.detach() for n, p in prompted.named_parameters() if p.requires_grad}
    prompt = peftfast.get_peft_model_state_dict(prompted, state_dict=gathered)["prompt_embeddings"]
    with torch.no_grad():
        for parameter in prompted.prompt_encoder.parameters():
            parameter.mul_(2)
    assert torch.equal(prompt, peftfast.get_peft_model_state_dict(prompted)["prompt_embeddings"])
    with pytest.raises(peftfast.AdapterLoadError, match="prompt_embeddings"):
        prompted.save_pretrained(tmp_path / "three", state_dict={"other": torch.ones(1)})


def test_a_part_of_a_state_dict(tmp_path):
    """verl gathers block by block, and hands what it has gathered to one process and empty dicts to the others."""
    twins = oracle.Twins(lambda: oracle.llama(bias=True), {**OPTIONS, "bias": "all"})
    block = {k: v for k, v in twins.theirs.state_dict().items() if ".layers.1." in k}
    for part in ({}, {"other": torch.ones(1)}, block, {k: v for k, v in block.items() if "lora_A" in k}):
        found = peftfast.get_peft_model_state_dict(twins.ours, state_dict=part)
        wanted = peft.get_peft_model_state_dict(twins.theirs, state_dict=part)
        assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
    for part in ({}, block):
        for model in (twins.ours, twins.theirs):
            model.save_pretrained(tmp_path / "empty", state_dict=part, is_main_process=False)
        assert files(tmp_path / "empty") == []
        with pytest.raises(peftfast.AdapterLoadError, match="q_proj.lora_A.default.weight"):
            twins.ours.save_pretrained(tmp_path / "main", state_dict=part)


def test_a_whole_state_dict_gives_views_of_factors_as_well():
    options = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "init_lora_weights": False}
    model = peftfast.get_peft_model(oracle.llama(tied=True), LoraConfig(**options))
    whole = peftfast.get_peft_model_state_dict(model)
    found = peftfast.get_peft_model_state_dict(model, state_dict=model.state_dict())
    assert found.keys() == whole.keys() and any("lm_head" in key for key in whole)


def test_state_dicts_as_functions():
    twins = oracle.Twins(oracle.llama, OPTIONS)
    mine, other = (lib.get_peft_model_state_dict(m) for lib, m in ((peftfast, twins.ours), (peft, twins.theirs)))
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in other.items()}
    assert all(torch.equal(mine[k], other[k]) for k in other)
    gathered = {k: v * 2 for k, v in twins.ours.state_dict().items()}
    doubled = peftfast.get_peft_model_state_dict(twins.ours, state_dict=gathered)
    assert all(torch.equal(doubled[k], 2 * mine[k]) for k in mine)
    fsdp = {k.replace("model.layers", "model._fsdp_wrapped_module.layers"): v for k, v in gathered.items()}
    assert peftfast.get_peft_model_state_dict(twins.ours, state_dict=fsdp).keys() == mine.keys()
    target = peftfast.get_peft_model(oracle.llama(), LoraConfig(**OPTIONS))
    without = {k.removeprefix("base_model.model."): v for k, v in mine.items()}
    live = {k: v for k, v in twins.theirs.state_dict().items() if "lora_" in k}
    for form in (mine, without, live):
        with torch.no_grad():
            for name, parameter in target.named_parameters():
                if "lora_" in name:
                    parameter.zero_()
        result = peftfast.set_peft_model_state_dict(target, form)
        assert result.missing_keys == [] and result.unexpected_keys == []
        torch.testing.assert_close(logits(target), logits(twins.theirs))
    spoilt = {**dict(list(mine.items())[1:]), "rubbish": torch.ones(1)}
    result = peftfast.set_peft_model_state_dict(target, spoilt)
    theirs = peft.set_peft_model_state_dict(twins.theirs, spoilt)
    assert result.missing_keys == [key for key in theirs.missing_keys if ".lora_" in key]
    assert next(iter(mine)).replace(".weight", ".default.weight") in result.missing_keys
    assert "rubbish" in result.unexpected_keys[0]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "trainable_token_indices": [1, 2]},
    ],
    ids=["factors", "copies"],
)
def test_names_of_the_model_are_read_as_well(options, tmp_path):
    """What a script has picked out of `model.state_dict()` itself, and saved."""
    trained = oracle.quietly(peftfast.get_peft_model, oracle.llama(), LoraConfig(**{**OPTIONS, **options}))
    oracle.moved(trained)
    live = {n: p.detach().clone() for n, p in trained.named_parameters() if p.requires_grad}
    trained.save_pretrained(tmp_path)
    save_file(live, tmp_path / "adapter_model.safetensors")
    from_file = peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path, strict=True)
    given = oracle.quietly(peftfast.get_peft_model, oracle.llama(), LoraConfig(**{**OPTIONS, **options}))
    result = peftfast.set_peft_model_state_dict(given, live)
    assert result.missing_keys == [] and result.unexpected_keys == []
    for model in (from_file, given):
        assert torch.equal(logits(model), logits(trained))


@pytest.mark.parametrize("how", ["set_peft_model_state_dict", "load_adapter"])
def test_what_is_not_given_stays_as_it_was(how, tmp_path):
    """As where the matrices B alone are exchanged."""
    twins = oracle.Twins(oracle.llama, OPTIONS)
    half = {k: v * 2 for k, v in peftfast.get_peft_model_state_dict(twins.ours).items() if "lora_B" in k}
    twins.ours.save_pretrained(tmp_path)
    save_file(half, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    for model, library in ((twins.ours, peftfast), (twins.theirs, peft)):
        if how == "load_adapter":
            oracle.quietly(model.load_adapter, tmp_path, "default", is_trainable=True)
        else:
            library.set_peft_model_state_dict(model, half)
    theirs = peft.get_peft_model_state_dict(twins.theirs)
    for key, tensor in peftfast.get_peft_model_state_dict(twins.ours).items():
        assert torch.equal(tensor, theirs[key]), key


def test_what_was_not_loaded_is_returned_by_its_name_in_the_model(tmp_path):
    peftfast.get_peft_model(oracle.llama(), LoraConfig(**OPTIONS)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    first, second, *_ = tensors = load_file(path)
    tensors[first] = tensors[first][:1]
    del tensors[second]
    save_file(tensors, path, metadata={"format": "pt"})
    found = []
    for library in (peftfast, peft):
        model = library.get_peft_model(oracle.llama(), library.LoraConfig(**OPTIONS))
        found.append(oracle.quietly(model.load_adapter, tmp_path, "other", ignore_mismatched_sizes=True).missing_keys)
    assert sorted(found[0]) == sorted(found[1]) and ["other" in key for key in found[0]] == [True, True]


def test_injection_without_a_wrapper(tmp_path):
    models = []
    for library in (peftfast, peft):
        torch.manual_seed(0)
        config = library.LoraConfig(**OPTIONS)
        models.append(library.inject_adapter_in_model(config, oracle.llama(), "mine"))
    ours, theirs = models
    oracle.same_live_state(ours, theirs)
    oracle.copy_parameters(theirs, ours)
    torch.testing.assert_close(logits(ours), logits(theirs))
    mine = {k: v.clone() for k, v in peftfast.get_peft_model_state_dict(ours, adapter_name="mine").items()}
    other = peft.get_peft_model_state_dict(theirs, adapter_name="mine")
    assert mine.keys() == other.keys() and not any(k.startswith("base_model") for k in mine)
    for state in (mine, {f"base_model.model.{k}": v for k, v in mine.items()}):
        result = peftfast.set_peft_model_state_dict(ours, {k: v * 2 for k, v in state.items()}, adapter_name="mine")
        assert not result.unexpected_keys
    torch.testing.assert_close(
        ours.model.layers[0].self_attn.q_proj.lora_A["mine"].weight, 2 * next(iter(other.values()))
    )
    # the weights decide what is adapted
    fewer = {k: v for k, v in mine.items() if "layers.1" in k}
    with pytest.warns(RuntimeWarning, match="inconsistency.*layers.0.self_attn.q_proj"):
        partly = peftfast.inject_adapter_in_model(LoraConfig(**OPTIONS), oracle.llama(), "mine", state_dict=fewer)
    assert sorted(n for n, m in partly.named_modules() if isinstance(m, peftfast.layers.layer.BaseTunerLayer)) == [
        "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj",
    ]  # fmt: skip
    empty = peftfast.inject_adapter_in_model(LoraConfig(**OPTIONS), oracle.llama(), "mine", low_cpu_mem_usage=True)
    assert all(p.is_meta for n, p in empty.named_parameters() if "lora_" in n)
    peftfast.set_peft_model_state_dict(empty, mine, adapter_name="mine", low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in empty.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_adapter_without_values_gets_tensors_of_its_own_in_its_dtype(dtype):
    """What is given may be written to afterwards."""
    options = {**OPTIONS, "modules_to_save": ["lm_head"]}
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(**options), low_cpu_mem_usage=True)
    given = {k: torch.randn(t.shape).to(dtype) for k, t in peftfast.get_peft_model_state_dict(model).items()}
    expected = {k: t.float().clone() for k, t in given.items()}
    peftfast.set_peft_model_state_dict(model, given, low_cpu_mem_usage=True)
    for tensor in given.values():
        tensor.zero_()
    found = peftfast.get_peft_model_state_dict(model)
    assert found.keys() == expected.keys()
    assert all(found[k].dtype == torch.float32 and torch.equal(found[k], t) for k, t in expected.items())


def test_the_base_that_a_config_names():
    model = oracle.llama()
    model.name_or_path = "new"
    config = LoraConfig(**OPTIONS, base_model_name_or_path="old")
    with pytest.warns(UserWarning, match="renamed from 'old' to 'new'"):
        peftfast.get_peft_model(model, config, revision="abc")
    assert (config.base_model_name_or_path, config.revision) == ("new", "abc")
    refused = LoraConfig(target_modules=["nothing"], base_model_name_or_path="old", revision="mine")
    with pytest.warns(UserWarning, match="renamed"), pytest.raises(ValueError, match="nothing"):
        peftfast.get_peft_model(oracle.llama(), refused, revision="abc")
    assert (refused.base_model_name_or_path, refused.revision) == ("old", "mine")


def test_base_state_dicts_leave_out_rows_of_tokens():
    config = LoraConfig(target_modules=["embed_tokens", "q_proj"])
    rows = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2])
    for own in (config, rows):
        found = peftfast.get_base_model_state_dict(peftfast.get_peft_model(oracle.llama(), own))
        assert found.keys() == oracle.llama().state_dict().keys()


def test_base_state_dicts():
    twins = oracle.Twins(oracle.llama, {**OPTIONS, "modules_to_save": ["lm_head"]})
    mine, other = (lib.get_base_model_state_dict(m) for lib, m in ((peftfast, twins.ours), (peft, twins.theirs)))
    assert mine.keys() == other.keys() == oracle.llama().state_dict().keys()
    peftfast.set_base_model_state_dict(twins.ours, {k: v * 0.5 for k, v in mine.items()})
    assert torch.equal(peftfast.get_base_model_state_dict(twins.ours)["lm_head.weight"], other["lm_head.weight"] * 0.5)
    wrong = {**mine, "rubbish": torch.ones(1), "model.norm.weight": torch.ones(3)}
    del wrong["lm_head.weight"]
    message = r"Missing key.*lm_head.weight; Unexpected key.*rubbish; Sizes.*model.norm.weight: \[32\], given \[3\]"
    with pytest.raises(RuntimeError, match=message):
        peftfast.set_base_model_state_dict(twins.ours, wrong)


@pytest.mark.parametrize("compiled_before", [False, True])
def test_a_state_dict_decides_the_targets_of_a_compiled_model(compiled_before):
    """Whose modules have another name in front, which files never have."""
    first = torch.compile(oracle.llama()) if compiled_before else oracle.llama()
    peftfast.inject_adapter_in_model(LoraConfig(**OPTIONS), first)
    tensors = peftfast.get_peft_model_state_dict(first)
    assert tensors and not any("_orig_mod" in key for key in tensors)
    model = torch.compile(oracle.llama())
    with pytest.warns(RuntimeWarning, match="inconsistency was discovered"):
        peftfast.inject_adapter_in_model(LoraConfig(target_modules=["k_proj"]), model, state_dict=tensors)
    result = peftfast.set_peft_model_state_dict(model, tensors)
    assert not result.missing_keys and not result.unexpected_keys
    again = peftfast.get_peft_model_state_dict(model)
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_factors_that_look_like_shards_are_saved_with_a_warning(tmp_path):
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(**OPTIONS, use_dora=True, lora_bias=False))
    model.save_pretrained(tmp_path / "whole")  # with magnitudes, which are flat
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    weight.data = torch.zeros(7)
    with pytest.warns(peftfast.PeftWarning, match=r"layers.0.self_attn.q_proj.lora_A.*DeepSpeed ZeRO-3 / FSDP shards"):
        model.save_pretrained(tmp_path / "flat")
    assert (tmp_path / "flat" / "adapter_model.safetensors").exists()


def test_factors_without_values_are_not_saved(tmp_path):
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(**OPTIONS), low_cpu_mem_usage=True)
    with pytest.raises(peftfast.AdapterLoadError, match=r"meta device .* 'base_model.*lora_A"):
        model.save_pretrained(tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize("asked", [True, False, "auto"])
@pytest.mark.parametrize(
    ("make", "targets"),
    [(oracle.llama, ["q_proj"]), (oracle.gpt2, ["c_attn"]), (oracle.gpt2, ["wte"])],  # PEFT knows no `wte`
    ids=["llama", "gpt2", "gpt2-wte"],
)
def test_saving_embeddings(asked, make, targets, tmp_path):
    options = {"target_modules": targets, "fan_in_fan_out": targets == ["c_attn"]}
    twins = oracle.Twins(make, options)
    for model, name in ((twins.ours, "ours"), (twins.theirs, "theirs")):
        model.save_pretrained(tmp_path / name, save_embedding_layers=asked)
    oracle.same_files(tmp_path / "ours", tmp_path / "theirs")
    saved = load_file(tmp_path / "ours/adapter_model.safetensors")
    assert any(k.endswith(("wte.weight", "base_layer.weight", "embed_tokens.weight")) for k in saved) is (asked is True)
    peftfast.PeftModel.from_pretrained(make(), tmp_path / "theirs", strict=True)


@pytest.mark.parametrize("changes", [{"layers_to_transform": [1]}, {"modules_to_save": ["embed_tokens"]}])
def test_an_embedding_that_is_named_but_not_adapted_stays_at_home(changes, tmp_path):
    """The tables would be most of the file."""
    twins = oracle.Twins(oracle.llama, {**OPTIONS, "target_modules": ["q_proj", "embed_tokens"], **changes})
    for model, name in ((twins.ours, "ours"), (twins.theirs, "theirs")):
        oracle.quietly(model.save_pretrained, tmp_path / name)
    oracle.same_files(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("targets", [["q_proj"], ["model.embed_tokens", "q_proj"]], ids=["q", "embedding"])
def test_resized_vocabulary_is_saved(targets, base_folder, tmp_path):
    models = []
    for library in (peftfast, peft):
        base = from_folder(base_folder)
        base.resize_token_embeddings(oracle.VOCABULARY + 8)
        torch.manual_seed(0)
        models.append(library.get_peft_model(base, library.LoraConfig(**{**OPTIONS, "target_modules": targets})))
    oracle.copy_parameters(models[1], models[0])
    for model, name in zip(models, ("ours", "theirs"), strict=True):
        with pytest.warns(UserWarning, match="to `True` as the embedding layer has been resized during finetuning"):
            model.save_pretrained(tmp_path / name)
    oracle.same_files(tmp_path / "ours", tmp_path / "theirs")
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "ours/adapter_model.safetensors")


@pytest.mark.parametrize(
    ("library", "how"),
    [
        (peftfast, "target_modules"),
        (peftfast, "modules_to_save"),
        (peftfast, "trainable_token_indices"),
        (peft, "target_modules"),
        (peft, "modules_to_save"),  # with token rows beside it PEFT saves nothing
    ],
)
def test_resized_vocabulary_beside_an_adapted_embedding(library, how, tmp_path):
    """Whether the embedding travels is asked of the adapter that is saved, not of others, and its file needs neither
    them nor their places in the model."""

    def base(seed):
        model = oracle.llama()
        torch.manual_seed(seed)
        model.resize_token_embeddings(oracle.VOCABULARY + 8, mean_resizing=False)
        return model

    names = {"target_modules": ["embed_tokens"], "trainable_token_indices": [1]}.get(how, ["embed_tokens"])
    other = LoraConfig(**{"target_modules": ["k_proj"], how: names})
    model = library.get_peft_model(base(1), library.LoraConfig(**OPTIONS))
    model.add_adapter("other", library.LoraConfig(**{"target_modules": ["k_proj"], how: names}))
    model.save_pretrained(tmp_path, selected_adapters=["default"], save_embedding_layers=True)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    whole = ["base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"]
    if library is peftfast:
        assert sorted(k for k in saved if "lora" not in k) == whole
        for key, module in zip(whole, (model.get_output_embeddings(), model.get_input_embeddings()), strict=True):
            assert torch.equal(saved[key], getattr(module, "original_module", module).weight)
        theirs = peft.PeftModel.from_pretrained(base(2), tmp_path)
        torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    ours = peftfast.PeftModel.from_pretrained(base(2), tmp_path, strict=True)
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-4, atol=1e-5)
    beside = peftfast.get_peft_model(base(2), other, "other")
    beside.load_adapter(tmp_path, "default", strict=True)
    beside.set_adapter("default")
    torch.testing.assert_close(logits(beside), logits(model), rtol=1e-4, atol=1e-5)


ROWS = {
    "beside lora": ("LoraConfig", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [64]}}),
    "alone": ("TrainableTokensConfig", {"token_indices": [64], "target_modules": ["embed_tokens"]}),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.filterwarnings("ignore")
def test_rows_added_to_a_vocabulary_travel_with_trained_ones(kind, tied, tmp_path):
    """Of two new rows one is trained, and a model made anew has other numbers in both. PEFT leaves out those of a head
    of its own where the rows are all that is trained."""
    oracle.llama(tied=tied).save_pretrained(tmp_path / "base")
    name, options = ROWS[kind]

    def grown(seed):
        base = from_folder(tmp_path / "base")
        torch.manual_seed(seed)
        base.resize_token_embeddings(oracle.VOCABULARY + 2, mean_resizing=False)
        with torch.no_grad():
            for module in (base.get_input_embeddings(), base.get_output_embeddings()):
                module.weight[oracle.VOCABULARY :].normal_()
        return base

    ids = torch.tensor([[1, 64, 65, 2]])
    lost = kind == "alone" and not tied
    for library in (peftfast, peft):
        model = library.get_peft_model(grown(1), getattr(library, name)(task_type="CAUSAL_LM", **options)).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.normal_(generator=torch.Generator().manual_seed(len(key)))
        want = model(input_ids=ids).logits
        model.save_pretrained(tmp_path / library.__name__)
        for reader in (peftfast, peft):
            more = {"strict": True} if reader is peftfast else {}
            again = reader.PeftModel.from_pretrained(grown(2), tmp_path / library.__name__, **more).eval()
            if library is peftfast or not lost:
                torch.testing.assert_close(again(input_ids=ids).logits, want)
    ours, theirs = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("peftfast", "peft"))
    twice = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
    assert ours.keys() - theirs.keys() == ({"base_model.model.lm_head.weight"} if lost else set())
    assert theirs.keys() - ours.keys() == ({twice} if tied and kind == "beside lora" else set())


@pytest.mark.filterwarnings("ignore")
def test_a_resized_vocabulary_of_a_model_of_several_parts_is_saved(tmp_path):
    """PEFT loses it without a word, because the config has the size with its text's."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=30, patch_size=15), image_token_index=63,
        text_config=LlamaConfig(**sizes, vocab_size=64),
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    model = peftfast.get_peft_model(model, LoraConfig(**OPTIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        model.save_pretrained(tmp_path / "as it was")
    model.get_base_model().resize_token_embeddings(72)
    with pytest.warns(UserWarning, match="the embedding layer has been resized during finetuning"):
        model.save_pretrained(tmp_path / "resized")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    with pytest.raises(peftfast.AdapterLoadError, match=r"model.resize_token_embeddings\(72\)"):
        peftfast.PeftModel.from_pretrained(again, tmp_path / "resized")
    again.resize_token_embeddings(72)
    again = peftfast.PeftModel.from_pretrained(again, tmp_path / "resized", strict=True)
    ids = torch.tensor([[5, 66, 70]])
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_an_auto_class_finds_an_adapter_in_a_sub_folder(base_folder, tmp_path):
    """PEFT looks for the base model in a sub-folder of the name as well."""
    model = peftfast.get_peft_model(from_folder(base_folder), LoraConfig(**OPTIONS))
    model.save_pretrained(tmp_path / "checkpoint-1")
    loaded = peftfast.AutoPeftModelForCausalLM.from_pretrained(tmp_path, subfolder="checkpoint-1", strict=True)
    torch.testing.assert_close(logits(loaded), logits(model))
    from_folder(base_folder).save_pretrained(tmp_path / "models" / "checkpoint-1")  # both are in one, as in PEFT
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "models")
    model.save_pretrained(tmp_path / "checkpoint-1")
    loaded = peftfast.AutoPeftModelForCausalLM.from_pretrained(tmp_path, subfolder="checkpoint-1", strict=True)
    torch.testing.assert_close(logits(loaded), logits(model))


def test_rows_that_a_file_has_twice_have_to_be_the_same(tmp_path):
    """PEFT saves the rows of a tied embedding once more under the head, where a vocabulary was resized."""
    model = peftfast.get_peft_model(oracle.llama(tied=True), LoraConfig(**OPTIONS, trainable_token_indices=[3, 5]))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    twice = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
    tensors = load_file(path)
    save_file({**tensors, twice: tensors[key].clone()}, path)
    peftfast.PeftModel.from_pretrained(oracle.llama(tied=True), tmp_path, strict=True)
    save_file({**tensors, twice: tensors[key] + 1}, path)
    with pytest.raises(peftfast.AdapterLoadError, match="unexpected keys.*lm_head.token_adapter.trainable_tokens"):
        peftfast.PeftModel.from_pretrained(oracle.llama(tied=True), tmp_path, strict=True)


def test_auto_classes(base_folder, tmp_path):
    from transformers import LlamaForCausalLM

    model = peftfast.get_peft_model(from_folder(base_folder), LoraConfig(**OPTIONS))
    model.save_pretrained(tmp_path / "causal")
    config = json.loads((tmp_path / "causal/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base_folder) and config["auto_mapping"] is None
    for library in (peftfast, peft):
        loaded = library.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "causal")
        assert type(loaded) is library.PeftModelForCausalLM
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    trainable = peftfast.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "causal", is_trainable=True)
    assert any(p.requires_grad for p in trainable.parameters())
    asked = "Expected target PEFT class: PeftModelForCausalLM, but you have asked for: PeftModelForSeq2SeqLM"
    for library in (peftfast, peft):
        with pytest.raises(ValueError, match=asked):
            library.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "causal")
        with pytest.raises(
            ValueError, match="Cannot use `AutoPeftModel` with a task type, please use a specific class"
        ):
            library.AutoPeftModel.from_pretrained(tmp_path / "causal")
    with pytest.raises(EnvironmentError, match="from_pretrained"):
        peftfast.AutoPeftModelForCausalLM()
    peftfast.get_peft_model(oracle.llama(), LoraConfig(**OPTIONS)).save_pretrained(tmp_path / "nameless")
    with pytest.raises(ValueError, match=r"does not name its base model.*PeftModel.from_pretrained\(base, folder\)"):
        peftfast.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "nameless")
    # without a task type the class of the base is in the file
    plain = peftfast.get_peft_model(from_folder(base_folder), LoraConfig(**{**OPTIONS, "task_type": None}))
    plain.save_pretrained(tmp_path / "plain")
    for library in (peftfast, peft):
        for name in ("", "ForCausalLM", "ForFeatureExtraction"):
            loaded = getattr(library, f"AutoPeftModel{name}").from_pretrained(tmp_path / "plain")
            assert type(loaded) is getattr(library, f"PeftModel{name}")
            assert type(loaded.get_base_model()) is LlamaForCausalLM
            torch.testing.assert_close(logits(loaded), logits(plain), rtol=1e-4, atol=1e-4)
    path = tmp_path / "plain/adapter_config.json"
    config = json.loads(path.read_text())
    module = LlamaForCausalLM.__module__
    assert config["auto_mapping"] == {"base_model_class": "LlamaForCausalLM", "parent_library": module}
    for library in (peftfast, peft):
        library.AutoPeftModel.from_pretrained(tmp_path / "plain", import_allowlist=[module.rpartition(".")[0]])
        for allowed in ([], ["transform"]):
            with pytest.raises(ValueError, match="which is not in the import allowlist"):
                library.AutoPeftModel.from_pretrained(tmp_path / "plain", import_allowlist=allowed)
    config["auto_mapping"] = {"base_model_class": "system", "parent_library": "os"}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'os', which is not in the import allowlist"):
        peftfast.AutoPeftModel.from_pretrained(tmp_path / "plain")


@pytest.mark.parametrize("where", ["folder", "cache"])
def test_an_adapter_with_more_tokens_is_loaded_without_the_network(where, tmp_path, monkeypatch):
    """Of a repository in the hub's cache, transformers finds a tokenizer only beside a model's config when offline."""
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    oracle.llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    words = {f"w{i}": i for i in range(oracle.VOCABULARY + 5)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")))
    base.resize_token_embeddings(len(tokenizer))
    model = oracle.quietly(peftfast.get_peft_model, base, LoraConfig(**OPTIONS))
    entry = tmp_path / "cache/models--me--adapter"
    folder = entry / "snapshots" / ("0" * 40) if where == "cache" else tmp_path / "adapter"
    oracle.quietly(model.save_pretrained, folder)
    tokenizer.save_pretrained(folder)
    if where == "cache":
        (entry / "refs").mkdir()
        (entry / "refs/main").write_text("0" * 40)
        loaded = peftfast.AutoPeftModelForCausalLM.from_pretrained("me/adapter", cache_dir=tmp_path / "cache")
    else:
        loaded = peftfast.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert loaded.get_input_embeddings().num_embeddings == len(tokenizer)
    assert torch.equal(oracle.logits(loaded), oracle.logits(model))


@pytest.mark.parametrize("cached", [True, False])
def test_saving_does_not_wait_for_a_hub_that_cannot_be_asked(cached, tmp_path, monkeypatch):
    """Nor ask it for what its cache has: each of a training's checkpoints is saved."""

    def no_network(*args, **kwargs):
        raise OSError("no network")

    def downloaded(*args, **kwargs):  # which tries again and again
        raise AssertionError(args)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_exists", no_network)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", downloaded)
    base, entry = oracle.llama(), tmp_path / "hub/models--me--base"
    if cached:
        base.config.save_pretrained(entry / "snapshots" / ("0" * 40))
        (entry / "refs").mkdir()
        (entry / "refs/main").write_text("0" * 40)
    base.name_or_path = "me/base"
    model = peftfast.get_peft_model(base, LoraConfig(**OPTIONS))
    model.resize_token_embeddings(oracle.VOCABULARY + 5)
    said = "embedding layer has been resized" if cached else "Could not find a config file in me/base.*no network"
    with pytest.warns(UserWarning, match=said):
        model.save_pretrained(tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("embed_tokens" in key for key in keys) is cached


def test_auto_classes_ask_for_the_tokenizer_as_for_the_model(base_folder, tmp_path, monkeypatch):
    import transformers

    model = from_folder(base_folder)
    model.resize_token_embeddings(model.config.vocab_size + 5)
    size = model.config.vocab_size
    options = {**OPTIONS, "modules_to_save": ["embed_tokens", "lm_head"]}
    peftfast.get_peft_model(model, LoraConfig(**options)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    asked = []
    given = {"trust_remote_code": True, "token": "t"}
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda path, **given: asked.append(given) or range(size)
    )
    for library in (peft, peftfast):
        loaded = library.AutoPeftModelForCausalLM.from_pretrained(tmp_path, **given)
        assert loaded.get_input_embeddings().weight.shape[0] == size
    assert asked == 2 * [{"revision": None, **given}]


def test_model_card(base_folder, tmp_path):
    from huggingface_hub import ModelCard

    twins = oracle.Twins(lambda: from_folder(base_folder), OPTIONS)
    cards = []
    for model, name in ((twins.ours, "ours"), (twins.theirs, "theirs")):
        model.save_pretrained(tmp_path / name)
        cards.append(ModelCard.load(tmp_path / name / "README.md"))
    assert cards[0].data.to_dict() == cards[1].data.to_dict()
    assert cards[0].text.rstrip().endswith(cards[1].text.rstrip().splitlines()[-1])
    path = tmp_path / "ours/README.md"
    path.write_text(path.read_text() + "\nWhat a person wrote.\n")
    twins.ours.save_pretrained(tmp_path / "ours")
    assert "What a person wrote." in path.read_text() and path.read_text().count("### Framework versions") == 1


@pytest.mark.parametrize(
    "section", ["", "### Framework versions\n\n{}- Transformers 5.0\n\n## Thanks\n\n- PEFT 1 to all\n"]
)
def test_only_the_version_in_a_card_is_replaced(section, tmp_path):
    from huggingface_hub import ModelCardData

    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(**OPTIONS))
    taken_apart = ModelCardData(tags="mine").tags != ["mine"]  # by huggingface_hub 1.3, into letters
    head = f"---\ntags: {'[mine]' if taken_apart else 'mine'}\npipeline_tag: summarization\n---\n"
    written = "# Mine\n\n- PEFT made this cheap to train\n- PEFT 0.17 was not enough\n\n"
    for old in ("- PEFT 0.1.0\n", "") if section else ("",):
        path = tmp_path / "README.md"
        path.write_text(head + written + section.format(old))
        for _ in range(2):
            model.save_pretrained(tmp_path)
            text = path.read_text()
            assert written.strip() in text and text.count("- PEFT 0.21.2\n") + text.endswith("- PEFT 0.21.2") == 1
            assert not section or "- PEFT 0.21.2\n" in text.partition("versions")[2].partition("##")[0]
            assert ("- Transformers 5.0\n\n## Thanks\n\n- PEFT 1 to all" in text) is bool(section)
        data = text.partition("\n---\n")[0]
        assert "\n- mine\n" in data and "pipeline_tag: summarization" in data


@pytest.mark.parametrize("tags", ["[2024, mine]", "[[a, b]]", "[{a: b}]"])
def test_tags_of_a_card_may_be_anything(tags, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"---\ntags: {tags}\n---\n# Mine\n")
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(**OPTIONS))
    for _ in range(2):
        model.save_pretrained(tmp_path)
        found = yaml.safe_load(path.read_text().split("---")[1])["tags"]
        assert found == sorted([*yaml.safe_load(tags), "lora", "transformers"], key=str)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"---\ntags: [mine\n---\n"])
def test_a_card_that_is_none_keeps_nobody_from_saving(content, tmp_path):
    (tmp_path / "README.md").write_bytes(content)
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(**OPTIONS))
    with pytest.warns(peftfast.PeftWarning, match=r"README.md is no model card and stays as it is"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == content
    peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path)


def test_reloading_weights_into_a_present_adapter(tmp_path):
    """What resuming a training does."""
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(**OPTIONS))
    model.save_pretrained(tmp_path)
    expected = logits(model)
    oracle.moved(model)
    trainable = [p.requires_grad for p in model.parameters()]
    result = model.load_adapter(tmp_path, "default", is_trainable=True)
    assert result.missing_keys == [] and result.unexpected_keys == []
    torch.testing.assert_close(logits(model), expected)
    assert [p.requires_grad for p in model.parameters()] == trainable


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ({"lora_alpha": 32}, {}, "lora_alpha is 32 there and 8 here"),
        ({}, {"use_rslora": True}, "use_rslora is False there and True here"),
        ({"alpha_pattern": {"v_proj": 3}}, {}, "alpha_pattern is {'v_proj': 3} there"),
        ({"use_dora": True}, {}, "variant is 'use_dora' there and None here"),
        ({"lora_alpha": 32, "use_rslora": True}, {}, "lora_alpha is 32 there and 8 here; use_rslora is True there"),
        ({"lora_dropout": 0.1, "target_modules": ["v_proj", "q_proj"], "init_lora_weights": True}, {}, None),
    ],
)
def test_a_present_adapter_that_computes_otherwise_than_the_file(theirs, ours, said, tmp_path):
    """Its config stays, as in PEFT, which says nothing of it."""
    peftfast.get_peft_model(oracle.llama(), LoraConfig(**{**OPTIONS, **theirs})).save_pretrained(tmp_path)
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(**{**OPTIONS, **ours}))
    before = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", peftfast.AdapterMismatchWarning)
        if said is None:
            model.load_adapter(tmp_path, "default", strict=True)
            return
        with pytest.raises(peftfast.AdapterLoadError, match=said):
            model.load_adapter(tmp_path, "default", strict=True)
        assert torch.equal(logits(model), before)
        model.load_adapter(tmp_path, "default", strict="off")
    with pytest.warns(peftfast.AdapterMismatchWarning, match=said):
        model.load_adapter(tmp_path, "default")
    asked = LoraConfig(**{**OPTIONS, **ours})  # this is what somebody wants
    if "use_dora" not in theirs:
        peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path, config=asked, strict=True)
    (tmp_path / "adapter_config.json").unlink()  # nothing is known, and nothing needed
    with warnings.catch_warnings():
        if "use_dora" not in theirs:
            warnings.simplefilter("error", peftfast.AdapterMismatchWarning)
        model.load_adapter(tmp_path, "default")


def test_a_schedule_that_has_gone_on_is_no_other_config(tmp_path):
    config = {
        "total_step": 4,
        "tinit": 0,
        "tfinal": 0,
        "deltaT": 1,
        "init_r": 4,
        "target_r": 2,
        "target_modules": ["q_proj"],
    }
    model = peftfast.get_peft_model(oracle.llama(), peftfast.AdaLoraConfig(**config, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "before")
    oracle.descend(model, 4, lr=1e-3)
    assert model.peft_config["default"].rank_pattern
    model.load_adapter(tmp_path / "before", "default", is_trainable=True, strict=True)


def test_arguments_that_nobody_knows_are_named(base_folder, tmp_path):
    """A warning, as PEFT gives one for unknown fields of a file; known ones arrive."""
    model = peftfast.get_peft_model(from_folder(base_folder), LoraConfig(**OPTIONS))
    model.save_pretrained(tmp_path)
    calls = {
        "from_pretrained": lambda **given: peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path, **given),
        "from_folder": lambda **given: peftfast.PeftModel.from_folder(oracle.llama(), tmp_path, **given),
        "load_adapter": lambda **given: model.load_adapter(tmp_path, "default", **given),
    }
    for name, call in calls.items():
        said = rf"^(from_pretrained|{name}) does not know the arguments \['subfoldr'\]. Did you mean 'subfolder'\?"
        with pytest.warns(peftfast.AdapterMismatchWarning, match=said):
            call(subfoldr="x")
        with pytest.raises(TypeError, match=said):
            call(subfoldr="x", strict=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(torch_device="cpu", strict=True, local_files_only=True)
    said = r"^save_pretrained does not know the arguments \['safe_serialisation'\]. Did you mean 'safe_serialization'\?"
    with pytest.warns(peftfast.AdapterMismatchWarning, match=said):
        model.save_pretrained(tmp_path, safe_serialisation=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path, max_shard_size="1GB", save_function=torch.save, variant=None, state_dict=None)
    loaded = peftfast.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path, torch_device="cpu", strict=True, dtype=torch.bfloat16, autocast_adapter_dtype=False
    )
    assert loaded.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.dtype == torch.bfloat16


def test_arguments_that_the_file_knows_better_are_named(tmp_path):
    """PEFT takes what the file says without a word."""
    peftfast.get_peft_model(oracle.llama(), LoraConfig(**OPTIONS)).save_pretrained(tmp_path)
    for call in (
        lambda **given: peftfast.PeftConfig.from_pretrained(tmp_path, **given),
        lambda **given: peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path, **given).peft_config["default"],
    ):
        with pytest.warns(peftfast.AdapterMismatchWarning, match=r"no effect: lora_alpha=77 \(the file has \d+\)\. To"):
            assert call(lora_alpha=77).lora_alpha == LoraConfig(**OPTIONS).lora_alpha
        with pytest.raises(TypeError, match="lora_alpha=77"):
            call(lora_alpha=77, strict=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(lora_alpha=LoraConfig(**OPTIONS).lora_alpha, target_modules=set(OPTIONS["target_modules"]))


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loading_a_second_adapter(is_trainable, tmp_path):
    twins = oracle.Twins(oracle.llama, OPTIONS)
    twins.ours.save_pretrained(tmp_path)
    for model in (twins.ours, twins.theirs):
        model.train()
        model.load_adapter(tmp_path, "second", is_trainable=is_trainable)
    oracle.same_live_state(twins.ours, twins.theirs)
    assert twins.ours.training == twins.theirs.training == is_trainable
    assert list(twins.ours.active_adapters) == list(twins.theirs.active_adapters) == ["default"]


def test_a_model_is_loaded_by_what_its_class_makes_of_load_adapter(tmp_path):
    """As in PEFT: NVIDIA's ModelOpt reads there what it has saved beside the adapter."""
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(**OPTIONS))
    model.save_pretrained(tmp_path)

    class Model(peftfast.PeftModel):
        def load_adapter(self, model_id, adapter_name, is_trainable=False, **kwargs):
            self.asked = model_id, adapter_name, is_trainable, list(self.peft_config)
            return super().load_adapter(model_id, adapter_name, is_trainable=is_trainable, **kwargs)

    for is_trainable in (False, True):
        loaded = Model.from_pretrained(oracle.llama(), tmp_path, "first", is_trainable, subfolder=None)
        assert loaded.asked == (tmp_path, "first", is_trainable, ["first"])
        assert all(p.requires_grad == (is_trainable and "lora_" in name) for name, p in loaded.named_parameters())


def test_an_empty_selection_is_refused_and_leaves_nothing(tmp_path):
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(**OPTIONS))
    with pytest.raises(ValueError, match=r"selected_adapters=\[\] .* \['default'\]"):
        model.save_pretrained(tmp_path / "out", selected_adapters=[])
    assert not (tmp_path / "out").exists()


def test_a_state_dict_of_the_scripts_own_does_not_empty_the_file(tmp_path):
    """Alpaca-LoRA's scripts put the adapter's state dict in the place of the model's, after which PEFT finds none of
    the names that it looks for; here an adapter is read from its modules."""
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(**OPTIONS))
    whole = model.state_dict
    model.state_dict = lambda: peftfast.get_peft_model_state_dict(model, whole())
    model.save_pretrained(tmp_path)
    loaded = peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_key_mapping(tmp_path):
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(**OPTIONS))
    model.save_pretrained(tmp_path)
    from safetensors.torch import save_file

    path = tmp_path / "adapter_model.safetensors"
    save_file({k.replace("model.model.layers", "model.old.layers"): v for k, v in load_file(path).items()}, path)
    for library in (peftfast, peft):
        loaded = library.PeftModel.from_pretrained(oracle.llama(), tmp_path, key_mapping={"^old": "model"})
        torch.testing.assert_close(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "mapping",
    [
        {"q_proj": "zz"}, {"lora_A": "x", "q_proj": "zz"}, {r"layers\.(\d+)": r"blocks.\1.h"}, {"^model": "m"},
        {"^layers": "m"}, {"o": "0"}, {r"^model(?!\.visual)": "language"}, {"base_model": "b"},
    ],
    ids=str,
)  # fmt: skip
def test_key_mapping_renames_whatever_matches(mapping, tmp_path):
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(**OPTIONS, modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path)
    mine, other = (library.load_peft_weights(tmp_path, key_mapping=mapping) for library in (peftfast, peft))
    assert mine.keys() == other.keys()


def test_a_config_that_is_given_is_used(tmp_path):
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(**OPTIONS))
    model.save_pretrained(tmp_path)
    config = peftfast.PeftConfig.from_pretrained(tmp_path)
    config.lora_alpha = 16
    loaded = peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path, config=config)
    assert loaded.base_model.model.model.layers[0].self_attn.q_proj.scaling == {"default": 2.0}
    with pytest.raises(ValueError, match="PeftConfig"):
        peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path, config={"r": 8})


@pytest.mark.parametrize(
    "name, options",
    [
        ("LoraConfig", OPTIONS),
        ("LoraConfig", {**OPTIONS, "use_dora": True}),
        ("LoraConfig", {**OPTIONS, "alora_invocation_tokens": [1]}),
        ("AdaLoraConfig", {"target_modules": ["q_proj"], "total_step": 10, "task_type": "CAUSAL_LM"}),
        ("IA3Config", {"target_modules": ["q_proj"], "feedforward_modules": [], "task_type": "CAUSAL_LM"}),
        ("PromptTuningConfig", {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}),
    ],
    ids=["lora", "dora", "alora", "adalora", "ia3", "prompt"],
)
def test_a_config_class_of_somebody_elses(name, options, tmp_path):
    """Derived from a library's own, with a field and a file more."""
    configs = {}
    for library in (peftfast, peft):

        @dataclasses.dataclass
        class Derived(getattr(library, name)):
            extra: str = "more"

            def to_dict(self):
                return {**super().to_dict(), "written_by": "Derived"}

            def save_pretrained(self, save_directory, **kwargs):
                super().save_pretrained(save_directory, **kwargs)
                (Path(save_directory) / "beside").mkdir(exist_ok=True)
                (Path(save_directory) / "beside/extra.json").write_text(f'"{self.extra}"')

        configs[library] = Derived(**options, extra="much more")
    ours, theirs = (library.get_peft_model(oracle.llama(), configs[library]) for library in (peftfast, peft))
    assert type(ours.active_peft_config) is type(configs[peftfast])
    oracle.copy_parameters(theirs, ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert not ours.active_peft_config.inference_mode
    oracle.same_files(tmp_path / "ours", tmp_path / "theirs")
    assert (tmp_path / "ours/beside/extra.json").read_text() == '"much more"'
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert (config["extra"], config["written_by"], config["inference_mode"]) == ("much more", "Derived", True)
    for folder in ("ours", "theirs"):
        with pytest.warns(peftfast.AdapterMismatchWarning, match="Unexpected keyword arguments"):
            again = peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path / folder)
        assert type(again.active_peft_config) is getattr(peftfast, name)
        assert torch.equal(logits(again), logits(ours))


def test_a_config_that_saves_otherwise(tmp_path):
    """A `save_pretrained` put on the config itself, as in PEFT; one that fails leaves the old files."""
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(**OPTIONS))
    config = model.active_peft_config
    usual = config.save_pretrained

    def save(folder, **kwargs):
        usual(folder, **kwargs)
        (Path(folder) / "extra.txt").write_text("x")

    config.save_pretrained = save
    model.save_pretrained(tmp_path)
    assert (tmp_path / "extra.txt").read_text() == "x" and json.loads((tmp_path / "adapter_config.json").read_text())[
        "inference_mode"
    ]
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

    def fail(folder, **kwargs):
        usual(folder, **kwargs)
        raise RuntimeError("no more of this")

    config.save_pretrained, config.lora_alpha = fail, 77
    with pytest.raises(RuntimeError, match="no more of this"):
        model.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    assert not config.inference_mode


def test_crash_while_saving_keeps_the_old_files(tmp_path, monkeypatch):
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(**OPTIONS))
    model.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_" in n).add_(1)

    def crash(tensors, path, **kwargs):
        with open(path, "wb") as f:
            f.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_sharded_base(tmp_path):
    """A base whose checkpoint is in several files, loaded and adapted as any other."""
    oracle.llama().save_pretrained(tmp_path / "base", max_shard_size="5KB")
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 1
    model = peftfast.get_peft_model(from_folder(tmp_path / "base"), LoraConfig(**OPTIONS))
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(from_folder(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_device_mapped_base(base_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "lm_head": "cpu",
                  "model.layers.1": "disk", "model.norm": "cpu"}  # fmt: skip
    plain = peftfast.get_peft_model(from_folder(base_folder), LoraConfig(**OPTIONS))
    plain.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(base_folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert any(p.is_meta for p in base.parameters())
    loaded = peftfast.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert not any(p.is_meta for n, p in loaded.named_parameters() if "lora_" in n)
    torch.testing.assert_close(logits(loaded), logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["all", "lora_only"])
def test_biases_are_loaded_whatever_the_config_says(kind, tmp_path):
    """They were trained with the factors; a config that forgets them is worth a word, not another output."""
    options = {**OPTIONS, "bias": kind}
    trained = peftfast.get_peft_model(oracle.llama(bias=True), LoraConfig(**options))
    oracle.moved(trained, 1.0)
    expected = logits(trained)
    fresh = peftfast.get_peft_model(oracle.llama(bias=True), LoraConfig(**OPTIONS))
    result = peftfast.set_peft_model_state_dict(fresh, peftfast.get_peft_model_state_dict(trained))
    assert result.unexpected_keys == []
    assert torch.equal(logits(fresh), expected)

    trained.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace(f'"bias": "{kind}"', '"bias": "none"'))
    with pytest.warns(peftfast.AdapterMismatchWarning, match=r"biases that its config \(bias='none'\) does not"):
        loaded = peftfast.PeftModel.from_pretrained(oracle.llama(bias=True), tmp_path)
    assert torch.equal(logits(loaded), expected)

    without = peftfast.get_peft_model(oracle.llama(), LoraConfig(**options))  # layers that have none lack none
    without.save_pretrained(tmp_path / "without")
    peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path / "without", strict=True)


@pytest.mark.parametrize("kind", ["all", "lora_only"])
def test_an_adapter_with_biases_beside_others_without(kind, tmp_path):
    """PEFT loads it, biases and all, and trains no biases with it."""
    trained = peftfast.get_peft_model(oracle.llama(bias=True), LoraConfig(**{**OPTIONS, "bias": kind}))
    oracle.moved(trained, 1.0)
    trained.save_pretrained(tmp_path)
    trainable = []
    for library in (peftfast, peft):
        model = library.get_peft_model(oracle.llama(bias=True), library.LoraConfig(**OPTIONS))
        with pytest.warns(peftfast.PeftWarning, match="not trained with it") if library is peftfast else nullcontext():
            model.load_adapter(tmp_path, "second", is_trainable=True)
        model.set_adapter("second")
        trainable.append({n for n, p in model.named_parameters() if p.requires_grad})
        torch.testing.assert_close(logits(model), logits(trained))
    assert trainable[0] == trainable[1] and not [n for n in trainable[0] if n.endswith(".bias")]


@pytest.mark.parametrize("kind", ["all", "lora_only"])
def test_biases_beside_layers_of_other_adapters(kind, tmp_path):
    """The file names them as they are without the other adapter, and loads with and without it."""
    model = peftfast.get_peft_model(oracle.llama(bias=True), LoraConfig(**{**OPTIONS, "bias": kind}))
    alone = set(peftfast.get_peft_model_state_dict(model))
    oracle.moved(model, 1.0)
    other = LoraConfig(target_modules=["down_proj"])
    model.add_adapter("other", other)
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == alone
    beside = peftfast.get_peft_model(oracle.llama(bias=True), other, "other")
    oracle.quietly(beside.load_adapter, tmp_path, "default")
    beside.set_adapter("default")
    loaded = [beside, peftfast.PeftModel.from_pretrained(oracle.llama(bias=True), tmp_path, strict=True)]
    loaded.append(peft.PeftModel.from_pretrained(oracle.llama(bias=True), tmp_path))
    for model in loaded:
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_an_embedding_around_an_adapted_module_travels_without_other_adapters(tmp_path):
    """A ViT's is a module around a convolution."""
    from transformers import ViTConfig, ViTModel

    def base():
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        return ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4))

    for library, name in ((peftfast, "ours"), (peft, "theirs")):
        model = library.get_peft_model(base(), library.LoraConfig(target_modules=["projection"]))
        model.add_adapter("other", library.LoraConfig(target_modules=["projection"]))
        model.save_pretrained(tmp_path / name, save_embedding_layers=True)
    oracle.same_files(tmp_path / "ours", tmp_path / "theirs")
    peftfast.PeftModel.from_pretrained(base(), tmp_path / "ours", strict=True)


def test_asking_for_embeddings_that_nobody_can_find_is_said(tmp_path):
    model = peftfast.get_peft_model(torch.nn.Sequential(torch.nn.Embedding(9, 4)), LoraConfig(target_modules=["0"]))
    with pytest.warns(UserWarning, match=r"Could not identify embedding layer\(s\)"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ValueError, match="save_embedding_layers must be True, False or 'auto', got 'yes'"):
        model.save_pretrained(tmp_path / "yes", save_embedding_layers="yes")
    assert not (tmp_path / "yes").exists()


@pytest.mark.parametrize("task, loader", [("CAUSAL_LM", "AutoPeftModelForCausalLM"), (None, "PeftModel")])
def test_a_new_card_shows_how_to_load_this_adapter(task, loader, tmp_path):
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(**{**OPTIONS, "task_type": task}))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    assert f"from peft import {loader}\n" in code and f"{loader}.from_pretrained(" in code
    assert "# Adapter for LlamaForCausalLM" in text and "{{" not in text
    for section in ("Intended use", "Training", "Evaluation", "Limitations"):
        assert f"\n## {section}\n" in text


def classifier_loading(labels=3):
    """A sequence classifier as a script gets it: the head is a new one each time."""
    from transformers import LlamaForSequenceClassification

    language_model = oracle.llama()
    language_model.config.num_labels = labels
    base = LlamaForSequenceClassification(language_model.config)
    base.model.load_state_dict(language_model.model.state_dict())
    return base


@pytest.mark.parametrize("trained", [True, False], ids=["trained-head", "forgotten-head"])
def test_a_head_that_the_adapter_brings_may_be_any_in_the_base(trained, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS" if trained else None)
    peftfast.get_peft_model(classifier_loading(), config).save_pretrained(tmp_path)
    expected = nullcontext() if trained else pytest.warns(peftfast.AdapterMismatchWarning, match="weights of 'score'")
    with warnings.catch_warnings():
        warnings.simplefilter("error", peftfast.AdapterMismatchWarning)
        with expected:
            peftfast.PeftModel.from_pretrained(classifier_loading(), tmp_path)


def test_a_head_of_other_labels_says_how_to_load_the_base(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")
    peftfast.get_peft_model(classifier_loading(labels=5), config).save_pretrained(tmp_path)
    with pytest.raises(peftfast.AdapterLoadError, match=r"size mismatch .*score.*num_labels=5"):
        peftfast.PeftModel.from_pretrained(classifier_loading(labels=2), tmp_path)
    peftfast.PeftModel.from_pretrained(classifier_loading(labels=5), tmp_path)


@pytest.mark.parametrize("compiled", ["saved", "loaded"])
def test_a_compiled_base_is_the_same_base(compiled, tmp_path):
    bases = {name: oracle.llama() for name in ("saved", "loaded")}
    bases[compiled] = torch.compile(bases[compiled], backend="eager")
    bases[compiled].model.layers[0] = torch.compile(bases[compiled].model.layers[0], backend="eager")
    peftfast.get_peft_model(bases["saved"], LoraConfig(**OPTIONS)).save_pretrained(tmp_path)
    peftfast.PeftModel.from_pretrained(bases["loaded"], tmp_path, strict=True)


def with_wrapped_layers(wrap):
    model = oracle.llama()
    for place, layer in enumerate(model.model.layers):
        model.model.layers[place] = wrap(layer)
    return model


@torch.compiler.set_stance("force_eager")
@pytest.mark.parametrize(
    "wrap", [partial(torch.compile, backend="eager"), checkpoint_wrapper], ids=["compiled", "kept"]
)
def test_modules_are_called_what_they_are_without_wrappers_around_layers(wrap, tmp_path):
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qk"]
    options = {
        "target_modules": "all-linear", "exclude_modules": ["layers.1.self_attn.o_proj"], "init_lora_weights": False,
        "rank_pattern": {names[0]: 3}, "alpha_pattern": {names[1]: 64}, "modules_to_save": ["layers.1.mlp"],
    }  # fmt: skip
    saved = {}
    for kind, make in (("plain", oracle.llama), ("wrapped", lambda: with_wrapped_layers(wrap))):
        model = oracle.randomised(peftfast.get_peft_model(make(), LoraConfig(**options)))
        model.save_pretrained(tmp_path / kind)
        saved[kind] = logits(model)
        for load in (oracle.llama, lambda: with_wrapped_layers(wrap)):
            again = peftfast.PeftModel.from_pretrained(load(), tmp_path / kind, strict=True)
            torch.testing.assert_close(logits(again), saved[kind])
    oracle.same_files(tmp_path / "plain", tmp_path / "wrapped")


def test_targets_may_be_given_as_a_compiled_model_lists_them(tmp_path):
    model = with_wrapped_layers(partial(torch.compile, backend="eager"))
    names = [name for name, _ in model.named_modules() if name.endswith("q_proj")]
    peftfast.get_peft_model(model, LoraConfig(target_modules=names)).save_pretrained(tmp_path)
    assert "model.layers.0.self_attn.q_proj" in oracle.saved_config(tmp_path)["target_modules"]


def test_a_linear_layer_that_is_compiled_by_itself_is_no_target():
    """What was compiled is called, whatever stands in its place in the wrapper."""
    model = oracle.llama()
    attention = model.model.layers[0].self_attn
    attention.q_proj = torch.compile(attention.q_proj, backend="eager")
    for targets in ("all-linear", ["q_proj"]):
        with pytest.raises(ValueError, match=r"(?s)layers.0.self_attn.q_proj: .* stands around another module: add"):
            peftfast.get_peft_model(model, LoraConfig(target_modules=targets))


def test_what_is_trained_and_not_saved_is_named(tmp_path):
    config = {**OPTIONS, "modules_to_save": ["lm_head"], "bias": "all"}
    model = oracle.quietly(peftfast.get_peft_model, oracle.llama(bias=True), LoraConfig(**config))
    with warnings.catch_warnings():
        warnings.simplefilter("error", peftfast.PeftWarning)
        model.save_pretrained(tmp_path)
    model.base_model.model.model.norm.weight.requires_grad_(True)  # as LongLoRA's script does
    model.base_model.model.value_head = torch.nn.Linear(8, 1)
    with pytest.warns(peftfast.PeftWarning, match=r"not saved.*: 'model.norm.weight', 'value_head.weight'\. "):
        model.save_pretrained(tmp_path)
