"""Deploy over SSH, against a real sshd on the loopback address and stand-ins for what only a board has.

These are trtexec (tests/edge_standin_trtexec) and the Python module tensorrt (tests/edge_standin_python), which runs ONNX.
"""

import contextlib
import dataclasses
import io
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from made_stages import Made
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from edge_targets import infer, ssh
from edge_targets.benchmark import Conditions, summarize
from edge_targets.board_probe import Probe, probe
from edge_targets.board_session import Session, Timed
from edge_targets.board_work import Job
from edge_targets.ssh import Board, WorkFolder
from edge_targets.tegrastats import parse_tegrastats
from edge_targets.tensorrt_versions import capabilities
from edge_targets.trtexec_log import TrtexecLog, read_layer_info, read_profile, read_times
from rescompress.cli.app import main
from rescompress.core.artifact import file_sha256, write_text
from rescompress.core.errors import BadInput, EnvironmentFailed, ModelFileError, TargetError
from rescompress.core.manifest import StageResult, load_manifest, update_manifest
from rescompress.core.settings import DeploySettings
from rescompress.runs.pipeline import run_beside, run_stages
from rescompress.runs.reporter import Silent
from rescompress.runs.stage import Outcome

SSHD = shutil.which("sshd") or ("/usr/sbin/sshd" if Path("/usr/sbin/sshd").exists() else None)
ROOT = Path(__file__).parents[1]
STANDIN_PYTHON = Path(__file__).with_name("edge_standin_python")
needs_sshd = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None, reason="no sshd here (Debian: apt install openssh-server)"
)


def write_onnx(path, *, quantized=False, batch="N", width=8):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((width, 3, 3, 3)).astype(np.float32)
    constants = [numpy_helper.from_array(rng.standard_normal((10, width)).astype(np.float32), "f")]
    nodes, x, w = [], "x", "w"
    if quantized:
        constants += [
            numpy_helper.from_array(np.float32(0.05), "s"),
            numpy_helper.from_array(np.int8(0), "z"),
            numpy_helper.from_array(np.clip(weight * 40, -127, 127).astype(np.int8), "wq"),
        ]
        nodes += [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
            helper.make_node("DequantizeLinear", ["wq", "s", "z"], ["w"]),
        ]
        x = "xd"
    else:
        constants.append(numpy_helper.from_array(weight, "w"))
    nodes += [
        helper.make_node("Conv", [x, w], ["c"], pads=[1, 1, 1, 1], name="conv1"),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["q"]),
        helper.make_node("Gemm", ["q", "f"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 10])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


