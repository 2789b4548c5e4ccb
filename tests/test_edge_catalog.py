"""The catalogue: every device loads, every number has a source, names and aliases resolve, errors help."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_targets import catalog, tensorrt_versions
from edge_targets.device import Figure, base_precision
from edge_targets.tensorrt_versions import Capabilities, capabilities, parse_version
from rescompress.cli.app import main
from rescompress.core.errors import TargetError


@pytest.mark.parametrize("target", catalog.all_targets(), ids=lambda t: t.name)
def test_every_target_loads_and_names_its_sources(target):
    assert target.device.name == target.name
    figures = [v for v in dict(target.device).values() if isinstance(v, Figure)]
    assert all(len(f.source) > 10 for f in figures)
    assert all(len(m.source) > 10 for m in target.device.modes)
    for precision in target.precisions:
        assert target.align(precision) >= 1
    if target.name.startswith("jetson"):
        device = target.device
        assert device.modes
        assert device.software
        top = device.mode()
        assert all(m.gpu_mhz <= top.gpu_mhz and m.sm_count <= top.sm_count for m in device.modes)
        assert device.max_gpu_mhz.value == top.gpu_mhz
        assert target.opset <= target.capabilities.max_opset


def test_the_published_tops_come_out_of_the_rule():
    assert catalog.load_device("jetson-agx-orin-64gb").peak_tops("int8") == pytest.approx(85, rel=0.01)
    assert catalog.load_device("jetson-agx-xavier").peak_tops("int8") == pytest.approx(22, rel=0.04)
    # 67 sparse TOPS are published for the Super mode: half of it dense
    assert catalog.load_device("jetson-orin-nano-8gb-super").peak_tops("int8") == pytest.approx(67 / 2, rel=0.01)


@pytest.mark.parametrize("name", ["jetson-nano", "jetson-tx2"])
def test_old_boards_have_no_int8_and_read_opset_13(name):
    target = catalog.load_target(name)
    assert target.opset == 13
    assert "int8" not in target.precisions
    with pytest.raises(TargetError, match="does not run int8") as e:
        target.check_precision("int8")
    assert "fp16" in e.value.remedy


@pytest.mark.parametrize(
    ("name", "best"), [("jetson-nano", "fp16"), ("jetson-thor-t5000", "fp16"), ("rtx-sm86", "fp16"), ("cpu", "fp32")]
)
def test_the_best_float(name, best):
    assert catalog.load_device(name).best_float == best


def test_a_file_counts_as_what_its_convolutions_compute_in():
    written = ["fp32", "fp16", "int8", "int8+fp16"]
    assert [base_precision(p) for p in written] == ["fp32", "fp16", "int8", "int8"]


def test_aliases_say_what_they_stand_for(monkeypatch, tmp_path):
    monkeypatch.setattr(catalog, "board_here", lambda: None)
    target = catalog.load_target("jetson")
    assert (target.alias, target.name) == ("jetson", catalog.DEFAULT_JETSON)
    monkeypatch.setattr(catalog, "board_here", lambda: "jetson-agx-xavier")
    assert catalog.load_target("jetson").name == "jetson-agx-xavier"


@pytest.mark.parametrize(
    ("model", "device"),
    [
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0", "jetson-orin-nano-8gb-super"),
        ("NVIDIA Jetson AGX Orin Developer Kit\0", "jetson-agx-orin-64gb"),
        ("NVIDIA Jetson Nano Developer Kit", "jetson-nano"),
        ("NVIDIA Jetson Xavier NX Developer Kit", "jetson-xavier-nx"),
        ("Raspberry Pi 5 Model B Rev 1.0", "arm-cortex-a76"),
        ("Some other board", None),
    ],
)
def test_the_board_is_known_by_its_model_text(model, device, tmp_path):
    file = tmp_path / "model"
    file.write_text(model)
    assert catalog.board_here(file) == device
    assert catalog.board_here(tmp_path / "absent") is None


def test_an_unknown_target_names_the_nearest():
    with pytest.raises(TargetError) as e:
        catalog.load_target("jetson-orin-nanno-8gb")
    assert "jetson-orin-nano-8gb" in e.value.remedy
    with pytest.raises(TargetError):
        catalog.load_target("../devices/cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the device files, to be spoilt."""
    copied = shutil.copytree(catalog.DEVICES, tmp_path / "devices")
    monkeypatch.setattr(catalog, "DEVICES", copied)
    return copied


