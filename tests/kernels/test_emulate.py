"""tools/emulate.py runs compiled kernels right, and does find what it is there to find."""

import re
import struct
from pathlib import Path

import numpy as np
import processes
import pytest
from ptx import multiprocessor
from ptx.program import parse
from ptx.traffic import Traffic

TOOL = Path(__file__).resolve().parents[2] / "tools" / "emulate.py"


def emulate(*arguments):
    """The tool, where Triton compiles."""
    pytest.importorskip("triton")
    return processes.start([TOOL, *arguments], TRITON_INTERPRET=None)


@pytest.mark.parametrize(
    ("chip", "cases"),
    [
        ("sm_90", "keep_mask-M3-|^lora_down-M37-.*bfloat16|^lora_gemm(_t)?-nf4-M37-.*bfloat16|routed_add-M33"),
        ("sm_100", "^dora_add-M37-.*shift|lora_gemm-dense-M50-.*bfloat16-wide|^lora_gemm-nf4-M37-.*bfloat16"),
        ("sm_120", "dequantize-nf4-N40|^lora_down-M50-.*wide|^gated_add-M33-.*bfloat16"),
        ("sm_80", "lora_gemm_t-dense-M37-.*bfloat16|lora_factor_grads-M37-.*float16|gated_grad-M33-.*float16"),
    ],
)
def test_compiled_kernels_are_right(chip, cases):
    if chip in ("sm_90", "sm_100"):
        # those before leave out the fence between copies and the products that read them
        pytest.importorskip("triton", minversion="3.8")
    done = emulate("--chip", chip, "--match", cases)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\n[3-9] cases on sm_\d+, 0 with problems", done.stdout)


@pytest.mark.parametrize(
    ("cases", "kernels"),
    [
        (
            "^(lora_dx-nf4-M64|row_norm-dense-M300|lora_factor_grads-.*wide)",
            {"expand_kernel", "norm_kernel", "factor_grads_kernel"},
        ),
        ("^lora_gemm-nf4-M16-", {"gemm_kernel"}),
    ],
)
def test_shared_memory_is_not_waited_for(cases, kernels):
    """Factors in fp32 beside bf16, their gradients, norms of rows, few rows of a 4-bit weight: cycles for shared memory
    are within a twentieth of the least."""
    if "gemm_kernel" in kernels:
        pytest.importorskip("triton", minversion="3.8")  # the fence, as above
    done = emulate("--sizes", "--traffic", "--match", cases)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r"^(\w+_kernel) +shared +\d+ +(\d+) +(\d+)$", done.stdout, re.MULTILINE)
    assert {kernel for kernel, _, _ in counts} == kernels
    for _, counted, least in counts:
        assert int(counted) <= 1.05 * int(least), done.stdout


def test_a_case_that_nobody_knows_is_refused():
    done = emulate("--match", "no such case")
    assert done.returncode == 2 and "no case matches 'no such case'" in done.stderr


