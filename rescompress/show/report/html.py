"""One self-contained HTML page for a run, for runs side by side, or for a history: no script or image from elsewhere."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import groupby
from string import Template
from typing import Any, TypeGuard

from rescompress.core.details import DenseDetails, DeployDetails, MeasuredDetails, PruneDetails, TargetDetails, TrainedDetails
from rescompress.core.graph import Network
from rescompress.core.manifest import Manifest, StageResult
from rescompress.core.metric import Metric
from rescompress.show.figures.columns import (
    Column,
    columns_of,
    conditions,
    count_tick,
    duration,
    percent,
    plain_tick,
    provenance,
    size,
    size_tick,
)
from rescompress.show.figures.tables import (
    DENSE,
    DENSE_PREFIX,
    DOMINATED_MARK,
    Row,
    best,
    columns_for,
    dominated,
    figure,
    footnotes,
    rows_of,
    run_row,
)
from rescompress.show.report import charts
from rescompress.show.report import search as searches
from rescompress.show.report.before_after import side_by_side
from rescompress.show.report.card import described, stated
from rescompress.show.report.charts import Axis, Bar, Point
from rescompress.show.report.history import run_rows, trends
from rescompress.show.report.markup import NOTHING, Markup, html, joined

NORMAL_95 = 1.96
TALL_ROWS = 24
"""A table with more rows than this scrolls by itself, under a heading that stays."""
MOST_LABELS = 14
"""With more points than this in a chart, only the first, the last and the front are labelled."""


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        name: Its anchor.
        title: Its heading.
        body: HTML.
    """

    name: str
    title: str
    body: Markup


def page(
    runs: Sequence[tuple[str, Manifest]], *, history: bool = False, networks: tuple[Network, Network] | None = None
) -> str:
    """Return the page.

    Args:
        runs: Name and manifest of each; with several, a comparison comes first and the last run's own sections follow.
        history: Whether the runs are in order of time: trends are drawn.
        networks: Of the last run, before and after pruning, to be shown side by side.
    """
    name, manifest = runs[-1]
    compared = _comparison(runs, history=history) if len(runs) > 1 else ()
    sections = [s for s in (*compared, *_run_sections(name, manifest, networks)) if s]
    version = manifest.rescompress_version
    if len(runs) > 1:
        heading = f"{len(runs)} runs, {runs[0][0]} to {name}" if history else " and ".join(n for n, _ in runs[:4])
        subtitle = html(
            "Compressed with rescompress {}. The sections after the comparison show the run <strong>{}</strong>.", version, name
        )
    else:
        heading = name
        subtitle = html(
            "{} Compressed with rescompress {}, {}.{}", described(manifest), version, _when(manifest), _evaluated(manifest)
        )
    script, style = (Markup(_file(f"page.{kind}")) for kind in ("js", "css"))  # our own, the only ones the page may have
    parts = {
        "policy": html("style-src '{}'; script-src '{}'", _hash(style), _hash(script)),
        "title": html("{} · rescompress", heading),
        "style": style,
        "script": script,
        "heading": html("{}", heading),
        "subtitle": html("{}{}", subtitle, _headline(manifest)),
        "links": joined(html('<li><a href="#{}">{}</a></li>', s.name, s.title) for s in sections),
        "sections": joined([_tiles(manifest), joined(map(_section, sections), "\n")]),
        "footer": html(
            "Written by rescompress {}. Every figure is counted, measured, predicted or published, and marked as such; "
            "this file needs no network.",
            version,
        ),
    }
    return Template(_file("page.html")).substitute(parts)


def _section(section: Section) -> Markup:
    return html(
        '<section aria-labelledby="{}"><h2 id="{}">{}</h2>\n{}\n</section>',
        *(section.name, section.name, section.title, section.body),
    )


