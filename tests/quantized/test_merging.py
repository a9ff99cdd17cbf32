"""Merging into 4 and 8 bits, into dense copies, and back."""

from __future__ import annotations

import warnings

import pytest
import torch
from oracle import One, llama, quietly
from torch import Tensor, nn

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

from quantized.support import (  # noqa: E402
    BASES,
    FOUR_BIT,
    assert_same_bytes,
    bnb_weight,
    clone,
    quantised_linear,
    stored_bytes,
)

import peftfast  # noqa: E402
from peftfast.base.weight import quantizer  # noqa: E402
from peftfast.errors import PeftWarning  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::peftfast.errors.PeftWarning")


def adapted(base: str, library=peftfast, dtype: torch.dtype = torch.float32, **config) -> nn.Module:
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["m"], "init_lora_weights": False, **config}
    model = library.get_peft_model(One(quantised_linear(base, dtype=dtype)), library.LoraConfig(**config))
    g = torch.Generator().manual_seed(9)
    layer = model.base_model.model.m
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.randn(4, 64, generator=g) / 8)
        layer.lora_B["default"].weight.copy_(torch.randn(48, 4, generator=g) / 8)
    return model


def exact_merge(model: nn.Module) -> Tensor:
    """W + s B A in fp64, from the dequantised base."""
    layer = model.base_model.model.m
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    base = bnb_weight(layer.base_layer).double()
    return (base + layer.scaling["default"] * b.double() @ a.double()).detach()


