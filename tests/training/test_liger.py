"""Liger's kernels on one model: the same numbers, no other model touched, no adapter on the head left out.

The package is optional and its kernels want a GPU. Here its functions are stood in for by the same in torch, with what
matters of their behaviour (gradients written over the inputs, offsets, the product with the head's weight); one test
runs the real ones in Triton's interpreter, where the package is installed."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import gradients
from processes import run
from training.tiny import batch, fill, largest_difference, llama, lora, wrapped

import peftfast


# ---- the stand-in ----------------------------------------------------------------------------------------------------
class _Rms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, eps, offset, casting):
        dtype = x.dtype
        h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        y = (h * (offset + w.float())).to(dtype) if casting == "gemma" else (h.to(dtype) * (offset + w)).to(dtype)
        ctx.save_for_backward(x, w)
        ctx.settings = eps, offset
        return y

    @staticmethod
    def backward(ctx, dy):
        saved = ctx.saved_tensors
        x, w = (t.detach().float().requires_grad_() for t in saved)
        eps, offset = ctx.settings
        with torch.enable_grad():
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (offset + w)
        dx, dw = torch.autograd.grad(y, (x, w), dy.float())
        return dx.to(saved[0].dtype), dw.to(saved[1].dtype), None, None, None


class _Rope(torch.autograd.Function):
    """In place, as Liger's."""

    @staticmethod
    def _turn(x, cos, sin):
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x.copy_(x * cos[:, None] + turned * sin[:, None])

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        with torch.no_grad():
            return _Rope._turn(q.detach(), cos, sin), _Rope._turn(k.detach(), cos, sin)

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return _Rope._turn(dq.clone(), cos, -sin), _Rope._turn(dk.clone(), cos, -sin), None, None


