"""The catalogue: every device loads, every number has a source, names and aliases resolve, errors help."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compress.zoo import spec
from edge_targets import catalog, tensorrt_versions
from edge_targets.advice import advice_for, reports
from edge_targets.device import PREDICTED, Device, Figure, base_precision
from edge_targets.latency import LIKE, fitted_model, predict
from edge_targets.tensorrt_versions import Capabilities, capabilities, parse_release, parse_version
from edge_targets.trtexec import BuildOptions, build_command
from rescompress.cli import options
from rescompress.cli.app import main
from rescompress.core.errors import TargetError
from rescompress.core.layers import walk
from rescompress.runs.file_check import facts_of


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


BOARDS = {
    "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0": "jetson-orin-nano-8gb-super",
    "NVIDIA Jetson AGX Orin Developer Kit\0": "jetson-agx-orin-64gb",
    "NVIDIA Jetson Nano Developer Kit": "jetson-nano",
    "NVIDIA Jetson Xavier NX Developer Kit": "jetson-xavier-nx",
    "NVIDIA Jetson AGX Orin Industrial": "jetson-agx-orin-industrial",
    "NVIDIA IGX Orin Developer Kit": "igx-orin-700",
    "NVIDIA Jetson TX2 NX Developer Kit": "jetson-tx2-nx",
    "NVIDIA Jetson TX2 Developer Kit": "jetson-tx2",
    "Raspberry Pi 5 Model B Rev 1.0": "arm-cortex-a76",
    "Some other board": None,
}


def test_the_board_is_known_by_its_model_text(tmp_path, monkeypatch):
    devices = {name: catalog.load_device(name) for name in catalog.target_names() if name not in catalog.ALIASES}
    monkeypatch.setattr(catalog, "load_device", devices.__getitem__)  # every file is read once, not once for each text
    file = tmp_path / "model"
    found = {}
    for model in BOARDS:
        file.write_text(model)
        found[model] = catalog.board_here(file)
    assert found == BOARDS
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


MINE = NANO.replace("jetson-nano", "mine")


def test_what_promises_a_prediction_can_predict(folder):
    """A device with power modes is listed as predictable: whatever its file leaves out is found when it is read."""
    assert set(PREDICTED) == {*fitted_model().architectures, *LIKE}
    layers = walk(spec("resnet18"))
    (folder / "mine.yaml").write_text(MINE)
    read: list[str] = []
    for key in Device.model_fields:
        if not (lines := [line for line in MINE.splitlines() if line.startswith(f"{key}:") and "{" in line]):
            continue
        (folder / "mine.yaml").write_text(MINE.replace(f"{lines[0]}\n", ""))
        try:
            device = catalog.load_device("mine")
        except TargetError:
            continue  # said when it is read
        for precision in device.precisions:
            assert predict(layers, device, precision=precision).p50_ms > 0
        read.append(key)
    assert read == ["memory_gb", "dla_count"], "nothing else is of no use to a prediction"
    (folder / "mine.yaml").write_text(MINE.replace("architecture: maxwell", "architecture: turing"))
    with pytest.raises(TargetError, match="cannot be done for 'turing'"):
        catalog.load_device("mine")


def test_devices_of_ones_own_are_targets(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv(catalog.PLACES, "")
    before = catalog.target_names()
    own = tmp_path / "config" / "rescompress" / "devices"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text(MINE)
    (tmp_path / "other.yaml").write_text(NANO.replace("jetson-nano", "other"))
    catalog.add_device_file(tmp_path / "other.yaml")
    package = tmp_path / "site" / "boards_of_mine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('a list of names imports nothing')")
    (package / "third.yaml").write_text(NANO.replace("jetson-nano", "third"))
    info = tmp_path / "site" / "boards-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: boards\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{catalog.GROUP}]\nboards = boards_of_mine\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert set(catalog.target_names()) - set(before) == {"mine", "other", "third"}
    assert options.targets("thi") == ["third"]
    for name in ("mine", "other", "third"):
        assert predict(walk(spec("resnet18")), catalog.load_target(name).device, precision="fp16").device == name
    (own / "jetson-nano.yaml").write_text(NANO)
    with pytest.raises(TargetError, match="described elsewhere too"):
        catalog.load_device("jetson-nano")
    (own / "arm.yaml").write_text(NANO.replace("jetson-nano", "arm"))
    with pytest.raises(TargetError, match="name of an alias"):
        catalog.load_device("arm")


def test_a_device_file_is_an_option_of_every_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(catalog.PLACES, "")
    (tmp_path / "mine.yaml").write_text(MINE)
    monkeypatch.setattr("sys.argv", ["rescompress", "targets", "mine", "--json", "--device-file", str(tmp_path / "mine.yaml")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)[0]["facts"]["name"] == "mine"
    for path, words in ((tmp_path / "none.yaml", "no device file"), (tmp_path / "bad.yaml", "describes no device")):
        (tmp_path / "bad.yaml").write_text("name: bad\n")
        monkeypatch.setattr("sys.argv", ["rescompress", "targets", "--device-file", str(path)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 5
        assert words in " ".join(capsys.readouterr().err.split())


SPOILT = [
    (MINE.replace('align_source: "', 'align_source: "x" #'), "at least 11"),
    (CPU.replace("name: cpu", "name: mine").replace("openvino", "openvinoo"), "runtime"),
    (CPU, "it is called 'cpu', not 'mine'"),
    ("", "describes no device"),
    ("name: [mine", "line 1"),
    ("name: m\u00fc".encode("latin-1"), "utf-8"),
    (NANO.replace("jetson-nano", "mine").replace('tensorrt: "8.2.1"', 'tensorrt: "7.1"'), "too old"),
    (re.sub("fp16_macs:.*\n", "", NANO.replace("jetson-nano", "mine")), "needs fp16_macs too"),
    (MINE.replace("align_source", "alignsource").replace("name: mine", "nam: mine"), "(?s)name: .*align_source: .*nam: "),
    (
        re.sub("align: .*\n", "align: {fp32: 8, int8: 0}\n", CPU.replace("name: cpu", "name: mine")),
        "greater than or equal to 1",
    ),
]


def test_a_file_that_describes_no_device_is_an_error_of_that_device_alone(folder):
    """One by one each is refused; all together they spoil no list, and each is named."""
    whole = [t.name for t in catalog.all_targets()]
    wheres = []
    for i, (content, reason) in enumerate(SPOILT):
        file = folder / "mine.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(TargetError, match=reason) as e:
            catalog.load_target("mine")
        assert e.value.where == str(file)
        assert "\n" not in e.value.what
        assert "Value error" not in e.value.what
        assert e.value.remedy
        wheres.append(str(file.rename(folder / f"mine-{i}.yaml")))
    targets, errors = catalog.survey()
    assert [t.name for t in targets if t.alias is None] == whole
    assert [error.where for error in errors] == wheres
    assert catalog.identify("NVIDIA Jetson AGX Orin Developer Kit") == "jetson-agx-orin-64gb"


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


ORIN_AGX, ORIN_NX, NANO_8GB, THOR = (
    f"jetson-{name}" for name in ("agx-orin-64gb", "orin-nx-16gb", "orin-nano-8gb-super", "thor-t5000")
)


@pytest.mark.parametrize(
    ("board", "version", "dla", "qdq"),
    [
        (ORIN_AGX, "8.5.2", True, False),
        (ORIN_AGX, "10.3.0", True, False),
        (ORIN_AGX, "10.7.0", True, False),
        (ORIN_AGX, "10.8.0", False, False),
        (ORIN_AGX, "10.16.2", False, False),
        (ORIN_AGX, "11.4.0", False, False),
        (ORIN_AGX, "11.4.1", True, True),
        (ORIN_AGX, "v110401", True, True),
        (ORIN_AGX, "11.5.0", True, True),
        (ORIN_NX, "10.7.0", True, False),
        (ORIN_NX, "11.4.1", False, False),
        (NANO_8GB, "10.3.0", False, False),
        (NANO_8GB, "11.4.1", False, False),
        (THOR, "10.13.3", False, False),
        (THOR, "11.4.1", False, False),
        ("jetson-nano", "8.2.1", False, False),
        ("jetson-xavier-nx", "8.5.2", True, False),
    ],
)
def test_dla_is_a_matter_of_patch_number_and_board(board, version, dla, qdq):
    known = catalog.load_device(board).capabilities(version)
    assert (known.dla, known.qdq_on_dla) == (dla, qdq)
    build = BuildOptions("fp16", dla_core=0)
    if dla:
        assert "--useDLACore=0" in build_command(known, "m", "e", build)
    else:
        with pytest.raises(TargetError, match="DLA") as e:
            build_command(known, "m", "e", build)
        assert "11.4.1" in e.value.remedy


@pytest.mark.parametrize(
    ("name", "releases"),
    [
        (ORIN_AGX, {"7.2.2": "11.4.1", "7.2.1": "10.16.2", "6.2+10.7": "10.7.0", "6.2.1": "10.3.0", "5.1.6": "8.5.2"}),
        (NANO_8GB, {"7.2.1": "10.16.2", "6.2+10.7": "10.7.0", "6.2": "10.3.0"}),
        (THOR, {"7.2.2": "11.4.1", "7.1": "10.13.3", "7.0": "10.13.3"}),
        ("jetson-agx-xavier", {"5.1.6": "8.5.2", "5.1.4": "8.5.2", "4.6.6": "8.2.1"}),
        ("jetson-nano", {"4.6.6": "8.2.1"}),
    ],
)
def test_the_releases_of_a_board(name, releases):
    device = catalog.load_device(name)
    assert {jetpack: device.tensorrt(jetpack).tensorrt for jetpack in releases} == releases
    order = [parse_release(release.jetpack) for release in device.software if "+" not in release.jetpack]
    assert order == sorted(order, reverse=True)
    pythons = {(release.jetpack[0], release.python) for release in device.software}
    assert pythons <= {("4", "3.6"), ("5", "3.8"), ("6", "3.10"), ("7", "3.12")}


def test_releases_that_only_agx_orin_and_thor_have_are_no_others():
    for target in catalog.all_targets():
        has = any(release.tensorrt == "11.4.1" for release in target.device.software)
        assert has == ("agx-orin" in target.name or "thor" in target.name), target.name


def test_thor_computes_at_the_rates_of_its_data_sheet():
    thor = catalog.load_device(THOR)
    rates = [thor.macs_per_clock(p) for p in ("int8", "fp16", "fp32")]
    assert rates == [8192, 4096, 2048]
    assert thor.peak_tops("int8") == pytest.approx(517, rel=0.01)


@pytest.mark.parametrize(
    ("name", "dense_tops"),
    [("jetson-agx-orin-industrial", 157 / 2), ("igx-orin-700", 157 / 2), ("jetson-xavier-nx-16gb", 13.6)],
)
def test_the_boards_that_were_missing(name, dense_tops):
    assert catalog.load_device(name).peak_tops("int8") == pytest.approx(dense_tops, rel=0.01)


def test_reports_of_versions_have_sources_and_meet_the_versions_they_are_about():
    assert all(source.startswith("https://") for report in reports() for source in report.sources)
    assert len({report.name for report in reports()}) == len(reports())

    def names(board, precision, version=None, *, dla=False):
        target = catalog.load_target(board, tensorrt=version)
        return {report.name for report in advice_for(target, [precision], dla=dla)}

    assert "int8-of-10.3-on-orin" in names(NANO_8GB, "int8")
    assert "int8-of-10.3-on-orin" not in names(NANO_8GB, "fp16")
    assert "int8-of-10.3-on-orin" not in names(NANO_8GB, "int8", "10.7.0")
    assert "no-10.8-for-jetpack-6" in names(NANO_8GB, "fp16", "10.9.0")
    assert names("jetson-agx-xavier", "int8") == set()
    assert "qdq-not-on-the-dla" in names(ORIN_AGX, "int8", "11.4.0", dla=True)
    assert "qdq-not-on-the-dla" not in names(ORIN_AGX, "int8", "11.4.1", dla=True)
    assert "qdq-not-on-the-dla" not in names(ORIN_AGX, "fp16", dla=True)
    assert "little-gain-of-int8-on-thor" in names(THOR, "int8")
    assert names("cpu", "int8") == set()


def test_lint_and_the_alias_say_what_the_target_is():
    target = catalog.load_target("jetson")
    kinds = {kind for report in facts_of(target).reports for kind in report.kinds}
    assert kinds == {"int8", "float"}
    (note,) = catalog.alias_notes(target)
    for part in ("Orin Nano 8 GB", "MAXN_SUPER", "JetPack 6.2", "10.3.0"):
        assert part in note
    assert catalog.alias_notes(catalog.load_target(catalog.DEFAULT_JETSON)) == []


def test_on_a_board_the_alias_is_that_board_and_needs_no_words(monkeypatch):
    monkeypatch.setattr(catalog, "board_here", lambda: "igx-orin-700")
    target = catalog.load_target("jetson")
    assert target.name == "igx-orin-700"
    assert catalog.alias_notes(target) == []
    monkeypatch.setattr(catalog, "board_here", lambda: "arm-cortex-a76")
    assert catalog.load_target("jetson").name == catalog.DEFAULT_JETSON


@pytest.mark.parametrize(
    ("text", "release"), [("11.4.1.106", (11, 4, 1)), ("v8510", (8, 5, 10)), ("v110401", (11, 4, 1)), ("10.3", (10, 3, 0))]
)
def test_patch_numbers_are_read_in_every_spelling(text, release):
    assert parse_release(text) == release
    assert parse_version(text) == release[:2]


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
        ("8.4", 17, False, True, "--buildOnly", True),
        ("9.2", 19, False, True, "--skipInference", True),
        ("10.0", 20, False, True, "--skipInference", True),
        ("10.3", 20, False, True, "--skipInference", True),
        ("10.11", 20, False, True, "--skipInference", True),
        ("10.12", 20, True, True, "--skipInference", True),
        ("10.16", 24, True, True, "--skipInference", True),
        ("11.1", 25, True, False, "--skipInference", True),
    ],
)
def test_the_version_table_row_by_row(version, max_opset, strong, flags, build_flag, pool):
    row = capabilities(version)
    assert (row.max_opset, row.strongly_typed, row.precision_flags) == (max_opset, strong, flags)
    assert (row.skip_inference, row.mem_pool_size) == (build_flag, pool)
    assert row.opset <= min(row.max_opset, 19)
    assert row.explicit_batch_flag == version.startswith(("8", "9"))


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
