"""Whether a checkpoint's path leads to a file, and to a quantized one: answered at once, before anything heavy is imported."""

from __future__ import annotations

import json
from pathlib import Path

from rescompress.core.errors import CheckpointError, nearest

SUFFIXES = frozenset(
    {".safetensors", ".pt", ".pth", ".th", ".bin", ".ckpt", ".tar", ".h5", ".keras", ".hdf5", ".ts", ".pt2", ".onnx"}
)
SHOWN = 5
MAX_SAFETENSORS_HEADER = 100_000_000
"""Bytes of the longest header that is read."""


def check_path(path: Path) -> None:
    """Do nothing where `path` is a regular file.

    Raises:
        CheckpointError: It is missing, a folder, no regular file, or out of reach; the remedy names files that are near.
    """
    try:
        if path.is_dir():
            inside = ", ".join(_checkpoints(path)[:SHOWN])
            remedy = f"give the file: {inside}" if inside else "give a checkpoint file"
            raise CheckpointError("is a folder", where=str(path), remedy=remedy)
        if not path.exists():
            beside = _checkpoints(path.parent) if path.parent.is_dir() else []
            raise CheckpointError(
                "no such file", where=str(path), remedy=nearest(path.name, beside) if beside else "check the path"
            )
        if not path.is_file():
            raise CheckpointError("is no regular file", where=str(path), remedy="give a checkpoint file")
    except PermissionError as e:
        raise CheckpointError("cannot be read", where=str(path), remedy="correct its access rights") from e


def states_int8(path: Path) -> bool:
    """Whether a file says of itself, at its beginning, that it holds a quantized network of ours.

    A file that cannot be read as one is none: what is wrong with it is found, and said, where it is loaded.
    """
    try:
        if not path.is_file():
            return False
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= MAX_SAFETENSORS_HEADER:
                return False
            header = json.loads(f.read(length))
    except (OSError, ValueError, RecursionError):
        return False
    stated = header.get("__metadata__") if isinstance(header, dict) else None
    return isinstance(stated, dict) and stated.get("format") == "rescompress" and bool(stated.get("quantization"))


def _checkpoints(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix in SUFFIXES)[:50]
