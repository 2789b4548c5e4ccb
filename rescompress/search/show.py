"""What a search found, as documents and tables."""

from __future__ import annotations

import itertools
import math
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rescompress.core.errors import BadInput, nearest
from rescompress.core.manifest import load_manifest
from rescompress.core.outcomes import Outcomes
from rescompress.search.front import Point, front, good_enough, hypervolume, points_of, unjudged
from rescompress.search.ladder import CONFIDENCE, paired, rank_correlation
from rescompress.search.study import Answer, Trials
from rescompress.show.gate.tango import interval

MOST_LOOKS = 60
"""Points of the history of the hypervolume."""

UNITS = {"latency": "ms", "size": "bytes", "macs": "MACs", "params": "parameters"}


def status_document(trials: Trials) -> dict[str, Any]:
    """Return how many candidates are in which state, who works, and the rank correlation of neighbouring rungs."""
    known, final = trials.all(), trials.final
    states = {s: sum(t.state == s for t in known) for s in ("waiting", "running", "done", "stopped", "impossible", "lost")}
    rungs = [r for r in trials.config.rungs if any(t.answer(r) for t in known)]
    reached = {r: sum(t.answer(r) is not None for t in known) for r in rungs}
    seconds = {r: sum(a.seconds for t in known if (a := t.answer(r))) for r in rungs}
    trust = []
    for lower, upper in itertools.pairwise(rungs):
        found = rank_correlation(known, lower, upper)
        trust.append({"from": lower, "to": upper, "spearman": found and found[0], "candidates": found[1] if found else 0})
    return {
        "name": trials.study.study_name,
        "trials": len(known),
        "states": states,
        "rungs": [{"rung": r, "candidates": reached[r], "seconds": round(seconds[r], 1)} for r in rungs],
        "rank_correlation": trust,
        "running": [{"trial": t.slot, "worker": t.worker, "choices": dict(t.choices)} for t in known if t.state == "running"],
        "concluded": bool(final) and not unjudged(front(known, trials.config.objectives), final),
        "stopping": trials.stopping,
    }


def status_table(document: dict[str, Any]) -> list[Any]:
    """Return tables for a terminal."""
    from rich.table import Table
    from rich.text import Text

    words = ", ".join(f"{n} {state}" for state, n in document["states"].items() if n)
    head = f"{document['name']}: {document['trials']} candidates, {words}" + (", asked to stop" if document["stopping"] else "")
    rungs = Table("rung", "candidates", "seconds", "rank correlation with the next")
    trust = {t["from"]: t for t in document["rank_correlation"]}
    for row in document["rungs"]:
        found = trust.get(row["rung"])
        told = "" if not found or found["spearman"] is None else f"{found['spearman']:.2f} ({found['candidates']})"
        rungs.add_row(row["rung"], str(row["candidates"]), f"{row['seconds']:.0f}", told)
    lines = [Text(f"  trial {r['trial']} by {r['worker']}: {_choices(r['choices'])}") for r in document["running"]]
    return [Text(head), rungs, *lines]


def front_document(trials: Trials) -> dict[str, Any]:
    """Return the front: with the evaluation split where the search is concluded, else by held-out training images."""
    final = trials.final
    dense = Outcomes.model_validate(final["dense"]["outcomes"]) if "dense" in final else None
    points = front(trials.all(), trials.config.objectives)
    rows = [_row(p, final.get(str(p.trial.slot)), dense) for p in points]
    document: dict[str, Any] = {
        "name": trials.study.study_name,
        "objectives": list(trials.config.objectives),
        "units": {name: UNITS[name] for name in trials.config.objectives},
        "front": rows,
        "concluded": not unjudged(points, final),
    }
    if dense is not None:
        metrics = final["dense"]["metrics"]
        document["dense"] = {"top1": dense.correct / dense.n, "n": dense.n, "size": metrics["size_bytes"]["value"]}
    return document


