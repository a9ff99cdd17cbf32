"""What an adapter's safetensors file says about itself: a checksum of every tensor, the config it was saved with, its
base model. PEFT and everybody else read such a file as before."""

from __future__ import annotations

import ctypes
import json
import math
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftfast.config import PeftConfig
from peftfast.errors import AdapterLoadError, enumerate_some, every_name
from peftfast.files.fingerprint import METADATA_KEY as BASE_KEY
from peftfast.version import __version__

_SHARED = 8 << 20  # bytes, from which on threads are worth their start

SUMS_KEY, CONFIG_KEY, VERSION_KEY = "peftfast.sums", "peftfast.config", "peftfast.version"
CRC_KEY = "peftfast.crc32"  # of all bytes, in files of before

_PIECE = 1 << 19  # bytes, which the cache holds while they are summed up twice
_WIDTHS = 512, 513

#: Fields that people change by hand and that do not change what the adapter computes.
_FREE_FIELDS = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type",
    "lora_dropout", "tokenizer_name_or_path", "tokenizer_kwargs",
})  # fmt: skip


def describe(tensors: Mapping[str, Tensor], config: str, base: str) -> dict[str, str]:
    """The metadata of a file with these tensors.

    Args:
        tensors: by file key, on the CPU. config: `adapter_config.json`. base: a fingerprint, or empty.
    """
    data = {
        VERSION_KEY: __version__,
        SUMS_KEY: "".join(_checksums(tensors, _sums)),
        CONFIG_KEY: json.dumps(json.loads(config), separators=(",", ":")),
    }
    return {**data, BASE_KEY: base} if base else data


