"""The words that an option and a config both offer, each set named once.

The command line reads them off these aliases, and a config validates with them; nothing is imported, so that ``--help``
is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

Scope = Literal["inner", "all"]
"""Which channels are looked at: inside blocks, or those of the residual stream, too."""

TrainPrecision = Literal["fp32", "tf32", "bf16", "fp16"]
"""What training computes in."""

Augment = Literal["auto", "none", "cifar", "photo", "photo+"]
"""What training does to images."""

Mode = Literal["ptq", "qat"]
"""How INT8 is reached."""

Profile = Literal["tensorrt", "openvino", "onnxruntime"]
"""The runtime whose placement of quantizers is used."""

ProfileOrAuto = Literal["auto", Profile]
"""A `Profile`, or the target's."""

Calibration = Literal["auto", "nncf", "mean-max", "max", "percentile", "mse"]
"""How activation ranges are estimated."""

Precision = Literal["auto", "fp32", "fp16", "int8", "fp8"]
"""What an exported file computes in; ``auto``: what suits network and target; ``fp8`` is refused, with the reason."""


def beginning(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Return what tells a shell which of some names begin so; they are asked for when it asks."""

    def completes(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return completes
