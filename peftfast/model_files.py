"""Adapters of a PeftModel as files: saved, uploaded, loaded with their model or beside others."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from peftfast.config import PeftConfig, require_flag, require_module
from peftfast.errors import PeftWarning, check_path, every_name, warn
from peftfast.files.activation import Activation, adapters_in, read_activation, write_activation
from peftfast.files.atomic import find_file
from peftfast.files.beside import room_for
from peftfast.files.card import write_card
from peftfast.files.convert_init import as_plain_lora, warn_beside_others
from peftfast.files.fingerprint import fingerprint
from peftfast.files.fit import Fit, fit_state_dict, judge
from peftfast.files.hub import upload
from peftfast.files.io import (
    Stored,
    adapter_folders,
    auto_mapping_of,
    check_arguments,
    check_folder,
    name_unknown,
    needs_embedding_layers,
    read_adapter,
    save_adapter,
)
from peftfast.files.renamed import renamed
from peftfast.files.state import adapter_state_dict, is_in, without_places
from peftfast.keys import in_base, strip_wrappers
from peftfast.method import repeats_init
from peftfast.prompts.prompt_model import resize_saved_prompt
from peftfast.wrapping.adding import check_name
from peftfast.wrapping.undo import unchanged_if_refused

if TYPE_CHECKING:
    from typing_extensions import Self


#: Arguments of transformers' `save_pretrained` that mean nothing for an adapter.
_OF_WHOLE_MODELS = {
    "distributed_checkpoint", "max_shard_size", "save_function", "save_original_format", "save_peft_format", "token",
    "variant",
}  # fmt: skip


class HasFiles:
    """What a PeftModel does with files. It needs the model's configs, its tuner, and a class to make."""

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
            path_initial_model_for_weight_conversion: the adapter as it was right after an initialisation that changed
                the base (PiSSA, OLoRA, CorDA, LoRA-GA); the result is a plain LoRA of twice the rank for the unchanged
                base.
            kwargs: `state_dict`, tensors gathered from a sharded model. What transformers' `save_pretrained` takes to
                write whole models has no effect.
        """
        check_folder(save_directory)
        require_flag(safe_serialization, "safe_serialization")
        state_dict = kwargs.pop("state_dict", None)
        name_unknown(HasFiles.save_pretrained, [n for n in kwargs if n not in _OF_WHOLE_MODELS], ("state_dict",))
        names = self._to_save(selected_adapters, state_dict)
        initial = path_initial_model_for_weight_conversion
        start = None if initial is None else read_adapter(initial)
        complete = is_main_process or state_dict is None  # what is gathered by one process is empty in the others
        prepared = []
        for name in names:
            cfg = self.peft_config[name]
            embeddings = needs_embedding_layers(self, cfg, name, save_embedding_layers)
            tensors = adapter_state_dict(self, cfg, name, state_dict, embeddings, complete=complete)
            if complete and start is not None:
                cfg, tensors = as_plain_lora(self, name, self.peft_config, tensors, start)
            prepared.append((name, cfg, tensors))
        if not is_main_process:
            return
        saved = {without_places(in_base(key)) for *_, tensors in prepared for key in tensors}
        trained = [strip_wrappers(name) for name, p in self._tuner.inventory.base_parameters() if p.requires_grad]
        lost = [name for name in trained if without_places(name) not in saved and "_flat_param" not in name]
        if lost:
            warn(
                f"The base model has trainable parameters that are not saved with its adapters: {every_name(lost)}. "
                "Modules that modules_to_save names are.",
                PeftWarning,
            )
        folders = adapter_folders(save_directory, names)
        # what was rewritten is for the weights before the initialisation, which are not here
        base_record = "" if start is not None else fingerprint(self.get_base_model())
        for name, cfg, tensors in prepared:
            base = cfg.base_model_name_or_path or getattr(self.get_base_model(), "name_or_path", None) or None
            cfg.base_model_name_or_path = base
            save_adapter(
                folders[name], cfg, tensors,
                auto_mapping=auto_mapping_of(self.get_base_model(), cfg), safe=safe_serialization, base=base_record,
            )  # fmt: skip
            self._tuner.save_beside(name, folders[name])
        activation = Activation(list(self.active_adapters), self._tuner.inventory.enabled)
        write_activation(Path(save_directory), activation)
        self.create_or_update_model_card(save_directory)

    def _to_save(self, selected: Sequence[str] | str | None, state_dict: Mapping[str, Any] | None) -> list[str]:
        """The adapters that `save_pretrained` is to save; of all, those that a given state dict has."""
        present = list(self.peft_config)
        if not present:
            raise ValueError("There is no adapter to save: this model's adapters were unloaded or deleted")
        names = present if selected is None else [selected] if isinstance(selected, str) else list(selected)
        if any(name not in present for name in names):
            raise ValueError(
                "You passed an invalid `selected_adapters` arguments, current supported adapter names are "
                f"{present} - got {names}."
            )
        if not names:
            raise ValueError(f"selected_adapters=[] leaves nothing to save; the adapters are {present}")
        if state_dict is None or selected is not None or len(names) == 1:
            return names
        absent = [name for name in names if not is_in(state_dict, self, name)]
        if not absent or absent == names:
            return names
        warn(
            f"The given state_dict has nothing of adapters {absent}, which are not saved: frozen parameters "
            "are not gathered under DeepSpeed ZeRO-3. model.save_pretrained(folder), called by all processes "
            "and without a state_dict, saves all adapters.",
            PeftWarning,
        )
        return [name for name in names if name not in absent]

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
    ) -> Self:
        """A saved adapter on its base model.

        Args:
            model: the base model, changed in place; unchanged if the adapter is refused.
            model_id: folder or Hub repository.
            is_trainable: for further training; otherwise frozen and in eval mode.
            config: instead of the saved one; changed in place, unchanged if the adapter is refused.
            ephemeral_gpu_offload: as in `LoraRuntimeConfig`, without effect.
            key_mapping: regex -> replacement for keys; the base model's own renamings come after it.
            strict: True refuses missing and unexpected tensors, False warns, "off" is silent about everything.
            num_virtual_tokens: cut a saved prompt to this length, or extend it by repeating it.
            torch_device: where the file is read to; None: the CPU, from which tensors are copied to their layers.
            kwargs: of `hf_hub_download` (revision, subfolder, token, ...).

        Raises:
            AdapterLoadError: wrong shapes, non-finite values, a damaged file; names every offender.
        """
        require_module(model)
        require_flag(is_trainable, "is_trainable")
        if config is not None and not isinstance(config, PeftConfig):
            raise ValueError(f"The input config must be a PeftConfig, got {type(config)}")
        check_arguments(HasFiles.from_pretrained, kwargs, strict)
        with unchanged_if_refused(model, config):
            stored = _read(model_id, model, key_mapping, strict, kwargs, config=config, device=torch_device)
            stored = _for_adding(stored, is_trainable, num_virtual_tokens)
            wrapped = cls._for_config(stored.config)(
                model, stored.config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage,
                strict=strict is True, initialise=False,
            )  # fmt: skip
            wrapped.load_adapter(  # what others put in its place, a subclass or NVIDIA's ModelOpt, counts here too
                model_id, adapter_name, is_trainable=is_trainable,
                strict=strict, ignore_mismatched_sizes=ignore_mismatched_sizes, _stored=stored, **kwargs,
            )  # fmt: skip
        return wrapped

    @classmethod
    def from_folder(
        cls, model: nn.Module, folder: str | os.PathLike, is_trainable: bool = False, **options: Any
    ) -> Self:
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
        require_module(model)
        check_path(folder, "A folder of adapters")
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
        _stored: Stored | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load an adapter beside the present ones, inactive; or, for a name that is present, its weights again.
        Arguments as of `from_pretrained`, which gives what it has read (`_stored`) for the adapter that it made.

        Returns:
            (missing_keys, unexpected_keys) of this adapter only; what is missing by its name in the model.
        """
        check_name(adapter_name)
        require_flag(is_trainable, "is_trainable")
        new, empty = adapter_name not in self.peft_config, _stored is not None
        stored = _stored
        if stored is None:
            present = None if new else self.peft_config[adapter_name]
            check_arguments(HasFiles.load_adapter, kwargs, strict)
            stored = _read(
                model_id, self.get_base_model(), key_mapping, strict, kwargs, present=present, device=torch_device
            )
        if new:
            stored = _for_adding(stored, is_trainable, num_virtual_tokens)
            warn_beside_others([stored.config, *self.peft_config.values()])
        elif num_virtual_tokens is not None:
            raise ValueError(
                f"num_virtual_tokens={num_virtual_tokens} is for a new adapter; {adapter_name!r} exists, and "
                "peftfast.resize_prompt changes its length"
            )
        before = self._tuner.inventory.wrapped()
        try:
            if new:
                self.add_adapter(
                    adapter_name, stored.config, low_cpu_mem_usage, autocast_adapter_dtype,
                    strict=strict is True, initialise=False,
                )  # fmt: skip
            fit = self._load_tensors(stored, adapter_name, strict, ignore_mismatched_sizes, new or empty)
        except BaseException:
            if new and adapter_name in self.peft_config:
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
            self._tuner.after_load(adapter_name, _finder(model_id, kwargs))
        return fit.incompatible_keys()

    def _load_tensors(
        self, stored: Stored, adapter_name: str, strict: bool | str, ignore_mismatched_sizes: bool, new: bool
    ) -> Fit:
        cfg, tensors = self.peft_config[adapter_name], stored.tensors
        self._tuner.inventory.check_not_merged(adapter_name, "load weights into")
        with room_for(self._tuner, adapter_name, tensors):
            fit = fit_state_dict(self, cfg, tensors, adapter_name, finite=strict != "off")
            judge(fit, stored.config, self.get_base_model(), stored.metadata, stored.changes)
            fit.check(strict, ignore_mismatched_sizes)
        fit.fill_gaps(self, empty=new, everywhere=new and repeats_init(cfg))
        fit.apply(self)
        return fit


