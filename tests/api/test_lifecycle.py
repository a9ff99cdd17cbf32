"""Adding, activating, freezing, disabling, merging and deleting adapters, in step with PEFT: after every call the same
parameters are trainable, the same adapters active and merged, and the outputs equal."""

import collections
import copy
import dataclasses
import gc
import importlib
import io
import operator
import pickle
import warnings
import weakref

import oracle
import pytest
import torch
from torch import nn

import peftfast
from peftfast.layers.layer import BaseTunerLayer
from peftfast.many import hotswap

peft = importlib.import_module("peft")

FIRST = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
SECOND = {"target_modules": ["q_proj", "k_proj"], "init_lora_weights": False, "r": 3}
SAVED = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "init_lora_weights": False}
TOKENS = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4], "init_lora_weights": False}


def layer_by_layer(model, method, *args):
    """Call it on every layer, as libraries do that know no model of ours."""
    for module in model.modules():
        if hasattr(module, "adapter_layer_names"):
            getattr(module, method)(*args)


def mine_did_something(call):
    return {"merge_and_unload", "unmerge_adapter"} & set(call.__code__.co_names)


class Pair:
    """One model here and one in PEFT; whatever is called on one is called on the other."""

    def __init__(self, options=FIRST, make=oracle.llama, **wrap):
        twins = oracle.Twins(make, options, **wrap)
        self.ours, self.theirs = twins.ours, twins.theirs

    def both(self, call):
        """Call on both; the same warnings by their first words, or the same error by its type and first words."""
        outcomes = []
        for model, library in ((self.ours, peftfast), (self.theirs, peft)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    outcome = call(model, library)
                except Exception as e:
                    outcome = e
            texts = [str(w.message) for w in caught if w.category is UserWarning]
            outcomes.append((outcome, texts))
        (mine, my_texts), (other, other_texts) = outcomes
        if isinstance(other, Exception):
            assert isinstance(mine, type(other)), (mine, other)
            assert str(mine)[:25] == str(other)[:25], (mine, other)
        else:
            assert not isinstance(mine, Exception), mine
        # PEFT warns layer by layer, also where a layer simply lacks the adapter that is merged or unmerged elsewhere
        needless = ("All adapters are already merged", "Already unmerged")
        expected = {t[:50] for t in other_texts if not (mine_did_something(call) and t.startswith(needless))}
        assert expected <= {t[:50] for t in my_texts}, (my_texts, other_texts)
        return mine, other

    def add(self, name, options=SECOND):
        self.both(lambda model, library: model.add_adapter(name, oracle.config_of(library, options)))
        oracle.copy_parameters(self.theirs, self.ours)

    def check(self, outputs=True):
        # what unmerging needs is kept by PEFT in a buffer, here beside the parameters
        oracle.same_live_state(self.ours, self.theirs, without="trainable_tokens_original")
        assert list(self.ours.active_adapters) == list(self.theirs.active_adapters)
        assert self.ours.active_adapter == self.theirs.active_adapter
        active = [
            {n: m.active_adapter for n, m in model.named_modules() if hasattr(m, "adapter_layer_names")}
            for model in (self.ours, self.theirs)
        ]
        assert active[0] == active[1]
        assert self.ours.base_model.active_adapter == self.theirs.base_model.active_adapter
        assert sorted(self.ours.peft_config) == sorted(self.theirs.peft_config)
        assert self.ours.get_nb_trainable_parameters() == self.theirs.get_nb_trainable_parameters()
        mine, other = self.ours.get_model_status(), self.theirs.get_model_status()
        assert dataclasses.asdict(mine) == dataclasses.asdict(other)
        layers = [
            {s.name: dataclasses.asdict(s) for s in model.get_layer_status()} for model in (self.ours, self.theirs)
        ]
        for layer in (status for model in layers for status in model.values()):
            if not layer["available_adapters"]:
                layer.pop("module_type")  # a layer without adapters names no method
        assert layers[0] == layers[1]
        if outputs:
            with torch.no_grad():
                mine, other = oracle.logits(self.ours), oracle.logits(self.theirs)
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [FIRST, SAVED, TOKENS], ids=["lora", "modules_to_save", "tokens"])
def test_requires_grad(options):
    pair = Pair(options)
    pair.check()
    pair.add("other", {**SECOND, **{k: v for k, v in options.items() if k == "modules_to_save"}})
    pair.check()  # frozen, inactive, and the first one as it was
    pair.both(lambda m, _: m.set_adapter("other"))
    pair.check()
    pair.both(lambda m, _: m.set_adapter("default"))
    pair.check()
    pair.both(lambda m, _: m.set_requires_grad("other"))
    pair.check()
    pair.both(lambda m, _: m.set_requires_grad(["default", "other"], False))
    pair.check()
    pair.both(lambda m, _: m.set_adapter("other", inference_mode=True))
    pair.check()
    pair.both(lambda m, _: m.set_adapter("missing"))
    pair.check()
    pair.both(lambda m, _: m.base_model.disable_adapter_layers())
    pair.check()
    pair.both(lambda m, _: m.base_model.enable_adapter_layers())
    pair.check()


def test_several_active():
    pair = Pair()
    pair.add("other")
    pair.both(lambda m, _: m.base_model.set_adapter(["default", "other"]))
    # PEFT leaves PeftModel.active_adapter, one name, where it was
    assert list(pair.ours.active_adapters) == list(pair.theirs.active_adapters) == ["default", "other"]
    pair.check()
    pair.both(lambda m, _: m.base_model.set_adapter(["other"]))
    assert pair.ours.active_adapters == ["other"]


def test_layers_by_themselves():
    pair = Pair()
    for name in ("other", "third", "another"):
        pair.add(name)

    def each(method, *args):
        pair.both(lambda model, _: layer_by_layer(model, method, *args))
        pair.check()

    each("merge")
    each("merge")
    each("merge", False, ["default", "other"])
    each("unmerge")
    each("unmerge")
    each("set_adapter", ["default", "other"])
    each("delete_adapter", "other")
    each("delete_adapter", "missing")
    each("delete_adapter", "default")


def test_two_kept_modules_cannot_be_active_at_once():
    pair = Pair(SAVED)
    pair.add("other", SAVED)
    before = [p.requires_grad for p in pair.ours.parameters()]
    pair.both(lambda m, _: m.base_model.set_adapter(["default", "other"]))
    assert [p.requires_grad for p in pair.ours.parameters()] == before
    assert pair.ours.active_adapters == ["default"]


