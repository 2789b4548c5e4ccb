"""Our own format: safetensors, with the spec and the quantizers as JSON in the header."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pydantic import ValidationError
from safetensors.torch import save as serialize

from compress.checkpoints.base import Checkpoint, LoadOptions, RawState, Root
from compress.checkpoints.layout import read_values
from compress.preprocessing import Statement, for_input
from rescompress.core.artifact import atomic_path
from rescompress.core.errors import CheckpointError
from rescompress.core.graph import Network
from rescompress.core.host import Host
from rescompress.core.quantizers import Quantization
from rescompress.core.recipe import network_of
from rescompress.core.spec import ModelSpec

DESCRIPTION = "rescompress: safetensors with the spec and the quantizers in its header"
MARKER = re.compile("")  # its keys are those of any network: the header tells it
VERSIONS = ("1", "2")
"""1: the header holds a recipe (``spec``). 2: it holds a graph (``network``)."""


def matches(raw: RawState) -> bool:
    """Whether the header says so."""
    return raw.metadata.get("format") == "rescompress"


def load(raw: RawState, root: Root, options: LoadOptions) -> Checkpoint:
    """Return the checkpoint, the very tensors that were saved.

    Raises:
        CheckpointError: The header or a tensor is damaged, or a newer version wrote the file.
    """
    version = raw.metadata.get("version")
    if version not in VERSIONS:
        raise CheckpointError(
            f"was written in version {version!r} of the format, this program reads {' and '.join(map(repr, VERSIONS))}",
            remedy="update rescompress",
        )
    try:
        spec: ModelSpec | Network
        if version == "1":
            spec = ModelSpec.model_validate_json(str(raw.metadata.get("spec")))
        else:
            spec = Network.model_validate_json(str(raw.metadata.get("network")))
        text = raw.metadata.get("quantization")
        quantization = Quantization.model_validate_json(str(text)) if text else None
        if quantization is not None:
            quantization.check(spec)
        provenance = json.loads(str(raw.metadata.get("provenance", "{}")))
        if isinstance(provenance, dict) and "host" in provenance:
            found = Host.model_validate(provenance["host"])
            provenance["host"] = found.beside(raw.path.parent).model_dump(mode="json")
    except (ValidationError, ValueError, RecursionError) as e:
        first = str(e).splitlines()[0]
        raise CheckpointError(f"damaged: its header describes no network ({first})", remedy="make the file again") from e
    wanted = network_of(spec).tensor_shapes
    for name, shape in wanted.items():
        if raw.shape(name) != shape:
            raise CheckpointError(
                f"damaged: {name} has shape {raw.shape(name)}, its header says {shape}", remedy="make the file again"
            )
    extra = sorted(set(raw.tensors) - set(wanted))
    if extra:
        raise CheckpointError(f"holds a tensor {extra[0]!r} that its header does not describe", remedy="make the file again")
    state_dict = read_values({name: raw.tensors[name] for name in wanted}, [])
    provenance = dict(provenance) if isinstance(provenance, dict) else {}
    here = {"format": "native", "container": raw.container, "path": raw.path.name}
    provenance.setdefault("origin", {key: provenance[key] for key in here if key in provenance})
    return Checkpoint(restate(spec, options), state_dict, quantization, {**provenance, **here})


def restate(spec: ModelSpec | Network, options: LoadOptions) -> ModelSpec | Network:
    """Return the spec with what the user states: input shape and preprocessing."""
    if options.input_shape is not None:
        if options.input_shape[0] != spec.input_shape[0]:
            raise CheckpointError(
                f"its first convolution reads {spec.input_shape[0]} channels, the input shape gives {options.input_shape[0]}"
            )
        resized = for_input(spec.preprocessing, spec.input_shape, options.input_shape)
        spec = spec.replace(input_shape=options.input_shape, preprocessing=resized)
    if options.preprocess is not None:
        spec = spec.replace(preprocessing=Statement.parse(options.preprocess).over(spec.preprocessing, spec.input_shape))
    return spec


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint, whole or not at all; loading it gives the very same tensors.

    Args:
        checkpoint: What to write.
        path: Where; conventionally ``.safetensors``.

    Raises:
        EnvironmentFailed: The disk is full, or the folder cannot be written.
        BadInput: `path` is a folder.
    """
    metadata = {
        "format": "rescompress",
        **(
            {"version": "1", "spec": checkpoint.spec.model_dump_json()}
            if isinstance(checkpoint.spec, ModelSpec)
            else {"version": "2", "network": checkpoint.spec.model_dump_json()}
        ),
        "provenance": json.dumps(dict(checkpoint.provenance)),
    }
    if checkpoint.quantization is not None:
        metadata["quantization"] = checkpoint.quantization.model_dump_json()
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in checkpoint.state_dict.items()}
    content = in_fixed_order(serialize(tensors, metadata=metadata))
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def in_fixed_order(content: bytes) -> bytes:
    """Return a safetensors file with the keys of its metadata sorted, so that equal checkpoints are equal files.

    The library writes them in the order of a hash map, which changes from process to process.

    Args:
        content: The file: the header's length (8 bytes, little endian), the header as JSON, the tensors.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]
