"""BD-LoRA against PEFT, against a plain LoRA with the same whole factors, and against fp64."""

import copy
import pickle
import warnings

import oracle
import peft
import pytest
import torch
from methods.bases import N, make_base, make_input
from oracle import One, randomised
from torch import nn

import peftfast
from peftfast.methods.lora.bdlora import BlockDiagonalLinear
from peftfast.ops.block_diagonal import by_blocks, spread

R, BLOCKS = 8, 4
FORMATS = ("fp32", "bf16", "nf4", "int8")
SIDES = ("a", "b")


def config(library, side, targets=("m",), **changes):
    blocks = changes.pop("nblocks", BLOCKS)
    bd = library.BdLoraConfig(**{f"target_modules_bd_{side}": list(targets)}, nblocks=blocks)
    return library.LoraConfig(**{"r": R, "lora_alpha": 12, "target_modules": list(targets), **changes}, use_bdlora=bd)


def make(side, storage="fp32", library=peftfast, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return randomised(library.get_peft_model(make_base(storage=storage), config(library, side, **changes)))


def as_plain(model, side, **changes):
    """A plain LoRA with the same factors, whole."""
    base = copy.deepcopy(model.get_base_model())
    layer = base.m
    plain = peftfast.get_peft_model(
        One(layer.base_layer), peftfast.LoraConfig(r=R, lora_alpha=12, target_modules=["m"], **changes)
    )
    own = plain.base_model.model.m
    with torch.no_grad():
        for slot in ("lora_A", "lora_B"):
            packed = getattr(layer, slot).default.weight
            whole = torch.block_diag(*packed.chunk(BLOCKS)) if slot == f"lora_{side.upper()}" else packed
            getattr(own, slot).default.weight.copy_(whole)
    return plain


def gradients(model, x, go):
    x = x.clone().requires_grad_(True)
    y = model(x)
    y.backward(go.to(y.dtype))
    found = oracle.gradients(model)
    model.zero_grad()
    return y.detach(), x.grad, found


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_blocks_are_those_of_the_whole_factor(blocks):
    packed = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    whole = spread(packed, blocks)
    assert torch.equal(whole, torch.block_diag(*packed.chunk(blocks)))
    assert torch.autograd.gradcheck(lambda p: spread(p, blocks), packed)
    x = torch.randn(5, 3 * blocks, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(by_blocks(x, packed).flatten(1), x @ whole.t())
    assert torch.autograd.gradcheck(by_blocks, (x, packed))
    theirs = peft.tuners.lora.variants.BlockDiagonalLinear(3 * blocks, 12, blocks)
    ours = BlockDiagonalLinear(3 * blocks, 12, blocks)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x.float()), theirs(x.float()))
    assert torch.equal(ours.weight_as_blockdiagonal_matrix(), theirs.weight_as_blockdiagonal_matrix())


@pytest.mark.parametrize("side", SIDES)
def test_a_seed_gives_pefts_names_factors_and_logits(side, tmp_path):
    targets = ["q_proj", "down_proj"]
    models = []
    for library in (peft, peftfast):
        torch.manual_seed(5)
        models.append(library.get_peft_model(oracle.llama(), config(library, side, targets)))
    theirs, ours = models
    own, peer = (dict(m.named_parameters()) for m in (ours, theirs))
    assert list(own) == list(peer)
    for name, p in own.items():
        torch.testing.assert_close(p, peer[name], rtol=0, atol=0)
        assert p.requires_grad == peer[name].requires_grad
    for model in models:
        randomised(model)
    torch.testing.assert_close(oracle.logits(ours), oracle.logits(theirs), rtol=1e-4, atol=1e-5)
    for library, model, name in ((peft, theirs, "theirs"), (peftfast, ours, "ours")):
        model.save_pretrained(tmp_path / name)
        reader = peftfast if library is peft else peft
        loaded = reader.PeftModel.from_pretrained(oracle.llama(), tmp_path / name)
        torch.testing.assert_close(oracle.logits(loaded), oracle.logits(ours), rtol=1e-4, atol=1e-5)
    oracle.same_files(tmp_path / "ours", tmp_path / "theirs")


def test_a_seed_gives_pefts_random_bias():
    drawn = []
    for library in (peft, peftfast):
        torch.manual_seed(5)
        adapted = library.get_peft_model(make_base(), config(library, "a", lora_bias=True, init_lora_weights=False))
        drawn.append(dict(adapted.named_parameters()))
    for name, p in drawn[0].items():
        assert torch.equal(drawn[1][name], p), name