HEAD = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1
)
{
	.reg .pred 	%p<4>;
	.reg .b32 	%r<16>;
	.reg .b64 	%rd<8>;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b32 	%r1, [kernel_param_1];
	mov.u32 	%r2, %tid.x;
	mad.wide.u32 	%rd2, %r2, 4, %rd1;
	shl.b32 	%r3, %r2, 2;
	mov.b32 	%r4, global_smem;
	add.s32 	%r5, %r4, %r3;
	xor.b32 	%r6, %r3, 128;
"""
TAIL = "\tret;\n}\n"


def launch(body, values, threads=64, shared=256, grid=(1, 1, 1), **options):
    """Runs the body on an array: %rd2 is the thread's place in it, %r5 in shared memory, %r6 that of the other warp."""
    array = np.array(values, np.uint32)
    program = parse(HEAD + body + TAIL)
    arguments = [struct.pack("<Q", array.ctypes.data), struct.pack("<i", 7)]
    ranges = [(array.ctypes.data, array.ctypes.data + array.nbytes)]
    multiprocessor.run(program, arguments, grid, threads, shared, ranges, **options)
    return array


EXCHANGE = """
	ld.global.b32 	%r7, [%rd2];
	st.shared.b32 	[%r5], %r7;
	{}
	ld.shared.b32 	%r8, [%r6];
	st.global.b32 	[%rd2], %r8;
"""
COPY = """
	cp.async.ca.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x4, 0x4;
	cp.async.commit_group;
	{}
	bar.sync 	0;
	ld.shared.b32 	%r8, [%r6];
	st.global.b32 	[%rd2], %r8;
"""
NUMBERS = np.arange(64, dtype=np.uint32)
EXCHANGED = np.roll(NUMBERS, 32)


def test_threads_exchange_numbers():
    assert (launch(EXCHANGE.format("bar.sync 	0;"), NUMBERS) == EXCHANGED).all()
    for eager in (False, True):
        body = COPY.format("cp.async.wait_group 	0;")
        assert (launch(body, NUMBERS, eager=eager) == EXCHANGED).all()


def test_threads_part_and_meet():
    """A loop whose end each thread reaches in its own time."""
    body = """
	and.b32 	%r7, %r2, 3;
	mov.b32 	%r8, 0;
$L__BB0_1:
	setp.ge.s32 	%p1, %r8, %r7;
	@%p1 bra 	$L__BB0_3;
	add.s32 	%r8, %r8, 1;
	bra.uni 	$L__BB0_1;
$L__BB0_3:
	bar.sync 	0;
	add.s32 	%r8, %r8, %r1;
	st.global.b32 	[%rd2], %r8;
"""
    assert (launch(body, NUMBERS) == NUMBERS % 4 + 7).all()


def test_warps_that_parted_meet_at_a_barrier():
    """The first one goes through what lies behind the barrier in the text, and back."""
    body = """
	setp.lt.u32 	%p1, %r2, 32;
	@%p1 bra 	$L__BB0_2;
$L__BB0_1:
	bar.sync 	0;
	ld.shared.b32 	%r8, [%r6];
	st.global.b32 	[%rd2], %r8;
	ret;
$L__BB0_2:
	st.shared.b32 	[%r5], %r1;
	st.shared.b32 	[%r6], %r2;
	bra.uni 	$L__BB0_1;
"""
    assert (launch(body, NUMBERS) == [*NUMBERS[:32], *[7] * 32]).all()
    assert "wait for others that never come\n    bar.sync" in fault(body.replace("bra.uni 	$L__BB0_1", "ret"))


@pytest.mark.parametrize(("kind", "dtype"), [("f32x2", np.float32), ("f16x2", np.float16)])
def test_several_numbers_in_a_register_are_computed_each(kind, dtype):
    bits = 16 * np.dtype(dtype).itemsize
    body = f"""
	mul.wide.u32 	%rd3, %r2, {bits // 8};
	add.s64 	%rd3, %rd3, %rd1;
	ld.global.b{bits} 	%rd4, [%rd3];
	fma.rn.{kind} 	%rd4, %rd4, %rd4, %rd4;
	st.global.b{bits} 	[%rd3], %rd4;
"""
    numbers = np.linspace(-2, 2, 128).astype(dtype)
    expected = (numbers.astype(np.float64) ** 2 + numbers).astype(dtype)
    assert (launch(body, numbers.view(np.uint32)).view(dtype) == expected).all()


@pytest.mark.parametrize(
    ("instruction", "result"),
    [
        ("add.rn.f32.bf16 	%r7, %rs1, 0f40000000", 3.5),
        ("sub.rn.f32.f16 	%r7, %rs2, 0f40000000", -0.5),
        ("fma.rn.f32.bf16 	%r7, %rs1, %rs1, 0f40000000", 4.25),
        ("max.f32 	%r7, 0f7FC00000, 0f40000000", 2),
        ("max.NaN.f32 	%r7, 0f7FC00000, 0f40000000", np.nan),
    ],
)
def test_single_instructions(instruction, result):
    body = f"""
	mov.b16 	%rs1, 0x3FC0;
	mov.b16 	%rs2, 0x3E00;
	{instruction};
	st.global.b32 	[%rd2], %r7;
"""
    np.testing.assert_array_equal(launch(body, NUMBERS).view(np.float32), np.float32(result))


def test_a_half_that_nobody_reads_need_not_be_written():
    body = "\tmov.b64 	%rd3, {%r1, %r9};\n\tmov.b64 	{%r7, %r8}, %rd3;\n\tst.global.b32 	[%rd2], %r7;\n"
    assert (launch(body, NUMBERS) == 7).all()


def fault(body, values=NUMBERS, **options):
    with pytest.raises(multiprocessor.Fault) as caught:
        launch(body, values, **options)
    return str(caught.value)


def test_races_are_found():
    assert "another warp wrote since the last barrier\n    ld.shared" in fault(EXCHANGE.format(""))
    late = EXCHANGE.format("bar.sync 	0;") + "\tst.shared.b32 	[%r5], %r8;\n"
    assert "another warp read since the last barrier\n    st.shared" in fault(late)
    together = "\tst.shared.b32 	[%r4], %r2;\n"
    assert "two warps write other values" in fault(together)
    assert (launch("\tst.shared.b32 	[%r4], %r1;\n", NUMBERS) == NUMBERS).all()  # the same value: nobody minds


def test_races_are_found_in_whatever_program_and_warp():
    some = "\tsetp.{}.s32 	%p1, %r2, {};\n".format
    # the first program alone
    waits = "mov.u32 	%r9, %ctaid.x;\n\tsetp.eq.s32 	%p2, %r9, 0;\n\t@%p2 bar.sync 	0;"
    assert "another warp wrote since the last barrier\n    ld.shared" in fault(EXCHANGE.format(waits), grid=(2, 1, 1))
    one, other = some("eq", 32) + "\t@%p1 st.shared.b32 	[%r5], %r1;\n", "\t@%p1 ld.shared.b32 	%r8, [%r5+4];\n"
    assert "another warp wrote" in fault(one + some("eq", 31) + other)  # neighbours in two warps
    launch(one + some("eq", 32) + other.replace("+4", ""), NUMBERS)
    apart = some("lt", 32) + "\t@%p1 ld.shared.b32 	%r8, [%r4];\n\t@!%p1 ld.shared.b32 	%r8, [%r4];\n"
    for read in (apart, some("lt", 32) + "\tld.shared.b32 	%r8, [%r4];\n"):
        for writer in ("%p1", "!%p1"):  # is one of two that have read
            assert "another warp read" in fault(f"\tbar.sync 	0;\n{read}\t@{writer} st.shared.b32 	[%r4], %r1;\n")
    launch("\tmov.u32 	%r9, %ctaid.x;\n\tst.shared.b32 	[%r4], %r9;\n", NUMBERS, grid=(2, 1, 1))


def test_copies_that_nobody_waits_for_are_late():
    """What is read is what shared memory starts with: NaN."""
    for wait in ("", "cp.async.wait_group 	1;"):
        assert (launch(COPY.format(wait), NUMBERS) == 0xFFFFFFFF).all()
    found = launch(COPY.format("setp.lt.s32 	%p1, %r2, 32;\n\t@%p1 cp.async.wait_group 	0;"), NUMBERS)
    assert (found[:32] == 0xFFFFFFFF).all() and (found[32:] == EXCHANGED[32:]).all()


def test_copies_are_made_once():
    wait = "cp.async.wait_group 	0;\n\t"
    again = f"{wait}st.shared.b32 	[%r5], %r1;\n\tcp.async.commit_group;\n\t{wait}"
    assert (launch(COPY.format(again), NUMBERS) == 7).all()


def test_accesses_outside_and_misaligned_are_found():
    store = "\tst.global.b32 	[%rd2+{}], %r1;\n"
    assert (launch(store.format(0), NUMBERS) == 7).all()
    assert "4 bytes at 256 of a tensor of 256 bytes" in fault(store.format(4))
    assert "4 bytes at -4 of a tensor" in fault(store.format(-4))
    assert "no multiple of 4" in fault(store.format(2))
    assert "of 256 bytes shared" in fault("\tst.shared.b32 	[%r5+4], %r1;\n")


def test_a_barrier_for_some_is_found():
    body = "\tsetp.lt.s32 	%p1, %r2, 32;\n\t@%p1 bar.sync 	0;\n"
    assert "a part of the threads of a program at a barrier" in fault(body)


def test_registers_that_nobody_wrote_are_found():
    assert "%r9 is read before it is written" in fault("\tst.global.b32 	[%rd2], %r9;\n")


def test_instructions_that_are_not_known_are_refused():
    with pytest.raises(NotImplementedError, match="tcgen05"):
        launch("\ttcgen05.mma 	%r7, %r8;\n", NUMBERS)


# ---- products whose operands lie in shared memory: each thread puts its row of A [128, 16] in bfloat16 there
SHARED_ROWS = """
	mad.wide.u32 	%rd3, %r2, 64, %rd1;
	ld.global.v4.b32 	{{%r7, %r8, %r9, %r10}}, [%rd3];
	ld.global.v4.b32 	{{%r11, %r12, %r13, %r14}}, [%rd3+16];
	shr.u32 	%r15, %r2, 3;
	shl.b32 	%r15, %r15, 7;
	shl.b32 	%r16, %r2, 4;
	add.s32 	%r15, %r15, %r16;
	st.shared.v4.b32 	[%r15], {{%r7, %r8, %r9, %r10}};
	st.shared.v4.b32 	[%r15+128], {{%r11, %r12, %r13, %r14}};
	setp.lt.u32 	%p1, %r2, 32;
	mov.pred 	%p3, 0;
"""
ADDRESS = (
    "mov.b64 	%rd4, {};"  # of 128 bytes from one half of the columns to the other, 256 from eight rows to the next
)


def small_rows():
    """A, of small whole numbers, which are exact in bfloat16; and in that, two numbers a word, beside as much room."""
    rows = np.zeros((128, 32), np.float32)
    rows[:, :16] = np.random.default_rng(0).integers(-8, 8, (128, 16))
    return rows[:, :16], (rows.view(np.uint32) >> 16).astype(np.uint16).view(np.uint32)


# ---- Hopper: the 128 threads of a warpgroup have A Aᵀ of the first 64 rows and 8 columns
ASYNC = """
	fence.proxy.async.shared::cta;
	bar.sync 	0;
	{product}
	{wait}
	st.global.v4.b32 	[%rd3], {{%r30, %r31, %r32, %r33}};
"""
WGMMA = """
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r30, %r31, %r32, %r33}, %rd4, %rd4, %p3, 1, 1, 0, 0;
	wgmma.commit_group.sync.aligned;
"""
WAIT_GROUP = "wgmma.wait_group.sync.aligned 0;\n"
OTHERS = "xor.b32 %r20, %r15, 2048;\nst.shared.b32 [%r20], %r1;\n"  # what a thread of another warp has written


def warpgroup(product=WGMMA, wait=WAIT_GROUP, before="", **options):
    """Where the results are right."""
    rows, packed = small_rows()
    body = SHARED_ROWS.format() + ADDRESS.format(68720001024) + before + ASYNC.format(product=product, wait=wait)
    found = launch(body, packed, threads=128, shared=4096, **options)
    thread, pair = np.indices((128, 4))
    row = thread // 32 * 16 + thread % 32 // 4 + pair // 2 * 8
    return found.view(np.float32)[:, :4] == (rows[:64] @ rows[:8].T)[row, thread % 4 * 2 + pair % 2]


@pytest.mark.parametrize("eager", [False, True])
def test_matrix_products_of_warpgroups(eager):
    assert warpgroup(eager=eager).all()
    assert warpgroup(wait=WAIT_GROUP + "bar.sync 0;" + OTHERS, eager=eager).all()
    again = WAIT_GROUP + WGMMA.replace("%p3", "1") + WAIT_GROUP  # added to the first one
    assert not warpgroup(wait=again, eager=eager).any(1).all()


FENCE = "fence.proxy.async.shared::cta;\n"
OWN = "@%p1 st.shared.b32 [%r15], %r1;\n"
CHANGES = "changes while a matrix product may read it"


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (CHANGES, {"wait": OWN + WAIT_GROUP}),
        # what was waited for is read, which is not the end of the product after it
        (CHANGES, {"wait": WGMMA.replace("%r3", "%r4") + "wgmma.wait_group.sync.aligned 1;\nmov.b32 %r20, %r30;\n" +
                           OWN + WAIT_GROUP}),
        ("that another warp read since the last barrier", {"wait": WAIT_GROUP + OTHERS}),
        ("that another warp wrote since the last barrier", {"product": OTHERS + FENCE + WGMMA}),
        ("after the last fence", {"product": OTHERS + "bar.sync 0;" + WGMMA}),
        ("wgmma of a part of a warpgroup", {"product": WGMMA.replace("wgmma.mma", "@%p1 wgmma.mma")}),
        ("not the same in all of a warpgroup", {"before": "cvt.u64.u32 %rd5, %r2;\nadd.s64 %rd4, %rd4, %rd5;\n"}),
    ],
)  # fmt: skip
def test_faults_with_products_of_warpgroups_are_found(message, changes):
    with pytest.raises(multiprocessor.Fault) as caught:
        warpgroup(**changes)
    assert message in str(caught.value)


