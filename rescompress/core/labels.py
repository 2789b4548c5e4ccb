"""Labels as people write them: which label of the checkpoint each class folder means.

Names are taken as they are written: to YAML ``yes``, ``010`` and ``12:30`` are a truth value and numbers, to whoever named a
folder they are its name.
"""

from __future__ import annotations

from pathlib import Path

from rescompress.core.errors import BadInput

_REMEDY = "write lines of the form 'folder: label'"


def parse_labels(text: str | None) -> dict[str, str] | None:
    """Return folder -> label from ``folder=label,...`` or from a JSON or YAML file that holds the mapping.

    Raises:
        BadInput: It is neither.
    """
    if text is None:
        return None
    path = Path(text)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # longer than a file's name may be
        is_file = False
    if is_file:
        try:
            return written_mapping(path.read_text(encoding="utf-8-sig"), text)
        except (OSError, UnicodeDecodeError) as e:
            raise BadInput(f"cannot be read: {e}", where=text, remedy=_REMEDY) from e
    pairs = [part.split("=", 1) for part in text.split(",") if part]
    if not pairs or any(len(pair) != 2 or not all(map(str.strip, pair)) for pair in pairs):
        short = text if len(text) < 100 else f"{text[:100]}..."
        raise BadInput(
            f"'{short}' is no mapping",
            where="--labels",
            remedy="write folder=label,folder=label or name a file; names with , or = go into a file",
        )
    found: dict[str, str] = {}
    for folder, label in pairs:
        if found.setdefault(folder.strip(), label.strip()) != label.strip():
            raise BadInput(f"'{folder.strip()}' has two labels", where="--labels", remedy="name each folder once")
    return found


def written_mapping(text: str, where: str, key: str | None = None) -> dict[str, str]:
    """Return the mapping of name to name that a YAML or JSON document holds, each as it is written.

    Args:
        text: The document.
        where: For the error.
        key: The key of the document below which the mapping stands; the whole document if None.

    Raises:
        BadInput: It holds none, or a name stands for more than one text.
    """
    import yaml

    try:
        if key is None:
            _refuse_nesting(text, where)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise BadInput(f"holds no mapping: {str(e) or type(e).__name__}", where=where, remedy=_REMEDY) from e
    if key is not None and isinstance(node, yaml.MappingNode):
        node = next((v for k, v in reversed(node.value) if isinstance(k, yaml.ScalarNode) and k.value == key), None)
    prefix = f"{key}: " if key else ""
    if not isinstance(node, yaml.MappingNode):
        raise BadInput(f"{prefix}holds no mapping", where=where, remedy=_REMEDY)
    found: dict[str, str] = {}
    for name, label in node.value:
        line = name.start_mark.line + 1
        if not isinstance(name, yaml.ScalarNode) or not isinstance(label, yaml.ScalarNode) or not label.value.strip():
            raise BadInput(f"{prefix}line {line} gives no single label", where=where, remedy=_REMEDY)
        if name.value in found:
            raise BadInput(f"{prefix}line {line} names '{name.value[:100]}' again", where=where, remedy="name each folder once")
        found[name.value] = label.value
    return found


def _refuse_nesting(text: str, where: str) -> None:
    """Refuse what holds more than one level before it is read further: deep nesting takes a parser minutes."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 1:
            line = event.start_mark.line + 1 if event.start_mark is not None else 1
            raise BadInput(f"line {line} gives no single label", where=where, remedy=_REMEDY)
