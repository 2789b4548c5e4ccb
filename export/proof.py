"""`Proof`: does a rewritten ONNX file compute what the file did, measured on images of the range that its input takes?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from export.graph import QUANTIZE, GraphView
from export.metadata import read_metadata
from export.parity import OrtRunner
from rescompress.core.errors import BadInput, ModelFileError
from rescompress.core.spec import Preprocessing

IMAGES = 4
"""Images of each range and seed."""
SEEDS = (0, 1, 2)
OPEN_SIZE = 64
"""What an open height or width is taken as."""

_USUAL = Preprocessing()

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """How far the outputs of two models are apart, as fractions of the range of each output.

    Attributes:
        largest: Of all values of all outputs.
        mean: On average.
    """

    largest: float
    mean: float


class Proof:
    """Runs models on the images that one of them takes, and keeps its outputs to measure others by."""

    def __init__(self, model: onnx.ModelProto) -> None:
        """Make images for a model."""
        self.images = images_for(model)
        self.reference = self.outputs(model)

    def outputs(self, model: onnx.ModelProto) -> list[Array] | None:
        """Return every output for all images; None where onnxruntime cannot run the model, or it returns no finite numbers."""
        if self.images is None:
            return None
        try:
            with OrtRunner(model, optimize=False) as runner:
                found = [runner.outputs(x) for x in self.images]
        except Exception:  # onnxruntime has one class per error code and no common base
            return None
        joined = [np.concatenate([np.atleast_1d(o) for o in outs]).astype(np.float64) for outs in zip(*found, strict=True)]
        return joined if joined and all(np.isfinite(o).all() for o in joined) else None

    @staticmethod
    def between(expected: list[Array] | None, found: list[Array] | None) -> Difference | None:
        """Return how far two models' outputs are apart; None where they cannot be compared."""
        if expected is None or found is None or [o.shape for o in expected] != [o.shape for o in found]:
            return None
        largest, mean = 0.0, 0.0
        for a, b in zip(expected, found, strict=True):
            spread = float(a.max() - a.min()) or 1.0
            off = np.abs(a - b) / spread
            largest, mean = max(largest, float(off.max())), max(mean, float(off.mean()))
        return Difference(largest, mean)


def images_for(model: onnx.ModelProto) -> list[NDArray[np.generic]] | None:
    """Return batches of images, of each range that a model's input may have; None for a model that takes no one image.

    The range is that of the file's own preprocessing where it states one, of the input's type where that is an integer, of
    the quantizer of the input where there is one; else both pixels from 0 to 1 and normalised ones are taken. Half of the
    images are smooth, as photographs are, half are noise.
    """
    stored = {i.name for i in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in stored]
    if len(inputs) != 1:
        return None
    tensor = inputs[0].type.tensor_type
    sizes = [d.dim_value for d in tensor.shape.dim]
    last = len(sizes) == 4 and sizes[3] in (1, 3) and sizes[1] not in (1, 3)
    channels = 3 if last else 1
    shape = [IMAGES, *(size or (3 if i == channels else OPEN_SIZE) for i, size in enumerate(sizes[1:], 1))]
    if not sizes or tensor.elem_type in (TensorProto.UNDEFINED, TensorProto.STRING, TensorProto.BOOL):
        return None
    if np.prod([float(s) for s in shape]) > 2**28:
        return None
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    made = []
    for low, high in _ranges(model, inputs[0].name, tensor.elem_type, shape[channels] if len(shape) > 1 else 1):
        along = [1] * len(shape)
        along[channels if len(shape) > 1 else 0] = -1
        low_C, high_C = np.reshape(low, along), np.reshape(high, along)
        for seed in SEEDS:
            unit = _unit_images(np.random.default_rng(seed), shape)
            values = low_C + unit * (high_C - low_C)
            made.append((np.rint(values) if np.issubdtype(dtype, np.integer) else values).astype(dtype))
    return made


def _ranges(model: onnx.ModelProto, name: str, kind: int, channels: int) -> list[tuple[Array, Array]]:
    """Return the smallest and largest value per channel that the input takes, for each range it may have."""
    if kind == TensorProto.INT8:
        return [(np.asarray(-128.0), np.asarray(127.0))]
    if kind not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16):
        return [(np.asarray(0.0), np.asarray(255.0))]
    try:
        about = read_metadata(model)
    except BadInput:
        about = None
    if about is not None and len(about.spec.preprocessing.mean) == channels:
        p = about.spec.preprocessing
        mean, std = np.asarray(p.mean), np.asarray(p.std)
        return [(-mean / std, (255 * p.scale - mean) / std)]
    graph = GraphView(model)
    for node in graph.consumers.get(name, []):
        scale = graph.scale(node) if node.op_type == QUANTIZE else None
        zero = graph.zero_point(node) if scale is not None else None
        if scale is not None and zero is not None and scale.size == 1 and np.issubdtype(zero.dtype, np.integer):
            step, offset, limits = float(scale.reshape(-1)[0]), float(zero.reshape(-1)[0]), np.iinfo(zero.dtype)
            return [(np.asarray(step * (limits.min - offset)), np.asarray(step * (limits.max - offset)))]
    ranges = [(np.asarray(0.0), np.asarray(1.0))]
    if channels == len(_USUAL.mean):
        mean, std = np.asarray(_USUAL.mean), np.asarray(_USUAL.std)
        ranges.append((-mean / std, (1 - mean) / std))
    else:
        ranges.append((np.asarray(-2.0), np.asarray(2.0)))
    return ranges


def _unit_images(rng: np.random.Generator, shape: list[int]) -> Array:
    """Return values from 0 to 1: the first half of the images smooth, the others noise."""
    noise = rng.random(shape)
    if len(shape) < 3:
        return noise
    smooth = noise.copy()
    for axis in range(1, len(shape)):
        for _ in range(4):
            if shape[axis] > 3:  # a channel axis is left alone
                smooth = (smooth + np.roll(smooth, 1, axis) + np.roll(smooth, 2, axis)) / 3
    flat = tuple(range(1, len(shape)))
    least, most = smooth.min(flat, keepdims=True), smooth.max(flat, keepdims=True)
    smooth = (smooth - least) / np.maximum(most - least, 1e-9)
    return np.concatenate([smooth[: len(noise) // 2], noise[len(noise) // 2 :]])


def difference(before: onnx.ModelProto, after: onnx.ModelProto) -> Difference | None:
    """Return how far two models are apart on images of the first one's range.

    None when a model is malformed, or onnxruntime cannot run it.
    """
    try:
        GraphView(after)
    except ModelFileError:
        return None
    proof = Proof(before)
    return proof.between(proof.reference, proof.outputs(after))
