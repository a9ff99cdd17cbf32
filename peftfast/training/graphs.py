"""CUDA graphs: a training step, and one token of decoding, recorded once and then replayed without Python in between.

    step = peftfast.capture_training_step(model, batch, autocast=torch.bfloat16)
    for batch in batches:
        loss = step(batch)       # forward and backward; gradients lie in `.grad`
        optimizer.step()

    decode = peftfast.capture_decoding(model, batch_size=8, max_length=2048, mixed=True)
    tokens = decode.generate(input_ids, max_new_tokens=128, adapter_names=["a", "b", ...])

Inputs are copied into buffers that never move, results are read from such buffers. The first calls run as they would
without a graph, on a stream of their own: they are the warm-up that capture needs, and being ordinary steps they leave
nothing to undo, neither in the weights nor in the random generator. On a device without CUDA graphs all calls do that.

What is recorded is what the model was at that moment. Every call compares: modules, the addresses of all parameters,
adapters (present, active, merged, scales), train or eval mode. A difference is an error or a new capture, as chosen.

Not captured, because the host decides or waits: gradient checkpointing that preserves the random state, routers and
`adapter_names` in training, sliding-window caches, prompts in front of the input; and whatever else synchronises, which
capture then says. Of bitsandbytes bases, NF4 asks nothing of the host, neither in adapted layers, which decode it here,
nor in others; bitsandbytes' own LLM.int8 product looks for outliers on a GPU. Its optimizers count steps on the host:
leave those outside. While a stream is captured, transformers makes explicit attention masks instead of looking whether
there is padding: with SDPA that is another kernel than in the warm-up, equal but for rounding.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from peftfast.layer import BaseTunerLayer
from peftfast.many.router import Choice, resolve
from peftfast.many.routing import BASE, Routing
from peftfast.method import method_for
from peftfast.wrapping.saved_modules import AuxiliaryTrainingWrapper

logger = logging.getLogger("peftfast")

ON_CHANGE = ("error", "recapture")


class Snapshot:
    """What a recording depends on and nobody announces when it changes.

    Args:
        mixed: every sample has its own adapter: which ones are active or trainable does not matter then, but the
            factors' values do, because their stacks are made outside the recording.
    """

    def __init__(self, model: nn.Module, mixed: bool = False) -> None:
        self.mixed = mixed
        modules = list(model.named_modules())
        self._training = [(name, module, module.training) for name, module in modules]
        stateful = (_DropoutNd, BaseTunerLayer, AuxiliaryTrainingWrapper)
        self._states = [(name, m, self._state(m)) for name, m in modules if isinstance(m, stateful)]
        containers = [
            (name, c) for name, m in modules for c in (m._modules, m._parameters, m._buffers) if c or m is model
        ]
        self._sizes = [(name, container, len(container)) for name, container in containers]
        self._entries = [(name, c, key, value) for name, c in containers for key, value in c.items()]
        tensors = [(f"{n}.{key}", t) for n, _, key, t in self._entries if isinstance(t, Tensor)]
        self._tensors = [(name, t, self._of(t)) for name, t in tensors]
        tuner = tuner_of(model)
        self._router = getattr(tuner, "router", None)
        self._tuner = tuner

    def _state(self, module: nn.Module) -> tuple:
        """What a module computes with beside its tensors and children."""
        if isinstance(module, _DropoutNd):
            return (module.p,)
        active = () if self.mixed else module.active_adapters
        if not isinstance(module, BaseTunerLayer):
            return module._disable_adapters, active
        own = module.__dict__
        scales = [id(s) if isinstance(s, Tensor) else s for s in own.get("scaling", {}).values()]
        return own["_disable_adapters"], active, list(own["merged_adapters"]), list(own["adapters"]), scales

    def _of(self, tensor: Tensor) -> tuple:
        if self.mixed:
            return tensor.data_ptr(), None if tensor.is_inference() else tensor._version
        return tensor.data_ptr(), tensor.requires_grad

    def change(self) -> str | None:
        """What is different now, in words; None if nothing is."""
        for name, module, training in self._training:
            if module.training is not training:
                return f"the mode (train or eval) of {name or 'the model'}"
        for name, module, state in self._states:
            if self._state(module) != state:
                return f"adapters, scales or dropout of {name}"
        for name, container, size in self._sizes:
            if len(container) != size:
                return f"what {name or 'the model'} consists of"
        for name, container, key, value in self._entries:
            if container.get(key) is not value:
                return f"{name}.{key}, which was replaced"
        of = self._of
        for name, tensor, state in self._tensors:
            if of(tensor) != state:
                return f"{name}: its values, address or requires_grad"
        if getattr(self._tuner, "router", None) is not self._router:
            return "the router"
        return None


class Recording:
    """A function without arguments and results, whose tensors all lie still: run, then recorded, then replayed.

    Args:
        model: what the function calls.
        warmup: how many calls run as they are before the recording is made.
        pool: of memory, shared by recordings that are never replayed at the same time.
        before: called right before the recording is made.
    """

    def __init__(
        self,
        function: Callable[[], None],
        model: nn.Module,
        device: torch.device,
        warmup: int,
        pool: Any = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.function, self.model, self.warmup, self.pool, self.before = function, model, warmup, pool, before
        self.calls = 0
        self.graph: Any = None
        self.held: list[Any] = []
        self._stream = torch.cuda.Stream(device) if has_graphs(device) else None

    def __call__(self) -> bool:
        """Run or replay; whether it was a replay."""
        self.calls += 1
        if self._stream is None:
            self.function()
            return False
        if self.graph is None and self.calls <= self.warmup:
            current = torch.cuda.current_stream(self._stream.device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                self.function()
            current.wait_stream(self._stream)
            return False
        if self.graph is None:
            self._record()
        self.graph.replay()
        return True

    def _record(self) -> None:
        self.before()
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: a loader's pinning thread may allocate meanwhile
            with torch.cuda.graph(graph, pool=self.pool, stream=self._stream, capture_error_mode="thread_local"):
                self.function()
        except Exception as e:
            raise RuntimeError(
                f"This cannot be captured as a CUDA graph, because something in it waits for the device or decides on "
                f"the host: {e}"
            ) from e
        self.graph, self.held = graph, _kept(self.model)


def has_graphs(device: torch.device) -> bool:
    """Whether work on this device can be recorded."""
    return device.type == "cuda"


def tuner_of(model: nn.Module) -> Any:
    """What manages the adapters of a PeftModel, wrapped for several processes or not; None for other models."""
    return getattr(getattr(model, "module", model), "_tuner", None)


def _kept(model: nn.Module) -> list[Any]:
    """What the library keeps between forwards and may drop while a recording still reads it: compute copies of the
    factors, and what layers remember."""
    tuner = tuner_of(model)
    casts = getattr(tuner, "_casts", None)
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    return [None if casts is None else dict(casts._copies), [dict(layer.store) for layer in layers]]


def _device_of(model: nn.Module) -> torch.device:
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "no device"
        raise ValueError(f"A captured model lies on one device, this one on {found}")
    return devices.pop()


def _check_options(warmup: int, on_change: str) -> None:
    if warmup < 1:
        raise ValueError(f"warmup must be at least 1, because capture cannot do what is done only once; got {warmup}")
    if on_change not in ON_CHANGE:
        raise ValueError(f"on_change must be one of {', '.join(ON_CHANGE)}, got {on_change!r}")


def _autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    # without the cache: what an outer autocast has cached is not there any more at a replay
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)


def _refuse_or(on_change: str, change: str, recapture: Callable[[], None]) -> None:
    if on_change == "error":
        raise RuntimeError(
            f"The model is not the one that was captured: {change} changed. Capture it again, or once and for all with "
            "on_change='recapture'."
        )
    logger.info("peftfast: capturing again, because %s changed", change)
    recapture()


# ---- training --------------------------------------------------------------------------------------------------------
class CapturedTrainingStep:
    """Forward and backward of one batch, and the optimizer's step if there is an optimizer; see
    `capture_training_step`.

    Attributes:
        inputs: the buffers that batches are copied into, by name.
        loss: [] the last loss; overwritten by the next call.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        optimizer: torch.optim.Optimizer | None,
        autocast: torch.dtype | None,
        loss_function: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None,
        accumulate: bool,
        max_grad_norm: float | None,
        warmup: int,
        on_change: str,
    ) -> None:
        _check_options(warmup, on_change)
        self.model, self.optimizer, self.autocast, self.accumulate = model, optimizer, autocast, accumulate
        self.loss_function = loss_function or _loss_of_output
        self.max_grad_norm, self.warmup, self.on_change = max_grad_norm, warmup, on_change
        self.device = _device_of(model)
        self._graphs = has_graphs(self.device)
        self._check()
        if "adapter_names" in batch:
            raise ValueError(
                "adapter_names is not captured in training: a mix of adapters is arranged on the host there"
            )
        self.inputs = {k: _buffer(v, self.device) for k, v in batch.items()}
        self.loss: Tensor | None = None
        self._start()

    def _check(self) -> None:
        if getattr(tuner_of(self.model), "router", None) is not None:
            raise ValueError("A router chooses on the host, which a captured step does not ask: set_router(None) first")
        if self.optimizer is None:
            if self.max_grad_norm is not None:
                raise ValueError("max_grad_norm is for a captured optimizer; clip before calling optimizer.step()")
            return
        if self.accumulate:
            raise ValueError("accumulate=True adds gradients up over calls: leave the optimizer outside")
        tuner = tuner_of(self.model)
        scheduled = [
            name
            for name in getattr(tuner, "active_adapters", ())
            if hasattr(method_for(tuner.peft_config[name]), "loss_term")
        ]
        if scheduled:
            raise ValueError(
                f"Adapter {scheduled[0]} has a schedule that follows optimizer.step(): leave the optimizer outside"
            )
        groups = self.optimizer.param_groups
        if self._graphs and not all(group.get("capturable") for group in groups):
            raise ValueError(
                f"{type(self.optimizer).__name__} decides on the host, as long as it was not made with "
                "capturable=True; without that, leave it outside and call optimizer.step() after every step"
            )

    def _start(self) -> None:
        """Forget the recording, if there is one."""
        self._recording = Recording(self._run, self.model, self.device, self.warmup, before=self._before_recording)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not self._parameters:
            raise ValueError("The model has no trainable parameter; activate an adapter with set_adapter first")
        self._grads: dict[Tensor, Tensor] = {}
        if self.optimizer is not None and self._graphs:
            for group in self.optimizer.param_groups:  # schedulers write into it
                if not isinstance(group["lr"], Tensor):
                    group["lr"] = torch.tensor(float(group["lr"]), device=self.device)
        self._settings = self._optimizer_settings()
        self._snapshot = Snapshot(self.model)

    def _optimizer_settings(self) -> list[dict[str, Any]]:
        """What a recording of the optimizer has inside it; the learning rate is a tensor there."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        skipped = ("params", "lr", "initial_lr")
        return [{k: v for k, v in g.items() if k not in skipped and not isinstance(v, Tensor)} for g in groups]

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """Run the step on `batch`.

        Args:
            batch: as at capture: the same keys, shapes and dtypes, and equal values where they are not tensors. It may
                lie on another device.

        Returns:
            The loss [], a copy.

        Raises:
            ValueError: another key, shape, dtype or constant; nothing has been copied then.
            RuntimeError: the model or the optimizer's settings are not what was captured.
        """
        self._check_batch(batch)
        change = self._snapshot.change()
        if change is None and self._optimizer_settings() != self._settings:
            change = "a setting of the optimizer"
        if change is not None:
            _refuse_or(self.on_change, change, self._start)
        with torch.no_grad():
            for name, buffer in self.inputs.items():
                if isinstance(buffer, Tensor):
                    buffer.copy_(batch[name], non_blocking=True)
        if self.accumulate:
            self._attach()
        if self._recording():
            self._replayed()
        else:
            self._settle()
        return self.loss.clone()

    def _check_batch(self, batch: Mapping[str, Any]) -> None:
        missing, new = self.inputs.keys() - batch.keys(), batch.keys() - self.inputs.keys()
        if missing or new:
            raise ValueError(
                f"A captured step takes the inputs it was captured with, {', '.join(self.inputs)}; "
                + "; ".join(f"{what} {', '.join(sorted(k))}" for what, k in (("missing", missing), ("new", new)) if k)
            )
        for name, buffer in self.inputs.items():
            value = batch[name]
            if isinstance(buffer, Tensor) and isinstance(value, Tensor):
                if value.shape != buffer.shape or value.dtype != buffer.dtype:
                    raise ValueError(
                        f"{name} is {value.dtype} {list(value.shape)}, but the step was captured for {buffer.dtype} "
                        f"{list(buffer.shape)}. Pad the batch, or capture another step for this shape."
                    )
            elif isinstance(buffer, Tensor) or isinstance(value, Tensor) or value != buffer:
                raise ValueError(f"{name} is {_short(value)}, but the step was captured with {_short(buffer)}")

    def _run(self) -> None:
        if not self.accumulate:
            for p in self._parameters:
                p.grad = None  # the backward pass then writes gradients instead of adding to some
        with torch.inference_mode(False), torch.enable_grad():
            with _autocast(self.device, self.autocast):
                loss = self.loss_function(self.model, self.inputs)
            loss.backward()
        if self.loss is None:
            self.loss = torch.empty_like(loss, requires_grad=False)
        with torch.no_grad():
            self.loss.copy_(loss)
        if self.optimizer is not None:
            if self.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(self._parameters, self.max_grad_norm)
            self.optimizer.step()

    def _before_recording(self) -> None:
        if not self.accumulate:
            for p in self._parameters:
                p.grad = None
            self._grads = {}

    @torch.no_grad()
    def _settle(self) -> None:
        """After a step that ran: gradients stay where the first one's are."""
        for p in self._parameters:
            kept = self._grads.get(p)
            if p.grad is None or p.grad is kept:
                continue
            if kept is None:
                self._grads[p] = p.grad
            else:
                kept.copy_(p.grad)
                p.grad = kept

    def _replayed(self) -> None:
        if not self._grads:
            self._grads = {p: p.grad for p in self._parameters if p.grad is not None}
        for p, grad in self._grads.items():
            p.grad = grad  # `optimizer.zero_grad()` takes it away
        if self.optimizer is not None:  # a replay writes without anybody noticing
            torch.autograd.graph.increment_version(self._parameters)

    @torch.no_grad()
    def _attach(self) -> None:
        """Before a step that adds to gradients: whatever they are now, in the buffers."""
        for p, kept in self._grads.items():
            if p.grad is None:
                kept.zero_()
            elif p.grad is not kept:
                kept.copy_(p.grad)
            p.grad = kept


