"""Reads the pickles that torch writes without running anything that stands in them.

A pickle is a program. This reader executes it on a machine that knows only harmless values: numbers, text, containers,
tensors whose bytes stay in the file (`StoredTensor`), and `Record`, which notes that an object of some class would stand
here, with its arguments and its state. No class or function named in the file is ever imported or called, so even a
whole-module pickle (``torch.save(model)``) can be read: its modules are records with ``_parameters`` and ``_modules``.

A program that calls anything outside a short list of harmless constructors is refused, and the callable is named. That is
narrower than torch's ``weights_only`` reader, and unlike it spends no memory on tensors that nobody asks for (optimizer
state) or on sizes a damaged file merely claims.
"""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Protocol

import torch
from torch import Tensor

from compress.checkpoints.base import Shape
from rescompress.core.errors import CheckpointError

MAX_PICKLE_BYTES = 256 * 2**20
MAX_DIMENSIONS = 8

_FORBIDDEN_MODULES = frozenset(
    {
        "os",
        "posix",
        "nt",
        "ntpath",
        "posixpath",
        "subprocess",
        "sys",
        "importlib",
        "runpy",
        "shutil",
        "socket",
        "pty",
        "code",
        "codeop",
        "ctypes",
        "webbrowser",
        "pickle",
        "operator",
        "io",
        "_io",
        "types",
        "marshal",
        "multiprocessing",
        "threading",
        "asyncio",
        "signal",
        "tempfile",
        "urllib",
        "http",
        "requests",
        "site",
    }
)
_BUILTIN_TYPES = frozenset(
    {
        "set",
        "frozenset",
        "list",
        "dict",
        "tuple",
        "int",
        "float",
        "bool",
        "str",
        "bytes",
        "bytearray",
        "complex",
        "object",
        "slice",
        "range",
        "type",
        "NoneType",
    }
)
_HARMLESS_CALLS = frozenset(
    {
        "_codecs.encode",
        "argparse.Namespace",
        "collections.deque",
        "copyreg._reconstructor",
        "datetime.date",
        "datetime.datetime",
        "datetime.timedelta",
        "datetime.timezone",
        "functools.partial",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib.PureWindowsPath",
        "pathlib.WindowsPath",
        "torch.device",
        "torch.jit._pickle.build_boollist",
        "torch.jit._pickle.build_doublelist",
        "torch.jit._pickle.build_intlist",
        "torch.jit._pickle.build_tensorlist",
        "torch.jit._pickle.restore_type_tag",
        "torch.torch_version.TorchVersion",
        "uuid.UUID",
    }
)
"""Constructors of plain values: a call of one becomes an inert record of its arguments."""

_STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


class Storages(Protocol):
    """Where the bytes of the tensors lie."""

    def read(self, key: str, low: int, high: int) -> Tensor:
        """Return bytes `low` to `high` of the storage called `key` as a new uint8 tensor; raises CheckpointError."""
        ...

    def declare(self, key: str, itemsize: int) -> None:
        """Learn that the pickle refers to the storage called `key`, of values of `itemsize` bytes."""
        ...


@dataclass(frozen=True)
class Storage:
    """A flat run of values in the file."""

    storages: Storages
    key: str
    dtype: torch.dtype
    n_bytes: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose values still lie in the file."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: Shape
    stride: Shape

    def read(self) -> Tensor:
        """Return the values, contiguous, in the file's dtype.

        Raises:
            CheckpointError: The file ends before the tensor does.
        """
        width = self.dtype.itemsize
        span = sum((s - 1) * t for s, t in zip(self.shape, self.stride, strict=True)) + 1 if 0 not in self.shape else 0
        data = self.storage.storages.read(self.storage.key, self.offset * width, (self.offset + span) * width)
        return data.view(self.dtype).as_strided(self.shape, self.stride).contiguous()


