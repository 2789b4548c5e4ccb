#!/usr/bin/env python3
# This file travels to boards as it is, down to Python 3.6: no annotations, no pathlib idioms, no f-strings.
# ruff: noqa: UP031, PTH105, PTH110, PTH118, PTH123, RUF005, RUF007, B905, T201
# mypy: ignore-errors
"""Builds, times, checks and runs TensorRT engines on a board that has no trtexec: ``python3 trt_builder.py --onnx=...``.

Self-contained: Python 3.6 to 3.13, its standard library, and the TensorRT module of the board (8.2 to 11; JetPack, pip or a
container). It understands the flags of NVIDIA's trtexec that rescompress gives, and prints and writes what that prints and
writes, so that whatever drives and reads the one drives and reads the other; its banner says which of the two spoke.

    python3 trt_builder.py --onnx=model.onnx --saveEngine=model.engine --fp16 --exportLayerInfo=layers.json --skipInference
    python3 trt_builder.py --loadEngine=model.engine --duration=10 --useCudaGraph --exportTimes=times.json

The GPU time of a run is taken between two events on its stream, as trtexec does.
"""

import array
import ctypes
import importlib
import json
import os
import random
import sys
import time

NAME = "TensorRT.trt_builder"
EXIT_MISSING = 4
EXIT_FAILED = 1

FLAGS = (
    # Flag, whether it takes a value, what it does.
    ("--onnx", True, "ONNX file to build from"),
    ("--saveEngine", True, "engine to write"),
    ("--loadEngine", True, "engine to run"),
    ("--fp16", False, "allow float16 (before TensorRT 11)"),
    ("--int8", False, "allow int8 (before TensorRT 11)"),
    ("--fp8", False, "allow float8 (before TensorRT 11)"),
    ("--stronglyTyped", False, "take the types from the file"),
    ("--memPoolSize", True, "workspace:MIB"),
    ("--workspace", True, "MIB of scratch memory (before 8.4)"),
    ("--minShapes", True, "input:NxCxHxW"),
    ("--optShapes", True, "input:NxCxHxW"),
    ("--maxShapes", True, "input:NxCxHxW"),
    ("--shapes", True, "input:NxCxHxW to run with"),
    ("--timingCacheFile", True, "timings of kernels, read and written"),
    ("--sparsity", True, "enable: sparse kernels where the weights allow it"),
    ("--useDLACore", True, "deep-learning accelerator"),
    ("--allowGPUFallback", False, "the GPU runs what the accelerator cannot"),
    ("--profilingVerbosity", True, "detailed: layers are named"),
    ("--exportLayerInfo", True, "layers of the engine as JSON"),
    ("--skipInference", False, "build only"),
    ("--buildOnly", False, "build only"),
    ("--warmUp", True, "ms before the first sample"),
    ("--duration", True, "least seconds of samples"),
    ("--iterations", True, "least number of samples"),
    ("--avgRuns", True, "accepted, without effect"),
    ("--idleTime", True, "ms of sleep between two runs"),
    ("--streams", True, "streams that run at once; the first is timed"),
    ("--infStreams", True, "the same, as newer versions call it"),
    ("--noDataTransfers", False, "inputs stay on the GPU"),
    ("--dataTransfers", False, "copy inputs and outputs with every run, and time that, too"),
    ("--useSpinWait", False, "accepted: the host always waits actively"),
    ("--useCudaGraph", False, "record the launches once and repeat them"),
    ("--exportTimes", True, "one record a run as JSON"),
    ("--dumpProfile", False, "time every layer"),
    ("--separateProfileRun", False, "accepted: layers are always timed apart"),
    ("--exportProfile", True, "times of the layers as JSON"),
    ("--percentile", True, "percentiles of the summary, separated by commas"),
    ("--check", False, "run twice on random values: outputs must be finite and the same"),
    ("--verbose", False, "show all of TensorRT's own messages"),
    ("--help", False, "this text"),
)
TAKES = {flag: takes for flag, takes, _ in FLAGS}


class BuilderError(RuntimeError):
    """Something cannot be done on this board."""