def _hash(content: str) -> str:
    """Return how a content security policy names an inline script or style: no other runs in the page."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _file(name: str) -> str:
    return resources.files("rescompress.show.report").joinpath(name).read_text(encoding="utf-8")


def _when(manifest: Manifest) -> str:
    return manifest.created[:16].replace("T", " ") + " UTC" if manifest.created else "at an unknown time"


def _evaluated(manifest: Manifest) -> str:
    """Return on what the accuracies were measured, as a sentence."""
    top1 = run_row(manifest, "").metrics.get("top1")
    if top1 is None or top1.n is None:
        return ""
    data = dict(stated(manifest.config)).get("data")
    return f" Accuracies are those of {top1.n:,} images" + (f" of {data}." if data else ".")


def _headline(manifest: Manifest) -> str:
    """Return what came of the dense network, in one sentence."""
    row = run_row(manifest, "")
    if manifest.stage(DENSE) is None or not row.against_dense:
        return ""
    parts = []
    for column in columns_of(row.metrics):
        against = row.against_dense.get(column.metric)
        if against is None or not column.brief:
            continue
        if column.against_dense == "difference":
            parts.append(f"{column.title} {against:+.2f} points")
        else:
            parts.append(f"{column.title} {100 * against:.0f} %")
    return f" Against the dense network: {', '.join(parts)}."


def _tiles(manifest: Manifest) -> Markup:
    row = run_row(manifest, "")
    dense = manifest.stage(DENSE)
    tiles = []
    for column in (c for c in columns_of(row.metrics) if c.brief):
        metric = row.metrics[column.metric]
        base = _dense_value(manifest, dense, column)
        origin = f"dense: {_plain(column, base)}" if base is not None else ""
        value = _plain(column, metric)
        against = row.against_dense.get(column.metric)
        small = NOTHING if against is None else html(" <small>({})</small>", _against_text(column, against))
        tiles.append(
            html(
                '<li><span class="name">{}</span> <span class="value">{}{}</span> <span class="from">{}</span>{}</li>',
                *(column.title, value, small, origin, _tag(metric) if column.per_target else ""),
            )
        )
    if not tiles:
        return NOTHING
    return html('<ul class="tiles" aria-label="Figures of the result">{}</ul>\n', joined(tiles))


def _dense_value(manifest: Manifest, dense: StageResult | None, column: Column) -> Metric | None:
    base, _, target = column.metric.partition(":")
    if target:
        about = sorted((s for s in manifest.stages if s.target == target), key=lambda s: s.is_deployment)
        return about[-1].metrics.get(DENSE_PREFIX + base) if about else None
    return dense.metrics.get(base) if dense else None


def _plain(column: Column, metric: Metric) -> str:
    """Return a figure alone, without its standard error or provenance."""
    return column.text(metric.model_copy(update={"provenance": "measured", "std_error": None}))


def _tag(metric: Metric) -> Markup:
    kind = metric.provenance
    return html('<span class="tag {}" title="{}">{}</span>', kind, provenance(metric), kind)


def _against_text(column: Column, against: float) -> str:
    return f"{against:+.2f} points" if column.against_dense == "difference" else f"{against:.2f}x"


# Tables -----------------------------------------------------------------------------------------------------------------


def _table(rows: Sequence[Row], label: str) -> Markup:
    """Return rows as a sortable table, every figure with its provenance; the rarer figures open on demand."""
    brief, everything = (columns_for(rows, wide=wide) for wide in (False, True))
    foot = joined(html('<p class="note">{}</p>', note) for note in footnotes(rows))
    table = joined([_one_table(rows, label, brief), foot])
    if len(everything) == len(brief):
        return table
    more = _one_table(rows, f"{label}, all figures", everything)
    return html("{}<details><summary>{}, all figures</summary>{}</details>", table, label, more)


def _one_table(rows: Sequence[Row], label: str, columns: Sequence[Column]) -> Markup:
    runs, created = len({r.run for r in rows}) > 1, len({r.created for r in rows}) > 1
    notes = any(r.note for r in rows)
    marked, beaten = best(rows), dominated(rows)
    heads = [("run", False)] * runs + [("made", False)] * created + [("stage", False)] + [(c.title, True) for c in columns]
    heads += [("where the latency comes from", False)] * notes
    head = joined(
        html('<th scope="col"{}><button type="button">{}</button></th>', Markup(" class=figure") if numeric else NOTHING, title)
        for title, numeric in heads
    )
    body = []
    for i, row in enumerate(rows):
        kind = "dominated" if i in beaten else "failed" if row.status == "failed" else ""
        cells = [_name_cell(row.run, head=True)] * runs
        cells += [_name_cell(row.created[:16].replace("T", " "), kind="made")] * created
        stage = f"{row.stage} {DOMINATED_MARK}" if i in beaten else row.stage
        cells.append(_name_cell(stage, head=not runs))
        cells += [_figure_cell(row, c, best=(i, c.metric) in marked) for c in columns]
        cells += [_name_cell(row.note, kind="from")] * notes
        body.append(html("<tr{}>{}</tr>", html(' class="{}"', kind) if kind else NOTHING, joined(cells)))
    return html(
        '<div class="{}" tabindex="0" role="region" aria-label="{}">'
        '<table class="sortable"><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>',
        *("scroll tall" if len(rows) > TALL_ROWS else "scroll", label, head, joined(body)),
    )


def _name_cell(text: str, *, head: bool = False, kind: str = "") -> Markup:
    style = html(' class="{}"', kind) if kind else NOTHING
    if head:
        return html('<th scope="row"{} data-value="{}">{}</th>', style, text, text)
    return html('<td{} data-value="{}">{}</td>', style, text, text)


def _figure_cell(row: Row, column: Column, *, best: bool) -> Markup:
    metric = row.metrics.get(column.metric)
    if metric is None:
        return Markup('<td class="figure"></td>')
    text = html("{}", column.text(metric.model_copy(update={"provenance": "measured"})))
    if metric.provenance in ("predicted", "published"):
        band = "" if metric.low is None or metric.high is None else f" {duration(metric.low)[:-3]} to {duration(metric.high)}"
        text = html("{} {}<span class=against>{}</span>", text, _tag(metric), band)
    if best:
        text = html('<span class="best">{}<span class="hidden"> (best)</span></span>', text)
    against = row.against_dense.get(column.metric)
    beside = NOTHING if against is None else html('<span class="against">{}</span>', _against_text(column, against))
    return html('<td class="figure" data-value="{}">{}{}</td>', repr(metric.value), text, beside)


def _data_table(head: Sequence[str], rows: Sequence[Sequence[str]], summary: str) -> Markup:
    """Return the figures of a chart as a table that opens on demand."""
    heads = joined(html('<th scope="col">{}</th>', h) for h in head)
    body = joined(
        html('<tr><th scope="row">{}</th>{}</tr>', first, joined(html("<td>{}</td>", c) for c in rest)) for first, *rest in rows
    )
    label = f"{summary}, as a table"
    return html(
        '<details><summary>{}</summary><div class="scroll" tabindex="0" role="region" aria-label="{}">'
        "<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div></details>",
        *(label, label, heads, body),
    )


def _figure(chart: Markup, caption: str, table: Markup) -> Markup:
    return html('<figure class="card">{}<figcaption>{}</figcaption>{}</figure>', chart, caption, table)


# Sections of one run ----------------------------------------------------------------------------------------------------


def _run_sections(name: str, manifest: Manifest, networks: tuple[Network, Network] | None) -> Iterator[Section | None]:
    rows = rows_of(manifest, name)
    yield Section("trade-off", "Every stage", _stage_table(manifest, rows))
    yield _search(manifest)
    yield _trade_off_charts(manifest)
    yield _widths(manifest)
    if networks is not None:
        yield Section("graph", "The network before and after pruning", side_by_side(*networks))
    yield _curves(manifest)
    yield _layers(manifest)
    yield _placed(manifest)
    yield _training(manifest)
    yield _soaks(manifest)
    yield Section("environment", "Environment and settings", _environment(manifest))
    yield Section("manifest", "Files and manifest", _manifest(manifest))


def _stage_table(manifest: Manifest, rows: Sequence[Row]) -> Markup:
    notes = [n for s in manifest.stages for n in s.details.notes]
    listed = joined(html("<li>{}</li>", n) for n in dict.fromkeys(notes))
    told = html('<ul class="note">{}</ul>', listed) if listed else NOTHING
    intro = "Accuracy with its standard error; in the second line of a cell, points or times the dense network's figure. "
    intro += "A star marks the best of values that may be compared."
    return html('<p class="note">{}</p>{}{}', intro, _table(rows, "Every stage of the run"), told)


def _search(manifest: Manifest) -> Section | None:
    """Return the front of a search and how it was found; nothing for a run."""
    dense = manifest.stage(DENSE)
    details = dense.details_as(DenseDetails) if dense is not None else None
    document = details.search if details is not None else None
    if not isinstance(document, Mapping):
        return None
    parts = [
        _figure(chart, caption, _data_table(head, rows, title))
        for title, chart, caption, head, rows in searches.figures(document)
    ]
    return Section("search", "The front, and how it was found", joined([searches.words(document), _charts(parts)]))


def _percent_axis() -> Axis:
    return Axis("top-1, %", plain_tick)


def _trade_off_charts(manifest: Manifest) -> Section | None:
    done = [s for s in manifest.stages if s.status == "done" and "top1" in s.metrics]
    plots = []
    for metric, axis in (
        ("size_bytes", Axis("ONNX size", size_tick, from_zero=True)),
        ("macs", Axis("MACs", count_tick, from_zero=True)),
    ):
        points = [
            _stage_point(s, s.metrics[metric], s.metrics["top1"], columns_of({metric})[0]) for s in done if metric in s.metrics
        ]
        plots.append(_scatter(f"by-{metric}", f"Accuracy against {axis.title}", points, axis))
    for stage in manifest.stages:
        if stage.target is not None and "p50_ms" in stage.metrics:
            points = _latency_points(manifest, stage)
            title = f"latency on {stage.target}" + (", measured on the board" if stage.is_deployment else "")
            axis = Axis(f"{title}, ms", plain_tick, from_zero=True)
            plots.append(_scatter(f"by-latency-{_slug(stage.stage)}", f"Accuracy against {title}", points, axis))
    found = [p for p in plots if p]
    if not found:
        return None
    legend = (
        "Up and to the left is better; a dashed line is the Pareto front of values under equal circumstances. Circles are "
        "measured or counted, diamonds predicted, squares published; vertical lines are 95 % intervals of the accuracy, "
        "horizontal lines a prediction's band."
    )
    return Section("charts", "Trade-off", html('<p class="note">{}</p>{}', legend, _charts(found)))


def _charts(found: Sequence[Markup]) -> Markup:
    return html('<div class="charts">{}</div>', joined(found))


def _bytes(value: float) -> Metric:
    return Metric(value=value, unit="bytes", provenance="counted")


def _slug(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in text)


def _stage_point(stage: StageResult, cost: Metric, top1: Metric, column: Column) -> Point:
    return _point(stage.stage, cost, top1, column, base=stage.stage == DENSE)


def _point(label: str, cost: Metric, top1: Metric, column: Column, *, base: bool = False) -> Point:
    shape: charts.Shape = {"predicted": "diamond", "published": "square"}.get(cost.provenance, "circle")  # type: ignore[assignment]
    band = (cost.low, cost.high) if cost.provenance == "predicted" and cost.low is not None and cost.high is not None else None
    return Point(
        x=cost.value,
        y=100 * top1.value,
        label=label,
        told=f"{label}: top-1 {percent(top1)}, {column.text(cost)} ({provenance(cost)})",
        y_interval=_interval(top1),
        x_band=band,
        shape=shape,
        tone="base" if base else "plain",
        family=(conditions(cost), conditions(top1)),
    )


def _interval(top1: Metric) -> tuple[float, float] | None:
    """Return the 95 % interval of an accuracy in percent, cut at what an accuracy can be."""
    if not top1.std_error:
        return None
    half = NORMAL_95 * top1.std_error
    return 100 * max(0.0, top1.value - half), 100 * min(1.0, top1.value + half)


def _latency_points(manifest: Manifest, stage: StageResult) -> list[Point]:
    """Return the network on a target, and what was measured beside it: the dense one, and the same one in float32."""
    column = columns_of({"p50_ms"})[0]
    points = []
    dense = manifest.stage(DENSE)
    beside = stage.metrics.get(DENSE_PREFIX + "p50_ms")
    if dense is not None and beside is not None and "top1" in dense.metrics:
        points.append(_point("dense", beside, dense.metrics["top1"], column, base=True))
    twin, floating = stage.metrics.get("fp32_p50_ms"), _last_float(manifest)
    if twin is not None and floating is not None:
        points.append(_point(f"{floating.stage} (float32)", twin, floating.metrics["top1"], column))
    top1 = figure(manifest, stage, "top1")
    if top1 is not None:
        precision = stage.metrics["p50_ms"].precision
        points.append(_point(f"result ({precision})" if precision else "result", stage.metrics["p50_ms"], top1, column))
    return points


def _last_float(manifest: Manifest) -> StageResult | None:
    found = [s for s in manifest.stages if s.kind in ("prune", "finetune") and s.status == "done" and "top1" in s.metrics]
    return found[-1] if found else None


def _scatter(name: str, title: str, points: Sequence[Point], axis: Axis) -> Markup:
    """Return a scatter chart with its table; nothing when there are fewer than two different points."""
    merged = [_merged(list(group)) for _, group in groupby(sorted(points, key=_place), key=_place)]
    if len(merged) < 2:
        return NOTHING
    if len(merged) > MOST_LABELS:
        ends = {points[0].told, points[-1].told}
        merged = [p if p.told in ends else _unlabelled(p) for p in merged]
    lowest, highest = min(merged, key=lambda p: p.x), max(merged, key=lambda p: p.y)
    described = f"{len(merged)} points. Cheapest: {lowest.told}. Most accurate: {highest.told}."
    chart = charts.scatter(name, title, described, merged, axis, _percent_axis())
    rows = [[p.label, f"{p.y:.2f} %", p.told.partition(": ")[2]] for p in points]
    return _figure(chart, f"{title}.", _data_table(("what", "top-1", "figures"), rows, title))


def _place(point: Point) -> tuple[float, float, str, str]:
    return point.x, point.y, point.shape, str(point.family)


def _merged(points: list[Point]) -> Point:
    labels = list(dict.fromkeys(p.label for p in points))
    label = labels[0] if len(labels) == 1 else f"{labels[0]} … {labels[-1]}" if len(labels) > 2 else ", ".join(labels)
    first = points[0]
    told = "; ".join(dict.fromkeys(p.told for p in points))
    return dataclasses.replace(first, label=label, told=told)


def _unlabelled(point: Point) -> Point:
    return dataclasses.replace(point, label="", y_interval=None)


def _numbers(values: Any) -> dict[str, float]:
    """Return the entries of a mapping that are finite numbers; an empty mapping for anything else."""
    if not isinstance(values, Mapping):
        return {}
    return {str(k): float(v) for k, v in values.items() if _finite(v)}


def _finite(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a number that can be drawn."""
    return isinstance(value, int | float) and -1e30 < value < 1e30


