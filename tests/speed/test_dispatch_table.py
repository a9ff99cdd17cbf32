"""Measured tables: what is read from one, which entry a call takes, and that without one nothing changes."""

import json
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import tune
from torch import Tensor

from bench.measure import Sample
from peftfast_kernels import OPS, dispatch, get_backend, lora_down, lora_gemm, lora_gemm_t
from peftfast_kernels.decode import dense, random_operand
from peftfast_kernels.dispatch import Point, Table, point_of
from peftfast_kernels.row_norm import MAX_RANK

BF16 = torch.bfloat16


def row(op, sizes, choice, format="dense", dtype="bfloat16", drop=False):
    return {"op": op, "format": format, "dtype": dtype, "drop": drop, "sizes": list(sizes), "choice": choice}


def gemm_sizes(m, n, k, r):
    return (m, k, n, k, m, r, n, r)


#: As a chip could answer: NF4 fused for few rows, dense never but at one small shape, a down-projection that loses.
RECORDED = [
    row("lora_gemm", gemm_sizes(16, 4096, 4096, 16), "triton", "nf4"),
    row("lora_gemm", gemm_sizes(256, 4096, 4096, 16), "triton", "nf4"),
    row("lora_gemm", gemm_sizes(1024, 4096, 4096, 16), "torch", "nf4"),
    row("lora_gemm", gemm_sizes(1024, 14336, 4096, 16), "triton", "nf4"),
    row("lora_gemm", gemm_sizes(2048, 4096, 4096, 16), "torch"),
    row("lora_gemm_t", (2048, 4096, 4096, 4096, 2048, 16, 16, 4096), "split", drop=True),
    row("lora_gemm_t", (16, 4096, 4096, 4096, 16, 16, 16, 4096), "triton", drop=True),
    row("lora_down", (2048, 4096, 16, 4096), "triton"),
    row("lora_down", (1, 4096, 16, 4096), "torch"),
]


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A folder of tables in which sm_90 was measured."""
    (tmp_path / "sm_90.json").write_text(json.dumps({"chip": "sm_90", "entries": RECORDED}))
    monkeypatch.setattr(dispatch, "TABLES", tmp_path)
    dispatch.table_of.cache_clear()
    yield tmp_path
    dispatch.table_of.cache_clear()


class OnAGpu(Tensor):
    """A CPU tensor that says it is on a GPU, for the decision alone."""

    is_cuda = True
    device = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """Tensors of the CPU take part in the decisions of an sm_90."""
    from peftfast_kernels import op

    monkeypatch.setattr(dispatch, "chip_of", lambda device: "sm_90")
    monkeypatch.setattr(op, "has_triton_gpu", lambda device: True)
    monkeypatch.setattr(op, "get_backend", lambda: "auto")
    monkeypatch.setattr(dispatch, "get_backend", lambda: "auto")
    return lambda *shape: torch.empty(shape, dtype=BF16).as_subclass(OnAGpu)


def nf4(n, k):
    return random_operand("nf4", n, k, BF16, "cpu")


def test_a_call_takes_the_nearest_point(tables):
    table = dispatch.table_of("sm_90")

    def choice(m, n=4096, k=4096, r=16, format="nf4", dtype="bfloat16"):
        return table.choice("lora_gemm", Point(format, dtype, False, gemm_sizes(m, n, k, r)))

    assert [choice(m) for m in (1, 16, 100, 300, 900, 8192)] == ["triton"] * 4 + ["torch"] * 2
    assert choice(1024, n=12288) == "triton"  # nearest by ratio, not by difference
    assert choice(16, dtype="float16") == "triton"  # the other half precision costs the same
    assert choice(16, dtype="float32") is None and choice(16, format="int8") is None
    assert choice(16, format="fp4") == choice(16, format="fp4", dtype="float16") == "triton"  # and so does fp4
    assert choice(1, format="dense") == "torch"
    points = [Point("dense", "bfloat16", False, (m, 64, 16, 64)) for m in (1, 2)]
    table = Table("sm_90", {"lora_down": [dispatch.Entry(points[0], "torch"), dispatch.Entry(points[1], "triton")]})
    assert [table.choice("lora_down", point) for point in points] == ["torch", "triton"]


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_calls_of_other_forms_than_were_measured_take_the_rules(dtype):
    """Two siblings where three were measured, one gradient where both were."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype)

    def grads(x, p, dtype=dtype):
        return (empty(64, 256, dtype=dtype), empty(64, 16, dtype=dtype), x, p, None, 0.0, 1.0, dtype, dtype)

    def siblings(count, dtype=dtype):
        return (empty(64, 128, dtype=dtype), [empty(16, 128, dtype=dtype)] * count, [None] * count, [0.0] * count)

    whole = empty(64, 128, dtype=BF16), empty(64, 16, dtype=BF16)
    table = Table("sm_90", {
        "lora_factor_grads": [dispatch.Entry(point_of(grads(*whole, dtype=BF16)), "triton")],
        "siblings_down": [dispatch.Entry(point_of(siblings(3, BF16)), "triton")],
    })  # fmt: skip
    assert table.choice_of("lora_factor_grads", grads(empty(64, 128), empty(64, 16))) == "triton"
    assert table.choice_of("lora_factor_grads", grads(None, None)) is None
    assert table.choice_of("siblings_down", siblings(3)) == "triton"
    assert table.choice_of("siblings_down", siblings(2)) is None


