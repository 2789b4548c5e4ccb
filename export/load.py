"""Reads and writes ONNX files with our errors."""

from __future__ import annotations

from pathlib import Path

import onnx

from rescompress.core.artifact import write_bytes
from rescompress.core.errors import EnvironmentFailed, ModelFileError


def load_onnx(path: Path) -> onnx.ModelProto:
    """Return the model in a file, external data included.

    Raises:
        ModelFileError: The file is missing, damaged, or no ONNX model.
    """
    if not path.is_file():
        raise ModelFileError("no such file", where=str(path), remedy="name an .onnx file")
    try:
        model = onnx.load(path)
    except Exception as e:  # protobuf, onnx and the external data each have their own
        raise ModelFileError(f"is no readable ONNX file: {e}", where=str(path), remedy="export it again") from e
    if not model.graph.node or not model.opset_import:
        raise ModelFileError("holds no ONNX graph", where=str(path), remedy="name an .onnx file")
    return model


def save_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Write a model, whole or not at all.

    Raises:
        EnvironmentFailed: The model is larger than a protobuf file can be.
    """
    try:
        content = model.SerializeToString()
    except ValueError as e:
        raise EnvironmentFailed("the model is larger than 2 GB", where=str(path), remedy="use a smaller model") from e
    write_bytes(path, content)
