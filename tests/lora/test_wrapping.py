"""What importing and wrapping cost."""

import ast
import copy
import importlib
import itertools
import random
import re
import warnings
from functools import partial
from importlib.metadata import version

import oracle
import pytest
import torch
from packaging.version import Version
from processes import run
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftfast
from peftfast.wrapping.patterns import pattern_of, pattern_value
from peftfast.wrapping.targets import Matcher, shortest_suffixes

peft = importlib.import_module("peft")

LARGE = {"layers": 32, "hidden": 64}  # 224 linear layers
OPTIONS = {"r": 8, "target_modules": "all-linear"}


def test_wrapping_makes_half_of_pefts_calls():
    """Once before counting: what is imported and compiled at first use is no part of it. Times: bench/adapters.py."""
    counts = {}
    for library in (peft, peftfast, peft, peftfast):
        base, config = oracle.llama(**LARGE), library.LoraConfig(**OPTIONS)
        counts[library] = oracle.python_calls(partial(library.get_peft_model, base, config))
        assert len(config.target_modules) == 7
    print({library.__name__: count for library, count in counts.items()})
    assert 2 * counts[peftfast] <= counts[peft]


class Allocations(TorchDispatchMode):
    MAKERS = ("empty", "empty_like", "zeros", "new_empty", "rand", "randn", "ones", "empty_strided")
    FILLERS = ("uniform_", "normal_", "zero_", "fill_", "kaiming_uniform_")

    def __init__(self):
        super().__init__()
        self.bytes, self.filled, self.elements = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in self.MAKERS or name == "_to_copy" or name == "clone":
            self.bytes += result.nbytes
        if name in self.FILLERS:
            self.filled += args[0].numel()
        return result


def test_no_weight_is_allocated_or_initialised_twice():
    base = oracle.llama()
    with Allocations() as seen:
        model = peftfast.get_peft_model(base, peftfast.LoraConfig(**OPTIONS))
    factors = [p for n, p in model.named_parameters() if "lora_" in n]
    assert seen.filled == sum(p.numel() for p in factors)
    assert seen.bytes == sum(p.nbytes for p in factors)


def test_loading_initialises_nothing(tmp_path):
    peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(**OPTIONS)).save_pretrained(tmp_path)
    base = oracle.llama()
    with Allocations() as seen:
        peftfast.PeftModel.from_pretrained(base, tmp_path)
    assert seen.filled == 0


def test_wrapping_moves_nothing_of_the_base():
    base = oracle.llama()
    before = {n: (p.data_ptr(), p.clone()) for n, p in base.named_parameters()}
    model = peftfast.get_peft_model(base, peftfast.LoraConfig(**OPTIONS))
    after = {n.replace(".base_layer", ""): p for n, p in model.get_base_model().named_parameters() if "lora_" not in n}
    assert after.keys() == before.keys()
    for name, (pointer, value) in before.items():
        assert after[name].data_ptr() == pointer and torch.equal(after[name], value)


IMPORT = "from peftfast import LoraConfig, PeftModel, TaskType, get_peft_model"

USE = """
import peftfast
from peftfast.wrapping.patterns import pattern_of, pattern_value
from peftfast.wrapping.targets import Matcher, shortest_suffixes
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
model = peftfast.patch(model, peftfast.LoraConfig(target_modules=["0"]))
model(torch.randn(2, 4)).sum().backward()
"""

LOADED = """
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
"""


def loaded_by(script):
    """Packages of which a process that has torch loads modules while it runs `script`."""
    start = "import sys, torch\nbefore = set(sys.modules)\n"
    return set(ast.literal_eval(run(["-c", f"{start}{script}{LOADED}"])))


def test_import_loads_nothing_but_its_own_modules():
    """What that takes: `python -X importtime -c "import peftfast"`."""
    assert loaded_by(IMPORT) == {"peftfast", "peftfast_kernels"}


def test_use_without_a_gpu_loads_nothing_large():
    assert not loaded_by(USE) & {"transformers", "triton", "bitsandbytes", "accelerate", "safetensors"}


