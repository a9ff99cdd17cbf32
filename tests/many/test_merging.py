"""Merging: rounded once, taken out again bit for bit, and never half done."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import mmap
import pickle
import warnings
from contextlib import nullcontext

import oracle
import pytest
import torch
from interrupting import pressing_ctrl_c
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

import peftfast
from peftfast import LoraConfig
from peftfast.base import weight as held
from peftfast.base.dense import DenseWeight
from peftfast.layers import merger

FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def quantised(kind: str, n: int = 64, k: int = 128) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(n, k) * 0.05
    if kind == "nf4":
        lin = bnb.nn.Linear4bit(k, n, bias=True, quant_type="nf4", compute_dtype=torch.float32)
        lin.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    else:
        lin = bnb.nn.Linear8bitLt(k, n, bias=True, has_fp16_weights=False)
        lin.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return lin.to("cpu")


def every_byte(module: nn.Module) -> list[torch.Tensor]:
    """All a base layer stores, quantisation state included."""
    found = [t.detach().clone() for t in module.state_dict().values() if isinstance(t, torch.Tensor)]
    state = getattr(module.weight, "quant_state", None)
    while state is not None:
        found += [t.clone() for t in vars(state).values() if isinstance(t, torch.Tensor)]
        state = getattr(state, "state2", None)
    for name in ("CB", "SCB"):
        value = getattr(module.weight, name, None)
        if isinstance(value, torch.Tensor):
            found.append(value.clone())
    return found


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )


def random_adapters(model: nn.Module, scale: float = 0.1) -> nn.Module:
    return oracle.randomised(model, scale).eval()


def wrapped(base: nn.Module, adapters: int = 3) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peftfast.get_peft_model(oracle.One(base), LoraConfig(r=4, lora_alpha=8, target_modules=["m"]), "n0")
        for i in range(1, adapters):
            model.add_adapter(f"n{i}", LoraConfig(r=2 * i, lora_alpha=i, target_modules=["m"]))
    return random_adapters(model)


@pytest.mark.parametrize("keep", [True, "host"])
@pytest.mark.parametrize("kind", [*FLOATS, "nf4", "int8"], ids=str)
def test_cycles_leave_every_bit(kind, keep):
    base = quantised(kind) if isinstance(kind, str) else nn.Linear(128, 64).to(kind)
    if not isinstance(kind, str):
        with torch.no_grad():
            base.weight[0, :4] = torch.tensor([0.0, -0.0, 1e-7, -1e-7])  # signed zeros and denormals come back too
    model = wrapped(base)
    before = every_byte(base)
    names = list(model.peft_config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(84):  # twice every order of what follows
            chosen = names[: i % 3 + 1] if i % 2 else [names[i % 3]]
            model.base_model.merge_adapter(chosen, keep=keep)
            if i == 0:
                assert not same_bits(every_byte(base), before)
            if i % 7 == 3:  # another one on top
                model.base_model.merge_adapter(names)
            model.base_model.unmerge_adapter()
    assert same_bits(every_byte(base), before)


def half_ulp(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance between the neighbours of `exact` (fp64) in `dtype`."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(exact.abs().clamp_min(info.tiny)))
    return torch.exp2(exponent) * info.eps / 2


@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_merged_weight_is_within_half_an_ulp_of_the_fp64_merge(dtype, scale):
    base = nn.Linear(512, 384).to(dtype)
    model = random_adapters(wrapped(base), scale)
    names = list(model.peft_config)
    layer = model.base_model.model.m
    exact = base.weight.detach().double()
    terms, count = exact.abs(), 1
    for name in names:
        a, b = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
        exact = exact + layer.scaling[name] * (b @ a)
        terms, count = terms + layer.scaling[name] * (b.abs() @ a.abs()), count + len(a)
    model.base_model.merge_adapter(names)  # three at once, rounded once
    error = (base.weight.detach().double() - exact).abs()
    # half precision is summed in fp32, which shows where almost nothing is left of the terms (Higham 2002, section 4.2)
    summed = count * torch.finfo(torch.float32).eps / 2 * terms if dtype.itemsize == 2 else 0.0
    half = half_ulp(exact, dtype)
    worst = ((error - summed) / half).max().item()
    assert worst <= 1 + 1e-9, f"{worst} half ulps"
    assert (error <= half).float().mean() > 0.999
    # what the layer puts out with each unit vector, in fp64, is a column of that weight: no other rounding hides there
    merged, weight = copy.deepcopy(layer).double(), base.weight.detach()
    assert merged.base_layer.weight.dtype == torch.float64 and merged.merged_adapters == names
    with torch.no_grad():
        out = merged(torch.eye(512, dtype=torch.float64)) - merged.base_layer.bias
    assert ((out.t() - exact).abs() <= summed + half * (1 + 1e-6) + 1e-12).all()
    assert not torch.equal(weight.double(), exact)


@pytest.mark.parametrize(
    "base", [nn.Linear(96, 64), Conv1D(64, 96), nn.Conv2d(16, 24, 3, groups=2)], ids=["linear", "conv1d", "conv2d"]
)
def test_several_scalings_are_within_half_an_ulp_of_the_fp64_merge(base):
    def config(inputs):
        how = {"target_modules": ["m"], "fan_in_fan_out": isinstance(base, Conv1D)}
        return peftfast.IA3Config(feedforward_modules=["m"] if inputs else [], **how)

    nn.init.normal_(base.bias)
    model = peftfast.get_peft_model(oracle.One(base), config(False), "a")
    for name, inputs in zip("bc", (True, False), strict=True):
        model.add_adapter(name, config(inputs))
    layer = oracle.randomised(model, 1.0, only="ia3_").base_model.model.m
    weight, bias, names = base.weight.detach().double(), base.bias.detach().double(), list(model.peft_config)
    one = copy.deepcopy(model).double()
    for name in names:
        one.base_model.merge_adapter([name])
        changed = one.base_model.model.m.base_layer
        weight, bias = weight * changed.weight / base.weight, bias * changed.bias / base.bias
        one.base_model.unmerge_adapter()
    layer.merge(adapter_names=names)
    for merged, exact in ((base.weight, weight), (base.bias, bias)):
        assert ((merged.double() - exact).abs() / half_ulp(exact, torch.float32)).max() <= 1 + 1e-6


def test_merged_experts_are_within_half_an_ulp_of_the_fp64_merge():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 48, 64))

        def forward(self, x):
            return torch.einsum("enk,bk->ben", self.up, x)

    base = nn.Sequential(Stack())
    config = LoraConfig(r=4, target_modules=[], target_parameters=["0.up"], init_lora_weights=False)
    model = peftfast.get_peft_model(base, config, "one")
    model.add_adapter("two", config)
    (layer,) = model.base_model.inventory.layers.values()
    exact = layer.site.weight.dense(torch.float64)
    for adapter in layer.adapters.values():
        a, b = (adapter[slot].detach().double() for slot in adapter.pair)
        exact = exact + adapter.scale * layer.site.delta(a, b)
    model.base_model.merge_adapter(["one", "two"])
    error = (layer.site.weight.dense(torch.float64) - exact).abs()
    assert (error / half_ulp(exact, torch.float32)).max() <= 1 + 1e-9


@pytest.mark.parametrize("dtype, options", [(torch.bfloat16, {}), (torch.float32, {"use_dora": True})])
def test_outputs_do_not_change_and_pefts_error_is_no_smaller(dtype, options):
    twins = oracle.Twins(lambda: oracle.llama(hidden=64).to(dtype), {"r": 8, "target_modules": "all-linear"} | options)
    with torch.no_grad():
        truth = copy.deepcopy(twins.theirs).double()
        for model in (twins.ours, twins.theirs):
            model.base_model.merge_adapter()
        oracle.assert_no_further(
            {"logits": oracle.logits(twins.ours)}, {"logits": oracle.logits(twins.theirs)},
            {"logits": oracle.logits(truth)}, slack=1.1,
        )  # fmt: skip


def two() -> nn.Module:
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("two", LoraConfig(r=2, target_modules=["v_proj", "down_proj"]))
    return random_adapters(model)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_an_adapter_that_one_layer_has_merged_is_deleted_nowhere():
    model = two()
    layers = model.base_model.inventory.layers.values()
    [*layers][-1].merge(adapter_names=["two"])
    with pytest.raises(ValueError, match="Cannot delete adapter.*two.* while they are merged"):
        model.delete_adapter("two")
    assert list(model.peft_config) == ["default", "two"] and sum("two" in layer.adapters for layer in layers) == 4


def test_nothing_is_half_done_when_a_later_layer_cannot_be_merged():
    model = two()
    before = weights(model)
    broken = model.base_model.model.model.layers[1].mlp.down_proj.lora_B["two"].weight
    kept = broken.detach().clone()
    for prepare in (lambda: None, lambda: model.base_model.merge_adapter(["default"])):
        prepare()
        state = weights(model)
        with torch.no_grad():
            broken[0, 0] = float("nan")
        with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter two"):
            model.base_model.merge_adapter(["two"], safe_merge=True)
        with torch.no_grad():
            broken.copy_(kept)
        now = weights(model)
        assert all(torch.equal(now[k], state[k]) for k in state)
        merged = {n for layer in model.base_model.inventory.layers.values() for n in layer.merged_adapters}
        assert "two" not in merged
    model.base_model.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in weights(model).items())


@pytest.mark.parametrize("keep", [True, "host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_half_done_where_memory_ends_with_a_weight_written(monkeypatch, dtype, keep):
    """What is stored is looked at afterwards, which takes memory too."""
    model = two().to(dtype)
    written = []

    def store(weight, exact, rounding):
        result = rounded(weight, exact, rounding)
        written.append(weight)
        if len(written) == 3:
            raise MemoryError
        return result

    rounded = merger.store
    before = weights(model)
    for prepare in (lambda: None, lambda: model.base_model.merge_adapter(["default"], keep=keep)):
        prepare()
        state = weights(model)
        with monkeypatch.context() as patch:
            patch.setattr(merger, "store", store)
            with pytest.raises(MemoryError):
                model.base_model.merge_adapter(["two"], keep=keep)
        written.clear()
        assert all(torch.equal(v, state[k]) for k, v in weights(model).items())
        merged = {n for layer in model.base_model.inventory.layers.values() for n in layer.merged_adapters}
        assert "two" not in merged
    model.base_model.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in weights(model).items())


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("again", [False, True])
def test_nothing_is_half_done_wherever_ctrl_c_is_pressed(bias, again):
    """Every line of the merger in turn: what is in the weight is what the layer says is in it."""
    config = LoraConfig(target_modules=["0"], init_lora_weights=False)
    model = peftfast.get_peft_model(nn.Sequential(nn.Linear(8, 8)), dataclasses.replace(config, bias=bias))
    model.add_adapter("two", config)
    layer = model.base_model.model[0]
    original = every_byte(layer.base_layer)
    for at in itertools.count(1):
        if again:
            layer.merge(adapter_names=["two"])
        state, inside = every_byte(layer.base_layer), layer.merged_adapters
        interrupted = pressing_ctrl_c(at, lambda: layer.merge(adapter_names=["default"]), merger) == at
        if interrupted:
            assert same_bits(every_byte(layer.base_layer), state) and layer.merged_adapters == inside
            assert (layer.merger.kept is None) == (not inside)
        else:
            assert "default" in layer.merged_adapters and not same_bits(every_byte(layer.base_layer), state)
        if layer.merged:
            layer.unmerge()
        assert same_bits(every_byte(layer.base_layer), original)
        if not interrupted:
            break
    assert at > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merge_for_good_that_ctrl_c_ends_is_not_repeated_on_top_of_itself(dtype):
    unsure = 0
    for at in itertools.count(1):
        config = LoraConfig(target_modules=["0"], init_lora_weights=False)
        model = peftfast.get_peft_model(nn.Sequential(nn.Linear(8, 8, dtype=dtype)), config)
        layer = model.base_model.model[0]
        before = every_byte(layer.base_layer)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            lines = pressing_ctrl_c(at, lambda layer=layer: layer.merge(keep=False), merger)
        if lines < at:
            break
        if said:
            assert "0: merging ['default'] for good was interrupted" in str(said[-1].message)
            with pytest.raises(RuntimeError, match="load the base model again"):
                model.merge_and_unload()
            unsure += 1
        else:
            assert layer.merged != same_bits(every_byte(layer.base_layer), before)
    assert layer.merged and not layer.merger.unsure and unsure > 3


@pytest.mark.parametrize("kind", [LoraConfig(), peftfast.AdaLoraConfig(total_step=10)], ids=["lora", "adalora"])
def test_a_safe_merge_for_good_copies_no_weight(kind, monkeypatch):
    """Where sizes of factors say that all is finite; a copy of the base was kept until the last layer was merged."""
    config = copy.deepcopy(kind)
    config.target_modules = {"0", "1"}
    base = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False))
    model = random_adapters(peftfast.get_peft_model(base, config))
    expected = copy.deepcopy(model).merge_and_unload()
    monkeypatch.setattr(merger, "_SMALL", 0)
    for name in ("snapshot", "dense"):
        monkeypatch.setattr(DenseWeight, name, lambda *_: pytest.fail("a weight was copied"))
    merged = model.merge_and_unload(safe_merge=True)
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in merged.state_dict().items())


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_safe_merge_refuses_what_its_dtype_cannot_hold_and_nothing_else(sign, keep):
    base = nn.Sequential(nn.Linear(8, 8, bias=False, dtype=torch.float16), nn.Linear(8, 8, bias=False))
    model = peftfast.get_peft_model(base, LoraConfig(r=2, lora_alpha=2, target_modules=["0", "1"]))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.weight[3, 5] = 60000.0
        layer.lora_A["default"].weight[:, 5], layer.lora_B["default"].weight[3] = 100.0, sign * 50.0
    before = weights(model)
    with pytest.raises(ValueError, match="exceed what torch.float16 can hold") if sign > 0 else nullcontext():
        model.base_model.merge_adapter(safe_merge=True, keep=keep)
    assert all(torch.equal(v, before[k]) for k, v in weights(model).items()) == (sign > 0)
    if sign < 0:
        assert layer.weight[3, 5] == 50000.0


@pytest.mark.parametrize("small", [0, merger._SMALL], ids=["without values", "with values"])
def test_merging_for_good_is_checked_before_anything_is_written(small, monkeypatch):
    monkeypatch.setattr(merger, "_SMALL", small)
    model = two()
    before = weights(model)
    broken = model.base_model.model.model.layers[1].mlp.down_proj.lora_B["two"].weight
    kept = broken.detach().clone()
    with torch.no_grad():
        broken[0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True, adapter_names=["default", "two"])
    with torch.no_grad():
        broken.copy_(kept)
    assert all(torch.equal(v, before[k]) for k, v in weights(model).items())
    # a kind of adapter that has no merged form, in a late layer
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peftfast.get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1"], lora_bias=True))
    before = weights(model)
    with pytest.raises(RuntimeError, match="the base layer has no bias"):
        model.merge_and_unload()
    assert all(torch.equal(v, before[k]) for k, v in weights(model).items())


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_whether_small_weights_can_be_merged_is_not_asked_of_fake_tensors(options, monkeypatch):
    """Which took longer than all the rest of merging for good, and a second to import."""

    class Asked(Exception): ...

    monkeypatch.setattr("torch._subclasses.fake_tensor.FakeTensorMode", Asked)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **options)
    model = oracle.randomised(peftfast.get_peft_model(oracle.llama(bias=True), config))
    expected = oracle.logits(model)
    torch.testing.assert_close(oracle.logits(model.merge_and_unload()), expected)


def test_names_that_come_one_by_one_are_merged_in_every_layer():
    model = two()
    model.base_model.set_adapter(["default", "two"])
    expected = oracle.logits(model)
    model.merge_adapter(name for name in ("default", "two"))
    assert all(layer.merged for layer in model.base_model.inventory.layers.values())
    model.unmerge_adapter()
    merged = model.merge_and_unload(adapter_names=map(str, ("default", "two")))
    torch.testing.assert_close(oracle.logits(merged), expected)


def test_a_list_of_no_names_says_that_nothing_is_merged():
    model = two()
    with pytest.warns(peftfast.errors.PeftWarning, match=r"names no adapter.*None.*active ones, \['default'\]"):
        model.merge_adapter([])
    assert not any(layer.merged for layer in model.base_model.inventory.layers.values())
    with pytest.warns(peftfast.errors.PeftWarning, match="names no adapter"):
        merged = model.merge_and_unload(adapter_names=[])
    assert torch.equal(oracle.logits(merged), oracle.logits(oracle.llama()))


WITH_THE_BASE = {
    "embedding": (oracle.llama, {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied embedding": (lambda: oracle.llama(tied=True), {"target_modules": ["q_proj", "embed_tokens"]}),
    "head": (oracle.llama, {"target_modules": ["q_proj", "lm_head"]}),
    "biases": (oracle.gpt2, {"target_modules": ["c_attn"], "bias": "all", "lora_bias": True}),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("keep", [True, "host"])
@pytest.mark.parametrize("kind", WITH_THE_BASE)
def test_what_is_saved_of_the_base_while_adapters_are_merged_is_without_them(tmp_path, kind, keep):
    """Whoever loads it puts the adapter on top."""
    make, options = WITH_THE_BASE[kind]
    model = peftfast.get_peft_model(make(), LoraConfig(r=2, init_lora_weights=False, **options)).eval()
    oracle.moved(model)
    model.save_pretrained(tmp_path / "before")
    expected = load_file(tmp_path / "before" / "adapter_model.safetensors")
    model.merge_adapter(keep=keep)
    model.save_pretrained(tmp_path / "while")
    saved = load_file(tmp_path / "while" / "adapter_model.safetensors")
    assert saved.keys() == expected.keys() and any("lora_" not in key for key in saved)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in saved.items())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["embedding", "tied embedding", "head"])
@torch.no_grad()
def test_a_file_with_the_base_beside_it_leaves_what_is_merged_into_that(tmp_path, kind):
    make, options = WITH_THE_BASE[kind]
    config = LoraConfig(r=2, init_lora_weights=False, **options)
    peftfast.get_peft_model(make(), config).save_pretrained(tmp_path)
    other = make()
    target = options["target_modules"][1]
    (other.lm_head if target == "lm_head" else other.model.embed_tokens).weight[0, 0] += 1
    for base in (make(), other):
        model = peftfast.get_peft_model(base, config, "merged").eval()
        model.merge_adapter()
        logits = oracle.logits(model)
        if base is other:
            with pytest.raises(peftfast.AdapterLoadError, match=f"{target}.base_layer.weight.* merged inside"):
                model.load_adapter(tmp_path, "loaded")
            assert "loaded" not in model.peft_config
        else:
            model.load_adapter(tmp_path, "loaded")
        assert torch.equal(oracle.logits(model), logits)


def test_what_changes_an_adapter_while_it_is_merged_is_refused_or_handled(tmp_path):
    model = two()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = oracle.logits(model)
        base = model.base_model
        base.merge_adapter(["default"])
        merged = weights(model)

        def refused(match, call, error=ValueError):
            with pytest.raises(error, match=match):
                call()
            assert all(torch.equal(v, merged[k]) for k, v in weights(model).items())

        refused("while they are merged", lambda: model.delete_adapter("default"))
        refused("Cannot load weights into adapter default while it is merged",
                lambda: model.load_adapter(tmp_path, "default"))  # fmt: skip
        pissa = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
        refused("unmerge first", lambda: model.add_adapter("three", pissa))
        dora = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
        refused("unmerge first", lambda: model.add_adapter("three", dora))
        refused("there are merged adapters", lambda: oracle.logits(model, adapter_names=["two"] * 2))
        layer = base.model.model.layers[0].self_attn.q_proj
        with pytest.warns(UserWarning, match="no effect until it is unmerged"):
            layer.set_scale("default", 2.0)
        layer.set_scale("two", 2.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.set_scale("default", 1.0)
        with pytest.warns(UserWarning, match="already merged, nothing to do"):
            base.merge_adapter(["default"])
        with pytest.raises(TypeError, match="list of strings"):
            base.merge_adapter("default")
        model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))  # does not read the base
        with pytest.warns(peftfast.PeftWarning, match="its new weights have no effect until it is unmerged"):
            peftfast.set_peft_model_state_dict(model, peftfast.get_peft_model_state_dict(model))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            peftfast.set_peft_model_state_dict(model, peftfast.get_peft_model_state_dict(model, None, "plain"), "plain")
        with pytest.warns(UserWarning, match="Unmerging the model first"):
            model.set_adapter("default")
        assert torch.equal(oracle.logits(model), expected)
        with pytest.warns(UserWarning, match="Already unmerged"):
            base.unmerge_adapter()


def test_the_change_of_an_adapter_that_has_a_bias():
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["m"], lora_bias=True)
    layer = random_adapters(peftfast.get_peft_model(oracle.One(nn.Linear(8, 4)), config)).base_model.model.m
    expected = 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer.get_delta_weight("default"), expected.detach())


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_layer_merged_by_itself_says_nothing_of_the_others(call):
    model = two()
    layers = list(model.base_model.inventory.layers.values())
    with torch.no_grad():
        expected = oracle.logits(model)
        layers[1].merge()
        merged = getattr(model, call)() or model
        torch.testing.assert_close(oracle.logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert all(layer.merged_adapters == [n for n in layer.adapters if n == "default"] for layer in layers)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has one size of pages")
def test_what_is_kept_of_a_large_weight_lies_in_large_pages(monkeypatch):
    """New memory in pages of 4 KiB took longer to get than merging an adapter."""
    advised = []
    monkeypatch.setattr(held, "_small", 0)
    monkeypatch.setattr(held.time, "thread_time_ns", lambda: 0)

    class Memory(mmap.mmap):
        def madvise(self, *advice):
            advised.append((len(self), *advice))
            super().madvise(*advice)

    monkeypatch.setattr(mmap, "mmap", Memory)
    base = nn.Linear(1 << 10, (1 << 10) + 1, bias=False)
    model = wrapped(base, 1)
    before = base.weight.detach().clone()
    model.base_model.merge_adapter()
    kept = model.base_model.model.m.merger.kept["weight"]
    assert torch.equal(kept, before) and kept.shape == before.shape
    assert advised == [(6 << 20, mmap.MADV_HUGEPAGE, 0, 4 << 20)]

    model.base_model.unmerge_adapter()
    for milliseconds, asked in (
        (1, 2),
        (3, 3),
        (1, 3),
        (1, 3),
        (1, 4),
    ):  # two pages, and two copies until they come again
        clock = iter((0, milliseconds * 10**6))
        monkeypatch.setattr(held, "_MEANWHILE", 2)
        monkeypatch.setattr(held.time, "thread_time_ns", lambda clock=clock: next(clock))
        model.base_model.merge_adapter()
        assert torch.equal(model.base_model.model.m.merger.kept["weight"], before) and len(advised) == asked
        model.base_model.unmerge_adapter()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "kind, count",
    [
        (LoraConfig(), 1),
        (LoraConfig(lora_bias=True), 3),
        (LoraConfig(use_dora=True), 1),
        (peftfast.AdaLoraConfig(total_step=10), 1),
        (peftfast.IA3Config(feedforward_modules=[]), 3),
    ],
    ids=["lora", "three", "dora", "adalora", "three ia3"],
)
@pytest.mark.parametrize("safe", [False, True], ids=["", "safe"])
def test_merging_for_good_makes_at_most_one_weight(kind, count, dtype, safe):
    """A wider one, where the sum would be rounded otherwise, or one to be looked at before it is stored, if sizes of
    factors do not say that it is finite (of a bias, nobody asks them)."""
    n, k = 192, 4096
    config = copy.deepcopy(kind)
    config.target_modules = {"0"}
    model = peftfast.get_peft_model(nn.Sequential(nn.Linear(k, n, dtype=dtype)), config, "n0")
    for i in range(1, count):
        model.add_adapter(f"n{i}", config)
    random_adapters(model)
    with oracle.Operations() as made:
        model.base_model.model[0].merge(safe, list(model.peft_config), keep=False)
    sure = type(kind) is LoraConfig and not kind.lora_bias and not kind.use_dora
    wider = [(n, k)] if safe and not sure or dtype.itemsize < 4 else []
    assert [shape for shape in made.shapes if math.prod(shape) >= n * k] == wider


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("base", [nn.Conv2d(256, 256, 3), nn.Embedding(2048, 512)], ids=["conv", "embedding"])
def test_the_product_of_factors_is_added_where_it_is_made(base, count):
    model = peftfast.get_peft_model(nn.Sequential(copy.deepcopy(base)), LoraConfig(r=4, target_modules=["0"]), "n0")
    for i in range(1, count):
        model.add_adapter(f"n{i}", LoraConfig(r=4, target_modules=["0"]))
    layer = random_adapters(model).base_model.model[0]
    exact = base.weight.detach().double()
    for name in model.peft_config:
        exact = exact + layer.double().get_delta_weight(name)
    layer.float()
    with oracle.Operations() as made:
        layer.merge(adapter_names=list(model.peft_config), keep=False)
    torch.testing.assert_close(layer.weight, exact.float())
    assert made.elements <= base.weight.numel() / 2


def test_disabled_while_merged_and_merged_for_good():
    model = two()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with model.disable_adapter():
            base = oracle.logits(model)
        model.base_model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(oracle.logits(model), base)
        model.base_model.merge_adapter(keep=False)
    with pytest.raises(RuntimeError, match="without keeping the original weight"):
        model.base_model.unmerge_adapter()
    with pytest.raises(ValueError, match="keep must be"):
        model.base_model.model.model.layers[0].self_attn.q_proj.merge(keep="disk")


@pytest.mark.parametrize("options", [
    {"bias": "all", "target_modules": ["m"]}, {"bias": "lora_only", "target_modules": ["m"], "lora_bias": True},
    {"bias": "all", "target_modules": [], "target_parameters": ["m.weight"]},
])  # fmt: skip
def test_a_bias_that_trains_while_adapters_are_merged_keeps_what_it_learnt(options):
    """`bias="all"` trains the base's biases, merged or not; unmerging takes out the adapters alone, as in PEFT."""
    peft = pytest.importorskip("peft")
    x, before = torch.randn(4, 8, dtype=torch.float64), nn.Linear(8, 6).double()
    models = [
        library.get_peft_model(oracle.One(copy.deepcopy(before)), library.LoraConfig(r=2, **options))
        for library in (peftfast, peft)
    ]
    oracle.copy_parameters(random_adapters(models[0]), models[1])
    for model in models:
        bias = model.base_model.model.m.base_layer.bias
        model.merge_adapter()
        model(x).square().sum().backward()
        with torch.no_grad():
            bias -= 0.01 * bias.grad
    if options["target_modules"]:
        models[0].add_adapter("other", LoraConfig(r=2, target_modules=["m"]))
        with pytest.warns(UserWarning, match="additionally merging other"):
            models[0].merge_adapter(["other"])
    ours, theirs = (model.unmerge_adapter() or model.base_model.model.m.base_layer for model in models)
    assert torch.equal(ours.weight, before.weight)
    assert (ours.bias - before.bias).abs().min() > 1e-4
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_unloading_without_merging_takes_out_what_is_merged():
    """Also rows of tokens, and in the order in which layers that share a weight can give it back."""
    base = oracle.One(nn.Linear(8, 8, bias=False))
    base.twin = nn.Linear(8, 8, bias=False)
    base.twin.weight = base.m.weight
    model = random_adapters(peftfast.get_peft_model(base, LoraConfig(r=2, target_modules=["m", "twin"])))
    before = base.twin.base_layer.weight.clone()
    base.m.merge()
    base.twin.merge()  # each by itself, so both into the one weight
    assert torch.equal(model.unload().m.weight, before) and base.twin.weight is base.m.weight
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3])
    model = peftfast.get_peft_model(oracle.llama(), config)
    table = model.get_base_model().model.embed_tokens.original_module.weight
    before = table.clone()
    model.get_base_model().model.embed_tokens.token_adapter.trainable_tokens_delta["default"].data.add_(1.0)
    model.merge_adapter()
    assert not torch.equal(table, before)
    assert model.unload().model.embed_tokens.weight is table and torch.equal(table, before)


