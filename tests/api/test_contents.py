"""What a saved adapter does, said without its base model."""

import oracle
import pytest
import torch

import peftfast
from peftfast.cli import USAGE_ERROR, main


def saved(folder, config, make=oracle.llama):
    torch.manual_seed(0)
    model = oracle.moved(peftfast.get_peft_model(make(), config))
    model.save_pretrained(folder)
    return model


def layer(model):
    return model.base_model.model.model.layers[1].self_attn.q_proj


@pytest.mark.parametrize("use_rslora", [False, True])
def test_lora(tmp_path, use_rslora):
    config = peftfast.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "embed_tokens"], rank_pattern={"layers.1.self_attn.q_proj": 2},
        use_rslora=use_rslora, modules_to_save=["lm_head"],
    )  # fmt: skip
    model = saved(tmp_path, config)
    contents = peftfast.adapter_contents(tmp_path)
    change = layer(model).get_delta_weight("default")
    s = torch.linalg.svdvals(change.double())
    most = 1 if s[0] ** 2 >= 0.9 * (s**2).sum() else 2
    line = contents.lines["model.layers.1.self_attn.q_proj"]
    assert line == f"rank 2, change of norm {float(change.norm()):.3g}, nine tenths of it in {most}"
    assert contents.lines["model.embed_tokens"].startswith("rank 4, change of norm")
    assert contents.lines["lm_head.weight"] == "kept whole, 64 x 32"
    assert list(contents.lines)[0] == "model.embed_tokens"
    assert str(contents).startswith("LORA for a base model that it does not name\n  model.embed_tokens")


def test_layers_in_their_order(tmp_path):
    saved(tmp_path, peftfast.LoraConfig(r=1, target_modules=["q_proj"]), lambda: oracle.llama(layers=11))
    names = list(peftfast.adapter_contents(tmp_path).lines)
    assert names == [f"model.layers.{i}.self_attn.q_proj" for i in range(11)]


def test_adalora_and_dora(tmp_path):
    config = peftfast.AdaLoraConfig(init_r=4, target_r=2, total_step=10, lora_alpha=3, target_modules=["q_proj"])
    model = saved(tmp_path / "a", config)
    with torch.no_grad():
        layer(model).lora_E["default"][1:3] = 0
    model.save_pretrained(tmp_path / "a")
    line = peftfast.adapter_contents(tmp_path / "a").lines["model.layers.1.self_attn.q_proj"]
    norm = float(layer(model).get_delta_weight("default").norm())
    assert line.startswith(f"rank 4, change of norm {norm:.3g}, ") and line.endswith("2 of 4 ranks in use")
    saved(tmp_path / "d", peftfast.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    assert all(line.endswith(", with magnitudes") for line in peftfast.adapter_contents(tmp_path / "d").lines.values())


def test_ia3_says_what_grows_and_what_shrinks(tmp_path):
    config = peftfast.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = peftfast.get_peft_model(oracle.llama(), config)
    with torch.no_grad():
        layer(model).ia3_l["default"][3:5] = torch.tensor([[1.5], [0.25]])
    model.save_pretrained(tmp_path)
    lines = peftfast.adapter_contents(tmp_path).lines
    said = "32 features of its output; 1 grow, most 3 (x 1.5); 1 shrink, most 4 (x 0.25)"
    assert lines["model.layers.1.self_attn.q_proj"] == said
    assert lines["model.layers.0.mlp.down_proj"] == "64 features of its input"


def test_others(tmp_path):
    saved(tmp_path / "t", peftfast.TrainableTokensConfig(token_indices=[3, 5]))
    assert peftfast.adapter_contents(tmp_path / "t").lines == {"model.embed_tokens": "rows 3, 5 of the table"}
    saved(tmp_path / "p", peftfast.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert peftfast.adapter_contents(tmp_path / "p").lines == {"prompt_embeddings": "kept whole, 3 x 32"}
    saved(tmp_path / "l", peftfast.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    zero = peftfast.get_peft_model(oracle.llama(), peftfast.LoraConfig(r=2, target_modules=["q_proj"]))
    zero.save_pretrained(tmp_path / "z")
    assert set(peftfast.adapter_contents(tmp_path / "z").lines.values()) == {"rank 2, no change"}


def test_a_stack_of_experts(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=4, **sizes)
    adapter = peftfast.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    planned = peftfast.plan_adapter(MixtralForCausalLM(config), adapter).servers
    peftfast.get_peft_model(MixtralForCausalLM(config), adapter).save_pretrained(tmp_path)
    contents = peftfast.adapter_contents(tmp_path)
    assert set(contents.lines.values()) == {"rank 2 in each of 4 matrices"}
    assert servers(tmp_path) == ["not known", "refuses", "refuses", "not known"]
    assert contents.servers == planned


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {}, {"modules_to_save": ["lm_head"]}, {"rank_pattern": {"v_proj": 4}}, {"alpha_pattern": {"v_proj": 9}},
        {"use_dora": True}, {"lora_bias": True}, {"bias": "all"}, {"trainable_token_indices": [1]}, {"r": 32},
        {"init_lora_weights": "pissa"}, {"use_rslora": True}, {"modules_to_save": ["input_layernorm"]},
        {"target_modules": ["embed_tokens", "up_proj"]}, {"target_modules": ".*_proj"}, {"use_qalora": True},
    ],
    ids=str,
)  # fmt: skip
def test_what_servers_do_with_a_saved_adapter_is_what_was_planned(options, tmp_path):
    config = peftfast.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **options})
    planned = peftfast.plan_adapter(oracle.llama(), config).servers
    saved(tmp_path, config)
    assert peftfast.adapter_contents(tmp_path).servers == planned and len(planned) == 4


