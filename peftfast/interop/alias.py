"""The import machinery that serves peftfast under the name `peft`, with or without the real one installed."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import sys
import types
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from typing import Any

from peftfast.interop import layout
from peftfast.version import COMPATIBLE_PEFT_VERSION


class ServedModule(types.ModuleType):
    """`peft` or one of its submodules; names are looked up when first used."""

    _served_by_peftfast = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        try:
            value = layout.lookup(self.__name__, name)
        except AttributeError:
            # `peft.utils` after `import peft` alone, as PEFT's own __init__ imports its submodules
            submodule = f"{self.__name__}.{name}"
            if submodule not in layout.MODULES:
                raise
            return importlib.import_module(submodule)
        self.__dict__[name] = value
        return value

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *layout.names(self.__name__)})


class _Loader(Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return ServedModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__doc__ = "peftfast under the name of peft."
        module.__file__ = __file__
        if module.__name__ == "peft":
            module.__version__ = COMPATIBLE_PEFT_VERSION
            module.__all__ = layout.names("peft")


class _Distribution(importlib.metadata.Distribution):
    """Answers `importlib.metadata.version("peft")`, which transformers and accelerate ask for."""

    def read_text(self, filename: str) -> str | None:
        if filename in ("METADATA", "PKG-INFO"):
            return f"Metadata-Version: 2.1\nName: peft\nVersion: {COMPATIBLE_PEFT_VERSION}\n"
        return "peft\n" if filename == "top_level.txt" else None

    def locate_file(self, path: Any) -> Any:
        return path


class PeftFinder(MetaPathFinder):
    """Finds `peft` and its submodules in the table of `layout`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in layout.MODULES:
            return None
        spec = importlib.machinery.ModuleSpec(fullname, _Loader(), origin=__file__, is_package=True)
        spec.submodule_search_locations = []  # no other finder may look below it
        return spec

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        return [_Distribution()] if context is None or context.name in (None, "peft") else []


#: Modules that bind or look for peft's names while they are imported, so that the alias has to come first.
_BINDS_AT_IMPORT = ("transformers.trainer_utils", "transformers.trainer", "trl.trainer.utils", "diffusers.loaders.peft")


def install() -> None:
    """Serve `import peft` from peftfast from now on. Calling it again changes nothing.

    Raises:
        ImportError: the real `peft`, or a library that has looked for it, was imported before.
    """
    if is_installed():
        return
    early = [name for name in ("peft", *_BINDS_AT_IMPORT) if name in sys.modules]
    if early:
        raise ImportError(
            f"peftfast cannot take the name 'peft' any more: {', '.join(early)} has been imported already and keeps "
            "what it found. Put `import peftfast.as_peft` first in the script, or start it with "
            "`python -m peftfast run script.py`."
        )
    for name in [n for n in sys.modules if n.startswith("peft.")]:
        del sys.modules[name]
    sys.meta_path.insert(0, PeftFinder())
    _forget_availability()


def is_installed() -> bool:
    """Whether `import peft` gives peftfast now."""
    return any(isinstance(finder, PeftFinder) for finder in sys.meta_path)


def uninstall() -> None:
    """Give the name back. Libraries that have imported it meanwhile keep what they have."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, PeftFinder)]
    for name, module in list(sys.modules.items()):
        if isinstance(module, ServedModule):
            del sys.modules[name]


def _forget_availability() -> None:
    """`import transformers` alone may have cached that there is no peft."""
    utils = sys.modules.get("transformers.utils.import_utils")
    clear = getattr(getattr(utils, "is_peft_available", None), "cache_clear", None)
    if clear is not None:
        clear()
