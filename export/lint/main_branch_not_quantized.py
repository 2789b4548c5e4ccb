"""A main branch that reaches its residual Add in float: onnxruntime then runs its last convolution in float."""

from __future__ import annotations

from collections.abc import Iterator

from export.graph import DEQUANTIZE, GraphView, label
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield one note on onnxruntime for a graph in which INT8 convolutions feed residual Adds without a quantizer between.

    onnxruntime fuses Q/DQ and convolution into an integer kernel only where the output is quantized, too. A ResNet-50 took
    twice as long for it (decision 0035).
    """
    if facts.runtime != "onnxruntime":
        return
    floats = [
        add
        for add, main, _ in graph.residual_adds()
        if graph.made_by(main, DEQUANTIZE) is None and (conv := graph.folded_conv(main)) is not None and graph.is_int8(conv)
    ]
    if floats:
        yield Issue(
            "note",
            label(floats[0]),
            f"{len(floats)} main branches are not quantized in front of their Add: onnxruntime runs the convolutions there in "
            "float, which took a ResNet-50 twice as long",
            "quantize with --target cpu-ort (profile onnxruntime)",
        )
