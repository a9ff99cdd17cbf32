"""VeLoRA: outputs, gradients and what is kept for them, next to PEFT's and an fp64 oracle; all else is a LoRA's."""

from __future__ import annotations

import copy
import pickle

import oracle
import peft
import pytest
import torch
import torch.nn.functional as F
from methods import bases
from methods.bases import K, N, make_base
from oracle import (
    descend,
    llama,
    logits,
    quietly,
    same_files,
    same_gradients_checkpointed,
    same_gradients_compiled,
    same_live_state,
)  # fmt: skip

import peftfast

TARGETS = ["q_proj", "v_proj", "down_proj"]


def options(library, target_modules=TARGETS, r=4, dropout=0.0, **velora):
    return library.LoraConfig(
        r=r, lora_alpha=8, target_modules=target_modules, init_lora_weights=False, lora_dropout=dropout,
        velora_config=library.VeloraConfig(**{"num_groups": 8, **velora}),
    )  # fmt: skip


def one(library, kind="linear", storage="fp32", **changes):
    torch.manual_seed(1)
    return quietly(library.get_peft_model, make_base(kind, storage), options(library, ["m"], **changes)).train()


def adapted(library=peftfast, make=llama, **changes):
    torch.manual_seed(1)
    return quietly(library.get_peft_model, make(), options(library, **changes))


def make_input(storage="fp32", rows=(4, 32)):
    return bases.make_input(storage=storage, rows=rows) + 0.3


def run(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype))
    layer = model.base_model.model.m
    return {
        "y": y.detach(), "x": x.grad, "a": layer.lora_A["default"].weight.grad, "b": layer.lora_B["default"].weight.grad
    }  # fmt: skip


def exact(model, x, init_type, scale=1.0, groups=8):
    """In fp64, by the formulas of the paper, on the dequantised weight."""
    layer = model.base_model.model.m
    a, b = (layer.adapters["default"][slot].detach().double() for slot in ("lora_A", "lora_B"))
    weight, bias = layer.site.weight.dense(torch.float64), layer.base_layer.bias.detach().double()
    rows, s = x.double().reshape(-1, K), layer.scaling["default"]
    dy = torch.randn((*x.shape[:-1], N), generator=torch.Generator().manual_seed(9)).to(x.dtype).double()
    dy = dy.reshape(-1, N)
    size = -(-K // groups)
    parts = F.pad(rows, (0, size * groups - K)).view(len(rows), groups, size)
    e = parts.mean((0, 1))
    e = layer.lora_velora_embed["default"].double() if init_type == "random" else e / e.norm()
    restored = ((parts @ e).unsqueeze(2) * e).flatten(1)[:, :K] * scale
    return {
        "y": (rows @ (weight + s * b @ a).t() + bias).view(*x.shape[:-1], N),
        "x": (dy @ (weight + s * b @ a)).view(x.shape),
        "a": s * (dy @ b).t() @ restored,
        "b": s * dy.t() @ (rows @ a.t()),
    }


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("storage", ["fp32", "bf16", "nf4", "int8"])
@pytest.mark.parametrize(
    ("init_type", "groups"), [("batch_average", 8), ("batch_average", 7), ("batch_average_once", 8), ("random", 5)]
)
def test_gradients_are_no_further_from_the_oracle_than_pefts(storage, init_type, groups, large, request):
    if large:
        request.getfixturevalue("large_products")
    changes = {"init_type": init_type, "num_groups": groups, "scale": 0.5}
    model, x = one(peftfast, storage=storage, **changes), make_input(storage)
    own, truth = run(model, x), exact(model, x, init_type, 0.5, groups)
    if storage in ("fp32", "bf16"):  # PEFT refuses packed weights
        theirs = one(peft, storage=storage, **changes)
        mine, other = (m.base_model.model.m.lora_A["default"].weight for m in (model, theirs))
        assert torch.equal(mine, other)
        peers = run(theirs, x)
        for key, value in own.items():
            mine, other = (float((v.double() - truth[key]).norm() / truth[key].norm()) for v in (value, peers[key]))
            assert mine <= 1.15 * other + 5e-7, (key, mine, other)
    else:  # LLM.int8 rounds the input of the base product
        limit = {"nf4": 1e-4, "int8": 2e-2}[storage]
        for key, value in own.items():
            assert (value.double() - truth[key]).norm() <= limit * truth[key].norm(), key


def test_a_deleted_adapter_takes_its_direction_along():
    model = adapted()
    model.add_adapter("other", options(peftfast))
    model.delete_adapter("default")
    names = [name for name, _ in (*model.named_buffers(), *model.named_parameters())]
    assert any(name.endswith("lora_velora_embed.other") for name in names)
    assert not any("default" in name for name in names)


@pytest.mark.parametrize("large", [False, True])
def test_a_bias_of_the_up_factor_acts_in_training(large, request):
    if large:
        request.getfixturevalue("large_products")
    config = options(peftfast, ["m"])
    config.lora_bias = True
    model, x = peftfast.get_peft_model(make_base(), config), make_input()
    model.base_model.model.m.lora_B["default"].bias.data.normal_()
    y = model.eval()(x)
    torch.testing.assert_close(model.train()(x), y)


def test_dropout_compresses_what_was_dropped(large_products):
    """The kept numbers are of drop(x): with a direction for each feature the gradient is LoRA's own."""
    changes = {"dropout": 0.4, "init_type": "random", "num_groups": K}
    model = one(peftfast, **changes)
    torch.manual_seed(1)
    lora = peftfast.LoraConfig(r=4, lora_alpha=8, target_modules=["m"], init_lora_weights=False, lora_dropout=0.4)
    plain = peftfast.get_peft_model(make_base(), lora).train()
    results = []
    for other in (model, plain):
        torch.manual_seed(3)
        results.append(run(other, make_input()))
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-4, atol=1e-4)


