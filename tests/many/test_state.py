"""State of the activation travels with the model; adapters come up on the device of what they adapt."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import oracle
import pytest
import torch

import peftfast
from peftfast import LoraConfig


def two() -> torch.nn.Module:
    options = {"r": 4, "init_lora_weights": False}
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(target_modules=["q_proj", "v_proj"], **options), "one")
    model.add_adapter("two", LoraConfig(target_modules=["v_proj", "down_proj"], **options))
    return model.eval()


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": through_torch_save}
STATES = {
    "another": lambda m: m.set_adapter("two"),
    "several": lambda m: m.base_model.set_adapter(["two", "one"]),
    "frozen": lambda m: m.base_model.set_adapter("two", inference_mode=True),
    "disabled": lambda m: m.base_model.disable_adapter_layers(),
    "merged": lambda m: m.base_model.merge_adapter(["one", "two"]),
    "merged, kept on the host": lambda m: m.base_model.merge_adapter(["two"], keep="host"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state", STATES)
def test_the_state_of_activation_travels_with_the_model(state, way):
    model = two()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    STATES[state](model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = oracle.logits(model)
        twin = WAYS[way](model)
        assert torch.equal(oracle.logits(twin), expected)
        assert twin.active_adapters == model.active_adapters
        assert {n: p.requires_grad for n, p in twin.named_parameters()} == {
            n: p.requires_grad for n, p in model.named_parameters()
        }
        for mine, other in zip(twin.get_layer_status(), model.get_layer_status(), strict=True):
            assert mine == other
        if state.startswith("merged"):
            twin.base_model.unmerge_adapter()
            assert all(torch.equal(v, base[k]) for k, v in twin.state_dict().items())
            assert torch.equal(oracle.logits(model), expected)  # the first stays merged
        if state == "disabled":
            twin.base_model.enable_adapter_layers()
            assert not torch.equal(oracle.logits(twin), expected)
            assert torch.equal(oracle.logits(model), expected)


def test_every_adapter_is_loaded_where_it_was_put(tmp_path):
    """One adapter made on the meta device (low_cpu_mem_usage), one on the CPU, beside each other."""
    model = two()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = oracle.logits(model)
        model.base_model.delete_adapter("two")
        assert torch.equal(oracle.logits(model), expected)
        model.add_adapter("empty", LoraConfig(r=4, target_modules=["q_proj"]), low_cpu_mem_usage=True)
        model.load_adapter(tmp_path / "two", "later", low_cpu_mem_usage=True)
        model.load_adapter(tmp_path / "one", "onto", torch_device="cpu")
    devices: dict[str, set[str]] = {}
    for layer in model.get_layer_status():
        for name, found in layer.devices.items():
            devices.setdefault(name, set()).update(found)
    assert devices == {"one": {"cpu"}, "empty": {"meta"}, "later": {"cpu"}, "onto": {"cpu"}}
    with torch.no_grad():
        assert torch.equal(oracle.logits(model), expected)  # an adapter that is not active may be anywhere
        model.set_adapter("onto")
        assert torch.equal(oracle.logits(model), expected)
