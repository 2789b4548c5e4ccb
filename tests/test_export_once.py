"""A run's ONNX files: written, recounted and compared once per network, opset, precision and batch, whoever asks for them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from recorders import write_inputs

from rescompress.core.details import FileDetails
from rescompress.core.manifest import Manifest
from rescompress.core.settings import ExportSettings
from rescompress.runs.pipeline import run_stages
from rescompress.runs.plan import Builder
from rescompress.runs.reporter import Silent
from rescompress.runs.settings import Settings
from rescompress.runs.stage import Opening

FILE: Any = importlib.import_module("rescompress.runs.stages.export")


def run(folder: Path, settings: dict[str, ExportSettings]) -> Manifest:
    """Export a network, and prepare it for the boards that are named, each with its settings."""
    inputs = write_inputs(folder)
    builder = Builder(Opening(Path(inputs["net"])), Settings())
    stages: list[Any] = [builder.dense()]
    for name, asked in settings.items():
        stages.append(builder.export("dense", asked) if name == "export" else builder.target(name, "dense", asked))
    return run_stages(stages, folder / "out", {}, reporter=Silent()).manifest


def test_equal_files_are_written_and_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    compared: list[int] = []
    write, compare = FILE.write_onnx, FILE.check_parity
    monkeypatch.setattr(FILE, "write_onnx", lambda model, path: (written.append(path.parent.name), write(model, path)))
    monkeypatch.setattr(FILE, "check_parity", lambda *a: (compared.append(1), compare(*a))[1])
    same = ExportSettings(opset=17, precision="fp16")
    other = ExportSettings(opset=17, precision="fp16", batch=2)
    boards = ("jetson-orin-nano-8gb", "jetson-agx-orin-64gb", "jetson-orin-nx-16gb")
    manifest = run(tmp_path, {"export": same, boards[0]: same, boards[1]: same, boards[2]: other})
    assert len(written) == len(compared) == 2, "one for three stages, one for another batch"
    results = [manifest.stage(n) for n in ("export", *(f"target:{b}" for b in boards))]
    details = [r.details_as(FileDetails) for r in results if r is not None]
    keys = [d.file_key for d in details if d is not None]
    assert len(keys) == 4
    assert len(set(keys)) == 2
    assert keys[0] == keys[1] == keys[2]
    files = [(tmp_path / "out" / r.output("onnx").path).read_bytes() for r in results if r is not None]  # type: ignore[union-attr]
    assert files[0] == files[1] == files[2] != files[3]
    assert len({str(d.parity) for d in details[:3] if d is not None}) == 1
    assert next(r.metrics["size_bytes"] for r in results if r is not None).value == len(files[0])


def test_a_file_that_was_changed_is_written_again(tmp_path: Path) -> None:
    same = ExportSettings(opset=17, precision="fp16")
    manifest = run(tmp_path, {"export": same})
    first = (tmp_path / "out" / "model.onnx").read_bytes()
    (tmp_path / "out" / "model.onnx").write_bytes(b"damaged")
    again = run(tmp_path, {"export": same, "jetson-orin-nano-8gb": same})
    target = again.stage("target:jetson-orin-nano-8gb")
    assert target is not None
    assert (tmp_path / "out" / target.output("onnx").path).read_bytes() == first  # type: ignore[union-attr]
    assert manifest.stage("export") is not None
