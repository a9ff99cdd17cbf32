"""The storage formats: reading, writing, keeping and putting back, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from oracle import One, Operations
from torch import nn

bnb = pytest.importorskip("bitsandbytes")

from quantized.support import BASES, FOUR_BIT, assert_same_bytes, bnb_weight, quantised_linear, stored_bytes  # noqa: E402

import peftfast  # noqa: E402
from peftfast.base.bnb4 import Bnb4Weight  # noqa: E402
from peftfast.base.int8 import Int8Weight  # noqa: E402
from peftfast.base.weight import base_weight, quantizer  # noqa: E402
from peftfast.watch import Watch  # noqa: E402
from peftfast_kernels import dequantize  # noqa: E402


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_what_bitsandbytes_reads(base, dtype):
    module = quantised_linear(base, 40, 96, dtype)
    weight = base_weight(module)
    assert type(weight) is (Int8Weight if "int8" in base else Bnb4Weight)
    assert weight.shape == (40, 96) and weight.quantization == BASES[base][0]
    assert torch.equal(weight.dense(), bnb_weight(module))
    operand = weight.operand(torch.zeros(1, 96, dtype=dtype), None)
    assert (operand is None) == ("int8" in base)  # whose outliers only the module itself multiplies
    if operand is not None:
        assert torch.equal(dequantize(operand, dtype), bnb_weight(module))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after a forward"])
def test_snapshot_restores_every_byte(base, used):
    module = quantised_linear(base)
    if used:  # int8 moves its scales then
        module(torch.randn(3, 64))
    weight, before = base_weight(module), stored_bytes(module)
    parameter, pointer = module.weight, module.weight.data_ptr()
    kept = weight.snapshot()
    weight.assign(torch.randn(48, 64, generator=torch.Generator().manual_seed(1)))
    changed = dict(stored_bytes(module))
    assert not torch.equal(changed["weight"], dict(before)["weight"])
    weight.restore(kept)
    assert_same_bytes(before, stored_bytes(module))
    assert module.weight is parameter and module.weight.data_ptr() == pointer


@pytest.mark.parametrize("base", FOUR_BIT)
def test_assign_is_quantising_afresh(base):
    """Bytes and scales are those of bitsandbytes' own quantisation of the same weight."""
    module = quantised_linear(base)
    target = torch.randn(48, 64, generator=torch.Generator().manual_seed(5))
    kind, options = BASES[base]
    fresh = quantizer(kind).module(target, module.bias, **options)
    base_weight(module).assign(target)
    assert_same_bytes(stored_bytes(fresh), stored_bytes(module))
    assert type(module.weight) is bnb.nn.Params4bit and module.quant_state is module.weight.quant_state


def test_int8_codes_are_nearest():
    """No code is further from the weight than half a step of its row, and fp16's range is no limit."""
    module = quantised_linear("int8")
    target = torch.randn(48, 64) * 1e5
    target[3] = 0.0
    base_weight(module).assign(target)
    step = target.abs().amax(1, keepdim=True) / 127
    assert ((base_weight(module).dense() - target).abs() <= 0.5001 * step).all()
    by_bnb = bnb.functional.int8_vectorwise_dequant(*bnb.functional.int8_vectorwise_quant((target / 1e4).half())[:2])
    assert (base_weight(module).dense() - target).norm() <= 1.01 * (by_bnb * 1e4 - target).nan_to_num().norm()


def test_int8_is_decoded_and_quantised_in_one_place_each():
    """On a CPU every further tensor of a large weight's size takes longer than what is computed in it."""
    weight = base_weight(quantised_linear("int8"))
    whole = tuple(weight.shape)
    with Operations() as made:
        exact = weight.dense(torch.float32)
    assert made.shapes.count(whole) == 1, made.shapes
    with Operations() as made:
        weight.assign(exact)
    assert made.shapes.count(whole) == 2, made.shapes  # and the codes


