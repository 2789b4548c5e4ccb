"""Every target that is known: one YAML file per device below ``devices/``, plus two aliases.

Names are read off the folder; a file is opened only when its target is asked for.
"""

from __future__ import annotations

from pathlib import Path

from edge_targets.device import Device, Target
from rescompress.core.errors import TargetError, nearest

DEVICES = Path(__file__).parent / "devices"
DEVICE_TREE_MODEL = Path("/proc/device-tree/model")

DEFAULT_JETSON = "jetson-orin-nano-8gb"
ALIASES = ("arm", "jetson")
"""``jetson``: the board this runs on, elsewhere `DEFAULT_JETSON`; ``arm``: ``arm-cortex-a76``."""


def target_names() -> list[str]:
    """Return every name that `load_target` takes: devices, then aliases."""
    return [*sorted(path.stem for path in DEVICES.glob("*.yaml")), *ALIASES]


def load_device(name: str) -> Device:
    """Return the device that ``devices/<name>.yaml`` describes.

    Raises:
        TargetError: There is no such file.
    """
    import yaml

    path = DEVICES / f"{name}.yaml"
    if name not in target_names() or not path.is_file():
        raise TargetError(f"unknown target '{name}'", where="--target", remedy=nearest(name, target_names()))
    return Device.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def board_here(model_file: Path = DEVICE_TREE_MODEL) -> str | None:
    """Return the device name of the Jetson this runs on, or None elsewhere.

    Args:
        model_file: Where the kernel tells the board's model.
    """
    try:
        text = model_file.read_bytes().decode(errors="replace")
    except OSError:
        return None
    return identify(text)


def identify(model: str) -> str | None:
    """Return the device whose `models` has the longest text that occurs in `model`, or None.

    Args:
        model: Content of ``/proc/device-tree/model``.
    """
    text = model.replace("\0", "").strip()
    best: tuple[int, str] | None = None
    for name in target_names():
        if name in ALIASES:
            continue
        for known in load_device(name).models:
            if known.lower() in text.lower() and (best is None or len(known) > best[0]):
                best = (len(known), name)
    return best[1] if best else None


def load_target(name: str, *, jetpack: str | None = None, tensorrt: str | None = None) -> Target:
    """Return the target called `name`.

    Args:
        name: A device, or an alias.
        jetpack: System release of a Jetson; its default one when None.
        tensorrt: Version of TensorRT where it is known better than by the release.

    Raises:
        TargetError: Nothing has that name (the message gives the nearest ones), or the board lacks that release.
    """
    alias = name if name in ALIASES else None
    if name == "jetson":
        here = board_here()
        name = here if here and here.startswith("jetson") else DEFAULT_JETSON
    elif name == "arm":
        name = "arm-cortex-a76"
    device = load_device(name)
    if not device.software:
        return Target(name=device.name, alias=alias, device=device)
    release = device.tensorrt(jetpack)
    return Target(
        name=device.name,
        alias=alias,
        device=device,
        tensorrt_version=tensorrt or release.tensorrt,
        jetpack=release.jetpack,
    )


def all_targets() -> list[Target]:
    """Return every target but the aliases, by name."""
    return [load_target(name) for name in target_names() if name not in ALIASES]
