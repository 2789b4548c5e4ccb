"""Trunks of ONNX hosts: what is cut out computes what the host computed, and goes back into it with nothing else changed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from engines import prune, ptq
from trunk_nets import (
    Program,
    channels_last,
    one_head_for_two_levels,
    photos,
    precise,
    robot,
    saved,
    segmenter,
    two_cameras,
    two_scales,
)

from compress.checkpoints import load_checkpoint, save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.importers.reference import reference
from compress.prune import Budget
from compress.resnet import build_model
from export.host import compare_hosts, fitting, with_trunk
from export.to_onnx import ExportOptions
from rescompress.core.errors import CheckpointError, ModelFileError
from rescompress.runs.stages.shared import onnx_of

Run = Callable[..., subprocess.CompletedProcess[str]]


def trunk(path: Path, ends: str = "auto", **options: Any) -> Checkpoint:
    return load_checkpoint(path, arch_options={"trunk": ends}, **options)


def images(count: int = 4, *, last: bool = False) -> np.ndarray:
    x = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(7)).numpy()
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)) if last else x


def answers(model: onnx.ModelProto, x: np.ndarray, **others: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, {"image": x, **others}), strict=True))


def smaller(checkpoint: Checkpoint, macs: float = 0.7, **options: Any) -> Checkpoint:
    x = torch.randn(16, *checkpoint.spec.input_shape, generator=torch.Generator().manual_seed(1))
    options = {"align": 1, "scope": "all", "budget": Budget(kind="macs", value=macs)} | options
    return prune(checkpoint, calibration_x=x, **options).checkpoint


def back(checkpoint: Checkpoint, model: onnx.ModelProto) -> onnx.ModelProto:
    host = checkpoint.host
    assert host is not None
    return with_trunk(model, onnx_of(checkpoint, fitting(ExportOptions(), model, host)), host)


def off(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


HOSTS = {"two scales": (two_scales, False, {}), "channels last": (channels_last, True, {})}
HOSTS |= {"in double precision": (precise, False, {}), "one head for two levels": (one_head_for_two_levels, False, {})}
HOSTS["segmenter"] = (segmenter, False, {})
HOSTS["robot"] = (robot, False, {"state": np.linspace(-1, 1, 7, dtype=np.float32)[None]})


@pytest.mark.parametrize("name", HOSTS)
def test_an_unpruned_trunk_changes_no_output_of_its_host(name: str, tmp_path: Path) -> None:
    make, last, others = HOSTS[name]
    model = make()
    checkpoint = trunk(saved(model, tmp_path))
    host = back(checkpoint, model)
    onnx.checker.check_model(host, full_check=True)
    x = images(1, last=last)
    before, after = answers(model, x, **others), answers(host, x, **others)
    assert all(off(before[key], after[key]) < 1e-4 for key in before)
    own = [n for n in model.graph.node if n.name in {k.name for k in host.graph.node}]
    assert own == [n for n in host.graph.node if not n.name.startswith("trunk/")]
    assert len(own) + len(checkpoint.network.nodes) <= len(host.graph.node) + 3  # all that is gone is in the trunk
    used = {name for n in host.graph.node for name in n.input} | {o.name for o in host.graph.output}
    assert {i.name for i in host.graph.initializer} <= used
    assert all(used & set(n.output) for n in host.graph.node)  # nothing of the old trunk is left
    assert checkpoint.host is not None
    assert fitting(ExportOptions(), model, checkpoint.host).batch == (
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or "dynamic"
    )
    assert checkpoint.spec.num_classes is None


def test_weights_that_several_levels_share_stay_with_the_host(tmp_path: Path) -> None:
    checkpoint = trunk(saved(one_head_for_two_levels(), tmp_path))
    assert checkpoint.host is not None
    assert list(checkpoint.host.borders.values()) == ["fine", "coarse"]
    with pytest.raises(CheckpointError, match="shares its weights with other steps"):
        trunk(tmp_path / "host.onnx", "fine_answer")


def test_the_trunk_ends_where_the_rest_reads_and_the_widths_there_stay(tmp_path: Path) -> None:
    model = two_scales()
    checkpoint = trunk(saved(model, tmp_path))
    assert checkpoint.host is not None
    assert list(checkpoint.host.borders.values()) == ["fine", "coarse"]
    pruned = smaller(checkpoint, 0.3)
    for output in checkpoint.network.outputs:
        shapes = [c.network.by_name[output.tensor].out_shape for c in (checkpoint, pruned)]
        assert shapes[0] == shapes[1]
    assert [o.name for o in pruned.network.outputs] == [o.name for o in checkpoint.network.outputs]
    x = images()
    inside = answers(_showing(back(pruned, model), ["fine", "coarse"]), x)
    with torch.no_grad():
        mine = build_model(pruned.spec, pruned.state_dict).outputs(torch.from_numpy(x))
    assert off(mine[0].numpy(), inside["fine"]) < 1e-5
    assert off(mine[1].numpy(), inside["coarse"]) < 1e-5
    assert off(answers(model, x)["class_scores"], inside["class_scores"]) > 1e-3


def test_images_that_the_rest_reads_are_no_output_of_the_trunk(tmp_path: Path) -> None:
    f = Program()
    f.block(f("Relu", f.conv("image", 3, 16)), 16, "map")
    f.tokens("map", 16, "seen", 3)
    light = f.reduced("ReduceL2", f("Identity", "image", out="copy"), 2, 3)
    f("Add", "seen", light, out="answer")
    model = f.model("answer")
    checkpoint = trunk(saved(model, tmp_path))
    assert checkpoint.host is not None
    assert list(checkpoint.host.borders.values()) == ["map"]
    x = images()
    assert off(answers(model, x)["answer"], answers(back(checkpoint, model), x)["answer"]) < 1e-4


def test_a_pooled_vector_that_is_enlarged_to_a_map_stays_with_the_host(tmp_path: Path) -> None:
    model = segmenter()
    path = saved(model, tmp_path)
    checkpoint = trunk(path)
    assert checkpoint.host is not None
    assert list(checkpoint.host.borders.values()) == ["map", "near"]
    pruned = smaller(checkpoint, 0.8)
    x = images()
    seen = answers(_showing(back(pruned, model), ["map", "near"]), x)
    with torch.no_grad():
        mine = build_model(pruned.spec, pruned.state_dict).outputs(torch.from_numpy(x))
    assert [off(m.numpy(), seen[name]) < 1e-5 for m, name in zip(mine, ("map", "near"), strict=True)] == [True, True]
    assert off(answers(model, x)["answer"], seen["answer"]) > 1e-3
    with pytest.raises(CheckpointError, match=r"'spread'.*enlarges a vector"):
        trunk(path, "spread")
    with pytest.raises(CheckpointError, match=r"makes 'spread'.*enlarges a vector"):
        load_checkpoint(path)


def _showing(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return copy


def test_named_ends_cut_there_and_what_else_is_read_is_an_output_too(tmp_path: Path) -> None:
    path = saved(two_scales(), tmp_path)
    checkpoint = trunk(path, "coarse")
    assert checkpoint.host is not None
    assert list(checkpoint.host.borders.values()) == ["fine", "coarse"]
    assert any("fine" in str(note) for note in checkpoint.provenance["notes"])  # type: ignore[union-attr]
    front = trunk(path, "fine")
    assert front.host is not None
    assert list(front.host.borders.values()) == ["fine"]
    assert len(front.network.blocks) == 2


def test_one_of_two_cameras_is_chosen_by_its_tensors(tmp_path: Path) -> None:
    path = saved(two_cameras(), tmp_path)
    with pytest.raises(CheckpointError, match="2: 'image', 'wrist'"):
        trunk(path)
    chosen = trunk(path, "wrist_map")
    assert chosen.host is not None
    assert chosen.host.input == "wrist"
    with pytest.raises(CheckpointError, match="2: 'image', 'wrist'"):
        trunk(path, "both")


def nothing_known() -> onnx.ModelProto:
    f = Program()
    f.reduced("ReduceL2", "image", 2, 3, out="answer")
    return f.model("answer")


@pytest.mark.parametrize(
    ("make", "ends", "says"),
    [
        (nothing_known, "auto", "ReduceL2"),
        (two_scales, "corse", "coarse"),
        (two_scales, "class_scores", "not behind known operations: MatMul"),
        (two_scales, "fine,one", "nothing but the trunk reads 'one'"),
        (two_scales, "w3", "makes no tensor 'w3'"),
    ],
)
def test_what_is_no_trunk_is_refused_by_name(
    make: Callable[[], onnx.ModelProto], ends: str, says: str, tmp_path: Path, rescompress: Run
) -> None:
    done = rescompress("inspect", saved(make(), tmp_path), "--trunk", ends, code=5)
    assert says in done.stderr
    assert "->" in done.stderr


def test_a_trunk_needs_a_program(tmp_path: Path, rescompress: Run) -> None:
    checkpoint = trunk(saved(two_scales(), tmp_path))
    save_checkpoint(checkpoint, tmp_path / "trunk.safetensors")
    assert "no program" in rescompress("inspect", tmp_path / "trunk.safetensors", "--trunk", "auto", code=5).stderr
    assert "names no tensor" in rescompress("inspect", tmp_path / "host.onnx", "--trunk", " , ", code=5).stderr


def test_a_checkpoint_finds_its_host_again_beside_it_and_refuses_another(tmp_path: Path) -> None:
    path = saved(two_scales(), tmp_path / "a")
    save_checkpoint(trunk(path), tmp_path / "b" / "trunk.safetensors")
    loaded = load_checkpoint(tmp_path / "b" / "trunk.safetensors")
    assert loaded.host is not None
    assert reference(loaded.host).network == loaded.network.replace(preprocessing=reference(loaded.host).spec.preprocessing)
    path.rename(tmp_path / "b" / "host.onnx")
    again = load_checkpoint(tmp_path / "b" / "trunk.safetensors")
    assert again.host is not None
    assert again.host.checked() == tmp_path / "b" / "host.onnx"
    saved(robot(), tmp_path / "b")
    with pytest.raises(CheckpointError, match="was changed"):
        again.host.checked()
    (tmp_path / "b" / "host.onnx").unlink()
    with pytest.raises(CheckpointError, match="not there"):
        again.host.checked()


def test_weights_beside_the_host_belong_to_it(tmp_path: Path) -> None:
    model = two_scales()
    onnx.save(model, str(tmp_path / "host.onnx"), save_as_external_data=True, location="host.bin", size_threshold=0)
    checkpoint = trunk(tmp_path / "host.onnx")
    assert checkpoint.host is not None
    assert [Path(f.path).name for f in checkpoint.host.files] == ["host.onnx", "host.bin"]
    (tmp_path / "host.bin").write_bytes((tmp_path / "host.bin").read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(CheckpointError, match=r"host\.bin: the host was changed"):
        checkpoint.host.checked()


@pytest.mark.parametrize("opset", [11, 20, 21])
def test_hosts_of_other_opsets(opset: int, tmp_path: Path) -> None:
    model = two_scales(opset)
    if opset < 13:
        for node in model.graph.node:
            if node.op_type == "Softmax":
                node.attribute[0].i = 2
    checkpoint = smaller(trunk(saved(model, tmp_path)), 0.5)
    host = back(checkpoint, model)
    x = torch.from_numpy(images())
    found, seen = compare_hosts(model, host, checkpoint.host, [x.numpy()], extra=["fine"])  # type: ignore[arg-type]
    with torch.no_grad():
        wanted = build_model(checkpoint.spec, checkpoint.state_dict).outputs(x)[0]
    assert off(wanted.numpy(), seen[0]["fine"]) < 1e-5
    assert found["class_scores"].agreement is not None
    assert found["energy"].agreement is None


def test_an_int8_trunk_goes_back_too(tmp_path: Path) -> None:
    model = two_scales(batch=1)
    checkpoint = smaller(trunk(saved(model, tmp_path)), 0.6)
    int8 = ptq(checkpoint, [torch.randn(32, 3, 16, 16)], calibration="mse", bias_correction=False)
    host = back(int8, model)
    assert sum(n.op_type == "QuantizeLinear" for n in host.graph.node) > 4
    x = images(1)
    before, after = answers(back(checkpoint, model), x), answers(host, x)
    assert all(off(before[key], after[key]) < 0.2 for key in before)


def test_a_host_that_cannot_run_is_named(tmp_path: Path) -> None:
    model = two_scales()
    model.graph.node[-1].domain = "factory"
    model.opset_import.append(onnx.helper.make_opsetid("factory", 1))
    checkpoint = trunk(saved(model, tmp_path))
    assert checkpoint.host is not None
    with pytest.raises(ModelFileError, match="cannot open the host"):
        compare_hosts(model, back(checkpoint, model), checkpoint.host, [images()])


@pytest.mark.slow
def test_the_command_line_prunes_and_writes_the_host(tmp_path: Path, rescompress: Run) -> None:
    model = two_scales()
    path, data = saved(model, tmp_path), photos(tmp_path / "photos")
    words = ("--data", data, "--preprocess", "rescale")
    rescompress("prune", path, "--trunk", "auto", *words, "--macs", "0.7", "--align", "1", "-o", "half.st", cwd=tmp_path)
    done = rescompress("export", "half.st", "--target", "jetson", *words[:2], "-o", "out", "--json", cwd=tmp_path)
    document = json.loads(done.stdout)
    assert document["host"]["onnx"] == "out/host.onnx"
    assert document["host"]["trunk_error"] < 0.01  # a Jetson computes it in float16
    written = onnx.load(str(tmp_path / "out" / "host.onnx"))
    x = images(1)
    before, after = answers(model, x), answers(written, x)
    assert 0 < off(before["energy"], after["energy"]) < 0.5
    saved(two_cameras(), tmp_path)
    assert "was changed" in rescompress("export", "half.st", cwd=tmp_path, code=5).stderr
