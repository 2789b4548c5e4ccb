"""The Python face: what the documentation shows runs as it stands, and importing it is light."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from report_factory import write_run
from rich.console import Console

import rescompress
from compress.checkpoints.base import Checkpoint
from compress.data import Dataset
from compress.quantize import fake_quant_model, on_grid
from rescompress.core.errors import BadInput, RescompressError
from rescompress.core.settings import TrainSettings

ROOT = Path(__file__).parents[1]


def test_the_documented_example_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)
    assert len(blocks) == 1
    code = blocks[0].replace('"examples/', f'"{ROOT}/examples/')
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    table, *lines = done.stdout.split("\n\n")
    assert [row.split("|")[1].split()[0] for row in table.splitlines()[2:]] == ["dense", "pruned", "float32", "INT8"]
    assert "Manifest(target:jetson-orin-nano-8gb-super" in done.stdout
    assert "LatencyPrediction(predicted 0." in done.stdout
    assert all(len(line) <= 200 for line in done.stdout.splitlines()), lines
    assert {p.name for p in tmp_path.iterdir()} == {"int8.safetensors", "out"}


@pytest.fixture(scope="module")
def dense() -> Checkpoint:
    return rescompress.load(ROOT / "examples" / "resnet20_digits.safetensors")


@pytest.fixture(scope="module")
def data(dense: Checkpoint) -> Dataset:
    return rescompress.load_dataset("builtin:digits", dense)


@pytest.fixture(scope="module")
def int8(dense: Checkpoint, data: Dataset) -> Checkpoint:
    return rescompress.quantize(dense, data.train.take(64, 0))


def test_every_result_prints_in_one_line_and_as_a_table(
    dense: Checkpoint, data: Dataset, int8: Checkpoint, tmp_path: Path
) -> None:
    write_run(tmp_path / "run")
    half = rescompress.prune(dense, macs=0.5, method="magnitude")
    results: list[tuple[object, str]] = [
        (dense, "270 k"),
        (int8, "INT8 (tensorrt)"),
        (half, f"({half.macs_after / half.macs_before:.2f})"),
        (data, "1437 images"),
        (data.val, "360"),
        (rescompress.evaluate(dense, data.val.take(50, 0)), "50"),
        (rescompress.predict_latency(dense, "jetson"), "jetson-orin-nano-8gb-super"),
        (rescompress.load_manifest(tmp_path / "run"), "dense"),
    ]
    for result, wanted in results:
        line = repr(result)
        assert len(line) <= 200
        assert "\n" not in line
        assert wanted in line
        assert wanted in result._repr_html_()  # type: ignore[attr-defined]
        console = Console(width=300, file=io.StringIO())
        console.print(result)
        assert wanted in console.file.getvalue()  # type: ignore[attr-defined]


def test_names_with_markup_and_control_characters_stay_text(dense: Checkpoint) -> None:
    named = dataclasses.replace(dense, spec=dense.spec.model_copy(update={"arch": "<b>\x1b[31m[bold]"}))
    assert "\x1b" not in repr(named)
    assert "<b>" not in named._repr_html_()
    console = Console(width=300, file=io.StringIO())
    console.print(named)
    assert "[bold]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_an_int8_checkpoint_built_again_is_the_int8_network(dense: Checkpoint, data: Dataset, int8: Checkpoint) -> None:
    x = data.val.take(20, 0).tensor()
    with torch.inference_mode():
        built, wanted = rescompress.build_model(int8)(x), fake_quant_model(int8)(x)
        other = rescompress.build_model(dense)(x)
    assert torch.equal(built, wanted)
    assert not torch.equal(built, other)
    with pytest.raises(BadInput, match="tensors of its own"):
        rescompress.build_model(int8, int8.state_dict)


def test_images_may_be_given_in_every_form(dense: Checkpoint, data: Dataset) -> None:
    chosen = data.train.take(64, 0)
    drawn = chosen.take(512, 0)  # what the face takes of a split
    forms = (chosen, drawn.tensor(), [x for x, _ in drawn.batches(64)], list(drawn.batches(64)))
    first, *others = [rescompress.quantize(dense, images) for images in forms]
    assert all(other.quantization == first.quantization for other in others)


def test_files_and_networks_are_evaluated_alike(dense: Checkpoint, data: Dataset, tmp_path: Path) -> None:
    file = rescompress.export_onnx(dense, tmp_path / "net.onnx")
    rescompress.save_checkpoint(dense, tmp_path / "net.safetensors")
    some = data.val.take(60, 0)
    found = [rescompress.evaluate(what, some) for what in (dense, file, str(tmp_path / "net.safetensors"))]
    assert [list(f.predictions) for f in found] == [list(found[0].predictions)] * 3
    assert found[1].metrics["top1"].runtime == "onnxruntime"


def test_val_is_read_by_evaluation_alone(dense: Checkpoint, data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    bait = dataclasses.replace(data, val=cast(Any, None))
    half = rescompress.prune(dense, macs=0.5, images=bait, method="magnitude")
    tuned = rescompress.finetune(half, bait, epochs=0.05, settings=TrainSettings(device="cpu"))
    assert any(not torch.equal(v, tuned.state_dict[k]) for k, v in half.checkpoint.state_dict.items())
    rescompress.quantize(tuned, bait)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda d, _: rescompress.prune(d), "0 budgets"),
        (lambda d, _: rescompress.prune(d, macs=0.5, ratio=0.2), "2 budgets"),
        (lambda d, _: rescompress.prune(d, latency=0.5, method="magnitude"), "needs a device"),
        (lambda _, q: rescompress.finetune(q, cast(Any, None)), "already quantized"),
        (lambda d, _: rescompress.compare(d, d, names=["a", "a"]), "1 different names for 2"),
        (lambda _, __: rescompress.compare(), "nothing to compare"),
    ],
)
def test_what_makes_no_sense_is_said(dense: Checkpoint, int8: Checkpoint, call: Callable[..., object], words: str) -> None:
    with pytest.raises(RescompressError, match=words):
        call(dense, int8)


def test_int8_of_the_python_face_is_that_of_the_command_line(tmp_path: Path) -> None:
    dense = rescompress.load_checkpoint(ROOT / "examples" / "resnet20_digits.safetensors")
    data = rescompress.load_dataset("builtin:digits", dense.spec)
    int8 = rescompress.quantize(dense, data.train.take(64, 0).batches(64))
    again = on_grid(int8)
    assert all(torch.equal(value, again.state_dict[key]) for key, value in int8.state_dict.items())
    write_run(tmp_path / "run")
    assert rescompress.load_manifest(str(tmp_path / "run")).stages


def test_import_is_light_and_every_name_is_there() -> None:
    script = "import sys, rescompress; print([m for m in ('torch', 'numpy', 'onnx', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert set(rescompress._HOME) == set(rescompress.__all__)
    for name in rescompress.__all__:
        assert getattr(rescompress, name) is not None


def test_equal_checkpoints_are_equal_files_in_every_process(tmp_path: Path) -> None:
    script = "import sys, rescompress as rc; rc.save_checkpoint(rc.load_checkpoint(sys.argv[1]), sys.argv[2])"
    for i in range(3):
        source = str(ROOT / "examples" / "resnet20_digits.safetensors")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        args = [sys.executable, "-c", script, source, str(tmp_path / f"{i}.safetensors")]
        subprocess.run(args, env=environment, check=True, timeout=120)
    files = [(tmp_path / f"{i}.safetensors").read_bytes() for i in range(3)]
    assert files[0] == files[1] == files[2]
