"""Trunks of five programs that people deploy, pruned to 0.7 of the MACs, in INT8, and put back: how far the whole moves.

Random weights (their BatchNorm measured on the photographs), real photographs without their labels, onnxruntime on one thread:

    python benchmarks/trunks.py --data ../shared/data/imagenette/val --side 96 --images 32 [NAME ...]

`trained_policy` is the policy with the weights of a trained classifier in its trunk (`--weights`, a ResNet-18 of torchvision).
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torchvision
from torch import Tensor, nn

from compress.checkpoints import load_checkpoint
from compress.data import Split, load_dataset
from compress.evaluate import TorchRunner
from compress.fidelity import fidelity
from compress.prune import prune
from compress.quantize import fake_quant_model, on_grid, ptq
from compress.resnet import build_model
from export.host import compare_hosts, fitting, with_trunk
from export.to_onnx import ExportOptions
from rescompress.core.layers import total_macs
from rescompress.core.settings import PruneSettings, QuantizeSettings
from rescompress.runs.stages.shared import onnx_of

MEAN_STD = "mean=0.485,0.456,0.406,std=0.229,0.224,0.225"


class Detector(nn.Module):
    """Faster R-CNN behind its resizing: boxes, scores and classes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what the program answers."""
        sizes = [(int(x.shape[2]), int(x.shape[3]))]
        images = torchvision.models.detection.image_list.ImageList(x, sizes)
        features = OrderedDict(self.model.backbone(x))
        proposals, _ = self.model.rpn(images, features)
        found, _ = self.model.roi_heads(features, proposals, sizes)
        return found[0]["boxes"], found[0]["scores"], found[0]["labels"]


class OneStage(nn.Module):
    """RetinaNet behind its resizing: what its head says of every anchor, and the best anchors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what the program answers."""
        found = self.model.head(list(self.model.backbone(x).values()))
        scores = found["cls_logits"].sigmoid()
        return scores, found["bbox_regression"], scores.amax(2).topk(100, 1)[0]


class Segmenter(nn.Module):
    """DeepLabV3: scores and class of each pixel."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what the program answers."""
        scores = self.model(x)["out"]
        return scores, scores.argmax(1)


class Patches(nn.Module):
    """As PatchCore: features of two layers side by side, and how far each is from a bank of good ones."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.register_buffer("bank", torch.randn(200, 1536, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what the program answers."""
        t = self.trunk
        x = t.layer1(t.maxpool(t.relu(t.bn1(t.conv1(x)))))
        fine = t.layer2(x)
        coarse = t.layer3(fine)
        pooled = [nn.functional.avg_pool2d(v, 3, 1, 1) for v in (fine, coarse)]
        pooled[1] = nn.functional.interpolate(pooled[1], size=pooled[0].shape[-2:], mode="bilinear")
        rows = torch.cat(pooled, 1).flatten(2).transpose(1, 2)
        square = (rows**2).sum(2, keepdim=True) - 2 * rows @ self.bank.T + (self.bank**2).sum(1)
        nearest = square.clamp_min(0).amin(2).sqrt()
        return nearest, nearest.amax(1)


class Policy(nn.Module):
    """ResNet-18 with frozen BatchNorm, its map as tokens of a small transformer, seven joints out."""

    def __init__(self) -> None:
        super().__init__()
        norm = torchvision.ops.FrozenBatchNorm2d
        net = torchvision.models.resnet18(weights=None, norm_layer=norm)
        self.trunk = nn.Sequential(*list(net.children())[:-2])
        self.project = nn.Conv2d(512, 64, 1)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.joints = nn.Linear(64, 7)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the program answers."""
        tokens = self.project(self.trunk(x)).flatten(2).transpose(1, 2)
        return torch.tanh(self.joints(self.encoder(tokens).mean(1)))


def faster_rcnn() -> tuple[nn.Module, str]:
    """A detector with proposals, and where its trunk ends."""
    make = torchvision.models.detection.fasterrcnn_resnet50_fpn
    model = make(weights=None, weights_backbone=None, num_classes=21, box_score_thresh=0.0, box_detections_per_img=20)
    return Detector(model), "auto"


def retinanet() -> tuple[nn.Module, str]:
    """A detector without, and where its trunk ends."""
    make = torchvision.models.detection.retinanet_resnet50_fpn
    return OneStage(make(weights=None, weights_backbone=None, num_classes=21)), "auto"


def deeplab() -> tuple[nn.Module, str]:
    """A segmenter, dilated, and where its trunk ends."""
    make = torchvision.models.segmentation.deeplabv3_resnet50
    return Segmenter(make(weights=None, weights_backbone=None, num_classes=21, aux_loss=False)), "layer4"


def patchcore() -> tuple[nn.Module, str]:
    """An inspector, of two layers, and where its trunk ends."""
    return Patches(torchvision.models.wide_resnet50_2(weights=None)), "layer2,layer3"


def policy() -> tuple[nn.Module, str]:
    """A robot's policy, and where its trunk ends."""
    return Policy(), "auto"


def trained_policy(weights: Path) -> tuple[nn.Module, str]:
    """A robot's policy whose trunk has learnt something, and where its trunk ends: `TRAINED` is its name here."""
    found = torch.load(weights, weights_only=True)
    tensors = {k: v.float() for k, v in found.get("model", found).items()}
    norm = torchvision.ops.FrozenBatchNorm2d
    classifier = torchvision.models.resnet18(weights=None, norm_layer=norm, num_classes=len(tensors["fc.bias"]))
    classifier.load_state_dict(tensors)
    made = Policy()
    made.trunk = nn.Sequential(*list(classifier.children())[:-2])
    return made, "auto"


