"""Every extension that is known here is conformant, and what is not is found."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.prune import load_method, method_names
from compress.prune.groups import find_groups, prunable
from compress.prune.method import Context, Curves, ErrorCurve
from compress.resnet import build_model
from edge_targets import backends
from edge_targets.catalog import DEVICES, load_device
from edge_targets.device import Figure
from rescompress.core import plugins
from rescompress.core.layers import walk
from rescompress.testing import NotConformant, check_device, check_format, check_method, check_runtime, half_idle, permuted

CHANCE = {"random"}
SERVED = {"openvino": "cpu", "onnxruntime": "cpu-ort"}


@pytest.mark.parametrize("name", method_names())
def test_every_pruning_method_is_conformant(name: str) -> None:
    check_method(name, by_chance=name in CHANCE)


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
    said = check_runtime(name, SERVED.get(name, "cpu"))
    assert said == "checked" or name not in SERVED


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
