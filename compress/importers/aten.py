"""torch's operators (ATen), as calls of a `Trace`: for modules, ``torch.export`` archives and TorchScript alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.importers.trace import Pads, Refused, Stack, Trace, Value

Symbol = Value | Stack
LARGEST = float(torch.finfo(torch.float32).max)
_UNARY: Mapping[str, tuple[str, bool]] = {
    "relu": ("relu", True),
    "silu": ("silu", True),
    "hardswish": ("hard_swish", True),
    "sigmoid": ("sigmoid", False),
    "tanh": ("tanh", True),
    "erf": ("erf", True),
    "exp": ("exp", False),
    "mish": ("mish", True),
}
_IDENTITY = (
    *("contiguous", "detach", "clone", "alias", "lift_fresh_copy", "lift_fresh", "float", "type_as", "_to_copy", "to"),
    *("feature_dropout", "alpha_dropout", "requires_grad"),
)
_SHAPES: Mapping[str, Callable[..., Tensor]] = {
    name: getattr(torch.ops.aten, name)
    for name in (
        *("view", "reshape", "_unsafe_view", "permute", "transpose", "t", "squeeze", "unsqueeze", "slice", "select"),
        *("narrow", "expand", "flip", "roll", "index_select", "swapaxes", "movedim", "unflatten", "_reshape_alias"),
        *("numpy_T", "mT", "adjoint", "tile", "repeat"),
    )
    if hasattr(torch.ops.aten, name)
}
"""Operators that move numbers about and compute nothing: they are done to the places of the numbers."""


def is_symbol(value: object) -> bool:
    """Whether an argument is, or holds, a tensor that depends on the images."""
    return isinstance(value, Symbol) or (isinstance(value, list | tuple) and any(map(is_symbol, value)))


def call(trace: Trace, name: str, overload: str | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what an operator of ATen makes of its arguments, at least one of which depends on the images.

    Args:
        trace: Takes the steps.
        name: Of the operator, without ``aten::`` and overload.
        overload: Its overload, where it is known.
        args: Positional arguments: symbols, tensors, numbers, lists.
        kwargs: Arguments by name.

    Raises:
        Refused: It is no operation of a network here.
    """
    name = name.removesuffix("_") if not name.startswith("_") and not name.endswith("__") else name
    try:
        bound = _Bound(_schema(name, overload, args, kwargs), args, kwargs)
    except (LookupError, AttributeError):
        bound = _Bound((), args, kwargs)
    x = bound.args[0] if bound.args else None
    if isinstance(x, Stack):
        return _of_stack(trace, name, x, bound)
    if name in _SHAPES and isinstance(x, Value):
        operator = _SHAPES[name]
        return x.move(lambda places: operator(places, *args[1:], **kwargs))
    handler = _HANDLERS.get(name)
    if handler is None:
        raise Refused("is not known here")
    return handler(trace, bound)