# ---- weights that several modules use --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], ["q_proj", "embed_tokens"]]
)
def test_a_tied_weight_is_the_layers_own_while_merged(targets, tmp_path):
    from transformers import LlamaForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peftfast.get_peft_model(oracle.llama(tied=True), LoraConfig(r=4, target_modules=targets))
    random_adapters(model)
    inner = model.base_model.model
    with torch.no_grad():
        expected = oracle.logits(model)
        tied = inner.get_input_embeddings().weight
        before = tied.clone()
        with pytest.warns(UserWarning, match="tied to other modules"):
            model.base_model.merge_adapter()
        torch.testing.assert_close(oracle.logits(model), expected, rtol=1e-4, atol=1e-4)
        model.base_model.unmerge_adapter()
        assert inner.get_input_embeddings().weight is tied and inner.get_output_embeddings().weight is tied
        assert torch.equal(tied, before)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = model.merge_and_unload()
        torch.testing.assert_close(oracle.logits(merged), expected, rtol=1e-4, atol=1e-4)
        assert not merged.config.tie_word_embeddings
        merged.save_pretrained(tmp_path)
        plain = LlamaForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(oracle.logits(plain), oracle.logits(merged))


def test_tied_on_purpose_stays_tied():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peftfast.get_peft_model(
            oracle.llama(tied=True), LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)
        )
    random_adapters(model)
    inner = model.base_model.model
    with torch.no_grad():
        expected = oracle.logits(model)
        tied = inner.get_input_embeddings().weight
        before = tied.clone()
        model.base_model.merge_adapter()
        torch.testing.assert_close(oracle.logits(model), expected, rtol=1e-4, atol=1e-4)
        assert inner.get_output_embeddings().weight is tied
        model.base_model.unmerge_adapter()
        assert torch.equal(tied, before)