def _row(point: Point, final: dict[str, Any] | None, dense: Outcomes | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "trial": point.trial.slot,
        "choices": dict(point.trial.choices),
        "held_out_top1": point.answer.accuracy,
        "costs": dict(point.answer.costs),
        "bands": {k: list(v) for k, v in point.answer.band.items()},
        "clear": point.clear,
        "folder": point.trial.folder,
    }
    if final is not None and dense is not None:
        outcomes = Outcomes.model_validate(final["outcomes"])
        pair = paired(dense, outcomes)
        row |= {"top1": outcomes.correct / outcomes.n, "n": outcomes.n}
        if pair is not None:
            low, high = interval(pair, CONFIDENCE)
            row |= {"drop": pair.drop, "drop_low": low, "drop_high": high}
    return row


def front_table(document: dict[str, Any]) -> Any:
    """Return the front as a table for a terminal."""
    from rich.table import Table

    split = "top-1 (val)" if document["concluded"] else "top-1 (held-out training images)"
    table = Table("trial", split, "drop, 95 %", *(f"{n} [{document['units'][n]}]" for n in document["objectives"]), "choices")
    for column in table.columns:
        column.header = _plain(str(column.header))
    for row in document["front"]:
        accuracy = row["top1"] if document["concluded"] else row["held_out_top1"]
        drop = f"{100 * row['drop_low']:.2f} to {100 * row['drop_high']:.2f}" if "drop" in row else ""
        costs = [f"{row['costs'][n]:.4g}" for n in document["objectives"]]
        mark = "" if row["clear"] else " (within the error)"
        table.add_row(str(row["trial"]), f"{100 * accuracy:.2f} %{mark}", drop, *costs, _plain(_choices(row["choices"])))
    return table


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


def _choices(choices: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in choices.items())


def best_document(trials: Trials, margin: float, by: str | None) -> dict[str, Any]:
    """Return the cheapest network of the front that is not worse than the dense one by more than the margin.

    Args:
        trials: Of a concluded search.
        margin: A fraction.
        by: Which cost.

    Raises:
        BadInput: The search is not concluded, the cost is none of its objectives, or no network is good enough.
    """
    objectives = trials.config.objectives
    by = by or objectives[0]
    if by not in objectives:
        raise BadInput(f"'{by}' is not an objective of this search", where="by", remedy=nearest(by, objectives))
    final = trials.final
    if "dense" not in final:
        raise BadInput(
            "the search is not concluded: its front has not been evaluated",
            where=trials.study.study_name,
            remedy="let a worker finish it: `rescompress search worker DIR`",
        )
    everyone = front(trials.all(), objectives)
    points = {p.trial.slot: p for p in everyone if str(p.trial.slot) in final}
    dense = Outcomes.model_validate(final["dense"]["outcomes"])
    known = {slot: Outcomes.model_validate(final[str(slot)]["outcomes"]) for slot in points}
    passed = [slot for slot, good in good_enough(dense, known, margin).items() if good]
    if not passed:
        raise BadInput(
            f"no network of the front is surely within {100 * margin:g} points of the dense one",
            where=trials.study.study_name,
            remedy="allow a larger --max-drop, evaluate on more images, or search on",
        )
    slot = min(passed, key=lambda s: points[s].answer.costs[by])
    row = _row(points[slot], final[str(slot)], dense)
    words = (
        f"trial {slot}: {100 * row['top1']:.2f} % on {row['n']} images (dense {100 * dense.correct / dense.n:.2f} %), "
        f"{by} {row['costs'][by]:.4g} {UNITS[by]}; {_choices(row['choices'])}\n{row['folder']}"
    )
    if missing := unjudged(everyone, final):
        words += f"\nnote: {len(missing)} networks of the front lie on other machines and are not evaluated yet"
    return row | {"max_drop": margin, "by": by, "words": words, "passed": sorted(passed), "unjudged": len(missing)}


