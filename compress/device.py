"""The torch device that a word such as ``auto`` or ``cuda:1`` stands for."""

from __future__ import annotations

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
