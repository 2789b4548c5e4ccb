"""Every command of the tutorials runs as it stands there, on stand-ins for the files that they speak of."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from report_factory import write_run

Command = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "tutorials"
DIGITS = ROOT / "examples" / "resnet20_digits.safetensors"


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    return [textwrap.dedent(body) for body in re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)]


def follow(page: str, rescompress: Command, folder: Path) -> None:
    """Run the commands of a page in a folder; each must end with 0."""
    commands = [shlex.split(line, comments=True) for block in blocks(page, "sh") for line in block.splitlines()]
    commands = [words for words in commands if words]
    assert len(commands) > 2
    for words in commands:
        assert words[0] == "rescompress", words
        rescompress(*words[1:], cwd=folder)


def pictures(folder: Path, names: tuple[str, ...], each: int, side: int = 40) -> None:
    """Write class folders of pictures that differ from class to class."""
    chance = np.random.default_rng(len(folder.parts))
    for k, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            noise = chance.integers(0, 120, (side, side, 3), dtype=np.uint8)
            noise[:, :, k % 3] += np.uint8(100)
            Image.fromarray(noise).save(folder / name / f"{i}.png")


def test_every_page_is_followed_and_linked() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {path.stem for path in PAGES.glob("*.md")}
    assert pages == {"orin", "raspberry", "ci", "search", "method"}
    assert all(f"(tutorials/{page}.md)" in index for page in pages)


def test_a_network_guarded_in_ci(rescompress: Command, tmp_path: Path) -> None:
    write_run(tmp_path / "last")
    write_run(tmp_path / "new")
    follow("ci", rescompress, tmp_path)
    assert (tmp_path / "gate.xml").is_file()


def test_a_pruning_method_of_ones_own(rescompress: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "resnet.safetensors").write_bytes(DIGITS.read_bytes())
    package = tmp_path / "site" / "mine"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (source,) = blocks("method", "python")
    (package / "l1.py").write_text(source, encoding="utf-8")
    (declared,) = blocks("method", "toml")
    group, name, value = re.search(r'entry-points\."(.+?)"\]\n(\w+) = "(.+?)"', declared).groups()  # type: ignore[union-attr]
    metadata = tmp_path / "site" / "mine-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    follow("method", rescompress, tmp_path)
    assert "smallest L1 norm first" in rescompress("methods", cwd=tmp_path).stdout
    assert (tmp_path / "l1.safetensors").read_bytes() != (tmp_path / "magnitude.safetensors").read_bytes()


@functools.cache
def small_resnet() -> dict[str, torch.Tensor]:
    # wide enough that half of it is left in multiples of 32, as INT8 on a board wants
    models = pytest.importorskip("timm").models.resnet
    torch.manual_seed(0)
    net = models.ResNet(models.Bottleneck, [1, 1, 1, 1], channels=(128, 128, 128, 128), stem_width=64, num_classes=3)
    return dict(net.state_dict())


@pytest.mark.slow
def test_a_resnet_from_pytorch_and_an_orin(rescompress: Command, tmp_path: Path) -> None:
    torch.save({"state_dict": small_resnet(), "img_size": 64}, tmp_path / "resnet50.pt")
    for split in ("train", "val"):
        pictures(tmp_path / "photos" / split, ("ant", "bee", "cow"), 12, 80)
    follow("orin", rescompress, tmp_path)
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.slow
def test_a_network_from_keras_and_a_raspberry_pi(rescompress: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    resnet = pytest.importorskip("keras.src.applications.resnet")

    def stack(x: object) -> object:
        for i, width in enumerate((64, 64, 128, 128), 2):
            x = resnet.stack_residual_blocks_v1(x, width, 1, stride1=1 if i == 2 else 2, name=f"conv{i}")
        return x

    net = resnet.ResNet(stack, False, True, "catdog", weights=None, input_shape=(64, 64, 3), classes=2, weights_name=None)
    net.save(tmp_path / "catdog.keras")
    del keras
    pictures(tmp_path / "pets", ("cat", "dog"), 40, 80)
    follow("raspberry", rescompress, tmp_path)
    assert (tmp_path / "pi" / "model.onnx").is_file()


@pytest.mark.slow
def test_a_search_over_a_weekend(rescompress: Command, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    (tmp_path / "resnet.safetensors").write_bytes(DIGITS.read_bytes())
    (tmp_path / "weekend.yaml").write_text(
        "checkpoint: resnet.safetensors\ndata: builtin:digits\nprune: {macs: 0.5, calib: 64}\n"
        "finetune: {epochs: 1}\nquantize: {mode: ptq, calib: 64}\ntargets: [jetson]\n",
        encoding="utf-8",
    )
    follow("search", rescompress, tmp_path)
    assert (tmp_path / "best.safetensors").is_file()
