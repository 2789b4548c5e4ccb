"""What a settings object says of its fields: help, default, values that may be given, and how each is typed.

A field of a pydantic model is described once: by its type and bounds, its default, its line under ``Attributes`` in the
docstring of its class, and, where that does not say how the command line spells it, a `Flag` in its annotation. The options
of commands, the tables of docs/run.md and the starter config are made of these.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rescompress.core.errors import BadInput, shown


@dataclass(frozen=True)
class Flag:
    """How a setting is typed on the command line, where its name, type and default do not say it.

    Attributes:
        name: Of the option; ``--name-of-field`` by default.
        off: Of the option that switches a truth value off; ``--no-name-of-field`` by default.
        short: One letter, such as ``-e``.
        usual: What the default is, in words, where None stands for something.
        metavar: What stands for the value in help.
        file: Whether the value is a path, or several, which the shell completes.
        completes: Returns the values that begin so, for the shell.
        parse: Returns what the typed text stands for, before it is validated.
        panel: Of the help; the first by default.
    """

    name: str = ""
    off: str = ""
    short: str = ""
    usual: str = ""
    metavar: str | None = None
    file: bool = False
    completes: Callable[[str], list[str]] | None = None
    parse: Callable[[str], object] | None = None
    panel: str | None = None


def flag_of(model: type[BaseModel], name: str) -> Flag:
    """Return how a field is typed; its name is filled in."""
    found = next((m for m in model.model_fields[name].metadata if isinstance(m, Flag)), Flag())
    return found if found.name else Flag(**{**vars(found), "name": "--" + name.replace("_", "-")})


def help_of(model: type[BaseModel]) -> dict[str, str]:
    """Return what each field is, by name: the ``Attributes`` in the docstrings of the class and those it is made of.

    Raises:
        AssertionError: A field has no line.
    """
    texts: dict[str, str] = {}
    for kind in reversed(model.__mro__[: model.__mro__.index(BaseModel)]):
        section = inspect.cleandoc(kind.__dict__.get("__doc__") or "").partition("\nAttributes:\n")[2]
        section = re.split(r"^\S", section, maxsplit=1, flags=re.M)[0]
        for entry in re.split(r"^ {4}(?=\w)", section, flags=re.M)[1:]:
            name, _, text = entry.partition(":")
            if name in model.model_fields:
                texts[name] = " ".join(text.split())
    missing = [name for name in model.model_fields if name not in texts]
    assert not missing or not model.__doc__, f"{model.__name__} does not describe {', '.join(missing)}: a line under Attributes"
    return texts


def plain(text: str) -> str:
    """Return a text of a docstring without its marks."""
    return text.replace("`", "")


def default_of(field: FieldInfo) -> Any:
    """Return the default of a field, as JSON holds it."""
    return json.loads(json.dumps(field.get_default(call_default_factory=True)))


def members(annotation: object) -> Iterator[tuple[object, tuple[object, ...]]]:
    """Yield what a union is made of, each with the bounds that are annotated to it."""
    if get_origin(annotation) is Annotated:
        inner, *bounds = get_args(annotation)
        yield from ((kind, (*bounds, *more)) for kind, more in members(inner))
    elif get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from members(part)
    else:
        yield annotation, ()


def parts_of(field: FieldInfo) -> list[tuple[Any, tuple[object, ...]]]:
    """Return the types that a field may have, with their bounds."""
    return [(kind, (*field.metadata, *bounds)) for kind, bounds in members(field.annotation)]


def choices_of(kind: object) -> tuple[str, ...]:
    """Return the words of a `Literal`, nothing for another type."""
    return get_args(kind) if get_origin(kind) is Literal else ()


def bound(bounds: tuple[object, ...], which: str) -> float | None:
    """Return ``ge``, ``gt``, ``le`` or ``lt`` of a number, None where it has none."""
    for one in bounds:
        constraint = one if not isinstance(one, FieldInfo) else None
        metadata = one.metadata if isinstance(one, FieldInfo) else [constraint]
        for m in metadata:
            if not isinstance(m, Flag) and (value := getattr(m, which, None)) is not None:
                return float(value)
    return None


def _number(value: float) -> str:
    if value == 2**32:
        return "2^32"
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def range_of(bounds: tuple[object, ...]) -> str:
    """Return the bounds of a number in words: ``above 0 and at most 1``; nothing where it has none."""
    words = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
    return " and ".join(f"{word} {_number(v)}" for which, word in words if (v := bound(bounds, which)) is not None)


def _words(kind: Any, bounds: tuple[object, ...]) -> str:
    if kind is bool:
        return "true, false"
    if kind in (int, float):
        return f"{'a whole number' if kind is int else 'a number'} {range_of(bounds)}".rstrip()
    if choices := choices_of(kind):
        return ", ".join(f"`{c}`" for c in choices)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "a mapping, see below"
    origin = get_origin(kind)
    if origin is dict:
        return "a mapping"
    if origin in (tuple, list):
        inner = choices_of(get_args(kind)[0])
        return "a list" + (" of " + ", ".join(f"`{c}`" for c in inner) if inner else "")
    return "null" if kind is type(None) else "text"


def values_of(field: FieldInfo) -> str:
    """Return which values a field takes, in words."""
    return " or ".join(dict.fromkeys(_words(kind, bounds) for kind, bounds in parts_of(field)))


def table(model: type[BaseModel]) -> str:
    """Return a Markdown table of the fields: key, meaning, default, values."""
    lines = ["| key | meaning | default | values |", "|---|---|---|---|"]
    for name, text in help_of(model).items():
        field = model.model_fields[name]
        usual = "required" if field.is_required() else _shown(default_of(field))
        meaning = text.replace("``", "`")
        lines.append(f"| `{name}` | {meaning} | {usual} | {values_of(field)} |")
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def listed_or_counted(text: str) -> int | str | tuple[str, ...]:
    """Return a number, ``auto``, or the names between commas."""
    text = text.strip()
    if text == "auto" or text.isdecimal():
        return int(text) if text != "auto" else text
    return tuple(n.strip() for n in text.split(",") if n.strip())


LEAST_TIME_S, LONGEST_TIME_S = 10, 24 * 3600
"""Of what `duration` reads."""


def counts(text: str) -> tuple[int, ...]:
    """Return the numbers between commas, each once.

    Raises:
        BadInput: They are none.
    """
    parts = [p.strip() for p in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,9}", p) and int(p) > 0 for p in parts):
        raise BadInput(f"'{text}' names no batches", remedy="write 1 or 1,8,32")
    return tuple(dict.fromkeys(int(p) for p in parts))


def duration(text: str) -> int:
    """Return the seconds of ``90s``, ``30m`` or ``1.5h``.

    Raises:
        BadInput: It is no such time, or one that is too short or too long.
    """
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)(s|m|h)", text.strip())
    seconds = float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if not LEAST_TIME_S <= seconds <= LONGEST_TIME_S:
        raise BadInput(f"'{text}' is no time from 10s to 24h", remedy="write 90s, 30m or 2h")
    return round(seconds)


def wrong_value(model: type[BaseModel], found: ValidationError) -> tuple[str, str]:
    """Return where the first value stands that a model does not take, as a dotted key, and what is wrong with it.

    A setting of several kinds (`dynamic` or a whole number) is told with all that it takes: pydantic names one kind alone.

    Args:
        model: The class that was to be made.
        found: What pydantic says.
    """
    error = found.errors()[0]
    place = [str(part) for part in error["loc"]]
    at, depth = _field_at(model, place)
    message = error["msg"].removeprefix("Value error, ")
    if at is not None and error["type"] not in ("value_error", "assertion_error", "extra_forbidden", "missing"):
        kinds = [(kind, bounds) for kind, bounds in parts_of(at) if kind is not type(None)]
        listed = [kind for kind, _ in kinds if get_origin(kind) in (tuple, list)]
        inside = any(isinstance(part, int) for part in error["loc"][depth:])
        if not inside and (len(kinds) > 1 or error["type"] in ("tuple_type", "list_type")):
            message = "takes " + " or ".join(dict.fromkeys(plain(_words(kind, bounds)) for kind, bounds in kinds))
            if listed and isinstance(error["input"], str):
                message += f", such as [{error['input']}]"
            place = place[:depth]
    given = "" if isinstance(error["input"], dict) else f" (given: {shown(error['input'])})"
    return ".".join(place), message + given


def _field_at(model: type[BaseModel], place: list[str]) -> tuple[FieldInfo | None, int]:
    """Return the field that a place lies in, None where it is none, and how many names lead to it."""
    kind: type[BaseModel] | None = model
    found: FieldInfo | None = None
    for depth, name in enumerate(place):
        if kind is None or name not in kind.model_fields:
            return found, depth
        found = kind.model_fields[name]
        kind = next((k for k, _ in parts_of(found) if isinstance(k, type) and issubclass(k, BaseModel)), None)
    return found, len(place)
