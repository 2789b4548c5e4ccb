"""Order, skip, resume: runs stages whose outcome is not yet known, and keeps the manifest.

A stage has a key, the hash of everything its outcome depends on: its settings, the content of the files it reads, the
keys' of the stages before it through their outputs, the version of the package. A stage whose key has an outcome with
all files intact is not run again. Every file is written whole or not at all, the outcome after the files, the manifest
after the outcome; so a process may be killed at any moment, and a second call goes on where the first stopped.

Layout of a run's folder: ``manifest.json`` (what readers read), ``.stages/<stage>.json`` (outcomes by stage, with keys),
``.resume/`` (the state of an unfinished training), and the stages' own files. What `deploy` measured on a board stays in the
manifest as long as the run still makes the network that was deployed.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from rescompress.core.artifact import Artifact, check_writable, make_folder, sweep_partial, write_text
from rescompress.core.errors import BadInput, RescompressError
from rescompress.core.manifest import MANIFEST_NAME, Manifest, StageResult, load_manifest, update_manifest
from rescompress.fingerprint import environment, key_of
from rescompress.reporter import Reporter
from rescompress.stage import Context, Stage


class Peers(Protocol):
    """The processes that run one pipeline together (one, unless started by ``torchrun``)."""

    @property
    def is_main(self) -> bool:
        """Whether this process decides and writes."""
        ...

    def share(self, text: str | None) -> str:
        """Return the main process's text in every process."""
        ...


class Alone:
    """A single process."""

    is_main = True

    def share(self, text: str | None) -> str:
        """Return the text."""
        return text or ""


@dataclass(frozen=True)
class RunReport:
    """What a call of `run_stages` did.

    Attributes:
        manifest: The outcome.
        ran: Stages that did work.
        reused: Stages whose outcome was known.
    """

    manifest: Manifest
    ran: tuple[str, ...]
    reused: tuple[str, ...]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the run's folder, so that two processes never write into it at once."""
    make_folder(folder)
    check_writable(folder / ".lock")
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise BadInput(
                "another process is running here", where=str(folder), remedy="wait for it, or work in another folder"
            ) from e
        yield


def folder_of(config_file: Path, below: Path) -> Path:
    """Return the folder of a run that names none: that of the config's name, unless another config of that name has it.

    Raises:
        BadInput: It holds the run of another file.
    """
    folder = below / config_file.stem
    recorded = _stored(folder).config_file
    other = (folder.resolve() / recorded).resolve()
    if recorded and other != config_file.resolve():
        raise BadInput(
            f"holds the run of {os.path.relpath(other)}", where=str(folder), remedy="name a folder for this one with -o FOLDER"
        )
    return folder


def run_stages(
    stages: Sequence[Stage],
    folder: Path,
    config: Mapping[str, Any],
    *,
    reporter: Reporter,
    peers: Peers | None = None,
    workspace: bool = False,
    config_file: Path | None = None,
) -> RunReport:
    """Bring every stage's outcome up to date and return the manifest.

    Args:
        stages: In order.
        folder: The run's folder; it is made if need be.
        config: What the manifest shows as the run's settings.
        reporter: Where progress goes.
        peers: The processes that share the work.
        workspace: The folder belongs to no single run: the stages join those that other commands left, as far as these are
            about the same network, and the manifest names only what is done.
        config_file: Where `config` is from.

    Raises:
        RescompressError: A stage failed; what was done before it is kept, and the manifest says which stage failed.
        BadInput: Another process is running in this folder.
    """
    peers = peers or Alone()
    if not peers.is_main:
        return _follow(stages, folder, reporter, peers)
    with _locked(folder):
        sweep_partial(folder)
        return _lead(stages, folder, _fresh(folder, config, workspace, config_file), reporter, peers, workspace)


