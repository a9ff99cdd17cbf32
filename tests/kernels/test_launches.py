"""How often the skinny products launch at real sizes, and with which grids; nothing is allocated and nothing runs."""

import importlib

import pytest
import torch

pytest.importorskip("triton")

from peftfast_kernels import OPS, configs

SHAPES = [(m, n, k) for m in (1, 512, 2048, 8192, 16384) for n, k in ((4096, 4096), (1024, 14336), (1024, 1024))]


@pytest.fixture(params=["sm_80", "sm_90", "gfx942"])
def launches(request, monkeypatch):
    """What is launched on this chip: (grid, arguments), for every kernel of the two modules."""
    made = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: made.append((grid, arguments))

    for module, kernel in (("lora_down_kernels", "down_kernel"), ("lora_grad_kernels", "factor_grads_kernel")):
        loaded = importlib.import_module(f"peftfast_kernels.{module}")
        monkeypatch.setattr(loaded, kernel, Kernel())
        monkeypatch.setattr(loaded, "chip_of", lambda device: request.param)
        assert not hasattr(loaded, "sum_parts")
    return made


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [8, 16, 200])
def test_one_launch_each(launches, shape, rank):
    m, n, k = shape
    x, dy, a, b, t = meta(m, k), meta(m, n), meta(rank, k), meta(n, rank), meta(m, rank)
    assert OPS["lora_down"].launch(x, a, None, 0.0).shape == (m, rank)
    assert OPS["lora_dt"].launch(dy, b, 2.0).shape == (m, rank)
    grads = OPS["lora_factor_grads"].launch(dy, t, x, t, None, 0.0, 2.0, torch.float32, torch.float32)
    assert [grad.shape for grad in grads] == [(n, rank), (rank, k)]
    (down, first), (back, second), (both, third) = launches
    for grid, arguments, columns in ((down, first, k), (back, second, n)):
        assert grid[0] * arguments["BM"] >= m and grid[1] * arguments["BR"] >= rank and arguments["K"] == columns
        # higher strips than 16 rows only where enough of them remain
        assert grid[0] * grid[1] >= min(configs.PROGRAMS, -(-m // 16))
    tiles = -(-n // third["BC"]) + -(-k // third["BC"])
    assert both == (tiles * -(-rank // third["BRT"]),) and both[0] >= configs.PROGRAMS
    assert second["UNIT"] == third["UNIT_T"] == third["UNIT_P"] == (16 if rank == 16 else 8) and first["UNIT"] == 1


def test_absent_halves_take_no_programs(launches):
    dy, x, t = meta(2048, 4096), meta(2048, 1024), meta(2048, 16)
    rest = (None, 0.0, 1.0, torch.float32, torch.bfloat16)
    run = OPS["lora_factor_grads"].launch
    (db,), (da,) = run(dy, t, None, None, *rest), run(None, None, x, t, *rest)
    assert (db.shape, db.dtype, da.shape, da.dtype) == ((4096, 16), torch.float32, (16, 1024), torch.bfloat16)
    (one, first), (two, second) = launches
    assert one == (4096 // first["BC"],) and two == (1024 // second["BC"],)
    assert (first["DB"], first["DA"], second["DB"], second["DA"]) == (True, False, False, True)


def test_no_rows_launch_nothing(launches):
    x, t = meta(0, 64), meta(0, 4)
    OPS["lora_down"].launch(x, meta(4, 64), None, 0.0)
    OPS["lora_factor_grads"].launch(x, t, x, t, None, 0.0, 1.0, torch.float32, torch.float32)
    assert launches == []
