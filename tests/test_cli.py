"""The command: what it prints, what it writes, what it refuses, how it stops and continues."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracle import llama
from processes import environment, run
from safetensors.torch import load_file

from peftfast.cli import (
    INTERRUPTED,
    USAGE_ERROR,
    UserError,
    _checks,
    _data,
    _loop,
    _settings,
    _setup,
    main,
    make_parser,
)
from peftfast.cli._data import IGNORED, Corpus, Document, Row
from peftfast.errors import warn

BASE = _settings.EMBEDDED_BASE
#: Small enough for a second or two; sampling is most of it.
QUICK = ["--steps", "2", "--batch-size", "2", "--seq-len", "32"]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(autouse=True)
def small_and_offline(monkeypatch):
    monkeypatch.setattr(_checks, "SAMPLE_TOKENS", 4)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A folder with a very small model whose tokenizer has a chat template."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("chat")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    return str(folder)


def train(folder, *options) -> int:
    return main(["train", "--output", str(folder), *map(str, options)])


def lines(path: Path, values) -> str:
    path.write_text("\n".join(json.dumps(v) for v in values), encoding="utf-8")
    return str(path)


# ---- the embedded model ----------------------------------------------------------------------------------------------
def test_embedded_model_fits_in_5_mb_and_has_learned(tokenizer):
    from transformers import AutoModelForCausalLM

    assert sum(f.stat().st_size for f in BASE.iterdir()) <= 5_000_000
    text = 'def f(self, x):\n    """Return the sum."""\n    return self.x + 1\né€'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    # The adapter's text, which neither tokenizer nor model has seen: a model without context scores above 6 nats.
    rows = _data.tokenize(_data.topics(), tokenizer, 256, None).held_out[:8]
    assert _loop.evaluate(model, rows, 0, 8, "cpu") < 4.5


def test_topics_hold_out_whole_paragraphs():
    corpus = _data.topics()
    train_text, held = (
        {" ".join(p.split()) for d in docs for p in _data.paragraphs(d.text)}
        for docs in (corpus.train, corpus.held_out)
    )
    assert len(train_text) > 500 and len(held) > 50
    assert not train_text & held


# ---- the main job ----------------------------------------------------------------------------------------------------
def test_train_says_what_happened(tmp_path, capsys):
    assert train(tmp_path / "a", *QUICK) == 0
    out = capsys.readouterr().out
    parts = ["LlamaForCausalLM", "trainable", "nats/token", "tokens/s", "kB", "without the adapter", "with the adapter"]
    parts += ["adapter_model.safetensors", "trained and reloaded", "trained and merged", "reloaded yes; merged yes"]
    for part in parts:
        assert part in out, part
    assert out.isascii()
    assert "EXCEEDS" not in out


def test_adapter_loads_in_peft_with_equal_logits(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    import peftfast

    assert train(tmp_path / "a", *QUICK, "--r", 4, "--target", "q_proj,v_proj", "--target", "up_proj") == 0
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], sorted(config["target_modules"])) == (4, ["q_proj", "up_proj", "v_proj"])
    ids = torch.arange(24)[None]

    def logits(api):
        base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        return api.PeftModel.from_pretrained(base, tmp_path / "a").eval()(input_ids=ids).logits

    with torch.no_grad():
        theirs, ours = logits(peft), logits(peftfast)
    assert (theirs - ours).abs().max() <= 64 * torch.finfo(torch.float32).eps * theirs.abs().max()


def test_training_lowers_the_loss(tmp_path, capsys):
    assert train(tmp_path / "a", "--steps", 12, "--batch-size", 4, "--seq-len", 64) == 0
    change = capsys.readouterr().out.split("on held-out text (")[1].split(")")[0]
    assert float(change) < 0


def test_command_in_a_process_of_its_own(tmp_path):
    assert "Summary" in run(["-m", "peftfast", "train", *QUICK], tmp_path)
    assert (tmp_path / "peftfast-adapter" / "adapter_model.safetensors").is_file()


def test_settings_reach_config_and_model(tmp_path, capsys):
    options = ["--alpha", 6, "--dropout", 0.25, "--set", "use_rslora=true", "--set", "init_lora_weights=gaussian"]
    assert train(tmp_path / "a", *QUICK, *options, "--dtype", "bf16", "--gradient-checkpointing", "--seed", 3) == 0
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    found = {k: config[k] for k in ("lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights")}
    assert found == {"lora_alpha": 6, "lora_dropout": 0.25, "use_rslora": True, "init_lora_weights": "gaussian"}
    out = capsys.readouterr().out
    assert "bf16" in out and "seed 3" in out
    assert {t.dtype for t in load_file(tmp_path / "a" / "adapter_model.safetensors").values()} == {torch.float32}


def test_adalora_is_scheduled_over_the_run(tmp_path):
    assert train(tmp_path, *QUICK, "--method", "adalora") == 0
    steps = int(QUICK[QUICK.index("--steps") + 1])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["total_step"] == steps


def test_the_rank_of_adalora_is_the_one_it_starts_with(tmp_path, capsys):
    assert train(tmp_path, *QUICK, "--method", "adalora", "--r", 6, "--set", "target_r=3") == 0
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["init_r"], config["target_r"]) == (6, 3)
    out = capsys.readouterr().out
    assert "adalora, r 6, alpha 16" in out and "warning" not in out


def test_trainable_tokens_are_rows_of_the_embedding(tmp_path, capsys):
    assert train(tmp_path, *QUICK, "--method", "trainable_tokens", "--set", "token_indices=[1, 2]") == 0
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "model.embed_tokens"
    assert "modules: model.embed_tokens\n" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_quantised_on_a_cpu_that_bitsandbytes_repacks_for(tmp_path, kind, monkeypatch):
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    assert train(tmp_path, *QUICK, "--quantize", kind) == 0
    settings = {**_settings.DEFAULTS, "dtype": "bf16", "quantize": kind, "device": "cpu"}
    layers = [m for m in _setup.load_base(str(BASE), settings).modules() if isinstance(m, modules.Linear4bit)]
    assert {(m.support_avx512bf16_for_cpu, m.compute_dtype) for m in layers} == {(False, torch.bfloat16)}


@pytest.mark.filterwarnings("error::FutureWarning")
def test_gradient_checkpointing_changes_no_number(tmp_path, monkeypatch):
    real, on = _loop.Run.one_step, []

    def one_step(self):
        on.append(any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()))
        return real(self)

    monkeypatch.setattr(_loop.Run, "one_step", one_step)
    train(tmp_path / "a", *QUICK)
    train(tmp_path / "b", *QUICK, "--gradient-checkpointing")
    assert on == [False, False, True, True]
    a, b = (load_file(tmp_path / f / "adapter_model.safetensors") for f in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("which", "said"), [(3, "reloaded NO, see above; merged yes"), (4, "reloaded yes; merged NO")])
def test_logits_that_differ_fail_the_command(tmp_path, capsys, monkeypatch, which, said):
    real = _checks.logits
    calls = []

    def wrong(model, batch):  # the third is the reloaded model's, the fourth the merged one's
        calls.append(model)
        return real(model, batch) + (0.1 if len(calls) == which else 0.0)

    monkeypatch.setattr(_checks, "logits", wrong)
    assert train(tmp_path / "a", *QUICK) == 1
    out = capsys.readouterr().out
    assert "EXCEEDS" in out and said in out


def test_out_of_memory_is_one_line_that_says_what_needs_less(tmp_path, capsys, monkeypatch):
    def too_much(self):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    monkeypatch.setattr(_loop.Run, "one_step", too_much)
    assert train(tmp_path / "a", *QUICK) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "3 GiB" in err and "smaller --batch-size" in err


@pytest.mark.parametrize(
    ("setting", "why"),
    [("alora_invocation_tokens=[1, 2]", "aLoRA does not support merging"), ("lora_bias=true", "Impossible to merge")],
)
def test_what_does_not_merge_is_not_merged(setting, why, tmp_path, capsys):
    assert train(tmp_path / "a", *QUICK, "--set", setting) == 0
    out = capsys.readouterr().out
    assert f"not applicable, {why}" in out and "reloaded yes; merged not applicable" in out


def test_a_prompt_starts_from_text_in_the_models_tokens(tmp_path):
    options = ["num_virtual_tokens=2", "prompt_tuning_init=TEXT", "prompt_tuning_init_text=The for statement"]
    assert train(tmp_path, *QUICK, "--method", "prompt_tuning", *(f"--set={option}" for option in options)) == 0
    assert json.loads((tmp_path / "adapter_config.json").read_text())["tokenizer_name_or_path"] == str(BASE)


def test_env(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert "peftfast" in out and torch.__version__ in out and out.isascii()


def test_letters_that_the_output_has_not_are_written_as_numbers(monkeypatch):
    """What is redirected on Windows has an encoding of few letters."""
    written = io.BytesIO()
    monkeypatch.setenv("PEFTFAST_TABLES", "a folder \N{HIRAGANA LETTER A}")
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="cp1252"))
    assert main(["env"]) == 0
    assert rb"a folder \u3042" in written.getvalue()


def test_intels_gpus_are_found(monkeypatch, capsys):
    gpu = SimpleNamespace(name="Arc", total_memory=2**34, has_fp64=False)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert [_setup.choose_device(name) for name in (None, "xpu", "xpu:1", "cpu")] == ["xpu", "xpu", "xpu:1", "cpu"]
    with pytest.raises(UserError, match="'xpu:2' is not available here; choose from xpu:0, xpu:1, "):
        _setup.choose_device("xpu:2")
    assert main(["env"]) == 0
    assert "GPU 1 " in (out := capsys.readouterr().out) and "Arc, 16.0 GiB, fp64: False" in out


def test_other_devices_are_waited_for_and_keep_their_random_numbers(monkeypatch):
    waited, states = [], {"mps": torch.tensor([1])}
    module = SimpleNamespace(
        get_rng_state=states.get, set_rng_state=lambda state, device: states.update({device: state})
    )
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: waited.append(device.type))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    _loop.synchronize("mps")
    _loop.synchronize("cpu")
    assert waited == ["mps"]
    kept = _loop.random_numbers("mps")
    states["mps"] = torch.tensor([2])
    for other in (None, ("cuda", torch.tensor([3]))):
        _loop.set_random_numbers("mps", other)
    assert states["mps"] == 2 and _loop.random_numbers("cpu") is None
    _loop.set_random_numbers("mps", kept)
    assert states["mps"] == 1


@pytest.mark.parametrize("options", [["--help"], ["--version"], ["train", "--help"]])
def test_help_does_not_import_torch(options):
    code = "import sys\nfrom peftfast.cli import main\n"
    code += f"try:\n    main({options})\nexcept SystemExit as e:\n    assert not e.code\n"
    code += "assert 'torch' not in sys.modules, 'torch was imported'"
    assert "peftfast" in run(["-c", code])


def test_no_command_prints_help(capsys):
    assert main([]) == USAGE_ERROR
    assert "COMMAND" in capsys.readouterr().out


def test_run_lacks_its_script_and_nothing_else(capsys):
    assert main(["run"]) == USAGE_ERROR
    assert capsys.readouterr().err == "peftfast run: error: the following arguments are required: script\n"


def test_quantized_merging_is_not_called_equal(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    assert train(tmp_path / "a", *QUICK, "--quantize", "nf4") == 0
    out = capsys.readouterr().out
    assert "stored as nf4" in out and "reloaded yes; merged no, rounded to nf4 again" in out


# ---- data ------------------------------------------------------------------------------------------------------------
def test_text_file(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("The cat sat on the mat.\n" * 200)
    assert train(tmp_path / "a", *QUICK, "--data", tmp_path / "t.txt") == 0
    assert "t.txt" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["lines", "list", "mark"])
def test_jsonl_with_prompt_and_completion(tmp_path, capsys, form):
    values = [{"prompt": f"{i} plus one is", "completion": f" {i + 1}"} for i in range(20)]
    path = lines(tmp_path / "d.jsonl", values)
    if form == "list":
        path = str(tmp_path / "d.json")
        Path(path).write_text(json.dumps(values))
    elif form == "mark":  # as editors on Windows put it in front
        Path(path).write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes())
    assert train(tmp_path / "a", *QUICK, "--data", path) == 0
    out = capsys.readouterr().out
    assert "18 documents" in out and "2 documents" in out


def test_jsonl_with_messages(tmp_path, chat_model):
    values = [
        {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "ho"}]} for i in range(6)
    ]
    assert train(tmp_path / "a", *QUICK, "--data", lines(tmp_path / "d.jsonl", values), "--model", chat_model) == 0


def test_loss_is_on_the_completion_only(tokenizer):
    doc = Document("d", prompt="Question:", completion=" answer")
    row = _data.masked_row(_data.pieces(doc, tokenizer))
    prompt = tokenizer("Question:")["input_ids"]
    answer = [*tokenizer(" answer", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert row.ids == prompt + answer
    assert row.labels == [IGNORED] * len(prompt) + answer


def test_loss_is_on_every_answer_of_a_conversation(chat_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    roles = ["user", "assistant", "user", "assistant", "user"]
    doc = Document("d", messages=[{"role": r, "content": f"{r} {i}"} for i, r in enumerate(roles)])
    row = _data.masked_row(_data.pieces(doc, tokenizer))
    assert tokenizer.decode(row.ids) == tokenizer.apply_chat_template(doc.messages, tokenize=False)
    learned = tokenizer.decode([i for i, label in zip(row.ids, row.labels, strict=True) if label != IGNORED])
    assert learned == "assistant 1\nassistant 3\n"


def test_evaluation_weighs_tokens_not_batches(tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    ids = tokenizer("import os, sys, re, json")["input_ids"]
    rows = [Row(ids, list(ids)), Row(ids, [IGNORED] * (len(ids) - 2) + ids[-2:]), Row(ids[:3], ids[:3])]
    together = _loop.evaluate(model, rows, 0, 3, "cpu")
    apart = _loop.evaluate(model, rows, 0, 1, "cpu")
    assert math.isclose(together, apart, rel_tol=1e-5)


@pytest.mark.parametrize("config", ["AdaLoraConfig", "PromptTuningConfig"])
def test_evaluation_is_of_the_text_alone(tokenizer, config):
    """What a method adds to the loss, and the first token of a row after virtual ones, are no loss on the text."""
    from transformers import AutoModelForCausalLM

    import peftfast

    settings = {"total_step": 9} if config == "AdaLoraConfig" else {"num_virtual_tokens": 2}
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    ids = tokenizer("import os, sys, re, json")["input_ids"]
    rows = [Row(ids, list(ids)), Row(ids[:3], ids[:3])]
    model = peftfast.get_peft_model(base, getattr(peftfast, config)(task_type="CAUSAL_LM", **settings))
    total = count = 0
    with torch.no_grad():
        for row in rows:
            logits = model.eval()(input_ids=torch.tensor([row.ids])).logits[0, -len(row.ids) : -1]
            total += float(-logits.log_softmax(-1).gather(1, torch.tensor(row.ids[1:])[:, None]).sum())
            count += len(row.ids) - 1
    assert math.isclose(_loop.evaluate(model, rows, 0, 2, "cpu"), total / count, rel_tol=1e-5)


def test_long_and_empty_examples_are_reported(tokenizer):
    docs = [Document("d", prompt="x " * 40, completion="y"), Document("d", prompt="a", completion="b " * 40)]
    rows = _data.tokenize(Corpus("d", docs, docs[1:]), tokenizer, 16, None)
    assert len(rows.train) == 1 and len(rows.train[0].ids) == 16
    assert any("were cut" in n for n in rows.notes) and any("left out" in n for n in rows.notes)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
        ({"alpha": 0.5}, {"lora_alpha": 0.5}),
        ({"method": "AdaLoRA", "r": 5}, {"init_r": 5, "total_step": 120}),
        ({"method": "adalora", "set": {"init_r": 5, "total_step": 300}}, {"init_r": 5, "total_step": 300}),
        ({"method": "ia3", "r": 5}, "--r: IA3Config has no field r"),
        ({"method": "ia3", "dropout": 0.1}, "--dropout: IA3Config has no field lora_dropout"),
        (
            {"method": "prompt_tuning", "set": {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a",
                                                "tokenizer_name_or_path": "mine", "num_virtual_tokens": 2}},
            {"tokenizer_name_or_path": "mine"},
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_options_make_of_a_config(given, found):
    settings = _settings.with_defaults(given)
    if isinstance(found, str):
        with pytest.raises(UserError, match=found):
            _setup.make_config(settings)
    else:
        config = _setup.make_config(settings)
        values = {name: getattr(config, name) for name in found}
        assert values == found and {type(v) for v in values.values()} == {type(v) for v in found.values()}


def test_device_and_learning_rate_that_were_not_given(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert [_setup.choose_device(name) for name in (None, "cuda", "cuda:1", "cpu")] == ["cuda", "cuda", "cuda:1", "cpu"]
    for model, lr in (("embedded", 1e-2), ("owner/name", 2e-4)):
        settings = _settings.with_defaults({"model": model})
        _setup.complete(settings)
        assert (settings["device"], settings["dtype"], settings["lr"]) == ("cuda", "bf16", lr)


def test_warnings_are_lines_of_the_output(capsys):
    with _setup.quiet_libraries():
        warn("of two\nlines")
    assert capsys.readouterr() == ("  warning: of two lines\n", "")


class Ending:
    """A tokenizer that makes a word its length, and ends every text, as some do."""

    eos_token_id: int | None = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [len(word) for word in text.split()]
        return {"input_ids": [*ids, self.eos_token_id] if add_special_tokens and self.eos_token_id is not None else ids}


class Endless(Ending):
    eos_token_id = None


def test_texts_end_once():
    asked, texts = Document("d", prompt="a bb", completion="ccc"), [Document("d", text=t) for t in ("a bb", "dddd")]
    rows = _data.tokenize(Corpus("d", [asked, *texts], [asked]), Ending(), 3, None)
    assert [(row.ids, row.labels) for row in rows.train] == [([1, 2, 3], [IGNORED] * 2 + [3])] + [
        (ids, ids) for ids in ([1, 2, 0], [4, 0])
    ]
    assert rows.prompt == [1, 2]
    assert _data.tokenize(Corpus("d", [asked], [asked]), Ending(), 3, "a bb ccc").prompt == [1, 2, 3]
    assert _data.tokenize(Corpus("d", [asked], [asked]), Ending(), 9, None).train[0].ids == [1, 2, 3, 0]


class Chatting(Ending):
    chat_template = "role content"

    def apply_chat_template(self, messages: list, tokenize: bool, add_generation_prompt: bool) -> str:
        said = [f"{message['role']} {message['content']} " for message in messages]
        return "".join([*said, "assistant "] if add_generation_prompt else said)


def test_a_chat_template_brings_all_special_tokens():
    roles = ("user", "a"), ("assistant", "bb"), ("user", "ccc"), ("assistant", "dddd")
    doc = Document("d", messages=[{"role": role, "content": text} for role, text in roles])
    row = _data.masked_row(_data.pieces(doc, Chatting()))
    assert row.ids == [4, 1, 9, 2, 4, 3, 9, 4]
    assert row.labels == [IGNORED] * 3 + [2] + [IGNORED] * 3 + [4]


def test_rows_without_anything_to_predict_are_left_out():
    nothing = Document("d", prompt="", completion="a")  # the first token is never predicted
    rows = _data.tokenize(Corpus("d", [nothing, Document("d", text="a bb ccc")], [Document("d", text="a bb")]),
                          Endless(), 2, None)  # fmt: skip
    assert [row.ids for row in rows.train] == [[1, 2]] and rows.prompt == [1]
    (least,) = _data.to_rows([Document("d", prompt="a", completion="bb")], Endless(), 2, "", notes := [])
    assert (least.ids, least.labels) == ([1, 2], [IGNORED, 2]) and not notes
    other = _data.Rows([Row(rows.train[0].ids, [IGNORED, 2])], rows.held_out, rows.prompt)
    assert other.digest() != rows.digest()


def test_padding_is_neither_read_nor_learned():
    batch = {
        name: t.tolist() for name, t in _data.collate([Row([5, 6], [IGNORED, 6]), Row([7], [7])], 9, "cpu").items()
    }
    assert batch == {"input_ids": [[5, 6], [7, 9]], "attention_mask": [[1, 1], [1, 0]],
                     "labels": [[IGNORED, 6], [7, IGNORED]]}  # fmt: skip


def test_what_is_held_out_is_not_trained_on():
    documents = [Document(f"d{i}", prompt="a", completion="b") for i in range(3000)]
    for count, held in ((2, 1), (40, 4), (3000, 200)):
        corpora = [_data.split("d", documents[:count], seed) for seed in (0, 0, 1)]
        names = [[d.where for d in corpus.held_out] for corpus in corpora]
        assert len(names[0]) == held and names[0] == names[1] and (count == 2 or names[0] != names[2])
        assert sorted(d.where for d in (*corpora[0].train, *corpora[0].held_out)) == sorted(
            d.where for d in documents[:count]
        )
    for text in ("one line\n" * 21, "word " * 40, "one line\n" * 20 + "and a long one" * 9 + "\n"):
        corpus = _data.split("d", [Document("d", text=text)], 0)
        train, held = corpus.train[0].text, corpus.held_out[0].text
        assert train + held == text and len(train) >= len(text) * 0.9 - 1 and held
        assert "long" in text or train.endswith(text[-1])  # no line is cut


def test_objects_of_several_lines_are_read_and_named_by_their_first():
    documents = _data.json_documents('{\n "text": "a"\n}\n\n{ "text":\n "b"}\n[{"text": "c"}]', "d")
    assert {d.where: d.text for d in documents} == {"d, line 1": "a", "d, line 5": "b", "d, line 7, item 1": "c"}
    with pytest.raises(UserError, match="'d', line 4: not JSON: .* line 5 column 2"):
        _data.json_documents('{\n "text": "a"\n}\n{\n text: "b"\n}', "d")


def test_a_line_of_json_ends_where_json_says(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "a\u2028b"}\n{"text": "c\x85d"}', encoding="utf-8")
    corpus = _data.read(str(tmp_path / "d.jsonl"), 0)
    assert {d.text for d in (*corpus.train, *corpus.held_out)} == {"a\u2028b", "c\x85d"}


@pytest.mark.parametrize("parts", [("test", "train"), ("validation", "train"), ("train",), ("all",)])
def test_a_dataset_of_the_hub(parts, monkeypatch):
    class Rows(list):
        def take(self, count: int) -> list:
            return self[:count]

    stored = {part: Rows({"text": f"{part} {i}"} for i in range(300)) for part in parts}
    library = SimpleNamespace(load_dataset=lambda name: stored, __spec__=object())
    monkeypatch.setitem(sys.modules, "datasets", library)
    corpus = _data.read("owner/name", 0)
    train, held = ([d.text for d in documents] for documents in (corpus.train, corpus.held_out))
    if len(parts) == 2:
        assert train == [row["text"] for row in stored["train"]]
        assert held == [row["text"] for row in stored[parts[0]]][:200]
    else:
        assert len(held) == 30 and sorted(train + held) == sorted(row["text"] for row in stored[parts[0]])


def test_batches_are_passes_over_the_data():
    rows = [Row([i], [i]) for i in range(7)]
    seen = [r.ids[0] for step in range(7) for r in _data.batch_of_step(rows, step, 3, seed=5)]
    assert all(sorted(seen[i : i + 7]) == list(range(7)) for i in (0, 7, 14))
    assert seen[:7] != seen[7:14]


@pytest.fixture(scope="module")
def short_model(tmp_path_factory, tokenizer):
    """A folder with a very small model that has 40 positions, and a row of its table for each."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("short")
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": len(tokenizer), "n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return str(folder)