@pytest.mark.parametrize("base", BASES)
def test_the_module_computes_with_what_was_assigned(base):
    module = quantised_linear(base).train()
    x = torch.randn(5, 64)
    module(x)
    base_weight(module).assign(torch.randn(48, 64))
    expected = x @ bnb_weight(module).t() + module.bias
    assert (module(x) - expected).norm() <= 1e-5 * expected.norm()


def test_state_is_found_on_the_module_when_the_parameter_lost_it():
    """As FSDP leaves it: a plain Parameter in the storage dtype, the state on the module only."""
    module = quantised_linear("nf4-stored-as-bf16")
    expected = bnb_weight(module)
    module.weight = nn.Parameter(module.weight.data.clone(), requires_grad=False)
    weight = base_weight(module)
    assert type(weight) is Bnb4Weight
    assert torch.equal(weight.dense(), expected)
    before, kept = weight.dense(), weight.snapshot()
    weight.assign(expected * 2)
    weight.restore(kept)
    assert torch.equal(weight.dense(), before)


def test_transposed_views_of_packed_bytes():
    """Old code keeps the packed column as a row."""
    module = quantised_linear("nf4", 24, 64)
    expected = bnb_weight(module)
    module.weight.data = module.weight.data.t()
    weight = base_weight(module)
    assert module.weight.shape[0] == 1
    assert torch.equal(weight.dense(), expected)
    assert torch.equal(dequantize(weight.readable()._replace(dtype=torch.float32), torch.float32), expected)


@pytest.mark.filterwarnings("ignore:matmul_4bit:DeprecationWarning")
def test_weights_quantised_in_transposed_orientation():
    source = torch.randn(64, 24)  # [K, N]
    packed, state = bnb.functional.quantize_4bit(source, quant_type="nf4")
    module = quantised_linear("nf4", 24, 64)
    module.weight = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
    module.quant_state = state
    weight = base_weight(module)
    expected = bnb.functional.dequantize_4bit(packed, state).t()
    assert torch.equal(weight.dense(), expected) and weight.operand(torch.zeros(1, weight.shape[1]), None) is None
    config = peftfast.LoraConfig(r=4, target_modules=["m"], init_lora_weights=False)
    model = peftfast.get_peft_model(One(module), config)
    x, before = torch.randn(3, 64), stored_bytes(module)
    merged = weight.dense() + model.m.get_delta_weight("default")
    error = model.merge_adapter()["m"]
    assert (weight.dense() - merged).norm() / merged.norm() == pytest.approx(error, rel=1e-4) and error < 0.15
    assert (model(x) - (x @ weight.dense().t() + module.bias)).norm() < 1e-4
    model.unmerge_adapter()
    assert_same_bytes(before, stored_bytes(module))


@pytest.mark.parametrize("base", ["nf4", "nf4-nested", "fp4"])
def test_cpu_inference_packing_is_undone(base):
    """bitsandbytes repacks weights for AVX512-BF16 CPUs when a model is evaluated, and rounds the scales to bf16."""
    module = quantised_linear(base, 64, 64)
    expected = bnb_weight(module)
    pack = bnb.functional._convert_weight_packed_for_cpu
    weight = base_weight(module)
    module.support_avx512bf16_for_cpu = True
    assert torch.equal(weight.dense(), expected)
    assert not module.support_avx512bf16_for_cpu  # it stays as it is from here on
    module.weight.data, module.weight.quant_state = pack(module.weight.data, module.weight.quant_state)
    found = weight.dense(torch.float32)
    assert (found - expected).norm() <= 2**-7 * expected.norm()
    x = torch.randn(3, 64)
    assert (module(x) - (x @ found.t() + module.bias)).norm() <= 1e-5 * module(x).norm()


# ---- refusals --------------------------------------------------------------------------------------------------------
def _lose(module):
    module.weight.quant_state = module.quant_state = None


def _wrong_scales(module):
    module.weight.quant_state.absmax = module.weight.quant_state.absmax[:-1]


def _wrong_shape(module):
    module.weight.quant_state.shape = torch.Size([48, 32])


def _wrong_bytes(module):
    module.weight.data = module.weight.data[:-8]


def _cast_bytes(module):
    module.weight.data = module.weight.data.flatten().view(torch.float32).bfloat16()