def _read(
    model_id: Any,
    base: nn.Module,
    key_mapping: dict[str, str] | None,
    strict: bool | str,
    kwargs: dict[str, Any],
    **options: Any,
) -> Stored:
    stored = read_adapter(model_id, key_mapping=key_mapping, strict=strict, **options, **kwargs)
    config = stored.config if options.get("present") is None else None
    return stored._replace(tensors=renamed(base, config, stored.tensors))


def _finder(model_id: Any, kwargs: dict[str, Any]) -> Callable[[str], str | None]:
    """What finds files beside those of an adapter that was loaded with these arguments."""
    hub, _ = PeftConfig._split_hub_arguments(kwargs)
    return lambda name: find_file(model_id, name, at_hand=True, **hub)


def _for_adding(stored: Stored, is_trainable: bool, num_virtual_tokens: int | None) -> Stored:
    """An adapter that was read as it is to be added; its config is changed in place."""
    config, tensors = stored.config, stored.tensors
    if config.is_prompt_learning and is_trainable:
        raise ValueError("Cannot set a prompt learning adapter to trainable when loading pretrained adapter.")
    config.inference_mode = not is_trainable
    if num_virtual_tokens is not None:
        tensors = resize_saved_prompt(config, tensors, num_virtual_tokens)
    return stored._replace(tensors=tensors)
