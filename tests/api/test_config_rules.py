"""Every field of every config class with values of the wrong type and out of range, drawn from the field's own rule."""

import collections
import dataclasses
import json
import re

import numpy
import oracle
import pytest
import torch
from transformers import HfArgumentParser

import peftfast
from peftfast.config import PEFT_TYPE_TO_CONFIG_MAPPING, config_class, rule_of
from peftfast.methods.lora.settings import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraGAConfig,
)
from peftfast.rules import Rule

config_class("LORA")  # registers every method

#: Fields whose dicts become objects.
SUB_CONFIGS = (
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "use_bdlora",
    "runtime_config",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)
#: What each class needs besides the field under test.
NEEDED = {"AdaLoraConfig": {"total_step": 100}}
CLASSES = [
    *dict.fromkeys(PEFT_TYPE_TO_CONFIG_MAPPING.values()),
    LoftQConfig,
    EvaConfig,
    CordaConfig,
    LoraGAConfig,
    BdLoraConfig,
    ArrowConfig,
]

ANYTHING = [
    None, True, False, -1, 0, 1, 3, -0.5, 0.5, 1.5, float("nan"), float("inf"), "", "text", "lora_onyl", b"bytes",
    object(), [], [1], [-1], ["a"], [None], [["a"]], {}, {"a": 1}, {"a": -1}, {"a": "b"}, {"a": [1]}, {1: 2},
    {"a": None}, (1, "a"), 3 + 4j,
]  # fmt: skip


def fields():
    for cls in CLASSES:
        for field in dataclasses.fields(cls):
            rule = rule_of(field)
            if rule is not None and field.init:
                yield pytest.param(cls, field.name, rule, id=f"{cls.__name__}.{field.name}")


def build(cls, **values):
    return cls(**{**NEEDED.get(cls.__name__, {}), **values})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cls, name, rule", fields())
def test_wrong_values(cls, name, rule):
    """What the rule refuses is refused by name and value; what it accepts never fails on it."""
    refused = 0
    for value in ANYTHING:
        try:
            rule.enforce(value, "x")
        except (TypeError, ValueError):
            if name == "peft_type" or (name in SUB_CONFIGS and isinstance(value, dict)):
                continue  # set by the class itself; a sub-config, whose own fields are checked
            refused += 1
            with pytest.raises((TypeError, ValueError)) as error:
                build(cls, **{name: value})
            text = str(error.value)
            assert f"{name} must be" in text and (repr(value) in text or isinstance(value, (list, tuple))), text
        else:
            try:
                build(cls, **{name: value})
            except (TypeError, ValueError) as error:  # combinations may be refused, but not this field's own value
                assert f"{cls.__name__}.{name} must be" not in str(error)
    assert refused or name == "peft_type", "no value was refused, so the rule says nothing"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_has_a_rule(cls):
    without = {f.name for f in dataclasses.fields(cls) if f.init and rule_of(f) is None}
    assert without <= {"task_type"}  # checked on its own, with PEFT's words


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_field_is_described(cls):
    said = set(re.findall(r"\w+", " ".join(c.__doc__ for c in cls.__mro__ if c.__module__.startswith("peftfast."))))
    assert not {field.name for field in dataclasses.fields(cls)} - said
    assert not cls.__doc__.startswith("Args:")  # what it is comes first


def test_configs_are_read_from_a_command_line():
    """As PEFT's are, which are not compared with: whether IA3's is depends on the unions of types that were made first
    in the process (the typing module keeps one of either order)."""
    line = ["--num_virtual_tokens", "7", "--task_type", "CAUSAL_LM", "--modules_to_save", "lm_head"]
    prompt = {"num_virtual_tokens": 7, "task_type": "CAUSAL_LM", "modules_to_save": ["lm_head"]}
    for cls, words, fields in (
        (peftfast.PromptTuningConfig, line, prompt),
        (peftfast.PrefixTuningConfig, [*line, "--prefix_projection"], {**prompt, "prefix_projection": True}),
        (peftfast.IA3Config, [], {}), (peftfast.EvaConfig, ["--rho", "3"], {"rho": 3.0}),
    ):  # fmt: skip
        (read,) = HfArgumentParser(cls).parse_args_into_dataclasses(words)
        assert vars(read) == vars(cls(**fields))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_unknown_field(cls):
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'.*Known fields"):
        build(cls, nonsense=1)