def _buffer(value: Any, device: torch.device) -> Any:
    return value.detach().to(device, copy=True) if isinstance(value, Tensor) else value


def _short(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _loss_of_output(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    output = model(**batch)
    loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"{type(output).__name__} has no loss: pass labels with the batch, or loss_function=(model, batch) -> loss"
        )
    return loss


def capture_training_step(
    model: nn.Module,
    batch: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    autocast: torch.dtype | None = None,
    loss_function: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
    accumulate: bool = False,
    max_grad_norm: float | None = None,
    warmup: int = 3,
    on_change: str = "error",
) -> CapturedTrainingStep:
    """A training step as one CUDA graph: `loss = step(batch)`. Nothing is run yet; the first `warmup` calls are
    ordinary steps, the next one is recorded and replayed, as are all that follow.

    Args:
        model: any, on one device.
        batch: keyword arguments of the model; gives keys, shapes and dtypes, the values do not matter. Anything but a
            tensor is a constant.
        optimizer: part of the step. On a GPU it must have been made with `capturable=True`; its learning rate becomes
            a tensor, which schedulers write into. None: the caller calls `optimizer.step()` after a step.
        autocast: dtype of autocast inside the step; None: none, whatever the surroundings say.
        loss_function: (model, batch) -> loss []; None: the `loss` of the model's output.
        accumulate: add to the gradients; False: `.grad` holds the gradients of the last batch alone, without
            `zero_grad`.
        max_grad_norm: clip the gradients to this norm before the optimizer's step.
        warmup: steps that run before recording. With `torch.nn.parallel.DistributedDataParallel` at least 11.
        on_change: what to do when the model is no longer what was captured: "error", or "recapture", with a warm-up.

    Raises:
        ValueError: no trainable parameter, several devices, an optimizer that cannot be captured, a router.
    """
    return CapturedTrainingStep(
        model, batch, optimizer, autocast, loss_function, accumulate, max_grad_norm, warmup, on_change
    )


# ---- decoding --------------------------------------------------------------------------------------------------------
#: How many tokens are made before the host looks whether all sequences have ended.
LOOK_EVERY = 16


class CapturedDecoding:
    """Generates with one replay a token; see `capture_decoding`.

    Attributes:
        cache: transformers' StaticCache, [batch_size, heads, max_length, head_dim] a layer.
        token: [B, 1] the last token. positions: [B, 1] its position. mask: [B, max_length] 0 for padding.
        index: [B] place of every sample's adapter among `names`; -1 for the base model.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_size: int,
        max_length: int,
        mixed: bool,
        autocast: torch.dtype | None,
        warmup: int,
        on_change: str,
    ) -> None:
        _check_options(warmup, on_change)
        self.model, self.batch_size, self.max_length = model, batch_size, max_length
        self.mixed, self.autocast, self.warmup, self.on_change = mixed, autocast, warmup, on_change
        self.device = device = _device_of(model)
        self.tuner = tuner_of(model)
        if getattr(model, "_is_prompt_learning", False):
            raise ValueError("Prompts in front of the input are not captured: use model.generate")
        if mixed and getattr(getattr(self.tuner, "inventory", None), "control", None) is None:
            raise ValueError(f"mixed=True chooses among the adapters of a PeftModel's layers; {type(model).__name__} "
                             "has none")  # fmt: skip
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        arguments = inspect.signature(base.forward).parameters
        self._cache_argument = "cache" if "cache" in arguments else "past_key_values"
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in arguments else {}
        self.base = base
        self._start()
        if any(getattr(layer, "is_sliding", False) for layer in self.cache.layers):
            raise ValueError("Sliding-window caches count on the host, which a captured step does not do")
        with torch.inference_mode(False):
            self.token = torch.zeros((batch_size, 1), dtype=torch.int64, device=device)
            self.positions = torch.zeros_like(self.token)
            self.mask = torch.ones((batch_size, max_length), dtype=torch.int64, device=device)
            self.index = torch.full((batch_size,), -1, dtype=torch.int64, device=device)
            self.tokens = torch.zeros((batch_size, max_length), dtype=torch.int64, device=device)
            self.column = torch.zeros((1,), dtype=torch.int64, device=device)
            self.finished = torch.zeros((batch_size,), dtype=torch.bool, device=device)
            self.pad = torch.zeros((), dtype=torch.int64, device=device)
            self.temperature = torch.ones((), device=device)
            self.top_k = torch.zeros((), dtype=torch.int64, device=device)
            self.top_p = torch.ones((), device=device)
        self.ends: Tensor | None = None  # [E] tokens that end a sequence
        self.logits: Tensor | None = None  # [B, vocabulary] fp32, of the last position

    def _start(self) -> None:
        """Forget all recordings."""
        from transformers import StaticCache

        self._recordings: dict[Any, Recording] = {}
        # anew as well, because the model's dtype may be another one
        self.cache = StaticCache(config=self.base.config, max_cache_len=self.max_length)
        self._pool = torch.cuda.graph_pool_handle() if has_graphs(self.device) else None
        self._snapshot = Snapshot(self.model, self.mixed)

    def _routing(self, tokens: int) -> Routing | None:
        """The mix in the form that reads `index` on the device, on a CPU too."""
        if not self.mixed:
            return None
        names, _ = self.tuner.inventory.number_table(self.device)
        return Routing(names, self.index, None, tokens=tokens)

    # ---- one token ---------------------------------------------------------------------------------------------------
    @contextmanager
    def _settings(self, routing: Routing | None) -> Iterator[None]:
        follow = nullcontext() if routing is None else self.tuner.inventory.control.use(routing)
        # not inference mode: what the library keeps is to serve later calls of any kind
        with torch.inference_mode(False), torch.no_grad(), _autocast(self.device, self.autocast), follow:
            yield

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> None:
        arguments = {self._cache_argument: self.cache, "use_cache": True, **self._last_only}
        logits = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, **arguments).logits[:, -1]
        if self.logits is None:
            self.logits = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        self.logits.copy_(logits)

    def _choose(self, sampled: bool, filtered: bool) -> None:
        """The next token from `logits`, into `token` and the next column of `tokens`."""
        if not sampled:
            chosen = self.logits.argmax(-1)
        else:
            logits = self.logits / self.temperature
            order = None
            if filtered:
                logits, order = logits.sort(-1, descending=True)
                rank = torch.arange(logits.shape[-1], device=logits.device)
                logits = logits.masked_fill((rank >= self.top_k) & (self.top_k > 0), float("-inf"))
                chances = logits.softmax(-1)
                before = chances.cumsum(-1) - chances  # the first one is always kept
                logits = logits.masked_fill((before >= self.top_p) & (rank > 0), float("-inf"))
            # the largest of chance / exponential noise is a draw by chance (as torch.multinomial does it)
            noise = torch.empty_like(logits).exponential_()
            chosen = (logits.softmax(-1) / noise).argmax(-1)
            if order is not None:
                chosen = order.gather(-1, chosen[:, None])[:, 0]
        chosen = torch.where(self.finished, self.pad, chosen)
        self.finished.logical_or_((chosen[:, None] == self.ends).any(-1))
        self.token.copy_(chosen[:, None])
        self.tokens.index_copy_(1, self.column, chosen[:, None])
        self.column.add_(1)

    def _advance(self, sampled: bool, filtered: bool) -> None:
        self._forward(self.token, self.mask, self.positions)
        self.positions.add_(1)
        self._choose(sampled, filtered)

    def _recording(self, *mode: bool) -> Recording:
        recording = self._recordings.get(mode)
        if recording is None:
            recording = Recording(lambda: self._advance(*mode), self.model, self.device, self.warmup, self._pool)
            self._recordings[mode] = recording
        return recording

    # ---- all tokens --------------------------------------------------------------------------------------------------
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        adapter_names: Choice | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
    ) -> Tensor:
        """Prompts continued, as `model.generate` would continue them without logits processors.

        Args:
            input_ids: [B, T] prompts, padded on the left.
            max_new_tokens: T and this must fit `max_length`.
            attention_mask: [B, T] 0 for padding; None: no padding.
            adapter_names: with `mixed=True`, an adapter for every sample: its name or "__base__", or its number or -1
                in a tensor; None: the router's choice, or the active adapter.
            do_sample: draw instead of taking the likeliest token; `temperature`, `top_k` (0: all), `top_p` apply then.
            eos_token_id, pad_token_id: None: what the model's generation config says. Without an end all
                `max_new_tokens` are made.

        Returns:
            [B, T + n] int64, prompts included; what has ended is continued by `pad_token_id`.

        Raises:
            ValueError: another batch size, too long, an adapter that is not there, names without `mixed=True`.
            RuntimeError: the model is not what was captured, and `on_change` is "error".
        """
        self._check(input_ids, max_new_tokens, attention_mask, do_sample, temperature, top_k, top_p)
        change = self._snapshot.change()
        if change is not None:
            _refuse_or(self.on_change, change, self._start)
        if self.mixed or adapter_names is not None or self._snapshot._router is not None:
            self._set_adapters(input_ids, attention_mask, adapter_names)
        with torch.inference_mode(False), torch.no_grad():
            ids, length = input_ids.to(self.device), input_ids.shape[1]
            self._reset(ids, attention_mask, eos_token_id, pad_token_id)
            self.temperature.fill_(temperature)
            self.top_k.fill_(top_k)
            self.top_p.fill_(top_p)
            mode = (do_sample, do_sample and (top_k > 0 or top_p < 1.0))
            positions = (self.mask[:, :length].cumsum(-1) - 1).clamp(min=0)
            with self._settings(self._routing(length)):
                self._forward(ids, self.mask[:, :length], positions)
            self.positions.copy_(positions[:, -1:] + 1)
            self._choose(*mode)
            step = self._recording(*mode)
            with self._settings(self._routing(1)):
                for made in range(1, max_new_tokens):
                    if made % LOOK_EVERY == 0 and self.ends.numel() and bool(self.finished.all()):
                        break
                    step()
            return torch.cat([ids, self._made(int(self.column))], dim=1)

    def _check(
        self,
        ids: Tensor,
        new: int,
        mask: Tensor | None,
        do_sample: bool,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> None:
        if ids.dim() != 2 or ids.shape[0] != self.batch_size:
            raise ValueError(f"input_ids is {list(ids.shape)}, but decoding was captured for [{self.batch_size}, T]")
        if new < 1 or ids.shape[1] + new > self.max_length:
            raise ValueError(
                f"{ids.shape[1]} tokens and {new} new ones, but decoding was captured for at least one new and at most "
                f"{self.max_length} altogether"
            )
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(f"attention_mask is {list(mask.shape)}, input_ids {list(ids.shape)}")
        if do_sample and not (temperature > 0 and top_k >= 0 and 0 < top_p <= 1):
            raise ValueError(
                f"Sampling takes temperature > 0, top_k >= 0 and 0 < top_p <= 1, got {temperature}, {top_k}, {top_p}"
            )

    def _set_adapters(self, ids: Tensor, mask: Tensor | None, choice: Choice | None) -> None:
        if not self.mixed:
            what = "A router" if choice is None else "adapter_names="
            raise ValueError(f"{what} needs decoding that was captured with mixed=True")
        if choice is None and self.tuner.router is not None:
            choice = self.tuner.router.choose({"input_ids": ids, "attention_mask": mask})
        if choice is None:
            active = list(self.tuner.active_adapters) or [BASE]
            if len(active) > 1:
                raise ValueError(f"Several adapters are active ({', '.join(active)}): pass adapter_names=")
            choice = active * self.batch_size
        inventory = self.tuner.inventory
        resolve(inventory, choice, (ids,), {})  # says what is wrong with it
        numbers = choice if isinstance(choice, Tensor) else self.tuner.adapter_numbers(list(choice), self.device)
        self.index.copy_(resolve(inventory, numbers.to(self.device), (ids,), {}).index)

    def _reset(self, ids: Tensor, mask: Tensor | None, end: int | Sequence[int] | None, pad: int | None) -> None:
        settings = getattr(self.base, "generation_config", None) or self.base.config
        end = getattr(settings, "eos_token_id", None) if end is None else end
        pad = getattr(settings, "pad_token_id", None) if pad is None else pad
        ends = [] if end is None else [end] if isinstance(end, int) else list(end)
        if self.ends is None or self.ends.shape[0] != len(ends):
            self.ends = torch.empty((len(ends),), dtype=torch.int64, device=self.device)
            self._recordings = {}
        self.ends.copy_(torch.tensor(ends, dtype=torch.int64))
        self.pad.fill_(pad if pad is not None else ends[0] if ends else 0)
        self.cache.reset()
        self.mask.fill_(1)
        if mask is not None:
            self.mask[:, : mask.shape[1]].copy_(mask)
        self.finished.zero_()
        self.column.zero_()

    def _made(self, count: int) -> Tensor:
        """The new tokens up to where the last sequence ended."""
        tokens = self.tokens[:, :count]
        ended = torch.isin(tokens, self.ends)
        if self.ends.numel() and bool(ended.any(-1).all()):
            count = int(ended.int().argmax(-1).max()) + 1
        return tokens[:, :count].clone()


def capture_decoding(
    model: nn.Module,
    batch_size: int,
    max_length: int,
    *,
    mixed: bool = False,
    autocast: torch.dtype | None = None,
    warmup: int = 3,
    on_change: str = "recapture",
) -> CapturedDecoding:
    """Decoding with one CUDA graph a token: `tokens = decode.generate(input_ids, max_new_tokens)`. Prompts are read
    without a graph; the first `warmup` tokens are ordinary steps, the next one is recorded.

    Args:
        model: a causal language model of transformers, with or without adapters; put it into eval mode.
        batch_size: of every call.
        max_length: largest number of tokens of a sequence, prompt included; decides the size of the cache.
        mixed: choose adapters for every sample (`adapter_names=`). One recording then serves every mix and every
            active adapter, as long as no adapter is added, deleted, merged or trained. False: the active adapters,
            faster by the choosing; switching them is a new capture.
        autocast: dtype of autocast; None: none, whatever the surroundings say.
        warmup: tokens that are made before recording.
        on_change: what to do when the model is no longer what was captured: "recapture", with a warm-up, or "error".

    Raises:
        ValueError: several devices, a sliding-window cache, `mixed` for a model without adapters in its layers.
    """
    return CapturedDecoding(model, batch_size, max_length, mixed, autocast, warmup, on_change)
