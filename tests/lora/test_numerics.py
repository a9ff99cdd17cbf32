"""Outputs and gradients of every kind of module in every precision, against an fp64 oracle: no further than PEFT's.

The oracle is PEFT's own formula on the same (rounded) tensors in fp64. What is compared is everything a training step
sees: the output, the gradient of the input, and the gradients of both factors.
"""

import copy
import importlib

import oracle
import pytest
import torch
from torch import nn

import peftfast
from peftfast.ops import blocks, composed, dora, host_bound, scale, velora
from peftfast.ops import lora as lora_ops
from peftfast.ops.gate import gate_rows
from peftfast.ops.plan import Part, plan_of
from peftfast_kernels.decode import dense, random_operand
from peftfast_kernels.keep_mask import keep_mask, keep_scale

peft = importlib.import_module("peft")

RANK = 8
TOKENS = 96


def conv1d_of_transformers(out_features, in_features):
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(out_features, in_features)
    nn.init.normal_(module.weight, std=in_features**-0.5)
    nn.init.normal_(module.bias, std=0.1)
    return module


class Own(nn.Linear):
    """What calls of it do is its own business: the adapter is added to what it gives."""

    def forward(self, x):
        return super().forward(x)


#: id -> (module, shape of its input; None: token ids)
SITES = {
    "own-linear": (lambda: Own(256, 112), (2, TOKENS, 256)),
    "linear": (lambda: nn.Linear(256, 112), (2, TOKENS, 256)),
    "linear-no-bias": (lambda: nn.Linear(256, 112, bias=False), (2 * TOKENS, 256)),
    "conv1d-hf": (lambda: conv1d_of_transformers(112, 256), (2, TOKENS, 256)),
    "embedding": (lambda: nn.Embedding(oracle.VOCABULARY, 80), None),
    "conv1d": (lambda: nn.Conv1d(48, 40, 3, padding=1), (4, 48, 50)),
    "conv2d": (lambda: nn.Conv2d(12, 40, 3, stride=2, padding=1), (4, 12, 20, 20)),
    "conv3d": (lambda: nn.Conv3d(6, 24, (1, 3, 3), bias=False), (3, 6, 4, 10, 10)),
}

#: id -> (dtype of the base, dtype of the input, autocast dtype, fp32 factors)
PRECISIONS = {
    "fp32": (torch.float32, torch.float32, None, True),
    "bf16": (torch.bfloat16, torch.bfloat16, None, True),
    "bf16-pure": (torch.bfloat16, torch.bfloat16, None, False),
    "fp16": (torch.float16, torch.float16, None, True),
    "fp16-pure": (torch.float16, torch.float16, None, False),
    "autocast-fp32-base": (torch.float32, torch.float32, torch.bfloat16, True),
    "autocast-bf16-base": (torch.bfloat16, torch.bfloat16, torch.bfloat16, True),
    "autocast-fp16-base": (torch.float16, torch.float16, torch.float16, True),
    "autocast-bf16-input": (torch.float32, torch.bfloat16, torch.bfloat16, True),
}


@pytest.fixture(autouse=True, params=["small", "large", "host-bound"])
def size(request, monkeypatch):
    """How linear layers take every input: small ones on a CPU and on a GPU, and large ones."""
    monkeypatch.setattr(composed, "SMALL", dict.fromkeys(composed.SMALL, 1 << 30 if request.param == "small" else -1))
    if request.param == "host-bound":
        monkeypatch.setattr(lora_ops, "is_host_bound", lambda x, plan: plan.format in ("dense", "dense_t"))
    return request.param


def adapted(library, make, dtype, wide, adapters=1, rank_step=1, **options):
    torch.manual_seed(0)
    model = oracle.One(make()).to(dtype)
    wrapped = None
    for i in range(adapters):
        config = library.LoraConfig(r=RANK + i * rank_step, lora_alpha=12, target_modules=["m"], **options)
        name = f"a{i}"
        if wrapped is None:
            wrapped = oracle.quietly(library.get_peft_model, model, config, name, autocast_adapter_dtype=wide)
        else:
            wrapped.add_adapter(name, config, autocast_adapter_dtype=wide)
    wrapped.base_model.set_adapter([f"a{i}" for i in range(adapters)])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(wrapped.named_parameters()):
            if "lora_" in name:
                fan = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan**-0.5)
    return wrapped


