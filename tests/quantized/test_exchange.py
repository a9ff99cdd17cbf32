"""Models that transformers loads in 4 and 8 bits: training, files and counts against PEFT, on the same base."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from oracle import copy_parameters, descend, llama, quietly, same_files, same_live_state
from safetensors.torch import load_file
from torch import nn

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

from quantized.support import IDS, logits  # noqa: E402

import peftfast  # noqa: E402
from peftfast.interop import kinds  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

BASES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    llama(hidden=64).save_pretrained(path)
    return path


def load(folder, base: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = dict(BASES[base])
    if "load_in_4bit" in options:
        options["bnb_4bit_compute_dtype"] = dtype
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options), dtype=dtype)


def config(library, **changes):
    return library.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM", **changes}
    )


def train(model: nn.Module, steps: int = 8, lr: float = 1e-2) -> list[float]:
    losses = descend(model.train(), steps, lr=lr, input_ids=IDS)
    model.eval()
    return losses


def assert_identical(a: torch.Tensor, b: torch.Tensor) -> None:
    """Up to the order of fp32 additions: PEFT adds the low-rank part to a finished product, here they are one sum."""
    assert (a - b).abs().max() <= 64 * torch.finfo(torch.float32).eps * b.abs().max()


def same_logits(base: str, ours: nn.Module, theirs: nn.Module) -> None:
    # 8-bit products quantise their input, where the last bit of a layer's output may decide about a whole step
    if base != "int8":
        assert_identical(logits(ours), logits(theirs))
    assert (logits(ours) - logits(theirs)).norm() <= 1e-3 * logits(theirs).norm()


@pytest.mark.parametrize("base", BASES)
def test_adapters_trained_with_peft_work_here(base, folder, tmp_path):
    theirs = peft.get_peft_model(load(folder, base), config(peft))
    losses = train(theirs)
    assert losses[-1] < losses[0] - 0.1
    theirs.save_pretrained(tmp_path)
    ours = peftfast.PeftModel.from_pretrained(load(folder, base), tmp_path)
    same_logits(base, ours, theirs)
    ours.save_pretrained(tmp_path / "again")
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "again" / "adapter_model.safetensors")[name], tensor)


@pytest.mark.parametrize("base", BASES)
def test_adapters_trained_here_work_with_peft(base, folder, tmp_path):
    ours = peftfast.get_peft_model(load(folder, base), config(peftfast))
    losses = train(ours)
    assert losses[-1] < losses[0] - 0.1
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(load(folder, base), tmp_path)
    same_logits(base, ours, theirs)
    reloaded = peftfast.PeftModel.from_pretrained(load(folder, base), tmp_path)
    assert torch.equal(logits(reloaded), logits(ours))
    theirs.save_pretrained(tmp_path / "theirs")
    quietly(reloaded.save_pretrained, tmp_path / "ours")
    same_files(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("base", BASES)
def test_losses_follow_pefts(base, folder):
    """From equal factors, step by step; in fp32, so that only the order of additions differs."""
    models = [lib.get_peft_model(load(folder, base), config(lib)) for lib in (peftfast, peft)]
    copy_parameters(models[1], models[0], only="lora_")
    ours, theirs = (train(m, steps=6, lr=1e-3) for m in models)
    assert ours == pytest.approx(theirs, rel=1e-4 if base == "int8" else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_names_counts_and_flags_are_pefts(base, dtype, folder, capsys):
    ours, theirs = (lib.get_peft_model(load(folder, base, dtype), config(lib)) for lib in (peftfast, peft))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    ours.print_trainable_parameters()
    theirs.print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first == second
    same_live_state(ours, theirs)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method"):
        assert getattr(ours, flag, None) == getattr(theirs, flag, None), flag
    mine, other = ours.get_model_status(), theirs.get_model_status()
    assert (mine.trainable_params, mine.total_params, mine.num_adapter_layers, mine.quantization_backend) == (
        other.trainable_params, other.total_params, other.num_adapter_layers, other.quantization_backend,
    )  # fmt: skip


def test_storage_dtype_of_a_sharded_model_counts_right(folder):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16)
    ours, theirs = (
        lib.get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.bfloat16),
            config(lib),
        )
        for lib in (peftfast, peft)
    )
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert torch.isfinite(logits(ours)).all()


def test_merged_4bit_model_is_saved_and_reloaded_by_transformers(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    model = peftfast.get_peft_model(load(folder, "nf4-nested"), config(peftfast))
    train(model)
    merged = model.merge_and_unload()
    assert merged.is_loaded_in_4bit and type(merged.model.layers[0].mlp.up_proj) is bnb.nn.Linear4bit
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_dense_merge_is_saved_and_reloaded_by_transformers(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    model = peftfast.get_peft_model(load(folder, "nf4-nested"), config(peftfast))
    train(model)
    expected = logits(model)
    merged = model.merge_and_unload(dequantize=True)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(type(m) is not bnb.nn.Linear4bit for m in again.modules())
    assert_identical(logits(again), expected)


def test_trainer_trains_a_4bit_model_on_cpu(folder, tmp_path):
    """Trainer refuses quantised models unless they are PEFT models; with gradient checkpointing, prepared as usual."""
    from transformers import Trainer, TrainingArguments

    model = peftfast.prepare_model_for_kbit_training(load(folder, "nf4", torch.bfloat16))
    assert model.is_gradient_checkpointing
    model = peftfast.get_peft_model(model, config(peftfast))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=True,
        save_strategy="no", logging_steps=1, learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) is ("lora_" not in name), name


@pytest.mark.parametrize("base", BASES)
def test_layers_are_of_the_kinds_of_peft(base, folder):
    """`isinstance` with the classes that libraries import, and the weight that its helper gives of a module."""
    from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
    from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type

    from peftfast.interop import utilities

    ours, theirs = (
        library.get_peft_model(load(folder, base), library.LoraConfig(target_modules=TARGETS))
        for library in (peftfast, peft)
    )
    ours, theirs = (model.get_base_model().model.layers[0].self_attn.q_proj for model in (ours, theirs))
    for mine, other in ((kinds.Linear4bit, Linear4bit), (kinds.Linear8bitLt, Linear8bitLt)):
        assert isinstance(ours, mine) == isinstance(theirs, other)
        assert not isinstance(ours.base_layer, mine)
    assert not isinstance(ours, (kinds.HqqLoraLinear, kinds.GPTQLoraLinear, kinds.TorchaoLoraLinear))
    weight, state = ours.base_layer.weight, getattr(ours.base_layer, "state", None)
    assert utilities.get_bnb_param_type(weight) == get_bnb_param_type(weight)
    for mine, other in (
        (utilities.dequantize_module_weight(ours.base_layer), dequantize_module_weight(theirs.base_layer)),
        (utilities.dequantize_bnb_weight(weight, state), dequantize_bnb_weight(theirs.base_layer.weight, state)),
    ):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("library", "methods", "kind"),
    [
        ("gptqmodel", ["gptq"], "GPTQLoraLinear"),
        ("gptqmodel", ["awq"], "AwqLoraLinear"),
        ("gptqmodel", [SimpleNamespace(value="awq")], "AwqLoraLinear"),
        ("aqlm", [], "AqlmLoraLinear"),
        ("eetq", [], "EetqLoraLinear"),
        ("hqq", [], "HqqLoraLinear"),
        ("mine", ["awq"], None),
    ],
)
def test_a_lora_layer_is_of_the_kind_of_its_module(library, methods, kind):
    """As PEFT's classes are told apart; layers of other methods on such a module are none of them."""
    names = [
        "GPTQLoraLinear",
        "AwqLoraLinear",
        "AqlmLoraLinear",
        "EetqLoraLinear",
        "HqqLoraLinear",
        "TorchaoLoraLinear",
    ]
    cls = type("QuantLinear", (nn.Linear,), {"__module__": f"{library}.nn_modules", "SUPPORTS_METHODS": methods})

    def kinds_of(module):
        return [name for name in [*names, "IA3Layer"] if isinstance(module, getattr(kinds, name))]

    for config, found in (
        (peftfast.LoraConfig(target_modules=["0"]), [kind] if kind else []),
        (peftfast.IA3Config(target_modules=["0"], feedforward_modules=[]), ["IA3Layer"]),
    ):
        layer = peftfast.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).base_model.model[0]
        layer.base_layer = cls(4, 4)
        assert kinds_of(layer) == found and not kinds_of(layer.base_layer)
