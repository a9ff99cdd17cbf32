"""pytest plugin for PEFT's tests: they import `peft` and get peftfast, or, with PEFT_SUITE_SIDE=peft, PEFT itself.

PEFT's source distribution has no conftest.py, so what its tests expect of one is here too.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there, so it is there

SIDE = os.environ.get("PEFT_SUITE_SIDE", "peftfast")
DIFFERENCES: dict[str, str] = tomllib.loads((Path(__file__).parent / "differences.toml").read_text())
_UNSUPPORTED = "peftfast does not implement this variant"
_running = False


def _skip(what: str) -> NoReturn:
    pytest.skip(f"not in peftfast: {what}")


class _Lacking(type):
    """Classes and functions that peftfast lacks: tests may name them; a test that uses one is skipped."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") or not _running:
            raise AttributeError(name)
        _skip(cls.__name__)

    def __getitem__(cls, key: Any) -> Any:
        _skip(cls.__name__)

    def __iter__(cls) -> Iterator[Any]:
        return iter(())

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if _running:
            _skip(cls.__name__)
        return super().__call__()  # parameters of tests are made while they are collected


def _lacking(name: str, made: dict[str, type] = {}) -> type:  # noqa: B006 a memo: one class a name
    if name not in made:
        made[name] = _Lacking(name, (), {"lacking": True})
    return made[name]


class _LackingModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _lacking(name)


class _LackingFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """After all others: submodules of `peft` that peftfast does not serve."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith("peft.") else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _LackingModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []  # type: ignore[attr-defined]


def _serve_peftfast() -> None:
    importlib.import_module("peftfast.as_peft")
    alias, absent = (
        importlib.import_module("peftfast.interop.alias"),
        importlib.import_module("peftfast.interop.absent"),
    )
    absent.placeholder = _lacking
    served = alias.ServedModule.__getattr__

    def lookup(module: types.ModuleType, name: str) -> Any:
        try:
            return served(module, name)
        except AttributeError:
            caller = sys._getframe(1).f_code.co_filename
            if name.startswith("__") or not ("importlib" in caller or Path(caller).name.startswith("test")):
                raise
            return _lacking(name)

    alias.ServedModule.__getattr__ = lookup
    sys.meta_path.append(_LackingFinder())


if SIDE == "peftfast":
    _serve_peftfast()


def pytest_configure(config: pytest.Config) -> None:
    for marker in ("regression", "single_gpu_tests", "multi_gpu_tests", "bitsandbytes"):
        config.addinivalue_line("markers", f"{marker}: of PEFT's")


@contextmanager
def _hub_online_once(model_id: str) -> Iterator[None]:
    yield  # PEFT's tells the hub's client that there is a network again


def pytest_sessionstart(session: pytest.Session) -> None:
    importlib.import_module("tests.testing_utils").hub_online_once = _hub_online_once


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        lacking = next((what for value in parameters.values() for what in _lacking_in(value)), None)
        if lacking is not None:
            item.add_marker(pytest.mark.skip(reason=f"not in peftfast: {lacking}"))
        for pattern, reason in DIFFERENCES.items():
            if SIDE == "peftfast" and fnmatchcase(item.nodeid, f"tests/{pattern}"):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=False))
                break


def _lacking_in(value: Any) -> Iterator[str]:
    kind = value if isinstance(value, type) else type(value)
    if isinstance(kind, _Lacking):
        yield kind.__name__
    elif isinstance(value, dict):
        for part in value.values():
            yield from _lacking_in(part)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    global _running
    _running = True
    try:
        return (yield)
    finally:
        _running = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """A refusal that `interop/DIFFERENCES.md` lists is a skip."""
    if call.excinfo is not None and _UNSUPPORTED in str(call.excinfo.value):
        try:
            _skip(str(call.excinfo.value).split(" must be ")[0])
        except BaseException as skipped:
            call.excinfo = pytest.ExceptionInfo.from_exception(skipped)
    return (yield)
