"""Manifests, baselines and networks of earlier layouts: read, upgraded, and judged as before.

The files below ``data/layout1`` were written by the version before the second layout.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from report_factory import write_run

from rescompress.core.details import KINDS, DeployDetails, Details, PruneDetails, TargetDetails
from rescompress.core.errors import BadInput
from rescompress.core.manifest import SCHEMA_VERSION, Manifest, StageResult, load_manifest
from rescompress.show.figures.tables import rows_of, to_document
from rescompress.show.gate import judge, load_run
from rescompress.show.gate.limits import Limits

OLD = Path(__file__).parent / "data" / "layout1"


def test_a_manifest_of_the_first_layout_is_upgraded() -> None:
    written = json.loads((OLD / "manifest.json").read_text())
    assert written["schema_version"] == 1
    manifest = load_manifest(OLD)
    assert manifest.schema_version == SCHEMA_VERSION
    assert [(s.stage, s.kind, s.target) for s in manifest.stages] == [
        ("dense", "dense", None),
        ("prune", "prune", None),
        ("finetune", "finetune", None),
        ("quantize", "quantize", None),
        ("export", "export", None),
        ("target:cpu", "target", "cpu"),
        ("target:jetson", "target", "jetson"),
        ("target:rtx-4090", "target", "rtx-4090"),
        ("deploy:jetson-orin-nano-8gb-super", "deploy", "jetson-orin-nano-8gb-super"),
        ("prune-1", "prune", None),
        ("trial-00003", "trial", None),
    ]
    again = json.loads(manifest.model_dump_json())
    for old, new in zip(written["stages"], again["stages"], strict=True):
        assert {k: new[k] for k in old} == old, "nothing is lost"
    assert Manifest.model_validate(again) == manifest


def test_what_is_upgraded_is_typed() -> None:
    manifest = load_manifest(OLD)
    kinds = {s.stage: type(s.details) for s in manifest.stages}
    assert kinds["prune-1"] is PruneDetails
    assert kinds["target:cpu"] is TargetDetails
    assert kinds["deploy:jetson-orin-nano-8gb-super"] is DeployDetails
    cpu = manifest.stage("target:cpu")
    assert cpu is not None
    details = cpu.details_as(TargetDetails)
    assert details is not None
    assert len(details.latency_runs) == 5
    assert cpu.details_as(PruneDetails) is None


def test_an_old_run_and_the_same_run_written_now_have_the_same_rows(tmp_path: Path) -> None:
    old = load_manifest(OLD)
    new = write_run(tmp_path, dense_runs_ms=[2.6, 2.61, 2.62, 2.63, 2.64])
    names = {s.stage for s in new.stages}
    same = old.model_copy(update={"stages": tuple(s for s in old.stages if s.stage in names)})
    assert to_document(rows_of(same)) == to_document(rows_of(new))


def test_an_old_baseline_judges_a_new_run(tmp_path: Path) -> None:
    write_run(tmp_path / "new", dense_runs_ms=[2.6, 2.61, 2.62, 2.63, 2.64])
    report = judge(load_run(tmp_path / "new"), load_run(OLD / "baseline.json"), Limits(on_missing="pass"))
    verdicts = {c.name: c.verdict for c in report.checks}
    assert verdicts["accuracy"] == "pass"
    assert verdicts["latency:cpu"] in ("pass", "inconclusive")
    assert "latency:jetson" in verdicts


def test_a_layout_of_the_future_is_refused(tmp_path: Path) -> None:
    document = json.loads((OLD / "manifest.json").read_text()) | {"schema_version": SCHEMA_VERSION + 1}
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BadInput, match=f"layout {SCHEMA_VERSION + 1}"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_details_come_back_as_they_were_and_hold_what_was_given_alone(kind: str) -> None:
    given = {"notes": ["a note"], "from_another_version": {"kept": [1, 2]}}
    result = StageResult(stage="x", kind=kind, status="done", details=given)  # type: ignore[arg-type]
    assert type(result.details) is KINDS[kind]
    again = StageResult.model_validate_json(result.model_dump_json())
    assert again == result
    assert json.loads(result.model_dump_json())["details"] == given


def test_damaged_details_are_refused_with_their_place() -> None:
    for details, place in (({"latency_runs": [1, 2, "3"]}, "latency_runs.2"), ({"notes": 7}, "notes"), (7, "")):
        with pytest.raises(ValidationError, match=place):
            StageResult(stage="target:cpu", status="done", details=details)  # type: ignore[arg-type]


def test_a_kind_that_is_not_known_keeps_its_details() -> None:
    result = StageResult(stage="of-tomorrow", kind="distil", status="done", details={"x": 1})  # type: ignore[arg-type]
    assert type(result.details) is Details
    assert result.details.document() == {"x": 1}
    assert result.kind == "distil"
