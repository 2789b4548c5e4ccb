"""Whether a checkpoint's path leads to a file: answered at once, before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from rescompress.core.errors import CheckpointError, nearest

SUFFIXES = frozenset(
    {".safetensors", ".pt", ".pth", ".th", ".bin", ".ckpt", ".tar", ".h5", ".keras", ".hdf5", ".ts", ".pt2", ".onnx"}
)
SHOWN = 5


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
        raise CheckpointError("cannot be read", where=str(path), remedy="mend its access rights") from e


def _checkpoints(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix in SUFFIXES)[:50]
