"""`check_structure`: everything that can be malformed in an ONNX model and needs no shapes to be seen."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto, helper, numpy_helper

from rescompress.core.errors import ModelFileError

STANDARD = ("", "ai.onnx")
"""Names of the domain of ONNX's own operators."""

_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_AGAIN = "export it again"
_LARGEST_VERSION = 2**31 - 1
"""ONNX's own tables take no larger version of operators."""
_BITS = {
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    getattr(TensorProto, "INT2", -1): 2,
    getattr(TensorProto, "UINT2", -2): 2,
    getattr(TensorProto, "FLOAT6E2M3", -3): 6,
    getattr(TensorProto, "FLOAT6E3M2", -4): 6,
}
_GRAPHS = (AttributeProto.GRAPH, AttributeProto.GRAPHS)
_FIELDS = {
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
    AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    AttributeProto.TYPE_PROTO: "tp",
}


def check_structure(model: onnx.ModelProto) -> None:
    """Check everything that needs no shapes: names, order, operators, stored tensors.

    Raises:
        ModelFileError: Something is malformed; the text names the node or tensor.
    """
    if not model.graph.node or not model.opset_import:
        raise ModelFileError("holds no ONNX graph", remedy="name an .onnx file")
    functions = {(_domain(f.domain), f.name): f for f in model.functions}
    if len(functions) < len(model.functions):
        refuse("two functions of the file have the same name")
    _Structure(opsets(model.opset_import), functions).graph(model.graph, frozenset(), main=True)
    for function in functions.values():
        _Structure(opsets(function.opset_import), functions).function(function)
    _check_calls(functions)


def order(nodes: Sequence[NodeProto]) -> list[int]:
    """Return the places of the nodes in order of computation: as they stand, where that is one.

    Runtimes sort graphs, and converters of types rely on it: they put casts behind the last node.

    Raises:
        ModelFileError: The graph has a cycle.
    """
    makers = {out: i for i, node in reversed(list(enumerate(nodes))) for out in node.output if out}
    sources = [{makers[name] for name in reads(node) if name in makers} for node in nodes]
    if all(source < i for i, found in enumerate(sources) for source in found):
        return list(range(len(nodes)))
    readers: dict[int, list[int]] = {}
    for i, found in enumerate(sources):
        for source in found:
            readers.setdefault(source, []).append(i)
    missing = [len(found) for found in sources]
    ready = [i for i, count in enumerate(missing) if not count]
    ordered: list[int] = []
    while ready:
        ordered.append(heapq.heappop(ready))
        for reader in readers.get(ordered[-1], ()):
            missing[reader] -= 1
            if not missing[reader]:
                heapq.heappush(ready, reader)
    if len(ordered) < len(nodes):
        _refuse_cycle(nodes, sources, set(range(len(nodes))) - set(ordered))
    return ordered


def reads(node: NodeProto) -> set[str]:
    """Return the tensors that a node reads; graphs inside it read those that they do not make themselves."""
    found = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs) if attribute.type in _GRAPHS else ():
            made = {v.name for v in (*graph.input, *graph.initializer)} | {s.values.name for s in graph.sparse_initializer}
            made |= {name for inner in graph.node for name in inner.output}
            for inner in graph.node:
                found |= reads(inner) - made
            found |= {o.name for o in graph.output} - made
    return found


def is_standard(node: NodeProto) -> bool:
    """Whether a node is of ONNX's own operators, or of onnxruntime's quantizers, which mean the same."""
    return node.domain in STANDARD or (node.domain == "com.microsoft" and node.op_type in _QUANTIZERS)


def node_label(node: NodeProto) -> str:
    """Return what to call a node in a message: its name, or its type and first output."""
    return str(node.name or f"{node.op_type}({next((o for o in node.output if o), '')})")


