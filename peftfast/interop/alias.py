"""The import machinery that serves peftfast under the name `peft`: on request, with or without the real one installed,
and by itself where there is no other."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import os
import sys
import threading
import types
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from typing import Any

from peftfast.interop import early, layout
from peftfast.version import ANSWERED_PEFT_VERSION, COMPATIBLE_PEFT_VERSION


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
            return f"Metadata-Version: 2.1\nName: peft\nVersion: {ANSWERED_PEFT_VERSION}\n"
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


#: "auto": peftfast answers to the name `peft` where nothing else does; "never": only if asked to.
VARIABLE = "PEFTFAST_AS_PEFT"
CHOICES = ("auto", "never")

_logger = logging.getLogger("peftfast")
_lock = threading.Lock()
_settled = False  # whether it is decided who answers to the name, by us or by the user


def take_if_vacant() -> None:
    """Serve `import peft` from peftfast if nothing else answers to that name and the user has not decided.

    Libraries recognise a model with adapters by PEFT's class. Without PEFT they would take ours for any model: Trainer
    would write, and read, whole state dicts as checkpoints. This is called when a config is made, which comes before
    every model and is what TRL's trainers and transformers' `add_adapter` are handed, and when a model is unpickled.

    Raises:
        ValueError: the environment variable has a value that nobody knows.
    """
    global _settled
    if _settled:
        return
    with _lock:
        if _settled:
            return
        choice = os.environ.get(VARIABLE) or "auto"
        if choice not in CHOICES:
            raise ValueError(f"{VARIABLE}: unknown value {choice!r}; one of {', '.join(map(repr, CHOICES))}")
        if choice == "auto" and _is_vacant():
            told = _serve()
            late = early.denying()
            _logger.info(
                "PEFT is not installed: peftfast answers to the name peft in this process, so that other libraries "
                "recognise its models (%s=never prevents it)%s%s",
                VARIABLE,
                f"; modules that had found none have it now: {', '.join(told)}" if told else "",
                f"; not told any more: {', '.join(late)} (import peftfast.as_peft before it)" if late else "",
            )
        _settled = True


def install() -> None:
    """Serve `import peft` from peftfast from now on, also where PEFT is installed. Calling it again changes nothing.

    Raises:
        ImportError: the real `peft`, or a library that keeps having found none, was imported before.
    """
    global _settled
    with _lock:
        if is_installed():
            return
        late = ["peft"] if "peft" in sys.modules else []
        if not late:
            _serve()
            late = early.denying()
        if late:
            _withdraw()
            raise ImportError(
                f"peftfast cannot take the name 'peft' any more: {', '.join(late)} has been imported already and keeps "
                "what it found. Put `import peftfast.as_peft` first in the script, or start it with "
                "`python -m peftfast run script.py`."
            )
        _settled = True


def is_installed() -> bool:
    """Whether `import peft` gives peftfast now."""
    return any(isinstance(finder, PeftFinder) for finder in sys.meta_path)


def uninstall() -> None:
    """Give the name back, or never take it: it is not taken again but by `install`. Libraries that have imported it
    meanwhile keep what they have."""
    global _settled
    with _lock:
        _settled = True
        _withdraw()


def _is_vacant() -> bool:
    if "peft" in sys.modules:
        return False
    try:
        return importlib.util.find_spec("peft") is None
    except ImportError:  # somebody refuses the name
        return False


def _serve() -> list[str]:
    """Take the name. Returns modules that had looked for it and found nothing, and have it now."""
    missing = early.Missing()
    for name in [n for n in sys.modules if n.startswith("peft.")]:
        del sys.modules[name]
    sys.meta_path.insert(0, PeftFinder())
    missing.bind()
    early.forget_answers()
    meanwhile = early.Missing(but=missing)  # other threads import too
    meanwhile.bind()
    return sorted(missing.modules | meanwhile.modules)


def _withdraw() -> None:
    if not is_installed():
        return
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, PeftFinder)]
    for name, module in list(sys.modules.items()):
        if isinstance(module, ServedModule):
            del sys.modules[name]
    early.forget_answers()
