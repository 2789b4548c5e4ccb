"""``--code FILE:CALLABLE``: the user's own file builds the network, a checkpoint file beside it holds the weights.

This is the one place that runs a user's code, and only the file that they named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compress.checkpoints.base import Checkpoint, LoadOptions, Stored
from compress.checkpoints.files import Opened
from compress.checkpoints.layout import read_values
from compress.checkpoints.roots import _USELESS, AVERAGED, flatten, without_masks
from compress.importers.finish import Source
from compress.importers.module import brief, quiet, read_module, run_module
from compress.importers.proof import random_images
from rescompress.core.errors import CheckpointError, nearest
from rescompress.core.host import HostFile

COUNTER = ".num_batches_tracked"
_MODULE = "rescompress_user_code"
_SHOWN = 4


def load_with_code(path: Path, opened: Opened, code: str, options: LoadOptions) -> Checkpoint:
    """Return the network that a user's code builds, with the weights of a file.

    Args:
        path: Of the file.
        opened: The file.
        code: ``FILE:CALLABLE``.
        options: What the user states.

    Raises:
        CheckpointError: The code or its callable is missing, raises or makes no module, the weights do not fit it, or the
            network cannot be read.
    """
    module, prefix, notes = module_with(opened, code, options)
    shape, stated = options.input_shape, options.input_shape is not None
    if shape is None:
        with quiet():
            shape = _guessed(module)
    if prefix:
        notes.append(f"the network's keys stand behind {prefix!r}")
    notes.append(f"built by {code}")
    source = Source("code", path.name, type(module).__name__, opened.container, tuple(notes), input_stated=stated)
    made = read_module(module, dataclasses.replace(options, input_shape=shape), source)
    if (host := made.host) is None:
        return made
    files = (HostFile.of(path), HostFile.of(split(code)[0]))
    kept = {"code": code, **({"root": options.arch["root"]} if "root" in options.arch else {})}
    host = host.model_copy(update={"kind": "code", "files": files, "options": {**host.options, **kept}})
    return dataclasses.replace(made, provenance={**made.provenance, "host": host.model_dump(mode="json")})


def module_with(opened: Opened, code: str, options: LoadOptions) -> tuple[nn.Module, str, list[str]]:
    """Return the network that a user's code builds with the weights of a file, the prefix of its keys there, and notes.

    Args:
        opened: The file.
        code: ``FILE:CALLABLE``.
        options: What the user states.

    Raises:
        CheckpointError: As `load_with_code` says.
    """
    with quiet():
        module = build(code)
    tensors, notes = without_masks(flatten(opened))
    prefix, chosen, more = fitting(tensors, module.state_dict(), options.arch.get("root"))
    told = [*notes, more] if more else [*notes]
    values = read_values(chosen, told)
    state = {k: values.get(k, v) for k, v in module.state_dict().items()}
    module.load_state_dict({k: v.to(state[k].dtype) for k, v in state.items()}, strict=True)
    return module, prefix, told


def split(code: str) -> tuple[Path, str]:
    """Return file and callable of ``FILE:CALLABLE``; raises CheckpointError where there is no such file."""
    file, _, name = code.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise CheckpointError("no such file", where=f"--code {file}", remedy="name the Python file that builds the network")
    return path, name


def build(code: str) -> nn.Module:
    """Return the network that a callable makes; this runs the user's file.

    Raises:
        CheckpointError: Something in it raises, the callable is missing or needs arguments, or makes no module.
    """
    path, name = split(code)
    where = f"--code {code}"
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        raise CheckpointError("is no Python file", where=where, remedy="give a file that ends in .py")
    namespace = importlib.util.module_from_spec(spec)
    execute = spec.loader.exec_module
    with _importing(path, namespace):
        _run(lambda: execute(namespace), path, where)
        found = getattr(namespace, name, None)
        if found is None:
            known = [k for k, v in vars(namespace).items() if callable(v) and getattr(v, "__module__", "") == _MODULE]
            raise CheckpointError(f"has no '{name}'", where=where, remedy=nearest(name, known))
        if isinstance(found, nn.Module):
            return found
        if not callable(found):
            raise CheckpointError(f"'{name}' is a {type(found).__name__}, nothing that can be called", where=where)
        needed = _needed(found)
        if needed:
            raise CheckpointError(
                f"'{name}' needs arguments: {', '.join(needed)}",
                where=where,
                remedy=f"add a function without arguments to {path.name}, such as: def make(): return {name}({needed[0]}=...)",
            )
        module = _run(found, path, where)
    if not isinstance(module, nn.Module):
        raise CheckpointError(f"'{name}' returns a {type(module).__name__}, no torch.nn.Module", where=where)
    return module


def _needed(function: Any) -> list[str]:
    """Return the parameters without a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in variadic]


