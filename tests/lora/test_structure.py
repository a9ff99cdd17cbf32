"""What one adapted linear layer keeps for the backward pass and dispatches, next to PEFT, at a real layer's size."""

import importlib
import importlib.util

import oracle
import pytest
import torch
import torch.nn.utils.parametrize
from processes import run
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftfast
from peftfast.ops import composed

peft = importlib.import_module("peft")

pytestmark = pytest.mark.usefixtures("large_products")

WIDTH, TOKENS, RANK = 4096, 2048, 16
MIB = 2**20


class OneLinear(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False, dtype=torch.bfloat16)

    def forward(self, x):
        return self.linear(x)


class NoProducts(TorchDispatchMode):
    """Matrix products are not computed, only allocated: what is kept does not depend on the numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "mm" and "out" not in (kwargs or {}):
            return args[0].new_empty(args[0].shape[0], args[1].shape[1])
        if name == "addmm" and "out" not in (kwargs or {}):
            return args[1].new_empty(args[1].shape[0], args[2].shape[1])
        if name == "addmm_":
            return args[0]
        if name in ("mm", "addmm"):
            return kwargs["out"]
        return func(*args, **(kwargs or {}))


def wrapped(library, prob, width=WIDTH):
    torch.manual_seed(0)
    config = library.LoraConfig(r=RANK, target_modules=["linear"], lora_dropout=prob, init_lora_weights=False)
    return library.get_peft_model(OneLinear(width), config).train()


def kept_bytes(model, x):
    """Bytes that the graph of one call keeps alive beyond its input, its output and what lives as long as the model."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), NoProducts():
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
    node = y.grad_fn
    for value in vars(node).values() if hasattr(node, "__dict__") else ():  # what a Function keeps as attributes
        kept.extend(t for t in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(t, torch.Tensor))
    lasting = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    base_model = getattr(model, "base_model", None)
    # one set per model, whatever the number of calls
    copies = getattr(getattr(base_model, "_casts", None), "copies", [])
    lasting |= {t.untyped_storage().data_ptr() for t in copies}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    lasting_bytes = sum(t.nbytes for t in copies)
    return sum(n for p, n in storages.items() if p not in lasting), lasting_bytes


