"""Operators outside the ONNX standard, such as the FakeQuantize of a raw training export."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from export.graph import GraphView, label
from export.lint import Issue, TargetFacts
from export.structure import is_standard

_STANDARD = ("", "ai.onnx")
_KNOWN = {
    "onnxruntime": ("com.microsoft", "com.microsoft.nchwc", "ai.onnx.ml"),
    "openvino": ("org.openvinotoolkit", "com.microsoft"),
}


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield an error per kind of operator that is not ONNX's and not the runtime's own."""
    said: set[tuple[str, str]] = set()
    functions = {(f.domain, f.name) for f in graph.model.functions}
    for node in graph.nodes:
        kind = (node.domain, node.op_type)
        if node.domain not in _STANDARD and facts.tensorrt and is_standard(node):
            continue  # onnxruntime's quantizers, which TensorRT reads as ONNX's
        if kind in said or kind in functions or node.domain in _KNOWN.get(facts.runtime, ()):
            continue
        if node.domain in _STANDARD and onnx.defs.has(node.op_type, max_inclusive_version=max(graph.opset, 1)):
            continue
        said.add(kind)
        count = sum((n.domain, n.op_type) == kind for n in graph.nodes)
        where = f"domain {node.domain}" if node.domain not in _STANDARD else f"opset {graph.opset}"
        remedy = "export with standard operators"
        if "FakeQuantize" in node.op_type or "fake_quant" in node.op_type:
            remedy = "export QuantizeLinear and DequantizeLinear (NNCF: export through rescompress, or convert in OpenVINO)"
        fate = "does not know"
        if facts.tensorrt and node.domain not in _STANDARD and onnx.defs.has(node.op_type):
            fate = f"takes for ONNX's own {node.op_type}"  # its parser reads the type alone, as tensorrt_rtx shows
        yield Issue("error", label(node), f"{count} nodes {node.op_type} of {where}, which {facts.title} {fate}", remedy)
