"""The GPU benchmark end to end at tiny sizes on the CPU, its gate, and the page it draws."""

import csv
import gc
import sys
import threading
from functools import partial
from types import SimpleNamespace

import oracle
import pytest
import torch
from processes import ROOT, run

from bench import contestants as sides
from bench import gpu, measure, report
from bench.contestants import LIMIT, OURS, PEER, Contestant
from bench.operands import BUILDERS, MODELS, TINY, Maker, Size, arguments
from peftfast_kernels import OPS, dispatch


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """One dry run in a process of its own: (output, rows, page)."""
    folder = tmp_path_factory.mktemp("results")
    suites = [suite for suite in gpu.SHARES if suite != "tune"]
    command = [ROOT / "bench/gpu.py", "--dry-run", "--seconds", 400, "--out", folder, "--only", *suites]
    output = run(command, timeout=500)
    (path,) = folder.glob("*.csv")
    return output, report.read(path), path.with_suffix(".html").read_text()


def test_every_suite_runs(dry):
    output, rows, _ = dry
    suites = {row["suite"] for row in rows}
    assert suites == set(gpu.SHARES) - {"tune"}, output
    assert {row["op"] for row in rows if row["suite"] == "ops"} == set(OPS)
    assert {row["format"] for row in rows if row["suite"] == "linear"} == {"dense", "nf4"}
    assert "RED" not in output and "skipped" not in output
    for row in rows:
        assert row["us"] > 0 and row["rounds"] >= 2 and row["device"] and '"torch"' in row["versions"]


def test_rows_carry_the_limit_and_the_gate(dry):
    _, rows, _ = dry
    for row in rows:
        if row["suite"] in ("linear", "layer", "step", "decode"):
            assert row["ratio_to_limit"] > 0
        if row["role"] == OURS and row["suite"] != "ops":
            assert row["gate"] == "green" and row["speedup"] > 0 and row["error"] < 0.05
    contestants = {row["contestant"] for row in rows}
    assert {"frozen", "peft", "peft, no autocast", "peftfast", "peftfast + blocks", "unsloth's formula"} <= contestants


def test_the_page(dry):
    _, rows, page = dry
    assert page.count("<img") == 7 and "data:image/png;base64," in page
    assert "A dry run on a CPU" in page and "not measured" in page
    assert page.count("<tr>") > len([r for r in rows if r["suite"] not in ("ops", "questions")])
    assert "http:" not in page and "https:" not in page  # nothing from elsewhere; pictures, in base64, have no colon


def test_a_page_of_a_run_that_ended_early(tmp_path):
    """The first question is how fast products are, and counts no bytes: nothing is there for a roofline."""
    path = tmp_path / "rows.csv"
    bench = gpu.Bench("cpu", 10, quick=True, dry=True, path=path)
    question = gpu.questions.all_questions(False)[0]
    entrants = [Contestant("K", PEER, torch.ones(8).sum)]
    bench.compare("questions", question.text, entrants, {}, question.size, flops=question.flops, bytes=question.bytes)
    assert question.text in report.write_page(path).read_text()


def test_a_pass_computes_gradients_and_adds_to_none():
    """What is added to the gradients of the pass before would be timed with the layer."""
    frozen, *others = sides.linear(Size(8, 16, 24, 2), "cpu")
    frozen.call()
    with oracle.Operations() as seen:
        y, dx = frozen.call()
    assert seen.names.count("mm") == 2 and not {"add", "add_"} & set(seen.names)
    assert y.shape == (8, 16) and dx.shape == (8, 24)
    for other in others:
        other.call()
        with oracle.Operations() as seen:
            other.call()
        # an update may be added to what it updates, forward and backward
        assert sum(name.startswith("add") for name in seen.names) <= 4, (other.name, seen.names)


