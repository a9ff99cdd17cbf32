"""An adapter for every sample of a batch: equal to the loop over samples, forward and gradients, for every method."""

from __future__ import annotations

import copy
import threading
import warnings

import oracle
import pytest
import torch
from torch import nn

import peftfast
from peftfast import AdaLoraConfig, IA3Config, LoraConfig
from peftfast.many import router
from peftfast.rows.control import RECOMPUTING, Control
from peftfast.rows.routing import Routing

BASE = "__base__"


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every adapter tensor away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.base_model.inventory.layers.values():
            for adapter in layer.adapters.values():
                for tensor in layer.trainable(adapter):
                    tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor) * 0.1)
    return model.eval()


def many(make=oracle.llama, dtype=torch.float32, configs=None, **options) -> nn.Module:
    """A model with three adapters "one", "two", "three" of different ranks, scalings and targets."""
    configs = configs or [
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "embed_tokens"]),
        LoraConfig(r=8, lora_alpha=3, target_modules=["q_proj", "down_proj"], use_rslora=True),
        LoraConfig(r=1, lora_alpha=1, target_modules="all-linear"),
    ]
    model = make(**options).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peftfast.get_peft_model(model, configs[0], "one")
        for name, config in zip(("two", "three"), configs[1:], strict=True):
            model.add_adapter(name, config)
    return randomised(model)


def alone(model: nn.Module, name: str, i: int, batch: dict) -> torch.Tensor:
    """Sample i of the batch by itself, with `name` active the ordinary way."""
    batch = {k: v[i : i + 1] for k, v in batch.items()}
    if name == BASE:
        with model.disable_adapter():
            return oracle.logits(model, **batch)
    model.base_model.set_adapter(name, inference_mode=True)
    return oracle.logits(model, **batch)


def loop(model: nn.Module, names: list[str], batch: dict) -> torch.Tensor:
    return torch.cat([alone(model, name, i, batch) for i, name in enumerate(names)])


def ways(model: nn.Module, names: list[str], batch: dict) -> list[torch.Tensor]:
    """The outputs of a mixed batch by names, by numbers that the host knows, and by numbers as on a GPU."""
    numbers = model.base_model.adapter_numbers(names)
    outputs = [oracle.logits(model, **batch, adapter_names=choice) for choice in (names, numbers)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Control, "routing", property(lambda control: control._local.routing))
        return [*outputs, oracle.logits(model, **batch, adapter_names=numbers)]


def grouped() -> nn.Module:
    model = oracle.net()
    model.conv1 = nn.Conv1d(24, 16, 3, padding=1, groups=2)
    return model


MIXES = {
    "one each": ["one", "two", "three"],
    "runs": ["two", "two", "one", "one", "three", "three"],
    "with base": ["one", BASE, "two", "one", BASE, "three"],
    "base in front": [BASE, BASE, "three", "one", "two"],
    "many of one": ["one", "two", *["one"] * 12, BASE, "two"],
    "uniform": ["two", "two"],
    "base only": [BASE, BASE],
}
CONV = ["embed", "conv1", "conv2", "conv3", "linear", "head"]
LORAS = {
    "llama": (oracle.llama, None),
    "gpt2": (
        oracle.gpt2,
        [
            LoraConfig(r=4, target_modules=["c_attn", "wte"], fan_in_fan_out=True),
            LoraConfig(r=2, target_modules=["c_fc", "c_attn"], fan_in_fan_out=True, lora_bias=True),
            LoraConfig(r=8, target_modules=["c_proj"], fan_in_fan_out=True),
        ],
    ),
    "conv": (
        oracle.net,
        [
            LoraConfig(r=4, target_modules=CONV),
            LoraConfig(r=2, target_modules=CONV[1:]),
            LoraConfig(r=8, target_modules=CONV[:4]),
        ],
    ),
    "grouped": (
        grouped,
        [
            LoraConfig(r=4, target_modules=CONV[:2]),
            LoraConfig(r=2, target_modules=["conv1", "linear"]),
            LoraConfig(r=8, target_modules=["conv1", "conv2"]),
        ],
    ),
}


