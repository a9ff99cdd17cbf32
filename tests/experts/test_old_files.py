"""Adapters of experts as earlier releases saved them: a pair of factors for every expert (transformers 4), and the two
factors the other way round (PEFT up to 0.18)."""

import json
import re

import oracle
import peft
import pytest
import torch
from experts import moe
from safetensors.torch import load_file, save_file

import peftfast

#: base model -> how its layers were called before they were fused
LAYERS = {
    "qwen3_moe": ("mlp", {"gate_proj": (32, 16), "up_proj": (32, 16), "down_proj": (16, 32)}, 4),
    "mixtral": ("block_sparse_moe", {"w1": (32, 48), "w3": (32, 48), "w2": (48, 32)}, 4),
    "deepseek_v3": ("mlp", {"gate_proj": (32, 16), "up_proj": (32, 16), "down_proj": (16, 32)}, 8),
}


def old_folder(kind, folder, router=False):
    """What PEFT saved on transformers 4 for `target_modules` of the experts' layers."""
    parent, layers, experts = LAYERS[kind]
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in (1,) if kind == "deepseek_v3" else (0, 1):
        for expert in range(experts):
            for name, (k, n) in layers.items():
                key = f"base_model.model.model.layers.{layer}.{parent}.experts.{expert}.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(3, k, generator=generator) * 0.3
                tensors[f"{key}.lora_B.weight"] = torch.randn(n, 3, generator=generator) * 0.3
        if router:
            key = f"base_model.model.model.layers.{layer}.{parent}.gate"
            tensors[f"{key}.lora_A.weight"] = torch.randn(3, 32, generator=generator) * 0.3
            tensors[f"{key}.lora_B.weight"] = torch.randn(experts, 3, generator=generator) * 0.3
    targets = [*layers, *(["gate"] if router else [])]
    peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("kind, router", [("qwen3_moe", False), ("qwen3_moe", True), ("mixtral", True),
                                          ("deepseek_v3", False)])  # fmt: skip
def test_a_pair_an_expert(kind, router, tmp_path):
    moe.needs_peft_to_load()
    old_folder(kind, tmp_path, router)
    theirs = oracle.quietly(peft.PeftModel.from_pretrained, moe.KINDS[kind](), tmp_path)
    ours = oracle.quietly(peftfast.PeftModel.from_pretrained, moe.KINDS[kind](), tmp_path)
    tensors = dict(theirs.named_parameters())
    assert any(".lora_" in name for name in tensors)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, tensors[name], rtol=0, atol=0)
    with torch.no_grad():
        oracle.close(oracle.logits(ours), oracle.logits(theirs))
        assert (oracle.logits(ours) - oracle.logits(moe.KINDS[kind]())).abs().max() > 1e-2


def test_an_expert_that_is_missing(tmp_path):
    tensors = old_folder("qwen3_moe", tmp_path)
    gone = "base_model.model.model.layers.1.mlp.experts.2.up_proj.lora_B.weight"
    del tensors[gone]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = moe.qwen3_moe()
    with pytest.raises(peftfast.AdapterLoadError, match=r"layers\.1\.mlp\.experts\.2\.up_proj\.lora_B"):
        oracle.quietly(peftfast.PeftModel.from_pretrained, model, tmp_path)
    assert not any("lora" in name for name, _ in model.named_parameters())


def turned(tensors, experts):
    """Factors as PEFT wrote them up to 0.18 for modules that are not `is_transposed`: A reads the Parameter's first
    dimension and B its second, delta[e] = A_eᵀ B_eᵀ."""
    old = {}
    for key, tensor in tensors.items():
        other = re.sub("lora_(A|B)", lambda m: "lora_B" if m[1] == "A" else "lora_A", key)
        if "lora_A" in key:  # [E r, K] with the expert slowest becomes [K, r E] with the expert fastest
            e_r_k = tensor.reshape(experts, -1, tensor.shape[1])
            old[other] = torch.stack([e_r_k[e].t() for e in range(experts)], dim=2).flatten(1).contiguous()
        else:
            n_r_e = tensor.reshape(tensor.shape[0], -1, experts)
            old[other] = torch.cat([n_r_e[:, :, e].t() for e in range(experts)]).contiguous()
    return old


@pytest.mark.parametrize("square, version", [(False, None), (False, "0.18.1"), (True, None), (True, "0.18.1")])
def test_factors_the_other_way_round(square, version, tmp_path):
    def make():
        return moe.qwen3_moe(inner=32 if square else 16)

    parameters = ["experts.down_proj"]
    model = peftfast.get_peft_model(make(), peftfast.LoraConfig(r=3, target_parameters=parameters))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        expected = oracle.logits(model)
    model.save_pretrained(tmp_path)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file(turned(load_file(file), 4), file)
    data = json.loads(config.read_text())
    config.write_text(json.dumps({k: v for k, v in data.items() if k != "peft_version"}
                                 | ({"peft_version": version} if version else {})))  # fmt: skip
    loaded = oracle.quietly(peftfast.PeftModel.from_pretrained, make(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(oracle.logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")  # today's layout, and says so
    moe.needs_peft_to_load()
    for library in (peftfast, peft):
        again = oracle.quietly(library.PeftModel.from_pretrained, make(), tmp_path / "again")
        with torch.no_grad():
            oracle.close(oracle.logits(again), expected)
