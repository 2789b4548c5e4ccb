"""The trunk of an ONNX file of any exporter (`compress.importers.trunk`), proven against onnxruntime on those nodes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import onnx
from torch import Tensor

from compress.checkpoints.base import Checkpoint, LoadOptions
from compress.importers.finish import Source, checkpoint_of
from compress.importers.network import Read, read_trace
from compress.importers.onnx_file import Reader, Runtime, channels_first, image_shape, label, readable, sizes_of
from compress.importers.trace import Refused, Trace
from compress.importers.trunk import Call, Cut, cut, needs_of
from rescompress.core.errors import CheckpointError
from rescompress.core.host import AUTO, Host, HostFile, wanted_tensors


def load_onnx_trunk(path: Path, options: LoadOptions, *, images: Tensor | None = None, proof: bool = True) -> Checkpoint:
    """Return the trunk of an ONNX file as a network whose outputs are what the rest of the file reads.

    Args:
        path: The file; weights beside it count.
        options: What the user states; ``trunk`` among ``arch``.
        images: Prepared images to compare outputs on, beside random numbers.
        proof: Whether outputs are compared at all; not where this very file was read before.

    Raises:
        CheckpointError: It has no such trunk, one of two inputs, or onnxruntime computes something else.
        ModelFileError: The file is damaged, or its data are missing.
    """
    from export.load import load_onnx

    model = load_onnx(path)
    try:
        read, found, host = _trunk(model, path, options)
    except Refused as e:
        raise CheckpointError(f"its trunk computes something that is not known here: {e}", where=str(path)) from e
    except CheckpointError as e:
        raise CheckpointError(e.what, where=str(path), remedy=e.remedy) from e
    notes = [f"written by {model.producer_name} {model.producer_version}".strip()] if model.producer_name else []
    notes.append(f"the trunk of {path.name}: the rest, {len(found.kept)} of {len(model.graph.node)} nodes, stays as it is")
    if host.last:
        notes.append("the file wants its channels last; here they are first")
    source = Source("onnx", path.name, read.network.arch, "onnx", (*notes, *found.notes))
    original = Runtime(_alone(model, host), host.batch, host.last).original() if proof else None
    made = checkpoint_of(read, original, options, source, images=images)
    return dataclasses.replace(made, provenance={**made.provenance, "host": host.model_dump(mode="json")})


def _trunk(model: onnx.ModelProto, path: Path, options: LoadOptions) -> tuple[Read, Cut, Host]:
    """Return the trunk's network, where it was cut, and what is to be remembered of the file."""
    from export.structure import reads

    calls = [Call(label(n), tuple(sorted(reads(n))), tuple(o for o in n.output if o)) for n in model.graph.node]
    wanted = wanted_tensors(options.arch["trunk"])
    entry = _entry(model, calls, wanted)
    dims = sizes_of(entry)
    first: Refused | CheckpointError | None = None
    for last in (False, True) if channels_first(dims, options) else (True, False):
        shape = image_shape(dims, options, entry.name, last=last)
        if shape is None:
            continue
        for batch in (dims[0],) if dims[0] else (2, 1):
            trace = Trace(shape, batch, entry.name)
            images = trace.input().move(lambda p: p.permute(0, 2, 3, 1)) if last else trace.input()
            survey = Reader(model, trace, images, entry.name).survey(calls)
            try:
                found = cut(survey, wanted)
                named = [(readable(name), survey.values[name]) for name in found.borders]
                read = read_trace(trace, named, arch=options.arch.get("arch", path.stem), features=True)
            except (Refused, CheckpointError) as e:
                first = first or e
                continue
            borders = dict(zip((o.name for o in read.network.outputs), found.borders, strict=True))
            host = Host(
                kind="onnx", files=_files(path), borders=borders, input=entry.name, last=last, batch=dims[0],
                options={"input": "x".join(map(str, shape)), "trunk": ",".join(wanted) or AUTO},
            )  # fmt: skip
            return read, found, host
    assert first is not None
    raise first


def _entry(model: onnx.ModelProto, calls: Sequence[Call], wanted: Sequence[str]) -> onnx.ValueInfoProto:
    """Return the input that the trunk begins at: the one of images that the wanted tensors need, or the only one.

    Raises:
        CheckpointError: There is none, or there are several.
    """
    stored = {i.name for i in model.graph.initializer}
    entries: list[onnx.ValueInfoProto] = [i for i in model.graph.input if i.name not in stored]
    if wanted:
        needed = needs_of(calls, wanted)
        entries = [i for i in entries if i.name in needed] or entries
    float32 = onnx.TensorProto.FLOAT
    images = [i for i in entries if i.type.tensor_type.elem_type == float32 and len(i.type.tensor_type.shape.dim) == 4]
    if len(images) == 1:
        return images[0]
    told = ", ".join(f"'{i.name}'" for i in (images or entries)[:4])
    if images:
        raise CheckpointError(
            f"a trunk has one input of images, and this would have {len(images)}: {told}",
            remedy="name tensors with --trunk that come from one of them",
        )
    raise CheckpointError(
        f"none of its inputs ({told}) is a float32 batch of images, four dimensions", remedy="export it with such an input"
    )


def _files(path: Path) -> tuple[HostFile, ...]:
    """Return the file and those that hold its weights."""
    from onnx.external_data_helper import uses_external_data

    model = onnx.load(str(path), load_external_data=False)
    stored = [t for t in model.graph.initializer if uses_external_data(t)]
    places = sorted({entry.value for t in stored for entry in t.external_data if entry.key == "location"})
    return (HostFile.of(path), *(HostFile.of(path.parent / place) for place in places))


def _alone(model: onnx.ModelProto, host: Host) -> onnx.ModelProto:
    """Return the model that computes the borders and nothing else."""
    nodes = model.graph.node
    calls = [Call("", tuple(n.input), tuple(n.output)) for n in nodes]
    needed = needs_of(calls, list(host.borders.values()))
    kept = [n for n in nodes if any(o in needed for o in n.output)]
    graph = onnx.helper.make_graph(
        kept,
        "trunk",
        [i for i in model.graph.input if i.name == host.input],
        [onnx.ValueInfoProto(name=name) for name in host.borders.values()],
        [i for i in model.graph.initializer if i.name in needed],
    )
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
