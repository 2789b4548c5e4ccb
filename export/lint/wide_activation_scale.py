"""An activation range far beyond what the layer can plausibly reach: calibration by the maximum, with outliers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto

from export.graph import GraphView, attribute, label
from export.lint import Issue, TargetFacts

REACH = 40.0
"""Standard deviations that a well calibrated range rarely exceeds (see `docs/lint.md`)."""


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield a warning per INT8 convolution whose output range is out of proportion to its input range and weights.

    With inputs of standard deviation a quarter of their range, a sum over weights w has one of that times ``|w|``; the
    range of the output is compared with the largest of the channels.
    """
    for node in graph.ops("Conv"):
        source, pair = graph.input_dq(node), graph.weight_dq(node)
        out = _quantizer_behind(graph, node.output[0])
        integers = graph.constant(pair.input[0]) if pair is not None else None
        if source is None or pair is None or out is None or integers is None or integers.ndim != 4:
            continue
        s_in, s_w, s_out = (graph.scale(n) for n in (source, pair, out))
        if s_in is None or s_w is None or s_out is None or np.size(s_in) != 1 or np.size(s_out) != 1:
            continue
        if attribute(pair, "axis", 1) != 0 and np.size(s_w) > 1:
            continue
        norm_O = np.sqrt((integers.astype(np.float64) ** 2).sum((1, 2, 3))) * s_w.astype(np.float64)
        spread = float(s_in.item()) * 127 / 4 * float(norm_O.max())
        bias = graph.constant(node.input[2]) if len(node.input) > 2 else None
        offset = float(np.abs(bias).max()) if bias is not None and bias.size else 0.0
        reach = (float(s_out.item()) * 127 - offset) / spread if spread > 0 else 0.0
        if reach > REACH:
            yield Issue(
                "warning",
                label(out),
                f"the range of this activation is {reach:.0f} times what its layer can spread: outliers cost levels",
                "calibrate by percentile or mean squared error, not by the maximum",
            )


def _quantizer_behind(graph: GraphView, name: str) -> NodeProto | None:
    """Return the one QuantizeLinear behind a tensor, looked for through ReLU, or None."""
    for _ in range(3):
        readers = graph.consumers.get(name, [])
        if len(readers) != 1:
            return None
        if readers[0].op_type == "QuantizeLinear":
            return readers[0]
        if readers[0].op_type not in ("Relu", "Clip"):
            return None
        name = readers[0].output[0]
    return None
