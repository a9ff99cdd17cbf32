"""Quantising dense models in place, LoftQ, and preparing for training."""

from __future__ import annotations

import sys
import warnings
import weakref

import pytest
import torch
from oracle import One, descend, gpt2, llama, llama_classifier, t5
from processes import run
from torch import nn

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

from quantized.support import IDS, assert_same_bytes, bnb_weight, logits, quantised_linear, stored_bytes  # noqa: E402

import peftfast  # noqa: E402
from peftfast.base.weight import QUANTIZERS  # noqa: E402
from peftfast.errors import PeftWarning  # noqa: E402


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def kinds(model: nn.Module) -> set[type]:
    return {type(m) for m in model.modules() if isinstance(m, nn.Linear)}


# ---- quantising ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"double_quant": True}], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_is_what_transformers_loads(kind, dtype, options, tmp_path):
    """Same modules, same bytes, same flags, and a file that transformers reloads."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    llama(hidden=64).to(dtype).save_pretrained(tmp_path / "dense")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=bool(options),
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=settings, dtype=dtype)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    peftfast.quantize_model(ours, kind, **options)
    for name, module in theirs.named_modules():
        mine = ours.get_submodule(name)
        assert type(mine) is type(module), name
        if isinstance(module, bnb.nn.Linear4bit):
            assert_same_bytes(stored_bytes(module), stored_bytes(mine))
            assert mine.compute_dtype == module.compute_dtype
    assert torch.equal(logits(ours), logits(theirs))
    for flag in ("is_loaded_in_4bit", "is_quantized", "quantization_method"):
        assert getattr(ours, flag) == getattr(theirs, flag)
    ours.save_pretrained(tmp_path / "quantised")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "quantised")), logits(ours))


def test_int8_is_saved_and_no_further_than_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dense = llama(hidden=64)
    dense.save_pretrained(tmp_path / "dense")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32
    )
    ours = llama(hidden=64)
    peftfast.quantize_model(ours, "int8")
    for name, module in dense.named_modules():
        assert type(ours.get_submodule(name)) is type(theirs.get_submodule(name))
        if isinstance(module, nn.Linear) and name != "lm_head":
            mine, other = (bnb_weight(m.get_submodule(name)) for m in (ours, theirs))
            assert distance(mine, module.weight) <= 1.01 * distance(other, module.weight)
    assert ours.is_loaded_in_8bit and distance(logits(ours), logits(dense)) < 0.05
    ours.save_pretrained(tmp_path / "quantised")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "quantised")), logits(ours))


def test_report_gives_every_layers_error():
    dense, model = llama(hidden=64), llama(hidden=64)
    report = peftfast.quantize_model(model, "nf4", blocksize=128)
    linears = [n for n, m in dense.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert list(report) == linears and model.quantization_report is report
    for name, error in report.items():
        exact = distance(bnb_weight(model.get_submodule(name)), dense.get_submodule(name).weight)
        assert error == pytest.approx(exact, rel=1e-5) and 0.05 < error < 0.15
    lines = str(report).splitlines()
    assert len(lines) == len(linears) + 1 and lines[0].startswith(linears[0]) and lines[0].endswith("%")


@pytest.mark.parametrize("adapted", [False, True])
def test_one_dense_layer_goes_before_the_next_one_is_packed(adapted, monkeypatch):
    """So that a model has to fit into memory once."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    weights = [weakref.ref(layer.weight) for layer in model]
    if adapted:
        model = peftfast.get_peft_model(model, peftfast.LoraConfig(target_modules=["0", "1", "2"]))
    module, left = QUANTIZERS["nf4"].module, []

    def packed(*args, **options):
        left.append(sum(weight() is not None for weight in weights))
        return module(*args, **options)

    monkeypatch.setitem(QUANTIZERS, "nf4", QUANTIZERS["nf4"]._replace(module=packed))
    peftfast.quantize_model(model, "nf4")
    assert left == [3, 3, 2, 1]  # the first time, for a trial


