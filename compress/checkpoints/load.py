"""Loads a checkpoint of any known format, recognised by its keys and shapes alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from compress.checkpoints import facts, programs, refusals, stated
from compress.checkpoints.base import Checkpoint, Format, LoadOptions, RawState, Root, Stored
from compress.checkpoints.classes import class_names
from compress.checkpoints.files import Opened, open_file
from compress.checkpoints.leftovers import is_input_norm, refusal
from compress.checkpoints.options import check
from compress.checkpoints.roots import around, beside, flatten, modules, refuse_fake_quantizers, roots, strangers, without_masks
from rescompress.core import plugins
from rescompress.core.errors import CheckpointError
from rescompress.core.spec import ModelSpec

FORMATS = "compress.checkpoints.formats"
_SEGMENTER = re.compile(
    r"(.*\.)?(aux_classifier|classifier\.\d|decode_head|auxiliary_head|aspp|ppm|psp|head\.aspp)[.\d]", re.IGNORECASE
)
"""Keys of convolutions that the decoders of DeepLab, FCN and PSPNet have: torchvision's, mmsegmentation's and others'."""


def load(path: Path, options: LoadOptions, *, allow_pickle: bool) -> Checkpoint:
    """Return the checkpoint in a file (see `compress.checkpoints.load_checkpoint`)."""
    check(options.arch)
    if is_onnx(path):
        if "trunk" in options.arch:
            from compress.importers.onnx_trunk import load_onnx_trunk

            return load_onnx_trunk(path, options)
        from compress.importers.onnx_file import load_onnx_file

        return load_onnx_file(path, options)
    if "trunk" in options.arch and "code" not in options.arch:
        raise CheckpointError(
            "holds no program that a trunk could be taken out of",
            where=str(path),
            remedy="give --trunk with an ONNX file, or with --code FILE:CALLABLE",
        )
    try:
        opened = open_file(path, allow_pickle=allow_pickle)
        return _by_a_way(path, opened, options)
    except CheckpointError as e:
        raise CheckpointError(e.what, where=e.where or str(path), remedy=e.remedy) from e
    except PermissionError as e:
        raise CheckpointError("cannot be read", where=str(path), remedy="correct its access rights") from e
    except (MemoryError, RuntimeError, OverflowError) as e:
        if isinstance(e, RuntimeError) and "memory" not in str(e):
            raise
        raise CheckpointError("claims tensors that do not fit into memory", where=str(path)) from e


def is_onnx(path: Path) -> bool:
    """Whether a file is to be read as ONNX: it is called so, and begins as a message of protobuf does."""
    if path.suffix.lower() != ".onnx":
        return False
    with path.open("rb") as f:
        return not f.read(2).startswith((b"PK", b"\x89H", b"\x80"))


def _by_a_way(path: Path, opened: Opened, options: LoadOptions) -> Checkpoint:
    """Return the checkpoint as the user says, else by its key layout, else by the graph that the file holds."""
    if "code" in options.arch and "like" in options.arch:
        raise CheckpointError("--code and --like are given", remedy="give one of them")
    if "code" in options.arch:
        from compress.importers.code import load_with_code

        return load_with_code(path, opened, options.arch["code"], options)
    if "like" in options.arch:
        from compress.importers.like import load_like

        return load_like(path, opened, options.arch["like"], options)
    graph = opened.program is not None or isinstance(opened.metadata.get("keras_config"), dict)
    try:
        return _load(path, opened, options)
    except CheckpointError as by_keys:
        if not graph:
            raise
        try:
            return _by_its_graph(path, opened, options)
        except CheckpointError as e:
            raise (by_keys if _claimed(path, opened) else e) from e


def _by_its_graph(path: Path, opened: Opened, options: LoadOptions) -> Checkpoint:
    if opened.program is not None:
        from compress.importers.archive import load_archive

        checkpoint = load_archive(path, opened, options)
    else:
        from compress.importers.keras_config import load_keras

        checkpoint = load_keras(path, opened, options)
    return _with_class_names(checkpoint, opened)


def _claimed(path: Path, opened: Opened) -> bool:
    """Whether a key layout takes the file for its own."""
    return next(_claims(path, opened, flatten(opened)), None) is not None


