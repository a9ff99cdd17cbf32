"""train an adapter and show what happened; with no argument, on an embedded model and text

Prints the loss on held-out text before and after, the speed, a sample without and with the adapter, and a check that
the saved adapter, loaded again and merged, gives the logits of the trained model. Ctrl-C stops and saves.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftfast.cli import INTERRUPTED, UserError, _settings
from peftfast.cli._settings import DTYPES, EMBEDDED
from peftfast.version import __version__

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from peftfast import PeftConfig
    from peftfast.cli._data import Corpus, Rows
    from peftfast.cli._loop import Run

HELD_OUT_ROWS = 64  # enough for two digits of the loss; more costs time and shows nothing
CHECKED_ROWS = 2

add_arguments = _settings.add_arguments


def run(args: argparse.Namespace) -> int:
    given = _settings.given(args)
    folder = _settings.place(given.get("output", _settings.DEFAULTS["output"]), "--output")
    # What needs no library comes first: a wrong path should not cost the seconds it takes to import torch.
    _settings.check_output(folder, bool(given.get("resume")))
    _settings.check_model(given.get("model", EMBEDDED))
    _settings.check_quantize(given.get("quantize", "none"))
    from peftfast.cli._setup import quiet_libraries

    with quiet_libraries():
        try:
            return train(given, folder)
        except Exception as error:
            if "OutOfMemory" not in type(error).__name__:
                raise
            less = "smaller --batch-size or --seq-len, --gradient-checkpointing and --quantize need less"
            raise UserError(f"out of memory: {error}; {less}", exit_code=1) from error


@dataclass
class Prepared:
    """Everything that can be refused has been, and nothing is written yet."""

    settings: dict[str, Any]
    state: dict[str, Any] | None  # of the run to continue
    source: str
    folder: Path
    config: PeftConfig
    corpus: Corpus
    rows: Rows
    tokenizer: PreTrainedTokenizerBase
    base: torch.nn.Module
    pad: int


def prepare(given: dict[str, Any], folder: Path) -> Prepared:
    from peftfast import plan_adapter
    from peftfast.cli import _checks, _setup
    from peftfast.cli._data import read, tokenize
    from peftfast.cli._loop import load_state

    state = load_state(folder) if given.pop("resume", False) else None
    settings = _settings.continued(given, state["settings"]) if state else _settings.with_defaults(given)
    if state and state["step"] >= settings["steps"]:
        raise UserError(
            f"--resume: the run in {str(folder)!r} is complete, {state['step']} of {settings['steps']} steps; a larger "
            "--steps prolongs it"
        )
    _setup.complete(settings)
    config = _setup.make_config(settings)
    _setup.check_trainable(config)
    source = _settings.check_model(settings["model"])
    corpus = read(settings["data"], settings["seed"])
    tokenizer = _setup.load_tokenizer(source, settings["model"])
    rows = tokenize(corpus, tokenizer, settings["seq_len"], settings["prompt"])
    base = _setup.load_base(source, settings)
    room = _setup.check_length(base, settings["seq_len"], getattr(config, "num_virtual_tokens", None) or 0)
    rows.keep_of_prompt(max(1, room - _checks.SAMPLE_TOKENS))
    with _setup.one_line("the adapter does not fit this model"):
        plan = None if config.is_prompt_learning else plan_adapter(base, config)
    if plan is not None and plan.refusal is not None:
        raise UserError(f"the adapter does not fit this model: {plan.refusal}")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Prepared(settings, state, source, folder, config, corpus, rows, tokenizer, base, pad)


def train(given: dict[str, Any], folder: Path) -> int:
    import torch

    from peftfast import get_peft_model
    from peftfast.cli._checks import logits, quoted, sample
    from peftfast.cli._data import collate
    from peftfast.cli._loop import Run, evaluate
    from peftfast.cli._setup import one_line
    from peftfast.training.checkpointing import switch_on

    job = prepare(given, folder)
    settings, device, base = job.settings, job.settings["device"], job.base
    held = job.rows.held_out[:HELD_OUT_ROWS]
    batch = collate(held[:CHECKED_ROWS], job.pad, device)
    what = "the embedded model" if settings["model"] == EMBEDDED else settings["model"]
    print(f"peftfast {__version__}: {settings['method']} on {what}\n", flush=True)

    # Measured before the adapter is attached: some initialisations (PiSSA) take a part out of the base's weights.
    before = evaluate(base, held, job.pad, settings["batch_size"], device)
    text_before = sample(base, job.tokenizer, job.rows.prompt, settings["seed"], device)
    untrained = logits(base, batch)

    if settings["gradient_checkpointing"]:
        switch_on(base, {"use_reentrant": False})
    torch.manual_seed(settings["seed"])
    with one_line("the adapter does not fit this model"):
        model = get_peft_model(base, job.config)
    run = Run(model, job.rows.train, job.pad, settings, job.rows.digest(), folder)
    if job.state:
        try:
            run.restore(job.state)
        except KeyError as error:
            path = str(folder / _settings.STATE_FILE)
            raise UserError(f"--resume: {path!r} is of another version of this command: it has no {error}") from None
    sites = announce(job, run)
    print(f"  loss on held-out text without the adapter: {before:.4f} nats/token", flush=True)

    if not keep_training(run):
        return INTERRUPTED
    after = evaluate(model, held, job.pad, settings["batch_size"], device)
    print(f"  loss on held-out text with the adapter:    {after:.4f} nats/token", flush=True)
    text_after = sample(model, job.tokenizer, job.rows.prompt, settings["seed"], device)
    prompt = job.tokenizer.decode(job.rows.prompt)
    print(f"\n  Continued by both with the same random numbers:\n{quoted(prompt)}")
    print(f"  without the adapter:\n{quoted(text_before)}\n  with the adapter:\n{quoted(text_after)}\n")

    trained = logits(model, batch)
    run.release()
    del model, base, job.base  # room for the model that is loaded to compare
    same, verdicts = check_saved(job, batch, trained, difference(trained, untrained), sites)
    summarize(run, before, after, verdicts)
    return 0 if same else 1


def keep_training(run: Run) -> bool:
    """Train and save; False if stopped on the way."""
    try:
        run.train()
    except KeyboardInterrupt:  # the second one
        print("\n  stopped within a step; nothing was saved since the last save", flush=True)
        return False
    run.save()
    if run.stopped_by:
        print(f"\n  stopped by {run.stopped_by} after step {run.step} of {run.settings['steps']}")
        print(f"  the adapter is saved in {run.folder}{os.sep}")
        print(f"  continue with: peftfast train --resume --output {run.folder}", flush=True)
    return not run.stopped_by


def check_saved(job: Prepared, batch: dict, trained: torch.Tensor, effect: float, sites: int) -> tuple[bool, str]:
    """Load base and adapter from their files, compare the logits, merge, compare again.

    Returns whether every comparison that has a limit kept it, and the outcome of each in words.
    """
    import torch

    from peftfast import PeftModel
    from peftfast.cli._checks import logits, tolerance
    from peftfast.cli._loop import evaluate
    from peftfast.cli._setup import load_base
    from peftfast.wrapping.model_merger import ModelMerger

    settings = job.settings
    allowed = tolerance(trained, getattr(torch, DTYPES[settings["dtype"]]), sites)
    print(f"  Largest logit {float(trained.abs().max()):.1f}; the adapter changes logits by up to {effect:.3g}.")
    print("  Largest difference between the logits of the models")
    model = PeftModel.from_pretrained(load_base(job.source, settings), job.folder)
    # The same numbers in the same kernels: rounding may differ between runs, by no more than it may through merging.
    same = compare("trained and reloaded", difference(trained, logits(model, batch)), allowed)
    said = f"reloaded {'yes' if same else 'NO, see above'}"
    if job.config.is_prompt_learning:
        print("    trained and merged:    not applicable, virtual tokens are part of no weight")
        return same, f"{said}; merged not applicable"
    try:
        ModelMerger(model.base_model.inventory).check()
    except RuntimeError as error:  # what acts on some tokens only, or on weights that nobody can write
        print(f"    trained and merged:    not applicable, {error}")
        return same, f"{said}; merged not applicable"
    model = model.merge_and_unload()
    merged = difference(trained, logits(model, batch))
    if settings["quantize"] != "none":
        kind, held = settings["quantize"], job.rows.held_out[:HELD_OUT_ROWS]
        loss = evaluate(model, held, job.pad, settings["batch_size"], settings["device"])
        print(f"    trained and merged:    {merged:.2e} (no limit: merging rounds the weights to {kind} again)")
        print(f"  loss on held-out text, merged into {kind}: {loss:.4f} nats/token")
        return same, f"{said}; merged no, rounded to {kind} again: held-out loss {loss:.4f}"
    kept = compare("trained and merged", merged, allowed)
    return same and kept, f"{said}; merged {'yes' if kept else 'NO, see above'}"


def compare(what: str, value: float, allowed: float) -> bool:
    ok = value <= allowed  # false for nan
    print(f"    {what + ':':<22} {value:.2e} ({'within' if ok else 'EXCEEDS'} rounding, {allowed:.2e})")
    return ok


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


# ---- what is said before and after -----------------------------------------------------------------------------------
def announce(job: Prepared, run: Run) -> int:
    """Print what will be done; returns how many modules carry the adapter."""
    import torch

    settings, rows = job.settings, job.rows
    trainable, total = run.model.get_nb_trainable_parameters()
    # PEFT's name for what an adapter wraps; a prompt method wraps nothing.
    sites = len({name for name, _ in run.model.named_modules() if name.endswith(".base_layer")})
    stored = f" stored as {settings['quantize']}" if settings["quantize"] != "none" else ""
    class_name = type(run.model.get_base_model()).__name__
    fact("base model", f"{class_name}, {total - trainable:,} parameters, {settings['dtype']}{stored}")
    fact("device", run.device + (f", {torch.get_num_threads()} threads" if run.device == "cpu" else ""))
    corpus = job.corpus
    fact("data", f"{corpus.name}: {len(corpus.train)} {corpus.unit}, {tokens(rows.train):,} tokens")
    fact(
        "held out", f"{len(corpus.held_out)} {corpus.unit}, {tokens(rows.held_out[:HELD_OUT_ROWS]):,} tokens evaluated"
    )
    fact("adapter", describe(job.config, settings))
    if targets := getattr(job.config, "target_modules", None):
        fact("on", f"{sites} modules: {targets if isinstance(targets, str) else ', '.join(sorted(targets))}")
    fact("trainable", f"{trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %)")
    fact("training", f"{settings['steps']} steps of {settings['batch_size']} x {settings['seq_len']} tokens")
    fact("optimizer", f"AdamW, learning rate {settings['lr']:g} after a warm-up, falling to 0, seed {settings['seed']}")
    if job.state:
        fact("continues", f"after step {run.step}")
    for note in rows.notes:
        fact("note", note)
    print(flush=True)
    return sites


def summarize(run: Run, before: float, after: float, verdicts: str) -> None:
    import torch

    files = sorted(p for p in run.folder.iterdir() if p.is_file() and p.name.startswith("adapter_"))
    size = sum(p.stat().st_size for p in files)
    print("\nSummary")
    fact("loss", f"{before:.4f} -> {after:.4f} nats/token on held-out text ({after - before:+.4f})")
    fact("speed", f"{run.tokens / run.seconds:,.0f} tokens/s ({run.tokens:,} tokens in {run.seconds:.1f} s)")
    if run.device.startswith("cuda"):
        fact("memory", f"{torch.cuda.max_memory_allocated(run.device) / 2**30:.2f} GiB at most")
    fact("adapter", f"{run.folder}{os.sep} ({', '.join(p.name for p in files)}: {size / 1000:,.1f} kB)")
    fact("same logits", verdicts)
    fact("use it", f"PeftModel.from_pretrained(base_model, {str(run.folder)!r}), from peftfast or peft")


def describe(config: PeftConfig, settings: dict[str, Any]) -> str:
    from peftfast.cli._setup import FIELDS

    have = {f.name for f in fields(config)}
    parts = []
    for option in ("r", "alpha", "dropout"):
        name = next((n for n in FIELDS[option] if n in have), None)
        if name is not None and name not in settings["set"]:
            parts.append(f"{option} {getattr(config, name):g}")
    parts += [f"{name} {value}" for name, value in settings["set"].items()]
    return f"{settings['method']}, {', '.join(parts)}"


def tokens(rows: list) -> int:
    return sum(len(row.ids) for row in rows)


def fact(name: str, value: str) -> None:
    print(f"  {name:<12} {value}")
