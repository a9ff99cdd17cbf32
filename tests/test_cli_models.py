"""`peftfast merge` and `peftfast extract`: models out of adapters, adapters out of models."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftfast
from peftfast.cli import BROKEN_PIPE, USAGE_ERROR, main
from peftfast.cli._settings import EMBEDDED_BASE

IDS = torch.arange(24)[None]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """AdaLoRA on the embedded model, with some of its ranks gone."""
    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED_BASE, dtype=torch.float32)
    torch.manual_seed(0)
    config = peftfast.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM",
        init_lora_weights=False,
    )  # fmt: skip
    model = peftfast.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.2)
            if "lora_E" in name:
                parameter[::2] = 0
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def expected(adapter):
    return logits(peftfast.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32))


def base():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_BASE, dtype=torch.float32)


def test_merge_writes_a_model_with_its_tokenizer(adapter, tmp_path, capsys):
    assert main(["merge", str(adapter), "--output", str(tmp_path / "new" / "model"), "--dtype", "fp32"]) == 0
    said = capsys.readouterr()
    assert "LlamaForCausalLM" in said.out and "inside" in said.out and not said.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "model", dtype=torch.float32)
    torch.testing.assert_close(logits(model), expected(adapter), rtol=1e-4, atol=1e-4)
    assert os.listdir(tmp_path / "new") == ["model"]
    names = os.listdir(tmp_path / "new" / "model")
    assert "tokenizer_config.json" in names and not [n for n in names if n.startswith("adapter")]


def test_a_plain_lora_of_another_kind_and_of_the_merged_model(adapter, tmp_path, capsys):
    assert main(["extract", "--adapter", str(adapter), "--r", "4", "--output", str(tmp_path / "plain")]) == 0
    said = capsys.readouterr().out
    size = sum(t.nbytes for t in load_file(tmp_path / "plain" / "adapter_model.safetensors").values())
    assert "1.0000 to 1.0000 of the change kept" in said and f" tensors, {size / 1000:,.1f} kB; " in said
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == str(EMBEDDED_BASE)
    plain = peftfast.PeftModel.from_pretrained(base(), tmp_path / "plain", strict=True)
    torch.testing.assert_close(logits(plain), expected(adapter), rtol=1e-4, atol=1e-4)
    merged = ["merge", str(adapter), "--output", str(tmp_path / "model"), "--dtype", "fp32"]
    again = ["extract", "--tuned", str(tmp_path / "model"), "--model", "embedded", "--dtype", "fp32", "--r", "2"]
    assert main(merged) == 0 and main([*again, "--output", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    model = peftfast.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    torch.testing.assert_close(logits(model), expected(adapter), rtol=1e-4, atol=1e-4)  # two are what pruning left


def test_an_adapter_with_more_tokens(tmp_path, capsys):
    """Its base has to be resized first, also for what is made of it."""
    tokenizer, model = AutoTokenizer.from_pretrained(EMBEDDED_BASE), base()
    tokenizer.add_tokens(["<one>", "<two>"])
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer))
    config = peftfast.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peftfast.get_peft_model(model, config)
    ids = torch.tensor([[5, len(tokenizer) - 1, 7, len(tokenizer) - 2]])
    with pytest.warns(UserWarning, match="resized"):
        model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    adapter, plain = str(tmp_path / "adapter"), str(tmp_path / "plain")
    assert main(["extract", "--adapter", adapter, "--r", "4", "--output", plain, "--dtype", "fp32"]) == 0
    for source in (adapter, plain):
        output = tmp_path / f"merged {Path(source).name}"
        assert main(["merge", source, "--output", str(output), "--dtype", "fp32"]) == 0, capsys.readouterr().err
        merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
        assert len(AutoTokenizer.from_pretrained(output)) == len(tokenizer)
        with torch.no_grad():
            torch.testing.assert_close(merged(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options, parts",
    [
        (["merge", "ADAPTER", "--output", "FULL"], ["FULL", "nothing is overwritten"]),
        (["merge", "ADAPTER", "--output", "FULL/notes.txt"], ["notes.txt", "nothing is overwritten"]),
        (["merge", "ADAPTER", "--output", "FULL/notes.txt/new"], ["cannot write to", "notes.txt"]),
        (["merge", "FULL", "--output", "new"], ["FULL", "adapter_config.json"]),
        (["merge", "NAMELESS", "--output", "new"], ["NAMELESS", "give --model"]),
        (["merge", "ADAPTER", "--output", "new", "--model", "./nowhere"], ["'./nowhere'"]),
        (["extract", "--adapter", "ADAPTER", "--r", "4", "--output", "FULL"], ["FULL", "nothing is overwritten"]),
        (["extract", "--adapter", "ADAPTER", "--r", "4"], ["--output"]),
        (["extract", "--model", "embedded", "--r", "4", "--output", "new"], ["--tuned", "--adapter"]),
        (["extract", "--adapter", "ADAPTER", "--output", "new"], ["--r", "--keep"]),
        (["extract", "--adapter", "ADAPTER", "--keep", "2", "--output", "new"], ["--keep", "'2'"]),
        (["extract", "--adapter", "ADAPTER", "--r", "4000", "--output", "new"], ["4000 is larger than the weight"]),
        (["extract", "--tuned", "embedded", "--r", "4", "--output", "new"], ["give --model"]),
        (["extract", "--tuned", "./no", "--model", "embedded", "--r", "4", "--output", "new"], ["--tuned", "'./no'"]),
        (["extract", "--tuned", "embedded", "--model", "embedded", "--r", "4", "--output", "new"], ["do not differ"]),
    ],
)
def test_refusals_in_one_line(adapter, tmp_path, capsys, options, parts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    full = tmp_path / "FULL"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    nameless = tmp_path / "NAMELESS"
    nameless.mkdir()
    (nameless / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": null}')
    options = [str(adapter) if o == "ADAPTER" else o for o in options]
    assert main(options) == USAGE_ERROR
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(part in err for part in parts), err
    assert err.startswith(f"peftfast {options[0]}: error: ")
    assert sorted(os.listdir(tmp_path)) == ["FULL", "NAMELESS"] and os.listdir(full) == ["notes.txt"]


def test_a_missing_tokenizer_is_said_before_a_model_is_loaded(adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("peftfast.cli._setup.load_stored", lambda *args: pytest.fail("loaded"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((EMBEDDED_BASE / "config.json").read_bytes())
    assert main(["merge", str(adapter), "--model", str(model), "--output", str(tmp_path / "new")]) == USAGE_ERROR
    err = capsys.readouterr().err
    assert err.startswith(f"peftfast merge: error: {str(model)!r}: no tokenizer could be loaded: ")


@pytest.mark.parametrize("command", [["merge"], ["extract", "--r", "2", "--adapter"]], ids=["merge", "extract"])
def test_an_adapters_broken_tokenizer_is_said_before_a_model_is_loaded(adapter, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr("peftfast.cli._setup.load_stored", lambda *args: pytest.fail("loaded"))
    own = tmp_path / "own"
    shutil.copytree(adapter, own)
    (own / "tokenizer_config.json").write_text("{")
    assert main([*command, str(own), "--output", str(tmp_path / "new")]) == USAGE_ERROR
    assert f"{str(own)!r}: no tokenizer could be loaded: " in capsys.readouterr().err


def test_what_cannot_be_written_is_one_line_and_leaves_nothing(adapter, tmp_path, capsys, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fails)
    monkeypatch.setattr("safetensors.torch.save_file", fails)
    output = str(tmp_path / "new")
    for command in (["merge", str(adapter)], ["extract", "--adapter", str(adapter), "--r", "2"]):
        assert main([*command, "--output", output]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and output in err and "disk full" in err
        assert not any(files for *_, files in os.walk(tmp_path))


@pytest.mark.parametrize("kind", ["here", "link", "link to nothing yet"])
def test_merge_into_an_empty_folder_whatever_its_name(kind, adapter, tmp_path, monkeypatch):
    real, link = tmp_path / "real", tmp_path / "link"
    if kind != "link to nothing yet":
        real.mkdir()
    if kind == "here":
        monkeypatch.chdir(real)
    else:
        link.symlink_to(real)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(["merge", str(adapter), "--output", "." if kind == "here" else str(link)])
    assert kind == "link to nothing yet" or os.listdir(real) == []
    assert main(["merge", str(adapter), "--output", "." if kind == "here" else str(link), "--dtype", "fp32"]) == 0
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32)), expected(adapter), rtol=1e-4, atol=1e-4
    )
    assert kind == "here" or link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == (["real"] if kind == "here" else ["link", "real"])
    if kind == "here":  # whoever is there sees it
        assert "config.json" in os.listdir(".")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_who_reads_a_part_of_the_output_gets_it(adapter, unbuffered):
    command = [sys.executable, "-m", "peftfast", "inspect", str(adapter)]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == BROKEN_PIPE


def test_where_there_is_nobody_to_say_it_to(adapter, monkeypatch):
    """A daemon's output is closed."""
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["inspect", str(adapter)]) == 0


