"""Bases in formats of other libraries: transformers' FP8, torchao, HQQ, and what only its own module can read."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from oracle import One, descend, llama, quietly
from oracle import rms_error as deviation
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

import peftfast
from peftfast import IA3Config, LoraConfig
from peftfast.base.weight import base_weight, quantizer
from peftfast.helpers import DoraCaching
from peftfast.wrapping.model_merger import ModelMerger

pytestmark = pytest.mark.filterwarnings("ignore::peftfast.errors.PeftWarning")
N, K = 48, 72  # no multiples of the blocks below


def rms_error(value: Tensor, oracle: Tensor) -> float:
    return deviation(value.detach(), oracle.detach().double())


def made(base: str) -> nn.Module:
    torch.manual_seed(0)
    return BASES[base].make()


# ---- modules ---------------------------------------------------------------------------------------------------------
def _fp8_class() -> type:
    from transformers.integrations.finegrained_fp8 import FP8Linear, _dequantize_fp8_weight

    class OnCpu(FP8Linear):
        """The module's own parameters and arithmetic, without the kernels, which a CPU has none of."""

        def forward(self, x: Tensor) -> Tensor:
            w = _dequantize_fp8_weight(self.weight, self.weight_scale_inv.float(), self.block_size, torch.float32)
            return F.linear(x, w.to(x.dtype), self.bias)

    return OnCpu


def _weight(seed: int = 0) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) / K**0.5


def _fp8(block: tuple[int, int] | None, scale_fmt: str = "float") -> nn.Module:
    module = _fp8_class()(K, N, block_size=block, scale_fmt=scale_fmt, has_bias=True)
    with torch.no_grad():
        rows, columns = block or (N, K)
        for i in range(0, N, rows):
            for j in range(0, K, columns):
                part = _weight()[i : i + rows, j : j + columns]
                step = part.abs().max() / 448
                if scale_fmt == "ue8m0":
                    step = 2.0 ** torch.ceil(torch.log2(step))
                module.weight[i : i + rows, j : j + columns] = (part / step).to(torch.float8_e4m3fn)
                if block is None:
                    module.weight_scale_inv.fill_(step)
                else:
                    module.weight_scale_inv[i // rows, j // columns] = step.to(module.weight_scale_inv.dtype)
        module.bias.copy_(torch.arange(N) / N)
    return module.requires_grad_(False)


class RowScaled(nn.Linear):
    """As `FbgemmFp8Linear` and `CompressedTensorsFP8Linear` keep it, whose products need a GPU."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(K, N)
        steps = _weight().abs().amax(1) / 448
        self.weight = nn.Parameter((_weight() / steps[:, None]).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale = nn.Parameter(steps.view(shape), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight.float() * self.weight_scale.view(N, 1)).to(x.dtype), self.bias)


def _torchao(make_config: Callable[[object], object]) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    module = nn.Linear(K, N).requires_grad_(False)
    module.weight.copy_(_weight())
    quantization.quantize_(module, make_config(quantization))
    return module


def _hqq(bits: int) -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize")
    module = nn.Linear(K, N).requires_grad_(False)
    module.weight.copy_(_weight())
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=24)
    return quantize.HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")


def _quanto(weights: str) -> nn.Module:
    quanto = pytest.importorskip("optimum.quanto")  # its types of fewer bits compile C++ for a minute
    module = nn.Linear(K, N).requires_grad_(False)
    module.weight.copy_(_weight())
    module = quanto.QLinear.from_module(module, weights=quanto.qtypes[weights])
    module.freeze()
    return module.requires_grad_(False)


class Gptq(nn.Module):
    """The shape of a GPTQ layer: packed integers, and no weight that anybody else could read."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = K, N
        self.register_buffer("qweight", (_weight().t() * 100).to(torch.int32))
        self.register_buffer("scales", torch.full((1, N), 0.01))
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight * self.scales).to(x.dtype)


class Made(NamedTuple):
    make: Callable[[], nn.Module]
    rounding: float = 0.0  # relative error of storing a weight so; 0: nothing can be stored
    readable: bool = True
    exact: bool = True  # the module multiplies by W and does nothing to its input


