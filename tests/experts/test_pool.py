"""A pool with slots for experts: every row as alone with its own adapter, whatever was in the slot before."""

import importlib

import oracle
import pytest
import torch
from experts import moe, test_old_files
from experts.test_hotswap import saved
from experts.test_mixed import BASE, ids_of
from oracle import Operations, close

import peftfast

peft = importlib.import_module("peft")
#: ranks below and at the slots', other scalings, one without experts, one with ranks of its own
ADAPTERS = {
    "a": {"r": 4, "lora_alpha": 8},
    "b": {"r": 2, "lora_alpha": 3, "use_rslora": True},
    "c": {"r": 8, "lora_alpha": 5},
    "linears": {"r": 3, "target_parameters": None},
    "patterns": {"r": 3, "rank_pattern": {"down_proj": 1}, "alpha_pattern": {"gate_up_proj": 20}},
}


def pool_of(make, folder, names=ADAPTERS, **options):
    options = {"slots": 3, "max_rank": 8, "target_modules": ["q_proj"], "target_parameters": moe.BOTH, **options}
    pool = peftfast.AdapterPool(make(), **options)
    for name in names:
        pool.register(name, folder / name)
    return pool


@torch.no_grad()
def alone(make, folder, ids, names, call=lambda model, ids: model(input_ids=ids).logits):
    """Every row by PEFT, with its own adapter loaded and nothing else."""
    rows = []
    for i, name in enumerate(names):
        model = make()
        if name != BASE:
            moe.needs_peft_to_load()
            model = oracle.quietly(peft.PeftModel.from_pretrained, model, folder / name)
        rows.append(call(model.eval(), ids[i : i + 1]))
    return torch.cat(rows)


MIXES = [["a", BASE, "b"], ["c", "linears", "a", "a"], ["patterns", "b", BASE, "c"], ["b", "b"], [BASE, BASE]]


@pytest.mark.parametrize("make", [moe.qwen3_moe, moe.gpt_oss], ids=lambda make: make.__name__)
@torch.no_grad()
def test_samples_get_their_adapter_whatever_was_in_the_slot_before(make, tmp_path):
    for name, options in ADAPTERS.items():
        saved(tmp_path, name, make, **options)
    pool = pool_of(make, tmp_path)
    for names in MIXES:
        ids = ids_of(len(names))
        expected = alone(make, tmp_path, ids, names)
        close(pool(input_ids=ids, adapter_names=names).logits, expected)
        with pool.use(names) as slots:
            close(pool.forward(slots, input_ids=ids).logits, expected)
    assert pool.statistics.evictions > 0 and pool.pinned == 0
    ids = ids_of(2, 70)  # more tokens than anybody has beams
    close(pool(input_ids=ids, adapter_names=["a", "c"]).logits, alone(make, tmp_path, ids, ["a", "c"]))
    with pool.use(["a", "c"]), pytest.raises(ValueError, match="should be the same as the number of inputs"):
        pool.model(input_ids=ids)
    with pool.use(["a", "c"]) as slots:
        slots[0] = 7  # that nobody has
        logits = pool.forward(slots, input_ids=ids).logits
    assert logits[0].isnan().all() and torch.isfinite(logits[1]).all()
    pool.close()
    fresh = make()
    assert torch.equal(pool.model(input_ids=ids).logits, fresh(input_ids=ids).logits)
    assert [(n, type(m)) for n, m in pool.model.named_modules()] == [(n, type(m)) for n, m in fresh.named_modules()]


@torch.no_grad()
def test_routers_too(tmp_path):
    """Slots of a Parameter that is one matrix."""
    parameters = ["mlp.gate.weight", *moe.BOTH]
    for name in ("a", "b"):
        saved(tmp_path, name, **ADAPTERS[name], target_parameters=parameters)
    pool = pool_of(moe.qwen3_moe, tmp_path, ["a", "b"], target_parameters=parameters)
    names, ids = ["b", BASE, "a", "b"], ids_of(4)
    close(pool(input_ids=ids, adapter_names=names).logits, alone(moe.qwen3_moe, tmp_path, ids, names))


