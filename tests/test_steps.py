"""The stages of a run as objects: the key is made of the fields, and knows the code that the outcome was made by."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from made_stages import Made

from edge_targets.board_probe import Probe
from edge_targets.catalog import load_target
from edge_targets.ssh import Board
from rescompress.core import plugins
from rescompress.core.errors import BadInput
from rescompress.core.settings import DeploySettings, ExportSettings, PruneSettings, QuantizeSettings, TrainSettings
from rescompress.runs import code
from rescompress.runs.pipeline import run_stages
from rescompress.runs.plan import Builder
from rescompress.runs.reporter import Silent
from rescompress.runs.settings import Settings
from rescompress.runs.stage import Opening, Outcome, Source
from rescompress.runs.steps import RESOLVED, Dense, Deploy, Export, Finetune, ForTarget, Machine, Prune, Quantize, Step

PROBE = Probe("Orin", "jetson-orin-nano-8gb", "trtexec", "10.3.0", "15W", "clocks", frozenset({"--fp16"}), True, 10**9)


def steps(folder: Path) -> list[Step]:
    """One step of each kind."""
    (folder / "net.pt").write_text("net")
    builder = Builder(Opening(folder / "net.pt"), Settings())
    return [
        builder.dense(),
        builder.prune(PruneSettings(), ["jetson"], "dense"),
        builder.finetune(TrainSettings(), "prune", "dense"),
        builder.quantize(QuantizeSettings(), "tensorrt", "finetune", None),
        builder.export("quantize", ExportSettings()),
        builder.target("jetson", "quantize", ExportSettings()),
        builder.deploy(DeploySettings(), Board("there"), PROBE),
    ]


OTHER: dict[str, Any] = {
    "source": Source(stage="another"),
    "common": Settings(seed=7),
    "targets": (load_target("cpu"),),
    "iteration": 3,
    "before": Source(stage="another"),
    "whole": Source(stage="another"),
    "teacher": Source(stage="another"),
    "profile": "openvino",
    "target": load_target("cpu"),
    "machine": Machine("another cpu", 3),
    "dense": Source(stage="another"),
    "require_engine": True,
    "board": Board("elsewhere"),
    "found": dataclasses.replace(PROBE, power_mode="MAXN"),
    "named": load_target("jetson"),
    "baseline": Source(stage="another"),
}
SETTINGS: dict[type[Step], Any] = {
    Prune: PruneSettings(calib=7),
    Finetune: TrainSettings(lr=0.5),
    Quantize: QuantizeSettings(calib=7),
    Export: ExportSettings(batch=2),
    ForTarget: ExportSettings(batch=2),
    Deploy: DeploySettings(runs=5),
}


@pytest.mark.parametrize("kind", [Dense, Prune, Finetune, Quantize, Export, ForTarget, Deploy])
def test_every_field_of_a_step_is_part_of_its_key(tmp_path: Path, kind: type[Step]) -> None:
    step = next(s for s in steps(tmp_path) if type(s) is kind)
    for field in (f for f in dataclasses.fields(step) if f.init):
        other = SETTINGS[kind] if field.name == "settings" else OTHER[field.name]
        changed = dataclasses.replace(step, **{field.name: other})
        assert (changed.depends, changed.name) != (step.depends, step.name), field.name


@pytest.mark.parametrize("settings", [PruneSettings(), TrainSettings(), QuantizeSettings(), ExportSettings(), DeploySettings()])
def test_every_field_of_the_settings_is_part_of_the_key(tmp_path: Path, settings: Any) -> None:
    step: Any = next(s for s in steps(tmp_path) if type(getattr(s, "settings", None)) is type(settings))
    assert set(step.depends["settings"]) == set(type(settings).model_fields) - RESOLVED


def test_a_step_reads_and_follows_what_its_fields_name(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    dense, *_ = steps(tmp_path)
    assert dense.reads == (tmp_path / "net.pt",)
    assert dense.after == ()
    builder = Builder(Opening(tmp_path / "net.pt"), Settings())
    prune = builder.prune(PruneSettings(plan=str(tmp_path / "plan.json")), [], "finetune-1", iteration=2, before="prune-1")
    assert prune.after == ("finetune-1", "prune-1", "dense")
    assert prune.reads == (tmp_path / "plan.json",)
    assert prune.writes == ("plan-2.json", "prune-2.safetensors", "prune-2.outcomes.json")
    assert prune.network == "finetune-1"


def test_a_deployment_is_about_what_stays_as_it_is_on_a_board_and_reads_its_pictures(tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_text("net")
    (tmp_path / "cat.png").write_text("cat")
    builder = Builder(Opening(tmp_path / "net.pt"), Settings())
    settings = DeploySettings(photo=(str(tmp_path / "cat.png"),))
    step = builder.deploy(settings, Board("there"), PROBE, named="jetson")
    passing = dataclasses.replace(PROBE, clocks="others", free_bytes=1, flags=frozenset())
    assert builder.deploy(settings, Board("there"), passing, named="jetson").depends == step.depends
    assert step.target.tensorrt_version == "10.3.0"
    assert step.reads == (tmp_path / "net.pt", tmp_path / "cat.png")
    before = step.depends
    (tmp_path / "cat.png").write_text("dog")
    assert dataclasses.replace(step).depends != before
    other = builder.deploy(settings, Board("there"), dataclasses.replace(PROBE, device="jetson-agx-orin-64gb"))
    assert not set(other.writes) & set(step.writes), "files of a board lie apart from those of another"


def test_a_key_knows_the_code_of_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: tmp_path / f"{name}.py" for name in ("reconstruct", "fpgm", "tensorrt")}
    for path in files.values():
        path.write_text("one = 1\n")
    monkeypatch.setattr(code, "package_hash", lambda: None)
    monkeypatch.setattr(plugins, "file_of", lambda package, name: files.get(name))
    before = {s.name: s.depends for s in steps(tmp_path)}
    files["fpgm"].write_text("one = 2\n")
    assert {s.name: s.depends for s in steps(tmp_path)} == before, "another method than the one that is used"
    files["reconstruct"].write_text("one = 22\n")
    after = {s.name: s.depends for s in steps(tmp_path)}
    assert {name for name in before if before[name] != after[name]} == {"prune"}
    files["tensorrt"].write_text("one = 22\n")
    last = {s.name: s.depends for s in steps(tmp_path)}
    assert {name for name in after if after[name] != last[name]} == {"target:jetson-orin-nano-8gb-super"}


def test_the_file_of_a_plugin_is_found_without_importing_it() -> None:
    found = plugins.file_of("compress.prune.methods", "reconstruct")
    assert found is not None
    assert found.name == "reconstruct.py"
    assert plugins.file_of("compress.prune.methods", "no-such-method") is None


def test_in_a_checkout_every_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(code, "PACKAGES", ("pack",))
    first = code.package_hash()
    (tmp_path / "pack" / "deep.py").write_text("x = 1\n")
    second = code.package_hash()
    assert first != second
    assert code.of()["package"] == second
    installed = tmp_path / "site-packages" / "pack2"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(installed.parent))
    monkeypatch.setattr(code, "PACKAGES", ("pack2",))
    assert code.package_hash() is None


def test_a_stage_can_be_repeated_by_name(tmp_path: Path) -> None:
    calls: list[str] = []

    def stage(name: str, after: tuple[str, ...] = ()) -> Made:
        def work(context: Any) -> Outcome:
            calls.append(name)
            (context.folder / name).write_text(name)
            return Outcome({}, [("checkpoint", context.folder / name)])

        return Made(name, {}, after, work)

    stages = [stage("one"), stage("two", ("one",))]
    run_stages(stages, tmp_path, {}, reporter=Silent())
    report = run_stages(stages, tmp_path, {}, reporter=Silent(), again=["two"])
    assert (report.ran, report.reused) == (("two",), ("one",))
    report = run_stages(stages, tmp_path, {}, reporter=Silent(), again=["one"])
    assert (report.ran, report.reused) == (("one",), ("two",)), "what came out the same is not followed by work"
    with pytest.raises(BadInput, match="'tow'") as caught:
        run_stages(stages, tmp_path, {}, reporter=Silent(), again=["tow"])
    assert "two" in str(caught.value.remedy)
    assert calls == ["one", "two", "two", "one"]
