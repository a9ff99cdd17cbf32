"""The published schema is the one that the code gives."""

from __future__ import annotations

from pathlib import Path

from peftfast.cli import main
from peftfast.cli.schema import config_schema
from peftfast.config import PEFT_TYPE_TO_CONFIG_MAPPING, config_class

PUBLISHED = Path(__file__).parents[2] / "peftfast" / "assets" / "adapter_config.schema.json"


def test_published_schema_is_up_to_date(capsys):
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == PUBLISHED.read_text(), f"peftfast schema > {PUBLISHED}"


def test_every_config_is_there():
    config_class("LORA")
    kinds = {getattr(t, "value", t) for t in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert set(config_schema()["$defs"]) == kinds
    assert list(config_schema("LORA")["$defs"]) == ["LORA"]
    assert main(["schema", "--type", "lora"]) == 0


def test_an_unknown_type_is_refused(capsys):
    assert main(["schema", "--type", "LARA"]) == 2
    assert "LARA" in capsys.readouterr().err
