"""Modules that share one weight with the input embedding, rows of it that are trained, and what a config calls a head:
the same modules, keys and logits as in PEFT."""

import copy
import importlib
import warnings

import oracle
import peft
import pytest
import torch
from safetensors.torch import load_file

import peftfast
from peftfast.methods import trainable_tokens

SIZES = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
IDS = torch.tensor([[3, 5, 9, 11], [5, 1, 7, 2]])


def seeded(make):
    torch.manual_seed(0)
    return make().eval()


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(BartConfig(**SIZES))


def pegasus():
    from transformers import PegasusConfig, PegasusForConditionalGeneration

    return PegasusForConditionalGeneration(PegasusConfig(**SIZES))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, pad_token_id=0, decoder_start_token_id=0, **sizes))


def distilbert():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4, "max_position_embeddings": 64}
    return DistilBertForSequenceClassification(DistilBertConfig(vocab_size=64, **sizes))


def bert_tokens():
    from transformers import BertConfig, BertForTokenClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return BertForTokenClassification(BertConfig(vocab_size=64, num_labels=3, **sizes))


MODELS = {
    "bart": bart, "pegasus": pegasus, "t5": t5, "gpt2": lambda: oracle.gpt2(), "llama": lambda: oracle.llama(),
    "llama tied": lambda: oracle.llama(tied=True),
}  # fmt: skip


def logits(model):
    seq2seq = model.config.is_encoder_decoder
    with torch.no_grad():
        return model(input_ids=IDS, **({"decoder_input_ids": IDS.flip(1)} if seq2seq else {})).logits


@torch.no_grad()
def randomise(model):
    g = torch.Generator().manual_seed(7)
    for _, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
        p.copy_(torch.randn(p.shape, generator=g) * 0.3)


def state_names(model):
    return {n for n in model.state_dict() if "delta" in n or "lora_" in n}


