"""The base layer is called as the module it is, wherever calling it means more than one product."""

import importlib
from functools import partial

import oracle
import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize

import peftfast
from peftfast.layers.layer import BaseTunerLayer
from peftfast.methods.lora.lora import Lora
from peftfast_kernels import use_backend

peft = importlib.import_module("peft")


class Net(nn.Module):
    def __init__(self, linear=nn.Linear):
        super().__init__()
        self.first, self.second = linear(16, 24), linear(24, 8)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def config(library=peftfast, **changes):
    return library.LoraConfig(r=4, target_modules=["first", "second"], init_lora_weights=False, **changes)


def pair(base, **changes):
    """The same adapters over the same base, here and in PEFT; the bases are made by calling `base`."""
    models = []
    for library in (peftfast, peft):
        torch.manual_seed(0)
        models.append(oracle.quietly(library.get_peft_model, base(), config(library, **changes)))
    ours, theirs = models
    oracle.copy_parameters(theirs, ours, only="lora_")
    return ours, theirs


def agree(ours, theirs, x):
    x = x.clone().requires_grad_()
    results = []
    for model in (ours, theirs):
        x.grad = None
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        results.append([y, x.grad] + [p.grad for n, p in model.named_parameters() if "lora_" in n])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


def double_input(module, args):
    return (args[0] * 2,)


def negate_output(module, args, output):
    return -output


def halve_gradient(module, grad_input, grad_output):
    return tuple(None if g is None else g / 2 for g in grad_input)


def halve_arriving_gradient(module, grad_output):
    return tuple(g / 2 for g in grad_output)


@pytest.mark.parametrize(
    "register, hook",
    [
        ("register_forward_pre_hook", double_input),
        ("register_forward_hook", negate_output),
        ("register_full_backward_hook", halve_gradient),
        ("register_full_backward_pre_hook", halve_arriving_gradient),
    ],
)
@pytest.mark.parametrize("when", ["before wrapping", "after wrapping", "after a forward", "on the adapter layer"])
def test_hooks(register, hook, when):
    def base():
        net = Net()
        if when == "before wrapping":
            getattr(net.first, register)(hook)
        return net

    ours, theirs = pair(base)
    for model in (ours, theirs):
        layer = model.base_model.model.first
        if when == "after a forward":
            model(X)
        if when in ("after wrapping", "after a forward"):
            getattr(layer.base_layer, register)(hook)
        if when == "on the adapter layer":
            getattr(layer, register)(hook)
    agree(ours, theirs, X)


@pytest.mark.parametrize("name", ["register_module_forward_pre_hook", "register_module_forward_hook"])
def test_hooks_for_all_modules(name):
    model = peftfast.get_peft_model(Net(), config())
    seen = []
    handle = getattr(torch_module, name)(lambda module, *rest: seen.append(type(module)) and None)
    try:
        model(X)
    finally:
        handle.remove()
    assert seen.count(nn.Linear) >= 2


def test_replaced_forward_of_an_instance():
    ours, theirs = pair(Net)
    for model in (ours, theirs):
        linear = model.base_model.model.first.base_layer
        linear.forward = lambda x, linear=linear: nn.functional.linear(x, linear.weight) * 3
    agree(ours, theirs, X)


class Shifted(nn.Linear):
    """An unknown subclass with a forward of its own."""

    def forward(self, x):
        return super().forward(x) + 1


