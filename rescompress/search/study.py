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
import copy
import dataclasses
import functools
import json
import math
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
from rescompress.core.outcomes import Outcomes
from rescompress.core.spec import Frozen
from rescompress.runs.search_settings import RUNGS, Range, Rung, SearchConfig, dimensions

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
_RANK = {DONE: 0, STOPPED: 0, IMPOSSIBLE: 0, "running": 1, "waiting": 2, LOST: 3}

_FINAL = "final:"

AHEAD = 16
"""Slots that are queued at a time: what waits is read again and again, so a long search is not queued whole."""

FRESH_S = 1.0
"""What others did is read again after so long: a database answers in round trips, and cheap rungs take less than one."""


class Answer(Frozen):
    """What one rung said of a candidate.

    Attributes:
        rung: Which.
        accuracy: On the held-out training images (a fraction), None where the rung measures none.
        sureness: Geometric mean of the probability of the right class there; it decides among equal accuracies.
        costs: By objective, in its unit.
        band: Lower and upper end of a cost that was measured or predicted.
        error: Summed error of the pruning curves, where the rung knows no accuracy.
        network: Digest of everything that decides what the candidate becomes, where the rung knows it; empty where not. Two of
            one digest are one network, however their budgets were written.
        outcomes: Which held-out images were right.
        seconds: It took.
        verdict: Why the candidate climbs or stops here.
    """

    rung: Rung
    accuracy: float | None = None
    sureness: float | None = None
    costs: dict[str, float]
    band: dict[str, tuple[float, float]] = Field(default_factory=dict)
    error: float | None = None
    network: str = ""
    outcomes: Outcomes | None = None
    seconds: float = 0.0
    verdict: str = ""

    @property
    def quality(self) -> float:
        """What the rung has for accuracy: the accuracy, or less the summed error of the curves.

        Images that candidates are judged by may be too easy to tell them apart. So the sureness counts, too, as less than
        one image: it never outweighs an accuracy, and orders those that are equal.
        """
        if self.accuracy is None:
            return -(self.error or 0.0)
        if self.sureness is None or self.outcomes is None:
            return self.accuracy
        return self.accuracy + self.sureness / (self.outcomes.n + 1)


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
        lease = {"worker": self.trials.worker, "pid": os.getpid(), "host": _host(), "beat": self.beats}
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

    def finish(self, state: str, reason: str = "", lesson: Sequence[float] = ()) -> bool:
        """End the trial; return whether it was still ours to end.

        Args:
            state: How it ended.
            reason: Why.
            lesson: What the sampler is told in the place of what the last rung measured: quality, then the costs. From nothing
                it would learn nothing, and propose the like again.
        """
        import optuna

        best = self.trial.answers[-1] if self.trial.answers else None
        try:
            self.note("end", {"state": state, "reason": reason})
            values = list(lesson) or None
            if values is None and best is not None and best.accuracy is not None:
                values = [best.quality, *(best.costs[c] for c in self.trials.config.objectives)]
            ended = optuna.trial.TrialState.FAIL if values is None else optuna.trial.TrialState.COMPLETE
            patiently(lambda: self.trials.study._storage.set_trial_state_values(self.trial_id, ended, values))
            self.trials._mine[self.trial.slot] = dataclasses.replace(self.trial, state=state, reason=reason)
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
    _settled: dict[int, Trial] = field(default_factory=dict)
    _waits: dict[int, Trial] = field(default_factory=dict)
    _numbers: dict[int, list[int]] = field(default_factory=dict)
    _open: list[int] = field(default_factory=list)
    _read: int = 0
    _rescue_at: float = -math.inf
    _known: list[Any] = field(default_factory=list)
    _taken: set[int] = field(default_factory=set)
    _mine: dict[int, Trial] = field(default_factory=dict)
    _known_at: float = -math.inf
    _stop: bool = False
    _stop_at: float = -math.inf

    def recent(self) -> list[Trial]:
        """Return what `all` does without slots that nobody queued yet; of others as it was a moment ago at most."""
        if not self._fresh:
            self.everything()
        return [self._mine.get(slot, trial) for slot, trial in sorted(self._by_slot(self._known).items())]

    @property
    def _fresh(self) -> bool:
        return time.monotonic() < self._known_at + FRESH_S

    def all(self) -> list[Trial]:
        """Return every slot's trial: the finished one, else the running, else the waiting; slots in order."""
        found = self._by_slot(self.everything())
        slots = max(self.config.trials, 1 + max(found, default=-1))
        return [found.get(slot) or Trial(slot, -1, {}, False, "waiting") for slot in range(slots)]

    def _by_slot(self, everything: Sequence[Any]) -> dict[int, Trial]:
        unsettled = self._unsettled(everything)
        found = {**self._settled}
        for frozen in unsettled:
            trial = self._waits.get(frozen.number) if frozen.state.name == "WAITING" else _trial_of(frozen)
            if trial is None and (trial := _trial_of(frozen)) is None:
                continue
            if trial.state == "waiting":
                self._waits[frozen.number] = trial
            known = found.get(trial.slot)
            if known is None or _RANK[trial.state] < _RANK[known.state]:
                found[trial.slot] = trial
        return found

    def everything(self) -> list[Any]:
        """Return Optuna's trials, by number."""
        self._known = self.study.get_trials(deepcopy=False)
        self._known_at = time.monotonic()
        self._taken.clear()  # what was read holds what this worker did before
        self._mine.clear()
        return self._known

    def _unsettled(self, everything: Sequence[Any]) -> list[Any]:
        """Return the trials that have not ended; those that have are taken in once, as they never change again."""
        still = []
        for number in [*self._open, *range(self._read, len(everything))]:
            frozen = everything[number]
            if number >= self._read and "slot" in frozen.user_attrs:
                self._numbers.setdefault(int(frozen.user_attrs["slot"]), []).append(number)
            if not frozen.state.is_finished():
                still.append(frozen)
            elif (trial := _trial_of(frozen)) is not None:
                known = self._settled.get(trial.slot)
                if known is None or _RANK[trial.state] < _RANK[known.state]:
                    self._settled[trial.slot] = trial
        self._open = [frozen.number for frozen in still]
        self._read = max(self._read, len(everything))
        return still

    @property
    def final(self) -> dict[str, Any]:
        """What the evaluation split said at the end: of ``dense``, and of networks of the front by their slot."""
        attrs = self.study.user_attrs
        return {k.removeprefix(_FINAL): v for k, v in attrs.items() if k.startswith(_FINAL)}

    def conclude(self, name: str, found: Mapping[str, Any]) -> None:
        """Keep what the evaluation split said of one network; each has an entry of its own, as several workers may conclude."""
        patiently(lambda: self.study.set_user_attr(_FINAL + name, found))

    @property
    def stopping(self) -> bool:
        """Whether somebody asked all workers to stop, as it was a moment ago at most."""
        if time.monotonic() >= self._stop_at + FRESH_S:
            self._stop = bool(self.study.user_attrs.get("stop"))
            self._stop_at = time.monotonic()
        return self._stop

    def stop(self, asked: bool) -> None:
        """Ask all workers to stop after their stage, or let them go on."""
        self.study.set_user_attr("stop", asked)
        self._stop_at = -math.inf

    def claim(self) -> Lease | None:
        """Return a trial for this worker, or None when no slot waits and none is lost."""
        if time.monotonic() >= self._rescue_at:
            self.rescue()
        while True:
            waiting = self._ahead()
            if not waiting and not self.rescue():
                return None
            for frozen in waiting:
                if (lease := self._take(frozen)) is not None:
                    return lease

    def _take(self, frozen: Any) -> Lease | None:
        """Return a claim on a waiting trial, or None where another worker has it, or another trial its slot.

        Trials are taken by number. So an elder trial of the slot that was seen waiting a moment ago is in somebody's hands.
        """
        import optuna

        again = bool(self._taken)
        self._taken.add(frozen.number)
        try:
            if not self.study._storage.set_trial_state_values(frozen._trial_id, optuna.trial.TrialState.RUNNING):
                return None
        except optuna.exceptions.UpdateFinishedTrialError:
            return None
        attrs = frozen.user_attrs
        others = [self._known[n] for n in self._numbers[attrs["slot"]] if n != frozen.number]
        if any(_done(t) or (t.number < frozen.number and not t.state.is_finished()) for t in others):
            self._abandon(frozen)
            return None
        # what the sampler learns from: not read again where it was read just now
        self.study._thread_local.cached_all_trials = None if again else self._known
        trial = Trial(attrs["slot"], frozen.number, self._chosen(frozen), bool(attrs.get("anchor")), "running")
        return Lease(self, frozen._trial_id, trial)

    def _chosen(self, frozen: Any) -> dict[str, Any]:
        """Return the choices of a trial, those it was queued with and sampled ones, and keep them.

        Optuna's `Trial` does the same, and reads the trial again for it: six round trips to a database.
        """
        study, sampler = self.study, self.study.sampler
        trial = copy.copy(frozen)
        given = trial.system_attrs.get("fixed_params", {})
        sampler.before_trial(study, trial)
        joint: dict[str, Any] | None = None
        found = {}
        for name, dimension in dimensions(self.document["search"]["space"]).items():
            distribution = _distribution(dimension)
            if name in given:
                value = given[name]
            elif distribution.single():
                value = distribution.low if isinstance(dimension, Range) else distribution.choices[0]
            else:
                if joint is None:
                    joint = sampler.sample_relative(study, trial, sampler.infer_relative_search_space(study, trial))
                value = joint[name] if name in joint else sampler.sample_independent(study, trial, name, distribution)
            study._storage.set_trial_param(frozen._trial_id, name, distribution.to_internal_repr(value), distribution)
            trial.params = {**trial.params, name: value}
            found[name] = _decoded(value)
        return found

    def _ahead(self) -> list[Any]:
        """Return the trials that wait, by number; where few do, the next slots are queued.

        A slot that two workers queue at the same time counts once, like one that is rescued twice.
        """
        if self._fresh and len(known := self._waiting()) > AHEAD // 2:
            return known
        self.everything()
        waiting = self._waiting()
        first = 1 + max(self._numbers, default=-1)
        if len(waiting) < AHEAD // 2 and first < self.config.trials:
            for slot in range(first, min(first + AHEAD, self.config.trials)):
                self.study.enqueue_trial({}, user_attrs={"slot": slot})
            self.everything()
            waiting = self._waiting()
        return waiting

    def _waiting(self) -> list[Any]:
        """Return what was seen waiting and this worker has not tried to take, by number."""
        known = self._unsettled(self._known)
        return [t for t in known if t.state.name == "WAITING" and "slot" in t.user_attrs and t.number not in self._taken]

    def rescue(self) -> list[int]:
        """Queue again the slots whose worker gives no sign of life; return them."""
        now = time.monotonic()
        self._rescue_at = now + min(self.config.lease_s / 4, 5.0)
        rescued = []
        everything = self.everything()
        unsettled = self._unsettled(everything)
        for frozen in unsettled:
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
            if not self._abandon(frozen):
                continue  # it came back, or another worker was first
            if "slot" in frozen.user_attrs:
                self._queue_again(frozen)
                rescued.append(int(frozen.user_attrs["slot"]))
        if any(t.state.name == "WAITING" for t in unsettled):
            return rescued  # there is work; whether a slot was forgotten is looked at when there is none
        everything = self.everything()
        alive = {int(t.user_attrs["slot"]) for t in self._unsettled(everything) if "slot" in t.user_attrs}
        for slot, trial in sorted(self._settled.items()):  # a rescuer died between its two steps
            if not trial.finished and slot not in alive:
                self._queue_again(everything[max(self._numbers[slot])])
                rescued.append(slot)
        return rescued

    def _queue_again(self, frozen: Any) -> None:
        keep = {k: v for k, v in frozen.user_attrs.items() if k in ("slot", "anchor")}
        self.study.enqueue_trial(_choices_of(frozen), user_attrs=keep | {"again": frozen.number})

    def _abandon(self, frozen: Any) -> bool:
        """End a trial that came to nothing; return whether it had not ended."""
        import optuna

        try:
            return self.study._storage.set_trial_state_values(frozen._trial_id, optuna.trial.TrialState.FAIL)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False


