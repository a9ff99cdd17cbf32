"""Swapping an adapter's weights in place, next to PEFT."""

from __future__ import annotations

import importlib
import shutil
import warnings
import zlib

import oracle
import pytest
import torch
from many.adapters import TARGETS, check_reads_are_whole
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend

import peftfast
from peftfast import LoraConfig
from peftfast.api import inject_adapter_in_model
from peftfast.many import hotswap


def saved(tmp_path, name: str, make=oracle.llama, **options):
    """A saved adapter, written by PEFT, and its logits there."""
    peft = importlib.import_module("peft")
    torch.manual_seed(zlib.crc32(name.encode()))  # not hash(), which differs from process to process
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **options, "init_lora_weights": False})
        model = peft.get_peft_model(make(), config).eval()
    model.save_pretrained(tmp_path / name)
    with torch.no_grad():
        return str(tmp_path / name), oracle.logits(model)


def test_swapping_gives_the_other_adapter_whatever_its_rank(tmp_path):
    first, expected = saved(tmp_path, "first", r=4)
    others = [
        saved(tmp_path, "same rank", r=4, lora_alpha=20),
        saved(tmp_path, "smaller", r=2, lora_alpha=3),
        saved(tmp_path, "larger", r=16),
        saved(tmp_path, "small again", r=1),
        saved(tmp_path, "fewer modules", r=4, target_modules=["q_proj"]),
        saved(tmp_path, "other scalings", r=2, lora_alpha=3, alpha_pattern={"layers.1.self_attn.q_proj": 5}),
        saved(tmp_path, "fewer modules and scaled", r=2, lora_alpha=3, target_modules=["q_proj"]),
        (first, expected),
    ]
    model = peftfast.PeftModel.from_pretrained(oracle.llama(), first)
    with torch.no_grad():
        torch.testing.assert_close(oracle.logits(model), expected, rtol=1e-4, atol=1e-5)
        for i, (path, logits) in enumerate(others):
            hotswap.hotswap_adapter(model, path, "default")
            torch.testing.assert_close(oracle.logits(model), logits, rtol=1e-4, atol=1e-5)
            # what is saved now is the adapter that was swapped in
            model.save_pretrained(tmp_path / f"again{i}")
            again = peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path / f"again{i}")
            torch.testing.assert_close(oracle.logits(again), logits, rtol=1e-4, atol=1e-5)


def test_layers_with_ranks_and_scalings_of_their_own(tmp_path):
    first, _ = saved(tmp_path, "first", r=8)
    pattern = {"r": 4, "rank_pattern": {"layers.1.self_attn.q_proj": 2}, "use_rslora": False}
    path, logits = saved(tmp_path, "pattern", **pattern)
    model = peftfast.PeftModel.from_pretrained(oracle.llama(), first)
    hotswap.hotswap_adapter(model, path, "default")
    with torch.no_grad():
        torch.testing.assert_close(oracle.logits(model), logits, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path / "again")
        again = peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path / "again")
        torch.testing.assert_close(oracle.logits(again), logits, rtol=1e-4, atol=1e-5)


def test_layers_whose_names_end_alike_keep_their_own_scalings(tmp_path):
    def net():
        torch.manual_seed(0)
        linears = {name: torch.nn.Linear(8, 8) for name in ("a", "b", "lin")}
        return torch.nn.ModuleDict({**linears, "z": torch.nn.ModuleDict({"lin": torch.nn.Linear(8, 8)})})

    for name, pattern in (("first", {}), ("second", {"^lin": 2})):
        config = LoraConfig(r=4, target_modules=["a", "b", "lin"], rank_pattern=pattern, init_lora_weights=False)
        peftfast.get_peft_model(net(), config).save_pretrained(tmp_path / name)
    model = peftfast.PeftModel.from_pretrained(net(), tmp_path / "first")
    hotswap.hotswap_adapter(model, tmp_path / "second", "default")
    model.save_pretrained(tmp_path / "again")
    again = peftfast.PeftModel.from_pretrained(net(), tmp_path / "again", strict=True)
    scalings = {name: layer.scaling["default"] for name, layer in again.base_model.inventory.layers.items()}
    assert scalings == {"a": 2, "b": 2, "lin": 4, "z.lin": 2}