def test_small_dropout_is_pefts():
    results = []
    for library in (peft, peftfast):
        model = one(library, dropout=0.4)
        torch.manual_seed(3)
        results.append(run(model, make_input()))
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-4, atol=1e-4)


def kept(model, x):
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    lasting = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    count = sum(s.nbytes() for p, s in storages.items() if p not in lasting)
    y.sum().backward()
    return count


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_kept_for_backward(storage, dropout, large_products):
    x = make_input(storage, (512,)).requires_grad_()
    bytes_ = {}
    for library in (peft, peftfast):
        model = one(library, storage=storage, dropout=dropout)
        bytes_[library] = kept(model, x.detach().requires_grad_())
    print({lib.__name__: n for lib, n in bytes_.items()})
    assert bytes_[peftfast] <= bytes_[peft] + 64
    assert bytes_[peftfast] <= 512 * (8 + 4) * 4 + 256  # eight groups and four ranks
    assert bytes_[peftfast] < x.nbytes


@pytest.mark.parametrize("init_type", ["batch_average", "batch_average_once", "random"])
def test_training_is_pefts_and_goes_on_from_files(init_type, tmp_path):
    losses, models = [], []
    for library in (peftfast, peft):
        model = adapted(library, init_type=init_type).train()
        if library is peft:
            same_live_state(models[0], model)
        losses.append(train(model))
        models.append(model)
        model.save_pretrained(tmp_path / library.__name__)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    state, other = (m.state_dict() for m in models)
    for key, value in state.items():
        torch.testing.assert_close(value, other[key], rtol=1e-3, atol=1e-4)
    oracle.copy_parameters(*models[::-1])
    for ours, theirs in zip(models[0].buffers(), models[1].buffers(), strict=True):
        ours.data.copy_(theirs)
    for library, model in zip((peftfast, peft), models, strict=True):
        model.save_pretrained(tmp_path / library.__name__)
    same_files(tmp_path / "peftfast", tmp_path / "peft", without=r"$^")
    again = peftfast.PeftModel.from_pretrained(llama(), tmp_path / "peft", is_trainable=True).train()
    embed = {n: b.clone() for n, b in again.named_buffers() if "velora" in n}
    assert embed and all(bool(b.any()) for b in embed.values())
    if init_type != "batch_average":  # training goes on with what was saved; PEFT forgets it
        train(again)
        assert all(torch.equal(b, embed[n]) for n, b in again.named_buffers() if "velora" in n)
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "peftfast").eval()
        torch.testing.assert_close(logits(loaded), logits(models[0].eval()), rtol=1e-4, atol=1e-4)


def train(model, steps=3):
    return descend(model, steps, torch.optim.SGD, 0.05)


