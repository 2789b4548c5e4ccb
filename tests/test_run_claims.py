"""What a run writes over, and what it does not: its inputs, links, other people's files, another run's half-written ones."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from made_stages import Made
from manifest_mutants import mutants
from report_factory import write_run

from rescompress.core.artifact import (
    PARTIAL_PREFIX,
    atomic_path,
    file_sha256,
    open_regular,
    sweep_partial,
    write_text,
)
from rescompress.core.errors import BadInput, EnvironmentFailed
from rescompress.core.manifest import load_manifest
from rescompress.core.metric import counted
from rescompress.runs import claims
from rescompress.runs.fingerprint import file_identity, held_to
from rescompress.runs.pipeline import run_stages
from rescompress.runs.plan import Builder
from rescompress.runs.reporter import Silent
from rescompress.runs.settings import Settings
from rescompress.runs.stage import Context, Opening, Outcome, Stage

DIGITS = Path(__file__).parents[1] / "examples" / "resnet20_digits.safetensors"


class Notes(Silent):
    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def writer(name: str, *, reads: tuple[Path, ...] = (), place: str = "", text: str = "x") -> Stage:
    """A stage that writes one file at a place that it declares."""
    place = place or f"{name}.safetensors"

    def run(context: Context) -> Outcome:
        path = context.folder / place
        write_text(path, text)
        return Outcome({"size_bytes": counted(1, "bytes")}, [("checkpoint", path)])

    return Made(name, {"text": text}, (), run, reads=reads, writes=(place,))


def go(folder: Path, *stages: Stage, **more: Any) -> tuple[str, ...]:
    return run_stages(stages, folder, {}, reporter=Silent(), **more).ran


# A3: inputs --------------------------------------------------------------------------------------------------------------


def by_name(path: Path, folder: Path) -> Path:
    return path


def by_link(path: Path, folder: Path) -> Path:
    (folder / "link").symlink_to(path)
    return folder / "link"


def by_hard_link(path: Path, folder: Path) -> Path:
    os.link(path, folder / "hard")
    return folder / "hard"


def by_other_spelling(path: Path, folder: Path) -> Path:
    return path.parent / ".." / path.parent.name / path.name


@pytest.mark.parametrize("spelling", [by_name, by_link, by_hard_link, by_other_spelling])
@pytest.mark.parametrize("place", ["prune.safetensors", "plan.json", "cpu/model.onnx", ".stages/prune.json", "table.md"])
def test_a_run_does_not_write_over_what_it_reads(tmp_path: Path, spelling: Callable[[Path, Path], Path], place: str) -> None:
    out = tmp_path / "out"
    (out / place).parent.mkdir(parents=True)
    (out / place).write_text("the input")
    read = spelling(out / place, tmp_path)
    stage = writer("prune", place=place if place[0] not in ".t" else "")
    with pytest.raises(BadInput, match="would be replaced") as caught:
        go(out, dataclasses.replace(stage, reads=(read,)), force=True)
    assert caught.value.exit_code == 5
    with pytest.raises(BadInput, match="would be replaced"):
        go(out, stage, reads=[read], force=True)
    assert (out / place).read_text() == "the input"
    go(out, writer("other"), reads=[read] if place != "table.md" else [], force=True)


def test_every_file_that_stages_read_is_known(tmp_path: Path) -> None:
    from rescompress.core.settings import PruneSettings, QuantizeSettings, TrainSettings

    for name in ("net.pt", "teacher.pt", "plan.json"):
        (tmp_path / name).write_text(name)
    opening, teacher = Opening(tmp_path / "net.pt"), Opening(tmp_path / "teacher.pt")
    builder = Builder(opening, Settings())
    stages = [
        builder.dense(),
        builder.prune(PruneSettings(plan=str(tmp_path / "plan.json")), [], "dense"),
        builder.finetune(TrainSettings(), "prune", teacher),
        builder.quantize(QuantizeSettings(), "tensorrt", "finetune", teacher),
    ]
    assert [[p.name for p in s.reads] for s in stages] == [["net.pt"], ["plan.json"], ["teacher.pt"], ["teacher.pt"]]


def test_a_run_of_the_command_line_keeps_its_checkpoint(rescompress: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    kept = DIGITS.read_bytes()
    (tmp_path / "out" / "prune.safetensors").write_bytes(kept)
    config = tmp_path / "c.yaml"
    config.write_text("checkpoint: out/prune.safetensors\ndata: builtin:digits\nprune: {macs: 0.7}\ntargets: []\n")
    done = rescompress("run", config, "-o", tmp_path / "out", "--force", code=5)
    assert "would be replaced" in done.stderr
    assert (tmp_path / "out" / "prune.safetensors").read_bytes() == kept
    for setting in ("finetune={teacher: out/prune.safetensors}", "prune={plan: out/plan.json}"):
        (tmp_path / "out" / "plan.json").write_text("{}")
        done = rescompress("run", config, "-o", tmp_path / "out", "--set", f"checkpoint={DIGITS}", "--set", setting, code=5)
        assert "would be replaced" in done.stderr


# A4: half-written files --------------------------------------------------------------------------------------------------


def test_the_sweep_takes_what_was_left_and_nothing_else(tmp_path: Path) -> None:
    other = [
        tmp_path / ".partial-notes.txt",
        tmp_path / "sub" / f"{PARTIAL_PREFIX}abcdefgh.pt",
        tmp_path / f"{PARTIAL_PREFIX}short",
    ]
    left = [tmp_path / f"{PARTIAL_PREFIX}abcdefgh.pt", tmp_path / "cpu" / f"{PARTIAL_PREFIX}a_c4efgh"]
    for path in (*other, *left):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    go(tmp_path, writer("one"), writer("target:cpu", place="cpu/model.*".replace("*", "onnx")))
    assert all(p.exists() for p in other)
    assert not any(p.exists() for p in left)


def test_the_sweep_of_the_workspace_leaves_a_run_below_alone(tmp_path: Path) -> None:
    """Both processes hold a lock, of folders of their own; the half-written file has one, too."""
    with atomic_path(tmp_path / "cpu" / "model.onnx") as temporary:
        temporary.write_text("half")
        other = threading.Thread(target=go, args=(tmp_path, writer("target:cpu", place="cpu/float32-twin.onnx")))
        other.start()
        other.join()
        sweep_partial([temporary.parent])
        assert temporary.exists(), "it is still written"
    assert (tmp_path / "cpu" / "model.onnx").read_text() == "half"
    (tmp_path / "run" / ".stages").mkdir(parents=True)
    with atomic_path(tmp_path / "run" / "big.safetensors") as temporary:
        temporary.write_text("half")
        go(tmp_path, writer("prune"), workspace=True)
        assert temporary.exists()


def test_a_target_does_not_write_into_the_folder_of_a_run(tmp_path: Path) -> None:
    go(tmp_path / "cpu", writer("dense"))
    with pytest.raises(BadInput, match="folder of a run"):
        go(tmp_path, writer("target:cpu", place="cpu/model.onnx"), workspace=True)


# A6: links ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [".lock", ".stages", ".resume", "one.safetensors", ".stages/one.json", ".resume/one.pt", "cpu"]
)
@pytest.mark.parametrize("kind", ["link", "dangling link", "link to a folder", "pipe"])
def test_no_link_leads_out_of_a_run(tmp_path: Path, name: str, kind: str) -> None:
    out, home = tmp_path / "out", tmp_path / "home"
    (out / name).parent.mkdir(parents=True)
    home.mkdir()
    (home / "file").write_text("precious")
    if kind == "pipe":
        os.mkfifo(out / name)
    else:
        (out / name).symlink_to({"link": home / "file", "dangling link": home / "new", "link to a folder": home}[kind])
    with pytest.raises(BadInput):
        go(out, writer("one"), writer("target:cpu", place="cpu/model.onnx"), force=True)
    assert [p.name for p in home.iterdir()] == ["file"]
    assert (home / "file").read_text() == "precious"


def test_books_of_the_pipeline_replace_links_and_the_lock_empties_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    out = tmp_path / "out"
    go(out, writer("one"))
    for name in ("manifest.json", "table.md", ".stages/.claimed.json"):
        (home / name.replace("/", "")).write_text("precious")
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(home / name.replace("/", ""))
    (out / ".lock").unlink()
    (home / "lock").write_text("precious")
    os.link(home / "lock", out / ".lock")
    go(out, writer("one", text="y"), writer("two"))
    assert {p.read_text() for p in home.iterdir()} == {"precious"}
    assert len(load_manifest(out).stages) == 2
    assert not (out / "manifest.json").is_symlink()


def test_a_folder_that_is_a_link_and_an_intact_file_that_is_one_are_fine(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    assert go(tmp_path / "out", writer("one")) == ("one",)
    (tmp_path / "real" / "one.safetensors").rename(tmp_path / "store")
    (tmp_path / "real" / "one.safetensors").symlink_to(tmp_path / "store")
    assert go(tmp_path / "out", writer("one")) == ()


@pytest.mark.parametrize("where", ["../kept", "{folder}/kept"])
def test_a_record_that_names_a_file_elsewhere_is_not_believed(tmp_path: Path, where: str) -> None:
    out = tmp_path / "out"
    assert go(out, writer("one")) == ("one",)
    (tmp_path / "kept").write_bytes((out / "one.safetensors").read_bytes())
    for file in (out / ".stages" / "one.json", out / "manifest.json"):
        document = json.loads(file.read_text())
        for stage in document.get("stages", [document]):
            stage["outputs"][0]["path"] = where.format(folder=tmp_path)
        file.write_text(json.dumps(document))
    assert go(out, writer("one")) == ("one",)
    assert [a.path for a in load_manifest(out).stages[0].outputs] == ["one.safetensors"]


# A10: other people's files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one.safetensors", "table.md", "manifest.json", "cpu/model.onnx"])
def test_a_file_of_somebody_else_stays_until_force_says_otherwise(tmp_path: Path, name: str) -> None:
    stages = [writer("one"), writer("target:cpu", place="cpu/model.onnx")]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"name": "my web app"}')
    with pytest.raises(BadInput, match="did not write") as caught:
        go(tmp_path, *stages)
    assert "--force" in str(caught.value.remedy)
    assert (tmp_path / name).read_text() == '{"name": "my web app"}'
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == sorted({Path(name).name, ".lock"})
    assert go(tmp_path, *stages, force=True) == ("one", "target:cpu")
    assert go(tmp_path, *stages) == ()


def test_a_run_goes_on_over_its_own_files_whatever_is_recorded(tmp_path: Path) -> None:
    """Killed before its record, from a version without claims, copied without the hidden files: they are ours."""
    go(tmp_path, writer("one"), writer("two"))
    (tmp_path / ".stages" / "two.json").unlink()
    assert go(tmp_path, writer("one"), writer("two")) == ("two",)
    (tmp_path / ".stages" / ".claimed.json").unlink()
    (tmp_path / ".stages" / "two.json").unlink()
    assert go(tmp_path, writer("one"), writer("two")) == ("two",)
    (tmp_path / ".stages" / ".claimed.json").write_text("{")
    assert go(tmp_path, writer("one", text="y"), writer("two")) == ("one",)
    for path in (tmp_path / ".stages").iterdir():
        path.unlink()
    (tmp_path / ".stages").rmdir()
    assert go(tmp_path, writer("one"), writer("two")) == ("one", "two")
    (tmp_path / "three.safetensors").write_text("somebody's")
    with pytest.raises(BadInput, match="did not write"):
        go(tmp_path, writer("one"), writer("two"), writer("three"))


FILES = ("README.md", "labels.txt", "infer.py", "trt_builder.py", "build.sh", "model.json", "model.onnx", "SHA256SUMS")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an export leaves in its folder, without the network."""
    folder = tmp_path_factory.mktemp("bundle")
    for name in FILES:
        (folder / name).write_text(f"ours: {name}")
    (folder / "model.onnx").write_bytes(b"\x08\x08\x12\x0brescompress\x1a\x050.1.0")
    (folder / "model.xml").write_text("ours")
    (folder / "model.json").write_text(json.dumps(dict.fromkeys(("onnx_sha256", "preprocessing", "input_shape"))))
    sums = [f"{file_sha256(folder / name)}  {name}\n" for name in FILES[:-1]]
    (folder / "SHA256SUMS").write_text("".join(sums))
    return folder