def say(text, level="I"):
    """Print a line as trtexec does."""
    print("[%s] [%s] %s" % (time.strftime("%m/%d/%Y-%H:%M:%S"), level, text), flush=True)


def digits(version):
    """Return ``10.3.0`` as trtexec writes it: ``100300``; ``8.5.2`` as ``8502``."""
    parts = [int("".join(c for c in p if c.isdigit()) or 0) for p in (version.split(".") + ["0", "0"])[:3]]
    return "%d%02d%02d" % tuple(parts) if parts[0] >= 10 else "%d%d%02d" % tuple(parts)


class Cuda:
    """The calls of the CUDA runtime that timing an engine needs."""

    def __init__(self, library=None):
        """Load the runtime library of the system, or take the one given."""
        self._lib = library if library is not None else self._load()

    @staticmethod
    def _load():
        names = ["libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so.10.2"]
        for name in names + [os.path.join("/usr/local/cuda/lib64", n) for n in names]:
            try:
                return ctypes.CDLL(name)
            except OSError:
                continue
        for folder in sys.path:  # pip's CUDA runtime
            for version in ("13", "12", "11"):
                for below in ("nvidia/cuda_runtime/lib", "nvidia/cu13/lib"):
                    try:
                        return ctypes.CDLL(os.path.join(folder, below, "libcudart.so." + version))
                    except OSError:
                        continue
        raise BuilderError("the CUDA runtime (libcudart.so) is not here; it comes with JetPack")

    def call(self, name, *arguments):
        """Call a function of the library."""
        code = getattr(self._lib, name)(*arguments)
        if code != 0:
            raise BuilderError("%s failed with CUDA error %d" % (name, code))

    def has(self, name):
        """Whether the library has a function."""
        try:
            return getattr(self._lib, name) is not None
        except AttributeError:
            return False

    def handle(self, name, *arguments):
        """Return the handle that a function makes."""
        made = ctypes.c_void_p()
        self.call(name, ctypes.byref(made), *arguments)
        return made

    def malloc(self, size):
        """Return the address of `size` bytes on the GPU."""
        return self.handle("cudaMalloc", ctypes.c_size_t(max(1, size)))

    def to_device(self, to, source, size):
        """Copy from a host address to the GPU."""
        self.call("cudaMemcpy", to, ctypes.c_void_p(source), ctypes.c_size_t(size), ctypes.c_int(1))

    def copy_async(self, to, source, size, kind, stream):
        """Queue a copy."""
        self.call("cudaMemcpyAsync", to, source, ctypes.c_size_t(size), ctypes.c_int(kind), stream)

    def synchronize(self, stream):
        """Wait for a stream."""
        self.call("cudaStreamSynchronize", stream)

    def elapsed_ms(self, start, end):
        """Return the time between two events."""
        found = ctypes.c_float()
        self.call("cudaEventElapsedTime", ctypes.byref(found), start, end)
        return float(found.value)

    def attribute(self, number):
        """Return an attribute of the GPU."""
        value = ctypes.c_int()
        self.call("cudaDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(number), ctypes.c_int(0))
        return value.value

    def name(self):
        """Return the name of the GPU, or an empty text."""
        memory = ctypes.create_string_buffer(1 << 14)  # larger than any version's structure, which begins with the name
        for function in ("cudaGetDeviceProperties_v2", "cudaGetDeviceProperties"):
            if self.has(function):
                self.call(function, memory, ctypes.c_int(0))
                return memory.raw[:256].split(b"\0")[0].decode("utf-8", "replace")
        return ""

    def graph(self, stream, launch):
        """Return an executable graph of what `launch` queues on the stream, or None where that cannot be recorded."""
        if not self.has("cudaStreamBeginCapture"):
            return None
        try:
            self.call("cudaStreamBeginCapture", stream, ctypes.c_int(1))  # thread local
            launch()
            graph = ctypes.c_void_p()
            self.call("cudaStreamEndCapture", stream, ctypes.byref(graph))
            made = ctypes.c_void_p()
            if self.has("cudaGraphInstantiateWithFlags"):  # since 11.4
                self.call("cudaGraphInstantiateWithFlags", ctypes.byref(made), graph, ctypes.c_ulonglong(0))
            else:
                self.call("cudaGraphInstantiate", ctypes.byref(made), graph, None, None, ctypes.c_size_t(0))
            return made
        except BuilderError as e:
            say("the launches cannot be recorded as a CUDA graph (%s); they are queued one by one" % e, "W")
            return None


def parse(words):
    """Return the flags given, by name.

    A flag that is unknown, or lacks its value, is refused.
    """
    given = {}
    unknown = []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in TAKES or (TAKES[flag] and not equals):
            unknown.append(word)
        given[flag] = value
    if unknown:
        raise BuilderError("Unknown option: " + " ".join(unknown))
    return given


def shapes_of(text):
    """Return ``input:8x3x224x224,...`` as shapes by name."""
    found = {}
    for part in text.split(","):
        name, _, sizes = part.rpartition(":")
        found[name] = tuple(int(n) for n in sizes.split("x"))
    return found


def version_of(trt):
    """Return major and minor of TensorRT."""
    major, minor = trt.__version__.split(".")[:2]
    return int(major), int(minor)


def logger_of(trt, verbose, kept):
    """Return a logger that prints TensorRT's messages and keeps its errors."""

    class Printer(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)

        def log(self, severity, message):
            letter = {trt.ILogger.ERROR: "E", trt.ILogger.INTERNAL_ERROR: "E", trt.ILogger.WARNING: "W"}.get(severity)
            if letter == "E":
                kept.append(message)
            if letter is not None:
                say("[TRT] " + message, letter)
            elif severity == trt.ILogger.INFO:
                say("[TRT] " + message)  # which layers a DLA runs is told here alone
            elif verbose:
                say("[TRT] " + message, "V")

    return Printer()


def set_flag(trt, config, name):
    """Set a builder flag.

    One that this version lacks is refused: what was asked for would silently not happen.
    """
    flag = getattr(trt.BuilderFlag, name, None)
    if flag is None:
        raise BuilderError("TensorRT %s has no flag %s" % (trt.__version__, name))
    config.set_flag(flag)


def network_flags(trt, given):
    """Return the creation flags of the network as bits."""
    wanted = ["STRONGLY_TYPED"] if "--stronglyTyped" in given else []
    if version_of(trt) < (10, 0):
        wanted.append("EXPLICIT_BATCH")
    bits = 0
    for name in wanted:
        flag = getattr(trt.NetworkDefinitionCreationFlag, name, None)
        if flag is None:
            if version_of(trt) < (11, 0):  # which has no other networks
                raise BuilderError("TensorRT %s has no flag %s" % (trt.__version__, name))
            continue
        bits |= 1 << int(flag)
    return bits


def build(trt, given):
    """Build an engine and write it; return nothing, or raise."""
    errors = []
    logger = logger_of(trt, "--verbose" in given, errors)
    start = time.time()
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(trt, given))
    parser = trt.OnnxParser(network, logger)
    path = given["--onnx"]
    if hasattr(parser, "parse_from_file"):
        parsed = parser.parse_from_file(path)
    else:
        with open(path, "rb") as f:
            parsed = parser.parse(f.read())
    if not parsed:
        reasons = [str(parser.get_error(i).desc()) for i in range(parser.num_errors)]
        raise BuilderError("the ONNX file is refused: " + ("; ".join(reasons) or "no reason given"))
    config = builder.create_builder_config()
    if hasattr(trt, "ProfilingVerbosity") and given.get("--profilingVerbosity") == "detailed":
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for option, name in (("--fp16", "FP16"), ("--int8", "INT8"), ("--fp8", "FP8")):
        if option in given:
            set_flag(trt, config, name)
    if given.get("--sparsity") == "enable":
        set_flag(trt, config, "SPARSE_WEIGHTS")
    megabytes = given.get("--workspace") or given.get("--memPoolSize", "").partition(":")[2]
    if megabytes:
        size = int(float(megabytes.rstrip("MiB")) * (1 << 20))
        if hasattr(config, "set_memory_pool_limit"):  # since 8.4
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size)
        else:
            config.max_workspace_size = size
    if "--useDLACore" in given:
        if getattr(builder, "num_DLA_cores", 0) <= int(given["--useDLACore"]):
            raise BuilderError("this board has %d DLA cores for TensorRT" % getattr(builder, "num_DLA_cores", 0))
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = int(given["--useDLACore"])
    if "--allowGPUFallback" in given:
        set_flag(trt, config, "GPU_FALLBACK")
    cache = None
    if "--timingCacheFile" in given:
        content = b""
        if os.path.exists(given["--timingCacheFile"]):
            with open(given["--timingCacheFile"], "rb") as f:
                content = f.read()
        cache = config.create_timing_cache(content)
        config.set_timing_cache(cache, False)
    profile = builder.create_optimization_profile()
    dynamic = False
    sizes = [shapes_of(given[k]) if k in given else {} for k in ("--minShapes", "--optShapes", "--maxShapes")]
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = tuple(tensor.shape)
        if -1 in shape:
            dynamic = True
            fixed = tuple(1 if n == -1 else n for n in shape)
            profile.set_shape(tensor.name, *[s.get(tensor.name, fixed) for s in sizes])
    if dynamic:
        config.add_optimization_profile(profile)
    content = builder.build_serialized_network(network, config)
    if content is None:
        raise BuilderError("the engine cannot be built: " + (" ".join(errors[-3:]) or "TensorRT gives no reason"))
    content = bytes(content)
    write(given["--saveEngine"], content)
    if cache is not None:
        write(given["--timingCacheFile"], bytes(cache.serialize()))
    say("Created engine with size: %.4f MiB" % (len(content) / float(1 << 20)))
    say("Engine built in %.2f sec." % (time.time() - start))
    if "--exportLayerInfo" in given:
        engine = load(trt, content, logger, given)
        write(given["--exportLayerInfo"], information(trt, engine).encode("utf-8"))


