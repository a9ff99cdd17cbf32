"""Decoding equals bitsandbytes' own result bit for bit, on torch and in Triton."""

import pytest
import torch

bnb = pytest.importorskip("bitsandbytes")

from portable_bitsandbytes import dequantize_4bit  # noqa: E402

from peftfast_kernels import Operand, dequantize, use_backend  # noqa: E402

functional = bnb.functional

pytestmark = pytest.mark.usefixtures("poisoned_empty")

SHAPES = [(1, 1), (3, 5), (7, 33), (64, 64), (40, 96), (31, 130), (5, 1024)]
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def quantised(format, n, k, block, nested, dtype, device):
    """A random weight quantised by bitsandbytes, as an operand, and bitsandbytes' own decoding of it."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)).to(dtype).to(device)
    packed, state = functional.quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=format)
    tensors = [packed, state.absmax]
    if nested:
        tensors += [state.state2.code, state.state2.absmax, state.offset]
    operand = Operand(format, tensors, (n, k), dtype, block, state.state2.blocksize if nested else 256)
    return operand, dequantize_4bit(packed, state)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_4bit_equals_bitsandbytes(format, block, nested, backend, device):
    halves = (torch.bfloat16, torch.float16) if block == 64 else ()  # what is rounded is the same for all of them
    for n, k in SHAPES:
        for dtype in (torch.float32, *halves):
            operand, expected = quantised(format, n, k, block, nested, dtype, device)
            with use_backend(backend):
                assert torch.equal(dequantize(operand, dtype), expected), (n, k, dtype)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_4bit_in_a_sharded_storage_dtype(storage, backend, device):
    """FSDP stores the packed bytes as the model's dtype."""
    operand, expected = quantised("nf4", 16, 64, 64, True, torch.float32, device)
    packed = operand.tensors[0].reshape(-1).view(storage)
    with use_backend(backend):
        assert torch.equal(
            dequantize(operand._replace(tensors=[packed, *operand.tensors[1:]]), torch.float32), expected
        )


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_equals_bitsandbytes(dtype, backend, device):
    for n, k in SHAPES:
        rows = torch.randint(-127, 128, (n, k), generator=torch.Generator().manual_seed(n), dtype=torch.int8).to(device)
        scale = torch.rand(n, generator=torch.Generator().manual_seed(k)).to(device)
        expected = functional.int8_vectorwise_dequant(rows, scale).to(dtype)
        with use_backend(backend):
            assert torch.equal(dequantize(Operand("int8", [rows, scale], (n, k), dtype), dtype), expected)


def test_bitsandbytes_native_decoding():
    """Equal to ours where rows are whole blocks; where blocks straddle rows, ours is the one near the weight."""
    for n, k, block in ((64, 256, 64), (16, 128, 128), (40, 96, 64), (64, 64, 128)):
        weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n))
        packed, state = functional.quantize_4bit(weight, blocksize=block, quant_type="nf4")
        native = functional.dequantize_4bit(packed, state)
        ours = dequantize(Operand("nf4", [packed, state.absmax], (n, k), torch.float32, block), torch.float32)
        if not torch.equal(native, ours):  # an AVX-512 CPU
            assert k % block and (native - weight).norm() > 1.5 * (ours - weight).norm(), (n, k, block)


def _somewhere(tensor, offset):
    """The same values as a view that begins so many bytes into another tensor."""
    place = torch.empty(offset + tensor.numel(), dtype=tensor.dtype)[offset:].view(tensor.shape)
    return place.copy_(tensor)


@pytest.mark.parametrize("nested", [False, True])
def test_kernels_read_words_where_there_are_any(nested):
    """Not from views that begin between them, nor where the last pair of absmax has one byte."""
    pytest.importorskip("triton")
    from peftfast_kernels import decode
    from peftfast_kernels.decode_kernels import decode_layout, stored

    for n, packed_at, absmax_at, in_words in (
        (3, 0, 0, True), (3, 8, 2, True), (3, 2, 0, False), (3, 0, 1, not nested), (5, 3, 1, False),
    ):  # fmt: skip
        for k in (128, 64):  # 6 or 10 blocks, or 3 or 5
            w = decode.random_operand("nf4", n, k, torch.bfloat16, "cpu", 64, nested)
            packed, absmax, *rest = w.tensors
            absmax = _somewhere(absmax, absmax_at) if nested else absmax
            w = w._replace(tensors=[_somewhere(packed, packed_at), absmax, *rest])
            expected = 2 if in_words and not (nested and k == 64) else 1
            assert [decode_layout(stored(w)[0], bk) for bk in (32, 64, 128)] == [expected] * 3
            assert decode_layout(stored(w)[0]._replace(shape=(n, k + 1)), 64) == 0
            with use_backend("triton"):
                assert torch.equal(dequantize(w, w.dtype), decode.DECODERS["nf4"].reference(w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_compiled_decoder(format, nested, dtype, monkeypatch):
    """bitsandbytes' kernel for CPUs serves rows of whole blocks, bit for bit, and no others."""
    pytest.importorskip("bitsandbytes")
    from peftfast_kernels import decode

    calls, compiled = [], decode._compiled
    monkeypatch.setattr(decode, "_compiled", lambda w: calls.append(w.shape) or compiled(w))
    monkeypatch.setattr(decode, "_compiled_agrees", {})
    for shape, used in (((40, 128), True), ((3, 64), True), ((7, 96), False), ((5, 33), False)):
        w = decode.random_operand(format, *shape, dtype, "cpu", 64, nested)
        calls.clear()
        assert torch.equal(decode._four_bit_stored(w), decode.DECODERS[format].reference(w))
        assert (shape in calls) == used
    monkeypatch.setattr(decode, "_compiled", lambda w: compiled(w) * 2)
    monkeypatch.setattr(decode, "_compiled_agrees", {})
    w = decode.random_operand(format, 40, 128, dtype, "cpu", 64, nested)
    assert torch.equal(decode._four_bit_stored(w), decode.DECODERS[format].reference(w))


@pytest.mark.parametrize("known", [True, False], ids=["bitsandbytes", "alone"])
@pytest.mark.parametrize("nested", [False, True])
def test_graphs_decode_by_one_operator(nested, known, monkeypatch):
    """By the same one as without a compiler, bit for bit, also in exported graphs."""
    from peftfast_kernels import decode

    if not known:
        monkeypatch.setattr(decode, "_agrees", lambda *_: False)
    for shape in ((40, 128), (7, 96)):
        w = decode.random_operand("nf4", *shape, torch.bfloat16, "cpu", 64, nested)

        class Decoding(torch.nn.Module):
            def forward(self, tensors, w=w):
                return dequantize(w._replace(tensors=tensors), w.dtype)

        graph = torch.export.export(Decoding(), (w.tensors,), strict=known).module()
        assert torch.equal(graph(w.tensors), decode.DECODERS["nf4"].reference(w))
        native = known and shape[1] % 64 == 0
        operator = torch.ops.bitsandbytes.dequantize_4bit if native else torch.ops.peftfast.dequantize
        assert any(node.target is operator.default for node in graph.graph.nodes)