def compare(make, config, folder):
    """The same names, and PEFT's file gives PEFT's logits here, this library's gives its own there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(seeded(make), config(peft)).eval()
        ours = peftfast.get_peft_model(seeded(make), config(peftfast)).eval()
    assert state_names(ours) == state_names(theirs)
    assert torch.equal(logits(ours), logits(seeded(make)))  # a new adapter changes nothing
    for one, writer, reader in ((theirs, "peft", peftfast), (ours, "peftfast", peft)):
        randomise(one)
        one.save_pretrained(folder / writer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again = reader.PeftModel.from_pretrained(seeded(make), folder / writer).eval()
        assert not [w for w in caught if "keys" in str(w.message)], [str(w.message) for w in caught]
        torch.testing.assert_close(logits(again), logits(one))
        assert (logits(one) - logits(seeded(make))).abs().max() > 1e-2
    files = [load_file(folder / name / "adapter_model.safetensors") for name in ("peft", "peftfast")]
    assert files[0].keys() == files[1].keys()
    return ours


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", [None, "named"])
def test_trainable_tokens_alone(name, targets, tmp_path):
    """By default the rows of the input embedding; what shares its weight follows, and is saved under all names."""
    embedding = {"gpt2": "wte", "llama": "embed_tokens", "llama tied": "embed_tokens"}.get(name, "shared")

    def config(library):
        return library.TrainableTokensConfig(
            token_indices=[1, 5, 9], target_modules=[embedding] if targets else None
        )  # fmt: skip

    ours = compare(MODELS[name], config, tmp_path)
    expected = logits(ours)
    deltas = [n for n, p in ours.named_parameters() if "delta" in n]
    assert len(deltas) == 1  # one Parameter, whatever the number of names
    ours.merge_adapter()
    torch.testing.assert_close(logits(ours), expected)
    ours.unmerge_adapter()
    assert torch.equal(logits(ours), expected)
    torch.testing.assert_close(logits(ours.merge_and_unload()), expected)


@pytest.mark.parametrize("name", ["bart", "pegasus", "t5", "llama tied"])
def test_rows_beside_lora_reach_every_module_of_the_weight(name, tmp_path):
    def config(library):
        return library.LoraConfig(r=4, target_modules=["q_proj", "q"], trainable_token_indices=[1, 5, 9])

    compare(MODELS[name], config, tmp_path)


def with_rows(library, tied=True):
    config = library.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 5])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.get_peft_model(oracle.llama(tied=tied), config).eval()
    randomise(model)
    return model


def tables(model):
    """The input embedding, and the head where it has the same weight."""
    base = model.get_base_model()
    return [base.get_input_embeddings(), *([base.lm_head] if base.config.tie_word_embeddings else [])]


@pytest.mark.parametrize("options", [{}, {"padding_idx": 5}, {"max_norm": 0.5}, {"scale_grad_by_freq": True}], ids=str)
def test_rows_are_looked_up_beside_the_table(options):
    """Values and gradients are PEFT's, rows in any order, those of padding too; the table is not copied for them unless
    a lookup does more than to read."""
    found, count = [], 40000
    ids = torch.tensor([[3, 5, 5, 11], [9, 1, 3, 2]])
    for library in (peftfast, peft):
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Embedding(count, 8, **options))
        config = library.TrainableTokensConfig(target_modules=["0"], token_indices=[9, 5, 3, 700])
        model = library.get_peft_model(base, config)
        (rows,) = (p for p in model.parameters() if p.requires_grad)
        with torch.no_grad():
            rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)))
        with oracle.Operations() as seen:
            y = model(ids)
            y.square().sum().backward()
        if library is peftfast:
            assert (seen.elements < 8 * count) is (options.keys() <= {"padding_idx"})
        found.append((y.detach(), rows.grad))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert found[0][1][2].any() and not found[0][1][3].any()


@pytest.mark.parametrize("rows", [[], {"embed_tokens": []}])
def test_no_rows_beside_a_lora(rows):
    """As a list of new tokens may be that turns out to be empty."""
    found = []
    for options in ({"trainable_token_indices": rows}, {}):
        config = peftfast.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, **options)
        torch.manual_seed(0)
        model = peftfast.get_peft_model(oracle.llama(), config)
        y = logits(model)
        torch.testing.assert_close(logits(model.merge_and_unload()), y)
        found.append(y)
    assert torch.equal(*found)


@pytest.mark.parametrize("bias", [False, True])
def test_rows_of_a_tied_head_are_multiplied_beside_it(bias, monkeypatch):
    """Results are those of a copy of the weight; without one, there is no gradient of all of it either."""
    found, largest = [], []
    for small in (0, 1 << 30):
        monkeypatch.setattr(trainable_tokens, "SMALL", small)
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Embedding(300, 48), torch.nn.Linear(48, 300, bias=bias))
        base.double()[1].weight = base[0].weight
        model = peftfast.get_peft_model(
            base, peftfast.TrainableTokensConfig(target_modules=["0", "1"], token_indices=[9, 5])
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for rows in trained:
                rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)))
        with oracle.Operations() as seen:
            y = model(IDS)
            y.square().sum().backward()
        found.append([y.detach(), *(rows.grad for rows in trained)])
        largest.append(seen.elements)
    torch.testing.assert_close(*found)
    assert largest[0] < 300 * 48 <= largest[1]


@pytest.mark.parametrize("tied", [True, False])
def test_the_weight_of_a_module_with_trained_rows_has_them_in_it(tied):
    ours, theirs = with_rows(peftfast, tied), with_rows(peft, tied)
    table = tables(ours)[0].original_module.weight
    for module, their_module in zip(tables(ours), tables(theirs), strict=True):
        assert torch.equal(module.weight, their_module.weight) and not torch.equal(module.weight, table)
        with ours.disable_adapter(), theirs.disable_adapter():
            assert module.weight is table and torch.equal(table, their_module.weight)
    merged = tables(ours)[0].weight.detach().clone()
    ours.merge_adapter()
    theirs.merge_adapter()
    assert tables(ours)[0].weight is tables(ours)[0].original_module.weight
    assert torch.equal(tables(ours)[0].weight, merged) and torch.equal(tables(theirs)[0].weight, merged)
    ours.unmerge_adapter()
    assert torch.equal(tables(ours)[0].weight, merged) and not torch.equal(table, merged)


def test_a_loss_that_multiplies_by_the_weight_of_the_head_trains_the_rows():
    """TRL's and Liger's losses that never hold all logits do that."""
    ours, theirs = with_rows(peftfast), with_rows(peft)

    def gradients(model, output):
        model.zero_grad()
        output.square().mean().backward()
        return oracle.gradients(model)

    def by_weight(model):
        base = model.get_base_model()
        return base.model(IDS).last_hidden_state @ base.lm_head.weight.t()

    want = gradients(ours, ours(input_ids=IDS).logits)
    assert any("trainable_tokens" in name for name in want)
    for model in (ours, theirs):
        found = gradients(model, by_weight(model))
        assert found.keys() == want.keys()
        for name, grad in found.items():
            torch.testing.assert_close(grad, want[name])
    assert tables(ours)[1].bias is None


@torch.no_grad()
def test_the_weight_of_a_head_in_batches_with_an_adapter_a_row():
    model = with_rows(peftfast)
    config = peftfast.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[7], init_lora_weights=False)
    model.add_adapter("other", config)
    embedding, head = tables(model)
    embedding.token_adapter.trainable_tokens_delta["other"].fill_(2.0)
    table, merged, seen = embedding.original_module.weight, embedding.weight, []
    head.register_forward_hook(lambda module, args, out: seen.append(module.weight))
    for names in (["default"] * 2, ["other"] * 2, ["default", "other"], ["__base__"] * 2):
        model(input_ids=IDS, adapter_names=names)
    default, other, mixed, base = seen
    assert torch.equal(default, merged) and mixed is table and base is table
    assert (other[7] == 2.0).all() and torch.equal(other[:7], table[:7])


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama tied"])
@pytest.mark.filterwarnings("ignore")
def test_rows_of_a_half_precision_base_are_kept_in_fp32(name, autocast):
    """As the factors beside them are: steps that are small beside a row would be rounded away."""
    config = {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}
    found = []
    for library in (peftfast, peft):
        base = seeded(MODELS[name]).bfloat16()
        model = library.get_peft_model(base, library.LoraConfig(**config), autocast_adapter_dtype=autocast)
        found.append({n: p.dtype for n, p in model.named_parameters() if p.requires_grad})
        assert logits(model).dtype == torch.bfloat16
    assert found[0] == found[1] and set(found[0].values()) == {torch.float32 if autocast else torch.bfloat16}


def test_casting_an_injected_adapter_casts_its_rows_too():
    found = []
    for library in (peftfast, peft):
        functional = importlib.import_module(f"{library.__name__}.functional")
        base = oracle.llama().bfloat16()
        config = library.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 5])
        functional.inject_adapter_in_model(config, base)
        functional.cast_adapter_dtype(base, "default")
        found.append({n: p.dtype for n, p in base.named_parameters() if p.requires_grad})
    assert found[0] == found[1] and set(found[0].values()) == {torch.float32}


@pytest.mark.parametrize("order", [("wte", "wpe"), ("wpe", "wte")])
def test_the_head_follows_the_embedding_not_the_first_of_a_dict(order, tmp_path):
    rows = {"wte": [5, 9, 11], "wpe": [0, 1]}

    def config(library):
        return library.LoraConfig(
            r=4, target_modules=["c_attn"], fan_in_fan_out=True, trainable_token_indices={n: rows[n] for n in order}
        )

    compare(MODELS["gpt2"], config, tmp_path)


def test_tied_modules_named_with_the_same_rows_share_them(tmp_path):
    def config(library):
        return library.LoraConfig(
            r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 5], "lm_head": [1, 5]}
        )

    ours = compare(MODELS["llama tied"], config, tmp_path)
    expected = logits(ours)
    torch.testing.assert_close(logits(ours.merge_and_unload()), expected)


def test_tied_modules_named_with_other_rows():
    rows = {"embed_tokens": [1, 5], "lm_head": [2]}
    own = peftfast.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=rows)
    model = peftfast.get_peft_model(oracle.llama(tied=True), own)
    assert sorted(tuple(p.shape) for n, p in model.named_parameters() if "delta" in n) == [(1, 32), (2, 32)]
    own = peftfast.LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices=rows, ensure_weight_tying=True
    )  # fmt: skip
    base = oracle.llama(tied=True)
    with pytest.raises(ValueError, match=r"lm_head.*\[2\]"):
        peftfast.get_peft_model(base, own)
    assert not hasattr(base, "peft_config")


@pytest.mark.parametrize("config, message", [
    (peftfast.LoraConfig(trainable_token_indices={"norm": [0]}), "'model.norm' is a LlamaRMSNorm, not a table of rows"),
    (peftfast.LoraConfig(trainable_token_indices={"embed_tokens": [3, 64]}), r"\[64\] are outside .model.embed"),
    (peftfast.LoraConfig(trainable_token_indices=[64]), r"\[64\] are outside 'model.embed_tokens'"),
    (peftfast.TrainableTokensConfig(token_indices=[1, 64]), r"\[64\] are outside the embedding"),
])  # fmt: skip
def test_rows_that_no_table_has(config, message):
    base = oracle.llama()
    with pytest.raises(ValueError, match=message):
        peftfast.get_peft_model(base, config)
    assert not any("trainable_tokens" in name or "lora" in name for name, _ in base.named_modules())


@pytest.mark.parametrize("rows", [{"embed_tokens": [1, 5], "lm_head": [2]}, {"lm_head": [2]}])
def test_rows_of_one_tied_module_are_merged_into_that_one(rows, tmp_path):
    from transformers import LlamaForCausalLM

    config = peftfast.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=rows)
    model = peftfast.get_peft_model(oracle.llama(tied=True), config).eval()
    randomise(model)
    table, expected = model.get_base_model().lm_head.original_module.weight, logits(model)
    before = table.detach().clone()
    with pytest.warns(UserWarning, match="lm_head' are tied to other modules"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected) and torch.equal(table, before)
    assert all(module.original_module.weight is table for module in tables(model) if hasattr(module, "token_adapter"))
    with pytest.warns(UserWarning, match="no longer tied"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path).eval()), logits(merged))


def test_rows_that_come_to_differ_are_merged_together():
    model = with_rows(peftfast)
    rows = {"embed_tokens": [3], "lm_head": [2]}
    model.add_adapter("other", peftfast.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=rows))
    randomise(model)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model)
    for names in (["default", "other"], ["default"]):
        model.merge_adapter(names)
        torch.testing.assert_close(logits(model), expected)
        model.unmerge_adapter()
        assert torch.equal(logits(model), expected)
    model.delete_adapter("other")
    model.merge_adapter()
    model.add_adapter("other", peftfast.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=rows))
    with pytest.raises(ValueError, match="Unmerge first"):
        model.merge_adapter(["other"])


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("order", [["tied", "own"], ["own", "tied"], ["own", "tied", "also"]], ids=" ".join)
def test_rows_of_a_heads_own_beside_rows_that_it_shares(order, low_cpu_mem_usage, tmp_path):
    """Every adapter is tied, or not, by itself: none is given another's rows, in whatever order they come."""
    rows = {"tied": [1, 5], "also": [4, 6], "own": {"embed_tokens": [3, 7], "lm_head": [2]}}
    configs = {n: {"target_modules": ["q_proj"], "trainable_token_indices": rows[n]} for n in order}
    alone = {}
    for name in order:
        model = peftfast.get_peft_model(oracle.llama(tied=True), peftfast.LoraConfig(r=4, **configs[name]), name)
        randomise(model)
        model.eval().save_pretrained(tmp_path)
        alone[name] = logits(model)
    first, *others = order
    model = peftfast.PeftModel.from_pretrained(oracle.llama(tied=True), tmp_path / first, first)
    for name in others:
        model.load_adapter(tmp_path / name, name, low_cpu_mem_usage=low_cpu_mem_usage, strict=True)
    embedding, head = (module.token_adapter.trainable_tokens_delta for module in tables(model))
    assert head["own"].shape[0] == 1 and embedding["own"].shape[0] == 2 and head["tied"] is embedding["tied"]
    for again in (False, True):
        for name in order:
            if again:
                tensors = load_file(tmp_path / name / "adapter_model.safetensors")
                peftfast.set_peft_model_state_dict(model, tensors, name, low_cpu_mem_usage=True)
            model.set_adapter(name)
            assert torch.equal(logits(model), alone[name])
            randomise(model)
    model.delete_adapter("own")
    peftfast.set_peft_model_state_dict(model, load_file(tmp_path / "tied" / "adapter_model.safetensors"), "tied")
    model.set_adapter("tied")
    assert torch.equal(logits(model), alone["tied"])


