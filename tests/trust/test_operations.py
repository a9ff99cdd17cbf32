"""Random sequences of operations, compared with plain torch or PEFT after each, and several threads on one model."""

from __future__ import annotations

import importlib
import os
import threading

import pytest
import torch
from trust.attacks import base, quiet, trained

import peftfast


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind, count", [("operations", 300), ("against_peft", 200), ("mutations", 200), ("quantised", 150)]
)
def test_at_random(kind, count):
    """See the modules of these names."""
    if kind == "quantised":
        pytest.importorskip("bitsandbytes")
    run = importlib.import_module(f"trust.{kind}").run
    done, failures = run(int(os.environ.get("PEFTFAST_OPERATIONS", count)), seed=0)
    assert done >= count
    assert not failures, "\n".join(failures[:5])


def test_threads_with_adapters_of_their_own():
    """Every thread asks for another adapter by name, at once, on one model; each gets its own result, always."""
    model = trained()
    for i in range(3):
        with quiet():
            model.add_adapter(f"a{i}", peftfast.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        base.fill(model, 0.1 * (i + 1), only=f".a{i}.")
    names = ["default", "a0", "a1", "a2", "__base__"]
    rows = len(base.inputs())
    with torch.no_grad():
        expected = {n: model(base.inputs(), adapter_names=[n] * rows) for n in names}
    assert len({tuple(e.flatten().tolist()) for e in expected.values()}) == len(names)
    wrong: list[str] = []

    def work(name: str) -> None:
        with torch.no_grad():
            for _ in range(40):
                if not torch.equal(model(base.inputs(), adapter_names=[name] * rows), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(n,)) for n in names]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_threads_save_and_load_one_folder(tmp_path):
    model, fresh = trained(), base.Tiny()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(base.inputs())
    failed: list[str] = []

    def save() -> None:
        for _ in range(15):
            model.save_pretrained(tmp_path)

    def load() -> None:
        for _ in range(15):
            try:
                loaded = peftfast.PeftModel.from_pretrained(base.Tiny(), tmp_path)
                with torch.no_grad():
                    assert torch.equal(loaded(base.inputs()), expected)
            except Exception as e:
                failed.append(repr(e))

    threads = [threading.Thread(target=t) for t in (save, load, save, load)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed
    assert not hasattr(fresh, "peft_config")
