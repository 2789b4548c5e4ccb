"""Opens a checkpoint file of any container, and lists its tensors without reading their values.

Nothing in a file is trusted: sizes are checked against the file's length before memory is spent on them, archives may hold
neither links nor bombs, and pickles are read by `compress.checkpoints.pickles`, which runs nothing.
"""

from __future__ import annotations

import io
import json
import logging
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch
from torch import Tensor

from compress.checkpoints import pickles
from compress.checkpoints.base import Shape
from compress.checkpoints.path import MAX_SAFETENSORS_HEADER
from rescompress.core.errors import CheckpointError

MAX_EXPANSION = 50
EXPORTED_TABLE = "_weights_config.json"
"""How the name of the member ends that lists the weights of an exported program."""
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_SYMLINK_MODE = 0o120000

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_FOREIGN = {
    b"\x1f\x8b": "gzip data; unpack it first",
    b"\xfd7zXZ": "xz data; unpack it first",
    b"BZh": "bzip2 data; unpack it first",
    b"\x28\xb5\x2f\xfd": "zstandard data; unpack it first",
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "a numpy array",
    b"%PDF": "a PDF",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"<htm": "a web page (a failed download?)",
    b"<!DO": "a web page (a failed download?)",
    b"vers": "a Git LFS pointer; fetch the file itself with git lfs pull",
    b"\x08": "a protobuf, perhaps ONNX or TensorFlow; give the checkpoint it was exported from",
}


@dataclass(frozen=True)
class Opened:
    """A file's content: its tree of plain values, records and stored tensors.

    Attributes:
        container: ``safetensors``, ``torch``, ``torch (legacy)``, ``torchscript``, ``torch.export`` or
            ``hdf5``.
        content: Dictionaries and records whose leaves may be stored tensors.
        metadata: Text beside the tensors.
        notes: What is worth telling.
        program: Runs the graph that stands beside the weights; None where there is none.
    """

    container: str
    content: object
    metadata: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    program: Callable[..., Any] | None = None


def read_bytes(file: BinaryIO, n_bytes: int) -> Tensor:
    """Return the next `n_bytes` bytes of `file` as a uint8 tensor, read straight into its memory.

    Raises:
        CheckpointError: The file ends before.
    """
    flat = torch.empty(n_bytes, dtype=torch.uint8)
    view, done = memoryview(flat.numpy()), 0  # type: ignore[arg-type]
    while done < n_bytes:
        try:
            count = file.readinto(view[done : done + 2**24])  # type: ignore[attr-defined]
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as e:
            raise CheckpointError(f"damaged: {e}", remedy="fetch or save the file again") from e
        if not count:
            raise CheckpointError("damaged: the file ends inside a tensor", remedy="fetch or save the file again")
        done += count
    return flat


@dataclass(frozen=True)
class FileTensor:
    """A contiguous tensor at a place in a file."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: Shape

    def read(self) -> Tensor:
        """Return the values, in the file's dtype."""
        with self.path.open("rb") as f:
            f.seek(self.offset)
            flat = read_bytes(f, math.prod(self.shape) * self.dtype.itemsize)
        return flat.view(self.dtype).reshape(self.shape)


