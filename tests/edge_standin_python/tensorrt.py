"""A STAND-IN for the Python module of TensorRT, for tests only: onnxruntime computes, on the CPU, what a GPU would.

Its engines are those of the stand-in trtexec, which carry the ONNX file they were "built" from. It also stands in for the
CUDA runtime library: memory of the "GPU" is memory of this process.
"""

import ctypes
import os
from types import SimpleNamespace

import numpy as np
import onnxruntime

__version__ = os.environ.get("STANDIN_TENSORRT", "10.3.0")
TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")


class Logger:
    WARNING = 1

    def __init__(self, level):
        self.level = level


def nptype(dtype):
    return dtype


class Runtime:
    def __init__(self, logger):
        self.logger = logger

    def deserialize_cuda_engine(self, content):
        head, _, model = content.partition(b"\n")
        return Engine(model) if head.startswith(b"STAND-IN") else None


class Engine:
    num_io_tensors = 2

    def __init__(self, model):
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.tensors = [self.session.get_inputs()[0], self.session.get_outputs()[0]]

    def _shape(self, name):
        tensor = next(t for t in self.tensors if t.name == name)
        return tuple(n if isinstance(n, int) else -1 for n in tensor.shape)

    def get_tensor_name(self, i):
        return self.tensors[i].name

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name == self.tensors[0].name else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name):
        return self._shape(name)

    def get_tensor_dtype(self, name):
        return np.float32

    def get_tensor_profile_shape(self, name, profile):
        return [(n, *self._shape(name)[1:]) for n in (1, 4, 4)]

    def create_execution_context(self):
        return Context(self)


class Context:
    def __init__(self, engine):
        self.engine = engine
        self.shape = None
        self.addresses = {}

    def set_input_shape(self, name, shape):
        self.shape = shape
        return True

    def get_tensor_shape(self, name):
        return (self.shape[0], *self.engine._shape(name)[1:])

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        x, y = (t.name for t in self.engine.tensors)
        count = int(np.prod(self.shape))
        values = np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.addresses[x])).reshape(self.shape)
        found = np.ascontiguousarray(self.engine.session.run(None, {x: values})[0], np.float32)
        ctypes.memmove(self.addresses[y], found.ctypes.data, found.nbytes)
        return True


class Cudart:
    """The calls of the CUDA runtime that an inference makes, on memory of this process; 0 means success."""

    def __init__(self):
        self.held = {}

    def cudaMalloc(self, pointer, size):  # noqa: N802
        memory = ctypes.create_string_buffer(size.value)
        pointer._obj.value = ctypes.addressof(memory)
        self.held[pointer._obj.value] = memory
        return 0

    def cudaFree(self, pointer):  # noqa: N802
        del self.held[pointer.value]
        return 0

    def cudaMemcpy(self, to, source, size, kind):  # noqa: N802
        ctypes.memmove(to.value, source.value, size.value)
        return 0

    def cudaDeviceSynchronize(self):  # noqa: N802
        return 0

    def cudaDeviceGetAttribute(self, value, attribute, device):  # noqa: N802
        value._obj.value = {75: 8, 76: 7}[attribute]
        return 0


_load = ctypes.CDLL
ctypes.CDLL = lambda name, *rest, **more: Cudart() if "libcudart" in str(name) else _load(name, *rest, **more)
