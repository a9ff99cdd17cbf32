"""write a model with an adapter inside its weights, for whoever reads models only

Loads the base model that the adapter names (or --model), merges, and writes model and tokenizer to a new folder, which
appears whole or not at all.
"""

from __future__ import annotations

import argparse
import os

from peftfast.cli import UserError, _settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a saved adapter")
    parser.add_argument("--output", metavar="DIR", required=True, help="new folder, or an empty one")
    _settings.add_base(parser, "the one that the adapter names")


def run(args: argparse.Namespace) -> int:
    adapter, output = _settings.check_adapter(args.adapter), _settings.place(args.output, "--output")
    _settings.check_new(output)
    name = args.model or _settings.base_of(adapter)
    source = _settings.check_model(name)
    from peftfast import PeftConfig, PeftModel
    from peftfast.auto import fit_vocabulary
    from peftfast.cli import _setup
    from peftfast.config import plain_name
    from peftfast.files.atomic import whole_folder

    with _setup.quiet_libraries():
        with _setup.one_line(f"{args.adapter!r} could not be loaded"):
            config = PeftConfig.from_pretrained(adapter)
        if config.is_prompt_learning:
            raise UserError(f"{args.adapter!r} is {plain_name(config.peft_type)}: virtual tokens are part of no weight")
        tokenizer = _setup.own_tokenizer(adapter, args.adapter) or _setup.load_tokenizer(source, name)
        base = _setup.load_stored(source, name, args.dtype)
        with _setup.one_line(f"{args.adapter!r} does not fit {name!r}"):
            fit_vocabulary(base, adapter)
            model = PeftModel.from_pretrained(base, adapter).merge_and_unload(safe_merge=True)
        with _setup.writing(output), whole_folder(output) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    count = sum(p.numel() for p in model.parameters())
    print(f"{output}{os.sep}: {type(model).__name__}, {count:,} parameters, with {args.adapter} inside")
    return 0
