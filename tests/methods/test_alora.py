"""aLoRA: the tokens that an adapter acts on, beside PEFT and beside an fp64 model that leaves the others alone."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import oracle
import peft
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import peftfast
from peftfast.methods.lora import alora
from peftfast.rows.invoked import Invoked, last_occurrences
from peftfast_kernels import use_backend

CALL = [5, 6]
OPTIONS = {"r": 4, "target_modules": "all-linear", "alora_invocation_tokens": CALL, "task_type": "CAUSAL_LM"}


def ids_with(*places: int | None, length: int = 12, call: list[int] = CALL) -> torch.Tensor:
    """A sample for each place, in which the sequence starts there for the last time; None: nowhere."""
    generator = torch.Generator().manual_seed(len(places))
    ids = torch.randint(8, oracle.VOCABULARY, (len(places), length), generator=generator)
    for row, place in enumerate(places):
        if place is not None:
            for start in {place % 3, place}:
                ids[row, start : start + len(call)] = torch.tensor(call)
    return ids


IDS = ids_with(3, 8, None, 0)


def twins(**changes) -> oracle.Twins:
    hidden = changes.pop("hidden", 32)
    return oracle.Twins(lambda: oracle.llama(hidden=hidden), {**OPTIONS, **changes})


def wrap(*, base: nn.Module | None = None, seed: int = 1, **changes) -> nn.Module:
    torch.manual_seed(seed)
    config = oracle.quietly(peftfast.LoraConfig, **{**OPTIONS, "init_lora_weights": False, **changes})
    return peftfast.get_peft_model(oracle.llama() if base is None else base, config).eval()


def step(model: nn.Module, ids: torch.Tensor, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(input_ids=ids, labels=ids, **inputs)
    output.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return output.logits.detach(), grads


def exact(model: nn.Module, ids: torch.Tensor, offsets: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients in fp64, of PEFT's plain layers whose change is set to zero where it should be."""
    model = copy.deepcopy(model).double()
    acts = torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(offsets)[:, None]
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.lora_variant.clear()
            # what stands before the invocation neither goes into the factors nor comes out of them
            layer.lora_A["default"].register_forward_hook(lambda m, args, t: torch.where(acts[..., None], t, 0))
    return step(model, ids, alora_offsets=None)


def offsets_of(ids: torch.Tensor, call: list[int] = CALL) -> list[int]:
    config = peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=call)
    return [n or 0 for n in peft.tuners.lora.variants.calculate_alora_offsets({"a": config}, "a", ids)]


# ---- where it acts ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("call", [[1], [1, 2], [2, 2], [1, 1, 2], list(range(9))])
def test_the_last_occurrence_is_found(call):
    ids = torch.randint(0, 3, (300, 8), generator=torch.Generator().manual_seed(len(call)))
    found = last_occurrences(ids, call)
    assert found.tolist() == offsets_of(ids, call)
    configs = {"a": oracle.quietly(peftfast.LoraConfig, alora_invocation_tokens=call)}
    listed = alora.calculate_alora_offsets(configs, "a", ids)
    assert [n or 0 for n in listed] == found.tolist() and all(n is None or n > 0 for n in listed)


def test_names_files_and_config_are_pefts(tmp_path):
    both = twins()
    oracle.same_live_state(both.ours, both.theirs)
    both.ours.save_pretrained(tmp_path / "ours")
    both.theirs.save_pretrained(tmp_path / "theirs")
    oracle.same_files(tmp_path / "ours", tmp_path / "theirs")
    again = peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path / "theirs")
    torch.testing.assert_close(again(input_ids=IDS).logits, both.ours(input_ids=IDS).logits, rtol=0, atol=0)


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_logits_and_gradients(size, mode):
    """No further from fp64 than PEFT's over some batches, give or take what orders of sums do over a whole model; large
    inputs go by the autograd Function, small ones by torch's formula."""
    both = twins(hidden=64 if size == "large" else 32)
    starts = [3, 8, None, 0, 30, 40]
    batches = [ids_with(*(starts[i:] + starts[:i]) * 4, length=48) for i in range(3)] if size == "large" else [IDS]
    if mode == "bf16":
        for model in (both.ours, both.theirs):
            for parameter in model.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()

    def of_all(one):
        found = [{"logits": logits, **grads} for logits, grads in map(one, batches)]
        return {name: torch.stack([each[name] for each in found]) for name in found[0]}

    truth = of_all(lambda ids: exact(both.theirs, ids, offsets_of(ids)))
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        found = [of_all(lambda ids, model=model: step(model, ids)) for model in (both.ours, both.theirs)]
    oracle.assert_no_further(*found, truth, slack=1.3)


