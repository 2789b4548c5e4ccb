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

from rescompress.core.errors import BadInput, BudgetError, EnvironmentFailed
from rescompress.core.outcomes import Outcomes
from rescompress.runs import claims
from rescompress.runs.search_settings import RUNGS, SearchConfig, anchors, candidate, default_space, dimensions, grid, planned
from rescompress.search import study as searches
from rescompress.search import worker
from rescompress.search.front import front, good_enough, hypervolume, p_value, surely_beats
from rescompress.search.ladder import beats, climbs, guessed, paired, rank_correlation, surely_better
from rescompress.search.study import Answer, Trial, Trials, create, join, storage_of
from rescompress.search.worker import own_folder, work

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


def test_a_process_of_another_machine_is_not_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers and cloned hosts share names, and count their processes apart."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for host, dead in ((searches._host(), True), (searches._host().split()[0] + " other other", False)):
        assert searches._dead_here({"host": host, "pid": gone.pid}) == dead


def test_slots_are_queued_as_they_are_needed(tmp_path: Path) -> None:
    trials = begin(tmp_path, 50)
    assert len(trials.everything()) == 5
    assert [t.slot for t in trials.all()] == list(range(50))
    work(trials, Synthetic(), tmp_path / "trials", beat_s=1)
    found = join(storage_of(str(tmp_path)), None)
    assert_nothing_lost(found, tmp_path)
    assert len(found.everything()) == 50


def test_two_that_queue_the_same_slots_count_them_once(tmp_path: Path) -> None:
    one, two = begin(tmp_path, 40), join(storage_of(str(tmp_path)), None)
    everything = two.everything()
    two._unsettled(everything)
    assert one._ahead()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two, "everything", lambda: everything)  # as it was before the other queued
        assert two._ahead()
    assert len(one.everything()) > 5 + searches.AHEAD
    work(one, Synthetic(), tmp_path / "trials", beat_s=1)
    assert_nothing_lost(one, tmp_path)


FULL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_search import Synthetic
from rescompress.core.errors import EnvironmentFailed
from rescompress.search import study
from rescompress.search.worker import work
trials = study.join(study.storage_of({address!r}), "s")
study.PATIENCE_S = 0.3
room = Path({address!r}, study.JOURNAL).stat().st_size + {room}
resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
try:
    work(trials, Synthetic(), Path({folder!r}), beat_s=1)
except EnvironmentFailed as e:
    sys.exit(7 if "storage failed" in str(e) else 1)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="files have no limit of their size here")
@pytest.mark.parametrize("room", [5000, pytest.param(150, marks=pytest.mark.slow)])
def test_a_full_disk_loses_no_trial(tmp_path: Path, room: int) -> None:
    begin(tmp_path, 8, lease_s=0.5)
    code = FULL.format(tests=str(Path(__file__).parent), address=str(tmp_path), folder=str(tmp_path / "trials"), room=room)
    assert subprocess.run([sys.executable, "-c", code]).returncode == 7
    text = (tmp_path / searches.JOURNAL).read_bytes()
    assert all(json.loads(line) for line in text.splitlines()), "no line is cut"
    after = join(storage_of(str(tmp_path)), None)
    work(after, Synthetic(), tmp_path / "trials", beat_s=0.2)
    assert_nothing_lost(after, tmp_path)


def test_the_sampler_learns_which_budgets_no_network_meets(tmp_path: Path) -> None:
    class Half(Synthetic):
        def answer(self, rung, choices, folder):
            if choices["budget.macs"] < 0.6:
                raise BudgetError("the smallest reachable is 0.6 of the macs", where="macs")
            return super().answer(rung, choices, folder)

    trials = begin(tmp_path, 45)
    work(trials, Half(), tmp_path / "trials", beat_s=1)
    later = trials.all()[20:]
    assert sum(t.state == "impossible" for t in later) / len(later) < 0.35, "0.56 by chance"
    assert all(p.trial.state == "done" for p in front(trials.all(), trials.config.objectives))


