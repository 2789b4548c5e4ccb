"""Finds the network inside whatever a file wraps around it.

A file's tree is flattened to dotted keys (``state_dict.module.backbone.layer1.0.conv1.weight``), so wrappers of trainers,
prefixes of parallel modules and names of submodules all look the same: they stand before the keys that a format marks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from compress.checkpoints.base import Derived, Root, Stored
from compress.checkpoints.files import Opened
from compress.checkpoints.pickles import Record
from rescompress.core.errors import CheckpointError

MAX_TENSORS = 100_000
MAX_NODES = 1_000_000
MAX_DEPTH = 60

_TRANSPARENT = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_ddp_params_and_buffers"}
AVERAGED = re.compile(r"ema|averaged|swa|momentum|teacher|target|encoder_k|key_encoder|shadow", re.IGNORECASE)
_FAKE_QUANTIZER = re.compile(
    r"(^|\.)(activation_post_process|weight_fake_quant|\w*_fake_quant|fake_quant_enabled|observer_enabled|"
    r"(input|weight|output)_quantizer|_amax|activation_quantizer|act_quantizer)(\.|$)"
)
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


def around(opened: Opened, prefix: str, others: Iterable[str]) -> dict[str, Record]:
    """Return the modules of the larger one that a network is a member of, without the network's own and other networks'.

    Args:
        opened: The file.
        prefix: Of the network's keys.
        others: Prefixes of all networks in the file.
    """
    found = {key: node for key, node, _ in _walk(opened.content) if isinstance(node, Record) and "_modules" in node.state}
    above = [key for key in found if prefix.startswith(f"{key}." if key else "") and prefix]
    if not above:
        return {}
    top = min(above, key=len)
    apart = (prefix, *_apart(prefix, others))
    return {
        key: node
        for key, node in found.items()
        if key not in above and key.startswith(f"{top}." if top else "") and not f"{key}.".startswith(apart)
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


def beside(root: Root, others: Iterable[str]) -> dict[str, Stored]:
    """Return what stands outside of the network, without the other networks in the file and what belongs to them.

    Args:
        root: The network.
        others: Prefixes of all networks in the file.
    """
    apart = tuple(_apart(root.prefix, others))
    return {k: v for k, v in root.outside.items() if not k.startswith(apart) and not _USELESS.search(k)}


def _apart(prefix: str, others: Iterable[str]) -> Iterator[str]:
    """Yield the prefixes of what other networks stand in, as far up as they part from the network behind `prefix`."""
    mine = prefix.split(".")
    for other in others:
        parts = other.split(".")
        differ = next((i for i, (a, b) in enumerate(zip(parts, mine, strict=False)) if a != b), None)
        if differ is not None and parts[differ]:
            yield ".".join(parts[: differ + 1]) + "."


def without_masks(tensors: Mapping[str, Stored]) -> tuple[dict[str, Stored], list[str]]:
    """Return the tensors with the masks of ``torch.nn.utils.prune`` applied, and a note where there were any.

    A masked parameter is stored as ``weight_orig`` and ``weight_mask``; the network computes with their product.
    """
    masked = [k[: -len("_orig")] for k in tensors if k.endswith("_orig") and f"{k[: -len('_orig')]}_mask" in tensors]
    masked = [key for key in masked if tensors[f"{key}_orig"].shape == tensors[f"{key}_mask"].shape]
    if not masked:
        return dict(tensors), []
    found: dict[str, Stored] = {}
    for key, stored in tensors.items():
        name = key.removesuffix("_orig")
        if name in masked and name != key:
            found[name] = _product(stored, tensors[f"{name}_mask"])
        elif key.removesuffix("_mask") not in masked and key not in masked:
            found[key] = stored
    return found, [f"masks of torch.nn.utils.prune were applied to {len(masked)} parameters: the zeros stay in the weights"]


def _product(stored: Stored, mask: Stored) -> Derived:
    return Derived(stored.shape, lambda: stored.read() * mask.read())


def refuse_fake_quantizers(tensors: Mapping[str, Stored]) -> None:
    """Refuse a network that was prepared for quantization elsewhere; its rounding is a part of what it computes.

    Raises:
        CheckpointError: Keys of quantizers are there.
    """
    for key in tensors:
        if _FAKE_QUANTIZER.search(key) and not _USELESS.search(key):
            raise CheckpointError(
                f"was prepared for quantization by another tool (it holds {key[:100]!r})",
                remedy="give the float checkpoint that it was made from: `rescompress quantize` does the rest",
            )
