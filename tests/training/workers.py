"""What the processes of the distributed tests run: `torchrun --nproc-per-node N workers.py <folder> <what>:<kind> ...`.

A kind is a base (plain, bf16, nf4, saved) and options joined by "+": mixed, offload, checkpointing, peft,
and a digit that draws other factors and another batch.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from processes import answer
from torch.utils._python_dispatch import TorchDispatchMode
from training.nf4 import quantise
from training.tiny import batch, checkpoint, fill, largest_difference, llama, lora

import peftfast
from peftfast.optimizers import create_lorafa_optimizer, create_riemannian_optimizer
from peftfast.sharding import gathered, is_distributed, put_together


def base(kind: str) -> torch.nn.Module:
    if kind == "nf4":
        return quantise(llama(hidden_size=64, intermediate_size=128), storage=torch.float32)
    return llama(hidden_size=64, intermediate_size=128, dtype=torch.bfloat16 if kind == "bf16" else torch.float32)


def model_of(kind: str) -> torch.nn.Module:
    what, *flags = kind.split("+")
    library = importlib.import_module("peft" if "peft" in flags else "peftfast")
    options = {"modules_to_save": ["lm_head"]} if what == "saved" else {}
    model = library.get_peft_model(base(what), lora(library, **options))
    fill(model, 3 + draw(kind))
    return model.train()


def draw(kind: str) -> int:
    return sum(int(flag) for flag in kind.split("+") if flag.isdigit())


def share(kind: str) -> dict[str, torch.Tensor]:
    """This process's part of the batch of eight."""
    return {k: v.chunk(dist.get_world_size())[dist.get_rank()] for k, v in batch(8, 2 + draw(kind)).items()}


