"""fp16 with loss scaling and bf16: factors and gradients stay fp32, overflow is found, nothing refuses to unscale.

GradScaler works on the CPU too; that is the code path of CUDA without its kernels.
"""

from __future__ import annotations

import pytest
import torch
from training.tiny import batch, factors, largest_difference, llama, wrapped

import peftfast
from peftfast.ops import lora as lora_ops
from peftfast.ops.casts import CastStore
from peftfast_kernels.op import use_backend

SETTINGS = [(torch.float32, torch.float16), (torch.float16, None), (torch.float16, torch.float16),
            (torch.bfloat16, None), (torch.float32, torch.bfloat16)]  # fmt: skip


def train(base: torch.dtype, cast: torch.dtype | None, scale: float = 1024.0) -> tuple[dict, torch.amp.GradScaler]:
    model = wrapped(peftfast, llama(dtype=base)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
        loss = model(**batch()).loss
    scaler.scale(loss).backward()
    assert {p.dtype for p in trained} == {p.grad.dtype for p in trained} == {torch.float32}
    scaler.unscale_(optimizer)  # raises "Attempting to unscale FP16 gradients" for fp16 factors
    torch.nn.utils.clip_grad_norm_(trained, 1e9)
    scaler.step(optimizer)
    scaler.update()
    return factors(model), scaler


@pytest.mark.parametrize("base, cast", SETTINGS, ids=str)
def test_a_scaled_step(base, cast):
    before = factors(wrapped(peftfast, llama()))
    expected, _ = train(torch.float32, None)
    found, scaler = train(base, cast)
    assert scaler.get_scale() == 1024.0
    moved, wanted = ({k: after[k] - before[k] for k in before} for after in (found, expected))
    error = torch.stack([(moved[k] - wanted[k]).norm() / wanted[k].norm() for k in wanted])
    # a few units of the narrowest format on the way, through two layers: 2^-11 for fp16, 2^-8 for bf16
    narrow = torch.bfloat16 if torch.bfloat16 in (base, cast) else torch.float16
    assert error.max() < 16 * torch.finfo(narrow).eps


@pytest.mark.parametrize("base, cast", SETTINGS[:3], ids=str)
def test_an_overflow_is_found_and_the_step_skipped(base, cast):
    before = factors(wrapped(peftfast, llama()))
    found, scaler = train(base, cast, scale=2.0**40)
    assert largest_difference(found, before) == 0.0
    assert scaler.get_scale() < 2.0**40


@pytest.mark.parametrize("tokens", [4, 1024])  # composed of torch's operations, and as one Function
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast_that_begins_before_the_backward_pass(tokens, dropout):
    """Such a backward pass is as exact as torch's own is, whose products autocast does reach, or more so."""
    g = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(96, 80)
    model = peftfast.get_peft_model(
        torch.nn.Sequential(layer, torch.nn.Tanh(), torch.nn.Linear(80, 8)),
        peftfast.LoraConfig(r=8, target_modules=["0", "2"], lora_dropout=dropout, init_lora_weights=False),
    )
    x = torch.randn(tokens, 96, generator=g)
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients(inside: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        loss = model(x).square().mean()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return torch.autograd.grad(loss, trained)

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert found.dtype is torch.float32
        assert (found - expected).norm() <= 2 * torch.finfo(torch.bfloat16).eps * expected.norm()


def test_a_forward_keeps_its_copies_beside_another_threads(monkeypatch):
    """In another dtype, at the moment at which the first one's are made."""
    store, parameter = CastStore(), torch.nn.Parameter(torch.randn(3, 4))
    make = torch._foreach_copy_

    def meanwhile(*args):
        monkeypatch.undo()
        store.refreshed(["default"], lambda: ([parameter], []), torch.float16)
        make(*args)

    monkeypatch.setattr(torch, "_foreach_copy_", meanwhile)
    ((_, copy),) = store.refreshed(["default"], lambda: ([parameter], []), torch.bfloat16).values()
    assert torch.equal(copy, parameter.detach().bfloat16())


def test_copies_follow_a_parameter_that_is_given_another_shape():
    """As AdaLoRA's are where its ranks are cut."""
    store, parameter = CastStore(), torch.nn.Parameter(torch.randn(3, 4))
    for rank in (3, 2):
        parameter.data = torch.randn(rank, 4)
        ((_, copy),) = store.refreshed(["default"], lambda: ([parameter], []), torch.bfloat16).values()
        assert torch.equal(copy, parameter.detach().bfloat16())


@pytest.mark.parametrize("kind", ["lora", "host-bound", "dora", "velora", "fused"])
def test_weights_that_are_others_in_a_forward_before_the_backward_pass(kind, monkeypatch):
    """An average of the weights for a teacher, say, put into the parameters' memory and out again."""
    g = torch.Generator().manual_seed(0)
    fields = {"dora": {"use_dora": True}, "velora": {"velora_config": peftfast.VeloraConfig()}}.get(kind, {})
    model = wrapped(peftfast, target_modules="all-linear", **fields)
    if kind == "fused":
        peftfast.fuse_blocks(model)
    if kind == "host-bound":
        monkeypatch.setattr(lora_ops, "is_host_bound", lambda x, plan: True)
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(0, 64, (2, 8), generator=g)

    def gradients(teacher: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
            if teacher:
                kept = [p.detach().clone() for p in trained]
                for p in trained:
                    p.data.mul_(-3.0)
                with torch.no_grad():
                    model(ids)
                for p, value in zip(trained, kept, strict=True):
                    p.data.copy_(value)
        return torch.autograd.grad(loss, trained)

    with use_backend("torch"):  # so few tokens are otherwise left to torch's own operations, which keep what they read
        gradients(False)  # blocks act from the second call on
        for found, expected in zip(gradients(True), gradients(False), strict=True):
            assert torch.equal(found, expected)