@pytest.mark.parametrize(
    "targets, named",
    [
        ({"target_modules": ["linear1"]}, r"layers\.0\.linear1'"),
        ({"target_parameters": ["self_attn.in_proj_weight"]}, r"layers\.0\.self_attn\.in_proj_weight'"),
    ],
    ids=["module", "parameter"],
)
def test_modules_that_their_parents_read_are_named(targets, named):
    """torch's attention never calls its out_proj; its encoder layer calls nothing in evaluation, unless told to."""
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 1)
    options = {"r": 4, "init_lora_weights": False}
    with pytest.warns(peftfast.PeftWarning, match=rf"{named}.*set_fastpath_enabled"):
        model = peftfast.get_peft_model(encoder, peftfast.LoraConfig(**targets, **options)).eval()
    x = torch.randn(2, 5, 32)

    def change():
        with torch.no_grad():
            adapted = model(x)
            with model.disable_adapter():
                return (adapted - model(x)).abs().max()

    assert change() == 0  # which is why there is a warning
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert change() > 1e-3
        with warnings.catch_warnings():
            warnings.simplefilter("error", peftfast.PeftWarning)
            model.add_adapter("second", peftfast.LoraConfig(target_modules=["linear2"], **options))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with pytest.warns(peftfast.PeftWarning, match="out_proj.*neither used nor trained"):
        model.add_adapter("third", peftfast.LoraConfig(target_modules=["out_proj"], **options))


def tiny_mamba(kind):
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
    small = {
        "Mamba": {"state_size": 4, "time_step_rank": 4},
        "Jamba": {
            "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 2,
            "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        "WavLM": {
            "num_attention_heads": 2, "intermediate_size": 24, "conv_dim": [16, 16], "conv_stride": [5, 2],
            "conv_kernel": [10, 3], "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
        },
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**common, **small[kind])
    torch.manual_seed(0)
    head = {"WavLM": "WavLMModel"}.get(kind, f"{kind}ForCausalLM")
    return getattr(transformers, head)(config).eval()


@pytest.mark.parametrize(
    "kind, read, called",
    [("Jamba", "dt_proj", "x_proj"), ("Mamba", "dt_proj", "x_proj"), ("WavLM", "q_proj", "intermediate_dense")],
)
def test_modules_that_transformers_reads_are_named(kind, read, called):
    """Whose warning says that an adapter has no effect, and it has none; who is called is not named."""
    base = tiny_mamba(kind)
    x = torch.randn(2, 400) if kind == "WavLM" else torch.arange(1, 9).view(2, 4)

    def change(target):
        options = {"r": 4, "init_lora_weights": False}
        model = peftfast.get_peft_model(base, peftfast.LoraConfig(target_modules=[target], **options)).eval()
        with torch.no_grad():
            adapted = model(x)[0]
            with model.disable_adapter():
                difference = (adapted - model(x)[0]).abs().max()
        model.unload()
        return difference

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", peftfast.PeftWarning)
        effect = change(read)
    named = rf"{read}': {kind}.* reads the weight of its {read} and never calls it"
    assert any(re.search(named, str(w.message)) for w in caught) is bool(effect == 0)
    assert effect == 0 or Version(version("transformers")) < Version("5.17")
    with warnings.catch_warnings():
        warnings.simplefilter("error", peftfast.PeftWarning)
        assert change(called) > 0


class JambaMambaMixer(torch.nn.Module):
    """As in transformers 5.0."""

    def __init__(self):
        super().__init__()
        self.dt_proj = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.dt_proj(x).transpose(1, 2) + self.dt_proj.bias


def test_modules_that_transformers_read_later_only():
    with warnings.catch_warnings():
        warnings.simplefilter("error", peftfast.PeftWarning)
        peftfast.get_peft_model(torch.nn.Sequential(JambaMambaMixer()), peftfast.LoraConfig(target_modules=["dt_proj"]))


class Reads(torch.nn.Module):
    """`read` and `handed` are read, and all others are called in one way or another."""

    def __init__(self):
        super().__init__()
        for name in ("read", "described", "inside", "passed", "both", "fused", "handed", "lent"):
            setattr(self, name, torch.nn.Linear(8, 8))

    def forward(self, x):
        x = torch.nn.functional.linear(x, self.read.weight, self.read.bias).to(self.described.weight.dtype)
        x = sum((self.inside(part) for part in (x, x + self.inside.weight.sum())), self.later(self.passed, x))
        x = self.look_up(x) + self.use(x)
        return self.both(x) if self.both.weight.numel() else x

    def look_up(self, x):
        return self.row_of(x, self.handed)

    def row_of(self, x, table):
        return x + table.weight[0]

    def use(self, x):
        return self.call(self.lent, x)

    def call(self, module, x):
        return apply_to(module, x) + module.weight[0]

    def later(self, module, x):
        return module(x) + self.passed.weight[0] + apply(self, x)

    def fuse(self):
        """What a forward does not call may read weights."""
        return self.fused.weight @ self.fused.weight


def apply(module, x):
    return module.fused(x)


