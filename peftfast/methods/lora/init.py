"""Initialisations of a LoRA factor pair, as a table from `init_lora_weights` to a function."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.methods.lora.config import LoraConfig
from peftfast.methods.random_stream import draws_of_normal, draws_of_uniform, skip
from peftfast.ops.finite import is_finite
from peftfast.sharding import put_together, whole
from peftfast.sites import Site

#: Fill a [r, ...] and b [..., r] in place; may assign the site's weight. Runs under no_grad.
Initialiser = Callable[[Site, Tensor, Tensor, Adapter], None]
#: Raise ValueError or TypeError where an adapter of this rank cannot start so, before anything is changed.
Check = Callable[[Site, LoraConfig, int], None]


class _Kind(NamedTuple):
    pattern: re.Pattern[str]
    fill: Initialiser
    lookups: bool
    check: Check | None
    ready: Check | None

    def serves(self, site: Site) -> bool:
        """Whether it knows what to do at `site`; a table of rows has no input whose statistics could guide it."""
        return self.lookups or not site.looks_up


_TABLE: list[_Kind] = []


def _drawn_as_in_peft(after_building: bool) -> Callable[[Initialiser], Initialiser]:
    """Decorator: a seed gives the factors that it gives in PEFT, so that a script's losses stay what they were. PEFT
    builds its layers on the CPU in fp32, initialises them there, and moves them through the dtype of the base weight.

    Args:
        after_building: the function comes after the draws that building a layer makes; False: it is those draws.
    """

    def decorate(fn: Initialiser) -> Initialiser:
        @functools.wraps(fn)
        def draw(site: Site, a: Tensor, b: Tensor, adapter: Adapter) -> None:
            built = [f.device.type == "cpu" and f.dtype == torch.get_default_dtype() for f in (a, b)]
            down, up = (f if same else torch.empty(f.shape) for f, same in zip((a, b), built, strict=True))
            if after_building:
                draw_as_building(site, down, up, adapter)
            fn(site, down, up, adapter)
            through = drawn_through(site, down)
            for factor, made in ((a, down), (b, up)):
                if factor is not made or through != made.dtype:
                    factor.copy_(made.to(through))

        return draw

    return decorate


def drawn_through(site: Site, drawn: Tensor) -> torch.dtype:
    """The dtype that PEFT moves its layers through: the base weight's, or that of `drawn` where it is packed."""
    stored = getattr(site.module, site.parameter, None)
    return stored.dtype if isinstance(stored, Tensor) and stored.dtype.is_floating_point else drawn.dtype


def draw_as_building(site: Site, down: Tensor, up: Tensor, adapter: Adapter) -> None:
    """Move the generator on by what `nn.Linear`, `nn.Conv` or `torch.randn` draw for factors of these shapes."""
    if not site.looks_up:
        bias = up.shape[0] if getattr(adapter.cfg, "lora_bias", False) else 0
        skip(draws_of_uniform(down.numel() + up.numel() + bias))
        return
    for factor in (down, up):
        if factor.numel() < 16:
            factor.normal_()
        else:
            skip(draws_of_normal(factor.numel()))


def initialiser(
    pattern: str, *, lookups: bool = False, check: Check | None = None, ready: Check | None = None
) -> Callable[[Initialiser], Initialiser]:
    """Decorator: the function serves values of `init_lora_weights` that match `pattern`.

    Args:
        lookups: it serves embeddings as well, which start in the default way otherwise.
        check: asked for every module before any is changed. ready: the same, where an adapter is to be initialised and
            not only read or measured.
    """

    def register(fn: Initialiser) -> Initialiser:
        _TABLE.append(_Kind(re.compile(pattern), fn, lookups, check, ready))
        return fn

    return register


def _kind_of(cfg: LoraConfig) -> _Kind:
    return _kind_called(str(cfg.init_lora_weights))


@functools.lru_cache  # every module of a model asks several times
def _kind_called(choice: str) -> _Kind:
    for kind in _TABLE:
        if kind.pattern.fullmatch(choice):
            return kind
    raise ValueError(f"Unknown initialization init_lora_weights={choice!r}")


def initialise(site: Site, a: Tensor, b: Tensor, adapter: Adapter) -> None:
    """Fill the factors as the adapter's config asks."""
    kind = _kind_of(adapter.cfg)
    (kind.fill if kind.serves(site) else start_as_identity)(site, a, b, adapter)


