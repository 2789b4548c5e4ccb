"""Reads the layer list that a TensorRT builder logs: which kernel each ONNX node became, and in which type it computes.

The list is one message of the log, written when the build is verbose and the profiling verbosity is ``DETAILED``: it
begins with ``Layers:`` and has one line per kernel (format of tensorrt_rtx 1.7).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

GLUE = frozenset({"kgen"})
"""Kernels of generated element-wise code: they carry the names of the convolutions whose scales and biases they apply."""


@dataclass(frozen=True)
class EngineLayer:
    """One kernel of an engine.

    Attributes:
        name: Of the kernel.
        kind: ``correlation`` (convolution), ``gemm``, ``maxpool``, ``kgen`` (generated element-wise code) and others.
        inputs: Type of each input: ``Int8``, ``Half``, ``Float``.
        constants: Type of each constant; the weights of a convolution come first.
        outputs: Type of each output.
        nodes: Names of the ONNX nodes it computes.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]


_LINE = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), (?P<body>.*)$")
_SECTION = re.compile(
    r"(Inputs|Constants|Outputs): \[(.*?)\](?=, (?:Inputs|Constants|Outputs|TacticName|StreamId|Metadata): |$)"
)


def read_layers(log: Iterable[str]) -> tuple[EngineLayer, ...]:
    """Return every kernel of an engine, in order of execution; empty when the log has no layer list.

    Args:
        log: The messages of the build.
    """
    layers = []
    for message in log:
        if not message.startswith("Layers:"):
            continue
        for line in message.split("\n"):  # splitlines would also cut at the separators inside Metadata
            found = _LINE.match(line)
            if found is None:
                continue
            types = {kind: tuple(re.findall(r"Datatype: (\w+)", text)) for kind, text in _SECTION.findall(found["body"])}
            layers.append(
                EngineLayer(
                    name=found["name"],
                    kind=found["kind"],
                    inputs=types.get("Inputs", ()),
                    constants=types.get("Constants", ()),
                    outputs=types.get("Outputs", ()),
                    nodes=tuple(re.findall(r"\[ONNX Layer: (.*?)\](?=\[|$|[\x1e\x1f]|,)", found["body"])),
                )
            )
    return tuple(layers)


def compute_types(layers: Iterable[EngineLayer], nodes: Iterable[str]) -> Mapping[str, str | None]:
    """Return, per ONNX node, the type its kernel computes in (that of its data input); None where no kernel is its own.

    Args:
        layers: The kernels of an engine.
        nodes: Names of convolutions or linear layers of the ONNX file.
    """
    wanted = dict.fromkeys(nodes, None)
    types: dict[str, str | None] = dict(wanted)
    for layer in layers:
        if layer.kind in GLUE or not layer.inputs:
            continue
        for node in layer.nodes:
            if node in wanted and types[node] in (None, "Int8"):  # the worst of several kernels counts
                types[node] = layer.inputs[0]
    return types


def weights_memory(log: Iterable[str]) -> int | None:
    """Return the bytes of the engine's weights, as ``Total Weights Memory`` gives them, or None."""
    for message in log:
        found = re.search(r"Total Weights Memory: (\d+)", message)
        if found:
            return int(found[1])
    return None
