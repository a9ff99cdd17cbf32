"""LoRAs in place of other adapters and of full trainings: equal where the rank allows, else the nearest."""

from __future__ import annotations

import copy
import re
import warnings

import numpy
import oracle
import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import peftfast
from peftfast.extraction.factors import svd
from peftfast.files.io import save_adapter

LINEARS = ["q_proj", "o_proj", "down_proj"]


def adapted(make=oracle.llama, config=None, library=peftfast, **options):
    """A model with an adapter that does something."""
    torch.manual_seed(1)
    config = config or library.LoraConfig(**{"r": 4, "target_modules": LINEARS, **options})
    return oracle.moved(library.get_peft_model(make(), config).eval())


def loaded(make, config, tensors, library=peftfast):
    model = library.get_peft_model(make(), copy.deepcopy(config)).eval()
    result = library.set_peft_model_state_dict(model, tensors)
    assert not result.unexpected_keys
    names = set(library.get_peft_model_state_dict(model, save_embedding_layers=False))
    assert names == set(tensors), names ^ set(tensors)
    return model


def changes(model):
    """W' - W of every adapted module in fp64, from merging."""
    layers = {k: m for k, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    return {key: layer.get_delta_weight("default").detach().double() for key, layer in layers.items()}


def nearest(change, rank):
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


METHODS = {
    "adalora": lambda **o: peftfast.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=LINEARS, **o),
    "dora": lambda **o: peftfast.LoraConfig(r=4, target_modules=LINEARS, use_dora=True, **o),
    "rslora": lambda **o: peftfast.LoraConfig(r=4, lora_alpha=3, target_modules=LINEARS, use_rslora=True, **o),
}


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter")
@pytest.mark.parametrize("library", [peftfast, peft], ids=["peftfast", "peft"])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_function_in_a_file_that_everybody_reads(method, library, tmp_path):
    model = adapted(config=METHODS[method](task_type="CAUSAL_LM"))
    assert model.supports_lora_conversion()
    rank = 32 if method == "dora" else 4
    peftfast.save_as_lora(tmp_path, model, rank)
    config = oracle.saved_config(tmp_path)
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["use_dora"]) == ("LORA", rank, rank, False)
    assert config["task_type"] == "CAUSAL_LM" and set(config["target_modules"]) == set(LINEARS)
    again = library.PeftModel.from_pretrained(oracle.llama(), tmp_path).eval()
    torch.testing.assert_close(oracle.logits(again), oracle.logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(oracle.logits(again), oracle.logits(oracle.llama()), atol=1e-2)


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter")
@pytest.mark.parametrize("method", METHODS)
def test_no_lora_of_the_rank_is_nearer(method):
    model = adapted(config=METHODS[method]())
    small = loaded(oracle.llama, *peftfast.convert_to_lora(model, 2))
    for key, change in changes(model).items():
        best, ours = nearest(change, 2), changes(small)[key]
        assert (ours - change).norm() <= 1.0001 * (best - change).norm()


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter")
@pytest.mark.parametrize("rank", [2, 6, 0.5, 0.9, 1.0, numpy.int64(2), numpy.float32(0.5)])
def test_ranks_and_products_are_pefts(rank):
    options = {"r": 4, "lora_alpha": 7, "target_modules": LINEARS}
    twins = oracle.Twins(oracle.llama, options)
    config, tensors = peftfast.convert_to_lora(twins.ours, rank)
    rank = rank.item() if isinstance(rank, numpy.generic) else rank  # PEFT takes numpy's 2 for a share
    their_config, theirs = peft.tuners.lora.conversion.convert_to_lora(twins.theirs, rank)
    assert set(tensors) == set(theirs) and config.r == their_config.r
    if rank != 1.0:  # where rounding decides how many there are
        assert config.rank_pattern == their_config.rank_pattern == config.alpha_pattern
    for key in theirs:
        if "lora_A" in key:
            up = key.replace("lora_A", "lora_B")
            torch.testing.assert_close(tensors[up] @ tensors[key], theirs[up] @ theirs[key], rtol=1e-4, atol=1e-5)
    if isinstance(rank, float):
        assert max(config.rank_pattern.values()) <= 4
    loaded(oracle.llama, config, tensors)


KINDS = {
    "conv1d": (oracle.gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "embedding": (oracle.llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "saved": (oracle.llama, {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 5]}),
    "bias": (lambda: oracle.llama(bias=True), {"lora_bias": True}),
    "excluded": (oracle.llama, {"exclude_modules": ["model.layers.0.self_attn.q_proj"]}),
    "layers": (oracle.llama, {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "ranks": (oracle.llama, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 1}}),
    "regex": (oracle.llama, {"target_modules": r".*\.q_proj"}),
}


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter")
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_modules_and_all_that_an_adapter_keeps(kind, tmp_path):
    make, options = KINDS[kind]
    model = adapted(make, **options)
    peftfast.save_as_lora(tmp_path, model, 4)
    again = peftfast.PeftModel.from_pretrained(make(), tmp_path, strict=True).eval()
    torch.testing.assert_close(oracle.logits(again), oracle.logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0.9, 2])
def test_a_module_of_which_adalora_has_taken_all_ranks(rank, tmp_path):
    config = peftfast.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj", "v_proj"])
    model = adapted(config=config)
    kept = {f"model.layers.{i}.self_attn.{n}.lora_E": [True, False] * 2 for i in (0, 1) for n in ("q_proj", "v_proj")}
    kept["model.layers.0.self_attn.q_proj.lora_E"] = [False] * 4
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                parameter[[not k for k in kept[name.removeprefix("base_model.model.").removesuffix(".default")]]] = 0
    model.peft_config["default"].rank_pattern = kept
    model.save_pretrained(tmp_path)
    model = peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path)
    assert len(model.base_model.model.model.layers[0].self_attn.q_proj.lora_E["default"]) == 0
    lora, tensors = peftfast.convert_to_lora(model, rank)
    gone = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert len(gone) == (1 if rank == 0.9 else 2) and not gone.any()
    if rank == 2:
        made = loaded(oracle.llama, lora, tensors)
        torch.testing.assert_close(oracle.logits(made), oracle.logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [["c_attn", "c_proj"], ["wte"]])
