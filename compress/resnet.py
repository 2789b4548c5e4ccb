"""`build_model`: the torch network of a graph.

The network runs the layers of `rescompress.core.layers.walk` one by one. So there is one definition of what a network
computes, and the cost model, the ONNX writer and quantizer placement share it. Parameters carry the layers' names
(``layer1.0.conv1.weight``); layers without parameters are plain functions.

Shape suffixes: N batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import assert_never

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rescompress.core.graph import INPUT, Layer, Network
from rescompress.core.operations import (
    NO_PADS,
    Add,
    Affine,
    AvgPool,
    BatchNorm,
    ChannelConv,
    ChannelSelect,
    Clip,
    Concat,
    Conv,
    Dropout,
    Elu,
    Flatten,
    Gelu,
    GlobalPool,
    GroupNorm,
    HardSigmoid,
    HardSwish,
    Input,
    LeakyRelu,
    Linear,
    MaxPool,
    Multiply,
    Pad,
    Pads,
    PRelu,
    Relu,
    Resize,
    Sigmoid,
    Silu,
    Softmax,
    Tanh,
)
from rescompress.core.recipe import network_of
from rescompress.core.spec import ModelSpec

_QUANTIZERS = "activation quantizers"  # no name of a node: it has a space
Observer = Callable[[str, Tensor], Tensor | None]
"""Called with each tensor's name and value; what it returns (unless None) takes the value's place."""


class ResNet(nn.Module):
    """A network that computes what its graph says.

    Attributes:
        spec: The network's description.
        network: Its graph.
        layers: The graph's layers.
        activations: Modules applied to the output of the named layers; empty unless the network is quantized. Module
            names may hold no dots, so the key is the tensor's name with dots replaced by ``/``.
    """

    def __init__(self, spec: ModelSpec | Network) -> None:
        """Build the modules with torch's default initialisation."""
        super().__init__()
        self.spec = spec
        self.network = network_of(spec)
        self.layers = list(self.network.layers)
        self.add_module(_QUANTIZERS, nn.ModuleDict())
        self._last_reader = {name: i for i, layer in enumerate(self.layers) for name in layer.inputs}
        self._outputs = [output.tensor for output in self.network.outputs]
        self._last_reader |= dict.fromkeys(self._outputs, -1)
        for layer in self.layers:
            module = _module(layer)
            if module is not None:
                self._attach(layer.name, module)

    @property
    def activations(self) -> nn.ModuleDict:
        """The quantizers, by tensor."""
        found = self._modules[_QUANTIZERS]
        assert isinstance(found, nn.ModuleDict)
        return found

    def _attach(self, path: str, module: nn.Module) -> None:
        """Put a module where its name says; a layer ``a`` may stand above a layer ``a.b``."""
        parent: nn.Module = self
        *folders, leaf = path.split(".")
        for folder in folders:
            parent = parent._modules.setdefault(folder, nn.Module()) or parent
        if (held := parent._modules.get(leaf)) is not None:
            module._modules |= held._modules
        parent._modules[leaf] = module

    def get_submodule(self, target: str) -> nn.Module:
        """Return the module of that name; unlike torch's, whatever attributes of that name there are (``layers``)."""
        found: nn.Module = self
        for name in target.split(".") if target else ():
            inner = found._modules.get(name)
            if inner is None:
                raise AttributeError(f"there is no module {target}")
            found = inner
        return found

    def replace_module(self, target: str, module: nn.Module) -> None:
        """Put another module in the place of one."""
        parent, _, leaf = target.rpartition(".")
        above = self.get_submodule(parent)
        module._modules |= {k: v for k, v in self.get_submodule(target)._modules.items() if k not in module._modules}
        above._modules[leaf] = module

    def outputs(self, x_NCHW: Tensor, observer: Observer | None = None) -> tuple[Tensor, ...]:
        """Return every output of the network, in order, for preprocessed images (N, C, H, W).

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
        return tuple(values[name] for name in self._outputs)

    def forward(self, x_NCHW: Tensor, observer: Observer | None = None) -> Tensor:
        """Return the first output, of a classifier its logits (N, K), for preprocessed images (N, C, H, W).

        Args:
            x_NCHW: The images.
            observer: Sees every tensor by name, and may replace it.
        """
        return self.outputs(x_NCHW, observer)[0]

    def compute(self, layer: Layer, inputs: list[Tensor]) -> Tensor:
        """Return what one layer makes of its inputs, for those who run the network piece by piece."""
        x = inputs[0]
        match layer.operation:
            case Conv() | BatchNorm() | GroupNorm() | Affine() | PRelu() | Linear() | ChannelConv():
                result: Tensor = self.get_submodule(layer.name)(x)
                return result
            case Relu():
                return F.relu(x)
            case Clip() as op:
                return x.clamp(op.low, op.high)
            case LeakyRelu() as op:
                return F.leaky_relu(x, op.slope)
            case Elu() as op:
                return F.elu(x, op.alpha)
            case Silu():
                return F.silu(x)
            case Gelu() as op:
                return F.gelu(x, approximate="tanh" if op.tanh else "none")
            case HardSwish():
                return F.hardswish(x)
            case HardSigmoid() as op:
                return (x * op.alpha + op.beta).clamp(0.0, 1.0)
            case Sigmoid():
                return torch.sigmoid(x)
            case Tanh():
                return torch.tanh(x)
            case Softmax():
                return x.softmax(1)
            case Add():
                return inputs[0] + inputs[1]
            case Multiply():
                gate = inputs[1]
                return x * (gate[:, :, None, None] if gate.dim() == 2 < x.dim() else gate)
            case Concat():
                return torch.cat(inputs, 1)
            case MaxPool() as op:
                return _max_pool(x, op)
            case AvgPool() as op:
                return _avg_pool(x, op)
            case GlobalPool() as op:
                return _global_pool(x, op)
            case ChannelSelect() as op:
                return channel_select(x, op)
            case Pad() as op:
                mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}[op.mode]
                return F.pad(x, _torch_pads(op.pads), mode, op.value if op.mode == "constant" else None)
            case Flatten():
                return x.flatten(1)
            case Dropout() as op:
                if op.whole and self.training:
                    return x * F.dropout(x.new_ones(len(x), *[1] * (x.dim() - 1)), op.probability)
                return x if op.whole else F.dropout(x, op.probability, self.training)
            case Resize() as op:
                if op.mode == "nearest":
                    return F.interpolate(x, op.size, mode="nearest")
                return F.interpolate(x, op.size, mode="bilinear", align_corners=op.align_corners)
            case Input():
                return x
            case never:
                assert_never(never)


def _torch_pads(pads: Pads) -> list[int]:
    """Return padding as ``F.pad`` takes it: the last axis first."""
    top, left, bottom, right = pads
    return [left, right, top, bottom]


def _symmetric(pads: Pads, kernel: tuple[int, int]) -> bool:
    """Whether a pool of torch's has this padding: the same on both sides, and no more than half of the kernel."""
    return pads[:2] == pads[2:] and pads[0] <= kernel[0] // 2 and pads[1] <= kernel[1] // 2


