"""Keras models (1, 2 and 3), functional or sequential, by their configuration: layers of Keras's own, as calls of a `Trace`.

No code of a file runs, so a layer of a class of its own is refused by name: only its author's code knows what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import zoo
from compress.checkpoints.base import Checkpoint, LoadOptions, Stored
from compress.checkpoints.files import Opened
from compress.checkpoints.keras_front import Affine, preprocessing_of
from compress.checkpoints.keras_layers import activation_of, called_as_in_training, is_foreign, is_idle
from compress.checkpoints.roots import flatten
from compress.importers.aten import add, clamp, mul
from compress.importers.finish import Source, checkpoint_of
from compress.importers.network import Read, read_trace
from compress.importers.trace import NONE, Pads, Refused, Step, Trace, Value
from rescompress.core.errors import CheckpointError
from rescompress.core.spec import Preprocessing

_MODELS = frozenset(("Functional", "Model", "Sequential", "Graph"))
_ORDER = ("gamma", "beta", "moving_mean", "moving_variance")
_UNPROVEN = "read from its configuration; Keras does not run here, so nothing proves it: compare some predictions"
REMEDY = "export the model to ONNX (model.export(..., format='onnx') of Keras 3, or tf2onnx), and give that file"


def load_keras(path: Path, opened: Opened, options: LoadOptions) -> Checkpoint:
    """Return the network of a Keras configuration and its weights.

    Args:
        path: Of the file.
        opened: The file; it holds a configuration.
        options: What the user states.

    Raises:
        CheckpointError: A layer is none of Keras's own that are known here (it is named), or a weight is missing.
    """
    read, own, stated = traced(opened, options)
    shape = read.network.input_shape
    notes = [*opened.notes]
    for output, end in zip(read.network.outputs, read.ends, strict=True):
        if end:
            notes.append(f"output '{output.name}' are logits: the {end} at the end is left to the reader")
    preprocessing = zoo.preprocessing("rescale", shape, squash=True)
    if own is not None:
        ways = {key: getattr(preprocessing, key) for key in ("resize", "interpolation", "antialias")}
        preprocessing = own.model_copy(update=ways)
    source = Source("keras", path.name, read.network.arch, opened.container, tuple(notes), (_UNPROVEN,), stated, preprocessing)
    return checkpoint_of(read, None, options, source)


def traced(opened: Opened, options: LoadOptions) -> tuple[Read, Preprocessing | None, bool]:
    """Return the network of a configuration, the preprocessing that it begins with, and whether its input's size is stated.

    Raises:
        CheckpointError: As `load_keras`.
    """
    config: Any = opened.metadata["keras_config"]
    weights: dict[str, dict[str, Stored]] = {}
    for key, stored in flatten(opened).items():
        layer, _, part = key.rpartition(".")
        weights.setdefault(layer, {})[part] = stored
    try:
        shape, stated = _input(config, options)
        trace = Trace(shape)
        model = _Model(trace, weights)
        last = model.last_channels(config)
        images = trace.input().move(lambda p: p.permute(0, 2, 3, 1)) if last else trace.input()
        outputs = model.run(config, [images])
        names = _output_names(config, len(outputs))
        own: list[Preprocessing] = []
        arch = options.arch.get("arch", _name(config))
        read = read_trace(trace, list(zip(names, outputs, strict=True)), arch=arch, front=lambda s: _front(s, own))
    except Refused as e:
        raise CheckpointError(f"holds something that is not known here: {e}", remedy=REMEDY) from e
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as e:
        raise CheckpointError(
            f"damaged: its configuration cannot be read ({type(e).__name__}: {e})", remedy="save the whole model again"
        ) from e
    return read, own[0] if own else None, stated


def _front(steps: Sequence[Step], found: list[Preprocessing]) -> None:
    """Take what a model does to each channel of its images out of its steps; add it to `found` as preprocessing."""
    entry = steps[0]
    c = entry.shape[0]
    affine, at = Affine(tuple(range(c)), (1.0,) * c, (0.0,) * c), entry
    while True:
        readers = [s for s in steps if at in s.inputs]
        if len(readers) != 1 or readers[0].op not in ("affine", "select"):
            break
        (step,) = readers
        if step.op == "affine":
            scale, shift = (tuple(map(float, step.tensors[k])) for k in ("scale", "shift"))
            affine = affine.then(scale, shift)
        elif sorted(step.attributes["channels"]) == list(range(c)) and step.attributes["stride"] == (1, 1):
            order = step.attributes["channels"]
            affine = Affine(
                tuple(affine.order[i] for i in order),
                tuple(affine.scale[i] for i in order),
                tuple(affine.offset[i] for i in order),
            )
        else:
            break
        at = step
    if at is not entry:
        found.append(preprocessing_of(affine, (entry.shape[0], entry.shape[1], entry.shape[2])))
        for step in steps:
            step.inputs = [entry if s is at else s for s in step.inputs]


def _layers(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inner = config.get("config")
    layers = inner.get("layers") if isinstance(inner, Mapping) else inner
    if not isinstance(layers, list) or not layers or not all(isinstance(x, Mapping) for x in layers):
        raise Refused(
            f"a {config.get('class_name')} without layers: a subclassed model, whose code alone says what it computes"
        )
    return layers


def _settings(layer: Mapping[str, Any]) -> dict[str, Any]:
    inner = layer.get("config")
    return dict(inner) if isinstance(inner, Mapping) else {}


def _name(config: Mapping[str, Any]) -> str:
    inner = config.get("config")
    return str(inner.get("name", "keras")) if isinstance(inner, Mapping) else "keras"


def _input(config: Mapping[str, Any], options: LoadOptions) -> tuple[tuple[int, int, int], bool]:
    """Return channels, height and width of the images, and whether they are stated."""
    shape: Any = None
    todo = list(_layers(config))
    while todo and shape is None:
        layer = todo.pop(0)
        settings = _settings(layer)
        found = settings.get("batch_shape") or settings.get("batch_input_shape")
        if isinstance(found, list) and len(found) == 4:
            shape = found[1:]
        elif layer.get("class_name") in _MODELS:
            todo[:0] = _layers(layer)
    if shape is None:
        if options.input_shape is None:
            raise CheckpointError("its configuration states no input", remedy="state --input CxHxW")
        return options.input_shape, True
    last = _Model.last_channels(config)
    c, h, w = (shape[2], shape[0], shape[1]) if last else shape
    if options.input_shape is not None:
        if any(own is not None and own != given for own, given in zip((c, h, w), options.input_shape, strict=True)):
            raise CheckpointError(
                f"its input is {'x'.join(str(n or '?') for n in (c, h, w))}",
                remedy="leave --input out, or save it for that size",
            )
        return options.input_shape, True
    if c is None:
        raise CheckpointError("its configuration leaves the channels of its input open", remedy="state --input CxHxW")
    return (int(c), int(h or 224), int(w or 224)), h is not None and w is not None


def _output_names(config: Mapping[str, Any], count: int) -> list[str]:
    inner = config.get("config")
    ends = _references(inner.get("output_layers")) if isinstance(inner, Mapping) else []
    return [e[0] for e in ends] if len(ends) == count else ["output"] if count == 1 else [f"output_{i}" for i in range(count)]


def _references(value: Any) -> list[tuple[str, int, int]]:
    """Return layer, call and tensor of each place that ``["a", 0, 0]``, a list of such, or a dictionary names."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list) or not value:
        return []
    if isinstance(value[0], str):
        return [(value[0], int(value[1]), int(value[2]))]
    return [r for inner in value for r in _references(inner)]


