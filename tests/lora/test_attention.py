"""LoRA on torch's MultiheadAttention: against PEFT in names, files and logits, against an fp64 oracle in values and
gradients, and through everything in torch that reads an attention's weights by itself."""

import copy
import importlib
import io
import warnings

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import peftfast
from peftfast.layers.layer import BaseTunerLayer
from peftfast.methods.lora.lora import Lora

peft = importlib.import_module("peft")

E, HEADS = 16, 2


class Net(nn.Module):
    """Attention to itself, then to something else, then a linear layer."""

    def __init__(self, **options):
        super().__init__()
        self.mha = nn.MultiheadAttention(E, HEADS, **options)
        self.cross = nn.MultiheadAttention(E, HEADS, **options)
        self.norm = nn.LayerNorm(E)
        self.head = nn.Linear(E, 5)

    def forward(self, x, memory):
        x = self.norm(x + self.mha(x, x, x, need_weights=False)[0])
        return self.head(x + self.cross(x, memory, memory)[0])


net = oracle._seeded(Net)


def inputs(batch=3):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, 3, E, generator=generator), torch.randn(batch, 3, E, generator=generator)


def adapted(base=None, name="default", **options):
    """With factors that are not zero."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["mha", "cross"], "init_lora_weights": False} | options
    torch.manual_seed(5)
    return peftfast.get_peft_model(base or net(), peftfast.LoraConfig(**options), adapter_name=name).eval()


def plain_copy(model):
    """What the adapted `model` is to compute, in fp64: the base model with W + s B A, and at `out_proj` W + 2 s B A, in
    the place of its weights. As a function of the inputs, and the factors of the active adapters by name."""
    inner = model.get_base_model()
    weights = {n.replace("base_layer.", ""): p.detach().double() for n, p in inner.named_parameters()}
    factors = {}
    for name, layer in inner.named_modules():
        if isinstance(layer, BaseTunerLayer):
            own = name.replace("base_layer.", "")
            key, times = (f"{own}.weight", 2) if own.endswith("out_proj") else (f"{own}.in_proj_weight", 1)
            for adapter in [n for n in layer.active_adapters if n in layer.adapters]:
                names = [f"{name}.lora_{part}.{adapter}.weight" for part in "AB"]
                a, b = (inner.get_parameter(n).detach().double().requires_grad_() for n in names)
                factors |= dict(zip(names, (a, b), strict=True))
                weights[key] = weights[key] + times * layer.scaling[adapter] * (b @ a)
    skeleton = Net().double().train(inner.training)
    weights = {n: w for n, w in weights.items() if ".lora_" not in n}
    return (lambda *args: torch.func.functional_call(skeleton, weights, args)), factors


# ---- against PEFT ---------------------------------------------------------------------------------------------------
#: id -> (options of the attention, fields of the config)
CASES = {
    "plain": ({}, {}),
    "batch-first": ({"batch_first": True}, {}),
    "one-and-linear": ({}, {"target_modules": ["mha", "head"]}),
    "without-bias": ({"bias": False}, {"target_modules": ["cross"]}),
    "bias-kv": ({"add_bias_kv": True, "add_zero_attn": True}, {}),
    "rslora": ({}, {"use_rslora": True, "r": 3}),
    "gaussian": ({}, {"init_lora_weights": "gaussian"}),
    "random": ({}, {"init_lora_weights": False}),
    "patterns": ({}, {"rank_pattern": {"mha": 2}, "alpha_pattern": {"cross": 3}}),
    "regex": ({}, {"target_modules": r"mha|cross"}),
    "bias-all": ({}, {"bias": "all"}),
    "bias-only": ({}, {"bias": "lora_only"}),
    "beside-a-copy": ({}, {"modules_to_save": ["head"]}),
}


@pytest.fixture(params=CASES, scope="module")
def twins(request):
    attention, options = CASES[request.param]
    wanted = {"r": 4, "lora_alpha": 6, "target_modules": ["mha", "cross"], **options}
    return oracle.Twins(lambda: net(**attention), wanted)


def test_a_seed_gives_the_factors_that_it_gives_in_peft(twins):
    fresh = oracle.Twins(twins.make, twins.options, same=False)
    theirs = dict(fresh.theirs.named_parameters())
    for name, parameter in fresh.ours.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


def test_names_and_what_is_trained(twins):
    oracle.same_live_state(twins.ours, twins.theirs)
    trained = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (twins.ours, twins.theirs)]
    assert trained[0] == trained[1]  # in the same order, which is that of an optimizer's state
    assert twins.ours.targeted_module_names == twins.theirs.targeted_module_names
    name = twins.ours.targeted_module_names[0]
    assert f"base_model.model.{name}.base_layer.out_proj.lora_A.default.weight" in dict(twins.ours.named_parameters())


def test_logits(twins):
    for training in (False, True):
        ours, theirs = twins.ours.train(training), twins.theirs.train(training)
        torch.testing.assert_close(ours(*inputs()), theirs(*inputs()), rtol=1e-5, atol=2e-6)
        with torch.no_grad():
            torch.testing.assert_close(ours(*inputs()), theirs(*inputs()), rtol=1e-5, atol=2e-6)


def test_files_both_ways(twins, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about a model without a config
        twins.ours.save_pretrained(tmp_path / "ours")
        twins.theirs.save_pretrained(tmp_path / "theirs")
        oracle.same_files(tmp_path / "ours", tmp_path / "theirs")
        ours = peftfast.PeftModel.from_pretrained(twins.make(), tmp_path / "theirs", strict=True)
        theirs = peft.PeftModel.from_pretrained(twins.make(), tmp_path / "ours")
    with torch.no_grad():
        want = twins.ours.eval()(*inputs())
        torch.testing.assert_close(ours.eval()(*inputs()), want, rtol=0, atol=0)
        torch.testing.assert_close(theirs.eval()(*inputs()), want, rtol=1e-5, atol=2e-6)


def test_merged_weights(twins):
    ours, theirs = (oracle.quietly(copy.deepcopy(m).merge_and_unload) for m in (twins.ours, twins.theirs))
    assert type(ours.mha) is nn.MultiheadAttention and isinstance(ours.mha.out_proj, nn.Linear)
    values = dict(theirs.named_parameters())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter, values[name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name} {m}"
        )


# ---- every way of calling it ----------------------------------------------------------------------------------------
def masks(length, others, batch):
    causal = torch.triu(torch.ones(length, others, dtype=torch.bool), 1)
    padding = torch.zeros(batch, others, dtype=torch.bool)
    padding[0, -1] = True
    return causal, padding


#: id -> (self-attention?, keyword arguments)
CALLS = {
    "self": (True, lambda causal, padding: {}),
    "self-causal": (True, lambda causal, padding: {"attn_mask": causal, "is_causal": True, "need_weights": False}),
    "self-padding": (True, lambda causal, padding: {"key_padding_mask": padding}),
    "self-both": (True, lambda causal, padding: {"attn_mask": causal, "key_padding_mask": padding}),
    "self-float-mask": (True, lambda causal, padding: {"attn_mask": causal * -2.5, "need_weights": False}),
    "self-per-head": (True, lambda causal, padding: {"average_attn_weights": False}),
    "self-mask-per-head": (
        True,
        lambda causal, padding: {"attn_mask": causal.expand(HEADS * len(padding), *causal.shape)},
    ),
    "cross": (False, lambda causal, padding: {}),
    "cross-padding": (False, lambda causal, padding: {"key_padding_mask": padding, "need_weights": False}),
    "cross-per-head": (False, lambda causal, padding: {"average_attn_weights": False}),
}


@pytest.mark.parametrize("gradients", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_calls(call, batch_first, gradients):
    """No further from the fp64 result than PEFT is."""
    itself, options = CALLS[call]
    twins = oracle.Twins(lambda: net(batch_first=batch_first), {"r": 4, "target_modules": ["mha"]})
    ours, theirs = twins.ours.base_model.model.mha, twins.theirs.base_model.model.mha
    batch, length, others = 2, 5, 5 if itself else 4
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(batch, length, E, generator=generator)
    other = query if itself else torch.randn(batch, others, E, generator=generator)
    kwargs = options(*masks(length, others, batch))
    if not batch_first:
        query, other = query.transpose(0, 1), other.transpose(0, 1)
        other = query if itself else other
    truth = copy.deepcopy(twins.make().mha).double()
    with torch.no_grad():
        for mine, module in ((ours, truth), (ours.base_layer.out_proj, truth.out_proj)):
            a, b = mine.lora_A["default"].weight.double(), mine.lora_B["default"].weight.double()
            weight, times = (module.in_proj_weight, 1) if module is truth else (module.weight, 2)
            weight.add_(times * mine.scaling["default"] * (b @ a))

    def wide(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    with torch.set_grad_enabled(gradients):
        wide_query = wide(query)
        wide_other = wide_query if itself else wide(other)
        expected = truth(wide_query, wide_other, wide_other, **{k: wide(v) for k, v in kwargs.items()})
        mine, peft_result = (m(query, other, other, **kwargs) for m in (ours, theirs))
    assert (mine[1] is None) == (peft_result[1] is None) == (kwargs.get("need_weights") is False)
    named = [{n: t for n, t in zip("yw", r, strict=True) if t is not None} for r in (mine, peft_result, expected)]
    oracle.assert_no_further(*named)
    assert mine[0].requires_grad == gradients


def test_one_sequence_without_a_batch():
    model = adapted()
    mha, x = model.base_model.model.mha, torch.randn(5, E)
    y, weights = mha(x, x, x)
    assert y.shape == (5, E) and weights.shape == (5, 5)
    torch.testing.assert_close(y, mha(x[:, None], x[:, None], x[:, None])[0][:, 0])


# ---- gradients ------------------------------------------------------------------------------------------------------
def gradients(model, batch):
    """Of all factors, and of the inputs."""
    batch = [t.clone().requires_grad_() for t in batch]
    model.zero_grad()
    model(*batch).to(torch.promote_types(batch[0].dtype, torch.float32)).square().sum().backward()
    found = {n: p.grad for n, p in model.get_base_model().named_parameters() if p.requires_grad}
    return {**found, "x": batch[0].grad, "memory": batch[1].grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_against_the_oracle(dtype):
    """No further from it than PEFT's; those of out_proj are in PEFT the ones of half the change that it makes, so twice
    that is compared. In bf16 each is a sample of few digits, so all of them together are."""
    twins = oracle.Twins(lambda: net().to(dtype), {"r": 4, "target_modules": ["mha", "cross"]})
    errors = []
    for seed in range(20):
        function, factors = plain_copy(twins.ours)
        generator = torch.Generator().manual_seed(seed)
        batch = [torch.randn(3, 3, E, generator=generator).to(dtype) for _ in range(2)]
        ours, theirs = gradients(twins.ours, batch), gradients(twins.theirs, batch)
        theirs = {n: 2 * g if "out_proj" in n else g for n, g in theirs.items()}
        wide = [t.double().requires_grad_() for t in batch]
        wanted = torch.autograd.grad(function(*wide).square().sum(), (*factors.values(), *wide))
        truth = dict(zip((*factors, "x", "memory"), wanted, strict=True))
        assert ours.keys() == truth.keys() and len(truth) == 10
        errors += [[oracle.rms_error(found[n], truth[n]) for found in (ours, theirs)] for n in truth]
    mine, other = torch.tensor(errors).square().mean(0).sqrt()
    print(f"{mine:.2e} {other:.2e}")
    assert mine <= max(1.05 * other, 3 * torch.finfo(torch.float32).eps)


def test_derivatives_of_every_order():
    model = adapted(net().double())
    names = [n for n, p in model.named_parameters() if p.requires_grad]

    def function(x, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x, x))

    x = torch.randn(2, 2, E, dtype=torch.float64, requires_grad=True)
    values = [p.detach().clone().requires_grad_() for p in model.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(function, (x, *values), fast_mode=True)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        assert torch.autograd.gradgradcheck(function, (x, *values), fast_mode=True)


def test_autocast():
    model = adapted()
    want = plain_copy(model)[0](*(t.double() for t in inputs()))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(*inputs())
    assert oracle.rms_error(y, want.detach()) < 2e-2
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("training", [False, True])
def test_compiled_whole(backend, training):
    torch._dynamo.reset()
    model = adapted().train(training)
    want = model(*inputs())
    want.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    y = compiled(*inputs())
    torch.testing.assert_close(y, want)
    y.sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], msg=name)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs()), want)


def test_training_reduces_a_loss_and_leaves_the_base_alone():
    model = adapted(init_lora_weights=True).train()
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    goal = torch.randn(3, 3, 5)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(model(*inputs()), goal)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


# ---- whoever reads the weights --------------------------------------------------------------------------------------
def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, HEADS, 32, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_layers_in_evaluation_see_the_adapter(padded):
    """torch.nn.TransformerEncoderLayer calls nothing in evaluation and hands all weights to one function."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", peftfast.PeftWarning)
        model = adapted(encoder(), target_modules=["self_attn"])
    x = torch.randn(2, 5, E)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = padded
    kwargs = {"src_key_padding_mask": padding} if padded else {}
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        slow = model(x, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    calls = []
    with torch.no_grad():
        handed = torch._transformer_encoder_layer_fwd
        torch._transformer_encoder_layer_fwd = lambda *args: calls.append(args) or handed(*args)
        try:
            fast = model(x, **kwargs)
        finally:
            torch._transformer_encoder_layer_fwd = handed
        with model.disable_adapter():
            base = model(x, **kwargs)
    assert len(calls) == 2
    torch.testing.assert_close(fast[~padding], slow[~padding], rtol=1e-5, atol=2e-6)
    assert (base - fast)[~padding].abs().max() > 1e-2
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(x, **kwargs)[~padding], fast[~padding], rtol=1e-5, atol=2e-6)