def test_close_field_names():
    for wrong, right in (
        ("lora_alhpa", "lora_alpha"),
        ("target_module", "target_modules"),
        ("dropout", "lora_dropout"),
        ("lora_r", "r"),
        ("Target_Modules", "target_modules"),
    ):
        with pytest.raises(TypeError, match=f"Did you mean '{right}'"):
            peftfast.LoraConfig(**{wrong: 1})
    with pytest.raises(ValueError, match="Did you mean 'CAUSAL_LM'"):
        peftfast.LoraConfig(task_type="causal_lm")


def test_values_written_later_are_checked_before_anything_changes():
    config = peftfast.LoraConfig(target_modules=["q_proj"])
    config.r = "8"
    model = oracle.llama()
    with pytest.raises(TypeError, match="LoraConfig.r must be"):
        peftfast.get_peft_model(model, config)
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_modules": "x", "layers_to_transform": [1]}, "layers_to_transform.*str"),
        ({"target_modules": "x", "layers_pattern": "h"}, "layers_pattern.*str"),
        ({"layers_pattern": "h"}, "layers_to_transform"),
        ({"lora_bias": True, "init_lora_weights": "pissa"}, "lora_bias"),
        ({"lora_bias": True, "use_dora": True}, "use_dora"),
        ({"init_lora_weights": "loftq"}, "loftq_config"),
        ({"init_lora_weights": "pisa"}, "Did you mean 'pissa'"),
        ({"init_lora_weights": "pissa", "lora_alpha": 0}, "lora_alpha=0"),
        ({"init_lora_weights": "pissa", "alpha_pattern": {"q_proj": 0}}, "alpha_pattern={'q_proj': 0}"),
        ({"init_lora_weights": "pissa_niter_x"}, "init_lora_weights"),
        ({"bias": "lora"}, "Did you mean 'lora_only'"),
        ({"task_type": "CAUSAL"}, "Invalid task type: 'CAUSAL'.*CAUSAL_LM"),
        ({"alora_invocation_tokens": []}, "alora_invocation_tokens.*at least one"),
        ({"layer_replication": [[0, -1]]}, "layer_replication.*at least 0"),
    ],
)
def test_combinations(options, message):
    with pytest.raises(ValueError, match=message):
        peftfast.LoraConfig(**options)


def test_the_same_config_as_peft():
    """Fields, order-free, defaults and the written file."""
    import peft

    for name in (
        "LoraConfig",
        "LoftQConfig",
        "EvaConfig",
        "CordaConfig",
        "LoraGAConfig",
        "BdLoraConfig",
        "ArrowConfig",
        "TrainableTokensConfig",
    ):
        ours, theirs = getattr(peftfast, name), getattr(peft, name, None) or peft.tuners.lora.config.CordaConfig
        mine, other = ({f.name for f in dataclasses.fields(cls)} for cls in (ours, theirs))
        assert other <= mine, name
    mine, other = peftfast.LoraConfig(), peft.LoraConfig()
    assert mine.to_dict() == {**other.to_dict(), "peft_version": mine.peft_version}


@pytest.mark.parametrize("part", ["LoftQConfig", "EvaConfig"])
def test_settings_of_an_initialisation_that_is_not_chosen(part):
    import peft

    configs = []
    for library in (peft, peftfast):
        field = {part.replace("Config", "_config").lower(): getattr(library, part)()}
        with pytest.warns(UserWarning, match="specified but will be ignored when"):
            configs.append(library.LoraConfig(**field).to_dict())
    assert configs[1] == {**configs[0], "peft_version": configs[1]["peft_version"]}


