"""Activation scales that are no scalars: the engine builds, and the convolutions run in float."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from export.graph import DEQUANTIZE, QUANTIZE, GraphView, label
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield an error per activation quantizer whose scale or zero point is no scalar, on TensorRT.

    Matrix products take a vector of scales; of a scale with more dimensions the parser refuses the quantizer.
    """
    if not facts.tensorrt:
        return
    for node in graph.ops(QUANTIZE, DEQUANTIZE):
        if graph.is_weight_pair(node):
            continue
        arrays = [graph.constant(name) for name in node.input[1:3] if name]
        shape = next((a.shape for a in arrays if a is not None and a.ndim), None)
        if shape is None or (len(shape) == 1 and _for_products(graph, node)):
            continue
        written = f"[{', '.join(map(str, shape))}]"
        if len(shape) > 1:
            what = f"scale or zero point has shape {written}, which {facts.title} refuses"
        else:
            silent = "the build gives no warning and convolutions run in float"
            what = f"scale or zero point has shape {written} instead of (); {silent}"
        remedy = "make them scalars (0-D)" if max(shape) == 1 else "quantize activations with one scale per tensor"
        yield Issue("error", label(node), what, remedy)


def _for_products(graph: GraphView, node: NodeProto) -> bool:
    """Whether nothing but matrix products reads what a quantizer hands on."""
    readers = graph.consumers.get(node.output[0], [])
    if node.op_type == QUANTIZE:
        readers = [reader for pair in readers for reader in graph.consumers.get(pair.output[0], [])]
    return bool(readers) and all(reader.op_type in ("Gemm", "MatMul") for reader in readers)