def start_bias(site: Site, bias: Tensor, up: Tensor, cfg: LoraConfig) -> None:
    """Fill the bias of the up factor, after both: zero, or drawn where they stay as building a layer draws them."""
    if cfg.init_lora_weights is not False:
        bias.zero_()
        return
    bound = 1 / math.sqrt(up[0].numel())
    drawn = torch.empty(bias.shape).uniform_(-bound, bound)
    bias.copy_(drawn.to(drawn_through(site, drawn)))


def check_ready(site: Site, cfg: LoraConfig, r: int) -> None:
    """ValueError where `initialise` would not find what it needs on the module."""
    kind = _kind_of(cfg)
    if kind.ready is not None and kind.serves(site):
        kind.ready(site, cfg, r)


def restarted(site: Site, a: Tensor, b: Tensor, init: bool | str, r: int) -> None:
    """Fill the factors of an adapter that was used before, drawing what a new one draws of them."""
    if init not in (True, "gaussian"):
        raise ValueError(f"Unknown initialization init_lora_weights={init!r}; to start anew, True or 'gaussian'")
    if site.looks_up or init is True:
        fill_as_identity(site, a, b)
    else:
        a.normal_(std=1 / r)
        b.zero_()


def fill_as_identity(site: Site, a: Tensor, b: Tensor) -> None:
    """Draw one factor and let the other be zero."""
    if site.looks_up:
        a.zero_()
        b.normal_()
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        b.zero_()


def rank_of_factors(site: Site, cfg: LoraConfig, r: int) -> int:
    """How many ranks the factors of an adapter of rank `r` have: fewer where the initialisation takes directions of W
    and W has fewer. So they are in PEFT and in its files; the scaling stays that of `r`.

    Raises:
        ValueError: the initialisation cannot be done here, for example MiCA with more ranks than directions.
    """
    kind = _kind_of(cfg)
    if kind.check is not None and kind.serves(site):
        kind.check(site, cfg, r)
    bounded = _OF_WEIGHT.fullmatch(str(cfg.init_lora_weights)) and "lora_A" in site.low_rank_slots(r)
    return min(r, *site.weight.shape) if bounded else r


@initialiser("True|eva", lookups=True)
@_drawn_as_in_peft(after_building=True)
def start_as_identity(site: Site, a: Tensor, b: Tensor, adapter: Adapter) -> None:
    """The adapter changes nothing at first. The data-driven kinds start here too and are filled in a second call."""
    fill_as_identity(site, a, b)


@initialiser("False", lookups=True)
@_drawn_as_in_peft(after_building=False)
def _random(site: Site, a: Tensor, b: Tensor, adapter: Adapter) -> None:
    """Not the identity; for tests."""
    if site.looks_up:
        a.normal_()
        b.normal_()
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.kaiming_uniform_(b, a=math.sqrt(5))


@initialiser("gaussian")
@_drawn_as_in_peft(after_building=True)
def _gaussian(site: Site, a: Tensor, b: Tensor, adapter: Adapter) -> None:
    a.normal_(std=1 / adapter.setting("r"))
    b.zero_()


def _check_even(site: Site, cfg: LoraConfig, r: int) -> None:
    if r % 2:
        raise ValueError(f"Orthogonal initialization requires the LoRA rank to be even, got {r} instead.")


