"""torch.compile with fullgraph=True: one graph, the numbers of eager, no new graph for a new batch size."""

from __future__ import annotations

import pytest
import torch
from oracle import gradients
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from training.nf4 import quantise
from training.tiny import batch, checkpoint, fill, largest_difference, llama, lora, wrapped

import peftfast
from peftfast.ops.host_bound import host_bound_up_to
from peftfast_kernels import device_masks

pytestmark = pytest.mark.usefixtures("large_products")

KINDS = ["plain", "dropout", "dora", "nf4", "autocast", "two adapters", "bf16 base", "lora_bias", "embedding"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with device_masks():  # compiled code has no others, and eager is to agree with it
        yield
    torch._dynamo.reset()


def make(kind: str, layers: int = 2) -> torch.nn.Module:
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
        return wrapped(peftfast, quantise(llama(hidden_size=64, intermediate_size=128, num_hidden_layers=layers)))
    if kind == "IA3":
        config = peftfast.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
        return peftfast.get_peft_model(llama(num_hidden_layers=layers), config).train()
    options = {
        "dropout": {"lora_dropout": 0.4},
        "dora": {"use_dora": True},
        "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    }.get(kind, {})
    if kind == "lora_bias":
        options, base = (
            {"lora_bias": True, "target_modules": ["q_proj"]},
            llama(attention_bias=True, num_hidden_layers=layers),
        )
    else:
        base = llama(dtype=torch.bfloat16 if kind == "bf16 base" else torch.float32, num_hidden_layers=layers)
    model = wrapped(peftfast, base, **options).train()
    if kind == "two adapters":
        model.add_adapter("other", lora(peftfast, r=2))
        fill(model, 5)
        model.base_model.set_adapter(["default", "other"])
    return model


def step(function, model: torch.nn.Module, kind: str, size: int = 4) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=kind == "autocast"):
        loss = function(**{name: tensor.to(device) for name, tensor in batch(size).items()}).loss
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    return loss.item(), found


@pytest.mark.parametrize("kind", KINDS)
def test_training_step_is_one_graph_with_eagers_numbers(kind):
    model = make(kind)
    loss, expected = step(model, model, kind)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled_loss, found = step(compiled, model, kind)
    half = kind in ("autocast", "bf16 base")  # one rounding more or less, where the compiler moves a cast
    assert compiled_loss == pytest.approx(loss, rel=1e-3 if half else 1e-6)
    assert largest_difference(found, expected) <= (0.03 if half else 1e-5)


@pytest.mark.parametrize("kind", ["plain", "dropout", "dora", "IA3"])
def test_compilers_do_not_ask_what_only_a_gpu_is_asked(kind, monkeypatch):
    """How much it multiplies while the host launches: its table is read from a file, which breaks a graph."""
    for asking in ("ops.lora.is_host_bound", "ops.scale.is_small", "sites.linear.is_small"):
        monkeypatch.setattr(f"peftfast.{asking}", lambda *_: torch._dynamo.graph_break())
    torch.compile(make(kind), backend="eager", fullgraph=True)(**batch()).loss.backward()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_training_step_on_a_gpu_is_one_graph(kind):
    model = make(kind).cuda()
    with host_bound_up_to(0):  # compiled code knows nothing of the host's time, nor has it torch's dropout masks
        loss, expected = step(model, model, kind)
    compiled_loss, found = step(torch.compile(model, backend="aot_eager", fullgraph=True), model, kind)
    assert compiled_loss == pytest.approx(loss, rel=1e-3)
    assert largest_difference(found, expected) <= 0.03


def test_no_property_hides_an_attribute_of_its_name():
    """torch 2.11, for `self.__dict__["name"]` in a property `name`, follows the property, again and again."""
    for kind in ("plain", "embedding", "IA3"):
        for module in make(kind).modules():
            hidden = [name for name in vars(module) if isinstance(getattr(type(module), name, None), property)]
            assert not hidden, (type(module).__name__, hidden)


@pytest.mark.parametrize("kind", ["plain", "dropout", "nf4"])
def test_new_batch_sizes_need_no_new_graph(kind):
    model = make(kind, layers=1)  # with sizes that are symbols, each takes the compiler long
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for size in (4, 3, 7, 2):
        loss, expected = step(model, model, kind, size)
        compiled_loss, found = step(compiled, model, kind, size)
        assert compiled_loss == pytest.approx(loss, rel=1e-5)
        assert largest_difference(found, expected) <= 1e-4
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1, graphs


def test_steps_after_an_update_need_no_new_graph():
    model = make("plain")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    graphs = []
    for _ in range(3):
        compiled(**batch()).loss.backward()
        graphs.append(counter.frame_count)
        optimizer.step()
        optimizer.zero_grad()
    loss, _ = step(model, model, "plain")
    assert step(compiled, model, "plain")[0] == pytest.approx(loss, rel=1e-6)
    assert len({*graphs, counter.frame_count}) == 1, graphs


@pytest.mark.parametrize("eager_first", [True, False])
def test_with_gradient_checkpointing(eager_first):
    def checkpointing() -> torch.nn.Module:
        model = make("dropout").train()
        checkpoint(model)
        model.config.use_cache = False  # else transformers warns from inside the graph
        # nor does torch 2.13 compile what transformers hangs on the embedding, for anybody; only reentrant needs it
        model.get_base_model().disable_input_require_grads()
        return model

    loss, expected = step(eager := checkpointing(), eager, "plain")
    model = checkpointing()
    if eager_first:
        step(model, model, "plain")
    counter = CompileCounterWithBackend("aot_eager")
    compiled_loss, found = step(torch.compile(model, backend=counter, fullgraph=True), model, "plain")
    assert counter.frame_count == 1
    assert compiled_loss == pytest.approx(loss, rel=1e-6)
    assert largest_difference(found, expected) <= 1e-5


def test_graphs_for_a_cpu_leave_sums_to_the_loops_of_what_follows():
    """`addmm`, which inductor makes of a sum of matrices too, copies there what it adds to."""
    nodes, aten = [], torch.ops.aten

    def collect(graph, _):
        nodes.extend(graph.graph.nodes)
        return make_boxed_func(graph.forward)

    torch.compile(make("plain"), backend=aot_autograd(fw_compiler=collect), fullgraph=True)(**batch()).loss.backward()
    products = {node for node in nodes if node.target is aten.mm.default}
    assert products and not any(node.target is aten.addmm.default for node in nodes)
    assert not any(products.intersection(node.args) for node in nodes if node.target is aten.add.Tensor)


@pytest.mark.parametrize(("nested", "dropout"), [(False, 0.0), (True, 0.4)])
def test_graphs_keep_no_decoded_weight(nested, dropout):
    """Nor break where a quantised layer's input has no gradient."""
    pytest.importorskip("bitsandbytes")
    base = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))
    peftfast.quantize_model(base, "nf4", double_quant=nested)
    config = lora(peftfast, target_modules=["0", "1"], task_type=None, lora_dropout=dropout)
    model = peftfast.get_peft_model(base, config)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)(torch.randn(3, 64))
    assert kept and not {(128, 64), (64, 128)}.intersection(map(tuple, kept))
    y.sum().backward()


