"""What a Keras model computes on its images before the backbone: an affine map of each channel, or nothing that is understood.

Every layer in front is either known to be such a map (``Rescaling``, ``Normalization``, the arithmetic that
``preprocess_input`` of keras.applications leaves in a model), known to do nothing outside of training, or refused by name. The
maps are composed exactly, so any chain of them ends as one mean and one deviation per channel.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from compress import zoo
from compress.checkpoints.base import Stored
from compress.checkpoints.keras_layers import is_idle
from rescompress.core.errors import CheckpointError
from rescompress.core.spec import Preprocessing

_ARITHMETIC: Mapping[str, Callable[[float, float], float]] = {
    "Add": lambda a, b: a + b,
    "Subtract": lambda a, b: a - b,
    "Multiply": lambda a, b: a * b,
    "TrueDivide": lambda a, b: a / b,
    "Divide": lambda a, b: a / b,
}
_TF_ARITHMETIC = {
    "math.add": "Add",
    "__operators__.add": "Add",
    "nn.bias_add": "Add",
    "math.subtract": "Subtract",
    "math.multiply": "Multiply",
    "math.truediv": "TrueDivide",
    "math.divide": "TrueDivide",
}
_CLOSE = 1e-5
_KERAS_EPSILON = 1e-7


@dataclass(frozen=True)
class Affine:
    """Channels of an image: channel i is ``scale[i] * pixel[order[i]] + offset[i]`` of a 0..255 pixel."""

    order: tuple[int, ...]
    scale: tuple[float, ...]
    offset: tuple[float, ...]

    def then(self, scale: tuple[float, ...], offset: tuple[float, ...]) -> Affine:
        """Return this map and then another one."""
        n = len(self.order)
        factor, shift = (values * n if len(values) == 1 else values for values in (scale, offset))
        if not len(factor) == len(shift) == n:
            raise ValueError("another number of channels")
        return Affine(
            self.order,
            tuple(a * b for a, b in zip(self.scale, factor, strict=True)),
            tuple(a * b + c for a, b, c in zip(self.offset, factor, shift, strict=True)),
        )


@dataclass(frozen=True)
class Node:
    """One layer of a Keras configuration: its class, name, settings, and what it is called with."""

    kind: str
    name: str
    settings: Mapping[str, Any]
    inbound: object = None


@dataclass(frozen=True)
class Front:
    """What stands in front of a backbone.

    Attributes:
        affine: What it computes; None where it computes nothing.
        size: Height and width of the images, where the model states them.
        notes: What is worth telling.
    """

    affine: Affine | None
    size: tuple[int, int] | None
    notes: tuple[str, ...]


def refused(node: Node) -> CheckpointError:
    """Return the error for a layer in front of the network that is not understood."""
    return CheckpointError(
        f"computes on its input before the network ({node.kind} '{node.name}')",
        remedy="save the model without it, and state the preprocessing with --preprocess",
    )


def read_front(nodes: list[Node], channels: int, weights: Mapping[str, Mapping[str, Stored]]) -> Front:
    """Return what the layers in front of a backbone compute.

    Args:
        nodes: They, in order.
        channels: Of an image.
        weights: Tensors of layers by name, for ``Normalization``.

    Raises:
        CheckpointError: A layer is not understood, or resizes and crops.
    """
    whole = Affine(tuple(range(channels)), (1.0,) * channels, (0.0,) * channels)
    notes: list[str] = []
    current, size = whole, None
    values: dict[str, Affine] = {}
    touched = False
    for node in nodes:
        size = size or _size(node.settings)
        if node.kind in ("Resizing", "CenterCrop"):
            size = _resized(node, size, notes)
        elif node.kind == "RandomCrop":
            notes.append(f"RandomCrop '{node.name}' is taken to leave images as they are outside of training")
        elif not is_idle(node.kind):
            try:
                current = _applied(node, current, values, weights)
            except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError, OverflowError):
                raise refused(node) from None
            touched = True
        values[node.name] = current
    if len(current.order) != channels:
        raise refused(nodes[-1])
    return Front(current if touched and current != whole else None, size, tuple(notes))


def _size(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    shape = settings.get("batch_shape") or settings.get("batch_input_shape")
    if isinstance(shape, list) and len(shape) == 4 and all(type(n) is int and n > 0 for n in shape[1:3]):
        return shape[1], shape[2]
    return None


def _resized(node: Node, size: tuple[int, int] | None, notes: list[str]) -> tuple[int, int]:
    """Return the size behind a layer that resizes or crops: only one that has nothing to do, or that says the size, passes."""
    wanted = (node.settings.get("height"), node.settings.get("width"))
    if size is not None and wanted == size:
        return size
    whole = not (node.settings.get("crop_to_aspect_ratio") or node.settings.get("pad_to_aspect_ratio"))
    if node.kind == "Resizing" and size is None and whole and all(type(n) is int and n > 0 for n in wanted):
        notes.append(
            f"the model resizes its images itself ({node.name}), to {wanted[0]}x{wanted[1]}: here they are when they are read"
        )
        return int(wanted[0] or 0), int(wanted[1] or 0)
    raise CheckpointError(
        f"{'resizes' if node.kind == 'Resizing' else 'crops'} its input before the network ({node.kind} '{node.name}')",
        remedy="save the model without it, for images of the size that it makes",
    )


def _applied(node: Node, current: Affine, values: Mapping[str, Affine], weights: Mapping[str, Mapping[str, Stored]]) -> Affine:
    """Return the channels behind a layer; raises one of Python's own errors where it is not understood."""
    settings = node.settings
    if node.kind == "Rescaling":
        return current.then(_numbers(settings["scale"]), _numbers(settings.get("offset", 0.0)))
    if node.kind == "Normalization":
        if settings.get("invert") or settings.get("axis") not in (-1, [-1], (-1,), 3, [3], None, []):
            raise ValueError("another axis")
        mean, variance = _statistics(node, weights)
        inverse = tuple(1.0 / max(math.sqrt(v), _KERAS_EPSILON) for v in variance)
        n = max(len(mean), len(inverse))
        mean, inverse = (v * n if len(v) == 1 else v for v in (mean, inverse))
        return current.then(inverse, tuple(-m * f for m, f in zip(mean, inverse, strict=True)))
    if node.kind == "GetItem":
        sources, rest = _arguments(node)
        return _picked(values.get(sources[0], current), rest[0])
    if node.kind == "Stack":
        if settings.get("axis") not in (-1, 3):
            raise ValueError("another axis")
        parts = [values[name] for name in _arguments(node)[0]]
        return Affine(tuple(p.order[0] for p in parts), tuple(p.scale[0] for p in parts), tuple(p.offset[0] for p in parts))
    if node.kind in _ARITHMETIC:
        sources, rest = _arguments(node)
        if len(sources) != 1 or len(rest) != 1:
            raise ValueError("not with a constant")
        return _arithmetic(node.kind, values.get(sources[0], current), _constant(rest[0]))
    if node.kind in ("TFOpLambda", "SlicingOpLambda"):
        return _of_tensorflow(node, current)
    raise ValueError("not understood")


