"""Keras ResNet-50, -101 and -152 (``keras.applications``), plain or as the backbone of a larger model.

What differs from torch, and where it is seen to: kernels are HWIO and dense matrices IO; convolutions have biases;
BatchNorm's epsilon is 1.001e-5; bottlenecks stride in their first convolution (v1); the explicit ``ZeroPadding2D`` layers
amount to symmetric padding. The old names of keras-applications 1.0 (``res2a_branch2a``) are read too.

Preprocessing is the user's: unless the model itself rescales its input, what ``keras.applications`` prescribes is assumed
and told.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from compress.checkpoints import heads
from compress.checkpoints.base import Checkpoint, Derived, LoadOptions, RawState, Root, Stored
from compress.checkpoints.hdf5 import calls_of, layers_of
from compress.checkpoints.keras_front import Front, Node, preprocessing_of, read_front
from compress.checkpoints.keras_layers import activation_of, called_as_in_training, every_layer, is_foreign, is_idle, leaves
from compress.checkpoints.layout import Facts, Layout, assemble, zeros
from rescompress.core.errors import CheckpointError

DESCRIPTION = "Keras ResNet-50/101/152: .h5, .weights.h5 and .keras, plain or nested in a Sequential with a head of its own"
MARKER = re.compile(r"(conv\d_block\d+_1_conv|res\d[a-z]\d*_branch2a)\.kernel$")

_NEW = re.compile(r"conv(\d)_block(\d+)_([0123])_(conv|bn)\.(\w+)")
_OLD = re.compile(r"(res|bn)(\d)([a-z])(\d*)_branch(1|2[abc])\.(\w+)")
_STEM = re.compile(r"(conv1_conv|conv1_bn|conv1|bn_conv1)\.(\w+)")
_BN = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
_NEW_EPS = 1.001e-5
_OLD_EPS = 1e-3
_STATISTICS = ("mean", "variance")  # of a Normalization


def matches(raw: RawState) -> bool:
    """Whether the layers carry the names that keras.applications gives them."""
    return any(MARKER.match(key) for key in raw.tensors)


def load(raw: RawState, root: Root, options: LoadOptions) -> Checkpoint:
    """Return the checkpoint; raises CheckpointError when it is broken or not supported."""
    if any("_preact_bn." in key or key.startswith("post_bn.") for key in raw.tensors):
        raise CheckpointError(
            "is a pre-activation ResNet (V2 of keras.applications)", remedy="supported: ResNet50, ResNet101, ResNet152 (V1)"
        )
    layout = Layout()
    dense: dict[str, dict[str, Stored]] = {}
    for key, stored in raw.tensors.items():
        name = _canonical(key)
        layer, _, part = key.rpartition(".")
        if name is not None:
            layout.tensors[name] = _turned(stored) if name.endswith(".weight") else stored
        elif (part == "kernel" and len(stored.shape) == 2) or part in (*_BN, *_STATISTICS, "bias"):
            dense.setdefault(layer, {})[part] = stored
        else:
            layout.foreign.append(key)
    config = raw.metadata.get("keras_config")
    model = _Model(config, layout) if isinstance(config, dict) else None
    old = any(key.startswith("res") for key in raw.tensors)
    if model is not None:
        chain, dropout = model.head(dense)
    else:
        chain, dropout = _chain_by_width(layout, dense), 0.0
    layout.head = chain
    channels = layout.shape("conv1.weight")
    front = model.front(channels[1] if channels is not None and len(channels) == 4 else 3, dense) if model else None
    affine = front.affine if front is not None else None
    layout.notes += front.notes if front is not None else ()
    facts = Facts(
        "keras",
        stride_at=model.stride_at() if model else 0,
        bn_eps=model.epsilon(_OLD_EPS if old else _NEW_EPS) if model else (_OLD_EPS if old else _NEW_EPS),
        preprocessing="keras-caffe",
        own_preprocessing=functools.partial(preprocessing_of, affine) if affine is not None else None,
        input_shape=model.input_shape(front) if model and front else None,
        dropout=dropout,
    )
    if affine is None and options.preprocess is None:
        layout.notes.append(
            "the file does not say how images were prepared: keras.applications prescribes keras-caffe (BGR, means taken off), "
            "many tutorials train on 1/255 RGB (--preprocess rescale)"
        )
    return assemble(raw, layout, facts, options)


def _canonical(key: str) -> str | None:
    """Return the walk's name of a backbone tensor, or None."""
    new, old, stem = _NEW.fullmatch(key), _OLD.fullmatch(key), _STEM.fullmatch(key)
    if new:
        stage, block, index, kind, part = int(new[1]) - 1, int(new[2]) - 1, int(new[3]), new[4], new[5]
    elif old:
        block = int(old[4]) if old[4] else ord(old[3]) - ord("a")
        stage, kind = int(old[2]) - 1, "conv" if old[1] == "res" else "bn"
        index, part = (0 if old[5] == "1" else "abc".index(old[5][1]) + 1), old[6]
    elif stem:
        kind = "bn" if "bn" in stem[1] else "conv"
        return f"{kind}1.{_part(kind, stem[2])}"
    else:
        return None
    layer = f"{kind}{index}" if index else f"downsample.{0 if kind == 'conv' else 1}"
    return f"layer{stage}.{block}.{layer}.{_part(kind, part)}"


