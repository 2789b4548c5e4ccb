"""Reads the weights of a ``torch.export`` archive (``.pt2``) without running its program.

Layout (torch.export.save, archive version 0; ``torch/export/pt2_archive/constants.py`` of torch 2.9 and later): a zip file
with ``<name>/data/weights/<model>_weights_config.json``, which maps each parameter and buffer to a member beside it and to
its dtype, sizes, strides and offset.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compress.checkpoints import pickles
from compress.checkpoints.files import EXPORTED_TABLE, Opened, ZipStorages, read_member, unique_pairs
from rescompress.core.errors import CheckpointError

MAX_CONFIG_BYTES = 100_000_000

_DTYPES = {  # torch/_export/serde/schema.py, ScalarType
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}


def open_exported(path: Path, members: Mapping[str, zipfile.ZipInfo]) -> Opened:
    """Return the parameters and buffers of an exported program, by name; they stay in the file until they are read.

    Args:
        path: The archive.
        members: Its members by name, at least one of them with a name that ends in `EXPORTED_TABLE`.

    Raises:
        CheckpointError: The archive is damaged, holds several models, or a weight that is stored as a pickle.
    """
    configs = [name for name in members if name.endswith(EXPORTED_TABLE)]
    if len(configs) != 1:
        raise CheckpointError(f"holds {len(configs)} exported models", remedy="export one network into a file of its own")
    folder = configs[0].rpartition("/")[0] + "/"
    try:
        text = read_member(path, members[configs[0]], MAX_CONFIG_BYTES)
        entries = json.loads(text, object_pairs_hook=unique_pairs)["config"]
        described = {str(key): dict(entry) for key, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"damaged: its table of weights ({e})", remedy="export the network again") from e
    storages = ZipStorages(path, {n[len(folder) :]: info for n, info in members.items() if n.startswith(folder)})
    return Opened("torch.export", {key: _tensor(key, e, storages, members, folder) for key, e in described.items()})


def _tensor(
    key: str, entry: dict[str, Any], storages: ZipStorages, members: Mapping[str, zipfile.ZipInfo], folder: str
) -> pickles.StoredTensor:
    if entry.get("use_pickle"):
        raise CheckpointError(f"weight {key[:200]!r} is stored as a pickle", remedy="save the state_dict with safetensors")
    meta, member = entry.get("tensor_meta"), entry.get("path_name")
    if not isinstance(meta, dict) or f"{folder}{member}" not in members:
        raise CheckpointError(f"damaged: the data of {key[:200]!r} is missing", remedy="export the network again")
    code = meta.get("dtype")
    dtype = _DTYPES.get(code) if isinstance(code, int) else None
    if dtype is None:
        raise CheckpointError(f"tensor {key[:200]!r} has a dtype (number {code!r}) that is not supported")
    storage = pickles.Storage(storages, str(member), dtype, members[f"{folder}{member}"].file_size)
    sizes, strides = (_integers(meta.get(part)) for part in ("sizes", "strides"))
    return pickles.stored_tensor(storage, _integer(meta.get("storage_offset")), sizes, strides)


def _integers(values: object) -> list[object]:
    return [_integer(value) for value in values] if isinstance(values, list) else [None]


def _integer(value: object) -> object:
    return value.get("as_int") if isinstance(value, dict) else None