def _arithmetic(kind: str, value: Affine, constant: tuple[float, ...]) -> Affine:
    if kind in ("Add", "Subtract"):
        return value.then((1.0,), tuple(_ARITHMETIC[kind](0.0, c) for c in constant))
    return value.then(tuple(_ARITHMETIC[kind](1.0, c) for c in constant), (0.0,))


def _of_tensorflow(node: Node, current: Affine) -> Affine:
    """Read an operation of TensorFlow's Keras 2: its constants stand beside its input in ``inbound_nodes``."""
    function = str(node.settings.get("function", ""))
    inbound: Any = node.inbound
    (call,) = inbound
    constants = dict(call[3])
    if node.kind == "SlicingOpLambda":
        text = json.dumps(constants.pop("slice_spec"), separators=(",", ":"))
        reversed_last = '"start":null,"stop":null,"step":-1' in text and text.count("step") == 1
        if constants or not reversed_last or not ('"..."' in text or "Ellipsis" in text or "ellipsis" in text):
            raise ValueError("another slice")
        return Affine(current.order[::-1], current.scale[::-1], current.offset[::-1])
    kind = _TF_ARITHMETIC[function.removeprefix("tf.")]
    constants = {k: v for k, v in constants.items() if k not in ("name", "data_format") and v is not None}
    ((_, value),) = constants.items()
    return _arithmetic(kind, current, _numbers(value))


def _arguments(node: Node) -> tuple[list[str], list[object]]:
    """Return the layers that an operation of Keras 3 reads, and its other arguments."""
    inbound: Any = node.inbound
    (call,) = inbound
    if call.get("kwargs"):
        raise ValueError("keyword arguments")
    sources: list[str] = []
    rest: list[object] = []
    arguments = list(call["args"])
    if len(arguments) == 1 and isinstance(arguments[0], list):
        arguments = arguments[0]
    for at, argument in enumerate(arguments):
        if isinstance(argument, Mapping) and argument.get("class_name") == "__keras_tensor__":
            if rest and node.kind in ("Subtract", "TrueDivide", "Divide"):
                raise ValueError("a constant minus, or divided by, the image")
            sources.append(str(argument["config"]["keras_history"][0]))
        elif at > 0 or node.kind in ("Add", "Multiply"):
            rest.append(argument)
        else:
            raise ValueError("no tensor")
    return sources, rest


