"""Order, skip, resume: runs stages whose outcome is not yet known, and keeps the manifest.

A stage has a key, the hash of everything its outcome depends on: its settings, the content of the files it reads, the
outputs of the stages before it, the version of the package, the code of the plugins that it uses. A stage whose key has
an outcome with all files intact is not run again. Every file is written whole or not at all, the outcome after the files,
the manifest after the outcome; so a process may be killed at any moment, and a second call goes on where the first stopped.

Layout of a run's folder: ``manifest.json`` (what readers read), ``.stages/<stage>.json`` (outcomes by stage, with keys),
``.resume/`` (the state of an unfinished training), and the stages' own files. What was measured on a board is a stage beside
the run, with a lock of its own: several boards work at a time, and while a run goes on. It stays in the manifest as long as
the run still makes the network that was deployed.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from rescompress.core import evidence
from rescompress.core.artifact import (
    Artifact,
    check_writable,
    make_folder,
    open_regular,
    read_text,
    sweep_partial,
    unreadable,
    write_bytes,
    write_text,
)
from rescompress.core.errors import BadInput, EnvironmentFailed, RescompressError, nearest
from rescompress.core.locks import lock
from rescompress.core.manifest import MANIFEST_NAME, Manifest, StageResult, json_of, load_manifest, update_manifest
from rescompress.core.text import storable
from rescompress.runs import claims
from rescompress.runs.fingerprint import environment, key_of
from rescompress.runs.reporter import Reporter
from rescompress.runs.stage import Context, Stage
from rescompress.runs.store import Store


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
def _locked(folder: Path, name: str = claims.LOCK) -> Iterator[Callable[[], None]]:
    """Hold the run's folder, so that two processes never write into it at once; yield what makes sure it is still there.

    The lock is opened without being followed, cut or written: what lies there under its name may be anything.

    Args:
        folder: Of the run.
        name: Of the lock, relative to it; that of a stage beside the run holds the places of that stage.
    """
    make_folder(folder)
    path = folder / name
    if not path.is_symlink() and not path.exists():
        check_writable(path)
    with contextlib.ExitStack() as stack:
        handle = _open_lock(path)
        stack.callback(os.close, handle)
        if not lock(handle):
            raise BadInput(
                "another process is running here", where=str(folder), remedy="wait for it, or work in another folder"
            )
        home = folder.stat()

        def still_there() -> None:
            try:
                same = os.path.samestat(home, folder.stat())
            except FileNotFoundError:
                same = False
            if not same:
                raise EnvironmentFailed(
                    "was moved or removed while this run was working in it",
                    where=str(folder),
                    remedy="call the command again; in a folder that was moved, with -o and its new name",
                )

        yield still_there


def _open_lock(path: Path) -> int:
    flags = os.O_CREAT
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"):  # Windows has none of them
        flags |= getattr(os, name, 0)
    handle = None
    try:
        try:
            handle = os.open(path, os.O_RDWR | flags, 0o666)
        except PermissionError:  # another user's: reading suffices for a lock
            handle = os.open(path, os.O_RDONLY | (flags & ~os.O_CREAT))
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return handle
    except OSError as e:
        if e.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise unreadable(path, e) from e
    if handle is not None:
        os.close(handle)
    raise BadInput("is no regular file, and the lock of a run belongs there", where=str(path), remedy="remove it and run again")


def folder_of(config_file: Path, below: Path) -> Path:
    """Return the folder of a run that names none: that of the config's name, unless another config of that name has it.

    Raises:
        BadInput: It holds the run of another file.
    """
    folder = below / config_file.stem
    recorded = _stored(folder)[0].config_file
    if recorded and _place_of(folder / recorded, folder) != _place_of(config_file, folder):
        other = os.path.relpath((folder / recorded).resolve())
        raise BadInput(f"holds the run of {other}", where=str(folder), remedy="name a folder for this one with -o FOLDER")
    return folder


def _place_of(config_file: Path, folder: Path) -> str:
    """Return where a config is, seen from the folder of a run, as the manifest says it."""
    return str(storable(os.path.relpath(config_file.resolve(), folder.resolve())))


def run_stages(
    stages: Sequence[Stage],
    folder: Path,
    config: Mapping[str, Any],
    *,
    reporter: Reporter,
    peers: Peers | None = None,
    workspace: bool = False,
    config_file: Path | None = None,
    store: Store | None = None,
    reads: Sequence[Path] = (),
    force: bool = False,
    again: Collection[str] = (),
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
        store: Outcomes shared with other runs; what is known there is not computed again.
        reads: Files that the run reads, besides those of its stages and `config_file`.
        force: Whether files that rescompress did not write may be replaced.
        again: Stages that are computed even if their outcome is known.

    Raises:
        RescompressError: A stage failed; what was done before it is kept, and the manifest says which stage failed.
        BadInput: There is no stage of a name in `again`, another process is running in this folder, or the run would write
            over what it reads, or over the files
            of somebody else.
    """
    peers = peers or Alone()
    names = [stage.name for stage in stages]
    for name in again:
        if name not in names:
            raise BadInput(f"'{name}' is no stage of this run", where="again", remedy=nearest(name, names))
    if not peers.is_main:
        return _follow(stages, folder, reporter, peers)
    given = [*reads, *([config_file] if config_file is not None else [])]
    claims.check_reads(stages, folder, given, workspace=workspace)
    with _locked(folder) as still_there:
        claims.check_own(folder)
        claims.claim(stages, folder, workspace=workspace, force=force)
        places = claims.folders_of(stages, folder)
        sweep_partial(places)
        before, damage = _stored(folder)
        if damage:
            reporter.note(damage)
            with open_regular(folder / MANIFEST_NAME) as f:
                write_bytes(folder / _ASIDE, f.read(), follow=False)
        manifest = _fresh(before, folder, config, workspace, config_file)
        with _swept(folder, places):
            return _lead(stages, _Work(folder, reporter, still_there, store), manifest, before, peers, workspace, again)