def test_the_linear_layers_beside_it_are_still_warned_of():
    with pytest.warns(peftfast.PeftWarning) as caught:
        adapted(encoder(), target_modules=["self_attn", "linear1"])
    (text,) = [str(w.message) for w in caught if "set_fastpath_enabled" in str(w.message)]
    assert "linear1" in text and "self_attn" not in text


def test_weights_as_others_read_them():
    model = adapted()
    layer, x = model.base_model.model.mha, torch.randn(5, 2, E)
    y = F.multi_head_attention_forward(
        x, x, x, E, HEADS, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0,
        layer.out_proj.weight, layer.out_proj.bias, training=False, need_weights=False,
    )[0]  # fmt: skip
    torch.testing.assert_close(y, layer(x, x, x)[0])
    heads = torch.randn(5, 2, E)
    torch.testing.assert_close(layer.out_proj(heads), F.linear(heads, layer.out_proj.weight, layer.out_proj.bias))
    assert layer.in_proj_weight.requires_grad and not layer.base_layer.in_proj_weight.requires_grad
    with model.disable_adapter():
        assert layer.in_proj_weight is layer.base_layer.in_proj_weight
        assert layer.out_proj.weight is layer.base_layer.out_proj.base_layer.weight


def test_attributes_are_the_modules():
    base = net(add_bias_kv=True, add_zero_attn=True, batch_first=True, dropout=0.25)
    names = (
        "embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "_qkv_same_embed_dim",
        "in_proj_bias", "bias_k", "bias_v", "add_zero_attn", "q_proj_weight",
    )  # fmt: skip
    before = {name: getattr(base.mha, name) for name in names}
    layer = adapted(base).base_model.model.mha
    assert all(getattr(layer, name) is value for name, value in before.items())
    assert (layer.in_features, layer.out_features) == (E, 3 * E)
    assert layer.merge_masks(None, None, torch.randn(2, 5, E)) == (None, None)
    assert isinstance(layer, peft.tuners.lora.layer.MultiheadAttention)


