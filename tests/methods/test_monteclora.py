"""MonteCLoRA: the samples, outputs, gradients and losses that a seed gives in PEFT, and an fp64 oracle of the formulas;
in evaluation a LoRA."""

from __future__ import annotations

import copy
import pickle

import oracle
import peft
import pytest
import torch
from methods.bases import K, make_base, make_input
from oracle import descend, llama, logits, quietly, same_gradients_checkpointed, same_live_state
from torch.distributions import Dirichlet, MultivariateNormal, Wishart, kl_divergence

import peftfast
from peftfast.helpers import MontecloraTrainerMixin
from peftfast.methods.lora.monteclora import SAMPLER, MontecloraSampler
from peftfast.methods.random_stream import NormalSlices

TARGETS = ["q_proj", "v_proj", "down_proj"]


def options(library, target_modules=TARGETS, r=4, dropout=0.0, **monte):
    monte = {"num_samples": 3, "buffer_size": 2, "sample_scaler": 0.5, **monte}
    return library.LoraConfig(
        r=r, lora_alpha=8, target_modules=target_modules, init_lora_weights=False, lora_dropout=dropout,
        monteclora_config=library.MontecloraConfig(**monte),
    )  # fmt: skip


def adapted(library=peftfast, make=llama, **changes):
    torch.manual_seed(1)
    return quietly(library.get_peft_model, make(), options(library, **changes))


def one(library, kind="linear", storage="fp32", **changes):
    torch.manual_seed(1)
    return quietly(library.get_peft_model, make_base(kind, storage), options(library, ["m"], **changes)).train()


def run(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)).sum().backward()
    found = {"y": y.detach(), "x": x.grad}
    return found | {n.partition(".m.")[2]: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def exact(model, x, draw):
    """The formulas in fp64 with autograd, all samples made."""
    layer = model.base_model.model.m
    z, wishart, normals = draw.again().double(), draw.wishart.double(), draw.dirichlet.double()
    slots = {k: p.detach().double().requires_grad_() for k, p in layer.adapters["default"].parameters().items()}
    sigma, omega = slots[f"{SAMPLER}.std_prior"], slots[f"{SAMPLER}.expert_weights_prior"]
    v = (sigma.exp() * wishart * sigma.exp()).clamp(min=1e-3)
    alpha, count = omega.exp(), len(omega)
    covariance = torch.diag((1 - 2 / count) / alpha + (1 / alpha).sum() / count**2 + 1e-6)
    w = torch.softmax(torch.linalg.cholesky(covariance) @ normals + alpha.log() - alpha.log().mean(), 0)
    a = torch.einsum("n,nkr->rk", w, slots["lora_A"].t() + 0.5 * z @ torch.linalg.cholesky(torch.diag(v)))
    weight, bias = layer.site.weight.dense(torch.float64), layer.base_layer.bias.detach().double()
    x = x.double().requires_grad_()
    y = x @ (weight + layer.scaling["default"] * slots["lora_B"] @ a).t() + bias
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(torch.float32)
    (y * dy.double()).sum().backward()
    found = {"y": y.detach(), "x": x.grad}
    for slot, tensor in slots.items():
        name, _, leaf = slot.partition(".")
        found[f"{name}.default.{leaf or 'weight'}"] = tensor.grad
    return found


@pytest.mark.parametrize("storage", ["fp32", "nf4", "int8"])
def test_outputs_and_gradients_are_no_further_from_the_oracle_than_pefts(storage):
    model, x = one(peftfast, storage=storage), make_input(storage=storage)
    own = run(model, x)
    truth = exact(model, x, model.base_model.model.m.lora_monteclora_sampler["default"]._last)
    assert own.keys() == truth.keys() and len(own) == 6
    errors = {k: float((v.double() - truth[k]).norm() / truth[k].norm()) for k, v in own.items()}
    if storage != "fp32":  # LLM.int8 rounds the input of the base product
        assert max(errors.values()) <= {"nf4": 1e-4, "int8": 2e-2}[storage], errors
        return
    peers = run(one(peft), x)
    for key, value in peers.items():
        other = float((value.double() - truth[key]).norm() / truth[key].norm())
        assert errors[key] <= 1.15 * other + 1e-6, (key, errors[key], other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_seed_gives_pefts_training(dtype):
    """Factors, samples beyond a refill of what is drawn ahead, dropout masks between them."""
    losses, models = [], []
    for library in (peftfast, peft):
        model = adapted(library, lambda: llama().to(dtype), dropout=0.2, sample_scaler=0.05).train()
        if library is peft:
            same_live_state(models[0], model)
        models.append(model)
        losses.append(descend(model, 5, torch.optim.SGD, 0.05))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if dtype == torch.float32 else 2e-2)
    if dtype == torch.float32:
        state, other = (m.state_dict() for m in models)
        assert state.keys() == other.keys()
        for key, value in state.items():
            torch.testing.assert_close(value, other[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 4, 4), (3, 5, 7)])
