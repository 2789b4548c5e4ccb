"""Hosts: programs with a small residual trunk in front of something that no network here computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn
from torchvision.ops import FrozenBatchNorm2d


class Program:
    """Builds an ONNX model node by node."""

    def __init__(self, shape: Sequence[int | str] = ("n", 3, 16, 16), opset: int = 17) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []
        self.entries = [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)]
        self.opset = opset
        self.random = np.random.default_rng(0)

    def input(self, name: str, shape: Sequence[int | str]) -> str:
        self.entries.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def constant(self, value: Any) -> str:
        self.stored.append(numpy_helper.from_array(np.asarray(value), f"w{len(self.stored)}"))
        return self.stored[-1].name

    def weight(self, *shape: int) -> str:
        return self.constant((self.random.normal(size=shape) / max(1, np.prod(shape[1:])) ** 0.5).astype(np.float32))

    def __call__(self, op: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        made = out or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [made], name=f"{op}_{len(self.nodes)}", **attributes))
        return made

    def conv(self, x: str, i: int, o: int, *, stride: int = 1, out: str | None = None) -> str:
        return self("Conv", x, self.weight(o, i, 3, 3), self.weight(o), pads=[1, 1, 1, 1], strides=[stride, stride], out=out)

    def block(self, x: str, c: int, out: str) -> str:
        """A residual block of as many channels."""
        y = self.conv(self("Relu", self.conv(x, c, c)), c, c)
        return self("Relu", self("Add", x, y), out=out)

    def reduced(self, op: str, x: str, *axes: int, out: str | None = None) -> str:
        """A reduction, whose axes are an input from opset 18 on."""
        if self.opset < 18:
            return self(op, x, axes=list(axes), keepdims=0, out=out)
        return self(op, x, self.constant(np.array(axes)), keepdims=0, out=out)

    def tokens(self, x: str, c: int, out: str = "answer", outputs: int = 5) -> str:
        """What no network here computes: pixels as tokens that see each other."""
        rows = self("Transpose", self("Reshape", x, self.constant(np.array([0, c, -1]))), perm=[0, 2, 1])
        mixed = self("MatMul", self("Softmax", self("MatMul", rows, self("Transpose", rows, perm=[0, 2, 1])), axis=-1), rows)
        seen = self.reduced("ReduceMean", mixed, 1)
        return self("MatMul", seen, self.weight(c, outputs), out=out)

    def model(self, *outputs: str, **shapes: Sequence[int | str]) -> onnx.ModelProto:
        sizes = {"energy": ("n", 16), **shapes}
        ends = [helper.make_tensor_value_info(o, TensorProto.FLOAT, sizes.get(o, ("k", "m"))) for o in outputs]
        graph = helper.make_graph(self.nodes, "host", self.entries, ends, self.stored)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)


def two_scales(opset: int = 17, batch: int | str = "n") -> onnx.ModelProto:
    """Two maps of the trunk are read: by tokens, and by a sum of squares."""
    f = Program((batch, 3, 16, 16), opset)
    x = f("Relu", f.conv("image", 3, 16))
    x = f.block(f.block(x, 16, "one"), 16, "fine")
    y = f("Relu", f.conv(x, 16, 32, stride=2))
    y = f.block(f.block(y, 32, "two"), 32, "coarse")
    f.tokens(y, 32, "class_scores")
    f.reduced("ReduceL2", "fine", 2, 3, out="energy")
    return f.model("class_scores", "energy")


def channels_last() -> onnx.ModelProto:
    """As TensorFlow's exporters write it."""
    f = Program(("n", 16, 16, 3))
    x = f("Relu", f.conv(f("Transpose", "image", perm=[0, 3, 1, 2]), 3, 16))
    f.tokens(f.block(x, 16, "map"), 16)
    return f.model("answer")


def robot() -> onnx.ModelProto:
    """The state of the joints is an input, too."""
    f = Program((1, 3, 16, 16))
    state = f.input("state", (1, 7))
    x = f.block(f("Relu", f.conv("image", 3, 16)), 16, "map")
    seen = f.tokens(x, 16, "seen", 8)
    joints = f("MatMul", state, f.weight(7, 8))
    f("MatMul", f("Tanh", f("Add", seen, joints)), f.weight(8, 7), out="action")
    return f.model("action")


