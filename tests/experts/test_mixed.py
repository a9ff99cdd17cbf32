"""One adapter a row on routed experts: every row as alone with its own adapter, only what is routed to is read, and
what is done does not depend on how many adapters there are."""

import importlib

import oracle
import pytest
import torch
from experts import moe
from experts.test_routed import PRECISIONS, Experts

import peftfast
from peftfast.many import router
from peftfast.ops.experts import MixedGroups, experts_linear, per_expert
from peftfast.rows.routing import Routing

peft = importlib.import_module("peft")
BASE = "__base__"
#: of unlike ranks and scalings
ADAPTERS = {"a": (4, 8), "b": (2, 3), "c": (7, 5)}


# ---- the product ----------------------------------------------------------------------------------------
#: tokens, experts, which adapters the tokens have: few or most experts hit, one row a pair, all, none
SHAPES = [(6, 16, "mixed"), (5, 16, "all"), (40, 4, "mixed"), (64, 24, "all"), (9, 4, "none"), (0, 4, "all")]


@pytest.mark.parametrize("tokens, experts, mix", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k, n, ranks", [(32, 16, (4, 4, 4)), (10, 7, (3, 1, 5))])
@pytest.mark.parametrize("transposed", [False, True])
def test_product_and_gradients(tokens, experts, mix, dtype, k, n, ranks, transposed):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape, kind=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind)

    chosen = torch.argsort(torch.rand(tokens, experts, generator=generator))[:, :2]
    owners = torch.randint(-1 if mix == "mixed" else 0, 3, (tokens,), generator=generator)
    if mix == "none":
        owners = owners % 2 * 4 - 1  # before the first one and behind the last
    groups = MixedGroups(chosen, experts, owners, 3)
    x = draw(2 * tokens, k).requires_grad_()
    w = draw(experts, k, n) if transposed else draw(experts, n, k).transpose(1, 2)
    wide = torch.promote_types(dtype, torch.float32)
    factors = [
        t.requires_grad_() for r in ranks for t in (draw(r * experts, k, kind=wide), draw(n, r * experts, kind=wide))
    ]
    scales = (0.5, torch.tensor(2.0), -1.5) if dtype is torch.float32 else (0.5, 2.0, -1.5)
    changes = [(*factors[2 * i : 2 * i + 2], scales[i]) for i in range(3)]
    y = experts_linear(x, w, groups, changes)
    with torch.no_grad():
        assert torch.equal(experts_linear(x, w, groups, changes), y)
    assert y.dtype is dtype and y.shape == (2 * tokens, n)
    if not tokens:
        return
    truth = [t.detach().double().requires_grad_() for t in (x, *factors)]
    own = owners[groups.order // 2].tolist()
    rows = []
    for i, (e, owner) in enumerate(zip(groups.experts.tolist(), own, strict=True)):
        weight = w[e].double()
        if 0 <= owner < 3:
            a, b = per_expert(*truth[2 * owner + 1 : 2 * owner + 3], experts)
            weight = weight + float(scales[owner]) * (b[e] @ a[e]).t()
        rows.append(truth[0][i] @ weight)
    expected, dy = torch.stack(rows), draw(2 * tokens, n)
    y.backward(dy)
    expected.backward(dy.double())
    limit = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 6e-3}[dtype]
    assert oracle.rms_error(y, expected.detach()) < limit and oracle.rms_error(x.grad, truth[0].grad) < limit
    for mine, right in zip(factors, truth[1:], strict=True):
        if right.grad is None:
            assert not mine.grad.any()  # processes that have rows of it reduce it together with this one
        else:
            assert oracle.rms_error(mine.grad, right.grad) < limit
    plain = experts_linear(x.detach(), w, groups, None)
    none = torch.tensor([not 0 <= owner < 3 for owner in own])
    assert torch.equal(y[none], plain[none])  # bit for bit


@pytest.mark.parametrize("count", [2, 12])
def test_second_derivatives(count):
    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    groups = MixedGroups(torch.tensor([[0], [1], [0], [1], [1]]), count, torch.tensor([0, -1, 1, 1, 0]), 2)
    w = torch.randn(count, 6, 5, dtype=torch.float64)

    def product(x, a, b, c, d):
        return experts_linear(x, w, groups, [(a, b, 0.5), (c, d, 2.0)]).pow(2)

    inputs = (draw(5, 6), draw(3 * count, 6), draw(5, 3 * count), draw(2 * count, 6), draw(5, 2 * count))
    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)


