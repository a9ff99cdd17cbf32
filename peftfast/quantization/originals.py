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
        key = f"{name}.weight"
        for candidate in self._candidates(key):
            if candidate in self._names:
                weight = self._read(candidate)
                module = self._modules.get(candidate.removesuffix(".weight"))
                turned = was_conv1d(packed) if module is None else is_conv1d(module)
                return weight.t() if turned else weight
        raise KeyError(f"The original weights have no {key!r}.{close_matches(key, self._names)}")

    def tensor(self, name: str, alias: str | None = None) -> Tensor:
        """The Parameter or buffer `name` as it is stored; that of `alias` where there is none.

        Raises:
            KeyError: it is not there; names what is close.
        """
        for key in (name,) if alias is None else (name, alias):
            for candidate in self._candidates(key):
                if candidate in self._names:
                    self._asked.add(candidate)
                    return self._read(candidate)
        raise KeyError(f"The other model has no {name!r}.{close_matches(name, self._names)}")

    def never_asked(self) -> list[str]:
        """Names of what nobody has asked `tensor` for."""
        return sorted(self._names - self._asked)

    def _candidates(self, key: str) -> list[str]:
        return list(dict.fromkeys((key, key.removeprefix(f"{self._prefix}."), f"{self._prefix}.{key}")))


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