if TYPE_CHECKING:

    class _Machine:
        """The parts of Python's own pickle machine that are used here."""

        dispatch: ClassVar[dict[int, Callable[..., None]]]
        stack: list[Any]
        append: Callable[[object], None]
        read: Callable[[int], bytes]

        def __init__(self, file: BinaryIO, *, encoding: str, errors: str) -> None: ...

        def load(self) -> object: ...

        def pop_mark(self) -> list[Any]: ...

else:
    _Machine = pickle._Unpickler


class _Inert(type):
    """The type of stand-ins: calling one is allowed only where the call is harmless."""

    path: str

    def __call__(cls, *args: object, **kwargs: object) -> object:
        if cls.path not in _HARMLESS_CALLS and not (cls.path.startswith("builtins.") and cls.path[9:] in _BUILTIN_TYPES):
            raise _unsafe(cls.path)
        return Record.__new__(cls, *args, **kwargs)  # type: ignore[arg-type]


class Record(metaclass=_Inert):
    """An object of a class that was not imported.

    Attributes:
        path: Full name of the class, such as ``torch.nn.modules.conv.Conv2d``.
        args: What it would have been made from.
        state: Its attributes, where the file gives any.
        content: Its state where that is no dictionary, such as the shape, type and bytes of a numpy array.
    """

    path = ""
    args: tuple[object, ...]
    state: dict[object, object]
    content: object

    def __new__(cls, *args: object, **kwargs: object) -> Record:
        """Return a record; the state comes later, if any."""
        self = object.__new__(cls)
        object.__setattr__(self, "args", (*args, *kwargs.values()))
        object.__setattr__(self, "state", {})
        object.__setattr__(self, "content", None)
        return self

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            self.__setstate__(state[0])
            state = state[1]
        if isinstance(state, dict):
            self.state.update(state)
        else:
            object.__setattr__(self, "content", state)

    def __setitem__(self, key: object, value: object) -> None:
        self.state[key] = value

    def append(self, item: object) -> None:
        """Take an item, as the list that this record stands for would."""

    def extend(self, items: object) -> None:
        """Take items, as the list that this record stands for would."""

    def add(self, item: object) -> None:
        """Take an item, as the set that this record stands for would."""

    def __repr__(self) -> str:
        return f"<{self.path}>"


def _unsafe(path: str) -> CheckpointError:
    return CheckpointError(
        f"the pickle would run {path}",
        remedy="save the state_dict alone (torch.save(model.state_dict(), ...)); --allow-pickle runs it, if you trust the file",
    )


def _damaged(why: str) -> CheckpointError:
    return CheckpointError(f"damaged: {why}", remedy="fetch or save the file again")


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("ascii", "replace")
    if isinstance(value, str):
        return value
    raise _damaged("a name is no text")


def _integers(values: object) -> Shape:
    if not isinstance(values, (tuple, list)) or len(values) > MAX_DIMENSIONS:
        raise _damaged("a tensor's shape is no short list of numbers")
    if not all(type(v) is int and 0 <= v < 2**48 for v in values):
        raise _damaged("a tensor's shape holds something that is no size")
    return tuple(values)


def _tensor(args: tuple[object, ...], dtype: torch.dtype | None = None) -> StoredTensor:
    if len(args) < 4:
        raise _damaged("a tensor has no storage")
    return stored_tensor(*args[:4], dtype=dtype)


def stored_tensor(
    storage: object, offset: object, size: object, stride: object, *, dtype: torch.dtype | None = None
) -> StoredTensor:
    """Return the tensor that a file describes, once the description is seen to fit its storage.

    Raises:
        CheckpointError: It does not.
    """
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
        raise _damaged("a tensor has no storage")
    shape, steps = _integers(size), _integers(stride)
    if len(shape) != len(steps):
        raise _damaged("a tensor's shape and strides differ in length")
    dtype = dtype or storage.dtype
    empty = any(s == 0 for s in shape)
    last = 0 if empty else offset + sum((s - 1) * t for s, t in zip(shape, steps, strict=True)) + 1
    if last * dtype.itemsize > storage.n_bytes:
        raise _damaged(f"a tensor of shape {shape} reaches beyond its storage")
    if not empty and any(t == 0 and s > 1 for s, t in zip(shape, steps, strict=True)):
        raise CheckpointError(f"a tensor of shape {shape} repeats a few stored values", remedy="save it with .contiguous()")
    return StoredTensor(storage, dtype, offset, shape, steps)


