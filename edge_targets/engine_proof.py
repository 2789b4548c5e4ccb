"""Proof, layer by layer, of what an engine computes in and on which unit: layer information of TensorRT 8 to 11 against a file.

Asking for INT8 is a permission before TensorRT 10.12 and a wish where the parser cannot place it: a builder falls back to
floats without a word, and to the GPU where a DLA cannot. So what every convolution became is read from the engine itself.

Forms of the layer information (``IEngineInspector``, ``--exportLayerInfo``):

* 8.2 to 8.6: a tensor has one text ``Format/Datatype`` such as ``Thirty-two wide channel vectorized row major Int8 format``;
  the ONNX nodes of a kernel stand in its name, joined by `` + `` (log of a ResNet-18, TensorRT 8.5.10);
* 8.6 to 10: ``Metadata`` names the nodes, ``[ONNX Layer: conv1]`` each (file of TensorRT 10.16.1);
* 11: ``Format`` and ``Datatype`` are two texts, and ``Bindings`` became ``I/O Tensors`` (NVIDIA's guide from 10.x to 11.x);
* a part that runs on a DLA is one layer ``{ForeignNode[first...last]}`` of type ``DLA``; its nodes are named by the build log
  alone (``Layers running on DLA``, since 8.0).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Unit = Literal["gpu", "dla"]

GLUE = frozenset({"Reformat", "NoOp", "Constant", "Shuffle", "Signal", "Wait", "Identity"})
"""Layers that move data: they carry the names of the nodes between which they stand."""

_TYPES = (
    # What a text of a tensor's type contains: the precision.
    ("fp8", "fp8"),
    ("e4m3", "fp8"),
    ("int8", "int8"),
    ("uint8", "uint8"),
    ("bf16", "bf16"),
    ("bfloat16", "bf16"),
    ("fp16", "fp16"),
    ("half", "fp16"),
    ("float16", "fp16"),
    ("int32", "int32"),
    ("int64", "int64"),
    ("bool", "bool"),
    ("fp32", "fp32"),
    ("float", "fp32"),
)


def precision_of(text: str | None) -> str | None:
    """Return the precision that a text such as ``Int8``, ``Half`` or ``Row major linear FP32`` names, or None."""
    lower = (text or "").lower()
    return next((precision for word, precision in _TYPES if word in lower), None)


@dataclass(frozen=True)
class BuiltLayer:
    """One layer of a built engine.

    Attributes:
        name: Of the kernel.
        kind: Such as ``CaskConvolution``; empty where the engine was built without detailed profiling verbosity.
        unit: What runs it.
        inputs: Precision of each input tensor.
        outputs: Precision of each output tensor.
        weights: Precision of the weights, where it has some.
        nodes: Names of the ONNX nodes in it, as far as they are told.
    """

    name: str
    kind: str = ""
    unit: Unit = "gpu"
    inputs: tuple[str | None, ...] = ()
    outputs: tuple[str | None, ...] = ()
    weights: str | None = None
    nodes: tuple[str, ...] = ()


def built_layers(document: Any) -> list[BuiltLayer]:
    """Return the layers of an engine's layer information.

    Args:
        document: The JSON document, of any version.

    Raises:
        ValueError: It is no layer information.
    """
    layers = document.get("Layers") if isinstance(document, Mapping) else None
    if not isinstance(layers, list):
        raise ValueError("has no list of layers")
    return [_layer(layer) for layer in layers]


def _layer(layer: Any) -> BuiltLayer:
    if isinstance(layer, str):
        return BuiltLayer(layer, nodes=_in_name(layer), unit=_unit(layer, ""))
    if not isinstance(layer, Mapping):
        raise ValueError(f"a layer is {type(layer).__name__}, not an object")
    name, kind = str(layer.get("Name", "")), str(layer.get("LayerType", ""))
    weights = layer.get("Weights")
    metadata = layer.get("Metadata")
    told = re.findall(r"\[ONNX Layer: (.*?)\](?=\[|$|[\x1e\x1f])", metadata) if isinstance(metadata, str) else []
    return BuiltLayer(
        name=name,
        kind=kind,
        unit=_unit(name, kind),
        inputs=_tensors(layer.get("Inputs")),
        outputs=_tensors(layer.get("Outputs")),
        weights=precision_of(str(weights.get("Type", ""))) if isinstance(weights, Mapping) else None,
        nodes=tuple(told) or _in_name(name),
    )


def _tensors(value: Any) -> tuple[str | None, ...]:
    if not isinstance(value, list):
        return ()
    found = []
    for tensor in value:
        if isinstance(tensor, Mapping):
            words = [tensor.get(key) for key in ("Datatype", "DataType", "Format/Datatype", "Format")]
            found.append(next((p for w in words if isinstance(w, str) and (p := precision_of(w))), None))
    return tuple(found)


def _unit(name: str, kind: str) -> Unit:
    return "dla" if kind.upper().startswith("DLA") or (not kind and name.startswith("{ForeignNode[")) else "gpu"


def _in_name(name: str) -> tuple[str, ...]:
    """Return the words of a kernel's name that may be nodes: ``a + b``, ``a || b``, ``PWN(a)``, ``{ForeignNode[a...b]}``."""
    foreign = re.fullmatch(r"\{ForeignNode\[(.*)\.\.\.(.*)\]\}", name)
    if foreign:
        return (foreign[1], foreign[2])
    words = re.split(r" \+ | \|\| ", name)
    return tuple(re.sub(r"^(?:PWN\()+|\)+$", "", w).strip() if w.startswith("PWN(") else w.strip() for w in words)


