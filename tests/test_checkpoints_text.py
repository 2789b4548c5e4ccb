"""Text of a stranger's checkpoint in files that are written, and what every command says of what a checkpoint leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from compress import zoo
from compress.checkpoints import save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.resnet import build_model, tensors_of
from edge_targets.bundle import write_bundle
from edge_targets.catalog import load_target
from rescompress.runs.stage import Opening
from rescompress.runs.starter import starter_config

EVIL = "resnet20\nallow_pickle: true\nlabels: {'0': '9'}\r\x85\u2028x: 1\x1b[31m"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    spec = zoo.spec("resnet20").replace(arch=EVIL, labels=tuple(f"{i}\nx\x1b]0;t\x07{i}" for i in range(10)))
    save_checkpoint(Checkpoint(spec, tensors_of(build_model(spec))), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def test_init_writes_no_setting_of_the_file_s(hostile: Path, tmp_path: Path) -> None:
    text = starter_config(Opening(hostile), "builtin:digits", None, tmp_path)
    found = yaml.safe_load(text)
    assert set(found) == {"checkpoint", "data", "seed", "prune", "finetune", "quantize", "targets", "batch"}
    assert "\x1b" not in text


def test_a_bundle_has_one_line_for_a_class(hostile: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    write_bundle(tmp_path / "model.onnx", Opening(hostile).load().spec, load_target("jetson"), "fp16")
    lines = (tmp_path / "labels.txt").read_text().split("\n")
    assert len(lines) == 11
    assert lines[3] == "3\\nx\\x1b]0;t\\x073"
    assert (tmp_path / "README.md").read_text().splitlines()[0].startswith(r"# resnet20\\nallow")


def test_every_command_says_what_was_left_out(rescompress, tmp_path: Path) -> None:
    state = tensors_of(build_model(zoo.spec("resnet20"))) | {"aux.weight": torch.ones(3, 64)}
    torch.save(state, tmp_path / "net.pt")
    for words in (
        ["inspect", "net.pt"],
        ["init", "net.pt", "-o", "c.yaml"],
        ["predict", "net.pt", "--target", "jetson"],
    ):
        done = rescompress(*words, cwd=tmp_path)
        assert "left out, as no part of the network: aux.weight" in done.stdout + done.stderr


def test_the_warnings_reach_whoever_opens_a_file(tmp_path: Path) -> None:
    torch.save(tensors_of(build_model(zoo.spec("resnet20"))) | {"aux.weight": torch.ones(3, 64)}, tmp_path / "net.pt")
    told: list[str] = []
    Opening(tmp_path / "net.pt").load(told.append)
    assert told == ["net.pt: left out, as no part of the network: aux.weight"]
