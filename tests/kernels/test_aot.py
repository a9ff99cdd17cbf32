"""tools/aot.py finds nothing wrong with the kernels, and does find what it is there to find."""

import importlib
import os
from types import SimpleNamespace

import pytest
from processes import ROOT, start

pytest.importorskip("triton")


def run(*arguments):
    """Python, where Triton compiles."""
    return start(arguments, timeout=900, TRITON_INTERPRET=None)


def run_tool(*arguments):
    return run(ROOT / "tools" / "aot.py", *arguments)


# Two products; what stands between them.
PTX = """.version 8.0
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 out) {{
    .reg .f32 %f<4>;
    .reg .b64 %d<2>;
    ld.param.u64 %d0, [out];
    mov.f32 %f0, 0f00000000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f0, %f1, %f2, %f3}}, %d0, %d0, 1, 1, 1, 0, 0;
    {}
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f0, %f1, %f2, %f3}}, %d0, %d0, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    st.global.f32 [%d0], %f0; st.global.f32 [%d0+4], %f1;
    ret;
}}
"""
COMPILED = SimpleNamespace(asm={"cubin": b"", "ptx": PTX.format("")})


@pytest.fixture(scope="module")
def aot():
    before = os.environ.get("TRITON_INTERPRET")  # the module clears it for its own process
    module = importlib.import_module("aot")
    if before is not None:
        os.environ["TRITON_INTERPRET"] = before
    return module


@pytest.mark.slow
def test_quick_subset_compiles_within_the_limits():
    done = run_tool("--quick", "--chips", "sm_80,sm_90,gfx942")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if " sm_90 " in line and "lora_gemm" in line]
    assert len(lines) >= 2 and all("HGMMA" in line for line in lines)


def test_unknown_chip_is_refused():
    done = run_tool("--chips", "sm_42")
    assert done.returncode == 2 and "sm_42" in done.stderr


def test_spills_in_loops_are_found(aot, monkeypatch):
    sass = "\n".join(
        [".L_x_0:"]
        + [f"  /*{16 * i:04x}*/  {text} ;" for i, text in enumerate(["LDL R1, [R2]", "FADD R1, R1, R3"])]
        + ["  /*0020*/  @P0 BRA `(.L_x_0) ;", ".L_x_1:", "  /*0030*/  BRA `(.L_x_1);"]
    )
    instructions, branches = aot.parse_sass(sass)
    assert len(instructions) == 4 and branches == {2: 0, 3: 3}
    assert aot.main_loop(instructions, branches) == instructions[:3]  # the padding branch is no loop

    variant = SimpleNamespace(weights=0)
    monkeypatch.setattr(aot, "disassemble", lambda cubin: (sass, "REG:40 STACK:8 SHARED:0 LOCAL:0"))
    registers, spills, *_, problems = aot.inspect_nvidia(COMPILED, variant, "sm_90")
    assert (registers, spills) == (40, 1) and "1 of them in a loop" in problems[0]


def test_matrix_instructions_that_wait_for_each_other_are_found(aot):
    assert aot.complaints(PTX.format("")) == []
    group = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1;"
    said = aot.complaints(PTX.format(f"{group} st.global.f32 [%d0+8], %f2; wgmma.fence.sync.aligned;"))
    assert len(said) == 1 and "serialized" in said[0]


def test_spills_before_a_wait_behind_the_end_are_in_no_loop(aot, monkeypatch):
    """Waiting for an mbarrier goes on there, and back to where it began: that is run once."""
    texts = ["@!P0 BRA `(.L_x_2)", "STL [R1], R0", "LDL R0, [R1]", "EXIT",
             "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR7], R4", "@!P0 BRA `(.L_x_2)", "BRA `(.L_x_1)"]  # fmt: skip
    lines = [f"  /*{16 * i:04x}*/  {text} ;" for i, text in enumerate(texts)]
    sass = "\n".join([lines[0], ".L_x_1:", *lines[1:4], ".L_x_2:", *lines[4:]])
    assert aot.repeated(*aot.parse_sass(sass)) == {4, 5}
    variant = SimpleNamespace(weights=0)
    monkeypatch.setattr(aot, "disassemble", lambda cubin: (sass, "REG:40 STACK:8 SHARED:0 LOCAL:0"))
    registers, spills, *_, problems = aot.inspect_nvidia(COMPILED, variant, "sm_100")
    assert spills == 2 and not problems


