"""What a search costs beside the work of its candidates: milliseconds a trial, and how long readers take.

    python benchmarks/search_storage.py --trials 5000

Candidates answer from a formula at once, so that what is timed is the storage, the ladder and the sampler alone.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rescompress.core.manifest import Manifest, StageResult
from rescompress.core.outcomes import Outcomes
from rescompress.runs.search_settings import Rung, SearchConfig, anchors
from rescompress.search.show import front_document, search_document, status_document
from rescompress.search.study import Answer, create, join, storage_of
from rescompress.search.worker import work
from rescompress.show.report.html import page

SPACE = {"budget": {"macs": {"low": 0.1, "high": 1.0}}, "precision": ["int8", "float"]}


class Formula:
    """Accuracy and costs grow with the budget."""

    def rungs(self) -> tuple[Rung, ...]:
        """Return three rungs."""
        return ("predict", "oneshot", "full")

    def answer(self, rung: Rung, choices: Mapping[str, Any], folder: Path) -> Answer:
        """Return what the formula says."""
        budget = choices["budget.macs"]
        cost = budget * (0.25 if choices["precision"] == "int8" else 1.0)
        right = round(1000 * (0.9 - 0.3 * (1 - budget) ** 2 - (0.01 if choices["precision"] == "int8" else 0.0)))
        known = None if rung == "predict" else Outcomes.pack([i < right for i in range(1000)], "held")
        return Answer(
            rung=rung,
            accuracy=None if known is None else right / 1000,
            error=(1 - budget) ** 2 if known is None else None,
            costs={"latency": cost, "size": 4 * cost},
            outcomes=known,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--sampler", choices=["tpe", "random"], default="random")
    parser.add_argument("--storage", help="URL of a database; a journal file by default")
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    address = chosen.storage or str(folder)
    section = SearchConfig(trials=chosen.trials, space=SPACE, sampler=chosen.sampler)
    document = {"checkpoint": "", "data": "", "search": section.model_dump(mode="json")}
    table = Table()
    with table.row("begin"):
        trials = create(storage_of(address), "benchmark", document, 0, anchors(document, SPACE))
    with table.row("work, a candidate", chosen.trials):
        work(trials, Formula(), folder / "trials")
    with table.row("status"):
        status_document(join(storage_of(address), "benchmark"))
    with table.row("front"):
        found = front_document(join(storage_of(address), "benchmark"))
    with table.row("report"):
        details = {"search": search_document(join(storage_of(address), "benchmark"))}
        stages = (StageResult(stage="dense", status="done", details=details),)
        size = len(page([("benchmark", Manifest(stages=stages))]).encode())
    print(f"\n{chosen.trials} candidates, {len(found['front'])} on the front; the report has {size / 1e6:.2f} MB")


class Table:
    """Rows of wall-clock and CPU time; on a machine that does other work, too, the CPU time is what counts."""

    def __init__(self) -> None:
        print("| | wall ms | CPU ms |\n|---|---:|---:|")

    @contextlib.contextmanager
    def row(self, name: str, share: int = 1) -> Iterator[None]:
        """Print what the block took, a `share` of it."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"| {name} | {1000 * wall / share:.1f} | {1000 * cpu / share:.1f} |")


if __name__ == "__main__":
    main()
