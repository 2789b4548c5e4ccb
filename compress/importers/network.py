"""From the steps of a `Trace` to a `Network` and its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import Tensor

from compress import zoo
from compress.importers.passes import has_scores, needed, simplify
from compress.importers.trace import Refused, Step, Trace, Value
from rescompress.core import operations as ops
from rescompress.core.graph import INPUT, Network, Node, Output, safe_name
from rescompress.core.operations import Operation


@dataclass(frozen=True)
class Read:
    """A network read from a program.

    Attributes:
        network: The network.
        tensors: Its tensors, by name.
        sources: What the program calls the tensors of nodes, where it has them.
        ends: Per output, the function of the class scores that was left out (``softmax``), or nothing.
    """

    network: Network
    tensors: Mapping[str, Tensor]
    sources: Mapping[str, str]
    ends: tuple[str, ...]


def read_trace(
    trace: Trace,
    outputs: Sequence[tuple[str, Value]],
    *,
    arch: str,
    front: Callable[[Sequence[Step]], None] | None = None,
    features: bool = False,
) -> Read:
    """Return the network of a trace.

    Args:
        trace: What the program did.
        outputs: Its results by name.
        arch: What to call the network.
        front: Takes steps out that are no part of the network: it changes what others read.
        features: Whether the outputs are read by another program, as they are, and are no scores of classes.

    Raises:
        Refused: A step is no operation of a network.
    """
    last = [trace.settled(value) for _, value in outputs]
    steps, last, ends = simplify(trace.steps, last, features=features)
    if front is not None:
        front(steps)
        steps = needed(steps, last)
    names: dict[int, str] = {}
    nodes: list[Node] = []
    tensors: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    labels: list[str] = []
    for label, _ in outputs:
        labels.append(safe_name(label, labels))
    ends_as = {label: id(step) for label, step in zip(labels, last, strict=True)}
    taken: dict[str, bool] = {}
    for step in steps:
        operation, own = operation_of(step)
        if ends_as.get(safe_name(step.name), id(step)) != id(step):  # the name belongs to an output
            step.name = f"{step.name}.{step.op}"
        name = INPUT if step.op == "input" else _free(step, taken, owner=bool(own))
        taken[name] = bool(own)
        names[id(step)] = name
        nodes.append(Node(name=name, operation=operation, inputs=tuple(names[id(s)] for s in step.inputs)))
        tensors |= {f"{name}.{part}": value for part, value in own.items()}
        if step.source is not None:
            sources[name] = step.source
    found: list[Output] = []
    for label, step in zip(labels, last, strict=True):
        found.append(Output(name=label, tensor=names[id(step)], classes=not features and not step.is_map and has_scores(step)))
    c, h, w = trace.steps[0].shape
    try:
        network = Network(
            arch=arch,
            input_shape=(c, h, w),
            nodes=tuple(nodes),
            outputs=tuple(found),
            preprocessing=zoo.preprocessing("imagenet", (c, h, w)),
        )
    except ValidationError as e:
        raise Refused(e.errors()[0]["msg"].removeprefix("Value error, ")) from e
    return Read(network, {name: tensors[name] for name in network.tensor_shapes}, sources, tuple(ends))


def _free(step: Step, taken: Mapping[str, bool], *, owner: bool) -> str:
    """Return a name for a step's node that no other has; of two that own tensors, none is a module inside the other."""
    base = safe_name(step.name)
    base = "x_input" if base == INPUT else base
    related = [t for t, owns in taken.items() if owns and owner and (t.startswith(f"{base}.") or base.startswith(f"{t}."))]
    return safe_name(f"{base}.{step.op}".replace(".", "_") if related else base, taken)


