"""The Python face: what the documentation shows runs as it stands, and importing it is light."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from report_factory import write_run
from rich.console import Console

import rescompress
from compress.checkpoints.base import Checkpoint
from compress.data import Dataset
from compress.quantize import fake_quant_model, on_grid
from rescompress.core.errors import BadInput, RescompressError
from rescompress.core.settings import TrainSettings
from rescompress.core.spec import Block, Head, ModelSpec, Preprocessing, Stem, StemConv

ROOT = Path(__file__).parents[1]


def test_the_documented_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)
    assert len(blocks) == 1
    code = blocks[0].replace('"examples/', f'"{ROOT}/examples/')
    assert code.count("epochs=1)") == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("epochs=1)", "epochs=0.1)"), "docs/python.md", "exec"), {})
    said = capsys.readouterr().out
    table, *lines = said.split("\n\n")
    assert [row.split("|")[1].split()[0] for row in table.splitlines()[2:]] == ["dense", "pruned", "float32", "INT8"]
    assert "Manifest(target:jetson-orin-nano-8gb-super" in said
    assert "LatencyPrediction(predicted 0." in said
    assert all(len(line) <= 200 for line in said.splitlines()), lines
    assert {p.name for p in tmp_path.iterdir()} == {"int8.safetensors", "out"}


@pytest.fixture(scope="module")
def dense() -> Checkpoint:
    return rescompress.load(ROOT / "examples" / "resnet20_digits.safetensors")


@pytest.fixture(scope="module")
def data(dense: Checkpoint) -> Dataset:
    return rescompress.load_dataset("builtin:digits", dense)


@pytest.fixture(scope="module")
def int8(dense: Checkpoint, data: Dataset) -> Checkpoint:
    return rescompress.quantize(dense, data.train.take(64, 0))


def test_every_result_prints_in_one_line_and_as_a_table(
    dense: Checkpoint, data: Dataset, int8: Checkpoint, tmp_path: Path
) -> None:
    write_run(tmp_path / "run")
    half = rescompress.prune(dense, macs=0.5, method="magnitude")
    results: list[tuple[object, str]] = [
        (dense, "270 k"),
        (int8, "INT8 (tensorrt)"),
        (half, f"({half.macs_after / half.macs_before:.2f})"),
        (data, "1437 images"),
        (data.val, "360"),
        (rescompress.evaluate(dense, data.val.take(50, 0)), "50"),
        (rescompress.predict_latency(dense, "jetson"), "jetson-orin-nano-8gb-super"),
        (rescompress.load_manifest(tmp_path / "run"), "dense"),
    ]
    for result, wanted in results:
        line = repr(result)
        assert len(line) <= 200
        assert "\n" not in line
        assert wanted in line
        assert wanted in result._repr_html_()  # type: ignore[attr-defined]
        console = Console(width=300, file=io.StringIO())
        console.print(result)
        assert wanted in console.file.getvalue()  # type: ignore[attr-defined]


def test_names_with_markup_and_control_characters_stay_text(dense: Checkpoint) -> None:
    named = dataclasses.replace(dense, spec=dense.spec.model_copy(update={"arch": "<b>\x1b[31m[bold]"}))
    assert "\x1b" not in repr(named)
    assert "<b>" not in named._repr_html_()
    console = Console(width=300, file=io.StringIO())
    console.print(named)
    assert "[bold]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_an_int8_checkpoint_built_again_is_the_int8_network(dense: Checkpoint, data: Dataset, int8: Checkpoint) -> None:
    x = data.val.take(20, 0).tensor()
    with torch.inference_mode():
        built, wanted = rescompress.build_model(int8)(x), fake_quant_model(int8)(x)
        other = rescompress.build_model(dense)(x)
    assert torch.equal(built, wanted)
    assert not torch.equal(built, other)
    with pytest.raises(BadInput, match="tensors of its own"):
        rescompress.build_model(int8, int8.state_dict)


def test_images_may_be_given_in_every_form(dense: Checkpoint, data: Dataset) -> None:
    chosen = data.train.take(64, 0)
    drawn = chosen.take(512, 0)  # what the face takes of a split
    forms = (chosen, drawn.tensor(), [x for x, _ in drawn.batches(64)], list(drawn.batches(64)))
    first, *others = [rescompress.quantize(dense, images) for images in forms]
    assert all(other.quantization == first.quantization for other in others)


def test_files_and_networks_are_evaluated_alike(dense: Checkpoint, data: Dataset, tmp_path: Path) -> None:
    file = rescompress.export_onnx(dense, tmp_path / "net.onnx")
    rescompress.save_checkpoint(dense, tmp_path / "net.safetensors")
    some = data.val.take(60, 0)
    found = [rescompress.evaluate(what, some) for what in (dense, file, str(tmp_path / "net.safetensors"))]
    assert [list(f.predictions) for f in found] == [list(found[0].predictions)] * 3
    assert found[1].metrics["top1"].runtime == "onnxruntime"


def test_val_is_read_by_evaluation_alone(dense: Checkpoint, data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    bait = dataclasses.replace(data, val=cast(Any, None))
    half = rescompress.prune(dense, macs=0.5, images=bait, method="magnitude")
    tuned = rescompress.finetune(half, bait, epochs=0.05, settings=TrainSettings(device="cpu"))
    assert any(not torch.equal(v, tuned.state_dict[k]) for k, v in half.checkpoint.state_dict.items())
    rescompress.quantize(tuned, bait)


SHOWN = (
    {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize": None},
    {"mean": (0.5,) * 3, "std": (0.25, 0.5, 0.5), "resize": None},
    {"mean": (120.0,) * 3, "std": (60.0,) * 3, "scale": 1.0, "resize": None},
    {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize": None, "channel_order": "bgr"},
    {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize": 12},
    {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize": None, "interpolation": "nearest"},
)
NAMES = (("ant", "bee", "cow"), ("cow", "ant", "bee"), ("Ant", "Bee", "Cow"), ("ant", "bee", "dog"), None)


def small(shown: int, names: int, side: int, seed: int) -> Checkpoint:
    """Return a network of three classes of its own."""
    spec = ModelSpec(
        input_shape=(3, side, side),
        stem=Stem(convs=(StemConv(width=8, kernel=3, stride=1),), max_pool=False),
        stages=((Block(name="layer1.0", kind="basic", widths=(8, 8)),),),
        head=Head(num_classes=3),
        preprocessing=Preprocessing(**SHOWN[shown], assumed=False),  # type: ignore[arg-type]
        labels=NAMES[names],
    )
    torch.manual_seed(seed)
    model = rescompress.build_model(spec)
    return Checkpoint(spec, {name: value for name, value in model.state_dict().items() if "num_batches" not in name})


def attempt(what: Callable[[], Any]) -> tuple[Any, BadInput | None]:
    """Return what a call returns, or its refusal."""
    try:
        return what(), None
    except BadInput as e:
        return None, e


@settings(max_examples=25, deadline=None)
@given(
    first=st.tuples(*[st.integers(0, 5), st.integers(0, 4), st.sampled_from([8, 8, 8, 10])]),
    second=st.tuples(*[st.integers(0, 5), st.integers(0, 4), st.sampled_from([8, 8, 8, 10])]),
    same=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_images_read_for_another_network_mean_the_same_to_it_or_are_refused(
    first: Any, second: Any, same: bool, seed: int
) -> None:
    """What a network answers on images that were read for another is what torch makes of its own, or an error."""
    a, b = small(*first, seed), small(*(first if same else second), seed + 1)
    draw = np.random.default_rng(seed)
    pictures = [Image.fromarray(draw.integers(0, 256, (14, 11, 3), dtype=np.uint8)) for _ in range(12)]
    names = [("ant", "bee", "cow")[i % 3] for i in range(12)]
    try:
        data = rescompress.load_dataset({"val": list(zip(pictures, names, strict=True))}, a)
    except RescompressError:
        assert "dog" in (a.spec.labels or ())
        return
    wide = dataclasses.replace(data.train, preprocessing=data.train.preprocessing)
    calls: list[Callable[[], object]] = [
        lambda: rescompress.compare(a, b, data=data),
        lambda: rescompress.finetune(b, wide, settings=TrainSettings(device="cpu", epochs=0.1)),
        lambda: rescompress.quantize(b, wide, calibration="mse"),
    ]
    found, error = attempt(lambda: rescompress.evaluate(b, data))
    if error is not None:
        what = [(n.spec.input_shape, n.spec.preprocessing, n.spec.labels) for n in (a, b)]
        assert what[0] != what[1]
        refused = 2 if "classes" in str(error) else 3  # calibration reads no labels
        for call in calls[:refused]:
            with pytest.raises(BadInput, match=r"load_dataset\(source, network\)"):
                call()
        return
    model = rescompress.build_model(b)
    order = tuple(name.lower() for name in b.spec.labels or a.spec.labels or sorted(set(names)))
    own = rescompress.load_dataset({"val": list(zip(pictures, names, strict=True))}, b.spec.replace(labels=order)).val
    with torch.inference_mode():
        right = [int(model(x).argmax(1)) == int(y) for x, y in own.batches(1)]
    assert found.top1 == sum(right) / len(right)


def test_a_file_is_evaluated_on_images_that_were_read_for_it_alone(dense: Checkpoint, data: Dataset, tmp_path: Path) -> None:
    other = dense.spec.replace(
        preprocessing=dense.spec.preprocessing.model_copy(update={"mean": (0.25,) * 3, "std": (0.5,) * 3})
    )
    file = rescompress.export_onnx(dataclasses.replace(dense, spec=other), tmp_path / "net.onnx")
    with pytest.raises(BadInput, match="mean"):
        rescompress.evaluate(file, data)


def test_a_teacher_of_another_order_teaches_by_name() -> None:
    student, teacher = small(0, 0, 8, 1), small(0, 0, 8, 2)
    order = [2, 0, 1]
    moved = {k: v[order] if k.startswith("fc.") else v for k, v in teacher.state_dict.items()}
    other = Checkpoint(teacher.spec.replace(labels=NAMES[1]), moved)
    pictures = [Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)) for i in range(12)]
    data = rescompress.load_dataset({"val": [(x, i % 3) for i, x in enumerate(pictures)]}, student.spec.replace(labels=None))
    how = TrainSettings(epochs=2, batch_size=3, device="cpu")
    wanted = rescompress.finetune(student, data, teacher=teacher, settings=how)
    with pytest.warns(UserWarning, match="another order"):
        found = rescompress.finetune(student, data, teacher=other, settings=how)
    assert all(torch.equal(found.state_dict[k], v) for k, v in wanted.state_dict.items())


def test_a_config_says_whether_damaged_images_are_left_out(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for i in range(10):
            (tmp_path / "d" / split / str(i)).mkdir(parents=True)
            Image.new("L", (8, 8), 20 * i).save(tmp_path / "d" / split / str(i) / "a.png")
    (tmp_path / "d" / "val" / "3" / "b.png").write_bytes(b"no image")
    text = f"checkpoint: {ROOT}/examples/resnet20_digits.safetensors\ndata: d\ntargets: []\n"
    (tmp_path / "c.yaml").write_text(text + "skip_corrupt: true\n")
    manifest = rescompress.run(tmp_path / "c.yaml", tmp_path / "out")
    assert manifest.stages[0].metrics["top1"].n == 10


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda d, _: rescompress.prune(d), "0 budgets"),
        (lambda d, _: rescompress.prune(d, macs=0.5, ratio=0.2), "2 budgets"),
        (lambda d, _: rescompress.prune(d, latency=0.5, method="magnitude"), "needs a device"),
        (lambda _, q: rescompress.finetune(q, cast(Any, None)), "already quantized"),
        (lambda d, _: rescompress.compare(d, d, names=["a", "a"]), "1 different names for 2"),
        (lambda _, __: rescompress.compare(), "nothing to compare"),
    ],
)
def test_what_makes_no_sense_is_said(dense: Checkpoint, int8: Checkpoint, call: Callable[..., object], words: str) -> None:
    with pytest.raises(RescompressError, match=words):
        call(dense, int8)


def test_int8_of_the_python_face_is_that_of_the_command_line(tmp_path: Path) -> None:
    dense = rescompress.load_checkpoint(ROOT / "examples" / "resnet20_digits.safetensors")
    data = rescompress.load_dataset("builtin:digits", dense.spec)
    int8 = rescompress.quantize(dense, data.train.take(64, 0).batches(64))
    again = on_grid(int8)
    assert all(torch.equal(value, again.state_dict[key]) for key, value in int8.state_dict.items())
    write_run(tmp_path / "run")
    assert rescompress.load_manifest(str(tmp_path / "run")).stages


def test_import_is_light_and_every_name_is_there() -> None:
    script = "import sys, rescompress; print([m for m in ('torch', 'numpy', 'onnx', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert set(rescompress._HOME) == set(rescompress.__all__)
    for name in rescompress.__all__:
        assert getattr(rescompress, name) is not None


def test_equal_checkpoints_are_equal_files_in_every_process(tmp_path: Path) -> None:
    script = "import sys, rescompress as rc; rc.save_checkpoint(rc.load_checkpoint(sys.argv[1]), sys.argv[2])"
    source = ROOT / "examples" / "resnet20_digits.safetensors"
    rescompress.save_checkpoint(rescompress.load_checkpoint(source), tmp_path / "here.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"}
    args = [sys.executable, "-c", script, str(source), str(tmp_path / "there.safetensors")]
    subprocess.run(args, env=environment, check=True, timeout=120)
    assert (tmp_path / "here.safetensors").read_bytes() == (tmp_path / "there.safetensors").read_bytes()


def test_a_module_or_a_path_in_place_of_a_checkpoint_is_told_what_makes_one(dense: Checkpoint, data: Dataset) -> None:
    module: Any = torch.nn.Linear(3, 2)
    path: Any = "net.pt"
    for call in (lambda x: rescompress.prune(x, macs=0.5, images=data), lambda x: rescompress.finetune(dense, data, teacher=x)):
        with pytest.raises(BadInput, match="of class Linear, no checkpoint") as caught:
            call(module)
        assert "rc.from_module" in str(caught.value.remedy)
        with pytest.raises(BadInput, match=r"net\.pt'?, no checkpoint") as caught:
            call(path)
        assert "rc.load" in str(caught.value.remedy)
