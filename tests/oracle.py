"""Shared by the tests: tiny base models, an fp64 oracle, and twins, the same adapted model here and in PEFT."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftfast

VOCABULARY = 64


# ---- base models --------------------------------------------------------------------
def _seeded(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Every call with the same arguments gives the same weights, and leaves the global generator alone."""

    @functools.wraps(make)
    def build(*args: Any, **kwargs: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make(*args, **kwargs)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("bias"):  # zero biases would hide mistakes
                        parameter.normal_(std=0.1)
        return model.eval()

    return build


@_seeded
def llama(tied: bool = False, bias: bool = False, layers: int = 2, hidden: int = 32, **changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": VOCABULARY, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": tied,
        "attention_bias": bias, "mlp_bias": bias, "initializer_range": 0.2, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


@_seeded
def llama_classifier() -> nn.Module:
    from transformers import LlamaForSequenceClassification

    return LlamaForSequenceClassification(llama().config)


@_seeded
def gpt2(hidden: int = 32) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=hidden, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


@_seeded
def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


@_seeded
def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


class Net(nn.Module):
    """One module of every kind that can carry LoRA."""

    def __init__(self, pad: int | str = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 24)
        self.conv1 = nn.Conv1d(24, 16, 3, padding=pad)
        self.conv2 = nn.Conv2d(1, 6, (3, 2), stride=(1, 2), padding=(1, 0), bias=False)
        self.conv3 = nn.Conv3d(2, 4, (1, 2, 2))
        self.linear = nn.Linear(4 * 3 * 6 * 7, 40)
        self.head = nn.Linear(40, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv1(self.embed(ids).transpose(1, 2))  # [B, 16, T]
        x = self.conv2(torch.tanh(x)[:, None])  # [B, 6, 16, 8]
        x = self.conv3(torch.tanh(x).reshape(len(x), 2, 3, 8, -1)[:, :, :, :7, :8].contiguous())
        return self.head(torch.relu(self.linear(torch.tanh(x).flatten(1))))


@_seeded
def net() -> nn.Module:
    return Net()


class One(nn.Module):
    """A model that is one module, `m`, and tells PEFT how that is stored."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.m = module
        kinds = [kind.__name__ for kind in type(module).__mro__]
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = "Linear4bit" in kinds, "Linear8bitLt" in kinds

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x)


def stored(module: nn.Module, storage: str) -> nn.Module:
    """The module in "fp32", "bf16", "nf4", "fp4" or "int8"."""
    from peftfast.base.weight import quantizer

    if storage in ("nf4", "fp4", "int8"):
        return quantizer(storage).module(module.weight, module.bias)
    return module.to({"fp32": torch.float32, "bf16": torch.bfloat16}[storage])


def inputs(model: nn.Module, batch: int = 2, length: int = 16) -> dict[str, Tensor]:
    """Token ids (and what else the model needs), the same on every call."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(1, VOCABULARY, (batch, length), generator=generator)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(base, Net):
        return {"ids": ids}
    if "T5" in type(base).__name__:
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return {"input_ids": ids}


def logits(model: nn.Module, **changes: Any) -> Tensor:
    output = model(**{**inputs(model), **changes})
    return output if isinstance(output, Tensor) else output.logits


# ---- twins --------------------------------------------------------------------------
def config_of(library: Any, options: Mapping[str, Any]) -> Any:
    return library.LoraConfig(**copy.deepcopy(dict(options)))


class Twins:
    """The same base, adapted by both libraries, with PEFT's tensors in both.

    Attributes:
        ours, theirs: wrapped models, in eval mode. our_warnings, their_warnings: texts of what wrapping warned about.
    """

    def __init__(
        self, make: Callable[[], nn.Module], options: Mapping[str, Any], same: bool = True, **wrap: Any
    ) -> None:
        self.make, self.options = make, dict(options)
        self.peft = importlib.import_module("peft")
        self.ours, self.our_warnings = self._wrap(peftfast, wrap)
        self.theirs, self.their_warnings = self._wrap(self.peft, wrap)
        if same:
            self.copy()

    def _wrap(self, library: Any, wrap: Mapping[str, Any]) -> tuple[nn.Module, list[str]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                model = library.get_peft_model(self.make(), config_of(library, self.options), **wrap)
        return model.eval(), [str(w.message) for w in caught if w.category in (UserWarning, RuntimeWarning)]

    def copy(self) -> None:
        """Give both the same tensors: PEFT's, with noise on what starts at zero, so that every factor counts."""
        with torch.no_grad():
            generator = torch.Generator().manual_seed(3)
            for name, parameter in self.theirs.named_parameters():
                if "lora_" in name and not parameter.is_meta:
                    noise = torch.randn(parameter.shape, generator=generator) * 0.1
                    parameter.add_(noise.to(parameter.dtype))
            copy_parameters(self.theirs, self.ours)


def copy_parameters(source: nn.Module, target: nn.Module, only: str = "") -> None:
    """Those with `only` in their names."""
    values = dict(source.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in target.named_parameters(remove_duplicate=False):
            if only in name:
                parameter.copy_(values[name])


def same_live_state(ours: nn.Module, theirs: nn.Module, without: str = "$^") -> None:
    """Names, shapes, dtypes and requires_grad of all parameters and buffers are PEFT's, the order of what trains, by
    which optimizers save their state, and what the factors' modules say of themselves; names in which the regex
    `without` is found are left out."""

    def left_out(name: str) -> bool:
        return re.search(without, name) is not None

    def listing(model: nn.Module) -> dict[str, tuple]:
        parameters = {
            n: (tuple(p.shape), p.dtype, p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)
        }
        buffers = {n: (tuple(b.shape), b.dtype, "buffer") for n, b in model.named_buffers(remove_duplicate=False)}
        return {n: v for n, v in (parameters | buffers).items() if not left_out(n)}

    def trained(model: nn.Module) -> list[str]:
        return [n for n, p in model.named_parameters() if p.requires_grad and not left_out(n)]

    def factors(model: nn.Module) -> dict[str, str]:
        named = {n: m for n, m in model.named_modules() if re.search(r"\.lora_[AB]\.[^.]*$", n)}
        return {n: repr(m) for n, m in named.items() if not left_out(n)}

    assert listing(ours) == listing(theirs)
    assert trained(ours) == trained(theirs)
    assert factors(ours) == factors(theirs)
    assert {n for n in ours.state_dict() if not left_out(n)} == {n for n in theirs.state_dict() if not left_out(n)}


SETS = ("target_modules", "exclude_modules", "target_parameters")


def saved_config(folder: Path) -> dict[str, Any]:
    data = json.loads((folder / "adapter_config.json").read_text())
    return {k: sorted(v) if k in SETS and isinstance(v, list) else v for k, v in data.items()}


def same_files(ours: Path, theirs: Path, without: str = "$^") -> None:
    """Folders with the same files, keys (but for those with the regex `without` in them), tensors and config."""
    names = {p.relative_to(theirs) for p in theirs.rglob("*") if p.is_file()}
    assert {p.relative_to(ours) for p in ours.rglob("*") if p.is_file()} == names
    for name in names:
        if name.name == "adapter_config.json":
            assert saved_config((ours / name).parent) == saved_config((theirs / name).parent)
        if name.suffix == ".safetensors":
            mine, other = (
                {k: v for k, v in load_file(folder / name).items() if not re.search(without, k)}
                for folder in (ours, theirs)
            )
            assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {k: (v.shape, v.dtype) for k, v in other.items()}
            for key in other:
                torch.testing.assert_close(mine[key], other[key], rtol=0, atol=0, msg=lambda m, key=key: f"{key}: {m}")


def quietly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def at_once(function: Callable[[Any], Any], arguments: Sequence[Any]) -> None:
    """Call the function with each of these in a thread of its own. What one of them raises is raised here."""
    with ThreadPoolExecutor(len(arguments)) as pool:
        list(pool.map(function, arguments))


# ---- training -----------------------------------------------------------------------
def randomised(model: nn.Module, scale: float = 0.2, seed: int = 3, only: str = "lora_") -> nn.Module:
    """The model with random numbers in every factor, or in those with `only` in their names, the same in every library
    and dtype."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if only in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def moved(model: nn.Module, scale: float = 0.1, seed: int = 3) -> nn.Module:
    """The model with what trains some way from where it started, as after some steps, the same in every library."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def descend(
    model: nn.Module, steps: int = 5, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW, lr: float = 1e-2,
    beside: Callable[[], Any] = lambda: 0.0, **batch: Tensor,
) -> list[float]:  # fmt: skip
    """Losses of so many steps on one batch, that of `inputs` if none is given; `beside` is added to the model's."""
    batch = batch or inputs(model)
    one = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(**{"labels": batch["input_ids"], **batch}).loss + beside()
        loss.backward()
        one.step()
        one.zero_grad()
        losses.append(loss.item())
    return losses


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step_gradients(model: nn.Module, call: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """Gradients of one step from a seed, by `call` where it is not the model's own."""
    batch = inputs(model)
    model.zero_grad()
    torch.manual_seed(5)
    (model if call is None else call)(**batch, labels=batch["input_ids"]).loss.backward()
    return gradients(model)


def same_gradients_compiled(model: nn.Module) -> None:
    """A training step is one graph with eager's gradients."""
    expected = step_gradients(copy.deepcopy(model))
    torch._dynamo.reset()
    compiled = torch.compile(lambda **batch: model(**batch), backend="aot_eager", fullgraph=True)
    found = step_gradients(model, compiled)
    torch._dynamo.reset()
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def same_gradients_checkpointed(model: nn.Module, reentrant: bool) -> None:
    expected = step_gradients(copy.deepcopy(model))
    assert expected
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = step_gradients(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


# ---- the fp64 oracle ----------------------------------------------------------------
def python_calls(call: Callable[[], Any], events: Sequence[str] = ("call",)) -> int:
    """How many Python functions are called, with "c_call" built-ins too: what a clock would say on a machine without
    neighbours."""
    count = 0

    def counting(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in events

    sys.setprofile(counting)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


class Operations(TorchDispatchMode):
    """The operations of torch under it.

    Attributes:
        names: of all of them. launched: without those that launch nothing on a GPU, views and what is left empty.
        shapes: of the tensors that they make, views and inputs aside. elements: of the largest of these.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.launched: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        self.names.append(name)
        if not func.is_view and name not in ("_unsafe_view", "empty", "new_empty", "empty_like"):
            self.launched.append(name)
        known = {a.untyped_storage().data_ptr() for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)}
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.shapes.append(tuple(t.shape))
        return out

    @property
    def elements(self) -> int:
        return max(map(math.prod, self.shapes), default=0)


def close(value: Any, expected: Any) -> None:
    """The same but for the order in which fp32 numbers were added, over the few layers of a model here."""
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=2e-5)


def rms_error(value: Tensor, oracle: Tensor) -> float:
    """Root mean square of the deviation from an fp64 tensor, relative to its own root mean square."""
    assert oracle.dtype == torch.float64 and value.shape == oracle.shape, (oracle.dtype, value.shape, oracle.shape)
    scale = oracle.pow(2).mean().sqrt().item()
    return (value.double() - oracle).pow(2).mean().sqrt().item() / (scale or 1.0)


def assert_no_further(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], oracle: Mapping[str, Tensor], slack: float = 1.05
) -> dict[str, float]:
    """Our RMS distance from the oracle is at most `slack` times PEFT's, for every named tensor.

    The slack covers sampling noise: two implementations with equally distributed rounding errors differ by some percent
    in the RMS over a few thousand elements. Below a floor errors count as none: a quarter of an ulp of a half-precision
    result; three of an fp32 result, which is what adding the same few hundred products in another order does.
    """
    ratios = {}
    for name, truth in oracle.items():
        mine, other = rms_error(ours[name], truth), rms_error(theirs[name], truth)
        assert math.isfinite(mine), name
        floor = torch.finfo(ours[name].dtype).eps * (3 if ours[name].dtype == torch.float32 else 0.25)
        ratios[name] = mine / max(other, floor)
        assert mine <= slack * max(other, floor), f"{name}: our error {mine:.3e}, PEFT's {other:.3e}, floor {floor:.1e}"
    return ratios
