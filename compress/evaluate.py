"""Accuracy of anything that runs, sample by sample."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from compress.data import Split
from compress.processes import ALONE, Together
from compress.resnet import ResNet
from rescompress.core.errors import DataError
from rescompress.core.metric import Metric, accuracy
from rescompress.core.outcomes import Outcomes
from rescompress.core.runner import Runner
from rescompress.core.showing import Showing

_T = TypeVar("_T")


@dataclass(frozen=True, repr=False)
class Evaluation(Showing):
    """What a model got right.

    Attributes:
        metrics: ``top1``, and ``top5`` where there are more than five classes.
        outcomes: Per-sample correctness, for paired comparisons.
        predictions: Predicted class of each sample.
        notes: What the reader of a report should know about the samples.
    """

    metrics: dict[str, Metric]
    outcomes: Outcomes
    predictions: NDArray[np.int64]
    notes: tuple[str, ...] = ()

    @property
    def top1(self) -> float:
        """Fraction of right answers."""
        return self.metrics["top1"].value

    def shows(self) -> Mapping[str, str]:
        """Return accuracies with their standard error, and on how many images."""
        found = {name: f"{100 * m.value:.2f} ± {100 * (m.std_error or 0.0):.2f} %" for name, m in self.metrics.items()}
        top1 = self.metrics["top1"]
        return {**found, "images": str(top1.n), "runtime": top1.runtime or ""}


class TorchRunner:
    """Runs a torch network in eval mode."""

    runtime = "torch"

    def __init__(self, model: nn.Module, device: str = "cpu") -> None:
        self.model = model.eval().to(device)
        self.device = device

    def __call__(self, batch_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits (N, K)."""
        with torch.inference_mode():
            x = torch.from_numpy(batch_NCHW).to(self.device)
            logits: NDArray[np.float32] = self.model(x).float().cpu().numpy()
        return logits

    def outputs(self, batch_NCHW: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Return every output of one of our networks."""
        assert isinstance(self.model, ResNet)
        with torch.inference_mode():
            return [value.float().cpu().numpy() for value in self.model.outputs(torch.from_numpy(batch_NCHW).to(self.device))]

    def __enter__(self) -> TorchRunner:
        """Return itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Do nothing: the caller owns the model."""


def evaluate(
    runner: Runner,
    split: Split,
    *,
    batch_size: int = 250,
    outputs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    sharing: Together = ALONE,
) -> Evaluation:
    """Return top-1 and top-5 of `runner` on `split`.

    A network with one output is a binary classifier: class 1 where the logit is positive.

    Args:
        runner: The model.
        split: The samples.
        batch_size: Images per call.
        outputs: Of the network, where its file or spec says; None takes any number.
        progress: Called with (done, total).
        sharing: The processes that take a share of the batches each, and all return the whole.

    Raises:
        DataError: The split is empty, or the model's output is not finite, or no row of scores for each image.
    """
    if len(split) == 0:
        raise DataError("there is no image to evaluate on", where="--data", remedy="give a split with images")
    every = np.arange(len(split))
    parts = [every[start : start + batch_size] for start in range(0, len(split), batch_size)]
    mine = parts[sharing.rank :: sharing.world]
    predictions: list[NDArray[np.int64]] = []
    hits5 = done = width = 0
    marks_by_batch: list[list[bytes]] = []
    for x, y in split.batches(batch_size, indices=np.concatenate(mine) if mine else every[:0]):
        marks_by_batch.append([hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in x.numpy()])
        logits = runner(x.numpy())
        _check_shape(logits, len(y), outputs, runner.runtime)
        if not np.isfinite(logits).all():
            raise DataError("the network's output is not finite", where=runner.runtime, remedy="check the checkpoint's weights")
        width = logits.shape[1]
        predictions.append((logits[:, 0] > 0).astype(np.int64) if width == 1 else logits.argmax(1))
        if width > 5:
            best = np.argpartition(-logits, 5, axis=1)[:, :5]
            hits5 += int((best == y.numpy()[:, None]).any(1).sum())
        done += len(y)
        if progress is not None:
            progress(done, len(split))
    shares = sharing.gather((predictions, marks_by_batch, hits5, width))
    predicted = np.concatenate(_dealt([share[0] for share in shares]))
    marks = [mark for batch in _dealt([share[1] for share in shares]) for mark in batch]
    hits5, width = sum(share[2] for share in shares), max(share[3] for share in shares)
    correct = predicted == split.labels
    first: dict[bytes, int] = {}
    copies = [i for i, mark in enumerate(marks) if first.setdefault(mark, i) != i]
    distinct = len(split) - len(copies)
    metrics = {"top1": accuracy(int(correct.sum()), len(split), runtime=runner.runtime, distinct=distinct)}
    if width > 5:
        metrics["top5"] = accuracy(hits5, len(split), runtime=runner.runtime, distinct=distinct)
    outcomes = Outcomes.pack(correct.tolist(), split.samples_sha256, split.classes, copies)
    return Evaluation(metrics, outcomes, predicted, _copy_notes(split, [(i, first[marks[i]]) for i in copies]))


def _dealt(shares: Sequence[list[_T]]) -> list[_T]:
    """Return in order what was dealt out one by one."""
    total = sum(map(len, shares))
    return [shares[i % len(shares)][i // len(shares)] for i in range(total)]


def _check_shape(logits: NDArray[np.float32], images: int, outputs: int | None, runtime: str) -> None:
    """Refuse an output that holds something else than scores: chosen classes, features, or those of other images."""
    if logits.ndim != 2 or len(logits) != images or logits.shape[1] != (outputs or logits.shape[1]):
        raise DataError(
            f"the network's output is {'x'.join(map(str, logits.shape)) or 'a single number'} for {images} images: "
            f"{images}x{outputs or 'classes'} is expected, a score for each class",
            where=runtime,
            remedy="evaluate a classifier whose first output holds its scores, for every image",
        )


def _copy_notes(split: Split, copies: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """Return notes on images that show the network the same as an earlier one, and on those with another label than it."""
    if not copies:
        return ()
    notes = [
        f"{len(copies)} of {len(split)} images are copies of others, such as {split.name(copies[0][0])} of "
        f"{split.name(copies[0][1])}: errors and the gate count each picture once"
    ]
    torn = [(i, j) for i, j in copies if split.labels[i] != split.labels[j]]
    if torn:
        i, j = torn[0]
        labels = [split.classes[int(split.labels[k])] for k in (j, i)]
        notes.append(
            f"{len(torn)} of them have another label than the picture they copy, such as {split.name(i)}: "
            f"{labels[1]}, and {split.name(j)}: {labels[0]}"
        )
    return tuple(notes)
