"""Blocks: outputs and all gradients against fp64, next to PEFT; what they keep; when they stay out of the way."""

import copy
import gc
import io
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from oracle import Twins, assert_no_further, copy_parameters, gradients, inputs, llama, moved, randomised
from torch import nn
from transformers.activations import ACT2FN

import peftfast
from peftfast.layers.layer import BaseTunerLayer
from peftfast.ops import composed
from peftfast.ops.blocks import lora_siblings
from peftfast.ops.lora import draw_seeds
from peftfast.ops.plan import Part, plan_of
from peftfast.training.blocks import GatedMlp, Siblings
from peftfast_kernels.decode import dense
from peftfast_kernels.gated import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("large_products")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run(model, autocast=False):
    """Logits and the gradients of everything trained, and of the embeddings."""
    model.zero_grad()
    ids = inputs(model)["input_ids"]
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(inputs_embeds=embeds).logits
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    (out * weights).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"logits": out.detach(), "input": embeds.grad, **grads}


def kinds(blocks):
    return [(type(g).__name__, len(g.names), g.state) for g in blocks.groups]


def as_near(ours, theirs, truth):
    """Through a whole model a tensor's error is one sample of amplified rounding noise, so single ratios scatter; their
    middle does not. What single blocks do is compared strictly below."""
    ratios = sorted(assert_no_further(ours, theirs, truth, slack=4).values())
    assert ratios[len(ratios) // 2] <= 1.25, ratios


FUSED = [("GatedMlp", 1, "on"), ("GatedMlp", 1, "on"), ("Siblings", 3, "on"), ("Siblings", 3, "on")]


def attached(model):
    """The blocks of a model after the passes that find and check them."""
    blocks = peftfast.fuse_blocks(model)
    with torch.no_grad():
        for _ in range(3):
            model(**inputs(model))
    return blocks


@pytest.mark.parametrize("dtype, autocast", [("fp32", False), ("fp32", True), ("bf16", True), ("bf16", False)], ids=str)
@pytest.mark.parametrize("bias, act", [(False, "silu"), (True, "gelu_pytorch_tanh")])
def test_outputs_and_gradients(dtype, autocast, bias, act):
    base = torch.bfloat16 if dtype == "bf16" else torch.float32
    twins = Twins(lambda: llama(bias=bias, hidden_act=act).to(base), {"r": 4, "lora_alpha": 8, "target_modules": ALL})
    blocks = attached(twins.ours)
    assert kinds(blocks) == FUSED, blocks.report()
    truth = run(copy.deepcopy(twins.theirs).double())
    ours, theirs = run(twins.ours.train(), autocast), run(twins.theirs.train(), autocast)
    assert kinds(blocks) == FUSED
    assert set(ours) == set(theirs) and len(ours) == 2 + 2 * 2 * 7
    as_near(ours, theirs, truth)


@pytest.mark.parametrize("dtype, autocast", [("fp32", False), ("bf16", True), ("bf16", False)], ids=str)
@pytest.mark.parametrize("which", ["mlp", "qkv"])
def test_one_block_is_no_further_than_peft(which, dtype, autocast):
    """Many rows through one block: outputs and every gradient, strictly."""
    base = torch.bfloat16 if dtype == "bf16" else torch.float32
    twins = Twins(lambda: llama(hidden=64).to(base), {"r": 8, "lora_alpha": 8, "target_modules": ALL})
    attached(twins.ours)
    start = torch.randn(1, 700, 64, generator=torch.Generator().manual_seed(2)).to(base)

    def results(model, cast):
        layer = model.get_base_model().model.layers[0]
        x = start.to(next(layer.parameters()).dtype if cast is None else base).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(cast)):
            if which == "mlp":
                outs = [layer.mlp(x)]
            else:
                attention = layer.self_attn
                outs = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]
        weights = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        loss = sum((out.double() * weights[..., : out.shape[-1]].to(base)).sum() for out in outs)
        loss.backward()
        grads = gradients(layer)
        return {**{f"y{i}": out.detach() for i, out in enumerate(outs)}, "x": x.grad, **grads}

    truth = results(copy.deepcopy(twins.theirs).double(), None)
    ours, theirs = results(twins.ours, autocast), results(twins.theirs, autocast)
    assert set(ours) == set(theirs) == set(truth) and len(ours) == (8 if which == "mlp" else 10)
    print({n: round(r, 2) for n, r in assert_no_further(ours, theirs, truth, slack=1.1).items()})


