"""ONNX files of many exporters: what was read computes what onnxruntime computes, or is refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from importer_nets import NETS, made
from onnx import TensorProto, helper, numpy_helper

import rescompress as rc
from compress.checkpoints.base import Checkpoint
from compress.importers.onnx_file import Reader
from compress.importers.proof import ENDS, difference
from compress.resnet import build_model
from rescompress.core.errors import BadInput, CheckpointError
from rescompress.core.operations import HardSwish, Linear, Silu


class File:
    """Builds a model node by node."""

    def __init__(self, shape: Sequence[int | str], opset: int = 13, name: str = "x") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []
        self.shape, self.opset, self.x = shape, opset, name
        self.random = np.random.default_rng(0)

    def weight(self, *shape: int, about: float = 0.0) -> str:
        return self.constant((self.random.normal(size=shape) * 0.3 + about).astype(np.float32))

    def constant(self, value: Any) -> str:
        self.stored.append(numpy_helper.from_array(np.asarray(value), f"w{len(self.stored)}"))
        return self.stored[-1].name

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, dtype=np.int64))

    def __call__(self, op: str, *inputs: str, **attributes: Any) -> str:
        made_ = f"t{len(self.nodes)}:0"
        self.nodes.append(helper.make_node(op, list(inputs), [made_], name=f"{op}_{len(self.nodes)}", **attributes))
        return made_

    def norm(self, x: str, c: int, **attributes: Any) -> str:
        parts = [self.weight(c, about=1.0), self.weight(c), self.weight(c), self.constant(np.full(c, 0.7, np.float32))]
        return self("BatchNormalization", x, *parts, **attributes)

    def model(self, *outputs: str) -> onnx.ModelProto:
        entry = helper.make_tensor_value_info(self.x, TensorProto.FLOAT, self.shape)
        ends = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
        graph = helper.make_graph(self.nodes, "net", [entry], ends, self.stored)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)


def tf2onnx() -> tuple[onnx.ModelProto, bool]:
    """Channels last, padding of its own, BatchNorm as factors and summands, biases added, swish by two nodes."""
    f = File(["n", 32, 32, 3])
    x = f("Transpose", f.x, perm=[0, 3, 1, 2])
    x = f("Pad", x, f.integers(0, 0, 1, 1, 0, 0, 2, 2))
    x = f("Conv", x, f.weight(8, 3, 3, 3), strides=[2, 2])
    x = f("Relu", f("Add", f("Mul", x, f.weight(1, 8, 1, 1, about=1)), f.weight(1, 8, 1, 1)))
    y = f("Add", f("Conv", x, f.weight(8, 8, 3, 3), auto_pad="SAME_UPPER"), f.weight(8, 1, 1))
    x = f("Add", x, f("Mul", y, f("Sigmoid", y)))
    x = f("ReduceMean", f("Transpose", x, perm=[0, 2, 3, 1]), axes=[1, 2], keepdims=0)
    return f.model(f("Softmax", f("Add", f("MatMul", x, f.weight(8, 5)), f.weight(5)))), True


def keras2onnx() -> tuple[onnx.ModelProto, bool]:
    """Channels last; the map is flattened in that order, its batch read off with Shape and Gather."""
    f = File(["N", 16, 16, 3], 11)
    x = f("Transpose", f.x, perm=[0, 3, 1, 2])
    x = f("Conv", x, f.weight(4, 3, 3, 3), f.weight(4), auto_pad="SAME_UPPER", strides=[2, 2])
    x = f("Clip", x, f.constant(np.float32(0)), f.constant(np.float32(6)))
    x = f("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")
    x = f("Transpose", x, perm=[0, 2, 3, 1])
    batch = f("Gather", f("Shape", x), f.integers(0), axis=0)
    x = f("Reshape", x, f("Concat", batch, f.integers(-1), axis=0))
    return f.model(f("Add", f("MatMul", x, f.weight(64, 7)), f.weight(7))), True


def mxnet() -> tuple[onnx.ModelProto, bool]:
    """Pre-activation, a BatchNorm on the images, Gemm."""
    f = File([1, 3, 32, 32], 9, "data")
    x = f("Conv", f.norm(f.x, 3, epsilon=2e-5), f.weight(8, 3, 3, 3), pads=[1, 1, 1, 1], kernel_shape=[3, 3])
    y = f("Conv", f("Relu", f.norm(x, 8, epsilon=2e-5)), f.weight(8, 8, 3, 3), pads=[1, 1, 1, 1])
    y = f("Conv", f("Relu", f.norm(y, 8)), f.weight(8, 8, 3, 3), pads=[1, 1, 1, 1])
    x = f("Flatten", f("GlobalAveragePool", f("Relu", f.norm(f("Add", x, y), 8))))
    return f.model(f("Gemm", x, f.weight(5, 8), f.weight(5), alpha=1.0, beta=1.0, transB=1)), False


def paddle() -> tuple[onnx.ModelProto, bool]:
    """Identities, a matrix product and its bias, Squeeze with axes as an attribute."""
    f = File(["DynamicDimension.0", 3, 32, 32], 11)
    x = f("Relu", f("Identity", f.norm(f("Conv", f.x, f.weight(8, 3, 7, 7), strides=[2, 2], pads=[3, 3, 3, 3]), 8)))
    x = f("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    y = f.norm(f("Conv", f("Identity", x), f.weight(8, 8, 3, 3), pads=[1, 1, 1, 1]), 8)
    x = f("Squeeze", f("GlobalAveragePool", f("Relu", f("Add", y, x))), axes=[2, 3])
    return f.model(f("Add", f("MatMul", f("Dropout", x), f.weight(8, 4)), f.weight(4))), False


def decomposed() -> tuple[onnx.ModelProto, bool]:
    """GELU by erf, hard-swish by a clip with attributes, means one axis at a time, a log-softmax."""
    f = File([2, 3, 16, 16], 9)
    x = f("Conv", f.x, f.weight(8, 3, 3, 3))
    e = f("Add", f("Erf", f("Div", x, f.constant(np.float32(2**0.5)))), f.constant(np.float32(1)))
    x = f("Conv", f("Mul", f("Mul", x, e), f.constant(np.float32(0.5))), f.weight(8, 8, 3, 3))
    a = f("Clip", f("Add", x, f.constant(np.float32(3))), min=0.0, max=6.0)
    x = f("Div", f("Mul", x, a), f.constant(np.float32(6)))
    x = f("Squeeze", f("ReduceMean", f("ReduceMean", x, axes=[3]), axes=[2]), axes=[2, 3])
    return f.model(f("LogSoftmax", f("MatMul", x, f.weight(8, 4)), axis=1)), False


def padded() -> tuple[onnx.ModelProto, bool]:
    """A shortcut of zeros whose padding torch 1.x worked out node by node; two outputs."""
    f = File([1, 3, 16, 16], 11)
    x = f("Relu", f("Conv", f.x, f.weight(8, 3, 3, 3), pads=[1, 1, 1, 1]))
    y = f("Conv", x, f.weight(16, 8, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1])
    s = f("Slice", x, f.integers(0, 0), f.integers(2**62, 2**62), f.integers(2, 3), f.integers(2, 2))
    zeros = f("ConstantOfShape", f.integers(4), value=numpy_helper.from_array(np.zeros(1, np.int64)))
    pads = f("Concat", f.integers(0, 0, 0, 0, 4, 4), f("Slice", zeros, f.integers(0), f.integers(2)), axis=0)
    pads = f(
        "Slice", f("Reshape", pads, f.integers(-1, 2)), f.integers(-1), f.integers(-(2**62)), f.integers(0), f.integers(-1)
    )
    pads = f("Transpose", pads, perm=[1, 0])
    s = f("Pad", s, f("Cast", f("Reshape", pads, f.integers(-1)), to=TensorProto.INT64), f.constant(np.float32(0)))
    z = f("Relu", f("Add", y, s))
    a = f("Gemm", f("Flatten", f("GlobalAveragePool", z)), f.weight(16, 3), f.weight(3))
    return f.model(a, z), False


EXPORTERS: dict[str, Callable[[], tuple[onnx.ModelProto, bool]]] = {
    f.__name__: f for f in (tf2onnx, keras2onnx, mxnet, paddle, decomposed, padded)
}


def compared(checkpoint: Checkpoint, model: onnx.ModelProto, last: bool, ends: Sequence[str] = ("",)) -> None:
    """Assert that both compute the same, on numbers that the loader has not seen."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    n = entry.shape[0] if isinstance(entry.shape[0], int) else 3
    x = torch.randn(n, *checkpoint.network.input_shape, generator=torch.Generator().manual_seed(7))
    wanted = session.run(None, {entry.name: (x.permute(0, 2, 3, 1) if last else x).contiguous().numpy()})
    mine = build_model(checkpoint.network, checkpoint.state_dict).outputs(x)
    assert len(mine) == len(wanted)
    for a, b, end in zip(mine, wanted, (*ends, "", ""), strict=False):
        assert difference(ENDS[end](a), torch.from_numpy(b)) < 1e-5