BASES = {
    "fp8-tensor": Made(lambda: _fp8(None), 0.04),
    "fp8-blocks": Made(lambda: _fp8((32, 16)), 0.04),
    "fp8-powers-of-two": Made(lambda: _fp8((32, 16), "ue8m0"), 0.05),
    "fp8-rows": Made(lambda: RowScaled((N, 1)), 0.04),
    "fp8-rows-lying": Made(lambda: RowScaled((1, N)), 0.04),
    "torchao-int8": Made(lambda: _torchao(lambda q: q.Int8WeightOnlyConfig()), 0.02),
    "torchao-int8-groups": Made(lambda: _torchao(lambda q: q.Int8WeightOnlyConfig(granularity=q.PerGroup(24))), 0.02),
    "torchao-int8-dynamic": Made(
        lambda: _torchao(lambda q: q.Int8DynamicActivationInt8WeightConfig()), 0.02, exact=False
    ),
    "torchao-float8": Made(lambda: _torchao(lambda q: q.Float8WeightOnlyConfig()), 0.05),
    "torchao-int4-in-8": Made(
        lambda: _torchao(lambda q: q.IntxWeightOnlyConfig(torch.int4, granularity=q.PerGroup(24))), 0.2
    ),
    "torchao-zero-points": Made(
        lambda: _torchao(lambda q: q.IntxWeightOnlyConfig(mapping_type=q.MappingType.ASYMMETRIC))
    ),
    "hqq-8": Made(lambda: _hqq(8), 0.02),
    "hqq-4": Made(lambda: _hqq(4), 0.2),
    "quanto-int8": Made(lambda: _quanto("qint8"), 0.02),
    "quanto-float8": Made(lambda: _quanto("qfloat8"), 0.04),
    "opaque": Made(Gptq, readable=False),
}
READABLE = [name for name, kind in BASES.items() if kind.readable]
WRITABLE = [name for name, kind in BASES.items() if kind.rounding]


def patched(base: str, config: object | None = None) -> nn.Module:
    config = config or LoraConfig(r=4, lora_alpha=8, target_modules=["m"], init_lora_weights=False)
    torch.manual_seed(1)
    model = peftfast.get_peft_model(One(made(base)), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3" in name:
                parameter.uniform_(0.5, 1.5)
            elif "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) / math.sqrt(parameter.shape[-1]))
    return model


def x_of(rows: int = 5) -> Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(3))


def bytes_of(module: nn.Module) -> list[Tensor]:
    """Everything the module consists of, as it is stored."""
    tensors = [*module._parameters.values(), *module._buffers.values(), *(getattr(module, "meta", None) or {}).values()]
    tensors = [part for t in tensors if isinstance(t, Tensor) for part in _parts(t)]
    return [t.detach().contiguous().reshape(-1).view(torch.uint8).clone() for t in tensors]


