"""Foreign ONNX files: accuracy is onnxruntime's and counts are torch's, or the file is refused."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_zoo import PIXELS, basic, spec_of
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_nets import ENCODINGS, Net, Writer, nets

from compress.checkpoints import load_checkpoint
from compress.importers.proof import difference
from compress.resnet import build_model, tensors_of
from edge_targets.onnx_kernels import kernels_of
from export.load import load_onnx
from export.recount import recount
from export.to_onnx import ExportOptions, to_onnx
from rescompress.core.errors import RescompressError
from rescompress.core.spec import Head
from rescompress.runs.evaluation import evaluate_file
from rescompress.runs.reporter import Silent
from rescompress.runs.settings import Settings
from rescompress.runs.stage import Opening

SCORES = 5  # of `Net`


@functools.cache
def metadata(size: int) -> dict[str, str]:
    """What our own export says in a file about a network of this input size and as many classes."""
    spec = spec_of("any", [[basic("layer1.0", 16, 16)]], side=size, head=Head(num_classes=SCORES))
    spec = spec.replace(preprocessing=PIXELS)
    own = to_onnx(spec, tensors_of(build_model(spec)), None, ExportOptions(batch="dynamic"))
    return {p.key: p.value for p in own.metadata_props}


def whole(op: str, **attributes: Any) -> Any:
    """An ending of one operator."""
    return lambda y: ([helper.make_node(op, [y], ["end"], **attributes)], ["end"], [])


def reshaped(*shape: int) -> Any:
    stored = numpy_helper.from_array(np.array(shape, np.int64), "shape")
    return lambda y: ([helper.make_node("Reshape", [y, "shape"], ["end"])], ["end"], [stored])


def wider(y: str) -> Any:
    """A class more, for what is none of the others."""
    stored = [numpy_helper.from_array(np.array([0, 0, 0, 1], np.int64), "more")]
    return [helper.make_node("Pad", [y, "more"], ["end"])], ["end"], stored


ENDINGS = {  # each with whether it keeps the scores in the first output
    "scores": (lambda y: ([], [y], []), True),
    "softmax": (whole("Softmax", axis=1), True),
    "scores, then their choice": (lambda y: ([helper.make_node("ArgMax", [y], ["end"], axis=1)], [y, "end"], []), True),
    "choice, then scores": (lambda y: ([helper.make_node("ArgMax", [y], ["end"], axis=1)], ["end", y], []), False),
    "choice": (whole("ArgMax", axis=1, keepdims=0), False),
    "choice in a column": (whole("ArgMax", axis=1, keepdims=1), False),
    "best score": (whole("ReduceMax", axes=[1], keepdims=0), False),
    "maps": (reshaped(-1, SCORES, 1, 1), False),
    "rows": (reshaped(1, -1), False),
    "one row": (reshaped(-1), False),
    "transposed": (whole("Transpose", perm=[1, 0]), False),
    "another class": (wider, False),
}
FRONTS = ("floats", "double", "bytes", "channels last", "two inputs")


def foreign(net: Net, encoding: str, sprinkle: list[bool], ending: str, front: str, path: Path) -> str:
    """Write a file that somebody changed after our export, at either end; return the name of its scores."""
    model = onnx.load(Writer(net, encoding, sprinkle).write(path))
    graph = model.graph
    scores = str(graph.output[0].name)
    if encoding == "half":
        graph.node.append(helper.make_node("Cast", [scores], ["in_float"], to=TensorProto.FLOAT))
        scores = "in_float"
    nodes, outputs, stored = ENDINGS[ending][0](scores)
    graph.node.extend(nodes)
    graph.initializer.extend(stored)
    del graph.output[:]
    graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    for value in graph.output:
        kind = TensorProto.INT64 if "choice" in ending and value.name == "end" else TensorProto.FLOAT
        value.CopyFrom(helper.make_tensor_value_info(value.name, kind, None))
    image = graph.input[0]
    kinds = {"double": TensorProto.DOUBLE, "bytes": TensorProto.UINT8}
    if front in kinds:
        image.type.tensor_type.elem_type = kinds[front]
        made = helper.make_node("Cast", ["image"], ["as float"], to=TensorProto.FLOAT)
    elif front == "channels last":
        side = net.size
        image.CopyFrom(helper.make_tensor_value_info("image", TensorProto.FLOAT, [net.batch, side, side, 3]))
        made = helper.make_node("Transpose", ["image"], ["as float"], perm=[0, 3, 1, 2])
    else:
        made = None
        if front == "two inputs":
            graph.input.append(helper.make_tensor_value_info("factor", TensorProto.FLOAT, [1]))
            made = helper.make_node("Mul", ["image", "factor"], ["as float"])
    if made is not None:
        for node in graph.node:
            node.input[:] = ["as float" if name == "image" else name for name in node.input]
        graph.node.insert(0, made)
    helper.set_model_props(model, metadata(net.size))
    onnx.save(model, path)
    return scores


def by_onnxruntime(path: Path, scores: str, images: np.ndarray, kind: Any, batch: int) -> np.ndarray:
    """Return the best class of each image, as onnxruntime computes it where the scores are an output."""
    model = onnx.load(path)
    if scores not in [o.name for o in model.graph.output]:
        model.graph.output.append(helper.make_tensor_value_info(scores, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = ((images.astype(np.float32) / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2).astype(kind)
    found = []
    for start in range(0, len(x), batch):
        piece = x[start : start + batch]
        filled = np.concatenate([piece, np.zeros((batch - len(piece), *piece.shape[1:]), kind)])
        found.append(session.run([scores], {"image": filled})[0].argmax(1)[: len(piece)])
    return np.concatenate(found)


def attempt(what: Callable[[], Any]) -> tuple[Any, RescompressError | None]:
    """Return what a call returns, or its refusal."""
    try:
        return what(), None
    except RescompressError as e:
        return None, e


def check_accuracy(net: Net, encoding: str, sprinkle: list[bool], ending: str, front: str, count: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        scores = foreign(net, encoding, sprinkle, ending, front, path)
        draw = np.random.default_rng(seed)
        images = draw.integers(0, 256, (count, net.size, net.size, 3), dtype=np.uint8)
        y = draw.integers(0, SCORES, count)
        np.savez(Path(folder) / "d.npz", x_train=images, y_train=y, x_test=images, y_test=y)
        stated = Settings(data=str(Path(folder) / "d.npz"), threads=1, device="cpu")
        understood = ENDINGS[ending][1] and front in ("floats", "double")
        found, error = attempt(
            lambda: evaluate_file(Opening(path), stated, split="val", runtime="onnxruntime", reporter=Silent())
        )
        if error is not None:
            assert not understood, error
            assert error.exit_code == 5
            assert error.where
            assert error.remedy
            return
        kind = np.float64 if front == "double" else np.float32
        np.testing.assert_array_equal(found.predictions, by_onnxruntime(path, scores, images, kind, net.batch))
        assert found.metrics["top1"].value == np.mean(found.predictions == y)


accuracy_draws = given(
    net=nets,
    encoding=st.sampled_from(list(ENCODINGS)),
    sprinkle=st.lists(st.booleans(), max_size=6),
    ending=st.sampled_from(list(ENDINGS)),
    front=st.sampled_from(FRONTS[:1] * 4 + FRONTS),
    count=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)


@accuracy_draws
@settings(max_examples=5, deadline=None)
def test_accuracy_is_onnxruntimes_or_refused(net, encoding, sprinkle, ending, front, count, seed):
    check_accuracy(net, encoding, sprinkle, ending, front, count, seed)


@pytest.mark.slow
@accuracy_draws
@settings(max_examples=200, deadline=None)
def test_accuracy_of_many_files_is_onnxruntimes_or_refused(net, encoding, sprinkle, ending, front, count, seed):
    check_accuracy(net, encoding, sprinkle, ending, front, count, seed)


PLAIN = Net([8], [3], [1], [1], 8, 1)


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_ending(ending):
    check_accuracy(PLAIN, "plain", [], ending, "floats", 3, 0)


@pytest.mark.parametrize("encoding", ["plain", "half"])
@pytest.mark.parametrize("front", FRONTS)
def test_every_front(front, encoding):
    check_accuracy(PLAIN, encoding, [], "scores", front, 3, 0)


def test_the_choice_between_two_classes_is_no_single_output():
    """A column of chosen classes looks like the output of a binary classifier; the file's metadata know that it is none."""
    from compress.data import Inputs, load_dataset
    from compress.evaluate import evaluate

    class Choice:
        runtime = "none"

        def __call__(self, x: np.ndarray) -> np.ndarray:
            return np.ones((len(x), 1), np.float32)

    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "d.npz", x=np.zeros((8, 8, 8, 3), np.uint8), y=np.arange(8) % 2)
        inputs = Inputs((3, 8, 8), 2, PIXELS, None)
        split = load_dataset(str(Path(folder) / "d.npz"), inputs).val
        single = load_dataset(str(Path(folder) / "d.npz"), dataclasses.replace(inputs, outputs=1)).val
    with pytest.raises(RescompressError, match="2 is expected"):
        evaluate(Choice(), split, outputs=2)  # type: ignore[arg-type]
    assert evaluate(Choice(), single, outputs=1).predictions.tolist() == [1] * len(single)  # type: ignore[arg-type]