@pytest.mark.parametrize("name", EXPORTERS)
def test_files_of_other_exporters_are_read_as_what_they_compute(name: str, tmp_path: Path) -> None:
    model, last = EXPORTERS[name]()
    onnx.save(model, tmp_path / "net.onnx")
    checkpoint = rc.load_checkpoint(tmp_path / "net.onnx")
    compared(checkpoint, model, last, {"tf2onnx": ["softmax"], "decomposed": ["log_softmax"]}.get(name, [""]))
    assert "proven against the file in onnxruntime" in str(checkpoint.provenance["notes"])
    nodes = {type(n.operation) for n in checkpoint.network.nodes}
    assert name != "tf2onnx" or Silu in nodes
    assert name != "decomposed" or HardSwish in nodes
    assert name == "padded" or sum(isinstance(n.operation, Linear) for n in checkpoint.network.nodes) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_files_of_torch_are_read_as_what_they_compute(name: str, dynamo: bool, tmp_path: Path) -> None:
    module, shape = made(name)
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            torch.onnx.export(module, (torch.randn(1, *shape),), path, dynamo=True, verbose=False)
        else:
            try:
                torch.onnx.export(module, torch.randn(1, *shape), str(path), dynamo=False, opset_version=17)
            except torch.onnx.errors.SymbolicValueError as e:
                pytest.skip(f"this exporter does not write it: {str(e).splitlines()[0][:100]}")
    model = onnx.load(path)
    if any(node.op_type == "GatherND" for node in model.graph.node):  # an adaptive pool, window by window
        with pytest.raises(CheckpointError, match="GatherND"):
            rc.load_checkpoint(path)
        return
    compared(rc.load_checkpoint(path), model, False, ["log_softmax"] if name == "odd pools" else [""])