class Server:
    """A real sshd with a key of its own, and a stand-in trtexec on its PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tools = folder / "tools"
        self.temporary = folder / "board tmp"
        self.tools.mkdir()
        self.temporary.mkdir()
        for name in ("host", "user", "other"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        (folder / "authorized").write_text((folder / "user.pub").read_text())
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.install()
        self.knows("host")
        path = f"{self.tools}:/usr/bin:/bin"
        (folder / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1\nPort {self.port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
            f"PidFile {folder}/pid\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin yes\n"
            f'SetEnv PATH={path} HOME={folder} "TMPDIR={self.temporary}"\n'
        )
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        self.process = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=(folder / "log").open("w"))
        for _ in range(100):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self.process.poll() is not None:
                said = (folder / "log").read_text()
                if "Privilege separation user" in said:  # of an sshd that was copied here, not installed
                    pytest.skip(f"sshd cannot run here: {said.strip()}")
                raise AssertionError(said)
            time.sleep(0.05)
        raise AssertionError("sshd does not listen")

    def install(self, version="100300", trouble=None, **more) -> None:
        shutil.copy(Path(__file__).with_name("edge_standin_trtexec"), self.tools / "trtexec")
        (self.tools / "trtexec").chmod(0o755)
        shutil.copy(Path(__file__).with_name("edge_standin_layers.py"), self.tools)
        (self.tools / "standin.json").write_text(json.dumps({"version": version, "trouble": trouble, **more}))
        for left in (self.tools / "calls.log", self.tools / "tegrastats", self.folder / ".bashrc"):
            left.unlink(missing_ok=True)
        self.install_python()

    def install_python(self, modules=STANDIN_PYTHON, version="10.3.0", trouble="") -> None:
        """Give the board a python3 whose modules are those here and those in the folder `modules`.

        Its temporary files lie elsewhere: onnxruntime, which stands in for TensorRT, leaves one behind.
        """
        variables = f'TMPDIR="{self.folder}" PYTHONPATH="{modules}" STANDIN_TENSORRT={version} STANDIN_TROUBLE="{trouble}"'
        (self.tools / "python3").write_text(f'#!/bin/sh\n{variables} exec "{sys.executable}" "$@"\n')
        (self.tools / "python3").chmod(0o755)

    def knows(self, key: str) -> None:
        """Make the client expect `key` as the key of the server."""
        kind, content, *_ = (self.folder / f"{key}.pub").read_text().split()
        (self.folder / "known").write_text(f"[127.0.0.1]:{self.port} {kind} {content}\n")

    @property
    def ssh_config(self) -> Path:
        path = self.folder / "ssh_config"
        path.write_text(
            f"Host board\n  HostName 127.0.0.1\n  Port {self.port}\n  IdentityFile {self.folder}/user\n"
            f"  IdentitiesOnly yes\n  UserKnownHostsFile {self.folder}/known\n  GlobalKnownHostsFile /dev/null\n"
            "  StrictHostKeyChecking yes\n"
        )
        return path

    def left_behind(self) -> list[str]:
        for _ in range(100):
            names = [p.name for p in self.temporary.iterdir()]
            if not names:
                break
            time.sleep(0.05)
        return names

    def calls(self) -> list[list[str]]:
        log = self.tools / "calls.log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("sshd"))
    yield running
    running.process.terminate()
    running.process.wait()


@pytest.fixture
def fresh(server):
    server.install()
    server.knows("host")
    return server


def deploy(server, *arguments, host="board", environment=None):
    """Run the command in this process; return its exit code and output."""
    words = ["rescompress", "deploy", *map(str, arguments), "--json", "--seconds", "1"]
    if server is not None:
        words += ["--host", host, "--ssh-config", str(server.ssh_config)]
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", words),
        mock.patch.dict(os.environ, environment or {}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return subprocess.CompletedProcess(words, ended.value.code or 0, out.getvalue(), err.getvalue())


@needs_sshd
@pytest.mark.parametrize(
    "version",
    ["8201", "110100", *(pytest.param(v, marks=pytest.mark.slow) for v in ("8502", "8602", "100300", "101303"))],
)
def test_success_with_every_version_of_tensorrt(fresh, tmp_path, version):
    fresh.install(version)
    model = write_onnx(tmp_path / 'my model\'s "best" $(touch pwned) file.onnx', quantized=True)
    baseline = write_onnx(tmp_path / "float.onnx")
    out = tmp_path / "out"
    done = deploy(fresh, model, "--baseline", baseline, "-o", out, "--batches", "1,4")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["provenance"] == "measured"
    assert found["verdict"] == "measured"
    weak = version in ("8201", "8502", "8602", "100300")
    assert {r["precision"] for r in found["results"]} == {"int8", "fp16" if weak else "fp32"}
    for r in found["results"]:
        size = (model if r["precision"] == "int8" else baseline).stat().st_size
        expected = size / 1e5 * (0.5 if weak and r["precision"] == "int8" else 1.0)
        assert r["p50_ms"] == pytest.approx(expected, rel=0.01)
        assert r["batch4_p50_ms"] == pytest.approx(expected * 2.5, rel=0.01)
        assert r["batch4_images_per_s"] > r["images_per_s"]
        assert Path(r["engine"]).read_bytes().startswith(b"STAND-IN")
    assert found["p50_ms"] == min(r["p50_ms"] for r in found["results"])
    manifest = json.loads((out / "manifest.json").read_text())
    (stage,) = manifest["stages"]
    assert stage["metrics"]["p50_ms"]["provenance"] == "measured"
    assert stage["metrics"]["p50_ms"]["runtime"] == "tensorrt"
    fastest = model if stage["details"]["precision"] == "int8" else baseline
    assert stage["metrics"]["size_bytes"]["value"] == fastest.stat().st_size
    assert {a["kind"] for a in stage["outputs"]} >= {"engine", "log"}
    assert fresh.left_behind() == []
    assert len(fresh.calls()) == 2 * (1 + 2 + 1)
    assert not list(tmp_path.rglob("pwned"))


@needs_sshd
@pytest.mark.parametrize(
    ("trouble", "text"), [("build", "Could not find any implementation"), ("crash", "Assertion"), ("connection", "connection")]
)
def test_failures_on_the_board(fresh, tmp_path, trouble, text):
    fresh.install("8502", trouble)
    out = tmp_path / "out"
    done = deploy(fresh, write_onnx(tmp_path / "m.onnx"), "-o", out)
    assert done.returncode == 7, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert fresh.left_behind() == []
    assert not (out / "manifest.json").exists()
    assert not list(out.rglob("*.engine"))
    if trouble != "connection":
        assert text in fetched(out, "model_fp16.build.log").read_text()


@needs_sshd
def test_an_unstable_measurement_is_repeated_and_called_inconclusive(fresh, tmp_path):
    fresh.install("100300", "unstable")
    done = deploy(fresh, write_onnx(tmp_path / "m.onnx"), "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["verdict"] == "inconclusive"
    assert any("inconclusive" in n for n in found["notes"])
    timed = [c for c in fresh.calls() if any(a.startswith("--exportTimes") for a in c)]
    assert len(timed) == 2


@needs_sshd
@pytest.mark.parametrize(("spreads", "reported"), [((0.5, 0.9), 0.5), ((0.9, 0.5), 0.5), ((0.5, 0.01), 0.01)])
def test_the_files_kept_are_those_of_the_attempt_that_is_reported(fresh, tmp_path, spreads, reported):
    fresh.install("100300", spreads=spreads)
    out = tmp_path / "out"
    done = deploy(fresh, write_onnx(tmp_path / "m.onnx"), "-o", out)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["results"]
    samples = [r["computeMs"] for r in json.loads(fetched(out, "model_fp16.batch1.times.json").read_text())]
    assert (max(samples) - min(samples)) / np.mean(samples) == pytest.approx(reported, rel=0.1)
    assert result["p50_ms"] == pytest.approx(np.median(samples), rel=1e-12)
    log = fetched(out, "model_fp16.batch1.times.log").read_text()
    assert f"max = {max(samples):g} ms" in log
    assert not list(out.rglob("*again*"))


@needs_sshd
def test_unknown_rails_give_a_note_instead_of_a_power(fresh, tmp_path):
    (fresh.tools / "tegrastats").write_text(
        "#!/bin/sh\nwhile :; do echo 'RAM 4/9MB VDD_NEW 9000mW/9000mW VDD_GPU 1mW/1mW'; sleep 0.01; done\n"
    )
    (fresh.tools / "tegrastats").chmod(0o755)
    done = deploy(fresh, write_onnx(tmp_path / "m.onnx"), "-o", tmp_path / "out", "--runs", "3")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (note,) = [n for n in found["notes"] if "power not reported" in n]
    assert "VDD_NEW, VDD_GPU" in note
    (stage,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]
    assert stage["metrics"]["memory_mb"]["value"] == 4
    assert "power_w" not in stage["metrics"]


BASHRC = """echo "Welcome to the board"; echo 12345; set -x; echo "warning: nothing works" >&2; printf 'no line end'"""


@needs_sshd
@pytest.mark.skipif("bash" not in pwd.getpwuid(os.getuid()).pw_shell, reason="only bash reads .bashrc over ssh")
def test_a_shell_that_prints_text_disturbs_nothing(fresh, tmp_path, no_hang):
    model, data, right = labelled(tmp_path)
    (fresh.folder / ".bashrc").write_text(BASHRC)
    plain = ["ssh", "-F", fresh.ssh_config, "board", "true"]
    assert "Welcome" in subprocess.run(plain, capture_output=True, text=True).stdout, "the shell prints nothing"
    done = deploy(fresh, model, "--data", data, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["top1"] == pytest.approx(right.mean())
    assert Path(found["results"][0]["engine"]).read_bytes().endswith(model.read_bytes())
    assert "Welcome" not in fetched(tmp_path / "out", "model_fp16.build.log").read_text()
    assert fresh.left_behind() == []


@needs_sshd
def test_a_wrong_host_key(fresh, tmp_path):
    fresh.knows("other")
    done = deploy(fresh, write_onnx(tmp_path / "m.onnx"), "-o", tmp_path / "out")
    assert done.returncode == 7
    assert "host key" in done.stderr
    assert fresh.calls() == []


@needs_sshd
def test_no_trtexec(fresh, tmp_path):
    (fresh.tools / "trtexec").unlink()
    fresh.install_python(modules="/nonexistent")
    done = deploy(fresh, write_onnx(tmp_path / "m.onnx"), "-o", tmp_path / "out")
    assert done.returncode == 4
    assert "no trtexec there" in done.stderr
    assert "no Python module of TensorRT" in done.stderr
    assert fresh.left_behind() == []


@needs_sshd
def test_a_full_disk_on_the_board(fresh, tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", fresh.temporary], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("no right to mount a small file system")
    try:
        model = write_onnx(tmp_path / "m.onnx", width=2000)
        assert model.stat().st_size > 64 * 1024
        done = deploy(fresh, model, "-o", tmp_path / "out")
        assert fresh.left_behind() == []
    finally:
        subprocess.run(["umount", fresh.temporary], check=True)
    assert done.returncode == 7
    assert "disk is full" in done.stderr


@needs_sshd
def test_a_copy_that_does_not_fit(fresh, tmp_path):
    """The disk fills up after the check: the copy itself must notice."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", fresh.temporary], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("no right to mount a small file system")
    try:
        model = write_onnx(tmp_path / "m.onnx", width=2000)
        board = Board("board", config=fresh.ssh_config)
        with pytest.raises(EnvironmentFailed, match="could not store"):
            board.put(model, f"{fresh.temporary}/it's.onnx")
    finally:
        subprocess.run(["umount", fresh.temporary], check=True)


def fetched(out, name):
    """Return a file that was brought back from the one board."""
    (path,) = (out / "deploy").glob(f"*/{name}")
    return path


