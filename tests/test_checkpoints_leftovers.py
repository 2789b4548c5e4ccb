"""What a file holds beside the network that is read: it is used, named in a warning, or the file is refused by that name."""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from compress import zoo
from compress.checkpoints import load_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.data import normalise
from compress.resnet import build_model, tensors_of
from rescompress.core.errors import CheckpointError

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    """A small ResNet as people write one."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.layer1 = nn.Sequential(Block(), Block())
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.layer1(self.relu(self.bn1(self.conv1(x))))).flatten(1))


def net(made: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    model = made()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.6, 1.4)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)  # type: ignore[no-any-return]


def read(content: object, folder: Path, **options: Any) -> Checkpoint:
    torch.save(content, folder / "net.pt")
    return load_checkpoint(folder / "net.pt", **options)


def same(content: object, folder: Path, wanted: Tensor) -> Checkpoint:
    loaded = read(content, folder)
    found = logits(build_model(loaded.spec, loaded.state_dict))
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    return loaded


class Behind(nn.Module):
    """A network, and something in front of it, behind it, or beside it."""

    def __init__(self, model: nn.Module, **parts: nn.Module) -> None:
        super().__init__()
        self.model = model
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)  # type: ignore[no-any-return]


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


COMPUTE: dict[str, dict[str, Tensor]] = {
    "BatchNorm on the input": nn.BatchNorm2d(3).state_dict(prefix="bn0."),
    "GeM": {"avgpool.p": torch.tensor([3.0])},
    "linear SE": nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8)).state_dict(prefix="se."),
    "PReLU": {"prelu.weight": torch.full((8,), 0.25)},
    "own normalisation": {"mean": torch.zeros(3), "std": torch.ones(3)},
    "temperature": {"log_temperature": torch.tensor(0.3)},
    "a gate": {"gate.alpha": torch.tensor(0.3)},
}


@pytest.mark.parametrize("what", COMPUTE)
def test_parts_that_are_not_understood_are_refused_by_name(what: str, tmp_path: Path) -> None:
    for prefix in ("", "module."):
        state = {f"{prefix}{k}": v for k, v in (net().state_dict() | COMPUTE[what]).items()}
        with pytest.raises(CheckpointError, match=next(iter(COMPUTE[what]))) as refused:
            read({"state_dict": state}, tmp_path)
        assert refused.value.exit_code == 5


ASIDE: dict[str, dict[str, Tensor]] = {
    "auxiliary head": {"aux_head.weight": torch.ones(10, 8), "aux_head.bias": torch.ones(10)},
    "loss": {"criterion.weight": torch.rand(10)},
    "arc face": {"arcface.weight": torch.rand(10, 8)},
    "centers": {"center_loss.centers": torch.rand(10, 8)},
    "metric": {"val_acc.confmat": torch.zeros(10, 10)},
    "another head": {"fc_colour.weight": torch.ones(4, 8), "fc_colour.bias": torch.ones(4)},
    "queue": {"queue": torch.ones(16, 8)},
    "integers": {"mask": torch.ones(5, dtype=torch.long)},
}


@pytest.mark.parametrize("what", ASIDE)
def test_what_only_training_needs_is_left_out_and_told(what: str, tmp_path: Path) -> None:
    loaded = same(net().state_dict() | ASIDE[what], tmp_path, logits(net()))
    assert next(iter(ASIDE[what])) in " ".join(loaded.provenance["warnings"])  # type: ignore[arg-type]


def test_a_layer_beside_the_network_is_refused_unless_the_root_is_named(tmp_path: Path) -> None:
    state = Behind(net(), before=nn.BatchNorm2d(3)).state_dict()
    with pytest.raises(CheckpointError, match=r"before\.weight"):
        read(state, tmp_path)
    told = read(state, tmp_path, arch_options={"root": "model"}).provenance["warnings"]
    assert "before.weight" in " ".join(told)  # type: ignore[arg-type]
    plain = {"model": net().state_dict(), "best_acc": torch.tensor(0.5), "criterion": {"weight": torch.rand(10)}}
    assert same(plain, tmp_path, logits(net())).provenance["warnings"] == []


def test_a_segmenter_s_backbone_is_dilated(tmp_path: Path) -> None:
    state = Behind(net(), aspp=nn.Sequential(nn.Conv2d(8, 8, 3, dilation=2))).state_dict()
    with pytest.raises(CheckpointError, match="dilated"):
        read(state, tmp_path, arch_options={"root": "model"})
    read(state, tmp_path, arch_options={"root": "model", "strides": "1"})


def test_a_batch_norm_without_factors(tmp_path: Path) -> None:
    model = net()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            bare = nn.BatchNorm2d(8, affine=False)
            bare.running_mean, bare.running_var = module.running_mean, module.running_var
            model.set_submodule(name, bare.eval())
    same(model.state_dict(), tmp_path, logits(model))
    same(model, tmp_path, logits(model))


@pytest.mark.parametrize("whole", [False, True])
def test_masks_of_torch_prune_are_applied(whole: bool, tmp_path: Path) -> None:
    model = net()
    for module in (model.layer1[0].conv1, model.fc):  # type: ignore[index, union-attr]
        torch_prune.l1_unstructured(module, "weight", amount=0.5)
    loaded = same(model if whole else model.state_dict(), tmp_path, logits(model))
    assert int((loaded.state_dict["fc.weight"] == 0).sum()) == 40


@pytest.mark.parametrize(
    "key", ["conv1.activation_post_process.scale", "conv1.weight_fake_quant.scale", "layer1.0.conv1.input_quantizer._amax"]
)
def test_fake_quantizers_of_others_are_refused_by_name(key: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="prepared for quantization by another tool"):
        read(net().state_dict() | {key: torch.ones(1)}, tmp_path)


NESTED: dict[str, Callable[[nn.Module], object]] = {
    "dict": lambda m: {"model": m, "epoch": 3, "optimizer": {"lr": 0.1}},
    "DataParallel": nn.DataParallel,
    "Lightning": lambda m: Behind(m, criterion=nn.CrossEntropyLoss(weight=torch.rand(10))),
    "EMA alone": lambda m: {"model": None, "ema": m},
    "list": lambda m: [m, copy.deepcopy(m)],
    "deep": lambda m: {"state": {"net": Behind(Behind(m))}},
    "ModuleList": lambda m: nn.ModuleList([m]),
}


@pytest.mark.parametrize("where", NESTED)
def test_a_whole_module_inside_of_anything_is_read(where: str, tmp_path: Path) -> None:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(NESTED[where](model), tmp_path, logits(model))
    model.relu = nn.SiLU()
    with pytest.raises(CheckpointError, match="SiLU"):
        read(NESTED[where](model), tmp_path)


@pytest.mark.parametrize(
    ("part", "words"), [({"act": nn.Tanh()}, "act is Tanh"), ({"swish": Swish()}, "swish is of a class of its own")]
)
def test_modules_outside_of_the_network_are_looked_at(part: dict[str, nn.Module], words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        read(Behind(net(), **part), tmp_path)
    inside = net()
    inside.add_module(*next(iter(part.items())))
    with pytest.raises(CheckpointError, match=words):
        read(inside, tmp_path)


# --- names of classes and other facts -------------------------------------------------------------------------------------

NAMES = ["truck", "cat", "ship", "bird", "airplane", "horse", "frog", "dog", "deer", "automobile"]
TO = {name: i for i, name in enumerate(NAMES)}
FROM = dict(enumerate(NAMES))
PLACES: dict[str, dict[str, object]] = {
    "numpy": {"classes": np.array(NAMES)},
    "numpy objects": {"classes": np.array(NAMES, dtype=object)},
    "numpy bytes": {"classes": np.array(NAMES, dtype="S12")},
    "names": {"names": FROM},
    "labels": {"labels": NAMES},
    "vocab": {"vocab": NAMES},
    "categories": {"meta": {"categories": NAMES}},
    "label_map": {"label_map": TO},
    "idx2label": {"idx2label": FROM},
    "id_to_name of text": {"id_to_name": {str(i): n for i, n in FROM.items()}},
    "Namespace": {"args": argparse.Namespace(classes=NAMES, lr=0.1)},
    "nested": {"config": {"data": {"class_names": NAMES}}},
    "hparams": {"hparams": {"label2idx": TO}},
    "tensors": {"class_to_idx": {n: torch.tensor(i) for n, i in TO.items()}},
    "numpy numbers": {"class_to_idx": {n: np.int64(i) for n, i in TO.items()}},
    "a name of its own": {"metadata": {"my_class_mapping": TO}},
    "titles beside": {"class_to_idx": TO, "cat_to_name": {n: n.upper() for n in NAMES}},
    "twice the same": {"class_to_idx": TO, "classes": NAMES},
}


@pytest.mark.parametrize("where", PLACES)
def test_names_of_classes_are_found(where: str, tmp_path: Path) -> None:
    loaded = read({"state_dict": net().state_dict(), **PLACES[where]}, tmp_path)
    assert loaded.spec.labels == tuple(NAMES)
    assert loaded.provenance["warnings"] == []


def test_names_of_classes_in_a_safetensors_header(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(net().state_dict(), tmp_path / "net.safetensors", metadata={"class_names": str(NAMES).replace("'", '"')})
    assert load_checkpoint(tmp_path / "net.safetensors").spec.labels == tuple(NAMES)


def test_contradictory_names_of_classes(tmp_path: Path) -> None:
    state = net().state_dict()
    with pytest.raises(CheckpointError, match=r"classes.*another order"):
        read({"state_dict": state, "class_to_idx": TO, "classes": sorted(NAMES)}, tmp_path)
    loaded = read({"state_dict": state, "class_to_idx": TO, "class_names": [n.upper() + "!" for n in NAMES]}, tmp_path)
    assert loaded.spec.labels == tuple(NAMES)
    assert "class_names has other names" in " ".join(loaded.provenance["warnings"])  # type: ignore[arg-type]
    others = {"metric_names": [f"m{i}" for i in range(10)], "param_names": NAMES, "layers": NAMES}
    assert read({"state_dict": state, **others}, tmp_path).spec.labels is None


IMAGENET = (123.675, 116.28, 103.53)


@pytest.mark.parametrize(
    ("stated", "order"),
    [
        ({"mean": IMAGENET, "std": (58.4, 57.1, 57.4)}, "rgb"),
        ({"PIXEL_MEAN": IMAGENET[::-1], "PIXEL_STD": (1.0, 1.0, 1.0)}, "bgr"),
        ({"mean": (0.406, 0.456, 0.485), "std": (0.225, 0.224, 0.229)}, "bgr"),
        ({"mean": IMAGENET[::-1], "std": (1.0,) * 3, "to_rgb": False}, "bgr"),
        ({"mean": (90.0, 100.0, 110.0), "std": (50.0,) * 3, "bgr_to_rgb": False}, "bgr"),
        ({"mean": (90.0, 100.0, 110.0), "std": (50.0,) * 3, "input_format": "BGR"}, "bgr"),
        ({"mean": (90.0, 100.0, 110.0), "std": (50.0,) * 3, "to_rgb": True}, "rgb"),
        ({"mean": (90.0, 100.0, 110.0), "std": (50.0,) * 3}, "rgb"),
    ],
)
def test_the_order_of_channels_is_that_of_the_means(stated: dict[str, Any], order: str, tmp_path: Path) -> None:
    """detectron2 and mmcv state the means of OpenCV's BGR images; the same picture gives the same numbers in torch."""
    found = read({"state_dict": net().state_dict(), "cfg": stated}, tmp_path)
    p = found.spec.preprocessing
    assert (p.channel_order, p.assumed) == (order, False)
    pixels = torch.randint(0, 256, (1, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for k, v in stated.items() if isinstance(v, tuple))
    read_by_opencv = pixels.flip(1) if order == "bgr" else pixels
    unit = 1 / 255 if float(mean.max()) < 2 else 1.0
    wanted = (read_by_opencv * unit - mean) / std
    torch.testing.assert_close(normalise(pixels, p), wanted, rtol=1e-4, atol=1e-4)
    assert ("BGR" in str(found.provenance["notes"])) == (order == "bgr")


def test_two_classes_of_one_name_are_told(tmp_path: Path) -> None:
    """As the two cranes among ImageNet's names: what a folder called so means is open."""
    loaded = read({"state_dict": net().state_dict(), "classes": [*NAMES[:-1], NAMES[0]]}, tmp_path)
    assert loaded.spec.labels is None
    assert f"'{NAMES[0]}' among them 2 times" in str(loaded.provenance["notes"])


def test_stated_sizes_and_normalisation_count(tmp_path: Path) -> None:
    args = argparse.Namespace(img_size=64, mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.1], interpolation="bicubic", crop_pct=0.9)
    loaded = read({"state_dict": net().state_dict(), "args": args}, tmp_path)
    found = loaded.spec.preprocessing
    assert loaded.spec.input_shape == (3, 64, 64)
    assert (found.mean, found.std, found.scale) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1), 1 / 255)
    assert (found.resize, found.interpolation, found.assumed) == (71, "bicubic", False)
    assert not any("taken to be" in n for n in loaded.provenance["notes"])  # type: ignore[attr-defined]
    user = read({"state_dict": net().state_dict(), "args": args}, tmp_path, input_shape=(3, 48, 48), preprocess="half")
    assert (user.spec.input_shape, user.spec.preprocessing.name) == ((3, 48, 48), "half")
    torn = read({"state_dict": net().state_dict(), "args": {"img_size": 64}, "cfg": {"image_size": 96}}, tmp_path)
    assert torn.spec.input_shape == (3, 32, 32)
    assert "input size" in " ".join(torn.provenance["warnings"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"arch": "resnetblur50"}, "resnetblur50"),
        ({"args": argparse.Namespace(model="resnetaa50d")}, "resnetaa50d"),
        ({"hyper_parameters": {"backbone": "deeplabv3_resnet50"}}, "deeplabv3"),
        ({"config": {"model": {"output_stride": 8}}}, "output_stride"),
        ({"args": {"act_layer": "silu"}}, "act_layer"),
        ({"args": argparse.Namespace(output_stride="16")}, "output_stride"),
        ({"args": {"replace_stride_with_dilation": (False, False, True)}}, "replace_stride_with_dilation"),
        ({"hyper_parameters": {"replace-stride-with-dilation": "[False, False, True]"}}, "dilation"),
        ({"cfg": {"MODEL": {"BACKBONE": {"LAST_STRIDE": 1}}}}, "LAST_STRIDE"),
        ({"meta": {"config": "model = dict(\n  backbone=dict(depth=50, dilations=(1, 1, 2, 4)))"}}, "dilations"),
        ({"config": "backbone:\n  depth: 50\n  strides: [1, 2, 1]\n"}, "strides"),
        ({"args": {"strides": [1, 2, 1]}}, "strides"),
        ({"args": {"dilated": True}}, "dilated"),
    ],
)
def test_a_variant_that_no_tensor_shows_is_refused_by_name(stated: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        read({"state_dict": net().state_dict(), **stated}, tmp_path)
    for plain in ("resnet50", "tv_resnet50", "resnet50.a1_in1k", "resnext50_32x4d", "wide_resnet50_2", "resnet50d"):
        read({"state_dict": net().state_dict(), "arch": plain}, tmp_path)
    usual = {"dilation": 1, "strides": [1, 2, 2], "output_stride": 32, "dilated": False, "last_stride": 2, "multi_grid": None}
    text = "model = dict(backbone=dict(dilations=(1, 1, 1), strides=(1, 2, 2)), dilation=1, neck=dict(strides=(4, 8, 16)))"
    usual |= {"neck_cfg": {"strides": [8, 16, 32]}, "model": {"multi_grid": [1, 1, 1]}}
    read({"state_dict": net().state_dict(), "args": usual, "meta": {"config": text}}, tmp_path)


@pytest.mark.parametrize("last", ["2", "1", "dilated"])
def test_strides_that_no_tensor_shows_are_noted(last: str, tmp_path: Path) -> None:
    from torchvision.models.resnet import Bottleneck, ResNet

    dilated = [False, False, last == "dilated"]
    model = net(
        lambda: ResNet(Bottleneck, [1, 1, 1, 2], num_classes=5, width_per_group=4, replace_stride_with_dilation=dilated)
    )
    if last == "1":
        for name in ("conv2", "downsample.0"):
            model.layer4[0].get_submodule(name).stride = (1, 1)  # type: ignore[union-attr,index]

    def equal(loaded: Checkpoint) -> bool:
        return torch.allclose(logits(build_model(loaded.spec, loaded.state_dict)), logits(model), rtol=0, atol=1e-5)

    loaded = read(model.state_dict(), tmp_path)
    assert any("strides 1,2,2,2" in note and "dilation" in note for note in loaded.provenance["notes"])  # type: ignore[attr-defined]
    assert torch.allclose(logits(build_model(loaded.spec, loaded.state_dict)), logits(model), rtol=0, atol=1e-5) == (
        last == "2"
    )
    with pytest.raises(CheckpointError, match="last_stride is '1'"):
        read({"state_dict": model.state_dict(), "args": {"last_stride": 1}}, tmp_path)
    said = {"strides": "1,2,2,1"}
    stated = read({"state_dict": model.state_dict(), "args": {"last_stride": 1}}, tmp_path, arch_options=said)
    assert torch.allclose(logits(build_model(stated.spec, stated.state_dict)), logits(model), rtol=0, atol=1e-5) == (
        last == "1"
    )
    assert not any("dilation" in note for note in stated.provenance["notes"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["deeplabv3_resnet50_coco", "resnet50-os8", "fcn_resnet101", "resnet50_dilated", "reid_r50"])
def test_a_file_named_after_a_variant_is_read_with_a_warning(name: str, tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / f"{name}.pth")
    assert any("file's name" in w for w in load_checkpoint(tmp_path / f"{name}.pth").provenance["warnings"])  # type: ignore[attr-defined]
    torch.save(net().state_dict(), tmp_path / "resnet50-0676ba61.pth")
    assert load_checkpoint(tmp_path / "resnet50-0676ba61.pth").provenance["warnings"] == []


# --- property -------------------------------------------------------------------------------------------------------------

EXTRA = st.tuples(
    st.sampled_from(["neck", "bn0", "gem", "scale_layer", "aux", "criterion", "loss_fn", "metric", "ema_head", "embedding"]),
    st.sampled_from(["weight", "bias", "p", "running_mean", "centers"]),
    st.sampled_from([(), (1,), (8,), (10, 8)]),
    st.sampled_from([torch.float32, torch.float16, torch.int64]),
)
WRAPS: list[Callable[[dict[str, Tensor]], object]] = [
    lambda s: s,
    lambda s: {"state_dict": s, "epoch": 3},
    lambda s: {"model": {f"module.{k}": v for k, v in s.items()}, "optimizer": {"state": {}}},
    lambda s: [{"net": s}, 5],
    lambda s: {"a": {"b": {f"_orig_mod.backbone.{k}": v for k, v in s.items()}}},
]


def holds(extras: list[Any], wrap: int, dropped: str | None, folder: Path) -> None:
    """Read a file with odd tensors in it: right outputs and a word on each of them, or a refusal that names one."""
    state = {k: v for k, v in net().state_dict().items() if k != dropped}
    odd = {f"{module}.{part}": torch.full(shape, 2, dtype=dtype) for module, part, shape, dtype in extras}
    refused, loaded = "", None
    try:
        loaded = read(WRAPS[wrap](state | odd), folder)
    except CheckpointError as e:
        refused = str(e)
    if loaded is None:
        assert dropped is not None or any(key in refused for key in odd), refused
        return
    assert dropped is None or dropped.endswith("num_batches_tracked")
    found, wanted = logits(build_model(loaded.spec, loaded.state_dict)), logits(net())
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5)
    told = " ".join(loaded.provenance["warnings"])  # type: ignore[arg-type]
    assert not odd or any(key in told for key in odd)
    inside = [k for k, v in odd.items() if v.is_floating_point() and not k.endswith(".centers")]
    trained = [k for k in inside if k.split(".")[0] in ("neck", "bn0", "gem", "embedding", "scale_layer")]
    assert not trained, f"{trained} change what the network computes"


KEYS = st.one_of(st.none(), st.sampled_from(sorted(net().state_dict())))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(EXTRA, max_size=2), st.integers(0, len(WRAPS) - 1), KEYS)
def test_odd_files(tmp_path: Path, extras: list[Any], wrap: int, dropped: str | None) -> None:
    holds(extras, wrap, dropped, tmp_path)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(EXTRA, max_size=4), st.integers(0, len(WRAPS) - 1), KEYS)