def verify(path: object, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Compare the tensors with the checksums they were saved with, if there are any.

    Raises:
        AdapterLoadError: naming the tensors that are no longer what was saved.
    """
    key, made = (SUMS_KEY, _sums) if SUMS_KEY in metadata else (CRC_KEY, zlib.crc32)
    saved = metadata.get(key)
    if saved is None:
        return
    now = _checksums(tensors, made)
    if saved == "".join(now):
        return
    then = [saved[i : i + 8] for i in range(0, len(saved), 8)]
    known = set(then)
    changed = [key for key, crc in zip(sorted(tensors), now, strict=True) if crc not in known]
    what = every_name(changed) if changed else f"{len(now)} tensors, where {len(then)} were saved"
    raise AdapterLoadError(
        f"{path} is damaged: its checksums do not agree with {what}. If a tool changed the file on purpose and kept "
        "its metadata, remove all that start with 'peftfast.' from them"
    )


def lost_checksums(metadata: Mapping[str, str]) -> list[str]:
    """Says that a file of ours has no checksums: two flipped bits do this, one in their name and one in a weight."""
    if not metadata.keys().isdisjoint((SUMS_KEY, CRC_KEY)) or not any(key.startswith("peftfast") for key in metadata):
        return []
    return [f"The file is one of peftfast's, but has no {SUMS_KEY!r}: its weights cannot be checked for damage."]


def config_changes(cfg: PeftConfig, metadata: Mapping[str, str]) -> list[str]:
    """What in the config is not as it was when the weights were saved, of the fields that matter."""
    if CONFIG_KEY not in metadata:
        return []
    now = json.loads(cfg.to_json())
    try:
        saved = json.loads(metadata[CONFIG_KEY])
        names = saved.keys() & now.keys() - _FREE_FIELDS
    except (ValueError, AttributeError) as e:
        return [f"The record of the adapter's config in its file cannot be read: {e}."]
    changed = [
        f"{name} was {saved[name]!r} and is {now[name]!r}"
        for name in sorted(names)
        if _unordered(saved[name]) != _unordered(now[name])
    ]
    return [f"The config was changed after the weights were saved: {'; '.join(changed)}."] if changed else []


#: What tensors of the same shapes are computed with.
_COMPUTED = (
    "peft_type", "variant", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "alora_invocation_tokens",
)  # fmt: skip


def other_settings(saved: PeftConfig, present: PeftConfig) -> list[str]:
    """What the config of a file says otherwise than the one of the adapter that takes its tensors, of what changes its
    output."""
    names = set(_COMPUTED)
    if getattr(present, "init_r", None) is not None:
        names -= {"r", "rank_pattern"}  # AdaLoRA does not use the one, and the other is how far it has come
    values = [(name, getattr(saved, name, None), getattr(present, name, None)) for name in sorted(names)]
    # no pattern may be None or empty
    differing = [f"{name} is {there!r} there and {here!r} here" for name, there, here in values
                 if (there or None) != (here or None)]  # fmt: skip
    if not differing:
        return []
    return [f"The file's config is another than the adapter's, which stays as it is: {'; '.join(differing)}."]


def check_sizes(cfg: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a config that asks for far more memory than its own weights fill, before anything is allocated.

    Raises:
        AdapterLoadError: naming field and value.
    """
    largest = max((size for t in tensors.values() for size in t.shape), default=0)
    limit = max(largest, 1 << 14)
    rank = "r" if getattr(cfg, "init_r", None) is None else "init_r"  # AdaLoRA has both and does not use the one
    asked: dict[str, Any] = {name: getattr(cfg, name, None) for name in (rank, "num_virtual_tokens")}
    asked |= {f"rank_pattern[{key!r}]": value for key, value in (getattr(cfg, "rank_pattern", None) or {}).items()}
    wrong = [f"{k}={v}" for k, v in asked.items() if isinstance(v, int) and not isinstance(v, bool) and v > limit]
    if wrong:
        raise AdapterLoadError(
            f"The config says {enumerate_some(wrong)}, but no tensor in the file has a dimension above {largest}"
        )


def _checksums(tensors: Mapping[str, Tensor], of: Callable[[np.ndarray, int], int]) -> list[str]:
    """Of all tensors, in the order of their names; of many megabytes by as many threads as torch uses."""
    named, workers = sorted(tensors.items()), torch.get_num_threads()
    if workers == 1 or sum(tensor.nbytes for tensor in tensors.values()) < _SHARED:
        return [_checksum(*one, of) for one in named]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda one: _checksum(*one, of), named))


def _checksum(key: str, tensor: Tensor, of: Callable[[np.ndarray, int], int]) -> str:
    """Of name, dtype, shape and bytes, so that nothing of it can change unseen."""
    found = zlib.crc32(f"{key}|{tensor.dtype}|{list(tensor.shape)}".encode())
    if math.prod(tensor.shape):
        data = tensor.detach().cpu().contiguous()
        # not .numpy(): that makes a storage unresizable for good, and FSDP1 resizes the storages of its parameters
        found = of(np.frombuffer((ctypes.c_ubyte * data.nbytes).from_address(data.data_ptr()), np.uint8), found)
    return f"{found:08x}"


def _sums(data: np.ndarray, crc: int) -> int:
    """A CRC of sums, because one of all bytes took longer than all the rest of a hot swap. Summed up are the columns of
    two tables of words, in rows of 512 and of 513: no two words of a piece are in one column of both, so whatever
    becomes of up to three shows in a sum, as it would in a CRC of all bytes, and all else but for one time in 2^32."""
    for start in range(0, len(data), _PIECE):
        piece = data[start : start + _PIECE]
        words = piece[: len(piece) // 8 * 8].view(np.uint64)
        if len(words) >= 16 * _WIDTHS[0]:
            for width in _WIDTHS:
                rows = len(words) // width
                crc = zlib.crc32(np.add.reduce(words[: rows * width].reshape(rows, width), axis=0), crc)
            piece = piece[len(words) // _WIDTHS[0] * _WIDTHS[0] * 8 :]
        crc = zlib.crc32(piece, crc)
    return crc


def _unordered(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value