def test_slices_are_those_of_one_draw(dtype, shape, monkeypatch):
    monkeypatch.setattr(NormalSlices, "SMALL", 0)
    torch.manual_seed(3)
    whole, after = torch.randn(6, *shape, dtype=dtype), torch.rand(3)
    torch.manual_seed(3)
    slices = NormalSlices(6, shape, dtype)
    assert (slices.all is None) == (shape == (2, 4, 4))
    assert torch.equal(torch.rand(3), after)
    for i in range(6):
        if i == 3:
            slices = copy.deepcopy(pickle.loads(pickle.dumps(slices)))
        made, again = slices.take()
        assert torch.equal(made, whole[i]) and torch.equal(again(), whole[i])


def test_a_bias_of_the_up_factor_acts_in_training():
    config = options(peftfast, ["m"])
    config.lora_bias = True
    model, x, outputs = peftfast.get_peft_model(make_base(), config).train(), make_input(), []
    sampler, layer = copy.deepcopy(model.state_dict()), model.base_model.model.m
    bias = torch.randn(len(layer.lora_B["default"].bias))
    for value in (torch.zeros_like(bias), bias):
        model.load_state_dict(sampler)
        layer.lora_B["default"].bias.data.copy_(value)
        torch.manual_seed(4)
        outputs.append(copy.deepcopy(model)(x))
    torch.testing.assert_close(outputs[1] - outputs[0], (layer.scaling["default"] * bias).expand_as(outputs[0]))


def test_little_is_kept(monkeypatch):
    """PEFT keeps the samples of all calls ahead."""
    model = one(peftfast, buffer_size=150, r=16, num_samples=16)
    sampler = model.base_model.model.m.lora_monteclora_sampler["default"]
    monkeypatch.setattr(NormalSlices, "SMALL", 0)
    torch.manual_seed(4)
    sampler.prepare(torch.float32)
    kept = sampler._ahead.normal.state.nbytes + sampler._ahead.dirichlet.nbytes + sampler._ahead.wishart.nbytes
    assert kept < 30_000 < 150 * 16 * 16 * K * 4


@pytest.mark.parametrize("entropy", [False, True])
def test_loss(entropy):
    """The divergences of torch.distributions; PEFT's but for the sign of a part of Dirichlet's."""
    values, gradients = [], []
    for library in (peftfast, peft):
        model = one(library, use_entropy=entropy, kl_loss_weight=0.1, dirichlet_prior=0.7)
        model(make_input())
        loss = model._get_monteclora_loss()
        loss.backward()
        sampler = model.base_model.model.m.lora_monteclora_sampler["default"]
        values.append(float(loss.detach()))
        gradients.append((sampler.std_prior.grad, sampler.expert_weights_prior.grad, sampler))
    _, _, sampler = gradients[0]
    alpha = sampler.expert_weights_prior.double().exp().detach().requires_grad_()
    prior = torch.full((3,), 0.7, dtype=torch.float64)
    eye, std = torch.eye(4, dtype=torch.float64), sampler.std_prior.detach().double().exp()
    v = sampler.gaussian_var_prior.double()
    truth = kl_divergence(Dirichlet(alpha), Dirichlet(prior))
    normal = kl_divergence(MultivariateNormal(eye[0] * 0, v), MultivariateNormal(eye[0] * 0, eye))
    four = torch.tensor(4.0, dtype=torch.float64)
    spread = kl_divergence(Wishart(four, covariance_matrix=torch.diag(std**2)), Wishart(four, covariance_matrix=eye))
    whole = 0.1 * (truth + spread + 3 * normal) + (sampler.expert_weights.double() ** 2).sum() * entropy
    assert values[0] == pytest.approx(float(whole), rel=1e-5)
    wrong = 2 * (alpha.lgamma().sum() - prior.lgamma().sum())
    assert values[1] == pytest.approx(float(whole + 0.1 * wrong), rel=1e-5)
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=1e-4, atol=1e-6)
    (difference,) = torch.autograd.grad(0.1 * wrong, alpha)
    found = gradients[1][1].double() - gradients[0][1].double()
    torch.testing.assert_close(found, difference * alpha.detach(), rtol=1e-3, atol=1e-6)


