"""Layer information of TensorRT 8 to 11 against the file: what every convolution became."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from edge_targets.engine_proof import broken, built_layers, on_dla, precision_of, prove

LOGS = Path(__file__).parents[2] / "shared" / "reference" / "trtexec_logs"
EIGHT = "Thirty-two wide channel vectorized row major Int8 format"


def conv(name: str, kind: str = "CaskConvolution", *, weights: str = "Int8", **tensors: Any) -> dict[str, Any]:
    return {"Name": name, "LayerType": kind, "Weights": {"Type": weights, "Count": 9}, **tensors}


def tensor(text: str, key: str = "Format/Datatype") -> dict[str, Any]:
    return {"Name": "x", "Location": "Device", "Dimensions": [1, 8, 8, 8], key: text}


FORMS = {
    "8.5": {
        "Layers": [
            {"Name": "QuantizeLinear_2", "LayerType": "Reformat", "Inputs": [tensor("Row major linear FP32")]},
            conv("conv1.weight + QuantizeLinear_7 + Conv_9 + Relu_11", Inputs=[tensor(EIGHT)], Outputs=[tensor(EIGHT)]),
            {"Name": "Reformatting CopyNode for Input Tensor 0 to Conv_22", "LayerType": "NoOp", "Inputs": [tensor("Half")]},
            conv("layer1.weight + QuantizeLinear_20 + Conv_22", Inputs=[tensor(EIGHT)], Outputs=[tensor(EIGHT)]),
        ],
        "Bindings": ["input", "output"],
    },
    "10.16": {
        "Layers": [
            conv(
                "Conv_9 + Relu_11",
                Inputs=[tensor("Int8")],
                Metadata="[ONNX Layer: QuantizeLinear_7]\u001e[ONNX Layer: Conv_9]\u001e[ONNX Layer: Relu_11]",
            ),
            conv("Conv_22", Inputs=[tensor("Int8")], Metadata="[ONNX Layer: Conv_22]"),
        ]
    },
    "11": {
        "Layers": [
            conv(
                "Conv_9 + Relu_11",
                Inputs=[{**tensor("Int8", "Datatype"), "Format": "kCHW32"}],
                Metadata="[ONNX Layer: Conv_9]\u001e[ONNX Layer: Relu_11]",
            ),
            conv("Conv_22", Inputs=[{**tensor("Int8", "Datatype"), "Format": "kCHW32"}], Metadata="[ONNX Layer: Conv_22]"),
        ],
        "I/O Tensors": [{"Name": "input", "IOMode": "Input", "DataType": "Float"}],
    },
}
ASKED = {"Conv_9": "int8", "Conv_22": "int8"}


@pytest.mark.parametrize("form", FORMS)
def test_an_engine_that_keeps_its_word_is_proven_in_every_form(form: str) -> None:
    proofs = prove(ASKED, built_layers(FORMS[form]))
    assert [(p.node, p.ran, p.unit) for p in proofs] == [("Conv_9", "int8", "gpu"), ("Conv_22", "int8", "gpu")]
    assert "Relu_11" in proofs[0].fused
    assert broken(proofs) == []
    assert broken(proofs, unit="dla") == proofs


@pytest.mark.parametrize("form", FORMS)
def test_a_convolution_that_fell_back_is_named_in_every_form(form: str) -> None:
    document = copy.deepcopy(FORMS[form])
    layer = document["Layers"][-1]
    layer["Weights"] = {"Type": "Half", "Count": 9}
    for key in ("Datatype", "Format/Datatype"):
        if key in layer["Inputs"][0]:
            layer["Inputs"][0][key] = "Half"
    (bad,) = broken(prove(ASKED, built_layers(document)))
    assert (bad.node, bad.ran) == ("Conv_22", "fp16")
    assert "Conv_22: int8 asked, fp16" in bad.words()


def test_int8_weights_over_float_inputs_are_no_int8() -> None:
    document = copy.deepcopy(FORMS["10.16"])
    document["Layers"][1]["Inputs"][0]["Format/Datatype"] = "Half"
    (bad,) = broken(prove(ASKED, built_layers(document)))
    assert bad.ran == "int8 weights, fp16 input"


def test_a_node_that_no_layer_names_is_not_taken_for_proven() -> None:
    (bad,) = broken(prove({**ASKED, "Conv_30": "int8"}, built_layers(FORMS["8.5"])))
    assert (bad.node, bad.ran, bad.unit) == ("Conv_30", None, None)
    assert "not told by the engine" in bad.words()


def test_names_alone_prove_nothing() -> None:
    layers = built_layers({"Layers": ["Conv_9 + Relu_11", "Conv_22"]})
    assert len(broken(prove(ASKED, layers))) == 2


def test_a_split_convolution_is_as_good_as_its_worst_part() -> None:
    document = copy.deepcopy(FORMS["10.16"])
    document["Layers"].append(conv("Conv_22 part", weights="Half", Inputs=[tensor("Half")], Metadata="[ONNX Layer: Conv_22]"))
    assert [p.node for p in broken(prove(ASKED, built_layers(document)))] == ["Conv_22"]


DLA_LOG = """
[01/01/2026-00:00:00] [I] [TRT] --------------- Layers running on DLA:
[01/01/2026-00:00:00] [I] [TRT] {Conv_9,Relu_11}, {Conv_22},
[01/01/2026-00:00:00] [I] [TRT] --------------- Layers running on GPU:
[01/01/2026-00:00:00] [I] [TRT] GlobalAveragePool_30, {Conv_40}
"""


def test_what_runs_on_a_dla_is_read_from_the_build_log() -> None:
    assert on_dla(DLA_LOG) == {"Conv_9", "Relu_11", "Conv_22"}
    layers = built_layers({"Layers": [{"Name": "{ForeignNode[Conv_9...Conv_22]}", "LayerType": "DLA"}]})
    proofs = prove(ASKED, layers, dla=on_dla(DLA_LOG))
    assert [p.unit for p in proofs] == ["dla", "dla"]
    assert broken(proofs, unit="dla") == []


def test_an_engine_that_left_the_dla_is_named() -> None:
    proofs = prove(ASKED, built_layers(FORMS["10.16"]))
    assert [p.node for p in broken(proofs, unit="dla")] == ["Conv_9", "Conv_22"]


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        (EIGHT, "int8"),
        ("Row major linear FP32", "fp32"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Half", "fp16"),
        ("Float", "fp32"),
        ("FP8", "fp8"),
        ("BFloat16", "bf16"),
        ("nothing known", None),
        (None, None),
    ],
)
def test_texts_of_types(text: str | None, precision: str | None) -> None:
    assert precision_of(text) == precision


@pytest.mark.parametrize("document", [None, [], {}, {"Layers": 3}, {"Layers": [3]}, {"Layers": [None]}])
def test_what_is_no_layer_information_is_refused(document: Any) -> None:
    with pytest.raises(ValueError, match=r"layer"):
        built_layers(document)


def test_a_real_file_of_tensorrt_10_16() -> None:
    path = LOGS / "trt10.16.1_exportLayerInfo.json.txt"
    if not path.is_file():
        pytest.skip("../shared is not here")
    text = path.read_text(encoding="utf-8")
    document, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
    layers = built_layers(document)
    proofs = prove({"node_conv2d": "int8", "node_conv2d_1": "fp32"}, layers)
    assert [(p.ran, p.unit) for p in proofs] == [("fp32", "gpu"), ("fp32", "gpu")]
    assert [p.node for p in broken(proofs)] == ["node_conv2d"]
    assert "node_relu" in proofs[0].fused


def test_the_layers_of_a_real_log_of_tensorrt_8_5() -> None:
    path = LOGS / "trt8.5.10_rtx2000ada_qat_resnet18_excerpt.txt"
    if not path.is_file():
        pytest.skip("../shared is not here")
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        found = re.match(r"Name: (.*?), LayerType: (\w+), Inputs: \[(.*?)\], Outputs: \[(.*?)\], ParameterType", line)
        if found:
            inputs = [tensor(t.strip(" }")) for t in re.findall(r"Format/Datatype: ([^}\]]*)", found[3])]
            weights = re.search(r'Weights: \{"Type": "(\w+)"', line)
            row: dict[str, Any] = {"Name": found[1], "LayerType": found[2], "Inputs": inputs}
            rows.append(row | ({"Weights": {"Type": weights[1]}} if weights else {}))
    assert len(rows) == 15
    asked = {n: "int8" for r in rows for n in re.findall(r"\bConv_\d+", r["Name"])}
    assert len(asked) == 14
    assert broken(prove(asked, built_layers({"Layers": rows}))) == []
