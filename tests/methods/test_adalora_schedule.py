"""AdaLoRA's schedule against PEFT's step by step, its automatic form, resuming, cutting, and what it costs."""

import copy
import functools
import pickle
import warnings

import huggingface_hub
import oracle
import peft
import pytest
import torch
import torch.distributed.checkpoint.state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter

import peftfast
from peftfast.ops.orthogonality import orthogonality

SCHEDULE = {"init_r": 5, "target_r": 2, "tinit": 3, "tfinal": 4, "total_step": 16, "lora_alpha": 8}
WAITS = {"_local_scalar_dense", "nonzero"}  # for a GPU, where it has one
OPTIONS = {**SCHEDULE, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def pair(**changes):
    """The same adapted model in PEFT and here, with the same factors."""
    options = {**OPTIONS, **changes}
    theirs = peft.get_peft_model(oracle.llama(), peft.AdaLoraConfig(**options))
    ours = peftfast.get_peft_model(oracle.llama(), peftfast.AdaLoraConfig(**options))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def batch(step, model):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, oracle.VOCABULARY, (2, 8), generator=generator)
    return {"input_ids": ids, "labels": ids}


def predicted(model):
    # with labels, PEFT's AdaLoRA cannot be run for inference: it looks for an adapter in training
    return model(input_ids=batch(50, model)["input_ids"]).logits


def train(model, steps, manual=False, first=1, optimizer=None, after=lambda step: None):
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=5e-2)
    losses = []
    for step in range(first, first + steps):
        loss = model(**batch(step, model)).loss
        loss.backward()
        optimizer.step()
        if manual:
            model.base_model.update_and_allocate(step)
        after(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer


def masks(model):
    return {n: (p != 0).view(-1).tolist() for n, p in model.named_parameters() if "lora_E" in n}


@pytest.mark.parametrize("manual", [True, False])
@pytest.mark.parametrize("delta", [1, 3])
def test_budgets_masks_and_scores_are_pefts_at_every_step(manual, delta):
    theirs, ours = pair(deltaT=delta, beta1=0.8, beta2=0.6)
    record = {"theirs": [], "ours": []}

    def note(name, allocator):
        def at(step):
            # the scores are cleared at the final allocation
            averages = (allocator().exp_avg_ipt, allocator().exp_avg_unc) if name == "theirs" else None
            if averages is None and allocator().sensitivity is not None:
                a = allocator()
                keys = [f"{x}.{s}" for s in ("lora_A", "lora_B", "lora_E") for x in (v.key for v in a.adapters)]
                averages = tuple(dict(zip(keys, t, strict=True)) for t in (a.sensitivity, a.uncertainty))
            model = theirs if name == "theirs" else ours
            clones = [{k.removesuffix(".default"): v.clone() for k, v in d.items()} for d in averages or ({}, {})]
            record[name].append((allocator().budget_schedule(step), masks(model), clones))

        return at

    their_losses, _ = train(theirs, 16, True, after=note("theirs", lambda: theirs.base_model.rankallocator))
    our_losses, _ = train(ours, 16, manual, after=note("ours", lambda: ours.base_model.rankallocator))
    torch.testing.assert_close(our_losses, their_losses, rtol=2e-4, atol=2e-4)
    for step, (their, our) in enumerate(zip(record["theirs"], record["ours"], strict=True), 1):
        assert our[0] == their[0], f"budget at step {step}"
        assert our[1] == their[1], f"masks at step {step}"
        for our_average, their_average in zip(our[2], their[2], strict=True):
            assert our_average.keys() == their_average.keys()
            for key, value in their_average.items():  # some are of 1e-6 and less
                torch.testing.assert_close(our_average[key], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))
    kept = {n.removesuffix(".default"): k for n, k in masks(ours).items()}
    assert sum(map(sum, kept.values())) == 2 * len(kept) < 5 * len(kept)
    assert (
        theirs.peft_config["default"].rank_pattern.values()
        and {k.removesuffix(".default"): v for k, v in theirs.peft_config["default"].rank_pattern.items()}
        == ours.peft_config["default"].rank_pattern
    )


def test_scores_are_pefts_when_the_factors_are():
    """One update on identical numbers: no drift from earlier steps."""
    theirs, ours = pair()
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            if "lora_" in name:
                p.grad = torch.randn(p.shape, generator=generator)
                p.data.copy_(torch.randn(p.shape, generator=generator))
                q.grad, q.data = p.grad.clone(), p.data.clone()
        theirs.base_model.update_and_allocate(1)
        ours.base_model.update_and_allocate(1)
    allocator, other = ours.base_model.rankallocator, theirs.base_model.rankallocator
    for slot, tensors in zip(("lora_A", "lora_B", "lora_E"), (0, 1, 2), strict=True):
        n = len(allocator.adapters)
        for i, adapter in enumerate(allocator.adapters):
            key = f"{adapter.key}.{slot}.default"
            torch.testing.assert_close(
                allocator.sensitivity[tensors * n + i], other.exp_avg_ipt[key], rtol=1e-6, atol=0
            )
            torch.testing.assert_close(
                allocator.uncertainty[tensors * n + i], other.exp_avg_unc[key], rtol=1e-5, atol=1e-9
            )


