"""`Trials`: what a search knows, in an Optuna storage that any number of workers share.

A search of N candidates has N *slots*, queued when it begins. A worker takes one with an atomic step of the storage
(waiting -> running), so that no two have the same; while it works it gives signs of life. Where they stop, another worker
ends the trial as lost and queues its slot again with the same choices: the ending is atomic, so one successor is queued,
and should the rescuer die between the two steps, the next one sees a slot without a trial and queues it. A slot counts once,
by its first finished trial.

Signs of life are counted, not dated: a watcher judges by its own clock how long a counter has stood still, so that a clock
that jumps, here or there, takes nobody's work away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field

from rescompress.core.errors import BadInput, EnvironmentFailed, ToolMissing
from rescompress.core.locks import FileLock
from rescompress.core.outcomes import Outcomes
from rescompress.core.spec import Frozen
from rescompress.search.settings import RUNGS, Range, Rung, SearchConfig, dimensions

if TYPE_CHECKING:
    import optuna

JOURNAL = "journal.log"
LAYOUT = 1
"""Of what is kept in the storage."""

PATIENCE_S = 300.0
"""How long a storage may be away (a server restarts, a disk is full) before a worker gives up."""

_T = TypeVar("_T")

LOST = "lost"
DONE, STOPPED, IMPOSSIBLE = "done", "stopped", "impossible"


class Answer(Frozen):
    """What one rung said of a candidate.

    Attributes:
        rung: Which.
        accuracy: On the held-out training images (a fraction), None where the rung measures none.
        costs: By objective, in its unit.
        band: Lower and upper end of a cost that was measured or predicted.
        error: Summed error of the pruning curves, where the rung knows no accuracy.
        outcomes: Which held-out images were right.
        seconds: It took.
        verdict: Why the candidate climbs or stops here.
    """

    rung: Rung
    accuracy: float | None = None
    costs: dict[str, float]
    band: dict[str, tuple[float, float]] = Field(default_factory=dict)
    error: float | None = None
    outcomes: Outcomes | None = None
    seconds: float = 0.0
    verdict: str = ""


@dataclass(frozen=True)
class Trial:
    """One candidate.

    Attributes:
        slot: Its number, from 0.
        number: Of the attempt in the storage.
        choices: Value of each dimension.
        anchor: Whether it climbs every rung.
        state: ``waiting``, ``running``, ``done``, ``stopped``, ``impossible`` or ``lost``.
        answers: Of the rungs so far, in order.
        reason: Why it stopped or is impossible.
        worker: Who has or had it.
        folder: Where its run lies, as that worker named it.
    """

    slot: int
    number: int
    choices: Mapping[str, Any]
    anchor: bool
    state: str
    answers: tuple[Answer, ...] = ()
    reason: str = ""
    worker: str = ""
    folder: str = ""

    @property
    def finished(self) -> bool:
        """Whether its slot is done with."""
        return self.state in (DONE, STOPPED, IMPOSSIBLE)

    def answer(self, rung: str) -> Answer | None:
        """Return what a rung said, or None."""
        return next((a for a in self.answers if a.rung == rung), None)


def patiently(what: Callable[[], _T], patience_s: float | None = None) -> _T:
    """Return what a call to the storage returns, trying again while the storage is away.

    Every call that goes through here may be repeated: what it does twice, readers count once.

    Raises:
        EnvironmentFailed: It stays away.
    """
    import optuna
    from sqlalchemy.exc import InterfaceError, OperationalError

    patience = PATIENCE_S if patience_s is None else patience_s
    start, pause = time.monotonic(), 0.2
    while True:
        try:
            return what()
        except (optuna.exceptions.StorageInternalError, OperationalError, InterfaceError, OSError) as e:
            if time.monotonic() - start > patience:
                reason = str(getattr(e, "orig", None) or e).strip().splitlines()[0]
                raise EnvironmentFailed(
                    f"the search's storage failed: {reason}", remedy="look after it, then call the same command again"
                ) from e
            time.sleep(pause * (0.5 + random.random()))
            pause = min(2 * pause, 10.0)


@dataclass
class Lease:
    """This worker's claim on a trial, with its signs of life."""

    trials: Trials
    trial_id: int
    trial: Trial
    folder: str = ""
    beats: int = 0

    def beat(self) -> None:
        """Give a sign of life."""
        self.beats += 1
        lease = {"worker": self.trials.worker, "pid": os.getpid(), "host": socket.gethostname(), "beat": self.beats}
        lease["folder"] = self.folder
        self.trials.study._storage.set_trial_user_attr(self.trial_id, "lease", lease)

    def record(self, answer: Answer) -> None:
        """Keep what a rung said."""
        self.note(f"rung:{answer.rung}", answer.model_dump_json(exclude_defaults=True))
        kept = tuple(a for a in self.trial.answers if a.rung != answer.rung)
        self.trial = dataclasses.replace(self.trial, answers=(*kept, answer))

    def note(self, name: str, value: Any) -> None:
        """Keep a word about the trial; one that somebody else has ended in the meantime stays as it is."""
        import optuna

        def keep() -> None:
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                self.trials.study._storage.set_trial_user_attr(self.trial_id, name, value)

        patiently(keep)

    def finish(self, state: str, reason: str = "") -> bool:
        """End the trial; return whether it was still ours to end."""
        import optuna

        best = self.trial.answers[-1] if self.trial.answers else None
        try:
            self.note("end", {"state": state, "reason": reason})
            if state == IMPOSSIBLE or best is None or best.accuracy is None:
                patiently(lambda: self.trials.study.tell(self.trial.number, state=optuna.trial.TrialState.FAIL))
            else:
                values = [best.accuracy, *(best.costs[c] for c in self.trials.config.objectives)]
                patiently(lambda: self.trials.study.tell(self.trial.number, values))
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            return False  # somebody took us for dead: what they do counts
        return True


