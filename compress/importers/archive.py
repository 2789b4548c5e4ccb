"""``torch.export`` and TorchScript archives: their own graph, interpreted on symbols, nothing of them executed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.checkpoints.base import Checkpoint, LoadOptions
from compress.checkpoints.files import Opened
from compress.checkpoints.programs import SCALAR, Operators, Unknown
from compress.importers import aten
from compress.importers.finish import Source, checkpoint_of
from compress.importers.network import read_trace
from compress.importers.proof import Original
from compress.importers.trace import Refused, Trace, Value
from rescompress.core.errors import CheckpointError

_LISTS = frozenset(("__is__", "__isnot__", "len", "__getitem__", "append", "list", "__not__"))


class Tracing(Operators):
    """Runs operators on tensors, and gives those that depend on the images to a trace."""

    def __init__(self, trace: Trace) -> None:
        """Start with nothing run.

        Args:
            trace: Takes the steps.
        """
        super().__init__()
        self.trace = trace
        self._constants: dict[int, tuple[Tensor, str]] = {}

    def name_constant(self, value: Tensor, name: str) -> None:
        """Take note of what a parameter is called."""
        self._constants[id(value)] = (value, name)

    def call(self, name: str, overload: str | None, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Return what an operator makes of its arguments.

        Raises:
            Unknown: It is not known here.
        """
        values = [*args, *kwargs.values()]
        if not any(map(aten.is_symbol, values)):
            return super().call(name, overload, args, kwargs)
        if name in _LISTS:
            return SCALAR[name](*args, **kwargs)
        if name in ("sym_size", "size", "dim"):
            shape = list(args[0].shape)
            return len(shape) if name == "dim" else shape if len(args) < 2 else shape[int(args[1])]
        named = [self._constants[id(v)][1] for v in values if id(v) in self._constants]
        self.trace.name = (
            named[0].rpartition(".")[0]
            if named and "." in named[0]
            else re.sub(r"_+(\d*)$", r"_\1", self.about or name).rstrip("_")
        )
        self.trace.source = self.about or None
        try:
            return aten.call(self.trace, name, overload, args, kwargs)
        except Refused as e:
            where = f" (makes {self.about})" if self.about else ""
            near = f" near {self.trace.steps[-1].name}" if not where else ""
            raise Refused(f"aten.{name}{where}{near}: {e}") from e


def load_archive(path: Path, opened: Opened, options: LoadOptions) -> Checkpoint:
    """Return the network of an archive's graph, proven by torch's operators one by one.

    Args:
        path: Of the file.
        opened: The file; it has a program.
        options: What the user states.

    Raises:
        CheckpointError: The graph holds something that is not known here (which is named), or computes something else.
    """
    program = opened.program
    assert program is not None
    shape, batch, stated = _shape(program, opened, options)
    trace = Trace(shape, batch)
    try:
        found = program(trace.input(), Tracing(trace))
        outputs = [(_label(key, i), v) for i, (key, v) in enumerate(_leaves(found)) if isinstance(v, Value)]
        if not outputs:
            raise Refused("its outputs do not depend on the images")
        if len(outputs) == 1:
            outputs = [("output", outputs[0][1])]
        read = read_trace(trace, outputs, arch=options.arch.get("arch", path.stem))
    except (Refused, Unknown) as e:
        raise CheckpointError(
            f"its graph computes something that is not known here: {e}",
            remedy="give an ONNX file of it, or the code with --code FILE:CALLABLE",
        ) from e
    original = Original("the archive's own graph, operator by operator", lambda x: _run(program, x, batch))
    source = Source(opened.container, path.name, path.stem, opened.container, opened.notes, input_stated=stated)
    return checkpoint_of(read, original, options, source)


def _label(key: str, i: int) -> str:
    return key or f"output_{i}"


def _leaves(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(str(k), v) for k, inner in value.items() for _, v in _leaves(inner)]
    if isinstance(value, list | tuple):
        return [leaf for inner in value for leaf in _leaves(inner)]
    return [("", value)]


def _run(program: Callable[..., Any], x_NCHW: Tensor, batch: int) -> list[Tensor]:
    """Return the outputs for images, as many at once as the graph was made for."""
    found: list[list[Tensor]] = []
    for i in range(0, len(x_NCHW), batch):
        part = x_NCHW[i : i + batch]
        padded = torch.cat([part, part[:1].expand(batch - len(part), *part.shape[1:])]) if len(part) < batch else part
        with torch.no_grad():
            outputs = [v for _, v in _leaves(program(padded.clone())) if isinstance(v, Tensor)]
        found.append([v.reshape(batch, -1) for v in outputs])
    return [torch.cat(parts)[: len(x_NCHW)] for parts in zip(*found, strict=True)]


def _shape(program: Any, opened: Opened, options: LoadOptions) -> tuple[tuple[int, int, int], int, bool]:
    """Return channels, height and width of the images, how many at once, and whether somebody states it."""
    own: Sequence[int | None] | None = None
    if hasattr(program, "input_shape"):
        try:
            own = program.input_shape()
        except (KeyError, TypeError, ValueError, AttributeError, Unknown) as e:
            raise CheckpointError("damaged: its graph describes no input", remedy="export the network again") from e
    batch = (own[0] if own else 1) or 1
    if own is not None and len(own) == 4 and all(own[1:]):
        c, h, w = (int(n or 0) for n in own[1:])
        if options.input_shape not in (None, (c, h, w)):
            raise CheckpointError(f"its graph is made for {c}x{h}x{w}", remedy="leave --input out, or export it for that size")
        return (c, h, w), batch, True
    if options.input_shape is not None:
        return options.input_shape, batch, True
    from compress.checkpoints.roots import flatten

    first = next((t.shape for t in flatten(opened).values() if len(t.shape) == 4), None)
    if first is None:
        raise CheckpointError("holds no convolution", remedy="state --input CxHxW")
    side = 32 if first[2] <= 3 else 224
    return (first[1], side, side), batch, False