# ---- tensor memory: each thread has the first 16 columns of its row of A Aᵀ
ROWS = (
    SHARED_ROWS
    + """
	mov.b32 	%r17, 4096;
	@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r17], 32;
	elect.sync 	%r18|%p2, -1;
	and.pred 	%p2, %p1, %p2;
	@%p2 mbarrier.init.shared::cta.b64 [%r17+8], 1;
	fence.proxy.async.shared::cta;
	bar.sync 	0;
	ld.shared.b32 	%r19, [%r17];
	shr.u32 	%r20, %r2, 5;
	shl.b32 	%r20, %r20, 21;
	add.s32 	%r20, %r20, %r19;
	mov.b64 	%rd4, 70437464178688;
	mov.b32 	%r21, 134481040;
	{product}
	{wait}
	tcgen05.ld.sync.aligned.32x32b.x8.b32 {{%r30, %r31, %r32, %r33, %r34, %r35, %r36, %r37}}, [%r20 + 0];
	tcgen05.ld.sync.aligned.32x32b.x8.b32 {{%r38, %r39, %r40, %r41, %r42, %r43, %r44, %r45}}, [%r20 + 8];
	tcgen05.wait::ld.sync.aligned;
	st.global.v4.b32 	[%rd3], {{%r30, %r31, %r32, %r33}};
	st.global.v4.b32 	[%rd3+16], {{%r34, %r35, %r36, %r37}};
	st.global.v4.b32 	[%rd3+32], {{%r38, %r39, %r40, %r41}};
	st.global.v4.b32 	[%rd3+48], {{%r42, %r43, %r44, %r45}};
	bar.sync 	0;
	{end}
"""
)
PRODUCT = """
	@%p2 tcgen05.mma.cta_group::1.kind::f16 [ %r19 + 0 ], %rd4, %rd4, %r21, %p3;
	@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r17+8];
"""
WAIT = """
{
	@%p3 bra.uni skipWait;
	.reg .pred complete;
	waitLoop:
	mbarrier.try_wait.parity.shared::cta.b64 complete, [%r17+8], 0;
	@!complete bra.uni waitLoop;
	skipWait:
}
"""
# The same as two products of 64 rows, the second into the upper half of the lanes that each warp reaches.
HALVES = """
	mov.b32 	%r21, 67372176;
	add.s32 	%r22, %r19, 1048576;
	add.s64 	%rd5, %rd4, 128;
	@%p2 tcgen05.mma.cta_group::1.kind::f16 [ %r19 + 0 ], %rd4, %rd4, %r21, %p3;
	@%p2 tcgen05.mma.cta_group::1.kind::f16 [ %r22 + 0 ], %rd5, %rd4, %r21, %p3;
	@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r17+8];
"""
END = "@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r19, 32;"


