"""Random sequences of operations, compared with plain torch or PEFT after each, and several threads on one model."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from oracle import at_once
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

    def work(name: str) -> None:
        with torch.no_grad():
            for _ in range(40):
                assert torch.equal(model(base.inputs(), adapter_names=[name] * rows), expected[name])

    at_once(work, names)


def test_threads_save_and_load_one_folder(tmp_path):
    model, fresh = trained(), base.Tiny()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(base.inputs())

    def work(saves: bool) -> None:
        for _ in range(15):
            if saves:
                model.save_pretrained(tmp_path)
                continue
            loaded = peftfast.PeftModel.from_pretrained(base.Tiny(), tmp_path)
            with torch.no_grad():
                assert torch.equal(loaded(base.inputs()), expected)

    at_once(work, [True, False, True, False])
    assert not hasattr(fresh, "peft_config")