@pytest.mark.parametrize("target_rank", [None, 8])
def test_compiled_models_keep_their_graph(tmp_path, target_rank):
    ranks = (4, 4, 4) if target_rank is None else (4, 8, 2)
    files = [saved(tmp_path, f"a{i}", r=r, lora_alpha=5 * i + 1) for i, r in enumerate(ranks)]
    model = peftfast.PeftModel.from_pretrained(oracle.llama(), files[0][0])
    peftfast.prepare_model_for_compiled_hotswap(model, target_rank=target_rank, config=model.peft_config)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    batch = {**oracle.inputs(model), "use_cache": False}
    with torch.no_grad():
        for path, logits in (*files, files[0]):
            if path != files[0][0] or counter.frame_count:
                hotswap.hotswap_adapter(compiled, path, "default")
            torch.testing.assert_close(compiled(**batch).logits, logits, rtol=1e-4, atol=1e-5)
        base = model.get_base_model()
        for scale in (0.5, 2.0):
            for layer in model.base_model.inventory.layers.values():
                layer.set_scale("default", scale)
            torch.testing.assert_close(compiled(**batch).logits, base(**batch).logits)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target, tied", [("embed_tokens", False), ("embed_tokens", True), ("lm_head", False)])
def test_adapters_of_embeddings_whose_files_have_the_base_beside_them(tmp_path, target, tied, dtype):
    """Which are saved with them unasked, as by PEFT, and are the model's own."""
    folders = []
    for name in ("first", "second"):
        torch.manual_seed(len(name))
        config = LoraConfig(r=4, target_modules=["q_proj", target], init_lora_weights=False)
        other = peftfast.get_peft_model(oracle.llama(tied), config)
        folders.append(tmp_path / name)
        with pytest.warns(UserWarning, match="save_embedding_layers"):
            other.save_pretrained(folders[-1])
    assert any(key.endswith("base_layer.weight") for key in load_file(folders[1] / "adapter_model.safetensors"))
    first, second = (
        peftfast.PeftModel.from_pretrained(oracle.llama(tied).to(dtype), folder).eval() for folder in folders
    )
    hotswap.hotswap_adapter(first, folders[1], "default")
    with torch.no_grad():
        torch.testing.assert_close(oracle.logits(first), oracle.logits(second))
        first.base_model.inventory.base_module(f"model.{target}" if target != "lm_head" else target).weight[0, 0] += 1
    before = {name: p.clone() for name, p in first.named_parameters()}
    with pytest.raises(RuntimeError, match="unexpected keys found: .*base_layer.weight"):
        hotswap.hotswap_adapter(first, folders[0], "default")  # which was trained on another embedding
    assert all(torch.equal(p, before[name]) for name, p in first.named_parameters())


@pytest.mark.parametrize("named", [False, True], ids=["", "config named"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"use_dora": True},
        {"lora_alpha": 2.7},
    ],
    ids=["plain", "rslora", "patterns", "dora", "fraction"],
)
def test_what_has_room_for_other_ranks_is_saved_as_it_is(tmp_path, options, named):
    path, logits = saved(tmp_path, "first", **{"r": 4, "lora_alpha": 8, **options})
    model = peftfast.PeftModel.from_pretrained(oracle.llama(), path)
    for layer in model.base_model.inventory.layers.values():
        layer.set_scale("default", 0.5)  # which is not for the file
    peftfast.prepare_model_for_compiled_hotswap(model, target_rank=16, config=model.peft_config if named else None)
    model.save_pretrained(tmp_path / "again")
    config = model.peft_config["default"]
    assert config.r == 16 and config.rank_pattern == dict.fromkeys(options.get("rank_pattern", {}), 16)
    again = peftfast.PeftModel.from_pretrained(oracle.llama(), tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(oracle.logits(again), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        peftfast.AdaLoraConfig(init_r=4, target_r=2, total_step=10),
        LoraConfig(r=4, kasa_config=peftfast.KasaConfig()),
        LoraConfig(r=4, monteclora_config=peftfast.MontecloraConfig()),
    ],
    ids=["adalora", "kasa", "monteclora"],
)
def test_adapters_that_keep_more_than_factors_by_their_rank_get_no_room(config):
    config.target_modules = ["q_proj"]
    model = peftfast.get_peft_model(oracle.llama(), config).eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj: .*factors of this kind cannot be padded"):
        peftfast.prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("options", [{"use_dora": True}, {"kasa_config": peftfast.KasaConfig()}], ids=["dora", "kasa"])