def check_counts(net: Net, encoding: str, sprinkle: list[bool], shuffle: bool, rows: bool) -> None:
    """Each count made on a file is torch's, or an error that names the operator."""
    with tempfile.TemporaryDirectory() as folder:
        path = Writer(net, encoding, sprinkle).write(Path(folder) / "m.onnx", shuffle=shuffle)
        model = onnx.load(path)
        if rows:  # the classifier at every place of the map, as networks for detection have it
            add_rows(model.graph, net)
            onnx.save(model, path)
        extra = 9 * 6 * 4 if rows else 0
        assert sum(k.macs for k in kernels_of(path).kernels) == net.macs() + extra
        found, error = attempt(lambda: recount(load_onnx(path)))
        if error is not None:
            assert rows or encoding in ("fused", "qoperator"), error
            assert rows or "com.microsoft." in str(error)
            return
        assert found.macs == net.macs() + extra


def add_rows(graph: onnx.GraphProto, net: Net) -> None:
    """Put a product of nine rows of six values with four columns, for each image, beside the network."""
    stored = {
        "corner": np.array([0, 0, 0], np.int64),
        "ends": np.array([2, 3, 3], np.int64),
        "axes": np.array([1, 2, 3], np.int64),
        "rows": np.array([net.batch, 9, 2], np.int64),
        "columns": np.ones((6, 4), np.float32),
    }
    graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in stored.items())
    nodes = [
        helper.make_node("Slice", ["image", "corner", "ends", "axes"], ["part"]),
        helper.make_node("Reshape", ["part", "rows"], ["places"]),
        helper.make_node("Concat", ["places"] * 3, ["wide"], axis=2),
        helper.make_node("MatMul", ["wide", "columns"], ["scores of places"], "everywhere"),
    ]
    graph.node.extend(nodes)
    graph.output.append(helper.make_tensor_value_info("scores of places", TensorProto.FLOAT, None))


