"""A session with a GPU: steps end, fail and hang without taking the others along, and what they leave is summed up."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from gpu_session import Step, main, run, steps, summary


def python(name, code, weight=1.0, **more):
    return Step(name, ("-c", code), weight, **more)


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


def test_the_tools_it_runs(tmp_path):
    """The table and the rows, by themselves as `steps` starts them; the rest is as quick on a GPU only."""
    chosen = [step for step in steps(tmp_path, dry=True) if step.name in ("table", "benchmark")]
    assert run(chosen, tmp_path, 30) == {"table": "ok", "benchmark": "ok"}
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
    )
    (tmp_path / "session.log").write_text("  RED  linear x: error 1\n  RED  linear x: error 1\n")
    text, well = summary(tmp_path)
    assert not well and "tests: 1 passed, 1 failed, 0 error, 1 skipped" in text
    assert (
        "  FAILED  tests/b/test_b.py::test_y[3-a b]" in text
        and "benchmark: 0 rows; red there and in the table: 1" in text
    )


def test_a_folder_is_for_one_session(tmp_path, capsys):
    (tmp_path / "session.log").write_text("")
    with pytest.raises(SystemExit):
        main(["--dry-run", "--out", str(tmp_path)])
    assert "name a new folder" in capsys.readouterr().err


def test_nothing_at_all_is_summed_up(tmp_path):
    text, well = summary(tmp_path)
    assert not well and "tests: 0 passed" in text and "benchmark: 0 rows" in text