def test_delete():
    pair = Pair()
    pair.add("a")
    pair.add("b")
    pair.both(lambda m, _: m.delete_adapter("nobody"))
    pair.both(lambda m, _: m.delete_adapter("b"))
    pair.check()
    pair.both(lambda m, _: m.set_adapter("a"))
    pair.check()
    pair.both(lambda m, _: m.delete_adapter("default"))
    pair.check()
    assert not any("default" in n for n, _ in pair.ours.named_parameters())


def test_adapters_that_were_given_one_config_have_one_each(tmp_path):
    """What is written to the config of one, when it is hot-swapped or resized, is not true of the other."""
    config = peftfast.LoraConfig(r=4, lora_alpha=8, **FIRST)
    model = peftfast.get_peft_model(oracle.llama(), config, "first").eval()
    model.add_adapter("second", config)
    model.set_adapter("second")
    assert model.peft_config["first"] is config
    expected = oracle.logits(model)
    other = peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(r=2, lora_alpha=32, **FIRST))
    other.save_pretrained(tmp_path / "other")
    hotswap.hotswap_adapter(model, tmp_path / "other", "first")
    model.save_pretrained(tmp_path)
    again = peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path / "second").eval()
    torch.testing.assert_close(oracle.logits(again), expected)

    prompts = peftfast.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model = peftfast.get_peft_model(oracle.llama(), prompts, "first").eval()
    model.add_adapter("second", prompts)
    model.set_adapter("second")
    expected = oracle.logits(model)
    peftfast.resize_prompt(model, 2, "first")
    torch.testing.assert_close(oracle.logits(model), expected)


def test_nothing_is_left_of_an_adapter_for_which_there_was_no_memory(monkeypatch):
    """Not in layers that others have already, either: the next one of the name may be of another rank."""
    model = Pair(FIRST).ours
    before = {n: p.shape for n, p in model.state_dict().items()}
    made, make_slot = [], importlib.import_module("peftfast.layers.layer").make_slot

    def until_memory_ends(*args):
        made.append(args)
        if len(made) == 4:
            raise torch.OutOfMemoryError("no memory")
        return make_slot(*args)

    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr("peftfast.layers.layer.make_slot", until_memory_ends)
        model.add_adapter("second", peftfast.LoraConfig(r=5, target_modules=FIRST["target_modules"]))
    assert {n: p.shape for n, p in model.state_dict().items()} == before
    assert not any("second" in layer.scaling for layer in model.base_model.inventory.layers.values())
    model.add_adapter("second", peftfast.LoraConfig(r=3, target_modules=FIRST["target_modules"]))
    assert {p.shape[0] for n, p in model.named_parameters() if "lora_A.second" in n} == {3}


def test_what_is_merged_stays_so_when_an_active_adapter_is_deleted():
    pair = Pair()
    for name in ("a", "b"):
        pair.add(name, FIRST)
    pair.both(lambda m, _: m.base_model.merge_adapter(adapter_names=["a"]))
    pair.both(lambda m, _: m.delete_adapter("default"))  # the active one
    pair.check()
    assert all(layer.merged_adapters == ["a"] for layer in pair.ours.base_model.inventory.layers.values())
    pair.both(lambda m, _: m.unmerge_adapter())
    pair.check()


WAYS = {
    "adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "copied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("other", WAYS)
def test_a_module_may_be_trained_in_another_way_once_nobody_trains_it_in_the_first(way, other):
    model = peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(target_modules=["q_proj"]), "stays")
    model.add_adapter("one", peftfast.LoraConfig(**WAYS[way]))
    if way != other:
        with pytest.raises((ValueError, TypeError), match="embed_tokens|modules_to_save"):
            model.add_adapter("two", peftfast.LoraConfig(**WAYS[other]))
    model.delete_adapter("one")
    model.add_adapter("two", peftfast.LoraConfig(**WAYS[other]))
    model.set_adapter("two")
    fresh = peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(**WAYS[other]), "two")
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, fresh)]
    assert trained[0] == trained[1]


def test_delete_the_active_one():
    pair = Pair()
    pair.add("other", {**FIRST, "r": 2})
    pair.both(lambda m, _: m.delete_adapter("default"))
    pair.check()
    assert pair.ours.active_adapters == ["other"]


