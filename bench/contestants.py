"""The same adapted linear, layer or model in every library, with the same numbers inside, ready to be timed.

A contestant is a call without arguments that runs one pass and leaves its results where the gate finds them. Limit: the
frozen base alone. Peers: PEFT under autocast (as Trainer runs it), without it, and under torch.compile; Unsloth's
autograd function, or its formula where the package cannot be imported; bitsandbytes' own products below PEFT and below
the frozen base.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.operands import Model, Size
from peftfast.ops.host_bound import host_bound_up_to

LIMIT, OURS, PEER = "limit", "ours", "peer"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Contestant(NamedTuple):
    """One side of a comparison."""

    name: str
    role: str
    call: Callable[[], object]
    results: Callable[[], dict[str, Tensor]] = dict  # of one pass without dropout, for the gate
    truth: Callable[[], dict[str, Tensor]] | None = None  # what they should be, if it is known of this one


class One(nn.Module):
    """A model that is one linear layer."""

    def __init__(self, size: Size, device: str) -> None:
        super().__init__()
        generator = torch.Generator(device).manual_seed(0)
        weight = torch.randn(size.n, size.k, generator=generator, device=device).mul_(size.k**-0.5).to(size.dtype)
        self.proj = nn.Linear(size.k, size.n, bias=False, device="meta")
        self.proj.weight = nn.Parameter(weight, requires_grad=False)
        if size.format in ("nf4", "int8"):
            import peftfast

            options = {"double_quant": True, "compute_dtype": size.dtype} if size.format == "nf4" else {}
            peftfast.quantize_model(self, size.format, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def wrap(library: str, base: nn.Module, size: Size, targets: Sequence[str], dora: bool = False) -> nn.Module:
    """`base` with LoRA from a library, every factor filled."""
    module = importlib.import_module(library)
    config = module.LoraConfig(
        r=size.r, lora_alpha=2 * size.r, lora_dropout=size.dropout, target_modules=list(targets), use_dora=dora
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = module.get_peft_model(base, config)
    fill(model)
    return model.train()


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """The same numbers in every library: they follow from the parameter's name."""
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_A" in name or ".lora_B" in name:
            generator = torch.Generator(parameter.device).manual_seed(len(name) + sum(map(ord, name)))
            parameter.normal_(std=parameter.shape[1] ** -0.5 * 0.5, generator=generator)


def autocast(device: str, dtype: torch.dtype, enabled: bool) -> Any:
    return torch.autocast(device.partition(":")[0], dtype, enabled=enabled and dtype != torch.float32)


def _pass(
    model: Callable, needed: list[Tensor], x: Tensor, dy: Tensor, device: str, dtype: torch.dtype, amp: bool
) -> Callable[[], tuple[Tensor, ...]]:
    """A call that gives the output and the gradients of x and of what is `needed` besides. They go into no `.grad`:
    adding to the last pass's takes as long as adding an adapter, and is no part of a layer."""
    given = {dy.dtype: dy}

    def call() -> tuple[Tensor, ...]:
        with autocast(device, dtype, amp):
            y = model(x)
        if y.dtype not in given:  # as the next layer would give it
            given[y.dtype] = dy.to(y.dtype)
        return y, *torch.autograd.grad(y, [x, *needed], given[y.dtype])

    return call


def _results(model: nn.Module, call: Callable[[], tuple[Tensor, ...]]) -> Callable[[], dict[str, Tensor]]:
    def run() -> dict[str, Tensor]:
        model.eval()
        y, dx, *grads = call()
        model.train()
        names = [n[n.index("lora_") :] for n, p in model.named_parameters() if p.requires_grad]
        return {"y": y.detach(), "dx": dx, **dict(zip(names, grads, strict=True))}

    return run


