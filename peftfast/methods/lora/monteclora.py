"""MonteCLoRA: a LoRA whose down factor is drawn around A in training, as a weighted mean of S samples whose spread and
weights are trained (Sengupta et al., arXiv 2411.04358).

A' = A + diag(√v) Σₙ wₙ Zₙ with Zₙ [r, K] normal, v = c² exp(2 σ) ∘ diag(Wishart) and w the softmax of a normal
approximation of Dirichlet(exp(ω)); σ [r] and ω [S] are trained, c is `sample_scaler`. In evaluation, and merged, it is
a plain LoRA. On a CPU a seed gives the samples that it gives in PEFT, without keeping all of them in memory; elsewhere
every call draws its own. A call that gradient checkpointing repeats takes the samples of the call that it repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.autocast import without_autocast
from peftfast.errors import PeftWarning, warn
from peftfast.method import register_method
from peftfast.methods.lora.config import LoraConfig
from peftfast.methods.lora.init import drawn_through
from peftfast.methods.lora.lora import check_linear, factors, widened
from peftfast.methods.lora.trained_otherwise import TrainedOtherwise
from peftfast.methods.random_stream import NormalSlices
from peftfast.sites import Site, Slot

SAMPLER = "lora_monteclora_sampler"


class Draw(NamedTuple):
    """The random numbers of one call: diagonals of a Wishart [r], normals [S], and what makes Z [S, K, r] again."""

    wishart: Tensor
    dirichlet: Tensor
    again: Callable[[], Tensor]


class MontecloraSampler(nn.Module):
    """The trained spread and weights of one adapter's samples, under PEFT's names.

    Args:
        in_features, out_features: K and r. The others: of `MontecloraConfig`.

    Attributes:
        std_prior, expert_weights_prior: σ [r] and ω [S]. gaussian_var_prior [r, r], expert_weights [S]: the last call's
            diag(v / c²) and w, which files have as well.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_samples: int,
        use_entropy: bool,
        dirichlet_prior: float,
        sample_scaler: float,
        kl_loss_weight: float,
        buffer_size: int,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.num_samples = in_features, out_features, num_samples
        self.use_entropy, self.dirichlet_prior, self.sample_scaler = use_entropy, dirichlet_prior, sample_scaler
        self.kl_loss_weight, self.buffer_size = kl_loss_weight, buffer_size
        self.dtype: torch.dtype = torch.float32  # of the numbers drawn
        self.__dict__["_ahead"] = None  # draws that are still to be used
        self.__dict__["_last"] = None  # the last one that was

    def noise(self) -> Tensor | None:
        """A' - A [r, K] for new samples; None, with a warning, where the trained weights are no numbers."""
        if torch.compiler.is_compiling():  # which would put draws into the graph that are to be in torch's own stream
            torch._dynamo.graph_break()
        z, draw = self._draw()
        with without_autocast(z):
            v, w = self._variances(draw.wishart), self._weights(draw.dirichlet)
            with torch.no_grad():
                self.gaussian_var_prior.copy_(v.diag())
                self.expert_weights.copy_(w)
            mean = torch.mv(z.to(w.dtype).view(len(w), -1).t(), w).view(self.in_features, self.out_features)
            unknown = w.isnan().any()
            if not unknown.is_cuda:
                if not torch.compiler.is_compiling() and bool(unknown):
                    warn(
                        "MonteCLoRA's sample weights are NaN (expert_weights_prior is too large, too small or NaN); "
                        "the adapter's own weights are used.",
                        PeftWarning,
                    )
                    return None
            else:  # a GPU is not waited for
                mean = torch.where(unknown, 0.0, mean)
            return (mean * (self.sample_scaler * v.sqrt())).t()

    def get_variational_loss(self) -> tuple[Tensor | float, Tensor | float]:
        """`kl_loss_weight` times the divergence from the priors, and Σ w² if `use_entropy`, both of the last call's
        samples; zeros in evaluation."""
        if not self.training:
            return 0.0, 0.0
        r, count = self.out_features, self.num_samples
        draw: Draw | None = self._last
        sigma, alpha = self.std_prior.float(), self.expert_weights_prior.float().exp()
        if draw is None:
            v, w = self.gaussian_var_prior.float().diag(), self.expert_weights.float()
        else:
            v, w = self._variances(draw.wishart), self._weights(draw.dirichlet)
        prior = torch.full_like(alpha, self.dirichlet_prior)
        v = v.clamp(min=1e-6)
        dirichlet = (
            (alpha.sum().lgamma() - alpha.lgamma().sum())
            - (prior.sum().lgamma() - prior.lgamma().sum())
            + ((alpha - prior) * (alpha.digamma() - alpha.sum().digamma())).sum()
        )
        wishart = 0.5 * r * ((2 * sigma).exp() - 2 * sigma - 1).sum()
        normal = 0.5 * count * (v - v.log() - 1).sum()
        return self.kl_loss_weight * (dirichlet + wishart + normal), w.square().sum() if self.use_entropy else 0.0

    def _variances(self, wishart: Tensor) -> Tensor:
        """v / c² [r], in fp32 or wider."""
        sigma = self.std_prior
        sigma = sigma.to(torch.promote_types(sigma.dtype, torch.float32))
        return ((2 * sigma).exp() * wishart.to(sigma)).clamp(min=1e-3)

    def _weights(self, normals: Tensor) -> Tensor:
        """w [S], in fp32 or wider."""
        omega, count, eps = self.expert_weights_prior, self.num_samples, 1e-6
        alpha = omega.to(torch.promote_types(omega.dtype, torch.float32)).exp().clamp(min=eps)
        log = alpha.log()
        spread = (1 - 2 / count) / alpha + (1 / alpha).sum() / count**2
        return torch.softmax((spread.clamp(min=eps) + eps).sqrt() * normals.to(alpha) + log - log.mean(), dim=-1)

    # ---- random numbers ----------------------------------------------------------------------------------------------
    def prepare(self, dtype: torch.dtype) -> None:
        """Draw ahead, as PEFT does where it makes a sampler.

        Args:
            dtype: of the numbers drawn.
        """
        self.dtype = dtype
        if self.std_prior.device.type == "cpu":
            self.__dict__["_ahead"] = _Ahead(self)

    @property
    def is_due(self) -> bool:
        """Whether the next call draws ahead anew."""
        if self.std_prior.device.type != "cpu":
            return False
        return self._ahead is None or self._ahead.used >= self.buffer_size

    def random_state(self) -> tuple[Tensor, int] | None:
        """Where this sampler is in its random numbers, for a training that goes on later; None where it has none of its
        own."""
        return None if self._ahead is None else (self._ahead.start, self._ahead.used)

    def set_random_state(self, state: tuple[Tensor, int] | None) -> None:
        """Go on where `random_state` was taken; torch's generator stays where it is."""
        self.__dict__["_ahead"] = None
        if state is not None:
            start, used = state
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(start)
                self.__dict__["_ahead"] = _Ahead(self)
            for _ in range(used):
                self._ahead.take()

    @torch.inference_mode(False)  # what is drawn ahead, and the last draw, are used with gradients later
    @torch.no_grad()
    def _draw(self) -> tuple[Tensor, Draw]:
        """Z [S, K, r] and the rest."""
        last: Draw | None = self._last
        # a call inside a backward pass is one that checkpointing repeats
        if last is not None and torch._C._current_graph_task_id() != -1:
            return last.again(), last
        device = self.std_prior.device
        if device.type == "cpu":
            if self.is_due:
                self.__dict__["_ahead"] = _Ahead(self)
            z, draw = self._ahead.take()
        else:
            seed = int(torch.randint(2**62, (), device="cpu"))  # so that a GPU is not waited for
            generator = torch.Generator(device).manual_seed(seed)
            draw = Draw(
                _wishart_diagonal(self.out_features, device, generator),
                torch.randn(self.num_samples, device=device, generator=generator),
                partial(_normal, self._shape, device, seed + 1),
            )
            z = draw.again()
        self.__dict__["_last"] = draw
        return z, draw

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.num_samples, self.in_features, self.out_features

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_last": None}