def open_file(path: Path, *, allow_pickle: bool = False) -> Opened:
    """Return what a checkpoint file holds; tensors stay in it until they are read.

    Args:
        path: The file; that it is one has been checked.
        allow_pickle: Let torch run the code of a pickle that this reader refuses.

    Raises:
        CheckpointError: The file is damaged, unsafe, or of no known container.
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(16)
    if size < 16:
        raise CheckpointError(f"has only {size} bytes", remedy="fetch or save the file again")
    if head.startswith(b"PK"):
        return _open_zip(path, allow_pickle=allow_pickle)
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        from compress.checkpoints import hdf5

        return hdf5.open_hdf5(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= max(size, MAX_SAFETENSORS_HEADER):
        return _open_safetensors(path, size)
    if head[0] == 0x80:
        return _open_legacy(path, allow_pickle=allow_pickle)
    if _is_tar(path):
        raise CheckpointError("is a tar archive", remedy="unpack it, and give the checkpoint in it")
    for magic, what in _FOREIGN.items():
        if head.lower().startswith(magic.lower()):
            raise CheckpointError(f"is {what}, not a checkpoint")
    if path.suffix == ".py":
        raise CheckpointError(
            "is Python, no checkpoint", remedy=f"give the file of its weights, and --code {path.name}:CALLABLE beside it"
        )
    raise CheckpointError(
        "is no checkpoint of a known container",
        remedy="known: safetensors, torch.save, torch.export, TorchScript, Keras .h5 and .keras, ONNX (by the suffix .onnx)",
    )


def _is_tar(path: Path) -> bool:
    with path.open("rb") as f:
        f.seek(257)
        return f.read(5) == b"ustar"


def unique_pairs(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return a dictionary of JSON pairs; raises CheckpointError when a key stands there twice."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise CheckpointError(f"the key {key[:200]!r} stands in it twice", remedy="save the checkpoint again")
        result[key] = value
    return result


def _open_safetensors(path: Path, size: int) -> Opened:
    with path.open("rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        if length > min(MAX_SAFETENSORS_HEADER, size - 8):
            raise CheckpointError(
                f"damaged: its header claims {length} bytes in a file of {size}", remedy="fetch or save the file again"
            )
        text = f.read(length)
    try:
        header = json.loads(text, object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"damaged: its header is no JSON ({e})", remedy="fetch or save the file again") from e
    if not isinstance(header, dict):
        raise CheckpointError("damaged: its header is no table", remedy="fetch or save the file again")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError("damaged: its metadata is no table", remedy="fetch or save the file again")
    tensors: dict[str, FileTensor] = {}
    end = 0
    spans = []
    for key, entry in header.items():
        tensors[key], span = _safetensor(path, key, entry, 8 + length, size)
        spans.append(span)
    for low, high in sorted(spans):
        if low < end:
            raise CheckpointError("damaged: its tensors overlap", remedy="fetch or save the file again")
        end = high
    return Opened("safetensors", tensors, metadata)


def _safetensor(path: Path, key: str, entry: object, data: int, size: int) -> tuple[FileTensor, tuple[int, int]]:
    fields = entry if isinstance(entry, dict) else {}
    shape, offsets, name = fields.get("shape"), fields.get("data_offsets"), fields.get("dtype")
    if not (_sizes(shape) and _sizes(offsets) and len(offsets) == 2 and isinstance(name, str)):
        raise CheckpointError(f"damaged: the header's entry for {key[:200]!r}", remedy="fetch or save the file again")
    dtype = _SAFETENSORS_DTYPES.get(name)
    if dtype is None:
        raise CheckpointError(f"tensor {key[:200]!r} has dtype {name[:20]!r}, which is not supported")
    low, high = offsets
    if high - low != math.prod(shape) * dtype.itemsize or low > high or data + high > size:
        raise CheckpointError(
            f"damaged: {key[:200]!r} of shape {tuple(shape)} does not fit the file", remedy="fetch or save the file again"
        )
    return FileTensor(path, data + low, dtype, tuple(shape)), (low, high)


def _sizes(values: object) -> TypeGuard[list[int]]:
    """Whether `values` is a short list of numbers that can be sizes."""
    if not isinstance(values, list) or len(values) > pickles.MAX_DIMENSIONS:
        return False
    return all(type(n) is int and 0 <= n < 2**48 for n in values)


class ZipStorages:
    """The storages of a torch archive: one member each."""

    def __init__(self, path: Path, members: Mapping[str, zipfile.ZipInfo]) -> None:
        """Take the members by storage key."""
        self._path = path
        self._members = members
        self._archive: _zip | None = None
        self._last: tuple[str, Tensor] | None = None

    def declare(self, key: str, itemsize: int) -> None:
        """Learn that a storage is used; what it holds is known from the archive."""

    def read(self, key: str, low: int, high: int) -> Tensor:
        """Return bytes `low` to `high` of the storage; its checksum is verified."""
        if key not in self._members:
            raise CheckpointError(
                f"damaged: the data of storage {key[:50]!r} is missing", remedy="fetch or save the file again"
            )
        size = self._members[key].file_size
        if high > size:
            raise CheckpointError(
                f"damaged: storage {key[:50]!r} has {size} bytes instead of {high}", remedy="fetch or save the file again"
            )
        if self._last is None or self._last[0] != key:
            self._archive = self._archive or _zip(self._path)  # its directory is parsed once
            with self._archive.open(self._members[key]) as f:
                flat = read_bytes(f, size)
            if (low, high) == (0, size):
                return flat
            self._last = (key, flat)
        return self._last[1][low:high].clone()


class _zip(zipfile.ZipFile):  # noqa: N801
    """A zip file whose every failure is a CheckpointError."""

    def __init__(self, path: Path) -> None:
        try:
            super().__init__(path)
        except Exception as e:  # zipfile raises many kinds on damaged archives
            raise CheckpointError(f"damaged: its archive cannot be opened ({e})", remedy="fetch or save the file again") from e

    def open(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().open(*args, **kwargs)
        except Exception as e:
            raise CheckpointError(f"damaged: its archive cannot be read ({e})", remedy="fetch or save the file again") from e


def zip_members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return the members of a zip archive by name.

    Raises:
        CheckpointError: The archive is damaged, holds links, two members of one name, or expands beyond measure.
    """
    with _zip(path) as archive:
        infos = archive.infolist()
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        if info.filename in members:
            raise CheckpointError(f"the archive holds {info.filename[:200]!r} twice", remedy="save the checkpoint again")
        if (info.external_attr >> 16) & 0o170000 == _SYMLINK_MODE:
            raise CheckpointError(f"the archive holds a link ({info.filename[:200]!r})", remedy="save the checkpoint again")
        if info.flag_bits & 1:
            raise CheckpointError("the archive is encrypted", remedy="save the checkpoint again")
        members[info.filename] = info
    total, size = sum(i.file_size for i in infos), path.stat().st_size
    if total > MAX_EXPANSION * size or any(i.compress_size > size for i in infos):
        raise CheckpointError(
            f"the archive of {size} bytes claims to hold {total}: a zip bomb, or damaged", remedy="save the checkpoint again"
        )
    return members


