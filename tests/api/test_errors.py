"""Bad input: a clear error that names the thing, and a model that is as it was before."""

import json
import os
import re
import shutil
import warnings
from contextlib import nullcontext

import numpy
import oracle
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftfast
from peftfast import AdapterLoadError, AdapterMismatchWarning, LoraConfig, NoMatchingPeftModuleError
from peftfast.files.fit import holds
from peftfast.files.metadata import check_sizes
from peftfast.optimizers import create_loraplus_optimizer

QV = ["q_proj", "v_proj"]


def picture(model):
    """Everything about a model that a refused call could have changed."""
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [(n, type(m), m.training) for n, m in model.named_modules(remove_duplicate=False)],
        {n: p.requires_grad for n, p in model.named_parameters()},
        {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()},
        sorted(getattr(model, "peft_config", None) or {}),
    )


def same_picture(model, before):
    now = picture(model)
    assert now[0].keys() == before[0].keys() and all(torch.equal(now[0][k], v) for k, v in before[0].items())
    assert now[1:] == before[1:]


# ---- targets ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"target_modules": ["q_prj"]}, NoMatchingPeftModuleError, r"q_prj.*not found.*Did you mean .*q_proj"),
        (
            {"target_modules": r".*\.nothing"},
            NoMatchingPeftModuleError,
            r"nothing not found.* try again\. The linear layers",
        ),
        ({"target_modules": "q_proj"}, NoMatchingPeftModuleError, r"whole names.* are a list: \['q_proj'\]"),
        ({"target_modules": "q_proj, v_proj"}, NoMatchingPeftModuleError, r"are a list: \['q_proj', 'v_proj'\]"),
        ({"target_modules": r"layers\.1"}, NoMatchingPeftModuleError, r"only a part of 'model\.layers\.1'"),
        ({"target_modules": "all_linear"}, NoMatchingPeftModuleError, "Did you mean 'all-linear'"),
        ({"target_modules": ["query"]}, NoMatchingPeftModuleError, "linear layers .* called 'down_proj', .*'q_proj'"),
        (
            {"target_modules": [r".*layers\.0\..*_proj"]},
            NoMatchingPeftModuleError,
            r"a regular expression .* by itself: target_modules='\.\*layers",
        ),
        ({"target_modules": ["*self_attn.q_proj"]}, NoMatchingPeftModuleError, r"target_modules='\.\*self_attn"),
        ({"target_modules": ["all-linear"]}, NoMatchingPeftModuleError, "'all-linear' is given as a string, not in"),
        ({"target_modules": []}, NoMatchingPeftModuleError, "arget"),
        ({"target_modules": QV, "exclude_modules": QV}, NoMatchingPeftModuleError, "excluded"),
        ({"target_modules": QV, "layers_to_transform": [9]}, NoMatchingPeftModuleError, r"layers_to_transform.*9\].$"),
        ({"target_modules": ["self_attn"]}, ValueError, "self_attn.*not supported.*nn.Linear.*named instead: .q_proj"),
        ({"target_modules": ["q_proj", "norm"]}, ValueError, "norm.*not supported.*transformers.pytorch_utils.Conv1D"),
        ({"target_modules": "(q_proj"}, ValueError, "target_modules"),
        ({"target_modules": QV, "rank_pattern": {"(": 3}}, ValueError, "rank_pattern"),
        ({"target_modules": QV, "trainable_token_indices": [1000]}, ValueError, "1000.*63; model.resize_token"),
        (
            {"target_modules": QV, "trainable_token_indices": {"embed_token": [1]}},
            ValueError,
            "Did you mean.*embed_tokens",
        ),
        (
            {"target_modules": QV, "modules_to_save": ["layers"]},
            NoMatchingPeftModuleError,
            r"No modules were targeted for adaptation.*combination of .*is inside \['layers'\]",
        ),
        (
            {"target_modules": ["q_proj", "w_proj"], "exclude_modules": ["q_proj"]},
            NoMatchingPeftModuleError,
            r"No modules were targeted for adaptation.*\['w_proj'\] of .* matched no module.*excludes .*q_proj",
        ),
        (
            {"target_modules": ["embed_tokens"], "trainable_token_indices": [1]},
            TypeError,
            "trainable_token_indices cannot be applied to modules of type.*Embedding.*embed_tokens",
        ),
        (
            {"target_modules": QV, "trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
            ValueError,
            "already marked to be trained fully.*embed_tokens",
        ),
        (  # found before an initialisation that changes the base
            {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [1, 1]}, "init_lora_weights": "pissa"},
            ValueError,
            r"trainable_token_indices.*\[1, 1\]",
        ),
        ({"target_modules": ["lm_head"], "modules_to_save": ["layers"]}, TypeError, "ModuleList"),
        ({"target_modules": ["q_proj"], "r": 3, "init_lora_weights": "orthogonal"}, ValueError, "even.*3"),
        ({"target_modules": ["embed_tokens"], "lora_bias": True}, ValueError, "lora_bias.*Embedding"),
    ],
)
def test_config_that_does_not_fit(options, error, message):
    model = oracle.llama()
    before = picture(model)
    with pytest.raises(error, match=r"(?s)" + message):
        config = LoraConfig(**options)
        fields = dict(config.__dict__)
        try:
            oracle.quietly(peftfast.get_peft_model, model, config)
        finally:
            assert config.__dict__ == fields
    same_picture(model, before)
    peftfast.get_peft_model(model, LoraConfig(target_modules=QV))  # and it can still be adapted


