"""Outputs and gradients of LoRA on quantised layers: no further from the fp64 oracle on the dequantised weight than
PEFT with bitsandbytes; and what is kept between forward and backward."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
from oracle import One
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

from quantized.support import (  # noqa: E402
    BASES,
    FOUR_BIT,
    Result,
    assert_no_further,
    clone,
    dense,
    exact_result,
    quantised_linear,
)

import peftfast  # noqa: E402
from peftfast.ops import composed  # noqa: E402
from peftfast_kernels import keep_mask, keep_scale  # noqa: E402

RANK, ROWS, SCALE = 8, 24, 2.0
DRAWS = 8

#: id -> (dtype of the input, compute_dtype of the layer, dtype of autocast)
PRECISIONS = {
    "fp32": (torch.float32, torch.float32, None),
    "bf16": (torch.bfloat16, torch.bfloat16, None),
    "fp16": (torch.float16, torch.float16, None),
    "bf16-autocast": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16-autocast": (torch.float16, torch.float16, torch.float16),
    "fp32-input-bf16-autocast": (torch.float32, torch.bfloat16, torch.bfloat16),
    "fp32-input-bf16-compute": (torch.float32, torch.bfloat16, None),
    "bf16-input-fp32-compute": (torch.bfloat16, torch.float32, None),
    "fp32-compute-bf16-autocast": (torch.float32, torch.float32, torch.bfloat16),
}


class FixedMask(nn.Module):
    """A dropout whose mask is given, for the library whose own cannot be known."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask.to(x.dtype)


def adapted(library, base: nn.Module, dropout: float = 0.0, autocast_adapter_dtype: bool = True) -> nn.Module:
    config = library.LoraConfig(
        r=RANK, lora_alpha=int(SCALE * RANK), target_modules=["m"], lora_dropout=dropout, init_lora_weights=False
    )
    model = library.get_peft_model(One(clone(base)), config, autocast_adapter_dtype=autocast_adapter_dtype)
    g = torch.Generator().manual_seed(3)
    layer = model.base_model.model.m
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.randn(RANK, 64, generator=g) / 8)
        layer.lora_B["default"].weight.copy_(torch.randn(48, RANK, generator=g) / RANK**0.5)
    return model


def run(model: nn.Module, x: Tensor, dy: Tensor, autocast: torch.dtype | None, seed: int = 0) -> Result:
    x = x.clone().requires_grad_(True)
    torch.manual_seed(seed)
    with torch.autocast("cpu", autocast) if autocast else nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = model(x)
    y.backward(dy.to(y.dtype))
    layer = model.base_model.model.m
    return Result(y.detach(), x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad)


def mask_of(seed: int, dropout: float) -> Tensor:
    """The mask that a layer draws first after `manual_seed(seed)`, scaled as it is applied."""
    torch.manual_seed(seed)
    drawn = torch.randint(-(2**62), 2**62, (), dtype=torch.int64)
    return keep_mask(drawn, dropout, ROWS, 64, torch.device("cpu")) * keep_scale(dropout)


def both(base: str, precision: str, dropout: float, autocast_adapter_dtype: bool = True):
    """Ours, theirs and the oracle's, each over several draws: one draw says little about the size of an error."""
    layer = quantised_linear(base, dtype=PRECISIONS[precision][1])
    if hasattr(layer, "set_compute_type"):
        layer.compute_dtype, layer.compute_type_is_set = PRECISIONS[precision][1], True
    draws = [once(layer, precision, dropout, autocast_adapter_dtype, seed) for seed in range(DRAWS)]
    return tuple(
        Result(*(torch.stack(parts) for parts in zip(*side, strict=True))) for side in zip(*draws, strict=True)
    )


