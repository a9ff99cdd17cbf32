"""fp16 with loss scaling and bf16: factors and gradients stay fp32, overflow is found, nothing refuses to unscale.

GradScaler works on the CPU too; that is the code path of CUDA without its kernels.
"""

from __future__ import annotations

import pytest
import torch
from training.tiny import batch, factors, largest_difference, llama, wrapped

import peftfast

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
