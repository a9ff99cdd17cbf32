"""DeepSpeed itself, two processes on one machine: ZeRO-1, 2 and 3 train what one process trains, files are whole, and
what cannot be done is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import launch
from training import deepspeed_workers as workers

pytest.importorskip("deepspeed")

TRAIN = [
    *(f"{method}+3" for method in workers.METHODS if method != "pissa"),
    "tokens+1+accumulation",
    "dora+2+reentrant",
    "lora+3+accumulation+blocks",
    "dora+3+reentrant",
    "embedding+3+checkpointing",
]
BF16 = [f"{method}+3+bf16{library}" for method in ("lora", "ia3") for library in ("", "+peft")]
INIT = ["saved", "tokens", "dora", "pissa", "experts"]
PAST = ["embedding", "dora"]
FILES = ["lora", "tokens", "network", "lora+2"]
RUNS = {
    "train": TRAIN + BF16,
    "init": INIT,
    "past": PAST,
    "files": FILES,
    "several": ["lora", "lora+2"],
    "prompts": ["network", "network+1"],
    "refused": ["dora"],
    "schedule": ["adalora", "adalora+2"],
    "trainer": ["lora"],
}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, list[dict]]:
    """All runs of two processes, from one start of them."""
    folder = tmp_path_factory.mktemp("two")
    runs = [f"{what}:{kind}" for what, kinds in RUNS.items() for kind in kinds]
    return folder, launch(workers.__file__, 2, folder, *runs, timeout=600, DS_ACCELERATOR="cpu")


@pytest.fixture
def found(two):
    """What the processes found, by kind, for runs of one sort."""
    return lambda what: [(kind, rank[f"{what}:{kind}"]) for rank in two[1] for kind in RUNS[what]]


def test_training(found):
    for kind, result in found("train"):
        if "bf16" not in kind:
            assert result["losses"] < 2e-6 and result["weights"] < 5e-6, (kind, result)


def test_training_in_bf16_is_as_exact_as_peft(found):
    results = dict(found("train"))
    for kind in BF16[::2]:
        for what in ("losses", "weights"):
            assert results[kind][what] <= 1.1 * results[f"{kind}+peft"][what], (kind, what)


def test_base_models_made_in_parts(found):
    for kind, result in found("init"):
        assert result["first"] < 1e-5 and result["losses"] < 2e-6 and result["weights"] < 1e-5, (kind, result)


def test_calls_past_the_engine(found):
    for kind, result in found("past"):
        assert result["logits"] < 2e-5 and result["same"], (kind, result)


def test_files(found):
    for kind, result in found("files"):
        result = dict(result)
        assert result.pop("changed", 1.0) > 0.1, kind
        assert set(result) >= {"from all", "resumed"} and max(result.values()) < 2e-5, (kind, result)
        assert ("from gathered" in result) == (kind != "lora+2")


def test_several_adapters(found):
    for kind, result in found("several"):
        assert max(result["errors"].values()) < 5e-6, (kind, result)
        assert any("DeepSpeed ZeRO-3 trains adapter 'default'" in m for m in result["said"]) == (kind != "lora+2")


def test_processes_that_have_samples_of_different_prompts(found):
    for kind, result in found("prompts"):
        assert max(result.values()) < 5e-6, (kind, result)


def test_what_is_refused(found):
    for _, result in found("refused"):
        said = result["said"]
        for what in ("merge", "merge and unload", "layer", "change"):
            assert said[what].startswith("Cannot merge or unmerge") and "merge_and_unload()" in said[what], what
        for what in ("add", "load"):
            assert said[what].startswith("Cannot add adapter 'other'") and "load_adapter(folder" in said[what], what
        assert said["average"].startswith("Cannot average this model: DeepSpeed ZeRO-3")
        assert result["same"]
    for _, result in found("schedule"):
        assert "automatic = False" in result["said"]


def test_trainer(found):
    for _, result in found("trainer"):
        assert result["weights"] < 5e-6 and result["checkpoint"] == 0.0, result
        assert result["resumed"] < 1e-6, result
