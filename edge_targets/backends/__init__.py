"""One file per runtime, each with the same facts and the same three functions (the ``Backend`` protocol below).

All that the rest of the product knows about a runtime is read from its file, by `load_backend`. ``available()`` says
whether the runtime works here, ``build()`` makes the artifact that the device loads, ``runner()`` returns a
`ModelRunner`. Nothing here imports a runtime until it is asked for.

A runtime is reached through a device that names it (``runtime: <name>`` in a file of ``edge_targets/devices``).
``onnxruntime.py`` is the shortest one to begin from, and `rescompress.testing.check_runtime` tells what a new one lacks.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from rescompress.core import plugins
from rescompress.core.quantizers import Profile
from rescompress.core.runner import Runner

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    # At run time devices read the facts below, so this module must not need theirs.
    from edge_targets.device import Precision, Target

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


class ModelRunner(Runner, Protocol):
    """A runner as runtimes return it: it also says how it runs the model.

    Attributes:
        batch: The only number of images that one call of the runtime takes; None where it takes any.
        options: Options that change the runtime's choice of kernels, to be told beside a measurement.
        input_type: NumPy's name of the type that the model's input has; images are cast to it.
    """

    batch: int | None
    options: Mapping[str, str]
    input_type: str

    def __enter__(self) -> ModelRunner:
        """Return itself."""
        ...


class Backend(Protocol):
    """What a file in this package offers.

    Attributes:
        PROFILE: Where quantizers go for this runtime (`rescompress.core.quantizers`).
        COST_OF_PROFILE: What networks that are quantized for other profiles lose here, one clause for the user; a profile
            that is left out gets a neutral one.
        OPSET: The ONNX opset to write, where no version of TensorRT says it.
        STRONGLY_TYPED: Whether it takes the types from the file, where no version of TensorRT says it.
        BUILDS_HERE: Whether any machine that has the package makes the artifact. Where it is false, the target is a board
            with TensorRT: it gets a bundle and a predicted latency.
        RUNS_HERE: Whether what `build` made can be run and timed on this machine where `available` says yes.
        PACKAGE: The Python distribution it comes in.
        REMEDY: How to get it.
    """

    PROFILE: Profile
    COST_OF_PROFILE: Mapping[Profile, str]
    OPSET: int
    STRONGLY_TYPED: bool
    BUILDS_HERE: bool
    RUNS_HERE: bool
    PACKAGE: str
    REMEDY: str

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
            batch: Fixes a dynamic batch to this many images per call; None leaves it dynamic.

        Raises:
            ToolMissing: The runtime is not installed.
            ModelFileError: It refuses the model.
            EnvironmentFailed: The build failed for another reason.
        """
        ...

    def runner(self, path: Path, *, threads: int | None = None, batch: int | None = None) -> ModelRunner:
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


def load_backend(name: str) -> Backend:
    """Return the runtime called `name`.

    Raises:
        BadInput: No runtime has that name, or its file lacks a fact or a function.
    """
    return cast(Backend, plugins.load(PACKAGE, name, what="runtime", offers=Backend))


def room_for(folder: Path, size: int) -> None:
    """Write that many bytes beside a file that a runtime could not write, and drop them: runtimes hide the system's reason.

    Raises:
        OSError: What the system says: the disk is full, a quota is used up.
    """
    with tempfile.TemporaryFile(dir=folder) as f:
        for _ in range(-(-size // _CHUNK)):
            f.write(b"\1" * _CHUNK)
        f.flush()
        os.fsync(f.fileno())


_CHUNK = 1 << 16


def cpu_threads(threads: int | None) -> int:
    """Return `threads`, or the number of cores this process may use."""
    return threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads or os.cpu_count() or 1


def in_batches(
    call: Callable[[NDArray[Any]], NDArray[np.float32]],
    x_NCHW: NDArray[Any],
    batch: int | None,
    input_type: str = "float32",
) -> NDArray[np.float32]:
    """Run `call` over `x_NCHW` in pieces of exactly `batch` images, the last one padded with zeros; return logits (N, K).

    Args:
        call: Takes (batch, C, H, W), returns (batch, K).
        x_NCHW: Any number of images.
        batch: The only size `call` takes; None when it takes any.
        input_type: NumPy's name of the type `call` takes.
    """
    import numpy as np

    x_NCHW = np.ascontiguousarray(x_NCHW, dtype=input_type)
    if batch is None or len(x_NCHW) == batch:
        return call(x_NCHW)
    pieces = []
    for start in range(0, len(x_NCHW), batch):
        piece = x_NCHW[start : start + batch]
        short = batch - len(piece)
        padded = np.concatenate([piece, np.zeros((short, *piece.shape[1:]), piece.dtype)]) if short else piece
        pieces.append(call(padded)[: len(piece)].copy())
    return np.concatenate(pieces)
