"""Every lint rule about TensorRT against a real one: tensorrt_rtx builds the trap of each rule, without a GPU."""

from __future__ import annotations

import copy

import pytest
from test_lint_rules import (
    TRAPS,
    Case,
    File,
    called_like_a_standard_operator,
    fp8,
    per_channel_activation,
    uint8_input_moved_first,
)

from edge_targets.backends import tensorrt_rtx
from edge_targets.trt_build import build_engine
from rescompress.core.errors import EnvironmentFailed, ModelFileError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not tensorrt_rtx.available(), reason="tensorrt_rtx is not installed"),
]

JUDGED = {
    "uint8-activations": "refused",
    "nonzero-zero-point": "refused",
    "scale-not-scalar": "float",
    "int32-bias": "refused",
    "qoperator-format": "refused",
    "custom-operators": "refused",
    "quantizer-types": "refused",
    "input-type": "refused",
    "training-mode": "refused",
    "unsupported-operators": "refused",
    "weight-axis": "float",
}
"""What tensorrt_rtx 1.7.1 makes of the trap of a rule at error level: docs/lint.md has the same table."""

OTHERS: dict[str, tuple[Case, str]] = {
    "a scale per channel of an activation": ((File(), per_channel_activation, TRAPS["scale-not-scalar"][0][2]), "float"),
    "uint8 input into Transpose": ((File(), uint8_input_moved_first, TRAPS["input-type"][0][2]), "refused"),
    "a standard name of another domain": (
        (File(), called_like_a_standard_operator, TRAPS["input-type"][0][2]),
        "int8",
    ),
    "FP8 below 8.9": ((File(opset=21), fp8, TRAPS["input-type"][0][2]), "refused"),
}


def judged(case: Case) -> str:
    """Return ``refused``, ``float`` where a convolution does not run in INT8, or ``int8``."""
    import tensorrt_rtx as trt

    file, change, _ = copy.deepcopy(case)
    change(file)
    model = file.model()
    try:
        built = build_engine(trt, model.SerializeToString(), compute_capability="8.6")
    except (ModelFileError, EnvironmentFailed):
        return "refused"
    types = built.compute_types([n.name for n in model.graph.node if n.op_type == "Conv"])
    return "int8" if set(types.values()) <= {"Int8", None} else "float"


def test_the_file_without_a_trap_runs_in_int8() -> None:
    assert judged((File(), lambda file: None, TRAPS["input-type"][0][2])) == "int8"


@pytest.mark.parametrize("rule", JUDGED)
def test_tensorrt_refuses_the_trap_or_runs_it_in_float(rule: str) -> None:
    assert judged(TRAPS[rule][0]) == JUDGED[rule]


@pytest.mark.parametrize("what", OTHERS)
def test_tensorrt_agrees_about_the_other_faces_of_a_trap(what: str) -> None:
    case, expected = OTHERS[what]
    assert judged(case) == expected


@pytest.mark.parametrize("rule", ["input-type", "unsupported-operators", "training-mode", "scale-not-scalar", "weight-axis"])
def test_tensorrt_takes_the_near_miss(rule: str) -> None:
    assert judged(TRAPS[rule][1]) != "refused"
