"""A network of one's own names: what is said of its file, its teacher (``--teacher dense``), and a training that did harm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.checkpoints import load_checkpoint
from rescompress.cli.workspace import WORKSPACE, teacher_file
from rescompress.core.artifact import Artifact
from rescompress.core.errors import BadInput, CheckpointError
from rescompress.core.manifest import Manifest, StageResult
from rescompress.core.metric import accuracy
from rescompress.runs.reporter import Silent
from rescompress.runs.stage import Context, Opening, Outcome, Source
from rescompress.runs.stages.network import lost_in_training


def made(folder: Path, stage: str, content: bytes, *before: str) -> StageResult:
    path = folder / f"{stage}.safetensors"
    path.write_bytes(content)
    written = Artifact.of("checkpoint", path, folder)
    return StageResult(stage=stage, kind=stage, of=stage, status="done", outputs=(written,), ancestry=before)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.chdir(tmp_path)
    WORKSPACE.mkdir()
    dense = made(WORKSPACE, "dense", b"dense", "of the first file")
    assert dense.checkpoint_sha256 is not None
    prune = made(WORKSPACE, "prune", b"pruned", dense.checkpoint_sha256, "of the first file")
    manifest = Manifest(stages=(dense, prune))
    manifest.save(WORKSPACE)
    return manifest


@pytest.mark.usefixtures("workspace")
def test_dense_is_the_network_that_the_file_was_pruned_from() -> None:
    Path("copy.safetensors").write_bytes(b"pruned")
    assert teacher_file("dense", Path("copy.safetensors")) == WORKSPACE / "dense.safetensors"
    assert teacher_file(None, Path("copy.safetensors")) is None
    assert teacher_file("none", Path("copy.safetensors")) is None
    assert teacher_file("big.pt", Path("copy.safetensors")) == Path("big.pt")
    Path("dense").write_bytes(b"a file of that name")
    assert teacher_file("dense", Path("copy.safetensors")) == Path("dense")


@pytest.mark.usefixtures("workspace")
def test_a_network_that_the_workspace_does_not_know_has_no_dense_one() -> None:
    Path("other.safetensors").write_bytes(b"another network")
    for name in ("other.safetensors", "nowhere.safetensors"):
        with pytest.raises(BadInput, match="does not tell which network"):
            teacher_file("dense", Path(name))
    (WORKSPACE / "manifest.json").unlink()
    with pytest.raises(BadInput, match="does not tell which network"):
        teacher_file("dense", Path("other.safetensors"))


@pytest.mark.parametrize(
    ("right", "n", "harm"), [(20, 100, True), (56, 100, False), (70, 100, False), (200, 1000, False), (None, 100, False)]
)
@pytest.mark.parametrize("by_file", [False, True])
def test_training_that_ends_clearly_below_its_start_is_told(
    workspace: Manifest, right: int | None, n: int, harm: bool, by_file: bool
) -> None:
    prune = workspace.stages[1].model_copy(update={"metrics": {"top1": accuracy(61, 100, runtime="torch")}})
    source = Source(sha256=prune.checkpoint_sha256) if by_file else Source(stage="prune")
    context = Context(WORKSPACE, workspace.with_stage(prune), Silent())
    outcome = Outcome({"top1": accuracy(right, n, runtime="torch")} if right is not None else {})
    said = lost_in_training(context, source, outcome)
    assert (said is not None) == harm
    if said is not None:
        assert "from 61.00 to 20.00 %" in said
        assert "lr: auto" in said


@pytest.mark.usefixtures("workspace")
def test_nothing_is_said_where_the_start_is_not_known(workspace: Manifest) -> None:
    outcome = Outcome({"top1": accuracy(1, 100, runtime="torch")})
    for source in (Source(stage="prune"), Source(sha256="another"), Source(stage="none")):
        assert lost_in_training(Context(WORKSPACE, workspace, Silent()), source, outcome) is None


def test_the_remedy_for_unknown_names_is_the_code_and_of_a_teacher_its_safetensors(tmp_path: Path) -> None:
    own = tmp_path / "own.pt"
    torch.save({"entry.weight": torch.zeros(4, 3, 3, 3), "clf.weight": torch.zeros(2, 4)}, own)
    for load in (lambda: load_checkpoint(own), Opening(own).load):
        with pytest.raises(CheckpointError, match="no ResNet that is known here") as caught:
            load()
        assert "--code model.py:make_net" in str(caught.value.remedy)
        assert "ONNX" in str(caught.value.remedy)
    teacher = Opening(tmp_path / "net.safetensors", arch_options=("code=model.py:make",)).of(own)
    with pytest.raises(CheckpointError, match="no ResNet that is known here") as caught:
        teacher.load()
    assert "--teacher dense" in str(caught.value.remedy)


def test_python_in_place_of_a_checkpoint_is_told(tmp_path: Path) -> None:
    code = tmp_path / "model.py"
    code.write_text("import torch\nclass Net(torch.nn.Module): ...\n")
    with pytest.raises(CheckpointError, match="Python") as caught:
        load_checkpoint(code)
    assert "--code model.py:CALLABLE" in str(caught.value.remedy)