def test_the_next_one_is_the_same_in_all_layers():
    """In PEFT each layer chooses, and "c" acts where "b" has nothing."""
    model = peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.add_adapter("b", peftfast.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.add_adapter("c", peftfast.LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    model.set_adapter("b")
    expected = model(**oracle.inputs(model)).logits
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        model.delete_adapter("default")
    assert torch.equal(model(**oracle.inputs(model)).logits, expected)


def test_all_linear_leaves_out_the_copies_of_another_adapter():
    model = peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(modules_to_save=["lm_head"]))
    names = [name for name, _ in model.named_parameters() if "lm_head" in name]
    model.add_adapter("b", peftfast.LoraConfig(target_modules="all-linear"))
    assert [name for name, _ in model.named_parameters() if "lm_head" in name] == names
    assert not any("lm_head" in name for name in model.peft_config["b"].target_modules)


@pytest.mark.parametrize("deleted, acts", [("c", "b"), ("b", "a")])
def test_what_layers_were_told_one_by_one_counts(deleted, acts):
    """As transformers and diffusers switch adapters: deleting one that acts no more leaves the one that does."""
    models = []
    for library in (peftfast, peft):
        functions = importlib.import_module(f"{library.__name__}.functional")
        model = oracle.llama()
        for name in ("a", "b", "c"):
            oracle.quietly(library.inject_adapter_in_model, library.LoraConfig(**FIRST), model, name)
        models.append((model, functions))
    (ours, _), (theirs, _) = models
    oracle.copy_parameters(theirs, ours)

    def tell(name):
        for model, _ in models:
            layer_by_layer(model, "set_adapter", name)

    tell("b")
    for model, functions in models:
        active = oracle.quietly(functions.delete_adapter, model, deleted, prefix="lora_")
        assert active == [acts]
    oracle.same_live_state(ours, theirs)
    torch.testing.assert_close(oracle.logits(ours), oracle.logits(theirs), rtol=1e-4, atol=1e-4)
    tell(acts)
    for model, functions in models:
        functions.set_adapter(model, "c" if acts == "a" else "a")
    oracle.same_live_state(ours, theirs)  # what acted before is frozen


@pytest.mark.parametrize("options", [FIRST, SAVED], ids=["lora", "modules_to_save"])
def test_attributes_by_which_scripts_switch_layers(options):
    """For a teacher's logits, say, without the calls that freeze what is trained."""
    pair = Pair(options)
    pair.add("other", {**FIRST, "r": 2})
    pair.check()
    for attribute, value in (
        ("_disable_adapters", True), ("_disable_adapters", False), ("_active_adapter", ["default", "other"]),
        ("_active_adapter", "other"), ("_disable_adapters", True), ("_disable_adapters", False),
    ):  # fmt: skip
        for model in (pair.ours, pair.theirs):
            for module in model.modules():
                if isinstance(module, (BaseTunerLayer, peft.tuners.tuners_utils.BaseTunerLayer)):
                    setattr(module, attribute, value)
        pair.check()


def test_adapters_that_others_delete_layer_by_layer_can_come_again():
    """As diffusers deletes adapters (`delete_adapters`), from every layer itself."""
    models = []
    for library in (peftfast, peft):
        model = oracle.llama()
        for name, targets in (("a", ["q_proj", "v_proj"]), ("b", ["q_proj"]), ("a", ["v_proj"])):
            oracle.quietly(library.inject_adapter_in_model, library.LoraConfig(**{**FIRST, "target_modules": targets}),
                           model, name)  # fmt: skip
            models.append(model)
            if len(models) % 3 == 1:
                layer_by_layer(model, "delete_adapter", name)
                del model.peft_config[name]
    ours, theirs = models[0], models[-1]
    oracle.copy_parameters(theirs, ours)
    oracle.same_live_state(ours, theirs)
    torch.testing.assert_close(oracle.logits(ours), oracle.logits(theirs), rtol=1e-4, atol=1e-4)


def test_adapters_that_others_have_taken_out_are_forgotten():
    """As diffusers unloads adapters (`unload_lora_weights`): it puts the modules back and deletes `peft_config`."""
    model = peftfast.inject_adapter_in_model(peftfast.LoraConfig(**FIRST), oracle.llama(), "first")
    base = oracle.logits(oracle.llama())
    for name, layer in [(n, m) for n, m in model.named_modules() if hasattr(m, "adapter_layer_names")]:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    del model.peft_config
    for name in ("first", "second"):
        peftfast.inject_adapter_in_model(peftfast.LoraConfig(**FIRST), model, name)
        assert list(model.peft_config) == ["first", "second"][: 1 + (name == "second")]
        assert (oracle.logits(model) - base).abs().max() > 1e-4
        assert peftfast.get_peft_model_state_dict(model, adapter_name=name)


@pytest.mark.parametrize("options", [FIRST, SAVED, TOKENS], ids=["lora", "modules_to_save", "tokens"])
def test_deleting_an_inactive_adapter_leaves_the_active_one_frozen(options):
    pair = Pair(options)
    pair.both(lambda m, _: m.set_adapter("default", inference_mode=True))
    pair.add("other", {**SECOND, **{k: v for k, v in options.items() if k == "modules_to_save"}})
    if options is TOKENS:
        rows = {**SECOND, "trainable_token_indices": [7]}
        with torch.no_grad():
            pair.ours.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"].add_(1)
            expected = oracle.logits(pair.ours)
            pair.ours.add_adapter("rows", oracle.config_of(peftfast, rows))
            pair.ours.delete_adapter("rows")
            assert torch.equal(oracle.logits(pair.ours), expected)
    pair.both(lambda m, _: m.delete_adapter("other"))
    assert not [n for n, p in pair.ours.named_parameters() if p.requires_grad]
    if options is not TOKENS:  # PEFT unfreezes rows of tokens when another adapter goes
        pair.check()


def test_the_config_of_a_deleted_adapter_is_kept_nowhere():
    """A server goes through thousands of names."""
    model, configs = peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(**FIRST)), []
    for name in ("one", "two"):
        config = peftfast.LoraConfig(**FIRST)
        configs.append(weakref.ref(config))
        model.add_adapter(name, config)
        del config
        model.set_adapter(name)
        oracle.logits(model, adapter_names=[name, "default"])
        model.set_adapter("default")
        model.delete_adapter(name)
    gc.collect()
    assert [config() for config in configs] == [None, None]


QV = ["q_proj", "v_proj"]
EVERYWHERE = ["embed_tokens", *QV, "lm_head"]
LIVES = {
    "lora": peftfast.LoraConfig(target_modules="all-linear", lora_dropout=0.1),
    "dora": peftfast.LoraConfig(target_modules=EVERYWHERE, use_dora=True, ensure_weight_tying=True),
    "saved": peftfast.LoraConfig(target_modules=QV, modules_to_save=["lm_head"]),
    "tokens": peftfast.LoraConfig(target_modules=QV, trainable_token_indices=[3, 4]),
    "parameters": peftfast.LoraConfig(target_modules=[], target_parameters=["q_proj.weight"]),
    "invoked": peftfast.LoraConfig(target_modules=QV, alora_invocation_tokens=[5], task_type="CAUSAL_LM"),
    "replicated": peftfast.LoraConfig(target_modules=QV, layer_replication=[(0, 1), (0, 1)]),
    "kasa": peftfast.LoraConfig(target_modules=QV, kasa_config=peftfast.KasaConfig()),
    "monteclora": peftfast.LoraConfig(target_modules=QV, monteclora_config=peftfast.MontecloraConfig()),
    "adalora": peftfast.AdaLoraConfig(target_modules=QV, total_step=10),
    "ia3": peftfast.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prefix": peftfast.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", LIVES)
def test_a_model_is_gone_with_the_last_reference_to_it(name):
    """Its memory is wanted for the next model, long before Python looks for cycles; PEFT's have none."""
    gc.disable()
    try:
        model = oracle.quietly(peftfast.get_peft_model, oracle.llama(tied="dora" in name, layers=1), LIVES[name])
        oracle.logits(model.train(), labels=oracle.inputs(model)["input_ids"]).sum().backward()
        model.eval()
        with peftfast.helpers.DoraCaching(), torch.no_grad():
            oracle.logits(model)
        oracle.quietly(model.add_adapter, "second", dataclasses.replace(LIVES[name]))
        if name not in ("parameters", "prefix"):
            for _ in range(2):
                with torch.no_grad():
                    oracle.logits(model, adapter_names=["default", "second"])
        with model.disable_adapter():
            oracle.logits(model)
        if name not in ("prefix", "invoked"):
            oracle.quietly(model.merge_adapter)
            oracle.logits(model)
        held = [weakref.ref(thing) for thing in (*model.modules(), *model.parameters())]
        del model
        assert [thing() for thing in held if thing() is not None] == []
    finally:
        gc.enable()