def test_config_files_both_ways(tmp_path):
    import peft

    options = {
        "r": 5, "lora_alpha": 7, "target_modules": ["b", "a"], "rank_pattern": {"z": 3, "a": 4}, "bias": "lora_only",
        "layers_to_transform": [1, 2], "modules_to_save": ["h"], "trainable_token_indices": {"e": [1]},
        "task_type": "CAUSAL_LM",
    }  # fmt: skip
    peftfast.LoraConfig(**options).save_pretrained(tmp_path / "ours")
    peft.LoraConfig(**options).save_pretrained(tmp_path / "theirs")
    texts = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for text in texts:
        text["target_modules"] = sorted(text["target_modules"])
    assert texts[0] == texts[1]
    assert list(texts[0]["rank_pattern"]) == ["z", "a"]  # the first match wins, so the order is kept in the file
    there = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    here = peftfast.PeftConfig.from_pretrained(tmp_path / "theirs")
    assert isinstance(there, peft.LoraConfig) and isinstance(here, peftfast.LoraConfig)
    assert here.to_dict() == peftfast.LoraConfig(**options).to_dict()
    assert there.to_dict() == peft.LoraConfig(**options).to_dict()


def test_the_file_chooses_the_class(tmp_path):
    peftfast.LoraConfig().save_pretrained(tmp_path)
    assert type(peftfast.TrainableTokensConfig.from_pretrained(tmp_path)) is peftfast.LoraConfig
    assert peftfast.get_peft_config({"peft_type": "LORA", "r": 3}).r == 3
    assert peftfast.PeftConfig._get_peft_type(tmp_path) == "LORA"
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')  # all other keys may be absent
    assert peftfast.PeftConfig.from_pretrained(tmp_path).r == 8
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    with pytest.raises(TypeError, match="PeftConfig config .* is missing required keys: {'peft_type'}.*'r'"):
        peftfast.PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", list(PEFT_TYPE_TO_CONFIG_MAPPING))
def test_instances_are_of_the_type_of_their_class(kind, tmp_path):
    """Whatever they are told, so that the file they write is read as what they are."""
    config = build(config_class(kind), peft_type="something else")
    assert config.peft_type == kind
    config.save_pretrained(tmp_path)
    again = peftfast.PeftConfig.from_pretrained(tmp_path)
    assert type(again) is type(config) and again.to_dict() == config.to_dict()


def test_what_holds_for_one_process_is_not_read(tmp_path):
    config = peftfast.LoraConfig(runtime_config=peftfast.LoraRuntimeConfig(ephemeral_gpu_offload=True))
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**config.to_dict(), "runtime_config": {"ephemeral_gpu_offload": True}}, default=list))
    with pytest.warns(UserWarning, match="`runtime_config` in .*adapter_config.json is ignored"):
        assert "runtime_config" not in peftfast.LoraConfig.from_json_file(path)
    with pytest.warns(UserWarning, match="`runtime_config` in .*adapter_config.json is ignored"):
        assert not peftfast.PeftConfig.from_pretrained(tmp_path).runtime_config.ephemeral_gpu_offload


SWITCHES = (
    "fan_in_fan_out",
    "use_dora",
    "use_rslora",
    "lora_bias",
    "use_qalora",
    "inference_mode",
    "ensure_weight_tying",
)