def test_generation_with_beams(tmp_path):
    for name in ("a", "b"):
        saved(tmp_path, name, **ADAPTERS[name])
    names, ids = ["b", BASE, "a"], ids_of(3)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    expected = alone(moe.qwen3_moe, tmp_path, ids, names, lambda model, ids: model.generate(input_ids=ids, **how))
    pool = pool_of(moe.qwen3_moe, tmp_path, ["a", "b"])
    assert torch.equal(pool.generate(input_ids=ids, adapter_names=names, **how), expected)


@torch.no_grad()
def test_beside_the_models_own_adapters(tmp_path):
    saved(tmp_path, "a", **ADAPTERS["a"])
    own, logits = saved(tmp_path, "own", **ADAPTERS["c"])
    model = peftfast.PeftModel.from_pretrained(moe.qwen3_moe(), own)
    pool = pool_of(lambda: model, tmp_path, ["a"])
    ids, names = ids_of(2), ["a", BASE]
    close(pool(input_ids=ids, adapter_names=names).logits, alone(moe.qwen3_moe, tmp_path, ids, names))
    close(oracle.logits(model), logits)
    config = peftfast.LoraConfig(target_parameters=["down_proj"], target_modules=["q_proj"])
    with pytest.raises(ValueError, match="must target the same set of parameters"):
        model.add_adapter("other", config)
    pool.close()
    close(oracle.logits(model), logits)
    pool = pool_of(moe.qwen3_moe, tmp_path, ["a"])
    with pytest.raises(ValueError, match=r"Adapters of .*experts adapt its \['gate_up_proj', 'down_proj'\]"):
        peftfast.get_peft_model(pool.model, config)
    close(pool(input_ids=ids, adapter_names=names).logits, alone(moe.qwen3_moe, tmp_path, ids, names))


@torch.no_grad()
def test_files_of_earlier_releases(tmp_path):
    """A pair of factors for every expert, under the names of layers that are fused now."""
    test_old_files.old_folder("mixtral", tmp_path / "old")
    pool = pool_of(moe.mixtral, tmp_path, ["old"], target_modules=[])
    ids, names = ids_of(2), ["old", BASE]
    close(pool(input_ids=ids, adapter_names=names).logits, alone(moe.mixtral, tmp_path, ids, names))


@torch.no_grad()
def test_the_cost_does_not_grow_with_the_slots(tmp_path):
    for name in ("a", "c"):
        saved(tmp_path, name, **ADAPTERS[name], target_modules=[])
    counts = []
    for slots in (2, 40):
        pool = pool_of(moe.qwen3_moe, tmp_path, ["a", "c"], slots=slots, target_modules=[])
        with pool.use(["a", "c", BASE]) as numbers, Operations() as seen:
            pool.forward(numbers, input_ids=ids_of(3))
        counts.append((len(seen.names), seen.elements))
    assert counts[0] == counts[1]


def test_refusals(tmp_path):
    saved(tmp_path, "large", r=9)
    saved(tmp_path, "a", r=4)
    saved(tmp_path, "half", target_parameters=["experts.gate_up_proj"])
    config, tensors = (
        peftfast.PeftConfig.from_pretrained(tmp_path / "a"),
        peftfast.load_peft_weights(tmp_path / "a"),
    )
    pool = pool_of(moe.qwen3_moe, tmp_path, ["large", "half"])
    pool.register("uneven", (config, {k: v[:-1] if k.endswith("experts.lora_A.weight") else
                                      v[:, :-1] if k.endswith("experts.lora_B.weight") else v
                                      for k, v in tensors.items()}))  # fmt: skip
    for name, match in {
        "large": "rank 9 at .*; the slots take up to 8",
        "half": r"half has target_parameters=\['experts.gate_up_proj'\]; slots are for .*gate_up_proj.*down_proj",
        "uneven": "has 15 ranks for 4 experts",
    }.items():
        with pytest.raises(ValueError, match=match), pool.use([name]):
            pass
    with pytest.raises(ValueError, match=r"target_parameters \['nothing'\] match no Parameter"):
        pool_of(moe.qwen3_moe, tmp_path, [], target_parameters=["nothing"])
    model = moe.qwen3_moe()
    with pytest.raises(ValueError, match="more than max_device_bytes"):
        pool_of(lambda: model, tmp_path, [], max_device_bytes=1000)
    assert not any("lora" in type(m).__module__ or "peftfast" in type(m).__module__ for m in model.modules())
