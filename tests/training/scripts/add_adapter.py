"""transformers' own adapter API, and loading by AutoModel: no PeftModel in sight."""

import json

import peft
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LlamaForCausalLM(config).save_pretrained("base")
ids = torch.randint(3, 64, (4, 8), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits[0, -1, :5].tolist()


def fill(model, seed):
    with torch.no_grad():
        for i, (_, p) in enumerate(sorted((n, p) for n, p in model.named_parameters() if "lora_" in n)):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i)) * 0.1)


result = {}
model = AutoModelForCausalLM.from_pretrained("base")
result["base"] = logits(model)
model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "first")
fill(model, 10)
result["first"] = logits(model)
result["trainable"] = sorted(n for n, p in model.named_parameters() if p.requires_grad)
result["active"] = model.active_adapters()
model.disable_adapters()
result["disabled"] = logits(model)
model.enable_adapters()
result["enabled"] = logits(model)
model.add_adapter(LoraConfig(r=2, target_modules=["o_proj"]), "second")
fill(model, 50)
result["second"] = logits(model)
model.set_adapter("first")
result["first again"] = logits(model)
result["layers"] = sum(isinstance(m, BaseTunerLayer) for m in model.modules())
model.save_pretrained("saved")
result["saved keys"] = sorted(model.get_adapter_state_dict("first"))

rows = [{"input_ids": r, "labels": r} for r in ids.tolist()] * 4
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="out", max_steps=4, per_device_train_batch_size=4, logging_steps=1, report_to=[], use_cpu=True,
        learning_rate=1e-2, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    ),
    train_dataset=rows,
)  # fmt: skip
trainer.train()
result["losses"] = [e["loss"] for e in trainer.state.log_history if "loss" in e]
model.delete_adapter("second")
result["after deleting"] = sorted(model.peft_config)

other = AutoModelForCausalLM.from_pretrained("base")
other.load_adapter("saved", adapter_name="loaded")
result["loaded"] = logits(other)
direct = AutoModelForCausalLM.from_pretrained("saved")
result["from_pretrained of the adapter"] = logits(direct)


def fresh(**options):
    return AutoModelForCausalLM.from_pretrained("base", **options)


def tried(call):
    """What a call says where it fails."""
    try:
        call()
    except Exception as e:
        return f"{type(e).__name__}: {e}"


def modes(model):
    """Which adapted layers and factors are in training mode."""
    return sorted(n for n, m in model.named_modules() if m.training and n.endswith(("_proj", ".default", ".other")))


tensors = load_file("saved/adapter_model.safetensors")
for trainable in (False, True):
    model = fresh()
    model.load_adapter("saved", is_trainable=trainable)
    result[f"loaded, trainable {trainable}"] = [
        modes(model),
        [n for n, p in model.named_parameters() if p.requires_grad],
    ]
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    loaded, added = AutoModelForCausalLM.from_pretrained("saved", dtype=dtype), fresh(dtype=dtype)
    added.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    result[f"dtypes, {dtype}"] = [sorted({str(p.dtype) for p in m.parameters()}) for m in (loaded, added)]

model = fresh()
config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
result["nothing to load"] = [
    tried(lambda: model.load_adapter(peft_model_id=None)),
    tried(lambda: model.load_adapter(adapter_state_dict=dict(tensors))),
]
model.load_adapter(adapter_state_dict=dict(tensors), peft_config=config)
result["from tensors"] = logits(model)
model.load_adapter(adapter_state_dict=dict(tensors), peft_config=config, adapter_name="other", low_cpu_mem_usage=True)
result["left on meta"] = [n for n, p in model.named_parameters() if p.is_meta]
model.set_adapter("other")
result["other from tensors"] = logits(model)
result["the name twice"] = tried(lambda: model.load_adapter("saved", adapter_name="other"))
for what, changed in (
    ("unexpected", {**tensors, "foobar": next(iter(tensors.values()))}),
    ("missing", dict(list(tensors.items())[1:])),
):
    info = fresh().load_adapter(adapter_state_dict=changed, peft_config=config, adapter_name="other")
    result[what] = [sorted(info.missing_keys), sorted(info.unexpected_keys)]

model = fresh()
model.load_adapter("saved", adapter_name="default")
model.load_adapter("saved", adapter_name="default", hotswap=True)
result["hot-swapped"] = logits(model)
result["hot-swapped by another name"] = tried(lambda: model.load_adapter("saved", adapter_name="new", hotswap=True))

model = fresh()
model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), "head")
fill(model, 90)
model.gradient_checkpointing_enable()
model.train()(input_ids=ids).logits.square().mean().backward()
result["checkpointed"] = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
result["trained beside"] = sorted(n for n, p in model.named_parameters() if p.requires_grad)
model.save_pretrained("with-head")
result["with a head"] = logits(AutoModelForCausalLM.from_pretrained("with-head"))

model = fresh()
for name in ("a", "b", "c"):
    model.add_adapter(config, name)
fill(model, 130)
model.set_adapter(["c", "a"])
result["two active"] = [*model.active_adapters(), tried(lambda: model.save_pretrained("two"))]
result["two at once"] = logits(model)
model.delete_adapter("a")
result["one of two"] = model.active_adapters()
result["absent"] = tried(lambda: model.delete_adapter(["b", "nobody"]))
model.delete_adapter(["b", "b", "c"])
result["none left"] = [model._hf_peft_config_loaded, tried(model.active_adapters)]
result["as before"] = logits(model)
result["library"] = peft.PeftModel.__module__
with open("result.json", "w") as f:
    json.dump(result, f)