class _CrossEntropy(torch.autograd.Function):
    """Gradients made in the forward pass and written over the logits, as Liger's."""

    @staticmethod
    def forward(ctx, x, target, ignore_index, reduction):
        with torch.enable_grad():
            leaf = x.detach().float().requires_grad_()
            loss = F.cross_entropy(leaf, target, ignore_index=ignore_index, reduction=reduction)
            (grad,) = torch.autograd.grad(loss, leaf)
        if x.requires_grad:
            x.detach().copy_(grad)
        ctx.save_for_backward(x.detach())
        return loss.detach()

    @staticmethod
    def backward(ctx, dy):
        return ctx.saved_tensors[0] * dy, None, None, None


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, target, bias, ignore_index, reduction):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
            loss = F.cross_entropy(
                F.linear(*leaves, bias).float(), target, ignore_index=ignore_index, reduction=reduction
            )
            ctx.save_for_backward(*torch.autograd.grad(loss, leaves))
        return loss.detach()

    @staticmethod
    def backward(ctx, dy):
        dx, dw = ctx.saved_tensors
        return dx * dy, dw * dy, None, None, None, None


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """`liger_kernel` as far as it is used; returns how often each function was called."""
    counts = {"rms": 0, "rope": 0, "ce": 0, "fused": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    functional = types.ModuleType("liger_kernel.transformers.functional")

    def rms(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        return _Rms.apply(X, W, eps, offset, casting_mode)

    def ce(input, target, ignore_index=-100, reduction="mean"):
        return _CrossEntropy.apply(input, target, ignore_index, reduction)

    def fused(input, weight, target, bias=None, ignore_index=-100, reduction="mean"):
        return _FusedLinear.apply(input, weight, target, bias, ignore_index, reduction)

    functional.liger_rms_norm = counted("rms", rms)
    functional.liger_rope = counted("rope", lambda q, k, cos, sin: _Rope.apply(q, k, cos, sin))
    functional.liger_cross_entropy = counted("ce", ce)
    functional.liger_fused_linear_cross_entropy = counted("fused", fused)
    parent = types.ModuleType("liger_kernel.transformers")
    parent.functional = functional
    root = types.ModuleType("liger_kernel")
    for module in (root, parent, functional):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return counts


def states(liger) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for part in liger.parts:
        found.setdefault(part.kind, set()).add(part.state)
    return found


def step(model, **changes) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)
    output = model(**{**batch(), **changes})
    output.loss.backward()
    return output.loss.detach(), gradients(model)


def compare(model, before, calls, loss=1e-6, gradient=1e-5) -> None:
    calls.update(dict.fromkeys(calls, 0))
    found = step(model)
    assert abs(found[0] - before[0]) <= loss * before[0]
    assert largest_difference(found[1], before[1]) <= gradient


def alone(model) -> dict:
    """Everything that instances have beside their class, by module name."""
    return {n: {k: v for k, v in m.__dict__.items() if k in ("forward", "_loss_function", "_liger")} for n, m in
            model.named_modules()}  # fmt: skip


# ---- tests -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", ["auto", False])
def test_same_numbers_and_everything_is_used(calls, dtype, fused):
    model = wrapped(peftfast, llama(dtype=dtype), lora_dropout=0.1, modules_to_save=["norm"]).train()
    before, untouched = step(model), alone(model)
    liger = peftfast.use_liger(model, fused_linear_cross_entropy=fused)
    step(model)
    half = dtype == torch.bfloat16
    compare(model, before, calls, 0.02 if half else 1e-6, 0.1 if half else 1e-5)
    assert calls == {"rms": 5, "rope": 2, "ce": int(not fused), "fused": int(bool(fused))}
    assert all(found == {"on"} for found in states(liger).values())
    assert "RMSNorm                    on    " in liger.report()
    liger.remove()
    assert alone(model) == untouched
    calls.update(dict.fromkeys(calls, 0))
    again = step(model)
    assert torch.equal(again[0], before[0]) and not any(calls.values())
    peftfast.use_liger(model)  # may be put in again


def test_autocast(calls):
    model = wrapped(peftfast).train()
    with torch.autocast("cpu", torch.bfloat16):
        before = step(model)
        liger = peftfast.use_liger(model)
        step(model)
        compare(model, before, calls, 0.02, 0.1)
    assert calls["fused"] == 1 and states(liger)["fused linear cross-entropy"] == {"on"}


def test_nobody_else_is_touched(calls):
    from transformers.models.llama import modeling_llama

    model, other = wrapped(peftfast).train(), wrapped(peftfast).train()
    before = dict(modeling_llama.__dict__), F.cross_entropy, dict(modeling_llama.LlamaAttention.__dict__)
    expected = step(other)
    peftfast.use_liger(model)
    step(model)
    assert (dict(modeling_llama.__dict__), F.cross_entropy, dict(modeling_llama.LlamaAttention.__dict__)) == before
    compare(other, expected, calls, 0, 0)
    assert not any(calls.values())


def adapted_head(kind: str) -> torch.nn.Module:
    if kind == "lora":
        return wrapped(peftfast, target_modules=["q_proj", "lm_head"])
    if kind == "modules_to_save":
        model = wrapped(peftfast, modules_to_save=["lm_head"])
        with torch.no_grad():
            model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
        return model
    if kind == "tokens":
        model = wrapped(peftfast, llama(tied=True), trainable_token_indices=[5, 6, 7])
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "trainable_tokens" in name and p.requires_grad:
                    p.add_(1.0)
        return model
    model = wrapped(peftfast)
    head = model.get_base_model().lm_head
    if kind == "hook":
        head.register_forward_hook(lambda module, args, out: out * 2)
    elif kind == "subclass":
        head.__class__ = type(
            "OtherLinear", (torch.nn.Linear,), {"forward": lambda self, x: 2 * F.linear(x, self.weight)}
        )
    else:
        head.forward = lambda x: 2 * F.linear(x, head.weight)
    return model


@pytest.mark.parametrize("kind", ["lora", "modules_to_save", "tokens", "hook", "subclass", "forward"])
def test_an_adapted_head_is_never_bypassed(calls, kind):
    model = adapted_head(kind).train()
    with pytest.raises(ValueError, match=r"fused_linear_cross_entropy=True: lm_head "):
        peftfast.use_liger(model, fused_linear_cross_entropy=True)
    assert not any(alone(model)[n] for n in alone(model) if not n.endswith("lm_head"))  # nothing was changed
    before = step(model)
    liger = peftfast.use_liger(model)
    step(model)
    compare(model, before, calls)
    assert calls["fused"] == 0 and calls["ce"] == 1
    assert "lm_head" in liger.report()


def test_a_head_that_is_adapted_later_is_not_bypassed(calls):
    base = llama().train()
    liger = peftfast.use_liger(base, fused_linear_cross_entropy=True)
    step(base)
    assert calls["fused"] == 2  # one of them is the check's
    model = wrapped(peftfast, base, target_modules=["q_proj", "lm_head"]).train()
    reference = wrapped(peftfast, llama(), target_modules=["q_proj", "lm_head"]).train()
    compare(model, step(reference), calls)
    assert calls["fused"] == 0 and calls["ce"] == 1
    assert "off: lm_head is adapted (default)" in liger.report()
    model.unload()
    base(**batch())
    assert calls["fused"] == 1


def test_logits_are_there_where_they_are_wanted(calls):
    model = wrapped(peftfast).train()
    reference = wrapped(peftfast)
    liger = peftfast.use_liger(model)
    assert model(**batch()).logits is None
    for mode in (model.eval(), model.train()):
        with torch.no_grad():
            found = mode(**batch())
        with torch.no_grad():
            expected = reference(**batch())
        torch.testing.assert_close(found.logits, expected.logits)
        torch.testing.assert_close(found.loss, expected.loss)
    found = model.train()(input_ids=batch()["input_ids"])
    torch.testing.assert_close(found.logits, expected.logits)
    few = {**batch(), "labels": batch()["labels"][:, -5:], "logits_to_keep": 5}
    found, last = model(**few), reference(**few)
    torch.testing.assert_close(found.logits, last.logits)
    torch.testing.assert_close(found.loss, last.loss)
    liger.remove()
    # from logits: the gradient that Liger writes over its input does not reach the output
    peftfast.use_liger(model, fused_linear_cross_entropy=False)
    found = model(**batch())
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(step(model, num_items_in_batch=30)[0], step(reference, num_items_in_batch=30)[0])
    liger = model.get_base_model()._liger
    liger.remove()
    peftfast.use_liger(model)
    step(model)
    for count in (30, torch.tensor(30)):
        mine, theirs = step(model, num_items_in_batch=count), step(reference, num_items_in_batch=count)
        torch.testing.assert_close(mine[0], theirs[0])
        assert largest_difference(mine[1], theirs[1]) <= 1e-5
    labels = batch()["labels"].masked_fill(batch()["labels"] % 3 == 0, -100)
    torch.testing.assert_close(step(model, labels=labels)[0], step(reference, labels=labels)[0])
    assert calls["fused"] > 3


def tiny(kind: str) -> torch.nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.normal_(std=0.3)
    return model


@pytest.mark.parametrize("kind", ["Gemma", "Gemma2", "Gemma3Text", "Qwen3", "Olmo2", "Cohere"])
def test_other_models(calls, kind):
    """Weights with an offset, a cap or a scale between head and loss, norms on heads, norms that are none."""
    model = wrapped(peftfast, tiny(kind).train()).train()
    before = step(model)
    liger = peftfast.use_liger(model)
    step(model)
    compare(model, before, calls, 1e-5, 1e-4)
    found = states(liger)
    if kind != "Cohere":  # LayerNorm without a bias
        assert found["RMSNorm"] == {"on"}
        offsets = {part.modes[torch.float32][0] for part in liger.parts if part.kind == "RMSNorm"}
        assert offsets == {1.0 if kind.startswith("Gemma") else 0.0}
    fused = found["fused linear cross-entropy"]
    if kind == "Gemma2":  # tanh between head and loss
        assert all("its loss is another one" in state for state in fused) and calls["ce"] == 1
        with pytest.raises(RuntimeError, match="its loss is another one"):
            liger.remove()
            peftfast.use_liger(model, fused_linear_cross_entropy=True)
            step(model)
    else:
        assert fused == {"on"} and calls["fused"] == 1
    if kind == "Cohere":  # rotates neighbours, not halves
        assert all(state.startswith("off: ") for state in found["rotary"])
    else:
        assert found["rotary"] == {"on"}


def test_a_norm_that_computes_something_else_is_left_alone(calls):
    model = wrapped(peftfast).train()

    class OddRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(32)), 1e-6

        def forward(self, x):
            return 1.01 * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    model.get_base_model().model.norm = OddRMSNorm()
    before = step(model)
    liger = peftfast.use_liger(model)
    step(model)
    compare(model, before, calls)
    assert "off: it computes something else" in liger.report()
    assert calls["rms"] == 4