def products(product=PRODUCT, wait=WAIT, end=END, order=slice(None), **options):
    """Where the results are right, which threads have in this order."""
    rows, packed = small_rows()
    body = ROWS.format(product=product, wait=wait, end=end)
    found = launch(body, packed, threads=128, shared=4112, **options)
    return found.view(np.float32) == (rows @ rows[:16].T)[order]


@pytest.mark.parametrize("eager", [False, True])
def test_matrix_products_in_tensor_memory(eager):
    assert products(eager=eager).all()
    assert products(eager=eager, grid=(2, 1, 1)).all()
    own = STORE.format(0) * 2 + STORED + "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r30}, [%r20 + 0];\n"
    assert products(eager=eager, end=own + "tcgen05.wait::ld.sync.aligned;\nbar.sync 0;" + END).all()
    first_warp = "setp.ge.u32 %p0, %r2, 32;\n@%p0 bra $L_1;\n" + WAIT + "$L_1:\nbar.sync 0;\n"
    assert products(wait=first_warp, eager=eager).all()
    again = WAIT + PRODUCT.replace("%p3", "%p1") + WAIT.replace(", 0;", ", 1;")  # added to the first one
    assert not products(wait=again, eager=eager).any(1).all()
    # what is overwritten while a product may read it is wrong in late ones
    warp, upper, lane = np.indices((4, 2, 16)).reshape(3, 128)
    assert products(HALVES, order=64 * upper + 16 * warp + lane, eager=eager).all()