def input_of(shape, dtype):
    generator = torch.Generator().manual_seed(11)
    if shape is None:
        return torch.randint(0, oracle.VOCABULARY, (4, TOKENS), generator=generator)
    return torch.randn(shape, generator=generator).to(dtype)


def step(model, x, autocast=None, upstream=None):
    """Output and all gradients of one training step; the incoming gradient is rounded to `upstream` (None: as y)."""
    model.zero_grad()
    if x.is_floating_point():
        x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = model(x)
    generator = torch.Generator().manual_seed(13)
    y.backward(torch.randn(y.shape, generator=generator).to(upstream or y.dtype).to(y.dtype))
    result = {"output": y.detach()}
    if x.is_floating_point():
        result["dx"] = x.grad
    return result | oracle.gradients(model)


def in_fp64(model, x, upstream):
    """The oracle: the same tensors in fp64, PEFT's formula, and the incoming gradient that the others got."""
    model = copy.deepcopy(model).double()
    return step(model, x.double() if x.is_floating_point() else x, upstream=upstream)


def compare(ours, theirs, x, autocast, truth=None):
    mine, other = step(ours, x, autocast), step(theirs, x, autocast)
    assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {k: (v.shape, v.dtype) for k, v in other.items()}
    truth = in_fp64(theirs, x, other["output"].dtype) if truth is None else truth
    return oracle.assert_no_further(mine, other, truth)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("site", SITES)
def test_no_further_than_peft(site, precision):
    make, shape = SITES[site]
    dtype, input_dtype, autocast, wide = PRECISIONS[precision]
    x = input_of(shape, input_dtype)
    ratios = compare(adapted(peftfast, make, dtype, wide), adapted(peft, make, dtype, wide), x, autocast)
    print(site, precision, {k.rpartition("lora_")[2]: round(v, 3) for k, v in ratios.items()})


def test_autocast_leaves_fp64():
    make, shape = SITES["linear"]
    x = input_of(shape, torch.float64)
    ours, theirs = (
        step(adapted(library, make, torch.float64, False), x, torch.bfloat16) for library in (peftfast, peft)
    )
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast-fp32-base"])
def test_a_trained_bias_of_the_base(precision):
    make, shape = SITES["linear"]
    dtype, input_dtype, autocast, wide = PRECISIONS[precision]
    ours, theirs = (adapted(library, make, dtype, wide, bias="all") for library in (peftfast, peft))
    assert any(
        name.endswith("base_layer.bias") for name in compare(ours, theirs, input_of(shape, input_dtype), autocast)
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("site", ["linear", "linear-no-bias", "conv1d-hf", "conv1d"])
def test_a_bias_of_the_up_factor(site, precision):
    make, shape = SITES[site]
    dtype, input_dtype, autocast, wide = PRECISIONS[precision]
    ours, theirs = (adapted(library, make, dtype, wide, lora_bias=True) for library in (peftfast, peft))
    assert any(
        name.endswith("lora_B.a0.bias") for name in compare(ours, theirs, input_of(shape, input_dtype), autocast)
    )


@pytest.mark.parametrize("each", ["token", "rank"])
@pytest.mark.parametrize("onto_an_output", [False, True])
def test_gates_get_their_gradients(onto_an_output, each):
    shapes = {"y": (2, 3, 8), "x": (2, 3, 16), "a": (4, 16), "b": (8, 4), "gate": (2, 3, 1 if each == "token" else 4)}
    weight, leaves = torch.randn(8, 16), {name: torch.randn(shape) for name, shape in shapes.items()}

    def gradients(formula, dtype):
        own = {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}
        out = formula(**own)
        found = torch.autograd.grad(out.square().sum(), list(own.values()), allow_unused=True)
        return [out, *(one for one in found if one is not None)]

    def exact(y, x, a, b, gate):
        base = y if onto_an_output else x @ weight.to(x.dtype).t()
        return base + 2.0 * ((x @ a.t()) * gate) @ b.t()

    def ours(y, x, a, b, gate):
        if onto_an_output:
            return lora_ops.lora_linear_add(y, x, a, b, 2.0, 0.0, gate)
        return lora_ops.lora_linear(x, dense(weight), None, a, b, 2.0, 0.0, gate)

    for one, other in zip(gradients(ours, torch.float32), gradients(exact, torch.float64), strict=True):
        assert oracle.rms_error(one, other) < 1e-6


@pytest.mark.parametrize("size", ["large", "host-bound"], indirect=True)
def test_autocast_that_begins_after_the_forward_pass_has_no_part_in_gradients(size):
    make, shape = SITES["linear"]
    model, x = adapted(peftfast, make, torch.float32, True), input_of(shape, torch.float32)
    expected = step(model, x)
    y = model(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(13))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y.backward(upstream)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, expected[name]), name


