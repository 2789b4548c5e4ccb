"""Facts about a network that its training script stored beside the weights: input size, normalisation, resize, variant.

What stands there and is plain counts before what is merely usual; a variant that no tensor shows is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from compress.checkpoints.base import Checkpoint, LoadOptions
from compress.checkpoints.beside import places, plain
from rescompress.core.errors import CheckpointError
from rescompress.core.spec import ModelSpec, Preprocessing

_SIZE = (
    ("val_crop_size", "eval_crop_size", "test_crop_size", "test_input_size", "val_input_size"),
    (
        *("img_size", "image_size", "imgsz", "input_size", "input_resolution", "crop_size", "resolution", "input_shape"),
        *("img_shape", "image_shape", "im_size", "imsize", "size_image", "input_img_size"),
    ),
)
_RESIZE = ("val_resize_size", "val_resize", "eval_resize_size", "test_resize_size"), ("resize_size",)
_MEAN = (("mean", "image_mean", "img_mean", "norm_mean", "pixel_mean", "normalize_mean", "rgb_mean", "dataset_mean"),)
_STD = (("std", "image_std", "img_std", "norm_std", "pixel_std", "normalize_std", "rgb_std", "dataset_std"),)
_FILTER = ("val_interpolation", "test_interpolation", "eval_interpolation"), ("interpolation",)
_FORMAT = (
    ("to_rgb", "bgr_to_rgb", "bgr2rgb"),
    ("channel_order", "color_order", "colour_order", "input_format", "color_space", "image_format", "color_mode"),
)
"""Whether the BGR images of OpenCV are turned into RGB, and which of the two they are called."""
_CROP = (("crop_pct", "crop_ratio"),)
_NAME = (
    ("arch", "architecture", "model_name", "model", "backbone", "network", "net", "encoder_name", "encoder", "model_type"),
)
_VARIANT = re.compile(
    r"blur|res\w*aa\d|(^|[_-])aa([_-]|$)|anti_?alias|dilat|deeplab|(^|[_-])(fcn|pspnet)|(^|[_-])os(8|16)([_-]|$)"
    r"|silu|swish|gelu|mish|leaky|prelu|(^|[_-])elu([_-]|$)|(^|[_-])gem([_-]|$)",
    re.IGNORECASE,
)
"""Variants of a ResNet whose tensors are those of the plain one."""
_LARGEST_SIDE = 4096
_T = TypeVar("_T")


def refuse_variant(contents: tuple[object, ...], options: LoadOptions) -> None:
    """Refuse a network that the file itself calls a variant which its tensors do not show.

    Args:
        contents: Of the file, and the metadata beside it.
        options: What the user states; a name of the user's own goes before the file's.

    Raises:
        CheckpointError: It is anti-aliased or dilated, or its activation or pooling is another.
    """
    for key, value in _found(contents, _NAME) if "arch" not in options.arch else ():
        if isinstance(value, str) and "res" in value.lower() and _VARIANT.search(value):
            raise CheckpointError(
                f"its {key} is {value[:100]!r}, a variant that its tensors do not show, and that is not supported",
                remedy="supported: plain ResNets; if it is one, name it: --arch-option arch=resnet50",
            )
    for path, key, name, raw in _stated_settings(contents):
        if name in _ABOUT_STRIDES and "strides" in options.arch:
            continue
        differs, remedy = _SETTINGS[name]
        value = _literal(plain(raw))
        if value is not None and differs(value):
            raise CheckpointError(
                f"its {path}{key} is {str(value)[:60]!r}, which its tensors do not show, and that is not supported",
                remedy=remedy,
            )


def variant_in_name(stem: str, options: LoadOptions) -> list[str]:
    """Return a warning where the name of a file says a variant that its tensors do not show.

    Args:
        stem: Of the file's name; whoever gave it may have meant something else, so it is no reason to refuse.
        options: What the user states.
    """
    said = _VARIANT.search(stem) or _VARIANT_OF_A_FILE.search(stem)
    if said is None or {"strides", "arch"} & set(options.arch):
        return []
    return [
        f"the file's name says '{said[0].strip('_-. ')[:40]}', which no tensor shows: the network is read as a plain ResNet "
        "(strides and dilation are no part of a state_dict; --arch-option strides=... states them)"
    ]


def open_strides(spec: ModelSpec, options: LoadOptions) -> list[str]:
    """Return a note on the strides of a network whose tensors are all that its file holds.

    Args:
        spec: As read.
        options: What the user states.
    """
    if "strides" in options.arch or all(block.stride == 1 for block in spec.blocks):
        return []
    strides = ",".join(str(stage[0].stride) for stage in spec.stages)
    return [f"no tensor shows strides or dilation: read as strides {strides} (else: --arch-option strides=...)"]


_VARIANT_OF_A_FILE = re.compile(
    r"output_?stride_?(8|16)|last_?stride_?1|(^|[_-])(reid|market1501|msmt17|bag_?of_?tricks)", re.I
)
_SUPPORTED = "supported: ReLU, strides, and average pooling; see `rescompress formats`"
_STATE_STRIDES = "supported: strides without dilation; say the strides: --arch-option strides=1,2,2,1"


def _in(*words: str) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, str) and v.lower() in words


def _not_in(*words: str) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, str) and v.lower() not in words


def _any_above_one(value: Any) -> bool:
    return any(type(v) is int and v > 1 for v in (value if isinstance(value, list) else [value]))


def _on(value: Any) -> bool:
    return any(map(_on, value)) if isinstance(value, list) else value is True or (type(value) is int and value > 0)


def _other_strides(value: Any) -> bool:
    """Whether these are strides of stages, not those of a detector's anchors, and others than the usual ones."""
    return (
        isinstance(value, list)
        and 2 <= len(value) <= 5
        and all(v in (1, 2) for v in value)
        and value != [1] + [2] * (len(value) - 1)
    )