def test_everything_else_is_a_loras(tmp_path):
    """Output, merging, rows, combining, pools, swapping, conversion, copies."""
    model = adapted().eval()
    plain = peftfast.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
    torch.manual_seed(1)
    lora = peftfast.get_peft_model(llama(), plain).eval()
    with torch.no_grad():
        expected = logits(lora)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(other), expected)
        model.add_adapter("second", options(peftfast))
        model.add_weighted_adapter(["default", "second"], [1.0, 0.5], "both", combination_type="cat")
        model.set_adapter("both")
        both = logits(model)
        model.base_model.set_adapter(["default", "both"])
        logits(model)
        ids = oracle.inputs(model)["input_ids"]
        mixed = model(input_ids=ids, adapter_names=["default", "both"]).logits
        torch.testing.assert_close(mixed, torch.stack([expected[0], both[1]]), rtol=1e-4, atol=1e-4)
        model.set_adapter("default")
        model.merge_adapter()
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        assert torch.equal(logits(model), expected)
        model.save_pretrained(tmp_path, selected_adapters=["default"])
        swapped = adapted(init_type="random").eval()
        with pytest.raises(ValueError, match="velora_config"):
            peftfast.hotswap_adapter(swapped, tmp_path, "default")
        peftfast.save_as_lora(tmp_path / "lora", model, rank=4)
        converted = peft.PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
        torch.testing.assert_close(logits(converted), expected, rtol=1e-3, atol=1e-3)
        pool = peftfast.AdapterPool(llama().eval(), slots=2, max_rank=4)
        pool.register("a", tmp_path)
        rows = pool(input_ids=ids, adapter_names=["a", "a"]).logits
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)
    assert peftfast.adapter_contents(tmp_path).lines["model.layers.0.self_attn.q_proj"].startswith("rank 4, change of")


def test_mixed_rows_train():
    """Every adapter gets the compressed gradient of its own rows."""
    model = adapted().train()
    model.add_adapter("second", options(peftfast))
    model.set_requires_grad("second")
    ids = oracle.inputs(model)["input_ids"]
    model(input_ids=ids, adapter_names=["default", "second"]).logits.sum().backward()
    own = oracle.gradients(model)
    for row, name in enumerate(("default", "second")):
        model.zero_grad()
        model.set_adapter(name)
        model(input_ids=ids[row : row + 1]).logits.sum().backward()
        for key, parameter in model.named_parameters():
            if f".{name}" in key and "lora_" in key:
                torch.testing.assert_close(own[key], parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    same_gradients_checkpointed(adapted(dropout=0.3).train(), reentrant)


@pytest.mark.parametrize("init_type", ["batch_average", "random"])
def test_compiled_is_eager(init_type):
    model = adapted(init_type=init_type).train()
    train(model, 1)
    same_gradients_compiled(model)


def test_autocast_and_two_active():
    x, errors = make_input(), []
    for library in (peftfast, peft):
        model = one(library)
        torch.manual_seed(4)
        quietly(model.add_adapter, "second", options(library, ["m"], num_groups=4))
        model.base_model.set_adapter(["default", "second"])
        exactly = run(copy.deepcopy(model), x)
        with torch.autocast("cpu", torch.bfloat16):
            own = run(model, x)
        errors.append({k: float((v.float() - exactly[k]).norm() / exactly[k].norm()) for k, v in own.items()})
        if library is peftfast:
            ours = exactly
    for key, value in exactly.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-4)
        assert errors[0][key] <= 1.15 * errors[1][key], errors


def test_hooks_on_the_factors_act():
    model = one(peftfast)
    model.base_model.model.m.lora_B["default"].register_forward_hook(lambda module, args, output: output * 0)
    own = run(model, make_input())
    torch.testing.assert_close(own["y"], model.base_model.model.m.base_layer(make_input()))
    assert not own["a"].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"velora_config": {"num_groups": 0}}, "num_groups"),
        ({"velora_config": {"scale": 0}}, "a finite number above 0"),
        ({"velora_config": {"init_type": "once"}}, "batch_average_once"),
        ({"target_modules": ["embed_tokens"]}, "VeLoRA is defined for linear layers, not for a Embedding"),
        ({"use_dora": True}, "use_dora, velora_config"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        config = {"target_modules": TARGETS, "velora_config": {}, **changes}
        config["velora_config"] = peftfast.VeloraConfig(**config["velora_config"])
        peftfast.get_peft_model(llama(), peftfast.LoraConfig(**config))


def test_servers_and_plan():
    plan = peftfast.plan_adapter(llama(), options(peftfast))
    assert plan.trainable_parameters == adapted().get_nb_trainable_parameters()[0]
    assert {v.server: v.verdict for v in plan.servers}["vLLM"] == "refuses"


def test_a_conv1d(large_products):
    model, x = one(peftfast, "conv1d-hf"), make_input()
    own, truth = run(model, x), exact(model, x, "batch_average")
    for key, value in own.items():
        torch.testing.assert_close(value.double(), truth[key], rtol=1e-4, atol=1e-4)
