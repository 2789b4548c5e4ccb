"""Fixes an open batch to one image."""

from __future__ import annotations

import onnx

from export.lint import TargetFacts
from export.passes import PassResult

RULES = ("dynamic-shape",)
EXACT = True


def call(model: onnx.ModelProto, facts: TargetFacts) -> PassResult:
    """Return a copy whose inputs and outputs have a batch of 1 where it was open; other open dimensions stay."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    stored = {i.name for i in copy.graph.initializer}
    changed = False
    for value in (*copy.graph.input, *copy.graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.name not in stored and len(dims) and not dims[0].dim_value:
            dims[0].dim_value = 1
            changed = True
    del copy.graph.value_info[:]
    return PassResult(copy, changed)
