"""Whoever makes calling an adapter's own modules mean more (hooks, pruning, another module) gets what PEFT gives, at
sizes of both ways of computing; and so do transforms of functorch's and forward-mode differentiation."""

import copy

import oracle
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations, parametrize, prune

import peftfast

ROWS = [4, 1024]  # times 64 columns: composed of torch's operations, and as one Function


def models(dora=False, dropout=0.0, bias=False, **changes):
    """The same adapter in both libraries: peftfast's, PEFT's."""
    made = []
    for library in (peftfast, peft):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 20))
        config = library.LoraConfig(
            r=4, target_modules=["0", "2"], use_dora=dora, lora_dropout=dropout, lora_bias=bias, **changes
        )  # fmt: skip
        model = library.get_peft_model(base, config)
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
                p.copy_(torch.randn(p.shape, generator=g) * 0.2 + (1.0 if "magnitude" in _ else 0.0))
        made.append(model)
    return made


def layer(model):
    return model.base_model.model[0]


def results(model, rows, steps=2):
    """Outputs and gradients of some steps of training."""
    g, found = torch.Generator().manual_seed(2), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        x = torch.randn(rows, 64, generator=g).requires_grad_()
        y = model(x)
        y.pow(2).mean().backward()
        found += [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    return found


def assert_same(change, rows, **config):
    ours, theirs = models(**config)
    plain = copy.deepcopy(ours)
    for model in (ours, theirs):
        change(model)
    for one, other in zip(results(ours, rows), results(theirs, rows), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    return ours, plain


def zero_down(model):
    layer(model).lora_A["default"].register_forward_hook(lambda module, args, output: output * 0)


def scale_input(model):
    layer(model).lora_B["default"].register_forward_pre_hook(lambda module, args: (args[0] * 3,))


def clip_backward(model):
    layer(model).lora_A["default"].register_full_backward_hook(lambda module, dx, dy: (dx[0] * 0.5,))


def own_forward(model):
    module = layer(model).lora_B["default"]
    module.forward = lambda x: 2 * nn.functional.linear(x, module.weight, module.bias)


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced(model):
    old = layer(model).lora_B["default"]
    new = Twice(4, 48, bias=old.bias is not None)
    new.load_state_dict(old.state_dict())
    layer(model).lora_B["default"] = new


def replaced_with_bias(model):
    old = layer(model).lora_A["default"]
    torch.manual_seed(4)
    layer(model).lora_A["default"] = nn.Linear(64, 4).requires_grad_(old.weight.requires_grad)


def parametrised(model):
    parametrizations.orthogonal(layer(model).lora_A["default"])


def pruned(model):
    for one in (model.base_model.model[0], model.base_model.model[2]):
        prune.l1_unstructured(one.lora_A["default"], "weight", 0.5)


def normalised(model):
    torch.nn.utils.weight_norm(layer(model).lora_A["default"])


def dropped(model):
    layer(model).lora_dropout["default"] = nn.Hardtanh(-0.5, 0.5)


CHANGES = [
    zero_down,
    scale_input,
    clip_backward,
    own_forward,
    replaced,
    replaced_with_bias,
    pruned,
    normalised,
    dropped,
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_modules_of_an_adapter_are_called(change, rows):
    ours, plain = assert_same(change, rows)
    x = torch.randn(rows, 64)
    assert not torch.allclose(ours(x), plain(x), atol=1e-4)  # the change is one


@pytest.mark.parametrize(
    "change", [zero_down, scale_input, replaced, replaced_with_bias, dropped], ids=lambda change: change.__name__
)
@pytest.mark.parametrize("config", [{"dora": True}, {"bias": True}], ids=str)
def test_with_dora_and_a_bias(change, config):
    assert_same(change, 8, **config)


def test_a_convolution_with_dora():
    outputs = []
    for library in (peftfast, peft):
        torch.manual_seed(0)
        config = library.LoraConfig(r=2, target_modules=["0"], use_dora=True, init_lora_weights=False)
        model = library.get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 3)), config)
        scale_input(model)
        outputs.append(model(torch.randn(2, 4, 6, 6)))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("rows", ROWS)
