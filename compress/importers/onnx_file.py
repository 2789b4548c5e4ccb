"""ONNX files of any exporter, as calls of a `Trace`.

What depends on no image is computed as ONNX defines it (by onnx's own reference operators), shapes included; so chains that
work out a shape or a padding end as numbers, whatever exporter wrote them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, numpy_helper
from torch import Tensor

from compress.checkpoints.base import Checkpoint, LoadOptions
from compress.importers.aten import add, clamp, mul
from compress.importers.finish import Source, checkpoint_of
from compress.importers.network import Read, read_trace
from compress.importers.proof import Original
from compress.importers.trace import NONE, Pads, Refused, Stack, Trace, Value, broadcast
from compress.importers.trunk import SHARED, Call, Survey
from rescompress.core.errors import CheckpointError

QUANTIZED = (
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger"),
    *("MatMulInteger", "QLinearAdd", "QLinearGlobalAveragePool", "QGemm", "QLinearAveragePool", "DynamicQuantizeMatMul"),
)
CONTROL = frozenset(("If", "Loop", "Scan", "SequenceMap"))
_GROWING = frozenset(("ConstantOfShape", "Expand", "Tile", "Range", "Pad", "Resize", "OneHot", "EyeLike", "Upsample"))
MAX_CONSTANT = 2**24
_WEIGHTED = frozenset(("Conv", "Gemm", "MatMul"))
_MOVING = frozenset(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Slice", "Gather", "Tile"))


class Reader:
    """Calls a `Trace` node by node."""

    def __init__(self, model: onnx.ModelProto, trace: Trace, images: Value, entry: str | None = None) -> None:
        """Take a model whose functions are written out.

        Args:
            model: The model; its nodes stand in order.
            trace: Takes the steps.
            images: What the model's input is.
            entry: Name of that input; where there is one only, that one.
        """
        self.model, self.trace = model, trace
        self.opset = next((int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
        self.stored = {i.name: i for i in model.graph.initializer}
        self.values: dict[str, Any] = {}
        if entry is None:
            (entry,) = [i.name for i in model.graph.input if i.name not in self.stored]
        self.values[entry] = images

    def run(self) -> list[tuple[str, Value]]:
        """Return the outputs by name; raises Refused with the node and the tensors around it."""
        for node in self.model.graph.node:
            try:
                self._node(node)
            except Refused as e:
                raise Refused(f"{label(node)}: {e}") from e
        outputs = []
        for output in self.model.graph.output:
            value = self.get(output.name)
            if not isinstance(value, Value):
                raise Refused(f"output '{output.name}' does not depend on the images")
            outputs.append((output.name, value))
        return outputs

    def survey(self, calls: Sequence[Call]) -> Survey:
        """Return what of the model can be read; what cannot, and what needs it, is left out.

        Args:
            calls: Its nodes.
        """
        graph = self.model.graph
        found = Survey(self.trace, list(calls), [o.name for o in graph.output])
        lost = {i.name for i in graph.input if i.name not in self.stored and i.name not in self.values}
        weights = Counter(node.input[1] for node in graph.node if node.op_type in _WEIGHTED and len(node.input) > 1)
        for node, call in zip(graph.node, calls, strict=True):
            if lost.isdisjoint(call.reads):
                try:
                    if node.op_type in _WEIGHTED and weights[node.input[1]] > 1 and node.input[1] in self.stored:
                        raise Refused(SHARED)
                    self._node(node)
                except Refused as e:
                    found.refused[call.name] = f"{call.name}: {e}"
                except Exception as e:  # an operator that is used in a way that no handler expects is the host's own
                    found.refused[call.name] = f"{call.name}: cannot be read ({type(e).__name__})"
            lost |= {name for name in call.makes if name not in self.values}
        for name, value in self.values.items():
            if isinstance(value, Value):
                found.values[name] = value
            elif not isinstance(value, Stack):
                found.constants.add(name)
        return found

    def get(self, name: str) -> Any:
        """Return what a tensor of the file is; constants as numpy arrays."""
        if not name:
            return None
        if name not in self.values:
            if name not in self.stored:
                raise Refused(f"reads '{name}', which nothing makes")
            self.values[name] = numpy_helper.to_array(self.stored[name])
        return self.values[name]

    def _node(self, node: NodeProto) -> None:
        if node.op_type in QUANTIZED:
            raise Refused("is quantized already: give the float file, `rescompress quantize` does the rest")
        if node.op_type in CONTROL or any(a.type in (a.GRAPH, a.GRAPHS) for a in node.attribute):
            raise Refused("is control flow")
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        inputs = [self.get(name) for name in node.input]
        if node.domain not in ("", "ai.onnx"):
            raise Refused(f"is an operator of '{node.domain}', which is not known here")
        if node.op_type == "Shape" and isinstance(inputs[0], Value | Stack):
            sizes = np.array(inputs[0].shape, dtype=np.int64)
            self.values[node.output[0]] = sizes[attributes.get("start", 0) : attributes.get("end")]
            return
        if node.op_type == "Size" and isinstance(inputs[0], Value):
            self.values[node.output[0]] = np.array(math.prod(inputs[0].shape), dtype=np.int64)
            return
        if not any(isinstance(v, Value | Stack) for v in inputs):
            self._fold(node, inputs, attributes)
            return
        handler = _HANDLERS.get(node.op_type)
        if handler is None:
            raise Refused("is not known here")
        self.trace.name, self.trace.source = self._name(node), node.output[0]
        result = handler(self, _Node(node, inputs, attributes, self.opset))
        results = result if isinstance(result, list) else [result]
        for name, value in zip(node.output, results, strict=False):
            if name:
                self.values[name] = value

    def _fold(self, node: NodeProto, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> None:
        from onnx.reference import ReferenceEvaluator

        if node.op_type in _GROWING:
            claimed = [
                int(np.prod(np.abs(v.astype(float)))) for v in inputs if v is not None and v.dtype.kind == "i" and v.size < 9
            ]
            if any(n > MAX_CONSTANT for n in claimed):
                raise Refused("makes a constant beyond measure")
        try:
            evaluator = ReferenceEvaluator(node, opsets={"": self.opset})
            results = evaluator.run(None, {n: v for n, v in zip(node.input, inputs, strict=True) if n})
        except Exception as e:  # the reference operators raise whatever numpy raises
            raise Refused(f"cannot be computed ({str(e).splitlines()[0][:100] if str(e) else type(e).__name__})") from e
        for name, value in zip(node.output, results, strict=False):
            self.values[name] = np.asarray(value)

    def _name(self, node: NodeProto) -> str:
        for name in node.input[1:]:
            if name in self.stored and re.search(r"[./](weight|gamma|kernel|W|w_0|scale)$", name):
                return re.split(r"[./](?=[^./]*$)", name)[0].strip("/").replace("/", ".")
        return readable(node.output[0])


def readable(name: str) -> str:
    """Return a tensor's name as a path of modules: ``/layer1/layer1.0/conv1/Conv_output_0`` is ``layer1.0.conv1``."""
    match = re.fullmatch(r"/(.+)/([A-Za-z]+)(_\d+)?_output_\d+", name)
    if not match:
        return re.sub(r"[/:]+", ".", name).strip(".")
    parts: list[str] = []
    for part in match[1].split("/"):
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(part)
    return ".".join(parts)


