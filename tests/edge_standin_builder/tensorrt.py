# ruff: noqa: PTH100, PTH118, PTH120, PTH123, RUF005
"""A STAND-IN for the Python module of TensorRT and for the CUDA runtime, for tests of the builder that travels.

Standard library only, Python 3.6 and later. It builds nothing and computes nothing: an engine carries the ONNX file it was
"built" from, its output follows from its input. `STANDIN_TENSORRT` is the version it pretends to be, with the names that this
version has; `STANDIN_TROUBLE` is what goes wrong. Engines are those of the stand-in trtexec.
"""

import array
import ctypes
import json
import os
import sys
import zlib

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from edge_standin_layers import graph_of, layers_of

__version__ = os.environ.get("STANDIN_TENSORRT", "10.3.0")
VERSION = tuple(int(n) for n in __version__.split(".")[:2])
TROUBLE = os.environ.get("STANDIN_TROUBLE")
calls = []


class Names:
    """Values by name; names that the version lacks are not there."""

    def __init__(self, *names):
        for i, name in enumerate(names):
            setattr(self, name, i)


class DataType:
    def __init__(self, name, itemsize):
        self.name, self.itemsize = name, itemsize

    def __str__(self):
        return "DataType." + self.name


FLOAT = DataType("FLOAT", 4)
TensorIOMode = Names("NONE", "INPUT", "OUTPUT")
DeviceType = Names("GPU", "DLA")
ProfilingVerbosity = Names("LAYER_NAMES_ONLY", "NONE", "DETAILED")
LayerInformationFormat = Names("ONELINE", "JSON")
OLD = ["FP16", "INT8"] + (["FP8"] if VERSION >= (8, 6) else [])
BuilderFlag = Names("GPU_FALLBACK", "SPARSE_WEIGHTS", *(OLD if VERSION < (11, 0) else []))
NetworkDefinitionCreationFlag = Names(*(["EXPLICIT_BATCH"] if VERSION < (11, 0) else ["STRONGLY_TYPED"]))
if (9, 0) <= VERSION < (11, 0):
    NetworkDefinitionCreationFlag = Names("EXPLICIT_BATCH", "STRONGLY_TYPED")
if VERSION >= (8, 4):
    MemoryPoolType = Names("WORKSPACE", "DLA_MANAGED_SRAM")


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class IProfiler:
    pass


class Tensor:
    def __init__(self, name, shape):
        self.name, self.shape = name, shape


class Network:
    num_inputs = 1
    content = b""

    def get_input(self, i):
        return Tensor("x", (-1, 3, 8, 8))


class OnnxParser:
    num_errors = 1

    def __init__(self, network, logger):
        self.network = network

    def get_error(self, i):
        return self

    def desc(self):
        return "In node 3: no importer registered for op: Foo"

    def parse(self, content):
        self.network.content = content
        return TROUBLE != "parser"


if VERSION >= (8, 4):

    def _from_file(self, path):
        with open(path, "rb") as f:
            return self.parse(f.read())

    OnnxParser.parse_from_file = _from_file


class Profile:
    def set_shape(self, name, least, opt, most):
        calls.append((name, least, opt, most))


class Cache:
    def __init__(self, content):
        self.content = content

    def serialize(self):
        return self.content + b"timed"


class Config:
    def __init__(self):
        self.flags = []

    def set_flag(self, flag):
        self.flags.append(flag)

    def create_timing_cache(self, content):
        return Cache(content)

    def set_timing_cache(self, cache, ignore_mismatch):
        pass

    def add_optimization_profile(self, profile):
        pass


if VERSION >= (8, 4):
    Config.set_memory_pool_limit = lambda self, pool, size: None


class Builder:
    num_DLA_cores = 2 if VERSION < (10, 8) else 0

    def __init__(self, logger):
        self.logger = logger

    def create_network(self, flags):
        return Network()

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, config):
        log = self.logger.log
        if TROUBLE == "build":
            log(ILogger.ERROR, "Error[10]: Could not find any implementation for node conv1")
            return None
        flags = ["--" + f.lower() for f in ("FP16", "INT8") if getattr(BuilderFlag, f, None) in config.flags]
        dla = getattr(config, "default_device_type", DeviceType.GPU) == DeviceType.DLA
        document, lines = layers_of(network.content, VERSION, flags, TROUBLE, dla)
        for line in lines:
            log(ILogger.INFO, line)
        about = {"size": len(network.content), "int8": "--int8" in flags, "layers": document}
        return b"STAND-IN" + json.dumps(about).encode() + b"\n" + network.content


class Runtime:
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, content):
        head, _, model = content.partition(b"\n")
        return Engine(json.loads(head[8:].decode()), model) if head.startswith(b"STAND-IN") and TROUBLE != "load" else None


class Inspector:
    def __init__(self, about):
        self.about = about

    def get_engine_information(self, form):
        return '{"Layers": [' if TROUBLE == "garbage" else json.dumps(self.about["layers"], indent=1)


