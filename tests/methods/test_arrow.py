"""Arrow and GenKnowSub: which experts a token is sent through and what comes out, beside PEFT and an fp64 formula."""

from __future__ import annotations

import copy
import pickle

import oracle
import peft
import pytest
import torch
from torch import nn

import peftfast
from peftfast import ArrowConfig, LoraConfig
from peftfast.methods.lora import arrow

TARGETS = ["q_proj", "down_proj"]
IDS = torch.randint(1, oracle.VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))


def save_expert(folder, seed: int, **options) -> str:
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 3, "target_modules": TARGETS, "init_lora_weights": False, **options})
    oracle.randomised(peftfast.get_peft_model(oracle.llama(), config), 0.3, seed).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    return [save_expert(root / f"expert{i}", i, lora_alpha=4 + i) for i in range(4)]


@pytest.fixture(scope="module")
def general(tmp_path_factory):
    root = tmp_path_factory.mktemp("general")
    return [save_expert(root / f"general{i}", 10 + i) for i in range(2)]


def routed(library, paths, general=None, base: nn.Module | None = None, **options) -> nn.Module:
    config = library.ArrowConfig(**{"top_k": 2, "use_gks": bool(general), **options})
    model = library.create_arrow_model(oracle.llama() if base is None else base, paths, config, general)
    return model.eval()


@pytest.fixture
def exact_peft(monkeypatch):
    """PEFT's power iteration has not converged where singular values are close."""

    def vector(self, a, b):
        return torch.linalg.svd(b.double() @ a.double())[2][0].float()

    monkeypatch.setattr(peft.tuners.lora.arrow.ArrowLoraLinearLayer, "top_right_singular_vec_from_BA", vector)


def layer_of(model: nn.Module):
    return model.base_model.model.model.layers[0].self_attn.q_proj


def pairs_of(layer, names: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.lora_A[n].weight, layer.lora_B[n].weight) for n in names]


def formula(
    layer, x: torch.Tensor, names: list[str], general: list[str], top_k: int, temperature: float
) -> torch.Tensor:
    """What the router adds, in fp64, one expert after the other."""
    x = x.double()
    pairs = [(a.double(), b.double()) for a, b in pairs_of(layer, names)]
    if general:
        known = pairs_of(layer, general)
        a0, b0 = (sum(f[i].double() for f in known) / len(known) for i in (0, 1))
        pairs = [(a - a0, b - b0) for a, b in pairs]
    prototypes = torch.stack([torch.linalg.svd(b @ a)[2][0] for a, b in pairs])
    alike = (x @ prototypes.t()).abs()
    least = alike.topk(top_k, -1).values[..., -1:]
    weights = torch.where(alike >= least, alike / temperature, float("-inf")).softmax(-1)
    each = [x @ a.t() @ b.t() * layer.scaling[n] for (a, b), n in zip(pairs, names, strict=True)]
    return sum(weights[..., i : i + 1] * y for i, y in enumerate(each))