class _Model:
    """Calls a trace layer by layer."""

    def __init__(self, trace: Trace, weights: Mapping[str, Mapping[str, Stored]]) -> None:
        self.trace, self.weights = trace, weights

    @staticmethod
    def last_channels(config: Mapping[str, Any]) -> bool:
        """Whether the channels of images stand last, as the first layer that says so says."""
        todo = list(_layers(config))
        while todo:
            layer = todo.pop(0)
            if layer.get("class_name") in _MODELS:
                todo[:0] = _layers(layer)
                continue
            said = _settings(layer).get("data_format") or {"th": "channels_first", "tf": "channels_last"}.get(
                str(_settings(layer).get("dim_ordering"))
            )
            if said in ("channels_first", "channels_last"):
                return bool(said == "channels_last")
        return True

    def run(self, config: Mapping[str, Any], inputs: Sequence[Any], path: str = "") -> list[Any]:
        """Return what a model makes of its inputs."""
        kind = str(config.get("class_name"))
        layers = _layers(config)
        if kind == "Sequential":
            values = list(inputs)
            for layer in layers:
                made = self._call(layer, values, path)
                values = made if isinstance(made, list) else [made]
            return values
        inner = _settings(config)
        entries = _references(inner.get("input_layers"))
        if len(entries) != len(inputs):
            raise Refused(f"a model of {len(entries)} inputs ({', '.join(e[0] for e in entries)})")
        made_by: dict[tuple[str, int], list[Any]] = {(e[0], e[1]): [v] for e, v in zip(entries, inputs, strict=True)}
        calls = [
            (str(layer.get("name") or _settings(layer).get("name")), i, layer, call)
            for layer in layers
            for i, call in enumerate(layer.get("inbound_nodes") or [])
        ]
        while calls:
            left = []
            for name, i, layer, call in calls:
                if (name, i) in made_by:
                    continue
                arguments = _arguments(call, made_by)
                if arguments is None:
                    left.append((name, i, layer, call))
                    continue
                made = self._call(layer, arguments[0], path, arguments[1])
                made_by[name, i] = made if isinstance(made, list) else [made]
            if len(left) == len(calls):
                raise Refused(f"the layer '{left[0][0]}', whose inputs nothing makes")
            calls = left
        return [made_by[name, i][at] for name, i, at in _references(inner.get("output_layers"))]

    def applied(self, layer: Mapping[str, Any], x: Value) -> Value:
        """Return what a layer that has no weights makes of a tensor."""
        made = self._call(layer, [x], "")
        assert isinstance(made, Value)
        return made

    def _call(self, layer: Mapping[str, Any], arguments: list[Any], path: str, extra: Mapping[str, Any] | None = None) -> Any:
        kind, settings = str(layer.get("class_name")), _settings(layer)
        name = str(settings.get("name") or layer.get("name") or kind)
        if is_foreign(layer):
            own = layer.get("registered_name") or kind
            raise Refused(f"the layer '{name}', of a class of its own ({own}): its code alone says what it computes")
        if called_as_in_training(layer):
            raise Refused(f"the layer '{name}' ({kind}), which is called as in training, whatever the model is used for")
        if kind in _MODELS and "layers" in (layer.get("config") or {}):
            made = self.run(layer, arguments, f"{path}{name}.")
            return made if len(made) > 1 else made[0]
        if kind == "RandomCrop" and not _covers(settings, arguments):
            raise Refused(f"the layer '{name}' (RandomCrop), which versions of Keras do differently outside of training")
        if is_idle(kind):
            return arguments if len(arguments) > 1 else arguments[0]
        handler = _LAYERS.get(kind)
        if handler is None:
            what = "runs code of its own" if kind == "Lambda" else "is a class of its own, or not known here"
            raise Refused(f"the layer '{name}' ({kind}), which {what}")
        self.trace.name = self.trace.source = name
        layer_ = _Layer(self, kind, name, settings, arguments, extra or {})
        try:
            return handler(layer_)
        except Refused as e:
            raise Refused(f"the layer '{name}' ({kind}), which {e}") from e