TRAINED = trained_policy.__name__
HOSTS = {f.__name__: f for f in (faster_rcnn, retinanet, deeplab, patchcore, policy)}


def settled(module: nn.Module, x: Tensor) -> nn.Module:
    """Return a module whose BatchNorms know the images: random weights with statistics of nothing explode."""
    for part in module.modules():
        if isinstance(part, torchvision.ops.FrozenBatchNorm2d):
            _settle_frozen(part)
        elif isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.train()
            part.momentum = None
    with torch.no_grad():
        for i in range(0, 8, 4):
            for image in [x[i : i + 4]]:
                _forward_trunk(module, image)
    return module.eval()


def _settle_frozen(part: nn.Module) -> None:
    def measure(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        module.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        module.running_var.copy_(inputs[0].var((0, 2, 3)))

    part.register_forward_pre_hook(measure)


def _forward_trunk(module: nn.Module, x: Tensor) -> None:
    if isinstance(module, Detector | OneStage):
        module.model.backbone(x)
    else:
        module(x)


def tensor_of(model: onnx.ModelProto, ends: str) -> str:
    """Return the tensors of a file that are the outputs of modules of these names."""
    if ends == "auto":
        return ends
    found = []
    for end in ends.split(","):
        names = [o for n in model.graph.node for o in n.output if f"/{end}/" in o]
        found.append(names[-1])
    return ",".join(found)


def measured(name: str, data: str, side: int, count: int, folder: Path, weights: Path | None = None) -> dict[str, Any]:
    """Return the figures of one host."""
    torch.manual_seed(0)
    module, ends = HOSTS[name]() if weights is None else trained_policy(weights)
    split = load_dataset(data, _spec(side)).val.take(2 * count, 0)
    x = split.tensor()
    module = settled(module, x) if weights is None else module.eval()
    for part in module.modules():
        part._forward_pre_hooks.clear()
    path = folder / f"{name}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x[:1],), str(path), dynamo=False, opset_version=17)
    model = onnx.load(str(path))
    began = time.perf_counter()
    dense = load_checkpoint(path, preprocess=MEAN_STD, arch_options={"trunk": tensor_of(model, ends)})
    took = time.perf_counter() - began
    host = dense.host
    assert host is not None
    batches = [x[i : i + 1].numpy() for i in range(count, count + min(count, 8))]

    def back(checkpoint: Any) -> dict[str, Any]:
        made = with_trunk(model, onnx_of(checkpoint, fitting(ExportOptions(), model, host)), host)
        found, _ = compare_hosts(model, made, host, batches)
        return {key: _short(value.document()) for key, value in found.items()}

    pruned = prune(dense, PruneSettings(macs=0.7), calibration_x=x[:count]).checkpoint
    int8 = on_grid(ptq(pruned, [x[:count]], QuantizeSettings(calibration="nncf")))
    fitted, held = (split.subset(np.arange(start, start + count)) for start in (0, count))
    reference = TorchRunner(build_model(dense.spec, dense.state_dict))
    names = [o.name for o in dense.network.outputs]

    def near(network: nn.Module, images: Split = held) -> dict[str, float]:
        found = fidelity(TorchRunner(network), reference, images, names, batch_size=8)
        return {key: round(metric.value, 4) for key, metric in found.metrics.items()}

    return {
        "host": name,
        "nodes": len(model.graph.node),
        "import_s": round(took, 1),
        "borders": {o.name: list(dense.network.by_name[o.tensor].out_shape) for o in dense.network.outputs},
        "blocks": len(dense.network.blocks),
        "macs": [total_macs(c.network.layers) for c in (dense, pruned)],
        "float": back(dense),
        "pruned": {
            "fidelity": near(build_model(pruned.spec, pruned.state_dict)),
            "on_calibration": near(build_model(pruned.spec, pruned.state_dict), fitted),
            "outputs": back(pruned),
        },
        "int8": {"fidelity": near(fake_quant_model(int8)), "outputs": back(copy.copy(int8))},
    }


def _short(document: dict[str, Any]) -> dict[str, Any]:
    kept = ("relative_error", "cosine", "agreement")
    return {k: float(f"{document[k]:.4g}") for k in kept if document[k] is not None} or {"shapes": document["shapes"]}


def _spec(side: int) -> Any:
    from compress.data import Inputs
    from compress.preprocessing import Statement
    from compress.zoo import preprocessing

    shape = (3, side, side)
    return Inputs(shape, 0, Statement.parse(MEAN_STD).over(preprocessing("imagenet", shape), shape), None)


def main() -> None:
    """Measure the hosts that are named, one JSON document for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join([*HOSTS, TRAINED]))
    parser.add_argument("--data", required=True)
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--weights", type=Path, help=f"of {TRAINED}")
    given = parser.parse_args()
    if (TRAINED in given.names) != (given.weights is not None):
        parser.error(f"--weights belongs to {TRAINED}")
    with tempfile.TemporaryDirectory() as folder:
        for name in given.names or HOSTS:
            weights = given.weights if name == TRAINED else None
            print(json.dumps(measured(name, given.data, given.side, given.images, Path(folder), weights)), flush=True)


if __name__ == "__main__":
    main()