def test_samples_fit_into_the_models_positions(tmp_path, short_model, capsys):
    data = lines(tmp_path / "d.jsonl", [{"prompt": f"{i} and " * 12, "completion": " so on"} for i in range(4)])
    options = ["--model", short_model, "--data", data, "--steps", 1, "--batch-size", 2, "--seq-len", 40]
    assert train(tmp_path / "a", *options) == 0
    assert train(tmp_path / "b", *options, "--prompt", "and so on " * 40) == 0
    assert "the last 36 of the prompt's" in capsys.readouterr().out
    virtual = ["--method", "prompt_tuning", "--set", "num_virtual_tokens=5"]
    assert train(tmp_path / "c", *options, *virtual, "--seq-len", 35, "--prompt", "and so on " * 40) == 0
    assert "the last 31 of the prompt's" in capsys.readouterr().out
    assert train(tmp_path / "d", *options, *virtual) == USAGE_ERROR
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--seq-len 40" in err and "5 virtual" in err and "40 positions" in err


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--r", "0"], ["--r", "'0'", "at least 1"]),
        (["--r", "many"], ["--r", "'many'"]),
        (["--steps", "-3"], ["--steps", "'-3'"]),
        (["--dropout", "1"], ["--dropout", "'1'", "from 0"]),
        (["--alpha", "0"], ["--alpha", "'0'"]),
        (["--lr", "nan"], ["--lr", "'nan'"]),
        (["--dtype", "fp8"], ["fp8", "fp32", "bf16", "fp16"]),
        (["--quantize", "int3"], ["int3", "nf4", "int8"]),
        (["--method", "lroa"], ["'lroa'", "'lora'"]),
        (["--method", "DoRA"], ["'DoRA' is LoRA", "--set use_dora=true"]),
        (["--device", "tpu"], ["'tpu'", "cpu"]),
        (["--model", "./nowhere"], ["'./nowhere'", "Hub id"]),
        (["--data", "nowhere.txt"], ["'nowhere.txt'", "no such file"]),
        (["--data", "long" * 100], ["--data", "longlong"]),  # than any file's name
        (["--model", "~no-such-user/model"], ["--model", "'~no-such-user/model'", "home"]),
        (["--seed", str(2**64)], ["--seed", str(2**64), "at most"]),
        (["--set", "inference_mode=true"], ["inference_mode"]),
        (["--method", "trainable_tokens"], ["rows", "token_indices"]),
        (["--set", "task_type=SEQ_CLS"], ["task_type=SEQ_CLS", "CAUSAL_LM"]),
        (["--target", ","], ["--target", "all-linear"]),
        (["--target", "all-linear,q_proj"], ["--target", "stands alone"]),
        (["--target", "q_prj"], ["q_prj"]),
        (["--set", "use_rslora"], ["FIELD=VALUE", "'use_rslora'"]),
        (["--set", "use_rslor=true"], ["use_rslor", "use_rslora"]),
        (["--set", "use_rslora=maybe"], ["use_rslora", "maybe"]),
        (["--set", "r=4"], ["--r"]),
        (["--set", "init_lora_weights=eva"], ["init_lora_weights=eva", "peftfast.initialize_lora_eva_weights"]),
        (["--seq-len", "100000"], ["100000", "512"]),
        (["--prompt", ""], ["--prompt", "empty"]),
        (["--prompt", os.fsdecode(b"\xff")], ["--prompt", "udcff"]),  # a byte that is no UTF-8
        (["--resume"], ["--resume", "training_state.pt"]),
        (["--bogus"], ["--bogus"]),
    ],
)
def test_wrong_options_are_refused_in_one_line(tmp_path, capsys, options, parts):
    assert train(tmp_path / "a", *QUICK, *options) == USAGE_ERROR
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("peftfast"), err
    assert "on the embedded model" not in out  # the first line; evaluating comes after it
    for part in parts:
        assert part in err, err
    assert not (tmp_path / "a").exists()