# ---- models ---------------------------------------------------------------------------------------------
def adapted(library, make, adapters=ADAPTERS, dtype=torch.float32, wide=True, **changes):
    """A model with several adapters, the same in both libraries and in every precision."""
    model = make().to(dtype)
    for name, (r, alpha) in adapters.items():
        options = {"r": r, "lora_alpha": alpha, "target_parameters": moe.BOTH, "target_modules": ["q_proj"], **changes}
        config = library.LoraConfig(**options)
        if hasattr(model, "peft_config"):
            model.add_adapter(name, config, autocast_adapter_dtype=wide)
        else:
            model = oracle.quietly(library.get_peft_model, model, config, name, autocast_adapter_dtype=wide)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, p in sorted(model.named_parameters()):
            if ".lora_" in key:  # of bf16 values, so that all precisions start from the same
                p.copy_(torch.randn(p.shape, generator=generator).mul_(0.3).bfloat16())
            else:
                p.copy_(p.bfloat16())
    return model.eval()


def alone(model, ids, names):
    """Logits of every row by itself, through its own adapter."""
    rows = []
    for i, name in enumerate(names):
        batch = {"input_ids": ids[i : i + 1]}
        if name == BASE:
            with model.disable_adapter():
                rows.append(model(**batch).logits)
        else:
            model.base_model.set_adapter(name)
            rows.append(model(**batch).logits)
    return torch.cat(rows)


def ids_of(batch, length=5):
    return torch.randint(1, oracle.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch))


MIXES = [["a", "b"], ["c", BASE, "a", "b", "a"], ["b", BASE], ["a", "b", "c", "c", "b", "a", BASE, "a"]]


@pytest.mark.parametrize("make", moe.KINDS.values(), ids=moe.KINDS)
@torch.no_grad()
def test_every_row_as_alone(make):
    ours, theirs, truth = (
        adapted(library, moe.eager(make), dtype=dtype)
        for library, dtype in ((peftfast, torch.float32), (peft, torch.float32), (peft, torch.float64))
    )
    for names in MIXES:
        ids = ids_of(len(names))
        expected = alone(truth, ids, names)
        oracle.assert_no_further(
            {"logits": ours(input_ids=ids, adapter_names=names).logits},
            {"logits": alone(theirs, ids, names)},
            {"logits": expected},
            slack=1.5,  # two layers of other sums
        )
        numbers = ours.base_model.adapter_numbers(names)
        assert torch.equal(
            ours(input_ids=ids, adapter_names=numbers).logits, ours(input_ids=ids, adapter_names=names).logits
        )
        # the rows do differ by their adapters
        shifted = alone(truth, ids, [*names[1:], names[0]])
        assert (shifted - expected).abs().max() > 1e-2


