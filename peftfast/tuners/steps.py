"""Steps in which PEFT puts adapters into a model, by the names under which other libraries read or replace them."""

from __future__ import annotations

from typing import Any, NoReturn


class PeftSteps:
    """Mixin. Nothing calls these: what is put in their place has no effect, and calling one is an error."""

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        _refuse(self, "_create_and_replace")

    def _create_new_module(self, *args: Any, **kwargs: Any) -> Any:
        _refuse(self, "_create_new_module")

    def _replace_module(self, *args: Any, **kwargs: Any) -> None:
        _refuse(self, "_replace_module")

    def _cast_adapter_dtype(self, *args: Any, **kwargs: Any) -> None:
        _refuse(self, "_cast_adapter_dtype")


def _refuse(model: PeftSteps, name: str) -> NoReturn:
    raise NotImplementedError(
        f"{type(model).__name__}.{name} is a step of PEFT's own, which peftfast does not take: adapters are added by "
        "add_adapter, load_adapter and inject_adapter_in_model, and cast by peft.functional.cast_adapter_dtype"
    )