@pytest.mark.parametrize("name", [*FILES, "model.xml"])
def test_an_export_replaces_its_own_files_alone(tmp_path: Path, bundle: Path, name: str) -> None:
    site, source = tmp_path / "site", tmp_path / "source"
    site.mkdir()
    source.mkdir()
    for file in FILES:
        (source / file).write_text("another export")
    (site / name).write_text("my own")
    names = [*FILES, "model.xml"]
    with pytest.raises(BadInput, match="no export wrote"):
        claims.check_delivery(source, site, names, force=False)
    claims.check_delivery(source, site, names, force=True)
    for file in bundle.iterdir():
        (site / file.name).write_bytes(file.read_bytes())
    claims.check_delivery(source, site, names, force=False)
    if name not in ("model.onnx", "model.xml", "model.json", "SHA256SUMS"):
        (site / name).write_text("edited")
        with pytest.raises(BadInput, match="edited"):
            claims.check_delivery(source, site, names, force=False)


def a_run(folder: Path) -> Path:
    go(folder, writer("one"))
    return folder


def test_no_other_command_writes_over_what_belongs_to_a_run(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    for name in ("manifest.json", ".lock", ".stages/one.json", ".stages/new", "one.safetensors"):
        with pytest.raises(BadInput, match="belongs to the run"):
            claims.check_outputs({"--output": run / name})
    (tmp_path / "link").symlink_to(run / "manifest.json")
    with pytest.raises(BadInput, match="belongs to the run"):
        claims.check_outputs({"--junit": tmp_path / "link"})
    with pytest.raises(BadInput, match="name one file"):
        claims.check_outputs({"--output": tmp_path / "x", "--model-card": tmp_path / "." / "x"})
    with pytest.raises(BadInput, match="would be replaced"):
        claims.check_outputs({"--output": tmp_path / "x"}, [tmp_path / "x"])
    claims.check_outputs({"--output": run / "report.html", "--model-card": run / "README.md", "--junit": None})
    claims.check_outputs({"--output": run / "one.safetensors"}, own=[run / "one.safetensors"])


@pytest.mark.parametrize(
    "words",
    [
        "report {run} -o {run}/manifest.json",
        "report {run} -o r.html --model-card r.html",
        "report {run} -o notes.md",
        "report {run} --model-card notes.md",
        "gate {run} -b {run} --junit {run}/manifest.json",
        "gate {run} --save-baseline {run}/manifest.json",
        "gate {run} -b {run} --summary notes.md",
        "gate {run} -b {run} --junit notes.md",
        "gate {run} -b {run} --limits notes.md --junit notes.md",
        "gate {run} --save-baseline notes.md",
        "lint net.onnx --fix notes.md",
        "init {run}/one.safetensors -o {run}/one.safetensors --force",
    ],
)
def test_commands_keep_manifests_and_files_of_others(rescompress: Any, tmp_path: Path, words: str) -> None:
    run = a_run(tmp_path / "run")
    (tmp_path / "notes.md").write_text("my notes about rescompress")
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 8, 8]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), tmp_path / "net.onnx")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    done = rescompress(*words.format(run=run).split(), cwd=tmp_path, code=5)
    assert "->" in done.stderr
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_gates_report_for_gitlab_replaces_no_other_file(rescompress: Any, tmp_path: Path) -> None:
    run, report = tmp_path / "run", tmp_path / "gl-code-quality-report.json"
    write_run(run)
    job = {"GITLAB_CI": "true", "CI_PROJECT_DIR": str(tmp_path)}
    for macs in ("1", "0.1", "1"):  # an empty list, findings, and over them an empty list again
        rescompress("gate", run, "-b", run, "--max-macs", macs, cwd=tmp_path, code=None, **job)
        assert isinstance(json.loads(report.read_text()), list)
    mine = '[{"check_name": "another tool"}]'
    report.write_text(mine)
    assert "did not write" in rescompress("gate", run, "-b", run, cwd=tmp_path, code=5, **job).stderr
    assert report.read_text() == mine