def test_loss_of_many_samples_is_finite_and_of_adapters_by_name():
    model = one(peftfast, num_samples=64)
    model(make_input())
    assert torch.isfinite(model._get_monteclora_loss())
    theirs = one(peft, num_samples=64)
    theirs(make_input())
    assert not torch.isfinite(theirs._get_monteclora_loss())  # if this fails, PEFT has caught up
    quietly(model.add_adapter, "second", options(peftfast, ["m"]))
    both = [float(model._get_monteclora_loss(n)) for n in ("default", "second")]
    mean = float(model._get_monteclora_loss(["default", "second"]))
    assert mean == pytest.approx(sum(both) / 2) and both[0] != both[1]
    assert model.eval()._get_monteclora_loss() == 0.0
    plain = peftfast.get_peft_model(llama(), peftfast.LoraConfig(target_modules=TARGETS))
    assert plain._get_monteclora_loss() == 0.0


def test_trainer_mixin():
    class Trainer:
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(inputs)
            loss = 0 * outputs.sum()  # beside which what is added can be seen
            return (loss, outputs) if return_outputs else loss

    class Both(MontecloraTrainerMixin, Trainer):
        pass

    model, x = one(peftfast), make_input()
    loss, outputs = Both().compute_loss(model, x, return_outputs=True)
    torch.testing.assert_close(loss, model._get_monteclora_loss())
    assert outputs.shape == model(x).shape and loss != 0
    two = torch.nn.ModuleList([model, one(peftfast, r=2)])
    two.forward = lambda x: torch.stack([model(x) for model in two])
    loss = Both().compute_loss(two, x)
    terms = [model._get_monteclora_loss() for model in two]
    assert abs(terms[0] - terms[1]) > 0.01 * abs(terms[0])
    torch.testing.assert_close(loss, (terms[0] + terms[1]) / 2)
    assert Both().compute_loss(model.eval(), x) == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_the_samples(reentrant):
    """PEFT takes the next ones, and so a gradient of something else."""
    same_gradients_checkpointed(adapted(dropout=0.1).train(), reentrant)


def test_files_both_ways(tmp_path):
    ours, theirs = adapted(), adapted(peft)
    for name, model in (("ours", ours), ("theirs", theirs)):
        logits(model.train())
        model.eval().save_pretrained(tmp_path / name)
    mine, other = (oracle.load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs"))
    assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {k: (v.shape, v.dtype) for k, v in other.items()}
    for key, value in mine.items():
        torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-5)
    assert oracle.saved_config(tmp_path / "ours") == oracle.saved_config(tmp_path / "theirs")
    with torch.no_grad():
        expected = logits(ours)
        for library, folder in ((peftfast, "theirs"), (peft, "ours")):
            loaded = library.PeftModel.from_pretrained(llama(), tmp_path / folder).eval()
            torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
        low = peftfast.PeftModel.from_pretrained(llama(), tmp_path / "ours", low_cpu_mem_usage=True)
        tensors = dict(low.state_dict())
        for key, value in ours.state_dict().items():
            assert torch.equal(tensors[key], value), key
        assert not any(isinstance(b, torch.nn.Parameter) for b in low.buffers())
    logits(low.train())


def test_in_evaluation_everything_is_a_loras(tmp_path):
    model = adapted().eval()
    torch.manual_seed(1)
    with torch.no_grad():
        expected = logits(model)
        assert torch.equal(logits(model), expected)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(other), expected)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        assert torch.equal(logits(model), expected)
        model.save_pretrained(tmp_path)
        model.add_adapter("second", options(peftfast))
        model.add_weighted_adapter(["default", "second"], [1.0, 0.5], "both", combination_type="cat")
        model.set_adapter("both")
        both, ids = logits(model), oracle.inputs(model)["input_ids"]
        mixed = model(input_ids=ids, adapter_names=["default", "both"]).logits
        torch.testing.assert_close(mixed, torch.stack([expected[0], both[1]]), rtol=1e-4, atol=1e-4)
        other = adapted().eval()
        for parameter in other.parameters():
            parameter.mul_(1.0 if not parameter.requires_grad else 0.5)
        peftfast.hotswap_adapter(other, tmp_path, "default")
        torch.testing.assert_close(logits(other), expected, rtol=1e-4, atol=1e-4)
        peftfast.save_as_lora(tmp_path / "lora", other, rank=4)
        converted = peft.PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
        torch.testing.assert_close(logits(converted), expected, rtol=1e-3, atol=1e-3)
        pool = peftfast.AdapterPool(llama().eval(), slots=2, max_rank=4)
        pool.register("a", tmp_path)
        torch.testing.assert_close(pool(input_ids=ids, adapter_names=["a", "a"]).logits, expected, rtol=1e-4, atol=1e-4)
    assert peftfast.adapter_contents(tmp_path).lines["model.layers.0.self_attn.q_proj"].startswith("rank 4, change of")