class Derived(nn.MultiheadAttention):
    """Gives the output only, and remembers."""

    def forward(self, query, key, value, **kwargs):
        self.last = super().forward(query, key, value, **kwargs)[0]
        return self.last


def test_hooks_and_derived_classes():
    model = adapted()
    layer, x = model.base_model.model.mha, torch.randn(5, 2, E)
    want = layer(x, x, x)[0]
    seen = []
    handle = layer.base_layer.register_forward_hook(lambda module, args, out: seen.append((module, out[0])))
    torch.testing.assert_close(layer(x, x, x)[0], want, rtol=0, atol=0)
    handle.remove()
    assert seen[0][0] is layer.base_layer
    torch.testing.assert_close(seen[0][1], want, rtol=0, atol=0)
    derived = Derived(E, HEADS).eval()
    derived.load_state_dict(net().mha.state_dict())
    other = adapted(nn.ModuleDict({"mha": derived}), target_modules=["mha"])
    oracle.copy_parameters(layer, other.base_model.model["mha"])
    torch.testing.assert_close(other.base_model.model["mha"](x, x, x), want, rtol=0, atol=0)
    assert derived.last is not None


@pytest.mark.parametrize("hooked", [False, True])
def test_parameters_stay_where_they_are(hooked):
    """Also when the call fails; PEFT takes them out for the time of a call."""
    model = adapted()
    layer = model.base_model.model.mha
    if hooked:
        layer.base_layer.register_forward_hook(lambda module, args, out: None)
    parameters = dict(model.named_parameters())
    versions = {n: p._version for n, p in parameters.items()}
    model(*inputs()).sum().backward()
    with pytest.raises((RuntimeError, AssertionError)):
        layer(torch.randn(5, 2, E + 1), torch.randn(5, 2, E), torch.randn(5, 2, E))
    assert all(p is parameters[n] and p._version == versions[n] for n, p in model.named_parameters())
    assert all(isinstance(p, nn.Parameter) for p in (layer.base_layer.in_proj_weight, layer.out_proj.base_layer.weight))