def lrn() -> onnx.ModelProto:
    f = File([1, 3, 8, 8])
    return f.model(f("LRN", f("Conv", f.x, f.weight(4, 3, 3, 3)), size=3))


def looped() -> onnx.ModelProto:
    f = File([1, 3, 8, 8])
    body = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "b", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    )
    f("Conv", f.x, f.weight(4, 3, 3, 3))
    condition = f.constant(np.array(True))
    f.nodes.append(helper.make_node("If", [condition], ["chosen"], name="branch", then_branch=body, else_branch=body))
    return f.model("chosen")


def quantized() -> onnx.ModelProto:
    f = File([1, 3, 8, 8])
    scale, zero = f.constant(np.float32(0.1)), f.constant(np.int8(0))
    x = f("DequantizeLinear", f("QuantizeLinear", f.x, scale, zero), scale, zero)
    return f.model(f("Conv", x, f.weight(4, 3, 3, 3)))


def training() -> onnx.ModelProto:
    f = File([1, 3, 8, 8], 15)
    x = f.norm(f("Conv", f.x, f.weight(4, 3, 3, 3)), 4, training_mode=1)
    f.nodes[-1].output.extend(["mean", "var"])
    return f.model(x)


def open_size() -> onnx.ModelProto:
    f = File([1, 3, "h", "w"])
    return f.model(f("Conv", f.x, f.weight(4, 3, 3, 3)))


