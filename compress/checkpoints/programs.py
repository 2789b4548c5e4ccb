"""Runs the graph that a TorchScript or ``torch.export`` archive holds, and compares it with the network read from its weights.

Such an archive says what it computes, and a ResNet that is dilated, anti-aliased or normalises its own input has the weights of
a plain one. `torch.jit.load` is not used for that: an archive may call operators that write files. The interpreters of
`compress.checkpoints.script` and `compress.checkpoints.exported` know no operator but those in `PURE`, which make tensors of
tensors and do nothing else; what they do not know is not run, and that is told.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from compress.checkpoints.base import Checkpoint
from rescompress.core.errors import CheckpointError

TOLERANCE = 1e-4
MAX_VALUES = 2**26
MAX_CALLS = 20_000

_NAMES = (
    *(
        "conv2d",
        "conv1d",
        "_convolution",
        "_convolution_mode",
        "convolution",
        "batch_norm",
        "group_norm",
        "layer_norm",
        "instance_norm",
        "linear",
    ),
    *("addmm", "matmul", "mm", "bmm", "relu", "relu_", "relu6", "relu6_", "hardtanh", "hardtanh_", "silu", "silu_"),
    *("gelu", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "selu_", "celu", "hardswish", "hardswish_"),
    *("hardsigmoid", "hardsigmoid_", "mish", "mish_", "sigmoid", "sigmoid_", "tanh", "tanh_", "softmax"),
    *("log_softmax", "softplus", "prelu", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
    *("mean", "sum", "amax", "max", "min", "sqrt", "rsqrt", "exp", "log", "pow", "abs", "neg", "flatten", "view"),
    *("reshape", "squeeze", "unsqueeze", "permute", "transpose", "t", "add", "add_", "sub", "sub_", "mul", "mul_"),
    *("div", "div_", "rsub", "clamp", "clamp_", "clamp_min", "clamp_min_", "clamp_max", "dropout", "dropout_"),
    *("feature_dropout", "alpha_dropout", "cat", "concat", "stack", "pad", "constant_pad_nd", "reflection_pad2d"),
    *("replication_pad2d", "slice", "select", "narrow", "chunk", "split", "flip", "expand", "expand_as", "norm"),
    *("linalg_vector_norm", "view_as", "index_select", "roll"),
)
PURE = frozenset(_NAMES)
"""Operators of aten that compute a tensor from tensors, whatever they are given."""
_SAME = frozenset(
    ("to", "type_as", "contiguous", "detach", "detach_", "clone", "alias", "lift_fresh_copy", "lift_fresh", "float")
)
"""Operators that change where or how values are kept: everything is float32 in memory here."""
SCALAR: Mapping[str, Callable[..., Any]] = {
    **{"add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": operator.floordiv, "neg": operator.neg},
    **{"div": operator.truediv, "truediv": operator.truediv, "remainder": operator.mod, "mod": operator.mod},
    **{"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge},
    **{"__not__": operator.not_, "__is__": operator.is_, "__isnot__": operator.is_not, "len": len, "min": min, "max": max},
    **{"Int": int, "Float": float, "Bool": bool, "IntImplicit": int, "ScalarImplicit": float, "list": list},
    **{"__and__": operator.and_, "__or__": operator.or_, "__getitem__": lambda values, at: values[at]},
    **{"format": lambda text, *_: str(text), "NumToTensor": lambda value: value, "append": lambda values, v: values.append(v)},
}
"""Operators on numbers and lists."""


class Unknown(Exception):
    """The graph holds something that is not run here."""


class Operators:
    """Runs operators one by one, within limits."""

    def __init__(self) -> None:
        """Start with none run."""
        self.calls = 0
        self.about = ""
        """What the program calls the tensor that the next operator makes, where it has names."""

    def name_constant(self, value: Tensor, name: str) -> None:
        """Take note of what a parameter is called; nothing needs it here."""

    def call(self, name: str, overload: str | None, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Return what an operator of aten makes of its arguments.

        Raises:
            Unknown: It is not in `PURE`, or the limits are reached.
        """
        self.calls += 1
        if self.calls > MAX_CALLS:
            raise Unknown("is too long")
        values = [*args, *kwargs.values()]
        tensors = any(isinstance(v, Tensor) or (isinstance(v, list) and any(isinstance(t, Tensor) for t in v)) for v in values)
        if name in ("sym_size", "size") and args and isinstance(args[0], Tensor):
            return list(args[0].shape) if len(args) < 2 else args[0].shape[int(args[1])]
        if name == "device":  # everything is in memory here
            return None
        if name == "dim" and args and isinstance(args[0], Tensor):
            return args[0].ndim
        if name in ("__is__", "__isnot__", "len", "__getitem__", "append", "list") or (name in SCALAR and not tensors):
            return SCALAR[name](*args, **kwargs)
        if name in _SAME and args and isinstance(args[0], Tensor):
            return args[0].clone() if name == "clone" else args[0]
        if name in ("zeros", "ones") and args and isinstance(args[0], list) and all(isinstance(n, int) for n in args[0]):
            if math.prod(args[0]) > MAX_VALUES:
                raise Unknown("makes tensors beyond measure")
            return torch.zeros(args[0]) if name == "zeros" else torch.ones(args[0])
        if name not in PURE:
            raise Unknown(f"uses {name}")
        packet = getattr(torch.ops.aten, name)
        operation = getattr(packet, overload) if overload else packet
        shapes = operation(*map(_shape_alone, args), **{k: _shape_alone(v) for k, v in kwargs.items()})
        for found in shapes if isinstance(shapes, tuple | list) else (shapes,):
            if isinstance(found, Tensor) and found.numel() > MAX_VALUES:
                raise Unknown("makes tensors beyond measure")
        result = operation(*args, **kwargs)
        return list(result) if isinstance(result, tuple) else result


