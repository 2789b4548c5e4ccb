"""A torch module as a network: traced by ``torch.export``, read operator by operator, proven by the module's own outputs."""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compress.checkpoints.base import Checkpoint, LoadOptions
from compress.importers import aten
from compress.importers.finish import Source, checkpoint_of
from compress.importers.network import Read, read_trace
from compress.importers.proof import Original, random_images
from compress.importers.trace import Refused, Trace, Value
from rescompress.core.errors import CheckpointError

EXPORT = "export it to ONNX with torch.onnx.export, and give that file"


def from_module(
    module: nn.Module,
    example: Tensor,
    *,
    preprocess: str | None = None,
    images: Tensor | None = None,
    arch: str | None = None,
) -> Checkpoint:
    """Return a torch module as a checkpoint: the network that it computes, and its tensors.

    The module is traced with ``torch.export`` in evaluation mode and left as it was. What was read is compared with the module
    itself, on random numbers and on `images`.

    Args:
        module: The network.
        example: One batch of images (N, C, H, W), prepared as the network wants them.
        preprocess: What images go through, a text for `compress.preprocessing.Statement`.
        images: More prepared images to compare the outputs on.
        arch: What to call it; else the class of the module.

    Raises:
        CheckpointError: It cannot be traced, computes something that is no operation of a network here (which is named), or
            something else than what was read.
        BadInput: `preprocess` makes no sense.
    """
    if example.ndim != 4:
        raise CheckpointError(
            f"the example has shape {tuple(example.shape)}", remedy="give a batch of images: (N, channels, height, width)"
        )
    c, h, w = (int(n) for n in example.shape[1:])
    options = LoadOptions((c, h, w), preprocess, {"arch": arch} if arch else {})
    source = Source("module", None, type(module).__name__, input_stated=True)
    return read_module(module, options, source, batch=int(example.shape[0]), images=images)


def read_module(
    module: nn.Module, options: LoadOptions, source: Source, *, batch: int = 1, images: Tensor | None = None
) -> Checkpoint:
    """Return the checkpoint of a module.

    Args:
        module: The network.
        options: What the user states; `options.input_shape` is needed.
        source: Where the module comes from.
        batch: Images to trace with.
        images: Prepared images to compare the outputs on, beside random numbers.

    Raises:
        CheckpointError: As `from_module` says.
    """
    assert options.input_shape is not None
    with _in_evaluation(module), quiet():
        x_NCHW = random_images(options.input_shape, batch)
        check_runs(module, x_NCHW)
        program = _exported(module, x_NCHW)
        read = read_program(program, x_NCHW.shape, arch=options.arch.get("arch", source.arch))
        original = Original("the module itself", lambda x: run_module(module, x), lambda x: _observed(program, x, batch))
        return checkpoint_of(read, original, options, source, images=images)


def check_runs(module: nn.Module, x_NCHW: Tensor) -> None:
    """Run a module once.

    Raises:
        CheckpointError: It raises, or makes no tensors.
    """
    shape = "x".join(map(str, x_NCHW.shape[1:]))
    try:
        outputs = run_module(module, x_NCHW)
    except Exception as e:  # a stranger's module may raise anything
        raise CheckpointError(f"the network does not run on {shape}: {brief(e)}", remedy="state --input CxHxW") from e
    if not outputs:
        raise CheckpointError(f"the network makes no tensors of {shape}", remedy="return the outputs from forward")


def run_module(module: nn.Module, x_NCHW: Tensor) -> list[Tensor]:
    """Return the tensors that a module makes of images; one by one where it takes no batch of that size."""
    with torch.no_grad():
        try:
            return tensors_in(module(x_NCHW))
        except Exception:
            if len(x_NCHW) == 1:
                raise
            single = [tensors_in(module(x_NCHW[i : i + 1])) for i in range(len(x_NCHW))]
            return [torch.cat([out.reshape(1, -1) for out in outs]) for outs in zip(*single, strict=True)]


