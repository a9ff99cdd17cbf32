"""What a model says about its adapters, and about itself, to those who ask."""

import dataclasses
import importlib

import oracle
import pytest
from torch import nn

import peftfast
from peftfast.interop import layout
from peftfast.tuners.tuner import BaseTuner

peft = importlib.import_module("peft")


@dataclasses.dataclass
class Settings:
    model_type: str = "own"
    width: int = 3


def test_configs_of_any_kind():
    class Model(nn.Module):
        pass

    model = Model()
    assert BaseTuner.get_model_config(model) == layout.lookup("peft.utils.constants", "DUMMY_MODEL_CONFIG")
    for config in (Settings(), {"model_type": "own", "width": 3}):
        model.config = config
        assert BaseTuner.get_model_config(model) == {"model_type": "own", "width": 3}
        model.config = config
    theirs = peft.tuners.tuners_utils.BaseTuner.get_model_config
    assert BaseTuner.get_model_config(oracle.llama()) == theirs(oracle.llama())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*\.0\..*"},
        {"target_modules": r".*\.1\..*_proj", "modules_to_save": ["lm_head"]},
        {"target_modules": ["v_proj"], "layers_to_transform": 1},
    ],
)
def test_which_modules_a_config_means(options):
    inspect = layout.lookup("peft.tuners.tuners_utils", "inspect_matched_modules")
    check = layout.lookup("peft.tuners.tuners_utils", "check_target_module_exists")
    twins = oracle.Twins(oracle.llama, options)
    theirs = peft.tuners.tuners_utils.inspect_matched_modules(twins.theirs.base_model)
    for model in (twins.ours, twins.ours.base_model):
        found = inspect(model)
        assert found["matched"] == theirs["matched"] == twins.ours.base_model.targeted_module_names
        names = [name for name, _ in oracle.llama().named_modules() if name]
        assert sorted(found["matched"] + found["unmatched"]) == sorted(names)
    assert [n for n in names if check(twins.ours.peft_config["default"], n)] == found["matched"]
    with pytest.raises(ValueError, match="Adapter other not found"):
        inspect(twins.ours, "other")


@pytest.mark.parametrize("kind", ["adalora", "velora", "mica", "monteclora"])
def test_what_trains_is_said_as_in_peft(kind):
    """Numbers that adapters keep beside their weights never train, and do not count."""
    own = {
        "velora": lambda lib: {"velora_config": lib.VeloraConfig(num_groups=4)},
        "mica": lambda lib: {"init_lora_weights": "mica"},
        "monteclora": lambda lib: {"monteclora_config": lib.MontecloraConfig()},
    }
    found = []
    for library in (peftfast, peft):
        if kind == "adalora":
            config = library.AdaLoraConfig(target_modules=["q_proj"], total_step=9)
        else:
            config = library.LoraConfig(target_modules=["q_proj"], r=4, **own[kind](library))
        model = library.get_peft_model(oracle.llama(), config)
        layers = [layer.requires_grad for layer in library.get_layer_status(model)]
        found.append((layers, library.get_model_status(model).requires_grad))
    assert found[0] == found[1]
    assert found[0][1] == {"default": "irregular" if kind == "mica" else True}


@pytest.mark.parametrize(("make", "target"), [(oracle.llama, "q_proj"), (lambda: nn.Sequential(nn.Linear(4, 4)), "0")])
def test_models_without_a_wrapper(make, target):
    found = []
    for library in (peftfast, peft):
        for function in (library.get_layer_status, library.get_model_status):
            with pytest.raises(ValueError, match="No adapter layers found"):
                function(make())
        config = library.LoraConfig(target_modules=[target], modules_to_save=["act_fn"])
        model = library.inject_adapter_in_model(config, make())
        found.append(dataclasses.asdict(library.get_model_status(model)))
    assert found[0] == found[1]


def test_prompts_adapt_no_layer():
    config = peftfast.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    model = peftfast.get_peft_model(oracle.llama(), config)
    for name in ("get_layer_status", "get_model_status"):
        with pytest.raises(TypeError, match=rf"{name}\(\) got an invalid PeftModel instance.*PROMPT_TUNING"):
            getattr(model, name)()


def test_a_wrapper_without_a_copy_lacks_attributes():
    """So that `hasattr` answers, whatever somebody wrote to it."""
    config = peftfast.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapper = peftfast.get_peft_model(oracle.llama(), config).base_model.model.lm_head
    assert wrapper.weight is wrapper.modules_to_save["default"].weight
    wrapper._active_adapter = "gone"
    with pytest.raises(AttributeError, match="has no attribute 'weight'.*'gone'"):
        wrapper.weight  # noqa: B018
    assert not hasattr(wrapper, "weight")


KINDS = {
    "peft.tuners.lora.layer": ("LoraLayer", peftfast.LoraConfig, {"target_modules": ["q_proj"]}),
    "peft.tuners.adalora.layer": ("AdaLoraLayer", peftfast.AdaLoraConfig, {"total_step": 9}),
    "peft.tuners.ia3": ("IA3Layer", peftfast.IA3Config, {}),
    "peft.tuners.trainable_tokens.layer": ("TrainableTokensLayer", peftfast.TrainableTokensConfig, {}),
}


@pytest.mark.parametrize("place", list(KINDS)[1:])
def test_kinds_of_layers_are_told_apart(place):
    """Under PEFT's names for them, each of which says yes to its own kind only."""
    name, config, options = KINDS[place]
    model = peftfast.get_peft_model(oracle.llama(), config(**options))
    count = len(model.get_layer_status())
    for other, (kind, _, _) in KINDS.items():
        found = [module for module in model.modules() if isinstance(module, layout.lookup(other, kind))]
        if other == place:
            assert len(found) == count > 0, name
        elif kind != "LoraLayer":  # which any layer is
            assert not found, (name, kind)
