#!/usr/bin/env python3
# This file travels to boards as it is, down to Python 3.6: no annotations, no pathlib idioms, no f-strings.
# ruff: noqa: UP031, PTH100, PTH110, PTH118, PTH120, PTH123, RUF005, T201
# mypy: ignore-errors
"""Classify images with a TensorRT engine on the board: ``python3 infer.py model.engine image.jpg ...``.

Self-contained: it needs Python 3.6, numpy and the TensorRT Python module of the board (8.2 to 11), and Pillow to read
images. ``model.json`` beside the engine says how pixels become the network's input and what the classes are called;
``model.engine.json``, written by ``build.sh``, says which board and which TensorRT the engine was built with.

    python3 infer.py model.engine photo.jpg               # the five best classes of each image; both, where there are two
    python3 infer.py model.engine photo.jpg --time 10      # and how long that takes, from the file to the classes
    python3 infer.py model.engine --npy x.npy --out y.npy  # logits of preprocessed images (N, C, H, W)
"""

import argparse
import ctypes
import importlib
import json
import os
import sys
import time

import numpy as np

HOST_TO_DEVICE = 1
DEVICE_TO_HOST = 2
EXIT_MISSING = 4
EXIT_BAD = 5

WARM_UP_S = 0.5
LEAST_RUNS = 10
PARTS = ("decodeMs", "preprocessMs", "runMs")
"""Of a timed run: opening and decoding the file; resizing, cutting out and normalising; copies, engine and probabilities."""


class EngineError(RuntimeError):
    """An engine that cannot run here."""


class Cuda:
    """The few calls of the CUDA runtime that an inference needs."""

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
        raise EngineError("the CUDA runtime (libcudart.so) is not here; it comes with JetPack")

    def _check(self, code, what):
        if code != 0:
            raise EngineError("CUDA error %d while %s" % (code, what))

    def malloc(self, size):
        """Return the address of `size` bytes on the GPU."""
        pointer = ctypes.c_void_p()
        self._check(self._lib.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(size)), "allocating %d bytes" % size)
        return pointer.value

    def free(self, pointer):
        """Give the memory back."""
        self._check(self._lib.cudaFree(ctypes.c_void_p(pointer)), "freeing memory")

    def to_device(self, pointer, array):
        """Copy a contiguous array to the GPU."""
        self._copy(pointer, array.ctypes.data, array.nbytes, HOST_TO_DEVICE)

    def to_host(self, array, pointer):
        """Copy from the GPU into a contiguous array."""
        self._copy(array.ctypes.data, pointer, array.nbytes, DEVICE_TO_HOST)

    def _copy(self, to, source, size, kind):
        code = self._lib.cudaMemcpy(ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size), ctypes.c_int(kind))
        self._check(code, "copying")

    def synchronize(self):
        """Wait for the GPU."""
        self._check(self._lib.cudaDeviceSynchronize(), "running the engine")

    def capability(self):
        """Return the compute capability of the GPU, such as ``8.7``."""
        values = []
        for attribute in (75, 76):  # cudaDevAttrComputeCapabilityMajor, ...Minor
            value = ctypes.c_int()
            self._check(self._lib.cudaDeviceGetAttribute(ctypes.byref(value), attribute, 0), "asking the GPU")
            values.append(value.value)
        return "%d.%d" % tuple(values)


def board_model(path="/proc/device-tree/model"):
    """Return what the kernel calls this board, or an empty text where it does not say."""
    try:
        with open(path, "rb") as f:
            return f.read().replace(b"\0", b"").decode("utf-8", "replace").strip()
    except OSError:
        return ""


def check_record(record, tensorrt_version, capability, board=""):
    """Refuse an engine that was built with another TensorRT, for another GPU or on another board: it is not portable.

    `record` is what the builder noted: ``tensorrt`` (such as ``10.3.0``), ``compute_capability`` and ``board``; keys may be
    missing. Boards with one compute capability differ in multiprocessors, and so do the kernels that suit them.
    """
    built = record.get("tensorrt")
    if built and built.split(".")[:3] != tensorrt_version.split(".")[: len(built.split(".")[:3])]:
        raise EngineError(
            "the engine was built with TensorRT %s, here is %s: build it again with build.sh" % (built, tensorrt_version)
        )
    gpu = record.get("compute_capability")
    if gpu and capability and gpu != capability:
        raise EngineError(
            "the engine was built for a GPU of compute capability %s, this one has %s: build it again with build.sh"
            % (gpu, capability)
        )
    built_on = record.get("board")
    if built_on and board and built_on != board:
        raise EngineError("the engine was built on '%s', this is '%s': build it again with build.sh" % (built_on, board))


