"""Networks by name: a hub on this machine, the caches of the libraries, what is published beside the weights."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch

from compress.checkpoints import load_checkpoint, named
from rescompress.core.errors import CheckpointError, EnvironmentFailed, ToolMissing

timm = pytest.importorskip("timm")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = "http://127.0.0.1:1"
Files = dict[str, bytes]


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that fetching a file takes."""

    repositories: ClassVar[dict[str, Files]] = {}
    gated: ClassVar[set[str]] = set()
    requests: ClassVar[list[str]] = []

    def log_message(self, *args: object) -> None:
        """Print nothing."""

    def _answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        """Answer."""
        self.requests.append(self.path)
        parts = self.path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            files = self.repositories.get("/".join(parts[2:4]), {})
            tree = [{"type": "file", "path": name, "size": len(body), "oid": "0" * 40} for name, body in files.items()]
            self._answer(200, json.dumps(tree).encode())
            return
        repository, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        if repository in self.gated:
            self._answer(403, X_Error_Code="GatedRepo")
        elif repository not in self.repositories:
            self._answer(404, X_Error_Code="RepoNotFound")
        elif revision not in ("main", COMMIT, "v1"):
            self._answer(404, X_Error_Code="RevisionNotFound")
        elif file not in self.repositories[repository]:
            self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            body = self.repositories[repository][file]
            self._answer(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """Return a hub on this machine, with an empty cache."""
    Hub.repositories, Hub.gated, Hub.requests = {}, set(), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=functools.partial(server.serve_forever, 0.05), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    yield Hub
    server.shutdown()
    server.server_close()


@functools.cache
def weights(classes: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock, [1, 1, 1, 1], channels=(8, 8, 16, 16), stem_width=8, num_classes=classes
    )
    return {k: v.contiguous() for k, v in net.state_dict().items()}


def safe() -> bytes:
    return safetensors.torch.save(weights(), metadata={"format": "pt"})


def pickled(path: Path) -> bytes:
    torch.save(weights(), path)
    return path.read_bytes()


def config(**changes: Any) -> bytes:
    cfg = {
        "tag": "a1_in1k", "input_size": [3, 64, 64], "test_input_size": [3, 96, 96], "interpolation": "bicubic",
        "crop_pct": 0.95, "test_crop_pct": 1.0, "crop_mode": "center", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3],
    }  # fmt: skip
    top = {"architecture": "resnet18", "num_classes": 3, "label_names": ["ant", "bee", "cat"]}
    return json.dumps({**top, "pretrained_cfg": cfg | changes}).encode()


CARD = b"---\ntags:\n- image-classification\nlicense: apache-2.0\n---\n# A network\n\nlicense: not this one\n"


def fill(hub: type[Hub], name: str = "timm/resnet18.a1_in1k", **files: bytes) -> None:
    hub.repositories[name] = {"model.safetensors": safe(), "config.json": config(), "README.md": CARD} | files


def test_a_timm_name_brings_what_is_published_beside_the_weights(hub: type[Hub]) -> None:
    fill(hub)
    found = load_checkpoint("timm/resnet18.a1_in1k")
    assert all(torch.equal(found.state_dict[k], v) for k, v in weights().items())
    p = found.spec.preprocessing
    assert (p.mean, p.std, p.interpolation, p.assumed) == ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bicubic", False)
    cfg = json.loads(hub.repositories["timm/resnet18.a1_in1k"]["config.json"])["pretrained_cfg"]
    theirs = timm.data.create_transform(**timm.data.resolve_data_config({}, pretrained_cfg=cfg))
    assert p.resize == theirs.transforms[0].size == math.floor(64 / 0.95)
    assert found.spec.input_shape == (3, 64, 64)
    assert found.spec.labels == ("ant", "bee", "cat")
    published = found.provenance["published"]
    assert published == {
        "name": f"timm/resnet18.a1_in1k@{COMMIT}",
        "revision": COMMIT,
        "licence": "apache-2.0",
        "file": "model.safetensors",
        "sha256": hashlib.sha256(safe()).hexdigest(),
    }
    assert any("96" in str(note) for note in found.provenance["notes"])  # type: ignore[attr-defined]


def test_the_user_goes_before_what_is_published(hub: type[Hub]) -> None:
    fill(hub)
    found = load_checkpoint("timm/resnet18.a1_in1k", input_shape=(3, 96, 96), preprocess="resize=110")
    assert found.spec.input_shape == (3, 96, 96)
    p = found.spec.preprocessing
    assert (p.resize, p.mean, p.interpolation) == (110, (0.5, 0.4, 0.3), "bicubic")
    named_ = load_checkpoint("timm/resnet18.a1_in1k", preprocess="imagenet")
    assert named_.spec.preprocessing.mean == (0.485, 0.456, 0.406)
    assert named_.spec.preprocessing.resize == math.floor(64 / 0.95)


