"""Optimizers that know the two factors apart, under PEFT's names: LoRA+, LoRA-FA, Riemannian preconditioning."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftfast.adapter import Adapter
from peftfast.errors import warn
from peftfast.files.state import wrapped_modules
from peftfast.layers.layer import BaseTunerLayer
from peftfast.model import PeftModel
from peftfast.rules import number
from peftfast.sharding import put_together, taken_apart

__all__ = ["create_lorafa_optimizer", "create_loraplus_optimizer", "create_riemannian_optimizer"]


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimizer whose up factors learn faster than the down factors (LoRA+, Hayou et al., arXiv 2402.12354).

    Args:
        lr: of the down factors and of everything else that is a matrix.
        loraplus_lr_ratio: the up factors, biases and other vectors learn at `lr * loraplus_lr_ratio`; above 0, and of
            use from 1.
        kwargs: `loraplus_weight_decay` (0.0), `loraplus_lr_embedding` (1e-6, adapters of embeddings), and whatever
            `optimizer_cls` takes.

    Raises:
        ValueError: no parameter of the model is trainable, or the ratio is no positive number.
    """
    if not isinstance(loraplus_lr_ratio, Real) or not 0.0 < loraplus_lr_ratio < math.inf:
        raise ValueError(
            f"loraplus_lr_ratio must be a positive number, at least 1 as a rule; got {loraplus_lr_ratio!r}"
        )
    weight_decay = kwargs.pop("loraplus_weight_decay", 0.0)
    embedding_lr = kwargs.pop("loraplus_lr_embedding", 1e-6)
    no_decay = _undecayed(model)
    groups: dict[str, list[Tensor]] = {"down": [], "embedding": [], "up": [], "up_undecayed": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if ".lora_embedding_" in name:
            groups["embedding"].append(parameter)
        elif "lora_B" in name or parameter.ndim == 1:
            groups["up_undecayed" if name in no_decay else "up"].append(parameter)
        else:
            groups["down"].append(parameter)
    if not any(groups.values()):
        raise ValueError("The model has no trainable parameter; activate an adapter with set_adapter first")
    optimizer = optimizer_cls(
        [
            {"params": groups["down"], "weight_decay": weight_decay, "lr": lr},
            {"params": groups["embedding"], "weight_decay": weight_decay, "lr": embedding_lr},
            {"params": groups["up"], "weight_decay": weight_decay, "lr": lr * loraplus_lr_ratio},
            {"params": groups["up_undecayed"], "weight_decay": 0.0, "lr": lr * loraplus_lr_ratio},
        ],
        lr=lr,
        **kwargs,
    )
    if optimizer_cls.__module__.startswith("bitsandbytes.") and optimizer_cls.__name__.endswith("8bit"):
        import bitsandbytes

        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):  # 8-bit state is too coarse for rarely updated rows
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def _undecayed(model: nn.Module) -> set[str]:
    """Names of biases and of the parameters of normalisation layers."""
    names = {name for name, _ in model.named_parameters() if "bias" in name}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            names.update(f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False))
    return names


class LoraFAOptimizer(Optimizer):
    """AdamW that trains the up factors only, along the projection of the full gradient (LoRA-FA, Zhang et al.,
    arXiv 2308.03303): g_B (A Aᵀ)⁻¹ / s², with A [r, K] frozen.

    Args:
        adapters: the layers with these adapters, whose factors A, B and scale s are looked up in every step: B may be a
            shard by then, and s another number. Other parameters are stepped by plain AdamW.
        correct_bias: Adam's bias correction.
    """

    def __init__(
        self,
        params: Iterable[Any],
        adapters: Sequence[tuple[BaseTunerLayer, str]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        if lr < 0.0:
            raise ValueError(f"Invalid learning rate: {lr} - should be >= 0.0")
        for beta in betas:
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter: {beta} - should be in [0.0, 1.0)")
        if eps < 0.0:
            raise ValueError(f"Invalid epsilon value: {eps} - should be >= 0.0")
        # what the factors are is the model's business, not part of the optimizer's saved state
        self._adapters = list(adapters)
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_adapters": self._adapters}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        adapters = [layer.adapters[name] for layer, name in self._adapters if name in layer.adapters]
        owners = {adapter["lora_B"]: adapter for adapter in adapters}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, self._direction(parameter.grad, owners.get(parameter)), group)
        return loss

    @staticmethod
    def _direction(gradient: Tensor, adapter: Adapter | None) -> Tensor:
        if adapter is None:
            return gradient
        gram = _gram(adapter["lora_A"].detach().to(torch.float32).T)
        gram.diagonal().add_(1e-8)
        return _multiplied(gradient, lambda whole: whole @ torch.linalg.pinv(gram) / adapter.scale**2, torch.float32)

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].mul_(beta1).add_(grad, alpha=1.0 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        rate = group["lr"]
        if group["correct_bias"]:
            rate *= math.sqrt(1.0 - beta2 ** state["step"]) / (1.0 - beta1 ** state["step"])
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-rate)
        if group["weight_decay"] > 0.0:
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])


