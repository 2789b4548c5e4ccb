"""Every system that is supported: loading gives the logits of the original implementation, and the same counts."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from compress import zoo
from compress.checkpoints import load_checkpoint, save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.resnet import build_model
from rescompress.core.layers import total_macs, total_params, walk

SLOW = pytest.mark.slow


def lively(model: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics of its own, so that a wrong order, side or epsilon shows in the logits."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            for tensor, low in (
                (module.weight, 0.5),
                (module.running_var, 0.5),
                (module.bias, -0.2),
                (module.running_mean, -0.2),
            ):
                assert tensor is not None
                tensor.data.copy_(low + torch.rand(tensor.shape, generator=generator) * 0.4)
    return model.eval()


def pictures(n: int, channels: int, side: int) -> Tensor:
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(1))


def conforms(
    path: Path,
    original: Callable[[Tensor], Tensor],
    side: int = 64,
    finish: Callable[[Tensor], Tensor] = lambda y: y,
    **options: Any,
) -> Checkpoint:
    """Load, and compare with the original: logits, bit-exact save and load, parameters and MACs as torch counts them."""
    loaded = load_checkpoint(path, input_shape=(3, side, side), **options)
    model = build_model(loaded.spec, loaded.state_dict)
    x = pictures(2, 3, side)
    x[1] *= 30  # images that differ, so that the outputs do
    with torch.no_grad():
        expected, found = original(x), finish(model(x))
    assert found.shape == expected.shape
    assert float(expected.max() - expected.min()) > 1e-3, "an original without variation proves nothing"
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.max() - expected.min())
    again = path.with_suffix(".again.safetensors")
    save_checkpoint(loaded, again)
    reloaded = load_checkpoint(again)
    assert reloaded.spec == loaded.spec
    assert all(torch.equal(reloaded.state_dict[k], v) for k, v in loaded.state_dict.items())
    layers = walk(loaded.spec)
    assert total_params(layers) == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x[:1])
    assert 2 * total_macs(layers) == counter.get_total_flops()
    return loaded


def same_counts(model: nn.Module, loaded: Checkpoint) -> None:
    assert sum(p.numel() for p in model.parameters()) == total_params(walk(loaded.spec))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pictures(1, *loaded.spec.input_shape[:2]))
    assert counter.get_total_flops() == 2 * total_macs(walk(loaded.spec))


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnext50_32x4d",
        pytest.param("resnet50", marks=SLOW),
        pytest.param("resnet34", marks=SLOW),
        pytest.param("resnet101", marks=SLOW),
        pytest.param("resnet152", marks=SLOW),
        pytest.param("wide_resnet50_2", marks=SLOW),
        pytest.param("wide_resnet101_2", marks=SLOW),
        pytest.param("resnext101_32x8d", marks=SLOW),
        pytest.param("resnext101_64x4d", marks=SLOW),
    ],
)
def test_torchvision(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lively(getattr(torchvision.models, name)(num_classes=11))
    torch.save(model.state_dict(), tmp_path / "net.pt")
    loaded = conforms(tmp_path / "net.pt", model)
    assert loaded.spec.arch == name
    assert loaded.spec == zoo.spec(name, num_classes=11, input_shape=(3, 64, 64))
    same_counts(model, loaded)


def test_bottlenecks_that_stride_in_their_first_convolution(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lively(torchvision.models.resnet50(num_classes=11))
    for name, module in model.named_modules():
        if isinstance(module, torchvision.models.resnet.Bottleneck) and module.stride == 2:
            module.conv1.stride, module.conv2.stride = (2, 2), (1, 1)
            assert name
    torch.save(model.state_dict(), tmp_path / "net.pt")
    loaded = conforms(tmp_path / "net.pt", model, arch_options={"stride_at": "0"})
    assert loaded.spec.arch == "resnet50_v1"
    same_counts(model, loaded)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18d",
        pytest.param("resnet50d", marks=SLOW),
        pytest.param("resnet200", marks=SLOW),
        pytest.param("resnet101d", marks=SLOW),
        pytest.param("resnet26t", marks=SLOW),
        pytest.param("resnet10t", marks=SLOW),
        pytest.param("resnet50c", marks=SLOW),
        pytest.param("resnext50d_32x4d", marks=SLOW),
        pytest.param("wide_resnet50_2", marks=SLOW),
    ],
)
def test_timm(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed: its networks are not compared")
    torch.manual_seed(0)
    model = lively(timm.create_model(name, num_classes=11))
    torch.save({"state_dict": model.state_dict(), "arch": name}, tmp_path / "net.pth.tar")
    loaded = conforms(tmp_path / "net.pth.tar", model)
    assert loaded.spec.arch == name
    same_counts(model, loaded)
    torch.save(model, tmp_path / "whole.pt")
    whole = load_checkpoint(tmp_path / "whole.pt", input_shape=(3, 64, 64)).spec
    assert not whole.preprocessing.assumed, "a network of timm says how its images are prepared"
    assert whole.replace(preprocessing=loaded.spec.preprocessing) == loaded.spec


class CifarBlock(nn.Module):
    """A basic block as CIFAR code has it; `names` are those of the projection, None for option A."""

    def __init__(self, before: int, planes: int, stride: int, projection: str | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.planes, self.name = planes, projection
        self.change = stride != 1 or before != planes
        if self.change and projection:
            setattr(self, projection, nn.Sequential(nn.Conv2d(before, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.change and self.name:
            x = getattr(self, self.name)(x)
        elif self.change:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.planes // 4, self.planes // 4))
        return F.relu(x + y)


class CifarNet(nn.Module):
    def __init__(self, depth: int, projection: str | None, head: str) -> None:
        super().__init__()
        self.conv1, self.bn1, self.head = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), head
        before = 16
        for stage, planes in enumerate((16, 32, 64), 1):
            blocks = []
            for i in range((depth - 2) // 6):
                blocks.append(CifarBlock(before, planes, 2 if stage > 1 and i == 0 else 1, projection))
                before = planes
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        setattr(self, head, nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return getattr(self, self.head)(x.mean((2, 3)))


@pytest.mark.parametrize("projection", [None, "downsample", "shortcut"])
@pytest.mark.parametrize(
    "depth", [20, 32, pytest.param(44, marks=SLOW), pytest.param(56, marks=SLOW), pytest.param(110, marks=SLOW)]
)
def test_cifar(depth: int, projection: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lively(CifarNet(depth, projection, "fc" if projection == "downsample" else "linear"))
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "net.th")
    loaded = conforms(tmp_path / "net.th", model, side=32)
    assert loaded.spec == zoo.spec(f"resnet{depth}" if projection is None else f"resnet{depth}_b")
    same_counts(model, loaded)


def test_zero_channels_at_the_end(tmp_path: Path) -> None:
    class AtEnd(CifarBlock):
        def forward(self, x: Tensor) -> Tensor:
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            if self.change:
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.planes // 2))
            return F.relu(x + y)

    torch.manual_seed(0)
    model = lively(CifarNet(20, None, "fc"))
    for block in model.modules():
        if isinstance(block, CifarBlock):
            block.__class__ = AtEnd
    torch.save(model.state_dict(), tmp_path / "net.pt")
    conforms(tmp_path / "net.pt", model, side=32, arch_options={"pad": "end"})


HEADS: dict[str, Callable[[], nn.Module]] = {
    "hidden": lambda: nn.Sequential(nn.Linear(512, 100), nn.ReLU(), nn.Dropout(0.5), nn.Linear(100, 10)),
    "several": lambda: nn.Sequential(
        nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10)
    ),
    "sigmoid": lambda: nn.Linear(512, 1),
    "dropout first": lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(512, 7)),
    "no bias": lambda: nn.Linear(512, 7, bias=False),
    "BatchNorm behind": lambda: nn.Sequential(nn.Linear(512, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3)),
    "BatchNorm before": lambda: nn.Sequential(nn.BatchNorm1d(512), nn.Dropout(0.25), nn.Linear(512, 32), nn.ReLU(),
                                              nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 3)),
    "none": nn.Identity,
}  # fmt: skip


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_heads(head: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    model.fc = head()
    lively(model)
    torch.save(model.state_dict(), tmp_path / "net.pt")
    conforms(tmp_path / "net.pt", model, arch_options={"head_bias": "no"})


def test_heads_with_modules_of_their_own(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = torchvision.models.resnet18()
            self.backbone.fc = nn.Identity()
            self.fc1, self.fc2 = nn.Linear(512, 40), nn.Linear(40, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(F.relu(self.fc1(self.backbone(x))))

    torch.manual_seed(0)
    model = lively(Net())
    torch.save({"model_state_dict": model.state_dict()}, tmp_path / "net.pt")
    assert conforms(tmp_path / "net.pt", model).spec.head.hidden == (40,)  # type: ignore[union-attr]


def test_fastai_and_children_in_a_sequential(tmp_path: Path) -> None:
    torch.manual_seed(0)
    children = list(torchvision.models.resnet18().children())
    bare = lively(nn.Sequential(*children[:-1], nn.Flatten()))
    torch.save(bare.state_dict(), tmp_path / "bare.pt")
    assert conforms(tmp_path / "bare.pt", bare).spec.head is None
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), HEADS["BatchNorm before"]())
    flat = nn.Sequential(*list(head.children())[:2], *list(head[2].children()))
    learner = lively(nn.Sequential(nn.Sequential(*children[:-2]), flat))
    torch.save({"model": learner.state_dict(), "opt": {"state": []}}, tmp_path / "learner.pth")
    conforms(tmp_path / "learner.pth", learner)


class ConcatPool(nn.Module):
    """As fastai's AdaptiveConcatPool2d: maxima, then averages."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([nn.functional.adaptive_max_pool2d(x, 1), nn.functional.adaptive_avg_pool2d(x, 1)], 1)


