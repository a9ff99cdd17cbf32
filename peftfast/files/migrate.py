"""Configs and key layouts of earlier PEFT releases, brought to today's. Tested on files that PEFT 0.3 to 0.21 wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from peftfast.errors import AdapterLoadError

_SLOT = re.compile(r"\.(lora_\w+|ia3_l)(\.|$)")


def migrate_config(data: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of an `adapter_config.json` as today's PEFT would have written them.

    Raises:
        ValueError: the file asks for something that no release since 0.3 can load.
    """
    data = dict(data)
    data.pop("merge_weights", None)  # up to 0.3: whether eval() merges; no part of the adapter
    if data.pop("enable_lora", None):
        raise ValueError("enable_lora (fused projections of PEFT 0.2) has not been loadable since PEFT 0.4")
    if data.get("target_parameters") and not data.get("peft_version"):
        data["peft_version"] = "0.17.0"  # which brought the field; from 0.18 on, releases say which they are
    if data.get("peft_type") == "ADALORA" and not data.get("total_step"):
        # optional before 0.14, when forgetting it meant that the schedule never ended; a trained adapter needs none
        data["total_step"] = (data.get("tinit") or 0) + (data.get("tfinal") or 0) + 1
    return data


def migrate_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file under the keys that today's PEFT writes.

    - before 0.6 an adapted module was the base module itself, so its bias and weight were `q_proj.bias`, today
      `q_proj.base_layer.bias`
    - DoRA magnitudes were for a while written with `.weight` behind them
    """
    adapted = {key[: found.start()] for key in tensors if (found := _SLOT.search(key))}
    renamed = {}
    for key, tensor in tensors.items():
        owner, _, leaf = key.rpartition(".")
        if leaf in ("weight", "bias") and owner in adapted:
            key = f"{owner}.base_layer.{leaf}"
        elif key.endswith(".lora_magnitude_vector.weight"):
            key = owner
        if key in renamed:
            raise AdapterLoadError(f"The file has {key!r} twice, under the names of an old and of a new release")
        renamed[key] = tensor
    return renamed


def expert_layout(
    version: str | None,
    a: Sequence[int],
    b: Sequence[int],
    parameter: Sequence[int],
    is_transposed: bool,
) -> Literal["first", "second"]:
    """Which dimension of a 3-D expert parameter [E, d1, d2] the factor A of an adapter reads: the first of the two
    (what PEFT wrote up to 0.18) or the second (from 0.19, unless the module says `is_transposed`).

    Args:
        version: `peft_version` of the config; None before 0.18. a, b: shapes [r E, in], [out, r E].

    Raises:
        AdapterLoadError: the shapes fit neither layout, or both while the version does not tell.
    """
    _, first, second = parameter
    fits = [
        name
        for name, (reads, writes) in {"first": (first, second), "second": (second, first)}.items()
        if (a[1], b[0]) == (reads, writes)
    ]
    if not fits:
        raise AdapterLoadError(
            f"Factors {tuple(a)} and {tuple(b)} fit an expert parameter {tuple(parameter)} in neither layout"
        )
    if len(fits) == 1:
        return fits[0]
    found = re.match(r"(\d+)\.(\d+)", version or "")
    if found is None:
        raise AdapterLoadError(
            f"The expert parameter {tuple(parameter)} is square, so the shapes do not tell whether its adapter was "
            "written by PEFT up to 0.18 or from 0.19 on, and the config has no peft_version. Add "
            "the version that wrote it"
        )
    newer = (int(found[1]), int(found[2])) >= (0, 19)
    return "second" if newer and not is_transposed else "first"