@dataclass(frozen=True)
class BesideReport:
    """What a call of `run_beside` did.

    Attributes:
        result: The outcome.
        ran: Whether it was computed, rather than known.
        incomplete: Why something that was asked for is not in it, or None.
    """

    result: StageResult
    ran: bool
    incomplete: RescompressError | None = None


def run_beside(stage: Stage, folder: Path, *, reporter: Reporter, again: bool = True) -> BesideReport:
    """Compute a stage that may stand beside any run, such as a measurement on a board, and enter it into the manifest.

    It holds its own places and no others: a run that goes on in the folder, and other stages beside it, go on meanwhile,
    and each keeps what the others enter.

    Args:
        stage: It reads files, and no stage of the run.
        folder: Of the run, or where one may be.
        reporter: Where progress goes.
        again: Whether it is computed even if its outcome is known.

    Raises:
        RescompressError: The stage failed; the manifest is as it was.
        BadInput: Another process computes this stage in this folder, or it would write over what it reads, or over the
            files of somebody else.
    """
    claims.check_reads([stage], folder, (), workspace=True)
    with _locked(folder, claims.lock_of(stage.name)) as still_there:
        claims.check_own(folder)
        before = evidence.load_sound(folder) if (folder / MANIFEST_NAME).is_file() else Manifest()
        claims.claim([stage], folder, workspace=True, force=False)
        claims.check_places(stage, folder)
        places = claims.folders_of([stage], folder)
        sweep_partial(places)
        key = _key(stage, before)
        lineage = _with_records(before, folder)
        result = None if again else _known(stage, key, folder, reporter)
        incomplete, ran = None, result is None
        reporter.stage(stage.name, 1, 1)
        if result is None:
            with _swept(folder, places):
                work = _Work(folder, reporter, still_there)
                result, incomplete = work.compute(stage, key, _ancestry(stage, lineage), before, beside=True)
        reporter.finished(stage.name, _summary(result) if ran else "already done")

        def entered(stored: Manifest) -> Manifest:
            made = stored.maker(stage.network)
            known = stored if made else lineage  # a run that began meanwhile has taken what it makes anew out of it
            made = made or lineage.maker(stage.network)
            of, ancestry = (made.of if made else ""), _ancestry(stage, known)
            whole = stored if stored != Manifest() else _fresh(stored, folder, {}, False, None)
            return whole.with_stage(result.model_copy(update={"of": of, "ancestry": ancestry}))

        manifest = update_manifest(folder, entered)
        entry = manifest.stage(stage.name)
        assert entry is not None
    return BesideReport(entry, ran, incomplete)


