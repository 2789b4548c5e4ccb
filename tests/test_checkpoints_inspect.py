"""`rescompress inspect` and `formats`: what they show, and how they fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

Outcome = tuple[int, str, str]


@pytest.fixture
def cli(rescompress):
    def run(*args: object) -> Outcome:
        done = rescompress(*args, code=None)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inspect") / "resnet50.pt"
    torch.save(torchvision.models.resnet50().state_dict(), path)
    return path


def test_counts_are_torch_s_own(cli, resnet50: Path) -> None:
    code, out, _ = cli("inspect", resnet50, "--json")
    document = json.loads(out)
    model = torchvision.models.resnet50().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    assert code == 0
    assert document["totals"]["params"] == sum(p.numel() for p in model.parameters())
    assert 2 * document["totals"]["macs"] == counter.get_total_flops()
    assert document["totals"]["depth"] == 50
    assert sum(layer["params"] for layer in document["layers"]) == document["totals"]["params"]
    in_blocks = sum(block["macs"] for block in document["blocks"])
    outside = sum(layer["macs"] for layer in document["layers"] if layer["block"] is None)
    assert in_blocks + outside == document["totals"]["macs"]


def test_the_table_shows_every_block_and_convolution(cli, resnet50: Path) -> None:
    code, out, _ = cli("inspect", resnet50)
    assert code == 0
    assert "resnet50: 3-4-6-3 bottleneck blocks" in out
    for words in ("layer4.2", "1x1/2 projection 512 -> 1024", "25,557,032", "4,089,184,256", "7x7", "112x112", "--input"):
        assert words in out, words
    assert out.count("│   conv3 ") == 16


def test_v_shows_every_layer(cli, resnet50: Path) -> None:
    _, out, _ = cli("inspect", resnet50, "-v")
    assert out.count("batch_norm") == 53


def test_input_and_options_take_the_place_of_what_is_assumed(cli, resnet50: Path) -> None:
    _, out, _ = cli(
        "inspect", resnet50, "--json", "--input", "3x160x128", "--preprocess", "half", "--arch-option", "stride_at=0"
    )
    document = json.loads(out)
    assert document["input_shape"] == [3, 160, 128]
    assert document["preprocessing"]["name"] == "half"
    assert not document["preprocessing"]["assumed"]
    assert document["arch"] == "resnet50_v1"
    assert document["notes"] == [
        "no tensor shows strides or dilation: read as strides 1,2,2,2 (else: --arch-option strides=...)"
    ]
    _, out, _ = cli("inspect", resnet50, "--json", "--arch-option", "strides=1,2,2,2", "--preprocess", "half")
    assert not [note for note in json.loads(out)["notes"] if "strides" in note]


def test_groups_are_all_inner_widths_and_streams(cli, resnet50: Path) -> None:
    groups = json.loads(cli("inspect", resnet50, "--json")[1])["groups"]
    inner = [g for g in groups if g["kind"] == "inner"]
    assert len(inner) == 32
    assert [g["channels"] for g in groups if g["kind"] == "stream"] == [64, 256, 512, 1024, 2048]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--input", "224"], "3x224x224"),
        (["--input", "1x224x224"], "3 channels"),
        (["--input", "3x0x224"], "3x224x224"),
        (["--preprocess", "imagnet"], "'imagenet'"),
        (["--arch-option", "stride=0"], "stride"),
        (["--arch-option", "stride_at=7"], "0, 1"),
        (["--arch-option", "root=elsewhere"], "elsewhere"),
    ],
)
def test_bad_options_end_with_5_and_a_remedy(cli, resnet50: Path, args: list[str], words: str) -> None:
    code, out, err = cli("inspect", resnet50, *args)
    assert (code, out) == (5, "")
    assert words in err
    assert "Traceback" not in err


def test_a_wrong_name_brings_the_nearest(cli, resnet50: Path) -> None:
    code, _, err = cli("inspect", resnet50.with_name("resnet5.pt"))
    assert code == 5
    assert "resnet50.pt" in err


def test_formats_lists_every_file_of_the_package(cli) -> None:
    import compress.checkpoints.formats as package

    document = json.loads(cli("formats", "--json")[1])
    files = {p.stem for p in Path(package.__path__[0]).glob("*.py")} - {"__init__"}
    assert {f["name"] for f in document["formats"]} == files
    assert "resnet50" in document["architectures"]
