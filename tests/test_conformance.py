"""Every extension that is known here is conformant, and what is not is found."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_data_kinds import INPUTS as PETS
from test_data_kinds import as_shards, as_table

from compress.checkpoints.base import Format
from compress.data import Inputs
from compress.data.sources import Source
from compress.prune import load_method, method_names
from compress.prune.groups import find_groups, prunable
from compress.prune.method import Context, Curves, ErrorCurve, Method, curve_of
from compress.resnet import build_model
from edge_targets import backends
from edge_targets.backends import Backend
from edge_targets.catalog import DEVICES, load_device
from edge_targets.device import Figure
from export.lint import Rule
from export.passes import Pass
from rescompress.core import plugins
from rescompress.core.errors import BadInput
from rescompress.core.layers import walk
from rescompress.core.operations import Relu
from rescompress.core.spec import Preprocessing
from rescompress.show.track import Tracker
from rescompress.testing import (
    NotConformant,
    check_device,
    check_format,
    check_method,
    check_runtime,
    check_source,
    half_idle,
    permuted,
)

ROOT = Path(__file__).parents[1]

CHANCE = {"random"}
HERE = {"openvino", "onnxruntime"}
INPUTS = Inputs((3, 8, 8), 10, Preprocessing(name="raw", mean=(0.5,) * 3, std=(0.5,) * 3), None)


@pytest.mark.parametrize("name", method_names())
def test_every_pruning_method_is_conformant(name: str) -> None:
    check_method(name, by_chance=name in CHANCE)


def zeros(context: Context) -> Curves:
    """Rank by how often a channel is above zero behind its ReLU: what no weight tells (Hu et al. 2016, arXiv:1607.03250)."""
    relus = {layer.name for layer in walk(context.checkpoint.spec) if isinstance(layer.operation, Relu)}
    share = {g.name: torch.zeros(g.size, dtype=torch.float64) for g in context.groups}

    def watch(name: str, value: torch.Tensor) -> None:
        for g in context.groups:
            if name in relus and name in g.channels:
                share[g.name] += (value > 0).double().mean((0, 2, 3))[g.indices(name)]

    with torch.inference_mode():
        build_model(context.checkpoint.spec, context.checkpoint.state_dict).outputs(context.images(), watch)
    return Curves({name: curve_of(s) for name, s in share.items()}, unit="share of pixels above zero")


def test_a_method_that_sees_no_weights_but_what_comes_through_is_conformant() -> None:
    ranking: Any = SimpleNamespace(DESCRIPTION="", NEEDS_DATA=True, curves=zeros)
    check_method(ranking)


def test_chance_alone_does_not_pass() -> None:
    with pytest.raises(NotConformant, match="chance takes half"):
        check_method("random")


def changed(change: Any) -> Any:
    """Return `magnitude` with its curves changed."""
    known = load_method("magnitude")

    def curves(context: Context) -> Curves:
        found = known.curves(context)
        return Curves({name: change(curve, context, name) for name, curve in found.groups.items()}, unit=found.unit)

    return SimpleNamespace(DESCRIPTION="", NEEDS_DATA=False, curves=curves)


def reversed_(curve: ErrorCurve, context: Context, name: str) -> ErrorCurve:
    return ErrorCurve(curve.order[::-1], curve.error)


def constant(curve: ErrorCurve, context: Context, name: str) -> ErrorCurve:
    size = len(curve.order)
    return ErrorCurve(tuple(range(size)), tuple(i / size for i in range(size)))


def unsteady(curve: ErrorCurve, context: Context, name: str) -> ErrorCurve:
    return ErrorCurve(tuple(torch.randperm(len(curve.order)).tolist()), curve.error)


def by_place(curve: ErrorCurve, context: Context, name: str) -> ErrorCurve:
    """Channels that do nothing first, but what they cost hangs on where the first of them stands."""
    lean = 1 + curve.order[0]
    return ErrorCurve(curve.order, tuple(e**lean for e in curve.error))


def writes(curve: ErrorCurve, context: Context, name: str) -> ErrorCurve:
    next(iter(context.checkpoint.state_dict.values())).add_(0.0).mul_(1.5)
    return curve


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (reversed_, "go first"),
        (constant, "go first"),
        (unsteady, "twice"),
        (by_place, "in another order"),
        (writes, "twice|left as it is"),
    ],
)
def test_a_method_that_is_wrong_is_found(change: Any, words: str) -> None:
    with pytest.raises(NotConformant, match=words):
        check_method(changed(change))


def test_the_network_in_another_order_computes_the_same() -> None:
    dense, weak = half_idle()
    groups = list(prunable(find_groups(walk(dense.spec)), "inner"))
    other, orders = permuted(dense, groups)
    x = torch.randn(4, *dense.spec.input_shape)
    with torch.inference_mode():
        one, two = (build_model(c.spec, c.state_dict).double()(x.double()) for c in (dense, other))
    assert torch.allclose(one, two, rtol=1e-9)
    assert all(orders[g.name] != list(range(g.size)) for g in groups)
    assert all(len(weak[g.name]) == g.size // 2 for g in groups)


@pytest.mark.parametrize("name", sorted(path.stem for path in DEVICES.glob("*.yaml")))
def test_every_device_is_conformant(name: str) -> None:
    check_device(name)


def test_a_device_whose_modes_are_in_the_wrong_order_is_found() -> None:
    orin = load_device("jetson-agx-orin-64gb")
    with pytest.raises(NotConformant, match="first mode is the fastest"):
        check_device(orin.model_copy(update={"modes": orin.modes[::-1]}))
    slow = Figure(value=1e-3, source="made up for a test")
    assert orin.int8_macs is not None
    with pytest.raises(NotConformant):
        check_device(orin.model_copy(update={"int8_macs": slow, "modes": orin.modes[::-1]}))


@pytest.mark.parametrize("name", plugins.names(backends.PACKAGE))
def test_every_runtime_computes_what_the_reference_computes_or_says_why_not(name: str) -> None:
    said = check_runtime(name)
    assert said == "checked" or name not in HERE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"PROFILE": "tflite"}, "PROFILE is one of tensorrt"),
        ({"COST_OF_PROFILE": {"onnxruntime": "slow"}}, "about other profiles: openvino, tensorrt"),
        ({"OPSET": 12}, "OPSET is one that is written, 13 to 20"),
        ({"RUNS_HERE": "yes"}, "RUNS_HERE is True or False"),
        ({"REMEDY": ""}, "REMEDY is a text"),
        ({"runner": lambda path, threads=None: None}, "runner takes"),
        ({"available": lambda: True}, "returns an Availability"),
        ({}, "its runner says that it is one"),
    ],
)
def test_a_runtime_that_is_wrong_is_found(change: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = SimpleNamespace(**{**vars(backends.load_backend("onnxruntime")), **change})
    monkeypatch.setattr("rescompress.testing.load_backend", lambda name: whole)
    with pytest.raises(NotConformant, match=words):
        check_runtime("mine", "cpu-ort")


def test_a_runtime_that_no_device_names_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rescompress.testing.load_backend", lambda name: backends.load_backend("onnxruntime"))
    with pytest.raises(NotConformant, match=r"a device names it.*runtime: mine"):
        check_runtime("mine")


def test_a_device_without_modes_is_not_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    orin = load_device("jetson-agx-orin-64gb").model_copy(update={"modes": (), "default_mode": None})
    check_device(orin)
    monkeypatch.setattr("rescompress.testing.predict", lambda *_, **__: 1.0)
    for device in (orin, load_device("cpu")):
        with pytest.raises(NotConformant, match="no latency is made up"):
            check_device(device)


@pytest.mark.parametrize("kind", ["digits", "npz", "label_files", "shards"])
def test_a_kind_of_data_source_is_checked(kind: str, tmp_path: Path) -> None:
    source, inputs, change = pictures(kind, tmp_path)
    check_source(kind, source, inputs, change)


def test_a_kind_of_data_source_that_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, inputs, change = pictures("npz", tmp_path)
    with pytest.raises(NotConformant, match="claimed by shards alone, not by npz"):
        check_source("shards", source, inputs)
    monkeypatch.setattr("compress.data.sources.digits.claims", lambda source: True)
    with pytest.raises(NotConformant, match="not by digits, npz"):
        check_source("npz", source, inputs)
    monkeypatch.undo()
    monkeypatch.setattr("compress.data.sources.npz.identity", lambda source: "always this")
    with pytest.raises(NotConformant, match="changes when an image"):
        check_source("npz", source, inputs, change)


def pictures(kind: str, folder: Path) -> tuple[str, Inputs, Callable[[], object] | None]:
    """Return a source of a kind, what a network reads of it, and what changes it."""
    if kind == "digits":
        return "builtin:digits", INPUTS, None
    if kind == "npz":
        x, y = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8), np.arange(8) % 2
        np.savez(folder / "set.npz", x=x, y=y)
        return str(folder / "set.npz"), PETS, lambda: np.savez(folder / "set.npz", x=x[::-1], y=y)
    make = {"label_files": as_table, "shards": as_shards}[kind]
    source = make(folder)
    changed = next(p for p in sorted(folder.rglob("*")) if p.suffix in (".tar", ".png"))
    return source, PETS, lambda: changed.write_bytes(changed.read_bytes() + bytes(10))


PAGES = {
    "compress.prune.methods": "docs/pruning.md",
    "export.lint": "docs/lint.md",
    "compress.checkpoints.formats": "docs/checkpoints.md",
}


@pytest.mark.parametrize("package", PAGES)
def test_the_pages_have_a_row_for_every_extension(package: str) -> None:
    rows = [line.split("|")[1] for line in (ROOT / PAGES[package]).read_text().splitlines() if line.startswith("|")]
    told = {name for cell in rows for name in re.findall(r"[a-z][a-z0-9_-]*", cell)}
    lacking = [name for name in plugins.names(package) if not told & {name, name.replace("_", "-")}]
    assert not lacking, f"{PAGES[package]} has no row for {', '.join(lacking)}"


@pytest.mark.parametrize("protocol", [Method, Backend, Rule, Pass, Source, Format, Tracker])
def test_a_file_that_lacks_what_its_protocol_names_is_refused(protocol: type, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "kinds").mkdir()
    (tmp_path / "kinds" / "__init__.py").touch()
    (tmp_path / "kinds" / "mine.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kinds", raising=False)
    monkeypatch.delitem(sys.modules, "kinds.mine", raising=False)
    functions = {name for name, one in vars(protocol).items() if callable(one) and not name.startswith("_")}
    named = functions | protocol.__annotations__.keys()
    assert named
    with pytest.raises(BadInput) as e:
        plugins.load("kinds", "mine", offers=protocol)
    assert set(e.value.what.partition(" lacks ")[2].split(", ")) == named
    assert e.value.remedy == f"add what {protocol.__module__}.{protocol.__name__} names"


def test_contributing_names_what_is_there() -> None:
    """Folders, files, tests, and names that can be imported; `<name>` stands for what a contributor writes."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Recipes")[2].partition("## Style")[0]
    quoted = re.findall(r"`([^`\s]+)`", text)
    paths = [q for q in quoted if "/" in q and not q.startswith(".venv")]
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path.partition("<")[0]).exists(), path
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| a")]
    assert len(rows) > 10
    for _, _, write, begin, *_ in rows:
        for name in re.findall(r"`([\w-]+\.(?:py|yaml))`", begin):
            assert any((ROOT / folder / name).is_file() for folder in re.findall(r"`([\w/]+)/<name>", write)), name
    dotted = [q for q in quoted if re.fullmatch(r"(compress|export|edge_targets|rescompress)\.[\w.]+", q)]
    assert len(dotted) > 8
    for name in dotted:
        module, _, attribute = name.rpartition(".")
        assert importlib.util.find_spec(name) if _is_module(name) else hasattr(importlib.import_module(module), attribute), name
    constants = [q for q in quoted if re.fullmatch(r"[A-Z][A-Z_]{3,}", q)]
    assert len(constants) > 3
    sources = [
        p.read_text()
        for folder in ("tests", "rescompress", "edge_targets", "export", "compress")
        for p in (ROOT / folder).rglob("*.py")
    ]
    for constant in constants:
        assert any(re.search(rf"^{constant}\b.*=", s, re.M) for s in sources), constant


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_a_format_is_held_against_its_framework(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.resnet18(num_classes=7).eval()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    x = torch.randn(2, 3, 64, 64)
    check_format("torchvision", tmp_path / "net.pt", net, x)
    with pytest.raises(NotConformant, match="within 1e-4"):
        check_format("torchvision", tmp_path / "net.pt", lambda images: net(images) + 0.01, x)
    with pytest.raises(NotConformant, match="not as torchvision"):
        check_format("timm", tmp_path / "net.pt", net, x)
