"""`Settings`: what all stages of a run or command share. Nothing heavy is imported before it is used."""

from __future__ import annotations

import functools
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.data.sources import is_name
from rescompress.core.errors import BadInput

_DEVICE = re.compile(r"auto|(cpu|cuda|mps)(:\d+)?")


@dataclass(frozen=True)
class Settings:
    """What all stages of a run or command share.

    Attributes:
        data: As in ``--data``, or None.
        labels: Label of the checkpoint for each class folder.
        seed: Of everything random.
        device: Where torch computes: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        threads: CPU threads of torch and the runtimes, None for all.
        batch_size: Images per call when evaluating; chosen by image size when None.
        skip_corrupt: Whether images that cannot be read are left out.
        hold_out: Part of the training images that takes the place of the evaluation split, for choices; 0 for none.

    Raises:
        BadInput: The device is none of these words.
    """

    data: str | None = None
    labels: Mapping[str, str] | None = None
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    batch_size: int | None = None
    hold_out: float = 0.0
    skip_corrupt: bool = False

    def __post_init__(self) -> None:
        """Refuse a word that is no device before anything is computed, even if no stage has to run."""
        if not _DEVICE.fullmatch(self.device):
            raise BadInput(f"unknown device '{self.device}'", where="--device", remedy="use auto, cpu, cuda, cuda:1 or mps")
        _check_source(self.data)

    @functools.cached_property
    def data_identity(self) -> str | None:
        """Hash of the data's content, or None without data; images that were read are kept for it alone."""
        from rescompress.runs.fingerprint import data_identity

        return data_identity(self.data) if self.data is not None else None

    @property
    def identity(self) -> dict[str, Any]:
        """What they contribute to a content key: the content of the data, not its place."""
        own: dict[str, Any] = {"data": self.data_identity, "labels": dict(self.labels or {}), "seed": self.seed}
        own |= {"hold_out": self.hold_out} if self.hold_out else {}
        return own | ({"skip_corrupt": True} if self.skip_corrupt else {})

    def torch_device(self) -> str:
        """Return the torch device, ``auto`` resolved.

        Raises:
            BadInput: It is not there.
        """
        from compress.device import torch_device

        return torch_device(self.device)

    def eval_batch(self, input_shape: tuple[int, int, int]) -> int:
        """Return images per call: small images go in larger batches."""
        _, height, width = input_shape
        return self.batch_size or max(1, min(256, 4_000_000 // (height * width)))


def _check_source(data: str | None) -> None:
    """Refuse a pipe or a device where data is expected: reading it may never end.

    Raises:
        BadInput: It is one.
    """
    if data is None or is_name(data):
        return
    try:
        mode = Path(data).stat().st_mode
    except OSError:
        return  # what is missing is said where it is read
    except ValueError as e:
        raise BadInput(f"is no name of a file: {e}", where="data", remedy="check the path of --data") from e
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise BadInput("is a device or a pipe, no file or folder", where=data, remedy="check the path of --data")
