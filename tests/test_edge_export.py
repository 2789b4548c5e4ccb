"""Exports for boards through the command line: archives, and the precision that suits the board's TensorRT."""

import dataclasses
import functools
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from archives import extract
from quantize_zoo import checkpoint_of, images_for

from compress.checkpoints import load_checkpoint, save_checkpoint
from edge_targets.catalog import load_target
from export.to_onnx import ExportOptions
from rescompress.api import quantize
from rescompress.cli.workspace import deliver
from rescompress.core.quantizers import PROFILES
from rescompress.core.settings import DeploySettings, ExportSettings, QuantizeSettings
from rescompress.runs.plan import profile_for
from rescompress.runs.stage import Opening
from rescompress.runs.stages.deploy import jobs_for
from rescompress.runs.stages.export import export_options
from rescompress.runs.stages.shared import onnx_of, write_onnx
from rescompress.runs.stages.target import for_target, profile_notes

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "examples" / "resnet20_digits.safetensors"


@pytest.fixture
def call(rescompress):
    """Return the command line as a function that gives the document."""
    return lambda *arguments, cwd: json.loads(rescompress(*arguments, "--json", cwd=cwd).stdout)


def unpacked(archive, folder):
    """Unpack an archive, check its sums, and return the folder in it."""
    extract(archive, folder)
    (root,) = folder.iterdir()
    summed = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=root, capture_output=True, text=True)
    assert summed.returncode == 0, summed.stdout
    return root


def test_an_archive_holds_the_bundle_and_nothing_else(call, tmp_path):
    crowded = tmp_path / "bundle"
    crowded.mkdir()
    (crowded / "private.txt").write_text("not part of it")
    beside = call("export", DIGITS, "--target", "jetson-nano", "-o", "bundle", "--archive", cwd=tmp_path)
    assert beside["archive"] == "bundle.tar.gz"
    assert (tmp_path / beside["onnx"]).is_file()
    for name, executable in (("build.sh", True), ("infer.py", True), ("model.json", False), ("model.onnx", False)):
        assert bool((crowded / name).stat().st_mode & 0o111) == executable, name
    root = unpacked(tmp_path / "bundle.tar.gz", tmp_path / "a")
    names = {p.name for p in root.iterdir()}
    assert names >= {"model.onnx", "build.sh", "infer.py", "model.json", "README.md", "SHA256SUMS"}
    assert names == set(beside["files"])
    assert os.access(root / "build.sh", os.X_OK)
    alone = call("export", DIGITS, "--target", "jetson-nano", "-o", "given.tar.gz", cwd=tmp_path)
    assert alone["archive"] == "given.tar.gz"
    assert (tmp_path / "given.tar.gz").read_bytes() == (tmp_path / "bundle.tar.gz").read_bytes()
    assert call("export", DIGITS, "--target", "jetson-nano", cwd=tmp_path)["archive"] is None


def test_no_file_of_another_network_stays_in_a_bundle(call, tmp_path):
    checkpoint = load_checkpoint(DIGITS)
    labels = tuple(f"digit {i}" for i in range(10))
    for name, known in (("labelled", labels), ("bare", None)):
        spec = checkpoint.spec.model_copy(update={"labels": known})
        save_checkpoint(replace(checkpoint, spec=spec), tmp_path / f"{name}.safetensors")
    out = tmp_path / "out"
    first = call("export", "labelled.safetensors", "--target", "jetson-nano", "-o", "out", cwd=tmp_path)
    assert "labels.txt" in first["files"]
    second = call("export", "bare.safetensors", "--target", "jetson-nano", "-o", "out", cwd=tmp_path)
    assert set(second["files"]) == {p.name for p in out.iterdir()} == set(first["files"]) - {"labels.txt"}
    assert not (tmp_path / "rescompress-out" / "jetson-nano" / "labels.txt").exists()


def test_a_delivered_file_keeps_its_mode(tmp_path):
    source = tmp_path / "build.sh"
    source.write_text("#!/bin/sh\n")
    for mode in (0o755, 0o640):
        source.chmod(mode)
        assert deliver(source, tmp_path / "out" / "build.sh").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(
    ("target", "profile", "asked", "written"),
    [
        ("jetson-thor-t5000", "tensorrt", "auto", "int8+fp16"),
        ("rtx-sm86", "tensorrt", "auto", "int8+fp16"),
        ("jetson-thor-t5000", "openvino", "auto", "int8"),
        ("jetson-thor-t5000", "tensorrt", "int8", "int8"),
        ("jetson-thor-t5000", "tensorrt", "fp32", "fp32"),
        ("jetson-thor-t5000", None, "auto", "fp16"),
        ("jetson-agx-orin-64gb", "tensorrt", "auto", "int8"),
        ("cpu", "tensorrt", "auto", "int8"),
        ("cpu", "openvino", "auto", "int8"),
        ("cpu-ort", "onnxruntime", "auto", "int8"),
        ("cpu-ort", "openvino", "auto", "int8"),
    ],
)
def test_the_precision_of_a_file_suits_the_target(target, profile, asked, written):
    chosen = load_target(target)
    checkpoint = SimpleNamespace(quantization=SimpleNamespace(profile=profile) if profile else None)
    assert for_target(ExportOptions(opset=chosen.opset, precision=asked), checkpoint, chosen).precision == written
    old = for_target(ExportOptions(opset=17, precision=asked), checkpoint, chosen).precision
    assert old == (written if written != "int8+fp16" else "int8")


