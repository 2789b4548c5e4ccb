"""What every checkpoint format loads to, and what a format file must offer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from rescompress.core.quantizers import Quantization
from rescompress.core.spec import ModelSpec


@dataclass(frozen=True)
class Checkpoint:
    """A network and its tensors.

    Attributes:
        spec: The network.
        state_dict: Every tensor of ``build_model(spec)``, float32, by its name there.
        quantization: Every quantizer with its scales, or None for a float network.
        provenance: Where it comes from: ``format``, ``path``, notes on what was assumed; JSON values.
    """

    spec: ModelSpec
    state_dict: Mapping[str, Tensor]
    quantization: Quantization | None = None
    provenance: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class RawState:
    """A file's tensors before any format has claimed them.

    Attributes:
        path: The file.
        tensors: By the file's own key, wrappers and prefixes stripped.
        metadata: Strings stored beside the tensors (safetensors header), or plain values of the wrapper.
        notes: What was stripped, in words.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Format(Protocol):
    """A checkpoint format: the module-level functions of one file in this package."""

    DESCRIPTION: str

    def matches(self, raw: RawState) -> bool:
        """Whether keys and shapes are those of this format."""
        ...

    def load(self, raw: RawState) -> Checkpoint:
        """Return the checkpoint; raises CheckpointError when it is broken."""
        ...
