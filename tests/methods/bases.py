"""One module of every kind in every storage, and inputs of it."""

import torch
from oracle import One, stored
from torch import nn

N, K, TOKENS = 48, 64, 50


def make_module(kind, bias=True):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(1)
    if kind == "linear":
        module = nn.Linear(K, N, bias=bias)
    elif kind == "conv1d-hf":
        module = Conv1D(N, K)
        module.weight.data.normal_(std=0.1)
    elif kind == "embedding":
        module = nn.Embedding(TOKENS, K)
    else:
        cls = {"conv1": nn.Conv1d, "conv2": nn.Conv2d, "conv3": nn.Conv3d}[kind]
        module = cls(8, 12, 3, padding=1, stride=2)
    if getattr(module, "bias", None) is not None:
        module.bias.data.normal_(std=0.3)
    return module


def make_base(kind="linear", storage="fp32", bias=True):
    """A model that is one module `m`."""
    return One(stored(make_module(kind, bias), storage))


def make_input(kind="linear", storage="fp32", rows=(4, 32)):
    """The same on every call; `rows` are a linear layer's."""
    generator = torch.Generator().manual_seed(2)
    if kind == "embedding":
        return torch.randint(0, TOKENS, (4, 16), generator=generator)
    shapes = {"conv1": (3, 8, 17), "conv2": (3, 8, 9, 10), "conv3": (2, 8, 5, 6, 7)}
    x = torch.randn(shapes.get(kind, (*rows, K)), generator=generator)
    return x.to(torch.bfloat16) if storage == "bf16" else x
