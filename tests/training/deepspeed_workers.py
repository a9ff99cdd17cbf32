"""What the processes of the DeepSpeed tests run: `torchrun deepspeed_workers.py <folder> <what>:<kind> ...`.

A kind is a method of METHODS and options joined by "+": the ZeRO stage, peft, bf16, accumulation, checkpointing,
reentrant, blocks. What a run finds is compared with one process, in fp64, without DeepSpeed.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import answer
from safetensors.torch import load_file
from torch import nn
from training.tiny import batch, checkpoint, largest_difference, llama, rows

import peftfast

STEPS, RATE, SIZES = 3, 0.05, {"hidden_size": 64, "intermediate_size": 128}
TENSORS = "adapter_model.safetensors"


def _lora(library: Any, **changes: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return library.LoraConfig(**{**settings, **changes})


def _adalora(library: Any) -> Any:
    targets = ["q_proj", "v_proj"]
    return library.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=targets, task_type="CAUSAL_LM")


def _ia3(library: Any) -> Any:
    targets = ["k_proj", "v_proj", "down_proj"]
    return library.IA3Config(target_modules=targets, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")


METHODS = {
    "lora": _lora,
    "saved": lambda library: _lora(library, modules_to_save=["lm_head"]),
    "tokens": lambda library: _lora(library, trainable_token_indices=[5, 7, 11]),
    "embedding": lambda library: _lora(library, target_modules=["embed_tokens", "q_proj"]),
    "dora": lambda library: _lora(library, use_dora=True),
    "pissa": lambda library: _lora(library, target_modules=["q_proj"], init_lora_weights="pissa"),
    "ia3": _ia3,
    "experts": lambda library: _lora(
        library, r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    ),
    "adalora": _adalora,
    "prompt": lambda library: library.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "network": lambda library: library.PromptEncoderConfig(
        num_virtual_tokens=4, encoder_hidden_size=16, task_type="CAUSAL_LM"
    ),
    "prefix": lambda library: library.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


def base_of(kind: str) -> nn.Module:
    if not kind.startswith("experts"):
        return llama(**SIZES)
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2, "initializer_range": 0.2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=97, hidden_size=32, intermediate_size=32, **experts, **heads))


def spread_out(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give what trains values that depend on its name's place only; copies of modules stay copies."""
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)):
            if "modules_to_save" not in name:
                values = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * seed + i)) * 0.2
                p.copy_(values + 1 if "ia3" in name or "magnitude" in name else values)
    return model


def model_of(kind: str, base: nn.Module | None = None) -> nn.Module:
    method, *flags = kind.split("+")
    library = importlib.import_module("peft" if "peft" in flags else "peftfast")
    torch.manual_seed(7)
    model = library.get_peft_model(base_of(kind) if base is None else base, METHODS[method](library))
    if method == "adalora" and library is peftfast:
        model.base_model.automatic = False  # what DeepSpeed allows
    return spread_out(model).train()


def engine_of(model: nn.Module, kind: str) -> Any:
    import deepspeed

    return deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE),
        config=settings(kind),
    )[0]


def settings(kind: str) -> dict[str, Any]:
    flags = kind.split("+")
    accumulated = 2 if "accumulation" in flags else 1
    stage = next((int(f) for f in flags if f.isdigit()), 3)
    # a threshold of 0, because parameters below it, here all of them, are never taken apart
    apart = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {
        "train_micro_batch_size_per_gpu": 4 // dist.get_world_size() // accumulated,
        "gradient_accumulation_steps": accumulated,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **apart},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": "bf16" in flags},
    }


def share(inputs: dict[str, Any], parts: int = 1) -> list[dict[str, Any]]:
    """This process's part of a batch, as micro-batches."""
    own = {k: v.chunk(dist.get_world_size())[dist.get_rank()] for k, v in inputs.items()}
    return [{k: v.chunk(parts)[i] for k, v in own.items()} for i in range(parts)]


