"""measure on your own model what an adapter costs here: the frozen base, peftfast, and PEFT where it is installed

A training step and decoding, the contestants taking turns in one process, sharing one copy of the base; first their
results are compared, and where they differ no ratio is printed. Ends with what to expect of a longer run.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from peftfast.cli import _settings
from peftfast.cli._settings import DEFAULTS, DTYPES, EMBEDDED

if TYPE_CHECKING:
    import torch

DECODED = 16  # tokens per measurement of decoding
BASE, OURS, BLOCKS, PEFT = "frozen base", "peftfast", "peftfast, blocks", "PEFT"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    whole = _settings.whole(1)
    _settings.add_model(parser)
    _settings.add_storage(parser)
    parser.add_argument("--r", type=whole, help="rank of the LoRA (8)")
    parser.add_argument("--target", action="append", metavar="NAMES", help="module names, or all-linear (all-linear)")
    share = _settings.real("a number in [0, 1)", lambda v: 0 <= v < 1)
    parser.add_argument("--dropout", type=share, help="LoRA dropout (0)")
    parser.add_argument("--batch-size", type=whole, help="sequences per step (2)")
    parser.add_argument("--seq-len", type=whole, help="tokens per sequence (128)")
    parser.add_argument("--seconds", type=_settings.POSITIVE, default=20.0,
                        help="budget for each of the two measurements (%(default)g)")  # fmt: skip
    parser.add_argument("--seed", type=_settings.SEED, help="of factors and tokens (0)")


def run(args: argparse.Namespace) -> int:
    settings = {**DEFAULTS, "r": 8, "target": "all-linear", "batch_size": 2, "seq_len": 128, **_settings.given(args)}
    source = _settings.check_model(settings["model"])
    _settings.check_quantize(settings["quantize"])
    from peftfast.cli import _setup

    with _setup.quiet_libraries():
        _setup.complete(settings)
        return bench(settings, source, args.seconds)


def bench(settings: dict[str, Any], source: str, seconds: float) -> int:
    import torch

    from peftfast.cli import _setup

    torch.manual_seed(settings["seed"])
    base = _setup.load_base(source, settings).requires_grad_(False)
    _setup.check_length(base, settings["seq_len"])
    models = contestants(base, settings)
    device = settings["device"]
    name = "the embedded model" if settings["model"] == EMBEDDED else settings["model"]
    print(
        f"{name} in {settings['dtype']}{'' if settings['quantize'] == 'none' else ' and ' + settings['quantize']} on "
        f"{_device_name(device)}; LoRA r={settings['r']} on {settings['target']}, {settings['batch_size']} x "
        f"{settings['seq_len']} tokens"
    )
    agree = compare(models, settings)
    print("\ntraining step")
    training = {n: training_step(m, settings) for n, m in models.items()}
    kept = {n: kept_bytes(m, settings) for n, m in models.items()}
    times = take_turns(training, seconds, device)
    peaks = {n: peak_bytes(call, device) for n, call in training.items()}
    tokens = settings["batch_size"] * settings["seq_len"]
    table(times, agree, lambda n: f"{tokens / times.median(n):>10.0f} tokens/s{_memory(kept[n], peaks[n])}")
    print(f"\ndecoding, {settings['batch_size']} sequence(s)")
    decoding = take_turns({n: decode(m, settings) for n, m in models.items()}, seconds, device)
    table(decoding, agree, lambda n: f"{DECODED * settings['batch_size'] / decoding.median(n):>10.1f} tokens/s")
    expect(times, decoding, kept, agree)
    return 0 if agree else 1


def contestants(base: torch.nn.Module, settings: dict[str, Any]) -> dict[str, torch.nn.Module]:
    """Name -> model. All share the base's tensors; the factors hold the same numbers everywhere."""
    import torch

    import peftfast
    from peftfast.cli._setup import one_line

    shared = {id(t): t for t in (*base.parameters(), *base.buffers())}
    found = {BASE: base}
    libraries = {OURS: "peftfast", BLOCKS: "peftfast"}
    if importlib.util.find_spec("peft") is not None:
        libraries[PEFT] = "peft"
    for name, library in libraries.items():
        module = importlib.import_module(library)
        with one_line(f"--target {settings['target']!r}"):
            config = module.LoraConfig(
                r=settings["r"], lora_alpha=2 * settings["r"], lora_dropout=settings["dropout"],
                target_modules=settings["target"], task_type="CAUSAL_LM",
            )  # fmt: skip
            model = module.get_peft_model(copy.deepcopy(base, dict(shared)), config)
        generator = torch.Generator().manual_seed(settings["seed"])
        with torch.no_grad():
            for key, parameter in sorted(model.named_parameters()):
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        if name == BLOCKS:
            blocks = peftfast.fuse_blocks(model)
            with torch.no_grad():
                for _ in range(3):
                    model(input_ids=_tokens(model, settings))
            used = sum(group.state == "on" for group in blocks.groups)
            why = ": so few tokens are left to the layers" if {g.state for g in blocks.groups} == {"new"} else ""
            print(f"blocks: {used} of {len(blocks.groups)} in use{why}")
            if not used:  # the same as without; a difference in times would be noise
                continue
        found[name] = model
    return found


