"""Train the networks of the examples on scikit-learn's 1,797 handwritten digits.

    python examples/train_digits.py                    examples/resnet20_digits.safetensors: 16x16, a minute on two cores
    python examples/train_digits.py --network demo     examples/resnet18_digits.safetensors: 88x88, half an hour

The second one is a ResNet-18 of half the usual widths that sees each digit eleven times enlarged: as much work as the small
networks that people run on photographs, which is what the demo has to show. It was trained on digits ten times enlarged, 80x80,
which takes less time; its figures are those at 88x88. Its tensors are stored in half precision.

Epochs and learning rate of the first were chosen on a tenth of the training split (--hold-out); the second has its rate
and half of its epochs. The evaluation split was looked at once, with the networks that are kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from compress.checkpoints import save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.data import DIGITS, load_dataset
from compress.evaluate import TorchRunner, evaluate
from compress.resnet import build_model, tensors_of
from compress.train import train
from compress.zoo import spec
from rescompress.core.settings import TrainSettings
from rescompress.core.spec import Block, Head, ModelSpec, Preprocessing, Stem, StemConv


class Recipe(NamedTuple):
    """One network and how it was trained.

    Attributes:
        network: Its spec, without preprocessing and labels.
        epochs: Passes over the training split.
        file: Where it goes, beside this script.
        half: Whether the tensors are stored as float16.
        side: Of the pictures that the stored network reads, where it was trained on smaller ones.
    """

    network: ModelSpec
    epochs: int
    file: str
    half: bool
    side: int | None = None


def half_resnet18(side: int) -> ModelSpec:
    """Return a ResNet-18 of half the widths whose stem does not stride, as for small pictures."""
    stages, before = [], 32
    for i, width in enumerate((32, 64, 128, 256), 1):
        first = {"stride": 2, "shortcut": "projection"} if width != before else {}
        blocks = [first, {}]
        stages.append(
            tuple(Block(name=f"layer{i}.{j}", kind="basic", widths=(width, width), **b) for j, b in enumerate(blocks))
        )
        before = width
    stem = Stem(convs=(StemConv(width=32, kernel=3, stride=1),), max_pool=False)
    return ModelSpec(arch="resnet18", input_shape=(3, side, side), stem=stem, stages=tuple(stages), head=Head(num_classes=10))


RECIPES = {
    "quickstart": Recipe(spec("resnet20", num_classes=10, input_shape=(3, 16, 16)), 25, "resnet20_digits.safetensors", False),
    "demo": Recipe(half_resnet18(80), 12, "resnet18_digits.safetensors", True, side=88),
}


def main() -> None:
    """Train, say how good it is, and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=sorted(RECIPES), default="quickstart")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--hold-out", action="store_true", help="evaluate on a tenth of the training split instead")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    recipe = RECIPES[options.network]
    output = options.output or Path(__file__).with_name(recipe.file)
    grey = Preprocessing(name="digits", mean=(0.306,) * 3, std=(0.376,) * 3, resize=None, assumed=False)
    network = recipe.network.replace(preprocessing=grey, labels=tuple(str(i) for i in range(10)))
    torch.manual_seed(0)
    data = load_dataset(DIGITS, network)
    seen, held = data.train.part(0.1, 0) if options.hold_out else (data.train, data.val)
    model = build_model(network)
    settings = TrainSettings(epochs=options.epochs or recipe.epochs, lr=options.lr, batch_size=64, device="cpu")
    log = train(model, seen, settings, progress=lambda s: print(f"\r{s.step}/{s.steps}  loss {s.loss:.3f}", end=""))
    print(f"\nlast epoch: {log.epochs[-1]}")
    tensors = tensors_of(model)
    if recipe.half:  # measured as it is stored
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
    if recipe.side is not None:
        network = network.replace(input_shape=(3, recipe.side, recipe.side))
        data = load_dataset(DIGITS, network)
        held = data.train.part(0.1, 0)[1] if options.hold_out else data.val
    found = evaluate(TorchRunner(model.eval()), held)
    print(f"top-1 {100 * found.top1:.2f} % of {len(held)} images that were not trained on")
    if not options.hold_out:
        save_checkpoint(Checkpoint(network, tensors, None, {"trained": "examples/train_digits.py"}), output)
        print(f"{output}: {output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
