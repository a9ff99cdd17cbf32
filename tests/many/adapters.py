"""Adapters by number, for tests that need many."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import oracle
import torch

import peftfast
from peftfast import LoraConfig
from peftfast.files.io import save_adapter

BASE = "__base__"
TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapter(i: int, ranks=(1, 2, 4, 8)) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Config and tensors of the i-th adapter, of llama(hidden=32)."""
    generator = torch.Generator().manual_seed(i)
    r = ranks[i % len(ranks)]
    targets = TARGETS[: 1 + i % 3]
    sizes = {"q_proj": (32, 32, "self_attn"), "v_proj": (16, 32, "self_attn"), "down_proj": (32, 64, "mlp")}
    tensors = {}
    for layer in range(2):
        for name in targets:
            n, k, parent = sizes[name]
            key = f"base_model.model.model.layers.{layer}.{parent}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(r, k, generator=generator) * 0.3
            tensors[f"{key}.lora_B.weight"] = torch.randn(n, r, generator=generator) * 0.3
    return LoraConfig(r=r, lora_alpha=1 + i % 5, target_modules=targets), tensors


def expected(names: list[str], ids: torch.Tensor) -> torch.Tensor:
    """The same adapters loaded the ordinary way, one sample after the other."""
    rows = []
    for i, name in enumerate(names):
        model = oracle.llama()
        if name != BASE:
            cfg, tensors = adapter(int(name[1:]))
            model = peftfast.get_peft_model(model, cfg)
            peftfast.set_peft_model_state_dict(model, tensors)
        with torch.no_grad():
            rows.append(model.eval()(input_ids=ids[i : i + 1]).logits)
    return torch.cat(rows)


def ids_of(batch: int) -> torch.Tensor:
    return torch.randint(1, 64, (batch, 6), generator=torch.Generator().manual_seed(batch))


def check_reads_are_whole(folder: Path, read: Callable[[], tuple], seconds: float = 2.0) -> set[float]:
    """Reads an adapter while another thread writes one of two, whose down factors hold nothing but their scaling.

    Args:
        read: the down factor of a layer, anything, and its scaling.

    Returns:
        The scalings that were seen.
    """
    sources = []
    for scaling in (1.0, 2.0):
        cfg, tensors = adapter(2, ranks=(4,))
        cfg.lora_alpha = 4 * scaling
        sources.append((cfg, {k: torch.full_like(v, scaling) for k, v in tensors.items()}))
    stop, seen, end = threading.Event(), set(), time.time() + seconds

    def write() -> None:
        while not stop.is_set():
            for source in sources:
                save_adapter(folder, *source, auto_mapping=None)

    save_adapter(folder, *sources[0], auto_mapping=None)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        while time.time() < end or len(seen) < 2 and time.time() < end + 10 * seconds:
            down, _, scaling = read()
            assert down.unique().tolist() == [float(scaling)]
            seen.add(float(scaling))
    finally:
        stop.set()
        writer.join()
    return seen
