"""The network that a file of our own format holds, read off its header: no tensor is read, nothing heavy is imported."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from rescompress.core.graph import Network
from rescompress.core.recipe import network_of
from rescompress.core.spec import ModelSpec

MOST = 100_000_000
"""Bytes of a header at most, as in the format's own library."""


def stored_network(path: Path) -> Network | None:
    """Return the graph of the network in a file, or None where the file is none of ours, is damaged, or is not there.

    Args:
        path: A ``.safetensors`` file.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MOST:
                return None
            header = json.loads(file.read(size))
        about = header["__metadata__"]
        if about["format"] != "rescompress":
            return None
        if "network" in about:
            return Network.model_validate_json(about["network"])
        return network_of(ModelSpec.model_validate_json(about["spec"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ValidationError):
        return None