SHAPES = {"x": (-1, 3, 8, 8), "y": (-1, 10)}


class Engine:
    def __init__(self, about, model):
        self.about = about
        self.names = [name for name, _, _, _ in graph_of(model)[0]]

    def create_execution_context(self):
        return Context(self)

    def create_engine_inspector(self):
        return Inspector(self.about)


class Context:
    profiler = None

    def __init__(self, engine):
        self.engine, self.batch, self.addresses, self.runs = engine, 1, {}, 0

    def _run(self, x, y):
        self.runs += 1
        value = zlib.crc32(ctypes.string_at(x, self.batch * 3 * 8 * 8 * 4)) % 1000 / 1000.0
        value = {"nan": float("nan"), "random": float(self.runs)}.get(TROUBLE, value)
        found = array.array("f", [value] * (10 * self.batch)).tobytes()
        ctypes.memmove(y, found, len(found))
        for name in self.engine.names if self.profiler else ():
            self.profiler.report_layer_time(name, 0.01)
        return TROUBLE != "queue"


def _shape_of(self, name):
    return (self.batch,) + SHAPES[name][1:]


def _set(self, name, shape):
    self.batch = shape[0]
    return True


if VERSION >= (8, 5):
    Engine.num_io_tensors = 2
    Engine.get_tensor_name = lambda self, i: "xy"[i]
    Engine.get_tensor_mode = lambda self, name: TensorIOMode.INPUT if name == "x" else TensorIOMode.OUTPUT
    Engine.get_tensor_shape = lambda self, name: SHAPES[name]
    Engine.get_tensor_dtype = lambda self, name: FLOAT
    Context.set_input_shape = _set
    Context.get_tensor_shape = _shape_of
    Context.set_tensor_address = lambda self, name, address: self.addresses.__setitem__(name, address)
    Context.execute_async_v3 = lambda self, stream: self._run(self.addresses["x"], self.addresses["y"])
else:
    Engine.num_bindings = 2
    Engine.get_binding_name = lambda self, i: "xy"[i]
    Engine.get_binding_index = lambda self, name: "xy".index(name)
    Engine.get_binding_shape = lambda self, name: SHAPES[name]
    Engine.get_binding_dtype = lambda self, name: FLOAT
    Engine.binding_is_input = lambda self, name: name == "x"
    Context.set_binding_shape = lambda self, i, shape: _set(self, "x", shape)
    Context.get_binding_shape = lambda self, i: _shape_of(self, "xy"[i])
    Context.execute_async_v2 = lambda self, addresses, stream: self._run(*addresses)


class Cudart:
    """The calls of the CUDA runtime that the builder makes, on memory of this process; 0 means success, a run takes 1 ms."""

    def __init__(self):
        self.held, self.made, self.timed = {}, 0, 0

    def _handle(self, pointer):
        self.made += 1
        pointer._obj.value = self.made
        return 0

    def cudaMalloc(self, pointer, size):  # noqa: N802
        memory = ctypes.create_string_buffer(size.value)
        pointer._obj.value = ctypes.addressof(memory)
        self.held[pointer._obj.value] = memory
        return 2 if TROUBLE == "memory" else 0

    def cudaMemcpy(self, to, source, size, kind):  # noqa: N802
        ctypes.memmove(to.value, source.value, size.value)
        return 0

    def cudaMemcpyAsync(self, to, source, size, kind, stream):  # noqa: N802
        ctypes.memmove(to, source, size.value)
        return 0

    def cudaStreamCreate(self, pointer):  # noqa: N802
        return self._handle(pointer)

    def cudaStreamSynchronize(self, stream):  # noqa: N802
        return 0

    def cudaEventCreate(self, pointer):  # noqa: N802
        return self._handle(pointer)

    def cudaEventRecord(self, event, stream):  # noqa: N802
        return 0

    def cudaEventElapsedTime(self, found, start, end):  # noqa: N802
        self.timed += 1
        found._obj.value = 1.0 + self.timed % 7 / 1000.0
        return 0

    def cudaDeviceGetAttribute(self, value, attribute, device):  # noqa: N802
        value._obj.value = {75: 8, 76: 7, 16: 8, 13: 625000}[attribute.value]
        return 0

    def cudaGetDeviceProperties(self, memory, device):  # noqa: N802
        memory[:5] = b"Orin\0"
        return 0

    def cudaStreamBeginCapture(self, stream, mode):  # noqa: N802
        return 0

    def cudaStreamEndCapture(self, stream, pointer):  # noqa: N802
        return self._handle(pointer)

    def cudaGraphInstantiate(self, pointer, graph, *rest):  # noqa: N802
        return 900 if TROUBLE == "graph" else self._handle(pointer)

    def cudaGraphLaunch(self, graph, stream):  # noqa: N802
        return 0


_load = ctypes.CDLL
ctypes.CDLL = lambda name, *rest, **more: Cudart() if "libcudart" in str(name) else _load(name, *rest, **more)