class Engine:
    """A loaded engine; call it with images (N, C, H, W) to get logits (N, K)."""

    runtime = "tensorrt"

    def __init__(self, path, trt=None, cuda=None, dla=None):
        """Load the engine at `path`; `trt` is the TensorRT module, ``tensorrt`` unless given; `dla` is the core of its DLA."""
        self.trt = trt if trt is not None else importlib.import_module("tensorrt")
        self.cuda = cuda if cuda is not None else Cuda()
        record_path = path + ".json"
        if os.path.exists(record_path):
            with open(record_path) as f:
                check_record(json.load(f), self.trt.__version__, self.cuda.capability(), board_model())
        with open(path, "rb") as f:
            content = f.read()
        self._runtime = self.trt.Runtime(self.trt.Logger(self.trt.Logger.WARNING))
        if dla is not None:
            self._runtime.DLA_core = dla
        self.engine = self._runtime.deserialize_cuda_engine(content)
        if self.engine is None:
            raise EngineError(
                "%s cannot be loaded by TensorRT %s on this GPU: it was built on another board or version, build it again"
                % (path, self.trt.__version__)
            )
        self.options = {}  # TensorRT chose its kernels when the engine was built
        self.context = self.engine.create_execution_context()
        self.named = hasattr(self.engine, "num_io_tensors")  # since 8.5; before that, bindings are numbered
        self._find_tensors()
        self._memory = {}

    def _find_tensors(self):
        if self.named:
            names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
            inputs = [n for n in names if self.engine.get_tensor_mode(n) == self.trt.TensorIOMode.INPUT]
            shape = self.engine.get_tensor_shape
            dtype = self.engine.get_tensor_dtype
        else:
            names = [self.engine.get_binding_name(i) for i in range(self.engine.num_bindings)]
            inputs = [n for n in names if self.engine.binding_is_input(n)]
            shape = self.engine.get_binding_shape
            dtype = self.engine.get_binding_dtype
        outputs = [n for n in names if n not in inputs]
        if len(inputs) != 1 or len(outputs) != 1:
            raise EngineError("the engine has %d inputs and %d outputs, one each is expected" % (len(inputs), len(outputs)))
        self.names = names
        self.input, self.output = inputs[0], outputs[0]
        self.dtypes = {n: np.dtype(self.trt.nptype(dtype(n))) for n in names}
        first = tuple(shape(self.input))
        self.input_shape = first[1:]
        self.batch = None if first[0] == -1 else first[0]
        if self.batch is None:
            least, _, most = self._profile(self.input)
            self.min_batch, self.max_batch = least[0], most[0]
        else:
            self.min_batch = self.max_batch = self.batch

    def _profile(self, name):
        if self.named:
            return self.engine.get_tensor_profile_shape(name, 0)
        return self.engine.get_profile_shape(0, name)

    def _buffer(self, name, size):
        held = self._memory.get(name)
        if held is None or held[1] < size:
            if held is not None:
                self.cuda.free(held[0])
            held = (self.cuda.malloc(size), size)
            self._memory[name] = held
        return held[0]

    def _run(self, x):
        shape = tuple(x.shape)
        if self.named:
            accepted = self.context.set_input_shape(self.input, shape)
            out_shape = tuple(self.context.get_tensor_shape(self.output))
        else:
            index = self.engine.get_binding_index
            accepted = self.context.set_binding_shape(index(self.input), shape)
            out_shape = tuple(self.context.get_binding_shape(index(self.output)))
        if not accepted:
            raise EngineError(
                "the engine refuses an input of shape %s: it takes batches of %d to %d images of shape %s"
                % (_by(shape), self.min_batch, self.max_batch, _by(self.input_shape))
            )
        x = np.ascontiguousarray(x, dtype=self.dtypes[self.input])
        y = np.empty(out_shape, dtype=self.dtypes[self.output])
        addresses = {self.input: self._buffer(self.input, x.nbytes), self.output: self._buffer(self.output, y.nbytes)}
        self.cuda.to_device(addresses[self.input], x)
        if self.named:
            for name, address in addresses.items():
                self.context.set_tensor_address(name, address)
            done = self.context.execute_async_v3(0)
        else:
            done = self.context.execute_v2([addresses[n] for n in self.names])
        if not done:
            raise EngineError("TensorRT could not run the engine on a batch of %d" % shape[0])
        self.cuda.synchronize()
        self.cuda.to_host(y, addresses[self.output])
        return y.astype(np.float32)

    def __call__(self, images):
        """Return logits (N, K) for preprocessed images (N, C, H, W), in as many calls as the engine's batch asks for."""
        results = []
        for start in range(0, len(images), self.max_batch):
            part = np.asarray(images[start : start + self.max_batch], dtype=np.float32)
            n = len(part)
            if n < self.min_batch:
                part = np.concatenate([part, np.zeros((self.min_batch - n,) + part.shape[1:], np.float32)])
            results.append(self._run(part)[:n])
        return np.concatenate(results)

    def __enter__(self):
        """Return itself."""
        return self

    def __exit__(self, *exc):
        """Free the memory on the GPU."""
        for pointer, _ in self._memory.values():
            self.cuda.free(pointer)
        self._memory = {}


