"""BatchNorm behind an INT8 convolution: folding it costs nothing and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

from export.graph import GraphView, label
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield a warning per BatchNorm that directly follows a convolution with quantized weights."""
    for node in graph.ops("BatchNormalization"):
        conv = graph.made_by(node.input[0], "Conv")
        if conv is not None and graph.weight_dq(conv) is not None and len(graph.consumers.get(node.input[0], [])) == 1:
            yield Issue(
                "warning",
                label(node),
                f"BatchNorm stands behind the INT8 convolution {label(conv)}; some runtimes then compute both in float",
                "fold it into the per-channel scales and the bias",
            )