def test_a_shallow_copy_of_a_model_that_is_gone():
    model = peftfast.inject_adapter_in_model(peftfast.LoraConfig(**FIRST), oracle.llama())
    expected, copied = oracle.logits(model), copy.copy(model)
    del model
    peftfast.inject_adapter_in_model(peftfast.LoraConfig(**SECOND), copied, adapter_name="second")
    assert not torch.equal(oracle.logits(copied), expected)
    assert peftfast.functional.delete_adapter(copied, "second") == ["default"]
    assert torch.equal(oracle.logits(copied), expected)
    layer, x = copied.model.layers[0].self_attn.q_proj, torch.randn(2, 32)
    expected, layer, copied = layer(x), copy.copy(layer), None
    assert torch.equal(layer(x), expected)


def test_deleting_the_last_adapter_leaves_the_base():
    model = peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(**FIRST))
    expected = oracle.logits(oracle.llama())
    model.delete_adapter("default")
    torch.testing.assert_close(oracle.logits(model), expected)
    assert model.active_adapters == [] and not model.peft_config


@pytest.mark.parametrize("options", [FIRST, SAVED, TOKENS], ids=["lora", "modules_to_save", "tokens"])
def test_disable(options):
    pair = Pair(options)
    base = oracle.logits(oracle.llama())
    for model in (pair.ours, pair.theirs):
        before = {n: p.requires_grad for n, p in model.named_parameters()}
        with model.disable_adapter():
            torch.testing.assert_close(oracle.logits(model), base, rtol=1e-5, atol=1e-5)
            with model.disable_adapter():
                torch.testing.assert_close(oracle.logits(model), base, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(oracle.logits(model), base, rtol=1e-5, atol=1e-5)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before
        with pytest.raises(KeyError), model.disable_adapter():
            raise KeyError
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    pair.check()


@pytest.mark.parametrize("options", [FIRST, SAVED, TOKENS], ids=["lora", "modules_to_save", "tokens"])
@pytest.mark.parametrize("by_layer", [False, True])
def test_what_is_switched_while_adapters_are_off_is_what_trains_afterwards(options, by_layer):
    """And the adapters that were active before are frozen, then and by the next `set_adapter`."""
    pair = Pair(options)
    pair.add("other", {**SECOND, **{k: v for k, v in options.items() if k == "modules_to_save"}})

    def switch(model, name):
        with model.disable_adapter():
            if by_layer:
                layer_by_layer(model, "set_adapter", name)
            else:
                model.set_adapter(name)

    for name in ("other", "default"):
        pair.both(lambda m, _, name=name: switch(m, name))
        if by_layer:
            trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (pair.ours, pair.theirs)]
            assert trained[0] == trained[1] and trained[0]
        else:
            pair.check()
    pair.both(lambda m, _: m.set_adapter("other"))
    pair.check()


def test_what_is_frozen_or_unfrozen_while_adapters_are_off_stays_so():
    model = Pair(FIRST).ours
    model.add_adapter("other", peftfast.LoraConfig(**SECOND))

    def trained():
        return {one for one in model.peft_config for n, p in model.named_parameters() if one in n and p.requires_grad}

    with model.disable_adapter():
        model.set_requires_grad("other")
    assert trained() == {"default", "other"}
    with model.disable_adapter():
        model.set_requires_grad("default", False)
    assert trained() == {"other"}
    with model.disable_adapter():
        model.set_adapter("default", inference_mode=True)
    assert trained() == set()
    with model.disable_adapter(), model.disable_adapter():
        model.set_adapter("default")
    assert trained() == {"default"}
    model.disable_adapter_layers()
    assert trained() == set()
    with model.disable_adapter():
        model.set_adapter("default")
    assert trained() == {"default"}


def test_an_adapter_that_was_added_and_called_while_others_were_off_acts_afterwards():
    model = Pair(FIRST).ours
    with model.disable_adapter():
        model.add_adapter("added", peftfast.LoraConfig(target_modules=["down_proj"], init_lora_weights=False))
        model.set_adapter("added")
        torch.testing.assert_close(oracle.logits(model), oracle.logits(oracle.llama()))
    assert {n for n, p in model.named_parameters() if p.requires_grad and "default" in n} == set()
    found = oracle.logits(model)
    model.set_adapter("added")
    assert torch.equal(found, oracle.logits(model))
    assert (found - oracle.logits(oracle.llama())).abs().max() > 1e-3


@torch.no_grad()
def test_adapters_that_others_have_switched_off_layer_by_layer_are_off_where_one_is_added():
    """As transformers' `disable_adapters` does it; some of the new one's layers are new."""
    model = oracle.llama().eval()
    peftfast.inject_adapter_in_model(peftfast.LoraConfig(**FIRST), model, "first")
    layer_by_layer(model, "enable_adapters", False)
    peftfast.inject_adapter_in_model(peftfast.LoraConfig(**SECOND), model, "second")
    assert torch.equal(oracle.logits(model), oracle.logits(oracle.llama()))
    layer_by_layer(model, "enable_adapters", True)
    found = oracle.logits(model)
    peftfast.functional.set_adapter(model, "second")
    assert torch.equal(oracle.logits(model), found)


def test_disable_with_trained_biases_warns():
    pair = Pair({**FIRST, "bias": "all"}, lambda: oracle.llama(bias=True))

    def call(model, _):
        with model.disable_adapter():
            pass

    pair.both(call)
    pair.check()


@pytest.mark.parametrize("options", [FIRST, TOKENS], ids=["lora", "tokens"])
def test_merge_and_unmerge(options):
    pair = Pair(options)
    pair.add("other")
    stored = {n: p.clone() for n, p in pair.ours.named_parameters()}
    if options is TOKENS:
        lists = (None, ["default"])  # in PEFT token layers without the adapter raise KeyError
    else:
        lists = (None, ["other"], ["default", "other"])
    for names in lists:
        pair.both(lambda m, _, names=names: m.merge_adapter(names))
        # with an inactive adapter merged, PEFT drops the active one from the layers that have both; here it stays on
        pair.check(outputs=names != ["other"])
        if names is None:
            pair.both(lambda m, _: m.merge_adapter())  # nothing to do, and it says so
        pair.both(lambda m, _: m.unmerge_adapter())
        pair.check()
        assert all(torch.equal(p, stored[n]) for n, p in pair.ours.named_parameters())  # in every bit
        oracle.copy_parameters(pair.ours, pair.theirs)  # PEFT's are a rounding off
    with pytest.warns(UserWarning, match="Already unmerged. Nothing to do."):
        pair.ours.unmerge_adapter()
    if options is TOKENS:
        return
    pair.both(lambda m, _: m.merge_adapter(["default"]))
    pair.both(lambda m, _: m.merge_adapter(["other"]))  # on top
    pair.check()
    pair.both(lambda m, _: m.delete_adapter("other"))  # refused while merged
    pair.check()
    pair.both(lambda m, _: m.set_adapter("other"))  # unmerges, and says so
    pair.check()
    assert all(torch.equal(p, stored[n]) for n, p in pair.ours.named_parameters())


