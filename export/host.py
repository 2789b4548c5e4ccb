"""`with_trunk`: a host's ONNX file with another trunk inside, and how far the outputs of two hosts are apart.

The host's own nodes stay as they are, names and all. The nodes that computed nothing but the old trunk go; the new trunk's come
in front, with a prefix of their own, and end in the tensors that the rest reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from export.structure import STANDARD, one_line, reads
from export.to_onnx import FP16_SCALE_OPSET, OPSETS, ExportOptions
from rescompress.core.errors import ModelFileError
from rescompress.core.graph import INPUT
from rescompress.core.host import Host

PREFIX = "trunk"
Array = NDArray[Any]


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of ONNX's own operators in a file."""
    return next((int(o.version) for o in model.opset_import if o.domain in STANDARD), 1)


def fitting(options: ExportOptions, model: onnx.ModelProto, host: Host) -> ExportOptions:
    """Return options with which a trunk is written for a host: of its opset and batch, and of float scales it has.

    Args:
        options: Those of the trunk's own file.
        model: The host.
        host: What is known of it.
    """
    opset = min(max(opset_of(model), OPSETS[0]), OPSETS[-1])
    typed = options.precision == "int8+fp16" and opset < FP16_SCALE_OPSET
    return dataclasses.replace(
        options, opset=opset, batch=host.batch or "dynamic", precision="int8" if typed else options.precision
    )


def with_trunk(model: onnx.ModelProto, trunk: onnx.ModelProto, host: Host) -> onnx.ModelProto:
    """Return a host with a trunk in the place of its own.

    Args:
        model: The host as it came; not changed.
        trunk: Written with `fitting` options: its outputs are `host.borders`, in order.
        host: Where they are.

    Raises:
        ModelFileError: The host's operators are older than any that can be written, and cannot be converted.
    """
    made = _at_least(model, OPSETS[0])
    borders = list(host.borders.values())
    gone = _only_trunk(made, borders)
    graph = made.graph
    kept = [node for i, node in enumerate(graph.node) if i not in gone]
    taken = {name for node in kept for name in (*node.input, *node.output)} | {i.name for i in graph.input}
    new, stored = _renamed(trunk, host, taken, _types(made, borders))
    needed = {name for node in kept for name in reads(node)} | {o.name for o in graph.output}
    old = [i for i in graph.initializer if i.name in needed or i.name not in _read_by(graph.node, gone)]
    known = [v for v in graph.value_info if v.name in needed or not _made_by(graph.node, gone, v.name)]
    for field, values in ((graph.node, [*new, *kept]), (graph.initializer, [*old, *stored]), (graph.value_info, known)):
        del field[:]
        field.extend(values)
    made.ir_version = max(made.ir_version, trunk.ir_version)
    return made


def joined(rest: onnx.ModelProto, trunk: onnx.ModelProto, host: Host) -> onnx.ModelProto:
    """Return one model of a trunk and of a rest that has the trunk's outputs among its inputs.

    Args:
        rest: It reads `host.input` and `host.borders`; not changed.
        trunk: Written with `fitting` options.
        host: Where they meet.
    """
    made = onnx.ModelProto()
    made.CopyFrom(rest)
    graph = made.graph
    borders = list(host.borders.values())
    inputs = [i for i in graph.input if i.name not in borders]
    taken = {name for node in graph.node for name in (*node.input, *node.output)} | {host.input}
    new, stored = _renamed(trunk, host, taken, {})
    nodes = [*new, *graph.node]
    del graph.input[:], graph.node[:]
    graph.input.extend(inputs)
    graph.node.extend(nodes)
    graph.initializer.extend(stored)
    made.ir_version = max(made.ir_version, trunk.ir_version)
    return made