@dataclass
class Trials:
    """The trials of one search, through one storage.

    Attributes:
        study: Optuna's.
        config: The search's section.
        document: The run's config as JSON values.
        worker: Name of this process.
    """

    study: optuna.Study
    config: SearchConfig
    document: dict[str, Any]
    worker: str
    _seen: dict[int, tuple[int, float]] = field(default_factory=dict)
    _finished: dict[int, Trial | None] = field(default_factory=dict)
    _waits: dict[int, Trial | None] = field(default_factory=dict)

    def all(self) -> list[Trial]:
        """Return every slot's trial: the finished one, else the running, else the waiting; slots in order."""
        rank = {DONE: 0, STOPPED: 0, IMPOSSIBLE: 0, "running": 1, "waiting": 2, LOST: 3}
        best: dict[int, Trial] = {}
        for frozen in self.study.get_trials(deepcopy=False):
            if frozen.state.name == "WAITING":
                trial = self._waits.get(frozen.number)
                if trial is None:
                    trial = self._waits[frozen.number] = _trial_of(frozen)
            elif frozen.number not in self._finished:
                trial = _trial_of(frozen)
                if frozen.state.is_finished():
                    self._finished[frozen.number] = trial  # it never changes again
            else:
                trial = self._finished[frozen.number]
            if trial is None:
                continue
            known = best.get(trial.slot)
            if known is None or rank[trial.state] < rank[known.state]:
                best[trial.slot] = trial
        return [best[slot] for slot in sorted(best)]

    @property
    def stopping(self) -> bool:
        """Whether somebody asked all workers to stop."""
        return bool(self.study.user_attrs.get("stop"))

    def stop(self, asked: bool) -> None:
        """Ask all workers to stop after their stage, or let them go on."""
        self.study.set_user_attr("stop", asked)

    def claim(self) -> Lease | None:
        """Return a trial for this worker, or None when no slot waits and none is lost."""
        self.rescue()
        space = dimensions(self.document["search"]["space"])
        while any("slot" in t.user_attrs for t in self._waiting()):
            asked = self.study.ask()
            attrs = asked.user_attrs
            if "slot" not in attrs:  # the last waiting one went to somebody else in between
                self._drop(asked.number)
                continue
            elder = [
                t
                for t in self.study.get_trials(deepcopy=False)
                if t.user_attrs.get("slot") == attrs["slot"] and t.number != asked.number
            ]
            if any(_done(t) or (_running(t) and t.number < asked.number) for t in elder):
                self._drop(asked.number)
                continue
            choices = {name: _suggest(asked, name, dimension) for name, dimension in space.items()}
            lease = Lease(
                self, asked._trial_id, Trial(attrs["slot"], asked.number, choices, bool(attrs.get("anchor")), "running")
            )
            lease.beat()
            return lease
        return None

    def rescue(self) -> list[int]:
        """Queue again the slots whose worker gives no sign of life; return them."""
        import optuna

        now = time.monotonic()
        rescued = []
        everything = self.study.get_trials(deepcopy=False)
        for frozen in everything:
            if not _running(frozen):
                continue
            lease = frozen.user_attrs.get("lease") or {}
            beat = int(lease.get("beat", 0))
            known = self._seen.get(frozen.number)
            if known is None or known[0] != beat:
                self._seen[frozen.number] = (beat, now)
                known = self._seen[frozen.number]
            silent = now - known[1] > self.config.lease_s
            if not (silent or _dead_here(lease)) or lease.get("worker") == self.worker:
                continue
            try:
                self.study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)
            except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
                continue  # it came back, or another worker was first
            if "slot" in frozen.user_attrs:
                self._queue_again(frozen)
                rescued.append(int(frozen.user_attrs["slot"]))
        if self._waiting():
            return rescued  # there is work; whether a slot was forgotten is looked at when there is none
        slots = {t.user_attrs["slot"] for t in everything if "slot" in t.user_attrs}
        alive = {
            t.user_attrs["slot"]
            for t in self.study.get_trials(deepcopy=False)
            if "slot" in t.user_attrs and (_done(t) or not t.state.is_finished())
        }
        for slot in sorted(slots - alive):  # a rescuer died between its two steps
            last = max((t for t in everything if t.user_attrs.get("slot") == slot), key=lambda t: t.number)
            self._queue_again(last)
            rescued.append(slot)
        return rescued

    def _queue_again(self, frozen: Any) -> None:
        keep = {k: v for k, v in frozen.user_attrs.items() if k in ("slot", "anchor")}
        self.study.enqueue_trial(_choices_of(frozen), user_attrs=keep | {"again": frozen.number})

    def _waiting(self) -> list[Any]:
        import optuna

        return self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))

    def _drop(self, number: int) -> None:
        import optuna

        with contextlib.suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):
            self.study.tell(number, state=optuna.trial.TrialState.FAIL)