def test_safe_merge_refuses_and_leaves_everything():
    model = peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(**FIRST))
    with torch.no_grad():
        model.base_model.model.model.layers[1].self_attn.v_proj.lora_A["default"].weight[0, 0] = float("nan")
    before = {n: p.clone() for n, p in model.named_parameters()}
    for call in (
        lambda: model.merge_adapter(safe_merge=True),
        lambda: model.merge_adapter(safe_merge=True, keep=False),
        lambda: model.merge_and_unload(safe_merge=True),
    ):
        with pytest.raises(
            ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"
        ):
            call()
        after = dict(model.named_parameters())
        assert after.keys() == before.keys()
        assert all(torch.equal(after[n].nan_to_num(), p.nan_to_num()) for n, p in before.items())
        assert model.get_model_status().merged_adapters == []


@pytest.mark.parametrize("merged_before", [False, True])
@pytest.mark.parametrize("names", [None, ["other"], ["default", "other"]])
def test_merge_and_unload(merged_before, names):
    pair = Pair()
    pair.add("other")
    if merged_before:
        pair.both(lambda m, _: m.merge_adapter(["default"]))
    merged = pair.both(lambda m, _: m.merge_and_unload(adapter_names=names))
    with torch.no_grad():
        torch.testing.assert_close(*map(oracle.logits, merged), rtol=1e-4, atol=1e-4)
    assert merged[0] is pair.ours.base_model.model
    assert not any(isinstance(m, BaseTunerLayer) for m in merged[0].modules())


@pytest.mark.parametrize("merge", [True, False], ids=["merge_and_unload", "unload"])
@pytest.mark.parametrize("options", [FIRST, SAVED, TOKENS], ids=["lora", "modules_to_save", "tokens"])
def test_the_model_around_an_unloaded_one_goes_on(merge, options, tmp_path):
    """As in PEFT, whose users do not all take what merging and unloading return."""
    pair = Pair(options)
    bases = pair.both(lambda m, _: m.merge_and_unload() if merge else m.unload())
    want = oracle.logits(bases[0])
    torch.testing.assert_close(want, oracle.logits(bases[1]))
    ids = {"input_ids": torch.tensor([[1, 2, 3]]), "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    generated = pair.both(lambda m, _: m.generate(**ids))
    assert torch.equal(*generated)
    for outer in (pair.ours, pair.ours.base_model):
        assert torch.equal(oracle.logits(outer), want)
        with pair.ours.disable_adapter():
            assert torch.equal(oracle.logits(outer), want)
    assert pair.ours.active_adapters == [] and pair.ours.active_adapter == pair.theirs.active_adapter
    assert not pair.ours.has_active_enabled_adapter
    assert oracle.quietly(pair.ours.merge_adapter) == {}
    assert len(set(pair.both(lambda m, _: m.get_nb_trainable_parameters()))) == 1
    with pytest.raises(ValueError, match="no adapter to save"):
        pair.ours.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    pair.theirs.delete_adapter("default")  # PEFT keeps its config
    pair.add("other")
    torch.testing.assert_close(oracle.logits(pair.ours), want)  # it is not active
    pair.both(lambda m, _: m.set_adapter("other"))
    pair.check()
    assert (oracle.logits(pair.ours) - want).abs().max() > 1e-3
    assert (pair.ours.merge_and_unload() if merge else pair.ours.unload()) is bases[0]


@torch.no_grad()
def test_of_several_copies_of_a_module_one_is_merged_and_the_others_are_named():
    model = peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(**SAVED), "first")
    model.add_adapter("second", peftfast.LoraConfig(**SAVED))
    copies = model.base_model.model.lm_head.modules_to_save
    for copied in copies.values():
        copied.weight.normal_()
    with pytest.warns(peftfast.PeftWarning, match="lm_head stays as adapter second has trained it; of 'first', which"):
        merged = model.merge_and_unload(adapter_names=["second", "first"])
    assert merged.lm_head is copies["second"]


def test_what_chose_and_switched_off_adapters_goes_with_them():
    model = peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(**FIRST))
    model.base_model.set_router(lambda inputs: ["default"] * len(inputs["input_ids"]))
    model.base_model.disable_adapter_layers()
    want = oracle.logits(model.unload())
    assert torch.equal(oracle.logits(model), want)
    model.add_adapter("other", peftfast.LoraConfig(**FIRST))
    model.set_adapter("other")
    assert not torch.equal(oracle.logits(model), want)


def test_unload_gives_the_base_back():
    base = oracle.llama()
    expected = {n: p.clone() for n, p in base.named_parameters()}
    model = peftfast.get_peft_model(base, peftfast.LoraConfig(**FIRST))
    model.merge_adapter()
    assert model.unload() is base
    assert {n for n, _ in base.named_parameters()} == expected.keys()
    assert all(torch.equal(p, expected[n]) for n, p in base.named_parameters())


def test_disabled_forward_of_a_merged_model_unmerges():
    pair = Pair()
    pair.both(lambda m, _: m.merge_adapter())

    def call(model, _):
        with model.disable_adapter():
            return oracle.logits(model)

    mine, other = pair.both(call)
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    pair.check()


def test_printed_line(capsys):
    pair = Pair()
    for model in (pair.ours, pair.theirs):
        model.print_trainable_parameters()
    mine, other = capsys.readouterr().out.splitlines()
    assert mine == other


def test_first_words_of_layers():
    """Tools recognise adapted layers by their repr."""
    pair = Pair()
    for mine, other in zip(pair.ours.get_layer_status(), pair.theirs.get_layer_status(), strict=True):
        assert mine.module_type == other.module_type == "lora.Linear"
    for name, options in (("TrainableTokensConfig", {"token_indices": [1]}), ("AdaLoraConfig", {"total_step": 9})):
        mine, other = (
            {
                s.module_type
                for s in lib.get_peft_model(oracle.llama(), getattr(lib, name)(**options)).get_layer_status()
            }
            for lib in (peftfast, peft)
        )
        assert mine == other, name
    with pytest.raises(ValueError, match="No adapter layers found in the model"):
        peftfast.get_layer_status(oracle.llama())