def test_a_table_in_global_memory_is_found(aot, monkeypatch):
    """Read twice for the four weights of a thread; not what is copied 16 bytes at a time, nor read before the loop."""
    texts = ["LDG.E R1, [R2]", "LDG.E R1, [R2]", "LDGSTS.E.128 [R1], [R2]", "@!P1 LDG.E.64 R1, [R2]", "LDS R1, [R2]",
             "LDGSTS.E.LTC128B.64 [R1], [R2]", "FMUL R1, R1, R3", "@P0 BRA `(.L_x_0)"]  # fmt: skip
    lines = [f"  /*{16 * i:04x}*/  {text} ;" for i, text in enumerate(texts)]
    sass = "\n".join([*lines[:2], ".L_x_0:", *lines[2:]])
    variant = SimpleNamespace(weights=4 * 32 * 4, options={"num_warps": 4})
    monkeypatch.setattr(aot, "disassemble", lambda cubin: (sass, "REG:40 STACK:0 SHARED:0 LOCAL:0"))
    *_, accesses, per_weight, problems = aot.inspect_nvidia(COMPILED, variant, "sm_90")
    assert accesses == "1/3" and per_weight == 6 / 4 and "0.50 narrow" in problems[0]


def test_what_a_variant_lacks_or_exceeds_is_found(aot, monkeypatch):
    def problems(chip, matrix, text, shared=0, per_weight=0.0):
        variant, metadata = SimpleNamespace(name="one", matrix=matrix), SimpleNamespace(shared=shared)
        monkeypatch.setattr(aot, "variants_of", lambda chip: [variant])
        monkeypatch.setattr(aot, "compile_variant", lambda variant, chip: SimpleNamespace(metadata=metadata))
        for name, number in (("inspect_nvidia", 40), ("inspect_amd", 64)):
            found = number, 0, [text], "", per_weight
            monkeypatch.setattr(aot, name, lambda *args, found=found: (*found, []))
        row = aot.check(chip, 0)
        assert row.registers == (64 if chip == "gfx942" else 40)
        return row.problems

    hopper, ampere, amd = "HGMMA.64x128x16.F32.BF16 R8", "HMMA.16816.F32 R4", "v_mfma_f32_32x32x8_bf16 v0"
    for chip, text in (("sm_90", hopper), ("sm_80", ampere), ("gfx942", amd)):
        assert problems(chip, "big", text, per_weight=10.5) == problems(chip, "none", "FADD R1", per_weight=10.0) == ()
        assert problems(chip, "big", "FADD R1") == problems(chip, "any", "FADD R1") == ("no matrix instruction",)
    assert problems("sm_90", "big", ampere) == ("no HGMMA",) and problems("sm_90", "any", ampere) == ()
    assert problems("sm_86", "none", "FADD R1", shared=101377) == ("shared memory 101377 > 101376",)
    assert problems("sm_86", "none", "FADD R1", shared=101376) == ()
    assert problems("sm_80", "any", ampere, per_weight=10.5) == ()
    assert problems("sm_90", "any", ampere, per_weight=10.5) == ("10.5 instructions per weight > 10",)