class _Structure:
    """Checks one graph or function, and what is nested in it."""

    def __init__(self, opsets: Mapping[str, int], functions: Mapping[tuple[str, str], FunctionProto]) -> None:
        self.opsets = opsets
        self.functions = functions

    def function(self, function: FunctionProto) -> None:
        """Check the body of a function of the file."""
        where = f"function {_text(function.name, 'a function')}"
        known = {_text(name, where) for name in function.input}
        self.nodes(function.node, known, frozenset(), where, inside_function=True)
        for name in function.output:
            if name not in known:
                refuse(f"output '{name}' of {where} is not computed")

    def graph(
        self, graph: GraphProto, outer: frozenset[str], *, main: bool = False, where: str = "", inside_function: bool = False
    ) -> None:
        """Check a graph; `outer` are the tensors of the graphs around it, `where` is what to call it."""
        at = f" of {where}" if where else ""
        known: set[str] = set()
        for value in graph.input:
            if _text(value.name, f"an input{at}") in known or not value.name:
                refuse(f"two inputs{at} are called '{value.name}'" if value.name else f"an input{at} has no name")
            known.add(value.name)
            _check_type(value, f"input '{value.name}'", typed=main)
        stored = [*graph.initializer, *(s.values for s in graph.sparse_initializer)]
        names: set[str] = set()
        for tensor in stored:
            if _text(tensor.name, f"a stored tensor{at}") in names or not tensor.name:
                refuse(f"two stored tensors are called '{tensor.name}'" if tensor.name else "a stored tensor has no name")
            names.add(tensor.name)
        for tensor in graph.initializer:
            _check_tensor(tensor, f"tensor '{tensor.name}'")
        for sparse in graph.sparse_initializer:
            _check_sparse(sparse, f"tensor '{sparse.values.name}'")
        known |= names
        self.nodes(graph.node, known, outer, where, inside_function=inside_function)
        outputs: set[str] = set()
        for value in graph.output:
            if _text(value.name, f"an output{at}") in outputs or not value.name:
                refuse(f"two outputs{at} are called '{value.name}'" if value.name else f"an output{at} has no name")
            outputs.add(value.name)
            _check_type(value, f"output '{value.name}'", typed=False)
            if value.name not in known and value.name not in outer:
                refuse(f"output '{value.name}'{at} is not computed by any node")
        if main and not outputs:
            refuse("the graph has no output")
        for value in graph.value_info:
            _text(value.name, "a tensor")
            _check_type(value, f"tensor '{value.name}'", typed=False)

    def nodes(
        self, nodes: Iterable[NodeProto], known: set[str], outer: frozenset[str], where: str, *, inside_function: bool
    ) -> None:
        """Check nodes in order; `known` are the tensors in front of the first, and grows by what they make."""
        nodes = list(nodes)
        for index, node in enumerate(nodes):
            for text in (node.op_type, node.domain, node.name, *node.input, *node.output):
                _text(text, f"node {index + 1}{f' of {where}' if where else ''}")
        for node in (nodes[i] for i in order(nodes)):
            label = node_label(node)
            for name in node.input:
                if name and name not in known and name not in outer:
                    refuse(f"node {label} reads tensor '{name}', which nothing makes")
            self.attributes(node, label, outer, known, inside_function=inside_function)
            self.arity(node, label)
            for name in node.output:
                if name in known:
                    refuse(f"tensor '{name}', which {label} makes, is made or stored elsewhere, too")
                if name:
                    known.add(name)

    def arity(self, node: NodeProto, label: str) -> None:
        """Check that a node's inputs, outputs and attributes are those of its operator."""
        domain = _domain(node.domain)
        if not node.op_type:
            refuse(f"node {label} has no operator")
        if not any(node.output):
            refuse(f"node {label} has no output")
        if domain and domain not in self.opsets:
            refuse(f"node {label} is of domain {domain}, of which the file names no version")
        if (domain, node.op_type) in self.functions:
            function = self.functions[domain, node.op_type]
            if len(node.input) > len(function.input) or len(node.output) > len(function.output):
                refuse(f"node {label} does not have the inputs and outputs of its function {node.op_type}")
            return
        if is_standard(node):
            domain = ""
        if not domain and "" not in self.opsets:
            refuse("the file names no version of ONNX's operators", "export it with an opset")
        schemas = _schemas(node.op_type, domain, self.opsets.get(domain, 1))
        if not schemas:
            return  # of a runtime's own: lint speaks of it
        least, most = schemas[0].min_input, max(s.max_input for s in schemas)
        if not least <= len(node.input) <= most:
            refuse(f"{node.op_type} {label} has {len(node.input)} inputs, not {_range(least, most)}")
        for formal, name in zip(schemas[0].inputs, node.input, strict=False):
            if not name and formal.option == onnx.defs.OpSchema.FormalParameterOption.Single:
                refuse(f"{node.op_type} {label} lacks its input {formal.name}")
        least, most = schemas[0].min_output, max(s.max_output for s in schemas)
        if not least <= len(node.output) <= most:
            refuse(f"{node.op_type} {label} has {len(node.output)} outputs, not {_range(least, most)}")
        known = {name: one for s in reversed(schemas) for name, one in s.attributes.items()}
        for attribute in node.attribute:
            definition = known.get(attribute.name)
            if definition is None:
                refuse(f"{node.op_type} {label} has an attribute {attribute.name}, which no version of {node.op_type} has")
            if attribute.type != int(definition.type.value) and not attribute.ref_attr_name:
                kind = AttributeProto.AttributeType.Name(attribute.type).lower()
                refuse(f"attribute {attribute.name} of {node.op_type} {label} is of type {kind}")
        given = {a.name for a in node.attribute}
        for name, definition in schemas[0].attributes.items():
            if definition.required and name not in given:
                refuse(f"{node.op_type} {label} lacks its attribute {name}")

    def attributes(self, node: NodeProto, label: str, outer: frozenset[str], known: set[str], *, inside_function: bool) -> None:
        """Check what the attributes of a node hold; graphs in them may read `outer` and `known`."""
        names: set[str] = set()
        for attribute in node.attribute:
            what = f"attribute '{_text(attribute.name, f'an attribute of {label}')}' of {label}"
            if not attribute.name or attribute.name in names:
                refuse(f"{what} is there twice" if attribute.name else f"an attribute of {label} has no name")
            names.add(attribute.name)
            if attribute.ref_attr_name:
                if not inside_function:
                    refuse(f"{what} refers to an attribute of a function, but stands in none")
                continue
            kind = attribute.type
            if kind == AttributeProto.UNDEFINED or kind not in AttributeProto.AttributeType.values():
                refuse(f"{what} has no type")
            field = _FIELDS.get(kind)
            if field is not None and not attribute.HasField(field):
                refuse(f"{what} is empty")
            for tensor in (attribute.t,) if kind == AttributeProto.TENSOR else attribute.tensors:
                _check_tensor(tensor, what)
            for sparse in (attribute.sparse_tensor,) if kind == AttributeProto.SPARSE_TENSOR else attribute.sparse_tensors:
                _check_sparse(sparse, what)
            for graph in (attribute.g,) if kind == AttributeProto.GRAPH else attribute.graphs:
                self.graph(graph, outer | known, where=f"the graph in {label}", inside_function=inside_function)


