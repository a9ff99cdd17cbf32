"""What `peft.helpers` offers, and other small things that libraries reach for."""

import importlib
import inspect
from pathlib import Path

import oracle
import pytest
import torch

import peftfast
from peftfast.helpers import disable_input_dtype_casting, rescale_adapter_scale, update_signature
from peftfast.layers.layer import BaseTunerLayer

peft = importlib.import_module("peft")

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
    with pytest.raises(TypeError, match="multiplier should be of type float, got <class 'str'>"):
        rescale_adapter_scale(model, "2").__enter__()


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
    for library in (peftfast, peft):
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
        (peft, peftfast),
        both("peft.tuners.tuners_utils", "_maybe_include_all_linear_layers"),
        strict=True,
    ):
        config = include(library.LoraConfig(target_modules="all-linear"), oracle.llama())
        found.append(config.target_modules)
        assert include(library.LoraConfig(target_modules=".*q_proj"), oracle.llama()).target_modules == ".*q_proj"
    assert found[0] == found[1] and "lm_head" not in found[0]
    for bool_of in both("peft.utils.other", "str_to_bool"):
        assert [bool_of(word) for word in ("Yes", "on", "1", "FALSE", "n")] == [1, 1, 1, 0, 0]
        with pytest.raises(ValueError, match="invalid truth value maybe"):
            bool_of("maybe")
    theirs, ours = both("peft.utils", "infer_device")
    assert theirs() == ours()
    theirs, ours = both("peft.tuners.tuners_utils", "get_device_map")
    assert theirs(oracle.llama()) == ours(oracle.llama())
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
    if "ties" in name:
        results = []
        for combine in both("peft.utils.merge_utils", name):
            torch.manual_seed(0)
            results.append(combine(tensors, weights, *arguments, "frequency"))
        torch.testing.assert_close(results[0], results[1])
    for prune, density, rescale in (("magnitude", 0.3, True), ("random", 0.3, True), ("magnitude", 0, True),
                                    ("random", 0, False)):  # fmt: skip
        pruned = []
        for function in both("peft.utils.merge_utils", "prune"):
            torch.manual_seed(0)
            pruned.append(function(tensors[0], density, prune, rescale=rescale))
        assert torch.equal(*pruned)


def test_shift_tokens_right():
    labels = torch.tensor([[5, -100, 7, 8], [1, 2, -100, -100]])
    mine, other = (library.shift_tokens_right(labels, 9, 3) for library in (peftfast, peft))
    assert torch.equal(mine, other) and both("peft.utils", "shift_tokens_right")[1] is peftfast.shift_tokens_right
    assert labels[0, 1] == -100
    with pytest.raises(ValueError, match="pad_token_id has to be defined"):
        peftfast.shift_tokens_right(labels, None, 3)


READ = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_bias", "use_dora",
        "use_rslora", "scaling", "r")  # fmt: skip