@pytest.mark.parametrize("base", BASES)
def test_cycles_leave_every_byte(base):
    model = adapted(base)
    layer, x = model.m.base_layer, torch.randn(5, 64)
    model(x)
    y, before = model(x).detach(), stored_bytes(layer)
    parameter = layer.weight
    for _ in range(3):
        model.merge_adapter()
        assert not torch.equal(dict(stored_bytes(layer))["weight"], dict(before)["weight"])
        model.unmerge_adapter()
    assert_same_bytes(before, stored_bytes(layer))
    assert layer.weight is parameter and torch.equal(model(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_error_is_that_of_quantising_the_exact_merge(base, dtype):
    model = adapted(base, dtype=dtype)
    exact = exact_merge(model)
    kind, options = BASES[base]
    fresh = bnb_weight(quantizer(kind).module(exact.float(), None, **options)).double()
    reported = model.merge_adapter()
    layer = model.m.base_layer
    merged = bnb_weight(layer).double()
    # bitsandbytes gives a weight back in the dtype it was quantised from; that rounding is not the merge's
    error, afresh = ((w - exact).norm() / exact.norm() for w in (merged, fresh.to(bnb_weight(layer).dtype).double()))
    assert error <= afresh * (1 + 1e-6)
    assert list(reported) == ["m"] and reported["m"] == pytest.approx(float(error), rel=2e-3)
    assert model.m.merge_error is not None
    model.unmerge_adapter()
    assert model.m.merge_error is None


@pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_error_is_no_larger_than_pefts(base, dtype):
    ours, theirs = adapted(base, dtype=dtype), adapted(base, peft, dtype=dtype)
    exact = exact_merge(ours)
    ours.merge_adapter()
    theirs.merge_adapter()
    mine, other = (bnb_weight(m.base_model.model.m.base_layer).double() for m in (ours, theirs))
    # 1e-3: PEFT's result is read back in fp32, ours in the dtype the base was quantised from
    assert (mine - exact).norm() <= (other - exact).norm() * (1 + 1e-3)


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_merged_model_computes_the_merged_weight(base):
    model = adapted(base).train()
    x = torch.randn(5, 64)
    model.merge_adapter()
    expected = x @ bnb_weight(model.m.base_layer).t() + model.m.base_layer.bias
    assert (model(x) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("base", ["nf4-nested", "int8"])
def test_several_adapters_are_rounded_once(base):
    """Merging one by one gives what merging together gives: the sum is formed on the exact base each time."""
    together, stepwise = adapted(base), adapted(base)
    for model in (together, stepwise):
        torch.manual_seed(4)
        model.add_adapter("second", peftfast.LoraConfig(r=2, target_modules=["m"], init_lora_weights=False))
    before = stored_bytes(stepwise.m.base_layer)
    together.merge_adapter(["default", "second"])
    quietly(stepwise.merge_adapter, ["default"])
    quietly(stepwise.merge_adapter, ["second"])
    assert_same_bytes(stored_bytes(together.m.base_layer), stored_bytes(stepwise.m.base_layer))
    stepwise.unmerge_adapter()
    assert_same_bytes(before, stored_bytes(stepwise.m.base_layer))


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_safe_merge_refuses_and_leaves_every_byte(base):
    model = adapted(base)
    with torch.no_grad():
        model.m.lora_B["default"].weight[3, 1] = float("nan")
    before = stored_bytes(model.m.base_layer)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert_same_bytes(before, stored_bytes(model.m.base_layer))
    assert not model.m.merged


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_bias_of_the_adapter_is_scaled(base):
    """PEFT's 4-bit and 8-bit merges leave the scaling out."""
    model = adapted(base, lora_bias=True, init_lora_weights=True)
    with torch.no_grad():
        model.m.lora_B["default"].bias.normal_()
    before = model.m.base_layer.bias.clone()
    model.merge_adapter()
    torch.testing.assert_close(model.m.base_layer.bias - before, 2.0 * model.m.lora_B["default"].bias.detach())
    model.unmerge_adapter()
    assert torch.equal(model.m.base_layer.bias, before)


def test_merging_says_what_it_costs():
    model = adapted("nf4")
    with pytest.warns(PeftWarning, match=r"relative error \d+\.\d+% on average, \d+\.\d+% in m\..*dequantize=True"):
        model.merge_adapter()
    dense_model = peftfast.get_peft_model(
        One(nn.Linear(64, 48)), peftfast.LoraConfig(target_modules=["m"], init_lora_weights=False)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dense_model.merge_adapter() == {}


# ---- methods that PEFT does not merge here ---------------------------------------------------------------------------
@pytest.mark.parametrize("base", ["nf4-nested", "int8"])
@pytest.mark.parametrize("kind", ["IA3Config", "AdaLoraConfig", "dora"])
def test_every_method_merges_and_unmerges(kind, base):
    arguments = {"target_modules": ["m"]}
    if kind == "dora":
        config = peftfast.LoraConfig(use_dora=True, init_lora_weights=False, **arguments)
    else:
        if not hasattr(peftfast, kind):
            pytest.skip(f"no {kind} here yet")
        extra = {"feedforward_modules": []} if kind == "IA3Config" else {"total_step": 10}
        config = getattr(peftfast, kind)(init_ia3_weights=False, **arguments, **extra) if kind == "IA3Config" else (
            getattr(peftfast, kind)(init_lora_weights=False, **arguments, **extra)
        )  # fmt: skip
    model = peftfast.get_peft_model(One(quantised_linear(base)), config).eval()
    x = torch.randn(6, 64)
    y, before = model(x).detach(), stored_bytes(model.m.base_layer)
    with torch.no_grad():
        error = model.merge_adapter()["m"]
        assert 0 < error < 0.15
        assert (model(x) - y).norm() <= 0.2 * y.norm()
        model.unmerge_adapter()
        assert_same_bytes(before, stored_bytes(model.m.base_layer))
        merged = model.merge_and_unload(dequantize=True)
        assert type(merged.m) is nn.Linear
        assert (merged(x) - y).norm() <= (1e-5 if "4" in base else 0.02) * y.norm()


# ---- into dense weights ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("base", BASES)
def test_dense_copy_from_the_dequantised_base(base):
    model = adapted(base)
    exact, bias = exact_merge(model), model.m.base_layer.bias.clone()
    merged = model.merge_and_unload(dequantize=True)
    assert type(merged.m) is nn.Linear and merged.m.weight.dtype == torch.float32
    assert (merged.m.weight.double() - exact).abs().max() <= torch.finfo(torch.float32).eps * exact.abs().max()
    assert torch.equal(merged.m.bias, bias)
    assert not getattr(merged, "is_loaded_in_4bit", False) and not getattr(merged, "is_loaded_in_8bit", False)


@pytest.mark.parametrize("base", FOUR_BIT[:2])
def test_dense_copy_in_the_compute_dtype(base):
    model = adapted(base, dtype=torch.bfloat16)
    exact = exact_merge(model)
    merged = model.merge_and_unload(dequantize=True)
    assert merged.m.weight.dtype == torch.bfloat16
    # the base is on bf16's grid already, so one rounding remains
    assert (merged.m.weight.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    assert torch.equal(merged.m.weight, exact.to(torch.bfloat16))


@pytest.mark.parametrize("how", ["state dict", "folder", "model"])
def test_dense_copy_from_original_weights(how, tmp_path):
    original = llama(hidden=64)
    ids = torch.arange(24).reshape(2, 12)
    config = peftfast.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    reference = peftfast.get_peft_model(llama(hidden=64), config)
    model = peftfast.patch(llama(hidden=64), config, quantize="nf4")
    peftfast.set_peft_model_state_dict(model, peftfast.get_peft_model_state_dict(reference))
    source = {"state dict": original.state_dict(), "folder": tmp_path, "model": original}[how]
    if how == "folder":
        original.save_pretrained(tmp_path, max_shard_size="50KB")
        assert (tmp_path / "model.safetensors.index.json").is_file()
    merged = model.merge_and_unload(dequantize=True, originals=source)
    expected = reference.merge_and_unload()
    assert torch.equal(merged(ids).logits, expected(ids).logits)
    assert not hasattr(merged.config, "quantization_config")


@pytest.mark.parametrize("inner", ["the model", "the originals"])
def test_original_weights_of_a_model_with_or_without_its_head(inner):
    original, model = llama(hidden=64), llama(hidden=64)
    source, model = (original, model.model) if inner == "the model" else (original.model, model)
    peftfast.quantize_model(model, "nf4", skip=["lm_head"] if model.base_model is not model else [])
    peftfast.dequantize_model(model, source)
    for name, parameter in model.base_model.named_parameters():
        assert torch.equal(parameter, original.model.get_parameter(name)), name


def test_int8_codes_that_the_module_multiplies_by_are_merged_into_wherever_they_are():
    model = peftfast.get_peft_model(
        One(quantised_linear("int8")), peftfast.LoraConfig(r=4, target_modules=["m"], init_lora_weights=False)
    )
    base = model.m.base_layer
    x = torch.randn(3, 64)
    model(x)  # which moves them to the module's state
    base.state.CB = base.weight.data.clone()
    before = base.state.CB.clone()
    model.merge_adapter()
    assert torch.equal(base.state.CB, base.weight.data) and not torch.equal(base.state.CB, before)


def test_merge_refusals_change_nothing():
    model = peftfast.patch(llama(hidden=64), peftfast.LoraConfig(target_modules="all-linear"), quantize="nf4")
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    before = stored_bytes(layer.base_layer)
    incomplete = {k: v for k, v in llama(hidden=64).state_dict().items() if "layers.1.mlp.up_proj" not in k}
    with pytest.raises(KeyError, match="model.layers.1.mlp.up_proj.weight"):
        model.merge_and_unload(dequantize=True, originals=incomplete)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj: the original weight has shape \[32, 32\]"):
        model.merge_and_unload(dequantize=True, originals=llama())
    with pytest.raises(ValueError, match="pass dequantize=True"):
        model.merge_and_unload(originals=incomplete)
    with pytest.raises(FileNotFoundError, match="no/such/folder is neither"):
        model.merge_and_unload(dequantize=True, originals="no/such/folder")
    for options, error in (
        ({"adapter_names": ["defualt"]}, "defualt not found.*Did you mean 'default'"),
        ({"adapter_names": "default"}, "should be a list"),
        ({"rounding": "down"}, "rounding must be one of"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            model.merge_and_unload(dequantize=True, **options)
    with pytest.warns(UserWarning, match="lora_bias=True"):
        model.add_adapter("biased", peftfast.LoraConfig(target_modules=["q_proj"], lora_bias=True))
    with pytest.raises(RuntimeError, match="the base layer has no bias"):
        model.merge_and_unload(dequantize=True, adapter_names=["biased"])
    model.delete_adapter("biased")
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected.*default"):
        model.merge_and_unload(dequantize=True, safe_merge=True)
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = 0.0
    assert model.base_model.model.config.quantization_config.load_in_4bit and layer.site.weight.quantization
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge first"):
        peftfast.dequantize_model(model)
    model.unmerge_adapter()
    assert type(layer.base_layer) is bnb.nn.Linear4bit
    assert_same_bytes(before, stored_bytes(layer.base_layer))


def test_dequantising_keeps_the_adapters_working():
    model = adapted("nf4-nested")
    x = torch.randn(5, 64)
    y = model(x)
    with pytest.raises(TypeError, match="dtype must be"):
        peftfast.dequantize_model(model, dtype="fp32")
    assert peftfast.dequantize_model(model, dtype="float32") == ["m"]
    assert (model(x) - y).norm() <= 1e-6 * y.norm()
    model.merge_adapter()
    model.unmerge_adapter()
    assert (model(x) - y).norm() <= 1e-6 * y.norm()
    with pytest.raises(ValueError, match="no quantised linear layers"):
        peftfast.dequantize_model(model)


def test_clone_of_support_is_a_clone():
    """What the comparisons here rest on."""
    layer = quantised_linear("nf4-nested")
    twin = clone(layer)
    twin.weight.data.zero_(), twin.weight.quant_state.absmax.zero_()
    assert bnb_weight(layer).abs().sum() > 0
