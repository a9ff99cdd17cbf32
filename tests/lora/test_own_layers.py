"""Layers that a user writes for kinds of module that the library does not know: the same source, with PEFT's base
classes and with ours."""

import copy
import importlib
from functools import partial
from types import SimpleNamespace

import oracle
import pytest
import torch
from torch import nn

import peftfast
from peftfast.layers import kinds
from peftfast.layers.own import LoraLayer
from peftfast.layers.parameter import ParameterLayer
from peftfast.wrapping.adding import add_adapter

peft = importlib.import_module("peft")
lora = importlib.import_module("peft.tuners.lora")


OURS = SimpleNamespace(**vars(kinds), ParamWrapper=ParameterLayer)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.lstm(self.first(x))[0])


class Product(nn.Module):
    """Linear, and no nn.Linear."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 6, 5
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x):
        return x @ self.weight.t()


def lstm_layer(base):
    class LstmLora(nn.Module, base):
        def __init__(self, base_layer, adapter_name, r=0, lora_alpha=1, config=None, **kwargs):
            super().__init__()
            base.__init__(self, base_layer, **kwargs)
            self._active_adapter = adapter_name
            self.update_layer(adapter_name, r, lora_alpha, config)

        def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs):
            self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
            self.scaling[adapter_name] = lora_alpha / r
            self.lora_A[adapter_name] = nn.Linear(self.base_layer.input_size, r, bias=False)
            self.lora_B[adapter_name] = nn.Linear(r, self.base_layer.hidden_size, bias=False)
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

        def forward(self, x):
            y, state = self.base_layer(x)
            if not self.disable_adapters:
                for name in self.active_adapters:
                    if name in self.lora_A:
                        y = y + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
            return y, state

    return LstmLora


def seeded(make):
    torch.manual_seed(0)
    return make()


def wrapped(library, base, **options):
    """A Net with an adapter in its LSTM and in a linear layer."""
    config = library.LoraConfig(target_modules=["first", "lstm"], r=2, lora_alpha=6, **options)
    config._register_custom_module({nn.LSTM: lstm_layer(base)})
    return library.get_peft_model(seeded(Net), config)


def both(**options):
    ours, theirs = wrapped(peftfast, LoraLayer, **options), wrapped(peft, lora.LoraLayer, **options)
    for model, library in ((ours, peftfast), (theirs, peft)):
        config = library.LoraConfig(target_modules=["first", "lstm"], r=3)
        config._register_custom_module({nn.LSTM: lstm_layer(LoraLayer if library is peftfast else lora.LoraLayer)})
        model.add_adapter("second", config)
    oracle.copy_parameters(oracle.randomised(theirs), ours)
    return ours, theirs


X = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(5))


def test_the_life_of_an_own_layer_is_as_in_peft(tmp_path):
    pairs = both()
    ours, theirs = pairs

    def same():
        oracle.same_live_state(ours, theirs)
        torch.testing.assert_close(ours(X), theirs(X))

    same()
    for model in pairs:
        model.set_adapter("second")
    same()
    for model in pairs:
        model.base_model.set_adapter(["default", "second"])
    same()
    disabled = []
    for model in pairs:
        with model.disable_adapter():
            disabled.append(model(X))
    assert torch.equal(disabled[0], seeded(Net)(X))
    torch.testing.assert_close(*disabled)
    same()
    for model in pairs:
        model.set_adapter("default")
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
    same()
    for model, name in zip(pairs, ("ours", "theirs"), strict=True):
        model.save_pretrained(tmp_path / name)
    oracle.same_files(tmp_path / "ours", tmp_path / "theirs")
    expected = ours(X)
    for folder in ("ours", "theirs"):
        config = peftfast.LoraConfig.from_pretrained(tmp_path / folder)
        config._register_custom_module({nn.LSTM: lstm_layer(LoraLayer)})
        loaded = peftfast.PeftModel.from_pretrained(seeded(Net), tmp_path / folder, config=config)
        assert torch.equal(loaded(X), expected) and not any(p.requires_grad for p in loaded.parameters())
    assert peftfast.get_base_model_state_dict(ours).keys() == Net().state_dict().keys()
    for model in pairs:
        model.delete_adapter("default")
    same()
    assert isinstance(ours.unload().lstm, nn.LSTM)


def test_what_is_in_an_own_layers_module_stays_in_its_mode():
    base = Net()
    base.lstm.dropped = nn.Dropout(0.5).eval()
    config = peftfast.LoraConfig(target_modules=["lstm"], inference_mode=True)
    config._register_custom_module({nn.LSTM: lstm_layer(LoraLayer)})
    layer = peftfast.get_peft_model(base, config).base_model.model.lstm
    assert layer.training and layer.base_layer.training and not layer.base_layer.dropped.training


def test_what_an_own_layer_cannot_do_is_refused_before_anything_changes():
    model, _ = both()
    model.eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="LstmLora has no merge of its own"):
            merge()
    with pytest.raises(TypeError, match="LstmLora.*mixed adapter batches"):
        model(X, adapter_names=["default", "second", "default", "__base__"])
    with pytest.raises(ValueError, match="lstm has a layer of a user's own"):
        add_adapter(model.base_model.inventory, "third", peftfast.IA3Config(target_modules=["lstm"]))
    assert model.get_model_status().merged_adapters == []
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_an_own_layer_that_merges_is_merged_with_the_others():
    class Scaled(nn.Module, LoraLayer):
        """Multiplies a normalisation's weight."""

        def __init__(self, base_layer, adapter_name, **settings):
            super().__init__()
            LoraLayer.__init__(self, base_layer)
            self.lora_gain = nn.ParameterDict()
            self.update_layer(adapter_name, **settings)

        def update_layer(self, adapter_name, r, lora_alpha, config, **settings):
            self.lora_gain[adapter_name] = nn.Parameter(torch.full((6,), 1.5))

        def forward(self, x):
            y = self.base_layer(x)
            for name in () if self.disable_adapters or self.merged else self.active_adapters:
                y = y * self.lora_gain[name]
            return y

        def merge(self, safe_merge=False, adapter_names=None):
            with torch.no_grad():
                for name in adapter_names:
                    self.base_layer.weight.mul_(self.lora_gain[name])
                    self.base_layer.bias.mul_(self.lora_gain[name])
                    self.merged_adapters.append(name)

        def unmerge(self):
            with torch.no_grad():
                while self.merged_adapters:
                    gain = self.lora_gain[self.merged_adapters.pop()]
                    self.base_layer.weight.div_(gain)
                    self.base_layer.bias.div_(gain)

    config = peftfast.LoraConfig(target_modules=["0", "1"], init_lora_weights=False)
    config._register_custom_module({nn.LayerNorm: Scaled})
    model = peftfast.get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)), config).eval()
    assert "base_model.model.1.lora_gain.default" in dict(model.named_parameters())
    assert "base_model.model.1.lora_gain" in peftfast.get_peft_model_state_dict(model)
    expected, bare = model(X), model.base_model.model[1].base_layer.weight.clone()
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    torch.testing.assert_close(model(X), expected)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model[1].base_layer.weight, bare)
    layer = model.base_model.model[0]
    with torch.no_grad():
        kept = layer.lora_A["default"].weight.clone()
        layer.lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.base_model.model[1].base_layer.weight, bare)  # taken out again
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(kept)
    torch.testing.assert_close(model.merge_and_unload()(X), expected)


