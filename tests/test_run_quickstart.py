"""The whole pipeline on the embedded network and real digits; the slow tests kill it and share it over processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import pytest

from compress.evaluate import evaluate
from export.parity import OrtRunner
from rescompress.core.artifact import PARTIAL_PREFIX, file_sha256
from rescompress.core.manifest import load_manifest

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples" / "quickstart.yaml"
SHORT = ("--set", "finetune.epochs=1", "--set", "quantize.epochs=1")


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "rescompress", "run", str(QUICKSTART), "-o", str(folder), "--json", *SHORT, *more]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def run(folder: Path, *more: str) -> dict[str, Any]:
    brief = (  # how fast the files are is no matter here, and half the time
        "from edge_targets.benchmark import Effort; Effort.__init__.__defaults__ = (0.05, 0.1, 2, 4)\n"
        "from rescompress.cli.app import main; main()"
    )
    words = [sys.executable, "-c", brief, *command(folder, *more)[3:]]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run")
    return folder, run(folder)


def test_every_stage_has_its_row(finished: tuple[Path, dict[str, Any]]) -> None:
    _, document = finished
    stages = {s["stage"]: s for s in document["stages"]}
    assert list(stages) == [
        "dense",
        "prune",
        "finetune",
        "quantize",
        "export",
        "target:cpu",
        "target:cpu-ort",
        "target:jetson-orin-nano-8gb-super",
    ]
    assert all(s["status"] == "done" for s in stages.values())
    for name in ("dense", "prune", "finetune", "quantize", "export", "target:cpu", "target:cpu-ort"):
        assert stages[name]["metrics"]["top1"]["value"] > 0.95, name
        assert stages[name]["metrics"]["top1"]["n"] == 360
    macs = {n: s["metrics"]["macs"]["value"] for n, s in stages.items()}
    assert 0.4 * macs["dense"] < macs["prune"] <= 0.5 * macs["dense"]
    assert macs["prune"] == macs["export"] == macs["target:cpu"]
    sizes = {n: s["metrics"]["size_bytes"]["value"] for n, s in stages.items()}
    assert sizes["export"] < 0.25 * sizes["dense"]
    assert stages["target:cpu"]["metrics"]["p50_ms"]["provenance"] == "measured"
    on_cpu, on_ort = (stages[name]["details"] for name in ("target:cpu", "target:cpu-ort"))
    assert on_cpu["runtime_options"] == on_cpu["build"]["compile_options"] == {"SNIPPETS_MODE": "DISABLE"}
    assert any("SNIPPETS_MODE=DISABLE" in note for note in on_cpu["notes"])
    assert any("--profile onnxruntime" in note for note in on_ort["notes"])
    assert not {"runtime_options", "fp32_runtime_options", "dense_runtime_options"} & on_ort.keys()
    assert not {"fp32_runtime_options", "dense_runtime_options"} & on_cpu.keys()
    assert stages["target:jetson-orin-nano-8gb-super"]["metrics"]["p50_ms"]["provenance"] == "predicted"
    assert "top1" not in stages["target:jetson-orin-nano-8gb-super"]["metrics"]
    parity = stages["export"]["details"]["parity"]
    assert parity["n"] == 360
    assert parity["top1_agreement"] >= 359 / 360  # one image may stand exactly between two classes
    assert parity["mean_abs"] <= parity["logit_range"] / 255


def test_the_files_are_what_the_manifest_says(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    manifest = load_manifest(folder)
    listed = {a.path for s in manifest.stages for a in s.outputs}
    assert all(a.intact(folder) for s in manifest.stages for a in s.outputs)
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")}
    hidden = {p for p in found if p.startswith(".stages/")}
    assert found - hidden == listed | {"manifest.json", "table.md"}
    assert not list(folder.rglob("*.pt"))


def test_the_onnx_file_gives_the_accuracy_of_the_row(finished: tuple[Path, dict[str, Any]]) -> None:
    from compress.checkpoints import load_checkpoint
    from compress.data import DIGITS, load_dataset

    folder, document = finished
    data = load_dataset(DIGITS, load_checkpoint(folder / "quantize.safetensors").spec)
    found = evaluate(OrtRunner(onnx.load(folder / "model.onnx")), data.val)
    row = next(s for s in document["stages"] if s["stage"] == "export")
    assert found.top1 == row["metrics"]["top1"]["value"]


def test_a_second_run_does_no_work_and_says_so(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    done = subprocess.run(command(folder), env=environment(), capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["ran"] == []
    assert "nothing to do" in done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_ends_with_the_same_bits(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    calm, _ = finished
    folder = tmp_path / "rough"
    often = (  # save the training's state after every step, so that kills fall between savings, too
        "import sys; import rescompress.runs.stages.network as n; n.SAVE_EVERY_S = 0.2\n"
        "from rescompress.cli.app import main; main()"
    )
    args = [sys.executable, "-c", often, *command(folder)[3:]]
    chance = random.Random(0)
    done: dict[str, int] = {}
    for _ in range(20):
        process = subprocess.Popen(args, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(2.0, 14.0))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        records = {p.name: p.stat().st_mtime_ns for p in (folder / ".stages").glob("*.json")}
        assert all(records[name] == when for name, when in done.items()), "a finished stage was repeated"
        done = records
    last = subprocess.run(args, env=environment(), capture_output=True, text=True, timeout=600)
    assert last.returncode == 0, last.stderr
    for name in ("prune", "finetune", "quantize"):
        assert file_sha256(calm / f"{name}.safetensors") == file_sha256(folder / f"{name}.safetensors"), name
    assert (calm / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
    assert not list(folder.rglob(f"{PARTIAL_PREFIX}*"))


@pytest.mark.slow
def test_two_processes_fine_tune_like_one_and_write_once(tmp_path: Path) -> None:
    network = str(ROOT / "examples" / "resnet20_digits.safetensors")
    tail = ["-m", "rescompress", "finetune", network, "--data", "builtin:digits", "--epochs", "2", "--json", "--device", "cpu"]
    tops = []
    for name, head in {
        "one": [sys.executable],
        "two": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"],
    }.items():
        place = tmp_path / name
        place.mkdir()
        done = subprocess.run([*head, *tail], cwd=place, env=environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        tops.append(json.loads(done.stdout)["top1"])
        assert len(list(place.rglob("*.safetensors"))) == 1
    assert abs(tops[0] - tops[1]) <= 0.005
