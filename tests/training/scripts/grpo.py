"""Reinforcement learning: completions are sampled from the adapted model; the reference is the adapter disabled."""

import json
import runpy
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from trl import GRPOConfig, GRPOTrainer

common = runpy.run_path(str(Path(__file__).with_name("sft.py")), run_name="common")
base, adapter, texts, tokenizer = (common[name] for name in ("base", "adapter", "texts", "tokenizer"))
seen = []


def odd_tokens(completion_ids, **rest):
    seen.extend(list(map(int, ids)) for ids in completion_ids)
    return [sum(token % 2 for token in ids) / max(len(ids), 1) for ids in completion_ids]


torch.manual_seed(1)
trainer = GRPOTrainer(
    model=base(),
    reward_funcs=odd_tokens,
    args=GRPOConfig(
        output_dir="out", max_steps=4, save_steps=2, per_device_train_batch_size=4, num_generations=4, num_iterations=2,
        max_completion_length=6, learning_rate=1e-2, beta=0.1, logging_steps=1, report_to=[], use_cpu=True, bf16=False,
        fp16=False, gradient_checkpointing=False, seed=3, dataloader_pin_memory=False, disable_tqdm=True,
    ),
    train_dataset=Dataset.from_dict({"prompt": texts}),
    processing_class=tokenizer,
    peft_config=adapter(),
)  # fmt: skip
assert isinstance(trainer.model, PeftModel)
trainer.train()
history = [entry for entry in trainer.state.log_history if "loss" in entry]
result = {name: [entry[name] for entry in history if name in entry] for name in ("loss", "kl", "reward", "grad_norm")}
result["completions"] = seen
result["library"] = next(c.__module__ for c in type(trainer.model).__mro__ if c.__name__ == "PeftModel")
with open("result.json", "w") as f:
    json.dump(result, f)
