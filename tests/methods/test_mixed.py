"""`get_peft_model(..., mixed=True)`: LoRA and AdaLoRA on one model, on the same layers and on different ones, in step
with PEFT."""

import copy
import importlib

import oracle
import pytest
import torch

import peftfast

peft = importlib.import_module("peft")

LORA = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
ADALORA = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "total_step": 40}
TARGET_RANK = 8  # AdaLoRA's default


def configs(library):
    return {"one": library.LoraConfig(**LORA), "two": library.AdaLoraConfig(**ADALORA)}


def renamed(key):
    """PEFT puts the layer of the second type around that of the first."""
    return key.replace(".base_layer.base_layer.", ".base_layer.").replace(".base_layer.lora_", ".lora_")


class Mixed(oracle.Twins):
    """A LoRA called "one" and an AdaLoRA called "two" in both libraries, with PEFT's values."""

    def __init__(self):
        super().__init__(oracle.llama, LORA, adapter_name="one", mixed=True, same=False)
        for model, library in ((self.ours, peftfast), (self.theirs, peft)):
            model.add_adapter("two", configs(library)["two"])
        values = {renamed(n): p for n, p in self.theirs.named_parameters()}
        with torch.no_grad():
            for name, parameter in self.ours.named_parameters():
                parameter.copy_(values.pop(name))
        assert not values

    def both(self, call):
        for model in (self.ours, self.theirs):
            call(model)

    def check(self):
        assert self.ours.active_adapters == self.theirs.active_adapters
        assert sorted(self.ours.peft_config) == sorted(self.theirs.peft_config)
        mine, other = (
            {renamed(n) for n, p in model.named_parameters() if p.requires_grad} for model in (self.ours, self.theirs)
        )
        assert mine == other
        with torch.no_grad():
            torch.testing.assert_close(oracle.logits(self.ours), oracle.logits(self.theirs), rtol=1e-4, atol=1e-4)


def test_activating_and_deleting():
    twins = Mixed()
    twins.check()
    alone = oracle.logits(twins.ours)
    twins.both(lambda m: m.set_adapter(["one", "two"]))
    twins.check()
    assert not torch.allclose(alone, oracle.logits(twins.ours), atol=1e-3)
    twins.both(lambda m: m.set_adapter("two"))
    twins.check()
    twins.both(lambda m: m.set_adapter(["two", "one"], inference_mode=True))
    twins.check()
    twins.both(lambda m: m.delete_adapter("one"))
    twins.check()
    twins.both(lambda m: m.delete_adapter(["two"]))
    assert not twins.ours.peft_config and twins.ours.active_adapters == []
    torch.testing.assert_close(oracle.logits(twins.ours), oracle.logits(oracle.llama()))


@pytest.mark.parametrize("first", ["one", "two"])
def test_deleting_one_of_a_shared_layer(first):
    """Which leaves the other's tensors, whichever came first."""
    config = configs(peftfast)
    second = "two" if first == "one" else "one"
    model = peftfast.get_peft_model(oracle.llama(), config[first], first, mixed=True).eval()
    expected = oracle.logits(model)
    model.add_adapter(second, config[second])
    model.set_adapter(["one", "two"])
    assert not torch.allclose(oracle.logits(model), expected, atol=1e-3)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(oracle.logits(twin), oracle.logits(model))
    model.delete_adapter(second)
    torch.testing.assert_close(oracle.logits(model), expected)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert list(layer.lora_A) == [first] and list(layer.lora_A.keys()) == [first] and len(layer.lora_A) == 1
    assert set(twin.base_model.model.model.layers[0].self_attn.q_proj.lora_A.keys()) == {"one", "two"}


def test_merging_and_unloading():
    base = oracle.logits(oracle.llama())
    twins = Mixed()
    twins.both(lambda m: m.set_adapter(["one", "two"]))
    both = oracle.logits(twins.ours)
    for names, expected in ((None, both), (["two"], None)):
        model = copy.deepcopy(twins.ours)
        model.set_adapter(["one", "two"] if names is None else names)
        expected = oracle.logits(model) if expected is None else expected
        torch.testing.assert_close(oracle.logits(model.merge_and_unload(adapter_names=names)), expected, rtol=1e-4,
                                   atol=1e-4)  # fmt: skip
    torch.testing.assert_close(oracle.logits(copy.deepcopy(twins.ours).unload()), base)
    with twins.ours.disable_adapter():
        torch.testing.assert_close(oracle.logits(twins.ours), base)
    twins.ours.merge_adapter(["two"])
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['two'\] while they are merged"):
        twins.ours.delete_adapter(["one", "two"])
    assert sorted(twins.ours.peft_config) == ["one", "two"]
    twins.ours.unmerge_adapter()
    torch.testing.assert_close(oracle.logits(twins.ours), both, rtol=0, atol=0)


def test_files(tmp_path):
    """Written one by one, which PEFT reads; read into one model."""
    model = Mixed().ours
    model.set_adapter(["one", "two"])
    expected = oracle.logits(model)
    model.save_pretrained(tmp_path)
    again = peftfast.PeftMixedModel.from_pretrained(oracle.llama(), tmp_path / "one", "one")
    again.load_adapter(tmp_path / "two", "two")
    assert again.active_adapters == ["one"]
    again.set_adapter(["one", "two"])
    torch.testing.assert_close(oracle.logits(again), expected)
    theirs = peft.PeftMixedModel.from_pretrained(oracle.llama(), str(tmp_path / "one"), "one")
    theirs.load_adapter(str(tmp_path / "two"), "two")
    theirs.set_adapter(["one", "two"])
    torch.testing.assert_close(oracle.logits(theirs.eval()), expected, rtol=1e-4, atol=1e-4)


def test_training_both():
    """AdaLoRA's schedule runs here as well, and leaves the LoRA alone."""
    model = Mixed().ours.train()
    model.set_adapter(["one", "two"])
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    batch = oracle.inputs(model)
    for _ in range(40):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(model.named_parameters())
    assert all(not torch.equal(value, after[name]) for name, value in before.items())
    values = [p for n, p in after.items() if n.endswith("lora_E.two")]
    kept = sum(int(p.count_nonzero()) for p in values)
    assert kept == TARGET_RANK * len(values) < sum(p.numel() for p in values)
    assert model.peft_config["two"].rank_pattern and not model.peft_config["one"].rank_pattern


def test_errors():
    model = peftfast.get_peft_model(oracle.llama(), configs(peftfast)["one"], "one", mixed=True)
    assert isinstance(model, peftfast.PeftMixedModel) and isinstance(model, peft.PeftMixedModel)
    ia3 = peftfast.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    message = "The provided `peft_type` 'IA3' is not compatible with the `PeftMixedModel`.* LORA, ADALORA"
    with pytest.raises(ValueError, match=message):
        model.add_adapter("two", ia3)
    with pytest.raises(ValueError, match=message):
        peftfast.get_peft_model(oracle.llama(), ia3, mixed=True)
    for call in (model.set_adapter, model.delete_adapter):
        with pytest.raises(ValueError, match=r"Adapter\(s\) \['x'\] not found, available adapters: \['one'\]"):
            call(["one", "x"])
    assert model.active_adapters == ["one"]
    with pytest.raises(ValueError, match="Only adapters of one method can be combined"):
        model.add_adapter("two", configs(peftfast)["two"])
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
