"""`rescompress sensitivity` and `rescompress methods`, as typed."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

DIGITS = Path(__file__).parents[1] / "examples" / "resnet20_digits.safetensors"


def test_methods_lists_every_file(rescompress):
    done = rescompress("methods", "--json")
    names = {m["name"] for m in json.loads(done.stdout)}
    assert {"magnitude", "bn_scale", "taylor", "fpgm", "random", "reconstruct"} <= names


def test_sensitivity_measures_and_draws(rescompress, tmp_path):
    picture = tmp_path / "curves.svg"
    done = rescompress("sensitivity", DIGITS, "--data", "builtin:digits", "--calib", 32, "-o", picture, "--json")
    document = json.loads(done.stdout)
    assert document["method"] == "reconstruct"
    assert document["blocks"]
    root = ET.fromstring(picture.read_text())
    lines = [e for e in root.iter() if e.tag.endswith("polyline")]
    assert len(lines) == len(document["groups"]) > 5
    table = rescompress("sensitivity", DIGITS)
    assert "layer1.0.conv1" in table.stdout
    assert "no --data" in table.stderr


@pytest.mark.parametrize("args", [("--method", "magnitud"), ("-o", "x.pdf"), ("--method", "taylor")])
def test_bad_input_ends_with_five(rescompress, args):
    rescompress("sensitivity", DIGITS, *args, code=5)