def linear(size: Size, device: str, compiler: str | None = None, dora: bool = False) -> list[Contestant]:
    """Forward and backward of one linear layer; with the name of a compiler, PEFT under torch.compile too."""
    torch.manual_seed(0)
    base = One(size, device)
    x = torch.randn(size.m, size.k, device=device).to(size.dtype).requires_grad_()
    dy = torch.randn(size.m, size.n, device=device).to(size.dtype)
    found = []

    def add(name: str, role: str, model: nn.Module, run: Callable | None = None, amp: bool = True) -> None:
        needed = [p for p in model.parameters() if p.requires_grad]
        call = _pass(model if run is None else run, needed, x, dy, device, size.dtype, amp)
        found.append(Contestant(name, role, call, _results(model, call)))

    add("frozen", LIMIT, base)
    add("peftfast", OURS, wrap("peftfast", copy.deepcopy(base), size, ["proj"], dora))
    peft = wrap("peft", copy.deepcopy(base), size, ["proj"], dora)
    add("peft", PEER, peft)
    found[-1] = found[-1]._replace(truth=partial(linear_truth, size, device, peft, x, dy))
    add("peft, no autocast", PEER, wrap("peft", copy.deepcopy(base), size, ["proj"], dora), amp=False)
    if compiler is not None:
        model = wrap("peft", copy.deepcopy(base), size, ["proj"], dora)
        add("peft + compile", PEER, model, torch.compile(model, backend=compiler))
    name, function = _unsloth(size)
    if function is not None and not (size.dropout or dora):
        add(name, PEER, Unsloths(function, base, peft))
    return found


class LoraW(torch.autograd.Function):
    """What Unsloth's function for one linear computes, its LoRA_W, by the operations it takes: factors cast in every
    call, t not saved, gradients of the factors in the input's dtype. It has no dropout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, state: None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        y = x @ w.t()
        y.addmm_(x @ a.t().to(x.dtype), b.t().to(x.dtype), alpha=scale)
        ctx.save_for_backward(x, w, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, b = ctx.saved_tensors
        a, b = a.to(x.dtype), b.to(x.dtype)
        da, db = torch.empty_like(a), torch.empty_like(b)
        da.t().addmm_(x.t(), dy @ b, alpha=ctx.scale, beta=0)
        db.t().addmm_(a @ x.t(), dy, alpha=ctx.scale, beta=0)
        dx = dy @ w
        dx.addmm_(dy @ b, a, alpha=ctx.scale)
        return dx, None, None, da, db, None


class Unsloths(nn.Module):
    """The same linear and factors as PEFT's `source`, by Unsloth's function or one like it."""

    def __init__(self, function: Any, base: One, source: nn.Module) -> None:
        super().__init__()
        self.function, self.weight = function, base.proj.weight
        adapted = source.base_model.model.proj
        self.lora_A, self.lora_B = copy.deepcopy(adapted.lora_A), copy.deepcopy(adapted.lora_B)
        self.scale = adapted.scaling["default"]

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
        return self.function.apply(x, self.weight, getattr(self.weight, "quant_state", None), a, b, self.scale)


def _unsloth(size: Size) -> tuple[str, Any]:
    """Unsloth's autograd function; where the package cannot be imported, its formula, for dense weights."""
    if importlib.util.find_spec("unsloth") is not None:
        try:
            from unsloth.kernels.fast_lora import LoRA_W

            return "unsloth", None if size.format == "int8" else LoRA_W
        except Exception as error:
            print(f"  unsloth is installed but does not import: {type(error).__name__}: {error}", flush=True)
    return "unsloth's formula", LoraW if size.format == "dense" else None


