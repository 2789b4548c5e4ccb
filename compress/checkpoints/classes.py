"""Reads the names of the classes where a training script stored them beside the weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from compress.checkpoints.beside import places, plain
from rescompress.core.errors import CheckpointError

_USUAL = re.compile(
    r"(class|label|index|idx|id|name|cat|category|target)(es|s)?_?(to|2)_?(class|label|index|idx|id|int|name)(es|s)?"
    r"|class(es)?(_?names)?|label(s|_?names|_?map|s_?map)|names|vocab|categories|class_?(list|dict|map|mapping|labels)|classes_",
    re.IGNORECASE,
)
"""Keys that scripts give to the names of classes; anything else must at least speak of classes or labels."""
_ALIKE = re.compile(r"class|label|categor|vocab", re.IGNORECASE)
_OTHER = re.compile(
    r"param|metric|layer|loss|stage|file|feature|module|optim|dataset|column|weight|num|path|smooth", re.IGNORECASE
)


def class_names(contents: tuple[object, ...], outputs: int) -> tuple[tuple[str, ...] | None, list[str]]:
    """Return the names of a network's outputs in their order, or None, and what was found that is not used.

    Args:
        contents: Of the file: the network's tensors stand somewhere below, metadata beside them.
        outputs: Of the network; one output has two classes.

    Raises:
        CheckpointError: Two places give the same names another order.
    """
    expected, unfit, others = 2 if outputs == 1 else outputs, [], []
    chosen: tuple[str, tuple[str, ...]] | None = None
    for key, value in _candidates(contents):
        names = _in_order(value)
        if names is None or not len(names) == len(set(names)) == expected:
            if _USUAL.fullmatch(key.rpartition(".")[2]) and not _renames(value):
                said = f"{len(names)} names" if names is not None else "no list of names"
                if names is not None and len(names) == expected:
                    twice = next(name for name in names if names.count(name) > 1)
                    said += f" and '{twice}' among them {names.count(twice)} times"
                unfit.append(f"its {key} holds {said}, the network has {expected} classes: not used")
        elif chosen is None:
            chosen = key, names
        elif names != chosen[1] and sorted(map(str.casefold, names)) == sorted(map(str.casefold, chosen[1])):
            if tuple(map(str.casefold, names)) != tuple(map(str.casefold, chosen[1])):
                raise CheckpointError(
                    f"its {chosen[0]} and its {key} give the same classes another order",
                    remedy="save it with the one that is right",
                )
        elif names != chosen[1]:
            others.append(f"its {key} has other names for the classes than its {chosen[0]}: not used")
    return (chosen[1], others) if chosen else (None, unfit)


def _candidates(contents: tuple[object, ...]) -> Iterator[tuple[str, object]]:
    """Yield what may name the classes: outer places first, in each of them dictionaries before lists."""
    for path, held in places(*contents):
        found = [
            (f"{path}{key}", plain(value))
            for key, value in held.items()
            if isinstance(key, str) and (_USUAL.fullmatch(key) or (_ALIKE.search(key) and not _OTHER.search(key)))
        ]
        found = [(key, value) for key, value in found if isinstance(value, Mapping | list) and value]
        yield from sorted(found, key=lambda pair: (isinstance(pair[1], list), not re.search("to|2", pair[0])))


def _renames(value: object) -> bool:
    """Whether a dictionary gives names to names, as for titles of folders: it numbers nothing, and is no contradiction."""
    return isinstance(value, Mapping) and all(isinstance(v, str) and isinstance(k, str) for k, v in value.items())


def _index(value: object) -> int | None:
    if isinstance(value, str):
        return int(value) if value.isdecimal() else None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _in_order(value: object) -> tuple[str, ...] | None:
    """Return the names by output, or None where they are none."""
    names: list[object] = list(value) if isinstance(value, list) else []
    if isinstance(value, Mapping):
        pairs = [(_index(v), k) for k, v in value.items()]
        if any(i is None for i, _ in pairs) or any(_index(k) is not None and isinstance(v, str) for k, v in value.items()):
            pairs = [(_index(k), v) for k, v in value.items()]
        found = {index: name for index, name in pairs if index is not None}
        if sorted(found) != list(range(len(pairs))):
            return None
        names = [found[i] for i in range(len(pairs))]
    return tuple(str(n) for n in names) if names and all(isinstance(n, str) and n for n in names) else None
