"""The dry run: it changes nothing, and what it says is what patch then does."""

from __future__ import annotations

import copy
import warnings

import oracle
import pytest
import torch
from trust.attacks import base, state

import peftfast
from peftfast import IA3Config, LoraConfig, TrainableTokensConfig, plan_adapter
from peftfast.cli import main
from peftfast.interop.servers import CONVERT, LOADS, REFUSES, SERVERS, WRONG
from peftfast.layers.layer import BaseTunerLayer

TARGETS = ["q_proj", "v_proj"]
CONFIGS = {
    "plain": LoraConfig(r=3, target_modules=TARGETS),
    "all-linear": LoraConfig(r=2, target_modules="all-linear"),
    "regex": LoraConfig(r=2, target_modules=r".*layers\.1\.[qv]_proj"),
    "patterns": LoraConfig(r=2, target_modules=TARGETS, rank_pattern={"0.q_proj": 5}, alpha_pattern={"v_proj": 7}),
    "some layers": LoraConfig(r=2, target_modules=TARGETS, layers_to_transform=[1], layers_pattern="layers"),
    "dora": LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
    "biases": LoraConfig(r=2, target_modules=TARGETS, bias="lora_only", lora_bias=True),
    "all biases": LoraConfig(r=2, target_modules=TARGETS, bias="all", modules_to_save=["head"]),
    "rows": LoraConfig(r=2, target_modules=TARGETS, trainable_token_indices=[1, 5]),
    "embedding": LoraConfig(r=2, target_modules=["embed_tokens", "head"]),
    "head of a task": LoraConfig(r=2, target_modules=TARGETS, task_type="SEQ_CLS", modules_to_save=["head"]),
    "ia3": IA3Config(target_modules=[*TARGETS, "down_proj"], feedforward_modules=["down_proj"]),
    "tokens": TrainableTokensConfig(token_indices=[0, 3], target_modules=["embed_tokens"]),
}


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_it_says_is_what_patch_does(name, half):
    cfg = copy.deepcopy(CONFIGS[name])
    model = base.Tiny().to(torch.bfloat16) if half else base.Tiny()
    before, fields = _bits(model), copy.deepcopy(cfg.__dict__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = plan_adapter(model, cfg)
        assert _bits(model) == before
        assert cfg.__dict__ == fields
        assert plan.refusal is None, plan.refusal
        patched = peftfast.patch(model, cfg)
    trained = [p for p in patched.parameters() if p.requires_grad]
    assert plan.trainable_parameters == sum(p.numel() for p in trained) > 0
    assert plan.total_parameters == sum(p.numel() for p in base.Tiny().parameters())
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = sum(v.numel() * v.itemsize for s in optimizer.state.values() for v in s.values())
    weights = sum(p.numel() * p.itemsize for p in trained)
    gradients = sum(p.grad.numel() * p.grad.itemsize for p in trained)
    assert plan.memory == {
        "weights": weights, "gradients": gradients, "AdamW state": kept, "together": weights + gradients + kept,
    }  # fmt: skip
    layers = {
        n.removeprefix("base_model.model."): m for n, m in patched.named_modules() if isinstance(m, BaseTunerLayer)
    }
    # an embedding's trained rows are in a layer of their own, inside its wrapper
    adapted = {n for n in layers if not n.endswith(".token_adapter")}
    assert {p.module for p in plan.parts if p.kind not in ("copy", "rows", "bias")} == adapted
    for module, rank in plan.ranks.items():
        assert layers[module].r["default"] == rank


def _bits(model):
    return [
        (n, p.requires_grad, p.detach().view(torch.uint8).numpy().tobytes()) for n, p in model.named_parameters()
    ] + [(n, type(m).__name__, m.training, sorted(m.__dict__)) for n, m in model.named_modules()]


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        {"trainable_token_indices": [1, 2]},
        {"trainable_token_indices": [1, 2], "ensure_weight_tying": True},
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tied_weights_count_once(changes):
    model = oracle.llama(tied=True)
    cfg = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **changes})
    total = sum(p.numel() for p in model.parameters())
    plan = plan_adapter(model, cfg)
    patched = peftfast.patch(model, cfg)
    assert plan.trainable_parameters == sum(p.numel() for p in patched.parameters() if p.requires_grad)
    assert plan.total_parameters == total


