"""A tiny Llama, its data, and the same adapter on it from either library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

VOCABULARY, HIDDEN, TOKENS = 97, 32, 12


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = False, **changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,  # with the default the adapters hardly move the loss
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).to(dtype)


def rows(count: int = 48, seed: int = 1) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, TOKENS), generator=generator).tolist()
    return [{"input_ids": row, "attention_mask": [1] * TOKENS, "labels": row} for row in ids]


def batch(size: int = 4, seed: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (size, TOKENS), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def lora(library: Any, **changes: Any) -> Any:
    """A LoraConfig of `library` (peft or peftfast)."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return library.LoraConfig(**{**settings, **changes})


def wrapped(library: Any, model: nn.Module | None = None, seed: int = 3, **changes: Any) -> nn.Module:
    """`model` with an adapter whose factors are the same whatever `library` drew."""
    model = library.get_peft_model(llama() if model is None else model, lora(library, **changes))
    fill(model, seed)
    return model


def checkpoint(model: nn.Module, reentrant: bool = False) -> None:
    """Switch gradient checkpointing on, whatever this release of transformers calls the switch."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": reentrant})


def fill(model: nn.Module, seed: int = 3, scale: float = 0.2) -> None:
    """Give every factor values that depend on its name's place only."""
    with torch.no_grad():
        named = sorted((n, p) for n, p in model.named_parameters() if ".lora_" in n)
        for i, (_, parameter) in enumerate(named):
            generator = torch.Generator().manual_seed(1000 * seed + i)
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
            parameter.copy_(values.to(parameter.dtype))


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Trained tensors by name, detached copies."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Over all tensors, relative to the largest entry of each; the names must agree."""
    assert set(one) == set(other), set(one) ^ set(other)
    assert one
    pairs = ((one[k].double(), other[k].double()) for k in one)
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item() for a, b in pairs)


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()}
