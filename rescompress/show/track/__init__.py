"""Where finished runs are also recorded: one file per tracker, found by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

from rescompress.core import plugins
from rescompress.core.errors import BadInput
from rescompress.core.evidence import load_sound
from rescompress.core.manifest import Manifest

PACKAGE = "rescompress.show.track"


class Tracker(Protocol):
    """A file of this package."""

    check: Callable[[str], None]
    """Raise if the address cannot be written to, before hours of work: a package is missing, the address makes no sense."""

    log: Callable[[str, str, Path, Manifest], str]
    """Record a run, given the address, its name, its folder and its manifest; return in words where it went."""


def parse(destination: str) -> tuple[str, str]:
    """Return kind and address of a destination such as ``mlflow:sqlite:///runs.db`` or ``tensorboard:logs``.

    Raises:
        BadInput: It has no address.
    """
    kind, colon, address = destination.partition(":")
    if not colon or not address:
        raise BadInput(f"'{destination}' names no place", where="--track", remedy="write it like mlflow:sqlite:///runs.db")
    return kind, address


def check(destination: str) -> None:
    """Make sure that a destination can be written to; call it before the work.

    Raises:
        BadInput: Unknown tracker, or an address that makes no sense.
        ToolMissing: The tracker's package is not installed.
    """
    kind, address = parse(destination)
    _tracker(kind).check(address)


def log(destination: str, folder: Path, *, name: str | None = None) -> str:
    """Record the run in `folder` at a destination and return in words where it went.

    Args:
        destination: As `parse` reads it.
        folder: Of the run.
        name: Of the run; its folder's name by default.

    Raises:
        BadInput: Unknown tracker, a bad address, or no run in the folder, or one that contradicts itself.
        ToolMissing: The tracker's package is not installed.
        EnvironmentFailed: The tracker refused, or could not be reached.
    """
    kind, address = parse(destination)
    tracker = _tracker(kind)
    tracker.check(address)
    return tracker.log(address, name or folder.resolve().name, folder, load_sound(folder))


def _tracker(kind: str) -> Tracker:
    return cast(Tracker, plugins.load(PACKAGE, kind, what="tracker", offers=Tracker))