def test_relatives_share_a_table(tables):
    assert dispatch.table_of("sm_100").chip == "sm_90"
    assert dispatch.table_of("sm_86").chip == "sm_90"
    assert dispatch.table_of("gfx942") is None
    assert dispatch.table_of("interpreter") is None
    (tables / "sm_notes.json").write_text("of no chip")
    (tables / "sm_80.json").write_text(json.dumps({"chip": "sm_80", "entries": []}))
    dispatch.table_of.cache_clear()
    assert [dispatch.table_of(chip).chip for chip in ("sm_86", "sm_89", "sm_100")] == ["sm_80", "sm_90", "sm_90"]


def test_until_when_the_host_is_waited_for(tables, gpu):
    dispatch.host_bound_products.cache_clear()
    assert dispatch.host_bound_products(0) == dispatch.HOST_BOUND["sm_90"]
    for chip, products in (("sm_90", 12345), ("sm_86", dispatch.HOST_BOUND_ELSEWHERE)):  # a relative says nothing
        (tables / f"{chip}.json").write_text(json.dumps({"chip": "sm_90", "entries": [], "host_bound": 12345}))
        dispatch.table_of.cache_clear()
        dispatch.host_bound_products.cache_clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch, "chip_of", lambda device, chip=chip: chip)
            assert dispatch.host_bound_products(0) == products
    dispatch.host_bound_products.cache_clear()


def test_nothing_is_shipped_that_was_not_measured():
    dispatch.table_of.cache_clear()
    for path in dispatch.TABLES.glob("*.json"):
        data = json.loads(path.read_text())
        assert data["device"] and data["versions"] and all(e["times_us"] for e in data["entries"]), path
        Table.read(path)


def test_unknown_choices_are_refused(tmp_path):
    path = tmp_path / "sm_90.json"
    path.write_text(json.dumps({"chip": "sm_90", "entries": [row("lora_down", (1, 1, 1, 1), "cutlass")]}))
    with pytest.raises(ValueError, match="'cutlass'.*'triton', 'torch', 'split'"):
        Table.read(path)


def test_what_decides(tables):
    x, a = torch.empty(8, 64, dtype=BF16), torch.empty(4, 64)
    assert point_of((x, a, None, 0.0)) == Point("dense", "bfloat16+wide", False, (8, 64, 4, 64))
    assert point_of((x, a.to(BF16), torch.tensor(3), 0.1)) == Point("dense", "bfloat16", True, (8, 64, 4, 64))
    w = nf4(32, 64)
    assert point_of((x, w, None, x[:, :4], x[:, :4], 0.5)).format == "nf4"
    assert point_of((w, torch.float32)).sizes == (32, 64)


