"""The module around a base model that carries weight adapters, of whatever method."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftfast.config import PeftConfig
from peftfast.files.beside import KeepsBeside
from peftfast.keys import in_base
from peftfast.many.merging import add_weighted_adapter, subtract
from peftfast.many.router import Choice, Router, as_router, copies_of_a_sample, named_inputs, resolve
from peftfast.method import Call, method_for
from peftfast.methods.combination import Combination
from peftfast.ops.casts import CastStore
from peftfast.quantization.quantize import dequantize_model, name_dense_layers
from peftfast.rows.routing import BASE
from peftfast.sharding import GatheredAsOne
from peftfast.training.checkpointing import checkpointing_switches, is_checkpointing, require_input_gradients
from peftfast.watch import Entry
from peftfast.wrapping.adding import add_adapter
from peftfast.wrapping.inventory import Inventory
from peftfast.wrapping.model_merger import ModelMerger, say_if_untied

#: What may be passed as `alora_offsets`: a number of tokens for every sample.
Offsets = Sequence[int | None] | Tensor

#: What stands for the config of a model without one.
DUMMY_MODEL_CONFIG = {"model_type": "custom"}


class BaseTuner(KeepsBeside, GatheredAsOne, nn.Module):
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
            warnings.warn(
                "Already found a `peft_config` attribute in the model. This will lead to having multiple adapters in "
                "the model. Make sure to know what you are doing!",
                stacklevel=3,
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
        model.__dict__.pop("_peftfast_inventory", None)  # of adapters injected before, it would miss those from now on
        model.peft_config = self.peft_config
        self.__dict__["_checkpointing"] = checkpointing_switches(model)
        self.prefix = method_for(config).prefix
        self._casts = CastStore()
        self.router: Router | None = None

    def install(self, wrapper: nn.Module) -> None:
        """Take one's place in a PeftModel."""
        wrapper.base_model = self

    # ---- adding ------------------------------------------------------------------------------------------------------
    def add(self, adapter_name: str, config: PeftConfig, **options: Any) -> None:
        """Add an adapter, frozen and inactive; options as of `add_adapter`."""
        add_adapter(self.inventory, adapter_name, config, **options)
        self._set_by_name = False

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
        nests = {key.split(".base_layer")[0] for key in self.inventory.layers if self.inventory.is_nested(key)}
        names = (key for key in self.inventory.names if key in nests)
        return [f"{key}.{layer.parameter_name}" for key in names for layer in self.inventory.nest(key)]

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
        self.inventory.say_if_biases_stay(stacklevel=3)
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
            ValueError, TypeError: before anything is changed; see `peftfast.many.merging.add_weighted_adapter`.
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
        if originals is not None and not dequantize:
            raise ValueError("originals are the dense weights to merge into: pass dequantize=True with them")
        if dequantize:
            dequantize_model(self, originals)
        return self._unload(True, progressbar, safe_merge, adapter_names, rounding)

    def unload(self) -> nn.Module:
        """The base model without the adapters (modules_to_save stay as trained)."""
        return self._unload(False, False, False, None)

    def _unload(
        self, merge: bool, progressbar: bool, safe_merge: bool, names: list[str] | None, rounding: str = "auto"
    ) -> nn.Module:
        from tqdm.auto import tqdm

        def progress(items: Iterable) -> Iterable:
            return tqdm(items, disable=not progressbar, desc="Unloading and merging model")

        if merge:
            ModelMerger(self.inventory).merge_for_good(names, safe_merge, rounding, progress)
        model = self.inventory.unload(merge, safe_merge, names)
        self.router = None  # there is nothing left to choose from
        say_if_untied(model)
        name_dense_layers(model)
        if hasattr(model, "peft_config"):
            del model.peft_config
        return model

    # ---- forward -----------------------------------------------------------------------------------------------------
    def forward(
        self, *args: Any, adapter_names: Choice | None = None, alora_offsets: Offsets | None = None, **kwargs: Any
    ) -> Any:
        """The base model's output with the active adapters.

        Args:
            adapter_names: instead of the active ones, an adapter for every sample: its name or "__base__", or its
                number or -1 in a tensor. Allowed in training as well: each adapter gets the gradient of its samples,
                if it is trainable, which those that are not active become by `set_requires_grad(names)`.
            alora_offsets: for every sample, how many tokens at its end aLoRAs act on, None or 0 for none; without it,
                those from the last occurrence of an adapter's `alora_invocation_tokens` in `input_ids` on.
        """
        if self.training and is_checkpointing(self._checkpointing):
            require_input_gradients(self.model)
        with (
            self.routed(adapter_names, args, kwargs),
            self.noting(args, kwargs, alora_offsets),
            self.compute_copies(),
        ):
            output = self.model(*args, **kwargs)
            self.inventory.control.follow(output)
            return self._with_loss_terms(output)

    def generate(
        self, *args: Any, adapter_names: Choice | None = None, alora_offsets: Offsets | None = None, **kwargs: Any
    ) -> Any:
        """The base model's `generate`, with the active adapters or, by `adapter_names`, with one for each prompt;
        `alora_offsets` as in `forward`, of the prompts."""
        copies = copies_of_a_sample(self.model, args, kwargs)
        with (
            self.routed(adapter_names, args, kwargs, copies),
            self.noting(args, kwargs, alora_offsets, copies, generates=True),
        ):
            return self.model.generate(*args, **kwargs)

    def noting(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        alora_offsets: Offsets | None,
        copies: tuple[int, ...] = (1,),
        generates: bool = False,
    ) -> AbstractContextManager[None]:
        """A context in which the adapters in force find what their methods note of these inputs (see `Noting`)."""
        inventory = self.inventory
        routing = inventory.control.routing
        if not inventory.enabled or routing is not None and routing.slots is not None:
            return nullcontext()
        notes: dict[str, Any] = {}
        call = None
        for name in inventory.active if routing is None else routing.names:
            method = inventory.method_of(name)
            if hasattr(method, "note"):
                if call is None:
                    inputs = {**named_inputs(self.model, args, kwargs), "alora_offsets": alora_offsets}
                    call = Call(self.model, inputs, generates, copies)
                notes[name] = method.note(name, self.peft_config[name], call)
        if not notes:
            return nullcontext()
        return self._following_steps(notes) if generates else inventory.control.noting(notes)

    @contextmanager
    def _following_steps(self, notes: Mapping[str, Any]) -> Iterator[None]:
        """`Control.noting`, with notes that are told of every call of the model."""
        control = self.inventory.control

        def step(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if control.is_noting(notes):  # another thread may be generating with the same model
                for note in notes.values():
                    if note is not None:
                        note.step(named_inputs(module, args, kwargs))

        with control.noting(notes), self.model.register_forward_pre_hook(step, with_kwargs=True):
            yield

    @contextmanager
    def routed(
        self,
        adapter_names: Choice | None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] = MappingProxyType({}),
        copies: tuple[int, ...] = (1,),
    ) -> Iterator[None]:
        """A context in which calls from this thread follow `adapter_names`, or what the router chooses for these
        inputs. With neither, nothing changes."""
        if adapter_names is None and self.router is not None and self.inventory.control.routing is None:
            adapter_names = self.router.choose(named_inputs(self.model, args, kwargs))
        if adapter_names is None:
            yield
            return
        routing = resolve(self.inventory, adapter_names, args, kwargs, copies)
        for layer in self.inventory.own_layers():
            if routing.slots is not None or not layer._adapters.isdisjoint(routing.names):
                raise TypeError(f"{type(layer).__name__}, a layer of one's own, does not support mixed adapter batches")
        with self.inventory.control.use(routing):
            yield

    def set_router(self, router: Router | Callable[[Mapping[str, Any]], Choice | None] | None) -> None:
        """Let `router` choose the adapters of every batch that comes without `adapter_names`; None: none any more."""
        self.router = as_router(router)

    def adapter_numbers(self, names: Sequence[str], device: torch.device | str | None = None) -> Tensor:
        """[len(names)] int64: the numbers of these adapters, for `adapter_names=` as a tensor; -1 for "__base__"."""
        self.inventory.check_known([n for n in names if n != BASE])
        numbers = [-1 if n == BASE else self.inventory.numbers[n] for n in names]
        made = torch.tensor(numbers, dtype=torch.int64, device=device or self._device())
        self.inventory.number_table(made.device)  # now, not in a graph that would guard on its absence
        return made

    def unchanging_adapters(self) -> AbstractContextManager[None]:
        """A context that promises: in it, nobody writes to adapters' tensors or scalings or replaces them, other than
        by adding, loading, swapping, scaling and deleting adapters with this library. Mixed batches need not look for
        changes before every forward then, which for sixteen adapters takes as long as a third of a small model.

        Every 128th mixed forward and the end of the context look all the same.

        Raises:
            RuntimeError: there, if the promise was broken.
        """
        return self.inventory.control.unchanging()

    def forget_stacks(self) -> None:
        """Make anew what is made of factors and kept, as the stacks of mixed batches and of experts: needed after
        factors were written through `.data`."""
        for layer in self.inventory.layers.values():
            layer.changed()

    def compute_copies(self) -> Any:
        """A context in which the active factors are cast to autocast's dtype once for all layers."""
        if torch.compiler.is_compiling() or self.inventory.control.routing is not None:
            return nullcontext()
        device = self._device().type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return nullcontext()
        return self._casts.window(self.inventory.active, self._active_factors, torch.get_autocast_dtype(device))

    def _active_factors(self) -> tuple[list[Tensor], list[Entry]]:
        """The factors, and what has to stay for them to be these."""
        names = self.inventory.active
        adapters = [
            (layer.adapters, name, layer.adapters[name])
            for layer in self.inventory.layers.values()
            for name in set(names) & layer.adapters.keys()
        ]
        factors = [p for *_, adapter in adapters for p in adapter.parameters().values() if p.dim() == 2]
        return factors, [*adapters, *[place for *_, adapter in adapters for place in adapter.places()]]

    def _device(self) -> torch.device:
        layer = next(iter(self.inventory.layers.values()), None)
        return torch.device("cpu") if layer is None else layer.site.weight.device

    def _with_loss_terms(self, output: Any) -> Any:
        """Methods may add to the loss (AdaLoRA's orthogonality)."""
        if not isinstance(getattr(output, "loss", None), Tensor):
            return output
        routing = self.inventory.control.routing
        for name in self.inventory.active if routing is None else routing.names:
            method = method_for(self.peft_config[name])
            if hasattr(method, "loss_term"):  # asking the protocol takes as long as a small product
                adapters = [layer.adapters[name] for layer in self.inventory.layers.values() if name in layer.adapters]
                term = method.loss_term(adapters)
                if term is not None:
                    output.loss = output.loss + term.to(output.loss.dtype)
        return output

    def read_from_outside(self) -> Iterator[nn.Parameter]:
        """What terms of the loss are made of."""
        regularised = [name for name, cfg in self.peft_config.items() if hasattr(method_for(cfg), "loss_term")]
        for layer in self.inventory.layers.values():
            for name in regularised:
                if name in layer.adapters:
                    yield from layer.trainable(layer.adapters[name])

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