@pytest.mark.parametrize(
    "add",
    [
        lambda model: peftfast.inject_adapter_in_model(LoraConfig(target_modules=["nothing"]), model),
        lambda model: peftfast.AdapterPool(model, target_modules=["nothing"]),
        lambda model: peftfast.functional.set_adapter(model, "nothing"),
    ],
)
def test_a_base_that_was_refused_an_adapter_does_not_say_that_it_may_have_some(add):
    model = oracle.llama()
    with pytest.raises(ValueError, match="nothing"):
        add(model)
    assert not hasattr(model, "peft_config")  # by which transformers, TRL and others tell that adapters are here
    peftfast.inject_adapter_in_model(LoraConfig(target_modules=QV), model)
    assert list(model.peft_config) == ["default"]


def test_no_target_matched_in_a_second_adapter():
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(target_modules=QV))
    before = picture(model)
    with pytest.raises(NoMatchingPeftModuleError, match="nothing"):
        model.add_adapter("other", LoraConfig(target_modules=["nothing"]))
    same_picture(model, before)
    assert list(model.peft_config) == ["default"] == list(model.base_model.model.peft_config)


@pytest.mark.parametrize(
    "options, offender",
    [
        ({"target_modules": ["q_proj", "w_proj"]}, "w_proj"),
        ({"target_modules": QV, "modules_to_save": ["lm_hed"]}, "lm_hed.*Did you mean 'lm_head'"),
        (
            {"target_modules": [*QV, "embed_tokens"], "layers_to_transform": [1]},
            r"'embed_tokens' matched no module in layers_to_transform=\[1\].$",
        ),
        ({"target_modules": QV, "exclude_modules": ["k_prj"]}, "k_prj"),
    ],
)
def test_what_peft_lets_pass_in_silence(options, offender):
    with pytest.warns(AdapterMismatchWarning, match=offender) as caught:
        peftfast.get_peft_model(oracle.llama(), LoraConfig(**options))
    assert len([w for w in caught if w.category is AdapterMismatchWarning]) == 1
    model = oracle.llama()
    before = picture(model)
    with pytest.raises(ValueError, match=offender):
        peftfast.get_peft_model(model, LoraConfig(**options), strict=True)
    same_picture(model, before)


# ---- adapter names ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["a.b", "", "a/b", "keys", "items", "training", 3, None])
def test_adapter_names_that_cannot_be(name):
    model = oracle.llama()
    before = picture(model)
    with pytest.raises((ValueError, TypeError), match="adapter name"):
        peftfast.get_peft_model(model, LoraConfig(target_modules=QV), name)
    same_picture(model, before)


