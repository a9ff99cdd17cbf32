"""What every adapter config is: checked fields, `adapter_config.json`, and the registry from `peft_type` to class."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import json
import os
import reprlib
import typing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import dataclass_transform

from peftfast.errors import AdapterMismatchWarning, check_path, close_matches, warn
from peftfast.files.migrate import migrate_config
from peftfast.interop import absent
from peftfast.interop.alias import take_if_vacant
from peftfast.rules import Rule, boolean, integer, optional, sequence, table, text
from peftfast.version import COMPATIBLE_PEFT_VERSION

CONFIG_NAME = "adapter_config.json"
LARGEST_CONFIG = 1 << 26  # bytes; AdaLoRA's masks of a large model are about a million


class PeftType(str, enum.Enum):
    """Kinds of adapter, by the name `adapter_config.json` uses."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    IA3 = "IA3"
    PROMPT_TUNING = "PROMPT_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    P_TUNING = "P_TUNING"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"


class TaskType(str, enum.Enum):
    """What the model's head does; chooses the PeftModel subclass."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def plain_name(kind: PeftType | TaskType | str | None) -> str:
    """The name that files have: methods of others than peftfast register strings, and so may a task be given."""
    return str(getattr(kind, "value", kind))


#: Rules of fields. Not in the fields' metadata, all of which transformers' HfArgumentParser hands on to argparse.
_RULES: dict[Field, Rule] = {}


def setting(rule: Rule, *, default: Any) -> Any:
    """A config field: the rule every value of it is held to, and its default."""
    if isinstance(default, (dict, list, set)):
        made = field(default_factory=functools.partial(type(default), default))
    else:
        made = field(default=default)
    _RULES[made] = rule
    return made


def rule_of(f: Field) -> Rule | None:
    """The rule that values of a config's field are held to, if there is one."""
    return _RULES.get(f)


_C = typing.TypeVar("_C", bound=type)


@dataclass_transform(field_specifiers=(setting,))
def checked(cls: _C) -> _C:
    """Class decorator: a dataclass whose constructor refuses unknown fields with the nearest known one."""
    cls = dataclass(cls)
    generated = cls.__init__
    known = [f.name for f in fields(cls) if f.init]

    @functools.wraps(generated)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known:
                meant = getattr(cls, "_called_elsewhere", {}).get(name)
                hint = close_matches(name, known) if meant is None else f" Did you mean {meant!r}?"
                raise TypeError(
                    f"{cls.__name__}.__init__() got an unexpected keyword argument {name!r}.{hint} "
                    f"Known fields: {', '.join(known)}"
                )
        generated(self, *args, **kwargs)

    cls.__init__ = __init__
    return cls


@functools.cache
def _checks(cls: type) -> list[tuple[str, Rule, Any]]:
    """The fields of a checked dataclass that have a rule: name, rule, and the default, which needs no check where the
    rule keeps it as it is."""
    found = []
    for f in fields(cls):
        rule = rule_of(f)
        if rule is not None:
            kept = MISSING
            with suppress(TypeError, ValueError):
                kept = rule.enforce(f.default, f.name)
            found.append((f.name, rule, kept if kept is f.default else MISSING))
    return found


def check_fields(config: Any) -> None:
    """Hold every field of a checked dataclass to its rule, and keep it as the rule has it.

    Raises:
        TypeError: a value of the wrong type. ValueError: a value out of range. Both name class, field, value and what
            is expected.
    """
    for name, rule, default in _checks(type(config)):
        value = getattr(config, name)
        if value is default:
            continue
        kept = rule.enforce(value, f"{type(config).__name__}.{name}")
        if kept is not value:
            setattr(config, name, kept)


class CheckedFields:
    """Base of the small configs inside a config: fields are checked at construction."""

    def __post_init__(self) -> None:
        check_fields(self)


