"""Opens Keras files with h5py alone: ``.h5`` of tf.keras 2 and Keras 3, ``.weights.h5`` and ``.keras`` of Keras 3.

Layouts (found by looking at files that Keras 3.15 and TensorFlow 2 write):

* legacy ``.h5``: ``[model_weights/]<layer>/.../<layer>/kernel[:0]``; the attribute ``model_config`` holds the architecture.
* Keras 3: ``layers/conv2d_7/vars/0``; the group ``vars`` carries the layer's own name as an attribute. A ``.keras`` file is
  a zip of such a file and ``config.json``; old ones without the attribute are named from there.

Both become the same flat table: ``<layer name>.<kernel|bias|gamma|beta|moving_mean|moving_variance>``.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.checkpoints.base import Shape
from compress.checkpoints.files import MAX_EXPANSION, Opened, read_member, unique_pairs
from compress.checkpoints.keras_layers import MAX_DEPTH, children, leaves
from rescompress.core.errors import CheckpointError, ToolMissing

MAX_DATASETS = 100_000
MAX_CONFIG_BYTES = 64 * 2**20
_PARTS = {"kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance", "mean", "variance"}
_PARTS |= {"depthwise_kernel", "pointwise_kernel"}
_KERAS_1 = {
    "W": "kernel",
    "b": "bias",
    "gamma": "gamma",
    "beta": "beta",
    "running_mean": "moving_mean",
    "running_std": "moving_variance",
}
"""Endings of Keras 1, which calls a weight ``<layer>_W``; its running_std holds variances."""
_SEPARABLE = ("depthwise_kernel", "pointwise_kernel", "bias")
_BY_RANK = {4: ("kernel", "bias"), 2: ("kernel", "bias"), 1: ("gamma", "beta", "moving_mean", "moving_variance")}


@dataclass(frozen=True)
class H5Tensor:
    """A dataset of an HDF5 file, on disk or in memory."""

    source: Path | io.BytesIO
    name: str
    shape: Shape

    def read(self) -> Tensor:
        """Return the values, as float32 unless they are stored otherwise."""
        import h5py
        import numpy as np

        try:
            with h5py.File(self.source, "r") as f:
                values = np.ascontiguousarray(f[self.name][()])
        except Exception as e:  # the HDF5 library fails in many ways on damaged files
            raise _damaged(f"{self.name} cannot be read ({e})") from e
        return torch.from_numpy(values)


def _damaged(why: str) -> CheckpointError:
    return CheckpointError(f"damaged: {why}", remedy="fetch or save the file again")


def _need_h5py() -> None:
    try:
        import h5py  # noqa: F401
    except ImportError as e:
        raise ToolMissing("Keras files need the package h5py", remedy="pip install h5py") from e


def open_hdf5(path: Path) -> Opened:
    """Return the layers of an ``.h5`` or ``.weights.h5`` file; raises CheckpointError when it is damaged or unsafe."""
    _need_h5py()
    return _open(path, path.stat().st_size, None)


def open_keras(path: Path, members: Mapping[str, zipfile.ZipInfo]) -> Opened:
    """Return the layers of a ``.keras`` archive; raises CheckpointError when it is damaged or unsafe."""
    _need_h5py()
    config = _parse(read_member(path, members["config.json"], MAX_CONFIG_BYTES))
    name = next((n for n in members if n == "model.weights.h5"), None)
    if name is None:
        raise CheckpointError("is a .keras archive without model.weights.h5 (sharded?)", remedy="save it in one piece")
    data = read_member(path, members[name], 2 * path.stat().st_size + 2**20)
    return _open(io.BytesIO(data), len(data), config)


def _parse(text: str | bytes) -> dict[str, Any]:
    try:
        config = json.loads(text, object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError) as e:
        raise _damaged(f"its model configuration is no JSON ({e})") from e
    if not isinstance(config, dict):
        raise _damaged("its model configuration is no table")
    return config


def _open(source: Path | io.BytesIO, size: int, config: dict[str, Any] | None) -> Opened:
    import h5py

    try:
        with h5py.File(source, "r") as f:
            if config is None and "model_config" in f.attrs:
                text = f.attrs["model_config"]
                config = _parse(text if isinstance(text, bytes | str) else str(text))
            found = list(_datasets(f, size))
            names = {path: _attribute(f[path.rpartition("/")[0]], "name") for path, _ in found if "/vars/" in path}
            order = _order(f)
    except CheckpointError:
        raise
    except Exception as e:
        raise _damaged(f"the HDF5 library cannot read it ({e})") from e
    given = _names_from_config(config) if config else {}
    tensors: dict[str, H5Tensor] = {}
    ranks = {path.rpartition("/")[0]: len(shape) for path, shape in found if path.endswith("/0")}
    ranks |= {path.rpartition("/")[0]: -4 for path, shape in found if path.endswith("/vars/1") and len(shape) == 4}
    for path, shape in found:
        key = _key(path, ranks, names, given)
        if key is None:
            continue
        if key in tensors:
            raise CheckpointError(
                f"holds two tensors called {key[:200]!r}", remedy="give layers names of their own, save again"
            )
        tensors[key] = H5Tensor(source, path, shape)
    if config is not None:
        order = {name: i for i, (_, name, _) in enumerate(layers_of(config))}
    keys = sorted(tensors, key=lambda k: (order.get(k.split(".")[0], len(order)), _natural(k)))
    return Opened("hdf5", {key: tensors[key] for key in keys}, {"keras_config": config} if config else {})


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", text)]


def _attribute(group: Any, name: str) -> str | None:
    value = group.attrs.get(name)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value if isinstance(value, str) else None


def _order(f: Any) -> dict[str, int]:
    group = f.get("model_weights", f)
    names = group.attrs.get("layer_names", ())
    return {n.decode() if isinstance(n, bytes) else str(n): i for i, n in enumerate(names)}


def _datasets(f: Any, size: int) -> Iterator[tuple[str, Shape]]:
    """Yield every dataset that holds plain floats, refusing links that lead out of the file and absurd sizes."""
    import h5py

    todo: list[tuple[str, Any, int]] = [("", f, 0)]
    visited: set[Any] = set()
    total = count = 0
    while todo:
        prefix, group, depth = todo.pop()
        if depth > MAX_DEPTH:
            raise _damaged("its groups are nested beyond measure")
        for name in group:
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise CheckpointError(f"holds a link ({name[:100]!r}) instead of data", remedy="save the model again")
            item = group[name]
            path = f"{prefix}/{name}" if prefix else name
            address = h5py.h5o.get_info(item.id).addr
            if address in visited or path.split("/")[0] in ("optimizer", "optimizer_weights", "_optimizer"):
                continue
            visited.add(address)
            if isinstance(item, h5py.Group):
                todo.append((path, item, depth + 1))
            elif isinstance(item, h5py.Dataset):
                if item.external or item.is_virtual:
                    raise CheckpointError(f"the data of {path[:200]!r} lies in another file", remedy="save the model again")
                count += 1
                total += item.nbytes
                if total > MAX_EXPANSION * size or count > MAX_DATASETS or len(item.shape) > 8:
                    raise CheckpointError(f"claims to hold {total} bytes in a file of {size}: a bomb, or damaged")
                if item.dtype.kind == "f":
                    yield path, tuple(item.shape)


def _key(path: str, ranks: Mapping[str, int], names: Mapping[str, str | None], given: Mapping[str, str]) -> str | None:
    folder, _, leaf = path.rpartition("/")
    if folder.endswith("/vars") or folder == "vars":
        rank = ranks.get(folder, 0)
        parts = _SEPARABLE if rank == -4 else _BY_RANK.get(rank, ())
        if not leaf.isdecimal() or int(leaf) >= len(parts):
            return None
        layer = names.get(path) or given.get(folder.removesuffix("/vars")) or folder.removesuffix("/vars").replace("/", "_")
        return f"{layer}.{parts[int(leaf)]}"
    part = leaf.partition(":")[0]
    owner = folder.rpartition("/")[2]
    if part.startswith(f"{owner}_"):
        part = _KERAS_1.get(part.removeprefix(f"{owner}_"), part)
    if part not in _PARTS or not folder:
        return None
    return f"{folder.rpartition('/')[2]}.{part}"


def _snake(name: str) -> str:
    name = re.sub(r"\W+", "", name)
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _names_from_config(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the layer's own name by its path in a Keras 3 weights file (``layers/conv2d_7``)."""
    found: dict[str, str] = {}
    todo: list[tuple[str, Mapping[str, Any], int]] = [("", config, 0)]
    while todo:
        prefix, model, depth = todo.pop()
        used: dict[str, int] = {}
        for layer in children(model):
            base = _snake(str(layer.get("class_name", "")))
            n = used.get(base, 0)
            used[base] = n + 1
            path = f"{prefix}layers/{base}_{n}" if n else f"{prefix}layers/{base}"
            inner = layer.get("config")
            found[path] = str(inner.get("name", "")) if isinstance(inner, dict) else ""
            if depth < MAX_DEPTH:
                todo.append((f"{path}/", layer, depth + 1))
    return found


def layers_of(config: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return class, name and settings of every layer of a Keras model, nested models spelt out, in order.

    Args:
        config: The model's configuration, as Keras writes it.
    """
    return [(kind, name, settings) for kind, name, settings, _ in calls_of(config)]


def calls_of(config: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any], object]]:
    """Return class, name, settings and calls (``inbound_nodes``) of every layer, nested models spelt out, in order.

    Args:
        config: The model's configuration, as Keras writes it.
    """
    found: list[tuple[str, str, dict[str, Any], object]] = []
    for layer in leaves(config):
        inner = layer.get("config")
        settings = inner if isinstance(inner, dict) else {}
        found.append((str(layer.get("class_name", "")), str(settings.get("name", "")), settings, layer.get("inbound_nodes")))
    return found