def labelled(folder, *, precision="fp32", batch="dynamic", images=40):
    """Write a network and data on which it is wrong exactly where it is said; return file, data and that."""
    from compress.resnet import build_model, tensors_of
    from compress.zoo import spec
    from export.to_onnx import ExportOptions, to_onnx

    torch.manual_seed(0)
    network = spec("resnet20", input_shape=(3, 16, 16))
    tensors = {k: v.detach().numpy() for k, v in tensors_of(build_model(network)).items()}
    tensors["fc.weight"] = np.random.default_rng(1).standard_normal(tensors["fc.weight"].shape).astype(np.float32)
    path = folder / f"{precision}.onnx"
    onnx.save(to_onnx(network, tensors, None, ExportOptions(batch, 17, precision)), path)
    rng = np.random.default_rng(0)
    x = (rng.random((images, 16, 16, 3)) * rng.integers(20, 256, (images, 1, 1, 3))).astype(np.uint8)
    how = network.preprocessing
    pixels = (x * how.scale - np.array(how.mean)) / np.array(how.std)
    session = onnxruntime.InferenceSession(str(path))
    logits = np.concatenate([session.run(None, {"input": p[None].transpose(0, 3, 1, 2).astype(np.float32)})[0] for p in pixels])
    right = rng.random(images) < 0.7
    y = np.where(right, logits.argmax(1), (logits.argmax(1) + 1) % 10)
    assert len(set(logits.argmax(1))) > 1
    assert 0 < right.sum() < images
    data = folder / "data.npz"
    np.savez(data, x_train=x[:1], y_train=y[:1], x_val=x, y_val=y)
    return path, data, right


@needs_sshd
@pytest.mark.parametrize("batch", ["dynamic", pytest.param(1, marks=pytest.mark.slow)])
def test_accuracy_is_measured_on_the_board_piece_by_piece(fresh, tmp_path, monkeypatch, batch):
    from edge_targets import board_session
    from rescompress.core.manifest import load_manifest
    from rescompress.core.outcomes import Outcomes

    model, data, right = labelled(tmp_path, batch=batch)
    monkeypatch.setattr(board_session, "PIECE_BYTES", 17 * 4 * 3 * 16 * 16)
    done = deploy(fresh, model, "--data", data, "-o", tmp_path / "out", "--runs", "3")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["top1"] == pytest.approx(right.mean())
    assert found["top1_n"] == 40
    assert found["top1_std_error"] == pytest.approx(np.sqrt(right.mean() * (1 - right.mean()) / 40))
    (stage,) = load_manifest(tmp_path / "out").stages
    top1 = stage.metrics["top1"]
    assert (top1.provenance, top1.runtime, top1.n, top1.precision) == ("measured", "tensorrt", 40, "fp16")
    assert top1.device == stage.metrics["p50_ms"].device
    assert "top5" in stage.metrics
    kept = stage.output("outcomes")
    outcomes = Outcomes.model_validate_json((tmp_path / "out" / kept.path).read_text())
    assert outcomes.unpack() == right.tolist()
    assert len(stage.details.latency_runs) == 3
    timed = [c for c in fresh.calls() if any(a.startswith("--exportTimes") for a in c)]
    assert len(timed) == 3
    assert stage.metrics["p50_ms"].n == 600
    note = json.loads(fetched(tmp_path / "out", "model_fp16.engine.json").read_text())
    assert (note["tensorrt"], note["compute_capability"]) == ("10.3.0", "8.7")
    assert fresh.left_behind() == []


