"""Ctrl-C in the middle of an operation: what was begun can be done again, and what ends on its own has ended."""

from __future__ import annotations

import warnings

import pytest
import torch
from interrupting import pressing_ctrl_c
from transformers import LlamaConfig, LlamaForCausalLM

import peftfast
from peftfast.wrapping.inventory import Inventory

KINDS = {
    "lora": lambda: peftfast.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[1], init_lora_weights=False
    ),
    "prefix": lambda: peftfast.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}
IDS = torch.arange(6).view(1, 6)


def adapted(kind: str) -> peftfast.PeftModel:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=16, tie_word_embeddings=False,
        )
    )  # fmt: skip
    model = peftfast.get_peft_model(base, KINDS[kind]())
    model.add_adapter("two", KINDS[kind]())
    return model.eval()


def seen(model: torch.nn.Module) -> tuple:
    """All that a user sees of a model."""
    with torch.no_grad():
        out = model(input_ids=IDS).logits
    parameters = {name: (p.detach().clone().tolist(), p.requires_grad) for name, p in model.named_parameters()}
    return parameters, out.tolist(), model.active_adapters, sorted(model.peft_config)


def without_adapters(model: peftfast.PeftModel) -> None:
    with model.disable_adapter():
        model(input_ids=IDS)


OPERATIONS = {
    "delete": lambda model, _: model.delete_adapter("default"),
    "disable": lambda model, _: without_adapters(model),
    "load": lambda model, folder: model.load_adapter(folder, "three"),
    "load into": lambda model, folder: model.load_adapter(folder, "two"),
    "switch": lambda model, _: model.set_adapter("two"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_ctrl_c_ends_can_be_done_again(kind, operation, tmp_path):
    adapted(kind).save_pretrained(tmp_path, selected_adapters=["default"])
    run = OPERATIONS[operation]
    finished = adapted(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lines = pressing_ctrl_c(10**9, lambda: run(finished, tmp_path), peftfast)
        after = seen(finished)
        for at in range(1, lines, max(1, lines // 12)):
            model = adapted(kind)
            assert pressing_ctrl_c(at, lambda model=model: run(model, tmp_path), peftfast) == at
            if sorted(model.peft_config) != after[-1] or operation not in ("delete", "load"):
                run(model, tmp_path)
            assert seen(model) == after, at


def test_what_ctrl_c_ends_while_it_is_loaded_has_values_or_is_not_there(tmp_path, monkeypatch):
    """Between the adapter and its values: it was left with whatever its memory held before."""
    adapted("lora").save_pretrained(tmp_path, selected_adapters=["default"])
    model, admit = adapted("lora"), Inventory.admit

    def admitted(*named: object) -> None:
        admit(*named)
        raise KeyboardInterrupt

    monkeypatch.setattr(Inventory, "admit", admitted)
    with pytest.raises(KeyboardInterrupt):
        model.load_adapter(tmp_path, "three")
    assert [*model.peft_config] == ["default", "two"] and "three" not in str(dict(model.named_parameters()).keys())