def _lead(
    stages: Sequence[Stage], folder: Path, manifest: Manifest, reporter: Reporter, peers: Peers, workspace: bool
) -> RunReport:
    before = _stored(folder)

    def save(manifest: Manifest) -> Manifest:
        """Save it, with what is deployed, or was meanwhile by another process."""

        def merged(stored: Manifest) -> Manifest:
            if workspace:
                return manifest.with_new_deployments(stored, before)
            return manifest.with_deployments([s for s in stored.stages if s.is_deployment])

        return update_manifest(folder, merged, damaged=before)

    if not workspace:
        manifest = manifest.model_copy(update={"unfinished": tuple(s.name for s in stages)})
    ran, reused = [], []
    for position, stage in enumerate(stages, 1):
        ancestry = _ancestry(stage, manifest)
        if workspace:
            manifest = manifest.of_network(ancestry[-1])
        key = _key(stage, manifest)
        result = _known(stage, key, folder)
        reporter.stage(stage.name, position, len(stages))
        old = before.stage(stage.name)
        if not workspace and result is None and old is not None and old.status == "done":
            reporter.note(f"{stage.name} is computed again, and its outcome of {old.finished or 'before'} replaced")
        if result is not None:
            peers.share("skip")
            reused.append(stage.name)
            reporter.finished(stage.name, "already done")
            listed = manifest.stage(stage.name)
            result = result.model_copy(update={"ancestry": ancestry})
            same = listed is not None and listed.key == key
            manifest = manifest.with_stage(result) if same else manifest.replacing(result)
        else:
            if stage.collective:
                peers.share("join " + manifest.model_dump_json())
            if not workspace:
                save(manifest)
            try:
                result = _run(stage, key, ancestry, folder, manifest, reporter)
            except RescompressError as e:
                if not workspace:
                    failed = StageResult(stage=stage.name, status="failed", reason=str(e), key=key)
                    save(manifest.with_stage(failed))
                raise
            if not stage.collective:
                peers.share("skip")
            ran.append(stage.name)
            reporter.finished(stage.name, _summary(result))
            manifest = manifest.replacing(result)  # stages stand in the order in which they were last run
            if workspace:
                manifest = save(manifest)
    stored = _stored(folder)
    if not workspace:
        manifest = manifest.with_deployments([s for s in stored.stages if s.is_deployment])
    parts = ("stages", "config", "config_file", "unfinished")
    if ran or any(getattr(manifest, part) != getattr(stored, part) for part in parts):
        manifest = save(manifest)
    return RunReport(manifest, tuple(ran), tuple(reused))


def _follow(stages: Sequence[Stage], folder: Path, reporter: Reporter, peers: Peers) -> RunReport:
    for stage in stages:
        order, _, text = peers.share(None).partition(" ")
        if order == "join":
            stage.run(Context(folder, Manifest.model_validate_json(text), reporter, main=False))
    return RunReport(Manifest(), (), ())


def _stored(folder: Path) -> Manifest:
    return load_manifest(folder) if (folder / MANIFEST_NAME).is_file() else Manifest()


def _fresh(folder: Path, config: Mapping[str, Any], workspace: bool, config_file: Path | None) -> Manifest:
    old = _stored(folder)
    created = old.created or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Manifest(
        rescompress_version=version("rescompress"),
        created=created,
        config={**old.config, **config} if workspace else dict(config),
        config_file=os.path.relpath(config_file.resolve(), folder.resolve()) if config_file is not None else "",
        environment=environment(),
        stages=old.stages if workspace else (),
    )


def _key(stage: Stage, manifest: Manifest) -> str:
    inputs = {}
    for name in stage.after:
        result = manifest.stage(name)
        inputs[name] = [a.sha256 for a in result.outputs if a.kind in ("checkpoint", "onnx")] if result else None
    return key_of({"stage": stage.name, "version": version("rescompress"), "depends": stage.depends, "inputs": inputs})


def _known(stage: Stage, key: str, folder: Path) -> StageResult | None:
    """Return the recorded outcome of `stage` if it is for this key and all its files are intact."""
    path = _record(stage, folder)
    try:
        result = StageResult.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return None
    good = result.key == key and result.status != "failed" and all(a.intact(folder) for a in result.outputs)
    return result if good else None


def _record(stage: Stage, folder: Path) -> Path:
    return folder / ".stages" / f"{stage.name.replace(':', '_').replace('/', '_')}.json"


def _ancestry(stage: Stage, manifest: Manifest) -> tuple[str, ...]:
    """Return the hashes of the checkpoint that `stage` reads and of those it was made from."""
    before = manifest.stage(stage.source)
    return manifest.ancestry((before.checkpoint_sha256 if before else None) or stage.source)


def _run(
    stage: Stage, key: str, ancestry: tuple[str, ...], folder: Path, manifest: Manifest, reporter: Reporter
) -> StageResult:
    start = time.monotonic()
    outcome = stage.run(Context(folder, manifest, reporter))
    result = StageResult(
        stage=stage.name,
        status="skipped" if outcome.skipped else "done",
        reason=outcome.skipped,
        key=key,
        metrics=dict(outcome.metrics),
        outputs=tuple(Artifact.of(kind, path, folder) for kind, path in outcome.files),
        duration_s=round(time.monotonic() - start, 3),
        ancestry=ancestry,
        finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        details=dict(outcome.details),
    )
    write_text(_record(stage, folder), result.model_dump_json(indent=1) + "\n")
    for path in outcome.transient:
        path.unlink(missing_ok=True)
    return result


def _summary(result: StageResult) -> str:
    words = [f"{result.duration_s:.0f} s"]
    if "top1" in result.metrics:
        words.append(f"top-1 {100 * result.metrics['top1'].value:.2f} %")
    if "p50_ms" in result.metrics:
        latency = result.metrics["p50_ms"]
        words.append(f"{latency.value:.3g} ms {latency.provenance}")
    if result.reason:
        words.append(f"{result.status}: {result.reason}")
    return ", ".join(words)