def test_what_stays_dense():
    tied = llama(tied=True, hidden=64)
    peftfast.quantize_model(tied, "nf4")
    assert type(tied.lm_head) is nn.Linear and tied.lm_head.weight is tied.model.embed_tokens.weight
    classifier = llama_classifier()
    peftfast.quantize_model(classifier, "nf4")
    assert type(classifier.score) is nn.Linear
    chosen = llama(hidden=64)
    report = peftfast.quantize_model(chosen, "nf4", skip=["q_proj", "model.layers.1.mlp.up_proj"])
    assert "lm_head" in report  # the list replaces the default
    assert not any(n.endswith("q_proj") for n in report) and "model.layers.0.mlp.up_proj" in report
    assert type(chosen.model.layers[1].mlp.up_proj) is nn.Linear
    saved = peftfast.get_peft_model(llama(hidden=64), peftfast.LoraConfig(modules_to_save=["up_proj"]))
    assert not any("up_proj" in n for n in peftfast.quantize_model(saved, "nf4"))


def test_what_transformers_keeps_in_fp32_stays_dense(tmp_path):
    """T5 casts the input of its `wo` to the dtype of the weight, which would be bytes."""
    from transformers import AutoModelForSeq2SeqLM, BitsAndBytesConfig

    t5().save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32)
    ours = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float32)
    peftfast.quantize_model(ours, "nf4")
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    ids = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}
    patched = peftfast.patch(t5(), peftfast.LoraConfig(target_modules=["wi", "wo"]), quantize="nf4")
    with torch.no_grad():
        assert torch.equal(ours(**ids).logits, theirs(**ids).logits)
        assert torch.isfinite(patched(**ids).logits).all()
    named = llama(hidden=64)  # of which nobody reads a weight
    named._keep_in_fp32_modules = ["up_proj"]
    report = peftfast.quantize_model(named, "nf4")
    assert report and not any("up_proj" in n for n in report)


class Reads(nn.Module):
    """As MobileBERT's head, which joins the weights of two layers, WavLM's attention, and SigLIP 2's patches."""

    def __init__(self):
        super().__init__()
        self.read, self.asked, self.called = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x @ self.read.weight.t(), x])
        return self.called(self.asked(x.to(self.asked.weight.dtype)))


class Asks(Reads):
    config = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if hasattr(self.config, "_is_quantized") else self.asked(x)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_has_its_weight_read_stays_dense(kind):
    model, x = nn.Sequential(Reads()), torch.randn(3, 64)
    dense = model(x)
    report = peftfast.quantize_model(model, kind)
    assert list(report) == ["0.called"] and distance(model(x), dense) < 0.2
    assert list(peftfast.quantize_model(nn.Sequential(Asks()), kind)) == ["0.asked", "0.called"]


def test_transposed_linears():
    """transformers' Conv1D is quantised as the linear layer that it is."""
    dense, model = gpt2(64), gpt2(64)
    report = peftfast.quantize_model(model, "nf4")
    name = "transformer.h.0.attn.c_attn"
    assert name in report and type(model.get_submodule(name)) is bnb.nn.Linear4bit
    assert distance(bnb_weight(model.get_submodule(name)).t(), dense.get_submodule(name).weight) < 0.12
    assert distance(logits(model), logits(dense)) < 0.5
    patched = peftfast.patch(gpt2(64), peftfast.LoraConfig(target_modules=["c_attn"]), quantize="nf4")
    assert torch.equal(logits(patched), logits(model))
    merged = patched.merge_and_unload(dequantize=True, originals=dense)
    assert distance(logits(merged), logits(dense)) < 1e-6