@checked
class PeftConfigMixin:
    """Fields and file format shared by all configs. Names, defaults and file contents are PEFT's.

    Args:
        task_type: a `TaskType` or its name, which chooses the class of PeftModel; None: the general one.
        peft_type: the method; every config class has its own.
        auto_mapping: of a config without a task type, class and library of the base model; filled in when it is saved.
        peft_version: of PEFT, whose fields these are.
    """

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = setting(optional(text()), default=None)
    auto_mapping: dict | None = setting(optional(table()), default=None)
    peft_version: str | None = setting(optional(text()), default=None)

    #: Fields of `hf_hub_download` that `from_pretrained` splits off; looked up once, on first use.
    _hub_arguments: ClassVar[frozenset[str] | None] = None
    #: What `register_config` says that instances are, whatever they are told.
    _registered_as: ClassVar[PeftType | str | None] = None

    def __post_init__(self) -> None:
        if self._registered_as is not None:
            self.peft_type = self._registered_as
        if self.peft_type in list(PeftType):
            self.peft_type = PeftType(self.peft_type)  # a file has the name only, and others ask for `.value`
        if self.peft_version is None:
            self.peft_version = COMPATIBLE_PEFT_VERSION
        if self.task_type is not None and self.task_type not in list(TaskType):
            raise ValueError(
                f"Invalid task type: {self.task_type!r}. Must be one of the following task types: "
                f"{', '.join(t.value for t in TaskType)}.{close_matches(self.task_type, [t.value for t in TaskType])}"
            )
        self.validate()
        take_if_vacant()

    def validate(self) -> None:
        """Check every field, then the combinations; subclasses add theirs. Called again before injection, because
        configs are mutable."""
        check_fields(self)

    # ---- dict and file ---------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """All fields as plain data."""
        return dataclasses.asdict(self)

    def to_json(self, auto_mapping: dict | None = None) -> str:
        """`adapter_config.json`: sorted fields, sets as sorted lists, so that the same config gives the same bytes.

        Tables keep their order: in a rank pattern the first match wins.
        """
        data = {k: _plain(v) for k, v in self.to_dict().items()}
        if auto_mapping is not None:
            data["auto_mapping"] = auto_mapping
        return json.dumps(dict(sorted(data.items())), indent=2)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write `adapter_config.json` into a folder, atomically.

        Args:
            save_directory: created if missing.
            auto_mapping_dict: stored as `auto_mapping`.
        """
        from peftfast.files.atomic import locked, write_atomically

        check_path(save_directory, "The folder to save to")
        if os.path.isfile(save_directory):
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        os.makedirs(save_directory, exist_ok=True)
        auto_mapping = kwargs.pop("auto_mapping_dict", None)
        if kwargs:
            raise TypeError(f"save_pretrained() got unexpected keyword arguments {sorted(kwargs)}")
        with locked(save_directory, exclusive=True):
            write_atomically(Path(save_directory) / CONFIG_NAME, self.to_json(auto_mapping).encode())

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload `adapter_config.json`; arguments as in transformers' `push_to_hub`. Returns the URL."""
        from peftfast.files.hub import upload

        return upload(self.save_pretrained, repo_id, "Upload config", **kwargs)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """What `from_pretrained` makes a config of, as it is; classes of somebody else's may have their say here."""
        return kwargs

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = "the given dict", *, strict: bool = False) -> PeftConfig:
        """The config that `data` describes; `data["peft_type"]` chooses the class, whatever class this is called on.

        Keys that the class does not know are dropped with a warning, so that files of newer versions load; `strict`
        refuses them.
        """
        data = dict(data)
        target = cls
        if data.get("peft_type") is not None:
            target = config_class(data["peft_type"])
        _drop_runtime_config(data, source)
        known = {f.name for f in fields(target)}
        unknown = sorted(set(data) - known)
        if unknown:
            if data.get("peft_type") is None:
                raise TypeError(
                    f"The {target.__name__} config that is trying to be loaded is missing required keys: "
                    f"{{'peft_type'}}. {source} is not an adapter config: {target.__name__} does not know its keys "
                    f"{unknown} either"
                )
            if strict:
                raise TypeError(f"The config in {source} has fields that {target.__name__} does not know: {unknown}")
            told = ", ".join(f"{key}={reprlib.repr(data[key])}" for key in unknown if data[key])
            meant = f" With {told} the adapter may compute something else; strict=True refuses it." if told else ""
            warn(
                f"Unexpected keyword arguments {unknown} for class {target.__name__}, these are ignored. This probably "
                "means that you're loading a configuration file that was saved using a higher version of the library."
                + meant,
                AdapterMismatchWarning,
            )
        return target(**{k: v for k, v in data.items() if k in known})

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Build the config class that `kwargs["peft_type"]` names."""
        return cls.from_dict(kwargs)

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike, **kwargs: Any) -> dict[str, Any]:
        """The raw dict of a config file, without what holds for the process that wrote it only."""
        data = _read_json(path_json_file)
        _drop_runtime_config(data, os.fspath(path_json_file))
        return data

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str | None = None,
        *,
        strict: bool = False,
        **kwargs: Any,
    ) -> PeftConfig:
        """Read `adapter_config.json` from a folder or a Hub repository.

        Args:
            strict: refuse fields that nobody knows, and arguments that the file contradicts.
            kwargs: of `hf_hub_download`; and fields, for what the file does not say.

        Raises:
            ValueError: no such file there, or not JSON.
        """
        require_flag(strict, "strict")
        hub, values = cls._split_hub_arguments(kwargs)
        path = find_config(pretrained_model_name_or_path, subfolder, **hub)
        known = config_fields() if values else ()  # others are for whoever else was given them, as in PEFT
        values = {k: v for k, v in values.items() if k in known}
        stored = _read_json(path)
        ignored = {k: v for k, v in values.items() if k in stored and stored[k] != _plain(v)}
        if ignored:
            said = ", ".join(f"{k}={v!r} (the file has {stored[k]!r})" for k, v in ignored.items())
            message = (
                f"What {path} says counts, so these arguments have no effect: {said}. To have it otherwise, read the "
                "config, change it, and pass it as config=."
            )
            if strict:
                raise TypeError(message)
            warn(message, AdapterMismatchWarning)
        data = cls.check_kwargs(**migrate_config({**values, **stored}))
        return cls.from_dict(data, source=str(path), strict=strict)

    @classmethod
    def _split_hub_arguments(cls, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        if PeftConfigMixin._hub_arguments is None:
            from huggingface_hub import hf_hub_download

            PeftConfigMixin._hub_arguments = frozenset(inspect.signature(hf_hub_download).parameters)
        known = PeftConfigMixin._hub_arguments
        return {k: v for k, v in kwargs.items() if k in known}, {k: v for k, v in kwargs.items() if k not in known}

    @classmethod
    def _get_peft_type(cls, model_id: str | os.PathLike, **hf_hub_download_kwargs: Any) -> str:
        subfolder = hf_hub_download_kwargs.pop("subfolder", None)
        return _read_json(find_config(model_id, subfolder, **hf_hub_download_kwargs))["peft_type"]

    @property
    def is_prompt_learning(self) -> bool:
        """Whether this adapter is virtual tokens rather than weights inside the model."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        return False


