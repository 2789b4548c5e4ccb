"""What stands beside the weights in a file, as plain values: settings, arguments, names that a training script stored there.

Dictionaries, ``argparse.Namespace`` and the like, OmegaConf nodes, numpy arrays and scalars, small tensors and JSON text all
become numbers, text, lists and dictionaries. Nothing is run for that: objects are records of `compress.checkpoints.pickles`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

from compress.checkpoints.pickles import Record

MAX_VALUES = 100_000
MAX_DEPTH = 4
_NUMPY = re.compile(r"numpy\.(_core|core)\.multiarray\.(scalar|_reconstruct)$")
_DTYPE = re.compile(r"([biufSU])(\d{1,6})$")
_PLACES = re.compile(
    r"_?(meta(_?data)?|dataset_meta|info|(model|train(ing)?|data(set)?|run|exp(eriment)?|test|eval|val)?_?"
    r"(info|config(uration)?|cfg|conf|args|arguments|kwargs|opts?|options|params|parameters|settings|specs?|card)"
    r"|h(yper)?_?param(eter)?s|(datamodule|init)_(hyper_parameters|args)|init_args|namespace|extra(s)?|data|dataset|datamodule|"
    r"model|net(work)?|(label|target|class)_?(encoder|binarizer)|le|preprocess(ing|or)?(_config)?|transforms?|pretrained_cfg|"
    r"default_cfg|backbone|encoder|resnet|input|image|img|custom|user|attrs?|attributes|normali[sz]e|normali[sz]ation|(img_)?norm_cfg|(image_)?stats)$",
    re.IGNORECASE,
)
"""Names of dictionaries in which training scripts keep such facts."""


def places(*contents: object) -> Iterator[tuple[str, Mapping[object, object]]]:
    """Yield every dictionary that may hold facts, by the path to it, the outer ones first.

    Args:
        contents: Of the file: the tree that holds the weights, and the metadata beside it.
    """
    todo: list[tuple[str, object, int]] = [("", content, 0) for content in contents]
    seen = 0
    while todo and seen < MAX_VALUES:
        path, node, depth = todo.pop(0)
        held = mapping(node)
        if held is None:
            continue
        seen += 1 + len(held)
        yield path, held
        if depth < MAX_DEPTH:
            todo += [
                (f"{path}{key}.", value, depth + 1)
                for key, value in held.items()
                if isinstance(key, str) and _PLACES.match(key) and not hasattr(value, "read")
            ]


def mapping(node: object) -> Mapping[object, object] | None:
    """Return what a node holds by name, or None where it is no dictionary and no object with attributes."""
    if isinstance(node, Record):
        inner = node.state.get("_content")
        if isinstance(inner, Mapping):
            return inner
        return node.state if node.state and not isinstance(node.state.get("items"), list) else None
    if isinstance(node, str):
        found = _json(node)
        return found if isinstance(found, Mapping) else None
    return node if isinstance(node, Mapping) else None


def _json(text: str) -> object:
    if text[:1] not in "[{" or len(text) > 10 * MAX_VALUES:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def plain(value: object, depth: int = 0) -> object:
    """Return a value as numbers, text, lists and dictionaries of them; what is none of these as it is.

    Args:
        value: A leaf or a small tree.
        depth: How far inside of another.
    """
    if depth > MAX_DEPTH:
        return value
    if isinstance(value, Record):
        return _of_record(value, depth)
    if isinstance(value, str):
        return _json(value) if depth == 0 else value
    if hasattr(value, "read") and hasattr(value, "shape"):
        short = len(value.shape) <= 1 and all(n <= MAX_VALUES for n in value.shape)
        return value.read().tolist() if short else value
    if isinstance(value, list | tuple):
        return [plain(v, depth + 1) for v in value] if len(value) <= MAX_VALUES else value
    if isinstance(value, Mapping):
        return {k: plain(v, depth + 1) for k, v in value.items()} if len(value) <= MAX_VALUES else value
    return value


def _of_record(record: Record, depth: int) -> object:
    if _NUMPY.search(record.path):
        return _numpy(record, depth)
    for name in ("_val", "items", "_content"):
        inner = record.state.get(name)
        if inner is not None and not (name == "_content" and isinstance(inner, Mapping)):
            return plain(inner, depth + 1)
    return plain(record.content, depth + 1) if isinstance(record.content, list | tuple) else record


def _numpy(record: Record, depth: int) -> object:
    """Return the values of a pickled numpy array or scalar."""
    if record.path.endswith("scalar"):
        dtype, data = (*record.args, None, None)[:2]
        found = _values(dtype, data, depth)
        return found[0] if isinstance(found, list) and found else record
    content = record.content
    if not isinstance(content, tuple) or len(content) < 5 or not isinstance(content[1], tuple) or len(content[1]) > 1:
        return record
    found = _values(content[2], content[4], depth)
    return record if found is None else found[0] if content[1] == () and found else found


def _values(dtype: object, data: object, depth: int) -> list[object] | None:
    import numpy as np

    if isinstance(data, list):  # of objects
        return [plain(v, depth + 1) for v in data] if len(data) <= MAX_VALUES else None
    if isinstance(data, Record) and data.path == "_codecs.encode" and data.args and isinstance(data.args[0], str):
        data = data.args[0].encode("latin-1", "replace")
    if not isinstance(dtype, Record) or not dtype.args or not isinstance(data, bytes) or len(data) > 400 * MAX_VALUES:
        return None
    kind = _DTYPE.search(str(dtype.args[0]))
    order = dtype.content[1] if isinstance(dtype.content, tuple) and len(dtype.content) > 1 else "|"
    if kind is None or order not in ("<", ">", "|", "=") or int(kind[2]) == 0:
        return None
    try:
        found = np.frombuffer(data, np.dtype(f"{order}{kind[0]}")).tolist()
    except (TypeError, ValueError):
        return None
    return [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in found]