@pytest.mark.parametrize("name, embedding", [("llama tied", "embed_tokens"), ("gpt2", "wte"), ("bart", "shared")])
def test_a_tied_embedding_is_matched(name, embedding, tmp_path):
    """Named by its end while the config comes to hold its whole name too."""
    make, other = MODELS[name], {"gpt2": "c_attn"}.get(name, "q_proj")
    config = peftfast.LoraConfig(r=4, target_modules=[other, embedding], ensure_weight_tying=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", peftfast.AdapterMismatchWarning)
        model = peftfast.get_peft_model(seeded(make), config).eval()
        randomise(model)
        model.save_pretrained(tmp_path)
        again = peftfast.PeftModel.from_pretrained(seeded(make), tmp_path, strict=True).eval()
    torch.testing.assert_close(logits(again), logits(model))
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_a_head_that_is_declared_tied_follows_while_it_has_a_weight_of_its_own():
    """As in PEFT: it will be tied when the model is loaded again."""
    for library in (peft, peftfast):
        base = seeded(MODELS["llama tied"])
        base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.clone())
        library.get_peft_model(base, library.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True))
        assert "default" in base.lm_head.lora_A


@pytest.mark.parametrize(
    "make, targets",
    [(lambda: oracle.llama(tied=True, pad_token_id=None), ["lm_head"]), (oracle.gpt2, ["wte"]), (t5, ["shared"])],
    ids=["llama", "gpt2", "t5"],
)
def test_magnitudes_of_tied_modules_are_their_own(make, targets, tmp_path):
    """Rows of a head's weight have magnitudes, and columns of the table, so that merged they are two weights."""
    config = peftfast.LoraConfig(r=4, target_modules=targets, use_dora=True, ensure_weight_tying=True)
    model = peftfast.get_peft_model(seeded(make), copy.deepcopy(config)).eval()
    torch.testing.assert_close(logits(model), logits(seeded(make)))
    head = model.get_base_model().lm_head
    torch.testing.assert_close(head.lora_magnitude_vector["default"].weight, head.base_layer.weight.norm(dim=1))
    randomise(model)
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected) and head.weight is model.get_input_embeddings().weight
    model.base_model.add_weighted_adapter(["default"], [1.0], "same")
    model.set_adapter("same")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = peftfast.PeftModel.from_pretrained(seeded(make), tmp_path, strict=True).eval()
    assert torch.equal(logits(again), expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_adalora_of_tied_modules_is_refused():
    base = oracle.llama(tied=True)
    config = peftfast.AdaLoraConfig(total_step=10, target_modules=["lm_head"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match="lm_head"):
        peftfast.get_peft_model(base, config)
    assert type(base.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("library", [peft, peftfast])
def test_what_is_a_bias(library, tmp_path):
    """Parameters called `bias`, not whatever has the word in its name: T5's tables of positions stay frozen."""
    model = library.get_peft_model(seeded(t5), library.LoraConfig(r=4, target_modules=["q"], bias="all"))
    assert not [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    model.save_pretrained(tmp_path)
    assert all("lora_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    "make, task, config",
    [
        (lambda: seeded(bert_tokens), "TOKEN_CLS", {"target_modules": "all-linear"}),
        (oracle.llama, "CAUSAL_LM", {"target_modules": ["up_proj", "k_proj"], "exclude_modules": ["k_proj"]}),
        (oracle.llama, "CAUSAL_LM", {"target_modules": ["up_proj", "k_proj"], "modules_to_save": ["k_proj"]}),
    ],
    ids=["all-linear with a head", "excluded", "saved"],
)
def test_targets_kept_out_on_purpose_are_no_mismatch(make, task, config, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", peftfast.AdapterMismatchWarning)
        model = peftfast.get_peft_model(make(), peftfast.LoraConfig(r=4, task_type=task, **config))
        model.save_pretrained(tmp_path)
        peftfast.PeftModel.from_pretrained(make(), tmp_path, strict=True)


def test_a_target_that_ends_like_a_saved_module_is_trained_in_full(tmp_path):
    """`modules_to_save` means the ends of names: DistilBERT's pre_classifier is one of "classifier"."""
    with pytest.warns(peftfast.PeftWarning, match="pre_classifier.*trained in full"):
        config = peftfast.LoraConfig(r=4, task_type="SEQ_CLS", target_modules="all-linear")
        model = peftfast.get_peft_model(seeded(distilbert), config)
    trained = {n.rpartition(".modules_to_save")[0] for n, p in model.named_parameters() if "modules_to_save" in n}
    assert {n.rpartition(".")[2] for n in trained} == {"classifier", "pre_classifier"}
    assert not [n for n in state_names(model) if "pre_classifier" in n]
    randomise(model)
    model.eval().save_pretrained(tmp_path)
    for library in (peft, peftfast):
        again = library.PeftModel.from_pretrained(seeded(distilbert), tmp_path).eval()
        torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("first", [0, 1])
def test_two_ways_of_training_one_module_are_refused(first):
    kinds = [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [1]}]
    configs = [peftfast.LoraConfig(r=4, target_modules=["q_proj"], **kind) for kind in kinds]
    model = peftfast.get_peft_model(oracle.llama(), configs[first])
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"embed_tokens.*modules_to_save|embed_tokens.*trainable_token_indices"):
        model.add_adapter("second", configs[1 - first])
    assert list(model.peft_config) == ["default"] and model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("whole", [
    {"target_modules": ["embed_tokens"]}, {"target_modules": ["lm_head"]},
    {"target_modules": ["q_proj"], "target_parameters": ["lm_head.weight"]},
])  # fmt: skip
def test_rows_of_what_another_adapter_adapts_are_refused_by_name(whole):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        model = peftfast.get_peft_model(oracle.llama(tied=True), peftfast.LoraConfig(**whole))
    before = set(model.state_dict())
    config = peftfast.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1])
    with pytest.raises(ValueError, match=r"Rows of .*(embed_tokens|lm_head) are.*'default'\] adapt it"):
        model.add_adapter("second", config)
    assert list(model.peft_config) == ["default"] and set(model.state_dict()) == before


def test_a_saved_head_that_shares_the_trained_rows_is_refused():
    """PEFT makes such a model, whose forward then fails."""
    config = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "trainable_token_indices": [1]}
    model = oracle.llama(tied=True)
    with pytest.raises(ValueError, match=r"lm_head.*modules_to_save.*share the weight"):
        peftfast.get_peft_model(model, peftfast.LoraConfig(**config))
    assert model.state_dict().keys() == oracle.llama(tied=True).state_dict().keys()


