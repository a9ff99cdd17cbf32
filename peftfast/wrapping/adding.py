"""Adding an adapter to a model, whole or not at all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from peftfast.base.compressed import decompress
from peftfast.config import PeftConfig, require_flag
from peftfast.errors import PeftWarning, enumerate_some, warn
from peftfast.method import method_for, reads_base
from peftfast.sharding import is_run_by_zero3, is_sharded_by_fsdp2, to_shards
from peftfast.wrapping.injection import plan_injection
from peftfast.wrapping.inventory import Inventory
from peftfast.wrapping.replication import Replication, ranges_of


def check_name(name: Any) -> None:
    """Refuse names that cannot be part of a parameter's name."""
    if not isinstance(name, str):
        raise TypeError(f"An adapter name must be a string, got {name!r} of type {type(name).__name__}")
    if not name or "." in name or "/" in name or "\\" in name:
        raise ValueError(f"An adapter name must be non-empty and without '.', '/' and '\\', got {name!r}")
    if hasattr(nn.ModuleDict, name) or hasattr(nn.ParameterDict, name) or name == "training":
        raise ValueError(f"{name!r} cannot be an adapter name: torch.nn.ModuleDict has an attribute of that name")


def say_if_in_prefix(name: str, cfg: PeftConfig) -> None:
    """Warn of a name that PEFT, where it loads the file, may take for a part of its own names."""
    prefix = "" if cfg.is_prompt_learning else method_for(cfg).prefix
    if isinstance(name, str) and name in prefix:
        warn(
            f"Adapter name '{name}' should not be contained in the prefix '{prefix}'. This may lead to "
            "reinitialization of the adapter weights during loading."
        )


def inject(inventory: Inventory, name: str, cfg: PeftConfig, strict: bool, options: dict[str, Any]) -> None:
    """Put an adapter into the layers that its config names."""
    plan_injection(inventory, name, cfg, strict=strict, **options).apply()


def add_adapter(
    inventory: Inventory,
    name: str,
    cfg: PeftConfig,
    *,
    strict: bool = False,
    by: Callable[[Inventory, str, PeftConfig, bool, dict[str, Any]], None] = inject,
    **options: Any,
) -> None:
    """Add an adapter, frozen and inactive. Nothing is changed if anything about it is wrong.

    Args:
        cfg: its targets are resolved in place. Of one that another adapter has already the new one gets a copy.
        strict: refuse what would otherwise be let pass with a warning.
        by: what puts it into the model; prompts go elsewhere than into layers.
        options: `device`, `initialise`, `keys`, `modules` of `injection.plan_injection`.

    Raises:
        ValueError: the name is taken, nothing matches, a second adapter has biases.
    """
    check_name(name)
    require_flag(strict, "strict")
    require_flag(options.get("autocast_adapter_dtype"), "autocast_adapter_dtype")
    if name in inventory.configs:
        raise ValueError(f"Adapter with name '{name}' already exists.")
    inventory.check_not_merged(name, "replace")
    if any(cfg is other for other in inventory.configs.values()):
        cfg = copy.deepcopy(cfg)  # hot-swapping, resizing and AdaLoRA's schedule write to the config of one adapter
    check_addable(inventory, name, cfg, options.get("initialise", True))
    decompress(inventory.model)
    if inventory.stands():  # what deleted adapters have left would be in the way of other kinds of training
        others = getattr(cfg, "modules_to_save", None) or getattr(cfg, "trainable_token_indices", None)
        inventory.remove_empty(except_for=() if others else inventory.layers)
    first = not inventory.configs and not any(layer.adapters for layer in inventory.layers.values())
    fields_before = dict(cfg.__dict__)
    present = {wrapper for _, wrapper in inventory.wrappers()}
    # transformers and diffusers tell the layers one by one
    off = not inventory.enabled or bool(present) and all(wrapper.disable_adapters for wrapper in present)
    replicates = _replicate(inventory, name, cfg)
    try:
        by(inventory, name, cfg, strict, options)
    except BaseException:
        cfg.__dict__.clear()
        cfg.__dict__.update(fields_before)
        if replicates:
            inventory.restore_layers()
        raise
    inventory.admit(name, cfg)
    for _, wrapper in inventory.wrappers():
        wrapper.share(inventory.control)
        if off and wrapper not in present:
            wrapper._disable_adapters = True  # off is off, also where the first adapter comes while it is
    if first:
        inventory.freeze_base()


