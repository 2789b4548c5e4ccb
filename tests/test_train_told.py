"""`finetune` as a command that people use alone: what it says, and what a training that fails leaves behind."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Command
from PIL import Image

from compress.checkpoints import save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.data import Inputs, MemoryStore, Split
from compress.resnet import build_model, tensors_of
from compress.train import train
from rescompress.core.errors import BadInput, DataError
from rescompress.core.settings import TrainSettings
from rescompress.core.spec import Block, Head, ModelSpec, Stem, StemConv

SPEC = ModelSpec(
    input_shape=(3, 16, 16),
    stem=Stem(convs=(StemConv(width=4, kernel=3, stride=1),), max_pool=False),
    stages=((Block(name="layer1.0", kind="basic", widths=(4, 4)),),),
    head=Head(num_classes=2),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A network and twenty images of two classes to train on."""
    rng = np.random.default_rng(0)
    for part, many in (("train", 10), ("val", 4)):
        for name in ("cat", "dog"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(many):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / part / name / f"{i}.png")
    torch.manual_seed(0)
    save_checkpoint(Checkpoint(SPEC, tensors_of(build_model(SPEC))), tmp_path / "net.safetensors")
    return tmp_path


def finetune(run: Command, folder: Path, *more: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    return run("finetune", "net.safetensors", "-d", "data", "--train-batch", 4, "--epochs", 1, *more, cwd=folder, code=code)


def test_a_training_that_fails_leaves_the_earlier_result(rescompress: Command, folder: Path) -> None:
    finetune(rescompress, folder)
    made = folder / "rescompress-out" / "finetune.safetensors"
    before = hashlib.sha256(made.read_bytes()).hexdigest()
    failed = finetune(rescompress, folder, "--lr", 1000, "--weight-decay", 1000, code=5)
    assert "diverged" in failed.stderr
    assert hashlib.sha256(made.read_bytes()).hexdigest() == before
    next((folder / "data" / "val" / "cat").iterdir()).write_bytes(b"")
    finetune(rescompress, folder, "--lr", 0.01, code=5)
    assert hashlib.sha256(made.read_bytes()).hexdigest() == before, "nor one whose evaluation fails"


def test_what_the_data_lacks_is_said_once(rescompress: Command, folder: Path) -> None:
    (folder / "data" / "train" / "cat" / "3.png").write_bytes(b"no picture")
    said = finetune(rescompress, folder, "--skip-corrupt").stderr
    assert said.count("cannot be read and are left out") == 1
    shutil.rmtree(folder / "rescompress-out")
    words = ("quantize", "net.safetensors", "-d", "data", "--calib", 8, "--skip-corrupt", "--mode", "ptq")
    assert rescompress(*words, cwd=folder).stderr.count("cannot be read and are left out") == 1


def test_what_needs_a_teacher_is_said_where_there_is_none(rescompress: Command, folder: Path) -> None:
    assert "teacher" not in finetune(rescompress, folder).stderr
    said = finetune(rescompress, folder, "--distill", 0.3, "--temperature", 2).stderr
    assert "distill, temperature" in said
    assert "without a teacher" in said
    assert "without a teacher" not in finetune(rescompress, folder, "--distill", 0.3, "--teacher", "net.safetensors").stderr


def split(n: int) -> Split:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
    return Split(MemoryStore(pixels), np.arange(n) % 2, ("a", "b"), Inputs.of(SPEC).preprocessing, f"test {n}")


def how(**changed: object) -> TrainSettings:
    return TrainSettings.model_validate({"epochs": 1.0, "batch_size": 8, "device": "cpu", "teacher": None} | changed)


def test_plain_descent_trains() -> None:
    log = train(build_model(SPEC), split(16), how(momentum=0.0))
    assert len(log.epochs) == 1


def test_no_part_of_a_batch_is_a_single_image() -> None:
    deep = SPEC.replace(input_shape=(3, 4, 4), stem=Stem(convs=(StemConv(width=4, kernel=3, stride=4),), max_pool=False))
    few = Split(MemoryStore(np.zeros((6, 4, 4, 3), np.uint8)), np.arange(6) % 2, ("a", "b"), Inputs.of(deep).preprocessing, "t")
    assert len(train(build_model(deep), few, how(batch_size=16, accumulate=8)).epochs) == 1
    with pytest.raises(DataError, match="1 image is left"):
        train(build_model(SPEC), split(2).subset(np.array([0, 0])), how(hold_out=0.5))


def test_a_saved_state_of_another_training_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    state, said = tmp_path / "finetune.pt", []

    def stop(_: object) -> None:
        if state.is_file():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(build_model(SPEC), split(16), how(epochs=9.0), progress=stop, resume_file=state, save_every_s=0.0)
    train(build_model(SPEC), split(16), how(epochs=2.0), resume_file=state, note=said.append)
    assert [text for text in said if "saved at step" in text]


def test_weights_that_the_last_step_ruins_are_seen() -> None:
    with pytest.raises(BadInput, match="diverged"):
        train(build_model(SPEC), split(8), how(epochs=0.1, weight_decay=1e3).model_copy(update={"lr": 1e38}))
