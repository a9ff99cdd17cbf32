"""Adapters of experts made from others: every expert as PEFT combines a linear layer, and files that PEFT reads."""

import importlib
import warnings

import oracle
import pytest
import torch
from experts import moe
from torch import nn

import peftfast
from peftfast.methods.combination import KINDS

peft = importlib.import_module("peft")
NAMES, WEIGHTS = ["a", "b", "c"], [0.7, -0.4, 1.5]
STACKS = ["inner", "outer", "mix"]


def adapted(make, ranks=(4, 4, 4), **options):
    """Three adapters, of other scalings."""
    model = make()
    for name, r, alpha in zip(NAMES, ranks, (8, 3, 5), strict=True):
        config = peftfast.LoraConfig(
            **{"r": r, "lora_alpha": alpha, "use_rslora": name == "b", "target_modules": [], **options}
        )
        if name == "a":
            model = peftfast.get_peft_model(model, config, "a")
        else:
            model.add_adapter(name, config)
    return oracle.randomised(model).eval()


def factors(layer, name):
    """Every expert's A [r, K] and B [N, r], in fp64, read as PEFT reads them."""
    a, b = (getattr(layer, f)[name].weight.detach().double() for f in ("lora_A", "lora_B"))
    a, b = a.reshape(layer.num_experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, layer.num_experts)
    return [(a[e], b[:, :, e]) for e in range(layer.num_experts)]


def changes(model, name):
    """[E, N, K] s B A of every adapted weight, in fp64."""
    found = {}
    for key, layer in model.base_model.inventory.layers.items():
        if name in layer.adapters:
            pairs = factors(layer, name) if hasattr(layer, "num_experts") else [
                tuple(getattr(layer, f)[name].weight.detach().double() for f in ("lora_A", "lora_B"))
            ]  # fmt: skip
            found[key] = layer.scaling[name] * torch.stack([b @ a for a, b in pairs])
    return found


def weighted(model, names, weights):
    parts = [changes(model, name) for name in names]
    return {
        key: sum(w * part[key] for w, part in zip(weights, parts, strict=True) if key in part)
        for key in dict.fromkeys(k for part in parts for k in part)
    }


def assert_same(found, expected, limit=1e-5):
    assert found.keys() == expected.keys() and found
    for key, value in expected.items():
        assert (found[key] - value).norm() <= limit * value.norm(), key


def by_peft(layer, kind, **arguments):
    """[E, N, K]: what PEFT makes of linear layers that have one expert's factors each."""
    pairs = {name: factors(layer, name) for name in NAMES}
    n, k = pairs["a"][0][1].shape[0], pairs["a"][0][0].shape[1]
    experts = nn.ModuleDict({f"e{i}": nn.Linear(k, n, bias=False) for i in range(layer.num_experts)})
    targets = list(experts)
    model = nn.Sequential(experts)
    for name in NAMES:
        config = peft.LoraConfig(r=pairs[name][0][0].shape[0], target_modules=targets)
        model = peft.get_peft_model(model, config, name) if name == "a" else model
        if name != "a":
            model.add_adapter(name, config)
    modules = [model.base_model.model[0][t] for t in targets]
    for name in NAMES:
        for module, (a, b) in zip(modules, pairs[name], strict=True):
            module.scaling[name] = layer.scaling[name]
            module.lora_A[name].weight.data, module.lora_B[name].weight.data = a.float(), b.float()
    model.add_weighted_adapter(NAMES, WEIGHTS, "mix", combination_type=kind, **arguments)
    return torch.stack([
        m.scaling["mix"] * (m.lora_B["mix"].weight.double() @ m.lora_A["mix"].weight.double()) for m in modules
    ]).detach()  # fmt: skip


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_as_peft_combines_a_linear_layer(kind, transposed, monkeypatch):
    def bernoulli(p):  # the same for every expert, however many are drawn at once
        kept = torch.rand(p.shape[-2:], generator=torch.Generator().manual_seed(p.shape[-1])) < p.flatten()[0]
        return kept.to(p.dtype).expand(p.shape)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    model = adapted(lambda: moe.plain(transposed), target_parameters=STACKS)
    arguments = {} if kind in ("svd", "cat", "linear") else {"density": 0.6}
    model.add_weighted_adapter(NAMES, WEIGHTS, "mix", combination_type=kind, **arguments)
    layers = model.base_model.inventory.layers
    assert [layer.num_experts for layer in layers.values()] == [3, 3, 1]
    assert_same(changes(model, "mix"), {k: by_peft(layer, kind, **arguments) for k, layer in layers.items()}, 2e-5)