def _channels(stage: StageResult) -> tuple[dict[str, float], dict[str, float]]:
    """Return the channels per group before and after pruning."""
    details = stage.details_as(PruneDetails)
    if details is None:
        return {}, {}
    before = {k: float(v) for k, v in details.widths_before.items() if v > 0}
    return before, {k: float(v) for k, v in details.widths_after.items() if v >= 0}


def _pruning(manifest: Manifest) -> list[StageResult]:
    """Return the stages that pruned, one per iteration: the first saw the dense network, the last left what remains."""
    return [s for s in manifest.stages if _channels(s)[0]]


def _widths(manifest: Manifest) -> Section | None:
    steps = _pruning(manifest)
    if not steps:
        return None
    stage = steps[-1]
    before, after = _channels(stage)
    rows = [
        Bar(name, after.get(name, 0.0), wide, f"{wide:.0f} → {after[name]:.0f}" if name in after else f"{wide:.0f} → gone")
        for name, wide in before.items()
    ]
    kept, all_of = sum(r.value for r in rows), sum(before.values())
    described = f"{len(rows)} groups of channels, from {all_of:.0f} to {kept:.0f} channels in all."
    chart = charts.bars("widths-chart", "Channels per group before and after pruning", described, rows)
    table = [[r.label, f"{before[r.label]:.0f}", f"{r.value:.0f}", f"{100 * r.value / before[r.label]:.0f} %"] for r in rows]
    caption = "Pale: before. Strong: what is left."
    figure = _figure(chart, caption, _data_table(("group", "before", "after", "kept"), table, "Channels per group"))
    details = stage.details_as(PruneDetails)
    dropped = details.dropped_blocks if details is not None else []
    whole = html("<p>Whole blocks removed: {}.</p>", ", ".join(dropped)) if dropped else NOTHING
    return Section("widths", "Width per layer", joined([whole, figure]))


