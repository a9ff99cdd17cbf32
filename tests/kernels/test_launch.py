"""A `Launch` does what `kernel[grid](...)` does, for every launch of every op: the same compiled kernel, grid, stream
and arguments. Nothing is compiled and nothing runs: Triton's driver and compiler are stubs, the rest is its own.
"""

import gc
import importlib
import weakref
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from bench import stub_gpu  # noqa: E402
from peftfast_kernels import OPS, launch, lora_down, use_backend  # noqa: E402
from peftfast_kernels.launch import Launch, forget  # noqa: E402
from peftfast_kernels.variants import MODULES  # noqa: E402

CASES = [(name, case) for name, op in OPS.items() for case in op.cases()]
IDS = [f"{name}-{case.id}" for name, case in CASES]


class Compiled:
    """Stands where a compiled kernel does, one for every specialisation, and writes down its launches."""

    launches: list = []
    function, packed_metadata = 16, (4, 1, 0)

    def __init__(self, src, target=None, options=None, **rest):
        self.src, self.name = src, src.fn.__name__

    def launch_metadata(self, grid, stream, *args):
        return {"name": self.name}

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        assert (function, metadata) == (self.function, self.packed_metadata)
        if enter is not None:
            enter(launch_metadata)
        Compiled.launches.append((self, (x, y, z), stream, tuple(map(plain, args))))
        if leave is not None:
            leave(launch_metadata)


def plain(value):
    """An argument as it reaches the GPU: pointers as addresses."""
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


@pytest.fixture
def driver(monkeypatch):
    """The stub driver; kernels are Triton's own, whatever the environment says of its interpreter."""
    if torch.cuda.is_available():
        pytest.skip("the tensors of this test are the CPU's")
    for name in (*MODULES, "tiles"):
        module = importlib.import_module(f"peftfast_kernels.{name}")
        for attribute, kernel in list(vars(module).items()):
            if attribute.endswith("_kernel"):
                monkeypatch.setattr(module, attribute, JITFunction(kernel.fn))
    monkeypatch.setattr(triton.compiler, "compile", Compiled)
    monkeypatch.setattr(Compiled, "launches", [])
    forget()
    with stub_gpu.active(Compiled) as made, use_backend("triton"), stub_gpu.pretended():
        yield made
    forget()


@pytest.fixture
def through_triton(monkeypatch):
    """Counts the launches that go through Triton."""
    count = []
    genuine = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda *args, **kwargs: count.append(1) or genuine(*args, **kwargs))
    # what is looked at is the source of the genuine one
    assert launch._launches_as_expected.__wrapped__() is False
    monkeypatch.setattr(launch, "_launches_as_expected", lambda: True)
    return count


@pytest.fixture
def compared(driver, through_triton, monkeypatch):
    """Every launch is made three times with the same pointers: by `kernel[grid]`, and twice by `Launch`."""
    genuine, kept = Launch.__call__, []

    def three_times(self, *pointers):
        self.kernel[self.grid](*pointers, **self.arguments)
        genuine(self, *pointers)  # the first of its kind goes through Triton
        through_triton.clear()
        genuine(self, *pointers)
        assert through_triton == []
        expected, _, direct = Compiled.launches[-3:]
        assert direct[0] is expected[0] and direct[1:] == expected[1:]
        kept.append((self.kernel.fn.__name__, self.grid, self.arguments))

    monkeypatch.setattr(Launch, "__call__", three_times)
    return kept


def map_tensors(value, change):
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list):
        return [map_tensors(one, change) for one in value]
    if hasattr(value, "tensors"):  # a stored weight
        return value._replace(tensors=[change(one) for one in value.tensors])
    return value


def shifted(tensor):
    """The same one element further on, where no address is a multiple of 16."""
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 2
    room = torch.zeros(max(extent, 2), dtype=tensor.dtype)
    return room.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor) if tensor.numel() else tensor


@pytest.mark.parametrize(("name", "case"), CASES, ids=IDS)
def test_as_triton_launches(name, case, compared):
    kwargs = case.make("cpu")
    OPS[name].launch(**kwargs)
    OPS[name].launch(**{key: map_tensors(value, shifted) for key, value in kwargs.items()})
    some = iter(range(100))  # every second one
    mixed = {
        key: map_tensors(value, lambda tensor: shifted(tensor) if next(some) % 2 else tensor)
        for key, value in kwargs.items()
    }
    OPS[name].launch(**mixed)


def test_tensors_of_several_gpus_are_refused(monkeypatch):
    """Triton launches whatever device a pointer is of."""
    one = object.__new__(Launch)
    one.kernel, one.grid, one._grid, one._rest, one._compiled = SimpleNamespace(__name__="some"), (1,), (1,), (), {}
    monkeypatch.setattr(launch, "_is_watched", lambda kernel: False)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0)))
    monkeypatch.setattr(launch, "_DEVICE", lambda tensor: int(tensor.numel()))
    with pytest.raises(RuntimeError, match="some: all tensors have to be on one device"):
        one(torch.ones(1), torch.ones(2))
    assert not one._compiled


@pytest.mark.parametrize("name", OPS)
def test_what_is_remembered_is_what_would_be_planned(name, compared):
    """One op's cases after one another take the plans that each takes alone: keys leave nothing out."""
    alone = []
    for case in OPS[name].cases():
        forget()
        OPS[name].launch(**case.make("cpu"))
        alone += compared
        compared.clear()
    forget()
    for _ in range(2):
        for case in OPS[name].cases():
            OPS[name].launch(**case.make("cpu"))
        assert compared == alone
        compared.clear()


