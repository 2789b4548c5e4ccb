"""The builder that travels, under every Python that is here, against a stand-in for TensorRT's module and the CUDA runtime."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_edge_deploy import write_onnx

from compress.zoo import spec
from edge_targets import infer, trt_builder
from edge_targets.bundle import write_bundle
from edge_targets.catalog import load_target
from edge_targets.engine_proof import broken, prove
from edge_targets.tensorrt_versions import capabilities
from edge_targets.trtexec import BuildOptions, InputShapes, TimingOptions, build_command, profile_command, timing_command
from edge_targets.trtexec_log import parse_log, read_layer_info, read_profile, read_times

BUILDER = Path(trt_builder.__file__)
STANDIN = Path(__file__).with_name("edge_standin_builder")
PYENV = Path.home() / ".pyenv" / "versions"
PYTHONS = {f"{p.parts[-3]}": p for p in sorted(PYENV.glob("3.*/bin/python"))} | {"this": Path(sys.executable)}
OLDEST = next((p for name, p in PYTHONS.items() if name.startswith("3.6.")), Path(sys.executable))
ENDS = sorted({next(iter(PYTHONS)), "this"})
SHAPES = InputShapes("x", (3, 8, 8), 1, 1, 4)


def run(python: Path, *words: str, version: str = "10.3.0", trouble: str = "") -> subprocess.CompletedProcess[str]:
    """Run the builder in an interpreter of its own, with the stand-ins."""
    variables = {"STANDIN_TENSORRT": version, "STANDIN_TROUBLE": trouble, "PYTHONPATH": str(STANDIN)}
    environment = {**os.environ, **variables, "PYTHONDONTWRITEBYTECODE": "1", "PYENV_VERSION": ""}
    return subprocess.run([str(python), str(BUILDER), *words], capture_output=True, text=True, env=environment, timeout=60)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    write_onnx(folder / "int8.onnx", quantized=True)
    return folder


@pytest.mark.parametrize("path", [BUILDER, Path(infer.__file__)], ids=["trt_builder", "infer"])
def test_what_travels_is_python_3_6(path: Path) -> None:
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 6))
    for python in (p for name, p in PYTHONS.items() if name.startswith("3.6.")):
        done = subprocess.run(
            [str(python), "-c", "import sys; compile(open(sys.argv[1], encoding='utf-8').read(), 'f', 'exec')", str(path)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


def test_the_builder_needs_nothing_but_the_standard_library() -> None:
    tree = ast.parse(BUILDER.read_text(encoding="utf-8"))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names <= set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("name", "version"),
    [(name, "10.3.0") for name in PYTHONS] + [(n, v) for n in ENDS for v in ("8.2.1", "8.5.2", "10.13.3", "11.4.1")],
)
def test_it_builds_checks_times_and_profiles(tmp_path: Path, files: Path, name: str, version: str) -> None:
    """With the very command lines that trtexec gets, and read by the very readers."""
    known = capabilities(version)
    words = ["python3", "trt_builder.py"]
    engine, layers = str(tmp_path / "m.engine"), tmp_path / "layers.json"
    options = BuildOptions("int8", SHAPES, timing_cache=str(tmp_path / "cache"))
    build = build_command(known, str(files / "int8.onnx"), engine, options, executable=words, layer_info=str(layers))
    built = run(PYTHONS[name], *build[2:], "--check", version=version)
    assert built.returncode == 0, built.stdout + built.stderr
    log = parse_log(built.stdout + built.stderr)
    assert (log.status, log.tool, log.version) == ("passed", "trt_builder", known.version)
    assert (log.compute_capability, log.device, log.sm_count, log.clock_mhz) == ("8.7", "Orin", 8, 625.0)
    assert log.skipped_inference
    assert log.build_s is not None
    assert log.engine_mib is not None
    assert "Checked" in built.stdout
    assert broken(prove({"conv1": "int8"}, read_layer_info(layers))) == []
    assert (tmp_path / "cache").read_bytes() == b"timed"
    timing = TimingOptions(1, 0, 30, SHAPES, 4)
    timed = run(PYTHONS[name], *timing_command(known, engine, timing, executable=words, times=str(tmp_path / "t.json"))[2:])
    summary = parse_log(timed.stdout)
    times = read_times(tmp_path / "t.json")
    assert timed.returncode == 0, timed.stdout + timed.stderr
    assert len(times) == 30
    assert summary.gpu_compute is not None
    assert summary.gpu_compute.median == pytest.approx(sorted(times)[15], rel=1e-4)
    assert summary.gpu_compute.maximum == pytest.approx(max(times), rel=1e-4)
    profile = tmp_path / "p.json"
    profiled = run(PYTHONS[name], *profile_command(known, engine, timing, executable=words, profile=str(profile))[2:])
    assert profiled.returncode == 0, profiled.stdout + profiled.stderr
    rows = read_profile(profile)
    assert "conv1" in {r.name for r in rows}
    assert [r.name for r in parse_log(profiled.stdout).layers] == [r.name for r in rows]
    assert sum(r.percent for r in rows) == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("trouble", "text"),
    [
        ("parser", "no importer registered"),
        ("build", "Could not find any implementation"),
        ("load", "cannot be loaded"),
        ("memory", "cudaMalloc failed with CUDA error 2"),
        ("queue", "could not queue"),
        ("nan", "not finite"),
        ("random", "differs between two runs"),
    ],
)
def test_what_goes_wrong_is_told_in_a_line_and_fails(tmp_path: Path, files: Path, trouble: str, text: str) -> None:
    words = [f"--onnx={files / 'int8.onnx'}", f"--saveEngine={tmp_path / 'm.engine'}", "--int8", "--skipInference", "--check"]
    done = run(OLDEST, *words, trouble=trouble)
    assert done.returncode == 1
    log = parse_log(done.stdout)
    assert log.status == "failed"
    assert any(text in error for error in log.errors)
    assert "Traceback" not in done.stderr
    assert (tmp_path / "m.engine").exists() == (trouble not in ("parser", "build"))
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("words", "version"),
    [
        (["--onnx=m.onnx", "--saveEngine=e", "--best"], "10.3.0"),
        (["--onnx=m.onnx", "--saveEngine"], "10.3.0"),
        (["--onnx=absent.onnx", "--saveEngine=e"], "10.3.0"),
        (["--onnx=m.onnx", "--loadEngine=e"], "10.3.0"),
        (["--loadEngine=absent.engine"], "10.3.0"),
        (["--onnx=M", "--saveEngine=e", "--int8"], "11.4.1"),
        (["--onnx=M", "--saveEngine=e", "--stronglyTyped"], "8.5.2"),
        (["--onnx=M", "--saveEngine=e", "--useDLACore=0"], "10.13.3"),
        (["--onnx=M", "--saveEngine=e", "--optShapes=x:ax3"], "10.3.0"),
    ],
    ids=["flag", "no value", "no file", "both", "no engine", "int8 in 11", "typing in 8.5", "no DLA", "shape"],
)
def test_what_cannot_be_done_is_refused(tmp_path: Path, files: Path, words: list[str], version: str) -> None:
    given = [w.replace("=M", f"={files / 'int8.onnx'}").replace("=e", f"={tmp_path}/e") for w in words]
    done = run(OLDEST, *given, version=version)
    assert done.returncode == 1, done.stdout
    assert parse_log(done.stdout).errors
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_without_tensorrt_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "tensorrt").mkdir()  # what the package of type stubs leaves
    for modules in ("", str(tmp_path)):
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": modules, "PYENV_VERSION": ""}
        done = subprocess.run([str(OLDEST), "-S", str(BUILDER), "--help"], capture_output=True, text=True, env=environment)
        assert done.returncode == 4
        assert "is not here" in done.stderr


def test_a_graph_that_cannot_be_recorded_is_told_and_timed_without(tmp_path: Path, files: Path) -> None:
    engine = tmp_path / "m.engine"
    words = [
        f"--onnx={files / 'int8.onnx'}",
        f"--saveEngine={engine}",
        "--int8",
        "--duration=0",
        "--warmUp=0",
        "--useCudaGraph",
    ]
    done = run(OLDEST, *words, trouble="graph")
    assert done.returncode == 0, done.stdout
    assert "cannot be recorded as a CUDA graph" in done.stdout
    assert parse_log(done.stdout).gpu_compute is not None


def test_what_runs_on_a_dla_is_told_without_verbose(tmp_path: Path, files: Path) -> None:
    words = [
        f"--onnx={files / 'int8.onnx'}",
        f"--saveEngine={tmp_path / 'e'}",
        "--int8",
        "--useDLACore=1",
        "--allowGPUFallback",
    ]
    done = run(OLDEST, *words, "--skipInference")
    assert "[DlaLayer]" in done.stdout, done.stdout


def test_build_sh_takes_the_builder_where_there_is_no_trtexec(tmp_path: Path, files: Path) -> None:
    """The bundle carries it; the script's checks of the version hold as with trtexec."""
    if Path("/usr/src/tensorrt/bin/trtexec").exists():
        pytest.skip("trtexec is here")
    tools, folder = tmp_path / "tools", tmp_path / "my bundle"
    tools.mkdir()
    folder.mkdir()
    for tool in ("sed", "head", "tail", "rm", "tr", "dirname", "sh"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    shutil.copy(files / "int8.onnx", folder / "model.onnx")
    write_bundle(folder / "model.onnx", spec("resnet20"), load_target("jetson-agx-orin-64gb"), "int8")
    assert (folder / "trt_builder.py").read_bytes() == BUILDER.read_bytes()

    def script(version: str, modules: Path) -> subprocess.CompletedProcess[str]:
        (tools / "python3").write_text(f'#!/bin/sh\nexec "{OLDEST}" "$@"\n')
        (tools / "python3").chmod(0o755)
        given = {"STANDIN_TENSORRT": version, "PYTHONPATH": str(modules), "PYTHONDONTWRITEBYTECODE": "1"}
        text = (folder / "build.sh").read_text().replace("--duration=10", "--duration=0").replace("--warmUp=500", "--warmUp=0")
        (folder / "quick.sh").write_text(text)
        return subprocess.run(
            ["/bin/sh", str(folder / "quick.sh")], capture_output=True, text=True, env={"PATH": str(tools), **given}
        )

    done = script("10.3.0", STANDIN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert parse_log((folder / "build.log").read_text()).tool == "trt_builder"
    assert json.loads((folder / "model.engine.json").read_text())["tensorrt"] == "10.3"
    assert len(read_times(folder / "times.json")) >= 100
    assert "Checked" in done.stdout
    other = script("8.5.2", STANDIN)
    assert other.returncode == 5
    assert "here is 8.5" in other.stderr
    assert script("10.3.0", tmp_path / "nothing").returncode == 4


SHIM = """
import ctypes, os, sys
import tensorrt_rtx
globals().update({k: v for k, v in vars(tensorrt_rtx).items() if not k.startswith("__")})
__version__ = "10.13.3"  # the names of TensorRT for RTX 1.x are those of TensorRT 10


class Builder:
    def __init__(self, logger):
        self.real = tensorrt_rtx.Builder(logger)

    def __getattr__(self, name):
        return getattr(self.real, name)

    def create_builder_config(self):
        config = self.real.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(tensorrt_rtx.ComputeCapability.SM86, 0)
        return config


class Cudart:
    def cudaDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = 8
        return 0


_load = ctypes.CDLL
ctypes.CDLL = lambda name, *rest, **more: Cudart() if "libcudart" in str(name) else _load(name, *rest, **more)
"""


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_the_building_half_runs_through_a_real_tensorrt(tmp_path: Path, quantized: bool) -> None:
    """TensorRT for RTX under the name tensorrt: it parses and builds without a GPU; only the GPU's name is a stand-in."""
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "tensorrt.py").write_text(SHIM)
    model, engine = write_onnx(tmp_path / "m.onnx", quantized=quantized), tmp_path / "m.engine"
    known = capabilities("10.13.3")
    command = build_command(known, str(model), str(engine), BuildOptions("int8", SHAPES), executable=["python3", "builder"])
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(BUILDER), *command[2:], "--verbose"], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert parse_log(done.stdout).status == "passed"
    assert engine.stat().st_size > 1000
    assert ("Int8" in done.stdout) == quantized
