"""Makes the embedded base model: a small Llama, trained from nothing on the source text of Python's standard library.

    python tools/make_base.py --output peftfast/assets/base

Text comes from the interpreter that runs this script (nothing is downloaded). One file in twenty, chosen by a
hash of its name, is held out: neither the tokenizer nor the weights see it. `pydoc_data` is left out altogether,
because `peftfast train` uses it as the adapter's task, and so are tests (bulk without prose) and encoding tables.
The matrices are optimised with Muon, everything else with AdamW; both decay linearly to zero.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "encodings", "__pycache__",
           "_bundled", "turtledemo"}  # fmt: skip
MAX_BYTES = 5_000_000  # what the repository may carry


def corpus() -> tuple[list[str], list[str]]:
    """(training files, held-out files) of the standard library, as text, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, held = [], []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED & set(name.parts) or name.name.startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if len(text) < 200:
            continue
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        (held if digest[0] % 20 == 0 else train).append(text)
    return train, held


def make_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text encodes without an unknown token, and decodes to itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """One stream of ids, [tokens], with the end-of-text token after each file."""
    stream = []
    for encoded in tokenizer(texts)["input_ids"]:
        stream.extend(encoded)
        stream.append(tokenizer.eos_token_id)
    return torch.from_numpy(np.array(stream, dtype=np.int64))


def unigram_entropy(train: torch.Tensor, held: torch.Tensor, vocab: int) -> float:
    """Nats per held-out token of the best model without context: the loss that any learning must beat."""
    counts = torch.bincount(train, minlength=vocab).double() + 1
    return float(-(counts / counts.sum()).log()[held].mean())


@torch.no_grad()
def loss_on(model: LlamaForCausalLM, stream: torch.Tensor, seq_len: int, rows: int) -> float:
    """Mean next-token loss over `rows` sequences spread evenly over the stream."""
    model.eval()
    starts = torch.linspace(0, len(stream) - seq_len - 1, rows).long().tolist()
    batch = torch.stack([stream[s : s + seq_len + 1] for s in starts])
    total = 0.0
    for part in batch.split(16):
        logits = model(part[:, :-1]).logits.float()
        total += float(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    model.train()
    return total / (rows * seq_len)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Newton-Schulz), scaled to the RMS of an AdamW step.

    torch.optim.Muon does the same in bfloat16, which takes 20 times longer on a processor without bf16 arithmetic.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(tuple(p.shape), []).append(p)
            for shape, params in by_shape.items():
                moments = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                for p, m in zip(params, moments, strict=True):
                    m.lerp_(p.grad, 1 - group["momentum"])
                nesterov = [p.grad.lerp(m, group["momentum"]) for p, m in zip(params, moments, strict=True)]
                updates = orthogonal(torch.stack(nesterov)).mul_(0.2 * max(shape) ** 0.5)
                for p, u in zip(params, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(u, alpha=group["lr"])


def orthogonal(g: torch.Tensor) -> torch.Tensor:
    """[B, N, K] -> the nearest semi-orthogonal matrices, by five quintic Newton-Schulz steps (Jordan et al., 2024)."""
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return x.mT if tall else x


def optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers; AdamW for the (tied) embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n or "lm_head" in n]
    return [Muon(matrices, lr=lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    train_texts, held_texts = corpus()
    tokenizer = make_tokenizer(train_texts, args.vocab)
    stream, held = tokens(tokenizer, train_texts), tokens(tokenizer, held_texts)
    floor = unigram_entropy(stream, held, len(tokenizer))
    held_bytes = sum(len(t.encode()) + 1 for t in held_texts)
    print(
        f"{len(train_texts)} files, {len(stream):,} tokens to train on; {len(held_texts)} files, {len(held):,} held out"
    )
    print(f"unigram entropy {floor:.3f} nats/token; {held_bytes / len(held):.2f} bytes/token", flush=True)

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden,
            intermediate_size=args.intermediate,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    count = sum(p.numel() for p in model.parameters())
    opts = optimizers(model, args.lr)
    pick = torch.Generator().manual_seed(args.seed)
    model.train()
    for step in range(args.steps):
        # Constant, then linear to zero over the last 60 %: short runs gain most from a long decay.
        left = (args.steps - step) / args.steps
        scale = min(1.0, (step + 1) / 30, left / 0.6)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = args.lr * scale
        starts = torch.randint(len(stream) - args.seq_len - 1, (args.batch,), generator=pick).tolist()
        batch = torch.stack([stream[s : s + args.seq_len + 1] for s in starts])
        logits = model(batch[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        if step % 25 == 0 or step == args.steps - 1:
            took = time.perf_counter() - started
            rate = (step + 1) * batch[:, 1:].numel() / took
            print(f"step {step}/{args.steps} loss {loss.item():.3f} {took:.0f} s {rate:.0f} tok/s", flush=True)
    final = loss_on(model, held, args.seq_len, 256)
    minutes = (time.perf_counter() - started) / 60
    model.half().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    stored = loss_on(model.float(), held, args.seq_len, 256)  # as stored: rounded to fp16
    bits = final / math.log(2) * len(held) / held_bytes
    python = f"{platform.python_implementation()} {platform.python_version()}"
    facts = {
        "text": f"standard library of {python}: {len(train_texts)} files, {len(stream):,} tokens",
        "held out": f"{len(held_texts)} other files, {len(held):,} tokens: one file in twenty, by a hash of its name",
        "not used at all": "`pydoc_data` (the adapter's task), tests, encoding tables",
        "training": f"{args.steps} steps of {args.batch} x {args.seq_len} tokens",
        "took": f"{minutes:.0f} minutes on {args.threads} CPU threads, torch {torch.__version__}",
        "optimiser": f"Muon (matrices), AdamW (embedding, norms); learning rate {args.lr}, seed {args.seed}",
        "unigram entropy, held out": f"{floor:.3f} nats/token",
        "loss, held out": f"{final:.3f} nats/token ({bits:.2f} bits/byte); {stored:.3f} after rounding to fp16",
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    (args.output / "README.md").write_text(
        f"""# The embedded base model

A Llama of {count / 1e6:.2f} M parameters ({args.layers} layers, hidden {args.hidden}, {args.heads} heads, vocabulary
{len(tokenizer)}, tied embeddings), weights in fp16. It exists so that `peftfast train` has something real to adapt on
any machine, without a network. It writes text that looks like Python; it knows nothing.

Made by `tools/make_base.py` (every number below is from that run; the seed is fixed, the last digits depend on the
processor and the number of threads).

| | |
|---|---|
{table}
Licence note: the training text is Python's standard library, Copyright the Python Software Foundation, under the
PSF License Version 2. None of that text is stored here; the tokenizer's vocabulary and the weights are derived from it.
""",
        encoding="utf-8",
    )
    size = sum(f.stat().st_size for f in args.output.iterdir() if f.is_file())
    print(f"held-out loss {final:.4f} (fp16 {stored:.4f}), unigram {floor:.3f}, {count:,} parameters, {size:,} bytes")
    if size > MAX_BYTES:
        raise SystemExit(f"{args.output}: {size:,} bytes, more than the {MAX_BYTES:,} the repository may carry")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    sizes = {"vocab": 1536, "hidden": 160, "intermediate": 448, "layers": 5, "heads": 5}
    amounts = {"steps": 1100, "batch": 16, "seq_len": 256, "threads": 2, "seed": 0}
    for name, value in {**sizes, **amounts}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=5e-3)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
