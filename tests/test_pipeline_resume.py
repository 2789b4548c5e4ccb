"""The pipeline: skip what is known, resume after a kill at any moment, never leave half a file."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_stages import Made

from rescompress.core.artifact import PARTIAL_PREFIX, Artifact, atomic_path, check_writable, write_text
from rescompress.core.errors import BadInput, EnvironmentFailed
from rescompress.core.evidence import load_sound
from rescompress.core.manifest import Manifest, StageResult, load_manifest
from rescompress.core.metric import accuracy, counted
from rescompress.core.outcomes import Outcomes
from rescompress.core.settings import ExportSettings, PruneSettings, QuantizeSettings, TrainSettings
from rescompress.runs.fingerprint import data_identity
from rescompress.runs.pipeline import _key, run_beside, run_stages
from rescompress.runs.plan import Builder
from rescompress.runs.reporter import Silent
from rescompress.runs.settings import Settings
from rescompress.runs.stage import Context, Opening, Outcome, Stage
from rescompress.runs.store import Store


def writer(
    name: str, text: str, after: tuple[str, ...] = (), calls: list[str] | None = None, source: str | None = None
) -> Stage:
    def run(context: Context) -> Outcome:
        if calls is not None:
            calls.append(name)
        inputs = "".join(context.file(a, "checkpoint").read_text() for a in after)
        path = context.folder / f"{name}.txt"
        write_text(path, inputs + text)
        return Outcome({"size_bytes": counted(len(inputs + text), "bytes")}, [("checkpoint", path)])

    return Made(name, {"text": text}, after, run, network=source if source is not None else "".join(after[:1]))


def chain(calls: list[str], middle: str = "b") -> list[Stage]:
    return [
        writer("one", "a", calls=calls),
        writer("two", middle, ("one",), calls),
        writer("three", "c", ("two",), calls),
        writer("side", "s", ("one",), calls),
    ]


def test_a_second_call_does_nothing(tmp_path: Path) -> None:
    calls: list[str] = []
    first = run_stages(chain(calls), tmp_path, {"x": 1}, reporter=Silent())
    before = (tmp_path / "manifest.json").read_bytes(), (tmp_path / "manifest.json").stat().st_mtime_ns
    second = run_stages(chain(calls), tmp_path, {"x": 1}, reporter=Silent())
    assert calls == ["one", "two", "three", "side"] == list(first.ran) == list(second.reused)
    assert second.ran == ()
    assert before == ((tmp_path / "manifest.json").read_bytes(), (tmp_path / "manifest.json").stat().st_mtime_ns)
    assert (tmp_path / "three.txt").read_text() == "abc"


def test_what_was_measured_on_a_board_stays_while_its_network_does(tmp_path: Path) -> None:
    first = run_stages(chain([]), tmp_path, {}, reporter=Silent()).manifest
    network = first.stage("two")
    assert network is not None
    board = StageResult(stage="deploy:jetson", status="done", ancestry=(str(network.checkpoint_sha256), *network.ancestry))
    first.with_stage(board).save(tmp_path)
    again = run_stages(chain([]), tmp_path, {}, reporter=Silent())
    assert again.ran == ()
    assert [s.stage for s in load_manifest(tmp_path).stages] == ["one", "two", "three", "side", "deploy:jetson"]
    with pytest.raises(BadInput):
        run_stages([*chain([]), _failing("last")], tmp_path, {}, reporter=Silent())
    kept = load_manifest(tmp_path).stage("deploy:jetson")
    assert kept is not None
    assert (kept.ancestry, kept.is_deployment) == (board.ancestry, True)
    run_stages(chain([], middle="x"), tmp_path, {}, reporter=Silent())
    assert load_manifest(tmp_path).stage("deploy:jetson") is None, "another network stands here now"


def _failing(name: str) -> Stage:
    def run(context: Context) -> Outcome:
        raise BadInput("it fails")

    return Made(name, {}, (), run)


def test_a_data_set_is_known_by_its_labels_and_by_images_whose_size_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("a.png,1\nb.png,7\n")
    (tmp_path / "c.bmp").write_bytes(bytes(100))
    (tmp_path / "a.jpg").write_bytes(bytes(100))
    known = data_identity(str(tmp_path))
    assert known == data_identity(str(tmp_path))
    seen = {known}
    (tmp_path / "labels.csv").write_text("a.png,7\nb.png,1\n")
    seen.add(data_identity(str(tmp_path)))
    (tmp_path / "c.bmp").write_bytes(bytes([1]) * 100)
    seen.add(data_identity(str(tmp_path)))
    (tmp_path / "a.jpg").write_bytes(bytes(101))
    seen.add(data_identity(str(tmp_path)))
    assert len(seen) == 4


def test_a_changed_setting_runs_only_what_depends_on_it(tmp_path: Path) -> None:
    calls: list[str] = []
    run_stages(chain(calls), tmp_path, {}, reporter=Silent())
    calls.clear()
    report = run_stages(chain(calls, middle="B"), tmp_path, {}, reporter=Silent())
    assert calls == ["two", "three"]
    assert [s.stage for s in report.manifest.stages] == ["one", "two", "three", "side"]
    assert (tmp_path / "three.txt").read_text() == "aBc"


@pytest.mark.parametrize("shared", [False, True], ids=["run", "store"])
def test_a_skipped_stage_says_so_and_is_tried_again(tmp_path: Path, shared: bool) -> None:
    """What it lacked may be here by now."""
    outcomes = [Outcome(skipped="no device here"), Outcome(skipped="no device here"), Outcome()]
    stages = [Made("one", {}, (), lambda context: outcomes.pop(0))]
    store = Store(tmp_path / "store") if shared else None
    for expected in (("skipped", "no device here"), ("skipped", "no device here"), ("done", None)):
        report = run_stages(stages, tmp_path / "out", {}, reporter=Silent(), store=store)
        assert report.ran == ("one",)
        for manifest in (report.manifest, load_manifest(tmp_path / "out")):
            assert [(s.status, s.reason) for s in manifest.stages] == [expected]
    assert run_stages(stages, tmp_path / "out", {}, reporter=Silent(), store=store).reused == ("one",)


@pytest.mark.parametrize("reason", [None, "no device here"])
@pytest.mark.parametrize("status", ["skipped", "failed"])
@pytest.mark.parametrize("where", ["record", "manifest", "store"])
def test_a_stage_that_is_said_to_be_skipped_by_an_edit_is_not_shown_as_skipped(
    tmp_path: Path, status: str, reason: str | None, where: str
) -> None:
    """Its figures and files stand there all the same; records are repaired by computing, the manifest from the records."""
    calls: list[str] = []
    stages, folder = [_scored("one", 6, calls=calls), _scored("two", 5, calls=calls)], tmp_path / "out"
    store = Store(tmp_path / "store")
    run_stages(stages, folder, {}, reporter=Silent(), store=store)
    if where == "manifest":
        _edit(folder / "manifest.json", lambda d: d["stages"][0].update(status=status, reason=reason))
    else:
        _edit(folder / ".stages" / "one.json", lambda d: d.update(status=status, reason=reason))
    if where == "store":
        for record in (tmp_path / "store").rglob("result.json"):
            _edit(record, lambda d: d.update(status=status, reason=reason) if d["stage"] == "one" else None)
    calls.clear()
    heard = Heard()
    report = run_stages(stages, folder, {}, reporter=heard, store=store)
    assert calls == (["one"] if where == "store" else [])
    told = "tells of work all the same" if reason else f"is {status}, and does not tell why"
    assert any(told in note for note in heard.notes), heard.notes
    for manifest in (report.manifest, load_manifest(folder)):
        assert [(s.status, s.reason, "top1" in s.metrics) for s in manifest.stages] == [("done", None, True)] * 2


def test_a_stage_takes_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5])
    monkeypatch.setattr("rescompress.runs.pipeline.time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert run_stages([writer("one", "a")], tmp_path, {}, reporter=Silent()).manifest.stages[0].duration_s == 2.5


def test_a_run_remembers_when_it_was_made_and_its_newest_settings(tmp_path: Path) -> None:
    first = run_stages([writer("one", "a")], tmp_path, {"x": 1}, reporter=Silent()).manifest
    made = "2020-01-01T00:00:00+00:00"
    first.model_copy(update={"created": made}).save(tmp_path)
    assert run_stages([writer("one", "a")], tmp_path, {"x": 2}, reporter=Silent()).ran == ()
    assert (load_manifest(tmp_path).config, load_manifest(tmp_path).created) == ({"x": 2}, made)
    assert run_stages([writer("one", "b")], tmp_path, {"x": 2}, reporter=Silent()).ran == ("one",)
    assert load_manifest(tmp_path).created == made


def test_a_run_is_not_replaced_by_another_config_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rescompress: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    monkeypatch.setattr("rescompress.runs.plan.run_plan", lambda config, _: [writer("one", str(config.seed))])
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "net.yaml").write_text("checkpoint: x.pt\ndata: builtin:digits\n")
    rescompress("run", "a/net.yaml", cwd=tmp_path)
    kept = (tmp_path / "rescompress-out" / "net" / "manifest.json").read_bytes()
    refused = rescompress("run", "b/net.yaml", cwd=tmp_path, code=5)
    assert "holds the run of a/net.yaml" in refused.stderr
    assert "-o FOLDER" in refused.stderr
    assert (tmp_path / "rescompress-out" / "net" / "manifest.json").read_bytes() == kept
    rescompress("run", "b/net.yaml", "-o", "elsewhere", cwd=tmp_path)
    assert "nothing to do" in rescompress("run", tmp_path / "a" / "net.yaml", cwd=tmp_path).stderr
    changed = rescompress("run", "a/net.yaml", "--set", "seed=1", cwd=tmp_path)
    assert "one is computed again" in changed.stderr


def test_a_stage_runs_again_when_an_onnx_file_before_it_or_the_version_of_the_package_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stages(text: str) -> list[Stage]:
        def run(context: Context) -> Outcome:
            write_text(context.folder / "model.onnx", text)
            return Outcome(files=[("onnx", context.folder / "model.onnx")])

        return [Made("export", {"text": text}, (), run), Made("reader", {}, ("export",), lambda context: Outcome())]

    def ran(text: str) -> tuple[str, ...]:
        return run_stages(stages(text), tmp_path, {}, reporter=Silent()).ran

    assert ran("a") == ("export", "reader")
    assert ran("b") == ("export", "reader")
    assert ran("b") == ()
    monkeypatch.setattr("rescompress.runs.pipeline.version", lambda package: "99.0")
    assert ran("b") == ("export", "reader")


FILES = ("net", "teacher", "data.npz", "plan")
EVERY = {"dense", "prune", "finetune", "quantize", "export", "target:cpu"}
USUAL: dict[str, Any] = {
    "input_shape": None,
    "preprocess": None,
    "arch_options": (),
    "allow_pickle": False,
    "labels": None,
    "seed": 0,
    "threads": 2,
    "targets": ("cpu",),
    "calib": 64,
    "epochs": 1.0,
    "max_slowdown": 1.5,
    "profile": "openvino",
    "export": ExportSettings(),
    "target": ExportSettings(),
    "require_engine": False,
}


def _keys(folder: Path, **changed: Any) -> dict[str, str]:
    """Return the key of every stage of a run by its name; those of the stages before do not enter here."""
    facts = USUAL | changed
    stated = {k: facts[k] for k in ("input_shape", "preprocess", "arch_options", "allow_pickle")}
    settings = Settings(str(folder / "data.npz"), facts["labels"], facts["seed"], threads=facts["threads"])
    builder, teacher = Builder(Opening(folder / "net", **stated), settings), Opening(folder / "teacher")
    prune = PruneSettings(plan=str(folder / "plan"), calib=facts["calib"])
    quantize = QuantizeSettings(keep_float="auto", max_slowdown=facts["max_slowdown"])
    stages = [
        builder.dense(),
        builder.prune(prune, facts["targets"], "dense"),
        builder.finetune(TrainSettings(epochs=facts["epochs"]), "prune", teacher),
        builder.quantize(quantize, facts["profile"], "finetune", teacher, targets=facts["targets"]),
        builder.export("quantize", facts["export"]),
        builder.target("cpu", "quantize", facts["target"], require_engine=facts["require_engine"]),
    ]
    return {s.name: _key(s, Manifest()) for s in stages}


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str], dict[str, str]]]:
    """Return the folder of a run's files, what the machine is, and the key of every stage of that run."""
    folder = tmp_path_factory.mktemp("usual")
    machine = {"cpu": "a cpu", "runtime": "1.0"}
    backend = SimpleNamespace(available=lambda: SimpleNamespace(version=machine["runtime"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rescompress.runs.plan.load_backend", lambda name: backend)
        patch.setattr("rescompress.runs.plan.cpu_name", lambda: machine["cpu"])
        for name in FILES:
            (folder / name).write_text(f"the content of {name}")
        before = _keys(folder)
        assert set(before) == EVERY
        assert _keys(folder) == before
        yield folder, machine, before


@pytest.mark.parametrize(
    ("changed", "stages"),
    [
        ("net", {"dense"}),
        ("teacher", {"finetune", "quantize"}),
        ("data.npz", EVERY),
        ("plan", {"prune"}),
        ("cpu", {"target:cpu"}),
        ("runtime", {"target:cpu"}),
        ({"input_shape": (3, 32, 32)}, {"dense"}),
        ({"preprocess": "imagenet"}, {"dense"}),
        ({"arch_options": ("arch=resnet18",)}, {"dense"}),
        ({"allow_pickle": True}, {"dense"}),
        ({"labels": {"cat": "3"}}, EVERY),
        ({"seed": 1}, EVERY),
        ({"threads": 1}, {"target:cpu"}),
        ({"targets": ("jetson",)}, {"prune", "quantize"}),
        ({"calib": 65}, {"prune"}),
        ({"epochs": 2.0}, {"finetune"}),
        ({"max_slowdown": 1.6}, {"quantize"}),
        ({"profile": "tensorrt"}, {"quantize"}),
        ({"export": ExportSettings(batch="dynamic")}, {"export"}),
        ({"target": ExportSettings(batch="dynamic")}, {"target:cpu"}),
        ({"target": ExportSettings(opset=19)}, {"target:cpu"}),
        ({"require_engine": True}, {"target:cpu"}),
    ],
    ids=lambda value: str(value) if isinstance(value, str | dict) else "",
)
def test_the_key_of_a_stage_changes_with_everything_its_outcome_depends_on(
    usual: tuple[Path, dict[str, str], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    changed: str | dict[str, Any],
    stages: set[str],
) -> None:
    folder, machine, before = usual
    if changed in FILES:
        (folder / str(changed)).write_text("another content")
    elif isinstance(changed, str):
        monkeypatch.setitem(machine, changed, "another")
    after = _keys(folder, **(changed if isinstance(changed, dict) else {}))
    if changed in FILES:
        (folder / str(changed)).write_text(f"the content of {changed}")
    assert {name for name, key in after.items() if key != before[name]} == stages


def test_a_damaged_or_missing_file_is_made_again(tmp_path: Path) -> None:
    calls: list[str] = []
    run_stages(chain(calls), tmp_path, {}, reporter=Silent())
    calls.clear()
    (tmp_path / "two.txt").write_text("xx")
    run_stages(chain(calls), tmp_path, {}, reporter=Silent())
    assert calls == ["two"]  # it comes out as before, so what follows still holds
    assert (tmp_path / "two.txt").read_text() == "ab"


def test_a_failure_is_recorded_and_the_work_before_it_kept(tmp_path: Path) -> None:
    calls: list[str] = []

    def fail(context: Context) -> Outcome:
        raise BadInput("no budget fits", where="--macs")

    stages = [writer("one", "a", calls=calls), Made("two", {}, ("one",), fail), writer("three", "c", ("one",))]
    with pytest.raises(BadInput):
        run_stages(stages, tmp_path, {}, reporter=Silent())
    manifest = load_manifest(tmp_path)
    assert [(s.stage, s.status) for s in manifest.stages] == [("one", "done"), ("two", "failed")]
    assert "no budget fits" in str(manifest.stages[1].reason)
    assert manifest.unfinished == ("three",)
    run_stages([stages[0], writer("two", "b", ("one",), calls), stages[2]], tmp_path, {}, reporter=Silent())
    assert calls == ["one", "two"]
    assert load_manifest(tmp_path).unfinished == ()


def command(folder: Path, *stages: Stage) -> list[str]:
    """Run the stages as a command for single stages does; return the names of those that the manifest has then."""
    run_stages(stages, folder, {}, reporter=Silent(), workspace=True)
    return [s.stage for s in load_manifest(folder).stages]


def test_a_workspace_is_about_one_network(tmp_path: Path) -> None:
    dense, pruned = writer("dense", "a", source="file a"), writer("prune", "b", ("dense",))
    assert command(tmp_path, dense, pruned) == ["dense", "prune"]
    assert command(tmp_path, writer("target", "t", ("prune",))) == ["dense", "prune", "target"]
    assert command(tmp_path, writer("finetune", "c", ("prune",))) == ["dense", "prune", "target", "finetune"]
    sha256 = load_manifest(tmp_path).stages[-1].checkpoint_sha256
    assert sha256 is not None
    assert command(tmp_path, writer("finetune", "d", source=sha256)) == ["dense", "prune", "target", "finetune"]
    assert load_manifest(tmp_path).stages[-1].ancestry[-1] == "file a"
    assert load_manifest(tmp_path).lineage("finetune") == ("dense", "prune", "finetune")
    assert command(tmp_path, dense, pruned) == ["dense", "prune", "target", "finetune"], "nothing has changed"
    manifest = load_manifest(tmp_path)
    target = manifest.stages[2].model_copy(update={"outputs": (Artifact(kind="onnx", path="o", sha256="o", size_bytes=1),)})
    assert manifest.with_stage(target).ancestry("o") == target.ancestry, "a file made of a network is about it"
    assert manifest.ancestry("x") == ("x",)
    assert command(tmp_path, dense, writer("prune", "B", ("dense",))) == ["dense", "prune"], (
        "the rest was made from the old one"
    )
    assert command(tmp_path, writer("quantize", "q", source="file a")) == ["dense", "prune", "quantize"]
    assert load_manifest(tmp_path).lineage("quantize") == ("dense", "quantize")
    assert command(tmp_path, writer("dense", "z", source="file z")) == ["dense"], "another network"


def test_a_command_that_fails_or_stops_leaves_the_record_as_it_was(tmp_path: Path) -> None:
    command(tmp_path, writer("dense", "a", source="file a"), writer("prune", "b", ("dense",)))
    before = (tmp_path / "manifest.json").read_bytes()
    for error in (BadInput("no such data"), KeyboardInterrupt()):

        def fail(context: Context, error: BaseException = error) -> Outcome:
            raise error

        for source in ("file a", "file z"):
            with pytest.raises(type(error)):
                command(tmp_path, Made("dense", {"other": 1}, (), fail, network=source))
            assert (tmp_path / "manifest.json").read_bytes() == before
    seen = []

    def look(context: Context) -> Outcome:
        seen.append([s.stage for s in context.done.stages])
        return Outcome()

    command(tmp_path, Made("target", {}, ("dense",), look, network="file z"))
    assert seen == [[]], "the dense network there is another one"


def test_a_run_under_way_says_what_it_has_not_reached(tmp_path: Path) -> None:
    seen: list[tuple[str, ...]] = []

    def look(context: Context) -> Outcome:
        seen.append(load_manifest(tmp_path).unfinished)
        return Outcome()

    run_stages([Made("one", {}, (), look), Made("two", {}, (), look)], tmp_path, {}, reporter=Silent())
    assert seen == [("one", "two"), ("two",)]


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    def nested(context: Context) -> Outcome:
        with pytest.raises(BadInput, match="another process"):
            run_stages([writer("x", "y")], tmp_path, {}, reporter=Silent())
        return Outcome()

    run_stages([Made("outer", {}, (), nested)], tmp_path, {}, reporter=Silent())


def test_a_full_disk_is_told_and_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    write_text(target, "old")

    def fill_the_disk() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(EnvironmentFailed, match="full") as caught:
        fill_the_disk()
    assert caught.value.exit_code == 7
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_where_nothing_can_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    calls: list[str] = []
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(EnvironmentFailed, match="cannot write") as caught:
            run_stages([writer("one", "a", calls=calls)], folder, {}, reporter=Silent())
        assert caught.value.exit_code == 7
    for path in (tmp_path / "file" / "x.pt", Path("/proc/x/y.pt")):
        with pytest.raises(EnvironmentFailed, match="cannot write"):
            write_text(path, "new")
        with pytest.raises(EnvironmentFailed, match="cannot write"):
            check_writable(path)
    with pytest.raises(BadInput, match="folder"):
        check_writable(tmp_path)
    check_writable(tmp_path / "new" / "below.pt")
    assert not calls
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def _slow_stages() -> list[Stage]:
    """Stages that write a megabyte in pieces, so that a kill often falls into a write."""

    def run_of(name: str, after: tuple[str, ...]) -> Stage:
        def run(context: Context) -> Outcome:
            with (context.folder / "log").open("a") as log:
                log.write(name + "\n")
            content = "".join(context.file(a, "checkpoint").read_text()[:10] for a in after) + name * 1000
            path = context.folder / f"{name}.txt"
            with atomic_path(path) as temporary, temporary.open("w") as f:
                for _ in range(20):
                    f.write(content)
                    f.flush()
                    time.sleep(0.002)
            return Outcome({}, [("checkpoint", path)])

        return Made(name, {}, after, run)

    names = ["s0", "s1", "s2", "s3"]
    return [run_of(n, tuple(names[i - 1 : i])) for i, n in enumerate(names)]


def _go(folder: str) -> None:
    run_stages(_slow_stages(), Path(folder), {}, reporter=Silent())


def test_killed_at_twenty_moments_it_ends_as_if_undisturbed(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    calm.mkdir()
    rough.mkdir()
    _go(str(calm))
    finished: dict[str, int] = {}
    for i in range(20):
        process = fork.Process(target=_go, args=(str(rough),))
        process.start()
        time.sleep(0.011 * (i % 10 + 1))
        assert process.pid is not None
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        ran = (rough / "log").read_text().split() if (rough / "log").exists() else []
        for name, times in finished.items():
            assert ran.count(name) == times, f"{name} was repeated after it had finished"
        finished = {p.stem: ran.count(p.stem) for p in (rough / ".stages").glob("s*.json")}
        if (rough / "manifest.json").exists():
            json.loads((rough / "manifest.json").read_text())
    _go(str(rough))
    for name in ("s0", "s1", "s2", "s3"):
        assert (calm / f"{name}.txt").read_bytes() == (rough / f"{name}.txt").read_bytes()
    assert not list(rough.rglob(f"{PARTIAL_PREFIX}*"))
    assert [s.stage for s in load_manifest(rough).stages] == ["s0", "s1", "s2", "s3"]


def test_a_link_stays_one_and_what_it_points_at_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for there in (False, True):
        link = tmp_path / f"{there}.md"
        target = tmp_path / "real" / link.name
        if there:
            target.write_text("old")
        link.symlink_to(target)
        write_text(link, "new")
        assert link.is_symlink()
        assert target.read_text() == "new"


def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for write in (check_writable, lambda path: write_text(path, "text")):
        with pytest.raises(BadInput, match="pipe"):
            write(pipe)
    assert pipe.is_fifo()


class Heard(Silent):
    """A reporter that keeps its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def _scored(name: str, right: int, *, of: str = "", macs: int = 7, calls: list[str] | None = None) -> Stage:
    """Return a stage that has `right` of ten samples right, and its outcomes beside it."""

    def run(context: Context) -> Outcome:
        if calls is not None:
            calls.append(name)
        write_text(context.folder / f"{name}.txt", name)
        outcomes = Outcomes.pack([i < right for i in range(10)], "samples")
        path = context.folder / f"{name}.outcomes.json"
        write_text(path, outcomes.model_dump_json())
        metrics = {"top1": accuracy(right, 10, runtime="torch"), "macs": counted(macs, "macs")}
        return Outcome(metrics, [("checkpoint", context.folder / f"{name}.txt"), ("outcomes", path)])

    return Made(name, {}, (), run, kind="prune", of=of or name)


def _edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "accuracy": ({"value": 1.0, "std_error": 0.0}, "top1 is 100.00 %, the outcomes say 60.00 %"),
    "standard error": ({"std_error": 0.01}, "top1 is 60.00 ± 1 %, but of 10 samples that is known to ± 15.49 % at best"),
    "accuracy that is none": ({"value": -1.0}, "top1 is -1 fraction, which is impossible"),
    "samples": ({"n": 20}, "top1 is of 20 samples, the outcomes are of 10"),
    "unit": ({"unit": "%"}, "top1 is in %, expected fraction"),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("shared", [False, True], ids=["run", "store"])
def test_a_record_that_was_edited_is_not_taken_up(tmp_path: Path, edit: str, shared: bool) -> None:
    """Its figures contradict what lies beside it: the stage is computed again, and the note says which figure it was."""
    facts, told = EDITS[edit]
    calls: list[str] = []
    stages = [_scored("one", 6, calls=calls), _scored("two", 5, calls=calls)]
    store = Store(tmp_path / "store") if shared else None
    folder = tmp_path / "out"
    first = run_stages(stages, folder, {}, reporter=Silent(), store=store)
    records = [folder / ".stages" / "one.json", *(tmp_path / "store").rglob("result.json")]
    for record in records:
        _edit(record, lambda d: d["metrics"]["top1"].update(facts) if d["stage"] == "one" else None)
    heard = Heard()
    calls.clear()
    report = run_stages(stages, folder, {}, reporter=heard, store=store)
    assert calls == ["one"]
    assert report.ran == ("one",)
    assert any(told in note and "record of one" in note for note in heard.notes), heard.notes
    assert [s.metrics for s in report.manifest.stages] == [s.metrics for s in first.manifest.stages]
    assert run_stages(stages, folder, {}, reporter=Silent(), store=store).ran == ()


def test_counts_of_one_network_that_differ_are_computed_again(tmp_path: Path) -> None:
    """Nobody knows which of them was edited."""
    calls: list[str] = []
    stages = [_scored("one", 6, calls=calls), _scored("two", 5, of="one", calls=calls), _scored("three", 4, calls=calls)]
    run_stages(stages, tmp_path, {}, reporter=Silent())
    _edit(tmp_path / ".stages" / "two.json", lambda d: d["metrics"]["macs"].update(value=3))
    heard = Heard()
    calls.clear()
    report = run_stages(stages, tmp_path, {}, reporter=heard)
    assert calls == ["one", "two"]
    assert any("one and two tell different counts of one network" in note for note in heard.notes)
    assert [s.metrics["macs"].value for s in report.manifest.stages] == [7, 7, 7]


@pytest.mark.parametrize("workspace", [False, True])
def test_a_manifest_that_was_edited_is_made_again_from_the_records(tmp_path: Path, workspace: bool) -> None:
    stages = [_scored("one", 6), _scored("two", 5)]
    before = run_stages(stages, tmp_path, {"x": 1}, reporter=Silent(), workspace=workspace).manifest
    path = tmp_path / "manifest.json"
    _edit(path, lambda d: d["stages"][0]["metrics"]["top1"].update(value=1.0, std_error=0.0))
    edited = path.read_bytes()
    heard = Heard()
    report = run_stages(stages[1:] if workspace else stages, tmp_path, {"x": 1}, reporter=heard, workspace=workspace)
    assert report.ran == ()
    assert any("one top1 is 100.00 %, the outcomes say 60.00 %: it is made again" in note for note in heard.notes), heard.notes
    after = load_manifest(tmp_path)
    assert {s.stage: s.metrics for s in after.stages} == {s.stage: s.metrics for s in before.stages}
    assert (after.config, after.created) == (before.config if not workspace else {"x": 1}, before.created)
    assert (tmp_path / ".stages" / ".damaged-manifest").read_bytes() == edited


def test_what_a_board_measured_is_not_shown_when_it_was_edited(tmp_path: Path) -> None:
    """A deployment beside a run has its own record; while the manifest contradicts itself, nothing more is deployed."""
    stages = [_scored("one", 6)]
    run_stages(stages, tmp_path, {}, reporter=Silent())
    network = load_manifest(tmp_path).stages[0].checkpoint_sha256
    assert network is not None
    board = _scored("deploy:a", 6)
    deployed = Made("deploy:a", {}, (), board.run, network=network, kind="deploy", about="a")
    run_beside(deployed, tmp_path, reporter=Silent())
    _edit(tmp_path / "manifest.json", lambda d: d["stages"][1]["metrics"]["top1"].update(value=0.9, std_error=0.2))
    with pytest.raises(BadInput, match=r"top1 is 90\.00 %, the outcomes say 60\.00 %"):
        run_beside(deployed, tmp_path, reporter=Silent())
    report = run_stages(stages, tmp_path, {}, reporter=Silent())
    for manifest in (report.manifest, load_manifest(tmp_path)):
        assert [(s.stage, s.metrics["top1"].value) for s in manifest.stages] == [("one", 0.6), ("deploy:a", 0.6)]


def test_a_deployment_stands_once_however_often_the_run_is_repeated(tmp_path: Path) -> None:
    run_stages([writer("one", "a"), writer("two", "b", ("one",))], tmp_path, {}, reporter=Silent())
    network = load_manifest(tmp_path).stages[0].checkpoint_sha256
    assert network is not None
    board = Made("deploy:a", {}, (), _scored("deploy:a", 6).run, network=network, kind="deploy", about="a")
    run_beside(board, tmp_path, reporter=Silent())
    for text in ("c", "d", "d"):
        report = run_stages([writer("one", "a"), writer("two", text, ("one",))], tmp_path, {}, reporter=Silent())
        for manifest in (report.manifest, load_manifest(tmp_path)):
            assert [s.stage for s in manifest.stages] == ["one", "two", "deploy:a"]


def test_outcomes_that_may_not_be_read_are_no_contradiction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's run can be compared, as far as its manifest can be read."""
    run_stages([_scored("one", 6)], tmp_path, {}, reporter=Silent())

    def refused(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("rescompress.core.artifact.file_sha256", refused)
    assert load_sound(tmp_path).stages[0].metrics["top1"].value == 0.6


@pytest.mark.parametrize("still_made", [True, False])
def test_a_deployment_that_ends_during_a_run_stays_as_long_as_its_network_is_made(tmp_path: Path, still_made: bool) -> None:
    """The run that goes on has taken what it makes again out of the manifest: the records know what was deployed."""

    def file_of(context: Context) -> Outcome:
        path = context.folder / "model.onnx"
        write_text(path, "file of " + context.file("one", "checkpoint").read_text())
        return Outcome({}, [("onnx", path)])

    def board(network: str) -> Stage:
        return Made("deploy:a", {}, (), _scored("deploy:a", 6).run, network=network, kind="deploy", about="a")

    def deploying(context: Context) -> Outcome:
        assert [s.stage for s in load_manifest(tmp_path).stages] == ["one"]
        run_beside(board(deployed), tmp_path, reporter=Silent())
        return file_of(context)

    def stages(text: str, work: Callable[[Context], Outcome]) -> list[Stage]:
        last = Made("export", {"work": work.__name__}, ("one",), work, network="one", kind="export", of="one")
        return [writer("one", text), last]

    run_stages(stages("a", file_of), tmp_path, {}, reporter=Silent())
    onnx = load_manifest(tmp_path).stages[1].output("onnx")
    assert onnx is not None
    deployed = onnx.sha256
    heard = Heard()
    report = run_stages(stages("a" if still_made else "b", deploying), tmp_path, {}, reporter=heard)
    for manifest in (report.manifest, load_manifest(tmp_path)):
        assert [s.stage for s in manifest.stages] == ["one", "export", *(["deploy:a"] if still_made else [])]
    assert any("deploy:a is of a network that this run does not make any more" in n for n in heard.notes) != still_made
