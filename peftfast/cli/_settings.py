"""The settings of a training run: options, defaults, and what can be refused before anything heavy is imported."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftfast.cli import UserError

ADAPTER_CONFIG = "adapter_config.json"
STATE_FILE = "training_state.pt"
EMBEDDED = "embedded"
EMBEDDED_BASE = Path(__file__).resolve().parent.parent / "assets" / "base"

#: `--dtype` -> torch's name
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
#: What an option that was not given means. `lr` and `dtype` follow from the model and the device, `r` and `target` from
#: the method.
DEFAULTS: dict[str, Any] = {
    "model": EMBEDDED,
    "data": EMBEDDED,
    "method": "lora",
    "r": None,
    "alpha": 16.0,
    "dropout": 0.0,
    "target": None,
    "set": {},
    "dtype": None,
    "quantize": "none",
    "steps": 120,
    "batch_size": 8,
    "seq_len": 256,
    "lr": None,
    "seed": 0,
    "output": "peftfast-adapter",
    "device": None,
    "gradient_checkpointing": False,
    "save_every": 0,
    "prompt": None,
}
#: What may differ between a run and its continuation; anything else would make it another run.
FREE_ON_RESUME = {"steps", "output", "device", "save_every", "prompt", "resume"}
EMBEDDED_LR, OTHER_LR = 1e-2, 2e-4


def whole(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum or (maximum is not None and value > maximum):
            most = "" if maximum is None else f" and at most {maximum}"
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}{most}, got {text!r}")
        return value

    return parse


def real(expects: str, valid: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not valid(value):  # nan fails every comparison
            raise argparse.ArgumentTypeError(f"must be {expects}, got {text!r}")
        return value

    return parse


SEED = whole(0, 2**64 - 1)
POSITIVE = real("a number above 0", lambda v: 0 < v < math.inf)


def field_value(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"must be FIELD=VALUE, for example use_rslora=true, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value  # a bare word: init_lora_weights=pissa


def add_model(group: argparse._ActionsContainer) -> None:
    group.add_argument("--model", metavar="PATH_OR_HUB_ID", help="causal language model (default: the embedded one)")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the base model; the adapter stays in fp32 (fp32 on a CPU, else bf16 where the device has it)",
    )


def add_storage(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--quantize", choices=("none", "nf4", "fp4", "int8"), help="store the base model so, with bitsandbytes (none)"
    )
    group.add_argument("--device", help="for example cpu, cuda, cuda:1, xpu, mps (the fastest there is)")


def add_base(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--model", metavar="PATH_OR_HUB_ID", help=f"base model, a causal language model ({default})")
    parser.add_argument("--dtype", choices=DTYPES, help="that weights are loaded in (as they are)")


def add_adapter(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapter")
    group.add_argument("--method", help="kind of adapter, as adapter_config.json names it, in lower case (lora)")
    group.add_argument("--r", type=whole(1), metavar="N", help="rank (8); of AdaLoRA, the one it starts with (12)")
    group.add_argument("--alpha", type=POSITIVE, help=f"scale of the update is alpha / r ({DEFAULTS['alpha']:g})")
    group.add_argument(
        "--dropout",
        type=real("a number from 0 up to, not including, 1", lambda v: 0 <= v < 1),
        help="on the adapter's input (0)",
    )
    group.add_argument(
        "--target",
        action="append",
        metavar="NAMES",
        help="module names, repeated or with commas; or all-linear (all-linear; the embedding for trainable_tokens)",
    )
    group.add_argument(
        "--set",
        action="append",
        type=field_value,
        metavar="FIELD=VALUE",
        help="any other field of the method's config, value as JSON or a bare word; repeatable",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Every default is None, so that a continued run can tell what was given from what was not.
    group = parser.add_argument_group("model and data")
    add_model(group)
    group.add_argument(
        "--data",
        metavar="FILE_OR_DATASET",
        help="a text file; a JSONL file whose lines hold text, prompt and "
        "completion, or messages; or a Hub dataset with such columns (default: pydoc's topics)",
    )
    group.add_argument("--seq-len", type=whole(2), metavar="N", help=f"tokens per sequence ({DEFAULTS['seq_len']})")
    add_storage(group)

    add_adapter(parser)

    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=whole(1), metavar="N", help=f"optimizer steps ({DEFAULTS['steps']})")
    group.add_argument(
        "--batch-size", type=whole(1), metavar="N", help=f"sequences per step ({DEFAULTS['batch_size']})"
    )
    group.add_argument(
        "--lr", type=POSITIVE, help=f"highest learning rate ({OTHER_LR:g}; {EMBEDDED_LR:g} for the embedded model)"
    )
    group.add_argument("--seed", type=SEED, metavar="N", help="of initialisation, order, dropout and sampling (0)")
    group.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        default=None,
        help="recompute activations in the backward pass: less memory, about a third slower",
    )

    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", metavar="DIR", help=f"adapter's folder ({DEFAULTS['output']}); an adapter there is replaced"
    )
    group.add_argument("--save-every", type=whole(1), metavar="N", help="also save every N steps (only at the end)")
    group.add_argument(
        "--resume",
        action="store_true",
        default=None,
        help="continue the run saved in --output, with its settings; a larger --steps prolongs it",
    )
    group.add_argument("--prompt", metavar="TEXT", help="what the samples start from (the start of a held-out text)")


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The options on the command line, in their final form."""
    values = {k: v for k, v in vars(args).items() if v is not None and k in {*DEFAULTS, "resume"}}
    if "target" in values:
        names = [n.strip() for part in values["target"] for n in part.split(",") if n.strip()]
        if not names:
            raise UserError(
                f"--target {values['target'][0]!r} names no module; give names such as q_proj,v_proj, or all-linear"
            )
        if "all-linear" in names and len(names) > 1:
            raise UserError(f"--target: all-linear stands alone, got {', '.join(names)}")
        values["target"] = "all-linear" if names == ["all-linear"] else names
    for name in ("model", "data"):
        # Absolute, so that a run can be resumed from another folder.
        if name in values and (path := place(values[name], f"--{name}")).exists():
            values[name] = str(path.resolve())
    if "set" in values:
        values["set"] = dict(values["set"])
    return values


