"""float16 on a CPU: what overflows is named, against torch in real float16."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from export_zoo import arrays, cifar_pad, fake_quantized, images, network, quantization_of
from onnx import TensorProto, helper, numpy_helper

from compress.checkpoints import load_checkpoint, save_checkpoint
from compress.resnet import ResNet, build_model
from export.half import LARGEST, HalfCheck, check_half, has_float16
from export.to_onnx import ExportOptions, to_onnx

BOARD = "jetson-agx-orin-64gb"
DIGITS = Path(__file__).parents[1] / "examples" / "resnet20_digits.safetensors"


def raised(tensors: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    """Return the network of the same answers whose residual stream is `factor` times as large."""
    found = {k: v.clone() for k, v in tensors.items()}
    for name, value in found.items():
        if name.startswith(("stem", "bn1", "conv1_bn")) or ".bn2." in name or "downsample" in name or "shortcut" in name:
            if name.endswith((".weight", ".bias")) and value.ndim == 1:
                value *= factor
        elif name.endswith("conv1.weight") or name in ("fc.weight", "linear.weight"):
            value /= factor
    return found


def in_half(model: ResNet, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """Return torch's logits in real float16, and the largest magnitude of each tensor in float32."""
    seen: dict[str, float] = {}
    with torch.no_grad():
        model(x, lambda name, value: seen.__setitem__(name, float(value.abs().max())))
        return model.half()(x.half()).float(), seen


@pytest.mark.parametrize("factor", [1.0, 3e4])
def test_overflows_are_those_of_torch_in_float16(factor: float) -> None:
    spec = cifar_pad()
    model = network(spec)
    tensors = {k: v for k, v in model.state_dict().items()}
    loud = build_model(spec, raised(tensors, factor)).eval()
    x = images(spec, 32, seed=3)
    file = to_onnx(spec, arrays(loud), None, ExportOptions("dynamic", precision="fp16"))
    assert has_float16(file)
    found = check_half(file, [x[:20].numpy(), x[20:].numpy()], "32 images")
    logits, seen = in_half(loud, x)
    finite = torch.isfinite(logits).all(1).numpy().mean()
    assert found.finite == pytest.approx(finite, abs=0.04)
    assert found.fits == (factor == 1.0)
    sums = {name: most for name, most in seen.items() if name.endswith("add")}  # convolutions hold their BatchNorm in the file
    named = {o.node: o.largest for o in found.overflows if o.node in sums}
    assert named.keys() == {name for name, most in sums.items() if most > LARGEST}
    assert bool(named) == (factor > 1.0)
    for name, most in named.items():
        assert most == pytest.approx(sums[name], rel=0.01)
    assert HalfCheck.of(json.loads(json.dumps(found.document()))) == found
    if factor == 1.0:
        assert found.top1_agreement > 0.9


def test_the_int8_file_with_a_float16_remainder_overflows_too() -> None:
    spec = cifar_pad()
    loud = build_model(spec, raised(network(spec).state_dict(), 3e4)).eval()
    x = images(spec, 16, seed=3)
    quantization = quantization_of(loud, x)
    file = to_onnx(spec, arrays(loud), quantization, ExportOptions("dynamic", 19, "int8+fp16"))
    found = check_half(file, [x.numpy()], "16 images")
    assert not found.fits
    with torch.no_grad():
        assert torch.isfinite(fake_quantized(loud, quantization)(x)).all()  # in float32 nothing is wrong


def test_weights_that_float16_rounds_to_nothing_show_in_the_classes() -> None:
    """No value is too large, but the weights are below float16's smallest: in float32 the network still decides."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((5, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("GlobalAveragePool", ["h"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Mul", ["f", "small"], ["m"]),
        helper.make_node("Gemm", ["m", "w"], ["g"], transB=1),
        helper.make_node("Cast", ["g"], ["y"], to=TensorProto.FLOAT),
    ]
    stored = [
        numpy_helper.from_array(w.astype(np.float16), "w"),
        numpy_helper.from_array(np.float16(1e-7), "small"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    found = check_half(model, [rng.standard_normal((64, 3, 4, 4)).astype(np.float32)], "noise")
    assert found.overflows == ()
    assert found.top1_agreement < 0.9


@pytest.fixture(scope="module")
def loud_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = load_checkpoint(DIGITS)
    path = tmp_path_factory.mktemp("loud") / "loud.safetensors"
    save_checkpoint(dataclasses.replace(checkpoint, state_dict=raised(dict(checkpoint.state_dict), 1.5e4)), path)
    return path


def test_export_names_the_layers_and_ends_with_3(rescompress, tmp_path, loud_digits):
    done = rescompress("export", loud_digits, "--precision", "fp16", "-t", BOARD, "--json", cwd=tmp_path, code=3)
    found = json.loads(done.stdout)
    errors = [f for f in found["lint"] if f["severity"] == "error"]
    assert {f["rule"] for f in errors} == {"float16-overflow"}
    assert all(f["node"] in f["message"] and "random noise" in f["message"] for f in errors)
    assert not found["float16"]["fits"]
    assert any("overflows" in note for note in found["notes"])
    assert (tmp_path / found["onnx"]).is_file()


@pytest.mark.slow
def test_lint_and_evaluate_say_it_too(rescompress, tmp_path, loud_digits):
    done = rescompress("export", loud_digits, "--precision", "fp16", "-t", BOARD, "--json", cwd=tmp_path, code=3)
    found = json.loads(done.stdout)
    done = rescompress("lint", found["onnx"], "-t", BOARD, "--json", cwd=tmp_path, code=3)
    assert "float16-overflow" in {f["rule"] for f in json.loads(done.stdout)}
    done = rescompress("evaluate", found["onnx"], "--data", "builtin:digits", "--json", cwd=tmp_path)
    assert any("overflows" in note for note in json.loads(done.stdout)["notes"])
    assert "in float32 on a CPU" in done.stderr
    assert "overflows" in done.stderr


def test_a_float16_file_within_range_ends_with_0(rescompress, tmp_path):
    done = rescompress("export", DIGITS, "--precision", "fp16", "-t", BOARD, "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert found["float16"]["fits"]
    assert found["float16"]["largest"] < LARGEST