def _covers(settings: Mapping[str, Any], arguments: Sequence[Any]) -> bool:
    """Whether a crop has the size of the images that it is called with."""
    (x,) = arguments
    last = str(settings.get("data_format") or "channels_last") == "channels_last"
    return isinstance(x, Value) and tuple(x.shape[1:3] if last else x.shape[2:]) == (
        settings.get("height"),
        settings.get("width"),
    )


def _arguments(call: Any, values: Mapping[tuple[str, int], list[Any]]) -> tuple[list[Any], Mapping[str, Any]] | None:
    """Return what a layer is called with, or None where it has not been made yet."""
    try:
        if isinstance(call, Mapping):  # Keras 3
            found: list[Any] = []
            for argument in call.get("args", []):
                for part in argument if isinstance(argument, list) and _has_tensor(argument) else [argument]:
                    found.append(_resolved(part, values))
            kwargs = {k: _resolved(v, values) for k, v in (call.get("kwargs") or {}).items()}
            return found, {k: v for k, v in kwargs.items() if v is not None and k not in ("training", "mask")}
        if call and isinstance(call[0], str):  # Keras 2, a layer of one call
            call = [call]
        extra: dict[str, Any] = {}
        inputs = []
        for reference in call:
            inputs.append(values[reference[0], int(reference[1])][int(reference[2])])
            if len(reference) > 3 and isinstance(reference[3], Mapping):
                extra |= {k: _reference2(v, values) for k, v in reference[3].items()}
        return inputs, extra
    except KeyError:
        return None