def test_graphs_do_not_ask_of_all_that_could_be_done_to_the_factors_modules(monkeypatch):
    """Each question takes every call a part of a microsecond for every layer. What torch's own graphs see is seen."""
    model, inputs = make("plain").eval(), batch()

    def call():
        return model(**inputs).logits

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    with torch.no_grad():
        with monkeypatch.context() as patch:  # nor call the modules, where nothing was
            patch.setattr("peftfast.adapter.CalledSite", lambda *_: torch._dynamo.graph_break())
            before = compiled()
        (entry,) = _debug_get_cache_entry_list(call.__code__)
        assert "holders.watch" not in str(entry.guard_manager)
        layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
        layer.base_layer.forward = lambda x: 2 * torch.nn.functional.linear(x, layer.base_layer.weight)
        torch.testing.assert_close(compiled(), call())
        del layer.base_layer.forward
        layer.lora_B["default"].bias = torch.nn.Parameter(torch.ones(layer.out_features))
        torch.testing.assert_close(compiled(), call())
        layer.lora_B["default"].bias = None
        layer.lora_A["default"].forward = lambda x: x[..., :4]
        torch.testing.assert_close(compiled(), call())
        layer.lora_A["default"] = torch.nn.Linear(layer.in_features, 4, bias=False)
        torch.testing.assert_close(compiled(), call())
        assert not torch.allclose(before, call())


@pytest.mark.parametrize(
    "config",
    [
        lora(peftfast, target_modules=["0", "1"], task_type=None),
        lora(peftfast, target_modules=["0", "1"], task_type=None, use_dora=True),
        peftfast.AdaLoraConfig(target_modules=["0", "1"], total_step=9),
    ],
    ids=["LoRA", "DoRA", "AdaLoRA"],
)
def test_graphs_ask_nothing_of_two_objects_of_a_layer(config):
    """Torch does that in Python, in every call: whether they are the same. Nor do they choose a method anew."""
    model = peftfast.get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)), config)

    def call():
        return model(torch.ones(2, 6))

    torch.compile(call, backend="eager", fullgraph=True)()
    (entry,) = _debug_get_cache_entry_list(call.__code__)
    guards = str(entry.guard_manager)
    asked = [line for line in guards.splitlines() if "LAMBDA_GUARD" in line and "['1']" in line]
    assert not asked and ".METHODS" not in guards


def test_a_compiled_model_saves_and_loads(tmp_path):
    model = make("plain")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(**batch())
    compiled.save_pretrained(tmp_path)
    again = peftfast.PeftModel.from_pretrained(llama(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**batch()).logits, model.eval()(**batch()).logits)
    found = peftfast.get_peft_model_state_dict(compiled, unwrap_compiled=True)
    assert set(found) == set(peftfast.get_peft_model_state_dict(model))


@pytest.mark.parametrize("unwrapped", [True, False])
@pytest.mark.parametrize(
    "config",
    [peftfast.LoraConfig(target_modules=["q_proj"]), peftfast.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2)],
)
def test_what_belongs_to_an_adapter_is_found_in_a_compiled_model(config, unwrapped):
    model = peftfast.get_peft_model(llama(), config)
    found = peftfast.get_peft_model_state_dict(torch.compile(model, backend="eager"), unwrap_compiled=unwrapped)
    assert set(found) == set(peftfast.get_peft_model_state_dict(model)) != set()


def test_inductor_agrees():
    import shutil

    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler on the CPU")
    model = make("plain")
    loss, expected = step(model, model, "plain")
    compiled_loss, found = step(torch.compile(model, fullgraph=True), model, "plain")
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    assert largest_difference(found, expected) <= 1e-4