def _step(removed: int, size: float, steps: int) -> int:
    """Return where on a curve of so many steps `removed` of `size` channels lie; a step may stand for several channels."""
    return removed if steps >= size else round(removed * steps / size)


def _curves(manifest: Manifest) -> Section | None:
    steps = _pruning(manifest)
    if not steps:
        return None
    stage = steps[0]
    details = stage.details_as(PruneDetails)
    assert details is not None
    found: dict[str, list[float]] = {}
    for name, entry in details.curves.items():
        errors = [e for e in entry.error if _finite(e)]
        if len(errors) > 1 and len(errors) == len(entry.error):
            found[name] = errors
    positive = [e for errors in found.values() for e in errors if e > 0]
    if not positive:
        return None
    extent = (max(min(positive), max(positive) * 1e-4), max(positive))
    before, after = _channels(stage)
    drawn, table = [], []
    for i, (name, errors) in enumerate(found.items()):
        removed = round(before[name] - after.get(name, 0.0)) if name in before else None
        chosen = None if removed is None else _step(removed, before[name], len(errors))
        drawn.append(html("<li>{}</li>", charts.curve(f"curve-{i}", name, errors, chosen, extent)))
        at = "" if chosen is None else f"{errors[min(chosen, len(errors) - 1)]:.3g}"
        table.append([name, "" if removed is None else str(removed), at, f"{errors[-1]:.3g}"])
    unit = details.curves_unit
    note = (
        f"What it costs ({unit}) to remove channels of each group, from left to right, least harmful first. "
        f"All on one logarithmic scale from {extent[0]:.1g} to {extent[1]:.1g}; the mark shows how many were removed."
    )
    head = ("group", "removed", "error there", "error of removing all")
    return Section(
        "curves",
        "Error curves",
        html(
            '<p class="note">{}</p><ul class="curves">{}</ul>{}', note, joined(drawn), _data_table(head, table, "Error curves")
        ),
    )


