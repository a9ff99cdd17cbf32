"""Attacks on loading and saving, each a function of a count and a seed. `campaign.py` runs all, the tests a few.

An attack returns (cases, failures). A failure is a load that was silently wrong, or raised what nobody can act on, or
left another model behind.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from trust.golden import model as base

import peftfast
from peftfast.files.io import read_adapter, save_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: What a caller can act on. Anything else that comes out of a load is a failure.
REFUSALS = (peftfast.PeftError, ValueError, TypeError, OSError)
Attack = Callable[[int, int], tuple[int, list[str]]]
ATTACKS: dict[str, Attack] = {}


def attack(name: str) -> Callable[[Attack], Attack]:
    def register(function: Attack) -> Attack:
        ATTACKS[name] = function
        return function

    return register


def state(model: nn.Module) -> list:
    """Everything about a model that a refused load may not change."""
    return [
        *((n, type(m).__name__, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__))
          for n, m in model.named_modules()),
        *((n, p.requires_grad, p.detach().numpy().tobytes()) for n, p in model.named_parameters()),
    ]  # fmt: skip


def trained(scale: float = 0.3, **changes) -> peftfast.PeftModel:
    """A model with an adapter that has values."""
    settings = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **changes}
    with quiet():
        model = peftfast.get_peft_model(base.Tiny(), peftfast.LoraConfig(**settings))
    base.fill(model, scale, only="lora_")
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(base.inputs())


def try_load(folder: Path, model: nn.Module, expected: torch.Tensor, before: list, **options) -> str | None:
    """Load `folder` on `model`; what is wrong with what came of it, None if nothing is."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            loaded = peftfast.PeftModel.from_pretrained(model, folder, **options)
        except REFUSALS as e:
            if not str(e):
                return f"{type(e).__name__} without a message"
            return None if state(model) == before else f"changed the model, then {type(e).__name__}: {e}"
        except Exception as e:
            return f"{type(e).__name__}: {e}"
    told = any(
        issubclass(w.category, (peftfast.PeftWarning, RuntimeWarning)) or "fan_in" in str(w.message) for w in caught
    )
    if told:
        return None
    try:
        found = logits(loaded)
    except Exception as e:
        return f"loaded without a word, then {type(e).__name__} in forward: {e}"
    if torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
        return None
    return "silently wrong"


def each_damaged(count: int, seed: int, damage: Callable[[random.Random, Path], object]) -> tuple[int, list[str]]:
    """`damage` a fresh copy of a good adapter `count` times and load it."""
    chance, failures = random.Random(seed), []
    good = trained()
    expected, fresh = logits(good), base.Tiny()
    before = state(fresh)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as root:
        with quiet():
            good.save_pretrained(Path(root) / "good")
        for i in range(count):
            folder = Path(root) / "bad"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(Path(root) / "good", folder)
            what = damage(chance, folder)
            wrong = try_load(folder, fresh, expected, before)
            if (folder / _Code.TRACE).exists():
                wrong = "code was executed"
            if wrong:
                failures.append(f"{i} {what}: {wrong}")
            if hasattr(fresh, "peft_config") or state(fresh) != before:
                fresh = base.Tiny()
    return count, failures


# ---- files ----------------------------------------------------------------------------------------------
@attack("truncated weights")
def truncated(count: int, seed: int) -> tuple[int, list[str]]:
    def damage(chance: random.Random, folder: Path) -> object:
        data = (folder / WEIGHTS).read_bytes()
        size = chance.randrange(len(data))
        (folder / WEIGHTS).write_bytes(data[:size])
        return size

    return each_damaged(count, seed, damage)


@attack("bit flips in weights")
def flipped_weights(count: int, seed: int) -> tuple[int, list[str]]:
    return each_damaged(count, seed, lambda chance, folder: flip(chance, folder / WEIGHTS))


@attack("bit flips in config")
def flipped_config(count: int, seed: int) -> tuple[int, list[str]]:
    return each_damaged(count, seed, lambda chance, folder: flip(chance, folder / CONFIG))


