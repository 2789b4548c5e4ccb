"""``torch.export`` and TorchScript archives are read by their graph, without running anything of them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from importer_nets import made
from torch import nn

import rescompress as rc
from compress.importers.proof import difference
from compress.resnet import build_model
from rescompress.core.errors import CheckpointError

NAMES = ("padded by slices", "pre-activation", "gates", "blur", "activations", "two heads", "input normalised")


def save(module: nn.Module, shape: tuple[int, ...], kind: str, path: Path) -> None:
    x = torch.randn(1, *shape)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        match kind:
            case "exported":
                torch.export.save(torch.export.export(module, (x,)), path)
            case "traced":
                torch.jit.save(torch.jit.trace(module, x, strict=False), path)
            case _:
                torch.jit.save(torch.jit.script(module), path)


@pytest.mark.parametrize("kind", ["exported", "traced"])
@pytest.mark.parametrize("name", NAMES)
def test_an_archive_is_read_as_what_it_computes(name: str, kind: str, tmp_path: Path) -> None:
    module, shape = made(name)
    save(module, shape, kind, tmp_path / "net.pt2")
    checkpoint = rc.load_checkpoint(tmp_path / "net.pt2", input_shape=None if kind == "exported" else shape)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        wanted = module(x)
    theirs = list(wanted.values()) if isinstance(wanted, dict) else [wanted]
    mine = build_model(checkpoint.network, checkpoint.state_dict).outputs(x)
    assert len(mine) == len(theirs)
    assert all(difference(a, b) < 1e-5 for a, b in zip(mine, theirs, strict=True))
    own = {k for k in module.state_dict() if k.endswith("weight")}
    assert own <= set(checkpoint.state_dict) or name in ("gates",)


def test_a_scripted_module_is_read(tmp_path: Path) -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()
    save(module, (3, 16, 16), "scripted", tmp_path / "net.pt")
    checkpoint = rc.load_checkpoint(tmp_path / "net.pt", input_shape=(3, 16, 16))
    x = torch.randn(2, 3, 16, 16)
    assert difference(build_model(checkpoint.network, checkpoint.state_dict)(x), module(x)) < 1e-5


def test_what_is_not_known_is_named(tmp_path: Path) -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).cumsum(1)

    for kind in ("exported", "traced"):
        save(Sorted(), (3, 8, 8), kind, tmp_path / kind)
        with pytest.raises(CheckpointError, match="cumsum") as caught:
            rc.load_checkpoint(tmp_path / kind, input_shape=(3, 8, 8))
        assert caught.value.remedy


def test_another_size_than_the_archive_was_made_for_is_refused(tmp_path: Path) -> None:
    module, shape = made("tutorial")
    save(module, shape, "exported", tmp_path / "net.pt2")
    with pytest.raises(CheckpointError, match="made for 1x28x28"):
        rc.load_checkpoint(tmp_path / "net.pt2", input_shape=(1, 32, 32))
