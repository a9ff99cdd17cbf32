"""Captured training steps and decoding: the numbers of eager, buffers that lie still, no wait for the device."""

from __future__ import annotations

import operator
import traceback
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import transformers
from oracle import VOCABULARY, gpt2, gradients
from packaging import version
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training.nf4 import quantise
from training.tiny import batch, factors, fill, llama, lora, wrapped

import peftfast
from peftfast.ops import host_bound
from peftfast.training.capture import recording as graphs
from peftfast_kernels import device_masks

pytestmark = pytest.mark.usefixtures("large_products")

BASE = "__base__"
WAITS = {
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "equal", "allclose", "repeat_interleave.Tensor",
    "lift_fresh",  # torch.tensor(host values): a copy to the device that waits
}  # fmt: skip


class Reads(TorchFunctionMode):
    """Notes methods that hand values to the host without any operation where they are there already."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note = note

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("tolist", "cpu", "numpy", "__array__", "get_rng_state", "synchronize"):
            self.note(name)
        return function(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Notes operations that would make the host wait for a GPU, and whose code asked for them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._reads = Reads(self._note)

    def __enter__(self):
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._reads.__exit__(*error)

    def _note(self, name: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and __file__ != f.filename]
        self.found.append(f"{name} {frames[-1].filename}:{frames[-1].lineno}")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        masks = isinstance(args[1], (list, tuple)) if name.startswith(("index.", "index_put")) else False
        by_mask = masks and any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1])
        if by_mask or name in WAITS or name.partition(".")[0] in WAITS:
            self._note(name)
        return function(*args, **(kwargs or {}))


def waits_in(function: Callable[[], object]) -> Waits:
    function()  # what is made once is made in the warm-up
    with Waits() as waits:
        function()
    return waits


@pytest.mark.parametrize(
    "planted",
    [
        lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0], lambda x: x.nonzero(),
        lambda x: x.unique(), lambda x: torch.equal(x, x), lambda x: torch.tensor([1.0, 2.0]),
        lambda x: x.index_put_((x > 0,), torch.zeros(())), lambda x: x.tolist(),
        lambda x: x.cpu(), lambda x: x.numpy(),
    ],
)  # fmt: skip
def test_the_ban_finds_what_waits(planted):
    with Waits() as waits:
        planted(torch.randn(8))
    assert waits.found


# ---- training --------------------------------------------------------------------------------------------------------
def eager_steps(model, batches, optimizer, autocast=None) -> list[torch.Tensor]:
    losses = []
    for one in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            loss = model(**one).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def dropping(**changes) -> torch.nn.Module:
    return wrapped(peftfast, **{"lora_dropout": 0.1, "target_modules": "all-linear", **changes}).train()


def adam(model, **changes) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **changes)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("inside", [True, False])
def test_steps_are_eagers_bit_for_bit(autocast, inside):
    batches = [batch(seed=i) for i in range(6)]
    model = dropping()
    torch.manual_seed(5)
    losses = eager_steps(model, batches, adam(model), autocast)

    ours = dropping()
    optimizer = adam(ours)
    step = peftfast.capture_training_step(ours, batches[0], optimizer if inside else None, autocast=autocast)
    torch.manual_seed(5)
    for one, expected in zip(batches, losses, strict=True):
        assert torch.equal(step(one), expected)
        if not inside:
            optimizer.step()
            optimizer.zero_grad()
    for name, expected in factors(model).items():
        assert torch.equal(factors(ours)[name], expected), name


def test_nothing_moves():
    model = dropping()
    step = peftfast.capture_training_step(model, batch(), autocast=torch.bfloat16)

    def addresses() -> dict[str, int]:
        found = {n: t.data_ptr() for n, t in step.inputs.items()} | {"loss": step.loss.data_ptr()}
        found |= {f"{n}.grad": p.grad.data_ptr() for n, p in model.named_parameters() if p.requires_grad}
        copies = model.base_model._casts.copies
        assert copies  # the bf16 factors, which a recording refreshes in place
        return found | {f"copy {i}": copy.data_ptr() for i, copy in enumerate(copies)}

    step(batch(seed=0))
    first = addresses()
    for i in range(1, 4):
        model.zero_grad()
        step(batch(seed=i))
        assert addresses() == first


def test_the_bf16_copies_are_made_inside_the_step():
    """A recording contains the cast, so that it sees what the optimizer wrote."""
    model = dropping()
    step = peftfast.capture_training_step(model, batch(), autocast=torch.bfloat16)
    step(batch())
    seen = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_foreach_copy_" in str(function):
                seen.append(len(args[0]))
            return function(*args, **(kwargs or {}))

    with Casts():
        step(batch())
    assert sum(p.requires_grad for p in model.parameters()) in seen


def test_gradients_are_overwritten_or_added_up():
    one, two = batch(seed=1), batch(seed=2)

    def alone(which) -> dict[str, torch.Tensor]:
        model = wrapped(peftfast)
        model(**which).loss.backward()
        return gradients(model)

    model = wrapped(peftfast)
    step = peftfast.capture_training_step(model, one)
    losses = []
    for which in (one, two, one):
        losses.append(step(which))
        expected = alone(which)
        assert all(torch.equal(g, expected[n]) for n, g in gradients(model).items())
    assert losses[0] == losses[2] != losses[1]  # which later steps leave alone

    model = wrapped(peftfast)
    step = peftfast.capture_training_step(model, one, accumulate=True)
    for clear in (lambda: None, model.zero_grad, lambda: model.zero_grad(set_to_none=False)):
        clear()
        step(one)
        where = {n: p.grad.data_ptr() for n, p in model.named_parameters() if p.requires_grad}
        step(two)
        assert where == {n: p.grad.data_ptr() for n, p in model.named_parameters() if p.requires_grad}
        expected = {n: g + alone(two)[n] for n, g in alone(one).items()}
        assert all(torch.equal(g, expected[n]) for n, g in gradients(model).items())
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None  # in the place of what a step has written
    step(two)
    assert all(torch.equal(g, 1 + alone(two)[n]) for n, g in gradients(model).items())


class Elsewhere(torch.Tensor):
    """A tensor whose values nobody takes for being at hand, as they are in the memory of a CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def unbind(self, dim=0):
        return [part.as_subclass(Elsewhere) for part in super().unbind(dim)]


