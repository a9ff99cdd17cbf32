"""`peftfast.patch(model)` on a model that PEFT has wrapped: the same object, numbers and files, and back again."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from oracle import gradients
from safetensors.torch import load_file
from training.nf4 import quantise
from training.tiny import batch, checkpoint, fill, largest_difference, llama, lora, wrapped

import peftfast


def step(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = model(**batch())
    out.loss.backward()
    found = gradients(model)
    model.zero_grad()
    return out.logits.detach(), found


def picture(model: torch.nn.Module) -> dict:
    return {
        "modules": {n: id(m) for n, m in model.named_modules()},
        "classes": {n: type(m) for n, m in model.named_modules()},
        "parameters": {n: (id(p), p.requires_grad, p.data_ptr()) for n, p in model.named_parameters()},
        "keys": list(model.state_dict()),
    }


def by_peft(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many adapters PEFT's own code computes in one forward."""
    from peft.tuners.lora import LoraLayer

    calls = 0
    original = LoraLayer._cast_input_dtype

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(LoraLayer, "_cast_input_dtype", counted)
        model(**batch())
    return calls


BASES = {
    "fp32": lambda: llama(),
    "fp64": lambda: llama(dtype=torch.float64),
    "bf16": lambda: llama(dtype=torch.bfloat16),
    "nf4": lambda: quantise(llama(hidden_size=64, intermediate_size=128)),
}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["q_proj"]},
                                     {"modules_to_save": ["lm_head"]}, {"use_rslora": True}], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", BASES)
