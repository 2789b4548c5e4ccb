"""Properties of every operation, over random graphs: torch is onnxruntime, JSON loses nothing, pruned is zeroed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from graph_zoo import images, random_checkpoint, random_network

from compress.checkpoints import load_checkpoint, save_checkpoint
from compress.prune import PruningPlan, apply, prunable
from compress.prune.apply import channels_kept
from compress.prune.groups import Sizes, droppable
from compress.resnet import build_model
from export.metadata import read_metadata
from export.recount import recount
from export.to_onnx import ExportOptions, to_onnx
from rescompress.core.graph import Network
from rescompress.core.layers import total_macs
from rescompress.core.operations import OPERATIONS

QUICK, SLOW = range(25), range(25, 400)
seeds = pytest.mark.parametrize("seed", [*QUICK, *(pytest.param(s, marks=pytest.mark.slow) for s in SLOW)])


def ort_outputs(proto: onnx.ModelProto, x: torch.Tensor) -> list[np.ndarray]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


def test_the_graphs_hold_every_operation() -> None:
    found = {type(layer.operation) for seed in range(150) for layer in random_network(seed).layers}
    assert found == set(OPERATIONS)


@seeds
def test_torch_and_onnxruntime_compute_the_same(seed: int) -> None:
    network = random_network(seed)
    checkpoint = random_checkpoint(network, seed)
    x = images(network)
    options = ExportOptions(batch="dynamic" if seed % 2 else 2, opset=(13, 17, 19)[seed % 3])
    proto = to_onnx(network, {k: v.numpy() for k, v in checkpoint.state_dict.items()}, None, options)
    onnx.checker.check_model(proto, full_check=True)
    with torch.no_grad():
        wanted = build_model(network, checkpoint.state_dict).outputs(x)
    found = ort_outputs(proto, x)
    assert [o.name for o in proto.graph.output] == [o.name for o in network.outputs]
    for ours, theirs, output in zip(wanted, found, network.outputs, strict=True):
        assert tuple(ours.shape[1:]) == network.by_name[output.tensor].out_shape
        scale = max(float(ours.abs().max()), 1e-3)
        assert float((ours - torch.from_numpy(theirs)).abs().max()) <= 1e-4 * scale
    assert recount(proto).macs == total_macs(network.layers)
    about = read_metadata(proto)
    assert about is not None
    assert about.spec == network


@seeds
def test_files_and_json_lose_nothing(seed: int, tmp_path: Path) -> None:
    network = random_network(seed)
    assert Network.model_validate_json(network.model_dump_json()) == network
    checkpoint = random_checkpoint(network, seed)
    save_checkpoint(checkpoint, tmp_path / "net.safetensors")
    again = load_checkpoint(tmp_path / "net.safetensors")
    assert again.spec == network
    assert again.network.digest == network.digest
    assert all(torch.equal(again.state_dict[k], v) for k, v in checkpoint.state_dict.items())
    assert list(checkpoint.state_dict) == list(network.tensor_shapes) or set(checkpoint.state_dict) == set(
        network.tensor_shapes
    )


@seeds
def test_pruned_is_the_dense_network_with_zeroed_channels(seed: int) -> None:
    network = random_network(seed)
    checkpoint = random_checkpoint(network, seed)
    rng = np.random.default_rng(seed)
    keep = {}
    for g in prunable(list(Sizes(network).groups.values()), "all"):
        if g.size > 1:
            keep[g.name] = tuple(sorted(rng.choice(g.size, int(rng.integers(1, g.size)), replace=False).tolist()))
    drop = tuple(b for b in droppable(network) if rng.random() < 0.5)
    plan = PruningPlan(arch="x", spec_digest=network.digest, method="by hand", keep=keep, dropped_blocks=drop[:1])
    pruned = apply(checkpoint, plan)
    kept = channels_kept(network, plan)
    gone = {n for b in network.blocks if b.name in plan.dropped_blocks for n in b.main}
    x = images(network)

    def zero(name: str, value: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(value.shape[1], dtype=torch.bool)
        mask[kept[name]] = True
        if name in gone:
            mask[:] = False
        return value * mask.view(1, -1, *[1] * (value.dim() - 2))

    with torch.no_grad():
        wanted = build_model(network, checkpoint.state_dict).outputs(x, zero)
        found = build_model(pruned.spec, pruned.state_dict).outputs(x)
    for ours, theirs in zip(found, wanted, strict=True):
        scale = max(float(theirs.abs().max()), 1e-3)
        assert float((ours - theirs).abs().max()) <= 1e-4 * scale
    for layer in pruned.network.layers:
        assert layer.out_shape[0] == len(kept[layer.name])
    sizes = Sizes(network)
    units = {name: len(units) for name, units in keep.items()}
    if not plan.dropped_blocks:
        resized = [sizes.resized(layer, units) for layer in sizes.layers]
        assert total_macs(resized) == total_macs(pruned.network.layers)
        assert sum(r.params for r in resized) == sum(p.params for p in pruned.network.layers)
