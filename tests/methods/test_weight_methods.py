"""DoRA, AdaLoRA, IA3 and KaSA on every kind of module and every storage: outputs, gradients, merging, files, next to
PEFT."""

import copy
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from methods.bases import make_base, make_input
from oracle import One, Operations
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import peftfast

FORMATS = ("fp32", "bf16", "nf4", "fp4", "int8")
METHODS = ("dora", "adalora", "ia3", "ia3-input", "kasa")


def make_config(library, method, **changes):
    if method == "dora":
        return library.LoraConfig(target_modules=["m"], r=4, lora_alpha=8, use_dora=True, **changes)
    if method == "kasa":
        return library.LoraConfig(target_modules=["m"], r=4, lora_alpha=8, kasa_config=library.KasaConfig(), **changes)
    if method == "adalora":
        return library.AdaLoraConfig(target_modules=["m"], init_r=4, lora_alpha=3, total_step=10, **changes)
    inputs = ["m"] if method == "ia3-input" else []
    return library.IA3Config(target_modules=["m"], feedforward_modules=inputs, **changes)


def make(library, method, kind, storage, seed=3, **changes):
    bias = changes.pop("bias_of_base", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.get_peft_model(make_base(kind, storage, bias), make_config(library, method, **changes))
    fill(model, seed)
    return model


def fill(model, seed, adapter="default"):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # in the same order in both libraries: by name
        for name, p in sorted(model.named_parameters()):
            if f".{adapter}" not in name or "ranknum" in name:
                continue
            noise = torch.randn(p.shape, generator=generator)
            if "magnitude" in name:
                p.mul_(1 + 0.2 * noise)
            elif "ia3" in name:
                p.copy_(1 + 0.3 * noise)
            else:
                p.copy_(noise * 0.3)


def exists(method, kind):
    """KaSA is of linear layers; an embedding has no input that IA3 could scale."""
    if method == "kasa":
        return kind in ("linear", "conv1d-hf")
    return kind != "embedding" or method != "ia3-input"


def peft_supports(method, kind, storage):
    if method == "kasa":
        return kind == "linear" and storage in ("fp32", "bf16")
    if kind == "embedding":
        return method == "dora"
    if kind in ("conv1", "conv3") and method == "adalora":
        return False
    return not (kind == "conv1" and method.startswith("ia3"))


def exact(model, method, kind, x):
    """The method's formula in fp64 on the dequantised weight, one effective weight, with autograd."""
    layer = model.base_model.model.m
    module = layer.base_layer
    weight = layer.site.weight.dense(torch.float64)
    bias = None if getattr(module, "bias", None) is None else module.bias.detach().double()
    slots = {}
    for slot, p in layer.adapters["default"].parameters().items():
        slots[slot] = p.detach().double().requires_grad_()
    x = x.double().requires_grad_() if x.is_floating_point() else x
    features = 0 if kind != "embedding" else 1  # the dimension of W that output features are in
    if method.startswith("ia3"):
        l = slots["ia3_l"].flatten()
        if method == "ia3":
            weight = weight * (l[:, None] if features == 0 else l[None])
            bias = None if bias is None else bias * l
        else:
            weight = weight * l.repeat_interleave(weight.shape[1] // len(l))[None]
    else:
        a, b = (s for n, s in slots.items() if n.endswith(("_A", "_B")))
        a, b = a.flatten(1), b.flatten(1)
        if method == "adalora":
            delta = b @ (a * slots["lora_E"]) * (3 / (4 + 1e-5))
            weight = weight + (delta.t() if features else delta)
        elif method == "kasa":
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            weight = (u[:, :-4] * s[:-4]) @ vh[:-4] + 2.0 * b @ (a * slots["lora_diag"][:, None])
        else:
            delta = 2.0 * b @ a
            weight = weight + (delta.t() if features else delta)
            g = slots["lora_magnitude_vector"].flatten() / weight.detach().norm(dim=1 - features)
            weight = weight * (g[:, None] if features == 0 else g[None])
    if kind == "embedding":
        y = F.embedding(x, weight)
    elif kind.startswith("conv") and kind != "conv1d-hf":
        function = {"conv1": F.conv1d, "conv2": F.conv2d, "conv3": F.conv3d}[kind]
        y = function(x, weight.reshape(module.weight.shape), bias, module.stride, module.padding)
    else:
        y = F.linear(x, weight, bias)
    return y, x, slots


def run(model, x):
    """Output and gradients of input and adapter, with the same upstream gradient for everybody."""
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    y = model(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    y.backward(upstream.to(y.dtype))
    grads = {"y": y.detach()}
    if x.is_floating_point():
        grads["x"] = x.grad
    for name, p in model.named_parameters():
        if ".default" in name and p.requires_grad and "ranknum" not in name:
            grads[name.split(".m.")[1].split(".default")[0]] = p.grad
    return grads, upstream


def distance(own, oracle):
    return {k: float((own[k].double() - v).norm() / v.norm()) for k, v in oracle.items()}


def cases():
    for method in METHODS:
        for kind in ("linear", "conv1d-hf", "embedding", "conv1", "conv2", "conv3"):
            if not exists(method, kind):
                continue
            for storage in FORMATS if kind == "linear" else FORMATS[:2]:
                yield method, kind, storage


@pytest.mark.parametrize(("method", "kind", "storage"), list(cases()))
def test_outputs_and_gradients_are_no_further_from_the_oracle_than_pefts(method, kind, storage):
    model, x = make(peftfast, method, kind, storage), make_input(kind, storage)
    own, upstream = run(model, x)
    y, exact_x, slots = exact(model, method, kind, x)
    y.backward(upstream.to(own["y"].dtype).double())
    oracle = {"y": y.detach(), **({"x": exact_x.grad} if exact_x.is_floating_point() else {})}
    oracle.update({n: s.grad for n, s in slots.items() if s.grad is not None and n != "ranknum"})
    assert own.keys() == oracle.keys()
    errors = distance(own, oracle)
    if peft_supports(method, kind, storage):
        theirs = make(peft, method, kind, storage)
        if method == "dora":  # PEFT rounds the initial magnitude to the base's dtype
            for n, p in theirs.named_parameters():
                if "magnitude" in n:
                    p.data.copy_(model.base_model.model.m.lora_magnitude_vector["default"].weight.data)
        peers = distance(run(theirs, x)[0], oracle)
    else:  # torch's own rounding of the result
        peers = {k: float((v.to(own[k].dtype).double() - v).norm() / v.norm()) for k, v in oracle.items()}
        peers = {k: max(v, torch.finfo(own["y"].dtype).eps / 2) for k, v in peers.items()}
    for key, error in errors.items():
        # a few units in the last place of fp32 are nobody's merit
        assert error <= 1.15 * peers[key] + 5e-7, (key, error, peers[key])


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("storage", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_the_same_as_on_a_gpu(method, storage, small, monkeypatch):
    """Where few elements are left to torch's own operations, and where not."""
    monkeypatch.setattr("peftfast.ops.composed.SMALL", {})
    for module in ("peftfast.sites.linear", "peftfast.ops.scale"):
        monkeypatch.setattr(f"{module}.is_small", lambda x: small)
    test_outputs_and_gradients_are_no_further_from_the_oracle_than_pefts(method, "linear", storage)
    if method == "dora" and storage == "fp32":
        test_dora_under_autocast()


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(("storage", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
@pytest.mark.parametrize("method", METHODS)
def test_frozen_adapters_pass_gradients_on(method, storage, tolerance, small, monkeypatch):
    if not small:
        monkeypatch.setattr("peftfast.ops.composed.SMALL", {})
    model, x = make(peftfast, method, "linear", storage).requires_grad_(False), make_input("linear", storage)
    own, upstream = run(model, x)
    y, exact_x, _ = exact(model, method, "linear", x)
    y.backward(upstream.to(own["y"].dtype).double())
    assert own.keys() == {"y", "x"}
    assert distance(own, {"x": exact_x.grad, "y": y.detach()})["x"] < tolerance


@pytest.mark.parametrize(("method", "kind", "storage"), [c for c in cases() if peft_supports(*c)])
def test_files_go_both_ways_with_identical_outputs(method, kind, storage, tmp_path):
    x = make_input(kind, storage)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs, ours = make(peft, method, kind, storage, 4), make(peftfast, method, kind, storage, 5)
        for source, library, other in ((theirs, peftfast, ours), (ours, peft, theirs)):
            source.eval().save_pretrained(tmp_path)
            loaded = library.PeftModel.from_pretrained(make_base(kind, storage), tmp_path).eval()
            assert loaded.state_dict().keys() == other.state_dict().keys()
            tolerance = 2e-2 if storage == "bf16" else 2e-5
            torch.testing.assert_close(loaded(x), source(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("method", "kind", "storage"), list(cases()))
def test_merging_on_every_base(method, kind, storage, bias):
    model, x = make(peftfast, method, kind, storage, bias_of_base=bias), make_input(kind, storage)
    model.eval()
    layer = model.base_model.model.m
    stored = {k: v.clone() for k, v in layer.base_layer.state_dict().items()}
    with torch.no_grad():
        before = model(x)
        if storage == "int8":  # the module quantises its input, so only the weight can be compared
            y, *_ = exact(model, method, kind, x)
        expected = before if storage != "int8" else y.float()
        model.merge_adapter(safe_merge=True)
        merged = model(x)
        limit = {"fp32": 1e-5, "bf16": 8e-3, "nf4": 0.15, "fp4": 0.2, "int8": 0.02}[storage]
        assert (merged - expected).norm() <= limit * expected.norm()
        model.unmerge_adapter()
    assert all(torch.equal(v, stored[k]) for k, v in layer.base_layer.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
        base = model.merge_and_unload()
        assert type(base.m) is type(layer.base_layer)
        assert (base(x) - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize(
    ("kind", "storage"), [("linear", "fp32"), ("linear", "bf16"), ("linear", "nf4"), ("conv2", "fp32")]
)
def test_a_seed_gives_the_adalora_that_it_gives_in_peft(kind, storage, init):
    made = []
    for library in (peft, peftfast):
        base = make_base(kind, storage)
        torch.manual_seed(4)
        model = library.get_peft_model(base, make_config(library, "adalora", init_lora_weights=init))
        made.append(({n: p for n, p in model.named_parameters() if "lora_" in n}, torch.rand(1)))
    (theirs, next_there), (ours, next_here) = made
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], p) for n, p in theirs.items())
    assert torch.equal(next_there, next_here)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["adalora", "ia3"])
def test_peft_cannot_merge_these(method, storage):
    """What the test above does has no counterpart: if this fails, PEFT has caught up and can be compared with."""
    with pytest.raises((NotImplementedError, ValueError)):
        make(peft, method, "linear", storage).merge_and_unload()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["linear", "conv2"])
def test_several_active_adapters_and_their_merging(method, kind):
    if not exists(method, kind):
        return
    x = make_input(kind, "fp32")
    models = []
    for library in (peft, peftfast):
        changes = {"inference_mode": True} if method == "adalora" else {}
        model = make(library, method, kind, "fp32", **changes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_adapter("second", make_config(library, method, **changes))
        fill(model, 11, "second")
        model.base_model.set_adapter(["default", "second"])
        models.append(model.eval())
    with torch.no_grad():
        theirs, ours = (m(x) for m in models)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        models[1].merge_adapter()
        torch.testing.assert_close(models[1](x), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2"])
def test_every_sample_may_have_its_own_adapter(method, kind):
    if not exists(method, kind):
        return
    x = make_input(kind, "fp32")
    model = make(peftfast, method, kind, "fp32")
    model.add_adapter("second", make_config(peftfast, method))
    fill(model, 11, "second")
    model.eval()
    names = (["default", "__base__", "second", "default"])[: len(x)]
    with torch.no_grad():
        mixed = model(x, adapter_names=names)
        for i, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    expected = model(x[i : i + 1])
            else:
                model.set_adapter(name)
                expected = model(x[i : i + 1])
            torch.testing.assert_close(mixed[i : i + 1], expected, rtol=1e-5, atol=1e-5)


# ---- DoRA alone ------------------------------------------------------------------------------------------------------
def test_dora_makes_nothing_of_the_weights_size():
    big = One(nn.Linear(2048, 3072, bias=True))
    ours = peftfast.get_peft_model(copy.deepcopy(big), make_config(peftfast, "dora"))
    theirs = peft.get_peft_model(big, make_config(peft, "dora"))
    counts = []
    for model in (ours, theirs):
        x = torch.randn(8, 2048, requires_grad=True)
        with Operations() as largest:
            model(x).sum().backward()
        counts.append(largest.elements)
    print(f"largest allocation: {counts[0]} elements here, {counts[1]} in PEFT; the weight has {2048 * 3072}")
    assert counts[0] <= 1 << 20 < 2048 * 3072 <= counts[1]


@pytest.mark.parametrize("kind", ["linear", "conv1d-hf", "embedding", "conv2"])
@pytest.mark.parametrize(("storage", "factors"), [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")])
def test_dora_norm_is_the_direct_one(kind, storage, factors):
    from peftfast.methods.lora.dora import _norm

    model = make(peftfast, "dora", kind, storage)
    if factors == "bf16":
        model.to(torch.bfloat16)
    layer = model.base_model.model.m
    adapter = layer.adapters["default"]
    a, b = (adapter[s].detach().double() for s in adapter.slots if s.endswith(("_A", "_B")))
    direct = layer.site.output_norm(layer.site.weight.dense(torch.float64) + 2.0 * layer.site.delta(a, b))
    torch.testing.assert_close(_norm(layer.site, adapter).double(), direct, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("base", [nn.Linear(64, 48), nn.Conv2d(64, 48, 1, groups=4), nn.Embedding(64, 48)])
def test_dora_starts_without_the_product_of_its_factors(base):
    """Which is zero, and of a high rank takes longer than the norm."""
    config = peftfast.LoraConfig(r=32, target_modules=["m"], use_dora=True)
    with FlopCounterMode(display=False) as counted:
        peftfast.get_peft_model(One(base), config)
    assert counted.get_total_flops() <= 2 * 64 * 48


@pytest.mark.parametrize("storage", FORMATS)
def test_dora_starts_as_the_base_model(storage):
    x = make_input("linear", storage)
    model = peftfast.get_peft_model(make_base("linear", storage), make_config(peftfast, "dora"))
    with torch.no_grad(), model.disable_adapter():
        base = model(x)
    tolerance = 1e-2 if storage == "bf16" else 1e-6
    torch.testing.assert_close(model(x), base, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["linear", "conv2"])
def test_dora_with_dropout_is_pefts_formula(kind):
    """Both drop with torch's generator, so the same seed gives the same mask."""
    x = make_input(kind, "fp32")
    results = []
    for library in (peft, peftfast):
        model = make(library, "dora", kind, "fp32", lora_dropout=0.4).train()
        torch.manual_seed(21)
        results.append(run(model, x)[0])
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-4, atol=1e-5)


def test_dora_under_autocast():
    x = make_input("linear", "fp32")
    ours, theirs = make(peftfast, "dora", "linear", "fp32"), make(peft, "dora", "linear", "fp32")
    with torch.no_grad():
        oracle, *_ = exact(ours, "dora", "linear", x)
        with torch.autocast("cpu", torch.bfloat16):
            own, peer = ours(x), theirs(x)
    assert own.dtype == torch.bfloat16
    assert (own - oracle).norm() <= 1.15 * (peer - oracle).norm()


def test_dora_follows_writes_through_data():
    x = make_input("linear", "fp32")
    model = make(peftfast, "dora", "linear", "fp32").eval()
    with torch.no_grad():
        model(x)
        model.base_model.model.m.lora_B["default"].weight.data.mul_(-2.0)
        y, *_ = exact(model, "dora", "linear", x)
        torch.testing.assert_close(model(x).double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2"])
def test_dora_combination_of_one_is_that_one(kind):
    """Magnitudes travel with the factors; PEFT starts them anew."""
    x = make_input(kind, "fp32")
    model = make(peftfast, "dora", kind, "fp32").eval()
    with torch.no_grad():
        expected = model(x)
        model.base_model.add_weighted_adapter(["default"], [1.0], "same")
        model.set_adapter("same")
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_dora_caching_reads_the_weight_once():
    from peftfast.helpers import DoraCaching
    from peftfast.methods.lora.dora import cache_norms

    x = make_input("linear", "fp32")
    model = make(peftfast, "dora", "linear", "fp32").eval()
    layer = model.base_model.model.m
    with torch.no_grad(), DoraCaching():
        first = model(x)
        kept = layer.lora_magnitude_vector["default"]._kept.norm
        assert torch.equal(model(x), first)
        assert layer.lora_magnitude_vector["default"]._kept.norm is kept
        layer.lora_A["default"].weight.mul_(3.0)
        y, *_ = exact(model, "dora", "linear", x)
        torch.testing.assert_close(model(x).double(), y, rtol=1e-5, atol=1e-5)
        for change in (
            lambda: layer.set_scale("default", 2.0),
            lambda: layer.base_layer.weight.mul_(0.5),
            lambda: setattr(layer.lora_B["default"], "weight", nn.Parameter(layer.lora_B["default"].weight * 2)),
            lambda: setattr(layer, "base_layer", nn.Linear(layer.in_features, layer.out_features)),
        ):
            change()
            with DoraCaching(False):
                expected = model(x)
            assert torch.equal(model(x), expected)
        cache = DoraCaching()
        with cache, DoraCaching(False):
            with cache:
                pass
            assert not cache_norms(False)  # each gives back what was before it
        assert cache_norms(True)
        model.train()
        assert layer.lora_magnitude_vector["default"]._kept is None


def test_dora_caching_sees_other_tensors_in_the_same_places():
    from peftfast.helpers import DoraCaching

    x = make_input("linear", "fp32")
    model = make(peftfast, "dora", "linear", "fp32").eval()
    layer = model.base_model.model.m
    with torch.no_grad(), DoraCaching():
        first, others = model(x), {n: 2 * p for n, p in model.named_parameters()}
        called = torch.func.functional_call(model, others, (x,))
        assert torch.equal(model(x), first)
        for holder in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
            holder.weight = nn.Parameter(2 * holder.weight)
            y, *_ = exact(model, "dora", "linear", x)
            torch.testing.assert_close(model(x).double(), y, rtol=1e-5, atol=1e-5)
        model.load_state_dict(others)
        y, *_ = exact(model, "dora", "linear", x)
        torch.testing.assert_close(called.double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("caching", [False, True])
def test_dora_of_inference_tensors(caching):
    from peftfast.helpers import DoraCaching

    x = make_input("linear", "fp32")
    with torch.inference_mode():
        model = make(peftfast, "dora", "linear", "fp32").eval()
        with DoraCaching(caching):
            first = model(x)
            model.base_model.model.m.lora_B["default"].weight.mul_(3)
            assert not torch.allclose(model(x), first)


def test_dora_with_rank_pattern_and_trained_biases():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    torch.manual_seed(0)
    base, x = Two(), torch.randn(5, 16)
    options = {"target_modules": ["a", "b"], "rank_pattern": {"a": 2}, "r": 5, "use_dora": True, "bias": "all"}
    ours = peftfast.get_peft_model(copy.deepcopy(base), peftfast.LoraConfig(**options))
    theirs = peft.get_peft_model(base, peft.LoraConfig(**options))
    fill(ours, 3)
    fill(theirs, 3)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    for (name, p), (other, q) in zip(sorted(ours.named_parameters()), sorted(theirs.named_parameters()), strict=True):
        assert name == other and p.requires_grad == q.requires_grad
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4, msg=name)


# ---- IA3 alone -------------------------------------------------------------------------------------------------------
def test_ia3_default_targets_are_pefts(tmp_path):
    import oracle

    for model in (oracle.llama, oracle.gpt2, oracle.bert, oracle.t5):
        theirs, ours = peft.IA3Config(), peftfast.IA3Config()
        peft.get_peft_model(model(), theirs)
        peftfast.get_peft_model(model(), ours)
        assert ours.target_modules == theirs.target_modules
        assert ours.feedforward_modules == theirs.feedforward_modules
        ours.save_pretrained(tmp_path)
        assert peft.PeftConfig.from_pretrained(tmp_path).to_dict().keys() == ours.to_dict().keys()


def test_tables_of_default_targets_are_pefts():
    from peft.utils import constants

    from peftfast.wrapping import default_targets

    for name, ours in (
        ("LORA_TARGET", default_targets.LORA),
        ("ADALORA_TARGET", default_targets.ADALORA),
        ("IA3_TARGET", default_targets.IA3),
        ("IA3_FEEDFORWARD", default_targets.IA3_FEEDFORWARD),
    ):
        assert ours == getattr(constants, f"TRANSFORMERS_MODELS_TO_{name}_MODULES_MAPPING"), name


@pytest.mark.parametrize("kind", ["linear", "conv2"])
@pytest.mark.parametrize("method", ["ia3", "ia3-input"])
def test_ia3_weighted_combination_is_pefts(method, kind):
    x, results = make_input(kind, "fp32"), []
    for library in (peft, peftfast):
        model = make(library, method, kind, "fp32")
        model.add_adapter("second", make_config(library, method))
        fill(model, 11, "second")
        model.base_model.add_weighted_adapter(["default", "second"], [0.3, 0.9], "sum")
        assert not any(p.requires_grad for n, p in model.named_parameters() if ".sum" in n)
        model.set_adapter("sum")
        results.append(model.eval()(x))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    for arguments, message in (
        ((["default", "third"], [1.0, 1.0], "x"), "Adapter third does not exist"),
        ((["default"], [1.0, 2.0], "x"), "one weight"),
    ):
        with pytest.raises(ValueError, match=message):
            model.base_model.add_weighted_adapter(*arguments)


def test_ia3_config_is_checked():
    with pytest.raises(ValueError, match="should be a subset of `target_modules`"):
        peftfast.IA3Config(target_modules=["a"], feedforward_modules=["b"])
    with pytest.raises(ValueError, match="feedforward_modules"):
        peftfast.get_peft_model(make_base("embedding", "fp32"), make_config(peftfast, "ia3-input"))


def test_grouped_convolutions():
    """IA3 is defined on them, merging included; AdaLoRA's product of factors is not, and is refused before anything
    changes."""
    base = One(nn.Conv2d(8, 12, 3, groups=4))
    x = torch.randn(2, 8, 6, 6)
    for method in ("ia3", "ia3-input"):
        model = peftfast.get_peft_model(copy.deepcopy(base), make_config(peftfast, method)).eval()
        fill(model, 3)
        with torch.no_grad():
            before = model(x)
            model.merge_adapter()
            torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="groups=4"):
        peftfast.get_peft_model(base, make_config(peftfast, "adalora"))
    assert type(base.m) is nn.Conv2d


@pytest.mark.parametrize("config", [
    peftfast.LoraConfig(r=4, target_modules=["m"], lora_bias=True),
    peftfast.LoraConfig(r=4, target_modules=["m"], use_dora=True),
    peftfast.IA3Config(target_modules=["m"], feedforward_modules=[]),
    peftfast.IA3Config(target_modules=["m"], feedforward_modules=["m"]),
    peftfast.AdaLoraConfig(init_r=4, target_r=2, target_modules=["m"], total_step=100),
], ids=["bias", "dora", "ia3", "ia3-input", "adalora"])  # fmt: skip
@pytest.mark.parametrize("cls, shape", [(nn.Conv1d, (8, 9)), (nn.Conv2d, (8, 6, 6)), (nn.Conv3d, (8, 4, 5, 6))])
def test_convolutions_of_one_sample_without_a_batch(cls, shape, config):
    """As torch's own take it. In PEFT they fail with DoRA, and get a dimension from IA3."""
    model = peftfast.get_peft_model(One(cls(8, 12, 3)).double(), config).eval()
    fill(model, 3)
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(x[None])[0])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    "cls, shape", [(nn.Conv1d, (2, 8, 9)), (nn.Conv2d, (2, 8, 6, 6)), (nn.Conv3d, (2, 8, 4, 5, 6))]
)
def test_dora_on_grouped_convolutions_is_pefts(cls, shape, dropout, tmp_path):
    """Its norm there is not that of any weight, but magnitudes in files are relative to it."""
    base, x = One(cls(8, 12, 3, groups=4)), torch.randn(shape)
    config = {"target_modules": ["m"], "r": 8, "lora_alpha": 4, "use_dora": True, "lora_dropout": dropout}
    model = peftfast.get_peft_model(copy.deepcopy(base), peftfast.LoraConfig(**config)).eval()
    torch.testing.assert_close(model(x), base(x), rtol=1e-5, atol=1e-5)
    fill(model, 3)
    model.save_pretrained(tmp_path)
    results = []
    for library in (peftfast, peft):
        loaded = library.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True).train()
        torch.manual_seed(2)  # the masks of convolutions are torch's
        y = loaded(x)
        y.square().sum().backward()
        results.append({"": y, **{n: p.grad for n, p in loaded.named_parameters() if p.requires_grad}})
    assert len(results[1]) == 4 and results[0].keys() == results[1].keys()
    for name, theirs in results[1].items():
        torch.testing.assert_close(results[0][name], theirs, rtol=1e-4, atol=1e-4, msg=name)
    before = model.base_model.model.m.base_layer.weight.clone()
    with pytest.raises(NotImplementedError, match="groups > 1"):
        model.merge_adapter()
    assert torch.equal(model.base_model.model.m.base_layer.weight, before)
