"""Gradient checkpointing changes nothing, for prefixes too, which PEFT refuses."""

from __future__ import annotations

import pytest
import transformers
from prompts.tiny import CAUSAL, METHODS, assert_same, base, batch, gradients, loss, ours, result

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [*CAUSAL, "t5", "bert-seq"])
def test_checkpointing_changes_nothing(family: str, method: str, reentrant: bool):
    model = ours(family, method).double().train()
    inputs = batch(family, "right" if family == "bert-seq" else "left")
    expected_loss, expected = loss(model(**inputs)).detach(), gradients(model, inputs)
    recomputed = count_recomputation(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(loss(model(**inputs)).detach(), expected_loss)
    got = gradients(model, inputs)
    assert recomputed() > 0, "nothing was computed twice"
    assert got.keys() == expected.keys()
    for name in got:
        assert_same(got[name], expected[name])
    # and nothing stays behind
    model.gradient_checkpointing_disable()
    again = gradients(model, inputs)
    for name in again:
        assert_same(again[name], expected[name])


def count_recomputation(model):
    """How often checkpointing's recomputation ran, by the calls of the first layer norm beyond one per forward."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layer = next(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
    inner = next(m for m in layer.modules() if not list(m.children()))
    calls = [0]
    inner.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return lambda: calls[0] - 2  # the loss alone, and the forward with gradients


def test_checkpointing_set_before_wrapping():
    model = base("llama").train()
    model.gradient_checkpointing_enable()
    wrapped = ours("llama", "prefix", model=model).double()
    plain = ours("llama", "prefix").double().train()
    plain.load_state_dict(wrapped.state_dict())
    inputs = batch("llama")
    got, expected = gradients(wrapped, inputs), gradients(plain, inputs)
    assert_same(*(g["prompt_encoder.default.embedding.weight"] for g in (got, expected)))


def test_generation_under_checkpointing_is_refused():
    model = ours("llama", "prefix").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        model.generate(input_ids=batch("llama")["input_ids"], max_new_tokens=2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma4"])
def test_every_second_layer(family: str):
    model = ours(family, "prefix").double().train()
    inputs = batch(family)
    expected = gradients(model, inputs)
    if not hasattr(model, "activation_checkpointing_enable"):
        pytest.skip(f"transformers {transformers.__version__} checkpoints every layer")
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    got = gradients(model, inputs)
    assert got.keys() == expected.keys()
    for name in got:
        assert_same(got[name], expected[name])


@pytest.mark.parametrize("method", METHODS)
def test_under_trainer(tmp_path, method: str):
    """With checkpointing, saved on the way, and the best checkpoint loaded at the end."""
    import torch
    from transformers import Trainer, TrainingArguments

    import peftfast

    torch.manual_seed(0)
    rows = [torch.randint(3, 64, (6,)) for _ in range(8)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    model = ours("llama", method)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=0.05, save_steps=2,
        eval_steps=2, eval_strategy="steps", load_best_model_at_end=True, gradient_checkpointing=True, report_to=[],
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before and abs(after - trainer.state.best_metric) < 1e-4
    loaded = peftfast.PeftModel.from_pretrained(base("llama"), trainer.state.best_model_checkpoint)
    inputs = {"input_ids": torch.stack(rows)}
    assert_same(result(loaded(**inputs)), result(model.eval()(**inputs)), 1e-5)