def _covering(x_NCHW: Tensor, op: MaxPool | AvgPool) -> list[int]:
    """Return padding, as ``F.pad`` takes it, with which windows in floor mode are those of `op`."""
    out_h, out_w = op.out_shape([tuple(x_NCHW.shape[1:])])[1:]
    dilation = op.dilation if isinstance(op, MaxPool) else (1, 1)
    top, left, bottom, right = op.pads
    need_h = (out_h - 1) * op.stride[0] + dilation[0] * (op.kernel[0] - 1) + 1
    need_w = (out_w - 1) * op.stride[1] + dilation[1] * (op.kernel[1] - 1) + 1
    h, w = x_NCHW.shape[2:]
    return [left, max(right, need_w - w - left), top, max(bottom, need_h - h - top)]


def _max_pool(x_NCHW: Tensor, op: MaxPool) -> Tensor:
    if _symmetric(op.pads, op.kernel):
        return F.max_pool2d(x_NCHW, op.kernel, op.stride, op.pads[:2], op.dilation, op.ceil)
    x_NCHW = F.pad(x_NCHW, _covering(x_NCHW, op), value=-torch.inf)
    return F.max_pool2d(x_NCHW, op.kernel, op.stride, 0, op.dilation)


def _avg_pool(x_NCHW: Tensor, op: AvgPool) -> Tensor:
    if _symmetric(op.pads, op.kernel):
        return F.avg_pool2d(x_NCHW, op.kernel, op.stride, op.pads[:2], op.ceil, op.count_pads)
    pads = _covering(x_NCHW, op)
    counted = F.pad(torch.ones_like(x_NCHW[:1, :1]), _torch_pads(op.pads), value=float(op.count_pads))
    extra = [have - own for have, own in zip(pads, _torch_pads(op.pads), strict=True)]
    shares = F.avg_pool2d(F.pad(counted, extra), op.kernel, op.stride)
    return F.avg_pool2d(F.pad(x_NCHW, pads), op.kernel, op.stride) / shares


def _global_pool(x_NCHW: Tensor, op: GlobalPool) -> Tensor:
    match op.kind:
        case "avg":
            value = x_NCHW.mean((2, 3))
        case "max":
            value = x_NCHW.amax((2, 3))
        case "max_avg":
            value = torch.stack([x_NCHW.amax((2, 3)), x_NCHW.mean((2, 3))], 2).flatten(1)
    return value[:, :, None, None] if op.keep else value


