"""Makes a teacher mean what its student means: the same class at the same output, the same picture at the input.

A checkpoint that names its classes in another order gets its last layer's rows in the student's order, so that its logits are
those of a teacher that was trained in that order, to the bit. What cannot be matched is refused: distilling from it would teach
something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from compress.checkpoints.base import Checkpoint
from compress.data import Inputs, folded
from rescompress.core.errors import BadInput
from rescompress.core.graph import Network
from rescompress.core.layers import walk
from rescompress.core.spec import ModelSpec, Preprocessing

_SHOWN = 4


def same_arithmetic(a: Preprocessing, b: Preprocessing) -> bool:
    """Whether two preprocessings make the same numbers of the same pixels."""
    return (a.mean, a.std, a.scale, a.channel_order) == (b.mean, b.std, b.scale, b.channel_order)


def match_teacher(
    teacher: Checkpoint, student: ModelSpec | Network, classes: Sequence[str] = ()
) -> tuple[Checkpoint, list[str]]:
    """Return the teacher with its outputs in the student's order, and what is worth telling.

    Its preprocessing stays its own, for training to prepare its images by; one that is only assumed gives way to what is
    stated of the student.

    Args:
        teacher: The checkpoint to distil from.
        student: The network that learns.
        classes: Names of the data's classes in the order of the student's outputs, for a student without names of its own.

    Raises:
        BadInput: Inputs, outputs or classes are others.
    """
    ours, theirs = Inputs.of(student), Inputs.of(teacher.spec)
    if (ours.shape, ours.outputs) != (theirs.shape, theirs.outputs):
        raise BadInput(
            f"the teacher maps {theirs.shape} to {theirs.outputs} classes, the network {ours.shape} to {ours.outputs}",
            where="teacher",
            remedy="give a teacher with the same inputs and classes",
        )
    notes: list[str] = []
    teacher = _with_preprocessing(teacher, student, notes)
    names = student.labels
    if names is None and teacher.spec.labels is not None and _order(teacher.spec.labels, classes) is not None:
        names = tuple(classes)
    if names is None or teacher.spec.labels is None:
        if names is not None or teacher.spec.labels is not None:
            silent = "the teacher" if teacher.spec.labels is None else "the network"
            notes.append(f"{silent} does not name its classes: both are taken to have theirs in the same order")
        return teacher, notes
    order = _order(teacher.spec.labels, names)
    if order is None:
        raise BadInput(_difference(teacher.spec.labels, names), where="teacher", remedy="give a teacher of the same classes")
    if order != list(range(len(order))):
        notes.append("the teacher has its classes in another order: its outputs are put into the network's, by their names")
        teacher = reordered(teacher, order)
    return teacher, notes


def _with_preprocessing(teacher: Checkpoint, student: ModelSpec | Network, notes: list[str]) -> Checkpoint:
    ours, theirs = student.preprocessing, teacher.spec.preprocessing
    if theirs.assumed and not ours.assumed:
        return dataclasses.replace(teacher, spec=teacher.spec.replace(preprocessing=ours))
    if not same_arithmetic(ours, theirs):
        notes.append(
            f"the teacher reads its images by '{theirs.name}'{' (assumed)' if theirs.assumed else ''}, the network by "
            f"'{ours.name}'{' (assumed)' if ours.assumed else ''}: each gets the same pictures prepared its own way"
        )
    if not (ours.assumed or theirs.assumed) and (ours.resize, ours.interpolation) != (theirs.resize, theirs.interpolation):
        notes.append(
            f"the teacher was made for images resized to {_geometry(theirs)}; it sees the network's, resized to "
            f"{_geometry(ours)}"
        )
    return teacher


def _geometry(p: Preprocessing) -> str:
    return f"{'the input size' if p.resize is None else p.resize} ({p.interpolation})"


def _order(theirs: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Return at which output of `theirs` each of the wanted classes stands, or None where the sets differ."""
    if tuple(theirs) == tuple(wanted):
        return list(range(len(theirs)))  # also where two classes share a name
    for spelling in (str, folded):
        at = {spelling(name): i for i, name in enumerate(theirs)}
        found = [at.get(spelling(name)) for name in wanted]
        if len(at) == len(theirs) == len(wanted) and None not in found and len(set(found)) == len(found):
            return [i for i in found if i is not None]
    return None


def _difference(theirs: Sequence[str], ours: Sequence[str]) -> str:
    mine, other = ([n for n in a if n not in b] for a, b in ((ours, theirs), (theirs, ours)))

    def some(names: list[str]) -> str:
        return ", ".join(repr(n) for n in names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")

    return f"the teacher has other classes: it knows {some(other)}, and not {some(mine)}"


def reordered(checkpoint: Checkpoint, order: Sequence[int]) -> Checkpoint:
    """Return a classifier whose output i is output ``order[i]`` of `checkpoint`; for one output, (1, 0) swaps its two classes.

    Args:
        checkpoint: A network with a head.
        order: Output of `checkpoint` for each output of the result.
    """
    last = [layer.name for layer in walk(checkpoint.spec) if layer.op == "linear"][-1]
    index = torch.tensor(list(order))
    tensors = dict(checkpoint.state_dict)
    binary = checkpoint.spec.num_classes == 1

    def moved(value: Tensor) -> Tensor:
        return -value if binary else value[index].contiguous()

    for part in ("weight", "bias"):
        if f"{last}.{part}" in tensors:
            tensors[f"{last}.{part}"] = moved(tensors[f"{last}.{part}"])
    quantization = checkpoint.quantization
    if quantization is not None and not binary:
        scaled = tuple(
            q.model_copy(update={"scale": tuple(q.scale[i] for i in order)})
            if q.kind == "weight" and q.tensor == last and q.scale is not None and len(q.scale) == len(order)
            else q
            for q in quantization.quantizers
        )
        quantization = quantization.model_copy(update={"quantizers": scaled})
    labels = checkpoint.spec.labels
    spec = checkpoint.spec.replace(labels=tuple(labels[i] for i in order) if labels else None)
    return dataclasses.replace(checkpoint, spec=spec, state_dict=tensors, quantization=quantization)