@initialiser("orthogonal", ready=_check_even)
@_drawn_as_in_peft(after_building=True)
def _orthogonal(site: Site, a: Tensor, b: Tensor, adapter: Adapter) -> None:
    """A and B from disjoint halves of one random orthogonal basis each, so that B A = 0 though neither is zero."""
    r = adapter.setting("r")
    basis, _ = torch.linalg.qr(torch.randn(r, r))
    odd, even = basis[0::2], basis[1::2]
    out_features, in_features = b[:, :1].numel(), a[:1].numel()
    a.copy_((torch.randn(in_features, r // 2).mm(odd).t() / 10.0).reshape(a.shape))
    b.copy_((torch.randn(r // 2, out_features).t().mm(even) / 10.0).reshape(b.shape))


def wide_weight(site: Site) -> Tensor:
    """W [N, K] in fp32 or wider, for decompositions: the weight itself where it is stored so and whole."""
    return put_together(site.weight.seen()).to(torch.promote_types(site.weight.compute_dtype, torch.float32))


def check_finite(site: Site, cfg: LoraConfig, r: int) -> None:
    """Refuse weights of which one number would spoil all, before those of other modules are changed."""
    with whole(site.module.parameters()):
        weight = site.weight.seen()
        broken = 0 if is_finite(weight) else weight.isfinite().logical_not_().sum().item()
    if broken:
        raise ValueError(
            f"init_lora_weights={cfg.init_lora_weights!r} starts from the base weight, of which {broken} numbers are "
            "NaN or infinite"
        )


def check_dense(name: str) -> Check:
    """What refuses weights that the initialisation `name` cannot write to, or read exactly."""

    def check(site: Site, cfg: LoraConfig, r: int) -> None:
        stored = site.weight.quantization or site.module.weight.dtype
        if stored not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(
                f"Please initialize {name} under float32, float16, or bfloat16; the base weight of "
                f"{type(site.module).__name__} is stored as {stored}. Quantise after the initialisation."
            )
        check_finite(site, cfg, r)

    return check


def take_out(site: Site, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """W := W - s B A, so that the adapted module starts with the output it had; written into `weight`, which is
    `wide_weight`'s."""
    site.weight.assign(site.with_delta(weight, a.to(weight.dtype), b.to(weight.dtype), -scale, in_place=True))


#: Initialisations whose factors are directions of W.
_OF_WEIGHT = re.compile(r"pissa(_niter_\d+)?|olora")


def _check_whole(site: Site, cfg: LoraConfig, r: int) -> None:
    if site.groups > 1:
        raise ValueError(
            f"init_lora_weights={cfg.init_lora_weights!r} on a {type(site.module).__name__} with groups={site.groups} "
            "is not defined: every group has directions of its own"
        )


@initialiser(r"pissa(_niter_\d+)?", check=_check_whole, ready=check_dense("PiSSA"))
def _pissa(site: Site, a: Tensor, b: Tensor, adapter: Adapter) -> None:
    """Principal singular vectors and values of W (Meng et al., arXiv 2404.02948); `_niter_n` takes a randomised SVD
    with n power iterations (Halko et al., arXiv 0909.4061)."""
    weight = wide_weight(site)
    r, scale = a.shape[0], adapter.setting("scaling")
    choice = adapter.cfg.init_lora_weights
    if choice == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :r], s[:r], vh[:r]
    else:
        # always the same numbers, on every device: who loads the adapter has to take out of the base what was taken
        start = torch.randn(weight.shape[1], r, device="cpu", generator=torch.Generator().manual_seed(0)).to(weight)
        basis = torch.linalg.qr(weight @ start).Q
        for _ in range(int(choice.rpartition("_")[2])):
            basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.t() @ basis).Q).Q
        u, s, vh = torch.linalg.svd(basis.t() @ weight, full_matrices=False)
        u = basis @ u
    root = (s / scale).sqrt()
    a.copy_((root[:, None] * vh).reshape(a.shape))
    b.copy_((u * root).reshape(b.shape))
    take_out(site, weight, a, b, scale)


@initialiser("olora", check=_check_whole, ready=check_finite)
def _olora(site: Site, a: Tensor, b: Tensor, adapter: Adapter) -> None:
    """Orthonormal basis of W's columns (Büyükakyüz, arXiv 2406.01775)."""
    weight = wide_weight(site)
    r = a.shape[0]
    q, upper = torch.linalg.qr(weight)
    b.copy_(q[:, :r].reshape(b.shape))
    a.copy_(upper[:r].reshape(a.shape))
    take_out(site, weight, a, b, adapter.setting("scaling"))


def _check_mica(site: Site, cfg: LoraConfig, r: int) -> None:
    if hasattr(site.module, "kernel_size"):
        raise ValueError(
            "init_lora_weights='mica' is defined for linear layers and embeddings, not for a "
            f"{type(site.module).__name__}"
        )
    directions = min(site.weight.shape)
    if r > directions:
        raise ValueError(
            f"MiCA requires `r` <= min(in_features, out_features), the number of singular directions that B is taken "
            f"from: got r={r} for a weight of {list(site.weight.shape)}, which has {directions}"
        )


@initialiser("mica", lookups=True, check=_check_mica, ready=check_dense("MiCA"))
def _mica(site: Site, a: Tensor, b: Tensor, adapter: Adapter) -> None:
    """B is the left singular vectors of W's smallest singular values and stays so (Minor Component Adaptation, arXiv
    2604.01694); A starts at zero and is all that is trained."""
    weight = wide_weight(site)
    u, _, _ = torch.linalg.svd(weight.t() if site.looks_up else weight, full_matrices=False)
    b.copy_(u[:, -b.shape[1] :])
    a.zero_()
