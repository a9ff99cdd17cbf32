"""Sharded models (FSDP2, tensor parallelism, ZeRO-3): tensors put together from their shards and taken apart."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, whole: FSDP2's and tensor parallelism's DTensors and ZeRO-3's partitioned parameters are put
    together from all processes, so all processes have to call this. Others are passed through.

    Returns:
        Plain tensors; gathered ones are copies.
    """
    partitioned = {k: t for k, t in tensors.items() if hasattr(t, "ds_id")}
    whole = _from_zero3(partitioned) if partitioned else {}
    for key, tensor in tensors.items():
        if key not in whole:
            whole[key] = put_together(tensor)
    return {key: whole[key].detach() for key in tensors}


def _from_zero3(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {key: parameter.detach().clone() for key, parameter in parameters.items()}


def copy_whole(target: Tensor, source: Tensor) -> None:
    """Write a tensor into one that may be sharded; every process has all of `source`, or its shard if that is too."""
    with torch.no_grad(), whole([target]):
        if is_distributed(target):
            source = taken_apart(source.to(device=target.device, dtype=target.dtype), target)
        target.copy_(source)


def is_distributed(tensor: Tensor | None) -> bool:
    """Whether it is one of FSDP2's or tensor parallelism's (DTensor)."""
    distributed = _distributed_tensor_class()
    return distributed is not None and isinstance(tensor, distributed)


def put_together(tensor: Tensor) -> Tensor:
    """A DTensor whole, with its graph, so all processes have to call this; any other tensor as it is."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor


def taken_apart(source: Tensor, like: Tensor | None) -> Tensor:
    """A tensor that is sharded as `like` is, if that is, of a whole one that every process has or a sharded one."""
    if not is_distributed(like):
        return source
    if is_distributed(source):
        return source.redistribute(like.device_mesh, like.placements)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(source, like.device_mesh, like.placements, src_data_rank=None)


def as_copies(tensor: Tensor, like: Tensor | None) -> Tensor:
    """A whole tensor, which every process has, as one that goes with `like`, of which every process may have a part."""
    if not is_distributed(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)


def is_sharded_by_fsdp2(model: nn.Module) -> bool:
    """Whether `fully_shard` was called on the model, on parts of it, or on what is around it."""
    kind = _fsdp2_class()
    return kind is not None and any(
        isinstance(module, kind) or _hooks_of_fsdp2(module) or any(map(_is_fsdp2s, module._parameters.values()))
        for module in model.modules()
    )


def gather_without_wrapper(model: nn.Module, gone: Collection[nn.Module] | None = None) -> None:
    """Make whole what FSDP2 put together for the forward of wrappers that are no longer in the model or around it:
    nobody would. What it puts together for modules that are there stays with them. All processes have to call this.

    Args:
        gone: the wrappers; None: all modules that are not in the model.
    """
    groups = [*_groups_of_fsdp2()]
    present = set(model.modules()) if groups else set()
    for group in groups:
        left = [unit for unit in group.modules if (unit in present if gone is None else unit not in gone)]
        if len(left) == len(group.modules):
            continue
        inside = {module for unit in left for module in unit.modules()}
        for parameter in group.fsdp_params:
            places = [place for place in _places(parameter) if place[0] in present]
            shards = next((module._parameters.get(name) for module, name in places), None)
            if _is_fsdp2s(shards) and any(module not in inside for module, _ in places):
                made = nn.Parameter(put_together(shards.detach()), shards.requires_grad)
                for module, name in places:
                    let_go(module, name)
                    module._parameters[name] = made


def to_shards(model: nn.Module) -> None:
    """FSDP2 leaves the Parameters of its outermost module put together after an evaluation, until the next backward
    pass: what is written to them then, `requires_grad` too, is lost with them, and what is read is freed. This takes
    them apart, by the hooks that do so for every state dict, since they may be another module's than `model`."""
    if _fsdp2_class() is None:
        return
    for module in model.modules():
        for hook in _hooks_of_fsdp2(module):
            hook(module, "", True)


def reduce_what_trains() -> None:
    """After adapters are made trainable: with the first forward FSDP2 decides for good in which dtypes it reduces the
    gradients of a unit and keeps them, and where nothing of the unit trains then, as in a forward of the reference in
    preference learning, in those of the forward."""
    for group in _groups_of_fsdp2():
        undecided = getattr(group, "_orig_dtype", torch.float32) is None
        if undecided and any(parameter.sharded_param.requires_grad for parameter in group.fsdp_params):
            group._init_mp_dtypes()


def let_go(container: Any, name: str) -> bool:
    """Before a Parameter is deleted from a container, or another is put in its place: FSDP2 puts those that it manages
    back to where it found them whenever it takes them apart or puts them together, over what is there by then. This one
    gets a place of its own, unless it has others. Whether it was one of FSDP2's."""
    bare = container._parameters.get(name) if isinstance(container, nn.Module) else None
    for parameter in _managed_by_fsdp2() if bare is not None else ():
        places = _places(parameter)
        left = [place for place in places if place != (container, name)]
        if len(left) < len(places):
            if not left:
                left = [(nn.Module(), name)]
                left[0][0].register_parameter(name, bare)
            _hang(parameter, left)
            return True
    return False


def part(module: nn.Module, name: str, requires_grad: bool = False) -> None:
    """Give a module its own copy of a Parameter that others have as well; of one that FSDP2 manages a whole one, which
    nobody takes apart. All processes have to call this."""
    shared = getattr(module, name).detach()
    own = put_together(shared) if let_go(module, name) else shared
    setattr(module, name, nn.Parameter(own.clone(), requires_grad=requires_grad))


def rejoin(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Give a module the Parameter back that it had before `part`."""
    setattr(module, name, parameter)
    for managed in _managed_by_fsdp2():
        if managed.sharded_param is parameter and (module, name) not in _places(managed):
            _hang(managed, [*_places(managed), (module, name)])


def is_unit_of_fsdp2(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on the module itself."""
    kind = _fsdp2_class()
    return kind is not None and isinstance(module, kind)


def copy_of(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """`copy.deepcopy` of it without what FSDP2 has made of it and of modules in it, and what it has hung on them, with
    which they cannot be copied. Shards stay shards."""
    memo = {} if memo is None else memo
    units = {part: type(part) for part in module.modules() if is_unit_of_fsdp2(part)}
    for part in units:
        for name, kept in part.__dict__.items():
            if name.startswith("__composable_api") or name.endswith("_hooks"):
                others = ((k, v) for k, v in kept.items() if not (_is_of_fsdp2(v) or k == "fully_shard"))
                memo[id(kept)] = OrderedDict(others)
    try:
        for part in units:
            part.__class__ = own_class(part)
        return copy.deepcopy(module, memo)
    finally:
        for part, kind in units.items():
            part.__class__ = kind


def own_class(model: nn.Module) -> type[nn.Module]:
    """A model's class, without the one that `fully_shard` has made of it."""
    return next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("torch.distributed."))


def whole_shape(tensor: Tensor) -> torch.Size:
    """Shape of a tensor put together; ZeRO-3 leaves an empty tensor in place of a partitioned one."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


@contextmanager
def whole(parameters: Iterable[Tensor | None]) -> Iterator[None]:
    """While this is open, what ZeRO-3 has taken apart of these is together; what is written to it lasts, as the first
    process has it. All processes have to come by here. Without ZeRO-3 it does nothing."""
    parameters = [p for p in parameters if hasattr(p, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        yield


def is_fsdp2_in_use() -> bool:
    """Whether `fully_shard` was called in this process, on whatever model."""
    return _fsdp2_class() is not None


class _Reaching(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]  # by now FSDP2 may have freed what is in them
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


def reaching(output: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """The same numbers, whose backward pass gives a gradient of zero to each of these."""
    return _Reaching.apply(output, *parameters)


def check_not_partitioned(parameters: Iterable[tuple[str, Tensor]], what: str, instead: str) -> None:
    """RuntimeError if ZeRO-3 has taken some of these apart, which are given with their names.

    Args:
        what: the user wanted to do. instead: what can be done.
    """
    apart = [name for name, p in parameters if hasattr(p, "ds_id")]
    if apart:
        raise RuntimeError(
            f"Cannot {what}: DeepSpeed ZeRO-3 has taken {len(apart)} of its parameters apart ({apart[0]}, ...), and "
            f"every process has its share only. {instead}"
        )


def is_run_by_zero3(model: nn.Module) -> bool:
    """Whether a ZeRO-3 engine has hung its hooks on the model, and made its optimizer of what was there then."""
    return "ds_id" in model.__dict__


def is_stepped_by_zero3(parameter: Tensor | None) -> bool:
    """Whether a ZeRO-3 engine's optimizer was given this Parameter."""
    return hasattr(parameter, "_z3_optimizer")


def is_stepped_by_deepspeed(parameter: Tensor) -> bool:
    """Whether DeepSpeed's optimizer steps a copy of this Parameter, in a flat tensor or a share of one."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


class GatheredAsOne:
    """Mixin of modules that, in their forward, read Parameters which other modules keep.

    FSDP gathers those with the block that the module is in (see `training/fsdp.py`). ZeRO-3 gathers for every
    module that is called, and again for its backward pass, the Parameters that it has itself and those that it says are
    external to it. DeepSpeed asks for them under these names, and gives them to modules that have none.
    """

    def read_from_outside(self) -> Iterable[nn.Parameter]:
        """The Parameters of others that `forward` may read: at any time the same ones, because the order in which they
        are used is recorded once. Those that are not taken apart may be among them."""
        raise NotImplementedError

    @property
    def _external_params(self) -> dict[int, nn.Parameter]:
        """What DeepSpeed adds, by id."""
        return self.__dict__.setdefault("_zero3_external", {})

    def ds_external_parameters(self) -> Iterable[tuple[int, nn.Parameter]]:
        known = {id(p): p for p in self.read_from_outside() if hasattr(p, "ds_id")}
        return {**self._external_params, **known}.items()


def _hooks_of_fsdp2(module: nn.Module) -> list[Callable]:
    """What FSDP2 has state dicts call on a module of which it manages Parameters, to take them apart."""
    hooks = module._state_dict_pre_hooks
    return [hook for hook in hooks.values() if _is_of_fsdp2(hook)] if hooks else []


def _is_of_fsdp2(hung: Any) -> bool:
    return getattr(hung, "__module__", "").startswith("torch.distributed.fsdp._fully_shard")


def _groups_of_fsdp2() -> Iterator[Any]:
    """What FSDP2 keeps for every unit of this process, and for the Parameters in it."""
    if _fsdp2_class() is None:
        return
    references = getattr(sys.modules["torch.distributed._composable_state"], "_module_state_mapping", {}).values()
    for state in dict.fromkeys(reference() for reference in [*references]):  # several modules may be one unit
        groups = getattr(state, "_fsdp_param_groups", None)  # before torch 2.12 there is one
        groups = [getattr(state, "_fsdp_param_group", None)] if groups is None else groups
        yield from (group for group in groups if group is not None)


def _managed_by_fsdp2() -> list[Any]:
    """What FSDP2 keeps for every Parameter of this process that it manages."""
    return [parameter for group in _groups_of_fsdp2() for parameter in group.fsdp_params]


def _places(parameter: Any) -> list[tuple[nn.Module, str]]:
    """Where FSDP2 hangs a Parameter that it manages, shards or whole: the modules, and its names there."""
    info = parameter._module_info
    return [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True)]


def _hang(parameter: Any, places: Iterable[tuple[nn.Module, str]]) -> None:
    """Have FSDP2 hang it there from now on."""
    info = parameter._module_info
    (info.module, info.param_name), *shared = places
    info.shared_modules, info.shared_param_names = [m for m, _ in shared], [n for _, n in shared]


def _is_fsdp2s(tensor: Tensor | None) -> bool:
    """Whether FSDP2 alone has taken it apart, with or without copies (HSDP), and not tensor parallelism."""
    if not is_distributed(tensor) or "tp" in (tensor.device_mesh.mesh_dim_names or ()):
        return False
    return tensor.device_mesh.ndim == 1 or tensor.placements[0].is_replicate()


def _fsdp2_class() -> Any:
    """The class that `fully_shard` adds to modules; None where there cannot be any of it, because to look at every
    module takes longer than what asks."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    # all modules of the process that `fully_shard` was called on; a torch without such a list may have some
    sharded = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", True)
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None) if sharded else None


def _distributed_tensor_class() -> Any:
    """torch's DTensor, if anybody has imported it; without it there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)