@checked
class PeftConfig(PeftConfigMixin):
    """A config that knows its base model.

    Args:
        base_model_name_or_path: filled in when the adapter is attached.
        revision: of the base model.
        inference_mode: attach the adapter frozen.
    """

    base_model_name_or_path: str | None = setting(optional(text()), default=None)
    revision: str | None = setting(optional(text()), default=None)
    inference_mode: bool = setting(boolean(), default=False)


@checked
class PromptLearningConfig(PeftConfig):
    """Common fields of prompt tuning, prefix tuning and p-tuning; sizes left at None come from the base model.

    Args:
        num_virtual_tokens: length of the prompt; required.
        token_dim: width of a virtual token. num_layers, num_attention_heads: of the model, for prefix tuning.
        num_transformer_submodules: in how many parts of the model there is a prompt: 1, in encoder-decoder models 2.
        modules_to_save: names of modules trained in full and saved with the adapter.
    """

    num_virtual_tokens: int | None = setting(optional(integer(1)), default=None)
    token_dim: int | None = setting(optional(integer(1)), default=None)
    num_transformer_submodules: int | None = setting(optional(integer(1)), default=None)
    num_attention_heads: int | None = setting(optional(integer(1)), default=None)
    num_layers: int | None = setting(optional(integer(1)), default=None)
    modules_to_save: list[str] | None = setting(optional(sequence(text())), default=None)

    @property
    def is_prompt_learning(self) -> bool:
        return True