@needs_sshd
def test_a_limit_takes_that_many_images(fresh, tmp_path):
    model, data, _ = labelled(tmp_path)
    done = deploy(fresh, model, "--data", data, "--limit", "13", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["top1_n"] == 13
    assert found["top1"] * 13 == pytest.approx(round(found["top1"] * 13))
    assert len(found["latency_runs"]) == 1


@needs_sshd
@pytest.mark.parametrize(
    ("python", "code", "text"),
    [({"modules": "/nonexistent"}, 4, "No module named 'tensorrt'"), ({"version": "8.5.2"}, 7, "built with TensorRT 10.3.0")],
    ids=["no TensorRT in Python", "another TensorRT in Python"],
)
def test_what_keeps_accuracy_from_being_measured_keeps_the_timings(fresh, tmp_path, python, code, text):
    model, data, _ = labelled(tmp_path)
    fresh.install_python(**python)
    done = deploy(fresh, model, "--data", data, "-o", tmp_path / "out")
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    (stage,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]
    assert stage["metrics"]["p50_ms"]["provenance"] == "measured"
    assert "top1" not in stage["metrics"]
    assert any("accuracy was not measured" in n for n in stage["details"]["notes"])
    assert json.loads(done.stdout)["top1_n"] is None
    assert fresh.left_behind() == []


@needs_sshd
def test_a_disk_that_the_images_fill_keeps_the_timings(fresh, tmp_path):
    model, data, _ = labelled(tmp_path, images=2000)
    size = 3 * model.stat().st_size + (2 << 20)
    assert size < 2000 * 4 * 3 * 16 * 16
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", fresh.temporary], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("no right to mount a small file system")
    try:
        done = deploy(fresh, model, "--data", data, "-o", tmp_path / "out")
        assert fresh.left_behind() == []
    finally:
        subprocess.run(["umount", fresh.temporary], check=True)
    assert done.returncode == 7
    assert "disk is full" in done.stderr
    (stage,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]
    assert "p50_ms" in stage["metrics"]
    assert "top1" not in stage["metrics"]


@needs_sshd
def test_data_that_cannot_be_used_is_refused_before_anything_is_built(fresh, tmp_path):
    model, data, _ = labelled(tmp_path)
    foreign = write_onnx(tmp_path / "m.onnx")
    assert deploy(fresh, foreign, "--data", data, "-o", tmp_path / "o").returncode == 5
    assert deploy(fresh, model, "--data", tmp_path / "absent.npz", "-o", tmp_path / "o").returncode == 5
    assert deploy(fresh, model, "--limit", "3", "-o", tmp_path / "o").returncode == 5
    assert fresh.calls() == []


@needs_sshd
def test_what_is_wrong_on_this_side(fresh, tmp_path):
    model = write_onnx(tmp_path / "m.onnx", batch=1)
    assert deploy(fresh, tmp_path / "absent.onnx").returncode == 5
    assert deploy(fresh, model, "--batches", "1,8", "-o", tmp_path / "o").returncode == 5
    assert deploy(fresh, model, host="-oProxyCommand=touch pwned").returncode == 5
    assert deploy(None, model).returncode == 5
    done = deploy(fresh, model, environment={"PATH": str(tmp_path)})
    assert done.returncode == 4, done.stderr
    assert "ssh" in done.stderr


def test_dry_run_prints_the_commands_and_runs_nothing(tmp_path):
    done = deploy(None, write_onnx(tmp_path / "m.onnx"), "--dry-run", "--target", "jetson-nano")
    assert done.returncode == 0, done.stderr
    lines = json.loads(done.stdout)["commands"]
    assert any("--workspace=1024" in line and "--fp16" in line and "--buildOnly" in line for line in lines)
    assert lines[-1] == "rm -rf -- $WORK"


def test_dry_run_breaks_no_line(rescompress, tmp_path):
    model = write_onnx(tmp_path / "m.onnx")
    lines = rescompress("deploy", model, "--dry-run", "--target", "jetson-nano", COLUMNS="80").stdout.splitlines()
    assert sum(line.startswith("trtexec") for line in lines) == 3
    assert not any(line.startswith("--") for line in lines)


def test_hosts_that_ssh_would_misread_are_refused():
    for host in ("", "-oProxyCommand=x", "a b"):
        with pytest.raises(BadInput):
            Board(host)


@pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh here")
@pytest.mark.parametrize("folder", ["plain", "with blank", "50%h", "a 'quote' %% b"])
def test_ssh_reads_the_path_of_the_shared_connection_as_it_is(tmp_path, folder):
    control = tmp_path / folder / "s"
    command = Board("board", config=Path("/dev/null"), control=control).command("true")
    # -G prints the configuration as ssh reads it, tokens replaced, and connects to nothing
    said = subprocess.run(["ssh", "-G", *command[1:-1]], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert f"controlpath {control}" in said.stdout.splitlines()


@dataclass(frozen=True)
class LocalBoard(Board):
    """This machine as a board: a shell that runs `start` before each command, in place of ssh."""

    shell: str = "bash"
    start: str = ":"

    def command(self, remote, *, master=False):
        return [self.shell, "-c", f"{self.start}\n{remote}"]


@pytest.fixture
def no_hang():
    """Fail a test that hangs."""

    def ring(number, frame):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(90)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("shell", ["bash", "dash"])
@pytest.mark.parametrize("start", [":", BASHRC.replace("set -x; ", ""), BASHRC], ids=["silent", "prints", "prints, set -x"])
def test_files_arrive_whole_through_a_shell_that_prints_text(tmp_path, monkeypatch, no_hang, shell, start):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    content = b"no line end" + bytes(range(256)) * 1000 + f"\n{ssh.BEGIN}\n".encode() + b"\r\n\n"
    (tmp_path / "sent").write_bytes(content)
    with WorkFolder(LocalBoard("local", shell=shell, start=start)) as work:
        board = work.board
        assert board.run("echo answer; exit 3").code == 3
        assert board.run(["echo", "an answer"]).output.startswith("an answer\n" if "set -x" not in start else "")
        board.put(tmp_path / "sent", f"{work.path}/it's there")
        assert (Path(work.path) / "it's there").read_bytes() == content
        board.get(f"{work.path}/it's there", tmp_path / "fetched")
        assert (tmp_path / "fetched").read_bytes() == content
        with pytest.raises(EnvironmentFailed, match="could not fetch"):
            board.get(f"{work.path}/absent", tmp_path / "absent")
        assert not (tmp_path / "absent").exists()
        with pytest.raises(EnvironmentFailed, match="could not store"):
            board.put(tmp_path / "sent", f"{work.path}/absent/file")
    assert not Path(work.path).exists()


@pytest.mark.parametrize("start", ["echo bye; exit 0", "echo bye; exec sleep 1000"], ids=["leaves", "waits"])
def test_a_shell_that_never_comes_to_the_command_is_refused(tmp_path, monkeypatch, no_hang, start):
    monkeypatch.setattr(ssh, "START_TIMEOUT_S", 0.5)
    board = LocalBoard("local", connect_timeout_s=0, start=start)
    (tmp_path / "sent").write_text("text")
    with pytest.raises(EnvironmentFailed, match=r"does not come to the command.*bye") as e, WorkFolder(board):
        pass
    assert "~/.bashrc" in e.value.remedy
    with pytest.raises(EnvironmentFailed, match="does not come to the command"):
        board.run("true", timeout_s=0.5)
    if "exit" in start:
        with pytest.raises(EnvironmentFailed, match="does not come to the command"):
            board.put(tmp_path / "sent", f"{tmp_path}/there")
        with pytest.raises(EnvironmentFailed, match="does not come to the command"):
            board.get(f"{tmp_path}/sent", tmp_path / "fetched")
        assert not (tmp_path / "fetched").exists()


@dataclass(frozen=True)
class OwnGroup(LocalBoard):
    """The same with a process group per command, as sshd makes it."""

    def command(self, remote, *, master=False):
        return ["setsid", *super().command(remote)]


@pytest.mark.skipif(shutil.which("setsid") is None, reason="no setsid here")
@pytest.mark.parametrize("shell", ["bash", "dash"])
@pytest.mark.parametrize("has_timeout", [True, False], ids=["timeout", "no timeout"])
def test_a_command_that_hangs_is_ended_on_the_board_with_what_it_started(tmp_path, no_hang, shell, has_timeout):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    for tool in ("sh", "sleep", "true", *(("timeout",) if has_timeout else ())):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    board = OwnGroup("local", shell=str(shutil.which(shell)), start=f"PATH='{tmp_path}'")
    assert board.run("echo quick; exit 3", timeout_s=30) == ssh.Completed(3, "quick\n")
    script = f"sleep 600 & echo $! > '{tmp_path}/watcher'; echo $$ > '{tmp_path}/command'; sleep 600; echo on"
    started = time.monotonic()
    with pytest.raises(EnvironmentFailed, match=r"did not answer within 0\.2 s"):
        board.run(script, timeout_s=0.2)
    assert time.monotonic() - started < ssh.GRACE_S
    pids = [int((tmp_path / name).read_text()) for name in ("watcher", "command")]
    left = [pid for pid in pids if running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def running(pid):
    """Return whether a process runs; one that ended and that nobody asked after does not."""
    for _ in range(20):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except FileNotFoundError:
            return False
        time.sleep(0.05)
    return True


def test_a_work_folder_that_cannot_be_made_is_told(monkeypatch, no_hang, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    with pytest.raises(EnvironmentFailed, match="could not make a work folder"), WorkFolder(LocalBoard("local")):
        pass


def session_with(tools, out, *, shell):
    """Return a session on this machine with the programs in the folder `tools` on its PATH, in the work folder `out`."""
    board = LocalBoard("local", shell=shell, start=f"PATH='{tools}':$PATH")
    found = Probe(None, None, "trtexec", "10.3.0", None, None, frozenset(), True, None)
    return Session(board, found, capabilities("10.3.0"), DeploySettings(), out, str(out), "board", [], lambda text: None)


def watched_tools(folder, *, code=0):
    """Write a tegrastats that counts its starts, as its process id and as W, and a trtexec that waits for it to run."""
    texts = {
        "tegrastats": 'n=$(ls "$0".* 2>/dev/null | wc -l); echo "RAM 1/2MB VDD_IN $((n + 1))000mW/1mW"\n'
        'echo $$ > "$0.part"; mv "$0.part" "$0.$n"; while :; do sleep 0.05; done',
        "trtexec": 'n=$(ls "$0".* 2>/dev/null | wc -l); : > "$0.$n"\n'
        'while [ ! -s "${0%/*}/tegrastats.$n" ]; do sleep 0.05; done\n'
        'cp "${0%/*}/times$n.json" "${0%/*}/m.batch1.times.json"\n'
        f'echo "attempt $((n + 1))"; echo "&&&& PASSED TensorRT.trtexec [TensorRT v100300] # trtexec"; exit {code}',
    }
    for name, text in texts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)


def watchers(folder):
    """Return the process ids of the stand-ins of tegrastats that still run."""
    alive = [int(p.read_text()) for p in folder.glob("tegrastats.*") if Path(f"/proc/{p.read_text().strip()}").exists()]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    return alive


@pytest.mark.skipif(not Path("/proc").exists(), reason="no /proc here")
@pytest.mark.parametrize("shell", ["bash", "dash"])
@pytest.mark.parametrize("code", [0, 3])
def test_tegrastats_ends_with_trtexec_whose_exit_code_is_kept(tmp_path, no_hang, shell, code):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    watched_tools(tmp_path, code=code)
    (tmp_path / "times0.json").write_text("[]")
    session = session_with(tmp_path, tmp_path, shell=shell)
    refused = pytest.raises(EnvironmentFailed, match="exit code 3") if code else contextlib.nullcontext()
    with refused:
        session.run(["trtexec"], tmp_path / "log", timeout_s=60, watch=f"{tmp_path}/watched")
    assert watchers(tmp_path) == []
    assert "RAM 1/2MB" in (tmp_path / "watched").read_text()


@pytest.mark.parametrize(("times", "attempt"), [(((1, 1.0),), 1), (((1, 2), (1, 9)), 1), (((1, 9), (1, 2)), 2)])
def test_samples_log_and_power_are_of_one_attempt(tmp_path, no_hang, times, attempt):
    watched_tools(tmp_path)
    for i, samples in enumerate(times):
        (tmp_path / f"times{i}.json").write_text(json.dumps([{"computeMs": ms} for ms in samples]))
    session = session_with(tmp_path, tmp_path, shell="bash")
    session.out = tmp_path / "out"
    timed = session.time("m", 1, ["trtexec"], 1)
    watchers(tmp_path)
    assert timed.samples_ms == times[attempt - 1]
    assert [r["computeMs"] for r in json.loads(timed.times.read_text())] == list(times[attempt - 1])
    assert f"attempt {attempt}\n" in timed.times.with_suffix(".log").read_text()
    assert parse_tegrastats(Path(timed.watched).read_text()).power_w == attempt
    assert len(list(session.out.iterdir())) == 2


@pytest.mark.parametrize(("told", "mode"), [("MODE_30W", "30W"), ("MAXN_SUPER", "MAXN_SUPER"), ("", None)])
def test_the_power_mode_a_board_tells_is_named_as_in_the_catalogue(monkeypatch, told, mode):
    said = f"@@nvpmodel\nNV Power Mode: {told}\n@@trtexec\ntrtexec\n@@help\n[TensorRT v100300]\n@@end\n"
    monkeypatch.setattr(Board, "run", lambda board, command: ssh.Completed(0, said))
    assert probe(Board("board")).power_mode == mode


def test_an_error_of_the_shell_is_not_taken_for_a_part_of_trtexecs_path(monkeypatch):
    said = "@@trtexec\nsh: cannot open /proc/x\n/usr/src/tensorrt/bin/trtexec\n@@help\n[TensorRT v100300]\n@@end\n"
    monkeypatch.setattr(Board, "run", lambda board, command: ssh.Completed(0, said))
    assert probe(Board("board")).trtexec == "/usr/src/tensorrt/bin/trtexec"


class Counted(Session):
    """A session whose runs take the times in `runs`; nothing is built."""

    runs = ()

    def run(self, command, log, **more):
        write_text(log, "")
        return TrtexecLog("passed")

    def time(self, name, batch, command, number):
        times = self.out / f"{name}.batch{batch}.run{number}.times.json"
        write_text(times, "[]")
        write_text(times.with_suffix(".log"), "")
        return Timed(tuple(self.runs[number - 1]), TrtexecLog("passed"), times, None)


class Files:
    """A board that keeps nothing and gives empty files."""

    host = "board"

    def put(self, local, remote):
        pass

    def get(self, remote, local):
        local.write_text('{"Layers": []}' if "layers" in remote else "[]")


@pytest.mark.parametrize(
    ("runs", "stable"),
    [
        (([0.5] * 2000, [1.0] * 1000), False),
        (([0.5] * 2000, [0.51] * 1000), True),
        (([0.5] * 2000, [0.5, 1.0] * 500), False),
        (([0.5] * 20,), True),
    ],
    ids=["runs disagree", "runs agree", "one run is not steady", "one run"],
)
def test_every_run_counts_alike_and_runs_that_disagree_are_not_stable(tmp_path, runs, stable):
    write_onnx(tmp_path / "m.onnx")
    found = Probe(None, None, "trtexec", "10.3.0", None, None, frozenset(), False, None)
    options = DeploySettings(runs=len(runs))
    session = Counted(Files(), found, capabilities("10.3"), options, tmp_path, "/w", "board", [], lambda text: None)
    session.runs = runs
    measured = session.measure(Job("int8", tmp_path / "m.onnx"))
    p50 = measured.metrics["p50_ms"]
    medians = tuple(float(np.median(r)) for r in runs)
    assert measured.stable == stable
    assert measured.run_medians_ms == pytest.approx(medians)
    assert (p50.low, p50.high) == pytest.approx((min(medians), max(medians)))
    assert p50.n == len(runs) * min(len(r) for r in runs)
    assert measured.metrics["mean_ms"].value == pytest.approx(np.mean([np.mean(r) for r in runs]))


def test_tegrastats():
    new = (
        "01-01-1970 00:00:01 RAM 2448/7620MB (lfb 4x4MB) GR3D_FREQ 99% VDD_IN 5000mW/4900mW VDD_CPU_GPU_CV 1234mW/1200mW\n"
        "01-01-1970 00:00:02 RAM 2500/7620MB (lfb 4x4MB) GR3D_FREQ 99% VDD_IN 7000mW/5000mW VDD_CPU_GPU_CV 1234mW/1200mW\n"
    )
    found = parse_tegrastats(new)
    assert (found.power_w, found.memory_mb, found.samples) == (6.0, 2500.0, 2)
    assert parse_tegrastats("RAM 1/2MB POM_5V_IN 2145/2145 POM_5V_GPU 80/80").power_w == pytest.approx(2.145)
    assert parse_tegrastats("").power_w is None


def tegrastats_log(*lines):
    """Return a log: of each W, how many lines and the load of the GPU in percent (None where it is not told)."""
    shown = [(w, "" if load is None else f"GR3D_FREQ {load}%@[611]") for w, count, load in lines for _ in range(count)]
    return "\n".join(f"RAM 3000/15389MB CPU [1%@729] {load} VDD_IN {w}000mW/1mW" for w, load in shown)


@pytest.mark.parametrize(
    ("lines", "power_w", "power_of", "n"),
    [
        (((5, 30, 0), (15, 105, 99), (5, 5, 0)), 15.0, "GPU at work", 105),
        (((5, 30, 0), (14, 50, 62), (16, 50, 99), (7, 5, 30)), 15.0, "GPU at work", 100),
        (((5, 30, None), (15, 105, None)), 15.0, "median of all", 135),
        (((5, 30, 0), (9, 105, 0), (8, 1, 4)), 9.0, "median of all", 136),
    ],
    ids=["idle at both ends", "load varies", "load not told", "on a DLA"],
)
def test_power_is_that_of_the_time_when_the_gpu_works(tmp_path, lines, power_w, power_of, n):
    log = tegrastats_log(*lines)
    found = parse_tegrastats(log)
    assert (found.power_w, found.power_of, found.power_lines) == (pytest.approx(power_w), power_of, n)
    (tmp_path / "log").write_text(log)
    session = session_with(tmp_path, tmp_path, shell="bash")
    about = {"device": "board", "runtime": "tensorrt", "batch": 1}
    metrics = session.power([str(tmp_path / "log")], summarize([2.0] * 10, Conditions(**about)))
    assert (metrics["power_w"].value, metrics["power_w"].n) == (pytest.approx(power_w), n)
    assert metrics["images_per_s_per_w"].value == pytest.approx(500 / power_w)
    assert bool(session.notes) == (power_of == "median of all")


@pytest.mark.parametrize(
    ("line", "power_w"),
    [
        (
            "GR3D_FREQ 99% VDD_GPU_SOC 21000mW/20000mW VDD_CPU_CV 3000mW/3000mW VIN_SYS_5V0 4541mW/4500mW NC 0mW/0mW "
            "VDDQ_VDD2_1V8AO 600mW/600mW NC 0mW/0mW",
            28.541,
        ),
        (
            "SWAP 2/15959MB (cached 1MB) CPU [0%@1190,off] EMC_FREQ 1%@408 GR3D_FREQ 12%@318 AO@38C GPU@39.5C CPU@40C "
            "GPU 120/100 CPU 468/450 SOC 937/900 CV 5/0 VDDRQ 312/234 SYS5V 1458/1400",
            3.3,
        ),
        ("GPU 120mW/100mW CPU 468mW/450mW SOC 937mW/900mW CV 5mW/0mW VDDRQ 312mW/234mW SYS5V 1458mW/1400mW", 3.3),
        ("VDD_GPU 30000mW/3mW VDD_CPU_SOC_MSS 9000mW/9mW VIN_SYS_5V0 6000mW/6mW VIN 50000mW/50000mW", 50.0),
        ("PMIC@50C VDD_IN 3056/3056 VDD_SYS_CPU 152/152 VDD_SYS_GPU 152/152 VDD_4V0_WIFI 0/0 VDD_SYS_DDR 883/883", 3.056),
        ("VDD_IN 4987mW/4987mW VDD_CPU_GPU_CV 1234mW/1200mW VDD_SOC 1500mW/1400mW", 4.987),
    ],
    ids=["AGX Orin", "AGX Xavier", "AGX Xavier with units", "Thor", "TX2", "Orin NX"],
)
def test_the_power_of_the_module_on_every_board(line, power_w):
    found = parse_tegrastats(f"RAM 2448/62800MB (lfb 4x4MB) {line}\nRAM 2448/62800MB (lfb 4x4MB)")
    assert found.power_w == pytest.approx(power_w)
    assert found.unknown_rails == ()


@pytest.mark.parametrize(
    ("line", "rails"),
    [
        ("VDD_GPU_SOC 21000mW/20000mW VDD_CPU_CV 3000mW/3000mW", ("VDD_GPU_SOC", "VDD_CPU_CV")),
        ("VIN_SYS_5V0 4541mW/4500mW", ("VIN_SYS_5V0",)),
        ("RAM 1/2MB SWAP 0/3810MB (cached 0MB) IRAM 0/252kB(lfb 252kB)", ()),
    ],
)
def test_a_set_of_rails_that_is_not_known_gives_no_power(line, rails):
    found = parse_tegrastats(line)
    assert found.power_w is None
    assert found.unknown_rails == rails


ODD = ["NaN", "Infinity", "-Infinity", "0", "-1", "1e308", '"1"', "null", "true", "[]", "{}", "1" + "0" * 400, "1" * 5000]
"""What may stand where a figure is expected; JSON of Python reads all of it, or refuses it."""


@pytest.mark.parametrize(
    "text", [*(f'[{{"computeMs": {odd}}}]' for odd in ODD), "[" * 100_000, "{}", "5", "x", '["a"]', "[]", ""]
)
def test_times_that_no_board_takes_are_refused(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ModelFileError) as caught:
        read_times(tmp_path / "t.json")
    assert caught.value.exit_code == 5
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("key", ["averageMs", "percentage"])
@pytest.mark.parametrize("odd", [odd for odd in ODD if odd != "0"])
def test_a_profile_with_an_odd_figure_is_refused(tmp_path, key, odd):
    row = {"name": '"conv"', "averageMs": "1.0", "percentage": "50.0", key: odd}
    (tmp_path / "p.json").write_text(f'[{{"count": 1}}, {{{", ".join(f"{json.dumps(k)}: {v}" for k, v in row.items())}}}]')
    with pytest.raises(ModelFileError, match=f"{key}|no JSON"):
        read_profile(tmp_path / "p.json")


@pytest.mark.parametrize(
    "text", ['{"Layers": [NaN]}', '{"Layers": 5}', '{"Layers": {"a": 1}}', '["a"]', "5", "[" * 100_000, "\xff\x00", ""]
)
def test_layers_of_another_form_are_refused(tmp_path, text):
    (tmp_path / "l.json").write_text(text)
    with pytest.raises(ModelFileError):
        read_layer_info(tmp_path / "l.json")
    (tmp_path / "l.json").write_text('{"Layers": [{"Name": 5, "Weights": 7, "Metadata": []}, "b"]}')
    assert [layer.name for layer in read_layer_info(tmp_path / "l.json")] == ["5", "b"]


@pytest.mark.parametrize("digits", ["8", "82", "850", "999999999999", ""])
def test_a_version_that_is_none_is_refused(monkeypatch, digits):
    said = f"@@trtexec\ntrtexec\n@@help\n[TensorRT v{digits}]\n@@end\n"
    monkeypatch.setattr(Board, "run", lambda board, command: ssh.Completed(0, said))
    with pytest.raises(TargetError, match="does not tell its version"):
        probe(Board("board"))


@pytest.mark.parametrize("free", ["\u00b2", "9" * 5000, "-1", "x"])
def test_free_space_that_is_no_number_is_unknown(monkeypatch, free):
    said = f"@@free\n{free}\n@@trtexec\ntrtexec\n@@help\n[TensorRT v100300]\n@@end\n"
    monkeypatch.setattr(Board, "run", lambda board, command: ssh.Completed(0, said))
    assert probe(Board("board")).free_bytes is None


def test_garbage_of_tegrastats_gives_no_power():
    for line in (
        f"RAM {'9' * 400}/1MB VDD_IN {'9' * 400}mW/1mW",
        "VDD_IN 99999999mW/1mW",
        "\x1b]0;x\x07 VDD_IN -5mW/-5mW",
        "RAM",
    ):
        watched = parse_tegrastats(line)
        assert (watched.power_w, watched.memory_mb) == (None, None), line


def test_a_deployment_and_a_run_keep_what_the_other_wrote(tmp_path):
    """Each reads the manifest anew before it writes; interleaved updates lose nothing."""
    change = (
        "import sys; from pathlib import Path; from rescompress.core.manifest import StageResult, update_manifest\n"
        "for i in range(20): update_manifest(Path(sys.argv[1]), "
        "lambda m: m.with_stage(StageResult(stage=f'deploy:{sys.argv[2]}-{i}', status='done')))"
    )
    words = [sys.executable, "-c", change, str(tmp_path)]
    several = [subprocess.Popen([*words, name], env={**os.environ, "PYTHONPATH": str(ROOT)}) for name in "abc"]
    assert [p.wait(timeout=60) for p in several] == [0, 0, 0]
    assert len(load_manifest(tmp_path).stages) == 60


@pytest.mark.parametrize("workspace", [False, True])
def test_a_deployment_during_a_run_is_kept(tmp_path, workspace):
    board = StageResult(stage="deploy:jetson", status="done", ancestry=("a", "b"))

    def work(context):
        model.write_bytes(b"network")
        update_manifest(tmp_path, lambda m: m.with_stage(board.model_copy(update={"ancestry": (file_sha256(model), "b")})))
        return Outcome({}, [("checkpoint", model)])

    deploying = Made("prune", {}, (), work, network="0" * 64, writes=("prune.safetensors",))
    model = tmp_path / "prune.safetensors"
    report = run_stages([deploying], tmp_path, {}, reporter=Silent(), workspace=workspace)
    assert [s.stage for s in report.manifest.stages] == [s.stage for s in load_manifest(tmp_path).stages]
    assert {s.stage for s in load_manifest(tmp_path).stages} == {"prune", "deploy:jetson"}


def test_boards_work_at_a_time_and_beside_a_run_and_none_is_lost(tmp_path):
    """Each waits until all are at work, so that none could have waited for another."""
    (tmp_path / "net").write_text("network")
    together = threading.Barrier(4, timeout=60)
    results = {}

    def work(name):
        def working(context):
            together.wait()
            file = context.folder / f"{name}.bin"
            file.write_text(name)
            return Outcome({}, [("checkpoint", file)])

        return Made(name, {}, (), working, network="0" * 64, writes=(f"{name}.bin",), kind=name.partition(":")[0])

    def beside(name):
        results[name] = run_beside(work(name), tmp_path, reporter=Silent())

    boards = ["deploy:a", "deploy:b", "deploy:c"]
    threads = [threading.Thread(target=beside, args=(name,)) for name in boards]
    for thread in threads:
        thread.start()
    run_stages([work("dense")], tmp_path, {}, reporter=Silent())
    for thread in threads:
        thread.join()
    assert {s.stage for s in load_manifest(tmp_path).stages} == {"dense", *boards}
    assert all(results[name].ran and results[name].incomplete is None for name in boards)
    claimed = json.loads((tmp_path / ".stages" / ".claimed.json").read_text())
    assert {"dense.bin", *(f"{name}.bin" for name in boards)} <= set(claimed)


def test_one_board_is_deployed_to_by_one_process_at_a_time(tmp_path):
    def work(context):
        with pytest.raises(BadInput, match="another process"):
            run_beside(stage, tmp_path, reporter=Silent())
        return Outcome()

    stage = Made("deploy:a", {}, (), work, network="0" * 64)
    run_beside(stage, tmp_path, reporter=Silent())
    assert [s.stage for s in load_manifest(tmp_path).stages] == ["deploy:a"]


def test_a_measurement_is_repeated_unless_what_is_known_is_asked_for(tmp_path):
    calls, missing = [], [EnvironmentFailed("no image"), None, None]

    def work(context):
        calls.append(1)
        (tmp_path / "engine").write_text("engine")
        return Outcome({}, [("engine", tmp_path / "engine")], incomplete=missing[len(calls) - 1])

    stage = Made("deploy:a", {"runs": 1}, (), work, network="0" * 64, writes=("engine",))
    partly = run_beside(stage, tmp_path, reporter=Silent())
    assert (partly.incomplete, partly.result.key) == (missing[0], "")
    assert run_beside(stage, tmp_path, reporter=Silent(), again=False).ran, "what is in part missing is not known"
    known = run_beside(stage, tmp_path, reporter=Silent(), again=False)
    assert (known.ran, len(calls)) == (False, 2)
    assert run_beside(stage, tmp_path, reporter=Silent()).ran
    other = dataclasses.replace(stage, depends={"runs": 2})
    missing.append(None)
    assert run_beside(other, tmp_path, reporter=Silent(), again=False).ran
    assert load_manifest(tmp_path).stage("deploy:a").environment == {}


def test_a_deployment_knows_the_network_that_it_is_of_and_outlives_a_damaged_manifest(tmp_path):
    def pruned(context):
        (tmp_path / "p.bin").write_text("pruned")
        return Outcome({}, [("checkpoint", tmp_path / "p.bin")])

    run = Made("prune", {}, (), pruned, network="0" * 64, of="prune", kind="prune", writes=("p.bin",))
    run_stages([run], tmp_path, {}, reporter=Silent())
    sha256 = file_sha256(tmp_path / "p.bin")
    board = Made("deploy:a", {}, (), lambda context: Outcome(), network=sha256, kind="deploy", about="a")
    found = run_beside(board, tmp_path, reporter=Silent()).result
    assert (found.of, found.target, found.ancestry) == ("prune", "a", (sha256, "0" * 64))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BadInput, match="is no manifest"):
        run_beside(board, tmp_path, reporter=Silent())
    report = run_stages([run], tmp_path, {}, reporter=Silent())
    assert {s.stage for s in report.manifest.stages} == {"prune", "deploy:a"}


@needs_sshd
def test_a_folder_of_the_version_before_is_deployed_to_again(fresh, tmp_path):
    """It has a manifest and files, of the slower engine too, and no records."""
    model, out = write_onnx(tmp_path / "m.onnx", quantized=True), tmp_path / "out"
    words = (model, "--baseline", write_onnx(tmp_path / "f.onnx"), "-o", out)
    assert deploy(fresh, *words).returncode == 0
    shutil.rmtree(out / ".stages")
    done = deploy(fresh, *words)
    assert done.returncode == 0, done.stderr
    (out / "manifest.json").unlink()
    shutil.rmtree(out / ".stages")
    done = deploy(fresh, *words)
    assert done.returncode == 5, done.stderr
    assert "did not write" in done.stderr


@needs_sshd
def test_what_was_measured_is_taken_where_that_is_asked_for(fresh, tmp_path):
    model, out = write_onnx(tmp_path / "m.onnx"), tmp_path / "out"
    first = deploy(fresh, model, "-o", out)
    builds = len(fresh.calls())
    taken = deploy(fresh, model, "-o", out, "--cached")
    assert taken.returncode == 0, taken.stderr
    assert json.loads(taken.stdout) == json.loads(first.stdout)
    assert len(fresh.calls()) == builds
    assert deploy(fresh, model, "-o", out).returncode == 0
    assert len(fresh.calls()) == 2 * builds
    write_onnx(model, width=9)
    assert deploy(fresh, model, "-o", out, "--cached").returncode == 0
    assert len(fresh.calls()) == 3 * builds


@needs_sshd
@pytest.mark.parametrize("version", ["8502", pytest.param("110100", marks=pytest.mark.slow)])
def test_what_was_asked_for_beside_the_latency_is_measured_and_kept(fresh, tmp_path, version):
    fresh.install(version, soak_part=60, slower=[1.0, 1.3], tactics=[1.04, 0.96, 1.0])
    (fresh.tools / "tegrastats").write_text(
        "#!/bin/sh\nwhile :; do echo 'RAM 4/9MB GR3D_FREQ 99%@[1020,1020] GPU@61.5C VDD_IN 9000mW/9000mW'; sleep 0.01; done\n"
    )
    (fresh.tools / "tegrastats").chmod(0o755)
    model, out = write_onnx(tmp_path / "m.onnx"), tmp_path / "out"
    more = ("--builds", "3", "--soak", "2m", "--cold-start", "--streams", "2", "--end-to-end", "--runs", "2")
    done = deploy(fresh, model, "-o", out, *more)
    assert done.returncode == 0, done.stderr
    found, expected = json.loads(done.stdout), model.stat().st_size / 1e5
    (stage,) = json.loads((out / "manifest.json").read_text())["stages"]
    value = {name: m["value"] for name, m in stage["metrics"].items()}
    assert value["p50_ms"] == pytest.approx(expected, rel=0.01)
    assert value["build_ratio"] == pytest.approx(1.04 / 0.96, rel=0.01)
    assert value["end_to_end_ms"] == pytest.approx(expected + 1, rel=0.01)
    assert value["contention_ms"] == pytest.approx(2 * expected, rel=0.01)
    assert value["first_frame_ms"] == pytest.approx(3 * expected, rel=0.01)
    assert value["soak_ratio"] == pytest.approx(1.3, rel=0.01)
    assert value["soak_p50_ms"] == pytest.approx(1.3 * expected, rel=0.01)
    assert value["jitter_ms"] == pytest.approx(value["p99_ms"] - value["p50_ms"])
    assert 1 < value["cold_start_ms"] < 60_000
    assert all(m["provenance"] in ("measured", "counted") for m in stage["metrics"].values())
    details = stage["details"]
    assert details["build_kept"] == 3
    assert details["builds_ms"] == pytest.approx([1.04 * expected, 0.96 * expected, expected], rel=0.01)
    assert len(details["cold_start_ms_runs"]) == 5
    for name in ("end_to_end", "contention", "first_frame", "p99", "jitter"):
        assert len(details[f"{name}_ms_runs"]) == 2
    assert set(details["conditions"]) == {"end_to_end_ms", "contention_ms", "cold_start_ms", "first_frame_ms", "soak_ratio"}
    assert details["soak"]["clock_mhz"] == [1020, 1020]
    assert details["soak"]["hottest_c"] == 61.5
    assert details["soak"]["throttled"] is False
    assert set(found["conditions"]) == set(details["conditions"])
    assert any("3 builds of one file" in n for n in found["notes"])
    assert any(n.startswith("soak of 120 s") for n in found["notes"])
    assert json.loads(Path(found["engine"]).read_bytes().split(b"\n")[0].removeprefix(b"STAND-IN"))["tactics"] == 1.0
    assert fresh.left_behind() == []


def photographs(folder):
    """Write two image files of different sizes and kinds."""
    rng, files = np.random.default_rng(0), [folder / "it's.jpg", folder / "b.png"]
    for file, (height, width) in zip(files, [(48, 64), (30, 20)], strict=True):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(file)
    return files


@needs_sshd
@pytest.mark.parametrize("trtexec", [True, False], ids=["trtexec", "builder"])
def test_the_way_from_image_files_is_timed_on_the_board(fresh, tmp_path, trtexec):
    if not trtexec:  # one module builds and times, the other runs images
        (fresh.tools / "trtexec").unlink()
        both = tmp_path / "modules"
        both.mkdir()
        (both / "tensorrt.py").write_text(
            "import os, sys\n"
            "which = 'python' if os.path.basename(sys.argv[0]) == 'infer.py' else 'builder'\n"
            f"__file__ = {str(Path(__file__).parent)!r} + '/edge_standin_' + which + '/tensorrt.py'\n"
            "exec(compile(open(__file__).read(), __file__, 'exec'))\n"
        )
        fresh.install_python(both)
    model, _, _ = labelled(tmp_path)
    files = photographs(tmp_path)
    words = [w for f in files for w in ("--photo", f)]
    done = deploy(fresh, model, "-o", tmp_path / "out", *words, "--runs", "2")
    assert done.returncode == 0, done.stderr
    (stage,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]
    details, metric = stage["details"], stage["metrics"]["from_file_ms"]
    assert metric["provenance"] == "measured"
    assert len(details["from_file_ms_runs"]) == 2
    assert metric["n"] >= 2 * infer.LEAST_RUNS
    parts = details["from_file_parts_ms"]
    assert set(parts) == {"decode", "preprocess", "run"}
    assert all(v > 0 for v in parts.values())
    told = details["conditions"]["from_file_ms"]
    assert "image files: 2 of 20x30, 64x48 pixels" in told
    assert any("ms from file to classes: decode " in n for n in details["notes"])
    assert any("infer.py" in c and "photo1" in c for c in details["commands"])
    times = [f for f in stage["outputs"] if f["path"].endswith(".times.json") and "from_file" in f["path"]]
    assert len(times) == 2
    files[1].write_bytes(files[0].read_bytes())
    again = deploy(fresh, model, "-o", tmp_path / "again", *words)
    assert json.loads(again.stdout)["conditions"]["from_file_ms"] != told, "other files, other conditions"
    assert fresh.left_behind() == []


@needs_sshd
def test_a_board_without_pillow_keeps_the_latency(fresh, tmp_path):
    shadow = tmp_path / "modules"
    shutil.copytree(STANDIN_PYTHON, shadow)
    (shadow / "PIL.py").write_text("raise ImportError('No module named PIL')\n")
    fresh.install_python(shadow)
    model, _, _ = labelled(tmp_path)
    done = deploy(fresh, model, "-o", tmp_path / "out", "--photo", photographs(tmp_path)[0])
    assert done.returncode == 4, done.stderr
    assert "PIL" in done.stderr
    (stage,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]
    assert stage["metrics"]["p50_ms"]["provenance"] == "measured"
    assert "from_file_ms" not in stage["metrics"]
    assert fresh.left_behind() == []


@pytest.mark.parametrize("damage", ["cut off", "no image", "absent"])
def test_a_photo_that_cannot_be_read_is_refused_before_anything_is_built(tmp_path, damage):
    model, _, _ = labelled(tmp_path)
    file = photographs(tmp_path)[1]
    if damage == "absent":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-300] if damage == "cut off" else b"text")
    done = deploy(None, model, "-o", tmp_path / "out", "--photo", file, "--dry-run")
    assert done.returncode == 5, done.stderr
    assert "b.png" in done.stderr


