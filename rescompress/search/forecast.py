"""What is known of a candidate before anything is computed for it, and its evaluation at the very end; both need torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from compress.checkpoints import load_checkpoint
from compress.evaluate import TorchRunner, evaluate
from compress.prune import Budget, choose
from compress.prune.apply import pruned_network
from compress.prune.groups import droppable
from compress.prune.plan import PruningPlan
from edge_targets.catalog import load_target
from rescompress.core.artifact import make_folder
from rescompress.core.graph import Network
from rescompress.core.layers import total_macs, total_params, walk
from rescompress.core.manifest import Manifest
from rescompress.core.outcomes import Outcomes
from rescompress.core.settings import BudgetKind
from rescompress.core.spec import ModelSpec
from rescompress.runs.config import RunConfig
from rescompress.runs.plan import opening_of
from rescompress.runs.reporter import Reporter
from rescompress.runs.settings import Settings
from rescompress.runs.stage import Context, Source
from rescompress.runs.stages.network import align_of, latency_cost, shared_curves
from rescompress.runs.stages.shared import dataset, need_classes, network_of
from rescompress.runs.store import Store


@dataclass(frozen=True)
class Forecast:
    """A pruned network that nobody has made yet.

    Attributes:
        spec: What it will be.
        macs: Of it.
        params: Of it.
        error: Summed error of the curves at its widths.
        network: Digest of what decides what it becomes: the channels that stay, and everything of the config but the budget.
    """

    spec: ModelSpec | Network
    macs: int
    params: int
    error: float
    network: str


def forecast(config: RunConfig, settings: Settings, store: Store, reporter: Reporter) -> Forecast:
    """Return what pruning would leave, from curves that are measured once for all candidates of a network.

    Raises:
        BudgetError: No allowed network meets the budget.
    """
    make_folder(store.folder)
    context = Context(store.folder, Manifest(), reporter, store=store)
    checkpoint = Source(opening=opening_of(config)).load(context)
    need_classes(checkpoint.spec)
    spec, error, plan = checkpoint.spec, 0.0, None
    if config.prune is not None and config.prune.plan is None:
        images = None
        if settings.data is not None:
            images = dataset(settings, spec).train.take(config.prune.calib, settings.seed).tensor()
        curves = shared_curves(context, checkpoint, settings, config.prune, images)
        known = [load_target(name) for name in config.targets]
        kind, value = config.prune.budget
        choice = choose(
            spec,
            curves,
            budget=Budget(kind=kind, value=value),
            method=config.prune.method,
            scope=config.prune.scope,
            align=align_of(config.prune, known),
            strict_align=isinstance(config.prune.align, int),
            drop=droppable(spec) if config.prune.may_drop and kind != "ratio" else (),
            seed=settings.seed,
            cost=latency_cost(known) if kind == "latency" else None,
        )
        spec, error, plan = pruned_network(spec, choice.plan), choice.error, choice.plan
    layers = walk(spec)
    return Forecast(spec, total_macs(layers), total_params(layers), error, _digest(config, plan))


def _digest(config: RunConfig, plan: PruningPlan | None) -> str:
    document = config.model_dump(mode="json", exclude={"search"})
    if plan is not None and config.prune is not None and config.prune.iterations == 1:  # else the way there counts, too
        document["prune"] = {k: v for k, v in document["prune"].items() if k not in get_args(BudgetKind)}
        document["plan"] = plan.model_dump(mode="json", exclude={"budget"})
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


class _Listening:
    """A runner that keeps the scores it hands on."""

    def __init__(self, inner: TorchRunner) -> None:
        self.inner = inner
        self.runtime = inner.runtime
        self.scores: list[NDArray[np.float32]] = []

    def __enter__(self) -> _Listening:
        """Take the network as the runner inside does."""
        self.inner.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        """Give it back."""
        self.inner.__exit__(*exc)

    def __call__(self, batch_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits (N, K)."""
        self.scores.append(self.inner(batch_NCHW))
        return self.scores[-1]


def evaluate_file(path: Path, settings: Settings, reporter: Reporter) -> tuple[Outcomes, float]:
    """Return which images of the evaluation split a checkpoint of ours gets right, and how sure it is of the right class.

    How sure: the geometric mean of the probability that it gives the right class, which is exp(-log loss); from 0 to 1.
    """
    checkpoint = load_checkpoint(path)
    need_classes(checkpoint.spec)
    split = dataset(settings, checkpoint.spec).val
    heard = _Listening(TorchRunner(network_of(checkpoint), settings.torch_device()))
    with heard:
        found = evaluate(
            heard,
            split,
            batch_size=settings.eval_batch(checkpoint.spec.input_shape),
            outputs=checkpoint.spec.num_classes,
            progress=lambda done, total: reporter.progress("evaluate", done, total),
        )
    return found.outcomes, sureness(np.concatenate(heard.scores), split.labels)


def sureness(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Return the geometric mean of the probability of the right class.

    Args:
        logits: One row an image; of one column, where class 1 is a positive score.
        labels: The right class of each.
    """
    scores = logits.astype(np.float64)
    if scores.shape[1] == 1:
        scores = np.concatenate([np.zeros_like(scores), scores], axis=1)
    top = scores.max(1, keepdims=True)
    total = top[:, 0] + np.log(np.exp(scores - top).sum(1))
    return float(np.exp((scores[np.arange(len(labels)), labels] - total).mean()))
