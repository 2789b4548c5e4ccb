"""Stand-ins that remember what they were called with, put in the place of a function wherever it is known by name."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantize_zoo import SPECS, checkpoint_of

import rescompress
from compress.checkpoints import save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.data import Split

HOMES = (
    "compress.checkpoints",
    "compress.data",
    "compress.data.splits",
    "compress.evaluate",
    "compress.prune",
    "compress.prune.picture",
    "compress.prune.sparsity",
    "compress.quantize",
    "compress.quantize.sensitivity",
    "compress.train",
    "edge_targets.benchmark",
    "edge_targets.latency",
    "edge_targets.onnx_kernels",
    "edge_targets.board_probe",
    "edge_targets.board_work",
    "edge_targets.remote",
    "export.to_onnx",
)
"""Modules that a command may import a function from when it runs."""

torch.set_num_threads(1)
NETWORK = SPECS["dropout-head"]
BRIGHT = 255
"""Every pixel of the images for evaluation; those for training stay below 128."""


class Spy:
    """A function that remembers every call, by the names of the parameters, with defaults for what was left out."""

    def __init__(self, real: Callable[..., Any], stand_in: Callable[..., Any] | None = None) -> None:
        self.signature = inspect.signature(real)
        self.does = stand_in or real
        self.calls: list[dict[str, Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        self.calls.append(dict(bound.arguments))
        return self.does(*args, **kwargs)

    def __getitem__(self, name: str) -> Any:
        """What the parameter was in the only call."""
        assert len(self.calls) == 1, f"{len(self.calls)} calls"
        return self.calls[0][name]


@functools.cache
def _places() -> dict[int, list[tuple[Any, str]]]:
    """Return where each function is known by a name: every module of the product is imported, so that none keeps a stand-in."""
    for found in pkgutil.walk_packages(rescompress.__path__, "rescompress."):
        if not found.name.startswith("rescompress.show.track.") and not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    places: dict[int, list[tuple[Any, str]]] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "rescompress" or name in HOMES:
            for attribute, value in vars(module).items():
                if inspect.isfunction(value):
                    places.setdefault(id(value), []).append((module, attribute))
    return places


def spy_on(patch: pytest.MonkeyPatch, real: Callable[..., Any], stand_in: Callable[..., Any] | None = None) -> Spy:
    """Put a spy in the place of a function, in every module of the product and where the function may be imported from."""
    spy = Spy(real, stand_in)
    for module, attribute in _places()[id(real)]:
        patch.setattr(module, attribute, spy)
    return spy


@functools.cache
def network(*, shifted: bool = False) -> Checkpoint:
    """A small network; or one of the same shape with other weights, such as a teacher."""
    made = checkpoint_of("dropout-head")
    if shifted:
        return dataclasses.replace(made, state_dict=made.state_dict | {"conv1.weight": made.state_dict["conv1.weight"] + 1.0})
    return made


def write_inputs(folder: Path, *, train: int = 40, val: int = 12) -> dict[str, str]:
    """Write a network, a teacher and images, and return their paths by ``net``, ``teacher`` and ``data``."""
    paths = {name: str(folder / f"{name}.{kind}") for name, kind in (("net", "safetensors"), ("data", "npz"))}
    paths["teacher"] = str(folder / "teacher.safetensors")
    save_checkpoint(network(), Path(paths["net"]))
    save_checkpoint(network(shifted=True), Path(paths["teacher"]))
    random = np.random.default_rng(0)
    channels, height, width = NETWORK.input_shape
    np.savez(
        paths["data"],
        x_train=random.integers(0, 128, (train, height, width, channels), dtype=np.uint8),
        y_train=np.arange(train) % 4,
        x_val=np.full((val, height, width, channels), BRIGHT, dtype=np.uint8),
        y_val=np.arange(val) % 4,
    )
    return paths


class Readers:
    """Who read which images: those for evaluation may be read while a network is evaluated, and at no other time."""

    def __init__(self) -> None:
        self.spy: Spy
        self.evaluating = 0
        self.train = 0
        self.val = 0
        self.leaks: list[str] = []

    def evaluate(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            self.evaluating += 1
            try:
                return real(*args, **kwargs)
            finally:
                self.evaluating -= 1

        return evaluate


@contextmanager
def watch_images(patch: pytest.MonkeyPatch) -> Iterator[Readers]:
    """Yield who reads images; at the end, nobody has read those for evaluation before or beside an evaluation."""
    from compress.evaluate import evaluate

    readers = Readers()
    pixels = Split.pixels

    def watched(self: Split, index_N: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = pixels(self, index_N)
        if bool((x == BRIGHT).all()):
            readers.val += 1
            if not readers.evaluating:
                frames = [f.function for f in inspect.stack()[1:8]]
                readers.leaks.append(" < ".join(frames))
        else:
            readers.train += 1
        return x, y

    patch.setattr(Split, "pixels", watched)
    readers.spy = spy_on(patch, evaluate, readers.evaluate(evaluate))
    yield readers
    assert not readers.leaks, f"images of the evaluation split were read outside of an evaluation: {readers.leaks}"
