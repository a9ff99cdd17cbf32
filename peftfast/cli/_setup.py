"""From settings to what training needs: device, config, tokenizer, base model. What does not fit is refused here."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftfast.cli import UserError, _settings
from peftfast.cli._settings import DTYPES
from peftfast.errors import close_matches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peftfast import PeftConfig

#: Option -> the config fields that it may set: the first that the method has. (AdaLoRA has an `r` that is not used.)
FIELDS = {
    "r": ("init_r", "r"),
    "alpha": ("lora_alpha",),
    "dropout": ("lora_dropout",),
    "target": ("target_modules",),
}


def complete(settings: dict[str, Any]) -> None:
    """Fill in, in place, what follows from the machine and the model."""
    import torch

    device = settings["device"] = choose_device(settings["device"])
    if settings["dtype"] is None:
        settings["dtype"] = "bf16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "fp32"
    if settings["lr"] is None:
        embedded = settings["model"] == _settings.EMBEDDED
        settings["lr"] = _settings.EMBEDDED_LR if embedded else _settings.OTHER_LR


def choose_device(name: str | None) -> str:
    """`name` if it can be used here, or the fastest device there is."""
    import torch

    found = [f"{kind}:{i}" for kind in ("cuda", "xpu") for i in range(torch.get_device_module(kind).device_count())]
    found += ["mps"] if torch.backends.mps.is_available() else []
    found.append("cpu")
    if name is None:
        return found[0].removesuffix(":0")
    if name not in found and f"{name}:0" not in found:
        raise UserError(f"--device {name!r} is not available here; choose from {', '.join(found)}")
    return name


#: Methods by the names of their papers that are fields of LoRA's config, or the base that it stands on.
_LORA_WITH = {
    "dora": "--set use_dora=true",
    "rslora": "--set use_rslora=true",
    "qlora": "--quantize nf4",
    **{init: f"--set init_lora_weights={init}" for init in ("pissa", "olora")},
}


#: Initialisations that go by data, and what makes them.
_FROM_DATA = {
    "eva": "initialize_lora_eva_weights",
    "corda": "preprocess_corda",
    "lora_ga": "preprocess_loraga",
}


def check_trainable(config: PeftConfig) -> None:
    """Refuse what a command that trains does not do, where the adapter would start, and be saved, as another."""
    if config.inference_mode:
        raise UserError("--set inference_mode=true leaves nothing to train")
    if getattr(config, "token_indices", None) == []:
        raise UserError("--method trainable_tokens needs the rows to train: --set token_indices=[...]")
    init = getattr(config, "init_lora_weights", None)
    if init in _FROM_DATA:
        raise UserError(
            f"--set init_lora_weights={init} goes by data before the training, which this command does not do; in a "
            f"script, peftfast.{_FROM_DATA[init]} does"
        )


def make_config(settings: dict[str, Any]) -> PeftConfig:
    """The method's config from the options, of which what was not given is filled in, in place; fields that a method
    lacks may not be given."""
    import peftfast.methods  # noqa: F401  (registers every method)
    from peftfast.config import PEFT_TYPE_TO_CONFIG_MAPPING, plain_name
    from peftfast.method import METHODS, chooses_targets

    classes = {plain_name(k).lower(): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    method = settings["method"].lower()
    if method in _LORA_WITH:
        raise UserError(f"--method {settings['method']!r} is LoRA with a setting of its own: {_LORA_WITH[method]}")
    if method not in classes:
        raise UserError(
            f"--method {settings['method']!r} is unknown here; choose from {', '.join(sorted(classes))}."
            + close_matches(method, classes, 1)
        )
    cls = classes[method]
    names = {f.name: f.default for f in fields(cls)}
    values: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if (task := settings["set"].get("task_type", "CAUSAL_LM")) != "CAUSAL_LM":
        raise UserError(f"--set task_type={task}: this command trains models that write text, CAUSAL_LM")
    if "total_step" in names and "total_step" not in settings["set"] and "steps" in settings:
        values["total_step"] = settings["steps"]  # of a schedule: as long as the run
    starts_from_text = settings["set"].get("prompt_tuning_init") == "TEXT"
    if starts_from_text and "tokenizer_name_or_path" in names and "tokenizer_name_or_path" not in settings["set"]:
        values["tokenizer_name_or_path"] = _settings.check_model(settings["model"])
    if "target_modules" in names and not any(chooses_targets(m) and m.peft_type.lower() == method for m in METHODS):
        names["target_modules"] = "all-linear"
    for option, candidates in FIELDS.items():
        name, value = next((n for n in candidates if n in names), None), settings[option]
        if name in settings["set"]:
            if value is None and name != candidates[-1]:
                continue
            raise UserError(f"--set {name}={settings['set'][name]}: use --{option}")
        if name is not None:
            values[name] = settings[option] = names[name] if value is None else value
        elif value != _settings.DEFAULTS[option]:
            raise UserError(
                f"--{option}: {cls.__name__} has no field {candidates[-1]}; it has {', '.join(sorted(names))}"
            )
    if "lora_alpha" in values and values["lora_alpha"] == int(values["lora_alpha"]):
        values["lora_alpha"] = int(values["lora_alpha"])  # as PEFT writes it
    with one_line(f"--method {method}"):
        return cls(**{**values, **settings["set"]})


def load_tokenizer(source: str, name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with one_line(f"{name!r}: no tokenizer could be loaded"):
        return AutoTokenizer.from_pretrained(source)


def own_tokenizer(adapter: str, name: str) -> PreTrainedTokenizerBase | None:
    """What was saved beside an adapter, which may have tokens of its own."""
    return load_tokenizer(adapter, name) if (Path(adapter) / "tokenizer_config.json").exists() else None


def load_base(source: str, settings: dict[str, Any]) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from peftfast.base.bnb4 import keep_layout

    dtype = getattr(torch, DTYPES[settings["dtype"]])
    options: dict[str, Any] = {"dtype": dtype}
    kind = settings["quantize"]
    if kind != "none":
        options["device_map"] = {"": settings["device"]}
        options["quantization_config"] = (
            BitsAndBytesConfig(load_in_8bit=True)
            if kind == "int8"
            else BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=kind,
                bnb_4bit_compute_dtype=dtype,
                bnb_4bit_use_double_quant=True,
            )
        )
    with one_line(f"--model {settings['model']!r} could not be loaded"):
        model = AutoModelForCausalLM.from_pretrained(source, **options)
    for module in model.modules():
        keep_layout(module)
    model.config.use_cache = False  # training; generate() asks for its cache itself
    return model if kind != "none" else model.to(settings["device"])


def load_stored(source: str, name: str, dtype: str | None) -> PreTrainedModel:
    """The model as it is stored, or in `dtype`, on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    with one_line(f"{name!r} could not be loaded"):
        return AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, DTYPES[dtype]) if dtype else "auto")


def load_empty(source: str, name: str, dtype: str | None) -> PreTrainedModel:
    """The model's modules without its weights, on the meta device: for what looks at shapes only."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with one_line(f"--model {name!r} could not be loaded"):
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, DTYPES[dtype or "fp32"]))
    model.tie_weights()
    return model


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn what a library refuses into one line that says which option it was about."""
    try:
        yield
    except (ValueError, TypeError, KeyError, OSError, RuntimeError, ImportError, NotImplementedError) as error:
        raise UserError(f"{what}: {error}") from error


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a full disk, and whatever else keeps files from being written, into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--output {str(folder)!r} could not be written: {error}", exit_code=1) from error


def check_length(model: PreTrainedModel, tokens: int, virtual: int = 0) -> int:
    """Refuse sequences that are longer than the model has positions, of which virtual tokens take some; returns how
    many are left for tokens of a text."""
    longest = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    if tokens + virtual > longest:
        more = f" and {virtual} virtual tokens" if virtual else ""
        raise UserError(f"--seq-len {tokens}{more}: this model has {longest} positions at most")
    return longest - virtual


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No bars and chatter of the libraries; warnings stay, as one line each."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *rest: print(f"  warning: {' '.join(str(message).split())}")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