def test_many_odd_files(tmp_path: Path, extras: list[Any], wrap: int, dropped: str | None) -> None:
    holds(extras, wrap, dropped, tmp_path)


# --- archives with a graph ------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.m = model

    def forward(self, x: Tensor) -> Tensor:
        return self.m((x - 0.5) / 0.25)  # type: ignore[no-any-return]


def with_epsilon() -> nn.Module:
    model = net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-2
    return model


def with_silu() -> nn.Module:
    model = net()
    model.relu = nn.SiLU()
    return model


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "normalisation": lambda: Normed(net()),
    "epsilon": with_epsilon,
    "SiLU": with_silu,
    "tanh": lambda: nn.Sequential(net(), nn.Tanh()),
}


def archive(model: nn.Module, how: str, folder: Path) -> Path:
    path = folder / ("net.pt2" if how == "export" else "net.pt")
    if how == "export":
        torch.export.save(torch.export.export(model, (X[:1],)), path)
    else:
        torch.jit.save(torch.jit.script(model) if how == "script" else torch.jit.trace(model, X[:1]), path)
    return path


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace", pytest.param("export", marks=pytest.mark.slow)])
def test_an_archive_s_own_graph_is_compared(how: str, tmp_path: Path) -> None:
    fitting = {"plain": net()} | ({"softmax": nn.Sequential(net(), nn.Softmax(1))} if how != "script" else {})
    for name, plain in fitting.items():
        loaded = load_checkpoint(archive(plain, how, tmp_path), input_shape=(3, 32, 32))
        assert torch.equal(logits(build_model(loaded.spec, loaded.state_dict)), logits(net()))
        assert any("softmax" in text for text in loaded.provenance["warnings"]) == (name == "softmax")  # type: ignore[attr-defined]
        assert not any("not compared" in text for text in loaded.provenance["warnings"])  # type: ignore[attr-defined]
    for name in {"script": ["SiLU", "tanh"], "trace": ["normalisation", "epsilon"]}.get(how, list(OTHERS)):
        other = OTHERS[name]().eval()  # what its weights say is something else, so its graph is read
        loaded = load_checkpoint(archive(other, how, tmp_path), input_shape=(3, 32, 32))
        with torch.no_grad():
            wanted = other(X)
        off = (logits(build_model(loaded.spec, loaded.state_dict)) - wanted).abs().max() / wanted.abs().max()
        assert float(off) < 1e-5, name
        assert "proven against the archive's own graph" in str(loaded.provenance["notes"])
    load_checkpoint(archive(with_epsilon(), how, tmp_path), input_shape=(3, 32, 32), arch_options={"bn_eps": "1e-2"})


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_an_archive_that_would_write_a_file_is_not_run(tmp_path: Path) -> None:
    class Writes(nn.Module):
        def __init__(self, path: str) -> None:
            super().__init__()
            self.m, self.path = net(), path

        def forward(self, x: Tensor) -> Tensor:
            torch.save(x, self.path)
            return self.m(x)  # type: ignore[no-any-return]

    target = tmp_path / "written"
    loaded = load_checkpoint(archive(Writes(str(target)).eval(), "script", tmp_path), input_shape=(3, 32, 32))
    assert not target.exists()
    assert "uses save, so it was not compared" in " ".join(loaded.provenance["warnings"])  # type: ignore[arg-type]


def test_the_zoo_s_own_files_are_as_before(tmp_path: Path) -> None:
    model = build_model(zoo.spec("resnet20"))
    loaded = read({"state_dict": tensors_of(model)}, tmp_path)
    assert loaded.spec == zoo.spec("resnet20")
    assert loaded.provenance["warnings"] == []
