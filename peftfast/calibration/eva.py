"""EVA: factors from the principal components of layer inputs, ranks by the variance they explain (Paischer et al.,
arXiv 2410.07170)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.calibration.ranks import drop_adapter, resize_adapter
from peftfast.config import require_config, require_module
from peftfast.devices import forked, widest
from peftfast.errors import PeftWarning, check_present, close_matches, enumerate_some, warn
from peftfast.keys import in_base
from peftfast.layers.layer import BaseTunerLayer
from peftfast.methods.lora.config import LoraConfig
from peftfast.methods.lora.settings import EvaConfig
from peftfast.modes import in_mode, removed_after
from peftfast.ops.finite import is_finite
from peftfast.sites.linear import LinearSite
from peftfast.wrapping.patterns import pattern_of, pattern_value
from peftfast.wrapping.targets import linear_modules, make_matcher, set_targets

MAX_PASSES = 100  # over the data, before components that still turn are taken as they are


class RunningComponents:
    """Principal components of rows that arrive in batches (Ross et al., 2008): what is kept is `count` components,
    their singular values and the mean.

    Attributes:
        components: [count, K], best first. singular_values: [count].
        explained: [count], share of the variance that each component explains.
    """

    def __init__(self, count: int) -> None:
        self.count, self.seen = count, 0
        self.components = self.singular_values = self.explained = self.mean = self.scatter = None
        self.converged: Tensor | None = None

    def update(self, x: Tensor, threshold: float) -> bool:
        """Take rows x [M, K] in; False if they are fewer than components and were left out."""
        if len(x) < self.count:
            return False
        x = x.float()
        wide = widest(x.device)
        mean, total = x.mean(0, dtype=wide), self.seen + len(x)
        centred = x - mean.float()
        scatter = centred.to(wide).square().sum()
        if self.seen:
            shift = self.mean - mean
            weight = (self.seen / total * len(x)) ** 0.5
            centred = torch.cat(
                [self.singular_values[:, None] * self.components, centred, (weight * shift).float()[None]]
            )
            scatter = scatter + self.scatter + weight**2 * shift.square().sum()
            mean = mean + shift * (self.seen / total)
        with forked(x.device, 42):  # the same data gives the same components
            _, s, v = torch.svd_lowrank(centred, q=min(2 * self.count, *centred.shape), niter=4)
        v = v.t()
        largest = v.gather(1, v.abs().argmax(1, keepdim=True))
        before, new = self.components, (v * largest.sign())[: self.count]
        self.components, self.singular_values = new, s[: self.count]
        # rows that are all alike have no variance to explain
        self.explained = self.singular_values.to(wide).square() / scatter.clamp(min=torch.finfo(scatter.dtype).tiny)
        self.mean, self.scatter, self.seen = mean, scatter, total
        self.converged = None if before is None else torch.cosine_similarity(new, before) >= threshold
        return True

    def is_settled(self, rank: int) -> bool:
        return rank == 0 or (self.converged is not None and bool(self.converged[:rank].all()))


def distribute(shares: Mapping[str, Tensor], budget: int, minimum: int = 0) -> dict[str, int]:
    """How many of `budget` ranks each module gets if the largest shares win; `minimum` to each in any case."""
    entries = [(float(v), name) for name, values in shares.items() for v in values[minimum:].tolist()]
    entries.sort(key=lambda entry: -entry[0])
    ranks = {name: min(minimum, len(values)) for name, values in shares.items()}
    for _, name in entries[: max(0, budget - sum(ranks.values()))]:
        ranks[name] += 1
    return ranks


# ---- inputs ----------------------------------------------------------------------------------------------------------
def token_mask(model_input: Mapping[str, Tensor], peft_config: LoraConfig) -> Tensor | None:
    """Which tokens [B, T] count: not padding and, if the config says so and every token has one, with a label. None for
    inputs that are no tokens."""
    if not isinstance(model_input, Mapping):
        raise TypeError("When using `prepare_model_inputs_fn_language_modeling` inputs must be a dictionary")
    mask, ids, labels = (model_input.get(name) for name in ("attention_mask", "input_ids", "labels"))
    if mask is None and ids is None:
        return None
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    settings = peft_config.eva_config or EvaConfig()
    if settings.use_label_mask and labels is not None and labels.shape == mask.shape:
        mask = mask & (labels != settings.label_mask_value)
    return mask


def token_rows(layer_input: Any, mask: Tensor | None, layer_name: str) -> Tensor:
    """Those tokens' rows of a layer's input, [n, K]; all rows of one that does not have these tokens (behind a pooling,
    in a decoder beside the encoder whose tokens they are)."""
    x = _tensor(layer_input, layer_name)
    if mask is None or x.shape[:-1] != mask.shape:
        return all_rows(x, mask, layer_name)
    return x[mask.to(x.device)]


def prepare_model_inputs_fn_language_modeling(model_input: Mapping[str, Tensor], peft_config: LoraConfig) -> Tensor:
    """Indices [n, 2] of the tokens that count, see `token_mask`."""
    mask = token_mask(model_input, peft_config)
    if mask is None:
        raise ValueError(f"A batch of {enumerate_some(model_input)} has no tokens; pass prepare_model_inputs_fn=None")
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """Those tokens' rows of a layer's input, [n, K]."""
    return _tensor(layer_input, layer_name)[model_input.T.unbind()]


def all_rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """All rows of a layer's input, [n, K]."""
    x = _tensor(layer_input, layer_name)
    return x.reshape(-1, x.shape[-1])


