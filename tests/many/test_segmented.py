"""Mixed batches through the routed kernels, as a GPU runs them (in Triton's interpreter where there is none)."""

from __future__ import annotations

from contextlib import contextmanager

import oracle
import pytest
import torch
from many.adapters import BASE, adapter, expected, ids_of
from many.test_compile import compiled, three
from many.test_routing import train_loop

from peftfast import AdapterPool
from peftfast.many.router import resolve
from peftfast.ops import routed
from peftfast_kernels import OPS, make_route, use_backend

pytest.importorskip("triton")

MIX = ["one", "two", BASE, "one", "three", "three"]


@pytest.fixture
def launched(monkeypatch):
    """How often each routed kernel was launched."""
    counts = {}
    for name in ("routed_down", "routed_add", "routed_up_grad", "routed_down_grad"):
        launch = OPS[name].launch

        def counted(*args, name=name, launch=launch, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return launch(*args, **kwargs)

        monkeypatch.setitem(OPS[name]._cache, "launch", counted)
    return counts


@contextmanager
def mixed(model, names, inputs, numbers):
    """The mix by name, or by number as on a GPU, where nobody looks at the numbers."""
    choice = model.base_model.adapter_numbers(names) if numbers else names
    routing = resolve(model.base_model.inventory, choice, (), inputs, (1,))
    routing.seen = None
    assert (routing.host is None) == numbers
    with model.base_model.inventory.control.use(routing):
        yield routing


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("batch, length", [(3, 4), (6, 16)])  # row by row and by tiles: 12 and 96 rows
def test_a_mixed_batch_is_what_its_samples_are_alone(launched, numbers, batch, length):
    model = three()
    names = MIX[:batch]
    inputs = oracle.inputs(model, batch, length)
    with torch.no_grad():
        alone = model(**inputs, adapter_names=names).logits
        with use_backend("triton"), mixed(model, names, inputs, numbers):
            got = model(**inputs).logits
    torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)
    # three layers of each of the model's two blocks have adapters or, v_proj and down_proj, one of them
    assert launched == {"routed_down": 6, "routed_add": 6}


@pytest.mark.parametrize("numbers", [False, True])
def test_one_sort_a_forward_whatever_the_number_of_layers(monkeypatch, numbers):
    made = []

    def counted(rows, adapters):
        made.append(adapters)
        return make_route(rows, adapters)

    monkeypatch.setattr(routed, "make_route", counted)
    model = three()
    inputs = oracle.inputs(model, batch=3, length=4)
    with torch.no_grad(), use_backend("triton"), mixed(model, ["one", "three", "two"], inputs, numbers):
        model(**inputs)
    # q_proj has all three adapters, v_proj and down_proj have one each; both blocks of the model share the routes
    assert sorted(made) == [1, 1, 3]


@pytest.mark.parametrize("numbers", [False, True])
def test_every_adapter_gets_the_gradients_it_gets_alone(launched, numbers):
    model = three().train()
    inputs = oracle.inputs(model, batch=len(MIX))
    target = torch.randn(oracle.logits(model, **inputs).shape)
    alone = train_loop(model, MIX, inputs, target)
    model.set_requires_grad(["one", "two", "three"])
    model.zero_grad()
    with use_backend("triton"), mixed(model, MIX, inputs, numbers):
        (oracle.logits(model, **inputs) - target).pow(2).sum().backward()
    got = oracle.gradients(model)
    assert got.keys() == alone.keys()
    for key in alone:
        torch.testing.assert_close(got[key], alone[key], rtol=2e-4, atol=2e-4 * float(alone[key].abs().max()))
    # the first block's q_proj and v_proj see an input that needs no gradient
    assert launched["routed_up_grad"] == launched["routed_down_grad"] == 6
    assert launched["routed_add"] == 6 + 4


def test_a_pool_runs_them(launched):
    pool = AdapterPool(oracle.llama(), slots=4, target_modules=["q_proj", "v_proj", "down_proj"], max_rank=8)
    for i in range(6):
        pool.register(f"a{i}", adapter(i))
    ids = ids_of(4)
    mix = ["a3", BASE, "a5", "a3"]
    with torch.no_grad(), use_backend("triton"):
        got = pool(input_ids=ids, use_cache=False, adapter_names=mix).logits
    torch.testing.assert_close(got, expected(mix, ids), rtol=1e-4, atol=1e-5)
    assert launched == {"routed_down": 6, "routed_add": 6}


def test_a_number_that_no_adapter_has_is_loud():
    model = three()
    inputs = oracle.inputs(model, batch=3, length=4)
    with torch.no_grad(), use_backend("triton"), mixed(model, ["one", "two", BASE], inputs, True) as routing:
        routing.index[1] = len(routing.names)  # what the table of numbers says of one that was never given
        logits = model(**inputs).logits
    assert logits[1].isnan().all() and not logits[0].isnan().any() and not logits[2].isnan().any()


def test_bf16_is_no_further_from_the_truth_than_sample_by_sample():
    model = three().to(torch.bfloat16)
    inputs = oracle.inputs(model, batch=len(MIX))
    with torch.no_grad():
        plain = model(**inputs, adapter_names=MIX).logits
        with use_backend("triton"):
            ours = model(**inputs, adapter_names=MIX).logits
        truth = model.double()(**inputs, adapter_names=MIX).logits
    oracle.assert_no_further({"logits": ours}, {"logits": plain}, {"logits": truth})


@pytest.mark.parametrize("training", [False, True])
def test_one_compiled_graph_serves_every_mix(training):
    """What a GPU compiles: the kernels as opaque operators, the sort of the numbers in the graph."""
    model = three().train(training)
    model.set_requires_grad(["one", "two", "three"])
    call, counter = compiled(model, "aot_eager")
    inputs = {**oracle.inputs(model, batch=3, length=4), "use_cache": False}
    for mix in (["one", "two", BASE], ["three"] * 3, ["two", BASE, "two"]):
        numbers = model.base_model.adapter_numbers(mix)
        with torch.set_grad_enabled(training):
            with use_backend("triton"):
                got = call(**inputs, adapter_names=numbers).logits
            alone = model(**inputs, adapter_names=mix).logits
        torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)
        if training:
            model.zero_grad()
            with use_backend("triton"):
                got.pow(2).sum().backward()
            ours = oracle.gradients(model)
            model.zero_grad()
            alone.pow(2).sum().backward()
            for key, theirs in oracle.gradients(model).items():
                torch.testing.assert_close(ours[key], theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()) + 1e-9)
    assert counter.frame_count == 1
