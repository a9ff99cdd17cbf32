"""Combinations of adapters, next to PEFT's."""

from __future__ import annotations

import copy
import importlib
import warnings
from unittest.mock import Mock

import oracle
import pytest
import torch
from torch import nn

import peftfast
from peftfast import AdaLoraConfig, IA3Config, LoraConfig
from peftfast.methods.combination import KINDS
from peftfast.methods.lora.lora import Lora

NAMES, WEIGHTS = ["default", "two", "three"], [0.7, -0.4, 1.5]
CONV = ["embed", "conv1", "conv2", "conv3", "linear", "head"]


@pytest.fixture
def same_masks(monkeypatch):
    """Random pruning draws the same masks in both libraries, whatever else either has drawn before."""

    def restart():
        generator = torch.Generator().manual_seed(5)

        def bernoulli(p):
            return (torch.rand(p.shape, generator=generator, dtype=torch.float64) < p.flatten()[0]).to(p.dtype)

        monkeypatch.setattr(torch, "bernoulli", bernoulli)

    return restart


def three(make=oracle.llama, targets=("q_proj", "v_proj", "down_proj"), ranks=(4, 4, 4), **more) -> oracle.Twins:
    options = {"r": ranks[0], "lora_alpha": 8, "target_modules": list(targets), **more}
    twins = oracle.Twins(make, options)
    for model, library in ((twins.ours, peftfast), (twins.theirs, twins.peft)):
        model.add_adapter("two", library.LoraConfig(**{**options, "r": ranks[1], "lora_alpha": 3, "use_rslora": True}))
        model.add_adapter(
            "three", library.LoraConfig(**{**options, "r": ranks[2], "target_modules": list(targets)[:-1] + ["o_proj"]})
            if make is oracle.llama else library.LoraConfig(**{**options, "r": ranks[2]}),
        )  # fmt: skip
    twins.copy()
    return twins


def products(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """scaling · B A of every layer, from the live parameters."""
    result = {}
    for key, module in model.named_modules():
        if not isinstance(getattr(module, "scaling", None), dict) or name not in module.scaling:
            continue
        if name in getattr(module, "lora_A", ()):
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
        else:
            a, b = module.lora_embedding_A[name], module.lora_embedding_B[name]
        result[key] = module.scaling[name] * (b.detach().flatten(1).double() @ a.detach().flatten(1).double())
    return result


def arguments(kind: str) -> dict:
    pruning = kind not in ("svd", "cat", "linear")
    return {"combination_type": kind, **({"density": 0.6} if pruning else {})}


def same_products(twins: oracle.Twins, count: int) -> None:
    ours, theirs = products(twins.ours, "mix"), products(twins.theirs, "mix")
    assert ours.keys() == theirs.keys() and len(ours) == count
    for key in theirs:
        scale = theirs[key].abs().max().item()
        torch.testing.assert_close(
            ours[key], theirs[key], rtol=1e-4, atol=1e-5 * scale, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_equals_pefts_on_linear_layers(kind, same_masks):
    twins = three()
    for model in (twins.ours, twins.theirs):
        same_masks()
        model.base_model.add_weighted_adapter(NAMES, WEIGHTS, "mix", **arguments(kind))
    same_products(twins, 8)
    mine, other = twins.ours.peft_config["mix"], twins.theirs.peft_config["mix"]
    assert (mine.r, mine.lora_alpha, mine.target_modules) == (other.r, other.lora_alpha, other.target_modules)
    assert not any(p.requires_grad for n, p in twins.ours.named_parameters() if ".mix." in n)
    twins.ours.set_adapter("mix")
    twins.theirs.set_adapter("mix")
    with torch.no_grad():
        torch.testing.assert_close(oracle.logits(twins.ours), oracle.logits(twins.theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "density" in arguments(kind)])
def test_one_adapter_is_scaled_and_needs_no_density(kind):
    twins = three()
    for model, one in ((twins.ours, "three"), (twins.theirs, ["three"])):  # a name means a list of it
        model.base_model.add_weighted_adapter(one, [0.5], "mix", combination_type=kind)
    same_products(twins, 6)


@pytest.mark.parametrize("kind, ranks", [("cat", (4, 8, 4)), ("linear", (4, 4, 4)), ("linear", (8, 4, 4))])
def test_grouped_convolutions_keep_their_groups_apart(kind, ranks):
    base = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4))
    torch.manual_seed(0)
    model = peftfast.get_peft_model(base, LoraConfig(r=ranks[0], target_modules=["0"], init_lora_weights=False))
    for name, r in zip(NAMES[1:], ranks[1:], strict=True):
        model.add_adapter(name, LoraConfig(r=r, target_modules=["0"], init_lora_weights=False))
    names, weights = (NAMES, WEIGHTS) if kind == "cat" else (NAMES[:1], WEIGHTS[:1])
    model.base_model.add_weighted_adapter(names, weights, "mix", combination_type=kind)
    x, outputs = torch.randn(2, 4, 5, 5), {}
    with torch.no_grad(), model.disable_adapter():
        plain = model(x)
    for name in (*names, "mix"):
        model.set_adapter(name)
        outputs[name] = model(x) - plain
    expected = sum(w * outputs[n] for n, w in zip(names, weights, strict=True))
    torch.testing.assert_close(outputs["mix"], expected, rtol=1e-4, atol=1e-5)