def test_a_file_that_does_not_say_how_images_are_read_is_not_timed_from_files(tmp_path):
    done = deploy(
        None, write_onnx(tmp_path / "m.onnx"), "-o", tmp_path / "out", "--photo", photographs(tmp_path)[0], "--dry-run"
    )
    assert done.returncode == 5, done.stderr
    assert "preprocessed" in done.stderr


@needs_sshd
def test_a_figure_that_fails_keeps_the_latency(fresh, tmp_path):
    fresh.install("100300", "cold")
    done = deploy(fresh, write_onnx(tmp_path / "m.onnx"), "-o", tmp_path / "out", "--cold-start")
    assert done.returncode == 7, done.stderr
    assert "out of memory" in done.stderr
    (stage,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]
    assert stage["metrics"]["p50_ms"]["provenance"] == "measured"
    assert "cold_start_ms" not in stage["metrics"]
    assert any("not everything that was asked for" in n for n in stage["details"]["notes"])
    assert fresh.left_behind() == []


@pytest.mark.parametrize("width", [4, 10, 12])
def test_scores_of_another_width_than_the_file_says_are_no_accuracy(tmp_path, width):
    from compress.data import Inputs, load_dataset
    from rescompress.core.errors import DataError
    from rescompress.core.spec import Preprocessing
    from rescompress.runs.stages.deploy import scoring

    pixels, labels = np.zeros((6, 4, 4, 3), np.uint8), np.arange(6)
    np.savez(tmp_path / "data.npz", x_train=pixels, y_train=labels, x_val=pixels, y_val=labels)
    plain = Preprocessing(name="raw", mean=(0.0,) * 3, std=(1.0,) * 3, resize=None)
    images = load_dataset(str(tmp_path / "data.npz"), Inputs((3, 4, 4), 10, plain, None)).val

    class Board:
        runtime = "tensorrt"

        def __call__(self, x):
            return np.eye(len(x), width, dtype=np.float32)

    scores = {}
    if width == 10:
        scoring(images, 10, scores, Silent())("fp16", Board())
        assert scores["fp16"].metrics["top1"].value == 1.0
        return
    with pytest.raises(DataError, match="6x10 is expected"):
        scoring(images, 10, scores, Silent())("fp16", Board())
