"""Initialisations: what the factors and the base are right after, that the model still computes the same, and the way
through files, PEFT's and ours, with and without conversion to a plain LoRA."""

import copy
import importlib
import math

import oracle
import pytest
import torch

import peftfast
from peftfast import LoftQConfig, LoraConfig

peft = importlib.import_module("peft")

TARGETS = ["q_proj", "down_proj"]
CHANGING = ["pissa", "pissa_niter_4", "olora"]


def logits(model):
    with torch.no_grad():
        return oracle.logits(model)


def wrap(library, init, make=oracle.llama, seed=1, **options):
    torch.manual_seed(seed)
    config = library.LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": init, **options})
    return oracle.quietly(library.get_peft_model, make(), config).eval()


def layers(model):
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)}


def factors(layer):
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", *CHANGING])
@pytest.mark.parametrize("make", [oracle.llama, oracle.gpt2], ids=["linear", "conv1d"])
def test_the_model_starts_as_the_base(init, make):
    targets = TARGETS if make is oracle.llama else ["c_attn", "c_fc"]
    model = wrap(peftfast, init, make, target_modules=targets, lora_alpha=6, use_rslora=True)
    torch.testing.assert_close(logits(model), logits(make()), rtol=1e-3, atol=2e-4)
    changed = [
        not torch.equal(layer.base_layer.weight, make().get_submodule(name.removeprefix("base_model.model.")).weight)
        for name, layer in layers(model).items()
    ]
    assert all(changed) if init in CHANGING else not any(changed)


@pytest.mark.parametrize("init", [*CHANGING, "corda", "lora_ga"])
def test_a_base_in_fp64_keeps_its_precision(init):
    base, x = torch.nn.Sequential(torch.nn.Linear(12, 8)).double(), torch.randn(5, 12, dtype=torch.float64)
    before, config = base(x), LoraConfig(r=2, target_modules=["0"], init_lora_weights=init, lora_alpha=6)
    if init == "corda":
        config.corda_config = peftfast.CordaConfig()
        peftfast.preprocess_corda(base, config, lambda: base(x))
    if init == "lora_ga":
        config.lora_ga_config = peftfast.LoraGAConfig()
        peftfast.preprocess_loraga(base, config, lambda: base(x).square().sum().backward())
    model = peftfast.get_peft_model(base, config)
    assert model.base_model.model[0].lora_B["default"].weight.any()
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", [True, False])
def test_a_seed_gives_pefts_factors_and_biases_of_them(init, dtype):
    options = {"target_modules": ["conv1", "linear"], "lora_bias": True}
    mine, other = (wrap(lib, init, lambda: oracle.net().to(dtype), **options) for lib in (peftfast, peft))
    expected = {name: p for name, p in other.named_parameters() if "lora_" in name}
    assert any(p.any() for name, p in expected.items() if name.endswith("bias")) is (init is False)
    for name, value in expected.items():
        assert torch.equal(mine.get_parameter(name), value), name


def test_distributions():
    """The same distributions as PEFT's, seen through their moments and bounds."""
    big = {"make": lambda: oracle.llama(hidden=128), "r": 16}
    for init in (True, False, "gaussian", "orthogonal"):
        mine, other = (
            [
                torch.cat([factors(layer)[i].flatten() for layer in layers(wrap(lib, init, **big)).values()])
                for i in (0, 1)
            ]
            for lib in (peftfast, peft)
        )
        for ours, theirs in zip(mine, other, strict=True):
            assert ours.shape == theirs.shape
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05, abs=1e-9), init
            assert abs(ours.mean().item()) <= 4 * ours.std().item() / math.sqrt(ours.numel()) + 1e-9
            assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.35, abs=1e-9)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decompositions_are_pefts(init, dtype):
    """Up to the signs of singular vectors, so compared by product and by what is left in the base."""
    ours, theirs = (wrap(lib, init, lambda: oracle.llama().to(dtype), lora_alpha=6) for lib in (peftfast, peft))
    for mine, other in zip(layers(ours).values(), layers(theirs).values(), strict=True):
        (a, b), (c, d) = factors(mine), factors(other)
        assert a.dtype == c.dtype and mine.base_layer.weight.dtype == dtype
        torch.testing.assert_close(b @ a, d @ c, rtol=1e-3, atol=1e-4 if dtype == torch.float32 else 2e-2)
        torch.testing.assert_close(
            mine.base_layer.weight.float(), other.base_layer.weight.float(), rtol=1e-2, atol=1e-4
        )  # fmt: skip


