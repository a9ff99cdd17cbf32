"""Modules that derive from torch's and compute something else than their weight and their kind say: embeddings that are
more than a table are no targets, linear layers and convolutions are not merged into. Recurrent layers' Parameters.
Transposed convolutions."""

from __future__ import annotations

import copy
import functools

import oracle
import pytest
import torch
from torch import Tensor, nn

import peftfast
from peftfast import LoraConfig


class Positions(nn.Embedding):
    """As OPT and BART have them: rows by place, whatever the input is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.arange(x.shape[-1]).expand_as(x) + 2)


class Normed(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(x), dim=-1)


class Other(nn.Embedding):
    def forward(self, x: Tensor, past: int) -> Tensor:
        return super().forward(x + past)


class Scaled(nn.Embedding):
    embed_scale = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale


class Model(nn.Module):
    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table, self.head = table, nn.Linear(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


@pytest.mark.parametrize(("kind", "why"), [(Positions, "gives something else"), (Normed, "gives"), (Other, "raises")])
@pytest.mark.parametrize("config", [{"target_modules": ["table", "head"]}, {"target_modules": ["head", "table"]}])
def test_more_than_a_table_is_refused_before_anything_changes(kind, why, config):
    model = Model(kind(20, 16).train())
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(TypeError, match=f"table: {kind.__name__} derives from torch.nn.Embedding.* {why}"):
        peftfast.get_peft_model(model, LoraConfig(**config))
    assert [name for name, _ in model.named_modules()] == before and model.table.training


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
def test_a_table_merges_into_what_it_computes(kind):
    torch.manual_seed(0)
    model = peftfast.get_peft_model(Model(kind(20, 16)), LoraConfig(target_modules=["table"], init_lora_weights=False))
    ids = torch.arange(20).view(2, 10)
    y = model(ids)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.allclose(merged(ids), y, atol=1e-5)


@pytest.mark.parametrize("rows", [None, ["default", "__base__"]], ids=["alone", "mixed"])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["table"], init_lora_weights=False),
        peftfast.TrainableTokensConfig(target_modules=["table"], token_indices=[3, 5]),
    ],
    ids=["lora", "tokens"],
)
def test_a_table_with_sparse_gradients_trains_as_any(config, rows):
    gradients = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = peftfast.get_peft_model(Model(nn.Embedding(20, 16, sparse=sparse)), copy.deepcopy(config))
        model(torch.arange(20).view(2, 10), **({"adapter_names": rows} if rows else {})).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *gradients))


def test_a_module_saved_in_full_may_be_anything():
    model = peftfast.get_peft_model(
        Model(Positions(20, 16)), LoraConfig(target_modules=["head"], modules_to_save=["table"])
    )
    model(torch.zeros(2, 5, dtype=torch.int64)).sum().backward()
    assert model.base_model.model.table.modules_to_save["default"].weight.grad[2:7].any()


def test_what_a_tuned_model_changed_of_one_is_kept_whole():
    torch.manual_seed(0)
    base = Model(Positions(20, 16))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.table.weight.add_(1.0)
        tuned.head.weight.add_(torch.randn(8, 1) @ torch.randn(1, 16))
    config, tensors = peftfast.extract_lora(base, tuned, rank=2)
    assert config.modules_to_save == ["table"]
    model = peftfast.get_peft_model(copy.deepcopy(base), config)
    peftfast.set_peft_model_state_dict(model, tensors)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    assert torch.allclose(model(ids), tuned(ids), atol=1e-4)


class Ternary(nn.Linear):
    """As 1.58-bit models train: the weight is rounded in every forward."""

    def forward(self, x: Tensor) -> Tensor:
        step = self.weight.abs().mean()
        return nn.functional.linear(x, (self.weight / step).round().clamp(-1, 1) * step, self.bias)


class Standardised(nn.Conv2d):
    """As BiT has them."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.flatten(1)
        w = (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)
        return self._conv_forward(x, w.view_as(self.weight), self.bias)


class Same(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias


class Two(nn.Module):
    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x)


def two(first: nn.Module, **changes) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["first", "second"], **changes)
    return oracle.randomised(peftfast.get_peft_model(Two(first), config), 1.0, only="lora_B")