def deliver_best(document: dict[str, Any], output: Path) -> Path:
    """Copy the checkpoint of a chosen network to `output` and return its path.

    Raises:
        BadInput: Its run lies on another machine.
    """
    from rescompress.core.artifact import atomic_path

    host, _, place = str(document["folder"]).partition(":")
    if host != socket.gethostname() and not Path(place).is_dir():
        raise BadInput("lies on another machine", where=document["folder"], remedy=f"call this on {host}")
    last = [s for s in load_manifest(Path(place)).stages if s.checkpoint_sha256][-1]
    artifact = last.output("checkpoint")
    assert artifact is not None
    with atomic_path(output) as temporary:
        shutil.copy(Path(place) / artifact.path, temporary)
    return output


def search_document(trials: Trials) -> dict[str, Any]:
    """Return what the page shows of a search: candidates, front, rungs, importance of the choices, hypervolume over time."""
    known = trials.all()
    objectives = trials.config.objectives
    on_front = {p.trial.slot for p in front(known, objectives)}
    points = sorted(points_of(known), key=lambda item: item[0].number)
    candidates = [
        {
            "trial": trial.slot,
            "choices": _choices(dict(trial.choices)),
            "accuracy": answer.accuracy,
            "error": _standard_error(answer.outcomes),
            "costs": dict(answer.costs),
            "bands": {k: list(v) for k, v in answer.band.items()},
            "front": trial.slot in on_front,
        }
        for trial, answer in points
    ]
    document = status_document(trials)
    trust = {t["from"]: t["spearman"] for t in document["rank_correlation"]}
    return {
        "objectives": list(objectives),
        "units": {name: UNITS[name] for name in objectives},
        "candidates": candidates,
        "rungs": [{**row, "spearman": trust.get(row["rung"])} for row in document["rungs"]],
        "hypervolume": _volumes([answer for _, answer in points], objectives),
        "importance": _importance(trials),
    }


def _standard_error(outcomes: Outcomes | None) -> float:
    if outcomes is None or not outcomes.n:
        return 0.0
    p = outcomes.correct / outcomes.n
    return float((p * (1 - p) / outcomes.n) ** 0.5)


def _volumes(answers: Sequence[Answer], objectives: Sequence[str]) -> list[tuple[int, float]]:
    """Return after how many candidates which share of the box of all of them was dominated, costs as logarithms.

    At some of the counts: the more points and objectives, the fewer, for the volume of many is long work.
    """
    if len(answers) < 2:
        return []
    rows = [(-float(a.accuracy or 0.0), *(math.log(max(a.costs[name], 1e-30)) for name in objectives)) for a in answers]
    low = [min(column) for column in zip(*rows, strict=True)]
    high = [max(column) for column in zip(*rows, strict=True)]
    scaled = [tuple((v - a) / ((b - a) or 1.0) for v, a, b in zip(row, low, high, strict=True)) for row in rows]
    reference = (1.05,) * len(low)
    work = len(rows) ** max(1, len(low) - 2)
    looks = min(len(rows), max(2, min(MOST_LOOKS, 1_000_000 // work)))
    counts = sorted({1 + round(i * (len(rows) - 1) / (looks - 1)) for i in range(looks)})
    return [(n, hypervolume(scaled[:n], reference) / 1.05 ** len(low)) for n in counts]


def _importance(trials: Trials) -> dict[str, float]:
    """Return the share of each choice in the variation of the accuracy; nothing where too few candidates tell it."""
    import optuna

    complete = [t for t in trials.study.get_trials(deepcopy=False) if t.state == optuna.trial.TrialState.COMPLETE]
    if len(complete) < 4:
        return {}
    try:
        found = optuna.importance.get_param_importances(
            trials.study,
            evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
            target=lambda t: -t.values[0],  # the estimator looks at what leads to low values
        )
    except (ValueError, RuntimeError):  # too few, or all of one value
        return {}
    return {str(k): float(v) for k, v in found.items()}