# ---- what comes out --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gks", [False, True])
@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_k": 4, "router_temperature": 0.3}])
def test_logits_and_what_flows_back_are_pefts(paths, general, exact_peft, gks, options):
    found = []
    for library in (peftfast, peft):
        model = routed(library, paths, general if gks else None, **options)
        inputs = model.get_input_embeddings()(IDS).detach().requires_grad_()
        logits = model(inputs_embeds=inputs).logits
        logits.square().mean().backward()
        found.append((logits, inputs.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("gks", [False, True])
def test_the_formula_in_fp64(paths, general, size, gks):
    model = routed(peftfast, paths, general if gks else None, router_temperature=0.7)
    layer = layer_of(model)
    torch.manual_seed(0)
    x = torch.randn(*((2, 5) if size == "small" else (40, 60)), 32, requires_grad=True)
    names, known = [f"task_{i}" for i in range(4)], ["gks_0", "gks_1"] * gks
    expected = formula(layer, x, names, known, 2, 0.7)
    y = layer(x)
    torch.testing.assert_close((y - layer.get_base_layer()(x)).double(), expected, rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    (truth,) = torch.autograd.grad(expected + layer.get_base_layer()(x).double(), x, dy.double(), create_graph=True)
    torch.testing.assert_close(dx, truth.float(), rtol=1e-4, atol=1e-5)
    # and once more, through the coefficients too
    (ddx,) = torch.autograd.grad(dx.square().sum(), x)
    (ddx_truth,) = torch.autograd.grad(truth.square().sum(), x)
    torch.testing.assert_close(ddx, ddx_truth, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["bf16", "fp16", "autocast"])
def test_half_precision_chooses_as_fp64_does(paths, mode):
    """A token's experts are chosen by numbers that nothing has rounded but its features."""
    model = routed(peftfast, paths)
    layer = layer_of(model)
    dtype = torch.float16 if mode == "fp16" else torch.bfloat16
    if mode != "autocast":
        layer.get_base_layer().to(dtype)
    torch.manual_seed(0)
    x = torch.randn(30, 50, 32).to(dtype)
    with torch.autocast("cpu", dtype, enabled=mode == "autocast"), torch.no_grad():
        change = (layer(x) - layer.get_base_layer()(x)).double()
    expected = formula(layer, x, [f"task_{i}" for i in range(4)], [], 2, 1.0)
    wrong = (change - expected).norm(dim=-1) > 0.1 * expected.norm(dim=-1).mean()
    assert not wrong.any(), int(wrong.sum())


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_quantised_bases(paths, storage):
    from peftfast.base.weight import QUANTIZERS

    base = oracle.llama()
    for block in base.model.layers:
        block.self_attn.q_proj = QUANTIZERS[storage].module(block.self_attn.q_proj.weight, None)
    model = routed(peftfast, paths, base=base)
    layer = layer_of(model)
    x = torch.randn(2, 4, 32)
    # bitsandbytes' own module decodes such narrow rows wrongly on some processors (see README)
    base = x @ layer.site.weight.dense(torch.float32).t() if storage == "nf4" else layer.get_base_layer()(x)
    expected = formula(layer, x, [f"task_{i}" for i in range(4)], [], 2, 1.0).float()
    torch.testing.assert_close(layer(x) - base, expected, rtol=1e-3, atol=1e-4)


def test_prototypes():
    """The top right singular vector, also where power iteration does not get there; none of an untrained expert."""
    torch.manual_seed(0)
    q1, q2 = torch.linalg.qr(torch.randn(40, 4))[0], torch.linalg.qr(torch.randn(30, 4))[0]
    values = torch.tensor([1.0, 0.99, 0.98, 0.1])
    mix = torch.randn(4, 4)
    a, b = mix @ q2.t(), (q1 * values) @ torch.linalg.inv(mix)
    found = arrow._prototype(a, b)
    assert abs(float(found @ q2[:, 0])) > 1 - 1e-4
    assert not arrow._prototype(a, torch.zeros(40, 4)).any()


def test_one_product_for_all_experts(paths, monkeypatch):
    model = routed(peftfast, paths)
    layer = layer_of(model)
    layer(torch.randn(2, 3, 32))
    calls = []
    adapt = type(layer.site).adapt
    monkeypatch.setattr(type(layer.site), "adapt", lambda self, *args: calls.append(args) or adapt(self, *args))
    monkeypatch.setattr(arrow, "_made", lambda *args: pytest.fail("made again"))
    with torch.no_grad():
        layer(torch.randn(2, 3, 32))
    assert len(calls) == 1 and calls[0][2].shape == (12, 32)


# ---- what is live ----------------------------------------------------------------------------------------------------
def test_experts_may_come_change_and_go(paths, general, tmp_path):
    together = routed(peftfast, paths, general)
    later = routed(peftfast, paths[:2], general)
    with torch.no_grad():
        first = later(IDS).logits
        for i in (2, 3):
            later.load_adapter(paths[i], adapter_name=f"late{i}")
        torch.testing.assert_close(later(IDS).logits, together(IDS).logits)
        for i in (2, 3):
            later.delete_adapter(f"late{i}")
        torch.testing.assert_close(later(IDS).logits, first)
        # written to, rescaled, replaced, hot-swapped
        layer = layer_of(later)
        layer.lora_B["task_1"].weight.mul_(-2)
        changed = later(IDS).logits
        assert (changed - first).abs().max() > 1e-3
        layer.set_scale("task_0", 3.0)
        scaled = later(IDS).logits
        assert (scaled - changed).abs().max() > 1e-4
        layer.lora_A["task_0"].weight = nn.Parameter(layer.lora_A["task_0"].weight.flip(0))
        replaced = later(IDS).logits
        assert (replaced - scaled).abs().max() > 1e-4
        peftfast.hotswap_adapter(later, paths[1], "task_1")
        assert (later(IDS).logits - replaced).abs().max() > 1e-4
        layer.lora_B["task_1"].weight.data.mul_(5)
        later.base_model.forget_stacks()
        x = torch.randn(2, 3, 32)
        expected = formula(layer, x, ["task_0", "task_1"], ["gks_0", "gks_1"], 2, 1.0)
        torch.testing.assert_close((layer(x) - layer.get_base_layer()(x)).double(), expected, rtol=1e-4, atol=1e-5)


def test_general_knowledge_is_taken_away_without_writing_to_the_experts(paths, general):
    """PEFT writes the difference into the experts, at the first forward of the router."""
    model = routed(peftfast, paths, general)
    model(IDS)
    model.set_adapter("task_0")
    alone = peftfast.PeftModel.from_pretrained(oracle.llama(), paths[0])
    assert torch.equal(model(IDS).logits, alone(IDS).logits)


def test_ranks_may_differ_where_an_expert_is_added(paths, tmp_path):
    model = routed(peftfast, paths)
    model.load_adapter(save_expert(tmp_path, 20, r=5), adapter_name="wider")
    layer = layer_of(model)
    x = torch.randn(2, 3, 32)
    expected = formula(layer, x, [f"task_{i}" for i in range(4)] + ["wider"], [], 2, 1.0)
    torch.testing.assert_close((layer(x) - layer.get_base_layer()(x)).double(), expected, rtol=1e-4, atol=1e-5)


def test_experts_that_train_get_their_gradients(paths, exact_peft):
    found = []
    for library in (peftfast, peft):
        model = routed(library, paths)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("task_" in name)
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 2 * 2 * 2 * 4
    for name in found[0]:
        torch.testing.assert_close(
            found[0][name], found[1][name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n} {m}"
        )
    # and once they have changed, so have the prototypes
    model = routed(peftfast, paths)
    model.set_adapter("task_0")
    model(input_ids=IDS, labels=IDS).loss.backward()
    before = model(input_ids=IDS).logits
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.sub_(parameter.grad)
    assert not torch.equal(model(input_ids=IDS).logits, before)


# ---- beside others ---------------------------------------------------------------------------------------------------
def test_mixed_rows(paths, exact_peft):
    names = ["arrow_router", "task_1", "__base__"]
    ours, theirs = (routed(library, paths) for library in (peftfast, peft))
    with torch.no_grad():
        logits = ours(input_ids=IDS, adapter_names=names).logits
        torch.testing.assert_close(logits, theirs(input_ids=IDS, adapter_names=names).logits, rtol=1e-4, atol=1e-5)
        numbers = ours.base_model.adapter_numbers(names)
        torch.testing.assert_close(ours(input_ids=IDS, adapter_names=numbers).logits, logits)


def test_generation_checkpointing_copies_and_compilers(paths):
    model = routed(peftfast, paths)
    expected = model(input_ids=IDS, use_cache=False).logits
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    torch.testing.assert_close(
        model.generate(input_ids=IDS, **options), model.generate(input_ids=IDS, use_cache=False, **options)
    )
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(input_ids=IDS, use_cache=False).logits, expected)
        layer_of(other).lora_B["task_0"].weight.data.zero_()
    assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=IDS).logits, oracle.llama()(input_ids=IDS).logits)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    model.train().gradient_checkpointing_enable()
    torch.testing.assert_close(model(input_ids=IDS, labels=IDS).logits, expected)