def test_calls_follow_the_table(tables, gpu):
    small, large = nf4(4096, 4096), dense(torch.empty(4096, 4096, dtype=BF16))
    for rows, w, runs in ((16, small, True), (1024, small, False), (16, large, False)):
        call = (gpu(rows, 4096), w, None, gpu(rows, 16), gpu(4096, 16), 1.0)
        assert lora_gemm.runs_triton(*call) is runs, (rows, w.format)
    a = gpu(16, 4096)
    assert lora_down.runs_triton(gpu(2048, 4096), a, None, 0.0)
    assert not lora_down.runs_triton(gpu(1, 4096), a, None, 0.0)
    # with dropout the launcher runs in any case and asks for itself whether to fuse
    seed = torch.tensor(1)
    for rows, fused in ((2048, False), (16, True)):
        call = (gpu(rows, 4096), large, gpu(rows, 16), a, seed, 0.1)
        assert lora_gemm_t.runs_triton(*call) and dispatch.fuses("lora_gemm_t", *call) is fused


def test_what_is_traced_follows_no_table(tables, gpu, monkeypatch):
    call = (gpu(300, 64), nf4(64, 64), None, gpu(300, 16), gpu(64, 16), 1.0)
    assert dispatch.fuses("lora_gemm", *call)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not dispatch.fuses("lora_gemm", *call)


def test_siblings_follow_what_was_measured_of_the_group(gpu, monkeypatch):
    plain = dense(gpu(256, 64))
    members = [(gpu(16, 64), plain, None, gpu(16, 4), gpu(256, 4), 1.0)] * 2
    for found, fused in (("triton", True), ("torch", False), (None, False)):
        monkeypatch.setattr(
            dispatch, "measured", lambda op, device, args, found=found: {"siblings_gemm": found}.get(op)
        )
        assert dispatch.fuses_together("siblings_gemm", [members], "lora_gemm", members) is fused
    monkeypatch.setattr(dispatch, "measured", lambda op, device, args: "torch")
    monkeypatch.setattr(dispatch, "get_backend", lambda: "triton")
    assert dispatch.fuses_together("siblings_gemm", [members], "lora_gemm", members)  # what is forced


def test_without_a_table_the_rules_hold(tmp_path, monkeypatch, gpu):
    monkeypatch.setattr(dispatch, "TABLES", tmp_path)
    dispatch.table_of.cache_clear()
    packed, plain = nf4(256, 64), dense(gpu(256, 64))
    for rows, w, runs in ((128, packed, True), (129, packed, False), (1, plain, False), (64, plain, False)):
        call = (gpu(rows, 64), w, None, gpu(rows, 4), gpu(256, 4), 1.0)
        assert lora_gemm.runs_triton(*call) is runs, (rows, w.format)
    monkeypatch.setitem(dispatch.FUSED_ROWS["lora_gemm"], "dense", 64)
    assert lora_gemm.runs_triton(*call)
    assert lora_down.runs_triton(gpu(1, 64), gpu(4, 64), None, 0.0)
    dispatch.table_of.cache_clear()


def test_a_point_that_fails_costs_itself_only(tmp_path, monkeypatch, capsys):
    genuine = tune.arguments

    def arguments(name, size, device):
        if name == "lora_dt":
            raise torch.OutOfMemoryError("there is no room")
        return genuine(name, size, device)

    monkeypatch.setattr(tune, "arguments", arguments)
    monkeypatch.setattr(tune, "host_bound", lambda device, dry: 1 / 0)
    monkeypatch.setattr(tune, "sizes", lambda dry: [[tune.Size(4, 8, 8, 2)]])
    entries, products = tune.run(tmp_path / "x.json", "cpu", 60, True)
    assert {entry["op"] for entry in entries} == set(tune.TUNED) - {"lora_dt"} and products is None
    assert "there is no room" in capsys.readouterr().out and Table.read(tmp_path / "x.json").host_bound is None