def flip(chance: random.Random, path: Path) -> object:
    data = bytearray(path.read_bytes())
    bits = [chance.randrange(8 * len(data)) for _ in range(chance.choice((1, 1, 1, 2, 8)))]
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return bits


@attack("hostile headers")
def hostile_headers(count: int, seed: int) -> tuple[int, list[str]]:
    sizes = (0, -1, 1, 7, 2**31, 2**62, 2**64, 1e300, "8", None, [8], True)
    types = ("F32", "F16", "BF16", "I8", "I64", "F8_E4M3", "C64", "X", 3, None)

    def damage(chance: random.Random, folder: Path) -> object:
        data = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        if chance.random() < 0.5:  # as a file of PEFT, without checksums; the shapes and types still have to be right
            header["__metadata__"] = {"format": "pt"}
        key = chance.choice([k for k in header if k != "__metadata__"])
        what = chance.choice(("dtype", "shape", "data_offsets", "drop", "rename", "length", "nest"))
        if what == "dtype":
            header[key]["dtype"] = chance.choice(types[1:])
        elif what == "shape":
            header[key]["shape"] = [chance.choice(sizes) for _ in range(chance.randrange(4))]
        elif what == "data_offsets":
            header[key]["data_offsets"] = [chance.choice(sizes), chance.choice(sizes)]
        elif what == "drop":
            del header[key]
        elif what == "rename":
            header[chance.choice(("", "../../x", "a" * 9999, key.replace("layers.0", "layers.7"), "\x00"))] = (
                header.pop(key)
            )
        elif what == "nest":
            header[key] = {"dtype": "F32", "shape": json.loads("[" * 50 + "]" * 50), "data_offsets": [0, 4]}
        text = json.dumps(header).encode()
        claimed = chance.choice((0, 1, len(text) - 1, 2**32, 2**63)) if what == "length" else len(text)
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", claimed) + text + body)
        return what, key

    return each_damaged(count, seed, damage)


@attack("hostile configs")
def hostile_configs(count: int, seed: int) -> tuple[int, list[str]]:
    values = (None, True, False, 0, -1, 1, 3, 10**9, 10**30, 0.5, -1.0, 1e308, float("nan"), float("inf"), "", "x",
              "q_proj", "(", ".*", "all-linear", "__import__('os').system('true')", "../..", [], [1], ["q_proj"],
              [None], [[]], {}, {"a": 1}, {"q_proj": 10**9}, {"(": 3}, {"": {}}, "LORA", "IA3", "ADALORA",
              "PROMPT_TUNING", "CAUSAL_LM", "pissa", "olora", "gaussian", "eva", "loftq", "corda",
              "lora_ga")  # fmt: skip

    def damage(chance: random.Random, folder: Path) -> object:
        data = json.loads((folder / CONFIG).read_text())
        changed = {}
        for _ in range(chance.choice((1, 1, 2, 3))):
            field = chance.choice((*data, "runtime_config", "torch_dtype", "auto_map", "init_r", "num_virtual_tokens"))
            changed[field] = chance.choice(values)
        (folder / CONFIG).write_text(json.dumps({**data, **changed}))
        return changed

    return each_damaged(count, seed, damage)


@attack("wrong tensors")
def wrong_tensors(count: int, seed: int) -> tuple[int, list[str]]:
    """Files that are whole, as any tool may have written them, with contents that do not fit."""
    from safetensors.torch import load_file, save_file

    def damage(chance: random.Random, folder: Path) -> object:
        tensors = load_file(folder / WEIGHTS)
        key = chance.choice(list(tensors))
        what = chance.choice(("nan", "inf", "shape", "integers", "missing", "foreign", "extra", "empty", "transposed"))
        t = tensors[key]
        if what in ("nan", "inf"):
            tensors[key] = t.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(float(what)))
        elif what == "shape":
            tensors[key] = torch.zeros([chance.randrange(5) for _ in range(chance.randrange(4))])
        elif what == "integers":
            tensors[key] = t.to(chance.choice((torch.int8, torch.int64, torch.bool)))
        elif what == "missing":
            del tensors[key]
        elif what == "foreign":
            tensors[key.replace("layers.", "layers.1")] = t.clone()
        elif what == "extra":
            tensors[chance.choice(("x", "lora_A", "base_model.model.head.weight", key + ".weight"))] = t.clone()
        elif what == "empty":
            tensors = {}
        else:
            tensors[key] = t.t().contiguous()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        return what, key

    return each_damaged(count, seed, damage)


