"""Whether an engine computes in what its file asks, on the unit that was asked for: every way to break that, planted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from edge_standin_layers import graph_of, layers_of
from onnx import TensorProto, helper
from test_edge_deploy import (  # noqa: F401 (server and fresh are fixtures)
    deploy,
    fetched,
    fresh,
    labelled,
    needs_sshd,
    server,
    write_onnx,
)

from edge_targets.onnx_kernels import asked_of
from edge_targets.placement import Placement, placement
from edge_targets.trtexec_log import read_layer_info
from rescompress.core.errors import EnvironmentFailed

STANDIN_BUILDER = Path(__file__).with_name("edge_standin_builder")
VERSIONS = [(8, 5), (10, 3), (10, 16), (11, 4)]


def placed(folder: Path, *, version: tuple[int, int] = (10, 3), trouble: str | None = None, dla: bool = False) -> Placement:
    """Return the placement of the INT8 network that a stand-in built."""
    path = write_onnx(folder / "m.onnx", quantized=True)
    document, lines = layers_of(path.read_bytes(), version, ["--int8", "--fp16"], trouble, dla)
    (folder / "l.json").write_text(json.dumps(document))
    as_float = None if version >= (10, 12) else "fp16"
    return placement(asked_of(path), folder / "l.json", "\n".join(lines), float_as=as_float, dla=0 if dla else None)


def test_the_stand_ins_read_a_file_as_onnx_does(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "m.onnx", quantized=True)
    nodes, types = graph_of(path.read_bytes())
    graph = onnx.load(path).graph
    wanted = [(n.name or f"node_of_{n.output[0]}", n.op_type, list(n.input), list(n.output)) for n in graph.node]
    assert nodes == wanted
    assert types == {i.name: i.data_type for i in graph.initializer}


@pytest.mark.parametrize("version", VERSIONS)
def test_an_engine_that_keeps_its_word(tmp_path: Path, version: tuple[int, int]) -> None:
    found = placed(tmp_path, version=version)
    assert found.failures == ()
    rows = {r["node"]: (r["asked"], r["ran"], r["unit"]) for r in found.rows()}
    as_float = "fp16" if version < (10, 12) else "fp32"
    assert rows == {"conv1": ("int8", "int8", "gpu"), "node_of_y": (as_float, as_float, "gpu")}
    found.check("board")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("trouble", "text"),
    [("half", "conv1: int8 asked, fp16"), ("missing", "conv1: int8 asked, not told"), ("names", "conv1: int8 asked, not told")],
)
def test_int8_that_was_asked_and_silently_not_given(tmp_path: Path, version: tuple[int, int], trouble: str, text: str) -> None:
    found = placed(tmp_path, version=version, trouble=trouble)
    with pytest.raises(EnvironmentFailed, match=text) as caught:
        found.check("board")
    assert caught.value.exit_code == 7
    assert "1 of 2 layers" in caught.value.what
    assert "--allow-fallback" in str(caught.value.remedy)


@pytest.mark.parametrize("text", ["", '{"Layers": [', "[]", '{"Layers": 5}', '{"Layers": [5]}'])
def test_layers_that_cannot_be_read_prove_nothing(tmp_path: Path, text: str) -> None:
    path = write_onnx(tmp_path / "m.onnx", quantized=True)
    (tmp_path / "l.json").write_text(text)
    for layers in (tmp_path / "l.json", tmp_path / "absent.json"):
        with pytest.raises(EnvironmentFailed, match=r"nothing proves.*conv1: int8 asked, not told"):
            placement(asked_of(path), layers, "").check("board")


def test_a_dla_runs_what_stands_between_the_ends_of_its_part(tmp_path: Path) -> None:
    found = placed(tmp_path, dla=True)
    assert {p.node: p.unit for p in found.proofs} == {"conv1": "dla", "node_of_y": "dla"}
    assert (found.failures, found.notes) == ((), ())


def test_a_dla_that_nothing_runs_on(tmp_path: Path) -> None:
    found = placed(tmp_path, dla=True, trouble="gpu")
    with pytest.raises(EnvironmentFailed, match=r"none of the 2 layers runs on it: conv1: .*; node_of_y: "):
        found.check("board")


def test_what_left_the_dla_is_noted_by_name(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "m.onnx")
    dla = {"Name": "{ForeignNode[conv1...node_of_q]}", "LayerType": "DLA"}
    gpu = {"Name": "node_of_y", "LayerType": "CaskGemm", "Inputs": [{"Format/Datatype": "Half"}], "Weights": {"Type": "Half"}}
    (tmp_path / "l.json").write_text(json.dumps({"Layers": [dla, gpu]}))
    found = placement(asked_of(path), tmp_path / "l.json", "", float_as="fp16", dla=0)
    assert {p.node: p.unit for p in found.proofs} == {"conv1": "dla", "node_of_y": "gpu"}
    assert found.failures == ()
    (note,) = found.notes
    assert "1 of 2 layers do not run on the DLA: node_of_y" in note


def test_a_float_layer_that_runs_in_another_float_is_a_note(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "m.onnx")
    document, _ = layers_of(path.read_bytes(), (10, 3), [])
    (tmp_path / "l.json").write_text(json.dumps(document))
    found = placement(asked_of(path), tmp_path / "l.json", "", float_as="fp16")
    assert found.failures == ()
    assert "2 of 2 layers run in another type than fp16, as is allowed" in found.notes[0]


ODD = ['{"Layers": []}', '{"Layers": ["a"]}', '{"Layers": [{"Name": 5, "Weights": 7, "Inputs": "x"}], "Bindings": null}']


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize("floats", ["fp16", None], ids=["allowed", "typed"])
def test_a_proof_that_shows_nothing_says_so(tmp_path: Path, text: str, floats: Any) -> None:
    """Of a float file nothing was asked that could be withheld, so it is a note; INT8 that nothing shows is a failure."""
    path = write_onnx(tmp_path / "m.onnx")
    (tmp_path / "l.json").write_text(text)
    found = placement(asked_of(path), tmp_path / "l.json", "", float_as=floats)
    assert found.failures == ()
    (note,) = found.notes
    assert "tells of none of the 2 convolutions and matrix products" in note
    assert note.endswith(f"nothing shows that the engine computes in {floats or 'fp32'}")
    assert [row["ran"] for row in found.rows()] == [None, None]
    quantized = placement(asked_of(write_onnx(path, quantized=True)), tmp_path / "l.json", "", float_as=floats)
    with pytest.raises(EnvironmentFailed, match="conv1: int8 asked, not told"):
        quantized.check("board")


def test_float16_of_the_file_is_asked_for(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, 3, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1, 4, 8, 8])
    weight = helper.make_tensor("w", TensorProto.FLOAT16, [4, 3, 1, 1], [0.0] * 12)
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"], name="c")], "g", [x], [y], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), tmp_path / "m.onnx")
    row: dict[str, Any] = {"Name": "c", "LayerType": "conv", "Inputs": [{"Format/Datatype": "Float"}]}
    (tmp_path / "l.json").write_text(json.dumps({"Layers": [row]}))
    with pytest.raises(EnvironmentFailed, match="c: fp16 asked, fp32"):
        placement(asked_of(tmp_path / "m.onnx"), tmp_path / "l.json", "").check("board")


def test_many_layers_are_counted_not_listed(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x" if i == 0 else f"t{i}", "w"], [f"t{i + 1}"], name=f"c{i}") for i in range(20)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, 3, 8, 8])
    y = helper.make_tensor_value_info("t20", TensorProto.FLOAT16, [1, 3, 8, 8])
    weight = helper.make_tensor("w", TensorProto.FLOAT16, [3, 3, 1, 1], [0.0] * 9)
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), tmp_path / "m.onnx")
    (tmp_path / "l.json").write_text('{"Layers": []}')
    found = placement(asked_of(tmp_path / "m.onnx"), tmp_path / "l.json", "")
    assert "20 of 20 layers" in found.failures[0]
    assert found.failures[0].endswith("and 14 more")


@needs_sshd
@pytest.mark.parametrize(
    ("trouble", "text"),
    [
        ("half", "conv1: int8 asked, fp16"),
        pytest.param("missing", "conv1: int8 asked, not told by the engine", marks=pytest.mark.slow),
        pytest.param("garbage", "nothing proves", marks=pytest.mark.slow),
        ("no layers", "could not fetch"),
    ],
)
def test_deploy_fails_where_int8_is_not_proven(fresh: Any, tmp_path: Path, trouble: str, text: str) -> None:  # noqa: F811
    fresh.install("100300", trouble)
    model = write_onnx(tmp_path / "m.onnx", quantized=True)
    done = deploy(fresh, model, "-o", tmp_path / "out")
    assert done.returncode == 7, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert fetched(tmp_path / "out", "model_int8.build.log").is_file()
    assert not any("--loadEngine" in word for call in fresh.calls() for word in call)
    assert fresh.left_behind() == []
    allowed = deploy(fresh, model, "-o", tmp_path / "out", "--allow-fallback")
    assert allowed.returncode == 0, allowed.stderr
    notes = json.loads(allowed.stdout)["notes"]
    assert any((text if trouble != "no layers" else "nothing proves") in note for note in notes), notes


@needs_sshd
def test_deploy_tells_what_every_layer_runs_in(fresh: Any, tmp_path: Path) -> None:  # noqa: F811
    done = deploy(fresh, write_onnx(tmp_path / "m.onnx", quantized=True), "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = {r["node"]: (r["asked"], r["ran"], r["unit"]) for r in found["layers"]}
    assert rows == {"conv1": ("int8", "int8", "gpu"), "node_of_y": ("fp16", "fp16", "gpu")}
    assert found["builder"] == "trtexec"
    (stage,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]
    assert stage["details"]["engine"]["layers"] == found["layers"]
    assert stage["details"]["engine"]["builder"] == "trtexec"


@needs_sshd
def test_accuracy_is_measured_on_a_dla_too(fresh: Any, tmp_path: Path) -> None:  # noqa: F811
    model, data, right = labelled(tmp_path)
    done = deploy(fresh, model, "--data", data, "--dla", "1", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["top1"] == pytest.approx(right.mean())
    assert {r["unit"] for r in found["layers"]} == {"dla"}
    assert any("--dla=1" in c for c in found["commands"] if "infer.py" in c)


@needs_sshd
def test_a_dla_that_nothing_runs_on_fails_the_deployment(fresh: Any, tmp_path: Path) -> None:  # noqa: F811
    fresh.install("100300", "gpu")
    done = deploy(fresh, write_onnx(tmp_path / "m.onnx"), "--dla", "0", "-o", tmp_path / "out")
    assert done.returncode == 7, done.stderr
    assert "none of the 2 layers runs on it" in done.stderr
    assert "conv1" in done.stderr
    assert "node_of_y" in done.stderr


@needs_sshd
@pytest.mark.parametrize("version", ["10.3.0", pytest.param("11.4.1", marks=pytest.mark.slow)])
def test_deploy_without_trtexec_takes_the_builder_along(fresh: Any, tmp_path: Path, version: str) -> None:  # noqa: F811
    (fresh.tools / "trtexec").unlink()
    fresh.install_python(STANDIN_BUILDER, version)
    model = write_onnx(tmp_path / "m.onnx", quantized=True)
    done = deploy(fresh, model, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["builder"], found["tensorrt"]) == ("trt_builder", version)
    assert found["provenance"] == "measured"
    assert any("trt_builder.py, copied there" in note for note in found["notes"])
    assert {r["ran"] for r in found["layers"] if r["node"] == "conv1"} == {"int8"}
    assert "trt_builder.py" in found["commands"][0]
    assert "&&&& PASSED TensorRT.trt_builder" in fetched(tmp_path / "out", "model_int8.build.log").read_text()
    assert "Checked" in fetched(tmp_path / "out", "model_int8.build.log").read_text()
    assert read_layer_info(fetched(tmp_path / "out", "model_int8.layers.json"))
    assert fresh.left_behind() == []


@pytest.mark.slow
@needs_sshd
def test_every_figure_beside_the_latency_is_measured_without_trtexec_too(fresh: Any, tmp_path: Path) -> None:  # noqa: F811
    (fresh.tools / "trtexec").unlink()
    fresh.install_python(STANDIN_BUILDER)
    (fresh.tools / "tegrastats").write_text(
        "#!/bin/sh\nwhile :; do echo 'RAM 4/9MB GR3D_FREQ 99%@[1020] GPU@61.5C VDD_IN 9000mW/9000mW'; sleep 0.1; done\n"
    )
    (fresh.tools / "tegrastats").chmod(0o755)
    model, out = write_onnx(tmp_path / "m.onnx", quantized=True), tmp_path / "out"
    more = ("--builds", "2", "--soak", "10s", "--cold-start", "--streams", "2", "--end-to-end", "--runs", "2")
    done = deploy(fresh, model, "-o", out, *more)
    assert done.returncode == 0, done.stderr
    (stage,) = json.loads((out / "manifest.json").read_text())["stages"]
    value, details = {name: m["value"] for name, m in stage["metrics"].items()}, stage["details"]
    assert value["p50_ms"] == pytest.approx(1.0, rel=0.02), "between the two events around a run"
    assert value["end_to_end_ms"] == pytest.approx(3.0, rel=0.02), "with a copy before and one behind it"
    for name in ("contention_ms", "first_frame_ms", "soak_p50_ms"):
        assert value[name] == pytest.approx(1.0, rel=0.02), name
    assert value["soak_ratio"] == pytest.approx(1.0, rel=0.02)
    assert value["build_ratio"] == pytest.approx(1.0, rel=0.02)
    assert value["cold_start_ms"] > 1
    assert value["power_w"] == 9.0
    assert len(details["cold_start_ms_runs"]) == 5
    assert details["soak"]["clock_mhz"] == [1020, 1020]
    assert set(details["conditions"]) == {"end_to_end_ms", "contention_ms", "cold_start_ms", "first_frame_ms", "soak_ratio"}
    assert details["engine"]["builder"] == "trt_builder"
    assert fresh.left_behind() == []


@needs_sshd
@pytest.mark.parametrize(
    ("trouble", "text"),
    [
        ("half", "conv1: int8 asked, fp16"),
        pytest.param("nan", "trt_builder failed", marks=pytest.mark.slow),
        pytest.param("garbage", "nothing proves", marks=pytest.mark.slow),
    ],
)
def test_the_builder_fails_as_trtexec_does(fresh: Any, tmp_path: Path, trouble: str, text: str) -> None:  # noqa: F811
    (fresh.tools / "trtexec").unlink()
    fresh.install_python(STANDIN_BUILDER, trouble=trouble)
    done = deploy(fresh, write_onnx(tmp_path / "m.onnx", quantized=True), "-o", tmp_path / "out")
    assert done.returncode == 7, done.stderr
    assert text in done.stderr
    assert fresh.left_behind() == []
