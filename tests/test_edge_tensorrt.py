"""The TensorRT adapter: recipes by version, a real builder through tensorrt_rtx, the runner on a double, bundles."""

import contextlib
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from compress.pixels import decode, normalise
from compress.zoo import spec
from edge_targets import infer
from edge_targets.backends import tensorrt as backend
from edge_targets.backends import tensorrt_rtx
from edge_targets.bundle import pack, write_bundle
from edge_targets.catalog import all_targets, load_target
from edge_targets.kernels import fuse
from edge_targets.latency import predict, predict_kernels
from edge_targets.onnx_kernels import kernels_of
from edge_targets.tensorrt_versions import capabilities
from edge_targets.trt_build import Recipe, build_engine, recipe_for
from edge_targets.trtexec import InputShapes
from edge_targets.trtexec_log import read_times
from export.to_onnx import ExportOptions, to_onnx
from rescompress.core.errors import ModelFileError, TargetError, ToolMissing
from rescompress.core.layers import walk
from rescompress.core.quantizers import Quantization, place
from rescompress.core.spec import Preprocessing

needs_rtx = pytest.mark.skipif(not tensorrt_rtx.available(), reason="tensorrt_rtx is not installed")
needs_shellcheck = pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")


def exported(folder, arch="resnet20", *, precision="fp32", batch=1, opset=17, input_shape=None):
    """Write a network with random weights; return its file and spec."""
    from compress.resnet import build_model, tensors_of

    network = spec(arch, input_shape=input_shape)
    model = build_model(network)
    tensors = {k: v.detach().numpy() for k, v in tensors_of(model).items()}
    quantization = None
    if "int8" in precision:
        layers = {x.name: x for x in walk(network)}
        quantizers = [
            q.model_copy(update={"scale": (0.05,) * (1 if q.kind == "activation" else layers[q.tensor].out_shape[0])})
            for q in place(network, "tensorrt")
        ]
        quantization = Quantization(profile="tensorrt", quantizers=tuple(quantizers))
    path = folder / "model.onnx"
    onnx.save(to_onnx(network, tensors, quantization, ExportOptions(batch, opset, precision)), path)
    return path, network


@pytest.mark.parametrize(
    ("version", "network", "int8", "fp16"),
    [
        ("8.2", ("EXPLICIT_BATCH",), ("INT8", "FP16"), ("FP16",)),
        ("8.5", ("EXPLICIT_BATCH",), ("INT8", "FP16"), ("FP16",)),
        ("8.6", ("EXPLICIT_BATCH",), ("INT8", "FP16"), ("FP16",)),
        ("10.3", (), ("INT8", "FP16"), ("FP16",)),
        ("10.13", ("STRONGLY_TYPED",), (), ()),
        ("11.1", ("STRONGLY_TYPED",), (), ()),
    ],
)
def test_the_recipe_of_each_version(version, network, int8, fp16):
    known = capabilities(version)
    assert recipe_for(known, "int8").network_flags == network
    assert recipe_for(known, "int8").builder_flags == int8
    assert recipe_for(known, "fp16").builder_flags == fp16
    assert recipe_for(known, "fp32").builder_flags == ()
    assert "SPARSE_WEIGHTS" in recipe_for(known, "int8", sparsity=True).builder_flags
    if known.dla:
        assert "GPU_FALLBACK" in recipe_for(known, "int8", dla_core=0).builder_flags
    else:
        with pytest.raises(TargetError):
            recipe_for(known, "int8", dla_core=0)