@pytest.fixture
def seeds_on_a_device(monkeypatch):
    """The masks of dropout are made from seeds as they would be on a GPU, by operations on tensors."""
    draw = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *args, **options: draw(*args, **options).as_subclass(Elsewhere))


@pytest.mark.parametrize("kind", ["lora", "blocks", "dora", "two adapters", "nf4"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_training_step_never_waits(kind, autocast, seeds_on_a_device, monkeypatch):
    with device_masks():  # of a training step too, the form that runs on a GPU
        base = llama(hidden_size=64, intermediate_size=128)
        if kind == "nf4":
            pytest.importorskip("bitsandbytes")
            base = quantise(base)
        # q_proj alone leaves linears of bitsandbytes that nobody adapts
        targets = {"target_modules": ["q_proj"]} if kind == "nf4" else {}
        model = dropping(model=base, use_dora=kind == "dora", **targets)
        if kind == "two adapters":
            model.add_adapter("other", lora(peftfast, r=2))
            model.base_model.set_adapter(["default", "other"])
        if kind == "blocks":
            blocks = peftfast.fuse_blocks(model)
            model(**batch())
            model(**batch())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        full = {**batch(), "use_cache": False}
        for inputs in (full, {k: v for k, v in full.items() if k != "attention_mask"}):
            step = peftfast.capture_training_step(model, inputs, optimizer, autocast=autocast, max_grad_norm=1.0)
            # transformers looks at masks and positions, unless a stream is being captured; nobody else does
            base = llama()
            theirs = waits_in(lambda base=base, inputs=inputs: base(**inputs)).found
            assert theirs
            assert waits_in(lambda step=step, inputs=inputs: step(inputs)).found == theirs
            with monkeypatch.context() as capturing:
                capturing.setattr("transformers.masking_utils.is_tracing", lambda *_: True)
                waits = waits_in(lambda step=step, inputs=inputs: step(inputs))
            assert not waits.found, waits.found
        if kind == "blocks":
            assert "on" in {group.state for group in blocks.groups}


def test_another_batch_is_refused_before_anything_is_copied():
    model = wrapped(peftfast)
    step = peftfast.capture_training_step(model, {**batch(), "use_cache": False})
    good = {**batch(seed=7), "use_cache": False}
    step(good)
    before = {k: v.clone() for k, v in step.inputs.items() if isinstance(v, torch.Tensor)}
    other = {**batch(seed=8), "use_cache": False}
    cases = [
        ({**other, "labels": other["labels"][:2]}, r"labels is torch.int64 \[2, 12\].* captured for .*\[4, 12\]"),
        ({**other, "labels": other["labels"].int()}, "labels is torch.int32"),
        ({k: v for k, v in other.items() if k != "labels"}, "missing labels"),
        ({**other, "position_ids": other["labels"]}, "new position_ids"),
        ({**other, "use_cache": True}, "use_cache is True, but the step was captured with False"),
        ({**other, "labels": None}, "labels is None"),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            step(bad)
        assert all(torch.equal(step.inputs[k], v) for k, v in before.items())


def change_scale(model) -> None:
    next(iter(model.base_model.inventory.layers.values())).set_scale("default", 3.0)


CHANGES = {
    "added": lambda m: m.add_adapter("new", lora(peftfast)),
    "deleted": lambda m: m.delete_adapter("other"),
    "merged": lambda m: m.base_model.merge_adapter(),
    "switched": lambda m: m.set_adapter("other"),
    "disabled": lambda m: m.base_model.disable_adapter_layers(),
    "eval": lambda m: m.eval(),
    "scale": change_scale,
    "frozen": lambda m: next(p for p in m.parameters() if p.requires_grad).requires_grad_(False),
    "data": lambda m: setattr(p := next(p for p in m.parameters() if p.requires_grad), "data", p.data.clone()),
    "dropout": lambda m: setattr(next(x for x in m.modules() if isinstance(x, torch.nn.Dropout)), "p", 0.5),
    "base": lambda m: setattr(m.get_base_model().model, "norm", torch.nn.Identity()),
    "router": lambda m: m.base_model.set_router(lambda inputs: None),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_changed_model_is_never_used_silently(kind):
    model = dropping()
    model.add_adapter("other", lora(peftfast, r=2))
    step = peftfast.capture_training_step(model, batch())
    step(batch())
    copied = {k: v.clone() for k, v in step.inputs.items()}
    CHANGES[kind](model)
    with pytest.raises(RuntimeError, match="not the one that was captured"):
        step(batch(seed=9))
    assert all(torch.equal(step.inputs[k], v) for k, v in copied.items())


def test_recapture_follows_the_change():
    model = wrapped(peftfast)
    model.add_adapter("other", lora(peftfast, r=2))
    fill(model, 4)
    step = peftfast.capture_training_step(model, batch(), on_change="recapture")
    step(batch())
    model.set_adapter("other")  # the first one's gradients are not the next batch's
    assert torch.equal(step(batch()), model(**batch()).loss)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(factors(model))


def test_optimizer_settings_and_options_are_checked():
    model = wrapped(peftfast)
    optimizer = adam(model)
    step = peftfast.capture_training_step(model, batch(), optimizer)
    step(batch())
    optimizer.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(RuntimeError, match="setting of the optimizer"):
        step(batch())
    with pytest.raises(ValueError, match="warmup"):
        peftfast.capture_training_step(model, batch(), warmup=0)
    with pytest.raises(ValueError, match="warmup must be an integer.*got '3'"):
        peftfast.capture_training_step(model, batch(), warmup="3")
    with pytest.raises(TypeError, match="autocast must be .*got True"):
        peftfast.capture_training_step(model, batch(), autocast=True)
    with pytest.raises(TypeError, match="batch must be a dict.*got 3"):
        peftfast.capture_training_step(model, 3)
    with pytest.raises(TypeError, match="batch must be a dict.*got 3"):
        peftfast.capture_training_step(model, batch())(3)
    with pytest.raises(ValueError, match="on_change"):
        peftfast.capture_training_step(model, batch(), on_change="ignore")
    with pytest.raises(ValueError, match="accumulate"):
        peftfast.capture_training_step(model, batch(), optimizer, accumulate=True)
    with pytest.raises(ValueError, match="max_grad_norm"):
        peftfast.capture_training_step(model, batch(), max_grad_norm=1.0)
    with pytest.raises(ValueError, match="No adapter has the number 7"):
        peftfast.capture_training_step(model, {**batch(), "adapter_names": torch.full((4,), 7)})
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody"):
        peftfast.capture_training_step(model, {**batch(), "adapter_names": ["nobody"] * 4})
    with pytest.raises(ValueError, match="adapter_names is new"):
        peftfast.capture_training_step(model, batch())({**batch(), "adapter_names": ["default"] * 4})
    with pytest.raises(ValueError, match="adapter_names is missing"):
        peftfast.capture_training_step(model, {**batch(), "adapter_names": ["default"] * 4})(batch())
    with pytest.raises(ValueError, match="has no loss"):
        peftfast.capture_training_step(model, {"input_ids": batch()["input_ids"]})({"input_ids": batch()["input_ids"]})
    model.base_model.set_router(lambda inputs: None)
    with pytest.raises(ValueError, match="router"):
        peftfast.capture_training_step(model, batch())
    scheduled = peftfast.get_peft_model(llama(), peftfast.AdaLoraConfig(target_modules=["q_proj"], total_step=100))
    with pytest.raises(ValueError, match="schedule"):
        peftfast.capture_training_step(scheduled, batch(), adam(scheduled))


# ---- decoding --------------------------------------------------------------------------------------------------------
def several() -> torch.nn.Module:
    model = wrapped(peftfast)
    model.add_adapter("other", lora(peftfast, r=2, target_modules=["q_proj", "up_proj"]))
    model.add_adapter("third", lora(peftfast, r=8, target_modules="all-linear"))
    fill(model, 4)
    model.get_base_model().generation_config.eos_token_id = None
    return model.eval()


def prompts(size: int = 3, length: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (size, length), generator=torch.Generator().manual_seed(seed))


def generated(model, ids, new=20, **options) -> torch.Tensor:
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **options)


@pytest.mark.parametrize("mixed", [False, True])
def test_greedy_tokens_are_generates(mixed):
    model = several()
    decode = peftfast.capture_decoding(model, 3, 40, mixed=mixed)
    for seed in range(2):
        ids = prompts(seed=seed, length=5 + seed)
        assert torch.equal(decode.generate(ids, 20), generated(model, ids))
        for name in ("other", "third", "default"):
            model.set_adapter(name)
            assert torch.equal(decode.generate(ids, 20), generated(model, ids)), name


def test_one_recording_for_every_mix_and_active_adapter():
    model = several()
    decode = peftfast.capture_decoding(model, 3, 40, mixed=True, on_change="error")
    ids = prompts()
    mixes = [["default", "other", BASE], ["third"] * 3, [BASE] * 3, ["other", "third", "other"]]
    for mix in mixes:
        for choice in (mix, model.base_model.adapter_numbers(mix)):
            assert torch.equal(decode.generate(ids, 20, adapter_names=choice), generated(model, ids, adapter_names=mix))
    model.set_adapter("other")
    assert torch.equal(decode.generate(ids, 20), generated(model, ids))
    model.base_model.set_router(lambda inputs: mixes[0])
    with pytest.raises(RuntimeError, match="router"):
        decode.generate(ids, 2)
    assert len(decode._recordings) == 1


def test_padding_and_ends():
    model = several()
    ids = prompts(length=6)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[2, :1] = 0
    ids = ids.masked_fill(mask == 0, 0)
    decode = peftfast.capture_decoding(model, 3, 64)
    free = generated(model, ids, 40, attention_mask=mask)
    assert torch.equal(decode.generate(ids, 40, attention_mask=mask), free)
    for ends in (free[0, 9].item(), [free[i, 8 + i].item() for i in range(3)]):
        expected = generated(model, ids, 40, attention_mask=mask, eos_token_id=ends, pad_token_id=0)
        found = decode.generate(ids, 40, attention_mask=mask, eos_token_id=ends, pad_token_id=0)
        assert torch.equal(found, expected)
    assert expected.shape[1] < free.shape[1]  # all three ended


def test_padding_where_positions_are_looked_up():
    config = peftfast.LoraConfig(target_modules=["c_attn"], init_lora_weights=False)
    model = peftfast.get_peft_model(gpt2(), config).eval()
    model.get_base_model().generation_config.eos_token_id = None
    ids = prompts(length=6) % VOCABULARY
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found = peftfast.capture_decoding(model, 3, 40).generate(ids, 8, attention_mask=mask)
    assert torch.equal(found, generated(model, ids, 8, attention_mask=mask))


def test_sampling():
    model = several()
    decode = peftfast.capture_decoding(model, 3, 40)
    ids = prompts()
    greedy = decode.generate(ids, 12)
    assert torch.equal(decode.generate(ids, 12, do_sample=True, temperature=1e-5), greedy)
    assert torch.equal(decode.generate(ids, 12, do_sample=True, top_k=1), greedy)
    assert torch.equal(decode.generate(ids, 12, do_sample=True, top_p=1e-6), greedy)
    torch.manual_seed(1)
    first = decode.generate(ids, 12, do_sample=True)
    torch.manual_seed(1)
    assert torch.equal(decode.generate(ids, 12, do_sample=True), first)
    assert not torch.equal(decode.generate(ids, 12, do_sample=True), first)


def test_sampling_draws_by_chance():
    decode = peftfast.capture_decoding(llama().eval(), 4000, 2)
    chances = torch.tensor([0.5, 0.25, 0.125, 0.125])
    decode.logits, decode.ends = chances.log().expand(4000, 4), torch.empty(0, dtype=torch.int64)
    decode.tokens, cases = torch.zeros((4000, 8), dtype=torch.int64), []
    for temperature, top_k, top_p in ((1.0, 0, 1.0), (2.0, 0, 1.0), (1.0, 2, 1.0), (1.0, 0, 0.7)):
        decode.temperature.fill_(temperature), decode.top_k.fill_(top_k), decode.top_p.fill_(top_p)
        decode.column.zero_()
        decode._choose(True, top_k > 0 or top_p < 1)
        share = decode.token.flatten().bincount(minlength=4) / 4000
        expected = chances ** (1 / temperature)
        if top_k or top_p < 1:
            expected = expected * torch.tensor([1, 1, 0, 0])
        cases.append((share - expected / expected.sum()).abs().max().item())
    assert max(cases) < 0.03, cases


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_token_never_waits(mixed, autocast, sampled):
    model = several()
    if autocast is not None and version.parse(transformers.__version__) < version.parse("5.24"):
        with pytest.raises(ValueError, match=r"float32 needs transformers 5\.24.*Load the model in torch.bfloat16"):
            peftfast.capture_decoding(model, 3, 40, mixed=mixed, autocast=autocast)
        model = model.to(torch.bfloat16)
    decode = peftfast.capture_decoding(model, 3, 40, mixed=mixed, autocast=autocast)
    mix = {"adapter_names": ["default", "other", BASE]} if mixed else {}
    decode.generate(prompts(), 5, do_sample=sampled, **mix)

    def token() -> None:
        with decode._settings():
            decode._recording(sampled, sampled)()

    waits = waits_in(token)
    assert not waits.found, waits.found


def test_nothing_moves_while_decoding():
    model = several()
    decode = peftfast.capture_decoding(model, 3, 40, mixed=True)

    def addresses() -> list[int]:
        found = [getattr(decode, n) for n in ("token", "positions", "mask", "index", "tokens", "logits", "finished")]
        parts = ("keys", "values", "cumulative_length")  # the last one not in transformers below 5.4
        found += [getattr(layer, n) for layer in decode.cache.layers for n in parts if hasattr(layer, n)]
        for layer in model.base_model.inventory.layers.values():
            found += [t for known in layer.control.kept(layer) for t in known.stack[:3]]
        return [t.data_ptr() for t in found]

    decode.generate(prompts(), 5, adapter_names=["default", "other", BASE])
    first = addresses()
    assert len(first) > 3 * len(model.base_model.inventory.layers)
    for mix in (["third"] * 3, [BASE, "other", "default"]):
        decode.generate(prompts(seed=3), 9, adapter_names=mix)
        assert addresses() == first


@pytest.mark.parametrize("kind", ["added", "deleted", "merged", "disabled", "scale", "data", "trained", "traceless"])
@pytest.mark.parametrize("mixed", [False, True])
def test_decoding_with_a_changed_model_is_refused_or_captured_again(kind, mixed):
    def trained(model) -> None:
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.05)

    def traceless(model) -> None:
        """As by optimizers with kernels of their own, which count no write."""
        model.train()
        for p in model.parameters():
            if p.requires_grad:
                p.detach().numpy()[...] += 0.05
        model.eval()

    change = {"trained": trained, "traceless": traceless}.get(kind) or CHANGES[kind]
    model = several()
    strict = peftfast.capture_decoding(model, 3, 40, mixed=mixed, on_change="error")
    loose = peftfast.capture_decoding(model, 3, 40, mixed=mixed)
    ids = prompts()
    for decode in (strict, loose):
        decode.generate(ids, 3)
    before = dict(loose._recordings)
    change(model)
    if kind in ("trained", "traceless") and not mixed:  # read where they are
        assert torch.equal(strict.generate(ids, 20), generated(model, ids))
        return
    with pytest.raises(RuntimeError, match="not the one that was captured"):
        strict.generate(ids, 3)
    if kind == "merged" and mixed:
        with pytest.raises(ValueError, match="merged"):
            loose.generate(ids, 3)
        return
    assert torch.equal(loose.generate(ids, 20), generated(model, ids))
    assert loose._recordings.values() != before.values()


def test_decoding_says_what_does_not_fit():
    model = several()
    for sizes, message in [
        ((0, 12), "batch_size must be an integer of at least 1; got 0"),
        (("8", 12), "batch_size must be an integer of at least 1; got '8'"),
        ((True, 12), "batch_size must be an integer of at least 1; got True"),
        ((3, -1), "max_length must be an integer of at least 1; got -1"),
        ((3, 12.0), "max_length must be an integer of at least 1; got 12.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            peftfast.capture_decoding(model, *sizes)
    decode = peftfast.capture_decoding(model, 3, 12)
    for arguments, message in [
        ((prompts(2), 3), r"\[2, 5\].*\[3, T\]"),
        ((prompts(), 8), "at most 12"),
        ((prompts(), 0), "at least one"),
    ]:
        with pytest.raises(ValueError, match=message):
            decode.generate(*arguments)
    with pytest.raises(ValueError, match="attention_mask"):
        decode.generate(prompts(), 3, attention_mask=torch.ones(3, 4))
    with pytest.raises(ValueError, match="mixed=True"):
        decode.generate(prompts(), 3, adapter_names=["other"] * 3)
    with pytest.raises(ValueError, match="temperature"):
        decode.generate(prompts(), 3, do_sample=True, temperature=0)
    mixed = peftfast.capture_decoding(model, 3, 12, mixed=True)
    with pytest.raises(ValueError, match="nobody"):
        mixed.generate(prompts(), 3, adapter_names=["nobody"] * 3)
    with pytest.raises(ValueError, match="No adapter has the number"):
        mixed.generate(prompts(), 3, adapter_names=torch.tensor([0, 1, 99]))
    with pytest.raises(ValueError, match="none"):
        peftfast.capture_decoding(llama(), 3, 12, mixed=True)
    prompted = peftfast.get_peft_model(
        llama(), peftfast.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="Prompts"):
        peftfast.capture_decoding(prompted, 3, 12)


# ---- recorded on the CPU ---------------------------------------------------------------------------------------------
class Tape(TorchDispatchMode):
    """A CUDA graph in miniature: the operations of a function with the very tensors they read and wrote. Recording
    leaves no trace, replaying runs nothing but these operations, into the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self.before.setdefault(tensor.untyped_storage().data_ptr(), (tensor, bits(tensor).clone()))
        out = function(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):  # made here: nothing to restore
                self.before.setdefault(tensor.untyped_storage().data_ptr(), (tensor, None))
        self.operations.append((function, args, kwargs, out))
        return out

    def __enter__(self):
        self.before: dict[int, tuple] = {}
        self.random = torch.get_rng_state()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.set_rng_state(self.random)
        for tensor, values in self.before.values():
            if values is not None:
                bits(tensor).copy_(values)

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, out in self.operations:
            new = function(*args, **kwargs)
            if any(r.alias_info is not None for r in function._schema.returns):
                continue  # a view of, or written into, what is on the tape already
            for old, fresh in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(old, torch.Tensor):
                    old.detach().copy_(fresh)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of the memory that a tensor is part of."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


@pytest.fixture
def tapes(monkeypatch, seeds_on_a_device):
    """torch's interface for CUDA graphs, over tapes; returns those made."""
    made = []

    class Graph(Tape):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    class Stream:
        device = torch.device("cpu")

        def __init__(self, device=None) -> None: ...

        def wait_stream(self, other) -> None: ...

    monkeypatch.setattr(graphs, "has_graphs", lambda device: True)
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    with device_masks():
        yield made


class Descent(torch.optim.Optimizer):
    """Plain gradient descent that never asks the host."""

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "capturable": True})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * group["lr"])


def test_what_is_recorded_is_not_bound_by_the_host(tapes):
    """Also in the runs before, whose dropout masks and compiled kernels a recording goes on with."""
    limits = []

    def loss(model, inputs):
        limits.append(host_bound._limit)
        return model(**inputs).loss

    step = peftfast.capture_training_step(wrapped(peftfast), batch(), loss_function=loss, warmup=2)
    for _ in range(4):
        step(batch())
    assert len(tapes) == 1 and limits == [0, 0, 0] and host_bound._limit is None


def one_tape_gave_eagers_bits(tapes, recorded, ran) -> None:
    """Losses and factors of a step that was recorded, and of one that never was."""
    assert len(tapes) == 1
    for one, other in zip(recorded[0], ran[0], strict=True):
        assert torch.equal(one, other)
    for name, value in ran[1].items():
        assert torch.equal(recorded[1][name], value), name


@pytest.mark.parametrize("kind", ["outside", "inside", "accumulate"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_tape_of_a_step_gives_eagers_bits(tapes, kind, autocast):
    """What is recorded depends on nothing that the host would have to do again."""
    inside = kind == "inside"
    batches = [batch(seed=i) for i in range(8)]
    results = []
    for warmup in (2, 100):  # the second never records
        model = dropping()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = Descent(trained, 0.1) if inside else adam(model)
        step = peftfast.capture_training_step(
            model, batches[0], optimizer if inside else None, autocast=autocast, warmup=warmup,
            accumulate=kind == "accumulate", max_grad_norm=0.5 if inside else None,
        )  # fmt: skip
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)
        torch.manual_seed(5)
        losses = []
        for i, one in enumerate(batches):
            versions = [p._version for p in trained]
            losses.append(step(one))
            if inside:
                assert all(p._version > v for p, v in zip(trained, versions, strict=True))
            elif kind == "outside" or i % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
            if inside:
                scheduler.step()
        results.append((losses, factors(model)))
    one_tape_gave_eagers_bits(tapes, *results)


MIXES = (["default", "other", BASE, "third"], ["third", "third", "default", "default"], ["other", BASE, BASE, "other"])


def trainable() -> torch.nn.Module:
    model = several()
    model.base_model.set_adapter(["default", "other", "third"])
    return model.train()


@pytest.mark.parametrize("numbers", [False, True])
def test_every_sample_trains_its_own_adapter(numbers):
    """As calling the model with the same names and stepping an optimizer does."""
    captured, plain = trainable(), trainable()
    step, descents = None, [Descent([p for p in m.parameters() if p.requires_grad], 0.1) for m in (captured, plain)]
    for i, mix in enumerate(MIXES):
        choice = captured.base_model.adapter_numbers(mix) if numbers else mix
        inputs = {**batch(seed=i), "adapter_names": choice}
        step = step or peftfast.capture_training_step(captured, inputs)
        loss = step(inputs)
        expected = plain(**batch(seed=i), adapter_names=mix).loss
        expected.backward()
        torch.testing.assert_close(loss, expected.detach())
        for descent in descents:
            descent.step()
            descent.zero_grad()
    theirs = factors(plain)
    for name, value in factors(captured).items():
        torch.testing.assert_close(value, theirs[name], msg=name)


@pytest.mark.parametrize("frozen", [False, True])
def test_one_tape_trains_every_mix(tapes, frozen):
    """Also beside an adapter that somebody else writes to, in layers that have no other."""
    results = []
    for warmup in (2, 100):  # the second never records
        model = trainable()
        if frozen:
            model.base_model.set_adapter(["default", "other"])
        trained = [p for p in model.parameters() if p.requires_grad]
        first = {**batch(), "adapter_names": MIXES[0]}
        step = peftfast.capture_training_step(model, first, Descent(trained, 0.1), warmup=warmup)
        losses = []
        for i in range(8):
            losses.append(step({**batch(seed=i), "adapter_names": MIXES[i % 3]}))
            if frozen and i >= 4:  # after the recording
                with torch.no_grad():
                    for layer in model.base_model.inventory.layers.values():
                        if "third" in layer.lora_B:
                            layer.lora_B["third"].weight.mul_(1.5)
        results.append((losses, factors(model)))
    one_tape_gave_eagers_bits(tapes, *results)


def test_a_mixed_training_step_never_waits(seeds_on_a_device, monkeypatch):
    monkeypatch.setattr("peftfast.methods.lora.stack._has_values_at_hand", lambda like: False)
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: True)
    with device_masks():
        model = trainable()
        inputs = {**batch(), "use_cache": False, "adapter_names": MIXES[0]}
        step = peftfast.capture_training_step(model, inputs)
        step(inputs)
        waits = waits_in(step._run)
    assert not waits.found, waits.found


def test_recordings_keep_what_they_read(tapes):
    """The bf16 copies of the factors may be made anew by others, for another adapter."""
    import gc

    model = dropping()
    model.add_adapter("other", lora(peftfast, r=2))
    step = peftfast.capture_training_step(model, batch(), autocast=torch.bfloat16, warmup=1)
    step(batch())
    step(batch())
    copies = {copy.data_ptr() for copy in model.base_model._casts.copies}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.set_adapter("other")
        model(**batch())
        model.set_adapter("default")
    gc.collect()
    assert copies.isdisjoint(copy.data_ptr() for copy in model.base_model._casts.copies)
    assert copies == {copy.data_ptr() for _, copy in step._recording.held[0].values()}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_tape_of_one_token_serves_all(tapes, mixed, sampled):
    model = several()
    decode = peftfast.capture_decoding(model, 3, 40, mixed=mixed, warmup=2)
    eager = peftfast.capture_decoding(model, 3, 40, mixed=mixed, warmup=10**6)
    cases = [["default", "other", BASE], ["third"] * 3, [BASE, "third", "other"]] if mixed else [None] * 3
    for i, mix in enumerate(cases):
        ids = prompts(seed=i, length=4 + i)
        mask = torch.ones_like(ids)
        mask[0, : i + 1] = 0
        options = {"adapter_names": mix, "attention_mask": mask}
        if sampled:
            options |= {"do_sample": True, "temperature": 0.5 + i, "top_k": 5 * i, "top_p": 0.9}
        torch.manual_seed(i)
        found = decode.generate(ids, 20, **options)
        torch.manual_seed(i)
        assert torch.equal(found, eager.generate(ids, 20, **options))
        if not sampled:
            chosen = {"adapter_names": mix} if mixed else {}
            assert torch.equal(found, generated(model, ids, attention_mask=mask, **chosen))
    assert len(tapes) == 1
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    torch.manual_seed(7)
    found = decode.generate(ids, 20, **options)
    torch.manual_seed(7)
    assert torch.equal(found, eager.generate(ids, 20, **options))
    assert len(tapes) == 1 + mixed  # factors are stacked outside a recording, otherwise read where they lie


def test_gradients_are_awaited_where_a_recording_is_made(tapes):
    """And not on the stream of an earlier step, whose loss is still there."""

    def places():
        return [p.view_as(p).grad_fn.next_functions[0][0] for p in model.parameters() if p.requires_grad]

    model = wrapped(peftfast)
    loss = model(**batch()).loss
    before = places()
    state = [(p._version, p.data_ptr(), p.dtype, p.shape) for p in model.parameters()]
    step = peftfast.capture_training_step(model, batch(), warmup=1)
    assert not any(map(operator.is_, before, places()))
    step(batch())
    other = model(**batch()).loss
    before = places()
    step(batch())
    assert len(tapes) == 1 and not any(map(operator.is_, before, places()))
    assert [(p._version, p.data_ptr(), p.dtype, p.shape) for p in model.parameters()] == state
    first = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    (loss + other).backward()  # which still find their way
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, 2 * first[name])