def _tokens(model: torch.nn.Module, settings: dict[str, Any]) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(settings["seed"])
    size = (settings["batch_size"], settings["seq_len"])
    return torch.randint(0, model.config.vocab_size, size, generator=generator).to(settings["device"])


def _autocast(settings: dict[str, Any]) -> Any:
    import torch

    half = settings["dtype"] != "fp32"
    dtype = getattr(torch, DTYPES[settings["dtype"]]) if half else torch.bfloat16
    return torch.autocast(settings["device"].partition(":")[0], dtype, enabled=half)


def compare(models: dict[str, torch.nn.Module], settings: dict[str, Any]) -> bool:
    """Whether all adapted models compute the same, and not what the base does."""
    import torch

    logits = {}
    for name, model in models.items():
        model.eval()
        with torch.no_grad(), _autocast(settings):
            logits[name] = model(input_ids=_tokens(model, settings)[:1]).logits.float()
    ours, base = logits[OURS], logits[BASE]
    change = (ours - base).norm() / base.norm()
    limit = 1e-4 if settings["dtype"] == "fp32" else 3e-2
    # not Python's max, which passes over NaN
    worst = torch.stack([(v - ours).norm() / ours.norm() for n, v in logits.items() if n != BASE]).max().item()
    agree = worst <= limit and bool(change > 0)
    print(
        f"logits of the adapted models differ by {worst:.1e}" + ("" if agree else f", more than {limit:g}: NO RATIOS")
    )
    return agree


def _loss(model: torch.nn.Module, settings: dict[str, Any]) -> torch.Tensor:
    ids = _tokens(model, settings)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()  # gradients reach every layer of the base too
    with _autocast(settings):
        return model(inputs_embeds=embeds, labels=ids).loss


def training_step(model: torch.nn.Module, settings: dict[str, Any]) -> Callable[[], None]:
    """Forward, backward and AdamW; of the frozen base forward and backward."""
    import torch

    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0) if trained else None

    def call() -> None:
        _loss(model, settings).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return call


def decode(model: torch.nn.Module, settings: dict[str, Any]) -> Callable[[], None]:
    """Greedy decoding of `DECODED` tokens after a prompt of 16."""
    import torch

    prompt = _tokens(model, settings)[:, :16]

    def call() -> None:
        model.eval()
        with torch.no_grad():
            model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=DECODED,
                min_new_tokens=DECODED, do_sample=False, use_cache=True, pad_token_id=0,
            )  # fmt: skip

    return call


def kept_bytes(model: torch.nn.Module, settings: dict[str, Any]) -> int:
    """Bytes held between the passes of a step, without parameters."""
    import torch

    model.train()
    seen: dict[int, int] = {}
    held = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        held.append(t)
        storage = t.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = _loss(model, settings)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), loss)}
    return sum(size for pointer, size in seen.items() if pointer not in own)


def peak_bytes(call: Callable[[], None], device: str) -> int | None:
    import torch

    if not device.startswith("cuda"):
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device)