def label(node: NodeProto) -> str:
    """Return a node, and the tensors around it, for people."""
    named = f" '{node.name}'" if node.name else ""
    return f"{node.op_type}{named} (reads {', '.join(repr(n) for n in node.input[:3])}, makes '{node.output[0]}')"


class _Node:
    """A node's inputs and attributes, wherever its opset has them."""

    def __init__(self, node: NodeProto, inputs: list[Any], attributes: Mapping[str, Any], opset: int) -> None:
        self.node, self.inputs, self.attributes, self.opset = node, inputs, attributes, opset

    @property
    def x(self) -> Value:
        """The first input, which has to depend on the images."""
        if not isinstance(self.inputs[0], Value):
            raise Refused("reads its images at an unexpected place")
        return self.inputs[0]

    def text(self, name: str, default: str) -> str:
        """Return an attribute that is text."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else str(value)

    def constant(self, at: int) -> Tensor | None:
        """Return an input that must not depend on the images, as a tensor."""
        value = self.inputs[at] if at < len(self.inputs) else None
        if value is None:
            return None
        if isinstance(value, Value):
            raise Refused(f"computes its input '{self.node.input[at]}' from the images")
        return torch.from_numpy(np.array(value))

    def numbers(self, name: str, at: int | None = None) -> list[int] | None:
        """Return integers that older opsets have as an attribute and newer ones as an input."""
        if name in self.attributes:
            value = self.attributes[name]
            return [int(v) for v in value] if isinstance(value, Sequence) else [int(value)]
        if at is not None and (found := self.constant(at)) is not None:
            return [int(v) for v in found.flatten()]
        return None

    def number(self, name: str, at: int | None = None) -> float | None:
        """Return a number, likewise."""
        if name in self.attributes:
            return float(self.attributes[name])
        if at is not None and (found := self.constant(at)) is not None and found.numel():
            return float(found.flatten()[0])
        return None


def _torch(value: Any) -> Any:
    return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value


def _window(n: _Node, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Pads:
    """Return the padding of a convolution or pool."""
    auto = n.text("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        pads = n.numbers("pads") or [0, 0, 0, 0]
        if len(pads) == 2:
            return 0, pads[0], 0, pads[1]
        return pads[0], pads[1], pads[2], pads[3]
    if auto == "VALID":
        return NONE
    spans = [
        max((-(-s // t) - 1) * t + (k - 1) * d + 1 - s, 0) for s, k, t, d in zip(size, kernel, stride, dilation, strict=True)
    ]
    less, more = [v // 2 for v in spans], [v - v // 2 for v in spans]
    first, last = (less, more) if auto == "SAME_UPPER" else (more, less)
    return first[0], first[1], last[0], last[1]


def _conv(r: Reader, n: _Node) -> Value:
    weight, bias = n.constant(1), n.constant(2)
    if weight is None:
        raise Refused("has no weight")
    if weight.ndim == 3:
        pads = n.numbers("pads") or [0, 0]
        if (n.numbers("strides") or [1]) != [1] or (n.numbers("dilations") or [1]) != [1] or pads[0] != pads[1]:
            raise Refused("is a one-dimensional convolution")
        return r.trace.conv1d(n.x, weight, bias, pads[0])
    if weight.ndim != 4 or n.x.ndim != 4:
        raise Refused(f"is a convolution of {weight.ndim - 2} dimensions")
    stride, dilation = n.numbers("strides") or [1, 1], n.numbers("dilations") or [1, 1]
    pads4 = _window(n, n.x.shape[2:], weight.shape[2:], stride, dilation)
    return r.trace.conv(n.x, weight, bias, stride, pads4, dilation, int(n.attributes.get("group", 1)))


def _batch_norm(r: Reader, n: _Node) -> Value:
    if n.attributes.get("training_mode", 0) or (n.opset < 7 and not n.attributes.get("is_test", 0)):
        raise Refused("normalises with the statistics of its batch: export the model in evaluation mode")
    if n.attributes.get("spatial", 1) == 0:
        raise Refused("normalises each pixel on its own")
    tensors = dict(zip(("weight", "bias", "running_mean", "running_var"), (n.constant(i) for i in range(1, 5)), strict=True))
    return r.trace.batch_norm(n.x, tensors, float(n.attributes.get("epsilon", 1e-5)))


def _group_norm(r: Reader, n: _Node) -> Value:
    groups, scale, shift = int(n.attributes["num_groups"]), n.constant(1), n.constant(2)
    c = n.x.shape[1]
    if scale is None or shift is None:
        raise Refused("has no scale")
    if scale.numel() != c:  # before opset 21: one per group
        scale, shift = (t.repeat_interleave(c // groups) for t in (scale, shift))
    return r.trace.group_norm(n.x, groups, scale, shift, float(n.attributes.get("epsilon", 1e-5)))


def _instance_norm(r: Reader, n: _Node) -> Value:
    """Read the normalisation of each image's channels; over groups of channels put into rows that is a GroupNorm."""
    scale, shift, x = n.constant(1), n.constant(2), n.x
    if scale is None or shift is None or not x.step.is_map or x.ndim not in (3, 4):
        raise Refused("normalises each image by its own statistics")
    shape, groups = x.shape, x.shape[1]
    c, h, w = x.step.shape
    if math.prod(shape) != r.trace.batch * c * h * w:
        raise Refused("normalises a part of a map by its own statistics")
    natural = x.move(lambda p: p.reshape(r.trace.batch, c, h, w))
    made = r.trace.group_norm(natural, groups, None, None, float(n.attributes.get("epsilon", 1e-5)))
    made = r.trace.affine(made, *(t.repeat_interleave(c // groups).reshape(1, c, 1, 1) for t in (scale, shift)))
    return made.move(lambda p: p.reshape(shape))


def _unary(op: str, *, keeps_zero: bool = True) -> Callable[[Reader, _Node], Value]:
    return lambda r, n: r.trace.unary(n.x, op, keeps_zero=keeps_zero)


def _leaky(r: Reader, n: _Node) -> Value:
    return r.trace.unary(n.x, "leaky_relu", slope=float(n.attributes.get("alpha", 0.01)))


def _prelu(r: Reader, n: _Node) -> Value:
    slope = n.constant(1)
    assert slope is not None
    return r.trace.prelu(n.x, slope)


def _hard_sigmoid(r: Reader, n: _Node) -> Value:
    alpha, beta = float(n.attributes.get("alpha", 0.2)), float(n.attributes.get("beta", 0.5))
    alpha = 1 / 6 if abs(alpha - 1 / 6) < 1e-6 else alpha
    return r.trace.unary(n.x, "hard_sigmoid", keeps_zero=beta == 0, alpha=alpha, beta=beta)


def _clip(r: Reader, n: _Node) -> Value:
    low, high = n.number("min", 1), n.number("max", 2)
    huge = float(np.finfo(np.float32).max)
    return clamp(r.trace, n.x, None if low is None or low <= -huge else low, None if high is None or high >= huge else high)


def _sum(r: Reader, n: _Node) -> Any:
    total = _torch(n.inputs[0])
    for other in n.inputs[1:]:
        total = add(r.trace, total, _torch(other))
    return total


def _sub(r: Reader, n: _Node) -> Any:
    a, b = map(_torch, n.inputs)
    return add(r.trace, a, mul(r.trace, b, -1.0) if isinstance(b, Value) else -b)


def _mul(r: Reader, n: _Node) -> Any:
    return mul(r.trace, _torch(n.inputs[0]), _torch(n.inputs[1]))


def _div(r: Reader, n: _Node) -> Any:
    divisor = n.constant(1)
    assert divisor is not None
    return mul(r.trace, n.inputs[0], divisor.double().reciprocal().float())


def _max_pool(r: Reader, n: _Node) -> Any:
    kernel = n.numbers("kernel_shape") or []
    if len(kernel) != 2:
        raise Refused(f"pools {len(kernel)} dimensions")
    stride, dilation = n.numbers("strides") or [1, 1], n.numbers("dilations") or [1, 1]
    pads = _window(n, n.x.shape[2:], kernel, stride, dilation)
    return [r.trace.max_pool(n.x, kernel, stride, pads, dilation, ceil=bool(n.attributes.get("ceil_mode", 0)))]


def _avg_pool(r: Reader, n: _Node) -> Value:
    kernel = n.numbers("kernel_shape") or []
    if len(kernel) != 2 or (n.numbers("dilations") or [1, 1]) != [1, 1]:
        raise Refused("pools otherwise than over height and width")
    stride = n.numbers("strides") or [1, 1]
    pads = _window(n, n.x.shape[2:], kernel, stride, (1, 1))
    return r.trace.avg_pool(
        n.x, kernel, stride, pads, ceil=bool(n.attributes.get("ceil_mode", 0)),
        count_include_pad=bool(n.attributes.get("count_include_pad", 0)),
    )  # fmt: skip


def _global(op: str) -> Callable[[Reader, _Node], Value]:
    return lambda r, n: r.trace.reduce(n.x, range(2, n.x.ndim), op, keep=True)


def _reduce(op: str) -> Callable[[Reader, _Node], Value]:
    def handler(r: Reader, n: _Node) -> Value:
        axes = n.numbers("axes", 1)
        x = n.inputs[0] if isinstance(n.inputs[0], Stack) else n.x
        return r.trace.reduce(x, axes or range(x.ndim), op, keep=bool(n.attributes.get("keepdims", 1)))

    return handler


def _gemm(r: Reader, n: _Node) -> Value:
    matrix = n.constant(1)
    if matrix is None or n.attributes.get("transA", 0) or n.x.ndim != 2:
        raise Refused("multiplies two tensors that depend on the images, or a transposed one")
    matrix = matrix if n.attributes.get("transB", 0) else matrix.t()
    bias = n.constant(2)
    alpha, beta = float(n.attributes.get("alpha", 1.0)), float(n.attributes.get("beta", 1.0))
    o = matrix.shape[0]
    return r.trace.linear(
        n.x, matrix if alpha == 1 else alpha * matrix, None if bias is None else beta * bias.flatten().expand(o)
    )


def _matmul(r: Reader, n: _Node) -> Value:
    matrix = n.constant(1)
    if matrix is None or matrix.ndim != 2:
        raise Refused("multiplies two tensors that depend on the images")
    return r.trace.linear(n.x, matrix.t(), None)


def _pad(r: Reader, n: _Node) -> Value:
    flat, value, axes = n.numbers("pads", 1) or n.numbers("paddings") or [], n.number("value", 2), n.numbers("axes", 3)
    half = len(flat) // 2
    pairs = [(0, 0)] * n.x.ndim
    for at, axis in enumerate(axes or range(half)):
        pairs[axis] = (flat[at], flat[at + half])
    mode = n.text("mode", "constant")
    if mode not in ("constant", "reflect", "edge"):
        raise Refused(f"pads by {mode}")
    if value is not None and value < -1e37 and mode == "constant" and n.x.ndim == 4:
        return r.trace.max_pool(n.x, (1, 1), (1, 1), (pairs[2][0], pairs[3][0], pairs[2][1], pairs[3][1]), (1, 1), ceil=False)
    if value:
        raise Refused(f"pads with {value:g}")
    return r.trace.pad(n.x, pairs, "zeros" if mode == "constant" else mode)


def _concat(r: Reader, n: _Node) -> Value | Stack:
    parts = n.inputs
    axis = int(n.attributes.get("axis", 1))
    if all(isinstance(p, Value) and p.ndim == 5 and p.shape[axis] == 1 for p in parts):  # how exporters write a stack of maps
        axis %= 5
        return Stack(tuple(p.move(lambda places: places.squeeze(axis)) for p in parts), axis)
    return r.trace.concat([_torch(v) for v in parts], axis)


def _moved(r: Reader, n: _Node) -> Any:
    """Move the places of the numbers; the operators are torch's, with ONNX's arguments."""
    x = n.x
    match n.node.op_type:
        case "Reshape":
            wanted = n.numbers("shape", 1) or []
            sizes = [x.shape[i] if s == 0 and not n.attributes.get("allowzero", 0) else s for i, s in enumerate(wanted)]
            if sizes.count(-1) > 1 or (-1 not in sizes and math.prod(sizes) != math.prod(x.shape)):
                raise Refused(f"reshapes {x.shape} to {wanted}")
            return x.move(lambda p: p.reshape(sizes))
        case "Flatten":
            axis = int(n.attributes.get("axis", 1)) % (x.ndim + 1)
            return x.move(lambda p: p.reshape(math.prod(x.shape[:axis]), -1))
        case "Squeeze":
            axes = n.numbers("axes", 1)
            dims = [i for i, s in enumerate(x.shape) if s == 1 and i > 0] if axes is None else [a % x.ndim for a in axes]
            return x.move(lambda p: p.reshape([s for i, s in enumerate(p.shape) if i not in dims]))
        case "Unsqueeze":
            axes = n.numbers("axes", 1) or []
            rank = x.ndim + len(axes)
            rest = iter(x.shape)
            shape = [1 if i in {a % rank for a in axes} else next(rest) for i in range(rank)]
            return x.move(lambda p: p.reshape(shape))
        case "Transpose":
            perm = n.numbers("perm") or list(range(x.ndim))[::-1]
            return x.move(lambda p: p.permute(perm))
        case "Expand":
            spread = broadcast(x.shape, n.numbers("shape", 1) or ())
            return x.move(lambda p: p.expand(spread))
        case "Tile":
            return x.move(lambda p: p.repeat(n.numbers("repeats", 1) or []))
        case "Gather":
            axis, index = int(n.attributes.get("axis", 0)) % x.ndim, n.constant(1)
            assert index is not None
            chosen = (index % x.shape[axis]).long()
            if chosen.ndim == 0:
                return x.move(lambda p: p.select(axis, int(chosen)))
            return x.move(lambda p: p.index_select(axis, chosen.flatten()))
        case _:
            starts, ends = n.numbers("starts", 1) or [], n.numbers("ends", 2) or []
            axes, steps = n.numbers("axes", 3) or list(range(len(starts))), n.numbers("steps", 4) or [1] * len(starts)
            return x.move(lambda p: _sliced(p, starts, ends, axes, steps))


def _sliced(places: Tensor, starts: list[int], ends: list[int], axes: list[int], steps: list[int]) -> Tensor:
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = places.shape[axis]
        chosen = range(size)[slice(start, None if step < 0 and end < -size else end, step)]
        places = places.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64))
    return places


def _split(r: Reader, n: _Node) -> list[Value]:
    axis = int(n.attributes.get("axis", 0)) % n.x.ndim
    sizes = n.numbers("split", 1)
    if sizes is None:
        parts = len(n.node.output)
        size = -(-n.x.shape[axis] // parts)
        sizes = [min(size, n.x.shape[axis] - i * size) for i in range(parts)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [n.x.move(lambda p, a=a, s=s: p.narrow(axis, a, s)) for a, s in zip(starts, sizes, strict=True)]  # type: ignore[misc]


def _softmax(r: Reader, n: _Node) -> Value:
    compute = r.trace.softmax if n.node.op_type == "Softmax" else r.trace.log_softmax
    if n.opset >= 13:
        return compute(n.x, int(n.attributes.get("axis", -1)))
    axis = int(n.attributes.get("axis", 1)) % n.x.ndim
    shape = n.x.shape
    flat = n.x.move(lambda p: p.reshape(math.prod(shape[:axis]), -1))
    return compute(flat, 1).move(lambda p: p.reshape(shape))


def _same(r: Reader, n: _Node) -> list[Any]:
    return [n.inputs[0]]


def _dropout(r: Reader, n: _Node) -> list[Any]:
    training = n.constant(2)
    if training is not None and bool(training.any()):
        raise Refused("drops features outside of training: export the model in evaluation mode")
    return [n.inputs[0]]


def _cast(r: Reader, n: _Node) -> Value:
    if int(n.attributes["to"]) not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE):
        raise Refused("makes integers of its images")
    return n.x


def _gelu(r: Reader, n: _Node) -> Value:
    return r.trace.unary(n.x, "gelu", tanh=n.text("approximate", "none") == "tanh")


def _resize(r: Reader, n: _Node) -> Value:
    x = n.x
    sizes, scales = (n.constant(3), n.constant(2)) if n.node.op_type == "Resize" and n.opset > 10 else (None, n.constant(1))
    if sizes is not None and sizes.numel():
        wanted = [int(v) for v in sizes.flatten()]
    else:
        factors = scales.flatten().tolist() if scales is not None else n.attributes.get("scales")
        if factors is None or len(factors) != x.ndim:
            raise Refused("resizes to an unknown size")
        wanted = [math.floor(s * f) for s, f in zip(x.shape, factors, strict=True)]
    mode = n.text("mode", "nearest")
    how = n.text("coordinate_transformation_mode", "half_pixel" if n.opset > 10 else "asymmetric")
    if tuple(wanted) == x.shape:
        return x
    fine = (mode == "nearest" and how == "asymmetric" and n.text("nearest_mode", "round_prefer_floor") == "floor") or (
        mode == "linear" and how in ("half_pixel", "pytorch_half_pixel", "align_corners")
    )
    if tuple(wanted[:2]) != x.shape[:2] or not fine:
        raise Refused(f"resizes by {mode}, {how}")
    name = "nearest" if mode == "nearest" else "bilinear"
    return r.trace.resize(x, (wanted[2], wanted[3]), mode=name, align_corners=how == "align_corners")


_HANDLERS: dict[str, Callable[[Reader, _Node], Any]] = {
    "Conv": _conv,
    "BatchNormalization": _batch_norm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "Relu": _unary("relu"),
    "Sigmoid": _unary("sigmoid", keeps_zero=False),
    "HardSwish": _unary("hard_swish"),
    "Tanh": _unary("tanh"),
    "Erf": _unary("erf"),
    "Mish": _unary("mish"),
    "Gelu": _gelu,
    "LeakyRelu": _leaky,
    "Elu": lambda r, n: r.trace.unary(n.x, "elu", alpha=float(n.attributes.get("alpha", 1.0))),
    "PRelu": _prelu,
    "HardSigmoid": _hard_sigmoid,
    "Clip": _clip,
    **dict.fromkeys(("Add", "Sum"), _sum),
    "Sub": _sub,
    "Mul": _mul,
    "Div": _div,
    "MaxPool": _max_pool,
    "AveragePool": _avg_pool,
    "GlobalAveragePool": _global("global_avg"),
    "GlobalMaxPool": _global("global_max"),
    "ReduceMean": _reduce("global_avg"),
    "ReduceMax": _reduce("global_max"),
    "ReduceSum": _reduce("sum"),
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Pad": _pad,
    "Concat": _concat,
    **dict.fromkeys(_MOVING, _moved),
    "Split": _split,
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    "Identity": _same,
    "Dropout": _dropout,
    "Cast": _cast,
    **dict.fromkeys(("Resize", "Upsample"), _resize),
}


def load_onnx_file(path: Path, options: LoadOptions, images: Tensor | None = None) -> Checkpoint:
    """Return the network of an ONNX file, proven against onnxruntime.

    Args:
        path: The file; weights beside it count.
        options: What the user states.
        images: Prepared images to compare outputs on, beside random numbers.

    Raises:
        CheckpointError: It has no input of images, computes something that is no operation of a network here (it is named), or
            onnxruntime computes something else.
        ModelFileError: It is damaged, or its data are missing.
    """
    from export.load import load_onnx
    from export.metadata import read_metadata

    model = load_onnx(path)
    own = read_metadata(model)
    try:
        _check_float(model)
        read, batch, last = read_onnx(model, options, own.spec.arch if own is not None else path.stem)
    except Refused as e:
        raise CheckpointError(f"computes something that is not known here: {e}", where=str(path), remedy=REMEDY) from e
    except CheckpointError as e:
        raise CheckpointError(e.what, where=str(path), remedy=e.remedy) from e
    notes = [f"written by {model.producer_name} {model.producer_version}".strip()] if model.producer_name else []
    if last:
        notes.append("the file wants its channels last; here they are first")
    arch = own.spec.arch if own is not None else path.stem
    source = Source(
        "onnx", path.name, arch, "onnx", tuple(notes),
        preprocessing=own.spec.preprocessing if own is not None else None, labels=own.spec.labels if own is not None else None,
    )  # fmt: skip
    return checkpoint_of(read, Runtime(model, batch, last, path).original(), options, source, images=images)


REMEDY = "docs/bring-your-own.md lists the operations; cut the part away, or name a trunk that ends before it"


def _check_float(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type in QUANTIZED:
            raise CheckpointError(
                f"is quantized already ({label(node)})", remedy="give the float file: `rescompress quantize` does the rest"
            )


def read_onnx(model: onnx.ModelProto, options: LoadOptions, arch: str) -> tuple[Read, int | None, bool]:
    """Return the network of a model, how many images it takes at once (None: any number), and whether its channels stand last.

    Raises:
        Refused: It computes something that is not known here.
        CheckpointError: Its input is not images of a known size.
    """
    stored = {i.name for i in model.graph.initializer}
    entries = [i for i in model.graph.input if i.name not in stored]
    if len(entries) != 1:
        raise CheckpointError(
            f"has {len(entries)} inputs: {', '.join(i.name for i in entries[:4])}", remedy="supported: one, of images"
        )
    (entry,) = entries
    kind = entry.type.tensor_type.elem_type
    if kind != onnx.TensorProto.FLOAT:
        raise CheckpointError(
            f"its input '{entry.name}' is {onnx.TensorProto.DataType.Name(kind).lower()}, not float",
            remedy="export it in float32",
        )
    dims = sizes_of(entry)
    if len(dims) != 4:
        raise CheckpointError(
            f"its input '{entry.name}' has {len(dims)} dimensions", remedy="supported: a batch of images, four"
        )
    refusal: Refused | None = None
    for last in (False, True) if channels_first(dims, options) else (True, False):
        shape = image_shape(dims, options, entry.name, last=last)
        if shape is None:
            continue
        for batch in (dims[0],) if dims[0] else (2, 1):
            trace = Trace(shape, batch, entry.name)
            images = trace.input().move(lambda p: p.permute(0, 2, 3, 1)) if last else trace.input()
            try:
                outputs = Reader(model, trace, images).run()
                return read_trace(trace, outputs, arch=options.arch.get("arch", arch)), dims[0], last
            except Refused as e:
                refusal = refusal or e
    assert refusal is not None
    raise refusal


def sizes_of(entry: onnx.ValueInfoProto) -> list[int | None]:
    """Return the sizes of an input; None where one is open."""
    return [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in entry.type.tensor_type.shape.dim]


def channels_first(dims: Sequence[int | None], options: LoadOptions) -> bool:
    """Whether an input of these sizes likely has its channels in front of height and width."""
    c, h, w, last = dims[1], dims[2], dims[3], dims[3]
    if options.input_shape is not None and options.input_shape[0] in (c, last) and c != last:
        return options.input_shape[0] == c
    if last is not None and last <= 4 and (c is None or c > 4):
        return False
    return not (c is not None and c == h != w)


def image_shape(dims: Sequence[int | None], options: LoadOptions, name: str, *, last: bool) -> tuple[int, int, int] | None:
    """Return channels, height and width of the images; None where the file has others than stated."""
    found = [dims[3], dims[1], dims[2]] if last else [dims[1], dims[2], dims[3]]
    if options.input_shape is not None:
        if any(d is not None and d != s for d, s in zip(found, options.input_shape, strict=True)):
            if last != channels_first(dims, options):  # the likelier reading
                raise CheckpointError(
                    f"its input '{name}' is fixed to {'x'.join(map(str, (d or '?' for d in found)))}, "
                    f"not {'x'.join(map(str, options.input_shape))}",
                    remedy="leave --input out, or export it for that size",
                )
            return None
        return options.input_shape
    if any(d is None for d in found):
        raise CheckpointError(f"the size of its input '{name}' is open", remedy="state it with --input CxHxW")
    c, h, w = (d or 0 for d in found)
    return c, h, w


class Runtime:
    """onnxruntime, for the proof."""

    def __init__(self, model: onnx.ModelProto, batch: int | None, last: bool, path: Path | None = None) -> None:
        self._model, self._path, self._batch, self._last = model, path, batch, last
        stored = {i.name for i in model.graph.initializer}
        self._input = next(i.name for i in model.graph.input if i.name not in stored)
        self._session: Any = None

    def original(self) -> Original:
        """Return it as what a network is compared with."""
        return Original("the file in onnxruntime", self.run, self.observe)

    def run(self, x_NCHW: Tensor) -> list[Tensor]:
        """Return the outputs for images."""
        if self._session is None:
            try:
                self._session = self._open(self._path or self._model)  # it reads a file sooner than what is written for it
            except CheckpointError:
                self._session = self._open(self._model)  # sorted, its functions written out
        return self._outputs(self._session, x_NCHW)

    def _open(self, model: onnx.ModelProto | Path) -> Any:
        from export.session import open_session

        try:
            return open_session(model, level="off")
        except Exception as e:  # onnxruntime has a class per error and no base of its own
            text = str(e).splitlines()[0][:200]
            raise CheckpointError(f"onnxruntime cannot open it: {text}", remedy="export it again") from e

    def _outputs(self, session: Any, x_NCHW: Tensor) -> list[Tensor]:
        """Return the outputs for images, in batches of the size that the file takes."""
        x = x_NCHW.permute(0, 2, 3, 1) if self._last else x_NCHW
        size = self._batch or len(x)
        found: list[list[Tensor]] = []
        for i in range(0, len(x), size):
            part = x[i : i + size]
            if len(part) < size:
                part = torch.cat([part, part[:1].expand(size - len(part), *part.shape[1:])])
            try:
                values = session.run(None, {self._input: part.contiguous().numpy()})
            except Exception as e:  # likewise
                if self._batch is None and size > 1:  # the file says that any number goes, and takes one
                    self._batch = 1
                    return self._outputs(session, x_NCHW)
                raise CheckpointError(
                    f"onnxruntime cannot run it: {str(e).splitlines()[0][:200]}", remedy="export it again"
                ) from e
            found.append([torch.from_numpy(np.array(v)).reshape(size, -1) for v in values])
        return [torch.cat(parts)[: len(x)] for parts in zip(*found, strict=True)]

    def observe(self, x_NCHW: Tensor) -> dict[str, Tensor]:
        """Return every tensor of the file for one image."""
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        names = [name for node in model.graph.node for name in node.output if name]
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        x = x_NCHW.permute(0, 2, 3, 1) if self._last else x_NCHW
        size = self._batch or 1
        values = self._open(model).run(None, {self._input: x.expand(size, -1, -1, -1).contiguous().numpy()})
        return {n: torch.from_numpy(np.array(v))[:1] for n, v in zip(names, values, strict=True) if np.ndim(v) > 1}
