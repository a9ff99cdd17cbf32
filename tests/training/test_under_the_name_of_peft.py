"""Scripts written for `peft`, run unchanged with peft and with peftfast under its name: same losses, same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from oracle import saved_config
from processes import run, start
from safetensors.torch import load_file
from training.tiny import files, largest_difference

SCRIPTS = Path(__file__).parent / "scripts"


def both(script: str, folder: Path, *arguments: str) -> tuple[dict, dict]:
    """What the script writes to result.json under peft and under peftfast."""
    found = []
    for name, launcher in (("peft", []), ("peftfast", ["-m", "peftfast", "run"])):
        where = folder / name
        where.mkdir()
        run([*launcher, SCRIPTS / script, *arguments], where)
        found.append(json.loads((where / "result.json").read_text()))
    assert found[0].pop("library") == "peft.peft_model"
    assert found[1].pop("library").startswith("peftfast.")
    return found[0], found[1]


def same_adapters(folder: Path) -> None:
    theirs, ours = (folder / name for name in ("peft", "peftfast"))
    saved = {f for f in files(theirs) if f.endswith("adapter_model.safetensors")}
    assert saved
    assert saved == {f for f in files(ours) if f.endswith("adapter_model.safetensors")}
    assert not [f for f in files(ours) if f.rpartition("/")[2] == "model.safetensors"] or files(ours) == files(theirs)
    for name in saved:
        assert largest_difference(load_file(ours / name), load_file(theirs / name)) < 1e-3
        configs = [saved_config((place / name).parent) for place in (theirs, ours)]
        for config in configs:
            config.pop("base_model_name_or_path")  # a folder of this test
        assert configs[0] == configs[1]


@pytest.mark.parametrize(
    "script", ["sft.py", "dpo.py", "add_adapter.py", pytest.param("grpo.py", marks=pytest.mark.slow)]
)
def test_script_gives_the_same_numbers_and_files(script, tmp_path):
    theirs, ours = both(script, tmp_path)
    assert set(theirs) == set(ours)
    for key, value in theirs.items():
        numbers = isinstance(value, list) and all(isinstance(v, float) for v in value)
        assert ours[key] == (pytest.approx(value, rel=1e-4, abs=1e-5) if numbers else value), key
    same_adapters(tmp_path)


def test_without_peft_installed(tmp_path):
    """With the real package hidden, everything still finds `peft`, new enough for transformers 5.24."""
    code = f"""
import sys
from training.hide_peft import hide
hide()
import peftfast.as_peft
import peft, peftfast
from transformers.utils import check_peft_version
assert peft.PeftModel is peftfast.PeftModel
check_peft_version("0.22.0")
sys.argv = ["sft.py"]
import runpy
runpy.run_path({str(SCRIPTS / "sft.py")!r}, run_name="__main__")
"""
    run(["-c", code], tmp_path)
    assert "peftfast" in json.loads((tmp_path / "result.json").read_text())["library"]


def test_too_late_is_refused(tmp_path):
    code = """
import peft
try:
    import peftfast.as_peft
except ImportError as e:
    assert "peft has been imported already" in str(e), e
else:
    raise SystemExit("not refused")
