"""Modules that looked for `peft` before peftfast answered to the name.

`if is_peft_available(): from peft import PeftModel` binds nothing where there is no PEFT. Most libraries ask again
later, in functions that use `PeftModel`, so an answer that changes in between would be a NameError there. So what such
modules would have imported is bound in them before anybody hears the new answer.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from peftfast.interop import absent

#: What every library calls the question; whoever asks it at import has it in its namespace.
QUESTION = "is_peft_available"

# Not `module.__dict__`: of lazy modules that may be a property that imports everything.
_namespace_of = types.ModuleType.__dict__["__dict__"].__get__

# Most modules that ask import nothing from peft at their top: only the others are worth parsing.
_IMPORTS_PEFT = re.compile(r"^\s*(?:from|import)\b.*\bpeft\b", re.MULTILINE)


class Missing:
    """Names that modules loaded by now would have imported from `peft`.

    Making it only reads; it takes longest, and nobody else notices anything of it.

    Args:
        but: modules that this has looked at are left out.
    """

    def __init__(self, but: Missing | None = None) -> None:
        before = set() if but is None else but._namespaces
        askers = [(name, namespace) for name, namespace in _askers() if id(namespace) not in before]
        self._namespaces = {id(namespace) for _, namespace in askers}
        self._names = [
            (module, namespace, *wanted)
            for module, namespace in askers
            for wanted in _wanted(module)
            if namespace.get(wanted[0]) is None  # None is what the other branch of an `if` or `try` leaves behind
        ]

    @property
    def modules(self) -> set[str]:
        return {module for module, *_ in self._names}

    def bind(self) -> None:
        """Give every module its names; `peft` must be importable by now."""
        for _, namespace, name, place, attribute in self._names:
            namespace[name] = _import(place, attribute)


def forget_answers() -> None:
    """Let everybody who keeps an answer about `peft` look again."""
    for _, namespace in _askers():
        for name, value in list(namespace.items()):
            if name.startswith("is_peft_") and hasattr(value, "cache_clear"):
                value.cache_clear()


def denying() -> list[str]:
    """Modules whose answer was fixed when they were imported, and is still that there is no `peft`."""
    questions = {id(namespace[QUESTION]): namespace[QUESTION] for _, namespace in _askers()}
    return sorted({getattr(q, "__module__", None) or repr(q) for q in questions.values() if _denies(q)})


def _denies(question: Callable[[], Any]) -> bool:
    try:
        return not question()
    except Exception:  # it has the name, and is another question
        return False


def _askers() -> Iterator[tuple[str, dict[str, Any]]]:
    """Modules that can ask whether there is a `peft`, with their namespaces."""
    for name, module in list(sys.modules.items()):
        if isinstance(module, types.ModuleType) and callable(_namespace_of(module).get(QUESTION)):
            yield name, _namespace_of(module)


def _wanted(module: str) -> Iterator[tuple[str, str, str | None]]:
    """What the module's top level imports from `peft`: (its name for it, module of `peft`, attribute there; None is the
    module itself)."""
    try:
        source = inspect.getsource(sys.modules[module])
        tree = ast.parse(source) if _IMPORTS_PEFT.search(source) else ast.Module([], [])
    except (OSError, TypeError, KeyError, SyntaxError, ValueError):
        # typed into a prompt, shipped without source, gone again
        return
    for statement in _imports(tree):
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                if _is_peft(alias.name):
                    yield alias.asname or "peft", alias.name if alias.asname else "peft", None
        elif not statement.level and _is_peft(statement.module or ""):
            for alias in statement.names:
                yield alias.asname or alias.name, statement.module or "", alias.name


def _is_peft(module: str) -> bool:
    return module.partition(".")[0] == "peft"


def _imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run when the module is imported, in whatever `if` and `try` they stand."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif isinstance(child, (ast.If, ast.Try, ast.ExceptHandler, ast.With)):
            yield from _imports(child)


def _import(place: str, attribute: str | None) -> Any:
    try:
        module = importlib.import_module(place)
        return module if attribute is None else getattr(module, attribute)
    except (ImportError, AttributeError):
        # says what is missing when it is used, which a NameError would not
        return absent.placeholder(place if attribute is None else attribute)
