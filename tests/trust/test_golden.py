"""Adapters that PEFT 0.3 to 0.21 wrote (`golden/make.py`) load, and give the logits those releases computed."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_safetensors
from trust.golden import model as base

import peftfast
from peftfast.files.migrate import expert_layout, migrate_config, migrate_keys

GOLDEN = Path(__file__).parent / "golden"
ARCHIVE = zipfile.ZipFile(io.BytesIO((GOLDEN / "adapters.zip").read_bytes()))
CASES = sorted({tuple(name.split("/")[:2]) for name in ARCHIVE.namelist() if name.count("/") == 2})
RELEASES = sorted({release for release, _ in CASES}, key=lambda v: [int(x) for x in v.split(".")])


def unpack(release: str, case: str, folder: Path) -> Path:
    for name in ARCHIVE.namelist():
        if name.startswith(f"{release}/{case}/"):
            (folder / Path(name).name).write_bytes(ARCHIVE.read(name))
    return folder


def test_every_minor_release_is_there():
    assert [r.rpartition(".")[0] for r in RELEASES] == [f"0.{minor}" for minor in range(3, 22)]
    assert len(CASES) > 200


@pytest.mark.parametrize("release, case", CASES, ids=lambda v: v)
def test_old_adapter_gives_its_logits(release, case, tmp_path):
    folder = unpack(release, case, tmp_path)
    if case == "lora_bias_only" and RELEASES.index("0.7.1") <= RELEASES.index(release) <= RELEASES.index("0.20.0"):
        with pytest.warns(peftfast.AdapterMismatchWarning, match="the file has no biases"):
            peftfast.PeftModel.from_pretrained(base.Tiny(), folder)
        return  # those releases lost the biases when they saved, so nobody can give their logits
    expected = load_safetensors(ARCHIVE.read(f"{release}/logits.safetensors"))[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error", peftfast.AdapterMismatchWarning)
        model = peftfast.PeftModel.from_pretrained(base.Tiny(), folder)
    with torch.no_grad():
        torch.testing.assert_close(model(base.inputs()), expected, rtol=1e-5, atol=1e-5)
        with model.disable_adapter():  # an adapter that does nothing would pass the line above, were it the base's
            assert (model(base.inputs()) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("release", RELEASES)
def test_saved_again_it_is_what_todays_peft_reads(release, tmp_path):
    import peft

    old = tmp_path / "old"
    old.mkdir()
    model = peftfast.PeftModel.from_pretrained(base.Tiny(), unpack(release, "lora_bias_all", old))
    model.save_pretrained(tmp_path / "new")
    expected = load_safetensors(ARCHIVE.read(f"{release}/logits.safetensors"))["lora_bias_all"]
    theirs = peft.PeftModel.from_pretrained(base.Tiny(), tmp_path / "new").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(base.inputs()), expected, rtol=1e-5, atol=1e-5)


def test_keys_under_two_names_are_refused():
    tensors = {"m.q.lora_A.weight": torch.zeros(1), "m.q.bias": torch.zeros(1), "m.q.base_layer.bias": torch.ones(1)}
    with pytest.raises(peftfast.AdapterLoadError, match="m.q.base_layer.bias"):
        migrate_keys(tensors)


def test_weights_and_biases_of_adapted_modules():
    """Which before 0.6 were the base's own."""
    old = ("e.lora_embedding_A", "e.weight", "q.ia3_l", "q.bias", "q.ia3_l.more", "other.weight", "q2.bias")
    new = [{"e.weight": "e.base_layer.weight", "q.bias": "q.base_layer.bias"}.get(key, key) for key in old]
    tensors = {key: torch.full((1,), float(i)) for i, key in enumerate(old)}
    assert {key: int(t) for key, t in migrate_keys(tensors).items()} == {key: i for i, key in enumerate(new)}


def test_a_schedule_without_an_end():
    """What AdaLoRA's configs might be up to 0.13."""
    for fields in ({}, {"tfinal": 5}, {"tinit": 200}, {"tinit": 200, "tfinal": 100}):
        config = peftfast.PeftConfig.from_dict(migrate_config({"peft_type": "ADALORA", "total_step": None, **fields}))
        assert config.total_step == sum(fields.values()) + 1
    assert migrate_config({"peft_type": "ADALORA", "total_step": 7, "tinit": 1})["total_step"] == 7


def test_configs_of_0_2_are_refused_by_name():
    with pytest.raises(ValueError, match="enable_lora"):
        migrate_config({"peft_type": "LORA", "enable_lora": [True, False, True]})
    assert migrate_config({"peft_type": "LORA", "merge_weights": False, "enable_lora": None}) == {"peft_type": "LORA"}


@pytest.mark.parametrize(
    "version, transposed, expected",
    [("0.18.1", False, "first"), ("0.19.0", False, "second"), ("0.19.0", True, "first"), ("0.18.0.rc0", True, "first")],
)
def test_square_experts_by_version(version, transposed, expected):
    assert expert_layout(version, (4, 8), (8, 4), (2, 8, 8), transposed) == expected


def test_experts_by_shape_and_ambiguous_ones_refused():
    assert expert_layout(None, (4, 8), (6, 4), (2, 8, 6), False) == "first"
    assert expert_layout(None, (4, 6), (8, 4), (2, 8, 6), False) == "second"
    with pytest.raises(peftfast.AdapterLoadError, match="square"):
        expert_layout(None, (4, 8), (8, 4), (2, 8, 8), False)
    with pytest.raises(peftfast.AdapterLoadError, match="neither"):
        expert_layout("0.19.0", (4, 8), (7, 4), (2, 8, 6), False)


def test_the_experts_rule_is_what_those_releases_do():
    """`golden/experts.json`: shapes that PEFT 0.18.1 and 0.19.1 gave the factors of a [3, 4, 6] parameter."""
    for release, a, b, transposed, expected in json.loads((GOLDEN / "experts.json").read_text()):
        assert expert_layout(release, a, b, (3, 4, 6), transposed) == expected
