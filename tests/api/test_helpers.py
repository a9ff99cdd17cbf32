"""What `peft.helpers` offers."""

import importlib
import inspect

import oracle
import pytest
import torch

import peftfast
from peftfast.helpers import disable_input_dtype_casting, rescale_adapter_scale, update_signature
from peftfast.layers.layer import BaseTunerLayer

NAMES = ["one", "two"]


def two():
    options = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(**options), "one").eval()
    model.add_adapter("two", peftfast.LoraConfig(**options, lora_alpha=3))
    return model


def layers(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def by_helper(model):
    return rescale_adapter_scale(model, 0.5)


class by_hand:
    """A new dict in the place of the layer's, which is what PEFT's helper does and code like it."""

    def __init__(self, model):
        self.before = [(layer, layer.scaling) for layer in layers(model)]

    def __enter__(self):
        for layer, scaling in self.before:
            layer.scaling = {name: value * 0.5 for name, value in scaling.items()}

    def __exit__(self, *exception):
        for layer, scaling in self.before:
            layer.scaling = scaling


@pytest.mark.parametrize("rescale", [by_helper, by_hand])
@pytest.mark.parametrize("changes", [{}, {"adapter_names": NAMES}], ids=["active", "mixed batch"])
def test_a_scaling_that_is_replaced_counts_at_once(rescale, changes):
    model = two()
    with torch.no_grad():
        before = [oracle.logits(model, **changes) for _ in range(3)][-1]  # what is kept between forwards is kept now
        held = [layer.scaling for layer in layers(model)]
        values = [dict(scaling) for scaling in held]
        with rescale(model):
            during = oracle.logits(model, **changes)
            assert held == values  # who holds them sees what was before
            assert all(layer.scaling["two"] == v["two"] / 2 for layer, v in zip(layers(model), values, strict=True))
        after = oracle.logits(model, **changes)
    assert torch.equal(before, after)
    half = two()
    half.load_state_dict(model.state_dict())
    for layer in layers(half):
        for name in NAMES:
            layer.set_scale(name, 0.5)
    with torch.no_grad():
        torch.testing.assert_close(during, oracle.logits(half, **changes))
    assert not torch.allclose(during, before, atol=1e-3)


def test_rescaling_is_no_broken_promise():
    model = two()
    with torch.no_grad(), model.base_model.unchanging_adapters():
        before = oracle.logits(model, adapter_names=NAMES)
        with rescale_adapter_scale(model, 0.5):
            during = oracle.logits(model, adapter_names=NAMES)
        after = oracle.logits(model, adapter_names=NAMES)
    assert torch.equal(before, after) and not torch.allclose(during, before, atol=1e-3)


def test_modules_whose_hooks_change_their_dtype():
    """Stored in bf16, computing in fp32: what diffusers' layerwise casting makes of every module with weights."""

    def widen(module, args):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.float()

    def narrow(module, args, output):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.bfloat16()

    model = two().bfloat16()
    x = torch.randn(3, 32)
    expected = two()
    expected.load_state_dict(model.state_dict())
    for module in model.modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(narrow)
    with torch.no_grad():
        for layer, plain in zip(layers(model), layers(expected), strict=True):
            with disable_input_dtype_casting(model, active=False), pytest.raises(RuntimeError, match="same dtype"):
                layer(x)
            with disable_input_dtype_casting(model):
                found = layer(x)
            torch.testing.assert_close(found, plain(x))
            assert found.dtype is torch.float32 and layer.lora_A["one"].weight.dtype is torch.bfloat16
            with pytest.raises(RuntimeError, match="same dtype"):
                layer(x)


@pytest.mark.parametrize("method", ["generate", "forward"])
@pytest.mark.parametrize("make, task", [(oracle.llama, "CAUSAL_LM"), (oracle.llama, None), (oracle.t5, "SEQ_2_SEQ_LM")])
def test_signatures_and_help_are_the_base_models(method, make, task):
    told = {}
    for library in (peftfast, importlib.import_module("peft")):
        options = {"target_modules": "all-linear", "task_type": task}
        model = library.get_peft_model(make(), library.LoraConfig(**options)).eval()
        if library is peftfast:
            update_signature(model, method)
        else:
            importlib.import_module("peft.helpers").update_signature(model, method)
        function = getattr(model, method)
        told[library.__name__] = inspect.signature(function), function.__doc__
        if task == "CAUSAL_LM" and library is peftfast:
            prompt = torch.arange(6).view(2, 3)
            tokens = model.generate(prompt, max_new_tokens=2, do_sample=False, adapter_names=["default", "__base__"])
            assert tokens.shape == (2, 5)
    if (method, task) == ("forward", None) or method == "generate":
        assert told["peftfast"] == told["peft"]


def both(module, name):
    """PEFT's function, and ours under the same name."""
    from peftfast.interop import layout

    return getattr(importlib.import_module(module), name), layout.lookup(module, name)


def test_small_functions_do_as_those_of_peft():
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    for transpose in both("peft.utils.other", "transpose"):
        assert transpose(weight, False) is weight and isinstance(transpose(weight, True), torch.nn.Parameter)
        assert transpose(weight.data, True).shape == (3, 2)
    for match in both("peft.utils.other", "get_pattern_key"):
        assert match(["k_proj", r".*\.0\..*q_proj"], "layers.0.attn.q_proj") == r".*\.0\..*q_proj"
        assert match(["proj"], "layers.0.q_proj") == "layers.0.q_proj"
    for get in both("peft.utils", "get_quantization_config"):
        model = oracle.llama()
        assert get(model, "gptq") is None
        model.config.quantization_config, model.quantization_method = "told", "gptq"
        assert get(model, "gptq") == "told" and get(model, "awq") is None
    for empty in both("peft.utils.integrations", "init_empty_weights"):
        with empty():
            layer = torch.nn.BatchNorm1d(3)
        assert layer.weight.is_meta and not layer.running_mean.is_meta and layer.weight.requires_grad
        assert not torch.nn.Linear(2, 2).weight.is_meta
    for gather in both("peft.utils.integrations", "gather_params_ctx"):
        with gather(weight), gather([weight]):
            pass
    for dense in both("peft.utils.integrations", "dequantize_module_weight"):
        layer = torch.nn.Linear(2, 2)
        assert dense(layer) is layer.weight
    found = []
    for library, include in zip(
        (importlib.import_module("peft"), peftfast),
        both("peft.tuners.tuners_utils", "_maybe_include_all_linear_layers"),
        strict=True,
    ):
        config = include(library.LoraConfig(target_modules="all-linear"), oracle.llama())
        found.append(config.target_modules)
    assert found[0] == found[1] and "lm_head" not in found[0]
    theirs, ours = both("peft.utils", "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING")
    assert theirs == ours
    for name in ("is_bnb_available", "is_bnb_4bit_available", "is_hqq_available", "is_torchao_available"):
        theirs, ours = both("peft.import_utils", name)
        assert theirs() == ours(), name
    for name in ("UPCAST_DTYPES", "ALLOWED_COMPUTE_DTYPES", "DUMMY_TARGET_MODULES", "TOKENIZER_CONFIG_NAME"):
        theirs, ours = both("peft.utils.constants", name)
        assert theirs == ours, name


def test_what_is_left_to_merge():
    _, check = both("peft.tuners.tuners_utils", "check_adapters_to_merge")
    layer = layers(two())[0]
    assert check(layer) == ["one"] and check(layer, ["two"]) == ["two"]
    layer.merge(adapter_names=["one"])
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        assert check(layer) == []
    with pytest.warns(UserWarning, match="additionally merging two"):
        assert check(layer, ["one", "two"]) == ["two"]
    with pytest.raises(TypeError, match="list of strings"):
        check(layer, "one")


@pytest.mark.parametrize("name", ["task_arithmetic", "magnitude_prune", "ties", "dare_linear", "dare_ties"])
def test_merge_utils_give_the_numbers_of_peft(name):
    tensors = [torch.randn(5, 7) for _ in range(3)]
    weights = torch.tensor([0.5, -1.0, 2.0])
    arguments = () if name == "task_arithmetic" else (0.4,)
    results = []
    for combine in both("peft.utils.merge_utils", name):
        torch.manual_seed(0)
        results.append(combine(tensors, weights, *arguments))
    torch.testing.assert_close(results[0], results[1])
    for prune in ("magnitude", "random"):
        pruned = []
        for function in both("peft.utils.merge_utils", "prune"):
            torch.manual_seed(0)
            pruned.append(function(tensors[0], 0.3, prune, rescale=True))
        assert torch.equal(*pruned)
