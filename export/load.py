"""`load_onnx`: ONNX files, ours or anyone's; what is malformed is refused by name, so that readers may rely on the rest.

A model that comes out of it keeps these promises:

* names are text; every tensor has one maker; the graph has no cycle, and its nodes stand in order of computation;
* nodes of ONNX's own operators have the inputs, outputs and attributes that their definitions ask for;
* stored tensors are of a known type and hold as many values as their shapes say;
* types and shapes fit together, and no tensor is larger than any runtime takes;
* the model's own functions are written out as plain nodes.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.inliner

from export.shapes import check_shapes
from export.structure import check_structure, one_line, order
from rescompress.core.artifact import write_bytes
from rescompress.core.errors import EnvironmentFailed, ModelFileError

LARGEST_FILE = 2**31 - 1
"""Bytes of a protobuf message; larger networks keep their weights in other files."""


def load_onnx(path: Path, *, weights: bool = True) -> onnx.ModelProto:
    """Return the model of a file, checked as the module says.

    Args:
        path: The file.
        weights: Whether data that the file keeps in other files is read, too.

    Raises:
        ModelFileError: The file is missing, no ONNX file, or malformed.
    """
    if not path.is_file():
        raise ModelFileError("no such file", where=str(path), remedy="name an .onnx file")
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ModelFileError("is larger than an ONNX file can be", where=str(path), remedy="name an .onnx file")
        model = onnx.load(str(path), load_external_data=False)
        if weights:
            onnx.load_external_data_for_model(model, str(path.parent))
    except ModelFileError:
        raise
    except Exception as e:  # protobuf, onnx, the disk and the external data each have their own
        raise ModelFileError(f"is no readable ONNX file: {one_line(e)}", where=str(path), remedy="export it again") from e
    try:
        return checked(model)
    except ModelFileError as e:
        raise ModelFileError(e.what, where=str(path), remedy=e.remedy) from e


def checked(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model that keeps the promises of this module; what has to be sorted or written out is so in a copy.

    Raises:
        ModelFileError: It is malformed.
    """
    check_structure(model)
    model = _in_order(model)
    if model.functions:
        try:
            model = onnx.inliner.inline_local_functions(model)
        except Exception as e:  # a bare RuntimeError of the C++ side, among others
            raise ModelFileError(
                f"the functions of the file cannot be written out: {one_line(e)}", remedy="export it again"
            ) from e
        check_structure(model)
    check_shapes(model)
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


def _in_order(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model whose nodes stand in order of computation: the argument where they do already."""
    places = order(model.graph.node)
    if places == list(range(len(places))):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:]
    copy.graph.node.extend(model.graph.node[i] for i in places)
    return copy