def _parts(tensor: Tensor) -> list[Tensor]:
    """The tensor, or those that a tensor of a library's own class consists of."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _parts(getattr(tensor, name))]


# ---- reading and training --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("base", READABLE)
def test_the_weight_is_what_the_module_multiplies_by(base):
    module = made(base)
    weight = base_weight(module)
    assert weight.shape == (N, K) and weight.quantization is not None
    bias = 0 if module.bias is None else module.bias.detach().float()
    seen = (module(torch.eye(K)) - bias).detach().t()
    limit = 1e-6 if BASES[base].exact else 0.02
    assert rms_error(weight.dense(torch.float32), seen) <= limit
    assert rms_error(weight.dense(), _weight()) < 0.2
    assert type(weight.dense()) is Tensor


TRAINING = [name for name in BASES if name != "torchao-int8-dynamic"]  # whose product has no derivative


@pytest.mark.parametrize("base", TRAINING)
def test_a_lora_trains(base):
    model, x = patched(base), x_of().requires_grad_()
    layer, plain = model.base_model.model.m, made(base)
    g = torch.randn(5, N)
    own = x.detach().clone().requires_grad_()
    out = plain(own)
    out.backward(g)
    a, b = (layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double())
    y = model(x)
    y.backward(g)
    wide = x.detach().double()
    assert rms_error(y, out.detach().double() + 2 * wide @ a.t() @ b.t()) < 1e-6
    assert rms_error(layer.lora_B["default"].weight.grad, 2 * g.double().t() @ (wide @ a.t())) < 1e-6
    assert rms_error(layer.lora_A["default"].weight.grad, 2 * (g.double() @ b).t() @ wide) < 1e-6
    assert rms_error(x.grad, own.grad.double() + 2 * g.double() @ b @ a) < 1e-6
    assert all("lora" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("base", BASES)
def test_files_and_rows(base, tmp_path):
    model, x = patched(base), x_of(4)
    model.save_pretrained(tmp_path)
    again = peftfast.PeftModel.from_pretrained(One(made(base)), tmp_path, strict=True)
    assert torch.equal(again(x), model(x))
    again.add_adapter("b", LoraConfig(r=2, target_modules=["m"], init_lora_weights=False))
    mixed = again(x, adapter_names=["default", "b", "__base__", "b"])
    alone = {}
    for name in ("default", "b"):
        again.set_adapter(name)
        alone[name] = again(x)
    with again.disable_adapter():
        alone["base"] = again(x)
    want = torch.stack([alone["default"][0], alone["b"][1], alone["base"][2], alone["b"][3]])
    limit = 1e-6 if BASES[base].exact else 0.05  # others quantise a batch by what is in it
    assert rms_error(mixed, want) <= limit


@pytest.mark.parametrize("base", ["fp8-blocks", "torchao-int8"])
def test_another_base_is_noticed(base, tmp_path):
    patched(base).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="weights of 'm' are others"):
        peftfast.PeftModel.from_pretrained(One(nn.Linear(K, N)), tmp_path)
    dense = nn.Linear(K, N)
    dense.weight.data.copy_(_weight())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peftfast.PeftModel.from_pretrained(One(dense), tmp_path)


def test_a_product_without_derivative_is_told_of():
    model = patched("torchao-int8-dynamic")
    with pytest.warns(UserWarning, match="m: this torchao weight multiplies without a derivative"):
        model(x_of().requires_grad_())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x_of())
        with torch.no_grad():
            model(x_of().requires_grad_())


@pytest.mark.parametrize("base", TRAINING)
def test_ia3_trains(base):
    model = patched(base, IA3Config(target_modules=["m"], feedforward_modules=["m"]))
    x, plain = x_of(), made(base)
    scale = model.base_model.model.m.ia3_l["default"]
    assert rms_error(model(x), plain(x * scale).detach()) < 1e-6
    model(x).sum().backward()
    assert scale.grad is not None


@pytest.mark.parametrize("base", [b for b in READABLE if BASES[b].exact])
def test_dora_is_the_paper_s(base):
    model, x = patched(base, LoraConfig(r=4, target_modules=["m"], use_dora=True)), x_of()
    layer = model.base_model.model.m
    a, b = (f["default"].weight.detach().double() for f in (layer.lora_A, layer.lora_B))
    m = layer.lora_magnitude_vector["default"].weight.detach().double()
    w = base_weight(made(base)).dense(torch.float32).double() + 2 * b @ a
    bias = made(base).bias
    want = x.double() @ (m / w.norm(dim=1))[:, None].mul(w).t() + (0 if bias is None else bias.detach().double())
    assert rms_error(model(x), want) < 2e-6


@pytest.mark.parametrize("by", ["variance", "gradient"])
@pytest.mark.parametrize("base", ["fp8-blocks", "hqq-8", "opaque"])
def test_ranks_are_found_for_them(base, by):
    cfg = LoraConfig(r=4, target_modules=["m"])
    ranks = peftfast.discover_ranks(One(made(base)), cfg, [x_of(40)], by=by, loss_fn=lambda y: y.square().mean(),
                                    forward_fn=lambda model, x: model(x))  # fmt: skip
    assert ranks == {"m": 4}


def test_all_linear_finds_them():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.norm = Gptq(), _fp8((32, 16)), nn.LayerNorm(N)

    model = peftfast.get_peft_model(Block(), LoraConfig(target_modules="all-linear"))
    assert sorted(model.base_model.inventory.layers) == ["one", "two"]


# ---- quantised in place, with the adapters that are there ------------------------------------------------------------
def quantised_in_place(model: nn.Module, library: str, only_the_base: bool = True) -> nn.Module:
    wanted = "base_layer" if only_the_base else ""
    if library == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        linear = lambda m, name: isinstance(m, nn.Linear) and name.endswith(wanted)  # noqa: E731
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=linear)
    else:
        quanto = pytest.importorskip("optimum.quanto")
        quanto.quantize(model, weights=quanto.qint8, include=f"*{wanted}")
        model(x_of())  # not frozen yet: the weight is a dense one still
        quanto.freeze(model)
    return model


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("library", ["torchao", "quanto"])
def test_a_base_that_is_quantised_after_adapters_were_added(library, dora):
    """What merging changed was lost in quanto's weights, without a word; the rest failed."""
    module, x = nn.Linear(K, N), x_of()
    module.weight.data.copy_(_weight())
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["m"], init_lora_weights=False, use_dora=dora)
    model = peftfast.get_peft_model(One(module), config)
    before = model(x)
    quantised_in_place(model, library)
    y = model(x)
    assert 0 < rms_error(y, before) < 0.02
    layer = model.base_model.model.m
    kept, exact = bytes_of(layer.base_layer), layer.site.weight.dense(torch.float32) + layer.get_delta_weight("default")
    model.merge_adapter()
    assert rms_error(layer.site.weight.dense(torch.float32), exact) < 0.02 and layer.merge_error > 0
    model.unmerge_adapter()
    assert torch.equal(model(x), y) and all(map(torch.equal, bytes_of(layer.base_layer), kept))