@pytest.mark.parametrize("prob", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(TOKENS, WIDTH), (2, TOKENS // 2, WIDTH)])
def test_kept_for_backward(prob, shape):
    x = torch.randn(shape, dtype=torch.bfloat16).requires_grad_()
    mine, copies = kept_bytes(wrapped(peftfast, prob), x)
    other, _ = kept_bytes(wrapped(peft, prob), x)
    print(
        f"p={prob} {shape}: {mine / MIB:.3f} MiB (PEFT {other / MIB:.1f}); per model {copies / MIB:.2f} MiB of copies"
    )
    assert mine <= 0.2 * MIB
    assert other >= 16 * MIB  # so that the measurement sees what there is to see
    assert copies <= 2 * RANK * WIDTH * 2


def dispatched(model, shape):
    """Operations of a forward and of a backward pass, second step (the first allocates what lasts)."""
    x = torch.randn(shape, dtype=torch.bfloat16)
    for _ in range(2):
        x = x.detach().requires_grad_()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), oracle.Operations() as forward:
            y = model(x)
        dy = torch.randn_like(y)
        with oracle.Operations() as backward:
            y.backward(dy)
    return forward.names, backward.names


SHAPES = [(48, 64), (2, 24, 64)]


@pytest.mark.parametrize("shape", SHAPES)
def test_dispatched_operations(shape):
    """Without a GPU. With dropout the mask is made by numpy chunk by chunk; handing it over is dispatched work too."""
    for prob, share in ((0.0, 0.5), (0.1, 1.0)):
        mine, other = dispatched(wrapped(peftfast, prob, 64), shape), dispatched(wrapped(peft, prob, 64), shape)
        counts = [tuple(map(len, passes)) for passes in (mine, other)]
        print(f"p={prob} {shape}: forward + backward {counts[0]}, PEFT {counts[1]}")
        assert sum(counts[0]) <= share * sum(counts[1]), mine


@pytest.mark.parametrize(("alpha", "scaling"), [(2 * RANK, 0), (RANK // 4, 0), (24, 1)])
def test_a_small_wide_update_is_scaled_where_it_is_added(alpha, scaling, monkeypatch):
    """bf16 base, fp32 factors, no autocast, no gradients: no operation for a scaling that is a power of two, with which
    the output has the bits that it has in training."""
    monkeypatch.setattr(composed, "SMALL", {2: 1 << 18})
    torch.manual_seed(0)
    config = peftfast.LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["linear"], init_lora_weights=False)
    model = peftfast.get_peft_model(OneLinear(64), config)
    x = torch.randn(2, 24, 64, dtype=torch.bfloat16)
    with torch.no_grad(), oracle.Operations() as inference:
        y = model(x)
    assert inference.names.count("mul") == scaling
    assert torch.equal(y, model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_dispatches_little(dtype, monkeypatch):
    """Its norm is a product and a reduction; PEFT makes B A of an identity matrix."""
    monkeypatch.setattr(composed, "SMALL", dict.fromkeys((2, 4), 1 << 18))
    counts = []
    for library in (peftfast, peft):
        config = library.LoraConfig(r=RANK, target_modules=["linear"], use_dora=True)
        model = library.get_peft_model(OneLinear(64).to(dtype), config).eval()
        with torch.no_grad(), oracle.Operations() as inference:
            model(torch.randn(48, 64, dtype=dtype))
        counts.append(len(inference.names))
    assert counts[0] < counts[1], counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_dispatch_less(dtype):
    counts = []
    for library in (peftfast, peft):
        model = nn.Sequential(nn.Conv2d(4, 8, 3)).to(dtype)
        model = library.get_peft_model(model, library.LoraConfig(r=4, target_modules=["0"])).eval()
        x = torch.randn(2, 4, 6, 6, dtype=dtype)
        with torch.no_grad(), oracle.Operations() as inference:
            model(x)
        counts.append(len(inference.names))
    assert counts[0] < counts[1], counts


_HOST_SIDE = """
from triton.runtime.interpreter import InterpretedFunction
InterpretedFunction.__getitem__ = lambda self, grid: lambda *args, **kwargs: None
from lora import test_structure as structure
for prob in (0.0, 0.1):
    for shape in structure.SHAPES:
        counts = []
        for library in (structure.peftfast, structure.peft):
            passes = structure.dispatched(structure.wrapped(library, prob, 64), shape)
            counts.append([len(names) for names in passes])
        print(prob, shape, "forward + backward", *counts, sep="; ")
        assert 2 * sum(counts[0]) <= sum(counts[1]), passes
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="counts the launches of Triton kernels")
def test_dispatched_operations_around_triton_kernels():
    """What a GPU's host side dispatches: the launchers run, the kernels themselves are left out."""
    print(run(["-c", _HOST_SIDE], TRITON_INTERPRET="1", PEFTFAST_BACKEND="triton"))


class Doubled(nn.Module):
    def forward(self, bias):
        return 2 * bias


@pytest.mark.parametrize("training", [False, True])
def test_the_short_call_sees_every_replacement(training):
    """A layer's usual call looks things up once; whatever users and other libraries replace later must still count."""
    x = torch.randn(5, 32)

    def fresh():
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(32, 24))
        config = peftfast.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        return peftfast.get_peft_model(base, config).train(training)

    def a_hook(layer):
        layer.base_layer.register_forward_hook(lambda module, args, out: out + 1)

    def a_parametrised_bias(layer):
        torch.nn.utils.parametrize.register_parametrization(layer.base_layer, "bias", Doubled())

    def a_frozen_weight_thawed(layer):
        layer.base_layer.weight.requires_grad_(True)

    changes = {
        "scaling": lambda layer: layer.scaling.__setitem__("default", 7.0),
        "another dict of scalings": lambda layer: setattr(layer, "scaling", {"default": 7.0}),
        "scaling as a tensor": lambda layer: layer.scaling.__setitem__("default", torch.tensor(7.0)),
        "set_scale": lambda layer: layer.set_scale("default", 3.0),
        "factor": lambda layer: setattr(layer.lora_A["default"], "weight", torch.nn.Parameter(torch.ones(4, 32))),
        "factor's data": lambda layer: setattr(layer.lora_B["default"].weight, "data", torch.ones(24, 4)),
        "base weight": lambda layer: setattr(
            layer.base_layer, "weight", torch.nn.Parameter(torch.ones(24, 32), requires_grad=False)
        ),
        "bias": lambda layer: setattr(layer.base_layer, "bias", torch.nn.Parameter(torch.ones(24), False)),
        "dropout": lambda layer: layer.lora_dropout.__setitem__("default", torch.nn.Dropout(1.0)),
        "hook": a_hook,
        "forward": lambda layer: setattr(layer.base_layer, "forward", lambda x: torch.zeros(5, 24)),
        "thawed": a_frozen_weight_thawed,
        "parametrised bias": a_parametrised_bias,
        "merged": lambda layer: layer.merge(),
        "disabled": lambda layer: layer.enable_adapters(False),
    }
    for name, change in changes.items():
        model, other = fresh(), fresh()
        used, unused = (m.base_model.model[0] for m in (model, other))
        model(x), model(x)  # the short call is in use
        change(used), change(unused)
        unused.__dict__["_plan"] = (unused._steps(), None)  # the long way
        with torch.set_grad_enabled(training):
            got, expected = model(x), other(x)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        if training and expected.requires_grad:
            got.sum().backward(), expected.sum().backward()
            for (key, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
                assert (ours.grad is None) == (theirs.grad is None), (name, key)
                if ours.grad is not None:
                    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained, products", [((), 3), (("lora_B",), 4), (("lora_A", "lora_B"), 5)])
@pytest.mark.parametrize("after_the_base", [False, True])
def test_nothing_is_computed_for_frozen_factors(trained, products, after_the_base):
    """Backward through a frozen adapter: the base's product and two for the input's gradient."""
    model = wrapped(peftfast, 0.0, width=64).to(torch.float32)
    layer = model.base_model.inventory.layers["linear"]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(slot in name for slot in trained))
    if after_the_base:  # a hook keeps the base's product from being taken over
        layer.base_layer.register_forward_hook(lambda *_: None)
    x = torch.randn(8, 64, requires_grad=True)
    y = layer(x)
    with oracle.Operations() as seen:
        y.sum().backward()
    found = [name for name in seen.names if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm")]
    assert len(found) == products, found
    assert [p.grad is not None for p in model.parameters() if p.requires_grad] == [True] * len(trained)
    w, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(x.grad, torch.ones(8, 64) @ (w + layer.scaling["default"] * b @ a))
