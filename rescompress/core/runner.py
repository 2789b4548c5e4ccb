"""`Runner`: anything that turns a batch of images into logits; torch, onnxruntime, OpenVINO and TensorRT obey it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Runner(Protocol):
    """Runs one model; a context manager that frees what it holds."""

    runtime: str

    def __call__(self, batch_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits (N, K) for preprocessed images (N, C, H, W)."""
        ...

    def __enter__(self) -> Runner:
        """Return itself."""
        ...

    def __exit__(self, *exc: object) -> None:
        """Free the model."""
        ...
