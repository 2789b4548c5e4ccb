"""Networks without class labels: how near they stay to the dense one, in evaluation, training, tables and gates."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from engines import prune, ptq
from trunk_nets import photos, saved, two_scales

from compress.checkpoints import load_checkpoint, save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.data import load_dataset
from compress.evaluate import TorchRunner
from compress.fidelity import fidelity
from compress.importers.reference import reference
from compress.prune import Budget
from compress.quantize import fake_quant_model
from compress.quantize.ptq import divergence, log_probabilities
from compress.resnet import build_model
from compress.train import train
from rescompress.core.errors import BadInput, DataError
from rescompress.core.manifest import Manifest, StageResult
from rescompress.core.metric import Metric
from rescompress.core.settings import TrainSettings
from rescompress.show.figures.tables import dominated, rows_of, run_row
from rescompress.show.gate.checks import Run as GateRun
from rescompress.show.gate.checks import judge
from rescompress.show.gate.limits import Limits

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A host, its trunk pruned, and pictures."""
    folder = tmp_path_factory.mktemp("host")
    saved(two_scales(), folder)
    photos(folder / "photos")
    dense = load_checkpoint(folder / "host.onnx", arch_options={"trunk": "auto"}, preprocess="rescale")
    x = load_dataset(str(folder / "photos"), dense.spec).train.tensor()
    pruned = prune(dense, budget=Budget(kind="macs", value=0.5), align=1, scope="all", calibration_x=x).checkpoint
    save_checkpoint(dense, folder / "dense.safetensors")
    save_checkpoint(pruned, folder / "pruned.safetensors")
    return folder


def networks(place: Path) -> tuple[Checkpoint, Checkpoint]:
    return load_checkpoint(place / "dense.safetensors"), load_checkpoint(place / "pruned.safetensors")


def runner(checkpoint: Checkpoint) -> TorchRunner:
    return TorchRunner(build_model(checkpoint.spec, checkpoint.state_dict))


def test_fidelity_is_the_mean_relative_error_of_the_worst_output(place: Path) -> None:
    dense, pruned = networks(place)
    split = load_dataset(str(place / "photos"), dense.spec).val
    names = [o.name for o in dense.network.outputs]
    found = fidelity(runner(pruned), runner(dense), split, names, batch_size=5)
    x = split.tensor().numpy()
    for i, name in enumerate(names):
        a, b = (r.outputs(x)[i].reshape(len(x), -1).astype(float) for r in (runner(dense), runner(pruned)))
        errors = np.linalg.norm(a - b, axis=1) / np.linalg.norm(a, axis=1)
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert found.outputs[name] == pytest.approx({"relative_error": errors.mean(), "cosine": cosines.mean()}, rel=1e-6)
    worst = max(found.outputs.values(), key=lambda o: o["relative_error"])["relative_error"]
    assert found.metrics["infidelity"].value == worst > 0.01
    assert found.metrics["cosine"].value == min(o["cosine"] for o in found.outputs.values())
    same = fidelity(runner(dense), runner(dense), split, names)
    assert (same.metrics["infidelity"].value, same.metrics["cosine"].value) == (0.0, pytest.approx(1.0))


def test_copies_of_images_are_no_further_evidence(place: Path) -> None:
    dense, pruned = networks(place)
    split = load_dataset(str(place / "photos"), dense.spec).val
    twice = split.subset(np.concatenate([np.arange(len(split))] * 2))
    names = [o.name for o in dense.network.outputs]
    once, again = (fidelity(runner(pruned), runner(dense), s, names) for s in (split, twice))
    assert again.notes
    assert not once.notes
    ratio = again.metrics["infidelity"].std_error / once.metrics["infidelity"].std_error  # type: ignore[operator]
    assert ratio == pytest.approx(1.0, abs=0.1)  # and not 0.7
    with pytest.raises(DataError, match="cannot be compared"):
        fidelity(runner(dense), runner(dense), split, names[:1])


def test_a_flat_folder_of_pictures_is_data_and_labels_mean_nothing(place: Path, tmp_path: Path) -> None:
    dense, _ = networks(place)
    data = load_dataset(str(place / "photos"), dense.spec)
    assert (len(data.train), len(data.val)) == (12, 12)
    for name in ("train/a", "train/b/c", "val/z"):
        photos(tmp_path / name, 3)
    (tmp_path / "labels.csv").write_text("nothing,of,use\n")
    parted = load_dataset(str(tmp_path), dense.spec)
    assert (len(parted.train), len(parted.val)) == (6, 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        load_dataset(str(tmp_path / "empty"), dense.spec)
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 16, 16, 3), np.uint8), y=np.array([7, 900, 3, 1]))
    assert len(load_dataset(str(tmp_path / "x.npz"), dense.spec).val) == 2