def _layers(manifest: Manifest) -> Section | None:
    parts = []
    for stage in manifest.stages:
        details = stage.details_as(TargetDetails)
        rows = []
        for layer in details.layers if details is not None else ():
            ms = layer.get("ms", layer.get("p50_ms"))
            if _finite(ms) and ms >= 0:
                rows.append(Bar(str(layer.get("name", "?")), float(ms), None, duration(float(ms))))
        total = stage.metrics.get("p50_ms")
        if not rows or sum(r.value for r in rows) <= 0:
            continue
        spent = sum(r.value for r in rows)
        longest = sorted(rows, key=lambda r: -r.value)[:3]
        title = f"Time per layer on {stage.target or stage.stage}"
        described = (
            f"{len(rows)} layers, {duration(spent)} in all. Longest: " + ", ".join(f"{r.label} {r.text}" for r in longest) + "."
        )
        chart = charts.bars(f"layers-{_slug(stage.stage)}", title, described, rows)
        origin = f"{described} {provenance(total).capitalize()}." if total is not None else described
        table = [[r.label, r.text, f"{100 * r.value / spent:.1f} %"] for r in rows]
        tag = html(" {}", _tag(total)) if total is not None else NOTHING
        figure = _figure(chart, origin, _data_table(("layer", "time", "share"), table, title))
        parts.append(html("<div><h3>{}{}</h3>{}</div>", title, tag, figure))
    return Section("layers", "Where the time goes", _charts(parts)) if parts else None