def test_a_run_is_continued_from_another_folder_and_elsewhere(tmp_path, monkeypatch):
    """Where its data lies is kept, and what does not change the run may be given anew."""

    def given(*options):
        return _settings.given(make_parser().parse_args(["train", *options]))

    (tmp_path / "d.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    saved = _settings.with_defaults(given("--data", "d.txt", "--target", "q_proj, v_proj"))
    assert saved["data"] == str(tmp_path / "d.txt") and saved["target"] == ["q_proj", "v_proj"]
    anew = given("--data", "d.txt", "--device", "cpu", "--prompt", "a", "--save-every", "3", "--steps", "9")
    assert _settings.continued(anew, saved) == {**saved, **anew}
    with pytest.raises(UserError, match="--seed 4: the run to resume has 0"):
        _settings.continued(given("--seed", "4"), saved)


def test_unknown_command_names_the_others(capsys):
    assert main(["trian"]) == USAGE_ERROR
    err = capsys.readouterr().err
    assert "trian" in err and "train" in err and "env" in err


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["is empty"]),
        ('{"text": "a"}\n{"text": ', ["line 2", "not JSON"]),
        ('{"text": "a"}\n\n{"body": "b"}', ["line 3", "'body'", "completion"]),
        ('{"text": "a"}\n{"text": 5}', ["line 2", "string", "5"]),
        ('{"text": "a"}\n7', ["line 2", "int"]),
        ('{"prompt": "a", "completion": "b"}', ["at least 2"]),
        ('{"messages": [{"role": "user", "content": "a"}]}\n{"text": "a"}', ["line 1", "assistant"]),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n' * 2, ["chat template"]),
        ('{"messages": [{"role": "assistant"}]}\n', ["line 1", "role and content"]),
        ('{"messages": ["a"]}', ["line 1", "role and content"]),
        ('{"completion": "a"}', ["line 1", "'completion'", "needs text"]),
        ("[1, 2", ["not JSON"]),
        ("[" * 200_000, ["not JSON"]),
        ('{"text": ' + "9" * 5000 + "}", ["line 1", "not JSON"]),
        ('{"text": "a"}\n{"text": "half a character: \\ud83d"}', ["line 2", "ud83d"]),
    ],
)
def test_wrong_data_names_the_line(tmp_path, capsys, content, parts):
    (tmp_path / "d.jsonl").write_text(content)
    assert train(tmp_path / "a", *QUICK, "--data", tmp_path / "d.jsonl") == USAGE_ERROR
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for part in parts:
        assert part in err, err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.txt", b"\xff\xfe\x00", "UTF-8"),
        ("d.txt", "UTF-16 without a mark\n".encode("utf-16-le") * 200, "UTF-8"),
        ("d.csv", b"prompt,completion\n" + b"1 plus 1 is,2\n" * 200, "JSONL"),
        ("", None, "is a folder"),
    ],
)
def test_data_that_is_no_text(tmp_path, capsys, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert train(tmp_path / "a", *QUICK, "--data", tmp_path / name) == USAGE_ERROR
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err, err
    assert not (tmp_path / "a").exists()


def test_hub_data_without_the_package(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_data.importlib.util, "find_spec", lambda name: None)
    assert train(tmp_path / "a", "--data", "owner/name") == USAGE_ERROR
    assert "datasets" in capsys.readouterr().err


def test_quantize_without_the_package(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_settings.importlib.util, "find_spec", lambda name: None)
    assert train(tmp_path / "a", "--quantize", "nf4") == USAGE_ERROR
    err = capsys.readouterr().err
    assert "'nf4'" in err and "bitsandbytes" in err


def test_a_folder_with_other_things_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert train(tmp_path, *QUICK) == USAGE_ERROR
    assert train(tmp_path / "thesis.txt", *QUICK) == USAGE_ERROR
    assert train(tmp_path / "thesis.txt" / "a", *QUICK) == USAGE_ERROR
    assert train("~no-such-user/a", *QUICK) == train(tmp_path / ("long" * 100), *QUICK) == USAGE_ERROR
    assert os.listdir(tmp_path) == ["thesis.txt"]
    assert "nothing there is overwritten" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that takes no other")
def test_a_folder_that_nothing_can_be_made_in_is_refused_before_training(capsys):
    assert train("/proc/a", *QUICK) == USAGE_ERROR
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and "cannot write to '/proc'" in said.err


def test_a_link_to_a_folder_that_is_not_there_yet(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "new" / "a")
    assert train(tmp_path / "link", *QUICK) == 0
    assert (tmp_path / "new" / "a" / "adapter_model.safetensors").is_file() and (tmp_path / "link").is_symlink()


def test_an_adapter_is_replaced_and_is_no_base_model(tmp_path, capsys):
    assert train(tmp_path / "a", *QUICK) == 0
    assert train(tmp_path / "a", *QUICK, "--r", 2) == 0
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == 2
    assert train(tmp_path / "b", "--model", tmp_path / "a") == USAGE_ERROR
    assert "name its base model" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_saves_nothing(tmp_path, capsys, monkeypatch):
    rows = _data.Rows([Row([1, 2], [IGNORED, IGNORED])] * 4, [Row([1, 2], [1, 2])], [1])  # a mean over nothing: nan
    monkeypatch.setattr(_data, "tokenize", lambda *args: rows)
    assert train(tmp_path / "a", *QUICK) == 1
    assert "loss became nan at step 1" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


# ---- stopping and continuing -----------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """A test run in a shell's background inherits an ignored SIGINT, which the command respects."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stop_after(monkeypatch, step: int, number: int = signal.SIGINT) -> None:
    real = _loop.Run.one_step

    def one_step(self):
        assert all(module.training for module in self.model.modules())  # evaluating comes before it
        if self.step == step - 1:
            os.kill(os.getpid(), number)
        return real(self)

    monkeypatch.setattr(_loop.Run, "one_step", one_step)


ADALORA = [f"--set={field}" for field in ("tinit=1", "tfinal=1", "deltaT=1", "init_r=8", "target_r=4")]


@pytest.mark.parametrize(
    "extra",
    [
        ["--dtype", "fp32"],
        ["--dtype", "fp16"],
        ["--method", "adalora", *ADALORA],  # the schedule and what it knows of the ranks
        ["--set", 'velora_config={"num_groups": 4, "init_type": "batch_average_once"}'],  # the direction
        ["--set", 'monteclora_config={"num_samples": 2}'],  # random numbers that are drawn for many steps
        ["--set", 'monteclora_config={"num_samples": 2, "buffer_size": 2}'],
        ["--set", "init_lora_weights=pissa_niter_4"],  # the base, also in the comparison with what was saved
    ],
    ids=["fp32", "fp16", "adalora", "velora", "monteclora", "monteclora drawing anew", "pissa"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, capsys, monkeypatch, extra):
    options = ["--steps", 5, "--batch-size", 2, "--seq-len", 32, "--dropout", 0.2, *extra]
    assert train(tmp_path / "whole", *options) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert train(tmp_path / "parts", *options) == INTERRUPTED
    out = capsys.readouterr().out
    assert "stopped by Ctrl-C after step 3 of 5" in out and "--resume" in out
    state = torch.load(tmp_path / "parts" / "training_state.pt")
    assert bool(state["scaler"]) == ("fp16" in extra)
    torch.manual_seed(123)  # the continuation must not depend on the state it starts in
    assert train(tmp_path / "parts", "--resume") == 0
    whole, parts = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    configs = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("whole", "parts")]
    assert configs[0] == configs[1]


def test_sigterm_stops_like_ctrl_c(tmp_path, capsys, monkeypatch):
    stop_after(monkeypatch, 1, signal.SIGTERM)
    assert train(tmp_path / "a", *QUICK) == INTERRUPTED
    assert "SIGTERM" in capsys.readouterr().out
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()


def test_resume_refuses_another_run(tmp_path, capsys):
    data = tmp_path / "t.txt"
    data.write_text("The cat sat on the mat.\n" * 200)
    assert train(tmp_path / "a", *QUICK, "--data", data) == 0
    assert train(tmp_path / "a", "--resume") == USAGE_ERROR
    assert "complete, 2 of 2 steps" in capsys.readouterr().err
    assert train(tmp_path / "a", "--resume", "--steps", 3, "--r", 4) == USAGE_ERROR
    err = capsys.readouterr().err
    assert "--r 4" in err and "8" in err
    assert train(tmp_path / "a", "--resume", "--steps", 3) == 0
    data.write_text("The dog sat on the mat.\n" * 200)
    assert train(tmp_path / "a", "--resume", "--steps", 4) == USAGE_ERROR
    assert "no longer holds" in capsys.readouterr().err
    state = torch.load(tmp_path / "a" / "training_state.pt")
    for name in ("settings", "optimizer"):  # as an older version has written it
        torch.save({k: v for k, v in state.items() if k != name}, tmp_path / "a" / "training_state.pt")
        data.write_text("The cat sat on the mat.\n" * 200)
        assert train(tmp_path / "a", "--resume", "--steps", 4) == USAGE_ERROR
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "training_state.pt" in err and name in err
    (tmp_path / "a" / "training_state.pt").write_bytes(b"broken")
    assert train(tmp_path / "a", "--resume") == USAGE_ERROR
    assert "cannot be read" in capsys.readouterr().err


def test_a_state_that_cannot_be_written_leaves_no_part_of_it(tmp_path, capsys, monkeypatch):
    def full(state, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", full)
    assert train(tmp_path / "a", *QUICK) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "training_state.pt" in err and "disk full" in err
    assert sorted(os.listdir(tmp_path / "a")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="sends a signal to a process")
def test_ctrl_c_on_a_process(tmp_path):
    folder = tmp_path / "a"
    options = ["--steps", "5000", "--batch-size", "2", "--seq-len", "32", "--save-every", "1", "--output", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "peftfast", "train", *options],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell inherits "ignore".
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 180
        while not (folder / "training_state.pt").is_file():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == INTERRUPTED, err
    assert "stopped by Ctrl-C after step" in out and "Traceback" not in err
    assert load_file(folder / "adapter_model.safetensors")
    assert not list(folder.glob("*.tmp"))