@pytest.mark.parametrize("by", ["transformers", "peftfast"])
def test_transposed_linears_are_themselves_again(by, tmp_path):
    """Their dense weights lie as in the model's files, in those that LoftQ reads and in those that are written."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    gpt2(64).save_pretrained(tmp_path / "dense")
    if by == "transformers":
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=settings)
    else:
        peftfast.quantize_model(model := gpt2(64), "nf4")
    # c_attn is no square, whose shape would tell, c_proj is one
    model = peftfast.get_peft_model(model, peftfast.LoraConfig(target_modules=["c_attn", "attn.c_proj"]))
    errors = peftfast.replace_lora_weights_loftq(model, tmp_path / "dense")
    assert len(errors) == 4 and all(after < before < 0.12 for before, after in errors.values())
    before = logits(model)
    merged = model.merge_and_unload(dequantize=True)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert distance(logits(again), before) < 1e-5


@pytest.mark.parametrize("kinds", [(None, "nf4"), ("int8", None), ("nf4", "int8")], ids=str)
def test_transposed_linears_are_the_same_base_however_they_are_stored(kinds, tmp_path):
    bases = [gpt2(64), gpt2(64)]
    for base, kind in zip(bases, kinds, strict=True):
        if kind is not None:
            peftfast.quantize_model(base, kind)
    peftfast.get_peft_model(bases[0], peftfast.LoraConfig(target_modules=["c_attn"])).save_pretrained(tmp_path)
    peftfast.PeftModel.from_pretrained(bases[1], tmp_path, strict=True)


REFUSALS = [
    ({"quantize": "nf5"}, ValueError, "Unknown quantisation 'nf5'; one of 'nf4', 'fp4', 'int8'"),
    ({"skip": ["q_pro"]}, ValueError, "no linear layer is named 'q_pro'.* Did you mean"),
    ({"skip": "q_proj"}, TypeError, "must be a list"),
    ({"double_quantise": True}, TypeError, "options are compute_dtype, double_quant, blocksize, quant_storage"),
    ({"blocksize": 48}, ValueError, "invalid blocksize 48"),
    ({"blocksize": 64.0}, TypeError, "blocksize must be an integer"),
    ({"compute_dtype": "bf16"}, TypeError, "compute_dtype must be a floating-point torch.dtype or its name.*'bf16'"),
    ({"compute_dtype": torch.int8}, ValueError, "compute_dtype must be a floating-point"),
    ({"double_quant": "yes"}, TypeError, "double_quant must be True or False"),
    ({"quantize": "int8", "double_quant": True}, TypeError, "Its options are threshold"),
    ({"quantize": "int8", "threshold": "6"}, TypeError, "threshold must be a finite number"),
]


@pytest.mark.parametrize("arguments, error, message", REFUSALS, ids=[str(a) for a, _, _ in REFUSALS])
def test_refusals_change_nothing(arguments, error, message):
    model = llama(hidden=64)
    with pytest.raises(error, match=message):
        peftfast.quantize_model(model, **{"quantize": "nf4", **arguments})
    assert kinds(model) == {nn.Linear} and not hasattr(model, "is_loaded_in_4bit")


def test_options_as_files_have_them():
    model = llama(hidden=64)
    peftfast.quantize_model(model, compute_dtype="bfloat16", double_quant=1, quant_storage="int32")
    layer = model.model.layers[0].mlp.up_proj
    assert layer.compute_dtype is torch.bfloat16 and layer.weight.dtype is torch.int32
    assert layer.weight.compress_statistics is True and model.config.quantization_config.bnb_4bit_use_double_quant
    model(input_ids=torch.ones(1, 4, dtype=torch.int64))


def test_hooked_and_merged_layers_are_refused():
    model = llama(hidden=64)
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match="'model.layers.1.mlp.up_proj'.*before"):
        peftfast.quantize_model(model, "nf4")
    assert kinds(model) == {nn.Linear}
    model = peftfast.get_peft_model(llama(hidden=64), peftfast.LoraConfig(init_lora_weights=False))
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge first"):
        peftfast.quantize_model(model, "nf4")
    quantised = llama(hidden=64)
    peftfast.quantize_model(quantised, "nf4", skip=[])
    with pytest.raises(ValueError, match="no dense linear layer left"):
        peftfast.quantize_model(quantised, "nf4")
    with pytest.raises(ValueError, match="itself a linear layer .*quantised one"):
        peftfast.quantize_model(nn.Linear(64, 64), "nf4")
    with pytest.raises(ValueError, match="itself a linear layer .*dense one"):
        peftfast.dequantize_model(quantised.model.layers[0].mlp.up_proj)


def test_missing_bitsandbytes_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for kind in ("nf4", "int8"):
        model = llama(hidden=64)
        with pytest.raises(ImportError, match=rf"quantize='{kind}' needs bitsandbytes: pip install 'peftfast\[bnb\]'"):
            peftfast.patch(model, peftfast.LoraConfig(), quantize=kind)
        assert kinds(model) == {nn.Linear}


def test_dense_models_do_not_import_bitsandbytes():
    code = (
        "import sys, torch, peftfast\n"
        "m = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "m = peftfast.get_peft_model(m, peftfast.LoraConfig(target_modules=['0']))\n"
        "m(torch.randn(2, 4)).sum().backward(); m.merge_adapter()\n"
        "assert 'bitsandbytes' not in sys.modules and 'triton' not in sys.modules"
    )
    run(["-c", code])


# ---- patch -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_patch_quantises_and_trains(kind):
    model = peftfast.patch(llama(hidden=64), peftfast.LoraConfig(target_modules="all-linear"), quantize=kind)
    assert set(model.quantization_report) == set(model.base_model.inventory.layers)
    plain = llama(hidden=64)
    peftfast.quantize_model(plain, kind)
    assert torch.equal(logits(model), logits(plain))
    losses = descend(model, input_ids=IDS)
    assert losses[-1] < losses[0] - 0.1


def test_patch_says_once_what_it_says_of_a_config():
    config = peftfast.LoraConfig(target_modules=["q_proj", "nothing"])
    with pytest.warns(peftfast.PeftWarning) as caught:
        peftfast.patch(llama(hidden=64), config, quantize="nf4")
    assert sum("nothing" in str(w.message) for w in caught) == 1


def test_patch_refuses_before_it_quantises():
    model = llama(hidden=64)
    for config, error in (
        (peftfast.LoraConfig(target_modules=["nothing"]), ValueError),
        (peftfast.LoraConfig(target_modules=["up_proj"], init_lora_weights="orthogonal", r=4), None),
    ):
        if error is not None:
            with pytest.raises(error):
                peftfast.patch(model, config, quantize="nf4")
            assert kinds(model) == {nn.Linear} and config.target_modules == {"nothing"}
        else:
            peftfast.patch(model, config, quantize="nf4")
    model, config = llama(hidden=64), peftfast.LoraConfig(target_modules=["up_proj"])
    config.r = 0
    with pytest.raises(ValueError, match="r must be"):
        peftfast.patch(model, config, quantize="nf4")
    assert kinds(model) == {nn.Linear}
    with pytest.raises(ValueError, match="quantize='nf4'"):
        peftfast.patch(llama(hidden=64), peftfast.LoraConfig(), quantize_options={"double_quant": True})


@pytest.mark.parametrize("skip", [None, ["down_proj"]])
def test_patch_leaves_weights_dense_that_are_adapted_as_parameters(skip):
    """As "all-linear" makes of AFMoE's router, beside its fused experts."""
    config = peftfast.LoraConfig(target_modules=["v_proj"], target_parameters=["q_proj.weight"])
    model = peftfast.patch(llama(hidden=64), config, quantize="nf4", quantize_options={"skip": skip})
    dense = {n.rpartition(".")[2] for n, m in model.get_base_model().named_modules() if type(m) is nn.Linear}
    assert "q_proj" not in {n.rpartition(".")[2] for n in model.quantization_report}
    assert bnb.nn.Linear4bit in kinds(model) and ("down_proj" in dense) == (skip is not None)
    losses = descend(model, input_ids=IDS)
    assert losses[-1] < losses[0] - 0.1


