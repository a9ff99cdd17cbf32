"""transformers' tensor parallelism, two processes on one machine: as in one process."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.version import Version
from processes import launch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.17"), reason="spreads weights by other means before 5.17"
)
WORKER = Path(__file__).parent / "tensor_parallel_worker.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return launch(str(WORKER), 2, tmp_path_factory.mktemp("tp"))


def close(found: dict, *names: str, limit: float = 2e-5) -> None:
    for name in names:
        assert found[name] < limit, (name, found[name])


def test_training(ranks):
    for rank in ranks:
        found = rank["training"]
        close(found, "logits", "gradients", "checkpointed")
        assert found["trained"]
        assert found["after three steps"] < 1e-3  # AdamW divides small numbers by small numbers
        assert found["autocast"] < 0.02
    assert ranks[0]["training"]["shares"] == ranks[1]["training"]["shares"] > 0


def test_adapters(ranks):
    for rank in ranks:
        found = rank["adapters"]
        close(found, "inference", "rows", "second", "disabled", "together", "combined", "after deleting")
        assert found["generated"]


def test_dropout(ranks):
    for rank in ranks:
        found = rank["dropping"]
        close(found, "same everywhere", "checkpointed")
        assert found["drawn anew"] > 1e-2
        assert found["evaluation"] == 0


def test_files(ranks):
    for rank in ranks:
        found = rank["files"]
        close(found, "read by PEFT", "loaded", "loaded beside", "swapped")
        assert found["trainable"]


@pytest.mark.parametrize(
    ("what", "message"),
    {
        "dora": "starts from the weight, which no process has whole",
        "pissa": "starts from the weight, which no process has whole",
        "ia3": "can have a plain LoRA only, no IA3Config",
        "adalora": "can have a plain LoRA only, no AdaLoraConfig",
        "head": "'lm_head' cannot be trained in full or in part",
        "adapted head": r"'lm_head', spread by \['colwise_gather_output'\], cannot be adapted",
        "tokens": "embed_tokens' cannot be trained in full or in part",
        "embedding": r"embed_tokens', spread by \['embedding_rowwise'\], cannot be adapted",
        "merge": "merge in one process",
        "unload": "merge in one process",
    }.items(),
)
def test_refused_and_unchanged(ranks, what, message):
    for rank in ranks:
        assert re.search(message, rank["refused"][what]), rank["refused"][what]
        assert rank["refused"]["after"] == 0
