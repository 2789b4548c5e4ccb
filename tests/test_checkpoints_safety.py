"""Files that are damaged, foreign or meant to do harm: refused by name, with exit code 5, and nothing runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compress import zoo
from compress.checkpoints import load_checkpoint, save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.resnet import build_model, tensors_of
from rescompress.cli.app import main
from rescompress.core.errors import BadInput, CheckpointError

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(0)
    return tensors_of(build_model(zoo.spec("resnet20")))


def refuses(path: Path, words: str, **options: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as e:
        load_checkpoint(path, **options)
    assert words in str(e.value), str(e.value)
    assert e.value.where == str(path)
    assert e.value.exit_code == 5
    return e.value


class Calls:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[object, ...]:
        return self.function, self.args


HARM: dict[str, tuple[Callable[..., object], Callable[[Path], tuple[object, ...]]]] = {
    "posix.system": (os.system, lambda p: (f"touch {p}",)),
    "builtins.exec": (exec, lambda p: (f"open({str(p)!r}, 'w').close()",)),
    "builtins.eval": (eval, lambda p: (f"open({str(p)!r}, 'w').close()",)),
    "builtins.getattr": (getattr, lambda p: (p, "touch")),
    "io.open": (io.open, lambda p: (str(p), "w")),
    "subprocess.Popen": (__import__("subprocess").Popen, lambda p: (["touch", str(p)],)),
    "torch.load": (torch.load, lambda p: (str(p),)),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", HARM)
def test_code_in_a_pickle_is_named_and_does_not_run(name: str, legacy: bool, state: State, tmp_path: Path) -> None:
    function, args = HARM[name]
    path, mark = tmp_path / "net.pt", tmp_path / "ran"
    torch.save({"state_dict": state, "extra": Calls(function, *args(mark))}, path, _use_new_zipfile_serialization=not legacy)
    error = refuses(path, "would run")
    assert name.rsplit(".", 1)[-1] in error.what
    assert not mark.exists()


def raw_torch(path: Path, program: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", program)
        archive.writestr("net/version", "3\n")


def test_every_way_of_calling_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    command = f"touch {mark}".encode()
    programs = {
        "INST": b"(S'" + command + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + command + b"'\no.",
        "NEWOBJ": b"\x80\x02cos\nsystem\n(S'" + command + b"'\nt\x81.",
        "REDUCE": b"cos\nsystem\n(S'" + command + b"'\ntR.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x94(\x8c\x01xtR.",
        "nested name": b"\x80\x04\x8c\x05torch\x94\x8c\x0bos.path.abs\x94\x93\x94(\x8c\x01xtR.",
        "unknown class called": b"cmypackage\nNet\n(tR.",
        "EXT": b"\x80\x02\x82\x01.",
    }
    for name, program in programs.items():
        raw_torch(tmp_path / "net.pt", program)
        with pytest.raises(CheckpointError):
            load_checkpoint(tmp_path / "net.pt")
        assert not mark.exists(), name


def test_allow_pickle_is_the_way_past_and_warns(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, mark = tmp_path / "net.pt", tmp_path / "ran"
    torch.save({"state_dict": state, "extra": Calls(os.system, f"touch {mark}")}, path)
    loaded = load_checkpoint(path, allow_pickle=True)
    assert mark.exists()
    assert "running the code" in caplog.text
    assert all(torch.equal(loaded.state_dict[k], v) for k, v in state.items())


def test_harmless_things_beside_the_weights_are_read(state: State, tmp_path: Path) -> None:
    import argparse
    import collections
    import datetime

    import numpy as np

    extras = {
        "best": np.float64(0.9),
        "curve": np.arange(3),
        "args": argparse.Namespace(lr=0.1),
        "when": datetime.datetime(2024, 1, 1),
        "out": Path("runs/1"),
        "counts": collections.Counter("abc"),
        "lists": collections.defaultdict(list),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "set": {1, 2},
    }
    torch.save({"state_dict": state, **extras}, tmp_path / "net.pt")
    loaded = load_checkpoint(tmp_path / "net.pt")
    assert all(torch.equal(loaded.state_dict[k], v) for k, v in state.items())


BOMBS = {
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "memo": b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b".",
    "long": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "text": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"abc.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.",
    "nesting": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "laughs": b"\x80\x02}q\x00" + b"".join(b"}q%c(U\x01ah%cU\x01bh%cu" % (i, i - 1, i - 1) for i in range(1, 60)) + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickle_bombs_cost_nothing(name: str, tmp_path: Path) -> None:
    raw_torch(tmp_path / "net.pt", BOMBS[name])
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "net.pt")


def rewritten(
    source: Path, target: Path, change: Callable[[zipfile.ZipInfo, bytes], list[tuple[zipfile.ZipInfo, bytes]]]
) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            for name, data in change(info, old.read(info)):
                new.writestr(name, data)


def test_archives_with_bombs_links_and_twins(state: State, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    torch.save(state, good)

    def bomb(info: zipfile.ZipInfo, data: bytes) -> list[tuple[zipfile.ZipInfo, bytes]]:
        if info.filename.endswith("/version"):
            big = zipfile.ZipInfo("good/data/zeros")
            big.compress_type = zipfile.ZIP_DEFLATED
            return [(info, data), (big, bytes(200_000_000))]
        return [(info, data)]

    def link(info: zipfile.ZipInfo, data: bytes) -> list[tuple[zipfile.ZipInfo, bytes]]:
        if info.filename.endswith("/data/0"):
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            return [(info, b"/etc/passwd")]
        return [(info, data)]

    def twin(info: zipfile.ZipInfo, data: bytes) -> list[tuple[zipfile.ZipInfo, bytes]]:
        return [(info, data)] * (2 if info.filename.endswith("/data/0") else 1)

    for change, words in ((bomb, "bomb"), (link, "link"), (twin, "twice")):
        if change is twin:
            with pytest.warns(UserWarning, match="Duplicate name"):
                rewritten(good, bad, change)
        else:
            rewritten(good, bad, change)
        refuses(bad, words)


def test_a_compressed_archive_is_still_read(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as old, zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    loaded = load_checkpoint(tmp_path / "small.pt")
    assert all(torch.equal(loaded.state_dict[k], v) for k, v in state.items())


def test_a_key_that_stands_twice(state: State, tmp_path: Path) -> None:
    program = pickle.dumps({"a": 1}, 2)
    raw_torch(
        tmp_path / "net.pt",
        program.replace(b"q\x00X\x01\x00\x00\x00aq\x01K\x01s", b"(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u"),
    )
    refuses(tmp_path / "net.pt", "twice")
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    (tmp_path / "net.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refuses(tmp_path / "net.safetensors", "twice")
    both = state | {f"_orig_mod.{k}": v for k, v in state.items()}
    torch.save(both, tmp_path / "both.pt")
    refuses(tmp_path / "both.pt", "two tensors")


def test_absurd_shapes(state: State, tmp_path: Path) -> None:
    huge = torch.zeros(1).expand(50_000, 50_000, 3, 3)
    torch.save(state | {"conv1.weight": huge}, tmp_path / "net.pt")
    refuses(tmp_path / "net.pt", "repeats")
    for entry in (
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**60]},
        {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        7,
    ):
        header = json.dumps({"conv1.weight": entry}).encode()
        (tmp_path / "net.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        refuses(tmp_path / "net.safetensors", "")
    overlapping = {k: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for k in "ab"}
    header = json.dumps(overlapping).encode()
    (tmp_path / "net.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refuses(tmp_path / "net.safetensors", "overlap")


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("layer2.0.conv1.weight", lambda t: t.index_fill(0, torch.tensor(0), float("nan")), "NaN"),
        ("fc.weight", lambda t: t * float("inf"), "infinite"),
        ("layer1.0.bn1.running_var", lambda t: -t, "negative variances"),
        ("layer1.0.conv1.weight", lambda t: t.to(torch.int64), "int64"),
        ("layer1.0.conv1.weight", lambda t: t.to(torch.complex64), "complex64"),
        ("layer1.0.conv1.weight", lambda t: t[:, :, :, :2], "square"),
        ("layer1.0.conv2.weight", lambda t: t[:-1], "15"),
        ("layer3.1.bn2.weight", lambda t: t[:-1], "layer3.1.bn2.weight"),
        ("fc.weight", lambda t: t.t(), "10"),
        ("conv1.weight", lambda t: t.flatten(), "square"),
    ],
)
@pytest.mark.parametrize("native", [False, True], ids=["torch", "native"])
def test_tensors_that_cannot_be_right(
    key: str, change: Callable[..., Any], words: str, native: bool, state: State, tmp_path: Path
) -> None:
    changed = state | {key: change(state[key]).contiguous()}
    path = tmp_path / "net.pt"
    if native:
        save_checkpoint(Checkpoint(zoo.spec("resnet20"), changed), path)
        words = words if words in ("NaN", "infinite", "negative variances", "int64") else key
    else:
        torch.save(changed, path)
    refuses(path, words)


def test_any_missing_tensor_is_missed(state: State, tmp_path: Path) -> None:
    for key in state:
        torch.save({k: v for k, v in state.items() if k != key}, tmp_path / "net.pt")
        if key.endswith("num_batches_tracked"):
            load_checkpoint(tmp_path / "net.pt")
        else:
            refuses(tmp_path / "net.pt", "")


def test_foreign_files(tmp_path: Path) -> None:
    import gzip
    import tarfile

    import numpy as np

    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a.pt", "a.pt")
    np.savez(tmp_path / "data.npz", x=np.zeros(3))
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": 1, "b": list(range(20))}))
    (tmp_path / "page.pt").write_bytes(b"<html><body>Not found</body></html>")
    (tmp_path / "lfs.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "net.pt.gz").write_bytes(gzip.compress((tmp_path / "a.pt").read_bytes()))
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "noise.pt").write_bytes(bytes(range(7, 256)) * 20)
    os.mkfifo(tmp_path / "pipe.pt")
    for name, words in {
        "a.pt": "no ResNet",
        "a.tar": "tar archive",
        "data.npz": "numpy archive",
        "plain.pkl": "plain pickle",
        "page.pt": "web page",
        "lfs.pt": "git lfs pull",
        "net.pt.gz": "unpack it",
        "empty.pt": "0 bytes",
        "noise.pt": "known container",
        "pipe.pt": "regular file",
        "missing.pt": "no such file",
        ".": "folder",
    }.items():
        refuses(tmp_path / name if name != "." else tmp_path, words)


def test_a_file_that_is_not_there_is_missed_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "resnet20.pt").touch()
    asked = (
        "import sys\nfrom rescompress.cli.app import main\n"
        "try: main()\nexcept SystemExit as e: sys.exit(99 if 'torch' in sys.modules else e.code)"
    )
    wrong = str(tmp_path / "resnet2.pt")
    run = subprocess.run([sys.executable, "-c", asked, "inspect", wrong], capture_output=True, text=True, check=False)
    assert run.returncode == 5, run.stderr
    assert wrong in run.stderr
    assert "resnet20.pt" in run.stderr


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda tv: tv.densenet121(), "DenseNet"),
        (lambda tv: tv.VisionTransformer(32, 16, 1, 1, 64, 64), "Vision Transformer"),
        (lambda tv: tv.vgg11(), "VGG"),
        (lambda tv: tv.mobilenet_v2(), "MobileNet"),
        (lambda tv: tv.segmentation.fcn_resnet50(weights=None, weights_backbone=None), "part of a larger network"),
    ],
)
def test_other_networks_are_refused_by_name(build: Callable[[Any], torch.nn.Module], words: str, tmp_path: Path) -> None:
    import torchvision

    with torch.device("meta"):
        model = build(torchvision.models)
    save_file({k: torch.zeros(v.shape) for k, v in model.state_dict().items()}, tmp_path / "net.safetensors")
    refuses(tmp_path / "net.safetensors", words)


def test_se_preactivation_and_groupnorm_are_refused_by_name(state: State, tmp_path: Path) -> None:
    preact = {k: v for k, v in state.items() if k.startswith(("layer", "fc"))} | {"conv1.weight": state["conv1.weight"]}
    for name in ("weight", "bias", "running_mean", "running_var"):
        preact[f"layer2.0.bn1.{name}"] = torch.ones(16)
        preact[f"layer3.0.bn1.{name}"] = torch.ones(32)
    for changed, words in (
        (state | {"layer1.0.se.fc1.weight": torch.ones(4, 16, 1, 1)}, "squeeze-and-excitation"),
        ({k: v for k, v in state.items() if "running" not in k}, "GroupNorm"),
        (preact, "pre-activation"),
    ):
        torch.save(changed, tmp_path / "net.pt")
        refuses(tmp_path / "net.pt", words)


def test_hdf5_that_reaches_out_or_claims_too_much(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as f:
        f["kernel"] = [1.0]
    for name, build, words in (
        ("external", lambda g: g.__setitem__("kernel:0", h5py.ExternalLink(str(secret), "kernel")), "link"),
        ("soft", lambda g: g.__setitem__("kernel:0", h5py.SoftLink("/elsewhere")), "link"),
        ("huge", lambda g: g.create_dataset("kernel:0", (2**20, 2**20), "f4", chunks=(1024, 1024)), "bomb"),
        ("raw", lambda g: g.create_dataset("kernel:0", (4,), "f4", external=[("/etc/passwd", 0, 16)]), "another file"),
    ):
        with h5py.File(tmp_path / f"{name}.h5", "w") as f:
            build(f.create_group("conv2_block1_1_conv/conv2_block1_1_conv"))
        refuses(tmp_path / f"{name}.h5", words)


def test_unknown_options_are_bad_input(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "net.pt")
    for options in ({"preprocess": "imgnet"}, {"arch_options": {"strides": "x"}}, {"input_shape": (1, 32, 32)}):
        with pytest.raises(BadInput):
            load_checkpoint(tmp_path / "net.pt", **options)  # type: ignore[arg-type]


def test_the_command_line_shows_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {}, "extra": Calls(os.system, "true")}, tmp_path / "net.pt")
    monkeypatch.setattr(sys, "argv", ["rescompress", "inspect", str(tmp_path / "net.pt")])
    with pytest.raises(SystemExit) as e:
        main()
    captured = capsys.readouterr()
    assert e.value.code == 5
    assert captured.out == ""
    assert "posix.system" in captured.err
    assert "--allow-pickle" in captured.err
    assert "Traceback" not in captured.err


TRAINER_LOG = """
class Log:
    def __init__(self):
        self.statistics = {"mean": Log.mean}

    def mean(self):
        open(self.mark, "w").close()


class Calling:
    def __reduce__(self):
        return Log.mean, (Log(),)
"""


def test_methods_of_unknown_classes_are_read_without_looking_them_up(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As mmengine writes them: training logs that name methods of their own class. Calling one is refused as ever."""
    module = types.ModuleType("trainer_log")
    exec(TRAINER_LOG, module.__dict__)
    monkeypatch.setitem(sys.modules, "trainer_log", module)
    module.Log.mark = str(tmp_path / "ran")
    torch.save({"state_dict": state, "message_hub": {"loss": module.Log()}}, tmp_path / "logged.pt")
    assert b"getattr" in zipfile.ZipFile(tmp_path / "logged.pt").read("logged/data.pkl")
    assert load_checkpoint(tmp_path / "logged.pt").state_dict
    torch.save({"state_dict": state, "message_hub": module.Calling()}, tmp_path / "calling.pt")
    refuses(tmp_path / "calling.pt", "would run")
    assert not (tmp_path / "ran").exists()