def test_several_active_adapters_one_of_them_hooked(rows):
    ours, theirs = models()
    for library, model in ((peftfast, ours), (peft, theirs)):
        torch.manual_seed(3)
        model.add_adapter("second", library.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
        zero_down(model)
    x = torch.randn(rows, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_hooks_and_modules_that_come_and_go():
    """Between calls of a layer that has been called before; afterwards it takes its short way again."""
    model, _ = models()
    x, one = torch.randn(4, 64), layer(model)
    before, bound = model(x), one._plan[1]
    seen = []
    handle = one.lora_A["default"].register_forward_hook(lambda *args: seen.append(1))
    torch.testing.assert_close(model(x), before)
    assert seen == [1] and bound.part(x) is None
    handle.remove()
    torch.testing.assert_close(model(x), before)
    assert seen == [1] and bound.part(x) is not None
    old = one.lora_B["default"]
    other = nn.Linear(4, 48, bias=False)
    one.lora_B["default"] = other
    changed = model(x)
    assert not torch.allclose(changed, before)
    assert one._make_plan()[1] is not None and torch.equal(model(x), changed)  # a plain module is read, not called
    one.lora_B["default"] = old
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("change", [pruned, normalised, replaced_with_bias, parametrised], ids=lambda c: c.__name__)
def test_what_others_put_into_the_modules_trains_with_the_adapter(change):
    ours, theirs = models()

    def trains():
        found = [{n: p.requires_grad for n, p in model.named_parameters()} for model in (ours, theirs)]
        assert found[0] == found[1]

    for library, model in ((peftfast, ours), (peft, theirs)):
        model.add_adapter("second", library.LoraConfig(r=3, target_modules=["0"]))
        model.set_adapter("second")
        model.set_adapter("default")
    for step in (
        change, lambda m: m.set_adapter("second"), lambda m: m.set_adapter("default"),
        lambda m: m.base_model.disable_adapter_layers(), lambda m: m.base_model.enable_adapter_layers(),
    ):  # fmt: skip
        oracle.quietly(step, ours), oracle.quietly(step, theirs)
        trains()
    for model in (ours, theirs):
        if change is parametrised:
            parametrize.remove_parametrizations(layer(model).lora_A["default"], "weight")
        model.set_adapter("second")
    trains()


def merged(model, x):
    return model.merge_and_unload()(x)


def merged_by_itself(model, x):
    model.base_model.model[0].merge()
    return model(x)


@pytest.mark.parametrize(
    "use", [lambda model, x: model(x), merged, merged_by_itself], ids=["called", "merged", "layer"]
)
@pytest.mark.parametrize("config", [{}, {"dora": True}, {"bias": True}], ids=str)
def test_another_plain_module_is_read_at_once(config, use):
    ours, theirs = models(**config)
    x = torch.randn(4, 64)
    for model in (ours, theirs):
        model(x)
        torch.manual_seed(5)
        layer(model).lora_A["default"] = nn.Linear(64, 4, bias=False)
        if "dora" in config:
            magnitude = copy.deepcopy(layer(model).lora_magnitude_vector["default"])
            magnitude.weight = nn.Parameter(2 * magnitude.weight)
            layer(model).lora_magnitude_vector["default"] = magnitude
    torch.testing.assert_close(use(ours, x), use(theirs, x), rtol=1e-4, atol=1e-4)


def test_global_hooks_see_the_modules():
    model, _ = models()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        model(torch.randn(4, 64))
    finally:
        handle.remove()
    assert layer(model).lora_A["default"] in seen and layer(model).lora_dropout["default"] in seen


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("what", ["grad", "vmap", "vmap over adapters", "jvp", "forward mode"])
def test_transforms(what, dora, rows):
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(4))

    def run(model):
        own = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        if what == "grad":
            found = grad(lambda params: functional_call(model, params, (x,)).pow(2).sum())(own)
            return [found[name] for name in sorted(found)]
        if what == "vmap":
            return [vmap(model)(torch.stack((x, x.flip(0))))]
        if what == "vmap over adapters":
            many = {n: torch.stack((p, 2 * p)) for n, p in own.items()}
            return [vmap(lambda params: functional_call(model, params, (x,)))(many)]
        if what == "jvp":
            return list(jvp(model, (x,), (x.flip(0),)))
        with torch.autograd.forward_ad.dual_level():
            dual = model(torch.autograd.forward_ad.make_dual(x, x.flip(0)))
            return list(torch.autograd.forward_ad.unpack_dual(dual))

    ours, theirs = models(dora)
    for one, other in zip(run(ours), run(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("change", [None, "hook"])
def test_second_derivatives(change, rows):
    """A gradient penalty: derivatives of the input's gradient with respect to the factors."""
    found = []
    for model in models():
        if change:  # the base is then called as a module, and the adapter added to its output
            layer(model).base_layer.register_forward_hook(lambda *args: None)
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(5)).requires_grad_()
        (dx,) = torch.autograd.grad(model(x).pow(2).mean(), x, create_graph=True)
        dx.pow(2).sum().mul(rows).backward()
        found.append([x.grad, *(p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None)])
    assert len(found[0]) == len(found[1]) == 5
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("method", ["lora", "dora", "velora"])
def test_many_gradients_at_once(method, rows):
    """As `torch.autograd.functional.jacobian(vectorize=True)` wants them."""
    found = []
    for model, library in zip(models(), (peftfast, peft), strict=True):
        if method != "lora":
            fields = {"use_dora": True} if method == "dora" else {"velora_config": library.VeloraConfig(num_groups=8)}
            config = library.LoraConfig(r=4, target_modules=["0", "2"], **fields)
            factors = {n: p for n, p in model.named_parameters() if p.requires_grad}
            model = library.get_peft_model(model.unload(), config)
            model.load_state_dict(factors, strict=False)
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(5)).requires_grad_()
        trained = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
        many = torch.randn(3, rows, 20, generator=torch.Generator().manual_seed(6))
        found.append(torch.autograd.grad(model(x), [x, *trained], many, is_grads_batched=True))
    assert len(found[0]) == (7 if method == "dora" else 5)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_second_derivatives_with_dropout():
    """The masks of the first derivative, against finite differences of it."""
    model, _ = models(dropout=0.4)
    model.double().train()
    x = torch.randn(1024, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(6)).requires_grad_()
    b = layer(model).lora_B["default"].weight

    def penalty(graph):
        torch.manual_seed(8)
        (dx,) = torch.autograd.grad(model(x).pow(2).mean(), x, create_graph=graph)
        return dx.pow(2).sum() * 1e3

    (gradient,) = torch.autograd.grad(penalty(True), b)
    step = torch.zeros_like(b)
    step[3, 1] = 1e-5
    b.data += step
    high = penalty(False)
    b.data -= 2 * step
    low = penalty(False)
    torch.testing.assert_close(gradient[3, 1], (high - low) / 2e-5, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("what", ["vmap", "jvp of a parametrised module"])
def test_a_model_can_be_copied_after_a_transform(what):
    model, _ = models()
    x = torch.randn(4, 64)
    if what == "vmap":  # over what the base module has as well
        twice = {n: torch.stack([p.detach()] * 2) for n, p in model.named_parameters()}
        vmap(lambda own: functional_call(model, own, (x,)))(twice)
    else:
        parametrize.register_parametrization(layer(model).base_layer, "weight", nn.Identity())
        jvp(model, (x,), (x,))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize("refused", ["", "orthogonal", "pruned", "old weight_norm"])
def test_loading_into_factors_that_are_made_of_other_tensors(tmp_path, refused):
    """Through the inverse of the parametrization, where it has one that gives these values again; or not at all."""
    saved, _ = models()
    saved.save_pretrained(tmp_path)
    model, _ = models()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.5)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    changes = {
        "": parametrizations.weight_norm,
        "orthogonal": parametrizations.orthogonal,
        "pruned": lambda factor: prune.l1_unstructured(factor, "weight", 0.5),
        "old weight_norm": nn.utils.weight_norm,
    }
    changes[refused](layer(model).lora_A["default"])
    before = model(x)
    if not refused:
        model.load_adapter(tmp_path, "default", strict=True)
        torch.testing.assert_close(model(x), saved(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer(model).lora_A["default"].weight, layer(saved).lora_A["default"].weight)
        return
    for load in (
        lambda: model.load_adapter(tmp_path, "default"),
        lambda: peftfast.set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors")),
    ):
        with pytest.raises(peftfast.AdapterLoadError, match=r"cannot be written: '.*0.lora_A.weight is (made|param)"):
            load()
        assert torch.equal(model(x), before)
