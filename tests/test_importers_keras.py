"""Keras models by their configuration: what was read computes what Keras computes; classes of people's own are refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rescompress as rc
from compress.importers.proof import ENDS, difference
from compress.resnet import build_model
from rescompress.core.errors import CheckpointError

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")
L = keras.layers
pytestmark = pytest.mark.slow


def block(x: Any, f: int, stride: int) -> Any:
    y = L.BatchNormalization(scale=False)(L.Conv2D(f, 3, stride, "same")(x))
    y = L.Conv2D(f, 3, 1, "same")(L.Activation("relu")(y))
    y = L.BatchNormalization(center=False)(y)
    x = L.Conv2D(f, 1, stride, "same")(x) if stride > 1 else x
    return L.ReLU()(L.Add()([x, y]))


def functional() -> Any:
    i = L.Input((32, 32, 3))
    x = L.Conv2D(8, 3, 2, "same", use_bias=False)(L.Rescaling(1 / 127.5, -1)(i))
    x = block(block(x, 8, 1), 16, 2)
    x = L.Flatten()(L.SeparableConv2D(24, 3, padding="same", activation="swish")(x))
    return keras.Model(i, L.Dense(10, activation="softmax")(L.Dropout(0.3)(x)))


def sequential() -> Any:
    return keras.Sequential(
        [
            *(L.Input((27, 28, 1)), L.ZeroPadding2D(((1, 0), (2, 1))), L.Conv2D(8, 5, activation="relu"), L.LeakyReLU()),
            *(L.MaxPooling2D(3, 2, "same"), L.AveragePooling2D(3, 2, "same"), L.DepthwiseConv2D(3, depth_multiplier=2)),
            *(L.ELU(), L.GlobalAveragePooling2D(), L.Dense(4, "hard_sigmoid"), L.Dense(1, activation="sigmoid")),
        ]
    )


def nested() -> Any:
    base = keras.applications.ResNet50V2(weights=None, include_top=False, input_shape=(64, 64, 3))
    i = L.Input((64, 64, 3))
    x = L.GlobalAveragePooling2D()(base(keras.applications.resnet_v2.preprocess_input(i)))
    return keras.Model(i, [L.Dense(5, name="kinds")(x), L.Dense(1, activation="tanh", name="value")(x)])


def gated() -> Any:
    i = L.Input((16, 16, 3))
    x = L.Conv2D(8, 3)(i)
    y = (x + L.Conv2D(8, 3, padding="same")(keras.ops.relu(x))) * 0.5
    gate = L.Reshape((1, 1, 8))(L.Dense(8, activation="sigmoid")(L.GlobalAveragePooling2D()(y)))
    y = L.Concatenate()([L.Multiply()([y, gate]), x])
    return keras.Model(i, L.Dense(2)(L.GlobalMaxPooling2D()(L.GroupNormalization(4)(y))))


MODELS: dict[str, Callable[[], Any]] = {f.__name__: f for f in (functional, sequential, nested, gated)}


def randomised(model: Any, random: np.random.Generator) -> Any:
    for layer in model.layers:
        if hasattr(layer, "layers"):
            randomised(layer, random)
        elif isinstance(layer, L.BatchNormalization):
            layer.set_weights([random.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    return model


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_read_as_what_keras_computes(name: str, suffix: str, tmp_path: Path) -> None:
    model = randomised(MODELS[name](), np.random.default_rng(0))
    model.save(tmp_path / f"net{suffix}")
    checkpoint = rc.load_checkpoint(tmp_path / f"net{suffix}")
    network, p = checkpoint.network, checkpoint.network.preprocessing
    pixels = np.random.default_rng(1).uniform(0, 255, (2, *model.input_shape[1:])).astype(np.float32)
    found = model(pixels if not p.assumed else pixels / 255, training=False)
    wanted = [t.detach() for t in (found if isinstance(found, list) else [found])]
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    x = x.flip(1) if p.channel_order == "bgr" else x
    x = x / 255 if p.assumed else (x * p.scale - torch.tensor(p.mean).view(-1, 1, 1)) / torch.tensor(p.std).view(-1, 1, 1)
    mine = build_model(network, checkpoint.state_dict).outputs(x.float())
    assert len(mine) == len(wanted)
    end = {"functional": "softmax", "sequential": "sigmoid"}.get(name, "")
    for a, b in zip(mine, wanted, strict=True):
        assert difference(ENDS[end](a), b) < 1e-4
    notes = str(checkpoint.provenance["notes"])
    assert "nothing proves it" in notes
    assert not end or f"the {end} at the end" in notes
    assert [o.name for o in network.outputs] == (["kinds", "value"] if name == "nested" else [network.outputs[0].name])


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_a_layer_of_a_class_of_its_own_is_refused_by_name(suffix: str, tmp_path: Path) -> None:
    @keras.saving.register_keras_serializable("mine")
    class ResidualBlock(L.Layer):  # type: ignore[misc,name-defined]
        def __init__(self, f: int, **options: Any) -> None:
            super().__init__(**options)
            self.f, self.conv = f, L.Conv2D(f, 3, padding="same")

        def call(self, x: Any) -> Any:
            return x + self.conv(x)

        def get_config(self) -> dict[str, Any]:
            return {**super().get_config(), "f": self.f}

    i = L.Input((16, 16, 3))
    model = keras.Model(i, L.Dense(2)(L.GlobalAveragePooling2D()(ResidualBlock(3, name="res_one")(i))))
    model.save(tmp_path / f"net{suffix}")
    with pytest.raises(CheckpointError, match=r"layer .res_one., of a class of its own .*ResidualBlock") as caught:
        rc.load_checkpoint(tmp_path / f"net{suffix}")
    assert "ONNX" in str(caught.value.remedy)


def test_layers_that_are_not_known_are_refused_by_name(tmp_path: Path) -> None:
    for name, layer in {
        "norm": L.LayerNormalization(name="norm"),
        "turned": L.Conv2DTranspose(4, 3, name="turned"),
        "cut": L.Cropping2D(2, name="cut"),
        "limit": L.ReLU(threshold=0.5, name="limit"),
    }.items():
        i = L.Input((16, 16, 3))
        x = L.Conv2D(4, 3)(layer(L.Conv2D(4, 3)(i)))
        keras.Model(i, L.GlobalAveragePooling2D()(x)).save(tmp_path / "net.keras")
        with pytest.raises(CheckpointError, match=f"'{name}'|crops"):
            rc.load_checkpoint(tmp_path / "net.keras")