@pytest.mark.parametrize("mix", MIXES, ids=lambda m: m.replace(" ", "-"))
@pytest.mark.parametrize("kind", LORAS)
def test_lora_equals_the_loop_in_fp64(kind, mix):
    make, configs = LORAS[kind]
    model = many(make, torch.float64, copy.deepcopy(configs))
    names = MIXES[mix]
    batch = oracle.inputs(model, batch=len(names))
    with torch.no_grad():
        expected = loop(model, names, batch)
        found = ways(model, names, batch)
        again = oracle.logits(model, **batch, adapter_names=names)  # from the kept stacks
    for got in found:
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[0], again)


@pytest.mark.parametrize("numbers", [False, True])
def test_samples_of_the_base_are_untouched_bit_for_bit(numbers):
    model = many()
    names = ["one", BASE, "three", BASE, "two", BASE]
    batch = oracle.inputs(model, batch=len(names))
    choice = model.base_model.adapter_numbers(names) if numbers else names
    with torch.no_grad():
        with model.disable_adapter():
            base = oracle.logits(model, **batch)
        got = oracle.logits(model, **batch, adapter_names=choice)
    where = [i for i, n in enumerate(names) if n == BASE]
    assert torch.equal(got[where], base[where])
    assert not torch.equal(got[0], base[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_error_is_no_larger_than_pefts(precision):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    twins = oracle.Twins(lambda: oracle.llama(hidden=64).to(dtype), {"r": 4, "target_modules": "all-linear"})
    for model, library in ((twins.ours, peftfast), (twins.theirs, twins.peft)):
        model.add_adapter("two", library.LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "up_proj"]))
    twins.copy()
    names = ["default", "two", BASE, "two", "default", "default"] * 4
    batch = oracle.inputs(twins.ours, batch=len(names))
    truth = copy.deepcopy(twins.theirs).double()
    with torch.no_grad():
        exact = {"logits": truth(**batch, adapter_names=names).logits}
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            oracle.assert_no_further(
                {"logits": twins.ours(**batch, adapter_names=names).logits},
                {"logits": twins.theirs(**batch, adapter_names=names).logits},
                exact,
            )