class Plain(Synthetic):
    """Of float and INT8 the one is far dearer and no better; budgets come in steps of a tenth."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, float]] = []

    def answer(self, rung, choices, folder):
        budget = round(choices["budget.macs"], 1)
        cost = budget + (0 if choices["precision"] == "int8" else 50)
        network, costs = f"{choices['precision']} {budget}", {"latency": cost, "size": cost}
        if rung == "predict":
            return Answer(rung=rung, costs=costs, error=(1 - budget) ** 2, network=network)
        if rung == "full":
            self.made.append((choices["precision"], budget))
        right = round(1000 * (0.9 - 0.3 * (1 - budget) ** 2))
        return Answer(rung=rung, accuracy=right / 1000, costs=costs, outcomes=bits(1000, right, identity="held"))


def test_the_sampler_learns_from_what_stops_at_the_first_rung(tmp_path: Path) -> None:
    doc = document(50) | {"quantize": {"mode": "ptq"}}
    trials = create(storage_of(str(tmp_path)), "s", doc, 0, anchors(doc, SPACE))
    work(trials, Plain(), tmp_path / "trials", beat_s=1)
    later = trials.all()[20:]
    floats = sum(t.choices["precision"] == "float" for t in later) / len(later)
    assert floats < 0.4, "0.5 by chance, and 0.6 to 0.8 where the sampler hears nothing of them: what is new to it attracts it"


def test_the_same_network_is_made_once_however_its_budget_is_written(tmp_path: Path) -> None:
    trials, judge = begin(tmp_path, 40), Plain()
    work(trials, judge, tmp_path / "trials", beat_s=1)
    assert len(judge.made) == len(set(judge.made)) > 5
    said = [t.reason for t in trials.all() if "would be the network of trial" in t.reason]
    assert said
    assert all(t.state == "stopped" for t in trials.all() if t.reason in said)


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=12))
def test_a_guess_is_the_quality_of_the_candidate_that_errs_a_little_less(seen: list[tuple[int, bool]]) -> None:
    """Beside a search through all of them: of errors no larger the nearest, of larger ones the nearest."""
    mine = Answer(rung="predict", costs={"size": 7.0}, error=5.0)
    others = [
        Trial(i, i, {}, False, "done", (Answer(rung="predict", costs={"size": 2.0}, error=float(e)),
        *([Answer(rung="full", costs={"size": 3.0}, accuracy=1 - e / 10)] if full else [])))
        for i, (e, full) in enumerate(seen)
    ]  # fmt: skip
    known = [e for e, full in seen if full]
    found = guessed(mine, others, ["size"])
    if not known:
        assert found == []
        return
    nearest = max((e for e in known if e <= 5), default=min(known))
    assert found == [1 - nearest / 10, 8.0]


# --- folders and storages of others


def test_a_folder_belongs_to_one_search(tmp_path: Path) -> None:
    own_folder(tmp_path / "s", "a", None)
    own_folder(tmp_path / "s", "a", None)
    for name, storage in (("b", None), ("a", "postgresql://me:secret@host/x")):
        with pytest.raises(BadInput, match="holds the search 'a'"):
            own_folder(tmp_path / "s", name, storage)
    own_folder(tmp_path / "p", "a", "postgresql://me:secret@hots/x", mark=False)  # which nobody could reach
    own_folder(tmp_path / "p", "a", "postgresql://me:secret@host/x")
    assert "secret" not in (tmp_path / "p" / "search.json").read_text()
    with pytest.raises(BadInput, match="holds the search 'a'"):
        claims.check_own(tmp_path / "p")
    claims.check_own(tmp_path / "p" / "trials")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    with pytest.raises(BadInput, match="holds a run"):
        own_folder(tmp_path / "run", "a", None)


def test_a_worker_with_other_files_is_refused(tmp_path: Path) -> None:
    class Files:
        def __init__(self, data: str) -> None:
            self.data = data

        def identity(self) -> dict[str, str]:
            return {"checkpoint": "a", "data": self.data}

    trials = begin(tmp_path, 2)
    worker.agree(trials, Files("one"))  # type: ignore[arg-type]
    worker.agree(join(storage_of(str(tmp_path)), None), Files("one"))  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="the data here is not the one"):
        worker.agree(trials, Files("other"))  # type: ignore[arg-type]


def test_a_stranger_s_study_is_not_taken_over(tmp_path: Path) -> None:
    study = optuna.create_study(
        storage=storage_of(str(tmp_path)), study_name="s", directions=["maximize", "minimize", "minimize"]
    )
    study.set_user_attr("owner", "somebody")
    with pytest.raises(BadInput, match="something else"):
        begin(tmp_path, 3)


@pytest.mark.parametrize("text", ["garbage\n", '{"op_code": 4}\n', '"x"\n', "[]\n", '{"op_code": 0}\n{}\n'])
def test_a_damaged_journal_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / searches.JOURNAL).write_text(text)
    with pytest.raises(BadInput, match="damaged"):
        join(storage_of(str(tmp_path)), None)


def test_workers_do_not_show_the_password_to_everybody() -> None:
    from rescompress.cli.search import STORAGE, helper_of

    words, variables = helper_of("postgresql://me:secret@host/x", Path("f"), "s", 2, "cpu", 1.0, None)
    assert not any("secret" in word for word in words)
    assert variables[STORAGE] == "postgresql://me:secret@host/x"


def test_who_waits_to_measure_gets_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that train may hold the machine in turns that overlap: who comes after one that measures waits, too."""
    import tempfile
    import threading

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    order: list[str] = []

    def enter(name: str, *, exclusive: bool) -> threading.Thread:
        def run() -> None:
            with worker._machine(exclusive=exclusive):
                order.append(name)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        time.sleep(0.1)
        return thread

    with worker._machine(exclusive=False):
        others = [
            enter("trains beside", exclusive=False),
            enter("measures", exclusive=True),
            enter("trains after", exclusive=False),
        ]
        assert order == ["trains beside"]
    for thread in others:
        thread.join(timeout=5)
    assert order == ["trains beside", "measures", "trains after"]


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


