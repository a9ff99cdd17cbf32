"""Supervised fine-tuning as in TRL's documentation: a model, a dataset, a LoraConfig. Knows `peft` only."""

import json

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

words = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))])}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
)
generator = torch.Generator().manual_seed(0)
texts = [" ".join(f"w{i}" for i in torch.randint(0, 60, (10,), generator=generator).tolist()) for _ in range(32)]


def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def adapter():
    return LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian", task_type="CAUSAL_LM"
    )


def main():
    result = {}
    for name in ("config", "model", "checkpointing"):
        model = base()
        torch.manual_seed(1)
        if name == "model":
            model = get_peft_model(model, adapter())
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=f"out-{name}", max_steps=8, save_steps=4, per_device_train_batch_size=4, learning_rate=1e-2,
                logging_steps=1, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=name == "checkpointing",
                max_length=16, seed=3, dataloader_pin_memory=False, disable_tqdm=True, fp16=False,
            ),
            train_dataset=Dataset.from_dict({"text": texts}),
            processing_class=tokenizer,
            peft_config=None if name == "model" else adapter(),
        )  # fmt: skip
        assert isinstance(trainer.model, PeftModel)
        trainer.train()
        result[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(result[name]) == 8
        trainer.save_model(f"final-{name}")
    result["library"] = next(c.__module__ for c in type(trainer.model).__mro__ if c.__name__ == "PeftModel")
    with open("result.json", "w") as f:
        json.dump(result, f)


if __name__ == "__main__":
    main()
