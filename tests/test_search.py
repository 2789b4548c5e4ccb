"""Search: the trials in their storage, the ladder, the front; with a judge that needs no network."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rescompress.core.errors import BadInput, EnvironmentFailed
from rescompress.core.outcomes import Outcomes
from rescompress.search import study as searches
from rescompress.search.front import front, good_enough, hypervolume, p_value
from rescompress.search.ladder import climbs, paired, rank_correlation
from rescompress.search.settings import RUNGS, SearchConfig, anchors, candidate, default_space, dimensions
from rescompress.search.study import Answer, Trial, Trials, create, join, storage_of
from rescompress.search.worker import work

optuna = pytest.importorskip("optuna")

SPACE = {"budget": {"macs": {"low": 0.1, "high": 1.0}}, "precision": ["int8", "float"]}


def document(trials: int, **search: object) -> dict[str, object]:
    section = SearchConfig(trials=trials, space=SPACE, **search)  # type: ignore[arg-type]
    return {"checkpoint": "net.pt", "data": "builtin:digits", "search": section.model_dump(mode="json")}


def bits(n: int, right: int, *, flips: int = 0, identity: str = "val") -> Outcomes:
    return Outcomes.pack([(flips <= i < right + flips) for i in range(n)], identity)


class Synthetic:
    """Answers from a formula: accuracy falls with the budget, costs with it."""

    def __init__(self, log: Path | None = None, pause: float = 0.0) -> None:
        self.log = log
        self.pause = pause

    def rungs(self):
        return ("predict", "oneshot", "full")

    def answer(self, rung, choices, folder):
        time.sleep(self.pause)
        budget = choices["budget.macs"]
        cost = budget * (0.25 if choices["precision"] == "int8" else 1.0)
        accuracy = 0.9 - 0.3 * (1 - budget) ** 2 - (0.01 if choices["precision"] == "int8" else 0.0)
        if rung == "full" and self.log is not None:
            with self.log.open("a") as f:
                f.write(f"{folder.name[:5]}\n")
        if rung == "predict":
            return Answer(rung=rung, costs={"latency": cost, "size": 4 * cost}, error=(1 - budget) ** 2)
        n = 1000
        return Answer(
            rung=rung,
            accuracy=accuracy,
            costs={"latency": cost, "size": 4 * cost},
            outcomes=bits(n, round(n * accuracy), identity="held"),
        )


def begin(folder: Path, n: int, **search: object) -> Trials:
    folder.mkdir(exist_ok=True)
    doc = document(n, **search)
    queue = anchors(doc, SPACE)[:n]
    return create(storage_of(str(folder)), "s", doc, 0, queue)


def test_every_candidate_is_tried_once_and_the_front_is_that_of_all(tmp_path: Path) -> None:
    trials = begin(tmp_path, 12)
    tally = work(trials, Synthetic(tmp_path / "log"), tmp_path / "trials", beat_s=1)
    found = trials.all()
    assert [t.slot for t in found] == list(range(12))
    assert all(t.finished for t in found)
    assert sum(tally.finished.values()) == 12
    done = [f"{t.slot:05d}" for t in found if t.state == "done"]
    assert sorted((tmp_path / "log").read_text().split()) == done
    assert all(t.state == "done" for t in found if t.anchor)
    accuracies = {t.slot: t.answers[-1].accuracy for t in found if t.state == "done"}
    for point in front(found, trials.config.objectives):
        cost = point.answer.costs["latency"]
        better = [s for s in accuracies if accuracies[s] > point.answer.accuracy + 0.05]
        assert all(found[s].answers[-1].costs["latency"] > cost for s in better)


def test_a_search_goes_on_and_may_be_made_longer(tmp_path: Path) -> None:
    trials = begin(tmp_path, 3)
    work(trials, Synthetic(), tmp_path / "trials", beat_s=1)
    again = begin(tmp_path, 5)
    assert [t.state for t in again.all()][3:] == ["waiting", "waiting"]
    work(again, Synthetic(), tmp_path / "trials", beat_s=1)
    assert all(t.finished for t in join(storage_of(str(tmp_path)), None).all())


def test_another_config_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    begin(tmp_path, 3)
    with pytest.raises(BadInput, match="another config"):
        begin(tmp_path, 3, eta=4)


def test_another_version_is_refused(tmp_path: Path) -> None:
    begin(tmp_path, 3).study.set_user_attr("version", "0.0.0")
    with pytest.raises(BadInput, match=r"0\.0\.0"):
        join(storage_of(str(tmp_path)), None)


def test_a_stranger_s_study_is_refused(tmp_path: Path) -> None:
    optuna.create_study(storage=storage_of(str(tmp_path)), study_name="x")
    with pytest.raises(BadInput, match="something else"):
        join(storage_of(str(tmp_path)), "x")


def test_a_storage_that_is_away_is_an_error_of_the_environment() -> None:
    pytest.importorskip("psycopg", reason="the driver of PostgreSQL is not installed")
    with pytest.raises(EnvironmentFailed, match=r"refused|connect"):
        storage_of("postgresql://nobody@127.0.0.1:9/none")


def test_stop_leaves_the_trial_to_whoever_goes_on(tmp_path: Path) -> None:
    trials = begin(tmp_path, 4)

    class Stops(Synthetic):
        def answer(self, rung, choices, folder):
            trials.stop(True)
            return super().answer(rung, choices, folder)

    work(trials, Stops(), tmp_path / "trials", beat_s=1)
    assert not any(t.finished for t in trials.all())
    assert work(trials, Synthetic(), tmp_path / "trials", beat_s=1).finished == {}
    trials.stop(False)
    other = join(storage_of(str(tmp_path)), None)
    other.config = other.config.model_copy(update={"lease_s": 0.2})
    work(other, Synthetic(), tmp_path / "trials", beat_s=0.2)
    assert all(t.finished for t in other.all())


def test_a_line_that_a_crash_cut_is_taken_out(tmp_path: Path) -> None:
    trials = begin(tmp_path, 2)
    with (tmp_path / searches.JOURNAL).open("ab") as f:
        f.write(b'{"op_code":4,"worker_i')
    work(trials, Synthetic(), tmp_path / "trials", beat_s=1)
    assert all(t.finished for t in join(storage_of(str(tmp_path)), None).all())


def test_a_worker_that_was_taken_for_dead_does_not_count_twice(tmp_path: Path) -> None:
    slow = begin(tmp_path, 1)
    lease = slow.claim()
    assert lease is not None
    other = join(storage_of(str(tmp_path)), None)
    other.config = other.config.model_copy(update={"lease_s": 0.05})
    other.rescue()
    time.sleep(0.1)
    assert other.rescue() == [0]
    work(other, Synthetic(), tmp_path / "trials", beat_s=1)
    lease.record(Answer(rung="full", accuracy=1.0, costs={"latency": 0.0, "size": 0.0}))
    assert not lease.finish("done")
    (only,) = other.all()
    assert only.state == "done"
    assert only.answers[-1].accuracy < 1.0


def test_a_slot_whose_rescuer_died_is_queued_again(tmp_path: Path) -> None:
    trials = begin(tmp_path, 1)
    lease = trials.claim()
    assert lease is not None
    trials.study.tell(lease.trial.number, state=optuna.trial.TrialState.FAIL)  # and dies before it queues the slot again
    other = join(storage_of(str(tmp_path)), None)
    assert other.rescue() == [0]
    assert other.rescue() == []
    work(other, Synthetic(), tmp_path / "trials", beat_s=1)
    assert [t.state for t in other.all()] == ["done"]


WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_search import Synthetic
from rescompress.search.study import join, storage_of
from rescompress.search.worker import work
trials = join(storage_of({address!r}), "s", seed=int(sys.argv[1]))
work(trials, Synthetic(Path({log!r}), pause={pause}), Path({folder!r}), beat_s=0.1)
"""


