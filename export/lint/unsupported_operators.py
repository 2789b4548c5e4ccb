"""ONNX's own operators, or settings of them, that TensorRT does not have."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from export.graph import GraphView, attribute, label
from export.lint import Issue, TargetFacts

_MISSING = frozenset(
    {
        "AffineGrid", "Bernoulli", "BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor",
        "CenterCropPad", "Col2Im", "Compress", "ConcatFromSequence", "CumProd", "DFT", "DeformConv", "Det",
        "ImageDecoder", "MaxRoiPool", "MaxUnpool", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss",
        "Optional", "OptionalGetElement", "OptionalHasElement", "RegexFullMatch", "SequenceAt", "SequenceConstruct",
        "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap",
        "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat", "StringNormalizer", "StringSplit", "SwiGLU",
        "TfIdfVectorizer", "Unique",
    }
)  # fmt: skip
"""What ``OnnxParser.supports_operator`` of TensorRT for RTX 1.7.1 denies, but for integer operators (`qoperator_format`)."""
_PLUGINS = frozenset({"NonZero", "RoiAlign"})
"""Operators that the parser leaves to plugins, which TensorRT for RTX does not have."""


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield an error per kind of operator that TensorRT refuses, and per node with a setting that it refuses."""
    if not facts.tensorrt:
        return
    missing = _MISSING | _PLUGINS if facts.runtime == "tensorrt_rtx" else _MISSING
    for kind in sorted(missing):
        nodes = list(graph.ops(kind))
        if nodes:
            yield Issue(
                "error", label(nodes[0]), f"{len(nodes)} nodes {kind}: {facts.title} has none", "build it from other operators"
            )
    for node in graph.nodes:
        setting = _setting(node)
        if setting is not None and next(graph.ops(node.op_type), None) is not None:
            yield Issue("error", label(node), f"{setting}, which {facts.title} refuses", "export it another way")


def _setting(node: NodeProto) -> str | None:
    """Return the setting of a node that TensorRT does not have, or None."""
    if node.op_type == "MaxPool":
        if any(node.output[1:]):
            return "MaxPool hands out the places of the largest values"
        if any(d != 1 for d in attribute(node, "dilations", [])):
            return "MaxPool has dilations"
    if node.op_type == "Resize":
        if attribute(node, "coordinate_transformation_mode", b"") == b"tf_crop_and_resize":
            return "Resize cuts out a region (tf_crop_and_resize)"
        if attribute(node, "antialias", 0):
            return "Resize has antialias"
    return None