def copies(model):
    yield "deepcopy", copy.deepcopy(model)
    yield "pickle", pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    yield "torch.save", torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("options", [FIRST, SAVED, TOKENS], ids=["lora", "modules_to_save", "tokens"])
def test_copies_are_whole_and_independent(options):
    model = peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(**options))
    model.add_adapter("other", peftfast.LoraConfig(**SECOND))
    model.eval()
    oracle.logits(model).sum().backward()
    expected = oracle.logits(model).detach()
    for kind, twin in copies(model):
        assert torch.equal(oracle.logits(twin), expected), kind
        oracle.same_live_state(twin, model)
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(3)
        assert not torch.equal(oracle.logits(twin), expected), kind
        assert torch.equal(oracle.logits(model), expected), kind
        twin.set_adapter("other")
        twin.merge_adapter()
        twin.delete_adapter("default")
        assert list(twin.peft_config) == ["other"] and sorted(model.peft_config) == ["default", "other"]
        assert torch.equal(oracle.logits(model), expected), kind
        twin.merge_and_unload()


def test_adapters_added_to_a_pickled_model_are_of_the_same_method():
    """Two of them that act on one input act as one step, and rows that both train are refused."""
    config = {"target_modules": ["down_proj"], "feedforward_modules": ["down_proj"]}
    outputs = []
    for copied in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        model = copied(peftfast.get_peft_model(oracle.llama(), peftfast.IA3Config(**config)))
        model.add_adapter("other", peftfast.IA3Config(**config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "ia3_" in name:
                    parameter.fill_(1.5)
        model.base_model.set_adapter(["default", "other"])
        outputs.append(oracle.logits(model.eval()).detach())
    assert torch.equal(*outputs)

    model = pickle.loads(pickle.dumps(peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(**TOKENS))))
    model.add_adapter("other", peftfast.LoraConfig(**TOKENS))
    with pytest.raises(ValueError, match="already defined and would result in undefined merging"):
        model.merge_adapter(["default", "other"])


def test_training_goes_on_alike():
    """The same losses step for step, and the same factors at the end."""
    pair = Pair({**FIRST, "init_lora_weights": True})
    losses = [oracle.descend(model.train(), 8) for model in (pair.ours, pair.theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.1


def test_safe_merge_refuses_what_cannot_be_stored():
    """Finite in the wide numbers of a merge, infinite in those of the weight."""
    base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model = peftfast.get_peft_model(base, peftfast.IA3Config(target_modules=["0"], feedforward_modules=[]))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.bias.fill_(torch.finfo(torch.float32).max)
        layer.ia3_l["default"].fill_(2.0)
    with pytest.raises(ValueError, match="NaNs detected in the merged bias.*default.*float32"):
        layer.merge(safe_merge=True)
    base = torch.nn.Sequential(torch.nn.Linear(4, 4)).half()
    model = peftfast.get_peft_model(base, peftfast.LoraConfig(target_modules=["0"], r=1, lora_alpha=1))
    layer = model.base_model.model[0]
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(1e3)
        layer.lora_B["default"].weight.fill_(1e3)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights.*default.*float16"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before) and layer.merged_adapters == []


def test_token_rows_that_two_adapters_train_cannot_be_active_twice():
    model = peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(**TOKENS))
    model.add_adapter("same", peftfast.LoraConfig(**{**TOKENS, "trainable_token_indices": [4, 7]}))
    model.add_adapter("else", peftfast.LoraConfig(**{**TOKENS, "trainable_token_indices": [5]}))
    for name in ("head", "other head"):
        model.add_adapter(
            name, peftfast.LoraConfig(target_modules=TOKENS["target_modules"], modules_to_save=["lm_head"])
        )
    only = "Only one adapter can be set at a time for"
    with pytest.raises(ValueError, match=f"{only} TrainableTokensWrapper.*common.*'model.embed_tokens'"):
        model.base_model.set_adapter(["default", "same"])
    with pytest.raises(ValueError, match=rf"^{only} ModulesToSaveWrapper\(Linear\), got 2: 'head', .*'lm_head'"):
        model.base_model.set_adapter(["head", "default", "other head"])
    assert model.active_adapters == ["default"]
    model.base_model.set_adapter(["default", "else"])
    assert torch.isfinite(oracle.logits(model)).all()


@pytest.mark.parametrize("options", [FIRST, SAVED, TOKENS])
def test_layers_say_where_they_keep_what_belongs_to_an_adapter(options):
    """As PEFT's do, so that code which goes through these names finds every tensor, and nothing after a deletion."""
    model = peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(**options))
    model.add_adapter("other", peftfast.LoraConfig(**options))

    def kept(name):
        tensors = set()
        for module in model.modules():
            for place in getattr(module, "adapter_layer_names", ()) + getattr(module, "other_param_names", ()):
                container = operator.attrgetter(place)(module)
                if name in container and isinstance(container, torch.nn.Module):
                    held = container[name]
                    tensors |= {held} if isinstance(held, torch.Tensor) else set(held.parameters())
        return tensors

    assert kept("other") == {p for n, p in model.named_parameters() if ".other" in n}
    model.delete_adapter("other")
    assert kept("other") == set() and kept("default")


def test_names_in_the_prefix_of_a_method(tmp_path):
    """PEFT warns of them where an adapter is added, and neither where a model is loaded nor of injected adapters."""
    peft.get_peft_model(oracle.llama(), peft.LoraConfig(**FIRST)).save_pretrained(tmp_path)
    said = []
    for library in (peftfast, peft):
        model = library.get_peft_model(oracle.llama(), library.LoraConfig(**FIRST))
        calls = {
            "get": lambda library=library: library.get_peft_model(oracle.llama(), library.LoraConfig(**FIRST), "a"),
            "from": lambda library=library: library.PeftModel.from_pretrained(oracle.llama(), tmp_path, "a"),
            "inject": lambda library=library: library.inject_adapter_in_model(
                library.LoraConfig(**FIRST), oracle.llama(), "a"
            ),
            "add": lambda library=library, model=model: model.add_adapter("lora", library.LoraConfig(**FIRST)),
            "load": lambda model=model: model.load_adapter(tmp_path, "or"),
            "combine": lambda model=model: model.add_weighted_adapter(["default"], [1.0], "o"),
        }
        found = set()
        for name, call in calls.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                call()
            found |= {name for w in caught if "should not be contained in the prefix 'lora_'" in str(w.message)}
        said.append(found)
    assert said[0] == said[1] == {"get", "add", "load"}


def test_a_model_without_adapters_says_so():
    model = peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(target_modules=["q_proj"]))
    model.unload()
    with pytest.raises(ValueError, match="no adapter: .* unloaded or deleted"):
        model.active_peft_config  # noqa: B018 (raises)


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("targets", [["q_proj"], ["k_proj"], ["q_proj", "k_proj"]], ids="+".join)
def test_the_last_injected_adapter_is_active(targets, inference_mode):
    """As PEFT has it where no PeftModel says which: diffusers loads adapter after adapter and sets none."""
    models = []
    for library in (peftfast, peft):
        functions = importlib.import_module(f"{library.__name__}.functional")
        model = library.inject_adapter_in_model(library.LoraConfig(**FIRST), oracle.llama(), "first")
        config = library.LoraConfig(r=3, target_modules=[*targets], inference_mode=inference_mode)
        oracle.quietly(library.inject_adapter_in_model, config, model, "second")
        models.append((model, functions))
    (ours, mine), (theirs, other) = models
    for step in (None, "second", "first", ["first", "second"]):
        if step is not None:
            mine.set_adapter(ours, step)
            other.set_adapter(theirs, step)
        oracle.same_live_state(ours, theirs)
        if step is None:
            assert any(p.requires_grad for n, p in ours.named_parameters() if ".first." in n)
            oracle.copy_parameters(theirs, ours)
        torch.testing.assert_close(oracle.logits(ours), oracle.logits(theirs), rtol=1e-4, atol=1e-4)


