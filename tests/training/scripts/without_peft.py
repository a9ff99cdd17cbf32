"""Training where PEFT is not installed. `python without_peft.py before|after`: whether transformers, TRL and accelerate
are imported before peftfast has made anything, or after; result.json says of every check how it failed, null if not."""

import json
import os
import sys
import traceback

import torch
from safetensors.torch import load_file
from training.tiny import batch, files, largest_difference, llama, lora, rows, wrapped

import peftfast


def import_others():
    import accelerate  # noqa: F401
    import transformers.trainer

    assert not transformers.trainer.is_peft_available() and not hasattr(transformers.trainer, "PeftModel")
    try:
        from trl import SFTTrainer  # noqa: F401
    except ImportError:  # checks that need it are skipped
        pass


def trainer(folder, model=None, **changes):
    from transformers import Trainer, TrainingArguments

    settings = {
        "output_dir": folder, "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "seed": 7, "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return Trainer(
        model=wrapped(peftfast, llama(tied=True)) if model is None else model,
        args=TrainingArguments(**{**settings, **changes}),
        train_dataset=rows(),
        eval_dataset=rows(),
    )


def is_adapter(folder):
    found = files(folder)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= found, found
    assert not [name for name in found if name.startswith(("model", "pytorch_model"))], found


def everybody_recognises_the_model():
    from accelerate.utils import is_peft_model
    from transformers.trainer import _is_peft_model
    from transformers.utils import is_peft_available
    from transformers.utils.import_utils import is_peft_greater_or_equal

    model = wrapped(peftfast)
    assert is_peft_available() and is_peft_greater_or_equal("0.18.0")
    assert is_peft_model(model) and not is_peft_model(llama())
    assert _is_peft_model(model) and not _is_peft_model(llama())
    import peft

    assert peft.PeftModel is peftfast.PeftModel


def checkpoints_are_adapters_and_resume():
    whole = trainer("whole")
    whole.train()
    is_adapter("whole/checkpoint-2")
    is_adapter("whole/checkpoint-4")
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint="whole/checkpoint-2")
    assert not os.path.exists("resumed/checkpoint-2"), "trained from the start"
    assert largest_difference(resumed.model.state_dict(), whole.model.state_dict()) == 0.0


def the_best_model_is_loaded():
    best = trainer(
        "best", save_steps=1, eval_steps=1, eval_strategy="steps", load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True,  # so that it is not the last, which is there already
    )  # fmt: skip
    best.train()
    assert best.state.best_model_checkpoint.endswith("checkpoint-1")
    saved = load_file(f"{best.state.best_model_checkpoint}/adapter_model.safetensors")
    assert largest_difference(peftfast.get_peft_model_state_dict(best.model), saved) == 0.0


def a_quantised_model_trains():
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    llama(hidden_size=64, intermediate_size=128).save_pretrained("dense")
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = LlamaForCausalLM.from_pretrained(
        "dense", quantization_config=quantisation, device_map={"": "cpu"}, dtype=torch.float32
    )
    trainer("quantised", wrapped(peftfast, base)).train()
    is_adapter("quantised/checkpoint-4")


def what_is_saved_loads():
    from transformers import AutoModelForCausalLM

    llama().save_pretrained("base")
    model = wrapped(peftfast, AutoModelForCausalLM.from_pretrained("base")).eval()
    trainer("saving", model).save_model("saved")
    is_adapter("saved")
    with torch.no_grad():
        expected = model(**batch()).logits
        for load in (peftfast.AutoPeftModelForCausalLM, AutoModelForCausalLM):  # transformers' own puts adapters in too
            assert torch.equal(load.from_pretrained("saved").eval()(**batch()).logits, expected), load


def transformers_takes_a_config():
    model = llama()
    model.add_adapter(lora(peftfast))
    trainer("injected", model).train()
    is_adapter("injected/checkpoint-4")


def trl_takes_a_config_and_a_model():
    import sft  # written for peft
    from trl import SFTConfig, SFTTrainer

    for given in ("config", "model"):
        sft_trainer = SFTTrainer(
            model=sft.base() if given == "config" else peftfast.get_peft_model(sft.base(), sft.adapter()),
            args=SFTConfig(
                output_dir=f"sft-{given}", max_steps=2, save_steps=2, per_device_train_batch_size=4, report_to=[],
                use_cpu=True, bf16=False, max_length=16, dataloader_pin_memory=False, disable_tqdm=True,
            ),
            train_dataset=sft.Dataset.from_dict({"text": sft.texts}),
            processing_class=sft.tokenizer,
            peft_config=sft.adapter() if given == "config" else None,
        )  # fmt: skip
        sft_trainer.train()
        assert isinstance(sft_trainer.model, peftfast.PeftModel)
        is_adapter(f"sft-{given}/checkpoint-2")


def accelerate_trains_and_saves():
    from accelerate import Accelerator
    from accelerate.utils import is_peft_model

    accelerator = Accelerator(cpu=True)
    model = wrapped(peftfast)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    history = []
    for _ in range(4):
        loss = model(**batch()).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    assert history[-1] < history[0], history
    assert is_peft_model(model)
    accelerator.unwrap_model(model).save_pretrained("accelerated", state_dict=accelerator.get_state_dict(model))
    is_adapter("accelerated")


CHECKS = [
    everybody_recognises_the_model, checkpoints_are_adapters_and_resume, the_best_model_is_loaded,
    a_quantised_model_trains, what_is_saved_loads, transformers_takes_a_config, trl_takes_a_config_and_a_model,
    accelerate_trains_and_saves,
]  # fmt: skip


def main():
    if sys.argv[1] == "before":
        import_others()
    lora(peftfast)  # a config is enough
    result = {}
    for check in CHECKS:
        try:
            check()
        except Exception:
            result[check.__name__] = traceback.format_exc()
        else:
            result[check.__name__] = None
    with open("result.json", "w") as f:
        json.dump(result, f)


if __name__ == "__main__":
    main()