def _has_tensor(argument: list[Any]) -> bool:
    return any(isinstance(a, Mapping) and a.get("class_name") == "__keras_tensor__" for a in argument)


def _resolved(argument: Any, values: Mapping[tuple[str, int], list[Any]]) -> Any:
    if isinstance(argument, Mapping) and argument.get("class_name") == "__keras_tensor__":
        name, call, at = argument["config"]["keras_history"]
        return values[str(name), int(call)][int(at)]
    if isinstance(argument, Mapping) and argument.get("class_name") in ("__tensor__", "__numpy__"):
        return torch.tensor(argument["config"]["value"], dtype=torch.float32)
    return argument


def _reference2(argument: Any, values: Mapping[tuple[str, int], list[Any]]) -> Any:
    """Return a tensor that Keras 2 names among the keyword arguments of an operation."""
    if (
        isinstance(argument, list)
        and len(argument) >= 3
        and isinstance(argument[0], str)
        and (argument[0], int(argument[1])) in values
    ):
        return values[argument[0], int(argument[1])][int(argument[2])]
    return argument


class _Layer:
    """One call of a layer."""

    def __init__(
        self, model: _Model, kind: str, name: str, settings: Mapping[str, Any], inputs: list[Any], extra: Mapping[str, Any]
    ) -> None:
        self.model, self.kind, self.name, self.settings, self.inputs, self.extra = model, kind, name, settings, inputs, extra
        self.trace = model.trace

    @property
    def x(self) -> Value:
        """The one input."""
        if len(self.inputs) != 1 or not isinstance(self.inputs[0], Value):
            raise Refused(f"is called with {len(self.inputs)} inputs")
        return self.inputs[0]

    @property
    def last(self) -> bool:
        """Whether channels stand last."""
        said = self.settings.get("data_format") or self.settings.get("dim_ordering") or "channels_last"
        return str(said) in ("channels_last", "tf")

    def get(self, *names: str, default: Any = None) -> Any:
        """Return the first of some settings that is there."""
        for name in names:
            if self.settings.get(name) is not None:
                return self.settings[name]
        return default

    def weight(self, *parts: str, needed: bool = True) -> Tensor | None:
        """Return the first of some weights that is there."""
        stored = self.model.weights.get(self.name, {})
        for part in parts:
            if part in stored:
                return stored[part].read().float()
        if needed:
            raise Refused(f"has no weights ({parts[0]}) in the file")
        return None

    def kernel(self, *parts: str) -> Tensor:
        """Return a kernel."""
        found = self.weight(*parts)
        assert found is not None
        return found

    def first(self, x: Value) -> Value:
        """Return a map with its channels first."""
        return x.move(lambda p: p.permute(0, 3, 1, 2)) if self.last and x.ndim == 4 else x

    def back(self, x: Value) -> Value:
        """Return a map with its channels where the layer has them."""
        return x.move(lambda p: p.permute(0, 2, 3, 1)) if self.last and x.ndim == 4 else x

    def activated(self, x: Value) -> Value:
        """Return what the layer's activation makes of what it computed."""
        value = self.settings.get("activation")
        return activation(self, x, value) if value is not None else x


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _window(layer: _Layer, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Pads:
    """Return the padding of ``same``, which is TensorFlow's: what is odd goes below and to the right."""
    how = str(layer.get("padding", "border_mode", default="valid")).lower()
    if how == "valid":
        return NONE
    if how != "same":
        raise Refused(f"pads by '{how}'")
    spans = [
        max((-(-s // t) - 1) * t + (k - 1) * d + 1 - s, 0) for s, k, t, d in zip(size, kernel, stride, dilation, strict=True)
    ]
    return spans[0] // 2, spans[1] // 2, spans[0] - spans[0] // 2, spans[1] - spans[1] // 2


def _conv(layer: _Layer) -> Value:
    if layer.kind == "Convolution2D" and layer.get("dim_ordering") == "th":
        raise Refused("has kernels of Theano's order")
    kernel_HWIO = layer.kernel("kernel")
    return _convolved(layer, layer.first(layer.x), kernel_HWIO.permute(3, 2, 0, 1), int(layer.get("groups", default=1)))


def _convolved(layer: _Layer, x: Value, weight: Tensor, groups: int) -> Value:
    stride = _pair(layer.get("strides", "subsample", default=1))
    dilation = _pair(layer.get("dilation_rate", "atrous_rate", default=1))
    pads = _window(layer, x.shape[2:], weight.shape[2:], stride, dilation)
    bias = layer.weight("bias") if layer.get("use_bias", "bias", default=True) else None
    return layer.activated(layer.back(layer.trace.conv(x, weight, bias, stride, pads, dilation, groups)))


def _depthwise(layer: _Layer) -> Value:
    kernel = layer.kernel("depthwise_kernel", "kernel")
    h, w, c, m = kernel.shape
    return _convolved(layer, layer.first(layer.x), kernel.permute(2, 3, 0, 1).reshape(c * m, 1, h, w), c)


def _separable(layer: _Layer) -> Value:
    kernel, point = layer.kernel("depthwise_kernel"), layer.kernel("pointwise_kernel")
    h, w, c, m = kernel.shape
    x = layer.first(layer.x)
    stride, dilation = _pair(layer.get("strides", default=1)), _pair(layer.get("dilation_rate", default=1))
    pads = _window(layer, x.shape[2:], (h, w), stride, dilation)
    layer.trace.name = f"{layer.name}.depthwise"
    x = layer.trace.conv(x, kernel.permute(2, 3, 0, 1).reshape(c * m, 1, h, w), None, stride, pads, dilation, c)
    layer.trace.name = f"{layer.name}.pointwise"
    bias = layer.weight("bias") if layer.get("use_bias", default=True) else None
    return layer.activated(layer.back(layer.trace.conv(x, point.permute(3, 2, 0, 1), bias)))


def _dense(layer: _Layer) -> Value:
    bias = layer.weight("bias") if layer.get("use_bias", "bias", default=True) else None
    return layer.activated(layer.trace.linear(layer.x, layer.kernel("kernel").t(), bias))


def _batch_norm(layer: _Layer) -> Value:
    axis = layer.get("axis", default=-1)
    axis = axis[0] if isinstance(axis, list | tuple) else axis
    x = layer.x
    axis = int(axis) % x.ndim
    if axis not in (1, x.ndim - 1) or layer.get("mode", default=0) not in (0, 2):
        raise Refused(f"normalises along dimension {axis}")
    wanted = [
        p
        for p, there in zip(
            _ORDER, (layer.get("scale", default=True), layer.get("center", default=True), True, True), strict=True
        )
        if there
    ]
    stored = layer.model.weights.get(layer.name, {})
    held = [p for p in _ORDER if p in stored]
    if len(held) != len(wanted):
        raise Refused(f"has {len(held)} weights in the file where {len(wanted)} belong")
    values = {w: stored[h].read().float() for w, h in zip(wanted, held, strict=True)}  # Keras 3 numbers them
    tensors = {
        mine: values.get(theirs) for mine, theirs in zip(("weight", "bias", "running_mean", "running_var"), _ORDER, strict=True)
    }
    moved = axis == x.ndim - 1 and x.ndim == 4
    y = x.move(lambda p: p.permute(0, 3, 1, 2)) if moved else x
    made = layer.trace.batch_norm(y, tensors, float(layer.get("epsilon", default=1e-3)))
    return made.move(lambda p: p.permute(0, 2, 3, 1)) if moved else made


def _group_norm(layer: _Layer) -> Value:
    if int(layer.get("axis", default=-1)) % layer.x.ndim != (layer.x.ndim - 1 if layer.last else 1):
        raise Refused("normalises along another dimension than the channels")
    x = layer.first(layer.x)
    groups = int(layer.get("groups", default=32))
    groups = x.shape[1] if groups == -1 else groups
    scale, shift = (
        layer.weight(p, needed=bool(layer.get(s, default=True))) for p, s in (("gamma", "scale"), ("beta", "center"))
    )
    return layer.back(layer.trace.group_norm(x, groups, scale, shift, float(layer.get("epsilon", default=1e-3))))


def activation(layer: _Layer, x: Value, value: Any) -> Value:
    """Return what an activation of Keras makes of a tensor."""
    if isinstance(value, Mapping) and isinstance(value.get("config"), Mapping):  # a layer in the place of a function
        return layer.model.applied(value, x)
    name = activation_of(value)
    trace = layer.trace
    keras3 = (
        "registered_name" in (layer.settings.get("dtype") or {}) if isinstance(layer.settings.get("dtype"), Mapping) else False
    )
    if isinstance(value, Mapping) and str(value.get("registered_name") or "").count(">"):
        raise Refused(f"has an activation of its own ({name})")
    match name:
        case "linear" | "None":
            return x
        case "relu" | "tanh":
            return trace.unary(x, name)
        case "elu":
            return trace.unary(x, "elu", alpha=1.0)
        case "relu6":
            return clamp(trace, x, 0.0, 6.0)
        case "sigmoid":
            return trace.unary(x, "sigmoid", keeps_zero=False)
        case "hard_sigmoid":
            return trace.unary(x, "hard_sigmoid", keeps_zero=False, alpha=1 / 6 if keras3 else 0.2, beta=0.5)
        case "swish" | "silu":
            return trace.unary(x, "silu")
        case "gelu":
            return trace.unary(x, "gelu", tanh=False)
        case "hard_silu" | "hard_swish":
            return trace.unary(x, "hard_swish")
        case "leaky_relu":
            return trace.unary(x, "leaky_relu", slope=0.2)
        case "softmax":
            return trace.softmax(x, -1)
        case "log_softmax":
            return trace.log_softmax(x, -1)
        case _:
            raise Refused(f"has the activation '{name}'")


def _relu(layer: _Layer) -> Value:
    high, threshold = layer.get("max_value"), float(layer.get("threshold", "theta", default=0) or 0)
    slope = float(layer.get("negative_slope", "alpha", default=0) or 0)
    if threshold:
        raise Refused(f"has a threshold of {threshold:g}")
    if slope:
        if high is not None:
            raise Refused("is leaky and bounded")
        return layer.trace.unary(layer.x, "leaky_relu", slope=slope)
    return clamp(layer.trace, layer.x, 0.0, None if high is None else float(high))


def _leaky(layer: _Layer) -> Value:
    return layer.trace.unary(layer.x, "leaky_relu", slope=float(layer.get("negative_slope", "alpha", default=0.3)))


def _elu(layer: _Layer) -> Value:
    return layer.trace.unary(layer.x, "elu", alpha=float(layer.get("alpha", default=1.0)))


def _softmax(layer: _Layer) -> Value:
    return layer.trace.softmax(layer.x, int(layer.get("axis", default=-1)))


def _pool(op: str) -> Callable[[_Layer], Value]:
    def handler(layer: _Layer) -> Value:
        x = layer.first(layer.x)
        kernel = _pair(layer.get("pool_size", default=2))
        stride = _pair(layer.get("strides", default=kernel))
        pads = _window(layer, x.shape[2:], kernel, stride, (1, 1))
        if op == "max":
            return layer.back(layer.trace.max_pool(x, kernel, stride, pads, (1, 1), ceil=False))
        return layer.back(layer.trace.avg_pool(x, kernel, stride, pads, ceil=False, count_include_pad=False))

    return handler


def _global(op: str) -> Callable[[_Layer], Value]:
    def handler(layer: _Layer) -> Value:
        axes = (1, 2) if layer.last else (2, 3)
        return layer.trace.reduce(layer.x, axes, op, keep=bool(layer.get("keepdims", default=False)))

    return handler


def _zero_padding(layer: _Layer) -> Value:
    p = layer.get("padding", default=1)
    if isinstance(p, Mapping):  # Keras 1
        raise Refused("pads by a dictionary")
    (top, bottom), (left, right) = (_pair(v) for v in ((p, p) if isinstance(p, int) else p))
    pairs = [(0, 0), (top, bottom), (left, right), (0, 0)] if layer.last else [(0, 0), (0, 0), (top, bottom), (left, right)]
    return layer.trace.pad(layer.x, pairs)


def _cropping(layer: _Layer) -> Value:
    (top, bottom), (left, right) = (_pair(v) for v in layer.get("cropping"))
    pairs = [(0, 0), (-top, -bottom), (-left, -right), (0, 0)]
    return layer.trace.pad(layer.x, pairs if layer.last else [pairs[0], pairs[3], *pairs[1:3]])


def _flatten(layer: _Layer) -> Value:
    x = layer.x
    if not layer.last and x.ndim == 4:
        x = x.move(lambda p: p.permute(0, 2, 3, 1))  # as Keras does: channels go last first
    return x.move(lambda p: p.reshape(p.shape[0], -1))


def _reshape(layer: _Layer) -> Value:
    target = layer.get("target_shape")
    if target is None:
        raise Refused("is an operation, not a layer")
    shape = [int(n) for n in target]
    return layer.x.move(lambda p: p.reshape(p.shape[0], *shape))


def _permute(layer: _Layer) -> Value:
    return layer.x.move(lambda p: p.permute(0, *(int(d) for d in layer.get("dims"))))


def _operands(layer: _Layer) -> list[Any]:
    extra = [v for k, v in layer.extra.items() if k not in ("name", "data_format")]
    found = []
    for v in [*layer.inputs, *extra]:
        found.append(v if isinstance(v, Value | Tensor) else torch.tensor(v, dtype=torch.float32))
    return found


def _sum(layer: _Layer) -> Any:
    total, *rest = _operands(layer)
    for other in rest:
        total = add(layer.trace, total, other)
    return total


def _product(layer: _Layer) -> Any:
    total, *rest = _operands(layer)
    for other in rest:
        total = mul(layer.trace, total, other)
    return total


def _subtract(layer: _Layer) -> Any:
    a, b = _operands(layer)
    return add(layer.trace, a, mul(layer.trace, b, -1.0) if isinstance(b, Value) else -b)


def _divide(layer: _Layer) -> Any:
    a, b = _operands(layer)
    if not isinstance(b, Tensor):
        raise Refused("divides by a tensor that depends on the images")
    return mul(layer.trace, a, b.double().reciprocal().float())


def _average(layer: _Layer) -> Any:
    return mul(layer.trace, _sum(layer), 1.0 / len(layer.inputs))


def _concatenate(layer: _Layer) -> Value:
    return layer.trace.concat(_operands(layer), int(layer.get("axis", "concat_axis", default=-1)))


def _merge(layer: _Layer) -> Any:
    mode = layer.get("mode", default="sum")
    known = {"sum": _sum, "mul": _product, "ave": _average, "concat": _concatenate}
    if mode not in known:
        raise Refused(f"merges by '{mode}'")
    return known[mode](layer)


def _rescaling(layer: _Layer) -> Value:
    scale, offset = (torch.tensor(layer.get(k, default=d), dtype=torch.float32) for k, d in (("scale", 1.0), ("offset", 0.0)))
    return layer.trace.affine(layer.x, scale, offset)


def _normalization(layer: _Layer) -> Value:
    if layer.get("invert") or layer.get("axis", default=-1) not in (-1, [-1], 3, [3], []):
        raise Refused("normalises along another dimension than the channels")
    mean, variance = layer.get("mean"), layer.get("variance")
    m = torch.tensor(mean, dtype=torch.float32).flatten() if mean is not None else layer.kernel("mean", "gamma").flatten()
    v = (
        torch.tensor(variance, dtype=torch.float32).flatten()
        if variance is not None
        else layer.kernel("variance", "beta").flatten()
    )
    inverse = 1.0 / v.sqrt().clamp_min(1e-7)
    return layer.trace.affine(layer.x, inverse, -m * inverse)


def _upsampling(layer: _Layer) -> Value:
    x = layer.first(layer.x)
    factor, how = _pair(layer.get("size", default=2)), str(layer.get("interpolation", default="nearest"))
    if how not in ("nearest", "bilinear"):
        raise Refused(f"enlarges by '{how}'")
    size = (x.shape[2] * factor[0], x.shape[3] * factor[1])
    return layer.back(layer.trace.resize(x, size, mode=how, align_corners=False))


def _tf_op(layer: _Layer) -> Any:
    """Read an operation of TensorFlow that Keras 2 wraps into a layer."""
    function = str(layer.get("function", default="")).removeprefix("tf.")
    known: Mapping[str, Callable[[_Layer], Any]] = {
        "math.add": _sum,
        "__operators__.add": _sum,
        "nn.bias_add": _sum,
        "math.subtract": _subtract,
        "math.multiply": _product,
        "math.truediv": _divide,
        "math.divide": _divide,
        "nn.relu": lambda one: one.trace.unary(one.x, "relu"),
        "nn.relu6": lambda one: clamp(one.trace, one.x, 0.0, 6.0),
        "nn.silu": lambda one: one.trace.unary(one.x, "silu"),
        "nn.swish": lambda one: one.trace.unary(one.x, "silu"),
    }
    if function not in known:
        raise Refused(f"is TensorFlow's {function}")
    return known[function](layer)


_LAYERS: dict[str, Callable[[_Layer], Any]] = {
    **dict.fromkeys(("Conv2D", "Convolution2D"), _conv),
    "DepthwiseConv2D": _depthwise,
    **dict.fromkeys(("SeparableConv2D", "SeparableConvolution2D"), _separable),
    "Dense": _dense,
    "BatchNormalization": _batch_norm,
    "GroupNormalization": _group_norm,
    "Activation": lambda layer: layer.activated(layer.x),
    "ReLU": _relu,
    "LeakyReLU": _leaky,
    "ELU": _elu,
    "Softmax": _softmax,
    "MaxPooling2D": _pool("max"),
    "AveragePooling2D": _pool("avg"),
    "GlobalAveragePooling2D": _global("global_avg"),
    "GlobalMaxPooling2D": _global("global_max"),
    "ZeroPadding2D": _zero_padding,
    "Cropping2D": _cropping,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Permute": _permute,
    "Add": _sum,
    "Multiply": _product,
    "Subtract": _subtract,
    **dict.fromkeys(("TrueDivide", "Divide"), _divide),
    "Average": _average,
    "Concatenate": _concatenate,
    "Merge": _merge,
    "Rescaling": _rescaling,
    "Normalization": _normalization,
    "UpSampling2D": _upsampling,
    "TFOpLambda": _tf_op,
    "Relu": lambda layer: layer.trace.unary(layer.x, "relu"),
    "Relu6": lambda layer: clamp(layer.trace, layer.x, 0.0, 6.0),
    "Silu": lambda layer: layer.trace.unary(layer.x, "silu"),
    "Sigmoid": lambda layer: layer.trace.unary(layer.x, "sigmoid", keeps_zero=False),
}