def check_addable(inventory: Inventory, name: str, cfg: PeftConfig, initialise: bool = True) -> None:
    """Refuse an adapter for what its config says and for what the model has already, before anything is matched."""
    cfg.validate()
    if is_run_by_zero3(inventory.model):
        raise RuntimeError(
            f"Cannot add adapter {name!r}: a DeepSpeed ZeRO-3 engine runs this model, and knows the parameters that it "
            "was made with only. Add all adapters before deepspeed.initialize (Accelerator.prepare, Trainer.train). "
            "Weights from a file can be loaded into an adapter that is here: model.load_adapter(folder, "
            f"{next(iter(inventory.configs), 'default')!r})"
        )
    if is_sharded_by_fsdp2(inventory.model):
        to_shards(inventory.model)
        _check_sharded(name, cfg, initialise)
    _check_base_is_whole(inventory, name, cfg)
    _check_biases(inventory, name, cfg)
    _check_replication(inventory, name, cfg)


def _replicate(inventory: Inventory, name: str, cfg: PeftConfig) -> bool:
    """Stack the model's layers as the config says, before anything is matched; whether that changed the model."""
    if inventory.replication is not None and not (inventory.configs or inventory.layers or inventory.extras):
        inventory.restore_layers()
    ranges = ranges_of(cfg)
    if ranges == (() if inventory.replication is None else inventory.replication.ranges):
        return False
    inventory.replicate_layers(Replication(inventory.model, ranges))
    return True


def _check_replication(inventory: Inventory, name: str, cfg: PeftConfig) -> None:
    """ValueError if the adapter wants the layers stacked otherwise than the adapters that are here."""
    adapted = inventory.configs or inventory.layers or inventory.extras
    present = inventory.replication.ranges if inventory.replication is not None and adapted else ()
    ranges = ranges_of(cfg)
    if ranges != present and (present or inventory.configs):
        raise ValueError(
            f"Adapter {name} has layer_replication={[list(r) for r in ranges] or None}, but the layers of this model "
            f"are stacked as {[list(r) for r in present] or None} for {sorted(inventory.configs)}: all adapters of a "
            "model need the same"
        )


def _check_sharded(name: str, cfg: PeftConfig, initialise: bool) -> None:
    """RuntimeError for an adapter that starts from weights which FSDP2 has taken apart, and a warning for one that is
    to be trained."""
    if initialise and reads_base(cfg):
        raise RuntimeError(
            f"Adapter {name} starts from the base weights, which FSDP2 has taken apart. Add it before fully_shard, or "
            "load it from a file (model.load_adapter)."
        )
    if not cfg.inference_mode:
        warn(
            f"Adapter {name} comes to a model that FSDP2 has sharded already: its Parameters are whole in every "
            "process, and FSDP2 reduces no gradients for them, so that processes would train different adapters. To "
            "train it, add it before fully_shard.",
            PeftWarning,
        )


def _check_biases(inventory: Inventory, name: str, cfg: PeftConfig) -> None:
    """The base's biases are one set for all adapters, so they belong to one adapter at most."""
    if getattr(cfg, "bias", "none") == "none" or not inventory.configs:
        return
    if any(getattr(other, "bias", "none") != "none" for other in inventory.configs.values()):
        raise ValueError(
            f"{type(cfg).__name__.removesuffix('Config')}Model supports only 1 adapter with bias. When using "
            "multiple adapters, set bias to 'none' for all adapters."
        )
    warn(
        f"Adapter {name} has bias={cfg.bias!r}, but is not the first one of this model: the base's biases are not "
        f"trained with it, as in PEFT, and those of its file act on {enumerate_some(inventory.configs)} too.",
        PeftWarning,
    )


def _check_base_is_whole(inventory: Inventory, name: str, cfg: PeftConfig) -> None:
    """ValueError if the adapter would start from a weight that others are merged into."""
    merged = {n for layer in inventory.layers.values() for n in layer.merged_adapters}
    if merged and reads_base(cfg):
        raise ValueError(
            f"Adapter {name} starts from the base weights, which contain {', '.join(sorted(merged))} now. Please "
            "unmerge first."
        )