def test_second_derivatives_of_the_loss_term():
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(s, dtype=torch.float64, generator=generator) for s in ((3, 5), (3, 4), (6, 3), (4, 3))]
    factors = [p.requires_grad_() for p in pairs]
    assert torch.autograd.gradgradcheck(lambda *all: orthogonality(all[:2], all[2:]), factors, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_regulariser_of_factors_of_many_shapes(dtype):
    """Square ones of both sides among them; of half precision it is computed in fp32."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 4), (4, 6), (4, 6), (4, 4), (6, 4)]
    factors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    wide = [f.detach().double().requires_grad_() for f in factors]
    gaps = [p @ p.mT - torch.eye(4) for p in (*wide[:3], *(b.mT for b in wide[3:]))]
    results = orthogonality(factors[:3], factors[3:]), torch.stack([gap.norm() for gap in gaps]).mean()
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-5, atol=0)
    grads = [torch.autograd.grad(*pair) for pair in zip(results, (factors, wide), strict=True)]
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected.to(dtype))


def test_loss_term_and_its_gradients_are_no_further_from_the_oracle_than_pefts():
    theirs, ours = pair(orth_reg_weight=0.7)
    for model in (theirs, ours):
        for n, p in model.named_parameters():
            if "lora_" in n:
                with torch.no_grad():
                    generator = torch.Generator().manual_seed(len(n))
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    oracle_model = peft.get_peft_model(oracle.llama(), peft.AdaLoraConfig(**OPTIONS, orth_reg_weight=0.7)).double()
    oracle_model.load_state_dict({k: v.double() for k, v in theirs.state_dict().items()})
    losses = []
    for model in (theirs, ours, oracle_model):
        loss = model(**batch(1, model)).loss
        loss.backward()
        losses.append(loss.item())
    assert abs(losses[1] - losses[2]) <= 2 * abs(losses[0] - losses[2]) + 1e-6 * abs(losses[2])
    grads = [oracle.gradients(m) for m in (theirs, ours, oracle_model)]
    assert grads[0].keys() == grads[1].keys()
    errors = []
    for own in (grads[1], grads[0]):
        errors.append(sum(((own[n].double() - g).norm() / g.norm()) ** 2 for n, g in grads[2].items()) ** 0.5)
    assert errors[0] <= 1.5 * errors[1] + 1e-7, errors


def test_a_manual_call_after_the_first_automatic_one_does_not_count_twice():
    """Numbered from 0, as PEFT's documentation does, while the automatic schedule counts from 1."""
    theirs, ours = pair(tinit=0, deltaT=1)
    train(theirs, 8, True, first=0)
    train(ours, 8, True, first=0)
    assert masks(ours) == masks(theirs)
    assert ours.base_model.automatic is False
    assert ours.base_model.rankallocator.step == 7
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)


def test_a_manual_call_after_several_automatic_ones_takes_nothing_back():
    _, ours = pair()
    train(ours, 2)
    before = {n: p.detach().clone() for n, p in ours.named_parameters()}
    with pytest.warns(peftfast.PeftWarning, match="has run by itself for 2 steps"):
        ours.base_model.update_and_allocate(3)
    assert all(torch.equal(p, before[n]) for n, p in ours.named_parameters())


def test_a_manual_call_for_a_later_adapter_does_not_count_twice_either():
    """Whatever was trained before it, by the automatic schedule."""
    _, ours = pair()
    train(ours, 3)
    ours.add_adapter("later", peftfast.AdaLoraConfig(**{**OPTIONS, "tinit": 0, "deltaT": 1}))
    ours.set_adapter("later")
    with warnings.catch_warnings():
        warnings.simplefilter("error", peftfast.PeftWarning)
        train(ours, 2, True)
    allocator = ours.base_model.rankallocator
    assert allocator.step == 2 and [entry.step for entry in allocator.history] == [1, 2]


