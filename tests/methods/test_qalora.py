"""QA-LoRA against PEFT's formula, which PEFT applies to GPTQ only, and against a plain LoRA with the same change."""

import copy
import warnings

import oracle
import peft
import pytest
import torch
from methods.bases import K, make_base, make_input
from oracle import One, randomised
from torch import nn

import peftfast

R, GROUP = 4, 8
FORMATS = ("fp32", "bf16", "nf4", "int8")


def config(library=peftfast, **changes):
    options = {"r": R, "lora_alpha": 12, "target_modules": ["m"], "use_qalora": True, "qalora_group_size": GROUP}
    return library.LoraConfig(**{**options, **changes})


def make(storage="fp32", **changes):
    return randomised(peftfast.get_peft_model(make_base(storage=storage), config(**changes)))


def make_theirs(storage="fp32"):
    """PEFT's variant put into PEFT's linear layer by hand."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    cfg = config(peft)
    model = peft.get_peft_model(make_base(storage=storage), cfg)
    layer, variant = model.base_model.model.m, QALoraLinearVariant()
    variant.init(layer, "default", cfg)
    layer.lora_variant["default"] = variant
    layer.lora_A.default.float()
    return randomised(model)


def as_plain(model):
    """A plain LoRA that makes the same change: every column of A as often as its group has features."""
    layer = copy.deepcopy(model.get_base_model()).m
    plain = peftfast.get_peft_model(
        One(layer.base_layer), peftfast.LoraConfig(r=R, lora_alpha=12, target_modules=["m"])
    )
    own = plain.base_model.model.m
    with torch.no_grad():
        a = layer.lora_A.default.weight
        own.lora_A.default.weight.copy_(a.repeat_interleave(GROUP, 1) * (K / GROUP) / GROUP)
        own.lora_B.default.weight.copy_(layer.lora_B.default.weight)
    return plain


def gradients(model, x):
    x = x.clone().requires_grad_(True)
    y = model(x)
    y.float().square().sum().backward()
    return y.detach(), x.grad, oracle.gradients(model)


@pytest.mark.parametrize("tokens", [3, 5000])
@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_names_shapes_outputs_and_gradients_are_pefts(storage, tokens):
    ours, theirs = make(storage), make_theirs(storage)
    own, peer = ({n: p.shape for n, p in m.named_parameters()} for m in (ours, theirs))
    assert own == peer and own["base_model.model.m.lora_A.default.weight"] == (R, K // GROUP)
    assert "qalora_group_size" in ours.base_model.model.m.other_param_names
    x = make_input(storage=storage, rows=(tokens,))
    exact = copy.deepcopy(ours).double()(x.double()).detach()
    with torch.no_grad():
        error, other = (float((m(x).double() - exact).norm()) for m in (ours, theirs))
    assert error <= 1.05 * other + 1e-7 * float(exact.norm())
    if storage == "fp32":
        (y, dx, grads), (y0, dx0, grads0) = gradients(ours, x), gradients(theirs, x)
        torch.testing.assert_close(y, y0, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dx, dx0, rtol=1e-3, atol=1e-4)
        for name, grad in grads0.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))


@pytest.mark.parametrize("tokens", [3, 5000])
@pytest.mark.parametrize("storage", FORMATS)
def test_every_format_and_merging(storage, tokens):
    model, x = make(storage).eval(), make_input(storage=storage, rows=(tokens,))
    plain = as_plain(model)
    loose = 3e-2 if storage == "bf16" else 1e-4
    expected = plain(x)
    torch.testing.assert_close(model(x), expected, rtol=loose, atol=loose)
    layer, before = model.base_model.model.m, model(x)
    torch.testing.assert_close(layer.get_delta_weight("default"), plain.base_model.model.m.get_delta_weight("default"))
    stored = copy.deepcopy(layer.base_layer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    if storage in ("fp32", "bf16"):
        torch.testing.assert_close(model(x), expected, rtol=loose, atol=2 * loose)
    model.unmerge_adapter()
    assert all(torch.equal(v, stored[k]) for k, v in layer.base_layer.state_dict().items())
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_rows_pool_combination_conversion_and_files(tmp_path):
    model = make()
    model.add_adapter("other", config(qalora_group_size=4))
    model.add_adapter("same", config())
    randomised(model)
    x = make_input()
    with torch.no_grad():
        got = model(x, adapter_names=["other", "__base__", "default", "other"])
        with model.disable_adapter():
            torch.testing.assert_close(got[1], model(x[1]))
        for i, name in ((0, "other"), (2, "default"), (3, "other")):
            model.set_adapter(name)
            torch.testing.assert_close(got[i], model(x[i]), rtol=1e-4, atol=1e-5)
    model.add_weighted_adapter(["default", "same"], [1.0, -2.0], "both", "cat")
    layer = model.base_model.model.m
    wanted = layer.get_delta_weight("default") - 2.0 * layer.get_delta_weight("same")
    torch.testing.assert_close(layer.get_delta_weight("both"), wanted, rtol=1e-4, atol=1e-5)
    model.set_adapter("default")
    expected = model(x)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert oracle.saved_config(tmp_path)["use_qalora"] is True
    again = peftfast.PeftModel.from_pretrained(make_base(), tmp_path)
    torch.testing.assert_close(again(x), expected, rtol=0, atol=0)
    assert f"inputs in groups of {GROUP}" in str(peftfast.adapter_contents(tmp_path))
    pool = peftfast.AdapterPool(make_base(), slots=2, max_rank=R, target_modules=["m"])
    pool.register("one", tmp_path)
    torch.testing.assert_close(pool(x, adapter_names=["one"] * 4), expected, rtol=1e-4, atol=1e-5)
    pool.close()
    peftfast.save_as_lora(tmp_path / "plain", again, rank=R)
    torch.testing.assert_close(
        peft.PeftModel.from_pretrained(make_base(), tmp_path / "plain")(x), expected, rtol=1e-3, atol=1e-4
    )


def test_dropout_autocast_and_hooks():
    model = make()
    plain, x = as_plain(model), make_input(rows=(4, 5))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), plain(x), rtol=2e-2, atol=2e-2)
    seen = []
    handle = model.base_model.model.m.lora_A.default.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert seen == [(4, 5, R)]
    handle.remove()
    dropping = make(lora_dropout=0.5)
    ones = torch.ones(5000, K)
    model.eval()
    assert not torch.allclose(dropping(x), dropping(x))
    torch.testing.assert_close(dropping(ones).mean(0), model(ones).mean(0), rtol=0.1, atol=0.1)


def test_starts_as_the_identity_and_says_what_it_cannot():
    model = peftfast.get_peft_model(make_base(), config())
    with model.disable_adapter():
        base = model(make_input())
    assert torch.equal(model(make_input()), base)
    for changes, message in (
        ({"qalora_group_size": 7}, "m: `use_qalora=True` requires.*64.*divisible by 'qalora_group_size' .7."),
        ({"init_lora_weights": "olora"}, "use_qalora does not go with init_lora_weights='olora'"),
        ({"use_dora": True}, "combination: use_dora, use_qalora"),
    ):
        base = make_base()
        with pytest.raises(ValueError, match=message):
            peftfast.get_peft_model(base, config(**changes))
        assert [n for n, _ in base.named_parameters()] == ["m.weight", "m.bias"]
    with pytest.raises(ValueError, match="for linear layers, not for a Embedding"):
        peftfast.get_peft_model(One(nn.Embedding(8, 16)), config())
