"""Where an adapter acts: the geometry of one kind of module, separated from storage and from method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfast.base.offload import at_hand
from peftfast.base.weight import BaseWeight, base_weight
from peftfast.errors import enumerate_some
from peftfast.keys import WRAPPED
from peftfast.ops.function import as_dtype, exporting
from peftfast.ops.gate import gated
from peftfast.ops.scale import scale_features
from peftfast.sharding import is_distributed
from peftfast.sites.holders import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from peftfast.watch import GLOBAL_HOOKS
from peftfast_kernels.op import row_chunks

if TYPE_CHECKING:
    from peftfast.sites.bound import BoundLora


@dataclass(frozen=True)
class Slot:
    """One adapter tensor, or a small module of them, and by it every key under which it is known.

    In the model it is `<layer>.<slot>.<adapter>` (a bare Parameter) or `<layer>.<slot>.<adapter>.<leaf>` (a module
    that holds it). In the file the adapter's name is left out.

    Attributes:
        shape: of the Parameter, or of the holder's `weight`.
        holder: builds the holding module without allocating or initialising anything; None for a bare Parameter.
        bias: shape of the holder's `bias`, if it has one.
        bare_in_file: the file key drops `.weight` as well (DoRA's magnitude).
        trainable: False for what training never changes (MiCA's up factor).
        saved: False for bookkeeping that no file has.
        fill: its value, where no file and no initialisation gives one.
        buffer: True for a bare buffer in place of a Parameter. dtype: of buffers, where it is not that of the others.
        leaves: names and shapes of the holder's Parameters, where they are not `weight` and `bias`. buffers: the same
            of its buffers.
    """

    shape: tuple[int, ...]
    holder: Callable[[], nn.Module] | None = None
    bias: tuple[int, ...] | None = None
    bare_in_file: bool = False
    trainable: bool = True
    saved: bool = True
    fill: float | None = None
    buffer: bool = False
    dtype: torch.dtype | None = None
    leaves: Mapping[str, tuple[int, ...]] | None = None
    buffers: Mapping[str, tuple[int, ...]] | None = None

    def parameters(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of what a holder has to train."""
        if self.leaves is not None:
            return self.leaves
        return {"weight": self.shape} if self.bias is None else {"weight": self.shape, "bias": self.bias}


class Dense(NamedTuple):
    """What merging reads and writes: W [N, K] and the bias [N], in fp32 or wider."""

    weight: Tensor
    bias: Tensor | None
    spare: bool = False  # nobody reads this weight any more, so the next one may be written in its place


class UsualSite:
    """What is so at most sites; a site where it is not says so.

    Attributes:
        parameter: name of the adapted Parameter in the module.
        adapts_output: adapters act on the module's output; False: on the Parameter, for as long as its module runs.
        looks_up: rows of W are looked up by number (embeddings): the down factor is a table, and the factors make Wᵀ.
        gates: the input has tokens, of which `adapt` and `adapt_each` may be given a `gate` [..., 1] (`adapt` also one
            [..., r]) that multiplies the down factor's product; see `peftfast.ops.gate`.
        groups: in how many runs the ranks are cut, of which each acts on channels of its own (grouped convolutions).
        experts: of how many matrices the weight is a stack, whose factors are in one pair of tensors.
        parts: names of children that are adapted with the module and never by themselves; `part(name)` is the site of
            one.
        around: what is called in the module's place, which is inside it; None: the module itself.
        in_peft: PEFT has adapters for this kind of module as well.
    """

    parameter: str = "weight"
    adapts_output: bool = True
    looks_up: bool = False
    gates: bool = False
    groups: int = 1
    experts: int = 1
    parts: tuple[str, ...] = ()
    around: nn.Module | None = None
    in_peft: bool = True

    @property
    def module(self) -> nn.Module:
        """What is adapted. In one place: of two, a graph would ask in Python, in every call, whether it is the same."""
        return self._weight.module

    @property
    def weight(self) -> BaseWeight:
        """How the adapted Parameter is stored; other libraries change that in place (torchao's `quantize_`)."""
        if type(self._weight.module._parameters.get("weight")) is not self._stored_as:
            self._look_again()
        return self._weight

    @weight.setter
    def weight(self, stored: BaseWeight) -> None:
        self._weight, self._stored_as = stored, type(stored.module._parameters.get("weight"))

    def _look_again(self) -> None:
        now = self.module._parameters.get("weight")
        # torch.export has another tensor of its own in every Parameter's place
        if now is None or exporting() or is_distributed(now) or not self.adapts_output:
            return
        stored, self._stored_as = base_weight(self.module), type(now)
        if type(stored) is not type(self._weight):
            stored.name = self._weight.name
            self._weight = stored

    def bind(self, adapter: Any, *how: Any, **more: Any) -> BoundLora | None:
        """`adapt` of one adapter with its lookups done beforehand, see `LinearSite`; None: not here."""

    def bind_runs(self, a: Tensor, b: Tensor, scale: Tensor | float) -> Callable[[Tensor], Tensor]:
        """The module's own output with `adapt_each` of these factors, without gradients, as a function of the input."""
        return lambda x: self.adapt_each(x, self.base(x), a, b, scale)

    def put_around(self, module: nn.Module) -> None:
        """Call `module`, which has this one inside, in its place from now on."""
        self.around = module

    def base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (self.module if self.around is None else self.around)(x, *args, **kwargs)

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        left, right = self.factors(a, b)
        return left @ right

    def with_delta(self, weight: Tensor, a: Tensor, b: Tensor, scale: float, in_place: bool = False) -> Tensor:
        left, right = self.factors(a, b)
        if left.dtype is weight.dtype:
            if is_distributed(weight):  # which torch 2.11 does not add to where it is, on a mesh of two dimensions
                return torch.addmm(weight, left, right, alpha=scale)
            # a copy lies in memory as the weight does
            return (weight if in_place else weight.clone()).addmm_(left, right, alpha=scale)
        out = weight if in_place else torch.empty_like(weight)
        for rows in row_chunks(*weight.shape, 1 << 18, weight.device):
            out[rows] = weight[rows].to(left.dtype).addmm_(left[rows], right, alpha=scale)
        return out

    def scale_weight(self, weight: Tensor, vectors: Mapping[str, Tensor], in_place: bool = False) -> Tensor:
        factors = [self.on_weight(s, side) for side, s in vectors.items()]
        wide = factors[0].dtype
        if wide is weight.dtype:
            return reduce(Tensor.mul_ if in_place else Tensor.mul, factors, weight)
        out = weight if in_place else torch.empty_like(weight)
        for rows in row_chunks(*weight.shape, 1 << 16, weight.device):
            own = (factor if len(factor) == 1 else factor[rows] for factor in factors)
            out[rows] = reduce(Tensor.mul_, own, weight[rows].to(wide))
        return out

    def adapt(
        self,
        x: Tensor,
        y: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        dropout: float,
        gate: Tensor | None = None,
    ) -> Tensor:
        """In differentiable torch, for any kind of module and tensor."""
        y = self.base(x) if y is None else y
        inputs = self.drop(as_dtype(x, a.dtype) if x.is_floating_point() else x, dropout)
        update = self.up(gated(self.down(inputs, a), gate), b)
        if isinstance(scale, Tensor):
            return as_dtype(y + update * scale, y.dtype)
        return as_dtype(torch.add(y, update, alpha=scale), y.dtype)

    def drop(self, x: Tensor, dropout: float) -> Tensor:
        return F.dropout(x, dropout) if dropout > 0.0 else x

    def scale_output(self, y: Tensor, s: Tensor) -> Tensor:
        return scale_features(y, s.flatten())

    scale_input = scale_output  # whose features lie on the same axis

    def add_to_output(self, y: Tensor, v: Tensor) -> Tensor:
        return y + as_dtype(v, y.dtype)

    def magnify(
        self, x: Tensor, y: Tensor | None, a: Tensor, b: Tensor, g: Tensor, scale: float, dropout: float
    ) -> Tensor:
        return composed_magnify(self, x, y, a, b, g, scale, dropout)

    def output_norm(self, weight: Tensor) -> Tensor:
        if weight.shape[1] % 64 == 0:  # long sums round more than sums of sums
            weight = torch.linalg.vector_norm(weight.unflatten(1, (-1, 64)), dim=2)
        return torch.linalg.vector_norm(weight, dim=1)

    def segmented(self, x: Tensor) -> bool:
        """Whether kernels that pick every row's own factors serve this input, by `adapt_rows` (see `LinearSite`)."""
        return False

    def probe(self) -> Tensor | None:
        """An input by which to see whether the module's output is made of its weight as this kind of module makes it;
        None where that is known."""

    def split(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of every matrix of the stack, [E, r, ...] and [E, N, r, ...]."""
        return a.unsqueeze(0), b.unsqueeze(0)

    def joined(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """`split`, undone."""
        return a.squeeze(0), b.squeeze(0)


class Site(Protocol):
    """One adaptable module. Besides what is here, a site has what `UsualSite` says."""

    module: nn.Module
    weight: BaseWeight
    parameter: str
    looks_up: bool
    gates: bool
    groups: int
    experts: int

    def low_rank_slots(self, rank: int, bias: bool = False) -> Mapping[str, Slot]:
        """Names and shapes of a factor pair here: the down factor first, then the up factor."""
        ...

    def base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The untouched module's output, through the module itself (hooks, offloading, quantised kernels)."""
        ...

    def adapt(
        self,
        x: Tensor,
        y: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        dropout: float,
        gate: Tensor | None = None,
    ) -> Tensor:
        """y + scale · up(gate · down(drop(x))). y=None: the base product has not been computed and may be fused.
        `gate` is for a site with `gates`."""
        ...

    def adapt_each(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
        """y + scale[s] · up(down(x, a[s]), b[s]) for S equal runs of neighbouring samples, each with its own factors:
        a [S, r, ...], b [S, N, r, ...], scale [S] or one number for all, x and y with a multiple of S samples."""
        ...

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """x -> A x, the rank on the feature axis."""
        ...

    def up(self, t: Tensor, b: Tensor) -> Tensor:
        """t -> B t, shaped as the module's output."""
        ...

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Two matrices, or stacks of them, whose product B A is as a change of W [N, K].

        Raises:
            NotImplementedError: the product is no weight of this module (grouped convolutions).
        """
        ...

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """B A as a change of W [N, K]; errors as in `factors`."""
        ...

    def with_delta(self, weight: Tensor, a: Tensor, b: Tensor, scale: float, in_place: bool = False) -> Tensor:
        """W + scale · B A for W [N, K], which may be written to if `in_place`: what merging makes; errors as in
        `factors`. Factors wider than W are for a sum as wide as they are."""
        ...

    def drop(self, x: Tensor, dropout: float) -> Tensor:
        """Dropout of the adapter's input, where this kind of module has any."""
        ...

    def scale_input(self, x: Tensor, s: Tensor) -> Tensor:
        """x with input feature k multiplied by s[k]."""
        ...

    def scale_output(self, y: Tensor, s: Tensor) -> Tensor:
        """y with output feature n multiplied by s[n]."""
        ...

    def add_to_output(self, y: Tensor, v: Tensor) -> Tensor:
        """y with v[n] added to output feature n, in y's dtype."""
        ...

    def vector_shape(self, side: str) -> tuple[int, ...]:
        """Shape in which a per-feature vector is kept for the "input" or the "output" side, or a "magnitude"."""
        ...

    def on_weight(self, s: Tensor, side: str) -> Tensor:
        """A vector of one side's features as what scaling that side multiplies W [N, K] by: [N, K], or with 1 in the
        place of either."""
        ...

    def scale_weight(self, weight: Tensor, vectors: Mapping[str, Tensor], in_place: bool = False) -> Tensor:
        """W [N, K], which may be written to if `in_place`, with the features of every side that is named multiplied by
        its vector: what scaling the input or the output amounts to. Vectors wider than W are for a product as wide as
        they are."""
        ...

    def magnify(
        self, x: Tensor, y: Tensor | None, a: Tensor, b: Tensor, g: Tensor, scale: float, dropout: float
    ) -> Tensor:
        """g · (y - bias + scale · up(down(x))) + bias with g [features]; with dropout, y + (g - 1) W xd + g · scale ·
        up(down(xd)) for xd = drop(x). y=None: the base product has not been computed."""
        ...

    def adapted_norm(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """‖W + scale · B A‖ of every output feature, [features], in fp32 or wider, without a graph."""
        ...

    def output_norm(self, weight: Tensor) -> Tensor:
        """The Euclidean norm of all weights of an output feature, [features], for W [N, K]."""
        ...


S = TypeVar("S", bound=type)

_SITES: list[tuple[Callable[[nn.Module], bool], type]] = []
_SUPPORTED: list[str] = []


def register_site(name: str, claims: Callable[[nn.Module], bool]) -> Callable[[S], S]:
    """Class decorator: modules that `claims` accepts get this site; `name` is what error messages call them."""

    def register(cls: S) -> S:
        _SITES.insert(0, (claims, cls))
        _SUPPORTED.append(name)
        return cls

    return register


def has_site(module: nn.Module) -> bool:
    """Whether `module` is of a kind that can carry an adapter."""
    return any(claims(module) for claims, _ in _SITES)


def bias_of(module: nn.Module) -> nn.Parameter | None:
    """The bias of a module; None too of those whose `bias` says whether they have any (nn.LSTM)."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def bias_at_hand(module: nn.Module) -> Tensor | None:
    """The same, on the device on which the module computes."""
    return None if bias_of(module) is None else at_hand(module, "bias")


def parts_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the children that an adapter of `module` adapts as well."""
    return next((cls.parts for claims, cls in _SITES if claims(module)), ())


def make_site(module: nn.Module) -> Site:
    """The site of a module.

    Raises:
        ValueError: the kind of module is not supported; lists the supported ones, and those inside of it.
    """
    for claims, cls in _SITES:
        if claims(module):
            return cls(module)
    if type(module).__module__.startswith("peft.tuners."):
        raise ValueError(
            f"Target module {module} is not supported: it is a layer of the peft package, with adapters in it. "
            "peftfast.patch(model) without a config lets peftfast's kernels compute those; the peft model's unload() "
            "takes them away"
        )
    inside = [name for name, part in module.named_modules() if has_site(part)]
    instead = f" Inside of it are some, to be named instead: {enumerate_some(inside)}." if inside else ""
    if not WRAPPED.isdisjoint(module._modules):
        instead = " It stands around another module: add the adapter first, then compile or wrap what has it."
    raise ValueError(
        f"Target module {module} is not supported. Currently, only the following modules are supported: "
        f"{', '.join(f'`{name}`' for name in _SUPPORTED)}.{instead}"
    )


def is_bias(name: str) -> bool:
    """Whether a parameter of this name is what `bias="all"` trains and saves: PEFT's rule, which leaves out tables that
    only have "bias" in their names (T5's relative_attention_bias.weight)."""
    return name == "bias" or name.endswith(".bias")


def is_untouched(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's `forward` and nothing else: no hooks on it (accelerate's offloading
    replaces `forward` on the instance) and none for all modules."""
    return not (  # written out, so that compilers can follow
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or any(GLOBAL_HOOKS)
    )


def is_written_over(module: nn.Module) -> bool:
    """Whether it has a `forward` of its own: for graphs of torch's, which go by what is asked for, but not by what is
    looked for in a `__dict__`."""
    module.forward  # noqa: B018
    return "forward" in module.__dict__


_PRODUCTS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)


def probe_of(site: Site, *shape: int) -> Tensor | None:
    """Random numbers of this shape for a module that has a forward of its own kind, or another around it; None for
    torch's own, and where a call would mean more than a product (hooks, sharded weights) or less (none on the meta
    device)."""
    module, quantised = site.module, site.weight.quantization is not None
    usual = type(module).forward in [cls.forward for cls in _PRODUCTS]
    if usual and site.around is None or quantised or not is_untouched(module):
        return None
    weight = module.weight
    if weight.is_meta or not is_plain(weight):
        return None
    numbers = torch.randn(shape, device="cpu", generator=torch.Generator().manual_seed(0))
    return numbers.to(device=weight.device, dtype=weight.dtype)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether all tensors are ordinary ones: no DTensor, no fake or functional wrapper that kernels cannot read."""
    for t in tensors:  # every call of every layer comes by here
        if t is not None and type(t) is not Tensor and type(t) is not nn.Parameter:
            return torch.compiler.is_compiling()
    return True


def is_foreign(*tensors: Tensor) -> bool:
    """Whether one is made of others in a way of another library's, which may know no more of it than a linear layer's
    product (torchao's, where a model was quantised with its adapters)."""
    for t in tensors:
        if type(t) is not nn.Parameter and hasattr(t, "__tensor_flatten__") and not is_distributed(t):
            return not torch.compiler.is_compiling()
    return False


def composed_magnify(
    site: Site, x: Tensor, y: Tensor | None, a: Tensor, b: Tensor, g: Tensor, scale: float, dropout: float
) -> Tensor:
    """`Site.magnify` in differentiable torch, for any kind of module."""
    y = site.base(x) if y is None else y
    wide = torch.promote_types(y.dtype, g.dtype)
    bias = bias_at_hand(site.module)
    inputs = site.drop(x, dropout) if dropout > 0.0 else x
    base = as_dtype(y if inputs is x else site.base(inputs), wide)
    if bias is not None:
        base = site.add_to_output(base, -bias)
    branch = site.up(site.down(as_dtype(inputs, a.dtype) if inputs.is_floating_point() else inputs, a), b)
    if isinstance(scale, Tensor):
        branch, scale = as_dtype(branch, wide) * scale, 1.0
    out = site.scale_output(torch.add(base, branch, alpha=scale), g)
    if inputs is not x:
        out = as_dtype(y, wide) + (out - base)
    elif bias is not None:
        out = site.add_to_output(out, bias)
    return as_dtype(out, y.dtype)