@pytest.mark.parametrize(
    "make, options, name",
    [
        (oracle.llama, {"target_modules": ["q_proj"]}, "model.layers.0.self_attn.q_proj"),
        (oracle.llama, {"target_modules": ["q_proj"], "use_dora": True}, "model.layers.0.self_attn.q_proj"),
        (oracle.llama, {"target_modules": ["embed_tokens"]}, "model.embed_tokens"),
        (oracle.gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}, "transformer.h.0.attn.c_attn"),
        (lambda: oracle.llama(bias=True), {"target_modules": ["q_proj"], "lora_bias": True},
         "model.layers.0.self_attn.q_proj"),
    ],
    ids=["linear", "dora", "embedding", "conv1d", "lora_bias"],
)  # fmt: skip
def test_what_other_libraries_read_of_a_layer(make, options, name):
    """As of PEFT's: what is empty for this kind of module, the weight, starting anew, moving."""
    twins = oracle.Twins(make, options)
    ours, theirs = (model.get_base_model().get_submodule(name) for model in (twins.ours, twins.theirs))
    keys = set(twins.ours.state_dict())
    for attribute in READ:
        assert sorted(getattr(ours, attribute)) == sorted(getattr(theirs, attribute)), attribute
    assert bool(ours.fan_in_fan_out) == theirs.fan_in_fan_out
    assert torch.equal(ours.get_base_weight(), theirs.get_base_weight())
    for layer in (ours, theirs):
        layer.set_base_weight(1.5 * layer.get_base_weight())
    assert torch.equal(ours.get_base_weight(), theirs.get_base_weight())
    assert ours.frozen_peft_weight_names == theirs.frozen_peft_weight_names == {}
    assert twins.ours.base_model.supports_lora_conversion() == twins.ours.supports_lora_conversion()
    own = {n: p for n, p in ours.named_parameters() if "default" in n}
    before = {n: p.detach().clone() for n, p in own.items()}
    for init in (False, True, "gaussian"):
        for layer in (ours, theirs):
            torch.manual_seed(0)
            layer.reset_lora_parameters("default", init)
            layer.reset_lora_parameters("nobody", init)
        for n, p in own.items():
            assert torch.equal(p, theirs.get_parameter(n)), (init, n)
        assert init or all(torch.equal(p, before[n]) for n, p in own.items())
    batch = oracle.inputs(twins.ours)
    with torch.no_grad():
        torch.testing.assert_close(twins.ours(**batch).logits, twins.theirs(**batch).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="Unknown initialization"):
        ours.reset_lora_parameters("default", "olora")
    for layer in (ours, theirs):
        layer.base_layer.to(torch.bfloat16)
        layer._move_adapter_to_device_of_base_layer("default")
        assert {p.dtype for n, p in layer.named_parameters() if "default" in n} == {torch.bfloat16}
    assert set(twins.ours.state_dict()) == keys


def test_layers_of_other_methods_have_no_lora():
    options = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    ada = peftfast.get_peft_model(oracle.llama(), peftfast.AdaLoraConfig(**options, total_step=10))
    ia3 = peftfast.get_peft_model(oracle.llama(), peftfast.IA3Config(**options, feedforward_modules=[]))
    ada, ia3 = (model.get_base_model().model.layers[0].self_attn.q_proj for model in (ada, ia3))
    assert len(ada.lora_embedding_A) == len(ada.lora_magnitude_vector) == len(ada.use_dora) == 0
    with pytest.raises(ValueError, match="no LoRA"):
        ada.reset_lora_parameters("default", True)
    assert not hasattr(ia3, "lora_A") and not ia3.fan_in_fan_out


def test_the_parameter_of_a_layer_around_one():
    from experts.moe import qwen3_moe

    found = []
    for library in (peftfast, peft):
        model = library.get_peft_model(qwen3_moe(), library.LoraConfig(target_parameters=["experts.down_proj"]))
        layer = next(m for m in model.modules() if type(m).__name__ in ("ParameterLayer", "ParamWrapper"))
        layer.reset_lora_parameters("default", True)
        found.append(layer.get_param())
        assert not layer.fan_in_fan_out and len(layer.lora_embedding_A) == 0
    assert torch.equal(*found)


def test_configs_are_uploaded_and_may_have_their_say(monkeypatch, tmp_path):
    calls = []

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, **kwargs):
            calls.append((repo_id, self.token, kwargs))
            return type("Url", (str,), {"repo_id": f"me/{repo_id}"})("https://hub/me/x")

        def upload_folder(self, *, folder_path, **kwargs):
            calls.append(({p.name: p.read_text() for p in Path(folder_path).iterdir()}, kwargs))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    config = peftfast.LoraConfig(r=3)
    assert config.push_to_hub("x", token="t", private=True, commit_message="mine") == "https://hub/me/x"
    created, (files, kwargs) = calls
    assert created == ("x", "t", {"private": True, "exist_ok": True})
    assert files == {"adapter_config.json": config.to_json()}
    assert kwargs == {"repo_id": "me/x", "commit_message": "mine"}

    class Mine(peftfast.LoraConfig):
        @classmethod
        def check_kwargs(cls, **kwargs):
            return {**super().check_kwargs(**kwargs), "r": 5}

    config.save_pretrained(tmp_path)
    assert Mine.from_pretrained(tmp_path).r == 5 and peftfast.LoraConfig.from_pretrained(tmp_path).r == 3
    assert peftfast.LoraConfig.check_kwargs(r=4) == {"r": 4}
