"""What a search costs beside the work of its candidates: milliseconds a trial, and how long readers take.

    python benchmarks/search_storage.py --trials 5000

Candidates answer from a formula at once, so that what is timed is the storage, the ladder and the sampler alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rescompress.core.outcomes import Outcomes
from rescompress.search.settings import Rung, SearchConfig, anchors
from rescompress.search.show import front_document, status_document
from rescompress.search.study import Answer, create, join, storage_of
from rescompress.search.worker import work

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
    begin = time.perf_counter()
    trials = create(storage_of(address), "benchmark", document, 0, anchors(document, SPACE))
    queued = time.perf_counter()
    work(trials, Formula(), folder / "trials")
    done = time.perf_counter()
    status_document(join(storage_of(address), "benchmark"))
    status = time.perf_counter()
    found = front_document(join(storage_of(address), "benchmark"))
    front = time.perf_counter()
    print("| trials | queueing ms each | working ms each | status s | front s | points |\n|---:|---:|---:|---:|---:|---:|")
    print(
        f"| {chosen.trials} | {1000 * (queued - begin) / chosen.trials:.1f} | {1000 * (done - queued) / chosen.trials:.1f} | "
        f"{status - done:.2f} | {front - status:.2f} | {len(found['front'])} |"
    )


if __name__ == "__main__":
    main()
