"""Decides what may be left out of a network: tensors that no reader has taken, by what their names say they are.

A loss, a metric, an auxiliary or projection head, averaged weights change nothing about what the network computes; they are
left out and told. Anything else that is trained, or keeps statistics, is a part of the network that is not understood, and
without it the network computes something else: it is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from compress.checkpoints.base import Stored
from rescompress.core.errors import CheckpointError

_BESIDE = frozenset(
    (
        # other heads
        *("aux", "auxiliary", "projector", "projection", "proj", "predictor", "prediction", "prototypes", "prototype"),
        *("contrast", "contrastive", "queue", "memory", "bank", "discriminator"),
        # losses
        *("criterion", "criteria", "loss", "losses", "arcface", "cosface", "sphereface", "arc", "margin", "center", "centers"),
        *("centre", "centres", "proxy", "proxies", "triplet"),
        # metrics
        *("metric", "metrics", "acc", "accuracy", "auroc", "precision", "recall", "confmat", "confusion", "meter", "meters"),
        # averaged weights and the state of training
        *("ema", "averaged", "average", "swa", "momentum", "teacher", "target", "targets", "shadow"),
        *("optimizer", "optim", "scheduler", "scaler", "sampler"),
    )
)
"""Words of a tensor's name that say that it is no part of the network's own forward pass."""
_WEIGHTS_OF_A_LOSS = re.compile(r"(^|[._])((class|cls|pos|loss|ce|bce|sample|task)_?weights?|log_vars?|priors?)$")
_INPUT_NORM = re.compile(r"(^|[._])(pixel_?|input_?|img_?|image_?|norm_?)?(mean|std|sigma|mu)s?$", re.IGNORECASE)
_SHOWN = 4


def beside(key: str) -> bool:
    """Whether a name says that its tensor is used in training only."""
    words = set(re.split(r"[._\d]+", key.lower()))
    return bool(words & _BESIDE) or _WEIGHTS_OF_A_LOSS.search(key.lower()) is not None


def is_input_norm(key: str) -> bool:
    """Whether a name is that of a mean or a deviation of the input's pixels."""
    return _INPUT_NORM.search(key) is not None


def left_out(tensors: Mapping[str, Stored], *, heads: Iterable[str] = ()) -> list[str]:
    """Return the keys of the tensors, all of which may be left out.

    Args:
        tensors: What no reader has taken, by key.
        heads: Paths of other classifiers, which may be left out, too.

    Raises:
        CheckpointError: One may not.
    """
    known = tuple(f"{path}." for path in heads)
    odd = [k for k, v in tensors.items() if not (k.startswith(known) or (beside(k) and len(v.shape) < 3) or _is_counter(v))]
    if odd:
        raise refusal(odd)
    return list(tensors)


def refusal(keys: list[str]) -> CheckpointError:
    """Return the error that names parts of the network that are not understood."""
    shown = ", ".join(k[:100] for k in keys[:_SHOWN]) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
    if all(is_input_norm(key) for key in keys):
        return CheckpointError(
            f"normalises its own input ({shown}), and the file does not say how",
            remedy="save the network without that, and state the preprocessing with --preprocess",
        )
    return CheckpointError(
        f"holds parts that are not known here: {shown}; without them the network computes something else",
        remedy="supported: a stem, residual blocks, global pooling and a head (`rescompress formats`); "
        "what only training needs may be taken out of the file",
    )


def _is_counter(stored: Stored) -> bool:
    dtype = getattr(stored, "dtype", None)
    dtype = stored.read().dtype if dtype is None else dtype
    return isinstance(dtype, torch.dtype) and not dtype.is_floating_point and not dtype.is_complex


def outside_of(tensors: Mapping[str, Stored], *, heads: Iterable[str] = ()) -> list[str]:
    """Return what stands beside a network in its file and is left out; parts that compute are refused.

    A file may hold anything beside the weights, so a lone tensor is no reason for a refusal; a layer with a weight, or with
    running statistics, is.

    Args:
        tensors: What stands there and no reader has taken, by full key.
        heads: As in `left_out`.

    Raises:
        CheckpointError: A layer stands there that is no head, loss, metric or copy.
    """
    known = tuple(f"{path}." for path in heads)
    rest = {k: v for k, v in tensors.items() if len(v.shape) < 3 and not beside(k) and not _is_counter(v)}
    layers = {k.rpartition(".")[0] for k in rest if k.endswith((".weight", ".running_mean", ".running_var"))}
    odd = [k for k in rest if k.rpartition(".")[0] in layers and not k.startswith(known)]
    if odd:
        raise refusal(odd)
    return list(rest)