def test_another_adapter_is_merged_into_a_weight_that_is_the_layers_own_meanwhile():
    model = peftfast.get_peft_model(oracle.llama(tied=True), LoraConfig(r=4, target_modules=["lm_head"]), "one")
    model.add_adapter("two", LoraConfig(r=4, target_modules=["lm_head"]))
    random_adapters(model).base_model.set_adapter(["one", "two"])
    inner = model.base_model.model
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, table = oracle.logits(model), inner.get_input_embeddings().weight
        before = table.clone()
        for name in ("one", "two"):
            model.merge_adapter([name])
            assert torch.equal(table, before)
            torch.testing.assert_close(oracle.logits(model), expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        assert torch.equal(table, before) and torch.equal(oracle.logits(model), expected)
        inner.lm_head.lora_A["two"].weight.fill_(torch.inf)
        model.set_adapter("one")
        model.merge_adapter()
        alone = oracle.logits(model)
        with pytest.raises(ValueError, match="NaNs detected"):
            model.merge_adapter(["two"], safe_merge=True)
        assert torch.equal(table, before) and torch.equal(oracle.logits(model), alone)
        model.unmerge_adapter()
    assert torch.equal(table, before) and inner.lm_head.base_layer.weight is table


@pytest.mark.parametrize("first", [["embed_tokens"], ["lm_head"]], ids=["of the embedding", "of the head"])
@pytest.mark.parametrize("active", [["tied", "own"], ["own"], ["tied"]], ids=" ".join)
def test_an_adapter_beside_one_that_ties_is_merged_where_it_is(first, active):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tying = LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)
        model = peftfast.get_peft_model(oracle.llama(tied=True), tying, "tied")
        model.add_adapter("own", LoraConfig(r=4, target_modules=first))
        random_adapters(model).base_model.set_adapter(active)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        with torch.no_grad():
            expected = oracle.logits(model)
            model.merge_adapter()
            torch.testing.assert_close(oracle.logits(model), expected, rtol=1e-4, atol=1e-4)
            model.unmerge_adapter()
            assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
            if active == ["own"]:
                model.delete_adapter("tied")
            torch.testing.assert_close(oracle.logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_a_weight_that_nothing_is_merged_into_stays_that_of_several_modules():
    model = peftfast.get_peft_model(oracle.llama(tied=True), LoraConfig(r=2, target_modules=["embed_tokens"]), "table")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    merged = model.merge_and_unload(adapter_names=["other"])
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_one_of_several_modules_that_share_a_weight_has_another_adapter_too():
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder")
             for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 8))}  # fmt: skip
    model = BartForConditionalGeneration(BartConfig(vocab_size=32, d_model=16, max_position_embeddings=16, **sizes))
    ids = torch.tensor([[4, 5, 6]])

    def logits(model):
        return model(input_ids=ids, decoder_input_ids=ids.flip(1)).logits

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tying = LoraConfig(r=2, target_modules=["shared"], ensure_weight_tying=True)
        model = peftfast.get_peft_model(model, tying, "all")
        model.add_adapter("one", LoraConfig(r=3, target_modules=["encoder.embed_tokens"]))
        random_adapters(model, 0.5).base_model.set_adapter(["all", "one"])
        assert len(model.base_model.inventory.layers) == 4
        expected = logits(model)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        assert torch.equal(logits(model), expected)
        torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_merged_models_are_plain_checkpoints(dtype, tmp_path):
    from transformers import LlamaForCausalLM

    base = oracle.llama().to(dtype)
    names = set(base.state_dict())
    model = random_adapters(peftfast.get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")))
    merged = model.merge_and_unload()
    assert set(merged.state_dict()) == names and not hasattr(merged, "peft_config")
    merged.save_pretrained(tmp_path)
    plain = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    assert all(torch.equal(plain[k], v) for k, v in merged.state_dict().items()) and set(plain) == names


def test_layers_that_were_told_one_by_one_merge_what_they_compute():
    """`layer.set_adapter` on every layer, which nobody tells the model."""
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    for name, dora in (("two", True), ("three", True), ("four", False)):
        model.add_adapter(name, LoraConfig(target_modules=["q_proj"], init_lora_weights=False, use_dora=dora))
    layers = [m for m in model.modules() if isinstance(m, peftfast.layers.layer.BaseTunerLayer)]
    for layer, names in zip(layers, (["two", "three", "default"], ["four"]), strict=True):
        layer.set_adapter(names)
    expected = oracle.logits(model)
    model.merge_adapter()
    assert [layer.merged_adapters for layer in layers] == [["two", "three", "default"], ["four"]]
    torch.testing.assert_close(oracle.logits(model), expected)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    torch.testing.assert_close(oracle.logits(merged), expected)


def _assign(layer):
    layer.merged_adapters = []


def _pop(layer):
    while layer.merged_adapters:
        layer.merged_adapters.pop()


@pytest.mark.parametrize("empty", [_assign, _pop, lambda layer: layer.merged_adapters.clear()])
@pytest.mark.parametrize("put_back", [True, False], ids=["weights put back", "left as they are"])
@pytest.mark.filterwarnings("ignore")
def test_others_say_that_nothing_is_merged(empty, put_back):
    """verl merges for a rollout, copies the base's weights back and empties the lists; ReLoRA's loops leave what is
    merged where it is and start anew. As in PEFT, the adapters act again, and what is merged next is taken out to what
    the weights are now."""
    twins = oracle.Twins(oracle.llama, {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False})
    outputs = []
    for model in (twins.ours, twins.theirs):
        layers = [m for m in model.modules() if hasattr(m, "merged_adapters")]
        kept = [layer.base_layer.weight.detach().clone() for layer in layers]
        found = [oracle.logits(model)]
        for factor in (1.0, 1.5):
            for layer in layers:
                layer.merge()
                assert layer.merged and layer.merged_adapters == ["default"]
            found.append(oracle.logits(model))
            for layer, weight in zip(layers, kept, strict=True):
                if put_back:
                    layer.base_layer.weight.data.copy_(weight * factor)
                empty(layer)
                assert not layer.merged and layer.merged_adapters == []
            found.append(oracle.logits(model))
            with model.disable_adapter():
                found.append(oracle.logits(model))
        before = [layer.base_layer.weight.detach().clone() for layer in layers]
        model.merge_adapter()
        model.unmerge_adapter()
        for layer, weight in zip(layers, before, strict=True):
            torch.testing.assert_close(layer.base_layer.weight, weight, rtol=0, atol=0 if model is twins.ours else 1e-6)
        outputs.append(found)
    assert (outputs[0][2] - outputs[0][3]).abs().max() > 1e-2
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_copies_of_a_layer_have_lists_of_their_own():
    model = wrapped(nn.Linear(8, 4), adapters=1)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.base_model.model.m.merged_adapters.clear()
    assert model.base_model.model.m.merged_adapters == ["n0"]
    names = pickle.loads(pickle.dumps(model.base_model.model.m.merged_adapters))
    assert names == ["n0"] and type(names) is list


@pytest.mark.parametrize(
    ("compute", "end"),
    [
        (torch.nn.utils.weight_norm, torch.nn.utils.remove_weight_norm),
        (torch.nn.utils.spectral_norm, torch.nn.utils.remove_spectral_norm),
        (torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrize.remove_parametrizations),
        (lambda m: prune.l1_unstructured(m, "weight", 0.5), prune.remove),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_a_weight_that_is_computed_is_not_merged_into_and_the_error_says_what_ends_that(compute, end):
    base = torch.nn.Sequential()
    base.fc = compute(torch.nn.Linear(8, 8))
    model = peftfast.get_peft_model(base, LoraConfig(target_modules=["fc"], init_lora_weights=False)).eval()
    x = torch.randn(2, 8)
    before = model(x)
    with pytest.raises(ValueError, match=rf"torch\.nn\.utils\.\S*{end.__name__}\(module, 'weight'\)"):
        model.merge_adapter()
    end(base.fc.base_layer, "weight")
    model.merge_adapter()
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("max_norm", [1.0, 1000.0], ids=["shortened", "never reached"])
def test_an_embedding_whose_rows_are_shortened_is_not_merged_into(max_norm):
    """Its merged rows would be shortened together, not the table's alone."""
    torch.manual_seed(0)
    model = peftfast.get_peft_model(
        oracle.One(nn.Embedding(10, 4, max_norm=max_norm)),
        LoraConfig(target_modules=["m"], r=2, init_lora_weights=False),
    )
    before = model(torch.arange(10))
    with pytest.raises(RuntimeError, match="would not be the adapted one") if max_norm == 1 else nullcontext():
        model.merge_adapter()
    torch.testing.assert_close(model(torch.arange(10)), before)


def test_whether_a_merge_works_is_tried_where_the_weight_lies(monkeypatch):
    """What is there is combined with factors from there: torch refuses tensors of two devices also where none has
    values."""
    model = peftfast.get_peft_model(oracle.llama(bias=True).to("meta"), LoraConfig(target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    method, found = layer.adapters["default"].method, []

    def merged(site, dense, adapter, base):
        found.extend(tensor.device.type for tensor in (dense.weight, dense.bias, base.weight, base.bias))
        return dense

    monkeypatch.setattr(type(method), "merged", lambda self, *args: merged(*args))
    layer.merger.check(["default"], set())
    assert found == ["meta"] * 4