def test_patch_passes_options_on():
    options = {
        "double_quant": True,
        "blocksize": 128,
        "compute_dtype": torch.bfloat16,
        "skip": ["down_proj", "lm_head"],
    }
    model = peftfast.patch(llama(hidden=64), peftfast.LoraConfig(), quantize="fp4", quantize_options=options)
    layer = model.base_model.inventory.layers["model.layers.0.self_attn.q_proj"].base_layer
    state = layer.weight.quant_state
    assert (state.quant_type, state.blocksize, state.nested, layer.compute_dtype) == ("fp4", 128, True, torch.bfloat16)
    assert type(model.get_base_model().model.layers[0].mlp.down_proj) is nn.Linear


# ---- LoftQ -----------------------------------------------------------------------------------------------------------
def _loftq(iterations: int, bits: int = 4, **changes):
    return peftfast.LoraConfig(
        r=8, lora_alpha=changes.pop("lora_alpha", 8), target_modules="all-linear", init_lora_weights="loftq",
        loftq_config=peftfast.LoftQConfig(loftq_bits=bits, loftq_iter=iterations), **changes,
    )  # fmt: skip


def _held(model: nn.Module, name: str) -> torch.Tensor:
    layer = model.base_model.inventory.layers[name]
    return (layer.site.weight.dense(torch.float32) + layer.get_delta_weight("default")).detach()