def _tensor(layer_input: Any, layer_name: str) -> Tensor:
    if isinstance(layer_input, (tuple, list)):
        layer_input = layer_input[0]
    if not isinstance(layer_input, Tensor):
        raise TypeError(
            f"unsupported input type {type(layer_input)} for prepare_layer_inputs_fn in layer {layer_name}, please "
            "provide a custom prepare_layer_inputs_fn"
        )
    return layer_input


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    return model(**inputs)


def _gathered(x: Tensor) -> Tensor:
    """The rows of all processes."""
    sizes = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
    longest = int(torch.cat(sizes).max())
    padded = x.new_zeros(longest, x.shape[1])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, sizes, strict=True)])


def _watched(modules: Mapping[str, nn.Module], seen: Callable[[str, tuple], None]) -> AbstractContextManager[None]:
    return removed_after(m.register_forward_pre_hook(lambda _, args, n=n: seen(n, args)) for n, m in modules.items())


def placed(batches: Iterable[Any], model: nn.Module) -> Iterator[Any]:
    """The batches, on the device of the model's Parameters."""
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), None)
    return (batch if device is None else _to(batch, device) for batch in batches)


def _to(inputs: Any, device: torch.device) -> Any:
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {k: _to(v, device) for k, v in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        moved = [_to(v, device) for v in inputs]
        return type(inputs)(*moved) if hasattr(inputs, "_fields") else type(inputs)(moved)  # named tuples
    return inputs


# ---- components ------------------------------------------------------------------------------------------------------
def _sharing(
    found: dict[str, RunningComponents], counts: Mapping[str, int], rows: Callable[[str], Callable[..., Tensor]]
) -> Callable[[str, tuple], None]:
    """What fills `found` as layers are called: those that are called with one and the same tensor, of which they take
    the same rows, share their components."""
    leaders: dict[int, tuple[weakref.ref, str]] = {}  # by the tensor's id: the tensor, and who was called with it first

    def called(name: str, args: tuple) -> None:
        x = _tensor(args, name)
        known = leaders.get(id(x))
        leader = known[1] if known is not None and known[0]() is x and rows(known[1]) is rows(name) else name
        leaders[id(x)] = (weakref.ref(x), leader)
        if leader in found and leader != name:
            found[leader].count = max(found[leader].count, counts[name])
            found[name] = found[leader]
        else:
            found.setdefault(name, RunningComponents(counts[name]))

    return called


@torch.no_grad()
def components_of(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Any],
    counts: Mapping[str, int],
    wanted: Callable[[Mapping[str, RunningComponents]], Mapping[str, int]],
    threshold: float,
    forward_fn: Callable[..., Any],
    prepare: Callable[[Any], Any] | None,
    rows: Callable[[str], Callable[..., Tensor]],
    gather: bool = False,
    progress: bool = False,
) -> dict[str, RunningComponents]:
    """Run batches, again and again, until the components that `wanted` asks for have settled."""
    found: dict[str, RunningComponents] = {}
    goal: Mapping[str, int] = {}

    def update(prepared: Any, name: str, args: tuple) -> None:
        if goal and found[name].is_settled(max(goal[n] for n in found if found[n] is found[name])):
            return
        x = rows(name)(args, prepared, name)
        if not is_finite(x):
            raise ValueError(f"{name}: its inputs hold NaN or infinite values; check the calibration data")
        found[name].update(_gathered(x) if gather else x, threshold)

    def gone_through_once() -> ValueError:
        return ValueError(
            f"The data is gone through again and again, which a {type(batches).__name__} cannot be; pass a list"
        )

    if isinstance(batches, Iterator):
        raise gone_through_once()
    batch = None
    for batch in placed(batches, model):  # usually the first one reaches all modules
        with _watched({n: m for n, m in modules.items() if n not in found}, _sharing(found, counts, rows)):
            forward_fn(model, batch)
        if len(found) == len(modules):
            break
    if batch is None:
        raise ValueError("dataloader is empty")
    unused = [name for name in modules if name not in found]
    if unused:
        raise ValueError(f"The data did not reach these modules: {enumerate_some(unused)}")
    owners = {id(c): name for name, c in reversed(list(found.items()))}
    running = {name: modules[name] for name in owners.values()}
    for _ in range(MAX_PASSES):
        short, batch = True, None
        for batch in placed(batches, model):
            with _watched(running, partial(update, batch if prepare is None else prepare(batch))):
                forward_fn(model, batch)
            if any(c.components is None for c in found.values()):
                continue
            short, goal = False, wanted(found)
            settled = sum(c.is_settled(goal[n]) for n, c in found.items())
            if progress:
                print(f"\r{settled}/{len(found)} layers have converged", end="", flush=True)
            if settled == len(found):
                if progress:
                    print()
                return found
        if batch is None:
            raise gone_through_once()
        if short:
            lacking = [f"{n} ({c.count})" for n, c in found.items() if c.components is None]
            raise ValueError(
                f"No batch has as many rows as these modules have components: {enumerate_some(lacking)}; use larger "
                "batches"
            )
    warn(
        f"After {MAX_PASSES} passes over the data {len(found) - settled} layers' components still change by more than "
        f"tau={threshold} allows; they are used as they are. More data would help.",
        PeftWarning,
    )
    return found


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[..., Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[..., Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable[..., Tensor] | Mapping[str, Callable[..., Tensor]] | None = (
        prepare_layer_inputs_fn_language_modeling
    ),
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """The principal components [rank, K] of every target's inputs, by module name; ranks may be 0.

    Args:
        model: with a LoRA adapter, or without one if `peft_config` is given.
        dataloader: batches; gone through repeatedly.
        forward_fn: runs the model on a batch.
        prepare_model_inputs_fn: (batch, config) -> what `prepare_layer_inputs_fn` gets as its second argument.
        prepare_layer_inputs_fn: (layer input, that, layer name) -> rows [n, K]; one for all layers, one for each by
            name, or None: all rows.
        gather_distributed_inputs: use the rows of all processes.
    """
    require_module(model)
    adapted = hasattr(model, "peft_config")
    if peft_config is None:
        if not adapted:
            raise ValueError("peft_config is required if model is not a PeftModel")
        peft_config = _config(model, adapter_name)
    require_config(peft_config)
    settings = peft_config.eva_config or EvaConfig()
    modules = _eva_modules(model, peft_config, adapter_name if adapted else None)
    given = prepare_layer_inputs_fn
    if (prepare_model_inputs_fn, given) == (
        prepare_model_inputs_fn_language_modeling,
        prepare_layer_inputs_fn_language_modeling,
    ):
        prepare_model_inputs_fn, given = token_mask, token_rows  # which know layers that have other tokens
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - set(modules))
        if unknown:
            raise ValueError(
                "prepare_layer_inputs_fn is a mapping but the following module names were not found in the model: "
                f"{unknown}"
            )
    ranks = {n: pattern_value(peft_config.rank_pattern, in_base(n), peft_config.r) for n in modules}
    limit = max(1, max((max(p.shape) for p in model.parameters() if p.dim()), default=1) // peft_config.r)
    rho = min(settings.rho, limit) if settings.rho > 1000 else settings.rho
    counts = {n: min(round(r * rho), modules[n].in_features if hasattr(modules[n], "in_features") else r * 1000)
              for n, r in ranks.items()}  # fmt: skip
    budget = sum(ranks.values())

    def wanted(found: Mapping[str, RunningComponents]) -> dict[str, int]:
        return distribute({n: c.explained[: counts[n]] for n, c in found.items()}, budget)

    def rows(name: str) -> Callable[..., Tensor]:
        return (given.get(name) if isinstance(given, Mapping) else given) or all_rows

    prepare = None
    if prepare_model_inputs_fn is not None:

        def prepare(batch: Any) -> Any:
            return prepare_model_inputs_fn(batch, peft_config)

    gather = gather_distributed_inputs and dist.is_available() and dist.is_initialized()
    with in_mode(model, training=False), model.disable_adapter() if adapted else nullcontext():
        found = components_of(
            model, modules, dataloader, counts, wanted, settings.tau, forward_fn, prepare, rows, gather,
            show_progress_bar,
        )  # fmt: skip
    result = {}
    for name, rank in wanted(found).items():
        part = found[name].components[:rank].clone()
        if settings.whiten:
            part = part / found[name].singular_values[:rank].sqrt()[:, None]
        result[name] = part
    return result


def _config(model: nn.Module, adapter_name: str) -> LoraConfig:
    check_present(adapter_name, model.peft_config)
    return model.peft_config[adapter_name]


def _eva_modules(model: nn.Module, cfg: LoraConfig, adapter: str | None) -> dict[str, nn.Module]:
    if adapter is not None:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer) and adapter in m.adapters}
        return {n: m for n, m in layers.items() if isinstance(m.site, LinearSite)}
    matcher = make_matcher(cfg)
    return {n: m for n, m in linear_modules(model) if cfg.target_modules is None or matcher(n)}


