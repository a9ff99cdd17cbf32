"""`peftfast bench`: what it prints, what it refuses, and that it prints no ratio for results that differ."""

import re

import pytest
import torch

from peftfast.cli import bench, main

TINY = ["bench", "--batch-size", "1", "--seq-len", "8", "--r", "2", "--seconds", "0.01"]


@pytest.fixture
def few_tokens(monkeypatch):
    monkeypatch.setattr(bench, "DECODED", 2)


def test_few_tokens_on_a_cpu_use_no_blocks(capsys, few_tokens):
    assert main(TINY) == 0
    text = capsys.readouterr().out
    assert re.search(r"^blocks: 0 of \d+ in use: so few tokens are left to the layers$", text, re.M)
    assert "peftfast, blocks" not in text and "blocks pay" not in text  # what is not in use is not compared


@pytest.mark.usefixtures("large_products")
def test_on_the_embedded_model(capsys, few_tokens):
    assert main(TINY) == 0
    text = capsys.readouterr().out
    assert "10 of 10 in use" in text and "the embedded model in fp32 on cpu" in text
    for section in ("training step", "decoding, 1 sequence(s)", "what to expect"):
        assert section in text
    rows = re.findall(r"^  (frozen base|peftfast|peftfast, blocks|PEFT) +[\d.]+ ms +([\d.]+) x base", text, re.M)
    assert [name for name, _ in rows] == ["frozen base", "peftfast", "peftfast, blocks", "PEFT"] * 2
    assert text.count("MiB kept for backward") == 4 and "against PEFT: steps" in text
    kept = dict(re.findall(r"^  (\S.*?\S) {2,}.* ([\d.]+) MiB kept", text, re.M))
    assert float(kept["peftfast, blocks"]) < float(kept["peftfast"]) <= float(kept["PEFT"])


def test_no_ratios_where_results_differ(capsys, few_tokens, monkeypatch):
    real = bench.contestants

    def broken(base, settings):
        models = real(base, settings)
        with torch.no_grad():
            next(p for n, p in models["PEFT"].named_parameters() if "lora_B" in n).add_(1.0)
        return models

    monkeypatch.setattr(bench, "contestants", broken)
    assert main([*TINY, "--dtype", "fp32"]) == 1
    text = capsys.readouterr().out
    assert "NO RATIOS" in text and "x base" not in text and "what to expect" not in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "./nowhere"], "no such folder"),
        (["--target", "no_such_module"], "--target"),
        (["--r", "0"], "at least 1"),
        (["--device", "cuda:7"], "not available"),
        (["--seconds", "-1"], "above 0"),
    ],
)
def test_refusals_are_one_line(capsys, arguments, message):
    assert main([*TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