@pytest.mark.parametrize("tokens", [3, 40, 5000])  # by blocks, and with the factors whole
@pytest.mark.parametrize("storage", FORMATS)
@pytest.mark.parametrize("side", SIDES)
def test_outputs_and_gradients_are_those_of_the_whole_factors(side, storage, tokens):
    model = make(side, storage)
    plain = as_plain(model, side)
    x, go = (
        make_input(storage=storage, rows=(tokens,)),
        torch.randn(tokens, N, generator=torch.Generator().manual_seed(4)),
    )
    (y, dx, grads), (y0, dx0, grads0) = gradients(model, x, go), gradients(plain, x, go)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if storage != "bf16" else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(y, y0, **tolerance)
    torch.testing.assert_close(dx, dx0, **tolerance)
    for name, grad in grads.items():
        whole = grads0[name]
        if f"lora_{side.upper()}" in name:
            n, k = whole.shape
            whole = torch.cat([whole.view(BLOCKS, n // BLOCKS, BLOCKS, k // BLOCKS)[i, :, i] for i in range(BLOCKS)])
        torch.testing.assert_close(grad, whole, rtol=1e-3, atol=2e-2 if storage == "bf16" else 1e-3)


@pytest.mark.parametrize("tokens", [3, 5000])
@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("side", SIDES)
def test_no_further_from_fp64_than_peft(side, storage, tokens):
    x = make_input(storage=storage, rows=(tokens,))
    ours, theirs = (make(side, storage, library) for library in (peftfast, peft))
    exact = copy.deepcopy(ours).double()(x.double())
    error, peer = (float((m(x).double() - exact).norm()) for m in (ours, theirs))
    assert error <= 1.1 * peer + 1e-7 * float(exact.norm())


@pytest.mark.parametrize("storage", FORMATS)
@pytest.mark.parametrize("side", SIDES)
def test_merging_and_back(side, storage):
    model, x = make(side, storage).eval(), make_input(storage=storage)
    layer = model.base_model.model.m
    expected, before = model(x), copy.deepcopy(layer.base_layer.state_dict())
    delta = layer.get_delta_weight("default")
    a, b = (getattr(layer, s).default for s in ("lora_A", "lora_B"))
    a, b = (m.weight_as_blockdiagonal_matrix() if hasattr(m, "nblocks") else m.weight for m in (a, b))
    torch.testing.assert_close(delta, 12 / R * b @ a)
    model.merge_adapter()
    loose = {"fp32": 1e-4, "bf16": 5e-2}.get(storage)
    if loose:  # 4 and 8 bits lose what they cannot hold
        torch.testing.assert_close(model(x), expected, rtol=loose, atol=loose)
    model.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in layer.base_layer.state_dict().items())
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("conversion", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(conversion):
    model = make("b")
    again = conversion(model)
    torch.testing.assert_close(again(make_input()), model(make_input()), rtol=0, atol=0)
    randomised(again, seed=9)
    assert not torch.allclose(again(make_input()), model(make_input()))


@pytest.mark.parametrize("rows", [(6, 3), (6, 400)])
@pytest.mark.parametrize("grad", [False, True])
def test_rows_of_several_adapters(rows, grad):
    model = make("a")
    model.add_adapter("other", config(peftfast, "b"))
    model.add_adapter("smaller", config(peftfast, "a", r=4, nblocks=2))
    randomised(model)
    model.train(grad)
    x, names = make_input(rows=rows), ["other", "__base__", "default", "smaller", "other", "default"]
    with torch.set_grad_enabled(grad):
        got = model(x, adapter_names=names)
        got = model(x, adapter_names=names)  # what was kept of the first
        for name in dict.fromkeys(names):
            where = [i for i, n in enumerate(names) if n == name]
            if name == "__base__":
                with model.disable_adapter():
                    expected = model(x[where])
            else:
                model.set_adapter(name)
                expected = model(x[where])
            torch.testing.assert_close(got[where], expected, rtol=1e-4, atol=1e-5)
    if grad:
        model.requires_grad_(True)
        model(x, adapter_names=names).sum().backward()
        assert all(bool(p.grad.any()) for n, p in model.named_parameters() if "lora_" in n)
    else:
        with torch.no_grad():
            model.base_model.model.m.lora_A.default.weight.mul_(2.0)  # writing shows
            assert not torch.allclose(model(x, adapter_names=names)[2], got[2])


def test_beside_a_plain_lora_and_several_at_once():
    model = make("a")
    model.add_adapter("other", config(peftfast, "a", nblocks=2))
    model.add_adapter("plain", peftfast.LoraConfig(r=3, target_modules=["m"]))
    randomised(model)
    x = make_input()
    with model.disable_adapter():
        base = model(x)
    total = base.clone()
    for name in ("default", "other", "plain"):
        model.set_adapter(name)
        total += model(x) - base
    model.base_model.set_adapter(["default", "other", "plain"])
    torch.testing.assert_close(model(x), total, rtol=1e-4, atol=1e-5)


def test_dropout_autocast_checkpointing_and_hooks():
    model = make("b", lora_dropout=0.5)
    plain = as_plain(model, "b", lora_dropout=0.5)
    x = make_input(rows=(4, 5))
    torch.manual_seed(0)
    dropped = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(dropped, plain(x), rtol=1e-4, atol=1e-5)
    for one in (model, plain):
        one.eval()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), plain(x), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False), plain(x), rtol=1e-4, atol=1e-5
    )
    seen = []
    handle = model.base_model.model.m.lora_B.default.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert seen == [(4, 5, N)]
    handle.remove()
    model(x)
    assert len(seen) == 1


