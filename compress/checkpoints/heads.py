"""Reads a classifier, of whatever name and depth, as a chain of linear layers with ReLU between them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from compress.checkpoints.base import Derived, LoadOptions, Shape, Stored
from compress.checkpoints.layout import BN_PARTS, zeros
from compress.checkpoints.options import number
from compress.checkpoints.roots import AVERAGED
from rescompress.core.errors import CheckpointError

NAMES = ("fc", "linear", "head", "classifier", "cls_head", "heads", "classification_head", "last_linear", "output", "out",
         "output_layer", "logits", "predictions", "dense", "fully_connected", "mlp")  # fmt: skip
_HEAD = re.compile(rf"(?:{'|'.join(NAMES)})\d*(?:$|[._])")
_NOT_A_HEAD = re.compile(r"proj|predictor|prototypes|queue|aux|momentum|center|contrast", re.IGNORECASE)
_SELF_SUPERVISED = re.compile(r"last_layer\.|\.weight_[gv]$|\.original[01]$")  # normalised layers: no classifier has them
TORCH_DROPOUT = 0.5
TORCH_EPS = 1e-5


@dataclass
class Found:
    """A classifier.

    Attributes:
        layers: Weight and bias of each linear layer.
        used: Keys that went into it.
        dropout: Probability in training, where the positions in a Sequential show one.
        notes: Assumptions.
        spare: Paths of classifiers and projectors that are not used.
    """

    layers: list[tuple[Stored, Stored]] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    dropout: float = 0.0
    notes: list[str] = field(default_factory=list)
    spare: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Module:
    path: str
    parts: Mapping[str, Stored]

    @property
    def index(self) -> int | None:
        last = self.path.rsplit(".", 1)[-1]
        return int(last) if last.isdecimal() else None

    @property
    def parent(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def shape(self) -> Shape:
        return self.parts["weight"].shape

    @property
    def is_linear(self) -> bool:
        return len(self.shape) == 2

    @property
    def is_norm(self) -> bool:
        return all(part in self.parts for part in BN_PARTS)


def is_head_key(key: str) -> bool:
    """Whether a key's first component is a name that classifiers have."""
    return bool(_HEAD.match(key)) and not _NOT_A_HEAD.search(key)


def _modules(tensors: Mapping[str, Stored]) -> list[_Module]:
    grouped: dict[str, dict[str, Stored]] = {}
    for key, stored in tensors.items():
        path, _, part = key.rpartition(".")
        grouped.setdefault(path, {})[part] = stored
    return [_Module(path, parts) for path, parts in grouped.items() if "weight" in parts]


def find_head(tensors: Mapping[str, Stored], features: int, options: LoadOptions, *, any_name: bool = False) -> Found:
    """Return the classifier among `tensors`, empty when there is none.

    A module follows another when it reads as many features as that one makes. BatchNorm between linear layers is folded
    into them, which changes no output.

    Args:
        tensors: Candidates by key, in the file's order.
        features: Width of the pooled features.
        options: What the user states; ``head_bias=no`` allows layers without bias.
        any_name: Take the one linear layer that reads the features, whatever it is called.

    Raises:
        CheckpointError: There is a classifier, and it is not of a supported kind.
    """
    projectors = {k.split(".")[0] for k in tensors if _SELF_SUPERVISED.search(k)}
    for name in sorted(projectors):
        if is_head_key(f"{name}.") and {f"{name}.weight_g", f"{name}.parametrizations.weight.original0"} & set(tensors):
            raise CheckpointError(
                f"its classifier {name} is weight-normalised", remedy="take that off before saving: remove_weight_norm(module)"
            )
    named = _only_linear(tensors, features) if any_name else is_head_key
    candidates = {k: v for k, v in tensors.items() if named(k) and k.split(".")[0] not in projectors}
    modules = _modules(candidates)
    orphans = [k for k in candidates if k.endswith(".bias") and f"{k[:-5]}.weight" not in candidates]
    if orphans:
        raise CheckpointError(f"incomplete: {orphans[0]} has no weight beside it", remedy="save the whole network")
    linear = [m for m in modules if m.is_linear]
    if not linear:
        return Found(spare=sorted(projectors))
    starts = [m for m in linear if m.shape[1] == features]
    found = Found(spare=sorted(projectors))
    if any_name:
        found.notes.append(f"the head is taken to be {linear[0].path}, the one linear layer that reads the features")
    start = starts[0] if starts and starts[0].parent != linear[0].parent else linear[0]
    if start.index is None and starts:
        start = starts[0]
    chain = _chain(modules, start)
    _refuse_odd(chain, modules)
    spare = [m.path for m in linear if m not in chain]
    if spare:
        found.spare += spare
        found.notes.append(f"the head is taken to be {chain_name(chain)}; not used: {', '.join(spare[:4])}")
    without = [m.path for m in chain if m.is_linear and "bias" not in m.parts]
    if without and all(m.is_linear for m in chain) and options.arch.get("head_bias") != "no":
        raise CheckpointError(
            f"incomplete: {without[0]}.bias is missing", remedy="if the layer has none: --arch-option head_bias=no"
        )
    _read_chain(chain, found, number(options, "head_bn_eps", TORCH_EPS))
    for module in chain:
        found.used |= {f"{module.path}.{part}" if module.path else part for part in module.parts}
    return found