def refuse(what: str, remedy: str = _AGAIN) -> NoReturn:
    """Raise what a malformed model ends with."""
    raise ModelFileError(what, remedy=remedy)


def _refuse_cycle(nodes: Sequence[NodeProto], sources: Sequence[set[int]], left: set[int]) -> NoReturn:
    """Name the nodes of a cycle; every node of `left` has a source there."""
    at = min(left)
    path: list[int] = []
    seen: dict[int, int] = {}
    while at not in seen:
        seen[at] = len(path)
        path.append(at)
        at = min(sources[at] & left)
    names = [node_label(nodes[i]) for i in reversed(path[seen[at] :])]
    shown = names if len(names) <= 6 else [*names[:3], "...", *names[-3:]]
    refuse(f"the graph has a cycle: {' -> '.join([*shown, names[0]])}")


def _check_calls(functions: Mapping[tuple[str, str], FunctionProto]) -> None:
    """Refuse functions that call themselves, directly or through others."""
    calls = {
        key: {(_domain(n.domain), n.op_type) for n in function.node} & functions.keys() for key, function in functions.items()
    }
    done: set[tuple[str, str]] = set()
    while len(done) < len(calls):
        free = {key for key, called in calls.items() if key not in done and called <= done}
        if not free:
            refuse(f"function {next(key[1] for key in calls if key not in done)} calls itself")
        done |= free


