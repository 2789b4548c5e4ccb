"""A stage made of a function, for tests of the pipeline alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rescompress.runs.stage import Context, Outcome


@dataclass(frozen=True)
class Made:
    """What `rescompress.runs.stage.Stage` asks for, given by hand.

    Attributes:
        name: Of the stage.
        depends: What its key is made of.
        after: Stages whose files it reads.
        work: What it does.
        collective: Whether all processes take part.
        network: What it is about.
        reads: Files.
        writes: Places.
        kind: What it does; read off the name by default.
        of: Whose network it is of.
        about: A target.
    """

    name: str
    depends: Mapping[str, Any]
    after: tuple[str, ...]
    work: Callable[[Context], Outcome]
    collective: bool = False
    network: str = ""
    reads: tuple[Path, ...] = ()
    writes: tuple[str, ...] = ()
    kind: str = ""
    of: str = ""
    about: str | None = None

    def run(self, context: Context) -> Outcome:
        return self.work(context)