def test_a_processor_of_transformers_is_read(hub: type[Hub]) -> None:
    labels = json.dumps({"id2label": {"0": "ant", "1": "bee", "2": "cat"}}).encode()
    processor = {
        "size": {"shortest_edge": 64},
        "crop_pct": 0.875,
        "resample": 3,
        "image_mean": [0.1] * 3,
        "image_std": [0.2] * 3,
    }
    hub.repositories["org/net"] = {
        "model.safetensors": safe(), "config.json": labels, "preprocessor_config.json": json.dumps(processor).encode(),
    }  # fmt: skip
    found = load_checkpoint("hf:org/net@v1")
    p = found.spec.preprocessing
    assert (p.mean, p.std, p.resize, p.interpolation) == ((0.1,) * 3, (0.2,) * 3, math.floor(64 / 0.875), "bicubic")
    assert found.spec.labels == ("ant", "bee", "cat")
    assert found.provenance["published"]["name"] == f"hf:org/net@{COMMIT}"  # type: ignore[index]
    assert found.provenance["published"]["licence"] is None  # type: ignore[index]


def test_safetensors_go_before_a_pickle_which_is_read_without_running_it(hub: type[Hub], tmp_path: Path) -> None:
    fill(hub, **{"pytorch_model.bin": b"\x80\x02cposix\nsystem\n(S'false'\ntR."})
    assert load_checkpoint("hf:timm/resnet18.a1_in1k").provenance["container"] == "safetensors"
    hub.repositories["org/old"] = {"pytorch_model.bin": pickled(tmp_path / "w.bin")}
    assert load_checkpoint("hf:org/old").provenance["container"] == "torch"
    hub.repositories["org/evil"] = {"pytorch_model.bin": b"\x80\x02cposix\nsystem\n(S'false'\ntR."}
    with pytest.raises(CheckpointError):
        load_checkpoint("hf:org/evil")


def test_a_pinned_name_and_a_file_in_a_repository_need_no_connection_again(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(hub)
    hub.repositories["org/two"] = {"runs/best.safetensors": safe()}
    first = named.fetch("timm/resnet18.a1_in1k")
    inside = named.fetch("hf:org/two/runs/best.safetensors")
    assert inside.name == f"hf:org/two/runs/best.safetensors@{COMMIT}"
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    assert named.fetch(first.name) == first
    assert named.fetch(inside.name).path == inside.path
    assert load_checkpoint(first.name).spec.labels == ("ant", "bee", "cat")


def test_without_a_connection_the_command_that_would_fetch_it_is_named(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    with pytest.raises(EnvironmentFailed, match="hub cannot be reached") as e:
        load_checkpoint("timm/resnet18.a1_in1k@v1")
    assert "hf download timm/resnet18.a1_in1k model.safetensors config.json README.md --revision v1" in str(e.value)
    assert e.value.exit_code == 7


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf:org/none", "no such repository"),
        ("hf:org/net@v9", "no revision 'v9'"),
        ("hf:org/gated", "not open to everybody"),
        ("hf:org/net/other.safetensors", "no file other.safetensors"),
        ("hf:org/odd", "hf:org/odd/a/best.pth"),
        ("hf:net", "write it like"),
        ("hf:org/../net", "write it like"),
        ("hf:org/net@a b", "write it like"),
    ],
)
def test_what_the_hub_does_not_have_is_bad_input(hub: type[Hub], name: str, words: str) -> None:
    hub.repositories |= {"org/net": {"model.safetensors": safe()}, "org/odd": {"a/best.pth": b"x"}}
    hub.gated.add("org/gated")
    with pytest.raises(CheckpointError, match="") as e:
        load_checkpoint(name)
    assert words in str(e.value)
    assert name in str(e.value)


def test_a_variant_that_its_config_names_is_refused(hub: type[Hub]) -> None:
    fill(hub)
    changed = json.loads(config()) | {"architecture": "resnetblur18"}
    hub.repositories["timm/resnet18.a1_in1k"]["config.json"] = json.dumps(changed).encode()
    with pytest.raises(CheckpointError, match="resnetblur18"):
        load_checkpoint("timm/resnet18.a1_in1k")


def test_hostile_cards_and_configs_end_no_command(hub: type[Hub]) -> None:
    odd = b'{"pretrained_cfg": {"mean": "x", "std": [NaN, 1, 1], "crop_pct": true, "input_size": [3, -1, 9]}, "label_names": 7}'
    for i, text in enumerate((b"[" * 100_000, b"{", b"[]", b"\xff", odd)):
        files = {"model.safetensors": safe(), "config.json": text, "README.md": b"---\nlicense: [[[\n---"}
        hub.repositories[f"org/net{i}"] = files
        found = load_checkpoint(f"hf:org/net{i}")
        assert found.spec.preprocessing.mean == (0.485, 0.456, 0.406), "what is assumed otherwise"
        assert found.provenance["published"]["licence"] is None  # type: ignore[index]