def test_threads():
    model = adapted()
    model.add_adapter("other", peftfast.LoraConfig(r=2, target_modules=["mha"], init_lora_weights=False))
    wanted = [model(*inputs(batch)).detach() for batch in range(1, 5)]

    def run(batch):
        for _ in range(30):
            assert torch.equal(model(*inputs(batch)), wanted[batch - 1])

    oracle.at_once(run, range(1, 5))


# ---- adapters come and go -------------------------------------------------------------------------------------------
def add_second(model):
    config = peftfast.LoraConfig(r=3, lora_alpha=2, target_modules=["mha"], init_lora_weights=False)
    model.add_adapter("second", config)
    return model


def test_several_adapters():
    model = add_second(adapted())
    outputs = {}
    for names in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(names)
        trained = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
        assert trained == set(names)
        outputs[tuple(names)] = model(*inputs())
        want = plain_copy(model)[0](*(t.double() for t in inputs()))
        assert oracle.rms_error(outputs[tuple(names)].detach(), want.detach()) < 1e-6
    model.delete_adapter("second")
    torch.testing.assert_close(model(*inputs()), outputs["default",], rtol=0, atol=0)
    with model.disable_adapter():
        torch.testing.assert_close(model(*inputs()), net()(*inputs()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("safe", [False, True])
def test_merging(dtype, safe):
    model = add_second(adapted(net().to(dtype)))
    model.base_model.set_adapter(["default", "second"])
    batch = [t.to(dtype) for t in inputs()]
    before = {n: p.clone() for n, p in model.named_parameters()}
    want = model(*batch)
    model.merge_adapter(safe_merge=safe)
    layer = model.base_model.model.mha
    assert layer.merged_adapters == layer.base_layer.out_proj.merged_adapters == ["default", "second"]
    torch.testing.assert_close(model(*batch), want, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    torch.testing.assert_close(model(*batch), want, rtol=0, atol=0)


def test_a_broken_adapter_is_not_merged():
    model = adapted()
    with torch.no_grad():
        model.base_model.model.cross.base_layer.out_proj.lora_B["default"].weight[0, 0] = float("inf")
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert not model.base_model.model.mha.merged
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("kind, rank", [("cat", None), ("svd", 8), ("svd", 3), ("linear", None)])
def test_weighted_combinations(kind, rank):
    twins = oracle.Twins(net, {"r": 4, "target_modules": ["mha"], "init_lora_weights": False})
    for library, model in ((peftfast, twins.ours), (peft, twins.theirs)):
        config = library.LoraConfig(r=4, target_modules=["mha", "cross"], init_lora_weights=False)
        model.add_adapter("second", config)
    oracle.copy_parameters(twins.theirs, twins.ours)
    for model in (twins.ours, twins.theirs):
        model.add_weighted_adapter(["default", "second"], [0.5, 1.5], "both", kind, svd_rank=rank)
        model.set_adapter("both")
    oracle.close(twins.ours(*inputs()), twins.theirs(*inputs()))
    if kind == "cat" or rank == 8:  # exactly the sum
        layer = twins.ours.base_model.model.mha
        for one in (layer, layer.base_layer.out_proj):
            first, second, both = (one.get_delta_weight(name) for name in ("default", "second", "both"))
            torch.testing.assert_close(both, 0.5 * first + 1.5 * second, rtol=1e-4, atol=1e-5)


def test_mixed_batches_are_refused_and_uniform_ones_are_not():
    model = add_second(adapted())
    x, memory = inputs()
    with pytest.raises(TypeError, match="lora.MultiheadAttention does not support mixed adapter batches: mha"):
        model(x, memory, adapter_names=["default", "second", "__base__"])
    model.set_adapter("second")
    want = model(x, memory)
    model.set_adapter("default")
    torch.testing.assert_close(model(x, memory, adapter_names=["second"] * 3), want)
    assert not torch.equal(want, model(x, memory))


@pytest.mark.parametrize("copied", ["deepcopy", "torch.save"])
def test_copies(copied):
    model = adapted()
    want = model(*inputs()).detach()
    if copied == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    with torch.no_grad():
        model.base_model.model.mha.base_layer.out_proj.lora_B["default"].weight.zero_()
        model.base_model.model.mha.lora_B["default"].weight.zero_()
    torch.testing.assert_close(twin(*inputs()), want, rtol=0, atol=0)
    twin.add_adapter("new", peftfast.LoraConfig(target_modules=["mha"]))
    merged = twin.merge_and_unload()
    assert type(merged.mha.out_proj) is type(net().mha.out_proj)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(tmp_path, low_cpu_mem_usage):
    model = adapted()
    oracle.quietly(model.save_pretrained, tmp_path)
    loaded = peftfast.PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, strict=True)
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    torch.testing.assert_close(loaded.eval()(*inputs()), model(*inputs()), rtol=0, atol=0)
    loaded.load_adapter(tmp_path, "again", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("again")
    torch.testing.assert_close(loaded(*inputs()), model(*inputs()), rtol=0, atol=0)


def test_injected_from_a_state_dict():
    model = adapted(target_modules=["mha"])
    state = peftfast.get_peft_model_state_dict(model)
    base = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        peftfast.inject_adapter_in_model(model.peft_config["default"], base, state_dict=state)
    peftfast.set_peft_model_state_dict(base, state)
    torch.testing.assert_close(base(*inputs()), model(*inputs()), rtol=0, atol=0)


def test_hotswap(tmp_path):
    model = adapted()
    other = oracle.moved(peftfast.get_peft_model(net(), model.peft_config["default"]).eval())
    oracle.quietly(other.save_pretrained, tmp_path)
    peftfast.hotswap_adapter(model, tmp_path, adapter_name="default")
    torch.testing.assert_close(model(*inputs()), other(*inputs()), rtol=0, atol=0)


def test_the_plan_says_what_is_done():
    for options in ({}, {"bias": "lora_only"}, {"bias": "all"}, {"rank_pattern": {"mha": 2}}):
        config = peftfast.LoraConfig(r=4, target_modules=["mha", "cross"], **options)
        plan = peftfast.plan_adapter(net(), config)
        model = peftfast.get_peft_model(net(), config)
        assert plan.trainable_parameters == model.get_nb_trainable_parameters()[0]


# ---- refusals -------------------------------------------------------------------------------------------------------
#: id -> (config, error, text)
REFUSED = {
    "dora": ({"use_dora": True}, ValueError, "MultiheadAttention does not support DoRA (yet), please set use_dora"),
    "bias": ({"lora_bias": True}, ValueError, "does not support lora_bias=True"),
    "pissa": ({"init_lora_weights": "pissa"}, ValueError, "does not support init_lora_weights='pissa'"),
    "kept": ({"modules_to_save": ["out_proj"]}, ValueError, "mha.out_proj is a part of mha"),
    "parameter": ({"target_parameters": ["mha.out_proj.weight"]}, ValueError, "not a valid target"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    options, error, text = REFUSED[case]
    base = net()
    before = [(n, type(m)) for n, m in base.named_modules()]
    with pytest.raises(error) as caught:
        peftfast.get_peft_model(base, peftfast.LoraConfig(**{"target_modules": ["mha"], **options}))
    assert text in str(caught.value) and "mha" in str(caught.value)
    assert [(n, type(m)) for n, m in base.named_modules()] == before
    assert all(p.requires_grad for p in base.parameters())


def test_refused_half_way(monkeypatch):
    """The first attention is wrapped by then, and is itself again."""
    base = net()
    before = [(n, type(m)) for n, m in base.named_modules()]
    init, calls = Lora.init, []

    def failing(self, site, adapter):
        calls.append(adapter.key)
        if adapter.key == "cross":
            raise OSError("no memory")
        init(self, site, adapter)

    monkeypatch.setattr(Lora, "init", failing)
    with pytest.raises(OSError):
        adapted(base)
    assert "mha" in calls
    assert [(n, type(m)) for n, m in base.named_modules()] == before


@pytest.mark.parametrize("kind", ["IA3Config", "AdaLoraConfig"])
def test_only_lora(kind):
    options = {"feedforward_modules": []} if kind == "IA3Config" else {"total_step": 10}
    with pytest.raises(ValueError, match=f"'mha': MultiheadAttention does not support {kind}, only LoRA"):
        peftfast.get_peft_model(net(), getattr(peftfast, kind)(target_modules=["mha"], **options))


def test_weights_of_their_own_for_keys():
    with pytest.raises(ValueError, match="mha: Only same embed .* embed_dim=16, kdim=8, vdim=16"):
        adapted(nn.ModuleDict({"mha": nn.MultiheadAttention(E, HEADS, kdim=8)}), target_modules=["mha"])


def test_an_output_projection_that_is_no_linear_layer():
    base = net()
    base.mha.out_proj = nn.Identity()
    with pytest.raises(TypeError, match=r"mha: out_proj must be an instance of nn.Linear"):
        adapted(base, target_modules=["mha"])


def test_the_output_projection_belongs_to_its_attention():
    """Named beside it, it is adapted with it and once; alone, it is what it was: warned of."""
    both = adapted(target_modules=["mha", "out_proj", "cross"])
    assert both.targeted_module_names == ["mha", "cross"]
    with pytest.raises(ValueError, match="mha.out_proj is a part of mha"):
        both.add_adapter("alone", peftfast.LoraConfig(target_modules=["mha.out_proj"]))
    with pytest.warns(peftfast.PeftWarning, match="neither used nor trained"):
        alone = adapted(target_modules=["out_proj"])
    with pytest.raises(ValueError, match="mha.out_proj is a part of mha"):
        alone.add_adapter("whole", peftfast.LoraConfig(target_modules=["mha"]))


def test_dropout_is_named_as_idle():
    with pytest.warns(peftfast.PeftWarning, match="'mha': lora_dropout=0.5 has no effect in MultiheadAttention"):
        model = adapted(target_modules=["mha"], lora_dropout=0.5)
    torch.testing.assert_close(model.train()(*inputs()), model.eval()(*inputs()))


def test_offloaded_weights_are_named():
    layer = adapted().base_model.model.mha
    layer.base_layer.in_proj_weight = nn.Parameter(layer.base_layer.in_proj_weight.to("meta"), requires_grad=False)
    x = torch.randn(5, 2, E)
    with pytest.raises(RuntimeError, match="in_proj_weight of MultiheadAttention is offloaded"):
        layer(x, x, x)
