"""Tiny models of every family, and the same adapter in PEFT and here."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import oracle
import peft
import pytest
import torch
import transformers as t

import peftfast

VOCAB = 64
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _llama(cls: str = "LlamaForCausalLM", **kw: Any) -> Any:
    return getattr(t, cls)(t.LlamaConfig(**COMMON, num_key_value_heads=2, **kw))


def _qwen3() -> Any:
    return t.Qwen3ForCausalLM(t.Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=16))


def _mistral() -> Any:
    return t.MistralForCausalLM(t.MistralConfig(**COMMON, num_key_value_heads=2, head_dim=8, sliding_window=6))


def _gemma2() -> Any:
    return t.Gemma2ForCausalLM(t.Gemma2Config(**COMMON, num_key_value_heads=2, head_dim=8, sliding_window=6))


def _gemma3() -> Any:
    return t.Gemma3ForCausalLM(
        t.Gemma3TextConfig(**COMMON, num_key_value_heads=2, head_dim=8, sliding_window=6,
                           layer_types=["sliding_attention", "full_attention"])
    )  # fmt: skip


def _gemma4(heads: int = 2, shared: int = 0) -> Any:
    """Sliding layers with 2 key/value heads of 8, full ones with `heads` of 16."""
    config = {**COMMON, "num_hidden_layers": 4}
    return t.Gemma4ForCausalLM(
        t.Gemma4TextConfig(**config, num_key_value_heads=2, head_dim=8, global_head_dim=16, sliding_window=6,
                           num_global_key_value_heads=heads, num_kv_shared_layers=shared, hidden_size_per_layer_input=0,
                           vocab_size_per_layer_input=VOCAB,
                           layer_types=["sliding_attention", "full_attention"] * 2)
    )  # fmt: skip


def _gpt2() -> Any:
    return t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
                     pad_token_id=0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    )  # fmt: skip


def _opt() -> Any:
    return t.OPTForCausalLM(
        t.OPTConfig(vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                    max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0, pad_token_id=0, bos_token_id=1,
                    eos_token_id=2)
    )  # fmt: skip


def _bloom() -> Any:
    return t.BloomForCausalLM(
        t.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0, bos_token_id=1,
                      eos_token_id=2)
    )  # fmt: skip


def _mamba(kind: str) -> Any:
    more = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4} if kind == "Mamba2" else {}
    return getattr(t, f"{kind}ForCausalLM")(
        getattr(t, f"{kind}Config")(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0,
                                    bos_token_id=1, eos_token_id=2, **more)
    )  # fmt: skip


def _t5() -> Any:
    return t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
                   pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)
    )  # fmt: skip


def _bert(cls: str) -> Any:
    return getattr(t, cls)(
        t.BertConfig(**COMMON, max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                     num_labels=3 if "Token" in cls else 2)
    )  # fmt: skip


MODELS = {
    "llama": _llama,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "gpt2": _gpt2,
    "opt": _opt,
    "bloom": _bloom,
    "t5": _t5,
    "bert": lambda: _bert("BertModel"),
    "bert-seq": lambda: _bert("BertForSequenceClassification"),
    "bert-token": lambda: _bert("BertForTokenClassification"),
    "bert-qa": lambda: _bert("BertForQuestionAnswering"),
    "llama-seq": lambda: _llama("LlamaForSequenceClassification"),
}
CAUSAL = ("llama", "qwen3", "mistral", "gemma2", "gemma3", "gemma4", "gpt2", "opt")
RECURRENT = {
    "mamba": lambda: _mamba("Mamba"),
    "mamba2": lambda: _mamba("Mamba2"),
    "falcon-mamba": lambda: _mamba("FalconMamba"),
}
TASKS = {"t5": "SEQ_2_SEQ_LM", "bert": "FEATURE_EXTRACTION", "bert-seq": "SEQ_CLS", "llama-seq": "SEQ_CLS",
         "bert-token": "TOKEN_CLS", "bert-qa": "QUESTION_ANS"}  # fmt: skip
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {}),
    "mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 16}),
    "lstm": ("PromptEncoderConfig", {"encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"}),
    "prefix": ("PrefixTuningConfig", {}),
    "projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 16}),
}


def base(family: str, seed: int = 0) -> Any:
    """A model with weights large enough for attention to matter."""
    if family == "gemma4" and not hasattr(t, "Gemma4ForCausalLM"):
        pytest.skip(f"transformers {t.__version__} has no Gemma 4")
    torch.manual_seed(seed)
    model = {**MODELS, **RECURRENT}[family]()
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2, generator=generator)
    return model.eval()


def config(library: Any, method: str, family: str, **changes: Any) -> Any:
    name, settings = METHODS[method]
    settings = {"task_type": TASKS.get(family, "CAUSAL_LM"), "num_virtual_tokens": 3, **settings, **changes}
    return getattr(library, name)(**copy.deepcopy(settings))


def ours(family: str, method: str = "prompt", model: Any = None, **changes: Any) -> Any:
    model = base(family) if model is None else model
    torch.manual_seed(7)
    return peftfast.get_peft_model(model, config(peftfast, method, family, **changes))


def theirs(family: str, method: str = "prompt", model: Any = None, **changes: Any) -> Any:
    model = base(family) if model is None else model
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config(peft, method, family, **changes))


def pair(family: str, method: str, **changes: Any) -> tuple[Any, Any]:
    """(here, in PEFT), in fp64 with the same parameters: the base's weights and the encoder's are copied."""
    mine, other = ours(family, method, **changes), theirs(family, method, **changes)
    source = dict(other.named_parameters())
    names = [n for n, p in mine.named_parameters() if p.requires_grad]
    assert names == [n for n, p in source.items() if p.requires_grad]
    with torch.no_grad():
        for name, parameter in mine.named_parameters():
            parameter.copy_(source[name])
    return mine.double(), other.double()


def batch(family: str, padding: str = "left", rows: int = 3, length: int = 7) -> dict[str, Any]:
    """Token ids with two rows padded, and labels."""
    torch.manual_seed(3)
    ids = torch.randint(3, VOCAB, (rows, length))
    mask = torch.ones_like(ids)
    for row, count in ((0, 2), (1, 1)):
        where = slice(0, count) if padding == "left" else slice(length - count, length)
        if padding != "none":
            mask[row, where] = 0
            ids[row, where] = 0
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    task = TASKS.get(family, "CAUSAL_LM")
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        inputs["labels"] = ids.masked_fill(mask == 0, -100)
    elif task == "SEQ_CLS":
        inputs["labels"] = torch.arange(rows) % 2
    elif task == "TOKEN_CLS":
        inputs["labels"] = ids % 3
    elif task == "QUESTION_ANS":
        inputs["start_positions"], inputs["end_positions"] = torch.ones(rows).long(), torch.full((rows,), 4)
    return inputs


def result(output: Any) -> torch.Tensor:
    """What a model says, whatever its head."""
    if getattr(output, "logits", None) is not None:
        return output.logits
    if getattr(output, "start_logits", None) is not None:
        return torch.stack([output.start_logits, output.end_logits])
    return output.last_hidden_state


def loss(output: Any) -> torch.Tensor:
    own = getattr(output, "loss", None)
    return result(output).square().mean() if own is None else own


def gradients(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model(**inputs)).backward()
    return oracle.gradients(model)


def assert_same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-9) -> None:
    """In fp64, by default; what is smaller than 1e-4 is compared as if it were 1e-4."""
    assert a.shape == b.shape and a.dtype == b.dtype
    scale = b.abs().max().clamp_min(1e-4)
    assert ((a - b).abs().max() / scale).item() <= tolerance