def test_a_dtype_that_would_come_out_differently_is_left_alone(calls):
    """An fp32 weight makes transformers' norm answer in fp32; Liger's answers in the input's dtype."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = torch.nn.Sequential(LlamaRMSNorm(32))
    norm.config = None
    peftfast.use_liger(norm, rope=False, cross_entropy=False, fused_linear_cross_entropy=False)
    x = torch.randn(3, 32)
    calls["rms"] = 0
    norm(x)
    assert calls["rms"] == 1
    norm(x.bfloat16())
    calls["rms"] = 0
    assert norm(x.bfloat16()).dtype == torch.float32 and calls["rms"] == 0
    with torch.inference_mode():
        norm(x), norm(x.double())
    assert calls["rms"] == 1


def test_what_cannot_be_computed_here_is_left_alone(calls, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no GPU")

    functional = sys.modules["liger_kernel.transformers.functional"]
    for name in ("rms_norm", "rope", "cross_entropy", "fused_linear_cross_entropy"):
        monkeypatch.setattr(functional, f"liger_{name}", broken)
    model = wrapped(peftfast).train()
    before = step(model)
    liger = peftfast.use_liger(model)
    compare(model, before, calls, 0, 0)
    assert all(all("no GPU" in state for state in found) for found in states(liger).values())
    liger.remove()
    assert not any(alone(model).values())


@pytest.mark.usefixtures("large_products")
@pytest.mark.parametrize("first", ["liger", "blocks"])
def test_beside_fused_blocks(calls, first):
    model = wrapped(peftfast, target_modules="all-linear").train()
    before = step(model)
    if first == "liger":
        liger, blocks = peftfast.use_liger(model), peftfast.fuse_blocks(model)
    else:
        blocks, liger = peftfast.fuse_blocks(model), peftfast.use_liger(model)
    step(model)
    step(model)
    compare(model, before, calls)
    assert {group.state for group in blocks.groups} == {"on"}
    assert {group.kind for group in blocks.groups} == {"gated MLP", "shared input"}
    assert all(found == {"on"} for found in states(liger).values())
    assert calls == {"rms": 5, "rope": 2, "ce": 0, "fused": 1}
    liger.remove()
    compare(model, before, calls)
    blocks.remove()
    assert not any(alone(model).values())


def test_gradient_checkpointing(calls):
    model = wrapped(peftfast, lora_dropout=0.1).train()
    before = step(model)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    peftfast.use_liger(model)
    step(model)
    compare(model, before, calls)
    assert calls["rms"] == 9 and calls["rope"] == 4 and calls["fused"] == 1


def test_copies_are_models_of_their_own(calls):
    model = wrapped(peftfast).train()
    before = step(model)
    peftfast.use_liger(model)
    step(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    compare(other, before, calls)
    assert calls == {"rms": 5, "rope": 2, "ce": 0, "fused": 1}
    other.get_base_model()._liger.remove()
    assert not any(alone(other).values())
    compare(other, before, calls, 0, 0)
    assert not any(calls.values()) and any(alone(model).values())


def test_others_see_the_models_own_signature(calls):
    model = llama()
    expected = inspect.signature(model.forward)
    peftfast.use_liger(model)
    assert inspect.signature(model.forward) == expected


def test_options_are_checked(calls):
    model = wrapped(peftfast)
    with pytest.raises(TypeError, match="no option swiglu.*fuse_blocks"):
        peftfast.use_liger(model, swiglu=True)
    with pytest.raises(TypeError, match="rms_norm"):
        peftfast.use_liger(model, rms_nrom=True)
    with pytest.raises(ValueError, match="rope is True or False, got 'auto'"):
        peftfast.use_liger(model, rope="auto")
    with pytest.raises(ValueError, match="or auto, got 'yes'"):
        peftfast.use_liger(model, fused_linear_cross_entropy="yes")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got 'x'"):
        peftfast.use_liger("x")
    assert not any(alone(model).values())
    peftfast.use_liger(model)
    with pytest.raises(ValueError, match="already"):
        peftfast.use_liger(model)
    other = wrapped(peftfast)
    liger = peftfast.use_liger(other, rms_norm=False, rope=False, cross_entropy=False, fused_linear_cross_entropy=False)
    assert liger.parts == [] and liger.report() == "nothing of Liger's"


def test_a_model_without_a_vocabulary(calls):
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(llama().config)
    with pytest.raises(ValueError, match="no head over a vocabulary"):
        peftfast.use_liger(model, fused_linear_cross_entropy=True)
    report = peftfast.use_liger(model).report()
    assert "no head over a vocabulary" in report and "not ForCausalLMLoss" in report


def test_without_the_package(monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    model = wrapped(peftfast)
    with pytest.raises(ImportError, match="pip install liger-kernel"):
        peftfast.use_liger(model)
    assert not any(alone(model).values())


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_the_real_kernels_in_the_interpreter():
    said = run([Path(__file__).with_name("liger_script.py")], TRITON_INTERPRET="1")
    results = json.loads(said.splitlines()[-1])
    for kind, found in results.items():
        assert found["loss"] <= 1e-5 and found["gradients"] <= 1e-4, (kind, found)
        last = ["fused linear cross-entropy: on"] * (kind == "all")
        assert found["states"] == ["RMSNorm: on", "cross-entropy: on", *last, "rotary: on"], found


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", ["auto", False])
def test_the_real_kernels_on_a_gpu(dtype, fused):
    pytest.importorskip("liger_kernel")
    one = {k: v.cuda() for k, v in batch().items()}
    model = peftfast.get_peft_model(llama(dtype=dtype).cuda(), lora(peftfast)).train()
    fill(model)
    before = step(model, **one)
    liger = peftfast.use_liger(model, fused_linear_cross_entropy=fused)
    step(model, **one)
    after = step(model, **one)
    half = dtype == torch.bfloat16
    assert abs(after[0] - before[0]) <= (0.02 if half else 1e-5) * before[0]
    assert largest_difference(after[1], before[1]) <= (0.1 if half else 1e-4)
    assert all(found == {"on"} for found in states(liger).values())