assert peft.__name__ == "peft" and not hasattr(peft, "_served_by_peftfast")
"""
    run(["-c", code], tmp_path)


def test_names_that_other_libraries_import(tmp_path):
    """Every name that transformers, accelerate, TRL and diffusers take from peft exists under the alias, and those that
    axolotl, ms-swift and others take where they train LoRA."""
    wanted = {
        "peft": "PeftModel PeftMixedModel PeftConfig PeftType LoraConfig PrefixTuningConfig PromptLearningConfig "
        "LoKrConfig get_peft_model get_peft_model_state_dict set_peft_model_state_dict prepare_model_for_kbit_training "
        "inject_adapter_in_model __version__",
        "peft.functional": "delete_adapter set_adapter set_requires_grad cast_adapter_dtype inject_adapter_in_model "
        "get_peft_model_state_dict set_peft_model_state_dict",
        "peft.import_utils": "is_bnb_4bit_available is_bnb_available is_hqq_available is_torchao_available",
        "peft.tuners.adalora": "AdaLoraModel RankAllocator",
        "peft.tuners.lora": "LoraLayer Linear Embedding Conv1d Conv2d Conv3d Linear4bit Linear8bitLt ParamWrapper dora",
        "peft.tuners.lora.awq": "AwqLoraLinear",
        "peft.tuners.lora.bnb": "Linear4bit Linear8bitLt dispatch_bnb_4bit",
        "peft.tuners.lora.dora": "DoraLinearLayer dequantize_module_weight",
        "peft.tuners.lora.gptq": "GPTQLoraLinear",
        "peft.tuners.lora.hqq": "HqqLoraLinear",
        "peft.tuners.lora.layer": "LoraLayer ParamWrapper _LoraParameterProxy check_adapters_to_merge dispatch_default "
        "transpose",
        "peft.tuners.lora.torchao": "TorchaoLoraLinear",
        "peft.tuners.lora.tp_layer": "LoraParallelLinear",
        "peft.tuners.mixed": "MixedModel",
        "peft.tuners.tuners_utils": "BaseTuner BaseTunerLayer _maybe_include_all_linear_layers check_adapters_to_merge "
        "onload_layer",
        "peft.tuners.loha": "LoHaLayer",
        "peft.tuners.loha.layer": "LoHaLayer",
        "peft.tuners.lokr": "LoKrLayer",
        "peft.tuners.lokr.layer": "factorization",
        "peft.utils": "ModulesToSaveWrapper _get_submodules UPCAST_DTYPES get_quantization_config transpose "
        "TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING",
        "peft.utils.constants": "DUMMY_TARGET_MODULES UPCAST_DTYPES",
        "peft.utils.integrations": "dequantize_bnb_weight dequantize_module_weight gather_params_ctx "
        "get_bnb_param_type init_empty_weights",
        "peft.utils.merge_utils": "dare_linear dare_ties magnitude_prune task_arithmetic ties",
        "peft.utils.other": "AuxiliaryTrainingWrapper fsdp_auto_wrap_policy get_pattern_key",
        "peft.utils.peft_types": "register_peft_method",
        "peft.utils.quantization_utils": "QuantizationBackend resolve_quantization_backend",
        "peft.utils.hotswap": "check_hotswap_configs_compatible hotswap_adapter_from_state_dict hotswap_adapter "
        "prepare_model_for_compiled_hotswap",
        "peft.utils.save_and_load": "_maybe_shard_state_dict_for_tp",
        "peft.utils.transformers_weight_conversion": "build_peft_weight_mapping",
        "peft.helpers": "DoraCaching disable_input_dtype_casting rescale_adapter_scale check_if_peft_model",
        "peft.optimizers": "create_loraplus_optimizer create_lorafa_optimizer create_riemannian_optimizer",
    }
    lines = [f"from {module} import {', '.join(names.split())}" for module, names in wanted.items()]
    lines.append("for layer in (LoraLayer, LoHaLayer, LoKrLayer): tuple(layer.adapter_layer_names)")
    lines.append("import peft.utils, peft.tuners.lora.bnb; assert peft.utils.integrations.transpose is transpose")
    # a library that replaces steps in every class, and one that derives from the classes
    lines.append(
        "from peft import LoraModel, VeraModel\n"
        "for model in (LoraModel, AdaLoraModel, VeraModel): model._create_and_replace = model._create_and_replace\n"
        "_LoraParameterProxy.forward = _LoraParameterProxy.forward\n"
        "RankAllocator.mask_to_budget = LoraModel._cast_adapter_dtype = lambda self, *args: None\n"
        "class Mixin: pass\n"
        "class Mine(Mixin, Linear4bit): pass\n"
        "class Other(Mixin, LoraParallelLinear): pass\n"
        "assert not isinstance(Mixin(), (Mine, Other, Linear4bit)) and isinstance(Mine(), Mine)\n"
        "for part in (LoraModel._create_new_module, dispatch_default, dispatch_bnb_4bit):\n"
        "    try: part(None)\n"
        "    except NotImplementedError: pass\n"
        "    else: raise SystemExit(part)\n"
    )
    run(["-c", "import peftfast.as_peft\n" + "\n".join(lines)], tmp_path)


def test_every_method_of_ours_is_the_real_one(tmp_path):
    """A name that peftfast has is never a placeholder, wherever in `peft` it is taken from; every other is there."""
    import peft

    places = {
        "peft": "AdaLoraConfig AdaLoraModel BdLoraConfig CordaConfig EvaConfig IA3Config IA3Model LoraGAConfig "
        "PrefixEncoder PrefixTuningConfig preprocess_loraga "
        "PromptEmbedding PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType PromptTuningConfig "
        "PromptTuningInit get_eva_state_dict initialize_lora_eva_weights prepare_model_for_kbit_training "
        "replace_lora_weights_loftq",
        "peft.peft_model": "TunerLayerStatus TunerModelStatus",
        "peft.tuners.adalora": "AdaLoraConfig AdaLoraModel",
        "peft.tuners.ia3.config": "IA3Config",
        "peft.tuners.ia3.model": "IA3Model",
        "peft.tuners.lora.config": "BdLoraConfig CordaConfig EvaConfig LoftQConfig LoraGAConfig",
        "peft.tuners.lora.corda": "preprocess_corda CordaEigens",
        "peft.tuners.lora.loraga": "preprocess_loraga",
        "peft.tuners.lora.variants": "BlockDiagonalLinear",
        "peft.tuners.lora.eva": "get_eva_state_dict initialize_lora_eva_weights",
        "peft.tuners.p_tuning.model": "PromptEncoder",
        "peft.tuners.prefix_tuning": "PrefixEncoder PrefixTuningConfig",
        "peft.tuners.prompt_tuning.config": "PromptTuningInit",
        "peft.utils.loftq_utils": "replace_lora_weights_loftq",
    }
    code = f"""
