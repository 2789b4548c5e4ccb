"""Channel counts between the multiples that the hardware's kernels work on."""

from __future__ import annotations

from collections.abc import Iterator

from export.graph import GraphView, label
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield one note that counts the convolutions with channels between multiples.

    Image channels do not count, nor do widths below one multiple: no pruning makes them fit.
    """
    precision = "int8" if graph.quantized else "fp16" if _half(graph) else "fp32"
    multiple = facts.align.get(precision, 1)
    if multiple <= 1:
        return
    inputs = {i.name for i in graph.model.graph.input}
    odd, total = [], 0
    for node in graph.ops("Conv"):
        weight = graph.weight(node)
        shape = graph.shapes.get(weight) if weight is not None else None
        if shape is None:
            continue
        total += 1
        source = node.input[0]
        while source in graph.producer and graph.producer[source].op_type in ("QuantizeLinear", "DequantizeLinear", "Cast"):
            source = graph.producer[source].input[0]
        widths = [shape[0]] if source in inputs else [shape[0], shape[1]]
        if any(width % multiple for width in widths if width > multiple):
            odd.append(node)
    if odd:
        yield Issue(
            "note",
            label(odd[0]),
            f"{len(odd)} of {total} convolutions have channels between multiples of {multiple}: {precision} pads them",
            f"prune with --align {multiple}",
        )


def _half(graph: GraphView) -> bool:
    return any(i.data_type == 10 and len(i.dims) > 1 for i in graph.model.graph.initializer)