@attack("damaged pickles")
def pickles(count: int, seed: int) -> tuple[int, list[str]]:
    """`adapter_model.bin` with bits flipped, cut, or with code in it. A flipped value is not seen: pickles have no
    checksums, which is one reason to prefer safetensors; so only what is refused, and how, is looked at."""

    def damage(chance: random.Random, folder: Path) -> object:
        (folder / WEIGHTS).unlink()
        path = folder / "adapter_model.bin"
        if chance.random() < 0.2:
            torch.save({"x": _Code(folder)}, path)
        else:
            torch.save({k: p.detach() for k, p in trained().state_dict().items() if ".lora_" in k}, path)
            if chance.random() < 0.3:
                path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])
            else:
                flip(chance, path)
        return "pickle"

    done, failures = each_damaged(count, seed, damage)
    return done, [f for f in failures if "silently wrong" not in f]


class _Code:
    """Leaves a file in the folder where it is unpickled."""

    TRACE = "executed"

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / self.TRACE)

    def __reduce__(self) -> tuple:
        return (open, (self.path, "w"))


# ---- processes ------------------------------------------------------------------------------------------
def versions() -> list[tuple[peftfast.LoraConfig, dict[str, torch.Tensor]]]:
    """Two adapters whose config and weights tell which one they are of."""
    made = []
    for alpha in (3, 5):
        model = trained(lora_alpha=alpha, r=alpha)
        tensors = peftfast.get_peft_model_state_dict(model, save_embedding_layers=False)
        made.append((model.peft_config["default"], {k: torch.full_like(t, float(alpha)) for k, t in tensors.items()}))
    return made


def whole(folder: Path) -> str | None:
    """None if config and weights in `folder` are of one save."""
    with quiet():
        stored = read_adapter(folder)
    found = {float(v) for t in stored.tensors.values() for v in t.unique()}
    if found != {float(stored.config.lora_alpha)} or stored.config.r != stored.config.lora_alpha:
        return f"config {stored.config.lora_alpha}, weights {found}"
    return None


@attack("kill -9 while saving")
def killed(count: int, seed: int) -> tuple[int, list[str]]:
    chance, failures, made = random.Random(seed), [], versions()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "adapter"
        save_adapter(folder, *made[0], auto_mapping=None)
        for i in range(count):
            child = os.fork()
            if child == 0:
                while True:
                    for cfg, tensors in reversed(made):
                        save_adapter(folder, cfg, tensors, auto_mapping=None, safe=i % 5 != 0)
            time.sleep(chance.uniform(0.001, 0.03))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            try:
                wrong = whole(folder)
            except Exception as e:
                wrong = f"lost: {type(e).__name__}: {e}"
            if wrong:
                failures.append(f"{i}: {wrong}")
        save_adapter(folder, *made[0], auto_mapping=None, safe=False)
        save_adapter(folder, *made[1], auto_mapping=None)
        left = [p.name for p in folder.iterdir() if p.name.startswith(".")]
        if left or whole(folder):
            failures.append(f"after the last save: {left}, {whole(folder)}")
    return count, failures


@attack("saves and loads at once")
def concurrent(count: int, seed: int) -> tuple[int, list[str]]:
    """Three processes save, this one loads."""
    made, failures, children = versions(), [], []
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "adapter"
        save_adapter(folder, *made[0], auto_mapping=None)
        for i in range(3):
            child = os.fork()
            if child == 0:
                while True:
                    save_adapter(folder, *made[i % 2], auto_mapping=None)
            children.append(child)
        try:
            for i in range(count):
                try:
                    wrong = whole(folder)
                except Exception as e:
                    wrong = f"{type(e).__name__}: {e}"
                if wrong:
                    failures.append(f"{i}: {wrong}")
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    return count, failures