@pytest.mark.parametrize("dora", [False, True])
def test_a_class_derived_from_a_layer_of_the_library_adapts_modules_like_its_own(dora):
    models = []
    for library, base in ((peftfast, kinds.Linear), (peft, lora.Linear)):
        own = type("ProductLora", (base,), {})
        config = library.LoraConfig(target_modules=["0", "1"], init_lora_weights=False, use_dora=dora)
        config._register_custom_module({Product: own})
        net = seeded(lambda: nn.Sequential(nn.Linear(6, 6), Product()))
        if dora:
            net[1].bias = None  # PEFT's DoRA asks for one
        model = library.get_peft_model(net, config)
        assert isinstance(model.base_model.model[1], own) and not isinstance(model.base_model.model[0], own)
        models.append(model)
    oracle.copy_parameters(models[1], models[0])
    oracle.same_live_state(*models)
    torch.testing.assert_close(models[0](X), models[1](X))
    torch.testing.assert_close(models[0].merge_and_unload()(X), models[1].merge_and_unload()(X))


def test_a_class_derived_from_a_layer_of_the_library_is_made_as_in_peft():
    class Told(kinds.Linear):
        def __init__(self, base_layer, adapter_name, config=None, r=0, lora_alpha=0, **settings):
            super().__init__(base_layer, adapter_name, config=config, r=r, lora_alpha=lora_alpha, **settings)
            self.told = (adapter_name, config, r, lora_alpha)

    class Fills(kinds.Linear):
        def update_layer(self, adapter_name, *args, **settings):
            """What PEFT calls for every adapter."""

    config = peftfast.LoraConfig(target_modules=["0"], rank_pattern={"0": 3}, lora_alpha=5)
    config._register_custom_module({nn.Linear: Told})
    model = peftfast.get_peft_model(nn.Sequential(nn.Linear(6, 6)), config, adapter_name="one")
    assert model.base_model.model[0].told == ("one", config, 3, 5)
    config._register_custom_module({nn.Linear: Fills})
    net = nn.Sequential(nn.Linear(6, 6))
    with pytest.raises(TypeError, match="0: Fills has an update_layer, which nothing calls"):
        peftfast.get_peft_model(net, config)
    assert type(net[0]) is nn.Linear