def once(layer: nn.Module, precision: str, dropout: float, autocast_adapter_dtype: bool, seed: int):
    x_dtype, _, autocast = PRECISIONS[precision]
    g = torch.Generator().manual_seed(1 + seed)
    x, dy = torch.randn(ROWS, 64, generator=g).to(x_dtype), torch.randn(ROWS, 48, generator=g).to(x_dtype)
    ours, theirs = (adapted(lib, layer, dropout, autocast_adapter_dtype).train() for lib in (peftfast, peft))
    mask = mask_of(seed, dropout) if dropout else None
    if mask is not None:
        theirs.base_model.model.m.lora_dropout["default"] = FixedMask(mask)
    found, expected = run(ours, x, dy, autocast, seed), run(theirs, x, dy, autocast)
    factors = [theirs.base_model.model.m.lora_A["default"].weight, theirs.base_model.model.m.lora_B["default"].weight]
    return found, expected, exact_result(layer, x, *factors, SCALE, dy, mask)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("size, dropout", [("small", 0.0), ("large", 0.0), ("large", 0.25)])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("base", BASES)
def test_no_further_from_the_oracle_than_peft(base, precision, size, dropout, request):
    """Both ways that a CPU takes; the masks of the one for large inputs can be told from its seeds."""
    if size == "large":
        request.getfixturevalue("large_products")
    found, expected, exact = both(base, precision, dropout)
    for o, t in zip(found, expected, strict=True):
        assert o.dtype == t.dtype and o.shape == t.shape
    assert_no_further(found, expected, exact)


@pytest.mark.parametrize("base", ["nf4", "fp4-nested-32", "int8"])
def test_factors_in_the_compute_dtype(base):
    """autocast_adapter_dtype=False: PEFT keeps factors in the layer's compute dtype (int8: in fp32)."""
    found, expected, exact = both(base, "bf16", 0.0, autocast_adapter_dtype=False)
    assert found.da.dtype == expected.da.dtype == (torch.float32 if base == "int8" else torch.bfloat16)
    assert_no_further(found, expected, exact)


def test_base_without_adapter_is_bitsandbytes_own():
    """Adapters off: bit for bit the module's output, whatever the input's dtype."""
    for base in BASES:
        layer = quantised_linear(base)
        model = peftfast.get_peft_model(One(clone(layer)), peftfast.LoraConfig(target_modules=["m"])).train()
        x = torch.randn(ROWS, 64)
        with model.disable_adapter():
            assert torch.equal(model(x), layer.train()(x)), base


def test_undecided_compute_dtype_follows_the_first_input():
    """As Linear4bit itself decides; and the first forward already takes the path of all later ones, as recomputation
    under checkpointing needs."""
    for dtype in (torch.bfloat16, torch.float32):
        layer = quantised_linear("nf4", dtype=dtype)
        layer.compute_dtype, layer.compute_type_is_set = None, False
        model = peftfast.get_peft_model(One(layer), peftfast.LoraConfig(target_modules=["m"])).train()
        x = torch.randn(ROWS, 64, dtype=dtype, requires_grad=True)
        counts = []
        for _ in range(2):
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
                model(x)
            counts.append(len(kept))
        assert layer.compute_dtype == dtype and counts[0] == counts[1]


@pytest.mark.parametrize("base", FOUR_BIT)
def test_few_tokens_meet_no_function_where_no_gradient_is_wanted(base, monkeypatch):
    """Entering one takes the host as long as decoding a small weight."""
    model, x = adapted(peftfast, quantised_linear(base)), torch.randn(ROWS, 64)
    expected = model(x)
    monkeypatch.delattr(composed._FrozenProduct, "forward")
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)  # that of the first layer's input is not
    with pytest.raises(NotImplementedError):
        model(x.requires_grad_())


