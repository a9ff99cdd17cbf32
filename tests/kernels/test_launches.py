"""How often the skinny products launch at real sizes, and with which grids; nothing is allocated and nothing runs."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from peftfast_kernels import OPS, configs, dense, use_backend
from peftfast_kernels.decode import Operand
from peftfast_kernels.launch import Launch
from peftfast_kernels.lora_gemm_kernels import product_tile
from peftfast_kernels.siblings_kernels import row_major

BF16 = torch.bfloat16
SHAPES = [(m, n, k) for m in (1, 512, 2048, 8192, 16384) for n, k in ((4096, 4096), (1024, 14336), (1024, 1024))]


@pytest.fixture(params=["sm_80", "sm_90", "gfx942"])
def launches(request, monkeypatch):
    """What is launched on this chip: (grid, arguments), by every kernel of these modules."""
    made = []

    def launch(self, *pointers):
        assert all(isinstance(one, torch.Tensor) for one in tree_leaves(pointers))  # whatever is absent, too
        made.append((self.grid, self.arguments))

    monkeypatch.setattr(Launch, "__call__", launch)
    skinny = "lora_down lora_expand lora_gemm lora_grad lora_routed lora_routed_grad siblings siblings_gemm"
    for module in f"{skinny} dora_add row_norm".split():
        loaded = importlib.import_module(f"peftfast_kernels.{module}_kernels")
        monkeypatch.setattr(loaded, "chip_of", lambda device: request.param)
    return made


def meta(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [8, 16, 200])
def test_one_launch_each(launches, shape, rank):
    m, n, k = shape
    x, dy, a, b, t = meta(m, k), meta(m, n), meta(rank, k), meta(n, rank), meta(m, rank)
    assert OPS["lora_down"].launch(x, a, None, 0.0).shape == (m, rank)
    assert OPS["lora_dt"].launch(dy, b, 2.0).shape == (m, rank)
    grads = OPS["lora_factor_grads"].launch(dy, t, x, t, None, 0.0, 2.0, BF16, torch.float16)
    assert [(grad.shape, grad.dtype) for grad in grads] == [((n, rank), BF16), ((rank, k), torch.float16)]
    (down, first), (back, second), (both, third) = launches
    for grid, arguments, columns in ((down, first, k), (back, second, n)):
        rows = arguments.get("BM", 1)
        assert grid[0] * rows >= m and grid[1] * arguments["BR"] >= rank and arguments["K"] == columns
        read = grid[0] * grid[1] * (rows + min(rank, arguments["BR"]))
        if m >= 2048:  # the same factors, and the same rows where there are many ranks, are read again and again
            assert read <= 9 * m
        else:  # and few rows leave a processor little to read alone
            smallest = (1, 1) if rows == 1 else (16, 16)
            assert grid[0] * grid[1] >= configs.PROGRAMS // 3 or (rows, arguments["BR"]) == smallest
    tiles = -(-n // third["BC"]) + -(-k // third["BC"])
    assert both == (tiles * -(-rank // third["BRT"]),) and both[0] >= configs.PROGRAMS // 2
    assert both[0] * (third["BC"] + min(rank, third["BRT"])) <= 6 * (n + k)
    assert second["UNIT"] == third["UNIT_T"] == third["UNIT_P"] == (16 if rank == 16 else 8)
    assert first.get("UNIT", 1) == 1


@pytest.mark.parametrize("rank", [8, 16, 64, 128])
@pytest.mark.parametrize("n, k", [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (40, 70)])
@pytest.mark.parametrize("format", ["dense", "nf4"])
def test_norms_take_all_of_a_large_gpu_and_read_a_wide_factor_seldom(launches, format, n, k, rank):
    stored = [meta(n, k)] if format == "dense" else [meta(n * k // 2, dtype=torch.uint8), meta(-(-n * k // 64))]
    a, b = meta(rank, k, dtype=torch.float32), meta(n, rank, dtype=torch.float32)
    assert OPS["row_norm"].launch(Operand(format, stored, (n, k), BF16), a, b, 2.0).shape == (n,)
    (grid, arguments), *sums = launches
    parts = arguments["PARTS"]
    assert grid == (-(-n // arguments["BN"]), max(1, parts)) and arguments["BR"] >= rank
    assert [(one["PARTS"], where[0] * one["BN"] >= n) for where, one in sums] == [(parts, True)] * (parts > 0)
    steps = k // arguments["BK"]
    assert parts < 2 or steps // parts >= 4
    assert grid[0] * grid[1] >= configs.PROGRAMS // 2 or steps < 8 * max(1, parts) or parts == 8
    if n > 40 and arguments["PRECISION"] == "tf32x3":
        assert arguments["BN"] >= min(rank, 64)


@pytest.mark.parametrize("chip, heights", [("sm_90", (16, 64, 128, 128)), ("sm_80", (16, 64, 64, 64))])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_that_share_a_decoded_weight(chip, heights, transposed):
    """Up to `FUSED_ROWS` are all in one tile where the chip has tall ones, so that the weight is decoded once."""
    for rows, height in zip((16, 64, 65, 500), heights, strict=True):
        for width in (1024, 14336):
            config = product_tile(chip, "nf4", False, transposed, rows, (width,))
            assert config.BM == height and config.BN >= 64  # of which each of four warps multiplies 16
    assert product_tile(chip, "nf4", True, transposed, 500, (4096,)).BM == configs.tile("lora_gemm_fp32", chip).BM


@pytest.mark.parametrize("rows", [1, 16, 64, 128])
@pytest.mark.parametrize("n, k", [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)])
def test_few_rows_of_a_decoded_weight_take_all_of_a_large_gpu(launches, rows, n, k):
    """One linear, forward and backward, and two siblings: programs enough, and steps enough in each."""
    w = Operand("nf4", [meta(n * k // 2, dtype=torch.uint8), meta(n * k // 64, dtype=torch.float32)], (n, k), BF16)
    x, dy, t, a, b = meta(rows, k), meta(rows, n), meta(rows, 16), meta(16, k), meta(n, 16)
    with use_backend("triton"):
        assert OPS["lora_gemm"].launch(x, w, None, t, b, 1.0).shape == (rows, n)
        assert OPS["lora_gemm_t"].launch(dy, w, t, a, None, 0.0).shape == (rows, k)
        ys = OPS["siblings_gemm"].launch(x, [w, w], [None] * 2, [t, t], [b, b], [1.0] * 2)
        assert [y.shape for y in ys] == [(rows, n)] * 2
        assert OPS["siblings_gemm_t"].launch([dy, dy], [w, w], [t, t], [a, a], [None] * 2, [0.0] * 2).shape == (rows, k)
    sums = iter([arguments for _, arguments in launches if "NS" in arguments and "DECODE" not in arguments])
    contractions = iter((k, n, k, 2 * n))
    for grid, arguments in launches:
        if "DECODE" in arguments:
            steps = -(-next(contractions) // arguments["BC"])
            tiles, parts = grid
            assert parts == arguments["PARTS"] and (parts == 1 or steps // parts >= 4)
            assert tiles * parts >= 2 * configs.PROGRAMS or parts == 8 or steps < 8 * parts
            if parts > 1:
                assert next(sums)["PARTS"] == parts
    assert next(sums, None) is None


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


def test_rows_of_siblings_are_copied_only_where_they_have_to_be():
    """Gradients of what was split from one tensor have rows of that."""
    split, column, turned = torch.randn(3, 8)[:, 2:6], torch.randn(3, 8)[:, :6:4][:, :1], torch.randn(4, 3).t()
    (one, two, copied), strides = row_major([split, column, turned])
    assert one is split and two is column and strides == (8, 8, 4)
    assert copied.stride() == (4, 1) and torch.equal(copied, turned)


@pytest.mark.parametrize("drop", [0.0, 0.1])
@pytest.mark.parametrize("rank", [8, 16, 200])
@pytest.mark.parametrize("m", [1, 2048, 16384])
def test_siblings_take_one_launch_a_step(launches, m, rank, drop):
    """q, k and v of a model with grouped-query attention; only masked updates of dx are a launch of their own."""
    k, widths = 4096, (4096, 1024, 1024)
    x, dys, ts = meta(m, k), [meta(m, n) for n in widths], [meta(m, rank) for _ in widths]
    a, b = [meta(rank, k) for _ in widths], [meta(n, rank) for n in widths]
    w = [dense(meta(n, k)) for n in widths]
    seeds, probs, scales = (
        [torch.empty((), dtype=torch.int64, device="meta") if drop else None] * 3,
        [drop] * 3,
        [2.0] * 3,
    )
    with use_backend("triton"):
        assert [t.shape for t in OPS["siblings_down"].launch(x, a, seeds, probs)] == [(m, rank)] * 3
        assert [p.shape for p in OPS["siblings_dt"].launch(dys, b, scales)] == [(m, rank)] * 3
        ys = OPS["siblings_gemm"].launch(x, w, [None] * 3, ts, b, scales)
        assert [y.shape for y in ys] == [(m, n) for n in widths]
        grads = OPS["siblings_factor_grads"].launch(dys, ts, x, ts, seeds, probs, scales, BF16, torch.float16)
        assert [grad.shape for grad in grads] == [*((n, rank) for n in widths), *[(rank, k)] * 3]
        assert [grad.dtype for grad in grads] == [BF16] * 3 + [torch.float16] * 3
        assert len(launches) == 4
        assert OPS["siblings_gemm_t"].launch(dys, w, ts, a, seeds, probs).shape == (m, k)
    assert len(launches) == (6 if drop else 5)
    (down, first), (back, second), (product, third), (both, fourth), (dx, fifth) = launches[:5]
    assert down[0] * first.get("BM", 1) >= m and down[1] * first["BR"] >= rank * (3 if m == 1 and not drop else 1)
    assert back[0] * second["BM"] >= m and back[1] == 3 * second["rank_tiles"]
    assert second["rank_tiles"] * second["BR"] >= rank
    tiles = sum(-(-n // third["BO"]) for n in widths)
    assert product == (-(-m // third["BM"]) * tiles, 1) and dx == (-(-m // fifth["BM"]) * -(-k // fifth["BO"]), 1)
    db, da = sum(-(-n // fourth["BC"]) for n in widths), -(-k // fourth["BC"])
    assert both == (db * -(-rank // fourth["BRT"]) + da * -(-rank // fourth["BRP"]),)
    assert fifth["ADD"] is not bool(drop)


@pytest.mark.parametrize(
    ("activations", "factors"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)],
)
def test_only_fp32_takes_more_registers(launches, activations, factors, request):
    """In three matrix products beside half precision, in none without: more warps and fewer ranks at a time hold it."""
    nvidia = not request.node.callspec.params["launches"].startswith("gfx")
    heavy = nvidia and factors is torch.float32
    precision = "ieee" if not nvidia or activations is torch.float32 else "tf32x3" if heavy else "tf32"
    m, n, k, rank, count = 8192, 4096, 1024, 64, 3
    x, y, t = meta(m, k, dtype=activations), meta(m, n, dtype=activations), meta(m, rank, dtype=factors)
    a, b = meta(count, rank, k, dtype=factors), meta(count, n, rank, dtype=factors)
    route = [meta(size, dtype=torch.int32) for size in (m, m, count + 1)]
    scales = meta(count, dtype=torch.float32)
    OPS["lora_down"].launch(x, a[0], None, 0.0)
    OPS["lora_add"].launch(y, t, b[0], 1.0)
    OPS["dora_add"].launch(y, meta(n, dtype=torch.float32), None, t, b[0], 1.0)
    weights = [dense(meta(n, k, dtype=activations))] * 2
    OPS["siblings_gemm"].launch(x, weights, [None] * 2, [t] * 2, [b[0]] * 2, [1.0] * 2)
    OPS["routed_down"].launch(x, *route, a)
    OPS["routed_add"].launch(y, t, *route, b, scales)
    OPS["routed_up_grad"].launch(y, t, *route, b, scales, torch.float32)
    first, *expanded, down, add, shrink, outer = [found for _, found in launches]
    exact = {"tf32x3": configs.PARTS}.get(precision, precision)  # and there no more of them
    assert {found["PRECISION"] for found in (first, down, shrink, outer)} == {exact}
    # what is rounded to half precision is not worth TF32's way through shared memory
    assert {found["PRECISION"] for found in (*expanded, add)} == {{"tf32x3": "bf16x3"}.get(precision, precision)}
    heavier = heavy and activations is torch.float32
    warps = [found["num_warps"] for found in (first, down, outer, add)]
    assert warps == [*[8 if heavier else 4] * 3, 8 if heavy else 4]
    assert [found["BR"] == 16 for found in expanded] == [heavy] * 3


# ---- what decides it, as numbers -------------------------------------------------------------------------------------
def test_a_launch_waits_for_what_takes_longest():
    """All programs' bytes out of the cache, one's alone, those out of memory, or a mask."""
    programs = configs.PROGRAMS
    assert configs.waiting(4 * programs, 3072, 0) == (4 * programs, 4 * 3072)
    assert configs.waiting(1, 96, 0) == (3, 96) and configs.waiting(1, 96, 0, by_warps=False) == (2, 96)
    assert configs.waiting(1, 32, 7 * 2400) == (7, 32)
    assert configs.waiting(programs + 1, 1, 0, 1000)[0] == pytest.approx(240)
    assert configs.waiting(programs + 1, 1, 0, 1000, masking=1)[0] == pytest.approx(120)


@pytest.mark.parametrize(
    "chip, taken",
    [("sm_75", "sm_80"), ("sm_80", "sm_80"), ("sm_89", "sm_86"), ("sm_103", "sm_100"), ("sm_121", "sm_120"),
     ("gfx950", "gfx942"), ("gfx90a", "gfx942")],
)  # fmt: skip
def test_a_chip_that_is_not_listed_has_the_tiles_of_the_nearest_older_one(chip, taken):
    assert configs.tile("lora_gemm", chip) is configs.TILES["lora_gemm"][taken]


@pytest.mark.parametrize("dtypes, plain, exact, update", [
    ((BF16, BF16), "tf32", "tf32", "tf32"),
    ((BF16, torch.float32), "tf32x3", configs.PARTS, "bf16x3"),
    ((torch.float16, torch.float32), "tf32x3", "tf32x3", "bf16x3"),
    ((torch.float32, BF16), "tf32x3", "tf32x3", "tf32x3"),
    ((torch.float32, torch.float32), "ieee", "ieee", "ieee"),
])  # fmt: skip
def test_how_fp32_operands_are_multiplied(dtypes, plain, exact, update, monkeypatch):
    ways = (configs.dot_precision, configs.exact_precision, configs.update_precision)
    assert [way("sm_90", *dtypes) for way in ways] == [plain, exact, update]
    for chip in ("gfx942", "interpreter"):
        assert {way(chip, *dtypes) for way in ways} == {"ieee"}
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))  # as a user may set it
    assert configs.dot_precision("sm_90", *dtypes) == ("tf32" if plain == "ieee" else plain)


def test_tiles_and_warps_follow_ranks():
    assert [configs.rank_tile(rank) for rank in (1, 16, 17, 64, 200)] == [16, 16, 32, 64, 128]
    assert [configs.shared_tile(200, linears) for linears in (1, 2, 3, 4)] == [128, 64, 32, 32]
    assert configs.powers(64) == [16, 32, 64] and configs.powers(4, 1) == [1, 2, 4]
    for chip, precision, registers in (("sm_90", "ieee", True), ("sm_90", "tf32x3", True), ("sm_90", "tf32", False),
                                       ("sm_90", configs.PARTS, False), ("gfx942", "ieee", False)):  # fmt: skip
        assert configs.expand_ranks(64, 64, chip, precision) == (16 if registers else 64)
        assert configs.rank_warps(4, 33, chip, precision) == (8 if registers else 4)
        assert configs.rank_warps(4, 32, chip, precision) == configs.skinny_warps(4, 256, 32, chip, precision) == 4
        assert configs.skinny_warps(4, 257, 32, chip, precision) == 8
        assert configs.held_ranks(16, chip, precision) == (32 if chip != "gfx942" and precision != "tf32" else 16)


def test_steps_and_parts_of_a_contraction():
    """Few rows take longer steps, wide ranks and fp32 shorter ones; few programs take parts of four steps at least."""
    sizes = ((64, 16, False), (64, 16, True), (16, 16, False), (16, 1024, False))
    assert [configs.depth(128, *size) for size in sizes] == [128, 64, 256, 16]
    few, many = configs.PROGRAMS, 2 * configs.PROGRAMS
    for programs, steps, count in ((1, 64, 8), (1, 31, 4), (1, 8, 2), (1, 7, 1), (few, 64, 2), (many, 64, 1)):
        assert configs.parts(programs, steps) == count
    assert [configs.fed_by_warps(*one) for one in (("sm_90", 64), ("sm_90", 63), ("sm_100", 128), ("sm_80", 128),
                                                   ("sm_120", 128))] == [False, True, False, True, True]  # fmt: skip
    assert [configs.expand_tile("sm_90", single).BN for single in (False, True)] == [128, 64]
    assert configs.expand_tile("gfx942", True).BN == 64