def _part(kind: str, part: str) -> str:
    return _BN.get(part, part) if kind == "bn" else {"kernel": "weight"}.get(part, part)


def _turned(stored: Stored) -> Stored:
    """Return a kernel as torch has it: HWIO to OIHW; other tensors as they are."""
    if len(stored.shape) != 4:
        return stored
    h, w, i, o = stored.shape
    return Derived((o, i, h, w), lambda: stored.read().permute(3, 2, 0, 1).contiguous())


def _transposed(stored: Stored) -> Derived:
    def make() -> Tensor:
        return stored.read().t().contiguous()

    return Derived(stored.shape[::-1], make)


def _linear(parts: Mapping[str, Stored]) -> tuple[Stored, Stored]:
    weight = _transposed(parts["kernel"])
    return weight, parts.get("bias", zeros(weight.shape[:1]))


def _chain_by_width(layout: Layout, dense: dict[str, dict[str, Stored]]) -> list[tuple[Stored, Stored]]:
    """Return the dense layers in the order in which their widths fit, for a file without a configuration."""
    norms = [name for name, parts in dense.items() if "gamma" in parts]
    if norms:
        raise CheckpointError(
            f"its head holds a BatchNorm ({norms[0]}), and the file does not say where", remedy="save the whole model (.keras)"
        )
    if len(dense) > 1:
        layout.notes.append("the file has no configuration: hidden layers of the head are taken to end in ReLU")
    return [_linear(parts) for parts in dense.values() if "kernel" in parts]