def servers(folder):
    return [v.verdict for v in peftfast.adapter_contents(folder).servers]


def test_what_servers_do_with_what_only_files_show(tmp_path):
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        saved(tmp_path / "e", peftfast.LoraConfig(r=2, target_modules=["embed_tokens"]))
    assert servers(tmp_path / "e") == [
        "loads",
        "loads",
        "needs conversion",
        "needs conversion",
    ]  # base's own are ignored
    saved(tmp_path / "p", peftfast.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    verdicts = peftfast.adapter_contents(tmp_path / "p").servers
    assert {v.reasons[0] for v in verdicts} == {"knows LORA only, this is PROMPT_TUNING"}


def test_servers_take_some_modules_only_with_others_and_some_saved_modules(tmp_path):
    def verdicts(make=oracle.llama, **options):
        saved(tmp_path, peftfast.LoraConfig(r=2, **options), make)
        return servers(tmp_path)

    assert verdicts(target_modules=["k_proj", "o_proj"])[1] == "refuses"
    assert verdicts(target_modules=["q_proj", "v_proj", "o_proj", "gate_proj"])[1] == "loads"
    assert verdicts(target_modules=["up_proj"])[1] == "not known"
    assert verdicts(oracle.gpt2, target_modules=["c_attn"])[2] == "refuses"
    rest = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["model.norm"]}
    assert verdicts(**rest) == ["refuses", "loads, wrong output", "loads, wrong output", "refuses"]
    rest["modules_to_save"] = ["input_layernorm"]
    assert verdicts(**rest) == ["refuses", "refuses", "loads, wrong output", "refuses"]
    assert "this has ['model.layers.{0-1}.input_layernorm']" in str(peftfast.adapter_contents(tmp_path))
    head = {"target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"}
    assert verdicts(oracle.llama_classifier, **head) == ["loads", "loads, wrong output", "refuses", "refuses"]


def test_at_the_command_line(tmp_path, capsys):
    saved(tmp_path, peftfast.LoraConfig(r=2, target_modules=["q_proj"]))
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("LORA for") and "model.layers.0.self_attn.q_proj  rank 2, change of norm" in out
    assert "\nin other programs\n  vLLM       loads\n" in out
    assert main(["inspect", str(tmp_path), "--max-lora-rank", "1"]) == 0
    assert "vLLM       refuses; r=2 is above max_lora_rank=1" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--r", "3"]) == USAGE_ERROR
    assert "--r is about an adapter to be made" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "no")]) == USAGE_ERROR
    assert "adapter_config.json" in capsys.readouterr().err
    (tmp_path / "adapter_model.safetensors").write_bytes(b"damaged")
    assert main(["inspect", str(tmp_path)]) == USAGE_ERROR
    assert capsys.readouterr().err.count("\n") == 1