def test_settings_are_part_of_a_plan(compared):
    x, a = torch.ones(400, 32), torch.ones(8, 32)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for name, value, precision in (
            ("allow_tf32", False, "ieee"), ("allow_tf32", True, "tf32"), ("allow_tf32", False, "ieee"),
            ("fp32_precision", "tf32", "tf32"), ("fp32_precision", "ieee", "ieee"),
        ):  # fmt: skip
            setattr(matmul, name, value)  # once it is set by the newer name, the older one cannot be read
            lora_down(x, a, None, 0.0)
            assert compared[-1][2]["PRECISION"] == precision
    finally:
        matmul.fp32_precision = before


def down():
    """A launch, its pointers."""
    x, a = torch.ones(400, 32), torch.ones(8, 32)
    module = importlib.import_module("peftfast_kernels.lora_down_kernels")
    made, _ = module._plan("sm_90", 400, 32, 8, 32, 1, 32, 1, (4, 4), "ieee", 0.0, 1.0)
    return made, (x, a, x, torch.empty(400, 8))


def test_stream_and_device_are_the_current_ones(driver, through_triton, monkeypatch):
    made, pointers = down()
    made(*pointers)
    driver.stream = 77
    made(*pointers)
    assert Compiled.launches[-1][2] == 77 and len(through_triton) == 1

    class OtherDevice:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            driver.device = -1

        def __exit__(self, *error):
            driver.device = 5

    driver.device = 5
    monkeypatch.setattr(torch.cuda, "device", OtherDevice)
    seen = []
    monkeypatch.setattr(driver, "get_current_stream", lambda device: seen.append(device) or 0, raising=False)
    for _ in range(2):
        made(*pointers)
        assert driver.device == 5  # and not the tensors', on which the launch was
    assert seen == [-1, -1] and len(through_triton) == 1


def test_hooks_are_told(driver, through_triton):
    made, pointers = down()
    made(*pointers)
    told = []
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    for chain in (enter, leave):
        hook = told.append
        chain.add(hook)
        try:
            made(*pointers)
        finally:
            chain.remove(hook)
    assert told == [{"name": "down_kernel"}] * 2 and len(through_triton) == 3
    made.kernel.add_pre_run_hook(lambda *args, **kwargs: told.append(len(args)))
    made(*pointers)
    assert told[-1] == len(pointers)
    made.kernel.pre_run_hooks.clear()
    before = len(through_triton)
    made(*pointers)
    assert len(told) == 3 and len(through_triton) == before


@pytest.mark.parametrize("change", ["another launch", "another kind of hook", "another kind of GPU"])
def test_another_triton_launches_for_itself(change, driver, through_triton, monkeypatch):
    if change == "another kind of hook":
        monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", None)
    elif change == "another kind of GPU":
        target = GPUTarget("hip", "gfx942", 64)
        assert not launch._looks_at_addresses_only(target)
        monkeypatch.setattr(driver, "get_current_target", lambda: target)
    else:
        monkeypatch.setattr(launch, "_launches_as_expected", lambda: False)
    made, pointers = down()
    for count in (1, 2, 3):
        made(*pointers)
        assert len(through_triton) == count == len(Compiled.launches)


def test_this_triton_launches_as_expected(monkeypatch):
    assert launch._looks_at_addresses_only(GPUTarget("cuda", 90, 32))
    look = launch._launches_as_expected.__wrapped__
    assert look()
    monkeypatch.setattr(launch, "_EXPECTED", launch._EXPECTED.replace("stream,", ""))
    assert not look()
    monkeypatch.setattr(launch.inspect, "getsource", lambda function: (_ for _ in ()).throw(OSError()))
    assert not look()


def test_each_pointer_is_looked_at_by_itself(driver, through_triton):
    """A kernel that was compiled for one that is no multiple of 16 reads the others in larger pieces; and one of
    fp16 would take bfloat16 for it."""
    made, pointers = down()
    made(*pointers)
    for i in range(len(pointers)):
        made(*[shifted(one) if i == j else one for j, one in enumerate(pointers)])
    for dtype in (torch.float16, torch.bfloat16):
        made(*[one.to(dtype) for one in pointers])
    assert len(through_triton) == len(made._compiled) == 3 + len(pointers)


def test_arguments_have_to_follow_the_pointers(driver):
    kernel = importlib.import_module("peftfast_kernels.lora_down_kernels").down_kernel
    with pytest.raises(ValueError, match="down_kernel"):
        Launch(kernel, (1,), M=4, K=32)


def test_what_is_remembered_is_bounded_and_holds_no_tensor(driver, monkeypatch):
    for op in OPS.values():
        op.launch  # noqa: B018 loads the module
    assert launch._PLANNED and all(cached.cache_info().maxsize == launch.PLANS for cached in launch._PLANNED)
    monkeypatch.setattr(launch, "KINDS", 2)
    made, pointers = down()
    for dtypes in range(16):
        made(*[one.to(torch.float16) if dtypes >> i & 1 else one for i, one in enumerate(pointers)])
        assert 1 <= len(made._compiled) <= 2
    gone = [weakref.ref(one) for one in pointers]
    del pointers
    gc.collect()
    assert [one() for one in gone] == [None] * 4
