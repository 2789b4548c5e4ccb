"""Fidelity: how near the outputs of a network are to those of the dense one, where there are no labels to be right about.

Shape suffixes: N batch, F numbers of an output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from compress.data import Split
from compress.processes import ALONE, Together
from rescompress.core.errors import DataError
from rescompress.core.metric import Metric

Floats = NDArray[np.float32]


class Outputs(Protocol):
    """Anything that returns all outputs of a network.

    Attributes:
        runtime: What computes.
    """

    runtime: str

    def outputs(self, batch_NCHW: Floats) -> Sequence[Floats]:
        """Return every output for a batch."""
        ...


@dataclass(frozen=True)
class Fidelity:
    """How near a network is to its reference.

    Attributes:
        metrics: ``infidelity``, the relative error of the output that has the largest, and ``cosine``, the smallest of them.
        outputs: Both for each output, by its name, JSON values.
        notes: What the reader of a report should know about the samples.
    """

    metrics: dict[str, Metric]
    outputs: dict[str, dict[str, float]]
    notes: tuple[str, ...] = ()


def fidelity(
    candidate: Outputs,
    reference: Outputs,
    split: Split,
    names: Sequence[str],
    *,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
    sharing: Together = ALONE,
) -> Fidelity:
    """Return how near the outputs of `candidate` are to those of `reference`, image by image.

    An image's relative error is the norm of the difference of an output over the norm of the reference's; the figure is its
    mean over the images.

    Args:
        candidate: The network that is judged.
        reference: The dense network.
        split: The images.
        names: Of the outputs, in order.
        batch_size: Images per call.
        progress: Called with (done, total).
        sharing: The processes that take a share of the batches each, and all return the whole.

    Raises:
        DataError: There are no images, the outputs do not match, or a number is not finite.
    """
    if len(split) == 0:
        raise DataError("there is no image to compare on", where="--data", remedy="give a split with images")
    every = np.arange(len(split))
    parts = [every[start : start + batch_size] for start in range(0, len(split), batch_size)]
    mine = parts[sharing.rank :: sharing.world]
    errors: list[NDArray[np.float64]] = []
    cosines: list[NDArray[np.float64]] = []
    marks: set[bytes] = set()
    done = 0
    for x, _ in split.batches(batch_size, indices=np.concatenate(mine) if mine else every[:0]):
        marks |= {hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in x.numpy()}
        error_NO, cosine_NO = _compared(reference.outputs(x.numpy()), candidate.outputs(x.numpy()), names, candidate.runtime)
        errors.append(error_NO)
        cosines.append(cosine_NO)
        done += len(x)
        if progress is not None:
            progress(done, len(split))
    shares = sharing.gather((errors, cosines, marks))
    error_NO = np.concatenate([e for share in shares for e in share[0]])
    cosine_NO = np.concatenate([c for share in shares for c in share[1]])
    distinct = len(set().union(*(share[2] for share in shares)))
    means, similar = error_NO.mean(0), cosine_NO.mean(0)
    worst, farthest = int(means.argmax()), int(similar.argmin())
    spread = float(error_NO[:, worst].std(ddof=1)) if len(error_NO) > 1 else 0.0
    measured = partial(Metric, unit="fraction", provenance="measured", n=len(split), runtime=candidate.runtime)
    metrics = {
        "infidelity": measured(value=float(means[worst]), std_error=spread / distinct**0.5),
        "cosine": measured(value=float(similar[farthest])),
    }
    outputs = {name: {"relative_error": float(means[i]), "cosine": float(similar[i])} for i, name in enumerate(names)}
    copies = len(split) - distinct
    notes = (
        (f"{copies} of {len(split)} images are copies of others: the error of the figure counts each once",) if copies else ()
    )
    return Fidelity(metrics, outputs, notes)


def _compared(
    wanted: Sequence[Floats], found: Sequence[Floats], names: Sequence[str], runtime: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return relative error and cosine of each image (rows) and output (columns)."""
    shapes = [[tuple(a.shape) for a in made] for made in (wanted, found)]
    if len(wanted) != len(names) or shapes[0] != shapes[1]:
        raise DataError(
            f"outputs of {shapes[1]} cannot be compared with {shapes[0]}",
            where=runtime,
            remedy="give a trunk of this very host",
        )
    errors, cosines = [], []
    for name, a, b in zip(names, wanted, found, strict=True):
        a_NF, b_NF = (v.reshape(len(v), -1).astype(np.float64) for v in (a, b))
        if not (np.isfinite(a_NF).all() and np.isfinite(b_NF).all()):
            raise DataError(f"output {name} is not finite", where=runtime, remedy="check the checkpoint's weights")
        norm_N, own_N = np.linalg.norm(a_NF, axis=1), np.linalg.norm(b_NF, axis=1)
        off_N = np.linalg.norm(b_NF - a_NF, axis=1)
        errors.append(np.where(norm_N > 0, off_N / np.where(norm_N > 0, norm_N, 1.0), (off_N > 0).astype(float)))
        both_N = norm_N * own_N
        cosines.append(
            np.where(both_N > 0, (a_NF * b_NF).sum(1) / np.where(both_N > 0, both_N, 1.0), (off_N == 0).astype(float))
        )
    return np.stack(errors, 1), np.stack(cosines, 1)