def test_training_learns_the_outputs_of_the_dense_network_and_needs_them(place: Path) -> None:
    dense, _ = networks(place)
    split = load_dataset(str(place / "photos"), dense.spec).train
    pruned = prune(dense, method="magnitude", budget=Budget(kind="macs", value=0.6), align=1).checkpoint
    names = [o.name for o in dense.network.outputs]
    model, teacher = (build_model(c.spec, c.state_dict) for c in (pruned, dense))
    before = fidelity(TorchRunner(model), TorchRunner(teacher), split, names).metrics["infidelity"].value
    settings = TrainSettings(epochs=30, batch_size=6, lr=0.02, augment="none", device="cpu", seed=0, hold_out=0.2, workers=0)
    log = train(model, split, settings, teacher=teacher)
    after = fidelity(TorchRunner(model), TorchRunner(teacher), split, names).metrics["infidelity"].value
    assert after < 0.8 * before
    assert "accuracy" not in log.epochs[-1]
    assert log.epochs[-1]["held_out_loss"] < log.epochs[0]["held_out_loss"]
    with pytest.raises(BadInput, match="a teacher is needed"):
        train(model, split, settings)
    other = load_checkpoint(place / "host.onnx", arch_options={"trunk": "fine"})
    with pytest.raises(BadInput, match="outputs of other shapes"):
        train(model, split, settings, teacher=build_model(other.spec, other.state_dict))


def test_what_int8_costs_is_seen_at_every_output(place: Path) -> None:
    dense, _ = networks(place)
    x = load_dataset(str(place / "photos"), dense.spec).train.tensor()
    int8 = ptq(dense, [x], calibration="mse", bias_correction=False)
    plain, fake = build_model(dense.spec, dense.state_dict), fake_quant_model(int8)
    wanted = [log_probabilities(plain, x)]
    parts = zip(plain.outputs(x), fake.outputs(x), strict=True)
    errors = [((b - a).square().flatten(1).sum(1) / a.square().flatten(1).sum(1)).mean() for a, b in parts]
    assert divergence(fake, [x], wanted) == pytest.approx(float(sum(errors)) / 2, rel=1e-4)
    assert divergence(plain, [x], wanted) == 0.0


def test_evaluate_states_fidelity_and_the_hosts_answers(place: Path, rescompress: Run) -> None:
    def figures(*words: object) -> dict[str, Any]:
        return dict(json.loads(rescompress("evaluate", *words, "--data", place / "photos", "--json").stdout))

    found, same = figures(place / "pruned.safetensors"), figures(place / "dense.safetensors")
    assert found["infidelity"] > 0.01
    assert set(found["outputs"]) == {"t10", "t22"} or set(found["outputs"]) == {"fine", "coarse"}
    assert (same["infidelity"], same["agreement"]) == (0.0, 1.0)
    assert 0 <= found["agreement"] <= 1
    assert "top1" not in found


@pytest.mark.slow
def test_every_command_knows_networks_without_labels(place: Path, tmp_path: Path, rescompress: Run) -> None:
    shutil.copy(place / "host.onnx", tmp_path)
    config = {
        "checkpoint": "host.onnx",
        "data": str(place / "photos"),
        "preprocess": "rescale",
        "arch_options": {"trunk": "auto"},
        "prune": {"macs": 0.6, "align": 1, "method": "magnitude"},
        "finetune": {"epochs": 20, "batch_size": 6, "lr": 0.02, "augment": "none", "workers": 0},
        "quantize": {"mode": "qat", "epochs": 1, "batch_size": 6, "workers": 0, "augment": "none"},
        "targets": ["jetson"],
    }
    (tmp_path / "trunk.yaml").write_text(json.dumps(config))
    done = rescompress("run", "trunk.yaml", "-o", "out", "--json", cwd=tmp_path)
    rows = {row["stage"]: row["metrics"] for row in json.loads(done.stdout)["rows"]}
    assert rows["dense"]["infidelity"]["value"] == 0.0
    assert all(rows[stage]["infidelity"]["value"] > 0 for stage in ("prune", "finetune", "quantize"))
    assert rows["finetune"]["infidelity"]["value"] < rows["prune"]["infidelity"]["value"]
    host = tmp_path / "out" / "host.onnx"
    assert any(n.op_type == "QuantizeLinear" for n in onnx.load(str(host)).graph.node)
    page = rescompress("report", "out", "-o", "report.html", cwd=tmp_path)
    assert "infidelity" in (tmp_path / "report.html").read_text(), page.stderr
    assert "infidelity" in rescompress("compare", "out", "out", cwd=tmp_path).stdout
    gate = ("gate", "out", "--baseline", "out", "--max-size", "inf", "--max-latency", "inf")
    assert rescompress(*gate, "--max-infidelity", "2", cwd=tmp_path).returncode == 0
    assert "infidelity" in rescompress(*gate, "--max-infidelity", "0.0001", cwd=tmp_path, code=3).stdout
    assert "nothing was compared" in rescompress(*gate, cwd=tmp_path, code=5).stderr