def test_a_lost_gpu_costs_one_kind_of_point(tmp_path, monkeypatch, capsys):
    """It is left to torch, and a new process measures the others."""

    class Replaced(Exception):
        pass

    def replace(program, command):
        raise Replaced(command)

    genuine, path = tune._measure, tmp_path / "x.json"

    def measure(op, kwargs, point, clock):
        if op.name == "lora_dt" and point.dtype == "bfloat16":
            raise RuntimeError("an illegal memory access was encountered")
        return genuine(op, kwargs, point, clock)

    monkeypatch.setattr(tune, "_measure", measure)
    monkeypatch.setattr(tune, "is_lost", lambda device: True)
    monkeypatch.setattr(tune, "host_bound", lambda device, dry: 7)
    monkeypatch.setattr(tune, "sizes", lambda dry: [[tune.Size(m, 8, 8, 2) for m in (4, 5)]])
    monkeypatch.setattr(tune.os, "execv", replace)
    with pytest.raises(Replaced) as replaced:
        tune.main(["--dry-run", "--out", str(path)])
    (lost,) = Table.read(path).entries["lora_dt"]
    assert lost.choice == "torch" and "  RED  table: lora_dt" in capsys.readouterr().out
    before = json.loads(path.read_text())["entries"]
    assert 1 < len(before) < len(tune.TUNED)
    monkeypatch.setattr(tune, "host_bound", lambda device, dry: 1 / 0)
    monkeypatch.setattr(tune, "is_lost", lambda device: pytest.fail("it is not tried again"))
    (_, _, *options) = replaced.value.args[0]
    assert tune.main(options) == 1  # it counts
    table = Table.read(path)
    assert set(table.entries) == set(tune.TUNED) and table.host_bound == 7
    assert [entry.point.dtype for entry in table.entries["lora_dt"]] == ["bfloat16"] + ["bfloat16+wide"] * 2
    assert json.loads(path.read_text())["entries"][: len(before)] == before
    monkeypatch.setattr(tune, "is_lost", lambda device: True)  # now in what is measured first
    with pytest.raises(Replaced):
        tune.main(["--dry-run", "--out", str(path)])
    assert not Table.read(path).entries


def test_a_kernel_that_does_not_end_costs_one_kind_of_point(tmp_path, monkeypatch, capsys):
    """Nobody can tell the thread that waits for it: another one puts a new process in this one's place."""
    genuine, path, replaced = tune._measure, tmp_path / "x.json", []
    ended = threading.Event()

    def measure(op, kwargs, point, clock):
        if op.name == "lora_dt" and not replaced:
            assert ended.wait(60)
        return genuine(op, kwargs, point, clock)

    def replace(program, command):
        replaced.append(command)
        left = Table.read(path).entries["lora_dt"]
        assert [entry.choice for entry in left] == ["torch"] and "--resume" in command
        ended.set()

    monkeypatch.setattr(tune, "_measure", measure)
    monkeypatch.setattr(tune, "PATIENCE", 0.3)
    monkeypatch.setattr(tune, "host_bound", lambda device, dry: 7)
    monkeypatch.setattr(tune, "sizes", lambda dry: [[tune.Size(4, 8, 8, 2)]])
    monkeypatch.setattr(tune.os, "execv", replace)
    tune.main(["--dry-run", "--out", str(path)])
    assert len(replaced) == 1 and "  RED  table: lora_dt" in capsys.readouterr().out


def test_a_path_that_is_wrong_or_refused_is_red(monkeypatch, capsys):
    """It loses, and whoever reads no more than a session's last lines is told."""

    def refused():
        raise RuntimeError("out of resources")

    def paths(op, kwargs, on_gpu):
        right = op.eager(**kwargs)
        return {"torch": lambda: right, "triton": lambda: right + 1, "split": refused}

    monkeypatch.setattr(tune, "paths", paths)
    kwargs = tune.arguments("lora_down", tune.Size(4, 8, 8, 2), "cpu")
    entry = tune._measure(OPS["lora_down"], kwargs, point_of(tuple(kwargs.values())), tune.Clock("cpu", 0.01))
    said = capsys.readouterr().out.splitlines()
    assert entry["choice"] == "torch" and set(entry["times_us"]) == {"torch", "triton"}
    assert [line.startswith("  RED  table: lora_down") for line in said] == [True, True]
    assert "split: RuntimeError: out of resources" in said[0] and "triton: error" in said[1]


def test_the_table_is_written_as_it_grows(tmp_path, monkeypatch):
    def tune_until_killed(*args):
        yield row("lora_down", (1, 2, 3, 4), "torch")
        monkeypatch.setattr(tune.Deadline, "used", 100.0)
        yield row("lora_down", (2, 2, 3, 4), "torch")
        found.append(len(Table.read(tmp_path / "x.json").entries["lora_down"]))
        raise KeyboardInterrupt

    found = []

    monkeypatch.setattr(tune, "host_bound", lambda device, dry: 0)
    monkeypatch.setattr(tune, "tune", tune_until_killed)
    with pytest.raises(KeyboardInterrupt):
        tune.run(tmp_path / "x.json", "cpu", 60, True)
    assert len(Table.read(tmp_path / "x.json").entries["lora_down"]) == 2 and found == [2]
    with pytest.raises(ValueError, match="cutlass"):  # and what cannot be read replaces nothing
        tune.write([row("lora_down", (1, 1, 1, 1), "cutlass")], None, tmp_path / "x.json", {"chip": "sm_90"})
    assert len(Table.read(tmp_path / "x.json").entries["lora_down"]) == 2