def read_member(path: Path, info: zipfile.ZipInfo, limit: int) -> bytes:
    """Return a member of a zip archive; raises CheckpointError when it is damaged or larger than `limit` bytes."""
    if info.file_size > limit:
        raise CheckpointError(f"the archive's {info.filename[:200]!r} claims {info.file_size} bytes", remedy="save it again")
    with _zip(path) as archive, archive.open(info) as f:
        try:
            data: bytes = f.read()
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as e:
            raise CheckpointError(f"damaged: {e}", remedy="fetch or save the file again") from e
    return data


def _open_zip(path: Path, *, allow_pickle: bool) -> Opened:
    members = zip_members(path)
    if "config.json" in members and any(name.endswith(".weights.h5") for name in members):
        from compress.checkpoints import hdf5

        return hdf5.open_keras(path, members)
    if any(name.endswith(EXPORTED_TABLE) for name in members):
        from compress.checkpoints import exported

        return exported.open_exported(path, members)
    programs = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(programs) != 1:
        what = "a numpy archive" if any(n.endswith(".npy") for n in members) else "a zip archive without a checkpoint in it"
        raise CheckpointError(f"is {what}", remedy="give a file of torch.save, safetensors or Keras")
    root = programs[0][: -len("data.pkl")]
    if root + "byteorder" in members and read_member(path, members[root + "byteorder"], 16) == b"big":
        raise CheckpointError("was written on a big-endian machine", remedy="save it on a little-endian one")
    scripted = root + "constants.pkl" in members
    storages = ZipStorages(
        path,
        {
            name[len(root) :].removeprefix("data/"): info
            for name, info in members.items()
            if name.startswith((root + "data/", root + "constants/"))
        },
    )
    program = read_member(path, members[programs[0]], pickles.MAX_PICKLE_BYTES)
    try:
        content = pickles.read_object(io.BytesIO(program), storages)
    except CheckpointError as e:
        return _run_pickle(path, e) if allow_pickle and not scripted else _raise(e)
    if not scripted:
        return Opened("torch", content)
    from compress.checkpoints.script import Script

    constants = read_member(path, members[root + "constants.pkl"], pickles.MAX_PICKLE_BYTES)
    named = {n[len(root) + len("constants/") :]: info for n, info in members.items() if n.startswith(f"{root}constants/")}
    values = pickles.read_object(io.BytesIO(constants), ZipStorages(path, named))
    return Opened("torchscript", content, program=Script(path, members, root, content, values))