def place(text: str, option: str) -> Path:
    """The path that an option means; whether something is there can be asked of it."""
    try:
        path = Path(text).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, RuntimeError) as error:  # too long a name, a folder that is closed, a home that nobody knows
        raise UserError(f"{option} {text!r}: {error}") from None
    return path


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    return {**DEFAULTS, **values}


def continued(values: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """The saved run's settings, with what may change taken from the command line."""
    for name, value in values.items():
        if name not in FREE_ON_RESUME and saved.get(name, DEFAULTS[name]) != value:
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{option} {value!r}: the run to resume has {saved.get(name)!r}; leave {option} out, or start a new "
                "run in another --output"
            )
    return with_defaults({**saved, **{k: v for k, v in values.items() if k in FREE_ON_RESUME}})


def check_output(folder: Path, resume: bool) -> None:
    """Refuse a folder that must not or cannot be written, or that holds nothing to resume."""
    if resume:
        if not (folder / STATE_FILE).is_file():
            raise UserError(
                f"--resume: no {STATE_FILE} in {str(folder)!r}; --output must name the folder of an earlier run"
            )
    elif folder.exists() and not folder.is_dir():
        raise UserError(f"--output {str(folder)!r} is a file; name a new folder or one that holds an adapter")
    elif folder.is_dir() and any(folder.iterdir()) and not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"--output {str(folder)!r} is not empty and holds no {ADAPTER_CONFIG}: nothing there is overwritten; name "
            "a new folder, an empty one, or one that holds an adapter"
        )
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    try:
        os.rmdir(tempfile.mkdtemp(dir=existing))  # permissions are not all: there are quotas, for one
    except OSError as error:
        raise UserError(f"--output {str(folder)!r}: cannot write to {str(existing)!r}: {error.strerror}") from None


def check_new(folder: Path) -> None:
    """Refuse a folder that has something in it, or that cannot be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"--output {str(folder)!r} is there already; nothing is overwritten, name a new or empty folder"
        )
    check_output(folder, resume=False)


def check_adapter(adapter: str) -> str:
    """The folder of a saved adapter."""
    path = place(adapter, "the adapter")
    if not (path / ADAPTER_CONFIG).is_file():
        raise UserError(f"{adapter!r} holds no {ADAPTER_CONFIG}; name the folder that an adapter was saved to")
    return str(path)


def base_of(adapter: str) -> str:
    """The base model that an adapter's config names."""
    try:
        name = json.loads((Path(adapter) / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{adapter!r}: its {ADAPTER_CONFIG} is damaged: {error}") from error
    if not isinstance(name, str) or not name:
        raise UserError(f"the adapter in {adapter!r} does not name its base model: give --model")
    return name


def check_model(model: str, option: str = "--model") -> str:
    """Where to load the model from: the embedded folder, a folder, or a Hub id."""
    if model == EMBEDDED:
        return str(EMBEDDED_BASE)
    path = place(model, option)
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = "; it holds an adapter: name its base model" if (path / ADAPTER_CONFIG).is_file() else ""
            raise UserError(f"{option} {model!r} is a folder without config.json{hint}")
        return str(path)
    if path.exists() or looks_like_a_path(model):
        raise UserError(f"{option} {model!r}: no such folder; give a model's folder or a Hub id such as owner/name")
    return model


def check_quantize(kind: str) -> None:
    if kind != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"--quantize {kind!r} needs the package bitsandbytes, which is not installed (pip install bitsandbytes); "
            "--quantize none needs nothing"
        )


def looks_like_a_path(text: str) -> bool:
    return text.startswith((".", "/", "~", os.sep)) or text.count("/") > 1 or "\\" in text
