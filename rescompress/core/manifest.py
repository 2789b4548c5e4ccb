"""`Manifest`: what ran, from what, with what outcome; the one file that reports and gates read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticSerializationError

from rescompress.core.artifact import Artifact, read_text, write_text
from rescompress.core.details import KINDS, D, Details
from rescompress.core.errors import BadInput
from rescompress.core.locks import folder_held
from rescompress.core.metric import Metric
from rescompress.core.showing import Showing, prefixed
from rescompress.core.spec import Frozen
from rescompress.core.text import storable

SCHEMA_VERSION = 2
READ = (1, 2)
"""Layouts that are read. In the first a stage's kind and target stood in its name alone."""
MANIFEST_NAME = "manifest.json"
TARGET = "target"
DEPLOY = "deploy"
TARGET_PREFIX = f"{TARGET}:"
DEPLOY_PREFIX = f"{DEPLOY}:"

Status = Literal["done", "skipped", "failed"]


def json_of(model: Frozen) -> str:
    """Return a record or a manifest as JSON; names of files may be no UTF-8."""
    try:
        return model.model_dump_json(indent=1)
    except PydanticSerializationError:
        return json.dumps(storable(model.model_dump(mode="python")), indent=1, ensure_ascii=False)


class StageResult(Frozen):
    """The outcome of one stage; one row of the trade-off table.

    Attributes:
        stage: Unique name: ``dense``, ``prune``, ``finetune``, ``quantize``, ``export``, ``target:cpu``,
            ``deploy:jetson-orin-nano-8gb`` ...
        kind: What it did: ``dense``, ``prune``, ``finetune``, ``quantize``, ``export``, ``target``, ``deploy``, ``trial``.
        of: Name of the stage whose network it is of; its own where it made one, empty where another command made it.
        target: The edge target that it is about, or None.
        status: ``done``, ``skipped`` or ``failed``; the last two carry a reason.
        reason: Why it was skipped or failed.
        key: Hash of everything the outcome depends on: inputs' content, settings, versions.
        metrics: By name: ``top1``, ``top5``, ``macs``, ``params``, ``size_bytes``, ``p50_ms``, ``p90_ms``, ``p99_ms`` ...
        outputs: Files it wrote.
        duration_s: Wall-clock time it took when it ran.
        finished: When it ended; ISO 8601, UTC.
        ancestry: SHA-256 of the checkpoint it read, of the one that was made from, and so on back to the first file.
        environment: Where it was computed, as in `Manifest`, with the number of threads; empty where it is not known.
        details: What a reader may want beside the metrics, by the kind of stage (widths per group, error curves, log of the
            epochs, engine status, lint findings, latency per layer).
    """

    stage: str
    kind: str = ""
    of: str = ""
    target: str | None = None
    status: Status
    reason: str | None = None
    key: str = ""
    metrics: dict[str, Metric] = Field(default_factory=dict)
    outputs: tuple[Artifact, ...] = ()
    duration_s: float = 0.0
    finished: str = ""
    ancestry: tuple[str, ...] = ()
    environment: dict[str, Any] = Field(default_factory=dict)
    details: SerializeAsAny[Details] = Field(default_factory=Details)

    @model_validator(mode="before")
    @classmethod
    def _upgraded(cls, data: Any) -> Any:
        """Return what was written in the first layout with the kind and the target that its name says."""
        if not isinstance(data, dict) or data.get("kind") or not isinstance(data.get("stage"), str):
            return data
        name: str = data["stage"]
        word, colon, target = name.partition(":")
        kind = word if colon else re.sub(r"-\d+$", "", word)
        known = kind in KINDS and bool(colon) == (kind in (TARGET, DEPLOY))
        made = known and kind not in (TARGET, DEPLOY, "export")
        return {
            **data,
            "kind": kind if known else "",
            "target": target if known and colon else None,
            "of": name if made else "",
        }

    @field_validator("details", mode="before")
    @classmethod
    def _typed(cls, details: Any, info: ValidationInfo) -> Any:
        """Return the details of this kind of stage."""
        kind = KINDS.get(info.data.get("kind", ""), Details)
        if isinstance(details, kind):
            return details
        try:
            return kind.model_validate(details.document() if isinstance(details, Details) else details)
        except ValidationError as e:
            first = e.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from e

    def details_as(self, kind: type[D]) -> D | None:
        """Return the details if they are of that kind."""
        return self.details if isinstance(self.details, kind) else None

    @property
    def headline(self) -> str:
        """Its status where it is not done, else accuracy, MACs, size and latency, as far as they are known."""
        if self.status != "done":
            return f"{self.status}: {self.reason}" if self.reason else self.status
        known = [
            f"{100 * self.metrics['top1'].value:.2f} %" if "top1" in self.metrics else "",
            f"{prefixed(self.metrics['macs'].value)}MACs" if "macs" in self.metrics else "",
            f"{self.metrics['size_bytes'].value / 1e6:.2f} MB ONNX" if "size_bytes" in self.metrics else "",
            f"{self.metrics['p50_ms'].value:.3g} ms {self.metrics['p50_ms'].provenance}" if "p50_ms" in self.metrics else "",
        ]
        return " ".join(text for text in known if text) or "done"

    @property
    def is_deployment(self) -> bool:
        """Whether it was built and measured on a board, by `deploy`, beside the run."""
        return self.kind == DEPLOY

    @property
    def checkpoint_sha256(self) -> str | None:
        """SHA-256 of the checkpoint that it wrote, or None."""
        written = self.output("checkpoint")
        return written.sha256 if written else None

    def output(self, kind: str) -> Artifact | None:
        """Return the first output of that kind, or None."""
        return next((a for a in self.outputs if a.kind == kind), None)


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return in words how one environment differs from another."""
    mine, theirs = ({**e, **_mapping(e.get("packages"))} for e in (one, other))
    names = [n for n in dict.fromkeys([*mine, *theirs]) if n != "packages" and mine.get(n) != theirs.get(n)]
    return ", ".join(f"{n} {mine.get(n, 'unknown')} (not {theirs.get(n, 'unknown')})" for n in names)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


class Manifest(Showing, Frozen):
    """All stages of one run, in order.

    Attributes:
        schema_version: Of this file's layout.
        rescompress_version: Of the package that wrote it.
        created: ISO 8601, UTC.
        config: The run's settings as they were resolved.
        config_file: The file that they are from, relative to the run's folder; empty where it is not known.
        environment: Python, platform, packages and CPU of the last call; each stage has its own.
        stages: In order.
        unfinished: Names of the stages that the run has not reached yet: it is going on, or it was stopped.
    """

    schema_version: int = SCHEMA_VERSION
    rescompress_version: str = ""
    created: str = ""
    config: dict[str, Any] = Field(default_factory=dict)
    config_file: str = ""
    environment: dict[str, Any] = Field(default_factory=dict)
    stages: tuple[StageResult, ...] = ()
    unfinished: tuple[str, ...] = ()

    def shows(self) -> Mapping[str, str]:
        """Return the stages with their main figures."""
        return {s.stage: s.headline for s in self.stages} | {name: "not reached yet" for name in self.unfinished}

    @property
    def unfinished_targets(self) -> frozenset[str]:
        """The targets that the run has not reached yet."""
        return frozenset(name.removeprefix(TARGET_PREFIX) for name in self.unfinished if name.startswith(TARGET_PREFIX))

    def stage(self, name: str) -> StageResult | None:
        """Return the stage called `name`, or None."""
        return next((s for s in self.stages if s.stage == name), None)

    @property
    def environments(self) -> tuple[tuple[dict[str, Any], tuple[str, ...]], ...]:
        """The environments that stages were computed in, each with the names of its stages, in order; unknown ones left out."""
        found: list[tuple[dict[str, Any], list[str]]] = []
        for stage in self.stages:
            names = next((names for place, names in found if place == stage.environment), None)
            if names is not None:
                names.append(stage.stage)
            elif stage.environment:
                found.append((stage.environment, [stage.stage]))
        return tuple((place, tuple(names)) for place, names in found)

    @property
    def made_elsewhere(self) -> tuple[str, ...]:
        """Sentences on stages that were computed elsewhere, or with another number of threads, than the last one."""
        last = next((s.environment for s in reversed(self.stages) if s.environment), {})
        return tuple(
            f"{', '.join(names)}: computed with {_difference(place, last)}"
            for place, names in self.environments
            if place != last
        )

    def with_stage(self, result: StageResult) -> Manifest:
        """Return a manifest in which `result` replaces the stage of its name, or stands last, and is no longer unfinished."""
        stages = list(self.stages)
        for i, old in enumerate(stages):
            if old.stage == result.stage:
                stages[i] = result
                break
        else:
            stages.append(result)
        left = tuple(name for name in self.unfinished if name != result.stage)
        return self.model_copy(update={"stages": tuple(stages), "unfinished": left})

    def ancestry(self, sha256: str) -> tuple[str, ...]:
        """Return the hash of a checkpoint, and of those that it was made from, as far as they are known here.

        Args:
            sha256: Of the checkpoint, or of another file that a stage made of it, such as an ONNX file.
        """
        maker = self.maker(sha256)
        if maker is not None and maker.checkpoint_sha256 == sha256:
            return (sha256, *maker.ancestry)
        return maker.ancestry if maker is not None and maker.ancestry else (sha256,)

    def maker(self, sha256: str) -> StageResult | None:
        """Return the stage that wrote the file of that hash, one that wrote it as its checkpoint first, or None."""
        made = next((s for s in self.stages if s.checkpoint_sha256 == sha256), None)
        return made or next((s for s in self.stages if any(a.sha256 == sha256 for a in s.outputs)), None)

    def lineage(self, name: str) -> tuple[str, ...]:
        """Return the names of a stage and of those that its network went through before, in order."""
        last = self.stage(name)
        before = set(last.ancestry) if last else set()
        start = {s.stage for s in self.stages if s.kind == "dense" and before.intersection(s.ancestry)}
        return tuple(s.stage for s in self.stages if s.stage in {name, *start} or s.checkpoint_sha256 in before)

    def of_network(self, first_sha256: str) -> Manifest:
        """Return a manifest of the stages alone whose network began with the file of that hash."""
        kept = tuple(s for s in self.stages if s.ancestry[-1:] == (first_sha256,))
        return self.model_copy(update={"stages": kept, "config": self.config if kept else {}})

    def with_deployments(self, deployments: Sequence[StageResult]) -> Manifest:
        """Return a manifest that also has the deployments whose network is here, or, in an unfinished run, may come to be.

        Each stands once, also where it was here before.
        """
        here = {s.checkpoint_sha256 for s in self.stages} | {s.ancestry[0] for s in self.stages if s.ancestry}
        kept = tuple(d for d in deployments if self.unfinished or here.intersection(d.ancestry[:1]))
        names = {d.stage for d in kept}
        return self.model_copy(update={"stages": (*(s for s in self.stages if s.stage not in names), *kept)})

    def with_new_deployments(self, stored: Manifest, before: Manifest) -> Manifest:
        """Return a manifest that also has what was deployed to `stored` since `before`, in the place of what it replaces."""
        manifest = self
        for result in stored.stages:
            if result.is_deployment and result != before.stage(result.stage):
                manifest = manifest.with_stage(result)
        return manifest

    def replacing(self, result: StageResult) -> Manifest:
        """Return a manifest in which `result` stands last, without the stage of its name and what was made from that."""
        old = self.stage(result.stage)
        gone = old.checkpoint_sha256 if old and old.checkpoint_sha256 != result.checkpoint_sha256 else None
        kept = tuple(s for s in self.without(result.stage).stages if gone is None or gone not in s.ancestry)
        return self.model_copy(update={"stages": kept}).with_stage(result)

    def without(self, name: str) -> Manifest:
        """Return a manifest that has no stage called `name`."""
        return self.model_copy(update={"stages": tuple(s for s in self.stages if s.stage != name)})

    def save(self, folder: Path) -> Path:
        """Write ``manifest.json`` into `folder`, atomically, and return its path; a link there is replaced, not followed."""
        path = folder / MANIFEST_NAME
        write_text(path, json_of(self) + "\n", follow=False)
        return path


def update_manifest(folder: Path, change: Callable[[Manifest], Manifest], *, damaged: Manifest | None = None) -> Manifest:
    """Return what `change` makes of the manifest in `folder`, saved; nobody else who does so comes in between.

    A run and a deployment write into one folder at a time: each keeps what the other wrote since it last looked.

    Args:
        folder: Of the run; it must be there.
        change: From the manifest that is there (an empty one where there is none) to the new one.
        damaged: What `change` is given where the file cannot be read; by default that is an error.

    Raises:
        BadInput: The file cannot be read.
    """
    with folder_held(folder):
        try:
            stored = load_manifest(folder) if (folder / MANIFEST_NAME).is_file() else Manifest()
        except BadInput:
            if damaged is None:
                raise
            stored = damaged
        changed = change(stored)
        changed.save(folder)
    return changed


def runs_below(folder: Path) -> list[Path]:
    """Return the folders of the runs directly below `folder`."""
    return sorted(p.parent for p in folder.glob(f"*/{MANIFEST_NAME}") if not p.parent.name.startswith("."))


def load_manifest(path: Path | str) -> Manifest:
    """Return the manifest at `path`, a ``manifest.json`` or the folder that holds one.

    Raises:
        BadInput: It is missing, damaged, or of a layout this version cannot read.
    """
    path = Path(path)
    if path.is_dir():
        path = path / MANIFEST_NAME
    try:
        text = read_text(path)
    except FileNotFoundError as e:
        below = ", ".join(str(run) for run in runs_below(path.parent))
        remedy = f"name one of the runs below it: {below}" if below else "name the output folder of a run"
        raise BadInput("no such manifest", where=str(path), remedy=remedy) from e
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"cannot be read: {e}", where=str(path), remedy="name the output folder of a run") from e
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(str(p) for p in first["loc"]) or "the document"
        raise BadInput(
            f"is no manifest: {place}: {first['msg']}", where=str(path), remedy="run the pipeline again, or restore the file"
        ) from e
    if manifest.schema_version not in READ:
        raise BadInput(
            f"was written in layout {manifest.schema_version}, this version reads {READ[0]} to {READ[-1]}",
            where=str(path),
            remedy="read it with the version of rescompress that wrote it, or run the pipeline again",
        )
    return manifest.model_copy(update={"schema_version": SCHEMA_VERSION})