def test_unknown_and_duplicate_names():
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(target_modules=QV))
    model.add_adapter("other", LoraConfig(target_modules=["k_proj"]))
    before = picture(model)
    for call, message in (
        (lambda: model.add_adapter("other", LoraConfig(target_modules=QV)), "'other' already exists"),
        (lambda: model.set_adapter("othr"), "othr not found.*Did you mean 'other'.*'default', 'other'"),
        (lambda: model.base_model.set_adapter(["default", "x"]), "x not found"),
        (lambda: model.delete_adapter("x"), "x does not exist.*'default', 'other'"),
        (lambda: model.set_requires_grad("x"), "x not found"),
        (lambda: model.save_pretrained("nowhere", selected_adapters=["x"]), "invalid `selected_adapters`.*other"),
        (lambda: peftfast.get_peft_model_state_dict(model, adapter_name="othr"), "Did you mean 'other'"),
        (lambda: peftfast.set_peft_model_state_dict(model, {}, adapter_name="x"), "x not found"),
        (lambda: model.merge_and_unload(adapter_names=["x"]), "x not found"),
        (lambda: model.merge_adapter(["default", "othr"]), "othr not found, so nothing was merged.*'other'.*default"),
        (lambda: model.merge_adapter(["defualt"], keep=False), "defualt not found.*Did you mean 'default'"),
        (lambda: peftfast.get_eva_state_dict(model, [{}], adapter_name="othr"), "othr not found.*'other'"),
        (lambda: peftfast.initialize_lora_eva_weights(model, [{}], adapter_name="othr"), "othr not found.*'other'"),
        (lambda: peftfast.convert_to_lora(model, 2, adapter_name="othr"), "othr not found.*'other'"),
        (lambda: peftfast.reduce_intruder_dimension(model, "othr", "new"), "othr not found.*'other'"),
        (lambda: model.add_weighted_adapter(["othr"], [1.0], "new"), "othr does not exist.*'other'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        same_picture(model, before)
    with pytest.raises(KeyError, match="othr"):  # as in PEFT, which looks for its config
        peftfast.get_peft_model_state_dict(model, adapter_name="othr")
    for call in (
        lambda: model.merge_adapter("default"),
        lambda: model.set_adapter(["default"]),
        lambda: model.add_adapter(LoraConfig(), "third"),
        lambda: model.add_adapter("third", {"r": 8}),
        lambda: peftfast.set_peft_model_state_dict(model, [1]),
        lambda: peftfast.set_peft_model_state_dict(model, {"a": 1}),
        lambda: model.set_adapter("default", "other"),
        lambda: model.load_adapter("folder", "third", "cpu"),
        lambda: model.merge_and_unload("other"),
        lambda: model.save_pretrained("nowhere", "other"),
        lambda: model.set_requires_grad("other", "yes"),
    ):
        with pytest.raises(TypeError):
            call()
        same_picture(model, before)
    for call in (
        lambda: model.delete_adapter(None),
        lambda: model.set_requires_grad(None),
        lambda: model.merge_adapter(3),
        lambda: model.base_model.adapter_numbers(None),
        lambda: peftfast.get_peft_model_state_dict(model, adapter_name=["other"]),
        lambda: peftfast.set_peft_model_state_dict(model, {}, adapter_name=["other"]),
        lambda: model.delete_adapter(["other"]),
        lambda: model.base_model.set_adapter([3]),
        lambda: model.load_adapter("folder", ["other"]),
        lambda: model.load_adapter("folder", None),
        lambda: model.add_weighted_adapter(["default", "other"], [1.0, 1.0], ["other"]),
        lambda: model.subtract_adapter("default", ["other"], "third"),
        lambda: peftfast.convert_to_lora(model, 2, adapter_name=["other"]),
        lambda: peftfast.reduce_intruder_dimension(model, ["other"], "third"),
    ):
        with pytest.raises(TypeError, match=r"dapter.*(string|name).*got (None|3|\['other'\])"):
            call()
        same_picture(model, before)
    for weights in (["1", "1"], "11", [1.0, None], [1.0, float("nan")], 2.0):
        with pytest.raises(ValueError, match="one weight, a finite number; got " + re.escape(repr(weights))):
            model.add_weighted_adapter(["default", "other"], weights, "third")
        same_picture(model, before)
    with pytest.raises(TypeError, match="a list with one adapter name for each sample; got 'other'"):
        model.base_model.adapter_numbers("other")


def test_errors_that_name_what_is_wrong():
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(target_modules=QV))
    for call, message in (
        (
            lambda: model.add_adapter(LoraConfig(), "third"),
            r"\(adapter_name, peft_config\).*in this order; got.*'third'",
        ),
        (lambda: peftfast.set_peft_model_state_dict(model, [1]), "dict of tensors by name, got list"),
        (lambda: peftfast.set_peft_model_state_dict(model, {"a": 1}), "dict of tensors by name; 'a' is int"),
        (lambda: peftfast.capture_decoding("x", 1, 8), "model must be a torch.nn.Module, got 'x'"),
        (
            lambda: peftfast.PeftModel.from_pretrained("a/base", "an/adapter"),
            "model must be a torch.nn.Module, got 'a/base' of type str; AutoPeftModel loads",
        ),
        (lambda: peftfast.patch("a/base", LoraConfig()), "model must be a torch.nn.Module, got 'a/base'"),
        (
            lambda: peftfast.patch(oracle.llama(), {"r": 8}, quantize="nf4"),
            r"config must be a PeftConfig .* got \{'r': 8\}",
        ),
        (lambda: peftfast.fuse_blocks("a/base"), "model must be a torch.nn.Module, got 'a/base'"),
        (lambda: peftfast.prepare_model_for_kbit_training("a/base"), "model must be a torch.nn.Module, got 'a/base'"),
        (lambda: peftfast.quantize_model("a/base"), "model must be a torch.nn.Module, got 'a/base'"),
        (lambda: peftfast.AdapterPool("a/base"), "model must be a torch.nn.Module, got 'a/base'"),
        (lambda: peftfast.inject_adapter_in_model(LoraConfig(), "a/base"), "model must be a torch.nn.Module, got 'a/"),
        (lambda: peftfast.PeftModel.from_folder("folder", model), "model must be a torch.nn.Module, got 'folder'"),
        (lambda: peftfast.create_arrow_model("a/base", ["x"], peftfast.ArrowConfig()), "torch.nn.Module, got 'a/base'"),
        (lambda: peftfast.discover_ranks("a/base", LoraConfig(), []), "model must be a torch.nn.Module, got 'a/base'"),
        (lambda: peftfast.find_kappa_target_modules("a/base"), "model must be a torch.nn.Module, got 'a/base'"),
        (lambda: peftfast.get_eva_state_dict("a/base", [], LoraConfig()), "must be a torch.nn.Module, got 'a/base'"),
        (lambda: peftfast.get_model_status("a/base"), "model must be a torch.nn.Module, got 'a/base'"),
        (lambda: peftfast.convert_to_lora("a/base", 2), "model must be a torch.nn.Module, got 'a/base'"),
        (lambda: peftfast.get_base_model_state_dict("a/base"), "model must be a torch.nn.Module, got 'a/base'"),
        (lambda: peftfast.cast_mixed_precision_params("a/base", "bfloat16"), "torch.nn.Module, got 'a/base'"),
        (lambda: peftfast.preprocess_corda("a/base", LoraConfig()), "must be a torch.nn.Module, got 'a/base'"),
        (lambda: peftfast.preprocess_loraga("a/base", LoraConfig(), print), "must be a torch.nn.Module, got 'a/base'"),
        (
            lambda: peftfast.discover_ranks(oracle.llama(), {"r": 8}, []),
            r"config must be a PeftConfig .* got \{'r': 8\}",
        ),
        (lambda: peftfast.preprocess_corda(oracle.llama(), {"r": 8}), r"lora_config must .* got \{'r': 8\}"),
        (lambda: peftfast.preprocess_loraga(oracle.llama(), {"r": 8}, print), r"lora_config must .* got \{'r': 8\}"),
        (lambda: peftfast.get_eva_state_dict(oracle.llama(), [], {"r": 8}), r"peft_config must .* got \{'r': 8\}"),
        (lambda: peftfast.check_hotswap_configs_compatible(LoraConfig(), {"r": 8}), r"config1 must .* got \{'r': 8\}"),
        (lambda: peftfast.get_peft_model(LoraConfig(), model), r"got LoraConfig\(.{,30} of type LoraConfig$"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


@pytest.mark.filterwarnings("ignore:.*(unused|not used)")
def test_configs_and_models_of_the_peft_package_are_told_apart_from_ours():
    model, theirs = oracle.llama(), peft.LoraConfig(target_modules=["q_proj"], r=3)
    message = r"a LoraConfig of the peft package; peftfast.get_peft_config\((peft_)?config.to_dict\(\)\)"
    for call in (
        lambda: peftfast.get_peft_model(model, theirs), lambda: peftfast.patch(model, theirs),
        lambda: peftfast.PeftModel(model, theirs), lambda: peftfast.inject_adapter_in_model(theirs, model),
        lambda: peftfast.plan_adapter(model, theirs),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=message):
            call()
    for config in (
        theirs, peft.IA3Config(), peft.AdaLoraConfig(total_step=9), peft.PromptTuningConfig(num_virtual_tokens=2),
        peft.LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=3.0)),
    ):  # fmt: skip
        ours = peftfast.get_peft_config(config.to_dict())
        assert type(ours).__name__ == type(config).__name__ and ours.to_dict() == config.to_dict()
    wrapped = peft.get_peft_model(model, theirs)
    with pytest.raises(ValueError, match=r"(?s)q_proj.*a layer of the peft package.*patch\(model\) without a config"):
        peftfast.patch(wrapped, LoraConfig(target_modules=["q_proj"]))


def test_one_name_is_a_selection_of_one(tmp_path):
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(target_modules=QV))
    model.add_adapter("other", LoraConfig(target_modules=QV))
    model.save_pretrained(tmp_path, selected_adapters="other")
    assert (tmp_path / "other" / WEIGHTS).exists() and not (tmp_path / WEIGHTS).exists()
    with pytest.raises(ValueError, match=r"invalid `selected_adapters`.*got \['othr'\]"):
        model.save_pretrained(tmp_path, selected_adapters="othr")