def _run(function: Any, path: Path, where: str) -> Any:
    try:
        return function()
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # SystemExit among them: a script that ends itself
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if Path(f.filename).name == path.name]
        at = f" (line {lines[-1]})" if lines else ""
        guard = "; guard what is to run as a script with if __name__ == '__main__'" if isinstance(e, SystemExit) else ""
        raise CheckpointError(f"the code raises {brief(e)}{at}", where=where, remedy=f"run it in Python first{guard}") from e


@contextlib.contextmanager
def _importing(path: Path, namespace: Any) -> Iterator[None]:
    """Let the file import what lies beside it, and be found by what looks its classes up."""
    folder = str(path.parent.resolve())
    sys.path.insert(0, folder)
    sys.modules[_MODULE] = namespace
    try:
        yield
    finally:
        sys.path.remove(folder)


def fitting(
    tensors: Mapping[str, Stored], wanted: Mapping[str, Tensor], root: str | None = None
) -> tuple[str, dict[str, Stored], str | None]:
    """Return the part of a file that is the state of a module: its prefix, its tensors, and what else would have been.

    Args:
        tensors: Of the file, by dotted keys.
        wanted: The module's state.
        root: The prefix that the user states.

    Raises:
        CheckpointError: No part has exactly the module's names and shapes; what is missing, too much or different is named.
    """
    names = [k for k in wanted if not k.endswith(COUNTER)]
    if not names:
        raise CheckpointError("the network of --code has no parameters", remedy="return the network that was trained")
    ends = {k for k in names[:1]} | {k for k in names if k.count(".") == min(n.count(".") for n in names)}
    prefixes = {key[: -len(end)] for key in tensors for end in ends if key == end or key.endswith(f".{end}")}
    if root is not None:
        prefixes = {p for p in prefixes | {f"{root.rstrip('.')}."} if p.rstrip(".") == root.rstrip(".")}
    ranked = sorted(prefixes, key=lambda p: (bool(AVERAGED.search(p)), p.count("."), len(p), p))
    troubles = {prefix: _troubles(tensors, wanted, prefix) for prefix in ranked}
    good = [prefix for prefix in ranked if not any(troubles[prefix])]
    if not good:
        raise _misfit(tensors, wanted, troubles)
    best = good[0]
    others = [p.rstrip(".") or "(top)" for p in good[1:]]
    told = f"other places fit, too: {', '.join(others)} (else: --arch-option root=PREFIX)" if others else None
    return best, {k: tensors[best + k] for k in wanted if best + k in tensors}, told


Troubles = tuple[list[str], list[str], list[str]]


def _troubles(tensors: Mapping[str, Stored], wanted: Mapping[str, Tensor], prefix: str) -> Troubles:
    """Return what is missing, too much, and of another shape behind a prefix."""
    missing = [k for k in wanted if prefix + k not in tensors and not k.endswith(COUNTER)]
    inside = [k[len(prefix) :] for k in tensors if k.startswith(prefix)]
    extra = [k for k in inside if k not in wanted and not (prefix == "" and _USELESS.search(k)) and not k.endswith(COUNTER)]
    other = [
        f"{k} {tuple(tensors[prefix + k].shape)} where the code has {tuple(v.shape)}"
        for k, v in wanted.items()
        if prefix + k in tensors and tuple(tensors[prefix + k].shape) not in (tuple(v.shape), (1,) if v.ndim == 0 else None)
    ]
    return missing, extra, other


def _misfit(tensors: Mapping[str, Stored], wanted: Mapping[str, Tensor], troubles: Mapping[str, Troubles]) -> CheckpointError:
    remedy = "give the code that this file was trained with"
    if not troubles:
        first = next(iter(wanted))
        return CheckpointError(
            f"does not fit the code: it holds no {first!r} (it holds {', '.join(list(tensors)[:_SHOWN])})", remedy=remedy
        )
    prefix, (missing, extra, other) = min(troubles.items(), key=lambda t: sum(map(len, t[1])))
    behind = f" behind {prefix!r}" if prefix else ""
    parts = [
        f"{len(found)} {word} ({', '.join(found[:_SHOWN])})"
        for found, word in ((missing, "missing"), (extra, "too many"), (other, "of another shape"))
        if found
    ]
    return CheckpointError(f"does not fit the code{behind}: {'; '.join(parts)}", remedy=remedy)


def _guessed(module: nn.Module) -> tuple[int, int, int]:
    """Return an input that a network takes, as its first convolution suggests.

    Raises:
        CheckpointError: None of the usual sizes runs.
    """
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise CheckpointError("the network of --code has no convolution", remedy="state --input CxHxW")
    small = max(first.kernel_size) <= 3 and max(first.stride) == 1
    tried = []
    error: Exception | None = None
    module.eval()
    for side in (32, 224, 64, 28) if small else (224, 32, 64, 28):
        shape = (first.in_channels, side, side)
        tried.append("x".join(map(str, shape)))
        try:
            run_module(module, random_images(shape, 1))
        except Exception as e:  # a stranger's module may raise anything
            error = error or e
            continue
        return shape
    assert error is not None
    raise CheckpointError(f"the network does not run on {', '.join(tried)}: {brief(error)}", remedy="state --input CxHxW")
