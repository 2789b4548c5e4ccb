"""Keras models named as those of keras.applications: what is read is what Keras computes, or it is refused.

Layers in front, changes of the backbone and layers behind it are drawn; Keras itself computes what is right. The backbone is a
small one with the names of keras.applications, which is all that the reader goes by.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.checkpoints import load_checkpoint
from compress.checkpoints.formats.keras import _Model
from compress.checkpoints.keras_layers import is_idle
from compress.checkpoints.layout import Layout
from compress.data import normalise
from compress.importers.proof import ENDS, difference
from compress.resnet import build_model
from rescompress.core.errors import CheckpointError

SIDE = 32


@pytest.fixture(scope="module")
def keras() -> Any:
    if importlib.util.find_spec("keras") is None:
        pytest.skip("keras is not installed: its networks are not compared")
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    if keras.backend.backend() != "torch":
        pytest.skip("keras runs on another backend than torch")
    return keras


def backbone(layers: Any, x: Any, edit: tuple[str, str, Any] | None) -> Any:
    """One bottleneck per stage, named as keras.applications names them; `edit` changes one setting of one layer."""

    def made(kind: str, name: str, x: Any, **given: Any) -> Any:
        if edit is not None and edit[0] == name:
            given[edit[1]] = edit[2]
        if given.pop("left_out", False):
            return x
        return getattr(layers, given.pop("kind", kind))(name=name, **given)(x)

    x = made("ZeroPadding2D", "conv1_pad", x, padding=3)
    x = made("Conv2D", "conv1_conv", x, filters=8, kernel_size=7, strides=2)
    x = made("Activation", "conv1_relu", made("BatchNormalization", "conv1_bn", x, epsilon=1.001e-5), activation="relu")
    x = made("ZeroPadding2D", "pool1_pad", x, padding=1)
    x = made("MaxPooling2D", "pool1_pool", x, pool_size=3, strides=2)
    for stage in (2, 3):
        at, stride = f"conv{stage}_block1", 1 if stage == 2 else 2
        short = made("Conv2D", f"{at}_0_conv", x, filters=16, kernel_size=1, strides=stride)
        short = made("BatchNormalization", f"{at}_0_bn", short, epsilon=1.001e-5)
        y = x
        for index, (filters, size, step) in enumerate(((4, 1, stride), (4, 3, 1), (16, 1, 1)), start=1):
            padding = "same" if index == 2 else "valid"
            y = made("Conv2D", f"{at}_{index}_conv", y, filters=filters, kernel_size=size, strides=step, padding=padding)
            y = made("BatchNormalization", f"{at}_{index}_bn", y, epsilon=1.001e-5)
            if index < 3:
                y = made("Activation", f"{at}_{index}_relu", y, activation="relu")
        x = made("Activation", f"{at}_out", layers.Add(name=f"{at}_add")([short, y]), activation="relu")
    return x


FRONTS = ("none", "rescaling", "twice", "normalization", "offset", "operators", "power", "from one", "idle", "clip", "padding")
EDITS: tuple[tuple[str, str, Any] | None, ...] = (
    None,
    ("conv3_block1_1_conv", "strides", 1),  # fails to build unless the shortcut goes with it: Keras refuses it then
    ("conv2_block1_2_conv", "dilation_rate", 2),
    ("conv1_conv", "strides", 1),
    ("conv1_conv", "padding", "same"),
    ("conv1_pad", "padding", ((2, 3), (3, 2))),
    ("conv1_pad", "left_out", True),
    ("pool1_pool", "kind", "AveragePooling2D"),
    ("pool1_pool", "padding", "same"),
    ("pool1_pool", "left_out", True),
    ("conv3_block1_1_relu", "activation", "relu6"),
    ("conv3_block1_1_relu", "activation", "elu"),
    ("conv3_block1_1_relu", "left_out", True),
    ("conv3_block1_2_bn", "scale", False),
    ("conv3_block1_2_bn", "epsilon", 1e-2),
    ("conv3_block1_2_bn", "left_out", True),
    ("conv3_block1_out", "activation", "tanh"),
    ("conv2_block1_2_conv", "activation", "relu"),
    ("conv2_block1_2_conv", "groups", 2),
    ("conv2_block1_3_conv", "use_bias", False),
)
BEHIND = ("pool", "max pool", "flatten", "dense", "dense relu", "dense tanh", "bn", "relu", "relu6", "leaky", "tanh", "softmax")
BEHIND += ("softmax layer", "softmax 0", "sigmoid", "dropout", "linear", "norm", "rescaling", "threshold")


def layers_behind(layers: Any, what: str) -> Any:
    """A layer of a head."""
    dense = {"units": 6, "kernel_initializer": "random_normal", "bias_initializer": "random_normal"}
    return {
        "pool": lambda: layers.GlobalAveragePooling2D(),
        "max pool": lambda: layers.GlobalMaxPooling2D(),
        "flatten": lambda: layers.Flatten(),
        "dense": lambda: layers.Dense(**dense),
        "dense relu": lambda: layers.Dense(**dense, activation="relu"),
        "dense tanh": lambda: layers.Dense(**dense, activation="tanh"),
        "bn": lambda: layers.BatchNormalization(),
        "relu": lambda: layers.ReLU(),
        "relu6": lambda: layers.ReLU(max_value=0.1),
        "leaky": lambda: layers.LeakyReLU(),
        "threshold": lambda: layers.ReLU(threshold=0.5),
        "tanh": lambda: layers.Activation("tanh"),
        "softmax": lambda: layers.Activation("softmax"),
        "softmax layer": lambda: layers.Softmax(),
        "softmax 0": lambda: layers.Softmax(axis=0),
        "sigmoid": lambda: layers.Activation("sigmoid"),
        "dropout": lambda: layers.Dropout(0.5),
        "linear": lambda: layers.Activation("linear"),
        "norm": lambda: layers.LayerNormalization(),
        "rescaling": lambda: layers.Rescaling(2.0, offset=0.5),
    }[what]()


def prepared(keras: Any, front: str, x: Any) -> Any:
    """What stands in front."""
    layers = keras.layers
    one = layers.Rescaling(1 / 64, offset=-1.0)
    return {
        "none": lambda: x,
        "rescaling": lambda: layers.Rescaling([1 / 255, 1 / 200, 1 / 100], offset=[-0.1, 0.0, 0.2])(x),
        "twice": lambda: one(one(x)),
        "normalization": lambda: layers.Normalization(mean=[0.5, 0.4, 0.3], variance=[0.1, 0.2, 0.3])(
            layers.Rescaling(1 / 255)(x)
        ),
        "offset": lambda: layers.Rescaling(0.01)(layers.Rescaling(1.0, offset=-100.0)(x)),
        "operators": lambda: x / 127.5 - 1.0,
        "power": lambda: (x / 255.0) ** 2,
        "from one": lambda: 1.0 - x / 255.0,
        "idle": lambda: layers.RandomFlip()(layers.GaussianNoise(0.3)(layers.Rescaling(1 / 255)(x))),
        "clip": lambda: keras.ops.clip(x / 100.0, 0.0, 1.0),
        "padding": lambda: layers.ZeroPadding2D(1)(layers.Rescaling(1 / 255)(x)),
    }[front]()


def built(keras: Any, front: str, edit: tuple[str, str, Any] | None, behind: list[str]) -> Any | None:
    """The model with weights of every size; None where Keras itself takes no such model."""
    keras.utils.set_random_seed(0)
    first = keras.Input((SIDE, SIDE, 3))
    try:
        x = backbone(keras.layers, prepared(keras, front, first), edit)
        for what in behind:
            x = layers_behind(keras.layers, what)(x)
    except ValueError:
        return None
    model = keras.Model(first, x)
    random = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([random.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    return model


def check(keras: Any, path: Path, front: str, edit: tuple[str, str, Any] | None, behind: list[str]) -> str:
    """Compare what is read with Keras, or see it refused."""
    model = built(keras, front, edit, behind)
    if model is None:
        return "none"
    model.save(path)
    try:
        loaded = load_checkpoint(path)
    except CheckpointError:
        return "refused"
    finally:
        path.unlink()
    spec = loaded.spec
    if spec.preprocessing.assumed:
        assert "preprocess" in " ".join(loaded.provenance["notes"])  # which says that it is assumed: raw pixels are meant here
        spec = spec.replace(preprocessing=spec.preprocessing.model_copy(update={"mean": (0.0,) * 3, "std": (1.0,) * 3}))
    pixels = np.random.default_rng(0).integers(0, 255, (2, SIDE, SIDE, 3), dtype=np.uint8)
    wanted = torch.as_tensor(np.asarray(model(pixels.astype("float32"), training=False).detach()))
    prepared_NCHW = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2), spec.preprocessing)
    if loaded.spec.preprocessing.assumed:
        prepared_NCHW = torch.from_numpy(pixels.astype("float32")).permute(0, 3, 1, 2)
    with torch.no_grad():
        found = build_model(loaded.spec, loaded.state_dict)(prepared_NCHW)
    said = " ".join(loaded.provenance["notes"])
    ends = [name for name in ENDS if not name or f"the {name} at the end" in said]
    if wanted.ndim == 4 and found.ndim == 2:  # features of a network without a head
        wanted = wanted.mean((1, 2))
    assert min(difference(ENDS[name](found), wanted) for name in ends) <= 1e-3, (front, edit, behind, said)
    return "equal"


@pytest.mark.slow
def test_keras_computes_it_or_it_is_refused(keras: Any, tmp_path: Path) -> None:
    seen: dict[str, int] = {}

    @settings(max_examples=220, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.sampled_from(FRONTS),
        st.one_of(st.none(), st.sampled_from(EDITS)),
        st.one_of(
            st.just(["pool", "dense"]),
            st.lists(st.sampled_from(BEHIND), max_size=4).map(lambda found: ["pool", *found]),
            st.lists(st.sampled_from(BEHIND), max_size=3).map(lambda found: [*found, "pool", "dense"]),
            st.lists(st.sampled_from(BEHIND), max_size=2).map(lambda found: ["pool", "dense", *found, "dense"]),
        ),
    )
    def holds(front: str, edit: tuple[str, str, Any] | None, behind: list[str]) -> None:
        told = check(keras, tmp_path / "m.keras", front, edit, behind)
        seen[told] = seen.get(told, 0) + 1

    holds()
    assert min(seen["equal"] // 4, seen["refused"]) > 10, seen


def head(*behind: tuple[str, dict[str, Any]]) -> tuple[list[Any], float]:
    """What the reader makes of the layers behind a backbone, from a configuration alone."""
    layers = [("Activation", {"name": "conv5_block3_out", "activation": "relu"}), *behind]
    config = {"class_name": "Sequential", "config": {"layers": [{"class_name": k, "config": c} for k, c in layers]}}
    dense = {
        c["name"]: {"kernel": torch.eye(4), "bias": torch.zeros(4)} if k == "Dense" else dict.fromkeys(NORM, torch.ones(4))
        for k, c in behind
        if k in ("Dense", "BatchNormalization")
    }
    stored = {name: {part: Kept(value) for part, value in parts.items()} for name, parts in dense.items()}
    return _Model(config, Layout()).head(stored)  # type: ignore[arg-type]


NORM = ("gamma", "beta", "moving_mean", "moving_variance")


class Kept:
    """A tensor as a file holds it."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value, self.shape = value, tuple(value.shape)

    def read(self) -> torch.Tensor:
        """The values."""
        return self.value


