"""Signed activations behind ReLU, run on a CPU: INT8 placed for TensorRT."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from export.graph import GraphView, label
from export.lint import Issue, TargetFacts

_STILL_POSITIVE = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity")

_COST = {
    "openvino": ("half of their levels are never used", "quantize with --target cpu (profile openvino)"),
    "onnxruntime": (
        "half of their levels are never used, and on x86 CPUs onnxruntime is slow with them (a ResNet-50: 2.9 times the time)",
        "quantize with --target cpu-ort (profile onnxruntime)",
    ),
}


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield one note on OpenVINO or onnxruntime for a graph that rounds what a ReLU made to signed integers.

    Measured on a ResNet-50 and a Xeon with AMX (decision 0035): no difference in time in OpenVINO, 2.9 times the time of
    unsigned activations in onnxruntime.
    """
    if facts.runtime not in _COST:
        return
    signed = [q for q in graph.activation_quantizers() if graph.zero_point(q).dtype == np.int8 and _positive(graph, q.input[0])]
    if signed:
        cost, remedy = _COST[facts.runtime]
        message = f"activations behind ReLU are signed, as TensorRT wants them ({len(signed)} quantizers): {cost}"
        yield Issue("note", label(signed[0]), message, remedy)


def _positive(graph: GraphView, name: str) -> bool:
    """Whether a tensor comes from a ReLU, perhaps through pooling."""
    while (node := graph.made_by(name, *_STILL_POSITIVE)) is not None:
        name = node.input[0]
    return graph.made_by(name, "Relu") is not None