@dataclass
class _Model:
    """What a Keras configuration says about the model."""

    config: Mapping[str, Any]
    layout: Layout
    layers: list[tuple[str, str, dict[str, Any]]] = field(init=False)

    def __post_init__(self) -> None:
        foreign = next(filter(is_foreign, leaves(self.config)), None)
        if foreign is not None:
            own = foreign.get("registered_name") or foreign.get("class_name")
            raise CheckpointError(
                f"holds a layer of a class of its own ({own}): its code alone says what it computes",
                remedy="save the model without it",
            )
        trained = next(filter(called_as_in_training, every_layer(self.config)), None)
        if trained is not None:
            raise CheckpointError(
                f"calls '{trained.get('name')}' as in training, whatever it is used for",
                remedy="save the model without training=True",
            )
        again = next((layer for layer in every_layer(self.config) if _calls(layer) > 1), None)
        if again is not None:
            name = again.get("name") or again.get("config", {}).get("name")
            raise CheckpointError(
                f"is no chain of layers: '{name}' is called {_calls(again)} times", remedy="save the model without that"
            )
        self.layers = layers_of(self.config)
        inner = self.config.get("config")
        for what, key in (("inputs", "input_layers"), ("outputs", "output_layers")):
            names = _ends(inner.get(key)) if isinstance(inner, Mapping) else []
            if len(names) > 1:
                raise CheckpointError(
                    f"has {len(names)} {what}: {', '.join(names[:4])}", remedy=f"save a model with one of its {what} alone"
                )

    def input_shape(self, front: Front) -> tuple[int, int, int] | None:
        """Return channels, height and width of the images, where the model states them."""
        if front.size is None:
            return None
        for _, _, settings in self.layers:
            shape = settings.get("batch_shape") or settings.get("batch_input_shape")
            if isinstance(shape, list) and len(shape) == 4 and type(shape[3]) is int and shape[3] > 0:
                return (shape[3], *front.size)
        return None

    def epsilon(self, default: float) -> float:
        found = {
            float(s["epsilon"])
            for kind, name, s in self.layers
            if kind == "BatchNormalization" and _canonical(f"{name}.gamma") and isinstance(s.get("epsilon"), int | float)
        }
        if len(found) > 1:
            raise CheckpointError(f"its BatchNorm layers have different epsilons ({sorted(found)}), which is not supported")
        return found.pop() if found else default

    def stride_at(self) -> int:
        for kind, name, settings in self.layers:
            match = re.fullmatch(r"conv[3-9]_block1_([123])_conv", name)
            if kind == "Conv2D" and match and settings.get("strides") in ([2, 2], (2, 2)):
                return int(match[1]) - 1
        return 0

    def front(self, channels: int, weights: Mapping[str, Mapping[str, Stored]]) -> Front:
        """Return what stands before the backbone, once that is seen to be as it should be."""
        first = next((i for i, (_, name, _) in enumerate(self.layers) if _in_backbone(name)), 0)
        last = max((i for i, (_, name, _) in enumerate(self.layers) if _in_backbone(name)), default=-1)
        named = not any(name.startswith("res") for _, name, _ in self.layers[first : last + 1])
        for kind, name, settings in self.layers[first : last + 1]:
            _check_backbone(kind, name, settings, named=named)
        return read_front([Node(*call) for call in calls_of(self.config)[:first]], channels, weights)

    def head(self, dense: dict[str, dict[str, Stored]]) -> tuple[list[tuple[Stored, Stored]], float]:
        """Return the head's linear layers and its dropout, read in the order of the configuration."""
        chain: list[tuple[Stored, Stored]] = []
        waiting: list[tuple[dict[str, Stored], float]] = []
        dropout, active, activation, pooled = 0.0, True, "", False
        for kind, name, settings in self._behind_the_backbone():
            if kind == "ReLU":
                _check_relu(name, settings)
            if kind == "Softmax" and settings.get("axis", -1) not in (-1, 1, [-1], [1]):
                raise CheckpointError(
                    f"its Softmax '{name}' is over axis {settings['axis']}", remedy="supported: over the classes"
                )
            if kind == "Dense":
                if not active:
                    raise CheckpointError(f"its head has two dense layers without an activation between them (before '{name}')")
                if name not in dense or "kernel" not in dense[name]:
                    raise CheckpointError(f"incomplete: the weights of '{name}' are missing", remedy="save the whole model")
                if activation not in ("relu", ""):
                    raise CheckpointError(
                        f"its head's hidden layers use '{activation}'", remedy="supported: ReLU between the layers of the head"
                    )
                layer = _linear(dense[name])
                for norm, eps in waiting:
                    layer = heads.fold_before(layer, _bn(norm), eps)
                waiting = []
                chain.append(layer)
                activation = _activation(settings)
                active = activation != "linear"
            elif kind in ("Activation", "ReLU", "Softmax"):
                wanted = {"ReLU": "relu", "Softmax": "softmax"}.get(kind) or _activation(settings)
                if wanted == "linear":
                    continue
                if waiting:
                    raise CheckpointError(
                        f"its head goes through '{wanted}' behind a BatchNorm that no linear layer can take in ('{name}')",
                        remedy="supported: ReLU behind linear layers, with BatchNorm between or not",
                    )
                if activation not in ("", "linear", wanted) or (activation == wanted != "relu"):
                    raise CheckpointError(f"its head goes through '{activation}' and then '{wanted}' ('{name}')")
                activation, active = wanted, True
            elif kind == "BatchNormalization":
                eps = float(settings.get("epsilon", 1e-3))
                if name not in dense or not set(_BN) <= set(dense[name]):
                    raise CheckpointError(f"incomplete: the statistics of '{name}' are missing", remedy="save the whole model")
                if chain and not active:
                    chain[-1] = heads.fold_after(chain[-1], _bn(dense[name]), eps)
                else:
                    waiting.append((dense[name], eps))
                self.layout.notes.append("BatchNorm of the head was folded into its linear layers: the outputs are the same")
            elif kind == "Dropout":
                dropout = float(settings.get("rate", 0.0))
            elif kind == "GlobalAveragePooling2D":
                if chain and activation not in ("", "linear"):
                    raise CheckpointError(
                        f"averages what its head has made of every pixel ('{name}')",
                        remedy="supported: GlobalAveragePooling2D before the head",
                    )
                pooled = True
            elif kind == "Flatten" and not pooled:
                raise CheckpointError(
                    "flattens the feature map instead of averaging it",
                    remedy="supported: GlobalAveragePooling2D before the head",
                )
            elif kind != "Flatten" and not is_idle(kind):
                raise CheckpointError(f"its head holds a {kind} layer ('{name}'), which is not supported")
        if chain and not pooled:
            raise CheckpointError("its head is not pooled", remedy="supported: GlobalAveragePooling2D before the head")
        if waiting:
            raise CheckpointError("its head ends in a BatchNorm, which is not supported")
        if chain and activation not in ("", "linear", "softmax", "sigmoid"):
            raise CheckpointError(f"its output goes through '{activation}'", remedy="supported: softmax, sigmoid or none")
        if chain and activation in ("softmax", "sigmoid"):
            self.layout.notes.append(f"the outputs are logits: the {activation} at the end is left to the reader")
        return chain, dropout

    def _behind_the_backbone(self) -> list[tuple[str, str, dict[str, Any]]]:
        last = max((i for i, (_, name, _) in enumerate(self.layers) if _in_backbone(name)), default=-1)
        return self.layers[last + 1 :]