def _by(shape):
    return "x".join(str(n) for n in shape)


FORMATS = ("JPEG", "MPO", "PNG", "BMP", "DIB", "GIF", "WEBP", "PPM", "TIFF", "JPEG2000", "AVIF")
MOST_PIXELS = 1 << 27


def open_image(name):
    """Return the image file (a path, or open) as Pillow opens it, if it is of one of `FORMATS`: others might run a program."""
    from PIL import Image

    Image.init()
    try:
        image = Image.open(name, formats=[f for f in FORMATS if f in Image.OPEN])
    except TypeError:  # Pillow before 8.0; nothing is decoded before its kind is looked at
        image = Image.open(name)
    if image.format not in FORMATS:
        raise ValueError("is an image of kind %s" % image.format)
    return image


def of_8_bits(image):
    """Return a Pillow image with 16-bit grey values as 8-bit ones, where Pillow would cut all above 255 off."""
    from PIL import Image

    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError("pixels of mode %s have no known range; save it with 8 or 16 bits" % image.mode)
    if 0 < values.max() < 256 and image.format != "PPM":  # which says its range
        raise ValueError("16 bits for each pixel, and none above %d: save it with 8 bits if that is its range" % values.max())
    return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))


def sampled(pixels, height, width):
    """Return pixels (H, W) or (H, W, C) resized by bilinear interpolation between four of them, whatever the ratio."""
    for axis, wanted in ((0, height), (1, width)):
        here = pixels.shape[axis]
        place = np.maximum((np.arange(wanted) + 0.5) * (here / wanted) - 0.5, 0.0)
        low = np.minimum(place.astype(np.int64), here - 1)
        share = (place - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(pixels.ndim)])
        first = np.take(pixels, low, axis).astype(np.float32)
        pixels = first + share * (np.take(pixels, np.minimum(low + 1, here - 1), axis) - first)
    return np.floor(pixels + 0.5).astype(np.uint8)


def resized_size(image, least, resize):
    """Return the width and height that an image is resized to before its centre, of the width and height `least`, is cut."""
    if resize is None:
        return least
    if isinstance(resize, list):
        return max(resize[1], least[0]), max(resize[0], least[1])
    side = max(resize, least[0], least[1])
    other = int(side * max(image) / min(image))
    return (side, other) if image[0] <= image[1] else (other, side)


def fit(image, about):
    """Return the pixels (H, W, C) uint8 of a Pillow image at the network's input size, those the network was evaluated on.

    What ``resize`` says is done first: a number is the length of the shorter side, a pair the height and width of the whole
    picture (more, where the input is larger). The centre is cut out then; without ``resize`` the picture is resized to the
    input as a whole.
    """
    from PIL import Image

    how = about["preprocessing"]
    channels, height, width = about["input_shape"]
    filters = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC, "nearest": Image.NEAREST,
               "lanczos": Image.LANCZOS, "box": Image.BOX, "hamming": Image.HAMMING}  # fmt: skip
    image.info.pop("transparency", None)
    image = of_8_bits(image).convert("L" if channels == 1 else "RGB")
    size = resized_size(image.size, (width, height), how["resize"])
    if size[0] * size[1] > MOST_PIXELS:
        raise ValueError("is %s pixels: resized for this network it would be %s" % (_by(image.size), _by(size)))
    if image.size != size:
        if how.get("antialias", True):
            image = image.resize(size, filters[how["interpolation"]])
        else:
            image = Image.fromarray(sampled(np.asarray(image), size[1], size[0]))
    if size != (width, height):
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    return np.asarray(image, dtype=np.uint8).reshape(height, width, channels)


def preprocess(image, about):
    """Return (C, H, W) float32 for a Pillow image, as ``model.json`` says: resize, centre crop, scale, normalise."""
    how = about["preprocessing"]
    pixels = fit(image, about).astype(np.float32)
    if how["channel_order"] == "bgr":
        pixels = pixels[:, :, ::-1]
    gain = np.array([how["scale"] / s for s in how["std"]], np.float32)
    shift = np.array([-m / s for m, s in zip(how["mean"], how["std"])], np.float32)  # noqa: B905 (strict= is of Python 3.10)
    return np.ascontiguousarray((pixels * gain + shift).transpose(2, 0, 1))