@pytest.mark.parametrize("site", ["linear", "linear-no-bias"])
def test_large_products_take_the_function_and_small_ones_do_not(site, size, monkeypatch):
    made, apply = [], lora_ops.apply
    monkeypatch.setattr(lora_ops, "apply", lambda function, *args: (made.append(function), apply(function, *args))[1])
    make, shape = SITES[site]
    adapted(peftfast, make, torch.bfloat16, True)(input_of(shape, torch.bfloat16))
    assert len(made) == (size == "large")


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("size", ["small"], indirect=True)
def test_dropout_of_small_products_on_a_cpu_is_torch_dropout(grad):
    """With and without gradients: reentrant checkpointing runs a layer in both ways and expects the same mask."""
    make, shape = SITES["linear"]
    x, results = input_of(shape, torch.float32), []
    for library in (peftfast, peft):
        model = adapted(library, make, torch.float32, True, lora_dropout=0.4).train()
        torch.manual_seed(7)
        with torch.set_grad_enabled(grad):
            results.append(step(model, x) if grad else {"output": model(x)})
    for name, other in results[1].items():
        torch.testing.assert_close(results[0][name], other, rtol=1e-4, atol=1e-4)


OTHERS = {
    "LoRA": {"target_modules": ["m"]},
    "DoRA": {"target_modules": ["m"], "use_dora": True},
    "KaSA": {"target_modules": ["m"], "kasa_config": peftfast.KasaConfig()},
    "Parameter": {"target_parameters": ["m.weight"]},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_autocast_to_the_other_half_precision(kind):
    """As `torch.autocast("cuda")` means fp16 on a base in bf16."""
    torch.manual_seed(0)
    model, x, rows = oracle.One(nn.Linear(48, 32)), torch.randn(3, 48), ["default", "other", "__base__"]
    config = peftfast.LoraConfig(r=2, init_lora_weights=False, **OTHERS[kind])
    model = peftfast.get_peft_model(model, config).eval()
    model.add_adapter("other", peftfast.LoraConfig(r=4, init_lora_weights=False, **OTHERS[kind]))
    model.base_model.set_adapter(["default", "other"])
    expected = model(x), model(x, adapter_names=rows)
    model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.float16):
        found = model(x), model(x, adapter_names=rows)
    for y, exact in zip(found, expected, strict=True):
        assert (y - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-pure", "autocast-fp32-base"])
@pytest.mark.parametrize("site", SITES)
def test_several_active_adapters(site, precision):
    """Of different ranks; PEFT adds them one by one."""
    make, shape = SITES[site]
    dtype, input_dtype, autocast, wide = PRECISIONS[precision]
    ours, theirs = (adapted(library, make, dtype, wide, adapters=3) for library in (peftfast, peft))
    compare(ours, theirs, input_of(shape, input_dtype), autocast)


@pytest.mark.parametrize("cls, shape", [(nn.Conv1d, (2, 12, 20)), (nn.Conv2d, (2, 12, 9, 9))])
def test_grouped_convolutions(cls, shape):
    def make():
        return cls(12, 24, 3, groups=4)

    for adapters in (1, 2):
        ours, theirs = (
            adapted(library, make, torch.float32, True, adapters=adapters, rank_step=4) for library in (peftfast, peft)
        )
        compare(ours, theirs, input_of(shape, torch.float32), None)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding": 1, "padding_mode": "reflect"}, {"padding": "same"}])
@pytest.mark.parametrize("cls, shape", [(nn.Conv1d, (2, 12, 20)), (nn.Conv2d, (2, 12, 9, 9))])
def test_dilated_and_padded_convolutions_agree_with_their_merged_form(cls, shape, options):
    """PEFT forgets dilation and padding mode in the down factor; merging is the meaning."""
    model = adapted(peftfast, lambda: cls(12, 24, 3, **options), torch.float64, True)
    x = input_of(shape, torch.float64)
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(model.merge_and_unload()(x), before, rtol=1e-6, atol=1e-6)


class FixedDropout(nn.Module):
    """What `nn.Dropout` does, with a given mask."""

    def __init__(self, keep, prob):
        super().__init__()
        self.keep, self.prob = keep, prob

    def forward(self, x):
        return x * (self.keep.view(x.shape).to(x.dtype) * keep_scale(self.prob))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("site", ["linear", "conv1d-hf"])
@pytest.mark.parametrize("size", ["large"], indirect=True)
def test_dropout_against_the_exported_mask(site, precision, adapters, monkeypatch):
    make, shape = SITES[site]
    dtype, input_dtype, autocast, wide = PRECISIONS[precision]
    x, prob, seeds = input_of(shape, input_dtype), 0.3, []
    module = importlib.import_module("peftfast.ops.lora")
    draw = module.draw_seed
    monkeypatch.setattr(module, "draw_seed", lambda *a: seeds.append(draw(*a)) or seeds[-1])
    ours = adapted(peftfast, make, dtype, wide, adapters, lora_dropout=prob).train()
    theirs = adapted(peft, make, dtype, wide, adapters, lora_dropout=prob).train()
    mine = step(ours, x, autocast)
    assert len(seeds) == adapters and len({int(s) for s in seeds}) == adapters
    rows = x.shape.numel() // x.shape[-1]
    for i, seed in enumerate(seeds):
        keep = keep_mask(seed, prob, rows, x.shape[-1], x.device)
        assert abs(keep.double().mean().item() - (1 - prob)) < 0.02
        theirs.base_model.model.m.lora_dropout[f"a{i}"] = FixedDropout(keep, prob)
    other = step(theirs, x, autocast)
    oracle.assert_no_further(mine, other, in_fp64(theirs, x, other["output"].dtype))


@pytest.mark.parametrize("site", SITES)
def test_dropout_rests_in_eval_mode_and_differs_from_call_to_call(site):
    make, shape = SITES[site]
    x = input_of(shape, torch.float32)
    ours, theirs = (adapted(library, make, torch.float32, True, lora_dropout=0.5) for library in (peftfast, peft))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)
        quiet = ours(x)
        first, second = ours.train()(x), ours(x)
    if site == "embedding":  # token ids have nothing to drop
        assert torch.equal(first, quiet)
    else:
        assert not torch.equal(first, second)
        torch.manual_seed(3)
        third = ours(x)
        torch.manual_seed(3)
        assert torch.equal(ours(x), third)