@pytest.mark.parametrize("ratio", [0, -1, float("nan"), float("inf"), "16"])
def test_ratios_that_cannot_be(ratio):
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(target_modules=QV))
    options = {"optimizer_cls": torch.optim.SGD, "lr": 1e-3}
    with pytest.raises(ValueError, match=f"loraplus_lr_ratio must be a positive number.*{ratio}"):
        create_loraplus_optimizer(model, **options, loraplus_lr_ratio=ratio)
    optimizer = create_loraplus_optimizer(model, **options, loraplus_lr_ratio=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-6, 5e-4, 5e-4]


@pytest.mark.parametrize(
    "again",
    [
        lambda model, folder: peftfast.get_peft_model(model, LoraConfig(target_modules=QV, task_type="CAUSAL_LM")),
        lambda model, folder: peftfast.patch(model, LoraConfig(target_modules=["k_proj"]), adapter_name="second"),
        lambda model, folder: peftfast.patch(model, LoraConfig(target_modules=["k_proj"]), quantize="nf4"),
        lambda model, folder: peftfast.PeftModel(model, LoraConfig(target_modules=QV)),
        lambda model, folder: peftfast.PeftModel.from_pretrained(model, folder, adapter_name="second"),
        lambda model, folder: peftfast.get_peft_model(
            model, peftfast.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        ),
    ],
)
@pytest.mark.parametrize("inside", [lambda m: m, lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_a_peft_model_is_not_wrapped_again(again, inside, saved):
    """PEFT warns, writes over the trained adapter of the same name and makes a model whose files fit no base."""
    model = inside(
        peftfast.get_peft_model(
            oracle.llama(), LoraConfig(target_modules=QV, init_lora_weights=False, task_type="CAUSAL_LM")
        )
    )
    before = picture(model)
    with pytest.raises(
        ValueError,
        match=r"PeftModelForCausalLM already.*\['default'\].*add_adapter.*load_adapter.*unload\(\).*get_base",
    ):
        again(model, saved)
    same_picture(model, before)


def test_a_refused_config_is_as_it_was():
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(target_modules=QV))
    config = LoraConfig(target_modules=QV, base_model_name_or_path="somewhere")
    fields = dict(config.__dict__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="already"):
            peftfast.get_peft_model(model, config, revision="x")
    assert config.__dict__ == fields


def test_a_torch_without_what_is_read_there_is_the_reason_that_is_given(tmp_path, monkeypatch):
    """Not that the name is none of this package's."""
    (tmp_path / "newer.py").write_text("import torch\ntorch.gone\n")
    monkeypatch.setattr(peftfast, "__path__", [str(tmp_path)])
    monkeypatch.setitem(peftfast._WHERE, "Newer", "newer")
    with pytest.raises(ImportError, match="installed.*torch.*'gone'"):
        from peftfast import Newer  # noqa: F401


def test_not_a_model_or_not_a_config():
    with pytest.raises(TypeError, match="torch.nn.Module"):
        peftfast.get_peft_model("model", LoraConfig())
    with pytest.raises(TypeError, match="PeftConfig.*dict"):
        peftfast.get_peft_model(oracle.llama(), {"r": 8})
    with pytest.raises(TypeError, match="LoraConfig"):
        peftfast.patch(oracle.llama())


def test_second_adapter_with_bias():
    model = peftfast.get_peft_model(oracle.llama(bias=True), LoraConfig(target_modules=QV, bias="lora_only"))
    before = picture(model)
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("other", LoraConfig(target_modules=QV, bias="all"))
    same_picture(model, before)


# ---- files -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(target_modules=QV, init_lora_weights=False)
    peftfast.get_peft_model(oracle.llama(), config).save_pretrained(folder)
    return folder


WEIGHTS = "adapter_model.safetensors"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def rewrite(change):
    def apply(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


def truncate(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def edit_config(**changes):
    def apply(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def put(key, value):
    return lambda tensors: tensors.__setitem__(key, value(tensors))


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4096\n"

BROKEN = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ValueError, "Can't find weights"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), ValueError, "Can't find 'adapter_config.json'"),
    "truncated": (truncate, AdapterLoadError, "damaged"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), AdapterLoadError, "damaged"),
    "lfs": (lambda f: (f / WEIGHTS).write_text(POINTER), AdapterLoadError, "pointer of Git LFS; `git lfs pull`"),
    "lfs pickle": (
        lambda f: ((f / WEIGHTS).unlink(), (f / "adapter_model.bin").write_text(POINTER)),
        AdapterLoadError,
        "pointer of Git LFS",
    ),
    "not json": (lambda f: (f / "adapter_config.json").write_text("{"), ValueError, "not a JSON"),
    "json list": (lambda f: (f / "adapter_config.json").write_text("[]"), ValueError, "JSON object"),
    "unknown type": (edit_config(peft_type="LORRA"), ValueError, "LORRA.*Did you mean 'LORA'"),
    "other method": (edit_config(peft_type="LN_TUNING"), ValueError, "'LN_TUNING'. It is a method of PEFT's"),
    "wrong field": (edit_config(r="eight"), TypeError, r"LoraConfig.r must be .*'eight'"),
    "memory": (edit_config(r=10**6), AdapterLoadError, "config says 'r=1000000', but no .* above 32"),
    "long": (
        lambda f: os.truncate(f / "adapter_config.json", (1 << 26) + 1), ValueError, "a config has at most 67,108,864",
    ),
    "shape": (rewrite(put(KEY, lambda t: torch.zeros(8, 31))), AdapterLoadError, "size mismatch.*q_proj.*31.*32"),
    "other rank": (edit_config(r=4), AdapterLoadError, "size mismatch"),
    "nan": (rewrite(put(KEY, lambda t: t[KEY] * float("nan"))), AdapterLoadError, "NaN or infinite.*q_proj"),
    "inf": (rewrite(put(KEY, lambda t: t[KEY] + float("inf"))), AdapterLoadError, "NaN or infinite.*q_proj"),
    "deeper base": (
        rewrite(put(KEY.replace("layers.0", "layers.7"), lambda t: torch.ones(8, 32))), AdapterLoadError, "layers.7",
    ),
    "pickle": (
        lambda f: ((f / WEIGHTS).unlink(), torch.save({"a": print}, f / "adapter_model.bin")),
        AdapterLoadError,
        "tensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_files_that_cannot_be_right(case, low_cpu_mem_usage, saved, tmp_path):
    spoil, error, message = BROKEN[case]
    shutil.copytree(saved, tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    model = oracle.llama()
    before = picture(model)
    with pytest.raises(error, match=r"(?s)" + message):
        peftfast.PeftModel.from_pretrained(model, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert picture(model)[1] == before[1]
    assert not any("lora" in n for n, _ in model.named_parameters())
    assert not getattr(model, "peft_config", None)
    # beside another adapter, which stays as it is
    wrapped = peftfast.get_peft_model(oracle.llama(), LoraConfig(target_modules=QV))
    before = picture(wrapped)
    with pytest.raises(error, match=r"(?s)" + message):
        wrapped.load_adapter(tmp_path / "adapter", "second", low_cpu_mem_usage=low_cpu_mem_usage)
    same_picture(wrapped, before)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "2", None, [1.0]])
def test_scales_that_cannot_be(scale):
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(target_modules=QV))
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    calls = [lambda: layer.set_scale("default", scale), lambda: layer.scale_layer(scale)]
    for call in calls if scale is None else [*calls, lambda: layer.unscale_layer(scale)]:
        with pytest.raises(
            (TypeError, ValueError), match="scale must be a finite number, got " + re.escape(repr(scale))
        ):
            call()
    assert layer.scaling == {"default": 1.0}
    layer.set_scale("default", numpy.float32(2))
    layer.scale_layer(torch.tensor(3.0))
    assert float(layer.scaling["default"]) == 6.0


@pytest.mark.parametrize("switch, value", [("strict", "off"), ("autocast_adapter_dtype", torch.bfloat16)])
def test_what_is_no_switch_does_not_count_as_true(switch, value, saved):
    """`strict="off"`, which loading takes, refused everything; a dtype for the factors gave them fp32."""
    base, model = oracle.llama(), peftfast.get_peft_model(oracle.llama(), LoraConfig(target_modules=QV))
    config, before, of_base = LoraConfig(target_modules=QV), picture(model), picture(base)
    for call in (
        lambda options: peftfast.get_peft_model(base, config, **options),
        lambda options: peftfast.patch(base, config, **options),
        lambda options: peftfast.plan_adapter(base, config, **options),
        lambda options: model.add_adapter("other", config, **options),
        lambda options: model.load_adapter(saved, "other", autocast_adapter_dtype=torch.float32),
        lambda options: LoraConfig.from_pretrained(saved, strict="off"),
    ):
        with pytest.raises(
            TypeError, match=r"(strict|autocast_adapter_dtype) must be True or False, got ('off'|torch)"
        ):
            call({switch: value})
    same_picture(base, of_base)
    same_picture(model, before)


@pytest.mark.parametrize("place", [None, 0, True, ["folder"], b"folder"])
def test_what_is_no_path_is_named(place, tmp_path, monkeypatch):
    """0 and True are open files to Python: PEFT reads a config from the standard input."""
    model, base = peftfast.get_peft_model(oracle.llama(), LoraConfig(target_modules=QV)), oracle.llama()
    before, of_base = picture(model), picture(base)
    for call in (
        lambda: model.load_adapter(place, "second"), lambda: model.save_pretrained(place),
        lambda: peftfast.PeftModel.from_pretrained(base, place), lambda: peftfast.PeftModel.from_folder(base, place),
        lambda: peftfast.AutoPeftModelForCausalLM.from_pretrained(place), lambda: peftfast.load_peft_weights(place),
        lambda: peftfast.adapter_contents(place), lambda: peftfast.hotswap_adapter(model, place, "default"),
        lambda: peftfast.save_as_lora(place, model, 2), lambda: LoraConfig().save_pretrained(place),
        lambda: LoraConfig.from_pretrained(place), lambda: LoraConfig.from_json_file(place),
        lambda: peftfast.create_arrow_model(base, [place], peftfast.ArrowConfig()),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="is named by a string or a path, got " + re.escape(repr(place))):
            call()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="folder to save to has no name"):  # PEFT: FileNotFoundError
        model.save_pretrained("")
    for mapping in ("self_attn", [("a", "b")], 3):
        with pytest.raises(TypeError, match="key_mapping must be .* a Mapping, got " + re.escape(repr(mapping))):
            model.save_pretrained("here")
            model.load_adapter("here", "second", key_mapping=mapping)
    same_picture(model, before)
    same_picture(base, of_base)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("config, field, at_least", [
    (LoraConfig, "r", 16384), (peftfast.AdaLoraConfig, "init_r", 16384), (LoraConfig, "r", 20000),
    (LoraConfig, "rank_pattern", 16384), (peftfast.PromptTuningConfig, "num_virtual_tokens", 16384),
])  # fmt: skip
def test_sizes_that_a_files_tensors_cannot_have(config, field, at_least):
    """Before anything is allocated. What AdaLoRA does not use counts for nothing."""
    tensors = {"factor": torch.empty(4, at_least if at_least > 16384 else 8), "other": torch.empty(3)}
    fields = {"r": 10**6, "total_step": 9} if config is peftfast.AdaLoraConfig else {}
    for size, fits in ((at_least, True), (at_least + 1, False)):
        given = config(**{**fields, field: {"a.b": size} if field == "rank_pattern" else size})
        refused = pytest.raises(AdapterLoadError, match=f"{field}.*={size}.?, but no tensor")
        with nullcontext() if fits else refused:
            check_sizes(given, tensors)


