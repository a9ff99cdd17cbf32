"""Every registered op at every one of its cases: plain torch and Triton against the fp64 oracle."""

import ast
import mmap
from pathlib import Path

import pytest
import torch

import peftfast_kernels
from bench.operands import Size, arguments
from peftfast_kernels import (
    OPS,
    dequantize,
    gated,
    gated_grad,
    lora_down,
    lora_dt,
    lora_factor_grads,
    lora_gemm,
    lora_gemm_t,
    row_norm,
    use_backend,
)  # fmt: skip
from peftfast_kernels.decode import DECODERS, Operand, dense, random_operand
from peftfast_kernels.op import is_interpreting

pytestmark = pytest.mark.usefixtures("poisoned_empty")

#: in every second case vectors have strides; products with fp4 are nf4's with another table, so that some are enough
CASES = [
    (name, case, i % 2 == 0)
    for name, op in OPS.items()
    for i, case in enumerate(op.cases())
    if not (name.startswith("lora_gemm") and case.id.startswith("fp4") and i % 4)
]
IDS = [f"{name}-{case.id}" for name, case, _ in CASES]
EXACT = {"dequantize", "keep_mask"}  # no arithmetic to lose precision in: equal bit for bit


def outputs(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def upcast(value):
    """The same arguments in fp64; operands stay, because rounding to their dtype is part of what they mean."""
    if isinstance(value, dict):
        return {key: upcast(one) for key, one in value.items()}
    if isinstance(value, list):
        return [upcast(one) for one in value]
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def tensors(kwargs):
    """(argument, tensor) of every tensor among the arguments, in lists too."""
    return [
        (key, one)
        for key, value in kwargs.items()
        for one in (value if type(value) is list else [value])
        if isinstance(one, torch.Tensor)
    ]


def with_strides(value):
    """The same arguments, between the elements of whose vectors there is NaN."""
    if isinstance(value, dict):
        return {key: with_strides(one) for key, one in value.items()}
    if type(value) is list:
        return [with_strides(one) for one in value]
    if isinstance(value, torch.Tensor) and value.dim() == 1 and value.is_floating_point():
        return torch.stack((value, torch.full_like(value, torch.nan)), 1)[:, 0]
    return value


def plain_dtype(kwargs, out):
    """What torch's own product of these arguments loses: on the CPU half precision is rounded before it is widened."""
    floats = {one.dtype for _, one in tensors(kwargs) if one.is_floating_point()}
    return max({out.dtype, floats.pop() if len(floats) == 1 else out.dtype}, key=lambda d: torch.finfo(d).eps)


def assert_no_worse(out, native, oracle, dtype):
    """out is as close to the oracle as the fp32 result rounded once to dtype, times 2, plus two ulp; max and RMS.

    The two ulp are for small outputs, where the plain result may be exact by luck.
    """
    assert out.shape == oracle.shape
    if out.numel() == 0:
        return
    eps = 2 * torch.finfo(dtype).eps
    error, plain = out.double() - oracle, native.to(dtype).double() - oracle
    assert error.abs().max() <= 2 * plain.abs().max() + eps * oracle.abs().max()
    assert error.square().mean().sqrt() <= 2 * plain.square().mean().sqrt() + eps * oracle.square().mean().sqrt()


def check(name, case, strided, device, path):
    op = OPS[name]
    kwargs = with_strides(case.make(device)) if strided else case.make(device)
    before = [one.clone() for _, one in tensors(kwargs)]
    with use_backend("triton" if path == "launch" else "torch"):
        results = outputs(getattr(op, path)(**kwargs))
    natives = outputs(op.reference(**kwargs))
    oracles = outputs(op.reference(**upcast(kwargs)))
    if op.fake is not None:  # what a compiler is told
        about = [[(out.shape, out.dtype, out.stride()) for out in one] for one in (results, outputs(op.fake(**kwargs)))]
        assert about[0] == about[1]
    for out, native, oracle in zip(results, natives, oracles, strict=True):
        if name in EXACT:
            assert torch.equal(out, native)
        else:
            assert_no_worse(out, native, oracle, out.dtype if path == "launch" else plain_dtype(kwargs, out))
    for (key, value), kept in zip(tensors(kwargs), before, strict=True):
        assert torch.equal(value, kept), f"{name} wrote into its argument {key}"


@pytest.mark.parametrize("path", ["eager", "launch"])
@pytest.mark.parametrize(("name", "case", "strided"), CASES, ids=IDS)
def test_matches_oracle(name, case, strided, path, device):
    check(name, case, strided, device, path)


def in_double(value):
    """Arguments in fp64, one of an operand's included; dtypes of results too."""
    if isinstance(value, dict):
        return {key: in_double(one) for key, one in value.items()}
    if isinstance(value, Operand):
        stored = [one.double() for one in value.tensors] if value.format == "dense" else value.tensors
        return value._replace(tensors=stored, dtype=torch.float64)
    if isinstance(value, torch.dtype):
        return torch.float64
    return [in_double(one) for one in value] if isinstance(value, list) else upcast(value)


def test_what_is_masked_out_has_a_value():
    """Triton's interpreter takes zeros where a load says nothing; on a GPU it is what a register held before."""
    files = Path(peftfast_kernels.__file__).parent.glob("*.py")
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    loads = [{keyword.arg for keyword in node.keywords} for node in nodes if ast.unparse(node.func) == "tl.load"]
    assert {"mask", "other"} in loads and not any("mask" in given and "other" not in given for given in loads)


@pytest.mark.parametrize("name", [name for name in OPS if name not in EXACT])
def test_double_is_left_to_torch(name, device):
    """Kernels sum in fp32, which is no answer to somebody who has asked for fp64."""
    for case in OPS[name].cases():
        kwargs = in_double(case.make(device))
        with use_backend("triton"):
            assert not OPS[name].runs_triton(**kwargs)
            results, oracles = outputs(OPS[name](**kwargs)), outputs(OPS[name].reference(**kwargs))
        for out, oracle in zip(results, oracles, strict=True):
            assert out.dtype == torch.float64
            torch.testing.assert_close(out, oracle, rtol=1e-12, atol=1e-11)


def test_one_double_among_the_arguments_is_enough(device):
    x, w, t, b = (torch.randn(*shape, device=device) for shape in ((5, 16), (8, 16), (5, 4), (8, 4)))
    with use_backend("triton"):
        assert lora_gemm.runs_triton(x, dense(w), None, t, b, 1.0)
        assert not lora_gemm.runs_triton(x, dense(w), None, t.double(), b.double(), 1.0)
        assert not lora_gemm.runs_triton(x, dense(w), None, t=t.double(), b=b.double(), scale=1.0)


@pytest.mark.parametrize("name", OPS)
def test_cost_counts_work(name, device):
    for case in OPS[name].cases():
        kwargs = case.make(device)
        cost = OPS[name].cost(**kwargs)
        assert cost.flops >= 0 and cost.bytes >= 0
        if all(size > 0 for _, one in tensors(kwargs) for size in one.shape):
            assert cost.bytes > 0 or kwargs.get("rows") == 0


def one_launch_beside_cublas(name, case):
    """Updates that are wide, masked, or of siblings."""
    masked = name == "lora_gemm_t" and "-p0.0-" not in case.id
    return name.startswith("siblings_gemm") or masked or name.startswith("lora_gemm") and "-wide" in case.id


BESIDE_CUBLAS = [one for one in CASES if one_launch_beside_cublas(*one[:2])]


@pytest.mark.parametrize(
    ("name", "case", "strided"), BESIDE_CUBLAS, ids=[f"{name}-{case.id}" for name, case, _ in BESIDE_CUBLAS]
)
def test_updates_beside_cublas(name, case, strided, device, monkeypatch):
    """Where the base product is not fused, these still are one launch."""
    monkeypatch.setattr("peftfast_kernels.dispatch.fuses", lambda *args: False)
    with use_backend("triton"):
        assert OPS[name].runs_triton(**case.make(device))
        check(name, case, strided, device, "launch")


@pytest.mark.parametrize(
    ("name", "factors", "backend"),
    [
        ("lora_gemm", "t", "torch"),
        ("lora_gemm_t", "p", "torch"),
        ("lora_gemm_t", "p", "triton"),
        ("siblings_gemm", "t", "torch"),
        ("siblings_gemm", "t", "triton"),
        ("siblings_gemm_t", "p", "torch"),
        ("siblings_gemm_t", "p", "triton"),
    ],
)
def test_a_small_update_costs_no_accuracy(name, factors, backend, device, monkeypatch):
    """Where the adapter is not in the accumulator it comes first, so that the big product is rounded once."""
    monkeypatch.setattr("peftfast_kernels.dispatch.fuses", lambda *args: False)
    case = next(case for case in OPS[name].cases() if case.id.startswith("dense-") and case.id.endswith("bfloat16"))
    kwargs = case.make(device)
    if "bias" in kwargs:  # which comes with the adapter, and is rounded with it
        kwargs["bias"] = [None] * len(kwargs["w"]) if isinstance(kwargs["w"], list) else None
    scaled = kwargs[factors] if isinstance(kwargs[factors], list) else [kwargs[factors]]

    def error():
        with use_backend(backend):
            outputs, truths = OPS[name](**kwargs), OPS[name].reference(**kwargs)
        outputs, truths = (out if isinstance(out, list) else [out] for out in (outputs, truths))
        return sum((out - truth).norm() / truth.norm() for out, truth in zip(outputs, truths, strict=True))

    for one in scaled:
        one.mul_(1 / 64)
    with_update = error()
    for one in scaled:
        one.zero_()
    assert with_update <= 1.1 * error()


def test_siblings_that_do_not_fit_together(device):
    """Other storages or a bias in one of them: their products one by one, the updates in one launch all the same."""
    case = next(case for case in OPS["siblings_gemm"].cases() if case.id.startswith("dense-M7"))
    for change in ("storage", "bias"):
        kwargs = case.make(device)
        if change == "storage":
            n, k = kwargs["w"][1].shape
            kwargs["w"][1] = random_operand("nf4", n, k, torch.float32, device)
        else:
            kwargs["bias"][1] = None
        expected = OPS["siblings_gemm"].reference(**kwargs)
        for backend in ("torch", "triton"):
            with use_backend(backend):
                torch.testing.assert_close(OPS["siblings_gemm"](**kwargs), expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_broadcast_and_transposed_inputs(backend, device):
    """Gradients of a sum arrive with zero strides, activations of attention arrive transposed."""
    m, n, r = 37, 50, 5
    g = torch.Generator().manual_seed(0)
    t, b = torch.randn(m, r, generator=g).to(device), torch.randn(n, r, generator=g).to(device)
    dy = torch.full((1, 1), 0.5, device=device).expand(m, n)
    x = torch.randn(n, m, generator=g).to(device).t()
    assert x.stride(0) == 1
    seed = torch.tensor(3, device=device)
    with use_backend(backend):
        torch.testing.assert_close(lora_dt(dy, b, 2.0), dy @ b * 2)
        torch.testing.assert_close(lora_dt(dy, b.t().contiguous().t(), 2.0), dy @ b * 2)
        args = (x, b.t(), seed, 0.4)
        torch.testing.assert_close(lora_down(*args), lora_down.reference(*args))
        args = (dy, t, x, t, seed, 0.4, 2.0, torch.float32, torch.float32)
        db, da = lora_factor_grads(*args)
        torch.testing.assert_close(db, dy.t() @ t * 2)
        torch.testing.assert_close(da, lora_factor_grads.reference(*args)[1])
        weight = torch.randn(n, n + 1, generator=g).to(device)[:, 1:]  # rows that are not 16-byte aligned
        args = (x, dense(weight), None, t, b, 0.3)
        torch.testing.assert_close(lora_gemm(*args), lora_gemm.reference(*args))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients_are_deterministic(backend, device):
    """From run to run, and whether db and da are asked for together or alone."""
    g = torch.Generator().manual_seed(0)
    x, t, p = (torch.randn(shape, generator=g).to(device) for shape in ((700, 40), (700, 9), (700, 20)))
    rest = (None, 0.0, 0.7, torch.float32, torch.float32)
    with use_backend(backend):
        first = lora_factor_grads(x, t, x, p, *rest)
        second = lora_factor_grads(x, t, x, p, *rest)
        alone = [*lora_factor_grads(x, t, None, None, *rest), *lora_factor_grads(None, None, x, p, *rest)]
    assert [grad.shape for grad in first] == [(40, 9), (20, 40)]
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    for one, two in zip(first, alone, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_every_height_of_a_strip(drop, device):
    """So many rows that strips are higher than 16, and so many columns that one program owns more than 16."""
    g = torch.Generator().manual_seed(0)
    seed = torch.tensor(9, device=device) if drop else None
    x, a = torch.randn(4100, 20, generator=g).to(device), torch.randn(5, 20, generator=g).to(device)
    with use_backend("triton"):
        torch.testing.assert_close(lora_down(x, a, seed, drop), lora_down.reference(x, a, seed, drop))
        torch.testing.assert_close(lora_dt(x, a.t(), 0.5), x @ a.t() * 0.5)
        x, f = torch.randn(20, 2100, generator=g).to(device), torch.randn(20, 5, generator=g).to(device)
        args = (x, f, x.flip(0), f, seed, drop, 0.5, torch.float32, torch.float32)
        for grad, expected in zip(lora_factor_grads(*args), lora_factor_grads.reference(*args), strict=True):
            torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_infinite_gradients_reach_the_scaler(backend, device):
    """GradScaler finds an overflow by its inf: nothing on the way may clamp or hide it."""
    dy = torch.zeros(40, 48, dtype=torch.float16, device=device)
    dy[3, 5] = float("inf")
    t = torch.ones(40, 4, dtype=torch.float16, device=device)
    b = torch.ones(48, 4, dtype=torch.float16, device=device)
    with use_backend(backend):
        p = lora_dt(dy, b, 1.0)
        (db,) = lora_factor_grads(dy, t, None, None, None, 0.0, 1.0, torch.float32, torch.float32)
    assert p[3].isinf().all() and db[5].isinf().all()
    assert not p[2].isinf().any() and not db[4].isinf().any()


def da_of(x, p, seed, prob):
    return lora_factor_grads(None, None, x, p, seed, prob, 1.0, torch.float32, torch.float32)


def test_dropped_elements_do_not_leak_nan(device):
    """A dropped element contributes nothing, whatever it holds; a kept one does."""
    seed = torch.tensor(11, device=device)
    x = torch.ones(33, 40, device=device)
    keep = OPS["keep_mask"].eager(seed, 0.5, 33, 40, torch.device(device))
    x[~keep] = float("nan")
    a = torch.ones(3, 40, device=device)
    for backend in ("torch", "triton"):
        with use_backend(backend):
            assert lora_down(x, a, seed, 0.5).isfinite().all()
            assert all(grad.isfinite().all() for grad in da_of(x, torch.ones(33, 2, device=device), seed, 0.5))


def test_norms_of_wide_ranks_are_left_to_torch(device):
    w, a, b = (
        dense(torch.randn(20, 40, device=device)),
        *(torch.randn(s, device=device) for s in ((130, 40), (20, 130))),
    )
    with use_backend("triton"):
        out = OPS["row_norm"](w, a, b, 0.1)
    torch.testing.assert_close(out, OPS["row_norm"].reference(w, a, b, 0.1))
    with pytest.raises(ValueError, match="rank 130"):
        OPS["row_norm"].launch(w, a, b, 0.1)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_missing_seed_is_refused(backend, device):
    x, a = torch.ones(4, 8, device=device), torch.ones(2, 8, device=device)
    weight = dense(torch.ones(6, 8, device=device))
    dy, p = torch.ones(4, 6, device=device), torch.ones(4, 2, device=device)
    with use_backend(backend):
        for call in (
            lambda: lora_down(x, a, None, 0.1),
            lambda: da_of(x, p, None, 0.1),
            lambda: lora_gemm_t(dy, weight, p, a, None, 0.1),
        ):
            with pytest.raises(ValueError, match="seed"):
                call()


@pytest.mark.parametrize("format", DECODERS)
def test_dequantize_is_a_fresh_tensor(format, device):
    w = random_operand(format, 6, 8, torch.float32, device)
    stored = w.tensors[0].clone()
    dequantize(w, torch.float32).zero_()
    assert torch.equal(w.tensors[0], stored)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_main_loop_decodes_what_dequantize_decodes(format, device):
    """The identity times a packed weight is the decoded weight, bit for bit: no sum can hide a digit."""
    n, k = 33, 96
    w = random_operand(format, n, k, torch.float32, device, nested=format != "int8")
    t, b = torch.zeros(k, 4, device=device), torch.zeros(n, 4, device=device)
    with use_backend("triton"):
        assert torch.equal(lora_gemm(torch.eye(k, device=device), w, None, t, b, 1.0), dequantize(w, torch.float32).t())


@pytest.mark.parametrize("name", ["lora_gemm", "lora_gemm_t", "siblings_gemm", "siblings_gemm_t"])
def test_few_rows_are_summed_in_parts(name, device, monkeypatch):
    """Adapter, bias and mask are in the first alone."""
    kernels, launching = (pytest.importorskip(f"peftfast_kernels.{name}") for name in ("lora_gemm_kernels", "launch"))
    counts, count_of = [], kernels.parts
    monkeypatch.setattr(kernels, "parts", lambda *a: counts.append(count_of(*a)) or counts[-1])
    launching.forget()  # what was planned elsewhere
    contracted = 576 if is_interpreting() else 2304  # tiles are larger, too
    n, k = (contracted, 40) if name.endswith("_t") else (40, contracted)
    rows, rank = 5, 5
    x, dy, bias = (torch.randn(*shape, device=device) for shape in ((rows, k), (rows, n), (n,)))
    t, a, b = (torch.randn(*shape, device=device) for shape in ((rows, rank), (rank, k), (n, rank)))
    w, seed = random_operand("nf4", n, k, torch.float32, device), torch.tensor(3, device=device)
    kwargs = {
        "lora_gemm": (x, w, bias, t, b, 0.5),
        "lora_gemm_t": (dy, w, t, a, seed, 0.5),
        "siblings_gemm": (x, [w, w], [bias, bias], [t, t], [b, b], [0.5, 2.0]),
        "siblings_gemm_t": ([dy, dy], [w, w], [t, t], [a, a], [None, None], [0.0, 0.0]),
    }[name]
    with use_backend("triton"):
        results = outputs(OPS[name].launch(*kwargs))
    assert len(counts) == 1 and counts[0] > 1
    natives = outputs(OPS[name].reference(*kwargs))
    oracles = outputs(OPS[name].reference(*map(upcast, kwargs)))
    for out, native, oracle in zip(results, natives, oracles, strict=True):
        assert_no_worse(out, native, oracle, torch.float32)


def test_unknown_format_is_refused(device):
    bad = Operand("int3", [torch.ones(2, 2, device=device)], (2, 2), torch.float32)
    with pytest.raises(ValueError, match="int3.*dense"):
        OPS["dequantize"](bad, torch.float32)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: 4 GiB activations")
def test_more_than_2_to_the_31_elements():
    rows, cols, r = (1 << 21) + 8, 1024, 8
    x = torch.zeros(rows, cols, dtype=torch.float16, device="cuda")
    x[-3:] = 1
    a = torch.ones(r, cols, dtype=torch.float16, device="cuda")
    t = lora_down(x, a, None, 0.0)
    assert t[:-3].eq(0).all() and t[-3:].eq(cols).all()
    (da,) = da_of(x, t, None, 0.0)
    assert da.eq(3 * cols).all()


def far_apart(value, rows, stride):
    """The same matrices of so many rows, the last of which lies beyond 2**31 elements. So much memory is only named,
    before it as well, where offsets of 32 bits would lead."""
    if isinstance(value, list):
        return [far_apart(one, rows, stride) for one in value]
    if not isinstance(value, torch.Tensor) or value.dim() != 2 or value.shape[0] != rows:
        return value
    size = (1 << 31) + (rows - 1) * stride + value.shape[1]
    room = mmap.mmap(-1, size * value.element_size(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # not reserved
    made = torch.frombuffer(room, dtype=value.dtype).as_strided(value.shape, (stride, 1), 1 << 31)
    return made.copy_(value)


ROW_BY_ROW = "lora_down", "siblings_down", "routed_down", "routed_add"
FAR = [(name, 40, 1 << 26, 0.1) for name in sorted({*OPS} - {"dequantize", "keep_mask", "row_norm"})]
FAR += [(name, 3, 1 << 30, 0.0) for name in ROW_BY_ROW]


@pytest.mark.skipif(not is_interpreting(), reason="on a GPU memory is not only named")
@pytest.mark.parametrize(("name", "rows", "stride", "dropout"), FAR)
def test_rows_lie_as_far_apart_as_they_like(name, rows, stride, dropout):
    kwargs = arguments(name, Size(rows, 16, 24, 4, dropout=dropout, adapters=2), "cpu")
    with use_backend("triton"):
        near = outputs(OPS[name].launch(**kwargs))
        far = outputs(OPS[name].launch(**{key: far_apart(value, rows, stride) for key, value in kwargs.items()}))
    assert all(map(torch.equal, near, far))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu"])
def test_nan_passes_through_every_activation(backend, act, device):
    gate, up = torch.tensor([[torch.nan, 1.0, -1.0]], device=device), torch.ones(1, 3, device=device)
    with use_backend(backend):
        hidden, (again, d_gate, d_up) = gated(gate, up, act), gated_grad(up, gate, up, act)
    for one in (hidden, again, d_up):
        assert one[0, 0].isnan() and one[0, 1:].isfinite().all()
    assert d_gate[0, 0] == 1 if act == "relu" else d_gate[0, 0].isnan()  # the slope there is torch's


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu"])
def test_slopes_of_activations_are_no_further_than_torch(act, device):
    gate = torch.cat([torch.linspace(-9, 9, 1022), torch.tensor([-1e15, 1e15])]).view(16, 64).to(device)
    one = torch.ones_like(gate)
    _, exact, _ = gated_grad.reference(one.double(), gate.double(), one.double(), act)
    with use_backend("triton"):
        _, found, _ = gated_grad(one, gate, one, act)
    _, plain, _ = gated_grad.eager(one, gate, one, act)
    # a GPU's quick exponential and division, within two ulp of torch's, may double an error of half an ulp
    slack = 1.1 if device == "cpu" else 2.0
    assert (found - exact).norm() <= slack * (plain - exact).norm()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_norms_of_weights_that_only_torch_reads(backend, device):
    """As layerwise casting stores them."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 40, generator=g).to(device).to(torch.float8_e4m3fn)
    a, b = torch.randn(4, 40, generator=g).to(device), torch.randn(24, 4, generator=g).to(device)
    with use_backend(backend):
        found = row_norm(dense(weight), a, b, 0.5)
    torch.testing.assert_close(found, (weight.float() + 0.5 * b @ a).norm(dim=1))


def test_sums_over_many_rows_do_not_drift_in_half_precision():
    """fp32 gradients of a base module's output beside bf16 products, as under autocast."""
    g = torch.Generator().manual_seed(0)
    dy, t = torch.randn(8192, 256, generator=g) + 1, torch.randn(8192, 8, generator=g).bfloat16()
    exact = dy.double().t() @ t.double()
    with use_backend("torch"):
        (found,) = lora_factor_grads(dy, t, None, None, None, 0.0, 1.0, torch.float32, torch.float32)
    plain = (dy.bfloat16().t() @ t).double()
    assert (found - exact).norm() <= (plain - exact).norm()