def mean(value: float) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def step(engine: Any, seed: int, parts: int = 1, **extra: Any) -> float:
    losses = []
    for inputs in share(batch(4, 20 + seed), parts):
        loss = engine(**inputs, **extra).loss
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    return mean(sum(losses) / parts)


class Alone:
    """One process, in fp64."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.double()
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)

    def step(self, seed: int, **extra: Any) -> float:
        loss = self.model(**batch(4, 20 + seed), **extra).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def trained(self) -> dict[str, torch.Tensor]:
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return {n: safe_get_full_fp32_param(p).clone() for n, p in model.named_parameters() if p.requires_grad}


# ---- runs ------------------------------------------------------------------------------------------------------------
def train(kind: str, folder: Path) -> dict:
    """Errors of losses and of the weights after some steps."""
    flags = kind.split("+")
    model = model_of(kind)
    if "checkpointing" in flags or "reentrant" in flags:
        checkpoint(model, "reentrant" in flags)
        model.enable_input_require_grads()
    if "blocks" in flags:
        peftfast.fuse_blocks(model)
    engine, alone = engine_of(model, kind), Alone(model_of(kind.partition("+")[0]))
    parts = 2 if "accumulation" in flags else 1
    losses = [abs(step(engine, i, parts) / alone.step(i) - 1) for i in range(STEPS)]
    result = {"losses": max(losses), "weights": largest_difference(trained(model), alone.trained())}
    engine.destroy()
    return result


def init(kind: str, folder: Path) -> dict:
    """The same for a base model that zero.Init has made, with first values that only the whole weights give."""
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    plain = base_of(kind)
    if dist.get_rank() == 0:
        plain.save_pretrained(folder)
    dist.barrier()
    keep = HfDeepSpeedConfig(settings(kind))
    try:
        base = type(plain).from_pretrained(folder, dtype=torch.float32)
    finally:
        unset_hf_deepspeed_config()
        del keep
    assert all(hasattr(p, "ds_id") and p.numel() == 0 for p in base.parameters())
    torch.manual_seed(7)
    model = peftfast.get_peft_model(base, METHODS[kind](peftfast))
    torch.manual_seed(7)
    alone = Alone(peftfast.get_peft_model(plain, METHODS[kind](peftfast)))
    first = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    # B of LoRA starts at zero
    expected = {n: p for n, p in alone.trained().items() if p.any()}
    result = {"first": largest_difference({n: first[n] for n in expected}, expected)}
    engine = engine_of(model.train(), kind)
    alone.model.train()
    result["losses"] = max(abs(step(engine, i) / alone.step(i) - 1) for i in range(2))
    result["weights"] = largest_difference({n: t for n, t in trained(model).items() if n in expected}, expected)
    engine.destroy()
    return result


def past(kind: str, folder: Path) -> dict:
    """The model called past an engine that has not run yet: evaluation, generation."""
    model, alone = model_of(kind), model_of(kind).eval()
    engine = engine_of(model, kind)
    model.eval()
    inputs = batch(2, 9)
    with torch.no_grad():
        logits = (model(**inputs).logits - alone(**inputs).logits).abs().max().item()
        ids = {"input_ids": inputs["input_ids"], "max_new_tokens": 4, "do_sample": False}
        same = torch.equal(model.generate(**ids), alone.generate(**ids))
    engine.destroy()
    return {"logits": logits, "same": same}


def files(kind: str, folder: Path) -> dict:
    """Saved by all processes, and by one from what it has gathered; resumed; loaded into a running engine."""
    main = dist.get_rank() == 0
    model = model_of(kind)
    engine = engine_of(model, kind)
    for i in range(2):
        step(engine, i)
    model.save_pretrained(folder / "all", is_main_process=main)
    if "2" not in kind.split("+"):
        gathered = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
        if main:
            model.save_pretrained(folder / "gathered", state_dict=gathered)
    dist.barrier()
    model.eval()
    inputs = batch(2, 9)
    with torch.no_grad():
        expected = engine(**inputs).logits

        def difference(other: Any) -> float:
            return (other(**inputs).logits - expected).abs().max().item()

        result = {
            f"from {where.name}": difference(peftfast.PeftModel.from_pretrained(llama(**SIZES), where).eval())
            for where in sorted(folder.iterdir())
        }
        dist.barrier()  # before there is one more
        engine.save_checkpoint(str(folder / "engine"), tag="t", exclude_frozen_parameters=True)
        model.train()
        with torch.enable_grad():
            after = [step(engine, i) for i in (2, 3)]
            engine.destroy()
            model = model_of(kind)
            engine = engine_of(model, kind)
            engine.load_checkpoint(str(folder / "engine"), tag="t", load_module_strict=False)
            again = [step(engine, i) for i in (2, 3)]
        result["resumed"] = max(abs(a - b) for a, b in zip(after, again, strict=True))
        tensors = load_file(folder / "all" / TENSORS)
        if "network" not in kind:  # what a network computes is loaded as a prompt without one
            model.load_adapter(folder / "all", "default", is_trainable=not model.active_peft_config.is_prompt_learning)
            model.eval()
            result["loaded"] = difference(engine)
            peftfast.set_peft_model_state_dict(model, {k: torch.ones_like(t) for k, t in tensors.items()})
            result["changed"] = difference(engine)
            peftfast.set_peft_model_state_dict(model, tensors)
            result["set"] = difference(engine)
    engine.destroy()
    return result


def several(kind: str, folder: Path) -> dict:
    """Two adapters: both active, one for every sample, none; switching says what DeepSpeed will do."""

    def two() -> nn.Module:
        model = model_of(kind)
        model.add_adapter("other", METHODS[kind.partition("+")[0]](peftfast))
        model.base_model.set_adapter(["default", "other"])
        return spread_out(model, 5)

    model, alone = two(), Alone(two())
    engine = engine_of(model, kind)
    errors = {"both": abs(step(engine, 0) / alone.step(0) - 1)}
    names = ["default", "other"]
    rows = [["default", "default"], ["__base__", "other"]]  # of each process
    own = {"adapter_names": rows[dist.get_rank()]}
    errors["mixed"] = abs(step(engine, 1, **own) / alone.step(1, adapter_names=sum(rows, [])) - 1)
    errors["weights"] = largest_difference(trained(model), alone.trained())
    inputs = batch(2, 9)
    with torch.no_grad():
        for who in (model, alone.model):
            who.eval()
        for what, context in {"mixed, evaluated": contextlib.nullcontext, "none": "disable_adapter"}.items():
            extra = {"adapter_names": names} if what.startswith("mixed") else {}
            logits = []
            for who, call in ((model, engine), (alone.model, alone.model)):
                with contextlib.nullcontext() if extra else getattr(who, context)():
                    logits.append(call(**inputs, **extra).logits.double())
            errors[what] = ((logits[0] - logits[1]).norm() / logits[1].norm()).item()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.set_adapter("other")
    said = [str(w.message) for w in caught]
    engine.destroy()
    return {"errors": errors, "said": said}


def prompts(kind: str, folder: Path) -> dict:
    """Processes whose samples have different prompts."""

    def two() -> nn.Module:
        model = model_of(kind)
        model.add_adapter("other", METHODS[kind.partition("+")[0]](peftfast))
        model.prompt_encoder.requires_grad_(True)
        return spread_out(model, 5)

    model, alone = two(), Alone(two())
    engine = engine_of(model, kind)
    rows = [["default", "default"], ["other", "other"]]  # of each process
    loss = step(engine, 1, adapter_names=rows[dist.get_rank()]) / alone.step(1, adapter_names=sum(rows, []))
    found = {"loss": abs(loss - 1), "weights": largest_difference(trained(model), alone.trained())}
    engine.destroy()
    return found


def refused(kind: str, folder: Path) -> dict:
    """What each of these raises; nothing may have changed."""
    model = model_of(kind)
    model_of("lora").save_pretrained(folder / f"other{dist.get_rank()}")
    engine = engine_of(model, kind)
    step(engine, 0)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    inputs = batch(2, 9)

    def outputs() -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            return engine(**inputs).logits

    before, names = outputs(), [n for n, _ in model.named_parameters()]
    said = {}
    for what, do in {
        "merge": model.merge_adapter,
        "merge and unload": model.merge_and_unload,
        "layer": layer.merge,
        "change": lambda: layer.get_delta_weight("default"),
        "add": lambda: model.add_adapter("other", METHODS["lora"](peftfast)),
        "load": lambda: model.load_adapter(folder / f"other{dist.get_rank()}", "other"),
        "average": lambda: peftfast.AdapterAverage(model).update(),
    }.items():
        try:
            do()
            said[what] = "nothing"
        except RuntimeError as e:
            said[what] = str(e)
    same = torch.equal(outputs(), before) and names == [n for n, _ in model.named_parameters()]
    model.train()
    step(engine, 1)
    engine.destroy()
    return {"said": said, "same": same}


def schedule(kind: str, folder: Path) -> dict:
    """AdaLoRA with its schedule on."""
    model = model_of(kind)
    model.base_model.automatic = True
    engine = engine_of(model, kind)
    try:
        step(engine, 0)
        said = "nothing"
    except RuntimeError as e:
        said = str(e)
    engine.destroy()
    return {"said": said}


def trainer(kind: str, folder: Path) -> dict:
    """transformers' Trainer with a DeepSpeed config: weights after some steps, checkpoints, and training resumed."""
    import accelerate.state
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments

    # accelerate knows no backend for several processes with DeepSpeed on a CPU
    accelerate.state.PartialState._prepare_backend = lambda *_, **__: ("gloo", accelerate.state.DistributedType.NO)
    data = rows(8)  # all of it in every step, so that its order does not matter
    if dist.get_rank() == 0:
        llama(**SIZES).save_pretrained(folder / "base")
    dist.barrier()

    def trained_model(resume: str | None) -> None:
        arguments = TrainingArguments(
            str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=8 // dist.get_world_size(),
            learning_rate=RATE, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, report_to=[],
            disable_tqdm=True, seed=1,
            deepspeed={**settings(kind), "train_micro_batch_size_per_gpu": "auto"},
        )  # fmt: skip
        model = model_of(kind, LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32))

        def collate(items: list[dict]) -> dict[str, torch.Tensor]:
            return {k: torch.tensor([item[k] for item in items]) for k in items[0]}

        done = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate)
        done.train(resume_from_checkpoint=resume)
        assert type(done.model_wrapped).__name__ == "DeepSpeedEngine"
        done.save_model(str(folder / "final"))
        dist.barrier()

    trained_model(None)
    whole = load_file(folder / "final" / TENSORS)
    alone = Alone(model_of(kind.partition("+")[0]))
    inputs = {k: torch.tensor([row[k] for row in data]) for k in data[0]}
    for _ in range(4):
        alone.model(**inputs).loss.backward()
        alone.optimizer.step()
        alone.optimizer.zero_grad()
    result = {
        "weights": largest_difference(whole, peftfast.get_peft_model_state_dict(alone.model)),
        "checkpoint": largest_difference(load_file(folder / "checkpoint-4" / TENSORS), whole),
    }
    trained_model(str(folder / "checkpoint-2"))
    return {**result, "resumed": largest_difference(load_file(folder / "final" / TENSORS), whole)}


RUNS = {f.__name__: f for f in (train, init, past, files, several, prompts, refused, schedule, trainer)}


def main() -> None:
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # would be compiled, and gloo does as well; deepspeed.comm.torch as an attribute is torch itself
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend="gloo")
    answer(RUNS)


if __name__ == "__main__":
    main()