MADE = {
    "linear": (lambda: Ternary(16, 8), (3, 16)),
    "convolution": (lambda: Standardised(4, 8, 3, padding=1), (2, 4, 6, 6)),
}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload", "layer"])
def test_what_merging_would_change_is_not_merged_into(made, changes, call):
    make, shape = MADE[made]
    model = two(make(), **changes).train()
    x, weight = torch.randn(shape), model.base_model.model.second.weight.clone()
    y = model(x)
    with pytest.raises(RuntimeError, match="computes something else than the product with its weight.*default merged"):
        (model.base_model.model.second.merge if call == "layer" else getattr(model, call))()
    assert torch.equal(model(x), y) and torch.equal(model.base_model.model.second.weight, weight)
    assert not any(layer.merged for layer in model.base_model.inventory.layers.values())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_class_that_another_library_makes_of_a_layer_merges_in_its_own_way(call):
    model, x = two(Ternary(16, 8)), torch.randn(3, 16)
    layer = model.base_model.model.second
    base = layer.weight.clone()

    class Rounded(type(layer)):
        """As NVIDIA's ModelOpt makes them: what is rounded is the weight with the adapter inside."""

        def forward(self, x: Tensor) -> Tensor:
            step = self.step
            weight = self.weight if self.merged else self.weight + self.get_delta_weight("default")
            return nn.functional.linear(x, (weight / step).round() * step, self.base_layer.bias)

        def merge(self, *args, **kwargs) -> None:
            super().merge(*args, **kwargs)
            self.get_base_layer().forward = functools.partial(Rounded.forward, self)

    layer.__class__, layer.step = Rounded, 0.25
    y = model(x)
    merged = getattr(model, call)() or model
    assert torch.allclose(merged(x), y)
    if call == "merge_adapter":
        model.unmerge_adapter()
        assert torch.equal(model(x), y) and torch.equal(layer.weight, base)


def test_a_forward_of_one_s_own_that_is_the_product_is_merged_into():
    model, x = two(Same(16, 8), lora_dropout=0.5), torch.randn(3, 16)
    y = model.eval()(x)
    model.train().merge_adapter()
    assert torch.allclose(model.eval()(x), y, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(x), y)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 6, 2)

    def forward(self, x):
        return self.lstm(x)[0]


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_weights_of_an_lstm_are_merged_into(bias):
    """Its `bias` says whether it has any."""
    base, x = Recurrent().eval(), torch.randn(4, 2, 8)
    names = ["lstm.weight_ih_l0", "lstm.weight_hh_l1"]
    config = peftfast.LoraConfig(r=2, target_parameters=names, init_lora_weights=False, bias=bias)
    model = peftfast.get_peft_model(copy.deepcopy(base), config).eval()
    adapted = model(x)
    assert (adapted - base(x)).abs().max() > 1e-3
    model.merge_adapter()
    torch.testing.assert_close(model(x), adapted)
    model.unmerge_adapter()
    assert torch.equal(model(x), adapted)
    torch.testing.assert_close(model.merge_and_unload()(x), adapted)


# ---- transposed convolutions, which PEFT has no adapters of ----------------------------------------------------------
TRANSPOSED = {
    1: (nn.ConvTranspose1d, {"kernel_size": 4, "stride": 2, "padding": 1}, nn.functional.conv_transpose1d),
    2: (
        nn.ConvTranspose2d,
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
        nn.functional.conv_transpose2d,
    ),
    3: (nn.ConvTranspose3d, {"kernel_size": 2, "stride": 3, "dilation": 2}, nn.functional.conv_transpose3d),
}