def test_gradient_accumulation_counts_updates_not_backward_passes():
    _, ours = pair()
    optimizer = torch.optim.SGD(trainable(ours), lr=0.1)
    for step in range(1, 5):
        for micro in range(3):
            ours(**batch(3 * step + micro, ours)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ours.base_model.rankallocator.step == 4


def test_an_optimizer_without_our_factors_is_left_alone():
    _, ours = pair()
    other = torch.nn.Linear(2, 2)
    ours(**batch(1, ours)).loss.backward()
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert ours.base_model.rankallocator.step == 0
    # and an evaluation in between is no step either
    ours.eval()
    ours(**batch(1, ours))
    assert ours.base_model.rankallocator.step == 0


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_does_not_count(fused):
    """A fused optimizer is called for it, and skips it inside."""
    _, ours = pair(tinit=0)
    optimizer = torch.optim.AdamW(trainable(ours), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(3):
        scaler.scale(ours(**batch(step, ours)).loss).backward()
        if step == 1:
            trainable(ours)[0].grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    allocator = ours.base_model.rankallocator
    assert allocator.step == 2
    assert all(t.isfinite().all() and t.max() < 1.0 for t in allocator.sensitivity)


class Inside(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


class Around(torch.optim.Optimizer):
    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        self.inner = torch.optim.SGD(self.param_groups[0]["params"][:3], lr=lr)

    def step(self, closure=None):
        self.inner.step(closure)


@pytest.mark.parametrize("optimizer", [Inside, Around])
def test_a_step_made_of_others_counts_once(optimizer):
    """Whatever optimizers the process has had: torch calls back for a base class's step from its first instance on."""
    _, ours = pair()
    torch.optim.SGD(trainable(ours), lr=0.1)
    train(ours, 3, optimizer=optimizer(trainable(ours), lr=0.1))
    assert ours.base_model.rankallocator.step == 3


def test_a_compiled_step_is_one_graph():
    _, ours = pair()
    torch._dynamo.reset()
    optimizer = torch.optim.SGD(trainable(ours), lr=0.1)
    counts = CompileCounter()
    optimizer.step = torch.compile(optimizer.step, backend=counts)
    train(ours, 4, optimizer=optimizer)
    assert ours.base_model.rankallocator.step == 4
    assert counts.frame_count == 1


def test_ranks_really_shrink_if_asked_to_and_training_goes_on():
    _, ours = pair()
    ours.base_model.shrink_after_final = True
    optimizer = torch.optim.AdamW(trainable(ours), lr=5e-2)
    before = {id(p) for p in trainable(ours)}
    seen = {}

    def note(step):
        if step == 12:  # total_step - tfinal
            seen["output"] = ours(**batch(99, ours)).logits.detach()
            seen["trained"] = ours.get_nb_trainable_parameters()[0]

    held = None
    for step in range(1, 17):
        loss = ours(**batch(step, ours)).loss
        loss.backward()
        optimizer.step()
        note(step)
        held = loss  # a loss that is still alive keeps autograd's bookkeeping of the old shapes
        if step != 12:
            optimizer.zero_grad()  # at 12 the gradients of the cut factors are accumulated into
    assert held is not None
    layers = ours.base_model.inventory.layers.values()
    ranks = [len(layer.lora_E["default"]) for layer in layers]
    assert sum(ranks) == 2 * len(ranks)
    for layer, rank in zip(layers, ranks, strict=True):
        assert layer.lora_A["default"].shape[0] == rank == layer.lora_B["default"].shape[1] == layer.r["default"]
        assert float(layer.ranknum["default"]) == 5.0 and not layer.ranknum["default"].requires_grad
        for p in (layer.lora_A["default"], layer.lora_B["default"], layer.lora_E["default"]):
            if p.numel():
                assert optimizer.state[p]["exp_avg"].shape == p.shape
    assert {id(p) for p in trainable(ours)} == before
    sizes = {tuple(p.shape) for p in trainable(ours)}
    assert seen["trained"] == sum(p.numel() for p in trainable(ours)), sizes


def test_a_model_in_fp64_computes_in_fp64():
    """The number of ranks that singular values are divided by included."""
    outputs = []
    for library in (peftfast, peft):
        model = library.get_peft_model(oracle.llama().double(), library.AdaLoraConfig(**OPTIONS)).eval()
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64))
            outputs.append(oracle.logits(model))
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)


def test_a_usual_call_is_that_of_a_lora_and_one_operation():
    x, counts = torch.randn(4, 16), []
    for config in (
        peftfast.LoraConfig(target_modules=["0"], r=3),
        peftfast.AdaLoraConfig(target_modules=["0"], **SCHEDULE),
    ):
        model = peftfast.get_peft_model(nn.Sequential(nn.Linear(16, 8)), config)
        model(x)
        with oracle.Operations() as seen:
            model(x)
        assert not WAITS & set(seen.names)
        counts.append(len(seen.names))
    lora, adalora = counts
    assert adalora == lora + 1


def test_the_first_rank_may_be_written_to_between_calls():
    model = peftfast.get_peft_model(
        nn.Sequential(nn.Linear(16, 8)), peftfast.AdaLoraConfig(target_modules=["0"], **SCHEDULE)
    )
    layer, x = model.base_model.model[0], torch.randn(4, 16)
    with torch.no_grad():
        layer.lora_E["default"].fill_(1.0)
        base, at_five = layer.base_layer(x), layer(x) - layer.base_layer(x)
        layer.ranknum["default"].fill_(10.0)
        torch.testing.assert_close(layer(x), base + at_five / 2)
        layer.ranknum["default"] = nn.Parameter(torch.full((1,), 20.0), requires_grad=False)
        torch.testing.assert_close(layer(x), base + at_five / 4)


