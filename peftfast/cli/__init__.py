"""The command `peftfast`. Every file here without a leading underscore is one subcommand, named like the file.

A subcommand's docstring starts with its one-line help; it has `add_arguments(parser)` and `run(args) -> exit code`, and
imports torch and transformers only inside `run`, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from peftfast.version import __version__

USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, what a shell reports
BROKEN_PIPE = 141  # 128 + SIGPIPE


class UserError(Exception):
    """Something that the person at the command line can put right; shown as one line, without a traceback."""

    def __init__(self, message: object, exit_code: int = USAGE_ERROR, command: str | None = None) -> None:
        super().__init__(" ".join(str(message).split()))
        self.exit_code, self.command = exit_code, command


class Parser(argparse.ArgumentParser):
    """argparse, with errors as one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, command=self.prog)


def commands() -> dict[str, ModuleType]:
    """Subcommand name -> its module."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def make_parser() -> Parser:
    parser = Parser(
        prog="peftfast",
        description="Parameter-efficient fine-tuning: PEFT's API and files, fused kernels underneath.",
        epilog="peftfast COMMAND --help lists a command's options.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"peftfast {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in commands().items():
        doc = (module.__doc__ or "").strip()
        sub = subparsers.add_parser(
            name,
            help=doc.partition("\n")[0],
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=module.run, escapes=True)
        module.add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:  # a daemon's may be closed
                sys.stdout.flush()  # what is left would fail when Python ends, where nobody could answer it
    except BrokenPipeError:  # whoever reads the output, `head` perhaps, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _run(argv: Sequence[str] | None) -> int:
    where = "peftfast"
    try:
        parser = make_parser()
        args = parser.parse_args(argv)
        if args.command is None:
            parser.print_help()
            return USAGE_ERROR
        where = f"peftfast {args.command}"
        if args.escapes and hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # its encoding need not have a name's letters
        return args.run(args)
    except UserError as error:
        print(f"{error.command or where}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{where}: interrupted", file=sys.stderr)
        return INTERRUPTED
