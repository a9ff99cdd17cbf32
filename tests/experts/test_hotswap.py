"""Swapping adapters of experts in place: ranks are padded for every expert by itself, graphs stay."""

import importlib
import zlib

import oracle
import pytest
import torch
from experts import moe, test_old_files
from torch._dynamo.testing import CompileCounterWithBackend

import peftfast

peft = importlib.import_module("peft")
OPTIONS = {"r": 4, "target_parameters": moe.BOTH, "target_modules": ["q_proj"]}
STACKS = {"target_parameters": ["inner", "outer", "mix"], "target_modules": []}


def saved(folder, name, make=moe.qwen3_moe, **changes):
    """An adapter written by PEFT, and its logits there."""
    torch.manual_seed(zlib.crc32(name.encode()))
    config = peft.LoraConfig(**{**OPTIONS, **changes, "init_lora_weights": False})
    model = oracle.quietly(peft.get_peft_model, make(), config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_" in key:
                parameter.normal_(std=0.3)
        model.save_pretrained(folder / name)
        return str(folder / name), oracle.logits(model)


#: ranks below, equal to and above the one that is there, and ranks and scalings of Parameters by themselves
OTHERS = {
    "same": {"lora_alpha": 20},
    "smaller": {"r": 2, "lora_alpha": 3},
    "larger": {"r": 9},
    "small again": {"r": 1},
    "one by one": {"r": 3, "rank_pattern": {"down_proj": 1}, "alpha_pattern": {"experts.gate_up_proj": 5}},
    "rooted": {"r": 4},
}


@pytest.mark.parametrize("make", [moe.qwen3_moe, moe.gpt_oss, moe.plain], ids=lambda make: make.__name__)
@torch.no_grad()
def test_swapping_gives_the_other_adapter_whatever_its_rank(make, tmp_path):
    options = STACKS if make is moe.plain else {}
    if make is moe.plain:
        options = {**options, "rank_pattern": {}, "alpha_pattern": {}}
    first, expected = saved(tmp_path, "first", make, **options)
    model = peftfast.PeftModel.from_pretrained(make(), first)
    oracle.close(oracle.logits(model), expected)
    for name, changes in OTHERS.items():
        path, logits = saved(tmp_path, name, make, **{**changes, **options})
        peftfast.hotswap_adapter(model, path, "default")
        oracle.close(oracle.logits(model), logits)
        model.save_pretrained(tmp_path / "again")  # what is saved now is the adapter that was swapped in
        for library in (peftfast, peft):
            if library is peft and make is not moe.plain:
                moe.needs_peft_to_load()
            again = oracle.quietly(library.PeftModel.from_pretrained, make(), tmp_path / "again")
            oracle.close(oracle.logits(again), logits)
    peftfast.hotswap_adapter(model, first, "default")
    oracle.close(oracle.logits(model), expected)


@torch.no_grad()
def test_without_the_experts_and_from_a_state_dict(tmp_path):
    first, _ = saved(tmp_path, "first")
    path, logits = saved(tmp_path, "of modules", target_parameters=None)
    model = peftfast.PeftModel.from_pretrained(moe.qwen3_moe(), first)
    peftfast.hotswap_adapter(model, path, "default")
    oracle.close(oracle.logits(model), logits)
    path, logits = saved(tmp_path, "second", r=2)
    state = {
        key.replace(".weight", ".default.weight"): tensor for key, tensor in peftfast.load_peft_weights(path).items()
    }
    peftfast.hotswap_adapter_from_state_dict(model, state, "default", peftfast.PeftConfig.from_pretrained(path))
    oracle.close(oracle.logits(model), logits)


@torch.no_grad()
def test_files_of_earlier_releases(tmp_path):
    """A pair of factors for every expert, under the names of layers that are fused now."""
    test_old_files.old_folder("mixtral", tmp_path / "old")
    expected = oracle.quietly(peftfast.PeftModel.from_pretrained, moe.mixtral(), tmp_path / "old")
    config = peftfast.LoraConfig(r=8, target_modules=["w1", "w2", "w3"], init_lora_weights=False)
    model = peftfast.get_peft_model(moe.mixtral(), config).eval()
    assert not torch.allclose(oracle.logits(model), oracle.logits(expected), atol=1e-2)
    peftfast.hotswap_adapter(model, tmp_path / "old", "default")
    oracle.close(oracle.logits(model), oracle.logits(expected))


@torch.no_grad()
def test_mixed_batches_and_kept_copies_see_the_swap(tmp_path):
    first, _ = saved(tmp_path, "first")
    path, logits = saved(tmp_path, "second", r=2)
    model = peftfast.PeftModel.from_pretrained(moe.qwen3_moe(), first)
    oracle.logits(model, adapter_names=["default", "default"])
    peftfast.hotswap_adapter(model, path, "default")
    oracle.close(oracle.logits(model, adapter_names=["default", "default"]), logits)


@pytest.mark.parametrize("target_rank", [None, 6])
@torch.no_grad()
def test_compiled_models_keep_their_graph(tmp_path, target_rank):
    make = moe.eager(moe.qwen3_moe, "batched_mm")
    ranks = (4, 4, 4) if target_rank is None else (4, 6, 2)
    files = [saved(tmp_path, f"a{i}", make, r=r, lora_alpha=5 * i + 1) for i, r in enumerate(ranks)]
    model = peftfast.PeftModel.from_pretrained(make(), files[0][0])
    peftfast.prepare_model_for_compiled_hotswap(model, target_rank=target_rank, config=model.peft_config)
    oracle.close(oracle.logits(model), files[0][1])
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    batch = {**oracle.inputs(model), "use_cache": False}
    for path, logits in (*files, files[0]):
        peftfast.hotswap_adapter(compiled, path, "default")
        oracle.close(compiled(**batch).logits, logits)
        oracle.close(oracle.logits(model), logits)  # eagerly, where the scale is a tensor too
    assert counter.frame_count == 1


def test_training_goes_on_after_a_swap(tmp_path):
    first, _ = saved(tmp_path, "first")
    path, _ = saved(tmp_path, "second", r=2)
    model = peftfast.PeftModel.from_pretrained(moe.qwen3_moe(), first, is_trainable=True)
    peftfast.prepare_model_for_compiled_hotswap(model, target_rank=8)
    peftfast.hotswap_adapter(model, path, "default")
    fresh = peftfast.PeftModel.from_pretrained(moe.qwen3_moe(), path, is_trainable=True)
    for one in (model, fresh):
        oracle.logits(one).pow(2).mean().backward()
    key = "base_model.model.model.layers.0.mlp.experts.lora_B.default.weight"
    wide, narrow = (dict(one.named_parameters())[key].grad for one in (model, fresh))
    assert narrow.abs().max() > 0
    torch.testing.assert_close(wide[:, : narrow.shape[1]], narrow, rtol=1e-4, atol=1e-6)
    assert not wide[:, narrow.shape[1] :].any()  # nothing pulls at ranks whose A is zero


def test_refusals_change_nothing(tmp_path):
    first, expected = saved(tmp_path, "first")
    model = peftfast.PeftModel.from_pretrained(moe.qwen3_moe(), first)
    fewer, _ = saved(tmp_path, "fewer", target_parameters=["experts.gate_up_proj"])
    wide, _ = saved(tmp_path, "wide", make=lambda: moe.qwen3_moe(experts=8))
    uneven = peftfast.load_peft_weights(first)
    key = "base_model.model.model.layers.0.mlp.experts.lora_A"
    uneven[f"{key}.weight"] = uneven[f"{key}.weight"][:-1]
    uneven = {k.replace(".weight", ".default.weight"): v for k, v in uneven.items()}

    def unchanged():
        with torch.no_grad():
            oracle.close(oracle.logits(model), expected)

    with pytest.raises(ValueError, match=r"for target_parameters, .*down_proj.* != \['experts.gate_up_proj'\]"):
        peftfast.hotswap_adapter(model, fewer, "default")
    unchanged()
    with pytest.raises(ValueError, match=r"lora_A.*\(15, 16\) is no whole rank for each of 4 experts"):
        peftfast.hotswap_adapter_from_state_dict(model, uneven, "default", model.peft_config["default"])
    unchanged()
    modules, _ = saved(tmp_path, "modules", target_parameters=None)
    plain = peftfast.PeftModel.from_pretrained(moe.qwen3_moe(), modules)
    with pytest.raises(ValueError, match=r"for target_parameters, \[\] != "):
        peftfast.hotswap_adapter(plain, first, "default")
    with pytest.raises(ValueError, match=r"original rank is larger \(4\)"):
        peftfast.prepare_model_for_compiled_hotswap(model, target_rank=3)
    unchanged()
    peftfast.hotswap_adapter(model, first, "default")
    unchanged()
