"""write a plain LoRA: of a model that was trained in full, or of an adapter of another kind

--tuned compares a trained model with its base, and writes the adapter that is nearest to the difference. --adapter
writes the plain LoRA that stands for AdaLoRA, DoRA or a LoRA of a higher rank, for servers that know nothing else.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from peftfast.cli import UserError, _settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tuned", metavar="PATH_OR_HUB_ID", help="trained model, whose base is --model")
    source.add_argument("--adapter", metavar="DIR", help="folder of a saved adapter")
    rank = parser.add_mutually_exclusive_group(required=True)
    rank.add_argument("--r", type=_settings.whole(1), metavar="N", help="rank of every module")
    rank.add_argument(
        "--keep",
        type=_settings.real("a share from above 0 to 1", lambda v: 0 < v <= 1),
        metavar="SHARE",
        help="ranks that keep this share of each module's change (of its squared singular values)",
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="new folder, or an empty one")
    _settings.add_base(parser, "the one that --adapter names; needed for --tuned")


def run(args: argparse.Namespace) -> int:
    output = _settings.place(args.output, "--output")
    _settings.check_new(output)
    adapter = args.adapter and _settings.check_adapter(args.adapter)
    if not args.model and not adapter:
        raise UserError("--tuned needs its base: give --model")
    name = args.model or _settings.base_of(adapter)
    source = _settings.check_model(name)
    tuned = args.tuned and _settings.check_model(args.tuned, "--tuned")
    from peftfast import PeftModel, convert_to_lora, extract_lora
    from peftfast.auto import fit_vocabulary
    from peftfast.cli import _setup
    from peftfast.files.fingerprint import fingerprint
    from peftfast.files.io import save_adapter

    rank = args.r if args.keep is None else args.keep
    said = _Said()
    with _setup.quiet_libraries(), said:
        tokenizer = _setup.own_tokenizer(adapter, args.adapter) if adapter else None
        base = _setup.load_stored(source, name, args.dtype)
        record = fingerprint(base)
        with _setup.one_line(f"{args.tuned or args.adapter!r}"):
            if adapter:
                fit_vocabulary(base, adapter)
                config, tensors = convert_to_lora(PeftModel.from_pretrained(base, adapter), rank)
            else:
                other = tuned if Path(tuned).is_dir() else _setup.load_stored(tuned, args.tuned, args.dtype)
                config, tensors = extract_lora(base, other, rank)
        config.base_model_name_or_path = config.base_model_name_or_path or name
        config.task_type = config.task_type or "CAUSAL_LM"
        with _setup.writing(output):
            save_adapter(output, config, tensors, auto_mapping=None, base=record)
            if tokenizer is not None:
                tokenizer.save_pretrained(output)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    print(f"{output}{os.sep}: {len(tensors)} tensors, {size / 1000:,.1f} kB; {said.last}")
    return 0


class _Said(logging.Handler):
    """What extracting has logged last, while this is open."""

    last = "nothing to keep in factors"

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage().removeprefix("peftfast: ")

    def __enter__(self) -> _Said:
        log = logging.getLogger("peftfast.extraction")
        self._before = log.level
        log.setLevel(logging.INFO)
        log.addHandler(self)
        return self

    def __exit__(self, *exc: object) -> None:
        log = logging.getLogger("peftfast.extraction")
        log.setLevel(self._before)
        log.removeHandler(self)