class LegacyStorages:
    """The storages of a legacy torch file: runs of bytes behind the pickles."""

    def __init__(self, path: Path) -> None:
        """Start with none; `places` is filled once the pickles are read."""
        self._path = path
        self.places: dict[str, tuple[int, int]] = {}
        self.widths: dict[str, int] = {}

    def declare(self, key: str, itemsize: int) -> None:
        """Learn the width of the values in a storage."""
        self.widths[key] = itemsize

    def read(self, key: str, low: int, high: int) -> Tensor:
        """Return bytes `low` to `high` of the storage."""
        if key not in self.places or high > self.places[key][1]:
            raise CheckpointError(f"damaged: data of storage {key[:50]!r} is missing", remedy="fetch or save the file again")
        with self._path.open("rb") as f:
            f.seek(self.places[key][0] + low)
            return read_bytes(f, high - low)


def _open_legacy(path: Path, *, allow_pickle: bool) -> Opened:
    storages = LegacyStorages(path)
    size = path.stat().st_size
    try:
        with path.open("rb") as f:
            first = pickles.read_plain(f)
            if first != LEGACY_MAGIC:
                raise CheckpointError(
                    "is a plain pickle, not a checkpoint that torch wrote", remedy="save it with torch.save or safetensors"
                )
            pickles.read_plain(f)
            pickles.read_plain(f)
            content = pickles.read_object(f, storages)
            keys = pickles.read_plain(f)
            if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys):
                raise CheckpointError("damaged: its list of storages", remedy="fetch or save the file again")
            position = f.tell()
            for key in keys:
                if position + 8 > size:
                    raise CheckpointError("damaged: the file ends too early", remedy="fetch or save the file again")
                f.seek(position)
                (numel,) = struct.unpack("<q", f.read(8))
                if key not in storages.widths:
                    raise CheckpointError("damaged: a storage that no tensor uses", remedy="fetch or save the file again")
                n_bytes = numel * storages.widths[key]
                position += 8
                if numel < 0 or position + n_bytes > size:
                    raise CheckpointError("damaged: the file ends inside a tensor", remedy="fetch or save the file again")
                storages.places[key] = (position, n_bytes)
                position += n_bytes
    except CheckpointError as e:
        return _run_pickle(path, e) if allow_pickle else _raise(e)
    return Opened("torch (legacy)", content)


@dataclass(frozen=True)
class _InMemory:
    """A tensor that torch has loaded already."""

    tensor: Tensor

    @property
    def shape(self) -> Shape:
        return tuple(self.tensor.shape)

    def read(self) -> Tensor:
        return self.tensor.detach().contiguous()


def _run_pickle(path: Path, refused: CheckpointError) -> Opened:
    """Load with torch and without protection: the user has said that the file is trusted."""
    logging.getLogger(__name__).warning("warning: %s: running the code stored in it, as --allow-pickle says", path.name)
    try:
        content = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as e:  # code of a stranger may fail in any way
        raise CheckpointError(f"cannot be loaded even with --allow-pickle: {type(e).__name__}: {e}") from e
    note = f"loaded with --allow-pickle ({refused.what})"
    return Opened("torch", _in_memory(content, set()), notes=(note,))


def _in_memory(value: object, above: set[int]) -> object:
    if isinstance(value, Tensor):
        return _InMemory(value)
    if isinstance(value, torch.nn.Module):
        return {k: _InMemory(v) for k, v in value.state_dict().items()}
    if isinstance(value, Mapping) and id(value) not in above:
        return {k: _in_memory(v, above | {id(value)}) for k, v in value.items()}
    return value


def _raise(error: CheckpointError) -> Opened:
    raise error