@pytest.mark.parametrize("make", [moe.qwen3_moe, moe.mixtral], ids=lambda make: make.__name__)
@torch.no_grad()
def test_routers_too(make):
    """Which `all-linear` adapts: the router's matrix decides for every token by its own row's adapter."""
    names = ["c", BASE, "a", "b", "a"]
    changes = {"target_modules": "all-linear", "target_parameters": None}
    ours, truth = (
        adapted(library, moe.eager(make), dtype=dtype, **changes)
        for library, dtype in ((peftfast, torch.float32), (peft, torch.float64))
    )
    assert any(n.endswith("gate") for n in ours.base_model.inventory.layers)
    ids = ids_of(len(names))
    expected = alone(truth, ids, names)
    for choice in (names, ours.base_model.adapter_numbers(names)):
        got = ours(input_ids=ids, adapter_names=choice).logits
        torch.testing.assert_close(got, expected.float(), rtol=1e-3, atol=2e-4)
    tuner = ours.base_model  # numbers that the host does not know, as in a recorded graph
    numbers = ours.base_model.adapter_numbers(names)
    resolved = router.resolve(tuner.inventory, numbers, (ids,), {})
    unseen = Routing(resolved.names, resolved.index, None, tokens=ids.shape[1])
    with tuner.inventory.control.use(unseen):
        torch.testing.assert_close(ours(input_ids=ids).logits, expected.float(), rtol=1e-3, atol=2e-4)
    unseen.index[1] = len(unseen.names)
    with tuner.inventory.control.use(unseen):
        got = ours(input_ids=ids).logits
    assert got[1].isnan().all()
    torch.testing.assert_close(got[2:], expected[2:].float(), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("make", [moe.qwen3_moe, moe.gpt_oss], ids=lambda make: make.__name__)
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_further_from_the_oracle_than_peft_row_by_row(make, implementation, precision):
    """The experts alone, so that the routing is the same in every precision."""
    dtype, autocast, wide = PRECISIONS[precision]
    count = 320
    names = [[*ADAPTERS, BASE][i % 4] for i in range(count)]

    def step(library, dtype, wide, implementation, autocast):
        model = adapted(
            library, lambda: Experts(moe.eager(make, implementation)), dtype=dtype, wide=wide, target_modules=[]
        )
        for key, p in model.named_parameters():
            p.requires_grad_(".lora_" in key)
        generator = torch.Generator().manual_seed(2)
        experts = model.get_base_model().experts.num_experts
        x = torch.randn(count, 32, generator=generator).to(dtype).requires_grad_()
        chosen = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(count)])
        weights = torch.rand(count, 2, generator=generator).to(dtype)
        upstream = torch.randn(count, 32, generator=generator).to(dtype)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            if library is peftfast:
                y = model(x, chosen, weights, adapter_names=names)
            else:
                y = None
                for name in ADAPTERS:  # the rows of one adapter after those of another
                    where = torch.tensor([i for i, n in enumerate(names) if n == name])
                    model.base_model.set_adapter(name)
                    own = model(x[where], chosen[where], weights[where])
                    y = own.new_zeros(count, 32) if y is None else y
                    y = y.index_copy(0, where, own)
                where = torch.tensor([i for i, n in enumerate(names) if n == BASE])
                with model.disable_adapter():
                    y = y.index_copy(0, where, model(x[where], chosen[where], weights[where]))
        for key, p in model.named_parameters():
            p.requires_grad_(".lora_" in key)
        y.backward(upstream.to(y.dtype))
        found = {"output": y.detach(), "dx": x.grad}
        return found | oracle.gradients(model)

    truth = step(peft, torch.float64, True, "eager", None)
    ours = step(peftfast, dtype, wide, implementation, autocast)
    theirs = step(peft, dtype, wide, implementation, autocast)
    assert len(truth) == 2 + 2 * 2 * len(ADAPTERS)
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    oracle.assert_no_further(ours, theirs, truth)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["", "reentrant", "checkpointed"])
def test_every_adapter_gets_the_gradients_of_its_own_rows(checkpointing):
    names = ["c", BASE, "a", "c", "a"]
    ids = ids_of(len(names))
    weights = torch.linspace(0.5, 2.0, len(names), dtype=torch.float64).view(-1, 1, 1)

    def gradients(library):
        model = adapted(library, moe.eager(moe.qwen3_moe), dtype=torch.float64).train()
        model.base_model.set_adapter(list(ADAPTERS))
        if library is peftfast:
            if checkpointing is not None:
                model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            (model(input_ids=ids, adapter_names=names).logits.pow(2) * weights).sum().backward()
        else:
            for i, name in enumerate(names):
                if name != BASE:
                    model.base_model.set_adapter(name)
                    (model(input_ids=ids[i : i + 1]).logits.pow(2) * weights[i]).sum().backward()
        return oracle.gradients(model)

    ours, theirs = gradients(peftfast), gradients(peft)
    assert any(".experts." in n and ".c." in n for n in theirs) and not any(".b." in n for n in theirs)
    for name, right in theirs.items():
        torch.testing.assert_close(ours[name], right, rtol=1e-9, atol=1e-12)
    assert not any(g.any() for n, g in ours.items() if n not in theirs)


@torch.no_grad()
def test_generated_with_beams_as_alone():
    model = adapted(peftfast, moe.qwen3_moe)
    names, ids = ["b", BASE, "a"], ids_of(3)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 2}):
        together = model.generate(input_ids=ids, adapter_names=names, **options, **more)
        for i, name in enumerate(names):
            single = model.generate(input_ids=ids[i : i + 1], adapter_names=[name], **options, **more)
            assert torch.equal(together[i : i + 1], single)


# ---- what it costs --------------------------------------------------------------------------------------
def experts_alone(adapters, experts=32):
    return adapted(peftfast, lambda: Experts(lambda: moe.qwen3_moe(experts)), adapters, target_modules=[])


