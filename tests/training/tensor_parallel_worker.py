"""What the processes of test_tensor_parallel.py run: `torchrun --nproc-per-node 2 <this file> <folder>`."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from torch import Tensor, nn
from training.tiny import batch, checkpoint, fill, llama

import peftfast

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(library=peftfast, **changes):
    return library.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **changes})


def spread(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    return AutoModelForCausalLM.from_pretrained(
        folder / "base", distributed_config=DistributedConfig(tp_size=2, tp_plan="auto")
    )


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def both(folder: Path, **changes) -> tuple[nn.Module, nn.Module]:
    """An adapter with the same factors on the spread model, by its own draws, and on one in one process."""
    torch.manual_seed(dist.get_rank())  # processes that draw differently still have to have one adapter
    ours = peftfast.get_peft_model(spread(folder), config(init_lora_weights=False, **changes))
    alone = peftfast.get_peft_model(llama(), config(**changes))
    factors = {n: whole(p) for n, p in ours.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for name, parameter in alone.named_parameters():
            if "lora_" in name:
                parameter.copy_(factors[name])
    return ours, alone


def distance(a: Tensor, b: Tensor) -> float:
    a, b = whole(a.detach()).double(), whole(b.detach()).double()
    return float((a - b).norm() / b.norm())


def gradients(model: nn.Module, **inputs) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def training(folder: Path) -> dict:
    ours, alone = both(folder)
    found = {"logits": distance(ours(**batch()).logits, alone(**batch()).logits)}
    one, other = gradients(ours, **batch()), gradients(alone, **batch())
    found["gradients"] = max(distance(one[name], other[name]) for name in other)
    found["trained"] = sorted(one) == sorted(other)
    found["shares"] = sum(p.to_local().numel() for p in ours.parameters() if p.requires_grad and hasattr(p, "to_local"))
    checkpoint(ours)
    found["checkpointed"] = max(distance(tensor, other[name]) for name, tensor in gradients(ours, **batch()).items())
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, foreach=False)
        for model in (ours, alone)
    ]
    for step in range(3):
        for model, optimizer in zip((ours, alone), optimizers, strict=True):
            gradients(model, **batch(seed=step))
            optimizer.step()
    found["after three steps"] = distance(ours(**batch()).logits, alone(**batch()).logits)
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = distance(ours(**batch()).logits.float(), alone(**batch()).logits.float())
    return found


def adapters(folder: Path) -> dict:
    ours, alone = both(folder)
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    found = {}
    with torch.no_grad():
        found["inference"] = distance(ours(**inputs).logits, alone(**inputs).logits)
    ours.eval(), alone.eval()
    tokens = [m.generate(**inputs, max_new_tokens=8, do_sample=False) for m in (ours, alone)]
    found["generated"] = torch.equal(*tokens)
    for model in (ours, alone):
        model.add_adapter("b", config(r=2, target_modules=["q_proj", "down_proj"]))
    fill_same(ours, alone, "b")
    names = ["default", "b", "__base__", "b"]
    found["rows"] = distance(ours(**inputs, adapter_names=names).logits, alone(**inputs, adapter_names=names).logits)
    for model in (ours, alone):
        model.set_adapter("b")
    found["second"] = distance(ours(**inputs).logits, alone(**inputs).logits)
    with ours.disable_adapter(), alone.disable_adapter():
        found["disabled"] = distance(ours(**inputs).logits, alone(**inputs).logits)
    for model in (ours, alone):
        model.base_model.set_adapter(["default", "b"])
    found["together"] = distance(ours(**inputs).logits, alone(**inputs).logits)
    for model in (ours, alone):
        model.add_weighted_adapter(["default", "b"], [0.5, 0.4], "both", "cat")
        model.set_adapter("both")
    found["combined"] = distance(ours(**inputs).logits, alone(**inputs).logits)
    for model in (ours, alone):
        model.delete_adapter("b")
        model.set_adapter("default")
    found["after deleting"] = distance(ours(**inputs).logits, alone(**inputs).logits)
    return found


def fill_same(ours: nn.Module, alone: nn.Module, adapter: str) -> None:
    from peftfast.sharding import copy_whole

    fill(alone, 5)
    theirs = dict(alone.named_parameters())
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            copy_whole(parameter, theirs[name].detach())


def dropping(folder: Path) -> dict:
    ours, _ = both(folder, lora_dropout=0.5)
    inputs, found = batch(), {}
    ours.train()
    shares = {}
    for name, gradient in gradients(ours, **inputs).items():
        own = gradient.clone()
        dist.broadcast(gradient, 0)
        shares[name] = distance(own, gradient)
    found["same everywhere"] = max(shares.values())
    first, second = (ours(**inputs).logits.detach() for _ in range(2))
    found["drawn anew"] = distance(first, second)
    torch.manual_seed(7)
    plain = gradients(ours, **inputs)
    checkpoint(ours)
    torch.manual_seed(7)
    found["checkpointed"] = max(distance(g, plain[n]) for n, g in gradients(ours, **inputs).items())
    ours.eval()
    found["evaluation"] = distance(ours(**inputs).logits, ours(**inputs).logits)
    return found


def files(folder: Path) -> dict:
    ours, alone = both(folder)
    ours.save_pretrained(folder / f"saved{dist.get_rank()}")
    read = peft.PeftModel.from_pretrained(llama(), folder / f"saved{dist.get_rank()}")
    found = {"read by PEFT": distance(read(**batch()).logits, alone(**batch()).logits)}
    theirs = peft.get_peft_model(llama(), config(peft))
    fill(theirs, 11)
    theirs.save_pretrained(folder / f"theirs{dist.get_rank()}")
    again = peftfast.PeftModel.from_pretrained(spread(folder), folder / f"theirs{dist.get_rank()}", is_trainable=True)
    found["loaded"] = distance(again(**batch()).logits, theirs(**batch()).logits)
    found["trainable"] = all(p.requires_grad for n, p in again.named_parameters() if "lora_" in n)
    again.load_adapter(folder / f"saved{dist.get_rank()}", "b")
    again.set_adapter("b")
    found["loaded beside"] = distance(again(**batch()).logits, alone(**batch()).logits)
    peftfast.hotswap_adapter(again, folder / f"theirs{dist.get_rank()}", "b")
    found["swapped"] = distance(again(**batch()).logits, theirs(**batch()).logits)
    return found


def refused(folder: Path) -> dict:
    from peftfast import AdaLoraConfig, IA3Config

    found = {}
    for what, wanted in {
        "dora": config(use_dora=True),
        "pissa": config(init_lora_weights="pissa"),
        "ia3": IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        "adalora": AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        "head": config(modules_to_save=["lm_head"]),
        "adapted head": config(target_modules=["q_proj", "lm_head"]),
        "tokens": config(trainable_token_indices=[3]),
        "embedding": config(target_modules=["embed_tokens"]),
    }.items():
        model = spread(folder)
        names = [name for name, _ in model.named_modules()]
        try:
            peftfast.get_peft_model(model, copy.deepcopy(wanted))
            found[what] = "nothing"
        except NotImplementedError as error:
            found[what] = str(error)
        assert [name for name, _ in model.named_modules()] == names
    ours, _ = both(folder)
    before = ours(**batch()).logits.detach()
    for what, call in {"merge": ours.merge_adapter, "unload": ours.merge_and_unload}.items():
        try:
            call()
            found[what] = "nothing"
        except RuntimeError as error:
            found[what] = str(error)
    found["after"] = distance(ours(**batch()).logits, before)
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        llama().save_pretrained(folder / "base")
    dist.barrier()
    results = {run.__name__: run(folder) for run in (training, adapters, dropping, files, refused)}
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
