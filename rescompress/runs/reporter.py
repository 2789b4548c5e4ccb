"""How a long step tells where it stands; the command line draws it, a library user may ignore it."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Receives progress; calls may come often."""

    def stage(self, name: str, position: int, total: int) -> None:
        """Say that stage `name`, number `position` of `total`, begins."""
        ...

    def finished(self, name: str, summary: str) -> None:
        """Say how stage `name` ended, in a few words."""
        ...

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        """Say how far a step within the stage is."""
        ...

    def note(self, text: str) -> None:
        """Tell the reader something once."""
        ...


class Silent:
    """A reporter that says nothing."""

    def stage(self, name: str, position: int, total: int) -> None:
        """Ignore it."""

    def finished(self, name: str, summary: str) -> None:
        """Ignore it."""

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        """Ignore it."""

    def note(self, text: str) -> None:
        """Ignore it."""