def _wrong_blocksize(module):
    module.weight.quant_state.blocksize = 128


def _no_offset(module):
    module.weight.quant_state.offset = None


def _wrong_outer_scales(module):
    module.weight.quant_state.state2.absmax = torch.ones(7)


def _lose_scales(module):
    module.weight.SCB = module.state.SCB = None


def _wrong_rows(module):
    module.weight.SCB = module.weight.SCB[:-1]


DAMAGE = [
    ("nf4", _lose, "quant_state of the 4-bit weight is missing"),
    ("nf4", _wrong_scales, "47 scales"),
    ("nf4", _wrong_shape, r"shape \(48, 32\), the module is \[48, 64\]"),
    ("fp4", _wrong_bytes, "is 1536 bytes, the weight holds 1528"),
    ("nf4", _cast_bytes, "is 1536 bytes, the weight holds 768; they were cast to torch.bfloat16, as FSDP2"),
    ("nf4", _wrong_blocksize, "48 scales, blocks of 128 make 24"),
    ("nf4-nested", _no_offset, "offset"),
    ("nf4-nested", _wrong_outer_scales, "7 outer scales, 48 scales make 1"),
    ("int8", _lose_scales, r"SCB\) of the 8-bit weight are missing"),
    ("int8", _wrong_rows, "48 rows, but 47 scales"),
]


@pytest.mark.parametrize("base, damage, message", DAMAGE, ids=[f"{b}{d.__name__}" for b, d, _ in DAMAGE])
def test_damaged_state_is_refused_with_the_modules_name(base, damage, message):
    model = nn.ModuleDict({"block": One(quantised_linear(base)), "other": One(quantised_linear(base))})
    damage(model["block"].m)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=rf"^block\.m: .*{message}"):
        peftfast.inject_adapter_in_model(peftfast.LoraConfig(target_modules=["m"]), model)
    assert [name for name, _ in model.named_modules()] == before


def test_state_lost_after_injection_is_refused_with_the_modules_name():
    model = peftfast.get_peft_model(One(quantised_linear("nf4")), peftfast.LoraConfig(target_modules=["m"]))
    _lose(model.m.base_layer)
    for use in (lambda: model(torch.randn(2, 64)), model.merge_adapter):
        with pytest.raises(ValueError, match=r"^m: the quant_state of the 4-bit weight is missing"):
            use()


def test_unquantised_modules_are_refused():
    for module in (bnb.nn.Linear4bit(64, 48), bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)):
        with pytest.raises(ValueError, match=r"^m: .*has not been quantised yet.*model\.to\(device\)"):
            peftfast.get_peft_model(One(module), peftfast.LoraConfig(target_modules=["m"]))
        module.to("cpu")
        peftfast.get_peft_model(One(module), peftfast.LoraConfig(target_modules=["m"]))(torch.randn(2, 64))


def test_a_weight_that_is_quantised_anew_in_every_forward_is_dense():
    model = One(bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=True))
    model = peftfast.get_peft_model(model, peftfast.LoraConfig(target_modules=["m"], init_lora_weights=False))
    layer, before = model.base_model.model.m, model.base_model.model.m.weight.detach().clone()
    assert model.get_layer_status()[0].quantization_backend is None
    model.merge_adapter()
    torch.testing.assert_close(layer.weight.detach(), before + layer.get_delta_weight("default").detach())


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_offloaded_weights_are_not_changed_in_passing(base):
    """While accelerate keeps a weight elsewhere, its place is empty: a merge would be lost."""
    model = One(quantised_linear(base))
    model.m.weight = nn.Parameter(torch.empty_like(model.m.weight.data, device="meta"), requires_grad=False)
    model = peftfast.get_peft_model(model, peftfast.LoraConfig(target_modules=["m"]))
    with pytest.raises(ValueError, match="^m: .*offloaded"):
        model.merge_adapter()
    assert not model.m.merged


