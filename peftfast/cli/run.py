"""run a script written for peft, unchanged, with peftfast in its place

Everything after the script is the script's own: `peftfast run train.py --lr 1e-4`. With -m the script is a module, as
in `peftfast run -m trl.scripts.sft --use_peft`. Works under launchers: `torchrun -m peftfast run train.py`,
`accelerate launch -m peftfast run train.py`; processes that multiprocessing starts find peftfast too.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing.spawn
import os
import runpy
import sys
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", dest="is_module", action="store_true", help="the script is the name of a module")
    parser.add_argument("script", help="path of the script, or name of the module with -m")
    arguments = parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's arguments")
    arguments.required = False  # older argparse calls them missing where the script is
    parser.set_defaults(escapes=False)  # what is printed is the script's


class _FirstOfAll:
    """What a process runs that reads this from a pickle."""

    def __reduce__(self) -> tuple:
        lines = (
            f"import sys; sys.path = {sys.path!r}",
            "import peftfast.as_peft, peftfast.cli.run",
            "peftfast.cli.run.serve_spawned_processes()",
        )
        return exec, ("\n".join(lines),)


def serve_spawned_processes() -> None:
    """Let processes that multiprocessing starts anew, which import the script once more, find peftfast as this one
    does."""
    described = multiprocessing.spawn.get_preparation_data

    def describe(name: str) -> dict[str, Any]:
        return {**described(name), "peft": _FirstOfAll()}  # read before anything of the script is

    multiprocessing.spawn.get_preparation_data = describe


def _check_module(name: str) -> None:
    from peftfast.cli import UserError

    parts = name.split(".")
    for deep in range(1, len(parts) + 1):
        module = ".".join(parts[:deep])
        if (found := importlib.util.find_spec(module)) is None:
            raise UserError(f"-m {name}: there is no module {module!r}")
        if found.submodule_search_locations is None and deep < len(parts):
            raise UserError(f"-m {name}: the module {module!r} is no package")
    if found.submodule_search_locations is not None and importlib.util.find_spec(f"{name}.__main__") is None:
        raise UserError(f"-m {name}: this is a package without a __main__ to run")


def run(args: argparse.Namespace) -> int:
    from peftfast.cli import UserError
    from peftfast.interop import alias

    if not args.is_module and not os.path.isfile(args.script):
        raise UserError(f"there is no file {args.script!r}; with -m the argument is the name of a module")
    try:
        alias.install()
    except ImportError as error:
        raise UserError(error) from error
    serve_spawned_processes()
    sys.argv = [args.script, *args.arguments]
    if args.is_module:
        sys.path[0:1] = [os.getcwd()]
        _check_module(args.script)
        runpy.run_module(args.script, run_name="__main__", alter_sys=True)
    else:
        # what `python script.py` has in front of the path
        sys.path[0:1] = [os.path.dirname(os.path.realpath(args.script))]
        runpy.run_path(args.script, run_name="__main__")
    return 0