@pytest.mark.parametrize("mixed", [False, True])
def test_there_is_no_schedule_where_no_adapter_is_trained(mixed):
    config = peftfast.LoraConfig(r=2) if mixed else peftfast.AdaLoraConfig(**OPTIONS, inference_mode=True)
    tuner = peftfast.get_peft_model(oracle.llama(), config, mixed=mixed).base_model
    assert not hasattr(tuner, "rankallocator")  # as in PEFT; what lists a model's attributes asks for it
    with pytest.raises(ValueError, match="No AdaLoRA adapter is being trained; active: .*default"):
        tuner.update_and_allocate(1)


def test_an_empty_rank_pattern_is_none():
    """As in PEFT; scripts that fill in every field of a LoRA give one."""
    theirs, ours = pair(rank_pattern={})
    train(theirs, 6, manual=True)
    train(ours, 6)
    assert masks(ours) == masks(theirs) and not all(map(all, masks(ours).values()))


def test_cutting_does_not_change_the_output():
    _, ours = pair()
    train(ours, 12)
    masked = ours(**batch(50, ours)).logits
    assert ours.base_model.shrink_ranks()
    torch.testing.assert_close(ours(**batch(50, ours)).logits, masked, rtol=1e-5, atol=1e-5)
    assert ours.base_model.shrink_ranks()  # again: nothing left to do


