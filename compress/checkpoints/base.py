"""What every checkpoint format loads to, and what a format file must offer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from rescompress.core.graph import Network
from rescompress.core.layers import total_macs, total_params, walk
from rescompress.core.quantizers import Quantization
from rescompress.core.recipe import network_of
from rescompress.core.showing import Showing, prefixed
from rescompress.core.spec import ModelSpec

Shape = tuple[int, ...]


@dataclass(frozen=True, repr=False)
class Checkpoint(Showing):
    """A network and its tensors.

    Attributes:
        spec: The network: its graph, or the recipe that makes it (`network`).
        state_dict: Every tensor of the network, float32 (BatchNorm's counters int64), by its name there.
        quantization: Every quantizer with its scales, or None for a float network.
        provenance: Where it comes from: ``format``, ``path``, ``notes`` on what was assumed, and of them the ``warnings``, that
            something in the file is no part of this network; JSON values.
    """

    spec: ModelSpec | Network
    state_dict: Mapping[str, Tensor]
    quantization: Quantization | None = None
    provenance: Mapping[str, object] = field(default_factory=dict)

    @property
    def network(self) -> Network:
        """The graph of the network."""
        return network_of(self.spec)

    def shows(self) -> Mapping[str, str]:
        """Return what it is, how large, and in which precision."""
        layers = walk(self.spec)
        classes = self.spec.num_classes
        return {
            "network": self.spec.arch or "graph",
            "input": "x".join(map(str, self.spec.input_shape)),
            "outputs": str(classes) if classes else "no class scores",
            "parameters": prefixed(total_params(layers)),
            "MACs": prefixed(total_macs(layers)),
            "precision": f"INT8 ({self.quantization.profile})" if self.quantization is not None else "float32",
        }


def on_device(checkpoint: Checkpoint, device: str) -> Checkpoint:
    """Return the checkpoint with its tensors on a device; itself where they are there.

    Args:
        checkpoint: A network.
        device: As torch names it.
    """
    moved = {name: value.to(device) for name, value in checkpoint.state_dict.items()}
    same = all(moved[name] is value for name, value in checkpoint.state_dict.items())
    return checkpoint if same else replace(checkpoint, state_dict=moved)


class Stored(Protocol):
    """A tensor that still lies in its file: its shape is known, its values are read when asked for."""

    @property
    def shape(self) -> Shape:
        """The tensor's shape."""
        ...

    def read(self) -> Tensor:
        """Return the values, contiguous, in the file's dtype; raises CheckpointError when they cannot be read."""
        ...


@dataclass(frozen=True)
class Derived:
    """A tensor that is computed from stored ones.

    Attributes:
        shape: Of the result.
        make: Returns it.
    """

    shape: Shape
    make: Callable[[], Tensor]

    def read(self) -> Tensor:
        """Return the values."""
        return self.make()


@dataclass(frozen=True)
class RawState:
    """A file's tensors before any format has claimed them.

    Attributes:
        path: The file.
        container: How the bytes are laid out: ``safetensors``, ``torch``, ``torch (legacy)``, ``torchscript``, ``hdf5``.
        tensors: By the file's own key, wrappers and prefixes stripped.
        metadata: Strings stored beside the tensors (safetensors header), or plain values of the wrapper.
        notes: What was stripped or chosen, in words.
    """

    path: Path
    container: str
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def shape(self, key: str) -> Shape | None:
        """Return the shape of the tensor called `key`, or None where there is none."""
        stored = self.tensors.get(key)
        return None if stored is None else stored.shape


@dataclass(frozen=True)
class LoadOptions:
    """What the user states about a checkpoint, where the file leaves it open.

    Attributes:
        input_shape: Channels, height, width.
        preprocess: A text for `compress.preprocessing.Statement`.
        arch: Architecture facts (see `compress.checkpoints.options.KNOWN`), as ``stride_at`` -> ``0``.
    """

    input_shape: tuple[int, int, int] | None = None
    preprocess: str | None = None
    arch: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Root:
    """One place in a file where a network may stand.

    Attributes:
        prefix: What stands before the network's keys, with its last dot.
        tensors: The network's, prefix removed.
        outside: All others, by full key.
        averaged: Whether the place's name says that these are averaged (EMA) or a teacher's weights.
    """

    prefix: str
    tensors: Mapping[str, Stored]
    outside: Mapping[str, Stored]
    averaged: bool = False


class Format(Protocol):
    """A checkpoint format: the module-level names of one file in ``compress.checkpoints.formats``.

    Attributes:
        DESCRIPTION: One line for ``rescompress formats``.
        MARKER: Matches a key that every network of this format has; what stands before it is a wrapper's prefix.
    """

    DESCRIPTION: str

    MARKER: re.Pattern[str]

    def matches(self, raw: RawState) -> bool:
        """Whether keys and shapes are those of this format; at most one format may say so."""
        ...

    def load(self, raw: RawState, root: Root, options: LoadOptions) -> Checkpoint:
        """Return the checkpoint; raises CheckpointError when it is broken or not supported."""
        ...
