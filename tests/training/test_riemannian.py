"""Gradients in the metric of the product of the factors, next to PEFT's."""

import importlib

import oracle
import pytest
import torch

import peftfast
from peftfast.optimizers import create_riemannian_optimizer

peft = importlib.import_module("peft")

CASES = {
    "lora": ({"target_modules": ["q_proj", "down_proj"]}, torch.optim.SGD, {"momentum": 0.9}),
    "dora": ({"target_modules": ["q_proj"], "use_dora": True}, torch.optim.AdamW, {"weight_decay": 0.1}),
    "others": ({"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}, torch.optim.AdamW, {}),
}


@pytest.mark.parametrize("case, dtype", [*((case, torch.float32) for case in CASES), ("lora", torch.bfloat16)], ids=str)
def test_steps_are_pefts(case, dtype):
    options, optimizer_cls, more = CASES[case]
    theirs_of = importlib.import_module("peft.optimizers").create_riemannian_optimizer
    models = []
    for library, create in ((peftfast, create_riemannian_optimizer), (peft, theirs_of)):
        model = library.get_peft_model(oracle.llama(), oracle.config_of(library, {"r": 4, **options}))
        models.append((model, create))
    oracle.copy_parameters(models[1][0], models[0][0])
    for model, create in models:
        model.to(dtype)  # the factors as well
        optimizer = create(model, optimizer_cls, lr=1e-2, reg=1e-1, **more)
        assert isinstance(optimizer, optimizer_cls)
        for _ in range(3):
            optimizer.zero_grad()
            model(**oracle.inputs(model)).logits.float().square().mean().backward()
            optimizer.step()
    mine, other = (dict(model.named_parameters()) for model, _ in models)
    close = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 2e-2}
    for name, value in other.items():
        torch.testing.assert_close(mine[name], value, **close, msg=lambda m, n=name: f"{n}: {m}")


def test_what_cannot_be_preconditioned_is_refused():
    config = peftfast.LoraConfig(target_modules=["q_proj"])
    model = peftfast.get_peft_model(oracle.llama(), config)
    with pytest.raises(TypeError, match="must be a subclass of torch.optim.Optimizer"):
        create_riemannian_optimizer(model, torch.nn.Linear, lr=1e-3)
    with pytest.raises(ValueError, match="LBFGS requires a closure"):
        create_riemannian_optimizer(model, torch.optim.LBFGS, lr=1e-3)
    with pytest.raises(ValueError, match="reg must be a finite number"):
        create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3, reg=-1e-2)
    with pytest.raises(ValueError, match="does not support closures"):
        create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3).step(lambda: 0.0)
    model.set_adapter("default", inference_mode=True)
    with pytest.raises(ValueError, match="did not find any trainable lora_A/lora_B"):
        create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3)