def _with_records(manifest: Manifest, folder: Path) -> Manifest:
    """Return the manifest with the stages that a run which goes on has yet to make again, as they were made before."""
    found = (_read(record) for record in sorted((folder / claims.RECORDS).glob("[!.]*.json")))
    more = [r for r in found if r is not None and manifest.stage(r.stage) is None]
    return manifest.model_copy(update={"stages": (*manifest.stages, *more)})


@contextlib.contextmanager
def _swept(folder: Path, places: Sequence[Path]) -> Iterator[None]:
    """Leave no half-written file behind where the work inside fails, and tell where that was for want of room.

    Raises:
        EnvironmentFailed: The disk is full.
    """
    try:
        yield
    except Exception as e:
        full = not isinstance(e, RescompressError) and _is_full(folder)  # before room is made
        sweep_partial(places)
        if full:
            what = f"the disk is full ({type(e).__name__}: {e})"
            raise EnvironmentFailed(what, where=str(folder), remedy="free some space and run again") from e
        raise


_ASIDE = f"{claims.RECORDS}/.damaged-manifest"
"""Where a manifest that cannot be read is kept when it is made again."""
_FULL = 2**16
"""Bytes; a disk with no more room than this is full: a library that ran into it does not always say so."""


def _is_full(folder: Path) -> bool:
    try:
        if not hasattr(os, "statvfs"):  # Windows
            return shutil.disk_usage(folder).free < _FULL
        room = os.statvfs(folder)
    except OSError:
        return False
    return room.f_bavail * room.f_frsize < _FULL or (room.f_files > 0 and room.f_favail == 0)


@dataclass(frozen=True)
class _Work:
    """What computes stages in one folder, and records them there.

    Attributes:
        folder: Of the run.
        reporter: Where progress goes.
        still_there: Makes sure that the folder is.
        store: Outcomes shared with other runs, or None.
    """

    folder: Path
    reporter: Reporter
    still_there: Callable[[], None]
    store: Store | None = None

    def outcome(
        self, stage: Stage, key: str, ancestry: tuple[str, ...], manifest: Manifest, *, again: bool
    ) -> tuple[StageResult, bool]:
        """Return the outcome, from the store where another run has left it there, and whether it was computed."""
        if self.store is None:
            return self._whole(stage, key, ancestry, manifest), True
        with self.store.computing(key):
            known = self.store.fetch(key, self.folder) if not again else None
            if known is not None:
                result = known.model_copy(update={"ancestry": ancestry})
                self._record(result)
                return result, False
            result = self._whole(stage, key, ancestry, manifest)
            self.store.put(result, self.folder)
            return result, True

    def _whole(self, stage: Stage, key: str, ancestry: tuple[str, ...], manifest: Manifest) -> StageResult:
        result, incomplete = self.compute(stage, key, ancestry, manifest)
        if incomplete is not None:
            raise incomplete
        return result

    def compute(
        self, stage: Stage, key: str, ancestry: tuple[str, ...], manifest: Manifest, *, beside: bool = False
    ) -> tuple[StageResult, RescompressError | None]:
        """Return the outcome, recorded, and what is missing of it; a stage beside the run says itself where it was computed."""
        start = time.monotonic()
        outcome = stage.run(Context(self.folder, manifest, self.reporter, store=self.store))
        try:
            self.still_there()
        except EnvironmentFailed:
            if not os.path.lexists(self.folder / claims.LOCK):  # made anew by writing into it, and no other run's
                for _, path in outcome.files:
                    path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    self.folder.rmdir()
            raise
        result = StageResult(
            **_identity(stage),
            status="skipped" if outcome.skipped else "done",
            reason=outcome.skipped,
            key="" if outcome.incomplete else key,
            metrics=dict(outcome.metrics),
            outputs=tuple(Artifact.of(kind, path, self.folder) for kind, path in outcome.files),
            duration_s=round(time.monotonic() - start, 3),
            ancestry=ancestry,
            finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            environment={} if beside else {**manifest.environment, **_threads()},
            details=outcome.details,
        )
        self._record(result)
        for path in outcome.transient:
            path.unlink(missing_ok=True)
        return result, outcome.incomplete

    def _record(self, result: StageResult) -> None:
        write_text(self.folder / claims.record_of(result.stage), json_of(result) + "\n", follow=False)