def _end(frozen: Any) -> dict[str, str]:
    return frozen.user_attrs.get("end") or {}


def _done(frozen: Any) -> bool:
    return frozen.state.is_finished() and _end(frozen).get("state") in (DONE, STOPPED, IMPOSSIBLE)


def _running(frozen: Any) -> bool:
    return bool(frozen.state.name == "RUNNING")


def _dead_here(lease: Mapping[str, Any]) -> bool:
    """Whether a lease is of a process of this machine that is no longer there."""
    if lease.get("host") != socket.gethostname() or not isinstance(lease.get("pid"), int) or os.name == "nt":
        return False
    try:
        os.kill(lease["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _trial_of(frozen: Any) -> Trial | None:
    attrs = frozen.user_attrs
    if "slot" not in attrs:
        return None
    lease = attrs.get("lease") or {}
    unfinished = LOST if frozen.state.is_finished() else frozen.state.name.lower()
    state = _end(frozen)["state"] if _done(frozen) else unfinished
    answers = [Answer.model_validate_json(v) for k, v in attrs.items() if k.startswith("rung:")]
    choices = {k: _decoded(v) for k, v in _choices_of(frozen).items()}
    return Trial(
        slot=int(attrs["slot"]),
        number=frozen.number,
        choices=choices,
        anchor=bool(attrs.get("anchor")),
        state=state,
        answers=tuple(sorted(answers, key=lambda a: RUNGS.index(a.rung))),
        reason=_end(frozen).get("reason", ""),
        worker=str(lease.get("worker", "")),
        folder=str(lease.get("folder", "")),
    )


def _choices_of(frozen: Any) -> dict[str, Any]:
    """Return the choices of a trial, made or queued, as they are stored."""
    return {**frozen.system_attrs.get("fixed_params", {}), **frozen.params}


_JSON = "json:"


def _encoded(value: Any) -> Any:
    """Return a choice as Optuna stores it: numbers, texts and truth values as they are, the rest as JSON."""
    return value if value is None or isinstance(value, bool | int | float | str) else _JSON + json.dumps(value, sort_keys=True)


def _decoded(value: Any) -> Any:
    return json.loads(value.removeprefix(_JSON)) if isinstance(value, str) and value.startswith(_JSON) else value


def _suggest(trial: Any, name: str, dimension: Any) -> Any:
    if isinstance(dimension, Range):
        return trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log, step=dimension.step)
    return _decoded(trial.suggest_categorical(name, [_encoded(v) for v in dimension]))


class _JournalLock:
    """A lock of the journal that the system frees with its holder; repairs a line that a crash or a full disk cut."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._lock = FileLock(journal.with_name(journal.name + ".lock"))
        self._stack = contextlib.ExitStack()

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._stack.enter_context(self._lock.held())
        with self._journal.open("r+b") as f:
            size = f.seek(0, os.SEEK_END)
            if size:
                f.seek(size - 1)
                if f.read(1) != b"\n":
                    f.seek(max(0, size - (1 << 20)))
                    tail = f.read()
                    f.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Give it back."""
        self._stack.close()


def storage_of(address: str) -> Any:
    """Return Optuna's storage at a folder or a database's URL.

    Raises:
        ToolMissing: Optuna or the database's driver is not installed.
        EnvironmentFailed: The database cannot be reached.
        BadInput: The address is malformed.
    """
    try:
        import optuna
    except ModuleNotFoundError as e:
        raise ToolMissing("optuna is not installed", remedy="pip install 'rescompress[search]'") from e

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if "://" not in address:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        journal = Path(address) / JOURNAL
        lock: Any = _JournalLock(journal)  # duck-typed: Optuna wants acquire and release
        return JournalStorage(JournalFileBackend(str(journal), lock))
    scheme, _, rest = address.partition("://")
    if scheme in ("postgresql", "postgres"):
        address = f"postgresql+psycopg://{rest}"
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError

    try:
        return optuna.storages.RDBStorage(address, engine_kwargs={"pool_pre_ping": True, "pool_size": 2})
    except (ModuleNotFoundError, NoSuchModuleError, ImportError) as e:
        raise ToolMissing(f"no driver for {scheme}: {e}", where="--storage", remedy="pip install 'rescompress[search]'") from e
    except ArgumentError as e:
        raise BadInput("is no address of a storage", where=_hidden(address), remedy="write postgresql://USER@HOST/NAME") from e
    except OperationalError as e:
        reason = str(e.orig).strip().splitlines()[0] if e.orig else str(e)
        raise EnvironmentFailed(f"cannot be reached: {reason}", where=_hidden(address), remedy="check host, port, name") from e


def _hidden(address: str) -> str:
    """Return an address without its password."""
    scheme, _, rest = address.partition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}://{user.partition(':')[0]}{at}{host}"


