"""Which adapters of a folder act: what `save_pretrained` writes beside adapters that do not say it by themselves.

Where "default" or the only adapter is active no such file is needed, and folders are PEFT's alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from peftfast.config import CONFIG_NAME
from peftfast.errors import AdapterLoadError, PeftWarning, warn
from peftfast.files.atomic import write_atomically

ACTIVATION_NAME = "active_adapters.json"


class Activation(NamedTuple):
    """The active adapters, in order, and whether adapters are switched on at all."""

    active: list[str]
    enabled: bool


def adapters_in(folder: Path) -> dict[str, Path]:
    """The adapters of a folder by name: "default" in itself, others in sub-folders. Hidden ones, which a killed writer
    of a config may have left, are none.

    Raises:
        ValueError: there are none.
    """
    found = {"default": folder} if (folder / CONFIG_NAME).is_file() else {}
    for one in sorted(folder.glob(f"[!.]*/{CONFIG_NAME}")):
        if found.setdefault(one.parent.name, one.parent) != one.parent:
            warn(
                f"{folder} has an adapter of its own, which is 'default', and a sub-folder of that name with another "
                "one, which is passed over; give the sub-folder another name.",
                PeftWarning,
            )
    if not found:
        raise ValueError(f"There is no adapter in {folder}: neither {CONFIG_NAME} nor a sub-folder with one")
    return found


def _assumed(names: Sequence[str]) -> Activation:
    return Activation(["default" if "default" in names else names[0]], True)


def write_activation(folder: Path, activation: Activation) -> None:
    """Write it after the adapters, as far as they are there; where it says nothing new, remove an old one."""
    path, names = folder / ACTIVATION_NAME, [*adapters_in(folder)]
    active = [name for name in activation.active if name in names]
    if not active and activation.active or (active, activation.enabled) == _assumed(names):
        path.unlink(missing_ok=True)
    else:
        write_atomically(path, json.dumps({"active": active, "enabled": activation.enabled}, indent=2).encode())


def read_activation(folder: Path, names: Sequence[str]) -> Activation:
    """What was written; without a file, "default" or else the first of `names` is active.

    Raises:
        AdapterLoadError: the file is damaged, or names an adapter that is not one of `names`.
    """
    path = folder / ACTIVATION_NAME
    if not path.is_file():
        return _assumed(names)
    try:
        found = Activation(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as e:
        raise AdapterLoadError(f"{path} is damaged: {e}") from e
    if not isinstance(found.active, list) or not isinstance(found.enabled, bool):
        raise AdapterLoadError(f"{path} is damaged: it has to list names and say true or false, got {found}")
    missing = [name for name in found.active if name not in names]
    if missing:
        raise AdapterLoadError(f"{path} says that {missing} are active, but the folder has only {[*names]}")
    return found
