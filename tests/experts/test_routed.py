"""Experts that multiply what is routed only: against an fp64 oracle, no further than PEFT, and without ever making a
tensor of the size of all experts."""

import importlib
import itertools

import oracle
import pytest
import torch
from experts import moe

import peftfast
from peftfast.ops.experts import Groups, experts_linear, per_expert
from peftfast.rows.routing import Routing
from peftfast.sites import parameter

peft = importlib.import_module("peft")


# ---- the product ----------------------------------------------------------------------------------------
def exact(x, w, a, b, scale, experts):
    """One row after the other: W + s B A of its expert, in fp64."""
    x, w, a, b = (t.double() for t in (x, w, a, b))
    a, b = per_expert(a, b, w.shape[0])
    return torch.stack([x[i] @ (w[e] + scale * (b[e] @ a[e]).t()) for i, e in enumerate(experts.tolist())])


#: tokens, experts: all hit or few, rows for a loop or for the grouped product, an expert without rows, none at all
SHAPES = [(1, 16), (1, 2), (3, 5), (40, 4), (64, 24), (0, 4)]


@pytest.mark.parametrize("tokens, experts", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k, n, r", [(32, 16, 4), (10, 7, 3)])
@pytest.mark.parametrize("transposed", [False, True])
def test_product_and_gradients(tokens, experts, dtype, k, n, r, transposed):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape, kind=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind)

    chosen = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(tokens)] or
                         [torch.zeros(2, dtype=torch.int64)])[:tokens]  # fmt: skip
    groups = Groups(chosen, experts)
    x = draw(2 * tokens, k).requires_grad_()
    w = draw(experts, k, n) if transposed else draw(experts, n, k).transpose(1, 2)
    wide = torch.promote_types(dtype, torch.float32)
    a, b = draw(r * experts, k, kind=wide).requires_grad_(), draw(n, r * experts, kind=wide).requires_grad_()
    truth = [t.detach().double().requires_grad_() for t in (x, a, b)]
    y = experts_linear(x, w, groups, (a, b, 0.5))
    with torch.no_grad():
        assert torch.equal(experts_linear(x, w, groups, (a, b, 0.5)), y)
    assert y.dtype is dtype and groups.experts.tolist() == sorted(chosen.flatten().tolist())
    if not tokens:
        assert y.shape == (0, n)
        return
    expected = exact(truth[0], w, truth[1], truth[2], 0.5, groups.experts)
    dy = draw(2 * tokens, n)
    y.backward(dy)
    expected.backward(dy.double())
    limit = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 6e-3}[dtype]
    for mine, right in ((y, expected), *((t.grad, u.grad) for t, u in zip((x, a, b), truth, strict=True))):
        assert oracle.rms_error(mine, right.detach()) < limit


def test_groups_of_runs_and_without():
    groups = Groups(torch.tensor([[3, 0], [3, 9], [0, 3]]), 12)
    assert groups.runs == [(0, 0, 2), (3, 2, 5), (9, 5, 6)]
    assert groups.order.tolist() == [1, 4, 0, 2, 5, 3]
    few, experts = groups.hit
    assert experts.tolist() == [0, 3, 9] and few.runs == [(0, 0, 2), (1, 2, 5), (2, 5, 6)]
    assert Groups(torch.tensor([[0, 1]]), 4).hit[1] is None


