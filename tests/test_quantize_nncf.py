"""NNCF's result, brought to our names: nothing missing, nothing extra, and the same numbers."""

from __future__ import annotations

import pytest
import torch
from engines import ptq
from quantize_zoo import SPECS, checkpoint_of, images_for

from compress.quantize import calibrate
from compress.quantize.fake_quant import attach, weight_scale
from compress.resnet import build_model
from rescompress.core.layers import walk
from rescompress.core.quantizers import PROFILES, Quantization, Quantizer, place

nncf_ptq = pytest.importorskip("compress.quantize.nncf_ptq")
torch.set_num_threads(1)
zoo = pytest.mark.parametrize("arch", sorted(SPECS))


def after_max_pool(spec, tensor):
    """The maximum of rounded values is the rounded maximum: before or after a max pool is one place."""
    pool = next((layer for layer in walk(spec) if layer.op == "max_pool" and layer.inputs == (tensor,)), None)
    return pool.name if pool else tensor


def nncf_of(arch):
    checkpoint = checkpoint_of(arch)
    model = build_model(checkpoint.spec, checkpoint.state_dict)
    quantized = nncf_ptq.quantize(model, images_for(SPECS[arch]))
    return checkpoint, model, quantized, nncf_ptq.placement(quantized, model)


@zoo
def test_every_operation_of_the_walk_has_a_name_in_nncf(arch):
    model = build_model(SPECS[arch])
    operations = nncf_ptq.operations(model)
    computing = {layer.name for layer in walk(SPECS[arch]) if layer.op not in ("input", "dropout")}
    assert computing <= set(operations.values())
    for operation, layer in operations.items():
        op = next(w.op for w in model.layers if w.name == layer)
        function = operation.split("/")[-2]
        assert {"conv": "conv2d", "linear": "linear", "batch_norm": "batch_norm", "relu": "relu"}.get(op, function) == function


@zoo
def test_nncf_places_what_the_onnxruntime_profile_places(arch):
    _, _, _, found = nncf_of(arch)
    spec = SPECS[arch]
    ours = {(q.kind, q.tensor): (q.low, q.high) for q in place(spec, "onnxruntime")}
    theirs = {(f.kind, after_max_pool(spec, f.tensor)): (f.low, f.high) for f in found}
    assert len(theirs) == len(found)
    # NNCF rounds what a pad shortcut reads and not its output; with one scale for both this is the same network.
    # It also leaves alone what only feeds a pooled output, where no integer kernel follows.
    missing = {tensor for _, tensor in ours.keys() - theirs.keys()}
    assert missing <= {layer.name for layer in walk(spec) if layer.op in ("channel_select", "avg_pool")} | (
        {"layer1.0.relu"} if spec.head is None else set()
    )
    assert theirs.keys() <= ours.keys()
    for key in theirs:
        assert theirs[key] == ours[key], key


@pytest.mark.parametrize(
    ("arch", "profile"),
    [
        pytest.param(arch, profile, marks=() if profile == "openvino" or arch == "pad" else pytest.mark.slow)
        for arch in SPECS
        for profile in PROFILES
    ],
)
def test_nncfs_ranges_are_the_mean_of_each_images_maximum(arch, profile):
    checkpoint = checkpoint_of(arch)
    by_nncf = ptq(checkpoint, images_for(SPECS[arch]), profile=profile).quantization
    by_us = ptq(checkpoint, images_for(SPECS[arch]), profile=profile, calibration="mean-max").quantization
    for a, b in zip(by_nncf.quantizers, by_us.quantizers, strict=True):
        assert a.scale == pytest.approx(b.scale, rel=1e-5), a.tensor


@zoo
def test_nncfs_weight_ranges_are_ours(arch):
    checkpoint, _, _, found = nncf_of(arch)
    for f in found:
        if f.kind == "weight":
            ours = weight_scale(checkpoint.state_dict[f"{f.tensor}.weight"])
            torch.testing.assert_close(torch.tensor(f.range) / 127, ours)


def test_calibration_leaves_the_standard_output_alone(capfd):
    ptq(checkpoint_of("basic"), images_for(SPECS["basic"]))
    assert capfd.readouterr().out == ""


@pytest.mark.slow  # NNCF compiles its CPU kernels the first time its network runs
@zoo
def test_our_network_with_nncfs_placement_computes_what_nncfs_does(arch, monkeypatch):
    monkeypatch.setenv("NNCF_EXTENSION_LOAD_TIMEOUT", "0")
    _, model, quantized, found = nncf_of(arch)
    quantizers = tuple(
        Quantizer(tensor=f.tensor, kind=f.kind, low=f.low, high=f.high, scale=tuple(r / f.high for r in f.range)) for f in found
    )
    attach(model, Quantization(profile="onnxruntime", quantizers=quantizers))
    x = torch.cat(images_for(SPECS[arch]))
    with torch.no_grad():
        ours, theirs = model(x), quantized(x)
    span = float(theirs.max() - theirs.min())
    assert float((ours - theirs).abs().mean()) <= span / 255
    assert float((ours - theirs).abs().median()) <= 2e-3 * span


def test_a_quantizer_in_no_known_place_is_an_error(monkeypatch):
    _, model, quantized, _ = nncf_of("basic")
    known = nncf_ptq.operations(model)
    gone = next(name for name, layer in known.items() if layer == "fc")
    monkeypatch.setattr(nncf_ptq, "operations", lambda _: {k: v for k, v in known.items() if k != gone})
    with pytest.raises(RuntimeError, match="no operation of this network"):
        nncf_ptq.placement(quantized, model)


def test_the_reach_of_a_tensor_is_counted_value_by_value():
    checkpoint, batches = checkpoint_of("basic"), images_for(SPECS["basic"])
    model = build_model(checkpoint.spec, checkpoint.state_dict)
    reach = calibrate.observe(model, batches, ["input"])["input"]
    values = torch.cat(batches).abs()
    assert reach.largest == float(values.max())
    assert reach.mean_largest == pytest.approx(float(values.flatten(1).amax(1).double().mean()))
    assert float(reach.histogram.sum()) == values.numel()
