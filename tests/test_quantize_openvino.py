"""OpenVINO runs the network that was quantized for it: to the last integer, and with every residual sum in a convolution."""

from __future__ import annotations

import functools
from pathlib import Path

import onnx
import pytest
import torch
from engines import ptq
from quantize_zoo import SPECS, checkpoint_of, images_for

from compress.checkpoints.base import Checkpoint
from compress.quantize import integer_model, on_grid
from edge_targets.backends import openvino
from edge_targets.benchmark import Candidate, Effort, measure_processes, options_note
from export.parity import Parity, compare_logits
from export.to_onnx import ExportOptions, to_onnx
from rescompress.core.layers import walk

torch.set_num_threads(1)
some = pytest.mark.parametrize("arch", ["basic", "bottleneck", "pad"])
BOUND = 0.03
"""Mean logit difference in 1/255 of the range; with the main branches rounded, too, it is 0.04 to 0.8."""


def cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


integer_sums = pytest.mark.skipif(
    not cpu_flags() & {"avx512_vnni", "avx_vnni", "amx_int8"},
    reason="this CPU has no VNNI: its sums of 8-bit products saturate at 16 bits",
)


@functools.cache
def network(arch: str, profile: str | None) -> Checkpoint:
    """Return a network of the zoo, quantized for a profile."""
    checkpoint = checkpoint_of(arch)
    if profile is None:
        return checkpoint
    return on_grid(ptq(checkpoint, images_for(SPECS[arch]), profile=profile, calibration="max", bias_correction=False))


def write(arch: str, profile: str | None, path: Path) -> Checkpoint:
    """Write a network of the zoo; return it as a checkpoint."""
    checkpoint = network(arch, profile)
    tensors = {k: v.numpy() for k, v in checkpoint.state_dict.items()}
    onnx.save(to_onnx(checkpoint.spec, tensors, checkpoint.quantization, ExportOptions("dynamic")), path)
    return checkpoint


def parity_of(arch: str, profile: str, runner: openvino.OpenVINORunner) -> Parity:
    """Compare OpenVINO with exact sums of integers."""
    x = torch.cat(images_for(SPECS[arch], 8))
    with torch.inference_mode():
        exact = integer_model(network(arch, profile))(x).numpy()
    return compare_logits(exact, runner(x.numpy()))


def kernels(runner: openvino.OpenVINORunner) -> list[str]:
    """Return the kind of every kernel that OpenVINO runs."""
    nodes = runner._request.get_compiled_model().get_runtime_model().get_ordered_ops()
    return [str(node.get_rt_info()["layerType"].astype(str)) for node in nodes]


@integer_sums
@pytest.mark.parametrize("arch", sorted(SPECS))
def test_openvino_computes_the_integers_of_its_profile_and_every_residual_sum_in_a_convolution(arch, tmp_path):
    checkpoint = write(arch, "openvino", tmp_path / "m.onnx")
    runner = openvino.runner(tmp_path / "m.onnx", threads=1, batch=1)
    parity = parity_of(arch, "openvino", runner)
    # Mostly 0; what is left are averages of pools in float.
    assert 255 * parity.relative < BOUND, parity
    assert parity.top1_agreement == 1.0
    found = kernels(runner)
    assert found.count("Convolution") == sum(layer.op == "conv" for layer in walk(checkpoint.spec))
    assert not {"Add", "Eltwise", "Subgraph"} & set(found)


@integer_sums
@some
def test_an_open_batch_changes_nothing(arch, tmp_path):
    write(arch, "openvino", tmp_path / "m.onnx")
    runner = openvino.runner(tmp_path / "m.onnx", threads=1)
    assert 255 * parity_of(arch, "openvino", runner).relative < BOUND
    assert not {"Add", "Eltwise", "Subgraph"} & set(kernels(runner))


@integer_sums
@some
def test_a_rounding_of_the_main_branch_is_what_openvino_leaves_out(arch, tmp_path):
    """Why OpenVINO has a profile of its own; should a later OpenVINO round there, this test says so."""
    write(arch, "onnxruntime", tmp_path / "m.onnx")
    runner = openvino.runner(tmp_path / "m.onnx", threads=1)
    assert 255 * parity_of(arch, "onnxruntime", runner).relative > 10 * BOUND


def test_the_option_is_for_quantized_models_and_the_measurement_tells_it(tmp_path):
    write("dropout-head", None, tmp_path / "float.onnx")
    write("dropout-head", "openvino", tmp_path / "int8.onnx")
    paths = [tmp_path / "float.onnx", tmp_path / "int8.onnx"]
    assert [openvino.runner(p, threads=1).options for p in paths] == [{}, {"SNIPPETS_MODE": "DISABLE"}]
    candidates = [Candidate(p, "openvino", SPECS["dropout-head"].input_shape, threads=1) for p in paths]
    found = measure_processes(candidates, effort=Effort(warmup_s=0.0, seconds=0.02, rounds=1))
    assert [m.runtime_options for m in found] == [{}, {"SNIPPETS_MODE": "DISABLE"}]
    assert options_note("openvino", found[0].runtime_options) == []
    assert "SNIPPETS_MODE=DISABLE" in options_note("openvino", found[1].runtime_options)[0]


def test_an_openvino_that_does_not_know_the_option_runs_without_it(tmp_path, monkeypatch):
    write("dropout-head", "openvino", tmp_path / "m.onnx")
    x = torch.cat(images_for(SPECS["dropout-head"])).numpy()
    expected = openvino.runner(tmp_path / "m.onnx", threads=1)(x)
    monkeypatch.setattr(openvino, "QUANTIZED_OPTIONS", {"NO_SUCH_OPTION": "1"})
    runner = openvino.runner(tmp_path / "m.onnx", threads=1)
    assert runner.options == {}
    assert compare_logits(expected, runner(x)).relative < 1e-3