def test_what_a_terminal_cannot_show_is_escaped(adapter, tmp_path):
    (tmp_path / "é").symlink_to(adapter)
    said = run(["-m", "peftfast", "merge", "é", "--output", "ü"], tmp_path, PYTHONIOENCODING="ascii")
    assert "\\xfc" in said and "\\xe9" in said and (tmp_path / "ü" / "config.json").is_file()


def test_where_peft_is_not_installed_the_share_is_still_said(adapter, tmp_path):
    """Something else is logged then."""
    code = "import sys, training.hide_peft as h; h.hide(); from peftfast.cli import main; sys.exit(main(sys.argv[1:]))"
    assert main(["merge", str(adapter), "--output", str(tmp_path / "model")]) == 0
    tuned = ["--tuned", str(tmp_path / "model"), "--model", "embedded"]  # whose config is made last
    said = run(["-c", code, "extract", *tuned, "--r", 4, "--output", tmp_path / "new"])
    assert "of the change kept" in said and "answers to the name" not in said


def test_prompts_are_in_no_weight(tmp_path, capsys):
    model = peftfast.get_peft_model(base(), peftfast.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "prompt")
    assert main(["merge", str(tmp_path / "prompt"), "--output", str(tmp_path / "model")]) == USAGE_ERROR
    assert "virtual tokens are part of no weight" in capsys.readouterr().err