def _end(frozen: Any) -> dict[str, str]:
    return frozen.user_attrs.get("end") or {}


def _done(frozen: Any) -> bool:
    return frozen.state.is_finished() and _end(frozen).get("state") in (DONE, STOPPED, IMPOSSIBLE)


def _running(frozen: Any) -> bool:
    return bool(frozen.state.name == "RUNNING")


@functools.cache
def _host() -> str:
    """Return what tells this machine, since it started, from all others; a container has process numbers of its own."""
    known = [socket.gethostname()]
    with contextlib.suppress(OSError):
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError):
        known.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(known)


def _dead_here(lease: Mapping[str, Any]) -> bool:
    """Whether a lease is of a process of this machine that is no longer there."""
    if lease.get("host") != _host() or not isinstance(lease.get("pid"), int) or os.name == "nt":
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


def _distribution(dimension: Any) -> Any:
    import optuna

    if isinstance(dimension, Range):
        return optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log, step=dimension.step)
    return optuna.distributions.CategoricalDistribution([_encoded(v) for v in dimension])


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
        from rescompress.search.journal import journal_storage

        try:
            return journal_storage(Path(address) / JOURNAL)
        except OSError as e:
            raise EnvironmentFailed(
                f"cannot be opened: {e.strerror or e}",
                where=str(Path(address) / JOURNAL),
                remedy="check the folder and its rights",
            ) from e
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            raise BadInput(
                "is damaged, or no journal of a search",
                where=str(Path(address) / JOURNAL),
                remedy="restore it, or begin another search in another folder",
            ) from e
    scheme, _, rest = address.partition("://")
    shown = hidden(address)
    if scheme == "grpc":
        return _proxy(rest)
    if scheme in ("postgresql", "postgres"):
        address = f"postgresql+psycopg://{rest}"
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    try:
        from rescompress.search.database import Database

        return Database(address, engine_kwargs={"pool_size": 2})
    except (ModuleNotFoundError, NoSuchModuleError, ImportError) as e:
        ours = scheme in ("postgresql", "postgres")
        remedy = (
            "pip install 'rescompress[search]'"
            if ours
            else "write postgresql://USER@HOST/NAME, or install what SQLAlchemy needs"
        )
        raise ToolMissing(f"no driver for {scheme}: {e}", where="--storage", remedy=remedy) from e
    except (ArgumentError, ValueError) as e:
        raise BadInput("is no address of a storage", where=shown, remedy="write postgresql://USER@HOST/NAME") from e
    except SQLAlchemyError as e:
        reason = str(getattr(e, "orig", None) or e).strip().splitlines()[0]
        raise EnvironmentFailed(f"cannot be reached: {reason}", where=shown, remedy="check host, port, name") from e
    except RuntimeError as e:  # tables of another version of Optuna
        raise BadInput(str(e).strip().splitlines()[0], where=shown, remedy="use another database") from e


