"""TensorBoard event files, written without TensorBoard: training curves per epoch, figures per stage.

The format: records of ``length (uint64) | masked CRC-32C of the length | data | masked CRC-32C of the data``, little-endian;
the data are ``Event`` messages of protocol buffers (tensorflow/core/util/event.proto, lib/io/record_writer.cc).
"""

from __future__ import annotations

import datetime
import hashlib
import struct
from pathlib import Path

from rescompress.core.artifact import write_bytes
from rescompress.core.errors import BadInput
from rescompress.core.manifest import Manifest
from rescompress.show.track._curves import curves, figures

CASTAGNOLI = 0x82F63B78


def check(address: str) -> None:
    """Make sure that the address can be a folder.

    Raises:
        BadInput: It is a file.
    """
    if Path(address).is_file():
        raise BadInput("is a file, a folder was expected", where=f"tensorboard:{address}", remedy="name a folder for the logs")


def log(address: str, name: str, folder: Path, manifest: Manifest) -> str:
    """Write the run's event file below the folder `address` and return its path.

    A run that is logged again replaces its file; another run of that name gets a folder of its own.

    Raises:
        EnvironmentFailed: The file cannot be written.
    """
    time = _seconds(manifest.created)
    events = [_version_event(time)]
    events += [_scalar_event(time + epoch, epoch, tag, value) for tag, epoch, value in curves(manifest)]
    events += [_scalar_event(time, 0, tag, value) for tag, value in figures(manifest)]
    identity = hashlib.sha256(f"{folder.resolve()} {manifest.created}".encode()).hexdigest()[:8]
    own = f"events.out.tfevents.{int(time)}.{identity}"
    place = Path(address) / name
    if any(file.name != own for file in place.glob("events.out.tfevents.*")):
        place = place.with_name(f"{name}-{identity}")
    path = place / own
    write_bytes(path, b"".join(_record(e) for e in events))
    return str(path)


def _seconds(created: str) -> float:
    try:
        return datetime.datetime.fromisoformat(created).timestamp()
    except ValueError:
        return 0.0


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", _masked_crc(length)) + data + struct.pack("<I", _masked_crc(data))


def _masked_crc(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of `data`."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (CASTAGNOLI if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _version_event(time: float) -> bytes:
    return b"\x09" + struct.pack("<d", time) + _bytes_field(3, b"brain.Event:2")


def _scalar_event(time: float, step: int, tag: str, value: float) -> bytes:
    scalar = _bytes_field(1, tag.encode()) + b"\x15" + struct.pack("<f", value)
    return b"\x09" + struct.pack("<d", time) + b"\x10" + _varint(step) + _bytes_field(5, _bytes_field(1, scalar))