def test_unsloths_formula_is_right():
    """As right as PEFT's: the same factors, fp64 as the oracle."""
    for dtype in (torch.bfloat16, torch.float32):
        size = Size(40, 24, 72, 4, dtype)
        gate = gpu.Bench("cpu", 10, quick=True, dry=True)._gate_linear(size, sides.linear(size, "cpu"))
        assert gate["unsloth's formula"][1] and gate["unsloth's formula"][0] > 0, gate


def test_a_red_gate_reports_no_ratio():
    bench = gpu.Bench("cpu", 10, quick=True, dry=True)
    x = torch.ones(8)
    entrants = [
        Contestant(n, role, x.sum, dict)
        for n, role in (("frozen", LIMIT), ("a", OURS), ("b", OURS), ("c", OURS), ("p", PEER))
    ]
    gate = {"a": (0.5, False), "b": (1e-3, True), "c": (float("inf"), False)}
    bench.compare("linear", "case", entrants, gate, Size(8, 8, 8))
    bench.compare("linear", "nothing", entrants[3:4], gate, Size(8, 8, 8))
    rows = {row["contestant"]: row for row in bench.rows}
    assert rows["a"]["gate"] == "red" and rows["a"]["speedup"] is None and rows["a"]["ratio_to_limit"] is None
    assert rows["b"]["gate"] == "green" and rows["b"]["speedup"] > 0
    assert len(bench.red) == 3 and "c" not in rows
    sides = [{**row, "us": float(row["us"])} for row in bench.rows]
    fast = {**rows["a"], "us": 1e-9}
    assert report.speedup([fast, *(s for s in sides if s["contestant"] == "p")], "p") is None


@pytest.mark.parametrize("wrong", ["peftfast", "peft", "unsloth's formula"])
@pytest.mark.parametrize("what", ["y", "dx", "lora_A.default.weight", "lora_B.default.weight"])
def test_a_linear_that_is_wrong_is_compared_with_nothing(wrong, what):
    """Ours is worth nothing then, and no other is an alternative, however long it takes."""
    size, bench = Size(24, 32, 40, 4), gpu.Bench("cpu", 10, quick=True, dry=True)
    entrants = sides.linear(size, "cpu")
    off = next(entrant for entrant in entrants if entrant.name == wrong).results()
    off[what] = 1.1 * off[what]
    entrants = [e._replace(call=list, results=lambda: off) if e.name == wrong else e for e in entrants]
    bench.compare("linear", "q", entrants, bench._gate_linear(size, entrants), size)
    rows = {row["contestant"]: row for row in bench.rows}
    assert {name for name, row in rows.items() if row["gate"] == "red"} == {wrong} and len(bench.red) == 1
    assert rows[wrong]["ratio_to_limit"] is None and report.speedup(list(rows.values()), wrong) is None
    others = [row["us"] for row in rows.values() if row["role"] == PEER and row["gate"] == "green"]
    ratio = None if wrong == "peftfast" else pytest.approx(min(others) / rows["peftfast"]["us"], rel=1e-3, abs=1e-4)
    assert rows["peftfast"]["speedup"] == ratio


def test_a_model_with_a_wrong_gradient_is_red():
    """Of a factor, or of what the first layer is given: what is timed is mostly a backward pass."""
    size, bench = Size(24, 0, 0, 4, torch.float32), gpu.Bench("cpu", 10, quick=True, dry=True)
    built = sides.models(sides.llama(TINY, 1, size.dtype, "cpu"), size)
    ids, model = torch.randint(0, 512, (2, 12)), built["peftfast"][1]

    def green():
        return {name: is_green for name, (_, is_green) in bench._gate_losses(built, ids, size).items()}

    assert green() == {"peftfast": True, "peftfast + blocks": True, "peft": True}
    factor = next(p for p in model.parameters() if p.requires_grad)
    norm = model.get_base_model().model.layers[0].input_layernorm
    for damage in (
        lambda: factor.register_hook(lambda grad: 2 * grad),
        lambda: norm.register_full_backward_hook(lambda module, given, grads: (2 * given[0],)),
    ):
        hook = damage()
        assert green() == {"peftfast": False, "peftfast + blocks": True, "peft": True}
        hook.remove()