@pytest.mark.parametrize("site", ["conv1d", "conv2d", "conv3d"])
def test_dropout_of_convolutions_is_torch_dropout(site):
    make, shape = SITES[site]
    x = input_of(shape, torch.float32)
    results = []
    for library in (peftfast, peft):
        model = adapted(library, make, torch.float32, True, lora_dropout=0.4).train()
        torch.manual_seed(9)
        results.append(step(model, x))
    for key, value in results[1].items():
        torch.testing.assert_close(results[0][key], value, rtol=1e-5, atol=1e-5)


def test_dropout_is_unbiased():
    """Averaged over many masks the adapter gives what it gives without dropout."""
    model = adapted(peftfast, lambda: nn.Linear(64, 8), torch.float32, True, lora_dropout=0.25)
    x = torch.randn(4, 64)
    with torch.no_grad():
        plain = model.eval()(x)
        model.train()
        mean = model(x.repeat(8000, 1)).view(8000, 4, 8).mean(0)
    assert (mean - plain).abs().max() < 0.06


def test_scale_changes():
    """Written through methods or directly, with the same effect as in PEFT."""
    x = torch.randn(5, 80)
    ours, theirs = (
        adapted(library, lambda: nn.Linear(80, 112), torch.float32, True, adapters=2) for library in (peftfast, peft)
    )

    def both(change):
        for model in (ours, theirs):
            change(model.base_model.model.m)
        scalings = [{k: float(v) for k, v in m.base_model.model.m.scaling.items()} for m in (ours, theirs)]
        assert scalings[0] == pytest.approx(scalings[1])
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)

    both(lambda layer: layer.set_scale("a0", 3.0))
    both(lambda layer: layer.scale_layer(0.5))
    both(lambda layer: layer.unscale_layer(2.0))
    both(lambda layer: layer.unscale_layer())
    both(lambda layer: layer.set_scale("nobody", 2.0))
    both(lambda layer: layer.scaling.__setitem__("a1", 0.125))
    both(lambda layer: layer.scaling.__setitem__("a0", torch.tensor(0.75)))
    both(lambda layer: layer.unscale_layer())


