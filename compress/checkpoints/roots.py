"""Finds the network inside whatever a file wraps around it.

A file's tree is flattened to dotted keys (``state_dict.module.backbone.layer1.0.conv1.weight``), so wrappers of trainers,
prefixes of parallel modules and names of submodules all look the same: they stand before the keys that a format marks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from compress.checkpoints.base import Root, Stored
from compress.checkpoints.files import Opened
from compress.checkpoints.pickles import Record
from rescompress.core.errors import CheckpointError

MAX_TENSORS = 100_000
MAX_NODES = 1_000_000
MAX_DEPTH = 60

_TRANSPARENT = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_ddp_params_and_buffers"}
AVERAGED = re.compile(r"ema|averaged|swa|momentum|teacher|target|encoder_k|key_encoder|shadow", re.IGNORECASE)
_USELESS = re.compile(r"(^|\.)(optimizer|optimizer_states|opt|scheduler|lr_schedulers|scaler|amp|loops|callbacks)(\.|$)")


def flatten(opened: Opened) -> dict[str, Stored]:
    """Return every tensor of a file by its dotted key.

    Raises:
        CheckpointError: Two tensors get one key, or there are absurdly many.
    """
    found: dict[str, Stored] = {}
    for nodes, (key, _, tensor) in enumerate(_walk(opened.content)):
        if nodes > MAX_NODES or len(found) > MAX_TENSORS:
            raise CheckpointError("holds absurdly many entries", remedy="give the state_dict alone")
        if tensor is None:
            continue
        if key in found:
            raise CheckpointError(f"two tensors are called {key[:200]!r} once wrappers are removed", remedy="save it again")
        found[key] = tensor
    return found


def modules(opened: Opened, prefix: str) -> dict[str, Record]:
    """Return the modules of a network that was saved as a whole, by their names in it; nothing for a state_dict.

    Args:
        opened: The file.
        prefix: Of the network's keys.
    """
    return {
        key[len(prefix) :]: node
        for key, node, _ in _walk(opened.content)
        if isinstance(node, Record) and key.startswith(prefix) and "_modules" in node.state
    }


def _walk(content: object) -> Iterator[tuple[str, object, Stored | None]]:
    """Yield every node of the tree by its dotted key, and its tensor where it is one."""
    todo: list[tuple[str, object, int]] = [("", content, 0)]
    while todo:
        key, node, depth = todo.pop()
        tensor: Stored | None = None
        if isinstance(node, Record):
            inner: Iterable[tuple[object, object]] = _attributes(node)
        elif isinstance(node, Mapping):
            inner = node.items()
        elif isinstance(node, list | tuple) and len(node) <= MAX_DEPTH:
            inner = [(str(i), v) for i, v in enumerate(node) if isinstance(v, Mapping | Record)]
        elif hasattr(node, "read") and hasattr(node, "shape"):
            tensor, inner = node, ()
        else:
            continue
        yield key, node, tensor
        if depth < MAX_DEPTH:
            todo.extend((_join(key, k), v, depth + 1) for k, v in reversed(list(inner)) if isinstance(k, str) and v is not None)


def _join(prefix: str, key: str) -> str:
    key = ".".join(part for part in key.split(".") if part not in _TRANSPARENT) if "_" in key else key
    return f"{prefix}.{key}" if prefix and key else prefix or key


def _attributes(record: Record) -> list[tuple[object, object]]:
    """Return what a module's record holds, named as in its state_dict; other records likewise by attribute."""
    parts: list[tuple[object, object]] = []
    for name, value in record.state.items():
        if name in ("_parameters", "_buffers", "_modules") and isinstance(value, Mapping):
            parts.extend(value.items())
        elif isinstance(name, str) and name.startswith("_") and name not in _TRANSPARENT:
            continue  # hooks and other internals
        elif isinstance(value, (Record, Mapping)) or hasattr(value, "read"):
            parts.append((name, value))
    return parts


def roots(tensors: Mapping[str, Stored], marker: re.Pattern[str]) -> list[Root]:
    """Return every place where `marker` finds a network, the likeliest first: plain before averaged, short before long.

    Args:
        tensors: The flattened file.
        marker: Matches from the start of a key that belongs to a network.
    """
    prefixes = set()
    for key in tensors:
        if _USELESS.search(key):
            continue
        for start in (0, *(i + 1 for i, c in enumerate(key) if c == ".")):
            if marker.match(key, start):
                prefixes.add(key[:start])
                break
    found = []
    for prefix in sorted(prefixes, key=lambda p: (bool(AVERAGED.search(p)), p.count("."), len(p), p)):
        inside = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        if not prefix:
            inside = {k: v for k, v in inside.items() if not _USELESS.search(k)}
        found.append(
            Root(prefix, inside, {k: v for k, v in tensors.items() if not k.startswith(prefix)}, bool(AVERAGED.search(prefix)))
        )
    return found


def heads_outside(root: Root) -> Iterator[tuple[str, dict[str, Stored]]]:
    """Yield, nearest enclosing module first, the tensors beside the network that may be its classifier."""
    parts = root.prefix.rstrip(".").split(".") if root.prefix else []
    while parts:
        parts.pop()
        prefix = ".".join([*parts, ""]) if parts else ""
        beside = {k[len(prefix) :]: v for k, v in root.outside.items() if k.startswith(prefix) and not _USELESS.search(k)}
        if beside:
            yield prefix, beside


def strangers(root: Root, others: Iterable[str]) -> list[str]:
    """Return the keys of convolutions outside of the network: parts of a larger one (a detector, a decoder).

    Args:
        root: The network.
        others: Prefixes of other networks in the file, whose parts are known.
    """
    known = tuple(prefix for prefix in others if prefix)
    return [
        key
        for key, stored in root.outside.items()
        if len(stored.shape) >= 3 and not key.startswith(known) and not _USELESS.search(key) and not AVERAGED.search(key)
    ]
