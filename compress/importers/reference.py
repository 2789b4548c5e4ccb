"""The dense trunk that a checkpoint's fidelity is measured against: read again from its host."""

from __future__ import annotations

import functools

from compress.checkpoints.base import Checkpoint, LoadOptions
from rescompress.core.host import Host


def reference(host: Host) -> Checkpoint:
    """Return the trunk as it was taken out of a host, once that is seen to be unchanged.

    Raises:
        CheckpointError: The host is gone, was changed, or lived in Python.
    """
    host.checked()
    return _read(host.model_dump_json())


@functools.lru_cache(maxsize=2)
def _read(text: str) -> Checkpoint:
    from compress.checkpoints.load import load
    from compress.checkpoints.options import parse_shape
    from compress.importers.onnx_trunk import load_onnx_trunk

    host = Host.model_validate_json(text)
    arch = dict(host.options)
    options = LoadOptions(parse_shape(arch.pop("input")), None, arch)
    path = host.checked()
    if host.kind == "onnx":
        return load_onnx_trunk(path, options, proof=False)  # it was proven when it was imported
    return load(path, options, allow_pickle=False)