def _at_least(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Return a copy whose operators are of a version that trunks can be written in."""
    if opset_of(model) < opset:
        try:
            return onnx.version_converter.convert_version(model, opset)
        except Exception as e:  # a bare RuntimeError of the C++ side, among others
            raise ModelFileError(
                f"the host is of opset {opset_of(model)}, and cannot be converted to {opset}: {one_line(e)}",
                remedy=f"export it again with opset {opset} or later",
            ) from e
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _only_trunk(model: onnx.ModelProto, borders: Sequence[str]) -> set[int]:
    """Return the nodes that compute the borders and nothing else that is wanted."""
    nodes = model.graph.node
    maker = {name: i for i, node in enumerate(nodes) for name in node.output if name}

    def before(names: Iterable[str], ends: frozenset[str] = frozenset()) -> set[int]:
        found: set[int] = set()
        todo = [n for n in names if n not in ends]
        while todo:
            at = maker.get(todo.pop())
            if at is not None and at not in found:
                found.add(at)
                todo += [n for n in reads(nodes[at]) if n not in ends]
        return found

    missing = [name for name in borders if name not in maker]
    if missing:
        raise ModelFileError(f"the host makes no tensor '{missing[0]}'", remedy="take the trunk out again with --trunk")
    return before(borders) - before((o.name for o in model.graph.output), frozenset(borders))


def _read_by(nodes: Sequence[NodeProto], which: set[int]) -> set[str]:
    return {name for i in which for name in reads(nodes[i])}


def _made_by(nodes: Sequence[NodeProto], which: set[int], name: str) -> bool:
    return any(name in nodes[i].output for i in which)


def _types(model: onnx.ModelProto, names: Sequence[str]) -> dict[str, int]:
    """Return the element types of tensors, where they can be inferred."""
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # as above; then what the file says itself counts
        graph = model.graph
    return {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output) if v.name in names}


def _renamed(
    trunk: onnx.ModelProto, host: Host, taken: set[str], types: Mapping[str, int]
) -> tuple[list[NodeProto], list[TensorProto]]:
    """Return a trunk's nodes and weights under names that the host does not have, between its input and its borders."""
    prefix = PREFIX
    while any(name.startswith(f"{prefix}/") for name in taken):
        prefix += "_"
    names = {INPUT: host.input}
    nodes: list[NodeProto] = []
    if host.last:
        names[INPUT] = f"{prefix}/{INPUT}"
        nodes.append(helper.make_node("Transpose", [host.input], [names[INPUT]], f"{prefix}/{INPUT}", perm=[0, 3, 1, 2]))
    casts: list[NodeProto] = []
    for output, border in zip((o.name for o in trunk.graph.output), host.borders.values(), strict=True):
        kind = types.get(border, TensorProto.FLOAT)
        names[output] = border if kind == TensorProto.FLOAT else f"{prefix}/{border}"
        if kind != TensorProto.FLOAT:
            casts.append(helper.make_node("Cast", [names[output]], [border], f"{prefix}/{border}.cast", to=kind))

    def called(name: str) -> str:
        return names.setdefault(name, f"{prefix}/{name}") if name else ""

    for node in trunk.graph.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{prefix}/{node.name}"
        for field in (copy.input, copy.output):
            field[:] = [called(name) for name in field]
        nodes.append(copy)
    stored = []
    for tensor in trunk.graph.initializer:
        weights = TensorProto()
        weights.CopyFrom(tensor)
        weights.name = called(tensor.name)
        stored.append(weights)
    return [*nodes, *casts], stored


@dataclass(frozen=True)
class OutputParity:
    """One output of two hosts for the same images, compared.

    Attributes:
        relative_error: Norm of the difference over the norm of the original's numbers; None where the shapes differ, as where
            another number of boxes is found.
        max_abs: Largest difference, likewise.
        cosine: Between the two, all images together, likewise.
        agreement: Fraction of the images with the same highest score, of an output of class scores; of integers the fraction
            that is equal; else None.
        shapes: Of both.
        scored: Images that `agreement` is about, of an output of class scores; else 0.
    """

    relative_error: float | None
    max_abs: float | None
    cosine: float | None
    agreement: float | None
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    scored: int = 0

    def document(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {**dataclasses.asdict(self), "shapes": [list(shape) for shape in self.shapes]}


def relative_error(wanted: Array, found: Array) -> float:
    """Return the norm of the difference over the norm of what is wanted; 1 for a difference from nothing at all."""
    off = float(np.linalg.norm(found.astype(np.float64) - wanted))
    norm = float(np.linalg.norm(wanted.astype(np.float64)))
    return off / norm if norm else float(off > 0)


def compare_hosts(
    original: onnx.ModelProto,
    changed: onnx.ModelProto,
    host: Host,
    batches: Sequence[Array],
    *,
    extra: Sequence[str] = (),
    only: Sequence[str] | None = None,
) -> tuple[dict[str, OutputParity], list[dict[str, Array]]]:
    """Return how far the outputs of two hosts are apart, and what the second makes of `extra` tensors, batch by batch.

    Inputs besides the images hold zeros; where they are free, their sizes are one.

    Args:
        original: The host as it came.
        changed: With another trunk.
        host: What is known of both.
        batches: Preprocessed images (N, C, H, W).
        extra: Tensors of the changed one.
        only: Outputs to compare; all by default.

    Raises:
        ModelFileError: onnxruntime cannot run one of them.
    """
    names = [o.name for o in original.graph.output if only is None or o.name in only]
    found: dict[str, tuple[list[Array], list[Array]]] = {name: ([], []) for name in names}
    seen: list[dict[str, Array]] = []
    runs = [_Session(original, host, ()), _Session(changed, host, extra)]
    for batch in batches:
        before, after = (run(batch) for run in runs)
        for name in names:
            found[name][0].extend(before[name])
            found[name][1].extend(after[name])
        seen.append({name: np.concatenate(after[name]) for name in extra})
    scores = {name for name in names if is_scores(original, name)}
    return {name: _compared(*parts, scores=name in scores) for name, parts in found.items()}, seen


def is_scores(model: onnx.ModelProto, name: str) -> bool:
    """Whether an output holds a score for each class, as far as a file tells: a softmax makes it, or its name says so."""
    maker = next((n for n in model.graph.node if name in n.output), None)
    words = ("logit", "score", "prob", "class", "softmax")
    return (maker is not None and maker.op_type in ("Softmax", "LogSoftmax")) or any(w in name.lower() for w in words)


class _Session:
    """onnxruntime on a host."""

    def __init__(self, model: onnx.ModelProto, host: Host, extra: Sequence[str]) -> None:
        from export.session import open_session

        shown = onnx.ModelProto()
        shown.CopyFrom(model)
        there = {o.name for o in shown.graph.output}
        shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra if name not in there)
        self._host = host
        try:
            self._session = open_session(shown, level="extended")
        except Exception as e:  # onnxruntime has a class per error and no base of its own
            raise ModelFileError(f"onnxruntime cannot open the host: {one_line(e)}") from e
        self._names = [o.name for o in self._session.get_outputs()]
        self._others = {i.name: _zeros(i) for i in self._session.get_inputs() if i.name != host.input}

    def __call__(self, batch_NCHW: Array) -> dict[str, list[Array]]:
        """Return the outputs, a part for each call."""
        x = np.moveaxis(batch_NCHW, 1, -1) if self._host.last else batch_NCHW
        size = self._host.batch or len(x)
        if len(x) < size:
            x = np.concatenate([x, np.repeat(x[:1], size - len(x), 0)])
        found: dict[str, list[Array]] = {name: [] for name in self._names}
        for start in range(0, len(x) - size + 1, size):
            part = np.ascontiguousarray(x[start : start + size])
            try:
                values = self._session.run(None, {**self._others, self._host.input: part})
            except Exception as e:  # likewise
                raise ModelFileError(f"onnxruntime cannot run the host: {one_line(e)}") from e
            for name, value in zip(self._names, values, strict=True):
                found[name].append(np.asarray(value))
        return found


def _zeros(entry: Any) -> Array:
    kinds = {"float": "float32", "float16": "float16", "double": "float64", "bool": "bool"}
    shape = [d if isinstance(d, int) else 1 for d in entry.shape]
    kind = str(entry.type).removeprefix("tensor(").removesuffix(")")
    return np.zeros(shape, np.dtype(kinds.get(kind, kind)))


def _compared(before: list[Array], after: list[Array], *, scores: bool) -> OutputParity:
    shapes = (tuple(before[0].shape), tuple(after[0].shape)) if before else ((), ())
    if not before or any(a.shape != b.shape for a, b in zip(before, after, strict=True)):
        return OutputParity(None, None, None, None, shapes)
    a, b = (np.concatenate([part.reshape(-1) for part in parts]) for parts in (before, after))
    if a.dtype.kind != "f":
        return OutputParity(None, None, None, float((a == b).mean()) if a.size else None, shapes)
    agreement, scored = None, 0
    if scores and before[0].ndim == 2 and before[0].shape[1] > 1:
        same = [x.argmax(1) == y.argmax(1) for x, y in zip(before, after, strict=True)]
        agreement, scored = float(np.concatenate(same).mean()), sum(map(len, same))
    a, b = a.astype(np.float64), b.astype(np.float64)
    if not a.size or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return OutputParity(None, None, None, agreement, shapes, scored)
    norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    return OutputParity(
        relative_error=relative_error(a, b),
        max_abs=float(np.abs(b - a).max()),
        cosine=float(a @ b) / (norms[0] * norms[1]) if all(norms) else None,
        agreement=agreement,
        shapes=shapes,
        scored=scored,
    )
