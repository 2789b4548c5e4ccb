"""What a search found, as a section of the page: the front, what its rungs were worth, which choices mattered.

It is read from the details of the stage ``dense`` of a search's manifest (`rescompress.search.worker.folder_manifest`), which
anybody may have written: what has another form than it should is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rescompress.show.figures.columns import count_tick, plain_tick, size_tick
from rescompress.show.report import charts
from rescompress.show.report.charts import Axis, Bar, Point
from rescompress.show.report.markup import NOTHING, Markup, html, joined

MOST_POINTS = 400
"""Candidates off the front in a chart, the latest where there are more; networks of the front, spread over it."""
NORMAL_95 = 1.96


@dataclass(frozen=True)
class Candidate:
    """One candidate that was trained in full.

    Attributes:
        slot: Its number.
        choices: As text.
        accuracy: On held-out training images, a fraction.
        error: Standard error of that.
        costs: By objective.
        bands: Of costs that were measured or predicted.
        front: Whether it stands on the front.
    """

    slot: int
    choices: str
    accuracy: float
    error: float
    costs: Mapping[str, float]
    bands: Mapping[str, tuple[float, float]]
    front: bool


def candidates_of(document: Mapping[str, Any]) -> list[Candidate]:
    """Return the candidates of a search's document that are whole."""
    found = []
    for row in document.get("candidates", ()) if isinstance(document.get("candidates"), list) else ():
        if not isinstance(row, Mapping):
            continue
        costs = {str(k): float(v) for k, v in _mapping(row.get("costs")).items() if _finite(v)}
        bands = {str(k): (float(v[0]), float(v[1])) for k, v in _mapping(row.get("bands")).items() if _pair(v)}
        if _finite(row.get("accuracy")) and costs:
            error = float(row["error"]) if _finite(row.get("error")) else 0.0
            found.append(
                Candidate(
                    int(row["trial"]) if isinstance(row.get("trial"), int) else -1,
                    str(row.get("choices", "")),
                    float(row["accuracy"]),
                    error,
                    costs,
                    bands,
                    row.get("front") is True,
                )
            )
    return found


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_finite, value))


def figures(document: Mapping[str, Any]) -> list[tuple[str, Markup, str, Sequence[str], list[list[str]]]]:
    """Return the charts of a search: title, chart, caption, and head and rows of the table behind it."""
    known = candidates_of(document)
    units = {str(k): str(v) for k, v in _mapping(document.get("units")).items()}
    drawn = [_front_chart(known, name, units.get(name, "")) for name in units]
    drawn += [_volume_chart(document), _importance_chart(document)]
    return [d for d in drawn if d is not None]


Figure = tuple[str, Markup, str, Sequence[str], list[list[str]]]


def _front_chart(known: Sequence[Candidate], name: str, unit: str) -> Figure | None:
    """Return accuracy against a cost, both ends of the cost's scale as far apart as their logarithms."""
    here = [c for c in known if c.costs.get(name, 0.0) > 0]
    if len(here) < 2:
        return None
    others = [c for c in here if not c.front]
    best = sorted((c for c in here if c.front), key=lambda c: c.costs[name])
    drawn = (
        [best[round(i * (len(best) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)] if len(best) > MOST_POINTS else best
    )
    shown = [*others[-MOST_POINTS:], *drawn]
    tick = {"size": size_tick, "macs": count_tick, "params": count_tick}.get(name, plain_tick)
    points = []
    for c in shown:
        told = f"trial {c.slot}: {100 * c.accuracy:.2f} %, {name} {tick(c.costs[name])} {unit}; {c.choices}"
        point = Point(math.log10(c.costs[name]), 100 * c.accuracy, "", told, tone="base", family="others")
        if c.front:
            reach = NORMAL_95 * c.error
            band = c.bands.get(name)
            point = Point(
                point.x,
                point.y,
                str(c.slot),
                told,
                y_interval=(100 * (c.accuracy - reach), 100 * (c.accuracy + reach)),
                x_band=(math.log10(band[0]), math.log10(band[1])) if band is not None and min(band) > 0 else None,
                family="front",
            )
        points.append(point)
    title = f"Accuracy against {name}, {len(here)} candidates"
    chart = charts.scatter(
        f"search-{name}",
        title,
        f"{sum(c.front for c in here)} of {len(here)} candidates stand on the front.",
        points,
        Axis(f"{name}, {unit}, logarithmic", lambda v: tick(10.0**v)),
        Axis("top-1 on held-out training images, %", plain_tick),
    )
    rows = [[str(c.slot), f"{100 * c.accuracy:.2f} %", f"{c.costs[name]:.6g}", c.choices] for c in shown if c.front]
    some = "" if drawn is best else f", {len(drawn)} of {len(best)} networks spread over it"
    return title, chart, f"{title}; the front with its 95 % intervals{some}.", ("trial", "top-1", name, "choices"), rows


def _volume_chart(document: Mapping[str, Any]) -> Figure | None:
    history = document.get("hypervolume")
    found = [(int(p[0]), float(p[1])) for p in history if _pair(p)] if isinstance(history, list) else []
    if len(found) < 2:
        return None
    title = "Hypervolume of the front as candidates were tried"
    kept = found[:: max(1, len(found) // MOST_POINTS)]
    chart = charts.lines(
        "search-volume",
        title,
        f"From {found[0][1]:.4g} to {found[-1][1]:.4g} of 1.",
        [(float(n), value, f"after {n} candidates: {value:.4g}") for n, value in kept],
        Axis("candidates trained in full", plain_tick),
        Axis("hypervolume", plain_tick),
    )
    caption = (
        f"{title}: the share of the box between all candidates' best and worst that the front dominates, costs as logarithms."
    )
    return title, chart, caption, ("candidates", "hypervolume"), [[str(n), f"{value:.4g}"] for n, value in kept]


def _importance_chart(document: Mapping[str, Any]) -> Figure | None:
    found = {str(k): float(v) for k, v in _mapping(document.get("importance")).items() if _finite(v) and v >= 0}
    if len(found) < 2 or sum(found.values()) <= 0:
        return None
    rows = sorted(found.items(), key=lambda item: -item[1])
    title = "What the choices mean for the accuracy"
    bars = [Bar(name, value, None, f"{100 * value:.0f} %") for name, value in rows]
    chart = charts.bars("search-importance", title, f"Most: {rows[0][0]}.", bars)
    caption = f"{title}: share of the variation that Optuna's estimator lays to each."
    return title, chart, caption, ("choice", "share"), [[n, f"{100 * v:.1f} %"] for n, v in rows]


def words(document: Mapping[str, Any]) -> Markup:
    """Return what the rungs came to, as a list."""
    lines = []
    for row in document.get("rungs", ()) if isinstance(document.get("rungs"), list) else ():
        if isinstance(row, Mapping) and _finite(row.get("candidates")) and _finite(row.get("seconds")):
            trust = row.get("spearman")
            told = f", rank correlation with the next rung {trust:.2f}" if _finite(trust) else ""
            lines.append(f"{row.get('rung')}: {row['candidates']:.0f} candidates, {row['seconds']:.0f} s{told}")
    return html('<ul class="note">{}</ul>', joined(html("<li>{}</li>", line) for line in lines)) if lines else NOTHING