@pytest.mark.parametrize("runs", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_the_best_is_truly_good_enough_in_nineteen_of_twenty_cases(runs: int) -> None:
    """Planted truths at and beyond the margin, many candidates: any worse one passes in at most 5 % of the searches."""
    import numpy as np

    rng = np.random.default_rng(1)
    n, margin, wrong, found = 600, 0.01, 0, 0
    for _ in range(runs):
        dense = rng.random(n) < 0.9
        known, truth = {}, {}
        for slot in range(6):
            # of what the dense network has right, a share is lost; of the rest, a share is won: the drop is known exactly
            drop = rng.choice([-0.02, margin + 1e-9, margin + 0.005])
            won = 0.3
            lost = (drop + 0.1 * won) / 0.9
            flips = rng.random(n)
            right = np.where(dense, flips >= lost, flips < won)
            known[slot], truth[slot] = Outcomes.pack(right.tolist(), "v"), drop
        passed = good_enough(Outcomes.pack(dense.tolist(), "v"), known, margin)
        wrong += any(passed[s] and truth[s] > margin for s in passed)
        found += any(passed.values())
    assert wrong / runs <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs) * (runs < 2000)
    assert found / runs > 0.1, "a test that lets nobody pass proves nothing"


def test_only_outcomes_of_the_same_images_are_compared() -> None:
    assert paired(bits(10, 5), bits(10, 5, identity="other")) is None
    assert good_enough(bits(10, 5), {0: bits(10, 5, identity="other")}, 0.5) == {0: False}


def with_copies(right: list[bool], times: int) -> Outcomes:
    n = len(right)
    return Outcomes.pack(right * times, "held", copies=range(n, n * times))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40), st.integers(2, 5))
def test_copies_of_a_picture_count_once(rows: list[tuple[bool, bool]], times: int) -> None:
    """Copies are no evidence: the comparison, and all that follows from it, is that without them."""
    a, b = [r[0] for r in rows], [r[1] for r in rows]
    assert paired(with_copies(a, times), with_copies(b, times)) == paired(with_copies(a, 1), with_copies(b, 1))


def test_copies_make_neither_the_front_nor_the_best_surer() -> None:
    better, worse = [True] * 20, [True] * 18 + [False] * 2
    answers = [
        Answer(rung="full", accuracy=sum(r) / 20, costs={"latency": c}, outcomes=with_copies(r, 50))
        for r, c in ((better, 1.0), (worse, 2.0))
    ]
    trials = [Trial(i, i, {}, False, "done", (a,)) for i, a in enumerate(answers)]
    assert [p.trial.slot for p in front(trials, ["latency"])] == [0, 1]
    assert climbs(answers[1], answers[:1], 3) != (False, "stops: one that costs no more is more accurate beyond its interval")
    assert good_enough(with_copies(better, 50), {0: with_copies(better, 50)}, 0.01) == {0: False}


@given(st.integers(0, 60), st.integers(0, 60), st.integers(120, 2000))
def test_surely_better_is_the_lower_bound_of_the_gate(lost: int, won: int, n: int) -> None:
    from rescompress.show.gate.tango import lower_bound

    a = [True] * lost + [False] * won + [True] * (n - lost - won)
    b = [False] * lost + [True] * won + [True] * (n - lost - won)
    answers = [Answer(rung="full", accuracy=0.5, costs={}, outcomes=Outcomes.pack(x, "held")) for x in (a, b)]
    counts = paired(Outcomes.pack(a, "held"), Outcomes.pack(b, "held"))
    assert counts is not None
    assert surely_better(*answers) == (lower_bound(counts, 0.95) > 1e-12)


@given(st.lists(st.tuples(st.integers(50, 100), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2)), max_size=20))
@settings(max_examples=50)
def test_the_front_is_that_of_every_pair_compared(rows: list[tuple[int, int, int, int]]) -> None:
    trials = []
    for slot, (right, x, y, wide) in enumerate(rows):
        band = {"latency": (x - wide / 2, x + wide / 2)} if wide else {}
        costs = {"latency": float(x), "size": float(y)}
        found = Answer(rung="full", accuracy=right / 100, costs=costs, band=band, outcomes=bits(100, right, identity="held"))
        trials.append(Trial(slot, slot, {}, False, "done", (found,)))
    answers = [t.answers[0] for t in trials]
    kept = [t.slot for t in trials if not any(surely_beats(o, t.answers[0]) for o in answers if o is not t.answers[0])]
    assert sorted(p.trial.slot for p in front(trials, ["latency", "size"])) == kept
    for point in front(trials, ["latency", "size"]):
        others = [a for a in answers if a is not point.answer]
        assert point.clear == (not any(beats(a, point.answer) for a in others))