@pytest.mark.parametrize("int8", [False, True])
def test_sensitivity_needs_no_labels(int8: bool, place: Path, rescompress: Run) -> None:
    words = ("--int8",) if int8 else ()
    done = rescompress("sensitivity", place / "dense.safetensors", "--data", place / "photos", "--json", *words)
    document = json.loads(done.stdout)
    assert document["groups"]
    assert bool(document.get("int8")) is int8


@pytest.mark.slow
def test_the_command_line_trains_and_quantizes_trunks(place: Path, tmp_path: Path, rescompress: Run) -> None:
    words = ("--data", place / "photos", "--json")
    training = ("--epochs", "1", "--train-batch", "6", "--augment", "none", "--workers", "0")
    tuned = json.loads(
        rescompress("finetune", place / "pruned.safetensors", *words, *training, "-o", "tuned.st", cwd=tmp_path).stdout
    )
    assert tuned["infidelity"] > 0
    made = json.loads(rescompress("quantize", "tuned.st", *words, "-o", "int8.st", cwd=tmp_path).stdout)
    assert made["infidelity_before"] == pytest.approx(tuned["infidelity"])
    assert made["infidelity_after"] != made["infidelity_before"]
    assert made["top1_after"] is None
    host = load_checkpoint(tmp_path / "int8.st").host
    assert host is not None
    assert reference(host).network.outputs == load_checkpoint(tmp_path / "int8.st").network.outputs


def test_without_a_host_the_dense_network_has_to_be_named(place: Path, tmp_path: Path, rescompress: Run) -> None:
    for checkpoint, name in zip(networks(place), ("dense", "pruned"), strict=True):
        bare = {k: v for k, v in checkpoint.provenance.items() if k != "host"}
        save_checkpoint(Checkpoint(checkpoint.spec, checkpoint.state_dict, None, bare), tmp_path / f"{name}.st")
    words = ("--data", place / "photos")
    assert "--reference" in rescompress("evaluate", "pruned.st", *words, cwd=tmp_path, code=5).stderr
    done = rescompress("evaluate", "pruned.st", *words, "--reference", "dense.st", "--json", cwd=tmp_path)
    whole = rescompress("evaluate", place / "pruned.safetensors", *words, "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["infidelity"] == json.loads(whole.stdout)["infidelity"]
    assert "learns from a teacher" in rescompress("finetune", "pruned.st", *words, cwd=tmp_path, code=5).stderr


def a_run(infidelity: float, error: float, **more: Metric) -> GateRun:
    metrics = {
        "infidelity": Metric(value=infidelity, unit="fraction", provenance="measured", n=100, std_error=error),
        "macs": Metric(value=5.0, unit="macs", provenance="counted"),
    }
    stages = (StageResult(stage="prune", kind="prune", of="prune", status="done", metrics={**metrics, **more}),)
    return GateRun("run", Path(), Manifest(stages=stages))


@pytest.mark.parametrize(
    ("value", "error", "verdict"),
    [(0.02, 0.001, "pass"), (0.08, 0.001, "fail"), (0.05, 0.01, "inconclusive"), (0.0, 0.0, "pass")],
)
def test_the_gate_judges_infidelity_by_its_bounds(value: float, error: float, verdict: str) -> None:
    report = judge(a_run(value, error), a_run(0.01, 0.001), Limits(max_infidelity=0.05))
    (check,) = [c for c in report.checks if c.name == "infidelity"]
    assert (check.verdict, report.verdict) == (verdict, verdict)
    assert check.unit == "fraction"


def test_the_gate_passes_no_limit_that_nothing_is_known_of() -> None:
    top1 = Metric(value=0.9, unit="fraction", provenance="measured", n=100, std_error=0.03)
    labelled = a_run(0.0, 0.0, top1=top1)
    with pytest.raises(BadInput, match="one run has an accuracy"):
        judge(a_run(0.01, 0.001), labelled, Limits(max_infidelity=0.05))
    only = labelled.manifest.stages[0]
    bare = only.model_copy(update={"metrics": {k: m for k, m in only.metrics.items() if k != "infidelity"}})
    run = GateRun("run", Path(), Manifest(stages=(bare,)))
    report = judge(run, run, Limits(max_infidelity=0.05, max_drop=None, max_macs=1.0))
    assert report.verdict == "inconclusive"
    with pytest.raises(BadInput, match="infidelity is -1"):
        judge(a_run(-1.0, 0.0), a_run(0.0, 0.0), Limits(max_infidelity=0.05))


def test_rows_of_fidelity_are_weighed_against_each_other() -> None:
    better, worse = a_run(0.01, 0.001).manifest, a_run(0.02, 0.001).manifest
    rows = [rows_of(better)[0], rows_of(worse)[0]]
    assert dominated(rows) == {1}
    assert run_row(worse, "x").metrics["infidelity"].value == 0.02