def test_unknown_subclass():
    ours, theirs = pair(lambda: Net(Shifted))
    agree(ours, theirs, X)
    with torch.no_grad():
        expected = ours(X)
        torch.testing.assert_close(ours.merge_and_unload()(X), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("put", ["__setattr__", "register_module", "add_module"])
@pytest.mark.parametrize("kind", [nn.Linear, Shifted])
@pytest.mark.parametrize("dora", [False, True])
def test_another_base_module_in_its_place(kind, dora, put):
    ours, theirs = pair(Net, use_dora=dora)
    for model in (ours, theirs):
        model(X)
        torch.manual_seed(1)
        layer = model.base_model.model.first
        getattr(layer, put)("base_layer", kind(16, 24).requires_grad_(False))
    agree(ours, theirs, X)
    if dora and kind is Shifted:
        return  # a shift of the output is not in the weight that the magnitudes multiply
    with torch.no_grad():
        expected = ours(X)
        ours.merge_adapter()
        with pytest.raises(RuntimeError, match="unmerge them before"):
            ours.base_model.model.first.base_layer = nn.Linear(16, 24)
        nn.SyncBatchNorm.convert_sync_batchnorm(ours)  # puts every other module where it is
        torch.testing.assert_close(ours(X), expected, rtol=1e-4, atol=1e-4)
        ours.unmerge_adapter()
        torch.testing.assert_close(ours(X), expected, rtol=1e-4, atol=1e-4)


class Around(nn.Module):
    """As Kronfluence puts one around every linear layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * 2


@pytest.mark.parametrize(("kind", "shape"), [(nn.Linear, ()), (partial(nn.Conv1d, kernel_size=3, padding=1), (5,))])
def test_a_module_around_the_base_module_is_called(kind, shape):
    ours, theirs = pair(partial(Net, kind))
    x = X.view(3, 16, *([1] * len(shape))).expand(3, 16, *shape).contiguous()
    for model in (ours, theirs):
        model(x)
        layer = model.base_model.model.first
        layer.base_layer = Around(layer.base_layer)
    agree(ours, theirs, x)
    with torch.no_grad():
        if kind is nn.Linear:  # PEFT's convolutions know no mixed batches
            mixed = [model.eval()(x, adapter_names=["default", "__base__", "default"]) for model in (ours, theirs)]
            torch.testing.assert_close(*mixed, rtol=1e-4, atol=1e-4)
        with pytest.raises(RuntimeError, match="computes something else"):
            ours.merge_adapter()
    for model in (ours, theirs):
        layer = model.base_model.model.first
        layer.base_layer = layer.base_layer.inner
    agree(ours, theirs, x)


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "lora_dropout"])
def test_another_dict_of_an_adapters_modules(name):
    ours, theirs = pair(Net)
    for model in (ours, theirs):
        model(X)
        layer = model.base_model.model.first
        torch.manual_seed(1)
        old = getattr(layer, name)["default"]
        new = nn.Hardtanh() if name == "lora_dropout" else nn.Linear(old.in_features, old.out_features, bias=False)
        setattr(layer, name, nn.ModuleDict({"default": new}))
    agree(ours, theirs, X)


class Doubled(nn.Module):
    def forward(self, w):
        return w * 2


def test_parametrized_weight():
    def base():
        net = Net()
        parametrize.register_parametrization(net.first, "weight", Doubled())
        return net

    ours, theirs = pair(base)
    agree(ours, theirs, X)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with pytest.raises(ValueError, match="parametri"):
        ours.merge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
    assert not any(m.merged for m in ours.modules() if isinstance(m, BaseTunerLayer))


def test_weight_norm():
    def base():
        net = Net()
        parametrizations.weight_norm(net.second)
        return net

    agree(*pair(base), X)


@pytest.mark.parametrize("backend", ["auto", "torch"])  # few tokens, and as many take
def test_trained_base_weight_gets_its_gradient(backend):
    ours, theirs = pair(Net)
    for model in (ours, theirs):
        model.base_model.model.first.base_layer.weight.requires_grad_(True)
        model.base_model.model.second.base_layer.bias.requires_grad_(True)
    with use_backend(backend):
        agree(ours, theirs, X)
    for name in ("first.base_layer.weight", "second.base_layer.bias"):
        grads = [model.base_model.model.get_parameter(name).grad for model in (ours, theirs)]
        torch.testing.assert_close(*grads)


def test_wrapped_twice():
    """A LoRA around a LoRA, as `get_peft_model` on a PeftModel makes it: one more adapter on the same layers."""
    models = []
    for library in (peftfast, peft):
        torch.manual_seed(0)
        once = oracle.quietly(library.get_peft_model, Net(), config(library), "inner")
        with pytest.warns(UserWarning, match="second time"):
            models.append(library.get_peft_model(once.base_model.model, config(library), "outer"))
    ours, theirs = models
    assert {n for n, _ in ours.named_parameters()} == {n for n, _ in theirs.named_parameters()}
    oracle.copy_parameters(theirs, ours)
    agree(ours, theirs, X)


def test_module_used_in_two_places():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.again = nn.ModuleList([self.first])

        def forward(self, x):
            return self.again[0](self.first(x))

    model = peftfast.get_peft_model(Twice(), peftfast.LoraConfig(target_modules=["first"], init_lora_weights=False))
    inner = model.base_model.model
    assert inner.first is inner.again[0]
    before = model(X)
    merged = model.merge_and_unload()
    assert merged.first is merged.again[0] and type(merged.first) is nn.Linear
    torch.testing.assert_close(merged(X), before, rtol=1e-4, atol=1e-5)


class Listed(nn.Module):
    """As the blocks of MaskFormer's mask head."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)]
        for i, layer in enumerate(self.layers):
            self.add_module(str(i), layer)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_modules_that_are_called_from_a_list_of_their_parents(monkeypatch):
    base = Listed()
    alone = base(X)
    model = peftfast.get_peft_model(base, peftfast.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    adapted = model(X)
    adapted.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
    torch.testing.assert_close(model.merge_and_unload()(X), adapted, rtol=1e-4, atol=1e-5)
    assert base.layers == list(base.children()) and not torch.allclose(adapted, alone)

    def failing(self, site, adapter):
        if adapter.key == "2":
            raise OSError("no memory")

    monkeypatch.setattr(Lora, "init", failing)
    with pytest.raises(OSError):
        peftfast.get_peft_model(base, peftfast.LoraConfig(target_modules=["0", "2"]))
    assert base.layers == list(base.children()) and {type(m) for m in base.layers} == {nn.Linear, nn.ReLU}


# ---- accelerate ------------------------------------------------------------------------------------------
accelerate = pytest.importorskip("accelerate")


def offloaded(kind, folder, linear=nn.Linear):
    net = Net(linear)
    if kind == "cpu":
        accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    elif kind == "disk":
        accelerate.disk_offload(net, str(folder), execution_device=torch.device("cpu"))
    else:
        device_map = {"first": "cpu", "second": "disk"}
        net = accelerate.dispatch_model(net, device_map, offload_dir=str(folder), force_hooks=True, main_device="cpu")
    return net


@pytest.mark.parametrize("kind", ["cpu", "disk", "map"])
def test_offloaded_base(kind, tmp_path):
    torch.manual_seed(3)
    plain = Net()
    torch.manual_seed(3)
    net = offloaded(kind, tmp_path)
    assert any(p.is_meta for p in net.parameters())
    with torch.no_grad():
        torch.testing.assert_close(net(X), plain(X))
    torch.manual_seed(5)
    ours = peftfast.get_peft_model(net, config())
    torch.manual_seed(5)
    theirs = peft.get_peft_model(plain, config(peft))
    assert not any(p.is_meta for n, p in ours.named_parameters() if "lora_" in n)
    oracle.copy_parameters(theirs, ours, only="lora_")
    x = X.clone().requires_grad_()
    ours(x).sum().backward()
    grad, x.grad = x.grad, None
    theirs(x).sum().backward()
    torch.testing.assert_close(grad, x.grad, rtol=1e-4, atol=1e-5)
    ours.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path / "adapter")
    saved = dict(loaded.named_parameters())
    assert all(torch.equal(saved[n], p) for n, p in ours.named_parameters() if "lora_" in n)


def pointwise(inputs, outputs):
    return nn.Conv1d(inputs, outputs, 1)


@pytest.mark.parametrize("kind", ["cpu", "disk", "map"])
@pytest.mark.parametrize("what", ["DoRA", "dropout", "convolution", "tokens"])
def test_methods_that_read_the_weights_of_an_offloaded_base(kind, what, tmp_path):
    """Their place is empty while their module rests, as PEFT's errors say."""
    linear, x = (pointwise, X.unsqueeze(-1)) if what == "convolution" else (nn.Linear, X)
    if what == "tokens":
        cfg = peftfast.LoraConfig(target_modules=["first"], trainable_token_indices={"second": [1, 3]})
    else:
        cfg = config(use_dora=True, lora_dropout=0.5 * (what == "dropout"))
    found = []
    for place in (None, kind):
        torch.manual_seed(3)
        base = Net(linear) if place is None else offloaded(kind, tmp_path, linear)
        torch.manual_seed(5)
        model = peftfast.get_peft_model(base, cfg)
        out = model(x)
        out.square().sum().backward()
        found.append([out, *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("kind", ["cpu", "disk", "map"])
@pytest.mark.parametrize("bias", [False, True])
def test_merging_into_an_offloaded_base(kind, bias, tmp_path):
    """Either the weights change or it is refused; never a merge that is lost."""
    torch.manual_seed(3)
    net = offloaded(kind, tmp_path)
    torch.manual_seed(5)
    model = peftfast.get_peft_model(net, config(lora_bias=bias))
    with torch.no_grad():
        expected = model(X)
        try:
            merged = model.merge_and_unload()
        except (ValueError, RuntimeError, NotImplementedError) as e:
            assert kind != "cpu" and "offload" in str(e)
            torch.testing.assert_close(model(X), expected)
        else:
            torch.testing.assert_close(merged(X), expected, rtol=1e-4, atol=1e-5)


def test_merging_into_an_offloaded_base_with_tied_embeddings():
    ids, outputs = torch.tensor([[3, 5, 7]]), []
    for offload in (False, True):
        base = oracle.llama(tied=True)
        if offload:
            accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
        torch.manual_seed(5)
        cfg = peftfast.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        outputs.append(peftfast.get_peft_model(base, cfg).merge_and_unload()(ids).logits)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", ["cpu", "disk", "map"])
def test_copies_of_offloaded_modules_are_trained(kind, tmp_path):
    """They were offloaded as well, so that every step was forgotten with the next call."""
    cfg = peftfast.LoraConfig(target_modules=["first"], modules_to_save=["second"])
    torch.manual_seed(3)
    alone = Net()
    torch.manual_seed(3)
    net, outputs = offloaded(kind, tmp_path), []
    for base in (alone, net):
        torch.manual_seed(5)
        model = peftfast.get_peft_model(base, cfg)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            model(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        outputs.append(model(X))
    torch.testing.assert_close(outputs[1], outputs[0])


def test_what_others_keep_on_the_base_module_is_not_on_its_wrapper():
    """For accelerate puts a hook in the place of one that is there, and who looks for hooks or parametrizations in all
    modules takes them off each that has some."""
    hooks = pytest.importorskip("accelerate.hooks")
    net = Net()
    for module in (net.first, net.second):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu"))
        module._diffusers_hook = None
    parametrizations.orthogonal(net.first)
    cfg = peftfast.LoraConfig(target_modules=["first"], modules_to_save=["second"], init_lora_weights=False)
    model = peftfast.get_peft_model(net, cfg)
    expected = model(X)
    for wrapper in (model.get_base_model().first, model.get_base_model().second):  # as `dispatch_model` does
        hooks.add_hook_to_module(wrapper, hooks.AlignDevicesHook("cpu"))
        assert not hasattr(wrapper, "_diffusers_hook")
    assert torch.equal(model(X), expected)
    hooks.remove_hook_from_submodules(model)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    assert not any(map(parametrize.is_parametrized, model.modules()))
    torch.testing.assert_close(model(X), expected)


def test_loading_onto_an_offloaded_base(tmp_path):
    torch.manual_seed(5)
    source = peft.get_peft_model(Net(), config(peft))
    source.save_pretrained(tmp_path / "adapter")
    loaded = peftfast.PeftModel.from_pretrained(offloaded("cpu", tmp_path), tmp_path / "adapter")
    values = {n: p for n, p in source.named_parameters() if "lora_" in n}
    found = {n: p for n, p in loaded.named_parameters() if "lora_" in n}
    assert found.keys() == values.keys()
    assert all(torch.equal(found[n], p) for n, p in values.items())
    loaded(X)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_output_that_is_no_tensor_is_refused_by_its_class(method):
    """As the routers of Llama 4 and Phi-MoE have, which "all-linear" means too."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    base = transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**sizes, **heads))
    if method == "ia3":
        cfg = peftfast.IA3Config(target_modules=["q_proj", "router"], feedforward_modules=[])
    else:
        cfg = peftfast.LoraConfig(r=4, target_modules=["q_proj", "router"], use_dora=method == "dora")
    model = oracle.quietly(peftfast.get_peft_model, base, cfg)
    ids = torch.arange(6).view(2, 3)
    with pytest.raises(TypeError, match="Router is a torch.nn.Linear whose output is no tensor but a tuple"):
        model(ids)
    with model.disable_adapter():
        assert model(ids).logits.isfinite().all()


class Grouped(nn.Linear):
    """A block-diagonal matrix, as DeepSeek-V4 has one behind its attention."""

    def forward(self, x):
        return torch.einsum("...gi,goi->...go", x, self.weight.view(2, -1, self.in_features))


def test_linear_layers_in_groups_are_refused_by_name():
    model = peftfast.get_peft_model(
        nn.Sequential(Grouped(8, 12, bias=False)), peftfast.LoraConfig(target_modules=["0"])
    )
    with pytest.raises(TypeError, match=r"Grouped is a torch.nn.Linear that gives \(3, 2, 6\) for .* \(3, 2, 8\)"):
        model(torch.randn(3, 2, 8))
    with model.disable_adapter():
        assert model(torch.randn(3, 2, 8)).shape == (3, 2, 6)
