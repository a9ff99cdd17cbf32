"""Targets by condition numbers: those of quantised weights are of what is stored."""

import pytest
from torch import nn

pytest.importorskip("bitsandbytes")

from quantized.support import FOUR_BIT, quantised_linear

import peftfast
from peftfast.calibration.kappa import condition_number


@pytest.mark.parametrize("base", [*FOUR_BIT, "int8"])
def test_quantised_weights_count_as_what_they_stand_for(base):
    model = nn.ModuleDict({"narrow": quantised_linear(base, n=48, k=64), "square": quantised_linear(base, n=64, k=64)})
    selector = peftfast.KappaTuneSelector(model, show_progress=False)
    found = {limit: selector.get_best_targets(threshold=limit) for limit in range(1, 200)}
    peftfast.dequantize_model(model)
    numbers = {name: condition_number(layer.weight.detach()) for name, layer in model.items()}
    assert found == {limit: [n for n in ("narrow", "square") if numbers[n] <= limit] for limit in found}
    assert found[1] == [] and ["narrow"] in found.values()
