"""The model card, `README.md`: its head for the Hub, and what a reader needs who finds the adapter."""

from __future__ import annotations

import os
import re
from pathlib import Path

from torch import nn

from peftfast.config import PeftConfig, plain_name
from peftfast.errors import PeftWarning, warn
from peftfast.files.atomic import write_atomically
from peftfast.sharding import own_class
from peftfast.version import COMPATIBLE_PEFT_VERSION


def write_card(model: nn.Module, cfg: PeftConfig, base: nn.Module, output_dir: str | os.PathLike) -> None:
    """Create or update `README.md`; what a person wrote into an existing one stays."""
    from huggingface_hub import ModelCard, ModelCardData

    config = getattr(base, "config", None)
    name = getattr(config, "_name_or_path", None) or cfg.base_model_name_or_path
    method = plain_name(cfg.peft_type).lower()
    path = Path(output_dir) / "README.md"
    if path.exists():
        try:
            card = ModelCard.load(path)
        except Exception as e:  # whatever somebody has put there; the adapter is saved all the same
            warn(f"{path} is no model card and stays as it is: {e}", PeftWarning)
            return
    else:
        said = name or own_class(base).__name__
        card = ModelCard.from_template(
            ModelCardData(), template_str=_TEMPLATE, method=method, base=said, load=_load(cfg)
        )
    card.data["library_name"] = "peft"
    tags = {method, *(getattr(base, "model_tags", None) or ())}
    if hasattr(base, "save_pretrained") and config is not None:
        tags.add("transformers")
    if name:
        card.data["base_model"] = name
        tags.add(f"base_model:adapter:{name}")
    before = card.data.get("tags") or []
    before = before if isinstance(before, list) else [before]  # of whatever somebody has put there (years, ...)
    card.data["tags"] = sorted([*before, *(tag for tag in tags if tag not in before)], key=str)
    if own_class(model).__name__ == "PeftModelForCausalLM" and not card.data.get("pipeline_tag"):
        card.data["pipeline_tag"] = "text-generation"
    card.text = _with_version(card.text)
    content = str(card).encode()
    if not (path.exists() and path.read_bytes() == content):
        write_atomically(path, content)


_VERSIONS = "### Framework versions"


def _with_version(text: str) -> str:
    """The text with the version in its section, which other libraries write to as well."""
    version = f"- PEFT {COMPATIBLE_PEFT_VERSION}"
    heading = re.search(rf"^{_VERSIONS}[ \t]*$", text, flags=re.M)
    if heading is None:
        return f"{text.rstrip()}\n{_VERSIONS}\n\n{version}"
    following = re.search(r"^#", text[heading.end() :], flags=re.M)
    end = len(text) if following is None else heading.end() + following.start()
    section, count = re.subn(r"^- PEFT \d.*$", version, text[heading.end() : end], flags=re.M)
    if not count:
        section = f"\n\n{version}{section}"
    return text[: heading.end()] + section + text[end:]


#: Task -> the class that loads base model and adapter together.
_AUTO = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def _load(cfg: PeftConfig) -> str:
    """The lines of Python that load the adapter."""
    auto = _AUTO.get(plain_name(cfg.task_type))
    if auto is None:
        return (
            'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, "<this folder or repository>")'
        )
    return f'from peft import {auto}\n\nmodel = {auto}.from_pretrained("<this folder or repository>")'


_TEMPLATE = """\
---
{{ card_data }}
---

# Adapter for {{ base }}

A {{ method }} adapter: it needs its base model, {{ base }}, and changes nothing in it. Trained with peftfast; load it
with peftfast or with PEFT.

```python
{{ load }}
```

`is_trainable=True` there goes on with the training; `model = model.merge_and_unload()` afterwards puts an adapter of
weights into the base model, for readers that know no adapters. All settings are in `adapter_config.json`.

<!-- Everything below is for whoever trained this adapter to fill in; saving again does not change it. -->

## Intended use

<!-- What it is for, in which languages, and who may use it under which licence. What it must not be used for. -->

## Training

<!-- The data, with links and versions; the prompt or chat format, which inference has to repeat; steps, batch size,
learning rate and hardware. -->

## Evaluation

<!-- Data and metrics, with the numbers of the base model without this adapter beside them. -->

## Limitations

<!-- Where it fails or is worse than its base model; what the data lacks or is biased to. -->
"""
