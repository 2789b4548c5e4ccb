"""Malformed ONNX files: every command ends with an answer or an error of ours, soon and in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import ROOT
from onnx import TensorProto, helper, numpy_helper
from onnx_mutants import mutants

from export.lint import TargetFacts, lint
from export.load import checked, load_onnx
from rescompress.core.errors import ModelFileError

JUDGE = r"""
import json, resource, signal, sys, traceback
from pathlib import Path

sys.path[:0] = sys.argv[3:]
import edge_targets.onnx_kernels, onnxruntime  # what is large is loaded before the limit
from edge_targets.catalog import load_target
from edge_targets.latency import predict_kernels
from export.lint import lint
from export.load import load_onnx
from export.passes import repair
from export.to_onnx import read_metadata
from onnx_mutants import mutants
from rescompress.core.errors import RescompressError
from rescompress.runs.evaluation import onnx_inputs
from rescompress.runs.file_check import facts_of

target = load_target("jetson")
facts = facts_of(target)
path = Path(sys.argv[2]) / "m.onnx"
first, count = map(int, sys.argv[1].split("+"))
repair(load_onnx(Path(sys.argv[2]) / "warm.onnx"), facts)
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)


def on_alarm(*_):
    raise TimeoutError("20 s are over")


signal.signal(signal.SIGALRM, on_alarm)
commands = {
    "lint": lambda: lint(load_onnx(path), facts),
    "fix": lambda: repair(load_onnx(path), facts),
    "predict": lambda: predict_kernels(edge_targets.onnx_kernels.kernels_of(path).kernels, target.device, precision="fp16"),
    "metadata": lambda: read_metadata(load_onnx(path, weights=False)),
    "evaluate": lambda: onnx_inputs(path),
}
for name, content in mutants(first + count)[first:]:
    path.write_bytes(content)
    print(json.dumps({"begun": name}), flush=True)
    ends = {}
    for command, call in commands.items():
        signal.alarm(20)
        try:
            call()
            ends[command] = "fine"
        except RescompressError as e:
            ends[command] = f"refused: {e}"
        except BaseException as e:
            ends[command] = f"CRASH {type(e).__name__}: {e}: {traceback.format_exc()[-600:]}"
        finally:
            signal.alarm(0)
    print(json.dumps({"name": name, **ends}), flush=True)
"""


def judge(folder: Path, first: int, count: int) -> list[dict[str, str]]:
    """Return how every command ended on these mutants, in a process that may take 1 GiB more than it has."""
    helper_folder = str(ROOT / "tests")
    onnx.save(_chain("Relu"), folder / "warm.onnx")
    done = subprocess.run(
        [sys.executable, "-c", JUDGE, f"{first}+{count}", str(folder), str(ROOT), helper_folder],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60 + 25 * count,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    ends = [line for line in lines if "name" in line]
    assert len(ends) == count, f"the process ended at {lines[-1:]} with {done.returncode}: {done.stderr[-1500:]}"
    return ends


def crashes(ends: list[dict[str, str]]) -> list[str]:
    return [f"{end['name']}: {k}: {v}" for end in ends for k, v in end.items() if v.startswith("CRASH")]


def test_a_sample_of_broken_files_ends_with_answers_or_errors_of_ours(tmp_path: Path) -> None:
    ends = judge(tmp_path, 0, 36)
    assert not crashes(ends), "\n".join(crashes(ends))
    assert sum(end["lint"].startswith("refused") for end in ends) > 12


@pytest.mark.slow
@pytest.mark.parametrize("part", range(6))
def test_broken_files_end_with_answers_or_errors_of_ours(tmp_path: Path, part: int) -> None:
    ends = judge(tmp_path, 36 + 120 * part, 120)
    assert not crashes(ends), "\n".join(crashes(ends))


FACTS = TargetFacts("a board", "tensorrt", 17, ("fp32", "fp16", "int8"), {"int8": 32})


def _chain(op: str, **attributes: object) -> onnx.ModelProto:
    """A convolution, one operator behind it, and a pooling."""
    weight = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["c"], name="conv"),
        helper.make_node(op, ["c"], ["r"], name="middle", **attributes),
        helper.make_node("GlobalAveragePool", ["r"], ["out"], name="pool"),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])
    graph = helper.make_graph(nodes, "g", [image], [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


WALKED = ["Relu", "Identity", "Flatten", "Cast", "Reshape", "Squeeze", "Transpose", "MaxPool", "QuantizeLinear",
          "DequantizeLinear", "BatchNormalization"]  # fmt: skip


@pytest.mark.parametrize("op", WALKED)
@pytest.mark.parametrize("length", [1, 2])
def test_a_cycle_through_any_operator_that_rules_walk_is_named(op: str, length: int) -> None:
    model = _chain("Relu")
    middle = model.graph.node[1]
    middle.op_type = op
    middle.input[0] = "r" if length == 1 else "out"
    if op in ("QuantizeLinear", "DequantizeLinear"):
        middle.input.append("w")
    if op == "BatchNormalization":
        middle.input.extend(["w"] * 4)
    expected = "middle -> middle" if length == 1 else "middle -> pool -> middle|pool -> middle -> pool"
    for use in (checked, lambda m: lint(m, FACTS)):
        with pytest.raises(ModelFileError, match=f"cycle: ({expected})"):
            use(model)


def test_nodes_out_of_order_are_sorted_as_runtimes_do() -> None:
    model = _chain("Relu")
    turned = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(turned)
    assert [n.name for n in checked(model).graph.node] == ["conv", "middle", "pool"]


@pytest.mark.parametrize(
    ("attribute", "value", "named"),
    [
        ("group", 0, "conv: group is 0"),
        ("group", "1", "group of Conv conv is of type string"),
        ("group", 2, "does not fit the data"),
        ("kernel_shape", [5, 5], "kernel is 5x5"),
        ("odd", 1, "an attribute odd"),
    ],
)
def test_attributes_that_no_convolution_has_are_named(attribute: str, value: object, named: str) -> None:
    model = _chain("Relu")
    model.graph.node[0].attribute.append(helper.make_attribute(attribute, value))
    with pytest.raises(ModelFileError, match=named):
        checked(model)


def test_stored_tensors_that_lie_about_their_size_are_named() -> None:
    model = _chain("Relu")
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
    with pytest.raises(ModelFileError, match="tensor 'w' is 4x3x3x3, 432 bytes, but holds 428"):
        checked(model)


def test_a_size_that_no_runtime_takes_is_named() -> None:
    model = _chain("Relu")
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_value = 10**6
    with pytest.raises(ModelFileError, match="1000000x1000000"):
        checked(model)


@pytest.mark.parametrize("version", [-1, 0, 2**31, 2**40, 2**63 - 1])
def test_versions_of_operators_that_cannot_be_are_named(version: int) -> None:
    model = _chain("Relu")
    model.opset_import[0].version = version
    with pytest.raises(ModelFileError, match=f"version {version} of the operators"):
        checked(model)


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(_chain("Relu").SerializeToString().replace(b"middle", b"m\xff\xfedle"))
    with pytest.raises(ModelFileError, match="no text"):
        load_onnx(tmp_path / "m.onnx")


def test_mutants_are_the_same_for_the_same_seed() -> None:
    assert mutants(12)[:8] == mutants(8)
