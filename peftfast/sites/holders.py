"""The modules that hold factors, built without allocating or initialising a weight twice."""

from __future__ import annotations

from torch import nn

#: Of one to three dimensions.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def empty_module(cls: type[nn.Module], **attributes: object) -> nn.Module:
    """A module with these attributes, none of them tensors or modules, whose weight and bias are still to be set. Every
    adapter has two at every site, so torch's registering, which takes longer than all else, is left out."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    module.__dict__.update(attributes)
    module._parameters.update(weight=None, bias=None)
    return module


def linear_holder(in_features: int, out_features: int) -> nn.Module:
    """An `nn.Linear` whose weight and bias are still to be set."""
    return empty_module(nn.Linear, in_features=in_features, out_features=out_features)


def conv_holder(base: nn.Module, in_channels: int, out_channels: int, **changes: object) -> nn.Module:
    """A convolution of as many dimensions as `base` (of the same kernel, stride, padding, dilation) with other channels
    and `changes`."""
    cls = CONVOLUTIONS[len(base.kernel_size) - 1]
    same = (
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "padding_mode",
        "_reversed_padding_repeated_twice",
        "transposed",
        "output_padding",
    )
    attributes = {name: getattr(base, name) for name in same} | {"groups": 1} | changes
    return empty_module(cls, in_channels=in_channels, out_channels=out_channels, **attributes)
