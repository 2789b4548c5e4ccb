"""The bundle for people who carry files to a board by hand: everything to build, time and use the engine there."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

from edge_targets import infer, trt_builder
from edge_targets.build_script import build_script
from edge_targets.device import Precision, Target
from edge_targets.trtexec import InputShapes
from rescompress.core.artifact import file_sha256, write_bytes, write_text
from rescompress.core.graph import Network
from rescompress.core.spec import ModelSpec

OPTIONAL = ("labels.txt",)
"""Files that a bundle has for some networks only."""
EXECUTABLE = ("build.sh", "infer.py", "trt_builder.py")


def about(spec: ModelSpec | Network, target: Target, precision: Precision, onnx_sha256: str) -> dict[str, Any]:
    """Return what ``model.json`` of a bundle says: how to feed the network, and what it is."""
    return {
        "arch": spec.arch,
        "input_shape": list(spec.input_shape),
        "preprocessing": spec.preprocessing.model_dump(mode="json"),
        "labels": list(spec.labels) if spec.labels else None,
        "onnx_sha256": onnx_sha256,
        "precision": precision,
        "target": target.name,
        "tensorrt": target.tensorrt_version,
        "jetpack": target.jetpack,
    }


def write_bundle(
    onnx_path: Path, spec: ModelSpec | Network, target: Target, precision: Precision, *, shapes: InputShapes | None = None
) -> list[Path]:
    """Complete the folder of an exported ``model.onnx`` to a bundle; return the files beside it.

    Written are ``build.sh`` for the board's TensorRT, ``trt_builder.py``, ``infer.py``, ``model.json``, ``labels.txt`` where
    the network has labels, ``README.md`` and ``SHA256SUMS``.

    Args:
        onnx_path: The model; the other files go beside it.
        spec: The network.
        target: A board with TensorRT.
        precision: What the network computes in.
        shapes: Profile of a dynamic batch.

    Raises:
        TargetError: The target has no TensorRT.
        EnvironmentFailed: The disk is full.
    """
    folder = onnx_path.parent
    sha256 = file_sha256(onnx_path)
    texts = {
        "build.sh": build_script(target, precision, onnx=onnx_path.name, shapes=shapes),
        "infer.py": Path(infer.__file__).read_text(encoding="utf-8"),
        "trt_builder.py": Path(trt_builder.__file__).read_text(encoding="utf-8"),
        "model.json": json.dumps(about(spec, target, precision, sha256), indent=1, ensure_ascii=False) + "\n",
        "README.md": _readme(onnx_path.name, spec, target, precision),
    }
    if spec.labels:
        texts["labels.txt"] = "".join(f"{_one_line(label)}\n" for label in spec.labels)
    for name in OPTIONAL:  # that of another network may be there
        if name not in texts:
            (folder / name).unlink(missing_ok=True)
    files = []
    for name, text in texts.items():
        write_text(folder / name, text)
        files.append(folder / name)
    for name in EXECUTABLE:
        (folder / name).chmod(0o755)
    sums = [f"{file_sha256(f)}  {f.name}\n" for f in sorted([onnx_path, *files])]
    write_text(folder / "SHA256SUMS", "".join(sums))
    return [*files, folder / "SHA256SUMS"]


def _one_line(text: str) -> str:
    """Return the text with everything that is no printable character escaped: it may come from a stranger's file."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _readme(onnx: str, spec: ModelSpec | Network, target: Target, precision: Precision) -> str:
    arch = re.sub(r"([\\`*\[\]<>!#|@])", r"\\\1", _one_line(spec.arch))
    return f"""# {arch} for the {target.device.title}, {precision}

Made for JetPack {target.jetpack} (TensorRT {target.tensorrt_version}). On the board, in this folder:

    sha256sum -c SHA256SUMS
    ./build.sh                                  # builds model.engine and times it
    python3 infer.py model.engine photo.jpg     # the five best classes

- An engine runs only on the GPU and the TensorRT version it was built with; `{onnx}` is what travels.
- For steady figures first: `sudo nvpmodel -m 0 && sudo jetson_clocks`.
- Where there is no `trtexec` (pip, containers), `build.sh` uses `trt_builder.py`, which needs the TensorRT Python module alone.
- `infer.py` needs numpy, the TensorRT Python module of JetPack and Pillow; `model.json` tells it the preprocessing.
"""


def pack(folder: Path, archive: Path) -> None:
    """Write the files of `folder` as a ``.tar.gz`` whose bytes depend on their content only.

    Raises:
        EnvironmentFailed: The disk is full.
    """
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != archive):
            info = tarfile.TarInfo(f"{folder.name}/{path.relative_to(folder).as_posix()}")
            info.size = path.stat().st_size
            info.mode = 0o755 if path.name in EXECUTABLE else 0o644
            with path.open("rb") as f:
                tar.addfile(info, f)
    write_bytes(archive, gzip.compress(raw.getvalue(), mtime=0))
