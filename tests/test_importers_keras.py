"""Keras models by their configuration: what was read computes what Keras computes; classes of people's own are refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
            *(L.MaxPooling2D(3, 2, "same"), L.AveragePooling2D(3, 2), L.DepthwiseConv2D(3, depth_multiplier=2)),
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


def own(kind: str, **given: Any) -> Any:
    """A layer in the place of a function, called as if it were the plain one."""
    return getattr(L, kind)(name="relu", **given)


def gate(x: Any) -> Any:
    return L.Conv2D(x.shape[-1], 1, activation="sigmoid")(x)


CHAIN: dict[str, Callable[[Any], Any]] = {
    "conv of an activation layer": lambda x: L.Conv2D(6, 3, padding="same", activation=own("LeakyReLU", negative_slope=0.4))(x),
    "bounded relu called relu": lambda x: L.Activation(own("ReLU", max_value=0.3))(x),
    "relu with all": lambda x: L.ReLU(max_value=0.4, negative_slope=0.1)(x),
    "threshold": lambda x: L.ReLU(threshold=0.2)(x),
    "prelu called relu": lambda x: L.PReLU(shared_axes=[1, 2], name="relu")(x),
    "hard sigmoid": lambda x: L.Activation("hard_sigmoid")(x),
    "leaky": lambda x: L.Activation("leaky_relu")(x),
    "selu": lambda x: L.Activation("selu")(x),
    "gelu": lambda x: L.Activation("gelu")(x),
    "hard silu": lambda x: L.Activation("hard_silu")(x),
    "mish": lambda x: L.Activation("mish")(x),
    "softplus": lambda x: L.Activation("softplus")(x),
    "function": lambda x: L.Activation(keras.activations.relu6)(x),
    "softmax of channels": lambda x: L.Softmax()(x),
    "softmax of rows": lambda x: L.Softmax(axis=1)(x),
    "bn of rows": lambda x: L.BatchNormalization(axis=1)(x),
    "bn of channels": lambda x: L.BatchNormalization(axis=3, epsilon=0.1)(x),
    "bn in training": lambda x: L.BatchNormalization()(x, training=True),
    "group norm": lambda x: L.GroupNormalization(groups=2)(x),
    "group norm of all": lambda x: L.GroupNormalization(groups=-1)(x),
    "unit norm": lambda x: L.UnitNormalization()(x),
    "dropout in training": lambda x: L.Dropout(0.5)(x, training=True),
    "noise": lambda x: L.GaussianNoise(0.5)(x),
    "flip": lambda x: L.RandomFlip()(x),
    "crop": lambda x: L.RandomCrop(5, 5)(x),
    "no crop": lambda x: L.RandomCrop(x.shape[1], x.shape[2])(x),
    "maximum of same": lambda x: L.MaxPooling2D(3, 2, padding="same")(x),
    "window without stride": lambda x: L.AveragePooling2D((2, 3))(x),
    "even kernel": lambda x: L.Conv2D(6, 4, strides=2, padding="same")(x),
    "wide kernel": lambda x: L.Conv2D(6, (1, 3), strides=(1, 2), padding="same")(x),
    "dilated": lambda x: L.Conv2D(6, 3, padding="same", dilation_rate=2)(x),
    "groups": lambda x: L.Conv2D(6, 3, padding="same", groups=2)(x),
    "depthwise": lambda x: L.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2)(x),
    "separable": lambda x: L.SeparableConv2D(6, 3, padding="same", depth_multiplier=2)(x),
    "dense at every pixel": lambda x: L.Dense(6, activation="relu")(x),
    "gate": lambda x: L.Multiply()([x, gate(L.GlobalAveragePooling2D(keepdims=True)(x))]),
    "average of three": lambda x: L.Average()([x, L.ReLU()(x), x]),
    "one less": lambda x: 1.0 - x,
    "halved twice": lambda x: (x / 2.0) * 0.5 + 0.25,
    "squared": lambda x: x * x,
    "concatenated rows": lambda x: L.Concatenate(axis=1)([x, x]),
    "concatenated": lambda x: keras.ops.concatenate([x, x * 2.0], axis=-1),
    "maximum of two": lambda x: L.Maximum()([x, x * 0.5]),
    "reshaped": lambda x: keras.ops.reshape(x, (-1, *x.shape[1:])),
    "folded": lambda x: L.Reshape((x.shape[1] * 2, x.shape[2], x.shape[3] // 2))(x),
    "turned": lambda x: L.Permute((2, 1, 3))(x),
    "doubled": lambda x: L.UpSampling2D(2, interpolation="bilinear")(x),
    "doubled by nearest": lambda x: L.UpSampling2D((2, 1))(x),
    "doubled by bicubic": lambda x: L.UpSampling2D(2, interpolation="bicubic")(x),
    "cropped": lambda x: L.Cropping2D(((1, 0), (0, 1)))(x),
    "padded": lambda x: L.ZeroPadding2D(((1, 0), (2, 1)))(x),
    "spectral": lambda x: L.SpectralNormalization(L.Conv2D(6, 3))(x),
    "nested": lambda x: keras.Sequential([L.Input(x.shape[1:]), L.Conv2D(6, 3, padding="same"), L.ReLU()])(x),
    "mean": lambda x: keras.ops.mean(x, axis=(1, 2), keepdims=True),
}
ENDING: dict[str, Callable[[Any], Any]] = {
    "pool": lambda x: L.Dense(3)(L.GlobalAveragePooling2D()(x)),
    "largest": lambda x: L.Dense(3, activation="tanh")(L.GlobalMaxPooling2D()(x)),
    "flat": lambda x: L.Dense(3)(L.Flatten()(x)),
    "turned and flat": lambda x: L.Dense(3)(L.Flatten()(L.Permute((3, 1, 2))(x))),
    "fully convolutional": lambda x: L.GlobalAveragePooling2D()(L.Conv2D(3, 1)(x)),
}


def attempt(path: Path) -> tuple[Any, CheckpointError | None]:
    """Return what is read, or the refusal."""
    try:
        return rc.load_checkpoint(path), None
    except CheckpointError as e:
        return None, e


def keras_computes_it(chain: list[str], ending: str, side: int, suffix: str, seed: int, folder: Path) -> None:
    """Assert that what is read of a model is what Keras computes, or that it is refused."""
    keras.backend.clear_session()
    random = np.random.default_rng(seed)
    i = L.Input((side, side, 3))
    try:
        x = L.Conv2D(8, 3, padding="same")(i)
        for name in chain:
            x = CHAIN[name](x)
        model = keras.Model(i, ENDING[ending](x))
        for weight in model.weights:
            if np.dtype(weight.dtype).kind == "f":
                positive = "variance" in weight.path or "gamma" in weight.path
                weight.assign(random.uniform(0.5, 2, weight.shape) if positive else random.normal(size=weight.shape) * 0.4)
        model.save(folder / f"net{suffix}")
    except (ValueError, IndexError, TypeError):  # Keras itself does not make or save it
        return
    checkpoint, error = attempt(folder / f"net{suffix}")
    if error is not None:
        assert "damaged" not in error.what
        assert error.remedy
        return
    pixels = random.normal(size=(2, side, side, 3)).astype(np.float32)
    wanted = torch.from_numpy(np.asarray(model.predict(pixels, verbose=0)))
    (mine,) = build_model(checkpoint.network, checkpoint.state_dict).outputs(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert difference(mine, wanted) < 1e-4, (chain, ending, side)


@pytest.mark.parametrize("name", CHAIN)
def test_every_layer_is_read_as_what_keras_computes_or_refused(name: str, tmp_path: Path) -> None:
    keras_computes_it([name], "pool", 8, ".keras", 0, tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(sorted(CHAIN)), min_size=1, max_size=3),
    st.sampled_from(sorted(ENDING)),
    st.sampled_from([6, 7, 8]),
    st.sampled_from([".keras", ".h5"]),
    st.integers(0, 99),
)
def test_many_models_are_read_as_what_keras_computes_or_refused(
    tmp_path: Path, chain: list[str], ending: str, side: int, suffix: str, seed: int
) -> None:
    keras_computes_it(chain, ending, side, suffix, seed, tmp_path)


def test_an_average_of_same_padding_leaves_the_padding_out(tmp_path: Path) -> None:
    """As TensorFlow and JAX have it; Keras on torch repeats the edge instead, so the numbers are made by hand."""
    i = L.Input((5, 4, 1))
    keras.Model(i, L.Flatten()(L.AveragePooling2D((3, 2), (2, 3), padding="same")(L.Conv2D(1, 1, name="c")(i)))).save(
        tmp_path / "net.keras"
    )
    checkpoint = rc.load_checkpoint(tmp_path / "net.keras")
    x = torch.arange(20.0).reshape(1, 1, 5, 4)
    rows, columns = [[0, 1], [1, 2, 3], [3, 4]], [[0, 1], [3]]  # a row above and one below; no column before the first
    wanted = torch.stack([x[0, 0][r][:, c].mean() for r in rows for c in columns])
    (found,) = build_model(checkpoint.network, checkpoint.state_dict).outputs(x)
    factor = checkpoint.state_dict["c.weight"].flatten()
    assert torch.allclose(found.flatten(), wanted * factor, rtol=1e-5)


def test_a_layer_called_as_in_training_by_keras_2_is_refused(tmp_path: Path) -> None:
    from compress.checkpoints.keras_layers import called_as_in_training

    call = [[["conv", 0, 0, {"training": True}]]]
    assert called_as_in_training({"name": "bn", "inbound_nodes": call})
    assert called_as_in_training({"name": "bn", "inbound_nodes": ["conv", 0, 0, {"training": True}]})
    for given_ in ({"training": False}, {"training": None}, {}):
        assert not called_as_in_training({"name": "bn", "inbound_nodes": [[["conv", 0, 0, given_]]]})
    assert not called_as_in_training({"name": "bn", "inbound_nodes": [{"args": [], "kwargs": {"training": True}}]})
