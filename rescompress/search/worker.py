"""A worker: takes candidates, lets each climb the ladder, and reads the evaluation split once, for the final front."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import random
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rescompress.core.artifact import Artifact, make_folder, write_text
from rescompress.core.details import DenseDetails, Details, TrialDetails
from rescompress.core.errors import BadInput, ConfigError, RescompressError
from rescompress.core.evidence import load_sound
from rescompress.core.locks import FileLock
from rescompress.core.manifest import MANIFEST_NAME, Manifest, StageResult, load_manifest
from rescompress.core.metric import Metric, accuracy
from rescompress.core.outcomes import Outcomes
from rescompress.runs.claims import SEARCH_MARK
from rescompress.runs.config import RunConfig, validate
from rescompress.runs.fingerprint import environment
from rescompress.runs.reporter import Reporter, Silent
from rescompress.runs.search_settings import BUDGET, RUNGS, Range, Rung, candidate, dimensions
from rescompress.runs.settings import Settings
from rescompress.runs.stage import Opening
from rescompress.runs.store import Store
from rescompress.search.front import Point, front, good_enough, unjudged
from rescompress.search.ladder import climbs, guessed, hopeless, latest, twin
from rescompress.search.study import (
    DONE,
    IMPOSSIBLE,
    JOURNAL,
    STOPPED,
    Answer,
    Lease,
    Trial,
    Trials,
    beating,
    hidden,
    patiently,
)

if TYPE_CHECKING:
    from edge_targets.device import Target

BEAT_S = 10.0
"""Seconds between signs of life."""
_IDLE_S = 1.0
DEFAULT_MARGIN = 0.01
"""Drop of accuracy that is good enough where nobody says another, a fraction."""


class Judge(Protocol):
    """What answers for a candidate on a rung."""

    def rungs(self) -> tuple[Rung, ...]:
        """Return the rungs that this search has, cheapest first."""
        ...

    def answer(self, rung: Rung, choices: Mapping[str, Any], folder: Path) -> Answer:
        """Return what a rung says; work that is stored in `folder` already is not repeated."""
        ...


@dataclass(frozen=True)
class Tally:
    """What a worker did.

    Attributes:
        finished: Candidates by how they ended.
    """

    finished: dict[str, int] = field(default_factory=dict)


def work(
    trials: Trials,
    judge: Judge,
    folder: Path,
    *,
    told: Callable[[str], None] = lambda text: None,
    until: float | None = None,
    beat_s: float = BEAT_S,
) -> Tally:
    """Take candidates until none is left, the time is over, or somebody asked to stop.

    Args:
        trials: Of the search.
        judge: Answers for the candidates.
        folder: Where the runs of the candidates lie, one folder a slot.
        told: Takes a line per event.
        until: Clock (`time.monotonic`) after which no candidate is begun.
        beat_s: Seconds between signs of life.
    """
    tally = Tally()
    while not patiently(lambda: trials.stopping) and (until is None or time.monotonic() < until):
        lease = patiently(trials.claim)
        if lease is None:
            if all(t.finished for t in patiently(trials.all)):
                break  # nothing waits, and nobody is at work
            time.sleep(min(_IDLE_S, beat_s) * (0.5 + random.random()))  # others are at work: one of them may die
            continue
        with beating(lease, beat_s), _own_folder(folder, lease) as place:
            end = _climb(trials, lease, judge, place, told)
        if end is None:
            break  # asked to stop: the trial is left to whoever goes on
        if lease.finish(end.state, end.reason, end.lesson):
            tally.finished[end.state] = tally.finished.get(end.state, 0) + 1
            told(f"trial {lease.trial.slot}: {end.reason}")
    return tally


@dataclass(frozen=True)
class _End:
    """How a candidate ended, why, and what the sampler hears in the place of what the last rung measured, if anything."""

    state: str
    reason: str
    lesson: Sequence[float] = ()


@contextlib.contextmanager
def _own_folder(folder: Path, lease: Lease) -> Iterator[Path]:
    """Hold the folder of a slot's run; where one who was taken for dead still holds it, one of this attempt's own."""
    place = folder / f"{lease.trial.slot:05d}"
    make_folder(place)
    with FileLock(place / ".search").held(wait=False) as mine:
        if mine:
            yield place
            return
    other = folder / f"{lease.trial.slot:05d}-{lease.trial.number}"
    make_folder(other)
    yield other


def _climb(trials: Trials, lease: Lease, judge: Judge, folder: Path, told: Callable[[str], None]) -> _End | None:
    """Let one candidate climb; return how it ended, or None where the worker was asked to stop."""
    objectives = trials.config.objectives
    lease.folder = f"{socket.gethostname()}:{folder.resolve()}"
    patiently(lease.beat)
    for rung in judge.rungs():
        if patiently(lambda: trials.stopping):
            return None
        start = time.monotonic()
        try:
            answer = judge.answer(rung, lease.trial.choices, folder)
        except BadInput as e:  # a budget that no network meets, a scope without channels: this candidate, not the search
            return _End(IMPOSSIBLE, str(e), hopeless(patiently(trials.recent), objectives))
        lesson: Sequence[float] = ()
        if lease.trial.anchor or rung == judge.rungs()[-1]:
            up, verdict = True, "an anchor climbs every rung" if lease.trial.anchor else "the top"
        else:
            others = patiently(trials.recent)
            same = twin(lease.trial, answer, others)
            if same is not None:
                up, verdict = False, f"stops: it would be the network of trial {same.slot}"
                lesson = hopeless(others, objectives)
            else:
                up, verdict = climbs(answer, latest(others, rung, besides=lease.trial.slot), trials.config.eta)
                if not up and answer.accuracy is None:
                    lesson = guessed(answer, others, objectives)
        lease.record(answer.model_copy(update={"seconds": time.monotonic() - start, "verdict": verdict}))
        told(f"trial {lease.trial.slot}: {_words(answer)}  {verdict}")
        if not up:
            return _End(STOPPED, f"{rung}: {verdict}", lesson)
    return _End(DONE, "reached the top")


def _words(answer: Answer) -> str:
    words: list[str] = [answer.rung]
    if answer.accuracy is not None:
        words.append(f"{100 * answer.accuracy:.2f} %")
    return "  ".join([*words, *(f"{name} {value:.4g}" for name, value in answer.costs.items())])


@dataclass
class Pipeline:
    """Answers by running the pipeline: every candidate is an ordinary run's config.

    Attributes:
        document: The search's config as JSON values, paths absolute.
        settings: Of the run; candidates are judged on held-out training images.
        store: Stages that candidates share.
        reporter: Where progress goes.
    """

    document: dict[str, Any]
    settings: Settings
    store: Store
    reporter: Reporter = field(default_factory=Silent)
    _held_out: tuple[str, tuple[Outcomes, float]] | None = None

    def identity(self) -> dict[str, Any]:
        """Return the content that all workers of a search must have: checkpoint and data, wherever they lie.

        Raises:
            BadInput: One of them is not here.
        """
        from rescompress.runs.fingerprint import file_identity

        opening = Opening(Path(self.document["checkpoint"])).fetched()
        return {"checkpoint": file_identity(str(opening.path)), "data": self.settings.data_identity}

    def rungs(self) -> tuple[Rung, ...]:
        """Return the rungs that mean something for this config: no training, no rung for it; no runtime here, no measuring."""
        asked = self.document["search"]["rungs"]
        trains = bool(self.document.get("finetune"))
        without: list[Rung] = [] if trains else ["short"]
        if not self.document["search"]["boards"] and not self._measured_here():
            without.append("measure")
        return tuple(r for r in RUNGS if r in asked and r not in without)

    def _measured_here(self) -> bool:
        return any(t.builds_here and not t.device.modes for t in self._targets())

    def _modelled(self) -> Target | None:
        """Return the first target with a latency model: the one that boards are."""
        return next((t for t in self._targets() if t.device.modes), None)

    def config(self, choices: Mapping[str, Any]) -> RunConfig:
        """Return the config of a candidate.

        Raises:
            ConfigError: The choices make none.
        """
        return validate(candidate(self.document, choices), "search.space")

    def answer(self, rung: Rung, choices: Mapping[str, Any], folder: Path) -> Answer:
        """Return what a rung says."""
        config = self.config(choices)
        if rung == "predict":
            return self._predicted(config)
        chosen = self._at(rung, config)
        make_folder(folder)
        write_text(folder / "config.json", json.dumps(config.model_dump(mode="json", exclude={"search"}), indent=1) + "\n")
        manifest = self._run(chosen, folder, targets=rung == "measure")
        return self._answer(rung, manifest, folder, chosen)

    def _at(self, rung: Rung, config: RunConfig) -> RunConfig:
        """Return the config as far as a rung goes."""
        if rung in ("full", "measure"):
            return config
        share = self.document["search"]["short"]
        tune = None
        if rung == "short" and config.finetune is not None:
            tune = config.finetune.model_copy(update={"epochs": config.finetune.epochs * share})
        prune = config.prune.model_copy(update={"iterations": 1}) if config.prune is not None else None
        quantize = config.quantize.model_copy(update={"mode": "ptq"}) if config.quantize is not None else None
        return config.model_copy(update={"finetune": tune, "quantize": quantize, "prune": prune})

    def _run(self, config: RunConfig, folder: Path, *, targets: bool) -> Manifest:
        from rescompress.runs.pipeline import run_stages
        from rescompress.runs.plan import run_plan

        stages = run_plan(config, self.settings)
        wanted = [s for s in stages if targets or s.kind not in ("export", "target")]
        with _machine(exclusive=False) if not targets else contextlib.nullcontext():
            computed = [s for s in wanted if s.kind != "target"]
            report = run_stages(computed, folder, _shown(config), reporter=self.reporter, store=self.store)
        if not targets:
            return report.manifest
        with _machine(exclusive=self._measured_here()):  # measuring never overlaps with training on the same cores
            manifest = run_stages(wanted, folder, _shown(config), reporter=self.reporter, store=self.store).manifest
        boards, target = self.document["search"]["boards"], self._modelled()
        if not boards or target is None:
            return manifest
        from rescompress.search.board import measure_on

        measure_on(boards, target.name, folder / target.name / "model.onnx", folder, self.reporter.note)
        return load_sound(folder)

    def _answer(self, rung: Rung, manifest: Manifest, folder: Path, config: RunConfig) -> Answer:
        last = [s for s in manifest.stages if "top1" in s.metrics and s.checkpoint_sha256][-1]
        costs, band = self._costs(last, manifest, folder, config)
        outcomes, sureness = self._on_held_out(last, folder)
        outcomes = outcomes.model_copy(update={"classes": None})  # a thousand names in every answer; the identity covers labels
        return Answer(
            rung=rung, accuracy=last.metrics["top1"].value, sureness=sureness, costs=costs, band=band, outcomes=outcomes
        )

    def _on_held_out(self, last: StageResult, folder: Path) -> tuple[Outcomes, float]:
        """Return what `evaluate_file` does; a network that the rung before had, too, is not evaluated again."""
        artifact = last.output("checkpoint")
        assert artifact is not None
        if self._held_out is not None and self._held_out[0] == artifact.sha256:
            return self._held_out[1]
        from rescompress.search.forecast import evaluate_file

        with _machine(exclusive=False):
            found = evaluate_file(folder / artifact.path, self.settings, self.reporter)
        self._held_out = (artifact.sha256, found)
        return found

    def _costs(
        self, last: StageResult, manifest: Manifest, folder: Path, config: RunConfig
    ) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
        known = _measured(manifest)
        costs, band = {}, {}
        for name in self.document["search"]["objectives"]:
            if name != "latency":
                costs[name] = last.metrics["size_bytes" if name == "size" else name].value
            elif known is not None:
                costs[name] = known.value
                band[name] = (known.low or known.value, known.high or known.value)
            else:
                artifact = last.output("checkpoint")
                assert artifact is not None
                costs[name] = self._latency(_spec_of(folder / artifact.path), int8=config.quantize is not None)
        return costs, band

    def _predicted(self, config: RunConfig) -> Answer:
        """Return the costs and the summed error of a candidate from curves that were measured once."""
        from rescompress.search.forecast import forecast

        with _machine(exclusive=False):
            found = forecast(config, self.settings, self.store, self.reporter)
        int8 = config.quantize is not None
        costs = {
            "latency": lambda: self._latency(found.spec, int8=int8),
            "size": lambda: found.params * (1.0 if int8 else 4.0),
            "macs": lambda: float(found.macs),
            "params": lambda: float(found.params),
        }
        return Answer(
            rung="predict",
            costs={name: costs[name]() for name in self.document["search"]["objectives"]},
            error=found.error,
            network=found.network,
        )

    def _latency(self, spec: Any, *, int8: bool) -> float:
        """Return the predicted ms on the first target with a latency model; without one, MACs in units of a float one."""
        from edge_targets.latency import predict
        from rescompress.core.layers import total_macs, walk

        layers = walk(spec)
        target = self._modelled()
        if target is None:
            return total_macs(layers) / 1e6 * (0.25 if int8 else 1.0)
        precision = target.check_precision("int8" if int8 else target.device.best_float)
        return predict(layers, target.device, precision=precision, batch=1).p50_ms

    def latency_metric(self, checkpoint: Path, folder: Path) -> dict[str, Any]:
        """Return ``p50_ms`` of a network: as its run measured it, else as it is predicted; nothing where neither is known."""
        from compress.checkpoints import load_checkpoint
        from edge_targets.latency import predict
        from rescompress.core.layers import walk

        measured = _measured(load_sound(folder))
        if measured is not None:
            return {"p50_ms": measured.model_dump(mode="json", exclude_defaults=True)}
        target = self._modelled()
        if target is None:
            return {}
        known = load_checkpoint(checkpoint)
        precision = target.check_precision("int8" if known.quantization is not None else target.device.best_float)
        found = predict(walk(known.spec), target.device, precision=precision, batch=1)
        return {"p50_ms": found.metric().model_dump(mode="json", exclude_defaults=True)}

    def _targets(self) -> list[Target]:
        from edge_targets.catalog import load_target

        return [load_target(name) for name in self.document["targets"]]


def _measured(manifest: Manifest) -> Metric | None:
    """Return the latency that was measured, on a board before one on this machine; None where none was."""
    found = [s for s in manifest.stages if "p50_ms" in s.metrics and s.metrics["p50_ms"].provenance == "measured"]
    found.sort(key=lambda s: not s.is_deployment)
    return found[0].metrics["p50_ms"] if found else None


def _shown(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"search"})


def _spec_of(path: Path) -> Any:
    from compress.checkpoints import load_checkpoint

    return load_checkpoint(path).spec


@contextlib.contextmanager
def _machine(*, exclusive: bool) -> Iterator[None]:
    """Share this machine's cores with other workers of this user, or have them alone, to measure."""
    name = f"rescompress-{os.getuid() if hasattr(os, 'getuid') else 0}"
    with contextlib.ExitStack() as held:
        # who waits to measure stands in the turnstile: those who train cannot pass him for ever
        with FileLock(Path(tempfile.gettempdir()) / f"{name}.turnstile").held():
            held.enter_context(FileLock(Path(tempfile.gettempdir()) / f"{name}.machine").held(shared=not exclusive))
        yield


