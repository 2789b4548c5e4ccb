"""Converts a file to an opset that the target reads."""

from __future__ import annotations

import onnx
from onnx import version_converter

from export.graph import GraphView
from export.lint import TargetFacts
from export.passes import PassResult

RULES = ("opset-unreadable",)
EXACT = True


def call(model: onnx.ModelProto, facts: TargetFacts) -> PassResult:
    """Return the model in the newest opset the target reads, or unchanged where ONNX's converter cannot do it."""
    if GraphView(model).opset <= facts.max_opset:
        return PassResult(model, modified=False)
    try:
        converted = version_converter.convert_version(model, facts.max_opset)
    except Exception:  # the converter raises bare RuntimeErrors for what it does not support
        return PassResult(model, modified=False)
    converted.ir_version = onnx.helper.find_min_ir_version_for(list(converted.opset_import))
    return PassResult(converted, modified=True)
