"""Every field of LoraConfig against PEFT: live names, files both ways, logits, gradients, merging."""

import oracle
import pytest
import torch

import peftfast
from peftfast.layers.layer import BaseTunerLayer

QV = ["q_proj", "v_proj"]

#: id -> (base model, fields). One case a field or a meaningful form of it.
CASES = {
    "plain": (oracle.llama, {"target_modules": QV}),
    "alpha": (oracle.llama, {"target_modules": QV, "r": 4, "lora_alpha": 17}),
    "rslora": (oracle.llama, {"target_modules": QV, "use_rslora": True, "r": 4}),
    "dropout": (oracle.llama, {"target_modules": QV, "lora_dropout": 0.3}),
    "targets-regex": (oracle.llama, {"target_modules": r".*layers\.1\..*(up|gate)_proj"}),
    "targets-all-linear": (oracle.llama, {"target_modules": "all-linear"}),
    "targets-all-linear-upper": (oracle.llama, {"target_modules": "ALL-Linear", "exclude_modules": ["k_proj"]}),
    "targets-table": (oracle.llama, {}),
    "targets-full-name": (oracle.llama, {"target_modules": ["model.layers.1.self_attn.q_proj", "down_proj"]}),
    "targets-head": (oracle.llama, {"target_modules": ["q_proj", "lm_head"]}),
    "targets-embedding": (oracle.llama, {"target_modules": ["q_proj", "embed_tokens"]}),
    "exclude-list": (
        oracle.llama, {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]},
    ),
    "exclude-regex": (oracle.llama, {"target_modules": QV, "exclude_modules": r".*\.0\..*v_proj"}),
    "layers-int": (oracle.llama, {"target_modules": QV, "layers_to_transform": 1}),
    "layers-list": (oracle.llama, {"target_modules": QV, "layers_to_transform": [0]}),
    "layers-none-of-a-pattern": (
        oracle.llama, {"target_modules": QV, "layers_to_transform": [], "layers_pattern": "layers"},
    ),
    "layers-pattern": (oracle.llama, {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "layers-patterns": (
        oracle.llama, {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    ),
    "rank-pattern": (oracle.llama, {"target_modules": QV, "rank_pattern": {r"layers\.1.*": 5, "v_proj": 3}}),
    "rank-pattern-anchored": (
        oracle.llama, {"target_modules": QV, "rank_pattern": {r"^model.layers.0.self_attn.q_proj": 2}},
    ),
    "alpha-pattern": (oracle.llama, {"target_modules": QV, "alpha_pattern": {"0.self_attn.q_proj": 32, "v_proj": 3}}),
    "patterns-rslora": (
        oracle.llama,
        {"target_modules": QV, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 5}, "use_rslora": True},
    ),
    "bias-all": (lambda: oracle.llama(bias=True), {"target_modules": QV, "bias": "all"}),
    "bias-lora-only": (lambda: oracle.llama(bias=True), {"target_modules": QV, "bias": "lora_only"}),
    "bias-none": (lambda: oracle.llama(bias=True), {"target_modules": QV}),
    "bias-all-bert": (oracle.bert, {"target_modules": ["query"], "bias": "all"}),
    "lora-bias": (lambda: oracle.llama(bias=True), {"target_modules": QV, "lora_bias": True}),
    "modules-to-save": (oracle.llama, {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    "modules-to-save-embedding": (oracle.llama, {"target_modules": QV, "modules_to_save": ["embed_tokens", "norm"]}),
    "tokens-list": (oracle.llama, {"target_modules": QV, "trainable_token_indices": [1, 5, 9]}),
    "tokens-dict": (oracle.llama, {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [2, 3]}}),
    "tokens-dict-head": (
        oracle.llama, {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [2], "lm_head": [7, 2]}},
    ),
    "tokens-tied": (lambda: oracle.llama(tied=True), {"target_modules": QV, "trainable_token_indices": [4, 11]}),
    "init-false": (oracle.llama, {"target_modules": QV, "init_lora_weights": False}),
    "init-gaussian": (oracle.llama, {"target_modules": QV, "init_lora_weights": "gaussian"}),
    "init-orthogonal": (oracle.llama, {"target_modules": QV, "init_lora_weights": "orthogonal"}),
    "tied-ignored": (lambda: oracle.llama(tied=True), {"target_modules": QV}),
    "tied-embedding": (lambda: oracle.llama(tied=True), {"target_modules": ["embed_tokens"]}),
    "tying-targets": (
        lambda: oracle.llama(tied=True), {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "tying-head": (
        lambda: oracle.llama(tied=True), {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    ),
    "tying-saved": (
        lambda: oracle.llama(tied=True),
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tying-saved-head": (
        lambda: oracle.llama(tied=True),
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ),
    "conv1d": (oracle.gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "conv1d-corrected": (oracle.gpt2, {"target_modules": ["c_attn"]}),
    "conv1d-table": (oracle.gpt2, {}),
    "conv1d-all-linear": (oracle.gpt2, {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "fan-in-corrected": (oracle.llama, {"target_modules": QV, "fan_in_fan_out": True}),
    "bert-table": (oracle.bert, {}),
    "bert-classifier": (oracle.bert, {"task_type": "SEQ_CLS"}),
    "bert-all-linear": (oracle.bert, {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    "llama-classifier": (oracle.llama_classifier, {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    "t5-table": (oracle.t5, {"task_type": "SEQ_2_SEQ_LM"}),
    "t5-all-linear": (oracle.t5, {"target_modules": "all-linear"}),
    "sites": (oracle.net, {"target_modules": ["embed", "conv1", "conv2", "conv3", "linear"], "r": 4}),
    "sites-saved": (oracle.net, {"target_modules": ["conv2", "linear"], "modules_to_save": ["head"], "bias": "all"}),
    "sites-lora-bias": (oracle.net, {"target_modules": ["conv1", "linear"], "lora_bias": True}),
    "inference": (oracle.llama, {"target_modules": QV, "inference_mode": True}),
    "causal": (oracle.llama, {"target_modules": QV, "task_type": "CAUSAL_LM", "revision": "main"}),
}  # fmt: skip


#: Two deliberate differences. PEFT makes the factors of a tied head Parameters of their own over the memory of the
#: embedding's, so that an optimizer steps twice; here they are views, in the file but not among the parameters. And
#: PEFT keeps the replaced rows in a buffer to unmerge them; here the layer keeps the bytes of what it merges.
DIFFERENT = r"lm_head\.lora_|trainable_tokens_original"
TIED_FACTORS = ("tying-targets", "tying-head")


@pytest.fixture(params=CASES, scope="module")
def twins(request):
    make, options = CASES[request.param]
    twins = oracle.Twins(make, options)
    twins.name = request.param
    return twins


def without(twins):
    return DIFFERENT if twins.name in TIED_FACTORS or "tokens" in twins.name else "$^"


def test_live_names_and_trainability(twins):
    oracle.same_live_state(twins.ours, twins.theirs, without=without(twins))
    if twins.name not in TIED_FACTORS:
        assert twins.ours.get_nb_trainable_parameters() == twins.theirs.get_nb_trainable_parameters()
    assert list(twins.ours.base_model.targeted_module_names) == list(twins.theirs.base_model.targeted_module_names)
    assert type(twins.ours).__name__ == type(twins.theirs).__name__


def test_configs_changed_alike(twins):
    """What wrapping writes into the config."""
    mine, other = twins.ours.peft_config["default"].to_dict(), twins.theirs.peft_config["default"].to_dict()
    assert {k: v for k, v in mine.items() if k != "peft_version"} == {
        k: v for k, v in other.items() if k != "peft_version"
    }


def test_warnings_alike(twins):
    """Whatever PEFT warns about when wrapping, so does this library, in the same words up to punctuation."""
    for text in twins.their_warnings:
        assert any(text.strip()[:60] == other.strip()[:60] for other in twins.our_warnings), (text, twins.our_warnings)


def test_logits_and_gradients(twins):
    with torch.no_grad():
        oracle.close(oracle.logits(twins.ours), oracle.logits(twins.theirs))
    if not any(p.requires_grad for p in twins.theirs.parameters()):
        return
    oracle.logits(twins.ours).pow(2).mean().backward()
    oracle.logits(twins.theirs).pow(2).mean().backward()
    grads = oracle.gradients(twins.theirs)
    if twins.name in TIED_FACTORS:  # one Parameter here, two there: their gradients add up
        prefix, embedding = "base_model.model.lm_head.lora_", "base_model.model.model.embed_tokens.lora_embedding_"
        for head, table in (("A", "B"), ("B", "A")):
            grads[f"{embedding}{table}.default"] += grads.pop(f"{prefix}{head}.default.weight").t()
    assert {n for n, p in twins.ours.named_parameters() if p.grad is not None} == set(grads) != set()
    largest = max(g.abs().max().item() for g in grads.values())
    for name, parameter in twins.ours.named_parameters():
        if name in grads:
            # sums that are zero but for rounding (the bias of keys) are as small as the others' errors
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-5 * largest)
    twins.ours.zero_grad()
    twins.theirs.zero_grad()


def test_files_both_ways(twins, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    oracle.quietly(twins.ours.save_pretrained, ours)
    oracle.quietly(twins.theirs.save_pretrained, theirs)
    # with bias="all" PEFT also writes the biases inside modules_to_save, under names that it does not read
    oracle.same_files(ours, theirs, without=r"head\.(original_module|modules_to_save)\.bias")
    with torch.no_grad():
        expected = oracle.logits(twins.theirs)
        for library, folder in ((twins.peft, ours), (peftfast, theirs), (peftfast, ours)):
            loaded = oracle.quietly(library.PeftModel.from_pretrained, twins.make(), folder)
            oracle.close(oracle.logits(loaded), expected)
            if library is peftfast:  # PEFT leaves the biases of an adapter that it loads for inference trainable
                assert not any(p.requires_grad for p in loaded.parameters())
    here = oracle.quietly(peftfast.PeftModel.from_pretrained, twins.make(), theirs, is_trainable=True)
    there = oracle.quietly(twins.peft.PeftModel.from_pretrained, twins.make(), ours, is_trainable=True)
    oracle.same_live_state(here, there, without=without(twins))


def test_low_cpu_mem_usage(twins, tmp_path):
    oracle.quietly(twins.theirs.save_pretrained, tmp_path)
    loaded = oracle.quietly(peftfast.PeftModel.from_pretrained, twins.make(), tmp_path, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    with torch.no_grad():
        oracle.close(oracle.logits(loaded), oracle.logits(twins.theirs))


def test_merge_and_unload(twins, tmp_path):
    """Last in the file: the twins of this case are used up."""
    with torch.no_grad():
        expected = oracle.logits(twins.theirs)
        ours = oracle.quietly(twins.ours.merge_and_unload)
        oracle.close(oracle.logits(ours), expected)
        theirs = oracle.quietly(twins.theirs.merge_and_unload)
    assert not any(isinstance(m, BaseTunerLayer) for m in ours.modules())
    assert [(n, type(m)) for n, m in ours.named_modules()] == [(n, type(m)) for n, m in theirs.named_modules()]
    # a table adapted without its tied head keeps the head as it was; in PEFT merging changes the head too
    untied = {"lm_head.weight"} if twins.name == "tied-embedding" else set()
    assert {n for n, _ in ours.named_parameters()} - untied == {n for n, _ in theirs.named_parameters()}
    assert not hasattr(ours, "peft_config")
