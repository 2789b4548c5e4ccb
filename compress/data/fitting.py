"""Whether images that were read for one network may be shown to another: same pixels, same classes in the same order."""

from __future__ import annotations

from compress.data.splits import Inputs, Split, folded
from rescompress.core.errors import BadInput

_REMEDY = "read them for this network: load_dataset(source, network)"
_PIXELS = ("mean", "std", "scale", "channel_order", "resize", "interpolation", "antialias")


def check_fits(split: Split, inputs: Inputs, *, labels: bool) -> None:
    """Refuse images that were read for a network that is shown other pixels, or counts its classes otherwise.

    Args:
        split: The images.
        inputs: What the network says of its data.
        labels: Whether the labels count, too.

    Raises:
        BadInput: They do not fit; what differs.
    """
    if not len(split):
        return  # which is said where images are wanted
    channels, height, width = inputs.shape
    found = split.size
    if found != (height, width, channels):
        h, w, c = found
        raise BadInput(
            f"the images are {c}x{h}x{w}, the network reads {channels}x{height}x{width}", where="images", remedy=_REMEDY
        )
    ours, theirs = inputs.preprocessing, split.preprocessing
    other = [name for name in _PIXELS if getattr(ours, name) != getattr(theirs, name)]
    if other:
        what = "; ".join(f"{name} {getattr(theirs, name)}, the network's is {getattr(ours, name)}" for name in other)
        raise BadInput(f"the images are prepared for another network: {what}", where="images", remedy=_REMEDY)
    if labels and inputs.outputs:
        _check_classes(split, inputs)


def _check_classes(split: Split, inputs: Inputs) -> None:
    if len(split.classes) != inputs.classes:
        raise BadInput(
            f"the images are of {len(split.classes)} classes, the network has {inputs.classes}", where="images", remedy=_REMEDY
        )
    known = inputs.labels
    if known is None or split.classes == known:
        return
    theirs, ours = [[folded(name) for name in names] for names in (split.classes, known)]
    bare = split.classes == tuple(str(i) for i in range(len(known))) and not set(theirs) & set(ours)
    if theirs == ours or bare:
        return
    at = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
    what = f"output {at} is '{split.classes[at]}' for them, '{known[at]}' for the network"
    raise BadInput(f"the images count their classes otherwise: {what}", where="images", remedy=_REMEDY)
