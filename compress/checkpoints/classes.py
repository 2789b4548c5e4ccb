"""Reads the names of the classes where a training script stored them beside the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from compress.checkpoints.pickles import Record

_BY_INDEX = ("idx_to_class", "id2label", "index_to_class")
_BY_NAME = ("class_to_idx", "label2id", "class_to_index")
_IN_ORDER = ("classes", "class_names", "label_names")
_INSIDE = ("meta", "dataset_meta", "config", "hyper_parameters")
"""Dictionaries that hold them in files of mmengine, Hugging Face and Lightning."""


def class_names(content: object, outputs: int) -> tuple[tuple[str, ...] | None, list[str]]:
    """Return the names of a network's outputs in their order, or None, and what was found that cannot be used.

    Args:
        content: Of the file; the network's tensors stand somewhere below.
        outputs: Of the network; one output has two classes.
    """
    expected, unused = 2 if outputs == 1 else outputs, []
    for key, value in _candidates(content, depth=2):
        names = _in_order(key, value)
        if names is not None and len(names) == len(set(names)) == expected:
            return names, []
        said = f"{len(names)} names" if names is not None else "no list of names"
        unused.append(f"its {key} holds {said}, the network has {expected} classes: not used")
    return None, unused


def _candidates(content: object, depth: int) -> Iterator[tuple[str, object]]:
    held = content.state if isinstance(content, Record) else content
    if not isinstance(held, Mapping):
        return
    for key in (*_BY_NAME, *_BY_INDEX, *_IN_ORDER):
        value = held.get(key, held.get(key.upper()))
        if isinstance(value, Mapping | Sequence) and not isinstance(value, str) and value:
            yield key, value
    for key in _INSIDE if depth else ():
        yield from _candidates(held.get(key), depth - 1)


def _in_order(key: str, value: object) -> tuple[str, ...] | None:
    """Return the names by output, or None where they are none."""
    if isinstance(value, Mapping):
        pairs = [(v, k) for k, v in value.items()] if key in _BY_NAME else list(value.items())
        try:
            found = {int(index): name for index, name in pairs if not isinstance(index, bool)}
        except (TypeError, ValueError):
            return None
        if sorted(found) != list(range(len(pairs))):
            return None
        names: Sequence[object] = [found[i] for i in range(len(pairs))]
    elif isinstance(value, Sequence) and key in _IN_ORDER:
        names = value
    else:
        return None
    return tuple(str(n) for n in names) if all(isinstance(n, str) and n for n in names) else None