def _check_type(value: onnx.ValueInfoProto, what: str, *, typed: bool) -> None:
    """Check the type of an input, output or tensor in between; `typed` where it must be stated."""
    if value.type.WhichOneof("value") not in (None, "tensor_type"):
        return  # sequences, maps and the like: no image, and nothing reads them here
    tensor = value.type.tensor_type
    if tensor.elem_type not in TensorProto.DataType.values() or (typed and tensor.elem_type == TensorProto.UNDEFINED):
        refuse(f"{what} has no known type")
    dims = [d.dim_value for d in tensor.shape.dim]
    for d in tensor.shape.dim:
        _text(d.dim_param, what)
    if any(d < 0 for d in dims):
        refuse(f"{what} has a negative size: {by(dims)}")


def _check_tensor(tensor: TensorProto, what: str) -> None:
    """Check that a stored tensor holds what its type and shape say."""
    kind, dims = tensor.data_type, tensor.dims
    if kind == TensorProto.UNDEFINED or kind not in TensorProto.DataType.values():
        refuse(f"{what} has no known type")
    if any(d < 0 for d in dims):
        refuse(f"{what} has a negative size: {by(dims)}")
    if tensor.HasField("segment"):
        refuse(f"{what} is stored in segments, which no tool reads")
    if tensor.data_location == TensorProto.EXTERNAL:
        for entry in tensor.external_data:
            _text(entry.key, what)
            _text(entry.value, what)
        return
    count = math.prod(dims)
    if kind == TensorProto.STRING:
        if len(tensor.string_data) != count:
            refuse(f"{what} is {by(dims)}, but holds {len(tensor.string_data)} strings")
        return
    bits = _BITS.get(kind, 8 * helper.tensor_dtype_to_np_dtype(kind).itemsize)
    if tensor.HasField("raw_data"):
        held, needed = len(tensor.raw_data), -(-count * bits // 8)
        if held != needed:
            refuse(f"{what} is {by(dims)}, {needed} bytes, but holds {held}")
        return
    held = len(getattr(tensor, helper.tensor_dtype_to_field(kind)))
    per_value = 2 if kind in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else min(bits / 8, 1)
    if held not in {count * per_value, math.ceil(count * per_value)}:
        refuse(f"{what} is {by(dims)}, but holds {held} values")
    try:
        numpy_helper.to_array(tensor)
    except Exception as e:  # a value beyond its type
        refuse(f"{what} cannot be read: {one_line(e)}")


def _check_sparse(sparse: onnx.SparseTensorProto, what: str) -> None:
    """Check a tensor of which only some values are stored."""
    _check_tensor(sparse.values, what)
    _check_tensor(sparse.indices, what)
    if sparse.indices.data_type != TensorProto.INT64 or any(d < 1 for d in sparse.dims):
        refuse(f"{what} is a sparse tensor without proper indices")


def opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    """Return the version of each domain of operators."""
    found: dict[str, int] = {}
    for entry in imports:
        domain = _domain(_text(entry.domain, "a domain of operators"))
        if found.setdefault(domain, entry.version) != entry.version:
            refuse(f"the file names two versions of the operators of domain '{domain or 'ai.onnx'}'")
        if not 1 <= entry.version <= _LARGEST_VERSION:
            refuse(f"the file names version {entry.version} of the operators of domain '{domain or 'ai.onnx'}'")
    return found


@lru_cache(maxsize=1024)
def _schemas(op_type: str, domain: str, version: int) -> tuple[Any, ...]:
    """Return the definitions of an operator: of this version of its domain, and the newest; empty where it is not known."""
    found: list[Any] = []
    for newest in (min(version, 2**31 - 1), 2**31 - 1):
        try:
            schema = onnx.defs.get_schema(op_type, newest, domain)
        except onnx.defs.SchemaError:
            continue
        if schema not in found:
            found.append(schema)
    return tuple(found)


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _text(name: object, what: str) -> str:
    """Return a name; protobuf hands out what is no UTF-8 as bytes."""
    if not isinstance(name, str):
        refuse(f"{what} has a name that is no text: {name!r:.60}")
    return name


def by(dims: Iterable[int]) -> str:
    """Return a shape as people write it."""
    return "x".join(map(str, dims)) or "a scalar"


def _range(least: int, most: int) -> str:
    if most > 2**30:
        return f"{least} or more"
    return str(least) if least == most else f"{least} to {most}"


def one_line(error: Exception) -> str:
    """Return the text of an error of somebody else's, short enough for one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
