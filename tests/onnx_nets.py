"""Small networks written as ONNX in the encodings that exporters, converters and quantizers use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class Net:
    """Convolutions one behind the other, with a residual sum where the widths allow it, a pool and a linear layer."""

    def __init__(
        self, widths: list[int], kernels: list[int], groups: list[int], strides: list[int], size: int, batch: int
    ) -> None:
        self.size, self.batch, self.widths = size, batch, widths
        layers, before = [], 3
        for width, kernel, group, stride in zip(widths, kernels, groups, strides, strict=True):
            group = group if before % group == 0 and width % group == 0 else 1
            layers.append(nn.Conv2d(before, width, kernel, stride, kernel // 2, groups=group))
            before = width
        self.convs = nn.ModuleList(layers)
        self.fc = nn.Linear(before, 5)

    def macs(self) -> int:
        """Multiply-accumulates for one image, as torch counts them."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            for conv in self.convs:
                y = conv(x).relu()
                x = x + y if x.shape == y.shape else y
            return self.fc(x.mean((2, 3)))

        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            forward(torch.zeros(1, 3, self.size, self.size))
        return counter.get_total_flops() // 2


class Writer:
    """Writes a `Net` as ONNX in one encoding."""

    def __init__(self, net: Net, encoding: str, sprinkle: list[bool]) -> None:
        self.net, self.encoding, self.sprinkle = net, encoding, list(sprinkle)
        self.nodes: list[onnx.NodeProto] = []
        self.stored: dict[str, np.ndarray] = {"s": np.float32(0.1), "z": np.int8(0), "u": np.uint8(0)}
        self.functions: list[onnx.FunctionProto] = []
        self.half = encoding == "half"
        self.kind = np.float16 if self.half else np.float32

    def add(self, op: str, inputs: list[str], domain: str = "", count: int = 1, **attributes: Any) -> str:
        outputs = [f"t{len(self.nodes)}" + "abc"[i] for i in range(count)]
        self.nodes.append(helper.make_node(op, inputs, outputs, f"n{len(self.nodes)}", domain=domain, **attributes))
        return outputs[0]

    def through(self, x: str) -> str:
        """Return the same values behind an Identity or a pair of Casts, where the draw says so."""
        if not self.sprinkle or not self.sprinkle.pop():
            return x
        if len(self.nodes) % 2:
            return self.add("Identity", [x])
        if self.encoding in ("qoperator", "dynamic"):
            return x
        kind = TensorProto.FLOAT16 if self.half else TensorProto.FLOAT
        return self.add("Cast", [self.add("Cast", [x], to=TensorProto.DOUBLE)], to=kind)

    def weight(self, name: str, tensor: torch.Tensor) -> str:
        value = tensor.detach().numpy()
        integer = self.encoding in ("qdq", "qoperator", "dynamic")
        self.stored[name] = (value * 100).astype(np.int8) if integer else value.astype(self.kind)
        if self.encoding == "qdq":
            return self.through(self.add("DequantizeLinear", [name, "s", "z"]))
        if self.encoding == "constants":
            return self.add("Constant", [], value=numpy_helper.from_array(self.stored.pop(name)))
        return name if integer else self.through(name)

    def rounded(self, x: str) -> str:
        return self.through(self.add("DequantizeLinear", [self.add("QuantizeLinear", [x, "s", "z"]), "s", "z"]))

    def conv(self, i: int, x: str, conv: nn.Conv2d) -> str:
        how: dict[str, Any] = {"strides": list(conv.stride), "pads": [conv.padding[0]] * 4, "group": conv.groups}
        w = self.weight(f"w{i}", conv.weight)
        if self.encoding == "qoperator":
            return self.add("QLinearConv", [x, "s", "z", w, "s", "z", "s", "z"], **how)
        if self.encoding == "dynamic":
            q = self.add("DynamicQuantizeLinear", [x], count=3)
            found = self.add("ConvInteger", [q, w, q[:-1] + "c"], **how)
            return self.add("Relu", [self.add("Mul", [self.add("Cast", [found], to=1), q[:-1] + "b"])])
        if self.encoding == "fused":
            return self.add("FusedConv", [x, w], "com.microsoft", activation="Relu", **how)
        if self.encoding == "functions":
            nodes = [helper.make_node("Conv", ["a", "b"], ["c"], **how), helper.make_node("Relu", ["c"], ["d"])]
            made = helper.make_function("here", f"block{i}", ["a", "b"], ["d"], nodes, [helper.make_opsetid("", 17)])
            self.functions.append(made)
            return self.add(f"block{i}", [x, w], "here")
        x = self.rounded(x) if self.encoding == "qdq" else self.through(x)
        return self.add("Relu", [self.add("Conv", [x, w], **how)])

    def write(self, path: Path, *, shuffle: bool = False) -> Path:
        x, before, size = "image", 3, self.net.size
        if self.half:
            x = self.add("Cast", [x], to=TensorProto.FLOAT16)
        if self.encoding == "qoperator":
            x = self.add("QuantizeLinear", [x, "s", "z"])
        for i, conv in enumerate(self.net.convs):
            y = self.conv(i, x, conv)
            after = (size + 2 * conv.padding[0] - conv.kernel_size[0]) // conv.stride[0] + 1
            if (before, size) == (conv.out_channels, after):
                if self.encoding == "qoperator":
                    y = self.add("QLinearAdd", [x, "s", "z", y, "s", "z", "s", "z"], "com.microsoft")
                else:
                    y = self.add("Add", [x, y])
            x, before, size = y, conv.out_channels, after
        if self.encoding == "qoperator":
            x = self.add("QLinearGlobalAveragePool", [x, "s", "z", "s", "z"], "com.microsoft", channels_last=0)
            x = self.add("Flatten", [x])
            self.stored["fc"] = (self.net.fc.weight.detach().numpy().T * 100).astype(np.int8)
            x = self.add("QLinearMatMul", [x, "s", "z", "fc", "s", "z", "s", "z"])
            x = self.add("DequantizeLinear", [x, "s", "z"])
        else:
            x = self.add("Flatten", [self.add("GlobalAveragePool", [x])])
            self.stored["fc"] = self.net.fc.weight.detach().numpy().astype(self.kind)
            x = self.add("Gemm", [x, "fc"], transB=1)
        nodes = self.nodes[::-1] if shuffle else self.nodes
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [self.net.batch, 3, self.net.size, self.net.size])],
            [helper.make_tensor_value_info(x, TensorProto.FLOAT16 if self.half else TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(v), k) for k, v in self.stored.items()],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("here", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, functions=self.functions, ir_version=8), path)
        return path


ENCODINGS = {
    "plain": "fp32",
    "constants": "fp32",
    "functions": "fp32",
    "fused": "fp32",
    "half": "fp16",
    "qdq": "int8",
    "qoperator": "int8",
    "dynamic": "int8",
}

nets = st.integers(1, 5).flatmap(
    lambda n: st.builds(
        Net,
        st.lists(st.sampled_from([4, 6, 8, 12]), min_size=n, max_size=n),
        st.lists(st.sampled_from([1, 3, 5]), min_size=n, max_size=n),
        st.lists(st.sampled_from([1, 1, 2]), min_size=n, max_size=n),
        st.lists(st.sampled_from([1, 1, 2]), min_size=n, max_size=n),
        st.sampled_from([8, 11, 16]),
        st.sampled_from([1, 1, 4]),
    )
)
