"""The weights of another model of the same modules, as before quantisation or after training, found by their names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftfast.base.dense import is_conv1d, was_conv1d
from peftfast.errors import close_matches

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class Originals:
    """Weights [N, K] by module name, read when asked for.

    Args:
        source: a folder with `model.safetensors`, whole or sharded, or that file or its index; a mapping of tensors by
            parameter name; or the unquantised model itself.
        prefix: of the model's own inner module ("model" in a causal LM), which checkpoints may leave out or add.

    Raises:
        FileNotFoundError: no safetensors file there. ValueError: a damaged one, also when a weight is asked for.
        TypeError: something else than the above.
    """

    def __init__(self, source: str | os.PathLike | Mapping[str, Tensor] | nn.Module, prefix: str = "") -> None:
        self._prefix = prefix
        self._modules: dict[str, nn.Module] = {}
        self._asked: set[str] = set()
        if isinstance(source, nn.Module):
            self._modules = dict(source.named_modules())
            self._names, self._read = set(source.state_dict()), source.state_dict().__getitem__
        elif isinstance(source, Mapping):
            self._names, self._read = set(source), source.__getitem__
        elif isinstance(source, (str, os.PathLike)):
            self._names, self._read = _open(Path(source))
        else:
            raise TypeError(
                f"The original weights must be a folder, a mapping of tensors or a model, got {type(source).__name__}"
            )

    def weight(self, name: str, packed: nn.Module) -> Tensor:
        """The weight of the module `name` as [N, K].

        Args:
            packed: what it has become, which may know that it was kept as [K, N].

        Raises:
            KeyError: it is not there; names what is close.
        """
        key = self._find(f"{name}.weight")
        module = self._modules.get(key.removesuffix(".weight"))
        turned = was_conv1d(packed) if module is None else is_conv1d(module)
        weight = self._read(key)
        return weight.t() if turned else weight

    def tensor(self, *names: str) -> Tensor:
        """A Parameter or buffer as it is stored, of the first of its names that is there.

        Raises:
            KeyError: none is; names what is close.
        """
        return self._read(self._find(*names))

    def never_asked(self) -> list[str]:
        """Names of what nobody has asked for."""
        return sorted(self._names - self._asked)

    def _find(self, *names: str) -> str:
        """The first of these names that is there, as the source has it: with or without the prefix."""
        for name in names:
            for key in (name, name.removeprefix(f"{self._prefix}."), f"{self._prefix}.{name}"):
                if key in self._names:
                    self._asked.add(key)
                    return key
        raise KeyError(f"The other model has no {names[0]!r}.{close_matches(names[0], self._names)}")


def _open(path: Path) -> tuple[set[str], Callable[[str], Tensor]]:
    from safetensors import safe_open

    places = (path / _SINGLE, path / _INDEX) if path.is_dir() else (path,)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{path} is neither a safetensors file nor a folder with {_SINGLE} or {_INDEX}")
    with _named(found):
        if found.suffix == ".json":
            files = json.loads(found.read_text(encoding="utf-8"))["weight_map"]
            where = {name: found.parent / file for name, file in files.items()}
        else:
            with safe_open(found, framework="pt") as f:
                where = dict.fromkeys(f.keys(), found)

    def read(name: str) -> Any:
        with _named(where[name]), safe_open(where[name], framework="pt") as f:
            return f.get_tensor(name)

    return set(where), read


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What a damaged file raises, with its name."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is damaged, or not what its name says: {e}") from e