def test_a_dora_that_is_wrong_is_red():
    size, bench = Size(24, 32, 40, 4), gpu.Bench("cpu", 10, quick=True, dry=True)
    entrants = {entrant.name: entrant for entrant in sides.linear(size, "cpu", dora=True)}
    ours, peft = entrants["peftfast"], entrants["peft"]
    assert bench._gate_between([peft, ours], size)["peftfast"][1]
    right = ours.results()
    for what in right:
        off = ours._replace(results=lambda what=what: {**right, what: 1.1 * right[what]})
        assert not bench._gate_between([peft, off], size)["peftfast"][1], what


def test_one_wrong_adapter_of_a_batch_is_red(monkeypatch):
    genuine = sides.mixed

    def mixed(library, *rest):
        model, names = genuine(library, *rest)
        if library == "peftfast":
            with torch.no_grad():
                [factor.mul_(20) for name, factor in model.named_parameters() if f"lora_B.{names[-1]}" in name]
        return model, names

    monkeypatch.setattr(sides, "mixed", mixed)
    bench = gpu.Bench("cpu", 10, quick=True, dry=True)
    bench.mixed()
    assert {row["contestant"]: row["gate"] for row in bench.rows} == {"peftfast": "red", "peft": "green"} and bench.red


def test_an_operation_that_is_wrong_or_refused_is_red(monkeypatch):
    def paths(op, kwargs, on_gpu):
        right = op.eager(**kwargs)
        return {"torch": lambda: right, "triton": lambda: 2 * right, "split": lambda: 1 / 0}

    monkeypatch.setattr(gpu, "op_cases", lambda quick, dry: [("lora_down", Size(4, 8, 8, 2))])
    monkeypatch.setattr(gpu.tune, "paths", paths)
    bench = gpu.Bench("cpu", 10, quick=True, dry=True)
    bench.ops()
    found = {row["contestant"]: (row["gate"], row["speedup"]) for row in bench.rows}
    assert found == {"torch": ("green", None), "triton": ("red", None)}
    assert len(bench.red) == 2 and "split: ZeroDivisionError" in bench.red[0]


@pytest.mark.parametrize("red", [False, True])
def test_what_is_red_fails_the_command(red, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.Bench, "questions", lambda self: red and self._reject("something"))
    assert gpu.main(["--dry-run", "--only", "questions", "--csv", str(tmp_path / "rows.csv")]) == red


def test_rows_are_written_as_they_come(tmp_path):
    path = tmp_path / "rows.csv"
    bench = gpu.Bench("cpu", 10, quick=True, dry=True, path=path)
    for number in (1, 2):
        bench.compare("linear", "case", [Contestant("frozen", LIMIT, torch.ones(8).sum, dict)], {}, Size(8, 8, 8))
        assert len(report.read(path)) == number


def test_a_kernel_that_does_not_end_costs_one_case(tmp_path, monkeypatch, capsys):
    """Nobody can tell the thread that waits for it: another one puts a new process in this one's place."""
    ended, commands = threading.Event(), []

    def hang(*args):
        assert ended.wait(60)
        return {}

    def replace(program, command):
        commands.append(command)
        ended.set()

    monkeypatch.setattr(gpu, "PATIENCE", 0.05)
    monkeypatch.setattr(gpu.os, "execv", replace)
    hanging = gpu.questions.Question("q", Size(1, 1, 1), hang)
    monkeypatch.setattr(gpu.questions, "all_questions", lambda dry: [hanging])
    path = tmp_path / "rows.csv"
    assert gpu.main(["--dry-run", "--csv", str(path), "--only", "questions"]) == 1
    (command,) = commands
    assert command[-2:] == ["--only", "questions"] and command[command.index("--after") + 1 :][:2] == ["questions", "0"]
    assert "does not end" in capsys.readouterr().out and "does not end" in path.with_suffix(".red.txt").read_text()