class Ratio(NamedTuple):
    """How long one contestant takes, in times of another: the median of the rounds and the quartiles around it,
    of less than eight rounds the extremes."""

    median: float
    low: float
    high: float

    @property
    def shown(self) -> bool:
        """Whether the rounds agree on which of the two is the faster."""
        return self.high < 1 or self.low > 1


class Turns:
    """Seconds of every contestant by rounds. They are compared round by round, because what slows a machine down lasts
    for longer than one call.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in names}

    @property
    def rounds(self) -> int:
        return min(map(len, self.seconds.values()))

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, over: str) -> Ratio:
        pairs = [a / b for a, b in zip(self.seconds[name], self.seconds[over], strict=True)]
        few = len(pairs) < 8
        low, *_, high = (min(pairs), max(pairs)) if few else statistics.quantiles(pairs, n=4, method="inclusive")
        return Ratio(statistics.median(pairs), low, high)

    def fastest(self, names: Iterable[str], over: str) -> str:
        """The one of `names` that takes least in times of `over`."""
        return min(names, key=lambda name: self.ratio(name, over).median)


def take_turns(calls: dict[str, Callable[[], None]], seconds: float, device: str) -> Turns:
    """Rounds of alternating order, as many as `seconds` allow, from 3 to 200."""
    from peftfast.cli._loop import synchronize

    for call in calls.values():  # compilation, caches, blocks
        call()
    turns = Turns(calls)
    names, end = list(calls), time.perf_counter() + seconds
    while turns.rounds < 3 or (turns.rounds < 200 and time.perf_counter() < end):
        for name in names:
            synchronize(device)
            start = time.perf_counter()
            calls[name]()
            synchronize(device)
            turns.seconds[name].append(time.perf_counter() - start)
        names.reverse()
    return turns


def table(times: Turns, agree: bool, more: Callable[[str], str]) -> None:
    for name in times.seconds:
        over = f"{times.ratio(name, BASE).median:6.2f} x base" if agree else " " * 13
        print(f"  {name:<18}{1e3 * times.median(name):>10.2f} ms  {over}{more(name)}")
    print(f"  medians of {times.rounds} rounds")


def _memory(kept: int, peak: int | None) -> str:
    return f"{kept / 2**20:>9.1f} MiB kept for backward" + ("" if peak is None else f", peak {peak / 2**20:.0f} MiB")


def expect(times: Turns, decoding: Turns, kept: dict[str, int], agree: bool) -> None:
    """The figures in words, of which none says more than the rounds agree on."""
    if not agree:
        return
    print("\nwhat to expect")
    best = OURS
    if BLOCKS in kept:
        blocks = times.ratio(BLOCKS, OURS)
        if blocks.shown and blocks.median < 0.98:  # nearer than two runs are to one another
            best = BLOCKS
    over = times.ratio(best, BASE)
    print(
        f"  of {best}: a step takes {100 * (over.median - 1):+.0f} % over the frozen base, which no adapter method can "
        "beat here"
    )
    if best == BLOCKS:
        print("  blocks pay on this model and device: blocks = peftfast.fuse_blocks(model) before training")
    if PEFT in kept:
        quickest = decoding.fastest((name for name in (OURS, BLOCKS) if name in kept), over=PEFT)
        steps, memory = times.ratio(PEFT, best), 1 - kept[best] / kept[PEFT]
        print(f"  against PEFT: steps {_times_as_fast(steps)}, {100 * memory:.0f} % less kept for backward, "
              f"decoding {_times_as_fast(decoding.ratio(PEFT, quickest))}")  # fmt: skip
        if steps.shown and steps.median < 1:
            print("  PEFT is faster here; please report this with the output of `peftfast env`")
    else:
        print("  for a comparison with PEFT: pip install peft")


def _times_as_fast(ratio: Ratio) -> str:
    if ratio.shown:
        return f"{ratio.median:.2f} times as fast"
    return f"as fast within what the rounds differ by ({ratio.low:.2f} to {ratio.high:.2f} times)"


def _device_name(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} thread(s)"