def test_injected_copies_of_modules_act_with_their_adapter():
    """PEFT leaves the copies inactive until `set_adapter`."""
    model = oracle.llama()
    for name in ("first", "second"):
        peftfast.inject_adapter_in_model(peftfast.LoraConfig(**SAVED), model, name)
    before = oracle.logits(model)
    with torch.no_grad():
        model.lm_head.modules_to_save["second"].weight.mul_(2)
    torch.testing.assert_close(oracle.logits(model), 2 * before)
    assert {p.requires_grad for p in model.lm_head.modules_to_save.parameters()} == {True}


def test_what_an_adapted_model_has_is_not_forgotten_when_it_is_wrapped(tmp_path):
    models = []
    for library in (peftfast, peft):
        once = oracle.quietly(library.get_peft_model, oracle.llama(), library.LoraConfig(**FIRST), "first")
        with pytest.warns(UserWarning, match="Already found a `peft_config` attribute in the model"):
            twice = library.get_peft_model(once.get_base_model(), library.LoraConfig(**SECOND), "second")
        models.append((once, twice))
    (mine, ours), (_, theirs) = models
    assert ours.peft_config is mine.peft_config is ours.get_base_model().peft_config
    assert list(ours.peft_config) == list(theirs.peft_config) == ["first", "second"]
    oracle.copy_parameters(theirs, ours)
    for step in (None, "first"):
        if step is not None:
            ours.set_adapter(step)
            theirs.set_adapter(step)
        oracle.same_live_state(ours, theirs)
        assert ours.active_adapters == theirs.active_adapters
        torch.testing.assert_close(oracle.logits(ours), oracle.logits(theirs), rtol=1e-4, atol=1e-4)
    for folder, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / folder)
    for name in ours.peft_config:
        oracle.same_files(tmp_path / "ours" / name, tmp_path / "theirs" / name)


def test_wrapping_again_under_the_same_name_replaces_the_adapter():
    """PEFT leaves the old one in modules that the new config does not name."""
    saved = {"modules_to_save": ["lm_head"]}
    old = oracle.quietly(peftfast.get_peft_model, oracle.llama(), peftfast.LoraConfig(**FIRST, **saved))
    base = old.get_base_model()
    before, state = old.peft_config["default"], {k: v.clone() for k, v in old.state_dict().items()}
    with pytest.raises(ValueError, match="not found in the base model"):
        oracle.quietly(peftfast.get_peft_model, base, peftfast.LoraConfig(target_modules=["nothing"]))
    assert old.peft_config == {"default": before} and state.keys() == old.state_dict().keys()
    old.merge_adapter()
    with pytest.raises(ValueError, match="Cannot replace adapter default while it is merged"):
        oracle.quietly(peftfast.get_peft_model, base, peftfast.LoraConfig(**SECOND))
    old.unmerge_adapter()
    again = oracle.quietly(peftfast.get_peft_model, base, peftfast.LoraConfig(**SECOND))
    fresh = peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(**SECOND))
    oracle.same_live_state(again, fresh)
    oracle.copy_parameters(fresh, again)
    assert torch.equal(oracle.logits(again), oracle.logits(fresh))


def test_an_injected_adapter_is_there_in_a_wrapper():
    base = peftfast.inject_adapter_in_model(peftfast.LoraConfig(**FIRST), oracle.llama(), "first")
    model = oracle.quietly(peftfast.get_peft_model, base, peftfast.LoraConfig(**SECOND), "second")
    assert list(model.peft_config) == ["first", "second"] and model.active_adapters == ["second"]
    assert any("k_proj" in key for key in peftfast.get_peft_model_state_dict(base, adapter_name="second"))


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("way", ["wrapped", "injected"])
def test_a_first_adapter_starts_in_training_mode(way, inference_mode):
    """Models from files are in eval mode: dropout acts in a loop that never says train() all the same, as with PEFT.
    What is for inference starts like its module, and so does what comes to a model that has adapters."""
    dropout, found = {"r": 2, "lora_dropout": 0.5, "target_modules": ["q_proj"]}, {}
    for library in (peftfast, peft):
        config = library.LoraConfig(**dropout, inference_mode=inference_mode)
        base = oracle.llama().eval()
        if way == "wrapped":
            model = library.get_peft_model(base, config)
        else:
            model = library.inject_adapter_in_model(config, base)
        found[library] = {n: m.training for n, m in model.named_modules() if n.endswith((".default", "q_proj"))}
        assert not any(m.training for n, m in model.named_modules() if n.endswith(("k_proj", "base_layer", "norm")))
        oracle.quietly(library.inject_adapter_in_model, library.LoraConfig(**dropout), base.eval(), "second")
        if library is peftfast:
            assert not any(m.training for n, m in model.named_modules() if n.endswith(".second"))
    assert found[peftfast] == (dict.fromkeys(found[peft], False) if inference_mode else found[peft])


