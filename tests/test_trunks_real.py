"""The trunks of five programs that people deploy: random weights, real photographs, the whole program in onnxruntime."""

from __future__ import annotations

import importlib.util
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT.parent / "shared" / "data" / "imagenette" / "val.tar"
WEIGHTS = PHOTOS.with_name("resnet18_imagenette.pt")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PHOTOS.is_file(), reason="needs the photographs of ../shared")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of photographs without labels."""
    place = tmp_path_factory.mktemp("photographs")
    with tarfile.open(PHOTOS) as archive:
        members = [m for m in archive if m.isfile() and m.name.lower().endswith((".jpeg", ".jpg"))]
        for i, member in enumerate(members[:: len(members) // 192][:192]):
            content = archive.extractfile(member)
            assert content is not None
            (place / f"{i:03}.jpg").write_bytes(content.read())
    return place


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The benchmark, as a module."""
    spec = importlib.util.spec_from_file_location("trunks", ROOT / "benchmarks" / "trunks.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize("name", ["faster_rcnn", "retinanet", "deeplab", "patchcore", "policy"])
def test_a_deployed_program_keeps_its_answers_with_its_own_trunk_and_states_what_a_smaller_one_costs(
    name: str, folder: Path, benchmark: ModuleType, tmp_path: Path
) -> None:
    found = benchmark.measured(name, str(folder), 64, 12, tmp_path)
    floats = [o["relative_error"] for o in found["float"].values() if "relative_error" in o]
    assert floats
    assert max(floats) < 1e-4
    assert found["macs"][1] <= 0.7 * found["macs"][0]
    assert found["blocks"] >= 8
    for kind in ("pruned", "int8"):
        assert found[kind]["fidelity"]["infidelity"] > 0  # random weights: no channel can stand in for another
        assert set(found[kind]["outputs"]) == set(found["float"])
    if name == "patchcore":
        assert [shape[0] for shape in found["borders"].values()] == [512, 1024]


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="needs the ResNet-18 of ../shared")
def test_a_trunk_that_has_learnt_stays_near_what_it_was(folder: Path, benchmark: ModuleType, tmp_path: Path) -> None:
    found = benchmark.measured("trained_policy", str(folder), 96, 48, tmp_path, WEIGHTS)
    assert found["macs"][1] <= 0.7 * found["macs"][0]
    for kind in ("pruned", "int8"):
        assert 0 < found[kind]["fidelity"]["infidelity"] < 0.3
        assert max(o["relative_error"] for o in found[kind]["outputs"].values()) < 0.2