def start_workers(address: str, folder: Path, n: int, pause: float) -> list[subprocess.Popen[bytes]]:
    code = WORKER.format(
        tests=str(Path(__file__).parent), address=address, log=str(folder / "log"), folder=str(folder / "trials"), pause=pause
    )
    return [subprocess.Popen([sys.executable, "-c", code, str(i)]) for i in range(n)]


def kill_at_random(address: str, folder: Path, *, kills: int, workers: int, seed: int) -> None:
    """Keep some workers going, kill random ones as hard as can be, and wait for the rest."""
    rng = random.Random(seed)
    living = start_workers(address, folder, workers, 0.02)
    for _ in range(kills):
        time.sleep(rng.uniform(0.1, 0.8))
        victim = rng.randrange(workers)
        living[victim].send_signal(signal.SIGKILL)
        living[victim].wait()
        living[victim] = start_workers(address, folder, 1, 0.02)[0]
    for process in living:
        assert process.wait(timeout=240) == 0


def assert_nothing_lost(trials: Trials, folder: Path) -> None:
    found = trials.all()
    assert [t.slot for t in found] == list(range(trials.config.trials))
    assert all(t.finished for t in found)
    counted = [
        t.user_attrs["slot"]
        for t in trials.study.get_trials(deepcopy=False)
        if t.state.is_finished() and (t.user_attrs.get("end") or {}).get("state") in ("done", "stopped")
    ]
    assert sorted(counted) == sorted(set(counted)), "a slot was counted twice"


