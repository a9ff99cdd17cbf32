"""Tiny random stand-ins for the models and adapters that PEFT's tests load from the hub, put where the hub's cache
would have them.

Names and kinds are the hub's; sizes are small and weights are random. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

REVISION = "0" * 40
TOKENS = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "mask_token": "<mask>"}
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}

GPT2 = {"vocab_size": 1024, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512, **SPECIAL}
LLAMA = {
    "vocab_size": 1024, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 2048, **SPECIAL,
}  # fmt: skip
GROUPED = LLAMA | {"num_key_value_heads": 2, "head_dim": 8}
OPT = {
    "vocab_size": 1024, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 5, "num_attention_heads": 4,
    "max_position_embeddings": 512, "word_embed_proj_dim": 32, **SPECIAL,
}  # fmt: skip
#: As deep and wide as opt-125m, with few tokens: tests count its layers and look at its shapes.
OPT_125M = OPT | {
    "vocab_size": 2000, "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "word_embed_proj_dim": 768, "max_position_embeddings": 2048,
}  # fmt: skip
BERT = {
    "vocab_size": 1124, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 5, "num_attention_heads": 4,
    "max_position_embeddings": 512,
}  # fmt: skip
T5 = {
    "vocab_size": 1103, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
BART = {
    "vocab_size": 1024, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4, "max_position_embeddings": 100,
    "decoder_start_token_id": 1, "forced_eos_token_id": 1, **SPECIAL,
}  # fmt: skip
WHISPER = {
    "vocab_size": 200, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_source_positions": 60,
    "max_target_positions": 40, "decoder_start_token_id": 85, "suppress_tokens": [], "begin_suppress_tokens": [],
    **SPECIAL,
}  # fmt: skip
MOE = GROUPED | {"intermediate_size": 32, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
LLAMA4 = GROUPED | {"intermediate_size": 32, "intermediate_size_mlp": 64, "num_local_experts": 4, "head_dim": 4}


def _opt_125m() -> PreTrainedModel:
    return t.OPTForCausalLM(t.OPTConfig(**OPT_125M)).half()


def _roberta(kind: type[PreTrainedModel]) -> Callable[[], PreTrainedModel]:
    return lambda: kind(t.RobertaConfig(**BERT, pad_token_id=0))


def _bart() -> PreTrainedModel:
    return t.BartForConditionalGeneration(t.BartConfig(**BART))


def _deberta() -> PreTrainedModel:
    relative = {"relative_attention": True, "pos_att_type": "p2c|c2p", "position_biased_input": False}
    return t.DebertaModel(t.DebertaConfig(**BERT, **relative, type_vocab_size=0))


def _resnet() -> PreTrainedModel:
    sizes = {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1]}
    return t.ResNetForImageClassification(t.ResNetConfig(**sizes))


#: What makes a model -> the names under which tests ask for it.
MODELS: dict[Callable[[], PreTrainedModel], tuple[str, ...]] = {
    lambda: t.OPTForCausalLM(t.OPTConfig(**OPT)): ("peft-internal-testing/tiny-random-OPTForCausalLM",),
    _opt_125m: ("peft-internal-testing/opt-125m", "facebook/opt-125m"),
    lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT2)): (
        "gpt2",
        "hf-internal-testing/tiny-random-gpt2",
        "peft-internal-testing/tiny-random-GPT2LMHeadModel",
        "peft-internal-testing/tiny-random-gpt2",
    ),
    lambda: t.GPTJForCausalLM(t.GPTJConfig(**GPT2, rotary_dim=4)): (
        "peft-internal-testing/tiny-random-GPTJForCausalLM",
    ),
    lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)): (
        "hf-internal-testing/tiny-random-LlamaForCausalLM",
        "peft-internal-testing/tiny-random-LlamaForCausalLM",
        "trl-internal-testing/tiny-random-LlamaForCausalLM",
    ),
    lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**LLAMA, num_labels=2)): (
        "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2",
    ),
    lambda: t.MistralForCausalLM(t.MistralConfig(**GROUPED)): ("hf-internal-testing/tiny-random-MistralForCausalLM",),
    lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**LLAMA | {"num_key_value_heads": 2})): (
        "Qwen/Qwen2-0.5B",
        "peft-internal-testing/tiny-dummy-qwen2",
    ),
    lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED)): ("trl-internal-testing/tiny-Qwen3ForCausalLM",),
    lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**GROUPED | {"hidden_size": 32})): (
        "hf-internal-testing/tiny-random-Gemma3ForCausalLM",
    ),
    lambda: t.MixtralForCausalLM(t.MixtralConfig(**GROUPED, num_local_experts=4)): (
        "hf-internal-testing/Mixtral-tiny",
    ),
    lambda: t.Llama4ForCausalLM(t.Llama4TextConfig(**LLAMA4)): ("trl-internal-testing/tiny-Llama4ForCausalLM",),
    lambda: t.GptOssForCausalLM(t.GptOssConfig(**GROUPED | {"intermediate_size": 32, "num_local_experts": 4})): (
        "trl-internal-testing/tiny-GptOssForCausalLM",
    ),
    lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**MOE)): (
        "hf-internal-testing/tiny-qwen3-moe",
        "trl-internal-testing/tiny-Qwen3MoeForCausalLM",
    ),
    lambda: t.BertModel(t.BertConfig(**BERT)): (
        "hf-internal-testing/tiny-random-BertModel",
        "peft-internal-testing/tiny-random-BertModel",
    ),
    lambda: t.BertForSequenceClassification(t.BertConfig(**BERT)): (
        "peft-internal-testing/tiny-random-BertForSequenceClassification",
    ),
    _roberta(t.RobertaModel): ("peft-internal-testing/tiny-random-RobertaModel",),
    _roberta(t.RobertaForSequenceClassification): (
        "peft-internal-testing/tiny-random-RobertaForSequenceClassification",
    ),
    _deberta: ("peft-internal-testing/tiny-random-DebertaModel",),
    lambda: t.DebertaV2Model(t.DebertaV2Config(**BERT)): ("peft-internal-testing/tiny-random-DebertaV2Model",),
    lambda: t.T5ForConditionalGeneration(t.T5Config(**T5)): (
        "google/flan-t5-base",
        "google/flan-t5-small",
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration",
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated",
        "peft-internal-testing/tiny-random-t5",
        "t5-small",
    ),
    _bart: ("peft-internal-testing/tiny-random-BartForConditionalGeneration",),
    lambda: t.WhisperForConditionalGeneration(t.WhisperConfig(**WHISPER)): (
        "peft-internal-testing/tiny-random-WhisperForConditionalGeneration",
    ),
    _resnet: ("peft-internal-testing/tiny-random-ResNetForImageClassification",),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, so that it takes any text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(TOKENS.values()), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["a tokenizer that nobody has to understand"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **TOKENS)


#: Adapters of the hub -> its base model above, and of which kind; by AutoModelFor... and task, if they have one.
ADAPTERS: dict[str, tuple[str, str, str | None]] = {
    "tiny-OPTForCausalLM-lora": ("tiny-random-OPTForCausalLM", "AutoModelForCausalLM", "CAUSAL_LM"),
    "tiny-random-OPTForCausalLM-extended-vocab": ("tiny-random-OPTForCausalLM", "AutoModelForCausalLM", "CAUSAL_LM"),
    "tiny_T5ForSeq2SeqLM-lora": ("tiny-random-t5", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "tiny_OPTForSequenceClassification-lora": (
        "tiny-random-OPTForCausalLM", "AutoModelForSequenceClassification", "SEQ_CLS",
    ),
    "tiny_GPT2ForTokenClassification-lora": ("tiny-random-gpt2", "AutoModelForTokenClassification", "TOKEN_CLS"),
    "tiny_OPTForQuestionAnswering-lora": (
        "tiny-random-OPTForCausalLM", "AutoModelForQuestionAnswering", "QUESTION_ANS",
    ),
    "tiny_OPTForFeatureExtraction-lora": ("tiny-random-OPTForCausalLM", "AutoModel", "FEATURE_EXTRACTION"),
    "tiny_WhisperForConditionalGeneration-lora": (
        "tiny-random-WhisperForConditionalGeneration", "WhisperForConditionalGeneration", None,
    ),
}  # fmt: skip
OWNER = "peft-internal-testing/"


@contextmanager
def _entry(cache: Path, name: str) -> Iterator[Path | None]:
    """Where to write what `name` stands for, in the layout of huggingface_hub; None: it is there."""
    entry = cache / f"models--{name.replace('/', '--')}"
    if (entry / "refs" / "main").exists():
        yield None
        return
    snapshot = entry / "snapshots" / REVISION
    snapshot.mkdir(parents=True, exist_ok=True)
    yield snapshot
    (entry / "refs").mkdir(exist_ok=True)
    (entry / "refs" / "main").write_text(REVISION)


def fill(cache: Path) -> None:
    """Write every model and adapter into `cache`, unless it is there."""
    torch.manual_seed(0)
    words = tokenizer()
    for make, names in MODELS.items():
        for name in names:
            with _entry(cache, name) as snapshot:
                if snapshot is not None:
                    make().save_pretrained(snapshot)
                    words.save_pretrained(snapshot)
    for name, (base, kind, task) in ADAPTERS.items():
        with _entry(cache, OWNER + name) as snapshot:
            if snapshot is not None:
                model = getattr(t, kind).from_pretrained(OWNER + base, cache_dir=cache, local_files_only=True)
                if name.endswith("extended-vocab"):
                    longer = tokenizer()
                    longer.add_tokens([f"<{i}>" for i in range(model.config.vocab_size + 8 - len(longer))])
                    longer.save_pretrained(snapshot)
                    model.resize_token_embeddings(len(longer))
                targets = ["q_proj", "v_proj"] if task is None else None
                config = peft.LoraConfig(task_type=task, target_modules=targets)
                peft.get_peft_model(model, config).save_pretrained(snapshot)