count_draws = given(
    net=nets,
    encoding=st.sampled_from(list(ENCODINGS)),
    sprinkle=st.lists(st.booleans(), max_size=12),
    shuffle=st.booleans(),
    rows=st.sampled_from([False, False, True]),
)


@count_draws
@settings(max_examples=5, deadline=None)
def test_counts_are_torchs_or_refused(net, encoding, sprinkle, shuffle, rows):
    check_counts(net, encoding, sprinkle, shuffle, rows)


@pytest.mark.slow
@count_draws
@settings(max_examples=200, deadline=None)
def test_counts_of_many_files_are_torchs_or_refused(net, encoding, sprinkle, shuffle, rows):
    check_counts(net, encoding, sprinkle, shuffle, rows)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_is_counted_or_refused(encoding, rows):
    check_counts(PLAIN, encoding, [], False, rows)


class Chain:
    """Operators one behind the other on maps of eight channels."""

    def __init__(self, side: int, seed: int, opset: int) -> None:
        self.draw, self.side, self.opset = np.random.default_rng(seed), side, opset
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []
        self.x = "image"

    def constant(self, value: Any) -> str:
        self.stored.append(numpy_helper.from_array(np.asarray(value), f"c{len(self.stored)}"))
        return str(self.stored[-1].name)

    def weight(self, *shape: int) -> str:
        return self.constant((self.draw.normal(size=shape) * 0.3).astype(np.float32))

    def add(self, op: str, *constants: Any, **attributes: Any) -> None:
        """Put an operator behind the last; constants are values, or names of tensors."""
        names = [c if isinstance(c, str) else self.constant(np.asarray(c)) for c in constants]
        self.nodes.append(helper.make_node(op, [self.x, *names], [f"x{len(self.nodes)}"], f"n{len(self.nodes)}", **attributes))
        self.x = self.nodes[-1].output[0]

    def conv(self, before: int, after: int, **attributes: Any) -> None:
        self.add("Conv", self.weight(after, before, 3, 3), self.weight(after), pads=[1] * 4, **attributes)

    def norm(self) -> None:
        positive = [self.constant(self.draw.uniform(0.5, 2, 8).astype(np.float32)) for _ in range(2)]
        middle = [self.weight(8), self.weight(8)]
        self.add("BatchNormalization", positive[0], *middle, positive[1], epsilon=0.01)

    def write(self, path: Path) -> None:
        self.add("GlobalAveragePool")
        self.add("Flatten")
        self.add("Gemm", self.weight(SCORES, 8), self.weight(SCORES), transB=1)
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, self.side, self.side])],
            [helper.make_tensor_value_info(self.x, TensorProto.FLOAT, None)],
            self.stored,
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8), path)