def test_before_the_invocation_the_model_is_the_base_model_bit_for_bit():
    model = wrap()
    with model.disable_adapter():
        base = model(input_ids=IDS).logits
    logits = model(input_ids=IDS).logits
    for row, offset in enumerate(offsets_of(IDS)):
        start = IDS.shape[1] - offset
        torch.testing.assert_close(logits[row, :start], base[row, :start], rtol=1e-5, atol=1e-5)
        assert offset == 0 or (logits[row, start:] - base[row, start:]).abs().amax(-1).min() > 1e-3


def test_what_is_not_finite_before_the_invocation_does_not_come_in():
    layer = nn.Linear(8, 8)
    model = peftfast.get_peft_model(
        nn.Sequential(layer), oracle.quietly(peftfast.LoraConfig, target_modules=["0"], alora_invocation_tokens=[1])
    )
    with torch.no_grad():
        model.base_model.model[0].lora_A["default"].weight.fill_(1e38)
    x = torch.ones(1, 3, 8, requires_grad=True)
    y = model(x * 100, alora_offsets=[0])
    assert torch.equal(y, layer(x * 100))
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("given", [[1, None, 3, 12], torch.tensor([1, 0, 3, 12]), [50, 0, 0, 0]])
def test_offsets_may_be_given(given):
    both = twins()
    listed = given.tolist() if isinstance(given, torch.Tensor) else given
    theirs = both.theirs(input_ids=IDS, alora_offsets=listed).logits
    torch.testing.assert_close(both.ours(input_ids=IDS, alora_offsets=given).logits, theirs)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_quantised_bases(storage):
    from peftfast.base.weight import QUANTIZERS

    torch.manual_seed(0)
    plain = nn.Linear(64, 48)
    base = nn.Sequential(QUANTIZERS[storage].module(plain.weight, plain.bias))
    config = oracle.quietly(
        peftfast.LoraConfig, target_modules=["0"], alora_invocation_tokens=[1], init_lora_weights=False
    )
    model = peftfast.get_peft_model(base, config)
    x = torch.randn(2, 5, 64)
    with model.disable_adapter():
        before = model(x)
    layer = model.base_model.model[0]
    change = x @ layer.lora_A["default"].weight.t() @ layer.lora_B["default"].weight.t()
    acts = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    torch.testing.assert_close(model(x, alora_offsets=[2, None]), before + torch.where(acts[..., None], change, 0))


def test_embeddings_biases_and_dropout():
    """PEFT adapts embeddings as if the adapter acted on all tokens."""
    model = wrap(target_modules=["embed_tokens", "q_proj"])
    table = model.base_model.model.model.embed_tokens
    acts = torch.arange(12) >= 12 - torch.tensor(offsets_of(IDS))[:, None]
    seen = []
    table.register_forward_hook(lambda m, args, y: seen.append(y.detach()))
    model(input_ids=IDS)
    change = (
        table.get_base_layer()(IDS)
        + torch.where(
            acts[..., None],
            (table.lora_embedding_B["default"] @ table.lora_embedding_A["default"])[:, IDS].permute(1, 2, 0),
            0,
        )
        * table.scaling["default"]
    )
    torch.testing.assert_close(seen[0], change)

    both = twins(lora_bias=True)
    torch.testing.assert_close(both.ours(input_ids=IDS).logits, both.theirs(input_ids=IDS).logits)

    model = wrap(lora_dropout=0.5).train()
    assert not torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)
    untouched = model(input_ids=IDS).logits[2]
    with model.disable_adapter():
        torch.testing.assert_close(untouched, model(input_ids=IDS).logits[2])


