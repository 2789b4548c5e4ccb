"""`rescompress sensitivity` and `rescompress methods`, as typed."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

DIGITS = Path(__file__).parents[1] / "examples" / "resnet20_digits.safetensors"


def run(*args):
    command = [sys.executable, "-m", "rescompress.cli.app", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_methods_lists_every_file():
    done = run("methods", "--json")
    names = {m["name"] for m in json.loads(done.stdout)}
    assert {"magnitude", "bn_scale", "taylor", "fpgm", "random", "reconstruct"} <= names


def test_sensitivity_measures_and_draws(tmp_path):
    picture = tmp_path / "curves.svg"
    done = run("sensitivity", DIGITS, "--data", "builtin:digits", "--calib", 32, "-o", picture, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["method"] == "reconstruct"
    assert document["blocks"]
    root = ET.fromstring(picture.read_text())
    lines = [e for e in root.iter() if e.tag.endswith("polyline")]
    assert len(lines) == len(document["groups"]) > 5
    table = run("sensitivity", DIGITS)
    assert "layer1.0.conv1" in table.stdout
    assert "no --data" in table.stderr


@pytest.mark.parametrize("args", [("--method", "magnitud"), ("-o", "x.pdf"), ("--method", "taylor")])
def test_bad_input_ends_with_five(args):
    done = run("sensitivity", DIGITS, *args)
    assert done.returncode == 5
    assert "Traceback" not in done.stderr