_SETTINGS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "output_stride": (lambda v: type(v) is int and 0 < v < 32, _STATE_STRIDES),
    "replace_stride_with_dilation": (_on, _STATE_STRIDES),
    "dilation": (_any_above_one, _STATE_STRIDES),
    "dilations": (_any_above_one, _STATE_STRIDES),
    "dilated": (_on, _STATE_STRIDES),
    "dilate_scale": (lambda v: type(v) is int and 0 < v < 32, _STATE_STRIDES),
    "multi_grid": (lambda v: v is True or _any_above_one(v), _STATE_STRIDES),
    "last_stride": (lambda v: type(v) is int and v == 1, _STATE_STRIDES),
    "last_conv_stride": (lambda v: type(v) is int and v == 1, _STATE_STRIDES),
    "strides": (_other_strides, _STATE_STRIDES),
    "act_layer": (_not_in("relu", "none", ""), _SUPPORTED),
    "aa_layer": (_not_in("none", ""), _SUPPORTED),
    "global_pool": (_in("max", "avgmax", "gem"), _SUPPORTED),
    "gp": (_in("max", "avgmax", "gem"), _SUPPORTED),
}
_ABOUT_STRIDES = frozenset(name for name, (_, remedy) in _SETTINGS.items() if remedy is _STATE_STRIDES)
_IN_TEXT = re.compile(
    rf"(?<![\w.])(?P<key>{'|'.join(sorted(_ABOUT_STRIDES, key=len, reverse=True))})['\"]?\s*[:=]\s*"
    r"(?P<value>[(\[][\w\s,]{0,80}[)\]]|\w{1,20})",
    re.IGNORECASE,
)
"""Such a setting in the text of a config, of Python or YAML, as some frameworks store it."""
_LONGEST_TEXT = 1_000_000