def _picked(value: Affine, index: object) -> Affine:
    """Return one channel of an image, or its channels in reverse."""
    if not isinstance(index, list) or len(index) < 2 or not isinstance(index[-1], int | Mapping):
        raise ValueError("another slice")
    *front, last = index
    if not all(isinstance(p, Mapping) and (p.get("class_name") == "__ellipsis__" or _is_whole(p)) for p in front):
        raise ValueError("another slice")
    if not any(isinstance(p, Mapping) and p.get("class_name") == "__ellipsis__" for p in front) and len(front) != 3:
        raise ValueError("not of the channels")
    if isinstance(last, int):
        return Affine((value.order[last],), (value.scale[last],), (value.offset[last],))
    if isinstance(last, Mapping) and _slice(last) == (None, None, -1):
        return Affine(value.order[::-1], value.scale[::-1], value.offset[::-1])
    raise ValueError("another slice")


def _slice(part: Mapping[str, Any]) -> tuple[object, object, object] | None:
    config = part.get("config")
    if part.get("class_name") != "__slice__" or not isinstance(config, Mapping):
        return None
    return config.get("start"), config.get("stop"), config.get("step")


def _is_whole(part: Mapping[str, Any]) -> bool:
    return _slice(part) in ((None, None, None), (None, None, 1))


def _constant(argument: object) -> tuple[float, ...]:
    if isinstance(argument, Mapping) and argument.get("class_name") in ("__tensor__", "__numpy__"):
        argument = argument["config"]["value"]
    return _numbers(argument)


def _numbers(value: object) -> tuple[float, ...]:
    """Return one number, or one for each channel; leading axes of one are those of images and pixels."""
    while isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], list | tuple):
        value = value[0]
    found: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if not found or not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in found):
        raise ValueError("no numbers")
    return tuple(float(v) for v in found)


def _statistics(node: Node, weights: Mapping[str, Mapping[str, Stored]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    stated = node.settings.get("mean"), node.settings.get("variance")
    if stated[0] is not None and stated[1] is not None:
        return _numbers(stated[0]), _numbers(stated[1])
    stored = weights.get(node.name, {})
    found = [stored.get(mine) or stored.get(other) for mine, other in (("mean", "gamma"), ("variance", "beta"))]
    if found[0] is None or found[1] is None:
        raise CheckpointError(f"incomplete: the statistics of '{node.name}' are missing", remedy="save the whole model")
    mean, variance = (_numbers(f.read().flatten().tolist()) for f in found if f is not None)
    return mean, variance


def preprocessing_of(affine: Affine, shape: tuple[int, int, int]) -> Preprocessing:
    """Return the preprocessing that prepares images as the model itself does.

    Args:
        affine: What it computes.
        shape: Channels, height, width of the network's input.

    Raises:
        CheckpointError: A channel is read twice, left out, or lost.
    """
    channels = tuple(range(shape[0]))
    if affine.order not in (channels, channels[::-1]) or 0.0 in affine.scale:
        raise CheckpointError(
            f"mixes the channels of its input ({affine.order})", remedy="supported: RGB or BGR, each channel on its own"
        )
    for name in zoo.PREPROCESSING_NAMES:
        known = zoo.preprocessing(name, shape, assumed=False)
        order = channels[::-1] if known.channel_order == "bgr" else channels
        scale = [known.scale / s for s in known.std]
        offset = [-m / s for m, s in zip(known.mean, known.std, strict=True)]
        if order == affine.order and _same(scale, affine.scale) and _same(offset, affine.offset, max(map(abs, offset))):
            return known
    base = zoo.preprocessing("rescale", shape, assumed=False)
    std = tuple(base.scale / a for a in affine.scale)
    mean = tuple(-b * s for b, s in zip(affine.offset, std, strict=True))
    named = "rgb" if affine.order == channels else "bgr"
    return base.model_copy(update={"name": "keras", "mean": mean, "std": std, "channel_order": named})


def _same(a: list[float], b: tuple[float, ...], size: float = 0.0) -> bool:
    return all(abs(x - y) <= _CLOSE * max(abs(x), size) for x, y in zip(a, b, strict=True))