def test_dora_in_every_layout(targets):
    """Also where a transposed weight is square, and in a table."""
    options = {"target_modules": targets, "use_dora": True, "fan_in_fan_out": targets != ["wte"]}
    model = adapted(oracle.gpt2, **options)
    again = loaded(oracle.gpt2, *peftfast.convert_to_lora(model, 32))
    torch.testing.assert_close(oracle.logits(again), oracle.logits(model), rtol=1e-4, atol=1e-4)


def test_convolutions_and_names_that_end_alike():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.lin = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)
            self.inner = nn.ModuleDict({"lin": nn.Linear(5, 5), "conv": nn.Conv2d(6, 6, 3, groups=2)})

        def forward(self, x):
            return self.inner["lin"](self.lin(self.inner["conv"](self.conv(x)).mean((2, 3))))

    x = torch.randn(2, 3, 9, 9)
    config = peftfast.LoraConfig(r=4, target_modules="conv|lin", init_lora_weights=False)
    model = peftfast.get_peft_model(Net(), config).eval()
    with pytest.warns(UserWarning, match="already a LoRA"):
        small = loaded(Net, *peftfast.convert_to_lora(model, 0.999))
    torch.testing.assert_close(small(x), model(x), rtol=0.05, atol=0.05)
    bare = model.get_base_model()
    del bare.peft_config  # nobody says what was meant: as little as there is
    config, tensors = peftfast.convert_to_lora(bare, 4)
    assert config.target_modules == "conv|lin" and len(tensors) == 4
    grouped = peftfast.get_peft_model(Net(), peftfast.LoraConfig(r=4, target_modules=["inner.conv"]))
    assert not grouped.supports_lora_conversion()
    with pytest.raises(TypeError, match=r"do not support LoRA conversion: lora.Conv2d .*inner.conv"):
        peftfast.convert_to_lora(grouped, 2)


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter")
def test_factors_of_half_precision():
    config = peftfast.LoraConfig(r=4, target_modules=["q_proj"], use_rslora=True, init_lora_weights=False)
    model = peftfast.get_peft_model(oracle.llama().bfloat16(), config, autocast_adapter_dtype=False)
    _, tensors = peftfast.convert_to_lora(model, 4)
    for key, change in changes(model).items():
        a, b = (tensors[f"base_model.model.{key}.lora_{side}.weight"] for side in "AB")
        assert a.dtype is b.dtype is torch.bfloat16
        assert oracle.rms_error(b.double() @ a.double(), change) < 0.01


