"""Every target that is known: one YAML file per device, plus two aliases.

Ours lie below ``devices/``; others are found in the folder of an installed package's entry point of the group
``rescompress.devices``, in the user's own folder (`own_folder`), and in the files and folders that the environment variable
``RESCOMPRESS_DEVICES`` names, to which ``--device-file`` adds. Names are read off the files; a file is opened only when its
target is asked for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from edge_targets.device import Device, Target
from rescompress.core.errors import BadInput, TargetError, nearest

DEVICES = Path(__file__).parent / "devices"
DEVICE_TREE_MODEL = Path("/proc/device-tree/model")

DEFAULT_JETSON = "jetson-orin-nano-8gb-super"
"""What most people have: since JetPack 6.2 (2025-01) new boards have the Super modes, and older ones get them with it."""
ALIASES = ("arm", "jetson")
"""``jetson``: the board this runs on, elsewhere `DEFAULT_JETSON`; ``arm``: ``arm-cortex-a76``."""


GROUP = "rescompress.devices"
"""Entry points that name a package with device files in its folder."""
PLACES = "RESCOMPRESS_DEVICES"
"""The environment variable with files and folders, parted as in ``PATH``; processes that are started here see it, too."""


def own_folder() -> Path:
    """Return the folder that a user's own device files are looked for in."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "rescompress" / "devices"


def add_device_file(path: Path) -> None:
    """Make the device that a file describes known in this process and in those that it starts.

    Args:
        path: A YAML file, called like the device.

    Raises:
        TargetError: There is no such file, it describes no device, or its name is taken.
    """
    full = path.expanduser().absolute()
    if full.suffix != ".yaml" or not full.is_file():
        raise TargetError("is no device file", where=str(path), remedy="name a YAML file, <device>.yaml (docs/targets.md)")
    known = os.environ.get(PLACES, "").split(os.pathsep)
    if str(full) not in known:
        os.environ[PLACES] = os.pathsep.join(filter(None, [*known, str(full)]))
    load_device(full.stem)


def target_names() -> list[str]:
    """Return every name that `load_target` takes: devices, then aliases."""
    return [*sorted({path.stem for path in _files()}.difference(ALIASES)), *ALIASES]


def _files() -> Iterator[Path]:
    """Yield every device file, ours first."""
    yield from sorted(DEVICES.glob("*.yaml"))
    places = [own_folder(), *map(Path, filter(None, os.environ.get(PLACES, "").split(os.pathsep)))]
    for entry in importlib.metadata.entry_points(group=GROUP):
        spec = importlib.util.find_spec(entry.value)
        places += map(Path, (spec.submodule_search_locations or ()) if spec is not None else ())
    for place in places:
        yield from [place] if place.suffix == ".yaml" else sorted(place.glob("*.yaml"))


def load_device(name: str) -> Device:
    """Return the device that ``<name>.yaml`` describes.

    Raises:
        TargetError: There is no such file, it describes no device, or there are two.
    """
    from pydantic import ValidationError

    from rescompress.core import strict_yaml

    paths = list({path.resolve(): path for path in _files() if path.stem == name}.values())
    if not paths or name in ALIASES:
        if paths:
            raise TargetError(
                f"'{name}' is the name of an alias", where=str(paths[0]), remedy="give device and file another name"
            )
        raise TargetError(f"unknown target '{name}'", where="--target", remedy=nearest(name, target_names()))
    path = paths[-1]
    if len(paths) > 1:
        also = ", ".join(map(str, paths[:-1]))
        raise TargetError(
            f"'{name}' is described elsewhere too: {also}", where=str(path), remedy="give your device another name"
        )
    try:
        device = Device.model_validate(strict_yaml.load(path, missing="", remedy=""))
        if device.name != name:
            raise ValueError(f"it is called '{device.name}', not '{name}' as its file")
    except ValidationError as e:
        raise _no_device(path, "; ".join(_fault(".".join(map(str, f["loc"])), f["msg"]) for f in e.errors())) from e
    except (ValueError, BadInput) as e:
        raise _no_device(path, e.what if isinstance(e, BadInput) else str(e)) from e
    return device


def _fault(key: str, message: str) -> str:
    """Return one thing that is wrong in a file, with the key that it is wrong at."""
    said = message.removeprefix("Value error, ")
    return f"{key}: {said}" if key else said


def _no_device(path: Path, reason: str) -> TargetError:
    """Return the error of a file that describes no device."""
    text = " ".join(reason.split())  # a YAML error has several lines
    return TargetError(f"describes no device: {text}", where=str(path), remedy="correct the file, or take it out of its folder")


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
