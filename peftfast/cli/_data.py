"""Training data: files, Hub datasets and the embedded topics, read as documents and turned into rows of tokens."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peftfast.cli import UserError
from peftfast.cli._settings import EMBEDDED, looks_like_a_path, place

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that cross-entropy skips
JSON_LINES = {".jsonl", ".ndjson", ".json"}
BLANK = re.compile(r"[ \t\r\n]*")  # between values of JSON, whose strings may hold U+2028 and its like
TABLES = {".csv", ".tsv"}
FORMS = "text, prompt and completion, or messages"
PROMPT_TOKENS = 32


@dataclass
class Document:
    """One example as read: `text` alone, `prompt` and `completion`, or `messages`."""

    where: str
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: list[dict[str, str]] | None = None


@dataclass
class Corpus:
    """Documents to train on and documents held out."""

    name: str
    train: list[Document]
    held_out: list[Document]
    unit: str = "documents"
    prompt: str | None = None  # what samples start from, if the data suggests something


@dataclass
class Row:
    """One training sequence; labels are the ids, or IGNORED where no loss is taken."""

    ids: list[int]
    labels: list[int]


@dataclass
class Rows:
    train: list[Row]
    held_out: list[Row]
    prompt: list[int]
    notes: list[str] = field(default_factory=list)

    def keep_of_prompt(self, tokens: int) -> None:
        """Samples start from so many tokens at most."""
        if len(self.prompt) > tokens:
            self.notes.append(
                f"samples start from the last {tokens} of the prompt's {len(self.prompt)} tokens: this model has no "
                "positions for more"
            )
            self.prompt = self.prompt[-tokens:]

    def digest(self) -> str:
        """Identifies the data, so that a run is not resumed on something else."""
        return hashlib.sha256(repr([(r.ids, r.labels) for r in self.train]).encode()).hexdigest()


# ---- reading ---------------------------------------------------------------------------------------------------------
def read(data: str, seed: int) -> Corpus:
    if data == EMBEDDED:
        return topics()
    path = place(data, "--data")
    if path.is_dir():
        raise UserError(f"--data {data!r} is a folder; name one text or JSONL file")
    if path.is_file():
        if path.suffix.lower() in TABLES:
            raise UserError(f"--data {data!r} is a table, which is not read: give its rows as JSONL with {FORMS}")
        try:
            text = path.read_text(encoding="utf-8-sig")  # editors on Windows put a mark in front
        except UnicodeDecodeError as error:
            raise UserError(f"--data {data!r} is not UTF-8 text: {error}; text and JSONL are read") from None
        except OSError as error:
            raise UserError(f"--data {data!r} cannot be read: {error}") from None
        if "\0" in text:
            raise UserError(f"--data {data!r} is not UTF-8 text: it has zero bytes, as UTF-16 has")
        if not text.strip():
            raise UserError(f"--data {data!r} is empty")
        if path.suffix.lower() in JSON_LINES:
            return split(data, json_documents(text, data), seed)
        return split_text(data, text)
    if looks_like_a_path(data) or path.suffix:
        raise UserError(f"--data {data!r}: no such file")
    return hub(data, seed)


def json_documents(text: str, name: str) -> list[Document]:
    """Objects one after another, as a rule each on a line of its own, or lists of them."""
    documents, end, line, decoder = [], 0, 1, json.JSONDecoder()
    while (start := BLANK.match(text, end).end()) < len(text):
        line += text.count("\n", end, start)
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--data {name!r}, line {line}: not JSON: {error}") from None
        where = f"{name}, line {line}"
        if isinstance(value, list):
            documents += [document(item, f"{where}, item {i}") for i, item in enumerate(value, 1)]
        else:
            documents.append(document(value, where))
        line += text.count("\n", start, end)
    return documents


def document(value: Any, where: str) -> Document:
    if not isinstance(value, dict):
        raise UserError(f"--data {where}: a {type(value).__name__}, not an object with {FORMS}")
    if "messages" in value:
        messages = value["messages"]
        if (
            not isinstance(messages, list)
            or not all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages)
            or not any(m["role"] == "assistant" for m in messages)
        ):
            raise UserError(
                f"--data {where}: messages must be a list of objects with role and content, one of them the assistant's"
            )
        return Document(where, messages=messages)
    if "prompt" in value and "completion" in value:
        return Document(where, prompt=string(value, "prompt", where), completion=string(value, "completion", where))
    if "text" in value:
        return Document(where, text=string(value, "text", where))
    raise UserError(f"--data {where}: has the fields {', '.join(map(repr, value)) or 'none'}; needs {FORMS}")


def string(value: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(value[key], str):
        raise UserError(f"--data {where}: {key} must be a string, got {value[key]!r}")
    return value[key]


def split(name: str, documents: list[Document], seed: int) -> Corpus:
    """One document in ten, at least one and at most 200, is held out."""
    if len(documents) == 1 and documents[0].text is not None:
        return split_text(name, documents[0].text)
    if len(documents) < 2:
        raise UserError(f"--data {name!r}: {len(documents)} documents; at least 2 are needed, one of them to hold out")
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    held = set(order[: min(200, max(1, len(documents) // 10))])
    return Corpus(
        name,
        [d for i, d in enumerate(documents) if i not in held],
        [d for i, d in enumerate(documents) if i in held],
    )


def split_text(name: str, text: str) -> Corpus:
    """A plain text: its last tenth is held out, cut at a line end where there is one."""
    cut = len(text) * 9 // 10
    cut = text.find("\n", cut) + 1 or cut
    if not text[cut:].strip():
        cut = len(text) * 9 // 10
    return Corpus(name, [Document(name, text=text[:cut])], [Document(name, text=text[cut:])], unit="text")


def hub(name: str, seed: int) -> Corpus:
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"--data {name!r}: no such file, and Hub datasets need the package datasets, which is not installed "
            "(pip install datasets)"
        )
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # whatever the network or the dataset's own files may bring
        raise UserError(f"--data {name!r}: no such file, and no such dataset could be loaded: {error}") from None
    train = loaded.get("train") or next(iter(loaded.values()))
    documents = [document(row, f"{name}, row {i}") for i, row in enumerate(train)]
    for part in ("test", "validation"):
        if part in loaded:
            held = [document(row, f"{name}, {part} row {i}") for i, row in enumerate(loaded[part].take(200))]
            return Corpus(name, documents, held)
    return split(name, documents, seed)


def topics() -> Corpus:
    """The language reference as every Python carries it. One topic in eight is held out, by a hash of its name.

    Topics repeat each other's paragraphs ("compound" holds all of "for"), so that a paragraph of a held-out topic is
    removed from every training topic, and a paragraph is trained on once.
    """
    from pydoc_data.topics import topics as texts

    def key(paragraph: str) -> str:
        return " ".join(paragraph.split())

    held_names = [n for n in sorted(texts) if hashlib.sha256(n.encode()).digest()[0] % 8 == 0]
    seen = {key(p) for n in held_names for p in paragraphs(texts[n])}
    train = []
    for name in sorted(set(texts) - set(held_names)):
        kept = []
        for paragraph in paragraphs(texts[name]):
            if key(paragraph) not in seen:
                seen.add(key(paragraph))
                kept.append(paragraph)
        if kept:
            train.append(Document(name, text="\n\n".join(kept)))
    held = [Document(n, text=texts[n]) for n in held_names]
    title = 'The "for" statement'
    return Corpus("pydoc_data.topics", train, held, "topics", f"{title}\n{'*' * len(title)}\n\n{title} is used to")


def paragraphs(text: str) -> list[str]:
    return [p for p in re.split(r"\n\s*\n", text) if p.strip()]


# ---- tokens ----------------------------------------------------------------------------------------------------------
def tokenize(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, seq_len: int, prompt: str | None) -> Rows:
    """Texts are joined and cut into full rows; everything else is a row of its own, cut at `seq_len`."""
    notes: list[str] = []
    train = to_rows(corpus.train, tokenizer, seq_len, "training", notes)
    held = to_rows(corpus.held_out, tokenizer, seq_len, "held-out", notes)
    for rows, part in ((train, "to train on"), (held, "held out")):
        if not rows:
            raise UserError(
                f"--data {corpus.name!r}: too little {part}: no row of {seq_len} tokens has anything to learn"
            )
    text = prompt if prompt is not None else corpus.prompt
    if text is not None:
        start = encode(text, tokenizer, "--prompt")
        start = start[:-1] if start and start[-1] == tokenizer.eos_token_id and len(start) > 1 else start
    else:
        first = held[0]
        # A prompt and its completion: exactly the prompt. A text: its first tokens.
        masked = next(i for i, label in enumerate(first.labels) if label != IGNORED)
        start = first.ids[: masked if masked > 1 else min(PROMPT_TOKENS, len(first.ids) // 2 or 1)]
    if not start:
        raise UserError(f"--prompt {text!r} is empty once tokenized")
    return Rows(train, held, start, notes)


def to_rows(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, seq_len: int, part: str, notes: list[str]
) -> list[Row]:
    rows: list[Row] = []
    stream: list[int] = []
    cut = empty = 0
    for doc in documents:
        if doc.text is not None:
            stream += ended(encode(doc.text, tokenizer, f"--data {doc.where}"), tokenizer)
            continue
        row = masked_row(pieces(doc, tokenizer))
        cut += len(row.ids) > seq_len
        row = Row(row.ids[:seq_len], row.labels[:seq_len])
        # The first label is never predicted: a row needs one further on.
        if all(label == IGNORED for label in row.labels[1:]):
            empty += 1
        else:
            rows.append(row)
    if cut:
        notes.append(f"{cut} of {len(documents)} {part} examples are longer than {seq_len} tokens and were cut")
    if empty:
        notes.append(
            f"{empty} of {len(documents)} {part} examples have no answer within {seq_len} tokens and were left out"
        )
    blocks = [stream[i : i + seq_len] for i in range(0, len(stream), seq_len)]
    return rows + [Row(b, list(b)) for b in blocks if len(b) > 1]


def encode(text: str, tokenizer: PreTrainedTokenizerBase, where: str, **options: bool) -> list[int]:
    """The ids of a text without halves of characters, which JSON and command lines can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not all text: {error}") from None
    return tokenizer(text, **options)["input_ids"]


def ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def pieces(doc: Document, tokenizer: PreTrainedTokenizerBase) -> Iterable[tuple[list[int], bool]]:
    """(ids, learned) in order. Prompt and answer are tokenized apart, because that is how they meet in generation."""
    where = f"--data {doc.where}"
    if doc.messages is None:
        prompt = encode(doc.prompt, tokenizer, where)
        if prompt and prompt[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
            prompt = prompt[:-1]
        yield prompt, False
        yield ended(encode(doc.completion, tokenizer, where, add_special_tokens=False), tokenizer), True
        return
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            f"{where}: messages need a chat template and this model's tokenizer has none; give text, or "
            "prompt and completion, or a --model with a chat template"
        )
    done = ""
    for turn, message in enumerate(doc.messages):
        last = turn == len(doc.messages) - 1
        if message["role"] != "assistant" and not last:
            continue
        answer = message["role"] == "assistant"
        if answer:
            before = template(doc, tokenizer, turn, add_generation_prompt=True)
            yield advance(doc, tokenizer, done, before), False
            done = before
        after = template(doc, tokenizer, turn + 1, add_generation_prompt=False)
        yield advance(doc, tokenizer, done, after), answer
        done = after


def template(doc: Document, tokenizer: PreTrainedTokenizerBase, turns: int, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            doc.messages[:turns], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # templates raise errors of their own, such as roles that must alternate
        raise UserError(f"--data {doc.where}: the model's chat template refuses these messages: {error}") from None


def advance(doc: Document, tokenizer: PreTrainedTokenizerBase, done: str, longer: str) -> list[int]:
    """The ids of what `longer` adds to `done`."""
    if not longer.startswith(done):
        raise UserError(
            f"--data {doc.where}: the model's chat template rewrites earlier turns, so that answers cannot be told "
            "apart; give one turn per line, as prompt and completion"
        )
    return encode(longer[len(done) :], tokenizer, f"--data {doc.where}", add_special_tokens=False)


def masked_row(parts: Iterable[tuple[list[int], bool]]) -> Row:
    row = Row([], [])
    for ids, learned in parts:
        row.ids += ids
        row.labels += ids if learned else [IGNORED] * len(ids)
    return row


# ---- batches ---------------------------------------------------------------------------------------------------------
def collate(rows: Sequence[Row], pad: int, device: str) -> dict[str, Tensor]:
    """input_ids, attention_mask, labels: [rows, longest], padded on the right."""
    import torch

    width = max(len(r.ids) for r in rows)
    batch = {
        "input_ids": [r.ids + [pad] * (width - len(r.ids)) for r in rows],
        "attention_mask": [[1] * len(r.ids) + [0] * (width - len(r.ids)) for r in rows],
        "labels": [r.labels + [IGNORED] * (width - len(r.labels)) for r in rows],
    }
    return {name: torch.tensor(value, device=device) for name, value in batch.items()}


def batch_of_step(rows: Sequence[Row], step: int, size: int, seed: int) -> list[Row]:
    """The rows of one step: shuffled passes over the data, end to end. A function of its arguments, so that a resumed
    run sees what the uninterrupted one would have seen."""
    batch = []
    for position in range(step * size, (step + 1) * size):
        epoch, index = divmod(position, len(rows))
        batch.append(rows[order(len(rows), epoch, seed)[index]])
    return batch


_orders: dict[tuple[int, int, int], list[int]] = {}


def order(count: int, epoch: int, seed: int) -> list[int]:
    key = (count, epoch, seed)
    if key not in _orders:
        while len(_orders) > 1:  # one epoch, and the next where a step straddles them
            _orders.pop(next(iter(_orders)))
        _orders[key] = random.Random(f"{seed}/{epoch}").sample(range(count), count)
    return _orders[key]
