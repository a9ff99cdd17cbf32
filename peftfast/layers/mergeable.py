"""Whether adapters can be merged where they are, and which of them are to be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from peftfast.errors import warn
from peftfast.layers.walk import base_modules, base_parameters
from peftfast.sharding import check_not_partitioned, is_distributed

if TYPE_CHECKING:
    from peftfast.layers.layer import BaseTunerLayer


def check_mergeable(module: nn.Module) -> None:
    """RuntimeError if weights of `module`, a layer or a whole model, are not at hand."""
    if any(getattr(m, "spread", None) for _, m in base_modules(module)):
        raise RuntimeError(
            "Cannot merge or unmerge adapters of this model: it is spread over processes by a tp_plan. Save the "
            "adapter (model.save_pretrained(folder), called by all processes) and merge in one process: "
            "PeftModel.from_pretrained(base_model, folder).merge_and_unload()"
        )
    check_not_partitioned(
        base_parameters(module),
        "merge or unmerge adapters of this model",
        "Save them (model.save_pretrained(folder), called by all processes) and merge without DeepSpeed, in one "
        "process: PeftModel.from_pretrained(base_model, folder).merge_and_unload()",
    )


def check_adapters_to_merge(module: Any, adapter_names: list[str] | None = None) -> list[str]:
    """Those of the names, None: of the active adapters, that are not merged yet; warns about the others."""
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
    names = module.active_adapters if adapter_names is None else adapter_names
    if not module.merged:
        return names
    names = [name for name in names if name not in module.merged_adapters]
    warn(
        f"Already following adapters were merged {','.join(module.merged_adapters)}. You are now additionally merging "
        f"{','.join(names)}."
        if names
        else "All adapters are already merged, nothing to do."
    )
    return names


_IN_ONE_PROCESS = (
    "Save the adapter (model.save_pretrained(folder), called by all processes) and merge in one process: "
    "PeftModel.from_pretrained(base_model, folder).merge_and_unload()"
)


def check_decodable(
    layer: BaseTunerLayer, what: str = "merge adapters of this model", instead: str = _IN_ONE_PROCESS
) -> None:
    """RuntimeError if the weight is packed and FSDP2 has taken it apart.

    Args:
        what: the user wanted to do. instead: what can be done.
    """
    weight = layer.site.weight
    if weight.quantization and is_distributed(getattr(layer.get_base_layer(), layer.site.parameter, None)):
        raise RuntimeError(
            f"Cannot {what}: {weight.name} is packed ({weight.quantization}) and sharded by FSDP2, and no process can "
            f"decode its share alone. {instead}"
        )