@pytest.mark.parametrize("autocast", [False, True])
def test_singular_values_between_the_factors(autocast):
    """AdaLoRA's layers are low-rank linears with E in A, so blocks take them; E, too, gets its gradient."""
    peft = pytest.importorskip("peft")
    models = []
    for library in (peftfast, peft):
        torch.manual_seed(1)
        config = library.AdaLoraConfig(target_modules=ALL, init_r=4, target_r=2, total_step=10, lora_alpha=8)
        models.append(library.get_peft_model(llama(), config).eval())
    ours, theirs = models
    copy_parameters(moved(theirs), ours)
    blocks = attached(ours)
    assert kinds(blocks) == FUSED, blocks.report()
    truth = run(copy.deepcopy(theirs).double())
    found = run(ours, autocast)
    assert len(found) == 2 + 2 * 3 * 7
    as_near(found, run(theirs, autocast), truth)


def test_different_ranks_scales_and_frozen_factors():
    options = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        "rank_pattern": {"k_proj": 7, "up_proj": 3},
        "use_rslora": True,
    }
    twins = Twins(llama, options)
    blocks = attached(twins.ours)
    assert kinds(blocks) == FUSED
    for model in (twins.ours, twins.theirs):
        for name, parameter in model.named_parameters():
            if "v_proj.lora_A" in name or "gate_proj.lora_B" in name:
                parameter.requires_grad_(False)
    truth = run(copy.deepcopy(twins.theirs).double())
    as_near(run(twins.ours), run(twins.theirs), truth)


class GivesNoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


def test_outputs_that_get_no_gradient_give_none():
    w, x = dense(torch.ones(6, 8)), torch.ones(5, 8, requires_grad=True)
    plan = plan_of(w, torch.float32, 1.0, 0.0)
    parts = [Part(w, None, *(torch.ones(s, requires_grad=True) for s in ((2, 8), (6, 2))), plan) for _ in range(2)]
    used = sum(GivesNoGradient.apply(y).sum() for y in lora_siblings(x * 1, parts))
    (used + x.sum()).backward()
    assert (x.grad == 1).all() and all(part.a.grad is None and part.b.grad is None for part in parts)


