"""2:4 sparsity: the surgery against brute force, its worth against plain magnitude, and zeros that last."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prune_cli import DIGITS
from test_prune_core import SPECS, every_spec, random_checkpoint

from compress.checkpoints import load_checkpoint
from compress.data import load_dataset
from compress.prune import Context
from compress.prune.solve import damped
from compress.prune.sparsity import fits, has_pattern, sparsify, two_of_four
from compress.resnet import build_model
from compress.train import train
from rescompress.core.layers import walk
from rescompress.core.settings import TrainSettings


def error_of(h, w, v):
    return float(((w - v) @ h @ (w - v).T).trace())


def magnitude(w, positions):
    """The smaller two of every four channels zero, the others as they were."""
    fours = w.view(len(w), -1, 4, positions)
    small = fours.abs().topk(2, 2, largest=False).indices
    return fours.scatter(2, small, 0.0).view_as(w)


@given(seed=st.integers(0, 10**6), positions=st.sampled_from([1, 9]))
@settings(max_examples=20, deadline=None)
def test_zeros_are_where_they_belong_and_the_rest_makes_up_for_them(seed, positions):
    g = torch.Generator().manual_seed(seed)
    d = 8 * positions
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    x = torch.randn(300, d, generator=g, dtype=torch.float64) @ mix
    h, w = damped(x.T @ x / 300, 1e-2), torch.randn(5, d, generator=g, dtype=torch.float64)
    v = two_of_four(h, w, positions)
    assert has_pattern(v.view(5, 8, positions))
    assert ((v.view(5, 2, 4, positions) != 0).sum(2) == 2).all()
    assert error_of(h, w, v) < 1.5 * error_of(h, w, magnitude(w, positions))  # greedy: no promise for every matrix


def test_the_surgery_is_better_on_average():
    g = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(30):
        x = torch.randn(300, 36, generator=g, dtype=torch.float64) @ torch.randn(36, 36, generator=g, dtype=torch.float64)
        h, w = damped(x.T @ x / 300, 1e-2), torch.randn(5, 36, generator=g, dtype=torch.float64)
        ratios.append(error_of(h, w, two_of_four(h, w, 9)) / error_of(h, w, magnitude(w, 9)))
    assert sum(ratios) / len(ratios) < 0.75


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_one_group_gets_the_best_of_all_masks(seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(50, 4, generator=g, dtype=torch.float64)
    h, w = damped(x.T @ x / 50, 1e-2), torch.randn(1, 4, generator=g, dtype=torch.float64)
    best = []
    for kept in itertools.combinations(range(4), 2):
        v = torch.zeros_like(w)
        v[:, kept] = torch.linalg.solve(h[list(kept)][:, kept], h[list(kept)] @ w.T).T
        best.append(error_of(h, w, v))
    assert error_of(h, w, two_of_four(h, w, 1)) == pytest.approx(min(best), rel=1e-6)


@every_spec
def test_every_layer_that_can_has_the_pattern(spec):
    checkpoint = random_checkpoint(spec, dtype=torch.float32)
    x = torch.randn(16, *spec.input_shape)
    found = sparsify(Context(checkpoint, [], calibration_NCHW=x), checkpoint)
    layers = [layer for layer in walk(spec) if layer.op in ("conv", "linear")]
    assert set(found.layers) | set(found.left_dense) == {layer.name for layer in layers}
    for layer in layers:
        weight = found.checkpoint.state_dict[f"{layer.name}.weight"]
        assert has_pattern(weight) == fits(layer) == (layer.name in found.layers)
        assert torch.equal(weight, checkpoint.state_dict[f"{layer.name}.weight"]) == (layer.name in found.left_dense)
    assert torch.isfinite(build_model(spec, found.checkpoint.state_dict)(x)).all()


def test_surgery_beats_cutting_the_smallest():
    spec = SPECS["bottleneck"]
    checkpoint = random_checkpoint(spec, dtype=torch.float32)
    x, fresh = torch.randn(128, *spec.input_shape), torch.randn(64, *spec.input_shape)
    found = sparsify(Context(checkpoint, [], calibration_NCHW=x), checkpoint).checkpoint.state_dict
    cut = dict(checkpoint.state_dict)
    for layer in walk(spec):
        if fits(layer):
            w = cut[f"{layer.name}.weight"]
            cut[f"{layer.name}.weight"] = magnitude(w.flatten(1), math.prod(w.shape[2:])).view_as(w)
    wanted = build_model(spec, checkpoint.state_dict)(fresh)
    ours, plain = ((build_model(spec, t)(fresh) - wanted).detach().square().mean() for t in (found, cut))
    assert ours < 0.7 * plain


def test_training_keeps_the_zeros():
    checkpoint = load_checkpoint(DIGITS)
    split = load_dataset("builtin:digits", checkpoint.spec).train.take(64, 0)
    sparse = sparsify(Context(checkpoint, [], calibration_NCHW=split.take(8, 0).tensor()), checkpoint)
    model = build_model(checkpoint.spec, sparse.checkpoint.state_dict)
    train(model, split, TrainSettings(epochs=2, batch_size=32, device="cpu"))
    for name in sparse.layers:
        weight = model.get_parameter(f"{name}.weight")
        assert has_pattern(weight)
        assert not torch.equal(weight, sparse.checkpoint.state_dict[f"{name}.weight"])


def test_the_command_says_what_it_did(rescompress, tmp_path):
    budget = ("-m", "magnitude", "--macs", "0.8", "--calib", 8, "--sparsity", "2:4")
    done = rescompress("prune", DIGITS, "--data", "builtin:digits", *budget, "-o", "out.safetensors", "--json", cwd=tmp_path)
    assert any("2:4" in note for note in json.loads(done.stdout)["notes"])
    assert has_pattern(load_checkpoint(tmp_path / "out.safetensors").state_dict["layer3.1.conv2.weight"])
    rescompress("prune", DIGITS, "--sparsity", "2:4", cwd=tmp_path, code=5)
    rescompress("prune", DIGITS, "--data", "builtin:digits", "--sparsity", "1:2", cwd=tmp_path, code=2)


@pytest.mark.parametrize("weight", [torch.zeros(2, 4), torch.ones(2, 4), torch.ones(8), torch.eye(6)])
def test_what_is_not_the_pattern(weight):
    assert not has_pattern(weight)
