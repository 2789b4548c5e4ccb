"""The layers of a Keras configuration: those that do nothing outside of training, and those that are not Keras's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MAX_DEPTH = 24
"""Of models in models."""

_IDLE = frozenset(
    {"InputLayer", "Dropout", "SpatialDropout2D", "GaussianNoise", "GaussianDropout", "AlphaDropout", "ActivityRegularization"}
    | {"Identity", "AugMix", "CutMix", "MixUp", "RandAugment"}
    | {f"Random{what}" for what in ("Brightness", "ColorDegeneration", "ColorJitter", "Contrast", "Crop", "ElasticTransform")}
    | {f"Random{what}" for what in ("Erasing", "Flip", "GaussianBlur", "Grayscale", "Height", "Hue", "Invert", "Perspective")}
    | {f"Random{what}" for what in ("Posterization", "Rotation", "Saturation", "Sharpness", "Shear", "Translation")}
    | {f"Random{what}" for what in ("Width", "Zoom")}
)
_OWN = ("keras", "tensorflow.keras", "tensorflow.python.keras", "tf_keras", "tensorflow_core", "builtins")


def is_idle(kind: str) -> bool:
    """Whether layers of a class hand their input on outside of training."""
    return kind in _IDLE


def activation_of(value: Any) -> str:
    """Return the name of an activation's function: what computes it says so, never what a layer of its class is called.

    A layer in the place of a function has settings of its own; where they are not the usual ones, its class is named.
    """
    if not isinstance(value, Mapping):
        return str(value)
    kind, inner = str(value.get("class_name")), value.get("config")
    if not isinstance(inner, Mapping):
        return str(inner or kind)
    if kind == "Activation" and "activation" in inner:
        return activation_of(inner["activation"])
    settings = {"max_value": None, "threshold": 0, "negative_slope": 0}
    if kind == "ReLU" and all(inner.get(k, usual) in (None, usual) for k, usual in settings.items()):
        return "relu"
    return f"{kind} with settings of its own"


def called_as_in_training(layer: Mapping[str, Any]) -> bool:
    """Whether a layer of Keras 1 or 2 is called with ``training=True``: it then computes so always; Keras 3 does not."""
    calls = layer.get("inbound_nodes")
    todo = [calls]
    while todo:
        one = todo.pop()
        if isinstance(one, list):
            if len(one) == 4 and isinstance(one[0], str) and isinstance(one[3], Mapping) and one[3].get("training"):
                return True
            todo += [part for part in one if isinstance(part, list)]
    return False


def is_foreign(layer: Mapping[str, Any]) -> bool:
    """Whether a layer's class is none of Keras's own: its name says nothing, its author's code alone what it computes."""
    module = str(layer.get("module") or "keras")
    return ">" in f"{layer.get('registered_name')}{layer.get('class_name')}" or not module.startswith(_OWN)


def children(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the layers that stand in a model's configuration, nested models as one."""
    inner = config.get("config")
    layers = inner.get("layers") if isinstance(inner, dict) else inner if isinstance(inner, list) else None
    return [x for x in layers if isinstance(x, dict)] if isinstance(layers, list) else []


def every_layer(config: Mapping[str, Any], depth: int = 0) -> Iterator[dict[str, Any]]:
    """Yield every layer, models and what is in them, in order, as they stand in the configuration."""
    for layer in children(config):
        yield layer
        if depth < MAX_DEPTH:
            yield from every_layer(layer, depth + 1)


def leaves(config: Mapping[str, Any], depth: int = 0) -> Iterator[dict[str, Any]]:
    """Yield every layer that is no model, in order."""
    for layer in children(config):
        if children(layer) and depth < MAX_DEPTH:
            yield from leaves(layer, depth + 1)
        else:
            yield layer
