"""Train the ResNet-20 that the quickstart compresses: scikit-learn's 1,797 handwritten digits, scaled to 16x16.

    python examples/train_digits.py            writes examples/resnet20_digits.safetensors, about a minute on two cores

Epochs and learning rate were chosen on a tenth of the training split (--hold-out); the evaluation split was looked at
once, with the network that is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from compress.checkpoints import save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.data import DIGITS, load_dataset
from compress.evaluate import TorchRunner, evaluate
from compress.resnet import build_model, tensors_of
from compress.train import train
from compress.zoo import spec
from rescompress.core.spec import Preprocessing
from rescompress.core.training import TrainSettings


def main() -> None:
    """Train, say how good it is, and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--hold-out", action="store_true", help="evaluate on a tenth of the training split instead")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("resnet20_digits.safetensors"))
    options = parser.parse_args()
    grey = Preprocessing(name="digits", mean=(0.306,) * 3, std=(0.376,) * 3, resize=None, assumed=False)
    network = spec("resnet20", num_classes=10, input_shape=(3, 16, 16))
    network = network.replace(preprocessing=grey, labels=tuple(str(i) for i in range(10)))
    torch.manual_seed(0)
    data = load_dataset(DIGITS, network)
    seen, held = data.train.part(0.1, 0) if options.hold_out else (data.train, data.val)
    model = build_model(network)
    settings = TrainSettings(epochs=options.epochs, lr=options.lr, batch_size=64, device="cpu")
    log = train(model, seen, settings, progress=lambda s: print(f"\r{s.step}/{s.steps}  loss {s.loss:.3f}", end=""))
    print(f"\nlast epoch: {log.epochs[-1]}")
    found = evaluate(TorchRunner(model), held)
    print(f"top-1 {100 * found.top1:.2f} % of {len(held)} images that were not trained on")
    if not options.hold_out:
        save_checkpoint(Checkpoint(network, tensors_of(model), None, {"trained": "examples/train_digits.py"}), options.output)
        print(f"{options.output}: {options.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