def write(path, content):
    """Write a file whole or not at all."""
    with open(path + ".part", "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".part", path)


def load(trt, content, logger, given):
    """Return the engine, or raise where this board cannot load it."""
    runtime = trt.Runtime(logger)
    if "--useDLACore" in given:
        runtime.DLA_core = int(given["--useDLACore"])
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise BuilderError("the engine cannot be loaded: it was built with another TensorRT or for another GPU")
    engine_runtimes.append(runtime)  # an engine must not outlive its runtime
    return engine


engine_runtimes = []


def information(trt, engine):
    """Return the layers of an engine as JSON text, as ``--exportLayerInfo`` has them."""
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


class Bound:
    """An engine with its context, its memory on the GPU and a stream."""

    def __init__(self, trt, cuda, engine, shapes):
        """Bind every tensor; inputs get pseudo-random values."""
        self.trt, self.cuda, self.engine = trt, cuda, engine
        self.context = engine.create_execution_context()
        if self.context is None:
            raise BuilderError("the engine cannot be prepared to run; mostly memory is what lacks")
        self.stream = cuda.handle("cudaStreamCreate")
        self.named = hasattr(engine, "num_io_tensors")  # since 8.5; before that, bindings are numbered
        self.addresses, self.sizes, self.inputs, self.hosts = {}, {}, [], {}
        if self.named:
            self.names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
            self.inputs = [n for n in self.names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        else:
            self.names = [engine.get_binding_name(i) for i in range(engine.num_bindings)]
            self.inputs = [n for n in self.names if engine.binding_is_input(n)]
        for name in self.inputs:
            self._shape(name, shapes.get(name))
        for name in self.names:
            self.sizes[name] = self._bytes(name)
            self.addresses[name] = cuda.malloc(self.sizes[name])
            self.hosts[name] = ctypes.create_string_buffer(max(1, self.sizes[name]))
        for name in self.inputs:
            self._fill(name)
        if self.named:
            for name, address in self.addresses.items():
                self.context.set_tensor_address(name, address.value)

    def _shape(self, name, shape):
        engine = self.engine
        own = tuple(engine.get_tensor_shape(name) if self.named else engine.get_binding_shape(name))
        if shape is None:
            shape = tuple(1 if n == -1 else n for n in own)
        if self.named:
            accepted = self.context.set_input_shape(name, shape)
        else:
            accepted = self.context.set_binding_shape(engine.get_binding_index(name), shape)
        if accepted is False:
            raise BuilderError("the engine refuses an input of shape %s" % "x".join(str(n) for n in shape))

    def _dtype(self, name):
        return self.engine.get_tensor_dtype(name) if self.named else self.engine.get_binding_dtype(name)

    def _bytes(self, name):
        if self.named:
            shape = tuple(self.context.get_tensor_shape(name))
        else:
            shape = tuple(self.context.get_binding_shape(self.engine.get_binding_index(name)))
        size = getattr(self._dtype(name), "itemsize", 4)
        for n in shape:
            size *= n
        return size

    def _fill(self, name):
        """Give an input values between -1 and 1 where it holds floats, zeros elsewhere."""
        size = self.sizes[name]
        if getattr(self._dtype(name), "itemsize", 4) == 4 and "FLOAT" in str(self._dtype(name)).upper():
            draw = random.Random(0)
            values = array.array("f", [draw.uniform(-1.0, 1.0) for _ in range(size // 4)])
            ctypes.memmove(self.hosts[name], values.tobytes(), size)
        self.cuda.to_device(self.addresses[name], ctypes.addressof(self.hosts[name]), size)

    def launch(self):
        """Queue one run on the stream."""
        if self.named:
            done = self.context.execute_async_v3(self.stream.value or 0)
        else:
            done = self.context.execute_async_v2([self.addresses[n].value for n in self.names], self.stream.value or 0)
        if not done:
            raise BuilderError("TensorRT could not queue a run of the engine")

    def copy_in(self):
        """Queue the copies of the inputs."""
        for name in self.inputs:
            self.cuda.copy_async(self.addresses[name], self.hosts[name], self.sizes[name], 1, self.stream)

    def copy_out(self):
        """Queue the copies of the outputs."""
        for name in self.names:
            if name not in self.inputs:
                self.cuda.copy_async(self.hosts[name], self.addresses[name], self.sizes[name], 2, self.stream)

    def outputs(self):
        """Run once and return the bytes of every output by name."""
        self.launch()
        self.copy_out()
        self.cuda.synchronize(self.stream)
        return {n: self.hosts[n].raw[: self.sizes[n]] for n in self.names if n not in self.inputs}

    def finite(self, name, content):
        """Whether an output has no infinity and no NaN, as far as it holds floats of 2 or 4 bytes."""
        kind = str(self._dtype(name)).upper()
        if kind.endswith("FLOAT"):
            values = array.array("f")
            values.frombytes(content)
            return all(-3.5e38 < v < 3.5e38 for v in values)
        if kind.endswith("HALF"):
            bits = array.array("H")
            bits.frombytes(content)
            return all(b & 0x7C00 != 0x7C00 for b in bits)
        return True


def percentile(ordered, percent):
    """Return a percentile of ascending values, as trtexec takes it."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100.0))]


def summary(name, values, percents):
    """Return the line of the performance summary of some times in ms."""
    ordered = sorted(values)
    words = ["min = %g ms" % ordered[0], "max = %g ms" % ordered[-1], "mean = %g ms" % (sum(values) / len(values))]
    words.append("median = %g ms" % percentile(ordered, 50.0))
    words += ["percentile(%g%%) = %g ms" % (p, percentile(ordered, p)) for p in percents]
    return "%s: %s" % (name, ", ".join(words))


def check(bound):
    """Raise where the engine gives other outputs in a second run on the same values, or infinities and NaNs."""
    first, second = bound.outputs(), bound.outputs()
    for name in sorted(first):
        if not bound.finite(name, first[name]):
            raise BuilderError("output %s of the engine is not finite for values between -1 and 1" % name)
        if first[name] != second[name]:
            raise BuilderError("output %s of the engine differs between two runs on the same values" % name)
    say("Checked: the engine loads, and its outputs are finite and the same in two runs.")


def check_built(trt, given):
    """Load the engine that was just built, and check it."""
    logger = logger_of(trt, "--verbose" in given, [])
    with open(given["--saveEngine"], "rb") as f:
        engine = load(trt, f.read(), logger, given)
    check(Bound(trt, Cuda(), engine, shapes_of(given["--optShapes"]) if "--optShapes" in given else {}))


def measure(trt, given):
    """Load an engine and time it."""
    errors = []
    logger = logger_of(trt, "--verbose" in given, errors)
    with open(given["--loadEngine"], "rb") as f:
        content = f.read()
    engine = load(trt, content, logger, given)
    if "--exportLayerInfo" in given:
        write(given["--exportLayerInfo"], information(trt, engine).encode("utf-8"))
    cuda = Cuda()
    shapes = shapes_of(given["--shapes"]) if "--shapes" in given else {}
    count = int(given.get("--streams") or given.get("--infStreams") or 1)
    bound = [Bound(trt, cuda, engine, shapes) for _ in range(count)]
    if "--check" in given:
        check(bound[0])
    if "--dumpProfile" in given or "--exportProfile" in given:
        profile(trt, bound[0], given)
        return
    runs = []
    for each in bound:
        each.launch()  # allocates; must come before a graph is recorded
        cuda.synchronize(each.stream)
        graph = cuda.graph(each.stream, each.launch) if "--useCudaGraph" in given else None
        runs.append((each, graph))
    events = [cuda.handle("cudaEventCreate") for _ in range(4)]
    copies = "--dataTransfers" in given
    records = []

    def queue(each, graph):
        if graph is None:
            each.launch()
        else:
            cuda.call("cudaGraphLaunch", graph, each.stream)

    def once():
        each, graph = runs[0]
        host = time.time()
        cuda.call("cudaEventRecord", events[0], each.stream)
        if copies:
            each.copy_in()
        cuda.call("cudaEventRecord", events[1], each.stream)
        queue(each, graph)
        cuda.call("cudaEventRecord", events[2], each.stream)
        if copies:
            each.copy_out()
        cuda.call("cudaEventRecord", events[3], each.stream)
        enqueue = (time.time() - host) * 1000.0
        for other, other_graph in runs[1:]:
            queue(other, other_graph)
        cuda.synchronize(each.stream)
        for other, _ in runs[1:]:
            cuda.synchronize(other.stream)
        times = [cuda.elapsed_ms(a, b) for a, b in zip(events, events[1:])]
        return {
            "startMs": host * 1000.0,
            "endMs": time.time() * 1000.0,
            "enqMs": enqueue,
            "h2dMs": times[0],
            "computeMs": times[1],
            "d2hMs": times[2],
            "latencyMs": sum(times),
        }

    warm = time.time() + float(given.get("--warmUp", 200)) / 1000.0
    while time.time() < warm:
        once()
    idle = float(given.get("--idleTime", 0)) / 1000.0
    begin = time.time()
    seconds, least = float(given.get("--duration", 3)), int(given.get("--iterations", 10))
    while time.time() - begin < seconds or len(records) < least:
        records.append(once())
        if idle:
            time.sleep(idle)
    wall = time.time() - begin
    if "--exportTimes" in given:
        write(given["--exportTimes"], json.dumps(records).encode("utf-8"))
    percents = [float(p) for p in given.get("--percentile", "90,95,99").split(",")]
    say("=== Performance summary ===")
    say("Throughput: %g qps" % (len(records) * count / wall))
    say(summary("Latency", [r["latencyMs"] for r in records], percents))
    say(summary("Enqueue Time", [r["enqMs"] for r in records], percents))
    say(summary("H2D Latency", [r["h2dMs"] for r in records], percents))
    say(summary("GPU Compute Time", [r["computeMs"] for r in records], percents))
    say(summary("D2H Latency", [r["d2hMs"] for r in records], percents))


def profile(trt, bound, given):
    """Time every layer; the network as a whole is slower meanwhile."""
    times = {}

    class Profiler(trt.IProfiler):
        def __init__(self):
            trt.IProfiler.__init__(self)

        def report_layer_time(self, name, ms):
            times.setdefault(name, []).append(ms)

    bound.launch()
    bound.cuda.synchronize(bound.stream)
    kept = Profiler()
    bound.context.profiler = kept
    end = time.time() + float(given.get("--duration", 3))
    least = int(given.get("--iterations", 10))
    rounds = 0
    while time.time() < end or rounds < least:
        bound.launch()
        bound.cuda.synchronize(bound.stream)
        rounds += 1
    total = sum(sum(v) for v in times.values()) or 1.0
    rows = [
        {
            "name": name,
            "timeMs": sum(values),
            "averageMs": sum(values) / rounds,
            "medianMs": percentile(sorted(values), 50.0),
            "percentage": 100.0 * sum(values) / total,
        }
        for name, values in times.items()
    ]
    if "--exportProfile" in given:
        write(given["--exportProfile"], json.dumps([{"count": rounds}] + rows).encode("utf-8"))
    say("=== Profile (%d iterations) ===" % rounds)
    width = max([5] + [len(r["name"]) for r in rows])
    say("   %s   Time (ms)   Avg. (ms)   Median (ms)   Time %%" % "Layer".ljust(width))
    for r in rows:
        numbers = (r["name"].ljust(width), r["timeMs"], r["averageMs"], r["medianMs"], r["percentage"])
        say("   %s   %.4f   %.4f   %.4f   %.1f" % numbers)
    say("The e2e network timing is not reported since it is inaccurate due to the extra synchronizations.")


def device(trt):
    """Print what the GPU is."""
    cuda = Cuda()
    say("=== Device Information ===")
    say("Selected Device: %s" % cuda.name())
    say("Compute Capability: %d.%d" % (cuda.attribute(75), cuda.attribute(76)))
    say("SMs: %d" % cuda.attribute(16))
    say("Application Compute Clock Rate: %g GHz" % (cuda.attribute(13) / 1e6))
    say("TensorRT version: %s" % ".".join(trt.__version__.split(".")[:3]))


def main(words):
    """Run the command line and return its exit code; the last line says how it ended, as trtexec's does."""
    try:
        trt = importlib.import_module("tensorrt")
        if not hasattr(trt, "__version__"):
            raise ImportError("what is called tensorrt here is a folder without code")
    except ImportError as e:
        print("error: the Python module of TensorRT is not here: %s" % e, file=sys.stderr)
        return EXIT_MISSING
    banner = "%s [TensorRT v%s] # %s" % (NAME, digits(trt.__version__), " ".join(["trt_builder.py"] + words))
    print("&&&& RUNNING " + banner, flush=True)
    try:
        given = parse(words)
        if "--help" in given or not given:
            print("\n".join("  %-24s%s" % (flag + ("=..." if takes else ""), text) for flag, takes, text in FLAGS))
            return 0
        if ("--onnx" in given) == ("--loadEngine" in given):
            raise BuilderError("give --onnx=FILE and --saveEngine=FILE, or --loadEngine=FILE")
        device(trt)
        if "--onnx" in given:
            if "--saveEngine" not in given:
                raise BuilderError("--saveEngine is missing")
            build(trt, given)
            if "--skipInference" in given or "--buildOnly" in given:
                if "--check" in given:
                    check_built(trt, given)
                say("Skipped inference phase since --skipInference is added.")
            else:
                measure(trt, dict(given, **{"--loadEngine": given["--saveEngine"]}))
        else:
            measure(trt, given)
    except (RuntimeError, OSError, ValueError, AttributeError, TypeError, KeyError, MemoryError) as e:
        say(str(e) or type(e).__name__, "E")
        print("&&&& FAILED " + banner, flush=True)
        return EXIT_FAILED
    print("&&&& PASSED " + banner, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