def test_refusals_of_conversion():
    model = adapted()
    with pytest.raises(TypeError, match="Could not detect any layer that supports LoRA conversion"):
        peftfast.convert_to_lora(oracle.llama(), 4)
    with pytest.raises(TypeError, match="do not support LoRA conversion: ia3.Linear"):
        peftfast.convert_to_lora(adapted(config=peftfast.IA3Config()), 4)
    with pytest.raises(ValueError, match="Adapter x not found. Adapters present: \\['default'\\]"):
        peftfast.convert_to_lora(model, 4, "x")
    for rank, said in ((0, "rank of 0"), (-1, "at least 1"), (1.5, "between 0 and 1 but got 1.5")):
        with pytest.raises(ValueError, match=said):
            peftfast.convert_to_lora(model, rank)
    with pytest.raises(TypeError, match="rank must be an int"):
        peftfast.convert_to_lora(model, True)
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        peftfast.save_as_lora(__file__, model, 4)
    with pytest.raises(ValueError, match=re.escape("The chosen rank 33 is larger than the weight shape (32)")):
        peftfast.convert_to_lora(model, 33)
    with pytest.raises(ValueError, match="sets bias=all"):
        peftfast.convert_to_lora(adapted(bias="all"), 4)
    with pytest.raises(ValueError, match="init_lora_weights='pissa' has changed the base weights"):
        peftfast.convert_to_lora(adapted(init_lora_weights="pissa"), 4)
    merged = adapted(use_dora=True)
    merged.merge_adapter()
    with pytest.raises(RuntimeError, match="depends on the base weight, which contains default now. Please unmerge"):
        peftfast.convert_to_lora(merged, 4)


# ---- of two models ---------------------------------------------------------------------------------------------------
def tuned(make, also=("norm", "bias")):
    """The model after a training that changed its matrices by rank 2, and other things."""
    model = make()
    generator = torch.Generator().manual_seed(5)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(word in name for word in also):
                p.add_(0.1 * noise(*p.shape))
            elif p.dim() == 2:
                p.add_(0.1 * noise(p.shape[0], 2) @ noise(2, p.shape[1]))
    return model


MODELS = {
    "llama": lambda: oracle.llama(),
    "llama, tied": lambda: oracle.llama(tied=True),
    "llama, biases": lambda: oracle.llama(bias=True),
    "gpt2": oracle.gpt2,
    "bert": oracle.bert,
    "t5": oracle.t5,
}