def _schema(name: str, overload: str | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of an operator's arguments; where its overload is not known, those of the first that takes these."""
    packet = getattr(torch.ops.aten, name)
    overloads = [o for o in packet.overloads() if "out" not in o]
    schemas = {o: getattr(packet, o)._schema.arguments for o in overloads}
    if overload not in schemas:
        fit = (o for o, s in schemas.items() if _fits(s, args, kwargs))
        overload = next(fit, "default" if "default" in schemas else overloads[0])
    return tuple(a.name for a in schemas[overload])


def _fits(arguments: Sequence[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if len(args) > len(arguments) or not set(kwargs) <= {a.name for a in arguments}:
        return False
    return all(_kind(value, str(a.type)) for a, value in zip(arguments, args, strict=False))


def _kind(value: Any, kind: str) -> bool:
    if value is None:
        return "Optional" in kind or kind == "NoneType"
    if isinstance(value, list | tuple):
        return "List" in kind and all(isinstance(v, Symbol | Tensor) == ("Tensor" in kind) for v in value)
    if isinstance(value, Symbol | Tensor):
        return "Tensor" in kind and "List" not in kind
    names = {bool: ("bool", "number"), int: ("int", "number", "float"), float: ("float", "number"), str: ("str",)}
    return any(n in kind for n in names.get(type(value), ()))


class _Bound:
    """Arguments by position and by name."""

    def __init__(self, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.args = list(args)
        self.named = dict(zip(names, args, strict=False)) | dict(kwargs)

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument by its name in the operator's schema."""
        found = self.named.get(name)
        return default if found is None else found

    def value(self, name: str = "self") -> Value:
        """Return an argument that has to depend on the images."""
        found = self.named.get(name, self.args[0] if self.args else None)
        if not isinstance(found, Value):
            raise Refused("reads its images at an unexpected place")
        return found

    def constant(self, name: str) -> Tensor | None:
        """Return a parameter, which must not depend on the images."""
        found = self.named.get(name)
        if found is None:
            return None
        if not isinstance(found, Tensor):
            raise Refused(f"computes its {name} from the images")
        return found


def _needed(value: Tensor | None) -> Tensor:
    if value is None:
        raise Refused("has no weight")
    return value


def _pair(value: Any, default: int | None = None) -> tuple[int, int]:
    if value is None or value == []:
        assert default is not None
        return default, default
    if isinstance(value, int):
        return value, value
    return (int(value[0]), int(value[-1]))


def _pads(value: Any) -> Pads:
    top, left = _pair(value, 0)
    return top, left, top, left


def _conv(trace: Trace, b: _Bound) -> Value:
    x, weight = b.value("input"), _needed(b.constant("weight"))
    if b.get("transposed", False):
        raise Refused("is a transposed convolution")
    bias, padding = b.constant("bias"), b.get("padding", 0)
    dilation, groups = b.get("dilation", 1), int(b.get("groups", 1))
    if weight.ndim == 3:
        if groups != 1 or _pair(b.get("stride", 1)) != (1, 1) or _pair(dilation) != (1, 1) or isinstance(padding, str):
            raise Refused("is a one-dimensional convolution")
        return trace.conv1d(x, weight, bias, _pair(padding)[0])
    if weight.ndim != 4:
        raise Refused(f"is a convolution of {weight.ndim - 2} dimensions")
    if x.ndim == 3:  # one image without a batch
        raise Refused("convolves a tensor without a batch")
    d = _pair(dilation)
    if isinstance(padding, str):
        spans = [(k - 1) * n for k, n in zip(weight.shape[2:], d, strict=True)] if padding == "same" else [0, 0]
        pads = (spans[0] // 2, spans[1] // 2, spans[0] - spans[0] // 2, spans[1] - spans[1] // 2)
    else:
        pads = _pads(padding)
    return trace.conv(x, weight, bias, _pair(b.get("stride", 1)), pads, d, groups)


def _batch_norm(trace: Trace, b: _Bound) -> Any:
    if b.get("training", False) or b.constant("running_mean") is None or b.constant("running_var") is None:
        raise Refused("normalises with the statistics of its batch")
    tensors = {k: b.constant(k) for k in ("weight", "bias", "running_mean", "running_var")}
    return trace.batch_norm(b.value("input"), tensors, float(b.get("eps", 1e-5)))


def _first(handler: Callable[[Trace, _Bound], Value]) -> Callable[[Trace, _Bound], list[Any]]:
    return lambda trace, bound: [handler(trace, bound), None, None]


def _group_norm(trace: Trace, b: _Bound) -> Value:
    x = b.value("input")
    groups = b.get("num_groups", b.get("group"))
    return trace.group_norm(x, int(groups), b.constant("weight"), b.constant("bias"), float(b.get("eps", 1e-5)))


def _linear(trace: Trace, b: _Bound) -> Value:
    return trace.linear(b.value("input"), _needed(b.constant("weight")), b.constant("bias"))


def _addmm(trace: Trace, b: _Bound) -> Value:
    bias, x, matrix = b.args[0], b.get("mat1"), b.get("mat2")
    if not isinstance(x, Value) or not isinstance(matrix, Tensor) or not isinstance(bias, Tensor):
        raise Refused("multiplies two tensors that depend on the images")
    alpha, beta = float(b.get("alpha", 1)), float(b.get("beta", 1))
    return trace.linear(x, alpha * matrix.t(), beta * bias.expand(matrix.shape[1]))


def _matmul(trace: Trace, b: _Bound) -> Value:
    x, matrix = b.args[0], b.args[1]
    if not isinstance(x, Value) or not isinstance(matrix, Tensor) or matrix.ndim != 2:
        raise Refused("multiplies two tensors that depend on the images")
    return trace.linear(x, matrix.t(), None)


def _unary(name: str) -> Callable[[Trace, _Bound], Value]:
    op, keeps_zero = _UNARY[name]
    return lambda trace, b: trace.unary(b.value(), op, keeps_zero=keeps_zero)


def _gelu(trace: Trace, b: _Bound) -> Value:
    return trace.unary(b.value(), "gelu", tanh=b.get("approximate", "none") == "tanh")


def _elu(trace: Trace, b: _Bound) -> Value:
    if b.get("scale", 1) != 1 or b.get("input_scale", 1) != 1:
        raise Refused("is a scaled ELU")
    return trace.unary(b.value(), "elu", alpha=float(b.get("alpha", 1)))


def _leaky(trace: Trace, b: _Bound) -> Value:
    return trace.unary(b.value(), "leaky_relu", slope=float(b.get("negative_slope", 0.01)))


def _prelu(trace: Trace, b: _Bound) -> Value:
    return trace.prelu(b.value(), _needed(b.constant("weight")))


def clamp(trace: Trace, x: Value, low: float | None, high: float | None) -> Value:
    """Return a clamped tensor: a ReLU, a ReLU6, or neither."""
    if low is not None and low == 0 and (high is None or high == math.inf):
        return trace.unary(x, "relu")
    if low is not None and low == 0 and high == 6:
        return trace.unary(x, "clip", low=0.0, high=6.0)
    inside = (low is None or low <= 0) and (high is None or high >= 0)
    low, high = (-LARGEST if low is None else low), (LARGEST if high is None else high)
    return trace.unary(x, "clip", keeps_zero=inside, low=max(low, -LARGEST), high=min(high, LARGEST))


def _clamp(trace: Trace, b: _Bound) -> Value:
    low, high = b.get("min", b.get("min_val")), b.get("max", b.get("max_val"))
    return clamp(trace, b.value(), *(None if v is None else float(v) for v in (low, high)))


def _hardtanh(trace: Trace, b: _Bound) -> Value:
    return clamp(trace, b.value(), float(b.get("min_val", -1)), float(b.get("max_val", 1)))


def _maximum(trace: Trace, b: _Bound) -> Value:
    x, other = b.args[:2]
    if isinstance(x, Value) and isinstance(other, Tensor) and other.numel() == 1:
        return clamp(trace, x, float(other), None)
    raise Refused("is the larger of two tensors")


def _scalar(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(float(value))


def add(trace: Trace, a: Any, b: Any) -> Any:
    """Return the sum of two tensors or constants."""
    if isinstance(a, Value) and isinstance(b, Value):
        return trace.binary(a, b, "add")
    value, constant = (a, b) if isinstance(a, Value) else (b, a)
    constant = _scalar(constant)
    if not bool(constant.any()) and constant.numel() in (1, math.prod(value.shape)):
        return value
    return trace.affine(value, None, constant)


def mul(trace: Trace, a: Any, b: Any) -> Any:
    """Return the product of two tensors or constants."""
    if isinstance(a, Stack) or isinstance(b, Stack):
        return _spread(trace, a, b)
    if isinstance(a, Value) and isinstance(b, Value):
        return trace.binary(a, b, "mul")
    value, constant = (a, b) if isinstance(a, Value) else (b, a)
    return trace.affine(value, _scalar(constant), None)


def _spread(trace: Trace, a: Any, b: Any) -> Stack:
    """Return the product of a stack and a tensor that has the same dimension, or none."""
    stack, other = (a, b) if isinstance(a, Stack) else (b, a)
    parts = []
    for i, part in enumerate(stack.parts):
        if isinstance(other, Stack):
            share: Any = other.parts[i]
        else:
            if other.ndim != stack.ndim:
                raise Refused("multiplies a stack with a tensor of other dimensions")
            share = select(other, stack.dim, i if other.shape[stack.dim] > 1 else 0)
        parts.append(mul(trace, part, share))
    return Stack(tuple(parts), stack.dim)


def select(x: Any, dim: int, index: int) -> Any:
    """Return a tensor's part at one index of a dimension."""
    return x.move(lambda p: p.select(dim, index)) if isinstance(x, Value) else x.select(dim, index)


def _add(trace: Trace, b: _Bound) -> Any:
    alpha = float(b.get("alpha", 1))
    other = b.args[1]
    return add(
        trace, b.args[0], other if alpha == 1 else (mul(trace, other, alpha) if is_symbol(other) else _scalar(other) * alpha)
    )


def _sub(trace: Trace, b: _Bound) -> Any:
    alpha = float(b.get("alpha", 1))
    return _minus(trace, b.args[0], b.args[1], alpha)


def _rsub(trace: Trace, b: _Bound) -> Any:
    return _minus(trace, b.args[1], b.args[0], float(b.get("alpha", 1)))


def _minus(trace: Trace, a: Any, b: Any, alpha: float = 1.0) -> Any:
    return add(trace, a, mul(trace, b, -alpha) if is_symbol(b) else -alpha * _scalar(b))


def _mul(trace: Trace, b: _Bound) -> Any:
    return mul(trace, b.args[0], b.args[1])


def _div(trace: Trace, b: _Bound) -> Any:
    if is_symbol(b.args[1]) or b.get("rounding_mode") is not None:
        raise Refused("divides by a tensor that depends on the images")
    divisor = b.args[1]
    return mul(trace, b.args[0], divisor.reciprocal() if isinstance(divisor, Tensor) else 1.0 / float(divisor))


def _max_pool(trace: Trace, b: _Bound) -> Value:
    kernel = _pair(b.get("kernel_size"))
    return trace.max_pool(
        b.value(),
        kernel,
        _pair(b.get("stride") or kernel),
        _pads(b.get("padding", 0)),
        _pair(b.get("dilation", 1)),
        ceil=bool(b.get("ceil_mode", False)),
    )


def _avg_pool(trace: Trace, b: _Bound) -> Value:
    kernel = _pair(b.get("kernel_size"))
    if b.get("divisor_override") is not None:
        raise Refused("divides its windows by a number of its own")
    return trace.avg_pool(
        b.value(),
        kernel,
        _pair(b.get("stride") or kernel),
        _pads(b.get("padding", 0)),
        ceil=bool(b.get("ceil_mode", False)),
        count_include_pad=bool(b.get("count_include_pad", True)),
    )


def _adaptive(op: str) -> Callable[[Trace, _Bound], Value]:
    return lambda trace, b: trace.adaptive_pool(b.value(), _sizes(b.get("output_size")), op)


def _sizes(value: Any) -> Sequence[int | None]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _reduce(op: str) -> Callable[[Trace, _Bound], Value]:
    def handler(trace: Trace, b: _Bound) -> Value:
        dims = b.get("dim")
        x = b.args[0]
        axes = list(range(x.ndim)) if dims is None else [dims] if isinstance(dims, int) else list(dims)
        return trace.reduce(x, axes, op, keep=bool(b.get("keepdim", False)))

    return handler


def _max(trace: Trace, b: _Bound) -> list[Any]:
    if b.get("dim") is None:
        raise Refused("is a maximum over everything")
    return [_reduce("global_max")(trace, b), None]


def _flatten(trace: Trace, b: _Bound) -> Value:
    start, end = int(b.get("start_dim", 0)), int(b.get("end_dim", -1))
    return b.value().move(lambda p: p.flatten(start, end))


def _cat(trace: Trace, b: _Bound) -> Value:
    return trace.concat(list(b.args[0]), int(b.get("dim", 0)))


def _stack(trace: Trace, b: _Bound) -> Stack:
    parts = list(b.args[0])
    if not all(isinstance(p, Value) for p in parts):
        raise Refused("stacks constants")
    dim = int(b.get("dim", 0)) % (parts[0].ndim + 1)
    return Stack(tuple(parts), dim)


def _pad(trace: Trace, b: _Bound) -> Value:
    x, flat = b.value(), [int(n) for n in b.get("pad", b.get("padding"))]
    mode, value = b.get("mode", "constant"), float(b.get("value", 0) or 0)
    names = {"constant": "zeros", "reflect": "reflect", "replicate": "edge"}
    pairs = [(0, 0)] * (x.ndim - len(flat) // 2) + [(flat[i], flat[i + 1]) for i in range(len(flat) - 2, -1, -2)]
    if mode not in names:
        raise Refused(f"pads by {mode}")
    if value == -math.inf and mode == "constant":
        step, _ = trace.as_map(x)
        (top, bottom), (left, right) = pairs[2:]
        if step.is_map:
            return trace.max_pool(x, (1, 1), (1, 1), (top, left, bottom, right), (1, 1), ceil=False)
    if value:
        raise Refused(f"pads with {value:g}")
    return trace.pad(x, pairs, names[mode])


def _mode_pad(mode: str) -> Callable[[Trace, _Bound], Value]:
    def handler(trace: Trace, b: _Bound) -> Value:
        b.named["mode"] = mode
        return _pad(trace, b)

    return handler


def _split(trace: Trace, b: _Bound) -> list[Value]:
    x, sizes, dim = b.value(), b.get("split_size", b.get("split_sizes", b.args[1])), int(b.get("dim", 0))
    total = x.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - at) for at in range(0, total, sizes)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [x.move(lambda p, a=a, n=n: p.narrow(dim, a, n)) for a, n in zip(starts, sizes, strict=True)]  # type: ignore[misc]


def _chunk(trace: Trace, b: _Bound) -> list[Value]:
    x, dim = b.value(), int(b.get("dim", 0))
    size = -(-x.shape[dim] // int(b.args[1]))
    return _split(trace, _Bound(("self", "split_size", "dim"), (x, size, dim), {}))


def _unbind(trace: Trace, b: _Bound) -> list[Value]:
    x, dim = b.value(), int(b.get("dim", 0))
    return [select(x, dim, i) for i in range(x.shape[dim])]


def _softmax(trace: Trace, b: _Bound) -> Any:
    return trace.softmax(b.value(), int(b.get("dim")))


def _dropout(trace: Trace, b: _Bound) -> Value:
    if b.get("train", False):
        raise Refused("drops features outside of training")
    return trace.unary(b.value("input"), "dropout", p=float(b.get("p", 0.5)))


def _as_it_is(trace: Trace, b: _Bound) -> Any:
    return b.args[0]


def _zeros_like(trace: Trace, b: _Bound) -> Tensor:
    return torch.zeros(b.args[0].shape)


def _view_as(trace: Trace, b: _Bound) -> Value:
    return b.value().move(lambda p: p.reshape(b.args[1].shape))


def _expand_as(trace: Trace, b: _Bound) -> Value:
    return b.value().move(lambda p: p.expand(b.args[1].shape))


def _resize(trace: Trace, b: _Bound) -> Value:
    x, scales = b.value("input"), b.get("scales", b.get("scale_factors", b.get("scales_h")))
    size = b.get("output_size", b.get("size"))
    if size is None and isinstance(scales, list):
        size = [int(n * s) for n, s in zip(x.shape[2:], scales, strict=True)]
    if size is None:
        raise Refused("resizes to an unknown size")
    mode = "bilinear" if b.get("align_corners") is not None else "nearest"
    return trace.resize(x, (int(size[0]), int(size[1])), mode=mode, align_corners=bool(b.get("align_corners", False)))


def _index(trace: Trace, b: _Bound) -> Value:
    x, indices = b.value(), b.get("indices", b.args[1])
    if any(is_symbol(i) for i in indices):
        raise Refused("picks by what it computes")
    return x.move(lambda p: p[tuple(slice(None) if i is None else i for i in indices)])


def _norm_stats(trace: Trace, b: _Bound) -> Value:
    raise Refused("normalises each image by its own statistics (LayerNorm, InstanceNorm)")


def _of_stack(trace: Trace, name: str, x: Stack, b: _Bound) -> Any:
    if name in ("mul",):
        return mul(trace, x, b.args[1])
    if name == "sum":
        return _reduce("sum")(trace, b)
    if name == "select":
        return x.parts[int(b.args[2])] if int(b.args[1]) % x.ndim == x.dim else _stack_refused()
    if name == "unbind":
        return list(x.parts)
    return _stack_refused()


def _stack_refused() -> Any:
    raise Refused("computes on a stack of tensors")


_HANDLERS: dict[str, Callable[[Trace, _Bound], Any]] = {
    **{name: _unary(name) for name in _UNARY},
    **dict.fromkeys(_IDENTITY, _as_it_is),
    **dict.fromkeys(("_assert_tensor_metadata", "_assert_async", "_assert_scalar"), lambda trace, b: None),
    **dict.fromkeys(("conv2d", "convolution", "_convolution", "_convolution_mode", "conv1d", "conv3d"), _conv),
    **dict.fromkeys(("batch_norm",), _batch_norm),
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "native_batch_norm", "cudnn_batch_norm"), _first(_batch_norm)),
    "group_norm": _group_norm,
    "native_group_norm": _first(_group_norm),
    **dict.fromkeys(("layer_norm", "native_layer_norm", "instance_norm"), _norm_stats),
    "linear": _linear,
    "addmm": _addmm,
    **dict.fromkeys(("mm", "matmul"), _matmul),
    "relu6": lambda trace, b: clamp(trace, b.value(), 0.0, 6.0),
    "hardsigmoid": lambda trace, b: trace.unary(b.value(), "hard_sigmoid", keeps_zero=False, alpha=1 / 6, beta=0.5),
    "elu": _elu,
    "gelu": _gelu,
    "leaky_relu": _leaky,
    **dict.fromkeys(("prelu", "_prelu_kernel"), _prelu),
    "clamp": _clamp,
    "clamp_min": lambda trace, b: clamp(trace, b.value(), float(b.args[1]), None),
    "clamp_max": lambda trace, b: clamp(trace, b.value(), None, float(b.args[1])),
    "hardtanh": _hardtanh,
    "maximum": _maximum,
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "mul": _mul,
    "div": _div,
    "neg": lambda trace, b: mul(trace, b.args[0], -1.0),
    "max_pool2d": _max_pool,
    **dict.fromkeys(("max_pool2d_with_indices",), lambda trace, b: [_max_pool(trace, b), None]),
    "avg_pool2d": _avg_pool,
    **dict.fromkeys(("adaptive_avg_pool2d", "_adaptive_avg_pool2d"), _adaptive("global_avg")),
    "adaptive_max_pool2d": lambda trace, b: [_adaptive("global_max")(trace, b), None],
    "mean": _reduce("global_avg"),
    "amax": _reduce("global_max"),
    "sum": _reduce("sum"),
    "max": _max,
    "flatten": _flatten,
    **dict.fromkeys(("cat", "concat"), _cat),
    "stack": _stack,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "reflection_pad2d": _mode_pad("reflect"),
    "replication_pad2d": _mode_pad("replicate"),
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "chunk": _chunk,
    "unbind": _unbind,
    **dict.fromkeys(("softmax", "_softmax"), _softmax),
    **dict.fromkeys(("log_softmax", "_log_softmax"), lambda trace, b: trace.log_softmax(b.value(), int(b.get("dim")))),
    "dropout": _dropout,
    **dict.fromkeys(("zeros_like", "new_zeros"), _zeros_like),
    **dict.fromkeys(("view_as", "reshape_as"), _view_as),
    "expand_as": _expand_as,
    **dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d"), _resize),
    "index": _index,
}
