"""KaSA: the base truncated without touching it, several adapters, files both ways, losses, beside PEFT and an oracle.
Outputs and gradients on every storage are in test_weight_methods.py."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import oracle
import peft
import pytest
import torch
from oracle import (
    Twins,
    descend,
    llama,
    logits,
    quietly,
    same_gradients_checkpointed,
    same_gradients_compiled,
    same_live_state,
)  # fmt: skip
from torch import nn

import peftfast

TARGETS = ["q_proj", "v_proj", "down_proj"]


def options(library, r=4, **changes):
    changes = {"init_lora_weights": False, "kasa_config": library.KasaConfig(), "target_modules": TARGETS, **changes}
    return library.LoraConfig(r=r, lora_alpha=8, **changes)


def adapted(library=peftfast, make=llama, seed=1, **changes):
    torch.manual_seed(seed)
    return quietly(library.get_peft_model, make(), options(library, **changes)).eval()


def layer(model, name="q_proj"):
    return model.base_model.model.model.layers[0].self_attn.get_submodule(name)


def base_logits():
    with torch.no_grad():
        return logits(llama())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", [True, "gaussian"])
def test_a_seed_gives_pefts_model(dtype, init):
    ours, theirs = (adapted(library, lambda: llama().to(dtype), init_lora_weights=init) for library in (peftfast, peft))
    same_live_state(ours, theirs)
    other = dict(theirs.named_parameters())
    assert all(torch.equal(p, other[n]) for n, p in ours.named_parameters() if "lora_" in n)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=tolerance, atol=tolerance)


def test_training_is_pefts():
    losses = []
    for library in (peftfast, peft):
        model = adapted(library).train()
        losses.append(descend(model, beside=model._get_kasa_loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]


def test_dropout_drops_the_update_only():
    """With a dropout of one, what is left is the truncated base."""
    model = adapted(lora_dropout=1.0).train()
    weights = {}
    plain = llama()
    for name, module in plain.named_modules():
        if name.endswith(tuple(TARGETS)):
            u, s, vh = torch.linalg.svd(module.weight.data.double(), full_matrices=False)
            weights[name] = module.weight.data = ((u[:, :-4] * s[:-4]) @ vh[:-4]).float()
    assert weights
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)


def test_the_base_stays_as_it_is():
    model, before = adapted(), base_logits()
    with torch.no_grad():
        with model.disable_adapter():
            assert torch.equal(logits(model), before)
        model.add_adapter("second", options(peftfast, r=6))
        model.delete_adapter("default")
        model.set_adapter("second")
        model.merge_adapter()
        model.unmerge_adapter()
        names = dict(llama().named_parameters())
        for name, parameter in model.unload().named_parameters():
            assert torch.equal(parameter, names[name]), name


@pytest.mark.parametrize("ranks", [(4, 4), (3, 6), (6, 3)])
def test_two_active_truncate_once(ranks):
    """PEFT truncates for one after the other, which comes to the larger rank."""
    models = []
    for library in (peft, peftfast):
        model = adapted(library, r=ranks[0])
        torch.manual_seed(5)
        model.add_adapter("second", options(library, r=ranks[1]))
        model.base_model.set_adapter(["default", "second"])
        models.append(model.eval())
    with torch.no_grad():
        theirs, ours = map(logits, models)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        model = models[1]
        for merged in (["default"], ["second"], ["default", "second"]):
            for one in [m for m in model.modules() if hasattr(m, "merger")]:
                one.merge(adapter_names=merged)  # the layer's: the model's would switch the other one off
            torch.testing.assert_close(logits(model), theirs, rtol=1e-3, atol=1e-4)
            model.unmerge_adapter()
        assert torch.equal(logits(model), ours)


def test_beside_a_lora():
    """Each acts on the base that it was trained with; PEFT refuses the two."""
    model = adapted()
    lora = peftfast.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter("lora", lora)
    alone = quietly(peftfast.get_peft_model, llama(), copy.deepcopy(lora)).eval()
    oracle.copy_parameters(
        nn.ModuleDict({"m": layer(model).lora_A["lora"]}), nn.ModuleDict({"m": layer(alone).lora_A["default"]})
    )
    for i in range(2):
        for slot in ("lora_A", "lora_B"):
            mine, other = (getattr(m.base_model.model.model.layers[i].self_attn.q_proj, slot) for m in (alone, model))
            mine["default"].weight.data.copy_(other["lora"].weight.data)
    with torch.no_grad():
        model.set_adapter("lora")
        torch.testing.assert_close(logits(model), logits(alone), rtol=1e-5, atol=1e-5)
        model.set_adapter("default")
        kasa, ids = logits(model), oracle.inputs(model)["input_ids"]
        rows = model(input_ids=ids, adapter_names=["default", "__base__"]).logits
        torch.testing.assert_close(rows, torch.stack([kasa[0], base_logits()[1]]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("low", [False, True])
def test_files_both_ways(tmp_path, low):
    ours, theirs = adapted(), adapted(peft)
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / name)
    for library, folder, other in ((peftfast, "theirs", theirs), (peft, "ours", ours)):
        loaded = quietly(library.PeftModel.from_pretrained, llama(), tmp_path / folder, low_cpu_mem_usage=low).eval()
        with torch.no_grad():
            torch.testing.assert_close(logits(loaded), logits(other), rtol=1e-4, atol=1e-4)
    twins = Twins(llama, {"r": 4, "target_modules": TARGETS, "kasa_config": {"beta": 0.5, "gamma": 0.25}})
    for name, model in (("a", twins.ours), ("b", twins.theirs)):
        model.save_pretrained(tmp_path / name)
    mine, other = (oracle.saved_config(tmp_path / name) for name in "ab")
    assert mine == other and mine["kasa_config"] == {"beta": 0.5, "gamma": 0.25}


def test_loading_beside_merged_and_onto_the_meta_device(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = logits(model)
        other = quietly(peftfast.get_peft_model, llama(), peftfast.LoraConfig(r=2, target_modules=["q_proj"]))
        other.merge_adapter()
        with pytest.raises(ValueError, match="starts from the base weights, which contain default"):
            other.load_adapter(tmp_path, "kasa")
        late = peftfast.PeftModel.from_pretrained(llama().to("meta"), tmp_path, low_cpu_mem_usage=True)
        with pytest.raises(ValueError, match="on the meta device and has no values"):
            logits(late)
        for module in late.modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.is_meta:
                    module._parameters[key] = nn.Parameter(torch.empty_like(parameter, device="cpu"))
        late.load_state_dict(model.state_dict(), strict=False)
        late.base_model.model.model.rotary_emb = llama().model.rotary_emb
        torch.testing.assert_close(logits(late.eval()), expected, rtol=1e-5, atol=1e-5)


def test_a_model_without_values_is_filled():
    """As frameworks do that move a model to the meta device and load it in another process."""
    model = adapted()
    state, rotary = copy.deepcopy(model.state_dict()), llama().model.rotary_emb
    with torch.no_grad():
        expected = logits(model)
        model.to("meta").to_empty(device="cpu").load_state_dict(state)
        model.base_model.model.model.rotary_emb = rotary
        torch.testing.assert_close(logits(model), expected)


def test_injected_on_the_meta_device_and_filled_from_a_state_dict():
    model = adapted()
    base = llama()
    peftfast.inject_adapter_in_model(options(peftfast), base, low_cpu_mem_usage=True)
    assert all(p.is_meta for n, p in base.named_parameters() if "lora_" in n)
    state = {k.removeprefix("base_model.model."): v for k, v in peftfast.get_peft_model_state_dict(model).items()}
    peftfast.set_peft_model_state_dict(base, state, low_cpu_mem_usage=True)
    with torch.no_grad():
        torch.testing.assert_close(logits(base.eval()), logits(model), rtol=1e-5, atol=1e-5)


def test_copies_pickles_and_casts():
    model = adapted()
    with torch.no_grad():
        expected = logits(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(logits(other), expected, rtol=0, atol=0)
        torch.testing.assert_close(logits(model.double()).float(), expected, rtol=1e-4, atol=1e-4)


def test_loss_is_pefts():
    """In value and in gradient, over several adapters with coefficients of their own."""
    found = []
    for library in (peft, peftfast):
        model = adapted(library)
        torch.manual_seed(4)
        model.add_adapter("second", options(library, kasa_config=library.KasaConfig(beta=0.3, gamma=0.2)))
        model.base_model.set_adapter(["default", "second"])
        loss = model._get_kasa_loss()
        loss.backward()
        gradients = oracle.gradients(model)
        found.append((loss, float(model._get_kasa_loss("second")), gradients))
    (theirs, their_second, their_gradients), (ours, second, gradients) = found
    torch.testing.assert_close(ours, theirs)
    assert second == pytest.approx(their_second) and gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-4, atol=1e-6)


def test_the_loss_is_not_added_by_itself():
    model = adapted()
    ids = oracle.inputs(model)["input_ids"]
    with_labels = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(with_labels, model.model.loss_function(logits(model), ids, vocab_size=oracle.VOCABULARY))
    plain = quietly(peftfast.get_peft_model, llama(), peftfast.LoraConfig(target_modules=TARGETS))
    assert plain._get_kasa_loss() == 0.0


def test_a_plain_lora_of_twice_the_rank_is_the_same(tmp_path):
    model = adapted()
    peftfast.save_as_lora(tmp_path, model, rank=8)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)
        merged = copy.deepcopy(model).merge_and_unload()
        change = layer(model).get_delta_weight("default")
        torch.testing.assert_close(
            merged.model.layers[0].self_attn.q_proj.weight, layer(model).weight + change, rtol=1e-5, atol=1e-5
        )


def test_hooks_on_the_factors_act():
    ours, theirs = adapted(), adapted(peft)
    for model in (ours, theirs):
        layer(model).lora_A["default"].register_forward_hook(lambda module, args, output: output * 2)
    with torch.no_grad():
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)


def test_lora_bias():
    ours, theirs = (
        adapted(library, lambda: llama(bias=True), lora_bias=True, target_modules=["q_proj"])
        for library in (peftfast, peft)
    )
    with torch.no_grad():
        for model in (ours, theirs):
            for i, bias in enumerate(p for n, p in model.named_parameters() if n.endswith("lora_B.default.bias")):
                bias.copy_(torch.linspace(-1, 1 + i, len(bias)))
        oracle.copy_parameters(theirs, ours, only="lora_")  # the base is truncated there, and is not here
        expected = logits(ours)
        torch.testing.assert_close(expected, logits(theirs), rtol=1e-4, atol=1e-4)
        ours.merge_adapter()
        torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)


def test_compiled_is_eager():
    same_gradients_compiled(adapted().train())


def test_gradient_checkpointing_and_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        same_gradients_checkpointed(adapted().train(), False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 32}, r"q_proj: KaSA requires `r` \(32\) to be smaller than min\(in_features, out_features\)"),
        ({"target_modules": ["embed_tokens"]}, "defined for linear layers, not for a Embedding"),
        ({"init_lora_weights": "mica"}, "'mica' is not supported together with kasa_config"),
        ({"use_dora": True}, "use_dora, kasa_config; set one of them"),
        ({"kasa_config": 123}, "kasa_config"),
        ({"kasa_config": {"beta": -1}}, "beta"),
        ({"kasa_config": {"betta": 1}}, "betta"),
    ],
)
def test_refusals_change_nothing(changes, message):
    model = llama()
    with pytest.raises((ValueError, TypeError), match=message):
        peftfast.get_peft_model(model, options(peftfast, **changes))
    assert not any(isinstance(m, peftfast.layers.layer.BaseTunerLayer) for m in model.modules())


def test_combining_and_swapping(tmp_path):
    model = adapted()
    with pytest.raises(TypeError, match="KaSA .* does not support add_weighted_adapter"):
        model.add_weighted_adapter(["default"], [1.0], "more")
    other = adapted(seed=9)
    other.save_pretrained(tmp_path / "same")
    peftfast.hotswap_adapter(model, tmp_path / "same", "default")
    with torch.no_grad():
        torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-5)
    adapted(r=2).save_pretrained(tmp_path / "less")
    with pytest.raises(ValueError, match="cannot be padded to another rank"):
        peftfast.hotswap_adapter(model, tmp_path / "less", "default")


def test_what_is_said_of_it(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    line = peftfast.adapter_contents(tmp_path).lines["model.layers.0.self_attn.q_proj"]
    a, b, d = (layer(model).adapters["default"][slot] for slot in ("lora_A", "lora_B", "lora_diag"))
    assert line.startswith(f"rank 4, change of norm {float((2 * (b * d) @ a).norm()):.3g}, ")
    assert line.endswith("the base without its 4 smallest singular values")
    plan = peftfast.plan_adapter(llama(), options(peftfast))
    assert plan.trainable_parameters == model.get_nb_trainable_parameters()[0]
    verdicts = {v.server: v.verdict for v in plan.servers}
    assert (verdicts["vLLM"], verdicts["llama.cpp"]) == ("refuses", "refuses")


@pytest.mark.parametrize("by", ["set_base_model_state_dict", "load_state_dict"])
def test_other_base_weights_have_other_components(by):
    """What is left out of the base is that of the weights that are there."""

    def other_base():
        torch.manual_seed(5)
        base = llama()
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return base

    model, fresh = adapted(), adapted(make=other_base)
    with torch.no_grad():
        fresh.load_state_dict({n: p for n, p in model.named_parameters() if "lora_" in n}, strict=False)
        mine, expected = logits(model), logits(fresh)
        own = copy.deepcopy(model.state_dict())
        model.merge_adapter()
        inside = logits(model)
        if by == "load_state_dict":
            model.load_state_dict(copy.deepcopy(model.state_dict()))
            load, other = model.load_state_dict, fresh.state_dict()
        else:
            load, other = partial(peftfast.set_base_model_state_dict, model), other_base().state_dict()
            with pytest.raises(RuntimeError, match=r"\['default'\] are inside the base weights"):
                load(other)
        assert torch.equal(logits(model), inside)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), mine)
        load(other)
        torch.testing.assert_close(logits(model), expected)
        model.load_state_dict(own)
        torch.testing.assert_close(logits(model), mine)