def _lead(
    stages: Sequence[Stage],
    work: _Work,
    manifest: Manifest,
    before: Manifest,
    peers: Peers,
    workspace: bool,
    again: Collection[str],
) -> RunReport:
    folder, reporter, still_there = work.folder, work.reporter, work.still_there

    def save(manifest: Manifest) -> Manifest:
        """Save it, with what is deployed, or was meanwhile by another process."""

        def merged(stored: Manifest) -> Manifest:
            if evidence.contradiction(stored.stages, folder) is not None:  # edited; `before` has what the records say
                stored = before
            if workspace:
                return manifest.with_new_deployments(stored, before)
            return manifest.with_deployments([s for s in stored.stages if s.is_deployment])

        return update_manifest(folder, merged, damaged=before)

    if not workspace:
        manifest = manifest.model_copy(update={"unfinished": tuple(s.name for s in stages)})
    ran: list[str] = []
    reused: list[str] = []
    clash = _disagreeing(stages, manifest, folder)
    if clash:
        names = " and ".join(stage.name for stage in stages if stage.name in clash)
        reporter.note(f"{names} tell different counts of one network, one was changed since it was written: computed again")
        again = {*again, *clash}
    for position, stage in enumerate(stages, 1):
        ancestry = _ancestry(stage, manifest)
        if workspace:
            manifest = manifest.of_network(ancestry[-1])
        key = _key(stage, manifest)
        result = _known(stage, key, folder, reporter) if stage.name not in again else None
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
                peers.share("join " + json_of(manifest))
            still_there()
            claims.check_places(stage, folder)
            if not workspace:
                save(manifest)
            try:
                result, computed = work.outcome(stage, key, ancestry, manifest, again=stage.name in again)
            except Exception as e:
                still_there()
                if not workspace:
                    failed = StageResult(**_identity(stage), status="failed", reason=str(e), key=key)
                    with contextlib.suppress(EnvironmentFailed):  # the disk may be what failed
                        save(manifest.with_stage(failed))
                raise
            if not stage.collective:
                peers.share("skip")
            (ran if computed else reused).append(stage.name)
            reporter.finished(stage.name, _summary(result) if computed else "already done by another run")
            manifest = manifest.replacing(result)  # stages stand in the order in which they were last run
            if workspace:
                manifest = save(manifest)
    still_there()
    stored, damage = _stored(folder)
    if not workspace:
        manifest = manifest.with_deployments([s for s in stored.stages if s.is_deployment])
        for gone in [s for s in stored.stages if s.is_deployment and manifest.stage(s.stage) is None]:
            reporter.note(f"{gone.stage} is of a network that this run does not make any more: it is left out of the manifest")
    for text in manifest.made_elsewhere:
        reporter.note(text)
    parts = ("stages", "config", "config_file", "unfinished")
    if ran or damage or any(getattr(manifest, part) != getattr(stored, part) for part in parts):
        manifest = save(manifest)
    evidence.check(str(folder), folder, manifest)
    return RunReport(manifest, tuple(ran), tuple(reused))


def _follow(stages: Sequence[Stage], folder: Path, reporter: Reporter, peers: Peers) -> RunReport:
    for stage in stages:
        order, _, text = peers.share(None).partition(" ")
        if order == "join":
            stage.run(Context(folder, Manifest.model_validate_json(text), reporter, main=False))
    return RunReport(Manifest(), (), ())


