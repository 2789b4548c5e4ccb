"""The stages of a run as objects: what one is made of, is what its outcome depends on.

The fields of a `Step` are its settings and its inputs. Its content key, the stages and files that it reads and the files that
it may write are derived from them, and the function that does the work (in `rescompress.runs.stages`) takes the object: a field
that is renamed in one place is an error of the type checker. Nothing heavy is imported before a step runs.
"""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel

from edge_targets.board_probe import Probe
from edge_targets.device import Target
from edge_targets.ssh import Board
from rescompress.core.described import flag_of
from rescompress.core.manifest import DEPLOY_PREFIX, TARGET_PREFIX
from rescompress.core.quantizers import Profile
from rescompress.core.settings import DeploySettings, ExportSettings, PruneSettings, QuantizeSettings, TrainSettings
from rescompress.runs import code
from rescompress.runs.fingerprint import file_identity
from rescompress.runs.settings import Settings
from rescompress.runs.stage import Context, Outcome, Source

RESOLVED = frozenset({"teacher", "workers", "device"})
"""Settings that are not part of a key as they are: another network is a `Source` of the step; where and with how many
processes it is computed is no part of what is asked for."""


DENSE = Source(stage="dense")


@dataclass(frozen=True, kw_only=True)
class Step(abc.ABC):
    """One stage of a run.

    Attributes:
        source: The network that it is about.
        common: What all stages share.
        depends: What its outcome depends on besides the stages before it, JSON values: made of all fields.
        files: SHA-256 of the files that its settings name, by path, when the step was made.
    """

    kind: ClassVar[str]
    collective: ClassVar[bool] = False

    source: Source
    common: Settings
    depends: Mapping[str, Any] = field(init=False, compare=False)
    files: Mapping[str, str] = field(init=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Read what the key is made of."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        object.__setattr__(self, "depends", {k: self._content(v) for k, v in values.items()} | {"code": code.of(*self.plugins)})

    @property
    def name(self) -> str:
        """Unique in a run; the row's name in every table."""
        return self.kind

    @property
    def of(self) -> str:
        """Name of the stage whose network its figures are of; its own where it makes one."""
        return self.name

    @property
    def about(self) -> str | None:
        """Name of the edge target that it is about, or None."""
        return None

    @property
    def plugins(self) -> tuple[tuple[str, str], ...]:
        """Package and name of the plugins that it uses; all of a package where the file decides which."""
        return code.FORMATS if any(s.opening is not None for s in self._sources) else ()

    @property
    def _sources(self) -> list[Source]:
        found = [getattr(self, f.name) for f in dataclasses.fields(self) if f.init]
        return [value for value in found if isinstance(value, Source)]

    @property
    def after(self) -> tuple[str, ...]:
        """The stages whose files it reads."""
        return tuple(dict.fromkeys(s.stage for s in self._sources if s.stage is not None))

    @property
    def network(self) -> str:
        """The network it is about: name of an earlier stage, or SHA-256 of a checkpoint file."""
        return self.source.stage or str(self.source.sha256)

    @property
    def reads(self) -> tuple[Path, ...]:
        """The files that it reads, besides those of earlier stages."""
        opened = [s.opening.path for s in self._sources if s.opening is not None]
        return (*opened, *map(Path, self.files))

    @property
    def writes(self) -> tuple[str, ...]:
        """Places in the run's folder that it may write, as patterns such as ``cpu/model.*``."""
        return (f"{self.name}.safetensors", f"{self.name}.outcomes.json")

    @abc.abstractmethod
    def run(self, context: Context) -> Outcome:
        """Do the work."""

    def _content(self, value: object) -> Any:
        """Return what a field contributes to the key: of files the content, of stages the name."""
        if isinstance(value, Settings | Source | Probe):
            return value.identity
        if isinstance(value, tuple):
            return [self._content(v) for v in value]
        if not isinstance(value, BaseModel):
            return dataclasses.asdict(value) if isinstance(value, Machine | Board) else value
        found = value.model_dump(exclude=set(RESOLVED)) if not isinstance(value, Target) else value.model_dump()
        for name in found:
            given = getattr(value, name, None)
            if isinstance(value, Target) or not given or not flag_of(type(value), name).file:
                continue
            hashes = {path: file_identity(path) for path in (given if isinstance(given, tuple) else (given,))}
            object.__setattr__(self, "files", {**self.files, **hashes})
            found[name] = list(hashes.values()) if isinstance(given, tuple) else hashes[given]
        return found


@dataclass(frozen=True, kw_only=True)
class Dense(Step):
    """The network as it came."""

    kind = "dense"

    @property
    def writes(self) -> tuple[str, ...]:
        """Also the float32 file that targets are compared with."""
        return ("dense.onnx", *super().writes)

    def run(self, context: Context) -> Outcome:
        """Evaluate and count it."""
        from rescompress.runs.stages.network import dense

        return dense(context, self)


@dataclass(frozen=True, kw_only=True)
class Prune(Step):
    """The network with channels removed.

    Attributes:
        settings: How.
        targets: What it is for.
        iteration: Which of several, None for the last.
        before: The pruning before this one, where the network has been pruned in an earlier iteration; the budget and the
            plan are about `whole` then.
        whole: The network before all pruning.
    """

    kind = "prune"

    settings: PruneSettings
    targets: tuple[Target, ...] = ()
    iteration: int | None = None
    before: Source | None = None
    whole: Source | None = None

    @property
    def name(self) -> str:
        """With the number of the iteration."""
        return _numbered(self.kind, self.iteration)

    @property
    def plan_name(self) -> str:
        """Where the plan is written."""
        return _numbered("plan", self.iteration) + ".json"

    @property
    def plugins(self) -> tuple[tuple[str, str], ...]:
        """Also the method."""
        return (*super().plugins, (code.METHODS, self.settings.method))

    @property
    def writes(self) -> tuple[str, ...]:
        """Also the plan."""
        return (self.plan_name, *super().writes)

    def run(self, context: Context) -> Outcome:
        """Remove channels and make up for them."""
        from rescompress.runs.stages.network import pruned

        return pruned(context, self)


@dataclass(frozen=True, kw_only=True)
class Finetune(Step):
    """The network trained on the data.

    Attributes:
        settings: How.
        teacher: What it is distilled from, or None.
        iteration: Which of several, None for the last.
    """

    kind = "finetune"
    collective = True

    settings: TrainSettings
    teacher: Source | None = None
    iteration: int | None = None

    @property
    def name(self) -> str:
        """With the number of the iteration."""
        return _numbered(self.kind, self.iteration)

    def run(self, context: Context) -> Outcome:
        """Train it."""
        from rescompress.runs.stages.network import finetuned

        return finetuned(context, self)


@dataclass(frozen=True, kw_only=True)
class Quantize(Step):
    """The network in INT8.

    Attributes:
        settings: How.
        profile: Where quantizers go.
        teacher: What ``qat`` distils from, or None.
        targets: What a latency budget is about.
    """

    kind = "quantize"

    settings: QuantizeSettings
    profile: Profile
    teacher: Source | None = None
    targets: tuple[Target, ...] = ()

    @property
    def collective(self) -> bool:  # type: ignore[override]
        """Whether all processes take part in it: where it trains."""
        return self.settings.mode == "qat"

    def run(self, context: Context) -> Outcome:
        """Calibrate it and, for ``qat``, train it."""
        from rescompress.runs.stages.network import quantized

        return quantized(context, self)


@dataclass(frozen=True, kw_only=True)
class Export(Step):
    """The ONNX file.

    Attributes:
        settings: What kind of file.
    """

    kind = "export"

    settings: ExportSettings

    @property
    def of(self) -> str:
        """Its source."""
        return self.source.stage or ""

    @property
    def writes(self) -> tuple[str, ...]:
        """The file, and its answers."""
        return ("model.onnx", "host.onnx", "export.outcomes.json")

    def run(self, context: Context) -> Outcome:
        """Write it and check it."""
        from rescompress.runs.stages.export import exported

        return exported(context, self)


@dataclass(frozen=True)
class Machine:
    """Where a measurement is made.

    Attributes:
        cpu: Its name.
        threads: That it computes with, None for all.
        runtime: Version of what runs the network, where it runs here.
    """

    cpu: str
    threads: int | None
    runtime: str | None = None


@dataclass(frozen=True, kw_only=True)
class ForTarget(Step):
    """What becomes of the network on one edge target.

    Attributes:
        settings: What kind of file.
        target: The target.
        machine: What measures, where it can be measured here.
        dense: Whose latency is measured or predicted beside it.
        require_engine: Whether it is an error that no engine can be built here.
    """

    kind = "target"

    settings: ExportSettings
    target: Target
    machine: Machine
    dense: Source = DENSE
    require_engine: bool = False

    @property
    def name(self) -> str:
        """With that of the target."""
        return TARGET_PREFIX + self.target.name

    @property
    def of(self) -> str:
        """Its source."""
        return self.source.stage or ""

    @property
    def about(self) -> str | None:
        """The target."""
        return self.target.name

    @property
    def plugins(self) -> tuple[tuple[str, str], ...]:
        """Also the runtime."""
        return (*super().plugins, (code.BACKENDS, self.target.runtime))

    @property
    def writes(self) -> tuple[str, ...]:
        """All in the folder of the target, but the outcomes."""
        return (*(f"{self.target.name}/{pattern}" for pattern in _TARGET_FILES), f"target-{self.target.name}.outcomes.json")

    def run(self, context: Context) -> Outcome:
        """Build and measure it here, or prepare it and predict."""
        from rescompress.runs.stages.target import target

        return target(context, self)


@dataclass(frozen=True, kw_only=True)
class Deploy(Step):
    """What becomes of the network on a board: engines that are built and measured there, over SSH.

    Attributes:
        settings: What is measured.
        target: The board, with the TensorRT that it has.
        board: How it is reached.
        found: What it says about itself.
        named: The target that the user named, or None.
        baseline: The same network in float32, where the source is a quantized ONNX file.
    """

    kind = "deploy"

    settings: DeploySettings
    target: Target
    board: Board
    found: Probe
    named: Target | None = None
    baseline: Source | None = None

    @property
    def name(self) -> str:
        """With that of the target."""
        return DEPLOY_PREFIX + self.target.name

    @property
    def of(self) -> str:
        """Not known before the manifest is read: the files are given, not the stage that made them."""
        return ""

    @property
    def about(self) -> str | None:
        """The target."""
        return self.target.name

    @property
    def folder(self) -> str:
        """Where its files go, in the run's folder; those of another board stay as they are."""
        return f"deploy/{self.target.name.replace('/', '_')}"

    @property
    def writes(self) -> tuple[str, ...]:
        """All in the folder of the board: engines, samples and logs, and of a checkpoint the ONNX files."""
        path = self.source.path
        exported = () if path is None or path.suffix == ".onnx" else (f"{path.stem}.float.onnx", f"{path.stem}.int8.onnx")
        return tuple(f"{self.folder}/{name}" for name in (*map(_literal, exported), "model_*", "model.json"))

    def run(self, context: Context) -> Outcome:
        """Build, measure and fetch."""
        from rescompress.runs.stages.deploy import deployed

        return deployed(context, self)


_TARGET_FILES = (
    "host.onnx",  # of a trunk, what it belongs to
    "model.*",  # the ONNX file, what runtimes make of it, and the description of a bundle
    "float32-twin.onnx",
    "timing.cache",
    "build.sh",
    "infer.py",
    "trt_builder.py",
    "labels.txt",
    "README.md",
    "SHA256SUMS",
)
"""What the stage of a target may write into its folder."""


def _literal(name: str) -> str:
    """Return the pattern that a file's name alone fits."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _numbered(kind: str, iteration: int | None) -> str:
    return kind if iteration is None else f"{kind}-{iteration}"
