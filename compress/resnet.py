"""`build_model`: the torch network of a `ModelSpec`.

The network runs the walk of `rescompress.core.layers` layer by layer. So there is one definition of what a ResNet
computes, and the cost model, the ONNX writer and quantizer placement share it. Parameters carry the walk's names
(``layer1.0.conv1.weight``); layers without parameters are plain functions.

Shape suffixes: N batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rescompress.core.layers import INPUT, Layer, walk
from rescompress.core.spec import ModelSpec

Observer = Callable[[str, Tensor], Tensor | None]
"""Called with each tensor's name and value; what it returns (unless None) takes the value's place."""


class ResNet(nn.Module):
    """A ResNet that computes what its spec says.

    Attributes:
        spec: The network's description.
        layers: The walk over `spec`.
        activations: Modules applied to the output of the named layers; empty unless the network is quantized. Module
            names may hold no dots, so the key is the tensor's name with dots replaced by ``/``.
    """

    def __init__(self, spec: ModelSpec) -> None:
        """Build the modules with torch's default initialisation."""
        super().__init__()
        self.spec = spec
        self.layers = walk(spec)
        self.activations = nn.ModuleDict()
        self._last_reader = {name: i for i, layer in enumerate(self.layers) for name in layer.inputs}
        for layer in self.layers:
            module = _module(layer)
            if module is not None:
                self._attach(layer.name, module)

    def _attach(self, path: str, module: nn.Module) -> None:
        parent: nn.Module = self
        *folders, leaf = path.split(".")
        for folder in folders:
            if folder not in parent._modules:
                parent.add_module(folder, nn.Module())
            parent = parent.get_submodule(folder)
        parent.add_module(leaf, module)

    def forward(self, x_NCHW: Tensor, observer: Observer | None = None) -> Tensor:
        """Return logits (N, K) for preprocessed images (N, C, H, W).

        Args:
            x_NCHW: The images.
            observer: Sees every tensor by name, and may replace it.
        """
        values: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            value = x_NCHW if layer.name == INPUT else self.compute(layer, [values[name] for name in layer.inputs])
            key = layer.name.replace(".", "/")
            if key in self.activations:
                value = self.activations[key](value)
            if observer is not None:
                replaced = observer(layer.name, value)
                value = value if replaced is None else replaced
            values[layer.name] = value
            for name in layer.inputs:
                if self._last_reader[name] == i:
                    values.pop(name, None)
        return values[self.layers[-1].name]

    def compute(self, layer: Layer, inputs: list[Tensor]) -> Tensor:
        """Return what one layer makes of its inputs, for those who run the network piece by piece."""
        x = inputs[0]
        match layer.op:
            case "conv" | "batch_norm" | "linear":
                result: Tensor = self.get_submodule(layer.name)(x)
                return result
            case "relu":
                return F.relu(x)
            case "add":
                return inputs[0] + inputs[1]
            case "max_pool":
                return F.max_pool2d(x, layer.kernel, layer.stride, layer.padding)
            case "avg_pool":
                return F.avg_pool2d(x, layer.kernel, layer.stride, ceil_mode=True, count_include_pad=False)
            case "global_pool":
                return x.mean((2, 3))
            case "global_max_avg_pool":
                return torch.stack([x.amax((2, 3)), x.mean((2, 3))], 2).flatten(1)
            case "pad_shortcut":
                return pad_shortcut(x, layer)
            case "dropout":
                return F.dropout(x, layer.dropout, self.training)
            case _:
                raise AssertionError(layer.op)


def pad_shortcut(x_NCHW: Tensor, layer: Layer) -> Tensor:
    """Return the spatially subsampled input with its channels laid out by the layer's channel map."""
    assert layer.channel_map is not None
    x_NCHW = x_NCHW[:, :, :: layer.stride, :: layer.stride]
    padded = F.pad(x_NCHW, (0, 0, 0, 0, 0, 1))  # channel -1 is the zero channel
    index = torch.tensor(layer.channel_map, device=x_NCHW.device) % padded.shape[1]
    return padded.index_select(1, index)


def _module(layer: Layer) -> nn.Module | None:
    match layer.op:
        case "conv":
            return nn.Conv2d(
                layer.in_shape[0],
                layer.out_shape[0],
                layer.kernel,
                layer.stride,
                layer.padding,
                groups=layer.groups,
                bias=layer.bias,
            )
        case "batch_norm":
            return nn.BatchNorm2d(layer.out_shape[0], eps=layer.eps)
        case "linear":
            return nn.Linear(layer.in_shape[0], layer.out_shape[0], bias=layer.bias)
        case _:
            return None


def build_model(spec: ModelSpec, state_dict: Mapping[str, Tensor] | None = None) -> ResNet:
    """Return the network of `spec` in eval mode, with the given tensors or torch's default initialisation.

    Args:
        spec: The network.
        state_dict: Tensors by the names of the walk; every one must be there and fit.

    Raises:
        RuntimeError: A tensor is missing, too many, or of another shape.
    """
    if state_dict is None:
        return ResNet(spec).eval()
    with torch.device("meta"):
        model = ResNet(spec)
    model.load_state_dict({k: v.clone() for k, v in state_dict.items()}, assign=True)
    return model.requires_grad_(True).eval()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a detached copy of every parameter and buffer, contiguous and on the CPU."""
    return {k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()}