def train_loop(model: nn.Module, names: list[str], batch: dict, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients when every sample is run alone with its adapter."""
    model.zero_grad()
    for i, name in enumerate(names):
        own = {k: v[i : i + 1] for k, v in batch.items()}
        if name == BASE:
            continue
        model.base_model.set_adapter(name)
        (oracle.logits(model, **own) - target[i : i + 1]).pow(2).sum().backward()
    return oracle.gradients(model)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "conv", "grouped"])
def test_adapters_trained_in_one_batch_get_the_gradients_they_get_alone(kind, checkpointing):
    make, configs = LORAS[kind]
    if checkpointing and kind != "llama":
        pytest.skip("not a transformers model")
    model = many(make, torch.float64, copy.deepcopy(configs))
    model.train()
    names = ["one", "two", BASE, "one", "three", "three"]
    batch = oracle.inputs(model, batch=len(names))
    target = torch.randn(oracle.logits(model, **batch).shape, dtype=torch.float64)
    expected = train_loop(model, names, batch, target)
    model.base_model.set_requires_grad(["one", "two", "three"])
    model.base_model.inventory.set_adapter("two", inference_mode=True)  # what is active must not matter
    model.set_requires_grad(["one", "two", "three"])
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    (oracle.logits(model, **batch, adapter_names=names) - target).pow(2).sum().backward()
    got = oracle.gradients(model)
    assert got.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


def test_adapters_that_learn_nothing_beside_others_are_named_once():
    model = many()
    model.set_adapter("one")
    batch, names = oracle.inputs(model, batch=3), ["one", "two", BASE]
    silent = [["two", "three", BASE], model.base_model.adapter_numbers(names)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", peftfast.PeftWarning)
        oracle.logits(model.eval(), **batch, adapter_names=names)
        model.train()
        for choice in silent:
            oracle.logits(model, **batch, adapter_names=choice)
    with pytest.warns(peftfast.PeftWarning, match=r"'two' in training.*set_requires_grad\(\['two'\]\)"):
        oracle.logits(model, **batch, adapter_names=names)
    with warnings.catch_warnings():
        warnings.simplefilter("error", peftfast.PeftWarning)
        oracle.logits(model, **batch, adapter_names=names)
        model.set_requires_grad(["one", "three"])
        oracle.logits(model, **batch, adapter_names=["one", "three", BASE])
    model.delete_adapter("two")
    model.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.warns(peftfast.PeftWarning, match="'two' in training"):  # another one, of the same name
        oracle.logits(model.train(), **batch, adapter_names=names)
    assert len(model.base_model._said_frozen) == 1


def test_one_backward_through_two_mixes_is_refused_with_checkpointing():
    model = many()
    model.train()
    model.set_requires_grad(["one", "two", "three"])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = oracle.inputs(model, batch=2)
    losses = [oracle.logits(model, **batch, adapter_names=mix).sum() for mix in (["one", "two"], ["two", "three"])]
    with pytest.raises(RuntimeError, match="call backward for each batch"):
        (losses[0] + losses[1]).backward()
    oracle.logits(model, **batch, adapter_names=["one", "two"]).sum().backward()  # and nothing is left behind


@pytest.mark.parametrize("switched", [False, True])
def test_a_backward_pass_that_fails_leaves_nothing_behind(switched):
    """One that runs out of memory, say, and is tried again with another batch."""
    model = many()
    model.set_requires_grad(["one", "two"])
    batch = oracle.inputs(model, batch=2)
    handle = model.base_model.model.model.norm.weight.requires_grad_(True).register_hook(lambda grad: 1 / 0)
    if switched:  # of which layers that are run again would say so
        model.train().gradient_checkpointing_enable()
        logits = oracle.logits(model, **batch)
        model.set_adapter("two")
    else:
        logits = oracle.logits(model, **batch, adapter_names=["one", "two"])
    with pytest.raises(ZeroDivisionError):
        logits.sum().backward()
    assert RECOMPUTING
    handle.remove()
    del logits
    assert not RECOMPUTING


METHODS = {
    "dora": [LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "up_proj"])],
    "ia3": [IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])],
    "adalora": [AdaLoraConfig(init_r=4, total_step=10, target_modules=["q_proj", "down_proj"])],
    "lora with dora": [
        LoraConfig(r=4, target_modules=["q_proj", "up_proj"]),
        LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "v_proj"]),
        LoraConfig(r=3, lora_bias=True, target_modules=["q_proj", "up_proj"]),
    ],
}


@pytest.mark.parametrize("kind", METHODS)
def test_every_method_can_be_mixed(kind):
    configs = METHODS[kind]
    bias = kind == "lora with dora"
    model = many(oracle.llama, torch.float64, [copy.deepcopy(c) for c in (configs * 3)[:3]], bias=bias)
    names = ["three", BASE, "one", "two", "one", BASE]
    batch = oracle.inputs(model, batch=len(names))
    with torch.no_grad():
        expected = loop(model, names, batch)
        for got in ways(model, names, batch):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_saved_modules_and_token_rows_follow_their_sample():
    configs = [
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[3, 5, 11]),
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        LoraConfig(r=4, target_modules=["v_proj"], trainable_token_indices=[5, 20]),
    ]
    model = many(oracle.llama, torch.float64, configs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                parameter.add_(torch.randn_like(parameter))
    names = ["one", BASE, "two", "three", "one"]
    batch = oracle.inputs(model, batch=len(names))
    batch["input_ids"][:, 2:5] = torch.tensor([3, 5, 20])
    with torch.no_grad():
        active = oracle.logits(model, **batch)
        with model.disable_adapter():
            assert not torch.equal(oracle.logits(model, **batch), active)
        assert torch.equal(oracle.logits(model, **batch), active)
        expected = loop(model, names, batch)
        for got in ways(model, names, batch):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


class ReadsItsHead(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        return torch.nn.functional.linear(self.body(x), self.head.weight)


@pytest.mark.parametrize("numbers", [False, True])
def test_a_saved_module_that_is_read_is_that_of_the_samples(numbers):
    """Where all have one adapter, which need not be the active one."""
    config = LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"], init_lora_weights=False)
    model = peftfast.get_peft_model(ReadsItsHead(), config, "one").eval()
    model.add_adapter("two", config)
    x, expected = torch.randn(2, 8), {}
    with torch.no_grad():
        for copied in model.base_model.model.head.modules_to_save.values():
            torch.nn.init.normal_(copied.weight)
        with model.disable_adapter():
            expected[BASE] = model(x)
        for name in ("two", "one"):
            model.set_adapter(name)
            expected[name] = model(x)
        for name, logits in expected.items():
            names = [name, name]
            got = model(x, adapter_names=model.base_model.adapter_numbers(names) if numbers else names)
            torch.testing.assert_close(got, logits)


@pytest.mark.parametrize("make", [oracle.llama, oracle.t5])
@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {}])
def test_generation_with_an_adapter_for_each_prompt(make, how):
    targets = ["q", "v"] if make is oracle.t5 else ["q_proj", "v_proj"]
    model = many(make, torch.float64, [LoraConfig(r=r, target_modules=targets) for r in (2, 4, 8)])
    with torch.no_grad():  # far enough from the base for other tokens to win
        for layer in model.base_model.inventory.layers.values():
            for name in layer.scaling:
                layer.scaling[name] *= 20
    names = ["two", BASE, "one", "three"]
    ids = oracle.inputs(model, batch=len(names), length=6)["input_ids"]
    how = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, **how)
    got = model.generate(input_ids=ids, adapter_names=names, **how)
    each = got.shape[0] // len(names)
    for i, name in enumerate(names):
        if name == BASE:
            with model.disable_adapter():
                expected = model.generate(input_ids=ids[i : i + 1], **how)
        else:
            model.set_adapter(name)
            expected = model.generate(input_ids=ids[i : i + 1], **how)
        width = expected.shape[1]
        assert torch.equal(got[i * each : (i + 1) * each, :width], expected)


@pytest.mark.parametrize("names", [["one", "two", "three", BASE], ["one", "two", "three"], ["three", "one", "two"] * 2])
def test_the_same_mix_again_sees_every_change_of_an_adapter(names):
    model = many()
    batch = oracle.inputs(model, batch=len(names))
    layer = model.base_model.inventory.layers["model.layers.0.self_attn.q_proj"]
    other = nn.Parameter(torch.randn_like(layer.lora_A["one"].weight))

    def replaced_data():
        layer.lora_A["one"].weight.data = torch.randn_like(other)

    changes = [
        lambda: layer.lora_B["one"].weight.copy_(torch.randn_like(layer.lora_B["one"].weight)),
        lambda: layer.set_scale("one", 3.0),
        lambda: layer.scaling.__setitem__("one", 0.25),
        lambda: setattr(layer.lora_A["one"], "weight", other),
        replaced_data,
    ]
    with torch.no_grad():
        before = oracle.logits(model, **batch, adapter_names=names)
        for change in changes:
            change()
            got = oracle.logits(model, **batch, adapter_names=names)
            assert not torch.equal(got[names.index("one")], before[names.index("one")])
            torch.testing.assert_close(got, loop(model, names, batch), rtol=1e-5, atol=1e-5)
            before = got


def test_refusals_come_before_anything_is_computed():
    model = many()
    batch = oracle.inputs(model, batch=3)
    calls = []
    model.get_base_model().register_forward_pre_hook(lambda *_: calls.append(1))

    def refused(error, match, choice):
        with pytest.raises(error, match=match):
            model(**batch, adapter_names=choice)

    refused(ValueError, "should be the same as the number of inputs, but got 2 and 3", ["one", "two"])
    refused(ValueError, "non-existing adapter.s.: a.*Present: one", ["one", "a", "two"])
    refused(TypeError, "one adapter name for each sample", "one")
    refused(TypeError, "one adapter name for each sample", [0, 1, 2])
    refused(ValueError, "No adapter has the number 7", torch.tensor([0, 7, -1]))
    refused(TypeError, "one adapter number", torch.tensor([0.0, 1.0, 2.0]))
    with pytest.raises(TypeError, match=r"no adapter_name, got 'one'; adapter_names=\[...\]"):
        model(**batch, adapter_name="one")  # which transformers' models would take and not use
    number = model.base_model.adapter_numbers(["two"]).item()
    model.delete_adapter("two")
    refused(ValueError, "non-existing adapter.s.: two", ["one", "two", "one"])
    refused(ValueError, f"No adapter has the number {number}", torch.tensor([0, number, -1]))
    model.add_adapter("four", LoraConfig(r=2, target_modules=["q_proj"]))
    assert model.base_model.adapter_numbers(["four"]).item() not in (0, number)  # a number is never given twice
    model.merge_adapter()
    refused(ValueError, "Cannot pass `adapter_names` when there are merged adapters", ["one"] * 3)
    assert not calls


def test_deleting_an_adapter_moves_no_other_number():
    model = many()
    names = ["three", "one", BASE]
    batch = oracle.inputs(model, batch=3)
    numbers = model.base_model.adapter_numbers(names)
    with torch.no_grad():
        before = oracle.logits(model, **batch, adapter_names=numbers)
        model.delete_adapter("two")
        torch.testing.assert_close(oracle.logits(model, **batch, adapter_names=numbers), before)


def test_nothing_is_kept_of_numbers_of_adapters_that_have_gone():
    """By numbers that the host does not know, as on a GPU; a server goes through thousands of adapters."""
    model = many()
    inventory, batch = model.base_model.inventory, oracle.inputs(model, batch=2)
    kept = []
    for i in range(4):
        name = f"guest{i}"
        model.add_adapter(name, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        numbers = model.base_model.adapter_numbers([name, "one"])
        resolved = router.resolve(inventory, numbers, (), batch)
        unseen = Routing(resolved.names, resolved.index, None, tokens=batch["input_ids"].shape[1])
        with torch.no_grad():
            with inventory.control.use(unseen):
                got = oracle.logits(model, **batch)
            torch.testing.assert_close(got, loop(model, [name, "one"], batch), rtol=1e-5, atol=1e-5)
        model.delete_adapter(name)
        _, table = inventory.number_table(torch.device("cpu"))
        kept.append((len(table), sum(len(layer.store) for layer in inventory.layers.values())))
    assert kept[0] == kept[-1] and all(kept[0])


def test_adapters_come_and_go_while_another_thread_goes_through_their_numbers():
    model = many()
    seen = []
    for name, number in model.base_model.inventory.numbers.items():  # what a batch by number does meanwhile
        seen.append(number)
        model.add_adapter(f"after {name}", LoraConfig(r=2, target_modules=["q_proj"]))
        model.delete_adapter(name)
    assert seen == [0, 1, 2]
    names = ["after one", "after three", BASE]
    batch = oracle.inputs(model, batch=3)
    with torch.no_grad():
        by_name = oracle.logits(model, **batch, adapter_names=names)
        numbers = model.base_model.adapter_numbers(names)
        torch.testing.assert_close(oracle.logits(model, **batch, adapter_names=numbers), by_name)


def test_an_adapter_that_others_have_deleted_gets_a_number_of_its_own():
    """transformers and diffusers delete layer by layer, and the config."""
    model = many()
    for layer in model.base_model.inventory.layers.values():
        layer.delete_adapter("one")
    del model.peft_config["one"]
    model.add_adapter("one", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    names, batch = ["two", "one", BASE], oracle.inputs(model, batch=3)
    numbers = model.base_model.adapter_numbers(names)
    routing = router.resolve(model.base_model.inventory, numbers, (), batch)
    assert [routing.names[i] if i >= 0 else BASE for i in routing.index] == names


def test_disabling_wins_over_names():
    model = many()
    batch = oracle.inputs(model, batch=2)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(oracle.logits(model, **batch, adapter_names=["one", "two"]), oracle.logits(model, **batch))


def test_threads_do_not_see_each_others_mixes():
    model = many()
    pool = ["one", "two", "three", BASE]
    batch = oracle.inputs(model, batch=4)
    mixes = [[pool[(i * j + i) % 4] for j in range(4)] for i in range(8)]
    with torch.no_grad():
        expected = [oracle.logits(model, **batch, adapter_names=mix) for mix in mixes]
    barrier = threading.Barrier(8)

    def serve(i: int) -> None:
        barrier.wait()
        with torch.no_grad():
            for _ in range(10):
                assert torch.equal(oracle.logits(model, **batch, adapter_names=mixes[i]), expected[i])

    oracle.at_once(serve, range(8))


def test_copies_and_pickles_route_on_their_own():
    import io

    model = many()
    batch = oracle.inputs(model, batch=2)
    names = ["one", "three"]
    with torch.no_grad():
        expected = oracle.logits(model, **batch, adapter_names=names)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            model.eval()
            assert torch.equal(oracle.logits(other, **batch, adapter_names=names), expected)
            assert len({id(layer.control) for layer in other.base_model.inventory.layers.values()}) == 1


# ---- routers ---------------------------------------------------------------------------------------------------------
class ByFirstToken(peftfast.Router):
    def choose(self, inputs):
        return [("one", "two", "three", BASE)[int(t) % 4] for t in inputs["input_ids"][:, 0]]


def test_a_router_chooses_from_the_inputs():
    model = many()
    batch = oracle.inputs(model, batch=6)
    names = ByFirstToken().choose(batch)
    assert len(set(names)) > 1
    with torch.no_grad():
        expected = oracle.logits(model, **batch, adapter_names=names)
        active = oracle.logits(model, **batch)
        model.set_router(ByFirstToken())
        assert torch.equal(oracle.logits(model, **batch), expected)
        assert torch.equal(model(batch["input_ids"]).logits, expected)  # by position as well
        given = ["one"] * 6
        assert torch.equal(
            oracle.logits(model, **batch, adapter_names=given),
            torch.cat([oracle.logits(model, **batch, adapter_names=given)]),
        )
        how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        generated = model.generate(**batch, **how)
        model.set_router(lambda inputs: None)
        assert torch.equal(oracle.logits(model, **batch), active)
        model.set_router(None)
        assert torch.equal(model.generate(**batch, adapter_names=names, **how), generated)
    with pytest.raises(TypeError, match="Router"):
        model.set_router("one")


VOCABULARY = 500
NAMED = ["two", "one", BASE, "two", "three", "two"]


def embedding(**options) -> nn.Module:
    configs = [LoraConfig(r=r, lora_alpha=8, target_modules=["0"]) for r in (4, 2, 8)]
    return many(lambda: nn.Sequential(nn.Embedding(VOCABULARY, 8, **options)), configs=configs)


@pytest.mark.parametrize("names", [NAMED, ["one", "two", "three"] * 2, ["one", "three"]], ids=" ".join)
def test_tables_are_not_copied_for_the_rows_that_are_looked_up(names):
    model, ids = embedding(), torch.arange(2 * len(names)).view(len(names), 2)
    with torch.no_grad():
        model(ids, adapter_names=names)  # stacks the adapters
        with oracle.Operations() as seen:
            model(ids, adapter_names=names)
    assert 0 < seen.elements < VOCABULARY


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}], ids=str)
def test_gradients_of_tables(options):
    model, ids = embedding(**options), torch.tensor([[3, 4], [9, 3], [3, 5], [7, 7], [4, 3], [0, 499]])
    each = []
    for name, sample in zip(NAMED, ids.split(1), strict=True):
        if name == BASE:
            with model.disable_adapter():
                each.append(model(sample))
        else:
            model.set_adapter(name)
            each.append(model(sample))
    model.set_requires_grad(["one", "two", "three"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    outs = [model(ids, adapter_names=NAMED), torch.cat(each)]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*[torch.autograd.grad(out.sin().sum(), parameters) for out in outs])
