"""show what an adapter would do to a model, without doing it

Which modules the targets match, ranks, trainable parameters, memory with the optimizer's state, and which servers would
load the saved adapter. Without options: LoRA on the embedded model.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from peftfast.cli import _settings

    parser.add_argument(
        "--max-lora-rank", type=_settings.whole(1), default=16, metavar="N", help="that vLLM is started with (16)"
    )
    _settings.add_model(parser)
    _settings.add_adapter(parser)


def run(args: argparse.Namespace) -> int:
    from peftfast.cli import _settings

    settings = _settings.with_defaults(_settings.given(args))
    source = _settings.check_model(settings["model"])
    from peftfast import plan_adapter
    from peftfast.cli import _setup

    with _setup.quiet_libraries():
        config = _setup.make_config(settings)
        model = _setup.load_empty(source, settings["model"], settings["dtype"])
        with _setup.one_line("--method " + settings["method"]):
            plan = plan_adapter(model, config, max_lora_rank=args.max_lora_rank)
    print(plan)
    return int(plan.refusal is not None)
