"""Adapted models in what other tools make of them: exported and traced graphs, functorch's transforms, meta tensors."""

import warnings

import oracle
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

import peftfast
from peftfast.ops import composed

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")

IDS = oracle.inputs(oracle.llama())["input_ids"]
TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "LoRA": lambda **o: peftfast.LoraConfig(r=4, init_lora_weights=False, **o),
    "DoRA": lambda **o: peftfast.LoraConfig(r=4, init_lora_weights=False, use_dora=True, **o),
    "IA3": lambda target_modules, **o: peftfast.IA3Config(
        target_modules=target_modules, feedforward_modules=target_modules[-1:], **o
    ),
    "AdaLoRA": lambda **o: peftfast.AdaLoraConfig(init_r=4, target_r=2, total_step=20, **o),
}


def adapted(method, dtype=torch.float32):
    torch.manual_seed(1)
    model = peftfast.get_peft_model(oracle.llama().to(dtype), CONFIGS[method](target_modules=TARGETS))
    if method == "AdaLoRA":  # starts at zero
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                nn.init.normal_(parameter)
    return model


class Logits(nn.Module):
    def __init__(self, model, autocast):
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, ids):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.model(input_ids=ids, use_cache=False).logits


class Calling(nn.Module):
    def __init__(self, model, call):
        super().__init__()
        self.model, self.forward = model, call


def gradients(module):
    module.zero_grad()
    module(IDS).float().square().mean().backward()
    return oracle.gradients(module)


@pytest.mark.parametrize("dtype, autocast", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("method", CONFIGS)
def test_an_exported_graph_can_be_trained(method, dtype, autocast):
    module = Logits(adapted(method, dtype).train(), autocast)
    exported = torch.export.export(module, (IDS,), strict=False).module()
    found, expected = gradients(exported), gradients(module)
    assert found.keys() == expected.keys() == {n for n, p in module.named_parameters() if p.requires_grad}
    close = 1e-4 if dtype is torch.float32 and not autocast else 5e-2
    for name, value in expected.items():
        assert (found[name] - value).norm() <= close * value.norm(), name


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
@pytest.mark.parametrize("nested", [False, True])
def test_an_exported_graph_of_quantised_layers(nested, method):
    """Which has each packed weight once, as the model has it."""
    pytest.importorskip("bitsandbytes")
    base = Two(lambda: nn.Linear(64, 8))
    peftfast.quantize_model(base, "nf4", double_quant=nested)
    model, x = peftfast.get_peft_model(base, CONFIGS[method](target_modules=["first"])), torch.randn(3, 64)
    exported = torch.export.export(model, (x,), strict=True)
    assert not any(value.dtype is torch.uint8 and value.dim() == 2 for value in exported.constants.values())
    torch.testing.assert_close(exported.module()(x), model(x))


class Two(nn.Module):
    def __init__(self, first):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = first(), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("method", [*CONFIGS, "VeLoRA", "in blocks", "P-tuning"])
def test_a_trace_of_many_tokens_is_torchs_own(method, tmp_path, monkeypatch):
    """No Function is in it, which torch can save none of, nor anything that calls before it have made."""
    monkeypatch.setattr(composed, "SMALL", {})
    if method in CONFIGS:
        model = adapted(method)
    else:
        fields = {"velora_config": peftfast.VeloraConfig(num_groups=4)} if method == "VeLoRA" else {}
        config = peftfast.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **fields)
        if method == "P-tuning":
            config = peftfast.PromptEncoderConfig("CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8)
        model = peftfast.get_peft_model(oracle.llama(), config)
        if method == "in blocks":
            peftfast.fuse_blocks(model)

    def call(ids):
        return model.eval()(input_ids=ids, use_cache=False).logits

    with torch.no_grad():
        expected = [call(IDS) for _ in range(2)]
    traced = torch.jit.trace(Calling(model, call), IDS)  # raises if a second trace differs
    torch.jit.save(traced, tmp_path / "traced.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "traced.pt")(IDS), expected[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(call(IDS), expected[1])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("method", CONFIGS)
def test_tracing_finds_the_same_graph_twice(method, autocast):
    """Also of a model that nobody has called; and the graph follows what is written to the Parameters later."""
    model = peftfast.get_peft_model(Two(lambda: nn.Linear(6, 8)), CONFIGS[method](target_modules=["first", "second"]))
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        traced = torch.jit.trace(model, x)  # raises if the two differ
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        torch.testing.assert_close(traced(x), model(x), rtol=2e-2, atol=2e-2)


def test_a_trace_leaves_nothing_behind():
    """In a trace sizes are tensors, which calls after it must not meet."""
    model = peftfast.get_peft_model(Two(lambda: nn.Linear(6, 8)), CONFIGS["LoRA"](target_modules=["first", "second"]))
    torch.jit.trace(model, torch.randn(3, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(3, 6))
    for layer in model.base_model.inventory.layers.values():
        operand, _ = layer.site.product(torch.randn(3, layer.in_features), None)
        assert all(type(size) is int for size in operand.shape)


@pytest.mark.parametrize("method", CONFIGS)
def test_the_loss_as_a_function_of_the_adapter(method):
    model = adapted(method).train()
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    found = grad(lambda values: functional_call(model, values, (), {"input_ids": IDS, "labels": IDS}).loss)(trained)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, value in found.items():
        torch.testing.assert_close(value, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", CONFIGS)
def test_shapes_on_the_meta_device(method):
    output = adapted(method).train().to("meta")(input_ids=IDS.to("meta"), labels=IDS.to("meta"))
    assert output.logits.shape == (*IDS.shape, oracle.VOCABULARY)
    output.loss.backward()


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"target_modules": TARGETS}, {"adapter_names": ["default", "second"]}),
        ({"target_modules": TARGETS, "lora_bias": True}, {}),
        ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, {}),
    ],
    ids=["rows", "biases", "parameters"],
)
def test_shapes_of_two_adapters_on_the_meta_device(options, call):
    """For which torch cannot be asked whether autocast is on."""
    model = peftfast.get_peft_model(oracle.llama(bias=True), CONFIGS["LoRA"](**options))
    model.add_adapter("second", CONFIGS["LoRA"](**options))
    model.base_model.set_adapter(["default", "second"])
    output = model.to("meta")(input_ids=IDS.to("meta"), labels=IDS.to("meta"), **call)
    assert output.logits.shape == (*IDS.shape, oracle.VOCABULARY)
    output.loss.backward()
