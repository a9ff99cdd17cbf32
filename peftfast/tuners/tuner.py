"""The module around a base model that carries weight adapters, of whatever method."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from peftfast.config import PeftConfig, require_flag
from peftfast.errors import warn
from peftfast.files.beside import KeepsBeside
from peftfast.keys import in_base
from peftfast.many.combining import add_weighted_adapter, subtract
from peftfast.many.router import Router
from peftfast.method import method_for
from peftfast.methods.combination import Combination
from peftfast.ops.casts import CastStore
from peftfast.quantization.quantize import dequantized, name_dense_layers
from peftfast.replicas import Replicated
from peftfast.sharding import GatheredAsOne
from peftfast.training.checkpointing import checkpointing_switches, leave_input_gradients
from peftfast.tuners.calls import CalledModel
from peftfast.wrapping.adding import add_adapter
from peftfast.wrapping.inventory import KEPT, Inventory
from peftfast.wrapping.model_merger import ModelMerger, say_if_untied

#: What stands for the config of a model without one.
DUMMY_MODEL_CONFIG = {"model_type": "custom"}


class BaseTuner(CalledModel, KeepsBeside, GatheredAsOne, Replicated):
    """A base model with adapters in it; behaves as the base model in everything it does not define.

    Args:
        model: changed in place.
        peft_config: a config, or configs by adapter name.
        adapter_name: of the first adapter, which becomes active.
        low_cpu_mem_usage: create its tensors on the meta device, to be loaded.
        state_dict: adapt exactly the modules that these weights are for.
    """

    prefix: str = ""
    uses_shared_state: ClassVar[bool] = False
    _set_by_name = False  # whether the last to say which adapter is active gave a name, and no list

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | Mapping[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
        *,
        strict: bool = False,
        autocast_adapter_dtype: bool = False,
        initialise: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        config = peft_config if isinstance(peft_config, PeftConfig) else peft_config[adapter_name]
        earlier = getattr(model, "peft_config", None)
        self.peft_config: dict[str, PeftConfig] = earlier if _are_configs(earlier) else {}
        replaced = self.peft_config.pop(adapter_name, None)
        if replaced is not None or self.peft_config:
            warn(
                "Already found a `peft_config` attribute in the model. This will lead to having multiple adapters in "
                "the model. Make sure to know what you are doing!"
            )
        self.inventory = Inventory(model, self.peft_config)
        beside_others = bool(self.peft_config)
        try:
            self.inject_adapter(
                model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict,
                config=config, strict=strict, initialise=initialise,
            )  # fmt: skip
        except BaseException:
            if replaced is not None:
                self.peft_config[adapter_name] = replaced
            raise
        if beside_others:
            self.inventory.activate_added(adapter_name, config.inference_mode)
        model.__dict__[KEPT] = self.inventory
        model.peft_config = self.peft_config
        self.__dict__["_checkpointing"] = checkpointing_switches(model)
        self.prefix = method_for(config).prefix
        self._casts = CastStore()
        self._said_frozen = set()
        self.router: Router | None = None

    def install(self, wrapper: nn.Module) -> None:
        """Take one's place in a PeftModel."""
        wrapper.base_model = self

    # ---- adding ------------------------------------------------------------------------------------------------------
    def add(self, adapter_name: str, config: PeftConfig, **options: Any) -> None:
        """Add an adapter, frozen and inactive; options as of `add_adapter`."""
        add_adapter(self.inventory, adapter_name, config, **options)
        self._set_by_name = False

    def train(self, mode: bool = True) -> BaseTuner:
        # after training: bitsandbytes' optimizers, and others with kernels of their own, write to a Parameter without
        # counting it
        self.inventory.control.outdate()
        return super().train(mode)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
        *,
        config: PeftConfig | None = None,
        strict: bool = False,
        initialise: bool = True,
    ) -> None:
        """Add an adapter. The first one becomes active and trainable, unless its config is for inference."""
        cfg = config if config is not None else self.peft_config.pop(adapter_name)
        first = not self.inventory.configs
        keys = None if state_dict is None else adapted_modules(state_dict, method_for(cfg).prefix)
        self.add(
            adapter_name, cfg, strict=strict, keys=keys, initialise=initialise,
            device="meta" if low_cpu_mem_usage else None, autocast_adapter_dtype=autocast_adapter_dtype,
        )  # fmt: skip
        if first:
            self.inventory.set_adapter([adapter_name], inference_mode=cfg.inference_mode)
            if not cfg.inference_mode:
                self.inventory.train_biases(cfg)

    @property
    def targeted_module_names(self) -> list[str]:
        """Names of the adapted modules."""
        inventory = self.inventory
        return [key for key in inventory.layers if not inventory.is_nested(key) and not inventory.is_part(key)]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Names of the Parameters that are adapted by themselves."""
        inventory = self.inventory
        return [f"{key}.{layer.parameter_name}" for key in inventory.names for layer in inventory.nest(key)]

    # ---- which are active --------------------------------------------------------------------------------------------
    @property
    def active_adapter(self) -> str | list[str]:
        """As PEFT has it: the name after `set_adapter(name)`, a list of names otherwise."""
        active = self.inventory.active
        return active[0] if self._set_by_name and len(active) == 1 else list(active)

    @property
    def active_adapters(self) -> list[str]:
        return list(self.inventory.active)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter or several; several sum."""
        self.inventory.set_adapter(adapter_name, inference_mode)
        self._set_by_name = isinstance(adapter_name, str)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peftfast.convert_to_lora` can make a plain LoRA of this adapter."""
        return self.inventory.supports_lora_conversion(adapter_name)

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        self.inventory.set_requires_grad(adapter_names, requires_grad)

    def enable_adapter_layers(self) -> None:
        self.inventory.enable(True)

    def disable_adapter_layers(self) -> None:
        self.inventory.say_if_biases_stay()
        self.inventory.enable(False)

    def delete_adapter(self, adapter_name: str) -> None:
        self.inventory.delete(adapter_name)
        self._set_by_name = False

    # ---- combining ---------------------------------------------------------------------------------------------------
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter, frozen and inactive, that is a weighted combination of others.

        Args:
            weights: one for each; negative ones subtract.
            combination_type: "cat" and "svd" act on the change of the weights itself, "cat" exactly and with the sum of
                the ranks, "svd" with the best approximation of `svd_rank` (None: the largest of the ranks). "linear"
                adds the factors, which is cheap and rough. "ties", "dare_linear", "dare_ties" and "magnitude_prune"
                prune first, on the factors; with "_svd" behind, on the products. Vectors (IA3) add up.
            svd_clamp: a quantile at which the factors are clamped.
            density: share of the values that pruning keeps.
            majority_sign_method: "total" or "frequency".

        Raises:
            ValueError, TypeError: before anything is changed; see `peftfast.many.combining.add_weighted_adapter`.
        """
        how = Combination(
            combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method
        )
        add_weighted_adapter(self.inventory, adapters, weights, adapter_name, how)

    def subtract_adapter(self, minuend: str, subtrahend: str, adapter_name: str) -> None:
        """Add the adapter whose change of the weights is that of `minuend` less that of `subtrahend`, exactly."""
        subtract(self.inventory, minuend, subtrahend, adapter_name)

    # ---- merging -----------------------------------------------------------------------------------------------------
    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        *,
        keep: bool | str = True,
        rounding: str = "auto",
    ) -> dict[str, float]:
        """Put adapters (None: the active ones) inside the weights; `unmerge_adapter` takes them out bit for bit.

        Args:
            safe_merge: refuse results with NaN or infinite values before anything is written.
            keep: where the weights' bytes wait for unmerging: True: beside the weights; "host": in host memory; False:
                nowhere, there will be no unmerging.
            rounding: into 4, 8 or 16 bits: to the "nearest" value; "stochastic", up or down so that the expected
                value is exact; "auto": to the nearest where that keeps nine tenths of what the adapters change.

        Returns:
            By module name, the relative error with which quantised storage holds the merged weight; empty for a dense
            base.
        """
        merger = ModelMerger(self.inventory)
        merger.merge(adapter_names, safe_merge, keep=keep, rounding=rounding)
        return merger.errors()

    def unmerge_adapter(self) -> None:
        self.inventory.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        dequantize: bool = False,
        originals: Any = None,
        rounding: str = "auto",
    ) -> nn.Module:
        """The base model, changed in place: adapters inside the weights, wrappers gone.

        Args:
            dequantize: turn a quantised base into a dense one first, so that merging rounds nothing to 4 or 8 bits.
            originals: with it, take the weights of the model before quantisation from here instead; a folder, a state
                dict or a model, as `peftfast.dequantize_model` takes them. The default is what the adapter was trained
                against.
            rounding: as `merge_adapter` takes it.
        """
        require_flag(progressbar, "progressbar")
        require_flag(safe_merge, "safe_merge")
        if originals is not None and not dequantize:
            raise ValueError("originals are the dense weights to merge into: pass dequantize=True with them")
        merger = ModelMerger(self.inventory)
        names = merger.names(adapter_names)
        if dequantize:
            merger.check(names, rounding, dense=True)
            with dequantized(self, originals):
                if safe_merge:
                    merger.check_values(names)
        from tqdm.auto import tqdm

        progress = functools.partial(tqdm, disable=not progressbar, desc="Unloading and merging model")
        merger.merge_for_good(names, safe_merge, rounding, progress)
        return self._unload(merged=True, names=names)

    def unload(self) -> nn.Module:
        """The base model without the adapters (modules_to_save stay as trained)."""
        return self._unload()

    def _unload(self, merged: bool = False, names: list[str] | None = None) -> nn.Module:
        model = self.inventory.unload(merged, names)
        self.router = None  # there is nothing left to choose from
        say_if_untied(model)
        name_dense_layers(model)
        leave_input_gradients(model)
        model.__dict__.pop(KEPT, None)
        if hasattr(model, "peft_config"):
            del model.peft_config
        return model

    # ---- the wrapped model, as others see it -------------------------------------------------------------------------
    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The model's config as a dict; `DUMMY_MODEL_CONFIG` for models without one."""
        config = getattr(model, "config", None)
        if config is None:
            return dict(DUMMY_MODEL_CONFIG)
        if hasattr(config, "to_dict"):
            return config.to_dict()
        return dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


def adapted_modules(state_dict: Iterable[str], prefix: str) -> list[str]:
    """Names of the modules that the keys of an adapter's state dict belong to."""
    names = []
    for key in state_dict:
        head, found, _ = in_base(key).partition(f".{prefix}")
        if found:
            names.append(head)
    return list(dict.fromkeys(names))


def _are_configs(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(config, PeftConfig) for config in value.values())