class Dropping(nn.Embedding):
    """A table of somebody's own that consists of more than itself."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.drop = nn.Dropout(0.5)

    def forward(self, ids):
        return self.drop(super().forward(ids))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["table"]},
        {"target_modules": ["linear"], "modules_to_save": ["head"]},
        {"target_modules": ["linear"], "modules_to_save": ["table"]},
    ],
    ids=["adapted", "head saved", "table saved"],
)
def test_what_is_in_another_mode_than_its_module_stays_in_it(options):
    """As with PEFT: a frozen normalisation inside a head that trains has to keep its statistics."""
    found = []
    for library in (peftfast, peft):
        head = nn.Sequential(nn.BatchNorm1d(8).eval(), nn.Linear(8, 2))
        parts = {"table": Dropping(10, 8), "linear": nn.Linear(8, 8), "head": head}
        base = nn.Sequential(collections.OrderedDict(parts))
        base.table.drop.eval()
        model = library.get_peft_model(base, library.LoraConfig(r=2, **options))
        found.append({n: m.training for n, m in model.named_modules() if isinstance(m, (nn.Dropout, nn.BatchNorm1d))})
    assert found[0] == found[1] and not any(found[0].values())


@pytest.mark.parametrize("given", ["model", "tuner", "base", "compiled"])
def test_functions_for_bare_models_and_the_methods_of_a_wrapper_see_the_same_adapters(given):
    model = peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(**FIRST))
    compiled = torch.compile(model, backend="eager")
    target = {"model": model, "tuner": model.base_model, "base": model.get_base_model(), "compiled": compiled}[given]
    peftfast.inject_adapter_in_model(peftfast.LoraConfig(**SECOND), target, "second")
    assert model.active_adapters == ["second"] and set(model.peft_config) == {"default", "second"}
    peftfast.functional.set_adapter(target, "default")
    assert model.active_adapters == ["default"]
    alone = oracle.logits(model)
    model.set_adapter("second")
    peftfast.functional.delete_adapter(target, "second")
    assert model.active_adapters == ["default"] and torch.equal(oracle.logits(model), alone)
    base = model.unload()
    wrapped = peftfast.get_peft_model(base, peftfast.LoraConfig(**FIRST), "new")
    assert wrapped.active_adapters == ["new"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_injected_factors_have_the_dtype_of_the_base(dtype):
    """Without a PeftModel around it, nothing would cast fp32 factors once for all layers."""
    for library in (peftfast, peft):
        config = library.LoraConfig(**FIRST)
        for model in (
            library.inject_adapter_in_model(config, oracle.llama().to(dtype)),
            library.LoraModel(oracle.llama().to(dtype), config, "default"),
        ):
            assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {dtype}
    kept = peftfast.inject_adapter_in_model(
        peftfast.LoraConfig(**FIRST), oracle.llama().to(dtype), autocast_adapter_dtype=True
    )
    wide = torch.promote_types(dtype, torch.float32)
    assert {p.dtype for n, p in kept.named_parameters() if "lora_" in n} == {wide}


def test_a_saved_config_for_training_is_warned_of(tmp_path):
    """What `from_pretrained` of a config gives is for inference; a run that trains nothing would look like one."""
    peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(**FIRST)).save_pretrained(tmp_path)
    config = peftfast.LoraConfig.from_pretrained(tmp_path)
    with pytest.warns(peftfast.PeftWarning, match="inference_mode=True.* nothing will be trainable"):
        model = peftfast.patch(oracle.llama(), config)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("bias", ["none", "all"])
def test_switching_adapters_off_says_that_biases_stay(bias):
    for library in (peftfast, peft):
        config = library.LoraConfig(**FIRST, bias=bias)
        model = library.get_peft_model(oracle.llama(bias=True), config)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with model.disable_adapter():
                pass
            model.base_model.disable_adapter_layers()
        said = [
            w for w in caught if "Careful, disabling adapter layers with bias configured to be 'all'" in str(w.message)
        ]
        assert len(said) == (2 if bias == "all" else 0), library
        assert library is peft or all(w.filename == __file__ for w in said)


@pytest.fixture
def alone(tmp_path):
    """A process group of this process, as data-parallel training has."""
    import torch.distributed as dist
    import torch.distributed.fsdp  # noqa: F401  (Accelerate and transformers import it)

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("group", [None, "alone"])
def test_switching_and_loading_take_as_long_with_many_adapters(group, tmp_path, request):
    """By the calls of Python functions."""
    if group is not None:
        request.getfixturevalue(group)
    model = peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(**FIRST), "a0")
    model.save_pretrained(tmp_path)
    counts = []
    for wanted in (3, 20):
        for i in range(len(model.peft_config), wanted):
            model.add_adapter(f"a{i}", peftfast.LoraConfig(**FIRST))
        model.set_adapter("a1")
        switching = oracle.python_calls(lambda: model.set_adapter("a0"))
        loading = oracle.python_calls(lambda: model.load_adapter(tmp_path / "a0", "loaded"))
        model.delete_adapter("loaded")
        counts.append((switching, loading))
    (few, loaded), (many, loaded_later) = counts
    assert few == many and loaded_later <= 1.02 * loaded, counts


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_a_loss_without_gradient_says_what_gives_it_one(task, tmp_path):
    ids = torch.arange(6)[None]
    config = peftfast.LoraConfig(target_modules=["q_proj"], task_type=task)
    trained = peftfast.get_peft_model(oracle.llama(), config)
    trained.save_pretrained(tmp_path)
    frozen = peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", peftfast.PeftWarning)
        trained.train()(input_ids=ids, labels=ids).loss.backward()
        frozen(input_ids=ids, labels=ids)  # in evaluation
        with torch.no_grad():
            frozen.train()(input_ids=ids, labels=ids)
    with pytest.warns(peftfast.PeftWarning, match=r"no gradient.*is_trainable=True"):
        loss = frozen(input_ids=ids, labels=ids).loss
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()
    frozen.set_adapter("default")
    frozen(input_ids=ids, labels=ids).loss.backward()


def test_training_what_is_merged_or_disabled_says_so():
    model = peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(target_modules=["q_proj"])).train()
    batch = oracle.inputs(model)
    model.merge_adapter()
    with pytest.warns(peftfast.PeftWarning, match=r"no gradient.*'default' are merged.*unmerge_adapter\(\)"):
        model(**batch, labels=batch["input_ids"])
    model.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch, labels=batch["input_ids"]).loss.backward()
    with pytest.warns(peftfast.PeftWarning, match="no gradient.*adapters are disabled"), model.disable_adapter():
        model(**batch, labels=batch["input_ids"])
        torch.compile(model, backend="eager", fullgraph=True)(**batch, labels=batch["input_ids"])
