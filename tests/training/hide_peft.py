"""A process without `peft`, for whoever looks: `python -m training.hide_peft script.py ...`, or `hide()` in it."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import runpy
import sys


def hide() -> None:
    assert "peft" not in sys.modules
    find_spec = importlib.machinery.PathFinder.find_spec
    find_distributions = importlib.metadata.MetadataPathFinder.find_distributions

    def find_other_spec(cls, name, *args, **kwargs):
        return None if name.partition(".")[0] == "peft" else find_spec(name, *args, **kwargs)

    def find_other_distributions(cls, *args, **kwargs):
        return (d for d in find_distributions(*args, **kwargs) if d.metadata["Name"] != "peft")

    importlib.machinery.PathFinder.find_spec = classmethod(find_other_spec)
    importlib.metadata.MetadataPathFinder.find_distributions = classmethod(find_other_distributions)
    assert importlib.util.find_spec("peft") is None
    try:
        importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        return
    raise AssertionError("peft's distribution is not hidden")


if __name__ == "__main__":
    hide()
    del sys.argv[0]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