def _load(path: Path, opened: Opened, options: LoadOptions) -> Checkpoint:
    tensors, masked = without_masks(flatten(opened))
    if not tensors:
        raise CheckpointError("holds no tensors", remedy="save the state_dict of the network")
    refuse_fake_quantizers(tensors)
    claims = list(_claims(path, opened, tensors))
    if not claims:
        raise refusals.refusal(tensors)
    _, format_, raw, root = _choose(claims, options)
    parts = strangers(root, [r.prefix for _, _, _, r in claims])
    if parts and "root" not in options.arch and all(is_input_norm(key) for key in parts):
        raise CheckpointError(
            refusal(parts).what,
            remedy=f"--arch-option root={root.prefix.rstrip('.')} takes the network without it; state --preprocess then",
        )
    if parts and "root" not in options.arch:
        raise CheckpointError(
            f"holds a ResNet as a part of a larger network (it also holds {', '.join(parts[:3])}): a detector, a segmenter?",
            remedy=f"--arch-option root={root.prefix.rstrip('.')} takes the ResNet alone",
        )
    segmenter = next((key for key in parts if _SEGMENTER.match(key)), None)
    if segmenter is not None and "strides" not in options.arch:
        raise CheckpointError(
            f"its ResNet is the backbone of a segmenter ({segmenter}), which is dilated where a classifier strides",
            remedy="give a classifier; a backbone without dilation is taken with --arch-option strides=1,2,2,2 beside root=...",
        )
    others = sorted({r.prefix.rstrip(".") for _, _, _, r in claims} - {root.prefix.rstrip(".")})
    notes = [*raw.notes, *masked]
    if root.prefix:
        notes.append(f"the network's keys stand behind {root.prefix!r}")
    if others:
        notes.append(
            f"other networks in the file were left out: {', '.join(o or '(top)' for o in others[:4])} "
            "(else: --arch-option root=PREFIX or weights=ema)"
        )
    root = dataclasses.replace(root, outside=beside(root, [r.prefix for _, _, _, r in claims]))
    parts_of_it = modules(opened, root.prefix)
    checkpoint = format_.load(
        dataclasses.replace(raw, notes=tuple(notes)), root, stated.options_of(parts_of_it, options) if parts_of_it else options
    )
    if isinstance(checkpoint.spec, ModelSpec):
        stated.check(parts_of_it, checkpoint.spec, options)
    stated.check_around(around(opened, root.prefix, [r.prefix for _, _, _, r in claims]))
    if checkpoint.provenance.get("format") == "native":  # says all of it itself
        return checkpoint
    if opened.program is not None:
        checkpoint = _telling(checkpoint, programs.compare(opened.program, checkpoint))
    if isinstance(opened.metadata.get("keras_config"), dict):
        from compress.importers import keras_proof

        checkpoint = _noting(checkpoint, keras_proof.compare(opened, checkpoint, options))
    contents = (opened.content, opened.metadata)
    facts.refuse_variant(contents, options)
    checkpoint, warnings = facts.with_facts(checkpoint, contents, options)
    if not parts_of_it and opened.program is None:  # tensors alone
        warnings = [*warnings, *facts.variant_in_name(path.stem, options)]
        if "keras_config" not in opened.metadata and isinstance(checkpoint.spec, ModelSpec):
            checkpoint = _noting(checkpoint, facts.open_strides(checkpoint.spec, options))
    return _with_class_names(_telling(checkpoint, [*warnings, *stated.ending(parts_of_it)]), opened)


def _with_class_names(checkpoint: Checkpoint, opened: Opened) -> Checkpoint:
    """Return the checkpoint with the names of its classes, where the file holds them and the format has not read them."""
    classes = checkpoint.spec.num_classes
    if checkpoint.spec.labels is not None or not classes:
        return checkpoint
    names, unused = class_names((opened.content, opened.metadata), classes)
    if names is not None:
        checkpoint = dataclasses.replace(checkpoint, spec=checkpoint.spec.replace(labels=names))
    return _telling(checkpoint, unused)


def _telling(checkpoint: Checkpoint, warnings: list[str]) -> Checkpoint:
    """Return the checkpoint with more warnings."""
    return _noting(checkpoint, warnings, ("notes", "warnings"))


def _noting(checkpoint: Checkpoint, lines: list[str], kinds: tuple[str, ...] = ("notes",)) -> Checkpoint:
    more = {kind: [*cast("list[str]", checkpoint.provenance.get(kind, [])), *lines] for kind in kinds if lines}
    return dataclasses.replace(checkpoint, provenance={**checkpoint.provenance, **more})


def _claims(path: Path, opened: Opened, tensors: Mapping[str, Stored]) -> Iterator[tuple[str, Format, RawState, Root]]:
    ours = opened.metadata.get("format") == "rescompress"  # its header says what it is, whatever its keys look like
    for name in ["native"] if ours else plugins.names(FORMATS):
        format_ = cast("Format", plugins.load(FORMATS, name, what="format", offers=Format))
        places = [Root("", tensors, {})] if name == "native" else roots(tensors, format_.MARKER)
        for root in places:
            raw = RawState(path, opened.container, root.tensors, opened.metadata, opened.notes)
            if format_.matches(raw):
                yield name, format_, raw, root


def _choose(claims: list[tuple[str, Format, RawState, Root]], options: LoadOptions) -> tuple[str, Format, RawState, Root]:
    wanted = options.arch.get("root")
    if wanted is not None:
        claims_there = [c for c in claims if c[3].prefix.rstrip(".") == wanted.rstrip(".")]
        if not claims_there:
            known = ", ".join(repr(c[3].prefix.rstrip(".")) for c in claims)
            raise CheckpointError(f"there is no network behind {wanted!r}", remedy=f"networks stand behind: {known}")
        return claims_there[0]
    averaged = options.arch.get("weights") == "ema"
    if averaged and not any(c[3].averaged for c in claims):
        raise CheckpointError("holds no averaged (EMA) weights", remedy="leave out --arch-option weights=ema")
    best = min(claims, key=lambda c: (c[3].averaged != averaged, c[3].prefix.count("."), len(c[3].prefix)))
    rivals = sorted(name for name, _, _, root in claims if root.prefix == best[3].prefix)
    if len(rivals) > 1:
        raise CheckpointError(
            f"more than one format claims it: {', '.join(rivals)}", remedy="report this with the list of its keys"
        )
    return best