def decode(model, names):
    """Operations of one token a row, every row routed to two experts that no other row of its adapter is routed to."""
    first = torch.arange(len(names)) % 32
    chosen = torch.stack([first, (first + 1) % 32], dim=1)
    x, weights = torch.randn(len(names), 32), torch.full((len(names), 2), 0.5)
    with torch.no_grad(), oracle.Operations() as seen:
        model(x, chosen, weights, adapter_names=names)
    return seen


def test_the_cost_is_that_of_what_is_routed_to():
    few = experts_alone({f"n{i}": (4, 8) for i in range(4)})
    many = experts_alone({f"n{i}": (4, 8) for i in range(24)})
    names = ["n0", "n1", "n2", "n3", "n1", BASE]
    assert decode(few, names).names == decode(many, names).names
    assert decode(few, names).elements == decode(many, names).elements
    # an adapter more in the batch costs the picking of its experts, the same for the second and for the 24th
    counts = {n: len(decode(many, [f"n{i % n}" for i in range(24)]).names) for n in (2, 12, 24)}
    each = (counts[12] - counts[2]) / 10
    assert 0 < each <= 20 and counts[24] - counts[12] == 12 * each
    # nothing of the size of one adapter's factors is made
    factor = min(p.numel() for n, p in many.named_parameters() if ".lora_" in n)
    assert decode(many, ["n0", "n5"]).elements < factor


@pytest.mark.parametrize("tokens", [1, 24])
@torch.no_grad()
def test_only_the_experts_that_an_adapter_is_routed_to_are_read(tokens):
    """What is not routed to may hold anything, in the adapters as well."""
    model = experts_alone(ADAPTERS, 16)
    names = ["a"] * tokens + ["c"] * tokens
    hit = torch.tensor([[1, 6]] * tokens + [[6, 9]] * tokens)
    x, weights = torch.randn(2 * tokens, 32), torch.full((2 * tokens, 2), 0.5)
    expected = model(x, hit, weights, adapter_names=names)
    for layer in model.get_base_model().experts.nest():
        for name, kept in {"a": {1, 6}, "b": set(), "c": {6, 9}}.items():
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            for expert in set(range(16)) - kept:
                a.view(16, -1, a.shape[1])[expert] = float("nan")
                b.view(b.shape[0], -1, 16)[..., expert] = float("nan")
    assert torch.equal(model(x, hit, weights, adapter_names=names), expected)
    assert torch.isfinite(expected).all()


# ---- what is refused ------------------------------------------------------------------------------------
class Cut(Experts):
    """Its experts see fewer rows than the batch has."""

    def forward(self, x, chosen, weights):
        return self.experts(x[1:], chosen[1:], weights[1:])


def test_rows_that_do_not_fit_the_batch():
    model = adapted(peftfast, lambda: Cut(moe.qwen3_moe), target_modules=[])
    chosen, weights = torch.zeros(6, 2, dtype=torch.int64), torch.ones(6, 2)
    with pytest.raises(
        ValueError, match=r"but got 6 and 5 respectively at experts\.\w+\. A flattened batch has 6 times"
    ):
        model(torch.randn(6, 32), chosen, weights, adapter_names=["a", "b"] * 3)


def test_where_the_changed_weight_would_be_formed():
    names, message = ["a", "b"], "is adapted as a Parameter.*does not support mixed adapter batches yet where"
    model = adapted(peftfast, moe.qwen3_moe)
    hook = model.base_model.model.model.layers[1].mlp.experts.get_base_layer().register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match=f"layers.1.mlp.experts.*{message}"):
        oracle.logits(model, adapter_names=names)
    hook.remove()
    oracle.logits(model, adapter_names=names)
    stacks = {"target_parameters": ["inner", "outer", "mix"], "target_modules": []}
    plain = adapted(peftfast, moe.plain, **stacks)
    with pytest.raises(ValueError, match=f"stacks.*{message}"):
        oracle.logits(plain, adapter_names=names)


@torch.no_grad()
def test_an_adapter_without_experts_and_one_that_was_deleted():
    model = adapted(peftfast, moe.qwen3_moe)
    model.add_adapter("linears", peftfast.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    names, ids = ["linears", "c", BASE, "a"], ids_of(4)
    expected = alone(model, ids, names)
    for _ in range(2):
        oracle.close(model(input_ids=ids, adapter_names=names).logits, expected)
        if "b" in model.peft_config:
            model.delete_adapter("b")
    with model.disable_adapter():
        plain = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids, adapter_names=names).logits, plain)