@pytest.mark.parametrize("case", ["lora", "dora", "two", "rows"])
def test_factors_that_torchao_has_quantised(case):
    """Of these, only linear layers' products are known, which PEFT makes do with."""
    peft = pytest.importorskip("peft")

    def run(library):
        torch.manual_seed(0)
        config = library.LoraConfig(r=8, target_modules=["m"], init_lora_weights=False, use_dora=case == "dora")
        model = library.get_peft_model(One(nn.Linear(K, N)), config)
        model.add_adapter("b", config)
        if case == "two":
            model.base_model.set_adapter(["default", "b"])
        names = {"adapter_names": ["default", "b", "__base__", "b", "b"]} if case == "rows" else {}
        model.eval()(x_of(), **names)
        return quantised_in_place(model, "torchao", only_the_base=False)(x_of(), **names)

    assert rms_error(run(peftfast), run(peft)) < 1e-5


def test_a_weight_that_is_quantised_with_adapters_inside_is_not_unmerged():
    model = peftfast.get_peft_model(One(nn.Linear(K, N)), LoraConfig(target_modules=["m"], init_lora_weights=False))
    model.merge_adapter()
    quantised_in_place(model, "torchao")
    kept = bytes_of(model.base_model.model.m.base_layer)
    with pytest.raises(RuntimeError, match="m: the weight was quantised with adapters .'default'. inside"):
        model.unmerge_adapter()
    assert all(map(torch.equal, bytes_of(model.base_model.model.m.base_layer), kept))


