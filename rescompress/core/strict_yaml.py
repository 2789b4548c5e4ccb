"""YAML as people mean it: one reader for configs, limits, labels, devices and ``--set``.

It takes for a number, a truth value or nothing what is one in YAML 1.1 and in the core schema of YAML 1.2. Where 1.1 sees
another number (``010`` is 8, ``1:30`` is 90), the text is refused with its line; ``yes`` and ``no`` are text. Refused are
keys that stand twice, tags, and aliases that blow a few lines up to gigabytes, too. Keys are text as they are written: a
folder may be called ``no``, ``08`` or ``null``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rescompress.core.artifact import read_text
from rescompress.core.errors import ConfigError, shown

Node = Any
"""A node of PyYAML's; its stubs do not know what kinds have in common."""
MOST_VALUES = 10_000
"""How many values aliases may stand for, beyond those that are written out."""
LONGEST = 2 * 2**20
"""Characters of a document."""
MOST_WRITTEN = 50_000
"""Lines and commas of a document: reading takes a second for ten thousand of them."""
_LONGEST_NUMBER = 100
_STANDARD = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_GROUPED = re.compile(r"[-+]?[1-9][0-9]{0,2}(_[0-9]{3})+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")
_PLAIN: dict[str, bool | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_PLAIN |= dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(("false", "False", "FALSE"), False)


class StrictYamlError(ValueError):
    """A document that is no YAML, or means different things to different readers."""


def load(path: Path, *, missing: str, remedy: str, texts: Collection[str] | None = ()) -> Any:
    """Return what a YAML file holds.

    Args:
        path: The file.
        missing: What to do where there is none.
        remedy: What to do where it is no YAML.
        texts: As for `parse`.

    Raises:
        ConfigError: It is missing, cannot be read, or is refused by `parse`.
    """
    try:
        return parse(read_text(path), texts=texts)
    except FileNotFoundError as e:
        raise ConfigError("no such file", where=str(path), remedy=missing) from e
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise ConfigError(f"cannot be read: {reason}", where=str(path), remedy="check its name and rights") from e
    except StrictYamlError as e:
        raise ConfigError(str(e), where=str(path), remedy=remedy) from e


def parse(text: str, *, texts: Collection[str] | None = ()) -> Any:
    """Return the value of a YAML document: None, bool, int, float, str, lists and dictionaries with text as keys.

    Args:
        text: The document.
        texts: Keys of its outermost mapping below which every value is text as it is written; None for all of it.

    Raises:
        StrictYamlError: It is no YAML, or not plain.
    """
    import yaml

    if len(text) > LONGEST:
        raise StrictYamlError(f"longer than {LONGEST >> 20} MiB")
    if text.count("\n") + text.count(",") > MOST_WRITTEN:
        raise StrictYamlError(f"more than {MOST_WRITTEN} lines or values")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as e:
        raise StrictYamlError(f"is no YAML: {e}") from e
    except ValueError as e:
        raise StrictYamlError(f"cannot be read: {e}") from e
    except RecursionError as e:
        raise StrictYamlError("is nested too deeply") from e
    if node is None:
        return None
    try:
        _check_aliases(node)
        return _value(node, texts=texts is None, below=frozenset(texts or ()))
    except RecursionError as e:
        raise StrictYamlError("is nested too deeply") from e


def _children(node: Node) -> list[Node]:
    if node.id == "mapping":
        return [child for pair in node.value for child in pair]
    return list(node.value) if node.id == "sequence" else []


def _check_aliases(root: Node) -> None:
    """Refuse aliases that contain themselves, or that stand for more values than anybody writes."""
    sizes: dict[int, int] = {}
    begun: set[int] = set()

    def size(node: Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in begun:
            raise _refused(node, "contains itself by an alias", "write it out")
        begun.add(id(node))
        sizes[id(node)] = 1 + sum(size(child) for child in _children(node))
        return sizes[id(node)]

    if size(root) > len(sizes) + MOST_VALUES:
        raise _refused(root, f"its aliases stand for more than {MOST_VALUES} values", "write out what is meant")


def _refused(node: Node, what: str, remedy: str) -> StrictYamlError:
    return StrictYamlError(f"line {node.start_mark.line + 1}: {what}: {remedy}")


def _value(node: Node, *, texts: bool, below: frozenset[str] = frozenset()) -> Any:
    plain = node.id == "scalar" and node.style is None
    allowed = {"scalar": ("str", "int", "float", "bool", "null"), "sequence": ("seq",), "mapping": ("map",)}[node.id]
    implicit = {"timestamp", "value", "merge"} if plain else set()  # what YAML 1.1 sees in plain text
    if node.tag.removeprefix(_STANDARD) not in {*allowed, *implicit}:
        raise _refused(node, f"the tag {shown(node.tag)} is not taken", "leave it out")
    if node.id == "sequence":
        return [_value(child, texts=texts) for child in node.value]
    if node.id == "mapping":
        return _mapping(node, texts=texts, below=below)
    if not plain or texts:  # JSON escapes one character beyond 16 bits as two halves
        return node.value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    return _scalar(node)


def _mapping(node: Node, *, texts: bool, below: frozenset[str]) -> dict[str, Any]:
    lines: dict[str, int] = {}
    found: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for key, value in node.value:
        if key.id != "scalar":
            raise _refused(key, "a key is a list or a mapping", "name one setting")
        name, line = _value(key, texts=True), key.start_mark.line + 1
        if name in lines:
            raise StrictYamlError(f"line {line}: {shown(name)} stands in line {lines[name]} already: keep one of them")
        lines[name] = line
        if name == "<<" and key.style is None and value.id != "scalar":
            for base in value.value if value.id == "sequence" else [value]:
                if base.id != "mapping":
                    raise _refused(base, "<< takes mappings", "name one with an alias")
                for inherited, content in _mapping(base, texts=texts, below=below).items():
                    merged.setdefault(inherited, content)
            continue
        found[name] = _value(value, texts=texts or (name in below and value.id != "scalar"))
    return {**merged, **found}


def _scalar(node: Node) -> Any:
    """Return what both YAML 1.1, by which PyYAML tags plain text, and YAML 1.2 see in it; text where either sees text.

    Settings that want a number take it from text such as ``1e3``, too.
    """
    text, tag = node.value, node.tag.removeprefix(_STANDARD)
    if text in _PLAIN:
        return _PLAIN[text]
    if _FLOAT.fullmatch(text) and len(text) < _LONGEST_NUMBER and math.isinf(float(text)):
        raise _refused(node, f"{text} is beyond every number", "write .inf where no limit is meant")
    if tag not in ("int", "float"):
        return text
    if len(text) > _LONGEST_NUMBER:
        raise _refused(node, f"a number of {len(text)} characters", "put it in quotes if it is text")
    if _INT.fullmatch(text) or _GROUPED.fullmatch(text):
        return int(text.replace("_", ""))
    if _HEX.fullmatch(text):
        return int(text, 16)
    if _FLOAT.fullmatch(text) and tag == "float":
        return float(text)
    if _INF.fullmatch(text):
        return -math.inf if text[0] == "-" else math.inf
    if _NAN.fullmatch(text):
        return math.nan
    digits = text.lstrip("+-")
    plain = f"{text[: len(text) - len(digits)]}{int(digits)}" if digits.isdecimal() else "the number in plain digits"
    raise _refused(
        node, f"{text} is one number in YAML 1.1 and another, or text, in YAML 1.2", f"write {plain}, or '{text}' for text"
    )