def test_optimizer_state_that_cannot_be_cut_leaves_the_ranks_masked():
    class Factored(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["row"] = torch.zeros(p.shape[0])
            super().step(closure)

    _, ours = pair()
    ours.base_model.shrink_after_final = True
    with pytest.warns(peftfast.PeftWarning, match="stay masked"):
        train(ours, 13, optimizer=Factored(trainable(ours), lr=0.1))
    shapes = {len(layer.lora_E["default"]) for layer in ours.base_model.inventory.layers.values()}
    assert shapes == {5}
    assert sum(map(sum, masks(ours).values())) == 2 * 6


def shapes(model):
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


def test_code_beside_the_training_sees_the_shapes_that_it_knows():
    """As in PEFT: an average of the weights, two optimizers, a state dict for a fresh model."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    _, ours = pair()
    before = shapes(ours)
    average = AveragedModel(ours, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    named = [(n, p) for n, p in ours.named_parameters() if p.requires_grad]
    optimizers = [
        torch.optim.AdamW([p for n, p in named if ("lora_B" in n) == up], lr=rate)
        for up, rate in ((False, 1e-2), (True, 3e-2))
    ]
    for step in range(1, 17):
        ours(**batch(step, ours)).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        average.update_parameters(ours)
    assert ours.base_model.rankallocator.finished and sum(map(sum, masks(ours).values())) == 2 * 6
    assert shapes(ours) == before
    fresh = peftfast.get_peft_model(oracle.llama(), peftfast.AdaLoraConfig(**OPTIONS))
    fresh.load_state_dict(ours.state_dict())
    torch.testing.assert_close(predicted(fresh.eval()), predicted(ours.eval()))
    assert torch.isfinite(predicted(average.module.eval())).all()


def test_one_of_two_optimizers_is_not_cut_without_the_other():
    _, ours = pair()
    ours.base_model.shrink_after_final = True
    before = shapes(ours)
    named = [(n, p) for n, p in ours.named_parameters() if p.requires_grad]
    parts = [[p for n, p in named if ("lora_B" in n) == up] for up in (False, True)]
    optimizers = [torch.optim.AdamW(part, lr=1e-2) for part in parts]

    def steps(numbers):
        for step in numbers:
            ours(**batch(step, ours)).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()

    with pytest.warns(peftfast.PeftWarning, match="stay masked.*6 of their 18 factors are not in this optimizer"):
        steps(range(1, 15))
    assert shapes(ours) == before
    steps([15, 16])


def test_gradients_that_are_gone_prune_nothing():
    """An optimizer for every parameter, stepped and cleared as soon as its gradient is there: importance cannot be
    known, and no importance must not be taken for none."""
    _, ours = pair()
    optimizers = {p: torch.optim.AdamW([p], lr=1e-2) for p in trainable(ours)}

    def update(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(update)
    with pytest.warns(peftfast.PeftWarning, match="AdaLoRA prunes nothing.*update_and_allocate") as caught:
        for step in range(1, 17):
            ours(**batch(step, ours)).loss.backward()
    assert len([w for w in caught if w.category is peftfast.PeftWarning]) == 1
    assert all(all(kept) for kept in masks(ours).values())


@pytest.mark.parametrize("damage", ["other modules", "no keep", "no rows", "flat rows"])
def test_a_schedule_of_another_adapter_is_refused(tmp_path, damage):
    _, ours = pair()
    train(ours, 14)
    ours.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adalora_state.safetensors")
    rows = "pruned.A.model.layers.0.mlp.down_proj"
    if damage == "other modules":
        _, other = pair(target_modules=["q_proj", "v_proj"])
        train(other, 14)
        other.save_pretrained(tmp_path / "other")
        state = load_file(tmp_path / "other" / "adalora_state.safetensors")
    elif damage == "flat rows":
        state[rows] = state[rows].flatten()
    else:
        del state["keep" if damage == "no keep" else rows]
    save_file(state, tmp_path / "adalora_state.safetensors")
    with pytest.raises(ValueError, match="does not fit this adapter: model.layers.0"):
        peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path, is_trainable=True)


@pytest.mark.parametrize("where", ["sub-folder", "hub"])
@pytest.mark.parametrize("existing", [True, False])
def test_the_schedule_is_found_wherever_the_adapter_is(where, existing, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # which for a file that is not there would be tried again and again, where there is no network
    downloaded, download = [], huggingface_hub.hf_hub_download

    @functools.wraps(download)
    def noted(repo_id, filename, **options):
        downloaded.append(filename)
        return download(repo_id, filename, **options)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", noted)
    _, ours = pair()
    train(ours, 14)
    place, options = tmp_path, {"subfolder": "checkpoint-14"}
    entry = tmp_path / "models--me--adapter"
    if where == "hub":
        place, options = "me/adapter", {"cache_dir": tmp_path, **options}
        (entry / "refs").mkdir(parents=True)
        (entry / "refs/main").write_text("0" * 40)
    folder = (entry / "snapshots" / ("0" * 40) if where == "hub" else tmp_path) / "checkpoint-14"
    ours.save_pretrained(folder)
    if existing:
        _, again = pair()
        again.load_adapter(place, "default", is_trainable=True, **options)
    else:
        again = peftfast.PeftModel.from_pretrained(oracle.llama(), place, is_trainable=True, **options)
    assert masks(again) == masks(ours) and "adalora_state.safetensors" not in downloaded
    again.save_pretrained(tmp_path / "again")
    left, right = (load_file(path / "adalora_state.safetensors") for path in (folder, tmp_path / "again"))
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_a_copy_of_the_model_saves_its_schedule(tmp_path):
    _, ours = pair()
    train(ours, 5)
    copy.deepcopy(ours).save_pretrained(tmp_path)
    assert load_file(tmp_path / "adalora_state.safetensors")["step"] == 5


@pytest.mark.parametrize("shrink", [True, False])
def test_files_go_both_ways_after_training(tmp_path, shrink):
    theirs, ours = pair()
    ours.base_model.shrink_after_final = shrink
    for first, steps in ((1, 6), (7, 8)):  # in mid-schedule into the same folder
        train(ours, steps, first=first)
        ours.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / "adalora_state.safetensors").exists() == (not shrink)  # what going on would need
    expected = ours.eval()(**batch(50, ours)).logits
    ranks = [len(v) for k, v in load_file(tmp_path / "ours" / "adapter_model.safetensors").items() if "lora_E" in k]
    assert sum(ranks) == 2 * 6
    for library, model in ((peft, oracle.llama()), (peftfast, oracle.llama())):
        loaded = library.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
        torch.testing.assert_close(predicted(loaded), expected, rtol=1e-5, atol=1e-5)
    train(theirs, 14, True)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs.eval()(**batch(50, theirs)).logits
    loaded = peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path / "theirs").eval()
    torch.testing.assert_close(loaded(**batch(50, loaded)).logits, expected, rtol=1e-5, atol=1e-5)
    config, peer = (peftfast.PeftConfig.from_pretrained(tmp_path / n) for n in ("ours", "theirs"))
    assert config.rank_pattern.keys() == peer.rank_pattern.keys()


def ranks(model):
    return [layer.r["default"] for layer in model.base_model.inventory.layers.values()]


@pytest.mark.parametrize("stop", [6, 14, 18])
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("shrink", [True, False])
def test_resuming_gives_the_run_that_was_not_interrupted(tmp_path, stop, existing, shrink):
    """In mid-schedule, after its final allocation and beyond total_step; into a new model or into an adapter that is
    already there (Trainer's way)."""
    torch.manual_seed(5)
    whole = peftfast.get_peft_model(oracle.llama(), peftfast.AdaLoraConfig(**OPTIONS))
    torch.manual_seed(5)
    first = peftfast.get_peft_model(oracle.llama(), peftfast.AdaLoraConfig(**OPTIONS))
    whole.base_model.shrink_after_final = first.base_model.shrink_after_final = shrink
    expected, _ = train(whole, 20)
    begun, optimizer = train(first, stop)
    first.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    assert (tmp_path / "adalora_state.safetensors").exists() == (stop < 12 or not shrink)
    if existing:
        second = peftfast.get_peft_model(oracle.llama(), peftfast.AdaLoraConfig(**OPTIONS))
        second.base_model.shrink_after_final = shrink
        train(second, 12)  # to other ranks
        second.load_adapter(tmp_path, "default", is_trainable=True)
    else:
        second = peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path, is_trainable=True)
    assert (second.peft_config["default"].rank_pattern is None) == (stop == 6)
    second.base_model.shrink_after_final = shrink
    optimizer = torch.optim.AdamW(trainable(second), lr=5e-2)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    resumed, _ = train(second, 20 - stop, first=stop + 1, optimizer=optimizer)
    assert begun + resumed == expected
    assert masks(second) == masks(whole)
    patterns = [model.peft_config["default"].rank_pattern for model in (second, whole)]
    if shrink:  # of cut ranks, a file only says how many there are
        patterns = [{name: sum(kept) for name, kept in pattern.items()} for pattern in patterns]
    assert patterns[0] == patterns[1] and ranks(second) == ranks(whole)
    final, other = (m.get_nb_trainable_parameters() for m in (whole, second))
    assert final == other


@pytest.mark.parametrize("how", ["load_adapter", "state dict"])
@pytest.mark.parametrize("shrink", [True, False])
def test_going_back_to_a_file_of_before_the_pruning(tmp_path, shrink, how):
    """As `load_best_model_at_end` does: what is saved then is what was loaded."""
    _, ours = pair()
    ours.base_model.shrink_after_final = shrink
    train(ours, 6)
    ours.save_pretrained(tmp_path / "early")
    train(ours, 8, first=7)
    if how == "load_adapter":
        ours.load_adapter(tmp_path / "early", "default")
    else:
        peftfast.set_peft_model_state_dict(ours, load_file(tmp_path / "early" / "adapter_model.safetensors"))
    ours.save_pretrained(tmp_path / "again")
    early, again = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("early", "again"))
    torch.testing.assert_close(again, early, rtol=0, atol=0)