def test_a_clamp_is_of_every_expert_by_itself():
    model = adapted(moe.plain, target_parameters=STACKS)
    options = {"svd_clamp": 0.9, "svd_rank": 3, "svd_full_matrices": False}
    model.add_weighted_adapter(NAMES, WEIGHTS, "mix", combination_type="svd", **options)
    expected = {k: by_peft(layer, "svd", **options) for k, layer in model.base_model.inventory.layers.items()}
    assert_same(changes(model, "mix"), expected, 1e-4)


#: id -> (model, fields)
MODELS = {
    "qwen3_moe": (moe.qwen3_moe, {"target_parameters": moe.BOTH, "target_modules": ["q_proj"]}),
    "gpt_oss": (moe.gpt_oss, {"target_parameters": moe.BOTH}),
    "by the names of layers": (moe.mixtral, {"target_modules": ["w1", "w2", "w3", "q_proj"]}),
    "plain": (moe.plain, {"target_parameters": STACKS}),
}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.filterwarnings("error:.*(missing|unexpected|matched no)")
def test_the_weighted_sum_of_changes_also_from_the_file(case, kind, tmp_path):
    make, options = MODELS[case]
    model = adapted(make, ranks=(2, 4, 3), **options)
    enough = {"svd_rank": 18} if kind == "svd" else {}
    expected = weighted(model, NAMES, WEIGHTS)
    model.add_weighted_adapter(NAMES, WEIGHTS, "mix", combination_type=kind, **enough)
    assert_same(changes(model, "mix"), expected)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".mix." in n)
    model.set_adapter("mix")
    with torch.no_grad():
        live = oracle.logits(model)
        model.save_pretrained(tmp_path, selected_adapters=["mix"])
        for library in (peftfast, peft):
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*(missing|unexpected|matched no)")
                if library is peft and make is not moe.plain:
                    moe.needs_peft_to_load()
                again = library.PeftModel.from_pretrained(make(), tmp_path / "mix")
            oracle.close(oracle.logits(again), live)
        model.set_adapter("a")
        assert not torch.allclose(oracle.logits(model), live, atol=1e-3)


def test_subtracting_and_one_alone():
    model = adapted(moe.gpt_oss, ranks=(2, 4, 3), target_parameters=moe.BOTH).double()
    expected = weighted(model, ["b", "c"], [1.0, -1.0])
    model.base_model.subtract_adapter("b", "c", "difference")
    assert_same(changes(model, "difference"), expected, 1e-12)
    expected = weighted(model, ["b"], [-2.0])
    model.add_weighted_adapter(["b"], [-2.0], "negative", combination_type="ties", density=0.1)
    assert_same(changes(model, "negative"), expected, 1e-12)


@pytest.mark.parametrize("order", [["a", "linears"], ["linears", "a"]])
def test_with_an_adapter_of_modules_only(order, tmp_path):
    model = adapted(moe.qwen3_moe, target_parameters=moe.BOTH)
    config = peftfast.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1, init_lora_weights=False)
    model.add_adapter("linears", config)
    expected = weighted(model, order, [0.5, 2.0])
    model.add_weighted_adapter(order, [0.5, 2.0], "mix", combination_type="cat")
    assert_same(changes(model, "mix"), expected)
    model.set_adapter("mix")
    model.eval().save_pretrained(tmp_path, selected_adapters=["mix"])
    with torch.no_grad():
        moe.needs_peft_to_load()
        again = oracle.quietly(peft.PeftModel.from_pretrained, moe.qwen3_moe(), tmp_path / "mix")
        oracle.close(oracle.logits(again), oracle.logits(model))


def test_what_no_parameter_has_is_refused():
    model = adapted(moe.qwen3_moe, target_parameters=moe.BOTH)
    model.add_adapter("biased", peftfast.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True))
    with pytest.raises(ValueError, match="does not work with lora_bias=True"):
        model.add_weighted_adapter(["a", "biased"], [1.0, 1.0], "mix", combination_type="cat")
    with pytest.raises(ValueError, match="not support adapters of Parameters, and a has"):
        peftfast.reduce_intruder_dimension(model, "a")
    assert list(model.peft_config) == [*NAMES, "biased"]
