"""What is stated about preprocessing, on the command line, in a config, or by a checkpoint: all of it or a part.

A statement is a text such as ``imagenet,resize=232,interpolation=bicubic`` or ``mean=0.4,0.4,0.5,std=0.2,0.2,0.2``, or a
mapping with the same keys. It is laid over what is assumed otherwise.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Self, get_args

from compress import zoo
from rescompress.core.errors import BadInput, nearest
from rescompress.core.spec import ChannelOrder, Interpolation, Preprocessing

KEYS: dict[str, str] = {
    "name": "colours of one of: " + ", ".join(zoo.PREPROCESSING_NAMES) + "; in a text it may stand first without the key",
    "mean": "what is taken off each channel, in the unit of pixel * scale: 0.485,0.456,0.406, or one number for all",
    "std": "what each channel is divided by then, likewise",
    "scale": "what pixels of 0 to 255 are multiplied by first: 1/255 (as torchvision's ToTensor does), or 1",
    "channel_order": "order in which the network reads the channels, and in which mean and std stand: rgb or bgr",
    "resize": "length of the shorter side before the centre is cut out, height x width of the whole picture, or none",
    "geometry": "crop: resize the shorter side, cut the centre out; squash: resize the whole picture to the input",
    "interpolation": "filter of the resize: " + ", ".join(get_args(Interpolation)),
    "antialias": "whether the filter widens where pictures shrink: yes (Pillow, torchvision) or no (Keras, TensorFlow)",
}
"""What can be stated, and what it means."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "channel_order": get_args(ChannelOrder),
    "geometry": ("crop", "squash"),
    "interpolation": get_args(Interpolation),
    "antialias": ("yes", "no"),
}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?")
_MOST_RESIZE = 1 << 14
_LEAST_STD = 1e-3
"""Of the range of the scaled pixels: a smaller one was meant for another scale."""