@pytest.mark.parametrize(
    "options",
    [
        dict.fromkeys(SWITCHES),
        dict.fromkeys(SWITCHES, 0),
        {"use_rslora": 1, "fan_in_fan_out": None},
        {"use_rslora": numpy.True_, "use_dora": numpy.False_},  # PEFT cannot save
        {"use_dora": 1},
        {"init_lora_weights": None},
        {"qalora_group_size": None},
        {"layers_to_transform": range(1)},
        {
            "target_modules": collections.UserList(["q_proj", "v_proj"]),
            "exclude_modules": collections.UserList(["v_proj"]),
        },
        {"modules_to_save": collections.deque(["lm_head"]), "target_modules": ("q_proj",)},
        {"rank_pattern": collections.UserDict({"q_proj": 2}), "alpha_pattern": collections.UserDict({"q_proj": 3})},
        {"trainable_token_indices": {"embed_tokens": range(3)}},
        {
            "r": numpy.int64(3),
            "lora_alpha": numpy.float32(5),
            "layers_to_transform": [numpy.int64(1)],
        },  # PEFT cannot save
        {"rank_pattern": {"q_proj": numpy.int64(2)}, "trainable_token_indices": [*numpy.arange(2, 5)]},
    ],
    ids=str,
)
def test_values_that_mean_the_same(options, tmp_path):
    """As PEFT takes them, in constructors and in files."""
    import peft

    options = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    twins = oracle.Twins(oracle.llama, options)
    batch = oracle.inputs(twins.ours)
    with torch.no_grad():
        expected = twins.theirs(**batch).logits
        torch.testing.assert_close(twins.ours(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    twins.ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    plain = {k: (dict(v) if k.endswith("pattern") else v) for k, v in options.items()}
    nulls = {
        name: value for name, value in plain.items() if value is None or (isinstance(value, int) and value in (0, 1))
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps({**saved, **nulls}))
    for library in (peftfast, peft):
        model = library.PeftModel.from_pretrained(oracle.llama(), tmp_path)
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_switches_and_lists_are_no_strings():
    for name in SWITCHES:
        for value in ("", "true", "False", 2, 0.5, []):
            with pytest.raises(TypeError, match=f"{name} must be True or False"):
                peftfast.LoraConfig(**{name: value})
    with pytest.raises(ValueError, match="use_qalora needs a qalora_group_size"):
        peftfast.LoraConfig(use_qalora=True, qalora_group_size=None)
    with pytest.raises(TypeError, match="target_modules must be"):
        peftfast.LoraConfig(target_modules=b"q_proj")
    assert peftfast.LoraConfig(target_modules={"q_proj": 1}.keys()).target_modules == {"q_proj"}


def test_a_config_made_of_the_dict_of_another():
    config = peftfast.LoraConfig(runtime_config=peftfast.LoraRuntimeConfig(ephemeral_gpu_offload=True), r=3)
    again = peftfast.LoraConfig(**dataclasses.asdict(config))
    assert again == config and again.runtime_config.ephemeral_gpu_offload


def test_reading_a_config_checks_what_is_not_the_default(tmp_path, monkeypatch):
    """Most fields are never set; to check all of them took longer than all the rest of reading a config."""
    peftfast.LoraConfig(r=4).save_pretrained(tmp_path)
    checked, enforce = [], Rule.enforce
    monkeypatch.setattr(Rule, "enforce", lambda self, value, name: checked.append(name) or enforce(self, value, name))
    config = peftfast.PeftConfig.from_pretrained(tmp_path)
    assert config.r == 4 and "LoraConfig.r" in checked
    assert len(checked) < len(dataclasses.fields(config)) / 2
    config.use_dora = "yes"
    with pytest.raises(TypeError, match="use_dora must be True or False, got 'yes'"):
        config.validate()


def test_saving_is_deterministic(tmp_path):
    texts = set()
    for names in (["c", "a", "b"], ["b", "c", "a"]):
        peftfast.LoraConfig(target_modules=names).save_pretrained(tmp_path)
        texts.add((tmp_path / "adapter_config.json").read_bytes())
    assert len(texts) == 1
    with pytest.raises(AssertionError, match="should be a directory, not a file"):
        peftfast.LoraConfig().save_pretrained(tmp_path / "adapter_config.json")
