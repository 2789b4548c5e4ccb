"""`compare`: how far the logits of two runners, or two arrays of logits, are apart.

Shape suffixes: N images, K classes, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from export.session import open_session
from rescompress.core.errors import DataError, ModelFileError
from rescompress.core.runner import Runner

Floats = NDArray[np.float32]

MIN_AGREEMENT = 0.999
MAX_MEAN_ERROR = 1 / 255


@dataclass(frozen=True)
class Parity:
    """Two networks' logits for the same images, compared.

    Attributes:
        n: Images.
        max_abs: Largest absolute difference of a logit.
        mean_abs: Mean absolute difference.
        logit_range: Largest minus smallest logit of the reference: the measure of the two above.
        top1_agreement: Fraction of the images with the same top-1 class.
        classes: How many classes the reference predicts at all; with one, agreement says nothing.
    """

    n: int
    max_abs: float
    mean_abs: float
    logit_range: float
    top1_agreement: float
    classes: int

    @property
    def relative(self) -> float:
        """Mean absolute difference as a fraction of the logit range."""
        return self.mean_abs / self.logit_range if self.logit_range else float(self.mean_abs > 0)

    @property
    def exact(self) -> bool:
        """Whether both are the same network for all purposes: same classes, and within 1/255 of the range on average."""
        return self.top1_agreement >= MIN_AGREEMENT and self.relative <= MAX_MEAN_ERROR

    def document(self) -> dict[str, float | int]:
        """Return the values for JSON."""
        return asdict(self)


def top1(logits_NK: Floats) -> NDArray[np.int64]:
    """Return the class of each image; with a single output, whether its logit is above 0."""
    if logits_NK.shape[1] == 1:
        return (logits_NK[:, 0] > 0).astype(np.int64)
    return np.asarray(logits_NK.argmax(1), np.int64)


def compare_logits(reference_NK: Floats, candidate_NK: Floats) -> Parity:
    """Return how far two arrays of logits are apart.

    Args:
        reference_NK: Logits to measure against.
        candidate_NK: Logits of the same images.

    Raises:
        DataError: The arrays are empty, of different shapes, or hold NaN.
    """
    if reference_NK.shape != candidate_NK.shape or reference_NK.ndim != 2 or not len(reference_NK):
        raise DataError(
            f"logits of shapes {reference_NK.shape} and {candidate_NK.shape} cannot be compared",
            remedy="run both networks on the same images",
        )
    if not (np.isfinite(reference_NK).all() and np.isfinite(candidate_NK).all()):
        raise DataError("a network returned NaN or infinity", remedy="look for a diverged training or a float16 overflow")
    difference = np.abs(reference_NK.astype(np.float64) - candidate_NK)
    expected = top1(reference_NK)
    return Parity(
        n=len(reference_NK),
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        logit_range=float(reference_NK.max()) - float(reference_NK.min()),
        top1_agreement=float((expected == top1(candidate_NK)).mean()),
        classes=len(np.unique(expected)),
    )


def compare(reference: Runner, candidate: Runner, batches: Iterable[Floats]) -> Parity:
    """Return how far two runners are apart on the same batches.

    Args:
        reference: The network to measure against.
        candidate: The other one.
        batches: Preprocessed images, each (N, C, H, W).

    Raises:
        DataError: There are no batches, or a network returned NaN.
    """
    pairs = [(reference(x), candidate(x)) for x in batches]
    if not pairs:
        raise DataError("there are no images to compare on", remedy="give at least one batch")
    return compare_logits(np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs]))


class Outputs(Protocol):
    """A runner that returns all outputs of a network."""

    def outputs(self, batch_NCHW: Floats) -> Sequence[Floats]:
        """Return every output for a batch."""
        ...


def compare_outputs(reference: Outputs, candidate: Outputs, batches: Iterable[Floats]) -> Parity:
    """Return how far the outputs of two runners are apart: of several outputs, of the one that is farthest.

    Of a map each pixel counts as an image, and its channels as classes.

    Args:
        reference: The network to measure against.
        candidate: The other one.
        batches: Preprocessed images, each (N, C, H, W).

    Raises:
        DataError: There are no batches, the outputs do not match, or a network returned NaN.
    """
    pairs = [(reference.outputs(x), candidate.outputs(x)) for x in batches]
    if not pairs or len({len(made) for pair in pairs for made in pair}) != 1:
        raise DataError("there are no outputs to compare", remedy="give at least one batch, and the file of this network")
    found = [
        compare_logits(*(np.concatenate([_rows(pair[side][i]) for pair in pairs]) for side in (0, 1)))
        for i in range(len(pairs[0][0]))
    ]
    return min(found, key=lambda parity: (parity.exact, -parity.relative))


def _rows(values: Floats) -> Floats:
    return values if values.ndim == 2 else np.moveaxis(values, 1, -1).reshape(-1, values.shape[1])


class OrtRunner:
    """Runs an ONNX model in onnxruntime on the CPU, graph optimisations off unless asked for; one thread, no spinning.

    Attributes:
        runtime: ``onnxruntime``.
    """

    runtime = "onnxruntime"

    def __init__(self, model: onnx.ModelProto, *, optimize: bool = True, threads: int = 1) -> None:
        """Open a session.

        Args:
            model: The model.
            optimize: Whether onnxruntime may rewrite the graph (it then computes INT8 convolutions in integers).
            threads: CPU threads.

        Raises:
            ModelFileError: onnxruntime cannot load the model.
        """
        try:
            self._session = open_session(model, threads=threads, level="all" if optimize else "off")
        except Exception as e:
            raise ModelFileError(f"onnxruntime cannot load the model: {e}", remedy="run `rescompress lint` on it") from e
        self.input_name = self._session.get_inputs()[0].name
        self.input_shape = tuple(self._session.get_inputs()[0].shape)

    def __call__(self, batch_NCHW: Floats) -> Floats:
        """Return the first output for a batch; a model with a fixed batch is fed in pieces of that size, the last padded."""
        return self.outputs(batch_NCHW)[0]

    def outputs(self, batch_NCHW: NDArray[Any]) -> list[Floats]:
        """Return every output for a batch, as a call does the first."""
        fixed = self.input_shape[0]
        if not isinstance(fixed, int) or fixed == len(batch_NCHW):
            return self._run(batch_NCHW)
        parts = []
        for start in range(0, len(batch_NCHW), fixed):
            part = batch_NCHW[start : start + fixed]
            short = fixed - len(part)
            padded = np.concatenate([part, np.zeros((short, *part.shape[1:]), part.dtype)]) if short else part
            parts.append([output[: len(part)] for output in self._run(padded)])
        return [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]

    def _run(self, batch_NCHW: NDArray[Any]) -> list[Floats]:
        outputs: list[Floats] = self._session.run(None, {self.input_name: batch_NCHW})
        return outputs

    def __enter__(self) -> OrtRunner:
        """Return itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Free the session."""
        del self._session
