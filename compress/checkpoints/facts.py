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
from rescompress.core.spec import Preprocessing

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
    for path, held in places(*contents):
        for name, differs in _SETTINGS.items():
            value = plain(held.get(name))
            if value is not None and differs(value):
                raise CheckpointError(
                    f"its {path}{name} is {str(value)[:60]!r}, which its tensors do not show, and that is not supported",
                    remedy="supported: ReLU, strides, and average pooling; see `rescompress formats`",
                )


_SETTINGS: Mapping[str, Callable[[Any], bool]] = {
    "output_stride": lambda v: type(v) is int and 0 < v < 32,
    "replace_stride_with_dilation": lambda v: isinstance(v, list) and any(v),
    "act_layer": lambda v: isinstance(v, str) and v.lower() not in ("relu", "none", ""),
    "aa_layer": lambda v: isinstance(v, str) and v.lower() not in ("none", ""),
    "global_pool": lambda v: isinstance(v, str) and v.lower() in ("max", "avgmax", "gem"),
    "gp": lambda v: isinstance(v, str) and v.lower() in ("max", "avgmax", "gem"),
}


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
        if (mean[1], std[1], unit, "rgb") != (assumed.mean, assumed.std, assumed.scale, assumed.channel_order):
            changed |= {"name": "stated", "mean": mean[1], "std": std[1], "scale": unit, "channel_order": "rgb"}
        notes.append(f"pixels are normalised as its {mean[0]} and {std[0]} say (else: --preprocess)")
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