def tensors_in(outputs: Any) -> list[Tensor]:
    """Return the tensors among what a module returns, in order; empty where there are none."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def _in_evaluation(module: nn.Module) -> Iterator[None]:
    training = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for inner, mode in training:
            inner.training = mode


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what a stranger's code and torch's tracing print away from the results."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._dynamo", "torch.fx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def brief(e: BaseException) -> str:
    """Return an exception in one short line."""
    text = str(e).strip().splitlines()
    return f"{type(e).__name__}: {text[0][:200]}" if text else type(e).__name__


def _exported(module: nn.Module, x_NCHW: Tensor) -> Any:
    try:
        with torch.no_grad():
            return torch.export.export(module, (x_NCHW,), strict=False)
    except Exception as e:  # torch.export raises whatever its parts raise
        dependent = re.search(
            r"data-dependent|GuardOnDataDependent|control flow|_local_scalar_dense|is_nonzero|\.item\(\)", str(e)
        )
        what = "its control flow depends on the numbers it computes" if dependent else f"torch.export fails: {brief(e)}"
        raise CheckpointError(
            f"the network cannot be traced: {what}",
            remedy=f"let forward compute the same for every image, or {EXPORT}",
        ) from e


def read_program(program: Any, shape: Sequence[int], *, arch: str) -> Read:
    """Return the network of an exported program.

    Args:
        program: A ``torch.export.ExportedProgram``.
        shape: Of its images, with the batch.
        arch: What to call the network.

    Raises:
        CheckpointError: It computes something that is no operation of a network here.
    """
    try:
        return read_trace(*_traced(program, shape), arch=arch)
    except Refused as e:
        raise CheckpointError(f"the network computes something that is not known here: {e}", remedy=REMEDY) from e


REMEDY = "docs/bring-your-own.md lists the operations; take the part away, or state a trunk that ends before it"


def _traced(program: Any, shape: Sequence[int]) -> tuple[Trace, list[tuple[str, Value]]]:
    held = held_tensors(program)
    named = {spec.arg.name: str(spec.target) for spec in program.graph_signature.input_specs if spec.target is not None}
    learnt = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "PARAMETER"}
    trace = Trace(tuple(shape[1:]), shape[0])
    values: dict[str, Any] = {}
    found: list[Any] = []
    ends: list[str] = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node.name] = held[node.name] if node.name in named else trace.input()
            continue
        args = torch.fx.node.map_arg(node.args, lambda n: values[n.name])
        kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: values[n.name])
        if node.op == "output":
            found, ends = pytree.tree_leaves(args), [str(n) for n in pytree.tree_leaves(node.args)]
            continue
        if node.op == "get_attr":
            values[node.name] = _attribute(program.graph_module, str(node.target))
            continue
        parameters = [n.name for n in node.all_input_nodes if n.name in named]
        trace.name = _name(node, named[parameters[0]] if parameters else None)
        from_learnt = any(n.name in learnt for n in node.all_input_nodes)
        trace.source, trace.frozen = node.name, not from_learnt
        values[node.name] = _called(trace, node, args, dict(kwargs))
        if from_learnt and not aten.is_symbol(values[node.name]):
            learnt.add(node.name)
    tensors = [(name, v) for name, v in zip(ends, found, strict=True) if isinstance(v, Value)]
    if not tensors:
        raise Refused("its outputs do not depend on the images")
    names = _output_names(program, len(tensors))
    return trace, [(names[i] or name, value) for i, (name, value) in enumerate(tensors)]


def held_tensors(program: Any) -> dict[str, Tensor]:
    """Return parameters, buffers and constants of an exported program by the names of its inputs."""
    found = {}
    for spec in program.graph_signature.input_specs:
        if spec.target is not None:
            value = program.state_dict.get(spec.target, program.constants.get(spec.target))
            found[spec.arg.name] = value.detach() if isinstance(value, Tensor) else value
    return found


def _output_names(program: Any, count: int) -> list[str]:
    """Return what the module calls its outputs, where it returns a dictionary; numbers for several others."""
    spec = program.call_spec.out_spec
    keys = getattr(spec, "context", None)
    if isinstance(keys, list) and len(keys) == count and all(isinstance(k, str) for k in keys):
        return [str(k) for k in keys]
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]


def _called(trace: Trace, node: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if node.target is operator.getitem:
        return args[0][args[1]]
    if not aten.is_symbol(args) and not aten.is_symbol(tuple(kwargs.values())):
        return node.target(*args, **kwargs)
    name, _, overload = str(node.target).removeprefix("aten.").partition(".")
    try:
        return aten.call(trace, name, overload or None, args, kwargs)
    except Refused as e:
        around = ", ".join(str(n) for n in node.all_input_nodes[:3])
        where = f" in {_path(node)}" if _path(node) else ""
        raise Refused(f"{node.target}{where} (reads {around}, makes {node.name}): {e}") from e


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _path(node: Any) -> str:
    """Return the module inside which an operator is called: ``layer1.0.relu``."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).removeprefix("L['self'].").removeprefix("L['self']") if stack else ""


def _name(node: Any, parameter: str | None) -> str:
    if parameter is not None:
        return parameter.rpartition(".")[0] or parameter
    path = _path(node)
    operation = re.sub(r"_\d+$", "", str(node.name)).strip("_") or "step"
    if not path:
        return operation
    leaf = path.rpartition(".")[2]
    return (
        path if re.sub(r"\d+$", "", leaf) in (operation, "act", "drop", "pool", "maxpool", "avgpool") else f"{path}.{operation}"
    )


def _observed(program: Any, x_NCHW: Tensor, batch: int) -> Mapping[str, Tensor]:
    """Return every tensor of an exported program for one image."""
    seen: dict[str, Tensor] = {}

    class Keeping(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and value.ndim:  # a counter of batches has no images
                seen[n.name] = value[:1].clone()  # what follows may be done in its place
            return value

    inputs = [
        held_tensors(program).get(n.name, x_NCHW.expand(batch, -1, -1, -1))
        for n in program.graph.nodes
        if n.op == "placeholder"
    ]
    Keeping(program.graph_module).run(*inputs)
    return seen