def _shape_alone(value: Any) -> Any:
    """Return an argument whose tensors have a shape and no values: what an operator makes of it costs no memory."""
    if isinstance(value, Tensor):
        return value.to("meta")
    return [_shape_alone(v) for v in value] if isinstance(value, list) else value


def in_float(value: Tensor) -> Tensor:
    """Return a stored tensor as everything is computed here: in float32."""
    return value.float() if value.is_floating_point() else value


def compare(program: Callable[[Tensor], Any], checkpoint: Checkpoint) -> list[str]:
    """Return warnings, none where the archive's own graph computes what was read from its weights.

    Args:
        program: The graph; it takes a batch of one image and returns its outputs.
        checkpoint: What was read.

    Raises:
        CheckpointError: It computes something else.
    """
    from compress.resnet import build_model

    spec = checkpoint.spec
    x_NCHW = torch.randn(1, *spec.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        try:
            found = _first_tensor(program(x_NCHW.clone()))
        except Unknown as e:
            return [f"its own graph {e}, so it was not compared with the network read from its weights"]
        except Exception as e:  # a graph of a stranger may fail in any way
            reason = f"{type(e).__name__}: {str(e).splitlines()[0][:100] if str(e) else ''}"
            return [f"its own graph does not run on {'x'.join(map(str, spec.input_shape))} ({reason}), so it was not compared"]
        ours = build_model(spec, checkpoint.state_dict)(x_NCHW)
    if found is None or found.numel() != ours.numel():
        shape = tuple(found.shape) if found is not None else None
        raise CheckpointError(
            f"its own graph makes outputs of shape {shape}, the network read from its weights of shape {tuple(ours.shape)}",
            remedy="supported: a ResNet with one classifier (`rescompress formats`)",
        )
    wanted = found.reshape(ours.shape).float()
    size = float(wanted.abs().max().clamp_min(1e-12))
    for name, end in _ENDS.items():
        if float((end(ours) - wanted).abs().max()) <= TOLERANCE * size:
            return [f"the outputs are logits: the {name} at the end is left to the reader"] if name else []
    off = float((ours - wanted).abs().max()) / size
    raise CheckpointError(
        f"its own graph computes something else than the network read from its weights ({off:.2g} of its largest output): "
        "another stride, dilation, activation, epsilon or pooling, or a normalisation of its input",
        remedy="state what differs with --arch-option (such as stride_at=0, bn_eps=1e-3, max_pool=no), or give the state_dict",
    )


_ENDS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "": lambda y: y,
    "softmax": lambda y: y.softmax(1),
    "log_softmax": lambda y: y.log_softmax(1),
    "sigmoid": torch.sigmoid,
}


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return next((t for t in map(_first_tensor, value) if t is not None), None)
    return value if isinstance(value, Tensor) else None
