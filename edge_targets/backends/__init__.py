"""One file per runtime, each with the same three functions (the ``Backend`` protocol below).

``available()`` says whether the runtime works here, ``build()`` makes the artifact that the device loads, ``runner()``
returns a `rescompress.core.runner.Runner`. Nothing here imports a runtime until it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edge_targets.device import Precision, Target
from rescompress.core.runner import Runner

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PACKAGE = "edge_targets.backends"


@dataclass(frozen=True)
class Availability:
    """Whether a runtime works here.

    Attributes:
        ok: It does.
        version: Of the runtime, where it is installed.
        reason: Why it does not.
        remedy: What would change that.
    """

    ok: bool
    version: str | None = None
    reason: str | None = None
    remedy: str | None = None

    def __bool__(self) -> bool:
        """Return `ok`."""
        return self.ok


@dataclass(frozen=True)
class Built:
    """What a build left behind.

    Attributes:
        path: The artifact that the runtime loads, or None where nothing can be built here.
        status: One sentence for the user: what was built, or why nothing was.
        details: What a reader may want: layers, memory, versions. JSON values only.
    """

    path: Path | None
    status: str
    details: dict[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """What a file in this package offers."""

    def available(self) -> Availability:
        """Return whether the runtime works here."""
        ...

    def build(self, onnx_path: Path, folder: Path, *, target: Target, precision: Precision, batch: int | None = None) -> Built:
        """Build the artifact for `target` from an ONNX file into `folder`.

        Args:
            onnx_path: The model.
            folder: Where the artifact goes; the file is named after the model.
            target: The device.
            precision: What the model computes in.
            batch: Images per call, for a model with a dynamic batch.

        Raises:
            ToolMissing: The runtime is not installed.
            ModelFileError: It refuses the model.
            EnvironmentFailed: The build failed for another reason.
        """
        ...

    def runner(self, path: Path, *, threads: int | None = None, batch: int | None = None) -> Runner:
        """Return a runner for an ONNX file or a built artifact.

        Args:
            path: The file.
            threads: CPU threads; all cores when None.
            batch: Fix a dynamic batch to this size, which some runtimes run faster.

        Raises:
            ToolMissing: The runtime is not installed.
            ModelFileError: It cannot load the file.
        """
        ...


def cpu_threads(threads: int | None) -> int:
    """Return `threads`, or the number of cores this process may use."""
    return threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads or os.cpu_count() or 1


def in_batches(
    call: Callable[[NDArray[np.float32]], NDArray[np.float32]], x_NCHW: NDArray[np.float32], batch: int | None
) -> NDArray[np.float32]:
    """Run `call` over `x_NCHW` in pieces of exactly `batch` images, the last one padded with zeros; return logits (N, K).

    Args:
        call: Takes (batch, C, H, W), returns (batch, K).
        x_NCHW: Any number of images.
        batch: The only size `call` takes; None when it takes any.
    """
    import numpy as np

    x_NCHW = np.ascontiguousarray(x_NCHW, dtype=np.float32)
    if batch is None or len(x_NCHW) == batch:
        return call(x_NCHW)
    pieces = []
    for start in range(0, len(x_NCHW), batch):
        piece = x_NCHW[start : start + batch]
        short = batch - len(piece)
        padded = np.concatenate([piece, np.zeros((short, *piece.shape[1:]), np.float32)]) if short else piece
        pieces.append(call(padded)[: len(piece)].copy())
    return np.concatenate(pieces)
