"""Q/DQ on both inputs of a residual Add: TensorRT does not fuse it, OpenVINO leaves one of the two out."""

from __future__ import annotations

from collections.abc import Iterator

from export.graph import DEQUANTIZE, GraphView, label
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield a finding per residual Add whose main branch is rounded before the Add: a warning on TensorRT, a note on OpenVINO.

    In TensorRT Conv+Add+ReLU is one INT8 kernel only without Q/DQ between Conv and Add (NVIDIA TensorRT,
    tools/tensorflow-quantization/docs/add_custom_qdq_cases.md). OpenVINO's CPU plugin fuses it all the same, and does not
    round there (decision 0035).
    """
    if not facts.tensorrt and facts.runtime != "openvino":
        return
    for add, main, skip in graph.residual_adds():
        if graph.made_by(main, DEQUANTIZE) is None or graph.made_by(skip, DEQUANTIZE) is None:
            continue
        if facts.tensorrt:
            yield Issue(
                "warning",
                label(add),
                "both inputs of the Add are quantized, so it does not fuse into the convolution: often no faster than float16",
                "keep the Q/DQ of the skip branch only",
            )
        else:
            yield Issue(
                "note",
                label(add),
                "both inputs of the Add are quantized: OpenVINO does not round the main branch there, so its answers differ",
                "keep the Q/DQ of the skip branch only",
            )