def _placed(manifest: Manifest) -> Section | None:
    """What every convolution and matrix product became in the engines that were built on a board."""
    head = ("layer", "asked", "ran in", "unit", "kernel", "fused with it")
    parts = []
    for stage in manifest.stages:
        details = stage.details_as(DeployDetails)
        layers = details.engine.get("layers") if details is not None else None
        rows = [r for r in layers if isinstance(r, Mapping) and "node" in r] if isinstance(layers, list) else []
        if not rows:
            continue
        other = [r for r in rows if r.get("ran") != r.get("asked")]
        counts = Counter((_cell(r.get("ran")), _cell(r.get("unit"))) for r in rows)
        ran = ", ".join(f"{n} in {kind} ({unit})" for (kind, unit), n in counts.most_common())
        named = f" Not as asked, or not told: {', '.join(str(r['node']) for r in other)}." if other else " All as asked."
        table = [
            [str(r["node"]), *(_cell(r.get(k)) for k in ("asked", "ran", "unit", "kernel")), _joined(r.get("fused"))]
            for r in rows
        ]
        title = f"What each layer runs in on {stage.target or stage.stage}"
        told = f"Of {len(rows)} convolutions and matrix products: {ran}.{named} Read from the engine, not from what was asked."
        parts.append(html("<div><h3>{}</h3><p>{}</p>{}</div>", title, told, _data_table(head, table, title)))
    return Section("placement", "What each layer runs in", _charts(parts)) if parts else None


