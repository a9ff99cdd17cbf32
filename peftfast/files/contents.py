"""What is in a saved adapter, in words: a line a module, without its base model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from peftfast.config import PeftConfig
from peftfast.files.io import read_adapter
from peftfast.keys import in_base
from peftfast.method import method_for


class Contents(NamedTuple):
    """A saved adapter.

    Attributes:
        config: as it was saved. lines: module -> what the adapter does to it.
    """

    config: PeftConfig
    lines: Mapping[str, str]

    def __str__(self) -> str:
        kind = getattr(self.config.peft_type, "value", self.config.peft_type)
        width = max(map(len, self.lines), default=0)
        head = f"{kind} for {self.config.base_model_name_or_path or 'a base model that it does not name'}"
        return "\n".join([head, *(f"  {module:<{width}}  {said}" for module, said in self.lines.items())])


def _natural(item: tuple[str, Any]) -> list[tuple[str, int]]:
    """Layer 10 behind layer 9."""
    return [("", int(part)) if part.isdigit() else (part, 0) for part in item[0].split(".")]


def adapter_contents(folder: str | os.PathLike) -> Contents:
    """Read an adapter's folder or Hub repository and say what it does where: ranks, how large the change of a weight is
    and in how many directions most of it lies; which features IA3 makes larger and smaller.

    Raises:
        ValueError: a file is not there. AdapterLoadError: one that is damaged.
    """
    stored = read_adapter(folder)
    method = None if stored.config.is_prompt_learning else method_for(stored.config)
    own: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in stored.tensors.items():
        name = in_base(key).removesuffix(".weight")
        module, found, slot = name.rpartition(f".{method.prefix}") if method is not None else ("", "", "")
        if found:
            own.setdefault(module, {})[method.prefix + slot] = tensor
        else:
            others[in_base(key)] = tensor
    lines = {
        module: method.describe(stored.config, module, tensors) for module, tensors in sorted(own.items(), key=_natural)
    }
    lines |= {key: f"kept whole, {' x '.join(map(str, tensor.shape))}" for key, tensor in others.items()}
    return Contents(stored.config, lines)