def _stored(folder: Path) -> tuple[Manifest, str]:
    """Return the manifest of a folder, an empty one where there is none, and what is wrong with it.

    The records of the stages hold all that a run needs of it, so one that is damaged, or contradicts itself or the files
    beside it, is made again from them.

    Raises:
        EnvironmentFailed: It may not be read.
        BadInput: It is damaged, and there are no records.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return Manifest(), ""
    manifest = Manifest()
    try:
        manifest = load_manifest(folder)
        evidence.check(str(folder), folder, manifest)
        return manifest, ""
    except BadInput as e:
        if isinstance(e.__cause__, PermissionError):
            raise unreadable(path, e.__cause__) from e
        records = sorted((folder / claims.RECORDS).glob("[!.]*.json"))
        if not (folder / claims.RECORDS).is_dir():
            raise
        found = [r for r in (_read(record) for record in records) if r is not None and r.status != "failed"]
        whole = [r for r in found if all(a.intact(folder) for a in r.outputs) and evidence.contradiction([r], folder) is None]
        clash = evidence.disagreeing(whole)
        intact = sorted((r for r in whole if r.stage not in clash), key=lambda r: r.finished)
        about = e.where.removeprefix(str(folder)).lstrip(":/ ") if e.where else ""
        what = f"{about or MANIFEST_NAME} {e.what}: it is made again from the records of {len(intact)} stages"
        return manifest.model_copy(update={"stages": tuple(intact)}), f"{what}; the damaged one is kept in {_ASIDE}"


def _fresh(old: Manifest, folder: Path, config: Mapping[str, Any], workspace: bool, config_file: Path | None) -> Manifest:
    created = old.created or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Manifest(
        rescompress_version=version("rescompress"),
        created=created,
        config=storable({**old.config, **config} if workspace else dict(config)),
        config_file=_place_of(config_file, folder) if config_file is not None else "",
        environment=environment(),
        stages=old.stages if workspace else (),
    )


def _key(stage: Stage, manifest: Manifest) -> str:
    inputs = {}
    for name in stage.after:
        result = manifest.stage(name)
        inputs[name] = [a.sha256 for a in result.outputs if a.kind in ("checkpoint", "onnx")] if result else None
    return key_of({"stage": stage.name, "version": version("rescompress"), "depends": stage.depends, "inputs": inputs})


def _disagreeing(stages: Sequence[Stage], manifest: Manifest, folder: Path) -> frozenset[str]:
    """Return the stages whose records would be taken up, but tell different counts of one network."""
    found = []
    for stage in stages:
        result = _read(folder / claims.record_of(stage.name))
        if result is not None and result.status == "done" and result.key == _key(stage, manifest):
            manifest = manifest.with_stage(result)
            found.append(result)
    return evidence.disagreeing(found)


def _known(stage: Stage, key: str, folder: Path, reporter: Reporter) -> StageResult | None:
    """Return the recorded outcome of `stage` if it is for this key, all its files are intact, and they say what it says.

    One that was skipped is none: what the stage lacked may be here by now, and so it is tried again.
    """
    result = _read(folder / claims.record_of(stage.name))
    if result is None or result.key != key or not all(a.intact(folder) for a in result.outputs):
        return None
    wrong = evidence.contradiction([result], folder)
    if wrong is not None:
        reporter.note(f"the record of {stage.name} is not taken up, it was changed since it was written: {wrong}")
        return None
    return result if result.status == "done" else None


def _read(record: Path) -> StageResult | None:
    """Return what a record holds, None where it is damaged or missing."""
    try:
        return StageResult.model_validate_json(read_text(record))
    except PermissionError as e:
        raise unreadable(record, e) from e
    except (OSError, ValueError):
        return None


def _ancestry(stage: Stage, manifest: Manifest) -> tuple[str, ...]:
    """Return the hashes of the checkpoint that `stage` reads and of those it was made from."""
    before = manifest.stage(stage.network)
    return manifest.ancestry((before.checkpoint_sha256 if before else None) or stage.network)


def _identity(stage: Stage) -> dict[str, Any]:
    """Return what a result says of its stage."""
    return {"stage": stage.name, "kind": stage.kind, "of": stage.of, "target": stage.about}


def _threads() -> dict[str, int]:
    """Return how many threads torch computes with in this process: sums in another order are other bits."""
    torch = sys.modules.get("torch")
    return {"threads": torch.get_num_threads()} if torch is not None else {}


def _summary(result: StageResult) -> str:
    words = [f"{result.duration_s:.0f} s"]
    if "top1" in result.metrics:
        words.append(f"top-1 {100 * result.metrics['top1'].value:.2f} %")
    if "infidelity" in result.metrics:
        words.append(f"infidelity {100 * result.metrics['infidelity'].value:.2f} %")
    if "p50_ms" in result.metrics:
        latency = result.metrics["p50_ms"]
        words.append(f"{latency.value:.3g} ms {latency.provenance}")
    if result.reason:
        words.append(f"{result.status}: {result.reason}")
    return ", ".join(words)