import importlib, torch
import peftfast.as_peft, peft, peftfast
from peftfast.interop import absent
from training.tiny import batch, llama
assert not absent.NAMES & set(peftfast.__all__)
for place, names in {places!r}.items():
    module = importlib.import_module(place)
    for name in names.split():
        found = getattr(module, name)
        assert found.__module__.startswith("peftfast.") and found.__module__ != absent.__name__, (place, name)
        assert found is getattr(peftfast, name, found), (place, name)
for name, module in (("Linear", torch.nn.Linear(4, 4)), ("Conv2d", torch.nn.Conv2d(4, 4, 1))):
    layer = peft.get_peft_model(torch.nn.Sequential(module), peft.LoraConfig(target_modules=["0"])).base_model.model[0]
    for kind in (getattr(peft.tuners.lora, name), peft.tuners.lora.LoraLayer, peft.tuners.tuners_utils.BaseTunerLayer):
        assert isinstance(layer, kind), (name, kind)
assert not isinstance(layer, peft.tuners.lora.Linear) and not isinstance(module, peft.tuners.lora.LoraLayer)
assert issubclass(peft.AdaLoraModel, peft.LoraModel) and issubclass(peft.AdaLoraConfig, peft.LoraConfig)
missing = [n for n in {sorted(peft.__all__)!r} if not hasattr(peft, n)]
assert all(n.endswith("_MAPPING") for n in missing), missing
settings = {{"task_type": "CAUSAL_LM"}}
for config in (
    peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, **settings),
    peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **settings),
    peft.PromptTuningConfig(num_virtual_tokens=3, **settings),
    peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **settings),
    peft.PrefixTuningConfig(num_virtual_tokens=3, **settings),
):
    model = peft.get_peft_model(llama(), config)
    model(**batch()).loss.backward()
    assert any(p.grad is not None for p in model.parameters()), config
"""
    run(["-c", code], tmp_path)


def test_the_package_itself_has_pefts_helpers_and_says_where_the_rest_is(tmp_path):
    code = """
import peftfast
peftfast.helpers.DoraCaching, peftfast.functional.set_adapter, peftfast.optimizers.create_loraplus_optimizer
for name, said in (
    ("LoraConfg", "Did you mean 'LoraConfig'"), ("LoHaConfig", "use the peft package itself"),
    ("utils", "import peftfast.as_peft.*peft.utils"), ("nothing_like_it", "attribute 'nothing_like_it'.$"),
):
    try: getattr(peftfast, name)
    except AttributeError as e: assert __import__("re").search(said, str(e)), e
    else: raise SystemExit(name)
assert not hasattr(peftfast, "__wrapped__") and "helpers" in dir(peftfast)
"""
    run(["-c", code], tmp_path)


def test_attributes_of_other_libraries_stay(tmp_path):
    """`import peftfast` and `patch` change nothing in torch, transformers, peft and accelerate, and import no peft."""
    code = """