class _Ahead:
    """The draws of `buffer_size` calls, from torch's CPU generator in the order in which PEFT takes them."""

    def __init__(self, sampler: MontecloraSampler) -> None:
        count, dtype = sampler.buffer_size, sampler.dtype
        self.start = torch.get_rng_state()
        self.used = 0
        self.normal = NormalSlices(count, sampler._shape, dtype)
        self.dirichlet = torch.randn(count, sampler.num_samples, dtype=dtype)
        self.wishart = torch.stack([_wishart_diagonal(sampler.out_features) for _ in range(count)]).to(dtype)

    def take(self) -> tuple[Tensor, Draw]:
        i, self.used = self.used, self.used + 1
        z, again = self.normal.take()
        return z, Draw(self.wishart[i], self.dirichlet[i], again)


def _normal(shape: tuple[int, ...], device: torch.device, seed: int) -> Tensor:
    return torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(seed))


def _wishart_diagonal(r: int, device: torch.device | None = None, generator: torch.Generator | None = None) -> Tensor:
    """The diagonal [r] of a Wishart of r degrees of freedom with the identity, by Bartlett's decomposition."""
    freedom = r - torch.arange(r, dtype=torch.float32, device=device)
    chi2 = 2.0 * torch._standard_gamma(0.5 * freedom, generator=generator)
    squares = torch.randn(r * (r - 1) // 2, dtype=chi2.dtype, device=device, generator=generator).square()
    rows = torch.tril_indices(r, r, offset=-1, device=device)[0]
    return chi2.index_add(0, rows, squares)


@register_method
class Monteclora(TrainedOtherwise):
    """In training several active adapters act one after the other."""

    variant: ClassVar[str | None] = "monteclora_config"
    pads: ClassVar[bool] = False
    only_for_training = (SAMPLER,)
    uncapturable_training = "MonteCLoRA draws new samples on the host in every step"

    def slots(self, site: Site, cfg: LoraConfig, settings: Mapping[str, Any]) -> Mapping[str, Slot]:
        check_linear(site, "MonteCLoRA", "monteclora_config")
        pair = super().slots(site, cfg, settings)
        (r, k), own = pair["lora_A"].shape, cfg.monteclora_config
        count = own.num_samples
        sampler = Slot(
            (),
            holder=partial(
                MontecloraSampler, k, r, count, own.use_entropy, own.dirichlet_prior, own.sample_scaler,
                own.kl_loss_weight, own.buffer_size,
            ),
            leaves={"std_prior": (r,), "expert_weights_prior": (count,)},
            buffers={"gaussian_var_prior": (r, r), "expert_weights": (count,)},
            dtype=drawn_through(site, torch.empty(0)),
        )  # fmt: skip
        return {**pair, SAMPLER: sampler}

    def init(self, site: Site, adapter: Adapter) -> None:
        super().init(site, adapter)
        sampler: MontecloraSampler = adapter.setting(SAMPLER)
        dtype = drawn_through(site, factors(adapter)[0])
        for prior in (sampler.std_prior, sampler.expert_weights_prior):
            prior.copy_(torch.rand(prior.shape, dtype=dtype))
        sampler.gaussian_var_prior.copy_(torch.eye(sampler.out_features))
        sampler.expert_weights.fill_(1 / sampler.num_samples)
        sampler.prepare(dtype)

    @staticmethod
    def trains(adapter: Adapter) -> bool:
        return adapter.training

    def forward_training(self, site: Site, x: Tensor, y: Tensor | None, active: Sequence[Adapter]) -> Tensor:
        if len(active) > 1:
            y = site.base(x) if y is None else y
            dtype, (x, y) = y.dtype, widened(x, y, factors(active[0])[0])
        for adapter in active:
            own, (a, b) = adapter.through(site), factors(adapter)
            sampler, dropout, dropped = adapter.setting(SAMPLER), adapter.dropout, x
            if own is site:
                if dropout and sampler.is_due:  # PEFT drops before it draws ahead, from the same stream
                    y = site.base(x) if y is None else y
                    dropped, dropout = site.drop(x, dropout), 0.0
                noise = sampler.noise()
                a = a if noise is None else (a + noise).to(a.dtype)
                y = site.adapt(dropped, y, a, b, adapter.scale, dropout)
            else:
                y = site.base(x) if y is None else y
                dropped = own.drop(x.to(a.dtype), dropout)
                noise = sampler.noise()
                t = own.down(dropped, a)
                t = t if noise is None else t + F.linear(dropped, noise.to(dropped.dtype))
                y = (y + own.up(t, b) * adapter.scale).to(y.dtype)
        return y.to(dtype) if len(active) > 1 else y


def monteclora_loss(adapters: Sequence[Adapter]) -> Tensor | float:
    """The mean over layers of `MontecloraSampler.get_variational_loss`, a scalar with gradients; 0.0 without any."""
    if not adapters:
        return 0.0
    total: Tensor | float = 0.0
    for adapter in adapters:
        divergence, entropy = adapter.setting(SAMPLER).get_variational_loss()
        total = total + divergence + entropy
    return total / len(adapters)
