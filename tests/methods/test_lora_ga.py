"""LoRA-GA against PEFT and against gradients in fp64: all directions and scales, files, conversion, refusals."""

import copy
import warnings

import oracle
import peft
import pytest
import torch
from torch import nn

import peftfast

DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")
TARGETS = {oracle.llama: ["q_proj", "down_proj"], oracle.gpt2: ["c_attn", "c_fc"]}
GRADIENT = "_peft_loraga_grad"


def config(library, model=oracle.llama, settings=None, **changes):
    options = {"r": 4, "lora_alpha": 6, "target_modules": list(TARGETS[model]), "init_lora_weights": "lora_ga"}
    return library.LoraConfig(**{**options, "lora_ga_config": library.LoraGAConfig(**(settings or {})), **changes})


def steps(model, count=3, zeroing=False):
    """A train_step of `count` batches."""

    def run():
        generator = torch.Generator().manual_seed(0)
        for _ in range(count):
            ids = torch.randint(1, oracle.VOCABULARY, (2, 12), generator=generator)
            if zeroing:
                model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()

    return run


def wrapped(library, base, cfg, seed=7, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.preprocess_loraga(base, cfg, steps(base))
        torch.manual_seed(seed)
        return library.get_peft_model(base, cfg, **options)


@torch.no_grad()
def train(model):
    torch.manual_seed(11)
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.1 * p.requires_grad)


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("model", [oracle.llama, oracle.gpt2])
def test_a_seed_gives_pefts_factors_and_base(model, direction, scale):
    base = [model(), model()]
    untouched = oracle.logits(base[0])
    theirs, ours = (
        wrapped(library, one, config(library, model, {"direction": direction, "scale": scale}))
        for library, one in zip((peft, peftfast), base, strict=True)
    )
    torch.testing.assert_close(oracle.logits(ours), untouched, rtol=1e-4, atol=2e-4)
    own, peer = parameters(ours), parameters(theirs)
    assert list(own) == list(peer)
    # PEFT takes the input features of a Conv1D for its output features
    features = {name: m.weight.shape for name, m in model().named_modules() if hasattr(m, "nf")}
    for name, value in own.items():
        site = name.removeprefix("base_model.model.").partition(".lora_")[0]
        if scale == "stable" and (site in features or name.partition(".base_layer")[0].endswith(tuple(features))):
            if "lora_B" in name:
                k, n = features[site]
                torch.testing.assert_close(value, peer[name] * (n / k) ** 0.25, rtol=1e-3, atol=1e-4)
            continue
        torch.testing.assert_close(value, peer[name], rtol=1e-3, atol=1e-4)
    assert not any(hasattr(m, GRADIENT) for m in ours.modules())


def exact_gradients(model, targets):
    model = model.double()
    for p in model.parameters():
        p.requires_grad_(True)
    steps(model)()
    return {n: m.weight.grad / 3 for n, m in model.named_modules() if n.endswith(tuple(targets))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_mean_and_no_further_from_fp64_than_pefts(dtype):
    exact = exact_gradients(oracle.llama().to(dtype), TARGETS[oracle.llama])
    errors = []
    for library in (peft, peftfast):
        base = oracle.llama().to(dtype)
        library.preprocess_loraga(base, config(library), steps(base))
        errors.append({n: float((getattr(base.get_submodule(n), GRADIENT) - g).norm()) for n, g in exact.items()})
    theirs, ours = errors
    assert sum(ours.values()) <= sum(theirs.values()) * 1.05
    assert all(ours[n] <= 0.05 * float(g.norm()) for n, g in exact.items())


def test_many_gradients_are_summed_in_fp32():
    """A sum in bf16 stands still as soon as it is 256 times what is added."""
    base, x = nn.Sequential(nn.Linear(8, 4)).bfloat16(), torch.randn(5, 8).bfloat16()
    cfg = config(peftfast, target_modules=["0"])
    found = []
    for count in (1, 600):
        peftfast.preprocess_loraga(base, cfg, lambda n=count: [base(x).square().sum().backward() for _ in range(n)])
        found.append(getattr(base[0], GRADIENT).float())
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=0)


def test_zeroing_gradients_between_batches_loses_none():
    one, two = oracle.llama(), oracle.llama()
    peftfast.preprocess_loraga(one, config(peftfast), steps(one))
    peftfast.preprocess_loraga(two, config(peftfast), steps(two, zeroing=True), keep="host")
    for a, b in zip(one.modules(), two.modules(), strict=True):
        if hasattr(a, GRADIENT):
            torch.testing.assert_close(getattr(a, GRADIENT), getattr(b, GRADIENT), rtol=0, atol=0)


