"""transformers' own adapter API, a pipeline, and loading by AutoModel: no PeftModel in sight."""

import json

import peft
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
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
result["library"] = peft.PeftModel.__module__
with open("result.json", "w") as f:
    json.dump(result, f)