def operation_of(step: Step) -> tuple[Operation, dict[str, Tensor]]:
    """Return the operation of a step, and the tensors that it owns.

    Raises:
        Refused: There is no such operation.
    """
    a, t, c = step.attributes, step.tensors, step.shape[0]
    match step.op:
        case "input":
            return ops.Input(), {}
        case "conv":
            height, width = t["weight"].shape[2:]
            return (
                ops.Conv(
                    width=c, kernel=(int(height), int(width)), stride=a["stride"], pads=a["pads"], dilation=a["dilation"],
                    groups=a["groups"], bias="bias" in t, frozen=bool(a.get("frozen", False)),
                ),
                dict(t),
            )  # fmt: skip
        case "linear":
            return ops.Linear(width=c, bias="bias" in t), dict(t)
        case "batch_norm":
            counter = {"num_batches_tracked": torch.zeros((), dtype=torch.int64)}
            frozen = bool(a.get("frozen", False))
            return ops.BatchNorm(eps=a["eps"], scale="weight" in t, shift="bias" in t, frozen=frozen), {**t, **counter}
        case "group_norm":
            affine = {"weight": t.get("weight", torch.ones(c)), "bias": t.get("bias", torch.zeros(c))}
            return ops.GroupNorm(groups=a["groups"], eps=a["eps"], affine=bool(t)), affine if t else {}
        case "affine":
            shift = bool(t["shift"].any())
            own = {"weight": t["scale"]} | ({"bias": t["shift"]} if shift else {})
            return ops.Affine(shift=shift, frozen=bool(a.get("frozen", False))), own
        case "prelu":
            return ops.PRelu(shared=len(t["weight"]) == 1 < c), dict(t)
        case "relu":
            return ops.Relu(), {}
        case "clip":
            return ops.Clip(low=a["low"], high=a["high"]), {}
        case "leaky_relu":
            return ops.LeakyRelu(slope=a["slope"]), {}
        case "elu":
            return ops.Elu(alpha=a["alpha"]), {}
        case "silu":
            return ops.Silu(), {}
        case "gelu":
            return ops.Gelu(tanh=a["tanh"]), {}
        case "hard_swish":
            return ops.HardSwish(), {}
        case "hard_sigmoid":
            return ops.HardSigmoid(alpha=a["alpha"], beta=a["beta"]), {}
        case "sigmoid":
            return ops.Sigmoid(), {}
        case "tanh":
            return ops.Tanh(), {}
        case "softmax":
            return ops.Softmax(), {}
        case "add":
            if len({s.shape for s in step.inputs}) > 1:
                raise Refused(f"'{step.name}' adds a number for each channel that depends on the image")
            return ops.Add(), {}
        case "mul":
            return ops.Multiply(), {}
        case "concat":
            return ops.Concat(), {}
        case "max_pool":
            return (
                ops.MaxPool(kernel=a["kernel"], stride=a["stride"], pads=a["pads"], ceil=a["ceil"], dilation=a["dilation"]),
                {},
            )
        case "avg_pool":
            return (
                ops.AvgPool(
                    kernel=a["kernel"], stride=a["stride"], pads=a["pads"], ceil=a["ceil"], count_pads=a["count_include_pad"]
                ),
                {},
            )
        case "global_avg":
            return ops.GlobalPool(kind="avg"), {}
        case "global_max":
            return ops.GlobalPool(kind="max"), {}
        case "channel_conv":
            places = tuple(a["places"])
            return ops.ChannelConv(kernel=t["weight"].shape[2], length=a["length"], places=places, bias="bias" in t), dict(t)
        case "select":
            return ops.ChannelSelect(channels=a["channels"], stride=a["stride"]), {}
        case "pad":
            return ops.Pad(pads=a["pads"], mode="constant" if a["mode"] == "zeros" else a["mode"]), {}
        case "flatten":
            return ops.Flatten(), {}
        case "dropout":
            return ops.Dropout(probability=min(float(a["p"]), 0.999)), {}
        case "resize":
            return ops.Resize(size=a["size"], mode=a["mode"], align_corners=a["align_corners"]), {}
        case _:
            raise Refused(f"'{step.source or step.name}' computes {step.op}, which is no operation of a network here")