# ---- merging ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("base", WRITABLE)
def test_merging_rounds_once_and_goes_back(base):
    model, x = patched(base), x_of()
    layer = model.base_model.model.m
    y, before = model(x).detach(), bytes_of(layer.base_layer)
    exact = layer.site.weight.dense(torch.float32) + layer.get_delta_weight("default")
    for _ in range(3):
        model.merge_adapter()
        stored = layer.site.weight.dense(torch.float32)
        error = rms_error(stored, exact)
        assert 0 < error <= BASES[base].rounding
        assert float(layer.merge_error) == pytest.approx(error, rel=0.05)
        assert rms_error(model(x), y) <= 3 * BASES[base].rounding
        model.unmerge_adapter()
        after = bytes_of(layer.base_layer)
        assert len(after) == len(before) and all(map(torch.equal, before, after))
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("base", [*WRITABLE, "nf4", "int8"])
def test_norms_that_are_kept_are_those_of_the_weight_with_others_inside(base):
    """`DoraCaching`'s, beside a LoRA that is merged and taken out."""
    module = made(base) if base in BASES else quantizer(base).module(_weight(), None)
    model = peftfast.get_peft_model(
        One(module), LoraConfig(r=4, target_modules=["m"], init_lora_weights=False, use_dora=True)
    )
    model.add_adapter("lora", LoraConfig(r=4, target_modules=["m"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "lora"])
    model.eval()
    x = torch.randn(3, K)
    with torch.no_grad(), DoraCaching():
        for change in (lambda: None, lambda: model.merge_adapter(["lora"]), model.unmerge_adapter):
            change()
            with DoraCaching(False):
                expected = model(x)
            assert torch.equal(model(x), expected)


@pytest.mark.parametrize("base", READABLE)
def test_merging_into_dense_weights(base):
    model, x = patched(base), x_of()
    y = model(x).detach()
    merged = model.merge_and_unload(dequantize=True)
    assert type(merged.m) is nn.Linear
    assert rms_error(merged(x), y) <= (2e-6 if BASES[base].exact else 0.03)


@pytest.mark.parametrize("base", ["fp8-blocks", "fp8-powers-of-two", "torchao-int8", "torchao-float8"])
def test_storing_again_what_is_stored_is_no_worse_than_rounding_it(base):
    weight = base_weight(made(base))
    weight.assign(_weight())
    stored = weight.dense(torch.float32)
    assert rms_error(stored, _weight()) <= BASES[base].rounding
    weight.assign(torch.zeros(N, K))
    assert not weight.dense().any()
    weight.assign(stored)
    assert torch.equal(weight.dense(torch.float32), stored) or rms_error(weight.dense(), stored) < 0.01


@pytest.mark.parametrize("keep", [True, False, "host"])
@pytest.mark.parametrize("base", ["torchao-zero-points", "torchao-int8"])
def test_what_cannot_be_written_is_refused_and_unchanged(base, keep):
    model, x = patched(base), x_of()
    if base == "torchao-int8":  # as SmoothQuant leaves it, which multiplies the input as well
        model.base_model.model.m.base_layer.weight.act_pre_scale = torch.full((K,), 0.5)
    y = model(x)
    with pytest.raises(NotImplementedError, match="nothing can be merged into torchao's .*dequantize=True"):
        model.base_model.merge_adapter(keep=keep) if keep is not True else model.merge_adapter()
    assert torch.equal(model(x), y) and not model.base_model.model.m.merged


# ---- formats that nobody else reads ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"use_dora": True}, NotImplementedError, "m: the weight of a .*Gptq is known to the module alone"),
        ({"init_lora_weights": "olora"}, NotImplementedError, "m: the weight of a .*Gptq is known to the module alone"),
        ({"init_lora_weights": "pissa"}, TypeError, "Gptq is stored as a format of its own. Quantise after"),
    ],
    ids=["dora", "olora", "pissa"],
)
def test_what_needs_the_weight_is_refused_before_anything_changes(config, error, message):
    base = One(Gptq())
    module = base.m
    with pytest.raises(error, match=message):
        peftfast.get_peft_model(base, LoraConfig(target_modules=["m"], **config))
    assert base.m is module


def test_an_opaque_weight_is_not_merged_into():
    model, x = patched("opaque"), x_of()
    y = model(x)
    for call in (ModelMerger(model.base_model.inventory).check, model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="known to the module alone"):
            call()
        assert torch.equal(model(x), y)
    with pytest.raises(ValueError, match="format that only their modules read; pass `originals`"):
        model.merge_and_unload(dequantize=True)
    assert torch.equal(model(x), y)
    assert model.unload().m(x).shape == (5, N)