def _rebuild_v2(*args: object) -> StoredTensor:
    return _tensor(args)


def _rebuild_v3(*args: object) -> StoredTensor:
    if len(args) < 7 or not isinstance(args[6], torch.dtype):
        raise _damaged("a tensor has no dtype")
    return _tensor(args, args[6])


def _first(*args: object) -> object:
    return args[0] if args else None


def _from_type(*args: object) -> object:
    if len(args) < 3 or not callable(args[0]) or not isinstance(args[2], tuple):
        raise _damaged("a tensor of a subclass has no content")
    if args[0] not in (_rebuild_v2, _rebuild_v3, _first):
        raise _unsafe(getattr(args[0], "path", repr(args[0])))
    return args[0](*args[2])


def _ordered(*args: object) -> OrderedDict[object, object]:
    pairs = args[0] if args else ()
    if not isinstance(pairs, (list, tuple)):
        raise _damaged("an OrderedDict is made of something else than pairs")
    result: OrderedDict[object, object] = OrderedDict()
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise _damaged("an OrderedDict is made of something else than pairs")
        _put(result, pair[0], pair[1])
    return result


def _defaultdict(*args: object) -> dict[object, object]:
    return {}


def _counter(*args: object) -> dict[object, object]:
    return dict(args[0]) if args and isinstance(args[0], dict) else {}


def _size(*args: object) -> Shape:
    return _integers(args[0] if args else ())


def _method(*args: object) -> object:
    """Return a stand-in for a method of a class that was not imported; real attributes are never looked up.

    mmengine's training logs refer to methods of their own class in this way.

    Raises:
        CheckpointError: It is an attribute of anything else.
    """
    if len(args) != 2 or not isinstance(args[0], _Inert) or not isinstance(args[1], str):
        raise _unsafe("builtins.getattr")
    return _Inert(args[1], (Record,), {"path": f"{args[0].path}.{args[1]}"})


_BUILDERS: dict[str, Callable[..., object]] = {
    "builtins.getattr": _method,
    "torch._utils._rebuild_tensor": _rebuild_v2,
    "torch._utils._rebuild_tensor_v2": _rebuild_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch._tensor._rebuild_from_type": _from_type,
    "torch.nn.parameter.Parameter": _first,
    "torch.nn.parameter.Buffer": _first,
    "torch.Size": _size,
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": _defaultdict,
    "collections.Counter": _counter,
}

_REFUSED = {
    "torch._utils._rebuild_qtensor": "holds torch's own quantized tensors; give the float checkpoint",
    "torch._utils._rebuild_sparse_tensor": "holds sparse tensors; save it with .to_dense()",
    "torch._utils._rebuild_nested_tensor": "holds nested tensors",
    "torch._utils._rebuild_meta_tensor_no_storage": "holds tensors without values (device 'meta')",
}


def _put(target: Any, key: object, value: object) -> None:
    try:
        if isinstance(target, dict) and key in target:
            raise CheckpointError(f"the key {str(key)[:200]!r} stands in it twice", remedy="save the checkpoint again")
        target[key] = value
    except TypeError:
        raise _damaged("a dictionary has a key that cannot be one") from None


