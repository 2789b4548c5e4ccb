"""What each TensorRT version understands: one table, read by the builder, by trtexec's command line and by the exporter.

Sources: flags by ``samples/common/sampleOptions.cpp`` on the release branches of github.com/NVIDIA/TensorRT; opsets by
``docs/operators.md`` on the release branches of github.com/onnx/onnx-tensorrt (8.2: up to 13; 8.4 and 8.5: up to 17; 9.2: up
to 19; 10.0 and 10.1: 9 to 20; 10.15: 9 to 24) and the TensorRT 11 opset guide (9 to 25); typing by the migration guide from
10.x to 11.x (weak typing is deprecated from 10.12 and gone in 11); DLA by the migration guide for Jetson of 11.4.1 (10.7 is
the last release with DLA before 11.4.1, which brings it back with explicit quantization, on the AGX Orin only).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from rescompress.core.errors import TargetError

Version = tuple[int, int]
Release = tuple[int, int, int]

OLDEST: Version = (8, 2)
LAST_DLA: Version = (10, 7)
DLA_AGAIN: Release = (11, 4, 1)
"""The release that has DLA again, and accepts Q/DQ there."""


class Capabilities(NamedTuple):
    """What one version of TensorRT understands.

    Attributes:
        version: Major and minor.
        opset: The ONNX opset this project writes for it.
        max_opset: The newest opset its parser reads.
        strongly_typed: Networks are built strongly typed: types come from the file, no precision flag is given.
        precision_flags: ``--fp16`` and ``--int8`` (``BuilderFlag.FP16``, ``BuilderFlag.INT8``) exist.
        mem_pool_size: ``--memPoolSize`` (``set_memory_pool_limit``) exists; before it, ``--workspace``.
        skip_inference: The flag that builds without running.
        explicit_batch_flag: The Python API needs ``EXPLICIT_BATCH`` to read ONNX.
        no_dla: Why DLA cannot be asked for; empty where it can.
        qdq_on_dla: A DLA takes networks with Q/DQ; before, only those that TensorRT calibrated itself.
    """

    version: Version
    opset: int
    max_opset: int
    strongly_typed: bool
    precision_flags: bool
    mem_pool_size: bool
    skip_inference: str
    explicit_batch_flag: bool
    no_dla: str
    qdq_on_dla: bool

    @property
    def dla(self) -> bool:
        """Whether DLA can be asked for."""
        return not self.no_dla


def parse_version(text: str) -> Version:
    """Return (major, minor) of ``8.2.1``, ``10.3.0.30``, ``v8510``, ``100300`` or ``TensorRT v101601``.

    trtexec prints the version without dots: four or five digits before 10 (v8510 is 8.5.10), six from 10 on
    (v100300 is 10.3.0).

    Raises:
        TargetError: It is no version.
    """
    return parse_release(text)[:2]


def parse_release(text: str) -> Release:
    """Return (major, minor, patch), read as by `parse_version`; the patch is 0 where it is not given.

    Raises:
        TargetError: It is no version.
    """
    dotted = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    if dotted:
        return int(dotted[1]), int(dotted[2]), int(dotted[3] or 0)
    digits = re.search(r"\d{4,6}", text)
    if digits:
        number = digits[0]
        if len(number) == 6:
            return int(number[:2]), int(number[2:4]), int(number[4:])
        return int(number[0]), int(number[1]), int(number[2:])
    raise TargetError(f"'{text}' is no TensorRT version", remedy="write it as 8.5 or 10.3")


def capabilities(version: str | Version | Release) -> Capabilities:
    """Return what a TensorRT version understands, on a board that has a DLA; for one board see `Device.capabilities`.

    Args:
        version: ``8.5.2``, ``v8502``, or (major, minor), or (major, minor, patch).

    Raises:
        TargetError: It is no version, or older than 8.2.
    """
    release = parse_release(version) if isinstance(version, str) else (*version, 0)[:3]
    v = release[:2]
    if v < OLDEST:
        raise TargetError(f"TensorRT {v[0]}.{v[1]} is too old", remedy="8.2 (JetPack 4.6.1) is the oldest that reads INT8 Q/DQ")
    max_opset = next(o for since, o in MAX_OPSETS if v >= since)
    return Capabilities(
        version=v,
        opset=min(max_opset, 19),
        max_opset=max_opset,
        strongly_typed=v >= (10, 12),
        precision_flags=v < (11, 0),
        mem_pool_size=v >= (8, 4),
        skip_inference="--skipInference" if v >= (8, 6) else "--buildOnly",
        explicit_batch_flag=v < (10, 0),
        no_dla="" if v <= LAST_DLA or release >= DLA_AGAIN else f"TensorRT {'.'.join(map(str, release))} does not run on a DLA",
        qdq_on_dla=release >= DLA_AGAIN,
    )


MAX_OPSETS: tuple[tuple[Version, int], ...] = (
    ((11, 0), 25),
    ((10, 15), 24),
    ((10, 0), 20),
    ((9, 2), 19),
    ((8, 4), 17),
    (OLDEST, 13),
)
"""Newest first: since which version the parser reads up to which opset."""

DLA_REMEDY = (
    "leave the DLA out; AGX Orin, Orin NX and Xavier have one (TensorRT up to 10.7, JetPack 6; AGX Orin from 11.4.1, too)"
)