def _is_of_another(path: str) -> bool:
    """Whether a module's name says that it belongs to a projection or to averaged weights, not to this network's head."""
    return bool(_NOT_A_HEAD.search(path) or AVERAGED.search(path))


def _only_linear(tensors: Mapping[str, Stored], features: int) -> Callable[[str], bool]:
    """Return whether a key belongs to the only linear layer among `tensors`, if it reads the features; no key does else."""
    linear = [m for m in _modules(tensors) if m.is_linear]
    reads = len(linear) == 1 and linear[0].shape[1] == features
    path = linear[0].path if reads and not _is_of_another(linear[0].path) else None
    return lambda key: key.rpartition(".")[0] == path


def refuse_norms(left: Mapping[str, Stored], found: Found, features: int) -> None:
    """Refuse a BatchNorm over the features, or over the outputs of a head's layer, that is no part of what was read.

    Args:
        left: Tensors beside the backbone and its head, by key.
        found: The head.
        features: Width of the pooled features.

    Raises:
        CheckpointError: There is one: the network computes something else than its backbone and head do.
    """
    widths = {features, *(weight.shape[0] for weight, _ in found.layers)}
    for module in _modules(left):
        if module.is_norm and module.shape[0] in widths and not _is_of_another(module.path):
            raise CheckpointError(
                f"holds a BatchNorm, {module.path}, between the backbone and its head, whose place cannot be told",
                remedy="supported: BatchNorm inside the Sequential of the head",
            )


def chain_name(chain: Sequence[_Module]) -> str:
    """Return the keys of the linear layers of a chain, for people."""
    return ", ".join(m.path for m in chain if m.is_linear)


def _chain(modules: Sequence[_Module], start: _Module) -> list[_Module]:
    """Return the modules from the first one up to the logits, in the file's order."""
    at = list(modules).index(start)
    before = [m for m in modules[:at] if m.is_norm and m.parent == start.parent and m.shape[0] == start.shape[1]]
    chain, width = [*before[-1:], start], start.shape[0]
    for module in modules[at + 1 :]:
        if module.is_linear and module.shape[1] == width:
            chain.append(module)
            width = module.shape[0]
        elif module.is_norm and module.shape[0] == width:
            chain.append(module)
    while chain and not chain[-1].is_linear and chain[-1].parent != start.parent:
        chain.pop()
    return chain


def _refuse_odd(chain: Sequence[_Module], modules: Sequence[_Module]) -> None:
    parents = {m.parent for m in chain if m.index is not None}
    for module in modules:
        if module not in chain and module.parent in parents:
            raise CheckpointError(
                f"its head holds {module.path} of shape {module.shape}, which does not fit a chain of linear layers",
                remedy="supported heads: Linear, or Linear -> [BatchNorm] -> ReLU -> [Dropout] -> ... -> Linear",
            )