@torch.no_grad()
def linear_truth(size: Size, device: str, source: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """What one pass should give, in fp64, from the dequantised weight and PEFT's factors."""
    from peftfast.base.weight import base_weight

    proj = source.base_model.model.proj
    w = base_weight(proj.get_base_layer()).dense(torch.float32).double()
    a, b = proj.lora_A["default"].weight.double(), proj.lora_B["default"].weight.double()
    x, dy, scale = x.double(), dy.double(), proj.scaling["default"]
    t, p = x @ a.t(), dy @ b * scale
    return {
        "y": x @ w.t() + scale * (t @ b.t()), "dx": dy @ w + p @ a,
        "lora_A.default.weight": p.t() @ x, "lora_B.default.weight": scale * dy.t() @ t,
    }  # fmt: skip


# ---- layers and models -----------------------------------------------------------------------------------------------
def llama(
    shape: Model, layers: int, dtype: torch.dtype, device: str, format: str = "dense", vocabulary: int = 512,
    use_cache: bool = False,
) -> nn.Module:  # fmt: skip
    """A frozen Llama of a shape; by default its vocabulary is small."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        max_position_embeddings=32768, use_cache=use_cache,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).requires_grad_(False)
    if format != "dense":
        import peftfast

        options = {"double_quant": True, "compute_dtype": dtype} if format == "nf4" else {}
        peftfast.quantize_model(model, format, skip=["lm_head"], **options)
    return model


def models(base: nn.Module, size: Size, compiler: str | None = None) -> dict[str, tuple[str, nn.Module]]:
    """name -> (role, model): the limit, ours with and without blocks, PEFT, also compiled where a compiler is named."""
    import peftfast

    found = {"frozen": (LIMIT, base), "peftfast": (OURS, wrap("peftfast", copy.deepcopy(base), size, TARGETS))}
    blocks = wrap("peftfast", copy.deepcopy(base), size, TARGETS)
    with host_bound_up_to(0):  # so few tokens would be left to torch's products, and nothing be checked
        attach(peftfast.fuse_blocks(blocks), blocks)
    found["peftfast + blocks"] = (OURS, blocks)
    found["peft"] = (PEER, wrap("peft", copy.deepcopy(base), size, TARGETS))
    if compiler is not None:
        model = wrap("peft", copy.deepcopy(base), size, TARGETS)
        model.compile(backend=compiler)
        found["peft + compile"] = (PEER, model)
    return found


def attach(blocks: Any, model: nn.Module) -> None:
    """Run the passes in which blocks are found and checked; says where one is off."""
    device = next(model.parameters()).device
    ids = torch.randint(0, 512, (1, 32), device=device)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=next(model.parameters()).dtype == torch.bfloat16)
    with torch.no_grad(), amp:
        for _ in range(3):
            model(input_ids=ids)
    if not blocks.groups or any(group.state.startswith("off") for group in blocks.groups):
        print(f"  blocks that are not used:\n{blocks.report()}", flush=True)


def training_pass(model: nn.Module, ids: Tensor, dtype: torch.dtype, step: bool) -> Callable[[], Tensor]:
    """Loss and gradients of a whole model; with `step` also AdamW. The frozen base gets gradients for its input."""
    device = ids.device.type
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=True) if trained and step else None

    def call() -> Tensor:
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        with autocast(device, dtype, True):
            loss = model(inputs_embeds=embeds, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        for p in trained:
            p.grad = None
        return loss.detach()

    return call


def pass_without_dropout(
    model: nn.Module, ids: Tensor, dtype: torch.dtype, gradients: bool = True
) -> dict[str, Tensor]:  # fmt: skip
    """Logits, and the gradients of the first layer's input and of everything trained, all in fp32."""
    trained = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    model.eval()
    with torch.set_grad_enabled(gradients), autocast(ids.device.type, dtype, True):
        out = model(inputs_embeds=embeds, labels=ids)
    model.train()
    found = {"logits": out.logits.detach().float()}
    if gradients:
        dx, *grads = torch.autograd.grad(out.loss, [embeds, *trained])
        found |= {"dx": dx.float(), "factors": torch.cat([grad.flatten() for grad in grads]).float()}
    return found


def decoding(model: nn.Module, ids: Tensor, tokens: int, **options: Any) -> Callable[[], Tensor]:
    """Greedy generation of a fixed number of tokens."""

    def call() -> Tensor:
        with torch.no_grad():
            return model.generate(
                input_ids=ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True,
                pad_token_id=0, **options,
            )  # fmt: skip

    return call


def mixed(library: str, base: nn.Module, size: Size, adapters: int) -> tuple[nn.Module, list[str]]:
    """A model with many adapters in eval mode, and their names."""
    model = wrap(library, base, size, TARGETS)
    module = importlib.import_module(library)
    config = module.LoraConfig(r=size.r, lora_alpha=2 * size.r, target_modules=TARGETS)
    names = ["default", *(f"task{i}" for i in range(1, adapters))]
    for name in names[1:]:
        model.add_adapter(name, config)
    fill(model)
    return model.eval(), names
