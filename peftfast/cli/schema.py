"""print the JSON schema of adapter_config.json, for editors and for checks before a run"""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--type", help="one peft_type, for example LORA; default: all of them")


def config_schema(peft_type: str | None = None) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of one config, or of all, told apart by `peft_type`.

    It says what each field may hold. Combinations of fields are checked by the classes only, and unknown fields are
    allowed, as files of newer versions have them.

    Raises:
        ValueError: nobody knows this `peft_type`.
    """
    from dataclasses import fields

    from peftfast.config import PEFT_TYPE_TO_CONFIG_MAPPING, TaskType, config_class, plain_name, rule_of

    wanted = config_class(peft_type or "LORA")  # registers every method, too
    kinds = {plain_name(t): c for t, c in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    definitions = {}
    for kind, cls in sorted(kinds.items()):
        if peft_type is not None and cls is not wanted:
            continue
        properties = {f.name: dict(rule.schema) for f in fields(cls) if (rule := rule_of(f)) is not None}
        properties["task_type"] = {"anyOf": [{"type": "null"}, {"enum": sorted(t.value for t in TaskType)}]}
        properties["peft_type"] = {"const": kind}
        definitions[kind] = {
            "type": "object", "title": cls.__name__, "required": ["peft_type"],
            "properties": dict(sorted(properties.items())),
        }  # fmt: skip
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "adapter_config.json",
        "anyOf": [{"$ref": f"#/$defs/{kind}"} for kind in definitions],
        "$defs": definitions,
    }


def run(args: argparse.Namespace) -> int:
    from peftfast.cli import UserError

    try:
        schema = config_schema(None if args.type is None else args.type.upper())
    except ValueError as error:
        raise UserError(error) from error
    print(json.dumps(schema, indent=1))
    return 0