def test_parameters_replaced_or_written_under_the_layers_feet():
    """Other libraries assign new Parameters, write through .data, or load state dicts."""
    x = torch.randn(5, 80, dtype=torch.bfloat16)
    model = adapted(peftfast, lambda: nn.Linear(80, 112), torch.bfloat16, True)
    theirs = adapted(peft, lambda: nn.Linear(80, 112), torch.bfloat16, True)

    def outputs(model):
        with torch.autocast("cpu", torch.bfloat16):  # a context each: autocast itself keeps casts while it lasts
            return model(x).float()

    with torch.no_grad():
        for change in (
            lambda layer: layer.lora_B["a0"].weight.data.mul_(2),
            lambda layer: setattr(layer.lora_A["a0"], "weight", nn.Parameter(layer.lora_A["a0"].weight * -3)),
            lambda layer: setattr(layer.lora_B["a0"].weight, "data", layer.lora_B["a0"].weight.data.flip(0)),
            lambda layer: setattr(layer.base_layer.weight, "data", layer.base_layer.weight.data.flip(1)),
            lambda layer: layer.lora_B["a0"].to(torch.float64).to(torch.float32),
        ):
            before = outputs(model)
            for m in (model, theirs):
                change(m.base_model.model.m)
            torch.testing.assert_close(outputs(model), outputs(theirs), rtol=2e-2, atol=5e-2)
            assert change.__code__.co_names[-1] == "float32" or not torch.equal(outputs(model), before)


def test_input_gradient_only_and_factors_only():
    """Frozen factors with a training input, and training factors with a frozen input."""
    make = SITES["linear"][0]
    x = input_of(SITES["linear"][1], torch.float32)
    ours, theirs = (adapted(library, make, torch.float32, True) for library in (peftfast, peft))
    for model in (ours, theirs):
        model.set_requires_grad("a0", False)
    compare(ours, theirs, x, None)
    for model in (ours, theirs):
        model.set_requires_grad("a0", True)
    exact = copy.deepcopy(theirs).double()
    gradient = torch.randn(ours(x).shape, generator=torch.Generator().manual_seed(13))
    for model, inputs in ((ours, x), (theirs, x), (exact, x.double())):
        model(inputs).backward(gradient.to(inputs.dtype))
    oracle.assert_no_further(
        *({n: p.grad for n, p in model.named_parameters() if "lora_" in n} for model in (ours, theirs, exact))
    )


def packed(part):
    """With another weight, in 8 bits."""
    w = random_operand("int8", 8, 8, part.plan.dtype, "cpu")
    return part._replace(w=w, plan=part.plan._replace(format=w.format))


def gate_of(x, g):
    """[..., 4], one number for every rank."""
    return g[:4] * torch.ones_like(x[..., :4])


