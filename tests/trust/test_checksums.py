"""A file of ours that has lost its records is reported: a flipped bit in their names hides one in a weight."""

from __future__ import annotations

import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from trust.attacks import WEIGHTS, base, trained

import peftfast
from peftfast.files import metadata


@pytest.mark.parametrize("given", [False, True])
def test_lost_checksums_are_reported(tmp_path, given):
    model = trained()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        records = file.metadata()
    records["peftfast.crc3r"] = records.pop("peftfast.crc32")
    tensors = load_file(tmp_path / WEIGHTS)
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, tmp_path / WEIGHTS, records)
    options = {"config": model.peft_config["default"]} if given else {}
    with pytest.warns(peftfast.AdapterMismatchWarning, match="no 'peftfast.crc32': its weights cannot be checked"):
        peftfast.PeftModel.from_pretrained(base.Tiny(), tmp_path, **options)
    with pytest.raises(peftfast.AdapterLoadError, match="peftfast.crc32"):
        peftfast.PeftModel.from_pretrained(base.Tiny(), tmp_path, strict=True, **options)


def test_a_record_of_the_config_that_is_none_is_reported(tmp_path):
    trained().save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        records = file.metadata()
    for record in ("[]", "no json"):
        save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, {**records, "peftfast.config": record})
        with pytest.warns(peftfast.AdapterMismatchWarning, match="record of the adapter's config .* cannot be read"):
            peftfast.PeftModel.from_pretrained(base.Tiny(), tmp_path)


def test_checksums_of_much_are_made_by_threads(monkeypatch):
    """One after the other they take longer than everything else in loading and saving."""
    tensors = {f"{i}": torch.randn(16, 16) for i in range(9)}
    one = metadata.describe(tensors, "{}", "")
    monkeypatch.setattr(metadata, "_SHARED", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    by, made = set(), metadata._crc
    monkeypatch.setattr(metadata, "_crc", lambda *one: by.add(threading.current_thread()) or made(*one))
    assert metadata.describe(tensors, "{}", "") == one
    assert threading.current_thread() not in by and 1 <= len(by) <= 3
    metadata.verify("file", tensors, one)
    tensors["4"][3, 5] += 1
    with pytest.raises(peftfast.AdapterLoadError, match="checksums do not agree with '4'"):
        metadata.verify("file", tensors, one)