def test_one_gradient_at_a_time_and_the_model_as_it_was():
    base = oracle.llama()
    base.lm_head.eval()
    base.train()
    base.model.norm.eval()
    weight = base.model.layers[0].self_attn.q_proj.weight
    weight.grad = torch.ones_like(weight)
    base.model.embed_tokens.weight.requires_grad_(False)
    before = [(p.requires_grad, p.grad is None) for p in base.parameters()], [m.training for m in base.modules()]
    most = []

    def run():
        held = [m.weight for n, m in base.named_modules() if n.endswith(("q_proj", "down_proj"))]
        handles = [
            w.register_post_accumulate_grad_hook(lambda _: most.append(sum(w.grad is not None for w in held)))
            for w in held
        ]
        steps(base)()
        for handle in handles:
            handle.remove()
        assert not any(p.grad is not None for p in base.parameters())

    peftfast.preprocess_loraga(base, config(peftfast), run)
    assert len(most) == 12 and max(most) <= 1
    after = [(p.requires_grad, p.grad is None) for p in base.parameters()], [m.training for m in base.modules()]
    assert after == before and bool((weight.grad == 1).all()) and not weight._post_accumulate_grad_hooks


@pytest.mark.parametrize("direction", ["ArB2r", "random"])
def test_conversion_to_a_plain_lora(direction, tmp_path):
    model = wrapped(peftfast, oracle.llama(), config(peftfast, settings={"direction": direction}))
    model.save_pretrained(tmp_path / "initial")
    train(model)
    expected = oracle.logits(model)
    for left_true in (False, True):  # as scripts for PEFT set it for saving the initial adapter
        model.peft_config["default"].init_lora_weights = True if left_true else "lora_ga"
        folder = tmp_path / f"plain-{left_true}"
        model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
        assert oracle.saved_config(folder)["r"] == 8
        with warnings.catch_warnings():
            warnings.simplefilter("error", peftfast.AdapterMismatchWarning)
            loaded = peftfast.PeftModel.from_pretrained(oracle.llama(), folder)
        torch.testing.assert_close(oracle.logits(loaded), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            oracle.logits(peft.PeftModel.from_pretrained(oracle.llama(), folder)), expected, rtol=1e-3, atol=1e-3
        )


