"""Checkpoints in and out: `load_checkpoint` reads any known format, `save_checkpoint` writes our own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.checkpoints.base import Checkpoint


def load_checkpoint(
    path: str | Path,
    *,
    input_shape: tuple[int, int, int] | None = None,
    preprocess: str | None = None,
    arch_options: Mapping[str, str] | None = None,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Return the network in a checkpoint file, recognised by its keys and shapes.

    Values are float32 and named as `rescompress.core.layers.walk` names them; what was assumed stands in
    ``provenance["notes"]``. No code of the file runs, unless `allow_pickle` says so.

    Args:
        path: A file of any format of ``compress.checkpoints.formats``, or a name (`compress.checkpoints.named`).
        input_shape: Channels, height, width, where the assumed ones are wrong.
        preprocess: A name of `compress.zoo.PREPROCESSING_NAMES`, or a statement such as ``mean=0.5,std=0.25,resize=256``
            (`compress.preprocessing.Statement`), likewise.
        arch_options: Facts of `compress.checkpoints.options.KNOWN`, likewise.
        allow_pickle: Run the code stored in a pickle; only for files that you trust.

    Raises:
        CheckpointError: The file is missing, damaged, unsafe, or holds no ResNet that is known here.
        BadInput: An option is unknown or impossible.
        ToolMissing: The format or the name needs a package that is not installed.
        EnvironmentFailed: A named network is not in the cache, and there is no connection.
    """
    from compress.checkpoints import named
    from compress.checkpoints.path import check_path

    if named.is_name(path):
        return named.load(
            path,
            input_shape=input_shape,
            preprocess=preprocess,
            arch_options=arch_options or {},
            allow_pickle=allow_pickle,
        )
    check_path(Path(path))

    from compress.checkpoints.base import LoadOptions
    from compress.checkpoints.load import load

    return load(Path(path), LoadOptions(input_shape, preprocess, dict(arch_options or {})), allow_pickle=allow_pickle)


def save_checkpoint(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write a checkpoint as safetensors with its spec, whole or not at all; loading gives the very same tensors.

    Args:
        checkpoint: What to write.
        path: Where.

    Raises:
        EnvironmentFailed: The disk is full, or the folder cannot be written.
        BadInput: `path` is a folder.
    """
    from compress.checkpoints.formats.native import save

    save(checkpoint, Path(path))
