"""A user who presses Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any


def pressing_ctrl_c(at: int, run: Callable[[], Any], inside: ModuleType) -> int:
    """Run it, and raise KeyboardInterrupt at the line that is the `at`th of those run of a module or package.

    Returns:
        How many were run: `at`, if it was interrupted.
    """
    path = Path(inside.__file__)
    code = str(path.parent) if path.name == "__init__.py" else str(path)
    count = 0

    def line(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(code):
            return None
        if event == "line":
            count += 1
            if count == at:
                raise KeyboardInterrupt
        return line

    tracing = sys.gettrace()
    sys.settrace(line)
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(tracing)
    return count
