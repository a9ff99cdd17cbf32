"""A session with a GPU: steps end, fail and hang without taking the others along, and what they leave is summed up."""

import os
import signal
import time
from pathlib import Path

import gpu_session
import pytest
import torch
from gpu_session import Step, main, marked_files, run, steps, summary

from bench.gpu import FIELDS


def python(name, code, weight=1.0, **more):
    return Step(name, ("-c", code), weight, **more)


#: a table of one row
ROW = ",".join(FIELDS) + "\n" + ",".join("{}" if name == "versions" else "0" for name in FIELDS) + "\n"


def test_a_step_takes_nothing_from_the_others(tmp_path):
    child = tmp_path / "pid"
    hangs = (
        "import subprocess, sys, time, pathlib\n"
        f"it = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(it.pid)); print('so far', flush=True); time.sleep(60)"
    )
    beside = python("beside", "import time; print('beside', flush=True); time.sleep(60)")
    todo = [
        python("fails", "print('no'); raise SystemExit(7)"),
        python("hangs", hangs, 0.2, beside=beside),
        python("works", "import os, sys; print(os.environ['PEFTFAST_TABLES'], sys.argv[1:])", seconds=True),
    ]
    start = time.perf_counter()
    results = run(todo, tmp_path, 12)
    assert time.perf_counter() - start < 20
    assert results["fails"] == "exit status 7" and results["works"] == "ok"
    assert results["hangs"].startswith("stopped after")
    log = (tmp_path / "session.log").read_text()
    assert {"no", "so far", "beside"} <= set(log.splitlines()) and f"{tmp_path} ['--seconds', '" in log
    stat = Path(f"/proc/{child.read_text()}/stat")  # gone, or waiting for whoever collects the dead
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_a_machine_without_kernels_is_given_back_at_once(tmp_path, monkeypatch, capsys):
    """Everything else would measure torch against torch, for minutes that there are once."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "some GPU")
    monkeypatch.setattr("peftfast_kernels.op.has_triton_gpu", lambda device: False)
    assert gpu_session.machine() == gpu_session.NO_KERNELS and "Triton does not run" in capsys.readouterr().out
    todo = [python("machine", f"raise SystemExit({gpu_session.NO_KERNELS})"), python("tests", "")]
    assert run(todo, tmp_path, 50) == {"machine": f"exit status {gpu_session.NO_KERNELS}"}


def test_the_tools_it_runs(tmp_path):
    """The table and the rows, by themselves as `steps` starts them; the rest is as quick on a GPU only."""
    chosen = [step for step in steps(tmp_path, dry=True) if step.name in ("table", "benchmark")]
    assert run(chosen, tmp_path, 200) == {"table": "ok", "benchmark": "ok"}
    text, well = summary(tmp_path)
    assert "table interpreter.json: " in text and "in the table: 0\n" in text and "not measured" in text and well, text
    assert {path.name for path in tmp_path.iterdir()} == {"session.log", "interpreter.json", "bench.csv", "bench.html"}
    files = {step.log for step in steps(tmp_path, dry=False)} | {"table", "bench.csv", "bench.html"}
    assert len(files) <= 8


def test_failures_are_named(tmp_path):
    (tmp_path / "tests.log").write_text(
        "tests/a/test_a.py::test_x[one two] PASSED   [ 10%]\n"
        "[gw1] [ 20%] FAILED tests/b/test_b.py::test_y[3-a b] \n"
        "[gw0] [ 30%] SKIPPED tests/b/test_b.py::test_z \n"
        "FAILED tests/b/test_b.py::test_y[3-a b] - assert 1 == 2\n"
        "tests/c/test_c.py\nImportError while importing test module\ntests/c/test_c.py:1: in <module>\n"
        "ERROR tests/c/test_c.py - ImportError while importing\n"
    )
    (tmp_path / "session.log").write_text(
        "  RED  linear x: error 1\n  RED  linear x: error 1\n  skipped for time: 3 cases of step\n"
        "  left out, without bitsandbytes: 7 cases of linear\n"
    )
    text, well = summary(tmp_path)
    assert not well and "tests: 1 passed, 1 failed, 1 error, 1 skipped" in text
    assert (
        "  FAILED  tests/b/test_b.py::test_y[3-a b]\n  FAILED  tests/c/test_c.py\n" in text
        and "benchmark: 0 rows; red there and in the table: 1" in text
    )
    assert "  skipped for time: 3 cases of step\n  left out, without bitsandbytes: 7 cases of linear" in text


def test_nothing_that_ran_is_no_success(tmp_path):
    """A run of tests that was stopped while it collected them."""
    (tmp_path / "tests.log").write_text("created: 8/8 workers\n")
    (tmp_path / "bench.csv").write_text(ROW)
    text, well = summary(tmp_path)
    assert not well and "tests: 0 passed, 0 failed" in text and "benchmark: 1 rows" in text
    assert (tmp_path / "bench.html").exists()  # also where the benchmark was stopped before it drew one


@pytest.mark.parametrize("status", [0, 1])
def test_a_step_that_fails_is_no_success(status, tmp_path, monkeypatch, capsys):
    """Whatever was found: its own traceback ends a step as a red row does."""
    todo = [
        python("tests", "print('tests/a.py::test_x PASSED')", log="tests.log"),
        python("benchmark", f"open({str(tmp_path / 'bench.csv')!r}, 'w').write({ROW!r})"),
        python("host", f"raise SystemExit({status})"),
    ]
    monkeypatch.setattr(gpu_session, "steps", lambda out, dry: todo)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["--out", str(tmp_path), "--seconds", "50"]) == (status > 0)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert f"host: {f'exit status {status}' if status else 'ok'}" in capsys.readouterr().out


def test_a_session_that_is_ended_sums_up(tmp_path, monkeypatch, capsys):
    """What it started is gone, and a row that was being written is none."""
    (tmp_path / "bench.csv").write_text(ROW + "linear,q 4096->40")
    child, ends = tmp_path / "pid", f"import os, signal; os.kill({os.getpid()}, signal.SIGTERM)\n"
    hangs = f"import os, time; open({str(child)!r}, 'w').write(str(os.getpid()))\n{ends}time.sleep(60)"
    monkeypatch.setattr(gpu_session, "steps", lambda out, dry: [python("hangs", hangs), python("never", "")])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="143"):
            main(["--out", str(tmp_path), "--seconds", "50"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "benchmark: 1 rows" in capsys.readouterr().out and "never" not in (tmp_path / "session.log").read_text()
    assert not Path(f"/proc/{child.read_text()}").exists()


def test_half_a_table_is_gone(tmp_path):
    run([python("writes", f"open({str(tmp_path / 'sm_90.new')!r}, 'w').write('half')")], tmp_path, 10)
    assert {path.name for path in tmp_path.iterdir()} == {"session.log"}


def test_a_failure_is_told_at_once(tmp_path):
    """By the plugin that the tests run with: what is killed later has said why."""
    code = "import os\ndef test_a(): assert 1 == 2, 'said why'\ndef test_b(): os.kill(os.getpid(), 9)\n"
    (tmp_path / "test_it.py").write_text(code)
    (tmp_path / "test_before.py").write_text("import nothing_there")
    (tests,) = [step for step in steps(tmp_path, dry=False) if step.name == "tests"]
    (plugin,) = [one for one in tests.arguments if one.startswith("tools.")]
    (goes_on,) = [one for one in tests.arguments if one.startswith("--continue")]
    arguments = ("-m", "pytest", "-p", plugin, "-p", "no:cacheprovider", goes_on, str(tmp_path))
    assert run([Step("tests", arguments, 1, "tests.log")], tmp_path, 60) == {"tests": "exit status -9"}
    log = (tmp_path / "tests.log").read_text()
    assert "said why" in log and "No module named 'nothing_there'" in log


def test_every_marked_test_is_in_the_files_that_are_run():
    chosen = marked_files()
    assert "tests/kernels" in chosen and all((gpu_session.ROOT / one).exists() for one in chosen)
    assert len(chosen) == len(set(chosen)) and "tests/lora/test_host_bound.py" in chosen
    assert not any(one.startswith("tests/kernels/") for one in chosen)


def test_a_folder_is_for_one_session(tmp_path, capsys):
    (tmp_path / "session.log").write_text("")
    with pytest.raises(SystemExit):
        main(["--dry-run", "--out", str(tmp_path)])
    assert "name a new folder" in capsys.readouterr().err


def test_nothing_at_all_is_summed_up(tmp_path):
    text, well = summary(tmp_path)
    assert not well and "tests: 0 passed" in text and "benchmark: 0 rows" in text
