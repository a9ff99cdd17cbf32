"""A LoRA linear on a CPU, forward and backward: the autograd Function, torch's own operations, and PEFT.

    python bench/small_products.py [--widths 64 256 1024] [--tokens 16 64 256 1024] [--dropout 0 0.1]

Settles `SMALL` in peftfast/ops/composed.py: up to which input the second way is taken. Prints a row for each size, with
both ways' times over PEFT's (below 1 is faster). Outputs are compared first; all calls take turns in a drawn order.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Callable

import peft
import torch
from adapters import alternating
from measure import print_row, print_table_head, print_versions
from torch import nn

import peftfast
from peftfast.ops import composed

LAYERS = 6
#: id -> (dtype of base and input, fp32 factors, autocast)
MODES = {
    "fp32": (torch.float32, True, False),
    "bf16, fp32 factors": (torch.bfloat16, True, False),
    "bf16, bf16 factors": (torch.bfloat16, False, False),
    "bf16, autocast": (torch.bfloat16, True, True),
}
WAYS = {"function": {}, "composed": dict.fromkeys(composed.SMALL, 1 << 62)}


def model_of(library, width: int, dtype: torch.dtype, wide: bool, dropout: float) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(LAYERS)]).to(dtype)
    config = library.LoraConfig(
        r=8, target_modules=[str(i) for i in range(LAYERS)], init_lora_weights=False, lora_dropout=dropout
    )
    return library.get_peft_model(base, config, autocast_adapter_dtype=wide).train()


def step(model: nn.Module, x: torch.Tensor, autocast: bool, small: dict | None) -> Callable[[], torch.Tensor]:
    dy = torch.randn_like(x)

    def run() -> torch.Tensor:
        if small is not None:
            composed.SMALL = small
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        y.backward(dy)
        return y.detach()

    return run


def contestants(mode: str, dropout: float, width: int, tokens: int) -> dict[str, Callable[[], torch.Tensor]]:
    """A call of PEFT's and one for each way, which give the same."""
    dtype, wide, autocast = MODES[mode]
    libraries = dict.fromkeys(WAYS, peftfast) | {"peft": peft}  # a model for each way: layers keep the one they took
    models = {name: model_of(library, width, dtype, wide, dropout) for name, library in libraries.items()}
    x = torch.randn(1, tokens, width, dtype=dtype, requires_grad=True)
    calls = {name: step(model, x, autocast, WAYS.get(name)) for name, model in models.items()}
    for model in models.values():
        model.load_state_dict(models["peft"].state_dict())
        model.eval()
    expected = calls["peft"]()
    for way in WAYS:
        torch.testing.assert_close(calls[way](), expected, rtol=0.05, atol=0.05)
    for model in models.values():
        model.train()
    return calls


def row(mode: str, dropout: float, width: int, tokens: int) -> tuple[str, float, float]:
    """Microseconds of PEFT's linear, and what of them both ways take."""
    calls = contestants(mode, dropout, width, tokens)
    times = alternating(calls, max(10, min(100, int(3e10 / (tokens * width * width + 1e8)))))
    return f"{1e3 * times['peft'] / LAYERS:.0f}", *(times[way] / times["peft"] for way in WAYS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print_versions("one thread")
    print_table_head(
        "precision", "dropout", "width", "tokens", "PEFT, us a linear", "function / PEFT", "composed / PEFT"
    )
    for case in itertools.product(MODES, options.dropout, options.widths, options.tokens):
        print_row(*map(str, case), *row(*case), digits=2)


if __name__ == "__main__":
    main()