@needs_rtx
@pytest.mark.parametrize("batch", [1, "dynamic"])
def test_a_real_builder_takes_recipe_profile_and_timing_cache(tmp_path, batch):
    import tensorrt_rtx as trt

    path, _ = exported(tmp_path, precision="int8", batch=batch)
    recipe = Recipe(workspace_mb=64)
    built = build_engine(trt, path.read_bytes(), compute_capability="8.6", recipe=recipe, batch=8, opt_batch=4)
    convs = [n.name for n in onnx.load(path).graph.node if n.op_type == "Conv"]
    assert set(built.compute_types(convs).values()) == {"Int8"}
    sparse = Recipe(workspace_mb=64, builder_flags=("SPARSE_WEIGHTS",))
    assert build_engine(trt, path.read_bytes(), compute_capability="8.6", recipe=sparse, batch=8).content


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnet20", "resnet20_b"])
@pytest.mark.parametrize("precision", ["fp32", "int8", "fp16"])
def test_kernels_read_off_an_exported_graph_are_those_of_the_spec(tmp_path, arch, precision):
    small = None if arch.startswith("resnet20") else (3, 64, 64)
    path, network = exported(tmp_path, arch, precision=precision, opset=19, input_shape=small)
    read = kernels_of(path)
    expected = fuse(walk(network))
    assert read.precision == precision
    assert read.input_shape == network.input_shape
    facts = [
        (k.kind, k.pixels, k.in_width, k.width, k.taps, k.groups, k.skip) for k in expected if k.kind in ("conv", "linear")
    ]
    found = [
        (k.kind, k.pixels, k.in_width, k.width, k.taps, k.groups, k.skip) for k in read.kernels if k.kind in ("conv", "linear")
    ]
    assert sorted(found) == sorted(facts)
    assert sum(k.macs for k in read.kernels) == sum(k.macs for k in expected)
    assert abs(len(read.kernels) - len(expected)) <= 2 * sum(x.op == "channel_select" for x in walk(network))


class FakeCuda:
    """Memory of a GPU, kept in a dict; addresses are its keys."""

    def __init__(self, capability="8.7"):
        self.memory = {}
        self.of = capability

    def capability(self):
        return self.of

    def malloc(self, size):
        self.memory[len(self.memory) + 1] = None
        return len(self.memory)

    def free(self, pointer):
        del self.memory[pointer]

    def to_device(self, pointer, array):
        self.memory[pointer] = array.copy()

    def to_host(self, array, pointer):
        array[...] = self.memory[pointer]

    def synchronize(self):
        pass


def fake_tensorrt(cuda, *, named, batch, version="10.3.0", batches=(1, 4)):
    """A double of the TensorRT module whose engine returns the mean of each channel; `batches` of a dynamic one."""
    profile = [(n, 3, 4, 4) for n in (batches[0], batches[1], batches[1])]
    shapes = {"x": (batch, 3, 4, 4), "y": (batch, 3)}

    class Context:
        def __init__(self):
            self.shape = None
            self.addresses = {}

        def set_input_shape(self, name, shape):
            least, most = batches if batch == -1 else (batch, batch)
            if not least <= shape[0] <= most or shape[1:] != (3, 4, 4):
                return False
            self.shape = shape
            return True

        def set_binding_shape(self, index, shape):
            return self.set_input_shape("x", shape)

        def get_tensor_shape(self, name):
            return (self.shape[0] if self.shape else -1, 3)

        def get_binding_shape(self, index):
            return self.get_tensor_shape("y")

        def set_tensor_address(self, name, address):
            self.addresses[name] = address

        def execute_async_v3(self, stream):
            return self.execute_v2([self.addresses["x"], self.addresses["y"]])

        def execute_v2(self, addresses):
            x = cuda.memory[addresses[0]]
            assert x.shape == self.shape
            assert batch == -1 or len(x) == batch
            cuda.memory[addresses[1]] = x.mean(axis=(2, 3))
            return True

    mode = SimpleNamespace(INPUT="in")
    common = {"create_execution_context": Context}
    if named:
        engine = SimpleNamespace(
            num_io_tensors=2,
            get_tensor_name=lambda i: "xy"[i],
            get_tensor_mode=lambda n: "in" if n == "x" else "out",
            get_tensor_shape=shapes.__getitem__,
            get_tensor_dtype=lambda n: np.float32,
            get_tensor_profile_shape=lambda n, p: profile,
            **common,
        )
    else:
        engine = SimpleNamespace(
            num_bindings=2,
            get_binding_name=lambda i: "xy"[i],
            binding_is_input=lambda n: n == "x",
            get_binding_index="xy".index,
            get_binding_shape=shapes.__getitem__,
            get_binding_dtype=lambda n: np.float32,
            get_profile_shape=lambda p, n: profile,
            **common,
        )
    logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})
    runtime = type(
        "Runtime",
        (),
        {
            "__init__": lambda self, logger: None,
            "deserialize_cuda_engine": lambda self, content: engine if content == b"good" else None,
        },
    )
    return SimpleNamespace(__version__=version, Logger=logger, Runtime=runtime, TensorIOMode=mode, nptype=lambda t: t)


