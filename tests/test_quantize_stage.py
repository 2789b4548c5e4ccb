"""The quantize stage: what of its config reaches the network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import prune, ptq
from PIL import Image
from pydantic import ValidationError
from quantize_zoo import SPECS, checkpoint_of, images_for

from compress import zoo
from compress.checkpoints import load_checkpoint, save_checkpoint
from compress.data import load_dataset
from compress.evaluate import TorchRunner, evaluate
from compress.prune import Budget
from compress.quantize import integer_model, mixed_precision, on_grid
from compress.resnet import build_model
from edge_targets.catalog import load_target
from edge_targets.latency import cost_function
from rescompress.core.errors import BudgetError, ConfigError, TargetError
from rescompress.core.layers import walk
from rescompress.core.manifest import load_manifest
from rescompress.core.settings import QuantizeSettings
from rescompress.runs.stages.network import calibrated, float_cost
from rescompress.show.report.card import model_card

torch.set_num_threads(1)
DIGITS = Path(__file__).parents[1] / "examples" / "resnet20_digits.safetensors"


def quantized(**settings):
    return calibrated(checkpoint_of("pad"), images_for(SPECS["pad"], 4), QuantizeSettings(**settings), "tensorrt")


def test_layers_are_kept_in_float_by_name_by_number_or_not_at_all():
    spec = SPECS["pad"]
    assert quantized(calibration="max").quantization.keep_float(spec) == set()
    assert quantized(calibration="max", keep_float=["conv1", "fc"]).quantization.keep_float(spec) == {"conv1", "fc"}
    assert len(quantized(calibration="max", keep_float=2).quantization.keep_float(spec)) == 2
    assert quantized(calibration="max", keep_float="auto").quantization.keep_float(spec) == set()
    with pytest.raises(ConfigError, match="conv9"):
        quantized(keep_float=["conv9"])
    with pytest.raises(BudgetError, match="99 of 10 layers"):
        quantized(calibration="max", keep_float=99)


def test_estimator_percentile_and_bias_correction_reach_the_calibration():
    plain = quantized(calibration="max", bias_correction=False)
    assert all(torch.equal(v, checkpoint_of("pad").state_dict[k]) for k, v in plain.state_dict.items())
    assert not torch.equal(quantized(calibration="max").state_dict["bn1.bias"], plain.state_dict["bn1.bias"])
    loose = quantized(calibration="percentile", percentile=100.0).quantization
    tight = quantized(calibration="percentile", percentile=99.0).quantization
    assert loose.activation("relu1").scale == pytest.approx(plain.quantization.activation("relu1").scale)
    assert tight.activation("relu1").scale[0] < loose.activation("relu1").scale[0]
    assert quantized().provenance["calibration"]["tried"]


def test_the_price_of_layers_in_float_is_between_that_of_the_two_networks():
    spec = zoo.spec("resnet50")
    target = load_target("jetson-orin-nano-8gb")
    cost = float_cost([target], spec)
    int8, half = (cost_function(target.device, precision=p)(walk(spec)) for p in ("int8", "fp16"))
    weighted = [layer.name for layer in walk(spec) if layer.op in ("conv", "linear")]
    assert cost(frozenset()) == int8
    assert cost(frozenset({"layer3.0.conv2"})) > int8
    assert cost(frozenset(weighted)) == pytest.approx(half, rel=0.1)
    with pytest.raises(TargetError, match="needs a device"):
        float_cost([], spec)


def test_a_latency_budget_decides_how_many_layers_stay_in_float():
    spec, images = SPECS["pad"], images_for(SPECS["pad"], 4)
    config = QuantizeSettings(calibration="max", keep_float="auto", max_slowdown=1.25)

    def kept(cost):
        return calibrated(checkpoint_of("pad"), images, config, "tensorrt", cost=cost).quantization.keep_float(spec)

    assert len(kept(lambda names: 8.0 + len(names))) == 2
    assert len(kept(lambda names: 4.0 + len(names))) == 1
    assert len(kept(lambda names: 1.0 + len(names))) == 0


def test_an_accuracy_budget_decides_how_many_layers_stay_in_float():
    spec, images = SPECS["pad"], images_for(SPECS["pad"], 4)
    int8 = quantized(calibration="max")
    all_int8 = mixed_precision(int8, images, layers=0, reference=checkpoint_of("pad")).all_int8
    halved = quantized(calibration="max", keep_float="auto", max_divergence=all_int8 / 2).quantization.keep_float(spec)
    assert halved
    assert quantized(calibration="max", keep_float="auto", max_divergence=10.0).quantization.keep_float(spec) == set()
    with pytest.raises(BudgetError, match="divergence is"):
        quantized(calibration="max", keep_float="auto", max_divergence=1e-30)
    with pytest.raises(ValidationError, match="budgets of keep_float"):
        QuantizeSettings(keep_float=2, max_slowdown=1.5)


def test_training_that_did_no_good_is_told(rescompress, tmp_path):
    words = ("--mode", "qat", "--epochs", 0.1, "--lr", 0.5, "--calibration", "max", "--calib", 64)
    done = rescompress("quantize", DIGITS, "--data", "builtin:digits", *words, "--json", cwd=tmp_path)
    assert "only calibrated" in done.stderr
    assert json.loads(done.stdout)["top1_after"] > 0.9
    manifest = load_manifest(tmp_path / "rescompress-out")
    assert manifest.stage("quantize").details.kept == "ptq"
    assert "only calibrated" in model_card("digits", manifest)


@pytest.mark.parametrize("mode", ["ptq", "qat"])
def test_bad_input_of_the_command_is_named(rescompress, tmp_path, mode):
    def refused(*words, of=DIGITS, code=5):
        done = rescompress("quantize", of, "--mode", mode, *words, "-o", "int8.safetensors", cwd=tmp_path, code=code)
        assert not (tmp_path / "int8.safetensors").exists()
        return done.stderr

    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(flat / f"{i}.png")
    assert "3 images without labels" in refused("--data", flat)
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused("--data", tmp_path / "empty")
    assert "--calib" in refused("--data", "builtin:digits", "--calib", "1", code=2)
    nan = tmp_path / "nan.safetensors"
    good = load_checkpoint(DIGITS)
    name = "layer1.0.conv1.weight"
    save_checkpoint(replace(good, state_dict={**good.state_dict, name: good.state_dict[name] * torch.nan}), nan)
    assert name in refused("--data", "builtin:digits", of=nan)
    int8 = tmp_path / "int8-already.safetensors"
    save_checkpoint(ptq(good, [torch.rand(4, *good.spec.input_shape)] * 2, calibration="max"), int8)
    assert "quantized" in refused("--data", "builtin:digits", of=int8)


@pytest.mark.parametrize("after", [0.0, 1.0])
def test_training_leaves_the_statistics_alone_unless_told(rescompress, tmp_path, after):
    settings = {"mode": "qat", "epochs": 0.1, "calib": 32, "calibration": "max", "hold_out": 0, "teacher": None}
    settings |= {"freeze_bn_after": after} if after else {}
    config = {"checkpoint": str(DIGITS), "data": "builtin:digits", "quantize": settings, "targets": []}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    rescompress("run", "run.yaml", "-o", "out", cwd=tmp_path)
    before, trained = (load_checkpoint(p).state_dict for p in (DIGITS, tmp_path / "out" / "quantize.safetensors"))
    assert not torch.equal(before["conv1.weight"], trained["conv1.weight"])
    assert torch.equal(before["bn1.running_var"], trained["bn1.running_var"]) is (after == 0.0)


@pytest.mark.slow
def test_a_pruned_network_is_as_good_in_int8_as_in_float():
    dense = load_checkpoint(DIGITS)
    data = load_dataset("builtin:digits", dense.spec)
    x = data.train.take(64, 0).tensor()
    half = prune(dense, budget=Budget(kind="macs", value=0.5), calibration_x=x).checkpoint
    int8 = on_grid(ptq(half, [x], calibration="mse"))
    model = build_model(half.spec, half.state_dict)
    top1 = {name: evaluate(TorchRunner(m), data.val).top1 for name, m in (("float", model), ("int8", integer_model(int8)))}
    assert top1["float"] > 0.95
    assert top1["int8"] >= top1["float"] - 0.01