def single(kind: str) -> dict[str, torch.Tensor]:
    """Gradients of the whole batch in one process."""
    model = model_of(kind)
    model(**batch(8, 2 + draw(kind))).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def take_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int], parts: int) -> None:
    """Each on a batch of its own, of which this process has one of so many parts."""
    for step in steps:
        model(**{k: v.chunk(parts)[dist.get_rank() % parts] for k, v in batch(4, step).items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def shard(model: torch.nn.Module, **options) -> torch.nn.Module:
    """By FSDP2, block by block."""
    from torch.distributed.fsdp import fully_shard
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    for block in [m for m in model.modules() if isinstance(m, LlamaDecoderLayer)]:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def by_accelerate(model: torch.nn.Module) -> torch.nn.Module:
    """By Accelerate's FSDP2, of whose processes only the first has the weights."""
    import accelerate
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    state = accelerate.PartialState(cpu=True)
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=True,
    )
    settings = {"device": state.device, "is_main_process": state.is_main_process, "mixed_precision": "no"}
    return fsdp2_prepare_model(SimpleNamespace(**settings, state=SimpleNamespace(fsdp_plugin=plugin)), model)


class Traffic:
    """Counts the bytes that DDP reduces, in its own hook."""

    def __init__(self) -> None:
        self.bytes = 0

    def reduce(self, state, bucket):
        tensor = bucket.buffer()
        self.bytes += tensor.nbytes
        return (
            dist.all_reduce(tensor.div_(dist.get_world_size()), async_op=True)
            .get_future()
            .then(lambda future: future.value()[0])
        )


class Collectives(TorchDispatchMode):
    """Counts the bytes that enter reductions and leave gathers, of every collective operator that is dispatched.

    Operators that it does not know are kept by name, so that no traffic goes uncounted.
    """

    #: operator -> (what it counts as, which argument holds the whole tensor)
    WHOLE = {"_allgather_base_": ("gathered", 0), "_reduce_scatter_base_": ("reduced", 1)}
    #: waits and the like, which carry nothing
    EMPTY = ("barrier", "monitored_barrier_")

    def __init__(self) -> None:
        super().__init__()
        self.bytes = {"gathered": 0, "reduced": 0}
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name = func.name().partition(".")[0].split("::")
        if space in ("c10d", "_c10d_functional"):
            if name in self.WHOLE:
                kind, position = self.WHOLE[name]
                self.bytes[kind] += args[position].nbytes
            elif name not in self.EMPTY:
                self.unknown.add(name)
        return func(*args, **(kwargs or {}))


def spread(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The error of all tensors together: for comparing precisions, where the largest single error is chance."""
    squares = [(found[k].double() - e.double()).square().sum() / e.double().square().sum() for k, e in expected.items()]
    return torch.stack(squares).mean().sqrt().item()


def ddp(kind: str, folder: Path) -> dict:
    rank = dist.get_rank()
    model = model_of(kind)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    traffic = Traffic()
    wrapped.register_comm_hook(None, traffic.reduce)
    wrapped(**share(kind)).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    if "+peft" not in kind:
        model.save_pretrained(folder, is_main_process=rank == 0)
    return {"error": largest_difference(found, single(kind)), "bytes": traffic.bytes, "trained": trained}


def fsdp2(kind: str, folder: Path) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
    from torch.distributed.tensor import DTensor

    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    model = model_of(kind)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if "+mixed" in kind else MixedPrecisionPolicy()
    offload = CPUOffloadPolicy(pin_memory=False) if "+offload" in kind else OffloadPolicy()
    if "+checkpointing" in kind:
        checkpoint(model)
    shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)
    assert "+peft" in kind or isinstance(model, peftfast.PeftModel)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(isinstance(p, DTensor) for p in trained)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    sizes = {"adapter": sum(p.numel() * p.element_size() for p in trained), "trained": 0, "blocks": 0, "rest": 0}
    for name, p in model.named_parameters():
        rows = -(-p.shape[0] // world) * world  # shards are equal, so rows are padded
        size = rows * p.shape[1:].numel() * (2 if "+mixed" in kind and p.is_floating_point() else p.element_size())
        sizes["blocks" if ".layers." in name else "rest"] += size
        sizes["trained"] += size * p.requires_grad
    with Collectives() as traffic:
        loss = model(**share(kind)).loss
        loss.backward()
    found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    expected = single(kind)
    result = {"error": largest_difference(found, expected), "spread": spread(found, expected), "loss": loss.item()}
    result |= {**sizes, **traffic.bytes, "unknown": sorted(traffic.unknown)}
    optimizer.step()
    if "+peft" not in kind:
        model.save_pretrained(folder, is_main_process=rank == 0)
    if kind == "nf4":
        with pytest.raises(RuntimeError, match="sharded by FSDP2.*merge in one process"):
            model.merge_adapter()
        with pytest.raises(RuntimeError, match="sharded by FSDP2.*merge in one process"):
            model.merge_and_unload()
        dist.barrier()
        with pytest.raises(RuntimeError, match="starts from the base weights.*sharded by FSDP2.*before fully_shard"):
            olora = lora(peftfast, init_lora_weights="olora")
            peftfast.PeftModel.from_pretrained(shard(base(kind)), folder, config=olora)
    model.eval()
    with torch.no_grad():
        result["logits"] = model(**batch(2)).logits.float()[0, -1].tolist()
        if "+peft" not in kind:  # a saved adapter goes back into a sharded model
            dist.barrier()
            for parameter in trained:
                parameter.zero_()
            model.load_adapter(folder, "default", is_trainable=True)
            result["reloaded"] = model(**batch(2)).logits.float()[0, -1].tolist()
    return result


def fsdp1(kind: str, folder: Path) -> dict:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    from peftfast.training.fsdp import fsdp_auto_wrap_policy

    rank = dist.get_rank()
    model = model_of(kind)
    expected = single(kind)
    wrapped = FSDP(
        model, auto_wrap_policy=fsdp_auto_wrap_policy(model), use_orig_params=True, device_id=torch.device("cpu")
    )
    loss = wrapped(**share(kind)).loss
    loss.backward()
    with FSDP.summon_full_params(wrapped, with_grads=True, writeback=False):
        names = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in wrapped.named_parameters()}
        found = {n: p.grad.clone() for n, p in names.items() if p.requires_grad}
        model.save_pretrained(folder, is_main_process=rank == 0)
    return {"error": largest_difference(found, expected), "loss": loss.item()}


def adalora(kind: str, folder: Path) -> dict:
    """AdaLoRA sharded by FSDP2, saved in the middle of its schedule and loaded again: how far its parameters are from
    those of a single process, and which ranks are left."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    world = dist.get_world_size()

    def prepared(sharded: bool, state: dict | None = None) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        config = peftfast.AdaLoraConfig(
            init_r=4, target_r=2, tinit=1, tfinal=2, total_step=8, target_modules=["q_proj", "v_proj"]
        )
        torch.manual_seed(0)
        model = peftfast.get_peft_model(llama(), config)
        fill(model)
        if state is not None:
            model.load_state_dict(state)
        if sharded:
            model = by_accelerate(model) if kind == "accelerate" else shard(model)
        return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)

    alone, optimizer = prepared(False)
    take_steps(alone, optimizer, range(8), 1)
    model, optimizer = prepared(True)
    take_steps(model, optimizer, range(4), world)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    if kind == "accelerate":
        whole = gathered(states["model"])
        model, optimizer = prepared(True, whole if dist.get_rank() == 0 else None)
    else:
        checkpoint.save(states, checkpoint_id=folder)
        model, optimizer = prepared(True)
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        checkpoint.load(states, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    take_steps(model, optimizer, range(4, 8), world)
    found = {n: p.full_tensor() for n, p in model.named_parameters() if p.requires_grad}
    expected = {n: p for n, p in alone.named_parameters() if p.requires_grad}
    ranks = [m.base_model.history[-1].ranks for m in (model, alone)]
    return {"error": largest_difference(found, expected), "ranks": ranks}


def evaluated(kind: str, folder: Path) -> dict:
    """What is done to a model by FSDP2 after an evaluation, which leaves the root's parameters whole for a time:
    how far each thing is from the same in one process."""

    rank, world = dist.get_rank(), dist.get_world_size()
    options = {
        "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 9]},
        "ends": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }[kind]
    tied = kind == "tokens"

    def build() -> torch.nn.Module:
        model = peftfast.get_peft_model(llama(tied=tied), lora(peftfast, **options))
        model.add_adapter("second", lora(peftfast, **options))
        for name in ("second", "default"):
            model.set_adapter(name)
            with torch.no_grad():
                for i, (_, p) in enumerate(sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)):
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)), alpha=0.1)
        return model

    def run(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(**batch(4)).logits

    def train(model: torch.nn.Module, step: int = 0) -> dict[str, torch.Tensor]:
        rows = {k: v.chunk(world)[rank] if model is ours else v for k, v in batch(4, step).items()}
        model(**rows).loss.backward()
        found = {n: put_together(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    def off(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        for step in range(2):  # as in preference learning
            with model.disable_adapter():
                run(model)
            found = train(model, step)
        return found

    def switched(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        run(model)
        model.set_adapter("second")
        train(model)
        return train(model)

    def read(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        run(model)
        found = peftfast.get_peft_model_state_dict(model)
        model.state_dict()
        return found

    def later(model: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
        """Once the shards are all there is."""
        model.state_dict()
        return {name: run(model)}

    def loaded(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        run(model)
        model.load_adapter(folder, "default", is_trainable=True)
        return later(model, "loaded")

    def merged(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        run(model)
        model.merge_adapter()
        return later(model, "merged")

    def disabled(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        model.merge_adapter()
        with model.disable_adapter():
            found = run(model)
        return {"disabled": found, **later(model, "again")}

    def swapped(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        run(model)
        peftfast.hotswap_adapter(model, folder, "default")
        return later(model, "swapped")

    def unmerged(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        model.merge_adapter()
        run(model)
        model.unmerge_adapter()
        return later(model, "unmerged")

    def gone(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        run(model)
        left = model.merge_and_unload()
        assert (left.lm_head.weight is left.model.embed_tokens.weight) == tied
        return {"gone": run(left)}

    def unloaded(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        left = model.unload()
        trainable = {n for n, p in left.named_parameters() if p.requires_grad}
        assert trainable == ({"lm_head.weight"} if kind == "saved" else set())  # the copy, as in PEFT
        apart = {n for n, p in left.named_parameters() if is_distributed(p)}
        assert model is not ours or apart == {n for n, _ in left.named_parameters() if ".layers." in n}
        return {"unloaded": run(left)}

    def rebased(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        run(model)
        peftfast.set_base_model_state_dict(model, llama(1, tied=tied).state_dict())
        return later(model, "rebased")

    other = build()
    with torch.no_grad():
        for p in other.parameters():
            if p.requires_grad:
                p.mul_(2)
    other.save_pretrained(folder, is_main_process=rank == 0)
    dist.barrier()
    results = {}
    runs = [off, switched, read, loaded, merged, disabled, unmerged, gone, unloaded, rebased]
    for what in [*runs, swapped] if kind == "ends" else runs:  # others have more than factors
        ours = shard(build())
        results[what.__name__] = largest_difference(what(ours), what(build()))
    return results


def reference(kind: str, folder: Path) -> dict:
    """Gradients in mixed precision where the first forward is one in which nothing trains, as that of the reference in
    preference learning: how far they are from those without it, and their dtypes."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    def gradients(first: bool) -> dict[str, torch.Tensor]:
        model = model_of("plain")
        model.add_adapter("second", lora(peftfast))
        shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
        with torch.no_grad():
            if first and kind == "disabled":
                with model.disable_adapter():
                    model(**share("plain"))
            elif first and kind == "off":
                model.base_model.disable_adapter_layers()
                model(**share("plain"))
                model.base_model.enable_adapter_layers()
            elif first:
                model.set_adapter("second", inference_mode=True)
                model(**share("plain"))
                model.set_adapter("default")
        model(**share("plain")).loss.backward()
        return {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}

    found = gradients(True)
    error = largest_difference(found, gradients(False))
    return {"error": error, "dtypes": sorted({str(gradient.dtype) for gradient in found.values()})}


def rows(kind: str, folder: Path) -> dict:
    """Training with an adapter for every sample where processes have samples of different adapters, or of none: how far
    gradients are from those of one process."""
    from torch.distributed.fsdp import fully_shard
    from transformers import MixtralConfig, MixtralForCausalLM

    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
        model = MixtralForCausalLM(MixtralConfig(vocab_size=97, **sizes, **heads))
        options = {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
        options |= {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
        model = peftfast.get_peft_model(model, peftfast.LoraConfig(**options, modules_to_save=["lm_head"]))
        model.add_adapter("other", peftfast.LoraConfig(**options, trainable_token_indices=[3, 5]))
        model.set_requires_grad(["default", "other"])
        return model.train()

    def prompts() -> torch.nn.Module:
        torch.manual_seed(0)
        config = peftfast.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
        model = peftfast.get_peft_model(llama(), config)
        model.add_adapter("other", config)
        for name, p in model.named_parameters():
            p.requires_grad_("prompt_encoder" in name or "modules_to_save" in name)
        return model.train()

    def kasa() -> torch.nn.Module:
        torch.manual_seed(0)
        model = peftfast.get_peft_model(llama(), lora(peftfast, kasa_config=peftfast.KasaConfig()))
        model.add_adapter("other", model.peft_config["default"])
        fill(model)
        model.set_requires_grad(["default", "other"])
        return model.train()

    def gradients(model: torch.nn.Module, parts: int, names: list[str]) -> dict[str, torch.Tensor]:
        own = names if parts == 1 else names[2 * dist.get_rank() :][:2]
        inputs = {k: v.chunk(parts)[dist.get_rank() % parts] for k, v in batch(4).items()}
        model(**inputs, adapter_names=own).loss.backward()
        found = {n: put_together(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    build = {"layers": build, "prompts": prompts, "kasa": kasa}[kind]
    model, alone, errors = build(), build(), []
    fully_shard(model.get_base_model().model.layers[0])
    fully_shard(model)
    first = "other" if kind == "prompts" else "__base__"
    if kind == "kasa":  # what is kept of the base is made anew where samples need it
        for one in (model, alone):
            peftfast.set_base_model_state_dict(one, llama(1).state_dict())
    for names in ([first] * 2 + ["other", "default"], ["default"] * 2 + ["other"] * 2):
        expected = gradients(alone, 1, names)
        found = gradients(model, 2, names)
        errors.append(largest_difference({n: found[n] for n in expected}, expected))
        if kind == "kasa":
            with torch.no_grad():
                merged = []
                for one in (model, alone):
                    one.merge_adapter()
                    merged.append({"merged": one(**batch(4)).logits})
                    one.unmerge_adapter()
            errors.append(largest_difference(*merged))
    return {"error": max(errors)}


def prompt(kind: str, folder: Path) -> dict:
    """What a prompt encoder's network makes of its parameters, from their shards and from a gathered state dict."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        config = peftfast.PromptEncoderConfig(
            num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_reparameterization_type=kind
        )
        return peftfast.get_peft_model(llama(), config)

    model, expected = fully_shard(build()), peftfast.get_peft_model_state_dict(build())
    found = largest_difference(peftfast.get_peft_model_state_dict(model), expected)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {"error": max(found, largest_difference(peftfast.get_peft_model_state_dict(model, whole), expected))}


def late(kind: str, folder: Path) -> dict:
    """Adapters that come to a model which FSDP2 has sharded and evaluated: how far outputs are from those of one
    process, and what is trainable then."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    options = {"target_modules": ["q_proj"], "init_lora_weights": False}
    kinds = {"plain": {}, "tokens": {"trainable_token_indices": [3, 5]}, "saved": {"modules_to_save": ["lm_head"]}}
    kind, *units = kind.split("+")

    def run(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(**batch(4)).logits

    def outputs(base: torch.nn.Module) -> Iterator[torch.Tensor]:
        torch.manual_seed(0)
        model = peftfast.get_peft_model(base, lora(peftfast, **options, **kinds[kind]))
        yield run(model)
        model.add_adapter("second", lora(peftfast, **options, **kinds[kind]))
        model.set_adapter("second")
        yield run(model)
        trainable.append(sorted(n for n, p in model.named_parameters() if p.requires_grad))
        if kind != "tokens":
            model.add_weighted_adapter(["default", "second"], [0.5, 0.4], "both", "cat")
            model.set_adapter("both")
            yield run(model)
        assert is_distributed(model.unload().model.norm.weight) == isinstance(base, FSDPModule)

    base, trainable = llama(), []
    for unit in (base.model.embed_tokens, base.lm_head) if units else ():
        fully_shard(unit)
    run(shard(base))
    if units:
        with pytest.raises(ValueError, match="lm_head.weight.*Add the adapter before fully_shard"):
            peftfast.get_peft_model(base, lora(peftfast, target_parameters=["lm_head.weight"]))
    for changes in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(RuntimeError, match="Add it before fully_shard"):
            peftfast.get_peft_model(base, lora(peftfast, **changes))
    with pytest.warns(peftfast.PeftWarning, match="add it before fully_shard"):
        found = list(outputs(base))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fully_shard")
        expected = list(outputs(llama()))
    assert trainable[0] == trainable[1]
    return {"error": largest_difference(dict(enumerate(found)), dict(enumerate(expected)))}


def deleted(kind: str, folder: Path) -> dict:
    """An adapter of bare Parameters is deleted from a model that FSDP2 has sharded, and another one gets its name: what
    is there after the next calls, and how far outputs are from those of one process."""
    configs = {
        "ia3": peftfast.IA3Config(target_modules=["k_proj"], init_ia3_weights=False),
        "tokens": lora(peftfast, trainable_token_indices=[3, 5], init_lora_weights=False),
    }

    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        model = peftfast.get_peft_model(llama(tied=True), configs[kind])
        model.add_adapter("second", configs[kind])
        return model

    def outputs(model: torch.nn.Module) -> Iterator[torch.Tensor]:
        with torch.no_grad():
            yield model(**batch(4)).logits
            model.delete_adapter("second")
            yield model(**batch(4)).logits
            assert not [n for n, _ in model.named_parameters() if "second" in n]
            torch.manual_seed(1)
            model.add_adapter("second", configs[kind])
            model.set_adapter("second")
            for n, p in model.named_parameters():
                if "second" in n:
                    p += 1
            yield model(**batch(4)).logits
            yield model(**batch(4)).logits

    found, expected = (dict(enumerate(outputs(one))) for one in (shard(build()), build()))
    return {"error": largest_difference(found, expected)}


def partly(kind: str, folder: Path) -> dict:
    """Merging where FSDP2 has taken the base apart and not the adapter, which came later from a file, or the adapter
    and not the base, which it was told to ignore: how far outputs are from those of one process."""
    from torch.distributed.fsdp import fully_shard

    changes = {
        "lora": {"lora_bias": True},
        "dora": {"use_dora": True},
        "units": {"use_dora": True},
        "pissa": {"init_lora_weights": "pissa"},
        "kasa": {"kasa_config": peftfast.KasaConfig()},
        "ia3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    }[kind]
    biased = kind in ("lora", "units")

    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        if kind == "ia3":
            config = peftfast.IA3Config(**changes, init_ia3_weights=False, task_type="CAUSAL_LM")
        else:
            config = lora(peftfast, **changes)
        model = peftfast.get_peft_model(llama(attention_bias=biased, mlp_bias=biased), config)
        for name, p in model.named_parameters():
            if p.requires_grad and kind != "pissa":
                p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
        return model

    def results(model: torch.nn.Module) -> Iterator[torch.Tensor]:
        with torch.no_grad():
            yield model(**batch(4)).logits
            model.merge_adapter(safe_merge=True)
            yield model(**batch(4)).logits
            model.unmerge_adapter()
            yield model.merge_and_unload()(**batch(4)).logits

    expected = dict(enumerate(results(build())))
    build().save_pretrained(folder, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    base = llama(attention_bias=biased, mlp_bias=biased)
    for unit in [m for m in base.modules() if kind == "units" and isinstance(m, torch.nn.Linear)]:
        fully_shard(unit)
    late = peftfast.PeftModel.from_pretrained(shard(base), folder)
    errors = [largest_difference(dict(enumerate(results(late))), expected)]
    model = build()
    frozen = {p for p in model.parameters() if not p.requires_grad}
    errors.append(largest_difference(dict(enumerate(results(shard(model, ignored_params=frozen)))), expected))
    if kind == "lora":  # and of what a sharded adapter and a later one are together
        for one in (model := shard(build()), alone := build()):
            one.load_adapter(folder, "later")
            one.add_weighted_adapter(["default", "later"], [0.5, 0.4], "both", "cat")
            one.set_adapter("both")
        with torch.no_grad():
            both = [{"both": one(**batch(4)).logits} for one in (model, alone)]
        errors.append(largest_difference(*both))
    return {"error": max(errors)}


def units(kind: str, folder: Path) -> dict:
    """Modules of the adapters' factors as shards of their own, as a policy for whole trainable leaves makes them, or
    adapted layers."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.fsdp.wrap import CustomPolicy

    world = dist.get_world_size()
    model = model_of("plain")
    expected = single("plain")
    holders = [m for n, m in model.named_modules() if ".lora_" in n and n.endswith(".default") and m._parameters]
    assert len(holders) > 4
    if kind in ("2", "layers"):
        mesh = init_device_mesh("cpu", (world,))
        if kind == "layers":
            holders = [*model.base_model.inventory.layers.values()]
        for module in (*holders, *model.get_base_model().model.layers, model):
            fully_shard(module, mesh=mesh)
        model(**share("plain")).loss.backward()
        found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
        if kind == "layers":  # and nothing is left behind in shards that nobody puts together
            with torch.no_grad():
                for results, one in (found, model), (expected, model_of("plain")):
                    results["unloaded"] = one.unload()(**batch(4)).logits
    else:
        policy = CustomPolicy(lambda module: any(module is one for one in holders))
        wrapped = FSDP(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))
        wrapped(**share("plain")).loss.backward()
        with FSDP.summon_full_params(wrapped, with_grads=True, writeback=False):
            names = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in wrapped.named_parameters()}
            found = {n: p.grad.clone() for n, p in names.items() if p.requires_grad}
    return {"error": largest_difference(found, expected)}


def tied(kind: str, folder: Path) -> dict:
    """Merging into one of two modules that share a weight, in units as Accelerate makes them: how far outputs are from
    those of one process."""
    from torch.distributed.fsdp import fully_shard

    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        config = lora(peftfast, target_modules=["q_proj", kind], init_lora_weights=False)
        return peftfast.get_peft_model(llama(tied=True), config)

    def outputs(model: torch.nn.Module) -> Iterator[torch.Tensor]:
        with torch.no_grad():
            model.merge_adapter()
            yield model(**batch(4)).logits
            yield model(**batch(4)).logits
            model.unmerge_adapter()
            yield model(**batch(4)).logits
            model.state_dict()
            yield model(**batch(4)).logits
            yield model.merge_and_unload()(**batch(4)).logits

    model = build()
    base = model.get_base_model()
    fully_shard([base.model.norm, base.model.embed_tokens, base.lm_head], reshard_after_forward=False)
    found, expected = (dict(enumerate(outputs(one))) for one in (shard(model), build()))
    return {"error": largest_difference(found, expected)}


class Uneven(torch.nn.Module):
    """Weights whose shards are not of one size, or empty."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = torch.nn.Bilinear(8, 8, 3)  # has a weight of three matrices
        self.mix = torch.nn.Conv1d(3, 3, 1)
        self.up, self.head = torch.nn.Linear(3, 9), torch.nn.Linear(9, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.mix(self.stack(x, x).unsqueeze(-1)).squeeze(-1)))


def uneven(kind: str, folder: Path) -> dict:
    """Merging where FSDP2's shards are not of one size: how far outputs are from those of one process."""
    from torch.distributed.fsdp import fully_shard

    changes = {
        "parameters": {"target_modules": ["head"], "target_parameters": ["stack.weight"], "r": 1},
        "blocks": {
            "target_modules": ["up"],
            "r": 3,
            "use_bdlora": peftfast.BdLoraConfig(target_modules_bd_b=["up"], nblocks=3),
        },
        "channels": {"target_modules": ["mix"], "r": 2, "use_dora": True},
    }[kind]

    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        model = peftfast.get_peft_model(Uneven(), peftfast.LoraConfig(**changes, init_lora_weights=kind == "blocks"))
        fill(model)
        return model

    def outputs(model: torch.nn.Module) -> Iterator[torch.Tensor]:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            model.merge_adapter(safe_merge=True)
            yield model(x)
            model.unmerge_adapter()
            yield model(x)
            yield model.merge_and_unload()(x)

    found, expected = (dict(enumerate(outputs(one))) for one in (fully_shard(build()), build()))
    return {"error": largest_difference(found, expected)}


def around(kind: str, folder: Path) -> dict:
    """A model of which FSDP2 has sharded nothing but all of it: outputs once the adapter is gone, against those of one
    process, and which class its files name."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    world = dist.get_world_size()
    options = {"target_modules": ["q_proj"], "init_lora_weights": False, "task_type": None}
    torch.manual_seed(0)
    alone = peftfast.get_peft_model(llama(), lora(peftfast, **options))
    torch.manual_seed(0)
    model = peftfast.get_peft_model(llama(), lora(peftfast, **options))
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("copies", "shards")) if kind == "copies" else None
    fully_shard(model.get_base_model() if kind == "base" else model, mesh=mesh)
    with pytest.raises(RuntimeError, match="Add it before fully_shard"):
        model.add_adapter("second", lora(peftfast, use_dora=True))
    model.save_pretrained(folder, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    names = json.loads((folder / "adapter_config.json").read_text())["auto_mapping"]
    with torch.no_grad():
        found, expected = (one.merge_and_unload()(**batch(4)).logits for one in (model, alone))
    error = largest_difference({"logits": found}, {"logits": expected})
    return {"error": error, "base": names["base_model_class"], "from": names["parent_library"]}


def optimizers(kind: str, folder: Path) -> dict:
    """Steps of an optimizer that knows the factors apart and was made before the model was sharded by FSDP2, by
    Accelerate, which gives it the shards in the place of its parameters: how far the parameters are from those of one
    process."""

    world = dist.get_world_size()

    def prepared() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = model_of("plain")
        if kind == "lorafa":
            return model, create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
        return model, create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-1)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, parts: int) -> dict[str, torch.Tensor]:
        take_steps(model, optimizer, range(3), parts)
        return {n: put_together(p) for n, p in model.named_parameters() if p.requires_grad}

    expected = train(*prepared(), 1)
    model, optimizer = prepared()
    names = {p: n for n, p in model.named_parameters()}
    shard(model)
    for group in optimizer.param_groups:
        group["params"] = [model.get_parameter(names[p]) for p in group["params"]]
    return {"error": largest_difference(train(model, optimizer, world), expected)}


def averaged(kind: str, folder: Path) -> dict:
    """An average of a model that FSDP2 has sharded, saved as shards and whole, after an evaluation, which leaves the
    root's parameters whole for a time: how far it and the outputs with it are from those of one process."""

    def train(model: torch.nn.Module, parts: int) -> dict[str, torch.Tensor]:
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.05)
        average, found = peftfast.AdapterAverage(model), {}
        for step in range(4):
            take_steps(model, optimizer, [step], parts)
            average.update()
            if step == 1:
                state = average.state_dict()
                average = peftfast.AdapterAverage(model)
                average.load_state_dict(gathered(state) if kind == "whole" else state)
            with torch.no_grad(), average.applied():
                found[f"with the average of step {step}"] = model(**batch(4)).logits
            with torch.no_grad():
                found[f"after step {step}"] = model(**batch(4)).logits
        return found | gathered(average.state_dict())

    return {
        "error": largest_difference(train(shard(model_of("saved")), dist.get_world_size()), train(model_of("saved"), 1))
    }


RUNS = {
    "averaged": averaged,
    "ddp": ddp,
    "fsdp1": fsdp1,
    "fsdp2": fsdp2,
    "units": units,
    "reference": reference,
    "rows": rows,
    "adalora": adalora,
    "evaluated": evaluated,
    "late": late,
    "deleted": deleted,
    "partly": partly,
    "tied": tied,
    "uneven": uneven,
    "around": around,
    "prompt": prompt,
    "optimizers": optimizers,
}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    answer(RUNS)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