def channel_select(x: Tensor, op: ChannelSelect) -> Tensor:
    """Return the spatially subsampled input with its channels laid out as the operation says."""
    if x.dim() == 4:
        x = x[:, :, :: op.stride[0], :: op.stride[1]]
    padded = F.pad(x, (*[0] * (2 * x.dim() - 4), 0, 1))  # channel -1 is the zero channel
    index = torch.tensor(op.channels, device=x.device) % padded.shape[1]
    return padded.index_select(1, index)


class AffineLayer(nn.Module):
    """One factor and one summand per channel."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, channels: int, *, shift: bool) -> None:
        """Start as the identity."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_parameter("bias", nn.Parameter(torch.zeros(channels)) if shift else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x * weight + bias``."""
        shape = (-1, *[1] * (x.dim() - 2))
        x = x * self.weight.view(shape)
        return x if self.bias is None else x + self.bias.view(shape)


class ChannelConv1d(nn.Conv1d):
    """A convolution over the channels of a vector.

    Attributes:
        op: The operation.
    """

    def __init__(self, op: ChannelConv) -> None:
        """Start with torch's initialisation."""
        super().__init__(1, 1, op.kernel, padding=op.kernel // 2, bias=op.bias)
        self.op = op

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of (N, C)."""
        if self.op.places == tuple(range(self.op.length)):
            return super().forward(input[:, None])[:, 0]
        places = torch.tensor(self.op.places, device=input.device)
        line = input.new_zeros(len(input), self.op.length).index_copy(1, places, input)
        return super().forward(line[:, None])[:, 0].index_select(1, places)


class PaddedConv2d(nn.Conv2d):
    """A convolution whose padding differs from side to side.

    Attributes:
        pads: (top, left, bottom, right).
    """

    pads: Pads = NO_PADS

    def padded(self, input: Tensor) -> Tensor:
        """Return the input with its border."""
        return F.pad(input, _torch_pads(self.pads)) if any(self.pads) else input

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of the padded input."""
        return super().forward(self.padded(input))


class VectorBatchNorm(nn.BatchNorm2d):
    """A BatchNorm for vectors as well as maps."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Take any."""


class FrozenBatchNorm(VectorBatchNorm):
    """A BatchNorm that training leaves alone."""

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        """Stay in eval mode."""
        super().train(False)
        return self


def _module(layer: Layer) -> nn.Module | None:
    """Return the module that holds a layer's tensors; None for a layer without any."""
    channels = layer.in_shape[0]
    match layer.operation:
        case Conv() as op:
            module = conv_module(op, channels)
            return _as_constants(module) if op.frozen else module
        case BatchNorm() as op:
            kind = FrozenBatchNorm if op.frozen else nn.BatchNorm2d if len(layer.in_shape) == 3 else VectorBatchNorm
            norm = kind(channels, eps=op.eps)
            if not op.scale:
                norm.register_parameter("weight", None)
            if not op.shift:
                norm.register_parameter("bias", None)
            return _as_constants(norm) if op.frozen else norm
        case GroupNorm() as op:
            return nn.GroupNorm(op.groups, channels, op.eps, op.affine)
        case Affine() as op:
            affine = AffineLayer(channels, shift=op.shift)
            return _as_constants(affine) if op.frozen else affine
        case PRelu() as op:
            return nn.PReLU(1 if op.shared else channels)
        case Linear() as op:
            return nn.Linear(channels, op.width, bias=op.bias)
        case ChannelConv() as op:
            return ChannelConv1d(op)
        case _:
            return None


def conv_module(op: Conv, channels: int) -> nn.Conv2d:
    """Return torch's module for a convolution that reads so many channels."""
    even = op.pads[:2] == op.pads[2:]
    made = (nn.Conv2d if even else PaddedConv2d)(
        channels, op.width, op.kernel, op.stride, op.pads[:2] if even else 0, op.dilation, op.groups, op.bias
    )
    if isinstance(made, PaddedConv2d):
        made.pads = op.pads
    return made


def _as_constants(module: nn.Module) -> nn.Module:
    """Return the module with its parameters as buffers: they are saved, and never trained."""
    for name, value in list(module._parameters.items()):
        if value is not None:
            del module._parameters[name]
            module.register_buffer(name, value.detach())
    return module


def build_model(spec: ModelSpec | Network, state_dict: Mapping[str, Tensor] | None = None) -> ResNet:
    """Return the network in eval mode, with the given tensors or torch's default initialisation.

    Args:
        spec: The network.
        state_dict: Tensors by the names of its layers; every one must be there and fit.

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