def test_copies_after_training_go_on_alike():
    """PEFT's cannot be copied then: its buffers are parts of a graph."""
    model, x = one(peftfast), make_input()
    model(x).sum().backward()
    torch.manual_seed(8)
    other = copy.deepcopy(model)
    first = [model(x) for _ in range(3)]
    torch.manual_seed(8)
    for expected, found in zip(first, [other(x) for _ in range(3)], strict=True):
        assert torch.equal(expected, found)
    with pytest.raises(RuntimeError, match="deepcopy"):
        theirs = one(peft)
        theirs(x).sum().backward()
        copy.deepcopy(theirs)


def test_rows_and_two_active_train():
    model = adapted().train()
    model.add_adapter("second", options(peftfast))
    model.set_requires_grad("second")
    ids = oracle.inputs(model)["input_ids"]
    model(input_ids=ids, adapter_names=["default", "second"]).logits.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
    results = []
    for library in (peftfast, peft):
        both = one(library)
        quietly(both.add_adapter, "second", options(library, ["m"]))
        both.base_model.set_adapter(["default", "second"])
        results.append(run(both, make_input()))
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-3, atol=1e-4)


def test_hooks_and_modules_in_place_of_the_factors():
    results = []
    for library in (peftfast, peft):
        model = one(library)
        model.base_model.model.m.lora_B["default"].register_forward_hook(lambda module, args, output: output * 2)
        results.append(run(model, make_input()))
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-3, atol=1e-4)


def test_autocast():
    x, errors = make_input(), []
    for library in (peftfast, peft):
        model = one(library)
        exactly = run(copy.deepcopy(model), x)
        with torch.autocast("cpu", torch.bfloat16):
            own = run(model, x)
        errors.append({k: float((v.float() - exactly[k]).norm() / exactly[k].norm()) for k, v in own.items()})
    for key, error in errors[0].items():
        assert error <= 1.15 * errors[1][key], (key, error, errors[1][key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_has_no_part_in_it(dtype):
    outputs, x = [], make_input()
    for default in (torch.float32, dtype):
        model = one(peftfast)
        torch.set_default_dtype(default)
        try:
            outputs.append([model(x) for _ in range(3)])  # of which the third draws anew
            adapted()
        finally:
            torch.set_default_dtype(torch.float32)
    for mine, right in zip(*outputs, strict=True):
        assert torch.equal(mine, right)


def test_weights_that_are_no_numbers():
    model, x = one(peftfast), make_input()
    with torch.no_grad():
        expected = model.eval()(x)
        model.base_model.model.m.lora_monteclora_sampler["default"].expert_weights_prior.fill_(float("nan"))
        with pytest.warns(UserWarning, match="sample weights are NaN"):
            torch.testing.assert_close(model.train()(x), expected)


def test_compiled_without_gradients_and_recorded():
    model, x = one(peftfast).eval(), make_input()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
    results = []
    for function in (lambda model: torch.compile(model, backend="aot_eager"), lambda model: model):  # in pieces
        trained = one(peftfast)
        results += [function(trained)(x).detach() for _ in range(4)]
    for compiled, eager in zip(results[:4], results[4:], strict=True):
        torch.testing.assert_close(compiled, eager)
    torch._dynamo.reset()
    tiny = adapted().train()
    ids = oracle.inputs(tiny)["input_ids"]
    with pytest.raises(ValueError, match="cannot be captured: MonteCLoRA draws new samples on the host"):
        peftfast.capture_training_step(tiny, {"input_ids": ids, "labels": ids})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"monteclora_config": {"num_samples": 0}}, "num_samples"),
        ({"monteclora_config": {"dirichlet_prior": 0}}, "a finite number above 0"),
        ({"monteclora_config": {"buffer_size": 0}}, "buffer_size"),
        ({"target_modules": ["embed_tokens"]}, "MonteCLoRA is defined for linear layers, not for a Embedding"),
        ({"use_dora": True}, "use_dora, monteclora_config"),
    ],
)
def test_refusals(changes, message):
    config = {"target_modules": TARGETS, "monteclora_config": {}, **changes}
    with pytest.raises(ValueError, match=message):
        config["monteclora_config"] = peftfast.MontecloraConfig(**config["monteclora_config"])
        peftfast.get_peft_model(llama(), peftfast.LoraConfig(**config))


def test_plan_names_and_repr():
    plan = peftfast.plan_adapter(llama(), options(peftfast))
    model = adapted()
    assert plan.trainable_parameters == model.get_nb_trainable_parameters()[0]
    assert {v.server: v.verdict for v in plan.servers}["llama.cpp"] == "refuses"
    assert sum(isinstance(m, MontecloraSampler) for m in model.modules()) == 6