POOL = ("GlobalAveragePooling2D", {"name": "pool"})
DENSE = ("Dense", {"name": "dense", "activation": "linear"})
RELU = ("ReLU", {"name": "relu"})
BN = ("BatchNormalization", {"name": "bn"})


@pytest.mark.parametrize(
    ("behind", "words"),
    [
        ([POOL, BN, RELU, DENSE], "behind a BatchNorm"),
        ([BN, RELU, POOL, DENSE], "behind a BatchNorm"),
        ([POOL, ("Dense", {"name": "a", "activation": "relu"}), BN, RELU, DENSE], "behind a BatchNorm"),
        ([POOL, ("Dense", {"name": "a", "activation": "tanh"}), RELU, DENSE], "'tanh' and then 'relu'"),
        ([POOL, ("Dense", {"name": "a", "activation": "relu"}), ("Softmax", {"name": "s"})], "'relu' and then 'softmax'"),
        ([POOL, DENSE, ("Softmax", {"name": "s"}), ("Softmax", {"name": "t"})], "'softmax' and then 'softmax'"),
        ([POOL, DENSE, ("Softmax", {"name": "s", "axis": 0})], "axis 0"),
    ],
)
def test_no_activation_of_a_head_is_lost(behind: list[Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        head(*behind)
    assert len(head(POOL, BN, ("Dense", {"name": "a", "activation": "relu"}), RELU, DENSE)[0]) == 2


@pytest.mark.parametrize("where", ["leaf", "nested"])
def test_a_layer_that_is_called_twice_is_no_chain(where: str) -> None:
    calls = [[["x", 0, 0, {}]], [["y", 0, 0, {}]]]
    leaf = {"class_name": "Rescaling", "config": {"name": "r", "scale": 0.1}}
    nested = {"class_name": "Sequential", "config": {"name": "s", "layers": [leaf]}}
    layer = {**(leaf if where == "leaf" else nested), "inbound_nodes": calls}
    with pytest.raises(CheckpointError, match="is called 2 times"):
        _Model({"class_name": "Functional", "config": {"layers": [layer]}}, Layout())


@pytest.mark.parametrize("layer", [{"registered_name": "mine>Rescaling"}, {"module": "mine.layers"}])
def test_a_layer_of_a_class_of_its_own_is_none_of_keras_s(layer: dict[str, str]) -> None:
    whole = {"class_name": "Rescaling", "config": {"name": "r", "scale": 0.1}, **layer}
    with pytest.raises(CheckpointError, match="class of its own"):
        _Model({"class_name": "Sequential", "config": {"layers": [whole]}}, Layout())


def test_no_class_is_idle_for_how_its_name_begins() -> None:
    assert [is_idle(f"Random{what}") for what in ("Flip", "FourierFeatures", "Thing")] == [True, False, False]
