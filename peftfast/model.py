"""PeftModel: what users hold. A base model with named adapters, and everything one does with them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftfast import status
from peftfast.config import PeftConfig, PeftType, require_config, require_module
from peftfast.errors import PeftWarning, enumerate_some, warn
from peftfast.interop.counterpart import HasCounterpart
from peftfast.many.router import Choice
from peftfast.model_files import HasFiles
from peftfast.prompts.prompt_model import PromptTuner
from peftfast.replicas import Replicated
from peftfast.training.checkpointing import require_input_gradients
from peftfast.tuners.adalora import AdaLoraModel
from peftfast.tuners.ia3 import IA3Model
from peftfast.tuners.lora import LoraModel
from peftfast.tuners.trainable_tokens import TrainableTokensModel
from peftfast.tuners.tuner import BaseTuner
from peftfast.wrapping.adding import say_if_in_prefix

#: Tuner classes by peft_type; a method without a class of its own gets the common one.
PEFT_TYPE_TO_TUNER_MAPPING: dict[str, type[BaseTuner]] = {
    PeftType.LORA: LoraModel,
    PeftType.IA3: IA3Model,
    PeftType.ADALORA: AdaLoraModel,
    PeftType.TRAINABLE_TOKENS: TrainableTokensModel,
}


class PeftModel(HasFiles, HasCounterpart, Replicated):
    """A base model with adapters.

    Args:
        model: changed in place: adapted modules are replaced, everything but the adapter is frozen.
        peft_config: of the first adapter.
        adapter_name: its name.
        autocast_adapter_dtype: keep factors in fp32 on a half-precision base (recommended: optimizers and loss scaling
            rely on it, and the products run in the compute dtype all the same).
        low_cpu_mem_usage: create tensors on the meta device, to be loaded.
        strict: refuse what is otherwise let pass with a warning (unmatched targets, unknown names).
    """

    _last_set: str | None = None  # of models that were pickled without it

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        strict: bool = False,
        initialise: bool = True,
    ) -> None:
        super().__init__()
        refuse_peft_model(model)
        require_config(peft_config)
        self.special_peft_forward_args = {"adapter_names", "alora_offsets"}
        self._is_prompt_learning = peft_config.is_prompt_learning
        self.peft_type = peft_config.peft_type
        self._last_set = adapter_name
        if getattr(model, "peft_config", None):
            warn(
                "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
                "different config, make sure to call `.unload()` before."
            )
        tuner = self.tuner_class(peft_config)(
            model, peft_config, adapter_name, low_cpu_mem_usage,
            strict=strict, autocast_adapter_dtype=autocast_adapter_dtype, initialise=initialise,
        )  # fmt: skip
        tuner.install(self)
        self._settle(model)

    @classmethod
    def _for_config(cls, peft_config: PeftConfig) -> type[PeftModel]:
        """The class of a model whose first adapter is `peft_config`: by its task, unless the caller chose one."""
        from peftfast.tasks import model_class

        return model_class(peft_config) if cls is PeftModel else cls

    def tuner_class(self, peft_config: PeftConfig) -> type[BaseTuner | PromptTuner]:
        """What manages the adapters of this model, of which `peft_config` is the first."""
        if peft_config.is_prompt_learning:
            return PromptTuner
        return PEFT_TYPE_TO_TUNER_MAPPING.get(peft_config.peft_type, BaseTuner)

    def check_type(self, peft_config: PeftConfig) -> None:
        """ValueError if an adapter of this type cannot stand beside the present ones."""
        if self.peft_config and peft_config.peft_type != self.peft_type:
            raise ValueError(
                f"Cannot combine adapters with different peft types. Found {self.peft_type} and "
                f"{peft_config.peft_type}. A PeftMixedModel takes several types (`get_peft_model(..., mixed=True)`)."
            )

    def _settle(self, model: nn.Module) -> None:
        """What wrapping means for the base model's own switches."""
        # transformers renames the flag; reading the old name warns where there is a new one
        new_flag = getattr(model, "is_activation_checkpointing", None)
        if getattr(model, "is_gradient_checkpointing", True) if new_flag is None else new_flag:
            self.prepare_model_for_gradient_checkpointing(model)
        # numerically exact tensor-parallel slicing of old checkpoints is for pretraining only
        if getattr(getattr(model, "config", None), "pretraining_tp", 1) != 1:
            model.config.pretraining_tp = 1

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """With checkpointing, something before the first block must require gradients for any to arrive. Done at
        wrapping and again in `forward`, so that nobody has to call it."""
        require_input_gradients(model)
        return model

    # ---- configs and names -------------------------------------------------------------------------------------------
    @property
    def _tuner(self) -> BaseTuner | PromptTuner:
        """What manages the adapters: the base model's wrapper, or for prompts an object beside the bare base model."""
        return self.__dict__.get("_prompts") or self.base_model

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Adapter name -> config."""
        return self._tuner.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that act, in the order in which they were activated."""
        return self._tuner.active_adapters

    @property
    def active_adapter(self) -> str:
        """The active adapter; if several are, the one that was active by itself before, or else the first of them."""
        active = self.active_adapters
        if self._last_set in active:
            return self._last_set
        return active[0] if active else next(iter(self.peft_config), "default")

    @active_adapter.setter
    def active_adapter(self, name: str) -> None:
        if [name] != self.active_adapters:
            self.set_adapter(name)

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of `active_adapter`; ValueError where there is no adapter."""
        if not self.peft_config:
            raise ValueError("There is no adapter: this model's adapters were unloaded or deleted")
        return self.peft_config[self.active_adapter]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter is active and adapters are not disabled."""
        return self._tuner.inventory.enabled and bool(self.active_adapters)

    @property
    def modules_to_save(self) -> set[str] | None:
        """What the configs of all adapters name so; None where none does."""
        names = {n for cfg in self.peft_config.values() for n in getattr(cfg, "modules_to_save", None) or ()}
        return names or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self.get_base_model(), "dtype", None)

    def get_base_model(self) -> nn.Module:
        """The base model itself, adapters inside it."""
        return self._tuner.model

    # ---- lifecycle ---------------------------------------------------------------------------------------------------
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        strict: bool = False,
        initialise: bool = True,
    ) -> None:
        """Add an adapter, frozen and inactive; nothing about the others changes.

        Raises:
            ValueError: the name is taken, the type differs from the present ones, the config does not fit.
        """
        if isinstance(adapter_name, str):
            require_config(peft_config)
        else:
            raise TypeError(
                "add_adapter(adapter_name, peft_config) takes an adapter name and a PeftConfig such as LoraConfig, in "
                f"this order; got {adapter_name!r} and {peft_config!r}"
            )
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        self.check_type(peft_config)
        say_if_in_prefix(adapter_name, peft_config)
        self._tuner.add(
            adapter_name, peft_config, strict=strict, initialise=initialise,
            device="meta" if low_cpu_mem_usage else None, autocast_adapter_dtype=autocast_adapter_dtype,
        )  # fmt: skip

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make an adapter the active one: trainable unless `inference_mode`, all others frozen."""
        if not isinstance(adapter_name, str):
            raise TypeError(
                f"PeftModel.set_adapter takes one name, got {adapter_name!r}; "
                "model.base_model.set_adapter([...]) activates several"
            )
        self._tuner.set_adapter(adapter_name, inference_mode=inference_mode)
        self._last_set = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters without activating them."""
        self._tuner.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was active, the alphabetically first remaining one becomes active, with prompts the
        oldest."""
        self._tuner.delete_adapter(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model's outputs inside the `with` block; everything as before after it. May be nested."""
        self._tuner.inventory.say_if_biases_stay()
        with self._tuner.inventory.disabled():
            yield

    # ---- forward -----------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's output with the active adapters.

        Args:
            adapter_names: instead of the active ones, an adapter for every sample: its name or "__base__", or of
                adapters in layers its number (`base_model.adapter_numbers`).
            alora_offsets: see `peftfast.tuners.calls.CalledModel.forward`.
        """
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """The base model with its adapters; a training's loss that nothing gives a gradient is warned of, because what
        `backward` says of it ("element 0 of tensors does not require grad") does not tell why."""
        if "adapter_name" in kwargs:
            self._check_takes_adapter_name(kwargs["adapter_name"])
        result = self._tuner(*args, **kwargs)
        if self.training and torch.is_grad_enabled():
            loss = getattr(result, "loss", None)
            if isinstance(loss, torch.Tensor) and not loss.requires_grad:
                self._say_why_nothing_trains()
        return result

    def _check_takes_adapter_name(self, given: Any) -> None:
        """TypeError if the base model would, at best, take an `adapter_name` as one of any keywords, and not use it."""
        if "adapter_name" not in inspect.signature(self.get_base_model().forward).parameters:
            raise TypeError(
                f"A call of the model takes no adapter_name, got {given!r}; adapter_names=[...] takes a name for every "
                "sample, and model.set_adapter(name) chooses one for all calls"
            )

    def _say_why_nothing_trains(self) -> None:
        if torch.compiler.is_compiling():  # a warning is no part of a graph
            return
        inventory = self._tuner.inventory
        merged = sorted({name for layer in inventory.layers.values() for name in layer.merged_adapters})
        if not inventory.enabled:
            why = "adapters are disabled, here or by disable_adapter_layers()."
        elif merged:
            why = f"{enumerate_some(merged)} are merged into the weights. model.unmerge_adapter() takes them out."
        elif not any(p.requires_grad for p in self.parameters()):
            why = (
                "no parameter is trainable. Saved adapters are loaded for training with is_trainable=True; "
                "model.set_adapter(name) makes one trainable that is there."
            )
        else:
            return
        warn(f"The loss has no gradient, so that backward() will fail: {why}", PeftWarning)

    def generate(self, *args: Any, adapter_names: Choice | None = None, **kwargs: Any) -> Any:
        """The base model's `generate`, with the active adapters or, by `adapter_names`, with one for each prompt."""
        return self._tuner.generate(*args, adapter_names=adapter_names, **kwargs)

    # ---- numbers -----------------------------------------------------------------------------------------------------
    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all); a 4-bit weight counts as the weights it stands for."""
        return status.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print `trainable params: 240 || all params: 502 || trainable%: 47.8088`."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """See `peftfast.get_layer_status`."""
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        """See `peftfast.get_model_status`."""
        return status.get_model_status(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peftfast.convert_to_lora` can make a plain LoRA of this adapter."""
        return self._tuner.inventory.supports_lora_conversion(adapter_name)

    # ---- the wrapped model, as others see it -------------------------------------------------------------------------
    def counterparts(self) -> tuple[str, ...]:
        # a user's subclass passes for what it was derived from
        own = (c.__name__ for c in type(self).__mro__ if c.__module__.startswith("peftfast."))
        return (f"peft_model.{next(name for name in own if name[0] != '_')}",)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            prompts = self.__dict__.get("_prompts")
            return getattr(self.base_model, name) if prompts is None else prompts.attribute(name)


def refuse_peft_model(model: nn.Module) -> None:
    """ValueError for a model that is a PeftModel already, or holds one and nothing else, as a compiled or parallel
    one does: around it, a second one would write into the first one's adapters, and its files would fit no base.
    TypeError for what is no module."""
    require_module(model)
    while not isinstance(model, PeftModel) and len(inside := [*model.children()]) == 1:
        (model,) = inside
    if isinstance(model, PeftModel):
        raise ValueError(
            f"The model is a {type(model).__name__} already, with the adapters {list(model.peft_config)}. Another one "
            "is added by model.add_adapter(name, config), or from files by model.load_adapter(folder, name). To start "
            "anew, pass the bare base model: model.unload(), or model.get_base_model() of prompts; "
            "model.merge_and_unload() keeps what the adapters have learnt."
        )
