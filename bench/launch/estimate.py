"""Predicted traffic and memory of the launch files in this folder. Arithmetic from shapes; nothing here was measured.

    python bench/launch/estimate.py [--hidden 4096 --layers 32 --intermediate 14336 --vocabulary 128256 --kv 1024]

Per GPU, for LoRA on every linear layer. Sent bytes count ring collectives: an all-gather or reduce-scatter of S bytes
over N processes sends S (N-1)/N from each, an all-reduce twice that. Trained factors are fp32 with two AdamW moments.
Activations assume checkpointed blocks: one hidden state a block, plus one block's own while it is recomputed; the
frozen base has no gradients and no optimizer state.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

#: Bytes a base weight takes at rest; NF4 with blocks of 64 and double quantisation: 4.127 bits.
STORED = {"bf16": 2.0, "nf4": 4.127 / 8}


@dataclass(frozen=True)
class Model:
    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    kv: int

    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the adapted layers of one block."""
        h, i = self.hidden, self.intermediate
        return [(h, h), (h, self.kv), (h, self.kv), (h, h), (h, i), (h, i), (i, h)]

    def block_weights(self) -> int:
        return sum(a * b for a, b in self.linears())

    def embedding_weights(self) -> int:
        """Input embedding and head, which stay in bf16."""
        return 2 * self.hidden * self.vocabulary

    def trained(self, r: int) -> int:
        return self.layers * sum(r * (a + b) for a, b in self.linears())


@dataclass(frozen=True)
class Estimate:
    adapter_traffic: float
    base_traffic: float
    base: float
    training: float
    activations: float

    @property
    def memory(self) -> float:
        return self.base + self.training + self.activations


def estimate(model: Model, strategy: str, gpus: int, stored: str, r: int, tokens: int) -> Estimate:
    """Bytes per GPU and step.

    Args:
        strategy: "ddp" (all on every GPU), "fsdp2" or "zero3" (everything sharded over all GPUs).
        stored: "bf16" or "nf4".
        tokens: of the micro-batch on one GPU; one micro-batch a step.

    Raises:
        ValueError: an unknown strategy or storage, or NF4 under ZeRO-3, whose quantisation is its own.
    """
    if strategy not in ("ddp", "fsdp2", "zero3") or stored not in STORED:
        raise ValueError(f"{strategy!r} over {stored!r}: known are ddp, fsdp2, zero3 over {', '.join(STORED)}")
    if (strategy, stored) == ("zero3", "nf4"):
        raise ValueError("ZeRO-3 does not shard 4-bit bases; use fsdp2")
    block = model.block_weights() * STORED[stored]
    whole = model.layers * block + 2 * model.embedding_weights()
    trained = 4 * model.trained(r)
    ring = (gpus - 1) / gpus
    hidden_state = 2 * model.hidden * tokens
    # of the block being recomputed: its linear inputs and outputs; and the logits in bf16 and fp32 with their gradient
    activations = model.layers * hidden_state
    activations += 2 * tokens * sum(a + b for a, b in model.linears()) + 10 * tokens * model.vocabulary
    if strategy == "ddp":
        return Estimate(2 * ring * trained, 0.0, whole, 4 * trained, activations)
    # factors: gathered for forward and backward, their gradients reduced once; blocks: gathered twice, never reduced
    gathered = 2 * (block + 4 * model.trained(r) / model.layers)  # the block in use and the next, prefetched
    in_use = 0.0 if gpus == 1 else gathered + 2 * model.embedding_weights()
    return Estimate(
        3 * ring * trained, 2 * ring * whole, whole / gpus + in_use, 4 * trained / gpus, activations,
    )  # fmt: skip


#: launch file -> strategy, storage, GPUs; a node has eight
LAUNCHES = [
    ("torchrun.sh 1 1", "ddp", "nf4", 1),
    ("torchrun.sh 1 8", "ddp", "nf4", 8),
    ("torchrun.sh 8 8", "ddp", "nf4", 64),
    ("accelerate-ddp-1.yaml", "ddp", "bf16", 1),
    ("accelerate-ddp-8.yaml", "ddp", "bf16", 8),
    ("accelerate-ddp-64.yaml", "ddp", "bf16", 64),
    ("accelerate-fsdp2-8.yaml", "fsdp2", "bf16", 8),
    ("accelerate-fsdp2-64.yaml", "fsdp2", "bf16", 64),
    ("accelerate-fsdp2-8.yaml, 4-bit", "fsdp2", "nf4", 8),
    ("accelerate-fsdp2-64.yaml, 4-bit", "fsdp2", "nf4", 64),
    ("accelerate-zero3-8.yaml", "zero3", "bf16", 8),
    ("accelerate-zero3-64.yaml", "zero3", "bf16", 64),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 4096, "layers": 32, "intermediate": 14336, "vocabulary": 128256, "kv": 1024}
    for name, value in {**sizes, "r": 16, "tokens": 4096}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    model = Model(**{name: getattr(args, name) for name in sizes})
    print(
        f"PREDICTED, not measured: r={args.r}, {args.tokens} tokens a GPU and step, trained {model.trained(args.r):,}"
    )
    print(f"{'launch':<34}{'GPUs':>5}" + "".join(f"{c:>13}" for c in ("adapter GB", "base GB", "memory GB", "of base")))
    print(f"{'':<39}{'sent a step':>13}{'sent a step':>13}{'a GPU':>13}{'':>13}")
    for name, strategy, stored, gpus in LAUNCHES:
        e = estimate(model, strategy, gpus, stored, args.r, args.tokens)
        figures = (e.adapter_traffic, e.base_traffic, e.memory, e.base)
        print(f"{name:<34}{gpus:>5}" + "".join(f"{f / 1e9:>13.3f}" for f in figures))


if __name__ == "__main__":
    main()
