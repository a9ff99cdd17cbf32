"""Adapters on disk and on the Hub: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import copy
import inspect
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfast.config import CONFIG_NAME, PeftConfig, PeftConfigMixin, config_fields
from peftfast.errors import AdapterLoadError, AdapterMismatchWarning, PeftWarning, check_path, close_matches, warn
from peftfast.files.atomic import (
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    find_file,
    locked,
    write_atomically,
    write_pair,
)
from peftfast.files.metadata import check_sizes, config_changes, describe, lost_checksums, other_settings, verify
from peftfast.files.migrate import migrate_keys
from peftfast.files.renamed import first_renaming
from peftfast.files.state import check_whole, targets_embeddings, trains_rows
from peftfast.keys import PREFIX
from peftfast.rules import instance, optional
from peftfast.sharding import own_class


# ---- writing --------------------------------------------------------------------------------------------
def adapter_folders(save_directory: str | os.PathLike, adapter_names: Iterable[str]) -> dict[str, Path]:
    """Where adapters of these names are saved, made if need be: the folder itself for "default", a sub-folder for any
    other.

    Raises:
        ValueError: two names are one folder, as "A" and "a" are on macOS and Windows.
    """
    folders: dict[str, Path] = {}
    owners: dict[tuple[int, int], str] = {}
    for name in adapter_names:
        folder = folders[name] = Path(save_directory) if name == "default" else Path(save_directory, name)
        _make(folder)
        found = folder.stat()
        other = owners.setdefault((found.st_dev, found.st_ino), name)
        if other != name:
            raise ValueError(
                f"The adapters {other!r} and {name!r} have one folder here, {str(folder)!r}: one would be written over "
                "the other. Save them to different folders (selected_adapters=)"
            )
    return folders


def _make(folder: Path) -> None:
    """Also where a link leads that leads nowhere yet."""
    folder.resolve().mkdir(parents=True, exist_ok=True)


def check_folder(save_directory: str | os.PathLike) -> None:
    check_path(save_directory, "The folder to save to")
    if not os.fspath(save_directory):
        raise ValueError("The folder to save to has no name, got ''; '.' is the current one")
    if os.path.isfile(save_directory):
        raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")


def save_adapter(
    folder: Path,
    cfg: PeftConfig,
    tensors: Mapping[str, Tensor],
    *,
    auto_mapping: dict | None,
    safe: bool = True,
    base: str = "",
) -> None:
    """Write weights and config of one adapter as one: whoever reads finds the old adapter or the new one, also if this
    process is killed, and also if others save to or load from the folder meanwhile.

    Args:
        cfg: written as for inference, with what a `save_pretrained` of its own writes. tensors: by file key.
        safe: safetensors; False: `torch.save`, for readers that need it.
        base: fingerprint of the base model, for the metadata.

    Raises:
        OSError: disk full, folder read-only; the old adapter is as it was.
    """
    check_whole(tensors)
    _make(folder)
    tensors = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    config, others = _config_files(cfg, auto_mapping)
    with locked(folder, exclusive=True):
        if safe:
            content = _safetensors_writer(tensors, describe(tensors, config, base))
            write_pair(folder, (SAFETENSORS_WEIGHTS_NAME, content), (CONFIG_NAME, config.encode()))
        else:
            # safetensors are read first, so old ones must not stay
            write_pair(
                folder, (WEIGHTS_NAME, lambda path: torch.save(tensors, path)), (CONFIG_NAME, config.encode()),
                obsolete=(SAFETENSORS_WEIGHTS_NAME,),
            )  # fmt: skip
        for name, data in others.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / name, data)


def _config_files(cfg: PeftConfig, auto_mapping: dict | None) -> tuple[str, dict[str, bytes]]:
    """`adapter_config.json` as for inference, and the other files that a config with a `save_pretrained` of its own
    (in a subclass of somebody else's) writes into its folder."""
    if getattr(cfg.save_pretrained, "__func__", None) is PeftConfigMixin.save_pretrained:
        saved = copy.copy(cfg)
        saved.inference_mode = True
        return saved.to_json(auto_mapping), {}
    mode, cfg.inference_mode = cfg.inference_mode, True
    try:
        with tempfile.TemporaryDirectory() as room:
            cfg.save_pretrained(room, auto_mapping_dict=auto_mapping)
            paths = [path for path in Path(room).rglob("*") if path.is_file()]
            written = {path.relative_to(room).as_posix(): path.read_bytes() for path in paths}
        config = written.pop(CONFIG_NAME, None)
        return cfg.to_json(auto_mapping) if config is None else config.decode(), written
    finally:
        cfg.inference_mode = mode


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically; tensors that share memory are written each for itself."""
    write_atomically(path, _safetensors_writer(tensors, {}))


def _safetensors_writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Callable[[str], None]:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    seen: set[int] = set()
    separate = {}
    for key, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        separate[key] = (
            tensor.clone() if pointer in seen or tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
        )
        seen.add(pointer)

    def write(target: str) -> None:
        try:
            save_file(separate, target, metadata={"format": "pt", **metadata})
        except SafetensorError as e:  # what it makes of a full disk
            raise OSError(f"{target} could not be written: {e}") from e

    return write


def needs_embedding_layers(model: nn.Module, cfg: PeftConfig, adapter_name: str, asked: bool | str) -> bool:
    """Resolve `save_embedding_layers`: "auto" saves the embeddings with the adapter if they are adapted or have been
    resized."""
    if asked != "auto":
        if asked not in (True, False):
            raise ValueError(f"save_embedding_layers must be True, False or 'auto', got {asked!r}")
        if asked and not hasattr(model, "get_input_embeddings"):
            warn(
                "Could not identify embedding layer(s) because the model is not a 🤗 transformers model. It has no "
                "get_input_embeddings, so save_embedding_layers=True saves no embedding.",
                PeftWarning,
            )
        return bool(asked)
    if trains_rows(cfg):
        return vocabulary_changed(model, cfg)
    if targets_embeddings(model, cfg, adapter_name):
        warn("Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.")
        return True
    return vocabulary_changed(model, cfg)


def _vocabulary(config: Any) -> int | None:
    """Size of the vocabulary, of a model of several parts that of its text."""
    try:
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:  # it has several
        return None
    return getattr(config, "vocab_size", None)


def vocabulary_changed(model: nn.Module, cfg: PeftConfig) -> bool:
    """Whether the embeddings have been resized, with a warning that they are saved then."""
    config = getattr(model, "config", None)
    size = _vocabulary(config)
    base = cfg.base_model_name_or_path
    if size is None or not base:
        return False
    import json

    try:
        path = find_file(base, "config.json", revision=cfg.revision, at_hand=True)
        if path is None:
            raise ValueError("no config.json there")
        if hasattr(config, "from_pretrained"):  # a file need not have the defaults, and may be of more than this model
            original = _vocabulary(type(config).from_pretrained(os.path.dirname(path)))
        else:
            with open(path, encoding="utf-8") as f:
                original = json.load(f).get("vocab_size")
    except (ValueError, OSError) as e:
        warn(
            f"Could not find a config file in {base} - will assume that the vocabulary was not modified. ({e})",
            PeftWarning,
        )
        return False
    if original is None or original == size:
        return False
    warn("Setting `save_embedding_layers` to `True` as the embedding layer has been resized during finetuning.")
    return True


def auto_mapping_of(model: nn.Module, cfg: PeftConfig) -> dict[str, str] | None:
    """What `AutoPeftModel` needs to find the base class again when there is no task type."""
    if cfg.task_type is not None:
        return None
    base = own_class(model)
    return {"base_model_class": base.__name__, "parent_library": base.__module__}


# ---- reading --------------------------------------------------------------------------------------------
class Stored(NamedTuple):
    """An adapter as it lies on disk; config and tensors are of one save."""

    config: PeftConfig
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    changes: list[str]  # in the config since then, and to the one that is used


def read_adapter(
    model_id: str | os.PathLike,
    config: PeftConfig | None = None,
    *,
    present: PeftConfig | None = None,
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    strict: bool | str = False,
    **kwargs: Any,
) -> Stored:
    """Config and tensors of an adapter folder or Hub repository, read together.

    Args:
        config: instead of the saved one. present: of an adapter that takes the tensors as it is; what the saved config
            says otherwise is among the changes.
        strict: True refuses pickles and configs with unknown fields.
        kwargs: of `hf_hub_download`; others are passed to the config.

    Raises:
        ValueError: a file is not there. AdapterLoadError: one that is damaged or not what it says.
    """
    check_path(model_id, "A folder or a Hub repository")
    folder = os.path.join(model_id, kwargs.get("subfolder") or "")
    with locked(folder) if os.path.isdir(folder) else nullcontext():
        hub, _ = PeftConfig._split_hub_arguments(kwargs)
        saved = None
        if config is None and (present is None or find_file(model_id, CONFIG_NAME, **hub) is not None):
            saved = PeftConfig.from_pretrained(model_id, strict=strict is True, **kwargs)
        config = config or present or saved
        tensors, metadata = _read_weights(model_id, device, hub, pickles=strict is not True)
    check_sizes(config, tensors)
    tensors = migrate_keys(tensors)
    changes = lost_checksums(metadata)
    if saved is not None:
        changes += config_changes(saved, metadata) + ([] if present is None else other_settings(saved, present))
    return Stored(config, _mapped(tensors, key_mapping), metadata, changes)


def check_arguments(function: Callable[..., Any], kwargs: dict[str, Any], strict: bool | str) -> None:
    """Say, or with strict=True refuse, which further arguments of `function` nobody knows: they are not of the Hub's
    either, and no field of a config."""
    _, others = PeftConfig._split_hub_arguments(kwargs)
    unknown = [name for name in others if name not in config_fields()]
    name_unknown(function, unknown, PeftConfig._hub_arguments, strict)
    for name in unknown:
        del kwargs[name]


def name_unknown(
    function: Callable[..., Any], unknown: Sequence[str], further: Iterable[str], strict: bool | str = False
) -> None:
    """Say, or with strict=True refuse, that `function` does not know arguments.

    Args:
        further: names that it does know beside its own.
    """
    if not unknown:
        return
    named = [*inspect.signature(function).parameters, *further]
    near = "".join(close_matches(name, named, 1) for name in unknown)
    message = f"{function.__name__} does not know the arguments {list(unknown)}.{near}"
    if strict is True:
        raise TypeError(message)
    if strict != "off":
        warn(f"{message} They have no effect.", AdapterMismatchWarning)


def load_peft_weights(
    model_id: str | os.PathLike,
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """The tensors of an adapter folder or Hub repository, by file key.

    Args:
        device: None: CPU.
        key_mapping: regex -> replacement, applied to the keys of the base model's part.

    Raises:
        ValueError: no weights there. AdapterLoadError: a file that is truncated or not what it says.
    """
    tensors, _ = _read_weights(model_id, device, dict(hf_hub_download_kwargs))
    return _mapped(tensors, key_mapping)


def _read_weights(
    model_id: str | os.PathLike, device: str | torch.device | None, hub: dict[str, Any], pickles: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    subfolder = hub.pop("subfolder", None)
    path = find_file(model_id, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **hub)
    if path is not None:
        return _read_with_metadata(path, device)
    path = find_file(model_id, WEIGHTS_NAME, subfolder=subfolder, **hub)
    where = f"{model_id}" + (f" (subfolder {subfolder!r})" if subfolder else "")
    if path is None:
        raise ValueError(
            f"Can't find weights for {where}: it has neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}"
        )
    if not pickles:
        raise AdapterLoadError(f"{path} is a pickle, which strict=True refuses; convert it to safetensors")
    return _read_pickle(path, device), {}


def read_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """All tensors of a safetensors file; AdapterLoadError with the path if it is damaged."""
    return _read_with_metadata(path, None)[0]


def _read_with_metadata(
    path: str | os.PathLike, device: str | torch.device | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        # the header is checked against the file's size before anything is allocated; tensors are mapped, not copied
        with safe_open(path, framework="pt") as f:
            metadata = dict(f.metadata() or {})
            tensors = {key: f.get_tensor(key) for key in f.keys()}
    except (SafetensorError, ValueError, RuntimeError, AttributeError, KeyError, TypeError) as e:
        raise AdapterLoadError(f"{path} is damaged or not a safetensors file: {_reason(path, e)}") from e
    verify(path, tensors, metadata)
    if device is not None and str(device) != "cpu":
        tensors = {key: tensor.to(device) for key, tensor in tensors.items()}
    return tensors, metadata


def _reason(path: str | os.PathLike, error: Exception) -> str:
    """Why a file cannot be read; a repository that was cloned without Git LFS has pointers in the place of weights."""
    with open(path, "rb") as f:
        if f.read(32).startswith(b"version https://git-lfs"):
            return "it is a pointer of Git LFS; `git lfs pull` in the repository fetches the file"
    return str(error)


def _read_pickle(path: str, device: str | torch.device | None) -> dict[str, Tensor]:
    try:
        # only tensors and plain containers are unpickled, nothing is executed
        data = torch.load(path, map_location=device or "cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:  # what a damaged pickle raises is as arbitrary as its bytes
        raise AdapterLoadError(f"{path} is damaged or holds more than tensors: {_reason(path, e)}") from e
    if not isinstance(data, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in data.items()):
        raise AdapterLoadError(f"{path} does not hold a dict of tensors")
    return data


def _mapped(tensors: dict[str, Tensor], mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    mapping = optional(instance(Mapping)).enforce(mapping, "key_mapping")
    return {_renamed(k, mapping): v for k, v in tensors.items()} if mapping else tensors


def _renamed(key: str, mapping: Mapping[str, str]) -> str:
    front = next((prefix for prefix in (PREFIX, "base_model.") if key.startswith(prefix)), "")
    return front + first_renaming(mapping, key[len(front) :])
