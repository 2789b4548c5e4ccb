"""Conformance of extensions: what a pruning method, device, checkpoint format, runtime and kind of data source have to hold.

Our tests run these checks over every name that is known here; whoever writes an extension calls them in tests of their own:

    from rescompress.testing import check_method
    def test_mine():
        check_method("mine")

A check returns nothing and raises `NotConformant`, an AssertionError, that says what does not hold.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.checkpoints import load_checkpoint, save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.data import Inputs, load_dataset, sources
from compress.prune import load_method
from compress.prune.groups import ChannelGroup, find_groups, prunable
from compress.prune.method import Context, Curves, Method
from compress.resnet import build_model, tensors_of
from compress.zoo import spec
from edge_targets.backends import Availability, Backend, load_backend
from edge_targets.catalog import all_targets, load_device, load_target
from edge_targets.device import Device, Target
from edge_targets.latency import predict
from export.parity import OrtRunner
from export.to_onnx import OPSETS, ExportOptions
from rescompress.core import plugins
from rescompress.core.errors import TargetError
from rescompress.core.layers import walk
from rescompress.core.quantizers import PROFILES
from rescompress.core.runner import Runner
from rescompress.runs.fingerprint import data_identity
from rescompress.runs.stages.shared import onnx_of, write_onnx

WEAK = 1e-3
"""What the weights of a channel that does next to nothing are multiplied by."""
_BELOW = -10.0
"""Where their BatchNorm puts them, in units of `WEAK`: its scale is at most 1.5 of them, and what it scales below 1."""
RIGHT = 0.9
"""Part of the channels that do next to nothing which a method has to take first; chance takes a half."""


class NotConformant(AssertionError):
    """An extension does not hold what it has to."""


def check_method(method: str | Method, *, by_chance: bool = False) -> None:
    """Check a pruning method on a network in which half of the channels of every group do next to nothing.

    Such channels have small weights and are never above zero, so that methods that look at weights, at what the layers make,
    or at gradients all see them. It has to give every group a curve, the same one twice, and the same one for channels in
    another order; to leave the network as it is; and to take the channels that do nothing before the others, which neither
    chance nor the reverse of a method does.

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
    """Check a device: a file can be written for it, and its latency is predicted only where that can be.

    That is where it has power modes, in every precision and mode, with a band; where it has none, a prediction is refused.

    Args:
        device: Its name, or what its file describes.

    Raises:
        NotConformant: What does not hold.
    """
    known = load_device(device) if isinstance(device, str) else device
    release = known.tensorrt() if known.software else None
    served = Target(name=known.name, device=known, tensorrt_version=release.tensorrt if release else None)
    _hold(served.opset in OPSETS, f"the opset of its runtime is one that is written ({known.name}: {served.opset})")
    small, large = (walk(spec(name)) for name in ("resnet18", "resnet50"))
    for precision in () if known.modes else known.precisions:
        _hold(_refuses(small, known, precision), f"without power modes no latency is made up ({known.name}, {precision})")
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