@pytest.mark.parametrize("refused", ["broken values", "more ranks", "a factor is missing"])
def test_a_file_of_other_ranks_that_is_refused_changes_nothing(tmp_path, refused):
    _, ours = pair()
    _, first = pair(init_r=8 if refused == "more ranks" else 5)
    first.base_model.shrink_after_final = True
    train(first, 2 if refused == "more ranks" else 14)
    if refused == "broken values":
        name, parameter = next((n, p) for n, p in first.named_parameters() if "lora_A" in n and len(p))
        parameter.data.fill_(torch.nan)
    first.save_pretrained(tmp_path)
    if refused == "a factor is missing":
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        del tensors[next(name for name in tensors if "lora_A" in name)]
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    train(ours, 5)
    other = copy.deepcopy(ours)
    with pytest.raises(peftfast.AdapterLoadError, match="nothing was changed"):
        ours.load_adapter(tmp_path, "default", is_trainable=True)
    assert ours.peft_config == other.peft_config and ranks(ours) == ranks(other)
    assert train(ours, 11, first=6)[0] == train(other, 11, first=6)[0]
    assert masks(ours) == masks(other)


def drawn():
    torch.manual_seed(5)
    return pair()[1]


@pytest.mark.parametrize("stop", [2, 7, 13])
@pytest.mark.parametrize("how", ["torch.save", "safetensors", "distributed checkpoint"])
def test_state_dicts_carry_the_schedule(tmp_path, how, stop):
    """As Lightning, Accelerate and torch's own checkpoints save a training; PEFT's state dicts, without it, load."""
    model = drawn()
    train(model, 16)
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    model = drawn()
    _, optimizer = train(model, stop)
    saved, other = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, drawn()
    if how == "torch.save":
        torch.save(saved, tmp_path / "state.pt")
        saved = torch.load(tmp_path / "state.pt", weights_only=True)
    elif how == "safetensors":
        save_file(saved["model"], tmp_path / "model.safetensors")
        saved["model"] = load_file(tmp_path / "model.safetensors")
    else:
        torch.distributed.checkpoint.save(saved["model"], checkpoint_id=tmp_path, no_dist=True)
        saved["model"] = other.state_dict()
        torch.distributed.checkpoint.load(saved["model"], checkpoint_id=tmp_path, no_dist=True)
    schedule = saved["model"]["base_model._extra_state"].clone()
    other.load_state_dict(saved["model"])
    assert other.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern
    optimizer = torch.optim.AdamW(trainable(other), lr=5e-2)
    optimizer.load_state_dict(saved["optimizer"])
    train(other, 16 - stop, first=stop + 1, optimizer=optimizer)
    assert other.base_model.rankallocator.finished
    assert torch.equal(saved["model"]["base_model._extra_state"], schedule)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert model.load_state_dict(pair()[0].state_dict()).missing_keys == []