def test_compiled():
    model, x = make("b"), make_input(rows=(300,))
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    compiled(x).sum().backward()
    grad = model.base_model.model.m.lora_B.default.weight.grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(model.base_model.model.m.lora_B.default.weight.grad, grad, rtol=1e-3, atol=1e-3)


def test_fused_blocks_compute_the_same():
    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    model = randomised(peftfast.get_peft_model(oracle.llama(hidden=64), config(peftfast, "b", targets)))
    ids = torch.randint(1, oracle.VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=ids).logits
    blocks = peftfast.fuse_blocks(model)
    for _ in range(3):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(model(input_ids=ids[:1, :4]).logits, expected[:1, :4], rtol=1e-3, atol=1e-4)
    blocks.remove()


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties"])
def test_combinations_are_plain_loras(kind):
    model = make("a")
    model.add_adapter("other", config(peftfast, "a"))
    randomised(model)
    options = {"density": 0.5} if kind == "ties" else {}
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "both", kind, **options)
    assert model.peft_config["both"].variant is None
    layer = model.base_model.model.m
    if kind in ("cat", "svd"):
        parts = [layer.get_delta_weight(name) for name in ("default", "other")]
        wanted = 0.5 * parts[0] + 2.0 * parts[1]
        if kind == "svd":
            u, s, vh = torch.linalg.svd(wanted)
            wanted = (u[:, :R] * s[:R]) @ vh[:R]
        torch.testing.assert_close(layer.get_delta_weight("both"), wanted, rtol=1e-3, atol=1e-4)
    model.add_adapter("plain", peftfast.LoraConfig(r=3, target_modules=["m"]))
    with pytest.raises(ValueError, match="Only adapters of one method.*bdlora"):
        model.add_weighted_adapter(["default", "plain"], [1.0, 1.0], "mixed")


def test_a_plain_lora_for_servers_and_what_they_do(tmp_path):
    model = randomised(peftfast.get_peft_model(oracle.llama(), config(peftfast, "a", ["down_proj"])))
    peftfast.save_as_lora(tmp_path / "plain", model, rank=R)
    loaded = peft.PeftModel.from_pretrained(oracle.llama(), tmp_path / "plain")
    torch.testing.assert_close(oracle.logits(loaded), oracle.logits(model), rtol=1e-3, atol=1e-4)
    plan = peftfast.plan_adapter(oracle.llama(), config(peftfast, "a", ["down_proj"]))
    assert plan.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {v.server: v.verdict for v in plan.servers}["vLLM"] == "refuses"
    model.save_pretrained(tmp_path / "own")
    said = str(peftfast.adapter_contents(tmp_path / "own"))
    assert f"rank {R}, change of norm" in said and f"A in {BLOCKS} blocks" in said