@pytest.mark.parametrize("library", [peftfast, peft], ids=["peftfast", "peft"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_training_of_the_whole_model_as_an_adapter(kind, library):
    make = MODELS[kind]
    after = tuned(make)
    config, tensors = peftfast.extract_lora(make(), after, 4)
    if library is peft:
        config = peft.LoraConfig(**{k: v for k, v in config.to_dict().items() if k in peft.LoraConfig().to_dict()})
    model = loaded(make, config, tensors, library)
    torch.testing.assert_close(oracle.logits(model), oracle.logits(after), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(oracle.logits(make()), oracle.logits(after), rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("library", [peftfast, peft], ids=["peftfast", "peft"])
@pytest.mark.parametrize("make", [oracle.bert, MODELS["llama, biases"]], ids=["bert", "llama"])
def test_where_all_that_differs_is_kept_whole_a_lora_is_somewhere(make, library):
    """A config without targets is one of the default targets, and all of these were among the modules kept whole."""
    after = make()
    with torch.no_grad():
        for name, p in after.named_parameters():
            if name.endswith("bias"):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    config, tensors = peftfast.extract_lora(make(), after, 4)
    if library is peft:
        config = peft.LoraConfig(**{k: v for k, v in config.to_dict().items() if k in peft.LoraConfig().to_dict()})
    model = loaded(make, config, tensors, library)
    torch.testing.assert_close(oracle.logits(model), oracle.logits(after))
    with pytest.raises(ValueError, match="No module is left for a LoRA to be in; all are kept whole: '0'"):
        peftfast.extract_lora(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)), 2)


def test_a_tied_head_stays_tied():
    def make():
        return oracle.llama(tied=True)

    after = tuned(make)
    config, tensors = peftfast.extract_lora(make(), after, 4)
    assert config.ensure_weight_tying and torch.equal(
        tensors["base_model.model.lm_head.lora_A.weight"],
        tensors["base_model.model.model.embed_tokens.lora_embedding_B"].t(),
    )
    state = {key: value for key, value in after.state_dict().items() if key != "lm_head.weight"}  # as files have it
    assert all(torch.equal(value, tensors[key]) for key, value in peftfast.extract_lora(make(), state, 4)[1].items())
    merged = loaded(make, config, tensors).merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(oracle.logits(merged), oracle.logits(after), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("differs", ["weight", "bias"])
def test_a_head_that_is_tied_in_the_base_and_learnt_something_of_its_own(differs):
    def make():
        model = oracle.llama(tied=True)
        torch.manual_seed(0)
        model.lm_head = torch.nn.Linear(32, oracle.VOCABULARY)
        model.lm_head.weight = model.model.embed_tokens.weight
        return model

    after = tuned(make, also=())
    with torch.no_grad():
        if differs == "weight":  # by no more than the rank has room for
            more = torch.randn(oracle.VOCABULARY, 1) @ torch.randn(1, 32)
            after.lm_head.weight = torch.nn.Parameter(after.lm_head.weight + more)
        else:
            after.lm_head.bias += 1
    model = loaded(make, *peftfast.extract_lora(make(), after, 4))
    torch.testing.assert_close(oracle.logits(model), oracle.logits(after), rtol=1e-3, atol=1e-3)


def test_what_was_merged_comes_out_again(tmp_path):
    model = adapted(r=3)
    expected = oracle.logits(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    config, tensors = peftfast.extract_lora(oracle.llama(), tmp_path, 3)
    assert config.modules_to_save is None and set(config.target_modules) == set(LINEARS)
    again = loaded(oracle.llama, config, tensors)
    torch.testing.assert_close(oracle.logits(again), expected, rtol=1e-4, atol=1e-4)


def test_only_what_differs_and_ranks_by_what_they_keep(caplog):
    make = oracle.llama
    after = make()
    with torch.no_grad():
        weight = after.model.layers[1].self_attn.q_proj.weight
        weight.add_(torch.outer(torch.ones(32), torch.ones(32)))
        weight.add_(0.01 * torch.randn(32, 32))
    with caplog.at_level("INFO", logger="peftfast"):
        config, tensors = peftfast.extract_lora(make(), after.state_dict(), 0.9)
    assert config.rank_pattern == {"model.layers.1.self_attn.q_proj": 1} and len(tensors) == 2
    assert config.target_modules == {"1.self_attn.q_proj"}
    assert re.search(r"1 modules, 0.9\d+ to 0.9\d+ of the change kept", caplog.text)
    assert peftfast.get_peft_model(make(), config).get_nb_trainable_parameters()[0] == 64


class Attention(nn.MultiheadAttention):
    def __init__(self):
        super().__init__(8, 2)

    def forward(self, x):
        return super().forward(x, x, x)[0]


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.called(x @ self.read.weight.t())


@pytest.mark.parametrize("library", [peftfast, peft], ids=["peftfast", "peft"])
@pytest.mark.parametrize(
    "make", [Reads, lambda: nn.Sequential(Attention(), nn.Linear(8, 8))], ids=["own", "torch's attention"]
)
def test_weights_that_are_read_past_an_adapter_are_kept_whole(make, library):
    base, x = make(), torch.randn(2, 3, 8)
    after = copy.deepcopy(base)
    with torch.no_grad():
        for name, p in after.named_parameters():
            if name in ("read.weight", "called.weight", "0.out_proj.weight", "1.weight"):
                p.add_(torch.outer(torch.randn(8), torch.randn(8)))
    config, tensors = peftfast.extract_lora(base, after, 1)
    if library is peft:
        config = peft.LoraConfig(**{k: v for k, v in config.to_dict().items() if k in peft.LoraConfig().to_dict()})
    torch.testing.assert_close(loaded(lambda: base, config, tensors, library)(x), after(x))


class Others(nn.Module):
    """What can carry no LoRA of any rank, and two layers of one weight."""

    def __init__(self):
        from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=4)
        self.positions = OPTLearnedPositionalEmbedding(6, 8)
        self.one, self.two, self.narrow = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.two.weight = self.one.weight

    def forward(self, x):
        x = self.conv(x.mT).mT + self.positions(torch.ones(x.shape[:2]), 0)
        return self.narrow(self.two(self.one(x)))


def test_modules_that_can_carry_no_lora_are_kept_whole():
    base, x = Others(), torch.randn(2, 3, 8)
    after = copy.deepcopy(base)
    with torch.no_grad():
        for p in after.parameters():
            p += torch.randn(p.shape) * (p.dim() > 1)
    config, tensors = peftfast.extract_lora(base, after, 8)
    assert config.modules_to_save == ["conv", "positions"]
    assert config.target_modules == {"one", "two", "narrow"} and config.rank_pattern == {"narrow": 2}
    torch.testing.assert_close(loaded(lambda: base, config, tensors)(x), after(x), rtol=1e-4, atol=1e-4)


def test_what_only_the_trained_model_has_is_named():
    base, tuned = oracle.llama(layers=1), oracle.llama(layers=2)
    with pytest.warns(peftfast.AdapterMismatchWarning, match=r"leaves out: 'model\.layers\.1\.input_layernorm") as said:
        peftfast.extract_lora(base, tuned, rank=2)
    assert len(said) == 1
    whole = {**base.state_dict(), "model.norm.weight": base.model.norm.weight + 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peftfast.extract_lora(base, whole, rank=2)


def test_another_dtype_is_no_change():
    after = oracle.llama()
    with torch.no_grad():
        after.lm_head.weight[0] += 1e-5  # less than a half-precision base could hold
    base = oracle.llama().to(torch.float16)
    for parameter in after.parameters():
        parameter.data = parameter.data if parameter is after.lm_head.weight else parameter.data.half().float()
    config, _ = peftfast.extract_lora(base, after, 1)
    assert config.target_modules == {"lm_head"} and config.modules_to_save is None
    with pytest.raises(ValueError, match="do not differ"):
        peftfast.extract_lora(oracle.llama(), oracle.llama().to(torch.bfloat16), 1)


@pytest.mark.parametrize("noise", [0.0, 0.05, 1.0])
def test_large_weights_are_decomposed_as_far_as_needed(noise, monkeypatch):
    """Within a thousandth of what the best factors leave, also where nothing stands out of noise; nobody's random
    numbers are used up."""
    torch.manual_seed(0)
    change = torch.randn(600, 16) @ torch.randn(16, 640) / 4 + noise * torch.randn(600, 640)
    before = torch.get_rng_state()
    found = svd(change, 16)
    assert torch.equal(torch.get_rng_state(), before) and len(found.s) == 32
    best = torch.linalg.svdvals(change.double())
    left = (found.u[:, :16] * found.s[:16] @ found.vh[:16] - change).norm()
    assert left <= 1.001 * (best[16:] ** 2).sum().sqrt() + 1e-5 * change.norm()
    torch.testing.assert_close(found.energy, (best**2).sum(), rtol=1e-5, atol=0)
    assert len(svd(change, 0.5).s) == len(svd(change, 76).s) == 600


def test_names_that_end_like_others():
    def make():
        torch.manual_seed(0)
        inner = nn.ModuleDict({"lin": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
        return nn.ModuleDict({"lin": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "inner": inner})

    after = make()
    with torch.no_grad():
        after["lin"].weight.add_(1)
        after["norm"].weight.add_(1)
    config, tensors = peftfast.extract_lora(make(), after, 1)
    assert config.target_modules == "lin" and config.modules_to_save == ["norm"]
    loaded(make, config, tensors)  # PEFT keeps inner.norm as well then, and so it is there
    assert torch.equal(tensors["base_model.model.inner.norm.weight"], torch.ones(4))


@pytest.mark.parametrize("library", [peftfast, peft], ids=["peftfast", "peft"])
def test_a_file_may_have_the_ranks_of_names_that_end_alike_in_any_order(library, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.lin, self.z = nn.Linear(8, 8), nn.ModuleDict({"lin": nn.Linear(8, 8)})

        def forward(self, x):
            return self.z["lin"](self.lin(x))

    after, x = Net(), torch.randn(3, 8)
    with torch.no_grad():
        for linear, rank in ((after.lin, 1), (after.z["lin"], 3)):
            linear.weight.add_(torch.randn(8, rank) @ torch.randn(rank, 8))
    config, tensors = peftfast.extract_lora(Net(), after, 1.0 - 1e-6)
    save_adapter(tmp_path, config, tensors, auto_mapping=None)
    again = peft.LoraConfig.from_pretrained(tmp_path)
    assert sorted(again.rank_pattern.values()) == [1, 3]
    again.save_pretrained(tmp_path)  # PEFT sorts what it writes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of another writer of the config
        model = library.PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(model(x), after(x), rtol=1e-4, atol=1e-4)


def test_refusals_of_extraction(tmp_path):
    base, other = oracle.llama(), tuned(oracle.llama)
    with pytest.raises(ValueError, match="do not differ in any tensor"):
        peftfast.extract_lora(base, oracle.llama(), 4)
    with pytest.raises(ValueError, match="models without adapters"):
        peftfast.extract_lora(base, adapted(), 4)
    with pytest.raises(TypeError, match="folder, a mapping of tensors or a model, got int"):
        peftfast.extract_lora(base, 3, 4)
    with pytest.raises(FileNotFoundError):
        peftfast.extract_lora(base, tmp_path, 4)
    state = other.state_dict()
    del state["model.norm.weight"]
    with pytest.raises(KeyError, match=r"no 'model.norm.weight'"):
        peftfast.extract_lora(base, state, 4)
    state = other.state_dict() | {"lm_head.weight": torch.zeros(70, 32)}
    with pytest.raises(ValueError, match=r"lm_head.weight is \[64, 32\] in the base and \[70, 32\].*resize"):
        peftfast.extract_lora(base, state, 4)
    state = other.state_dict() | {"lm_head.weight": torch.full((64, 32), torch.nan)}
    with pytest.raises(ValueError, match="lm_head.weight of the tuned model has values that are not finite"):
        peftfast.extract_lora(base, state, 4)


def test_a_trained_model_in_files(tmp_path):
    base, other = oracle.llama(), tuned(oracle.llama)
    other.save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    expected = peftfast.extract_lora(base, other, 4)[1]
    for source in (tmp_path, index):
        found = peftfast.extract_lora(base, source, 4)[1]
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    with pytest.raises(FileNotFoundError, match="modle.safetensors is neither"):  # and not what is beside it
        peftfast.extract_lora(base, tmp_path / "modle.safetensors", 4)
    shard = sorted(tmp_path.glob("*.safetensors"))[-1]
    shard.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        peftfast.extract_lora(base, tmp_path, 4)
    index.write_text("{")
    with pytest.raises(ValueError, match="index.json is damaged"):
        peftfast.extract_lora(base, tmp_path, 4)


def test_a_bias_beside_a_quantised_weight():
    def make():
        return oracle.llama(bias=True)

    base = make()
    peftfast.quantize_model(base, "nf4")
    with pytest.raises(ValueError, match="q_proj.bias differs, and model.layers.0.self_attn.q_proj is quantised"):
        peftfast.extract_lora(base, tuned(make, also=("bias",)), 4)


@pytest.mark.parametrize("make", [oracle.llama, lambda: oracle.gpt2(64)], ids=["linear", "conv1d"])
def test_of_a_quantised_base(make, tmp_path):
    after = tuned(make, also=())
    save_file({k: v.clone() for k, v in after.state_dict().items()}, tmp_path / "model.safetensors")
    base = make()
    peftfast.quantize_model(base, "nf4")
    config, tensors = peftfast.extract_lora(base, tmp_path, 64)
    model = loaded(lambda: copy.deepcopy(base), config, tensors)
    # a full rank makes up for what quantising lost, too
    torch.testing.assert_close(oracle.logits(model), oracle.logits(after), rtol=1e-3, atol=1e-3)