@pytest.mark.parametrize("bits, iterations", [(4, 1), (4, 3), (8, 1)])
def test_loftq_is_pefts(bits, iterations, monkeypatch):
    """PEFT computes LoftQ on a GPU only; here its "cuda" is the CPU."""
    from peft.utils import loftq_utils

    weight = llama(hidden=64).model.layers[0].mlp.up_proj.weight.detach()

    def on_cpu(original):
        def to(self, *args, **kwargs):
            args = ["cpu" if a == "cuda" else a for a in args]
            return original(self, *args, **{k: "cpu" if v == "cuda" else v for k, v in kwargs.items()})

        return to

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "to", on_cpu(torch.Tensor.to))
        patched.setattr(bnb.nn.Params4bit, "to", on_cpu(bnb.nn.Params4bit.to))
        stored, a, b = loftq_utils.loftq_init(weight, bits, 8, iterations)
    model = peftfast.get_peft_model(llama(hidden=64), _loftq(iterations, bits))
    layer = model.base_model.inventory.layers["model.layers.0.mlp.up_proj"]
    mine = [layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    if bits == 4:
        torch.testing.assert_close(mine[0].detach(), stored, rtol=0, atol=1e-6)
        torch.testing.assert_close((mine[2] @ mine[1]).detach(), b @ a, rtol=0, atol=1e-5)
    # PEFT rounds to fp16 before int8, where the nearest code may be another one, in either direction
    assert distance(_held(model, "model.layers.0.mlp.up_proj"), weight) <= 1.01 * distance(stored + b @ a, weight)


def test_more_iterations_lose_less():
    """And all lose less than quantising alone."""
    dense = llama(hidden=64)
    plain = peftfast.quantize_model(llama(hidden=64), "nf4")
    means = []
    for iterations in (1, 2, 5):
        model = peftfast.get_peft_model(llama(hidden=64), _loftq(iterations))
        errors = {n: distance(_held(model, n), dense.get_submodule(n).weight) for n in plain}
        assert all(errors[n] < plain[n] for n in plain)
        means.append(sum(errors.values()) / len(errors))
    assert means == sorted(means, reverse=True)


@pytest.mark.parametrize("lora_alpha", [8, 24])
def test_patch_with_loftq(lora_alpha):
    """The base ends up quantised, the factors make up for it whatever the scaling is."""
    dense = llama(hidden=64)
    config = _loftq(3, lora_alpha=lora_alpha)
    model = peftfast.patch(llama(hidden=64), config, quantize="nf4")
    assert bnb.nn.Linear4bit in kinds(model)
    plain = peftfast.quantize_model(llama(hidden=64), "nf4")
    for name in plain:
        assert distance(_held(model, name), dense.get_submodule(name).weight) < 0.9 * plain[name]


def test_loftq_on_a_quantised_base_says_so_and_replaces_later(tmp_path):
    dense = llama(hidden=64)
    dense.save_pretrained(tmp_path)
    base = llama(hidden=64)
    peftfast.quantize_model(base, "nf4")
    start = logits(base)
    with pytest.warns(PeftWarning, match="needs the weights before quantisation.*replace_lora_weights_loftq") as said:
        model = peftfast.get_peft_model(base, _loftq(1, lora_alpha=16))
    assert len({str(w.message) for w in said}) == 1  # for all modules, so that Python shows it once
    assert torch.equal(logits(model), start)
    errors = peftfast.replace_lora_weights_loftq(model, tmp_path)
    assert len(errors) == 14 and all(after < 0.95 * before for before, after in errors.values())
    for name, (_, after) in errors.items():
        assert after == pytest.approx(distance(_held(model, name), dense.get_submodule(name).weight), rel=1e-4)
    assert distance(logits(model), logits(dense)) < distance(start, logits(dense))
    again = peftfast.replace_lora_weights_loftq(model, dense.state_dict(), iterations=3)
    assert sum(after for _, after in again.values()) < sum(after for _, after in errors.values())


def test_replace_asks_the_callback(tmp_path):
    dense = llama(hidden=64)
    model = peftfast.patch(
        llama(hidden=64),
        peftfast.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False),
        quantize="nf4",
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    asked = []

    def callback(given, name):
        assert given is model
        asked.append(name)
        return name.endswith("q_proj")

    for options, error in (
        ({"iterations": -1}, ValueError),
        ({"iterations": 1.5}, TypeError),
        ({"callback": 3}, TypeError),
    ):
        with pytest.raises(error, match=f"{[*options][0]}.*got {[*options.values()][0]}"):
            peftfast.replace_lora_weights_loftq(model, dense, **options)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    for iterations in (0, 2):
        peftfast.replace_lora_weights_loftq(model, dense, callback=callback, iterations=iterations)
    assert sorted(set(asked)) == [f"model.layers.{i}.self_attn.{p}" for i in (0, 1) for p in ("k_proj", "q_proj")]
    for name, parameter in model.named_parameters():
        if "k_proj" in name:
            assert torch.equal(parameter, before[name]), name
        elif "q_proj.lora_" in name:
            assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("iterations", [0, 2])
def test_replace_refuses_before_it_changes_anything(iterations):
    dense = llama(hidden=64)
    config = peftfast.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    model = peftfast.patch(llama(hidden=64), config, quantize="nf4")
    before = {n: t.detach().clone() for n, t in model.state_dict().items()}
    weights, last = dense.state_dict(), "model.layers.1.self_attn.k_proj.weight"
    lacking = {n: t for n, t in weights.items() if n != last}
    cut = {**weights, last: weights[last][:8]}
    with pytest.raises(KeyError, match=last):
        peftfast.replace_lora_weights_loftq(model, lacking, iterations=iterations)
    with pytest.raises(ValueError, match=r"layers\.1.*k_proj: the original weight has shape \[8, 64\]"):
        peftfast.replace_lora_weights_loftq(model, cut, iterations=iterations)
    model.merge_adapter()
    with pytest.raises(ValueError, match="Adapters are merged into .*q_proj.*; unmerge first"):
        peftfast.replace_lora_weights_loftq(model, dense, iterations=iterations)
    model.unmerge_adapter()
    after = model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[n], t) for n, t in before.items())


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
def test_zeros_are_stored_without_an_error(quantize):
    model = nn.ModuleDict({"zero": nn.Linear(64, 64), "usual": nn.Linear(64, 64)})
    nn.init.zeros_(model["zero"].weight)
    report = peftfast.quantize_model(model, quantize)
    assert report["zero"] == 0.0 < report["usual"] < 0.2
    model = peftfast.get_peft_model(model, peftfast.LoraConfig(target_modules=["zero"]))
    errors = peftfast.replace_lora_weights_loftq(model, {"zero.weight": torch.zeros(64, 64)})
    assert errors == {"zero": (0.0, 0.0)}