def test_settings_of_a_recording(tapes):
    model = wrapped(peftfast)
    with pytest.raises(ValueError, match="capturable=True"):
        peftfast.capture_training_step(model, batch(), adam(model))

    def undecided(model, inputs):
        raise RuntimeError("the reason")

    step = peftfast.capture_training_step(model, batch(), warmup=1)
    step(batch())
    step.loss_function = undecided
    with pytest.raises(RuntimeError, match=r"cannot be captured.*DistributedDataParallel.*the reason"):
        step(batch())


# ---- on a GPU --------------------------------------------------------------------------------------------------------
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_replayed_steps_are_those_that_run(inside, autocast):
    batches = [{k: v.cuda() for k, v in batch(seed=i).items()} for i in range(8)]
    results = []
    for warmup in (3, 100):  # the second never records
        model = dropping().cuda()
        optimizer = adam(model, capturable=True)
        step = peftfast.capture_training_step(
            model, batches[0], optimizer if inside else None, autocast=autocast, warmup=warmup
        )
        torch.manual_seed(5)
        losses = []
        for one in batches:
            losses.append(step(one))
            if not inside:
                optimizer.step()
                optimizer.zero_grad()
        assert (step._recording.graph is not None) == (warmup == 3)
        results.append((torch.stack(losses), factors(model)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-2 if autocast else 1e-5, atol=0)
    for name, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][name], rtol=0.05 if autocast else 1e-3, atol=1e-4)


