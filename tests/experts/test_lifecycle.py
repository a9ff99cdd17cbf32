"""Several adapters, what is refused, checkpointing, mixed precision, plans, on models with fused experts."""

import copy
import importlib
import pickle
import threading
import time

import oracle
import pytest
import torch
from experts import moe

import peftfast
from peftfast.wrapping import expert_targets

peft = importlib.import_module("peft")
OPTIONS = {"r": 4, "target_parameters": moe.BOTH, "target_modules": ["q_proj"]}


def adapted(library=peftfast, make=moe.qwen3_moe, names=("a",), **changes):
    options = {**OPTIONS, **changes}
    model = oracle.quietly(library.get_peft_model, make(), library.LoraConfig(**options), names[0])
    for i, name in enumerate(names[1:]):
        model.add_adapter(name, library.LoraConfig(**{**options, "r": 3 + i}))
    return oracle.randomised(model, 0.3).eval()


@pytest.mark.parametrize("make", [moe.qwen3_moe, moe.gpt_oss, moe.plain], ids=lambda make: make.__name__)
def test_several_adapters(make):
    changes = {"target_parameters": ["inner", "outer", "mix"], "target_modules": []} if make is moe.plain else {}
    ours, theirs = (adapted(library, make, ("a", "b", "c"), **changes) for library in (peftfast, peft))
    oracle.same_live_state(ours, theirs)
    with torch.no_grad():
        for names in (["a"], ["b"], ["c", "a"], ["a", "b", "c"]):
            for model in (ours, theirs):
                model.base_model.set_adapter(names)
            oracle.close(oracle.logits(ours), oracle.logits(theirs))
        expected = oracle.logits(ours)
        before = {n: p.clone() for n, p in ours.named_parameters()}
        ours.merge_adapter(["a"])
        ours.merge_adapter(["c", "b"])
        oracle.close(oracle.logits(ours), expected)
        assert ours.get_model_status().merged_adapters == ["a", "b", "c"]  # a call leaves them merged
        ours.unmerge_adapter()
        assert all(torch.equal(p, before[n]) for n, p in ours.named_parameters())
        ours.merge_adapter(["b"])
        with ours.disable_adapter():
            oracle.close(oracle.logits(ours), oracle.logits(make()))
        assert all(torch.equal(p, before[n]) for n, p in ours.named_parameters())
    for model in (ours, theirs):
        model.base_model.set_adapter("b")
        model.delete_adapter("a")
    oracle.same_live_state(ours, theirs)
    oracle.close(oracle.logits(ours), oracle.logits(theirs))


def close_to_its_size(value, expected):
    """Gradients here are of 1e-5."""
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_gradients_of_several():
    ours, theirs = (adapted(library, names=("a", "b")) for library in (peftfast, peft))
    for model in (ours, theirs):
        model.base_model.set_adapter(["a", "b"])
        oracle.logits(model).pow(2).mean().backward()
    grads = oracle.gradients(theirs)
    assert any(".b." in n for n in grads)
    for name, parameter in ours.named_parameters():
        if name in grads:
            close_to_its_size(parameter.grad, grads[name])


def test_other_parameters_once_the_first_adapter_is_gone(tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match="must target the same set of parameters.*adapter 'a'"):
        model.add_adapter("b", peftfast.LoraConfig(target_parameters=["down_proj"], target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="of which another adapter adapts Parameters"):
        model.add_adapter("b", peftfast.LoraConfig(target_modules=r".*\.experts"))
    model.add_adapter("b", peftfast.LoraConfig(target_modules=["v_proj"]))
    model.set_adapter("b")
    model.delete_adapter("a")
    model.add_adapter("c", peftfast.LoraConfig(target_parameters=["down_proj"], target_modules=["q_proj"]))
    oracle.randomised(model, 0.3).base_model.set_adapter(["c"])
    expected = oracle.logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["c"])
    moe.needs_peft_to_load()
    theirs = oracle.quietly(peft.PeftModel.from_pretrained, moe.qwen3_moe(), tmp_path / "c")
    oracle.close(oracle.logits(theirs), expected)  # on a model that never had another adapter