class _Reader(_Machine):
    """Python's own (pure-Python) pickle machine, with everything that could reach outside replaced."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(_Machine.dispatch)

    def __init__(self, file: BinaryIO, storages: Storages) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self._storages = storages
        self._classes: dict[str, object] = {}

    def find_class(self, module: str, name: str) -> object:
        path = f"{module}.{name}".replace("__builtin__.", "builtins.")
        if path not in self._classes:
            self._classes[path] = self._stand_in(path, module, name)
        return self._classes[path]

    def _stand_in(self, path: str, module: str, name: str) -> object:
        if path in _BUILDERS:
            return _BUILDERS[path]
        if path in _REFUSED:
            raise CheckpointError(_REFUSED[path])
        root = module.split(".")[0]
        if root in _FORBIDDEN_MODULES or (root in ("builtins", "__builtin__") and name not in _BUILTIN_TYPES):
            raise _unsafe(path)
        if module in ("torch", "torch.storage") and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return _Inert(name, (Record,), {"path": path})

    def persistent_load(self, pid: object) -> object:
        if not isinstance(pid, tuple) or len(pid) < 2:
            raise _damaged("a reference to something outside is unknown")
        if _text(pid[0]) == "module":  # a whole module of a legacy file: (class, source file, source)
            return pid[1]
        if _text(pid[0]) != "storage" or len(pid) < 5 or not isinstance(pid[1], torch.dtype):
            raise _damaged("a reference to something outside is unknown")
        dtype, key, numel = pid[1], _text(pid[2]), pid[4]
        if type(numel) is not int or not 0 <= numel < 2**40:
            raise _damaged("a storage claims an impossible size")
        if len(pid) > 5 and pid[5] is not None:
            raise CheckpointError("a very old file whose storages are views", remedy="load it in torch and save it again")
        self._storages.declare(key, dtype.itemsize)
        return Storage(self._storages, key, dtype, numel * dtype.itemsize)

    def get_extension(self, code: int) -> object:
        raise _damaged("it uses pickle extension codes")

    def _load_setitem(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        _put(self._container(), key, value)

    def _load_setitems(self) -> None:
        items = self.pop_mark()
        target = self._container()
        for i in range(0, len(items) - 1, 2):
            _put(target, items[i], items[i + 1])

    def _container(self) -> object:
        target = self.stack[-1]
        if not isinstance(target, (dict, Record)):
            raise _damaged("items are put into something that holds none")
        return target

    def _load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        data = self.read(length) if length <= MAX_PICKLE_BYTES else b""
        if len(data) != length:
            raise _damaged("it ends too early")
        self.append(bytearray(data))

    def _load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Record):
            target.__setstate__(state)
        # state of a container (hooks of an OrderedDict) is of no use here

    dispatch[pickle.SETITEM[0]] = _load_setitem
    dispatch[pickle.SETITEMS[0]] = _load_setitems
    dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray8
    dispatch[pickle.BUILD[0]] = _load_build


def read_object(file: BinaryIO, storages: Storages) -> object:
    """Return what the pickle at the current position of `file` describes, and leave the position behind it.

    Args:
        file: The pickle.
        storages: Where tensors find their bytes.

    Raises:
        CheckpointError: The pickle would run something, or is damaged.
    """
    try:
        return _Reader(file, storages).load()
    except CheckpointError:
        raise
    except (RecursionError, MemoryError):
        raise _damaged("its pickle is nested or sized beyond measure") from None
    except Exception as e:  # a damaged pickle program fails in any way there is
        raise _damaged(f"its pickle cannot be read ({type(e).__name__}: {str(e)[:120]})") from e


class _NoStorages:
    """The storages of a pickle that has none."""

    def read(self, key: str, low: int, high: int) -> Tensor:
        raise _damaged("a tensor stands where none belongs")

    def declare(self, key: str, itemsize: int) -> None:
        raise _damaged("a tensor stands where none belongs")


def read_plain(file: BinaryIO) -> object:
    """Return what a pickle without tensors describes (see `read_object`)."""
    return read_object(file, _NoStorages())
