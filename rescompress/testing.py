"""Conformance of extensions: what a pruning method, a device, a checkpoint format and a runtime have to hold.

Our tests run these checks over every name that is known here; whoever writes an extension calls them in tests of their own:

    from rescompress.testing import check_method
    def test_mine():
        check_method("mine")

A check returns nothing and raises `NotConformant`, an AssertionError, that says what does not hold.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compress.checkpoints import load_checkpoint, save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.prune import load_method
from compress.prune.groups import ChannelGroup, find_groups, prunable
from compress.prune.method import Context, Curves, Method
from compress.resnet import build_model, tensors_of
from compress.zoo import spec
from edge_targets.backends import load_backend
from edge_targets.catalog import load_device, load_target
from edge_targets.device import Device
from edge_targets.latency import predict
from export.parity import OrtRunner
from export.to_onnx import ExportOptions
from rescompress.core.layers import walk
from rescompress.core.runner import Runner
from rescompress.runs.stages.shared import onnx_of, write_onnx

WEAK = 1e-3
"""What the weights of a channel that does next to nothing are multiplied by."""
RIGHT = 0.9
"""Part of the channels that do next to nothing which a method has to take first; chance takes a half."""


class NotConformant(AssertionError):
    """An extension does not hold what it has to."""


def check_method(method: str | Method, *, by_chance: bool = False) -> None:
    """Check a pruning method on a network in which half of the channels of every group do next to nothing.

    It has to give every group a curve, the same one twice, and the same one for channels in another order; to leave the network
    as it is; and to take the channels that do nothing before the others, which neither chance nor the reverse of a method does.

    Args:
        method: Its name, or what its file offers.
        by_chance: Whether it ranks by chance, so that only curves, repetition and the untouched network are asked for.

    Raises:
        NotConformant: What does not hold.
    """
    ranking = load_method(method) if isinstance(method, str) else method
    dense, weak = half_idle()
    images = torch.randn(48, *dense.spec.input_shape, generator=torch.Generator().manual_seed(1))
    groups = list(prunable(find_groups(walk(dense.spec)), "inner"))
    before = {key: value.clone() for key, value in dense.state_dict.items()}

    def curves(checkpoint: Checkpoint) -> Curves:
        return ranking.curves(Context(checkpoint, groups, calibration_NCHW=images if ranking.NEEDS_DATA else None))

    first, again = curves(dense), curves(dense)
    _hold(set(first.groups) == {g.name for g in groups}, "it gives a curve for each group, and for no other")
    _hold(all(len(first.groups[g.name].order) == g.size for g in groups), "each curve has every unit of its group")
    _hold(first.groups == again.groups, "the same network has the same curves twice")
    same = all(torch.equal(before[key], value) for key, value in dense.state_dict.items())
    _hold(same, "the network is left as it is")
    if by_chance:
        return
    for group in groups:
        taken = set(first.groups[group.name].order[: group.size // 2])
        share = len(taken & weak[group.name]) / len(weak[group.name])
        _hold(
            share >= RIGHT, f"channels that do next to nothing go first ({group.name}: {share:.0%} of them, chance takes half)"
        )
    moved, orders = permuted(dense, groups)
    found = curves(moved)
    for group in groups:
        mine, theirs = first.groups[group.name], found.groups[group.name]
        close = np.allclose(mine.error, theirs.error, rtol=0.05, atol=1e-4 * max(mine.error))
        _hold(close, f"channels in another order cost the same ({group.name})")
        half = group.size // 2
        there = {orders[group.name][unit] for unit in theirs.order[:half]}
        _hold(len(there & set(mine.order[:half])) >= RIGHT * half, f"and the same ones go ({group.name})")


def check_device(device: str | Device) -> None:
    """Check a device: where it has power modes, its latency is predicted in every precision and mode, with a band.

    Args:
        device: Its name, or what its file describes.

    Raises:
        NotConformant: What does not hold.
    """
    known = load_device(device) if isinstance(device, str) else device
    small, large = (walk(spec(name)) for name in ("resnet18", "resnet50"))
    for mode in known.modes:
        for precision in known.precisions:
            few, many = (predict(layers, known, precision=precision, power_mode=mode.name) for layers in (small, large))
            where = f"{known.name}, {mode.name}, {precision}"
            _hold(0 < few.low_ms < few.p50_ms < few.high_ms, f"a band around what is predicted ({where})")
            _hold(few.p50_ms < many.p50_ms, f"a ResNet-50 takes longer than a ResNet-18 ({where})")
    for precision in known.precisions if known.modes else ():
        best = min(predict(large, known, precision=precision, power_mode=m.name).p50_ms for m in known.modes)
        first = predict(large, known, precision=precision).p50_ms
        _hold(first <= 1.001 * best, f"the first mode is the fastest ({known.name}, {precision})")


def check_format(name: str, file: Path, reference: Callable[[Tensor], Tensor], images: Tensor) -> None:
    """Check a checkpoint format on one file.

    The file has to be claimed by it and by no other, to compute what the reference computes, and to keep its bits on the way
    through our own format.

    Args:
        name: Of the format.
        file: In it.
        reference: Computes the network in the framework that the file is from.
        images: Preprocessed, (N, C, H, W).

    Raises:
        NotConformant: What does not hold.
    """
    channels, height, width = images.shape[1:]
    found = load_checkpoint(file, input_shape=(channels, height, width))
    _hold(found.provenance["format"] == name, f"it is read as {name}, not as {found.provenance['format']}")
    with torch.inference_mode():
        ours, theirs = build_model(found.spec, found.state_dict)(images), reference(images)
    scale = float(theirs.abs().max()) or 1.0
    _hold(float((ours - theirs).abs().max()) <= 1e-4 * scale, "outputs are the reference's within 1e-4")
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(found, Path(folder) / "again.safetensors")
        again = load_checkpoint(Path(folder) / "again.safetensors")
    _hold(again.spec == found.spec, "the network is the same after it was saved and loaded")
    same = all(torch.equal(found.state_dict[key], value) for key, value in again.state_dict.items())
    _hold(same and again.state_dict.keys() == found.state_dict.keys(), "so is every tensor, bit for bit")


def check_runtime(name: str, target: str) -> str:
    """Check a runtime where it is available: what it builds of a small network computes what onnxruntime computes.

    Args:
        name: Of the runtime.
        target: A target that it serves.

    Returns:
        ``checked``, or why it could not be.

    Raises:
        NotConformant: What does not hold.
    """
    backend = load_backend(name)
    there = backend.available()
    if not there or not backend.RUNS_HERE:
        _hold(bool(there) or bool(there.reason and there.remedy), "what is not available says why, and what would change that")
        return there.reason or "does not run here"
    network, _ = half_idle()
    images = np.random.default_rng(0).standard_normal((5, *network.spec.input_shape)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(model := onnx_of(network, ExportOptions(batch="dynamic", opset=backend.OPSET)), path)
        built = backend.build(path, Path(folder), target=load_target(target), precision="fp32")
        with backend.runner(built.path or path, threads=1) as runner, OrtRunner(model, threads=1) as reference:
            ours, theirs = _rows(runner, images), _rows(reference, images)
    _hold(bool(np.allclose(ours, theirs, rtol=1e-3, atol=1e-3)), "what was built computes what onnxruntime computes")
    return "checked"


def half_idle(seed: int = 0) -> tuple[Checkpoint, dict[str, set[int]]]:
    """Return a small network and, by group, the units that do next to nothing: a half of each, drawn at random.

    Args:
        seed: Draws weights and units.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = spec("resnet20", num_classes=10, input_shape=(3, 16, 16))
    state = {key: value.clone() for key, value in tensors_of(build_model(shape)).items()}
    for key, value in state.items():
        if value.dim() >= 2:
            value.copy_(torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5)
        elif key.endswith(("running_var", "weight")):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif value.is_floating_point():
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    weak: dict[str, set[int]] = {}
    for group in prunable(find_groups(walk(shape)), "inner"):
        drawn = torch.randperm(group.size, generator=generator)[: group.size // 2].tolist()
        weak[group.name] = set(drawn)
        for key, axis in _parameters(state, group):
            if not key.endswith(("running_mean", "running_var")):
                state[key].index_copy_(axis, torch.tensor(drawn), state[key].index_select(axis, torch.tensor(drawn)) * WEAK)
    return Checkpoint(shape, state), weak


def permuted(checkpoint: Checkpoint, groups: Sequence[ChannelGroup]) -> tuple[Checkpoint, dict[str, list[int]]]:
    """Return a network that computes the same with the units of its groups in another order, and what each is now.

    Args:
        checkpoint: Such as of `half_idle`: the groups are of single channels, each in one place.
        groups: Of it.
    """
    generator = torch.Generator().manual_seed(7)
    state = {key: value.clone() for key, value in checkpoint.state_dict.items()}
    orders: dict[str, list[int]] = {}
    for group in groups:
        order = torch.randperm(group.size, generator=generator)
        orders[group.name] = order.tolist()
        for key, axis in _parameters(state, group):
            state[key] = state[key].index_select(axis, order)
    return replace(checkpoint, state_dict=state), orders


def _parameters(state: dict[str, Tensor], group: ChannelGroup) -> list[tuple[str, int]]:
    """Return the tensors that have an axis of a group's channels, and which."""
    found = [(key, 0) for key in state for tensor in group.places if key.rpartition(".")[0] == tensor and state[key].dim()]
    return found + [(f"{name}.weight", 1) for name in group.consumers]


def _rows(runner: Runner, images: np.ndarray) -> np.ndarray:
    return np.asarray(runner(images), np.float32)


def _hold(holds: bool, what: str) -> None:
    if not holds:
        raise NotConformant(f"does not hold: {what}")