def test_what_acts_with_zeros_is_not_put_to_zero(options, tmp_path):
    """Magnitudes of zero leave nothing of the layer, and what KaSA leaves out of the base stays out. PEFT swaps none
    of the two."""
    paths = {}
    for targets in (["q_proj"], ["q_proj", "v_proj"]):
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)
        model = peftfast.get_peft_model(oracle.llama(), config)
        model.save_pretrained(tmp_path / targets[-1])
        paths[targets[-1]] = str(tmp_path / targets[-1])
    with torch.no_grad():
        expected = oracle.logits(model)
        with pytest.raises(ValueError, match="has no .*v_proj.lora_A.weight.*load the new one"):
            hotswap.hotswap_adapter(model, paths["q_proj"], "default")
        assert torch.equal(oracle.logits(model), expected)
        other = peftfast.get_peft_model(oracle.llama(), config)
        hotswap.hotswap_adapter(other, paths["v_proj"], "default")
        torch.testing.assert_close(oracle.logits(other), expected)


def test_from_a_state_dict_and_into_an_injected_model(tmp_path):
    first, _ = saved(tmp_path, "first", r=4)
    path, logits = saved(tmp_path, "second", r=2)
    model = oracle.llama()
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), model, "mine")
    config = peftfast.PeftConfig.from_pretrained(path)
    tensors = {
        k.removeprefix("base_model.model.").replace(".weight", ".mine.weight"): v
        for k, v in peftfast.load_peft_weights(path).items()
    }
    hotswap.hotswap_adapter_from_state_dict(model, tensors, "mine", config)
    with torch.no_grad():
        torch.testing.assert_close(oracle.logits(model), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_and_groups(tmp_path, groups):
    def net():
        torch.manual_seed(3)
        return torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, groups=groups), torch.nn.ReLU()).eval()

    peft = importlib.import_module("peft")
    x = torch.randn(2, 4, 6, 6)
    outputs = []
    for name, r in (("big", 8), ("small", 2)):
        torch.manual_seed(r)
        model = peft.get_peft_model(net(), peft.LoraConfig(r=r, target_modules=["0"], init_lora_weights=False)).eval()
        model.save_pretrained(tmp_path / name)
        outputs.append(model(x))
    model = peftfast.PeftModel.from_pretrained(net(), tmp_path / "big")
    hotswap.hotswap_adapter(model, str(tmp_path / "small"), "default")
    torch.testing.assert_close(model(x), outputs[1], rtol=1e-4, atol=1e-5)
    hotswap.hotswap_adapter(model, str(tmp_path / "big"), "default")
    torch.testing.assert_close(model(x), outputs[0], rtol=1e-4, atol=1e-5)


def test_rows_of_tokens_are_no_factors(tmp_path):
    """A file of rows is refused by the name of its key; an adapter that has rows keeps them."""
    rows, _ = saved(tmp_path, "rows", r=4, trainable_token_indices=[1, 2])
    plain, _ = saved(tmp_path, "plain", r=4)
    for folder in (plain, rows):
        model = peftfast.PeftModel.from_pretrained(oracle.llama(), folder)
        with pytest.raises(RuntimeError, match=r"unexpected keys found: .*embed_tokens.*trainable_tokens_delta"):
            hotswap.hotswap_adapter(model, rows, "default")
    before = {n: p.clone() for n, p in model.named_parameters()}
    hotswap.hotswap_adapter(model, plain, "default")
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in before.items() if "trainable_tokens_delta" in n)


def test_files_are_read_as_by_loading(tmp_path):
    """Config and weights of one save, keys of older files, keys that are renamed."""
    model = peftfast.get_peft_model(oracle.llama(), LoraConfig(r=4, target_modules=TARGETS))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj

    def read():
        hotswap.hotswap_adapter(model, str(tmp_path / "one"), "default")
        return layer.lora_A["default"].weight.detach(), None, layer.scaling["default"]

    assert len(check_reads_are_whole(tmp_path / "one", read)) == 2
    path, expected = saved(tmp_path, "dora", use_dora=True)
    model = peftfast.PeftModel.from_pretrained(oracle.llama(), saved(tmp_path, "other", use_dora=True)[0])
    renamed = ("model.model.layers", "model.old.layers", {"key_mapping": {"^old": "model"}})
    for old, new, options in (("magnitude_vector", "magnitude_vector.weight", {}), renamed):
        changed = {k.replace(old, new): t for k, t in load_file(path + "/adapter_model.safetensors").items()}
        save_file(changed, path + "/adapter_model.safetensors")
        hotswap.hotswap_adapter(model, path, "default", **options)
        with torch.no_grad():
            torch.testing.assert_close(oracle.logits(model), expected, rtol=1e-4, atol=1e-5)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()