@pytest.mark.parametrize("x_dtype, w_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("rows, count", [(4, 4), (40, 20)], ids=["in step", "many runs"])
def test_weights_of_another_dtype(rows, count, x_dtype, w_dtype):
    """As under autocast."""
    x, w = torch.randn(rows, 16).to(x_dtype), torch.randn(count, 16, 24).to(w_dtype)
    groups = Groups((torch.arange(rows) % count)[:, None], count)
    x = x[groups.order]
    expected = torch.stack([one.double() @ w[e].to(x_dtype).double() for one, e in zip(x, groups.experts, strict=True)])
    y = experts_linear(x, w, groups, None)
    assert y.dtype == x_dtype and oracle.rms_error(y, expected) < 2 * torch.finfo(x_dtype).eps


@pytest.mark.parametrize("count, factors", [(2, True), (12, True), (2, False)])
def test_second_derivatives(count, factors):
    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    groups, w = Groups(torch.tensor([[0], [1], [0], [1]]), count), torch.randn(count, 6, 5, dtype=torch.float64)

    def product(x, *pair):
        return experts_linear(x, w, groups, (*pair, 0.5) if factors else None).pow(2)

    inputs = (draw(4, 6), *((draw(3 * count, 6), draw(5, 3 * count)) if factors else ()))
    assert torch.autograd.gradcheck(product, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(product, inputs)


# ---- models ---------------------------------------------------------------------------------------------
#: id -> (dtype of the base, autocast dtype, fp32 factors)
PRECISIONS = {
    "fp32": (torch.float32, None, True),
    "bf16": (torch.bfloat16, None, True),
    "bf16-pure": (torch.bfloat16, None, False),
    "autocast": (torch.float32, torch.bfloat16, True),
    "autocast-bf16": (torch.bfloat16, torch.bfloat16, True),
}


class Experts(torch.nn.Module):
    """The experts of a model alone, behind a name that a config can give."""

    def __init__(self, make):
        super().__init__()
        self.experts = next(m for n, m in make().named_modules() if n.endswith("experts") and hasattr(m, "down_proj"))

    def forward(self, x, chosen, weights):
        return self.experts(x, chosen, weights)


def step(model, dtype, autocast):
    """Output and gradients of one step, the routing the same in every precision."""
    generator = torch.Generator().manual_seed(2)
    count = model.get_base_model().experts.num_experts
    x = torch.randn(48, 32, generator=generator).to(dtype).requires_grad_()
    chosen = torch.stack([torch.randperm(count, generator=generator)[:2] for _ in range(48)])
    weights = torch.rand(48, 2, generator=generator).to(dtype)
    upstream = torch.randn(48, 32, generator=generator).to(dtype)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = model(x, chosen, weights)
    y.backward(upstream.to(y.dtype))
    return {"output": y.detach(), "dx": x.grad} | oracle.gradients(model)


@pytest.mark.parametrize("make", [moe.qwen3_moe, moe.gpt_oss], ids=lambda make: make.__name__)
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_further_from_the_oracle_than_peft(make, implementation, precision):
    dtype, autocast, wide = PRECISIONS[precision]

    def adapted(library, dtype, wide=True, implementation=implementation):
        model = Experts(moe.eager(make, implementation)).to(dtype)
        config = library.LoraConfig(r=8, lora_alpha=12, target_parameters=moe.BOTH, target_modules=[])
        model = library.get_peft_model(model, config, autocast_adapter_dtype=wide)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, p in sorted(model.named_parameters()):
                if "lora_" in name:  # of bf16 values, so that all precisions start from the same
                    p.copy_(torch.randn(p.shape, generator=generator).mul_(0.2).bfloat16())
                else:
                    p.copy_(p.bfloat16())
        return model

    truth = step(adapted(peft, torch.float64, implementation="eager"), torch.float64, None)
    ours = step(adapted(peftfast, dtype, wide), dtype, autocast)
    theirs = step(adapted(peft, dtype, wide), dtype, autocast)
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    oracle.assert_no_further(ours, theirs, truth)


@pytest.mark.parametrize("names", [None, ["default"] * 2, ["default", "other"]], ids=["active", "alike", "mixed"])
@pytest.mark.parametrize("make", [moe.qwen3_moe, moe.gpt_oss], ids=lambda make: make.__name__)
def test_no_tokens_at_all(make, names):
    """As where a model routes the tokens of images elsewhere, and there is nothing else."""
    config = peftfast.LoraConfig(target_parameters=moe.BOTH, init_lora_weights=False)
    model = peftfast.get_peft_model(make(), config)
    model.add_adapter("other", config)
    layer = next(m for m in model.modules() if hasattr(m, "parameter_name"))
    x = torch.zeros(0, 32, requires_grad=True)
    routing = None if names is None else Routing.by_name(names, {"default": 0, "other": 1}, "cpu", tokens=0)
    with model.base_model.inventory.control.use(routing):
        y = layer(x, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert y.shape == (0, 32)
    y.sum().backward()
    assert x.grad.shape == (0, 32)


@pytest.mark.parametrize("library", [peftfast, peft], ids=lambda library: library.__name__)
def test_nothing_as_large_as_all_experts_is_made(library):
    """By PEFT it is, which shows that the measure works."""
    model = Experts(lambda: moe.qwen3_moe(32))
    model = library.get_peft_model(model, library.LoraConfig(r=2, target_parameters=moe.BOTH, target_modules=[]))
    generator = torch.Generator().manual_seed(2)
    x, weights = torch.randn(3, 32, generator=generator).requires_grad_(), torch.rand(3, 2, generator=generator)
    with oracle.Operations() as seen:
        model(x, torch.tensor([[0, 9], [9, 31], [4, 0]]), weights).sum().backward()
    factors = max(p.numel() for n, p in model.named_parameters() if "lora_" in n)  # their gradients, and B turned
    stack = model.get_base_model().experts.get_base_layer().down_proj.numel()
    assert seen.elements >= stack if library is peft else seen.elements <= factors < stack


@pytest.mark.parametrize("tokens", [1, 24])
def test_only_the_experts_that_are_hit_are_read(tokens):
    """What is not routed to may hold anything."""
    model = Experts(lambda: moe.qwen3_moe(16))
    model = peftfast.get_peft_model(model, peftfast.LoraConfig(r=4, target_parameters=moe.BOTH, target_modules=[]))
    hit = torch.tensor([[1, 6]]).expand(tokens, 2)
    x, weights = torch.randn(tokens, 32), torch.full((tokens, 2), 0.5)
    with torch.no_grad():
        expected = model(x, hit, weights)
        stack = model.get_base_model().experts.get_base_layer()
        for parameter_ in (stack.gate_up_proj, stack.down_proj):
            for expert in set(range(16)) - {1, 6}:
                parameter_[expert] = float("nan")
        assert torch.equal(model(x, hit, weights), expected)


#: id -> (what happens to the experts, how they are called)
OTHERWISE = {
    "hook": lambda model, module: module.register_forward_hook(lambda *args: None),
    "trained weights": lambda model, module: module.down_proj.requires_grad_(True),
    "another implementation": lambda model, module: setattr(
        model.config, "_experts_implementation_internal", "of somebody"
    ),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_what_is_not_known_gets_changed_weights(case, monkeypatch):
    """Then the module's own forward runs, whatever that is."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    calls = itertools.count()

    def of_somebody(self, x, chosen, weights):
        next(calls)
        return ALL_EXPERTS_FUNCTIONS["batched_mm"](self, x, chosen, weights)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "of somebody", of_somebody)
    twins = oracle.Twins(moe.qwen3_moe, {"r": 4, "target_parameters": moe.BOTH})
    expected = oracle.logits(twins.theirs)
    base = twins.ours.get_base_model()
    OTHERWISE[case](base, base.model.layers[0].mlp.experts.get_base_layer())
    routed = []
    run = parameter.routed_experts
    monkeypatch.setattr(parameter, "routed_experts", lambda module, *a: routed.append(module) or run(module, *a))
    oracle.close(oracle.logits(twins.ours), expected)
    assert len(routed) == (0 if case == "another implementation" else 1)
    assert next(calls) == (2 if case == "another implementation" else 0)


class OnAGpu(torch.Tensor):
    is_cuda, is_cpu, device = True, False, torch.device("cuda", 0)


@pytest.mark.parametrize(
    "capability, grouped", [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)]
)
def test_gpus_without_a_grouped_product_loop(monkeypatch, capability, grouped):
    """torch's own stand-in there waits for the device in every call. Where an empty group gives something, it is
    zeroed."""
    from peftfast.ops import experts

    experts._capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x, w = torch.ones(16, 16, dtype=torch.bfloat16), torch.ones(3, 16, 16, dtype=torch.bfloat16)
    gpu = [t.as_subclass(OnAGpu) for t in (x, w)]
    runs = experts.Runs(3, torch.tensor([8, 8, 16], dtype=torch.int32))
    try:
        assert runs._takes(*gpu) is grouped
        monkeypatch.setattr(experts.F, "grouped_mm", lambda x, y, offs: torch.ones(3, 16, 16))
        if grouped:
            found = runs.outer(gpu[0], gpu[0])
            assert (found[1] == 0).all() == (capability[0] == 10) and (found[[0, 2]] == 1).all()
    finally:
        experts._capability.cache_clear()


def test_as_many_rows_as_experts_do_not_make_the_host_wait(monkeypatch):
    """Which rows are whose is on the GPU alone, as long as one product is made of them there."""
    from peftfast.ops import experts

    monkeypatch.setattr(experts, "_capability", lambda device: 9)
    monkeypatch.setattr(experts.F, "grouped_mm", lambda x, w, offs: torch.ones(8, 16))
    x, w = (torch.ones(shape, dtype=torch.bfloat16).as_subclass(OnAGpu) for shape in ((8, 16), (8, 16, 16)))
    runs = experts.Runs(8, torch.arange(1, 9, dtype=torch.int32))
    assert (runs.add_mm(x.clone(), x, w) == 2).all() and runs._runs is None
