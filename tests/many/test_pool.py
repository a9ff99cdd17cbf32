"""The pool: many adapters behind few slots, right under threads, with flat memory and no slot lost."""

from __future__ import annotations

import contextlib
import gc
import random
import re
import threading
import time
import warnings
import weakref

import oracle
import pytest
import torch
from experts import moe
from many.adapters import BASE, TARGETS, adapter, check_reads_are_whole, expected, ids_of

import peftfast
from peftfast import AdapterPool, LoraConfig
from peftfast.files.io import save_adapter


def make_pool(count: int = 20, **options) -> AdapterPool:
    options = {"slots": 8, "target_modules": TARGETS, "max_rank": 8, **options}
    pool = AdapterPool(oracle.llama(), **options)
    for i in range(count):
        pool.register(f"a{i}", adapter(i))
    return pool


def test_samples_get_their_adapter_whatever_was_in_the_slot_before():
    pool = make_pool(slots=3)
    mixes = [["a0", "a1", BASE], ["a2", "a1", "a2"], ["a3", "a4", "a5"], ["a0", BASE, "a7"], [BASE, BASE, BASE]]
    for mix in mixes:
        ids = ids_of(len(mix))
        with torch.no_grad():
            got = pool(input_ids=ids, adapter_names=mix).logits
        torch.testing.assert_close(got, expected(mix, ids), rtol=1e-4, atol=1e-5)
    assert pool.statistics.evictions > 0 and pool.pinned == 0
    assert pool.statistics.loads == len(set(sum(mixes, [])) - {BASE}) + 1  # a0 was pushed out and came back
    with torch.no_grad():
        assert torch.equal(pool(input_ids=ids, adapter_names=[BASE] * 3).logits, oracle.llama()(input_ids=ids).logits)


def test_calls_of_two_models_that_do_not_end_in_the_order_in_which_they_began():
    """As those of a server's coroutines."""
    first, second = make_pool(2, slots=2), make_pool(2, slots=2)
    ids = ids_of(2)
    one, other = first.use(["a0", "a1"]), second.use(["a1", BASE])
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    with torch.no_grad():
        got = second.model(input_ids=ids).logits
    other.__exit__(None, None, None)
    torch.testing.assert_close(got, expected(["a1", BASE], ids), rtol=1e-4, atol=1e-5)


def test_least_recently_used_goes_first_and_hits_read_nothing():
    pool = make_pool(slots=2, host_capacity=2)
    for name in ("a0", "a1", "a0", "a2"):  # a1 is the older one when a2 comes
        with pool.use([name]):
            pass
    assert pool.in_slots == ["a0", "a2"] and pool.statistics.reads == 3
    with pool.use(["a1"]):  # host memory still has it
        pass
    assert pool.statistics.reads == 3
    for name in ("a3", "a4", "a0"):  # by now it has not
        with pool.use([name]):
            pass
    assert pool.statistics.reads == 6 and len(pool._host) == 2


def test_generation_through_the_pool():
    pool = make_pool(slots=3)
    names = ["a2", BASE, "a5"]
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    got = pool.generate(input_ids=ids_of(3), adapter_names=names, **how)
    for i, name in enumerate(names):
        model = oracle.llama()
        if name != BASE:
            cfg, tensors = adapter(int(name[1:]))
            model = peftfast.get_peft_model(model, cfg).eval()
            peftfast.set_peft_model_state_dict(model, tensors)
        assert torch.equal(got[i : i + 1], model.generate(input_ids=ids_of(3)[i : i + 1], **how))