def test_arguments_that_nobody_knows_are_named(tmp_path):
    path, _ = saved(tmp_path, "first", r=4)
    model = peftfast.PeftModel.from_pretrained(oracle.llama(), path)
    with pytest.warns(peftfast.AdapterMismatchWarning, match=r"does not know the arguments \[.subfoldr.\].*subfolder"):
        hotswap.hotswap_adapter(model, path, "default", subfoldr="x")
    with pytest.raises(TypeError, match="subfoldr"):
        hotswap.hotswap_adapter(model, path, "default", subfoldr="x", strict=True)


def test_refusals_change_nothing(tmp_path):
    first, expected = saved(tmp_path, "first", r=4)
    model = peftfast.PeftModel.from_pretrained(oracle.llama(), first)
    wide, _ = saved(tmp_path, "wide", r=4, target_modules=["q_proj", "k_proj"])
    dropout, _ = saved(tmp_path, "dropout", r=4, lora_dropout=0.1)
    second, logits = saved(tmp_path, "second", r=4)
    peft = importlib.import_module("peft")
    ia3 = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    peft.get_peft_model(oracle.llama(), ia3).save_pretrained(tmp_path / "ia3")

    def refused(error, match, *args):
        with pytest.raises(error, match=match):
            hotswap.hotswap_adapter(model, *args)
        with torch.no_grad():
            torch.testing.assert_close(oracle.logits(model), expected, rtol=1e-4, atol=1e-5)

    refused(RuntimeError, "unexpected keys found:.*k_proj", wide, "default")
    refused(ValueError, "for lora_dropout, 0.0 != 0.1", dropout, "default")
    refused(ValueError, "Adapter other not found", second, "other")
    refused(ValueError, "Incompatible PEFT types found: LORA and IA3", str(tmp_path / "ia3"), "default")
    for what, change, match in (
        ("only one factor", lambda k, t: None if "lora_B" in k else t, "There is .*lora_A.weight, but no .*lora_B"),
        ("two ranks", lambda k, t: t[:, :2] if "lora_B" in k else t, r"different ranks: .*\[4, 32\].*\[32, 2\]"),
        ("NaN", lambda k, t: t * torch.nan, "has NaN or infinite values"),
        ("integers", lambda k, t: t.to(torch.int8), "has torch.int8 numbers, .* is torch.float32"),
    ):
        path = tmp_path / what
        shutil.copytree(second, path)
        tensors = {k: change(k, t) for k, t in load_file(path / "adapter_model.safetensors").items()}
        tensors = {k: t.contiguous() for k, t in tensors.items() if t is not None}
        save_file(tensors, path / "adapter_model.safetensors")
        refused(ValueError, match, str(path), "default")
    factor = model.base_model.model.model.layers[1].self_attn.v_proj.lora_A["default"]
    torch.nn.utils.parametrizations.weight_norm(factor)
    refused(ValueError, "layers.1.self_attn.v_proj.lora_A.default.weight is made of other tensors", second, "default")
    torch.nn.utils.parametrize.remove_parametrizations(factor, "weight")
    some = model.base_model.model.model.layers[1].self_attn.v_proj
    for merge in (model.base_model.merge_adapter, some.merge):  # one layer is enough
        merge()
        refused(ValueError, "currently merged into the base weights", second, "default")
        model.base_model.unmerge_adapter()
    with pytest.raises(ValueError, match="original rank is larger"):
        peftfast.prepare_model_for_compiled_hotswap(model, target_rank=2)
    before = {name: p.shape for name, p in model.named_parameters()}
    for options in ({"config": {"r": 8}}, {"config": [LoraConfig()]}, {"target_rank": 16.0}):
        with pytest.raises(TypeError, match=f"{next(iter(options))} must be "):
            peftfast.prepare_model_for_compiled_hotswap(model, **{"target_rank": 16, **options})
        assert {name: p.shape for name, p in model.named_parameters()} == before
    with pytest.raises(ValueError, match="check_compiles should be one of"):
        peftfast.prepare_model_for_compiled_hotswap(model, check_compiled="maybe")
    with pytest.raises(ValueError, match="No adapter layers found"):
        peftfast.prepare_model_for_compiled_hotswap(oracle.llama())
    with pytest.raises(ValueError, match=r"\*before\* compiling"):
        peftfast.prepare_model_for_compiled_hotswap(torch.compile(model, backend="eager"))
    with pytest.warns(UserWarning, match="already compiled"):
        peftfast.prepare_model_for_compiled_hotswap(torch.compile(model, backend="eager"), check_compiled="warn")