@pytest.mark.parametrize("names", [("default", "b"), ("b", "default")], ids="+".join)
@pytest.mark.parametrize("other", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("ensure", [False, True])
def test_merged_one_after_the_other(ensure, other, names):
    """Whose weight is its own while it is merged goes back to the one that it shared, which others leave alone."""
    both = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": ensure}
    config = peftfast.LoraConfig(init_lora_weights=False, **both)
    model = peftfast.get_peft_model(oracle.llama(tied=True), config).eval()
    model.add_adapter("b", peftfast.LoraConfig(target_modules=[other], init_lora_weights=False))
    model.base_model.set_adapter(["default", "b"])
    expected = oracle.logits(model)
    if ensure and names[0] == "default":
        with pytest.raises(ValueError, match="share a weight that has adapters inside"):
            for name in names:
                model.merge_adapter([name])
        return
    for name in names:
        oracle.quietly(model.merge_adapter, [name])
    torch.testing.assert_close(oracle.logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(oracle.logits(model), expected)
    base = model.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.weight


def test_rows_that_two_adapters_replace_are_not_merged_together():
    """Whichever came last would win, and nobody could say what unmerging one of them means."""
    config = {"target_modules": ["q_proj"], "init_lora_weights": False}
    model = peftfast.get_peft_model(
        oracle.llama(), peftfast.LoraConfig(trainable_token_indices=[1, 2], **config), "one"
    )
    model.add_adapter("two", peftfast.LoraConfig(trainable_token_indices=[2, 3], **config))
    model.add_adapter("three", peftfast.LoraConfig(trainable_token_indices=[4], **config))
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def unchanged():
        now = model.state_dict()
        return now.keys() == before.keys() and all(torch.equal(now[k], v) for k, v in before.items())

    message = r"Token indices of adapter two are already defined.*\[2\]"
    with pytest.raises(ValueError, match=message):
        model.merge_and_unload(adapter_names=["one", "two"])
    assert unchanged()
    model.merge_adapter(["one"])
    with pytest.raises(ValueError, match=message):
        model.merge_adapter(["two"])
    model.merge_adapter(["three"])
    model.unmerge_adapter()
    assert unchanged()


@pytest.mark.parametrize("named", [True, False])
def test_the_usual_name_of_an_embedding(named):
    """Counts where a model does not say which its input embedding is."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Module()
            self.inner.register_module("embed_tokens" if named else "table", torch.nn.Embedding(7, 3))

    config = peftfast.TrainableTokensConfig(token_indices=[1])
    if named:
        model = peftfast.get_peft_model(Model(), config)
        assert model.base_model.targeted_module_names == ["inner.embed_tokens"]
    else:
        with pytest.raises(ValueError, match="Target modules embed_tokens not found.*get_input_embeddings"):
            peftfast.get_peft_model(Model(), config)


def test_a_model_that_does_not_say_which_its_embeddings_are():
    """FLAVA's methods raise: adapters of its linear layers do not need them."""

    class Silent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"tie_word_embeddings": True, "model_type": "silent"})()
            self.linear = torch.nn.Linear(4, 4)

        def get_input_embeddings(self):
            raise NotImplementedError("no")

        def get_output_embeddings(self):
            raise NotImplementedError("no")

        def forward(self, x):
            return self.linear(x)

    model = peftfast.get_peft_model(Silent(), peftfast.LoraConfig(target_modules="all-linear"))
    assert list(model.base_model.inventory.layers) == ["linear"]
    assert oracle.quietly(model.merge_and_unload).config.tie_word_embeddings
    with pytest.raises(ValueError, match="needs a model with get_input_embeddings"):
        peftfast.get_peft_model(Silent(), peftfast.LoraConfig(target_modules=["linear"], trainable_token_indices=[0]))