def _stated_settings(contents: tuple[object, ...]) -> Iterator[tuple[str, str, str, object]]:
    """Yield the settings of `_SETTINGS` that a file states: where, as written, by the name known here, and the value."""
    for path, held in places(*contents):
        for key, value in held.items():
            if not isinstance(key, str):
                continue
            name = key.lower().replace("-", "_")
            if name in _SETTINGS:
                yield path, key, name, value
            elif isinstance(value, str) and len(value) <= _LONGEST_TEXT:
                for found in _IN_TEXT.finditer(value):
                    yield f"{path}{key}: ", found["key"], found["key"].lower(), found["value"]


def _literal(value: object) -> object:
    """Return what a text such as ``16`` or ``[False, True]`` stands for, tuples as lists; other values as they are."""
    if not isinstance(value, str):
        return value
    text = value.strip().strip("()[]")
    parts = [_word(part) for part in text.split(",") if part.strip()]
    if text != value.strip() or len(parts) > 1:
        return parts
    return parts[0] if parts else value


def _word(text: str) -> object:
    text = text.strip().strip("'\"")
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else text


def with_facts(checkpoint: Checkpoint, contents: tuple[object, ...], options: LoadOptions) -> tuple[Checkpoint, list[str]]:
    """Return the checkpoint with what its file states in the place of what was assumed, and warnings on what is not used.

    Args:
        checkpoint: As read from the tensors.
        contents: Of the file, and the metadata beside it.
        options: What the user states, which goes before both.
    """
    notes: list[str] = []
    warnings: list[str] = []
    channels = checkpoint.spec.input_shape[0]
    size = None
    if options.input_shape is None:
        size = _one(contents, _SIZE, lambda v: _sides(v, channels), "input size", warnings)
    shape = checkpoint.spec.input_shape if size is None else (channels, *size[1])
    if size is not None:
        notes.append(f"the input is {'x'.join(map(str, shape))}, as its {size[0]} says (else: --input)")
    preprocessing = checkpoint.spec.preprocessing
    if options.preprocess is None and preprocessing.assumed:
        preprocessing = _preprocessing(contents, preprocessing, shape, notes, warnings)
    if not notes:
        return checkpoint, warnings
    spec = checkpoint.spec.replace(input_shape=shape, preprocessing=preprocessing)
    gone = (
        *(("the input is taken to be",) if size is not None else ()),
        *(("preprocessing is taken to be",) if not preprocessing.assumed else ()),
    )
    before = checkpoint.provenance.get("notes", [])
    kept = [n for n in before if not str(n).startswith(gone)] if isinstance(before, list) and gone else before
    provenance = {**checkpoint.provenance, "notes": [*(kept if isinstance(kept, list) else []), *notes]}
    return dataclasses.replace(checkpoint, spec=spec, provenance=provenance), warnings


def _preprocessing(
    contents: tuple[object, ...],
    assumed: Preprocessing,
    shape: tuple[int, int, int],
    notes: list[str],
    warnings: list[str],
) -> Preprocessing:
    changed: dict[str, object] = {}
    mean = _one(contents, _MEAN, lambda v: _triple(v, shape[0]), "mean", warnings)
    std = _one(contents, _STD, lambda v: _triple(v, shape[0]), "standard deviation", warnings)
    if mean is not None and std is not None and min(std[1]) > 0:
        unit = 1.0 if max(map(abs, mean[1])) > 2 or max(std[1]) > 2 else 1.0 / 255.0
        order, said = _order(contents, mean[1], warnings)
        if (mean[1], std[1], unit, order) != (assumed.mean, assumed.std, assumed.scale, assumed.channel_order):
            changed |= {"name": "stated", "mean": mean[1], "std": std[1], "scale": unit, "channel_order": order}
        notes.append(f"pixels are normalised as its {mean[0]} and {std[0]} say{said} (else: --preprocess)")
        changed["assumed"] = False
    resize = _one(contents, _RESIZE, lambda v: v if type(v) is int and 8 <= v <= _LARGEST_SIDE else None, "resize", warnings)
    crop = _one(contents, _CROP, lambda v: float(v) if isinstance(v, int | float) and 0.3 < v <= 1 else None, "crop", warnings)
    if resize is not None:
        changed["resize"] = resize[1]
        notes.append(f"the shorter side is resized to {resize[1]}, as its {resize[0]} says (else: --preprocess)")
    elif crop is not None:
        changed["resize"] = math.floor(min(shape[1:]) / crop[1])
        notes.append(f"the shorter side is resized to {changed['resize']}, as its {crop[0]} says (else: --preprocess)")
    used = _one(contents, _FILTER, _filter, "interpolation", warnings)
    if used is not None and used[1] != assumed.interpolation:
        changed["interpolation"] = used[1]
        notes.append(f"images are resized by {used[1]}, as its {used[0]} says (else: --preprocess)")
    return assumed.model_copy(update=changed) if changed else assumed