def create_lorafa_optimizer(
    model: PeftModel,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """A LoRA-FA optimizer for a model with LoRA adapters; freezes the down factor of every layer but embeddings, of
    which both factors are trained as by AdamW.

    Args:
        r, lora_alpha: as in the config. The scale of every layer is read from the layer, where patterns have their say.
        use_rslora: deprecated; must agree with the configs if given.

    Raises:
        ValueError: `use_rslora` contradicts a config, or the model has no LoRA linear layer.
    """
    if use_rslora is not None:
        differing = [
            name
            for name in model.active_adapters
            if bool(getattr(model.peft_config[name], "use_rslora", False)) is not use_rslora
        ]
        if differing:
            raise ValueError(
                f"`use_rslora={use_rslora}` was passed to create_lorafa_optimizer, but the following active adapters "
                f"have `use_rslora` set differently in the model config: {differing}."
            )
        warn(
            "`use_rslora` in create_lorafa_optimizer is deprecated; configure rsLoRA via LoraConfig instead.",
            FutureWarning,
        )
    adapters, down = [], set()
    for _, layer in wrapped_modules(model):
        if not isinstance(layer, BaseTunerLayer):
            continue
        for adapter in layer.adapters.values():
            if "lora_A" in adapter and "lora_B" in adapter:
                down.add(adapter["lora_A"])
                if adapter["lora_A"].ndim == 2:
                    adapters.append((layer, adapter.name))
    if not adapters:
        raise ValueError("create_lorafa_optimizer: the model has no LoRA adapter on a linear layer")
    parameters = [p for p in model.parameters() if p.requires_grad and p not in down]
    optimizer = LoraFAOptimizer(parameters, adapters, lr, weight_decay=weight_decay)
    for factor in down:  # nothing was refused
        factor.requires_grad_(False)
    return optimizer


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An optimizer that goes down in the metric of the product B A (Zhang and Pilanci, arXiv 2402.02347): before every
    step, A's gradient is multiplied by (B'B + reg)^-1 and B's by (A A' + reg)^-1. Other parameters, adapters of
    embeddings and convolutions among them, are left to `optimizer_cls`.

    Args:
        reg: keeps the inverses finite where a factor is zero or nearly singular.
        kwargs: of `optimizer_cls`.

    Raises:
        TypeError: `optimizer_cls` is no optimizer, `reg` no number. ValueError: `optimizer_cls` needs a closure, `reg`
            is negative, or no pair of factors is trainable.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}.")
    reg = number(0).enforce(reg, "reg")
    named = dict(model.named_parameters())
    pairs = [(name, name.replace(".lora_A.", ".lora_B.")) for name in named if ".lora_A." in name]
    pairs = [pair for pair in pairs if all(f in named and named[f].ndim == 2 and named[f].requires_grad for f in pair)]
    if not pairs:
        raise ValueError(
            "create_riemannian_optimizer did not find any trainable lora_A/lora_B parameter pairs on the model."
        )
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{optimizer_cls.__name__} requires a closure, which computes the gradients inside step(), after they "
            "would have been preconditioned. Use an optimizer whose step() does without (SGD, AdamW, ...)."
        )

    class RiemannianPreconditionedOptimizer(optimizer_cls):  # type: ignore[valid-type,misc]
        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            if closure is not None:
                raise ValueError(
                    "The Riemannian-preconditioned optimizer does not support closures, which compute the gradients "
                    "after they would have been preconditioned."
                )
            for pair in self._pairs:
                _precondition(*(getattr(owner, leaf) for owner, leaf in pair), reg)
            return super().step()

        def __getstate__(self) -> dict[str, Any]:
            return {**super().__getstate__(), "_pairs": self._pairs}

    optimizer = RiemannianPreconditionedOptimizer([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)
    # where the factors are, because in their places may be shards by the time of a step
    optimizer._pairs = [[_place(model, name) for name in pair] for pair in pairs]
    return optimizer


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


def _precondition(a: Tensor, b: Tensor, reg: float) -> None:
    """Gradients of the factors A [r, K] and B [N, r], in place, in the metric of their product."""
    wide = torch.promote_types(a.dtype, torch.float32)
    down, up = a.detach().to(wide), b.detach().to(wide)
    damping = reg * torch.eye(len(a), dtype=wide, device=a.device)
    if a.grad is not None:
        inverse_of_up = torch.linalg.pinv(_gram(up) + damping)
        a.grad.copy_(_multiplied(a.grad, lambda gradient: inverse_of_up @ gradient, wide))
    if b.grad is not None:
        inverse_of_down = torch.linalg.pinv(_gram(down.T) + damping)
        b.grad.copy_(_multiplied(b.grad, lambda gradient: gradient @ inverse_of_down, wide))


def _gram(factor: Tensor) -> Tensor:
    """[r, r] of a factor [features, r], of whose shards FSDP2 adds up the products."""
    return put_together(factor.T @ factor)


def _multiplied(gradient: Tensor, product: Callable[[Tensor], Tensor], wide: torch.dtype) -> Tensor:
    """What `product` makes of a gradient in the dtype `wide`, sharded as it is if it is."""
    return taken_apart(product(put_together(gradient).to(wide)).to(gradient.dtype), gradient)
