"""Broken ONNX files: small networks with one thing changed in their structure or their bytes, from a seed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import onnx
from export_zoo import arrays, cifar_pad, images, network, quantization_of
from onnx import AttributeProto, TensorProto, helper

from export.to_onnx import ExportOptions, to_onnx

Random = np.random.Generator
Mutation = Callable[[onnx.ModelProto, Random], None]


def originals() -> list[onnx.ModelProto]:
    """Return a float and an INT8 network of ours and one with a subgraph and a function; all small."""
    spec = cifar_pad()
    model = network(spec)
    tensors = arrays(model)
    found = [to_onnx(spec, tensors, None, ExportOptions(1))]
    found.append(to_onnx(spec, tensors, quantization_of(model, images(spec, 4)), ExportOptions(1)))
    branch = helper.make_graph(
        [helper.make_node("Relu", ["image"], ["inner"])], "b", [], [helper.make_tensor_value_info("inner", 1, None)]
    )
    weight = helper.make_tensor("w", 1, [4, 3, 3, 3], np.ones(108, np.float32).tolist())
    gamma = [helper.make_tensor(n, 1, [4], [1.0] * 4) for n in ("g", "b", "m", "v")]
    body = helper.make_function(
        "own", "Double", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])], [helper.make_opsetid("", 17)]
    )
    nodes = [
        helper.make_node("If", ["yes"], ["chosen"], name="if", then_branch=branch, else_branch=branch),
        helper.make_node("Conv", ["chosen", "w"], ["c"], name="conv", group=1, pads=[1] * 4),
        helper.make_node("BatchNormalization", ["c", "g", "b", "m", "v"], ["n"], name="norm"),
        helper.make_node("Double", ["n"], ["d"], domain="own"),
        helper.make_node("Relu", ["d"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["out"]),
    ]
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", 1, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("out", 1, [1, 4])],
        [weight, yes, *gamma],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    found.append(helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=9))
    return found


def _node(model: onnx.ModelProto, rng: Random) -> onnx.NodeProto:
    return model.graph.node[int(rng.integers(len(model.graph.node)))]


def _tensor(model: onnx.ModelProto, rng: Random) -> TensorProto:
    return model.graph.initializer[int(rng.integers(len(model.graph.initializer)))]


def _name(model: onnx.ModelProto, rng: Random) -> str:
    names = [o for n in model.graph.node for o in n.output] + [i.name for i in model.graph.initializer]
    return str(names[int(rng.integers(len(names)))])


def rewire(model: onnx.ModelProto, rng: Random) -> None:
    """An input reads some other tensor: often a later one, or the node's own output."""
    node = _node(model, rng)
    if node.input:
        node.input[int(rng.integers(len(node.input)))] = _name(model, rng)


def loop(model: onnx.ModelProto, rng: Random) -> None:
    node = _node(model, rng)
    if node.input:
        node.input[0] = node.output[0]


def drop_input(model: onnx.ModelProto, rng: Random) -> None:
    node = _node(model, rng)
    if node.input:
        del node.input[int(rng.integers(len(node.input))) :]


def empty_name(model: onnx.ModelProto, rng: Random) -> None:
    node = _node(model, rng)
    names = node.input if rng.random() < 0.5 and node.input else node.output
    names[int(rng.integers(len(names)))] = ""


def swap_inputs(model: onnx.ModelProto, rng: Random) -> None:
    node = _node(model, rng)
    turned = list(node.input)[::-1]
    del node.input[:]
    node.input.extend(turned)


def drop_node(model: onnx.ModelProto, rng: Random) -> None:
    del model.graph.node[int(rng.integers(len(model.graph.node)))]


def twin_node(model: onnx.ModelProto, rng: Random) -> None:
    model.graph.node.append(_node(model, rng))


def shuffle(model: onnx.ModelProto, rng: Random) -> None:
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in model.graph.node]
    rng.shuffle(nodes)  # type: ignore[arg-type]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def operator(model: onnx.ModelProto, rng: Random) -> None:
    kinds = ["Conv", "Relu", "QuantizeLinear", "BatchNormalization", "Gemm", "Nothing", "", "Loop", "Add", "Reshape", "Clip"]
    _node(model, rng).op_type = kinds[int(rng.integers(len(kinds)))]


def domain(model: onnx.ModelProto, rng: Random) -> None:
    _node(model, rng).domain = ["own", "com.microsoft", "ai.onnx", "else"][int(rng.integers(4))]


def attribute(model: onnx.ModelProto, rng: Random) -> None:
    node = _node(model, rng)
    values: list[object] = [0, -1, 2**40, 1.5, "text", [0, 0], [-1] * 4, [1.0], []]
    value = values[int(rng.integers(len(values)))]
    names = [
        "group",
        "axis",
        "strides",
        "pads",
        "kernel_shape",
        "dilations",
        "to",
        "epsilon",
        "value",
        "training_mode",
        "odd",
        "",
    ]
    name = names[int(rng.integers(len(names)))]
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    made = AttributeProto(name=name, type=AttributeProto.INTS) if value == [] else helper.make_attribute(name or "x", value)
    made.name = name
    node.attribute.append(made)


def attribute_type(model: onnx.ModelProto, rng: Random) -> None:
    for node in model.graph.node:
        for one in node.attribute:
            if rng.random() < 0.2:
                one.type = int(rng.integers(0, 15))  # type: ignore[assignment]
                return


def dims(model: onnx.ModelProto, rng: Random) -> None:
    tensor = _tensor(model, rng)
    odd = [0, -1, 1, 7, 10**9, 2**62]
    if tensor.dims and rng.random() < 0.8:
        tensor.dims[int(rng.integers(len(tensor.dims)))] = odd[int(rng.integers(len(odd)))]
    else:
        tensor.dims.append(odd[int(rng.integers(len(odd)))])


