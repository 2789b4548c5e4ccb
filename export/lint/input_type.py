"""Inputs of a type that TensorRT does not read, or reads only where it is turned into another at once."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import TensorProto

from export.graph import GraphView
from export.lint import Issue, TargetFacts

_REFUSED = frozenset(
    {
        TensorProto.UINT16,
        TensorProto.INT16,
        TensorProto.UINT32,
        TensorProto.UINT64,
        TensorProto.STRING,
        TensorProto.COMPLEX64,
        TensorProto.COMPLEX128,
    }
)
_UINT8_SINCE = (8, 5)


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield an error per input that the parser refuses, and per uint8 input that something other than Cast reads."""
    if not facts.tensorrt:
        return
    stored = {i.name for i in graph.model.graph.initializer}
    for value in graph.model.graph.input:
        kind = value.type.tensor_type.elem_type
        name = TensorProto.DataType.Name(kind).lower()
        if value.name in stored:
            continue
        if kind in _REFUSED or (kind == TensorProto.UINT8 and facts.version is not None and facts.version < _UINT8_SINCE):
            yield Issue(
                "error", value.name, f"the input is {name}, which {facts.title} does not read", "export it with a float32 input"
            )
        elif kind == TensorProto.UINT8:
            others = [n.op_type for n in graph.consumers.get(value.name, []) if n.op_type != "Cast"]
            if others:
                yield Issue(
                    "error",
                    value.name,
                    f"{others[0]} reads the uint8 input; {facts.title} takes uint8 only where a Cast follows at once",
                    "put the Cast to float in front",
                )