def test_a_failed_load_leaves_the_model(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = moe.qwen3_moe(experts=8)
    before = [(n, type(m)) for n, m in model.named_modules()]
    with pytest.raises(peftfast.AdapterLoadError, match="size mismatch.*experts"):
        peftfast.PeftModel.from_pretrained(model, tmp_path / "a")
    assert [(n, type(m)) for n, m in model.named_modules()] == before


def test_loaded_beside_another_and_unloaded(tmp_path):
    model = adapted()
    expected = oracle.logits(model).detach()
    model.save_pretrained(tmp_path)
    other = adapted(names=("x",))
    other.load_adapter(tmp_path / "a", "a")
    other.set_adapter("a")
    oracle.close(oracle.logits(other), expected)
    base = other.unload()
    assert torch.equal(oracle.logits(base), oracle.logits(moe.qwen3_moe()))
    assert [n for n, _ in base.named_modules()] == [n for n, _ in moe.qwen3_moe().named_modules()]


def test_beside_layers_that_set_fan_in_fan_out(tmp_path):
    """PEFT fails here. The field follows from the layers and says nothing of the Parameters."""
    config = peftfast.LoraConfig(r=4, target_modules=["c_attn"], target_parameters=["c_fc.weight"])
    model = oracle.randomised(oracle.quietly(peftfast.get_peft_model, oracle.gpt2(), config), 0.3)
    assert model.peft_config["default"].fan_in_fan_out
    model.base_model.add_weighted_adapter(["default"], [2.0], "twice")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        oracle.close(oracle.logits(peftfast.PeftModel.from_pretrained(oracle.gpt2(), tmp_path)), oracle.logits(model))
    with pytest.raises(ValueError, match="does not work with fan_in_fan_out=True"):
        alone = peftfast.LoraConfig(target_modules=[], target_parameters=["c_fc.weight"], fan_in_fan_out=True)
        peftfast.get_peft_model(oracle.gpt2(), alone)


@pytest.mark.parametrize("transposed", [False, True])
def test_what_training_changed_as_an_adapter_of_its_own(transposed, tmp_path):
    """Every expert has its own ranks, so its initial factors go beside its own."""
    changes = {
        "target_parameters": ["inner", "outer", "mix"],
        "target_modules": [],
        "rank_pattern": {"^stacks.inner": 3},
    }
    model = adapted(make=lambda: moe.plain(transposed), names=("default",), **changes)

    def change_of(adapter):
        merged = copy.deepcopy(adapter).merge_and_unload()
        return {n: p - before for (n, p), before in zip(merged.named_parameters(), base, strict=True)}

    base = list(moe.plain(transposed).parameters())
    model.save_pretrained(tmp_path / "initial")
    at_first = change_of(model)
    trained = change_of(oracle.randomised(model, 0.3, 4))
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    found = change_of(peftfast.PeftModel.from_pretrained(moe.plain(transposed), tmp_path / "plain"))
    for name, change in found.items():
        oracle.close(change, trained[name] - at_first[name])


def test_injected(tmp_path):
    model = peftfast.inject_adapter_in_model(peftfast.LoraConfig(**OPTIONS), moe.qwen3_moe())
    oracle.randomised(model, 0.3)
    state = peftfast.get_peft_model_state_dict(model)
    fresh = peftfast.inject_adapter_in_model(peftfast.LoraConfig(**OPTIONS), moe.qwen3_moe())
    peftfast.set_peft_model_state_dict(fresh, state)
    oracle.close(oracle.logits(fresh), oracle.logits(model))
    with pytest.raises(ValueError, match="inject the adapter without the state_dict"):
        peftfast.inject_adapter_in_model(peftfast.LoraConfig(**OPTIONS), moe.qwen3_moe(), state_dict=state)


def test_status_and_copies():
    ours, theirs = adapted(), adapted(peft)
    mine, other = (
        {
            s.name: (s.module_type, s.active_adapters, s.requires_grad)
            for s in model.get_layer_status()
            if "exp" in s.name
        }
        for model in (ours, theirs)
    )
    assert mine == other and len(mine) == 4
    layer = ours.base_model.model.model.layers[0].mlp.experts
    assert isinstance(layer, peft.tuners.lora.layer.ParamWrapper) and "parameter_name='down_proj'" in repr(layer)
    expected = oracle.logits(ours)
    copied = copy.deepcopy(ours)
    for model in (copied, pickle.loads(pickle.dumps(ours))):
        assert torch.equal(oracle.logits(model), expected)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    assert torch.equal(oracle.logits(copied), oracle.logits(moe.qwen3_moe()))
    assert torch.equal(oracle.logits(ours), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    plain, checked = adapted(names=("a",)), adapted(names=("a",))
    checked.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, checked):
        model.train()
        oracle.logits(model).pow(2).mean().backward()
    grads = oracle.gradients(plain)
    assert any("experts" in n for n in grads)
    for name, parameter in checked.named_parameters():
        if name in grads:
            close_to_its_size(parameter.grad, grads[name])


def test_compiled():
    """The graph is another formula: with the change inside the weights, which needs no look at what is routed."""
    model = adapted(make=moe.eager(moe.qwen3_moe, "batched_mm"))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        oracle.close(compiled(**oracle.inputs(model), use_cache=False).logits, oracle.logits(model))


# ---- what is not supported ------------------------------------------------------------------------------
class Slow(torch.nn.Module):
    """Gives others time to come in while it runs."""

    def __init__(self):
        super().__init__()
        self.weight, self.entered = torch.nn.Parameter(torch.eye(4)), threading.Event()

    def forward(self, x):
        self.entered.set()
        time.sleep(0.05)
        return x @ self.weight


def test_threads():
    config = peftfast.LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"], init_lora_weights=False)
    model = peftfast.get_peft_model(torch.nn.Sequential(Slow()), config)
    slow = model.base_model.model[0].get_base_layer()
    weight, x = slow.weight, torch.randn(3, 4)
    expected, found = model(x), []
    slow.entered.clear()
    other = threading.Thread(target=lambda: found.append(model(x)))
    other.start()
    slow.entered.wait()
    found.append(model(x))
    other.join()
    assert all(torch.equal(y, expected) for y in found) and len(found) == 2
    assert slow._parameters["weight"] is weight and torch.equal(weight, torch.eye(4))


def test_uniform_batches():
    model = adapted(names=("a", "b"))
    with torch.no_grad():
        model.set_adapter("b")
        expected = oracle.logits(model)
        model.set_adapter("a")
        oracle.close(oracle.logits(model, adapter_names=["b", "b"]), expected)
        assert torch.equal(oracle.logits(model, adapter_names=["__base__"] * 2), oracle.logits(moe.qwen3_moe()))
        oracle.close(oracle.logits(model, adapter_names=["b", "b"]), expected)


def test_slots_of_modules_take_no_parameters(tmp_path):
    model = adapted(names=("a", "b"))
    model.save_pretrained(tmp_path)
    pool = peftfast.AdapterPool(moe.qwen3_moe(), slots=1, max_rank=8, target_modules=["q_proj"])
    pool.register("a", tmp_path / "a")
    with pytest.raises(ValueError, match="no slot takes: .*experts"), pool.use(["a"]):
        pass
    with pytest.raises(ValueError, match="Slots are for modules, and .*experts.*target_parameters"):
        peftfast.AdapterPool(model.get_base_model(), slots=1, target_modules=["experts"])


@pytest.mark.parametrize("method", ["AdaLoraConfig", "IA3Config"])
def test_other_methods(method):
    fields = {"total_step": 10} if method == "AdaLoraConfig" else {"feedforward_modules": []}
    config = getattr(peftfast, method)(target_modules=["q_proj"], **fields)
    config.target_parameters = moe.BOTH
    with pytest.raises((ValueError, TypeError), match="target_parameters"):
        peftfast.get_peft_model(moe.qwen3_moe(), config)


def test_packed_and_computed_parameters():
    model = moe.plain()
    model.stacks.inner = torch.nn.Parameter(torch.zeros(3, 8, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="stacks.inner is stored as torch.int8"):
        peftfast.get_peft_model(model, peftfast.LoraConfig(target_parameters=["inner"]))
    model = moe.plain()
    torch.nn.utils.parametrize.register_parametrization(model.stacks, "inner", torch.nn.Identity())
    with pytest.raises(ValueError, match="stacks.inner is computed by a parametrization"):
        peftfast.get_peft_model(model, peftfast.LoraConfig(target_parameters=["inner"]))


def test_without_the_table_of_transformers(monkeypatch):
    """A release that keeps it elsewhere: no guess, and no silence."""

    def gone(model):
        raise ImportError("no such table")

    monkeypatch.setattr(expert_targets, "family_of", gone)
    for targets in (["gate_proj", "up_proj", "down_proj"], "all-linear"):
        with pytest.raises(ValueError, match=r"no such table.*target_parameters="):
            peftfast.get_peft_model(moe.qwen3_moe(), peftfast.LoraConfig(target_modules=targets))
    peftfast.get_peft_model(moe.qwen3_moe(), peftfast.LoraConfig(target_modules=["q_proj"]))
    peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(target_modules=["gate_proj"]))


def test_layers_that_share_names_with_experts_are_named():
    with pytest.warns(peftfast.PeftWarning, match=r"layers\.0\.mlp\.gate_proj.*not adapted.*mlp\.gate_proj\.weight"):
        names = ["gate_proj", "up_proj", "down_proj"]
        peftfast.get_peft_model(moe.deepseek_v3(), peftfast.LoraConfig(target_modules=names))


def test_plan():
    config = peftfast.LoraConfig(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"], r=4)
    plan = peftfast.plan_adapter(moe.qwen3_moe(), config)
    model = peftfast.get_peft_model(moe.qwen3_moe(), config)
    assert plan.refusal is None and not plan.notes
    assert plan.trainable_parameters == model.get_nb_trainable_parameters()[0]
    assert plan.ranks["model.layers.1.mlp.experts.gate_up_proj"] == 8
    assert {t.name: t.status for t in plan.targets} == {
        "q_proj": "matched", "parameter gate_up_proj": "matched", "parameter down_proj": "matched",
    }  # fmt: skip
    half = peftfast.plan_adapter(moe.qwen3_moe(), peftfast.LoraConfig(target_modules=["up_proj"]))
    assert "without also targeting gate_proj" in half.refusal