@pytest.mark.cuda
@needs_cuda
def test_replays_see_new_weights_and_gradients_lie_still():
    model = dropping().cuda()
    one = {k: v.cuda() for k, v in batch().items()}
    step = peftfast.capture_training_step(model, one, autocast=torch.bfloat16, accumulate=True)
    for _ in range(4):
        step(one)
    where = [p.grad.data_ptr() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    step(one)
    assert where == [p.grad.data_ptr() for p in model.parameters() if p.requires_grad]
    losses = {step(one).item() for _ in range(4)}
    assert len(losses) == 4  # every replay draws masks of its own
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.zero_()
    assert step(one).item() == pytest.approx(model.get_base_model()(**one).loss.item(), rel=1e-2)


@pytest.mark.cuda
@needs_cuda
def test_optimizers_that_count_on_the_host_are_refused():
    model = wrapped(peftfast).cuda()
    with pytest.raises(ValueError, match="capturable=True"):
        peftfast.capture_training_step(model, batch(), adam(model))


@pytest.mark.cuda
@needs_cuda
def test_what_waits_cannot_be_captured():
    model = wrapped(peftfast).cuda()
    one = {k: v.cuda() for k, v in batch().items()}
    step = peftfast.capture_training_step(model, one, loss_function=lambda m, b: m(**b).loss * m(**b).loss.item())
    for _ in range(3):
        step(one)
    with pytest.raises(RuntimeError, match="waits for the device"):
        step(one)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.randn(3, device="cuda")  # which torch 2.11 would refuse as long as it thinks that it is recording
    another = peftfast.capture_training_step(model, one)
    for _ in range(4):
        another(one)
    assert another._recording.graph is not None


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("mixed", [False, True])
def test_replayed_tokens_are_generates(mixed):
    model = several().cuda()
    decode = peftfast.capture_decoding(model, 3, 40, mixed=mixed)
    for seed in range(3):
        ids = prompts(seed=seed).cuda()
        for name in ("default", "other", "third"):
            model.set_adapter(name)
            assert torch.equal(decode.generate(ids, 20), generated(model, ids))
        if mixed:
            mix = ["default", BASE, "third"]
            assert torch.equal(decode.generate(ids, 20, adapter_names=mix), generated(model, ids, adapter_names=mix))
    assert all(recording.graph is not None for recording in decode._recordings.values())
    torch.manual_seed(0)
    first = decode.generate(ids, 12, do_sample=True)
    assert not torch.equal(decode.generate(ids, 12, do_sample=True), first)  # replays draw anew