def test_dropout_has_masks_of_its_own_per_layer():
    """With the same seeds as the layers would draw, the block's result is theirs."""
    twins = Twins(llama, {"r": 4, "lora_alpha": 8, "target_modules": ALL, "lora_dropout": 0.3}, same=True)
    blocks = attached(twins.ours)
    assert kinds(blocks) == FUSED
    plain = copy.deepcopy(twins.ours)
    peftfast_blocks_off(plain)
    results = []
    for model in (twins.ours.train(), plain.train()):
        torch.manual_seed(11)
        results.append(run(model))
    for name, value in results[1].items():
        torch.testing.assert_close(results[0][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    seeds = []
    import peftfast.ops.blocks as ops

    draw = ops.draw_seeds
    try:
        ops.draw_seeds = lambda x, plans: seeds.append(draw(x, plans)) or seeds[-1]
        twins.ours(**inputs(twins.ours))
    finally:
        ops.draw_seeds = draw
    drawn = [s.item() for each in seeds for s in each]
    assert len(drawn) == 2 * 6 and len(set(drawn)) == len(drawn)


def test_a_seed_for_each_that_drops():
    for dropouts in ((0.0, 0.0), (0.0, 0.3, 0.0), (0.3, 0.0, 0.1)):
        plans = [SimpleNamespace(dropout=dropout) for dropout in dropouts]
        seeds = draw_seeds(torch.zeros(1), plans)
        assert [seed is not None for seed in seeds] == [dropout > 0 for dropout in dropouts]
        drawn = [seed.item() for seed in seeds if seed is not None]
        assert len(set(drawn)) == len(drawn)


def test_frozen_factors_cost_nothing(monkeypatch):
    """Where no factor of a block is trained, none of their gradients is computed."""
    import peftfast.ops.blocks as ops

    twins = Twins(llama, {"r": 4, "lora_alpha": 8, "target_modules": ALL})
    assert kinds(attached(twins.ours)) == FUSED
    asked, grads = [], ops.siblings_factor_grads
    monkeypatch.setattr(ops, "siblings_factor_grads", lambda dys, *rest: asked.append(len(dys)) or grads(dys, *rest))
    for name, parameter in twins.ours.named_parameters():
        if "lora_" in name and ("mlp" in name or ".k_proj" in name):
            parameter.requires_grad_(False)
    run(twins.ours)
    assert asked == [3, 3]  # q, k and v of both layers, not the MLPs
    assert all(
        (p.grad is None) == ("mlp" in n or ".k_proj" in n)
        for n, p in twins.ours.named_parameters()
        if "lora_" in n and "o_proj" not in n
    )


def peftfast_blocks_off(model):
    """What a copy carries is removed with the copy's own blocks."""
    for module in model.modules():
        block = module.__dict__.get("block")
        if isinstance(block, Siblings):
            block.detach()
        mine = module.__dict__.get("forward")
        if isinstance(getattr(mine, "__self__", None), GatedMlp):
            mine.__self__.detach()
    assert not any("forward" in m.__dict__ for m in model.modules())


def kept(model, x):
    """Bytes kept for the backward pass, beyond the input and what lives with the model, as fractions of [M, I] bf16."""
    seen = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: seen.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
    lasting = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    return sum(t.untyped_storage().nbytes() for p, t in seen.items() if p not in lasting)


def test_gated_mlp_keeps_input_gate_and_up():
    twins = Twins(lambda: llama(hidden=64).to(torch.bfloat16), {"r": 2, "target_modules": ALL})
    attached(twins.ours)
    rows, wide = 200, 128
    x = torch.randn(1, rows, 64, dtype=torch.bfloat16, requires_grad=True)
    mine = kept(twins.ours.get_base_model().model.layers[0].mlp, x)
    theirs = kept(twins.theirs.get_base_model().model.layers[0].mlp, x)
    unit = rows * wide * 2
    copies = 2 * 3 * (64 + 128) * 4  # the factors' copies outside a forward of the whole model, at most
    print(f"kept by an MLP of {rows} rows in units of [M, I]: {mine / unit:.2f}, PEFT {theirs / unit:.2f}")
    assert mine <= 2 * unit + rows * 3 * 2 * 2 + copies
    assert theirs >= 4 * unit


def test_removing_leaves_no_trace():
    model = Twins(llama, {"r": 4, "target_modules": ALL}).ours
    names = list(model.state_dict())
    before = run(model)
    dicts = {n: set(m.__dict__) for n, m in model.named_modules()}
    blocks = attached(model)
    assert list(model.state_dict()) == names
    blocks.remove()
    assert {n: set(m.__dict__) - {"block"} for n, m in model.named_modules()} == dicts
    assert all(m.__dict__.get("block") is None for m in model.modules())
    after = run(model)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)


def calls_of_blocks(model, monkeypatch):
    """How many blocks ran in one pass."""
    import peftfast.training.blocks as module

    count = []
    for name in ("lora_siblings", "gated_mlp"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: count.append(name) or real(*a))
    with torch.no_grad():
        out = model(**inputs(model)).logits
    monkeypatch.undo()
    return len(count), out  # (how many, logits)


def look_again(*models):
    """Layers remember which way they took."""
    for model in models:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.activate(module.active_adapters)


def take_all_as_host_bound(monkeypatch, *models):
    for module in ("peftfast.training.blocks", "peftfast.ops.lora"):
        monkeypatch.setattr(f"{module}.is_host_bound", lambda x, plan: True)
    look_again(*models)


@pytest.mark.parametrize("dtype, autocast", [("fp32", False), ("bf16", True), ("bf16", False)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_host_bound_blocks_leave_it_to_their_layers(dtype, autocast, dropout, monkeypatch):
    """Which take less of the host's time by themselves, and give the same to the last bit."""
    base = torch.bfloat16 if dtype == "bf16" else torch.float32
    config = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "lora_dropout": dropout}
    model = Twins(lambda: llama().to(base), config).ours
    alone = copy.deepcopy(model).train()
    attached(model)
    model.train()
    take_all_as_host_bound(monkeypatch, model, alone)
    run(model, autocast)  # blocks are compared with their layers once in training
    for name in ("lora_siblings", "gated_mlp"):
        monkeypatch.delattr(f"peftfast.training.blocks.{name}")
    found = []
    for each in (model, alone):
        torch.manual_seed(7)
        found.append(run(each, autocast))
    ours, theirs = found
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_host_bound_blocks_draw_their_masks_again(reentrant, monkeypatch):
    """Reentrant checkpointing runs layers first without gradients, then with them."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "lora_dropout": 0.3}
    model = Twins(llama, config).ours
    attached(model)
    take_all_as_host_bound(monkeypatch, model)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(7)
        found.append(run(model.train()))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


UNFIT = ["hook", "merged", "disabled", "two", "mixed", "dora", "compile", "replaced", "small", "host"]


@pytest.mark.parametrize("what", UNFIT)
def test_off_where_something_does_not_fit(what, monkeypatch):
    twins = Twins(llama, {"r": 4, "target_modules": ALL})
    model = twins.ours
    plain = copy.deepcopy(model)
    attached(model)
    assert calls_of_blocks(model, monkeypatch)[0] == 4
    seen = []
    for m in (model, plain):
        layer = m.get_base_model().model.layers[0]
        if what == "hook":
            layer.mlp.gate_proj.register_forward_hook(lambda module, args, out: seen.append(1) or out * 2)
            layer.self_attn.k_proj.base_layer.register_forward_hook(lambda module, args, out: seen.append(1) or out * 2)
        elif what == "merged":
            m.merge_adapter()
        elif what in ("two", "mixed", "dora"):
            torch.manual_seed(5)
            config = peftfast.LoraConfig(r=2, target_modules=ALL, init_lora_weights=False, use_dora=what == "dora")
            m.add_adapter("other", config)
            if what == "two":
                m.base_model.set_adapter(["default", "other"])
            elif what == "dora":
                m.set_adapter("other")
        elif what == "replaced":
            for each in m.get_base_model().model.layers:
                each.mlp.act_fn = nn.Tanh()
    if what == "small":
        monkeypatch.setattr(composed, "SMALL", {4: 1 << 15})
        look_again(model, plain)
        with torch.no_grad():
            ours, theirs = (m(**inputs(m)).logits for m in (model, plain))
        count = 0 if torch.equal(ours, theirs) else None  # the layers' own numbers, to the last bit
    elif what == "host":
        take_all_as_host_bound(monkeypatch, model, plain)
        count, ours = calls_of_blocks(model, monkeypatch)
        theirs = calls_of_blocks(plain, monkeypatch)[1]
    elif what == "disabled":
        with model.disable_adapter(), plain.disable_adapter():
            count, ours = calls_of_blocks(model, monkeypatch)
            theirs = calls_of_blocks(plain, monkeypatch)[1]
    elif what == "mixed":
        names = ["default", "other"]
        with torch.no_grad():
            ours, theirs = (m(**inputs(m), adapter_names=names).logits for m in (model, plain))
        count = 0
    elif what == "compile":
        with torch.no_grad():
            ours = torch.compile(model, backend="eager")(**inputs(model)).logits
            theirs = plain(**inputs(plain)).logits
        count = 0
    else:
        count, ours = calls_of_blocks(model, monkeypatch)
        theirs = calls_of_blocks(plain, monkeypatch)[1]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    # a hook on one layer's modules costs the two blocks of that layer and no other
    assert count == {"hook": 2, "replaced": 2}.get(what, 0)
    assert not seen or len(seen) == 4


class Odd(nn.Module):
    """Looks like a gated MLP and reads like siblings, but is neither."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act = nn.SiLU()

    def forward(self, x):
        y = self.a(x)
        x.mul_(2)  # in place between the two: not the same input any more
        return self.c(self.act(y) + self.b(x))


def test_only_what_agrees_is_fused():
    torch.manual_seed(0)
    model = peftfast.get_peft_model(
        Odd(), peftfast.LoraConfig(r=2, target_modules=["a", "b", "c"], init_lora_weights=False)
    )
    plain = copy.deepcopy(model)
    blocks = peftfast.fuse_blocks(model)
    for step in range(4):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
        with torch.no_grad():
            torch.testing.assert_close(model(x.clone()), plain(x.clone()), rtol=0, atol=0)
    assert [g.state for g in blocks.groups] == ["off: it computes something else"]


class Gated(nn.Module):
    """A gated MLP, and what some models do in theirs besides."""

    def __init__(self, act, drops=None, limit=None):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.act, self.drops, self.limit = act, drops, limit
        if drops == "module":
            self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        gate = self.gate(x) if self.limit is None else self.gate(x).clamp(max=self.limit)
        h = self.act(gate) * self.up(x)
        if self.drops == "module":
            h = self.dropout(h)
        elif self.drops == "function":
            h = nn.functional.dropout(h, 0.5, self.training)
        return self.down(h)


def gated(*args, dtype=torch.float32, **options):
    """A model of one gated MLP, the same unfused, and a function that gives the block's state."""
    torch.manual_seed(0)
    config = peftfast.LoraConfig(r=2, target_modules=["gate", "up", "down"], init_lora_weights=False)
    model = peftfast.get_peft_model(nn.Sequential(Gated(*args, **options).to(dtype)), config)
    plain = copy.deepcopy(model)
    blocks = peftfast.fuse_blocks(model)
    return model, plain, lambda: blocks.groups[0].state


@pytest.mark.parametrize("drops", ["module", "function"])
def test_dropout_between_the_layers_of_a_gated_mlp_stays(drops):
    model, plain, state = gated(nn.GELU(), drops)
    x = torch.randn(40, 16)
    for training in (False, True, False, True):
        outs = []
        for m in (model.train(training), plain.train(training)):
            torch.manual_seed(1)
            with torch.no_grad():
                outs.append([m(x) for _ in range(3)])
        torch.testing.assert_close(*outs)
        assert torch.equal(outs[0][0], outs[0][1]) is not training
    assert state() == ("on" if drops == "module" else "off: it computes something else")


@pytest.mark.parametrize("act, limit", [(nn.ReLU6(), None), (ACT2FN["gelu_10"], None), (nn.SiLU(), 10.0)], ids=str)
def test_limits_beyond_what_the_first_call_reaches(act, limit):
    model, plain, state = gated(act, limit=limit)
    x = torch.randn(40, 16)
    with torch.no_grad():
        for far in (1, 1, 100):
            torch.testing.assert_close(model(far * x), plain(far * x), rtol=1e-3, atol=1e-2)
    assert state().startswith("off")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_calls_that_tell_nothing_decide_nothing(dtype):
    model, _, state = gated(nn.SiLU(), dtype=dtype)
    with torch.no_grad():
        for x in (torch.zeros(0, 16), torch.full((5, 16), float("nan"))):
            model(x.to(dtype))
            assert state() == "new"
        model(torch.randn(40, 16).to(dtype))
    assert state() == "on"


def test_what_overflows_far_out_is_no_difference():
    """fp16 ends at 65504, which a block as large as real ones reaches where it is compared far out."""
    model, plain, state = gated(nn.SiLU(), dtype=torch.float16)
    x = torch.randn(40, 16).half()
    with torch.no_grad():
        for m in (model, plain):
            m.base_model.model[0].down.base_layer.weight.mul_(1000)
        assert torch.isfinite(plain(x)).all() and not torch.isfinite(plain(100 * x)).all()
        model(x)
    assert state() == "on"


@pytest.mark.parametrize("change", ["values", "factor", "adapter", "scale", "mode", "input", "gradients"])
def test_what_changes_between_siblings_is_seen(change):
    """The second of two siblings is called with the very same tensor, when it or the adapter is not what it was."""
    twins = Twins(llama, {"r": 4, "target_modules": ALL, "lora_dropout": 0.5})
    model = twins.ours
    model.add_adapter("other", peftfast.LoraConfig(r=4, target_modules=ALL, init_lora_weights=False))
    plain = copy.deepcopy(model)
    blocks = attached(model)
    assert kinds(blocks) == FUSED

    def second(m):
        attention = m.get_base_model().model.layers[0].self_attn
        x = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
        m.train(change == "mode")
        up = attention.k_proj.lora_B["default"]
        if change == "factor":
            up.weight = nn.Parameter(up.weight.detach().clone())  # written to as often as the next one
        with torch.set_grad_enabled(change != "gradients"):
            attention.q_proj(x)
        if change in ("values", "input"):
            with torch.no_grad():
                (up.weight if change == "values" else x).add_(1)
        elif change == "factor":
            up.weight = nn.Parameter(torch.ones_like(up.weight))
        elif change == "adapter":
            m.set_adapter("other")
        elif change == "scale":
            attention.k_proj.scale_layer(3.0)
        elif change == "mode":
            m.eval()
        return attention.k_proj(x)

    found, expected = second(model), second(plain)
    torch.testing.assert_close(found, expected)
    assert found.requires_grad == expected.requires_grad


@pytest.mark.parametrize("which", ["q_proj", "v_proj"])
def test_a_sibling_that_gets_another_input_is_computed_once(which):
    """With the masks of the layers by themselves, because nothing is drawn for what nobody asks for."""
    twins = Twins(llama, {"r": 4, "target_modules": ALL, "lora_dropout": 0.5})
    plain = copy.deepcopy(twins.ours)
    assert kinds(attached(twins.ours)) == FUSED
    results = []
    for model in (twins.ours.train(), plain.train()):
        layer = model.get_base_model().model.layers[0].self_attn.get_submodule(which)
        layer.register_forward_pre_hook(lambda module, args: args[0] * 0.5)
        torch.manual_seed(11)
        results.append(run(model))
    for name, value in results[1].items():
        torch.testing.assert_close(results[0][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


MORE = {
    "tokens": {"alora_invocation_tokens": [5, 6]},
    "samples": {"monteclora_config": peftfast.MontecloraConfig(num_samples=4)},
    "compressed": {"velora_config": peftfast.VeloraConfig(num_groups=8)},
}


@pytest.mark.parametrize("what", MORE)
def test_calls_in_which_an_adapter_is_more_than_a_lora(what):
    """Which blocks do not see where they are compared: at first an adapter does nothing, to whatever tokens."""
    torch.manual_seed(0)
    config = peftfast.LoraConfig(r=4, target_modules=ALL, task_type="CAUSAL_LM", **MORE[what])
    model = peftfast.get_peft_model(llama(), config)
    plain = copy.deepcopy(model)
    peftfast.fuse_blocks(model)
    ids = inputs(model)["input_ids"].clone()
    ids[:, 3:5] = torch.tensor([5, 6])
    for _ in range(3):
        found = []
        for m in (model, plain):
            m.train().zero_grad()
            torch.manual_seed(1)
            m(input_ids=ids, labels=ids).loss.backward()
            found.append(gradients(m))
            randomised(m, 0.3, only="lora_B")
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_checkpointing_copies_files_and_generation(tmp_path):
    twins = Twins(llama, {"r": 4, "target_modules": ALL, "task_type": "CAUSAL_LM"})
    model = twins.ours
    plain = copy.deepcopy(model)
    blocks = peftfast.fuse_blocks(model)  # found while checkpointing is on
    for m in (model, plain):
        m.gradient_checkpointing_enable({"use_reentrant": False})
        m.train()
    for _ in range(3):
        ours, theirs = run(model), run(plain)
    assert kinds(blocks) == FUSED
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = peftfast.PeftModel.from_pretrained(llama(), tmp_path)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    for m in (model, plain):
        m.eval()
        m.gradient_checkpointing_disable()
    ids = inputs(model)["input_ids"]
    tokens = [
        m.generate(input_ids=ids, max_new_tokens=5, do_sample=False) for m in (model, plain, copy.deepcopy(model))
    ]
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])


def test_pickled_with_its_blocks():
    model = Twins(llama, {"r": 4, "target_modules": ALL}).ours
    attached(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs(loaded)).logits, model(**inputs(model)).logits)


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_a_model_is_gone_with_the_last_reference_to_it(passes):
    gc.disable()
    try:
        model = peftfast.get_peft_model(llama(), peftfast.LoraConfig(target_modules=ALL))
        blocks = peftfast.fuse_blocks(model)
        for _ in range(passes):
            model(**inputs(model))
        held = [weakref.ref(parameter) for parameter in model.parameters()]
        del model
        assert [parameter() for parameter in held if parameter() is not None] == []
        blocks.remove()
    finally:
        gc.enable()


def test_refusals():
    with pytest.raises(ValueError, match="no adapted layers"):
        peftfast.fuse_blocks(llama())
    model = Twins(llama, {"r": 2, "target_modules": ALL}).ours
    peftfast.fuse_blocks(model)
    with pytest.raises(ValueError, match="part of a block already"):
        peftfast.fuse_blocks(model)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_of_activations(name):
    act = ACTIVATIONS[name]
    x = torch.linspace(-5, 5, 101, dtype=torch.float64, requires_grad=True)
    y = act.forward(x)
    (expected,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(act.backward(torch.ones_like(x), x.detach()), expected)


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached(Twins(llama, {"r": 2, "target_modules": ALL}).ours)