def test_pickles_and_folders_that_strict_loading_refuses(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "adapter")
    torch.save(load_file(tmp_path / "adapter" / WEIGHTS), tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / WEIGHTS).unlink()
    model = oracle.llama()
    before = picture(model)
    with pytest.raises(AdapterLoadError, match="is a pickle, which strict=True refuses"):
        peftfast.PeftModel.from_pretrained(model, tmp_path / "adapter", strict=True)
    for subfolder in ("../adapter", str(tmp_path / "adapter")):
        with pytest.raises(ValueError, match="leaves the adapter's folder"):
            peftfast.PeftModel.from_pretrained(model, tmp_path / "adapter", subfolder=subfolder)
    assert picture(model)[1] == before[1]
    peftfast.PeftModel.from_pretrained(model, tmp_path / "adapter")


def test_what_an_engine_has_left_empty_is_not_saved(tmp_path):
    """A rank of zero is no such thing."""
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(target_modules=QV, modules_to_save=["lm_head"]))
    saved = model.state_dict()
    factor, head = (next(k for k in saved if part in k) for part in ("lora_A.default", "lm_head.modules_to_save"))
    with pytest.raises(AdapterLoadError, match="These tensors are empty: .*lm_head.*pass the gathered tensors"):
        model.save_pretrained(tmp_path / "none", state_dict={**saved, head: torch.empty(0)})
    assert not [*tmp_path.rglob("*.safetensors")]
    model.save_pretrained(tmp_path, state_dict={**saved, factor: torch.empty(0, 32)})