def test_eight_threads_share_eight_slots(tmp_path):
    """More adapters than slots, batches that need several slots at once, loads that take their time."""
    pool = make_pool(0, slots=8, host_capacity=6)
    for i in range(24):
        cfg, tensors = adapter(i)
        save_adapter(tmp_path / f"a{i}", cfg, tensors, auto_mapping=None, safe=True)
        pool.register(f"a{i}", tmp_path / f"a{i}")
    truth = {name: expected([name] * 2, ids_of(2)) for name in [*(f"a{i}" for i in range(24)), BASE]}
    wrong: list[str] = []

    def serve(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(12):
            names = [draw.choice([*(f"a{i}" for i in range(24)), BASE]) for _ in range(draw.randint(1, 8))]
            ids = ids_of(2)[:1].repeat(len(names), 1)
            try:
                with torch.no_grad():
                    got = pool(input_ids=ids, adapter_names=names).logits
                for row, name in zip(got, names, strict=True):
                    torch.testing.assert_close(row, truth[name][0], rtol=1e-4, atol=1e-5)
            except Exception as e:
                wrong.append(f"{seed}: {type(e).__name__}: {e}")
                return

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    assert not wrong, wrong[:3]
    assert pool.pinned == 0 and len(pool.in_slots) == 8


def living_tensors() -> tuple[int, int]:
    """Count and storage bytes of all tensors of the process, once garbage is gone."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    storages = {}
    for tensor in (t for t in tensors if t.device.type == "cpu"):
        with contextlib.suppress(RuntimeError):  # those of a compiler, once it is done with them
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return len(tensors), sum(storages.values())


def test_a_thousand_adapters_through_eight_slots_in_flat_memory():
    pool = make_pool(1000, host_capacity=16)
    ids = ids_of(4)
    held = []
    for step in range(250):
        names = [f"a{(4 * step + j) % 1000}" for j in range(4)]
        with torch.no_grad():
            got = pool(input_ids=ids, adapter_names=names).logits
        if step in (0, 49, 249):
            torch.testing.assert_close(got, expected(names, ids), rtol=1e-4, atol=1e-5)
            del got
            held.append(living_tensors())
    assert pool.statistics.loads == 1000 and pool.statistics.reads == 1000
    # A tensor left behind by every request would be 200 more, one by every load 800. What else lives in the process
    # (other tests' leftovers, lazily made tables) moves the count by a few, so the bound is half of the smaller.
    tensors, size = (after - before for before, after in zip(held[1], held[2], strict=True))
    assert tensors < 100 and size < 100 * 1024, held  # the smallest adapter is 512 bytes, 800 of it 400 KiB
    assert len(pool._host) == 16 and len(pool._slots) == 8


class Slow(dict):
    """Tensors that take a while to come."""

    def __init__(self, tensors, seconds, started=None, error=None):
        super().__init__(tensors)
        self.seconds, self.started, self.error = seconds, started, error

    def items(self):
        if self.started is not None:
            self.started.set()
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return super().items()


def test_a_request_waits_for_its_own_loads_only():
    pool = make_pool(4)
    started = threading.Event()
    cfg, tensors = adapter(9)
    pool.register("slow", (cfg, Slow(tensors, 1.5, started)))
    with pool.use(["a0"]):
        pass
    thread = threading.Thread(target=lambda: pool(input_ids=ids_of(1), adapter_names=["slow"]))
    thread.start()
    assert started.wait(5)
    start = time.perf_counter()
    with torch.no_grad():
        pool(input_ids=ids_of(2), adapter_names=["a0", "a1"])  # one that is there, one to load
    assert time.perf_counter() - start < 1.0 and thread.is_alive()
    thread.join()
    # two that want the same one read it once
    pool.register("twice", (cfg, Slow(tensors, 0.3)))
    reads = pool.statistics.reads
    oracle.at_once(lambda name: pool(input_ids=ids_of(1), adapter_names=[name]), ["twice"] * 3)
    assert pool.statistics.reads == reads + 1 and pool.pinned == 0


def test_streams_of_threads_wait_for_each_other(monkeypatch):
    """A GPU's streams know nothing of locks: who uses a slot goes on after it is written, and who writes to it after
    all that use it, whichever of them was given back last."""
    waits, current = [], "one"

    class Stream(str):
        device = torch.device("cuda", 0)

        def wait_event(self, event) -> None:
            if event.stream != self:
                waits.append(f"{self} for {event.stream}")

    class Event:
        def record(self, stream) -> None:
            self.stream = stream

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(current))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    pool = make_pool(slots=1)
    pool._places.devices = {Stream.device}
    with pool.use(["a0"]):
        current = "two"
        with pool.use(["a0"]):
            assert waits == ["two for one"]
        current = "one"
    current = "three"
    write = pool._places.write
    monkeypatch.setattr(pool._places, "write", lambda *args: (waits.append("written"), write(*args)))
    with pool.use(["a1"]):
        assert sorted(waits[1:-1]) == ["three for one", "three for two"] and waits[-1] == "written"


def test_errors_lose_no_slot():
    pool = make_pool(20, slots=2)
    cfg, tensors = adapter(3)
    key = next(iter(tensors))
    bad = {
        "broken": ((cfg, {**tensors, key: tensors[key] * float("nan")}), ValueError, "NaN or infinite"),
        "too wide": (adapter(3, ranks=(16,)), ValueError, "rank 16 .* up to 8"),
        "elsewhere": (
            (cfg, {**tensors, "model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(2, 32)}),
            ValueError,
            "no slot takes.*up_proj",
        ),  # fmt: skip
        "half": ((cfg, {key: tensors[key]}), ValueError, "a pair of factors"),
        "wrong shape": ((cfg, {**tensors, key: torch.zeros(8, 31)}), ValueError, "do not fit"),
        "missing": ("/nonexistent/adapter", Exception, "nonexistent"),
        "raises": ((cfg, Slow(tensors, 0.0, error=OSError("disk is gone"))), OSError, "disk is gone"),
        "ia3": ((peftfast.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), {}), ValueError, "cannot hold"),
        "codes": ((cfg, {k: t.to(torch.int8) for k, t in tensors.items()}), ValueError, "int8 .* no factors' dtypes"),
        "dora": ((LoraConfig(use_dora=True, target_modules=["q_proj"]), tensors), ValueError, "vector.*save_as_lora"),
        "bias": ((LoraConfig(lora_bias=True, target_modules=["q_proj"]), tensors), ValueError, "has.*lora_bias at"),
    }
    for name, (source, _, _) in bad.items():
        pool.register(name, source)
    good = expected(["a0", "a1"], ids_of(2))
    for name, (_, error, match) in bad.items():
        with pytest.raises(error, match=match):
            pool(input_ids=ids_of(2), adapter_names=["a5", name])
        assert pool.pinned == 0, name
        with torch.no_grad():
            got = pool(input_ids=ids_of(2), adapter_names=["a0", "a1"]).logits
        torch.testing.assert_close(got, good, rtol=1e-4, atol=1e-5)
    assert pool.statistics.failures >= len(bad)
    with pytest.raises(RuntimeError):  # an error inside the block lets go as well
        with pool.use(["a0", "a1"]):
            assert pool.pinned == 2
            raise RuntimeError
    assert pool.pinned == 0


def test_waiters_for_a_load_that_fails_are_told():
    pool = make_pool(2, slots=1)
    started = threading.Event()
    cfg, tensors = adapter(3)
    pool.register("bad", (cfg, Slow(tensors, 0.5, started, OSError("disk is gone"))))
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            with pool.use(["bad"]):
                pass
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    threads[0].start()
    assert started.wait(5)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(errors) == 3 and all("disk is gone" in str(e) for e in errors)
    with pool.use(["a0"]):
        assert pool.pinned == 1


def test_refusals():
    pool = make_pool(4, slots=2)
    ids = ids_of(3)
    with pytest.raises(TypeError, match="one for each sample, in a list, got 'a0'"):
        pool(input_ids=ids[:2], adapter_names="a0")
    with pytest.raises(ValueError, match="a9 is not registered in the pool"):
        pool(input_ids=ids, adapter_names=["a0", "a9", "a1"])
    with pytest.raises(ValueError, match="3 different adapters needs as many slots, the pool has 2"):
        pool(input_ids=ids, adapter_names=["a0", "a1", "a2"])
    with pytest.raises(ValueError, match="got 2 and 3 respectively"):
        pool(input_ids=ids, adapter_names=["a0", "a1"])
    with pool.use(["a0", "a1"]):
        with pytest.raises(TimeoutError, match="No slot became free"), pool.use(["a2"], timeout=0.05):
            pass
        with pytest.raises(ValueError, match="a0 is in use"):
            pool.unregister("a0")
        with pytest.raises(ValueError, match="a0 is in use"):
            pool.register("a0", adapter(7))
    pool.unregister("a0")
    with pytest.raises(ValueError, match="a0 is not registered"):
        pool(input_ids=ids, adapter_names=["a0"] * 3)
    with pytest.raises(ValueError, match="cannot be an adapter's name"):
        pool.register(BASE, adapter(0))
    for name, source in (("folder", 3), (adapter(0), "a0"), ("a0", adapter(0)[1])):
        with pytest.raises(TypeError, match="register.name, source.*in this order; got "):
            pool.register(name, source)
    need = pool.device_bytes
    assert need == sum(t.nbytes for stack in pool._places._stacks.values() for t in stack[:3])
    for name, least in (("slots", 1), ("max_rank", 1), ("host_capacity", 0)):
        for error, value in ((ValueError, -1), (TypeError, 2.5), (TypeError, "8")):
            with pytest.raises(error, match=f"{name} must be an integer of at least {least}, got {value!r}"):
                make_pool(0, **{name: value})
    with pytest.raises(TypeError, match="max_device_bytes must be None or a finite number.*got '1GB'"):
        make_pool(0, max_device_bytes="1GB")
    for name in ("target_modules", "target_parameters"):
        for value in (3, ["q_proj", 3]):
            with pytest.raises(TypeError, match=f"{name} must be a list.*string, got {re.escape(repr(value))}"):
                make_pool(0, **{name: value})
    with pytest.raises(TypeError, match="prefetch.*a list of names, got 'a1'"):
        pool.prefetch("a1")
    with pytest.raises(TypeError, match="dtype must be None or a floating-point.*got 'bf16'"):
        make_pool(0, dtype="bf16")
    assert make_pool(0, dtype="bfloat16")._places._stacks.popitem()[1].a.dtype is torch.bfloat16
    with pytest.raises(ValueError, match="1 slots would fit"):
        make_pool(0, slots=2, max_device_bytes=need - 1)
    assert make_pool(0, slots=2, max_device_bytes=need).device_bytes == need
    with pytest.raises(ValueError, match="match no module"):
        make_pool(0, target_modules=["nothing"])


def test_which_modules_have_slots():
    counts = [
        len(AdapterPool(oracle.llama(), target_modules=targets).layers)
        for targets in (None, "all-linear", "q_proj", ["q_proj", "v_proj"])
    ]
    layers = counts[2]
    assert counts == [7 * layers, 7 * layers, layers, 2 * layers]


def test_a_source_registered_anew_is_read_anew():
    pool = make_pool(3)
    ids = ids_of(1)
    with torch.no_grad():
        before = pool(input_ids=ids, adapter_names=["a1"]).logits
        pool.register("a1", adapter(2))
        assert not torch.equal(pool(input_ids=ids, adapter_names=["a1"]).logits, before)
        got = pool(input_ids=ids, adapter_names=["a1"]).logits
    torch.testing.assert_close(got, expected(["a2"], ids), rtol=1e-4, atol=1e-5)


def test_a_source_registered_anew_while_the_old_one_is_read(monkeypatch):
    """Nobody who asks after that gets the old one, and it does not stay in host memory."""
    pool = make_pool(3)
    begun, go = threading.Event(), threading.Event()
    read = pool._places.read

    def slow(name, source):
        factors = read(name, source)
        if not begun.is_set():
            begun.set()
            assert go.wait(10)
        return factors

    monkeypatch.setattr(pool._places, "read", slow)
    pool.prefetch(["a1"])
    assert begun.wait(10)
    pool.register("a1", adapter(2))
    ids = ids_of(1)
    with torch.no_grad():
        got = [pool(input_ids=ids, adapter_names=["a1"]).logits]
        go.set()
        pool._background.shutdown()
        pool._background = None
        got.append(pool(input_ids=ids, adapter_names=["a1"]).logits)
    for logits in got:
        torch.testing.assert_close(logits, expected(["a2"], ids), rtol=1e-4, atol=1e-5)


def test_a_folder_in_a_slot_is_read_as_one(tmp_path):
    """Config and weights are of one save, whoever writes meanwhile; keys of older files are understood."""
    pool = AdapterPool(oracle.llama(), target_modules=TARGETS, max_rank=8)
    scales = check_reads_are_whole(tmp_path, lambda: next(iter(pool._places.read("x", str(tmp_path)).values())))
    assert len(scales) == 2


def test_prefetching_loads_in_the_background():
    pool = make_pool(10, slots=2)
    pool.prefetch(["a3", "a4"])
    deadline = time.time() + 10
    while time.time() < deadline and set(pool.in_slots) != {"a3", "a4"}:
        time.sleep(0.01)
    reads = pool.statistics.reads
    with pool.use(["a3", "a4"]):
        pool.prefetch(["a5"])  # no slot is free: host memory it is
        while time.time() < deadline and "a5" not in pool._host:
            time.sleep(0.01)
    assert "a5" in pool._host and pool.statistics.reads == reads + 1 and pool.statistics.hits >= 2
    pool.close()
    assert not any(hasattr(m, "base_layer") for m in pool.model.modules())


@torch.no_grad()
def test_an_adapter_of_an_embedding_whose_file_has_the_base_beside_it(tmp_path):
    """Which is saved with it unasked, as by PEFT."""
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    model = peftfast.get_peft_model(oracle.llama(), config).eval()
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    pool = make_pool(0, target_modules=["q_proj", "embed_tokens"])
    pool.register("a", tmp_path)
    ids = ids_of(2)
    got = pool(input_ids=ids, adapter_names=["a", BASE]).logits
    torch.testing.assert_close(got[0], model(input_ids=ids).logits[0], rtol=1e-4, atol=1e-5)
    other = oracle.llama()
    other.get_input_embeddings().weight[0, 0] += 1  # on which the adapter was not trained
    pool = AdapterPool(other, slots=1, target_modules=["q_proj", "embed_tokens"])
    pool.register("a", tmp_path)
    with pytest.raises(ValueError, match="Adapter a has tensors that no slot takes: 'model.embed_tokens.base_layer"):
        pool(input_ids=ids, adapter_names=["a", BASE])


@pytest.mark.parametrize("parameters", [(), ["experts.down_proj"]], ids=["", "experts"])
def test_nothing_is_left_of_slots_for_which_there_was_no_memory(monkeypatch, parameters):
    model = moe.qwen3_moe()
    modules, zeros, made = dict(model.named_modules()), torch.zeros, []

    def failing(*args, **options):
        made.append(args)
        if len(made) > 7:
            raise MemoryError
        return zeros(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", failing)
        with pytest.raises(MemoryError):
            AdapterPool(model, target_modules=["q_proj", "v_proj"], target_parameters=parameters)
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("first", [0, 1])
@torch.no_grad()
def test_of_two_pools_of_a_model_one_goes_on_where_the_other_is_closed(first):
    model = oracle.llama()
    pools = [AdapterPool(model, slots=1, target_modules=TARGETS, max_rank=8) for _ in range(2)]
    for i, pool in enumerate(pools):
        pool.register("a", adapter(i))
    ids = ids_of(2)
    pools[first].close()
    got = pools[1 - first](input_ids=ids, adapter_names=["a", BASE]).logits
    torch.testing.assert_close(got, expected([f"a{1 - first}", BASE], ids), rtol=1e-4, atol=1e-5)
    pools[1 - first].close()
    assert not any(hasattr(m, "base_layer") for m in model.modules())


@torch.no_grad()
def test_slots_are_gone_with_their_pool_and_all_with_the_model():
    gc.disable()
    try:
        model = oracle.llama()
        pool = AdapterPool(model, slots=2, target_modules=TARGETS, max_rank=8)
        pool.register("a", adapter(0))
        pool(input_ids=ids_of(2), adapter_names=["a", BASE])
        slots = [weakref.ref(stack.a) for stack in pool._places._stacks.values()]
        del pool
        assert [one() for one in slots if one() is not None] == []
        model = weakref.ref(model)
        assert model() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("end", ["unload", "merge_and_unload"])
def test_a_model_that_was_unloaded_has_no_slots(end):
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(target_modules=["q_proj"]))
    pool = AdapterPool(model, slots=1, target_modules=TARGETS, max_rank=8)
    pool.register("a0", adapter(0))
    pool(input_ids=ids_of(1), adapter_names=["a0"])
    getattr(model, end)()
    with pytest.raises(RuntimeError, match="was unloaded.*Make a new AdapterPool"):
        pool(input_ids=ids_of(1), adapter_names=["a0"])
    pool.close()


def test_adapters_in_the_weights_would_act_on_all_rows():
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    pool = AdapterPool(model.eval(), slots=2, target_modules=TARGETS, max_rank=8)
    pool.register("a0", adapter(0))
    model.merge_adapter()
    ids = ids_of(2)
    with pytest.raises(ValueError, match="when there are merged adapters"):
        pool(input_ids=ids, adapter_names=["a0", BASE])
    assert pool.pinned == 0
    model.unmerge_adapter()
    with torch.no_grad():
        got = pool(input_ids=ids, adapter_names=["a0", BASE]).logits
    torch.testing.assert_close(got, expected(["a0", BASE], ids), rtol=1e-4, atol=1e-5)


def test_a_closed_pool_serves_nothing_instead_of_the_base_model():
    pool = make_pool(3, slots=2)
    ids = ids_of(1)
    for name in ("a0", "a1", "a2"):  # the first is in host memory by then, the others are in slots
        pool(input_ids=ids, adapter_names=[name])
    with pool.use(["a2"]) as slots:
        with pytest.raises(RuntimeError, match="in use; the pool cannot be closed"):
            pool.close()
        with torch.no_grad():  # and goes on
            got = pool.forward(slots, input_ids=ids).logits
    torch.testing.assert_close(got, expected(["a2"], ids), rtol=1e-4, atol=1e-5)
    pool.prefetch(["a0"])
    pool.close()
    pool.close()
    calls = [
        *(lambda n=n: pool(input_ids=ids, adapter_names=[n]) for n in ("a0", "a1", "a2", BASE)),
        lambda: pool.generate(input_ids=ids, adapter_names=["a2"]),
        lambda: pool.forward(slots, input_ids=ids),
        lambda: pool.use(["a2"]).__enter__(),
        lambda: pool.prefetch(["a1"]),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="closed"):
            call()
    with torch.no_grad():
        assert torch.equal(pool.model(input_ids=ids).logits, oracle.llama()(input_ids=ids).logits)


def test_an_adapter_that_is_unregistered_before_its_turn_to_be_fetched():
    """A second request for it, and `close`, would wait for ever."""
    pool = make_pool(2)
    pool.unregister("a1")
    pool._fetch_ahead("a1")
    assert not pool._reading
    pool._fetch_ahead("a0")
    assert pool.in_slots == ["a0"]


def test_beside_ordinary_adapters_and_on_a_quantised_base():
    bnb = pytest.importorskip("bitsandbytes")
    base = oracle.llama(hidden=64)
    for layer in base.model.layers:
        old = layer.self_attn.q_proj
        new = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        layer.self_attn.q_proj = new.to("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peftfast.get_peft_model(
            base, LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False), "own"
        )
    model.eval()
    pool = AdapterPool(model, slots=2, target_modules=["q_proj", "v_proj"], max_rank=4)
    generator = torch.Generator().manual_seed(1)
    cfg = LoraConfig(r=2, target_modules=["q_proj"])
    tensors = {}
    for i in range(2):
        key = f"base_model.model.model.layers.{i}.self_attn.q_proj"
        tensors[f"{key}.lora_A.weight"] = torch.randn(2, 64, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(64, 2, generator=generator)
    pool.register("pooled", (cfg, tensors))
    ids = ids_of(2)
    with torch.no_grad():
        own = model(input_ids=ids).logits
        with model.disable_adapter():
            base_logits = model(input_ids=ids).logits
        got = pool(input_ids=ids, adapter_names=["pooled", BASE]).logits
        assert torch.equal(got[1], base_logits[1]) and not torch.equal(got[0], base_logits[0])
        assert torch.equal(model(input_ids=ids).logits, own)
        model.add_adapter("same", cfg)
        peftfast.set_peft_model_state_dict(model, tensors, "same")
        model.set_adapter("same")
        torch.testing.assert_close(got[0], model(input_ids=ids).logits[0], rtol=1e-3, atol=1e-4)
    model.delete_adapter("own")
    model.delete_adapter("same")
    pool.close()
