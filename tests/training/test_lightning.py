"""PyTorch Lightning's Trainer and Fabric: what PEFT's models do in them, losses, weights and checkpoints included."""

from __future__ import annotations

import importlib
import warnings

import peft
import pytest
import torch
from torch.utils.data import DataLoader
from training.tiny import batch, factors, largest_difference, llama, rows

import peftfast

lightning = pytest.importorskip("lightning")
callbacks = importlib.import_module("lightning.pytorch.callbacks")
pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
SCHEDULE = {"init_r": 5, "target_r": 2, "tinit": 2, "tfinal": 2, "total_step": 12, "deltaT": 1}
CONFIGS = {
    "LoRA": lambda library: library.LoraConfig(r=4, lora_alpha=8, **TARGETS),
    "DoRA": lambda library: library.LoraConfig(r=4, use_dora=True, **TARGETS),
    "IA3": lambda library: library.IA3Config(feedforward_modules=["down_proj"], **TARGETS),
    "AdaLoRA": lambda library: library.AdaLoraConfig(**SCHEDULE, **TARGETS),
    "modules_to_save": lambda library: library.LoraConfig(r=4, modules_to_save=["lm_head"], **TARGETS),
    "prompt tuning": lambda library: library.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


def adapted(library, method):
    model = library.get_peft_model(llama(), CONFIGS[method](library))
    with torch.no_grad():
        for i, (name, parameter) in enumerate(sorted(model.named_parameters())):
            if parameter.requires_grad and "modules_to_save" not in name:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.1
                parameter.copy_(noise + (1.0 if "ia3" in name or "magnitude" in name else 0.0))
    return model


def loader(count=16):
    data = [{k: torch.tensor(v) for k, v in row.items()} for row in rows(count)]
    return DataLoader(data, batch_size=4)


class Module(lightning.LightningModule):
    """
    Args:
        by_hand: run PEFT's AdaLoRA schedule where that can be done: after the step, before gradients are cleared.
    """

    def __init__(self, model, lr=0.05, by_hand=False):
        super().__init__()
        self.model, self.lr, self.by_hand = model, lr, by_hand
        self.losses = []

    def training_step(self, batch, index):
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        self.losses.append(self.model(**batch).loss.item())

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        if self.by_hand:
            self.model.base_model.update_and_allocate(self.global_step + 1)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)


def module(library, method, **options):
    return Module(adapted(library, method), by_hand=library is peft and method == "AdaLoRA", **options)


def fit(lit, *, resume=None, epochs=2, validate=True, **options):
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    saves = any(isinstance(c, callbacks.ModelCheckpoint) for c in options.get("callbacks", ()))
    settings |= {"enable_model_summary": False, "enable_checkpointing": saves, "max_epochs": epochs}
    trainer = lightning.Trainer(**{**settings, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(lit, loader(), loader(8) if validate else None, ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize(
    "options",
    [{}, {"inference_mode": False}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}],
    ids=["inference mode", "no_grad", "accumulation and clipping"],
)
def test_training_and_validation_are_pefts(method, options):
    ours, theirs = module(peftfast, method), module(peft, method)
    for lit in (ours, theirs):
        fit(lit, **options)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert largest_difference(factors(ours), factors(theirs)) < 1e-4


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "IA3", "AdaLoRA", "prompt tuning"])
def test_training_goes_on_after_validation_in_bf16(method):
    """In inference mode under autocast; what is kept from there must not reach a step of training."""
    found = []
    for inference_mode in (True, False):
        lit = module(peftfast, method)
        fit(lit, precision="bf16-mixed", inference_mode=inference_mode)
        found.append(lit.losses)
    assert found[0] == found[1]


@pytest.mark.parametrize("method", ["LoRA", "AdaLoRA", "modules_to_save"])
def test_a_resumed_training_is_the_one_that_was_not_interrupted(method, tmp_path):
    whole, resumed = module(peftfast, method), module(peftfast, method)
    fit(whole, epochs=3, callbacks=[callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)])
    fit(resumed, epochs=3, resume=tmp_path / "epoch=0.ckpt")
    assert all(torch.equal(value, factors(resumed)[name]) for name, value in factors(whole).items())
    loaded = Module.load_from_checkpoint(tmp_path / "epoch=2.ckpt", model=adapted(peftfast, method))
    assert all(torch.equal(value, factors(loaded)[name]) for name, value in factors(whole).items())
    if method == "AdaLoRA":
        assert resumed.model.base_model.rankallocator.finished


