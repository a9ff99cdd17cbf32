"""Time of wrapping a model, of holding many adapters on it (switching, loading, mixing), and of merging them; PEFT
beside it.

    python bench/adapters.py [--adapters 100] [--layers 32] [--hidden 32]

Prints one row per figure: what, peftfast, PEFT, their ratio (below 1: PEFT is the faster). Both libraries run in one
process and take turns. Figures are medians of CPU time, so that other processes on the machine do not count; the mixed
batch runs at a hidden size of --mix-hidden, where a base product is worth something.
"""

from __future__ import annotations

import argparse
import importlib
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from measure import print_row, print_table_head, print_versions, turns

from bench import contestants
from bench.operands import Model

CONFIG = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False}
Row = tuple[str, dict[str, float]]


def alternating(calls: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Medians of CPU time in ms of calls that take turns."""
    return {name: 1e3 * statistics.median(t) for name, t in turns(calls, runs, clock=time.process_time).items()}


def llama(layers: int, hidden: int) -> torch.nn.Module:
    shape = Model("small", hidden, 2 * hidden, 8, 8, hidden // 8)
    return contestants.llama(shape, layers, torch.float32, "cpu", vocabulary=256, use_cache=True).eval()


def layers_of(lib: ModuleType, args: argparse.Namespace, folder: str) -> Any:
    model = lib.get_peft_model(llama(args.layers, args.hidden), lib.LoraConfig(**CONFIG), "first")
    model.save_pretrained(folder)
    return model


def wrapping(libraries: dict[str, ModuleType], args: argparse.Namespace) -> Iterator[Row]:
    """From a model to one with its first adapter, the libraries taking turns; the first turn is not counted."""
    times: dict[str, list[float]] = {name: [] for name in libraries}
    for _ in range(args.runs + 1):
        for name, lib in libraries.items():
            base = llama(args.layers, args.hidden)
            start = time.process_time_ns()
            lib.get_peft_model(base, lib.LoraConfig(**{**CONFIG, "init_lora_weights": True}))
            times[name].append((time.process_time_ns() - start) / 1e6)
    yield "get_peft_model, ms", {name: statistics.median(t[1:]) for name, t in times.items()}


def _adding(lib: ModuleType, model: Any, folder: str) -> None:
    model.add_adapter("one more", lib.LoraConfig(**CONFIG))
    model.delete_adapter("one more")


def _disabling(lib: ModuleType, model: Any, folder: str) -> None:
    with model.disable_adapter():
        pass


def _saving(lib: ModuleType, model: Any, folder: str) -> None:
    model.save_pretrained(folder, selected_adapters=["first"])


def _merging(lib: ModuleType, model: Any, folder: str) -> None:
    model.merge_adapter(["first"])
    model.unmerge_adapter()


#: what is done with one of many adapters
WITH_ONE: dict[str, Callable[[ModuleType, Any, str], None]] = {
    "add_adapter and delete_adapter": _adding,
    "disable_adapter, there and back": _disabling,
    "save_pretrained of one": _saving,
    "merge_adapter of one and unmerge_adapter": _merging,
}


def lifecycle(libraries: dict[str, ModuleType], args: argparse.Namespace) -> Iterator[Row]:
    """Switching, loading, and what else is done with one of many, the libraries taking turns after every load."""
    with tempfile.TemporaryDirectory() as root:
        models = {name: layers_of(lib, args, f"{root}/{name}") for name, lib in libraries.items()}
        loading: dict[str, list[float]] = {name: [] for name in models}

        def load(adapter: str) -> None:
            for name, model in models.items():
                start = time.process_time_ns()
                model.load_adapter(f"{root}/{name}/first", adapter_name=adapter)
                loading[name].append((time.process_time_ns() - start) / 1e6)

        def switch(model: Any) -> Callable[[], None]:
            def both() -> None:
                model.set_adapter("first")
                model.set_adapter("n0")

            return both

        def switching() -> dict[str, float]:
            times = alternating({name: switch(model) for name, model in models.items()}, args.runs)
            return {name: t / 2 for name, t in times.items()}

        def with_one(present: int) -> Iterator[Row]:
            for what, do in WITH_ONE.items():
                calls = {n: partial(do, libraries[n], model, f"{root}/{n}") for n, model in models.items()}
                yield f"{what}, {present} present, ms", alternating(calls, max(1, args.runs // 4))

        yield "adapted layers", {n: sum(hasattr(m, "lora_A") for m in model.modules()) for n, model in models.items()}
        load("warm-up")
        for model in models.values():
            model.delete_adapter("warm-up")
        for times in loading.values():
            times.clear()
        load("n0")
        few = switching()
        yield "set_adapter, 2 present, ms", few
        yield from with_one(2)
        for i in range(1, args.adapters - 1):
            load(f"n{i}")
        many = switching()
        yield f"set_adapter, {args.adapters} present, ms", many
        yield "set_adapter, the latter over the former", {n: many[n] / few[n] for n in many}
        yield from with_one(args.adapters)
        ends = {n: (statistics.median(t[:5]), statistics.median(t[-5:])) for n, t in loading.items()}
        yield "load_adapter, median of the first five, ms", {n: first for n, (first, _) in ends.items()}
        yield "load_adapter, median of the last five, ms", {n: last for n, (_, last) in ends.items()}
        yield "load_adapter, the latter over the former", {n: last / first for n, (first, last) in ends.items()}


def merging(libraries: dict[str, ModuleType], args: argparse.Namespace) -> Iterator[Row]:
    """Merging, unmerging, and merging for good, of weights as large as a model's, the libraries taking turns."""
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ({}, {"use_dora": True}):
            times: dict[str, dict[str, list[float]]] = {}
            for _ in range(max(1, args.runs // 4) + 1):  # the first is not counted
                for name, lib in libraries.items():
                    base = llama(args.merge_layers, args.merge_hidden).to(dtype)
                    model = lib.get_peft_model(base, lib.LoraConfig(**CONFIG, **kind))
                    for what in ("merge_adapter", "unmerge_adapter", "merge_and_unload"):
                        start = time.process_time_ns()
                        getattr(model, what)()
                        took = (time.process_time_ns() - start) / 1e6
                        times.setdefault(what, {}).setdefault(name, []).append(took)
            described = f"{'DoRA' if kind else 'LoRA'}, {str(dtype).removeprefix('torch.')}"
            found = {what: {n: statistics.median(t[1:]) for n, t in own.items()} for what, own in times.items()}
            for what, figures in found.items():
                yield f"{what}, {described}, ms", figures
            both = [found["merge_adapter"], found["unmerge_adapter"]]
            yield f"both ways, {described}, ms", {n: sum(one[n] for one in both) for n in libraries}


def check_mixed(model: Any, names: list[str]) -> None:
    """A mixed batch is what its samples are by themselves; AssertionError if it is not."""
    ids = torch.randint(0, 256, (len(names), 4))
    mixed = model(ids, adapter_names=names).logits
    for i, name in enumerate(names):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[i : i + 1], model(ids[i : i + 1]).logits, rtol=1e-4, atol=1e-4)


def mixing(libraries: dict[str, ModuleType], args: argparse.Namespace) -> Iterator[Row]:
    """A batch of 16 samples over 16 adapters, as a multiple of the base alone."""
    base = llama(2, args.mix_hidden)
    names = [f"n{i}" for i in range(16)]
    shuffled = random.Random(0).sample(names, len(names))

    def with_adapters(lib: ModuleType) -> Any:
        model = lib.get_peft_model(llama(2, args.mix_hidden), lib.LoraConfig(**CONFIG), names[0])
        for other in names[1:]:
            model.add_adapter(other, lib.LoraConfig(**CONFIG))
        model.eval()
        with torch.no_grad():
            check_mixed(model, names)
            check_mixed(model, shuffled)
        return model

    models = {name: with_adapters(lib) for name, lib in libraries.items()}
    promised = with_adapters(libraries["peftfast"])
    with torch.no_grad(), promised.base_model.unchanging_adapters():
        for tokens in args.mix_tokens:
            ids = torch.randint(0, 256, (16, tokens))
            calls: dict[str, Callable[[], Any]] = {"base": lambda ids=ids: base(ids)}
            for name, model in models.items():
                calls[name] = lambda ids=ids, model=model: model(ids, adapter_names=names)
                calls[f"{name} shuffled"] = lambda ids=ids, model=model: model(ids, adapter_names=shuffled)
            ours = models["peftfast"]
            numbers = ours.base_model.adapter_numbers(names)
            calls["promised"] = lambda ids=ids: promised(ids, adapter_names=names)
            calls["promised shuffled"] = lambda ids=ids: promised(ids, adapter_names=shuffled)
            calls["numbers"] = lambda ids=ids, ours=ours, numbers=numbers: ours(ids, adapter_names=numbers)
            times = alternating(calls, args.runs)
            what = f"16 adapters, 16 x {tokens} tokens, times the base alone"
            ratios = {name: t / times["base"] for name, t in times.items()}
            yield f"names: {what}", ratios
            yield f"names in another order: {what}", {name: ratios[f"{name} shuffled"] for name in models}
            yield f"names, adapters promised not to change: {what}", {"peftfast": ratios["promised"]}
            yield f"both: {what}", {"peftfast": ratios["promised shuffled"]}
            yield f"tensor of numbers: {what}", {"peftfast": ratios["numbers"]}


PARTS = {part.__name__: part for part in (wrapping, lifecycle, mixing, merging)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--mix-hidden", type=int, default=512)
    parser.add_argument("--mix-tokens", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--merge-layers", type=int, default=4)
    parser.add_argument("--merge-hidden", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--only", choices=tuple(PARTS), help="measure this part alone")
    parser.add_argument("--alone", action="store_true", help="without PEFT, whose loads take minutes at full size")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    libraries = {name: importlib.import_module(name) for name in ("peftfast", "peft")[: 1 if args.alone else 2]}
    print_versions("one thread", "CPU time", *(f"{k}={v}" for k, v in vars(args).items()))
    print_table_head("what", "peftfast", "PEFT", "PEFT / peftfast")
    for name, part in PARTS.items():
        if args.only in (None, name):
            for what, figures in part(libraries, args):
                ours, theirs = figures["peftfast"], figures.get("peft")
                print_row(what, ours, *(("", "") if theirs is None else (theirs, theirs / ours)))


if __name__ == "__main__":
    main()