def test_same_numbers_keys_and_files_before_after_and_back(kind, options, tmp_path, monkeypatch):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    model = wrapped(peft, BASES[kind](), **options).train()
    logits, grads = step(model)
    model.save_pretrained(tmp_path / "before")
    before = picture(model)

    assert peftfast.patch(model) is model
    report = peftfast.patch_report(model)
    assert len(report.taken) > 0 and not report.left
    assert by_peft(model, monkeypatch) == 0
    assert picture(model) == before
    after_logits, after = step(model)
    # fp32 and fp64 differ by the order of sums only; bf16 by a rounding of the sum PEFT rounds twice
    tolerance = {"fp64": 1e-12, "bf16": 3e-2}.get(kind, 2e-5)
    assert (after_logits - logits).abs().max() <= tolerance * logits.abs().max()
    assert largest_difference(after, grads) <= (0.1 if kind == "bf16" else 10 * tolerance)
    model.save_pretrained(tmp_path / "after")
    one, other = (load_file(tmp_path / w / "adapter_model.safetensors") for w in ("before", "after"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert (tmp_path / "before/adapter_config.json").read_bytes() == (
        tmp_path / "after/adapter_config.json"
    ).read_bytes()

    assert peftfast.unpatch(model) is model
    assert picture(model) == before
    assert by_peft(model, monkeypatch) > 0
    back_logits, back = step(model)
    assert torch.equal(back_logits, logits)
    assert largest_difference(back, grads) == 0.0


def test_error_is_no_larger_than_pefts_in_half_precision():
    exact = wrapped(peft, llama(dtype=torch.bfloat16).double())
    model = wrapped(peft, llama(dtype=torch.bfloat16))
    expected, grads = step(exact)
    theirs, their_grads = step(model)
    ours, our_grads = step(peftfast.patch(model))
    assert (ours - expected).abs().mean() <= 1.05 * (theirs - expected).abs().mean()
    norm = {k: ((v.double() - grads[k]).norm() / grads[k].norm()).item() for k, v in our_grads.items()}
    peers = {k: ((v.double() - grads[k]).norm() / grads[k].norm()).item() for k, v in their_grads.items()}
    assert sum(norm.values()) <= 1.05 * sum(peers.values())


def test_lifecycle_after_the_patch(monkeypatch):
    """Adding, switching, disabling, merging, deleting: what PEFT alone does."""
    twin, model = wrapped(peft), peftfast.patch(wrapped(peft))

    def same() -> None:
        with torch.no_grad():
            torch.testing.assert_close(model(**batch()).logits, twin(**batch()).logits, rtol=1e-5, atol=1e-5)

    for action in (
        lambda m: m.add_adapter("other", lora(peft, r=2, use_rslora=True)),
        lambda m: m.set_adapter("other"),
        lambda m: fill(m, 9),
        lambda m: m.base_model.set_adapter(["default", "other"]),
        lambda m: m.base_model.merge_adapter(),
        lambda m: m.base_model.unmerge_adapter(),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
        lambda m: m.set_adapter("default"),
        lambda m: m.delete_adapter("other"),
        lambda m: m.add_adapter("other", lora(peft, use_dora=True)),
        lambda m: m.set_adapter("other"),
        lambda m: fill(m, 10),
        lambda m: m.base_model.set_adapter(["default", "other"]),  # of two methods
        lambda m: m.delete_adapter("other"),
        lambda m: m.add_adapter("other", lora(peft, r=6)),
        lambda m: m.set_adapter("other"),
        lambda m: fill(m, 11),
    ):
        for m in (model, twin):
            action(m)
        same()
    assert by_peft(model, monkeypatch) == 0
    with torch.no_grad(), model.disable_adapter(), twin.disable_adapter():
        assert torch.equal(model(**batch()).logits, twin(**batch()).logits)
    names = ["default", "other", "__base__", "other"]
    model.eval(), twin.eval()
    with torch.no_grad():
        mixed = [m(**batch(), adapter_names=names).logits for m in (model, twin)]
    assert torch.equal(*mixed)  # PEFT's own path


def test_a_model_without_configs_computes_as_peft_does():
    """Its inner model, of which nobody knows what its layers were asked to be."""
    model = wrapped(peft)
    expected = model(**batch()).logits
    peftfast.patch(model.get_base_model().model)
    assert torch.equal(model(**batch()).logits, expected)


def test_what_is_left_is_named():
    model = peft.get_peft_model(llama(), lora(peft, target_modules=["q_proj", "embed_tokens"]))
    peftfast.patch(model)
    report = peftfast.patch_report(model)
    assert list(report.left) == ["base_model.model.model.embed_tokens"]
    assert "Embedding" in report.left["base_model.model.model.embed_tokens"]
    assert len(report.taken) == 2
    assert "2 of 3" in str(report) and "embed_tokens" in str(report)


def test_nothing_to_take_is_an_error_that_changes_nothing():
    model = peft.get_peft_model(llama(), lora(peft, target_modules=["embed_tokens"]))
    before = picture(model)
    with pytest.raises(ValueError, match="embed_tokens"):
        peftfast.patch(model)
    assert picture(model) == before
    with pytest.raises(ValueError, match="taken over"):
        peftfast.unpatch(model)
    with pytest.raises(TypeError, match="needs a config"):
        peftfast.patch(llama())


def test_patched_again_and_after_unpatching(monkeypatch):
    model = peftfast.patch(wrapped(peft))
    report = peftfast.patch_report(model)
    assert peftfast.patch_report(peftfast.patch(model)) == report
    peftfast.unpatch(model)
    with pytest.raises(ValueError, match="was not called"):
        peftfast.patch_report(model)
    with pytest.raises(ValueError, match="taken over"):
        peftfast.unpatch(model)
    assert peftfast.patch_report(peftfast.patch(model)) == report
    assert by_peft(model, monkeypatch) == 0


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True, "lora_dropout": 0.3}], ids=str)
def test_what_others_put_there_acts(options):
    """Hooks on the modules of factors and of dropout, and forwards that somebody has replaced."""
    twin, model = wrapped(peft, **options), wrapped(peft, **options)
    for m in (twin, model):
        for name, module in m.named_modules():
            if name.endswith("0.self_attn.q_proj"):
                module.forward = lambda x, forward=module.forward: 2 * forward(x)
    peftfast.patch(model)
    assert list(peftfast.patch_report(model).left) == ["base_model.model.model.layers.0.self_attn.q_proj"]
    for place in ("q_proj.lora_A.default", "v_proj.lora_B.default", "q_proj.lora_dropout.default"):
        found = []
        for m in (twin, model):
            holder = next(module for name, module in m.named_modules() if name.endswith(f"1.self_attn.{place}"))
            holder.register_forward_hook(lambda module, args, out: 3 * out)
            torch.manual_seed(0)
            found.append(step(m))
        assert (found[1][0] - found[0][0]).abs().max() <= 1e-4 * found[0][0].abs().max()
        assert largest_difference(found[1][1], found[0][1]) <= 1e-4