def test_fast_pissa_comes_near_the_exact_one():
    exact, fast = wrap(peftfast, "pissa"), wrap(peftfast, "pissa_niter_16")
    for best, near in zip(layers(exact).values(), layers(fast).values(), strict=True):
        left, best_left = near.base_layer.weight.norm(), best.base_layer.weight.norm()
        assert best_left * 0.999 < left < 1.03 * best_left


def test_pissa_takes_the_largest_singular_values():
    model = wrap(peftfast, "pissa")
    for name, layer in layers(model).items():
        weight = oracle.llama().get_submodule(name.removeprefix("base_model.model.")).weight
        left = torch.linalg.svdvals(layer.base_layer.weight)
        torch.testing.assert_close(left[0], torch.linalg.svdvals(weight)[4], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "olora"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded_both_ways(init, low_cpu_mem_usage, tmp_path):
    """Loading repeats the initialisation, because the base changed with it."""
    for source in (peftfast, peft):
        model = oracle.moved(wrap(source, init), 0.05)
        model.save_pretrained(tmp_path / source.__name__)
        expected = logits(model)
        for target in (peftfast, peft):
            if target is peft and low_cpu_mem_usage:
                continue  # PEFT cannot repeat it on the meta device
            loaded = target.PeftModel.from_pretrained(
                oracle.llama(), tmp_path / source.__name__, low_cpu_mem_usage=low_cpu_mem_usage
            )
            torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("init, name", [("pissa_niter_4", "PiSSA"), ("olora", "OLoRA")])
def test_a_changed_base_is_not_the_one_that_other_adapters_know(init, name, tmp_path):
    for kind in (init, True):
        wrap(peftfast, kind).save_pretrained(tmp_path / str(kind))
    for order in ([init, True], [True, init]):
        first, second = (tmp_path / str(kind) for kind in order)
        model = peftfast.PeftModel.from_pretrained(oracle.llama(), first)
        with pytest.warns(peftfast.PeftWarning, match=f"^{name} changes the base weights .* not be used with other"):
            model.load_adapter(second, adapter_name="other")


class Narrow(torch.nn.Module):
    """A head with three outputs and one with three inputs."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.down, self.up = torch.nn.Linear(16, 3), torch.nn.Linear(3, 16)

    def forward(self, x):
        return self.up(self.down(x))


NARROW = {"make": Narrow, "r": 4, "target_modules": ["down", "up"], "lora_alpha": 6}
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("extra", [{}, {"use_dora": True}, {"use_rslora": True}])
@pytest.mark.parametrize("init", CHANGING)
def test_no_more_directions_than_the_weight_has(init, extra, tmp_path):
    """A rank above a layer's smaller side: as many ranks as there are directions, in PEFT, here and in the files."""
    ours, theirs = (wrap(lib, init, **NARROW, **extra) for lib in (peftfast, peft))
    expected = Narrow()(X)
    for model in (ours, theirs):
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1] and not any(4 in shape for shape in shapes[0].values())
    if init == "pissa_niter_4":
        return  # random, also when it is repeated on loading
    for source, model in ((peftfast, ours), (peft, theirs)):
        oracle.moved(model, 0.05).save_pretrained(tmp_path / source.__name__)
        live = model(X)
        for target in (peftfast, peft):
            loaded = target.PeftModel.from_pretrained(Narrow(), tmp_path / source.__name__)
            torch.testing.assert_close(loaded(X), live, rtol=1e-4, atol=1e-5)
    live = ours(X)
    torch.testing.assert_close(ours.merge_and_unload()(X), live, rtol=1e-4, atol=1e-5)


def test_fewer_ranks_beside_full_ones():
    """Adapters of different real ranks at one module: mixed in a batch, summed, combined."""
    torch.manual_seed(1)
    model = wrap(peftfast, "olora", **NARROW)
    model.add_adapter("full", LoraConfig(r=4, target_modules=["down", "up"], init_lora_weights=False))
    model.base_model.add_weighted_adapter(["default", "full"], [1.0, 1.0], "mix", combination_type="cat")
    outputs = {}
    with torch.no_grad():
        for name in ("default", "full", "mix"):
            model.set_adapter(name)
            outputs[name] = model(X)
        mixed = model(X, adapter_names=["full", "default", "full", "mix", "default"])
        model.base_model.set_adapter(["default", "full"])
        both = model(X)
    for row, name in enumerate(["full", "default", "full", "mix", "default"]):
        torch.testing.assert_close(mixed[row], outputs[name][row], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both, outputs["mix"], rtol=1e-4, atol=1e-5)