CPU = (catalog.DEVICES / "cpu.yaml").read_text()
NANO = (catalog.DEVICES / "jetson-nano.yaml").read_text()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (CPU.replace("name: cpu", "name: mine").replace("openvino", "openvinoo"), "runtime"),
        (CPU, "it is called 'cpu', not 'mine'"),
        ("", "describes no device"),
        ("name: [mine", "line 1"),
        ("name: m\u00fc".encode("latin-1"), "utf-8"),
        (NANO.replace("jetson-nano", "mine").replace('tensorrt: "8.2.1"', 'tensorrt: "7.1"'), "too old"),
        (re.sub("fp16_macs:.*\n", "", NANO.replace("jetson-nano", "mine")), "does not compute in fp16"),
    ],
)
def test_a_file_that_describes_no_device_is_an_error_of_that_device_alone(folder, content, reason):
    whole = [t.name for t in catalog.all_targets()]
    (folder / "mine.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TargetError, match=reason) as e:
        catalog.load_target("mine")
    assert e.value.where == str(folder / "mine.yaml")
    assert "\n" not in e.value.what
    assert e.value.remedy
    assert [t.name for t in catalog.all_targets()] == whole
    assert catalog.identify("NVIDIA Jetson AGX Orin Developer Kit") == "jetson-agx-orin-64gb"
    assert [error.where for error in catalog.survey()[1]] == [e.value.where]


def test_the_list_says_once_what_it_left_out_and_goes_without_its_alias(folder, monkeypatch, capsys):
    monkeypatch.setattr(catalog, "board_here", lambda: None)
    whole = {t.alias or t.name for t in catalog.survey()[0]}
    spoilt = folder / f"{catalog.DEFAULT_JETSON}.yaml"
    spoilt.write_text(spoilt.read_text().replace("runtime: tensorrt", "runtime: tensorrtt"))
    monkeypatch.setattr("sys.argv", ["rescompress", "targets", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert not ended.value.code
    assert {row["name"] for row in json.loads(out)} == whole - {"jetson", catalog.DEFAULT_JETSON}
    assert err.count("left out") == err.count(str(spoilt)) == 1


def test_a_release_decides_the_tensorrt_version():
    assert catalog.load_target("jetson-agx-orin-64gb", jetpack="5.1.3").tensorrt_version == "8.5.2"
    assert catalog.load_target("jetson-agx-orin-64gb", jetpack="7.2").strongly_typed
    assert not catalog.load_target("jetson-agx-orin-64gb").strongly_typed
    with pytest.raises(TargetError):
        catalog.load_target("jetson-nano", jetpack="6.2")


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("8.2.1", (8, 2)),
        ("10.3.0.30", (10, 3)),
        ("TensorRT v8510", (8, 5)),
        ("v100300", (10, 3)),
        ("101601", (10, 16)),
        ("v7103", (7, 1)),
    ],
)
def test_versions_are_read_in_every_spelling(text, version):
    assert parse_version(text) == version


@pytest.mark.parametrize(
    ("version", "max_opset", "strong", "flags", "build_flag", "pool"),
    [
        ("8.2", 13, False, True, "--buildOnly", False),
        ("8.5", 17, False, True, "--buildOnly", True),
        ("8.6", 17, False, True, "--skipInference", True),
        ("10.3", 19, False, True, "--skipInference", True),
        ("10.11", 19, False, True, "--skipInference", True),
        ("10.12", 19, True, True, "--skipInference", True),
        ("10.16", 24, True, True, "--skipInference", True),
        ("11.1", 25, True, False, "--skipInference", True),
    ],
)
def test_the_version_table_row_by_row(version, max_opset, strong, flags, build_flag, pool):
    row = capabilities(version)
    assert (row.max_opset, row.strongly_typed, row.precision_flags) == (max_opset, strong, flags)
    assert (row.skip_inference, row.mem_pool_size) == (build_flag, pool)
    assert row.opset <= min(row.max_opset, 19)
    assert row.explicit_batch_flag == version.startswith("8")


def test_the_version_table_holds_nothing_that_nobody_reads():
    folder = Path(tensorrt_versions.__file__).parent
    readers = [p for top in (folder, folder.parent / "rescompress") for p in top.rglob("*.py")]
    text = "".join(p.read_text() for p in readers if p.name != Path(tensorrt_versions.__file__).name)
    assert [name for name in Capabilities._fields if not re.search(rf"\.{name}\b", text)] == []


def test_too_old_a_version_is_refused():
    with pytest.raises(TargetError, match="too old"):
        capabilities("7.1")
    with pytest.raises(TargetError, match="no TensorRT version"):
        parse_version("latest")


def test_importing_the_catalogue_loads_nothing_heavy():
    code = (
        "import sys, edge_targets.catalog; "
        "print([m for m in ('yaml', 'numpy', 'torch', 'onnx', 'openvino', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