def agree(trials: Trials, pipeline: Pipeline) -> None:
    """Make sure that this worker would judge by the same checkpoint and the same images as all others.

    Raises:
        BadInput: Its files are not those that the search began with.
    """
    mine = json.loads(json.dumps(pipeline.identity()))
    known = patiently(lambda: trials.study.user_attrs).get("identity")
    if known is None:
        patiently(lambda: trials.study.set_user_attr("identity", mine))
    elif known != mine:
        what = next(k for k in mine if mine[k] != known.get(k))
        raise BadInput(
            f"the {what} here is not the one that the search began with",
            where=str(trials.document[what]),
            remedy="copy the same files to this machine, or begin another search",
        )


def own_folder(folder: Path, name: str, storage: str | None, *, mark: bool = True) -> None:
    """Make sure that a folder is a search's own: two searches, or a run and a search, would overwrite each other's files.

    Args:
        folder: Of the search.
        name: Of the search.
        storage: URL of the storage; None for the journal in the folder.
        mark: Whether the folder is the search's from now on. An address that turns out to be wrong must not own it.

    Raises:
        BadInput: Another search or a run lies there.
    """
    make_folder(folder)
    mine = {"name": name, "storage": hidden(storage) if storage is not None else None}
    place = folder / SEARCH_MARK
    with FileLock(folder / ".owner").held():
        try:
            known = json.loads(place.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if (folder / MANIFEST_NAME).is_file() and not (folder / JOURNAL).is_file():
                raise BadInput("holds a run", where=str(folder), remedy="name another folder with -o") from None
            if mark:
                write_text(place, json.dumps(mine) + "\n")
            return
        except (OSError, ValueError) as e:
            raise BadInput(f"cannot be read: {e}", where=str(place), remedy="name another folder with -o") from e
    if known != mine:
        other = known.get("name") if isinstance(known, dict) else None
        raise BadInput(
            f"holds the search '{other}'" + ("" if other != name else " of another storage"),
            where=str(folder),
            remedy="name another folder with -o",
        )


def check_space(document: Mapping[str, Any]) -> None:
    """Make sure, before any work, that every choice of the space makes a config.

    Raises:
        ConfigError: A key or a choice of the space is unknown or impossible; it is named.
        TargetError: Candidates are quantized, and a target does not run INT8.
    """
    if document["search"]["boards"]:
        from edge_targets.catalog import load_target

        if not any(load_target(name).device.modes for name in document["targets"]):
            raise ConfigError(
                "no target is a board", where="search.boards", remedy="name what the boards are under `targets`, such as jetson"
            )
    for choices in _corners(document["search"]["space"]):
        check_candidates(document, [choices])
        if candidate(document, choices).get("quantize"):
            from rescompress.runs.plan import check_int8

            check_int8(document["targets"], "candidates of the space are quantized (space.precision, `quantize`)")


def check_candidates(document: Mapping[str, Any], candidates: Iterable[Mapping[str, Any]]) -> None:
    """Make sure that candidates make configs.

    Raises:
        ConfigError: A key or a choice is unknown or impossible; it is named.
    """
    for choices in candidates:
        validate(candidate(document, choices), "search.space")


def _corners(space: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield, for every dimension, each of its choices, or the ends of its range."""
    for name, dimension in dimensions(space).items():
        if name != f"{BUDGET}.kind":
            values = (dimension.low, dimension.high) if isinstance(dimension, Range) else dimension
            yield from ({name: value} for value in values)


def settings_of(document: Mapping[str, Any], *, device: str, threads: int | None, batch_size: int | None) -> Settings:
    """Return the settings of a search's runs: candidates are judged on a part of the training images."""
    return Settings(
        document["data"],
        document.get("labels"),
        document["seed"],
        device,
        threads,
        batch_size,
        hold_out=document["search"]["hold_out"],
    )


def conclude(trials: Trials, pipeline: Pipeline, folder: Path, told: Callable[[str], None] = lambda text: None) -> None:
    """Read the evaluation split, once, for the dense network and the points of the front, and keep what they got right.

    Raises:
        RescompressError: A network of the front cannot be evaluated.
    """
    known = trials.all()
    points = front(known, trials.config.objectives)
    if not points:
        raise _nothing(known, trials.study.study_name)
    make_folder(folder)
    with FileLock(folder / ".conclude").held():  # another worker here may be at it
        if unjudged(points, trials.final):
            _read_once(trials, pipeline, folder, points, told)
        if "dense" in trials.final:
            folder_manifest(trials, folder.parent)


def _nothing(known: Sequence[Trial], name: str) -> BadInput:
    """Return the error for a search of which no candidate reached the top."""
    why = next((t.reason for t in known if t.state == IMPOSSIBLE), "")
    some = sum(t.state == IMPOSSIBLE for t in known)
    left = sum(not t.finished for t in known)
    another = "begin another search, whose space holds budgets that the network can meet"
    return BadInput(
        f"no candidate reached the top: {some} of {len(known)} are impossible" + (f", such as: {why}" if why else ""),
        where=name,
        remedy=f"let it go on: {left} candidates are left" if left else another,
    )


def _read_once(trials: Trials, pipeline: Pipeline, folder: Path, points: Sequence[Point], told: Callable[[str], None]) -> None:
    from rescompress.search.forecast import evaluate_file

    settings = dataclasses.replace(pipeline.settings, hold_out=0.0)
    for point in points:
        place = folder / f"{point.trial.slot:05d}"
        try:
            manifest = load_sound(place)
        except RescompressError as e:
            here = (place / MANIFEST_NAME).is_file()
            elsewhere = f"its run lies on {point.trial.folder}; run `search worker` there to conclude"
            told(f"trial {point.trial.slot}: {f'{e.what} ({e.where})' if here else elsewhere}")
            continue
        last = [s for s in manifest.stages if s.checkpoint_sha256 and "top1" in s.metrics][-1]
        for name, stage in (("dense", manifest.stage("dense")), (str(point.trial.slot), last)):
            if name not in trials.final:
                trials.conclude(name, _judged(stage, place, settings, pipeline, evaluate_file))
        told(f"trial {point.trial.slot}: evaluated")


def folder_manifest(trials: Trials, folder: Path) -> None:
    """Write what reports and gates read: the dense network and the points of the front, as the stages of a run.

    The network that `best` would choose with its default margin stands last, so that a gate takes it; without one, the
    cheapest.

    Args:
        trials: Of a concluded search.
        folder: Of the search.
    """
    final = trials.final
    by = trials.config.objectives[0]
    points = sorted(
        (p for p in front(trials.all(), trials.config.objectives) if str(p.trial.slot) in final),
        key=lambda p: -p.answer.costs[by],
    )
    dense = Outcomes.model_validate(final["dense"]["outcomes"])
    known = {p.trial.slot: Outcomes.model_validate(final[str(p.trial.slot)]["outcomes"]) for p in points}
    good = good_enough(dense, known, DEFAULT_MARGIN)
    points.sort(key=lambda p: good[p.trial.slot])  # stable: among the good ones the cheapest is last
    from rescompress.search.show import search_document

    stages = [_row(folder, "dense", final["dense"], {}, DenseDetails(search=search_document(trials)))]
    for point in points:
        entry = final[str(point.trial.slot)]
        details = TrialDetails(choices=dict(point.trial.choices), folder=point.trial.folder, clear=point.clear)
        stages.append(_row(folder, f"trial-{point.trial.slot:05d}", entry, point.answer.costs, details))
    document = {k: v for k, v in trials.document.items() if k != "search"}
    old = load_manifest(folder) if (folder / MANIFEST_NAME).is_file() else None
    Manifest(
        rescompress_version=version("rescompress"),
        created=old.created if old else datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        config=document | {"search": trials.document["search"]},
        environment=environment(),
        stages=tuple(stages),
    ).save(folder)


def _row(folder: Path, name: str, entry: Mapping[str, Any], costs: Mapping[str, float], details: Details) -> StageResult:
    outcomes = Outcomes.model_validate(entry["outcomes"])
    path = folder / f"{name}.outcomes.json"
    write_text(path, outcomes.model_dump_json(indent=1) + "\n")
    metrics = {k: Metric.model_validate(v) for k, v in entry["metrics"].items()}
    metrics["top1"] = accuracy(outcomes.correct, outcomes.n, runtime="torch")
    return StageResult(
        stage=name,
        kind=details.kind,
        of=name,
        status="done",
        metrics=metrics,
        outputs=(Artifact.of("outcomes", path, folder),),
        details=details,
    )


def _judged(
    stage: StageResult | None, place: Path, settings: Settings, pipeline: Pipeline, evaluate_file: Any
) -> dict[str, Any]:
    assert stage is not None
    artifact = stage.output("checkpoint")
    assert artifact is not None
    outcomes, _ = evaluate_file(place / artifact.path, settings, pipeline.reporter)
    metrics = {k: v.model_dump(mode="json", exclude_defaults=True) for k, v in stage.metrics.items() if not k.startswith("top")}
    metrics |= pipeline.latency_metric(place / artifact.path, place)
    return {"outcomes": outcomes.model_dump(mode="json"), "metrics": metrics}
