"""A file of ours that has lost its records is reported: a flipped bit in their names hides one in a weight."""

from __future__ import annotations

import random
import threading
import zlib

import numpy as np
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
    records["peftfast.sumc"] = records.pop("peftfast.sums")
    tensors = load_file(tmp_path / WEIGHTS)
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, tmp_path / WEIGHTS, records)
    options = {"config": model.peft_config["default"]} if given else {}
    with pytest.warns(peftfast.AdapterMismatchWarning, match="no 'peftfast.sums': its weights cannot be checked"):
        peftfast.PeftModel.from_pretrained(base.Tiny(), tmp_path, **options)
    with pytest.raises(peftfast.AdapterLoadError, match="peftfast.sums"):
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
    by, made = set(), metadata._checksum
    monkeypatch.setattr(metadata, "_checksum", lambda *one: by.add(threading.current_thread()) or made(*one))
    assert metadata.describe(tensors, "{}", "") == one
    assert threading.current_thread() not in by and 1 <= len(by) <= 3
    metadata.verify("file", tensors, one)
    tensors["4"][3, 5] += 1
    with pytest.raises(peftfast.AdapterLoadError, match="checksums do not agree with '4'"):
        metadata.verify("file", tensors, one)


@pytest.mark.parametrize("words", [1, 1 << 10, 1 << 13, (1 << 13) + 1, 70_001])
def test_whatever_becomes_of_a_tensor_shows_in_its_checksum(words):
    """Its words are summed up, so what would leave a sum as it is has to be seen in the other."""
    chance = random.Random(words)
    tensor = torch.randn(words, dtype=torch.float64, generator=torch.Generator().manual_seed(words))
    saved = metadata.describe({"t": tensor}, "{}", "")

    def damaged(change) -> None:
        after = tensor.numpy().copy().view(np.uint64)
        change(after)
        with pytest.raises(peftfast.AdapterLoadError, match="checksums do not agree"):
            metadata.verify("file", {"t": torch.from_numpy(after.view(np.float64))}, saved)

    def flipped(after: np.ndarray) -> None:
        after[chance.randrange(words)] ^= np.uint64(1 << chance.randrange(64))

    def moved(after: np.ndarray) -> None:
        """What one word loses, another gets, which may be in the same column of a table."""
        one, other = places
        after[one] -= np.uint64(1)
        after[other] += np.uint64(1)

    for _ in range(20):
        damaged(flipped)
    for width in (1, 512, 513, 512 * 16, 513 * 15) if words > 1 << 13 else ():
        first = chance.randrange(words - width)
        places = first, first + width
        damaged(moved)
    if words > 512:
        damaged(lambda after: after[:512].sort())
        damaged(lambda after: after[words // 3 :].fill(0))
        damaged(lambda after: after.__setitem__(slice(0, 512), after[-512:].copy()))
    metadata.verify("file", {"t": tensor}, saved)


def test_files_with_checksums_of_before_are_checked():
    tensors = {"a": torch.randn(3, 5), "b": torch.zeros(0)}
    crcs = [
        zlib.crc32(tensors["a"].numpy().tobytes(), zlib.crc32(b"a|torch.float32|[3, 5]")),
        zlib.crc32(b"b|torch.float32|[0]"),
    ]
    saved = {"peftfast.crc32": "".join(f"{one:08x}" for one in crcs)}
    metadata.verify("file", tensors, saved)
    assert not metadata.lost_checksums(saved)
    tensors["a"][1, 1] += 1
    with pytest.raises(peftfast.AdapterLoadError, match="checksums do not agree with 'a'"):
        metadata.verify("file", tensors, saved)


def test_of_a_large_tensor_few_bytes_go_through_a_crc(monkeypatch):
    """Through which all took longer than all the rest of a hot swap."""
    counted, crc32 = [], zlib.crc32
    monkeypatch.setattr(
        zlib, "crc32", lambda data, *start: counted.append(memoryview(data).nbytes) or crc32(data, *start)
    )
    tensor = torch.randn(256, 1024)
    metadata.describe({"t": tensor}, "{}", "")
    assert sum(counted) < tensor.nbytes / 50
