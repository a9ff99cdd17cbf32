"""`layer_replication`: layers stacked anew over one set of weights."""

import copy

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import peftfast

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
RANGES = [[0, 2], [1, 3]]  # layers 0 1 1 2
IDS = torch.arange(14).reshape(2, 7)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()


def config(library=peftfast, **options):
    options = {
        "target_modules": ["q_proj", "down_proj"],
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
    } | options
    return library.LoraConfig(r=4, layer_replication=RANGES, **options)


def wrapped(library=peftfast, base=None, **options):
    torch.manual_seed(1)
    return library.get_peft_model(llama() if base is None else base, config(library, **options)).eval()


def layers(model):
    return model.get_base_model().model.layers


def same(a, b):
    return (a(input_ids=IDS).logits - b(input_ids=IDS).logits).abs().max().item()


def test_the_same_model_as_peft():
    ours, theirs = wrapped(), wrapped(peft)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert same(ours, theirs) < 1e-6
    generated = [m.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (ours, theirs)]
    assert torch.equal(*generated)


def test_layers_share_weights_and_have_adapters_of_their_own():
    model = wrapped()
    first, second = layers(model)[1].self_attn.q_proj, layers(model)[2].self_attn.q_proj
    assert first.weight is second.weight
    assert first.lora_A["default"].weight is not second.lora_A["default"].weight
    assert [layer.self_attn.layer_idx for layer in layers(model)] == [0, 1, 2, 3]
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [layer.mlp.down_proj.lora_A["default"].weight.grad for layer in layers(model)]
    assert all(g.abs().max() > 0 for g in gradients)
    assert not torch.equal(gradients[1], gradients[2])


def test_files_both_ways(tmp_path):
    ours, theirs = wrapped(), wrapped(peft)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert same(ours, peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()) < 1e-6
    assert same(theirs, peftfast.PeftModel.from_pretrained(llama(), tmp_path / "theirs", strict=True).eval()) < 1e-6


def test_merging_gives_layers_weights_of_their_own(tmp_path):
    model = wrapped()
    expected = copy.deepcopy(model)
    model.merge_adapter()
    assert same(model, expected) < 1e-5
    model.unmerge_adapter()
    assert same(model, expected) == 0
    assert layers(model)[1].self_attn.q_proj.weight is layers(model)[2].self_attn.q_proj.weight
    merged = model.merge_and_unload()
    assert same(merged, expected) < 1e-5
    merged.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert reloaded.config.num_hidden_layers == 4
    assert same(reloaded, expected) < 1e-5


def test_unload_restores_the_model():
    base = llama()
    before = copy.deepcopy(base)
    model = wrapped(base=base).unload()
    assert model is base
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    assert same(model, before) == 0


def test_what_a_config_lists_for_each_layer():
    torch.manual_seed(0)
    sliding = ["full_attention", "sliding_attention", "full_attention"]
    base = Qwen3ForCausalLM(
        Qwen3Config(
            **SIZES, num_key_value_heads=2, head_dim=8, layer_types=sliding, use_sliding_window=True, sliding_window=3
        )
    )
    model = wrapped(base=base.eval())
    assert base.config.layer_types == [sliding[i] for i in (0, 1, 1, 2)]
    out = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    step = model(input_ids=out[:, :-1]).logits.argmax(-1)
    assert torch.equal(step[:, -1], out[:, -1])


@pytest.mark.parametrize(
    "base, targets",
    [
        (GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4)), ["c_attn"]),
        (BertModel(BertConfig(**SIZES)), ["query"]),
    ],
    ids=["gpt2", "bert"],
)
def test_other_architectures(base, targets):
    model = peftfast.get_peft_model(base.eval(), peftfast.LoraConfig(layer_replication=RANGES, target_modules=targets))
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 4
    assert torch.isfinite(model(input_ids=IDS)[0]).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_modules": ["nope"]}, "nope"),
        ({"layer_replication": [[0, 4]]}, r"\[0, 4\] is no range of the 3 layers"),
        ({"layer_replication": [[1, 1]]}, r"\[1, 1\] is no range"),
    ],
)
def test_a_refusal_leaves_the_model(options, message):
    base = llama()
    before = list(base.model.layers)
    with pytest.raises(ValueError, match=message):
        peftfast.get_peft_model(
            base, peftfast.LoraConfig(**{"layer_replication": RANGES, "target_modules": ["q_proj"]} | options)
        )
    assert list(base.model.layers) == before
    assert base.config.num_hidden_layers == 3


def test_a_model_without_a_list_of_layers():
    with pytest.raises(ValueError, match="layer_replication needs the one list of layers of Sequential.*found: none"):
        peftfast.get_peft_model(
            torch.nn.Sequential(torch.nn.Linear(4, 4)),
            peftfast.LoraConfig(layer_replication=RANGES, target_modules=["0"]),
        )


def test_all_adapters_need_the_same_layers():
    model = wrapped()
    model.add_adapter("same", config())
    with pytest.raises(ValueError, match="layer_replication=None, but the layers of this model are stacked"):
        model.add_adapter("other", peftfast.LoraConfig(target_modules=["q_proj"]))
    plain = peftfast.get_peft_model(llama(), peftfast.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="stacked as None"):
        plain.add_adapter("deeper", config())


def test_the_plan_counts_the_stacked_layers():
    base = llama()
    plan = peftfast.plan_adapter(base, config())
    assert plan.trainable_parameters == sum(p.numel() for p in wrapped().parameters() if p.requires_grad)
    assert {v.server: v.verdict for v in plan.servers}["vLLM"] != "loads"
    assert len(base.model.layers) == 3


def test_a_quantised_base_stays_one():
    base = llama().to(torch.bfloat16)
    model = peftfast.patch(base, config(), quantize="nf4")
    assert layers(model)[1].mlp.up_proj.weight is layers(model)[2].mlp.up_proj.weight
    assert torch.isfinite(model(input_ids=IDS).logits).all()