def test_saved_and_loaded(paths, general, tmp_path):
    """PEFT cannot load what it saves of a router."""
    ours, theirs = routed(peftfast, paths, general), routed(peft, paths, general)
    oracle.same_live_state(ours, theirs)
    expected = ours(input_ids=IDS).logits
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = (oracle.saved_config(tmp_path / name / "arrow_router") for name in ("ours", "theirs"))
    assert mine == other
    again = peftfast.PeftModel.from_folder(oracle.llama(), tmp_path / "ours")
    assert again.active_adapters == ["arrow_router"]
    torch.testing.assert_close(again(input_ids=IDS).logits, expected)
    assert "through 2 of the model's other adapters" in str(
        peftfast.adapter_contents(tmp_path / "ours" / "arrow_router")
    )


# ---- what it refuses -------------------------------------------------------------------------------------------------
def test_creation_refuses_and_leaves_the_base_model_alone(paths, general, tmp_path):
    base = oracle.llama()
    before = {n: type(m) for n, m in base.named_modules()}
    wider = save_expert(tmp_path / "wider", 1, r=5)
    others = save_expert(tmp_path / "others", 1, target_modules=["k_proj"])
    table = save_expert(tmp_path / "table", 1, target_modules=["embed_tokens"])
    dora = save_expert(tmp_path / "dora", 1, use_dora=True)
    (tmp_path / "empty").mkdir()
    cases = [
        (ValueError, "rank mismatch: 5 != 3", [*paths, wider], {}),
        (ValueError, "target_modules mismatch.*k_proj", [paths[0], others], {}),
        (TypeError, "only target Linear-like layers.*Embedding", [table], {}),
        (ValueError, "experts are plain LoRAs.*task_4 at .* is Dora", [*paths, dora], {}),
        (ValueError, "at least one adapter path", [], {}),
        (ValueError, "does not contain", [str(tmp_path / "empty")], {}),
        (ValueError, "neither an existing folder", [paths[0], str(tmp_path / "nowhere")], {}),
        (ValueError, "general LoRA paths", paths, {"use_gks": True}),
        (TypeError, "a list of folders and Hub repositories, got '", paths[0], {}),
    ]
    for error, message, given, options in cases:
        with pytest.raises(error, match=message):
            peftfast.create_arrow_model(base, given, ArrowConfig(**options))
        assert {n: type(m) for n, m in base.named_modules()} == before
    with pytest.raises(TypeError, match="a list of folders and Hub repositories, got '"):
        peftfast.create_arrow_model(base, paths, ArrowConfig(use_gks=True), general[0])
    with pytest.raises(TypeError, match="must be an ArrowConfig .*, got {'top_k': 2}"):
        peftfast.create_arrow_model(base, paths, {"top_k": 2})
    with pytest.warns(UserWarning, match="general_adapter_paths are not loaded"):
        peftfast.create_arrow_model(base, paths, ArrowConfig(), general)


