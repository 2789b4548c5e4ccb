"""float16 files on a CPU: how far their values reach, and what they compute where every result is rounded to float16.

onnxruntime and OpenVINO compute float16 files in float32 on most CPUs, so a value beyond 65,504 passes there and is infinite
on a GPU. Here the arithmetic is float32 as well (as the sums of GPUs are), and each result that the file says is float16 is
either measured or rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.parity import Floats, OrtRunner, top1
from rescompress.core.errors import ModelFileError

LARGEST = 65504.0
"""The largest finite float16."""

_KEEPS = frozenset(
    ["Constant", "Flatten", "Gather", "Identity", "MaxPool", "Relu", "Reshape", "Squeeze", "Transpose", "Unsqueeze"]
)
"""Operators whose results are values of their inputs: rounding those again changes nothing."""


@dataclass(frozen=True)
class Overflow:
    """A result that float16 cannot hold.

    Attributes:
        node: The node that computes it.
        op_type: Its operator.
        largest: The largest magnitude that was seen.
    """

    node: str
    op_type: str
    largest: float


@dataclass(frozen=True)
class HalfCheck:
    """What float16 does to a file on some images.

    Attributes:
        images: Which images, in words.
        largest: The largest magnitude of all float16 results.
        overflows: What does not fit, in order of computation.
        finite: Fraction of the images whose outputs are all finite when every result is rounded to float16.
        top1_agreement: Fraction of the images whose class is the same with and without that rounding; images with outputs
            that are not finite count as different.
    """

    images: str
    largest: float
    overflows: tuple[Overflow, ...]
    finite: float
    top1_agreement: float

    @property
    def fits(self) -> bool:
        """Whether nothing was seen that float16 cannot hold."""
        return not self.overflows and self.finite == 1.0

    def document(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {**asdict(self), "overflows": [asdict(o) for o in self.overflows], "fits": self.fits}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> HalfCheck:
        """Return what `document` wrote."""
        known = {k: v for k, v in document.items() if k not in ("overflows", "fits")}
        return cls(overflows=tuple(Overflow(**o) for o in document["overflows"]), **known)

    def words(self) -> str:
        """Return what is wrong, with the layers and their magnitudes."""
        named = ", ".join(f"{o.node} ({o.largest:,.0f})" for o in self.overflows[:5])
        more = f" and {len(self.overflows) - 5} more" if len(self.overflows) > 5 else ""
        what = f"beyond float16's 65,504 on {self.images}: {named}{more}" if named else f"seen on {self.images}"
        return f"{what}; in float16 {100 * self.finite:.2f} % of the images have finite outputs"


def has_float16(model: onnx.ModelProto) -> bool:
    """Whether a file stores, takes or computes float16."""
    half = TensorProto.FLOAT16
    if any(i.data_type == half for i in model.graph.initializer):
        return True
    if any(v.type.tensor_type.elem_type == half for v in (*model.graph.input, *model.graph.output)):
        return True
    return any(a.name == "to" and a.i == half for n in model.graph.node if n.op_type == "Cast" for a in n.attribute)


def check_half(model: onnx.ModelProto, batches: Iterable[Floats], images: str) -> HalfCheck:
    """Return what float16 does to a file.

    Args:
        model: A file with float16 results.
        batches: Preprocessed images, each (N, C, H, W).
        images: What these are, in words.

    Raises:
        ModelFileError: onnxruntime cannot run it.
    """
    wide, rounded = _Runner(*_widened(model, measure=True)), _Runner(*_widened(model, measure=False))
    finite, same = [], []
    for x in batches:
        expected, logits = (runner(x).reshape(len(x), -1) for runner in (wide, rounded))
        finite.append(np.isfinite(logits).all(1))
        same.append(finite[-1] & (top1(expected) == top1(logits)))
    overflows = tuple(
        Overflow(node.name or node.output[0], node.op_type, float(most))
        for node, most in zip(wide.nodes, wide.largest, strict=True)
        if not most <= LARGEST
    )
    most = float(np.max(wide.largest, initial=0.0))
    return HalfCheck(images, most, overflows, float(np.concatenate(finite).mean()), float(np.concatenate(same).mean()))


class _Runner(OrtRunner):
    """Runs a widened model, and keeps the largest magnitudes that it puts out beside its logits.

    Attributes:
        nodes: Of the original model, one per measured result.
        largest: Of each, over all calls.
    """

    def __init__(self, model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
        super().__init__(model, optimize=False)
        self.nodes = nodes
        self._kind = np.float64 if self._session.get_inputs()[0].type == "tensor(double)" else np.float32
        self.largest: NDArray[np.float64] = np.zeros(len(nodes))

    def _run(self, batch_NCHW: NDArray[Any]) -> list[Floats]:
        try:
            logits, *seen = self._session.run(None, {self.input_name: batch_NCHW.astype(self._kind, copy=False)})
        except Exception as e:  # onnxruntime has one class per error code and no common base
            raise ModelFileError(f"onnxruntime cannot run it: {e}", remedy="check it with: rescompress lint") from e
        if seen:
            self.largest = np.maximum(self.largest, np.array([float(s) for s in seen]))
        return [np.asarray(logits, np.float32)]


def _widened(model: onnx.ModelProto, *, measure: bool) -> tuple[onnx.ModelProto, list[onnx.NodeProto]]:
    """Return the model in float32, and the nodes whose results are float16 in the original.

    Args:
        model: It is not changed.
        measure: Put out the largest magnitude of each such result; otherwise round each to float16.
    """
    half, whole = TensorProto.FLOAT16, TensorProto.FLOAT
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    types = _types(wide)
    graph = wide.graph
    del graph.value_info[:]
    del graph.output[1:]
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = whole
    for tensor in graph.initializer:
        _widen(tensor)
    nodes, measured = [], []
    for node in graph.node:
        original = onnx.NodeProto()
        original.CopyFrom(node)
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen(attribute.t)
            if attribute.name in ("to", "output_dtype", "dtype") and attribute.i == half:
                attribute.i = whole
        results = [i for i, name in enumerate(node.output) if types.get(name) == half and node.op_type not in _KEEPS]
        nodes.append(node)
        for i in results:
            name = node.output[i]
            if measure:
                graph_name = f"{name}__largest"
                nodes.append(helper.make_node("Abs", [name], [f"{name}__abs"]))
                nodes.append(helper.make_node("ReduceMax", [f"{name}__abs"], [graph_name], keepdims=0))
                graph.output.append(helper.make_tensor_value_info(graph_name, whole, []))
                measured.append(original)
            else:
                node.output[i] = f"{name}__wide"
                nodes.append(helper.make_node("Cast", [f"{name}__wide"], [f"{name}__half"], to=half))
                nodes.append(helper.make_node("Cast", [f"{name}__half"], [name], to=whole))
    kept = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    return wide, measured


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element type of every tensor whose type can be inferred."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except Exception as e:  # the inference is C++: what it raises has no base of its own
        raise ModelFileError(f"its types contradict each other: {e}", remedy="export it again") from e
    values = (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
    return {v.name: v.type.tensor_type.elem_type for v in values}


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT16:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
