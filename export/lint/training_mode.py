"""Layers that were exported as they train: their answers depend on the other images of the batch, or on chance."""

from __future__ import annotations

from collections.abc import Iterator

from export.graph import GraphView, attribute, label
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield an error per BatchNormalization and Dropout in training mode; TensorRT refuses both."""
    for node in graph.ops("BatchNormalization"):
        # Before opset 14 further outputs were what told training from inference.
        if attribute(node, "training_mode", 0) or (graph.opset < 14 and any(node.output[1:])):
            yield Issue(
                "error",
                label(node),
                "BatchNorm is in training mode: it normalises by the images of the batch, not by what training has learned",
                "export the network in evaluation mode (torch: model.eval(), training=TrainingMode.EVAL)",
            )
    for node in graph.ops("Dropout"):
        mode = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if mode is not None and mode.any():
            yield Issue(
                "error",
                label(node),
                "Dropout is in training mode: answers differ from call to call",
                "export the network in evaluation mode (torch: model.eval())",
            )