def test_a_lost_gpu_costs_one_case(tmp_path, monkeypatch, capsys):
    class Replaced(Exception):
        pass

    def replace(program, command):
        raise Replaced(command)

    def fail(*args):
        raise RuntimeError("an illegal memory access was encountered")

    path = tmp_path / "rows.csv"
    options = ["--dry-run", "--seconds", "30", "--csv", str(path), "--only", "tune", "questions", "ops"]
    monkeypatch.setattr(gpu, "is_lost", lambda device: True)
    monkeypatch.setattr(gpu.Deadline, "used", 12.0)
    monkeypatch.setattr(gpu.os, "execv", replace)
    monkeypatch.setattr(gpu.Bench, "tune", lambda self: None)
    failing = gpu.questions.Question("q", Size(1, 1, 1), fail)
    monkeypatch.setattr(gpu.questions, "all_questions", lambda dry: [failing])
    with pytest.raises(Replaced) as replaced:
        gpu.main(options)
    command = replaced.value.args[0]
    assert command[-3:] == ["--only", "questions", "ops"] and "RED  questions" in capsys.readouterr().out
    assert command[command.index("--after") + 1 :][:2] == ["questions", "0"]
    assert command[command.index("--seconds") + 1] == "18"
    monkeypatch.setattr(gpu.Bench, "ops", lambda self: None)
    first = gpu.Bench("cpu", 10, quick=True, dry=True, path=path)
    first.compare("linear", "case", [Contestant("frozen", LIMIT, torch.ones(8).sum, dict)], {}, Size(8, 8, 8))
    assert gpu.main([*command[2:], "--dry-run"]) == 1  # it counts, and is not tried again
    assert path.with_suffix(".red.txt").read_text().count("\n") == 1
    assert "Failed: questions" in path.with_suffix(".html").read_text()