def test_a_given_config_is_as_it_was_where_its_adapter_is_refused(saved):
    config = LoraConfig(r=4, target_modules="all-linear")
    fields = dict(config.__dict__)
    with pytest.raises(AdapterLoadError, match="size mismatch"):
        peftfast.PeftModel.from_pretrained(oracle.llama(), saved, config=config)
    assert config.__dict__ == fields


@pytest.mark.parametrize("place", ["file", "nowhere/at/all", ""])
def test_a_place_without_a_config_is_named_as_in_peft(place, tmp_path):
    (tmp_path / "file").write_text("")
    for read in (peftfast.PeftConfig.from_pretrained, peft.PeftConfig.from_pretrained):
        with pytest.raises(ValueError, match=f"Can't find 'adapter_config.json' at '{tmp_path / place}'"):
            read(str(tmp_path / place))


def test_a_hub_that_cannot_be_asked_is_the_reason_that_is_given(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json' at 'me/adapter': .*cache"):
        peftfast.PeftModel.from_pretrained(oracle.llama(), "me/adapter")


@pytest.mark.parametrize(
    "change, offender",
    [
        (lambda t: t.pop(KEY), "missing.*layers.0.self_attn.q_proj.lora_A"),
        (put("rubbish", lambda t: torch.ones(1)), "unexpected.*rubbish"),
    ],
)
def test_keys_that_peft_lets_pass(change, offender, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "adapter")
    rewrite(change)(tmp_path / "adapter")
    for options in ({}, {"low_cpu_mem_usage": True}):
        with pytest.warns(AdapterMismatchWarning, match=offender) as caught:
            model = peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path / "adapter", **options)
        assert len([w for w in caught if w.category is AdapterMismatchWarning]) == 1
        assert not any(p.is_meta for p in model.parameters())
        assert all(torch.isfinite(p).all() for p in model.parameters())
    with pytest.raises(AdapterLoadError, match=offender):
        peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path / "adapter", strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdapterMismatchWarning)
        peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path / "adapter", strict="off")