#: name -> outputs [..., N] for x [..., K], a part of both, the output of a base module and N numbers
WAYS = {
    "kernels": lambda x, part, y, g: [lora_ops.by_kernels(x, part)],
    "host-bound": lambda x, part, y, g: [host_bound.host_bound_lora(x, part)],
    "siblings": lambda x, part, y, g: blocks.lora_siblings(x, [part] * 3),
    "gated MLP": lambda x, part, y, g: [blocks.gated_mlp(x, part, part, part, "silu")],
    "composed": lambda x, part, y, g: [composed.composed_lora(x, part)],
    "composed over packed weights": lambda x, part, y, g: [composed.composed_lora(x, packed(part))],
    "gated": lambda x, part, y, g: [lora_ops.by_kernels(x, part, gate_rows(gate_of(x, g)))],
    "on an output": lambda x, part, y, g: [lora_ops.lora_linear_add(y, x, part.a, part.b, 2.0, part.plan.dropout)],
    "gated on an output": lambda x, part, y, g: [
        lora_ops.lora_linear_add(y, x, part.a, part.b, 2.0, part.plan.dropout, gate_of(x, g))
    ],
    "DoRA": lambda x, part, y, g: [dora.dora_linear_add(y, x, part.a, part.b, g, part.bias, 2.0)],
    "VeLoRA": lambda x, part, y, g: [
        velora.velora_linear_add(y, x, part.a, part.b, 2.0, 0.0, lambda rows: velora.mean_direction(rows, 4), 1.0)
    ],
    "IA3": lambda x, part, y, g: [scale.scale_features(y, g)],
}


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)], ids=["rows", "samples"])
@pytest.mark.parametrize("way", WAYS)
def test_outputs_may_be_written_to(way, shape):
    """As `nn.ReLU(inplace=True)` does, and OLMo's attention, which clamps the projections in place."""
    torch.manual_seed(0)
    w, g = dense(torch.randn(8, 8)), torch.rand(8, requires_grad=True)
    leaves = [torch.randn(size, requires_grad=True) for size in (shape, shape, (4, 8), (8, 4))]
    x, y, a, b = leaves
    part, found = Part(w, torch.randn(8), a, b, plan_of(w, torch.float32, 2.0, 0.0)), []
    for write in (torch.Tensor.relu, torch.Tensor.relu_):
        total = sum(write(out).square().sum() for out in WAYS[way](x * 1, part, y * 1, g))
        found.append(torch.autograd.grad(total, leaves, allow_unused=True))
    assert any(one is not None for one in found[0])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def differentiated(way, dropout=0.0):
    """A function of x, y, a, b, g and a bias in fp64, and values for them."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 8), (2, 3, 8), (4, 8), (8, 4), (8,), (8,))
    values = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]
    w = dense(torch.randn(8, 8, dtype=torch.float64, generator=generator))

    def function(x, y, a, b, g, bias):
        torch.manual_seed(3)  # the same mask every time
        part = Part(w, bias, a, b, plan_of(w, torch.float64, 2.0, dropout))
        if way == "IA3":  # whose product of equal dtypes is torch's
            return scale._ScaleFeatures.apply(y, g)
        outputs = WAYS[way](x, part, y, g)
        return outputs[len(outputs) // 2]  # of siblings, the one in the middle alone

    return function, values


@pytest.mark.parametrize("way", [way for way in WAYS if way != "VeLoRA"])
def test_second_derivatives(way):
    function, values = differentiated(way, 0.3)
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


def test_what_has_no_second_derivative_says_so():
    """Also where what arrives is a constant, and gradients are made of the factors all the same."""
    function, values = differentiated("VeLoRA")
    (db,) = torch.autograd.grad(function(*values).sum(), values[3:4], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        db.square().sum().backward()


@pytest.mark.parametrize("way", [way for way in WAYS if way != "VeLoRA"])
def test_a_graph_of_the_gradients_does_not_change_them(way):
    """Of a layer that is called twice, whose second input is made of its own factors."""
    function, values = differentiated(way)
    x, y, *others = values
    found = []
    for graph in (False, True):
        middle = function(x, y, *others).tanh()
        total = function(middle, middle * 2, *others).square().sum()
        found.append(torch.autograd.grad(total, values, create_graph=graph, allow_unused=True))
    assert any(one is not None for one in found[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_do_not_depend_on_what_else_needs_one(way):
    function, values = differentiated(way, 0.3)
    whole = torch.autograd.grad(function(*values).square().sum(), values, allow_unused=True)
    for i, expected in enumerate(whole):
        alone = [value.detach().requires_grad_(k == i) for k, value in enumerate(values)]
        if expected is not None:
            (found,) = torch.autograd.grad(function(*alone).square().sum(), alone[i : i + 1])
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_small_change_of_a_large_weight(options, dtype, size):
    """`get_delta_weight` is not what the weight's own rounding leaves of it."""
    if size != "small":
        pytest.skip("no product is taken")
    layer = adapted(peftfast, lambda: nn.Linear(48, 32), dtype, True, **options).base_model.model.m
    with torch.no_grad():
        layer.base_layer.weight.mul_(50)
        layer.lora_B["a0"].weight.mul_(1e-4)
        if options:  # as if trained from here on
            layer.lora_magnitude_vector["a0"].weight.copy_(1.0001 * layer.base_layer.weight.norm(dim=1))
    weight = layer.base_layer.weight.double()
    exact = layer.lora_B["a0"].weight.double() @ layer.lora_A["a0"].weight.double() * layer.scaling["a0"]
    if options:
        changed = weight + exact
        gain = layer.lora_magnitude_vector["a0"].weight.double() / changed.norm(dim=1)
        exact = gain.unsqueeze(1) * changed - weight
    change = layer.get_delta_weight("a0")
    assert change.dtype == dtype
    # a difference of numbers of fp64 that are some thousand times larger
    assert oracle.rms_error(change, exact) <= torch.finfo(dtype).eps * (1e4 if options and dtype.itemsize == 8 else 2)


