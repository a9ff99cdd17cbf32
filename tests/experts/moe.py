"""Tiny mixture-of-experts models of four kinds, and a plain module with stacks of matrices."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from oracle import VOCABULARY
from torch import Tensor, nn

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def needs_peft_to_load() -> None:
    """Skip where PEFT 0.21.2 calls what reads experts' files with an argument that it does not have yet."""
    from transformers.core_model_loading import WeightConverter

    if "loading_info" not in inspect.signature(WeightConverter.convert).parameters:
        pytest.skip(f"PEFT loads no adapters of experts with transformers {transformers.__version__}")


def _filled(model: nn.Module) -> nn.Module:
    """The same weights at every call; some kinds of model leave theirs uninitialised."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def qwen3_moe(experts: int = 4, inner: int = 16, **changes: Any) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=inner, num_key_value_heads=2, num_experts=experts, num_experts_per_tok=2,
        head_dim=8, **changes,
    )  # fmt: skip
    return _filled(Qwen3MoeForCausalLM(config))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **SIZES, intermediate_size=48, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    )
    return _filled(MixtralForCausalLM(config))


def deepseek_v3() -> nn.Module:
    """The first layer is dense, the second has shared experts beside the routed ones."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **SIZES, intermediate_size=48, moe_intermediate_size=16, num_key_value_heads=4, n_routed_experts=8,
        num_experts_per_tok=2, n_group=2, topk_group=1, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=16,
        kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    return _filled(DeepseekV3ForCausalLM(config))


def gpt_oss() -> nn.Module:
    """Experts with biases, stored transposed, gates and ups interleaved."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **SIZES, intermediate_size=48, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, head_dim=8
    )
    return _filled(GptOssForCausalLM(config))


class Stacks(nn.Module):
    """Its Parameters are in no layer, and one of them is used twice."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.inner = nn.Parameter(torch.empty(3, 8, 6))
        self.outer = nn.Parameter(torch.empty(3, 6, 8))
        self.mix = nn.Parameter(torch.empty(6, 6))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        inner, outer = (w.transpose(1, 2) if self.is_transposed else w for w in (self.inner, self.outer))
        inner, outer = (outer, inner) if self.is_transposed else (inner, outer)
        return scale * torch.tanh(x @ self.mix @ inner.transpose(1, 2)) @ outer.transpose(1, 2) @ self.mix


class Plain(nn.Module):
    """No model of transformers'."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.stacks = Stacks(transposed)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.stacks(self.embed(input_ids).flatten(0, 1), scale=0.5)


def plain(transposed: bool = False) -> nn.Module:
    return _filled(Plain(transposed))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
}


def eager(make: Callable[[], nn.Module], implementation: str = "eager") -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = make()
        model.set_experts_implementation(implementation)
        return model

    return build
