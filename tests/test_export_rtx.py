"""The validity gate: a real TensorRT parser and builder takes our files, and runs every convolution in INT8."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from export_zoo import ZOO, arrays, imagenet_bottleneck, images, network, quantization_of
from onnx import numpy_helper

from edge_targets.backends import tensorrt_rtx
from edge_targets.catalog import load_target
from edge_targets.trt_layers import compute_types, read_layers
from export.to_onnx import ExportOptions, Precision, to_onnx
from rescompress.core.errors import ModelFileError
from rescompress.core.spec import ModelSpec

needs_rtx = pytest.mark.skipif(not tensorrt_rtx.available(), reason="tensorrt_rtx is not installed")


def write(folder: Path, spec: ModelSpec, precision: Precision, opset: int = 17) -> Path:
    model = network(spec)
    exported = to_onnx(spec, arrays(model), quantization_of(model, images(spec, 8)), ExportOptions(1, opset, precision))
    path = folder / f"{precision}.onnx"
    onnx.save(exported, path)
    return path


def convs(path: Path) -> list[str]:
    return [n.name for n in onnx.load(path).graph.node if n.op_type == "Conv"]


@needs_rtx
@pytest.mark.parametrize("spec", [make() for make in ZOO.values()], ids=list(ZOO))
def test_every_convolution_is_int8(tmp_path: Path, spec: ModelSpec) -> None:
    path = write(tmp_path, spec, "int8", 13)
    engine = tensorrt_rtx.engine(path)
    assert dict(engine.compute_types(convs(path))) == dict.fromkeys(convs(path), "Int8")
    linear = [n.name for n in onnx.load(path).graph.node if n.op_type == "Gemm"]
    assert dict(engine.compute_types(linear)) == dict.fromkeys(linear, "Int8")


@needs_rtx
@pytest.mark.parametrize(("precision", "expected"), [("fp32", "Float"), ("fp16", "Half"), ("int8+fp16", "Int8")])
def test_other_precisions_build(tmp_path: Path, precision: Precision, expected: str) -> None:
    path = write(tmp_path, imagenet_bottleneck(), precision, 19)
    types = tensorrt_rtx.engine(path).compute_types(convs(path))
    assert set(types.values()) == {expected}


@needs_rtx
def test_the_gate_sees_a_scale_that_is_no_scalar(tmp_path: Path) -> None:
    """The known trap: it builds without a warning, and the convolution runs in float."""
    path = write(tmp_path, imagenet_bottleneck(), "int8")
    model = onnx.load(path)
    for stored in model.graph.initializer:
        if stored.name in ("layer1.0.relu1.scale", "zero_point.int8"):
            reshaped = numpy_helper.from_array(numpy_helper.to_array(stored).reshape(1), stored.name)
            stored.CopyFrom(reshaped)
    onnx.save(model, path)
    types = tensorrt_rtx.engine(path).compute_types(convs(path))
    assert types["layer1.0.conv2"] != "Int8"


@needs_rtx
def test_a_build_names_the_type_of_every_convolution(tmp_path: Path) -> None:
    path = write(tmp_path, imagenet_bottleneck(), "int8")
    built = tensorrt_rtx.build(path, tmp_path, target=load_target("rtx-sm86"), precision="int8")
    assert built.path is not None
    assert built.path.stat().st_size == built.details["size_bytes"]
    assert built.details["convolutions"] == dict.fromkeys(convs(path), "Int8")
    assert built.details["weights_bytes"] > 0


@needs_rtx
def test_a_refused_file_says_why(tmp_path: Path) -> None:
    path = write(tmp_path, imagenet_bottleneck(), "int8")
    model = onnx.load(path)
    for stored in model.graph.initializer:
        if stored.name == "zero_point.int8":
            stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored) + 3, stored.name))
    onnx.save(model, path)
    with pytest.raises(ModelFileError, match="zero"):
        tensorrt_rtx.engine(path)
    with pytest.raises(ModelFileError, match="no such file"):
        tensorrt_rtx.engine(tmp_path / "absent.onnx")


LOG = """Layers:
Name: stem_myl0_1, LayerType: correlation, Inputs: [ { Name: a, Dimensions: [1,4], Datatype: Int8, Format: x }], Constants: \
[ { Name: w, Dimensions: [16,4,3,3], Datatype: Int8, Format: x }, { Name: s, Datatype: Float, Format: x }], Outputs: \
[ { Name: o, Datatype: Float, Format: x }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: stem]\x1f[ONNX Layer: a.dq]
Name: __myl_Mul, LayerType: kgen, Inputs: [ { Name: o, Datatype: Float }], Outputs: [ { Name: p, Datatype: Int8 }], \
TacticName: t, StreamId: 0, Metadata: [ONNX Layer: stem][ONNX Layer: relu]
Name: __myl_CorrAddRelu, LayerType: runtime_fusion, Inputs: [ { Name: p, Datatype: Half }], Outputs: [ { Datatype: Half }], \
TacticName: t, StreamId: 0, Metadata: [ONNX Layer: second]\x1e[ONNX Layer: relu2]
I/O Tensors:"""


def test_layer_list_is_read_by_node_and_type() -> None:
    layers = read_layers(["noise", LOG])
    assert [layer.kind for layer in layers] == ["correlation", "kgen", "runtime_fusion"]
    assert layers[0].inputs == ("Int8",)
    assert layers[0].constants == ("Int8", "Float")
    assert layers[0].outputs == ("Float",)
    assert layers[0].nodes == ("stem", "a.dq")
    assert compute_types(layers, ["stem", "second", "gone"]) == {"stem": "Int8", "second": "Half", "gone": None}