def test_loftq_with_more_ranks_than_directions():
    model = wrap(peftfast, "loftq", **NARROW, loftq_config=LoftQConfig(loftq_bits=8))
    torch.testing.assert_close(model(X), Narrow()(X), rtol=1e-3, atol=2e-3)
    a, b = factors(model.base_model.model.down)
    assert a.shape == (4, 16) and not a[3].any() and not b[:, 3].any() and a[:3].any()


@pytest.mark.parametrize("init", CHANGING)
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}},
    ],
)
def test_conversion_to_a_plain_lora(init, extra, tmp_path):
    make = oracle.llama
    for library in (peftfast, peft):
        torch.manual_seed(4)
        model = wrap(library, init, **extra)
        initial = tmp_path / library.__name__ / "initial"
        model.peft_config["default"].init_lora_weights = True  # the folder is read as it is, not initialised again
        model.save_pretrained(initial)
        model.peft_config["default"].init_lora_weights = init
        expected = logits(oracle.moved(model, 0.05))
        target = tmp_path / library.__name__ / "plain"
        model.save_pretrained(target, path_initial_model_for_weight_conversion=str(initial))
        config = oracle.saved_config(target)
        assert config["init_lora_weights"] is True and config["r"] == 8
        for reader in (peftfast, peft):
            loaded = reader.PeftModel.from_pretrained(make(), target)
            torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(logits(model), expected)  # the live model is as it was
        assert model.peft_config["default"].r == 4
    ours, theirs = (oracle.saved_config(tmp_path / name / "plain") for name in ("peftfast", "peft"))
    assert ours == theirs


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_conversion_where_a_layer_has_fewer_directions_than_the_rank(init, tmp_path):
    torch.manual_seed(0)
    nn = torch.nn  # a convolution of fewer channels than the rank has enough directions all the same
    base = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 3))
    plain, x = copy.deepcopy(base), torch.randn(5, 3, 3, 3)
    options = {"r": 4, "target_modules": ["0", "2", "3"], "rank_pattern": {"2": 6}, "init_lora_weights": init}
    model = peftfast.get_peft_model(base, peftfast.LoraConfig(**options))
    model.save_pretrained(tmp_path / "initial")
    expected = oracle.moved(model)(x)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    for reader in (peftfast, peft):
        loaded = reader.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "plain")
        torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", [*CHANGING, "mica", "loftq"])
def test_a_weight_that_is_not_finite_stops_a_start_before_anything_is_changed(init):
    model = oracle.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    before = {n: p.clone() for n, p in model.named_parameters()}
    config = LoraConfig(target_modules=["down_proj"], init_lora_weights=init, loftq_config=LoftQConfig())
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: init_lora_weights=.* 1 numbers are NaN"):
        peftfast.get_peft_model(model, config)
    assert before.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(p.nan_to_num(), before[n].nan_to_num()) for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype, copies", [(torch.float32, 0), (torch.bfloat16, 1)])
def test_a_start_takes_out_of_the_weight_where_it_lies(dtype, copies):
    """What is as large as the weight takes longer at real sizes than the randomised decomposition."""
    model, shape = oracle.llama(layers=1).to(dtype), (32, 64)
    config = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights="pissa_niter_1")
    with oracle.Operations() as made:
        peftfast.get_peft_model(model, config)
    assert made.shapes.count(shape) == copies, made.shapes


def test_a_start_that_fails_half_way_says_what_it_has_written(monkeypatch):
    model = oracle.llama()
    before = {n: p.clone() for n, p in model.named_parameters()}
    results = iter([torch.linalg.svd(before["model.layers.0.mlp.down_proj.weight"], full_matrices=False)])
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: next(results))
    with pytest.warns(peftfast.PeftWarning, match="load the base model anew") as said, pytest.raises(StopIteration):
        peftfast.get_peft_model(model, LoraConfig(target_modules=["down_proj"], init_lora_weights="pissa"))
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert changed == ["model.layers.0.mlp.down_proj.weight"]
    assert "layers.0.mlp.down_proj" in str(said[0].message) and "layers.1" not in str(said[0].message)


def test_a_randomised_start_is_the_same_at_every_loading(tmp_path):
    """What loading takes out of the base is what was taken out for the training, whatever the seeds are."""
    model = oracle.moved(wrap(peftfast, "pissa_niter_1", seed=1), 0.05)
    model.save_pretrained(tmp_path)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    loaded = peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's numbers are other ones
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_directions_of_grouped_convolutions_are_refused_by_name(init):
    convolutions = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.Conv2d(16, 8, 3, groups=2))
    before = convolutions[0].weight.clone()
    with pytest.raises(ValueError, match=f"1: init_lora_weights='{init}' on a Conv2d with groups=2"):
        peftfast.get_peft_model(convolutions, LoraConfig(target_modules=["0", "1"], r=4, init_lora_weights=init))
    assert type(convolutions[0]) is torch.nn.Conv2d and torch.equal(convolutions[0].weight, before)


