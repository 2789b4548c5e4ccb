"""`Stage`: one step of a run, with what its function gets (`Context`) and returns (`Outcome`)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rescompress.core.details import Details
from rescompress.core.errors import BadInput, CheckpointError, RescompressError
from rescompress.core.manifest import Manifest
from rescompress.core.metric import Metric
from rescompress.runs.reporter import Reporter
from rescompress.runs.store import Store

if TYPE_CHECKING:
    from compress.checkpoints.base import Checkpoint


_OF_ONE_FILE = ("root", "weights", "arch", "code", "like", "trunk")
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

        try:
            checkpoint = load(None if self.yields else self.preprocess)
        except CheckpointError as e:
            from compress.checkpoints.refusals import OF_A_TEACHER, SUPPORTED

            if self.yields and e.remedy == SUPPORTED:
                raise CheckpointError(e.what, where=e.where, remedy=OF_A_TEACHER) from e
            raise
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
        details: What readers may want beside the metrics.
        skipped: Why the stage could not do its work here, or None.
        transient: Files that are no longer needed once the outcome is recorded.
        incomplete: Why something that was asked for is not in it; it is recorded, raised then, and never taken for known.
    """

    metrics: Mapping[str, Metric] = field(default_factory=dict)
    files: Sequence[tuple[str, Path]] = ()
    details: Details = field(default_factory=Details)
    skipped: str | None = None
    transient: Sequence[Path] = ()
    incomplete: RescompressError | None = None


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
        from rescompress.runs.fingerprint import held_to

        path = self.file(stage, kind)
        result = self.done.stage(stage)
        artifact = result.output(kind) if result else None
        assert artifact is not None
        with held_to(path, artifact.sha256):
            yield path

    def resume_file(self, stage: str) -> Path:
        """Return where the state of an unfinished training of `stage` is kept."""
        return self.folder / ".resume" / f"{stage.replace(':', '_')}.pt"


class Stage(Protocol):
    """One step of a run, as the pipeline sees it; `rescompress.runs.steps` has those of the product."""

    @property
    def name(self) -> str:
        """Unique; the row's name in every table."""
        ...

    @property
    def kind(self) -> str:
        """What it does: ``dense``, ``prune`` and so on."""
        ...

    @property
    def of(self) -> str:
        """Name of the stage whose network its figures are of; its own where it makes one."""
        ...

    @property
    def about(self) -> str | None:
        """Name of the edge target that it is about, or None."""
        ...

    @property
    def depends(self) -> Mapping[str, Any]:
        """Everything the outcome depends on besides the stages before it, JSON values."""
        ...

    @property
    def after(self) -> tuple[str, ...]:
        """The stages whose files it reads."""
        ...

    @property
    def network(self) -> str:
        """The network it is about: name of an earlier stage, or SHA-256 of a checkpoint file."""
        ...

    @property
    def collective(self) -> bool:
        """Whether all processes take part in it."""
        ...

    @property
    def reads(self) -> tuple[Path, ...]:
        """Files that it reads, besides those of earlier stages."""
        ...

    @property
    def writes(self) -> tuple[str, ...]:
        """Places in the run's folder that it may write, as patterns such as ``cpu/model.*``."""
        ...

    def run(self, context: Context) -> Outcome:
        """Do the work."""
        ...


@dataclass(frozen=True)
class Source:
    """A checkpoint: the file of an earlier stage, or any file.

    Attributes:
        stage: The stage that wrote it, or None.
        opening: The file and what is stated about it, where no stage wrote it.
        sha256: Of that file when the stage's key was made.
    """

    stage: str | None = None
    opening: Opening | None = None
    sha256: str | None = None

    @classmethod
    def of(cls, what: str | Opening) -> Source:
        """Return the checkpoint of a stage, by its name, or of a file, which is read here for its hash.

        Raises:
            BadInput: There is no such file.
        """
        from rescompress.runs.fingerprint import file_identity

        return cls(stage=what) if isinstance(what, str) else cls(opening=what, sha256=file_identity(str(what.path)))

    @property
    def path(self) -> Path | None:
        """The file, where no stage wrote it."""
        return self.opening.path if self.opening else None

    @property
    def identity(self) -> dict[str, Any]:
        """What it contributes to a content key: of a file its content, not its place."""
        if self.opening is None:
            return {"stage": self.stage}
        stated = dataclasses.asdict(self.opening)
        stated.pop("yields")  # follows from being a teacher
        del stated["path"]
        source = self.opening.facts.get("code")
        if source is not None:
            from rescompress.runs.fingerprint import file_identity

            stated["code_sha256"] = file_identity(source.rpartition(":")[0])
        if self.opening.name is None:  # a named network is more than its file: what is published beside it counts
            del stated["name"]
        return stated | {"sha256": self.sha256}

    def load(self, context: Context) -> Checkpoint:
        """Return the checkpoint.

        Raises:
            BadInput: The file is no longer the one that the stage's key is about.
        """
        from compress.checkpoints import load_checkpoint
        from rescompress.runs.fingerprint import held_to

        if self.stage is not None:
            with context.held(self.stage, "checkpoint") as path:
                return load_checkpoint(path)
        assert self.opening is not None
        with held_to(self.opening.path, self.sha256) if self.sha256 is not None else contextlib.nullcontext():
            return self.opening.load(context.reporter.note if context.main else None)