def test_commands_write_again_over_what_they_wrote(rescompress: Any, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (tmp_path / "empty.md").touch()
    for force in ([], [], ["--force"]):
        rescompress("report", run, "-o", "r.html", "--model-card", "README.md", *force, cwd=tmp_path)
        rescompress("gate", run, "--save-baseline", "b.json", *force, cwd=tmp_path)
        gate = ["gate", run, "-b", "b.json", "--max-macs", "1", "--junit", "j.xml", "--summary", "empty.md", *force]
        rescompress(*gate, cwd=tmp_path, code=None)
        assert (tmp_path / "j.xml").is_file() == (tmp_path / "empty.md").read_text().startswith("## ")
        if force:
            assert (tmp_path / "r.html").read_text().startswith("<!doctype")
        (tmp_path / "README.md").write_text("mine" if force else (tmp_path / "README.md").read_text())


# B1b: what is read is what the key is about ------------------------------------------------------------------------------


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    path.write_text("dense")
    sha256 = file_identity(str(path))
    with held_to(path, sha256):
        path.read_text()
    (tmp_path / "new").write_text("prune")
    with pytest.raises(BadInput, match="was changed") as caught, held_to(path, sha256):
        (tmp_path / "new").replace(path)
    assert caught.value.exit_code == 5
    with pytest.raises(BadInput, match="was changed"), held_to(path, sha256):
        pass


@pytest.mark.parametrize("which", ["net.safetensors", "plan.json", "teacher.safetensors"])
def test_a_stage_does_not_read_another_file_than_its_key_is_about(tmp_path: Path, which: str) -> None:
    """Replaced between the plan of the run and the stage: it fails and records nothing under the old key."""
    from rescompress.core.settings import PruneSettings, TrainSettings

    for name in ("net.safetensors", "teacher.safetensors"):
        (tmp_path / name).write_bytes(DIGITS.read_bytes())
    (tmp_path / "plan.json").write_text("{}")
    builder = Builder(Opening(tmp_path / "net.safetensors"), Settings(data="builtin:digits"))
    opening, plan = builder.opening, PruneSettings(plan=str(tmp_path / "plan.json"))
    stage = {
        "net.safetensors": lambda: builder.dense(),
        "plan.json": lambda: builder.prune(plan, [], opening),
        "teacher.safetensors": lambda: builder.finetune(TrainSettings(epochs=0.1), opening, Opening(tmp_path / which)),
    }[which]()
    (tmp_path / which).write_bytes((tmp_path / which).read_bytes() + b" ")
    with pytest.raises(BadInput, match="was changed") as caught:
        go(tmp_path / "out", stage)
    assert str(caught.value.where).endswith(which)
    assert not (tmp_path / "out" / claims.record_of(stage.name)).exists()


# B7, B8: environments ----------------------------------------------------------------------------------------------------


def test_every_stage_keeps_the_environment_that_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    place = {"cpu": "a cpu", "packages": {"torch": "1.0"}}
    monkeypatch.setattr("rescompress.runs.pipeline.environment", lambda: dict(place))
    threads = torch.get_num_threads()
    notes = Notes()
    run_stages([writer("one")], tmp_path, {}, reporter=notes)
    assert notes.told == []
    place["cpu"] = "another cpu"
    manifest = run_stages([writer("one"), writer("two")], tmp_path, {}, reporter=notes).manifest
    assert [s.environment["cpu"] for s in manifest.stages] == ["a cpu", "another cpu"]
    assert manifest.environments[0][1] == ("one",)
    assert notes.told == ["one: computed with cpu a cpu (not another cpu)"]
    place["packages"] = {"torch": "2.0"}
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    run_stages([writer("one"), writer("two"), writer("three")], tmp_path, {}, reporter=notes)
    assert f"threads {threads} (not {threads + 1})" in notes.told[-1]
    assert "torch 1.0 (not 2.0)" in notes.told[-1]
    assert load_manifest(tmp_path).stages[2].environment["threads"] == threads + 1


# C3, C7, C8 --------------------------------------------------------------------------------------------------------------


def test_pipes_and_devices_are_refused_before_they_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, Path("a\0b")):
        with pytest.raises(OSError, match="file"):
            open_regular(path)
        with pytest.raises(BadInput):
            file_identity(str(path))
        with pytest.raises(BadInput):
            Builder(Opening(path), Settings()).dense()
    for path in ("/dev/zero", str(tmp_path / "pipe"), "a\0b"):
        with pytest.raises(BadInput):
            Settings(data=path)


