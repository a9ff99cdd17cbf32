"""A file of ours that has lost its records is reported: a flipped bit in their names hides one in a weight."""

from __future__ import annotations

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from trust.attacks import WEIGHTS, base, trained

import peftfast


@pytest.mark.parametrize("given", [False, True])
def test_lost_checksums_are_reported(tmp_path, given):
    model = trained()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    metadata["peftfast.crc3r"] = metadata.pop("peftfast.crc32")
    tensors = load_file(tmp_path / WEIGHTS)
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, tmp_path / WEIGHTS, metadata)
    options = {"config": model.peft_config["default"]} if given else {}
    with pytest.warns(peftfast.AdapterMismatchWarning, match="no 'peftfast.crc32': its weights cannot be checked"):
        peftfast.PeftModel.from_pretrained(base.Tiny(), tmp_path, **options)
    with pytest.raises(peftfast.AdapterLoadError, match="peftfast.crc32"):
        peftfast.PeftModel.from_pretrained(base.Tiny(), tmp_path, strict=True, **options)


def test_a_record_of_the_config_that_is_none_is_reported(tmp_path):
    trained().save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    for record in ("[]", "no json"):
        save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, {**metadata, "peftfast.config": record})
        with pytest.warns(peftfast.AdapterMismatchWarning, match="record of the adapter's config .* cannot be read"):
            peftfast.PeftModel.from_pretrained(base.Tiny(), tmp_path)