def test_conversions_that_make_no_sense(tmp_path):
    plain = wrap(peftfast, "gaussian")
    plain.save_pretrained(tmp_path / "initial")
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion.*gaussian"):
        plain.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    both = wrap(peftfast, "pissa", use_rslora=True, rank_pattern={"down_proj": 2})
    with pytest.raises(ValueError, match="rsLoRA"):
        both.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("init", "changes", "why"),
    [
        (True, {"r": 2}, r"'b' did not .*another shape.*q_proj.lora_A.weight \[2, 32\], there \[4, 32\]"),
        (True, {}, "'b' did not .*init_lora_weights=True, so it was 'a' that changed"),
        ("olora", {}, "'b' did not .*init_lora_weights='olora', there 'pissa'"),
        ("pissa", {"target_modules": ["q_proj"]}, "'b' did not .*the adapter itself has no .*down_proj"),
        ("pissa", {"target_modules": [*TARGETS, "k_proj"]}, "'b' did not .*the initial adapter has no .*k_proj"),
        ("pissa", {"lora_alpha": 3}, "'b' did not .*another scaling .*q_proj"),
    ],
)
def test_conversion_of_an_adapter_that_began_otherwise(init, changes, why, tmp_path):
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": TARGETS}
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(**options, init_lora_weights="pissa"), "a")
    model.save_pretrained(tmp_path)
    oracle.quietly(model.add_adapter, "b", LoraConfig(**{**options, "init_lora_weights": init, **changes}))
    saving = {"path_initial_model_for_weight_conversion": str(tmp_path / "a")}
    with pytest.raises(ValueError, match=why):
        model.save_pretrained(tmp_path / "out", **saving)
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out", selected_adapters=["a"], **saving)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["a"]


def test_base_dtypes_that_cannot_be_decomposed():
    with pytest.raises(ValueError, match="q_proj.*rank to be even, got 3"):
        wrap(peftfast, "orthogonal", r=3)
    model = wrap(peftfast, "pissa", lambda: oracle.llama().to(torch.float16))
    assert next(iter(layers(model).values())).base_layer.weight.dtype == torch.float16


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "make, targets",
    [(oracle.llama, [*TARGETS, "embed_tokens"]), (oracle.gpt2, ["c_attn", "wte"])],
    ids=["linear", "conv1d"],
)
def test_mica_trains_the_down_factor_on_minor_directions(make, targets, tmp_path):
    """B by the smallest singular values of W, frozen; the same base, trained parameters, files and logits as PEFT's."""
    ours, theirs = (wrap(lib, "mica", make, target_modules=targets, lora_alpha=6) for lib in (peftfast, peft))
    assert torch.equal(logits(ours), logits(make()))
    ups = [{n: p for n, p in m.named_parameters() if "lora_B" in n or "embedding_B" in n} for m in (ours, theirs)]
    for (name, mine), other in zip(ups[0].items(), ups[1].values(), strict=True):
        projector = mine.double() @ mine.double().t()  # vectors are defined up to signs
        torch.testing.assert_close(projector, other.double() @ other.double().t(), rtol=0, atol=1e-4, msg=name)
    assert trainable(ours) == trainable(theirs) and not trainable(ours) & ups[0].keys()
    oracle.logits(ours).square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in ours.parameters())
    oracle.moved(ours, 0.05).save_pretrained(tmp_path / "mica")
    for library in (peftfast, peft):
        loaded = library.PeftModel.from_pretrained(make(), tmp_path / "mica", is_trainable=True).eval()
        torch.testing.assert_close(logits(loaded), logits(ours), rtol=1e-3, atol=1e-3)
        assert trainable(loaded) == trainable(ours)
    live = logits(ours)
    torch.testing.assert_close(logits(ours.merge_and_unload()), live, rtol=1e-3, atol=1e-3)


def test_mica_stays_frozen_beside_other_adapters():
    model = wrap(peftfast, "mica")
    first = trainable(model)
    model.add_adapter("other", LoraConfig(r=4, target_modules=TARGETS))
    model.set_adapter("other")
    assert any("lora_B.other" in name for name in trainable(model))
    for change in (
        lambda: model.set_adapter("default"),
        lambda: model.set_requires_grad("default"),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: model.delete_adapter("other"),
    ):
        change()
        assert trainable(model) == first
    layer = next(iter(layers(model).values()))
    assert layer.frozen_peft_weight_names == {"default": ("lora_B",)}