def test_files_both_ways_and_loading_with_the_gradients_of_a_cache(tmp_path):
    cache = tmp_path / "gradients" / "cache.pt"
    base = oracle.llama()
    cfg = config(peftfast)
    peftfast.preprocess_loraga(base, cfg, steps(base), cache_file=cache)
    torch.manual_seed(3)
    model = peftfast.get_peft_model(base, cfg)
    train(model)
    model.save_pretrained(tmp_path / "ours")
    expected = oracle.logits(model)

    again = oracle.llama()
    peftfast.preprocess_loraga(again, config(peftfast), train_step=None, cache_file=str(cache))
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = peftfast.PeftModel.from_pretrained(again, tmp_path / "ours")
    torch.testing.assert_close(oracle.logits(loaded), expected, rtol=1e-5, atol=1e-5)

    other = oracle.llama()
    peft.preprocess_loraga(other, config(peft), None, cache_file=str(cache))
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(other, tmp_path / "ours")
    torch.testing.assert_close(oracle.logits(theirs), expected, rtol=1e-3, atol=1e-3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, peer = (oracle.saved_config(tmp_path / who) for who in ("ours", "theirs"))
    assert ours == peer and ours["lora_ga_config"] == {"direction": "ArB2r", "scale": "stable", "stable_gamma": 16}
    with pytest.warns(peftfast.PeftWarning, match="left no gradient"):
        peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path / "ours")


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"down_proj": 2}}])
def test_beside_other_fields_the_model_starts_as_it_was(changes):
    base = oracle.llama()
    untouched = oracle.logits(base)
    model = wrapped(peftfast, base, config(peftfast, **changes))
    torch.testing.assert_close(oracle.logits(model), untouched, rtol=1e-4, atol=2e-4)
    assert any(bool(p.any()) for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_starts_no_further_from_the_model_than_pefts(autocast):
    """The base is rounded once; factors in fp32 are not rounded."""
    untouched = oracle.logits(oracle.llama().to(torch.bfloat16).double())
    errors = []
    for library in (peft, peftfast):
        model = wrapped(library, oracle.llama().to(torch.bfloat16), config(library), autocast_adapter_dtype=autocast)
        errors.append((oracle.logits(copy.deepcopy(model).double()) - untouched).norm())
        assert all(p.dtype == (torch.float32 if autocast else torch.bfloat16)
                   for n, p in model.named_parameters() if "lora_" in n)  # fmt: skip
    assert errors[1] <= errors[0] * 1.2


def test_a_dense_model_is_quantised_afterwards():
    base, cfg = oracle.llama(hidden=64), config(peftfast)
    peftfast.preprocess_loraga(base, cfg, steps(base))
    model = peftfast.patch(base, cfg, quantize="nf4")
    assert any("lora_B" in n and bool(p.any()) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match="does not support quantized.*q_proj"):
        peftfast.preprocess_loraga(model.unload(), config(peftfast), steps(model))


def test_targets_are_resolved_and_what_is_not_linear_is_named():
    base = nn.ModuleDict({"linear": nn.Linear(8, 8), "conv": nn.Conv2d(3, 8, 3), "unused": nn.Linear(8, 8)})
    cfg = peftfast.LoraConfig(
        r=2, target_modules=list(base), init_lora_weights="lora_ga", lora_ga_config=peftfast.LoraGAConfig()
    )
    with pytest.warns(peftfast.PeftWarning) as said:
        peftfast.preprocess_loraga(base, cfg, lambda: base["linear"](torch.randn(3, 8)).square().sum().backward())
    texts = [str(w.message) for w in said]
    assert any("'conv'" in t and "linear layers" in t for t in texts) and any("'unused'" in t for t in texts)
    with pytest.warns(peftfast.PeftWarning, match="left no gradient"):
        model = peftfast.get_peft_model(base, cfg)
    b = {n: bool(p.any()) for n, p in model.named_parameters() if "lora_B" in n}
    assert [n for n, value in b.items() if value] == ["base_model.model.linear.lora_B.default.weight"]
    for targets in (None, "all-linear"):
        llama, cfg = oracle.llama(), config(peftfast, target_modules=targets)
        peftfast.preprocess_loraga(llama, cfg, steps(llama))
        assert {"q_proj", "v_proj"} <= {name.rpartition(".")[2] for name in cfg.target_modules}


def test_refusals_change_nothing():
    base = oracle.llama()
    with pytest.raises(ValueError, match="lora_ga_config"):
        peftfast.preprocess_loraga(base, config(peftfast, lora_ga_config=None), steps(base))
    with pytest.raises(ValueError, match="No supported layers found"):
        peftfast.preprocess_loraga(base, config(peftfast, target_modules=["embed_tokens"]), steps(base))
    with pytest.raises(ValueError, match="no target a gradient"):
        peftfast.preprocess_loraga(base, config(peftfast), lambda: None)
    with pytest.raises(ValueError, match="keep='disk'"):
        peftfast.preprocess_loraga(base, config(peftfast), steps(base), keep="disk")
    with pytest.raises(ValueError, match="NaN or infinite.*q_proj"):
        ids = torch.ones(1, 4, dtype=torch.long)
        peftfast.preprocess_loraga(
            base, config(peftfast), lambda: (base(input_ids=ids).logits.sum() * float("inf")).backward()
        )
    assert not any(hasattr(m, GRADIENT) for m in base.modules())
    peftfast.preprocess_loraga(base, config(peftfast), steps(base))
    before = parameters(base)
    for changes, message in (
        ({"lora_ga_config": None}, "lora_ga_config must be provided"),
        ({"rank_pattern": {"down_proj": 20}}, "down_proj.*r may be 16 at most"),
    ):
        with pytest.raises(ValueError, match=message):
            peftfast.get_peft_model(base, config(peftfast, **changes))
        after = parameters(base)
        assert list(after) == list(before) and all(torch.equal(after[n], p) for n, p in before.items())
    plain = wrapped(peftfast, base, config(peftfast))
    with pytest.raises(ValueError, match="has changed the base weights"):
        peftfast.convert_to_lora(plain, rank=4)


def test_caches_that_do_not_fit(tmp_path):
    base = oracle.llama()
    peftfast.preprocess_loraga(base, config(peftfast), steps(base), cache_file=tmp_path / "cache.pt")
    with pytest.raises(ValueError, match="of shape.*q_proj"):
        peftfast.preprocess_loraga(oracle.llama(hidden=64), config(peftfast), None, cache_file=tmp_path / "cache.pt")
    with pytest.raises(ValueError, match="other modules"):
        peftfast.preprocess_loraga(oracle.gpt2(), config(peftfast, oracle.gpt2), None, cache_file=tmp_path / "cache.pt")