def one(op: str, *constants: Any, **attributes: Any) -> Callable[[Chain], None]:
    return lambda chain: chain.add(op, *constants, **attributes)


F = np.float32
READ = {
    "conv": lambda c: c.conv(8, 8),
    "groups": lambda c: c.add("Conv", c.weight(8, 4, 3, 3), group=2, pads=[1, 0, 1, 2], dilations=[1, 1]),
    "dilated": lambda c: c.add("Conv", c.weight(8, 8, 3, 3), dilations=[2, 2], pads=[2] * 4),
    "same": lambda c: c.add("Conv", c.weight(8, 8, 4, 4), auto_pad="SAME_UPPER"),
    "same, lower": lambda c: c.add("Conv", c.weight(8, 8, 4, 4), auto_pad="SAME_LOWER"),
    "norm": lambda c: c.norm(),
    "relu": one("Relu"),
    "leaky": one("LeakyRelu", alpha=0.3),
    "prelu": lambda c: c.add("PRelu", c.weight(8, 1, 1)),
    "elu": one("Elu", alpha=0.5),
    "sigmoid": one("Sigmoid"),
    "tanh": one("Tanh"),
    "hard swish": one("HardSwish"),
    "hard sigmoid": one("HardSigmoid", alpha=0.1, beta=0.4),
    "clip": one("Clip", F(-0.4), F(0.7)),
    "clip far out": one("Clip", F(-3.5), F(3.0)),
    "times": one("Mul", F(0.7)),
    "plus": one("Add", F(0.3)),
    "per channel": lambda c: c.add("Add", c.weight(8, 1, 1)),
    "average": one("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1]),
    "average of padding, too": one("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    "maximum": one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 0, 0]),
    "maximum, rounded up": one("MaxPool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    "zeros around": lambda c: (c.add("Pad", np.array([0, 0, 1, 0, 0, 0, 2, 1])), c.conv(8, 8)),
    "dropout": one("Dropout"),
    "identity": one("Identity"),
    "cast": one("Cast", to=TensorProto.FLOAT),
}
OTHERS = {
    "turned": one("Transpose", perm=[0, 1, 3, 2]),
    "selu": one("Selu"),
    "softplus": one("Softplus"),
    "absolute": one("Abs"),
    "negative": one("Neg"),
    "exponential": one("Exp"),
    "thresholded": one("ThresholdedRelu", alpha=0.2),
    "soft sign": one("Softsign"),
    "floor": one("Floor"),
    "shrunk": one("Shrink", lambd=0.2, bias=0.1),
    "normalised": lambda c: c.add("InstanceNormalization", c.weight(8), c.weight(8)),
    "local": one("LRN", size=3),
    "unit": one("LpNormalization", axis=1),
    "average of squares": one("LpPool", kernel_shape=[3, 3], pads=[1] * 4),
    "zeros that are averaged": one("Pad", np.array([0, 0, 1, 0, 0, 0, 2, 1])),
    "ones around": one("Pad", np.array([0, 0, 1, 1, 0, 0, 1, 1]), F(1.0)),
    "mirrored": one("Pad", np.array([0, 0, 1, 1, 0, 0, 1, 1]), mode="reflect"),
    "edges": one("Pad", np.array([0, 0, 1, 1, 0, 0, 1, 1]), mode="edge"),
    "cut": one("Slice", np.array([1]), np.array([4]), np.array([2])),
    "prelu of pixels": lambda c: c.add("PRelu", c.weight(1, c.side, c.side)),
    "plus pixels": lambda c: c.add("Add", c.weight(c.side, c.side)),
    "power": one("Pow", F(2.0)),
    "running sum": one("CumSum", np.int64(2)),
    "softmax": one("Softmax", axis=1),
    "softmax of columns": one("Softmax", axis=-1),
    "norm in training": lambda c: (c.norm(), c.nodes[-1].attribute.append(helper.make_attribute("training_mode", 1))),
    "larger": one("Resize", "", F([1, 1, 2, 2]), mode="nearest"),
    "rounded": one("Round"),
}


def outgrown(path: Path) -> bool:
    """Whether some steps left a map, with its border, smaller than the window that comes then."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    side = {v.name: v.type.tensor_type.shape.dim[-1].dim_value for v in [*graph.input, *graph.value_info]}
    windows = [(n, {a.name: helper.get_attribute_value(a) for a in n.attribute}) for n in graph.node]
    pools = [(n, given) for n, given in windows if "kernel_shape" in given and n.op_type != "Conv"]
    return any(given["kernel_shape"][0] > side[n.input[0]] + sum(given.get("pads", [0, 0])[::2]) for n, given in pools)


def reads_what_it_computes(steps: list[str], side: int, seed: int, opset: int) -> None:
    """A network that is read computes onnxruntime's numbers on real images; what is refused, is so by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        chain = Chain(side, seed, opset)
        chain.conv(3, 8)
        for step in steps:
            (READ | OTHERS)[step](chain)
        chain.write(path)
        try:
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception:  # onnxruntime has no such network
            return
        checkpoint, error = attempt(lambda: load_checkpoint(path, preprocess="raw"))
        if error is not None:
            too_small = "has a window larger than its map" in str(error) and outgrown(path)
            assert too_small or not set(steps) <= set(READ), f"{steps}: {error}"
            assert error.exit_code == 5
            assert error.remedy
            return
        pixels = np.random.default_rng(seed).integers(0, 256, (2, 3, side, side)).astype(np.float32)
        wanted = np.concatenate([session.run(None, {"image": image[None]})[0] for image in pixels])
        with torch.no_grad():
            (found,) = build_model(checkpoint.network, checkpoint.state_dict).outputs(torch.from_numpy(pixels))
        assert difference(found, torch.from_numpy(wanted)) < 1e-4, steps


@pytest.mark.parametrize("step", [*READ, *OTHERS])
def test_every_operator_is_read_as_what_it_computes_or_refused(step):
    reads_what_it_computes([step], 8, 0, 17)


def test_a_part_of_a_map_that_is_normalised_is_refused_by_name():
    reads_what_it_computes(["cut", "normalised"], 6, 0, 13)


@pytest.mark.slow
@given(
    steps=st.lists(st.sampled_from([*READ, *READ, *OTHERS]), min_size=1, max_size=5),
    side=st.integers(6, 9),
    seed=st.integers(0, 2**16),
    opset=st.sampled_from([13, 15, 17]),
)
@settings(max_examples=300, deadline=None)
def test_many_foreign_networks_compute_what_onnxruntime_does_or_are_refused(steps, side, seed, opset):
    reads_what_it_computes(steps, side, seed, opset)