def test_factors_in_the_dtype_of_the_base():
    model = base.Tiny().to(torch.bfloat16)
    plan = plan_adapter(model, LoraConfig(r=2, target_modules=TARGETS), autocast_adapter_dtype=False)
    assert plan.memory["weights"] == 2 * plan.trainable_parameters > 0


def test_packed_weights_count_as_what_they_stand_for():
    pytest.importorskip("bitsandbytes")
    model = oracle.llama(hidden=64)
    total = plan_adapter(model, LoraConfig(target_modules=["q_proj"])).total_parameters
    peftfast.quantize_model(model, "nf4")
    assert plan_adapter(model, LoraConfig(target_modules=["q_proj"])).total_parameters == total


def test_targets_that_the_model_chooses():
    for config, name in ((LoraConfig(), "default: q_proj, v_proj"), (LoraConfig(target_modules="all-linear"), None)):
        (target,) = plan_adapter(oracle.llama(), config).targets
        patched = peftfast.patch(oracle.llama(), config)
        assert target.name == (name or "all-linear") and target.status == "matched"
        assert set(target.adapted) == set(patched.base_model.inventory.layers)


def test_notes_are_of_the_plan_whatever_is_shown():
    config = LoraConfig(target_modules=[*TARGETS, "nothing"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        notes = plan_adapter(base.Tiny(), config).notes
    assert any("nothing" in note for note in notes)


def test_targets_matched_partly_and_not_at_all():
    cfg = LoraConfig(target_modules=["q_proj", "v_proj", "down_prj"], exclude_modules=r".*layers\.0\.v_proj")
    plan = plan_adapter(base.Tiny(), cfg)
    assert [(t.name, t.status) for t in plan.targets] == [
        ("down_prj", "unmatched"), ("q_proj", "matched"), ("v_proj", "partly matched"),
    ]  # fmt: skip
    text = str(plan)
    assert "Did you mean 'down_proj'" in text
    assert "not adapted by v_proj: 'body.layers.0.v_proj'" in text
    assert "body.layers.{0-1}.q_proj" in text


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (LoraConfig(target_modules=["qproj"]), "qproj.*not found.*Did you mean 'q_proj'"),
        (LoraConfig(target_modules=["body"]), "body: "),
        (LoraConfig(target_modules=TARGETS, trainable_token_indices=[99]), r"\[99\] are outside"),
    ],
)
def test_what_patch_refuses_is_said(cfg, words):
    model = base.Tiny()
    before = state(model)
    plan = plan_adapter(model, cfg)
    assert state(model) == before
    assert plan.refusal is not None and "patch would refuse" in str(plan)
    with pytest.raises(ValueError, match=words) as refused:
        peftfast.patch(model, copy.deepcopy(cfg))
    assert plan.refusal == str(refused.value)


