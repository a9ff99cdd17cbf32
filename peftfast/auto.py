"""AutoPeftModel: adapter and base model from the adapter's folder alone."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from peftfast.config import PeftConfig, TaskType, plain_name
from peftfast.files.atomic import find_file
from peftfast.model import PeftModel
from peftfast.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

#: Arguments of `PeftModel.from_pretrained` alone, and those that the base model's `from_pretrained` takes as well.
_OF_ADAPTER = {"autocast_adapter_dtype", "ephemeral_gpu_offload", "strict", "num_virtual_tokens", "torch_device"}
_OF_BOTH = {"low_cpu_mem_usage", "key_mapping", "ignore_mismatched_sizes"}

#: Libraries whose classes `auto_mapping` may name; a config is data and must not choose what is imported.
IMPORT_ALLOWLIST = ("transformers", "diffusers", "lerobot")


class _AutoPeftModel:
    auto_class: ClassVar[str | None] = None  # in transformers
    task_type: ClassVar[str | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(
            f"{type(self).__name__} is designed to be instantiated using the "
            f"`{type(self).__name__}.from_pretrained(pretrained_model_name_or_path)` method."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: tuple[str, ...] | list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that an adapter names, then the adapter.

        Args:
            revision: of the adapter; the base's is in the adapter's config.
            import_allowlist: libraries that `auto_mapping` may name; None: `IMPORT_ALLOWLIST`.
            kwargs: of the base model's `from_pretrained`, of `PeftModel.from_pretrained` and of `hf_hub_download`.
        """
        import transformers

        hub, others = PeftConfig._split_hub_arguments(kwargs)
        own = {name: value for name, value in others.items() if name in _OF_ADAPTER | _OF_BOTH}
        model_kwargs = {name: value for name, value in others.items() if name not in _OF_ADAPTER}
        cfg = PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision, **hub)
        if not cfg.base_model_name_or_path:
            raise ValueError(
                f"The adapter in {pretrained_model_name_or_path} does not name its base model; load that yourself, and "
                "the adapter onto it: PeftModel.from_pretrained(base, folder)"
            )
        peft_class = PeftModel if cls.task_type is None else MODEL_TYPE_TO_PEFT_MODEL_MAPPING[cls.task_type]
        if cls.task_type is not None and cfg.task_type not in (None, cls.task_type):
            raise ValueError(
                f"Expected target PEFT class: {MODEL_TYPE_TO_PEFT_MODEL_MAPPING[cfg.task_type].__name__}, but you have "
                f"asked for: {peft_class.__name__} make sure that you are loading the correct model for your task type."
            )
        if cls.auto_class is not None and (cfg.task_type is not None or cfg.auto_mapping is None):
            base_class = getattr(transformers, cls.auto_class)
        else:  # the class that the adapter was trained on, which is not always what this one would take
            base_class = cls._from_auto_mapping(cfg, import_allowlist)
        base = base_class.from_pretrained(
            cfg.base_model_name_or_path, revision=cfg.revision, **model_kwargs, **_of_base(cfg, hub)
        )
        trusted = bool(model_kwargs.get("trust_remote_code"))
        fit_vocabulary(base, pretrained_model_name_or_path, trusted, revision=revision, **hub)
        return peft_class.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name=adapter_name, is_trainable=is_trainable, config=config,
            revision=revision, **own, **hub,
        )  # fmt: skip

    @staticmethod
    def _from_auto_mapping(cfg: PeftConfig, import_allowlist: Any) -> Any:
        import importlib

        if cfg.task_type is not None:
            raise ValueError(
                "Cannot use `AutoPeftModel` with a task type, please use a specific class for your task type, "
                f"{plain_name(cfg.task_type)}. "
                "(e.g. `AutoPeftModelForCausalLM` for `task_type='CAUSAL_LM'`)"
            )
        if cfg.auto_mapping is None:
            raise ValueError(
                "Cannot infer the auto class from the config, please make sure that you are loading the correct model "
                "for your task type."
            )
        library, name = cfg.auto_mapping["parent_library"], cfg.auto_mapping["base_model_class"]
        allowed = IMPORT_ALLOWLIST if import_allowlist is None else tuple(import_allowlist)
        if not any(library == package or library.startswith(f"{package}.") for package in allowed):
            raise ValueError(
                f"The adapter's config asks to import {name!r} from {library!r}, which is not in the import allowlist "
                f"{list(allowed)}. If you trust it, pass import_allowlist=[{library!r}]."
            )
        return getattr(importlib.import_module(library), name)


def _of_base(cfg: PeftConfig, hub: dict[str, Any]) -> dict[str, Any]:
    """Hub arguments for the base model. A sub-folder is the adapter's, unless the base has one of the name too."""
    others = {name: value for name, value in hub.items() if name != "subfolder"}
    base, folder = cfg.base_model_name_or_path, hub.get("subfolder")
    if folder and find_file(base, "config.json", subfolder=folder, **{**others, "revision": cfg.revision}) is not None:
        return hub
    return others


def fit_vocabulary(base: Any, path: str | os.PathLike, trusted: bool = False, **hub: Any) -> None:
    """Resize the embeddings of a base model for an adapter that was saved with a larger tokenizer: it was trained so.

    Args:
        path: of the adapter. trusted: the code that it comes with may run. hub: of `hf_hub_download`.
    """
    found = find_file(path, "tokenizer_config.json", **hub)
    if found is None:
        return
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trusted, **hub)
    except OSError:  # offline it wants a model's config beside a repository's tokenizer; of a folder it does not
        tokenizer = AutoTokenizer.from_pretrained(os.path.dirname(found), trust_remote_code=trusted)
    if len(tokenizer) > base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(len(tokenizer))


class AutoPeftModel(_AutoPeftModel):
    """For adapters without a task type."""


class AutoPeftModelForCausalLM(_AutoPeftModel):
    auto_class, task_type = "AutoModelForCausalLM", TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(_AutoPeftModel):
    auto_class, task_type = "AutoModelForSeq2SeqLM", TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(_AutoPeftModel):
    auto_class, task_type = "AutoModelForSequenceClassification", TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(_AutoPeftModel):
    auto_class, task_type = "AutoModelForTokenClassification", TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(_AutoPeftModel):
    auto_class, task_type = "AutoModelForQuestionAnswering", TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(_AutoPeftModel):
    auto_class, task_type = "AutoModel", TaskType.FEATURE_EXTRACTION