def test_fastai_s_own_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = [nn.BatchNorm1d(1024), nn.Dropout(0.25), nn.Linear(1024, 48, bias=False), nn.ReLU(), nn.BatchNorm1d(48)]
    head = nn.Sequential(ConcatPool(), nn.Flatten(), *parts, nn.Dropout(0.5), nn.Linear(48, 5, bias=False))
    learner = lively(nn.Sequential(nn.Sequential(*list(torchvision.models.resnet18().children())[:-2]), head))
    torch.save({"model": learner.state_dict(), "opt": {"state": []}}, tmp_path / "learner.pth")
    spec = conforms(tmp_path / "learner.pth", learner).spec
    assert spec.head is not None
    assert (spec.head.pool, spec.head.hidden) == ("max_avg", (48,))


def test_timm_s_concatenated_pooling(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed: its pooling is not compared")
    torch.manual_seed(0)
    model = lively(timm.create_model("resnet18", num_classes=5, global_pool="catavgmax"))
    torch.save(model.state_dict(), tmp_path / "net.pth")
    assert any("avg_max" in note for note in conforms(tmp_path / "net.pth", model).provenance["notes"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("names", [("stem", "blocks"), ("conv_in", "res_blocks"), ("conv1", "layers")])
def test_plain_blocks_without_batchnorm(names: tuple[str, str], tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.conv2(F.relu(self.conv1(x))))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, names[0], nn.Conv2d(3, 16, 3, padding=1))
            setattr(self, names[1], nn.Sequential(*[Plain() for _ in range(3)]))
            self.fc = nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(getattr(self, names[1])(F.relu(getattr(self, names[0])(x))).mean((2, 3)))

    torch.manual_seed(0)
    model = Net().eval()
    torch.save(model.state_dict(), tmp_path / "net.pt")
    loaded = conforms(tmp_path / "net.pt", model, side=32)
    assert not loaded.spec.blocks[0].batch_norm
    assert loaded.spec.blocks[0].conv_bias
    same_counts(model, loaded)


def huggingface_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename torchvision's keys to those of transformers' ResNet (modeling_resnet.py)."""
    renamed = {}
    for key, value in state.items():
        module, part = key.rsplit(".", 1)
        if module in ("conv1", "bn1"):
            module = f"resnet.embedder.embedder.{'convolution' if module == 'conv1' else 'normalization'}"
        elif module == "fc":
            module = "classifier.1"
        else:
            stage, block, *rest = module.removeprefix("layer").split(".")
            kind = "convolution" if rest in (["conv1"], ["conv2"], ["conv3"], ["downsample", "0"]) else "normalization"
            place = "shortcut" if rest[0] == "downsample" else f"layer.{int(rest[0][-1]) - 1}"
            module = f"resnet.encoder.stages.{int(stage) - 1}.layers.{block}.{place}.{kind}"
        renamed[f"{module}.{part}"] = value
    return renamed


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_huggingface_keys(name: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = lively(getattr(torchvision.models, name)(num_classes=11))
    save_file(huggingface_keys(model.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert conforms(tmp_path / "model.safetensors", model).spec.arch == name


@pytest.mark.slow
@pytest.mark.parametrize("basic", [True, False])
def test_huggingface_itself(basic: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: its ResNet is not compared")
    shape = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]} if basic else {}
    torch.manual_seed(0)
    model = lively(transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=11, **shape)))
    model.save_pretrained(tmp_path)
    loaded = conforms(tmp_path / "model.safetensors", lambda x: model(x).logits)
    assert loaded.spec.arch == ("resnet18" if basic else "resnet50")
    torch.save(model.resnet.state_dict(), tmp_path / "bare.bin")
    assert conforms(tmp_path / "bare.bin", lambda x: model.resnet(x).pooler_output.flatten(1)).spec.head is None


@pytest.fixture(scope="module")
def keras_models() -> dict[str, Any]:
    if importlib.util.find_spec("keras") is None:
        pytest.skip("keras is not installed: its networks are not compared")
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    if keras.backend.backend() != "torch":
        pytest.skip("keras runs on another backend than torch")
    keras.utils.set_random_seed(0)
    layers, rng = keras.layers, np.random.default_rng(0)
    shape = (64, 64, 3)
    backbone = keras.applications.ResNet50(weights=None, include_top=False, input_shape=shape)
    nested = keras.Sequential(
        [backbone, layers.GlobalAveragePooling2D(), layers.Dense(256, activation="relu"), layers.Dense(1, activation="sigmoid")]
    )
    nested.build((None, *shape))
    flat = keras.applications.ResNet50(weights=None, include_top=False, input_shape=shape, pooling="avg")
    hidden = layers.BatchNormalization()(layers.Dropout(0.3)(layers.Dense(32)(flat.output)))
    functional = keras.Model(flat.input, layers.Dense(4)(layers.Activation("relu")(hidden)))
    rescaled = keras.Sequential(
        [
            layers.Rescaling(1 / 255, input_shape=shape),
            keras.applications.ResNet50(weights=None, classes=7, input_shape=shape),
        ]
    )
    rescaled.build((None, *shape))
    models = {
        "plain": keras.applications.ResNet50(weights=None, classes=10, input_shape=shape),
        "nested": nested,
        "functional": functional,
        "rescaled": rescaled,
        "bare": flat,
        "resnet101": keras.applications.ResNet101(weights=None, classes=10, input_shape=shape),
        "resnet152": keras.applications.ResNet152(weights=None, classes=10, input_shape=shape),
    }
    for model in models.values():
        for weight in model.weights:
            part = weight.path.rsplit("/", 1)[-1]
            if part in ("gamma", "moving_variance"):
                weight.assign(0.5 + 0.5 * rng.random(weight.shape))
            elif part in ("beta", "bias", "moving_mean"):
                weight.assign(0.4 * rng.random(weight.shape) - 0.2)
    return models


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".h5", ".keras", ".weights.h5"])
@pytest.mark.parametrize("name", ["plain", "nested", "functional", "rescaled", "bare", "resnet101", "resnet152"])
def test_keras_itself(name: str, suffix: str, keras_models: dict[str, Any], tmp_path: Path) -> None:
    model, path = keras_models[name], tmp_path / f"model{suffix}"
    if suffix == ".weights.h5":
        if name in ("functional", "rescaled"):
            pytest.skip("a file of weights alone does not say where BatchNorm or Rescaling stand")
        model.save_weights(path)
    else:
        model.save(path)

    def original(x: Tensor) -> Tensor:
        x = x * 255 if name == "rescaled" else x
        return torch.as_tensor(np.asarray(model(x.permute(0, 2, 3, 1).numpy(), training=False).detach()))

    finish = {"functional": lambda y: y, "bare": lambda y: y, "nested": torch.sigmoid}
    loaded = conforms(path, original, finish=finish.get(name, lambda y: y.softmax(1)))
    assert loaded.spec.arch == f"keras_{name if name.startswith('resnet') else 'resnet50'}"
    assert loaded.spec.preprocessing.name == ("rescale" if name == "rescaled" else "keras-caffe")
    told = any("does not say how images were prepared" in note for note in loaded.provenance["notes"])  # type: ignore[attr-defined]
    assert told == (name != "rescaled")


def keras_2_file(path: Path, model: nn.Module, *, nested: bool, old_names: bool = False) -> None:
    """Write a torch ResNet as tf.keras 2 writes it: ``model_weights/<layer>/<layer>/kernel:0``."""
    h5py = pytest.importorskip("h5py")
    parts = {"weight": "gamma:0", "bias": "beta:0", "running_mean": "moving_mean:0", "running_var": "moving_variance:0"}
    with h5py.File(path, "w") as f:
        root = f.create_group("model_weights")
        root.attrs["layer_names"] = [b"resnet50", b"dense"] if nested else [b"conv1_conv"]
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                layer, tensors = "dense", {"kernel:0": module.weight.t(), "bias:0": module.bias}
            elif isinstance(module, nn.Conv2d):
                layer, tensors = (
                    keras_name(name, old_names),
                    {"kernel:0": module.weight.permute(2, 3, 1, 0), "bias:0": module.bias},
                )
            elif isinstance(module, nn.BatchNorm2d):
                layer, tensors = (
                    keras_name(name, old_names),
                    {parts[k]: v for k, v in module.state_dict().items() if k in parts},
                )
            else:
                continue
            group = root.require_group("resnet50" if nested and layer != "dense" else layer).require_group(layer)
            for part, value in tensors.items():
                group[part] = value.detach().numpy()


def keras_name(name: str, old: bool) -> str:
    if name in ("conv1", "bn1"):
        return {"conv1": "conv1", "bn1": "bn_conv1"}[name] if old else f"conv1_{'bn' if name == 'bn1' else 'conv'}"
    stage, block, rest = name.removeprefix("layer").split(".", 2)
    bn = rest.startswith("bn") or rest == "downsample.1"
    index = 0 if rest.startswith("downsample") else int(rest[-1])
    if old:
        branch = "1" if index == 0 else "2" + "abc"[index - 1]
        return f"{'bn' if bn else 'res'}{int(stage) + 1}{chr(ord('a') + int(block))}_branch{branch}"
    return f"conv{int(stage) + 1}_block{int(block) + 1}_{index}_{'bn' if bn else 'conv'}"


@pytest.mark.parametrize("form", [pytest.param("flat", marks=SLOW), "nested", pytest.param("old names", marks=SLOW)])
def test_keras_2_layouts(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = zoo.spec("keras_resnet50", num_classes=5, input_shape=(3, 64, 64))
    if form == "old names":
        spec = spec.replace(bn_eps=1e-3)
    model = lively(build_model(spec))
    keras_2_file(tmp_path / "model.h5", model, nested=form == "nested", old_names=form == "old names")
    assert conforms(tmp_path / "model.h5", model).spec == spec