def test_on_a_model_with_adapters():
    model = peftfast.get_peft_model(base.Tiny(), LoraConfig(r=2, target_modules=TARGETS))
    before = state(model)
    plan = plan_adapter(model, LoraConfig(r=3, target_modules=["q_proj"]))
    assert state(model) == before
    assert plan.trainable_parameters == 2 * 3 * (8 + 8)
    assert plan.total_parameters == sum(p.numel() for p in base.Tiny().parameters())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (LOADS, LOADS, CONVERT, CONVERT)),
        ({"use_rslora": True}, (LOADS, WRONG, WRONG, CONVERT)),
        ({"use_dora": True}, (REFUSES, REFUSES, REFUSES, CONVERT)),
        ({"r": 64}, (REFUSES, LOADS, CONVERT, CONVERT)),
        ({"modules_to_save": ["head"]}, (REFUSES, WRONG, REFUSES, REFUSES)),
        ({"bias": "lora_only"}, (REFUSES, WRONG, REFUSES, REFUSES)),
        ({"lora_bias": True}, (REFUSES, WRONG, REFUSES, REFUSES)),
        ({"trainable_token_indices": [1]}, (REFUSES, WRONG, REFUSES, REFUSES)),
        ({"rank_pattern": {"q_proj": 2}}, (LOADS, REFUSES, CONVERT, REFUSES)),
        ({"rank_pattern": {"q_proj": 17}}, (REFUSES, REFUSES, CONVERT, REFUSES)),
        ({"rank_pattern": {"q_proj": 8}}, (LOADS, LOADS, CONVERT, CONVERT)),
        ({"alpha_pattern": {"q_proj": 2}}, (LOADS, WRONG, WRONG, REFUSES)),
        ({"target_modules": ["q_proj"]}, (LOADS, REFUSES, CONVERT, CONVERT)),
        ({"target_modules": ".*[qv]_proj"}, (LOADS, REFUSES, CONVERT, CONVERT)),
        ({"use_qalora": True, "qalora_group_size": 4}, (REFUSES, REFUSES, REFUSES, REFUSES)),
        ({"use_bdlora": peftfast.BdLoraConfig(target_modules_bd_a=TARGETS)}, (REFUSES, REFUSES, REFUSES, REFUSES)),
        ({"velora_config": peftfast.VeloraConfig(num_groups=4)}, (REFUSES, REFUSES, REFUSES, REFUSES)),
    ],
)
def test_servers(changes, expected):
    plan = plan_adapter(base.Tiny(), LoraConfig(**{"r": 8, "target_modules": TARGETS, **changes}))
    assert tuple(v.verdict for v in plan.servers) == expected
    assert [v.server for v in plan.servers] == list(SERVERS)
    assert all(v.reasons or v.verdict == "loads" for v in plan.servers)
    if changes == {"r": 64}:
        assert plan.servers[0].reasons == ("r=64 is above max_lora_rank=16",)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "corda", "lora_ga", "loftq", "eva", "mica"])
def test_servers_leave_the_base_as_it_was(init):
    settings = {"loftq_config": peftfast.LoftQConfig(), "lora_ga_config": peftfast.LoraGAConfig()}
    own = {name: value for name, value in settings.items() if name == f"{init}_config"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=init, **own)
    plan = plan_adapter(base.Tiny(), config)
    if init in ("eva", "mica"):
        assert not any(v.verdict == WRONG for v in plan.servers)
    else:
        verdicts = [v.verdict for v in plan.servers]
        assert verdicts == [WRONG if init == "lora_ga" else REFUSES, WRONG, WRONG, WRONG]
        assert all(f"before init_lora_weights={init!r}; convert it" in str(v.reasons) for v in plan.servers)


PRESENT = {
    "lora": (LoraConfig(r=2, target_modules=TARGETS, bias="all"), False),
    "adalora": (peftfast.AdaLoraConfig(target_modules=TARGETS, total_step=10), False),
    "mixed": (LoraConfig(r=2, target_modules=TARGETS), True),
    "rows": (LoraConfig(r=2, target_modules=TARGETS, trainable_token_indices=[1]), False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("present", PRESENT)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_an_adapted_model_would_refuse_is_said(name, present):
    """Other methods, biases of a second adapter, modules that another adapter keeps."""
    config, mixed = PRESENT[present]
    model = peftfast.get_peft_model(base.Tiny(), copy.deepcopy(config), mixed=mixed)
    refusal = plan_adapter(model, CONFIGS[name]).refusal
    try:
        model.add_adapter("planned", copy.deepcopy(CONFIGS[name]))
    except ValueError as e:
        assert refusal == str(e)
    else:
        assert refusal is None


def test_other_methods_load_nowhere():
    plan = plan_adapter(base.Tiny(), CONFIGS["ia3"])
    assert {v.verdict for v in plan.servers} == {"refuses"}
    with pytest.raises(ValueError, match="PromptTuningConfig adapts no modules"):
        plan_adapter(base.Tiny(), peftfast.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(TypeError, match="config must be a PeftConfig"):
        plan_adapter(base.Tiny(), {"r": 8})


def test_the_command(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["inspect"]) == 0
    out = capsys.readouterr().out
    assert "trainable parameters: 124,160" in out and "vLLM" in out
    assert main(["inspect", "--target", "q_prj", "--r", "4"]) == 1
    assert "Did you mean 'q_proj'" in capsys.readouterr().out
