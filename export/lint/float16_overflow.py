"""Results of float16 layers beyond 65,504, which a GPU turns into infinity and a CPU does not."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from export.graph import GraphView
from export.half import HalfCheck, check_half, has_float16
from export.lint import Issue, TargetFacts
from rescompress.core.errors import ModelFileError

IMAGES = 4
IMAGES_IN_WORDS = f"{IMAGES} images of random noise"
REMEDY = "export with --precision fp32 (or int8), or train with activations that stay small"


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield an error per float16 result that overflows on random noise; TensorRT alone computes such files in float16."""
    if not facts.tensorrt or not has_float16(graph.model):
        return
    weights = {i.name for i in graph.model.graph.initializer}
    inputs = [i for i in graph.model.graph.input if i.name not in weights]
    if len(inputs) != 1:
        return
    shape = [d.dim_value for d in inputs[0].type.tensor_type.shape.dim]
    sizes = [size or 64 for size in shape[1:]]
    noise = np.random.default_rng(0).standard_normal((IMAGES, *sizes), dtype=np.float32)
    try:
        found = check_half(graph.model, [noise], IMAGES_IN_WORDS)
    except (ModelFileError, ValueError, RuntimeError):
        return  # what cannot be run is the business of other rules
    yield from issues(found, facts)


def issues(found: HalfCheck, facts: TargetFacts) -> Iterator[Issue]:
    """Yield an error per overflow that was seen, for targets that compute float16 files in float16."""
    for overflow in found.overflows if facts.tensorrt else ():
        yield Issue(
            "error",
            overflow.node,
            f"{overflow.node} reaches {overflow.largest:,.0f} on {found.images}: beyond 65,504 float16 is infinite",
            REMEDY,
        )