class Coded(Tensor):
    """A library's own tensor: what is done to it is done to a dequantised copy."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Coded:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, op, types, args, kwargs=None):
        if op.overloadpacket is torch.ops.aten.detach:
            return cls(args[0].codes, args[0].scale)
        args, kwargs = tree_map(lambda t: t.codes * t.scale if isinstance(t, cls) else t, (args, kwargs or {}))
        return op(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_keeps_nothing_that_is_written_to_it_is_not_merged_into(dtype):
    base = One(nn.Linear(K, N, dtype=dtype).requires_grad_(False))
    base.m.weight = nn.Parameter(
        Coded((_weight() * 50).round().to(dtype), torch.tensor(0.02, dtype=dtype)), requires_grad=False
    )
    model = peftfast.get_peft_model(base, LoraConfig(target_modules=["m"], init_lora_weights=False))
    x = x_of().to(dtype)
    y = model(x)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="a weight of type Coded keeps nothing of what is written to it"):
            call()
        assert torch.equal(model(x), y) and not model.base_model.model.m.merged


def test_a_model_that_its_first_forward_makes_dense():
    """As compressed-tensors keeps float8: a hook of the model takes whatever has a `quantization_scheme` apart."""

    def first_forward(model, args):
        for module in model.modules():
            if getattr(module, "quantization_scheme", None) is not None:
                dense = module._parameters.pop("weight").float() * module._parameters.pop("weight_scale")
                module.weight = nn.Parameter(dense, requires_grad=False)
        model.ct_decompress_hook.remove()

    base = One(nn.Linear(K, N).requires_grad_(False))
    scale = _weight().abs().amax(1, keepdim=True) / 448
    base.m.weight = nn.Parameter((_weight() / scale).to(torch.float8_e4m3fn), requires_grad=False)
    base.m.weight_scale = nn.Parameter(scale, requires_grad=False)
    base.m.quantization_scheme = "channel"
    base.ct_decompress_hook = base.register_forward_pre_hook(first_forward)
    dense = base.m.weight.float() * scale
    model = peftfast.get_peft_model(base, LoraConfig(target_modules=["m"], init_lora_weights=False))
    x, layer = x_of(), model.base_model.model.m
    changed = dense + layer.get_delta_weight("default")
    torch.testing.assert_close(model(x), F.linear(x, changed, layer.base_layer.bias))
    model.merge_adapter()
    torch.testing.assert_close(layer.weight, changed)


def test_a_module_of_one_s_own_is_no_linear_layer():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = K, N
            self.weight = nn.Parameter(torch.zeros(N, K))

    with pytest.raises(ValueError, match="not supported"):
        peftfast.get_peft_model(One(Own()), LoraConfig(target_modules=["m"]))


def test_scales_that_do_not_fit_are_named():
    module = RowScaled((N, 1))
    module.weight_scale = nn.Parameter(torch.ones(7), requires_grad=False)
    model = peftfast.get_peft_model(One(module), LoraConfig(target_modules=["m"]))
    with pytest.raises(ValueError, match=r"m: the scales of its float8 weight \[48, 72\] have shape \[7\]"):
        model.merge_adapter()


def test_an_embedding_in_float8():
    from transformers.integrations.finegrained_fp8 import FP8Embedding

    module = FP8Embedding(50, 16)
    with torch.no_grad():
        table = torch.randn(50, 16)
        module.weight_scale.fill_(table.abs().max() / 448)
        module.weight.copy_((table / module.weight_scale).to(torch.float8_e4m3fn))
    ids = torch.arange(50)
    model = peftfast.get_peft_model(One(module), LoraConfig(target_modules=["m"], init_lora_weights=False))
    y = model(ids)
    assert rms_error(y, module(ids)) > 0.1
    model.merge_adapter()
    assert rms_error(model(ids), y) < 0.05
    model.unmerge_adapter()
    assert torch.equal(model(ids), y)


# ---- a whole model ---------------------------------------------------------------------------------------------------
def test_a_llama_by_torchao_trains_and_merges():
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = llama()
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda m, name: isinstance(m, nn.Linear) and "head" not in name,
    )
    before = copy.deepcopy(model)
    model = peftfast.get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.randint(0, 32, (2, 12))
    losses = descend(model, 8, input_ids=ids)
    assert losses[-1] < 0.9 * losses[0]
    tuned = model.eval()(input_ids=ids).logits.detach()
    moved = rms_error(before.eval()(input_ids=ids).logits.detach(), tuned)
    merged = quietly(model.merge_and_unload)
    assert rms_error(merged(input_ids=ids).logits, tuned) < 0.2 * moved


def test_a_base_is_compared_whatever_the_default_device_is(tmp_path):
    model = patched("fp8-blocks")
    model.save_pretrained(tmp_path)
    base = One(made("fp8-blocks"))
    with torch.device("meta"):
        again = peftfast.PeftModel.from_pretrained(base, tmp_path, strict=True)
    assert torch.equal(again(x_of()), model(x_of()))
