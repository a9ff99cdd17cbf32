"""`target_parameters`, and what `target_modules` becomes on models with fused experts, against PEFT: live names and
values, configs, logits, gradients, files both ways, merging."""

import json

import oracle
import pytest
import torch
import transformers
from experts import moe

import peftfast
from peftfast.layers.layer import BaseTunerLayer

EXPERTS = ["gate_proj", "up_proj", "down_proj"]

#: id -> (base model, fields)
CASES = {
    "qwen3-both": (moe.qwen3_moe, {"target_parameters": moe.BOTH, "target_modules": ["q_proj"]}),
    "qwen3-many-experts": (lambda: moe.qwen3_moe(24), {"target_parameters": moe.BOTH}),
    "qwen3-one": (moe.qwen3_moe, {"target_parameters": ["down_proj"], "r": 4, "lora_alpha": 3}),
    "qwen3-full-name": (moe.qwen3_moe, {"target_parameters": ["model.layers.1.mlp.experts.gate_up_proj"]}),
    "qwen3-router": (moe.qwen3_moe, {"target_parameters": ["mlp.gate.weight", *moe.BOTH]}),
    "qwen3-patterns": (
        moe.qwen3_moe,
        {"target_parameters": moe.BOTH, "rank_pattern": {"gate_up_proj": 2}, "alpha_pattern": {r".*1\.mlp.*": 32}},
    ),
    "qwen3-rslora": (moe.qwen3_moe, {"target_parameters": moe.BOTH, "use_rslora": True}),
    "qwen3-gaussian": (moe.qwen3_moe, {"target_parameters": moe.BOTH, "init_lora_weights": "gaussian"}),
    "qwen3-random": (moe.qwen3_moe, {"target_parameters": moe.BOTH, "init_lora_weights": False}),
    "qwen3-eager": (moe.eager(moe.qwen3_moe), {"target_parameters": moe.BOTH}),
    "qwen3-batched": (moe.eager(moe.qwen3_moe, "batched_mm"), {"target_parameters": moe.BOTH}),
    "qwen3-names": (moe.qwen3_moe, {"target_modules": EXPERTS}),
    "qwen3-names-and-router": (moe.qwen3_moe, {"target_modules": ["mlp.gate", "q_proj", *EXPERTS], "r": 3}),
    "qwen3-all-linear": (moe.qwen3_moe, {"target_modules": "all-linear"}),
    "qwen3-regex": (moe.qwen3_moe, {"target_modules": r".*\.(q|v|gate|up|down)_proj"}),
    "qwen3-regex-experts": (moe.qwen3_moe, {"target_modules": r".*mlp\.experts\.(gate|up)_proj"}),
    "qwen3-attention": (moe.qwen3_moe, {"target_modules": ["q_proj"]}),
    "mixtral-both": (moe.mixtral, {"target_parameters": moe.BOTH}),
    "mixtral-names": (moe.mixtral, {"target_modules": ["w1", "w2", "w3"], "r": 3, "use_rslora": True}),
    "mixtral-all-linear": (moe.mixtral, {"target_modules": "all-linear"}),
    "mixtral-down": (moe.mixtral, {"target_modules": ["w2", "gate", "v_proj"]}),
    "deepseek-both": (moe.deepseek_v3, {"target_parameters": moe.BOTH}),
    "deepseek-all-linear": (moe.deepseek_v3, {"target_modules": "all-linear"}),
    "gpt-oss-both": (moe.gpt_oss, {"target_parameters": moe.BOTH, "target_modules": ["q_proj"]}),
    "gpt-oss-eager": (moe.eager(moe.gpt_oss), {"target_parameters": ["gate_up_proj", "router.weight"]}),
    "gpt-oss-bias": (moe.gpt_oss, {"target_parameters": moe.BOTH, "bias": "all"}),
    "gpt-oss-bias-stack": (moe.gpt_oss, {"target_parameters": ["experts.gate_up_proj_bias", "down_proj"]}),
    "linear-weight": (oracle.llama, {"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]}),
    "plain": (moe.plain, {"target_parameters": ["stacks.inner", "outer"]}),
    "plain-matrix": (moe.plain, {"target_parameters": ["mix", "outer"]}),
    "plain-transposed": (lambda: moe.plain(True), {"target_parameters": ["inner", "outer", "mix"]}),
}


@pytest.fixture(params=CASES, scope="module")
def twins(request):
    make, options = CASES[request.param]
    pair = oracle.Twins(make, {"r": 4, **options})
    try:
        oracle.logits(make()).mean().backward()
        oracle.logits(pair.theirs)
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"transformers {transformers.__version__} by itself, or PEFT on it, does not run this: {error}")
    return pair


def plain_config(cfg):
    """As the file has it: in it the order of sets means nothing."""
    data = json.loads(cfg.to_json()) if hasattr(cfg, "to_json") else cfg.to_dict()
    data = {k: sorted(v) if isinstance(v, (set, list)) else v for k, v in data.items() if k != "peft_version"}
    return {k: getattr(v, "value", v) for k, v in data.items() if k != "runtime_config"}


@pytest.mark.parametrize("case", CASES)
def test_the_same_seed_gives_the_same_adapter(case):
    make, options = CASES[case]
    pair = oracle.Twins(make, {"r": 4, **options}, same=False)
    oracle.same_live_state(pair.ours, pair.theirs)
    theirs = dict(pair.theirs.named_parameters())
    for name, parameter in pair.ours.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=0, atol=0)
    assert plain_config(pair.ours.peft_config["default"]) == plain_config(pair.theirs.peft_config["default"])
    assert pair.ours.get_nb_trainable_parameters() == pair.theirs.get_nb_trainable_parameters()
    assert sorted(pair.ours.base_model.targeted_parameter_names) == sorted(
        pair.theirs.base_model.targeted_parameter_names
    )