def test_ignore_mismatched_sizes(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "adapter")
    rewrite(put(KEY, lambda t: torch.zeros(8, 31)))(tmp_path / "adapter")
    with pytest.warns(AdapterMismatchWarning, match="q_proj.lora_A"):
        model = peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path / "adapter", ignore_mismatched_sizes=True)
    assert not model.get_parameter(KEY.replace("lora_A", "lora_A.default")).isnan().any()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}], ids=str)
def test_a_vocabulary_of_another_size_says_how_to_resize(options, tmp_path):
    base = oracle.llama()
    base.resize_token_embeddings(67)
    peftfast.get_peft_model(base, LoraConfig(**{"target_modules": QV, **options})).save_pretrained(tmp_path)
    with pytest.raises(AdapterLoadError, match=r"(?s)size mismatch.*resize .*: model.resize_token_embeddings\(67\)"):
        peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path)
    base = oracle.llama()
    base.resize_token_embeddings(67)
    peftfast.PeftModel.from_pretrained(base, tmp_path)


def test_unknown_keys_in_the_config_are_let_pass(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "adapter")
    edit_config(of_tomorrow=1, of_later=None)(tmp_path / "adapter")
    ignored = r"\['of_later', 'of_tomorrow'\] .* these are ignored.*"
    with pytest.warns(UserWarning, match=ignored + "With of_tomorrow=1 the adapter may compute something else"):
        peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path / "adapter")
    edit_config(of_tomorrow=False)(tmp_path / "adapter")
    with pytest.warns(UserWarning, match=ignored + "of the library\\.$"):
        peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path / "adapter")