def test_what_the_host_is_worth_is_found_from_few_rows_on(monkeypatch):
    """The other way of layers is asked with no limit, the kernels with one of nothing, until these are the faster."""
    limits, times = [], []

    @contextmanager
    def host_bound_up_to(limit):
        limits.append(limit)
        yield

    def interleaved(self, calls, ahead):
        assert not ahead
        for name in ("host bound", "kernels"):
            calls[name]()
        return {name: Sample(time, time, time, 1) for name, time in zip(calls, times.pop(0), strict=True)}

    monkeypatch.setattr(tune, "host_bound_up_to", host_bound_up_to)
    monkeypatch.setattr(tune.Clock, "interleaved", interleaved)
    monkeypatch.setattr(tune.Clock, "warm_up", lambda self: None)
    for given, rows in (([(1, 2), (3, 2)], 16), ([(1, 2), (2, 2)], 32), ([(3, 2), (1, 2)], 0)):
        times[:] = given
        assert tune.host_bound("cpu", dry=True) == rows * 32 * 32
    assert limits == [1 << 62, 0] * 5


def test_processes_that_compile_share_the_points(monkeypatch, capsys):
    seen, fails = [], False

    def paths(op, kwargs, on_gpu):
        return {"torch": lambda: seen.append(len(kwargs["x"])) or fails and 1 / 0}

    monkeypatch.setattr(tune, "points", lambda dry: [("lora_down", tune.Size(m, 8, 8, 2)) for m in range(1, 6)])
    monkeypatch.setattr(tune, "paths", paths)
    for part in (0, 1):
        tune.compile_part(part, 2, 60, "cpu", True)
    assert seen == [1, 3, 5, 2, 4]
    tune.compile_part(0, 1, -1, "cpu", True)
    assert len(seen) == 5  # there was no time
    fails = True
    for lost, tried in ((False, [1, 2, 3, 4, 5]), (True, [1])):
        monkeypatch.setattr(tune, "is_lost", lambda device, lost=lost: lost)
        seen.clear()
        tune.compile_part(0, 1, 60, "cpu", True)
        assert seen == tried and ("process 0 ends" in capsys.readouterr().out) == lost


@pytest.mark.parametrize("codes, status", [((0, 0), 0), ((0, -9), 9), ((1, 0), 1)])
def test_a_process_that_compiles_and_dies_shows(codes, status, monkeypatch):
    left = list(codes)

    def process(target, args, daemon):
        return SimpleNamespace(start=lambda: None, join=lambda: None, exitcode=left.pop(0))

    monkeypatch.setattr(tune.multiprocessing, "get_context", lambda how: SimpleNamespace(Process=process))
    assert tune.main(["--dry-run", "--compile", "2"]) == status


@pytest.mark.parametrize("entries, status", [([], 1), ([row("lora_down", (1, 1, 1, 1), "torch")], 0)])
def test_a_table_of_nothing_is_no_success(entries, status, monkeypatch):
    monkeypatch.setattr(tune, "run", lambda *args: (entries, None))
    assert tune.main(["--dry-run"]) == status


def test_paths_are_what_they_are_called(monkeypatch):
    """Triton's is fused whatever the rules and tables say, the split one never."""
    seen = []

    def launch(**kwargs):
        seen.append((get_backend(), dispatch.fuses("lora_gemm_t"), dispatch.fuses_together()))

    monkeypatch.setitem(OPS["siblings_gemm_t"]._cache, "launch", launch)
    monkeypatch.setattr(dispatch, "fuses", lambda *args: True)
    monkeypatch.setattr(dispatch, "fuses_together", lambda *args: True)
    calls = tune.paths(OPS["siblings_gemm_t"], tune.arguments("siblings_gemm_t", tune.Size(4, 8, 8, 2), "cpu"), True)
    for name in ("triton", "split", "triton"):
        calls[name]()
    assert seen == [("triton", True, True), (get_backend(), False, False), ("triton", True, True)]