def integers() -> onnx.ModelProto:
    model = open_size()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["xf"], to=TensorProto.FLOAT))
    model.graph.node[1].input[0] = "xf"
    return model


BAD: dict[str, tuple[Callable[[], onnx.ModelProto], str, str]] = {
    "unknown operator": (lrn, r"LRN 'LRN_1' \(reads 't0:0', makes 't1:0'\)", "bring-your-own"),
    "control flow": (looped, "If 'branch'.*control flow", ""),
    "quantized": (quantized, "quantized already.*QuantizeLinear_0", "float file"),
    "training": (training, "BatchNormalization.*statistics of its batch", ""),
    "open size": (open_size, "size of its input 'x' is open", "--input"),
    "bytes": (integers, "input 'x' is uint8", "float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    make, what, remedy = BAD[name]
    onnx.save(make(), tmp_path / "net.onnx")
    with pytest.raises(BadInput, match=what) as caught:
        rc.load_checkpoint(tmp_path / "net.onnx")
    assert caught.value.exit_code == 5
    assert str(tmp_path / "net.onnx") in str(caught.value)
    assert remedy in str(caught.value.remedy)


def test_an_open_size_is_stated(tmp_path: Path) -> None:
    onnx.save(open_size(), tmp_path / "net.onnx")
    assert rc.load_checkpoint(tmp_path / "net.onnx", input_shape=(3, 10, 12)).network.input_shape == (3, 10, 12)
    model, _ = mxnet()
    onnx.save(model, tmp_path / "fixed.onnx")
    with pytest.raises(BadInput, match="fixed to 3x32x32"):
        rc.load_checkpoint(tmp_path / "fixed.onnx", input_shape=(3, 64, 64))


def test_external_data_is_read_where_it_lies_beside_the_file_and_nowhere_else(tmp_path: Path) -> None:
    model, last = mxnet()
    outside, _ = mxnet()
    onnx.save(outside, tmp_path / "net.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    compared(rc.load_checkpoint(tmp_path / "net.onnx"), model, last)
    (tmp_path / "weights.bin").rename(tmp_path / "elsewhere.bin")
    with pytest.raises(BadInput, match=r"weights\.bin"):
        rc.load_checkpoint(tmp_path / "net.onnx")
    text = (tmp_path / "net.onnx").read_bytes().replace(b"weights.bin", b"../elsew.bin"[:11])
    (tmp_path / "net.onnx").write_bytes(text)
    with pytest.raises(BadInput):
        rc.load_checkpoint(tmp_path / "net.onnx")


def test_constants_cannot_fill_the_memory(tmp_path: Path) -> None:
    f = File([1, 3, 8, 8])
    huge = f("ConstantOfShape", f.integers(2**20, 2**20))
    x = f("Conv", f.x, f.weight(4, 3, 3, 3))
    onnx.save(f.model(f("Add", x, f("ReduceMean", huge, keepdims=0))), tmp_path / "net.onnx")
    with pytest.raises(BadInput):
        rc.load_checkpoint(tmp_path / "net.onnx")


def test_a_wrong_reading_is_refused_and_the_first_tensor_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = mxnet()
    onnx.save(model, tmp_path / "net.onnx")
    real = Reader.get

    def wrong(self: Reader, name: str) -> Any:
        value = real(self, name)
        return value * 1.01 if name == "w9" else value

    monkeypatch.setattr(Reader, "get", wrong)
    with pytest.raises(BadInput, match=r"first tensor that differs is 't\d+:0'"):
        rc.load_checkpoint(tmp_path / "net.onnx")