@pytest.mark.parametrize("content", ["base.txt", "folder"])
def test_saving_where_a_file_is(content, tmp_path):
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(target_modules=QV))
    (tmp_path / content).write_text("mine")
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        model.save_pretrained(tmp_path / content)
    assert (tmp_path / content).read_text() == "mine"


def test_set_state_dict_refuses_before_it_changes(saved):
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(target_modules=QV))
    tensors = load_file(saved / WEIGHTS)
    before = picture(model)
    for bad in (torch.zeros(3, 3), tensors[KEY] * float("nan")):
        with pytest.raises(AdapterLoadError, match="q_proj.lora_A"):
            peftfast.set_peft_model_state_dict(model, {**tensors, KEY: bad})
        same_picture(model, before)


def test_values_are_looked_at_where_they_are(saved):
    """Once each: what a large adapter has is written to no tensor of that size on the way into the model, and its
    extremes, which are found more slowly than sums, are looked for only where a sum does not say enough."""
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(target_modules=QV))
    tensors = load_file(saved / WEIGHTS)
    with oracle.Operations() as made:
        peftfast.set_peft_model_state_dict(model, tensors)
    assert made.elements <= 1, made.shapes
    assert "sum" in made.names and "aminmax" not in made.names


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_values_are_finite_where_each_of_them_is(stored):
    largest = torch.finfo(torch.float16).max
    for number in (torch.nan, torch.inf, -torch.inf, -1e5, 2e5, largest, largest + 15, largest + 17, -largest, 0.0):
        for place in (0, 31, 69):
            values = torch.linspace(-1, 1, 70).to(torch.float64)
            values[place] = number
            values = values.to(stored)
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                assert holds(dtype, values) is bool(values.float().to(dtype).isfinite().all()), (number, place, dtype)


# ---- warnings --------------------------------------------------------------------------------------------
def test_warnings_name_the_line_that_led_to_them():
    """Through torch's frames and contextlib's, and however deep in the library."""
    model = peftfast.get_peft_model(oracle.llama(bias=True), LoraConfig(target_modules=QV))
    model.add_adapter("frozen", LoraConfig(target_modules=QV))
    batch = {**oracle.inputs(model), "adapter_names": ["default", "frozen"]}
    merged = peftfast.get_peft_model(oracle.llama(), LoraConfig(target_modules=QV))
    merged.merge_adapter()
    biased = peftfast.get_peft_model(oracle.llama(bias=True), LoraConfig(target_modules=QV, bias="all"))

    def switched_off():
        with biased.disable_adapter():
            pass

    calls = (
        (lambda: LoraConfig(alora_invocation_tokens=[1], task_type="SEQ_CLS"), "only supported for CAUSAL_LM"),
        (lambda: peftfast.get_peft_model(oracle.llama(), LoraConfig(rank_pattern={"k": 2})), "rank_pattern keys"),
        (lambda: model(**batch), "learn nothing"),
        (lambda: merged.merge_adapter(), "already merged"),
        (lambda: merged.base_model.merge_adapter(), "already merged"),
        (switched_off, "disabling adapter layers with bias"),
    )
    for call, text in calls:
        with pytest.warns(Warning, match=text) as said:
            call()
        [warning] = said
        assert warning.filename == __file__ and warning.lineno - call.__code__.co_firstlineno in (0, 1), text


def test_a_warning_is_all_that_a_compiled_call_says():
    model = peftfast.get_peft_model(oracle.llama(), peftfast.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2))
    batch = oracle.inputs(model)
    batch["position_ids"] = torch.arange(16).expand(2, 16)
    with pytest.warns(UserWarning) as said:
        torch.compile(model, backend="eager")(**batch)
    # torch has another kind of warning for Python 3.13.0
    assert {str(w.message)[:16] for w in said if issubclass(w.category, UserWarning)} == {"Position ids are"}