@pytest.mark.slow
@pytest.mark.parametrize("base", ["nf4-nested", "fp4", "int8"])
def test_compiles_as_one_graph(base):
    """Traced without a break, forward and backward, with the results of eager execution."""
    model = adapted(peftfast, quantised_linear(base)).train()
    x, dy = torch.randn(ROWS, 64), torch.randn(ROWS, 48)
    expected = run(model, x, dy, None)
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = x.clone().requires_grad_(True)
    compiled(x).backward(dy)
    assert torch.equal(x.grad, expected.dx)
    assert torch.equal(model.m.lora_B["default"].weight.grad, expected.db)


# ---- memory ----------------------------------------------------------------------------------------------------------
def kept_bytes(model: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> int:
    """Bytes saved for the backward pass, without what lives anyway: the input, parameters, the packed weight."""
    alive = {x.untyped_storage().data_ptr()}
    for module in model.modules():
        tensors = [*module._parameters.values(), getattr(module, "state", None) and module.state.SCB]
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            tensors += [getattr(part, name, None) for name in ("absmax", "code", "offset")]
        alive |= {t.untyped_storage().data_ptr() for t in tensors if isinstance(t, Tensor)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in alive:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", autocast) if autocast else nullcontext():
            y = model(x)
    y.sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.usefixtures("large_products")
def test_saved_for_backward_is_the_input_and_m_times_r(base, dropout):
    layer = quantised_linear(base, 96, 64, torch.bfloat16)
    rows = 512
    x = torch.randn(rows, 64, dtype=torch.bfloat16, requires_grad=True)
    config = {"r": RANK, "target_modules": ["m"], "init_lora_weights": False, "lora_dropout": dropout}
    ours = peftfast.get_peft_model(One(clone(layer)), peftfast.LoraConfig(**config)).train()
    theirs = peft.get_peft_model(One(clone(layer)), peft.LoraConfig(**config)).train()
    ours(x), theirs(x)
    bound = rows * RANK * 4 + 8  # t in fp32, and dropout's seed
    assert 0 < kept_bytes(ours, x) <= bound < kept_bytes(theirs, x)
    assert 0 < kept_bytes(ours, x, torch.bfloat16) <= rows * RANK * 2 + 8 + (RANK * 64 + 96 * RANK) * 2


@pytest.mark.parametrize("base", FOUR_BIT)
def test_packed_weight_is_decoded_once_per_pass(base, monkeypatch):
    from peftfast_kernels import decode

    module_of = {"nf4": "nf4", "fp4": "fp4"}[BASES[base][0]]
    calls = []
    decoder = decode.DECODERS[module_of]
    counted = decoder._replace(stored=lambda w: calls.append(1) or decoder.stored(w))
    monkeypatch.setitem(decode.DECODERS, module_of, counted)
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda *a, **k: pytest.fail("decoded by the module"))
    model = adapted(peftfast, quantised_linear(base)).train()
    y = model(torch.randn(ROWS, 64, requires_grad=True))
    assert len(calls) == 1
    y.sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("base", FOUR_BIT)
def test_transforms(base, large, monkeypatch):
    """Of functorch, and forward-mode differentiation: what they give of the same adapter over the dense weight."""
    if large:
        monkeypatch.setattr(composed, "SMALL", {})
    layer = quantised_linear(base)
    plain = nn.Linear(64, 48)
    with torch.no_grad():
        plain.weight.copy_(dense(layer))
        plain.bias.copy_(layer.bias)
    generator = torch.Generator().manual_seed(4)
    x, dx = torch.randn(2, ROWS, 64, generator=generator)
    found = []
    for model in (adapted(peftfast, layer), adapted(peftfast, plain)):
        own = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        many = {n: torch.stack((p, 2 * p)) for n, p in own.items()}

        def loss(factors, row, model=model):
            return functional_call(model, factors, (row,)).pow(2).sum()

        gradients = vmap(grad(loss), in_dims=(None, 0))(own, x)
        found.append([
            *(gradients[name] for name in sorted(gradients)),
            vmap(lambda factors, model=model: functional_call(model, factors, (x,)))(many),
            *jvp(model, (x,), (dx,)),
        ])  # fmt: skip
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