def test_grouped_convolutions_of_a_smaller_rank_than_others():
    base = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 8, 3, groups=2))
    config = LoraConfig(r=8, rank_pattern={"0": 4}, target_modules=["0", "1"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peftfast.get_peft_model(base, config)
    model.add_weighted_adapter(["default"], [2.0], "mix")
    x = torch.randn(2, 4, 7, 7)
    for layer in model.base_model.inventory.layers.values():
        plain = layer.base_layer(x)
        model.set_adapter("default")
        expected = plain + 2.0 * (layer(x) - plain)
        model.set_adapter("mix")
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        x = plain


@pytest.mark.parametrize("kind", ["cat", "svd", "linear", "ties", "dare_linear", "ties_svd", "magnitude_prune_svd"])
def test_equals_pefts_on_tables_and_transposed_weights(kind, same_masks):
    targets = ["c_attn", "wte"]
    twins = three(oracle.gpt2, targets, fan_in_fan_out=True)
    for model in (twins.ours, twins.theirs):
        same_masks()
        oracle.quietly(model.base_model.add_weighted_adapter, NAMES, WEIGHTS, "mix", **arguments(kind))
    same_products(twins, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_module(kind):
    """cat and full-rank svd are the weighted sum itself; everything else must at least be a finite adapter."""
    model = peftfast.get_peft_model(oracle.net(), LoraConfig(r=4, target_modules=CONV, init_lora_weights=False))
    model.add_adapter("two", LoraConfig(r=4, lora_alpha=2, target_modules=CONV[1:], init_lora_weights=False))
    model.eval()
    parts = [products(model, n) for n in ("default", "two")]
    more = {"svd_rank": 8} if kind == "svd" else {}
    model.base_model.add_weighted_adapter(["default", "two"], [2.0, -0.5], "mix", **arguments(kind), **more)
    mix = products(model, "mix")
    assert mix.keys() == parts[0].keys()
    for key, value in mix.items():
        assert torch.isfinite(value).all()
        if kind in ("cat", "svd"):
            expected = 2.0 * parts[0][key] - 0.5 * parts[1].get(key, torch.zeros(()))
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_works_where_peft_refuses():
    twins = three(ranks=(2, 8, 4), modules_to_save=["lm_head"])
    base = twins.ours.base_model
    with pytest.raises(ValueError):
        twins.theirs.base_model.add_weighted_adapter(NAMES, WEIGHTS, "mix", combination_type="linear")
    with torch.no_grad():
        for name, parameter in twins.ours.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(torch.randn_like(parameter))
    base.add_weighted_adapter(NAMES, WEIGHTS, "mix", combination_type="linear")
    assert twins.ours.peft_config["mix"].r == 8
    head = base.model.lm_head
    own = head.original_module.weight
    expected = own + sum(w * (head.modules_to_save[n].weight - own) for n, w in zip(NAMES, WEIGHTS, strict=True))
    torch.testing.assert_close(head.modules_to_save["mix"].weight, expected)
    # a pattern in one adapter and a list in another
    twins.ours.add_adapter("four", LoraConfig(r=2, target_modules=r".*\.gate_proj"))
    base.add_weighted_adapter(["default", "four"], [1.0, 1.0], "five", combination_type="cat")
    layers = base.inventory.layers
    assert {k for k, v in layers.items() if "five" in v.adapters} == {
        k for k, v in layers.items() if {"default", "four"} & set(v.adapters)
    }
    # adapters without copies beside others that have some
    twins.ours.add_adapter("six", LoraConfig(r=2, target_modules=["q_proj"]))
    base.add_weighted_adapter(["four", "six"], [1.0, 1.0], "seven", combination_type="cat")
    assert "five" in head.modules_to_save and "seven" not in head.modules_to_save


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.bn, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.bn(self.lin(x)))


def normed(dtype):
    """Two adapters whose copies of the norm have seen different data."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["lin"], modules_to_save=["bn", "head"], init_lora_weights=False)
    model = peftfast.get_peft_model(Normed().to(dtype), config, "a", autocast_adapter_dtype=False)
    model.add_adapter("b", config, autocast_adapter_dtype=False)
    for name, spread in (("a", 3.0), ("b", 0.5)):
        model.set_adapter(name)
        model.train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * parameter.requires_grad)
            for _ in range(5):
                model(torch.randn(16, 8, dtype=dtype) * spread + 2)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_of_kept_modules_are_combined_in_their_own_precision(dtype):
    model = normed(dtype)
    x = torch.randn(4, 8, dtype=dtype)
    model.set_adapter("a")
    expected = model(x)
    model.add_weighted_adapter(["a"], [1.0], "same", "linear")
    model.add_weighted_adapter(["a", "b"], [0.3, 0.9], "mix", "cat")
    model.add_weighted_adapter(["a", "b"], [-1.0, 1.0], "difference", "cat")
    model.set_adapter("same")
    tiny = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(model(x), expected, rtol=tiny, atol=tiny)
    norm = model.base_model.model.bn
    own, a, b, mix, difference = (
        {n: t for n, t in m.state_dict().items() if t.is_floating_point()}
        for m in (norm.original_module, *(norm.modules_to_save[n] for n in ("a", "b", "mix", "difference")))
    )
    for name, value in mix.items():
        sum_of_all = own[name] + 0.3 * (a[name] - own[name]) + 0.9 * (b[name] - own[name])
        torch.testing.assert_close(value, sum_of_all, rtol=tiny, atol=tiny)
    assert bool((own["running_var"] + b["running_var"] < a["running_var"]).any())
    assert bool((difference["running_var"] > 0).all())
    model.set_adapter("difference")
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("first", [True, False])
def test_biases_are_combined_too(first):
    options = {"r": 2, "target_modules": ["q_proj"]}
    model = peftfast.get_peft_model(oracle.llama(bias=True), LoraConfig(**options, lora_bias=first))
    model.add_adapter("two", LoraConfig(**options, lora_bias=True, lora_alpha=16))
    oracle.randomised(model, 1.0, only="lora_B")
    model.eval().base_model.add_weighted_adapter(["default", "two"], [0.5, 2.0], "mix", combination_type="cat")
    with torch.no_grad():
        outputs = {}
        for name in ("default", "two", "mix"):
            model.set_adapter(name)
            layer = model.base_model.model.model.layers[0].self_attn.q_proj
            x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
            outputs[name] = layer(x) - layer.base_layer(x)
    torch.testing.assert_close(outputs["mix"], 0.5 * outputs["default"] + 2.0 * outputs["two"], rtol=1e-4, atol=1e-4)


def test_subtracting_gives_the_difference_exactly():
    twins = three()
    model = twins.ours.double()
    model.base_model.subtract_adapter("two", "three", "difference")
    parts = [products(model, n) for n in ("two", "three", "difference")]
    for key, value in parts[2].items():
        torch.testing.assert_close(value, parts[0].get(key, 0 * value) - parts[1].get(key, 0 * value))


def test_a_clamp_and_a_driverless_full_decomposition_equal_pefts():
    twins = three()
    for model in (twins.ours, twins.theirs):
        model.base_model.add_weighted_adapter(
            NAMES, WEIGHTS, "mix", combination_type="svd", svd_clamp=0.9, svd_rank=3, svd_full_matrices=False
        )
    for key, theirs in products(twins.theirs, "mix").items():
        scale = theirs.abs().max().item()
        torch.testing.assert_close(products(twins.ours, "mix")[key], theirs, rtol=1e-3, atol=1e-4 * scale)


def test_ia3_vectors_add_up_as_in_peft():
    peft = importlib.import_module("peft")
    options = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    models = []
    for library in (peftfast, peft):
        model = library.get_peft_model(oracle.llama(), library.IA3Config(**options, init_ia3_weights=False))
        model.add_adapter("two", library.IA3Config(**{**options, "target_modules": ["v_proj", "down_proj"]}))
        models.append(model.eval())
    oracle.copy_parameters(models[1], models[0])
    for model in models:
        model.base_model.add_weighted_adapter(["default", "two"], [0.3, 1.1], "mix")
    expected = {n: p for n, p in models[1].named_parameters() if ".mix" in n}
    got = {n: p for n, p in models[0].named_parameters() if ".mix" in n}
    assert got.keys() == expected.keys() and len(got) == 6
    for name, value in expected.items():
        assert torch.equal(got[name], value)


def test_refusals_change_nothing(monkeypatch):
    model = three(ranks=(2, 4, 4)).ours
    before = copy.deepcopy(dict(model.named_parameters()))
    base = model.base_model

    def refused(error, match, *args, **kwargs):
        with pytest.raises(error, match=match):
            base.add_weighted_adapter(*args, **kwargs)
        assert list(model.peft_config) == NAMES
        assert dict(model.named_parameters()).keys() == before.keys()

    refused(ValueError, "Adapter nine does not exist", ["default", "nine"], [1.0, 1.0], "mix")
    refused(ValueError, "Invalid combination_type: foo", NAMES, WEIGHTS, "mix", combination_type="foo")
    refused(ValueError, "Did you mean 'dare_ties'", NAMES, WEIGHTS, "mix", combination_type="dareties")
    refused(TypeError, "needs a density", NAMES, WEIGHTS, "mix", combination_type="ties")
    refused(ValueError, "Density should be >= 0", NAMES, WEIGHTS, "mix", combination_type="ties", density=-1.0)
    for options, error in (
        ({"combination_type": "ties", "density": float("nan")}, ValueError),
        ({"combination_type": "ties", "density": "0.5"}, TypeError),
        ({"combination_type": "ties_svd", "density": 0.5, "svd_clamp": 95}, ValueError),
        ({"combination_type": "svd", "svd_rank": 2.5}, TypeError),
    ):
        refused(error, f"{[*options][-1]} must be", NAMES, WEIGHTS, "mix", **options)
    refused(ValueError, "Each adapter needs one weight", NAMES, [1.0], "mix")
    for weight in (float("nan"), float("inf"), "one", None):
        refused(ValueError, f"one weight, a finite number.*{weight}", NAMES, [1.0, weight, 1.0], "mix")
    refused(ValueError, "one weight, a finite number.*0.5", NAMES, 0.5, "mix")
    refused(ValueError, "majority_sign_method", NAMES, WEIGHTS, "mix", majority_sign_method="loud")
    refused(ValueError, "Found no adapter", [], [], "mix")
    config = model.peft_config["three"]
    config.trainable_token_indices = [1]
    refused(ValueError, "Adapter three trains token rows", NAMES, WEIGHTS, "mix", combination_type="cat")
    config.trainable_token_indices = None
    refused(ValueError, "'.'", NAMES, WEIGHTS, "a.b", combination_type="cat")
    with monkeypatch.context() as patch:  # in the middle of it
        patch.setattr(Lora, "combine", Mock(side_effect=KeyboardInterrupt("combined")))
        refused(KeyboardInterrupt, "combined", NAMES, WEIGHTS, "mix", combination_type="cat")
    with pytest.warns(UserWarning, match="exists already"):
        base.add_weighted_adapter(NAMES, WEIGHTS, "two")
    with pytest.warns(UserWarning, match="no pruning will be performed"):
        base.add_weighted_adapter(["two", "three"], [1.0, 1.0], "all", combination_type="ties", density=1.0)


def reloaded(model, tmp_path, name):
    """Logits of the live adapter, of its file in both libraries, and the file's config."""
    with torch.no_grad():
        model.set_adapter(name)
        live = oracle.logits(model.eval())
        model.save_pretrained(tmp_path, selected_adapters=[name])
        again = []
        for library in (peftfast, importlib.import_module("peft")):
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*(missing|unexpected|matched no module)")
                again.append(oracle.logits(library.PeftModel.from_pretrained(oracle.llama(), tmp_path / name)))
    return live, again, oracle.saved_config(tmp_path / name)


@pytest.mark.parametrize(
    "first, second, names",
    [
        ({"layers_to_transform": [0]}, {"layers_to_transform": [1]}, {"q_proj", "k_proj"}),
        ({"layers_to_transform": [0]}, {}, {"q_proj", "k_proj"}),
        (
            {"layers_to_transform": [0]},
            {"layers_to_transform": [1], "layers_pattern": "layers", "target_modules": ["v_proj"]},
            {"0.self_attn.q_proj", "0.self_attn.k_proj", "1.self_attn.v_proj"},
        ),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, {}, {"q_proj", "k_proj"}),
        ({}, {"modules_to_save": ["lm_head"]}, {"q_proj", "k_proj"}),
        ({"exclude_modules": ["k_proj"]}, {}, {"q_proj", "k_proj"}),
        ({}, {"exclude_modules": [r"0.self_attn.k_proj"]}, {"q_proj", "k_proj"}),
        ({"exclude_modules": r".*\.0\..*"}, {"exclude_modules": r".*\.k_proj"}, {"1.self_attn.k_proj", "q_proj"}),
        ({"target_modules": r".*\.0\..*q_proj"}, {"target_modules": ["v_proj"]}, {"0.self_attn.q_proj", "v_proj"}),
    ],
)
def test_the_config_names_the_modules_of_all(first, second, names, tmp_path):
    """What each adapter leaves out for itself must not keep out the others' modules when the result is loaded."""
    common = {"r": 2, "target_modules": ["q_proj", "k_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(**{**common, **first}))
    model.add_adapter("two", LoraConfig(**{**common, **second}))
    model.add_weighted_adapter(["default", "two"], [0.5, 2.0], "mix", combination_type="cat")
    live, again, config = reloaded(model, tmp_path, "mix")
    for logits in again:
        assert torch.equal(logits, live)
    assert set(config["target_modules"]) == names
    assert all(config[name] is None for name in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    assert config["modules_to_save"] == second.get("modules_to_save")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", [["tied", "own"], ["own", "tied"], ["tied", "tied"]], ids=" ".join)
def test_an_adapter_that_ties_the_head_and_one_that_does_not(names, tmp_path):
    def make():
        return oracle.llama(tied=True)

    config = {"r": 4, "target_modules": ["embed_tokens"]}
    model = peftfast.get_peft_model(make(), LoraConfig(**config, ensure_weight_tying=True), "tied").eval()
    model.add_adapter("own", LoraConfig(**config))
    oracle.randomised(model, 0.1)
    model.base_model.add_weighted_adapter(names, [1.0, 1.0], "sum", "cat")
    model.base_model.set_adapter(list(dict.fromkeys(names)))
    if names[0] == names[1]:
        for layer in model.base_model.inventory.layers.values():
            layer.scale_layer(2.0)
    expected = oracle.logits(model)
    model.set_adapter("sum")
    torch.testing.assert_close(oracle.logits(model), expected, rtol=1e-4, atol=1e-4)
    assert model.peft_config["sum"].ensure_weight_tying is (names[0] == names[1])
    model.save_pretrained(tmp_path)
    again = peftfast.PeftModel.from_pretrained(make(), tmp_path / "sum").eval()
    torch.testing.assert_close(oracle.logits(again), expected, rtol=1e-4, atol=1e-4)


def test_what_all_leave_out_stays_in_the_config():
    options = {"r": 2, "layers_to_transform": [1], "exclude_modules": ["k_proj"]}
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(**options, target_modules=["q_proj", "k_proj"]))
    model.add_adapter("two", LoraConfig(**options, target_modules=["v_proj"]))
    model.add_weighted_adapter(["default", "two"], [0.5, 2.0], "mix", combination_type="cat")
    config = model.peft_config["mix"]
    assert config.target_modules == {"q_proj", "k_proj", "v_proj"}
    assert (config.layers_to_transform, config.exclude_modules) == ([1], {"k_proj"})


def test_ia3s_config_names_the_modules_of_all(tmp_path):
    options = {"feedforward_modules": ["down_proj"], "init_ia3_weights": False, "task_type": "CAUSAL_LM"}
    model = peftfast.get_peft_model(
        oracle.llama(), IA3Config(target_modules=["k_proj", "down_proj"], exclude_modules=r".*\.0\..*", **options)
    )
    model.add_adapter("two", IA3Config(target_modules=["v_proj", "down_proj"], exclude_modules=["v_proj"], **options))
    model.add_weighted_adapter(["default", "two"], [0.5, 0.7], "mix")
    live, again, config = reloaded(model, tmp_path, "mix")
    for logits in again:
        torch.testing.assert_close(logits, live)
    layers = "model.layers."
    assert set(config["feedforward_modules"]) == {f"{layers}{i}.mlp.down_proj" for i in (0, 1)}
    assert set(config["target_modules"]) == {*config["feedforward_modules"], f"{layers}1.self_attn.k_proj"}


@pytest.mark.parametrize("order", [["default", "two"], ["two", "default"]])
def test_dora_and_lora_do_not_combine(order):
    """PEFT combines the factors and drops the magnitudes: one times the DoRA and none of the LoRA is not the DoRA."""
    weights = [1.0 if n == "default" else 0.0 for n in order]
    models, outputs = [], []
    for library in (peftfast, importlib.import_module("peft")):
        options = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
        model = library.get_peft_model(oracle.llama(), library.LoraConfig(**options, use_dora=True))
        model.add_adapter("two", library.LoraConfig(**options))
        models.append(model.eval())
    with torch.no_grad():
        for name, parameter in models[1].named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.5)
        outputs.append(oracle.logits(models[1]))
        models[1].add_weighted_adapter(order, weights, "mix", combination_type="cat")
        models[1].set_adapter("mix")
        outputs.append(oracle.logits(models[1]))
    assert (outputs[0] - outputs[1]).abs().max() > 0.01
    message = r"default is dora.*magnitudes \(use_dora=True\).*set_adapter\(\['" + order[0]
    if order[0] == "two":
        message = "two is lora, " + message
    with pytest.raises(ValueError, match=message):
        models[0].add_weighted_adapter(order, weights, "mix", combination_type="cat")
    assert list(models[0].peft_config) == ["default", "two"]


def test_methods_without_a_combination_say_so():
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"])
    model = peftfast.get_peft_model(oracle.llama(), config)
    with pytest.raises(TypeError, match="does not support add_weighted_adapter"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "mix")
    assert list(model.peft_config) == ["default"]


def test_an_init_that_changes_the_base_does_not_run_again():
    model = peftfast.get_peft_model(
        oracle.llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    before = weight.clone()
    model.base_model.add_weighted_adapter(["default"], [2.0], "mix")
    assert torch.equal(weight, before)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_bases(kind):
    bnb = pytest.importorskip("bitsandbytes")
    model = oracle.llama(hidden=64)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            old = getattr(layer.self_attn, name)
            if kind == "nf4":
                new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
            else:
                new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
            setattr(layer.self_attn, name, new.to("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peftfast.get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        model.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    for method in ("cat", "ties_svd"):
        model.base_model.add_weighted_adapter(["default", "two"], [1.0, 2.0], method, **arguments(method))
    parts = [products(model, n) for n in ("default", "two", "cat")]
    for key, value in parts[2].items():
        torch.testing.assert_close(value, parts[0][key] + 2.0 * parts[1].get(key, 0 * value), rtol=1e-4, atol=1e-5)


def test_ia3_and_lora_do_not_combine():
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    model.base_model.add("ia3", IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="default is lora, ia3 is ia3"):
        model.base_model.add_weighted_adapter(["default", "ia3"], [1.0, 1.0], "mix")