@pytest.mark.parametrize(
    "kind, module, x, options",
    [
        ("Linear", nn.Linear(6, 5), torch.randn(2, 6), {}),
        ("Linear", nn.Linear(6, 5), torch.randn(2, 6), {"use_dora": True}),
        ("Linear", nn.Linear(6, 5), torch.randn(2, 6), {"use_rslora": True, "lora_bias": True}),
        ("Embedding", nn.Embedding(6, 5), torch.tensor([[1, 2, 5]]), {}),
        ("Conv2d", nn.Conv2d(6, 5, 3), torch.randn(2, 6, 4, 4), {}),
        ("ParamWrapper", nn.Linear(6, 5), torch.randn(2, 6), {"parameter_name": "weight"}),
    ],
)
def test_a_layer_made_alone_has_its_adapter(kind, module, x, options):
    """As Axolotl makes one for each weight that it merges."""
    names_parameter = {name: options[name] for name in options if name == "parameter_name"}
    made = {}
    for library, names in (
        (peft, importlib.import_module("peft.tuners.lora.layer")),
        (peftfast, OURS),
    ):
        fields = {name: options[name] for name in options if name not in names_parameter}
        config = library.LoraConfig(r=8, lora_alpha=2, init_lora_weights=False, **fields)
        made[library] = getattr(names, kind)(
            copy.deepcopy(module), adapter_name="a", config=config, r=2, lora_alpha=6, **names_parameter
        )
    theirs, ours = made.values()
    assert [(n, p.shape, p.requires_grad) for n, p in ours.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in theirs.named_parameters()
    ]
    oracle.copy_parameters(theirs, ours)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    close(ours(x), theirs(x))
    assert ours.scaling == theirs.scaling and ours.active_adapters == theirs.active_adapters == ["a"]
    ours.merge(adapter_names=["a"])
    theirs.merge(adapter_names=["a"])
    close(ours.get_base_layer().weight, theirs.get_base_layer().weight)


def test_changes_of_a_layer_made_alone_lie_as_the_factors_say():
    """Axolotl's base modules do not say that their stacks are [E, K, N], nor that their weights are transposed."""

    def alone(name, module, **settings):
        for library, names in ((peft, importlib.import_module("peft.tuners.lora.layer")), (peftfast, OURS)):
            config = library.LoraConfig(fan_in_fan_out=name == "Linear")
            yield getattr(names, name)(module, adapter_name="a", config=config, r=2, lora_alpha=6, **settings)

    def compare(layers, a, b):
        deltas = []
        for layer in layers:
            layer.lora_A["a"].weight.data, layer.lora_B["a"].weight.data = a, b
            deltas.append(layer.get_delta_weight("a"))
        torch.testing.assert_close(*deltas)

    stacks = nn.Module()
    stacks.weight = nn.Parameter(torch.randn(3, 8, 4))
    compare(alone("ParamWrapper", stacks, parameter_name="weight"), torch.randn(6, 8), torch.randn(4, 6))
    turned = nn.Linear(8, 4, bias=False)
    turned.weight.data = torch.randn(8, 4)
    compare(alone("Linear", turned), torch.randn(2, 8), torch.randn(4, 2))


def test_layers_are_told_apart_by_the_kind_of_their_module():
    net = nn.ModuleDict(
        {"Linear": nn.Linear(4, 4), "Embedding": nn.Embedding(5, 4), "Conv1d": nn.Conv1d(4, 4, 1),
         "Conv2d": nn.Conv2d(4, 4, 1), "Conv3d": nn.Conv3d(4, 4, 1)}
    )  # fmt: skip
    model = peftfast.get_peft_model(net, peftfast.LoraConfig(target_modules=list(net)))
    for name, layer in model.base_model.model.items():
        assert isinstance(layer, LoraLayer)
        assert [kind for kind in net if isinstance(layer, getattr(kinds, kind))] == [name]


def test_what_is_registered_is_checked():
    config = peftfast.LoraConfig(target_modules=["lstm"])
    with pytest.raises(TypeError, match="maps classes of modules to classes of layers"):
        config._register_custom_module({"lstm": lstm_layer(LoraLayer)})
    config._register_custom_module({nn.LSTM: nn.LSTM})
    net = Net()
    with pytest.raises(TypeError, match="lstm: LSTM, which the config registers for LSTM"):
        peftfast.get_peft_model(net, config)
    assert isinstance(net.lstm, nn.LSTM)
    config._register_custom_module({nn.LSTM: lstm_layer(LoraLayer)})
    with pytest.warns(UserWarning, match="Unsupported layer type '<class 'torch.nn.modules.rnn.LSTM'>'"):
        peftfast.get_peft_model(net, config)
    assert "_custom_modules" not in config.to_dict()