def create(storage: Any, name: str, document: Mapping[str, Any], seed: int, queue: Sequence[Mapping[str, Any]]) -> Trials:
    """Return the search `name` of a storage, begun if it is new, joined if it is of the same config.

    Args:
        storage: Optuna's.
        name: Of the search.
        document: The run's config as JSON values, with its ``search`` section.
        seed: Of the sampler.
        queue: Choices of the candidates to try first.

    Raises:
        BadInput: The storage holds a search of that name with another config.
    """
    import optuna

    config = SearchConfig.model_validate(document["search"])
    direction = optuna.study.StudyDirection
    directions = [direction.MAXIMIZE, *[direction.MINIMIZE] * len(config.objectives)]
    study = optuna.create_study(
        storage=storage, study_name=name, directions=directions, load_if_exists=True, sampler=_sampler(config, seed)
    )
    if "document" not in study.user_attrs:
        study.set_user_attr("layout", LAYOUT)
        study.set_user_attr("version", _version())
        study.set_user_attr("document", json.dumps(document))
    known_document = json.loads(study.user_attrs["document"])
    if _comparable(known_document) != _comparable(document):
        raise BadInput("holds a search of another config", where=name, remedy="name another folder with -o, or another --name")
    if config.trials > known_document["search"]["trials"]:  # a search may be made longer
        study.set_user_attr("document", json.dumps(document))
    trials = joined(study, seed)
    known = {t.user_attrs["slot"] for t in study.get_trials(deepcopy=False) if "slot" in t.user_attrs}
    for slot in range(config.trials):
        if slot not in known:
            first = slot < len(queue)
            choices = {k: _encoded(v) for k, v in queue[slot].items()} if first else {}
            study.enqueue_trial(choices, user_attrs={"slot": slot} | ({"anchor": True} if first else {}))
    return trials