def reshape_scale(model: onnx.ModelProto, rng: Random) -> None:
    for tensor in model.graph.initializer:
        if len(tensor.dims) <= 1 and rng.random() < 0.3:
            shape = [*tensor.dims, 1] if rng.random() < 0.5 else list(tensor.dims[1:])
            del tensor.dims[:]
            tensor.dims.extend(shape)
            return


def data_type(model: onnx.ModelProto, rng: Random) -> None:
    _tensor(model, rng).data_type = int(rng.integers(0, 30))


def data(model: onnx.ModelProto, rng: Random) -> None:
    tensor = _tensor(model, rng)
    raw = tensor.raw_data
    tensor.raw_data = raw[: int(rng.integers(len(raw) + 1))] if rng.random() < 0.5 else raw + b"\0"


def both_data(model: onnx.ModelProto, rng: Random) -> None:
    tensor = _tensor(model, rng)
    tensor.ClearField("raw_data")
    field = ["float_data", "int32_data", "int64_data", "string_data"][int(rng.integers(4))]
    getattr(tensor, field).extend([b"x"] if field == "string_data" else [2**31 - 1] * int(rng.integers(0, 5)))


def outside(model: onnx.ModelProto, rng: Random) -> None:
    tensor = _tensor(model, rng)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    places = ["../secret", "/etc/passwd", "missing.bin", "", ".", "a\0b"]
    for key, value in (("location", places[int(rng.integers(len(places)))]), ("offset", "-1"), ("length", "x")):
        if rng.random() < 0.7:
            tensor.external_data.add(key=key, value=value)


def drop_tensor(model: onnx.ModelProto, rng: Random) -> None:
    del model.graph.initializer[int(rng.integers(len(model.graph.initializer)))]


def input_shape(model: onnx.ModelProto, rng: Random) -> None:
    shape = model.graph.input[0].type.tensor_type.shape
    odd = [0, -1, 10**6, 10**12, 1]
    shape.dim[int(rng.integers(len(shape.dim)))].dim_value = odd[int(rng.integers(len(odd)))]


def input_type(model: onnx.ModelProto, rng: Random) -> None:
    model.graph.input[0].type.tensor_type.elem_type = int(rng.integers(0, 30))


def no_input_type(model: onnx.ModelProto, rng: Random) -> None:
    if rng.random() < 0.5:
        model.graph.input[0].ClearField("type")
    else:
        del model.graph.input[:]


def opset(model: onnx.ModelProto, rng: Random) -> None:
    odd = [0, -5, 1, 5, 9, 12, 99, 2**40]
    model.opset_import[0].version = odd[int(rng.integers(len(odd)))]


def outputs(model: onnx.ModelProto, rng: Random) -> None:
    if rng.random() < 0.3:
        del model.graph.output[:]
    else:
        model.graph.output[0].name = ["", "nowhere", model.graph.input[0].name if model.graph.input else ""][
            int(rng.integers(3))
        ]


def metadata(model: onnx.ModelProto, rng: Random) -> None:
    odd = ["[]", "null", "3", "{", '"text"', "[" * 5000, '{"input_shape": []}', "\x00"]
    for prop in model.metadata_props:
        if rng.random() < 0.5:
            prop.value = odd[int(rng.integers(len(odd)))]


def inner(model: onnx.ModelProto, rng: Random) -> None:
    """Something inside a node's graph or a function."""
    if model.functions:
        target = model.functions[0].node[0] if rng.random() < 0.5 else model.graph.node[0].attribute[0].g.node[0]
        target.input[0] = ["", "nowhere", target.output[0]][int(rng.integers(3))]
        if rng.random() < 0.3:
            model.functions[0].node[0].op_type, model.functions[0].node[0].domain = "Double", "own"


STRUCTURAL: tuple[Mutation, ...] = (
    rewire, loop, drop_input, empty_name, swap_inputs, drop_node, twin_node, shuffle, operator, domain, attribute,
    attribute_type, dims, reshape_scale, data_type, data, both_data, outside, drop_tensor, input_shape, input_type,
    no_input_type, opset, outputs, metadata, inner,
)  # fmt: skip


def flipped(content: bytes, rng: Random) -> bytes:
    """Return the bytes of a file with some of them changed, cut out, doubled, or the end missing; mostly outside weights."""
    changed = bytearray(content)
    kind = rng.random()
    if kind < 0.2:
        return bytes(changed[: int(rng.integers(len(changed)))])
    start = int(rng.integers(min(len(changed), 6000)))
    for _ in range(int(rng.integers(1, 5))):
        at = (start + int(rng.integers(64))) % len(changed)
        if kind < 0.6:
            changed[at] = int(rng.integers(256))
        elif kind < 0.8:
            del changed[at]
        else:
            changed[at:at] = changed[at : at + 8]
    return bytes(changed)


def mutants(count: int, seed: int = 0) -> list[tuple[str, bytes]]:
    """Return this many broken files, each with a name that says how it was broken; the same for the same seed."""
    models = originals()
    found: list[tuple[str, bytes]] = []
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        copy = onnx.ModelProto()
        copy.CopyFrom(models[int(rng.integers(len(models)))])
        if i % 4 == 3:
            found.append((f"{i} bytes", flipped(copy.SerializeToString(), rng)))
            continue
        mutation = STRUCTURAL[(i - i // 4) % len(STRUCTURAL)]
        twice = rng.random() >= 0.7
        mutation(copy, rng)
        if twice:
            with contextlib.suppress(IndexError, ValueError):  # the first may have left nothing to change
                mutation(copy, rng)
        found.append((f"{i} {mutation.__name__}", copy.SerializeToString()))
    return found