def _joined(values: object) -> str:
    """Return the texts of a list with commas; nothing for anything else."""
    return ", ".join(v for v in values if isinstance(v, str)) if isinstance(values, list) else ""


def _cell(value: object) -> str:
    return "not told" if value is None else str(value)


def _training(manifest: Manifest) -> Section | None:
    parts = []
    for stage in manifest.stages:
        details = stage.details_as(TrainedDetails)
        entries = [_numbers(e) for e in details.epochs] if details is not None else []
        names = [
            n for n in dict.fromkeys(k for e in entries for k in e) if n not in ("epoch", "step", "steps", "seconds", "lr")
        ]
        for name in names:
            values = [
                (float(i + 1), e[name], f"epoch {i + 1}: {name} {e[name]:.4g}") for i, e in enumerate(entries) if name in e
            ]
            if len(values) < 2:
                continue
            title = f"{stage.stage}: {name.replace('_', ' ')} per epoch"
            chart = charts.lines(
                f"train-{_slug(stage.stage)}-{_slug(name)}",
                title,
                f"From {values[0][1]:.4g} to {values[-1][1]:.4g} in {len(values)} epochs.",
                values,
                Axis("epoch", plain_tick),
                Axis(name.replace("_", " "), plain_tick),
            )
            table = [[f"{x:g}", f"{y:.4g}"] for x, y, _ in values]
            parts.append(_figure(chart, f"{title}.", _data_table(("epoch", name), table, title)))
    return Section("training", "Training", _charts(parts)) if parts else None


SOAK_TITLES = {
    "clock_mhz": "GPU clock, MHz",
    "temperature_c": "temperature, °C",
    "power_w": "power, W",
    "load_percent": "GPU load, %",
}


def _soaks(manifest: Manifest) -> Section | None:
    """Return what a soak measured in the course of time: the latency of its parts, clock, temperature, power, load."""
    parts = []
    for stage in manifest.stages:
        details = stage.details_as(MeasuredDetails)
        soak = details.soak if details is not None else None
        if soak is None:
            continue
        told = soak.get("parts")
        entries = [_numbers(p) for p in told] if isinstance(told, list) else []
        series = {
            "latency p50, ms": [(e["from_s"], e["p50_ms"]) for e in entries if "from_s" in e and "p50_ms" in e],
            **_trace(soak.get("trace")),
        }
        for name, values in series.items():
            if len(values) < 2:
                continue
            title = f"{stage.stage}: {name} during the soak"
            chart = charts.lines(
                f"soak-{_slug(stage.stage)}-{_slug(name)}",
                title,
                f"From {values[0][1]:.4g} to {values[-1][1]:.4g} in {values[-1][0]:.4g} s.",
                [(s / 60, v, f"{s:.4g} s: {v:.4g}") for s, v in values],
                Axis("minutes at full load", plain_tick),
                Axis(name, plain_tick),
            )
            table = [[f"{s:g}", f"{v:.4g}"] for s, v in values]
            parts.append(_figure(chart, f"{title}, measured on the board.", _data_table(("s", name), table, title)))
    return Section("soak", "Soak", _charts(parts)) if parts else None


def _trace(trace: Any) -> dict[str, list[tuple[float, float]]]:
    """Return the series of a trace, by the title of its axis."""
    columns, rows = (trace.get("columns"), trace.get("rows")) if isinstance(trace, Mapping) else (None, None)
    if not isinstance(columns, list) or not isinstance(rows, list) or "s" not in columns:
        return {}
    names = [str(c) for c in columns]
    entries = [_numbers(dict(zip(names, row, strict=False))) for row in rows if isinstance(row, list)]
    return {title: [(e["s"], e[key]) for e in entries if "s" in e and key in e] for key, title in SOAK_TITLES.items()}