def test_a_search_for_the_learning_rate_leaves_adaloras_schedule_where_it_was(tmp_path):
    searched = module(peftfast, "AdaLoRA")
    finder = callbacks.LearningRateFinder(num_training_steps=30, max_lr=0.5, early_stop_threshold=None)
    fit(searched, epochs=3, validate=False, callbacks=[finder], default_root_dir=tmp_path)
    alone = module(peftfast, "AdaLoRA", lr=searched.lr)
    fit(alone, epochs=3, validate=False)
    assert [entry.step for entry in searched.model.base_model.history] == [
        entry.step for entry in alone.model.base_model.history
    ]
    assert all(torch.equal(value, factors(alone)[name]) for name, value in factors(searched).items())


@pytest.mark.parametrize("average", ["EMAWeightAveraging", "StochasticWeightAveraging"])
@pytest.mark.parametrize("method", ["LoRA", "AdaLoRA"])
def test_averages_of_the_weights_are_pefts(method, average):
    found = []
    for library in (peftfast, peft):
        lit = module(library, method)
        options = {"decay": 0.5} if average.startswith("EMA") else {"swa_lrs": 0.05, "swa_epoch_start": 1}
        fit(lit, epochs=3, callbacks=[getattr(callbacks, average)(**options)])
        found.append(factors(lit))
    assert largest_difference(*found) < 1e-4


class Swapping(callbacks.Callback):
    def on_train_epoch_start(self, trainer, lit):
        lit.model.set_adapter(["default", "other"][trainer.current_epoch % 2])


class BothTrained(Module):
    def configure_optimizers(self):
        return torch.optim.SGD([p for n, p in self.named_parameters() if "lora_" in n], lr=self.lr)


def test_adapters_swapped_between_epochs():
    found = []
    for library in (peftfast, peft):
        model = adapted(library, "LoRA")
        torch.manual_seed(4)
        model.add_adapter("other", CONFIGS["LoRA"](library))
        with torch.no_grad():
            for i, (name, parameter) in enumerate(sorted(model.named_parameters())):
                if ".other" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
        lit = BothTrained(model)
        fit(lit, epochs=3, callbacks=[Swapping()])
        found.append((lit.losses, {n: p.detach() for n, p in lit.named_parameters() if "lora_" in n}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert largest_difference(found[0][1], found[1][1]) < 1e-4


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="autograd's threads of a CUDA build do not survive a fork")
@pytest.mark.parametrize("method", ["LoRA", "AdaLoRA"])
def test_two_processes(method):
    """Each has half of every batch; afterwards the model here has the trained weights."""
    found = []
    for library in (peftfast, peft):
        lit = module(library, method)
        before = factors(lit)
        fit(lit, validate=False, devices=2, strategy="ddp_fork")
        found.append(factors(lit))
    assert largest_difference(*found) < 1e-4 < 1e-2 < largest_difference(found[0], before)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric(precision, tmp_path):
    found = []
    for library in (peftfast, peft):
        fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
        model = adapted(library, "LoRA")
        parameters = [p for p in model.parameters() if p.requires_grad]
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(parameters, lr=0.05))
        losses = []
        for step in range(6):
            with fabric.no_backward_sync(wrapped, enabled=step % 2 == 0):
                loss = wrapped(**batch(seed=step)).loss
                fabric.backward(loss)
            losses.append(loss.item())
            if step % 2:
                fabric.clip_gradients(wrapped, optimizer, max_norm=0.1)
                optimizer.step()
                optimizer.zero_grad()
            if step == 3:
                fabric.save(tmp_path / "state.ckpt", {"model": wrapped, "optimizer": optimizer})
        fabric.load(tmp_path / "state.ckpt", {"model": wrapped, "optimizer": optimizer})
        wrapped.save_pretrained(tmp_path / library.__name__)  # what is not a module's goes to the model itself
        found.append((losses, factors(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert largest_difference(found[0][1], found[1][1]) < 1e-4