def check_runtime(name: str, target: str | None = None) -> str:
    """Check a runtime: it has the facts and functions of `Backend`, and a device names it.

    Where it is available, what it builds of a small network computes what onnxruntime computes.

    Args:
        name: Of the runtime.
        target: A target that it serves; by default the first whose device names it.

    Returns:
        ``checked``, or why it could not be.

    Raises:
        NotConformant: What does not hold.
    """
    backend = load_backend(name)
    _check_facts(backend)
    there = backend.available()
    _hold(isinstance(there, Availability), "available() returns an Availability")
    serves = [known.name for known in all_targets() if known.runtime == name] if target is None else [target]
    _hold(bool(serves), f"a device names it: a .yaml of edge_targets/devices, or of your own, that says `runtime: {name}`")
    if not there or not backend.RUNS_HERE:
        _hold(bool(there) or bool(there.reason and there.remedy), "what is not available says why, and what would change that")
        return there.reason or "does not run here"
    network, _ = half_idle()
    images = np.random.default_rng(0).standard_normal((5, *network.spec.input_shape)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(model := onnx_of(network, ExportOptions(batch="dynamic", opset=backend.OPSET)), path)
        built = backend.build(path, Path(folder), target=load_target(serves[0]), precision="fp32")
        _hold(_is_json(built.details), "the details of what was built are JSON")
        with backend.runner(built.path or path, threads=1) as runner, OrtRunner(model, threads=1) as reference:
            ours, theirs = _rows(runner, images), _rows(reference, images)
            _hold(runner.runtime == name, f"its runner says that it is one ({name}, not {runner.runtime})")
    _hold(bool(np.allclose(ours, theirs, rtol=1e-3, atol=1e-3)), "what was built computes what onnxruntime computes")
    return "checked"


def _check_facts(backend: Backend) -> None:
    """Check what the rest of the product reads off a runtime's file."""
    _hold(backend.PROFILE in PROFILES, f"PROFILE is one of {', '.join(PROFILES)}")
    others = set(PROFILES) - {backend.PROFILE}
    _hold(set(backend.COST_OF_PROFILE) <= others, f"COST_OF_PROFILE is about other profiles: {', '.join(sorted(others))}")
    _hold(all(backend.COST_OF_PROFILE.values()), "and has a clause for each that it names")
    _hold(backend.OPSET in OPSETS, f"OPSET is one that is written, {min(OPSETS)} to {max(OPSETS)}")
    for fact in ("STRONGLY_TYPED", "BUILDS_HERE", "RUNS_HERE"):
        _hold(isinstance(getattr(backend, fact), bool), f"{fact} is True or False")
    for fact in ("PACKAGE", "REMEDY"):
        _hold(isinstance(getattr(backend, fact), str) and bool(getattr(backend, fact)), f"{fact} is a text")
    for function in ("available", "build", "runner"):
        wanted = list(inspect.signature(getattr(Backend, function)).parameters.values())[1:]
        offered = list(inspect.signature(getattr(backend, function)).parameters.values())
        same = [(p.name, p.kind, p.default) for p in offered] == [(p.name, p.kind, p.default) for p in wanted]
        _hold(same, f"{function} takes ({', '.join(str(p).partition(':')[0] for p in wanted)}) with the defaults of Backend")


def check_source(name: str, source: Any, inputs: Inputs, change: Callable[[], object] | None = None) -> None:
    """Check a kind of data source on one that it reads.

    No other kind may claim it. It has to give the same images and labels twice, in two splits that differ, and to be known
    again until it changes.

    Args:
        name: Of the kind.
        source: As ``--data`` names it, or an object.
        inputs: What the network reads, with as many classes as the source has.
        change: Changes one image or label of it.

    Raises:
        NotConformant: What does not hold.
    """
    claimed = [kind for kind in plugins.names(sources.PACKAGE) if plugins.load(sources.PACKAGE, kind).claims(source)]
    _hold(claimed == [name], f"it is claimed by {name} alone, not by {', '.join(claimed) or 'none'}")
    first, again = (load_dataset(source, inputs) for _ in range(2))
    for split, same in ((first.train, again.train), (first.val, again.val)):
        _hold(len(split) > 0, "both splits have images")
        _hold(split.identity == same.identity, "the same source is the same data twice")
        x_NCHW, y_N = next(split.batches(len(split)))
        _hold(tuple(x_NCHW.shape[1:]) == inputs.shape, f"images come as the network reads them, {inputs.shape}")
        _hold(
            len(y_N) == len(split) and 0 <= int(y_N.min()) <= int(y_N.max()) < len(split.classes), "each has one of the classes"
        )
    _hold(first.train.identity != first.val.identity, "what is evaluated on is not what is trained on")
    known = data_identity(source)
    _hold(data_identity(source) == known, "its identity is the same while it is")
    if change is not None:
        change()
        _hold(data_identity(source) != known, "its identity changes when an image or a label does")


def half_idle(seed: int = 0) -> tuple[Checkpoint, dict[str, set[int]]]:
    """Return a small network and, by group, the units that do next to nothing: a half of each, drawn at random.

    Their weights are small and their BatchNorm shifts them below zero, so that nothing comes through the ReLU.

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
                value = state[key].index_select(axis, torch.tensor(drawn)) * WEAK
                below = torch.full_like(value, _BELOW * WEAK)
                state[key].index_copy_(axis, torch.tensor(drawn), below if key.endswith(".bias") else value)
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


def _refuses(layers: Any, device: Device, precision: Any) -> bool:
    try:
        predict(layers, device, precision=precision)
    except TargetError:
        return True
    return False


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _hold(holds: bool, what: str) -> None:
    if not holds:
        raise NotConformant(f"does not hold: {what}")