def test_inner_loops_and_spills_before_them(aot, monkeypatch):
    texts = ["STL [R1], R0"] * 9 + ["FADD R1"] * 2 + ["@P0 BRA `(.L_x_1)"] + ["FADD R2"] * 3 + ["@P0 BRA `(.L_x_0)"]
    lines = [f"  /*{16 * i:04x}*/  {text};" for i, text in enumerate(texts)]
    sass = "\n".join([*lines[:9], ".L_x_0:", lines[9], ".L_x_1:", *lines[10:]])
    assert aot.main_loop(*aot.parse_sass(sass)) == texts[10:12]  # the inner one, not the longer around it
    assert aot.main_loop(texts[:9], {}) == texts[:9] and aot.main_loop(texts, {4: 1, 8: 7}) == texts[1:5]
    for first, found in ((0, 1), (1, 0)):  # more than a few spills are too many anywhere
        said = "\n".join(sass.splitlines()[first:]), "REG:40 STACK:8 SHARED:0 LOCAL:0"
        monkeypatch.setattr(aot, "disassemble", lambda cubin, said=said: said)
        *_, problems = aot.inspect_nvidia(COMPILED, SimpleNamespace(weights=0), "sm_90")
        assert len(problems) == found


LOOKS = """
from peftfast_kernels.siblings_kernels import variants

(variant,) = [one for one in variants("sm_90") if one.name == "siblings_down bf16 M8192 64x16 R16x3 drop"]
signature, constants, hints = variant.source
at = {name: i for i, name in enumerate(variant.launch.kernel.arg_names)}
assert signature["a_ptrs"] == ("*bf16",) * 3 and signature["scales"] == ("fp32",) * 3
assert signature["stride_xk"] == "constexpr" and constants[(at["stride_xk"],)] == 1
assert signature["BM"] == "constexpr" and constants[(at["BM"],)] == 64
assert (at["K"],) in hints and (at["RS"], 2) in hints and (at["x_ptr"],) in hints
assert signature["thresholds"] == ("i32",) * 3 and (at["thresholds"], 0) not in hints
assert variant.options == {"num_warps": 4, "num_stages": 4}
"""


def test_arguments_are_what_a_launch_would_make_of_them():
    """1 is compiled in, other numbers are known to be multiples of 16 or not, pointers come one for each sibling."""
    done = run("-c", LOOKS)
    assert done.returncode == 0, done.stderr


WORDS = """
from tools.aot import compile_variant, disassemble, main_loop, parse_sass, variants_of

names = {
    "lora_down bf16 M8192 R16 64x16 drop": ("BM", "BK", 1, 0),
    "siblings_down bf16 M8192 64x16 R16x3 drop": ("BM", "BK", 3, 0),
    "lora_factor_grads bf16 N8192 C64 R16/16 drop": ("BM", "BC", 1, 2),  # and two for each row that a thread has
}
for variant in variants_of("sm_90"):
    if variant.name in names:
        rows, columns, masks, keys = names.pop(variant.name)
        sass, _ = disassemble(compile_variant(variant, "sm_90").asm["cubin"])
        words = sum("0x21f0aaad" in text for text in main_loop(*parse_sass(sass)))
        height, width = (variant.launch.arguments[name] for name in (rows, columns))
        threads = 32 * variant.options["num_warps"]
        most = masks * height * width // threads // 2 + keys * height * 8 // threads
        assert 0 < words <= most, (variant.name, words, most)
assert not names
"""


def test_neighbours_share_a_word_of_their_mask():
    """Most of what masked kernels do is to make these."""
    done = run("-c", WORDS)
    assert done.returncode == 0, done.stderr


def test_tiles_fall_back_to_the_nearest_older_chip():
    from peftfast_kernels.configs import SHARED_MEMORY, TILES, tile

    assert tile("lora_gemm", "sm_89") == TILES["lora_gemm"]["sm_86"]
    assert tile("lora_gemm", "sm_75") == TILES["lora_gemm"]["sm_80"]
    assert tile("lora_gemm", "gfx950") == TILES["lora_gemm"]["gfx942"]
    for op in TILES:
        for chip in SHARED_MEMORY:
            assert tile(op, chip).BM >= 16
