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


@pytest.mark.parametrize("change", [1.0, torch.nan])
def test_no_ratios_where_results_differ(change, capsys, few_tokens, monkeypatch):
    real = bench.contestants

    def broken(base, settings):
        models = real(base, settings)
        with torch.no_grad():
            [p for n, p in models["PEFT"].named_parameters() if "lora_B" in n][-1].add_(change)
        return models

    monkeypatch.setattr(bench, "contestants", broken)
    assert main([*TINY, "--dtype", "fp32"]) == 1
    text = capsys.readouterr().out
    assert "NO RATIOS" in text and "x base" not in text and "what to expect" not in text


def words(capsys, **seconds):
    turns = bench.Turns([])
    turns.seconds = {
        "frozen base": [1.0] * len(seconds["peftfast"]),
        **{name.replace("_", ", "): rounds for name, rounds in seconds.items()},
    }
    bench.expect(turns, turns, dict.fromkeys(turns.seconds, 8), True)
    return capsys.readouterr().out


def test_words_say_no_more_than_the_rounds(capsys):
    """PEFT takes a tenth more in every round, or as often less as more: then neither is said to be the faster."""
    slow = [1.2, 1.2, 2.4, 1.2, 1.2, 2.4, 1.2, 1.2]  # a machine that is slow for two of the rounds
    text = words(capsys, peftfast=slow, PEFT=[1.1 * t for t in slow])
    assert "takes +20 %" in text and "steps 1.10 times as fast" in text and "PEFT is faster" not in text
    text = words(capsys, peftfast=[1.1 * t for t in slow], PEFT=slow)
    assert "steps 0.91 times as fast" in text and "PEFT is faster here" in text
    text = words(capsys, peftfast=slow, PEFT=[t * (0.8 if i % 2 else 1.1) for i, t in enumerate(slow)])
    assert "as fast within what the rounds differ by (0.80 to 1.10 times)" in text and "PEFT is faster" not in text
    text = words(capsys, peftfast=slow[:3], PEFT=[1.1, 1.1, 2.5])  # of few rounds every one has to agree
    assert "(0.92 to 1.04 times)" in text


def test_blocks_pay_where_the_rounds_agree(capsys):
    plain = [1.2] * 8
    assert "of peftfast, blocks: a step takes +8 %" in words(capsys, peftfast=plain, peftfast_blocks=[1.08] * 8)
    assert "of peftfast: " in words(capsys, peftfast=plain, peftfast_blocks=[1.19] * 8)
    assert "of peftfast: " in words(capsys, peftfast=plain, peftfast_blocks=[1.0, 1.3] * 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "./nowhere"], "no such folder"),
        (["--target", "no_such_module"], "--target"),
        (["--r", "0"], "at least 1"),
        (["--device", "cuda:7"], "not available"),
        (["--seconds", "-1"], "above 0"),
        (["--seq-len", "513"], "512 positions"),
    ],
)
def test_refusals_are_one_line(capsys, arguments, message):
    assert main([*TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