@pytest.mark.parametrize("base", BASES)
def test_mixed_precision_leaves_packed_weights_as_they_are(base):
    """PEFT's casts the bytes; and makes fp32 of all that trains, as here."""
    config = peftfast.LoraConfig(r=4, target_modules=["m"])
    model = peftfast.get_peft_model(One(quantised_linear(base)), config)
    model.m.lora_A.double()
    packed = model.m.base_layer.weight.detach().clone()
    with pytest.raises(TypeError, match="dtype must be .*'fp16'"):
        peftfast.cast_mixed_precision_params(model, "fp16")
    peftfast.cast_mixed_precision_params(model, "float16")
    assert model.m.base_layer.weight.dtype is packed.dtype and torch.equal(model.m.base_layer.weight, packed)
    assert model.m.base_layer.bias.dtype is torch.float16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


# ---- copies ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("base", ["nf4-nested", "int8"])
def test_copies_are_independent(base):
    model = peftfast.get_peft_model(
        One(quantised_linear(base)), peftfast.LoraConfig(r=4, target_modules=["m"], init_lora_weights=False)
    )
    x = torch.randn(3, 64)
    model(x)
    expected, before = model(x), stored_bytes(model.m.base_layer)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    twin.merge_adapter()
    assert_same_bytes(before, stored_bytes(model.m.base_layer))
    assert torch.equal(model(x), expected)
    twin.unmerge_adapter()
    assert torch.equal(twin(x), expected)


def test_both_states_of_a_copied_module_are_written():
    """deepcopy gives the Parameter and the module a quant_state each; FSDP later drops the Parameter's."""
    module = copy.deepcopy(quantised_linear("nf4-nested"))
    assert module.quant_state is not module.weight.quant_state
    weight = base_weight(module)
    weight.assign(torch.randn(48, 64, generator=torch.Generator().manual_seed(1)))
    expected = weight.dense()
    module.weight = nn.Parameter(module.weight.data.clone(), requires_grad=False)
    assert torch.equal(base_weight(module).dense(), expected)


def test_pickled_model_computes_the_same():
    model = peftfast.get_peft_model(
        One(quantised_linear("nf4-nested")), peftfast.LoraConfig(target_modules=["m"], init_lora_weights=False)
    )
    x = torch.randn(3, 64)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_base_keeps_its_layout_before_it_has_an_adapter(kind, monkeypatch):
    """Where bitsandbytes would repack it at its first evaluation: AVX-512, rows that are no multiple of the block."""
    from bitsandbytes.nn import modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    base = torch.nn.Sequential(torch.nn.Linear(160, 64, bias=False)).eval()
    peftfast.quantize_model(base, kind)
    packed = base[0].weight.data.clone()
    with torch.no_grad():
        base(torch.randn(3, 160))
    assert torch.equal(base[0].weight.data, packed) and not getattr(
        base[0].weight.quant_state, "packing_format_for_cpu", False
    )


@pytest.mark.parametrize("base", ["nf4", "nf4-nested"])
def test_what_a_weight_was_read_from_is_watched(base):
    """On a GPU, where layers go on with what they have read as long as nothing is replaced."""
    module = quantised_linear(base)
    weight = base_weight(module)
    read = weight.operand(torch.randn(2, 64), None)
    assert weight.lasting(read) is None  # on a CPU, bitsandbytes repacks in place
    on_gpu = read._replace(tensors=[SimpleNamespace(is_cuda=True)])

    def state():
        return module.weight.quant_state

    changes = [
        lambda: setattr(module, "compute_dtype", torch.float16),
        lambda: setattr(state(), "absmax", state().absmax.clone()),
        lambda: setattr(module.weight, "quant_state", copy.copy(state())),
        lambda: setattr(module, "quant_state", copy.copy(state())),
        lambda: setattr(module, "weight", copy.copy(module.weight)),
    ]
    if state().nested:
        changes.append(lambda: setattr(state().state2, "absmax", state().state2.absmax.clone()))
        changes.append(lambda: setattr(state(), "offset", state().offset.clone()))
    for change in changes:
        watch = Watch(weight.lasting(on_gpu))
        assert watch.holds()
        change()
        assert not watch.holds()