class Upsampler(nn.Module):
    def __init__(self, dims: int = 2, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind, options, _ = TRANSPOSED[dims]
        self.wide, self.narrow = kind(4, 6, **options), kind(6, 3, **options)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(torch.relu(self.wide(x)))


def upsampler(dims: int = 2, dtype: torch.dtype = torch.float32, config=None, **options) -> nn.Module:
    config = config or LoraConfig(r=2, lora_alpha=6, target_modules=["wide", "narrow"], **options)
    with pytest.warns(peftfast.PeftWarning, match="PEFT has no adapters of ConvTranspose.*('wide', 'narrow')"):
        model = peftfast.get_peft_model(Upsampler(dims, dtype), config).eval()
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if p.requires_grad:
                drawn = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
                p.copy_(drawn + 1 if "ia3" in name or "magnitude" in name else drawn)
    return model


def changed_weight(layer: nn.Module) -> Tensor:
    """The weight with the adapter inside, in fp64 and with its graph."""
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double().flatten(1)
    w = layer.base_layer.weight.double() + layer.scaling["default"] * torch.einsum("rc...,nr->cn...", a, b)
    if layer.use_dora.get("default"):
        norm = torch.linalg.vector_norm(w.detach().transpose(0, 1).flatten(1), dim=1)
        g = layer.lora_magnitude_vector["default"].weight.double().flatten() / norm
        w = w * g.view(-1, *[1] * (w.dim() - 2))
    return w


def in_fp64(layer: nn.Module, x: Tensor) -> Tensor:
    m, function = layer.base_layer, TRANSPOSED[x.dim() - 2][2]
    how = m.stride, m.padding, m.output_padding, 1, m.dilation
    return function(x.double(), changed_weight(layer), m.bias.double(), *how)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("dims", TRANSPOSED)
def test_a_transposed_convolution_is_adapted_as_its_changed_weight_says(dims, options, tmp_path):
    model = upsampler(dims, **options)
    layer, x = model.base_model.model.wide, torch.randn(2, 4, *[5] * dims)
    factors = [p for p in layer.parameters() if p.requires_grad]
    given, found = torch.randn_like(layer(x)), layer(x)
    assert oracle.rms_error(found, in_fp64(layer, x)) < 3e-7
    gradients = torch.autograd.grad(found, factors, given)
    for mine, exact in zip(gradients, torch.autograd.grad(in_fp64(layer, x), factors, given.double()), strict=True):
        assert oracle.rms_error(mine, exact.double()) < 2e-6
    before, y = layer.base_layer.weight.detach().clone(), model(x)
    model.save_pretrained(tmp_path)
    with pytest.warns(peftfast.PeftWarning, match="will not load this one"):
        loaded = peftfast.PeftModel.from_pretrained(Upsampler(dims), tmp_path, strict=True).eval()
    assert torch.equal(loaded(x), y)
    change = layer.get_delta_weight("default")
    assert oracle.rms_error(change, changed_weight(layer) - before) < 1e-6
    model.merge_adapter(safe_merge=True)
    assert oracle.rms_error(layer.base_layer.weight, changed_weight(loaded.base_model.model.wide)) < 3e-7
    oracle.close(model(x), y)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)
    oracle.close(model.merge_and_unload()(x), y)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_transposed_convolution_of_half_precision_is_rounded_once(rounding):
    model = upsampler(dtype=torch.bfloat16)
    layer = model.base_model.model.wide
    before, exact = layer.base_layer.weight.clone(), changed_weight(layer)
    model.merge_adapter(rounding=rounding)
    off = (layer.base_layer.weight.double() - exact).abs() / exact.abs()
    assert off.max() <= 2**-8 * (1 if rounding == "nearest" else 2)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize(
    "config",
    [
        peftfast.IA3Config(target_modules=["wide", "narrow"], feedforward_modules=["narrow"]),
        peftfast.AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["wide", "narrow"]),
        LoraConfig(r=2, target_modules=["wide", "narrow"], init_lora_weights="pissa"),
    ],
    ids=["ia3", "adalora", "pissa"],
)
def test_other_methods_merge_into_transposed_convolutions_what_they_compute(config):
    model, x = upsampler(config=config), torch.randn(2, 4, 5, 5)
    y = model(x)
    with model.disable_adapter():
        assert not torch.allclose(model(x), y)
    model.merge_adapter()
    oracle.close(model(x), y)


def test_rows_of_a_batch_have_adapters_of_their_own_in_transposed_convolutions():
    model, x = upsampler(), torch.randn(3, 4, 5, 5)
    with pytest.warns(peftfast.PeftWarning, match="will not load"):
        model.add_adapter("b", LoraConfig(r=3, target_modules=["wide"], init_lora_weights=False))
    mixed = model(x, adapter_names=["default", "b", "__base__"])
    oracle.close(mixed[:1], model(x)[:1])
    model.set_adapter("b")
    alone, called = model(x), []
    oracle.close(mixed[1:2], alone[1:2])
    oracle.close(mixed[2:], Upsampler()(x)[2:])
    model.base_model.model.wide.lora_A["b"].register_forward_hook(lambda *_: called.append(1))
    oracle.close(model(x), alone)
    assert called
    with pytest.raises(TypeError, match="ConvTranspose2d takes no output_size.*output_padding"):
        model.base_model.model.wide(x, output_size=[9, 9])
    with pytest.raises(ValueError, match="0: ConvTranspose1d with groups=2 is not supported"):
        peftfast.get_peft_model(nn.Sequential(nn.ConvTranspose1d(4, 4, 2, groups=2)), LoraConfig(target_modules=["0"]))


def test_what_a_tuned_model_changed_of_a_transposed_convolution_becomes_a_lora():
    base, tuned, x = Upsampler(), Upsampler(), torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        tuned.wide.weight += torch.einsum("rchw,nr->cnhw", torch.randn(2, 4, 3, 3), torch.randn(6, 2))
    config, tensors = peftfast.extract_lora(base, tuned, rank=2)
    with pytest.warns(peftfast.PeftWarning, match="will not load"):
        model = peftfast.get_peft_model(base, config).eval()
    peftfast.set_peft_model_state_dict(model, tensors, strict=True)
    oracle.close(model(x), tuned(x))