def test_another_base_module_acts(monkeypatch):
    """Others quantise, or wrap, the base modules of a model that has adapters; a stale one computed as before."""
    twin, model = wrapped(peft), peftfast.patch(wrapped(peft))
    for m in (twin, model):
        for module in m.modules():
            if isinstance(module, peft.tuners.lora.Linear):
                torch.manual_seed(0)
                module.base_layer = type(module.base_layer)(module.in_features, module.out_features, bias=False)
    for copied in (model, copy.deepcopy(model)):
        expected, grads = step(twin)
        found, found_grads = step(copied)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert largest_difference(found_grads, grads) <= 1e-4
        assert by_peft(copied, monkeypatch) == 0
    for m in (twin, model):
        for module in m.modules():
            if isinstance(module, peft.tuners.lora.Linear):
                module.base_layer = torch.nn.Sequential(module.base_layer, torch.nn.Tanh())  # no site of ours
    torch.testing.assert_close(step(model)[0], step(twin)[0], rtol=1e-4, atol=1e-4)
    assert by_peft(model, monkeypatch) > 0


def test_adapters_of_some_layers(monkeypatch):
    model = peftfast.patch(wrapped(peft))
    model.add_adapter("few", lora(peft, target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "few"])
    assert by_peft(model, monkeypatch) == 0


@pytest.mark.parametrize(
    "options", [{"alora_invocation_tokens": [5, 6]}, {"kasa_config": peft.KasaConfig()}], ids=["alora", "kasa"]
)
def test_a_variant_that_we_lack_goes_to_peft(options, monkeypatch):
    model = peft.get_peft_model(llama(), lora(peft, **options))
    fill(model)
    expected = model(**batch()).logits
    peftfast.patch(model)
    assert torch.equal(model(**batch()).logits, expected)
    assert by_peft(model, monkeypatch) > 0


def test_copies_and_pickles(monkeypatch):
    model = peftfast.patch(wrapped(peft))
    logits, grads = step(model)
    other = copy.deepcopy(model)
    fill(model, 99)
    with torch.no_grad():
        for parameter in model.get_base_model().parameters():
            parameter.zero_()
    copied, copied_grads = step(other)
    assert torch.equal(copied, logits) and largest_difference(copied_grads, grads) == 0.0
    assert by_peft(other, monkeypatch) == 0
    read = pickle.loads(pickle.dumps(other))
    torch.testing.assert_close(step(read)[0], logits, rtol=1e-5, atol=1e-5)
    assert by_peft(read, monkeypatch) > 0
    other.add_adapter("late", lora(peft))
    other.set_adapter("late")
    assert by_peft(other, monkeypatch) == 0


def test_dropout_and_checkpointing():
    model = peftfast.patch(wrapped(peft, lora_dropout=0.4)).train()
    torch.manual_seed(0)
    _, expected = step(model)
    checkpoint(model)
    torch.manual_seed(0)
    _, found = step(model)
    assert largest_difference(found, expected) == 0.0


def test_a_peftfast_model_is_already_patched():
    model = wrapped(peftfast)
    assert peftfast.patch(model) is model
