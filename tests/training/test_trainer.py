"""transformers.Trainer and accelerate with a peftfast model: the same numbers and the same files as with PEFT."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from oracle import saved_config
from packaging import version
from safetensors.torch import load_file
from training.tiny import batch, files, largest_difference, llama, rows, wrapped
from transformers import Trainer, TrainingArguments

import peftfast

ADAPTER = {"adapter_model.safetensors", "adapter_config.json"}


def arguments(folder, **changes) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_steps": 10,
        "report_to": [],
        "use_cpu": True,
        "seed": 7,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**settings, **changes})


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train(library, folder, resume=None, config=None, **changes) -> Trainer:
    trainer = Trainer(
        model=wrapped(library, **(config or {})),
        args=arguments(folder, **changes),
        train_dataset=rows(),
        eval_dataset=rows(8, 5),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_twenty_steps_checkpoint_and_resume_equal_peft(tmp_path):
    theirs = train(peft, tmp_path / "peft")
    ours = train(peftfast, tmp_path / "peftfast")
    assert len(losses(ours)) == 20
    assert losses(ours) == pytest.approx(losses(theirs), rel=2e-5)

    checkpoint, theirs_there = (tmp_path / library / "checkpoint-10" for library in ("peftfast", "peft"))
    there = files(theirs_there)
    assert files(checkpoint) == there
    assert there >= ADAPTER
    assert "model.safetensors" not in there
    mine, other = (load_file(folder / "adapter_model.safetensors") for folder in (checkpoint, theirs_there))
    assert largest_difference(mine, other) < 1e-4
    assert saved_config(checkpoint) == saved_config(theirs_there)

    resumed = train(peftfast, tmp_path / "again", resume=str(checkpoint))
    assert losses(resumed)[10:] == losses(ours)[10:]
    assert largest_difference(resumed.model.state_dict(), ours.model.state_dict()) == 0.0
    # and a checkpoint of one library resumes in the other
    crossed = train(peft, tmp_path / "crossed", resume=str(checkpoint))
    assert losses(crossed)[10:] == pytest.approx(losses(theirs)[10:], rel=2e-5)


def test_dropout_and_accumulation_train(tmp_path):
    trainer = Trainer(
        model=wrapped(peftfast, lora_dropout=0.5),
        args=arguments(tmp_path, max_steps=12, gradient_accumulation_steps=2, save_strategy="no"),
        train_dataset=rows(8),
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1


def test_best_model_is_loaded_at_the_end(tmp_path):
    trainer = train(
        peftfast, tmp_path, max_steps=6, save_steps=1, eval_steps=1, eval_strategy="steps", load_best_model_at_end=True,
        learning_rate=0.3, lr_scheduler_type="constant", metric_for_best_model="eval_loss", greater_is_better=False,
    )  # fmt: skip
    best = trainer.state.best_model_checkpoint
    saved = load_file(f"{best}/adapter_model.safetensors")
    assert largest_difference(peftfast.get_peft_model_state_dict(trainer.model), saved) == 0.0
    evaluated = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluated.values()), rel=1e-6)
    assert trainer.model.active_adapters == ["default"]
    assert any(p.requires_grad for p in trainer.model.parameters())


def test_signature_columns_and_label_names(tmp_path):
    ours, theirs = (
        Trainer(model=wrapped(lib), args=arguments(tmp_path), train_dataset=rows(8)) for lib in (peftfast, peft)
    )
    for trainer in (ours, theirs):
        trainer._set_signature_columns_if_needed()
    assert ours._signature_columns == theirs._signature_columns
    assert ours.label_names == theirs.label_names == ["labels"]
    assert ours.can_return_loss == theirs.can_return_loss
    assert ours.model_accepts_loss_kwargs == theirs.model_accepts_loss_kwargs


@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}, {"neftune_noise_alpha": 5.0}])
def test_options_that_reach_into_the_base_model(tmp_path, options):
    ours, theirs = (
        train(lib, tmp_path / lib.__name__, max_steps=3, save_strategy="no", **options) for lib in (peftfast, peft)
    )
    assert losses(ours) == pytest.approx(losses(theirs), rel=2e-5)


def test_an_average_of_the_adapters_is_saved_and_resumed(tmp_path):
    def train(resume=None, **changes) -> tuple[peftfast.AdapterAverage, Trainer]:
        average = peftfast.AdapterAverage(wrapped(peftfast), 0.9)
        trainer = Trainer(
            average.model, arguments(tmp_path, **changes), train_dataset=rows(), callbacks=[average.callback()]
        )
        trainer.train(resume_from_checkpoint=resume)
        return average, trainer

    changes = {"max_steps": 4, "save_steps": 2, "gradient_accumulation_steps": 2}
    whole, trainer = train(**changes)
    assert whole.updates == 4
    with whole.applied():
        inside = trainer.evaluate(rows(8, 5))["eval_loss"]
    assert trainer.evaluate(rows(8, 5))["eval_loss"] != inside
    (tmp_path / "checkpoint-4" / "adapter_average.safetensors").unlink()
    resumed, _ = train(str(tmp_path / "checkpoint-2"), **changes)
    assert resumed.updates == 4 and largest_difference(resumed.state_dict(), whole.state_dict()) == 0.0
    (tmp_path / "checkpoint-2" / "adapter_average.safetensors").unlink()
    with pytest.warns(peftfast.PeftWarning, match="no .*checkpoint-2.*average.safetensors to resume.*begins anew"):
        train(str(tmp_path / "checkpoint-2"), **changes)


def test_two_adapters_are_saved_and_resumed(tmp_path):
    def two() -> torch.nn.Module:
        model = wrapped(peftfast)
        model.add_adapter("other", peftfast.LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"))
        return model

    trainer = Trainer(model=two(), args=arguments(tmp_path, max_steps=4, save_steps=2), train_dataset=rows())
    trainer.train()
    assert {"adapter_model.safetensors", "other/adapter_model.safetensors"} <= files(tmp_path / "checkpoint-2")
    again = Trainer(model=two(), args=arguments(tmp_path, max_steps=4, save_steps=100), train_dataset=rows())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    if version.parse(transformers.__version__) < version.parse("5.23"):
        pytest.skip(f"of several adapters, transformers {transformers.__version__} resumes those in sub-folders only")
    assert losses(again)[2:] == losses(trainer)[2:]


def test_generation_while_training(tmp_path):
    from transformers import TrainerCallback

    produced = []

    class Generate(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.eval()
            ids = batch(2)["input_ids"][:, :4]
            with torch.no_grad():
                produced.append(model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0))
            model.train()

    trainer = Trainer(model=wrapped(peftfast), args=arguments(tmp_path, max_steps=3, save_strategy="no"),
                      train_dataset=rows(), callbacks=[Generate()])  # fmt: skip
    trainer.train()
    assert [tuple(p.shape)[0] for p in produced] == [2, 2, 2]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_base_is_accepted(tmp_path, kind):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    del bitsandbytes
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    quantisation = BitsAndBytesConfig(
        load_in_4bit=kind == "nf4", load_in_8bit=kind == "int8", bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip

    def base():
        return LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantisation, device_map={"": "cpu"}, dtype=torch.float32
        )

    found = {}
    for library in (peft, peftfast):
        trainer = Trainer(model=wrapped(library, base()), train_dataset=rows(),
                          args=arguments(tmp_path / library.__name__, max_steps=5, save_steps=5))  # fmt: skip
        trainer.train()
        found[library] = losses(trainer)
    assert found[peftfast] == pytest.approx(found[peft], rel=1e-3)
    assert files(tmp_path / "peftfast" / "checkpoint-5") == files(tmp_path / "peft" / "checkpoint-5")


def test_accelerate_with_accumulation_equals_peft(tmp_path):
    from accelerate import Accelerator
    from accelerate.utils import is_peft_model

    histories = {}
    for library in (peft, peftfast):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = wrapped(library)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        loader = torch.utils.data.DataLoader([{k: torch.tensor(v) for k, v in r.items()} for r in rows()], batch_size=4)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        assert is_peft_model(accelerator.unwrap_model(model))
        history = []
        for inputs in loader:
            with accelerator.accumulate(model):
                loss = model(**inputs).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            history.append(loss.item())
        histories[library] = history
        accelerator.unwrap_model(model).save_pretrained(
            tmp_path / library.__name__, is_main_process=accelerator.is_main_process,
            state_dict=accelerator.get_state_dict(model),
        )  # fmt: skip
    assert len(histories[peft]) == 12
    assert histories[peftfast] == pytest.approx(histories[peft], rel=2e-5)
    mine, theirs = (load_file(tmp_path / lib / "adapter_model.safetensors") for lib in ("peftfast", "peft"))
    assert largest_difference(mine, theirs) < 1e-4