def test_what_needs_another_package_is_left_out(monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    bench = gpu.Bench("cpu", 10, quick=True, dry=True)
    sizes = [Size(8, 8, 8, format="nf4"), Size(8, 8, 8), Size(8, 8, 8, format="int8")]
    seen = []
    bench.each("linear", sizes, seen.append, lambda size: size)
    bench.each("ops", sizes, seen.append, lambda size: size)
    assert seen == [sizes[1], *sizes] and bench.left_out == {"linear": 2} and not bench.red
    assert "without bitsandbytes: 2 cases of linear" in gpu.summary(bench)


def test_nf4_has_a_peer_without_bitsandbytes(monkeypatch):
    size = Size(24, 48, 64, 4, format="nf4")
    (question,) = [q for q in gpu.questions.all_questions(True) if q.size == size and q.text.startswith("fused")]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    torch.manual_seed(0)
    calls = question.make("cpu")
    kwargs = arguments("lora_gemm", size, "cpu")  # the same numbers
    truth = kwargs["x"].double() @ OPS["dequantize"].reference(kwargs["w"], torch.float64).t()
    assert measure.relative_error(calls["bitsandbytes' formula"](), truth) < 0.01


def test_the_budget_is_shared_among_the_suites_that_run(tmp_path):
    assert sum(gpu.SHARES.values()) == pytest.approx(1)
    due = gpu._due(["ops", "linear"])
    assert list(due) == ["ops", "linear"] and 0 < due["ops"] < 0.5 and due["linear"] == pytest.approx(1)


def test_no_suite_goes_without_its_first_case():
    bench = gpu.Bench("cpu", 10, quick=True, dry=True)
    sizes, seen = [Size(8, 8, 8), Size(16, 8, 8)], []
    bench.due["layer"] = 0.0  # what was before has taken longer than its share
    bench.each("layer", sizes, seen.append, lambda size: size)
    assert seen == sizes[:1] and bench.skipped == {"layer": 1}
    bench.deadline.seconds = 0.0
    bench.each("layer", sizes, seen.append, lambda size: size)
    assert seen == sizes[:1] and bench.skipped == {"layer": 2}


def test_the_proposed_table(tmp_path):
    assert gpu.main(["--dry-run", "--seconds", "1", "--only", "tune", "--out", str(tmp_path)]) == 0
    assert dispatch.Table.read(tmp_path / "dispatch-interpreter.json").entries


def test_claims_are_judged_by_their_worst_row(tmp_path):
    def row(contestant, role, us, gate="green", n=4096):
        base = dict.fromkeys(gpu.FIELDS, "")
        shape = {"m": 2048, "n": n, "k": 4096, "r": 16, "dropout": 0.0, "format": "dense", "dtype": "bfloat16"}
        about = {"device": "GPU", "versions": "{}", "suite": "linear", "case": "q", "contestant": contestant}
        figures = {"us": us, "role": role, "gate": gate, "ratio_to_limit": us / 100 if role != PEER else ""}
        figures["speedup"] = 1.45 if role == OURS and gate == "green" else ""
        return {**base, **shape, **about, **figures}

    path = tmp_path / "x.csv"
    rows = [row("frozen", LIMIT, 100), row("peftfast", OURS, 110), row("peft", PEER, 160)]
    rows += [row("unsloth's formula", PEER, 113)]
    rows += [row("peftfast", OURS, 60, "red", 1024), row("peft", PEER, 160, n=1024)]
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, gpu.FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    found = report.read(path)
    figures = {text: (figure, state) for text, figure, state in report.verdicts(found)}
    states = {text: state for text, (_, state) in figures.items()}
    # none of the green is slow, but who is red may be anything
    assert figures["no row below 0.98 of the best alternative"] == ("0 of 1 rows below; wrong: 1 of 2", "missed")
    assert states["bf16, M >= 2048, r = 16, 4096 -> 4096, against PEFT"] == "met"
    assert states["bf16, M >= 2048, r = 16, 4096 -> 1024, against PEFT"] == "missed"  # its gate is red
    assert states["over the frozen base, 4096 -> 4096"] == "met"
    assert states["the same against Unsloth's function"] == "missed"
    assert states["NF4, M <= 128, against PEFT over bitsandbytes"] == "not measured"
    # the better of ours, in the worst of its rows
    sizes = [{**one, "m": 8192.0} for one in found if one["n"] == 4096]
    for one in sizes:
        one["us"], one["ratio_to_limit"] = (120.0, 1.2) if one["role"] == OURS else (one["us"], None)
    figures = {text: (figure, state) for text, figure, state in report.verdicts(found + sizes)}
    figure, state = figures["bf16, M >= 2048, r = 16, 4096 -> 4096, against PEFT"]
    assert state == "missed" and figure.startswith("1.33 to 1.45, 2 compared")
    figure, state = figures["over the frozen base, 4096 -> 4096"]
    assert state == "missed" and figure.startswith("1.200, 2 compared")
    both = [{**one, "us": us} for one in found[1:2] for us in (110.0, 400.0)]
    assert report.speedup([*both, found[2]], "peft") == pytest.approx(160 / 110)
    alone = report.verdicts([one for one in found if one["role"] != PEER])
    assert {state for text, _, state in alone if "frozen" not in text} == {"not measured"}
    # with a peer that is wrong nothing is compared
    states = {text: state for text, _, state in report.verdicts([{**one, "gate": "red"} for one in found])}
    assert states["the same against Unsloth's function"] == "missed"
    assert states["no row below 0.98 of the best alternative"] == "not measured"
    peers_wrong = [{**one, "gate": "red"} if one["role"] == PEER else one for one in found if one["n"] == 4096]
    states = {text: state for text, _, state in report.verdicts(peers_wrong)}
    assert states["bf16, M >= 2048, r = 16, 4096 -> 4096, against PEFT"] == "missed"
    assert states["no row below 0.98 of the best alternative"] == "not measured"
    # of two sizes one is wrong: red, or left out because it is not finite
    found += [{**one, "m": 8192.0, "ratio_to_limit": None, "gate": "red"} for one in found if one["n"] == 4096]
    for rows in (found, [one for one in found if one["gate"] == "green" or one["role"] != OURS]):
        figures = {text: (figure, state) for text, figure, state in report.verdicts(rows)}
        figure, state = figures["bf16, M >= 2048, r = 16, 4096 -> 4096, against PEFT"]
        assert state == "missed" and figure.startswith("1.45 to 1.45, 1 compared") and "wrong: 1 of 2" in figure
        figure, state = figures["over the frozen base, 4096 -> 4096"]
        assert state == "missed" and figure.startswith("1.100") and "wrong: 1 of 2" in figure


def test_slow_rows_are_named():
    one = {"role": OURS, "suite": "linear", "case": "q", "model": "llama", "format": "nf4", "dtype": "bfloat16"}
    one |= {"m": 16.0, "r": 16.0, "dropout": 0.0, "contestant": "peftfast"}
    rows = [{**one, "speedup": 0.97}, {**one, "speedup": 0.98, "m": 1.0}, {**one, "speedup": 0.5, "m": 4.0}]
    rows += [{**one, "speedup": 0.5, "suite": "ops"}, {**one, "speedup": None}]
    assert report.slow_rows(rows) == [
        "0.50 linear llama q M=4 r=16 nf4 bfloat16 peftfast", "0.97 linear llama q M=16 r=16 nf4 bfloat16 peftfast"
    ]  # fmt: skip


def test_every_claim_finds_its_rows():
    """The sizes that are measured are those that are claimed of."""
    about = {"dtype": "bfloat16", "r": 16, "dropout": 0.0, "model": "llama-3-8b"}
    rows = [
        {
            **about,
            "suite": "linear",
            "case": f"{'DoRA ' * dora}{place}",
            "m": s.m,
            "n": s.n,
            "k": s.k,
            "format": s.format,
        }
        for _, place, s, dora in gpu.linear_cases(quick=True, dry=False)
    ]
    rows += [{**about, "suite": "layer", "case": "", "m": 2048, "n": 0, "k": 0, "format": "dense"}]
    rows += [{**about, "suite": "mixed", "case": "", "m": 16, "n": 0, "k": 0, "format": "dense"}]
    for target in (*report.TARGETS, report.OVER_FROZEN):
        assert any(map(target.covers, rows)), target.text
        for other in ({"dtype": "float16"}, {"r": 64}, {"dropout": 0.1}, {"format": "int8"}, {"suite": "ops"}):
            assert not any(target.covers({**row, **other}) for row in rows), (target.text, other)
        for row in filter(target.covers, rows):
            assert not target.covers({**row, "case": "q" if "DoRA" in row["case"] else "DoRA q"}), target.text
            assert target.covers({**row, "m": 10**9}) == (target.format != "nf4"), target.text
    assert not any(target.covers({**rows[-2], "model": "vit-l-16"}) for target in report.TARGETS)


def test_operands_are_legal_at_every_size():
    assert set(BUILDERS) == set(OPS)
    for format in ("dense", "dense_t", "nf4", "int8"):
        w = Maker(Size(3, 20, 72, format=format), "cpu").operand()
        kwargs = arguments("lora_gemm", Size(3, 20, 72, 2, format=format), "cpu")
        out, truth = OPS["lora_gemm"](**kwargs), OPS["lora_gemm"].reference(**kwargs)
        assert w.shape == (20, 72) and measure.relative_error(out, truth) < 0.02, format


def test_what_is_measured_covers_what_is_claimed():
    cases = list(gpu.linear_cases(quick=False, dry=False))
    sizes = [size for _, _, size, _ in cases]
    assert {s.m for s in sizes} >= {1, 16, 128, 512, 2048, 8192, 16384}
    assert {s.r for s in sizes} >= {8, 16, 64, 256} and {s.format for s in sizes} >= {"dense", "nf4", "int8"}
    assert {s.dropout for s in sizes} == {0.0, 0.1} and {m.name for m in MODELS} == {name for name, *_ in cases}
    assert len(list(gpu.linear_cases(quick=True, dry=False))) <= 6


def test_a_call_on_a_gpu_is_timed_alone(monkeypatch):
    """From when the GPU reaches it, with nothing of it in the L2 and all of it enqueued, until it is done."""
    seen = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            seen.append("event")

        def synchronize(self):
            seen.append("waits")

        def elapsed_time(self, end):
            return 0.5

    clock = measure.Clock("cpu")
    clock.on_gpu, clock._flush = True, SimpleNamespace(zero_=lambda: seen.append("flushes"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", seen.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("all"))
    assert clock._one(lambda: seen.append("call"), 7) == 500.0
    assert seen == ["flushes", 7, "event", "call", "event", "waits"]
    seen.clear()
    assert clock._one(lambda: seen.append("call"), 0) == 500.0
    assert seen == ["flushes", "event", "call", "event", "waits"]
    assert not measure.is_lost("cuda") and seen[-1] == "all" and not measure.is_lost("cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: 1 / 0)
    assert measure.is_lost("cuda") and not measure.is_lost("cpu")


def test_contestants_take_turns(monkeypatch):
    """Each runs twice before it counts; then nothing is collected meanwhile, and none is always the first."""
    monkeypatch.setattr(gc, "collect", int)  # which takes longer than everything else here
    seen = []
    calls = {name: partial(lambda name: seen.append((name, gc.isenabled())), name) for name in "abc"}
    for clock, rounds in ((measure.Clock("cpu", 0.0, 4, 9), 4), (measure.Clock("cpu", 60.0, 1, 3), 3)):
        seen.clear()
        assert {one.rounds for one in clock.interleaved(calls).values()} == {rounds} and gc.isenabled()
        assert seen[:6] == [(name, True) for name in "aabbcc"]
        assert seen[6:] == [(name, False) for name in ("abccba" * 2)[: 3 * rounds]]
    with pytest.raises(ZeroDivisionError):
        clock.interleaved({"a": lambda: gc.isenabled() or 1 / 0})
    assert gc.isenabled()
    heads = []
    clock._one = lambda call, head: heads.append(head) or 1.0
    for ahead in (True, False):  # as long as the host takes, and not as it has been there for
        clock.interleaved(calls, ahead)
        assert len(heads) == 9 and (1e6 <= min(heads) < 4e7 if ahead else not any(heads))
        heads.clear()


def test_rounds_before_the_first_do_not_count():
    now = [0.0]

    def call(seconds):
        assert not gc.isenabled()
        now[0] += seconds.pop(0)

    left = {"a": [100.0, 1.0, 2.0, 3.0], "b": [100.0, 5.0, 6.0, 7.0]}
    kept = {name: seconds[1:] for name, seconds in left.items()}
    calls = {name: partial(call, seconds) for name, seconds in left.items()}
    assert measure.turns(calls, 3, warmup=1, clock=lambda: now[0]) == kept and gc.isenabled()
    assert measure.median_ratio(kept["b"], kept["a"]) == 3.0


def test_quartiles_and_gate():
    sample = measure._sample([4.0, 1.0, 2.0, 3.0, 100.0])
    assert sample.median == 3.0 and sample.q1 < 3.0 < sample.q3 and sample.rounds == 5
    assert measure.head_start(1e-5) == 1_000_000 and measure.head_start(2e-3) == 8_000_000  # 4 ms at 2 GHz
    assert measure.no_worse(1.0e-3, 1e-3, torch.float32) and not measure.no_worse(1.2e-3, 1e-3, torch.float32)
    assert measure._sample([2.0]) == (2.0, 2.0, 2.0, 1)
    assert measure.no_worse(1e-3, 0.0, torch.bfloat16)  # below a quarter ulp
    assert measure.no_worse(3e-7, 0.0, torch.float32) and not measure.no_worse(5e-7, 0.0, torch.float32)
    assert not measure.no_worse(float("inf"), float("inf"), torch.bfloat16)
    assert measure.relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")
    assert measure.relative_error(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0])) == 0.5
    assert measure.relative_error(torch.tensor([3.0, 3.0]), torch.zeros(2)) == 3.0
