"""Default target modules by `config.model_type`, PEFT 0.21.2's; `targets.discover_targets` serves the rest."""

from __future__ import annotations

_QV = ["q_proj", "v_proj"]

LORA: dict[str, list[str] | str] = {
    **dict.fromkeys(
        (
            "llama", "llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "mistral", "mixtral", "stablelm",
            "opt", "gptj", "gpt_neo", "bart",
        ),  # fmt: skip
        _QV,
    ),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "gpt_neox": ["query_key_value"],
    "bloom": ["query_key_value"],
    "falcon": ["query_key_value"],
    "RefinedWeb": ["query_key_value"],
    "RefinedWebModel": ["query_key_value"],
    "chatglm": ["query_key_value"],
    "gpt2": ["c_attn"],
    "gpt_bigcode": ["c_attn"],
    "btlm": ["c_proj", "c_attn"],
    "codegen": ["qkv_proj"],
    "mpt": ["Wqkv"],
    **{kind: ["query", "value"] for kind in ("bert", "roberta", "xlm-roberta", "electra", "layoutlm")},
    "deberta": ["in_proj"],
    "deberta-v2": ["query_proj", "value_proj"],
    "t5": ["q", "v"],
    "mt5": ["q", "v"],
    "blip-2": ["q", "v", "q_proj", "v_proj"],
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
}  # fmt: skip

_ADALORA_SAME = (
    "llama", "llama4", "gemma", "gemma2", "gemma3_text", "gemma4", "qwen2", "qwen3", "gptj", "gpt_neo", "gpt_neox",
    "bloom", "gpt2", "gpt_bigcode", "bert", "deberta", "nemotron_h",
)  # fmt: skip

ADALORA: dict[str, list[str] | str] = {
    **{kind: LORA[kind] for kind in _ADALORA_SAME},
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "roberta": ["query", "key", "value", "dense"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}

#: IA3: model type -> (targets, those of them whose input is scaled).
_IA3_ROWS: dict[str, tuple[list[str], list[str]]] = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "mistral": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    **{
        kind: (["q_proj", "v_proj", "down_proj"], ["down_proj"])
        for kind in ("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3")
    },
    "mixtral": (["k_proj", "v_proj", "w2"], ["w2"]),
    "phi": (["q_proj", "v_proj", "fc2"], ["fc2"]),
    "opt": (["q_proj", "k_proj", "fc2"], ["fc2"]),
    "gptj": (["q_proj", "v_proj", "fc_out"], ["fc_out"]),
    "gpt_neo": (["q_proj", "v_proj", "c_proj"], ["c_proj"]),
    "gpt_neox": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "bloom": (["query_key_value", "mlp.dense_4h_to_h"], ["mlp.dense_4h_to_h"]),
    **{
        kind: (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"])
        for kind in ("falcon", "RefinedWeb", "RefinedWebModel")
    },
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "gpt_bigcode": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
    "roberta": (["key", "value", "output.dense"], ["output.dense"]),
    "deberta": (["in_proj", "output.dense"], ["output.dense"]),
    "deberta-v2": (["key_proj", "value_proj", "output.dense"], ["output.dense"]),
    "t5": (["k", "v", "wo"], ["wo"]),
    "mt5": (["k", "v", "wi_1"], []),
    "bart": (["q_proj", "v_proj", "fc2"], ["fc2"]),
}

IA3: dict[str, list[str]] = {kind: targets for kind, (targets, _) in _IA3_ROWS.items()}
IA3_FEEDFORWARD: dict[str, list[str]] = {kind: inputs for kind, (_, inputs) in _IA3_ROWS.items()}
