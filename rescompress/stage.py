"""`Stage`: one step of a run, with what its function gets (`Context`) and returns (`Outcome`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rescompress.core.errors import BadInput
from rescompress.core.manifest import Manifest
from rescompress.core.metric import Metric
from rescompress.reporter import Reporter


@dataclass(frozen=True)
class Outcome:
    """What a stage function returns.

    Attributes:
        metrics: By name.
        files: Kind and path of each file written, below the run's folder.
        details: JSON values.
        skipped: Why the stage could not do its work here, or None.
        transient: Files that are no longer needed once the outcome is recorded.
    """

    metrics: Mapping[str, Metric] = field(default_factory=dict)
    files: Sequence[tuple[str, Path]] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    skipped: str | None = None
    transient: Sequence[Path] = ()


@dataclass(frozen=True)
class Context:
    """What a stage function may use.

    Attributes:
        folder: The run's folder.
        done: The stages before this one.
        reporter: Where progress goes.
        main: Whether this process writes.
    """

    folder: Path
    done: Manifest
    reporter: Reporter
    main: bool = True

    def file(self, stage: str, kind: str) -> Path:
        """Return the file of that kind which `stage` wrote.

        Raises:
            BadInput: There is none.
        """
        result = self.done.stage(stage)
        artifact = result.output(kind) if result else None
        if artifact is None:
            raise BadInput(f"stage '{stage}' has no {kind}", where=str(self.folder), remedy="run the earlier stage first")
        return self.folder / artifact.path

    def resume_file(self, stage: str) -> Path:
        """Return where the state of an unfinished training of `stage` is kept."""
        return self.folder / ".resume" / f"{stage.replace(':', '_')}.pt"


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: Unique; the row's name in every table.
        depends: Everything the outcome depends on besides the stages before it, JSON values.
        after: The stages whose files it reads.
        run: The work.
        collective: Whether all processes take part in it.
        source: The network it is about: name of an earlier stage, or SHA-256 of a checkpoint file.
    """

    name: str
    depends: Mapping[str, Any]
    after: tuple[str, ...]
    run: Callable[[Context], Outcome]
    collective: bool = False
    source: str = ""