def _comparable(document: Mapping[str, Any]) -> Any:
    """Return what must be the same when a search goes on: everything but how many candidates it tries."""
    made = json.loads(json.dumps(document))
    made["search"].pop("trials", None)
    return made


def join(storage: Any, name: str | None, seed: int = 0) -> Trials:
    """Return the search of a storage, for a worker or a reader.

    Raises:
        BadInput: There is none, there are several and none is named, or it is of another version.
    """
    import optuna

    names = [s.study_name for s in storage.get_all_studies()]
    if not names:
        raise BadInput("holds no search", where=name, remedy="begin one with `rescompress search CONFIG.yaml`")
    if name is None and len(names) > 1:
        raise BadInput(f"holds several searches: {', '.join(names)}", remedy="choose one with --name")
    if name is not None and name not in names:
        raise BadInput(f"holds no search '{name}'", remedy=f"name one of {', '.join(names)}")
    return joined(optuna.load_study(study_name=name or names[0], storage=storage), seed)


def joined(study: Any, seed: int) -> Trials:
    """Return the trials of a study, with a sampler of this worker's own seed.

    Raises:
        BadInput: The study is not a search of ours, or of another version.
    """
    attrs = study.user_attrs
    if "document" not in attrs:
        raise BadInput("is a study of something else", where=study.study_name, remedy="name another with --name")
    if attrs.get("layout") != LAYOUT or attrs.get("version") != _version():
        raise BadInput(
            f"was begun by version {attrs.get('version')}, this is {_version()}",
            where=study.study_name,
            remedy="use the same version on all machines, or begin another search",
        )
    document = json.loads(attrs["document"])
    config = SearchConfig.model_validate(document["search"])
    worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    study.sampler = _sampler(config, seed)
    return Trials(study, config, document, worker)


def _sampler(config: SearchConfig, seed: int) -> Any:
    import optuna

    if config.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=10)


def _version() -> str:
    from importlib.metadata import version

    return version("rescompress")


@contextlib.contextmanager
def beating(lease: Lease, every_s: float) -> Iterator[None]:
    """Give signs of life from a thread of its own while the work goes on."""
    import threading

    over = threading.Event()

    def loop() -> None:
        while not over.wait(every_s):
            with contextlib.suppress(Exception):  # the storage may be away for a while; the lease outlasts some beats
                lease.beat()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=5)