@pytest.mark.slow
def test_forty_kills_lose_no_trial_and_count_none_twice(tmp_path: Path) -> None:
    begin(tmp_path, 60, lease_s=2.0)
    kill_at_random(str(tmp_path), tmp_path, kills=40, workers=3, seed=0)
    assert_nothing_lost(join(storage_of(str(tmp_path)), None), tmp_path)


def test_some_kills_lose_no_trial(tmp_path: Path) -> None:
    begin(tmp_path, 8, lease_s=1.0)
    kill_at_random(str(tmp_path), tmp_path, kills=2, workers=2, seed=1)
    assert_nothing_lost(join(storage_of(str(tmp_path)), None), tmp_path)


def test_a_clock_that_jumps_takes_nobody_s_work_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = begin(tmp_path, 1)
    lease = trials.claim()
    assert lease is not None
    other = join(storage_of(str(tmp_path)), None)
    other.rescue()
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert other.rescue() == []


# --- the ladder


def answer(accuracy: float, cost: float, *, n: int = 1000, flips: int = 0) -> Answer:
    return Answer(
        rung="oneshot",
        accuracy=accuracy,
        costs={"latency": cost},
        outcomes=bits(n, round(n * accuracy), flips=flips, identity="held"),
    )


def test_what_nothing_beats_climbs_and_what_is_surely_beaten_stops() -> None:
    others = [answer(0.9, 1.0), answer(0.8, 0.5), answer(0.7, 0.2)]
    assert climbs(answer(0.75, 0.4), others, 3)[0]
    assert climbs(answer(0.85, 0.45), others, 3)[0]
    up, why = climbs(answer(0.5, 0.6), others, 3)
    assert not up
    assert "beyond its interval" in why


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 20)), min_size=1, max_size=25), st.integers(2, 4))
def test_no_candidate_on_the_front_of_a_rung_ever_stops(seen: list[tuple[int, int]], eta: int) -> None:
    answers = [answer(a / 100, c / 10, n=100) for a, c in seen]
    for i, mine in enumerate(answers):
        others = answers[:i]
        beaten = any(
            o.accuracy >= mine.accuracy
            and o.costs["latency"] <= mine.costs["latency"]
            and (o.accuracy > mine.accuracy or o.costs["latency"] < mine.costs["latency"])
            for o in others
        )
        if not beaten:
            assert climbs(mine, others, eta)[0]


def test_rank_correlation_is_that_of_scipy() -> None:
    from scipy.stats import spearmanr

    rng = random.Random(0)
    trials = []
    for slot in range(20):
        a = rng.choice([0.5, 0.6, 0.7, 0.8])
        low = answer(a, 1.0)
        high = answer(min(1.0, max(0.0, a + rng.uniform(-0.1, 0.1))), 1.0).model_copy(update={"rung": "full"})
        trials.append(Trial(slot, slot, {}, False, "done", (low, high)))
    found = rank_correlation(trials, "oneshot", "full")
    assert found is not None
    expected = spearmanr([t.answers[0].accuracy for t in trials], [t.answers[1].accuracy for t in trials]).statistic
    assert math.isclose(found[0], expected, abs_tol=1e-12)


# --- the front


def test_points_leave_the_front_only_beyond_the_interval() -> None:
    def trial(slot: int, accuracy: float, cost: float) -> Trial:
        return Trial(slot, slot, {}, False, "done", (answer(accuracy, cost).model_copy(update={"rung": "full"}),))

    found = front([trial(0, 0.90, 1.0), trial(1, 0.899, 1.5), trial(2, 0.80, 1.2), trial(3, 0.6, 0.1)], ["latency"])
    assert [p.trial.slot for p in found] == [3, 0, 1]
    assert [p.clear for p in found] == [True, True, False]


def test_the_best_is_truly_good_enough_in_nineteen_of_twenty_cases() -> None:
    """Planted truths at the margin, many candidates: the chance that any worse one passes stays below 5 %."""
    rng = random.Random(1)
    n, margin, wrong, runs = 600, 0.01, 0, 400
    for _ in range(runs):
        dense = [rng.random() < 0.9 for _ in range(n)]
        candidates, truth = {}, {}
        for slot in range(6):
            extra = rng.choice([0.0, margin, margin + 0.005])
            lose, win = 0.03 + extra, 0.03
            # P(lost) - P(won) = extra exactly: flips drawn whatever the dense network says
            kind = [rng.random() for _ in range(n)]
            candidates[slot] = [
                (False if d else d) if k < lose and d else (True if lose <= k < lose + win and not d else d)
                for d, k in zip(dense, kind, strict=True)
            ]
            truth[slot] = 0.9 * lose - 0.1 * win
        passed = good_enough(Outcomes.pack(dense, "v"), {s: Outcomes.pack(c, "v") for s, c in candidates.items()}, margin)
        wrong += any(passed[s] and truth[s] > margin for s in passed)
    assert wrong / runs < 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)