def _order(contents: tuple[object, ...], mean: tuple[float, ...], warnings: list[str]) -> tuple[str, str]:
    """Return the order in which a network reads its channels, and why it is not the usual one.

    Args:
        contents: Of the file, and the metadata beside it.
        mean: As stated.
        warnings: Gets what contradicts itself.
    """
    stated = _one(contents, _FORMAT, _format, "order of channels", warnings)
    if stated is not None and len(mean) == 3:
        return stated[1], f", {stated[1].upper()} as its {stated[0]} says" if stated[1] == "bgr" else ""
    for unit in (1.0, 255.0):
        blue_first = [unit * m for m in Preprocessing().mean[::-1]]
        if len(mean) == 3 and all(abs(m - b) <= 0.005 * unit for m, b in zip(mean, blue_first, strict=True)):
            return "bgr", ", BGR by the order of these means"
    return "rgb", ""


def _format(value: object) -> str | None:
    """Return ``rgb`` or ``bgr`` where a value says that images are turned into it, or have it."""
    if isinstance(value, bool):
        return "rgb" if value else "bgr"
    text = value.lower() if isinstance(value, str) else ""
    return text if text in ("rgb", "bgr") else None


def _found(contents: tuple[object, ...], names: tuple[tuple[str, ...], ...]) -> Iterator[tuple[str, object]]:
    for keys in names:
        for path, held in places(*contents):
            for key, value in held.items():
                if isinstance(key, str) and key.lower() in keys and value is not None:
                    yield f"{path}{key}", plain(value)


def _one(
    contents: tuple[object, ...],
    names: tuple[tuple[str, ...], ...],
    read: Callable[[object], _T | None],
    what: str,
    warnings: list[str],
) -> tuple[str, _T] | None:
    """Return the one value that the first group of names gives; several that differ are told, and none is used."""
    for group in names:
        found = [(key, value) for key, raw in _found(contents, (group,)) if (value := read(raw)) is not None]
        if not found:
            continue
        other = next((pair for pair in found if pair[1] != found[0][1]), None)
        if other is None:
            return found[0]
        warnings.append(f"its {found[0][0]} and its {other[0]} state another {what} each: not used")
        return None
    return None


def _sides(value: object, channels: int) -> tuple[int, int] | None:
    if isinstance(value, Mapping):
        value = [value.get("height"), value.get("width")]
    if isinstance(value, list) and len(value) == 3:
        value = value[1:] if value[0] == channels else value[:2] if value[2] == channels else None
    sides = [value, value] if type(value) is int else value
    if not isinstance(sides, list) or len(sides) == 1:
        sides = sides * 2 if isinstance(sides, list) else None
    if not isinstance(sides, list) or len(sides) != 2 or not all(type(n) is int and 8 <= n <= _LARGEST_SIDE for n in sides):
        return None
    return sides[0], sides[1]


def _triple(value: object, channels: int) -> tuple[float, ...] | None:
    if not isinstance(value, list) or len(value) != channels:
        return None
    if not all(type(v) in (int, float) and math.isfinite(v) for v in value):
        return None
    return tuple(float(v) for v in value)


def _filter(value: object) -> str | None:
    text = str(value).lower().rpartition(".")[2]
    return text if isinstance(value, str) and text in ("bilinear", "bicubic", "nearest") else None
