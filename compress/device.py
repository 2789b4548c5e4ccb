"""The torch device that a word such as ``auto`` or ``cuda:1`` stands for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from rescompress.core.errors import BadInput


def torch_device(name: str) -> str:
    """Return the name of a torch device that is there; ``auto`` is CUDA where there is one, else the CPU.

    Args:
        name: ``auto``, or a device as torch names it.

    Raises:
        BadInput: It is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(kind, 0)
    if number not in ("", *map(str, range(count))) or not count:
        raise BadInput(f"torch finds no device '{name}' here", where="--device", remedy="use auto or cpu")
    return name


@contextlib.contextmanager
def computing_on(name: str) -> Iterator[str]:
    """Make new tensors on a device inside, and compute there in full float32; yield the device.

    Random numbers are drawn on the CPU, so that the choices are those of the CPU. An MPS device has no float64, which
    statistics are summed in: there the CPU computes.

    Args:
        name: As `torch_device` returns it.
    """
    device = "cpu" if name.startswith("mps") else name
    if device == "cpu":
        yield device
        return
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.device(device):
            yield device
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def drawn(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return uniform numbers, drawn by the CPU, where new tensors are made."""
    return torch.rand(shape, generator=generator, device="cpu").to(torch.get_default_device())