@pytest.mark.parametrize("named", [True, False], ids=["8.5 and later", "8.2"])
@pytest.mark.parametrize("batch", [-1, 1, 4])
def test_the_runner_feeds_both_apis_in_batches_the_engine_takes(tmp_path, named, batch):
    cuda = FakeCuda()
    path = tmp_path / "m.engine"
    path.write_bytes(b"good")
    x = np.random.default_rng(0).standard_normal((7, 3, 4, 4)).astype(np.float32)
    with backend.load_engine(path, fake_tensorrt(cuda, named=named, batch=batch), cuda) as runner:
        assert runner.runtime == "tensorrt"
        np.testing.assert_allclose(runner(x), x.mean(axis=(2, 3)), rtol=1e-6)
    assert cuda.memory == {}


@pytest.mark.parametrize("named", [True, False], ids=["8.5 and later", "8.2"])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 10])
def test_a_piece_shorter_than_the_smallest_batch_of_an_engine_is_filled_up(tmp_path, named, count):
    cuda = FakeCuda()
    path = tmp_path / "m.engine"
    path.write_bytes(b"good")
    x = np.random.default_rng(0).standard_normal((count, 3, 4, 4)).astype(np.float32)
    with infer.Engine(str(path), fake_tensorrt(cuda, named=named, batch=-1, batches=(3, 4)), cuda) as engine:
        np.testing.assert_allclose(engine(x), x.mean(axis=(2, 3)), rtol=1e-6)


@pytest.mark.parametrize("named", [True, False], ids=["8.5 and later", "8.2"])
@pytest.mark.parametrize("batch", [-1, 4])
def test_an_input_that_the_engine_does_not_take_is_refused(tmp_path, named, batch):
    cuda = FakeCuda()
    path = tmp_path / "m.engine"
    path.write_bytes(b"good")
    with infer.Engine(str(path), fake_tensorrt(cuda, named=named, batch=batch, batches=(2, 4)), cuda) as engine:
        takes = "2 to 4" if batch == -1 else "4 to 4"
        with pytest.raises(infer.EngineError, match=rf"4x3x5x5: it takes batches of {takes} images of shape 3x4x4"):
            engine(np.zeros((4, 3, 5, 5), np.float32))
        assert cuda.memory == {}


@pytest.mark.parametrize(("labels", "names"), [(["cat", "dog"], ("cat", "dog")), (None, ("0", "1"))])
@pytest.mark.parametrize("logit", [-7.0, -0.5, 0.5, 100.0])
def test_a_single_logit_tells_two_classes_apart(tmp_path, monkeypatch, capsys, labels, names, logit):
    from PIL import Image

    about = {"input_shape": [3, 8, 8], "preprocessing": Preprocessing().model_dump(mode="json"), "labels": labels}
    (tmp_path / "model.json").write_text(json.dumps(about))
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    monkeypatch.setattr(
        infer, "Engine", lambda path: contextlib.nullcontext(lambda images: np.full((len(images), 1), logit, np.float32))
    )
    monkeypatch.setattr(sys, "argv", ["infer.py", str(tmp_path / "m.engine"), str(tmp_path / "photo.png")])
    assert infer.main() == 0
    rows = [line.split("\t")[1:] for line in capsys.readouterr().out.splitlines()]
    one = 1 / (1 + np.exp(-logit))
    expected = [[names[1], f"{one:.4f}"], [names[0], f"{1 - one:.4f}"]]
    assert rows == (expected if logit > 0 else expected[::-1])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seconds", [0, 20])
