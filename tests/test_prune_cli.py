"""`rescompress prune --iterations`, `rescompress sensitivity` and `rescompress methods`, as typed."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from PIL import Image

from compress.checkpoints import load_checkpoint
from compress.prune import ErrorCurve, apply, load_plan
from compress.prune.method import Curves
from compress.prune.picture import draw
from rescompress.core.errors import BadInput
from rescompress.core.layers import total_macs, walk
from rescompress.core.settings import PruneSettings, TrainSettings
from rescompress.runs.plan import Builder
from rescompress.runs.settings import Settings
from rescompress.runs.stage import Opening

DIGITS = Path(__file__).parents[1] / "examples" / "resnet20_digits.safetensors"


def test_methods_lists_every_file(rescompress):
    done = rescompress("methods", "--json")
    names = {m["name"] for m in json.loads(done.stdout)}
    assert {"magnitude", "bn_scale", "taylor", "fpgm", "random", "reconstruct"} <= names


def test_sensitivity_measures_and_draws(rescompress, tmp_path):
    picture = tmp_path / "curves.svg"
    done = rescompress("sensitivity", DIGITS, "--data", "builtin:digits", "--calib", 16, "-o", picture, "--int8", "--json")
    document = json.loads(done.stdout)
    assert document["method"] == "reconstruct"
    assert document["blocks"]
    assert "only 16 calibration images" in done.stderr
    root = ET.fromstring(picture.read_text())
    lines = [e for e in root.iter() if e.tag.endswith("polyline")]
    assert len(lines) == len(document["groups"]) > 5
    assert {"conv1", "layer3.2.conv2", "fc"} <= {layer["layer"] for layer in document["int8"]}
    assert all(layer["divergence"] >= 0 for layer in document["int8"])
    table = rescompress("sensitivity", DIGITS)
    assert "layer1.0.conv1" in table.stdout
    assert "no --data" in table.stderr


def test_the_picture_may_be_a_png(tmp_path):
    drawn = tmp_path / "curves.png"
    draw(Curves({"a": ErrorCurve((1, 0, 2), (0.0, 0.01, 0.5))}), "title", drawn)
    with Image.open(drawn) as image:
        assert image.format == "PNG"
        blue = sum(count for count, colour in image.getcolors(1 << 20) if colour == (0x25, 0x63, 0xEB))
    assert blue > 100


@pytest.mark.parametrize("args", [("--method", "magnitud"), ("-o", "x.pdf"), ("--method", "taylor"), ("--int8",)])
def test_bad_input_ends_with_five(rescompress, args):
    rescompress("sensitivity", DIGITS, *args, code=5)


def test_iterations_end_in_one_plan_for_the_dense_network(rescompress, tmp_path):
    plan = tmp_path / "plan.json"
    budget = ("--macs", "0.5", "--iterations", 2, "--finetune-epochs", 0.1, "-m", "magnitude", "--calib", 32)
    done = rescompress("prune", DIGITS, "--data", "builtin:digits", *budget, "--plan-out", plan, "--json", cwd=tmp_path)
    document = json.loads(done.stdout)
    assert document["macs_after"] <= 0.5 * document["macs_before"]
    assert (tmp_path / "rescompress-out" / "finetune-1.safetensors").is_file()
    dense = load_checkpoint(DIGITS)
    assert document["macs_before"] == total_macs(walk(dense.spec))
    assert total_macs(walk(apply(dense, load_plan(plan)).spec)) == document["macs_after"]


def test_iterations_shrink_evenly_and_need_fine_tuning():
    config = PruneSettings(macs=0.25, iterations=2)
    assert [config.step(i).budget for i in (1, 2)] == [("macs", 0.5), ("macs", 0.25)]
    assert PruneSettings(ratio=0.75, iterations=2).step(1).budget == ("ratio", 0.5)
    builder = Builder(Opening(DIGITS), Settings())
    names = [s.name for s in builder.prune_and_tune(config, TrainSettings(epochs=4), [])]
    assert names == ["prune-1", "finetune-1", "prune", "finetune"]
    with pytest.raises(BadInput, match="fine-tuning"):
        builder.prune_and_tune(config, None, [])
    with pytest.raises(ValueError, match="leave out iterations"):
        PruneSettings(plan="plan.json", iterations=2)


def test_images_of_one_class_are_told(rescompress, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "3").mkdir(parents=True)
        for i in range(2):
            Image.new("L", (8, 8), 40 * i).save(tmp_path / split / "3" / f"{i}.png")
    done = rescompress("prune", DIGITS, "--data", tmp_path, "-m", "taylor", "--macs", 0.7, "--json", cwd=tmp_path)
    notes = json.loads(done.stdout)["notes"]
    assert any("of one class" in n for n in notes)
    assert any("only 2 calibration" in n for n in notes)


def test_sensitivity_reads_and_writes_in_the_home_folder(rescompress, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for split in ("train", "val"):
        for label in ("0", "1"):
            (tmp_path / "photos" / split / label).mkdir(parents=True)
            Image.new("L", (8, 8), 40).save(tmp_path / "photos" / split / label / "0.png")
    args = ("--data", "~/photos", "-m", "magnitude", "--calib", 2, "-o", "~/curves.svg", "--json")
    found = json.loads(rescompress("sensitivity", DIGITS, *args, cwd=tmp_path).stdout)
    assert found["picture"] == str(tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").is_file()
