"""`Stage`: one step of a run, with what its function gets (`Context`) and returns (`Outcome`)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rescompress.core.errors import BadInput
from rescompress.core.manifest import Manifest
from rescompress.core.metric import Metric
from rescompress.reporter import Reporter
from rescompress.store import Store

if TYPE_CHECKING:
    from compress.checkpoints.base import Checkpoint


_OF_ONE_FILE = ("root", "weights", "arch", "code", "like")
"""Architecture options that say where a network stands in its file, or its name, rather than what it is."""


@dataclass(frozen=True)
class Opening:
    """A checkpoint file and what the user states about it.

    Attributes:
        path: The file.
        input_shape: CxHxW.
        preprocess: A text for `compress.preprocessing.Statement`.
        arch_options: ``key=value`` each, as the user wrote them.
        allow_pickle: Whether code in the file may run.
        yields: Whether a preprocessing that the file itself states goes before `preprocess`.
        name: The pinned name that the file was fetched by (`compress.checkpoints.named`), or None.
    """

    path: Path
    input_shape: tuple[int, int, int] | None = None
    preprocess: str | None = None
    arch_options: tuple[str, ...] = ()
    allow_pickle: bool = False
    yields: bool = False
    name: str | None = None

    def fetched(self) -> Opening:
        """Return how to open what `path` names: itself where it is a file, else what was fetched by that name.

        Raises:
            CheckpointError: There is no such network.
            EnvironmentFailed: It is not in the cache, and there is no connection.
            ToolMissing: The library that knows the name is not installed.
        """
        from compress.checkpoints import named

        if self.name is not None or not named.is_name(self.path):
            return self
        found = named.fetch(self.path)
        return dataclasses.replace(self, path=found.path, name=found.name)

    @property
    def facts(self) -> dict[str, str]:
        """The architecture options by name.

        Raises:
            BadInput: One is malformed, unknown or impossible.
        """
        from compress.checkpoints.options import parse

        return parse(self.arch_options)

    def load(self, tell: Callable[[str], None] | None = None) -> Checkpoint:
        """Return the checkpoint.

        Args:
            tell: Called with each warning about the file: what was left out, what it says that was not used.
        """
        from compress.checkpoints import load_checkpoint

        def load(preprocess: str | None) -> Checkpoint:
            return load_checkpoint(
                self.name or self.path,
                input_shape=self.input_shape,
                preprocess=preprocess,
                arch_options=self.facts,
                allow_pickle=self.allow_pickle,
            )

        checkpoint = load(None if self.yields else self.preprocess)
        if self.yields and self.preprocess is not None and checkpoint.spec.preprocessing.assumed:
            checkpoint = load(self.preprocess)
        warnings = checkpoint.provenance.get("warnings")
        if tell is not None and isinstance(warnings, list):
            for text in warnings:
                tell(f"{self.path.name}: {text}")
        return checkpoint

    def of(self, teacher: Path) -> Opening:
        """Return how to open a teacher's file: it sees the same images, and its file leaves the same open.

        What its own file states of preprocessing counts, and what is stated of the network where it states nothing.
        """
        options = tuple(o for o in self.arch_options if o.partition("=")[0].strip() not in _OF_ONE_FILE)
        return dataclasses.replace(self, path=teacher, arch_options=options, yields=True, name=None).fetched()


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
        store: Outcomes shared with other runs, or None.
    """

    folder: Path
    done: Manifest
    reporter: Reporter
    main: bool = True
    store: Store | None = None

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

    @contextlib.contextmanager
    def held(self, stage: str, kind: str) -> Iterator[Path]:
        """Yield the file of that kind which `stage` wrote, to be read inside.

        Raises:
            BadInput: There is none, or it is another one than was recorded.
        """
        from rescompress.fingerprint import held_to

        path = self.file(stage, kind)
        result = self.done.stage(stage)
        artifact = result.output(kind) if result else None
        assert artifact is not None
        with held_to(path, artifact.sha256):
            yield path

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
        reads: Files that it reads, besides those of earlier stages.
        writes: Places in the run's folder that it may write, as patterns such as ``cpu/model.*``.
    """

    name: str
    depends: Mapping[str, Any]
    after: tuple[str, ...]
    run: Callable[[Context], Outcome]
    collective: bool = False
    source: str = ""
    reads: tuple[Path, ...] = ()
    writes: tuple[str, ...] = ()