import sys, torch
import peftfast
assert not {"peft", "transformers", "accelerate", "triton", "bitsandbytes"} & set(sys.modules), "imported too much"
model = peftfast.patch(torch.nn.Sequential(torch.nn.Linear(4, 4)), peftfast.LoraConfig(target_modules=["0"]))
model(torch.ones(1, 4)).sum().backward()
assert "peft" not in sys.modules
import torch, transformers, peft, accelerate, accelerate.utils, transformers.trainer, transformers.integrations.peft
import peft.tuners.tuners_utils, peft.tuners.lora.layer
def picture():
    roots = ("torch", "transformers", "peft", "accelerate")
    modules = {n: m for n, m in list(sys.modules.items()) if m is not None and n.partition(".")[0] in roots}
    pictures = {}
    for n, m in modules.items():
        for k, v in list(vars(m).items()):
            pictures[n, k] = id(v)
            if isinstance(v, type) and v.__module__.partition(".")[0] in roots and not n.startswith("torch._dynamo"):
                for a, w in list(vars(v).items()):
                    if not a.startswith("_abc_"):
                        pictures[n, k, a] = id(w)
    return pictures
def use():
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)
    model = LlamaForCausalLM(config)
    model = peftfast.patch(model, peftfast.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert isinstance(model, peft.PeftModel)
    assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj, peft.tuners.tuners_utils.BaseTunerLayer)
    model(input_ids=torch.ones(1, 3, dtype=torch.long), labels=torch.ones(1, 3, dtype=torch.long)).loss.backward()
    del model
use()  # lazily imported modules of the others are not our doing
before = picture()
use()
after = picture()
changed = sorted(k for k in before if after.get(k) != before[k])
added = sorted(k for k in set(after) - set(before) if k[0] in {b[0] for b in before})
counters = [k for k in changed + added if "cache" not in k[-1].lower()]
assert not counters, counters[:20]
"""
    run(["-c", code], tmp_path)


def test_a_served_module_says_what_it_lacks(tmp_path):
    code = """
import peftfast.as_peft
try:
    from peft import LoraConfg
except ImportError:
    pass
import peft
try:
    peft.LoraConfg
except AttributeError as e:
    assert "LoraConfig" in str(e), e
from peft import BOFTConfig
try:
    BOFTConfig(r=2)
except NotImplementedError as e:
    assert "BOFTConfig" in str(e)
"""
    run(["-c", code], tmp_path)


@pytest.mark.parametrize("script", [["nowhere.py"], *(["-m", n] for n in ("nowhere.deep", "json.deep", "json"))])
def test_run_refuses_a_missing_script(script, tmp_path):
    done = start(["-m", "peftfast", "run", *script], tmp_path)
    assert done.returncode == 2
    assert script[-1] in done.stderr and done.stderr.count("\n") == 1


def test_run_leaves_the_output_to_the_script(tmp_path):
    (tmp_path / "script.py").write_text("import sys; print(sys.stdout.errors)")
    assert run(["-m", "peftfast", "run", "script.py"], tmp_path, PYTHONIOENCODING="ascii") == "strict\n"


def test_run_finds_what_is_beside_a_script_that_a_link_leads_to(tmp_path):
    """As `python script.py` does."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "beside_it.py").write_text("")
    (tmp_path / "real" / "script.py").write_text("import beside_it, peft\nprint(peft.__name__, beside_it.__name__)\n")
    link = tmp_path / "link.py"
    link.symlink_to(tmp_path / "real" / "script.py")
    assert run(["-m", "peftfast", "run", link], tmp_path).endswith("beside_it\n")


STARTS_OTHERS = """
import multiprocessing, peft, sys

def generation(number):
    print(number, peft.__name__, hasattr(peft, "_served_by_peftfast"), flush=True)
    if number < 2:
        process = multiprocessing.get_context("spawn").Process(target=generation, args=(number + 1,))
        process.start()
        process.join()
        sys.exit(process.exitcode)

if __name__ == "__main__":
    generation(0)
"""


def test_run_serves_processes_that_import_the_script_anew(tmp_path):
    (tmp_path / "script.py").write_text(STARTS_OTHERS)
    said = run(["-m", "peftfast", "run", "script.py"], tmp_path)
    assert said == "".join(f"{number} peft True\n" for number in range(3))