def damage(kind: str, text: str) -> str:
    document = json.loads(text)
    if kind == "newer key":
        document["extra"] = 1
    if kind == "layout":
        document["schema_version"] = 99
    if kind in ("NaN", "null"):
        document["stages"][0]["metrics"]["size_bytes"]["value"] = float("nan") if kind == "NaN" else None
    return {"empty": "", "half": text[: len(text) // 2], "list": "[]"}.get(kind, json.dumps(document))


@pytest.mark.parametrize("kind", ["empty", "half", "list", "newer key", "layout", "NaN", "null"])
@pytest.mark.parametrize("workspace", [False, True])
def test_a_damaged_manifest_is_made_again(tmp_path: Path, kind: str, workspace: bool) -> None:
    go(tmp_path, writer("one"), writer("two"), workspace=workspace)
    good = load_manifest(tmp_path)
    path = tmp_path / "manifest.json"
    bad = damage(kind, path.read_text())
    path.write_text(bad)
    with pytest.raises(BadInput):
        load_manifest(path)
    notes = Notes()
    report = run_stages([writer("one"), writer("two")], tmp_path, {}, reporter=notes, workspace=workspace)
    assert report.ran == ()
    assert "made again" in notes.told[0]
    assert load_manifest(tmp_path).stages == good.stages
    assert (tmp_path / ".stages" / ".damaged-manifest").read_text() == bad
    notes.told.clear()
    run_stages([writer("one"), writer("two")], tmp_path, {}, reporter=notes, workspace=workspace)
    assert notes.told == []


def test_no_metric_is_written_that_cannot_be_read_again() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            counted(value, "bytes")  # type: ignore[arg-type]


def test_what_may_not_be_read_is_said_with_exit_code_7(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(tmp_path, writer("one"))
    real = os.open
    for name in ("one.safetensors", ".stages/one.json", "manifest.json", ".lock"):

        def closed(path: Any, flags: int, *more: Any, name: str = name, **named: Any) -> int:
            if str(path) == str(tmp_path / name):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, flags, *more, **named)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", closed)
            with pytest.raises(EnvironmentFailed, match="cannot be read") as caught:
                go(tmp_path, writer("one"))
        assert caught.value.exit_code == 7
        assert str(tmp_path / name) == caught.value.where


def test_a_lock_of_another_user_is_taken_for_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(tmp_path, writer("one"))
    real = os.open

    def read_only(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if str(path).endswith(".lock") and flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", read_only)
    assert go(tmp_path, writer("one"), writer("two")) == ("two",)


@pytest.mark.parametrize("another", [False, True])
def test_a_folder_that_is_removed_while_it_runs_is_made_again_by_the_next_call(tmp_path: Path, another: bool) -> None:
    """What the stage writes into a folder that is made anew is nobody's, unless another run took the name meanwhile."""
    out = tmp_path / "out"

    def remove(context: Context) -> Outcome:
        shutil.rmtree(out)
        if another:
            go(out, writer("one"))
        return writer("one").run(context)

    stage = Made("one", {}, (), remove)
    with pytest.raises(EnvironmentFailed, match="call the command again"):
        go(out, stage)
    assert out.exists() == another
    assert go(out, writer("one")) == (() if another else ("one",))


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_that_is_moved_while_it_runs_is_said(tmp_path: Path, fails: bool) -> None:
    out = tmp_path / "out"

    def move(context: Context) -> Outcome:
        out.rename(tmp_path / "moved")
        if fails:
            raise BadInput("no such file")
        return Outcome()

    with pytest.raises(EnvironmentFailed, match="moved or removed") as caught:
        go(out, writer("one"), Made("two", {}, (), move))
    assert caught.value.exit_code == 7
    assert not out.exists()
    assert go(tmp_path / "moved", writer("one")) == ()


def test_a_library_that_meets_a_full_disk_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(context: Context) -> Outcome:
        (context.folder / f"{PARTIAL_PREFIX}abcdefgh.bin").write_text("half")
        raise RuntimeError("basic_ios::clear: iostream error")

    stage = Made("two", {}, (), full)
    with pytest.raises(RuntimeError):
        go(tmp_path, writer("one"), stage)
    assert [s.status for s in load_manifest(tmp_path).stages] == ["done", "failed"]
    monkeypatch.setattr("rescompress.runs.pipeline._is_full", lambda folder: True)
    with pytest.raises(EnvironmentFailed, match="the disk is full"):
        go(tmp_path, writer("one"), stage)
    assert not list(tmp_path.glob(f"{PARTIAL_PREFIX}*"))


# A1: modules of the current folder ---------------------------------------------------------------------------------------


def test_a_measuring_process_imports_nothing_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_targets import benchmark

    for name in ("statistics", "json", "numpy", "contextlib", "edge_targets", "rescompress"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'a').write(__name__)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep + str(Path(__file__).parents[1]))
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    started: list[subprocess.Popen[str]] = []
    real = subprocess.Popen

    def popen(*args: Any, **named: Any) -> Any:
        started.append(real(*args, **named))
        return started[-1]

    monkeypatch.setattr(benchmark.subprocess, "Popen", popen)
    candidate = benchmark.Candidate(tmp_path / "m.onnx", "no-such-runtime", (3, 8, 8))
    with pytest.raises(BadInput, match="no-such-runtime"), benchmark._worker(candidate):
        pass
    assert started[0].returncode == 0
    assert not (tmp_path / "ran").exists()


def test_no_process_of_python_is_started_another_way() -> None:
    """A new one has to think of the current folder, too."""
    root = Path(__file__).parents[1]
    calls = [
        f"{path.relative_to(root)}: {line.strip()}"
        for package in ("rescompress", "compress", "edge_targets", "export")
        for path in (root / package).rglob("*.py")
        for line in path.read_text().splitlines()
        if "sys.executable" in line
    ]
    assert sorted(calls) == [
        'edge_targets/benchmark.py: [sys.executable, "-P", "-m", "edge_targets.benchmark"],',
        'rescompress/cli/search.py: words = [sys.executable, "-P", "-m", "rescompress", "search", "worker", '
        '"-o", str(folder), "--name", name, "-q"]',
        'rescompress/search/board.py: words = [sys.executable, "-P", "-m", "rescompress", "deploy", str(model)]',
    ]
    assert all(
        "-P -m pip" in line
        for line in (root / "action.yml").read_text().splitlines()
        if "python" in line and "pip install" in line
    )


# Manifests of any content ------------------------------------------------------------------------------------------------


def try_mutants(tmp_path: Path, count: int) -> None:
    from report_factory import write_run

    run = tmp_path / "run"
    write_run(run)
    text = (run / "manifest.json").read_text()
    for mutant in mutants(text, count):
        (run / "manifest.json").write_text(mutant)
        shown = mutant[:2000]
        with contextlib.suppress(BadInput):
            load_manifest(run)
        try:
            claims.check_outputs({"--output": run / "x.html"})
            go(run, writer("one"), force=True)
        except (BadInput, EnvironmentFailed):
            continue
        assert load_manifest(run).stage("one") is not None, shown


def test_a_run_in_a_folder_of_any_manifest_ends_or_says_why(tmp_path: Path) -> None:
    try_mutants(tmp_path, 15)


@pytest.mark.slow
def test_a_run_in_a_folder_of_any_manifest_ends_or_says_why_at_length(tmp_path: Path) -> None:
    try_mutants(tmp_path, 2000)