@pytest.mark.parametrize("steps", [7, 20])
def test_going_back_to_a_state_dict_takes_the_schedule_back(steps):
    """As a search for a learning rate does, and a training that starts anew after it."""
    model = drawn()
    train(model, 16)
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    model = drawn()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, steps)
    model.load_state_dict(start)
    assert model.base_model.history == [] and model.peft_config["default"].rank_pattern is None
    train(model, 16)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_steps_that_only_give_an_optimizer_its_state_do_not_count():
    """torch.distributed.checkpoint's, at a rate of zero without gradients; a warm-up's first step counts."""
    model = drawn()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)  # has no state, so every call steps
    for _ in range(2):
        train(model, 1, optimizer=optimizer)
        torch.distributed.checkpoint.state_dict.get_state_dict(model, optimizer)
    assert model.base_model.rankallocator.step == 2
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, 1, optimizer=optimizer)
    assert model.base_model.rankallocator.step == 3


def test_a_state_dicts_schedule_of_other_ranks_is_left_out():
    model = drawn()
    train(model, 5)
    state = {**drawn().state_dict(), "base_model._extra_state": torch.zeros(7)}
    with pytest.warns(peftfast.PeftWarning, match="other adapters or ranks"):
        model.load_state_dict(state)
    assert model.base_model.rankallocator.step == 5


def test_a_checkpoint_in_mid_schedule_loads_in_peft(tmp_path):
    _, ours = pair()
    train(ours, 8)
    ours.save_pretrained(tmp_path)
    expected = ours.eval()(**batch(50, ours)).logits
    loaded = peft.PeftModel.from_pretrained(oracle.llama(), tmp_path).eval()
    torch.testing.assert_close(predicted(loaded), expected, rtol=1e-5, atol=1e-5)


def test_under_trainer_nothing_has_to_be_called(tmp_path):
    from transformers import Trainer, TrainingArguments

    _, ours = pair(total_step=6, tinit=1, tfinal=2)
    data = [{k: v[0] for k, v in batch(i, ours).items()} for i in range(24)]
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
        learning_rate=5e-2, save_steps=3, logging_steps=100, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=ours, args=arguments, train_dataset=data)
    trainer.train()
    assert ours.base_model.rankallocator.step == 6
    assert sum(map(sum, masks(ours).values())) == 2 * 6
    assert [entry.budget for entry in ours.base_model.history][-1] == 12
    # and again from the checkpoint in mid-schedule
    fresh = peftfast.get_peft_model(
        oracle.llama(), peftfast.AdaLoraConfig(**{**OPTIONS, "total_step": 6, "tinit": 1, "tfinal": 2})
    )
    Trainer(model=fresh, args=arguments, train_dataset=data).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    for p, q in zip(trainable(fresh), trainable(ours), strict=True):
        torch.testing.assert_close(p, q)


def test_under_accelerate_updates_are_counted(tmp_path):
    from accelerate import Accelerator

    _, ours = pair(total_step=6, tinit=1, tfinal=2)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(ours, torch.optim.AdamW(trainable(ours), lr=5e-2))
    for step in range(12):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch(step, ours)).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert ours.base_model.rankallocator.step == 6
    assert sum(map(sum, masks(ours).values())) == 2 * 6


def test_gradient_checkpointing_changes_nothing():
    _, plain = pair()
    _, other = pair()
    other.load_state_dict(plain.state_dict())
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    other.enable_input_require_grads()
    expected, losses = (train(m.train(), 14)[0] for m in (plain, other))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("copied", [False, True])