def _proxy(rest: str) -> Any:
    """Return the storage behind an Optuna server, ``HOST:PORT``.

    Raises:
        ToolMissing: The package grpcio is not installed.
        BadInput: It is no host and port.
    """
    import importlib.util

    import optuna

    host, colon, port = rest.rstrip("/").rpartition(":")
    if not (colon and host and port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise BadInput("is no address of a storage", where=f"grpc://{rest}", remedy="write grpc://HOST:PORT")
    if importlib.util.find_spec("grpc") is None:
        raise ToolMissing(
            "no driver for grpc: grpcio is not installed", where="--storage", remedy="pip install grpcio protobuf"
        )
    return optuna.storages.GrpcStorageProxy(host=host, port=int(port))


def hidden(address: str) -> str:
    """Return an address without its password."""
    scheme, colon, rest = address.partition("://")
    if not colon:
        return address
    user, at, host = rest.rpartition("@")
    return f"{scheme}://{user.partition(':')[0]}{at}{host}"


def create(
    storage: Any,
    name: str,
    document: Mapping[str, Any],
    seed: int,
    queue: Sequence[Mapping[str, Any]],
    *,
    anchored: int | None = None,
) -> Trials:
    """Return the search `name` of a storage, begun if it is new, joined if it is of the same config.

    Args:
        storage: Optuna's.
        name: Of the search.
        document: The run's config as JSON values, with its ``search`` section.
        seed: Of the sampler.
        queue: Choices of the candidates to try first.
        anchored: How many of them climb every rung; all where it is None.

    Raises:
        BadInput: The storage holds a search of that name with another config.
    """
    import optuna

    config = SearchConfig.model_validate(document["search"])
    anchored = len(queue) if anchored is None else anchored
    direction = optuna.study.StudyDirection
    directions = [direction.MAXIMIZE, *[direction.MINIMIZE] * len(config.objectives)]
    study = optuna.create_study(
        storage=storage, study_name=name, directions=directions, load_if_exists=True, sampler=_sampler(config, seed)
    )
    if "document" not in study.user_attrs:
        if (
            study.directions != directions
            or study.user_attrs.keys() - {"layout", "version"}
            or study.get_trials(deepcopy=False)
        ):
            raise BadInput("is a study of something else", where=name, remedy="name another with --name")
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
    for slot, choices in enumerate(queue[: config.trials]):
        if slot not in known:
            encoded = {k: _encoded(v) for k, v in choices.items()}
            study.enqueue_trial(encoded, user_attrs={"slot": slot} | ({"anchor": True} if slot < anchored else {}))
    return trials


def _comparable(document: Mapping[str, Any]) -> Any:
    """Return what must be the same when a search goes on: everything but how many candidates it tries."""
    made = json.loads(json.dumps(document))
    made["search"].pop("trials", None)
    return made


def names_in(storage: Any) -> list[str]:
    """Return the names of the studies of a storage."""
    return [s.study_name for s in storage.get_all_studies()]


def join(storage: Any, name: str | None, seed: int = 0, *, where: str | None = None) -> Trials:
    """Return the search of a storage, for a worker or a reader.

    Raises:
        BadInput: There is none, there are several and none is named, or it is of another version.
    """
    import optuna

    names = names_in(storage)
    if not names:
        where = None if where is None else hidden(where)
        raise BadInput("holds no search", where=where, remedy="begin one with `rescompress search CONFIG.yaml`")
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