def test_pool_and_hot_swap(tmp_path):
    model = make("b")
    expected = model(make_input())
    model.save_pretrained(tmp_path / "one")
    other = make("b", r=4)
    other.save_pretrained(tmp_path / "smaller")
    pool = peftfast.AdapterPool(make_base(), slots=2, max_rank=R, target_modules=["m"])
    pool.register("one", tmp_path / "one")
    torch.testing.assert_close(pool(make_input(), adapter_names=["one"] * 4), expected, rtol=1e-4, atol=1e-5)
    pool.close()
    fresh = make("b")
    randomised(fresh, seed=8)
    peftfast.hotswap_adapter(fresh, str(tmp_path / "one"), "default")
    torch.testing.assert_close(fresh(make_input()), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="cannot be padded"):
        peftfast.hotswap_adapter(fresh, str(tmp_path / "smaller"), "default")
    torch.testing.assert_close(fresh(make_input()), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="cannot be padded"):
        peftfast.prepare_model_for_compiled_hotswap(fresh, target_rank=R)
    plain = peftfast.get_peft_model(make_base(), peftfast.LoraConfig(r=R, target_modules=["m"]))
    with pytest.raises(ValueError, match="use_bdlora"):
        peftfast.hotswap_adapter(plain, str(tmp_path / "one"), "default")


@pytest.mark.parametrize("start", [True, False, "gaussian"])
@pytest.mark.parametrize("side", SIDES)
def test_starts(side, start):
    model = peftfast.get_peft_model(make_base(), config(peftfast, side, init_lora_weights=start, r=16))
    layer = model.base_model.model.m
    with model.disable_adapter():
        base = model(make_input())
    assert torch.equal(model(make_input()), base) is (start is not False)
    if start == "gaussian":
        assert 0.7 / 16 < float(layer.lora_A.default.weight.std()) < 1.3 / 16


def test_lora_bias_beside_a_block_diagonal_a():
    model, x = make("a", lora_bias=True), make_input()
    plain = as_plain(model, "a", lora_bias=True)
    bias = model.base_model.model.m.lora_B.default.bias
    assert bool(bias.any())
    with torch.no_grad():
        plain.base_model.model.m.lora_B.default.bias.copy_(bias)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_bdlora": {"target_modules_bd_a": ["nowhere"]}}, "m matches neither A nor B.*match_strict"),
        ({"use_bdlora": {"target_modules_bd_a": ["m"], "target_modules_bd_b": [""]}}, "matches both A and B"),
        ({"use_bdlora": {"target_modules_bd_a": ["m"], "nblocks": 3}}, "m: .*in_features=64.*not divisible by.*3"),
        ({"use_bdlora": {"target_modules_bd_b": ["m"], "nblocks": 4}, "r": 6}, "in_features=6.*not divisible by"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*use one of True, False, 'gaussian'"),
        ({"lora_bias": True, "use_bdlora": {"target_modules_bd_b": ["m"]}}, "block-diagonal B has no bias"),
        ({"use_dora": True}, "combination: use_dora, use_bdlora"),
        (
            {"use_bdlora": {"target_modules_bd_a": ["m"], "target_modules_bd_b": ["m"]}},
            r"\['m'\] cannot have both A and",
        ),
    ],
)
def test_refusals_change_nothing(changes, message):
    base = make_base()
    with pytest.raises(ValueError, match=message):
        options = {"r": R, "target_modules": ["m"], "use_bdlora": {"target_modules_bd_a": ["m"], "nblocks": BLOCKS}}
        peftfast.get_peft_model(base, peftfast.LoraConfig(**{**options, **changes}))
    assert [n for n, _ in base.named_parameters()] == ["m.weight", "m.bias"]


@pytest.mark.parametrize("module", [nn.Embedding(8, 16), nn.Conv2d(8, 8, 3)])
def test_other_modules_are_refused(module):
    with pytest.raises(ValueError, match=f"use_bdlora is for linear layers, not for a {type(module).__name__}"):
        peftfast.get_peft_model(One(module), config(peftfast, "a"))


def test_not_strict_makes_plain_loras():
    bd = peftfast.BdLoraConfig(target_modules_bd_a=["down_proj"], nblocks=2, match_strict=False)
    model = peftfast.get_peft_model(
        oracle.llama(), peftfast.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_bdlora=bd)
    )
    kinds = {n.split(".")[-3]: type(m) for n, m in model.named_modules() if n.endswith("lora_A.default")}
    assert kinds == {"q_proj": nn.Linear, "down_proj": BlockDiagonalLinear}
    assert all(type(m) is nn.Linear for n, m in model.named_modules() if n.endswith("lora_B.default"))


def test_adalora_has_none():
    with pytest.raises(ValueError, match="ADALORA does not support use_bdlora"):
        peftfast.AdaLoraConfig(total_step=10, use_bdlora=peftfast.BdLoraConfig())