def test_a_compiled_training_is_one_graph_and_has_its_schedule(copied):
    """Of a model that nobody has called before, beside others."""
    eager, others = drawn(), [drawn() for _ in range(3)]
    train(eager, 8)
    model = copy.deepcopy(others.pop(0)) if copied else others.pop(0)
    del others
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.AdamW(trainable(model), lr=5e-2)
    for step in range(1, 9):
        compiled(**batch(step, model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [entry.ranks for entry in model.base_model.history] == [entry.ranks for entry in eager.base_model.history]
    assert len(model.base_model.history) > 3


def test_several_adapters_may_be_trained_one_after_the_other():
    """PEFT refuses a second trainable one."""
    _, ours = pair()
    train(ours, 5)
    ours.add_adapter("second", peftfast.AdaLoraConfig(**OPTIONS))
    ours.set_adapter("second")
    train(ours, 3)
    steps = {name: ours.base_model._allocator(name).step for name in ("default", "second")}
    assert steps == {"default": 5, "second": 3}


def test_an_adapter_that_is_added_anew_begins_its_schedule_anew():
    """Also of the same config, where the model's own method has not deleted the one before."""
    cfg = peftfast.AdaLoraConfig(**OPTIONS)
    ours = peftfast.get_peft_model(oracle.llama(), cfg)
    train(ours, 5)
    peftfast.functional.delete_adapter(ours, "default")
    ours.add_adapter("default", cfg)
    ours.set_adapter("default")
    train(ours, 1)
    assert ours.base_model.rankallocator.step == 1


def test_a_mixed_batch_has_the_loss_terms_of_its_own_adapters():
    _, ours = pair()
    ours.add_adapter("second", peftfast.AdaLoraConfig(**OPTIONS))
    ours.set_requires_grad("second")
    mixed = ours(**batch(1, ours), adapter_names=["second"] * 2).loss
    ours.set_adapter("second")
    torch.testing.assert_close(mixed, ours(**batch(1, ours)).loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_goes_on_by_itself(copied):
    _, ours = pair()
    train(ours, 5)
    other = copied(ours)
    assert train(other, 3, first=6)[0] != []
    assert (ours.base_model.rankallocator.step, other.base_model.rankallocator.step) == (5, 8)


@pytest.mark.parametrize("step", [2, 6])
def test_bookkeeping_does_not_grow_with_the_number_of_layers(step):
    counts = []
    for layers in (1, 4):
        model = peftfast.get_peft_model(oracle.llama(layers=layers), peftfast.AdaLoraConfig(**OPTIONS))
        model(**batch(1, model)).loss.backward()
        model.base_model.update_and_allocate(1)
        with oracle.Operations() as seen:
            model.base_model.update_and_allocate(step)
        counts.append(len(seen.names))
        if step == 2:  # no allocation: the host waits for nothing
            assert not WAITS & set(seen.names)
        adapters = model.base_model._adapters("default")
        with oracle.Operations() as seen:
            adapters[0].method.loss_term(adapters)
        counts.append(len(seen.names))
    # the layers' gradients are still added one by one, by autograd itself
    print(
        f"step {step}: update {counts[0]} and {counts[2]} operations for 1 and 4 layers, loss {counts[1]}, {counts[3]}"
    )
    assert counts[0] == counts[2] <= 45
    assert counts[1] == counts[3] <= 70


def test_history_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    _, ours = pair()
    with pytest.raises(ValueError, match="No ranks"):
        ours.base_model.plot_ranks()
    train(ours, 13)
    history = ours.base_model.history
    assert [entry.step for entry in history] == list(range(4, 13))
    assert all(a.budget >= b.budget for a, b in zip(history, history[1:], strict=False))
    assert sum(history[-1].ranks.values()) == 12 and len(history[-1].scores) == 6
    with torch.device("meta"):  # whatever the default device is
        ours.base_model.plot_ranks(tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_step": None}, "does not work when `total_step` is None"),
        ({"total_step": 0}, "supply a value > 0"),
        ({"tinit": 12}, "budgeting phase"),
        ({"use_dora": True}, "does not support DoRA"),
        ({"init_r": 0}, "at least 1"),
        ({"target_r": 0}, "at least 1"),
        ({"orth_reg_weight": -1.0}, "orth_reg_weight"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        peftfast.AdaLoraConfig(**{**SCHEDULE, **changes})


def test_unused_settings_are_named():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peftfast.AdaLoraConfig(**SCHEDULE, r=4, use_rslora=True)
    text = " ".join(str(w.message) for w in caught)
    assert "`r` is not used" in text and "use_rslora" in text


def test_combining_is_refused_as_in_peft():
    _, ours = pair()
    with pytest.raises(TypeError, match="does not support add_weighted_adapter"):
        ours.base_model.add_weighted_adapter(["default"], [1.0], "new")


def test_a_schedule_of_one_step_goes_by_its_gradients():
    _, ours = pair(total_step=1, tinit=0, tfinal=0)
    train(ours, 3)
    assert ours.base_model.rankallocator.finished
    (allocation,) = ours.base_model.history
    assert sum(allocation.ranks.values()) == ours.base_model.rankallocator.target_bgt
    kept = [sum(mask) for mask in masks(ours).values()]
    assert kept == list(allocation.ranks.values())


def test_its_own_name_for_biases_of_adapted_modules():
    options = {**OPTIONS, "bias": "adalora_only"}
    model = peftfast.get_peft_model(oracle.llama(bias=True), peftfast.AdaLoraConfig(**options))
    trained = [n for n, p in model.named_parameters() if n.endswith(".bias") and p.requires_grad]
    adapted = [f"base_model.model.{name}.base_layer.bias" for name in model.base_model.targeted_module_names]
    assert sorted(trained) == sorted(adapted)


def test_the_base_models_state_has_nothing_of_the_adapter():
    bare = oracle.llama().state_dict()
    state = peftfast.get_base_model_state_dict(
        peftfast.get_peft_model(oracle.llama(), peftfast.AdaLoraConfig(**OPTIONS))
    )
    assert state.keys() == bare.keys()
