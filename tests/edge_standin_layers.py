# ruff: noqa: UP031
"""What the STAND-INs for builders say of an ONNX file's layers, for tests only: standard library, Python 3.6 and later.

Reads names, operators, inputs and outputs of the nodes from the protocol buffer itself, and writes layer information in the
form of each version of TensorRT, as an engine would that keeps its word, or breaks it in the way that `trouble` names.
"""


def varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def fields(data):
    """Return (number, value) of the fields of a message; numbers as int, the rest as bytes."""
    at, found = 0, []
    while at < len(data):
        key, at = varint(data, at)
        if key & 7 == 0:
            value, at = varint(data, at)
        elif key & 7 == 2:
            size, at = varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            size = {1: 8, 5: 4}[key & 7]
            value, at = data[at : at + size], at + size
        found.append((key >> 3, value))
    return found


def graph_of(content):
    """Return the nodes as (name, operator, inputs, outputs), and the types of the initializers by name."""
    graph = next(v for n, v in fields(content) if n == 7)
    nodes, types = [], {}
    for number, value in fields(graph):
        if number == 1:
            parts = fields(value)
            inputs, outputs = ([v.decode() for n, v in parts if n == k] for k in (1, 2))
            name = next((v.decode() for n, v in parts if n == 3), "") or "node_of_" + outputs[0]
            nodes.append((name, next(v.decode() for n, v in parts if n == 4), inputs, outputs))
        elif number == 5:
            parts = dict(fields(value))
            types[parts[8].decode()] = parts.get(2)
    return nodes, types


def types_of(content, flags, strong):
    """Return the type of every convolution and matrix product: of the file, or of the flags where they decide."""
    nodes, types = graph_of(content)
    maker = {out: node for node in nodes for out in node[3]}
    found = {}
    for name, operator, inputs, _ in nodes:
        if operator in ("Conv", "Gemm", "MatMul"):
            quantized = all(maker.get(i, ("", ""))[1] == "DequantizeLinear" for i in inputs[:2])
            half = types.get(inputs[1]) == 10 if strong else "--fp16" in flags
            found[name] = "Int8" if quantized else "Half" if half else "Float"
    return found, [node[0] for node in nodes]


def layers_of(content, version, flags, trouble=None, dla=False):
    """Return the layer information of an engine, and the lines of its build log that tell what runs on a DLA."""
    found, order = types_of(content, flags, version >= (10, 12))
    if trouble == "missing":
        found = dict(list(found.items())[1:])
    first = next((n for n, t in found.items() if t == "Int8"), None)
    lines = []
    if dla and trouble != "gpu":
        inside = "{ForeignNode[%s...%s]}" % (order[0], order[-1])
        lines = ["---------- Layers Running on DLA ----------", "[DlaLayer] " + inside]
        layers = [{"Name": inside, "LayerType": "DLA", "Inputs": [], "Outputs": []}]
    else:
        layers = []
        for name, kind in found.items():
            ran = "Half" if trouble == "half" and name == first else kind
            tensor = {"Name": "x", "Dimensions": [1, 8, 8, 8]}
            tensor.update({"Datatype": ran, "Format": "kLINEAR"} if version >= (11, 0) else {"Format/Datatype": ran})
            layer = {"Name": name, "LayerType": "CaskConvolution", "Inputs": [tensor], "Outputs": [tensor]}
            layer["Weights"] = {"Type": ran, "Count": 9}
            if version >= (8, 6):
                layer["Metadata"] = "[ONNX Layer: %s]" % name
            layers.append(layer)
    lines.append("---------- Layers Running on GPU ----------")
    if trouble == "names":
        layers = [layer["Name"] for layer in layers]
    return {"Layers": layers, "I/O Tensors" if version >= (11, 0) else "Bindings": []}, lines