def _check_components(found: Mapping[str, Tensor], adapters: Mapping[str, Adapter]) -> None:
    """ValueError for components that are no directions of their module's input; a warning for modules that the adapter
    does not have."""
    wrong = []
    for key, part in found.items():
        slots = adapters[key].parameters() if key in adapters else {}
        if "lora_A" in slots:
            size = slots["lora_A"][0].numel()
            if part.dim() < 2 or part.shape[1:].numel() != size:
                wrong.append(f"{key} {list(part.shape)}, which needs [rank, {size}]")
            elif not is_finite(part):
                wrong.append(f"{key}, which has NaN or infinite values")
        elif slots:
            wrong.append(f"{key}, which is looked up and has no directions")
    if wrong:
        raise ValueError(f"The eva_state_dict has components that do not fit: {enumerate_some(wrong)}")
    unknown = [key for key in found if key not in adapters]
    if unknown:
        near = "".join(dict.fromkeys(close_matches(key, adapters, 1) for key in unknown[:8]))
        warn(
            f"The eva_state_dict has modules that the adapter does not have: {enumerate_some(unknown)}.{near}",
            PeftWarning,
        )


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[..., Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[..., Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable[..., Tensor] | Mapping[str, Callable[..., Tensor]] | None = (
        prepare_layer_inputs_fn_language_modeling
    ),
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Fill the factors of a LoRA with init_lora_weights="eva": A from the data, B zero, ranks redistributed.

    The config's `rank_pattern`, `alpha_pattern` and `target_modules` are updated; modules that get no rank are no
    longer adapted. Arguments as in `get_eva_state_dict`, or its result as `eva_state_dict`.

    Raises:
        ValueError: no adapter, several active ones, another initialisation, one that is merged, neither data nor state,
            or a state that does not fit. Nothing is changed then.
    """
    if not hasattr(model, "peft_config"):
        raise ValueError("model must be a PeftModel")
    if len(model.active_adapters) > 1:
        raise ValueError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    cfg = _config(model, adapter_name)
    if cfg.init_lora_weights != "eva":
        raise ValueError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    inventory = model.base_model.inventory
    inventory.check_not_merged(adapter_name, "initialise")  # the data goes through the base, which unmerges
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, None, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
            gather_distributed_inputs, show_progress_bar,
        )  # fmt: skip
    found = {in_base(name): part for name, part in eva_state_dict.items()}
    keys = [k for k, layer in inventory.layers.items() if adapter_name in layer.adapters]
    _check_components(found, {k: inventory.layers[k].adapters[adapter_name] for k in keys})
    missing = [k for k in keys if k not in found]
    ranks, alphas = {}, {}
    for key in keys:
        rank = pattern_value(cfg.rank_pattern, key, cfg.r)
        alpha = pattern_value(cfg.alpha_pattern, key, cfg.lora_alpha)
        new = rank if key in missing else len(found[key])
        ranks[key] = new
        alphas[key] = alpha * new / rank if cfg.eva_config.adjust_scaling_factors and new != rank else alpha
    kept = [k for k in keys if ranks[k]]
    if not kept:
        raise ValueError("EVA left no module with a rank; is `rho` or the data too small?")
    own = {k: inventory.layers[k].adapters[adapter_name] for k in kept}
    # made anew: those of another rank, and those that have had no values yet (low_cpu_mem_usage)
    changed = [
        k for k, a in own.items() if ranks[k] != a.setting("r") or any(t.is_meta for t in a.parameters().values())
    ]
    drop_adapter(inventory, adapter_name, [k for k in keys if not ranks[k]])
    cfg.rank_pattern = pattern_of({k: ranks[k] for k in kept}, cfg.r)
    cfg.alpha_pattern = pattern_of({k: alphas[k] for k in kept}, cfg.lora_alpha)
    if len(kept) < len(keys):
        set_targets(cfg, kept, inventory.names, set(kept))
    resize_adapter(inventory, adapter_name, changed)
    for key in kept:
        if key not in missing:
            a = inventory.layers[key].adapters[adapter_name]["lora_A"]
            a.copy_(found[key].reshape(a.shape))
    if missing:
        warn(
            "the following layers were initialized with init_lora_weights=True because they were not found in the eva "
            f"state_dict (embeddings and convolutions have none): {missing}",
            PeftWarning,
        )