#: peft_type -> config class; filled by `register_config`, which the method files call.
PEFT_TYPE_TO_CONFIG_MAPPING: dict[PeftType | str, type[PeftConfig]] = {}


def config_fields() -> set[str]:
    """Names of the fields of all configs."""
    return {f.name for config in PEFT_TYPE_TO_CONFIG_MAPPING.values() for f in fields(config)}


def register_config(peft_type: PeftType | str) -> Callable[[_C], _C]:
    """Class decorator: this config class is what `peft_type` means in a file, and instances carry it."""

    def register(cls: _C) -> _C:
        if peft_type in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise KeyError(f"There is already a config registered for peft_type {peft_type!r}")
        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = cls
        cls._registered_as = peft_type
        return cls

    return register


def config_class(peft_type: str) -> type[PeftConfig]:
    """The registered class of a `peft_type`; ValueError naming the known ones."""
    import peftfast.methods  # noqa: F401  (registers every method)

    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
    except (KeyError, TypeError):
        known = list(map(plain_name, PEFT_TYPE_TO_CONFIG_MAPPING))
        if absent.is_method(peft_type):
            hint = " It is a method of PEFT's that peftfast does not have; use PEFT itself for such an adapter."
        else:
            hint = close_matches(peft_type, known)
        raise ValueError(f"Unknown peft_type {peft_type!r}.{hint} Known types: {', '.join(known)}") from None


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The config a dict with a `peft_type` describes."""
    return PeftConfig.from_dict(config_dict)


def require_config(value: object, name: str = "peft_config") -> None:
    """TypeError unless `value` is one of this package's configs; `name` is what the argument is called."""
    if isinstance(value, PeftConfig):
        return
    kind = type(value)
    if kind.__module__.partition(".")[0] == "peft":
        raise TypeError(
            f"{name} must be one of peftfast's configs, got a {kind.__name__} of the peft package; "
            f"peftfast.get_peft_config({name}.to_dict()) says the same here"
        )
    raise TypeError(f"{name} must be a PeftConfig such as LoraConfig, got {value!r} of type {kind.__name__}")


def require_module(value: object) -> None:
    """TypeError unless `value`, an argument `model`, is a module."""
    if isinstance(value, nn.Module):
        return
    got = f"{reprlib.repr(value)} of type {type(value).__name__}"
    if isinstance(value, str):
        got += "; AutoPeftModel loads a base model and its adapter from the adapter's folder"
    raise TypeError(f"model must be a torch.nn.Module, got {got}")


def require_flag(value: object, name: str) -> None:
    """TypeError for a name, several or a dtype in the place of a switch, where they would count as True."""
    if isinstance(value, (str, os.PathLike, torch.dtype, list, tuple, set, dict)):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def find_config(model_id: str | os.PathLike, subfolder: str | None = None, **hub: Any) -> str:
    """Path of the `adapter_config.json` of a folder or Hub repository; ValueError if there is none."""
    from peftfast.files.atomic import find_file

    path = find_file(model_id, CONFIG_NAME, subfolder=subfolder, required=True, **hub)
    if path is None:
        raise ValueError(
            f"Can't find '{CONFIG_NAME}' at '{model_id}'" + (f" (subfolder {subfolder!r})" if subfolder else "")
        )
    return path


def _drop_runtime_config(data: dict[str, Any], source: str) -> None:
    if data.pop("runtime_config", None) is not None:
        warn(
            f"`runtime_config` in {source} is ignored: it says how one process runs the adapter, not what the adapter "
            "is. Pass it to the config's class instead."
        )


def _read_json(path: str | os.PathLike) -> dict[str, Any]:
    check_path(path, "A config's file")
    if os.path.getsize(path) > LARGEST_CONFIG:
        raise ValueError(f"{path} has {os.path.getsize(path):,} bytes; a config has at most {LARGEST_CONFIG:,}")
    try:
        with open(path, encoding="utf-8") as f:
            data = json.load(f)
    except (ValueError, RecursionError) as e:  # not JSON, not text, nested without end
        raise ValueError(f"{path} is not a JSON file: {e}") from e
    if not isinstance(data, dict):
        raise ValueError(f"{path} does not hold a JSON object but a {type(data).__name__}")
    return data


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