def test_replace_refusals():
    with pytest.raises(ValueError, match="No LoRA layer with adapter 'default' on a quantised weight"):
        peftfast.replace_lora_weights_loftq(peftfast.get_peft_model(llama(), peftfast.LoraConfig()))
    model = peftfast.patch(llama(hidden=64), peftfast.LoraConfig(), quantize="nf4")
    with pytest.raises(ValueError, match="does not say where it was loaded from"):
        peftfast.replace_lora_weights_loftq(model)
    with pytest.raises(KeyError, match="q_proj.weight"):
        peftfast.replace_lora_weights_loftq(model, {})
    with pytest.raises(ValueError, match="loftq_bits=2"):
        peftfast.get_peft_model(llama(hidden=64), _loftq(1, bits=2))


# ---- other initialisations -------------------------------------------------------------------------------------------
def test_pissa_on_quantised_is_refused_as_in_peft():
    for base in ("nf4", "int8", "nf4-stored-as-bf16"):
        for library in (peftfast, peft) if base == "nf4" else (peftfast,):
            with pytest.raises(TypeError, match="Please initialize PiSSA under float32, float16, or bfloat16"):
                library.get_peft_model(
                    One(quantised_linear(base)), library.LoraConfig(target_modules=["m"], init_lora_weights="pissa")
                )