def _definitions(values: Mapping[str, Any]) -> Markup:
    entries = joined(html("<dt>{}</dt><dd>{}</dd>", key, text) for key, text in stated(values))
    return html("<dl>{}</dl>", entries) if entries else Markup("<p>Not recorded.</p>")


def _environment(manifest: Manifest) -> Markup:
    elsewhere = joined(html('<p class="note">{}</p>', text) for text in manifest.made_elsewhere)
    environment, settings = _definitions(manifest.environment), _definitions(manifest.config)
    return html("<h3>Environment</h3>{}{}<h3>Settings</h3>{}", environment, elsewhere, settings)


def _manifest(manifest: Manifest) -> Markup:
    rows = []
    for stage in manifest.stages:
        files = [f"{a.path} ({size(_bytes(a.size_bytes))}, sha256 {a.sha256[:12]}…)" for a in stage.outputs]
        rows.append([stage.stage, stage.status, stage.reason or "", f"{stage.duration_s:.1f} s", "; ".join(files)])
    table = _data_table(("stage", "status", "reason", "took", "files"), rows, "Stages and the files they wrote")
    text = json.dumps(manifest.model_dump(exclude_none=True), indent=1)
    return html(
        '{}<details><summary>The whole manifest</summary><pre tabindex="0" aria-label="Manifest">{}</pre></details>',
        table,
        text,
    )


# Several runs -----------------------------------------------------------------------------------------------------------


def _comparison(runs: Sequence[tuple[str, Manifest]], *, history: bool) -> Iterator[Section | None]:
    rows = run_rows(runs)
    if history:
        yield _trend_charts(rows)
    yield Section("runs", "Every run" if history else "Runs side by side", _table(rows, "Runs, one in each row"))
    yield _run_charts(rows)


def _trend_charts(rows: Sequence[Row]) -> Section | None:
    parts = []
    for trend in trends(rows):
        column = trend.column
        factor = 100.0 if column.against_dense == "difference" else 1.0
        values = [(float(i + 1), factor * m.value, f"{rows[i].run}: {column.text(m)}") for i, m in trend.points]
        title = f"{column.title} from run to run"
        newest = f"{len(values)} runs, newest {column.text(trend.points[-1][1])}"
        changes = [trend.change_text(c) for c in (trend.since_first, trend.since_previous)]
        described = f"{newest}, {changes[0]} since the first, {changes[1]} since the previous."
        chart = charts.lines(
            f"trend-{_slug(column.metric)}", title, described, values, Axis("run", plain_tick), _value_axis(column)
        )
        table = [[rows[i].run, column.text(m)] for i, m in trend.points]
        parts.append(_figure(chart, f"{title}: {described}", _data_table(("run", column.title), table, title)))
    return Section("trends", "Trends", _charts(parts)) if parts else None


def _value_axis(column: Column) -> Axis:
    if column.against_dense == "difference":
        return Axis(f"{column.title}, %", plain_tick)
    if column.metric.startswith("p50_ms"):
        return Axis("ms", plain_tick)
    if column.metric == "size_bytes":
        return Axis(column.title, size_tick)
    return Axis(column.title, count_tick)


def _run_charts(rows: Sequence[Row]) -> Section | None:
    plots = []
    for column in columns_for(rows, wide=False):
        if not column.is_cost or column.metric == "params":
            continue
        points = [
            _point(r.run, r.metrics[column.metric], r.metrics["top1"], column)
            for r in rows
            if {column.metric, "top1"} <= set(r.metrics)
        ]
        text = plain_tick if column.per_target else _value_axis(column).text
        title = f"{column.title}, ms" if column.per_target else column.title
        plots.append(
            _scatter(
                f"runs-by-{_slug(column.metric)}", f"Accuracy against {column.title}", points, Axis(title, text, from_zero=True)
            )
        )
    found = [p for p in plots if p]
    return Section("run-charts", "Trade-off of the runs", _charts(found)) if found else None