def test_each_part_of_the_way_from_a_file_is_timed_and_nothing_else(monkeypatch, batch, seconds):
    now, taken = [0.0], []

    def takes(ms, value):
        now[0] += ms / 1000
        return value

    def decoded(name):
        taken.append(name)
        return takes(50, name)

    monkeypatch.setattr(infer.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(infer, "decoded", decoded)
    monkeypatch.setattr(infer, "preprocess", lambda image, about: takes(30, np.zeros((3, 2, 2), np.float32)))

    def engine(pixels):
        assert pixels.shape == (batch, 3, 2, 2)
        return takes(20, np.zeros((batch, 5), np.float32))

    records = infer.timed(engine, ["a", "b"], {}, seconds, batch)
    part = {"decodeMs": 50 * batch, "preprocessMs": 30 * batch, "runMs": 20, "latencyMs": 80 * batch + 20}
    for record in records:
        assert record == pytest.approx(part)
    assert len(records) == max(infer.LEAST_RUNS, -(-1000 * seconds // (80 * batch + 20)))
    assert taken == (["a", "b"] * len(taken))[: len(taken)], "files are taken in turn"
    warm_up = len(taken) / batch - len(records)
    assert warm_up >= 1
    assert warm_up * (80 * batch + 20) >= 1000 * infer.WARM_UP_S


@pytest.mark.parametrize("values", [[3.0], [4.0, 1.0], [5.0, 1.0, 9.0], [2.0, 8.0, 4.0, 6.0]])
def test_the_median_on_the_board_is_that_of_everyone(values):
    assert infer.median(values) == statistics.median(values)


def test_the_way_from_a_file_is_timed_by_the_command_line(tmp_path, monkeypatch, capsys):
    from PIL import Image

    about = {"input_shape": [3, 8, 8], "preprocessing": Preprocessing().model_dump(mode="json")}
    (tmp_path / "model.json").write_text(json.dumps(about))
    Image.new("RGB", (9, 8)).save(tmp_path / "photo.png")
    seen = []

    def engine(images):
        seen.append(images)
        return np.zeros((len(images), 2), np.float32)

    monkeypatch.setattr(infer, "WARM_UP_S", 0.0)
    monkeypatch.setattr(infer, "Engine", lambda path: contextlib.nullcontext(engine))
    times, words = tmp_path / "times.json", ["infer.py", str(tmp_path / "m.engine")]
    timing = ["--time", "0", "--times", str(times), "--batch", "2"]
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path / "photo.png"), *timing])
    assert infer.main() == 0
    assert len(read_times(times, "latencyMs")) == infer.LEAST_RUNS == len(seen) - 1
    wanted = infer.read_image(str(tmp_path / "photo.png"), about)
    assert all(np.array_equal(images, [wanted, wanted]) for images in seen)
    shown = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert set(shown) == {*infer.PARTS, "latencyMs"}
    for wrong in ("--time=1", "p.png --time=-1", "p.png --time=nan", "p.png --time=1 --batch=0"):
        monkeypatch.setattr(sys, "argv", [*words, *wrong.split()])
        assert infer.main() == infer.EXIT_BAD
        assert "--time wants" in capsys.readouterr().err


def test_an_engine_of_another_board_or_version_is_refused(tmp_path):
    path = tmp_path / "m.engine"
    path.write_bytes(b"good")

    def load(version="10.3.0", capability="8.7"):
        cuda = FakeCuda(capability)
        return backend.load_engine(path, fake_tensorrt(cuda, named=True, batch=1, version=version), cuda)

    Path(f"{path}.json").write_text(json.dumps({"tensorrt": "10.3.0", "compute_capability": "8.7"}))
    load()
    with pytest.raises(ModelFileError, match=r"built with TensorRT 10.3.0, here is 8.5.2"):
        load(version="8.5.2")
    with pytest.raises(ModelFileError, match=r"compute capability 8\.7, this one has 7\.2"):
        load(capability="7.2")
    infer.check_record({"board": "NVIDIA Jetson Orin NX"}, "10.3.0", "8.7", "")
    infer.check_record({"board": "NVIDIA Jetson Orin NX"}, "10.3.0", "8.7", "NVIDIA Jetson Orin NX")
    with pytest.raises(infer.EngineError, match=r"built on 'NVIDIA Jetson Orin NX', this is 'NVIDIA Jetson Orin Nano'"):
        infer.check_record({"board": "NVIDIA Jetson Orin NX"}, "10.3.0", "8.7", "NVIDIA Jetson Orin Nano")
    path.write_bytes(b"foreign")
    with pytest.raises(ModelFileError, match="cannot be loaded"):
        load()
    with pytest.raises(ModelFileError, match="no engine"):
        backend.load_engine(tmp_path / "absent.engine", SimpleNamespace())


def test_without_tensorrt_it_says_what_is_missing(tmp_path):
    if backend.available():
        pytest.skip("TensorRT is here")
    with pytest.raises(ToolMissing, match="TensorRT cannot run here"):
        backend.runner(tmp_path / "m.engine")
    with pytest.raises(ToolMissing) as e:
        backend.build(tmp_path / "m.onnx", tmp_path, target=load_target("jetson-nano"), precision="fp16")
    assert "JetPack" in e.value.remedy or "device" in e.value.remedy