def _read_chain(chain: Sequence[_Module], found: Found, eps: float) -> None:
    pending: list[_Module] = []  # BatchNorms that stand before the next linear layer
    previous: _Module | None = None
    folded = False
    for module in chain:
        if not module.is_linear:
            folded = True
            follows = previous is not None and previous.index is not None and module.index == previous.index + 1
            if follows or (previous is not None and module.index is None):
                found.layers[-1] = fold_after(found.layers[-1], module.parts, eps)
            else:
                pending.append(module)
            previous = module
            continue
        weight, bias = module.parts["weight"], module.parts.get("bias", zeros(module.shape[:1]))
        if previous is not None and previous.is_linear and previous.parent == module.parent:
            gap = (module.index or 0) - (previous.index or 0)
            if module.index is not None and gap == 1:
                raise CheckpointError(
                    f"its head has two linear layers without an activation between them ({previous.path}, {module.path})",
                    remedy="supported heads: Linear -> ReLU -> [Dropout] -> Linear",
                )
        if previous is not None and _gap(previous, module) >= 3:
            found.dropout = TORCH_DROPOUT
        for norm in pending:
            weight, bias = fold_before((weight, bias), norm.parts, eps)
        pending = []
        found.layers.append((weight, bias))
        previous = module
    if pending:
        raise CheckpointError("its head ends in a BatchNorm after an activation, which is not supported")
    if folded:
        found.notes.append("BatchNorm of the head was folded into its linear layers: the outputs are the same")
    if len(found.layers) > 1:
        found.notes.append("the hidden layers of the head are taken to end in ReLU")
    if found.dropout:
        found.notes.append(f"the head has dropout, taken to be {found.dropout} in training (else: --arch-option dropout=P)")


def _gap(before: _Module, after: _Module) -> int:
    if before.index is None or after.index is None or before.parent != after.parent:
        return 0
    return after.index - before.index


def _factors(norm: Mapping[str, Stored], eps: float) -> tuple[Tensor, Tensor]:
    weight, bias, mean, var = (norm[part].read().double() for part in BN_PARTS)
    scale = weight / (var + eps).sqrt()
    return scale, bias - mean * scale


def fold_after(layer: tuple[Stored, Stored], norm: Mapping[str, Stored], eps: float) -> tuple[Stored, Stored]:
    """Return a linear layer that computes what `layer` and then a BatchNorm compute in evaluation.

    Args:
        layer: Weight (O, I) and bias (O,).
        norm: The BatchNorm's tensors by torch's names, (O,) each.
        eps: Its epsilon.
    """
    weight, bias = layer

    def make_weight() -> Tensor:
        scale, _ = _factors(norm, eps)
        return (weight.read().double() * scale[:, None]).float()

    def make_bias() -> Tensor:
        scale, shift = _factors(norm, eps)
        return (bias.read().double() * scale + shift).float()

    return Derived(weight.shape, make_weight), Derived(bias.shape, make_bias)


def fold_before(layer: tuple[Stored, Stored], norm: Mapping[str, Stored], eps: float) -> tuple[Stored, Stored]:
    """Return a linear layer that computes what a BatchNorm and then `layer` compute in evaluation.

    Args:
        layer: Weight (O, I) and bias (O,).
        norm: The BatchNorm's tensors by torch's names, (I,) each.
        eps: Its epsilon.
    """
    weight, bias = layer

    def make_weight() -> Tensor:
        scale, _ = _factors(norm, eps)
        return (weight.read().double() * scale[None, :]).float()

    def make_bias() -> Tensor:
        _, shift = _factors(norm, eps)
        return (bias.read().double() + weight.read().double() @ shift).float()

    return Derived(weight.shape, make_weight), Derived(bias.shape, make_bias)