STORE = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r20 + {}], {{%r2}};\n"
STORED = "tcgen05.wait::st.sync.aligned;\n"
ALLOCATE_ALL = "@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r17], 512;\n"
UNAWAITED = "that this warp did not wait for\n    {}"
FOREVER = "wait for others that never come\n    mbarrier.try_wait"


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (UNAWAITED.format("tcgen05.ld"), {"wait": ""}),
        (UNAWAITED.format("tcgen05.st"), {"wait": STORE.format(0)}),
        (FOREVER, {"product": PRODUCT.partition("@%p2 tcgen05.commit")[0]}),
        (FOREVER, {"wait": WAIT + WAIT.replace(", 0;", ", 1;")}),
        (
            "columns 512 to 528 of tensor memory are not allocated",
            {"product": PRODUCT.replace("%r19 + 0", "%r19 + 32")},
        ),
        ("tensor memory is read that nobody wrote", {"product": PRODUCT.replace("%p3", "%p1")}),
        (
            "tensor memory is read that nobody wrote",
            {"product": HALVES.replace("%rd5, %rd4, %r21, %p3", "%rd5, %rd4, %r21, %p1")},
        ),
        ("another warp was since the last barrier\n    @%p2 tcgen05.mma", {"product": STORE.format(0) + HALVES}),
        ("lanes of tensor memory that are out of reach", {"wait": WAIT + "mov.b32 %r20, %r19;"}),
        ("lanes of tensor memory that are out of reach", {"wait": WAIT + "add.s32 %r20, %r20, 1048576;"}),
        ("another warp was since the last barrier\n    @%p2 tcgen05.mma", {"product": STORE.format(0) + PRODUCT}),
        ("that nobody waited for\n    @%p2 tcgen05.mma", {"product": STORE.format(8) + "bar.sync 0;" + PRODUCT}),
        ("changes while a matrix product may read it", {"product": PRODUCT + "st.shared.b32 [%r15], %r1;"}),
        ("another warp wrote since the last barrier", {"product": "st.shared.b32 [%r15], %r1;" + PRODUCT}),
        ("after the last fence", {"product": "st.shared.b32 [%r15], %r1;\nbar.sync 0;" + PRODUCT}),
        ("more than one thread of a program asks", {"product": PRODUCT.replace("@%p2", "@%p1")}),
        ("columns 448 to 464 of tensor memory are not allocated", {"product": "add.s32 %r19, %r19, -32;" + PRODUCT}),
        ("waits for 512 columns of tensor memory for ever", {"product": ALLOCATE_ALL}),
        ("64 columns of tensor memory were not allocated at 480", {"end": END.replace(" 32;", " 64;")}),
        (UNAWAITED.format("@%p1 tcgen05.dealloc"), {"end": PRODUCT + END}),
        ("that nobody waited for\n    @%p1 tcgen05.dealloc", {"end": STORE.format(0) + "bar.sync 0;" + END}),
        ("since the last barrier\n    @%p1 tcgen05.dealloc", {"end": STORE.format(0) + STORED + END}),
        ("ends without freeing tensor memory", {"end": ""}),
    ],
)
def test_faults_with_tensor_memory_are_found(message, changes):
    with pytest.raises(multiprocessor.Fault) as caught:
        products(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(("stride", "cycles"), [(4, 1), (8, 2), (128, 32)])
def test_conflicts_of_banks_are_counted(stride, cycles):
    traffic = Traffic()
    body = f"\tmul.lo.s32 	%r7, %r2, {stride};\n\tst.shared.b32 	[%r7], %r1;\n"
    array = np.zeros(32 * 32, np.uint32)
    program = parse(HEAD + body + TAIL)
    arguments = [struct.pack("<Q", array.ctypes.data), struct.pack("<i", 7)]
    multiprocessor.run(program, arguments, (1, 1, 1), 32, 4096, traffic=traffic)
    assert [counts[1:] for counts in traffic.counts.values()] == [[cycles, 1]]
