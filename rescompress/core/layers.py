"""`walk`: the layers of a network in the order of computation, for recipe and graph alike.

The torch model, the ONNX writer, quantizer placement, budgets, latency prediction and reports all read this list, so they
cannot disagree about what the network computes. A tensor is named after the layer that makes it.
"""

from __future__ import annotations

from collections.abc import Iterable

from rescompress.core.graph import INPUT as INPUT
from rescompress.core.graph import Layer as Layer
from rescompress.core.graph import Network
from rescompress.core.graph import consumers as consumers
from rescompress.core.recipe import network_of
from rescompress.core.spec import ModelSpec


def walk(spec: ModelSpec | Network) -> list[Layer]:
    """Return every layer of the network in the order of computation; the first is ``input``."""
    return list(network_of(spec).layers)


def total_macs(layers: Iterable[Layer]) -> int:
    """Return the multiply-accumulates of one forward pass over one input."""
    return sum(layer.macs for layer in layers)


def total_params(layers: Iterable[Layer]) -> int:
    """Return the learnable parameters, as torch counts them."""
    return sum(layer.params for layer in layers)
