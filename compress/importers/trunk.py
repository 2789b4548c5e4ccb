"""The trunk of a host: the part from its images on that a network here can compute, cut out of a program of any kind.

A program is a list of `Call`s in the order of computation, of which some were read into a `Trace` (`Survey.values`). What the
host still needs is found backwards from its outputs: a tensor that was read is where the trunk ends (a *border*), everything
else is the host's own and stays as it is. Moves of numbers at such an end (a reshape, a transpose) stay with the host, so that
a border is a tensor of both, laid out alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from compress.importers.trace import Step, Trace, Value
from rescompress.core.errors import CheckpointError, nearest
from rescompress.core.host import AUTO
from rescompress.core.text import shown

SHARED = "shares its weights with other steps: in a trunk each would have its own"
"""Why the heads of a detector that work on every level, such as RetinaNet's, stay with the host."""


@dataclass(frozen=True)
class Call:
    """One step of a program.

    Attributes:
        name: For people: the operation and where it stands.
        reads: Tensors, those of an outer graph among them.
        makes: Tensors.
    """

    name: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]


@dataclass
class Survey:
    """What of a program was read.

    Attributes:
        trace: The steps.
        calls: Of the program, in the order of computation.
        outputs: Its results.
        values: Tensors that depend on the images and were read.
        constants: Tensors that depend on no image.
        refused: The calls that were not read though all that they read was, and why, in the order of computation.
        aliases: Other names of tensors, such as those of the modules that return them.
    """

    trace: Trace
    calls: list[Call]
    outputs: list[str]
    values: dict[str, Value] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cut:
    """Where a host is cut.

    Attributes:
        borders: The trunk's tensors that the rest reads, in the order of computation.
        kept: The host's own calls, by number.
        notes: What the user should know.
    """

    borders: tuple[str, ...]
    kept: frozenset[int]
    notes: tuple[str, ...] = ()


def cut(survey: Survey, wanted: Sequence[str]) -> Cut:
    """Return where a host is cut.

    Args:
        survey: The host.
        wanted: Tensors in which the trunk ends; the largest known part where there are none.

    Raises:
        CheckpointError: Nothing of it is known, or a wanted tensor is not there, not known, or read by nothing.
    """
    maker = {name: i for i, call in enumerate(survey.calls) for name in call.makes}
    names = [survey.aliases.get(name, name) for name in wanted]
    for name, said in zip(names, wanted, strict=True):
        _check_wanted(survey, maker, name, said)
    allowed = _before(survey, maker, names) if names else set(range(len(survey.calls)))
    inside = {name for name in survey.values if name in maker and maker[name] in allowed and is_border(survey, name)}
    borders: set[str] = set()
    kept: set[int] = set()
    todo = list(survey.outputs)
    while todo:
        name = todo.pop()
        if name in inside:
            borders.add(name)
        elif (at := maker.get(name)) is not None and at not in kept:
            kept.add(at)
            todo += survey.calls[at].reads
    unread = [said for name, said in zip(names, wanted, strict=True) if name not in borders]
    if unread:
        raise CheckpointError(
            f"nothing but the trunk reads '{shown(unread[0])}'",
            where="--trunk",
            remedy="leave it out: it is no end of the trunk",
        )
    ordered = tuple(sorted(borders, key=lambda name: (maker[name], name)))
    if not any(step.op == "conv" for step in needed_steps(survey, ordered)):
        raise CheckpointError(
            f"no part from its images on is known here: {_first_refusal(survey)}",
            where="--trunk",
            remedy="docs/bring-your-own.md lists the operations",
        )
    more = [name for name in ordered if names and name not in names]
    notes = [f"the rest reads {', '.join(more)} too: outputs of the trunk as well"] if more else []
    return Cut(ordered, frozenset(kept), tuple(notes))


def is_border(survey: Survey, name: str) -> bool:
    """Whether a tensor that was read can be an output of the trunk: laid out as a network makes it, and not the images."""
    value = survey.values[name]
    return value.places is None and value.step is not survey.trace.steps[0]


def needed_steps(survey: Survey, borders: Sequence[str]) -> list[Step]:
    """Return the steps that make some tensors."""
    found: dict[int, Step] = {}
    todo = [survey.values[name].step for name in borders]
    while todo:
        step = todo.pop()
        if id(step) not in found:
            found[id(step)] = step
            todo += step.inputs
    return list(found.values())


def needs_of(calls: Sequence[Call], names: Sequence[str]) -> set[str]:
    """Return the tensors that some tensors need, themselves among them."""
    maker = {name: call for call in calls for name in call.makes}
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += maker[name].reads if name in maker else ()
    return found


def _before(survey: Survey, maker: Mapping[str, int], names: Sequence[str]) -> set[int]:
    """Return the calls that tensors need, those among them that make them."""
    found: set[int] = set()
    todo = list(names)
    while todo:
        at = maker.get(todo.pop())
        if at is not None and at not in found:
            found.add(at)
            todo += survey.calls[at].reads
    return found


def _check_wanted(survey: Survey, maker: Mapping[str, int], name: str, said: str) -> None:
    if name not in maker:
        known = [*(n for n in survey.values if n in maker and is_border(survey, n)), *survey.aliases]
        raise CheckpointError(f"the host makes no tensor '{shown(said)}'", where="--trunk", remedy=_near(said, known))
    if name in survey.constants:
        raise CheckpointError(
            f"'{shown(said)}' depends on no image", where="--trunk", remedy="name a tensor that is computed from the images"
        )
    if name not in survey.values:
        before = _before(survey, maker, [name])
        first = next(
            (text for i, call in enumerate(survey.calls) if i in before and (text := survey.refused.get(call.name))), ""
        )
        why = first or "it does not come from the images alone"
        raise CheckpointError(
            f"'{shown(said)}' is not behind known operations: {why}", where="--trunk", remedy="name a tensor in front of that"
        )
    if not is_border(survey, name):
        raise CheckpointError(
            f"'{shown(said)}' is another tensor with its numbers moved (reshaped, transposed or pooled)",
            where="--trunk",
            remedy="name the tensor in front of it: that step stays with the host",
        )


def _near(said: str, known: Sequence[str]) -> str:
    text = nearest(said, known)
    return text if len(text) < 400 else f"`rescompress inspect HOST --trunk {AUTO}` shows where it may end"


def _first_refusal(survey: Survey) -> str:
    return next(iter(survey.refused.values()), "it computes nothing that has channels to remove")