def test_refusals(paths, general, tmp_path):
    model = routed(peftfast, paths)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match="Cannot merge an active Arrow router adapter"):
            merge()
    with pytest.raises(ValueError, match="arrow_router.*combine the experts"):
        model.base_model.add_weighted_adapter(["arrow_router"], [1.0], "two")
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peftfast.convert_to_lora(model, 2, "arrow_router")
    with pytest.raises(ValueError, match="arrow_router.*recording"):
        peftfast.capture_decoding(model, batch_size=1, max_length=20)
    with pytest.raises(ValueError, match="top_k=5 is more than there are experts, 4"):
        routed(peftfast, paths, top_k=5)(input_ids=IDS)
    model.add_adapter("odd", LoraConfig(target_modules=TARGETS, use_dora=True))
    with pytest.raises(ValueError, match="experts are plain LoRAs.*odd.*Dora"):
        model(input_ids=IDS)
    model = routed(peftfast, paths, general)
    model.load_adapter(save_expert(tmp_path, 1, r=5), adapter_name="wider")
    with pytest.raises(ValueError, match="one rank.*'wider': 5"):
        model(input_ids=IDS)
    for name in ("gks_0", "gks_1", "wider"):
        model.delete_adapter(name)
    with pytest.raises(ValueError, match="no adapter of general knowledge"):
        model(input_ids=IDS)
    alone = peftfast.get_peft_model(oracle.llama(), LoraConfig(target_modules=TARGETS, arrow_config=ArrowConfig()))
    with pytest.raises(ValueError, match="no adapters to choose from"):
        alone(input_ids=IDS)
    with pytest.raises(TypeError, match="embed_tokens.*features of tokens"):
        peftfast.get_peft_model(oracle.llama(), LoraConfig(target_modules=["embed_tokens"], arrow_config=ArrowConfig()))
    for options in ({"lora_dropout": 0.1}, {"lora_bias": True}):
        with pytest.raises(ValueError, match="a router .arrow_config. has no factors"):
            LoraConfig(arrow_config=ArrowConfig(), **options)
    for options in ({"top_k": 0}, {"router_temperature": 0.0}, {"router_temperature": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ArrowConfig(**options)


def test_what_servers_do_with_it():
    from peftfast.interop.servers import Facts, judge_servers

    config = LoraConfig(target_modules=TARGETS, arrow_config=ArrowConfig())
    assert {v.verdict for v in judge_servers(Facts(config, [8], [8], 16))} == {"loads, wrong output"}


def test_shapes_on_the_meta_device(paths):
    logits = routed(peftfast, paths).to("meta")(input_ids=IDS.to("meta")).logits
    assert logits.shape == (*IDS.shape, oracle.VOCABULARY)