@functools.cache
def network_of(profile):
    """Return a small network, quantized for a profile."""
    checkpoint = checkpoint_of("basic")
    return quantize(checkpoint, images_for(checkpoint.spec), profile=profile) if profile else checkpoint


@pytest.mark.parametrize("board", ["jetson-thor-t5000", "jetson-agx-orin-64gb at 7.2", "jetson-agx-orin-64gb", "jetson-nano"])
@pytest.mark.parametrize("profile", [None, *PROFILES])
def test_deploy_writes_the_files_that_export_writes(tmp_path, board, profile):
    name, _, release = board.partition(" at ")
    chosen = load_target(name, jetpack=release or None)
    checkpoint = network_of(profile)
    save_checkpoint(checkpoint, tmp_path / "model.safetensors")
    jobs, notes = jobs_for(Opening(tmp_path / "model.safetensors"), None, DeploySettings(), chosen, tmp_path)
    int8 = profile is not None and "int8" in chosen.precisions
    assert [job.precision for job in jobs] == ["fp16", *(["int8"] if int8 else [])]
    assert notes == (profile_notes(checkpoint, chosen) if int8 else [])
    variants = [dataclasses.replace(checkpoint, quantization=None), checkpoint]
    for job, variant in zip(jobs, variants, strict=False):
        options = export_options(ExportSettings(opset=chosen.opset))
        write_onnx(onnx_of(variant, for_target(options, variant, chosen)), tmp_path / "export.onnx")
        assert job.onnx.read_bytes() == (tmp_path / "export.onnx").read_bytes()


def test_a_quantized_network_for_a_strongly_typed_board_leaves_no_float32_arithmetic(call, tmp_path):
    call(
        "quantize",
        DIGITS,
        "-d",
        "builtin:digits",
        "--calib",
        "64",
        "--profile",
        "tensorrt",
        "-o",
        "int8.safetensors",
        cwd=tmp_path,
    )
    found = call("export", "int8.safetensors", "-t", "jetson-thor-t5000", "-d", "builtin:digits", cwd=tmp_path)
    assert found["precision"] == "int8+fp16"
    assert found["parity"]["top1_agreement"] >= 0.99
    assert not [f for f in found["lint"] if f["severity"] == "error"]
    model = onnx.load(tmp_path / found["onnx"])
    scales = {n.input[1] for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")}
    types = {i.data_type for i in model.graph.initializer if i.name in scales}
    assert types == {onnx.TensorProto.FLOAT16}
    plain = call(
        "export", "int8.safetensors", "-t", "jetson-thor-t5000", "--precision", "fp16", "-d", "builtin:digits", cwd=tmp_path
    )
    assert plain["precision"] == "fp16"
    assert plain["parity"]["mean_abs"] < 1e-4 * plain["parity"]["logit_range"], (
        "a float file is compared with the float network"
    )


@pytest.mark.parametrize(
    ("targets", "profile"),
    [
        ([], "tensorrt"),
        (["cpu"], "openvino"),
        (["cpu-ort"], "onnxruntime"),
        (["arm"], "onnxruntime"),
        (["cpu", "cpu-ort"], "openvino"),
        (["cpu-ort", "cpu"], "onnxruntime"),
        (["cpu", "cpu-ort", "jetson"], "tensorrt"),
        (["rtx-sm86"], "tensorrt"),
    ],
)
def test_the_first_target_chooses_the_profile_unless_one_runs_tensorrt(targets, profile):
    assert profile_for(QuantizeSettings(), targets) == profile
    assert profile_for(QuantizeSettings(profile="openvino"), targets) == "openvino"


@pytest.mark.parametrize("trained", PROFILES)
def test_a_target_of_another_runtime_says_what_it_costs(trained):
    checkpoint = SimpleNamespace(quantization=SimpleNamespace(profile=trained))
    wanted = {"cpu": "openvino", "cpu-ort": "onnxruntime", "jetson": "tensorrt"}
    for name, profile in wanted.items():
        notes = profile_notes(checkpoint, load_target(name))
        assert len(notes) == (trained != profile)
        assert all(f"--profile {profile}" in note and trained in note for note in notes)