@given(st.integers(1, 500), st.data())
def test_sureness_never_outweighs_an_image_and_orders_equal_accuracies(n: int, data: st.DataObject) -> None:
    def one() -> Answer:
        right, sure = data.draw(st.integers(0, n)), data.draw(st.floats(0, 1))
        return Answer(rung="full", accuracy=right / n, sureness=sure, costs={}, outcomes=bits(n, right))

    a, b = one(), one()
    if a.accuracy != b.accuracy:
        assert (a.quality > b.quality) == (a.accuracy > b.accuracy)
    else:
        assert (a.quality >= b.quality) == (a.sureness >= b.sureness) or math.isclose(a.quality, b.quality)


def test_where_all_images_are_right_the_surer_network_is_not_beaten_by_a_cheaper_one() -> None:
    cheap, sure = (
        Answer(rung="oneshot", accuracy=1.0, sureness=s, costs={"latency": c}, outcomes=bits(100, 100))
        for s, c in ((0.9, 1), (0.99, 2))
    )
    assert climbs(sure, [cheap], 3)[1].startswith("climbs: nothing")
    assert not beats(cheap, sure)


def test_p_values_fall_with_the_margin() -> None:
    pair = paired(bits(1000, 900), bits(1000, 890))
    assert pair is not None
    assert p_value(pair, 0.005) > p_value(pair, 0.02) > p_value(pair, 0.05)


@given(st.integers(1, 4).flatmap(lambda d: st.lists(st.tuples(*[st.integers(0, 4)] * d), min_size=1, max_size=8)))
@settings(max_examples=100)
def test_hypervolume_counts_the_cells_that_points_dominate(points: list[tuple[int, ...]]) -> None:
    import itertools

    whole = itertools.product(range(4), repeat=len(points[0]))
    cells = sum(any(all(x <= c for x, c in zip(p, cell, strict=True)) for p in points) for cell in whole)
    assert hypervolume(points, (4,) * len(points[0])) == cells


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


def test_a_small_space_is_tried_whole_each_candidate_once() -> None:
    space = {"budget": {"macs": [0.5, 0.7], "params": [0.3]}, "precision": ["int8", "float"]}
    every = grid(space, 100)
    assert every is not None
    assert len(every) == len({json.dumps(c, sort_keys=True) for c in every}) == 6
    assert {"budget.kind": "params", "budget.params": 0.3, "precision": "float"} in every
    assert grid(space, 5) is None
    doc = {"quantize": {"mode": "ptq"}, "prune": {"macs": 0.5}}
    queue, anchored, total = planned(doc, space, 30)
    assert total == len(queue) == 6
    assert [c["budget.macs"] for c in queue[:anchored]] == [0.5, 0.7]
    assert all(c["precision"] == "int8" for c in queue[:anchored])
    assert planned(doc, space, 4) == (anchors(doc, space), 2, 4)


@pytest.mark.parametrize(
    "space", [{"prune.scope": ["inner"]}, {"budget": {"macs": {"low": 0.5, "high": 0.5}}}, {"a": ["x"], "b": ["y"]}]
)
def test_a_space_without_choices_is_refused(space: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="single candidate"):
        planned({}, space, 30)


def test_steps_of_a_range_are_counted() -> None:
    assert grid({"x": {"low": 0.1, "high": 0.5, "step": 0.1}}, 9) == [{"x": pytest.approx(0.1 * i)} for i in range(1, 6)]
    assert grid({"x": {"low": 0.1, "high": 0.5}}, 9) is None


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
    from rescompress.search.show import search_document
    from rescompress.show.report.html import page

    trials = begin(tmp_path, 30, sampler="random")
    work(trials, Synthetic(), tmp_path / "trials", beat_s=1)
    document = json.loads(json.dumps(search_document(trials)))
    done = [t for t in trials.all() if t.state == "done"]
    assert len(document["candidates"]) == len(done)
    volumes = document["hypervolume"]
    assert volumes[0][0] == 1
    assert volumes[-1][0] == len(done)
    assert volumes == sorted(volumes, key=lambda item: item[1])
    assert 0 < volumes[-1][1] <= 1
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
    from rescompress.show.report.html import page

    stage = StageResult(stage="dense", status="done", details={"search": document})
    assert "<html" in page([("s", Manifest(stages=(stage,)))])