def test_the_record_of_an_engine_names_its_origin(tmp_path):
    path, _ = exported(tmp_path)
    note = backend.record(SimpleNamespace(__version__="10.3.0"), path, "fp16", compute_capability="8.7")
    assert note["onnx_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert any("spec" in key for key in note["metadata"])


BOARDS = [t for t in all_targets() if t.runtime == "tensorrt"]


@needs_shellcheck
@pytest.mark.parametrize("target", BOARDS, ids=lambda t: t.name)
def test_every_board_gets_a_complete_bundle(tmp_path, target):
    network = spec("resnet20")
    for precision in target.precisions:
        folder = tmp_path / f"{precision}"
        folder.mkdir()
        (folder / "model.onnx").write_bytes(b"onnx")
        shapes = InputShapes("input", network.input_shape) if precision == "fp16" else None
        labelled = network.replace(labels=tuple("abcdefghij"))
        write_bundle(folder / "model.onnx", labelled, target, precision, shapes=shapes)
        names = {p.name for p in folder.iterdir()}
        assert names == {
            "model.onnx",
            "build.sh",
            "trt_builder.py",
            "infer.py",
            "model.json",
            "labels.txt",
            "README.md",
            "SHA256SUMS",
        }
        checked = subprocess.run(["shellcheck", "-s", "sh", folder / "build.sh"], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout
        assert subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True).returncode == 0
        about = json.loads((folder / "model.json").read_text())
        assert about["preprocessing"]["mean"]
        assert about["tensorrt"] == target.tensorrt_version


def test_build_sh_builds_with_the_stand_in_and_refuses_another_version(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    shutil.copy(Path(__file__).with_name("edge_standin_trtexec"), tools / "trtexec")
    (tools / "trtexec").chmod(0o755)
    folder = tmp_path / "my bundle"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"onnx" * 100)
    target = load_target("jetson-agx-orin-64gb")
    write_bundle(folder / "model.onnx", spec("resnet20"), target, "int8")

    def run(version, **extra):
        (tools / "standin.json").write_text(json.dumps({"version": version}))
        environment = {"PATH": f"{tools}:{Path(sys.executable).parent}:/usr/bin:/bin", **extra}
        return subprocess.run([folder / "build.sh"], capture_output=True, text=True, env=environment)

    done = run("100300")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "model.engine").read_bytes().startswith(b"STAND-IN")
    noted = json.loads((folder / "model.engine.json").read_text())
    assert noted == {"tensorrt": "10.3", "compute_capability": "8.7", "board": ""}
    assert "exported for a GPU" not in done.stderr
    assert len(json.loads((folder / "times.json").read_text())) == 200
    other = run("8502")
    assert other.returncode == 5
    assert "for TensorRT 10.3, here is 8.5" in other.stderr
    assert run("101303").returncode == 5
    assert run("8602", ANY_TENSORRT="1").returncode == 0

    model = tmp_path / "model of the board"
    model.write_bytes(b'NVIDIA Jetson "Orin\\" NX\0')
    assert run("100300", DEVICE_TREE_MODEL=str(model)).returncode == 0
    assert json.loads((folder / "model.engine.json").read_text())["board"] == "NVIDIA Jetson Orin NX"
    write_bundle(folder / "model.onnx", spec("resnet20"), load_target("jetson-thor-t5000"), "int8")
    elsewhere = run("101303", ANY_TENSORRT="1")
    assert elsewhere.returncode == 0
    assert "built here for 8.7" in elsewhere.stderr

    (tools / "standin.json").write_text(json.dumps({"version": "101303", "trouble": "build"}))
    failed = subprocess.run(
        [folder / "build.sh"],
        capture_output=True,
        text=True,
        env={"PATH": f"{tools}:{Path(sys.executable).parent}:/usr/bin:/bin", "ANY_TENSORRT": "1"},
    )
    assert failed.returncode == 7
    assert "Could not find any implementation" in failed.stderr
    assert not (folder / "model.engine").exists()
    assert not (folder / "model.engine.json").exists()