def test_mica_where_there_are_no_minor_directions():
    with pytest.raises(ValueError, match="MiCA requires `r` <= min.*r=4"):
        wrap(peftfast, "mica", **NARROW)
    with pytest.raises(ValueError, match="mica.*Conv2d"):
        wrap(peftfast, "mica", lambda: torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1)), target_modules=["0"], r=2)
    with pytest.raises(ValueError, match="mica.*use_dora"):
        LoraConfig(init_lora_weights="mica", use_dora=True)
    model = wrap(peftfast, False)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge first"):
        model.add_adapter("minor", LoraConfig(target_modules=TARGETS, init_lora_weights="mica"))


@pytest.mark.parametrize("spelling, name", [("OLoRA", "olora"), ("PiSSA_niter_4", "pissa_niter_4"), ("MiCA", "mica")])
def test_names_in_any_case(spelling, name):
    """One spelling in the config and in the file, so that nobody who reads either has to know of the others."""
    assert LoraConfig(init_lora_weights=spelling).to_dict()["init_lora_weights"] == name
    config = LoraConfig(r=4, target_modules=TARGETS)
    config.init_lora_weights = spelling
    assert peftfast.get_peft_model(oracle.llama(), config).peft_config["default"].init_lora_weights == name


@pytest.mark.parametrize("base, autocast", [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)])
def test_autocast_adapter_dtype(base, autocast, tmp_path):
    """The factors' dtype, live, saved and loaded, is PEFT's."""
    make = lambda: oracle.llama().to(base)  # noqa: E731
    models = []
    for library in (peftfast, peft):
        config = library.LoraConfig(target_modules=TARGETS)
        models.append(library.get_peft_model(make(), config, autocast_adapter_dtype=autocast))
        models[-1].add_adapter("other", library.LoraConfig(target_modules=["k_proj"]), autocast_adapter_dtype=autocast)
        models[-1].save_pretrained(tmp_path / library.__name__)
    oracle.same_live_state(*models)
    for folder in ("peftfast", "peft"):
        loaded = [
            library.PeftModel.from_pretrained(
                make(), tmp_path / folder, autocast_adapter_dtype=autocast, low_cpu_mem_usage=low
            )
            for library in (peftfast, peft)
            for low in (False, True)
        ]
        for other in loaded[1:]:
            oracle.same_live_state(loaded[0], other)


# ---- targets found without a table -----------------------------------------------------------------------
class Unknown(torch.nn.Module):
    """An architecture that no table knows."""

    def __init__(self, names=("query", "key", "value", "out")):
        super().__init__()
        self.stem = torch.nn.Linear(8, 8)
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in names}) for _ in range(3)
        )
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x):
        for block in self.blocks:
            for layer in block.values():
                x = torch.relu(layer(x))
        return self.head(x)


@pytest.mark.parametrize(
    "names, chosen",
    [
        (("query", "key", "value", "out"), {"query", "value"}),
        (("qkv", "proj"), {"qkv"}),
        (("q_proj", "k_proj", "v_proj"), {"q_proj", "v_proj"}),
        (("up", "down"), {"up", "down"}),
    ],
)
def test_targets_of_an_unknown_architecture(names, chosen, tmp_path):
    with pytest.warns(peftfast.PeftWarning, match="No default target modules.*chose") as caught:
        model = peftfast.get_peft_model(Unknown(names), LoraConfig())
    assert all(name in str(caught[0].message) for name in chosen)
    adapted = set(model.base_model.targeted_module_names)
    assert adapted == {f"blocks.{i}.{name}" for i in range(3) for name in chosen}
    model.save_pretrained(tmp_path)  # the choice is in the file, so PEFT reads it
    loaded = peft.PeftModel.from_pretrained(Unknown(names), tmp_path)
    assert set(loaded.base_model.targeted_module_names) == adapted


def test_nothing_to_choose_from():
    with pytest.raises(ValueError, match="Please specify `target_modules`.*'0', '2'"):
        peftfast.get_peft_model(
            torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2)), LoraConfig()
        )


def test_transformers_architectures_without_a_row():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    with pytest.warns(peftfast.PeftWarning, match="vit"):
        model = peftfast.get_peft_model(ViTModel(config), LoraConfig())
    names = {n.rpartition(".")[2] for n in model.base_model.targeted_module_names}
    assert len(model.base_model.targeted_module_names) >= 4 and len(names) == 2, names