def decoded(name):
    """Return a Pillow image with its pixels in memory, or say which file is no image."""
    from PIL import Image

    try:
        with open(name, "rb") as f:  # a closed image of an old Pillow has no pixels; a closed file does it no harm
            image = open_image(f)
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise EngineError("%s: no readable image: %s" % (name, e))  # noqa: B904 (tracebacks are not shown)


def read_image(name, about):
    """Return (C, H, W) float32 for an image file, or say which file is no image."""
    image = decoded(name)
    try:
        return preprocess(image, about)
    except (OSError, ValueError) as e:
        raise EngineError("%s: no readable image: %s" % (name, e))  # noqa: B904


def probabilities(logits):
    """Return the share of each class for logits (K,); a single logit tells two classes apart, class 1 where it is above 0."""
    if len(logits) == 1:
        logits = np.array([0.0, logits[0]])
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def timed_run(engine, names, about):
    """Return how long one batch of image files takes from the files to the probabilities, in ms, whole and in `PARTS`."""
    marks = [time.perf_counter()]
    images = [decoded(name) for name in names]
    marks.append(time.perf_counter())
    pixels = np.stack([preprocess(image, about) for image in images])
    marks.append(time.perf_counter())
    for logits in engine(pixels):
        probabilities(logits)
    marks.append(time.perf_counter())
    record = {part: 1000.0 * (b - a) for part, a, b in zip(PARTS, marks, marks[1:])}  # noqa: B905
    record["latencyMs"] = 1000.0 * (marks[-1] - marks[0])
    return record


def timed(engine, names, about, seconds, batch):
    """Return a record of each run, for at least so many seconds after a warm-up; every run takes the next `batch` images."""
    records = []
    turn = 0
    warm = time.perf_counter() + WARM_UP_S
    end = None
    while end is None or len(records) < LEAST_RUNS or time.perf_counter() < end:
        record = timed_run(engine, [names[(turn + i) % len(names)] for i in range(batch)], about)
        turn += batch
        if end is not None:
            records.append(record)
        elif time.perf_counter() >= warm:
            end = time.perf_counter() + seconds
    return records


def median(values):
    """Return the median."""
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2.0


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Classify images with a TensorRT engine.")
    parser.add_argument("engine")
    parser.add_argument("images", nargs="*")
    parser.add_argument("--npy", help="preprocessed images (N, C, H, W) instead of image files")
    parser.add_argument("--out", help="write the logits of --npy here")
    parser.add_argument("--about", help="model.json (beside the engine by default)")
    parser.add_argument("--dla", type=int, help="deep-learning accelerator that the engine was built for")
    parser.add_argument("--time", type=float, metavar="S", help="time the way from the files to the classes so many seconds")
    parser.add_argument("--batch", type=int, default=1, help="images at a time, for --time")
    parser.add_argument("--times", help="write one record a run of --time here, as JSON")
    given = parser.parse_args()
    try:
        with Engine(given.engine, **({} if given.dla is None else {"dla": given.dla})) as engine:
            if given.npy:
                logits = engine(np.load(given.npy, allow_pickle=False))
                np.save(given.out or "logits.npy", logits)
                return 0
            about_path = given.about or os.path.join(os.path.dirname(os.path.abspath(given.engine)), "model.json")
            with open(about_path, encoding="utf-8") as f:
                about = json.load(f)
            if given.time is not None:
                if not given.images or given.batch < 1 or not 0 <= given.time < float("inf"):
                    raise EngineError("--time wants an image, a number of seconds, and a --batch of at least 1")
                records = timed(engine, given.images, about, given.time, given.batch)
                if given.times:
                    with open(given.times, "w") as f:
                        json.dump(records, f)
                for part in PARTS + ("latencyMs",):
                    print("%s\t%.4f" % (part, median([r[part] for r in records])))
                return 0
            for name in given.images:
                share = probabilities(engine(read_image(name, about)[None])[0])
                labels = about.get("labels")
                for k in np.argsort(-share)[:5]:
                    print("%s\t%s\t%.4f" % (name, labels[k] if labels else k, share[k]))
    except (EngineError, OSError, ValueError, ImportError) as e:
        print("error: %s" % e, file=sys.stderr)
        return EXIT_MISSING if isinstance(e, ImportError) else EXIT_BAD
    return 0


if __name__ == "__main__":
    sys.exit(main())