@dataclasses.dataclass(frozen=True)
class Statement:
    """Facts about preprocessing; None leaves one open.

    Attributes:
        name: A preprocessing whose colours (mean, std, scale, channel order) count.
        mean: One number for all channels, or one for each.
        std: Likewise.
        scale: What a 0..255 pixel is multiplied by first.
        channel_order: ``rgb`` or ``bgr``.
        resize: As in `Preprocessing`, where ``none`` stands for its None.
        geometry: ``crop`` or ``squash``.
        interpolation: Filter of the resize.
        antialias: As in `Preprocessing`.
        where: What says so, for errors.
    """

    name: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    channel_order: str | None = None
    resize: int | tuple[int, int] | str | None = None
    geometry: str | None = None
    interpolation: str | None = None
    antialias: bool | None = None
    where: str = dataclasses.field(default="--preprocess", compare=False)

    @classmethod
    def parse(cls, said: str | Mapping[str, object], where: str = "--preprocess") -> Self:
        """Return what a text or a mapping states.

        Args:
            said: ``name,key=value,...``, where a list goes on until the next key, with ``,`` or ``:`` between its numbers
                and brackets around it or not; or the keys with texts, numbers or lists.
            where: What says so, for errors.

        Raises:
            BadInput: A key is unknown or stands twice, or a value is impossible.
        """
        words = _words(said, where)
        if not words:
            raise BadInput("states nothing", where=where, remedy="give a name or key=value: " + ", ".join(KEYS))
        facts: dict[str, Any] = {}
        for key, values in words.items():
            facts[key] = _value(key, values, where)
        return cls(**facts, where=where)._checked()

    def __str__(self) -> str:
        """Return the statement as a text that `parse` takes, the same for statements that are equal."""
        parts = [self.name] if self.name is not None else []
        for key in KEYS:
            value = getattr(self, key)
            if key == "name" or value is None:
                continue
            if isinstance(value, tuple):
                value = ("x" if key == "resize" else ":").join(str(v) for v in value)
            parts.append(f"{key}={ ({True: 'yes', False: 'no'}[value] if isinstance(value, bool) else value) }")
        return ",".join(parts)

    @property
    def about_shape(self) -> bool:
        """Whether it says anything about how a picture comes to the input's size."""
        return any(v is not None for v in (self.resize, self.geometry, self.interpolation, self.antialias))

    def over(self, assumed: Preprocessing, input_shape: tuple[int, int, int]) -> Preprocessing:
        """Return the preprocessing where this holds, and what is `assumed` in all it leaves open.

        Mean and std without a name are those of torchvision's ``ToTensor`` and ``Normalize``, on pixels of 0..1 in RGB,
        unless scale and channel order are stated too.

        Args:
            assumed: What the file says, or what is taken without a word of it.
            input_shape: Channels, height, width.

        Raises:
            BadInput: The numbers do not fit the channels, the scale or the input's size.
        """
        colours = self._colours(assumed, input_shape)
        own = any(v is not None for v in (self.mean, self.std, self.scale, self.channel_order))
        wanted = self.interpolation or assumed.interpolation
        antialias = self.antialias
        if antialias is None:
            antialias = assumed.antialias if wanted == "bilinear" else True
        return Preprocessing.model_validate(
            {
                **colours,
                "name": "custom" if own else self.name or assumed.name,
                "resize": self._resize(assumed, input_shape),
                "interpolation": wanted,
                "antialias": antialias,
                "assumed": assumed.assumed and self.name is None and self.mean is None,
            }
        )

    def _checked(self) -> Self:
        """Return the statement itself; refuse what contradicts itself whatever the network."""
        if self.name is None and (self.mean is None) != (self.std is None):
            given, missing = ("mean", "std") if self.std is None else ("std", "mean")
            raise BadInput(f"gives {given} without {missing}", where=self.where, remedy="give both, or a name they belong to")
        if self.geometry == "crop" and not isinstance(self.resize, int | None):
            raise BadInput(
                f"a crop with resize={_text(self.resize)}",
                where=self.where,
                remedy="give the length of the shorter side, such as resize=256, or geometry=squash",
            )
        if self.antialias is False and self.interpolation not in (None, "bilinear"):
            raise BadInput(
                f"{self.interpolation} without antialiasing is not known",
                where=self.where,
                remedy="leave antialias out, or interpolate bilinear",
            )
        return self

    def _colours(self, assumed: Preprocessing, input_shape: tuple[int, int, int]) -> dict[str, Any]:
        channels = input_shape[0]
        base = assumed
        if self.name is not None:
            base = zoo.preprocessing(self.name, input_shape)
        elif self.mean is not None:
            base = zoo.preprocessing("rescale", input_shape)
        scale = base.scale if self.scale is None else self.scale
        found: dict[str, Any] = {"scale": scale, "channel_order": self.channel_order or base.channel_order}
        if channels == 1:
            found["channel_order"] = "rgb"
        for key in ("mean", "std"):
            stated = getattr(self, key)
            values = getattr(base, key) if stated is None else stated * channels if len(stated) == 1 else stated
            if len(values) != channels:
                raise BadInput(
                    f"{key} has {len(values)} numbers, the network reads {channels} channels",
                    where=self.where,
                    remedy="give one for each channel, or one for all",
                )
            found[key] = values
        if self.mean is not None or self.std is not None or self.scale is not None:
            _fits_scale(found["mean"], found["std"], scale, self.where)
        return found

    def _resize(self, assumed: Preprocessing, input_shape: tuple[int, int, int]) -> int | tuple[int, int] | None:
        _, height, width = input_shape
        wanted: object = self.resize
        if wanted is None:
            if self.geometry is None or (self.geometry == "crop" and isinstance(assumed.resize, int)):
                return assumed.resize
            return zoo.usual_resize(height, width) if self.geometry == "crop" else None
        if wanted == "none":
            return None
        high, wide = wanted if isinstance(wanted, tuple) else (wanted, wanted)
        assert isinstance(high, int)
        assert isinstance(wide, int)
        whole = isinstance(wanted, tuple) or self.geometry == "squash"
        if high < height or wide < width or (not whole and high < max(height, width)):
            raise BadInput(
                f"resize={_text(wanted)} is less than the input of {height}x{width}, whose border would be black",
                where=self.where,
                remedy=f"give at least {f'{height}x{width}' if whole else max(height, width)}",
            )
        if whole:
            return None if (high, wide) == (height, width) else (high, wide)
        return high


def for_input(p: Preprocessing, before: tuple[int, int, int], after: tuple[int, int, int]) -> Preprocessing:
    """Return preprocessing for another input size: as much of each picture is seen as before.

    Args:
        p: That of the input size `before`.
        before: Channels, height, width.
        after: Likewise.
    """
    (_, high, wide), (_, height, width) = before, after
    usual = zoo.preprocessing("raw", after).resize
    resize = p.resize
    if (high, wide) == (height, width):
        return p
    if isinstance(resize, tuple):
        resize = max(round(resize[0] * height / high), height), max(round(resize[1] * width / wide), width)
    elif resize == zoo.preprocessing("raw", before).resize and p.antialias:
        resize = usual
    elif resize is not None:
        resize = max(round(resize * min(height, width) / min(high, wide)), height, width)
    return p.model_copy(update={"resize": resize})


