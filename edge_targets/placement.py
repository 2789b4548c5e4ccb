"""Whether an engine that was built on a board does what its ONNX file asks: the verdict on `edge_targets.engine_proof`.

An engine in which a convolution of an INT8 file runs in floats, or of which no layer runs on the DLA that was asked for, is
faster or slower for a reason that its name denies. So it is no result, unless the user allows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_targets.device import Precision
from edge_targets.engine_proof import BuiltLayer, NodeProof, broken, on_dla, prove
from edge_targets.onnx_kernels import Asked
from edge_targets.trtexec_log import read_layer_info
from rescompress.core.errors import EnvironmentFailed, ModelFileError

SHOWN = 6
"""Layers that a message names; the rest is counted."""

ALLOW = "or measure it as it is: --allow-fallback"


@dataclass(frozen=True)
class Placement:
    """What every convolution and matrix product of an engine became.

    Attributes:
        proofs: One per node, in the order of the file.
        kernels: Layers of the engine.
        failures: What was asked and silently not given, one sentence each.
        notes: What was allowed to differ, and does.
    """

    proofs: tuple[NodeProof, ...]
    kernels: int
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """Return one JSON object per node: ``node``, ``asked``, ``ran``, ``unit``, ``kernel``, ``fused``."""
        return [
            {"node": p.node, "asked": p.asked, "ran": p.ran, "unit": p.unit, "kernel": p.kernel, "fused": list(p.fused)}
            for p in self.proofs
        ]

    def check(self, where: str) -> None:
        """Raise where something was asked and not given.

        Raises:
            EnvironmentFailed: With the names of the layers.
        """
        if self.failures:
            raise EnvironmentFailed("; ".join(self.failures), where=where, remedy=f"see docs/targets.md, {ALLOW}")


def placement(
    asked: Asked, layers_file: Path, log: str, *, float_as: Precision | None = None, dla: int | None = None
) -> Placement:
    """Return what every convolution and matrix product became.

    Args:
        asked: What the file asks.
        layers_file: Layer information of the engine.
        log: Of its build.
        float_as: What the builder may compute float32 layers in (weakly typed networks); None where the file decides.
        dla: Deep-learning accelerator that was asked for.
    """
    try:
        layers = read_layer_info(layers_file)
    except ModelFileError as e:
        why = f"the layers of the engine cannot be read ({e.what}): nothing proves that it computes in what was asked"
        # as if it told of none: the failure names what has no proof
        unproven = [q for q in prove(asked.precisions, ()) if q.asked != "fp32"]
        return Placement((), 0, (f"{why}: {_names(unproven)}" if unproven else why,))
    allowed = {n: float_as or p if p == "fp32" else p for n, p in asked.precisions.items()}
    placed = inside_dla(layers, log, asked.order) if dla is not None else frozenset()
    proofs = tuple(prove(allowed, layers, dla=placed))
    failures, notes = [], []
    missed = broken([p for p in proofs if asked.precisions[p.node] != "fp32"])
    if missed:
        failures.append(f"{len(missed)} of {len(proofs)} layers do not run as asked: {_names(missed)}")
    free = [p for p in proofs if asked.precisions[p.node] == "fp32" and p.ran is not None and p.ran != p.asked]
    if free:
        notes.append(
            f"{len(free)} of {len(proofs)} layers run in another type than {free[0].asked}, as is allowed: {_names(free)}"
        )
    untold = [p for p in proofs if asked.precisions[p.node] == "fp32" and p.ran is None and p.unit != "dla"]
    if proofs and len(untold) == len(proofs):
        notes.append(
            f"the layer information tells of none of the {len(proofs)} convolutions and matrix products of the file: "
            f"nothing shows that the engine computes in {untold[0].asked}"
        )
    elif untold:
        notes.append(f"the engine does not tell what {len(untold)} of {len(proofs)} layers run in: {_names(untold)}")
    if dla is not None:
        elsewhere = [p for p in proofs if p.unit != "dla"]
        if len(elsewhere) == len(proofs):
            failures.append(f"DLA {dla} was asked for, and none of the {len(proofs)} layers runs on it: {_names(elsewhere)}")
        elif elsewhere:
            notes.append(f"{len(elsewhere)} of {len(proofs)} layers do not run on the DLA: {_names(elsewhere)}")
    return Placement(proofs, len(layers), tuple(failures), tuple(notes))


def allowed(found: Placement) -> Placement:
    """Return the placement with its failures as notes."""
    return replace(found, failures=(), notes=(*found.failures, *found.notes))


def inside_dla(layers: Sequence[BuiltLayer], log: str, order: Sequence[str]) -> frozenset[str]:
    """Return the nodes that run on a DLA.

    A part of the network on a DLA is one layer that names its first and its last node; those between run in it, but for
    those that a layer of the GPU names.

    Args:
        layers: Of the engine.
        log: Of the build.
        order: All nodes of the file, in order.
    """
    place: Mapping[str, int] = {name: i for i, name in enumerate(order)}
    found = set(on_dla(log))
    for layer in layers:
        if layer.unit == "dla":
            at = [place[n] for n in layer.nodes if n in place]
            found |= set(layer.nodes)
            if len(at) == 2:
                found |= set(order[min(at) : max(at) + 1])
    return frozenset(found) - {n for layer in layers if layer.unit == "gpu" for n in layer.nodes}


def _names(proofs: Sequence[NodeProof]) -> str:
    rest = f", and {len(proofs) - SHOWN} more" if len(proofs) > SHOWN else ""
    return "; ".join(p.words() for p in proofs[:SHOWN]) + rest