def _in_backbone(name: str) -> bool:
    return bool(re.match(r"conv\d_block\d+_|res\d[a-z]\d*_branch|bn\d[a-z]\d*_branch|conv1|bn_conv1|pool1_", name))


def _calls(layer: Mapping[str, Any]) -> int:
    """Return how often a layer is called; a layer of a sequence is called once."""
    calls = layer.get("inbound_nodes")
    return len(calls) if isinstance(calls, list) else 1


def _ends(value: object) -> list[str]:
    """Return the layers that a model's inputs or outputs are: ``["a", 0, 0]``, a list of such, or a dictionary."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list) or not value:
        return []
    return [str(value[0])] if isinstance(value[0], str) else [name for inner in value for name in _ends(inner)]


def _check_relu(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse a ReLU that is bounded, shifted or leaky."""
    for setting, usual in (("max_value", None), ("threshold", 0), ("negative_slope", 0)):
        value = settings.get(setting, usual)
        if value is not None and (usual is None or value != usual):
            raise CheckpointError(f"its ReLU '{name}' has {setting} {value}", remedy="supported: the plain ReLU")


def _check_backbone(kind: str, name: str, settings: Mapping[str, Any], *, named: bool) -> None:
    """Make sure that a layer between the first and the last of the backbone is what keras.applications puts there.

    Args:
        kind: Its class.
        name: Of the layer.
        settings: Its own.
        named: Whether layers without weights have names of the backbone's, too; keras-applications 1.0 numbered them.
    """
    usual = _in_backbone(name) or (not named and kind in ("Activation", "Add", "MaxPooling2D"))
    if kind == "Activation":
        fine = usual and _activation(settings) == "relu"
    elif kind == "ReLU":
        _check_relu(name, settings)
        fine = usual
    elif kind == "Conv2D":
        fine = usual and _activation(settings) == "linear" and _is_usual(name, settings)
    elif kind == "MaxPooling2D":
        fine = usual and (settings.get("pool_size"), settings.get("strides")) == ([3, 3], [2, 2])
    elif kind == "ZeroPadding2D":
        pad = {"conv1_pad": [[3, 3], [3, 3]], "pool1_pad": [[1, 1], [1, 1]]}.get(name)
        fine = pad is not None and settings.get("padding") == pad
    elif kind == "BatchNormalization":
        fine = usual and settings.get("axis", -1) in (-1, 3, [-1], [3])
    else:
        fine = (usual and kind == "Add") or is_idle(kind)
    if not fine:
        raise CheckpointError(
            f"its backbone holds a {kind} layer ('{name}') that a ResNet of keras.applications does not have, or has otherwise",
            remedy="supported: ResNet50, ResNet101, ResNet152 of keras.applications, unchanged",
        )


def _is_usual(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether a convolution of the backbone strides, pads and spreads as it does in keras.applications."""
    new, old = (
        re.fullmatch(r"conv(\d)_block(\d+)_([0123])_conv", name),
        re.fullmatch(r"res(\d)([a-z]\d*)_branch(1|2[abc])", name),
    )
    if new:
        stage, first, index = int(new[1]), new[2] == "1", new[3]
    elif old:
        stage, first, index = int(old[1]), old[2] == "a", {"1": "0", "2a": "1", "2b": "2", "2c": "3"}[old[3]]
    else:
        stage, first, index = 1, True, "0"  # the stem
    stride = 2 if first and index in "01" and stage != 2 else 1
    usual = {"strides": (stride, stride), "dilation_rate": (1, 1), "groups": 1}
    stated = {key: tuple(v) if isinstance(v := settings.get(key, default), list) else v for key, default in usual.items()}
    padding = settings.get("padding", "valid")
    padded = padding == ("same" if index == "2" else "valid") or (padding == "same" and index != "2" and stage != 1)
    return stated == usual and padded and settings.get("data_format", "channels_last") == "channels_last"


def _activation(settings: Mapping[str, Any]) -> str:
    return activation_of(settings.get("activation", "linear"))


def _bn(parts: Mapping[str, Stored]) -> dict[str, Stored]:
    return {_BN[part]: stored for part, stored in parts.items() if part in _BN}
