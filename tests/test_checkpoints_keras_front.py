"""What stands in front of a Keras backbone, and behind it: composed exactly, or refused by name."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.checkpoints import load_checkpoint
from compress.checkpoints.keras_front import Node, preprocessing_of, read_front
from compress.data import normalise
from compress.resnet import build_model
from rescompress.core.errors import CheckpointError

INPUT = Node("InputLayer", "input", {"batch_shape": [None, 64, 64, 3]})
OPEN = Node("InputLayer", "input", {"batch_shape": [None, None, None, 3]})
PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4), dtype=np.uint8))


def rescaling(scale: object, offset: object = 0.0) -> Node:
    return Node("Rescaling", "rescaling", {"scale": scale, "offset": offset})


def tensor(name: str) -> dict[str, object]:
    return {"class_name": "__keras_tensor__", "config": {"keras_history": [name, 0, 0]}}


def op(kind: str, name: str, *args: object, **settings: object) -> Node:
    return Node(kind, name, settings, [{"args": list(args), "kwargs": {}}])


ELLIPSIS = {"class_name": "__ellipsis__", "config": {}}
CAFFE = [
    *(op("GetItem", f"g{i}", tensor("input"), [ELLIPSIS, i]) for i in (2, 1, 0)),
    op("Stack", "stack", [tensor("g2"), tensor("g1"), tensor("g0")], axis=-1),
    op("Add", "add", tensor("stack"), {"class_name": "__tensor__", "config": {"value": [[[[-103.939, -116.779, -123.68]]]]}}),
]
KNOWN: dict[str, tuple[list[Node], str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "1/255": ([rescaling(1 / 255)], "rescale", lambda x: x / 255),
    "twice": ([rescaling(1 / 255), rescaling(2.0, -1.0)], "half", lambda x: x / 127.5 - 1),
    "an offset first": ([rescaling(1.0, -100.0), rescaling(0.5)], "keras", lambda x: (x - 100) * 0.5),
    "per channel": (
        [rescaling([0.1, 0.2, 0.3], [1, 2, 3])],
        "keras",
        lambda x: x * torch.tensor([0.1, 0.2, 0.3])[:, None, None] + torch.tensor([1.0, 2.0, 3.0])[:, None, None],
    ),
    "the usual ImageNet recipe": (
        [
            rescaling(1 / 255),
            Node("Normalization", "n", {"mean": [0.485, 0.456, 0.406], "variance": [0.229**2, 0.224**2, 0.225**2]}),
        ],
        "imagenet",
        lambda x: (
            (x / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        ),
    ),
    "preprocess_input": (
        CAFFE,
        "keras-caffe",
        lambda x: x.flip(1) - torch.tensor([103.939, 116.779, 123.68])[:, None, None],
    ),
    "operators": (
        [op("TrueDivide", "a", tensor("input"), 255.0), op("Subtract", "b", tensor("a"), 0.5)],
        "keras",
        lambda x: x / 255 - 0.5,
    ),
    "augmentation between": (
        [Node("RandomFlip", "f", {}), rescaling(1 / 255), Node("RandomZoom", "z", {})],
        "rescale",
        lambda x: x / 255,
    ),
}


@pytest.mark.parametrize("what", KNOWN)
def test_affine_layers_are_composed(what: str) -> None:
    nodes, name, right = KNOWN[what]
    front = read_front([INPUT, *nodes], 3, {})
    assert front.affine is not None
    found = preprocessing_of(front.affine, (3, 64, 64))
    assert (found.name, found.assumed) == (name, False)
    wanted = right(PIXELS.float())
    assert torch.allclose(normalise(PIXELS, found), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    "node",
    [
        *(
            Node(k, "layer", {})
            for k in ("BatchNormalization", "Cropping2D", "ZeroPadding2D", "UpSampling2D", "Lambda", "Conv2D")
        ),
        *(Node(k, "layer", {}) for k in ("AveragePooling2D", "LayerNormalization", "Custom>Mine", "Permute", "Conv2D")),
        Node("Normalization", "layer", {"mean": [0.5], "variance": [1.0], "invert": True}),
        Node("Normalization", "layer", {"mean": [0.5], "variance": [1.0], "axis": [1]}),
        Node("Rescaling", "layer", {"scale": [1, 2]}),
        op("Add", "layer", tensor("input"), tensor("input")),
        op("Subtract", "layer", 1.0, tensor("input")),
        Node("Resizing", "layer", {"height": 32, "width": 32}),
        Node("CenterCrop", "layer", {"height": 32, "width": 32}),
    ],
    ids=lambda node: node.kind,
)
def test_anything_else_is_refused_by_name(node: Node) -> None:
    with pytest.raises(CheckpointError, match="'layer'"):
        read_front([INPUT, node], 3, {})


def test_a_resizing_that_has_nothing_to_do_or_states_the_size() -> None:
    same = Node("Resizing", "layer", {"height": 64, "width": 64})
    assert read_front([INPUT, same], 3, {}).size == (64, 64)
    assert read_front([OPEN, same], 3, {}).size == (64, 64)
    with pytest.raises(CheckpointError, match="crops"):
        read_front([OPEN, Node("CenterCrop", "layer", {"height": 64, "width": 64})], 3, {})


@pytest.fixture(scope="module")
def keras() -> Any:
    if importlib.util.find_spec("keras") is None:
        pytest.skip("keras is not installed: its networks are not compared")
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    if keras.backend.backend() != "torch":
        pytest.skip("keras runs on another backend than torch")
    return keras


def parts(keras: Any, what: str) -> tuple[list[Any], list[Any]]:
    layers = keras.layers
    dense = [layers.GlobalAveragePooling2D(), layers.Dense(5)]
    adapted = layers.Normalization()
    adapted.adapt(np.random.default_rng(1).random((8, 4, 4, 3)))
    table: dict[str, tuple[list[Any], list[Any]]] = {
        "recipe": ([layers.Rescaling(1 / 255), layers.Normalization(mean=[0.5, 0.4, 0.3], variance=[0.1, 0.2, 0.3])], dense),
        "adapted": ([layers.Rescaling(1 / 255), adapted], dense),
        "preprocess_input": ([keras.applications.resnet50.preprocess_input], dense),
        "torch mode": ([lambda x: keras.applications.imagenet_utils.preprocess_input(x, mode="torch")], dense),
        "hidden": ([layers.Rescaling(1 / 255)], [dense[0], layers.Dense(8), layers.ReLU(), layers.Dropout(0.3), dense[1]]),
    }
    return table[what]


def built(keras: Any, what: str) -> Any:
    keras.utils.set_random_seed(0)
    front, behind = parts(keras, what)
    x = first = keras.Input((64, 64, 3))
    for layer in front:
        x = layer(x)
    x = keras.applications.ResNet50(weights=None, include_top=False, input_shape=(64, 64, 3))(x)
    for layer in behind:
        x = layer(x)
    return keras.Model(first, x)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("what", ["recipe", "adapted", "preprocess_input", "torch mode", "hidden"])
def test_keras_computes_the_same_of_the_same_pixels(what: str, suffix: str, keras: Any, tmp_path: Path) -> None:
    model = built(keras, what)
    model.save(tmp_path / f"m{suffix}")
    loaded = load_checkpoint(tmp_path / f"m{suffix}")
    pixels = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    wanted = torch.as_tensor(np.asarray(model(pixels.astype("float32"), training=False).detach()))
    x = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2), loaded.spec.preprocessing)
    with torch.no_grad():
        found = build_model(loaded.spec, loaded.state_dict)(x)
    assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