def on_dla(log: str) -> frozenset[str]:
    """Return the nodes that a build log lists under ``Layers running on DLA``."""
    found: set[str] = set()
    listing = False
    for raw in log.splitlines():
        line = re.sub(r"^(?:\[[^\]]*\] ?)+", "", raw)
        if "Layers running on DLA" in line or "Layers Running on DLA" in line:
            listing = True
            line = line.partition(":")[2]
        elif "Layers running on GPU" in line or "Layers Running on GPU" in line:
            listing = False
        one = re.match(r"^\[DlaLayer\] (.*)$", line.strip())
        if one:
            line, part = "", one[1]
            inner = re.fullmatch(r"\{ForeignNode\[(.*)\]\}", part.strip())
            found |= set(inner[1].split("...")) if inner else {part.strip()}
        if listing:
            for group in re.findall(r"\{([^{}]*)\}", line):
                found |= {w.strip() for w in group.split(",") if w.strip()}
    return frozenset(found)


@dataclass(frozen=True)
class NodeProof:
    """What one convolution or linear layer became.

    Attributes:
        node: Its name in the ONNX file.
        asked: The precision that the file and the command ask for.
        ran: The precision that its kernel computes in; None where no layer of the engine tells.
        unit: What runs it; None where no layer tells.
        kernel: Name of the engine's layer.
        fused: The other nodes in it.
    """

    node: str
    asked: str
    ran: str | None
    unit: Unit | None
    kernel: str = ""
    fused: tuple[str, ...] = ()

    @property
    def kept(self) -> bool:
        """Whether it runs as asked; a DLA tells no precision of its parts, there the unit is all that is known."""
        return self.ran == self.asked or (self.unit == "dla" and self.ran is None)

    def words(self) -> str:
        """Return the outcome in one line."""
        ran = self.ran or ("on a DLA, which does not tell" if self.unit == "dla" else "not told by the engine")
        return f"{self.node}: {self.asked} asked, {ran}" + (f" (kernel {self.kernel})" if self.kernel else "")


def prove(asked: Mapping[str, str], layers: Iterable[BuiltLayer], *, dla: frozenset[str] = frozenset()) -> list[NodeProof]:
    """Return what every node became that has a precision asked of it.

    Args:
        asked: Precision by name of a convolution or linear layer of the ONNX file.
        layers: Of the engine.
        dla: Nodes that the build log names as running on a DLA.
    """
    known = list(layers)
    proofs = []
    for node, precision in asked.items():
        if node in dla:
            name = next((x.name for x in known if x.unit == "dla"), "")
            proofs.append(NodeProof(node, precision, None, "dla", name))
            continue
        mine = [x for x in known if node in x.nodes and x.kind not in GLUE]
        if not mine:
            proofs.append(NodeProof(node, precision, None, None))
            continue
        # the worst of several kernels counts: a convolution that was split is INT8 only if all its parts are
        types = [_computes_in(x) for x in mine]
        worst = next((i for i, t in enumerate(types) if t != precision), 0)
        layer = mine[worst]
        fused = tuple(n for n in layer.nodes if n != node)
        proofs.append(NodeProof(node, precision, types[worst], layer.unit, layer.name, fused))
    return proofs


def _computes_in(layer: BuiltLayer) -> str | None:
    """Return the precision a kernel computes in: that of its weights and its data input, where they agree."""
    first = layer.inputs[0] if layer.inputs else None
    if layer.weights is not None and first is not None and layer.weights != first:
        return f"{layer.weights} weights, {first} input"
    return layer.weights or first


def broken(proofs: Sequence[NodeProof], *, unit: Unit | None = None) -> list[NodeProof]:
    """Return the nodes that do not run as asked.

    Args:
        proofs: Of all nodes.
        unit: What all should run on, where that was asked for.
    """
    return [p for p in proofs if not p.kept or (unit is not None and p.unit != unit)]