def test_an_archive_holds_the_folder_and_is_reproducible(tmp_path):
    folder = tmp_path / "resnet"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"onnx")
    write_bundle(folder / "model.onnx", spec("resnet20"), load_target("jetson-nano"), "fp16")
    pack(folder, tmp_path / "a.tar.gz")
    pack(folder, tmp_path / "b.tar.gz")
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes()
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        assert "resnet/build.sh" in tar.getnames()
        assert tar.getmember("resnet/build.sh").mode & 0o111


SIZES = [
    ((640, 427), (224, 224), 256),
    ((427, 640), (224, 224), 256),
    ((641, 427), (224, 224), 232),
    ((224, 224), (224, 224), 256),
    ((500, 375), (288, 288), 256),
    ((375, 500), (384, 384), 256),
    ((500, 375), (384, 384), 256),
    ((500, 375), (96, 160), 128),
    ((500, 375), (224, 224), None),
    ((375, 500), (160, 96), None),
    ((50, 37), (224, 224), 256),
]


@pytest.mark.parametrize(("size", "side", "resize"), SIZES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_infer_preprocesses_as_the_data_pipeline_does(tmp_path, size, side, resize, interpolation):
    import torch
    from PIL import Image

    how = Preprocessing(resize=resize, interpolation=interpolation)
    blocks = np.random.default_rng(0).integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC).save(path)
    about = {"input_shape": [3, *side], "preprocessing": how.model_dump(mode="json")}
    expected = decode(path, (3, *side), how)
    with Image.open(path) as image:
        assert np.array_equal(infer.fit(image, about), expected)
        x = infer.preprocess(image, about)
    normal = normalise(torch.tensor(expected).permute(2, 0, 1)[None], how)[0].numpy()
    np.testing.assert_allclose(x, normal, rtol=0, atol=1e-6)
    assert x.dtype == np.float32


@pytest.mark.parametrize("mode", ["I;16", "I", "L", "P", "RGBA", "CMYK", "LA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_infer_reads_images_of_every_mode_as_the_data_pipeline_does(tmp_path, mode, channels):
    from PIL import Image

    how = Preprocessing(resize=20, channel_order="bgr", mean=(0.1,) * channels, std=(0.5,) * channels)
    rng = np.random.default_rng(0)
    if mode.startswith("I"):
        image = Image.fromarray(rng.integers(0, 65536, (30, 40)).astype(np.uint16 if mode == "I;16" else np.int32))
    else:
        image = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).convert(mode)
    assert image.mode == mode
    path = tmp_path / "photo.tif"
    image.save(path)
    about = {"input_shape": [channels, 16, 16], "preprocessing": how.model_dump(mode="json")}
    with Image.open(path) as image:
        assert np.array_equal(infer.fit(image, about), decode(path, (channels, 16, 16), how))
    with pytest.raises(ValueError, match="no known range"):
        infer.fit(Image.fromarray(np.ones((16, 16), np.float32)), about)


def test_infer_is_valid_for_the_python_of_the_oldest_board():
    import ast

    source = Path(infer.__file__).read_text()
    ast.parse(source, feature_version=(3, 6))
    assert "from __future__" not in source


@needs_shellcheck
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnet20", "resnet32"])
def test_every_board_in_every_precision_gets_a_file_it_reads_and_a_prediction(tmp_path, arch):
    made = {}
    for target in BOARDS:
        for precision in target.precisions:
            half = target.strongly_typed and precision != "fp32"
            written = {"fp32": "fp32", "fp16": "fp16" if half else "fp32", "int8": "int8+fp16" if half else "int8"}[precision]
            key = (target.opset, written)
            if key not in made:
                folder = tmp_path / f"{key[0]}-{written}"
                folder.mkdir()
                small = None if arch in ("resnet20", "resnet32") else (3, 64, 64)
                made[key] = exported(folder, arch, precision=written, opset=target.opset, input_shape=small)
                model = onnx.load(made[key][0])
                onnx.checker.check_model(model, full_check=True)
                assert [o.version for o in model.opset_import if o.domain == ""] == [target.opset]
            path, network = made[key]
            write_bundle(path, network, target, precision)
            checked = subprocess.run(["shellcheck", "-s", "sh", path.parent / "build.sh"], capture_output=True, text=True)
            assert checked.returncode == 0, checked.stdout
            found = predict_kernels(kernels_of(path).kernels, target.device, precision=precision)
            assert found.metric().provenance == "predicted"
            assert found.p50_ms == pytest.approx(predict(walk(network), target.device, precision=precision).p50_ms, rel=0.1)
