"""Every target that is known: one YAML file per device below ``devices/``, plus two aliases.

Names are read off the folder; a file is opened only when its target is asked for.
"""

from __future__ import annotations

from pathlib import Path

from edge_targets.device import Device, Target
from rescompress.core.errors import BadInput, TargetError, nearest

DEVICES = Path(__file__).parent / "devices"
DEVICE_TREE_MODEL = Path("/proc/device-tree/model")

DEFAULT_JETSON = "jetson-orin-nano-8gb-super"
"""What most people have: since JetPack 6.2 (2025-01) new boards have the Super modes, and older ones get them with it."""
ALIASES = ("arm", "jetson")
"""``jetson``: the board this runs on, elsewhere `DEFAULT_JETSON`; ``arm``: ``arm-cortex-a76``."""


def target_names() -> list[str]:
    """Return every name that `load_target` takes: devices, then aliases."""
    return [*sorted(path.stem for path in DEVICES.glob("*.yaml")), *ALIASES]


def load_device(name: str) -> Device:
    """Return the device that ``devices/<name>.yaml`` describes.

    Raises:
        TargetError: There is no such file, or it describes no device.
    """
    from pydantic import ValidationError

    from rescompress.core import strict_yaml

    path = DEVICES / f"{name}.yaml"
    if name not in target_names() or not path.is_file():
        raise TargetError(f"unknown target '{name}'", where="--target", remedy=nearest(name, target_names()))
    try:
        device = Device.model_validate(strict_yaml.load(path, missing="", remedy=""))
        if device.name != name:
            raise ValueError(f"it is called '{device.name}', not '{name}' as its file")
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        reason = f"{key}: {first['msg']}" if key else str(first["msg"])
        raise _no_device(path, reason) from e
    except (ValueError, BadInput) as e:
        raise _no_device(path, e.what if isinstance(e, BadInput) else str(e)) from e
    return device


def _no_device(path: Path, reason: str) -> TargetError:
    """Return the error of a file that describes no device."""
    text = " ".join(reason.split())  # a YAML error has several lines
    return TargetError(
        f"describes no device: {text}", where=str(path), remedy="correct the file, or take it out of this folder"
    )


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

    A file that describes no device cannot be the one; `survey` tells which those are.

    Args:
        model: Content of ``/proc/device-tree/model``.
    """
    text = model.replace("\0", "").strip()
    best: tuple[int, str] | None = None
    for name in target_names():
        if name in ALIASES:
            continue
        try:
            models = load_device(name).models
        except TargetError:
            continue
        for known in models:
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
        TargetError: Nothing has that name (the message gives the nearest ones), its file describes no device, or the board
            lacks that release.
    """
    alias = name if name in ALIASES else None
    if name == "jetson":
        here = board_here()
        name = here if here and load_device(here).runtime == "tensorrt" else DEFAULT_JETSON
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


def alias_notes(target: Target) -> list[str]:
    """Return what the alias ``jetson`` was taken to mean; nothing for a target that was named, or that this runs on."""
    if target.alias != "jetson" or target.name == board_here():
        return []
    return [
        f"`jetson` is taken as the {target.device.title} in {target.device.mode().name} with JetPack {target.jetpack} "
        f"(TensorRT {target.tensorrt_version}), what most people have; name another board with --target (`rescompress targets`)"
    ]


def survey() -> tuple[list[Target], list[TargetError]]:
    """Return every target, aliases last, and the error of each device file that had to be left out."""
    found: list[Target] = []
    left_out: dict[str | None, TargetError] = {}
    for name in target_names():
        try:
            found.append(load_target(name))
        except TargetError as e:
            left_out.setdefault(e.where, e)  # an alias fails with the device it stands for
    return found, list(left_out.values())


def all_targets() -> list[Target]:
    """Return every target but the aliases, by name; without those whose file describes no device."""
    return [target for target in survey()[0] if target.alias is None]
