"""Interprets the program of a TorchScript archive: its source has the grammar of Python, is parsed, and is never executed."""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.checkpoints.files import read_member
from compress.checkpoints.pickles import Record
from compress.checkpoints.programs import Operators, Unknown, in_float

MAX_SOURCE_BYTES = 20_000_000
MAX_DEPTH = 60
MAX_STATEMENTS = 200_000


class Script:
    """The program of an archive; calling it runs the top module's ``forward``."""

    def __init__(self, path: Path, members: Mapping[str, zipfile.ZipInfo], root: str, top: object, constants: object) -> None:
        """Take an archive that has been opened.

        Args:
            path: Of the archive.
            members: Its members by name.
            root: The folder in it.
            top: The top module.
            constants: What ``CONSTANTS.c0`` and so on stand for, in order.
        """
        self._path, self._members, self._root = path, members, root
        self._top, self._constants = top, constants
        self._files: dict[str, dict[str, ast.stmt]] = {}
        self._operators = Operators()
        self._statements = 0
        self._names = {id(value): name for name, value in _tensors(top)}

    def __call__(self, x_NCHW: Any, run: Operators | None = None) -> Any:
        """Return what the archive computes; raises Unknown when something in it is not known here.

        Args:
            x_NCHW: The images.
            run: What runs its operators.
        """
        if not isinstance(self._top, Record):
            raise Unknown("has no module")
        self._operators, self._statements = run or Operators(), 0
        return self._method(self._top, "forward", [x_NCHW], {}, 0)

    def _definitions(self, module: str) -> dict[str, ast.stmt]:
        if module not in self._files:
            name = f"{self._root}code/{module.replace('.', '/')}.py"
            if name not in self._members:
                raise Unknown(f"calls {module[:100]}, which is not there")
            text = read_member(self._path, self._members[name], MAX_SOURCE_BYTES)
            try:
                body = ast.parse(text).body
            except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
                raise Unknown("cannot be parsed") from e
            self._files[module] = {d.name: d for d in body if isinstance(d, ast.ClassDef | ast.FunctionDef)}
        return self._files[module]

    def _class(self, record: Record) -> ast.ClassDef:
        module, _, name = record.path.rpartition(".")
        found = self._definitions(module).get(name)
        if not isinstance(found, ast.ClassDef):
            raise Unknown(f"holds a {record.path[:100]}, which is not there")
        return found

    def _method(self, record: Record, name: str, args: list[Any], kwargs: dict[str, Any], depth: int) -> Any:
        for part in self._class(record).body:
            if isinstance(part, ast.FunctionDef) and part.name == name:
                return self._function(part, [record, *args], kwargs, depth)
        raise Unknown(f"calls {name[:100]}, which is not there")

    def _attribute(self, record: Record, name: str) -> Any:
        if name in record.state:
            value = record.state[name]
            if hasattr(value, "read") and hasattr(value, "shape"):
                tensor = in_float(value.read())
                self._operators.name_constant(tensor, self._names.get(id(value), name))
                return tensor
            return value
        for part in self._class(record).body:
            named = isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and part.target.id == name
            if named and isinstance(part, ast.AnnAssign) and part.value is not None:
                return ast.literal_eval(part.value)
        raise Unknown(f"reads {name[:100]}, which is not there")

    def _function(self, function: ast.FunctionDef, args: list[Any], kwargs: dict[str, Any], depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise Unknown("is nested beyond measure")
        names = [a.arg for a in function.args.args]
        defaults = function.args.defaults
        scope: dict[str, Any] = {
            name: self._value(default, {}, depth)
            for name, default in zip(names[len(names) - len(defaults) :], defaults, strict=True)
        }
        scope |= dict(zip(names, args, strict=False)) | kwargs
        done, value = self._body(function.body, scope, depth + 1)
        return value if done else None

    def _body(self, body: list[ast.stmt], scope: dict[str, Any], depth: int) -> tuple[bool, Any]:
        """Run statements; return whether they returned, and what."""
        for statement in body:
            self._statements += 1
            if self._statements > MAX_STATEMENTS:
                raise Unknown("is too long")
            match statement:
                case ast.Return(value=value):
                    return True, None if value is None else self._value(value, scope, depth)
                case ast.Assign(targets=[target], value=value):
                    self._assign(target, self._value(value, scope, depth), scope)
                case ast.If(test=test, body=then, orelse=other):
                    done, result = self._body(then if self._value(test, scope, depth) else other, scope, depth)
                    if done:
                        return True, result
                case ast.For(target=target, iter=items, body=inner):
                    for item in self._value(items, scope, depth):
                        self._assign(target, item, scope)
                        done, result = self._body(inner, scope, depth)
                        if done:
                            return True, result
                case ast.Expr(value=value):
                    self._value(value, scope, depth)
                case ast.Pass():
                    pass
                case _:
                    raise Unknown(f"holds a {type(statement).__name__}")
        return False, None

    def _assign(self, target: ast.expr, value: Any, scope: dict[str, Any]) -> None:
        if isinstance(target, ast.Name):
            scope[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List) and isinstance(value, tuple | list) and len(target.elts) == len(value):
            for part, item in zip(target.elts, value, strict=True):
                self._assign(part, item, scope)
        else:
            raise Unknown("assigns to something else than names")

    def _value(self, node: ast.expr, scope: dict[str, Any], depth: int) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name) if name in scope:
                return scope[name]
            case ast.List(elts=parts):
                return [self._value(p, scope, depth) for p in parts]
            case ast.Tuple(elts=parts):
                return tuple(self._value(p, scope, depth) for p in parts)
            case ast.Dict(keys=keys, values=values):
                pairs = [(k, v) for k, v in zip(keys, values, strict=True) if k is not None]
                return {self._value(k, scope, depth): self._value(v, scope, depth) for k, v in pairs}
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -self._value(inner, scope, depth)
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                return not self._value(inner, scope, depth)
            case ast.IfExp(test=test, body=then, orelse=other):
                return self._value(then if self._value(test, scope, depth) else other, scope, depth)
            case ast.Subscript(value=value, slice=index):
                values, at = self._value(value, scope, depth), self._value(index, scope, depth)
                if isinstance(values, list | tuple) and isinstance(at, int):
                    return values[at]
                raise Unknown("takes a part of something else than a list")
            case ast.Attribute(value=ast.Name(id="CONSTANTS"), attr=name):
                return self._constant(name)
            case ast.Attribute(value=value, attr=name):
                dotted = _dotted(node)
                if dotted is not None and dotted.startswith("__torch__."):
                    return _Reference(dotted)
                record = self._value(value, scope, depth)
                if isinstance(record, Record):
                    return self._attribute(record, name)
                raise Unknown(f"reads {name[:100]} of something else than a module")
            case ast.Call(func=function, args=args, keywords=keywords):
                return self._call(function, args, keywords, scope, depth)
            case _:
                raise Unknown(f"holds a {type(node).__name__}")

    def _constant(self, name: str) -> Any:
        values = self._constants
        if isinstance(values, list | tuple) and name.startswith("c") and name[1:].isdecimal() and int(name[1:]) < len(values):
            value = values[int(name[1:])]
            return in_float(value.read()) if hasattr(value, "read") and hasattr(value, "shape") else value
        raise Unknown("reads a constant that is not there")

    def _call(
        self, function: ast.expr, args: list[ast.expr], keywords: list[ast.keyword], scope: dict[str, Any], depth: int
    ) -> Any:
        dotted = _dotted(function)
        if dotted in ("annotate", "unchecked_cast"):
            return self._value(args[1], scope, depth)
        if dotted == "uninitialized":
            return None
        values = [self._value(a, scope, depth) for a in args if not (dotted == "isinstance" and a is args[1])]
        named = {k.arg: self._value(k.value, scope, depth) for k in keywords if k.arg is not None}
        if isinstance(function, ast.Name) and function.id not in scope:
            return _builtin(function.id, values, self)
        if dotted is not None and dotted.startswith(("torch.", "ops.aten.", "ops.prim.")):
            head, _, name = dotted.rpartition(".")
            if name == "RaiseException" or head not in ("torch", "ops.aten", "ops.prim"):
                raise Unknown(f"uses {dotted[:100]}")
            return self._operators.call(name, None, values, named)
        if dotted is not None and dotted.startswith("__torch__."):
            return self._refer(_Reference(dotted), values, named, depth)
        if isinstance(function, ast.Attribute):
            record = self._value(function.value, scope, depth)
            if isinstance(record, Record):
                return self._method(record, function.attr, values, named, depth)
            raise Unknown(f"calls {function.attr[:100]} of something else than a module")
        return self._refer(self._value(function, scope, depth), values, named, depth)

    def _refer(self, reference: object, values: list[Any], named: dict[str, Any], depth: int) -> Any:
        if isinstance(reference, _Reference):
            module, _, name = reference.path.rpartition(".")
            found = self._definitions(module).get(name)
            if isinstance(found, ast.FunctionDef):
                return self._function(found, values, named, depth)
        raise Unknown("calls something else than a function")

    def attribute(self, values: list[Any]) -> Any:
        """Return ``getattr(module, name)``."""
        if len(values) == 2 and isinstance(values[0], Record) and isinstance(values[1], str):
            return self._attribute(values[0], values[1])
        raise Unknown("reads an attribute of something else than a module")


def _tensors(top: object) -> Iterator[tuple[str, object]]:
    """Yield the stored tensors of a module by their dotted names."""
    todo = [("", top, 0)]
    while todo:
        prefix, node, depth = todo.pop()
        if not isinstance(node, Record) or depth > MAX_DEPTH:
            continue
        for name, value in node.state.items():
            key = f"{prefix}.{name}" if prefix else str(name)
            if hasattr(value, "read") and hasattr(value, "shape"):
                yield key, value
            else:
                todo.append((key, value, depth + 1))


class _Reference:
    """A function of the archive."""

    def __init__(self, path: str) -> None:
        self.path = path


def _dotted(node: ast.expr) -> str | None:
    """Return ``a.b.c`` for such an expression, or None."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def _builtin(name: str, values: list[Any], script: Script) -> Any:
    match name:
        case "getattr":
            return script.attribute(values)
        case "bool" | "int" | "float" | "str":
            return {"bool": bool, "int": int, "float": float, "str": str}[name](values[0])
        case "range" if all(isinstance(v, int) and abs(v) <= MAX_STATEMENTS for v in values):
            return range(*values)
        case _:
            raise Unknown(f"uses {name[:100]}")