def test_where_one_of_the_layers_is_packed_pissa_leaves_the_others_as_they_were(tmp_path):
    def dense():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))

    config = {"r": 4, "target_modules": ["0", "1"], "init_lora_weights": "pissa"}
    peftfast.get_peft_model(dense(), peftfast.LoraConfig(**config)).save_pretrained(tmp_path)
    base = dense()
    base[1] = quantised_linear("nf4", 64, 64)
    before = base[0].weight.clone()
    for begin in (
        lambda: peftfast.get_peft_model(base, peftfast.LoraConfig(**config)),
        lambda: peftfast.PeftModel.from_pretrained(base, tmp_path),
    ):
        with pytest.raises(TypeError, match="1: Please initialize PiSSA under float32, float16, or bfloat16"):
            begin()
        assert type(base[0]) is nn.Linear and torch.equal(base[0].weight, before)


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_olora_requantises(base):
    module = quantised_linear(base)
    exact, x = bnb_weight(module), torch.randn(8, 64)
    y = (x @ exact.t() + module.bias).detach()
    model = peftfast.get_peft_model(
        One(module), peftfast.LoraConfig(r=4, lora_alpha=4, target_modules=["m"], init_lora_weights="olora")
    )
    assert not torch.equal(bnb_weight(module), exact)
    assert distance(model(x), y) < 0.2


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_patch_initialises_on_the_dense_weight(init):
    dense = llama(hidden=64)
    config = peftfast.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=init)
    model = peftfast.patch(llama(hidden=64), config, quantize="nf4")
    plain = peftfast.quantize_model(llama(hidden=64), "nf4")
    losses = {n: distance(_held(model, n), dense.get_submodule(n).weight) for n in plain}
    assert sum(losses.values()) < (1.0 if init == "pissa" else 2.0) * sum(plain.values())


@pytest.mark.filterwarnings("ignore::peftfast.errors.PeftWarning")
def test_embeddings_in_4_bits():
    holder = One(nn.Embedding(40, 64))
    dense = holder.m.weight.detach().clone()
    holder.m = bnb.nn.EmbeddingNF4(40, 64)
    holder.m.load_state_dict({"weight": dense})
    holder.m.to("cpu")
    model = peftfast.get_peft_model(holder, peftfast.LoraConfig(r=4, target_modules=["m"], init_lora_weights=False))
    ids, before = torch.arange(12).reshape(2, 6), stored_bytes_of_embedding(holder)
    y = model(ids).detach()
    error = model.merge_adapter()["m"]
    assert 0 < error < 0.15 and distance(model(ids), y) < 0.15
    model.unmerge_adapter()
    assert torch.equal(model(ids), y) and torch.equal(stored_bytes_of_embedding(holder), before)


def stored_bytes_of_embedding(holder: nn.Module) -> torch.Tensor:
    base = getattr(holder.m, "base_layer", holder.m)
    return base.weight.data.reshape(-1).clone()


# ---- preparing -------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kwargs", [{}, {"use_gradient_checkpointing": False},
                                    {"gradient_checkpointing_kwargs": {"use_reentrant": False}}], ids=str)  # fmt: skip
def test_prepare_does_what_pefts_does_but_for_the_upcast(kwargs, capsys):
    models = []
    for prepare in (peftfast.prepare_model_for_kbit_training, peft.prepare_model_for_kbit_training):
        model = llama(hidden=64).to(torch.bfloat16)
        peftfast.quantize_model(model, "nf4", quant_storage=torch.bfloat16)
        dtypes = {n: p.dtype for n, p in model.named_parameters()}
        assert prepare(model, **kwargs) is model
        models.append(model)
    ours, theirs = models
    assert {n: p.dtype for n, p in ours.named_parameters()} == dtypes
    assert not any(p.requires_grad for p in ours.parameters())
    assert ours.is_gradient_checkpointing == theirs.is_gradient_checkpointing
    assert logits(ours).dtype == torch.bfloat16
    requires = [m.model.embed_tokens(IDS).requires_grad for m in models]
    assert requires[0] == requires[1]
    half = sum(p.numel() for n, p in ours.named_parameters() if "proj" not in n)
    assert f"saves {half * 2 / 2**20:.1f} MiB of weights" in capsys.readouterr().out
    upcast = llama(hidden=64).to(torch.bfloat16)
    peftfast.quantize_model(upcast, "nf4", quant_storage=torch.bfloat16)
    peftfast.prepare_model_for_kbit_training(upcast, upcast=True, **kwargs)
    assert {n: p.dtype for n, p in upcast.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}