@pytest.mark.parametrize("trained", [False, True])
def test_dora_scales_all_but_the_bias(trained):
    model = adapted(peftfast, lambda: nn.Linear(64, 48), torch.float64, True, use_dora=True)
    layer, x = model.base_model.model.m, torch.randn(6, 64, dtype=torch.float64)
    layer.base_layer.bias.requires_grad_(trained)
    a, b, m = (getattr(layer, n)["a0"].weight for n in ("lora_A", "lora_B", "lora_magnitude_vector"))
    changed = layer.base_layer.weight + layer.scaling["a0"] * b @ a
    expected = x @ changed.t() * (m / changed.norm(dim=1).detach()) + layer.base_layer.bias
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    leaves = [a, b, m, *[layer.base_layer.bias] * trained]
    found = [torch.autograd.grad(y.square().sum(), leaves) for y in (model(x), expected)]
    torch.testing.assert_close(*found)


def test_dora_scales_a_branch_of_autocast_in_fp32(size):
    """So that the output is rounded once: y = g (base - bias + s branch) + bias of what autocast gives of the two."""
    if size != "small":
        pytest.skip("products of others are not autocast's")
    layer = adapted(peftfast, lambda: nn.Linear(64, 48), torch.float32, True, use_dora=True).base_model.model.m
    layer.set_scale("a0", 1.4142)
    x = torch.randn(4, 64)
    a, b, bias = layer.lora_A["a0"].weight, layer.lora_B["a0"].weight, layer.base_layer.bias.double()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        base, branch, y = layer.base_layer(x), x @ a.t() @ b.t(), layer(x)
    scaling = layer.scaling["a0"]
    norm = (layer.base_layer.weight.double() + scaling * (b.double() @ a.double())).norm(dim=1)
    gain = layer.lora_magnitude_vector["a0"].weight.double() / norm
    exact = gain * (base.double() - bias + scaling * branch.double()) + bias
    assert y.dtype == base.dtype == branch.dtype == torch.bfloat16
    assert (y != exact.to(y.dtype)).double().mean() < 0.01
