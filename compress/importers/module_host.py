"""What a Python module computes behind its trunk, as an ONNX file: torch's own exporter writes it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compress.checkpoints.files import open_file
from compress.importers.code import module_with
from compress.importers.module import brief, exported, output_names, quiet
from compress.importers.proof import random_images
from rescompress.core.errors import CheckpointError
from rescompress.core.host import Host

OPSET = 17
IMAGE = "image"


def rest_of(host: Host) -> tuple[onnx.ModelProto, Host]:
    """Return the rest of a host of code as a model that reads the images and the trunk's outputs; and the host of that model.

    Args:
        host: Of kind ``code``; it is built again, which runs the user's file.

    Raises:
        CheckpointError: It is gone or was changed, or torch cannot write it as ONNX.
    """
    from compress.checkpoints.base import LoadOptions
    from compress.checkpoints.options import parse_shape

    path = host.checked()
    arch = dict(host.options)
    options = LoadOptions(parse_shape(arch.pop("input")), None, arch)
    with quiet():
        module = module_with(open_file(path, allow_pickle=False), arch["code"], options)[0].eval()
        assert options.input_shape is not None
        x_NCHW = random_images(options.input_shape, host.batch or 1)
        program = exported(module, x_NCHW)
        whole = _unguarded(program)
        names = {name: f"border_{i}" for i, name in enumerate(host.borders)}
        inputs = [IMAGE, *names.values()]
        try:
            rest, borders = _rest(whole, host, x_NCHW)
            ends = [name or f"output_{i}" for i, name in enumerate(output_names(program, len(rest(x_NCHW, *borders))))]
            with tempfile.TemporaryDirectory(prefix="rescompress-") as folder:
                place = Path(folder) / "rest.onnx"
                torch.onnx.export(
                    rest, (x_NCHW, *borders), place, dynamo=False, opset_version=OPSET, input_names=inputs, output_names=ends
                )
                model = onnx.load(str(place))
        except Exception as e:  # torch's exporter raises whatever its parts raise
            raise CheckpointError(
                f"torch cannot write the rest of the host as ONNX: {brief(e)}",
                remedy="put the trunk back in Python: rescompress.into_module(module, checkpoint)",
            ) from e
    if IMAGE not in {i.name for i in model.graph.input}:
        shape = list(x_NCHW.shape)
        model.graph.input.insert(0, onnx.helper.make_tensor_value_info(IMAGE, onnx.TensorProto.FLOAT, shape))
    return model, host.model_copy(update={"kind": "onnx", "borders": names, "input": IMAGE})


def _unguarded(program: Any) -> Any:
    """Return a program as a module that does not check its inputs: a tracer cannot follow the check."""
    try:
        return program.module(check_guards=False)
    except TypeError:  # torch before 2.9 checks nothing
        return program.module()


class _Rest(nn.Module):
    """A part of a program, its outputs in a row."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors among them."""
        return tuple(leaf for leaf in pytree.tree_leaves(self.program(*inputs)) if isinstance(leaf, Tensor))


def _rest(whole: Any, host: Host, x_NCHW: Tensor) -> tuple[nn.Module, list[Tensor]]:
    """Return what computes the outputs from the images and the borders, and the borders' values."""
    seen: dict[str, Tensor] = {}

    class Keeping(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in host.borders.values():
                seen[n.name] = value
            return value

    with torch.no_grad():
        Keeping(whole).run(x_NCHW)
    graph = whole.graph
    graph.set_codegen(torch.fx.graph.CodeGen())
    nodes = {node.name: node for node in graph.nodes}
    last = nodes[host.input]
    for i, name in enumerate(host.borders.values()):
        with graph.inserting_after(last):
            last = graph.placeholder(f"border_{i}")
        nodes[name].replace_all_uses_with(last)
    graph.eliminate_dead_code()
    return _Rest(torch.fx.GraphModule(whole, graph)), [seen[name] for name in host.borders.values()]
