"""What a network is shown: the pixels of other tools for the same statement, on a computer and on a board, or an error."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import itertools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_checkpoints_conformance import keras_2_file
from torch import nn

from compress import zoo
from compress.checkpoints import load_checkpoint, save_checkpoint
from compress.data import Inputs, load_dataset
from compress.pixels import FORMATS, decode, fit, normalise, sampled
from compress.preprocessing import KEYS, Statement
from compress.resnet import build_model
from edge_targets import infer
from export.metadata import read_metadata
from export.to_onnx import ExportOptions, to_onnx
from rescompress.core.errors import BadInput, ConfigError, DataError
from rescompress.core.spec import ModelSpec, Preprocessing
from rescompress.runs.config import validate
from rescompress.runs.evaluation import _open
from rescompress.runs.reporter import Silent
from rescompress.runs.settings import Settings
from rescompress.runs.stage import Opening

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed: its pixels are not compared")
from torchvision import transforms  # noqa: E402
from torchvision.datasets.folder import pil_loader  # noqa: E402

FILTERS = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming")
MODES = {
    ".png": ("RGB", "L", "P", "RGBA", "LA", "1"),
    ".jpg": ("RGB", "L", "CMYK"),
    ".bmp": ("RGB", "L", "P", "1"),
    ".tif": ("RGB", "L", "P", "RGBA", "CMYK", "1"),
    ".webp": ("RGB", "RGBA"),
    ".ppm": ("RGB", "L"),
    ".gif": ("P", "L"),
}


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Random smooth blocks, with edges."""
    blocks = np.random.default_rng(seed).integers(0, 256, (max(height // 5, 1), max(width // 5, 1), 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def in_torchvision(image: Image.Image, size: tuple[int, int, int], p: Preprocessing) -> np.ndarray[Any, Any]:
    """The pixels that torchvision's transforms for this statement give."""
    channels, height, width = size
    how = transforms.InterpolationMode(p.interpolation)
    resize = (height, width) if p.resize is None else p.resize
    chain = transforms.Compose([transforms.Resize(resize, how), transforms.CenterCrop((height, width))])
    return np.asarray(chain(image)).reshape(height, width, channels)


@st.composite
def shown(draw: st.DrawFn, most: int) -> dict[str, Any]:
    """A picture in a file, an input, and a statement that fits it."""
    height, width = draw(st.integers(1, most // 2)), draw(st.integers(1, most // 2))
    if draw(st.booleans()):
        height = width
    least = max(height, width)
    whole = (draw(st.integers(height, most)), draw(st.integers(width, most)))
    suffix = draw(st.sampled_from(sorted(MODES)))
    size = draw(st.sampled_from([(width, height), None])) or (draw(st.integers(1, most)), draw(st.integers(1, most)))
    return {
        "picture": size,
        "mode": draw(st.sampled_from(MODES[suffix])),
        "suffix": suffix,
        "input": (draw(st.sampled_from([1, 3])), height, width),
        "resize": draw(st.sampled_from([None, whole, draw(st.integers(least, most))])),
        "interpolation": draw(st.sampled_from(FILTERS)),
        "seed": draw(st.integers(0, 9)),
    }


def held_together(case: dict[str, Any], folder: Path) -> None:
    """The pixels of torchvision, of `decode`, of an .npz and of infer.py are the same."""
    p = Preprocessing(resize=case["resize"], interpolation=case["interpolation"])
    path = folder / f"picture{case['suffix']}"
    picture(*case["picture"], case["mode"], case["seed"]).save(path)
    if case["input"][0] == 3:
        image = pil_loader(str(path))
    else:
        with Image.open(path) as opened:
            image = opened.convert("L")
    expected = in_torchvision(image, case["input"], p)
    np.testing.assert_array_equal(decode(path, case["input"], p), expected)
    np.testing.assert_array_equal(fit(image, case["input"], p), expected)
    about = {"input_shape": list(case["input"]), "preprocessing": json.loads(p.model_dump_json())}
    with infer.open_image(str(path)) as opened:
        np.testing.assert_array_equal(infer.fit(opened, about), expected)


CUT: dict[str, Any] = {"mode": "RGB", "suffix": ".png", "input": (3, 7, 7), "resize": 7, "interpolation": "bilinear", "seed": 1}
"""A long side that torchvision cuts, which rounding would make a pixel longer: random sizes meet it seldom."""


@example({"picture": (25, 15), **CUT})
@example({"picture": (15, 25), **CUT})
@given(shown(40))
@settings(max_examples=60, deadline=None)
def test_pixels_are_those_of_torchvision(tmp_path_factory: pytest.TempPathFactory, case: dict[str, Any]) -> None:
    held_together(case, tmp_path_factory.getbasetemp())


@pytest.mark.slow
@given(shown(300))
@settings(max_examples=400, deadline=None)
def test_pixels_are_those_of_torchvision_at_length(tmp_path_factory: pytest.TempPathFactory, case: dict[str, Any]) -> None:
    held_together(case, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("size", [(64, 64), (63, 65), (73, 73), (64, 80), (200, 31), (65, 64)])
def test_a_picture_of_the_inputs_size_is_resized_and_cropped_like_any_other(size: tuple[int, int], tmp_path: Path) -> None:
    inputs = Inputs((3, 64, 64), 2, zoo.preprocessing("imagenet", (3, 64, 64)), None)
    assert inputs.preprocessing.resize == 73
    expected = in_torchvision(picture(*size), (3, 64, 64), inputs.preprocessing)
    for label, i in itertools.product("ab", range(2)):
        (tmp_path / "set" / label).mkdir(parents=True, exist_ok=True)
        picture(*size).save(tmp_path / "set" / label / f"{i}.png")
    np.savez(tmp_path / "set.npz", x=np.stack([np.asarray(picture(*size))] * 4), y=np.arange(4) % 2)
    for name in ("set", "set.npz"):
        seen = load_dataset(str(tmp_path / name), inputs).val.store.read(np.arange(2))
        np.testing.assert_array_equal(seen, np.stack([expected] * 2), err_msg=name)


def test_small_pictures_of_the_inputs_size_stay_as_they_are() -> None:
    for name in ("cifar", "imagenet"):
        pixels = fit(picture(32, 32), (3, 32, 32), zoo.preprocessing(name, (3, 32, 32)))
        np.testing.assert_array_equal(pixels, np.asarray(picture(32, 32)))


@pytest.mark.parametrize("stated", ["imagenet", "mean=0.1,0.2,0.3,std=0.4,0.5,0.6", "pytorch-cifar", "cifar100", "half"])
def test_numbers_are_those_of_to_tensor_and_normalize(stated: str) -> None:
    p = Statement.parse(stated).over(zoo.preprocessing("keras-caffe", (3, 9, 8)), (3, 9, 8))
    image = picture(8, 9)
    chain = transforms.Compose([transforms.ToTensor(), transforms.Normalize(p.mean, p.std)])
    ours = normalise(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None], p)[0]
    assert torch.allclose(ours, chain(image), atol=1e-6, rtol=1e-6)


# Keras


@given(st.tuples(*[st.integers(1, 60)] * 4), st.sampled_from(["RGB", "L"]))
@settings(max_examples=40, deadline=None)
def test_pixels_without_antialiasing_are_those_of_torch(sizes: tuple[int, int, int, int], mode: str) -> None:
    width, height, wide, high = sizes
    pixels = np.array(picture(width, height, mode))
    planes = torch.from_numpy(pixels.reshape(height, width, -1)).permute(2, 0, 1)[None].float()
    exact = nn.functional.interpolate(planes, (high, wide), mode="bilinear", antialias=False)[0].permute(1, 2, 0).numpy()
    ours = sampled(pixels, high, wide).reshape(high, wide, -1)
    assert np.abs(ours - exact).max() <= 0.501
    np.testing.assert_array_equal(infer.sampled(pixels, high, wide).reshape(high, wide, -1), ours)


@pytest.fixture(scope="module")
def keras() -> Any:
    if importlib.util.find_spec("keras") is None:
        pytest.skip("keras is not installed: its pixels are not compared")
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    if keras.backend.backend() != "torch":
        pytest.skip("keras runs on another backend than torch")
    return keras


@pytest.mark.slow
def test_keras_networks_see_what_keras_loads(keras: Any, tmp_path: Path) -> None:
    """The default is what image_dataset_from_directory resizes with; the statements give load_img's pixels to the bit."""
    rng = np.random.default_rng(0)
    squash = zoo.preprocessing("keras-caffe", (3, 224, 224), squash=True)
    for _ in range(200):
        size = tuple(int(n) for n in rng.integers(20, 600, 2))
        shape = (3, *(int(n) for n in rng.integers(20, 300, 2)))
        picture(*size, seed=int(rng.integers(0, 99))).save(tmp_path / "picture.png")
        exact = keras.ops.image.resize(
            np.asarray(Image.open(tmp_path / "picture.png"), np.float32), shape[1:], interpolation="bilinear"
        )
        ours = decode(tmp_path / "picture.png", shape, squash)
        assert np.abs(ours - exact.cpu().numpy()).max() <= 0.51  # Keras counts in float32
        for name in ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"):
            loaded = keras.utils.load_img(tmp_path / "picture.png", target_size=shape[1:], interpolation=name)
            p = Statement.parse(f"interpolation={name},antialias=yes").over(squash, shape)
            np.testing.assert_array_equal(decode(tmp_path / "picture.png", shape, p), np.asarray(loaded), err_msg=name)


def test_a_keras_network_sees_the_whole_picture(tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    spec = zoo.spec("keras_resnet50", num_classes=2)
    path = tmp_path / "net.h5"
    keras_2_file(path, build_model(spec.replace(stages=tuple(stage[:1] for stage in spec.stages))), nested=False)
    loaded = load_checkpoint(path)
    p = loaded.spec.preprocessing
    assert (p.name, p.resize, p.interpolation, p.antialias) == ("keras-caffe", None, "bilinear", False)
    assert any("as a whole" in str(note) for note in loaded.provenance["notes"])
    save_checkpoint(loaded, tmp_path / "net.safetensors")
    for file in (path, tmp_path / "net.safetensors"):
        read = {s: load_checkpoint(file, preprocess=s).spec.preprocessing for s in ("rescale", "geometry=crop", "resize=232")}
        assert (read["rescale"].name, read["rescale"].resize, read["rescale"].antialias) == ("rescale", None, False)
        assert (read["geometry=crop"].name, read["geometry=crop"].resize) == ("keras-caffe", 256)
        assert read["resize=232"].resize == 232
    nearest = load_checkpoint(path, preprocess="interpolation=nearest")
    assert nearest.spec.preprocessing.antialias
    assert not any("as a whole" in str(note) for note in nearest.provenance["notes"])


# what CIFAR networks are taken to see


def cifar_state(arch: str, rename: dict[str, str], classes: int = 10) -> dict[str, torch.Tensor]:
    def renamed(key: str) -> str:
        for old, new in rename.items():
            key = key.replace(old, new)
        return key

    model = build_model(zoo.spec(arch, num_classes=classes))
    return {renamed(k): v for k, v in model.state_dict().items()}


CIFAR_10, CIFAR_100 = (0.4914, 0.4822, 0.4465), (0.5070, 0.4865, 0.4409)
LAYOUTS = {
    "kuangliu": ("resnet18_cifar", {"downsample": "shortcut", "fc.": "linear."}, 10, CIFAR_10, (0.2023, 0.1994, 0.2010)),
    "chenyaofo": ("resnet20_b", {}, 10, CIFAR_10, (0.2023, 0.1994, 0.2010)),
    "chenyaofo, 100 classes": ("resnet20_b", {}, 100, CIFAR_100, (0.2673, 0.2564, 0.2761)),
    "akamaster": ("resnet20", {"fc.": "linear."}, 10, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "torchvision's names": ("resnet18_cifar", {}, 10, CIFAR_10, (0.2470, 0.2435, 0.2616)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cifar_layouts_are_taken_to_use_the_numbers_of_their_code(layout: str, tmp_path: Path) -> None:
    arch, names, classes, mean, std = LAYOUTS[layout]
    torch.save(cifar_state(arch, names, classes), tmp_path / "net.pt")
    loaded = load_checkpoint(tmp_path / "net.pt")
    p = loaded.spec.preprocessing
    assert (p.mean, p.std, p.resize, p.assumed) == (mean, std, None, True)
    assert any(f"taken to be '{p.name}'" in str(note) for note in loaded.provenance["notes"])


# statements


@st.composite
def statements(draw: st.DrawFn) -> dict[str, Any]:
    """A mapping that can be stated of a 3x8x8 network; scale is the usual one."""
    share = st.floats(0.001, 1.0, allow_subnormal=False)
    found: dict[str, Any] = {}
    if draw(st.booleans()):
        found["name"] = draw(st.sampled_from(["imagenet", "cifar", "half", "rescale"]))
    if draw(st.booleans()):
        for key in ("mean", "std"):
            found[key] = draw(st.one_of(share, st.lists(share, min_size=3, max_size=3)))
    resize = draw(st.sampled_from([0, 8, 30, [8, 9], [40, 8], "none"]))
    if resize:
        found["resize"] = resize
    if draw(st.booleans()):
        found["interpolation"] = draw(st.sampled_from(FILTERS))
    if isinstance(resize, int) and draw(st.booleans()):
        found["geometry"] = draw(st.sampled_from(["crop", "squash"]))
    return found


@given(statements(), st.sampled_from([",", ":"]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_statement_means_the_same_as_text_as_mapping_and_as_stored(said: dict[str, Any], comma: str, named: bool) -> None:
    if not said:
        return
    assumed = zoo.preprocessing("imagenet", (3, 8, 8))
    parts = []
    for key, value in said.items():
        mark = "x" if key == "resize" else comma
        text = mark.join(map(str, value)) if isinstance(value, list) else str(value)
        parts.append(text if key == "name" and named else f"{key}={text}")
    from_text, from_mapping = Statement.parse(",".join(parts)), Statement.parse(said)
    bracketed = [f"{key}={value}" for key, value in said.items()]
    assert Statement.parse(", ".join(bracketed)) == from_text
    assert from_text == from_mapping == Statement.parse(str(from_text))
    p = from_mapping.over(assumed, (3, 8, 8))
    assert Preprocessing.model_validate_json(p.model_dump_json()) == p
    if "mean" in said:
        mean, std = ([v] * 3 if isinstance(v, float) else v for v in (said["mean"], said["std"]))
        assert (list(p.mean), list(p.std), p.name) == (mean, std, "custom")
    assert p.interpolation == said.get("interpolation", "bilinear")
    match said.get("resize"), said.get("geometry"):
        case None | "none" | 8 | [8, 8], "squash":
            assert p.resize is None
        case int(side), "squash":
            assert p.resize == (side, side)
        case list(pair), None:
            assert p.resize == tuple(pair)
        case int(side), _:
            assert p.resize == side
        case None, "crop":
            assert p.resize == zoo.usual_resize(8, 8)
        case _:
            assert p.resize is None


WRONG = {
    "": "states nothing",
    "imagent": "'imagenet'",
    "maen=0.5,std=0.5": "'mean'",
    "imagenet,interpolation=cubic": "'bicubic'",
    "mean=0.5": "mean without std",
    "std=0.5": "std without mean",
    "mean=0.5,0.5,std=0.5": "mean has 2 numbers, the network reads 3",
    "mean=0.5,std=0.5,0.5,0.5,0.5": "std has 4 numbers",
    "mean=0.5,std=0": "std holds 0",
    "mean=0.5,std=-0.25": "std holds -0.25",
    "mean=0.5,std=1/0": "no finite number",
    "mean=nan,std=0.5": "'nan', which is no number",
    "mean=inf,std=0.5": "'inf', which is no number",
    "mean=1e999,std=1": "no finite number",
    "mean=0_5,std=1": "no number",
    "mean=,std=1": "no number",
    "mean=-0.5,std=0.5": "mean of -0.5 is out of range",
    "mean=123.675,116.28,103.53,std=58.395,57.12,57.375": r"mean of 123.675 is out of range.*scale=1/255",
    "raw,mean=0.485,std=0.229": r"std of 0.229 is out of range.*0\.\.255",
    "mean=0,std=58": "std of 58 is out of range",
    "scale=0": "scale is 0",
    "scale=1": "std of 0.229 is out of range",
    "resize=200": "less than the input of 224x224",
    "resize=224x200": "less than the input",
    "resize=0": "resize is '0'",
    "resize=256.5": "resize is '256.5'",
    "resize=99999999999999999999": "resize is",
    "resize=256x256x3": "resize is",
    "geometry=crop,resize=none": "a crop with resize=none",
    "geometry=crop,resize=256x256": "a crop with resize=256x256",
    "geometry=pad": "known: crop, squash",
    "channel_order=gbr": "'bgr'",
    "interpolation=nearest,antialias=no": "nearest without antialiasing",
    "antialias=maybe": "antialias is 'maybe'",
    "imagenet,cifar": "'cifar' belongs to no key",
    "imagenet,0.5": "'0.5' belongs to no key",
    "resize=256,mean=0.5,std=0.5,resize=300": "'resize' stands twice",
    "imagenet,,resize=256": "empty part",
    "imagenet,resize=256,": "empty part",
}


@pytest.mark.parametrize("said", WRONG)
def test_what_no_network_can_mean_is_refused_by_name(said: str) -> None:
    with pytest.raises(BadInput, match=WRONG[said]) as caught:
        Statement.parse(said).over(zoo.preprocessing("imagenet", (3, 224, 224)), (3, 224, 224))
    assert caught.value.where == "--preprocess"
    assert caught.value.remedy


@pytest.mark.parametrize("said", [{"mean": {"a": 1}, "std": 1}, {"mean": [[0.5]], "std": 1}, {1: 2}, {"resize": True}, {}])
def test_mappings_that_state_nothing_are_refused(said: dict[Any, Any]) -> None:
    with pytest.raises(BadInput):
        Statement.parse(said)
    with pytest.raises(ConfigError, match="preprocess"):
        validate({"checkpoint": "a", "data": "b", "preprocess": said}, "test")


def test_every_key_is_a_field_and_has_words() -> None:
    assert set(KEYS) == {f.name for f in dataclasses.fields(Statement)} - {"where"}
    assert all(KEYS.values())


OWN = "mean=0.4,0.5,0.6,std=0.2,0.25,0.3,resize=80,interpolation=bicubic"


def own_numbers(p: Any) -> bool:
    p = p if isinstance(p, dict) else p.model_dump(mode="json")
    wanted = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "resize": 80, "interpolation": "bicubic", "name": "custom"}
    return all(p[key] == value for key, value in wanted.items()) and not p["assumed"]


@pytest.fixture
def network(tmp_path: Path) -> Path:
    torch.save(build_model(zoo.spec("resnet20_b", num_classes=2)).state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


def test_a_statement_goes_wherever_the_network_goes(network: Path, tmp_path: Path, rescompress: Callable[..., Any]) -> None:
    stated = ("--input", "3x64x64", "--preprocess", OWN)
    shown = rescompress("inspect", network, *stated, "--json")
    document = json.loads(shown.stdout)["preprocessing"]
    assert own_numbers(document)
    assert "shorter side resized to 80" in document["text"]
    assert "bicubic" in document["text"]
    loaded = load_checkpoint(network, input_shape=(3, 64, 64), preprocess=OWN)
    save_checkpoint(loaded, tmp_path / "net.safetensors")
    assert own_numbers(load_checkpoint(tmp_path / "net.safetensors").spec.preprocessing)
    model = to_onnx(loaded.spec, loaded.state_dict, None, ExportOptions())
    found = read_metadata(model)
    assert found is not None
    assert own_numbers(found.spec.preprocessing)
    document = {"checkpoint": str(network), "data": "builtin:digits"}
    texts = [
        validate({**document, "preprocess": said}, "test").preprocess
        for said in (OWN, {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "resize": 80, "interpolation": "bicubic"})
    ]
    assert texts[0] == texts[1]
    assert own_numbers(load_checkpoint(network, input_shape=(3, 64, 64), preprocess=texts[0]).spec.preprocessing)
    said = rescompress("inspect", network, "--preprocess", "maen=0.5", code=5)
    assert "'mean'" in said.stderr


def test_bytes_of_files_with_the_usual_antialiasing_stay(tmp_path: Path) -> None:
    usual = zoo.preprocessing("imagenet", (3, 224, 224))
    assert "antialias" not in json.loads(usual.model_dump_json())
    spec = zoo.spec("keras_resnet50")
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec
    assert not spec.preprocessing.antialias


def test_a_native_file_with_another_input_sees_as_much_as_the_file_it_came_from(network: Path, tmp_path: Path) -> None:
    save_checkpoint(load_checkpoint(network, input_shape=(3, 224, 224)), tmp_path / "net.safetensors")
    for side in (32, 63, 64, 97, 160, 225, 288):
        shape = (3, side, side)
        first, again = (load_checkpoint(f, input_shape=shape) for f in (network, tmp_path / "net.safetensors"))
        assert first.spec.preprocessing == again.spec.preprocessing, side
    own = load_checkpoint(network, input_shape=(3, 224, 224), preprocess="resize=232")
    save_checkpoint(own, tmp_path / "own.safetensors")
    assert load_checkpoint(tmp_path / "own.safetensors", input_shape=(3, 112, 112)).spec.preprocessing.resize == 116


def test_what_is_stated_about_an_onnx_file_counts(network: Path, tmp_path: Path, rescompress: Callable[..., Any]) -> None:
    pytest.importorskip("onnxruntime")
    loaded = load_checkpoint(network, input_shape=(3, 64, 64))
    save_checkpoint(loaded, tmp_path / "net.safetensors")
    model = tmp_path / "m.onnx"
    model.write_bytes(to_onnx(loaded.spec, loaded.state_dict, None, ExportOptions()).SerializeToString())
    seen = {}
    for name, stated in itertools.product(("net.safetensors", "m.onnx"), (None, "half", "geometry=squash", OWN)):
        runner, inputs, _ = _open(Opening(tmp_path / name, preprocess=stated), Settings(None), "auto", Silent())
        with runner:
            seen[name, stated] = inputs
    for stated in (None, "half", "geometry=squash", OWN):
        assert seen["m.onnx", stated] == seen["net.safetensors", stated]
    assert own_numbers(seen["m.onnx", OWN].preprocessing)
    for options, words in (
        (("--input", "3x32x32"), "reads inputs of 3x64x64"),
        (("--arch-option", "pad=end"), "--arch-option"),
        (("--preprocess", "resize=9"), "less than the input"),
    ):
        done = rescompress("evaluate", model, "--data", "builtin:digits", *options, code=5)
        assert words in done.stderr


# files


def contents() -> dict[str, bytes]:
    found = {}
    for name in (*FORMATS, "MPO"):
        buffer = io.BytesIO()
        options = {"save_all": True, "append_images": [picture(8, 8, seed=2)]} if name == "MPO" else {}
        try:
            picture(8, 8).save(buffer, name, **options)
        except (OSError, KeyError):
            continue  # this Pillow does not write it
        found[name] = buffer.getvalue()
    return found


@pytest.mark.parametrize("name", sorted(contents()))
def test_an_image_opens_under_the_suffix_of_another(name: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(contents()[name])
    size, p = (3, 8, 8), zoo.preprocessing("imagenet", (3, 8, 8))
    expected = np.asarray(pil_loader(str(path)))
    np.testing.assert_array_equal(decode(path, size, p), expected)
    about = {"input_shape": [3, 8, 8], "preprocessing": p.model_dump(mode="json")}
    with infer.open_image(str(path)) as image:
        np.testing.assert_array_equal(infer.fit(image, about), expected)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
DOS_HEAD = b"\xc5\xd0\xd3\xc6" + (32).to_bytes(4, "little") + len(POSTSCRIPT).to_bytes(4, "little") + bytes(20)
STRANGERS = {
    "PostScript": POSTSCRIPT,
    "PostScript for DOS": DOS_HEAD + POSTSCRIPT,
    "Photoshop": None,
    "text": b"<html>404</html>",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", STRANGERS)
@pytest.mark.parametrize("old", [False, True])
def test_what_is_no_image_is_refused_and_reaches_no_other_program(
    kind: str, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import EpsImagePlugin

    path = tmp_path / "photo.png"
    content = STRANGERS[kind]
    if content is None:
        head = b"8BPS\x00\x01" + bytes(6) + (3).to_bytes(2, "big") + (8).to_bytes(4, "big") * 2 + b"\x00\x08\x00\x03"
        content = head + bytes(12) + b"\x00\x00" + bytes(3 * 64)
    path.write_bytes(content)

    def run(*args: object, **_: object) -> None:
        raise AssertionError("another program was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    if not old:
        with pytest.raises(DataError, match="no image of a known kind") as caught:
            decode(path, (3, 8, 8), zoo.preprocessing("imagenet", (3, 8, 8)))
        assert caught.value.where == str(path)
    else:  # Pillow of an old board knows no list of formats
        real = Image.open

        def without_formats(name: str) -> Image.Image:
            return real(name)

        monkeypatch.setattr(Image, "open", without_formats)
    about = {"input_shape": [3, 8, 8], "preprocessing": Preprocessing().model_dump(mode="json")}
    with pytest.raises(infer.EngineError, match=r"photo\.png"):
        infer.read_image(str(path), about)


def test_a_large_picture_is_read_without_a_word(tmp_path: Path) -> None:
    """Pillow warns of more than 89 million pixels: a whole sensor has as many, and a warning of Python names no image."""
    pixels = Image.MAX_IMAGE_PIXELS
    assert pixels is not None
    path = tmp_path / "a.png"
    Image.new("L", (pixels // 64 + 64, 64)).save(path)
    code = f"from compress.pixels import picture; from pathlib import Path; print(picture(Path({str(path)!r}), 1).height)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # pytest has filters
    assert (done.stdout, done.stderr) == ("64\n", "")


def test_palettes_with_transparency_are_read_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "palette.png"
    picture(40, 40).quantize(8).save(path, transparency=bytes([0, 128, 255, 16, 32, 48, 64, 80]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.asarray(pil_loader(str(path)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(decode(path, (3, 40, 40), zoo.preprocessing("cifar", (3, 40, 40))), expected)


@pytest.mark.parametrize("size", [(200_000, 1), (1, 200_000)])
def test_a_picture_that_would_fill_the_memory_is_refused(size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "thin.png"
    Image.new("L", size).save(path)
    p = zoo.preprocessing("imagenet", (3, 224, 224))
    with pytest.raises(DataError, match="resized for this network it would be") as caught:
        decode(path, (3, 224, 224), p)
    assert caught.value.where == str(path)
    about = {"input_shape": [3, 224, 224], "preprocessing": p.model_dump(mode="json")}
    with pytest.raises(infer.EngineError, match=r"thin\.png.*it would be"):
        infer.read_image(str(path), about)
    assert decode(path, (3, 32, 32), zoo.preprocessing("cifar", (3, 32, 32))).shape == (32, 32, 3)


def test_no_image_is_opened_without_a_list_of_formats() -> None:
    """A new place that opens images goes through the two functions that have one."""
    root = Path(sys.modules["compress.pixels"].__file__ or "").parents[1]
    calls = [
        f"{path.relative_to(root)}: {line.strip()}"
        for package in ("compress", "export", "edge_targets", "rescompress")
        for path in (root / package).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "Image.open(" in line and "formats=" not in line
    ]
    assert calls == ["edge_targets/infer.py: image = Image.open(name)"]