def apply_to(module, x):
    return module(x)


def test_only_modules_that_nobody_calls_are_named():
    with pytest.warns(peftfast.PeftWarning, match="never calls") as caught:
        peftfast.get_peft_model(torch.nn.Sequential(Reads()), peftfast.LoraConfig(target_modules="all-linear"))
    named = [str(w.message).partition(":")[0] for w in caught if "never calls" in str(w.message)]
    assert sorted(named) == ["'0.handed'", "'0.read'"]


def test_targets_chosen_from_the_graph_are_called():
    """WavLM's attention gives a function of torch's the weights of its projections."""
    transformers = pytest.importorskip("transformers")
    config = transformers.WavLMConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", peftfast.PeftWarning)
        model = peftfast.get_peft_model(
            transformers.WavLMModel(config).eval(), peftfast.LoraConfig(init_lora_weights=False)
        )
    assert not [w for w in caught if "never calls" in str(w.message)]
    model(torch.randn(1, 400)).last_hidden_state.square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) > 4 and all(p.grad.abs().max() > 0 for p in trained.values())


def test_ia3_on_mamba():
    """PEFT refuses LoRA and AdaLoRA on out_proj, and takes IA3, which is called there without fused kernels."""
    ids = torch.arange(1, 9).view(2, 4)
    outputs = []
    for library in (peft, peftfast):
        config = library.IA3Config(target_modules=["in_proj", "out_proj"], feedforward_modules=["out_proj"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = library.get_peft_model(tiny_mamba("Mamba"), config).eval()
        said = [str(w.message) for w in caught if "past the adapter" in str(w.message)]
        assert len(said) == (library is peftfast)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, p in sorted(model.named_parameters()):
                if "ia3" in name:
                    p.copy_(1 + 0.3 * torch.randn(p.shape, generator=generator))
            outputs.append(model(ids).logits)
    torch.testing.assert_close(outputs[1], outputs[0])
    for config in (peftfast.LoraConfig, peftfast.AdaLoraConfig):
        more = {"total_step": 10} if config is peftfast.AdaLoraConfig else {}
        with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
            peftfast.get_peft_model(tiny_mamba("Mamba"), config(target_modules=["out_proj"], **more))


def test_all_linear_leaves_out_the_head_alone():
    """Not every module whose name ends like the head's, as the vision tower's `out_proj` in T5Gemma 2 does."""
    names = []
    for library in (peft, peftfast):
        base = oracle.llama()
        base.model.layers[0].mlp.lm_head = torch.nn.Linear(4, 4)
        model = library.get_peft_model(base, library.LoraConfig(**OPTIONS))
        names.append(sorted(n for n, p in model.named_parameters() if p.requires_grad))
    assert names[0] == names[1] and any("mlp.lm_head.lora_A" in n for n in names[1])


class Twofold(nn.Module):
    """Two of its modules hang in two places, and are called by their second names."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.second, self.last = self.first, self.head

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["head"]}])
def test_a_module_that_hangs_in_several_places_is_adapted_in_all(more, tmp_path):
    """What the adapted model computes is what it computes merged, and what PEFT computes merged."""
    x, base = torch.randn(5, 8, dtype=torch.float64), Twofold().double()
    models = [
        library.get_peft_model(copy.deepcopy(base), library.LoraConfig(target_modules=["first"], **more))
        for library in (peftfast, peft)
    ]
    with torch.no_grad():
        for parameter in models[0].parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        values = dict(models[0].named_parameters())
        for name, parameter in models[1].named_parameters():
            parameter.copy_(values[name])
        expected = models[0](x)
        models[1].save_pretrained(tmp_path)
        assert (models[1](x) - expected).abs().max() > 1e-2  # there the first place alone
        torch.testing.assert_close(peftfast.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), expected)
        ours, theirs = (model.merge_and_unload() for model in models)
        assert ours.first is ours.second and ours.head is ours.last
        theirs.last = theirs.head
        torch.testing.assert_close(ours(x), expected)
        torch.testing.assert_close(theirs(x), expected)


@pytest.mark.parametrize("place", ["base_layer", "inner.base_layer", "original_module", "inner.original_module.0"])
def test_modules_that_are_called_as_ours_are(place, tmp_path):
    """As in timm's DLA, whose first layers are `base_layer`."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Module(), nn.Linear(8, 2)
            *path, last = place.split(".")
            holder = self
            for name in path:
                holder.add_module(name, getattr(holder, name, nn.Module()))
                holder = getattr(holder, name)
            holder.add_module(last, nn.Linear(8, 8))

        def forward(self, x):
            return self.head(self.get_submodule(place)(x))

    def base():
        torch.manual_seed(0)
        return Named()

    models = []
    for library in (peftfast, peft):
        config = library.LoraConfig(target_modules="all-linear", init_lora_weights=False)
        models.append(library.get_peft_model(base(), config))
        assert models[-1].peft_config["default"].target_modules == {place, "head"}
    oracle.same_live_state(*models)
    models[0].save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = peftfast.PeftModel.from_pretrained(base(), tmp_path, strict=True)
    x = torch.randn(3, 8)
    torch.testing.assert_close(loaded(x), models[0](x))


all_calls = partial(oracle.python_calls, events=("call", "c_call"))


def test_the_cost_of_matching_grows_with_the_model_and_not_with_its_square():
    """Experts that are modules make tens of thousands of targets."""

    def calls(layers):
        leaves = ("w1", "norm", "gate")
        names = [f"layers.{i}.experts.{e}.{leaf}" for i in range(layers) for e in range(16) for leaf in leaves]
        targets, norms, gates = ([n for n in names if n.endswith(leaf)] for leaf in leaves)
        matcher = Matcher([*targets, *gates], exclude=norms, never=gates)
        ranks = {name: 1 + i % 5 for i, name in enumerate(targets)}

        def match():
            assert [n for n in names if matcher(n)] == targets
            assert shortest_suffixes(targets, names) == {"w1"}
            assert pattern_of(ranks, 0) == ranks
            assert [pattern_value(ranks, n, 0) for n in targets] == list(ranks.values())

        return all_calls(match)

    assert calls(16) < 2.5 * calls(8)


def test_the_cost_of_plans_and_extractions_grows_with_the_model_and_not_with_its_square():
    def make(experts):
        torch.manual_seed(0)
        return nn.ModuleList(nn.ModuleDict({n: nn.Linear(2, 2) for n in ("w1", "w2")}) for _ in range(experts))

    def calls(experts):
        base, tuned = make(experts), make(experts)
        targets = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
        with torch.no_grad():
            for expert in tuned:
                expert["w1"].weight.add_(1.0)
                expert["w2"].bias.add_(1.0)  # kept whole
        config = peftfast.LoraConfig(r=1, target_modules=targets[1:])
        plan = all_calls(lambda: peftfast.plan_adapter(base, config))
        half = all_calls(lambda: peftfast.plan_adapter(base[: experts // 2], config))  # a config for a larger model
        config = peftfast.LoraConfig(r=1, target_modules=[f"{target}x" for target in targets])
        none = all_calls(lambda: peftfast.plan_adapter(base, config))
        return plan, half, none, all_calls(lambda: peftfast.extract_lora(base, tuned, 1))

    calls(2)  # what is imported and compiled at first use
    few, many = calls(64), calls(128)
    assert all(b < 2.5 * a for a, b in zip(few, many, strict=True)), (few, many)


def test_patterns_match_as_in_peft():
    """Names as they are, anchored, and with dots over other letters; regexes; several that match."""
    from peft.utils.other import get_pattern_key

    parts = ["a", "b", "ab", "a_b", "axb", "b-1"]
    names = [".".join(p) for size in (1, 2, 3) for p in itertools.product(parts, repeat=size)]
    more = ["a.*", "^a", "^a.b", r"a\.b", "a|b", "(a|b)_b", "^.*b$", "b.", ".b", "a?b", "", "^"]
    keys = [*names, *(f"^{name}" for name in names), *more]
    draw = random.Random(0)
    for _ in range(300):
        pattern = {key: i for i, key in enumerate(draw.sample(keys, 6))}
        for name in draw.sample(names, 20):
            theirs = pattern.get(get_pattern_key(pattern.keys(), name))
            assert pattern_value(pattern, name, None) == theirs, (pattern, name)


def test_a_pattern_of_values_gives_them_back_in_any_order():
    """Names that end alike, that differ where others have a dot, and that are no plain names."""
    draw, parts = random.Random(0), ["a", "b", "ab", "a_b", "a+", "(x", "0", "12", "$", "^a", "a|b", "\\", "a b"]
    for _ in range(500):
        names = {".".join(draw.choices(parts, k=draw.randint(1, 4))) for _ in range(draw.randint(1, 12))}
        values = {name: draw.randint(1, 3) for name in sorted(names)}
        pattern = list(pattern_of(values, 2).items())
        draw.shuffle(pattern)
        assert {name: pattern_value(dict(pattern), name, 2) for name in values} == values
