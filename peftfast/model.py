"""PeftModel: what users hold. A base model with named adapters, and everything one does with them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftfast import status
from peftfast.config import PeftConfig, PeftType
from peftfast.errors import PeftWarning
from peftfast.files.activation import Activation, adapters_in, read_activation, write_activation
from peftfast.files.card import write_card
from peftfast.files.convert_init import as_plain_lora, warn_beside_others
from peftfast.files.fingerprint import fingerprint
from peftfast.files.fit import Fit, fit_state_dict, judge
from peftfast.files.hub import upload
from peftfast.files.io import (
    Stored,
    adapter_folder,
    auto_mapping_of,
    check_arguments,
    check_folder,
    needs_embedding_layers,
    read_adapter,
    save_adapter,
)
from peftfast.files.state import adapter_state_dict, is_in
from peftfast.interop.counterpart import HasCounterpart
from peftfast.many.router import Choice
from peftfast.method import repeats_init
from peftfast.prompts.prompt_model import PromptTuner, resize_saved_prompt
from peftfast.training.checkpointing import require_input_gradients
from peftfast.tuners.adalora import AdaLoraModel
from peftfast.tuners.ia3 import IA3Model
from peftfast.tuners.lora import LoraModel
from peftfast.tuners.trainable_tokens import TrainableTokensModel
from peftfast.tuners.tuner import BaseTuner
from peftfast.wrapping.adding import say_if_in_prefix
from peftfast.wrapping.undo import unchanged_if_refused

#: Tuner classes by peft_type; a method without a class of its own gets the common one.
PEFT_TYPE_TO_TUNER_MAPPING: dict[str, type[BaseTuner]] = {
    PeftType.LORA: LoraModel,
    PeftType.IA3: IA3Model,
    PeftType.ADALORA: AdaLoraModel,
    PeftType.TRAINABLE_TOKENS: TrainableTokensModel,
}


class PeftModel(HasCounterpart, nn.Module):
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
        self.special_peft_forward_args = {"adapter_names", "alora_offsets"}
        self._is_prompt_learning = peft_config.is_prompt_learning
        self.peft_type = peft_config.peft_type
        if getattr(model, "peft_config", None):
            warnings.warn(
                "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
                "different config, make sure to call `.unload()` before.",
                stacklevel=3,
            )
        tuner = self.tuner_class(peft_config)(
            model, peft_config, adapter_name, low_cpu_mem_usage,
            strict=strict, autocast_adapter_dtype=autocast_adapter_dtype, initialise=initialise,
        )  # fmt: skip
        tuner.install(self)
        self._settle(model)

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
                f"{peft_config.peft_type}."
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
        return self._tuner.peft_config

    @property
    def active_adapters(self) -> list[str]:
        return self._tuner.active_adapters

    @property
    def active_adapter(self) -> str:
        """The active adapter; the first of them if several are."""
        active = self.active_adapters
        return active[0] if active else next(iter(self.peft_config), "default")

    @active_adapter.setter
    def active_adapter(self, name: str) -> None:
        if [name] != self.active_adapters:
            self.set_adapter(name)

    @property
    def active_peft_config(self) -> PeftConfig:
        if not self.peft_config:
            raise ValueError("There is no adapter: this model's adapters were unloaded or deleted")
        return self.peft_config[self.active_adapter]

    @property
    def has_active_enabled_adapter(self) -> bool:
        return self._tuner.inventory.enabled and bool(self.active_adapters)

    @property
    def modules_to_save(self) -> set[str] | None:
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
        if not isinstance(adapter_name, str) or not isinstance(peft_config, PeftConfig):
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
        biases = [cfg.bias for cfg in self.peft_config.values() if getattr(cfg, "bias", "none") != "none"]
        if biases:
            warnings.warn(
                f"Careful, disabling adapter layers with bias configured to be '{biases[0]}' does not produce the same "
                "output as the base model would without adaption.",
                stacklevel=3,
            )
        with self._tuner.inventory.disabled():
            yield

    # ---- forward -----------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._tuner(*args, **kwargs)

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
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        return status.get_model_status(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peftfast.convert_to_lora` can make a plain LoRA of this adapter."""
        layers = self._tuner.inventory.layers.values()
        return bool(layers) and all(layer.supports_lora_conversion(adapter_name) for layer in layers)

    # ---- saving ------------------------------------------------------------------------------------------------------
    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: list[str] | str | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save adapters: "default" into the folder itself, any other into a sub-folder of its name.

        Args:
            selected_adapters: their names, or one name; None: all.
            save_embedding_layers: with the base's embeddings; "auto": if they are adapted or were resized.
            is_main_process: False writes nothing.
            path_initial_model_for_weight_conversion: the adapter as it was right after a PiSSA or OLoRA
                initialisation; the result is a plain LoRA of twice the rank for the unchanged base.
            kwargs: `state_dict`, tensors gathered from a sharded model.
        """
        check_folder(save_directory)
        if not self.peft_config:
            raise ValueError("There is no adapter to save: this model's adapters were unloaded or deleted")
        if isinstance(selected_adapters, str):
            selected_adapters = [selected_adapters]
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        unknown = [n for n in names if n not in self.peft_config]
        if unknown:
            raise ValueError(
                f"You passed an invalid `selected_adapters` arguments, current supported adapter names are "
                f"{list(self.peft_config)} - got {names}."
            )
        if not names:
            raise ValueError(f"selected_adapters=[] leaves nothing to save; the adapters are {list(self.peft_config)}")
        state_dict = kwargs.pop("state_dict", None)
        if state_dict is not None and selected_adapters is None and len(names) > 1:
            absent = [n for n in names if not is_in(state_dict, self, n)]
            if absent and len(absent) < len(names):
                warnings.warn(
                    f"The given state_dict has nothing of adapters {absent}, which are not saved: frozen parameters "
                    "are not gathered under DeepSpeed ZeRO-3. model.save_pretrained(folder), called by all processes "
                    "and without a state_dict, saves all adapters.",
                    PeftWarning,
                    stacklevel=2,
                )
                names = [n for n in names if n not in absent]
        initial = path_initial_model_for_weight_conversion
        start = None if initial is None else read_adapter(initial)
        complete = is_main_process or state_dict is None  # what is gathered by one process is empty in the others
        prepared = []
        for name in names:
            cfg = self.peft_config[name]
            embeddings = needs_embedding_layers(self, cfg, save_embedding_layers)
            tensors = adapter_state_dict(self, cfg, name, state_dict, embeddings, complete=complete)
            if complete and start is not None:
                cfg, tensors = as_plain_lora(self, name, self.peft_config, tensors, start)
            prepared.append((name, cfg, tensors))
        if not is_main_process:
            return
        os.makedirs(save_directory, exist_ok=True)
        # what was rewritten is for the weights before the initialisation, which are not here
        base_record = "" if start is not None else fingerprint(self.get_base_model())
        for name, cfg, tensors in prepared:
            base = cfg.base_model_name_or_path or getattr(self.get_base_model(), "name_or_path", None) or None
            cfg.base_model_name_or_path = base
            save_adapter(
                adapter_folder(save_directory, name), cfg, tensors,
                auto_mapping=auto_mapping_of(self.get_base_model(), cfg), safe=safe_serialization, base=base_record,
            )  # fmt: skip
            self._tuner.save_beside(name, adapter_folder(save_directory, name))
        activation = Activation(list(self.active_adapters), self._tuner.inventory.enabled)
        write_activation(Path(save_directory), activation)
        self.create_or_update_model_card(save_directory)

    def create_or_update_model_card(self, output_dir: str | os.PathLike) -> None:
        """Write or update `README.md` in `output_dir`."""
        write_card(self, self.active_peft_config, self.get_base_model(), output_dir)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Save to a temporary folder and upload it. Arguments as in transformers' `push_to_hub`; returns the URL."""
        return upload(self.save_pretrained, repo_id, "Upload model", **kwargs)

    # ---- loading -----------------------------------------------------------------------------------------------------
    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        *,
        strict: bool | str = False,
        ignore_mismatched_sizes: bool = False,
        num_virtual_tokens: int | None = None,
        torch_device: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """A saved adapter on its base model.

        Args:
            model: the base model, changed in place; unchanged if the adapter is refused.
            model_id: folder or Hub repository.
            is_trainable: for further training; otherwise frozen and in eval mode.
            config: instead of the saved one.
            ephemeral_gpu_offload: as in `LoraRuntimeConfig`, without effect.
            key_mapping: regex -> replacement for keys, None: the base model's own conversion of old checkpoints.
            strict: True refuses missing and unexpected tensors, False warns, "off" is silent about everything.
            num_virtual_tokens: cut a saved prompt to this length, or extend it by repeating it.
            torch_device: where the file is read to; None: the CPU, from which tensors are copied to their layers.
            kwargs: of `hf_hub_download` (revision, subfolder, token, ...).

        Raises:
            AdapterLoadError: wrong shapes, non-finite values, a damaged file; names every offender.
        """
        from peftfast.tasks import model_class

        if config is not None and not isinstance(config, PeftConfig):
            raise ValueError(f"The input config must be a PeftConfig, got {type(config)}")
        check_arguments(PeftModel.from_pretrained, kwargs, strict)
        stored = _read(model_id, model, key_mapping, strict, kwargs, config=config, device=torch_device)
        config, tensors = stored.config, stored.tensors
        if config.is_prompt_learning and is_trainable:
            raise ValueError("Cannot set a prompt learning adapter to trainable when loading pretrained adapter.")
        config.inference_mode = not is_trainable
        if num_virtual_tokens is not None:
            tensors = resize_saved_prompt(config, tensors, num_virtual_tokens)
        if cls is PeftModel:
            cls = model_class(config)
        with unchanged_if_refused(model):
            wrapped = cls(
                model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage,
                strict=strict is True, initialise=False,
            )  # fmt: skip
            wrapped._load_tensors(stored._replace(tensors=tensors), adapter_name, strict, ignore_mismatched_sizes, True)
        if not is_trainable:
            wrapped.eval()
        else:
            wrapped._tuner.after_load(adapter_name, model_id)
        return wrapped

    @classmethod
    def from_folder(
        cls, model: nn.Module, folder: str | os.PathLike, is_trainable: bool = False, **options: Any
    ) -> PeftModel:
        """All adapters that `save_pretrained` wrote into a folder, on their base model, active as they were then.

        Args:
            model: the base model, changed in place; unchanged if an adapter is refused.
            folder: "default" in itself, others in sub-folders of their names, all that are there (also checkpoints of a
                trainer). One that PEFT wrote does not say which were active: "default" then is, or else the first.
            is_trainable: the active ones are for further training; otherwise all are frozen and in eval mode.
            options: of `from_pretrained` and `load_adapter`.

        Raises:
            ValueError: no adapter there. AdapterLoadError: as `from_pretrained`, for any of them.
        """
        found = adapters_in(Path(folder))
        active, enabled = read_activation(Path(folder), [*found])
        (first, where), *others = found.items()
        with unchanged_if_refused(model):
            wrapped = cls.from_pretrained(model, where, first, is_trainable, **options)
            for name, where in others:
                wrapped.load_adapter(where, name, is_trainable, **options)
            wrapped._tuner.set_adapter(active, inference_mode=not is_trainable)
            if not enabled:
                wrapped._tuner.inventory.enable(False)
        return wrapped

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        *,
        strict: bool | str = False,
        ignore_mismatched_sizes: bool = False,
        num_virtual_tokens: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load an adapter beside the present ones, inactive; or, for a name that is present, its weights again.
        Arguments as of `from_pretrained`.

        Returns:
            (missing_keys, unexpected_keys) of this adapter only.
        """
        new = adapter_name not in self.peft_config
        present = None if new else self.peft_config[adapter_name]
        check_arguments(PeftModel.load_adapter, kwargs, strict)
        stored = _read(
            model_id, self.get_base_model(), key_mapping, strict, kwargs, present=present, device=torch_device
        )
        if new:
            config = stored.config
            if config.is_prompt_learning and is_trainable:
                raise ValueError("Cannot set a prompt learning adapter to trainable when loading pretrained adapter.")
            config.inference_mode = not is_trainable
            warn_beside_others([config, *self.peft_config.values()])
            if num_virtual_tokens is not None:
                stored = stored._replace(tensors=resize_saved_prompt(config, stored.tensors, num_virtual_tokens))
        elif num_virtual_tokens is not None:
            raise ValueError(
                f"num_virtual_tokens={num_virtual_tokens} is for a new adapter; {adapter_name!r} exists, and "
                "peftfast.resize_prompt changes its length"
            )
        before = self._tuner.inventory.places()
        if new:
            self.add_adapter(
                adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype,
                strict=strict is True, initialise=False,
            )  # fmt: skip
        try:
            fit = self._load_tensors(stored, adapter_name, strict, ignore_mismatched_sizes, new)
        except BaseException:
            if new:
                self.delete_adapter(adapter_name)
                self._tuner.inventory.remove_empty(except_for=before)
            raise
        if not is_trainable:
            if self.training:
                self.eval()
            else:
                self._tuner.inventory.eval()
        else:
            if new:
                self.set_requires_grad(adapter_name)
            self._tuner.after_load(adapter_name, model_id)
        return torch.nn.modules.module._IncompatibleKeys(fit.missing, fit.unexpected)

    def _load_tensors(
        self, stored: Stored, adapter_name: str, strict: bool | str, ignore_mismatched_sizes: bool, new: bool
    ) -> Fit:
        cfg, tensors = self.peft_config[adapter_name], stored.tensors
        self._tuner.inventory.check_not_merged(adapter_name, "load weights into")
        undo = self._tuner.before_load(adapter_name, tensors)
        try:
            fit = fit_state_dict(self, cfg, tensors, adapter_name, finite=strict != "off")
            judge(fit, stored.config, self.get_base_model(), stored.metadata, stored.changes)
            fit.check(strict, ignore_mismatched_sizes)
        except BaseException:
            if undo is not None:
                undo()
            raise
        fit.fill_gaps(self, everywhere=new and repeats_init(cfg))
        fit.apply(self)
        return fit

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
    """ValueError for a model that is a PeftModel already: around it, a second one would write into the first one's
    adapters, and its files would fit no base model."""
    if isinstance(model, PeftModel):
        raise ValueError(
            f"The model is a {type(model).__name__} already, with the adapters {list(model.peft_config)}. Another one "
            "is added by model.add_adapter(name, config), or from files by model.load_adapter(folder, name). To start "
            "anew, pass the bare base model: model.unload(), or model.get_base_model() of prompts; "
            "model.merge_and_unload() keeps what the adapters have learnt."
        )


def _read(
    model_id: Any,
    base: nn.Module,
    key_mapping: dict[str, str] | None,
    strict: bool | str,
    kwargs: dict[str, Any],
    **options: Any,
) -> Stored:
    if key_mapping is None:
        key_mapping = getattr(base, "_checkpoint_conversion_mapping", None) or None
    return read_adapter(model_id, key_mapping=key_mapping, strict=strict, **options, **kwargs)