def bert_head():
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = BertForMaskedLM(BertConfig(vocab_size=64, **sizes))
    with torch.no_grad():
        model.cls.predictions.bias.normal_(generator=torch.Generator().manual_seed(3))
    return model


@pytest.mark.parametrize("ensure", [True, False])
@pytest.mark.parametrize("saved", ["word_embeddings", "decoder"])
def test_saved_copies_of_a_tied_head_leave_its_bias_to_the_base(saved, ensure, tmp_path):
    """BERT's head has a bias that the model holds under two names."""
    base = logits(seeded(bert_head))
    config = peftfast.LoraConfig(target_modules=["query"], modules_to_save=[saved], ensure_weight_tying=ensure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        model = peftfast.get_peft_model(seeded(bert_head), config)
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    randomise(model)
    assert {n for n, p in model.named_parameters() if not p.requires_grad and not torch.equal(p, before[n])} == set()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    trained = logits(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        model.add_adapter("other", config)
    model.set_adapter("other")
    assert torch.equal(logits(model), base)
    model.set_adapter("default")
    model.save_pretrained(tmp_path / "adapter", selected_adapters=["default"])
    again = peftfast.PeftModel.from_pretrained(seeded(bert_head), tmp_path / "adapter")
    assert torch.equal(logits(again), trained)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, atol=1e-5, rtol=1e-5)
    if ensure:  # still one
        assert merged.cls.predictions.bias is merged.cls.predictions.decoder.bias
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(type(merged).from_pretrained(tmp_path / "merged")), trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [
    peftfast.TrainableTokensConfig(token_indices=[1, 5]),
    peftfast.LoraConfig(target_modules=["query"], trainable_token_indices=[1, 5]),
])  # fmt: skip
def test_a_tied_head_keeps_its_bias_beside_trained_rows(rows):
    expected, model = seeded(bert_head), peftfast.get_peft_model(seeded(bert_head), rows)
    (delta,) = (p for n, p in model.named_parameters() if "trainable_tokens_delta" in n)
    with torch.no_grad():
        delta.add_(torch.randn_like(delta))
        expected.bert.embeddings.word_embeddings.weight[[1, 5]] = delta
    torch.testing.assert_close(logits(model), logits(expected))