def segmenter() -> onnx.ModelProto:
    """Beside a branch of pixels stands one of the whole map, pooled and enlarged again, as in DeepLab."""
    f = Program(("n", 3, 16, 16))
    x = f.block(f("Relu", f.conv("image", 3, 16, stride=2)), 16, "map")
    near = f("Relu", f("Conv", x, f.weight(8, 16, 1, 1)), out="near")
    far = f("Relu", f("Conv", f("GlobalAveragePool", x), f.weight(8, 16, 1, 1)), out="far")
    sizes = f.constant(np.array([8, 8]))
    wide = f("Concat", f("Slice", f("Shape", far), f.constant(np.array([0])), f.constant(np.array([2]))), sizes, axis=0)
    far = f("Resize", far, "", "", wide, mode="linear", coordinate_transformation_mode="half_pixel", out="spread")
    f("Conv", f("Concat", near, far, axis=1), f.weight(5, 16, 1, 1), out="answer")
    return f.model("answer", answer=("n", 5, 8, 8))


def precise() -> onnx.ModelProto:
    """Behind the trunk it goes on in double precision."""
    f = Program(("n", 3, 16, 16))
    x = f("Cast", f.block(f("Relu", f.conv("image", 3, 16)), 16, "map"), to=TensorProto.DOUBLE, out="precise_map")
    f("Cast", f.reduced("ReduceL2", x, 2, 3), to=TensorProto.FLOAT, out="answer")
    return f.model("answer", answer=("n", 16))


def one_head_for_two_levels() -> onnx.ModelProto:
    """A convolution works on maps of two sizes, as the heads of detectors do."""
    f = Program(("n", 3, 16, 16))
    head = f.weight(8, 8, 3, 3)
    fine = f.block(f("Relu", f.conv("image", 3, 8)), 8, "fine")
    coarse = f.block(f("Relu", f.conv(fine, 8, 8, stride=2)), 8, "coarse")
    for level in (fine, coarse):
        seen = f("Relu", f("Conv", level, head, pads=[1, 1, 1, 1]))
        f.reduced("ReduceL2", seen, 2, 3, out=f"{level}_answer")
    return f.model("fine_answer", "coarse_answer", fine_answer=("n", 8), coarse_answer=("n", 8))


def two_cameras() -> onnx.ModelProto:
    """Two inputs of images, which meet."""
    f = Program((1, 3, 16, 16))
    other = f.input("wrist", (1, 3, 16, 16))
    a = f.block(f("Relu", f.conv("image", 3, 16)), 16, "front_map")
    b = f.block(f("Relu", f.conv(other, 3, 16)), 16, "wrist_map")
    f.tokens(f("Add", a, b, out="both"), 16)
    return f.model("answer")


def saved(model: onnx.ModelProto, folder: Path, name: str = "host.onnx") -> Path:
    """Write a host."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(folder / name))
    return folder / name


def photos(folder: Path, count: int = 24, side: int = 16) -> Path:
    """A flat folder of pictures without labels."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    for i in range(count):
        coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BILINEAR).save(folder / f"{i:02}.png")
    return folder


class Policy(nn.Module):
    """A residual trunk with frozen statistics, then tokens that see each other, then an action."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), FrozenBatchNorm2d(width), nn.ReLU())
        self.block1, self.block2 = Residual(width), Residual(width)
        self.project = nn.Conv2d(width, 12, 1)
        self.encoder = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, dropout=0.0)
        self.action = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        early = self.block1(self.stem(x))
        tokens = self.project(self.block2(early)).flatten(2).transpose(1, 2)
        return {"action": self.action(self.encoder(tokens).mean(1)), "early": torch.linalg.vector_norm(early, dim=(2, 3))}


class Residual(nn.Module):
    """Two convolutions with frozen BatchNorm, and what went in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, 1, 1, bias=False), FrozenBatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), FrozenBatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu(x + y)


def policy() -> Policy:
    """The same on every call."""
    torch.manual_seed(0)
    return Policy().eval()
