"""Runs over time: all runs below a folder, and how each figure went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rescompress.core.errors import BadInput
from rescompress.core.evidence import load_sound
from rescompress.core.manifest import MANIFEST_NAME, Manifest
from rescompress.core.metric import Metric
from rescompress.show.figures.columns import Column, conditions
from rescompress.show.figures.tables import Row, columns_for, run_row

BARS = "▁▂▃▄▅▆▇█"
MOST_BARS = 40


def find_runs(folder: Path) -> list[Path]:
    """Return the folders of all runs at or below `folder`, hidden folders left out.

    Raises:
        BadInput: `folder` is no folder, or holds no run.
    """
    if not folder.is_dir():
        raise BadInput("no such folder", where=str(folder), remedy="name a folder that holds runs")
    found = [
        path.parent
        for path in sorted(folder.rglob(MANIFEST_NAME))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise BadInput(f"holds no run (no {MANIFEST_NAME} below it)", where=str(folder), remedy="name a folder that holds runs")
    return found


def run_names(paths: Sequence[Path]) -> list[str]:
    """Return a short, unique name per run: as many trailing parts of its folder as it takes."""
    folders = [(p if p.is_dir() else p.parent).resolve() for p in paths]
    for depth in range(1, 32):
        names = ["/".join(f.parts[-depth:]) for f in folders]
        if len(set(names)) == len(set(folders)):
            return names
    return [str(f) for f in folders]


def load_runs(paths: Sequence[Path]) -> list[tuple[str, Manifest]]:
    """Return name and manifest of each run.

    Raises:
        BadInput: A manifest is missing, damaged, or contradicts itself or its files, or a run holds no stage.
    """
    runs = list(zip(run_names(paths), [load_sound(path) for path in paths], strict=True))
    for path, (_, manifest) in zip(paths, runs, strict=True):
        if not manifest.stages:
            raise BadInput("the run holds no stage yet", where=str(path), remedy="run the pipeline first")
    return runs


def find_all(folders: Sequence[Path]) -> list[Path]:
    """Return the folders of all runs at or below several folders, each once.

    Raises:
        BadInput: One of them holds no run.
    """
    return list(dict.fromkeys(run for folder in folders for run in find_runs(folder)))


def history(folders: Sequence[Path]) -> list[tuple[str, Manifest]]:
    """Return name and manifest of every run at or below the folders, oldest first.

    Raises:
        BadInput: A folder holds no run, or a manifest is damaged or contradicts itself or its files.
    """
    return sorted(load_runs(find_all(folders)), key=lambda run: (run[1].created, run[0]))


@dataclass(frozen=True)
class Trend:
    """How one figure went from run to run.

    Attributes:
        column: The figure.
        points: Position of the run and value, oldest first; only values of the newest's network under its conditions.
        since_first: Points of difference (accuracy) or ratio of the newest to the oldest.
        since_previous: The same, to the one before the newest.
    """

    column: Column
    points: tuple[tuple[int, Metric], ...]
    since_first: float
    since_previous: float

    @property
    def bars(self) -> str:
        """The trend as a row of bars, the newest last."""
        values = [m.value for _, m in self.points][-MOST_BARS:]
        low, high = min(values), max(values)
        steps = len(BARS) - 1
        return "".join(BARS[round(steps * (v - low) / (high - low)) if high > low else steps // 2] for v in values)

    def change_text(self, change: float) -> str:
        """Return a change as people read it: ``-0.35 points``, ``0.98x``."""
        return f"{change:+.2f} points" if self.column.against_dense == "difference" else f"{change:.3f}x"


def trends(rows: Sequence[Row]) -> list[Trend]:
    """Return the trend of every figure of runs in order, oldest first; figures with fewer than two values are left out."""
    found = []
    for column in columns_for(rows, wide=False):
        values = [(i, row.metrics[column.metric]) for i, row in enumerate(rows) if column.metric in row.metrics]
        network, newest = rows[values[-1][0]].network, conditions(values[-1][1])
        points = tuple((i, m) for i, m in values if rows[i].network == network and conditions(m) == newest)
        if len(points) > 1:
            last = points[-1][1].value
            found.append(
                Trend(column, points, _change(column, points[0][1].value, last), _change(column, points[-2][1].value, last))
            )
    return found


def _change(column: Column, old: float, new: float) -> float:
    if column.against_dense == "difference":
        return 100 * (new - old)
    return new / old if old else 1.0


def run_rows(runs: Sequence[tuple[str, Manifest]]) -> list[Row]:
    """Return one row per run."""
    return [run_row(manifest, name) for name, manifest in runs]