def test_a_file_of_that_path_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("timm/resnet50.pth", "torchvision/resnet50.safetensors", "timm/a/b", "models/resnet50", "timm/net.onnx"):
        assert not named.is_name(text), text
    for text in ("timm/resnet50", "timm/resnet50.a1_in1k@main", "torchvision/resnet50@IMAGENET1K_V1", "hf:a/b"):
        assert named.is_name(text), text
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "resnet50.a1_in1k").write_bytes(b"")
    assert not named.is_name("timm/resnet50.a1_in1k")


def test_a_name_without_a_tag_is_what_timm_takes(hub: type[Hub]) -> None:
    wanted = timm.models.get_pretrained_cfg("resnet18").hf_hub_id
    fill(hub, wanted)
    assert named.fetch("timm/resnet18").name == f"{wanted}@{COMMIT}"
    with pytest.raises(CheckpointError, match="resnet18"):
        named.fetch("timm/resnet81")


def test_torchvision_names_are_read_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision.models")
    chosen = models.get_model_weights("resnet18").DEFAULT
    content = pickled(tmp_path / "w.pth")
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / f"resnet18-{digest[:8]}.pth"
    file.parent.mkdir()
    real = named._downloaded
    monkeypatch.setattr(named, "_downloaded", lambda url: real(f"{NOWHERE}/{file.name}"))
    with pytest.raises(EnvironmentFailed, match="curl -L -o") as e:
        named.fetch("torchvision/resnet18")
    assert e.value.exit_code == 7
    file.write_bytes(content)
    found = named.fetch("torchvision/resnet18")
    assert found.name == f"torchvision/resnet18@{chosen.name}"
    p = load_checkpoint("torchvision/resnet18").spec.preprocessing
    theirs = chosen.transforms()
    assert (p.resize, list(p.mean), list(p.std), p.interpolation) == (
        theirs.resize_size[0], theirs.mean, theirs.std, theirs.interpolation.value,
    )  # fmt: skip
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="SHA-256"):
        named.fetch("torchvision/resnet18")
    for name in ("torchvision/resnet81", "torchvision/resnet18@IMAGENET9K_V1"):
        with pytest.raises(CheckpointError, match="torchvision"):
            named.fetch(name)
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    with pytest.raises(ToolMissing, match="torchvision"):
        named.fetch("torchvision/resnet18")


def test_commands_and_configs_take_a_name(
    hub: type[Hub], rescompress: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(hub)
    shown = json.loads(rescompress("inspect", "timm/resnet18.a1_in1k", "--json", cwd=tmp_path).stdout)
    assert shown["published"]["revision"] == COMMIT
    assert json.loads(rescompress("predict", "timm/resnet18.a1_in1k", "--json", cwd=tmp_path).stdout)["p50_ms"] > 0
    rescompress("init", "timm/resnet18.a1_in1k", "--data", "builtin:digits", cwd=tmp_path)
    assert f"\ncheckpoint: timm/resnet18.a1_in1k@{COMMIT}\n" in (tmp_path / "rescompress.yaml").read_text()
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)  # it is pinned, and in the cache
    from rescompress.runs.config import load_config
    from rescompress.runs.plan import opening_of, run_plan
    from rescompress.runs.settings import Settings

    loaded = load_config(tmp_path / "rescompress.yaml")
    opening = opening_of(loaded)
    assert opening.name == f"timm/resnet18.a1_in1k@{COMMIT}"
    plain = loaded.model_copy(update={"checkpoint": str(opening.path)})
    keys = [run_plan(c, Settings(None, None, 0, "cpu", None, None))[0].depends["source"] for c in (loaded, plain)]
    assert keys[0] != keys[1], "what is published beside the file counts"
    rescompress("prune", "timm/resnet18.a1_in1k", "--ratio", "0.3", "-o", "half.safetensors", cwd=tmp_path)
    pruned = load_checkpoint(tmp_path / "half.safetensors")
    assert pruned.spec.labels == ("ant", "bee", "cat")
    manifest = json.loads((tmp_path / "rescompress-out" / "manifest.json").read_text())
    assert manifest["stages"][0]["details"]["provenance"]["published"]["licence"] == "apache-2.0"
    done = rescompress("inspect", "hf:org/none", cwd=tmp_path, code=7)
    assert "hf download org/none" in done.stderr