def test_warnings_alike(twins):
    for text in twins.their_warnings:
        # PEFT looks for rank patterns among modules only, and so warns of those that it wrote itself
        if "pattern keys did not match" not in text:
            assert any(text.strip()[:60] == other.strip()[:60] for other in twins.our_warnings), text
    assert not any("pattern keys" in text for text in twins.our_warnings)


def test_logits_and_gradients(twins):
    for model in (twins.ours, twins.theirs):
        model.zero_grad()
    ours, theirs = oracle.logits(twins.ours), oracle.logits(twins.theirs)
    oracle.close(ours, theirs)
    ours.pow(2).mean().backward()
    theirs.pow(2).mean().backward()
    grads = oracle.gradients(twins.theirs)
    assert grads and {n for n, p in twins.ours.named_parameters() if p.grad is not None} == set(grads)
    largest = max(g.abs().max().item() for g in grads.values())
    for name, parameter in twins.ours.named_parameters():
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-5 * largest)


def test_disabled(twins):
    with twins.ours.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(oracle.logits(twins.ours), oracle.logits(twins.make()), rtol=0, atol=0)


def test_files_both_ways(twins, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    oracle.quietly(twins.ours.save_pretrained, ours)
    oracle.quietly(twins.theirs.save_pretrained, theirs)
    oracle.same_files(ours, theirs)
    with torch.no_grad():
        expected = oracle.logits(twins.theirs)
        for folder in (theirs, ours):
            loaded = oracle.quietly(peftfast.PeftModel.from_pretrained, twins.make(), folder)
            oracle.close(oracle.logits(loaded), expected)
        strictly = peftfast.PeftModel.from_pretrained(twins.make(), ours, strict=True, low_cpu_mem_usage=True)
        oracle.close(oracle.logits(strictly), expected)
        if any("experts" in name for name, _ in twins.make().named_modules()):
            moe.needs_peft_to_load()
        loaded = oracle.quietly(twins.peft.PeftModel.from_pretrained, twins.make(), ours)
        oracle.close(oracle.logits(loaded), expected)
    here = oracle.quietly(peftfast.PeftModel.from_pretrained, twins.make(), theirs, is_trainable=True)
    there = oracle.quietly(twins.peft.PeftModel.from_pretrained, twins.make(), ours, is_trainable=True)
    oracle.same_live_state(here, there)


def test_changes_of_the_weights(twins):
    layers = {n: m for n, m in twins.ours.named_modules() if isinstance(m, BaseTunerLayer)}
    theirs = dict(twins.theirs.named_modules())
    for name, layer in layers.items():
        expected = theirs[name].get_delta_weight("default")
        oracle.close(layer.get_delta_weight("default").reshape(expected.shape), expected)


def test_which_factor_goes_with_which_side(twins):
    """Unsloth computes with the factors itself, and asks for PEFT's own word of where they go."""
    layers = dict(twins.ours.named_modules())
    for key, theirs in twins.theirs.named_modules():
        if not hasattr(theirs, "get_delta_factors"):
            continue
        ours = layers[key]
        assert ours._did_swap_in_out_features is theirs._did_swap_in_out_features
        left, right, scale = ours.get_delta_factors("default")
        oracle.close((left @ right * scale).reshape(ours.get_param().shape), theirs.get_delta_weight("default"))


def test_merging(twins):
    before = {n: p.clone() for n, p in twins.ours.named_parameters()}
    with torch.no_grad():
        expected = oracle.logits(twins.theirs)
        twins.ours.merge_adapter()
        oracle.close(oracle.logits(twins.ours), expected)
        twins.ours.unmerge_adapter()
    for name, parameter in twins.ours.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_merge_and_unload(twins):
    """Last in the file: the twins of this case are used up."""
    with torch.no_grad():
        expected = oracle.logits(twins.theirs)
        ours = oracle.quietly(twins.ours.merge_and_unload, safe_merge=True)
        oracle.close(oracle.logits(ours), expected)
    base = twins.make()
    assert [(n, type(m)) for n, m in ours.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in base.named_parameters()]


# ---- what is refused ------------------------------------------------------------------------------------
REFUSED = {
    "half of a pair": (moe.qwen3_moe, {"target_modules": ["up_proj"]}),
    "half of a pair, mixtral": (moe.mixtral, {"target_modules": ["w1", "w2"]}),
    "dropout": (moe.qwen3_moe, {"target_parameters": moe.BOTH, "lora_dropout": 0.1}),
    "dropout, by names": (moe.qwen3_moe, {"target_modules": EXPERTS, "lora_dropout": 0.1}),
    "DoRA": (moe.qwen3_moe, {"target_parameters": moe.BOTH, "use_dora": True}),
    "lora_bias": (moe.qwen3_moe, {"target_parameters": moe.BOTH, "lora_bias": True}),
    "one dimension": (moe.qwen3_moe, {"target_parameters": ["input_layernorm.weight"]}),
    "top level": (moe.Stacks, {"target_parameters": ["inner"]}),
    "nothing": (moe.qwen3_moe, {"target_parameters": ["nothing"], "target_modules": []}),
    "both ways": (oracle.llama, {"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_as_in_peft_and_nothing_changed(case):
    import peft

    make, options = REFUSED[case]
    with pytest.raises(ValueError) as theirs:
        oracle.quietly(peft.get_peft_model, make(), oracle.config_of(peft, options))
    model, config = make(), oracle.config_of(peftfast, options)
    before = [(n, type(m)) for n, m in model.named_modules()], config.to_dict()
    with pytest.raises(ValueError) as ours:
        oracle.quietly(peftfast.get_peft_model, model, config)
    assert str(theirs.value)[:40] in str(ours.value)
    assert ([(n, type(m)) for n, m in model.named_modules()], config.to_dict()) == before


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "eva"])
def test_initialisations_that_need_a_layer(init):
    config = oracle.quietly(peftfast.LoraConfig, target_parameters=moe.BOTH, init_lora_weights=init)
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}'.*gate_up_proj"):
        peftfast.get_peft_model(moe.qwen3_moe(), config)


def test_names_must_be_a_list():
    import peft

    for library in (peft, peftfast):
        with pytest.raises(TypeError, match="target_parameters"):
            library.LoraConfig(target_parameters="experts.down_proj")
