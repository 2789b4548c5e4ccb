"""The Python face: what the documentation shows runs as it stands, and importing it is light."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from report_factory import write_run

import rescompress
from compress.quantize import on_grid

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
    fraction, milliseconds = float(done.stdout.split()[0]), float(done.stdout.split()[-1])
    assert 0.4 < fraction <= 0.5
    assert milliseconds > 0
    assert {p.name for p in tmp_path.iterdir()} == {"half.safetensors", "half-int8.onnx"}


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
