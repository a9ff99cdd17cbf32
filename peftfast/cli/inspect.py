"""show what an adapter would do to a model, without doing it, or what a saved one does

Which modules the targets match, ranks, trainable parameters, memory with the optimizer's state, and which servers would
load the saved adapter. Without options: LoRA on the embedded model. With the folder of a saved adapter: how much it
changes each module, which features IA3 makes larger and smaller, and which servers would load it.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from peftfast.cli import _settings

    parser.add_argument("adapter", metavar="ADAPTER", nargs="?", help="folder of a saved adapter, instead of options")
    parser.add_argument("--max-lora-rank", type=_settings.whole(1), metavar="N", help="that vLLM is started with (16)")
    _settings.add_model(parser)
    _settings.add_adapter(parser)


def run(args: argparse.Namespace) -> int:
    from peftfast.cli import UserError, _settings

    given = _settings.given(args)
    if args.adapter is not None:
        if given:
            raise UserError(
                f"--{next(iter(given))} is about an adapter to be made, and {args.adapter!r} is a saved one"
            )
        return _show(_settings.check_adapter(args.adapter), args.max_lora_rank or 16)
    settings = _settings.with_defaults(given)
    source = _settings.check_model(settings["model"])
    from peftfast import plan_adapter
    from peftfast.cli import _setup

    with _setup.quiet_libraries():
        config = _setup.make_config(settings)
        model = _setup.load_empty(source, settings["model"], settings["dtype"])
        with _setup.one_line("--method " + settings["method"]):
            plan = plan_adapter(model, config, max_lora_rank=args.max_lora_rank or 16)
    print(plan)
    return int(plan.refusal is not None)


def _show(adapter: str, max_lora_rank: int) -> int:
    from peftfast import adapter_contents
    from peftfast.cli import _setup

    with _setup.one_line(repr(adapter)):
        contents = adapter_contents(adapter, max_lora_rank=max_lora_rank)
    print(contents)
    return 0