@pytest.mark.parametrize("tool", ["gptq", "aqlm", "eetq", "hqq", "torchao", "bitsandbytes", None])
def test_prepare_upcasts_what_peft_does_of_any_tools_models(tool):
    found = []
    for library, options in ((peftfast, {"upcast": True}), (peft, {})):
        model = llama().to(torch.bfloat16)
        model.quantization_method = tool
        library.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False, **options)
        found.append({n: p.dtype for n, p in model.named_parameters()})
    assert found[0] == found[1]


def test_prepare_leaves_dense_models_without_checkpointing(capsys):
    model = peftfast.prepare_model_for_kbit_training(llama())
    assert not model.is_gradient_checkpointing and not any(p.requires_grad for p in model.parameters())
    assert ": found no half-precision parameters; gradient" in capsys.readouterr().out


def test_prepared_model_trains_with_checkpointing():
    """Same gradients with and without, in both forms of checkpointing."""
    gradients = []
    for kwargs in (
        {"use_gradient_checkpointing": False},
        {},
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ):
        model = llama(hidden=64)
        peftfast.quantize_model(model, "nf4")
        peftfast.prepare_model_for_kbit_training(model, **kwargs)
        torch.manual_seed(0)
        model = peftfast.get_peft_model(model, peftfast.LoraConfig(init_lora_weights=False)).train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert torch.equal(other[name], gradient), name


@pytest.mark.filterwarnings("error::FutureWarning")
def test_checkpointing_is_switched_on_by_the_name_that_is_not_deprecated():
    model = llama(hidden=64)
    peftfast.quantize_model(model, "nf4")
    peftfast.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert model.model._gradient_checkpointing_func.keywords == {"use_reentrant": False}


def test_a_method_of_the_old_name_that_somebody_wrote_is_called():
    model = llama(hidden=64)
    peftfast.quantize_model(model, "nf4")
    calls = []
    model.gradient_checkpointing_enable = lambda: calls.append("called")
    peftfast.prepare_model_for_kbit_training(model)
    assert calls == ["called"]
    with pytest.raises(TypeError, match="takes no arguments"):
        peftfast.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})


# ---- modules trained in full -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_packed_module_is_trained_in_full_as_a_dense_copy(kind, tmp_path):
    """Saved and loaded as such, on a packed base and on a dense one; and what is merged loads in transformers."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    def base() -> nn.Module:
        model = llama(hidden=64)
        peftfast.quantize_model(model, kind)
        return model.eval()

    config = peftfast.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["k_proj", "mlp"])
    model = peftfast.get_peft_model(base(), config)
    assert distance(logits(model), logits(base())) < 0.05  # int8 rounds what comes in as well
    copies = [p for n, p in model.named_parameters() if "modules_to_save" in n]
    assert len(copies) == 8
    optimizer = torch.optim.SGD(copies, lr=1.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.requires_grad and p.grad.any() for p in copies)
    optimizer.step()
    trained = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved["base_model.model.model.layers.0.self_attn.k_proj.weight"].dtype == torch.float32
    assert torch.equal(logits(peftfast.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()), trained)
    ours, theirs = (
        library.PeftModel.from_pretrained(llama(hidden=64), tmp_path / "adapter").eval() for library in (peftfast, peft)
    )
    torch.testing.assert_close(logits(ours), logits(theirs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rounding
        merged = model.merge_and_unload()
    expected = logits(merged)
    merged.save_pretrained(tmp_path / "merged")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert kinds(served) == kinds(merged)
    torch.testing.assert_close(logits(served), expected)