def test_hooks_on_the_factors_modules_are_called():
    both = twins()
    for model in (both.ours, both.theirs):
        model.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].register_forward_hook(
            lambda module, args, y: y * 2 + 1
        )
    torch.testing.assert_close(both.ours(input_ids=IDS).logits, both.theirs(input_ids=IDS).logits)


# ---- generating ------------------------------------------------------------------------------------------------------
def generated(model: nn.Module, ids: torch.Tensor = IDS, **options) -> torch.Tensor:
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    return oracle.quietly(model.generate, input_ids=ids, **options)


def by_hand(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """All tokens again in every step, the adapter from the prompt's invocation on."""
    offsets = offsets_of(ids)
    for made in range(8):
        given = [n and n + made for n in offsets]
        ids = torch.cat([ids, model(input_ids=ids, alora_offsets=given).logits[:, -1:].argmax(-1)], 1)
    return ids


def test_generating_is_pefts():
    both = twins()
    expected = by_hand(both.ours, IDS)
    assert torch.equal(generated(both.ours), expected)
    assert torch.equal(generated(both.theirs), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 5},
        {"alora_offsets": offsets_of(IDS)},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_way_of_generating_acts_on_the_same_tokens(options):
    model = wrap()
    expected = by_hand(model, IDS)
    found = generated(model, **options)
    assert torch.equal(found[:: options.get("num_return_sequences", 1)], expected)


def test_assisted_generation_and_a_cache_of_the_base_model():
    """What aLoRA is for: the base model's cache of what comes before the invocation is used as it is."""
    model = wrap()
    for ids in (IDS[:1], IDS[1:2]):
        expected = by_hand(model, ids)
        assert torch.equal(generated(model, ids, prompt_lookup_num_tokens=3), expected)
        start = ids.shape[1] - offsets_of(ids)[0]
        with model.disable_adapter():
            cache = model(input_ids=ids[:, :start], use_cache=True).past_key_values
        assert torch.equal(generated(model, ids, past_key_values=cache), expected)


def test_left_padding():
    model = wrap()
    ids, mask = IDS[:2].clone(), torch.ones(2, 12, dtype=torch.int64)
    alone = generated(model, ids[:1, 3:])[:, 9:]
    ids[0, :3], mask[0, :3] = 0, 0
    assert torch.equal(generated(model, ids, attention_mask=mask)[:1, 12:], alone)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_tokens_in_a_cache_count(name):
    """Under the name that transformers has for it since 5.24, too: steps acted on no token."""
    from transformers import DynamicCache

    note, cache = Invoked(torch.tensor([2, 0]), total=8, tokens=8, fewest=0), DynamicCache()
    cache.update(torch.zeros(2, 1, 8, 1), torch.zeros(2, 1, 8, 1), 0)
    note.step({"input_ids": torch.zeros(2, 1, dtype=torch.long), name: cache})
    assert note.ends().tolist() == [3, 0]


def test_a_step_after_the_invocation_is_a_plain_lora(monkeypatch):
    model = wrap()
    gates, gate = [], alora._gate
    monkeypatch.setattr(alora, "_gate", lambda *args: gates.append(args) or gate(*args))
    generated(model, IDS[[0, 1]])
    assert len(gates) == 14  # of the prompt, two layers of seven linears; none in a step


# ---- several adapters ------------------------------------------------------------------------------------------------
def three() -> nn.Module:
    model = wrap()
    for name, changes in {
        "other": {"alora_invocation_tokens": [7], "r": 2},
        "plain": {"alora_invocation_tokens": None},
    }.items():
        torch.manual_seed(len(name))
        model.add_adapter(name, peftfast.LoraConfig(**{**OPTIONS, "init_lora_weights": False, **changes}))
    return model.eval()


def mixed_ids() -> torch.Tensor:
    ids = ids_with(3, 8, 4, 0, None, 2)
    ids[[1, 2, 5], [4, 9, 6]] = 7
    return ids


MIXES = [
    ["default", "other", "plain", "__base__", "default", "other"],
    ["default", "other", "other", "default", "other", "default"],
    ["default"] * 6,
]


@pytest.mark.parametrize("names", MIXES, ids=["all", "aloras", "one"])
@pytest.mark.parametrize("by_number", [False, True])
def test_an_adapter_for_every_row(names, by_number):
    model, ids = three(), mixed_ids()
    choice = model.base_model.adapter_numbers(names) if by_number else names
    alone = {}
    for name in dict.fromkeys(names):
        if name != "__base__":
            model.base_model.set_adapter(name)
            alone[name] = model(input_ids=ids).logits, generated(model, ids)
    with model.disable_adapter():
        alone["__base__"] = model(input_ids=ids).logits, generated(model, ids)
    for _ in range(2):  # the second time with what the first time kept
        with torch.no_grad():
            logits = model(input_ids=ids, adapter_names=choice).logits
        made = generated(model, ids, adapter_names=choice)
        for row, name in enumerate(names):
            torch.testing.assert_close(logits[row], alone[name][0][row])
            assert torch.equal(made[row], alone[name][1][row]), (row, name)


@pytest.mark.parametrize("names", MIXES[:2], ids=["all", "aloras"])
def test_mixed_rows_train_each_adapter_as_if_alone(names):
    model, ids = three(), mixed_ids()
    model.set_requires_grad(["default", "other", "plain"])
    logits = model(input_ids=ids, adapter_names=names).logits
    logits.square().mean().backward()
    found = oracle.gradients(model)
    model.zero_grad()
    for row, name in enumerate(names):
        if name != "__base__":
            model.base_model.set_adapter(name)
            (model(input_ids=ids[row : row + 1]).logits.square().sum() / logits.numel()).backward()
    for name, parameter in model.named_parameters():
        if name in found:
            torch.testing.assert_close(
                found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("by_number", [False, True])
def test_the_routed_kernels_leave_tokens_out(by_number):
    """As a GPU computes mixed rows: a token before its sample's invocation has no adapter."""
    small = {"target_modules": ["q_proj"], "init_lora_weights": False}
    model = wrap(base=oracle.llama(layers=1), **small)
    model.add_adapter("other", peftfast.LoraConfig(**{**OPTIONS, **small, "alora_invocation_tokens": [7]}))
    ids, names = mixed_ids()[:3], ["default", "other", "__base__"]
    model.set_requires_grad(["default", "other"])
    found = []
    for backend in ("torch", "triton"):
        choice = model.base_model.adapter_numbers(names) if by_number else names
        with use_backend(backend):
            model.zero_grad()
            logits = model(input_ids=ids, adapter_names=choice).logits
            logits.square().mean().backward()
        found.append((logits, [p.grad.clone() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_mixed_rows_that_cannot_be_stacked():
    model, ids = three(), mixed_ids()
    model.add_adapter("biased", peftfast.LoraConfig(**OPTIONS, lora_bias=True, init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora_B.biased" in name:
            nn.init.normal_(parameter)
    names = ["default", "biased", "default", "biased", "__base__", "default"]
    logits = model(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        context = model.disable_adapter() if name == "__base__" else warnings.catch_warnings()
        if name != "__base__":
            model.set_adapter(name)
        with context:
            torch.testing.assert_close(logits[row], model(input_ids=ids).logits[row])


def test_several_active_each_from_its_own_sequence_on():
    model, ids = three(), mixed_ids()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    seen = []
    layer.register_forward_hook(lambda m, args, y: seen.append((args[0].detach(), y.detach())))
    model.base_model.set_adapter(["default", "other", "plain"])
    model(input_ids=ids)
    (x, y), expected = seen[0], layer.get_base_layer()(seen[0][0])
    for name, call in {"default": CALL, "other": [7], "plain": None}.items():
        ends = torch.full((6,), 12) if call is None else last_occurrences(ids, call)
        acts = (torch.arange(12) >= 12 - ends[:, None])[..., None]
        change = x @ layer.lora_A[name].weight.t() @ layer.lora_B[name].weight.t() * layer.scaling[name]
        expected = expected + torch.where(acts, change, 0)
    torch.testing.assert_close(y, expected)


def test_combining():
    model = three()
    with pytest.raises(ValueError, match="alora_invocation_tokens.*'other': \\[7\\]"):
        model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")
    model.add_adapter("second", peftfast.LoraConfig(**OPTIONS, init_lora_weights=False))
    model.base_model.add_weighted_adapter(["default", "second"], [1.0, 0.5], "both", "cat")
    assert model.peft_config["both"].alora_invocation_tokens == CALL
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    seen = []
    layer.register_forward_hook(lambda m, args, y: seen.append((args[0].detach(), y.detach())))
    model.base_model.set_adapter("both")
    model(input_ids=IDS)
    base = layer.get_base_layer()(seen[0][0])
    model.base_model.set_adapter("default")
    model(input_ids=IDS)
    model.base_model.set_adapter("second")
    model(input_ids=IDS)
    torch.testing.assert_close(seen[0][1] - base, seen[1][1] - base + 0.5 * (seen[2][1] - base))


# ---- training --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_knows_each_batch(reentrant):
    plain, saving = wrap(seed=2).train(), wrap(seed=2).train()
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, saving):
        losses = [model(input_ids=ids, labels=ids).loss for ids in (IDS, IDS.flip(0))]
        for loss in losses:
            loss.backward()
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(saving.get_parameter(name).grad, parameter.grad)
    losses = [saving(input_ids=ids, labels=ids).loss for ids in (IDS, IDS.flip(0))]
    with pytest.raises(RuntimeError, match="call backward for each batch"):
        sum(losses).backward()
    saving(input_ids=IDS, labels=IDS).loss.backward()  # and nothing of that stays
    sum(plain(input_ids=ids, labels=ids).loss for ids in (IDS, IDS.flip(0))).backward()


def test_where_it_never_acts_gradients_are_zeros():
    model = wrap()
    _, grads = step(model, ids_with(None, None))
    assert all(g is not None and not g.any() for g in grads.values())
    with pytest.warns(UserWarning, match="only inputs_embeds are provided"):
        logits = model(inputs_embeds=model.get_input_embeddings()(IDS)).logits
    with model.disable_adapter():
        torch.testing.assert_close(logits, model(input_ids=IDS).logits)
    with pytest.warns(UserWarning, match="during generate"):
        model.generate(inputs_embeds=model.get_input_embeddings()(IDS), max_new_tokens=1, pad_token_id=0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    model = wrap(base=oracle.llama(layers=1), target_modules=["q_proj", "down_proj"])
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic or None)
    graphs = []
    for ids in (IDS, ids_with(1, None, 4, 9), *[ids_with(1, 2, 3, length=9)] * dynamic):
        with torch.no_grad():
            torch.testing.assert_close(
                compiled(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits
            )
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1


def test_threads_do_not_share_offsets():
    model = wrap()
    batches = [ids_with(place, None) for place in range(0, 10, 3)]
    with torch.no_grad():
        expected = [model(input_ids=ids).logits for ids in batches]

    def run(mine: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                assert torch.equal(model(input_ids=batches[mine]).logits, expected[mine])
            assert torch.equal(generated(model, batches[mine]), by_hand(model, batches[mine]))

    oracle.at_once(run, range(len(batches)))


def test_a_generation_may_end_in_the_middle_of_another_threads_call():
    """torch has a list of the hooks by then, and no longer knows how the other one's is called."""
    model = wrap()
    expected = model(input_ids=IDS).logits
    started, over = threading.Event(), threading.Event()
    other = threading.Thread(target=generated, args=(model,))

    def hook(*args):
        if threading.current_thread() is other:
            started.set()
            over.wait(10)
        else:
            over.set()
            other.join()

    with model.get_base_model().register_forward_pre_hook(hook):
        other.start()
        started.wait(10)
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_copies_and_pickles():
    model = wrap()
    expected = model(input_ids=IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(input_ids=IDS).logits, expected)


def test_blocks():
    model = wrap()
    expected = model(input_ids=IDS).logits, generated(model)
    peftfast.fuse_blocks(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected[0])
    assert torch.equal(generated(model), expected[1])


# ---- what it refuses -------------------------------------------------------------------------------------------------
def test_refusals(tmp_path):
    model = wrap()
    before = {n: p.clone() for n, p in model.named_parameters()}
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_adapter(safe_merge=True)):
        with pytest.raises(NotImplementedError, match="aLoRA does not support merging"):
            merge()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match="Beam search not yet supported for aLoRA"):
        model.generate(input_ids=IDS, num_beams=2)
    with pytest.raises(ValueError, match="Beam search"):
        model.generate(input_ids=IDS, generation_config=type(model.generation_config)(num_beams=2))
    with pytest.raises(ValueError, match="alora_offsets.*4"):
        model(input_ids=IDS, alora_offsets=[1, 2])
    for wrong in ([1.5, 1, 1, 1], "1111", torch.ones(4)):
        with pytest.raises(TypeError, match="alora_offsets"):
            model(input_ids=IDS, alora_offsets=wrong)
    for call in (model, model.generate):
        with pytest.raises(TypeError, match=r"no alora_offset, got \[1, 1, 1, 1\]; it takes alora_offsets"):
            call(input_ids=IDS, alora_offset=[1, 1, 1, 1])  # which transformers' models would take and not use
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peftfast.convert_to_lora(model, 2)
    with pytest.raises(ValueError, match="default.*whole prompt"):
        peftfast.capture_decoding(model, batch_size=1, max_length=20)
    model.save_pretrained(tmp_path)
    pool = peftfast.AdapterPool(oracle.llama(), slots=2, target_modules="all-linear", max_rank=4)
    with pytest.raises(ValueError, match="aLoRA"):
        pool.register("a", tmp_path)
        with pool.use(["a"]):
            pass
    for target in ({"target_modules": ["conv1"]}, {"target_parameters": ["conv1.weight"], "target_modules": []}):
        with pytest.raises(ValueError, match="alora_invocation_tokens|variant"):
            wrap(base=oracle.net(), **target)
    for wrong in ([], {5, 6}):
        with pytest.raises(ValueError, match="at least one token in their order"):
            peftfast.LoraConfig(alora_invocation_tokens=wrong)
    with pytest.raises(ValueError, match="variant combination"):
        peftfast.LoraConfig(alora_invocation_tokens=[1], use_dora=True)
    with pytest.raises(ValueError, match="does not support alora"):
        oracle.quietly(peftfast.AdaLoraConfig, alora_invocation_tokens=[1], total_step=1)
    with pytest.warns(UserWarning, match="only supported for CAUSAL_LM"):
        peftfast.LoraConfig(alora_invocation_tokens=[1])
    for init in ("pissa", "lora_ga"):
        with pytest.warns(UserWarning, match="changes the base weights"):
            peftfast.LoraConfig(alora_invocation_tokens=[1], task_type="CAUSAL_LM", init_lora_weights=init)


def test_contents_say_from_where(tmp_path):
    wrap().save_pretrained(tmp_path)
    assert "from the tokens [5, 6] on" in str(peftfast.adapter_contents(tmp_path))


def test_pefts_functions():
    model = wrap()
    inputs = alora.get_alora_offsets_for_forward(model, IDS)
    assert inputs == {"alora_offsets": [n or None for n in offsets_of(IDS)]}
    assert alora.get_alora_offsets_for_generate(model, IDS[0], max_length=3) == {
        "alora_offsets": inputs["alora_offsets"][:1], "max_length": 3,
    }  # fmt: skip
    assert alora.get_alora_offsets_for_forward(model, IDS, alora_offsets=[1]) == {"alora_offsets": [1]}
    assert alora.is_alora_relevant_in_batch(model)
    model = three()
    model.set_adapter("plain")
    assert not alora.is_alora_relevant_in_batch(model, ["plain", "__base__"])
    assert alora.is_alora_relevant_in_batch(model, ["plain", "other"])


def test_what_servers_do_with_it():
    from peftfast.interop.servers import Facts, judge_servers

    config = peftfast.LoraConfig(**OPTIONS)
    verdicts = {v.server: v for v in judge_servers(Facts(config, [4], [8], 16))}
    assert {name for name, v in verdicts.items() if v.verdict == "loads, wrong output"} == {"SGLang", "MLX"}
    assert verdicts["vLLM"].verdict == "refuses"
    assert not any("invocation" in reason for reason in verdicts["llama.cpp"].reasons)