def _words(said: str | Mapping[str, object], where: str) -> dict[str, list[str]]:
    """Return the words of each key, in order."""
    found: dict[str, list[str]] = {}

    def begin(key: str) -> list[str]:
        if key not in KEYS:
            raise BadInput(f"unknown key '{key}'", where=where, remedy=nearest(key, KEYS))
        if key in found:
            raise BadInput(f"'{key}' stands twice", where=where, remedy="give it once")
        return found.setdefault(key, [])

    if isinstance(said, Mapping):
        for key, value in said.items():
            begin(str(key)).extend(_listed(str(key), value, where))
        return found
    current: list[str] | None = None
    for part in re.sub(r"[\[\]()]", "", said).split(","):
        key, equals, value = part.partition("=")
        if equals:
            current = begin(key.strip())
            current += (word.strip() for word in value.split(":"))
        elif current is None and part.strip():
            begin("name").append(part.strip())
            current = []
        elif part.strip():
            if not current or not _NUMBER.match(part.strip()):
                raise BadInput(
                    f"'{part.strip()}' belongs to no key", where=where, remedy="write key=value; known: " + ", ".join(KEYS)
                )
            current += (word.strip() for word in part.split(":"))
        elif said.strip():
            raise BadInput("holds an empty part", where=where, remedy="write name,key=value,... with one comma between")
    return found


def _listed(key: str, value: object, where: str) -> list[str]:
    """Return a value of a mapping as words."""
    parts = value if isinstance(value, list | tuple) else [value]
    if not all(part is None or isinstance(part, bool | int | float | str) for part in parts):
        raise BadInput(f"{key} is no number, text or list of them", where=where, remedy=f"{key}: {KEYS[key]}")
    said = {None: "none", True: "yes", False: "no"}
    words = (said[part] if part is None or isinstance(part, bool) else str(part) for part in parts)
    return [word.strip() for text in words for word in re.split(r"[,:]", text)]


def _value(key: str, words: list[str], where: str) -> object:
    if key in ("mean", "std"):
        return tuple(_number(key, word, where) for word in words)
    if key == "resize" and len(words) == 2:
        words = ["x".join(words)]
    if len(words) != 1:
        raise BadInput(f"{key} has {len(words)} values", where=where, remedy=f"{key}: {KEYS[key]}")
    word = words[0]
    if key == "name":
        if word not in zoo.PREPROCESSING_NAMES:
            raise BadInput(f"unknown preprocessing '{word}'", where=where, remedy=nearest(word, zoo.PREPROCESSING_NAMES))
        return word
    if key == "scale":
        scale = _number(key, word, where)
        if scale <= 0:
            raise BadInput(f"scale is {word}", where=where, remedy="give a number above 0, such as 1/255")
        return scale
    if key == "resize":
        return _side(word, where)
    if word not in _CHOICES[key]:
        raise BadInput(f"{key} is '{word}'", where=where, remedy=nearest(word, _CHOICES[key]))
    return word == "yes" if key == "antialias" else word


def _number(key: str, word: str, where: str) -> float:
    parts = word.lower().split("/")
    if len(parts) > 2 or not all(_NUMBER.fullmatch(part.strip()) for part in parts):
        raise BadInput(f"{key} holds '{word}', which is no number", where=where, remedy=f"{key}: {KEYS[key]}")
    numerator, divisor = float(parts[0]), float(parts[1]) if len(parts) == 2 else 1.0
    value = numerator / divisor if divisor else math.inf
    if not math.isfinite(value):
        raise BadInput(f"{key} holds '{word}', which is no finite number", where=where, remedy=f"{key}: {KEYS[key]}")
    if key == "std" and value <= 0:
        raise BadInput(f"std holds {word}", where=where, remedy="pixels are divided by it: give numbers above 0")
    return value


def _side(word: str, where: str) -> int | tuple[int, int] | str:
    if word.lower() == "none":
        return "none"
    parts = word.lower().split("x")
    sides = [int(part) if re.fullmatch(r"[0-9]{1,5}", part) else 0 for part in parts]
    if len(parts) > 2 or not all(0 < side <= _MOST_RESIZE for side in sides):
        remedy = f"give pixels (1 to {_MOST_RESIZE}) as 256, height x width as 256x256, or none"
        raise BadInput(f"resize is '{word}'", where=where, remedy=remedy)
    return (sides[0], sides[1]) if len(sides) == 2 else sides[0]


def _fits_scale(mean: tuple[float, ...], std: tuple[float, ...], scale: float, where: str) -> None:
    """Refuse numbers that belong to another scale than the pixels have, such as means of 0..255 taken off 0..1."""
    top = 255 * scale
    unit = f"pixels are scaled to 0..{top:g} (scale={'1/255' if abs(top - 1) < 1e-9 else f'{scale:g}'})"
    slack = 1 + 1e-6
    if any(not 0 <= m <= top * slack for m in mean):
        wrong = next(m for m in mean if not 0 <= m <= top * slack)
        raise BadInput(f"a mean of {wrong:g} is out of range: {unit}", where=where, remedy="state the scale that it belongs to")
    if any(not _LEAST_STD * top <= s <= max(top, 1.0) * slack for s in std):
        wrong = next(s for s in std if not _LEAST_STD * top <= s <= max(top, 1.0) * slack)
        raise BadInput(f"a std of {wrong:g} is out of range: {unit}", where=where, remedy="state the scale that it belongs to")


def _text(resize: object) -> str:
    return "x".join(map(str, resize)) if isinstance(resize, tuple) else str(resize)
