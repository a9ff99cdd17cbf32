"""Predicted traffic and memory of the launch files: against shapes of a real model, each other, and the files."""

from __future__ import annotations

import itertools

import pytest
import torch
from processes import ROOT, run
from training.tiny import VOCABULARY, llama, lora

import peftfast
from bench.launch.estimate import LAUNCHES, Model, estimate

LAUNCH = ROOT / "bench" / "launch"


@pytest.fixture(scope="module")
def real():
    """A model with every linear layer adapted and what its parameters take."""
    config = lora(peftfast, r=4, target_modules="all-linear")
    return peftfast.get_peft_model(llama(hidden_size=64, intermediate_size=128, dtype=torch.bfloat16), config)


@pytest.fixture(scope="module")
def model():
    return Model(hidden=64, layers=2, intermediate=128, vocabulary=VOCABULARY, kv=32)


def test_counts_are_those_of_a_real_model(real, model):
    trained = sum(p.nbytes for p in real.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in real.parameters() if not p.requires_grad and p.dim() == 2)  # without norms
    assert 4 * model.trained(4) == trained
    alone = estimate(model, "ddp", 1, "bf16", 4, 16)
    assert (alone.base, alone.training) == (frozen, 4 * trained)
    assert alone.adapter_traffic == alone.base_traffic == 0
    assert alone.memory == alone.base + alone.training + alone.activations


@pytest.mark.parametrize("gpus", [2, 8, 64])
def test_traffic(model, gpus):
    adapter, ring = 4 * model.trained(4), (gpus - 1) / gpus
    for stored in ("bf16", "nf4"):
        ddp = estimate(model, "ddp", gpus, stored, 4, 16)
        assert ddp.adapter_traffic == pytest.approx(2 * ring * adapter)
        assert ddp.base_traffic == 0
        fsdp = estimate(model, "fsdp2", gpus, stored, 4, 16)
        assert fsdp.adapter_traffic == pytest.approx(3 * ring * adapter)
        assert fsdp.base_traffic == pytest.approx(2 * ring * ddp.base)
        assert fsdp.training == pytest.approx(ddp.training / gpus)
    assert estimate(model, "zero3", gpus, "bf16", 4, 16) == estimate(model, "fsdp2", gpus, "bf16", 4, 16)


def test_more_gpus_take_less_memory_each_and_four_bits_less_than_sixteen():
    model = Model(4096, 32, 14336, 128256, 1024)
    for stored in ("bf16", "nf4"):
        sizes = [estimate(model, "fsdp2", n, stored, 16, 4096).memory for n in (8, 64)]
        assert sizes[1] < sizes[0] < estimate(model, "ddp", 8, stored, 16, 4096).memory
    for strategy, gpus in itertools.product(("ddp", "fsdp2"), (8, 64)):
        four, sixteen = (estimate(model, strategy, gpus, stored, 16, 4096) for stored in ("nf4", "bf16"))
        assert four.base < sixteen.base
        assert four.activations == sixteen.activations


def test_what_is_refused(model):
    for strategy, stored, named in (("dpp", "bf16", "'dpp'"), ("ddp", "int8", "nf4"), ("zero3", "nf4", "fsdp2")):
        with pytest.raises(ValueError, match=named):
            estimate(model, strategy, 8, stored, 4, 16)


def test_every_launch_file_has_a_line():
    named = {name.split(" ")[0].rstrip(",") for name, *_ in LAUNCHES}
    assert named == {f.name for f in LAUNCH.iterdir() if f.suffix in (".yaml", ".sh")}
    for name, _, _, gpus in LAUNCHES:
        if ".yaml" in name:
            text = (LAUNCH / name.split(",")[0]).read_text()
            assert f"num_processes: {gpus}\n" in text, name
    said = run([LAUNCH / "estimate.py"])
    assert all(name in said for name, *_ in LAUNCHES)
    assert said.startswith("PREDICTED, not measured")


def test_deepspeed_makes_one_training_of_all_nodes(monkeypatch):
    """Its own launcher, which Accelerate takes otherwise, wants a file of hosts; without one each node trains alone."""
    launch = pytest.importorskip("accelerate.commands.launch")
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    started = []
    monkeypatch.setattr(launch, "is_deepspeed_available", lambda: True)
    monkeypatch.setattr(launch, "deepspeed_launcher", started.append)
    options = ["--machine_rank", "1", "--main_process_ip", "head", "script.py"]
    file = LAUNCH / "accelerate-zero3-64.yaml"
    launch.launch_command(launch.launch_command_parser().parse_args(["--config_file", str(file), *options]))
    (args,) = started
    command, _ = prepare_deepspeed_cmd_env(args)
    assert command is None  # torchrun's, with what follows
    assert (args.nnodes, args.node_rank, args.nproc_per_node) == ("8", 1, "8")
    assert args.rdzv_endpoint == "head:29500"
