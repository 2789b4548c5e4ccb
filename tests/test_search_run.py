"""Search on the real pipeline: shared work, no look at the evaluation split, the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Command, run_command

from rescompress.core.errors import BudgetError
from rescompress.core.manifest import load_manifest
from rescompress.runs.config import load_config
from rescompress.runs.search_settings import SearchConfig, anchors
from rescompress.runs.store import Store
from rescompress.search.study import create, storage_of
from rescompress.search.worker import Pipeline, agree, conclude, settings_of, work

pytest.importorskip("optuna")

EXAMPLES = Path(__file__).parents[1] / "examples"
SPACE = {"budget": {"macs": [0.7, 0.4]}, "precision": ["int8", "float"]}
QUICK = ("finetune=null", "quantize.mode=ptq")


def begin(folder: Path, n: int, overrides: tuple[str, ...] = QUICK, **section: Any) -> tuple[Any, Pipeline]:
    config = load_config(EXAMPLES / "search_digits.yaml", overrides)
    document = config.model_dump(mode="json")
    document["search"] = SearchConfig(trials=n, space=SPACE, sampler="random", **section).model_dump(mode="json")
    folder.mkdir(exist_ok=True)
    trials = create(storage_of(str(folder)), "s", document, 0, anchors(document, SPACE)[:n])
    settings = settings_of(document, device="cpu", threads=1, batch_size=None)
    return trials, Pipeline(document, settings, Store(folder / "store"))


@pytest.mark.slow
def test_work_is_shared_and_the_evaluation_split_is_read_once_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import compress.evaluate
    from compress.data import Split, load_dataset

    trials, pipeline = begin(tmp_path, 4)
    agree(trials, pipeline)
    from compress.checkpoints import load_checkpoint

    spec = load_checkpoint(Path(pipeline.document["checkpoint"])).spec
    bait = load_dataset("builtin:digits", spec).val
    forbidden = {row.tobytes() for row in bait.store.read(np.arange(len(bait)))}
    read: list[bool] = []
    plain = Split.pixels

    def watched(self: Split, index: Any) -> Any:
        x, y = plain(self, index)
        images = x.permute(0, 2, 3, 1).numpy()
        read.append(any(np.ascontiguousarray(image).tobytes() in forbidden for image in images))
        return x, y

    monkeypatch.setattr(Split, "pixels", watched)
    work(trials, pipeline, tmp_path / "trials")
    train = {row.tobytes() for row in load_dataset("builtin:digits", spec).train.store.read(np.arange(1437))}
    assert not (train & forbidden)
    assert read
    assert not any(read), "a choice saw the evaluation split"
    curves = list((tmp_path / "store").rglob("value.json"))
    assert len(curves) == 1, "curves of one network are measured once for all budgets"
    records = [json.loads(p.read_text()) for p in (tmp_path / "store" / "objects").rglob("result.json")]
    assert sum(r["stage"] == "dense" for r in records) == 1
    assert sum(r["stage"] == "prune" for r in records) <= 2  # two budgets, whatever the precision
    conclude(trials, pipeline, tmp_path / "trials")
    assert any(read)
    manifest = load_manifest(tmp_path)
    assert manifest.stages[0].stage == "dense"
    assert all("top1" in s.metrics and "p50_ms" in s.metrics for s in manifest.stages)
    assert compress.evaluate


def test_a_network_that_the_rung_before_had_is_not_evaluated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rescompress.core.artifact import Artifact
    from rescompress.core.manifest import StageResult
    from rescompress.core.outcomes import Outcomes
    from rescompress.search import forecast

    _, pipeline = begin(tmp_path / "s", 1)
    calls = []

    def evaluated(path: Path, *rest: Any) -> tuple[Outcomes, float]:
        calls.append(path.read_text())
        return Outcomes.pack([True] * len(calls), "held"), 0.5

    monkeypatch.setattr(forecast, "evaluate_file", evaluated)
    found = []
    for text in ("one", "one", "two"):
        (tmp_path / "net").write_text(text)
        artifact = Artifact.of("checkpoint", tmp_path / "net", tmp_path)
        stage = StageResult(stage="finetune", status="done", outputs=(artifact,))
        found.append(pipeline._on_held_out(stage, tmp_path)[0].n)
    assert calls == ["one", "two"]
    assert found == [1, 1, 2]


@pytest.mark.slow
def test_shared_curves_change_no_bit(tmp_path: Path) -> None:
    from rescompress.runs.pipeline import run_stages
    from rescompress.runs.plan import run_plan
    from rescompress.runs.reporter import Silent

    _, pipeline = begin(tmp_path, 1)
    config = pipeline.config({"budget.macs": 0.4, "precision": "float"})
    stages = [s for s in run_plan(config, pipeline.settings) if s.name in ("dense", "prune")]
    found = [
        run_stages(stages, tmp_path / name, {}, reporter=Silent(), store=store).manifest.stage("prune")
        for name, store in (("with", pipeline.store), ("without", None))
    ]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].checkpoint_sha256 == found[1].checkpoint_sha256


@pytest.mark.slow
def test_the_command_line_from_search_to_best(tmp_path: Path) -> None:
    config = EXAMPLES / "search_digits.yaml"
    sets = [word for key in QUICK for word in ("--set", key)]
    document = json.loads(
        run_command("search", config, *sets, "--trials", 3, "-o", tmp_path / "s", "--json", "--threads", 1, code=0).stdout
    )
    assert document["concluded"]
    assert document["front"]
    again = json.loads(run_command("search", "status", tmp_path / "s", "--json", code=0).stdout)
    assert again["states"]["done"] == 3
    best = json.loads(
        run_command(
            "search", "best", tmp_path / "s", "--max-drop", 5, "-o", tmp_path / "b.safetensors", "--json", code=0
        ).stdout
    )
    assert (tmp_path / "b.safetensors").is_file()
    assert best["trial"] in [row["trial"] for row in document["front"]]
    run_command("compare", tmp_path / "s", "--json", code=0)
    words = ("search", config, *sets, "--trials", 5, "-o", tmp_path / "s", "--minutes", 0, "--json", "--threads", 1)
    done = run_command(*words, code=0)
    assert "2 candidates are left" in done.stderr
    longer = json.loads(run_command(*words, "--conclude", code=0).stdout)
    assert longer["concluded"]
    assert [row["trial"] for row in longer["front"]] == [row["trial"] for row in document["front"]]
    run_command("report", tmp_path / "s", "-o", tmp_path / "page.html", code=0)
    run_command("gate", tmp_path / "s", "--baseline", tmp_path / "s", code=0)


def test_an_impossible_budget_ends_a_candidate_not_the_search(tmp_path: Path) -> None:
    trials, _ = begin(tmp_path, 2, lease_s=5)

    class Refuses:
        def rungs(self) -> tuple[str, ...]:
            return ("predict", "full")

        def answer(self, rung: str, choices: Any, folder: Path) -> Any:
            raise BudgetError("the smallest reachable is 0.5 of the macs", where="macs")

    work(trials, Refuses(), tmp_path / "trials", beat_s=1)  # type: ignore[arg-type]
    assert [t.state for t in trials.all()] == ["impossible", "impossible"]
    assert "0.5 of the macs" in trials.all()[0].reason


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--set", "search={space: {prune.scope: []}}"], 5, "no choices"),
        (["--set", "search={space: {prune.scop: [inner]}}"], 5, "scop"),
        (["--set", "search={space: {prune.scope: [outer]}}"], 5, "scope"),
        (["--set", "search={trials: 0}"], 5, "trials"),
        (["--storage", "postgresql://nobody@127.0.0.1:9/none"], 7, "reached"),
        (["--storage", "nosuch://x"], 4, "nosuch"),
    ],
)
def test_bad_input_of_a_search_is_named(rescompress: Command, tmp_path: Path, words: list[str], code: int, text: str) -> None:
    if "postgresql" in str(words):
        pytest.importorskip("psycopg", reason="the driver of PostgreSQL is not installed")
    done = rescompress("search", EXAMPLES / "search_digits.yaml", "-o", tmp_path / "s", *words, code=code)
    assert text in done.stderr
    assert not (tmp_path / "s" / "search.json").exists(), "the next try, with the right address, may have the folder"


def test_a_search_without_time_says_what_is_left(rescompress: Command, tmp_path: Path) -> None:
    sets = [word for key in QUICK for word in ("--set", key)]
    words = ("search", EXAMPLES / "search_digits.yaml", *sets, "--minutes", 0, "-o", tmp_path / "s")
    assert "30 candidates are left" in rescompress(*words, code=0).stderr
    done = rescompress(*words, "--conclude", code=5)
    assert "no candidate reached the top" in done.stderr
    assert "let it go on" in done.stderr


def test_a_folder_without_a_search_is_named(rescompress: Command, tmp_path: Path) -> None:
    for command in ("status", "front", "best", "stop", "worker"):
        assert "holds no search" in rescompress("search", command, tmp_path, code=5).stderr