def test_only_outcomes_of_the_same_images_are_compared() -> None:
    assert paired(bits(10, 5), bits(10, 5, identity="other")) is None
    assert good_enough(bits(10, 5), {0: bits(10, 5, identity="other")}, 0.5) == {0: False}


def test_p_values_fall_with_the_margin() -> None:
    pair = paired(bits(1000, 900), bits(1000, 890))
    assert pair is not None
    assert p_value(pair, 0.005) > p_value(pair, 0.02) > p_value(pair, 0.05)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), max_size=8))
@settings(max_examples=60)
def test_hypervolume_counts_the_cells_that_points_dominate(points: list[tuple[int, int, int]]) -> None:
    cells = {(x, y, z) for px, py, pz in points for x in range(px, 6) for y in range(py, 6) for z in range(pz, 6)}
    assert hypervolume(points, (6, 6, 6)) == len(cells)


# --- the space


@pytest.mark.parametrize(
    ("space", "word"),
    [
        ({"prune.scope": []}, "no choices"),
        ({"prune.scope": "inner"}, "neither"),
        ({"budget": {"macs": {"low": 0.5, "high": 0.1}}}, "above"),
        ({"budget": {"speed": {"low": 0.1, "high": 0.5}}}, "kind of budget"),
        ({"budget": {"macs": [0.5, 1.5]}}, "fraction"),
        ({"precision": ["int4"]}, "int8 and float"),
        ({"finetune.epochs": {"low": 0, "high": 2, "log": True}}, "above 0"),
        ({"prune.scope": ["inner", "inner"]}, "twice"),
    ],
)
def test_an_impossible_space_is_named(space: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        SearchConfig(space=space)


def test_a_candidate_is_an_ordinary_config() -> None:
    doc = {"prune": {"macs": 0.5, "scope": "inner"}, "finetune": {"epochs": 4}, "quantize": {"mode": "qat"}, "search": {}}
    made = candidate(doc, {"budget.kind": "latency", "budget.latency": 0.3, "budget.macs": 0.9, "precision": "float"})
    assert made == {"prune": {"latency": 0.3, "scope": "inner"}, "finetune": {"epochs": 4}, "quantize": None}
    assert candidate(doc, {"precision": "int8"})["quantize"] == {"mode": "qat"}


def test_the_default_space_searches_what_the_config_does() -> None:
    doc = {"finetune": {"epochs": 4}, "quantize": {"mode": "qat"}, "prune": {"scope": "inner"}}
    space = default_space(doc)
    assert dimensions(space)["finetune.epochs"] == (2.0, 4)
    first = anchors(doc, space)
    assert [a["budget.macs"] for a in first] == [1.0, 0.7, 0.5, 0.3, 0.2]
    assert all(a["precision"] == "int8" and a["finetune.epochs"] == 4 for a in first)


def test_rungs_stand_in_order() -> None:
    with pytest.raises(ValueError, match="order"):
        SearchConfig(rungs=("full", "predict"))
    with pytest.raises(ValueError, match="'full' is missing"):
        SearchConfig(rungs=("predict",))
    assert SearchConfig().rungs == RUNGS


# --- the page


def test_the_page_of_a_search_shows_the_front(tmp_path: Path) -> None:
    from rescompress.core.manifest import Manifest, StageResult
    from rescompress.core.metric import accuracy
    from rescompress.report.html import page
    from rescompress.search.show import search_document

    trials = begin(tmp_path, 30, sampler="random")
    work(trials, Synthetic(), tmp_path / "trials", beat_s=1)
    document = json.loads(json.dumps(search_document(trials)))
    done = [t for t in trials.all() if t.state == "done"]
    assert len(document["candidates"]) == len(done)
    volumes = document["hypervolume"]
    assert volumes == sorted(volumes)
    assert 0 < volumes[-1] <= 1
    stage = StageResult(
        stage="dense", status="done", metrics={"top1": accuracy(9, 10, runtime="torch")}, details={"search": document}
    )
    text = page([("s", Manifest(stages=(stage,)))])
    assert "The front, and how it was found" in text
    assert "Accuracy against latency" in text
    assert "Hypervolume of the front" in text


@pytest.mark.parametrize("document", [3, [], {}, {"candidates": 3}, {"candidates": [3, {"accuracy": "x"}], "units": {"a": 1}}])
def test_a_search_of_another_form_breaks_no_page(document: object) -> None:
    from rescompress.core.manifest import Manifest, StageResult
    from rescompress.report.html import page

    stage = StageResult(stage="dense", status="done", details={"search": document})
    assert "<html" in page([("s", Manifest(stages=(stage,)))])
