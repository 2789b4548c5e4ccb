"""Every name of TensorRT that the adapter uses exists: in the published type stubs, in TensorRT 11, in TensorRT for RTX.

A name that a version lacks may be used where the code asks for it first (``hasattr``, ``getattr`` or ``named``, which holds
such an answer).
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import edge_targets
from edge_targets.device import PRECISIONS
from edge_targets.tensorrt_versions import capabilities
from edge_targets.trt_build import recipe_for

FOLDER = Path(edge_targets.__file__).parent
MODULE = ""
COMMON = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "tensor": "ITensor",
    "cache": "ITimingCache",
}
RUN = {"engine": "ICudaEngine", "context": "IExecutionContext", "runtime": "Runtime", "_runtime": "Runtime"}
FILES: Mapping[str, Mapping[str, str]] = {
    # What the variables of each file are, by class of TensorRT.
    "trt_build.py": {**COMMON, "profile": "IOptimizationProfile"},
    "trt_builder.py": {**COMMON, **RUN, "profile": "IOptimizationProfile", "inspector": "EngineInspector"},
    "infer.py": RUN,
    "backends/tensorrt.py": {},
}
RTX_ONLY = {
    ("", "ComputeCapability"),
    ("IBuilderConfig", "num_compute_capabilities"),
    ("IBuilderConfig", "set_compute_capability"),
}
"""Used behind `compute_capability`, which only `edge_targets.backends.tensorrt_rtx` gives."""

GONE_IN_11 = {
    # None of these texts is in tensorrt.so of tensorrt_cu13_bindings 11.4.0.106 (PyPI), where every bound name is; that they
    # were to go is in NVIDIA's guides: weak typing and calibration from 10.x to 11.x, numbered bindings from 8.x to 10.x.
    *("FP16", "EXPLICIT_BATCH", "PREFER_PRECISION_CONSTRAINTS", "STRICT_TYPES", "precision"),
    *("int8_calibrator", "set_calibration_profile", "set_dynamic_range", "dynamic_range"),
    *("platform_has_fast_fp16", "platform_has_fast_int8", "execute_async_v2", "max_workspace_size", "num_bindings"),
    *("get_binding_name", "get_binding_index", "get_binding_shape", "get_binding_dtype", "binding_is_input"),
    *("set_binding_shape", "get_profile_shape"),
}
BINDINGS = os.environ.get("TENSORRT11_BINDINGS", "")
"""A wheel of tensorrt_cu13_bindings 11, where one is at hand: the list above is then held against it."""

Use = tuple[str, str, bool, int]


def uses(source: str, variables: Mapping[str, str]) -> Iterator[Use]:
    """Yield (class, name, whether it is asked for first, line) for every name of TensorRT in a file."""

    def owner(node: ast.expr) -> str | None:
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None
        if name in ("trt", "tensorrt"):
            return MODULE
        if isinstance(node, ast.Attribute) and owner(node.value) == MODULE:
            return node.attr
        return variables.get(name) if name else None

    def asks(test: ast.expr) -> bool:
        return any(
            (isinstance(n, ast.Name) and n.id in ("hasattr", "getattr")) or (isinstance(n, ast.Attribute) and n.attr == "named")
            for n in ast.walk(test)
        )

    def walk(node: ast.AST, guarded: bool) -> Iterator[Use]:
        if isinstance(node, ast.Attribute) and node.attr != "append":  # lists, whatever their name
            found = owner(node.value)
            if found is not None:
                yield found, node.attr, guarded, node.lineno
        guarded = guarded or (isinstance(node, ast.If | ast.IfExp) and asks(node.test))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, guarded)
            if isinstance(child, ast.If) and asks(child.test) and isinstance(child.body[-1], ast.Return | ast.Raise):
                guarded = True

    yield from walk(ast.parse(source), False)


@cache
def stubs() -> dict[str, set[str]]:
    """Return the names of every class of the published stubs; those of the module under an empty name."""
    try:
        folder = importlib.metadata.distribution("tensorrt-stubs")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tensorrt-stubs is not installed: pip install --no-deps tensorrt-stubs (it asks for all of TensorRT)")
    text = Path(str(folder.locate_file("tensorrt_bindings/tensorrt.pyi"))).read_text(encoding="utf-8")
    top = Path(str(folder.locate_file("tensorrt_bindings/__init__.pyi"))).read_text(encoding="utf-8")
    listed = next(n.value for n in ast.parse(top).body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
    found: dict[str, set[str]] = {MODULE: {*ast.literal_eval(listed), "__version__", "__name__"}}
    for head in re.split(r"^(?=class )", text, flags=re.MULTILINE)[1:]:  # 10.13.0.35.1 does not parse: one def is invalid
        name, bases = re.match(r"class (\w+)(?:\((.*)\))?:", head).groups()  # type: ignore[union-attr]
        names = {"__init__", *re.findall(r"^    (?:def |class )?(\w+)(?=[(:]| ?=|: )", head, re.MULTILINE)}
        found[name] = names.union(*(found.get(b.strip(), set()) for b in (bases or "").split(",") if b))
    return found


def missing(source: str, variables: Mapping[str, str], known: Mapping[str, set[str]]) -> list[Use]:
    """Return the names that are used without being asked for, and are not there."""
    found = [u for u in uses(source, variables) if not u[2] and (u[0], u[1]) not in RTX_ONLY]
    return [u for u in found if u[0] in known and u[1] not in known[u[0]]]


def source_of(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FILES)
def test_every_name_is_in_the_published_stubs_or_asked_for_first(name: str) -> None:
    assert missing(source_of(name), FILES[name], stubs()) == []
    assert list(uses(source_of(name), FILES[name])), "nothing was looked at"


@pytest.mark.parametrize("name", FILES)
def test_no_name_is_gone_in_tensorrt_11_unless_it_is_asked_for_first(name: str) -> None:
    found = [u for u in uses(source_of(name), FILES[name]) if not u[2] and u[1] in GONE_IN_11]
    assert found == []


@pytest.mark.parametrize("version", ["8.2.1", "8.5.2", "10.3.0", "10.13.3", "11.4.1"])
def test_the_flags_of_a_recipe_exist_in_its_version(version: str) -> None:
    known = capabilities(version)
    for precision in PRECISIONS:
        flags = set(recipe_for(known, precision, sparsity=True).builder_flags)
        if known.version >= (11, 0):
            assert not flags & {"FP16", "INT8", *GONE_IN_11}
        elif known.version >= (10, 0):
            assert flags <= stubs()["BuilderFlag"]


@pytest.mark.parametrize(
    ("line", "caught"),
    [
        ("config.int8_calibrator = None", {"gone"}),
        ("config.max_workspace_size = 1", {"gone", "stubs"}),
        ("context.execute_async_v2([], 0)", {"gone", "stubs"}),
        ("trt.BuilderFlag.FP16", {"gone"}),
        ("trt.DoesNotExist", {"stubs"}),
        ("if hasattr(config, 'x'):\n    config.max_workspace_size = 1", set()),
        ("engine.num_io_tensors", set()),
    ],
)
def test_a_name_that_was_removed_is_found(line: str, caught: set[str]) -> None:
    given = FILES["trt_builder.py"]
    found = {"gone"} if any(not u[2] and u[1] in GONE_IN_11 for u in uses(line, given)) else set()
    assert found == caught - {"stubs"}
    assert bool(missing(line, given, stubs())) == ("stubs" in caught)


def test_the_list_of_removed_names_is_that_of_the_bindings() -> None:
    if not Path(BINDINGS).is_file():
        pytest.skip("no wheel of tensorrt_cu13_bindings 11 is here ($TENSORRT11_BINDINGS names one)")
    with zipfile.ZipFile(BINDINGS) as wheel:
        content = wheel.read("tensorrt_bindings/tensorrt.so")
        top = wheel.read("tensorrt_bindings/__init__.py").decode()
    kept = {name for name in GONE_IN_11 if name.encode() + b"\0" in content}
    assert kept == set()
    for file, variables in FILES.items():
        for of, name, guarded, line in uses(source_of(file), variables):
            there = name.encode() + b"\0" in content or name in top or name.startswith("__")
            assert there or guarded or (of, name) in RTX_ONLY, (file, line, of, name)


@pytest.mark.slow
def test_tensorrt_for_rtx_has_every_name_of_the_building_half() -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    known = {name: set(dir(getattr(rtx, name))) for name in dir(rtx)} | {MODULE: set(dir(rtx))}
    used = [u for u in uses(source_of("trt_build.py"), FILES["trt_build.py"]) if not u[2]]
    assert [u for u in used if u[0] in known and u[1] not in known[u[0]]] == []


@pytest.mark.slow
def test_tensorrt_for_rtx_is_1_7() -> None:
    pytest.importorskip("tensorrt_rtx")
    version = importlib.metadata.version("tensorrt-rtx")
    if not version.startswith("1.7."):
        pytest.skip(f"TensorRT for RTX {version} is here; the formats were read from 1.7")
