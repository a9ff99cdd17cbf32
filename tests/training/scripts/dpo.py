"""Preference tuning: the reference model is the same model with its adapter disabled, or a copy of the adapter."""

import json
import runpy
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from trl import DPOConfig, DPOTrainer

common = runpy.run_path(str(Path(__file__).with_name("sft.py")), run_name="common")
base, adapter, texts, tokenizer = (common[name] for name in ("base", "adapter", "texts", "tokenizer"))

pairs = {
    "prompt": [t.rpartition(" w")[0] for t in texts],
    "chosen": [" " + t.split()[-1] + " w1 w2" for t in texts],
    "rejected": [" w5 w6" for t in texts],
}
result = {}
for name in ("config", "model"):
    model = base()
    torch.manual_seed(1)
    if name == "model":  # the reference is a frozen copy of this adapter
        model = get_peft_model(model, adapter())
        with torch.no_grad():
            for i, (_, p) in enumerate(sorted((n, p) for n, p in model.named_parameters() if "lora_B" in n)):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=f"out-{name}", max_steps=6, save_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
            logging_steps=1, report_to=[], use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, seed=3,
            max_length=24, dataloader_pin_memory=False, disable_tqdm=True, beta=0.5,
        ),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer,
        peft_config=adapter() if name == "config" else None,
    )  # fmt: skip
    assert isinstance(trainer.model, PeftModel)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    result[name] = [entry["loss"] for entry in history]
    result[f"{name} margins"] = [entry["rewards/margins"] for entry in history]
    result[f"{name} adapters"] = sorted(trainer.model.peft_config)
result["library"] = next(c.__module__ for c in type(trainer.model).__mro__ if c.__name__ == "PeftModel")
with open("result.json", "w") as f:
    json.dump(result, f)