def test_the_worst_output_of_a_path_counts(monkeypatch):
    """And without torch's, or on a GPU that is lost, there is nothing to compare with."""
    grads = OPS["lora_factor_grads"]
    kwargs = tune.arguments("lora_factor_grads", tune.Size(4, 8, 8, 2), "cpu")
    right = grads.eager(**kwargs)
    calls = {"torch": lambda: right, "triton": lambda: [right[0], 2 * right[1]], "split": lambda: 1 / 0}
    monkeypatch.setattr(tune, "paths", lambda *args: calls)
    told = []
    _, errors = tune.checked(grads, kwargs, "cpu", lambda path, error: told.append(path))
    assert told == ["split"] and errors["torch"] < 0.01 and errors["triton"] > 0.9
    monkeypatch.setattr(tune, "is_lost", lambda device: True)
    with pytest.raises(ZeroDivisionError):
        tune.checked(grads, kwargs, "cpu", pytest.fail)
    monkeypatch.setattr(tune, "is_lost", lambda device: False)
    calls["torch"] = calls.pop("split")
    with pytest.raises(ZeroDivisionError):
        tune.checked(grads, kwargs, "cpu", pytest.fail)


def test_tune_writes_what_dispatch_reads(tmp_path, capsys):
    """The whole tool on the CPU: tiny shapes, the plain-torch path against itself, nothing installed."""
    out = tmp_path / "table.json"
    assert tune.main(["--dry-run", "--out", str(out)]) == 0
    data = json.loads(out.read_text())
    table = Table.read(out)
    assert data["dry_run"] and data["device"] and data["versions"]["torch"]
    assert set(table.entries) == set(tune.TUNED), capsys.readouterr().out
    for entry in data["entries"]:
        assert set(entry["times_us"]) >= {"torch"} and entry["error"]["torch"] < 0.1
        point = Point(entry["format"], entry["dtype"], entry["drop"], tuple(entry["sizes"]))
        assert table.choice(entry["op"], point) == entry["choice"]
    known = [json.dumps({**entry, "choice": "", "times_us": 0, "error": 0}) for entry in data["entries"]]
    assert len(known) == len(set(known))  # skinny operations do not see every size
    assert not list(tune.tune("cpu", tune.Deadline(-1), True))


def test_every_path_that_a_layer_can_take_is_measured():
    """An update that is masked, or of fp32 factors, is one pass beside a product by cuBLAS as well."""
    for name in ("lora_gemm", "lora_gemm_t", "siblings_gemm", "lora_down"):
        for wide in (False, True):
            for dropout in (0.0, 0.1):
                kwargs = tune.arguments(name, tune.Size(4, 8, 8, 2, dropout=dropout, wide=wide), "cpu")
                beside = (
                    name == "siblings_gemm"
                    or name == "lora_gemm"
                    and wide
                    or name == "lora_gemm_t"
                    and (wide or dropout > 0)
                )
                assert ("split" in tune.paths(OPS[name], kwargs, on_gpu=True)) == beside, (name, wide, dropout)


def test_what_is_usual_is_measured_first():
    points = list(tune.points(dry=False))
    assert len(points) == len(set(points))
    first = [size for _, size in points[: 12 * 34]]  # all of Llama-3-8B's layers, for few rows and for many
    assert not any(size.wide for size in first) and {size.r for size in first} == {16}
    assert {(size.n, size.k) for size in first} == set(tune.MODELS[0].linears().values())


def test_what_a_kernel_declines_is_not_measured():
    """A norm of more ranks than registers hold, which is torch's, would stand among what is wrong."""
    assert not any(name == "row_norm" and size.r > MAX_RANK for name, size in tune.points(dry=False))


def test_a_red_path_is_never_chosen():
    assert tune.decide({"triton": 1.0, "torch": 9.0}, {"triton": 0.5, "torch": 1e-3}) == "torch"
    assert tune.decide({"triton": 8.8, "torch": 9.0}, {"triton": 1e-3, "torch": 1e-3}) == "torch"  # within the noise
    assert tune.decide({"triton": 5.0, "torch": 9.0}, {"triton": 1e-3, "torch": 1e-3}) == "triton"
